"""Files of lineas: safetensors for the arrays, JSON in its header for the rest. Nothing is ever unpickled.

The only place that reads and writes headers. That of every file holds

========= =================================================================================
format    what the file is, a key of `FORMATS`
version   version of that format's layout, a whole number; readers refuse later ones
sha256    checksum of the arrays and the rest of the header; files of old versions have none
========= =================================================================================

and, each as JSON, the entries of its format. Maps have "modules", the module names in execution order (safetensors
keeps none), and "metadata"; their tensors are ``<module>.weight`` and ``<module>.bias``. Those with gates have "gates"
as well: the gates without their tensors, ``gate <number>.<part>``, and by module the number of its gate. A `Record` has
"fields", where a tensor's name stands for each of its arrays. Quantiles have "state", the numbers beside their arrays;
those of several modules "modules", "states" in that order, and "metadata". Entries stand in alphabetical order: what is
saved twice gives the same bytes.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from importlib import import_module
from os import PathLike
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from .._checks import is_tensor
from .._lazy import lazy_import
from .records import Record, from_tensors, to_tensors
from .steering import SteeringMaps

FILE = "maps.safetensors"  # in folders and on the hub


class Format(NamedTuple):
    """What a file is in words, the types of its entries, and the class of lineas that is read from it, if any."""

    what: str
    entries: Mapping[str, type]
    reader: tuple[str, str] | None
    version: int = 1
    oldest: int = 1  # version that is still read
    optional: Mapping[str, type] = MappingProxyType({})  # entries that need not be there


FORMATS = {
    "lineas": Format(
        "steering maps",
        {"modules": list, "metadata": dict},
        ("maps.steering", "SteeringMaps"),
        optional={"gates": dict},
    ),
    "lineas sparse path": Format("a sparse path", {"fields": dict}, ("maps.path", "SparsePath")),
    "lineas end-to-end path": Format("a sparse path", {"fields": dict}, ("fitting.result", "EndToEndPath")),
    "lineas fit": Format("the result of a fit", {"fields": dict}, ("fitting.result", "FitResult")),
    "lineas sequence of fits": Format(
        "a sequence of fits", {"fields": dict}, ("fitting.sequence_result", "SequenceResult")
    ),
    "lineas evaluation": Format("an evaluation", {"fields": dict}, ("evaluation.result", "Evaluation")),
    "lineas gaussian map": Format("a Gaussian map", {"fields": dict}, ("arrays.gaussian", "GaussianMap")),
    "lineas quantiles": Format("quantiles", {"state": dict}, ("arrays.quantiles", "Quantiles")),
    "lineas activation quantiles": Format(
        "quantiles of activations",
        {"modules": list, "states": list, "metadata": dict},
        ("arrays.activation_quantiles", "ActivationQuantiles"),
    ),
    "lineas checkpoint": Format("the checkpoint of a fit", {"state": dict}, None, version=3, oldest=3),
}


def write(path: str | PathLike[str], format: str, tensors: Mapping[str, Any], entries: Mapping[str, Any]) -> None:
    """Write a file of a format with its entries and with tensors by name, as a whole or not at all.

    They are NumPy arrays or torch tensors, not both, of any dtype that safetensors knows. TypeError if JSON cannot hold
    an entry, ValueError if a name is not valid Unicode, OSError if the file cannot be written: what was there still is.
    """
    library = "torch" if any(map(is_tensor, tensors.values())) else "numpy"
    for name in tensors:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"cannot save the tensor name {name!r}: it is not valid Unicode") from None
    ready = {name: _plain(x) for name, x in tensors.items()}
    header = {"format": format, "version": str(FORMATS[format].version)}
    header |= {key: json.dumps(value) for key, value in entries.items()}
    header["sha256"] = _checksum(ready, header)
    # safetensors is imported here, not above: arrays work where there is none.
    write_atomically(os.fspath(path), with_sorted_header(import_module(f"safetensors.{library}").save(ready, header)))


def with_sorted_header(data: bytes) -> bytes:
    """A safetensors file with the metadata in its header in order; safetensors' own is random."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # so that the arrays stay aligned
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[start:]))


def _plain(x: Any) -> Any:
    """An array as safetensors takes it: contiguous, sharing no memory, in native byte order."""
    if is_tensor(x):
        return x.detach().to("cpu", copy=True).contiguous()
    return np.require(x, dtype=x.dtype.newbyteorder("="), requirements="C")


def _checksum(tensors: Mapping[str, Any], header: Mapping[str, str]) -> str:
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        found.update(f"{name} {str(x.dtype).removeprefix('torch.')} {list(x.shape)}".encode())
        flat = x.reshape(-1)
        found.update(flat.view(import_module("torch").uint8).numpy() if is_tensor(x) else flat.view(np.uint8))
    return found.hexdigest()


def check_output(path: str, name: str) -> None:
    """ValueError, which calls it `name`, if a file to write is a folder, or in none."""
    if os.path.isdir(path):
        raise ValueError(f"{name} must be a file, and {path} is a folder")
    if not os.path.isdir(os.path.dirname(os.path.realpath(path))):
        raise ValueError(f"{name}: the folder of {path} does not exist")


def write_atomically(path: str, data: bytes) -> None:
    """Write a file so that at any moment `path` is the old file or the whole new one, and nothing else stays."""
    with whole_or_nothing(path) as temporary, open(temporary, "xb") as file:
        file.write(data)


@contextlib.contextmanager
def whole_or_nothing(path: str) -> Iterator[str]:
    """The name of a new file beside `path`, which takes its place when the block ends, and is removed if it fails.

    At any moment `path` is the old file or the whole new one. The block makes the file, by open and not by tempfile: it
    gets the permissions any new file gets.
    """
    path = os.path.realpath(path)  # replace what a link points to, not the link
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read(path: str | PathLike[str], *formats: str, framework: str = "np") -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Read a file of one of `formats` (default: of any) that `write` wrote: its format, its tensors and its entries.

    The tensors are NumPy arrays, for framework "pt" torch's; NumPy knows bfloat16 only where ml_dtypes is installed.
    OSError if the file cannot be read. ValueError, which names the file and what is wrong, if it is not a sound
    safetensors file, of another format or a later version, or changed: any file can be given, hostile ones too.
    """
    from safetensors import SafetensorError, safe_open

    path, tensors = os.fspath(path), {}
    with open(path, "rb"):
        pass  # for the operating system's own exact error; safetensors words it in its way
    try:
        with safe_open(path, framework=framework) as file:
            header = file.metadata() or {}
            format = header.get("format")
            if format is None or format not in FORMATS:
                raise ValueError(f"{path} is not a file of lineas: its header says format {format!r}")
            if formats and format not in formats:
                wanted = " or ".join(dict.fromkeys(FORMATS[wanted].what for wanted in formats))
                raise ValueError(f"{path} holds {FORMATS[format].what}, not {wanted}")
            version, known = _parse(path, header, "version", int), FORMATS[format]
            if not known.oldest <= version <= known.version:
                advice = ": update lineas" if version > known.version else ""
                raise ValueError(
                    f"{path} has version {version} of the format; this lineas reads versions {known.oldest} to "
                    f"{known.version}{advice}"
                )
            kinds = {**known.entries, **{key: kind for key, kind in known.optional.items() if key in header}}
            entries = {key: _parse(path, header, key, kind) for key, kind in kinds.items()}
            for name in file.keys():
                try:
                    tensors[name] = file.get_tensor(name)
                except (AttributeError, ImportError, TypeError) as error:  # a dtype that NumPy does not know
                    dtype = file.get_slice(name).get_dtype()
                    raise ValueError(f"{path}: tensor {name!r} of dtype {dtype} cannot be read: {error}") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is not a sound safetensors file: {error}") from None
    written = header.pop("sha256", None)
    if written is not None and written != _checksum(tensors, header):
        raise ValueError(f"{path} is damaged: its content is not what was written")
    return format, tensors, entries


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


# ---- what users save -------------------------------------------------------------------------------------------------


def save(value: SteeringMaps | Record, path: str | PathLike[str]) -> None:
    """Write maps, a path, the result of a fit, an evaluation or a Gaussian map to a safetensors file for `lineas.load`.

    The write is atomic: a file of that name is replaced only once the new one is complete on disk, and a failed
    write leaves no trace.

    Parameters
    ----------
    path : str or PathLike
        Where; the folder must exist.

    Raises
    ------
    TypeError
        If it is something else, or its metadata cannot be written as JSON.
    ValueError
        If `path` is a folder or in none, or a module name cannot be written as UTF-8.
    OSError
        If the file cannot be written.
    """
    if not isinstance(value, SteeringMaps | Record):
        raise TypeError(
            f"only SteeringMaps, paths, results, evaluations and GaussianMap can be saved, got {type(value).__name__}"
        )
    check_output(os.fspath(path), "path")
    write(path, "lineas" if isinstance(value, SteeringMaps) else value.FORMAT, *to_tensors(value))


def load(
    name: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Any:
    """Read what ``maps.save``, ``path.save`` or ``result.save`` wrote, or maps from a folder or the Hugging Face Hub.

    Any file can be given, a damaged or hostile one too: it is checked as it is read, and nothing in it is ever run.

    Parameters
    ----------
    name : str or PathLike
        A file; a folder that `SteeringMaps.save_pretrained` wrote; or else ``"user/name"`` on the hub.
    revision : str, optional
        A branch, tag or commit of a repository on the hub. Default: its main branch.
    token : str or bool, optional
        For the hub. Default: that of ``hf auth login``.
    cache_dir : str or PathLike, optional
        Where files of the hub are kept. Default: huggingface_hub's cache.
    local_files_only : bool, default False
        Take files of the hub from its cache only.

    Returns
    -------
    SteeringMaps, SparsePath, EndToEndPath, FitResult, SequenceResult, Evaluation, GaussianMap, Quantiles or
    ActivationQuantiles
        Equal to what was saved, metadata included.

    Raises
    ------
    FileNotFoundError
        If there is no such file, folder, repository or revision, or no maps in it.
    OSError
        If the file cannot be read.
    ImportError
        If it is on the hub and huggingface_hub is not installed (``pip install "lineas[hub]"``).
    ConnectionError
        If the hub cannot be reached and the cache does not have the maps.
    ValueError
        If it is not a safetensors file, not one of lineas, from a later version, damaged, or its content does not hold
        together; the message names the file and what is wrong.
    """
    path = os.fsdecode(name)
    if os.path.isdir(path):
        path = os.path.join(path, FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"the folder {os.fsdecode(name)!r} has no {FILE}")
    elif not os.path.exists(path) and not path.endswith(".safetensors"):
        from .hub import download

        path = download(path, revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    format, tensors, entries = read(path)
    reader = FORMATS[format].reader
    if reader is None:
        raise ValueError(f"{path} holds {FORMATS[format].what}: pass it as checkpoint= to go on with that fit")
    try:
        return from_tensors(lazy_import(*reader), tensors, entries)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
