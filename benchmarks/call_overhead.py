"""What a call costs when there is hardly anything to compute: public functions on tiny float32 arrays, one thread.

The time is that of the Python layer: checking the arguments, taking pointers, allocating the results.

    python benchmarks/call_overhead.py [--budget 1.5]
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from _machine import Case, error, main, scaled_error
from wasserstein import with_torch

import lineas
from lineas.arrays import reference


def cases() -> Iterator[Case]:
    u, v = np.array([[0.0], [2.0]], np.float32), np.array([[1.0], [4.0]], np.float32)
    exact, exact_gradient, _, _ = reference.wasserstein(u.astype(np.float64), v.astype(np.float64))
    leaf, target = torch.from_numpy(u).requires_grad_(), torch.from_numpy(v)
    yield Case(
        "lineas.wasserstein",
        "2 x 1",
        lambda: lineas.wasserstein(u, v),
        rivals={
            "numpy": lambda: np.mean((np.sort(u, axis=0) - np.sort(v, axis=0)) ** 2, axis=0),
            "torch": lambda: (leaf.detach().sort(0).values - target.sort(0).values).square().mean(0),
        },
        errors={"value": error(lineas.wasserstein(u, v), exact)},
        goals={"µs": 5.0},
    )
    yield Case(
        "lineas.wasserstein_grad",
        "2 x 1",
        lambda: lineas.wasserstein_grad(u, v),
        rivals={"torch": lambda: with_torch(leaf, target, 0, both=True)},
        errors={"gradient": scaled_error(lineas.wasserstein_grad(u, v)[1], exact_gradient)},
    )
    x = np.array([3.0, -0.5], np.float32)
    settings = {"tau": 1.0, "l1": 1.0, "group": 0.1}
    yield Case(
        "lineas.prox_sparse_group",
        "2",
        lambda: lineas.prox_sparse_group(x, **settings),
        errors={
            "values": scaled_error(
                lineas.prox_sparse_group(x, **settings), reference.prox_sparse_group(x.astype(np.float64), **settings)
            )
        },
    )
    z = np.ones((1, 2), np.float32)
    affine = lineas.AffineMap(np.array([2.0, 3.0], np.float32), np.array([1.0, 0.5], np.float32))
    yield Case(
        "AffineMap.transform",
        "1 x 2",
        lambda: affine.transform(z),
        rivals={"numpy": lambda: affine.weight * z + affine.bias},
        errors={"values": scaled_error(affine.transform(z), np.array([[3.0, 3.5]]))},
    )


if __name__ == "__main__":
    main(__doc__, cases)
