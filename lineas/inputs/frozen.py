"""A model while it is used: weights, mode and random state stay as they are."""

from __future__ import annotations

import functools
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

_FUNCTION = "_gradient_checkpointing_func"  # what transformers and diffusers call it


@contextmanager
def frozen(model: nn.Module, *, gradients: bool = True) -> Iterator[None]:
    """Keep a model's weights, mode and the random state as they are while it is used; restore all on any exit.

    Blocks of several threads may overlap, also on one model: what the last one finds is what the first one found.

    Inside, every module is in eval mode, and what was compiled runs as if it were not. With `gradients` no parameter
    requires a gradient and autograd is on, whatever surrounds the block; without it autograd is off.

    Modules with gradient checkpointing switched on are kept in training mode when `gradients` are wanted, since
    transformers checkpoints only there. Whatever they checkpoint runs in eval mode, at first and once more in the
    backward pass. What they do beside that does not drop anything either: their children are in eval mode, the rates in
    their attributes and in their configuration are 0, and torch's functions do what they do outside of training.

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
        # A compiled model calls hooks only if it had some when it was compiled, and cannot be left by an exception.
        # Without _dynamo, whose import takes seconds, nothing is compiled.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(_EAGER)
        if gradients:
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))

        def put(target: Any, name: str, value: Any) -> None:
            stack.callback(_VALUES.put(target, name, value))

        # The flags themselves, not eval(): some libraries merge adapters into the weights there.
        for module in model.modules():
            put(module, "training", False)
        for module in checkpointed:
            put(module, "training", True)
            function: Any = getattr(module, _FUNCTION, None)
            if function is not None:
                put(module, _FUNCTION, _evaluating(module, function))
            for holder in (module, getattr(module, "config", None)):
                # Among its attributes, not by setattr: some configurations refuse that.
                attributes = getattr(holder, "__dict__", {})
                for name in _dropout_rates(attributes):
                    put(attributes, name, 0.0)
        if checkpointed:
            stack.enter_context(_NoDropout())
        for parameter in model.parameters() if gradients else ():
            put(parameter, "requires_grad", False)  # also where another block has done it, which may end first
        yield


class _Values:
    """Attributes, and entries of dicts, that are another for a time: the value asked for last, in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By object and name: the object, the value it had, and the values that are asked for.
        self._held: dict[tuple[int, str], tuple[Any, Any, list[list[Any]]]] = {}

    def put(self, target: Any, name: str, value: Any) -> Callable[[], None]:
        """Ask for a value; what is returned takes that back."""
        key, asked = (id(target), name), [value]
        read, write = (operator.getitem, operator.setitem) if isinstance(target, dict) else (getattr, setattr)
        with self._lock:
            _, before, values = self._held.get(key) or (target, read(target, name), [])
            write(target, name, value)
            values.append(asked)
            self._held[key] = target, before, values

        def take_back() -> None:
            with self._lock:
                values[:] = [one for one in values if one is not asked]
                write(target, name, values[-1][0] if values else before)
                if not values:
                    del self._held[key]

        return take_back


_VALUES = _Values()


class _Eager:
    """Runs what was compiled as if it were not, in the whole process, until the last thread that asked leaves."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._stance = torch.compiler.set_stance("force_eager")
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stance.__exit__(*exception)


_EAGER = _Eager()


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


def _evaluating(module: nn.Module, checkpointing: Callable[..., Any]) -> Callable[..., Any]:
    """A module's checkpointing function, for which the module is in eval mode while what is checkpointed runs."""

    @functools.wraps(checkpointing)
    def evaluating(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def evaluated(*args: Any, **kwargs: Any) -> Any:
            mode, module.training = module.training, False
            try:
                return function(*args, **kwargs)
            finally:
                module.training = mode

        return checkpointing(evaluated, *args, **kwargs)

    return evaluating


def _dropout_rates(attributes: dict[str, Any]) -> list[str]:
    """Rates that layers pass to functional dropout, or drop whole layers with, when they are in training mode."""
    return [name for name, value in attributes.items() if "drop" in name and isinstance(value, float)]


class _NoDropout(TorchFunctionMode):
    """In this thread, and in backward passes that it starts, torch's functions do as they do outside of training."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        # A batch norm without statistics takes those of the batch, in both modes.
        elif kwargs.get("training") and (func is not functional.batch_norm or args[1] is not None):
            kwargs = {**kwargs, "training": False}
        return func(*args, **kwargs)


# Those below torch.nn.functional's, which pass everything by position.
_DROPOUTS = {
    getattr(torch, name + suffix)
    for name in ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
    for suffix in ("", "_")
}


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
        function = getattr(module, _FUNCTION, None)
        reentrant = getattr(function, "keywords", {}).get("use_reentrant")
        if reentrant or (reentrant is None and getattr(function, "func", function) is checkpoint):
            raise ValueError(
                "model: reentrant gradient checkpointing gives no gradient where the weights are frozen; "
                "switch checkpointing on with use_reentrant=False"
            )
