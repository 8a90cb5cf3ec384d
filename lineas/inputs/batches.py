"""One call of a model, and its parts: `Batch`, and how one that the user made is divided into prompts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

# How transformers call the decoder of an encoder-decoder, and what in it sees the encoder's tokens.
_TOKENS = ("input_ids", "inputs_embeds")
# Names of masks [B, T]: in transformers nonzero is real, in torch True, or -inf, is padding.
_MASKS = ("attention_mask", "src_key_padding_mask", "key_padding_mask")
_DECODER_MASKS = ("decoder_attention_mask", "tgt_key_padding_mask")
# Masks that say nothing of the padding of the tokens they are given with.
_OTHER_MASKS = re.compile(
    r"^(encoder_attention_mask|memory_key_padding_mask|(src|tgt|memory)_mask|global_attention_mask|special_tokens_mask"
    r"|bool_masked_pos|mask_time_indices|(pixel|patch)_(attention_)?mask)$"
)
# Entries that are flattened over the images, by the sizes of these and their mark in "mm_token_type_ids".
_FLATTENED = (("image_grid_thw", 1, ("pixel_values",)),
              ("video_grid_thw", 2, ("pixel_values_videos", "second_per_grid_ts")))  # fmt: skip
_DECODER = re.compile(r"(^|\.)decoder(\.|$)")
_CROSS = re.compile(r"\.(EncDecAttention|encoder_attn|cross_?attn|cross_?attention)\.(.*\.)?(k|v|key|value|[kv]_proj)$")


@dataclass(frozen=True)
class Batch:
    """One call of a model: ``model(*args, **kwargs)``."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None  # [B, T], nonzero where a token is real; None where every one is
    prompt_length: Tensor | None = None  # [B], real tokens before the answer of each row; None for prompts alone
    whole: dict[str, Any] | None = None  # the arguments of the batch that this one is some rows of
    argument: str | None = None  # what messages call the prompts that it was made of; None if the user made it

    def mask_of(self, name: str, model: nn.Module) -> Tensor | None:
        """The mask [B, T] of the tokens that module `name` of `model` sees.

        In an encoder-decoder that is ``attention_mask`` for the encoder and the keys and values of the decoder's
        attention to it, and ``decoder_attention_mask``, where there is one, for the rest of the decoder; in torch's,
        ``src_key_padding_mask`` and ``tgt_key_padding_mask``.
        """
        return real_tokens(self.kwargs, _DECODER_MASKS) if self._in_decoder(name, model) else self.mask

    def unclear_mask(self, prompts: int) -> str | None:
        """The name of a mask of the tokens of so many prompts that may mark padding, of which it is not known how."""
        named = [(f"entry {i}", value, False) for i, value in enumerate(self.args)]
        named += [(repr(key), value, "mask" in key or "pad" in key) for key, value in self.kwargs.items()]
        for key, value, called in named:
            if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != prompts:
                continue
            if key.strip("'") in (*_MASKS, *_DECODER_MASKS):
                unclear = value.ndim > 2
            else:
                unclear = value.ndim == 2 and (called or value.dtype == torch.bool)
                unclear = unclear and not _OTHER_MASKS.match(key.strip("'"))
            if unclear and not (value == value.flatten()[:1]).all():  # one that says the same everywhere marks nothing
                return key
        return None

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
        return two is True or any(key.startswith("decoder_") or key == "tgt" for key in self.kwargs)

    @property
    def data(self) -> Any:
        """What the user gave, or would have given: the mapping, the one positional argument or all of them."""
        return self.kwargs if not self.args else self.args[0] if len(self.args) == 1 else self.args


def real_tokens(kwargs: Mapping[str, Any], names: Sequence[str] = _MASKS) -> Tensor | None:
    """The first mask [B, T] under one of these names, nonzero where a token is real."""
    for key in names:
        mask = kwargs.get(key)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            if key.endswith("attention_mask"):
                return mask
            return ~mask if mask.dtype == torch.bool else mask != -torch.inf
    return None


def as_batch(data: Any, argument: str) -> Batch:
    """One batch that the user made: a mapping, a tensor, or a tuple or list of positional arguments.

    Its mask is ``"attention_mask"``, or ``"src_key_padding_mask"`` or ``"key_padding_mask"``, where True is padding.

    TypeError or ValueError when it is none, is empty, or its ``"attention_mask"`` is not [batch, tokens] with a real
    token in every row.
    """
    if isinstance(data, Tensor):
        return Batch(args=(data,))
    positional = isinstance(data, tuple | list) and not any(isinstance(entry, str) for entry in data)
    if not positional and not isinstance(data, Mapping):
        raise TypeError(f"{argument} must be a mapping, a tensor or a tuple, got {type(data).__name__}")
    if not data:
        raise ValueError(f"{argument} is empty")
    if positional:
        return Batch(args=tuple(data))
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
    mask = real_tokens(kwargs)
    if mask is not None and not (mask != 0).any(dim=1).all():
        row = int((mask == 0).all(dim=1).nonzero()[0])
        key = next(key for key in _MASKS if kwargs.get(key) is not None)
        raise ValueError(f"{argument}: row {row} of {key!r} has no real token")
    return Batch(kwargs=kwargs, mask=mask)


def count(batch: Batch, argument: str) -> int:
    """The number of prompts in a batch; ValueError unless every tensor, array and list has an entry for each."""
    flattened = _of_images(batch, argument)
    entries = [(f"entry {i}", value) for i, value in enumerate(batch.args)]
    entries += [(repr(key), value) for key, value in batch.kwargs.items() if key not in flattened]
    sizes = {key: len(value) for key, value in entries if _has_rows(key, value, argument)}
    if not sizes:
        raise ValueError(f"{argument}: a batch without tensors, arrays or lists cannot be split into prompts")
    first, expected = next(iter(sizes.items()))
    for key, size in sizes.items():
        if size != expected:
            raise ValueError(
                f"{argument}: a batch can be split into prompts only where every tensor, array and list has an entry "
                f"for each: {first} has {expected}, {key} has {size}"
            )
    return expected


def _has_rows(key: str, value: Any, argument: str) -> bool:
    """Whether a value has an entry for each prompt; others, such as numbers and None, are the same for all."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0
    nested = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    if not isinstance(value, list) and any(isinstance(entry, Tensor | np.ndarray) for entry in nested):
        raise ValueError(
            f"{argument}: {key} is a {type(value).__name__} of tensors, which cannot be split into prompts"
        )
    return isinstance(value, list)


def _of_images(batch: Batch, argument: str) -> dict[str, list[range]]:
    """Where entries are flattened over the images of all prompts: which of their rows each prompt has.

    ValueError where it cannot be told.
    """
    found: dict[str, list[range]] = {}
    for key, mark, others in _FLATTENED:
        grids, marks = batch.kwargs.get(key), batch.kwargs.get("mm_token_type_ids")
        if grids is None:
            continue
        if not isinstance(marks, Tensor):
            raise ValueError(
                f"{argument}: a batch with {key!r} can be split into prompts only with 'mm_token_type_ids', which tell "
                "whose images they are"
            )
        tokens = [0, *(marks == mark).sum(dim=1).cumsum(dim=0).tolist()]
        images = [0, *grids.prod(dim=1).cumsum(dim=0).tolist()]
        ends = [
            count * images[-1] / max(tokens[-1], 1) for count in tokens
        ]  # a token stands for as many patches as any
        if not set(ends) <= set(images) or ends[-1] != images[-1]:
            raise ValueError(
                f"{argument}: {key!r} and 'mm_token_type_ids' do not tell which images belong to which prompt"
            )
        for name in (key, *others):
            bounds = [int(end) for end in ends] if name.startswith("pixel") else [images.index(end) for end in ends]
            found[name] = [range(*pair) for pair in itertools.pairwise(bounds)]
    return found


def take(batch: Batch, rows: Sequence[int] | NDArray, argument: str) -> Batch:
    """The prompts ``rows`` of a batch, in that order, with their own images."""
    flattened = _of_images(batch, argument)

    def part(key: str, value: Any, rows: Sequence[int] | NDArray) -> Any:
        if not _has_rows(key, value, argument):
            return value
        if isinstance(value, list):
            return [value[i] for i in rows]
        return (
            value[torch.as_tensor(rows, device=value.device)] if isinstance(value, Tensor) else value[np.asarray(rows)]
        )

    args = tuple(part(f"entry {i}", value, rows) for i, value in enumerate(batch.args))
    kwargs = {}
    for key, value in batch.kwargs.items():
        mine = [i for row in rows for i in flattened[key][row]] if key in flattened else rows
        if len(mine):  # prompts without images are called without any
            kwargs[key] = part(repr(key), value, mine)
    mask = None if batch.mask is None else real_tokens(kwargs)
    length = None if batch.prompt_length is None else part("prompt_length", batch.prompt_length, rows)
    whole = batch.kwargs if batch.whole is None else batch.whole
    return replace(batch, args=args, kwargs=kwargs, mask=mask, prompt_length=length, whole=whole)


def split(batches: Sequence[Batch], size: int | None, argument: str) -> list[Batch]:
    """The batches in parts of at most ``size`` prompts; None leaves them whole."""
    if size is None:
        return list(batches)
    parts = []
    for batch in batches:
        rows = range(count(batch, argument))
        if len(rows) <= size:
            parts.append(batch)
        else:
            parts += [take(batch, rows[start : start + size], argument) for start in range(0, len(rows), size)]
    return parts
