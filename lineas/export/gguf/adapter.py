"""Slopes of maps as a LoRA adapter in GGUF, which llama.cpp loads beside a model and turns up and down.

As `lineas.export.lora` has it: where only matrices W read a mapped norm, W (w x) = W x + B A x, where the rows of A
pick the neurons with w != 1 and the columns of B are those of W times (w - 1). llama.cpp's adapters have no biases, so
that they cannot hold shifts.
"""

from __future__ import annotations

import warnings
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..._checks import as_flag
from ..._version import __version__
from ...maps.digest import digest
from ...maps.files import whole_or_nothing
from ...maps.metadata import as_strength
from ...maps.steering import SteeringMaps
from ..refusal import IN_FILE, Refusal, refuse
from .container import GGUFFile, check_output
from .families import Site
from .sites import check_maps, check_model, float32, matrices, sites, slopes_and_shifts, vector


class _Pair(NamedTuple):
    """The columns `chosen` [r] of the matrix `weight`, and what each is multiplied by, w - 1 [r]."""

    weight: str
    chosen: NDArray[np.intp]
    change: NDArray[np.float64]


def lora(
    maps: SteeringMaps,
    model: str | PathLike[str],
    output: str | PathLike[str],
    strength: float | str = 1.0,
    *,
    drop: bool = False,
) -> Path:
    """Write the slopes of sparse maps as a LoRA adapter for llama.cpp.

    ``llama-cli -m model.gguf --lora adapter.gguf`` applies it, and ``--lora-scaled adapter.gguf:0.5`` at half the
    strength; a server turns it while it runs. For maps of norms that only matrices read. The rank of each matrix is the
    number of neurons with a slope other than 1, so this is for sparse maps: a dense map makes an adapter larger than
    the model. Shifts need `fold`: llama.cpp's adapters have no biases.

    Parameters
    ----------
    model : str or PathLike
        The GGUF file of the model, which has the weights that the adapter is made of; it is not changed. The adapter is
        for this file, and as good as exact for others of the same model.
    output : str or PathLike
        The file to write, replaced if it is there, never `model` itself.
    strength : float or "calibrated", default 1.0
        The strength of the maps where the adapter is loaded with a scale of 1; "calibrated" is the one that
        `SteeringMaps.calibrate` noted.
    drop : bool, default False
        Leave out shifts, with a warning that says how much of the change they are.

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
        If a map is not of such a norm or has shifts and `drop` is False (all are named with the reason), the maps
        change nothing, or as `fold`. Nothing is written then.
    OSError
        If a file cannot be read or written.

    Warns
    -----
    UserWarning
        If shifts are dropped.
    """
    maps = check_maps(maps, "an adapter")
    strength = as_strength(strength, maps.metadata)
    drop = as_flag(drop, "drop")
    path = check_output(output, model)
    with GGUFFile(model) as file:
        _, blocks = check_model(file)
        pairs = _pairs(maps, file, blocks, strength, drop)
        if not pairs:
            raise ValueError("an adapter of these maps would change nothing: there is nothing to write")
        gguf = file.gguf
        with whole_or_nothing(path) as temporary:
            writer = gguf.GGUFWriter(temporary, file.metadata["general.architecture"])
            try:
                writer.add_type(gguf.GGUFType.ADAPTER)
                writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
                # llama.cpp multiplies by this over the rank of each matrix, which B makes up for.
                writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 1.0)
                writer.add_string("lineas.adapter.version", __version__)
                writer.add_float64("lineas.adapter.strength", strength)
                writer.add_string("lineas.adapter.maps", digest(maps))
                for pair in pairs:
                    rows, columns = file.tensors[pair.weight].shape
                    shapes = {"lora_a": (len(pair.chosen), columns), "lora_b": (rows, len(pair.chosen))}
                    for part, shape in shapes.items():
                        size = 4 * shape[0] * shape[1]
                        writer.add_tensor_info(f"{pair.weight}.{part}", shape, np.dtype(np.float32), size)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for pair in pairs:
                    for array in _parts(file, pair):
                        writer.write_tensor_data(array)
            finally:
                writer.close()
    return Path(path)


def _pairs(maps: SteeringMaps, file: GGUFFile, blocks: int, strength: float, drop: bool) -> list[_Pair]:
    """What the maps do to each matrix."""
    pairs: list[_Pair] = []
    refused: dict[str, str] = {}
    lost: dict[str, float] = {}
    for name, affine, found in sites(maps, file, blocks):
        weight, bias = slopes_and_shifts(affine, strength)
        try:
            if isinstance(found, Refusal):
                raise found
            if found.norm is None:
                raise Refusal("it is a matrix: an adapter holds maps of norms")
            readers = matrices(file, found, affine.d)
            if any(matrix == "token_embd.weight" for _, matrix in readers):
                raise Refusal("the output matrix that reads it is the embedding of the tokens as well")
            if (bias != 0).any():
                lost[name] = _share(file, found, weight, bias)
                if not drop:
                    raise Refusal(
                        f"its shift is not 0, and adapters of llama.cpp have no biases; drop=True leaves it out, "
                        f"{lost[name]:.1%} of the change"
                    )
            chosen = np.flatnonzero(weight != 1)
            if len(chosen):
                pairs += [_Pair(matrix, chosen, weight[chosen] - 1) for _, matrix in readers]
        except Refusal as error:
            refused[name] = str(error)
    refuse(refused, len(maps), "written as an adapter", IN_FILE)
    if lost:
        rows = "\n".join(f"  {name}: {share:.1%} of the change" for name, share in lost.items())
        warnings.warn(
            f"the adapter lacks the shifts of {len(lost)} of {len(maps)} maps (root mean squares, of activations of "
            f"the size that the gain gives):\n{rows}",
            UserWarning,
            stacklevel=3,
        )
    return pairs


def _share(file: GGUFFile, found: Site, weight: NDArray[np.float64], bias: NDArray[np.float64]) -> float:
    """The size of a shift, of that of the whole change, root mean square: a norm gives gain * n + bias, n of size 1."""
    gain = vector(file, f"{found.tensor}.weight", len(weight))
    own = f"{found.tensor}.bias"
    mean = vector(file, own, len(weight)) if own in file.tensors else np.zeros_like(gain)
    whole = (((weight - 1) * gain) ** 2 + ((weight - 1) * mean + bias) ** 2).sum()
    return float(np.sqrt((bias**2).sum() / whole)) if whole else 1.0


def _parts(file: GGUFFile, pair: _Pair) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A [r, columns] and B [rows, r] of a matrix."""
    rows, columns = file.tensors[pair.weight].shape
    a = np.zeros((len(pair.chosen), columns), np.float32)
    a[range(len(pair.chosen)), pair.chosen] = 1
    b = np.empty((rows, len(pair.chosen)), np.float32)
    at = 0
    for block in file.blocks(pair.weight):
        scaled = block[:, pair.chosen].astype(np.float64) * (pair.change * len(pair.chosen))
        b[at : at + len(block)] = float32(scaled, f"the adapter of {pair.weight!r} would not be finite in float32")
        at += len(block)
    return a, b
