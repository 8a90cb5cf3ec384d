"""Two concepts at once on SmolLM2-135M: maps fitted jointly beside maps that were fitted one by one and composed.

Concept A goes from negative to positive sentences (the demo's), concept B from sentences about anything but food to
sentences about food (benchmarks/data). For each seed the sentences are shuffled and split into 24 + 24 to fit and
24 + 24 to hold out, for each concept. Two continuations of each of 48 neutral prompts are judged by others' word lists:
A is reached where VADER's compound score is at least 0.05, the threshold of its authors, B where the text has a word of
the category "eating" of Empath (Fast, Chen and Bernstein 2016). Random numbers are the same for all maps.

    python benchmarks/two_concepts.py [--write] [--seeds 0 1] [--strengths 1 1.5 2] [--threads 2] [--bf16]

With --write the table goes into docs/two-concepts.md. What is finished is kept in build/two-concepts, so that a run
that was cut off goes on where it was; remove that folder for a run of its own.
"""

from __future__ import annotations

import argparse
import re
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from _machine import cpu_name
from _packages import member
from _sampling import bootstrap_interval, continuations, text_losses
from _study import ROOT, Kept, set_up, spell, write_between
from numpy.typing import NDArray
from sparse_path_smollm2 import MORE_PROMPTS

import lineas
from lineas import AffineMap, SteeringMaps
from lineas.demo import sentences
from lineas.demo.model import load_smollm2
from lineas.demo.run import LAYERS
from lineas.fitting.end_to_end import prepare, read_sets
from lineas.fitting.parameters import MapParameters
from lineas.fitting.settings import ObjectiveSettings
from lineas.hooks.modules import resolve
from lineas.inputs import frozen

MARKS = "<!-- measured: python benchmarks/two_concepts.py --write -->", "<!-- end -->"
SENTENCES, MAX_LENGTH = 24, 16  # in each of the eight sets; tokens of the longest
FIT: dict[str, Any] = {"layers": LAYERS, "steps": 12, "patience": None}
SAMPLES, NEW_TOKENS = 2, 20
NAMES = {
    "none": "none",
    "A": "A alone",
    "B": "B alone",
    "B@A": "naive: B after A",
    "A@B": "naive: A after B",
    "B|A": "B fitted with A on, after A",
    "joint": "joint fit",
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

    def __init__(self) -> None:
        self.model, self.tokenizer = load_smollm2()
        self.model.set_attn_implementation("eager")  # faster than torch's fused attention for prompts this short
        self.prompts = [*sentences("neutral_prompts.txt"), *MORE_PROMPTS]
        self.neutral = sentences("neutral_text.txt")[:32]
        data = ROOT / "benchmarks" / "data"
        food, other = ((data / f"{name}.txt").read_text("utf-8").splitlines() for name in ("food", "not_food"))
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

    def _fitted(self, name: str, seed: int) -> dict[str, Any]:
        sets = self.sets(seed)
        how = {**FIT, "tokenizer": self.tokenizer, "max_length": MAX_LENGTH, "seed": seed}
        if name == "joint":
            found = lineas.fit_jointly(
                self.model,
                {concept: fitted for concept, (fitted, _) in sets.items()},
                held_out={concept: held for concept, (_, held) in sets.items()},
                **how,
            )
        else:
            fitted, held = sets[name[0]]
            with self.maps(name[2:], seed).attach(self.model) if "|" in name else nullcontext():
                found = lineas.fit_end_to_end(self.model, *fitted, held_out=held, **how)
        if found.stopped == "interrupted":
            raise SystemExit("interrupted")
        flat = {k: np.concatenate([getattr(m, k) for m in found.maps.values()]) for k in ("weight", "bias")}
        return {**flat, "passes": found.passes + found.held_out_passes, "best_step": found.best_step}

    def fitted(self, name: str, seed: int) -> dict[str, NDArray]:
        """Slopes and shifts of fitted maps ("B|A" without A itself), and what the fit cost."""
        return kept(f"fit-{name}-{seed}", lambda: self._fitted(name, seed))

    def maps(self, name: str, seed: int) -> SteeringMaps:
        """The maps of a row of the table: "B@A" is B after A, and so is "B|A", with B fitted while A was on."""
        if "@" in name:
            second, first = name.split("@")
            return self.maps(second, seed) @ self.maps(first, seed)
        found, names = self.fitted(name, seed), resolve(self.model, LAYERS)
        pairs = zip(np.split(found["weight"], len(names)), np.split(found["bias"], len(names)), strict=True)
        maps = SteeringMaps({module: AffineMap(*pair) for module, pair in zip(names, pairs, strict=True)})
        return maps @ self.maps(name[2:], seed) if "|" in name else maps

    def held_out(self, seed: int) -> dict[str, NDArray]:
        """Held-out losses of both concepts, [2], under the maps of each row at strength 1."""

        def compute() -> dict[str, Any]:
            settings = ObjectiveSettings(layers=LAYERS, tokenizer=self.tokenizer, max_length=MAX_LENGTH, progress=False)
            sets = [read_sets(concept, *pairs, settings) for concept, pairs in self.sets(seed).items()]
            rows = {name: None if name == "none" else self.maps(name, seed) for name in NAMES}
            losses = {}
            with frozen.frozen(self.model):
                objective, _, held_out, _ = prepare(self.model, sets, settings)
                for name, maps in rows.items():
                    flat = MapParameters(objective.widths, objective.dtype, objective.device)
                    if maps is not None:
                        flat.load(maps)
                    losses[name] = objective.loss(held_out, flat.leaves())[1].mean(dim=1).tolist()
            return losses

        return kept(f"held-out-{seed}", compute)

    def effect(self, name: str, strength: float, seed: int) -> dict[str, NDArray]:
        """Whether A and B are reached, bool [prompts, samples] each, and the loss on neutral text, with maps on."""

        def compute() -> dict[str, Any]:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

            judge = SentimentIntensityAnalyzer()
            shape = len(self.prompts), SAMPLES
            uniforms = np.random.default_rng(seed).random((shape[0] * SAMPLES, NEW_TOKENS))
            repeated = [prompt for prompt in self.prompts for _ in range(SAMPLES)]
            on = nullcontext() if name == "none" else self.maps(name, seed).attach(self.model, strength=strength)
            with on:
                texts = continuations(self.model, self.tokenizer, repeated, uniforms)
                sums, counts = text_losses(self.model, self.tokenizer, self.neutral)
            return {
                "A": np.array([judge.polarity_scores(text)["compound"] >= 0.05 for text in texts]).reshape(shape),
                "B": np.array([about_food(text) for text in texts]).reshape(shape),
                "loss": sums.sum() / counts.sum(),
                "texts": np.array(texts),
            }

        return kept(f"effect-{name}-{strength:g}-{seed}", compute)


# ---- tables ----------------------------------------------------------------------------------------------------------


class Results:
    """Success by prompt, [P], means over samples and seeds; A, B and "both" of every row and strength."""

    def __init__(self, study: Study, seeds: list[int], strengths: list[float]) -> None:
        self.strengths = strengths
        self.held_out = {name: np.mean([study.held_out(seed)[name] for seed in seeds], axis=0) for name in NAMES}
        self.success: dict[tuple[str, float], dict[str, NDArray]] = {}
        self.price: dict[tuple[str, float], float] = {}
        self.passes = {
            name: np.mean([study.fitted(name, seed)["passes"] for seed in seeds]) for name in ("A", "B", "B|A", "joint")
        }
        for strength in strengths:
            for name in NAMES:
                found = [study.effect(name, 0.0 if name == "none" else strength, seed) for seed in seeds]
                reached = {concept: np.array([one[concept] for one in found]) for concept in "AB"}
                reached["both"] = reached["A"] & reached["B"]
                self.success[name, strength] = {key: hits.mean(axis=(0, 2)) for key, hits in reached.items()}
                self.price[name, strength] = float(np.mean([one["loss"] for one in found]))

    def share(self, name: str, strength: float, concept: str) -> str:
        """A share of the continuations and its interval."""
        values = self.success[name, strength][concept]
        low, high = bootstrap_interval(values, seed=0)
        return f"{values.mean():.0%} [{low:.0%}, {high:.0%}]"

    def difference(self, name: str, strength: float) -> tuple[float, float, float]:
        """Joint success of the joint fit less that of a row, prompt by prompt, with its interval."""
        values = self.success["joint", strength]["both"] - self.success[name, strength]["both"]
        return float(values.mean()), *bootstrap_interval(values, seed=0)

    def table(self) -> list[str]:
        lines = [
            "| maps | held-out loss of A | of B | their mean |",
            "| --- | ---: | ---: | ---: |",
        ]
        for name, label in NAMES.items():
            a, b = self.held_out[name]
            lines.append(f"| {label} | {a:.4f} | {b:.4f} | {(a + b) / 2:.4f} |")
        lines += [
            "",
            "| strength | maps | A reached | B reached | both | joint fit less this, both | loss on neutral text |",
            "| ---: | --- | --- | --- | --- | --- | ---: |",
        ]
        for strength in self.strengths:
            for name, label in NAMES.items():
                if name == "none" and strength != self.strengths[0]:
                    continue
                shares = " | ".join(self.share(name, strength, concept) for concept in ("A", "B", "both"))
                less = "" if name in ("none", "joint") else spell(self.difference(name, strength))
                shown = "" if name == "none" else f"{strength:g}"
                lines.append(f"| {shown} | {label} | {shares} | {less} | {self.price[name, strength]:.3f} |")
        return lines

    def reading(self) -> list[str]:
        """What the tables say, in sentences that follow from their numbers."""
        means = {name: float(losses.mean()) for name, losses in self.held_out.items()}
        best = min(means, key=lambda name: means[name])
        lines = [
            f"- Held-out loss, mean of both concepts: {means['none']:.3f} without maps, {means['B@A']:.3f} and "
            f"{means['A@B']:.3f} with the naive compositions, {means['B|A']:.3f} with B fitted on top of A, "
            f"{means['joint']:.3f} with the joint fit. The least is that of: {NAMES[best]}."
        ]
        for strength in self.strengths:
            verdicts = []
            for name in ("B@A", "A@B", "B|A"):
                middle, low, high = self.difference(name, strength)
                word = "more than" if low > 0 else "less than" if high < 0 else "not told apart from"
                price = self.price["joint", strength] - self.price[name, strength]
                verdicts.append(f"{word} {NAMES[name]} ({100 * middle:+.0f} points, price {price:+.3f} nats)")
            both = self.success["joint", strength]["both"].mean()
            lines.append(
                f"- At strength {strength:g} the joint fit reaches both concepts in {both:.0%} of the continuations: "
                + ", ".join(verdicts)
                + "."
            )
        a, b, top, joint = (self.passes[name] for name in ("A", "B", "B|A", "joint"))
        lines.append(
            f"- Model passes: {a + b:.0f} for two separate fits, {a + top:.0f} for A and then B on top of it, "
            f"{joint:.0f} for the joint fit."
        )
        return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/two-concepts.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default 0 1")
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 1.5, 2.0], help="default 1 1.5 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch and of the engine")
    parser.add_argument("--bf16", action="store_true", help="round the factors of matrix products to bfloat16: faster")
    args = parser.parse_args()
    set_up(args.threads, args.bf16)

    study = Study()
    results = Results(study, args.seeds, args.strengths)
    machine = (
        f"{cpu_name()}, torch {torch.__version__}, float32{', products of bfloat16 factors' if args.bf16 else ''}; "
        f"seeds {', '.join(map(str, args.seeds))}, {len(study.prompts)} prompts, {SAMPLES} continuations of "
        f"{NEW_TOKENS} tokens each."
    )
    lines = [machine, "", *results.table(), "", *results.reading()]
    print("\n".join(lines))
    if args.write:
        write_between(ROOT / "docs" / "two-concepts.md", MARKS, lines)


if __name__ == "__main__":
    main()
