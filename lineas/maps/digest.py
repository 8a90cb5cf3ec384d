"""What tells maps apart by their numbers alone."""

from __future__ import annotations

import hashlib

from .steering import SteeringMaps


def digest(maps: SteeringMaps) -> str:
    """SHA-256 of modules, slopes and shifts, in hexadecimal; gates are no part of it.

    It is the same for equal maps, whatever their dtypes and metadata. A folded GGUF file has it as
    ``lineas.folded.maps``, which tells the maps that are in it.
    """
    found = hashlib.sha256()
    for name, affine in maps.items():
        found.update(f"{len(name.encode())} {affine.d} ".encode() + name.encode())
        for part in (affine.weight, affine.bias):
            found.update((part.astype("<f8") + 0.0).tobytes())  # -0.0 equals 0.0
    return found.hexdigest()
