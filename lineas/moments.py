"""Streaming statistics of activations: for data larger than memory."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arrays import as_sample, is_tensor
from ._threads import get_num_threads

# Elements read at once from one big array: 16 MiB of float32, far more than a call costs, far less than a memory.
_CHUNK = 1 << 22


class Moments:
    """Count, mean, variance, minimum and maximum of d neurons, updated batch by batch.

    Everything is kept in float64. Batches may come in any order and be merged in any grouping; the results then
    agree to rounding (Chan, Golub and LeVeque 1979).

    Examples
    --------
    >>> import numpy as np, lineas
    >>> seen = lineas.Moments()
    >>> for batch in np.arange(12.0).reshape(3, 2, 2):
    ...     seen = seen.update(batch)
    >>> seen.count, seen.mean, seen.max
    (6, array([5., 6.]), array([10., 11.]))
    """

    __slots__ = ("_count", "_high", "_low", "_m2", "_mean")

    def __init__(self) -> None:
        self._count = 0
        self._mean: NDArray | None = None

    def _start(self, d: int) -> None:
        self._mean, self._m2 = np.zeros(d), np.zeros(d)
        self._low, self._high = np.full(d, np.inf), np.full(d, -np.inf)

    def _read(self, array: NDArray | None) -> NDArray:
        if array is None:
            raise ValueError("these moments have seen no rows yet")
        return array.copy()

    @property
    def count(self) -> int:
        """The number of rows seen."""
        return self._count

    @property
    def d(self) -> int | None:
        """The number of neurons; None before the first row."""
        return None if self._mean is None else self._mean.size

    @property
    def mean(self) -> NDArray:
        """Mean of each neuron: float64 [d]. ValueError before the first row."""
        return self._read(self._mean)

    @property
    def min(self) -> NDArray:
        """Smallest value of each neuron: float64 [d]. ValueError before the first row."""
        return self._read(None if self._mean is None else self._low)

    @property
    def max(self) -> NDArray:
        """Largest value of each neuron: float64 [d]. ValueError before the first row."""
        return self._read(None if self._mean is None else self._high)

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
            If there are not more than `ddof` rows, or `ddof` is negative.
        """
        if ddof < 0:
            raise ValueError(f"ddof must be at least 0, got {ddof}")
        if self._count <= ddof:
            raise ValueError(f"a variance with ddof={ddof} needs more than {ddof} rows, got {self._count}")
        return self._read(self._mean if self._mean is None else self._m2) / (self._count - ddof)

    def std(self, ddof: int = 1) -> NDArray:
        """Return the standard deviation of each neuron: the root of `variance`."""
        return np.sqrt(self.variance(ddof))

    def update(self, x: ArrayLike) -> "Moments":
        """Take in the rows of `x` and return self.

        Parameters
        ----------
        x : array_like or torch.Tensor
            [n, d], n >= 1; float16, bfloat16, float32 or float64.

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
        x = as_sample(x, name)
        if self._mean is None:
            state = Moments()
            state._start(x.shape[1])  # kept only if this first batch is sound
        else:
            state = self
        if x.shape[1] != state._mean.size:
            raise ValueError(f"{name} must have {state._mean.size} columns as before, got shape {x.shape}")
        self._count = _core.moments_update(
            x, state._count, state._mean, state._m2, state._low, state._high, name, get_num_threads()
        )
        if state is not self:
            self._mean, self._m2, self._low, self._high = state._mean, state._m2, state._low, state._high
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
        if other._mean is None:
            return self
        if other is self:
            other = Moments().merge(self)  # the engine wants two states, not one twice
        if self._mean is None:
            self._start(other._mean.size)
        if self._mean.size != other._mean.size:
            raise ValueError(f"cannot merge moments of {self._mean.size} and {other._mean.size} neurons")
        self._count = _core.moments_merge(
            self._count, self._mean, self._m2, self._low, self._high,
            other._count, other._mean, other._m2, other._low, other._high,
        )  # fmt: skip
        return self

    def __repr__(self) -> str:
        return f"Moments(count={self._count}, d={self.d})"


def moments(data: ArrayLike | Iterable[ArrayLike], *, chunk_rows: int | None = None) -> Moments:
    """Statistics of one array, or of batches as they come, without holding them all in memory.

    Parameters
    ----------
    data : ndarray, torch.Tensor or iterable of arrays
        One array [n, d] (memory-mapped, say), read in chunks of rows; or any iterable of such arrays, such as a
        generator. float16, bfloat16, float32 or float64.
    chunk_rows : int, optional
        Rows of one array read at once. Default: as many as make 4 million entries.

    Returns
    -------
    Moments
        Update it further, merge it, or read it.

    Raises
    ------
    TypeError
        If `data` is neither an array nor an iterable, or a dtype is another one.
    ValueError
        If a batch is not [n, d] with n >= 1 and one d throughout, a value is not finite (batch or chunk, row and
        column are named), or there is no batch.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> lineas.moments(np.array([[1.0, 5.0], [3.0, 5.0]])).variance()
    array([2., 0.])
    """
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    out = Moments()
    if isinstance(data, np.ndarray) or is_tensor(data):
        if data.ndim != 2 or len(data) == 0:
            as_sample(data, "data")  # for its error message
        rows = chunk_rows or max(1, _CHUNK // max(1, data.shape[1]))
        for start in range(0, len(data), rows):
            # The name carries the offset, as the row that an error message gives is that in the chunk.
            end = min(start + rows, len(data))
            name = "data" if end - start == len(data) else f"data[{start}:{end}]"
            out._update(data[start:end], name)
        return out
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be an array or an iterable of arrays, got {type(data).__name__}")
    for number, batch in enumerate(data):
        out._update(batch, f"batch {number}")
    if out.count == 0:
        raise ValueError("data must hold at least one batch")
    return out
