"""Call a model that somebody else loaded as it is, with the arguments that it needs, and see through its wrappers."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .batches import Batch, real_tokens

Forward: TypeAlias = Callable[[nn.Module, Any], Any]

WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and torch's checkpoint wrapper call the module in them."""


def call(model: nn.Module, batch: Batch, forward: Forward | None = None) -> Any:
    """Call `model` on `batch`, its tensors moved to the device of the model's first parameter.

    ``forward(model, data)`` calls the model in its own way; `data` is the mapping, tensor or tuple of the batch, passed
    on without additions (a tuple of one arrives as its entry).

    Without `forward` two arguments are added where the model's forward has them and the batch does not:
    ``use_cache=False``, and under left padding ``position_ids``, the cumulated mask - 1. Without them models with
    absolute positions, like GPT-2, see every prompt shifted by its padding. Models that skip padding by themselves get
    none: vision-language models with positions along three axes (M-RoPE), and the RoBERTa family.

    ValueError, without `forward`, for token ids of prompts that the model has no embeddings for.
    """
    if batch.whole is not None:
        check_images(model, batch.whole)
    device = _device(model)
    args, kwargs = _to(batch.args, device), _to(batch.kwargs, device)
    if forward is not None:
        return forward(model, Batch(args, kwargs).data)
    _check_token_ids(model, batch)
    # A wrapper's forward is (*args, **kwargs): the model inside tells.
    accepted = inspect.signature(unwrap(model).forward).parameters
    batch = by_name(model, batch)
    if "use_cache" in accepted:
        kwargs.setdefault("use_cache", False)
    if "position_ids" in accepted and "position_ids" not in batch.kwargs:
        positions = _position_ids(model, batch)
        if positions is not None:
            kwargs["position_ids"] = positions.to(device)
    with _rope_deltas_kept(model):
        return model(*args, **kwargs)


def by_name(model: nn.Module, batch: Batch) -> Batch:
    """The batch with its positional arguments under the names that the model's forward has for them, and its mask."""
    if not batch.args:
        return batch
    parameters = inspect.signature(unwrap(model).forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    kwargs = dict(zip(names, batch.args, strict=False)) | batch.kwargs
    return replace(batch, args=batch.args[len(names) :], kwargs=kwargs, mask=real_tokens(kwargs))


IMAGES = {
    "pixel_values": ("image_token_id", "image_token_index"),
    "pixel_values_videos": ("video_token_id", "video_token_index"),
    "input_features": ("audio_token_id", "audio_token_index"),
}
"""Images, videos and sounds, and what configurations call the token that stands for a part of them."""


def check_images(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """ValueError where as many images as prompts, or videos or sounds, are not one a prompt."""
    ids, config = kwargs.get("input_ids"), getattr(unwrap(model), "config", None)
    if not isinstance(ids, Tensor) or any(kwargs.get(key) is not None for key in ("image_grid_thw", "video_grid_thw")):
        return  # where there are such sizes, they tell
    for key, names in IMAGES.items():
        token = next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
        if kwargs.get(key) is not None and token is not None and not (ids == token).any(dim=1).all():
            row = int((ids == token).any(dim=1).long().argmin())
            raise ValueError(
                f"which of {key!r} belongs to which prompt cannot be told: row {row} of 'input_ids' has no token "
                f"{token} for one; give each prompt one, or batches of the size that is to run, without batch_size= "
                "and mini_batch="
            )


def _check_token_ids(model: nn.Module, batch: Batch) -> None:
    """ValueError where token ids of prompts are none of the model's: they would take a GPU from the process for good.

    Batches that the user made are left alone: ids beyond the vocabulary may stand for images.
    """
    ids = batch.kwargs.get("input_ids")
    if batch.argument is None or not isinstance(ids, Tensor):
        return
    find = getattr(unwrap(model), "get_input_embeddings", None)
    try:
        size = getattr(find() if callable(find) else None, "num_embeddings", None)
    except (AttributeError, NotImplementedError):  # of models without
        return
    if isinstance(size, int) and not ((ids >= 0) & (ids < size)).all():
        wrong = int(ids[(ids < 0) | (ids >= size)][0])
        raise ValueError(
            f"{batch.argument}: token ids must be from 0 to {size - 1}, which {type(unwrap(model)).__name__} has "
            f"embeddings for, got {wrong}"
        )


@contextmanager
def _rope_deltas_kept(model: nn.Module) -> Iterator[None]:
    """Keep what models with M-RoPE note of the latest images, by which they go on with a text that is in a cache."""
    noted = [(module, module.rope_deltas) for module in model.modules() if "rope_deltas" in vars(module)]
    try:
        yield
    finally:
        for module, deltas in noted:
            module.rope_deltas = deltas


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


def vocabulary_size(model: nn.Module) -> int:
    """How many tokens a language model knows, as its configuration says; a large number where nothing does."""
    config: Any = getattr(unwrap(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else 1 << 16


def _position_ids(model: nn.Module, batch: Batch) -> Tensor | None:
    """Positions counted from the first real token; None where the model's own are right."""
    mask = batch.mask
    tokens = batch.kwargs.get("input_ids", batch.kwargs.get("inputs_embeds"))
    if mask is None or tokens is None or mask.shape != tokens.shape[:2]:
        return None
    real = mask != 0
    if not (real[:, 1:] & ~real[:, :-1]).any():  # no real token follows a padded one
        return None
    kinds = {type(module): module for module in model.modules()}
    owners = [module for kind, module in kinds.items() if _counts_positions(kind)]
    positions = (real.long().cumsum(dim=1) - 1).clamp_(min=0)
    if not owners:
        return positions
    # The RoBERTa family counts from the pad id + 1, and finds padding by the ids alone.
    starts = [start for module in owners if isinstance(start := getattr(module, "padding_idx", None), int)]
    if "input_ids" in batch.kwargs or not starts:
        return None
    start = starts[0]
    return torch.where(real, positions + start + 1, start)


_COUNTING = ("get_rope_index", "create_position_ids_from_input_ids")
"""What transformers call the functions by which a model computes positions itself, padding left out: with M-RoPE, and
in the RoBERTa family, where it may be a function of the file."""


def _counts_positions(kind: type[nn.Module]) -> bool:
    return any(hasattr(kind, name) or hasattr(sys.modules.get(kind.__module__), name) for name in _COUNTING)
