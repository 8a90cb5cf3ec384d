"""The price: how far the distribution of the next token moves on neutral texts.

One pass of the unsteered model serves all points that are measured on the same texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..inputs.call import call, unwrap
from ..inputs.prompts import read
from ..inputs.tokenize import TokenRows, is_conversation
from .points import Point, lengths

_NUMBERS = 1 << 25
"""Logits of a batch, in float32: several arrays of this size are in memory at a time."""


class Neutral:
    """Neutral texts, conversations or token ids, in batches whose logits fit into memory.

    Every token after the first is predicted. Where the tokens that maps act on depend on where the prompt ends, the
    prompt is all that stands before the answer of a conversation, or the first half of a text, and what is predicted
    from its last token on counts; it is the same tokens for the unsteered model.
    """

    def __init__(self, model: nn.Module, data: Any, *, tokenizer: Any = None, max_length: int | None = None) -> None:
        if getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False) is True:
            raise ValueError(
                "neutral: the price is of models that predict the next token of one text, this one has an "
                "encoder and a decoder"
            )
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.texts = _as_list(data)
        self.rows = self._read(self.texts)
        self._prefixed: dict[str, TokenRows] = {}
        sizes = self._sizes = [len(ids) for ids in self.rows.columns["input_ids"]]
        short = next((k for k, size in enumerate(sizes) if size < 2), None)
        if short is not None:
            raise ValueError(f"neutral[{short}] must have at least 2 tokens, so that one is predicted, got 1")
        self.batches = self._in_batches(_vocabulary(model))

    def __len__(self) -> int:
        return len(self._sizes)

    def contents(self) -> Any:
        """Everything that tells these texts from others."""
        return self.rows.columns

    def half(self, second: bool) -> Neutral:
        """Every other text, from the first or from the second on."""
        return Neutral(self.model, self.texts[int(second) :: 2], tokenizer=self.tokenizer, max_length=self.max_length)

    def measure(
        self, points: Sequence[Point], batch: int, done: Callable[[], Any] = lambda: None
    ) -> NDArray[np.float64]:
        """`result.FIELDS` of a batch under each point, [points, texts, fields]; `done` is called after each point."""
        rows = self.batches[batch]
        # Inside `frozen`, in which autograd is off: not inference_mode, whose tensors hooks of others may not like.
        logits = self._logits(self.rows, rows)
        unsteered = logits.log_softmax(dim=-1)
        del logits
        probabilities, likeliest = unsteered.exp(), unsteered.argmax(dim=-1)
        found = []
        for point in points:
            told = self._prompt_lengths(rows) if point.by_prompt else None
            prefixed = self._with_instruction(point.instruction)
            counted = [len(self.rows.columns["input_ids"][k]) for k in rows]
            if told is not None:
                counted = [size - length + 1 for size, length in zip(counted, told, strict=True)]
            if prefixed is not None:
                counted = [self._shared(prefixed, k) for k in rows]
            here = _ends(self._counts(self.rows, rows), counted).to(unsteered.device)
            if point.maps is None and prefixed is None:
                steered = unsteered
            else:
                with point.on(self.model, None if told is None else lengths(told)):
                    steered = self._logits(prefixed or self.rows, rows)
                there = _ends(self._counts(prefixed or self.rows, rows), counted).to(steered.device)
                steered = (steered if len(there) == len(steered) else steered[there]).log_softmax(dim=-1)
            whole = len(here) == len(unsteered)
            before = unsteered if whole else unsteered[here]
            # Of small differences of logarithms: cross-entropies less entropies would lose their digits.
            kl = torch.linalg.vecdot(probabilities if whole else probabilities[here], before - steered).clamp_(min=0)
            changed = steered.argmax(dim=-1) != (likeliest if whole else likeliest[here])
            found.append(self._by_text(rows, counted, before, steered, kl, changed))
            done()
        return np.stack(found)

    def _by_text(
        self, rows: Sequence[int], counted: Sequence[int], before: Tensor, steered: Tensor, kl: Tensor, changed: Tensor
    ) -> NDArray[np.float64]:
        """`result.FIELDS` of each text, from values at the last `counted` tokens of one text after the other."""
        ids = self.rows.columns["input_ids"]
        # Of the last token of a text no next one is known.
        labels = [[*ids[k][len(ids[k]) - count + 1 :], 0] for k, count in zip(rows, counted, strict=True)]
        wanted = torch.tensor([one for text in labels for one in text], device=steered.device)[:, None]
        ends: NDArray[np.int64] = np.cumsum(counted)
        starts = ends - np.asarray(counted)

        def sums(values: Tensor, *, labelled: bool) -> NDArray[np.float64]:
            array = values.double().cpu().numpy() if values.device.type != "mps" else values.cpu().double().numpy()
            if labelled:
                array[ends - 1] = 0
            return np.add.reduceat(array, starts)

        size = np.asarray(counted, np.float64)
        return np.stack(
            [
                size,
                size - 1,
                sums(-steered.gather(1, wanted)[:, 0], labelled=True),
                sums(-before.gather(1, wanted)[:, 0], labelled=True),
                sums(kl, labelled=False),
                kl.double().cpu().numpy()[ends - 1] if kl.device.type != "mps" else kl.cpu().double().numpy()[ends - 1],
                sums(changed, labelled=False),
            ],
            axis=1,
        )

    def _logits(self, made: TokenRows, rows: Sequence[int]) -> Tensor:
        """Logits [tokens, V] in float32 after every token of the texts `rows`, one text after the other."""
        batch = made.batch(rows)
        out = call(self.model, batch)
        logits = getattr(out, "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[:2] != batch.kwargs["input_ids"].shape:
            raise ValueError(
                "neutral: the model must give logits [batch, tokens, vocabulary], such as a transformers causal "
                f"language model, got {type(out).__name__}"
            )
        assert batch.mask is not None
        found = logits[batch.mask.to(logits.device) != 0].float()
        if not bool(torch.isfinite(found[:, 0]).all()):
            raise ValueError("neutral: the model's logits are not finite; lower the strength")
        return found

    def _read(self, texts: list[Any]) -> TokenRows:
        made = read(texts, "neutral", tokenizer=self.tokenizer, max_length=self.max_length).made
        if not isinstance(made, TokenRows):
            raise TypeError("neutral must be texts, conversations or token ids, got batches")
        return made

    def _with_instruction(self, instruction: str | None) -> TokenRows | None:
        """The texts with the instruction before each."""
        if instruction is None:
            return None
        if instruction not in self._prefixed:
            self._prefixed[instruction] = self._prefix(instruction)
        return self._prefixed[instruction]

    def _prefix(self, instruction: str) -> TokenRows:
        if not isinstance(self.texts[0], str):
            return self._read(with_instruction(instruction, self.texts))
        # By tokens, not by characters: so the tokens of the text stay what they are.
        first = list(self.tokenizer(instruction)["input_ids"])
        bos = getattr(self.tokenizer, "bos_token_id", None)
        twice = bos is not None and first[:1] == [bos]
        plain = self.rows.columns["input_ids"]
        rows = [first + (ids[1:] if twice and ids[:1] == [bos] else ids) for ids in plain]
        return replace(self.rows, columns={"input_ids": rows}, prompt_lengths=None)

    def _shared(self, prefixed: TokenRows, row: int) -> int:
        """The number of tokens that a text ends with in the same way without what was put before it and with it."""
        plain, other = self.rows.columns["input_ids"][row], prefixed.columns["input_ids"][row]
        count = next((k for k, (a, b) in enumerate(zip(plain[::-1], other[::-1], strict=False)) if a != b), len(plain))
        if count < 2:
            raise ValueError(f"neutral[{row}] has less than 2 tokens in common with itself after the instruction")
        return count

    def _prompt_lengths(self, rows: Sequence[int]) -> list[int]:
        known = self.rows.prompt_lengths
        return [
            max(self._sizes[k] // 2, 1) if known is None or known[k] >= self._sizes[k] else max(known[k], 1)
            for k in rows
        ]

    @staticmethod
    def _counts(made: TokenRows, rows: Sequence[int]) -> list[int]:
        return [len(made.columns["input_ids"][k]) for k in rows]

    def _in_batches(self, vocabulary: int) -> list[list[int]]:
        """Numbers of texts of much the same length, so many together that their logits fit into memory."""
        batches: list[list[int]] = []
        for k in sorted(range(len(self._sizes)), key=lambda k: self._sizes[k]):
            if not batches or (len(batches[-1]) + 1) * self._sizes[k] * vocabulary > _NUMBERS:
                batches.append([])
            batches[-1].append(k)
        return batches


def with_instruction(instruction: str, texts: Sequence[Any]) -> list[Any]:
    """Texts with the instruction before each; conversations with it as, or before, their system message."""
    found: list[Any] = []
    for text in texts:
        if isinstance(text, str):
            found.append(instruction + text)
        elif is_conversation(text):
            first = text[0]
            if first["role"] == "system":
                found.append([{**first, "content": f"{instruction}\n\n{first['content']}"}, *text[1:]])
            else:
                found.append([{"role": "system", "content": instruction}, *text])
        else:
            raise TypeError("instruction: it is put before texts and conversations, not before token ids")
    return found


def _ends(sizes: Sequence[int], counted: Sequence[int]) -> Tensor:
    """Where, among the tokens of texts of these sizes one after the other, the last `counted` of each are."""
    ends = np.cumsum(sizes)
    return torch.from_numpy(np.concatenate([np.arange(end - k, end) for end, k in zip(ends, counted, strict=True)]))


def _as_list(data: Any) -> list[Any]:
    """The texts as a list; what is none of the right kind is for `read` to say."""
    return list(data) if isinstance(data, Iterable) and not isinstance(data, str | Mapping | Tensor) else data


def _vocabulary(model: nn.Module) -> int:
    config: Any = getattr(unwrap(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else 1 << 16
