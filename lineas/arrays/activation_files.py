"""Activations in files of other tools, opened by name and read by slices of rows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .._checks import check_sample_shape
from .._names import hint, is_glob, matching
from .activations import Activations
from .file_formats import DAMAGED, Group, Part, Table, read_headers

_ACCEPTED = "float16, bfloat16, float32 or float64"


class FileArray:
    """An array [n, d] in one file or several, which `lineas.open_activations` makes: read when rows are asked for.

    ``x[start:stop]`` reads these rows, ``x[start:stop, left:right]`` some columns of them, ``np.asarray(x)`` all.
    `lineas.fit`, `lineas.sparse_path`, `lineas.wasserstein`, `lineas.moments` and `lineas.quantiles` read it by blocks
    where it is large, other functions whole. A pickle of it holds the paths, not the values.

    Attributes
    ----------
    shape : tuple
        (n, d).
    dtype : dtype
        float16, float32 or float64; float32 for bfloat16, which NumPy does not know.
    nbytes : int
        Bytes of all rows in `dtype`.
    paths : tuple of str
        The files, in the order of the rows.
    chunks : tuple of int or None
        In what blocks HDF5 keeps the values of the first file.
    """

    __slots__ = ("_parts", "_place")

    ndim = 2

    def __init__(self, parts: Sequence[Part], name: str | None) -> None:
        self._parts, self._place = tuple(parts), "" if name is None else f": {name!r}"

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self._parts), self._parts[0].shape[1]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self._parts[0].dtype)

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(part.path for part in self._parts)

    @property
    def chunks(self) -> tuple[int, ...] | None:
        return self._parts[0].chunks

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | tuple[slice, slice]) -> NDArray:
        """Read rows, or a block of rows and columns.

        Raises
        ------
        TypeError
            If `index` is no slice, nor two.
        ValueError
            If the step of rows is negative, or a file is damaged, or was changed since it was opened.
        OSError
            If a file cannot be read.
        """
        if isinstance(index, tuple) and len(index) == 2 and isinstance(index[1], slice):
            return self[index[0]][:, index[1]]
        if not isinstance(index, slice):
            seen = type(index).__name__
            raise TypeError(f"an array in files takes a slice of rows, and one of columns, got {seen}: use np.asarray")
        start, stop, step = index.indices(len(self))
        if step < 0:
            raise ValueError(f"an array in files is read forwards, got a slice of step {step}")
        found, first = [], 0
        for part in self._parts:
            a, b = max(start - first, 0), min(stop - first, part.shape[0])
            if a < b:
                found.append(self._read(part, a, b))
            first += part.shape[0]
        if not found:
            return np.empty((0, self.shape[1]), self.dtype)
        return (found[0] if len(found) == 1 else np.concatenate(found))[::step]

    def _read(self, part: Part, start: int, stop: int) -> NDArray:
        try:
            block = part.read(start, stop)
        except DAMAGED as error:
            raise ValueError(f"{part.path}{self._place}: rows {start} to {stop} cannot be read: {error}") from error
        if block.shape != (stop - start, self.shape[1]) or block.dtype != self.dtype:
            raise ValueError(f"{part.path}{self._place} was changed since it was opened")
        return block

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray:
        return np.array(self[:], dtype, copy=copy)

    def __repr__(self) -> str:
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        return f"FileArray({list(self.shape)}, {self.dtype}, {self.paths[0]}{self._place}{more})"


def open_activations(
    paths: str | PathLike[str] | Sequence[str | PathLike[str]], *, names: str | Sequence[str] | None = None
) -> Activations | FileArray:
    """Open activations in files of other tools, to be read as they are needed.

    Parameters
    ----------
    paths : str, PathLike or sequence of these
        ``.safetensors``, ``.npy``, ``.npz``, ``.h5`` or ``.hdf5`` (needs h5py). Of several files (shards) the arrays of
        the same name are one, its rows one after another in the order given; they have the same dtype and columns.
    names : str or sequence of str, optional
        Which arrays to take, in this order: names, or globs as in ``layers=`` of `lineas.collect`. Datasets in groups
        of HDF5 have names with slashes. Default: all there are, with the numbers in their names in order; of an
        ``.npz`` in the order of the file.

    Returns
    -------
    Activations or FileArray
        `Activations` of a `FileArray` for each name; of ``.npy`` files, which have no names, the one `FileArray`. Each
        is [n, d] of float16, float32 or float64; bfloat16 becomes float32.

    Raises
    ------
    TypeError
        If `paths` or `names` is something else, or an array is of another dtype (integers included, which mostly are
        token ids), holds Python objects, or is a group of HDF5.
    ValueError
        If there is no file, a file is of another format or damaged, an array is not [n, d] with n, d >= 1, a name is
        not there, or shards do not fit together.
    OSError
        If a file cannot be read.
    ImportError
        If a file is HDF5 and h5py is not installed (``pip install "lineas[hdf5]"``).

    Examples
    --------
    >>> import numpy as np, lineas, tempfile, os
    >>> folder = tempfile.mkdtemp()
    >>> np.savez(os.path.join(folder, "source.npz"), layer=np.array([[0.0], [1.0], [2.0]]))
    >>> source = lineas.open_activations(os.path.join(folder, "source.npz"))
    >>> source
    Activations({'layer': [3, 1]}, {})
    >>> lineas.moments(source["layer"]).mean
    array([1.])
    """
    files = _as_paths(paths)
    tables = [read_headers(path) for path in files]
    unnamed = [path for path, table in zip(files, tables, strict=True) if None in table]
    if unnamed:
        if len(unnamed) < len(files):
            raise ValueError(f"paths must be all .npy files or none, got {', '.join(files)}")
        if names is not None:
            raise ValueError(f"names is for files with named arrays: {files[0]} holds one that has no name")
        return _joined(None, tables)
    wanted = _selected(names, tables[0], files[0])
    for path, table in zip(files[1:], tables[1:], strict=True):
        arrays = [name for name, part in table.items() if not isinstance(part, Group)]
        missing = [name for name in wanted if name not in table]
        extra = [name for name in arrays if name not in wanted] if names is None else []
        if missing or extra:
            what = [f"it lacks {', '.join(map(repr, missing))}"] if missing else []
            what += [f"it also has {', '.join(map(repr, extra))}"] if extra else []
            raise ValueError(f"{path} must have the arrays of {files[0]}: {', '.join(what)}")
    return Activations(cast("Mapping[str, NDArray]", {name: _joined(name, tables) for name in wanted}), {})


def _as_paths(paths: Any) -> list[str]:
    if isinstance(paths, str | PathLike):
        return [os.fspath(paths)]
    if not isinstance(paths, Sequence) or not all(isinstance(path, str | PathLike) for path in paths):
        seen = type(paths).__name__
        if isinstance(paths, Sequence):
            seen += f" of {', '.join(dict.fromkeys(type(path).__name__ for path in paths))}"
        raise TypeError(f"paths must be a path or a sequence of paths, got {seen}")
    if not paths:
        raise ValueError("paths must hold at least one file")
    return [os.fspath(path) for path in paths]


def _selected(names: Any, table: Table, path: str) -> list[str]:
    """The names of the arrays to take, none twice."""
    there = [cast(str, name) for name, part in table.items() if not isinstance(part, Group)]
    if names is None:
        return there
    wanted = [names] if isinstance(names, str) else names
    if not isinstance(wanted, Sequence) or not all(isinstance(name, str) for name in wanted):
        raise TypeError(f"names must be a string or a sequence of strings, got {names!r}")
    if not wanted:
        raise ValueError("names must hold at least one name")
    found: dict[str, None] = {}
    for name in wanted:
        hits = [name] if name in table else matching(name, there) if is_glob(name) else []
        if not hits:
            raise ValueError(f"{path} holds no array {name!r}{hint(name, there, 'it')}")
        found |= dict.fromkeys(hits)
    return list(found)


def _joined(name: str | None, tables: Sequence[Table]) -> FileArray:
    """The array of a name in all files, checked."""
    parts = [table[name] for table in tables]
    first = parts[0]
    for part in parts:
        place = part.path if name is None else f"{part.path}: {name!r}"
        if isinstance(part, Group):
            inside = f"it holds {', '.join(part.names[:5])}" if part.names else "it is empty"
            raise TypeError(f"{place} must be a dataset, got a group; {inside}")
        choose = "" if name is None else "; names= chooses among the arrays of a file"
        if isinstance(part.dtype, np.dtype) and part.dtype.hasobject:
            raise TypeError(f"{place} must be {_ACCEPTED}, got Python objects, which are never unpickled{choose}")
        if not isinstance(part.dtype, np.dtype) or part.dtype.kind != "f" or part.dtype.itemsize not in (2, 4, 8):
            raise TypeError(f"{place} must be {_ACCEPTED}, got dtype {part.dtype}{choose}")
        check_sample_shape(part.shape, place)
        if part.shape[1] != first.shape[1]:
            raise ValueError(f"{place} must have {first.shape[1]} columns as in {first.path}, got {part.shape[1]}")
        if part.dtype != first.dtype:
            raise ValueError(f"{place} must have dtype {first.dtype} as in {first.path}, got {part.dtype}")
    return FileArray(parts, name)
