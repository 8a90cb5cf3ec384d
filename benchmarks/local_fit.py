"""Closed-form linear maps (Lin-AcT): `lineas.fit(method="linear")` against NumPy and torch, one thread.

All sort both samples and fit the line through the sorted pairs. "Transposed" arrays lie as [d, n] already. "One
neuron at a time" is the published way: float64, a Python loop over neurons; np.polyfit is the same with its line.
The second row fits 57 modules in one call.

    python benchmarks/local_fit.py [--budget 1.5]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from _machine import Case, Floor, main, scaled_error
from torch import Tensor

import lineas
from lineas.arrays import reference


def samples(n: int, d: int, modules: int) -> list[dict[str, np.ndarray]]:
    """Sources and targets."""
    rng = np.random.default_rng(0)
    return [
        {f"layers.{k}": shift + scale * rng.standard_normal((n, d), np.float32) for k in range(modules)}
        for shift, scale in ((np.float32(0), np.float32(1)), (np.float32(0.5), np.float32(2)))
    ]


def with_numpy(u: np.ndarray, v: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    u, v = np.sort(u, axis=axis), np.sort(v, axis=axis)
    mean_u, mean_v = u.mean(axis=axis, keepdims=True), v.mean(axis=axis, keepdims=True)
    u -= mean_u
    slope = np.sum(u * (v - mean_v), axis=axis, keepdims=True) / np.sum(u * u, axis=axis, keepdims=True)
    return slope, mean_v - slope * mean_u


def with_torch(u: Tensor, v: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    u, v = u.sort(dim).values, v.sort(dim).values
    mean_u, mean_v = u.mean(dim, keepdim=True), v.mean(dim, keepdim=True)
    u -= mean_u
    slope = (u * (v - mean_v)).sum(dim, keepdim=True) / u.square().sum(dim, keepdim=True)
    return slope, mean_v - slope * mean_u


def one_by_one(u: np.ndarray, v: np.ndarray, line: Callable) -> None:
    """`line(x, y)` for the sorted pairs of every row of u and v [d, n], in float64."""
    for x, y in zip(u, v, strict=True):
        line(np.sort(x.astype(np.float64)), np.sort(y.astype(np.float64)))


def closed_form(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    mean_x, mean_y = x.mean(), y.mean()
    x = x - mean_x
    slope = np.sum(x * (y - mean_y)) / np.sum(x * x)
    return slope, mean_y - slope * mean_x


def polyfit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.polyfit(x, y, 1)


def cases() -> Iterator[Case]:
    for n, d, modules in ((512, 2048, 1), (32, 2048, 57)):
        source, target = samples(n, d, modules)
        pairs = list(zip(source.values(), target.values(), strict=True))
        transposed = [tuple(np.ascontiguousarray(x.T) for x in pair) for pair in pairs]
        tensors = [tuple(torch.from_numpy(x) for x in pair) for pair in pairs]
        tensors_t = [tuple(torch.from_numpy(x) for x in pair) for pair in transposed]
        stacked = [np.concatenate(side, axis=0) for side in zip(*transposed, strict=True)]
        rivals = {
            "numpy transposed": lambda pairs=transposed: [with_numpy(*pair, 1) for pair in pairs],
            "numpy axis 0": lambda pairs=pairs: [with_numpy(*pair, 0) for pair in pairs],
            "torch transposed": lambda pairs=tensors_t: [with_torch(*pair, 1) for pair in pairs],
            "torch dim 0": lambda pairs=tensors: [with_torch(*pair, 0) for pair in pairs],
        }
        floors = {}
        if modules == 1:
            both = pairs[0]
            rivals["one neuron at a time"] = lambda pair=transposed[0]: one_by_one(*pair, closed_form)
            rivals["np.polyfit"] = lambda pair=transposed[0]: one_by_one(*pair, polyfit)
            floors["two sorts"] = Floor(lambda both=both: lineas._core.sort_columns(both, ["u", "v"], 1))
        else:
            batched = [torch.from_numpy(side) for side in stacked]
            rivals["torch batched"] = lambda batched=batched: with_torch(*batched, 1)
        got = lineas.fit(source, target, method="linear")["layers.0"]
        exact = reference.fit_local(*(x.astype(np.float64) for x in pairs[0]), None, None, "linear")
        yield Case(
            "local linear map",
            f"{n} x {d}" if modules == 1 else f"{modules} modules of {n} x {d}",
            lambda source=source, target=target: lineas.fit(source, target, method="linear"),
            floors=floors,
            rivals=rivals,
            errors={"w": scaled_error(got.weight, exact[0]), "b": scaled_error(got.bias, exact[1])},
            goals={"numpy axis 0": 11.0, "numpy transposed": 3.0} if modules == 1 else {},
        )


if __name__ == "__main__":
    main(__doc__, cases)
