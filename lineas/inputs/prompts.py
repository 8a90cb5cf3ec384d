"""Sets of prompts: what users hand over as source, target or data, in batches of the size that is asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from . import batches, tokenize
from .batches import Batch

BATCH_SIZE = 32
"""Texts in a forward pass where nothing else is said."""


class Prompts:
    """A set of prompts: rows of tokens, or batches that the user made. Error messages call it `argument`."""

    def __init__(self, made: tokenize.TokenRows | list[Batch], argument: str) -> None:
        self.made, self.argument = made, argument

    @property
    def answered(self) -> bool:
        """Whether there are answers after the prompts."""
        return isinstance(self.made, tokenize.TokenRows) and self.made.prompt_lengths is not None

    def counts(self) -> list[int]:
        """How many prompts there are, in each batch that the user made; ValueError where that cannot be told."""
        if isinstance(self.made, tokenize.TokenRows):
            return [len(self.made)]
        return [batches.count(batch, self.argument) for batch in self.made]

    def parts(self, batch_size: int | None = None) -> list[Batch]:
        """All prompts in batches of at most `batch_size`; by default 32, and batches that the user made as they are."""
        if not isinstance(self.made, tokenize.TokenRows):
            return batches.split(self.made, batch_size, self.argument)
        return self.take(range(len(self.made)), batch_size)

    def take(self, rows: Sequence[int] | NDArray, batch_size: int | None = None) -> list[Batch]:
        """The prompts `rows`, in that order, or in that order out of each batch that the user made."""
        if isinstance(self.made, tokenize.TokenRows):
            size = batch_size or BATCH_SIZE
            return [self.made.batch(rows[start : start + size], self.argument) for start in range(0, len(rows), size)]
        rows = np.asarray(rows)
        starts = np.cumsum([0, *self.counts()])
        home = np.searchsorted(starts, rows, side="right") - 1
        parts = [batches.take(self.made[k], rows[home == k] - starts[k], self.argument) for k in np.unique(home)]
        return batches.split(parts, batch_size, self.argument)

    def parts_of(self, entries: int, batch_size: int | None = None) -> int | None:
        """How many `parts` so many entries like these make; None where that cannot be told, and of none."""
        if isinstance(self.made, tokenize.TokenRows):
            return -(-entries // (batch_size or BATCH_SIZE)) or None
        return entries or None if batch_size is None else None

    def first(self) -> Batch:
        """A batch to look at: the first two prompts, or the first batch that the user made."""
        if isinstance(self.made, tokenize.TokenRows):
            return self.made.batch(range(min(2, len(self.made))), self.argument)
        return self.made[0]

    def contents(self) -> Any:
        """Everything that tells this set from another."""
        if isinstance(self.made, tokenize.TokenRows):
            return [self.made.columns, self.made.prompt_lengths]
        return [[batch.args, batch.kwargs] for batch in self.made]


def read(
    data: Any, argument: str, *, tokenizer: tokenize.Tokenizer | None = None, max_length: int | None = None
) -> Prompts:
    """Read what a user handed over: texts, conversations, token ids, a batch, or an iterable of batches.

    Texts are strings; conversations lists of messages with "role" and "content"; token ids lists of integers. A batch
    is a mapping, called as ``model(**batch)``, whose ``"attention_mask"``, where there is one, is the mask of its
    tokens; or a tensor or tuple, called as ``model(x)`` or ``model(*x)``. In an iterable of batches a list is taken
    like a tuple, since that is what a `DataLoader` gives. Error messages call it `argument`.

    TypeError or ValueError for empty data, entries that are neither prompts nor batches, and as `tokenize.tokenize`.
    """
    if isinstance(data, str):
        raise TypeError(f"{argument} is one string: give a list of texts")
    if tokenize.is_message(data):
        raise TypeError(f"{argument} is one message: give a list of conversations, which are lists of messages")
    if isinstance(data, Tensor | Mapping) or (isinstance(data, tuple) and _kind(data) is None):
        return Prompts([batches.as_batch(data, argument)], argument)
    if not isinstance(data, Iterable):
        raise TypeError(
            f"{argument} must be texts, conversations, token ids, a batch (mapping, tensor or tuple) or a list of "
            f"batches, got {type(data).__name__}"
        )
    entries = list(data)
    if not entries:
        used_up = ": an iterator can be read once, and this one gave nothing" if isinstance(data, Iterator) else ""
        raise ValueError(f"{argument} is empty{used_up}")
    if all(map(tokenize.is_message, entries)):
        raise TypeError(f"{argument} is one conversation: give a list of them")
    if tokenize.is_token_ids(entries):
        raise TypeError(f"{argument} is one list of token ids: give a list of them")
    tokenize.check_token_ids(entries, argument)
    for i, entry in enumerate(entries):
        tokenize.check_token_ids(entry, f"{argument}[{i}]")
    kind = _kind(entries)
    if kind is not None:
        return Prompts(tokenize.tokenize(entries, kind, tokenizer, max_length, argument), argument)
    return Prompts([batches.as_batch(entry, f"{argument}[{i}]") for i, entry in enumerate(entries)], argument)


def is_stream(data: Any) -> bool:
    """Whether `data` is an iterable that need not be in memory as a whole, such as a generator or a `DataLoader`."""
    return isinstance(data, Iterable) and not isinstance(data, Sequence | Mapping | Tensor | np.ndarray)


def blocks(
    data: Iterable[Any],
    argument: str,
    *,
    tokenizer: tokenize.Tokenizer | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
) -> Iterator[Prompts]:
    """What `read` gives, of an iterable that is read as it is needed: `batch_size` prompts at a time, or one batch.

    Errors are those of `read`, raised where the iterable has come to; messages call a block ``data[64:96]``.
    """
    entries, start, first_kind = iter(data), 0, None
    for entry in entries:
        kind = "message" if tokenize.is_message(entry) else _kind([entry])
        if kind == "message":
            raise TypeError(f"{argument} is one conversation: give an iterable of them")
        if start and kind != first_kind:
            raise TypeError(
                f"{argument}[{start}] must be a {first_kind or 'batch'} like the entries before it, got "
                f"{type(entry).__name__}"
            )
        first_kind = kind
        if kind is None:
            yield Prompts([batches.as_batch(entry, f"{argument}[{start}]")], argument)
            start += 1
        else:
            block = [entry, *itertools.islice(entries, (batch_size or BATCH_SIZE) - 1)]
            end = start + len(block)
            yield read(block, f"{argument}[{start}:{end}]", tokenizer=tokenizer, max_length=max_length)
            start = end
    if not start:
        raise ValueError(f"{argument} is empty")


def _kind(entries: Sequence[Any]) -> str | None:
    """What the entries are, by the first of them; None for batches. A tuple is a batch unless all entries are alike."""
    found = next((kind for kind, holds in tokenize.KINDS.items() if entries and holds(entries[0])), None)
    if found is not None and isinstance(entries, tuple) and not all(map(tokenize.KINDS[found], entries)):
        return None
    return found


def join(sets: Sequence[Prompts]) -> Prompts:
    """The prompts of several sets, one set after the other."""
    if len(sets) == 1:
        return sets[0]
    argument = " and ".join(one.argument for one in sets)
    rows = [one.made for one in sets if isinstance(one.made, tokenize.TokenRows)]
    if len(rows) == len(sets):
        return Prompts(tokenize.joined(rows), argument)
    return Prompts([batch for one in sets for batch in one.parts()], argument)


class Sampler:
    """Mini-batches of `size` of the prompts, in parts of at most `batch_size`.

    Every epoch shuffles the prompts and deals them out in mini-batches of equal size; those left over wait for the
    next. What a step gets depends on the seed and on its number alone. ValueError if there are fewer than `size`
    prompts, or a batch cannot be taken apart into prompts.
    """

    def __init__(self, prompts: Prompts, size: int, *, batch_size: int | None, seed: int) -> None:
        self.prompts, self.size, self.batch_size, self.seed = prompts, size, batch_size, seed
        self.total = sum(prompts.counts())
        if size > self.total:
            raise ValueError(f"mini_batch must be at most the {self.total} prompts of {prompts.argument}, got {size}")

    def draw(self, step: int) -> list[Batch]:
        """The mini-batch of a step, counted from 0."""
        epoch, turn = divmod(step, self.total // self.size)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.total)
        return self.prompts.take(order[turn * self.size : (turn + 1) * self.size], self.batch_size)
