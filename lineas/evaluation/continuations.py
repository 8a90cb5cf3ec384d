"""Continuations of prompts, by the model's own ``generate``: the same random numbers at every point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..inputs.call import unwrap
from ..inputs.prompts import read
from ..inputs.tokenize import TokenRows
from .metrics import ngram_statistics
from .neutral import _as_list, with_instruction
from .points import Point
from .result import STATISTICS

SAMPLING: dict[str, Any] = {"do_sample": True, "top_p": 0.9, "top_k": 0, "temperature": 1.0}
"""How continuations are sampled unless something else is said."""


class Continuation(NamedTuple):
    """A text that a model wrote, and `STATISTICS` of it."""

    text: str
    statistics: tuple[float, ...]


class Generator:
    """Continues prompts in batches of prompts of much the same length.

    The random numbers of a batch depend on the seed and on its number alone: torch draws one number for every entry of
    the vocabulary, so that points whose distributions differ little give mostly the same tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        tokenizer: Any,
        *,
        samples: int,
        max_length: int | None,
        max_new_tokens: int,
        batch_size: int,
        sampling: Mapping[str, Any],
        seed: int,
        generate: Callable[[nn.Module, list[Any]], Sequence[str]] | None,
    ) -> None:
        self.model, self.tokenizer, self.generate = model, tokenizer, generate
        self.samples, self.max_length, self.max_new_tokens, self.seed = samples, max_length, max_new_tokens, seed
        self.options = {**SAMPLING, **sampling}
        self.prompts = _as_list(data)
        if generate is None:
            if not callable(getattr(model, "generate", None)):
                raise TypeError(f"prompts: {type(unwrap(model)).__name__} has no generate(): pass generate=")
            if not callable(getattr(tokenizer, "decode", None)):
                raise ValueError("prompts: pass tokenizer=, which makes texts of the tokens that the model writes")
        self.rows = None if generate is not None else self._read(self.prompts)
        if not isinstance(self.prompts, list) or not self.prompts:
            raise ValueError("prompts is empty")
        sizes = (
            [len(str(prompt)) for prompt in self.prompts]
            if self.rows is None
            else [len(ids) for ids in self.rows.columns["input_ids"]]
        )
        order = [k for k in sorted(range(len(sizes)), key=sizes.__getitem__) for _ in range(samples)]
        self.batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self._prefixed: dict[str, TokenRows] = {}

    def contents(self) -> Any:
        """Everything that what is written depends on, beside model and point."""
        prompts = self.prompts if self.rows is None else self.rows.columns
        size = max(map(len, self.batches))
        return [prompts, self.samples, self.max_new_tokens, repr(sorted(self.options.items())), self.seed, size]

    def run(self, point: Point, batch: int) -> list[Continuation]:
        """A continuation for each entry of a batch; the state of torch's random numbers is the caller's to keep."""
        rows = self.batches[batch]
        torch.manual_seed(int(np.random.SeedSequence([self.seed, batch]).generate_state(1)[0]))
        with point.on(self.model):
            if self.generate is not None:
                return self._by_caller(point, rows)
            made = self._rows(point.instruction).batch(rows)
            device = next(self.model.parameters()).device
            inputs = {key: made.kwargs[key].to(device) for key in ("input_ids", "attention_mask")}
            pad = getattr(self.tokenizer, "pad_token_id", None)
            model: Any = self.model
            tokens = model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                pad_token_id=self._ends()[0] if pad is None and self._ends() else pad,
                **self.options,
            )
        encoded = bool(getattr(getattr(unwrap(self.model), "config", None), "is_encoder_decoder", False))
        new = tokens[:, 1 if encoded else inputs["input_ids"].shape[1] :].tolist()
        return [self._continuation(ids) for ids in new]

    def _continuation(self, ids: list[int]) -> Continuation:
        ends = self._ends()
        end = next((k for k, token in enumerate(ids) if token in ends), None)
        kept = ids if end is None else ids[:end]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Continuation(text, self._statistics(kept, end is not None))

    def _by_caller(self, point: Point, rows: Sequence[int]) -> list[Continuation]:
        assert self.generate is not None
        prompts = [self.prompts[k] for k in rows]
        if point.instruction is not None:
            prompts = with_instruction(point.instruction, prompts)
        texts = list(self.generate(self.model, prompts))
        if len(texts) != len(prompts) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"generate must return one text a prompt: expected {len(prompts)}, got {len(texts)}")
        found = []
        for text in texts:
            words = text.split() if self.tokenizer is None else list(self.tokenizer(text)["input_ids"])
            numbers = {word: k for k, word in enumerate(dict.fromkeys(words))}
            found.append(Continuation(text, self._statistics([numbers[word] for word in words], None)))
        return found

    @staticmethod
    def _statistics(ids: Sequence[int], stopped: bool | None) -> tuple[float, ...]:
        ngrams = ngram_statistics(ids)
        return (
            float(len(ids)),
            float("nan") if stopped is None else float(stopped),
            *(ngrams[name] for name in STATISTICS[2:]),
        )

    def _ends(self) -> list[int]:
        """Ids of the tokens that end a text."""
        settings = getattr(self.model, "generation_config", None)
        ends = self.options.get("eos_token_id", getattr(settings, "eos_token_id", None))
        if ends is None:
            ends = getattr(self.tokenizer, "eos_token_id", None)
        return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [int(ends)]

    def _read(self, prompts: list[Any]) -> TokenRows:
        made = read(prompts, "prompts", tokenizer=self.tokenizer, max_length=self.max_length).made
        if not isinstance(made, TokenRows):
            raise TypeError("prompts must be texts, conversations or token ids, got batches")
        if made.prompt_lengths is not None:
            raise ValueError(
                "prompts: a conversation ends with an answer of the assistant: leave it out, the model is to write it"
            )
        return replace(made, left=True)

    def _rows(self, instruction: str | None) -> TokenRows:
        assert self.rows is not None
        if instruction is None:
            return self.rows
        if instruction not in self._prefixed:
            self._prefixed[instruction] = self._read(with_instruction(instruction, self.prompts))
        return self._prefixed[instruction]
