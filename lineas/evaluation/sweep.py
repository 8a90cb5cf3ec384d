"""`lineas.evaluate`: effect, price and text quality of maps over strengths, all points on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from .._checks import as_flag, as_int
from ..fitting.checkpoint import digest, digest_of_weights
from ..hooks.modules import check_runs, model_name
from ..hooks.settings import as_tokenizer, optional
from ..inputs.frozen import frozen
from ..maps.metadata import Selection, check_tokens
from .continuations import Continuation, Generator
from .controls import CONTROLS, make_controls
from .judges import as_judges, score
from .log import Log
from .neutral import Neutral
from .points import Point, make_points, read_methods
from .result import UNSTEERED, Evaluation

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
        computed again; more methods and strengths may be added. Not the scores, which judges give at the end.
    progress : bool, default True
        Show a progress bar.

    Returns
    -------
    Evaluation
        After Ctrl-C that of the points which were measured whole, if there are two; else KeyboardInterrupt.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong type or out of range, there is nothing to measure on, maps do not fit the model, a
        continuation or neutral text cannot be made, or `checkpoint` is of another evaluation. All of that, and judges
        that fail on the first two prompts, before anything is computed.
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
    methods = read_methods(maps)
    tokens = None if tokens is None else check_tokens(tokens)
    instructions = _read_instructions(instruction, methods)
    for name in controls if not isinstance(controls, str) else [controls]:
        if name not in CONTROLS:
            raise ValueError(f"controls must be of {', '.join(map(repr, CONTROLS))}, got {name!r}")
    if prompts is None and neutral is None:
        raise ValueError("give prompts=, for the effect, or neutral=, for the price, or both")
    if judges is not None and prompts is None:
        raise ValueError("judges: there are no continuations to judge without prompts=")
    if sampling is not None and not isinstance(sampling, Mapping):
        raise TypeError(f"sampling must be a mapping of arguments for generate, got {type(sampling).__name__}")
    if generate is not None and not callable(generate):
        raise TypeError(f"generate must be a function of model and prompts, got {type(generate).__name__}")
    seed, progress = as_int(seed, "seed", low=0), as_flag(progress, "progress")
    max_length = optional(as_int, max_length, "max_length", low=1)
    judged = {} if judges is None else as_judges(judges)
    generator = (
        None
        if prompts is None
        else Generator(
            model,
            prompts,
            tokenizer,
            samples=as_int(samples, "samples", low=1),
            max_length=max_length,
            max_new_tokens=as_int(max_new_tokens, "max_new_tokens", low=1),
            batch_size=as_int(batch_size, "batch_size", low=1),
            sampling=sampling or {},
            seed=seed,
            generate=generate,
        )
    )
    texts = None if neutral is None else Neutral(model, neutral, tokenizer=tokenizer, max_length=max_length)
    made = make_controls(
        controls,
        methods,
        model,
        source,
        target,
        tokenizer=tokenizer,
        max_length=max_length,
        seed=seed,
        progress=progress,
    )
    points = [Point(UNSTEERED, 0.0)]
    points += [Point(name, 0.0, instruction=text) for name, text in instructions.items()]
    points += make_points(model, methods | made, _for_controls(strengths, methods, made), tokens)
    if generator is not None:
        for name, judge in judged.items():
            some = [_as_text(prompt) for prompt in generator.prompts[:2]]
            score(name, judge, some, generator.prompts[:2])

    identity = {
        "model": digest_of_weights(model),
        "prompts": "" if generator is None else digest(generator.contents()),
        "neutral": "" if texts is None else digest(texts.contents()),
    }
    run = _Run(model, points, generator, texts, Log(checkpoint, identity))
    stopped = "finished"
    try:
        with frozen(model, gradients=False):
            run.measure(progress)
    except KeyboardInterrupt:
        stopped = "interrupted"
        if len(run.whole()) < 2:
            raise
    metadata = {
        "model": model_name(model),
        "methods": {name: one.metadata for name, one in (methods | made).items()},
        "instructions": instructions,
        "support": {name: [one.support, one.d] for name, one in (methods | made).items()},
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "sampling": None if generator is None or generate is not None else _as_json(generator.options),
        "seed": seed,
    }
    found = run.evaluation(metadata, stopped)
    return found.judge(judged) if judged else found


class _Run:
    """The points on the way to being measured."""

    def __init__(
        self, model: nn.Module, points: list[Point], generator: Generator | None, neutral: Neutral | None, log: Log
    ) -> None:
        self.model, self.points, self.generator, self.neutral, self.log = model, points, generator, neutral, log
        self.keys = [point.identity() for point in points]

    def measure(self, progress: bool) -> None:
        """Measure what is not known yet: prices batch by batch, then the continuations point by point."""
        prices = [(batch, k) for batch in range(len(self._price_batches())) for k in range(len(self.points))]
        texts = [(k, batch) for k in range(len(self.points)) for batch in range(len(self._text_batches()))]
        known = sum(self._price_key(k, batch) in self.log for batch, k in prices)
        known += sum(self._text_key(k, batch) in self.log for k, batch in texts)
        with tqdm(
            total=len(prices) + len(texts), initial=known, desc="evaluate", unit="batch", disable=not progress
        ) as bar:
            for batch in range(len(self._price_batches())):
                missing = [k for k in range(len(self.points)) if self._price_key(k, batch) not in self.log]
                if missing:
                    assert self.neutral is not None
                    values = self.neutral.measure([self.points[k] for k in missing], batch, bar.update)
                    for k, value in zip(missing, values, strict=True):
                        self.log.put(self._price_key(k, batch), value.tolist())
            for k, batch in texts:
                if self._text_key(k, batch) not in self.log:
                    assert self.generator is not None
                    found = self.generator.run(self.points[k], batch)
                    self.log.put(self._text_key(k, batch), found)
                    bar.update()

    def whole(self) -> list[int]:
        """Numbers of the points of which everything is known; none unless the unsteered model is among them."""
        found = [
            k
            for k in range(len(self.points))
            if all(self._price_key(k, batch) in self.log for batch in range(len(self._price_batches())))
            and all(self._text_key(k, batch) in self.log for batch in range(len(self._text_batches())))
        ]
        return found if 0 in found else []

    def evaluation(self, metadata: dict[str, Any], stopped: str) -> Evaluation:
        """What is known of the points that are whole, without scores."""
        whole = self.whole()
        prompts = [] if self.generator is None else self.generator.prompts
        samples = 0 if self.generator is None else self.generator.samples
        texts = [[[""] * samples for _ in prompts] for _ in whole]
        statistics = np.full((len(whole), len(prompts), samples, 6), np.nan)
        price = np.full((len(whole), 0 if self.neutral is None else len(self.neutral), 7), np.nan)
        for place, k in enumerate(whole):
            filled = [0] * len(prompts)
            for batch, rows in enumerate(self._text_batches()):
                for row, entry in zip(rows, self.log[self._text_key(k, batch)], strict=True):
                    one = Continuation(*entry)
                    texts[place][row][filled[row]] = one.text
                    statistics[place, row, filled[row]] = one.statistics
                    filled[row] += 1
            for batch, rows in enumerate(self._price_batches()):
                price[place, rows] = self.log[self._price_key(k, batch)]
        return Evaluation(
            methods=tuple(self.points[k].method for k in whole),
            strengths=np.array([self.points[k].strength for k in whole]),
            prompts=prompts,
            continuations=texts,
            statistics=statistics,
            scores={},
            price=price,
            neutral=[] if self.neutral is None else self.neutral.texts,
            metadata=metadata,
            stopped=stopped,
        )

    def _price_batches(self) -> list[list[int]]:
        return [] if self.neutral is None else self.neutral.batches

    def _text_batches(self) -> list[list[int]]:
        return [] if self.generator is None else self.generator.batches

    def _price_key(self, point: int, batch: int) -> str:
        return f"price {batch} {self.keys[point]}"

    def _text_key(self, point: int, batch: int) -> str:
        return f"texts {batch} {self.keys[point]}"


def _read_instructions(value: Any, methods: Mapping[str, Any]) -> dict[str, str]:
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
        if name in methods or name == UNSTEERED:
            raise ValueError(f"instruction: {name!r} is the name of another method")
    return dict(found)


def _for_controls(strengths: Any, methods: Mapping[str, Any], controls: Mapping[str, Any]) -> Any:
    """Strengths for controls as well: where they are given by method, those of the method that they are made for."""
    if not isinstance(strengths, Mapping):
        return strengths
    first = strengths.get(next(iter(methods)))
    of = {
        name: strengths.get(name.partition("random ")[2].strip("()") or next(iter(methods)), first) for name in controls
    }
    return {**{name: value for name, value in of.items() if value is not None}, **strengths}


def _as_text(prompt: Any) -> str:
    """A prompt as a text to try judges on."""
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1] if isinstance(prompt, list | tuple) and prompt else ""
    content = last.get("content", "") if isinstance(last, Mapping) else ""
    return content if isinstance(content, str) else ""


def _as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    plain = (str, int, float, bool, type(None))
    return {name: value if isinstance(value, plain) else repr(value) for name, value in options.items()}
