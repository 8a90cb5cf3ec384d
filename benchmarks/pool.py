"""Mean over the real tokens of [32, 128, 2048]: `_core.pool` against NumPy and torch, one thread.

The prompts are 16 to 128 tokens long and padded on the right, 56 % of the tokens are real. The floor reads exactly the
real tokens where they lie. Array and mask do not fit the caches. The rivals multiply by a mask that was scaled
beforehand, for which they are not charged.

    python benchmarks/pool.py [--budget 1.5]
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from _machine import Case, main, read_floor, scaled_error

from lineas import _core
from lineas._checks import widen

BATCH, TOKENS, NEURONS = 32, 128, 2048


def case(x: np.ndarray, lengths: np.ndarray, name: str) -> Case:
    """`lengths` are the numbers of real tokens; x may hold bfloat16 bits, which NumPy cannot multiply."""
    mask = (np.arange(TOKENS) < lengths[:, None]).astype(np.uint8)
    scaled = (mask / lengths[:, None]).astype(np.float32)
    sixteen = x.dtype == np.uint16
    tensor = torch.from_numpy(x)
    tensor = tensor.view(torch.bfloat16) if sixteen else tensor
    weights = torch.from_numpy(scaled).to(tensor.dtype)
    rivals = {
        "torch bmm": lambda: torch.bmm(weights[:, None], tensor),
        "torch mul, sum": lambda: (tensor * weights[..., None]).sum(1),
        "torch einsum": lambda: torch.einsum("btd,bt->bd", tensor, weights),
    }
    if sixteen:
        wide = widen(x)
        rivals["float32 input"] = lambda: _core.pool(wide, mask, "mean", 1)
    else:
        rivals["np.einsum"] = lambda: np.einsum("btd,bt->bd", x, scaled)
        rivals["np.matmul"] = lambda: np.matmul(scaled[:, None], x)
    some = lengths.mean() < TOKENS
    kept = f"{lengths.mean() / TOKENS:.0%} kept"
    got, _ = _core.pool(x, mask, "mean", 1)
    exact = np.stack([widen(x[b, :length]).mean(axis=0, dtype=np.float64) for b, length in enumerate(lengths)])
    if sixteen:
        goals = {"float32 input": 1.5} if some else {}
    else:
        goals = {"reading": 1.25, "np.einsum": 1.8} if some else {}
    return Case(
        f"masked pooling{name}",
        f"{BATCH} x {TOKENS} x {NEURONS}, {kept}",
        lambda: _core.pool(x, mask, "mean", 1),
        floors={"reading": read_floor(*(x[b, :length] for b, length in enumerate(lengths)))},
        rivals=rivals,
        errors={"means": scaled_error(got, exact)},
        goals=goals,
    )


def cases() -> Iterator[Case]:
    x = np.random.default_rng(0).standard_normal((BATCH, TOKENS, NEURONS), np.float32)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    some = np.linspace(16, TOKENS, BATCH).round().astype(int)
    for lengths in (some, np.full(BATCH, TOKENS)):
        yield case(x, lengths, "")
        yield case(bits, lengths, ", bfloat16 input")


if __name__ == "__main__":
    main(__doc__, cases)
