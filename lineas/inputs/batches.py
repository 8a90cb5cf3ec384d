"""Parts of batches: a set of prompts in as many forward passes as fit into memory, and mini-batches drawn from it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

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


def count(batch: Batch, argument: str) -> int:
    """The number of prompts in a batch.

    Raises
    ------
    ValueError
        If the batch cannot be taken apart into prompts: tensors, arrays and lists must have one entry for each.
    """
    sizes = {key: len(value) for key, value in _entries(batch) if _has_rows(key, value, argument)}
    if not sizes:
        raise ValueError(f"{argument}: a batch without tensors, arrays or lists cannot be split into prompts")
    first = next(iter(sizes))
    for key, size in sizes.items():
        if size != sizes[first]:
            raise ValueError(
                f"{argument}: a batch can be split into prompts only where every tensor, array and list has an entry "
                f"for each: {first} has {sizes[first]}, {key} has {size}"
            )
    return sizes[first]


def _entries(batch: Batch) -> Iterator[tuple[str, Any]]:
    yield from ((f"entry {i}", value) for i, value in enumerate(batch.args))
    yield from ((repr(key), value) for key, value in batch.kwargs.items())


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


def take(batch: Batch, rows: Sequence[int] | NDArray, argument: str) -> Batch:
    """The prompts ``rows`` of a batch, in that order; padding that none of them needs goes where texts were padded."""
    index = torch.as_tensor(rows)

    def part(key: str, value: Any) -> Any:
        if not _has_rows(key, value, argument):
            return value
        if isinstance(value, list):
            return [value[i] for i in rows]
        return value[index.to(value.device)] if isinstance(value, Tensor) else value[np.asarray(rows)]

    args = tuple(part(f"entry {i}", value) for i, value in enumerate(batch.args))
    kwargs = {key: part(repr(key), value) for key, value in batch.kwargs.items()}
    mask = None if batch.mask is None else kwargs["attention_mask"]
    if batch.padded_here and mask is not None:
        real = mask.any(dim=0).nonzero()
        columns = slice(int(real[0]), int(real[-1]) + 1)
        kwargs = {key: value[:, columns].contiguous() for key, value in kwargs.items()}
        mask = kwargs["attention_mask"]
    return replace(batch, args=args, kwargs=kwargs, mask=mask)


def split(batches: Sequence[Batch], size: int | None, argument: str) -> list[Batch]:
    """The batches in parts of at most ``size`` prompts; None leaves them whole."""
    if size is None:
        return list(batches)
    parts = []
    for batch in batches:
        prompts = count(batch, argument)
        if prompts <= size:
            parts.append(batch)
        else:
            parts += [
                take(batch, range(start, min(start + size, prompts)), argument) for start in range(0, prompts, size)
            ]
    return parts


class Sampler:
    """Mini-batches of a set of prompts.

    Every epoch shuffles the prompts and deals them out in mini-batches of equal size; those left over wait for the
    next. What a step gets depends on the seed and on its number alone.

    Parameters
    ----------
    batches : sequence of Batch
        The whole set.
    size : int
        Prompts in a mini-batch.
    batch_size : int, optional
        Prompts in a forward pass, where that is fewer.
    seed : int
        Of the shuffling.
    argument : str
        What error messages call the set.

    Raises
    ------
    ValueError
        If there are fewer than ``size`` prompts, or a batch cannot be taken apart into prompts.
    """

    def __init__(
        self, batches: Sequence[Batch], size: int, *, batch_size: int | None, seed: int, argument: str
    ) -> None:
        self.batches, self.size, self.batch_size = list(batches), size, batch_size
        self.seed, self.argument = seed, argument
        self.starts = np.array([0, *itertools.accumulate(count(batch, argument) for batch in batches)])
        if size > self.prompts:
            raise ValueError(f"mini_batch must be at most the {self.prompts} prompts of {argument}, got {size}")

    @property
    def prompts(self) -> int:
        """How many prompts the set has."""
        return int(self.starts[-1])

    def draw(self, step: int) -> list[Batch]:
        """The mini-batch of a step, counted from 0: one batch for each of the set's that it has prompts of."""
        epoch, turn = divmod(step, self.prompts // self.size)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.prompts)
        chosen = order[turn * self.size : (turn + 1) * self.size]
        home = np.searchsorted(self.starts, chosen, side="right") - 1
        parts = [
            take(self.batches[k], chosen[home == k] - self.starts[k], self.argument) for k in np.unique(home).tolist()
        ]
        return split(parts, self.batch_size, self.argument)
