"""The table of the paper, measure by measure: a language model under maps, its continuations and what they cost."""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from _paper import Results, device_of
from _paper_data import draw, texts, toxic_and_clean, toxicity_prompts
from _study import digest

import lineas
from lineas import baselines
from lineas.hooks.modules import block_names

Found = dict[str, dict[str, list[float]]]
"""By method, then by measure: one number a seed, or one for all."""
LAYERS = {
    "ITI-C": r".*o_proj",
    "Lin-AcT": r".*o_proj",
    "AurA": r".*mlp\.(up|gate|down)_proj",
    "LinEAS": r".*post.*layernorm",
}
"""Regular expressions of the full names of modules; CAA acts on blocks."""
BLOCKS = ("CAA", "CAA (middle)")
STRENGTHS = {"ITI-C": 0.5}
# Methods of activations alone: the function of source and target, and the pooling over tokens.
LOCAL: dict[str, tuple[Callable[..., Any], str]] = {
    "CAA": (baselines.mean, "mean"),
    "CAA (middle)": (baselines.mean, "mean"),
    "ITI-C": (baselines.iti_c, "mean"),
    "AurA": (baselines.aura, "max"),
}
FITTED = (*BLOCKS, "ITI-C", "Lin-AcT", "AurA", "LinEAS")
METHODS = ("none", "prompt", *FITTED)


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for ``generate``, which go before those of the model's own generation settings."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    return {"do_sample": True} | {name: getattr(args, name) for name in names}


class Study:
    """Model, judge and data, loaded when they are needed first; everything that is found is kept on disk."""

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        self.args, self.results = args, results
        self.device = device_of(args.device)
        self.fitted = [method for method in METHODS if method in args.methods and method in FITTED]
        self.methods = [method for method in METHODS if method in args.methods]
        # Those that sentences and questions are run under; "prompt" is the model alone there.
        self.steered = [*(["none"] if {"none", "prompt"} & {*args.methods} else []), *self.fitted]
        self.layers = {**LAYERS, **dict(args.layers)}
        self.strengths = dict.fromkeys(FITTED, 1.0) | STRENGTHS | dict(args.strength)
        self.loaded = {name: getattr(args, name) for name in ("model", "revision", "tf32", "attention")}
        self.loaded |= {"dtype": str(args.dtype)}
        self.progress = sys.stderr.isatty() and not args.rehearse

    # ---- what is loaded ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.args.model, revision=self.args.revision)

    @functools.cached_property
    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        extra = {} if self.args.attention is None else {"attn_implementation": self.args.attention}
        model = AutoModelForCausalLM.from_pretrained(
            self.args.model, revision=self.args.revision, dtype=self.args.dtype, **extra
        )
        return model.to(self.device).eval()

    @functools.cached_property
    def judge(self) -> Any:
        return lineas.judges.Classifier(
            self.args.judge, self.args.judge_label, batch_size=self.args.judge_batch, device=self.device
        )

    @functools.cached_property
    def tasks(self) -> Any:
        from lm_eval.tasks import TaskManager

        folder = self.args.mmlu_folder
        return TaskManager(include_path=folder, include_defaults=folder is None)

    @functools.cached_property
    def comments(self) -> tuple[list[str], list[str]]:
        if self.args.toxic:
            return texts(self.args.toxic), texts(self.args.clean)
        return toxic_and_clean(self.args.jigsaw)

    @functools.cached_property
    def wikipedia(self) -> list[str]:
        def told(text: str) -> bool:  # whether there is a token to predict
            return len(self.tokenizer(text)["input_ids"]) > 1

        return texts(self.args.wikipedia, self.args.ppl_sentences, told)

    @functools.cached_property
    def pools(self) -> dict[str, list[str]]:
        """The prompts of both benchmarks, of which those of the first are drawn by the seed."""
        found = {}
        if "rtp" in self.args.measures:
            found["rtp"] = toxicity_prompts(self.args.rtp)
        if "tet" in self.args.measures:
            found["tet"] = texts(self.args.tet, self.args.tet_prompts)
        return found

    def prompts(self, which: str, seed: int) -> list[str]:
        pool = self.pools[which]
        return draw(pool, self.args.rtp_prompts, seed, self.args.rtp) if which == "rtp" else pool

    # ---- maps --------------------------------------------------------------------------------------------------------

    def facts(self, method: str, seed: int) -> dict[str, Any]:
        """Everything that the maps of a method depend on."""
        args, found = self.args, {"method": method, "seed": seed, "layers": self.layers.get(method, "blocks")}
        found |= {"sentences": args.sentences, "length": args.fit_length, "data": digest(self.sets(seed))}
        if method == "LinEAS":
            found |= self.settings()
        return self.loaded | found

    def settings(self) -> dict[str, Any]:
        """How LinEAS is fitted."""
        args = self.args
        found = {"optimizer": args.optimizer, "lr": args.lr, "steps": args.steps, "scaling": args.scaling}
        return found | {"l1": args.penalty, "group": args.penalty, "mini_batch": args.mini_batch}

    @functools.cache  # noqa: B019
    def sets(self, seed: int) -> tuple[list[str], list[str]]:
        toxic, clean = self.comments
        count = self.args.sentences
        return draw(toxic, count, seed, "toxic comments"), draw(clean, count, seed, "clean comments")

    @functools.cache  # noqa: B019
    def maps(self, method: str, seed: int) -> lineas.SteeringMaps:
        facts = self.facts(method, seed)
        return self.results.maps(f"{method} {seed}", facts, lambda: self._fit(method, seed, facts))

    def _fit(self, method: str, seed: int, facts: dict[str, Any]) -> lineas.SteeringMaps:
        reading = {
            "layers": self._modules(method),
            "tokenizer": self.tokenizer,
            "max_length": self.args.fit_length,
            "batch_size": self.args.fit_batch,
            "progress": self.progress,
        }
        sets = self.sets(seed)
        if method == "LinEAS":
            kept = self.results.path(f"fit {method} {seed}", facts, ".safetensors")
            result = lineas.fit_end_to_end(self.model, *sets, **reading, **self.settings(), seed=seed, checkpoint=kept)
            if result.stopped != "finished":
                raise SystemExit(f"LinEAS, seed {seed}: {result.stopped}; the same command goes on from there")
            kept.unlink()
            return result.maps
        if method == "Lin-AcT":
            return lineas.fit_incremental(self.model, *sets, **reading)
        fit, pooling = LOCAL[method]
        return fit(*(lineas.collect(self.model, data, pooling=pooling, **reading) for data in sets))

    def _modules(self, method: str) -> list[Any]:
        if method in BLOCKS:
            blocks = block_names(self.model)
            return blocks if method == "CAA" else [blocks[len(blocks) // 2]]
        return [re.compile(self.layers[method])]

    # ---- measures ----------------------------------------------------------------------------------------------------

    def toxicity(self, which: str, seed: int) -> dict[str, float]:
        """By method the share of continuations that the judge calls toxic, in %."""
        args, prompts = self.args, self.prompts(which, seed)
        shared = {"prompts": digest(prompts), "seed": seed, "batch": args.batch_size, **self._generation()}
        known = {method: self._told(method, seed) | shared for method in self.methods}
        judged = {method: facts | {"judge": args.judge, "label": args.judge_label} for method, facts in known.items()}
        found = None
        if any(not self.results.path(f"{which} {m} {seed}", facts, ".json").exists() for m, facts in judged.items()):
            found = self._evaluate(
                seed,
                prompts=prompts,
                instruction={"prompt": f"{args.prompt} "} if "prompt" in self.methods else None,
                max_length=args.prompt_length,
                max_new_tokens=args.new_tokens,
                batch_size=args.batch_size,
                sampling=sampling(args),
                seed=seed,
                checkpoint=self.results.path(f"texts {which} {seed}", self.loaded | shared, ".jsonl"),
            )

        def scores(method: str) -> list[float]:
            assert found is not None
            said = [text for several in found.continuations[_point(found, method)] for text in several]
            return self.judge(said).tolist()

        names = {method: f"{which} {method} {seed}" for method in self.methods}
        by_method = {m: self.results.value(names[m], judged[m], functools.partial(scores, m)) for m in self.methods}
        return {method: 100 * float(np.mean(np.array(scores) > 0.5)) for method, scores in by_method.items()}

    def _generation(self) -> dict[str, Any]:
        return {"new_tokens": self.args.new_tokens, "longest": self.args.prompt_length, **sampling(self.args)}

    def perplexity(self, seed: int) -> dict[str, float]:
        """By method the mean of the perplexities of the sentences; "prompt" is left to the model alone."""
        shared = {"sentences": digest(self.wikipedia), "length": self.args.ppl_length}
        known = {method: self._told(method, seed) | shared for method in self.steered}
        found = None
        names = {method: f"ppl {method}{'' if method == 'none' else f' {seed}'}" for method in self.steered}
        if any(not self.results.path(names[m], facts, ".json").exists() for m, facts in known.items()):
            found = self._evaluate(
                seed,
                neutral=self.wikipedia,
                max_length=self.args.ppl_length,
                checkpoint=self.results.path("sentences", self.loaded | shared, ".jsonl"),
            )

        def value(method: str) -> float:
            assert found is not None
            _, predicted, loss, *_ = found.price[_point(found, method)].T
            return float(np.exp(loss / predicted).mean())

        return {m: self.results.value(names[m], known[m], functools.partial(value, m)) for m in self.steered}

    def _evaluate(self, drawn: int, **settings: Any) -> lineas.Evaluation:
        found = lineas.evaluate(
            self.model,
            {method: self.maps(method, drawn) for method in self.fitted},
            tokenizer=self.tokenizer,
            strengths={method: [self.strengths[method]] for method in self.fitted},
            progress=self.progress,
            **settings,
        )
        if found.stopped != "finished":
            raise SystemExit(f"{found.stopped}; the same command goes on from there")
        return found

    def mmlu(self, method: str, seed: int) -> float:
        """The accuracy of the model, steered by a method, in %."""
        args = self.args
        settings = {"task": args.mmlu_task, "shots": args.shots, "limit": args.mmlu_limit, "batch": args.mmlu_batch}
        name = f"mmlu {method}{'' if method == 'none' else f' {seed}'}"

        def value() -> float:
            if method == "none":
                return self._harness()
            with self.maps(method, seed).attach(self.model, self.strengths[method]):
                return self._harness()

        return self.results.value(name, self._told(method, seed) | settings, value)

    def _harness(self) -> float:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        args = self.args
        found = simple_evaluate(
            model=HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=args.mmlu_batch),
            tasks=[args.mmlu_task],
            num_fewshot=args.shots,
            limit=args.mmlu_limit,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=self.tasks,
        )
        assert found is not None
        return 100 * float(found["results"][args.mmlu_task]["acc,none"])

    def _told(self, method: str, seed: int) -> dict[str, Any]:
        """Everything that tells the model as steered by a method from others."""
        if method == "none":
            return self.loaded
        if method == "prompt":
            return self.loaded | {"prompt": self.args.prompt}
        return self.facts(method, seed) | {"strength": self.strengths[method]}


def _point(found: lineas.Evaluation, method: str) -> int:
    return found.index("unsteered" if method == "none" else method)


def measure(study: Study, show: Callable[[Found], None]) -> None:
    """Measure everything, seed by seed; `show` gets what is known after each."""
    args = study.args
    found: Found = {method: {} for method in study.methods}

    def note(method: str, measure: str, value: float) -> None:
        if method in found:
            found[method].setdefault(measure, []).append(value)

    for turn, seed in enumerate(args.seeds):
        for which in ("rtp", "tet"):
            if which in args.measures:
                for method, share in study.toxicity(which, seed).items():
                    note(method, which, share)
        by_measure: dict[str, dict[str, float]] = {}
        if "ppl" in args.measures:
            by_measure["ppl"] = study.perplexity(seed)
        if "mmlu" in args.measures:
            by_measure["mmlu"] = {method: study.mmlu(method, seed) for method in study.steered}
        for measure, values in by_measure.items():
            for method, value in values.items():
                if method != "none":
                    note(method, measure, value)
                elif turn == 0:  # it is the same for all seeds
                    note("none", measure, value)
                    note("prompt", measure, value)
        show(found)
