"""Two threads, strides that are powers of two, and growth with n and d.

The rows with two threads are timed by the wall clock, all others by CPU time; their second error is the largest
difference from the result of one thread, and must be 0. A row about a stride compares the time per byte at d with
that at d + 16, where rows do not all fall upon the same cache sets.

    python benchmarks/scaling.py [--budget 1.5]
    python benchmarks/scaling.py --plot docs/growth.png
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from _machine import Call, Case, Floor, describe, keep_freed_memory, main, paired, scaled_error, set_threads
from local_fit import samples as fit_samples
from numpy.typing import NDArray
from sort import sort
from wasserstein import errors, ours, samples, with_torch

import lineas
from lineas import _core
from lineas.arrays import reference

Arrays = list[np.ndarray]


def on_threads(call: Callable[[], Arrays]) -> Callable[[int], Arrays]:
    """A call of a public function as a function of the number of threads."""

    def run(threads: int) -> Arrays:
        lineas.set_num_threads(threads)
        try:
            return call()
        finally:
            lineas.set_num_threads(1)

    return run


def thread_case(kernel: str, size: str, call: Callable[[int], Arrays], exact: NDArray[np.float64]) -> Case:
    """Two threads against one; `exact` is the float64 result for the first array that `call` returns."""
    one, two = call(1), call(2)
    differences = [np.max(np.abs(a.astype(np.float64) - b)) for a, b in zip(one, two, strict=True)]
    return Case(
        f"{kernel}, 2 threads",
        size,
        lambda: call(2),
        rivals={"1 thread": lambda: call(1)},
        errors={"result": scaled_error(two[0], exact), "other number of threads": float(max(differences))},
        goals={"1 thread": 1.6},
        clock=time.perf_counter,
    )


def thread_cases() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    u, v = samples(10000, 10000, 256)
    exact, *_ = reference.wasserstein(u.astype(np.float64), v.astype(np.float64))
    yield thread_case("column sort", "10000 x 256", lambda n: _core.sort_columns([u], ["u"], n), np.sort(u, axis=0))
    yield thread_case("W2 + gradient", "10000 x 256", on_threads(lambda: list(ours(u, v))), exact)

    batch = [samples(32, 32, 2048) for _ in range(57)]
    us, vs = [pair[0] for pair in batch], [pair[1] for pair in batch]
    labels = [f"layers.{k}" for k in range(57)]

    def modules(threads: int) -> Arrays:
        values, gradients, _, _ = _core.wasserstein(us, vs, None, None, None, None, True, 2, labels, labels, threads)
        return [*values, *gradients]

    exact, *_ = reference.wasserstein(us[0].astype(np.float64), vs[0].astype(np.float64))
    yield thread_case("W2 + gradient", "57 modules of 32 x 2048", modules, exact)

    source, target = fit_samples(32, 2048, 57)
    first = (source["layers.0"].astype(np.float64), target["layers.0"].astype(np.float64))
    fit = on_threads(lambda: [x.weight for x in lineas.fit(source, target, method="linear").values()])
    exact, _ = reference.fit_local(*first, None, None, "linear")
    yield thread_case("local linear map", "57 modules of 32 x 2048", fit, exact)

    tokens = rng.standard_normal((128, 128, 2048), np.float32)
    exact = tokens.mean(axis=1, dtype=np.float64)
    yield thread_case("pooling", "128 x 128 x 2048", lambda n: [_core.pool(tokens, None, "mean", n)[0]], exact)

    rows = rng.standard_normal((40000, 1024), np.float32)
    exact = rows.astype(np.float64).var(axis=0, ddof=1)
    yield thread_case("streaming moments", "40000 x 1024", on_threads(lambda: [lineas.moments(rows).variance()]), exact)


def stride_cases() -> Iterator[Case]:
    for d in (2048, 8192):
        wide = d + 16
        (u, v), (u_wide, v_wide) = samples(32, 32, d), samples(32, 32, wide)
        yield Case(
            "column sort, stride",
            f"32 x {d}",
            lambda u=u: sort(u),
            floors={f"d = {wide}": Floor(lambda u=u_wide: sort(u), share=d / wide)},
            errors={"values": scaled_error(sort(u), np.sort(u, axis=0))},
            goals={f"d = {wide}": 1.0},
        )
        yield Case(
            "W2 + gradient, stride",
            f"32 x {d}",
            lambda u=u, v=v: ours(u, v),
            floors={f"d = {wide}": Floor(lambda u=u_wide, v=v_wide: ours(u, v), share=d / wide)},
            errors=errors(ours, u, v),
            goals={f"d = {wide}": 1.0},
        )


def cases() -> Iterator[Case]:
    yield from thread_cases()
    yield from stride_cases()


# ---- growth with n and d ---------------------------------------------------------------------------------------------

ROWS = (8, 16, 32, 64, 128, 256, 512, 1000, 2000, 5000, 10000)
WIDTHS = (16, 64, 256, 1024, 2048, 8192, 32768)
TORCH_VALUES = 2000 * 2048  # torch is left out above: it takes seconds a call


def kernels(n: int, d: int) -> dict[str, dict[str, Call]]:
    """The calls of every library by kernel."""
    u, v = samples(n, n, d)
    u_t, v_t = np.ascontiguousarray(u.T), np.ascontiguousarray(v.T)
    leaf, target = torch.from_numpy(u_t).requires_grad_(), torch.from_numpy(v_t)
    return {
        "column sort": {
            "lineas": lambda: sort(u),
            "np.sort transposed": lambda: np.sort(u_t, axis=1),
            "torch transposed": lambda: torch.sort(leaf.detach(), dim=1),
        },
        "W2 + gradient": {
            "lineas": lambda: ours(u, v),
            "torch transposed": lambda: with_torch(leaf, target, 1),
        },
    }


def growth(sizes: list[tuple[int, int]]) -> dict[str, dict[str, list[float]]]:
    """Nanoseconds a value, by kernel and library, at every size [n, d]."""
    out: dict[str, dict[str, list[float]]] = {}
    for n, d in sizes:
        for kernel, calls in kernels(n, d).items():
            if n * d > TORCH_VALUES:
                del calls["torch transposed"]
            for library, seconds in paired(calls, 0.2).items():
                out.setdefault(kernel, {}).setdefault(library, []).append(statistics.median(seconds) / (n * d) * 1e9)
    return out


def plot(path: Path) -> None:
    """Time a value against n and against d; a flat line is time in proportion to the data."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    styles = {"lineas": ("#0072B2", "o"), "np.sort transposed": ("#E69F00", "s"), "torch transposed": ("#CC79A7", "^")}
    panels = [
        ("rows n, at d = 256", ROWS, [(n, 256) for n in ROWS]),
        ("rows n, at d = 2048", ROWS, [(n, 2048) for n in ROWS]),
        ("neurons d, at n = 32", WIDTHS, [(32, d) for d in WIDTHS]),
    ]
    figure, axes = plt.subplots(2, len(panels), figsize=(11, 6.4), sharey="row", layout="constrained")
    for column, (label, xs, sizes) in enumerate(panels):
        for row, (kernel, lines) in enumerate(growth(sizes).items()):
            ax = axes[row, column]
            for library, ys in lines.items():
                colour, marker = styles[library]
                ax.loglog(xs[: len(ys)], ys, color=colour, marker=marker, markersize=4.5, label=library)
            ax.set_xlabel(label)
            ax.grid(True, which="major", color="0.9")
            if column == 0:
                ax.set_ylabel(f"{kernel}\ntime a value, ns")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel(f"1 thread, float32; {describe()}", fontsize=8)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    if "--plot" in sys.argv:
        keep_freed_memory()
        set_threads(1)
        plot(Path(sys.argv[sys.argv.index("--plot") + 1]))
    else:
        main(__doc__, cases)
