"""Token-level fits on SmolLM2-135M-Instruct: what they do beside fits to means over texts, and how far they scale.

Closed-form linear maps, of all modules at once and module by module, are fitted to the mean of every text and to every
token of it, for two concepts: from negative to positive sentences (the demo's), and from insults to clean comments.
Strengths are those at which the divergence of the next token meets a budget on some neutral texts; effect and price
are measured on others, with the same prompts and random numbers for all maps, by `lineas.evaluate`.

With --scale two streams of half a million tokens each go through the first norm into `lineas.collect_quantiles`,
and the largest resident memory of the process is told on the way; then maps are fitted from the first of these tokens
with every row in memory, and from quantiles that left most of them out.

    python benchmarks/token_level.py [--concepts sentiment toxicity] [--threads 1]
    python benchmarks/token_level.py --scale [--tokens 500000] [--memory 64]
    python benchmarks/token_level.py --write

The last form puts what is finished into docs/token-level.md. Everything is kept in build/token-level, so that a run
that was cut off goes on where it was; remove the folder for a run of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from _machine import cpu_name
from _study import ROOT, set_up, write_between
from _toxicity import clean_texts, comments, insults_sets
from numpy.typing import NDArray
from price_and_effect import CONCEPTS, ConceptStudy

import lineas
from lineas import SteeringMaps
from lineas.demo import sentences
from lineas.demo.model import load_smollm2
from lineas.demo.run import LAYERS

MARKS = "<!-- measured: python benchmarks/token_level.py --write -->", "<!-- end -->"
PAGE, FOLDER = ROOT / "docs" / "token-level.md", ROOT / "build" / "token-level"
BUDGETS = {"sentiment": (0.1, 0.3), "toxicity": (0.3,)}  # nats, of the KL divergence of the next token
TRIED = (0.25, 0.5, 1.0, 2.0)  # strengths between which those for the budgets are found
SIZE, MAX_LENGTH, NEW_TOKENS = 64, 32, 20
SEARCHED, PRICED = 16, 32  # neutral texts: for the strengths, for the price
STEP = {"sentiment": 1, "toxicity": 2}  # of the prompts of price_and_effect.py
METHODS = {  # label: pooling, and whether module by module
    "means of texts": ("mean", False),
    "every token": ("all", False),
    "means of texts, module by module": ("mean", True),
    "every token, module by module": ("all", True),
}
JUDGES = {"sentiment": "VADER's score", "toxicity": "toxic"}
FIRST_NORM = "model.layers.0.post_attention_layernorm"
ROW, ROWS = 128, 32  # tokens in a row of the streams, rows in a forward pass
EXACT = 50_000  # tokens of each stream that are fitted with all of them in memory as well


class Study(ConceptStudy):
    """The model and one concept; what is found is kept on disk."""

    tried = TRIED

    def __init__(self, name: str) -> None:
        self.new_tokens = NEW_TOKENS
        self.name, self.concept, self.folder, self.budgets = name, CONCEPTS[name], FOLDER / name, BUDGETS[name]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model, self.tokenizer = load_smollm2()
        self.fit, self.held_out = self._sets()
        self.searched = clean_texts("train", SEARCHED, seed=100, without={*self.fit[1], *self.held_out[1]})
        self.priced = clean_texts("test", PRICED, seed=100)
        self.reading: dict[str, Any] = {
            "layers": LAYERS,
            "tokenizer": self.tokenizer,
            "max_length": MAX_LENGTH,
            "batch_size": SIZE,
            "progress": False,
        }

    def _sets(self) -> tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]:
        """To fit, and held out: each (source, target)."""
        if self.name == "sentiment":
            negative, positive = sentences("negative.txt"), sentences("positive.txt")
            return (negative[:SIZE], positive[:SIZE]), (negative[SIZE:], positive[SIZE:])
        sets = insults_sets(0, SIZE)
        return sets["fit"], (sets["test"][0][:16], sets["test"][1][:16])

    def maps(self, method: str) -> SteeringMaps:
        """The maps of a method, fitted or from disk."""
        file = self.folder / f"{method.replace(', ', '-').replace(' ', '-')}.safetensors"
        if not file.exists():
            pooling, incremental = METHODS[method]
            how: dict[str, Any] = {**self.reading, "pooling": pooling}
            if incremental:
                maps = lineas.fit_incremental(self.model, *self.fit, **how)
            else:
                maps = lineas.fit(*(lineas.collect_quantiles(self.model, texts, **how) for texts in self.fit))
            maps.save(file)
        return lineas.load(file)

    def distances(self) -> dict[str, dict[str, float]]:
        """Of each method the held-out W2 of token-level and of pooled activations, that of no map = 1, and slopes."""
        file = self.folder / "distances.json"
        if not file.exists():
            found: dict[str, dict[str, float]] = {}
            wanted = self._collected(self.held_out[1])
            off = self._distance(self._collected(self.held_out[0]), wanted)
            for method in METHODS:
                maps = self.maps(method)
                with maps.attach(self.model):
                    on = self._distance(self._collected(self.held_out[0]), wanted)
                slopes = np.concatenate([one.weight for one in maps.values()])
                low, middle, high = np.quantile(slopes, [0.05, 0.5, 0.95])
                found[method] = {"low": low, "slope": middle, "high": high}
                found[method] |= {pooling: on[pooling] / off[pooling] for pooling in on}
            file.write_text(json.dumps(found))
        return json.loads(file.read_text())

    def _collected(self, texts: Sequence[str]) -> dict[str, Any]:
        return {
            pooling: lineas.collect(self.model, texts, **self.reading, pooling=pooling) for pooling in ("mean", "all")
        }

    @staticmethod
    def _distance(moved: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
        return {
            pooling: float(sum(lineas.wasserstein(x, wanted[pooling][name]).sum() for name, x in activations.items()))
            for pooling, activations in moved.items()
        }

    def evaluate(self) -> lineas.Evaluation:
        """Effect and price of all methods at their strengths."""
        return self.measure(METHODS, self.concept.prompts()[:: STEP[self.name]], self.concept.samples)


# ---- scale -----------------------------------------------------------------------------------------------------------


def rows_of(tokenizer: Any, label: str, seed: int) -> Iterator[list[int]]:
    """Rows of ROW tokens without end, of all comments that are "insult" or "clean" in ever new orders."""
    texts = tokenizer([text for part in ("train", "test") for text in comments(part)[label]])["input_ids"]
    rng, left = np.random.default_rng(seed), list[int]()
    while True:
        for i in rng.permutation(len(texts)):
            left += texts[i]
            while len(left) >= ROW:
                yield left[:ROW]
                left = left[ROW:]


def peak(*, reset: bool = False) -> float:
    """The largest resident memory of this process, in MB: of all its time, or since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: loading the model took more than running it
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def slopes_apart(one: SteeringMaps, other: SteeringMaps) -> dict[str, float]:
    """The largest and the median relative difference of the slopes."""
    off = np.concatenate([np.abs(one[name].weight / other[name].weight - 1) for name in other])
    return {"worst": float(off.max()), "typical": float(np.median(off))}


def scale(tokens: int, memory: int) -> None:
    """Two streams of so many tokens in so many MB, with what the process took on the way; then against exact fits."""
    model, tokenizer = load_smollm2()
    how: dict[str, Any] = {"layers": FIRST_NORM, "pooling": "all", "batch_size": ROWS, "progress": False}
    rows, marks = tokens // ROW, []

    def watched(stream: Iterator[list[int]], parts: int = 4) -> Iterator[list[int]]:
        for k, row in enumerate(islice(stream, rows)):
            if k % (rows // parts) == 0:
                marks.append(peak())
            yield row

    loaded = peak(reset=True)
    lineas.collect_quantiles(model, islice(rows_of(tokenizer, "clean", 1), 4 * ROWS), **how, memory=memory << 20)
    before, start = peak(), time.perf_counter()
    sides, held = [], 0
    for label in ("insult", "clean"):
        sides.append(lineas.collect_quantiles(model, watched(rows_of(tokenizer, label, 0)), **how, memory=memory << 20))
        held += sides[-1].nbytes
    maps = lineas.fit(*sides)
    seconds, marks = time.perf_counter() - start, [*marks, peak()]
    width = sides[0][FIRST_NORM].d
    assert width is not None
    found: dict[str, Any] = {
        "tokens": sum(side[FIRST_NORM].count for side in sides),
        "width": width,
        "memory": memory,
        "arrays": 4 * width * sum(side[FIRST_NORM].count for side in sides) / 2**20,
        "held": held / 2**20,
        "loaded": loaded,
        "before": before,
        "marks": marks,
        "seconds": seconds,
        "rank_error": maps.metadata.get("rank_error", 0.0),
    }
    print(json.dumps(found), flush=True)
    file = FOLDER / "quantiles.safetensors"
    FOLDER.mkdir(parents=True, exist_ok=True)
    sides[0].save(file)
    assert lineas.fit(lineas.load(file), sides[1]) == maps
    found |= {"file": file.stat().st_size / 2**20, "after_save": peak()}
    file.unlink()

    few = [list(islice(rows_of(tokenizer, label, 0), EXACT // ROW)) for label in ("insult", "clean")]
    exact = lineas.fit(*(lineas.collect(model, side, **how) for side in few))
    found["apart"] = []
    for some in (2, 8, 32):
        left_out = [lineas.collect_quantiles(model, side, **how, memory=some << 20) for side in few]
        streamed = lineas.fit(*left_out)
        values = left_out[0][FIRST_NORM].size
        facts = {"memory": some, "values": values, "rank_error": streamed.metadata.get("rank_error", 0.0)}
        found["apart"].append(facts | slopes_apart(streamed, exact))
    found["few"] = len(few[0]) * ROW
    (FOLDER / "scale.json").write_text(json.dumps(found))
    print(json.dumps(found, indent=1), flush=True)


# ---- the page --------------------------------------------------------------------------------------------------------


def effect_table(name: str, found: lineas.Evaluation) -> list[str]:
    """One line a point: effect with its interval, and price."""
    judges = list(found.scores)
    label = JUDGES[name]
    heads = [label if len(judges) == 1 else f"{label}, {judge}" for judge in judges]
    lines = [
        f"| maps | strength | {' | '.join(heads)} | KL | loss rise |",
        f"| --- | ---: |{' --- |' * len(judges)} --- | ---: |",
    ]
    for row in found.rows():
        cells = [f"{row[judge]:.3f} [{row[f'{judge}_low']:.3f}, {row[f'{judge}_high']:.3f}]" for judge in judges]
        strength = "" if row["method"] == "unsteered" else f"{row['strength']:.3g}"
        kl = f"{row['kl']:.3f} [{row['kl_low']:.3f}, {row['kl_high']:.3f}]"
        lines.append(f"| {row['method']} | {strength} | {' | '.join(cells)} | {kl} | {row['loss_rise']:+.3f} |")
    return lines


def differences(name: str, found: lineas.Evaluation) -> list[str]:
    """Of each pair of methods that differ by the pooling alone, the difference of the effect at each budget."""
    rows, lines = [(row["method"], row["strength"]) for row in found.rows()], []
    for judge, scores in found.scores.items():
        by_prompt: NDArray = scores.mean(axis=2)  # [points, prompts]
        of = {m: [k for k, (method, _) in enumerate(rows) if method == m] for m in METHODS}
        for pooled, every in (list(METHODS)[:2], list(METHODS)[2:]):
            for budget, one, other in zip(BUDGETS[name], of[pooled], of[every], strict=True):
                apart = by_prompt[other] - by_prompt[one]
                drawn = np.random.default_rng(0).integers(0, len(apart), size=(2000, len(apart)))
                low, high = np.percentile(apart[drawn].mean(axis=1), [2.5, 97.5])
                lines.append(
                    f"- {judge}, {budget:g} nats: *{every}* less *{pooled}*: {apart.mean():+.3f} "
                    f"[{low:+.3f}, {high:+.3f}]."
                )
    return lines


def page() -> list[str]:
    """What is finished, as lines of Markdown."""
    lines = [f"{cpu_name()}, one thread; {SIZE} + {SIZE} texts to fit, {PRICED} neutral texts for the price."]
    for name in CONCEPTS:
        if not (FOLDER / name / "evaluation.safetensors").exists():
            continue
        found = lineas.load(FOLDER / name / "evaluation.safetensors")
        count = f"{len(found.prompts)} prompts, continuations of each: {found.statistics.shape[2]}, {NEW_TOKENS} tokens"
        lines += ["", f"### {CONCEPTS[name].label}", "", f"{count}.", "", *effect_table(name, found), ""]
        lines += differences(name, found)
        distances = json.loads((FOLDER / name / "distances.json").read_text())
        lines += [
            "",
            "| maps at strength 1 | slopes: median [5 %, 95 %] | held-out distance of tokens | of means of texts |",
            "| --- | --- | ---: | ---: |",
        ]
        for method, one in distances.items():
            slopes = f"{one['slope']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"
            lines.append(f"| {method} | {slopes} | {one['all']:.2f} | {one['mean']:.2f} |")
    if (FOLDER / "scale.json").exists():
        lines += ["", *scale_lines(json.loads((FOLDER / "scale.json").read_text()))]
    return lines


def scale_lines(found: dict[str, Any]) -> list[str]:
    """What `scale` found, in words and a table."""
    marks = ", ".join(f"{mark:.0f}" for mark in found["marks"])
    lines = [
        "### A million tokens",
        "",
        f"{found['tokens']} tokens of {found['width']} neurons through the first norm, in two streams: as arrays they "
        f"would take {found['arrays']:.0f} MB.",
        f"With `memory={found['memory']} << 20` the two sides took {found['held']:.0f} MB, and the rank error that is "
        f"promised is {found['rank_error']:.1e}.",
        f"The process took {found['loaded']:.0f} MB of resident memory with the model, and at most "
        f"{found['before']:.0f} MB until the first {4 * ROWS * ROW} tokens had run.",
        f"Its peak at every quarter of each stream, with its end, and after the fit: {marks} MB.",
        f"That took {found['seconds'] / 60:.1f} minutes on one thread of a busy machine.",
        f"One side makes a file of {found['file']:.0f} MB; the peak after it was written and read: "
        f"{found['after_save']:.0f} MB.",
        "",
        f"Slopes from the first {found['few']} tokens a side, against the fit with all of them in memory:",
        "",
        "| MB for a side | values of a neuron | rank error promised | slopes off, worst | typical |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in found["apart"]:
        errors = " | ".join(f"{one[error]:.1e}" for error in ("rank_error", "worst", "typical"))
        lines.append(f"| {one['memory']} | {one['values']} | {errors} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, default=list(CONCEPTS), help="default: both")
    parser.add_argument("--scale", action="store_true", help="only the streams of many tokens")
    parser.add_argument("--tokens", type=int, default=500_000, help="of each stream; default 500000")
    parser.add_argument("--memory", type=int, default=64, help="MB for the values kept of a side; default 64")
    parser.add_argument("--threads", type=int, default=1, help="of torch and of the engine; default 1")
    parser.add_argument("--write", action="store_true", help="only write what is finished into docs/token-level.md")
    args = parser.parse_args()
    set_up(args.threads, bf16=False)
    if args.write:
        write_between(PAGE, MARKS, page())
    elif args.scale:
        scale(args.tokens, args.memory)
    else:
        for name in args.concepts:
            study = Study(name)
            print(json.dumps(study.distances(), indent=1), flush=True)
            print(study.evaluate().table(), flush=True)


if __name__ == "__main__":
    main()
