"""The price: how far the distribution of the next token moves on neutral texts.

One pass of the unsteered model serves all points that are measured on the same texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..inputs.call import call, unwrap, vocabulary_size
from ..inputs.tokenize import TokenRows
from .points import Point
from .texts import Texts

_NUMBERS = 1 << 25
"""Logits of a batch: several arrays of this size, in float32, are in memory at a time."""


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
        self.model, self.vocabulary = model, vocabulary_size(model)
        self.texts = Texts(data, "neutral", tokenizer=tokenizer, max_length=max_length)
        self._sizes = [len(ids) for ids in self.texts.ids]
        short = next((k for k, size in enumerate(self._sizes) if size < 2), None)
        if short is not None:
            raise ValueError(f"neutral[{short}] must have at least 2 tokens, so that one is predicted, got 1")
        order = sorted(range(len(self)), key=self._sizes.__getitem__)
        self.batches = self._divided(order, self._sizes)
        """Numbers of texts of much the same length."""

    def __len__(self) -> int:
        return len(self.texts)

    def half(self, second: bool) -> Neutral:
        """Every other text, from the first or from the second on."""
        texts = self.texts
        given = texts.given[int(second) :: 2]
        return Neutral(self.model, given, tokenizer=texts.tokenizer, max_length=texts.max_length)

    def measure(self, points: Iterable[Point], batch: int) -> Iterator[NDArray[np.float64]]:
        """`result.FIELDS` of a batch, [texts, fields], under each point; inside `frozen`, in which autograd is off.

        Not finite where the logits are not.
        """
        rows = self.batches[batch]
        sizes = [self._sizes[k] for k in rows]
        unsteered = self._log_probabilities(self.texts.rows, rows, sizes)
        probabilities, likeliest = unsteered.exp(), unsteered.argmax(dim=-1)
        for point in points:
            prompts = self._prompt_lengths(rows) if point.by_prompt else None
            counted = self.counted(point.instruction, rows)
            if prompts is not None:
                counted = [size - length + 1 for size, length in zip(sizes, prompts, strict=True)]
            here = None if counted == sizes else _last(sizes, counted).to(unsteered.device)
            before = unsteered if here is None else unsteered[here]
            steered = before
            if point.maps is not None or point.instruction is not None:
                with point.on(self.model, None if prompts is None else torch.tensor(prompts, device="cpu")):
                    steered = self._log_probabilities(self.texts.after(point.instruction), rows, counted)
            # Of differences of logarithms: cross-entropies less entropies would lose the digits of small ones.
            kl = torch.linalg.vecdot(probabilities if here is None else probabilities[here], before - steered)
            changed = steered.argmax(dim=-1) != (likeliest if here is None else likeliest[here])
            yield _by_text([self.texts.ids[k] for k in rows], counted, before, steered, kl, changed)

    def counted(self, instruction: str | None, rows: Sequence[int]) -> list[int]:
        """The number of tokens that each text ends with in the same way without an instruction and with it.

        ValueError if it is less than 2; TypeError for token ids, which have none before them.
        """
        if instruction is None:
            return [self._sizes[k] for k in rows]
        plain, after = self.texts.ids, self.texts.after(instruction).columns["input_ids"]
        return [_shared(plain[k], after[k], f"neutral[{k}]") for k in rows]

    def _log_probabilities(self, made: TokenRows, rows: Sequence[int], counted: Sequence[int]) -> Tensor:
        """Of the next token [tokens, V], in float32, after the last `counted` tokens of one text after the other."""
        sizes = [len(made.columns["input_ids"][k]) for k in rows]
        parts = []
        for part in self._divided(range(len(rows)), sizes):  # several where an instruction makes the texts longer
            batch = made.batch([rows[i] for i in part], "neutral")
            out = call(self.model, batch)
            logits = getattr(out, "logits", None)
            if not isinstance(logits, Tensor) or logits.shape[:2] != batch.kwargs["input_ids"].shape:
                raise ValueError(
                    "neutral: the model must give logits [batch, tokens, vocabulary], such as a transformers causal "
                    f"language model, got {type(out).__name__}"
                )
            assert batch.mask is not None
            found = logits[batch.mask.to(logits.device) != 0]
            if any(counted[i] < sizes[i] for i in part):
                found = found[_last([sizes[i] for i in part], [counted[i] for i in part]).to(found.device)]
            parts.append(found.float().log_softmax(dim=-1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _prompt_lengths(self, rows: Sequence[int]) -> list[int]:
        known = self.texts.rows.prompt_lengths or self._sizes
        lengths = [known[k] if known[k] < self._sizes[k] else self._sizes[k] // 2 for k in rows]
        return [max(length, 1) for length in lengths]

    def _divided(self, rows: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
        """Rows of these sizes in batches, in order, so many together that their logits fit into memory."""
        batches: list[list[int]] = []
        longest = 0
        for k in rows:
            longest = max(longest, sizes[k])
            if not batches or (len(batches[-1]) + 1) * longest * self.vocabulary > _NUMBERS:
                batches.append([])
                longest = sizes[k]
            batches[-1].append(k)
        return batches


def _by_text(
    ids: Sequence[Sequence[int]],
    counted: Sequence[int],
    before: Tensor,
    steered: Tensor,
    kl: Tensor,
    changed: Tensor,
) -> NDArray[np.float64]:
    """`result.FIELDS` of each text, from values at the last `counted` tokens of one text after the other."""
    # Of the last token of a text no next one is known.
    labels = [[*text[len(text) - count + 1 :], 0] for text, count in zip(ids, counted, strict=True)]
    wanted = torch.tensor([label for text in labels for label in text], device=steered.device)[:, None]
    ends: NDArray[np.int64] = np.cumsum(counted)
    starts = ends - counted

    def sums(values: Tensor, *, labelled: bool = False) -> NDArray[np.float64]:
        array = values.cpu().double().numpy()
        if labelled:
            array[ends - 1] = 0
        return np.add.reduceat(array, starts)

    loss, unsteered_loss = (sums(-values.gather(1, wanted)[:, 0], labelled=True) for values in (steered, before))
    kl = kl.clamp(min=0)  # rounding may leave it below
    tokens = np.asarray(counted, np.float64)
    last_kl = kl.cpu().double().numpy()[ends - 1]
    return np.stack([tokens, tokens - 1, loss, unsteered_loss, sums(kl), last_kl, sums(changed)], axis=1)


def _shared(plain: Sequence[int], other: Sequence[int], argument: str) -> int:
    """The number of tokens that both end with."""
    pairs = zip(plain[::-1], other[::-1], strict=False)
    count = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(plain), len(other)))
    if count < 2:
        raise ValueError(f"{argument} has less than 2 tokens in common with itself after the instruction")
    return count


def _last(sizes: Sequence[int], counted: Sequence[int]) -> Tensor:
    """Where, among the tokens of texts of these sizes one after the other, the last `counted` of each are."""
    ends = np.cumsum(sizes)
    return torch.from_numpy(np.concatenate([np.arange(end - k, end) for end, k in zip(ends, counted, strict=True)]))
