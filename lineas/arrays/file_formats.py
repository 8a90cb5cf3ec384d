"""What stands in files of arrays: safetensors, .npy, .npz and HDF5, told by headers and read by rows.

Headers are read when files are opened, values when they are asked for. Nothing is ever unpickled, and no file stays
open, but an .npz while one of its arrays is read from start to end.
"""

from __future__ import annotations

import json
import os
import threading
import zipfile
import zlib
from collections.abc import Sequence
from io import BufferedIOBase
from typing import IO, Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from .._checks import widen
from .._names import numbers_in_order

_SAFETENSORS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
# What reading a file that is damaged, or was changed, raises besides OSError.
DAMAGED = (ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)


class Part(Protocol):
    """An array [n, d] in one file, or what stands there instead of one."""

    @property
    def path(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any:
        """That of its values; the name of one that NumPy does not know."""
        ...

    @property
    def chunks(self) -> tuple[int, ...] | None: ...

    def read(self, start: int, stop: int) -> NDArray: ...


class _Mapped(NamedTuple):
    """Values as they lie in a file, from a byte on: of .npy and safetensors."""

    path: str
    shape: tuple[int, ...]
    stored: Any  # dtype; the name of one that NumPy does not know
    offset: int
    fortran: bool = False
    bfloat16: bool = False
    chunks: None = None

    @property
    def dtype(self) -> Any:
        return np.dtype(np.float32) if self.bfloat16 else self.stored

    def read(self, start: int, stop: int) -> NDArray:
        rows = np.memmap(self.path, self.stored, "r", self.offset, self.shape, "F" if self.fortran else "C")[start:stop]
        return widen(np.asarray(rows).astype(np.uint16)) if self.bfloat16 else np.asarray(rows)


class _Cursor(NamedTuple):
    """An .npz that is open, one of its arrays in it, and the next row there."""

    archive: zipfile.ZipFile
    stream: IO[bytes]
    row: int


class _Member:
    """An array in an .npz, which is read on from where the last read ended: compressed data know no other places."""

    chunks = None

    def __init__(self, path: str, member: str, shape: tuple[int, ...], dtype: np.dtype, fortran: bool) -> None:
        self.path, self.member, self.shape, self.dtype, self.fortran = path, member, shape, dtype, fortran
        self._cursor: _Cursor | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Member, (self.path, self.member, self.shape, self.dtype, self.fortran)

    def read(self, start: int, stop: int) -> NDArray:
        with self._lock:
            cursor, self._cursor = self._cursor, None
            try:
                if cursor is None or cursor.row > start:
                    if cursor is not None:
                        cursor.archive.close()
                    cursor = self._opened()
                if self.fortran:
                    if (start, stop) != (0, self.shape[0]):
                        raise ValueError("an .npz keeps it by columns (Fortran order): save it in C order")
                    block = self._rows(cursor.stream, self.shape[1], self.shape[0]).T
                else:
                    for row in range(cursor.row, start, 1024):  # skipped, in steps that take little memory
                        self._rows(cursor.stream, min(1024, start - row), self.shape[1])
                    block = self._rows(cursor.stream, stop - start, self.shape[1])
                if stop < self.shape[0]:
                    self._cursor = cursor._replace(row=stop)
                elif cursor.stream.read(1):  # at the end the checksum of the archive is looked at
                    raise ValueError("there are values behind the last one")
                return block
            finally:
                if self._cursor is None and cursor is not None:
                    cursor.archive.close()

    def _opened(self) -> _Cursor:
        archive = zipfile.ZipFile(self.path)
        try:
            stream = archive.open(self.member)
            if _npy_header(stream) != (self.shape, self.fortran, self.dtype):
                raise ValueError("its shape or type is another one")
        except BaseException:
            archive.close()
            raise
        return _Cursor(archive, stream, 0)

    def _rows(self, stream: IO[bytes], rows: int, columns: int) -> NDArray:
        block = np.empty((rows, columns), self.dtype)
        left = block.reshape(-1).view(np.uint8).data
        while left:
            taken = cast(BufferedIOBase, stream).readinto(left)
            if not taken:
                raise EOFError("it ends early")
            left = left[taken:]
        return block


class _Dataset(NamedTuple):
    """A dataset of an HDF5 file."""

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: Any
    chunks: tuple[int, ...] | None

    def read(self, start: int, stop: int) -> NDArray:
        try:
            with _h5py().File(self.path, "r") as file:
                return file[self.name][start:stop]
        except OSError as error:
            raise _of_hdf5(error) from error


class Group(NamedTuple):
    """A group of an HDF5 file, which is no array."""

    path: str
    names: tuple[str, ...]


Table = dict[str | None, Any]  # of a file: arrays by their names, None for that of a file with one that has none


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether by columns, and dtype; ValueError if it is none."""
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(stream)
        raise ValueError(f"version {version} of the format is for structured arrays")
    except (OSError, ValueError):
        raise
    except Exception as error:  # NumPy lets those of Python's parser through: SyntaxError, TokenError, MemoryError
        raise ValueError(f"its header cannot be read: {error}") from error


def _size(shape: Sequence[int], dtype: np.dtype) -> int:
    """Bytes, in numbers of any size: a hostile header may tell of more than there can be."""
    size = dtype.itemsize
    for length in shape:
        size *= int(length)
    return size


def _open_npy(path: str) -> Table:
    with open(path, "rb") as file:
        shape, fortran, dtype = _npy_header(file)
        offset, there = file.tell(), os.fstat(file.fileno()).st_size
    if not dtype.hasobject and there - offset < _size(shape, dtype):
        raise ValueError(f"it is cut off: {_size(shape, dtype)} bytes of values expected, got {there - offset}")
    return {None: _Mapped(path, shape, dtype, offset, fortran)}


def _open_npz(path: str) -> Table:
    found: Table = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            with archive.open(info) as stream:
                shape, fortran, dtype = _npy_header(stream)
                left = info.file_size - stream.tell()
            name = info.filename.removesuffix(".npy")
            if not dtype.hasobject and left != _size(shape, dtype):
                raise ValueError(f"{name!r} must have {_size(shape, dtype)} bytes of values, got {left}")
            found[name] = _Member(path, info.filename, shape, dtype, fortran)
    return found


def _open_safetensors(path: str) -> Table:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            kinds = {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    # The header is sound. safetensors' own slices know no bfloat16 in NumPy, so values are read by their places.
    with open(path, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    found: Table = {}
    for name in numbers_in_order(kinds):
        shape, kind = kinds[name]
        stored = np.dtype(_SAFETENSORS[kind]) if kind in _SAFETENSORS else kind
        found[name] = _Mapped(
            path, shape, stored, 8 + length + header[name]["data_offsets"][0], bfloat16=kind == "BF16"
        )
    return found


def _open_hdf5(path: str) -> Table:
    h5py, found = _h5py(), cast(Table, {})

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            # Strings and references come as Python objects, which is not what they are in the file.
            dtype = "of strings or references" if item.dtype.hasobject else item.dtype
            found[name] = _Dataset(path, name, item.shape or (), dtype, item.chunks)
        else:
            found[name] = Group(path, tuple(item))

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except OSError as error:
        raise _of_hdf5(error) from error
    return {name: found[name] for name in numbers_in_order(cast("dict[str, Any]", found))}


def _of_hdf5(error: OSError) -> Exception:
    """What to raise for an OSError of h5py, which stands for whatever HDF5 reports: ours, or the operating system's."""
    return ValueError(str(error)) if error.errno is None else type(error)(*error.args)


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError('HDF5 files need h5py: pip install "lineas[hdf5]"') from error
    return h5py


FORMATS = {
    ".safetensors": ("safetensors", _open_safetensors),
    ".npy": (".npy", _open_npy),
    ".npz": (".npz", _open_npz),
    ".h5": ("HDF5", _open_hdf5),
    ".hdf5": ("HDF5", _open_hdf5),
}


def read_headers(path: str) -> Table:
    """The arrays of a file, not yet checked; ValueError, which names it, if it is not what its name says."""
    ending = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: pass the files in it")
    if ending not in FORMATS:
        raise ValueError(f"{path} must end with one of {', '.join(FORMATS)}, by which its format is known")
    what, reader = FORMATS[ending]
    with open(path, "rb"):
        pass  # for the operating system's own exact error
    try:
        table = reader(path)
    except OSError:
        raise
    except DAMAGED as error:
        raise ValueError(f"{path} is not a sound {what} file: {error}") from error
    if not any(not isinstance(part, Group) for part in table.values()):
        raise ValueError(f"{path} holds no array")
    return table
