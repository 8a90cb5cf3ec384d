"""Streaming quantiles of activations: the distribution of every neuron, for data larger than memory."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from .._checks import as_int, as_sample, widen, working_dtype
from .._threads import get_num_threads
from ..maps.files import check_output, write
from .moments import Moments, writable
from .streams import Batches, take_batches

LEAST_SIZE, MOST_SIZE = 512, 1 << 24
_SLOTS = 16  # at least; fewer and larger ones would promise less for long streams, more and smaller ones for short ones
MOST_SLOTS = 64  # LNS_MOST_SLOTS of the engine
OPEN, FILLED, ERROR = MOST_SLOTS, MOST_SLOTS + 1, MOST_SLOTS + 2  # where they stand in a schedule


class _State(NamedTuple):
    """What the engine keeps, in the order in which it takes it."""

    seen: int
    mean: NDArray  # [d] float64, as those below
    m2: NDArray
    low: NDArray
    high: NDArray
    keys: NDArray  # [tiles, slots, rows, lanes] int32 or int64: bits of float32 or float64 in an order of integers
    schedule: NDArray  # [MOST_SLOTS + 3] int64: weights of the slots, the open slot, its rows, the error

    def copy(self) -> _State:
        return _State(self.seen, *(array.copy() for array in self[1:]))

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float64 if self.keys.dtype == np.int64 else np.float32)

    @property
    def bound(self) -> int:
        """Most rows by which the number of rows below a value is off."""
        return int(self.schedule[ERROR])


def lanes_of(dtype: np.dtype) -> int:
    """Columns of a tile: what a cache line holds."""
    return 64 // dtype.itemsize


def _start(d: int, rows: int, dtype: np.dtype) -> _State:
    keys = np.zeros((-(-d // lanes_of(dtype)), 0, rows, lanes_of(dtype)), f"i{dtype.itemsize}")
    moments = np.zeros(d), np.zeros(d), np.full(d, np.inf), np.full(d, -np.inf)
    return _State(0, *moments, keys, np.zeros(MOST_SLOTS + 3, np.int64))


def _held(schedule: NDArray, run: int) -> list[tuple[int, int]]:
    """The slots that hold rows, and how many each, by a schedule."""
    rows = [run if weight else 0 for weight in schedule[:MOST_SLOTS].tolist()]
    if schedule[FILLED]:
        rows[int(schedule[OPEN])] = int(schedule[FILLED])
    return [(slot, count) for slot, count in enumerate(rows) if count]


def flip(keys: NDArray) -> NDArray:
    """Bits of floats as integers of the same order, and back."""
    bits = 8 * keys.itemsize - 1
    return keys ^ ((keys >> bits) & np.array((1 << bits) - 1, keys.dtype))


def _doubled(state: _State) -> _State:
    """The same values in float64."""
    if state.dtype == np.float64:
        return state
    values = flip(_columns(state)).view(np.float32).astype(np.float64)
    return state._replace(keys=_tiles([flip(values.view(np.int64))]))


def _columns(state: _State) -> NDArray:
    """The keys out of their tiles: [slots, rows, d], contiguous."""
    slots, rows = state.keys.shape[1:3]
    keys = state.keys.transpose(1, 2, 0, 3).reshape(slots, rows, state.keys.shape[0] * state.keys.shape[3])
    return np.ascontiguousarray(keys[:, :, : state.mean.size])


def _tiles(parts: Sequence[NDArray]) -> NDArray:
    """Keys [slots, rows, d] of one part of the columns or more, side by side, in tiles."""
    slots, rows = parts[0].shape[:2]
    d, lanes = sum(part.shape[2] for part in parts), lanes_of(parts[0].dtype)
    keys = np.zeros((slots, rows, -(-d // lanes) * lanes), parts[0].dtype)
    np.concatenate(parts, axis=2, out=keys[:, :, :d])
    return np.ascontiguousarray(keys.reshape(slots, rows, -1, lanes).transpose(2, 0, 1, 3))


class Quantiles:
    """The distribution of d neurons, updated batch by batch, in memory that does not grow with the rows seen.

    Kept are at most `size` values of each neuron. While no more rows than that came, they are all there and everything
    read is exact. Afterwards two sorted runs of equal weight are merged, again and again, and neighbours in the merged
    order replaced by their mean, with twice the weight (after Munro and Paterson 1980 and Manku, Rajagopalan and
    Lindsay 1998, who keep one of the two). How far the number of rows below any value can be off follows from the
    merges that were made: `rank_error` tells it, as a bound that holds for every order of the rows, not an estimate.
    Count, mean, variance, minimum and maximum stay exact, as `Moments` has them.

    No random numbers are used: the same batches in the same order give the same bits, for any number of threads.
    Summaries may be merged in any order and grouping; the errors then add up. Several threads may update, merge and
    read one object at once: each batch is taken in whole.

    Wherever a sample is an array, `lineas.fit`, `lineas.sparse_path`, `lineas.wasserstein` and the pictures of
    quantiles in `lineas.plot` take a `Quantiles` as well.

    Parameters
    ----------
    size : int, default 16384
        Values kept of each neuron, from 512 to 2^24, rounded down to whole runs (a power of two of rows, of which there
        are 16 to 31): 4 bytes each for float16, bfloat16 and float32, 8 for float64 and integers; 64 KB a neuron by
        default, of which only as much is taken as the rows seen fill. Twice the size about halves `rank_error`. Beyond
        32768 times the rows of a run (33 million rows by default) one run more is kept for each doubling of the rows.

    Raises
    ------
    TypeError
        If `size` is not an integer.
    ValueError
        If `size` is out of range.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> seen = lineas.Quantiles(size=1024)
    >>> for batch in np.arange(100_000.0).reshape(10, 10_000, 1):
    ...     seen = seen.update(batch)
    >>> seen.count, seen.exact, seen.nbytes
    (100000, False, 66104)
    >>> bool(abs(seen.quantile(0.5)[0] - 50_000) <= seen.rank_error * 100_000 + 1)
    True
    """

    __slots__ = ("_lock", "_rows", "_slots", "_state")
    FORMAT: ClassVar[str] = "lineas quantiles"

    def __init__(self, size: int = 16384) -> None:
        size = as_int(size, "size", low=LEAST_SIZE)
        if size > MOST_SIZE:
            raise ValueError(f"size must be at most {MOST_SIZE}, got {size}")
        self._rows = 1 << ((size // _SLOTS).bit_length() - 1)
        self._slots = size // self._rows
        self._state: _State | None = None
        self._lock = threading.Lock()  # held alone, as that of moments

    def __getstate__(self) -> tuple[int, _State | None]:
        """Return size and state (copies), for copies and pickles; a lock has neither."""
        with self._lock:
            return self.size, None if self._state is None else self._state.copy()

    def __setstate__(self, state: tuple[int, _State | None]) -> None:
        Quantiles.__init__(self, state[0])
        # What other processes send may be read-only, and the engine writes into it.
        self._state = None if state[1] is None else _State._make([state[1].seen, *map(writable, state[1][1:])])

    def __sizeof__(self) -> int:
        """Return the bytes of the object and its arrays, by which dask plans."""
        return object.__sizeof__(self) + self.nbytes

    @classmethod
    def _joined(cls, parts: Sequence[Quantiles]) -> Quantiles:
        """The quantiles of the neurons of all parts, which have seen the same numbers of rows in the same steps."""
        if len(parts) == 1:
            return parts[0]
        states = [part._seen() for part in parts]
        if any(state.dtype == np.float64 for state in states):
            states = [_doubled(state) for state in states]
        # Which slots there are, and what weights they have, follows from the numbers of rows.
        assert all(np.array_equal(state.schedule, states[0].schedule) for state in states)
        moments = (np.concatenate(arrays) for arrays in zip(*(state[1:5] for state in states), strict=True))
        keys, found = _tiles([_columns(state) for state in states]), cls(parts[0].size)
        found._state = _State._make([states[0].seen, *moments, keys, states[0].schedule.copy()])
        return found

    def _seen(self) -> _State:
        """The state, with the lock held."""
        if self._state is None:
            raise ValueError("these quantiles have seen no rows yet")
        return self._state

    @property
    def size(self) -> int:
        """The most values kept of each neuron; more only beyond 32768 times the rows of a run."""
        return self._rows * self._slots

    @property
    def count(self) -> int:
        """The number of rows seen."""
        state = self._state
        return 0 if state is None else state.seen

    @property
    def d(self) -> int | None:
        """The number of neurons; None before the first row."""
        state = self._state
        return None if state is None else state.mean.size

    @property
    def dtype(self) -> np.dtype | None:
        """What values are kept in: float64 if a batch was float64 or integers, else float32; None before the first."""
        state = self._state
        return None if state is None else state.dtype

    @property
    def exact(self) -> bool:
        """Whether every value seen is still there."""
        state = self._state
        return state is None or state.bound == 0

    @property
    def rank_error(self) -> float:
        """Most by which the share of rows below any value is off, from 0 to 1: a bound, usually far from reached."""
        with self._lock:
            return 0.0 if self._state is None else self._state.bound / self._state.seen

    @property
    def run(self) -> int:
        """The values in a sorted run: a power of two, a 16th to a 31st of `size`."""
        return self._rows

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use."""
        state = self._state
        return 0 if state is None else sum(array.nbytes for array in state[1:])

    @property
    def moments(self) -> Moments:
        """Count, mean, variance, minimum and maximum of all rows seen, exact: a `Moments` of its own."""
        found = Moments()
        with self._lock:
            if self._state is not None:
                seen, mean, m2, low, high = self._state.copy()[:5]
                found.__setstate__((seen, (mean, m2, low, high)))
        return found

    @property
    def min(self) -> NDArray:
        """Smallest value of each neuron: float64 [d]. ValueError before the first row."""
        with self._lock:
            return self._seen().low.copy()

    @property
    def max(self) -> NDArray:
        """Largest value of each neuron: float64 [d]. ValueError before the first row."""
        with self._lock:
            return self._seen().high.copy()

    def quantile(self, q: ArrayLike) -> NDArray:
        """Return quantiles of each neuron: while `exact`, those of ``np.quantile(..., method="inverted_cdf")``.

        Parameters
        ----------
        q : array_like
            Shares from 0 to 1, [k] or one number. 0 and 1 are the exact minimum and maximum; of the others the share of
            rows below is off by at most `rank_error`.

        Returns
        -------
        ndarray
            [k, d], or [d] for one number, in `dtype`.

        Raises
        ------
        ValueError
            If no row was seen, or a share is out of range or no number.
        """
        shares = np.asarray(q, np.float64)
        if shares.ndim > 1:
            raise ValueError(f"q must be a number or have shape [k], got shape {shares.shape}")
        wrong = ~((shares >= 0) & (shares <= 1))
        if wrong.any():
            raise ValueError(f"q must be from 0 to 1, got {shares[wrong].flat[0]}")
        with self._lock:
            state = self._seen()
            ranks = np.clip(np.ceil(shares.ravel() * state.seen), 1, state.seen).astype(np.int64)
            order, found = np.argsort(ranks, kind="stable"), np.empty((ranks.size, state.mean.size), state.dtype)
            if ranks.size:
                found[order] = _core.quantiles_read(*state, ranks[order], 1, get_num_threads())
            found[ranks == 1], found[ranks == state.seen] = state.low, state.high
        return found[0] if shares.ndim == 0 else found

    def sample(self, m: int) -> NDArray:
        """Return m values that stand for each neuron's distribution, sorted.

        Row k holds the means of the quantile functions over ``[k / m, (k + 1) / m]``, so that the mean of the values
        kept is the mean of the sample. While `exact`, and m is the number of rows, these are the sorted columns.

        Parameters
        ----------
        m : int
            At least 1.

        Returns
        -------
        ndarray
            [m, d], in `dtype`.

        Raises
        ------
        TypeError
            If m is not an integer.
        ValueError
            If m is below 1 or no row was seen.
        """
        m = as_int(m, "m", low=1)
        with self._lock:
            return _core.quantiles_read(*self._seen(), None, m, get_num_threads())

    def weighted_sample(self) -> tuple[NDArray, NDArray]:
        """Return the values kept and their weights, as functions with row weights take them.

        Returns
        -------
        rows : ndarray
            [held, d] in `dtype`: columns in orders of their own, each with the weights of the rows.
        weights : ndarray
            float64 [held]: how many rows seen each one stands for.

        Raises
        ------
        ValueError
            If no row was seen.
        """
        with self._lock:
            return _core.quantiles_rows(*self._seen(), get_num_threads())

    def _with_room(self, state: _State, rows: int, full: int, seen: int) -> _State:
        """The state with the slots that `rows` more rows and `full` slots want, if it may have so many.

        As many as there are doublings of a run in `seen` rows it has in any case: so many weights can there be.
        """
        weights, had = state.schedule[:MOST_SLOTS], state.keys.shape[1]
        wanted = int(np.count_nonzero(weights)) + full + -(-(int(state.schedule[FILLED]) + rows) // self._rows)
        levels = (seen // self._rows + 1).bit_length() + 1
        most = max(self._slots, levels)
        slots = max(levels, min(wanted, most))
        if slots <= had:
            return state
        slots = min(max(slots, 2 * had), most, MOST_SLOTS)  # doubled, so that few rows at a time cost little
        keys = np.zeros((state.keys.shape[0], slots, *state.keys.shape[2:]), state.keys.dtype)
        keys[:, :had] = state.keys
        return state._replace(keys=keys)

    def update(self, x: ArrayLike) -> Quantiles:
        """Take in the rows of `x` and return self.

        Parameters
        ----------
        x : array_like or torch.Tensor
            [n, d], n >= 1; float16, bfloat16, float32, float64 or integers. The first batch of float64 or integers
            turns the values kept into float64.

        Raises
        ------
        TypeError
            If the dtype is another one.
        ValueError
            If `x` is not [n, d] with the d of before, or holds a value that is not finite (its row and column are
            named). Nothing is taken in then.
        """
        return self._update(x, "x")

    def _update(self, x: ArrayLike, name: str) -> Quantiles:
        x, threads = as_sample(x, name), get_num_threads()
        with self._lock:  # the engine writes into the arrays without the GIL
            state = self._state or _start(x.shape[1], self._rows, working_dtype(x))
            if x.shape[1] != state.mean.size:
                raise ValueError(f"{name} must have {state.mean.size} columns as before, got shape {x.shape}")
            if working_dtype(x) == np.float64:
                state = _doubled(state)
            elif state.dtype == np.float64:
                x = widen(x).astype(np.float64)
            state = self._with_room(state, len(x), 0, state.seen + len(x))
            self._state = state._replace(seen=_core.quantiles_update(x, *state, name, threads))
        return self

    def merge(self, other: Quantiles) -> Quantiles:
        """Take in what another `Quantiles` has seen, and return self; `other` is not changed.

        Raises
        ------
        TypeError
            If `other` is not a `Quantiles`.
        ValueError
            If it has another size or another number of neurons.
        """
        if not isinstance(other, Quantiles):
            raise TypeError(f"other must be a Quantiles, got {type(other).__name__}")
        size, theirs = other.__getstate__()
        if size != self.size:
            raise ValueError(f"cannot merge quantiles of size {self.size} and {size}")
        if theirs is None:
            return self
        with self._lock:
            state = self._state or _start(theirs.mean.size, self._rows, theirs.dtype)
            if state.mean.size != theirs.mean.size:
                raise ValueError(f"cannot merge quantiles of {state.mean.size} and {theirs.mean.size} neurons")
            if state.dtype != theirs.dtype:
                state, theirs = _doubled(state), _doubled(theirs)
            full, filled = int(np.count_nonzero(theirs.schedule[:MOST_SLOTS])), int(theirs.schedule[FILLED])
            state = self._with_room(state, filled, full, state.seen + theirs.seen)
            self._state = state._replace(seen=_core.quantiles_merge(*state, *theirs, get_num_threads()))
        return self

    def copy(self) -> Quantiles:
        """Return another one that has seen the same."""
        return copy.copy(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a safetensors file, which `lineas.load` reads, as a whole or not at all.

        What is loaded goes on to the same bits.

        Raises
        ------
        ValueError
            If no row was seen, or the folder does not exist.
        OSError
            If the file cannot be written.
        """
        tensors: dict[str, NDArray] = {}
        state = self._put("", tensors)
        check_output(os.fspath(path), "path")
        write(path, self.FORMAT, tensors, {"state": state})

    @classmethod
    def from_file(cls, tensors: dict[str, NDArray], entries: dict[str, Any]) -> Quantiles:
        """What `save` took apart, out of `tensors`; ValueError or TypeError where it does not hold together."""
        return cls._take(entries["state"], "", tensors)

    def _put(self, prefix: str, tensors: dict[str, NDArray]) -> dict[str, int]:
        """Size and number of rows, for JSON; copies of the arrays go into `tensors`, under names that begin so.

        Of the keys only those that stand for rows, [tiles, rows held, lanes], slot after slot.
        """
        with self._lock:
            state = self._seen()
            parts = [state.keys[:, slot, :rows] for slot, rows in _held(state.schedule, self._rows)]
            tensors |= {prefix + name: getattr(state, name).copy() for name in _State._fields[1:] if name != "keys"}
            tensors[prefix + "keys"] = np.concatenate(parts, axis=1)
        return {"size": self.size, "seen": state.seen}

    @classmethod
    def _take(cls, facts: Any, prefix: str, tensors: dict[str, NDArray]) -> Quantiles:
        """What `_put` took apart, out of `tensors`, checked: the file may be anybody's."""
        if not isinstance(facts, dict) or any(type(facts.get(name)) is not int for name in ("size", "seen")):
            raise ValueError(f"the state {prefix!r} in the header must have whole numbers 'size' and 'seen'")
        found, where = cls(facts["size"]), f"the state {prefix!r}"
        missing = [prefix + part for part in _State._fields[1:] if prefix + part not in tensors]
        if missing:
            raise ValueError(f"it lacks the tensor {missing[0]!r}")
        arrays = (np.require(tensors.pop(prefix + part), requirements=["C", "A", "W"]) for part in _State._fields[1:])
        state = _State(facts["seen"], *arrays)
        if state.schedule.shape != (MOST_SLOTS + 3,) or state.schedule.dtype != np.int64 or state.seen < 1:
            raise ValueError(f"{where} has no schedule, or has seen no rows")
        if not 0 <= state.schedule[FILLED] < found._rows or not 0 <= state.schedule[OPEN] < MOST_SLOTS:
            raise ValueError(f"{where} has an open slot that cannot be")
        held = _held(state.schedule, found._rows)
        rows = sum(rows for _, rows in held)
        if found.size != facts["size"] or state.keys.ndim != 3 or state.keys.shape[1] != rows or not rows:
            shape = list(state.keys.shape)
            raise ValueError(f"{where} must have a size of whole runs and {rows} rows of keys, got shape {shape}")
        kept, slots = state.keys, max(2, held[-1][0] + 1)
        keys, start = np.zeros((kept.shape[0], slots, found._rows, kept.shape[2]), kept.dtype), 0
        for slot, rows in held:
            keys[:, slot, :rows] = part = kept[:, start : start + rows]
            if rows == found._rows and (part[:, 1:] < part[:, :-1]).any():
                raise ValueError(f"{where} holds values that are not in order")
            start += rows
        state = found._state = state._replace(keys=keys)
        try:
            _core.quantiles_read(*state, np.array([1, state.seen]), 1, 1)  # which knows what a state is
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where} is none: {error}") from None
        if state.bound == 0 and (state.schedule[:MOST_SLOTS] > 1).any():
            raise ValueError(f"{where} left values out and promises that it did not")
        if not np.isfinite(flip(kept).view(state.dtype)).all() or any(np.isnan(part).any() for part in state[1:5]):
            raise ValueError(f"{where} holds a value that is not finite")
        return found

    def __repr__(self) -> str:
        with self._lock:
            state = self._state
            if state is None:
                return f"Quantiles(size={self.size}, count=0, d=None)"
            known = "exact" if state.bound == 0 else f"rank_error={state.bound / state.seen:.3g}"
            return f"Quantiles(size={self.size}, count={state.seen}, d={state.mean.size}, {known})"


def quantiles(data: Batches, *, size: int = 16384, chunk_rows: int | None = None) -> Quantiles:
    """Distributions of one array, or of batches as they come, without holding them all in memory.

    Parameters
    ----------
    data : ndarray, torch.Tensor, dask.array.Array or iterable of arrays
        One array [n, d] (memory-mapped, say, or of `lineas.open_activations`), read in chunks of rows; a dask array,
        read by its chunks; or any iterable of arrays, such as a generator. float16, bfloat16, float32, float64 or
        integers.
    size : int, default 16384
        As `Quantiles` takes it.
    chunk_rows : int, optional
        Rows of one array read at once, not of a dask array. Default: as many as make 4 million entries.

    Returns
    -------
    Quantiles
        Update it further, merge it, read it, or fit maps to it.

    Raises
    ------
    TypeError
        If `data` is neither an array nor an iterable, a dtype is another one, or a setting is not an integer.
    ValueError
        If a batch is not [n, d] with n >= 1 and one d throughout, a value is not finite (batch or chunk, row and
        column are named), there is no batch, or a setting is out of range.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> lineas.quantiles(np.arange(1000.0)[:, None]).quantile([0.1, 0.5])
    array([[ 99.],
           [499.]])
    """
    return take_batches(Quantiles(size), data, chunk_rows)
