"""Continuations and losses of a language model, in plain loops: the same random numbers whatever is steered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


def nucleus(logits: Tensor, uniform: NDArray, top_p: float, first: int = 4096) -> Tensor:
    """Sample one token a row [n] among the likeliest that together have at least the probability `top_p`.

    The token is the one at which the distribution function, over tokens from the likeliest down, passes `uniform` [n]:
    rows whose probabilities differ little get the same token. Sorting all tokens takes long, so the `first` likeliest
    are tried before.
    """
    probabilities = logits.float().softmax(dim=-1).numpy()
    tokens = np.empty(len(probabilities), dtype=np.int64)
    rows = np.arange(len(probabilities))
    while len(rows):
        few = probabilities[rows]
        size = few.shape[1]
        likely = np.partition(few, size - first, axis=1)[:, -first:] if first < size else few
        enough = likely.sum(axis=1) >= top_p if first < size else np.full(len(rows), True)
        tokens[rows[enough]] = _nucleus(few[enough], likely[enough], uniform[rows[enough]], top_p)
        rows, first = rows[~enough], 8 * first
    return torch.from_numpy(tokens)


def _nucleus(probabilities: NDArray, likely: NDArray, uniform: NDArray, top_p: float) -> list[int]:
    """`nucleus` for rows of which the `likely` probabilities, in any order, are known to be enough."""
    likely = np.sort(likely, axis=1)[:, ::-1]
    mass = np.cumsum(likely, axis=1)
    count = (mass - likely < top_p).sum(axis=1)
    rows = np.arange(len(likely))
    place = np.minimum((mass < (uniform * mass[rows, count - 1])[:, None]).sum(axis=1), count - 1)
    value = likely[rows, place]
    # Which of the tokens of this probability, should there be several.
    rank = place - (likely > value[:, None]).sum(axis=1)
    pairs = zip(probabilities, value, rank, strict=True)
    return [int(np.flatnonzero(row == probability)[nth]) for row, probability, nth in pairs]


def _by_length(ids: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Numbers of texts in groups of `size` of much the same length, so that little is padded."""
    order = sorted(range(len(ids)), key=lambda k: len(ids[k]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _tokens(tokenizer: Any, texts: Sequence[str], prefix: str) -> tuple[list[list[int]], list[int]]:
    first = tokenizer(prefix)["input_ids"] if prefix else []
    return tokenizer(list(texts))["input_ids"], first


@torch.inference_mode()
def continuations(
    model: Any, tokenizer: Any, prompts: Sequence[str], uniforms: NDArray, *, prefix: str = "", size: int = 100
) -> list[str]:
    """Sample a continuation of each prompt by top_p 0.9, of as many tokens as `uniforms` [prompts, tokens] says."""
    texts, first = _tokens(tokenizer, prompts, prefix)
    found = [""] * len(texts)
    # The name that transformers had for it before is deprecated where the new one is known.
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    for group in _by_length(texts, size):
        rows = [first + texts[k] for k in group]
        longest = max(map(len, rows))
        padding = [longest - len(row) for row in rows]
        tokens = torch.tensor([[0] * pad + row for pad, row in zip(padding, rows, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache, new = None, []
        for step in range(uniforms.shape[1]):
            out = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=places,
                **{name: cache},
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out[name]
            tokens = nucleus(out.logits[:, -1], uniforms[group, step], 0.9)[:, None]
            new.append(tokens)
            mask = torch.cat([mask, mask.new_ones(len(group), 1)], dim=1)
            places = places[:, -1:] + 1
        for k, row in zip(group, torch.cat(new, dim=1).tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            found[k] = tokenizer.decode(row[:end], skip_special_tokens=True)
    return found


@torch.inference_mode()
def text_losses(
    model: Any, tokenizer: Any, texts: Sequence[str], *, prefix: str = "", size: int = 32
) -> tuple[NDArray, NDArray]:
    """Sum of the losses of each text's tokens but the first, in nats, and their number.

    The tokens of `prefix` are not counted, and neither is the first one after it, so that it is the same tokens with
    any prefix.
    """
    ids, first = _tokens(tokenizer, texts, prefix)
    sums, counts = np.zeros(len(ids)), np.array([len(row) - 1 for row in ids])
    for group in _by_length(ids, size):
        longest = max(len(ids[k]) for k in group)
        padding = [longest - len(ids[k]) for k in group]
        tokens = torch.tensor([first + ids[k] + [0] * pad for k, pad in zip(group, padding, strict=True)])
        mask = torch.tensor([[1] * (tokens.shape[1] - pad) + [0] * pad for pad in padding])
        logits = model(input_ids=tokens, attention_mask=mask, logits_to_keep=longest).logits
        for k, row, wanted in zip(group, logits, tokens[:, len(first) :], strict=True):
            n = counts[k]
            sums[k] = torch.nn.functional.cross_entropy(row[:n].float(), wanted[1 : n + 1], reduction="sum")
    return sums, counts


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[str], count: int, *, seed: int, new_tokens: int
) -> list[list[str]]:
    """Sample `count` continuations of every prompt (top_p 0.9, temperature 1), without the prompts themselves.

    The random numbers depend on `seed` and on the shape of the batch only.
    """
    torch.manual_seed(seed)
    repeated = [prompt for prompt in prompts for _ in range(count)]
    batch = tokenizer(repeated, return_tensors="pt", padding=True, padding_side="left")
    with torch.inference_mode():
        tokens = model.generate(
            **batch,
            do_sample=True,
            top_p=0.9,
            top_k=0,
            temperature=1.0,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    decoded = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [decoded[k * count : (k + 1) * count] for k in range(len(prompts))]


def text_loss(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """The model's mean cross-entropy per token of `texts`, in nats."""
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.inference_mode():
        return float(model(**batch, labels=labels).loss)


def bootstrap_interval(values: ArrayLike, seed: int, draws: int = 2000) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of `values` [n]."""
    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, values.size, size=(draws, values.size))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
