"""What the benchmarks share: the machine's name, paired timing, and the rows of their one table."""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

import lineas
from lineas import _core

Call = Callable[[], object]

SAMPLE = 2e-3  # seconds of a timed sample, made of repeated calls where one is shorter
LEAST_ROUNDS, MOST_ROUNDS = 5, 41

HEADER = (
    "| kernel | size | µs | times the floor | rivals, times ours | error | goal | reached |\n"
    "| --- | --- | ---: | --- | --- | --- | --- | --- |"
)

# ---- machine ---------------------------------------------------------------------------------------------------------


def cpu_name() -> str:
    """The processor, as the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def describe() -> str:
    """Processor, kernels and versions in one line."""
    return (
        f"{cpu_name()}, {platform.system()} {platform.machine()}, kernels {_core.cpu()}; "
        f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}, POT {version('POT')}"
    )


def set_threads(count: int) -> None:
    """Threads of the engine and of torch; BLAS always gets one."""
    from threadpoolctl import threadpool_limits  # which the environment with vLLM does not have

    lineas.set_num_threads(count)
    torch.set_num_threads(count)
    threadpool_limits(1)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, so that nobody's result is paid for in page faults."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        libc.mallopt(trim, 2**31 - 1)
        libc.mallopt(mmap, 2**30)


# ---- timing ----------------------------------------------------------------------------------------------------------


def _sample(call: Call, repeats: int, warm: bool, clock: Callable[[], float]) -> float:
    if warm:
        call()
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def paired(calls: Mapping[str, Call], budget: float, clock: Callable[[], float] = time.thread_time) -> dict:
    """Seconds a call, in rounds: every round times all calls, in alternating order.

    A sample is one call, or as many as last about 2 ms, after an untimed one that brings the data into the caches;
    calls above 10 ms do without the latter. The rounds take about `budget` seconds, and there are at least 5.
    """
    once = {}
    for name, call in calls.items():
        call()
        once[name] = max(_sample(call, 1, False, time.perf_counter), 1e-7)
    repeats = {name: max(1, round(SAMPLE / once[name])) for name in calls}
    warm = {name: once[name] < 10e-3 for name in calls}
    length = sum(once[name] * (repeats[name] + warm[name]) for name in calls)
    rounds = min(max(round(budget / length), LEAST_ROUNDS), MOST_ROUNDS)

    times: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    for k in range(rounds):
        for name in list(calls)[:: 1 if k % 2 else -1]:
            times[name].append(_sample(calls[name], repeats[name], warm[name], clock))
    if collecting:
        gc.enable()
    return times


def ratio(times: Mapping[str, list[float]], above: str, below: str) -> float:
    """Median of the paired ratios above / below."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


# ---- accuracy --------------------------------------------------------------------------------------------------------


def error(got: ArrayLike, want: ArrayLike) -> float:
    """Largest difference from the float64 result, relative to the entry: for what is positive."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.max(np.abs(got - want) / np.abs(want)))


def scaled_error(got: ArrayLike, want: ArrayLike) -> float:
    """Largest difference from the float64 result, relative to the largest entry: for what may cancel."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass
class Floor:
    """Something that the kernel is held against and cannot be expected to beat.

    `moved` is the number of bytes that it reads and writes, where that says something; `share` of its time counts.
    """

    call: Call
    moved: int | None = None
    share: float = 1.0


@dataclass
class Case:
    """One row: a call of ours, floors (ours / floor is printed), rivals (rival / ours), errors and goals.

    `goals` holds bounds by name: of a floor or an error it is the largest ratio or error allowed, of a rival the
    smallest ratio; "µs" bounds the time of a call.
    """

    kernel: str
    size: str
    ours: Call
    floors: dict[str, Floor] = field(default_factory=dict)
    rivals: dict[str, Call] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    goals: dict[str, float] = field(default_factory=dict)
    clock: Callable[[], float] = time.thread_time

    def measure(self, budget: float) -> str:
        """Measure, and return the row of the table."""
        floors = {name: floor.call for name, floor in self.floors.items()}
        times = paired({"ours": self.ours, **floors, **self.rivals}, budget, self.clock)
        seen = {"µs": statistics.median(times["ours"]) * 1e6, **self.errors}
        floor_cells = []
        for name, floor in self.floors.items():
            seen[name] = ratio(times, "ours", name) / floor.share
            rate = "" if floor.moved is None else f" ({floor.moved / statistics.median(times[name]) / 1e9:.0f} GB/s)"
            floor_cells.append(f"{seen[name]:.2f} {name}{rate}")
        seen |= {name: ratio(times, name, "ours") for name in self.rivals}
        goal_cells = [f"{'≥' if name in self.rivals else '≤'} {goal:g} {name}" for name, goal in self.goals.items()]
        reached = [
            seen[name] >= goal if name in self.rivals else seen[name] <= goal for name, goal in self.goals.items()
        ]
        cells = [
            self.kernel,
            self.size,
            f"{seen['µs']:.{0 if seen['µs'] >= 100 else 2}f}",
            ", ".join(floor_cells),
            ", ".join(f"{name} {seen[name]:.3g}" for name in self.rivals),
            ", ".join(f"{name} {value:.1e}" if value else f"{name} 0" for name, value in self.errors.items()),
            ", ".join(goal_cells),
            ", ".join("yes" if r else "no" for r in reached),
        ]
        return f"| {' | '.join(cells)} |"


def _warm_buffer(values: int, offset: int) -> np.ndarray:
    """`values` float32 ones, `offset` bytes behind the start of a page."""
    page = 4096
    memory = np.empty(4 * values + 2 * page, np.uint8)
    start = -memory.ctypes.data % page + offset
    buffer = memory[start : start + 4 * values].view(np.float32)
    buffer[:] = 1
    return buffer


def copy_floor(values: int) -> Floor:
    """Copying `values` float32 between two warm buffers.

    They lie half a page apart, modulo a page: where malloc puts two such buffers, 16 bytes apart, glibc's copy takes
    ten times as long on Zen 3.
    """
    source, target = _warm_buffer(values, 0), _warm_buffer(values, 2048)
    return Floor(lambda: np.copyto(target, source), 8 * values)


def read_floor(*arrays: np.ndarray) -> Floor:
    """Reading arrays where they lie. The largest int32 is what NumPy finds fastest."""
    views = [array.view(np.int32) for array in arrays]
    return Floor(lambda: [view.max() for view in views], sum(array.nbytes for array in arrays))


def main(doc: str, cases: Callable[[], Iterable[Case]]) -> None:
    """Command line of a benchmark: measure its cases and print the table."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=1.5, help="seconds of rounds a row (default 1.5)")
    parser.add_argument("--only", default="", help="only rows whose kernel and size contain this text")
    args = parser.parse_args()
    keep_freed_memory()
    set_threads(1)
    print(f"{describe()}\n\n{HEADER}", flush=True)
    for case in cases():
        if args.only in f"{case.kernel} {case.size}":
            print(case.measure(args.budget), flush=True)
