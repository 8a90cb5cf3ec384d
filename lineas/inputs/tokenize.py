"""Texts, conversations and token ids: tokenised once into rows, which are padded when they are run."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .batches import Batch

Tokenizer = Callable[..., Any]


@dataclass(frozen=True)
class TokenRows:
    """Prompts as token ids, not padded yet."""

    columns: dict[str, list[list[int]]]  # "input_ids" and what else the tokenizer gives: a list for each prompt
    prompt_lengths: list[int] | None  # tokens before the answer that a conversation ends with; None without answers
    pad_id: int  # what "input_ids" are padded with; other columns with 0
    left: bool  # whether padding goes before the tokens

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def batch(self, rows: Sequence[int] | NDArray, argument: str | None = None) -> Batch:
        """The prompts `rows`, in that order, padded no further than they need; messages call them `argument`."""
        kwargs = {key: self._pad([column[i] for i in rows], key) for key, column in self.columns.items()}
        mask = self._pad([[1] * len(self.columns["input_ids"][i]) for i in rows], "attention_mask")
        ends = self.prompt_lengths
        lengths = None if ends is None else torch.tensor([ends[i] for i in rows], device="cpu")
        return Batch(kwargs={**kwargs, "attention_mask": mask}, mask=mask, prompt_length=lengths, argument=argument)

    def _pad(self, rows: Sequence[Sequence[int]], key: str) -> Tensor:
        tensors = [torch.tensor(row, dtype=torch.long, device="cpu") for row in rows]
        fill, side = self.pad_id if key == "input_ids" else 0, "left" if self.left else "right"
        return pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side)


def joined(sets: Sequence[TokenRows]) -> TokenRows:
    """The rows of several sets, one set after the other, in the columns that all have."""
    shared = [key for key in sets[0].columns if all(key in one.columns for one in sets)]
    columns = {key: [row for one in sets for row in one.columns[key]] for key in shared}
    lengths = [length for one in sets for length in one.prompt_lengths or ()]
    known = all(one.prompt_lengths is not None for one in sets)
    return TokenRows(columns, lengths if known else None, sets[0].pad_id, sets[0].left)


# --- what may be given ------------------------------------------------------------------------------------------------


def is_conversation(entry: Any) -> bool:
    """Whether `entry` is a list of messages such as ``{"role": "user", "content": "..."}``."""
    return isinstance(entry, list | tuple) and bool(entry) and all(map(is_message, entry))


def is_message(entry: Any) -> bool:
    """Whether `entry` is one message of a conversation."""
    return isinstance(entry, Mapping) and isinstance(entry.get("role"), str)


def is_token_ids(entry: Any) -> bool:
    """Whether `entry` is a list of token ids, or an array [T] of them."""
    if isinstance(entry, np.ndarray):
        return entry.ndim == 1 and entry.dtype.kind in "iu"
    return isinstance(entry, list) and bool(entry) and all(map(_is_whole, entry))


def check_token_ids(entry: Any, name: str) -> None:
    """TypeError, which calls it `name`, for a list of numbers that are not all whole."""
    if not isinstance(entry, list) or not all(isinstance(one, numbers.Number) for one in entry):
        return
    for k, one in enumerate(entry):
        if not _is_whole(one):
            raise TypeError(f"{name} must be whole numbers where it is token ids, got {one!r} at index {k}")


def _is_whole(value: Any) -> bool:
    return type(value) is int or isinstance(value, np.integer)


KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda entry: isinstance(entry, str),
    "conversation": is_conversation,
    "list of token ids": is_token_ids,
}


def tokenize(
    entries: Sequence[Any], kind: str, tokenizer: Tokenizer | None, max_length: int | None, argument: str
) -> TokenRows:
    """Tokenise entries of one of `KINDS`.

    Conversations are rendered by the tokenizer's chat template: where the last message is not the assistant's, the
    start of its answer follows, as when it is generated. No beginning-of-text token is put twice: neither by a
    template, nor before a text that starts with one, as texts do that a template rendered.

    The tokenizer of transformers, which texts and conversations need, is not modified: padding is done here, on its
    ``padding_side`` (on the right without a tokenizer), also where it has no pad token. Prompts of more than
    `max_length` tokens are cut on its ``truncation_side``.

    TypeError or ValueError, which call the entries `argument`, for entries of another kind, texts and conversations
    without a tokenizer, a tokenizer without a chat template, and an entry without tokens.
    """
    for i, entry in enumerate(entries):
        if not KINDS[kind](entry):
            raise TypeError(f"{argument}[{i}] must be a {kind} like the entries before it, got {type(entry).__name__}")
    if tokenizer is None and kind != "list of token ids":
        raise ValueError(f"{argument} holds {kind}s: pass tokenizer=")
    from_left = getattr(tokenizer, "truncation_side", "right") == "left"
    lengths = None
    if kind == "text":
        assert tokenizer is not None
        cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
        columns = _texts(list(entries), tokenizer, cut)
    else:
        if kind == "conversation":
            rendered = [_render(entry, tokenizer, f"{argument}[{i}]") for i, entry in enumerate(entries)]
            if any(length < len(ids) for ids, length in rendered):
                lengths = [length for _, length in rendered]
            entries = [ids for ids, _ in rendered]
        columns = {"input_ids": [[int(one) for one in entry] for entry in entries]}
        if max_length is not None:
            if lengths is not None and from_left:
                surplus = [max(len(ids) - max_length, 0) for ids in columns["input_ids"]]
                lengths = [max(length - more, 0) for length, more in zip(lengths, surplus, strict=True)]
            part = slice(-max_length, None) if from_left else slice(max_length)
            columns = {"input_ids": [ids[part] for ids in columns["input_ids"]]}
    for i, ids in enumerate(columns["input_ids"]):
        if not len(ids):
            raise ValueError(f"{argument}[{i}] has no tokens: {entries[i]!r}")
    # A tokenizer without a pad token pads with 0: any id will do under the mask.
    pad_id = getattr(tokenizer, "pad_token_id", None) or 0
    return TokenRows(columns, lengths, pad_id, getattr(tokenizer, "padding_side", "right") == "left")


def _texts(texts: list[str], tokenizer: Tokenizer, cut: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    columns = dict(tokenizer(texts, **cut))
    columns.pop("attention_mask", None)  # made by the one that pads
    bos = getattr(tokenizer, "bos_token_id", None)
    twice = [bos is not None and list(ids[:2]) == [bos, bos] for ids in columns["input_ids"]]
    if any(twice) and list(tokenizer("")["input_ids"])[:1] == [bos]:  # one of them is the tokenizer's own
        columns = {
            key: [row[1:] if double else row for row, double in zip(rows, twice, strict=True)]
            for key, rows in columns.items()
        }
    return columns


def _render(conversation: Sequence[Mapping[str, Any]], tokenizer: Any, argument: str) -> tuple[list[int], int]:
    """Token ids of a conversation, and how many of them stand before the answer that it ends with, or all."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{argument} is a conversation, and {type(tokenizer).__name__} has no chat template")

    def ids(messages: Sequence[Mapping[str, Any]], start_answer: bool) -> list[int]:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=start_answer, return_dict=True
        )["input_ids"]

    answered = conversation[-1]["role"] == "assistant"
    whole = ids(conversation, not answered)
    if not answered or len(conversation) == 1:
        return whole, 0 if answered else len(whole)
    # The start of an answer may hold what only one that is being generated has, such as a tag of reasoning.
    prompt = ids(conversation[:-1], True)
    length = next((k for k, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), len(prompt))
    if length < len(prompt) and length < len(ids(conversation[:-1], False)):
        raise ValueError(
            f"{argument}: the chat template does not render the answer after its prompt, so it is not found"
        )
    return whole, length
