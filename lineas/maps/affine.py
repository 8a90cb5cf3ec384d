"""AffineMap: one slope and one shift a neuron."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from .._checks import (
    as_dense,
    as_engine,
    as_finite,
    as_int,
    as_vector,
    is_number,
    is_tensor,
    result_dtype,
    working_dtype,
)
from .._threads import get_num_threads


def at_strength(weight: Any, bias: Any, strength: Any, where: Callable[..., Any] = np.where) -> tuple[Any, Any]:
    """Slopes and shifts that do at strength 1 what `weight` and `bias` do at `strength`: the only place that says how.

    Written as (1 - s) + s w and not as 1 + s (w - 1), strength 1 gives the slopes to the last bit, however small they
    are; neurons that the map leaves alone are left alone at any strength. `where` is that of the library of the arrays,
    ``torch.where`` for tensors.
    """
    return where(weight == 1, 1, (1 - strength) + strength * weight), strength * bias


class AffineMap:
    """One slope and one shift a neuron: T(z) = weight * z + bias (LinEAS, arXiv 2503.10679).

    Immutable: the arrays are read-only copies. Two maps are equal if their slopes and shifts are, whatever their
    dtypes.

    Maps are combined in two ways. ``second @ first`` applies `first`, then `second` to what it gives. ``a + b`` adds
    what each of them changes, T(z) - z, about the same z: slopes ``a.weight + b.weight - 1``, shifts
    ``a.bias + b.bias``; a neuron that one side leaves alone is the other's to the last bit. For maps that only shift
    both are the same. ``0.5 * a`` and ``a / 2`` are ``a.scaled(0.5)``, ``-a`` is ``a.scaled(-1)``, and ``a - b`` adds
    the change of `a` and takes off that of `b`: ``a - a`` changes nothing. ``sum([a, b, c])`` is ``a + b + c``.

    Parameters
    ----------
    weight, bias : array_like or torch.Tensor
        Slopes and shifts, shape [d], finite; float32, float64 or integers, which become float64. Where one is float64
        both become float64.

    Attributes
    ----------
    weight, bias : ndarray
        float32 or float64, shape [d], read-only.

    Raises
    ------
    TypeError
        If a dtype is another one.
    ValueError
        If the shapes are not the same [d] or a value is not finite.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> half = lineas.AffineMap(np.array([0.5, 1.0]), np.array([0.0, 0.0]))
    >>> half.transform(np.array([[2.0, 3.0]]))
    array([[1., 3.]])
    >>> half.support
    1
    """

    __slots__ = ("bias", "weight")

    weight: NDArray
    bias: NDArray

    def __init__(self, weight: ArrayLike, bias: ArrayLike) -> None:
        weight, bias = as_vector(weight, "weight", "neuron"), as_vector(bias, "bias", "neuron")
        if weight.shape != bias.shape:
            raise ValueError(f"weight and bias must have the same shape, got {weight.shape} and {bias.shape}")
        dtype = np.promote_types(weight.dtype, bias.dtype)
        for name, array in (("weight", weight), ("bias", bias)):
            array = array.astype(dtype)  # always a copy
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"an AffineMap is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"an AffineMap is immutable: cannot delete {name!r}")

    def __reduce__(self) -> tuple:
        return AffineMap, (self.weight, self.bias)

    def __copy__(self) -> AffineMap:
        return self

    def __deepcopy__(self, memo: dict) -> AffineMap:
        return self

    @classmethod
    def identity(cls, d: int, dtype: Any = np.float32) -> AffineMap:
        """Return the map of `d` neurons that changes nothing: weight 1, bias 0."""
        return cls(np.ones(d, dtype), np.zeros(d, dtype))

    @property
    def d(self) -> int:
        """The number of neurons."""
        return self.weight.size

    @property
    def dtype(self) -> np.dtype:
        """float32 or float64."""
        return self.weight.dtype

    @property
    def support(self) -> int:
        """The number of neurons that the map changes: weight != 1 or bias != 0."""
        return int(np.count_nonzero((self.weight != 1) | (self.bias != 0)))

    def __len__(self) -> int:
        return self.d

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AffineMap):
            return NotImplemented
        return np.array_equal(self.weight, other.weight) and np.array_equal(self.bias, other.bias)

    __array_ufunc__ = None  # NumPy leaves its numbers times a map to us, and its arrays, which are a TypeError

    def __repr__(self) -> str:
        return f"AffineMap(d={self.d}, support={self.support}, dtype={self.dtype})"

    def transform(self, z: Any, strength: float = 1.0, axis: int = -1) -> Any:
        """Apply the map at a strength: z + strength (weight z + bias - z).

        Parameters
        ----------
        z : array_like or torch.Tensor
            Activations, float16, bfloat16 (ml_dtypes or torch), float32, float64 or integers (taken as float64), of
            any shape with d channels on `axis`.
        strength : float, default 1.0
            0 is off, 1 the map; any other finite number scales the change.
        axis : int, default -1
            The channel axis: 1 for the output of convolutions, the last one otherwise.

        Returns
        -------
        ndarray or torch.Tensor
            A new array or tensor with the shape and dtype of `z`, float64 for integers (a tensor also stays on its
            device and is differentiable in `z`). Computed in float32, for float64 in float64, and rounded once.

        Raises
        ------
        TypeError
            If the dtype of `z` is another one, `strength` is not a real number, or `axis` is not an integer.
        ValueError
            If `axis` of `z` does not have d channels, or `strength` is not finite.
        """
        strength = as_finite(strength, "strength")
        array: Any = as_dense(z, "z") if is_tensor(z) else as_engine(z, "z")
        shape, axis = tuple(array.shape), as_int(axis, "axis")
        if not -len(shape) <= axis < len(shape) or shape[axis] != self.d:
            raise ValueError(f"z must have {self.d} channels on axis {axis}, got shape {shape}")
        if is_tensor(array):
            import torch

            from ..hooks.affine import affine

            # torch.tensor copies: torch cannot hold read-only memory without a warning.
            slopes, shifts = (torch.tensor(part, device="cpu") for part in (self.weight, self.bias))
            return affine(array, slopes, shifts, strength, axis)
        work, axis = working_dtype(array), axis % len(shape)
        weight, bias = self.weight.astype(work, copy=False), self.bias.astype(work, copy=False)
        blocks = array.reshape(math.prod(shape[:axis]), self.d, math.prod(shape[axis + 1 :]))
        out = _core.affine_apply(blocks, weight, bias, strength, get_num_threads())
        return out.reshape(shape).view(result_dtype(z, array))

    def scaled(self, strength: float) -> AffineMap:
        """Return the map that at strength 1 does what this one does at `strength`."""
        return rounded(*at_strength(*self._wide(), as_finite(strength, "strength")), self.dtype)

    def __mul__(self, strength: float) -> AffineMap:
        return self.scaled(strength) if is_number(strength) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, number: float) -> AffineMap:
        return self.scaled(1 / as_finite(number, "the divisor")) if is_number(number) else NotImplemented

    def __neg__(self) -> AffineMap:
        return self.scaled(-1)

    def inverse(self) -> AffineMap:
        """Return the map that undoes this one at strength 1: (z - bias) / weight.

        The inverse of a map at strength s is ``map.scaled(s).inverse()``, not the inverse at strength s.

        Raises
        ------
        ValueError
            If the weight of a neuron is 0, or so small that the inverse is not finite.
        """
        zero = np.flatnonzero(self.weight == 0)
        if zero.size:
            raise ValueError(f"the map has no inverse: weight is 0 at {_counted(zero)}")
        weight64, bias64 = self._wide()
        with np.errstate(over="ignore"):
            weight, bias = (1 / weight64).astype(self.dtype), (-bias64 / weight64).astype(self.dtype)
        lost = np.flatnonzero(~(np.isfinite(weight) & np.isfinite(bias)))
        if lost.size:
            raise ValueError(f"the inverse is too large for {self.dtype} at {_counted(lost)}")
        return AffineMap(weight, bias)

    def _wide(self) -> tuple[NDArray, NDArray]:
        """Slopes and shifts in float64, in which maps are combined."""
        return self.weight.astype(np.float64), self.bias.astype(np.float64)

    def _with(self, other: AffineMap, combine: Callable[..., tuple[NDArray, NDArray]], verb: str) -> AffineMap:
        """What `combine` makes of the slopes and shifts of both."""
        if not isinstance(other, AffineMap):
            return NotImplemented
        if self.d != other.d:
            raise ValueError(f"cannot {verb} maps of {self.d} and {other.d} neurons")
        return rounded(*combine(*self._wide(), *other._wide()), np.promote_types(self.dtype, other.dtype))

    def __matmul__(self, first: AffineMap) -> AffineMap:
        return self._with(first, lambda w2, b2, w1, b1: (w2 * w1, w2 * b1 + b2), "compose")

    def __add__(self, other: AffineMap) -> AffineMap:
        return self._with(other, partial(_changes, sign=1), "add")

    def __radd__(self, start: int) -> AffineMap:
        return self if is_number(start) and start == 0 else NotImplemented  # sum() starts with 0

    def __sub__(self, other: AffineMap) -> AffineMap:
        return self._with(other, partial(_changes, sign=-1), "subtract")


def _changes(w_a: NDArray, b_a: NDArray, w_b: NDArray, b_b: NDArray, sign: int) -> tuple[NDArray, NDArray]:
    """Slopes and shifts that change an activation by the change of a plus or minus that of b."""
    # Neurons that one side leaves alone keep the slope of the other, which 1 + (w - 1) would round.
    either = np.where(w_b == 1, w_a, at_strength(w_b, 0, sign)[0])
    both = 1 + ((w_a - 1) + sign * (w_b - 1))
    return np.where((w_a == 1) | (w_b == 1), either, both), b_a + sign * b_b


def rounded(weight: NDArray, bias: NDArray, dtype: np.dtype) -> AffineMap:
    """The map of slopes and shifts in a narrower type."""
    with np.errstate(over="ignore"):  # AffineMap says what is not finite, and where
        return AffineMap(weight.astype(dtype), bias.astype(dtype))


def _counted(neurons: NDArray) -> str:
    """'neuron 7', or 'neuron 7 and 2 others'."""
    more = neurons.size - 1
    return f"neuron {neurons[0]}" + (f" and {more} other{'s' if more > 1 else ''}" if more else "")
