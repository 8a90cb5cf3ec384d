"""GGUF files: what stands in a header, checked, and copies in which some tensors are others.

The package ``gguf`` has a reader, which makes an array of every entry of a vocabulary: 24 s and 0.7 GB for the header
of Gemma 3. A copy needs none of them: the entries go from file to file as the bytes that they are, which keeps their
order and their types. How tensors are quantised is left to that package. The layout of a file is that of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, with the checks of llama.cpp's reader.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from types import ModuleType, TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ...maps import files

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY = 8, 9
# struct's letters of the types of metadata, by their numbers.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_CHUNK = 1 << 22  # bytes copied at a time
_ROWS = 1024  # of a matrix decoded at a time


def library() -> ModuleType:
    """The package ``gguf``; an ImportError that says how to install it."""
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ImportError(f'GGUF files need the package gguf: pip install "lineas[gguf]" ({error})') from error
    return gguf


class Tensor(NamedTuple):
    """Where a tensor lies in its file: `shape` as NumPy has it, [rows, columns], `start` in bytes of the file."""

    name: str
    shape: tuple[int, ...]
    type: Any  # gguf.GGMLQuantizationType
    start: int
    bytes: int


class GGUFFile:
    """The header of a GGUF file, read and checked, and the file open for reading; a context manager.

    Parameters
    ----------
    path : str or PathLike
        The file.

    Attributes
    ----------
    metadata : dict[str, str, int, float or bool]
        The entries that are no arrays.
    keys : list[str]
        The names of all entries, in their order.
    entries : bytes
        All of them as they stand in the file.
    tensors : dict[str, Tensor]
        In the order of the file.
    alignment, version : int

    Raises
    ------
    ImportError
        If the package ``gguf`` is not installed.
    OSError
        If the file cannot be read.
    ValueError
        If it is not a sound GGUF file; the message names the file and what is wrong.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.gguf = library()
        self.path = os.fspath(path)
        self._file: BinaryIO = open(self.path, "rb")
        try:
            self._end = os.fstat(self._file.fileno()).st_size
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    # --- the header ---------------------------------------------------------------------------------------------------

    def _damaged(self, why: str) -> ValueError:
        return ValueError(f"{self.path} is not a sound GGUF file: {why}")

    def _take(self, count: int, what: str) -> bytes:
        """The next bytes; an error where the file ends before, without asking for memory that it cannot fill."""
        at = self._file.tell()
        data = self._file.read(count) if count <= self._end - at else b""
        if len(data) < count:
            raise self._damaged(f"it ends in {what}: {count} bytes from byte {at} on, of a file of {self._end}")
        return data

    def _number(self, letter: str, what: str) -> Any:
        form = f"<{letter}"
        return struct.unpack(form, self._take(struct.calcsize(form), what))[0]

    def _count(self, smallest: int, what: str) -> int:
        """A number of things of at least so many bytes each, of which the file must have room for all."""
        count = int(self._number("Q", what))
        if count * smallest > self._end - self._file.tell():
            raise self._damaged(f"{what} is {count}, more than a file of {self._end} bytes can hold")
        return count

    def _text(self, what: str) -> str:
        try:
            return self._take(self._count(1, f"the length of {what}"), what).decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is no UTF-8 text: {error}") from None

    def _read_header(self) -> None:
        magic = self._file.read(4)
        if magic != _MAGIC:
            raise ValueError(f"{self.path} is not a GGUF file: it begins with {magic!r}")
        self.version = self._number("I", "the version")
        if self.version not in _VERSIONS:
            swapped = int.from_bytes(self.version.to_bytes(4, "little"), "big")
            what = f"big-endian, version {swapped}" if swapped in _VERSIONS else f"version {self.version}"
            raise ValueError(f"{self.path} is a GGUF file of {what}; lineas reads versions 2 and 3, little-endian")
        tensors = self._count(24, "the number of tensors")
        entries = self._count(13, "the number of entries")
        self.keys: list[str] = []
        self.metadata: dict[str, Any] = {}
        begin, seen = self._file.tell(), set()
        for k in range(entries):
            key = self._text(f"the name of entry {k}")
            if not key or key in seen:
                raise self._damaged(f"entry {k} is called {key!r}, " + ("as one before" if key else "which is no name"))
            seen.add(key)
            self.keys.append(key)
            self._read_value(key)
        end = self._file.tell()
        self._file.seek(begin)
        self.entries = self._take(end - begin, "the entries")
        self.alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(self.alignment, int) or self.alignment < 1 or self.alignment & (self.alignment - 1):
            raise self._damaged(f"general.alignment must be a power of 2, got {self.alignment!r}")
        self._read_tensors(tensors)

    def _read_value(self, key: str) -> None:
        what = f"the value of {key!r}"
        kind = self._number("I", what)
        if kind in _SCALARS:
            self.metadata[key] = self._number(_SCALARS[kind], what)
            return
        if kind == _STRING:
            # Of texts some are no UTF-8, such as tokens: these are of no use here, and copied as they are.
            self.metadata[key] = self._take(self._count(1, what), what).decode(errors="replace")
            return
        kind = self._number("I", what) if kind == _ARRAY else kind
        if kind in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[kind]}")
            self._file.seek(self._count(size, what) * size, os.SEEK_CUR)
        elif kind == _STRING:
            for _ in range(self._count(8, what)):
                self._file.seek(self._count(1, what), os.SEEK_CUR)
        else:
            raise self._damaged(f"{what} has the unknown type {kind}")

    def _read_tensors(self, count: int) -> None:
        found = []
        for k in range(count):
            name = self._text(f"the name of tensor {k}")
            what = f"the description of tensor {name!r}"
            axes = self._number("I", what)
            if axes > 4:
                raise self._damaged(f"tensor {name!r} has {axes} axes")
            shape = tuple(self._number("Q", what) for _ in range(axes))[::-1]
            found.append((name, shape, self._number("I", what), self._number("Q", what)))
        data = self._padded(self._file.tell())
        self.tensors: dict[str, Tensor] = {}
        at = 0
        for name, shape, number, offset in found:
            if name in self.tensors:
                raise self._damaged(f"there are two tensors {name!r}")
            type, size = self._size(name, shape, number)
            if offset != at:
                raise self._damaged(f"tensor {name!r} lies at {offset} of the data, not at {at} behind the one before")
            if data + offset + size > self._end:
                raise self._damaged(
                    f"it ends in tensor {name!r}: {size} bytes from byte {data + offset} on, of a file of {self._end}"
                )
            self.tensors[name] = Tensor(name, shape, type, data + offset, size)
            at = self._padded(at + size)

    def _size(self, name: str, shape: tuple[int, ...], number: int) -> tuple[Any, int]:
        """The type of a tensor and its size in bytes."""
        try:
            type = self.gguf.GGMLQuantizationType(number)
            block, size = self.gguf.GGML_QUANT_SIZES[type]
        except (ValueError, KeyError):
            raise ValueError(
                f"{self.path}: tensor {name!r} has the type {number}, which this version of the package gguf does not "
                "know: update it"
            ) from None
        if (shape or (1,))[-1] % block:
            raise self._damaged(f"tensor {name!r} has rows of {shape[-1]}, which {type.name} puts in blocks of {block}")
        elements = 1
        for length in shape:
            elements *= length
        return type, elements // block * size

    def _padded(self, position: int) -> int:
        return -(-position // self.alignment) * self.alignment

    # --- tensors ------------------------------------------------------------------------------------------------------

    def blocks(self, name: str) -> Iterator[NDArray[np.float32]]:
        """The decoded rows [<= 1024, columns] of a tensor, from the first to the last, a block at a time.

        ValueError where its type cannot be decoded.
        """
        tensor = self.tensors[name]
        columns = (tensor.shape or (1,))[-1]
        block, size = self.gguf.GGML_QUANT_SIZES[tensor.type]
        width = columns // block * size  # bytes of a row
        rows = tensor.bytes // width if width else 0
        for start in range(0, rows, _ROWS):
            count = min(_ROWS, rows - start)
            self._file.seek(tensor.start + start * width)
            raw = np.frombuffer(self._take(count * width, f"tensor {name!r}"), np.uint8).reshape(count, width)
            yield self._decoded(raw, tensor)

    def _decoded(self, raw: NDArray[np.uint8], tensor: Tensor) -> NDArray[np.float32]:
        try:
            # What is not a number is found by whoever uses it.
            with np.errstate(all="ignore"):
                return self.gguf.quants.dequantize(raw, tensor.type)
        except NotImplementedError:
            kind = tensor.type.name
            raise ValueError(f"{self.path}: tensor {tensor.name!r} is {kind}, which cannot be decoded") from None

    def vector(self, name: str) -> NDArray[np.float64]:
        """A tensor of one axis, in float64."""
        return np.concatenate([block.astype(np.float64).ravel() for block in self.blocks(name)])

    def chunks(self, tensor: Tensor) -> Iterator[bytes]:
        """The bytes of a tensor as they are, a piece at a time."""
        self._file.seek(tensor.start)
        left = tensor.bytes
        while left:
            piece = self._take(min(left, _CHUNK), f"tensor {tensor.name!r}")
            left -= len(piece)
            yield piece


# ---- writing ---------------------------------------------------------------------------------------------------------


def check_output(output: str | PathLike[str], *inputs: str | PathLike[str]) -> str:
    """The path of a file to write; ValueError where it is a folder, in none, or one of the inputs, by any name."""
    path = os.fspath(output)
    files.check_output(path, "output")
    for one in inputs:
        if os.path.exists(path) and os.path.samefile(path, one):
            raise ValueError(f"output: {path} is the file {os.fspath(one)} itself, which is never written to")
    return path


def write_copy(
    source: GGUFFile,
    path: str,
    values: Mapping[str, NDArray[np.float32]],
    entries: Mapping[str, str | int | float | Sequence[str]],
    *,
    progress: bool = False,
) -> None:
    """Write `source` with other values of some tensors, in float32, with tensors that it lacks, and with more entries.

    All other tensors are the same bytes, in the same order; new ones stand at the end. The file is there as a whole or
    not at all.
    """
    float32 = source.gguf.GGMLQuantizationType.F32
    new = {
        name: Tensor(name, x.shape, float32, 0, x.nbytes) for name, x in values.items()
    }  # `start` means nothing in them
    tensors = {name: new.get(name, old) for name, old in source.tensors.items()} | new
    header = bytearray(_MAGIC + struct.pack("<IQQ", source.version, len(tensors), len(source.keys) + len(entries)))
    header += source.entries
    for key, value in entries.items():
        header += _entry(key, value)
    at = 0
    for name, tensor in tensors.items():
        axes = len(tensor.shape)
        header += _spelled(name) + struct.pack(f"<I{axes}Q", axes, *tensor.shape[::-1])
        header += struct.pack("<IQ", tensor.type.value, at)
        at = source._padded(at + tensor.bytes)
    header += bytes(source._padded(len(header)) - len(header))
    bar = tqdm(total=at, unit="B", unit_scale=True, desc="fold", delay=1, disable=not progress)
    with files.whole_or_nothing(path) as temporary, open(temporary, "xb") as file, bar:
        file.write(header)
        for name, tensor in tensors.items():
            pieces = [values[name].astype("<f4").tobytes()] if name in values else source.chunks(tensor)
            for piece in pieces:
                file.write(piece)
            file.write(bytes(source._padded(tensor.bytes) - tensor.bytes))
            bar.update(source._padded(tensor.bytes))


def _spelled(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _entry(key: str, value: str | int | float | Sequence[str]) -> bytes:
    """An entry of the metadata: a text, an unsigned integer, a float64 or texts."""
    if isinstance(value, str):
        return _spelled(key) + struct.pack("<I", _STRING) + _spelled(value)
    if isinstance(value, int):
        return _spelled(key) + struct.pack("<IQ", 10, value)
    if isinstance(value, float):
        return _spelled(key) + struct.pack("<Id", 12, value)
    return _spelled(key) + struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_spelled, value))
