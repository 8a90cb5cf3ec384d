"""GGUF control vectors: what llama.cpp's --control-vector adds to the residual stream after a block.

A file holds tensors ``direction.N``, float32 [width], for blocks N from 1 on: llama.cpp has none for block 0
(``common_control_vector_load`` and ``llama_adapter_cvec`` of October 2026).
"""

from __future__ import annotations

import re
import warnings
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..._checks import as_flag
from ...maps.files import whole_or_nothing
from ...maps.metadata import as_strength
from ...maps.steering import SteeringMaps
from ...maps.vectors import from_vector
from .container import GGUFFile, check_output, library
from .sites import check_maps, float32, slopes_and_shifts

_ARCHITECTURE = "controlvector"
# Blocks of language models in transformers, not those of their towers for images and sounds; and norms whose output is
# what a block adds at its end (Gemma 2, Gemma 3, OLMo 2).
_BLOCK = re.compile(
    r"(?:(?:model\.)?(?:language_model\.)?(?:model\.)?layers|transformer\.(?:h|blocks)|gpt_neox\.layers|"
    r"model\.decoder\.layers|backbone\.layers)\.(\d+)(\.post_feedforward_layernorm)?"
)


class _Part(NamedTuple):
    """A map as far as it can be added after a block, and what of it cannot: a text, or None."""

    block: int | None
    shift: NDArray[np.float64]
    lost: str | None


def control_vector(
    maps: SteeringMaps,
    output: str | PathLike[str],
    strength: float | str = 1.0,
    *,
    drop: bool = False,
    model_hint: str | None = None,
) -> Path:
    """Write the shifts of maps at the outputs of blocks as a GGUF control vector.

    llama.cpp adds it to the residual stream: ``llama-cli -m model.gguf --control-vector vector.gguf``, or
    ``--control-vector-scaled vector.gguf:0.5`` at half the strength. It does the same as the maps where these are of
    outputs of blocks ("model.layers.12") or of the last norm of a block whose output is added there
    ("model.layers.12.post_feedforward_layernorm" of Gemma 2, Gemma 3 and OLMo 2), have slopes of 1, and are not of
    block 0, for which llama.cpp has no vector. Maps of `SteeringMaps.from_vector` and fits with ``slopes=False`` are
    such; `fold` puts others into the weights.

    Parameters
    ----------
    output : str or PathLike
        The file to write, replaced if it is there.
    strength : float or "calibrated", default 1.0
        What the shifts are multiplied by; "calibrated" is the strength that `SteeringMaps.calibrate` noted.
    drop : bool, default False
        Leave out what a control vector cannot hold, with a warning that says what and how much it is.
    model_hint : str, optional
        A name of the model for the file, which llama.cpp does not read. Default: the model that the metadata name.

    Returns
    -------
    pathlib.Path
        `output`.

    Raises
    ------
    ImportError
        If the package ``gguf`` is not installed (``pip install "lineas[gguf]"``).
    TypeError
        If an argument is of a wrong type.
    ValueError
        If a control vector cannot hold all of the maps and `drop` is False, each of which is named with what would be
        lost; nothing would be left, the maps have several widths, gates, or are for some tokens only.
    OSError
        If the file cannot be written.

    Warns
    -----
    UserWarning
        If something is dropped.
    """
    maps = check_maps(maps, "a control vector")
    strength = as_strength(strength, maps.metadata)
    drop = as_flag(drop, "drop")
    if model_hint is not None and not isinstance(model_hint, str):
        raise TypeError(f"model_hint must be a str, got {type(model_hint).__name__}")
    parts = {name: _part(name, *slopes_and_shifts(affine, strength)) for name, affine in maps.items() if affine.support}
    _report(parts, len(maps), drop)
    directions: dict[int, NDArray[np.float64]] = {}
    for name, part in parts.items():
        if part.block is not None and (part.shift != 0).any():
            before = directions.get(part.block, np.zeros_like(part.shift))
            if any(len(one) != len(part.shift) for one in [*directions.values(), before]):
                width = len(next(iter(directions.values())))
                raise ValueError(f"a control vector has one width: maps before have {width} neurons, {name!r} another")
            directions[part.block] = before + part.shift
    if not directions:
        raise ValueError("a control vector of these maps would change nothing: there is nothing to write")
    path = check_output(output)
    named = maps.metadata.get("model")
    hint = model_hint if model_hint is not None else named if isinstance(named, str) else ""
    gguf = library()
    with whole_or_nothing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURE)
        try:
            writer.add_string(f"{_ARCHITECTURE}.model_hint", hint)
            writer.add_int32(f"{_ARCHITECTURE}.layer_count", len(directions))
            for block, shift in sorted(directions.items()):
                problem = f"the shift after block {block} would not be finite in float32"
                writer.add_tensor(f"direction.{block}", float32(shift, problem))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return Path(path)


def _part(name: str, weight: NDArray[np.float64], bias: NDArray[np.float64]) -> _Part:
    found = _BLOCK.fullmatch(name)
    slopes = float(np.sqrt(np.mean((weight - 1) ** 2)))
    if found is None:
        return _Part(None, bias, f"{_changes(slopes, bias)}: it is no output of a block")
    if found[1] == "0":
        return _Part(None, bias, f"{_changes(slopes, bias)}: llama.cpp has no vector for block 0")
    lost = f"its slopes, which change an activation by {slopes:.3g} of itself" if slopes else None
    return _Part(int(found[1]), bias, lost)


def _changes(slopes: float, bias: NDArray[np.float64]) -> str:
    changed = [f"slopes, which change an activation by {slopes:.3g} of itself"] if slopes else []
    if (bias != 0).any():
        changed.append("shifts")
    return "all of it (" + " and ".join(changed) + ")"


def _report(parts: dict[str, _Part], total: int, drop: bool) -> None:
    """An error about what a control vector cannot hold, or a warning where it is to be dropped."""
    lost = {name: part.lost for name, part in parts.items() if part.lost is not None}
    if not lost:
        return
    every = np.sqrt(sum(float(part.shift @ part.shift) for part in parts.values()))
    dropped = np.sqrt(sum(float(part.shift @ part.shift) for part in parts.values() if part.block is None))
    share = f", with {dropped / every:.1%} of the length of all shifts" if dropped else ""
    rows = "\n".join(f"  {name}: {what}" for name, what in lost.items())
    if not drop:
        raise ValueError(
            f"{len(lost)} of {total} maps do not fit into a control vector, and nothing was written; drop=True leaves "
            f"out what does not (root mean squares over neurons{share}):\n{rows}"
        )
    warnings.warn(
        f"the control vector lacks what it cannot hold of {len(lost)} of {total} maps (root mean squares over neurons"
        f"{share}):\n{rows}",
        UserWarning,
        stacklevel=3,
    )


def read_control_vector(path: str | PathLike[str], layers: str = "model.layers.{}") -> SteeringMaps:
    """Read a GGUF control vector as maps that add it to the outputs of blocks.

    Parameters
    ----------
    path : str or PathLike
        A file of `control_vector`, of llama.cpp's ``llama-cvector-generator`` or of repeng.
    layers : str, default "model.layers.{}"
        How the model calls its blocks, with {} for the number.

    Returns
    -------
    SteeringMaps
        float32, as `SteeringMaps.from_vector` makes them.

    Raises
    ------
    ImportError
        If the package ``gguf`` is not installed (``pip install "lineas[gguf]"``).
    TypeError
        If `layers` is no string.
    ValueError
        If it is not a sound GGUF file of a control vector, or `layers` does not have one {}.
    OSError
        If the file cannot be read.
    """
    if not isinstance(layers, str):
        raise TypeError(f"layers must be a str, got {type(layers).__name__}")
    if layers.count("{}") != 1:
        raise ValueError(f"layers must have one {{}} for the number of the block, got {layers!r}")
    found: dict[int, NDArray[np.float32]] = {}
    with GGUFFile(path) as file:
        kind = file.metadata.get("general.architecture")
        if kind != _ARCHITECTURE:
            raise ValueError(f"{file.path} holds no control vector: its general.architecture is {kind!r}")
        for name, tensor in file.tensors.items():
            number = re.fullmatch(r"direction\.([1-9]\d*)", name)
            if number is None or tensor.type.name != "F32" or len(tensor.shape) != 1:
                raise ValueError(f"{file.path}: {name!r} is no direction of a block from 1 on, float32 [width]")
            found[int(number[1])] = file.vector(name).astype(np.float32)
    if not found:
        raise ValueError(f"{file.path} has no directions")
    vectors = {layers.replace("{}", str(block)): vector for block, vector in sorted(found.items())}
    return from_vector(vectors)
