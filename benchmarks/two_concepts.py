"""Two concepts at once on SmolLM2-135M, at equal price: maps fitted one by one, in sequence and jointly.

Concept A goes from negative to positive sentences (the demo's), concept B from sentences about anything but food to
sentences about food (benchmarks/data). For each seed the sentences are shuffled and split into 24 + 24 to fit and
24 + 24 to hold out, for each concept. The strength of every row is the one at which the loss on 32 neutral texts has
risen by a given amount; the rise that is reported is that on 32 others. Two continuations of each of 48 neutral prompts
are judged by others' word lists: A is reached where VADER's compound score is at least 0.05, the threshold of its
authors, B where the text has a word of the category "eating" of Empath (Fast, Chen and Bernstein 2016). Random numbers
are the same for all maps.

    python benchmarks/two_concepts.py [--write] [--seeds 0 1] [--rises 0.3 0.5] [--rows ...] [--threads 2] [--bf16]
    python benchmarks/two_concepts.py --select [--rows ...]

With --write the tables go into docs/two-concepts.md. With --select everything is measured with another seed and on
other prompts, by which settings were chosen. What is finished is kept in build/two-concepts, so that a run that was cut
off goes on where it was; remove that folder for a run of its own.
"""

from __future__ import annotations

import argparse
import re
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from _machine import cpu_name
from _packages import member
from _sampling import bootstrap_interval, continuations, text_losses
from _study import ROOT, Kept, data_lines, digest, set_up, write_between
from _toxicity_results import strength_at
from numpy.typing import NDArray
from sparse_path_smollm2 import MORE_PROMPTS

import lineas
from lineas import AffineMap, SteeringMaps
from lineas.demo import sentences
from lineas.demo.model import load_smollm2
from lineas.demo.run import LAYERS
from lineas.fitting.end_to_end import prepare, read_sets
from lineas.fitting.parameters import parameters_of
from lineas.fitting.settings import ObjectiveSettings
from lineas.hooks.modules import resolve
from lineas.inputs import frozen

MARKS = "<!-- measured: python benchmarks/two_concepts.py --write -->", "<!-- end -->"
SENTENCES, MAX_LENGTH = 24, 16  # in each of the eight sets; tokens of the longest
FIT: dict[str, Any] = {"layers": LAYERS, "steps": 12, "patience": None}
SAMPLES, NEW_TOKENS = 2, 20
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # at which the loss is tried
LARGEST_RISE = 0.5  # up to which it is
SELECTION_SEED = 10
SELECTION_PROMPTS = """\
When I got home last night
The new neighbours upstairs
On the train to the city
My brother called and said
The old house at the corner
After the long meeting we
Last summer we decided to
The teacher walked in and
In the small town where I live
The book that I am reading
During the flight to the south
My first week at the office
The walls of the old school
Yesterday evening my friends and I
The people at the market
Before the guests arrived we
The dog next door always
Our visit to the museum was
The next morning the children
While we waited for the bus
The phone call from the bank
At the end of the street
The concert on Friday was
My uncle always tells us""".splitlines()


class Row(NamedTuple):
    """A row of the tables: what it is called, and which maps act, in order: of which fits, and of which concepts."""

    label: str
    parts: tuple[tuple[str, str], ...] = ()


# Fits by name: the order of the concepts, or "joint", and settings beside FIT.
KEPT: dict[str, Any] = {"max_kl": 0.1}
LAST_NORM: dict[str, Any] = {"loss_layers": "model.norm"}
FITS: dict[str, tuple[str, dict[str, Any]]] = {
    "AB": ("AB", {}),
    "B": ("B", {}),
    "BA": ("BA", {}),
    "disjoint": ("AB", {"l1": 0.05, "disjoint": True}),  # about half of the neurons have a steeper gradient at first
    "joint": ("joint", {}),
    "kept AB": ("AB", KEPT),
    "kept B": ("B", KEPT),
    "preserved": ("AB", {**KEPT, "preserve": True}),
    "last norm AB": ("AB", LAST_NORM),
    "last norm B": ("B", LAST_NORM),
    "last norm joint": ("joint", LAST_NORM),
}
ROWS = {
    "none": Row("none"),
    "A": Row("A alone", (("AB", "A"),)),
    "B": Row("B alone", (("B", "B"),)),
    "naive": Row("naive: B after A", (("AB", "A"), ("B", "B"))),
    "sequence": Row("`fit_sequence`, A and then B", (("AB", "A"), ("AB", "B"))),
    "reversed": Row("`fit_sequence`, B and then A", (("BA", "B"), ("BA", "A"))),
    "disjoint": Row("`fit_sequence`, disjoint", (("disjoint", "A"), ("disjoint", "B"))),
    "joint": Row("`fit_jointly`", (("joint", "AB"),)),
    "kept A": Row("A alone, `max_kl`", (("kept AB", "A"),)),
    "kept B": Row("B alone, `max_kl`", (("kept B", "B"),)),
    "kept naive": Row("naive, `max_kl`", (("kept AB", "A"), ("kept B", "B"))),
    "kept sequence": Row("`fit_sequence`, `max_kl`", (("kept AB", "A"), ("kept AB", "B"))),
    "preserved": Row("`fit_sequence`, `max_kl`, `preserve`", (("preserved", "A"), ("preserved", "B"))),
    "last norm A": Row("A alone, last norm", (("last norm AB", "A"),)),
    "last norm B": Row("B alone, last norm", (("last norm B", "B"),)),
    "last norm naive": Row("naive, last norm", (("last norm AB", "A"), ("last norm B", "B"))),
    "last norm sequence": Row("`fit_sequence`, last norm", (("last norm AB", "A"), ("last norm AB", "B"))),
    "last norm joint": Row("`fit_jointly`, last norm", (("last norm joint", "AB"),)),
}

kept = Kept("two-concepts")


@cache
def eating() -> frozenset[str]:
    """The words of Empath's category."""
    for line in member("empath", "empath/data/categories.tsv").decode().splitlines():
        name, *words = line.split("\t")
        if name == "eating":
            return frozenset(words)
    raise SystemExit("Empath has no category 'eating'")


def about_food(text: str) -> bool:
    """Whether a text has a word of the category, or its plural in -s or -es."""
    words = re.findall(r"[a-z]+", text.lower())
    return any({word, word.removesuffix("s"), word.removesuffix("es")} & eating() for word in words)


class Study:
    """The model, the data, and everything that is kept on disk."""

    def __init__(self, *, select: bool = False) -> None:
        self.model, self.tokenizer = load_smollm2()
        self.model.set_attn_implementation("eager")  # faster than torch's fused attention for prompts this short
        self.name = "select" if select else "report"
        self.prompts = SELECTION_PROMPTS if select else [*sentences("neutral_prompts.txt"), *MORE_PROMPTS]
        neutral = sentences("neutral_text.txt")
        self.neutral, self.calibration = neutral[:32], neutral[32:64]
        if select:
            self.neutral = self.calibration
        food, other = data_lines("food"), data_lines("not_food")
        self.concepts = {"A": (sentences("negative.txt"), sentences("positive.txt")), "B": (other, food)}

    def sets(self, seed: int) -> dict[str, tuple[Any, Any]]:
        """The sentences to fit and those held out, each as (source, target), of both concepts."""
        rng = np.random.default_rng(seed)
        fit, held = slice(SENTENCES), slice(SENTENCES, 2 * SENTENCES)
        found = {}
        for name, sides in self.concepts.items():
            source, target = ([texts[i] for i in rng.permutation(len(texts))] for texts in sides)
            found[name] = (source[fit], target[fit]), (source[held], target[held])
        return found

    def fitted(self, name: str, seed: int) -> dict[str, NDArray]:
        """Slopes and shifts of every concept of a fit, [D], what each cost and its held-out divergence."""
        order, settings = FITS[name]

        def compute() -> dict[str, Any]:
            sets = self.sets(seed)
            concepts = "AB" if order == "joint" else order
            tasks, held_out = ({concept: sets[concept][k] for concept in concepts} for k in (0, 1))
            how = {**FIT, "tokenizer": self.tokenizer, "max_length": MAX_LENGTH, "seed": seed, **settings}
            if order == "joint":
                results = {"AB": lineas.fit_jointly(self.model, tasks, held_out=held_out, **how)}
            elif len(order) == 1:
                how |= {"held_out": held_out[order]}
                results = {order: lineas.fit_end_to_end(self.model, *tasks[order], **how)}
            else:
                results = lineas.fit_sequence(self.model, tasks, held_out=held_out, **how).results
            wanted = {"AB"} if order == "joint" else set(order)
            if results.keys() != wanted or any(result.stopped == "interrupted" for result in results.values()):
                raise SystemExit("interrupted")
            found: dict[str, Any] = {}
            for concept, result in results.items():
                for part in ("weight", "bias"):
                    found[f"{concept} {part}"] = np.concatenate([getattr(m, part) for m in result.maps.values()])
                found[f"{concept} passes"] = result.passes + result.held_out_passes
                found[f"{concept} support"] = result.maps.support
                found[f"{concept} keep"] = np.nan if result.held_out_keep is None else result.held_out_keep
            return found

        key = digest([SENTENCES, MAX_LENGTH, FIT["steps"], order, settings])
        return kept(f"fit-{name.replace(' ', '-')}-{key}-{seed}", compute)

    def maps(self, row: str, seed: int) -> SteeringMaps | None:
        """The maps of a row, composed; None for none."""
        names, composed = resolve(self.model, LAYERS), None
        for fit, concept in ROWS[row].parts:
            found = self.fitted(fit, seed)
            parts = (np.split(found[f"{concept} {part}"], len(names)) for part in ("weight", "bias"))
            maps = SteeringMaps(
                {module: AffineMap(*pair) for module, pair in zip(names, zip(*parts, strict=True), strict=True)}
            )
            composed = maps if composed is None else maps @ composed
        return composed

    def held_out(self, row: str, seed: int) -> NDArray:
        """Held-out losses of both concepts, [2], under the maps of a row at strength 1."""

        def compute() -> dict[str, Any]:
            settings = ObjectiveSettings(layers=LAYERS, tokenizer=self.tokenizer, max_length=MAX_LENGTH, progress=False)
            sets = [read_sets(concept, *pairs, settings) for concept, pairs in self.sets(seed).items()]
            with frozen.frozen(self.model):
                objective, _, held_out, _ = prepare(self.model, sets, settings)
                parameters = parameters_of(objective, settings)
                maps = self.maps(row, seed)
                if maps is not None:
                    parameters.load(maps)
                return {"loss": objective.loss(held_out, parameters.leaves())[1].mean(dim=1).tolist()}

        return kept(f"held-out-{self._key(row, seed)}", compute)["loss"]

    def _key(self, row: str, seed: int) -> str:
        fits = [(FITS[fit], concept) for fit, concept in ROWS[row].parts]
        return f"{row.replace(' ', '-')}-{digest([SENTENCES, MAX_LENGTH, FIT['steps'], fits])}-{seed}"

    def _loss(self, texts: list[str]) -> float:
        sums, counts = text_losses(self.model, self.tokenizer, texts)
        return float(sums.sum() / counts.sum())

    def strength(self, row: str, rise: float, seed: int) -> float:
        """The strength at which the loss on the calibration texts has risen by `rise`."""

        def compute() -> dict[str, Any]:
            maps, rises = self.maps(row, seed), [0.0]
            assert maps is not None
            before = self._loss(self.calibration)
            for strength in STRENGTHS[1:]:
                if rises[-1] >= LARGEST_RISE:
                    break
                with maps.attach(self.model, strength=strength):
                    rises.append(self._loss(self.calibration) - before)
            return {"rises": rises}

        rises = kept(f"price-{self._key(row, seed)}", compute)["rises"]
        return strength_at(np.array(STRENGTHS[: len(rises)]), rises, rise)

    def effect(self, row: str, rise: float, seed: int) -> dict[str, NDArray]:
        """Whether A and B are reached, bool [prompts, samples] each, the loss on neutral text and the strength."""

        def compute() -> dict[str, Any]:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

            judge = SentimentIntensityAnalyzer()
            shape = len(self.prompts), SAMPLES
            uniforms = np.random.default_rng(seed).random((shape[0] * SAMPLES, NEW_TOKENS))
            repeated = [prompt for prompt in self.prompts for _ in range(SAMPLES)]
            maps = self.maps(row, seed)
            strength = 0.0 if maps is None else self.strength(row, rise, seed)
            with nullcontext() if maps is None else maps.attach(self.model, strength=strength):
                texts = continuations(self.model, self.tokenizer, repeated, uniforms)
                loss = self._loss(self.neutral)
            return {
                "A": np.array([judge.polarity_scores(text)["compound"] >= 0.05 for text in texts]).reshape(shape),
                "B": np.array([about_food(text) for text in texts]).reshape(shape),
                "loss": loss,
                "strength": strength,
                "texts": np.array(texts),
            }

        at = "" if row == "none" else f"-{rise:g}"
        return kept(f"{self.name}-{self._key(row, seed)}{at}", compute)


# ---- tables ----------------------------------------------------------------------------------------------------------


class Results:
    """Success by prompt, [P], means over samples and seeds; A, B and "both" of every row and rise of the loss."""

    def __init__(self, study: Study, seeds: list[int], rises: list[float], rows: list[str]) -> None:
        self.rises, self.rows = rises, rows
        self.held_out = {row: np.mean([study.held_out(row, seed) for seed in seeds], axis=0) for row in rows}
        self.success: dict[tuple[str, float], dict[str, NDArray]] = {}
        self.price: dict[tuple[str, float], float] = {}
        self.strength: dict[tuple[str, float], float] = {}
        before = np.mean([study.effect("none", 0.0, seed)["loss"] for seed in seeds])
        for rise in rises:
            for row in rows:
                found = [study.effect(row, rise, seed) for seed in seeds]
                reached = {concept: np.array([one[concept] for one in found]) for concept in "AB"}
                reached["both"] = reached["A"] & reached["B"]
                self.success[row, rise] = {key: hits.mean(axis=(0, 2)) for key, hits in reached.items()}
                self.price[row, rise] = float(np.mean([one["loss"] for one in found]) - before)
                self.strength[row, rise] = float(np.mean([one["strength"] for one in found]))

    def share(self, row: str, rise: float, concept: str) -> str:
        """A share of the continuations and its interval."""
        values = self.success[row, rise][concept]
        low, high = bootstrap_interval(values, seed=0)
        return f"{values.mean():.0%} [{low:.0%}, {high:.0%}]"

    def ratio(self, row: str, rise: float) -> tuple[float, float, float]:
        """Joint success of a row divided by that of the naive composition, and its interval over prompts."""
        ours, naive = (self.success[name, rise]["both"] for name in (row, "naive"))
        if not naive.any():
            return (np.nan,) * 3
        rng = np.random.default_rng(0)
        drawn = rng.integers(0, len(ours), size=(2000, len(ours)))
        below = naive[drawn].mean(axis=1)
        some = below > 0  # all of them, but with very few prompts
        low, high = np.percentile(ours[drawn].mean(axis=1)[some] / below[some], [2.5, 97.5])
        return float(ours.mean() / naive.mean()), float(low), float(high)

    def table(self) -> list[str]:
        lines = [
            "| maps | held-out loss of A | of B | their mean |",
            "| --- | ---: | ---: | ---: |",
        ]
        for row in self.rows:
            a, b = self.held_out[row]
            lines.append(f"| {ROWS[row].label} | {a:.4f} | {b:.4f} | {(a + b) / 2:.4f} |")
        for rise in self.rises:
            lines += [
                "",
                f"At strengths where the loss on neutral text rises by {rise:g} nats a token:",
                "",
                "| maps | strength | A reached | B reached | both | times naive | rise on other text |",
                "| --- | ---: | --- | --- | --- | --- | ---: |",
            ]
            for row in self.rows:
                shares = " | ".join(self.share(row, rise, concept) for concept in ("A", "B", "both"))
                strength = "" if row == "none" else f"{self.strength[row, rise]:.2f}"
                times = ""
                if row not in ("none", "naive") and "naive" in self.rows:
                    times = "{:.2f} [{:.2f}, {:.2f}]".format(*self.ratio(row, rise))
                lines.append(f"| {ROWS[row].label} | {strength} | {shares} | {times} | {self.price[row, rise]:+.3f} |")
        return lines

    def reading(self) -> list[str]:
        """What the tables say, in sentences that follow from their numbers."""
        lines = []
        for rise in self.rises:
            both = {row: float(self.success[row, rise]["both"].mean()) for row in self.rows}
            pairs = [row for row in self.rows if {*"AB"} == {*"".join(concept for _, concept in ROWS[row].parts)}]
            best = max(pairs, key=lambda row: both[row])
            line = f"- At a rise of {rise:g} nats the most continuations with both, {both[best]:.0%}, are those of: "
            line += f"{ROWS[best].label}"
            if "naive" in self.rows and best != "naive":
                times, low, high = self.ratio(best, rise)
                line += f"; {times:.2f} times [{low:.2f}, {high:.2f}] the {both['naive']:.0%} of the naive composition"
            lines.append(line + ".")
            for a, b, words in (
                ("A", "B", "Spent"),
                ("kept A", "kept B", "With `max_kl`, spent"),
                ("last norm A", "last norm B", "With the loss at the last norm, spent"),
            ):
                if a in self.rows and b in self.rows:
                    first, second = (float(self.success[a, rise]["A"].mean()), float(self.success[b, rise]["B"].mean()))
                    lines.append(
                        f"- {words} on one concept alone, that rise reaches A in {first:.0%} and B in {second:.0%}: "
                        f"both in {first * second:.0%}, if they were independent and each had the whole of it."
                    )
        return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/two-concepts.md")
    parser.add_argument("--select", action="store_true", help="another seed and other prompts, to choose settings by")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default 0 1")
    parser.add_argument("--rises", type=float, nargs="+", default=[0.3, 0.5], help="in nats; default 0.3 0.5")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch and of the engine")
    parser.add_argument("--bf16", action="store_true", help="round the factors of matrix products to bfloat16: faster")
    args = parser.parse_args()
    if args.write and args.select:
        parser.error("--write does not go with --select: the page has what settings were not chosen by")
    if not all(0 < rise <= LARGEST_RISE for rise in args.rises):
        parser.error(f"--rises must be above 0 and at most {LARGEST_RISE:g}")
    set_up(args.threads, args.bf16)

    study = Study(select=args.select)
    seeds = [SELECTION_SEED] if args.select else args.seeds
    results = Results(study, seeds, args.rises, args.rows)
    machine = (
        f"{cpu_name()}, torch {torch.__version__}, float32{', products of bfloat16 factors' if args.bf16 else ''}; "
        f"seeds {', '.join(map(str, seeds))}, {len(study.prompts)} prompts, {SAMPLES} continuations of "
        f"{NEW_TOKENS} tokens each."
    )
    lines = [machine, "", *results.table(), "", *results.reading()]
    print("\n".join(lines))
    if args.write:
        write_between(ROOT / "docs" / "two-concepts.md", MARKS, lines)


if __name__ == "__main__":
    main()
