"""Sparse path of end-to-end fits on SmolLM2-135M: support, held-out loss, effect and price of every point.

For each seed the demo's sentences are shuffled and split into 24 + 24 to fit and 24 + 24 to hold out. A dense fit of
12 steps is compared with the path of `lineas.sparse_path_end_to_end` and the refits on its supports. The effect of
maps is the mean VADER compound score of one sampled continuation of each of 48 neutral prompts, with the same random
numbers for all maps; its price is the loss on the demo's neutral text. Intervals are 95 % percentile bootstraps over
prompts, of the means over seeds.

    python benchmarks/sparse_path_smollm2.py [--write] [--seeds 0 1 2] [--threads 2] [--bf16]

For the first seed the penalties are also walked from dense to sparse. With --write the tables go into
docs/sparse-path.md and the picture into docs/sparse-path.png. What is finished is kept in build/sparse-path, so that a
run that was cut off goes on where it was; remove that folder for a run of its own.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _machine import cpu_name
from _sampling import bootstrap_interval, sample, text_loss
from _study import ROOT, Kept, set_up, spell, write_between
from numpy.typing import NDArray

import lineas
from lineas import AffineMap, SteeringMaps
from lineas.demo import sentences
from lineas.demo.model import load_smollm2
from lineas.demo.run import LAYERS
from lineas.fitting.end_to_end import prepare, read_sets
from lineas.fitting.parameters import MapParameters
from lineas.fitting.settings import ObjectiveSettings
from lineas.fitting.step_sizes import SpectralSteps
from lineas.hooks.modules import resolve
from lineas.inputs import frozen

MARKS = "<!-- measured: python benchmarks/sparse_path_smollm2.py --write -->", "<!-- end -->"

SENTENCES, TOKENS = 24, 16  # in each of the four sets; longest
# The demo's rate and steps, without its penalty.
DENSE: dict[str, Any] = {"scaling": "layer-mean", "steps": 12, "lr": 0.3, "patience": None}
PATH = {
    "scaling": "layer-mean",
    "n_penalties": 12,
    "min_ratio": 1e-3,
    "l1_ratio": 1.0,
    "steps": 2,
    "refit_steps": 3,
    "refit_support": 0.5,
    "lr": 0.3,
}
NEW_TOKENS = 20
FEW = 0.10  # the share of neurons at which the effect is to be kept
MORE_PROMPTS = """\
This morning on the bus
My neighbour told me that
The letter from my sister said
When we arrived at the hotel
The class this afternoon was
My brother called me and
The new book on my table
After dinner we talked and
The concert in the park was
Our team played today and
The doctor looked at me and
The train to the city was
When I looked out of the window
The garden behind our house
My first week at school was
The phone call I got today
The people at the market were
Last night I dreamed that
The museum we went to was
My grandmother always said that
On the way home I
The shop at the corner is
When the boss came in
The walk along the river was
The movie ended and I
My friends came over and
The coffee they serve here is
Before the exam I felt
The last day of the year was
The man at the counter was
The picture on the wall
When I woke up today
The birthday of my aunt was
Our new flat is
The song on the radio
At the end of the day I feel""".splitlines()

kept = Kept("sparse-path")


class Study:
    """The model, the data, and everything that is kept on disk."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load_smollm2()
        # For prompts this short torch's fused attention takes more than half of a step's time on a CPU.
        self.model.set_attn_implementation("eager")
        self.prompts = [*sentences("neutral_prompts.txt"), *MORE_PROMPTS]
        self.neutral = sentences("neutral_text.txt")[:32]

    def sets(self, seed: int) -> dict[str, Any]:
        """Arguments of a fit: sentences, shuffled by `seed`, and how to read them."""
        rng = np.random.default_rng(seed)
        negative, positive = (
            [texts[i] for i in rng.permutation(len(texts))]
            for texts in (sentences("negative.txt"), sentences("positive.txt"))
        )
        fit, held = slice(SENTENCES), slice(SENTENCES, 2 * SENTENCES)
        return {
            "source": negative[fit],
            "target": positive[fit],
            "held_out": (negative[held], positive[held]),
            "tokenizer": self.tokenizer,
            "max_length": TOKENS,
        }

    def dense(self, seed: int) -> dict[str, NDArray]:
        """The dense fit: maps, losses and passes."""

        def compute() -> dict[str, Any]:
            result = lineas.fit_end_to_end(self.model, **self.sets(seed), layers=LAYERS, **DENSE, seed=seed)
            if result.stopped != "finished":
                raise SystemExit(result.stopped)
            weight, bias = (np.concatenate([getattr(m, k) for m in result.maps.values()]) for k in ("weight", "bias"))
            steps = len(result.history["loss"])
            # Order, targets, held-out targets; each step and its held-out loss; the last held-out loss.
            return {
                "weight": weight,
                "bias": bias,
                "loss": result.history["loss"],
                "held_out": result.held_out_loss,
                "start": result.history["held_out_loss"][0],
                "passes": 3 + 4 * steps + 1,
            }

        return kept(f"dense-{seed}", compute)

    def path(self, seed: int) -> dict[str, NDArray]:
        """The path and its refits."""

        def compute() -> dict[str, Any]:
            found = lineas.sparse_path_end_to_end(self.model, **self.sets(seed), layers=LAYERS, **PATH, seed=seed)
            if found.stopped != "finished":  # an interrupted path is not to be taken for a whole one
                raise SystemExit(found.stopped)
            refits = found.history["refit"]
            return {
                "weight": found.weight,
                "bias": found.bias,
                "penalties": found.penalties,
                "support": found.support,
                "loss": found.loss,
                "held_out": found.held_out_loss,
                "penalized_loss": found.penalized_loss,
                "penalized": found.penalized_held_out_loss,
                "modules": (found.module_support > 0).sum(axis=1),
                "passes": found.passes,
                # A refit costs 3 a step, and a held-out loss.
                "refit_passes": 3 * refits.sum() + len(np.unique(found.history["point"][refits])),
            }

        return kept(f"path-{seed}", compute)

    def down(self, seed: int) -> dict[str, NDArray]:
        """The same penalties from dense to sparse: from the dense fit, with as many steps at each and no refits."""

        def compute() -> dict[str, Any]:
            data = self.sets(seed)
            settings = ObjectiveSettings(
                layers=LAYERS,
                tokenizer=data["tokenizer"],
                max_length=data["max_length"],
                scaling=DENSE["scaling"],
                progress=False,
            )
            sets = read_sets(None, (data["source"], data["target"]), data["held_out"], settings)
            dense, penalties = self.dense(seed), self.path(seed)["penalties"]
            with frozen.frozen(self.model):
                objective, fitted, held_out, _ = prepare(self.model, [sets], settings)
                maps = MapParameters(objective.widths, objective.dtype, objective.device)
                maps.load(self.maps(dense["weight"], dense["bias"]))
                steps = SpectralSteps(objective, maps, DENSE["lr"])
                steps.look(fitted)
                rows = []
                for penalty in penalties[:0:-1]:
                    for _ in range(PATH["steps"]):
                        steps.step((float(penalty), 0.0, float(penalty), 0.0))
                    support = int(steps.iterate.support().sum())
                    loss = objective.loss(held_out, maps.leaves())[0]
                    steps.passes += 1
                    rows.append((penalty, support, steps.iterate.loss, loss))
            keys = ("penalties", "support", "loss", "held_out")
            columns = (np.array(column[::-1]) for column in zip(*rows, strict=True))
            return {**dict(zip(keys, columns, strict=True)), "passes": steps.passes + int(dense["passes"])}

        return kept(f"down-{seed}", compute)

    def effect(self, name: str, seed: int, weight: NDArray | None = None, bias: NDArray | None = None) -> dict:
        """Scores of a continuation of each prompt, and the loss on neutral text, with maps on or without any."""

        def compute() -> dict[str, Any]:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

            judge = SentimentIntensityAnalyzer()
            with nullcontext() if weight is None else SteeringMaps(self.maps(weight, bias)).attach(self.model):
                groups = sample(self.model, self.tokenizer, self.prompts, 1, seed=seed, new_tokens=NEW_TOKENS)
                loss = text_loss(self.model, self.tokenizer, self.neutral)
            return {"scores": [judge.polarity_scores(text)["compound"] for (text,) in groups], "loss": loss}

        return kept(f"effect-{name}-{seed}", compute)

    def maps(self, weight: NDArray, bias: NDArray) -> dict[str, AffineMap]:
        """Maps of all layers out of their flat slopes and shifts."""
        names = resolve(self.model, LAYERS)
        pairs = zip(np.split(weight, len(names)), np.split(bias, len(names)), strict=True)
        return {name: AffineMap(*pair) for name, pair in zip(names, pairs, strict=True)}


# ---- tables and picture ----------------------------------------------------------------------------------------------


class Results:
    """All numbers of all seeds: K points, S seeds, P prompts."""

    def __init__(self, study: Study, seeds: list[int]) -> None:
        self.seeds = seeds
        self.d = study.dense(seeds[0])["weight"].size
        for seed in seeds:
            study.path(seed)
        paths = [study.path(seed) for seed in seeds]
        dense = [study.dense(seed) for seed in seeds]
        self.count = len(paths[0]["penalties"])
        self.of_path = {key: np.array([found[key] for found in paths], np.float64) for key in paths[0]}
        self.of_dense = {key: np.array([found[key] for found in dense], np.float64) for key in dense[0]}
        off = [study.effect("off", seed) for seed in seeds]
        full = [study.effect("dense", seed, d["weight"], d["bias"]) for seed, d in zip(seeds, dense, strict=True)]
        points = []
        for k in range(self.count):
            points.append(
                [
                    # The identity needs no sampling.
                    study.effect(f"point-{k}", seed, p["weight"][k], p["bias"][k]) if p["support"][k] else off[s]
                    for s, (seed, p) in enumerate(zip(seeds, paths, strict=True))
                ]
            )
        # Mean over seeds for each prompt: [P], [P], [K, P].
        self.off, self.full = (np.mean([e["scores"] for e in effects], axis=0) for effects in (off, full))
        self.points = np.array([np.mean([e["scores"] for e in effects], axis=0) for effects in points])
        self.off_loss, self.full_loss = (float(np.mean([e["loss"] for e in effects])) for effects in (off, full))
        self.point_loss = np.array([np.mean([e["loss"] for e in effects]) for effects in points])

    @property
    def share(self) -> NDArray:
        """Support as a share of the neurons, mean over seeds: [K]."""
        return self.of_path["support"].mean(axis=0) / self.d

    def difference(self, k: int, other: NDArray) -> tuple[float, float, float]:
        """Mean difference of the scores of point `k` and `other`, prompt by prompt, with its interval."""
        values = self.points[k] - other
        return float(values.mean()), *bootstrap_interval(values, seed=0)

    def keeps(self, k: int) -> bool:
        """Whether the effect is kept: the difference from dense may be 0, that from unsteered may not."""
        _, low, high = self.difference(k, self.full)
        _, gain, _ = self.difference(k, self.off)
        return low <= 0 <= high and gain > 0

    def table(self) -> list[str]:
        """One line a point, as Markdown."""
        lines = [
            "| penalty | support | held-out loss, penalised | refitted | effect score | less unsteered | less dense "
            "| loss on neutral text |",
            "| ---: | ---: | ---: | ---: | ---: | --- | --- | ---: |",
        ]
        held = self.of_dense["start"].mean()
        lines.append(f"| unsteered | 0 | {held:.4f} | | {self.off.mean():+.3f} | | | {self.off_loss:.3f} |")
        penalized, refitted = (self.of_path[key].mean(axis=0) for key in ("penalized", "held_out"))
        for k in range(self.count):
            lines.append(
                f"| {self.of_path['penalties'].mean(axis=0)[k]:.2e} | {self.share[k]:.2%} | {penalized[k]:.4f} "
                f"| {refitted[k]:.4f} | {self.points[k].mean():+.3f} | {spell(self.difference(k, self.off))} "
                f"| {spell(self.difference(k, self.full))} | {self.point_loss[k]:.3f} |"
            )
        gain = self.full - self.off
        gained = spell((float(gain.mean()), *bootstrap_interval(gain, seed=0)))
        lines.append(
            f"| dense fit | 100.00% | {self.of_dense['held_out'].mean():.4f} | | {self.full.mean():+.3f} | {gained} | "
            f"| {self.full_loss:.3f} |"
        )
        return lines

    def reading(self) -> list[str]:
        """What the table says, in sentences that follow from its numbers."""
        dense = self.of_dense["passes"].mean()
        refits = self.of_path["refit_passes"].mean()
        alone = self.of_path["passes"].mean() - refits
        lines = [
            f"- A dense fit takes {dense:.0f} model passes, the path of {self.count} penalties {alone:.0f}, which is "
            f"{alone / dense:.2f} times that, and the refits {refits:.0f} more ({(alone + refits) / dense:.2f} times "
            "with them).",
            f"- The supports go from {self.share.max():.1%} to {self.share[self.share > 0].min():.2%}, and 0.",
        ]
        few = [k for k in range(self.count) if 0 < self.share[k] <= FEW]
        if not few:
            return [*lines, f"- No point has a support up to {FEW:.0%}."]
        best = max(few, key=lambda k: self.points[k].mean())
        kept_at = [k for k in few if self.keeps(k)]
        gained = self.points[best].mean() - self.off.mean()
        whole = self.full.mean() - self.off.mean()
        if kept_at:
            shares = ", ".join(f"{self.share[k]:.2%}" for k in kept_at)
            lines.append(
                f"- The effect is kept at a support of {shares}: the interval of the difference from dense includes 0 "
                "and that of the difference from unsteered does not."
            )
        else:
            lines.append(f"- At no support up to {FEW:.0%} is the effect kept in the sense of the two intervals.")
        lines.append(
            f"- The largest effect at a support up to {FEW:.0%} is at {self.share[best]:.2%}: {gained:+.3f}, of "
            f"{whole:+.3f} that the dense fit reaches ({gained / whole:.0%})."
        )
        return lines

    def draw(self, path: Path) -> None:
        """Held-out loss, effect and neutral loss against the support."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        from lineas.notebook.plot import BLUE, GREY, ORANGE

        figure = Figure(figsize=(12, 4.1), layout="constrained")
        FigureCanvasAgg(figure)
        losses, effects, prices = figure.subplots(1, 3)
        some = self.share > 0
        x = 100 * self.share[some]
        for key, label, color in (("penalized", "penalised", GREY), ("held_out", "refitted on the support", BLUE)):
            losses.plot(x, self.of_path[key].mean(axis=0)[some], "o-", color=color, label=label, markersize=4)
        marks = (
            (losses, self.of_dense["start"].mean(), self.of_dense["held_out"].mean()),
            (effects, self.off.mean(), self.full.mean()),
            (prices, self.off_loss, self.full_loss),
        )
        for ax, off, dense in marks:
            ax.axhline(off, color=GREY, linestyle=":", label="unsteered")
            ax.axhline(dense, color=ORANGE, linestyle="--", label="dense fit")
        scores = self.points[some]
        bounds = np.array([bootstrap_interval(row, seed=0) for row in scores])
        middle = scores.mean(axis=1)
        effects.errorbar(x, middle, np.abs(bounds.T - middle), color=BLUE, fmt="o-", markersize=4, capsize=2)
        prices.plot(x, self.point_loss[some], "o-", color=BLUE, markersize=4)
        for ax, title in ((losses, "Held-out loss"), (effects, "Effect score"), (prices, "Loss on neutral text")):
            ax.set(title=title, xscale="log", xlabel="neurons changed (%)")
        figure.legend(*losses.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
        losses.set_ylabel("squared W2, mean over modules")
        effects.set_ylabel("mean VADER score, 95 % interval")
        prices.set_ylabel("nats a token")
        figure.savefig(path, dpi=130)


def directions(study: Study, seed: int) -> list[str]:
    """Sparse to dense against dense to sparse, at the same penalties, before any refit."""
    up, down = study.path(seed), study.down(seed)
    lines = [
        "| penalty | support, up | fitted loss | held-out loss | support, down | fitted loss | held-out loss |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    d = study.dense(seed)["weight"].size
    for k, penalty in enumerate(down["penalties"]):
        lines.append(
            f"| {penalty:.2e} | {up['support'][k + 1] / d:.2%} | {up['penalized_loss'][k + 1]:.4f} "
            f"| {up['penalized'][k + 1]:.4f} | {down['support'][k] / d:.2%} | {down['loss'][k]:.4f} "
            f"| {down['held_out'][k]:.4f} |"
        )
    alone = int(up["passes"] - up["refit_passes"])
    return [*lines, "", f"Model passes: {alone} up, {int(down['passes'])} down with its dense fit."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/sparse-path.md and docs/sparse-path.png")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch and of the engine")
    parser.add_argument("--bf16", action="store_true", help="round the factors of matrix products to bfloat16: faster")
    args = parser.parse_args()
    set_up(args.threads, args.bf16)

    study = Study()
    results = Results(study, args.seeds)
    machine = (
        f"{cpu_name()}, torch {torch.__version__}, float32{', products of bfloat16 factors' if args.bf16 else ''}; "
        f"seeds {', '.join(map(str, args.seeds))}, {len(study.prompts)} prompts, {results.d} neurons."
    )
    lines = [machine, "", *results.table(), "", *results.reading()]
    lines += ["", f"Directions (seed {args.seeds[0]}, before any refit):", "", *directions(study, args.seeds[0])]
    print("\n".join(lines))
    if args.write:
        write_between(ROOT / "docs" / "sparse-path.md", MARKS, lines)
        results.draw(ROOT / "docs" / "sparse-path.png")


if __name__ == "__main__":
    main()
