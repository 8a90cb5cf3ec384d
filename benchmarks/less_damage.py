"""The same effect for less damage: LinEAS with preservation, with gates and with its loss at the last norm.

For each of two language models and each seed the maps of every variant are fitted on 32 insults and 32 clean comments,
with 32 + 32 others held out, and turned up until the loss on clean calibration texts has risen by set amounts. There
two judges read continuations of prompts of RealToxicityPrompts, and the rise is measured on other clean comments, on
code, on questions and on stories. Within a seed all variants get the same texts, prompts and random numbers. Settings
were chosen on other prompts.

    python benchmarks/less_damage.py [--models smollm2 gemma3] [--seeds 0 1 2 3] [--methods NAME ...] [--threads 2]
    python benchmarks/less_damage.py --write

The second form puts the tables of what is finished into docs/less-damage.md and draws the picture beside it. Everything
is kept in build/less-damage as soon as it is known: a run that was cut off goes on where it was, and models and seeds
may run in processes of their own. Data and judges are downloaded by pip into build/packages, and need h5py and joblib.
"""

from __future__ import annotations

import argparse
import calendar
import csv
import difflib
import heapq
import inspect
import json
import shutil
import statistics
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from _less_damage_results import GateFacts, Point, draw, gate_table, tables
from _machine import cpu_name
from _sampling import continuations, text_losses
from _study import ROOT, Kept, data_lines, digest, set_up, write_between
from _toxicity import clean_texts, insults_sets, toxic_prompts, toxicity
from _toxicity_results import strength_at
from numpy.typing import NDArray

import lineas
from lineas import SteeringMaps
from lineas.demo import model as demo_model
from lineas.demo import sentences
from lineas.notebook.tokens import gate_of_tokens

MARKS = "<!-- measured: python benchmarks/less_damage.py --write -->", "<!-- end -->"
PAGE, PICTURE = ROOT / "docs" / "less-damage.md", ROOT / "docs" / "less-damage.png"
MAX_LENGTH, PER_CATEGORY, NEW_TOKENS = 32, 43, 20  # tokens of a comment that is fitted on; 301 prompts
CLEAN, CALIBRATION = 96, 48  # texts on which the price is reported, and others by which strengths are set
RISES = (0.03, 0.1, 0.3)  # nats a token, by which the loss on the second of these is to rise
LARGEST = 32.0  # the largest strength

PLAIN, PRESERVED, GATED, BOTH = "LinEAS", "preservation", "gate", "preservation and gate"
UNITS, LAST, LAST_GATED = "LinEAS in the neurons' own units", "loss at the last norm", "loss at the last norm and gates"
# Settings of the fits, beside seed and held-out sets, chosen on the prompts after those that are reported.
FITS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    UNITS: {"scaling": "layer-mean"},
    PRESERVED: {"max_kl": 0.03},
    # The activations that the head makes the next token of, and no others: in both models the module has this name.
    LAST: {"loss_layers": "model.norm"},
}
# One gate for all maps from its module on (the maps before it are taken off), or one for each map of the last third,
# which other neutral texts count as targets for.
SHARED: dict[str, Any] = {"context": "mean", "open_on_target": 0.3}
EACH: dict[str, Any] = {"context": "token", "ridge": 100}
GATES = {GATED: (PLAIN, SHARED), BOTH: (PRESERVED, SHARED), LAST_GATED: (LAST, EACH)}
SHOWN_GATES = (GATED, LAST_GATED)
METHODS = (PLAIN, UNITS, PRESERVED, GATED, BOTH, LAST, LAST_GATED)


@dataclass(frozen=True)
class Model:
    """A language model and the modules that get maps: in both the norms before the MLPs."""

    label: str
    load: Callable[[], tuple[Any, Any]]
    layers: list[str]
    tokens: Any
    gate: str  # the module that the gate reads


MODELS = {
    "smollm2": Model(
        "SmolLM2-135M-Instruct",
        demo_model.load_smollm2,
        ["model.layers.*.post_attention_layernorm"],
        "all",
        "model.layers.4.post_attention_layernorm",
    ),
    # Without <bos>, whose activations are many times as large as those of words.
    "gemma3": Model(
        "Gemma 3 270M",
        demo_model.load_gemma3,
        ["model.layers.*.pre_feedforward_layernorm"],
        slice(1, None),
        "model.layers.3.pre_feedforward_layernorm",
    ),
}


def _functions(*modules: Any) -> list[str]:
    """Functions of modules of Python's library."""
    return [
        inspect.getsource(found)[:200]
        for module in modules
        for _, found in inspect.getmembers(module, inspect.isfunction)
        if found.__module__.partition(".")[0] == module.__name__
    ]


def neutral_texts() -> dict[str, list[str]]:
    """Texts of three kinds that have nothing to do with insults: functions of Python's library, questions, stories."""
    functions = _functions(heapq, json, statistics, textwrap)
    return {"code": functions[:32], **{name: data_lines(name) for name in ("questions", "stories")}}


def control_texts() -> list[str]:
    """Other neutral texts, which gates are to be closed on: sentences of the demo, functions of other modules."""
    return [*sentences("neutral_text.txt"), *_functions(calendar, csv, difflib, shutil)[:32]]


class Study:
    """One model; everything that is found is kept on disk."""

    def __init__(self, name: str) -> None:
        self.name, self.given = name, MODELS[name]
        self.model, self.tokenizer = self.given.load()
        self.prompts = toxic_prompts(PER_CATEGORY)
        self.texts = {"clean": clean_texts("test", CLEAN, seed=0), **neutral_texts()}
        self.kept = Kept("less-damage")
        self.reading = {
            "layers": self.given.layers,
            "tokenizer": self.tokenizer,
            "max_length": MAX_LENGTH,
            "tokens": self.given.tokens,
        }

    def maps(self, method: str, seed: int) -> SteeringMaps:
        """The maps of a method, fitted or out of the cache."""
        file = self.kept.folder / f"{self.name}-{_slug(method)}-{digest(self._settings(method))}-{seed}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            begun = time.monotonic()
            maps = self._gated(*GATES[method], seed) if method in GATES else self._fit(FITS[method], seed)
            maps.save(file)
            print(f"  {file.name}: {time.monotonic() - begun:.0f} s", flush=True)
        return lineas.load(file)

    def _fit(self, settings: dict[str, Any], seed: int) -> SteeringMaps:
        sets = insults_sets(seed)
        result = lineas.fit_end_to_end(
            self.model,
            *sets["fit"],
            held_out=sets["validation"],
            seed=seed,
            progress=False,
            **self.reading,
            **settings,
        )
        if result.stopped == "interrupted" or result.stopped.startswith("not finite"):
            raise SystemExit(result.stopped)
        return result.maps

    def _gated(self, base: str, settings: dict[str, Any], seed: int) -> SteeringMaps:
        maps, site = self.maps(base, seed), self.given.gate if settings is SHARED else None
        names = list(maps)
        names = names[2 * len(names) // 3 if site is None else names.index(site) :]
        reading, (source, target) = {**self.reading, "layers": names}, insults_sets(seed)["fit"]
        if site is None:
            target = [*target, *control_texts()]
        gates = lineas.fit_gates(self.model, source, target, site=site, progress=False, **settings, **reading)
        return maps.select(names).gated(gates)

    def _settings(self, method: str | None) -> Any:
        if method in GATES:
            base, settings = GATES[method]
            return [settings, self.given.gate if settings is SHARED else digest(control_texts()), FITS[base]]
        return {} if method is None else FITS[method]

    def rises(self, method: str, seed: int) -> tuple[NDArray, NDArray]:
        """Strengths, from 1/4 on each half as large again, and the rises on the calibration texts."""

        def compute() -> dict[str, Any]:
            sets = insults_sets(seed)
            texts = clean_texts("train", CALIBRATION, seed, without={*sets["fit"][1], *sets["validation"][1]})
            strengths, losses = [0.0], [self._loss(texts)]
            with self.maps(method, seed).attach(self.model) as handle:
                while losses[-1] < losses[0] + max(RISES) and strengths[-1] < LARGEST:
                    strengths.append(1.5 * strengths[-1] or 0.25)
                    handle.strength = strengths[-1]
                    losses.append(self._loss(texts))
            return {"strengths": strengths, "rises": np.array(losses) - losses[0]}

        found = self.kept(f"{self._key(method, seed)}-rises", compute)
        return found["strengths"], found["rises"]

    def _loss(self, texts: list[str]) -> float:
        sums, counts = text_losses(self.model, self.tokenizer, texts)
        return float(sums.sum() / counts.sum())

    def _key(self, method: str | None, seed: int) -> str:
        protocol = [MAX_LENGTH, PER_CATEGORY, NEW_TOKENS, CLEAN, CALIBRATION]
        return f"{self.name}-{_slug(method or 'none')}-{digest([self._settings(method), protocol])}-{seed}"

    def point(self, method: str | None, seed: int, rise: float) -> Point:
        """What a method gives at a rise of the loss; the unsteered model without one."""

        def compute() -> dict[str, Any]:
            if method is None:
                return {**self._judge(seed), "strength": 0.0}
            strength = strength_at(*self.rises(method, seed), rise)
            with self.maps(method, seed).attach(self.model, strength=strength):
                return {**self._judge(seed), "strength": strength}

        found = self.kept(f"{self._key(method, seed)}-{rise:g}", compute)
        return Point.of(found)

    def _judge(self, seed: int) -> dict[str, Any]:
        uniforms = np.random.default_rng([seed, NEW_TOKENS]).random((len(self.prompts), NEW_TOKENS))
        found: dict[str, Any] = {}
        for name, texts in self.texts.items():
            found[f"sums {name}"], found[f"counts {name}"] = text_losses(self.model, self.tokenizer, texts)
        found["scores"] = toxicity(continuations(self.model, self.tokenizer, self.prompts, uniforms))
        return found

    def gates(self, method: str, seed: int) -> GateFacts:
        """What gates make of the unsteered model's tokens, of comments, other texts and prompts; means over modules."""
        maps = self.maps(method, seed)

        def compute() -> dict[str, Any]:
            insults, clean = insults_sets(seed)["test"]
            prompts = [self.prompts[k] for k in np.flatnonzero(self.point(None, seed, 0.0).toxic.any(axis=0))]
            texts = {"insults": insults, "comments": clean, "prompts": prompts, **self.texts}
            found: dict[str, Any] = {"auroc": np.array([np.mean(gate.auroc) for gate in maps.gates.values()])}
            with maps.attach(self.model, strength=0.0) as handle:
                for name, group in texts.items():
                    values = [gate_of_tokens(handle, self.model, text, self.tokenizer)[1] for text in group]
                    found[f"values {name}"] = np.concatenate(values)
                    found[f"lengths {name}"] = np.array([len(one) for one in values])
            return found

        return GateFacts.of(self.kept(f"{self._key(method, seed)}-gate", compute))

    def finished(self, methods: list[str], seeds: list[int]) -> tuple[list[str], list[int]]:
        """Of the seeds those at which all of LinEAS is kept, and the methods that are kept whole at each of these."""

        def has(method: str, seed: int) -> bool:
            key = self._key(method, seed)
            return all(self.kept.has(f"{key}-{rise:g}") for rise in RISES) and (
                method not in SHOWN_GATES or self.kept.has(f"{key}-gate")
            )

        seeds = [seed for seed in seeds if has("LinEAS", seed)]
        return [method for method in methods if all(has(method, seed) for seed in seeds)], seeds

    def run(self, methods: list[str], seeds: list[int]) -> None:
        """Find everything that is not kept yet."""
        for seed in seeds:
            self.point(None, seed, 0.0)
            for method in methods:
                for rise in RISES:
                    self.point(method, seed, rise)
                if method in SHOWN_GATES:
                    self.gates(method, seed)


def _slug(method: str) -> str:
    return method.replace("'", "").replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="run nothing, and write the page from what is finished")
    given = parser.parse_args()
    set_up(given.threads, bf16=False)
    studies = {name: Study(name) for name in given.models}
    asked = given.methods, given.seeds
    if not given.write:
        for study in studies.values():
            study.run(*asked)
    finished = {name: study.finished(*asked) for name, study in studies.items()}  # all, but with --write
    labels = {name: study.given.label for name, study in studies.items()}
    which = "; ".join(f"{labels[name]}: seeds {', '.join(map(str, seeds))}" for name, (_, seeds) in finished.items())
    found, gates = {}, {}
    for name, (methods, seeds) in finished.items():
        study, label = studies[name], labels[name]
        found[label] = {
            "none": [[study.point(None, seed, 0.0)] for seed in seeds],
            **{method: [[study.point(method, seed, rise) for rise in RISES] for seed in seeds] for method in methods},
        }
        for method in methods:
            if method in SHOWN_GATES:
                gates[f"{label}, {method}"] = [study.gates(method, seed) for seed in seeds]
    lines = [f"{cpu_name()}, torch on {given.threads} threads. {which}.", "", *tables(found)]
    if gates:
        lines += ["", *gate_table(gates)]
    print("\n".join(lines))
    if given.write:
        write_between(PAGE, MARKS, lines)
        draw(found, PICTURE)


if __name__ == "__main__":
    main()
