"""Fold a map into the parameters of the very module whose output it changes.

Whatever reads the output sees the same change as from a hook, so nothing need be known about the rest of the model;
what has to be certain is that output = gain * (something without the gain) + bias.
"""

import copy
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .parameter_changes import ParameterChanges
from .readers import is_conv1d, is_from
from .refusal import Refusal

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_AFFINE = (nn.LayerNorm, nn.GroupNorm, *_BATCH_NORMS, *_INSTANCE_NORMS)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# The Linear that modulates a norm, how many slices of equal size its output has, which of them are shift and scale, and
# whether a map comes before the modulation.
Modulation: TypeAlias = tuple[str, int, int, int, bool]
# Adaptive norms of diffusers (0.42.1): norm(x) * (1 + scale) + shift, where scale and shift are slices of the output of
# their Linear. By class: number of slices, and which are shift and scale.
_ADAPTIVE = {
    "AdaLayerNormZero": (6, 0, 1),
    "AdaLayerNormZeroSingle": (3, 0, 1),
    "AdaLayerNormContinuous": (2, 1, 0),
    "SD35AdaLayerNormZeroX": (9, 0, 1),  # of the first of its two normed outputs, which is what a map is of
}
# Norms without parameters whose output is modulated by the Linear of a neighbour in `_ADAPTIVE`: the neighbour, and
# which slices are shift and scale.
_MLP_NORMS = {"norm2": ("norm1", 3, 4), "norm2_context": ("norm1_context", 3, 4)}
_MODULATED = {"FluxTransformerBlock": _MLP_NORMS, "JointTransformerBlock": _MLP_NORMS}


def fold_into_module(changes: ParameterChanges, name: str, weight: Tensor, bias: Tensor) -> Tensor:
    """Put a map [d], in float64 on the CPU, into the module `name` whose output it changes.

    Returns the shift [d] that found no bias in the module: zero, or all of it. Refusal when the module has no
    parameters of which the output is known to be a multiple.
    """
    module = changes.model.get_submodule(name)
    modulation = find_modulation(changes.model, name)
    is_linear = type(module) in (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED) or is_conv1d(module)
    if modulation is not None and not changes.has(name, "weight"):
        _fold_into_modulation(changes, modulation, weight, bias)
        return torch.zeros_like(bias)
    if is_linear and (weight != 1).any():
        _scale_rows(changes, name, weight)
    elif not is_linear and ((weight != 1).any() or changes.has(name, "bias")):
        _scale_gain(changes, name, weight)
    if changes.has(name, "bias"):
        changes.write(name, "bias", changes.vector(name, "bias") * weight + bias)
    elif not is_linear:
        return bias
    elif (bias != 0).any():
        changes.read(name, "weight")  # a Refusal where a bias beside it could not be added
        changes.add_to_bias(name, bias, wanted_by=name)
    return torch.zeros_like(bias)


# --- norms ------------------------------------------------------------------------------------------------------------


def _scale_gain(changes: ParameterChanges, name: str, weight: Tensor) -> None:
    module = changes.model.get_submodule(name)
    if not changes.has(name, "weight"):
        raise Refusal(f"{type(module).__name__} has no gain of its own that could hold the map")
    gain = changes.vector(name, "weight")
    plus = 0.0 if type(module) in _AFFINE else _offset_of_gain(module)
    changes.write(name, "weight", (gain + plus) * weight - plus)


def _offset_of_gain(module: nn.Module) -> float:
    """0 where the output is weight * (...) + bias, 1 where it is (1 + weight) * (...), as in Gemma; found by trying.

    Refusal when it is neither.
    """
    kind = type(module).__name__
    surplus = [name for name, _ in module.named_parameters() if name not in ("weight", "bias")]
    gain = module._parameters.get("weight")
    if surplus or gain is None or gain.ndim != 1:
        raise Refusal(f"{kind} is no module whose output is known to be a multiple of its weight")
    trial = copy.deepcopy(module).float().eval()
    trial._forward_hooks.clear()
    trial._forward_pre_hooks.clear()
    generator = torch.Generator().manual_seed(0)
    there: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    x = torch.randn(2, 3, gain.numel(), **there).to(gain.device)
    one, two, shift = (torch.rand(gain.numel(), **there).to(gain.device) + 0.5 for _ in range(3))

    def run(weight: Tensor, bias: Tensor) -> Tensor:
        with torch.no_grad():
            trial.weight.copy_(weight)  # type: ignore[operator]
            if trial._parameters.get("bias") is not None:
                trial.bias.copy_(bias)  # type: ignore[operator]
            return trial(x)

    try:
        first, second, shifted = run(one, 0 * shift), run(two, 0 * shift), run(one, shift)
        moved = shifted - first - (shift if trial._parameters.get("bias") is not None else 0)
        if first.shape == x.shape and _same(moved, 0 * moved):
            for plus in (0.0, 1.0):
                if _same(first * (two + plus), second * (one + plus)):
                    return plus
    except Exception as error:  # any class of any library is tried here
        raise Refusal(f"{kind} could not be tried out by itself: {type(error).__name__}: {error}") from None
    raise Refusal(f"the output of {kind} is not weight * (...), nor (1 + weight) * (...), plus its bias")


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# --- Linears and convolutions -----------------------------------------------------------------------------------------


def _scale_rows(changes: ParameterChanges, name: str, weight: Tensor) -> None:
    module = changes.model.get_submodule(name)
    if type(module) not in _TRANSPOSED:
        axis = 1 if is_conv1d(module) else 0
        changes.map_rows(name, lambda rows: rows * weight.to(rows.device)[:, None], axis)
        return
    groups = int(module.groups)  # type: ignore[arg-type]

    def change(rows: Tensor) -> Tensor:  # [in, out / groups * positions], input channels of a group side by side
        per_group = weight.to(rows.device).view(groups, 1, -1, 1)
        return (rows.view(groups, len(rows) // groups, per_group.shape[2], -1) * per_group).view(rows.shape)

    changes.map_rows(name, change)


# --- adaptive norms ---------------------------------------------------------------------------------------------------


def find_modulation(model: nn.Module, name: str) -> Modulation | None:
    """What modulates the output of a module of diffusers, as far as it is known."""
    own = _adaptive(model.get_submodule(name))
    if own is not None:
        return f"{name}.linear", *own, False
    parent, _, last = name.rpartition(".")
    layer = model.get_submodule(parent)
    found = _MODULATED.get(type(layer).__name__, {}).get(last) if is_from(layer, "diffusers.models") else None
    if found is None:
        return None
    neighbour, shift, scale = found
    slices = _adaptive(layer.get_submodule(neighbour))
    return None if slices is None else (f"{parent}.{neighbour}.linear", slices[0], shift, scale, True)


def _adaptive(module: nn.Module) -> tuple[int, int, int] | None:
    return _ADAPTIVE.get(type(module).__name__) if is_from(module, "diffusers.models.normalization") else None


def _fold_into_modulation(changes: ParameterChanges, modulation: Modulation, weight: Tensor, bias: Tensor) -> None:
    """Map what becomes of a norm n: w (n (1 + s) + t) + b, or (w n + b) (1 + s) + t where the map comes before."""
    linear, count, shift, scale, before = modulation
    if type(changes.model.get_submodule(linear)) is not nn.Linear or not changes.has(linear, "bias"):
        raise Refusal(f"the modulation {linear!r} is no Linear with a bias")
    found = changes.read(linear, "weight").shape[0]
    if found != count * len(weight):
        raise Refusal(f"the modulation {linear!r} gives {found} numbers, not {count * len(weight)}")

    def change(rows: Tensor, one: int = 0) -> Tensor:
        """New rows of the weight or, with 1 for `one`, the new bias, in which alone there is the 1 of 1 + s."""
        slices = rows.view(count, len(weight), -1).clone()
        w, b = (part.to(rows.device)[:, None] for part in (weight, bias))
        if before:
            slices[shift] += b * (slices[scale] + one)
        else:
            slices[shift] = w * slices[shift] + b * one
        slices[scale] = w * slices[scale] + (w - 1) * one  # as w (1 + s) - 1, but exact where w is 1
        return slices.view(rows.shape)

    changes.map_rows(linear, change)
    changes.write(linear, "bias", change(changes.vector(linear, "bias"), one=1))
