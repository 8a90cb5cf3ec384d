"""Models with maps in lm-evaluation-harness: the model type ``lineas``, which is ``hf`` with maps on.

lm-eval scores a continuation by one pass over context and continuation, padded on the right and without a mask. To
hooks all of that is one prompt. `RequestTokens` tells them where each context ends, so that maps act on the tokens that
they would act on if the continuation were generated.

``python -m lineas.evaluation.harness`` is lm-eval's own command line for versions of it that do not look for models in
other packages; later ones find this one by its entry point.
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

try:
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM  # which fills the registry as well
except ModuleNotFoundError as error:
    raise ImportError(f'lineas.evaluation.harness needs lm-eval: pip install "lineas[lm-eval]" ({error})') from error

from .._checks import as_finite
from .._warn import warn
from ..hooks.attach import Handle
from ..hooks.modules import check_model
from ..hooks.tokens import Tokens, check_fit_tokens, needs_prompt_length, select
from ..maps.files import load
from ..maps.gates import arrays_of, facts_of
from ..maps.metadata import Selection, check_tokens, fitted_tokens, show_tokens, spell_tokens
from ..maps.steering import SteeringMaps

NAME = "lineas"
CALIBRATED = "calibrated"
_CACHE_KEY = "lineas"  # lm-eval's own keys are hashes


class RequestTokens:
    """A selection of tokens that knows which tokens of lm-eval's passes are context, continuation and padding.

    What it selects of a continuation are the tokens that would be selected if the model generated it: the context is
    the prompt, what follows is generated. Between `tell` and its end it knows the rows of a list of requests; elsewhere
    the tokens are as the hooks see them, as in a generation.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.__name__ = show_tokens(selection).removeprefix("tokens=")  # for error messages
        self._rows: Mapping[bytes, tuple[int, int]] | None = None

    @contextmanager
    def tell(self, rows: Mapping[bytes, tuple[int, int]] | None) -> Iterator[None]:
        """Let passes bring rows whose lengths of context and of all tokens are known by `row_key`; None: others."""
        before, self._rows = self._rows, rows
        try:
            yield
        finally:
            self._rows = before

    def __call__(self, tokens: Tokens) -> Tensor:
        if self._rows is not None:
            tokens = self._told(tokens, self._rows)
        if tokens.prompt_length is None and needs_prompt_length(self.selection):
            raise ValueError(f"{show_tokens(self.selection)} must know where the prompt ends: give it in one pass")
        return select(self.selection, tokens)

    def _told(self, tokens: Tokens, rows: Mapping[bytes, tuple[int, int]]) -> Tokens:
        ids = tokens.ids
        if ids is None:
            raise ValueError(
                f"{show_tokens(self.selection)} needs a model that gets token ids, to tell contexts from continuations"
            )
        try:
            known = [rows[row_key(row)] for row in ids.cpu().numpy()]
        except KeyError:
            raise RuntimeError(
                "lm-eval ran the model on a row that is none of its requests, so where its context ends cannot be "
                "told: this version of lm-eval batches requests in another way than lineas knows"
            ) from None
        prompt, length = torch.tensor(known, device=ids.device).unbind(dim=1)
        columns = torch.arange(ids.shape[1], device=ids.device)
        mask = columns < length[:, None]
        positions = columns.expand(ids.shape).masked_fill(~mask, -1)
        return replace(tokens, positions=positions, prompt_length=prompt, mask=mask)


def row_key(tokens: ArrayLike) -> bytes:
    """By which the row of a request is known again in a batch, where it is padded on the right with zeros."""
    ids = np.trim_zeros(np.asarray(tokens, dtype=np.int64), "b")
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


class LineasLM(HFLM):
    """A transformers model with maps on, for lm-eval: its ``hf`` with three more arguments.

    The maps are on while requests are run, and off before and after, also after an error. They act on the same tokens
    as in a generation, with their contexts for the prompts: "generated" are the tokens of a continuation (of a text
    that is scored without a context, all but what lm-eval puts before it), "last" these and the last of the context.
    The first token of a continuation is predicted from the last of its context, so maps for "generated" never change
    its score: those of answers of a single token stay as they are, and a warning counts them.

    Parameters
    ----------
    pretrained : str or PreTrainedModel
        As in lm-eval: a folder, a hub id, or a loaded model, which is then left without maps.
    maps : str, PathLike, SteeringMaps or FitResult
        The maps, or a file, folder or hub id of them as `lineas.load` takes it. Several names with "+" between them are
        added, as ``maps + others`` adds them; a name that is there as a whole is one.
    strength : float or "calibrated", default 1.0
        0 is off, 1 the maps; "calibrated" is what their calibration says, see `lineas.SteeringMaps.attach`.
    map_tokens : str, slice or callable, optional
        The tokens that the maps act on: "all", "last", "prompt", "generated", a slice of positions, also written
        "start:stop:step" such as "-3:", or a callable as `lineas.SteeringMaps.attach` takes it. Default: those that the
        maps were fitted for.
    **options
        Everything that lm-eval's ``hf`` takes: ``tokenizer``, ``dtype``, ``batch_size``, ``device``, ...

    Raises
    ------
    TypeError
        If an argument is of a wrong type.
    ValueError
        If maps, a strength or tokens cannot be used, a module of the maps is missing in the model or has another width,
        or the tokens are selected in a model with an encoder and a decoder. All of this comes before weights are read.
    FileNotFoundError
        If there are no such maps.

    Examples
    --------
    With maps, a model and its tokenizer at hand::

        lm = LineasLM(pretrained=model, tokenizer=tokenizer, maps=maps, strength=0.5, batch_size=8)
        results = lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])

    From the shell, with the whole command line of lm-eval (see docs/lm-eval.md)::

        python -m lineas.evaluation.harness run --model lineas --tasks arc_easy \\
            --model_args pretrained=MODEL,maps=maps.safetensors,strength=0.5
    """

    def __init__(
        self,
        pretrained: Any,
        maps: Any = None,
        strength: Any = 1.0,
        map_tokens: Selection | None = None,
        **options: Any,
    ) -> None:
        self._strength = _read_strength(strength)
        selection = None if map_tokens is None else _read_tokens(map_tokens)
        self._maps, self._names = _read_maps(maps)
        self._selection = _fitted_tokens(self._maps) if selection is None else selection
        # Where contexts end does not matter to the others: lm-eval pads on the right, so positions are columns.
        self._by_context = callable(self._selection) or needs_prompt_length(self._selection)
        self._tokens = RequestTokens(self._selection)
        if not isinstance(pretrained, str):
            self._check(pretrained)
        super().__init__(pretrained=pretrained, **options)
        self._check(self.model)

    def _check(self, model: nn.Module) -> None:
        """Errors of `attach`, without maps left on; notes the strength that the maps get."""
        check_model(model)
        check_fit_tokens(self._selection, model)
        with self._attach(model) as handle:
            self._given = handle.strength

    def _attach(self, model: nn.Module) -> Handle:
        tokens = self._tokens if self._by_context else self._selection
        return self._maps.attach(model, self._strength, tokens=tokens)

    def _create_model(self, *args: Any, **options: Any) -> None:
        outline = None
        if not options.get("peft"):  # maps may sit on modules of the adapter
            # What a model cannot be made for without its weights, loading it will say.
            with suppress(Exception), torch.device("meta"):
                outline = self.AUTO_MODEL_CLASS.from_config(
                    self.config, trust_remote_code=options.get("trust_remote_code")
                )
        if outline is not None:
            self._check(outline)
        super()._create_model(*args, **options)

    # --- requests -----------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Any, *args: Any, **options: Any) -> Any:
        with self._attach(self.model):
            return super().loglikelihood(requests, *args, **options)

    def loglikelihood_rolling(self, requests: Any, *args: Any, **options: Any) -> Any:
        with self._attach(self.model):
            return super().loglikelihood_rolling(requests, *args, **options)

    def generate_until(self, requests: Any, *args: Any, **options: Any) -> Any:
        with self._attach(self.model):
            return super().generate_until(requests, *args, **options)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
        if not self._by_context:
            return super()._loglikelihood_tokens(requests, *args, **options)
        single = sum(len(continuation) == 1 for _, _, continuation in requests)
        if single and self._selection == "generated":
            warn(
                f"map_tokens='generated' leaves {single} of {len(requests)} scores as they are: continuations of a "
                "single token are predicted from the context alone, as the first token of an answer is; 'last' maps "
                "the end of the context as well",
                UserWarning,
            )
        # lm-eval runs requests with the same tokens once, wherever their contexts end, and rows are told by their
        # tokens: what is alike in them and not in its lengths is run apart.
        parts: list[tuple[dict[bytes, tuple[int, int]], list[int]]] = []
        longest = self.max_length
        for k, (_, context, continuation) in enumerate(requests):
            row = (context + continuation)[-(longest + 1) :][:-1]
            lengths = len(row) - len(continuation) + 1, len(row)
            key = row_key(row)
            part = next((part for part in parts if part[0].get(key, lengths) == lengths), None)
            if part is None:
                part = {}, []
                parts.append(part)
            part[0][key] = lengths
            part[1].append(k)
        results: list[Any] = [None] * len(requests)
        for rows, members in parts:
            with self._tokens.tell(rows):
                found = super()._loglikelihood_tokens([requests[k] for k in members], *args, **options)
            for k, result in zip(members, found, strict=True):
                results[k] = result
        return results

    def _detect_batch_size(self, *args: Any, **options: Any) -> Any:
        with self._tokens.tell(None):  # it runs rows of its own
            return super()._detect_batch_size(*args, **options)

    # --- what is kept -------------------------------------------------------------------------------------------------

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the "config" of its results, with the maps, their strength and their tokens."""
        return super().get_model_info() | self._facts()

    def _facts(self) -> dict[str, Any]:
        return {
            "maps": self._names,
            "maps_sha256": _checksum(self._maps),
            "strength": self._given,
            "map_tokens": spell_tokens(self._selection),
        }

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take lm-eval's cache of answers (``use_cache``), which does not know that other maps give other answers.

        ValueError where the answers in it are of other maps, another strength, other tokens or another model type.
        """
        answers = cache_hook.dbdict
        if answers is not None:
            facts = {name: fact for name, fact in self._facts().items() if name != "maps"}
            if not len(answers):
                answers[_CACHE_KEY] = facts
            whose = answers.get(_CACHE_KEY)
            if whose != facts:
                raise ValueError(
                    f"use_cache: {answers.filename} holds the answers of {whose or 'a model without maps'}, not of "
                    f"{facts}: give each its own file"
                )
        super().set_cache_hook(cache_hook)


def _read_strength(strength: Any) -> float | str:
    """A number, or "calibrated"."""
    if isinstance(strength, str):
        if strength == CALIBRATED:
            return strength
        try:
            strength = float(strength)
        except ValueError:
            raise ValueError(f"strength must be a number or {CALIBRATED!r}, got {strength!r}") from None
    return as_finite(strength, "strength")


def _read_tokens(tokens: Any) -> Selection:
    """A selection, slices also as a text."""
    if isinstance(tokens, str) and ":" in tokens:
        try:
            tokens = slice(*(int(part) if part.strip() else None for part in tokens.split(":")))
        except (TypeError, ValueError):
            raise ValueError(f"map_tokens must be a word or start:stop:step, got {tokens!r}") from None
    try:
        return check_tokens(tokens)
    except (TypeError, ValueError) as error:
        raise type(error)(f"map_{error}") from None


def _fitted_tokens(maps: SteeringMaps) -> Selection:
    """The tokens that the maps were fitted for; ValueError, in the words of model_args, where that cannot be told."""
    try:
        return fitted_tokens(maps.metadata)
    except ValueError as error:
        raise ValueError(str(error).replace("tokens=", "map_tokens=")) from None


def _read_maps(maps: Any) -> tuple[SteeringMaps, str]:
    """The maps, and what to call them."""
    if maps is None:
        raise ValueError("maps: expected a file, folder or hub id of maps, got none: give maps=... in the model_args")
    if not isinstance(maps, str | os.PathLike):
        found = getattr(maps, "maps", maps)  # those of the result of a fit
        if not isinstance(found, SteeringMaps):
            raise TypeError(f"maps must be SteeringMaps, the result of a fit or a name, got {type(maps).__name__}")
        return found, repr(found)
    name = os.fspath(maps)
    names = [name] if os.path.exists(name) else name.split("+")
    if not all(names):
        raise ValueError(f"maps: expected names with + between them, got {name!r}")
    return functools.reduce(operator.add, map(_load_maps, names)), name


def _load_maps(name: str) -> SteeringMaps:
    """The maps in a file, in a folder or on the hub."""
    found = load(name)
    maps = getattr(found, "maps", found)
    if not isinstance(maps, SteeringMaps):
        what = "a sparse path: save the maps of one of its points" if hasattr(found, "at") else type(found).__name__
        raise ValueError(f"maps: {name} holds {what}")
    return maps


def _checksum(maps: SteeringMaps) -> str:
    """The same for equal maps, whatever their metadata say."""
    found = hashlib.sha256()
    for name, one in maps.items():
        for part in (one.weight, one.bias):
            found.update(f"{name} {part.dtype} {len(part)} ".encode())
            found.update(np.ascontiguousarray(part).tobytes())
    for name, gate in maps.gates.items():
        found.update(f"{name} gate {json.dumps(facts_of(gate))} ".encode())
        for key, part in arrays_of(gate).items():
            found.update(f"{key} {part.dtype} {len(part)} ".encode())
            found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()


def register() -> None:
    """Let lm-eval know the model type ``lineas``, as importing this module does; does nothing where it is known."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=f"lineas.evaluation.harness:{LineasLM.__name__}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run lm-eval's own command line, with the model type ``lineas``.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments without the program's name, as ``lm_eval`` takes them. Default: those of the process.
    """
    from lm_eval.__main__ import cli_evaluate

    register()
    if argv is not None:
        sys.argv = [sys.argv[0], *argv]  # which it reads
    cli_evaluate()


register()

if __name__ == "__main__":
    main()
