"""What the benchmarks share: the machine's name and paired timing."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def cpu_name() -> str:
    """The processor, as the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def rounds(
    functions: dict[str, Callable[[], object]], count: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Time every function `count` times, in turns and in alternating order, after one round of warming up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for k in range(count + 1):
        for name in list(functions)[:: 1 if k % 2 else -1]:
            start = clock()
            functions[name]()
            if k:
                times[name].append(clock() - start)
    return times


def ratio(times: dict[str, list[float]], rival: str, ours: str) -> str:
    """Median and range of the paired ratios rival / ours."""
    ratios = [a / b for a, b in zip(times[rival], times[ours], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def median_ms(times: list[float]) -> str:
    return f"{statistics.median(times) * 1e3:8.2f} ms"


thread_time = time.thread_time
wall_time = time.perf_counter
