"""Fold a map into the parameters of the very module whose output it changes.

Whatever reads the output sees the same change as from a hook, so nothing need be known about the rest of the model;
what has to be certain is that output = gain * (something without the gain) + bias.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .parameter_changes import ParameterChanges
from .readers import Refusal, is_conv1d, is_from

_AFFINE = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Adaptive norms of diffusers (0.42.1): norm(x) * (1 + scale) + shift, where scale and shift are slices of the output of
# their Linear. By class: number of slices, and which are shift and scale.
_ADAPTIVE = {"AdaLayerNormZero": (6, 0, 1), "AdaLayerNormZeroSingle": (3, 0, 1), "AdaLayerNormContinuous": (2, 1, 0)}
# Norms without parameters whose output is modulated by a Linear of a neighbour: the Linear and the same three numbers.
_MODULATED = {
    "FluxTransformerBlock": {"norm2": ("norm1.linear", 6, 3, 4), "norm2_context": ("norm1_context.linear", 6, 3, 4)}
}


def fold_into_module(changes: ParameterChanges, name: str, weight: Tensor, bias: Tensor) -> Tensor:
    """Put a map into module `name` and return the shift that is left over: zero, or all of it.

    Parameters
    ----------
    changes : ParameterChanges
    name : str
        The module whose output the map changes.
    weight, bias : Tensor [d]
        float64, on the CPU.

    Returns
    -------
    Tensor [d]
        The shift that found no bias in the module.

    Raises
    ------
    Refusal
        When the module has no parameters of which the output is known to be a multiple.
    """
    module = changes.model.get_submodule(name)
    if type(module) is nn.Linear or is_conv1d(module) or type(module) in _CONVOLUTIONS + _TRANSPOSED:
        return _fold_linear(changes, name, weight, bias)
    if type(module).__name__ in _ADAPTIVE and is_from(module, "diffusers.models.normalization"):
        _fold_adaptive(changes, name, weight, bias)
        return torch.zeros_like(bias)
    modulated = _modulated_by(changes.model, name)
    if modulated is not None and not changes.has(name, "weight"):
        _fold_modulated(changes, name, modulated, weight, bias)
        return torch.zeros_like(bias)
    if (weight != 1).any() or changes.has(name, "bias"):
        _fold_norm(changes, name, weight)
    if not changes.has(name, "bias"):
        return bias
    changes.write(name, "bias", changes.vector(name, "bias") * weight + bias)
    return torch.zeros_like(bias)


# --- norms ------------------------------------------------------------------------------------------------------------


def _fold_norm(changes: ParameterChanges, name: str, weight: Tensor) -> None:
    module = changes.model.get_submodule(name)
    if not changes.has(name, "weight"):
        raise Refusal(f"{type(module).__name__} has no gain of its own that could hold the map")
    gain = changes.vector(name, "weight")
    plus = 0.0 if type(module) in _AFFINE else _offset_of_gain(module)
    changes.write(name, "weight", (gain + plus) * weight - plus)


def _offset_of_gain(module: nn.Module) -> float:
    """0 where the output is weight * (...) + bias, 1 where it is (1 + weight) * (...), as in Gemma; found by trying.

    Raises
    ------
    Refusal
        When it is neither.
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
    x = torch.randn(2, 3, gain.numel(), generator=generator).to(gain.device)
    one, two, shift = (torch.rand(gain.numel(), generator=generator).to(gain.device) + 0.5 for _ in range(3))

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


def _fold_linear(changes: ParameterChanges, name: str, weight: Tensor, bias: Tensor) -> Tensor:
    module = changes.model.get_submodule(name)
    if (weight != 1).any():
        if type(module) in _TRANSPOSED:  # [in, out / groups, ...]
            _scale_transposed(changes, name, weight)
        else:
            changes.map_rows(name, _scaling(weight), axis=1 if is_conv1d(module) else 0)
    if changes.has(name, "bias"):
        changes.write(name, "bias", changes.vector(name, "bias") * weight + bias)
    elif (bias != 0).any():
        changes.read(name, "weight")  # a Refusal where a bias beside it could not be added
        changes.add_to_bias(name, bias, wanted_by=name)
    return torch.zeros_like(bias)


def _scaling(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: rows * weight.to(rows.device)[:, None]


def _scale_transposed(changes: ParameterChanges, name: str, weight: Tensor) -> None:
    groups = int(changes.model.get_submodule(name).groups)  # type: ignore[arg-type]

    def change(rows: Tensor) -> Tensor:  # [in, out / groups * positions], input channels of a group side by side
        per_group = weight.to(rows.device).view(groups, 1, -1, 1)
        return (rows.view(groups, len(rows) // groups, per_group.shape[2], -1) * per_group).view(rows.shape)

    changes.map_rows(name, change)


# --- adaptive norms ---------------------------------------------------------------------------------------------------


def _modulated_by(model: nn.Module, name: str) -> tuple[str, int, int, int] | None:
    parent, _, last = name.rpartition(".")
    layer = model.get_submodule(parent)
    found = _MODULATED.get(type(layer).__name__, {}).get(last) if is_from(layer, "diffusers.models") else None
    return None if found is None else (f"{parent}.{found[0]}", *found[1:])


def _check_modulation(changes: ParameterChanges, linear: str, rows: int) -> None:
    if type(changes.model.get_submodule(linear)) is not nn.Linear or not changes.has(linear, "bias"):
        raise Refusal(f"the modulation {linear!r} is no Linear with a bias")
    found = changes.read(linear, "weight").shape[0]
    if found != rows:
        raise Refusal(f"the modulation {linear!r} gives {found} numbers, not {rows}")


def _fold_adaptive(changes: ParameterChanges, name: str, weight: Tensor, bias: Tensor) -> None:
    """w (n (1 + s) + t) + b: s' = w (1 + s) - 1, t' = w t + b, row by row of the Linear that gives s and t."""
    count, shift, scale = _ADAPTIVE[type(changes.model.get_submodule(name)).__name__]
    linear, d = f"{name}.linear", weight.numel()
    _check_modulation(changes, linear, count * d)
    factor, offset = torch.ones(count, d, dtype=weight.dtype), torch.zeros(count, d, dtype=weight.dtype)
    factor[shift] = factor[scale] = weight
    offset[shift], offset[scale] = bias, weight - 1
    changes.map_rows(linear, _scaling(factor.flatten()))
    changes.write(linear, "bias", changes.vector(linear, "bias") * factor.flatten() + offset.flatten())


def _fold_modulated(
    changes: ParameterChanges, name: str, modulated: tuple[str, int, int, int], weight: Tensor, bias: Tensor
) -> None:
    """(w n + b) (1 + s) + t: s' = w (1 + s) - 1, t' = t + b (1 + s)."""
    linear, count, shift, scale = modulated
    d = weight.numel()
    _check_modulation(changes, linear, count * d)

    def change(rows: Tensor) -> Tensor:
        slices = rows.view(count, d, -1).clone()
        w, b = weight.to(rows.device)[:, None], bias.to(rows.device)[:, None]
        slices[shift] += b * slices[scale]
        slices[scale] *= w
        return slices.view(rows.shape)

    changes.map_rows(linear, change)
    old = changes.vector(linear, "bias").view(count, d)
    new = old.clone()
    new[shift] += bias * (1 + old[scale])
    new[scale] = weight * (1 + old[scale]) - 1
    changes.write(linear, "bias", new.flatten())
