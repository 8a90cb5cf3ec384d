"""Batches of rows out of arrays, dask arrays, files and iterables, for what takes them in one after another."""

from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any, Protocol, TypeGuard, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from .._checks import as_engine, as_int, as_sample, check_dense, check_sample_shape, is_tensor
from .dask_arrays import State, Work, check_dask, is_dask, summaries

# Elements read at once from one big array: 16 MiB of float32, far more than a call costs, far less than a memory.
_CHUNK = 1 << 22
_MOST_BLOCKS = 16  # so many times as much where chunks of a stored array are so high


class Stored(Protocol):
    """An array of which slices of rows are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int: ...

    @property
    def dtype(self) -> Any: ...

    @property
    def nbytes(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> ArrayLike: ...


Batches = ArrayLike | Stored | Iterable[ArrayLike]


class _Taker(State, Protocol):
    """What takes in batches, and counts their rows."""

    @property
    def count(self) -> int: ...


Taker = TypeVar("Taker", bound=_Taker)


def check_no_path(x: Any, name: str) -> None:
    """TypeError for a path, or a list of paths, where activations are taken: the usual one, and what to do."""
    first = x[0] if isinstance(x, list | tuple) and x else x
    if isinstance(first, str | PathLike):
        try:
            as_engine(x, name)
        except TypeError as error:
            raise TypeError(f"{error}; files are opened by lineas.open_activations") from None


def is_stored(x: Any) -> TypeGuard[Stored]:
    """Whether `x` is an array that is somewhere else, and read by slices of rows: a `FileArray`, a dataset of h5py."""
    parts = ("shape", "ndim", "dtype", "nbytes", "__getitem__")
    here = isinstance(x, np.ndarray | np.generic | type) or is_tensor(x)
    return not here and all(hasattr(x, part) for part in parts) and isinstance(x.shape, tuple)


def _rows_at_once(data: Any) -> int:
    """Rows to read at once: for what is stored in chunks whole ones, so that none is read twice."""
    rows, chunks = max(1, _CHUNK // max(1, data.shape[1])), getattr(data, "chunks", None)
    if not (isinstance(chunks, tuple) and chunks and isinstance(chunks[0], int)):
        return rows
    band = max(1, chunks[0])
    # A chunk much higher than a block would take too much memory; it has to be read several times.
    return max(1, rows // band) * band if band <= _MOST_BLOCKS * rows else rows


def take_batches(out: Taker, data: Batches, chunk_rows: int | None, of: str = "") -> Taker:
    """`out`, with one array taken in by chunks of rows, or batches as they come.

    Errors are those of `moments`; with the name of what the data are `of`, messages call them by it.
    """
    check_no_path(data, of or "data")
    if chunk_rows is not None:
        chunk_rows = as_int(chunk_rows, "chunk_rows", low=1)
    if is_dask(data, of or "data"):
        if chunk_rows is not None:
            raise ValueError(
                "chunk_rows does not go with dask arrays, which are read by their own chunks: rechunk them"
            )
        check_dask(data, of or "data")
        return summaries([Work(data, out, of or "data")])[0]
    if is_tensor(data):
        check_dense(data, of or "data")
    elif hasattr(data, "__array__") and not isinstance(data, np.ndarray | type) and not is_stored(data):
        data = as_sample(data, of or "data")  # data frames, which would give the names of their columns
    if is_stored(data):
        check_sample_shape(data.shape, of or "data")
    if isinstance(data, np.ndarray) or is_tensor(data) or is_stored(data):
        if data.ndim != 2 or data.shape[0] == 0:
            as_sample(data, of or "data")  # for its error message
        rows, n = chunk_rows or _rows_at_once(data), data.shape[0]
        for start in range(0, n, rows):
            # The name carries the offset, as the row that an error message gives is that in the chunk.
            end = min(start + rows, n)
            name = of or "data"
            name = name if end - start == n else f"{name}[{start}:{end}]"
            out._update(data[start:end], name)
        return out
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be an array or an iterable of arrays, got {type(data).__name__}")
    for number, batch in enumerate(data):
        out._update(batch, f"{of}, batch {number}" if of else f"batch {number}")
    if out.count == 0:
        used_up = ": an iterator can be read once" if isinstance(data, Iterator) else ""
        raise ValueError(f"data must hold at least one batch{used_up}")
    return out
