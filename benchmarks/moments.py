"""Streaming statistics of [100000, 1024]: `lineas.moments` against chunked NumPy and torch, one thread.

Count, mean, variance, smallest and largest value of every column, where the mean is 25 standard deviations. The floor
reads the array once. The rivals go through it in chunks of 4096 rows, in float32, and merge the chunks in float64.

    python benchmarks/moments.py [--budget 1.5]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from _machine import Case, error, main, read_floor

import lineas

ROWS, NEURONS, CHUNK = 100_000, 1024, 4096


def merged(x, parts: Callable) -> tuple[np.ndarray, ...]:
    """Mean, variance, smallest and largest by `parts(chunk)`, which gives the four of a chunk (ddof 0)."""
    count, mean, m2, low, high = 0, np.zeros(NEURONS), np.zeros(NEURONS), None, None
    for start in range(0, len(x), CHUNK):
        chunk = x[start : start + CHUNK]
        chunk_mean, chunk_variance, chunk_low, chunk_high = (np.asarray(part) for part in parts(chunk))
        share = len(chunk) / (count + len(chunk))
        delta = chunk_mean.astype(np.float64) - mean
        m2 += chunk_variance.astype(np.float64) * len(chunk) + delta * delta * (count * share)
        mean += delta * share
        low = chunk_low if low is None else np.minimum(low, chunk_low)
        high = chunk_high if high is None else np.maximum(high, chunk_high)
        count += len(chunk)
    return mean, m2 / (count - 1), low, high


def numpy_parts(chunk: np.ndarray) -> tuple[np.ndarray, ...]:
    return chunk.mean(axis=0), chunk.var(axis=0), chunk.min(axis=0), chunk.max(axis=0)


def torch_parts(chunk: torch.Tensor) -> tuple[torch.Tensor, ...]:
    variance, mean = torch.var_mean(chunk, dim=0, correction=0)
    return mean, variance, *torch.aminmax(chunk, dim=0)


def exact(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance in float64, a few columns at a time."""
    mean, variance = np.empty(NEURONS), np.empty(NEURONS)
    for start in range(0, NEURONS, 64):
        columns = x[:, start : start + 64].astype(np.float64)
        mean[start : start + 64] = columns.mean(axis=0)
        variance[start : start + 64] = columns.var(axis=0, ddof=1)
    return mean, variance


def errors(call: Callable[[], lineas.Moments], want: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    got = call()
    return {"mean": error(got.mean, want[0]), "variance": error(got.variance(), want[1])}


def engine(x: np.ndarray) -> lineas.Moments:
    """For bfloat16 bits, which `lineas.moments` takes as torch or ml_dtypes arrays only."""
    return lineas.moments(torch.from_numpy(x).view(torch.bfloat16))


def cases() -> Iterator[Case]:
    x = np.random.default_rng(0).standard_normal((ROWS, NEURONS), np.float32)
    x += 25
    tensor = torch.from_numpy(x)
    yield Case(
        "streaming moments",
        f"{ROWS} x {NEURONS}",
        lambda: lineas.moments(x),
        floors={"reading": read_floor(x)},
        rivals={
            "chunked numpy": lambda: merged(x, numpy_parts),
            "chunked torch": lambda: merged(tensor, torch_parts),
        },
        errors=errors(lambda: lineas.moments(x), exact(x)),
        goals={"reading": 1.6, "chunked numpy": 6.0, "variance": 1e-7},
    )
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    rounded = bits.astype(np.uint32)
    rounded <<= 16
    yield Case(
        "streaming moments, bfloat16 input",
        f"{ROWS} x {NEURONS}",
        lambda: engine(bits),
        floors={"reading": read_floor(bits)},
        rivals={"float32 input": lambda: lineas.moments(x)},
        errors=errors(lambda: engine(bits), exact(rounded.view(np.float32))),
    )


if __name__ == "__main__":
    main(__doc__, cases)
