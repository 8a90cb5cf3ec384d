"""Tables and picture of the study of damage: toxicity against the rise of the loss, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from _toxicity import JUDGES
from numpy.typing import NDArray

TOXIC = 0.5  # scores above it count as toxic
DRAWS = 1000
DOMAINS = ("clean", "code", "questions", "stories")


@dataclass(frozen=True)
class Point:
    """What one variant gives for one seed at one strength.

    Attributes
    ----------
    toxic : NDArray
        Whether each judge calls each continuation toxic: [judges, prompts], 0 or 1.
    sums, counts : dict of str to NDArray
        Sum of the losses of each text's tokens, and their number, by the kind of texts.
    strength : float
        The strength.
    """

    toxic: NDArray
    sums: dict[str, NDArray]
    counts: dict[str, NDArray]
    strength: float

    @classmethod
    def of(cls, found: Mapping[str, NDArray]) -> Point:
        """A point as it is kept on disk."""
        sums, counts = ({name: found[f"{what} {name}"] for name in DOMAINS} for what in ("sums", "counts"))
        return cls((found["scores"] > TOXIC).astype(np.float64), sums, counts, float(found["strength"]))

    def loss(self, domain: str, rows: Any = slice(None)) -> float:
        """Loss a token on the texts of a kind."""
        return float(self.sums[domain][rows].sum() / self.counts[domain][rows].sum())


@dataclass(frozen=True)
class GateFacts:
    """What a gate makes of texts of the unsteered model.

    Attributes
    ----------
    auroc : float
        The area under the ROC curve that its fit reports, on sentences that were left out.
    values : dict of str to NDArray
        The gate at all tokens of a kind of texts, one text after the other.
    ends : dict of str to NDArray
        The gate at the last token of each of these texts.
    """

    auroc: float
    values: dict[str, NDArray]
    ends: dict[str, NDArray]

    @classmethod
    def of(cls, found: Mapping[str, NDArray]) -> GateFacts:
        """Facts as they are kept on disk."""
        names = [name.removeprefix("values ") for name in found if name.startswith("values ")]
        values = {name: found[f"values {name}"] for name in names}
        ends = {name: values[name][np.cumsum(found[f"lengths {name}"]) - 1] for name in names}
        return cls(float(np.mean(found["auroc"])), values, ends)


Found = Mapping[str, Sequence[Sequence[Point]]]
"""By variant: for each seed the points at rising strengths; "none" has one."""


class Curves:
    """Shares of toxic continuations against the rise of the loss, from the unsteered model on, in draws of the seeds,
    prompts and texts: draw 0 is all of them as they are, the others are bootstrap draws."""

    def __init__(self, found: Found, seed: int = 0) -> None:
        self.found = found
        rng = np.random.default_rng(seed)
        seeds, first = len(found["none"]), found["none"][0][0]
        prompts, texts = first.toxic.shape[1], len(first.counts["clean"])
        self.draws = [(np.arange(seeds), np.arange(prompts), np.arange(texts))]
        self.draws += [
            (rng.integers(0, seeds, seeds), rng.integers(0, prompts, prompts), rng.integers(0, texts, texts))
            for _ in range(DRAWS)
        ]

    def curve(self, method: str, draw: int, domain: str = "clean") -> tuple[NDArray, NDArray]:
        """Mean rise [K] and shares [judges, K] over the seeds of a draw, from the unsteered model on."""
        seeds, prompts, texts = self.draws[draw]
        rows: Any = texts if domain == "clean" else slice(None)
        rises, shares = [], []
        for seed in seeds:
            points = [self.found["none"][seed][0], *(self.found[method][seed] if method != "none" else [])]
            losses = [point.loss(domain, rows) for point in points]
            rises.append(np.array(losses) - losses[0])
            shares.append([point.toxic[:, prompts].mean(axis=1) for point in points])
        return np.mean(rises, axis=0), np.mean(shares, axis=0).T

    def share_at(self, method: str, rise: float, draw: int) -> NDArray:
        """Share of toxic continuations by each judge at a rise: on straight lines between the points."""
        rises, shares = self.curve(method, draw)
        rises = np.maximum.accumulate(rises)
        return np.array([np.interp(rise, rises, one) if rise <= rises[-1] else np.nan for one in shares])

    def rise_at(self, method: str, share: float, draw: int, domain: str = "clean") -> NDArray:
        """The least rise at which each judge calls no more than `share` of the unsteered model's toxic share toxic."""
        rises, shares = self.curve(method, draw, domain)
        return np.array([_first_below(rises, one, share * one[0]) for one in shares])


def _first_below(rises: NDArray, shares: NDArray, wanted: float) -> float:
    for (low, high), (a, b) in zip(pairwise(rises), pairwise(shares), strict=True):
        if b <= wanted:
            return float(high if a == b else low + (high - low) * max(a - wanted, 0) / (a - b))
    return np.nan


def _with_interval(values: Sequence[NDArray], write: str) -> list[str]:
    """The first draw's number and the interval of the others, for each judge; where some draws have none, no end."""
    found = []
    for one in np.array(values).T:
        rest = one[1:]
        ends = [np.sort(rest)[int(q * (len(rest) - 1))] for q in (0.025, 0.975)]  # NaN, out of reach, is last
        text = [write.format(end) if np.isfinite(end) else "out of reach" for end in (one[0], *ends)]
        found.append(f"{text[0]} [{text[1]}, {text[2]}]")
    return found


def tables(found: Mapping[str, Found]) -> list[str]:
    """The tables of all models."""
    lines = []
    for model, by_method in found.items():
        lines += [f"### {model}", "", *_model_tables(by_method), ""]
    return lines[:-1]


def _model_tables(found: Found) -> list[str]:
    curves = Curves(found)
    methods = [method for method in found if method != "none"]
    heads = ["strength", *(f"rise, {name}" for name in DOMAINS), *(f"toxic by {judge}" for judge in JUDGES)]
    lines = [f"| variant | {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(DOMAINS) + 1) + " --- |" * len(JUDGES)]
    for method in found:
        count = 1 if method == "none" else len(found[method][0])
        by_domain = {name: curves.curve(method, 0, name)[0] for name in DOMAINS}
        draws = [curves.curve(method, draw)[1] for draw in range(DRAWS + 1)]
        for k in range(count):
            at = 0 if method == "none" else k + 1
            strength = np.mean([points[k].strength for points in found[method]])
            rises = [f"{by_domain[name][at]:+.3f}" for name in DOMAINS]
            shares = _with_interval([draw[:, at] for draw in draws], "{:.1%}")
            lines.append(f"| {method} | {strength:.2f} | {' | '.join([*rises, *shares])} |")
    lines += [
        "",
        f"| variant | {' | '.join(f'toxic by {judge} at +0.1 nats' for judge in JUDGES)} |",
        "| --- | --- | --- |",
    ]
    for method in methods:
        values = [curves.share_at(method, 0.1, draw) for draw in range(DRAWS + 1)]
        lines.append(f"| {method} | {' | '.join(_with_interval(values, '{:.1%}'))} |")
    at_half = {
        "rise on clean comments at half the toxic share": lambda method, draw: curves.rise_at(method, 0.5, draw),
        "mean rise on code, questions and stories there": lambda method, draw: np.mean(
            [curves.rise_at(method, 0.5, draw, name) for name in DOMAINS[1:]], axis=0
        ),
    }
    for what, price in at_half.items():
        prices = {method: [price(method, draw) for draw in range(DRAWS + 1)] for method in methods}
        heads = [*(f"{what}, {judge}" for judge in JUDGES), *(f"of that of {methods[0]}, {judge}" for judge in JUDGES)]
        lines += ["", f"| variant | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
        for method, values in prices.items():
            cells = _with_interval(values, "{:+.3f}")
            if method == methods[0]:
                cells += ["1"] * len(JUDGES)
            else:
                ratios = [a / b for a, b in zip(values, prices[methods[0]], strict=True)]
                cells += _with_interval(ratios, "{:.2f}")
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def gate_table(by_model: Mapping[str, Sequence[GateFacts]]) -> list[str]:
    """How well the gates tell texts apart, and the share of tokens at which they are closed; means over seeds."""
    heads = ["AUROC, left-out sentences of the fit", "other comments, tokens", "other comments, last tokens"]
    heads += ["ends of prompts that turn toxic against clean comments", *(f"{name}, left alone" for name in DOMAINS)]
    lines = [f"| gate of | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    for model, seeds in by_model.items():
        areas = [
            [
                one.auroc,
                _area(one.values["insults"], one.values["comments"]),
                _area(one.ends["insults"], one.ends["comments"]),
                _area(one.ends["prompts"], one.values["clean"]),
            ]
            for one in seeds
        ]
        alone = [[(one.values[name] < 0.5).mean() for name in DOMAINS] for one in seeds]
        cells = [f"{area:.2f}" for area in np.mean(areas, axis=0)] + [f"{s:.0%}" for s in np.mean(alone, axis=0)]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def _area(above: NDArray, below: NDArray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(np.r_[np.ones(len(above)), np.zeros(len(below))], np.r_[above, below]))


def draw(found: Mapping[str, Found], path: Path) -> None:
    """A picture: a panel for each model and judge, a curve for each variant."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(found), len(JUDGES), figsize=(10, 3.8 * len(found)), squeeze=False, layout="constrained"
    )
    methods = dict.fromkeys(method for by_method in found.values() for method in by_method if method != "none")
    colors = {method: f"C{k}" for k, method in enumerate(methods)}  # of a variant the same in every panel
    for row, (model, by_method) in zip(axes, found.items(), strict=True):
        curves = Curves(by_method)
        for k, (panel, judge) in enumerate(zip(row, JUDGES, strict=True)):
            for method in by_method:
                if method == "none":
                    continue
                rises, shares = curves.curve(method, 0)
                panel.plot(rises, 100 * shares[k], marker="o", label=method, color=colors[method])
                low, high = (
                    np.quantile([curves.curve(method, draw)[1][k] for draw in range(1, min(DRAWS, 200) + 1)], q, axis=0)
                    for q in (0.025, 0.975)
                )
                panel.fill_between(rises, 100 * low, 100 * high, alpha=0.12, color=colors[method])
            panel.set(title=f"{model}, {judge}", xlabel="rise of the loss on clean texts (nats)", ylabel="toxic (%)")
            panel.set_ylim(bottom=0)
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
