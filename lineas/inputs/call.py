"""Call a model that somebody else loaded as it is, with the arguments that it needs, and see through its wrappers."""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .batches import Batch

Forward: TypeAlias = Callable[[nn.Module, Any], Any]

WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and torch's checkpoint wrapper call the module in them."""


def call(model: nn.Module, batch: Batch, forward: Forward | None = None) -> Any:
    """Call `model` on `batch`, its tensors moved to the device of the model's first parameter.

    ``forward(model, data)`` calls the model in its own way; `data` is the mapping, tensor or tuple of the batch, passed
    on without additions (a tuple of one arrives as its entry).

    Without `forward` two arguments are added where the model's forward has them and the batch does not:
    ``use_cache=False``, and under left padding ``position_ids``, the cumulated mask - 1. Without them models with
    absolute positions, like GPT-2, see every prompt shifted by its padding.
    """
    device = _device(model)
    args, kwargs = _to(batch.args, device), _to(batch.kwargs, device)
    if forward is not None:
        return forward(model, Batch(args, kwargs).data)
    # A wrapper's forward is (*args, **kwargs): the model inside tells.
    accepted = inspect.signature(unwrap(model).forward).parameters
    if "use_cache" in accepted:
        kwargs.setdefault("use_cache", False)
    if "position_ids" in accepted and "position_ids" not in kwargs:
        positions = _position_ids(model, batch)
        if positions is not None:
            kwargs["position_ids"] = positions.to(device)
    return model(*args, **kwargs)


def _device(model: nn.Module) -> torch.device | None:
    first = next(model.parameters(), None)
    # Weights that an offloading library keeps elsewhere are on the meta device; its own hooks then move the input.
    return None if first is None or first.device.type == "meta" else first.device


def _to(data: Any, device: torch.device | None) -> Any:
    """`data` with its tensors on `device` (None: where they are), in new dicts, lists and tuples."""
    if isinstance(data, Tensor):
        return data if device is None else data.to(device)
    if type(data) is dict:
        return {key: _to(value, device) for key, value in data.items()}
    if type(data) in (tuple, list):
        return type(data)(_to(value, device) for value in data)
    return data


def unwrap(model: nn.Module) -> nn.Module:
    """The module that PEFT, compiled, parallel and checkpointing wrappers call in the end, whichever method is used.

    ``generate`` of a PEFT or a compiled model goes past the forward of the wrapper.
    """
    while True:
        marks: tuple[str, ...] = WRAPPED
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            marks = ("module",)
        elif type(model).__module__.startswith("peft."):  # those without get_base_model
            marks = ("base_model", "model")
        inner = next((model._modules[mark] for mark in marks if mark in model._modules), None)
        if callable(getattr(model, "get_base_model", None)):
            # mypy takes every further attribute of a Module, and so PEFT's method, for a Tensor or a Module.
            inner = model.get_base_model()  # type: ignore[operator]
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def _position_ids(model: nn.Module, batch: Batch) -> Tensor | None:
    """Positions counted from the first real token; None where the model's own are right."""
    mask = batch.mask
    tokens = batch.kwargs.get("input_ids", batch.kwargs.get("inputs_embeds"))
    if mask is None or tokens is None or mask.shape != tokens.shape[:2]:
        return None
    real = mask != 0
    if not (real[:, 1:] & ~real[:, :-1]).any():  # no real token follows a padded one
        return None
    # The RoBERTa family counts from the pad id + 1 and skips padding by itself.
    if any("create_position_ids_from_input_ids" in vars(type(module)) for module in model.modules()):
        return None
    return (real.long().cumsum(dim=1) - 1).clamp_(min=0)
