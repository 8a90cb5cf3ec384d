"""Streaming statistics of activations: for data larger than memory."""

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from .._checks import as_sample
from .._threads import get_num_threads
from .streams import Batches, take_batches

# Of each neuron the mean, the sum of squared deviations from it, the minimum and the maximum: float64 [d].
_State = tuple[NDArray, NDArray, NDArray, NDArray]


def writable(array: NDArray) -> NDArray:
    """`array`, or a copy of one that is read-only."""
    return np.require(array, requirements=["C", "W"])


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
        count, arrays = state
        # What other processes send may be read-only, and the engine writes into it.
        self._count, self._state = count, None if arrays is None else tuple(map(writable, arrays))  # type: ignore[assignment]
        self._lock = threading.Lock()

    @classmethod
    def _joined(cls, parts: Sequence["Moments"]) -> "Moments":
        """The moments of the neurons of all parts, which have seen the same number of rows."""
        found, states = cls(), [part.__getstate__() for part in parts]
        arrays = zip(*(state for _, state in states if state is not None), strict=True)
        found.__setstate__((states[0][0], tuple(map(np.concatenate, arrays))))  # type: ignore[arg-type]
        return found

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


def moments(data: Batches, *, chunk_rows: int | None = None) -> Moments:
    """Statistics of one array, or of batches as they come, without holding them all in memory.

    Parameters
    ----------
    data : ndarray, torch.Tensor, dask.array.Array or iterable of arrays
        One array [n, d] (memory-mapped, say, or of `lineas.open_activations`), read in chunks of rows; a dask array,
        read by its chunks; or any iterable of arrays, such as a generator. float16, bfloat16, float32, float64 or
        integers.
    chunk_rows : int, optional
        Rows of one array read at once, not of a dask array. Default: as many as make 4 million entries.

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
