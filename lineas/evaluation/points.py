"""What is evaluated: points, each a method at a strength, and how one acts on a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .._checks import as_finite
from ..fitting.checkpoint import digest
from ..fitting.result import FitResult
from ..hooks.attach import attach
from ..hooks.tokens import Tokens, needs_prompt_length, select
from ..maps.affine import AffineMap
from ..maps.gates import arrays_of as arrays_in
from ..maps.gates import facts_of, gates_of
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

    def __str__(self) -> str:
        return f"{self.method!r} at strength {self.strength:g}" if self.maps is not None else repr(self.method)

    def identity(self) -> str:
        """A digest of what the point does to a model, whatever it is called; a callable counts by its name."""
        tokens = name_of(self.tokens) if callable(self.tokens) else spell_tokens(self.tokens)
        return digest(arrays_of(self.maps or {}), repr(tokens), self.strength, self.instruction)[:16]

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
        with attach(SteeringMaps(self.maps, gates=self.maps.gates), model, self.strength, tokens=tokens):
            yield


def arrays_of(maps: Mapping[str, AffineMap]) -> dict[str, list[Any]]:
    """Slopes and shifts by module, and what gates do."""
    gates = gates_of(maps)
    return {
        name: [one.weight, one.bias, *([arrays_in(gates[name]), facts_of(gates[name])] if name in gates else [])]
        for name, one in maps.items()
    }


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
        metadata = maps.maps.metadata if isinstance(maps, FitResult) else maps.metadata
        name = metadata.get("method")
        usual = "path" if isinstance(maps, SparsePath) else "maps"
        maps = {name if isinstance(name, str) and name else usual: maps}
    if not isinstance(maps, Mapping):
        raise TypeError(
            "maps must be SteeringMaps, a FitResult, a SparsePath or a mapping from name to these, got "
            f"{type(maps).__name__}"
        )
    found: dict[str, SteeringMaps] = {}
    for name, value in maps.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"maps: the name of a method must be a string that is not empty, got {name!r}")
        points: dict[str, Any] = {name: value.maps if isinstance(value, FitResult) else value}
        if isinstance(value, SparsePath):  # two points may have one support
            points = {f"{name}[{k}], support {value.support[k]}": value[k] for k in range(len(value))}
        for label, one in points.items():
            if not isinstance(one, SteeringMaps):
                raise TypeError(
                    f"maps[{name!r}] must be SteeringMaps, a FitResult or a SparsePath of modules, got "
                    f"{type(one).__name__}"
                )
            if label in found or label == UNSTEERED:
                raise ValueError(f"maps: {label!r} is the name of another method, or of the model without maps")
            found[label] = one
    if not found:
        raise ValueError("maps is empty")
    return found


def read_strengths(strengths: Any, methods: Sequence[str], controls: Mapping[str, str]) -> dict[str, list[float]]:
    """The strengths of every method and control, without 0 and without repetition.

    They are one list for all, or a mapping by method, in which a control, given with the method that it is made for,
    has the strengths of that method unless it has its own.
    """
    names = [*methods, *controls]
    if not isinstance(strengths, Mapping):
        return dict.fromkeys(names, _numbers(strengths, "strengths"))
    unknown = next((name for name in strengths if name not in names), None)
    if unknown is not None:
        raise ValueError(f"strengths: there is no method {unknown!r} among {', '.join(map(repr, names))}")
    missing = next((name for name in methods if name not in strengths), None)
    if missing is not None:
        raise ValueError(f"strengths: the method {missing!r} has none")
    found = {name: _numbers(values, f"strengths[{name!r}]") for name, values in strengths.items()}
    return {name: found[name] if name in found else found[controls[name]] for name in names}


def _numbers(values: Any, name: str) -> list[float]:
    if not isinstance(values, Iterable) or isinstance(values, str) or getattr(values, "ndim", 1) == 0:
        return [value for value in [as_finite(values, name)] if value]
    found = [as_finite(value, f"{name}[{k}]") for k, value in enumerate(values)]
    if not found:
        raise ValueError(f"{name} is empty")
    return [value for value in dict.fromkeys(found) if value]


def make_points(
    model: nn.Module, methods: Mapping[str, SteeringMaps], strengths: Mapping[str, list[float]], tokens: Any
) -> list[Point]:
    """The points of all methods, in order; every map is tried on the model, so that its errors come at once.

    `tokens` is a selection, or None for that which the maps were fitted for.
    """
    points = []
    for name, maps in methods.items():
        try:
            chosen = fitted_tokens(maps.metadata) if tokens is None else tokens
            attach(maps, model, 0.0, tokens=chosen).remove()
        except (TypeError, ValueError) as error:
            raise type(error)(f"maps {name!r}: {error}" if len(methods) > 1 else str(error)) from None
        points += [Point(name, strength, maps, chosen) for strength in strengths[name]]
    return points
