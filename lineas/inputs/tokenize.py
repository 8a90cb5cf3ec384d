"""Texts to batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .batches import Batch


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
