"""`lineas.evaluate`: effect, price and text quality of maps over strengths, all points on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from .._checks import as_flag
from ..fitting.checkpoint import digest, digest_of_weights
from ..hooks.attach import attached
from ..hooks.modules import check_runs, model_name
from ..hooks.settings import as_tokenizer, optional
from ..inputs.frozen import frozen
from ..maps.metadata import Selection, check_tokens
from .continuations import Continuation, GenerationSettings, Generator, try_judges
from .controls import make_controls, name_controls
from .judges import as_judges
from .log import Log
from .neutral import Neutral
from .points import Point, arrays_of, make_points, read_methods, read_strengths
from .result import FIELDS, STATISTICS, UNSTEERED, Evaluation, check_judges
from .texts import as_list

Generate = Callable[[nn.Module, list[Any]], Sequence[str]]


def evaluate(
    model: nn.Module,
    maps: Any,
    *,
    tokenizer: Any = None,
    prompts: Any = None,
    neutral: Any = None,
    judges: Any = None,
    strengths: Any = (0.5, 1.0, 2.0),
    tokens: Selection | None = None,
    instruction: str | Mapping[str, str] | None = None,
    controls: Sequence[str] = (),
    source: Any = None,
    target: Any = None,
    samples: int = 1,
    max_new_tokens: int = 20,
    max_length: int | None = None,
    batch_size: int = 32,
    sampling: Mapping[str, Any] | None = None,
    generate: Generate | None = None,
    seed: int = 0,
    checkpoint: str | PathLike[str] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure what maps do, and what they cost, at several strengths.

    Every point, a method at a strength, continues the same prompts with the same random numbers, and is compared with
    the unsteered model on the same neutral texts, which one pass of that model serves for all points. The model is as
    it was afterwards, also after an error; maps that are attached already count as part of it.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded language model: for `neutral` one that gives logits, for `prompts` one with ``generate``.
    maps : SteeringMaps, FitResult, SparsePath or mapping
        What to evaluate; a mapping from names of methods to these for several. Every point of a path is a method.
    tokenizer : transformers tokenizer, optional
        For texts and conversations, and to read what the model writes.
    prompts : list of texts, conversations or token ids, optional
        What the model continues. Without them only the price is measured.
    neutral : list of texts, conversations or token ids, optional
        What the maps should leave alone, for the price. Without them only the effect is measured.
    judges : judge, sequence or mapping from name to judge, optional
        What scores continuations: a function from a list of texts to one number each, "vader", the id or folder of a
        transformers text classifier, or one of `lineas.judges`.
    strengths : sequence of float, or mapping, default (0.5, 1.0, 2.0)
        For all methods, or by the name of the method. The unsteered model is always measured.
    tokens : "all", "last", "prompt", "generated", slice or callable, optional
        The tokens that maps act on. Default: those that they were fitted for.
    instruction : str or mapping from name to str, optional
        A text to put before every prompt, and neutral text, as a control: before a conversation as its system message.
    controls : sequence of str, optional
        More methods to compare with: "random", maps of the same norms and supports as each of `maps`, with the entries
        in random order and of random sign; and "mean", "iti_c", "aura", "gaussian", "linear" and "incremental", fitted
        from `source` and `target` on the modules of the first of `maps`. They are evaluated at `strengths`, too.
    source, target : list of texts, conversations or token ids, or batches, optional
        What controls are fitted to.
    samples : int, default 1
        Continuations of each prompt.
    max_new_tokens : int, default 20
        Longest continuation in tokens.
    max_length : int, optional
        Longest prompt or neutral text in tokens; longer ones are cut. Default: no limit.
    batch_size : int, default 32
        Prompts that are continued together.
    sampling : mapping, optional
        Arguments for the model's ``generate``. Default: ``do_sample=True, top_p=0.9, top_k=0, temperature=1.0``, of
        which given ones replace the same; ``{"do_sample": False}`` is greedy.
    generate : callable, optional
        ``generate(model, prompts)`` returns one text a prompt, for models that write in another way. It is called in
        batches, with the maps on and torch's seed set.
    seed : int, default 0
        Of the sampling and of random maps.
    checkpoint : path, optional
        A file in which everything is kept as soon as it is known. Where it is there already, what is in it is not
        computed again; more methods and strengths may be added. Not the scores, which judges give at the end. It is
        refused where the weights, the maps that are attached already, or the texts differ; adapters that are switched
        on or off, and what a callable does, are for you to keep the same.
    progress : bool, default True
        Show a progress bar.

    Returns
    -------
    Evaluation
        After Ctrl-C that of the points which were measured whole, if there are two; else KeyboardInterrupt. After
        Ctrl-C while texts are judged, with the scores of the judges before.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong type or out of range, there is nothing to measure on, maps do not fit the model, or
        `checkpoint` is of another evaluation: all of that, and a judge that fails on the first two prompts, before
        anything is computed. Later, if the model gives no logits or none that are finite, or `generate` no texts.
    lineas.judges.JudgeError
        If a judge fails in the end; everything else is in its attribute ``evaluation``.
    OSError
        If the checkpoint cannot be read or written.

    Examples
    --------
    >>> found = lineas.evaluate(model, maps, tokenizer=tokenizer, prompts=prompts, neutral=texts,
    ...                         judges="vader", strengths=[0.5, 1, 2])  # doctest: +SKIP
    >>> found.best(max_kl=0.1)["strength"]  # doctest: +SKIP
    """
    check_runs(model)
    optional(as_tokenizer, tokenizer, "tokenizer")
    if prompts is None and neutral is None:
        raise ValueError("give prompts=, for the effect, or neutral=, for the price, or both")
    if judges is not None and prompts is None:
        raise ValueError("judges: there are no continuations to judge without prompts=")
    if generate is not None and not callable(generate):
        raise TypeError(f"generate must be a function of model and prompts, got {type(generate).__name__}")
    tokens = None if tokens is None else check_tokens(tokens)
    progress = as_flag(progress, "progress")
    settings = GenerationSettings(
        samples=samples,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        sampling=sampling,
        seed=seed,
    )

    methods = read_methods(maps)
    source, target = as_list(source), as_list(target)  # iterated over more than once
    control_names = name_controls(controls, methods, fitted=source is not None and target is not None)
    by_method = read_strengths(strengths, list(methods), control_names)
    instructions = _read_instructions(instruction, [*methods, *control_names])
    points = [Point(UNSTEERED, 0.0), *(Point(name, 0.0, instruction=text) for name, text in instructions.items())]
    points += make_points(model, methods, by_method, tokens)
    texts = None if neutral is None else Neutral(model, neutral, tokenizer=tokenizer, max_length=settings.max_length)
    generator = None if prompts is None else Generator(model, prompts, tokenizer, settings, generate)
    for text in instructions.values():
        if texts is not None:
            texts.counted(text, range(len(texts)))
        if generator is not None:
            generator.prefixed(text)
    judged = {} if judges is None else as_judges(judges)
    check_judges(judged)
    if generator is not None:
        try_judges(judged, generator.prompts)
    log = Log(checkpoint, {} if checkpoint is None else _identity(model, generator, texts))
    made = make_controls(
        control_names,
        methods,
        model,
        source,
        target,
        tokenizer=tokenizer,
        tokens=tokens,
        max_length=settings.max_length,
        seed=settings.seed,
        progress=progress,
    )
    points += make_points(model, made, by_method, tokens)

    run = _Run(points, generator, texts, log)
    stopped = "finished"
    try:
        with frozen(model, gradients=False):
            run.measure(progress)
    except KeyboardInterrupt:
        stopped = "interrupted"
        if len(run.whole()) < 2:
            raise
    every = methods | made
    found = run.evaluation(
        {
            "model": model_name(model),
            "methods": {name: one.metadata for name, one in every.items()},
            "instructions": instructions,
            "support": {name: [one.support, one.d] for name, one in every.items()},
            "samples": settings.samples,
            "max_new_tokens": settings.max_new_tokens,
            "sampling": None if generator is None or generate is not None else _as_json(generator.options),
            "seed": settings.seed,
        },
        stopped,
    )
    try:
        for name, judge in judged.items():
            found = found.judge({name: judge})
    except KeyboardInterrupt:
        found = replace(found, stopped="interrupted")
    return found


class _Run:
    """The points on the way to being measured."""

    def __init__(self, points: list[Point], generator: Generator | None, neutral: Neutral | None, log: Log) -> None:
        self.points, self.generator, self.neutral, self.log = points, generator, neutral, log
        self.identities = [point.identity() for point in points]
        self.batches = {
            "price": [] if neutral is None else neutral.batches,
            "texts": [] if generator is None else generator.batches,
        }

    def measure(self, progress: bool) -> None:
        """Measure what is not known yet: prices batch by batch, then the continuations point by point."""
        keys = [key for k in range(len(self.points)) for key in self._keys(k)]
        known = sum(key in self.log for key in keys)
        with tqdm(total=len(keys), initial=known, desc="evaluate", unit="batch", disable=not progress) as bar:
            for batch in range(len(self.batches["price"])):
                self._measure_price(batch, bar.update)
            for k in range(len(self.points)):
                self._measure_texts(k, bar.update)

    def _measure_price(self, batch: int, done: Callable[[], Any]) -> None:
        missing = [k for k in range(len(self.points)) if self._key("price", k, batch) not in self.log]
        if missing:
            assert self.neutral is not None
            values = self.neutral.measure([self.points[k] for k in missing], batch)
            for k, value in zip(missing, values, strict=True):
                if not np.isfinite(value).all():
                    raise ValueError(f"neutral: the logits of {self.points[k]} are not finite")
                self.log.put(self._key("price", k, batch), value.tolist())
                done()

    def _measure_texts(self, k: int, done: Callable[[], Any]) -> None:
        for batch in range(len(self.batches["texts"])):
            if self._key("texts", k, batch) not in self.log:
                assert self.generator is not None
                try:
                    written = self.generator.run(self.points[k], batch)
                except Exception as error:
                    error.add_note(f"while the prompts were continued by {self.points[k]}")
                    raise
                self.log.put(self._key("texts", k, batch), written)
                done()

    def whole(self) -> list[int]:
        """Numbers of the points of which everything is known; none unless the unsteered model is among them."""
        found = [k for k in range(len(self.points)) if all(key in self.log for key in self._keys(k))]
        return found if 0 in found else []

    def evaluation(self, metadata: dict[str, Any], stopped: str) -> Evaluation:
        """What is known of the points that are whole, without scores."""
        whole = self.whole()
        prompts = [] if self.generator is None else self.generator.prompts
        samples = 0 if self.generator is None else self.generator.samples
        neutral = [] if self.neutral is None else self.neutral.texts.given
        texts: list[list[list[str]]] = [[[] for _ in prompts] for _ in whole]
        statistics = np.empty((len(whole), len(prompts), samples, len(STATISTICS)))
        price = np.empty((len(whole), len(neutral), len(FIELDS)))
        for place, k in enumerate(whole):
            for batch, rows in enumerate(self.batches["price"]):
                price[place, rows] = self.log[self._key("price", k, batch)]
            for batch, rows in enumerate(self.batches["texts"]):
                for row, entry in zip(rows, self.log[self._key("texts", k, batch)], strict=True):
                    one = Continuation(*entry)
                    statistics[place, row, len(texts[place][row])] = one.statistics
                    texts[place][row].append(one.text)
        return Evaluation(
            methods=tuple(self.points[k].method for k in whole),
            strengths=np.array([self.points[k].strength for k in whole]),
            prompts=prompts,
            continuations=texts,
            statistics=statistics,
            scores={},
            price=price,
            neutral=neutral,
            metadata=metadata,
            stopped=stopped,
        )

    def _key(self, what: str, k: int, batch: int) -> str:
        return f"{what} {batch} {self.identities[k]}"

    def _keys(self, k: int) -> list[str]:
        return [self._key(what, k, batch) for what, batches in self.batches.items() for batch in range(len(batches))]


def _identity(model: nn.Module, generator: Generator | None, neutral: Neutral | None) -> dict[str, Any]:
    """What must be the same for findings to be of use, whatever the points."""
    return {
        "model": digest_of_weights(model),
        "attached": [[digest(arrays_of(handle.maps)), repr(handle)] for handle in attached(model)],
        "prompts": "" if generator is None else digest(generator.contents()),
        "neutral": "" if neutral is None else digest(neutral.texts.contents(), neutral.batches),
    }


def _read_instructions(value: Any, taken: Sequence[str]) -> dict[str, str]:
    """The texts to put before prompts, by the name of the method."""
    if value is None:
        return {}
    found = {"instruction": value} if isinstance(value, str) else value
    if not isinstance(found, Mapping):
        raise TypeError(f"instruction must be a text or a mapping from name to text, got {type(value).__name__}")
    for name, text in found.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(f"instruction must be a text or a mapping from name to text, got {name!r}: {text!r}")
        if not text:
            raise ValueError(f"instruction: {name!r} is empty")
        if name in taken or name == UNSTEERED:
            raise ValueError(f"instruction: {name!r} is the name of another method")
    return dict(found)


def _as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    plain = (str, int, float, bool, type(None))
    return {name: value if isinstance(value, plain) else repr(value) for name, value in options.items()}
