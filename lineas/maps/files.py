"""Maps on disk: safetensors for the arrays, JSON in its header for the rest. Nothing is ever unpickled.

The file holds, for every module, the tensors ``<module>.weight`` and ``<module>.bias``, and as header metadata

========== =============================================================================
format     "lineas"
version    version of this layout, a whole number; readers refuse later ones
modules    JSON list of the module names in execution order (safetensors keeps no order)
metadata   JSON object: `SteeringMaps.metadata`
========== =============================================================================
"""

import json
import os
import secrets
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np

from .affine import AffineMap
from .steering import SteeringMaps

FORMAT = "lineas"
VERSION = 1

_DTYPES = {"F32": np.float32, "F64": np.float64}


def write_atomically(path: str, data: bytes) -> None:
    """Write a file so that at any moment `path` is the old file or the whole new one, and nothing else stays."""
    path = os.path.realpath(path)  # replace what a link points to, not the link
    folder, name = os.path.split(path)
    # Made by open, not by tempfile: the file gets the permissions any new file gets.
    temporary = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        try:
            os.unlink(temporary)
        except OSError:
            pass
        raise


def save(maps: SteeringMaps, path: str | PathLike[str]) -> None:
    """Write maps to a safetensors file.

    The write is atomic: a file of that name is replaced only once the new one is complete on disk, and a failed
    write leaves no trace.

    Parameters
    ----------
    maps : SteeringMaps
        What to write, metadata included.
    path : str or PathLike
        Where; the folder must exist.

    Raises
    ------
    TypeError
        If `maps` is not a `SteeringMaps`.
    ValueError
        If a module name cannot be written as UTF-8.
    OSError
        If the file cannot be written.
    """
    if not isinstance(maps, SteeringMaps):
        raise TypeError(f"maps must be a SteeringMaps, got {type(maps).__name__}")
    from safetensors.numpy import save as to_bytes  # here, not above: arrays work where there is no safetensors

    path = os.fspath(path)
    tensors = {}
    for name, one in maps.items():
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"cannot save the module name {name!r}: it is not valid Unicode") from None
        tensors[f"{name}.weight"] = one.weight
        tensors[f"{name}.bias"] = one.bias
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "modules": json.dumps(list(maps)),
        "metadata": json.dumps(maps.metadata),
    }
    write_atomically(path, to_bytes(tensors, header))


def _parse(path: str, header: Mapping[str, str], key: str, kind: type) -> Any:
    try:
        value = json.loads(header[key])
    except KeyError:
        raise ValueError(f"{path}: the header lacks {key!r}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {key!r} in the header is not JSON: {error}") from None
    if type(value) is not kind:
        raise ValueError(f"{path}: {key!r} in the header must be a JSON {kind.__name__}, got {type(value).__name__}")
    return value


def _read(path: str, file: Any) -> SteeringMaps:
    header = file.metadata() or {}
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is not a file of lineas maps: its header says format {header.get('format')!r}")
    version = _parse(path, header, "version", int)
    if not 1 <= version <= VERSION:
        raise ValueError(
            f"{path} has version {version} of the format; this lineas reads versions up to {VERSION}: update lineas"
        )
    modules = _parse(path, header, "modules", list)
    metadata = _parse(path, header, "metadata", dict)
    if not all(isinstance(name, str) and name for name in modules) or len(set(modules)) != len(modules):
        raise ValueError(f"{path}: 'modules' in the header must be different names that are not empty")
    expected = {f"{name}.{part}" for name in modules for part in ("weight", "bias")}
    found = set(file.keys())
    if expected - found:
        raise ValueError(f"{path} lacks tensor {min(expected - found)!r}")
    if found - expected:
        raise ValueError(f"{path} has the unexpected tensor {min(found - expected)!r}")
    maps = {}
    for name in modules:
        for key in (f"{name}.weight", f"{name}.bias"):
            # Before get_tensor, which cannot give every dtype to NumPy.
            dtype = file.get_slice(key).get_dtype()
            if dtype not in _DTYPES:
                raise ValueError(f"{path}: tensor {key!r} must be F32 or F64, got {dtype}")
        try:
            maps[name] = AffineMap(file.get_tensor(f"{name}.weight"), file.get_tensor(f"{name}.bias"))
        except ValueError as error:
            raise ValueError(f"{path}: module {name!r}: {error}") from None
    try:
        return SteeringMaps(maps, metadata)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def load(path: str | PathLike[str]) -> SteeringMaps:
    """Read maps that ``maps.save`` wrote.

    Any file can be given, a damaged or hostile one too: it is checked as it is read, and nothing in it is ever run.

    Parameters
    ----------
    path : str or PathLike
        A safetensors file.

    Returns
    -------
    SteeringMaps
        Equal to what was saved, metadata included.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If it is not a safetensors file, not one of lineas maps, from a later version, or its content does not hold
        together; the message names the file and what is wrong.
    """
    from safetensors import SafetensorError, safe_open

    path = os.fspath(path)
    with open(path, "rb"):
        pass  # for the operating system's own exact error; safetensors words it in its way
    try:
        with safe_open(path, framework="np") as file:
            return _read(path, file)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a sound safetensors file: {error}") from None
