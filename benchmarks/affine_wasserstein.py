"""Squared W2 of the mapped sample w z + b, with its gradients: `_core.wasserstein` against NumPy and torch, one thread.

The floor is an in-cache copy of z's bytes; the target is sorted once. "Transposed" arrays lie as [d, n] already.
"torch, both sorted" is the published way: both sides sorted along the last axis at every step, and autograd.

    python benchmarks/affine_wasserstein.py [--budget 1.5]
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from _machine import Case, copy_floor, error, main, scaled_error
from torch import Tensor
from wasserstein import samples

from lineas import _core
from lineas.arrays import reference


def engine(z: np.ndarray, v: np.ndarray, weight: np.ndarray, bias: np.ndarray, gradient: int) -> list:
    """Values, then the gradients in z (gradient = 2 only), weight and bias."""
    out = _core.wasserstein([z], [v], [weight], [bias], None, None, True, gradient, ["z"], ["v"], 1)
    return [part if part is None else part[0] for part in out]


def with_numpy(z: np.ndarray, v: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, ...]:
    """All gradients; z and the sorted v lie as [d, n]."""
    mapped = weight[:, None] * z + bias[:, None]
    order = np.argsort(mapped, axis=1)
    residual = np.take_along_axis(mapped, order, 1) - v
    value = np.mean(residual * residual, axis=1)
    in_mapped = np.empty_like(z)
    np.put_along_axis(in_mapped, order, residual * np.float32(2 / z.shape[1]), 1)
    return value, in_mapped * weight[:, None], np.einsum("jk,jk->j", in_mapped, z), in_mapped.sum(axis=1)


def with_torch(z: Tensor, v: Tensor, weight: Tensor, bias: Tensor, dim: int, both: bool = False, z_too: bool = True):
    """Gradients by autograd; weight and bias have the shape that broadcasts against z."""
    target = v.sort(dim).values if both else v
    loss = ((weight * z + bias).sort(dim).values - target).square().mean(dim).sum()
    return torch.autograd.grad(loss, (z, weight, bias) if z_too else (weight, bias))


def cases() -> Iterator[Case]:
    for n, d in ((32, 2048), (32, 8192)):
        z, v = samples(n, n, d)
        rng = np.random.default_rng(1)
        weight = rng.normal(1, 0.5, d).astype(np.float32)
        bias = rng.normal(0, 0.5, d).astype(np.float32)
        z_t, v_t = np.ascontiguousarray(z.T), np.ascontiguousarray(v.T)
        rows = [torch.from_numpy(x) for x in (z, v, weight, bias)]
        columns = [torch.from_numpy(x) for x in (z_t, v_t, weight[:, None].copy(), bias[:, None].copy())]
        for tensors in (rows, columns):
            for k in (0, 2, 3):
                tensors[k].requires_grad_()
        exact = reference.wasserstein(*(x.astype(np.float64) for x in (z, v, weight, bias)))
        for gradient, name in ((2, "all gradients"), (1, "gradients of w and b")):
            z_too = gradient == 2
            got = engine(z, v, weight, bias, gradient)
            pairs = [(g, e) for g, e in zip(got, exact, strict=True) if g is not None]
            rivals = {
                "torch transposed": lambda t=columns, z_too=z_too: with_torch(*t, 1, z_too=z_too),
                "torch dim 0": lambda t=rows, z_too=z_too: with_torch(*t, 0, z_too=z_too),
                "torch, both sorted": lambda t=columns, z_too=z_too: with_torch(*t, 1, True, z_too),
            }
            if z_too:
                rivals["numpy transposed"] = lambda a=(z_t, v_t, weight, bias): with_numpy(*a)
            yield Case(
                f"affine + W2, {name}",
                f"{n} x {d}",
                lambda a=(z, v, weight, bias, gradient): engine(*a),
                floors={"copy": copy_floor(n * d)},
                rivals=rivals,
                errors={
                    "value": error(*pairs[0]),
                    "gradients": max(scaled_error(*pair) for pair in pairs[1:]),
                },
                goals={"copy": 9.5, "torch dim 0": 95.0} if (d, gradient) == (2048, 2) else {},
            )


if __name__ == "__main__":
    main(__doc__, cases)
