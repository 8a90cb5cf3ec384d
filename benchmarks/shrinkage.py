"""What shrinkage of closed-form maps does to the held-out distance, by the number of prompts: none, "auto", validated.

Insults and clean comments run through SmolLM2-135M once; then 8 to 400 a side are drawn, maps are fitted to their
pooled activations, every third module by itself, and the squared W2 from 224 mapped insults to 224 clean comments of
the test file is taken. "cross-validated" is one strength for all modules, that with the lowest loss of four folds.

    python benchmarks/shrinkage.py [--write] [--threads 2] [--bf16]

With --write the tables go into docs/sample-sizes.md. The activations are kept in build/shrinkage.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from _machine import cpu_name
from _study import ROOT, Kept, set_up, write_between
from _toxicity import LENGTHS, comments
from numpy.typing import NDArray
from sample_sizes import SITES
from toxicity import MAX_LENGTH

import lineas
from lineas.demo.model import load_smollm2

MARKS = "<!-- measured: python benchmarks/shrinkage.py --write -->", "<!-- end of shrinkage -->"
POOL = {"train": 512, "test": 224}
DRAWS = {8: 8, 16: 8, 32: 6, 128: 3, 400: 1}  # by the number of prompts
EVERY = 3  # modules
FOLDS = 4
METHODS = ("mean", "gaussian", "linear")
KINDS = ("none", "auto", "cross-validated")

kept = Kept("shrinkage")
Rows = dict[str, NDArray]


def pools() -> dict[str, dict[tuple[str, str], Rows]]:
    """Activations [n, d] by site, by part and label, by module."""

    def compute() -> dict[str, NDArray]:
        model, tokenizer = load_smollm2()
        rng, found = np.random.default_rng(123), {}
        for part, count in POOL.items():
            for label in ("insult", "clean"):
                short = [text for text in comments(part)[label] if LENGTHS[0] <= len(text) <= LENGTHS[1]]
                texts = sorted((short[i] for i in rng.permutation(len(short))[:count]), key=len)  # little padding
                rows = lineas.collect(
                    model, texts, layers=list(SITES.values()), tokenizer=tokenizer, max_length=MAX_LENGTH
                )
                for site, layers in SITES.items():
                    own = [values for name, values in rows.items() if name.endswith(layers.rpartition("*.")[2])]
                    found[f"{site} {part} {label}"] = np.stack(own)
        return found

    by_site: dict[str, dict[tuple[str, str], Rows]] = {site: {} for site in SITES}
    for key, stacked in kept("activations", compute).items():
        site, part, label = key.split()
        by_site[site][part, label] = {str(k): stacked[k] for k in range(0, len(stacked), EVERY)}
    return by_site


def validated(source: Rows, target: Rows, method: str, seed: int) -> float:
    """The strength with the lowest sum over modules and folds of the distance: the lowest point of a parabola."""
    rng, losses = np.random.default_rng(seed), np.zeros(3)
    folds = [rng.permutation(len(next(iter(rows.values())))) % FOLDS for rows in (source, target)]
    for fold in range(FOLDS):
        train, held_out = (
            [
                {name: values[pick(own)] for name, values in rows.items()}
                for rows, own in zip((source, target), folds, strict=True)
            ]
            for pick in (lambda own, fold=fold: own != fold, lambda own, fold=fold: own == fold)
        )
        maps = lineas.fit(train[0], train[1], method=method)
        for k, strength in enumerate((0.0, 0.5, 1.0)):  # a parabola in the strength, since slopes stay above 0
            losses[k] += sum(distances(maps, *held_out, strength))
    slope, curvature = 4 * losses[1] - 3 * losses[0] - losses[2], 2 * (losses[0] - 2 * losses[1] + losses[2])
    return float(np.clip(-slope / (2 * curvature), 0, 1))


def distances(maps: Any, source: Rows, target: Rows, strength: float = 1.0) -> list[float]:
    """Squared W2 summed over the neurons, of every module."""
    moved = maps.transform(source, strength=strength)
    return [float(lineas.wasserstein(moved[name], target[name]).sum(dtype=np.float64)) for name in moved]


def study(pool: dict[tuple[str, str], Rows]) -> dict[tuple[str, str], list[NDArray]]:
    """By method and kind, for each number of prompts: distances over those without maps [draws, modules]."""
    test = pool["test", "insult"], pool["test", "clean"]
    off = np.array([lineas.wasserstein(test[0][name], test[1][name]).sum(dtype=np.float64) for name in test[0]])
    found: dict[tuple[str, str], list[NDArray]] = {(method, kind): [] for method in METHODS for kind in KINDS}
    for size, draws in DRAWS.items():
        rows: dict[tuple[str, str], list[NDArray]] = {key: [] for key in found}
        for draw in range(draws):
            rng = np.random.default_rng([size, draw])
            sides = []
            for label in ("insult", "clean"):
                chosen = rng.permutation(POOL["train"])[:size]
                sides.append({name: values[chosen] for name, values in pool["train", label].items()})
            for method in METHODS:
                full, auto = (lineas.fit(*sides, method=method, shrinkage=shrinkage) for shrinkage in (None, "auto"))
                strength = validated(*sides, method, draw)
                for kind, maps, at in zip(KINDS, (full, auto, full), (1.0, 1.0, strength), strict=True):
                    rows[method, kind].append(np.array(distances(maps, *test, at)) / off)
        for key, values in rows.items():
            found[key].append(np.array(values))
        print(size, {key: round(float(values[-1].mean()), 3) for key, values in found.items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/sample-sizes.md")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch and of the engine")
    parser.add_argument("--bf16", action="store_true", help="products of factors rounded to bfloat16")
    args = parser.parse_args()
    set_up(args.threads, args.bf16)

    precision = "products of bfloat16 factors" if args.bf16 else "float32"
    draws = ", ".join(f"{count} of {size}" for size, count in DRAWS.items())
    lines = [f"{cpu_name()}, torch {torch.__version__}, {precision}; draws: {draws} comments a side."]
    for site, pool in pools().items():
        lines += [
            "",
            f"### `{SITES[site]}`: shrinkage",
            "",
            f"| method | shrinkage | {' | '.join(f'{size} + {size}' for size in DRAWS)} |",
            f"| --- | --- |{' ---: |' * len(DRAWS)}",
        ]
        for (method, kind), values in study(pool).items():
            cells = " | ".join(f"{ratios.mean():.3f}" for ratios in values)
            lines.append(f"| {method} | {kind} | {cells} |")
    print("\n".join(lines))
    if args.write:
        write_between(ROOT / "docs" / "sample-sizes.md", MARKS, lines)


if __name__ == "__main__":
    main()
