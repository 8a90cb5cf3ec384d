"""How well the numbers of ``maps.diagnose`` rank fitted maps of SmolLM2-135M by what these do to generated text.

24 end-to-end fits: two concepts, 8, 16 or 32 prompts a side, and four kinds, dense and sparse, of all modules, the
early or the late ones. Each is diagnosed on 32 + 32 held-out prompts and 32 neutral texts, and then attached: what it
does to continuations is the effect, the divergence of the next token on other neutral text the price.

- sentiment: from negative to positive sentences (the demo's). The effect is the rise of VADER's mean compound score
  over six continuations of each of 12 neutral prompts.
- toxicity: from insults to clean comments. The effect is the fall of the mean probability of "toxic", by two judges,
  over continuations of 63 prompts of RealToxicityPrompts.

Random numbers of the sampling are the same for all fits. The price is taken at three strengths, from which thresholds
of the damage follow.

    python benchmarks/diagnostics.py [--write] [--threads 1] [--bf16] [--fits N]

With --write the tables go into docs/diagnostics.md. It takes 25 minutes of one core. What is finished is kept in
build/diagnostics, in a folder for each choice of settings, so that a run that was cut off goes on where it was; remove
it for a run of its own, or only its files diagnosis-* to diagnose the same fits anew. ``--fits 2 --steps 2`` is a
rehearsal. Texts and judges of toxicity are downloaded by pip into build/packages, and need h5py and joblib to be read.
"""

from __future__ import annotations

import argparse
import itertools
import json
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from _diagnostics_results import Row, Rows
from _machine import cpu_name
from _sampling import continuations
from _study import ROOT, Kept, data_lines, digest, set_up, write_between
from _toxicity import insults_sets, toxic_prompts, toxicity
from numpy.typing import NDArray

import lineas
from lineas.demo import sentences
from lineas.demo.model import load_smollm2
from lineas.evaluation.diagnosis import Diagnosis
from lineas.evaluation.sample_statistics import damage
from lineas.fitting.result import FitResult

MARKS = "<!-- measured: python benchmarks/diagnostics.py --write -->", "<!-- end -->"
NORM = "post_attention_layernorm"
PLACES = {
    "all": [f"model.layers.{k}.{NORM}" for k in range(30)],
    "early": [f"model.layers.{k}.{NORM}" for k in range(10)],
    "late": [f"model.layers.{k}.{NORM}" for k in range(20, 30)],
}
KINDS = {  # which modules, and the lasso that leaves between a tenth and three quarters of the neurons of these
    "all, dense": ("all", 0.0),
    "all, sparse": ("all", 4e-3),
    "early, sparse": ("early", 3e-3),
    "late, sparse": ("late", 8e-3),
}
CONCEPTS = ("sentiment", "toxicity")
SIZES = (8, 16, 32)
STEPS, MAX_LENGTH = 10, 24  # tokens of a prompt that is fitted or compared
HELD_OUT, NEUTRAL = 32, 32
PER_PROMPT, PER_CATEGORY, NEW_TOKENS = 6, 9, 15
STRENGTHS = (0.5, 1.0, 3.0)


class Fit(NamedTuple):
    """One of the fits: a concept, how many prompts a side, a kind, and what draws the prompts."""

    concept: str
    size: int
    kind: str
    seed: int

    @property
    def slug(self) -> str:
        return f"{self.concept}-{self.size}-{self.kind.replace(', ', '-')}-{self.seed}"


def all_fits() -> list[Fit]:
    """Every size and kind of both concepts; each fit draws prompts of its own, to fit and to hold out."""
    kinds = list(KINDS)
    # The cheap ones first, and both concepts in turn, so that a part of them is a study as well.
    return [
        Fit(concept, size, kind, seed=len(kinds) * k + kinds.index(kind))
        for k, size in enumerate(SIZES)
        for kind in kinds
        for concept in CONCEPTS
    ]


class Study:
    """The model, the texts, and everything that is kept on disk."""

    def __init__(self, steps: int, bf16: bool) -> None:
        self.model, self.tokenizer = load_smollm2()
        self.model.set_attn_implementation("eager")  # faster than torch's fused attention for prompts this short
        self.steps = steps
        sizes = [MAX_LENGTH, HELD_OUT, NEUTRAL, PER_PROMPT, PER_CATEGORY, NEW_TOKENS]
        self.kept = Kept(f"diagnostics/{digest([KINDS, PLACES, STRENGTHS, sizes, steps, bf16])}")
        self.reading = {"tokenizer": self.tokenizer, "max_length": MAX_LENGTH, "progress": False}
        self.neutral = sentences("neutral_text.txt")[:NEUTRAL]
        # The price is taken on other texts than those that are diagnosed with.
        aside = data_lines("not_food")[:NEUTRAL]
        self.aside = self.tokenizer(aside, return_tensors="pt", padding=True, padding_side="right")
        self.plain = {
            concept: self.kept(f"outcome-{concept}-none", lambda concept=concept: self._scored(concept))["scores"]
            for concept in CONCEPTS
        }

    # --- what is fitted and diagnosed ---------------------------------------------------------------------------------

    def sets(self, fit: Fit) -> tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]:
        """The prompts to fit, and those held out, each as (source, target)."""
        if fit.concept == "toxicity":
            drawn = insults_sets(fit.seed)
            (source, target), held = drawn["fit"], drawn["validation"]
            return (source[: fit.size], target[: fit.size]), held
        rng = np.random.default_rng(fit.seed)
        sides = [sentences(f"{name}.txt") for name in ("negative", "positive")]
        mixed = [[texts[k] for k in rng.permutation(len(texts))] for texts in sides]
        (source, target), (held, goal) = ([side[part] for side in mixed] for part in (slice(fit.size), slice(48, 80)))
        return (source, target), (held[:HELD_OUT], goal[:HELD_OUT])

    def fitted(self, fit: Fit) -> FitResult:
        """The fit, out of its file if it is there."""
        file = self.kept.folder / f"fit-{fit.slug}.safetensors"
        if not file.exists():
            place, l1 = KINDS[fit.kind]
            result = lineas.fit_end_to_end(
                self.model,
                *self.sets(fit)[0],
                layers=PLACES[place],
                l1=l1,
                scaling="layer-mean",
                steps=self.steps,
                seed=fit.seed,
                **self.reading,
            )
            if result.stopped == "interrupted":
                raise SystemExit("interrupted")
            file.parent.mkdir(parents=True, exist_ok=True)
            result.save(file)
        found = lineas.load(file)
        assert isinstance(found, FitResult)
        return found

    def diagnosis(self, fit: Fit) -> dict[str, Any]:
        """What ``result.diagnose`` finds, as JSON has it."""

        def compute() -> dict[str, Any]:
            found: Diagnosis = self.fitted(fit).diagnose(
                self.model, *self.sets(fit)[1], neutral=self.neutral, seed=fit.seed, **self.reading
            )
            return {"json": json.dumps(found.to_dict())}

        return json.loads(str(self.kept(f"diagnosis-{fit.slug}", compute)["json"]))

    # --- what it does ------------------------------------------------------------------------------------------------

    def outcome(self, fit: Fit) -> dict[str, NDArray]:
        """Scores of the continuations at strength 1."""

        def compute() -> dict[str, Any]:
            with self.fitted(fit).attach(self.model):
                return self._scored(fit.concept)

        return self.kept(f"outcome-{fit.slug}", compute)

    def _scored(self, concept: str) -> dict[str, Any]:
        """The score of every continuation [K], higher where the concept's target is reached; no text is kept."""
        if concept == "toxicity":
            prompts = toxic_prompts(PER_CATEGORY)
        else:
            prompts = [prompt for prompt in sentences("neutral_prompts.txt") for _ in range(PER_PROMPT)]
        uniforms = np.random.default_rng(len(concept)).random((len(prompts), NEW_TOKENS))
        texts = continuations(self.model, self.tokenizer, prompts, uniforms)
        if concept == "toxicity":
            return {"scores": 1 - toxicity(texts).mean(axis=0)}
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        judge = SentimentIntensityAnalyzer()
        return {"scores": np.array([judge.polarity_scores(text)["compound"] for text in texts])}

    def price(self, fit: Fit) -> dict[str, NDArray]:
        """At each of the strengths the divergence on neutral text, and the numbers of the damage on other text."""

        def compute() -> dict[str, Any]:
            maps = self.fitted(fit).maps
            how = {"layers": list(maps), "pooling": "all", **self.reading}
            before, expected = lineas.collect(self.model, self.neutral, **how), self._log_probabilities()
            found: dict[str, list[float]] = {"kl": [], "damage": [], "change": [], "own_damage": [], "own_change": []}
            for strength in STRENGTHS:
                with maps.attach(self.model, strength) if strength else nullcontext():
                    after, steered = lineas.collect(self.model, self.neutral, **how), self._log_probabilities()
                found["kl"].append(float((expected.exp() * (expected - steered)).sum(dim=-1).mean()))
                for prefix, changed in (("", after), ("own_", maps.transform(before, strength))):
                    each = [damage(z, changed[name] - z) for name, z in before.items()]
                    found[f"{prefix}damage"].append(float(np.mean([one.damage for one in each])))
                    found[f"{prefix}change"].append(float(np.mean([one.change for one in each])))
            return {name: np.array(values) for name, values in found.items()}

        return self.kept(f"price-{fit.slug}", compute)

    @torch.inference_mode()
    def _log_probabilities(self) -> torch.Tensor:
        """Those of the next token after every token of the texts that the price is taken on."""
        logits = self.model(**self.aside).logits[self.aside["attention_mask"].bool()]
        return logits.float().log_softmax(dim=-1)

    def row(self, fit: Fit) -> Row:
        """All that the tables need of a fit."""
        result, price = self.fitted(fit), self.price(fit)
        return Row(
            concept=fit.concept,
            label=f"{fit.size}, {fit.kind}",
            support=result.maps.support / result.maps.d,
            fit_closing=1 - float(result.loss or np.nan) / float(result.history["loss"][0]),
            diagnosis=self.diagnosis(fit),
            gains=self.outcome(fit)["scores"] - self.plain[fit.concept],
            strengths=STRENGTHS,
            price=price,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/diagnostics.md")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch and of the engine")
    parser.add_argument("--bf16", action="store_true", help="round the factors of matrix products to bfloat16: faster")
    parser.add_argument("--fits", type=int, help="only the first N fits")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each fit, default {STEPS}")
    args = parser.parse_args()
    set_up(args.threads, args.bf16)

    study, fits = Study(args.steps, args.bf16), all_fits()[: args.fits]
    rows = Rows([study.row(fit) for fit in fits])
    machine = (
        f"{cpu_name()}, torch {torch.__version__}, float32{', products of bfloat16 factors' if args.bf16 else ''}; "
        f"{len(fits)} fits of {args.steps} steps; {HELD_OUT} + {HELD_OUT} held-out prompts, {NEUTRAL} neutral texts; "
        f"{len(study.plain['sentiment'])} and {len(study.plain['toxicity'])} continuations of {NEW_TOKENS} tokens."
    )
    lines = [machine, *itertools.chain.from_iterable(("", *part) for part in rows.report())]
    print("\n".join(lines))
    if args.write:
        write_between(ROOT / "docs" / "diagnostics.md", MARKS, lines)


if __name__ == "__main__":
    main()
