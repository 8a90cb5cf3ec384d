"""Sorting every column of [n, d]: `_core.sort_columns` against NumPy and torch in both layouts, one thread.

The floor is an in-cache copy of the same bytes. "Transposed" arrays lie as [d, n] already, which is the best layout
for the rivals: their transposition is not counted. The error is 0 if and only if the sorted values are the exact ones.

    python benchmarks/sort.py [--budget 1.5] [--only "32 x 2048"]
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from _machine import Case, copy_floor, main, scaled_error

from lineas import _core
from lineas._checks import widen

SIZES = ((32, 2048), (32, 8192), (128, 256), (256, 256), (512, 256), (1000, 256), (10000, 256))
COPY = 3.5 if _core.cpu() == "avx512" else 4.5
GOALS = {
    (32, 2048): {"copy": COPY, "np.sort transposed": 6.0, "torch transposed": 75.0},
    (128, 256): {"np.sort transposed": 1.0},
    (256, 256): {"np.sort transposed": 1.0},
    (512, 256): {"np.sort transposed": 1.0},
    (1000, 256): {"np.sort transposed": 2.7},
    (10000, 256): {"np.sort transposed": 3.8},
}


def sort(x: np.ndarray) -> np.ndarray:
    return _core.sort_columns([x], ["x"], 1)[0]


def case(n: int, d: int) -> Case:
    x = np.random.default_rng(0).standard_normal((n, d), np.float32)
    transposed = np.ascontiguousarray(x.T)
    tensor, tensor_transposed = torch.from_numpy(x), torch.from_numpy(transposed)
    return Case(
        "column sort",
        f"{n} x {d}",
        lambda: sort(x),
        floors={"copy": copy_floor(n * d)},
        rivals={
            "np.sort transposed": lambda: np.sort(transposed, axis=1),
            "np.sort axis 0": lambda: np.sort(x, axis=0),
            "torch transposed": lambda: torch.sort(tensor_transposed, dim=1),
            "torch dim 0": lambda: torch.sort(tensor, dim=0),
        },
        errors={"values": scaled_error(sort(x), np.sort(x.astype(np.float64), axis=0))},
        goals=GOALS.get((n, d), {}),
    )


def other_dtypes(n: int, d: int) -> Iterator[Case]:
    x = np.random.default_rng(0).standard_normal((n, d), np.float32)
    for name, array in (
        ("bfloat16", (x.view(np.uint32) >> 16).astype(np.uint16)),
        ("float16", x.astype(np.float16)),
        ("float64", x.astype(np.float64)),
    ):
        yield Case(
            f"column sort, {name} input",
            f"{n} x {d}",
            lambda array=array: sort(array),
            rivals={"float32 input": lambda: sort(x)},
            errors={"values": scaled_error(sort(array), np.sort(widen(array).astype(np.float64), axis=0))},
        )


def cases() -> Iterator[Case]:
    for n, d in SIZES:
        yield case(n, d)
    yield from other_dtypes(32, 2048)


if __name__ == "__main__":
    main(__doc__, cases)
