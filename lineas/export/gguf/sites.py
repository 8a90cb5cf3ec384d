"""Which tensors of a GGUF file a map is about, or why it is about none: what folds and adapters have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...maps.affine import AffineMap, at_strength
from ...maps.gates import refuse_gates
from ...maps.metadata import fitted_tokens, show_tokens
from ...maps.steering import SteeringMaps
from ..refusal import Refusal
from .container import GGUFFile
from .families import Architecture, Site, find, site

FOLDED = "lineas.folded."
"""What the names of the entries of a folded file begin with."""
_FLOATS = ("F32", "F16", "BF16")


def check_maps(maps: Any, use: str) -> SteeringMaps:
    """`maps` if they act on all tokens alike; TypeError or ValueError, which says `use`, where they do not."""
    if not isinstance(maps, SteeringMaps):
        raise TypeError(f"maps must be SteeringMaps, got {type(maps).__name__}")
    refuse_gates(maps, use)
    try:
        tokens = fitted_tokens(maps.metadata)
    except ValueError as error:  # several selections, or one that no file can hold: not all tokens either
        raise ValueError(f"{use} acts on all tokens alike: {error}") from None
    if tokens != "all":
        raise ValueError(
            f"these maps were fitted for {show_tokens(tokens)}, and {use} acts on all tokens alike: use "
            "maps.attach(model), or lineas.SteeringMaps(dict(maps)) for all tokens all the same"
        )
    return maps


def check_model(file: GGUFFile) -> tuple[Architecture, int]:
    """The family of the model in a file and its number of blocks; ValueError where it is no whole, unfolded model."""
    metadata = file.metadata
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ValueError(f"{file.path}: general.architecture must be a text, got {name!r}")
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"{file.path} holds no model: its general.type is {kind!r}")
    shards = metadata.get("split.count", 1)
    if shards != 1:
        raise ValueError(
            f"{file.path} is one of {shards} shards, and each has a part of the tensors: join them with "
            "llama-gguf-split --merge"
        )
    if any(key.startswith(FOLDED) for key in file.keys):
        raise ValueError(
            f"{file.path} has maps folded in (strength {metadata.get(FOLDED + 'strength')!r}, maps "
            f"{str(metadata.get(FOLDED + 'maps'))[:12]}): the slopes of others would not reach the shifts that are in "
            "its biases. Fold second @ first, which applies first and then second, into the file without maps"
        )
    try:
        family = find(name)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    blocks = metadata.get(f"{name}.block_count")
    if not isinstance(blocks, int):
        raise ValueError(f"{file.path}: {name}.block_count must be a whole number, got {blocks!r}")
    return family, blocks


def sites(maps: SteeringMaps, file: GGUFFile, blocks: int) -> Iterator[tuple[str, AffineMap, Site | Refusal]]:
    """Each map that is not the identity, and where its module is in the file, or why it is nowhere."""
    architecture = file.metadata["general.architecture"]
    seen: dict[str, str] = {}
    for name, affine in maps.items():
        if not affine.support:
            continue
        try:
            found = _site(name, affine, file, architecture, blocks)
            first = seen.setdefault(found.tensor, name)
            if first != name:
                raise Refusal(f"the map of {first!r} is for the same tensor {found.tensor!r}: compose them first")
        except ValueError as error:
            yield name, affine, Refusal(str(error))
        else:
            yield name, affine, found


def _site(name: str, affine: AffineMap, file: GGUFFile, architecture: str, blocks: int) -> Site:
    found = site(name, architecture)
    if found.block is not None and found.block >= blocks:
        raise Refusal(f"the file has {blocks} blocks, the last of which is {blocks - 1}")
    weight = f"{found.tensor}.weight"
    if weight not in file.tensors:
        raise Refusal(f"the file has no tensor {weight!r}")
    shape = file.tensors[weight].shape  # of a matrix the rows count, the first axis
    if shape[:1] != (affine.d,):
        raise Refusal(f"the map is for {affine.d} neurons, {weight!r} has the shape {list(shape)}")
    return found


def slopes_and_shifts(affine: AffineMap, strength: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What a map does at a strength, in float64."""
    return at_strength(affine.weight.astype(np.float64), affine.bias.astype(np.float64), strength)


def vector(file: GGUFFile, name: str, length: int) -> NDArray[np.float64]:
    """A gain or a bias of a file; Refusal where it is quantised, of another length or not finite."""
    tensor = file.tensors[name]
    if tensor.type.name not in _FLOATS:
        raise Refusal(f"{name!r} is {tensor.type.name}, no float32")
    if tensor.shape != (length,):
        raise Refusal(f"{name!r} has the shape {list(tensor.shape)}, not [{length}]")
    found = file.vector(name)
    if not np.isfinite(found).all():
        raise Refusal(f"{name!r} is not finite")
    return found


def float32(x: NDArray[np.float64], problem: str) -> NDArray[np.float32]:
    """`x` rounded; a ValueError that says `problem` where it is not finite then."""
    with np.errstate(over="ignore"):
        rounded = x.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise ValueError(problem)
    return rounded


def matrices(file: GGUFFile, found: Site, width: int) -> list[tuple[str, str]]:
    """The matrices [rows, width] that alone read the output of a norm: names without ".weight", and of the weights.

    Both differ where the output matrix is the embedding as well. Refusal where something else reads it.
    """
    readers = () if found.norm is None else found.norm.readers
    experts = found.beside("ffn_gate_inp")
    if "ffn_gate" in readers and f"{experts}.weight" in file.tensors:
        readers = ()
        what = "a router and experts read its output"
    else:
        what = "no matrices alone read its output"
    if not readers:
        raise Refusal(what)
    if found.beside("attn_q") + ".weight" not in file.tensors and found.beside("attn_qkv") + ".weight" in file.tensors:
        readers = tuple(dict.fromkeys("attn_qkv" if one in ("attn_q", "attn_k", "attn_v") else one for one in readers))
    names = []
    for reader in map(found.beside, readers):
        weight = f"{reader}.weight"
        if reader == "output" and weight not in file.tensors:
            weight = "token_embd.weight"  # tied
        if weight not in file.tensors:
            raise Refusal(f"the file has no tensor {weight!r}, which should read its output")
        shape = file.tensors[weight].shape
        if len(shape) != 2 or shape[1] != width:
            raise Refusal(f"{weight!r} has the shape {list(shape)}: it does not read {width} neurons")
        if f"{reader}.scale" in file.tensors:
            raise Refusal(f"the output of {weight!r} is multiplied by {reader + '.scale'!r}")
        names.append((reader, weight))
    return names
