"""Call a model somebody else loaded: turn data into batches, freeze it, and leave its forward early.

A model is called as it is. Once the last module of interest has fired, its hook raises a private exception that
`Capture` catches, so neither later layers nor a language-model head run, whatever wraps the model.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from . import sites
from .compiled import eagerly

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
OnOutput: TypeAlias = Callable[[str, nn.Module, Tensor], Tensor | None]

# How transformers call the decoder of an encoder-decoder, and what in it sees the encoder's tokens.
_TOKENS = ("input_ids", "inputs_embeds")
_DECODER = re.compile(r"(^|\.)decoder\.")
_CROSS = re.compile(r"\.(EncDecAttention|encoder_attn|cross_?attn|cross_?attention)\.(.*\.)?(k|v|key|value|[kv]_proj)$")


@dataclass(frozen=True)
class Batch:
    """One call of a model.

    Attributes
    ----------
    args, kwargs : tuple, dict
        The model is called as ``model(*args, **kwargs)``.
    mask : Tensor [B, T] or None
        Nonzero where a token is real; None where every one is.
    padded_here : bool
        Whether the batch was made of texts, so that every tensor is [B, T] and columns of padding alone can go.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None
    padded_here: bool = False

    def mask_of(self, name: str, model: nn.Module) -> Tensor | None:
        """The mask [B, T] of the tokens that module `name` of `model` sees.

        In an encoder-decoder that is ``attention_mask`` for the encoder and the keys and values of the decoder's
        attention to it, and ``decoder_attention_mask``, where there is one, for the rest of the decoder.
        """
        if not self._in_decoder(name, model):
            return self.mask
        mask = self.kwargs.get("decoder_attention_mask")
        return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def size_of(self, name: str, model: nn.Module) -> tuple[int, int] | None:
        """Numbers of prompts and of tokens that module `name` of `model` sees, where mask or token ids tell."""
        side = "decoder_" if self._in_decoder(name, model) else ""
        for tensor in (self.mask_of(name, model), *(self.kwargs.get(side + key) for key in _TOKENS)):
            if isinstance(tensor, Tensor) and tensor.ndim > 1:
                return tensor.shape[0], tensor.shape[1]
        return None

    def _in_decoder(self, name: str, model: nn.Module) -> bool:
        """Whether a module sees the tokens of the decoder of an encoder-decoder."""
        if not _DECODER.search(name) or _CROSS.search(name):
            return False
        two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return two is True or any(key.startswith("decoder_") for key in self.kwargs)


# --- data -------------------------------------------------------------------------------------------------------------


def as_batches(
    data: Any,
    *,
    tokenizer: Callable[..., Any] | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
    argument: str,
) -> list[Batch]:
    """Turn texts, one batch, or an iterable of batches into batches.

    Parameters
    ----------
    data : texts, batch, or iterable of batches
        Texts are strings. A batch is a mapping, called as ``model(**batch)``, whose ``"attention_mask"``, where
        there is one, is the mask of its tokens; or a tensor or tuple, called as ``model(x)`` or ``model(*x)``.
        In an iterable a list is taken like a tuple, since that is what a `DataLoader` gives.
    tokenizer : callable, optional
        A transformers tokenizer; needed for texts. It is not modified: padding is done here, on its
        ``padding_side``, also where it has no pad token.
    max_length : int, optional
        Texts are cut to so many tokens.
    batch_size : int, optional
        Texts in a batch; None puts all of them in one.
    argument : str
        What to call `data` in error messages.

    Raises
    ------
    TypeError, ValueError
        For empty data, texts without a tokenizer, a text without tokens, and entries that are no batch.
    """
    for name, value in (("max_length", max_length), ("batch_size", batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an integer or None, got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if isinstance(data, str):
        raise TypeError(f"{argument} is one string: give a list of texts")
    if isinstance(data, Tensor | Mapping) or (isinstance(data, tuple) and not _all_texts(data)):
        return [_as_batch(data, argument)]
    if not isinstance(data, Iterable):
        raise TypeError(
            f"{argument} must be texts, a batch (mapping, tensor or tuple) or a list of them, got {type(data).__name__}"
        )
    entries = list(data)
    if not entries:
        raise ValueError(f"{argument} is empty")
    if isinstance(entries[0], str):
        return _tokenize(entries, tokenizer, max_length, batch_size or len(entries), argument)
    return [_as_batch(entry, f"{argument}[{i}]") for i, entry in enumerate(entries)]


def _all_texts(data: Sequence[Any]) -> bool:
    return all(isinstance(entry, str) for entry in data)


def _as_batch(data: Any, argument: str) -> Batch:
    if isinstance(data, Tensor):
        return Batch(args=(data,))
    if isinstance(data, tuple | list) and not any(isinstance(entry, str) for entry in data):
        if not data:
            raise ValueError(f"{argument} is empty")
        return Batch(args=tuple(data))
    if not isinstance(data, Mapping):
        raise TypeError(f"{argument} must be a mapping, a tensor or a tuple, got {type(data).__name__}")
    if not data:
        raise ValueError(f"{argument} is empty")
    kwargs = dict(data)
    for key in ("input_ids", "attention_mask"):
        if kwargs.get(key) is not None and not isinstance(kwargs[key], Tensor):
            raise TypeError(
                f"{argument}: {key!r} must be a tensor, got {type(kwargs[key]).__name__} "
                '(tokenizers give tensors with return_tensors="pt")'
            )
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        raise ValueError(f"{argument}: 'attention_mask' must be [batch, tokens], got shape {tuple(mask.shape)}")
    if mask is not None and not (mask != 0).any(dim=1).all():
        row = int((mask == 0).all(dim=1).nonzero()[0])
        raise ValueError(f"{argument}: row {row} of 'attention_mask' has no real token")
    return Batch(kwargs=kwargs, mask=mask)


def _tokenize(
    texts: list[Any], tokenizer: Callable[..., Any] | None, max_length: int | None, batch_size: int, argument: str
) -> list[Batch]:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{argument}[{i}] must be a text like the entries before it, got {type(text).__name__}")
    if tokenizer is None:
        raise ValueError(f"{argument} holds texts: pass tokenizer=")
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
    encoded = dict(tokenizer(texts, **cut))
    encoded.pop("attention_mask", None)  # made below, by the one that pads
    for i, ids in enumerate(encoded["input_ids"]):
        if not len(ids):
            raise ValueError(f"{argument}[{i}] has no tokens: {texts[i]!r}")
    left = getattr(tokenizer, "padding_side", "right") == "left"
    fills = {"input_ids": getattr(tokenizer, "pad_token_id", None), "token_type_ids": 0}
    batches = []
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        # A tokenizer without a pad token pads with 0: any id will do under the mask.
        kwargs = {key: _pad(rows[part], fills.get(key) or 0, left) for key, rows in encoded.items()}
        mask = _pad([[1] * len(ids) for ids in encoded["input_ids"][part]], 0, left)
        batches.append(Batch(kwargs={**kwargs, "attention_mask": mask}, mask=mask, padded_here=True))
    return batches


def _pad(rows: Sequence[Sequence[int]], fill: int, left: bool) -> Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.long)
    for out, row in zip(padded, rows, strict=True):
        out[-len(row) if left else 0 : None if left else len(row)] = torch.as_tensor(row)
    return padded


# --- calling ----------------------------------------------------------------------------------------------------------


def call(model: nn.Module, batch: Batch, forward: Forward | None = None) -> Any:
    """Call `model` on `batch`, its tensors moved to the device of the model's first parameter.

    Parameters
    ----------
    model : torch.nn.Module
    batch : Batch
    forward : callable, optional
        ``forward(model, data)`` calls the model in its own way; `data` is the mapping, tensor or tuple of the batch,
        passed on without additions (a tuple of one arrives as its entry).

    Notes
    -----
    Without `forward` two arguments are added where the model's forward has them and the batch does not:
    ``use_cache=False``, and under left padding ``position_ids``, the cumulated mask - 1. Without them models with
    absolute positions, like GPT-2, see every prompt shifted by its padding.
    """
    device = _device(model)
    args, kwargs = _to(batch.args, device), _to(batch.kwargs, device)
    if forward is not None:
        return forward(model, kwargs if not args else args[0] if len(args) == 1 else args)
    accepted = _accepted(model)
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
    """The module that PEFT, compiled and data-parallel wrappers call in the end, whichever of their methods are used.

    ``generate`` of a PEFT or a compiled model goes past the forward of the wrapper.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        elif hasattr(model, "_orig_mod"):
            inner = model._orig_mod
        elif callable(getattr(model, "get_base_model", None)):
            # mypy takes every further attribute of a Module, and so PEFT's method, for a Tensor or a Module.
            inner = model.get_base_model()  # type: ignore[operator]
        else:
            return model
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def _accepted(model: nn.Module) -> frozenset[str]:
    """Names of the arguments that the model's forward takes."""
    # A wrapper's forward is (*args, **kwargs): the model inside tells.
    return frozenset(inspect.signature(unwrap(model).forward).parameters)


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


# --- freezing ---------------------------------------------------------------------------------------------------------


@contextmanager
def frozen(model: nn.Module, *, gradients: bool = True) -> Iterator[None]:
    """Keep a model's weights, mode and the random state as they are while it is used; restore all on any exit.

    Inside, every module is in eval mode, and what was compiled runs as if it were not. With `gradients` no parameter
    requires a gradient and autograd is on, whatever surrounds the block; without it autograd is off.

    Modules with gradient checkpointing switched on are kept in training mode when `gradients` are wanted, since
    transformers checkpoints only there; their children, dropout modules among them, and their own dropout rates are
    off all the same.

    Raises
    ------
    ValueError
        With `gradients`, when weights were made under `torch.inference_mode`, torchao quantises activations, or
        checkpointing is reentrant.
    """
    if gradients:
        _check_differentiable(model)
    modes = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad] if gradients else []
    kept = _checkpointed(model) if gradients else []
    rates = [(module, name, rate) for module in kept for name, rate in _dropout_rates(module)]
    with ExitStack() as stack:
        _fork_rng(stack, model)
        stack.enter_context(eagerly())
        if gradients:
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        try:
            # The flags themselves, not eval(): some libraries merge adapters into the weights there.
            for module, _ in modes:
                module.training = False
            for module in kept:
                module.training = True
            for module, name, _ in rates:
                setattr(module, name, 0.0)
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, name, rate in rates:
                setattr(module, name, rate)
            for parameter in trained:
                parameter.requires_grad_(True)


def _accelerators(model: nn.Module) -> dict[str, list[int]]:
    """Indices of the accelerators that hold weights of the model and have random numbers of their own, by kind."""
    indices: dict[str, set[int]] = {}
    for parameter in model.parameters():
        if parameter.device.type in ("cuda", "xpu"):  # fork_rng knows no device indices elsewhere
            indices.setdefault(parameter.device.type, set()).add(parameter.device.index)
    return {kind: sorted(devices) for kind, devices in indices.items()}


def _fork_rng(stack: ExitStack, model: nn.Module) -> None:
    stack.enter_context(torch.random.fork_rng(devices=[]))  # the CPU's
    for kind, devices in _accelerators(model).items():
        stack.enter_context(torch.random.fork_rng(devices=devices, device_type=kind))


class RandomState:
    """The state of torch's random numbers, on the CPU and on the accelerators of a model.

    Attributes
    ----------
    tensors : dict of str to Tensor
        By device, as it was when this was made.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {"cpu": torch.get_rng_state()}
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


def _dropout_rates(module: nn.Module) -> list[tuple[str, float]]:
    """Rates that layers pass to functional dropout, or drop whole layers with, when they are in training mode."""
    return [
        (name, value)
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


# --- capturing --------------------------------------------------------------------------------------------------------


class _Leave(BaseException):
    """Leaves a forward pass. Not an Exception, so that no ``except Exception`` on the way swallows it."""


class Capture:
    """Runs a model with hooks on named modules, and no further than needed.

    On its own, ``Capture().run(...)`` removes its hooks when the run ends. As a context manager it keeps the hooks
    of the latest run until the block ends, which a backward pass through gradient checkpointing needs: there the
    layers run again, and must find the maps in place.

    >>> with Capture() as capture:                                # doctest: +SKIP
    ...     capture.run(model, batch, names, on_output)
    ...     loss.backward()
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._held = False

    def __enter__(self) -> "Capture":
        self._held = True
        return self

    def __exit__(self, *exception: object) -> None:
        self._held = False
        self.remove()

    def remove(self) -> None:
        """Take the hooks off the model."""
        while self._handles:
            self._handles.pop().remove()

    def run(
        self,
        model: nn.Module,
        batch: Batch,
        names: Sequence[str],
        on_output: OnOutput,
        last: str | None = None,
        forward: Forward | None = None,
    ) -> list[str]:
        """Call the model, hand the outputs of the modules to `on_output`, and leave once `last` has fired.

        Parameters
        ----------
        model : torch.nn.Module
        batch : Batch
        names : sequence of str
            Modules to watch.
        on_output : callable
            ``on_output(name, module, tensor)`` is called at every call of a watched module, with the hidden state of
            its output; what it returns replaces that, None leaves it. It is called again when checkpointed layers
            are recomputed, and must return the same values then; what it saves for its backward is its own.
        last : str, optional
            The module of `names` after whose first call the forward is left; None: once each has been called.
        forward : callable, optional
            See `call`.

        Returns
        -------
        list of str
            The modules in the order of their first calls.

        Raises
        ------
        ValueError
            When a watched module was not called, or `last` was not. A module called twice counts with its first
            call: the forward may be left before the second.
        """
        order: dict[str, None] = {}
        waiting = {last} if last is not None else set(names)
        leave = _Leave()
        running = True

        def hook_for(name: str) -> Callable[[nn.Module, Any, Any], Any]:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                tensor = sites.take(output, name)
                # Under checkpointing, tensors saved here must not be counted among those a recomputation saves again.
                with torch.autograd.graph.saved_tensors_hooks(_identity, _identity):
                    replaced = on_output(name, module, tensor)
                if running:
                    order.setdefault(name)
                    waiting.discard(name)
                    if not waiting:
                        raise leave
                return None if replaced is None else sites.put(output, replaced)

            return hook

        self.remove()
        try:
            for name in names:
                handle = sites.get_module(model, name).register_forward_hook(hook_for(name))
                self._handles.append(handle)
            try:
                call(model, batch, forward)
            except _Leave as reason:
                if reason is not leave:
                    raise
                leave.__traceback__ = None  # it holds every frame of the forward, and those the activations
        except BaseException:
            self.remove()
            raise
        finally:
            running = False
            if not self._held:
                self.remove()
        missing = [name for name in names if name not in order]
        if missing:
            self.remove()
            raise ValueError(
                f"module {missing[0]!r} was not called"
                + (f" before {last!r}" if last in order else "")
                + " when the model ran"
                + (f" (nor were {len(missing) - 1} others)" if len(missing) > 1 else "")
            )
        return list(order)


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def execution_order(model: nn.Module, batch: Batch, names: Sequence[str], forward: Forward | None = None) -> list[str]:
    """`names` in the order in which a run of `batch` calls them first. Runs no further than the last of them.

    Raises
    ------
    ValueError
        When one of them is not called.
    """
    with torch.no_grad():
        return Capture().run(model, batch, names, lambda name, module, tensor: None, forward=forward)
