"""What studies of many hours share: results kept on disk, tables written between marks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import lineas

ROOT = Path(__file__).resolve().parent.parent


class Kept:
    """Results in a folder of ``build``, so that a run that was cut off goes on where it was."""

    def __init__(self, folder: str) -> None:
        self.folder = ROOT / "build" / folder

    def has(self, name: str) -> bool:
        """Whether it is in the folder."""
        return (self.folder / f"{name}.npz").exists()

    def __call__(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, NDArray]:
        """What `compute` gives, out of the folder if it is there."""
        file = self.folder / f"{name}.npz"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            found = compute()
            with open(file.with_suffix(".part"), "wb") as out:
                np.savez(out, **found)
            file.with_suffix(".part").rename(file)
            print(f"  {name}", flush=True)
        with np.load(file) as found:
            return dict(found)


def data_lines(name: str) -> list[str]:
    """The lines of a file of ``benchmarks/data``."""
    return (ROOT / "benchmarks" / "data" / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def set_up(threads: int, bf16: bool) -> None:
    """Threads of torch and of the engine, and whether products of matrices round their factors to bfloat16."""
    torch.set_num_threads(threads)
    lineas.set_num_threads(threads)
    if bf16:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def digest(settings: Any) -> str:
    """A short name of settings, for the name of a result that depends on them."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def spell(difference: tuple[float, float, float]) -> str:
    """A difference and its interval."""
    middle, low, high = difference
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"


def write_between(page: Path, marks: tuple[str, str], lines: Sequence[str]) -> None:
    """Put lines between the two marks of a page, in place of what is there."""
    before, rest = page.read_text(encoding="utf-8").split(marks[0])
    after = rest.split(marks[1], 1)[1]
    page.write_text(before + "\n".join([marks[0], "", *lines, "", marks[1]]) + after, encoding="utf-8")
