"""Maps into the tensors of a GGUF file: llama.cpp and what is built on it then steer without lineas."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..._checks import as_flag
from ..._version import __version__
from ...maps.digest import digest
from ...maps.metadata import as_strength
from ...maps.steering import SteeringMaps
from ..refusal import IN_FILE, Refusal, refuse
from .container import GGUFFile, check_output, write_copy
from .families import Architecture, Site
from .sites import FOLDED, check_maps, check_model, float32, matrices, sites, slopes_and_shifts, vector


def fold(
    maps: SteeringMaps,
    model: str | PathLike[str],
    output: str | PathLike[str],
    strength: float | str = 1.0,
    *,
    progress: bool = True,
) -> Path:
    """Write a GGUF file in which the maps are folded: llama.cpp then steers with it, without lineas.

    No quantised tensor is touched. The slopes of a norm go into its gain, which GGUF files hold in float32. Its shift b
    goes into its bias where it has one, as LayerNorm does, and otherwise into those of the matrices that read it, as
    W @ b with the decoded weights W: tensors that are new where the model has no such biases. The shift of a matrix's
    output goes into its own bias. Everything is computed in float64 and rounded once. The rest of the file is copied as
    it is, metadata included, and entries are added that say what was done: ``lineas.folded.version``,
    ``lineas.folded.strength``, ``lineas.folded.maps`` (what `lineas.export.gguf.digest` gives) and
    ``lineas.folded.modules``.

    What a family has a place for is in docs/gguf.md. A runtime without a place for one of the biases refuses to load
    the file.

    Parameters
    ----------
    model : str or PathLike
        The GGUF file of the model, quantised or not, of one of `lineas.export.gguf.architectures`.
    output : str or PathLike
        The file to write, never `model` itself. It is replaced if it is there, once the new one is complete on disk; a
        fold that fails or is interrupted leaves no trace.
    strength : float or "calibrated", default 1.0
        The strength for good; 1 is the maps, "calibrated" the one that `SteeringMaps.calibrate` noted.
    progress : bool, default True
        Show a progress bar where copying takes more than a second.

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
        If `model` is not a sound GGUF file, one of several shards, of an unknown architecture, or has maps folded in
        already; `output` is the same file; the maps have gates or are for some tokens only; or some of them cannot be
        folded exactly, all of which are named with the reason.
    OSError
        If a file cannot be read or written.
    """
    maps = check_maps(maps, "a fold")
    strength = as_strength(strength, maps.metadata)
    progress = as_flag(progress, "progress")
    path = check_output(output, model)
    with GGUFFile(model) as file:
        family, blocks = check_model(file)
        values = _values(maps, file, family, blocks, strength)
        entries: dict[str, str | int | float | Sequence[str]] = {
            f"{FOLDED}version": __version__,
            f"{FOLDED}strength": strength,
            f"{FOLDED}maps": digest(maps),
            f"{FOLDED}modules": list(maps),
        }
        write_copy(file, path, values, entries, progress=progress)
    return Path(path)


def _values(
    maps: SteeringMaps, file: GGUFFile, family: Architecture, blocks: int, strength: float
) -> dict[str, NDArray[np.float32]]:
    """All tensors that change or are new, by name."""
    values: dict[str, NDArray[np.float64]] = {}
    # What to add to the biases of matrices, by their names without ".bias": the shifts of a norm that they read, by the
    # name of the weight, and shifts of their own.
    inputs: dict[str, list[tuple[str, NDArray[np.float64]]]] = defaultdict(list)
    outputs: dict[str, NDArray[np.float64]] = {}
    wanted: dict[str, list[str]] = defaultdict(list)  # modules by the bias that they need
    refused: dict[str, str] = {}
    for name, affine, found in sites(maps, file, blocks):
        weight, bias = slopes_and_shifts(affine, strength)
        try:
            if isinstance(found, Refusal):
                raise found
            if found.norm is None:
                _check_matrix(file, found, weight)
                if (bias != 0).any():
                    _check_bias(file, family, found.tensor)
                    outputs[found.tensor] = bias
                    wanted[found.tensor].append(name)
                continue
            left = _scale(values, file, found, weight, bias)
            if (left != 0).any():
                for reader, matrix in _readers(file, family, found, affine.d):
                    inputs[reader].append((matrix, left))
                    wanted[reader].append(name)
        except Refusal as error:
            refused[name] = str(error)
    refuse(refused, len(maps), "folded", IN_FILE)
    for matrix in dict.fromkeys([*inputs, *outputs]):
        try:
            values[f"{matrix}.bias"] = _bias(file, matrix, inputs[matrix], outputs.get(matrix))
        except ValueError as error:
            refused |= dict.fromkeys(wanted[matrix], str(error))
    refuse(refused, len(maps), "folded", IN_FILE)
    return {
        name: float32(x, f"{name!r} would not be finite in float32, and nothing was written")
        for name, x in values.items()
    }


def _scale(
    values: dict[str, NDArray[np.float64]],
    file: GGUFFile,
    found: Site,
    weight: NDArray[np.float64],
    bias: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Scale gain and bias of a norm; returns the shift that found no bias there: none, or all of it."""
    gain, own = f"{found.tensor}.weight", f"{found.tensor}.bias"
    gains = vector(file, gain, len(weight))
    if (weight != 1).any():
        values[gain] = gains * weight
    if own not in file.tensors:
        return bias
    values[own] = vector(file, own, len(weight)) * weight + bias
    return np.zeros_like(bias)


def _readers(file: GGUFFile, family: Architecture, found: Site, width: int) -> list[tuple[str, str]]:
    """The matrices whose biases can hold the shift of a norm without one of its own; Refusal where there are none."""
    assert found.norm is not None
    begin = f"its shift is not 0, {found.tensor!r} has no bias"
    if found.norm.adds_to == "middle":
        raise Refusal(f"{begin}, and its output is added to the residual stream between attention and MLP")
    if found.norm.adds_to == "block":
        raise Refusal(
            f"{begin}, and its output is added to the residual stream at the end of the block; a control vector adds "
            "there: lineas.export.gguf.control_vector writes one of maps with shifts alone"
        )
    try:
        readers = matrices(file, found, width)
        for reader, _ in readers:
            _check_bias(file, family, reader)
    except Refusal as error:
        raise Refusal(f"{begin}, and {error}") from None
    return readers


def _check_bias(file: GGUFFile, family: Architecture, matrix: str) -> None:
    """Refusal where a file may not have a bias of a matrix."""
    short = matrix.rpartition(".")[2]
    if f"{matrix}.bias" in file.tensors:
        return
    if short not in family.biases:
        kind = file.metadata["general.architecture"]
        raise Refusal(f"llama.cpp takes no bias of {matrix!r} in a {kind}")
    parts = [matrix.replace("attn_qkv", f"attn_{one}") + ".bias" for one in "qkv"] if short == "attn_qkv" else []
    there = [part for part in parts if part in file.tensors]
    if there:
        raise Refusal(f"{matrix!r} is one matrix, and its biases are several: {there[0]!r} and others")


def _check_matrix(file: GGUFFile, found: Site, weight: NDArray[np.float64]) -> None:
    tensor = f"{found.tensor}.weight"
    if len(file.tensors[tensor].shape) != 2:
        raise Refusal(f"{tensor!r} is no matrix")
    if (weight != 1).any():
        raise Refusal(f"its slopes are not 1, and would scale the rows of {tensor!r}: a fold leaves matrices alone")
    if f"{found.tensor}.scale" in file.tensors:
        raise Refusal(f"the output of {tensor!r} is multiplied by {found.tensor + '.scale'!r}")


def _bias(
    file: GGUFFile,
    matrix: str,
    inputs: list[tuple[str, NDArray[np.float64]]],
    own: NDArray[np.float64] | None,
) -> NDArray[np.float64]:
    """The bias of a matrix: what it was, W @ b for each shift b of its input, and a shift of its output."""
    rows = file.tensors[inputs[0][0] if inputs else f"{matrix}.weight"].shape[0]
    bias = vector(file, f"{matrix}.bias", rows) if f"{matrix}.bias" in file.tensors else np.zeros(rows)
    for weight, shift in inputs:
        bias += np.concatenate([block.astype(np.float64) @ shift for block in file.blocks(weight)])
    return bias if own is None else bias + own
