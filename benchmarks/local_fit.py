"""Closed-form linear maps for all modules of a model against sorting the same arrays with NumPy, on one thread.

57 modules x 2048 neurons, 32 source and 32 target rows, float32. `lineas.fit(method="linear")` sorts both sets and
computes the maps; the rivals only sort both sets: `np.sort(axis=0)`, and `np.sort` of arrays that lie transposed
already, the best layout for NumPy. CPU time of the thread, paired; the goal is at least 6 times `np.sort(axis=0)`.

    python benchmarks/local_fit.py [--rounds 15]
"""

from __future__ import annotations

import argparse

import numpy as np
from _machine import cpu_name, median_ms, ratio, rounds, thread_time

import lineas
from lineas import _core

MODULES, ROWS, NEURONS = 57, 32, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="paired measurements (default 15)")
    count = parser.parse_args().rounds
    lineas.set_num_threads(1)

    rng = np.random.default_rng(0)
    names = [f"layers.{k}" for k in range(MODULES)]
    source = {name: rng.normal(size=(ROWS, NEURONS)).astype(np.float32) for name in names}
    target = {name: rng.normal(size=(ROWS, NEURONS)).astype(np.float32) for name in names}
    both = [*source.values(), *target.values()]
    transposed = [np.ascontiguousarray(x.T) for x in both]

    functions = {
        "lineas.fit": lambda: lineas.fit(source, target, method="linear"),
        "np.sort(axis=0)": lambda: [np.sort(x, axis=0) for x in both],
        "np.sort, transposed": lambda: [np.sort(x, axis=1) for x in transposed],
    }
    times = rounds(functions, count, thread_time)
    print(f"{cpu_name()}, kernels {_core.cpu()}, numpy {np.__version__}, 1 thread")
    for name, seconds in times.items():
        print(f"{name:22s} {median_ms(seconds)}")
    for name in list(functions)[1:]:
        print(f"{name} / lineas.fit: {ratio(times, name, 'lineas.fit')}")


if __name__ == "__main__":
    main()
