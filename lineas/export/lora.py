"""Sparse maps as a LoRA adapter of PEFT: exact, with a strength, and for runtimes that know adapters but not maps.

The output of a norm that only Linears read is mapped by mapping what they make of it: W (w x + b) = W x + B A x + W b,
where the rows of A pick the neurons with w != 1 and the columns of B are those of W times (w - 1). The rank is the
number of such neurons; the shift W b is the bias of B. Both are scaled by alpha / rank, which is the strength.
"""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from .._checks import as_int
from ..hooks.affine import parameters
from ..hooks.modules import model_name
from ..hooks.settings import optional
from ..maps.files import write_atomically
from ..maps.gates import refuse_gates
from ..maps.metadata import as_strength
from ..maps.steering import SteeringMaps
from .parameter_changes import WIDE
from .readers import (
    Readers,
    check_arguments,
    check_bias,
    count_uses,
    dense_weight,
    find_readers,
    is_conv1d,
    shift_through,
)
from .refusal import IN_MODEL, Refusal, refuse

_Pair = tuple[Tensor, Tensor, Tensor]  # A's neurons [r], B [out, r], bias of B [out]


def to_peft_lora(
    maps: SteeringMaps,
    model: nn.Module,
    folder: str | os.PathLike[str],
    strength: float | str = 1.0,
    *,
    rank: int | None = None,
    bias: bool | None = None,
    readers: Readers | None = None,
) -> Path:
    """Write the maps as a LoRA adapter of PEFT, which does the same to the model without lineas.

    For maps of norms whose output only Linears read: each of these Linears gets an adapter of rank = the number
    of neurons with a weight other than 1, so that sparse maps make small adapters, and a bias for the shifts. The
    scale of the adapter (``lora_alpha / r``) is the strength.

    Readers other than PEFT differ: vLLM has no LoRA biases any more, and PEFT itself cannot merge an adapter
    with biases into Linears that have none.

    Parameters
    ----------
    model : torch.nn.Module
        The model that the adapter is for; it is not changed.
    folder : str or PathLike
        Where ``adapter_config.json`` and ``adapter_model.safetensors`` go. It is made where it is missing; the
        two files are replaced.
    strength : float or "calibrated", default 1.0
        The strength at which the adapter is loaded; "calibrated" is the one that `SteeringMaps.calibrate` noted.
    rank : int, optional
        The rank of every Linear's adapter, if more than needed: some readers take certain ranks only. Default:
        the largest that a map needs.
    bias : bool, optional
        False: refuse maps that need biases. Default: biases where a shift is not 0.
    readers : dict[str, list[str]], optional
        As in `fold`.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    ImportError
        If PEFT is not installed (``pip install "lineas[peft]"``).
    TypeError
        If an argument is of a wrong type.
    ValueError
        If a map is not of such a norm or a Linear's weights cannot be read (all are named with the reason), the
        maps need biases or a higher rank than was given, change nothing, or as `fold`. Nothing is written then.
    OSError
        If the files cannot be written.

    Warns
    -----
    UserWarning
        If the metadata name another model than this one, as `attach`.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError('a LoRA adapter needs PEFT: pip install "lineas[peft]"') from error
    from safetensors.torch import save

    refuse_gates(maps, "to_peft_lora")
    strength = as_strength(strength, getattr(maps, "metadata", {}))
    check_bias(bias)
    rank = optional(as_int, rank, "rank", low=1)
    maps, model, readers = check_arguments(maps, model, readers, "an adapter")
    pairs = _pairs(maps, model, readers)
    if not pairs:
        raise ValueError("these maps change nothing: there is nothing to write")
    shifted = any(bool((shift != 0).any()) for _, _, shift in pairs.values())
    if bias is False and shifted:
        raise ValueError(
            "bias=False, but the maps have shifts, which only the bias of an adapter can hold: fit maps without "
            "them, or use bias=True"
        )
    bias = shifted if bias is None else bias
    needed = max(1, *(len(chosen) for chosen, _, _ in pairs.values()))
    rank = needed if rank is None else rank
    if rank < needed:
        raise ValueError(f"rank must be at least {needed}, the most neurons that one map scales, got {rank}")
    tensors: dict[str, Tensor] = {}
    for name, (chosen, columns, shift) in pairs.items():
        dense = dense_weight(model, name)
        dtype = torch.float64 if dense.dtype == torch.float64 else torch.float32
        shapes = (rank, dense.shape[1]), (len(columns), rank)
        a, b = (torch.zeros(shape, dtype=dtype, device="cpu") for shape in shapes)
        a[range(len(chosen)), chosen] = 1
        b[:, : len(chosen)] = columns
        prefix = f"base_model.model.{name}"
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        if bias:
            tensors[f"{prefix}.lora_B.bias"] = shift.to(dtype)
    alpha = strength * rank
    config = LoraConfig(
        r=rank,
        # PEFT divides it by the rank. A whole number where it is one: some readers expect that.
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]
        lora_bias=bias,
        fan_in_fan_out=all(is_conv1d(model.get_submodule(name)) for name in pairs),
        base_model_name_or_path=model_name(model),
        task_type=_task(model),
        inference_mode=True,
    )
    config.target_modules = _targets(model, list(pairs))  # passed above it would be a set, in another order each time
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as made:
        config.save_pretrained(made)
        text = Path(made, "adapter_config.json").read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    # The weights first: without the configuration the folder is no adapter yet.
    write_atomically(str(folder / "adapter_model.safetensors"), save(tensors, {"format": "pt"}))
    write_atomically(str(folder / "adapter_config.json"), text)
    return folder


def _pairs(maps: SteeringMaps, model: nn.Module, readers: Readers) -> dict[str, _Pair]:
    """What the maps do to each Linear that reads a mapped norm."""
    pairs: dict[str, _Pair] = {}
    refused, uses = {}, count_uses(model)
    for name, affine in maps.items():
        weight, bias = parameters(affine, 1.0, *WIDE)
        chosen = (weight != 1).nonzero().flatten()
        if not len(chosen) and (bias == 0).all():
            continue
        try:
            for reader in find_readers(model, name, affine.d, readers, uses):
                if reader in pairs:
                    raise Refusal(f"{reader!r} reads the output of another mapped norm as well")
                dense = dense_weight(model, reader)
                columns = dense[:, chosen.to(dense.device)].cpu().double() * (weight - 1)[chosen]
                pairs[reader] = chosen, columns, shift_through(dense, bias)
        except Refusal as error:
            refused[name] = str(error.args[0])
    refuse(refused, len(maps), "written as LoRA", IN_MODEL)
    return pairs


def _targets(model: nn.Module, names: list[str]) -> list[str]:
    """The last parts of the names where they pick just these modules, as most readers expect; else the full names."""
    last = {name.rpartition(".")[2] for name in names}
    picked = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last) if picked == set(names) else sorted(names)


def _task(model: nn.Module) -> str | None:
    """What PEFT calls the task of a model, as far as its class says."""
    name = type(model).__name__
    if "CausalLM" in name or "LMHeadModel" in name:
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if "ConditionalGeneration" in name else None
