"""How strongly maps act: a number, an array for rows or tokens, or a schedule, and other strengths for a thread.

What a user sets is read here, and kept for all hooks of a handle. What rows and tokens there are, forward_state knows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .._checks import as_finite
from ..maps.affine import AffineMap
from ..maps.gates import AnyGate, Gate, gates_of
from ..maps.metadata import name_of
from .affine import moved
from .gating import sites_of
from .graphs import StrengthInput
from .tokens import Tokens

Strength: TypeAlias = float | ArrayLike | Tensor | Callable[[Tokens], Any]
"""What a user may set."""


class StrengthArray:
    """Strengths by row, [B], or by row and token, [B, T]: float64 on the CPU, or wherever a schedule made them.

    The T columns are the tokens of one pass if `of_pass`; else they are positions, and tokens past the last column take
    that one.
    """

    def __init__(self, values: Tensor, *, of_pass: bool = False) -> None:
        self.values, self.of_pass = values, of_pass
        self._moved: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}

    @property
    def by_token(self) -> bool:
        return self.values.ndim == 2

    def moved(self, device: torch.device, dtype: torch.dtype, copies: int = 1) -> Tensor:
        """The values where and in what they are needed, each row `copies` times."""
        key = device, dtype, copies
        found = self._moved.get(key)
        if found is None:
            with torch.inference_mode(False):  # as in affine.parameters
                found = self._moved[key] = moved(self.values, device, dtype).repeat_interleave(copies, dim=0)
        return found

    def at(self, positions: Tensor, device: torch.device, dtype: torch.dtype, copies: int = 1) -> Tensor:
        """The strengths [B copies, T] of tokens at positions [B copies, T]; 0 at padding."""
        positions = positions.to(device)
        found = self.moved(device, dtype, copies).gather(1, positions.clamp(min=0, max=self.values.shape[1] - 1))
        return found.masked_fill(positions < 0, 0)

    def __repr__(self) -> str:
        return f"array{tuple(self.values.shape)}"


class Schedule:
    """A strength that is worked out for every pass."""

    def __init__(self, function: Callable[[Tokens], Any]) -> None:
        self.function = function

    def at(self, tokens: Tokens) -> float | StrengthArray:
        """The strength of a pass; TypeError or ValueError, which names the function, when it gives none."""
        value = self.function(tokens)
        if callable(value):
            raise TypeError(f"strength: {self} must return a number or an array, got {type(value).__name__}")
        try:
            strength = read_strength(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}, from {self}") from None
        assert not isinstance(strength, Schedule)
        if isinstance(strength, StrengthArray):
            strength.of_pass = True
            if strength.by_token and tokens.mask is not None and strength.values.shape == tokens.mask.shape:
                strength.values = strength.values.masked_fill(~tokens.mask.to(strength.values.device), 0)
        return strength

    def __repr__(self) -> str:
        return name_of(self.function)


GivenStrength: TypeAlias = float | StrengthArray | Schedule
StrengthValue: TypeAlias = GivenStrength | StrengthInput


def read_strength(value: Any) -> GivenStrength:
    """What a user set, in a form of one's own.

    TypeError or ValueError when it is no finite real number, no array of them with one or two axes, and no callable.
    """
    if isinstance(value, Tensor):
        if value.is_complex():
            raise TypeError(f"strength must be real, got {value.dtype}")
        # float64 where the device has it: a schedule's tensor stays where it is.
        values = value.detach() if value.is_floating_point() else value.detach().to(torch.float32)
    elif isinstance(value, np.ndarray | list | tuple):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"strength must be a real number, an array of them or a callable, got {array.dtype}")
        values = torch.tensor(array.astype(np.float64), device="cpu")
    elif callable(value):
        return Schedule(value)
    else:
        return as_finite(value, "strength")
    if values.ndim == 0:
        return as_finite(values.item(), "strength")
    if values.ndim > 2 or not values.numel():
        raise ValueError(f"strength must be a number, [rows] or [rows, tokens], got the shape {list(values.shape)}")
    if not values.isfinite().all():
        raise ValueError("strength must be finite")
    # A tensor of its own, and none of inference mode: see affine.parameters.
    with torch.inference_mode(False):
        return StrengthArray(values.clone())


def as_given(strength: StrengthValue) -> float | NDArray | Callable[[Tokens], Any]:
    """A strength as the user knows it; arrays as a copy."""
    assert not isinstance(strength, Tensor)  # only a block has one, while a graph is made
    if isinstance(strength, StrengthArray):
        return strength.values.cpu().double().numpy().copy()
    return strength.function if isinstance(strength, Schedule) else strength


# --- what all hooks of a handle read --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Setting:
    """What a forward pass is under, from its first module to its last: a strength, and the maps by module name."""

    strength: StrengthValue
    maps: Mapping[str, AffineMap]

    @cached_property
    def gates(self) -> Mapping[str, AnyGate]:
        """The gates by module name."""
        return gates_of(self.maps)

    @cached_property
    def sites(self) -> dict[str, list[Gate]]:
        """The gates that read a module which they name, by its name."""
        return sites_of(self.gates)

    # Without what is kept of the gates, which the maps hold.
    def __getstate__(self) -> dict[str, Any]:
        return {"strength": self.strength, "maps": self.maps}


class _Block:
    """Another strength, in the contexts that have it, for as long as its with-block is open."""

    def __init__(self, strength: StrengthValue) -> None:
        self.strength, self.open = strength, True
        self._made: tuple[Setting, Setting] | None = None

    def setting(self, latest: Setting) -> Setting:
        """The `latest` setting at this strength: the same object until another is set."""
        made = self._made
        if made is None or made[0] is not latest:
            made = self._made = latest, replace(latest, strength=self.strength)
        return made[1]


# The blocks that this thread, or task, is in, the inner ones last.
_BLOCKS: ContextVar[Mapping[Settings, tuple[_Block, ...]]] = ContextVar("lineas blocks", default=MappingProxyType({}))


class Settings:
    """What the hooks of a handle read: the `latest` setting for all, and other strengths for some threads or tasks."""

    def __init__(self, strength: StrengthValue, maps: Mapping[str, AffineMap]) -> None:
        self._open = 0  # blocks, in any thread
        self._lock = threading.Lock()
        self.latest = Setting(strength, maps)
        self.set()

    def set(self, **changes: Any) -> None:
        """Let another strength, or other maps, hold from the next pass on."""
        with self._lock:
            self.latest = latest = replace(self.latest, **changes)
            number = latest.strength if isinstance(latest.strength, float) else None
            # A number as a tensor []: compiled graphs read it, in which numbers would be constants.
            with torch.inference_mode(False):  # as in affine.parameters
                self.scalar = None if number is None else torch.tensor(number, dtype=torch.float32, device="cpu")

    @property
    def same_for_all(self) -> bool:
        """Whether no block is open in any thread."""
        return not self._open

    def now(self) -> Setting:
        """What holds for a pass that begins here and now."""
        latest = self.latest
        if not self._open:
            return latest
        block = next((block for block in reversed(_BLOCKS.get().get(self, ())) if block.open), None)
        return latest if block is None else block.setting(latest)

    @contextmanager
    def in_context(self, strength: StrengthValue) -> Iterator[None]:
        """Let `strength` hold in this context, and in copies of it, until the block ends, in whatever context."""
        block, blocks = _Block(strength), _BLOCKS.get()
        self._count(1)
        _BLOCKS.set({**blocks, self: (*blocks.get(self, ()), block)})
        try:
            yield
        finally:
            block.open = False
            self._count(-1)
            blocks = _BLOCKS.get()  # a generator may end in another context than it began in
            _BLOCKS.set({**blocks, self: tuple(other for other in blocks.get(self, ()) if other.open)})

    def _count(self, change: int) -> None:
        with self._lock:
            self._open += change

    # A copy of a model has what its handle was set to.
    def __getstate__(self) -> dict[str, Any]:
        return {"strength": self.latest.strength, "maps": self.latest.maps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
