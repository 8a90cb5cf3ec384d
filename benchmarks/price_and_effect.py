"""Effect against price: LinEAS beside other methods, on two language models and for two concepts, by `lineas.evaluate`.

For each model and concept every method is fitted on the same few texts, its strengths for three budgets of the KL
divergence are found on some neutral texts, and effect and price are measured on others, with the same prompts and
random numbers for all. Then the strength that `SteeringMaps.calibrate` recommends is held against its budget on texts
that it never saw, with five draws of the texts.

    python benchmarks/price_and_effect.py [--models smollm2 gemma3] [--concepts sentiment toxicity] [--threads 2]
    python benchmarks/price_and_effect.py --write

The second form puts the tables of what is finished into docs/price-and-effect.md and draws the picture beside it.
Everything is kept in build/price-and-effect as soon as it is known: a run that was cut off goes on where it was, and
models may run in processes of their own. Comments, prompts and judges of the concept of toxicity are downloaded by pip
into build/packages, and need h5py and joblib to be read.
"""

from __future__ import annotations

import argparse
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _machine import cpu_name
from _study import ROOT, set_up, write_between
from _toxicity import clean_texts, insults_sets, toxic_prompts, toxicity
from sparse_path_smollm2 import MORE_PROMPTS

import lineas
from lineas import SteeringMaps, baselines
from lineas.demo import model as demo_model
from lineas.demo import sentences
from lineas.evaluation.controls import random_maps

MARKS = "<!-- measured: python benchmarks/price_and_effect.py --write -->", "<!-- end -->"
FOLDER = ROOT / "build" / "price-and-effect"
PAGE, PICTURE = ROOT / "docs" / "price-and-effect.md", ROOT / "docs" / "price-and-effect.png"
TRIED = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # strengths between which those for the budgets are found
MAX_LENGTH, NEW_TOKENS = 32, 20
SEARCHED, PRICED, UNSEEN = 32, 64, 128  # neutral texts: for the strengths, for the price, for the calibrated strength
CALIBRATED, SEEDS = 64, 5
# Without top_p, of which the sorting takes longer than the model where the vocabulary is large.
SAMPLING = {"top_k": 40, "top_p": 1.0}
END_TO_END: dict[str, dict[str, Any]] = {
    "LinEAS dense": {"scaling": "layer-mean", "lr": "auto", "steps": 12},
    "LinEAS sparse": {"scaling": "layer-mean", "lr": "auto", "steps": 16},
}
LOCAL: dict[str, tuple[Callable[..., Any], str]] = {
    "mean": (baselines.mean, "mean"),
    "ITI-c": (baselines.iti_c, "mean"),
    "AurA": (baselines.aura, "max"),
}
METHODS = (*END_TO_END, "linear incremental", *LOCAL, "random")


@dataclass(frozen=True)
class Model:
    """A language model and the modules that get maps."""

    label: str
    load: Callable[[], tuple[Any, Any]]
    layers: list[str]
    tokens: Any
    l1: float  # of the sparse fit: the losses of the two models are of different sizes
    budgets: tuple[float, ...]  # nats, of the KL divergence of the next token
    half: bool  # of the continuations and of the texts for strengths: for the slower model


@dataclass(frozen=True)
class Concept:
    """What to move, what to continue, and who says what came of it."""

    label: str
    sets: Callable[[], tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]]  # to fit, to hold out
    prompts: Callable[[], list[str]]
    judges: Callable[[], dict[str, Any]]
    instruction: str
    samples: int


def _sentiment_sets() -> tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]:
    negative, positive = sentences("negative.txt"), sentences("positive.txt")
    return (negative[:32], positive[:32]), (negative[32:64], positive[32:64])


def _toxicity_sets() -> tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]:
    sets = insults_sets(0)
    return sets["fit"], sets["validation"]


MODELS = {  # in both the norms before the MLPs
    "smollm2": Model(
        "SmolLM2-135M-Instruct",
        demo_model.load_smollm2,
        ["model.layers.*.post_attention_layernorm"],
        "all",
        4e-3,
        (0.03, 0.1, 0.3),
        half=False,
    ),
    # Without <bos>, whose activations are many times as large as those of words.
    "gemma3": Model(
        "Gemma 3 270M",
        demo_model.load_gemma3,
        ["model.layers.*.pre_feedforward_layernorm"],
        slice(1, None),
        0.01,
        (0.1, 0.3),
        half=True,
    ),
}
CONCEPTS = {
    "sentiment": Concept(
        "negative to positive (higher is better)",
        _sentiment_sets,
        lambda: [*sentences("neutral_prompts.txt"), *MORE_PROMPTS],
        lambda: {"VADER": lineas.judges.Vader()},
        "This is a cheerful and positive text.\n\n",
        samples=2,
    ),
    "toxicity": Concept(
        "insulting to clean (lower is better)",
        _toxicity_sets,
        lambda: toxic_prompts(14),
        lambda: {
            "BiLSTM": lineas.judges.Threshold(lambda texts: toxicity(texts)[0]),
            "profanity-check": lineas.judges.Threshold(lambda texts: toxicity(texts)[1]),
        },
        "The following text is polite and kind, and does not insult, threaten, swear or offend.\n\n",
        samples=1,
    ),
}


class ConceptStudy(ABC):
    """One model and one concept: the strengths that meet budgets, effect and price there, all kept on disk."""

    name: str
    folder: Path
    concept: Concept
    model: Any
    tokenizer: Any
    searched: list[str]  # neutral texts, on which strengths are found
    priced: list[str]  # others, on which prices are measured
    budgets: tuple[float, ...]  # nats, of the KL divergence of the next token
    tried = TRIED
    new_tokens = NEW_TOKENS

    @abstractmethod
    def maps(self, method: str) -> SteeringMaps:
        """The maps of a method, fitted or from disk."""

    def strengths(self, method: str) -> list[float]:
        """The strengths of a method that meet the budgets on the texts for this, about."""
        file = self.folder / "strengths.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        if method not in found:
            how: dict[str, Any] = {"tokenizer": self.tokenizer, "max_length": MAX_LENGTH, "progress": False}
            points = lineas.evaluate(
                self.model, self.maps(method), neutral=self.searched, strengths=self.tried, **how
            ).rows()
            # The root of the divergence is nearly a straight line in the strength. What it then is, is measured.
            roots = np.maximum.accumulate(np.sqrt([max(row["kl"], 0) for row in points]))
            strengths = np.interp(np.sqrt(self.budgets), roots, [row["strength"] for row in points])
            found[method] = [round(float(strength), 3) for strength in strengths]
            file.write_text(json.dumps(found))
            print(f"{self.name}: {method} at {found[method]}", flush=True)
        return found[method]

    def measure(
        self, methods: Iterable[str], prompts: Sequence[str], samples: int, **settings: Any
    ) -> lineas.Evaluation:
        """Effect and price of methods at their strengths."""
        maps = {method: self.maps(method) for method in methods}
        start = time.perf_counter()
        found = lineas.evaluate(
            self.model,
            maps,
            tokenizer=self.tokenizer,
            prompts=prompts,
            neutral=self.priced,
            judges=self.concept.judges(),
            strengths={method: self.strengths(method) for method in maps},
            samples=samples,
            max_new_tokens=self.new_tokens,
            max_length=MAX_LENGTH,
            sampling=SAMPLING,
            checkpoint=self.folder / "evaluation.jsonl",
            progress=False,
            **settings,
        )
        found.save(self.folder / "evaluation.safetensors")
        print(f"{self.name}: evaluated in {time.perf_counter() - start:.0f} s", flush=True)
        return found


class Study(ConceptStudy):
    """One of the models and one of the concepts."""

    def __init__(self, name: str, concept: str) -> None:
        self.name, self.folder = f"{name}-{concept}", FOLDER / f"{name}-{concept}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.spec, self.concept = MODELS[name], CONCEPTS[concept]
        self.budgets = self.spec.budgets
        self.model, self.tokenizer = self.spec.load()
        fit, held_out = self.concept.sets()
        self.fit, self.held_out = fit, held_out
        used = {*fit[1], *held_out[1]}
        self.step = 2 if self.spec.half else 1
        self.searched = clean_texts("train", SEARCHED, seed=100, without=used)[:: self.step]
        self.priced = clean_texts("test", PRICED, seed=100)
        self.used = {*used, *self.searched}

    def maps(self, method: str) -> SteeringMaps:
        """The maps of a method, fitted or from disk."""
        file = self.folder / f"{method.replace(' ', '-')}.safetensors"
        if file.exists():
            return lineas.load(file)
        reading = {
            "layers": self.spec.layers,
            "tokens": self.spec.tokens,
            "tokenizer": self.tokenizer,
            "max_length": MAX_LENGTH,
        }
        start = time.perf_counter()
        if method in END_TO_END:
            settings = {**reading, **END_TO_END[method], "held_out": self.held_out, "progress": False}
            settings["l1"] = self.spec.l1 if method == "LinEAS sparse" else 0.0
            result = lineas.fit_end_to_end(self.model, *self.fit, **settings)
            if result.stopped == "interrupted" or result.stopped.startswith("not finite"):
                raise SystemExit(result.stopped)
            maps = result.maps
        elif method == "linear incremental":
            maps = lineas.fit_incremental(self.model, *self.fit, **reading, progress=False)
        elif method == "random":
            maps = random_maps(self.maps("LinEAS dense"))
        else:
            fit, pooling = LOCAL[method]
            sets = [lineas.collect(self.model, texts, **reading, pooling=pooling) for texts in self.fit]
            maps = fit(*sets)
        maps.save(file)
        print(f"{self.name}: {method} fitted in {time.perf_counter() - start:.0f} s", flush=True)
        return maps

    def evaluate(self) -> lineas.Evaluation:
        """Effect and price of all methods at their strengths."""
        prompts, samples = self.concept.prompts(), self.concept.samples
        if self.spec.half:
            prompts, samples = (prompts, samples // 2) if samples > 1 else (prompts[::2], 1)
        return self.measure(METHODS, prompts, samples, instruction=self.concept.instruction)

    def calibrate(self) -> list[dict[str, float]]:
        """The recommended strength by draws of the neutral texts, and its price on texts that it never saw."""
        file = self.folder / "calibrations.json"
        found = json.loads(file.read_text()) if file.exists() else []
        maps = self.maps("LinEAS dense")
        how: dict[str, Any] = {"tokenizer": self.tokenizer, "max_length": MAX_LENGTH, "progress": False}
        for seed in range(len(found), SEEDS):
            texts = clean_texts("train", CALIBRATED // self.step, seed=200 + seed, without=self.used)
            unseen = clean_texts("test", UNSEEN // self.step, seed=200 + seed)
            calibration = maps.calibrate(self.model, neutral=texts, max_kl=0.1, **how)
            seen = lineas.evaluate(self.model, maps, neutral=unseen, strengths=calibration.strength, **how).rows()[1]
            found.append(
                {
                    "strength": calibration.strength,
                    "low": calibration.range[0],
                    "high": calibration.range[1],
                    "held_out": calibration.measured["kl"],
                    "unseen": seen["kl"],
                }
            )
            file.write_text(json.dumps(found))
        print(f"{self.name}: calibrated {[round(one['unseen'], 4) for one in found]}", flush=True)
        return found


def page() -> list[str]:
    """What is finished, as lines of Markdown; draws the picture."""
    from matplotlib.figure import Figure

    lines = [f"{cpu_name()}; {PRICED} neutral texts for the price, {NEW_TOKENS} new tokens."]
    finished = {
        (model, concept): FOLDER / f"{model}-{concept}"
        for model in MODELS
        for concept in CONCEPTS
        if (FOLDER / f"{model}-{concept}" / "evaluation.safetensors").exists()
    }
    models = list(dict.fromkeys(model for model, _ in finished))
    panels = max(
        sum(len(lineas.load(f / "evaluation.safetensors").scores) for (m, _), f in finished.items() if m == model)
        for model in models
    )
    figure = Figure(figsize=(5.2 * panels, 4.6 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), panels, squeeze=False)
    calibrated = []
    for row, model in enumerate(models):
        column = 0
        for (name, concept), folder in finished.items():
            if name != model:
                continue
            found, file = lineas.load(folder / "evaluation.safetensors"), folder / "calibrations.json"
            spec, label = MODELS[model].label, CONCEPTS[concept].label
            count = f"{len(found.prompts)} prompts, continuations of each: {found.statistics.shape[2]}"
            lines += ["", f"### {spec}, {label}", "", f"{count}.", "", found.table(markdown=True)]
            for judge in found.scores:
                lineas.plot.evaluation(found, judge, ax=axes[row, column]).set_title(
                    f"{spec}: {label}", fontsize="small"
                )
                axes[row, column].get_legend().remove()
                column += 1
            calibrated += [
                f"| {spec} | {concept} | {one['strength']:.3f} [{one['low']:.3f}, {one['high']:.3f}] | "
                f"{one['held_out']:.4f} | {one['unseen']:.4f} | {one['unseen'] / 0.1 - 1:+.1%} |"
                for one in (json.loads(file.read_text()) if file.exists() else [])
            ]
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(PICTURE, dpi=110)
    over = [float(line.split("|")[-2].strip().rstrip("%")) for line in calibrated]
    lines += [
        "",
        "### The recommended strength on texts that it never saw",
        "",
        f"LinEAS dense, `max_kl=0.1`, {CALIBRATED} neutral texts (Gemma {CALIBRATED // 2}), {SEEDS} draws for each; "
        f"the price on {UNSEEN} others (Gemma {UNSEEN // 2}).",
        f"Against the budget: {np.mean(over):+.1f} % on average, from {min(over):+.1f} to {max(over):+.1f} %; "
        f"{sum(o > 0 for o in over)} of {len(over)} above it.",
        "",
        "| model | concept | strength [range] | KL of the held-out half | KL of unseen texts | against the budget |",
        "| --- | --- | --- | ---: | ---: | ---: |",
        *calibrated,
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, default=list(CONCEPTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="only write what is finished into the documentation")
    args = parser.parse_args()
    set_up(args.threads, bf16=False)
    if args.write:
        write_between(PAGE, MARKS, page())
        return
    for name in args.models:
        for concept in args.concepts:
            study = Study(name, concept)
            print(study.evaluate().table(), flush=True)
            study.calibrate()


if __name__ == "__main__":
    main()
