"""Streaming quantiles: their speed, what memory buys, and streams that are larger than memory.

Speed: a block [65536, 1024] taken in by a `lineas.Quantiles` that has seen 1 million rows (the same block, again and
again: sorting networks do not depend on values), against `np.partition`, the median of every column of the block.

    python benchmarks/quantiles.py [--budget 1.5]     # rows of the table in docs/benchmarks.md
    python benchmarks/quantiles.py --trade-off        # memory against errors; with --write into docs/quantiles.md
    python benchmarks/quantiles.py --large 40         # maps of two streams, 40 GB together, and the memory it took

The trade-off is measured on 1 million rows of each of `FAMILIES`, drawn for a source and a target: the largest error
of the rank of any value kept, in share of the rows, and that of the slopes of `lineas.fit`, relative to those of the
fit to all values.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from _machine import Case, cpu_name, main, read_floor, set_threads
from _study import ROOT, write_between
from numpy.typing import NDArray

import lineas

MARKS = "<!-- measured: python benchmarks/quantiles.py --trade-off --write -->", "<!-- end -->"
BLOCK, NEURONS, SEEN = 65_536, 1024, 1_000_000
SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)

# ---- speed -----------------------------------------------------------------------------------------------------------


def summary(x: NDArray | torch.Tensor) -> lineas.Quantiles:
    """A summary that has seen 1 million rows."""
    seen = lineas.Quantiles()
    while seen.count < SEEN:
        seen.update(x)
    return seen


def exact_share(seen: lineas.Quantiles, block: NDArray) -> float:
    """Largest error of the rank of a value kept, where the rows seen are the block, some times."""
    return max(rank_errors(seen, np.sort(block[:, :16], axis=0), 16))


def cases() -> Iterator[Case]:
    x = np.random.default_rng(0).standard_normal((BLOCK, NEURONS), np.float32)
    transposed, seen = np.ascontiguousarray(x.T), summary(x)
    ranks = {"rank": exact_share(seen, x), "rank, promised": seen.rank_error}
    goals = {"µs": x.size / 100, "np.partition": 3.0}  # 100 million values a second
    yield Case(
        "streaming quantiles",
        f"{BLOCK} x {NEURONS}",
        lambda: seen.update(x),
        floors={"reading": read_floor(x)},
        rivals={
            "np.partition": lambda: np.partition(x, BLOCK // 2, axis=0),
            "np.partition transposed": lambda: np.partition(transposed, BLOCK // 2, axis=1),
        },
        errors=ranks,
        goals=goals,
    )
    narrow = torch.from_numpy(x).bfloat16()
    other = summary(narrow)
    yield Case(
        "streaming quantiles, bfloat16 input",
        f"{BLOCK} x {NEURONS}",
        lambda: other.update(narrow),
        floors={"reading": read_floor(narrow.view(torch.int16).numpy())},
        rivals={
            "np.partition, float32": lambda: np.partition(x, BLOCK // 2, axis=0),
            "float32 input": lambda: seen.update(x),
        },
        goals={"µs": x.size / 100, "np.partition, float32": 3.0},
    )


# ---- the trade-off ---------------------------------------------------------------------------------------------------


def relu(x: NDArray) -> NDArray:
    return np.maximum(x, 0)


def drifting(x: NDArray) -> NDArray:
    """Rows whose mean rises by four standard deviations while they come."""
    return x + np.linspace(0, 4, len(x))[:, None]


# What source and target neurons are drawn from, a random generator and [n, d] given.
FAMILIES: dict[str, tuple[Callable, Callable]] = {
    "normal": (lambda r, s: r.standard_normal(s), lambda r, s: 1 + 2 * r.standard_normal(s)),
    "lognormal": (lambda r, s: r.lognormal(0, 0.8, s), lambda r, s: r.lognormal(0.2, 0.6, s)),
    "Student t, 4 degrees": (lambda r, s: r.standard_t(4, s), lambda r, s: 0.5 + r.standard_normal(s)),
    "half zero (ReLU)": (lambda r, s: relu(r.standard_normal(s)), lambda r, s: relu(0.5 + r.standard_normal(s))),
    "two modes": (lambda r, s: r.standard_normal(s) + 4 * (r.random(s) < 0.3), lambda r, s: r.standard_normal(s)),
    "drifting": (lambda r, s: drifting(r.standard_normal(s)), lambda r, s: r.standard_normal(s)),
    "sorted": (lambda r, s: np.sort(r.standard_normal(s), axis=0), lambda r, s: 2 * r.standard_normal(s)),
}
EACH = 4  # neurons of a family


def drawn(side: int) -> NDArray:
    """[1 million, neurons], float32: the families one after the other."""
    rng = np.random.default_rng(side)
    return np.concatenate([pair[side](rng, (SEEN, EACH)).astype(np.float32) for pair in FAMILIES.values()], axis=1)


def rank_errors(seen: lineas.Quantiles, ordered: NDArray, columns: int) -> list[float]:
    """The largest error of the rank of a value kept, for each column, where `ordered` are the sorted rows seen."""
    rows, weights = seen.weighted_sample()
    found = []
    for j in range(columns):
        order = np.argsort(rows[:, j], kind="stable")
        values, told = rows[order, j], np.cumsum(weights[order]) / seen.count
        last = np.append(values[1:] != values[:-1], True)  # of equal ones
        true = np.searchsorted(ordered[:, j], values[last], side="right") / len(ordered)
        found.append(float(np.abs(told[last] - true).max()))
    return found


def trade_off(write: bool) -> None:
    set_threads(1)
    source, target = drawn(0), drawn(1)
    exact = lineas.fit(source, target).weight.astype(np.float64)
    distances = lineas.wasserstein(source, target).astype(np.float64)
    ordered = np.sort(source, axis=0)
    header = ["KB a neuron", "rank error promised", "measured, worst", "typical"]
    header += [f"slope, {name}" for name in FAMILIES] + ["distance, worst"]
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join(['---:'] * len(header))} |"]
    points = []
    for size in SIZES:
        seen, wanted = lineas.quantiles(source, size=size), lineas.quantiles(target, size=size)
        ranks = rank_errors(seen, ordered, ordered.shape[1])
        slopes = np.abs(lineas.fit(seen, wanted).weight / exact - 1).reshape(len(FAMILIES), EACH).max(axis=1)
        apart = np.abs(lineas.wasserstein(seen, wanted) / distances - 1).max()
        points.append((size * 4 / 1024, seen.rank_error, max(ranks), float(np.median(ranks)), slopes.max()))
        cells = [f"{points[-1][0]:g}", *(f"{value:.1e}" for value in (*points[-1][1:4], *slopes, apart))]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1] if size > SIZES[0] else "\n".join(lines), flush=True)
    if write:
        write_between(ROOT / "docs" / "quantiles.md", MARKS, [f"{cpu_name()}.", "", *lines])
        draw(np.array(points))


def draw(points: NDArray) -> None:
    """Memory against errors, as docs/quantiles.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from lineas.notebook.plot import BLUE, GREEN, GREY, ORANGE

    _, ax = pyplot.subplots(figsize=(6, 3.8), layout="constrained")
    labels = (
        "rank error, promised",
        "rank error, worst measured",
        "rank error, typical",
        "slope, worst of all families",
    )
    for k, (label, color, marker) in enumerate(zip(labels, (GREY, BLUE, GREEN, ORANGE), "s^vo", strict=True), start=1):
        ax.loglog(points[:, 0], points[:, k], color=color, marker=marker, markersize=4, label=label)
    ax.set_xlabel("memory a neuron (KB)")
    ax.set_ylabel("error after 1 million rows")
    ax.set_xticks(points[:, 0], [f"{x:g}" for x in points[:, 0]])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize="small")
    ax.figure.savefig(ROOT / "docs" / "quantiles.png", dpi=130)


# ---- large streams ---------------------------------------------------------------------------------------------------


def large(gigabytes: float) -> None:
    """Fit 4096 neurons to two streams of float32, made block by block out of one block, and print what it took."""
    rows, neurons = 16_384, 4096
    block = np.random.default_rng(0).standard_normal((rows, neurons), np.float32)
    blocks = max(1, round(gigabytes * 1e9 / 2 / block.nbytes))
    began = time.perf_counter()

    def stream(scale: np.float32) -> Iterator[NDArray]:
        other = np.empty_like(block)
        for k in range(blocks):
            np.multiply(block, scale, out=other)
            yield np.roll(other, k, axis=1)[:, :neurons] if k % 7 == 6 else other

    source, target = (lineas.quantiles(stream(np.float32(scale))) for scale in (1, 2))
    passed = time.perf_counter()
    fitted = lineas.fit(source, target)
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(
        f"{2 * blocks * block.nbytes / 1e9:.1f} GB, {blocks * rows} rows a side of {neurons} neurons, "
        f"{lineas.get_num_threads()} threads: one pass in {passed - began:.0f} s, fit in {ended - passed:.0f} s, peak "
        f"memory {peak / 1e9:.2f} GB; rank error {source.rank_error:.1e} promised; slopes "
        f"{fitted.weight.min():.4f} to {fitted.weight.max():.4f} (2 is right)"
    )


if __name__ == "__main__":
    if any(option in sys.argv for option in ("--trade-off", "--large")):
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--trade-off", action="store_true", help="measure memory against errors")
        parser.add_argument("--write", action="store_true", help="write docs/quantiles.md and docs/quantiles.png")
        parser.add_argument("--large", type=float, metavar="GB", help="fit to two streams of so many GB together")
        options = parser.parse_args()
        if options.trade_off:
            trade_off(options.write)
        if options.large:
            large(options.large)
    else:
        main(__doc__ or "", cases)
