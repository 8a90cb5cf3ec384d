"""Squared W2 and its gradient in u, target sorted once: `lineas.wasserstein_grad` against NumPy, torch and POT.

One thread. The floor is an in-cache copy of u's bytes. "Transposed" arrays lie as [d, n] already. The rivals that are
not said to sort both sides get the sorted target, as ours does; "torch, both sorted" is the published way: both sides
sorted along the last axis at every step, and autograd.

    python benchmarks/wasserstein.py [--budget 1.5] [--only "32 x 2048"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import ot
import torch
from _machine import Case, Floor, copy_floor, error, main, scaled_error
from torch import Tensor

import lineas
from lineas import _core
from lineas._checks import widen
from lineas.arrays import reference

SIZES = ((32, 2048), (32, 8192), (256, 256), (1000, 256), (10000, 256))
GOALS = {
    (32, 2048): {"copy": 7.0, "torch transposed": 48.0, "torch dim 0": 120.0},
    (256, 256): {"torch transposed": 17.0},
    (1000, 256): {"torch transposed": 13.0},
    (10000, 256): {"torch transposed": 8.0},
}


def samples(n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Source [n, d] and sorted target [m, d]."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, d), np.float32), np.sort(0.5 + 2 * rng.standard_normal((m, d), np.float32), axis=0)


def ours(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return lineas.wasserstein_grad(u, v, v_sorted=True)


def with_numpy(u: np.ndarray, v: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """The same by argsort; u and the sorted v lie as [n, d] for axis 0, as [d, n] for axis 1."""
    order = np.argsort(u, axis=axis)
    residual = np.take_along_axis(u, order, axis) - v
    gradient = np.empty_like(u)
    np.put_along_axis(gradient, order, residual * np.float32(2 / u.shape[axis]), axis)
    return np.mean(residual * residual, axis=axis), gradient


def with_torch(u: Tensor, v: Tensor, dim: int, both: bool = False) -> Tensor:
    """Gradient by autograd; `both` sorts v as well."""
    target = v.sort(dim).values if both else v
    loss = (u.sort(dim).values - target).square().mean(dim).sum()
    return torch.autograd.grad(loss, u)[0]


def errors(call: Callable, u: np.ndarray, v: np.ndarray) -> dict[str, float]:
    value, gradient = call(u, v)
    exact, exact_gradient, _, _ = reference.wasserstein(widen(u).astype(np.float64), v.astype(np.float64))
    return {"value": error(value, exact), "gradient": scaled_error(gradient, exact_gradient)}


def case(n: int, d: int) -> Case:
    u, v = samples(n, n, d)
    u_t, v_t = np.ascontiguousarray(u.T), np.ascontiguousarray(v.T)
    leaf, target = torch.from_numpy(u).requires_grad_(), torch.from_numpy(v)
    leaf_t, target_t = torch.from_numpy(u_t).requires_grad_(), torch.from_numpy(v_t)
    rivals = {
        "numpy transposed": lambda: with_numpy(u_t, v_t, 1),
        "numpy axis 0": lambda: with_numpy(u, v, 0),
        "torch transposed": lambda: with_torch(leaf_t, target_t, 1),
        "torch dim 0": lambda: with_torch(leaf, target, 0),
        "torch, both sorted": lambda: with_torch(leaf_t, target_t, 1, both=True),
    }
    if n <= 256:
        rivals["POT, value only"] = lambda: ot.wasserstein_1d(u, v, p=2)
    return Case(
        "W2 + gradient",
        f"{n} x {d}",
        lambda: ours(u, v),
        floors={"copy": copy_floor(n * d)},
        rivals=rivals,
        errors=errors(ours, u, v),
        goals=GOALS.get((n, d), {}),
    )


def bfloat16_case(n: int, d: int) -> Case:
    u, v = samples(n, n, d)
    bits = (u.view(np.uint32) >> 16).astype(np.uint16)

    def engine(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, gradients, _, _ = _core.wasserstein([u], [v], None, None, None, None, True, 2, ["u"], ["v"], 1)
        return values[0], gradients[0]

    return Case(
        "W2 + gradient, bfloat16 input",
        f"{n} x {d}",
        lambda: engine(bits, v),
        rivals={"float32 input": lambda: engine(u, v)},
        errors=errors(engine, bits, v),
        goals={"float32 input": 1.0} if n == 32 else {},
    )


def unequal_case(n: int, m: int, d: int) -> Case:
    u, v = samples(n, m, d)
    _, equal = samples(n, n, d)
    both = samples(m, m, d)
    return Case(
        "W2 + gradient, unequal sizes",
        f"{n} and {m} x {d}",
        lambda: ours(u, v),
        floors={f"{n} and {n} rows": Floor(lambda: ours(u, equal)), f"{m} and {m} rows": Floor(lambda: ours(*both))},
        errors=errors(ours, u, v),
        goals={f"{n} and {n} rows": 1.6},
    )


def cases() -> Iterator[Case]:
    for n, d in SIZES:
        yield case(n, d)
    yield bfloat16_case(32, 2048)
    yield bfloat16_case(1000, 256)
    yield unequal_case(32, 48, 2048)


if __name__ == "__main__":
    main(__doc__, cases)
