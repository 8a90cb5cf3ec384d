"""The demo (``lineas demo``): steer a small language model from negative to positive and look at what it costs.

Fits maps end to end between the two sentence sets in ``lineas/demo/data``, finds the strength that a budget on neutral
text allows, and evaluates effect and price at several strengths. Everything it prints is measured in that run, on
sentences that the fit did not see.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lineas

from . import sentences
from .model import check_packages, load_smollm2

if TYPE_CHECKING:
    from ..evaluation.calibrate import Calibration
    from ..evaluation.result import Evaluation
    from ..fitting.result import FitResult

LAYERS = "model.layers.*.post_attention_layernorm"
STRENGTHS = (0.5, 1.0)  # beside the calibrated one
BUDGET = 0.1  # nats, of the KL divergence of the next token on neutral text
LEARNING_RATE = 0.3  # longer than automatic rates, which stay near gradient flow: twelve steps are to be enough
LASSO = 1e-3  # leaves about a quarter of the neurons alone, and the effect as it is


@dataclass(frozen=True)
class Size:
    """How much the demo does: sentences fitted in each set, prompts, samples a prompt, tokens a sample, texts."""

    sentences: int
    prompts: int
    samples: int
    new_tokens: int
    neutral_texts: int  # to calibrate on, and as many others for the price
    shown: int


FULL = Size(sentences=40, prompts=12, samples=12, new_tokens=25, neutral_texts=32, shown=6)
QUICK = Size(sentences=8, prompts=4, samples=2, new_tokens=8, neutral_texts=4, shown=2)


def run(output: str | Path = "demo-output", *, steps: int = 12, seed: int = 0, quick: bool = False) -> int:
    """Run the demo and print what it finds.

    Parameters
    ----------
    output : path, default "demo-output"
        Folder for the maps, the picture, the evaluation and the report; made if absent.
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
        scaling="layer-mean",  # in which its figures are known
        l1=LASSO,
        lr=LEARNING_RATE,
        steps=steps,
        patience=None,
        seed=seed,
    )
    maps_path = output / "maps.safetensors"
    result.maps.save(maps_path)  # at once: they are there whatever comes
    if result.stopped == "interrupted":
        print(f"Interrupted: the maps of step {result.best_step} are in {maps_path}")
        return 130
    fitted_in = time.perf_counter() - start
    draw(result, output / "demo.png")

    prompts = sentences("neutral_prompts.txt")[: size.prompts]
    texts = sentences("neutral_text.txt")
    calibration = result.maps.calibrate(model, neutral=texts[: size.neutral_texts], max_kl=BUDGET, tokenizer=tokenizer)
    calibration.maps.save(maps_path)
    chosen = calibration.strength
    print(calibration)
    vader = lineas.judges.Vader()
    evaluation = lineas.evaluate(
        model,
        {"LinEAS": calibration.maps},
        tokenizer=tokenizer,
        prompts=prompts,
        neutral=texts[-size.neutral_texts :],
        # 0.05 is the threshold that VADER's authors give.
        judges={"VADER": vader, "positive": lineas.judges.Threshold(vader, 0.05)},
        strengths=sorted({*STRENGTHS, chosen}),
        samples=size.samples,
        max_new_tokens=size.new_tokens,
        batch_size=48,
        seed=seed,
    )
    evaluation.save(output / "evaluation.safetensors")
    evaluation.report(
        output / "report.html", judge="VADER", calibration=calibration, title="From negative to positive sentences"
    )
    if evaluation.stopped == "interrupted":
        print(f"Interrupted: what was measured is in {output}")
        return 130

    show_samples(evaluation, size.shown)
    print(f"\nVADER over {size.prompts * size.samples} continuations a strength, and the price on neutral text:")
    print(textwrap.indent(evaluation.table(), "  "))
    show_cost(result, calibration, evaluation, chosen)
    total = time.perf_counter() - start
    print(f"\n{total:.0f} s in all, {fitted_in:.0f} s of them to load and fit. In {output}:")
    print('  maps.safetensors         the maps: lineas.load(path).attach(model, strength="calibrated")')
    print("  report.html              curves, tables and all samples side by side, for a browser")
    print("  demo.png                 loss curve and support of each layer")
    print("  evaluation.safetensors   what was measured, for lineas.load")
    return 0


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


def show_samples(evaluation: Evaluation, shown: int) -> None:
    """Print the first sample of each of the first prompts at every strength: not chosen by what it says."""
    print(f"\nThe same prompts and random numbers at each strength (the first sample of {shown} prompts):")
    for k, prompt in enumerate(evaluation.prompts[:shown]):
        print(f"\n  {prompt} ...")
        for strength, groups in zip(evaluation.strengths, evaluation.continuations, strict=True):
            text = " ".join(groups[k][0].split())
            print(textwrap.fill(text, 100, initial_indent=f"  {strength:>6.3g} | ", subsequent_indent="         | "))


def show_cost(result: FitResult, calibration: Calibration, evaluation: Evaluation, chosen: float) -> None:
    """Print what the numbers mean, and what they do not."""
    rows: Sequence[dict[str, Any]] = evaluation.rows()
    off, full = rows[0], rows[evaluation.index("LinEAS", chosen)]
    held_out = result.history["held_out_loss"][0]
    lines = [
        f"The fit moved the held-out sentences' loss from {held_out:.2f} to {result.held_out_loss:.2f} "
        f"(maps of step {result.best_step}). They change {result.maps.support / result.maps.d:.0%} of "
        f"{result.maps.d} neurons.",
        f"A KL divergence of {BUDGET:g} nats a token allows strength {chosen:.3g}; on texts that it was not chosen "
        f"by it costs {full['kl']:.3f}, a rise of the loss by {full['loss_rise']:+.3f} nats or a perplexity "
        f"{math.exp(full['loss_rise']):.2f} times the unsteered one.",
        f"There the mean score goes from {off['VADER']:+.3f} to {full['VADER']:+.3f} and the positive share from "
        f"{off['positive']:.0%} to {full['positive']:.0%}.",
        "VADER counts words, it does not read; the intervals are over prompts, of which there are few.",
    ]
    print()
    print("\n".join(textwrap.fill(line, 112, initial_indent="  ", subsequent_indent="    ") for line in lines))
