"""What the two protocols of the paper share: findings kept on disk, statistics over seeds, Markdown tables."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _study import ROOT, digest

import lineas

REHEARSAL = (
    "**REHEARSAL.** Random models, judges and metrics on stand-in texts: every code path was run, and the figures mean "
    "nothing."
)


class Results:
    """Findings in a folder, each in a JSON file whose name tells what it depends on.

    A run that was cut off goes on where it was; one with other settings has findings of its own beside the others.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        if self.folder.is_relative_to(ROOT / "docs"):
            raise SystemExit(f"--results must not be in the documentation, got {folder}")
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, settings: Any, suffix: str) -> Path:
        """The file of what is called `name` and depends on `settings`."""
        return self.folder / f"{slug(name)}-{digest(settings)}{suffix}"

    def value(self, name: str, settings: Any, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, as JSON has it, out of the folder if it is there."""
        file = self.path(name, settings, ".json")
        if not file.exists():
            start = time.perf_counter()
            value, seconds = compute(), time.perf_counter() - start
            write(file, json.dumps({"name": name, "settings": settings, "seconds": seconds, "value": value}))
            print(f"  {name} ({seconds:.0f} s)", flush=True)
        return json.loads(file.read_text(encoding="utf-8"))["value"]

    def maps(self, name: str, settings: Any, fit: Callable[[], lineas.SteeringMaps]) -> lineas.SteeringMaps:
        """The maps that `fit` gives, out of the folder if they are there."""
        file = self.path(f"maps {name}", settings, ".safetensors")
        if not file.exists():
            start = time.perf_counter()
            fit().save(file)
            print(f"  maps {name} ({time.perf_counter() - start:.0f} s)", flush=True)
        found = lineas.load(file)
        assert isinstance(found, lineas.SteeringMaps)
        return found


def write(file: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def local(source: str) -> Path:
    """A file: `source` itself, or, as ``hf://OWNER/NAME/FILE`` or ``hf://datasets/OWNER/NAME/FILE``, one of the hub."""
    if not source.startswith("hf://"):
        return Path(source)
    from huggingface_hub import hf_hub_download

    kind = "dataset" if source.startswith("hf://datasets/") else "model"
    parts = source.removeprefix("hf://").removeprefix("datasets/").split("/", 2)
    if len(parts) < 3:
        raise SystemExit(f"expected hf://OWNER/NAME/FILE or hf://datasets/OWNER/NAME/FILE, got {source}")
    return Path(hf_hub_download("/".join(parts[:2]), parts[2], repo_type=kind))


def slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name).strip("-").lower()


def spread(values: Sequence[float], least: float = -np.inf, most: float = np.inf) -> dict[str, Any]:
    """Mean, standard deviation and 95 % interval of the mean, by Student's t, of one number a seed.

    A single number has neither a standard deviation nor an interval: they are None, as JSON has it. The interval holds
    no values below `least` and above `most`, where there can be none.
    """
    array = np.asarray(values, np.float64)
    found: dict[str, Any] = {"n": len(array), "mean": float(array.mean()), "sd": None, "low": None, "high": None}
    if len(array) > 1:
        from scipy.stats import t  # scikit-learn brings it

        sd = float(array.std(ddof=1))
        half = float(t.ppf(0.975, len(array) - 1)) * sd / len(array) ** 0.5
        found |= {"sd": sd, "low": max(found["mean"] - half, least), "high": min(found["mean"] + half, most)}
    return found


def spell(found: dict[str, Any] | None, digits: int = 2) -> str:
    """Mean, standard deviation and interval in a cell of a table; empty where nothing was measured."""
    if found is None:
        return ""
    middle = f"{found['mean']:.{digits}f}"
    if found["sd"] is None:
        return middle
    return f"{middle} ± {found['sd']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, of which the first column is text and the others are numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def versions() -> dict[str, str]:
    """Of what computes, for the record; packages that are not there are left out."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("lineas", "torch", "transformers", "diffusers", "datasets", "lm-eval", "scikit-learn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" is the first CUDA device, or else the CPU."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this torch sees no CUDA device")
    return device


def device_name(device: torch.device) -> str:
    from _machine import cpu_name

    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def dtype_of(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise argparse.ArgumentTypeError(f"expected a dtype of torch such as float32 or bfloat16, got {name!r}")
    return found


def as_json(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of a run; what JSON has not is spelled."""
    plain = (str, int, float, list, type(None))
    return {name: value if isinstance(value, plain) else str(value) for name, value in vars(args).items()}


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None, rehearsal: dict[str, Any]) -> argparse.Namespace:
    """The arguments, with `rehearsal` for defaults under --rehearse."""
    parser.add_argument("--rehearse", action="store_true", help="run everything on tiny stand-ins, offline")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--rehearse", action="store_true")
    if first.parse_known_args(argv)[0].rehearse:
        known = {action.dest for action in parser._actions}
        assert known.issuperset(rehearsal), set(rehearsal) - known
        parser.set_defaults(**rehearsal)
    return parser.parse_args(argv)
