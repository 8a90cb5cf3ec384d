"""Sparse maps of image models as LoRA files: sliders for diffusers and for what reads the files of kohya's scripts.

`lineas.export.low_rank` says what the maps add to which module. Everything is in the tensors, so that a LoRA that is
loaded at a scale of 1 is the maps at the strength that was asked for.
"""

import json
import os
import re
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._checks import as_choice, as_int
from .._version import __version__
from ..hooks.modules import check_model
from ..hooks.settings import optional
from ..inputs.call import unwrap
from ..maps.digest import digest
from ..maps.files import check_output, whole_or_nothing, with_sorted_header
from ..maps.gates import refuse_gates
from ..maps.metadata import as_strength
from ..maps.steering import SteeringMaps
from .low_rank import LowRank, low_rank_changes
from .readers import Readers, check_arguments, check_bias

LAYOUTS = ("diffusers", "kohya")
# An inverse multiplies by 1 / slope: beyond this it would blow up what rounding is in the activations.
_SMALLEST_SLOPE = 1e-3
_SUFFIX = ".safetensors"


def to_diffusers_lora(
    maps: SteeringMaps,
    model: nn.Module,
    path: str | os.PathLike[str],
    strength: float | str = 1.0,
    *,
    layout: str = "diffusers",
    inverse: str | os.PathLike[str] | None = None,
    max_rank: int | None = None,
    bias: bool | None = None,
    readers: Readers | None = None,
) -> Path:
    """Write the maps of a UNet or diffusion transformer as a LoRA file, a slider for image generators.

    ``pipeline.load_lora_weights(path)`` and ``model.load_lora_adapter(path, prefix=...)`` of diffusers load it, and
    then the model does what it does with the maps attached, at every scale from 0, which is off, to 1, which is
    `strength`. Maps of Linears and convolutions (Conv2d), of norms that only such read (those before attention and
    feed-forward), and of the adaptive norms of Flux and Stable Diffusion 3 are exact, up to rounding; others are
    refused. The rank of each module is the number of neurons that a map scales there, so that this is for sparse maps.

    A negative scale takes the change off, 2 z - T(z) at -1, which is the mirror of the maps and not their inverse.
    `inverse` writes a second file, which at a scale of 1 undoes what the first does at 1.

    Several files at scales s and t do what the maps ``s * a + t * b`` do, except where one maps a module and the other
    a norm that this module reads.

    Parameters
    ----------
    model : torch.nn.Module
        The UNet or transformer of a diffusers pipeline, ``pipeline.unet`` or ``pipeline.transformer``, without maps
        or a LoRA on it; it is not changed.
    path : str or PathLike
        The file to write, ending in .safetensors; replaced if it is there.
    strength : float or "calibrated", default 1.0
        The strength of the maps where the file is loaded with a scale of 1; "calibrated" is the one that
        `SteeringMaps.calibrate` noted.
    layout : "diffusers" or "kohya", default "diffusers"
        "kohya" names the tensors of a UNet as kohya's scripts do, which diffusers reads as well, and puts shifts
        under ``.diff_b``, which it does not.
    inverse : str or PathLike, optional
        Another file to write, as `path`, with the inverse of the maps at `strength`.
    max_rank : int, optional
        Refuse maps that need a higher rank. Default: any rank.
    bias : bool, optional
        False: refuse maps that need biases, which not every program reads. Default: biases where needed. They are
        needed for shifts, for maps of modules that have a bias themselves, and of the norms that Flux and Stable
        Diffusion 3 modulate.
    readers : dict[str, list[str]], optional
        By name of a norm that is not known, the names of all Linears and convolutions that read its output, where
        nothing else reads it. A wrong list gives a wrong file.

    Returns
    -------
    pathlib.Path
        `path`.

    Raises
    ------
    TypeError
        If an argument is of a wrong type.
    ValueError
        If `model` is not one that diffusers loads a LoRA into, `path` is a folder, in none, or has another suffix; if
        maps cannot be exact (all are named with the reason), need biases or a higher rank than is allowed, change
        nothing, have no inverse, have gates, or were fitted for some tokens only; if maps are attached, or a module is
        missing or has another width. Nothing is written then.
    OSError
        If a file cannot be written.

    Warns
    -----
    UserWarning
        If the metadata name another model than this one, as `attach`.
    """
    refuse_gates(maps, "to_diffusers_lora")
    check_model(model)
    strength = as_strength(strength, getattr(maps, "metadata", {}))
    as_choice(layout, "layout", LAYOUTS)
    max_rank = optional(as_int, max_rank, "max_rank", low=1)
    check_bias(bias)
    target = _check_path(path, "path")
    second = None if inverse is None else _check_path(inverse, "inverse")
    if second is not None and os.path.realpath(second) == os.path.realpath(target):
        raise ValueError(f"inverse must be another file than path, got {second!r} for both")
    prefix = _prefix(unwrap(model), layout)
    given = maps
    maps, model, readers = check_arguments(maps, model, readers, "a LoRA")

    def packed(maps: SteeringMaps, strength: float, facts: dict[str, str]) -> bytes:
        changes = low_rank_changes(maps, model, strength, readers)
        if not changes:
            raise ValueError("these maps change nothing: there is nothing to write")
        _check_ranks(changes, max_rank)
        return _packed(changes, prefix, layout, _with_biases(changes, bias), facts)

    about = {"lineas.version": __version__, "lineas.maps": digest(given), "lineas.strength": repr(strength)}
    files = {target: packed(maps, strength, about | _slider(target, "strength", "-1 to 1"))}
    if second is not None:
        files[second] = packed(_inverse(maps, strength), 1.0, about | _slider(second, "inverse", "0 to 1"))
    _write(files)
    return Path(path)


# --- arguments --------------------------------------------------------------------------------------------------------


def _check_path(value: str | os.PathLike[str], name: str) -> str:
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a string or a path, got {type(value).__name__}")
    path = os.fsdecode(value)
    check_output(path, name)
    if not path.endswith(_SUFFIX):
        raise ValueError(f"{name} must end in {_SUFFIX}, by which loaders know the file, got {path!r}")
    return path


def _prefix(model: nn.Module, layout: str) -> str:
    """What pipelines call the model."""
    kind = type(model).__name__
    if not hasattr(model, "load_lora_adapter"):
        raise ValueError(
            "model must be one that diffusers loads a LoRA into, such as pipeline.unet or pipeline.transformer, got "
            f"{kind}"
        )
    is_unet = kind.startswith("UNet")
    if layout == "kohya" and not is_unet:
        raise ValueError(f"layout='kohya' has names for UNets, got {kind}: use layout='diffusers'")
    return "unet" if is_unet else "transformer"


def _check_ranks(changes: dict[str, LowRank], highest: int | None) -> None:
    name = max(changes, key=lambda name: changes[name].rank)
    if highest is not None and changes[name].rank > highest:
        size = sum(4 * (change.down.numel() + change.up.numel()) for change in changes.values())
        raise ValueError(
            f"max_rank must be at least {changes[name].rank}, which {name!r} needs, got {highest}: fit sparser maps "
            f"(all {len(changes)} modules together take {size / 1e6:.3g} MB in float32)"
        )


def _with_biases(changes: dict[str, LowRank], bias: bool | None) -> bool:
    shifted = [name for name, change in changes.items() if (change.shift != 0).any()]
    if bias is False and shifted:
        raise ValueError(
            f"bias=False, but what the maps do to {len(shifted)} of {len(changes)} modules, such as {shifted[0]!r}, "
            "needs one: maps without shifts of norms that Linears read do not"
        )
    return bool(shifted) if bias is None else bias


def _inverse(maps: SteeringMaps, strength: float) -> SteeringMaps:
    for name, affine in maps.items():
        slopes = np.abs(affine.scaled(strength).weight.astype(np.float64))
        if slopes.min() < _SMALLEST_SLOPE:
            raise ValueError(
                f"inverse: the map of {name!r} has no inverse that could be used: at strength {strength:g} neuron "
                f"{slopes.argmin()} is multiplied by {slopes.min():.3g}, nearer to 0 than {_SMALLEST_SLOPE:g}"
            )
    return maps.scaled(strength).inverse()


# --- the files --------------------------------------------------------------------------------------------------------


def _slider(path: str, what: str, scales: str) -> dict[str, str]:
    return {
        "modelspec.title": Path(path).stem,
        "lineas.scale_1": what,
        "lineas.scales": scales,
    }


def _packed(changes: dict[str, LowRank], prefix: str, layout: str, bias: bool, facts: dict[str, str]) -> bytes:
    """A safetensors file."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for name, change in changes.items():
        dtype = change.up.dtype
        down, up = change.down, change.up
        if not change.rank:  # only a shift: no loader takes a rank of 0
            down, up = down.new_zeros(1, *down.shape[1:]), up.new_zeros(len(up), 1)
        up = up.view(*up.shape, *[1] * (down.ndim - 2))
        shift = change.shift.to(dtype)
        if layout == "kohya":
            key = f"lora_unet_{name.replace('.', '_')}"
            # Loaders multiply by alpha over the rank. It is one for all modules: diffusers mixes up different ones.
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up * len(down)}
            tensors[f"{key}.alpha"] = torch.ones((), dtype=dtype, device="cpu")
            if bias and (shift != 0).any():
                tensors[f"{key}.diff_b"] = shift
        else:
            key = f"{prefix}.{name}"
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
            if bias:  # for all or for none, as diffusers and PEFT have it
                tensors[f"{key}.lora_B.bias"] = shift
    header = {"format": "pt", **facts}
    if layout == "diffusers":
        header["lora_adapter_metadata"] = json.dumps(_settings(changes, prefix, bias), sort_keys=True)
    return with_sorted_header(save({name: part.contiguous() for name, part in tensors.items()}, header))


def _settings(changes: dict[str, LowRank], prefix: str, bias: bool) -> dict[str, Any]:
    """What diffusers makes a LoraConfig of: without it some of its versions scale modules of other ranks wrongly."""
    ranks = {name: max(1, change.rank) for name, change in changes.items()}
    usual = Counter(ranks.values()).most_common()[0][0]
    # With ^ a name is that of one module, not also the end of a longer one.
    others = {f"^{name}": rank for name, rank in ranks.items() if rank != usual}
    settings = {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        # One expression and not names, since a name in a list is the end of longer ones as well.
        "target_modules": "|".join(re.escape(name) for name in sorted(changes)),
        "lora_bias": bias,
    }
    return {f"{prefix}.{name}": value for name, value in settings.items()}


def _write(files: dict[str, bytes]) -> None:
    """All files or none, as far as an error comes before the last of them is complete on disk."""
    with ExitStack() as opened:
        for path, data in files.items():
            with open(opened.enter_context(whole_or_nothing(path)), "xb") as file:
                file.write(data)
