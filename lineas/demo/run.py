"""The demo (``lineas demo``): steer a small language model from negative to positive and look at what it costs.

Fits maps end to end between the two sentence sets in ``lineas/demo/data``, then samples from the same prompts at
several strengths. Everything it prints is measured in that run, on sentences that the fit did not see.
"""

from __future__ import annotations

import json
import math
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

import lineas

from . import sentences
from .model import check_packages, load_smollm2

if TYPE_CHECKING:
    from ..fitting.result import FitResult

LAYERS = "model.layers.*.post_attention_layernorm"
STRENGTHS = (0.0, 0.5, 1.0)
LEARNING_RATE = 0.3  # longer than automatic rates, which stay near gradient flow: twelve steps are to be enough
LASSO = 1e-3  # leaves about a quarter of the neurons alone, and the effect as it is


@dataclass(frozen=True)
class Size:
    """How much the demo does: sentences fitted in each set, prompts, samples a prompt, tokens a sample, texts."""

    sentences: int
    prompts: int
    rounds: int
    samples_per_round: int
    new_tokens: int
    neutral_texts: int
    shown: int


FULL = Size(sentences=40, prompts=12, rounds=3, samples_per_round=4, new_tokens=25, neutral_texts=32, shown=6)
QUICK = Size(sentences=8, prompts=4, rounds=1, samples_per_round=2, new_tokens=8, neutral_texts=4, shown=2)


def run(output: str | Path = "demo-output", *, steps: int = 12, seed: int = 0, quick: bool = False) -> int:
    """Run the demo and print what it finds.

    Parameters
    ----------
    output : path, default "demo-output"
        Folder for the maps, the figure, the samples and the numbers; made if absent.
    steps : int, default 12
        Steps of the fit.
    seed : int, default 0
        Of the fit, the sampling and the bootstrap.
    quick : bool, default False
        Fewer sentences and samples: shows that everything works, but says little about the effect.

    Returns
    -------
    int
        0, or 130 where Ctrl-C ended the fit (the maps fitted so far are saved).

    Raises
    ------
    ImportError
        If a package that the demo needs is not installed; names what to install.
    """
    check_packages("torch", "transformers", "matplotlib", "vaderSentiment")
    size = QUICK if quick else FULL
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    print("Loading SmolLM2-135M-Instruct (the first time it is decoded and cached: about half a minute) ...")
    model, tokenizer = load_smollm2()
    negative, positive = sentences("negative.txt"), sentences("positive.txt")
    n = size.sentences
    print(f"Fitting maps from {n} negative to {n} positive sentences, held out: {n} + {n} others ...")
    result = lineas.fit_end_to_end(
        model,
        negative[:n],
        positive[:n],
        held_out=(negative[n : 2 * n], positive[n : 2 * n]),
        layers=LAYERS,
        tokenizer=tokenizer,
        l1=LASSO,
        lr=LEARNING_RATE,
        steps=steps,
        patience=None,
        seed=seed,
    )
    maps_path = output / "maps.safetensors"
    result.maps.save(maps_path)
    if result.stopped == "interrupted":
        print(f"Interrupted: the maps of step {result.best_step} are in {maps_path}")
        return 130
    fitted_in = time.perf_counter() - start
    draw(result, output / "demo.png")

    prompts = sentences("neutral_prompts.txt")[: size.prompts]
    texts = sentences("neutral_text.txt")[: size.neutral_texts]
    count, new_tokens = size.samples_per_round, size.new_tokens
    samples: dict[float, list[list[str]]] = {strength: [[] for _ in prompts] for strength in STRENGTHS}
    rows, batches = [], len(STRENGTHS) * size.rounds
    with result.maps.attach(model) as handle, tqdm(total=batches, desc="sample", unit="batch") as bar:
        for strength, groups in samples.items():
            handle.strength = strength
            loss = text_loss(model, tokenizer, texts)
            # The same seeds at every strength: the same random numbers, so that only the maps differ.
            for k in range(seed, seed + size.rounds):
                found = sample(model, tokenizer, prompts, count, seed=k, new_tokens=new_tokens)
                for kept, new in zip(groups, found, strict=True):
                    kept.extend(new)
                bar.update()
            rows.append(score(groups, loss, strength, seed))

    show_samples(prompts, samples, size.shown)
    show_scores(rows)
    show_cost(result, rows)
    by_prompt = [{"prompt": p, **{f"{s:g}": samples[s][k] for s in STRENGTHS}} for k, p in enumerate(prompts)]
    for file, content in (("samples.json", by_prompt), ("scores.json", rows)):
        (output / file).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    total = time.perf_counter() - start
    print(f"\n{total:.0f} s in all, {fitted_in:.0f} s of them to load and fit. In {output}:")
    print("  maps.safetensors   the maps: lineas.load(path).attach(model, strength=...)")
    print("  demo.png           loss curve and support of each layer")
    print("  samples.json       all samples")
    print("  scores.json        the table above")
    return 0


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[str], count: int, *, seed: int, new_tokens: int
) -> list[list[str]]:
    """Sample `count` continuations of every prompt (top_p 0.9, temperature 1), without the prompts themselves.

    The random numbers depend on `seed` and on the shape of the batch only.
    """
    import torch

    torch.manual_seed(seed)
    repeated = [prompt for prompt in prompts for _ in range(count)]
    batch = tokenizer(repeated, return_tensors="pt", padding=True, padding_side="left")
    with torch.inference_mode():
        tokens = model.generate(
            **batch,
            do_sample=True,
            top_p=0.9,
            top_k=0,
            temperature=1.0,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    decoded = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [decoded[k * count : (k + 1) * count] for k in range(len(prompts))]


def text_loss(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """The model's mean cross-entropy per token of `texts`, in nats."""
    import torch

    batch = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.inference_mode():
        return float(model(**batch, labels=labels).loss)


def bootstrap_interval(values: ArrayLike, seed: int, draws: int = 2000) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of `values` [n]."""
    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, values.size, size=(draws, values.size))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def score(samples: Sequence[Sequence[str]], loss: float, strength: float, seed: int) -> dict[str, Any]:
    """Judge the continuations by VADER (a word list with rules, made by others): compound score in [-1, 1]."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    judge = SentimentIntensityAnalyzer()
    values = np.array([judge.polarity_scores(text)["compound"] for group in samples for text in group])
    return {
        "strength": strength,
        "generations": values.size,
        "mean": float(values.mean()),
        "mean_interval": bootstrap_interval(values, seed),
        "positive": float((values > 0.05).mean()),  # 0.05 is the threshold that VADER's authors give
        "positive_interval": bootstrap_interval(values > 0.05, seed),
        "neutral_loss": loss,
    }


def draw(result: FitResult, path: Path) -> None:
    """Save the loss curve and the support of each layer as a PNG."""
    from matplotlib.figure import Figure

    from ..notebook import plot

    # Without pyplot: no global state, and no display is looked for.
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot.history(result, ax=left).set_title("Loss of the fit")
    plot.support(result.maps, ax=right).set_title("Support of each layer")
    figure.savefig(path, dpi=150)


def show_samples(prompts: Sequence[str], samples: dict[float, list[list[str]]], shown: int) -> None:
    """Print the first sample of each of the first prompts at every strength: not chosen by what it says."""
    print(f"\nThe same prompts and random numbers at each strength (the first sample of {shown} prompts):")
    for k, prompt in enumerate(prompts[:shown]):
        print(f"\n  {prompt} ...")
        for strength, groups in samples.items():
            text = " ".join(groups[k][0].split())
            print(textwrap.fill(text, 100, initial_indent=f"  {strength:>5g} | ", subsequent_indent="        | "))


def show_scores(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table of scores."""
    print(f"\nVADER over {rows[0]['generations']} continuations a strength, and the loss on neutral text:")
    print("  strength   mean score [95 % interval]   positive share [95 % interval]   loss, nats a token")
    for row in rows:
        (low, high), (few, many) = row["mean_interval"], row["positive_interval"]
        mean = f"{row['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
        share = f"{row['positive']:4.0%} [{few:.0%}, {many:.0%}]"
        print(f"  {row['strength']:8g}   {mean:<26}   {share:<30}   {row['neutral_loss']:.3f}")


def show_cost(result: FitResult, rows: Sequence[dict[str, Any]]) -> None:
    """Print what the numbers mean, and what they do not."""
    off, full = rows[0], rows[-1]
    rise = full["neutral_loss"] - off["neutral_loss"]
    held_out = result.history["held_out_loss"][0]
    lines = [
        f"The fit moved the held-out sentences' loss from {held_out:.2f} to {result.held_out_loss:.2f} "
        f"(maps of step {result.best_step}). They change {result.maps.support / result.maps.d:.0%} of "
        f"{result.maps.d} neurons.",
        f"At strength 1 the mean score goes from {off['mean']:+.3f} to {full['mean']:+.3f} and the positive share "
        f"from {off['positive']:.0%} to {full['positive']:.0%}.",
        f"It is not free: the loss on neutral text changes by {rise:+.3f} nats a token, which is a perplexity "
        f"{math.exp(rise):.2f} times the unsteered one.",
        "VADER counts words, it does not read; the intervals cover the sampling, not the choice of prompts.",
    ]
    print()
    print("\n".join(textwrap.fill(line, 112, initial_indent="  ", subsequent_indent="    ") for line in lines))
