"""What is evaluated: points, each a method at a strength, and how one acts on a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import as_finite
from ..fitting.checkpoint import digest
from ..fitting.result import FitResult
from ..hooks.attach import attach
from ..hooks.tokens import Tokens, needs_prompt_length, select
from ..maps.metadata import Selection, fitted_tokens, name_of, spell_tokens
from ..maps.path import SparsePath
from ..maps.steering import SteeringMaps
from .result import UNSTEERED


@dataclass(frozen=True, eq=False)
class Point:
    """A method at a strength: maps that act on the selected tokens, or a text put before every prompt, or neither."""

    method: str
    strength: float
    maps: SteeringMaps | None = None
    tokens: Selection = "all"
    instruction: str | None = None

    @property
    def by_prompt(self) -> bool:
        """Whether the tokens that the maps act on may depend on where the prompt ends."""
        return self.maps is not None and (callable(self.tokens) or needs_prompt_length(self.tokens))

    def identity(self) -> str:
        """A digest of what the point does to a model, whatever it is called."""
        maps = {} if self.maps is None else {name: [one.weight, one.bias] for name, one in self.maps.items()}
        tokens = name_of(self.tokens) if callable(self.tokens) else spell_tokens(self.tokens)
        return digest(maps, repr(tokens), self.strength, self.instruction)[:16]

    @contextmanager
    def on(self, model: nn.Module, prompt_length: Tensor | None = None) -> Iterator[None]:
        """The maps on the model until the block ends.

        `prompt_length` [B] says where the prompt ends in a batch that runs in one pass, in which every token would
        count as one of the prompt.
        """
        if self.maps is None:
            yield
            return
        tokens = self.tokens
        if self.by_prompt and prompt_length is not None:
            tokens = _told(tokens, prompt_length)
        # Without metadata: whether they fit this model was said when the points were made.
        with attach(dict(self.maps), model, self.strength, tokens=tokens):
            yield


def _told(tokens: Selection, prompt_length: Tensor) -> Selection:
    """The selection `tokens` where the prompts have these lengths."""

    def selected(here: Tokens) -> Tensor:
        assert here.mask is not None
        return select(tokens, replace(here, prompt_length=prompt_length.to(here.mask.device)))

    return selected


def read_methods(maps: Any) -> dict[str, SteeringMaps]:
    """What users give as maps, by the name of the method.

    TypeError or ValueError for anything but maps, the result of a fit, a path, or a mapping from name to these.
    """
    if isinstance(maps, SteeringMaps | FitResult | SparsePath):
        name = maps.metadata.get("method") if isinstance(maps, SteeringMaps) else None
        maps = {name if isinstance(name, str) else "maps": maps}
    if not isinstance(maps, Mapping):
        raise TypeError(
            "maps must be SteeringMaps, a FitResult, a SparsePath or a mapping from name to these, got "
            f"{type(maps).__name__}"
        )
    found: dict[str, SteeringMaps] = {}
    for name, value in maps.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"maps: the name of a method must be a string that is not empty, got {name!r}")
        if isinstance(value, FitResult):
            value = value.maps
        if isinstance(value, SparsePath):
            points = {f"{name}, support {value.support[k]}": value[k] for k in range(len(value))}
        else:
            points = {name: value}
        for label, one in points.items():
            if not isinstance(one, SteeringMaps):
                raise TypeError(
                    f"maps[{name!r}] must be SteeringMaps, a FitResult or a SparsePath, got {type(one).__name__}"
                )
            found[label] = one
    if not found:
        raise ValueError("maps is empty")
    if UNSTEERED in found:
        raise ValueError(f"maps: {UNSTEERED!r} is the name of the model without maps, give another")
    return found


def read_strengths(strengths: Any, methods: Sequence[str]) -> dict[str, list[float]]:
    """The strengths of every method, without 0 and without repetition; one list for all, or a mapping by method."""
    if isinstance(strengths, Mapping):
        unknown = [name for name in strengths if name not in methods]
        if unknown:
            raise ValueError(f"strengths: there is no method {unknown[0]!r} among {', '.join(map(repr, methods))}")
        missing = [name for name in methods if name not in strengths]
        if missing:
            raise ValueError(f"strengths: the method {missing[0]!r} has none")
        return {name: _numbers(strengths[name], f"strengths[{name!r}]") for name in methods}
    numbers = _numbers(strengths, "strengths")
    return {name: numbers for name in methods}


def _numbers(values: Any, name: str) -> list[float]:
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        values = [as_finite(values, name)]
    found = [as_finite(value, f"{name}[{k}]") for k, value in enumerate(values)]
    if not found:
        raise ValueError(f"{name} is empty")
    return [value for value in dict.fromkeys(found) if value]


def make_points(
    model: nn.Module, methods: Mapping[str, SteeringMaps], strengths: Any, tokens: Selection | None
) -> list[Point]:
    """The points of all methods, in order; every map is tried on the model, so that its errors come at once."""
    points = []
    by_method = read_strengths(strengths, list(methods))
    for name, maps in methods.items():
        try:
            chosen = fitted_tokens(maps.metadata) if tokens is None else tokens
            attach(maps, model, 0.0, tokens=chosen).remove()
        except (TypeError, ValueError) as error:
            raise type(error)(f"maps {name!r}: {error}" if len(methods) > 1 else str(error)) from None
        points += [Point(name, strength, maps, chosen) for strength in by_method[name]]
    return points


def lengths(values: Sequence[int]) -> Tensor:
    """Numbers of tokens as a tensor on the CPU."""
    return torch.tensor(values, dtype=torch.long, device="cpu")
