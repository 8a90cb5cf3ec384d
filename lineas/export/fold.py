"""Maps into the weights: a model that does without hooks what it does with them."""

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import as_flag
from ..hooks.affine import moved, parameters
from ..hooks.attach import attach
from ..hooks.modules import note_folded_shifts
from ..hooks.settings import as_tokenizer, optional
from ..inputs.batches import Batch
from ..inputs.call import Forward, call, unwrap
from ..inputs.frozen import frozen
from ..inputs.prompts import read
from ..maps.gates import refuse_gates
from ..maps.metadata import as_strength
from ..maps.steering import SteeringMaps
from .bias_settings import Setting, check_conversion, find_bias_settings, switch_on, to_llama
from .fold_module import fold_into_module
from .parameter_changes import WIDE, Key, ParameterChanges, write_parameters
from .readers import (
    Readers,
    check_arguments,
    count_uses,
    dense_weight,
    find_readers,
    is_conv1d,
    shift_through,
)
from .refusal import IN_MODEL, Refusal, refuse

# Largest difference between hooks and folded weights that passes for rounding, root mean square over that of the
# output. Also in float64 models some norms compute in float32.
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


def fold(
    maps: SteeringMaps,
    model: nn.Module,
    strength: float | str = 1.0,
    *,
    inplace: bool = False,
    readers: Readers | None = None,
    convert: bool = False,
    check: Any = None,
    tokenizer: Any = None,
    forward: Forward | None = None,
) -> nn.Module:
    """Put the maps into the weights of a model, for good: it then runs, saves and loads without lineas.

    A map goes into the gain and the bias of the module whose output it changes: LayerNorm, GroupNorm, BatchNorm,
    RMSNorm (also Gemma's, whose gain is 1 + weight), Linear, convolutions, and the adaptive norms of diffusers.
    The shift after a norm without a bias goes into the biases of the Linears that read its output, as W @ bias.
    For Llama and other families whose configuration has ``attention_bias`` or ``mlp_bias`` these settings are
    switched on, so that the folded model survives ``save_pretrained`` and ``from_pretrained``. Everything is
    computed in float64 and rounded once.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model with modules of these names, and no maps attached.
    strength : float or "calibrated", default 1.0
        The strength for good; 1 is the maps, "calibrated" the one that `SteeringMaps.calibrate` noted.
    inplace : bool, default False
        Change `model` itself and return it; otherwise a deep copy is changed.
    readers : dict[str, list[str]], optional
        For models of one's own: by name of a norm, the names of all Linears that read its output, where nothing
        else reads it. A wrong list gives a wrong model: use `check`.
    convert : bool, default False
        Make a LlamaForCausalLM of a Mistral or Qwen2 model, which have no place for biases in their MLP.
    check : list[str], batch or list of batches, optional
        Data to compare with: the model with the maps attached and the folded one must give the same up to the
        rounding of the model's dtype, otherwise nothing is changed. Most exact on a float32 model.
    tokenizer : transformers tokenizer, optional
        Where `check` is texts.
    forward : callable, optional
        ``forward(model, batch)`` calls the model for `check` where ``model(**batch)`` or ``model(batch)`` do not
        fit.

    Returns
    -------
    torch.nn.Module
        The folded copy, or `model`.

    Raises
    ------
    TypeError
        If an argument is of a wrong type.
    ValueError
        If maps cannot be folded exactly. All of them are named with the reason, before anything is changed: a
        shift that no bias on disk could hold, weights that are quantised, offloaded or tied to others, modules
        without a gain. Also if maps are attached to the model, these maps are for some tokens only, a module is
        missing or has another width, `check` finds a difference, or slopes would not reach the shift of maps that
        were folded before: compose them, ``second @ first``, and fold that.

    Warns
    -----
    UserWarning
        If the metadata name another model than this one, as `attach`.
    """
    refuse_gates(maps, "fold")
    strength = as_strength(strength, getattr(maps, "metadata", {}))
    optional(as_tokenizer, tokenizer, "tokenizer")
    inplace, convert = as_flag(inplace, "inplace"), as_flag(convert, "convert")
    if inplace and convert:
        raise ValueError("convert makes a model of another class: it cannot be done in place")
    maps, inner, readers = check_arguments(maps, model, readers, "a fold")
    if convert:
        check_conversion(inner)
    batches = [] if check is None else read(check, "check", tokenizer=tokenizer).parts()

    values, settings, shifted = _plan(maps, inner, strength, readers, convert)
    hooked: list[Tensor] = []
    if batches:
        with attach(dict(maps), model, strength):  # without metadata, of which there was a warning if need be
            hooked = _outputs(model, batches, forward)
    target = model if inplace else to_llama(inner) if convert else copy.deepcopy(model)
    undo = write_parameters(unwrap(target), values)
    try:
        if batches:
            _compare(hooked, _outputs(target, batches, forward), _coarsest(model))
    except BaseException:
        undo()
        raise
    if settings:
        switch_on(unwrap(target).config, settings)
    note_folded_shifts(target, shifted)
    return target


def _plan(
    maps: SteeringMaps, model: nn.Module, strength: float, readers: Readers, convert: bool
) -> tuple[dict[Key, Tensor], list[Setting], list[str]]:
    """All new parameters, the settings that give them a home on disk, and the modules whose shifts are in readers."""
    changes, uses, refused = ParameterChanges(model), count_uses(model), {}
    shifted = []
    for name, affine in maps.items():
        weight, bias = parameters(affine, strength, *WIDE)
        if (weight == 1).all() and (bias == 0).all():
            continue
        try:
            left = fold_into_module(changes, name, weight, bias)
            if (left != 0).any():
                _shift_readers(changes, name, left, readers, uses)
                shifted.append(name)
        except Refusal as error:
            refused[name] = str(error.args[0])
    settings: list[Setting] = []
    biases: set[str] = set()
    if changes.added_biases and not convert:
        try:
            settings, biases = find_bias_settings(model, changes.added_biases)
        except Refusal as error:
            reason, lost = error.args
            for linear in lost:
                for name in changes.added_biases[linear]:
                    refused.setdefault(name, f"its shift is not 0, {linear!r} {reason}")
    refuse({name: refused[name] for name in maps if name in refused}, len(maps), "folded", IN_MODEL)
    try:
        values = changes.rounded()
    except Refusal as error:
        raise ValueError(f"the maps cannot be folded, and nothing was changed: {error}") from None
    for linear in sorted(
        {name.removesuffix(".bias") for name in biases} - {module for module, kind in values if kind == "bias"}
    ):
        weight = dense_weight(model, linear)
        values[linear, "bias"] = weight.new_zeros(len(weight))
    return values, settings, shifted


def _shift_readers(changes: ParameterChanges, name: str, shift: Tensor, readers: Readers, uses: Counter[int]) -> None:
    try:
        linears = find_readers(changes.model, name, shift.numel(), readers, uses)
    except Refusal as error:
        kind = type(changes.model.get_submodule(name)).__name__
        raise Refusal(f"its shift is not 0, {kind} has no bias, and {error}") from None
    for linear in linears:
        # As it will be: a map of the Linear's own output may be in there already.
        weight = changes.read(linear, "weight")
        weight = weight.T if is_conv1d(changes.model.get_submodule(linear)) else weight
        changes.add_to_bias(linear, shift_through(weight, shift), wanted_by=name)


# --- the check --------------------------------------------------------------------------------------------------------


def _outputs(model: nn.Module, batches: list[Batch], forward: Forward | None) -> list[Tensor]:
    with frozen(model, gradients=False):
        return [tensor for batch in batches for tensor in _tensors(call(model, batch, forward))]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield moved(output.detach(), *WIDE)
    elif isinstance(output, Mapping):
        yield from (tensor for value in output.values() for tensor in _tensors(value))
    elif isinstance(output, tuple | list):
        yield from (tensor for value in output for tensor in _tensors(value))


def _coarsest(model: nn.Module) -> torch.dtype:
    """The dtype that rounds most of those that the model computes in; weights may be integers."""
    found = {parameter.dtype for parameter in model.parameters()} & set(_TOLERANCES)
    return max(found or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)


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
                "If readers= was given, it is not all that reads the outputs"
            )
