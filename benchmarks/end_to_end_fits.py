"""How far end-to-end fits on SmolLM2-135M get, and at what cost: insults to clean comments, or the demo's sentences.

For each seed 32 + 32 comments are fitted, 32 + 32 choose settings and numbers of steps (validation), and 64 + 64 are
looked at afterwards (test). Losses are means over the 30 modules of the sum over neurons of squared W2. The cost is
counted in forward passes of 32 prompts: a forward and a backward pass are 3. Passes of the validation set come on top,
one a step.

    python benchmarks/end_to_end_fits.py [--write] [--seeds 0 1 2] [--threads 2] [--reference-steps 1000]
                                         [--concepts insults sentiment]

"reference" is the setting of the published code: its scaling, gradient descent at rate 0.1, 1000 steps of a cosine. The
first seed takes them all, or as many as are asked for, the others the first 200. Of the sentences only the first seed
is fitted. With --write the tables go into docs/end-to-end-fits.md and the picture into docs/end-to-end-fits.png. What
is finished is kept in build/end-to-end-fits; remove that folder for a run of its own. Products of matrices round their
factors to bfloat16.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from _machine import cpu_name
from _study import ROOT, Kept, digest, set_up, write_between
from _toxicity import insults_sets
from numpy.typing import NDArray

import lineas
from lineas.demo import sentences
from lineas.demo.model import load_smollm2
from lineas.demo.run import LAYERS
from lineas.fitting.end_to_end import prepare, read_sets
from lineas.fitting.objective import Objective, Task
from lineas.fitting.parameters import MapParameters, ProximalOptimizer
from lineas.fitting.settings import ObjectiveSettings
from lineas.fitting.step_sizes import AutomaticSteps, ScheduledSteps
from lineas.inputs import frozen

kept = Kept("end-to-end-fits")
MARKS = "<!-- measured: python benchmarks/end_to_end_fits.py --write -->", "<!-- end -->"

MAX_LENGTH = 32
BUDGET = 75  # units within which the minimum of the reference is to be reached
STEPS = 24  # 75 units with the gradient at the start
BEYOND = 4  # looks
REFERENCE_STEPS = 1000
SHORTER = 200  # steps of the reference for all seeds but the first
LOOKS = (0, 1, *range(2, STEPS + 1, 2))  # before which of them the losses are taken
# The strengths of `strengths=` in the settings that are held back, of which the validation loss chooses.
STRENGTHS = (0.7, 0.85, 1.0)
PENALTIES: dict[str, dict[str, float]] = {"dense": {}, "l1 2e-3": {"l1": 2e-3}, "group 5e-4": {"group": 5e-4}}
HELD_BACK = ("dense", "group 5e-4")
ADAM = {"Adam 1e-3": 1e-3}
CONCEPTS = ("insults", "sentiment")
COLORS = {
    "reference": "GREY", "dense": "BLUE", "dense, held back": "ORANGE", "l1 2e-3": "#2a9d8f", "Adam 1e-3": "#8d5fd3",
    "incremental": "#d1495b",
}  # fmt: skip


def sets(concept: str, seed: int) -> dict[str, tuple[list[str], list[str]]]:
    """ "fit", "validation" and "test" of a concept, each a pair (source, target)."""
    if concept == "insults":
        return insults_sets(seed)
    rng = np.random.default_rng(seed)
    shuffled = []
    for name in ("negative.txt", "positive.txt"):
        texts = sentences(name)
        shuffled.append([texts[i] for i in rng.permutation(len(texts))])
    parts = {"fit": slice(0, 32), "validation": slice(32, 64), "test": slice(64, None)}
    return {name: (shuffled[0][part], shuffled[1][part]) for name, part in parts.items()}


class Problem:
    """A model, the three sets of a concept and a seed, and maps to be fitted; a block that freezes the model."""

    def __init__(self, model: Any, tokenizer: Any, concept: str, seed: int) -> None:
        self.model = model
        self.sets, self.tokenizer = sets(concept, seed), tokenizer

    def __enter__(self) -> Problem:
        self.frozen = frozen.frozen(self.model)
        self.frozen.__enter__()
        self.objective, self.fitted, self.validation = self._prepare("validation", "layer-mean")
        _, _, self.test = self._prepare("test", "layer-mean")
        self.published, self.published_sets, _ = self._prepare("validation", "reference")
        self.maps = MapParameters(self.objective.widths, self.objective.dtype, self.objective.device)
        return self

    def _prepare(self, held_out: str, scaling: str) -> tuple[Objective, list[Task], list[Task]]:
        settings = ObjectiveSettings(
            layers=LAYERS, tokenizer=self.tokenizer, max_length=MAX_LENGTH, scaling=scaling, progress=False
        )
        tasks = [read_sets(None, self.sets["fit"], self.sets[held_out], settings)]
        return prepare(self.model, tasks, settings)[:3]

    def __exit__(self, *error: object) -> None:
        self.frozen.__exit__(*error)

    def automatic(self, l1: float = 0.0, group: float = 0.0) -> AutomaticSteps:
        """Steps at automatic rates."""
        return AutomaticSteps(self.objective, self.fitted, self.maps, (l1, group, l1, group), STEPS)

    def scheduled(self, optimizer: str, lr: float, steps: int, published: bool = False) -> ScheduledSteps:
        """Steps at a rate that falls along a cosine; in the published code's scaling or in "layer-mean"."""
        stepper = ProximalOptimizer(self.maps, optimizer=optimizer)
        objective, fitted = (self.published, self.published_sets) if published else (self.objective, self.fitted)
        return ScheduledSteps(objective, fitted, stepper, lr, steps)

    def losses(self, strength: float = 1.0) -> tuple[float, float]:
        """Validation and test loss of the maps as they stand, at a strength."""
        leaves = self.maps.leaves(strength)
        return self.objective.loss(self.validation, leaves)[0], self.objective.loss(self.test, leaves)[0]

    def support(self) -> float:
        """The share of neurons that are mapped."""
        return float(self.maps.support().double().mean())


# ---- curves ----------------------------------------------------------------------------------------------------------


def columns(rows: Sequence[tuple[Any, ...]]) -> dict[str, NDArray]:
    """Rows of a curve by what they hold; "units" is the cost."""
    names = ("step", "units", "train", "validation", "test", "support")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def curve(
    problem: Problem, steps: AutomaticSteps | ScheduledSteps, strengths: Sequence[float] = (1.0,)
) -> dict[str, NDArray]:
    """Train, validation and test loss before the steps `LOOKS`, at what cost, and the support.

    Strengths have columns of "validation" and "test", [K, S], of their own. Ends `BEYOND` looks after the lowest
    validation loss.
    """
    rows: list[tuple[Any, ...]] = []
    for step in range(STEPS + 1):
        loss, _ = steps.measure(step)
        if step in LOOKS:
            losses = zip(*(problem.losses(strength) for strength in strengths), strict=True)
            rows.append((step, steps.passes, loss, *losses, problem.support()))
        lowest = min(range(len(rows)), key=lambda k: min(rows[k][3]))
        if len(rows) - lowest > BEYOND or (step < STEPS and steps.move(step) is None):
            break
    return columns(rows)


def held_back(found: dict[str, NDArray], choices: Sequence[int]) -> dict[str, NDArray]:
    """A curve at the strength, of some, that has the lowest validation loss at each look."""
    best = found["validation"][:, choices].argmin(axis=1)
    at = np.arange(len(best)), np.asarray(choices)[best]
    return {**found, "validation": found["validation"][at], "test": found["test"][at]}


def reference(model: Any, tokenizer: Any, concept: str, seed: int, steps: int) -> dict[str, NDArray]:
    """The published setting, at every step to the 20th and every tenth after. Goes on where it was cut off."""
    path = kept.folder / f"reference-{concept}-{seed}-{steps}.part.npz"
    rows: list[tuple[float, ...]] = []
    with Problem(model, tokenizer, concept, seed) as problem:
        walk, first, maps = problem.scheduled("sgd", 0.1, REFERENCE_STEPS, published=True), 0, problem.maps
        if path.exists():
            with np.load(path) as found:
                first, rows = int(found["step"]), [tuple(row) for row in found["rows"]]
                maps.weight.copy_(torch.from_numpy(found["weight"]))
                maps.bias.copy_(torch.from_numpy(found["bias"]))
        for step in range(first, steps + 1):
            loss, _ = walk.measure(step)
            if step < 20 or step % 10 == 0:
                # Its loss divided by what its scaling multiplies: samples over neurons, the same for all modules.
                rows.append((step, 3 * (step + 1), loss * 576 / 32, *problem.losses(), 1.0))
            if step < steps:
                walk.move(step)
            if step % 20 == 19:
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path.with_suffix(".new"), "wb") as file:
                    np.savez(
                        file, step=step + 1, rows=np.array(rows), weight=maps.weight.numpy(), bias=maps.bias.numpy()
                    )
                os.replace(path.with_suffix(".new"), path)
    return columns(rows)


def incremental(model: Any, tokenizer: Any, concept: str, seed: int) -> dict[str, NDArray]:
    """Linear maps fitted in one pass; the targets take another."""
    parts = sets(concept, seed)
    found = lineas.fit_incremental(
        model, *parts["fit"], layers=LAYERS, tokenizer=tokenizer, max_length=MAX_LENGTH, progress=False
    )
    with Problem(model, tokenizer, concept, seed) as problem:
        problem.maps.load(found)
        train = problem.objective.loss(problem.fitted, problem.maps.leaves())[0]
        return columns([(0, 1, train, *problem.losses(), problem.support())])


def curves(model: Any, tokenizer: Any, concept: str, seed: int, reference_steps: int) -> dict[str, dict[str, NDArray]]:
    """The curves of all settings, by name."""

    def fit(take: Any, strengths: Sequence[float] = (1.0,)) -> dict[str, NDArray]:
        with Problem(model, tokenizer, concept, seed) as problem:
            return curve(problem, take(problem), strengths)

    found = {"reference": kept(
        f"reference-{concept}-{seed}-{reference_steps}",
        lambda: reference(model, tokenizer, concept, seed, reference_steps),
    )}  # fmt: skip
    for name, penalties in PENALTIES.items():
        strengths = STRENGTHS if name in HELD_BACK else (1.0,)
        key = f"automatic-{concept}-{seed}-{digest([penalties, LOOKS, strengths])}"
        both = kept(
            key,
            lambda penalties=penalties, strengths=strengths: fit(
                lambda problem: problem.automatic(**penalties), strengths
            ),
        )
        found[name] = held_back(both, [strengths.index(1.0)])
        if len(strengths) > 1:
            found[f"{name}, held back"] = held_back(both, range(len(strengths)))
    for name, lr in ADAM.items():
        key = f"adam-{concept}-{seed}-{digest([lr, LOOKS])}"
        both = kept(key, lambda lr=lr: fit(lambda problem: problem.scheduled("adam", lr, STEPS)))
        found[name] = held_back(both, [0])
    found["incremental"] = kept(f"incremental-{concept}-{seed}", lambda: incremental(model, tokenizer, concept, seed))
    return found


# ---- tables and picture ----------------------------------------------------------------------------------------------


def best(found: dict[str, NDArray]) -> int:
    """The entry with the lowest validation loss: where early stopping would stop."""
    return int(np.argmin(found["validation"]))


def table(results: dict[int, dict[str, dict[str, NDArray]]]) -> list[str]:
    """What each setting reaches where its validation loss is lowest, for every seed, and its mean over the seeds."""
    seeds = list(results)
    lines = [
        "| setting | " + " | ".join(f"validation, seed {seed}" for seed in seeds) + " | mean | less reference "
        "| test, mean | less reference | support | units |",
        "| --- |" + " ---: |" * (len(seeds) + 6),
    ]

    def at_best(name: str, key: str) -> NDArray:
        return np.array([results[seed][name][key][best(results[seed][name])] for seed in seeds])

    starts = {key: np.mean([results[seed]["dense"][key][0] for seed in seeds]) for key in ("validation", "test")}
    lines.append("| identity |" + "".join(f" {results[seed]['dense']['validation'][0]:.4f} |" for seed in seeds)
                 + f" {starts['validation']:.4f} | | {starts['test']:.4f} | | 0 % | |")  # fmt: skip
    for name in results[seeds[0]]:
        validation, test = at_best(name, "validation"), at_best(name, "test")
        units = [results[seed][name]["units"][best(results[seed][name])] for seed in seeds]
        less = [spell_seeds(values - at_best("reference", key)) if name != "reference" else ""
                for values, key in ((validation, "validation"), (test, "test"))]  # fmt: skip
        spread = f"{min(units):.0f}" if min(units) == max(units) else f"{min(units):.0f}-{max(units):.0f}"
        lines.append(
            f"| {name} |" + "".join(f" {value:.4f} |" for value in validation)
            + f" {validation.mean():.4f} | {less[0]} | {test.mean():.4f} | {less[1]} "
            f"| {at_best(name, 'support').mean():.0%} | {spread} |"
        )  # fmt: skip
    return lines


def spell_seeds(differences: NDArray) -> str:
    """The mean of differences seed by seed and, for more than one, its standard error."""
    error = f" ± {differences.std(ddof=1) / np.sqrt(len(differences)):.4f}" if len(differences) > 1 else ""
    return f"{differences.mean():+.4f}{error}"


def reading(results: dict[int, dict[str, dict[str, NDArray]]]) -> list[str]:
    """Within what cost each setting reaches the minimum of the reference, in sentences that follow from the curves."""
    lines = []
    for name in next(iter(results.values())):
        if name in ("reference", "incremental"):
            continue
        reached = []
        for seed, found in results.items():
            goal = found["reference"]["validation"].min()
            hits = np.flatnonzero(found[name]["validation"] <= goal)
            reached.append(f"seed {seed} " + (f"after {found[name]['units'][hits[0]]:.0f}" if len(hits) else
                           f"never (closest {found[name]['validation'].min() - goal:+.4f})"))  # fmt: skip
        lines.append(f"- {name} reaches the lowest validation loss of the reference: {', '.join(reached)} units.")
    for seed, found in results.items():
        curve = found["reference"]
        k = best(curve)
        lines.append(
            f"- The reference, seed {seed}: lowest validation loss {curve['validation'][k]:.4f} after "
            f"{curve['step'][k]:.0f} steps ({curve['units'][k]:.0f} units), {curve['validation'][-1]:.4f} after "
            f"{curve['step'][-1]:.0f}."
        )
    return lines


def draw(results: dict[int, dict[str, dict[str, NDArray]]], path: Any) -> None:
    """Train, validation and test loss against the cost, for the first seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lineas import plot

    figure = Figure(figsize=(12, 4.1), layout="constrained")
    FigureCanvasAgg(figure)
    seed, found = next(iter(results.items()))
    for ax, key in zip(figure.subplots(1, 3), ("train", "validation", "test"), strict=True):
        for name, color in COLORS.items():
            color = getattr(plot, color, color)
            if len(found[name][key]) > 1:
                ax.plot(found[name]["units"], found[name][key], color=color, label=name, linewidth=1.6)
            else:
                ax.plot(found[name]["units"], found[name][key], "s", color=color, label=name)
        ax.set(title=f"{key} loss, seed {seed}", xscale="log", xlabel="cost (forward passes of 32 prompts)")
        ax.set_ylim(top=1.05 * found["reference"][key][0])
    figure.axes[0].set_ylabel("squared W2, mean over modules")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/end-to-end-fits.md and .png")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--concepts", nargs="+", default=["insults"], choices=CONCEPTS, help="default insults")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch and of the engine")
    parser.add_argument("--reference-steps", type=int, default=REFERENCE_STEPS, help="for the first seed of insults")
    args = parser.parse_args()
    set_up(args.threads, bf16=True)
    model, tokenizer = load_smollm2()
    # For prompts this short torch's fused attention takes more than half of a step's time on a CPU.
    model.set_attn_implementation("eager")

    lines = [f"{cpu_name()}, torch {torch.__version__}, float32, products of bfloat16 factors."]
    for concept in args.concepts:
        results = {}
        for k, seed in enumerate(args.seeds if concept == "insults" else args.seeds[:1]):
            steps = args.reference_steps if k == 0 and concept == "insults" else SHORTER
            results[seed] = curves(model, tokenizer, concept, seed, steps)
        lines += ["", f"### {concept}", "", *table(results), "", *reading(results)]
        if args.write and concept == "insults":
            draw(results, ROOT / "docs" / "end-to-end-fits.png")
    print("\n".join(lines))
    if args.write:
        write_between(ROOT / "docs" / "end-to-end-fits.md", MARKS, lines)


if __name__ == "__main__":
    main()
