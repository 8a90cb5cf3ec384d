"""Texts that are evaluated on: read once into tokens, also with an instruction before each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ..inputs.prompts import read
from ..inputs.tokenize import KINDS, TokenRows, is_conversation


class Texts:
    """Texts, conversations or lists of token ids: what was given, and its tokens. Errors call it `argument`.

    TypeError or ValueError as of `lineas.inputs.prompts.read`, and for batches.
    """

    def __init__(self, data: Any, argument: str, *, tokenizer: Any = None, max_length: int | None = None) -> None:
        self.argument, self.tokenizer, self.max_length = argument, tokenizer, max_length
        self.given = as_list(data)
        self.rows = self._read(self.given, max_length)
        self.ids = self.rows.columns["input_ids"]
        self._after: dict[str, TokenRows] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def contents(self) -> Any:
        """Everything that tells these texts from others."""
        return [self.ids, self.rows.prompt_lengths]

    def after(self, instruction: str | None) -> TokenRows:
        """The tokens with the instruction before each text: those of the texts themselves stay what they are."""
        if instruction is None:
            return self.rows
        if instruction not in self._after:
            if isinstance(self.given[0], str):
                rows = self._inserted(instruction)
            else:
                rows = self._rendered(instruction)
            self._after[instruction] = replace(self.rows, columns={"input_ids": rows}, prompt_lengths=None)
        return self._after[instruction]

    def _inserted(self, instruction: str) -> list[list[int]]:
        """By tokens, not by characters, after the beginning-of-text token where there is one."""
        added = list(self.tokenizer(instruction, add_special_tokens=False)["input_ids"])
        bos = getattr(self.tokenizer, "bos_token_id", None)
        starts = [int(bos is not None and ids[:1] == [bos]) for ids in self.ids]
        return [[*ids[:start], *added, *ids[start:]] for ids, start in zip(self.ids, starts, strict=True)]

    def _rendered(self, instruction: str) -> list[list[int]]:
        """By the chat template; what `max_length` cut off at the end is cut off here, too."""
        rows = self._read(with_instruction(instruction, self.given), None).columns["input_ids"]
        if self.max_length is None or getattr(self.tokenizer, "truncation_side", "right") == "left":
            return rows
        whole = self._read(self.given, None).columns["input_ids"]
        cut = [len(ids) - len(kept) for ids, kept in zip(whole, self.ids, strict=True)]
        return [ids[: len(ids) - less] for ids, less in zip(rows, cut, strict=True)]

    def _read(self, texts: list[Any], max_length: int | None) -> TokenRows:
        made = read(texts, self.argument, tokenizer=self.tokenizer, max_length=max_length).made
        if not isinstance(made, TokenRows):
            raise TypeError(f"{self.argument} must be texts, conversations or token ids, got batches")
        return replace(made, columns={"input_ids": made.columns["input_ids"]})  # as `generate` gets them


def as_list(data: Any) -> Any:
    """The texts as a list of what JSON can hold; what is none of the right kind is for others to refuse."""
    if not isinstance(data, Iterable) or isinstance(data, str | bytes | Mapping | Tensor):
        return data
    return [entry.tolist() if isinstance(entry, np.ndarray | np.generic) else entry for entry in data]


def check_kinds(texts: Any, argument: str) -> list[Any]:
    """`texts`; TypeError or ValueError unless they are a list of texts, of conversations or of token ids."""
    if isinstance(texts, list) and texts:
        holds = next((holds for holds in KINDS.values() if holds(texts[0])), None)
        if holds is not None and all(map(holds, texts)):
            return texts
    if isinstance(texts, list) and not texts:
        raise ValueError(f"{argument} is empty")
    kind = "one string" if isinstance(texts, str) else type(texts).__name__
    raise TypeError(f"{argument} must be a list of texts, of conversations or of token ids, got {kind}")


def with_instruction(instruction: str, texts: Sequence[Any]) -> list[Any]:
    """Texts with the instruction before each; conversations with it as, or before, their system message."""
    found: list[Any] = []
    for text in texts:
        if isinstance(text, str):
            found.append(instruction + text)
        elif is_conversation(text):
            first, rest = (text[0], text[1:]) if text[0]["role"] == "system" else ({"role": "system"}, text)
            said = first.get("content", "")
            if isinstance(said, str):
                said = f"{instruction}\n\n{said}" if said else instruction
            else:  # a list of texts and images
                said = [{"type": "text", "text": instruction}, *said]
            found.append([{**first, "content": said}, *rest])
        else:
            raise TypeError("instruction: it is put before texts and conversations, not before token ids")
    return found
