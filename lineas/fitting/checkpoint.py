"""Files in which a fit keeps what it needs to go on: safetensors for the arrays, JSON in the header for the rest.

A file is written as a whole or not at all: whenever the process dies, the one before it is there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..maps.files import write_atomically

FORMAT = "lineas checkpoint"
VERSION = 1


def save(path: str | PathLike[str], tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint.

    Raises
    ------
    OSError
        If it cannot be written; the one that was there before is untouched. The message says so.
    """
    from safetensors.torch import save as to_bytes

    # Clones: safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state)
    header = {"format": FORMAT, "version": str(VERSION), "state": text, "digest": digest(copies, text)}
    data = to_bytes(copies, header)
    try:
        write_atomically(os.fspath(path), data)
    except OSError as error:
        kept = "the last checkpoint is untouched" if os.path.exists(path) else "there is no checkpoint yet"
        raise OSError(error.errno, f"cannot write the checkpoint ({error.strerror}; {kept})", os.fspath(path)) from None


def load(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint: its arrays and its state.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is no checkpoint of a fit, from a later version, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = os.fspath(path)
    with open(path, "rb"):
        pass  # for the operating system's own exact error
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                seen = header.get("format")
                raise ValueError(f"resume: {path} is not the checkpoint of a fit: its format is {seen!r}")
            if header.get("version") != str(VERSION):
                raise ValueError(
                    f"resume: {path} is of version {header.get('version')}, this lineas reads version {VERSION}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            if digest(tensors, header["state"]) != header["digest"]:
                raise ValueError(f"resume: {path} is damaged: its content is not what was written")
            return tensors, json.loads(header["state"])
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"resume: {path} is damaged: {error}") from None


def digest(*values: Any) -> str:
    """A digest of everything in the values that is an array, a number or text, in any nesting of lists and mappings."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, np.ndarray):
            found.update(f"{value.dtype}{value.shape}".encode())
            found.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, Mapping):
            add([entry for key in sorted(value, key=str) for entry in (str(key), value[key])])
        elif isinstance(value, list | tuple):
            found.update(f"[{len(value)}]".encode())
            for entry in value:
                add(entry)
        elif value is None or isinstance(value, str | bytes | int | float):
            found.update(repr(value).encode())

    add(values)
    return found.hexdigest()
