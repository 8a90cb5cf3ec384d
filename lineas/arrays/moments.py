"""Streaming statistics of activations: for data larger than memory."""

import threading
from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from .._checks import as_int, as_sample, check_dense, is_tensor
from .._threads import get_num_threads

# Elements read at once from one big array: 16 MiB of float32, far more than a call costs, far less than a memory.
_CHUNK = 1 << 22

# Of each neuron the mean, the sum of squared deviations from it, the minimum and the maximum: float64 [d].
_State = tuple[NDArray, NDArray, NDArray, NDArray]


def _start(d: int) -> _State:
    return np.zeros(d), np.zeros(d), np.full(d, np.inf), np.full(d, -np.inf)


class Moments:
    """Count, mean, variance, minimum and maximum of d neurons, updated batch by batch.

    Everything is kept in float64. Batches may come in any order and be merged in any grouping; the results then
    agree to rounding (Chan, Golub and LeVeque 1979). Several threads may update, merge and read one object at once:
    each batch is taken in whole, and what is read is whole as well.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> seen = lineas.Moments()
    >>> for batch in np.arange(12.0).reshape(3, 2, 2):
    ...     seen = seen.update(batch)
    >>> seen.count, seen.mean, seen.max
    (6, array([5., 6.]), array([10., 11.]))
    """

    __slots__ = ("_count", "_lock", "_state")

    def __init__(self) -> None:
        self._count = 0
        self._state: _State | None = None
        self._lock = threading.Lock()  # held alone, never with that of other moments: two could wait for each other

    def __getstate__(self) -> tuple[int, _State | None]:
        """Return count and arrays (copies), for copies and pickles; a lock has neither."""
        with self._lock:
            if self._state is None:
                return self._count, None
            mean, m2, low, high = self._state
            return self._count, (mean.copy(), m2.copy(), low.copy(), high.copy())

    def __setstate__(self, state: tuple[int, _State | None]) -> None:
        self._count, self._state = state
        self._lock = threading.Lock()

    def _read(self, which: int) -> NDArray:
        with self._lock:
            if self._state is None:
                raise ValueError("these moments have seen no rows yet")
            return self._state[which].copy()

    @property
    def count(self) -> int:
        """The number of rows seen."""
        return self._count

    @property
    def d(self) -> int | None:
        """The number of neurons; None before the first row."""
        state = self._state
        return None if state is None else state[0].size

    @property
    def mean(self) -> NDArray:
        """Mean of each neuron: float64 [d]. ValueError before the first row."""
        return self._read(0)

    @property
    def min(self) -> NDArray:
        """Smallest value of each neuron: float64 [d]. ValueError before the first row."""
        return self._read(2)

    @property
    def max(self) -> NDArray:
        """Largest value of each neuron: float64 [d]. ValueError before the first row."""
        return self._read(3)

    def variance(self, ddof: int = 1) -> NDArray:
        """Return the variance of each neuron.

        Parameters
        ----------
        ddof : int, default 1
            The sum of squared deviations is divided by count - ddof.

        Returns
        -------
        ndarray
            float64 [d].

        Raises
        ------
        ValueError
            If there are not more than `ddof` rows, `ddof` is negative, or a variance is out of the range of float64
            (the neuron is named). One too small for float64, of values closer than about 1e-162, is 0.
        """
        if ddof < 0:
            raise ValueError(f"ddof must be at least 0, got {ddof}")
        count, state = self.__getstate__()
        if state is None or count <= ddof:
            raise ValueError(f"a variance with ddof={ddof} needs more than {ddof} rows, got {count}")
        if not np.isfinite(state[1]).all():
            j = int(np.argmin(np.isfinite(state[1])))
            raise ValueError(
                f"the squared deviations of neuron {j} are out of the range of float64: its values run from "
                f"{state[2][j]:g} to {state[3][j]:g}; scale the data"
            )
        return state[1] / (count - ddof)

    def std(self, ddof: int = 1) -> NDArray:
        """Return the standard deviation of each neuron: the root of `variance`."""
        return np.sqrt(self.variance(ddof))

    def update(self, x: ArrayLike) -> "Moments":
        """Take in the rows of `x` and return self.

        Parameters
        ----------
        x : array_like or torch.Tensor
            [n, d], n >= 1; float16, bfloat16, float32, float64 or integers.

        Raises
        ------
        TypeError
            If the dtype is another one.
        ValueError
            If `x` is not [n, d] with the d of before, or holds a value that is not finite (its row and column are
            named). Nothing is taken in then.
        """
        return self._update(x, "x")

    def _update(self, x: ArrayLike, name: str) -> "Moments":
        x, threads = as_sample(x, name), get_num_threads()
        with self._lock:  # the engine writes into the arrays without the GIL
            state = self._state or _start(x.shape[1])
            if x.shape[1] != state[0].size:
                raise ValueError(f"{name} must have {state[0].size} columns as before, got shape {x.shape}")
            self._count = _core.moments_update(x, self._count, *state, name, threads)
            self._state = state  # a first batch that is not sound leaves none
        return self

    def merge(self, other: "Moments") -> "Moments":
        """Take in what another `Moments` has seen, and return self; `other` is not changed.

        Raises
        ------
        TypeError
            If `other` is not a `Moments`.
        ValueError
            If it has another number of neurons.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other must be a Moments, got {type(other).__name__}")
        count, theirs = other.__getstate__()
        if theirs is None:
            return self
        d = theirs[0].size
        with self._lock:
            state = self._state or _start(d)
            if state[0].size != d:
                raise ValueError(f"cannot merge moments of {state[0].size} and {d} neurons")
            self._count = _core.moments_merge(self._count, *state, count, *theirs)
            self._state = state
        return self

    def __repr__(self) -> str:
        count, state = self.__getstate__()
        return f"Moments(count={count}, d={None if state is None else state[0].size})"


def moments(data: ArrayLike | Iterable[ArrayLike], *, chunk_rows: int | None = None) -> Moments:
    """Statistics of one array, or of batches as they come, without holding them all in memory.

    Parameters
    ----------
    data : ndarray, torch.Tensor or iterable of arrays
        One array [n, d] (memory-mapped, say), read in chunks of rows; or any iterable of such arrays, such as a
        generator. float16, bfloat16, float32, float64 or integers.
    chunk_rows : int, optional
        Rows of one array read at once. Default: as many as make 4 million entries.

    Returns
    -------
    Moments
        Update it further, merge it, or read it.

    Raises
    ------
    TypeError
        If `data` is neither an array nor an iterable, a dtype is another one, or `chunk_rows` is not an integer.
    ValueError
        If a batch is not [n, d] with n >= 1 and one d throughout, a value is not finite (batch or chunk, row and
        column are named), or there is no batch.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> lineas.moments(np.array([[1.0, 5.0], [3.0, 5.0]])).variance()
    array([2., 0.])
    """
    return take_batches(Moments(), data, chunk_rows)


class _Taker(Protocol):
    """What takes in batches, which messages call by a name."""

    @property
    def count(self) -> int: ...

    def _update(self, x: ArrayLike, name: str) -> Any: ...


Taker = TypeVar("Taker", bound=_Taker)


def take_batches(out: Taker, data: ArrayLike | Iterable[ArrayLike], chunk_rows: int | None, of: str = "") -> Taker:
    """`out`, with one array taken in by chunks of rows, or batches as they come.

    Errors are those of `moments`; with the name of what the data are `of`, messages call them by it.
    """
    if chunk_rows is not None:
        chunk_rows = as_int(chunk_rows, "chunk_rows", low=1)
    if is_tensor(data):
        check_dense(data, of or "data")
    if isinstance(data, np.ndarray) or is_tensor(data):
        if data.ndim != 2 or len(data) == 0:
            as_sample(data, of or "data")  # for its error message
        rows = chunk_rows or max(1, _CHUNK // max(1, data.shape[1]))
        for start in range(0, len(data), rows):
            # The name carries the offset, as the row that an error message gives is that in the chunk.
            end = min(start + rows, len(data))
            name = of or "data"
            name = name if end - start == len(data) else f"{name}[{start}:{end}]"
            out._update(data[start:end], name)
        return out
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be an array or an iterable of arrays, got {type(data).__name__}")
    for number, batch in enumerate(data):
        out._update(batch, f"{of}, batch {number}" if of else f"batch {number}")
    if out.count == 0:
        raise ValueError("data must hold at least one batch")
    return out
