"""A model while it is used: weights, mode and random state stay as they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def frozen(model: nn.Module, *, gradients: bool = True) -> Iterator[None]:
    """Keep a model's weights, mode and the random state as they are while it is used; restore all on any exit.

    Inside, every module is in eval mode, and what was compiled runs as if it were not. With `gradients` no parameter
    requires a gradient and autograd is on, whatever surrounds the block; without it autograd is off.

    Modules with gradient checkpointing switched on are kept in training mode when `gradients` are wanted, since
    transformers checkpoints only there; their children, dropout modules among them, and their own dropout rates are
    off all the same.

    ValueError with `gradients` when weights were made under `torch.inference_mode`, torchao quantises activations, or
    checkpointing is reentrant.
    """
    if gradients:
        _check_differentiable(model)
    checkpointed = _checkpointed(model) if gradients else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))  # the CPU's
        for kind, devices in _accelerators(model).items():
            stack.enter_context(torch.random.fork_rng(devices=devices, device_type=kind))
        # A compiled model calls hooks only if it had some when it was compiled, and cannot be left by an exception. The
        # stance holds for the whole process. Without _dynamo, whose import takes seconds, nothing is compiled.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if gradients:
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))

        def put(target: nn.Module | nn.Parameter, name: str, value: Any) -> None:
            stack.callback(setattr, target, name, getattr(target, name))
            setattr(target, name, value)

        # The flags themselves, not eval(): some libraries merge adapters into the weights there.
        for module in model.modules():
            put(module, "training", False)
        for module in checkpointed:
            put(module, "training", True)
            for name in _dropout_rates(module):
                put(module, name, 0.0)
        for parameter in model.parameters() if gradients else ():
            if parameter.requires_grad:
                put(parameter, "requires_grad", False)
        yield


def _accelerators(model: nn.Module) -> dict[str, list[int]]:
    """Indices of the accelerators that hold weights of the model and have random numbers of their own, by kind."""
    indices: dict[str, set[int]] = {}
    for parameter in model.parameters():
        if parameter.device.type in ("cuda", "xpu"):  # fork_rng knows no device indices elsewhere
            indices.setdefault(parameter.device.type, set()).add(parameter.device.index)
    return {kind: sorted(devices) for kind, devices in indices.items()}


class RandomState:
    """The state of torch's random numbers, on the CPU and on the accelerators of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {"cpu": torch.get_rng_state()}  # by device
        for kind, devices in _accelerators(model).items():
            for device in devices:
                self.tensors[f"{kind}:{device}"] = torch.get_device_module(kind).get_rng_state(device)

    def restore(self) -> None:
        """Put the state back, so that what is drawn next is drawn once more."""
        for name, state in self.tensors.items():
            if name == "cpu":
                torch.set_rng_state(state)
            else:
                device = torch.device(name)
                torch.get_device_module(device.type).set_rng_state(state, device.index)


def _checkpointed(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]


def _dropout_rates(module: nn.Module) -> list[str]:
    """Rates that layers pass to functional dropout, or drop whole layers with, when they are in training mode."""
    return [
        name
        for name, value in vars(module).items()
        if name.endswith(("dropout", "layerdrop")) and isinstance(value, float) and value
    ]


def _check_differentiable(model: nn.Module) -> None:
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if tensor.is_inference():
                raise ValueError(
                    f"model: {kind} {name!r} was made under torch.inference_mode(), so nothing can be differentiated "
                    "through it; load the model outside of inference_mode"
                )
    for name, parameter in model.named_parameters():
        if getattr(parameter, "act_quant_kwargs", None) is not None:  # torchao's
            raise ValueError(
                f"model: {name!r} is a {type(parameter).__name__} of torchao that quantises activations, which stops "
                "gradients: quantise weights only, or fit the maps on the model as it was before"
            )
    for module in _checkpointed(model):
        function = getattr(module, "_gradient_checkpointing_func", None)
        reentrant = getattr(function, "keywords", {}).get("use_reentrant")
        if reentrant or (reentrant is None and getattr(function, "func", function) is checkpoint):
            raise ValueError(
                "model: reentrant gradient checkpointing gives no gradient where the weights are frozen; "
                "switch checkpointing on with use_reentrant=False"
            )
