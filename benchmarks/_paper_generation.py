"""How continuations are sampled for the table of the paper."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import LogitsProcessor, LogitsProcessorList


class RepetitionPenalty(LogitsProcessor):
    """The repetition penalty of transformers, for batches: padding before a prompt does not count as said.

    transformers penalises all tokens of the input alike. Where a model pads with the token that ends a text, that makes
    the shorter prompts of a batch less likely to end than they are by themselves.
    """

    def __init__(self, penalty: float, pad: int) -> None:
        self.penalty, self.pad = penalty, pad

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        said = (input_ids != self.pad).cumsum(dim=1) > 0
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids, said.to(scores.dtype))
        penalised = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(counts > 0, penalised, scores)

    def __repr__(self) -> str:  # by which an evaluation knows again how it samples
        return f"RepetitionPenalty({self.penalty}, {self.pad})"


class Processors(LogitsProcessorList):
    """A list that is spelled as what is in it."""

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self))}]"


def sampling(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Arguments for ``generate``; those of the model's own generation settings are replaced."""
    pad = tokenizer.pad_token_id or 0  # which is what lineas pads with
    return {
        "do_sample": True,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "repetition_penalty": 1.0,
        "logits_processor": Processors([RepetitionPenalty(args.repetition_penalty, pad)]),
    }
