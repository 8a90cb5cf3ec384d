"""Maps into the weights: a model that does without hooks what it does with them."""

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._arrays import as_strength
from ..maps import AffineMap, SteeringMaps
from . import calling, homes
from .attach import attach
from .consumers import (
    Consumers,
    Refusal,
    check_consumers,
    check_maps,
    count_places,
    dense_weight,
    find_consumers,
    is_conv1d,
    shift_through,
)
from .edits import Edits, write_parameters
from .gains import fold_gain

# Largest difference between hooks and folded weights that passes for rounding, root mean square over that of the
# output. Also in float64 models some norms compute in float32.
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


def fold(
    maps: SteeringMaps,
    model: nn.Module,
    strength: float = 1.0,
    *,
    inplace: bool = False,
    consumers: Consumers | None = None,
    convert: bool = False,
    check: Any = None,
    tokenizer: Any = None,
    forward: calling.Forward | None = None,
) -> nn.Module:
    """Put `maps` into the weights of `model`; see `lineas.SteeringMaps.fold`.

    A map goes into the gain and bias of the module whose output it changes. A shift that finds no bias there goes on
    into the biases of the Linears that read the output: W (w z + b) + c = W (w z) + (W b + c).
    """
    strength = as_strength(strength)
    for name, flag in (("inplace", inplace), ("convert", convert)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    if inplace and convert:
        raise ValueError("convert makes a model of another class: it cannot be done in place")
    check_maps(maps, model, "a fold")
    consumers = check_consumers(consumers, maps, model)
    if convert:
        homes.check_conversion(model)
    batches = None if check is None else calling.as_batches(check, tokenizer=tokenizer, argument="check")

    edits, settings, biases = _plan(maps, model, strength, consumers, convert)
    values = _rounded(edits)
    for name in sorted(biases - {f"{module}.{kind}" for module, kind in values}):
        weight = model.get_submodule(name.removesuffix(".bias"))._parameters["weight"]
        assert weight is not None  # the Linear of a bias that a setting adds
        rows = dense_weight(model, name.removesuffix(".bias")).shape[0]
        values[name.removesuffix(".bias"), "bias"] = torch.zeros(rows, dtype=weight.dtype, device=weight.device)

    hooked = None
    if batches is not None:
        with attach(maps, model, strength):
            hooked = _outputs(model, batches, forward)
    target = model if inplace else homes.to_llama(model) if convert else copy.deepcopy(model)
    undo = write_parameters(target, values)
    try:
        if hooked is not None:
            _compare(hooked, _outputs(target, batches or [], forward), next(model.parameters()).dtype)
    except BaseException:
        undo()
        raise
    homes.switch_on(target, settings)
    return target


def parameters_of(affine: AffineMap, strength: float) -> tuple[Tensor, Tensor]:
    """Slopes and shifts [d] at `strength`, float64 on the CPU."""
    wide = AffineMap(affine.weight.astype(np.float64), affine.bias.astype(np.float64)).with_strength(strength)
    return torch.tensor(wide.weight), torch.tensor(wide.bias)


def refuse(refused: Mapping[str, str], total: int, what: str) -> None:
    """Raise one ValueError that names every module of `refused` and why; nothing where there is none."""
    if refused:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in refused.items())
        raise ValueError(
            f"{len(refused)} of {total} maps cannot be {what}, and nothing was changed; maps.attach(model) applies all "
            f"of them, and maps.select([...]) picks others:\n{reasons}"
        )


def _plan(
    maps: SteeringMaps, model: nn.Module, strength: float, consumers: Consumers, convert: bool
) -> tuple[Edits, list[homes.Setting], set[str]]:
    """All new parameters, the settings that give them a home on disk, and the biases that come by those."""
    edits, places, refused = Edits(model), count_places(model), {}
    for name, affine in maps.items():
        weight, bias = parameters_of(affine, strength)
        if (weight == 1).all() and (bias == 0).all():
            continue
        try:
            left = fold_gain(edits, name, weight, bias)
            if (left != 0).any():
                _shift_consumers(edits, name, left, consumers, places)
        except Refusal as error:
            refused[name] = str(error.args[0])
    settings: list[homes.Setting] = []
    biases: set[str] = set()
    if edits.homeless and not convert:
        try:
            settings, biases = homes.find_homes(model, edits.homeless)
        except Refusal as error:
            reason, lost = error.args
            for linear in lost:
                for name in edits.homeless[linear]:
                    refused.setdefault(name, f"its shift is not 0, {linear!r} {reason}")
    refuse({name: refused[name] for name in maps if name in refused}, len(maps), "folded")
    return edits, settings, biases


def _shift_consumers(edits: Edits, name: str, shift: Tensor, consumers: Consumers, places: Counter[int]) -> None:
    try:
        readers = find_consumers(edits.model, name, shift.numel(), consumers, places)
        for reader in readers:
            dense_weight(edits.model, reader)
    except Refusal as error:
        kind = type(edits.model.get_submodule(name)).__name__
        raise Refusal(f"its shift is not 0, {kind} has no bias, and {error}") from None
    for reader in readers:
        # As it will be: a map of the reader's own output may be in there already.
        weight = edits.read(reader, "weight")
        weight = weight.T if is_conv1d(edits.model.get_submodule(reader)) else weight
        edits.add_to_bias(reader, shift_through(weight, shift), wanted_by=name)


def _rounded(edits: Edits) -> dict[tuple[str, str], Tensor]:
    try:
        return edits.rounded()
    except Refusal as error:
        raise ValueError(f"the maps cannot be folded, and nothing was changed: {error}") from None


# --- the check --------------------------------------------------------------------------------------------------------


def _outputs(model: nn.Module, batches: list[calling.Batch], forward: calling.Forward | None) -> list[Tensor]:
    with calling.frozen(model, gradients=False):
        return [tensor for batch in batches for tensor in _tensors(calling.call(model, batch, forward))]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output.detach().to("cpu", torch.float64)
    elif isinstance(output, Mapping):
        yield from (tensor for value in output.values() for tensor in _tensors(value))
    elif isinstance(output, tuple | list):
        yield from (tensor for value in output for tensor in _tensors(value))


def _compare(hooked: list[Tensor], folded: list[Tensor], dtype: torch.dtype) -> None:
    tolerance = _TOLERANCES[dtype]
    if not hooked:
        raise ValueError("check: the model gave no floating-point tensor to compare")
    for by_hook, by_fold in zip(hooked, folded, strict=True):
        size, error = (math.sqrt(float(x.square().mean())) for x in (by_hook, by_hook - by_fold))
        if not error <= tolerance * size:  # also where it is not a number
            raise ValueError(
                f"check: the folded model gives something else than the model with hooks (root mean square {error:.3g} "
                f"of {size:.3g}, and {tolerance:g} of it is taken for rounding in {dtype}); nothing was changed. "
                "If consumers= was given, it is not all that reads the outputs"
            )
