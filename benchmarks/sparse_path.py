"""The sparse path of 50 penalties over three decades: `lineas.sparse_path` against proximal gradient steps, one thread.

"FISTA" is `reference.sparse_map` in NumPy: accelerated proximal gradient steps with restarts on the same moments, warm
started from penalty to penalty, until it is as close to optimal as 1e-8 of the largest penalty, for which ours, too,
is asked. Ours starts from the samples and is charged for sorting them.

    python benchmarks/sparse_path.py [--budget 1.5]
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from _machine import Case, main

import lineas
from lineas import _core
from lineas.arrays import reference


def samples(n: int, d: int, modules: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Sources, and targets that differ from them in mean and spread, neuron by neuron."""
    rng = np.random.default_rng(0)
    source, target = {}, {}
    for k in range(modules):
        scale, mean = rng.lognormal(0, 0.5, d), rng.normal(0, 1, d)
        source[f"layers.{k}"] = (rng.normal(size=(n, d)) * scale + mean).astype(np.float32)
        scale, mean = scale * rng.lognormal(0, 0.2, d), mean + rng.normal(0, 0.3, d)
        target[f"layers.{k}"] = (rng.normal(size=(n, d)) * scale + mean).astype(np.float32)
    return source, target


def with_fista(moments: np.ndarray, penalties: np.ndarray, ratio: float) -> int:
    """All points of the path; returns the number of steps."""
    start, steps = None, 0
    for penalty in penalties:
        weight, bias, taken = reference.sparse_map(
            moments, penalty * ratio, penalty * (1 - ratio), start, tolerance=1e-8 * penalties[0]
        )
        start, steps = (weight, bias), steps + taken
    return steps


def cases() -> Iterator[Case]:
    n, d = 32, 2048
    for modules in (1, 57):
        source, target = samples(n, d, modules)
        path = lineas.sparse_path(source, target, l1_ratio=0.5)
        if modules == 1:
            rivals = {"FISTA": lambda m=path.moments[0], p=path.penalties: with_fista(m, p, 0.5)}
            goals = {"µs": 1200.0, "FISTA": 1000.0, "KKT residual": 1e-8}
        else:
            rivals, goals = {}, {"µs": 70e3, "KKT residual": 1e-8}
        yield Case(
            "sparse path, 50 penalties",
            f"{n} x {d}" if modules == 1 else f"{modules} modules of {n} x {d}",
            lambda source=source, target=target: lineas.sparse_path(source, target, l1_ratio=0.5),
            rivals=rivals,
            errors={"KKT residual": float(path.kkt_residual.max())},
            goals=goals,
        )
        if modules > 1:
            largest = float(path.penalties[0])
            grid = np.array([float(np.sqrt(path.penalties[20] * path.penalties[21]))])
            yield Case(
                "sparse path, one point between",
                f"{modules} modules of {n} x {d}",
                lambda m=path.moments, g=grid, l=largest: _core.sparse_path(m, None, g, 0.5, False, l, 1),
            )


if __name__ == "__main__":
    main(__doc__, cases)
