"""Summaries of dask arrays: each block becomes a state, and states are merged in a tree that the chunks alone fix.

dask is never imported before somebody else has: only then can there be a dask array.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import copy
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import as_engine, check_sample_shape
from .._threads import one_thread

FAN_IN = 4  # states that are merged at once; a constant, as the bits of quantiles depend on it


class State(Protocol):
    """What takes in rows and is merged: `lineas.Moments` and `lineas.Quantiles`."""

    def _update(self, x: ArrayLike, name: str) -> Self: ...

    def merge(self, other: Any, /) -> Self: ...

    @classmethod
    def _joined(cls, parts: Sequence[Any]) -> Self: ...


AnyState = TypeVar("AnyState", bound=State)


class Work(NamedTuple):
    """A dask array that `check_dask` has seen, the state to start from, and what messages call the array."""

    array: Any
    empty: Any
    name: str


def is_dask(x: Any, name: str) -> bool:
    """Whether `x` is a dask array; TypeError, which calls it `name`, for other collections of dask.

    NumPy would compute those in silence, all at once.
    """
    if "dask" not in sys.modules:
        return False
    module = sys.modules.get("dask.array")
    if module is not None and isinstance(x, getattr(module, "Array", ())):
        return True
    if not isinstance(x, type) and sys.modules["dask"].is_dask_collection(x):
        raise TypeError(
            f"{name} must be an array or a dask array, got a dask collection of type {type(x).__name__}; pass "
            ".to_dask_array(lengths=True) of a data frame, .data of an xarray"
        )
    return False


def check_dask(x: Any, name: str) -> None:
    """TypeError or ValueError, as `as_sample`, for a dask array that is no sample, before anything is computed."""
    as_engine(np.empty(0, x.dtype), name)  # for its error message
    if not hasattr(x, "to_delayed"):
        raise TypeError(
            f"{name} must have blocks, got an array of dask's experimental array.query-planning: turn it off"
        )
    if any(np.isnan(size) for sizes in x.chunks for size in sizes):
        raise ValueError(f"{name} must have known chunk sizes, got {x.chunks}: call its compute_chunk_sizes() first")
    check_sample_shape(x.shape, name)


def computed(arrays: Sequence[Any]) -> list[NDArray]:
    """Dask arrays in memory, all of one computation."""
    return list(sys.modules["dask"].compute(*arrays)) if arrays else []


def summaries(work: Sequence[Work]) -> list[Any]:
    """The states of all rows of each array, of one computation, by the scheduler that the user has chosen.

    The blocks of a column of blocks become states that are merged four by four, in the order of the rows, until one is
    left; blocks without rows are left out. The states of the columns are then put side by side.
    """
    import dask

    delayed = dask.delayed(pure=False, traverse=True)
    to_state, merge = delayed(_state_of), delayed(_merged)
    columns: list[list[Any]] = []
    for array, empty, name in work:
        rows, cols = ([*accumulate(sizes, initial=0)] for sizes in array.chunks)
        # Not optimised: that would fuse reading into what is done first, and arrays of the same data read them twice.
        blocks = array.to_delayed(optimize_graph=False)
        columns.append([])
        for j, (left, right) in enumerate(pairwise(cols)):
            states = [
                to_state(blocks[i, j], empty, (end - start, right - left), _place(name, start, end, left, right, array))
                for i, (start, end) in enumerate(pairwise(rows))
                if end > start and right > left
            ]
            while len(states) > 1:
                states = [_node(merge, states[k : k + FAN_IN]) for k in range(0, len(states), FAN_IN)]
            columns[-1].extend(states)
    found = dask.compute(*columns)
    return [one.empty._joined(parts) for one, parts in zip(work, found, strict=True)]


def _node(merge: Any, states: list[Any]) -> Any:
    return merge(states) if len(states) > 1 else states[0]


def _place(name: str, start: int, end: int, left: int, right: int, array: Any) -> str:
    """What messages call a block, so that row and column in it say where a value stands."""
    if array.shape == (end - start, right - left):
        return name
    return f"{name}[{start}:{end}]" if array.shape[1] == right - left else f"{name}[{start}:{end}, {left}:{right}]"


def _state_of(block: Any, empty: AnyState, shape: tuple[int, int], name: str) -> AnyState:
    """A task: the state of one block. A scheduler runs as many tasks as it has cores, so each takes one thread."""
    if np.shape(block) != shape:
        raise ValueError(f"{name} must have shape {shape} as its chunks say, got a block of shape {np.shape(block)}")
    with one_thread():
        return copy(empty)._update(block, name)


def _merged(states: Sequence[AnyState]) -> AnyState:
    """A task: several states as one, of their rows in order. None of them is changed: tasks may be run again."""
    merged = copy(states[0])
    with one_thread():
        for state in states[1:]:
            merged = merged.merge(state)
    return merged
