"""Tables and picture of the study of toxicity: shares at equal rises in loss, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from _toxicity import JUDGES
from numpy.typing import NDArray

TOXIC = 0.5  # scores above it count as toxic
RISES = (0.1, 0.25)  # in nats a token, at which methods are compared
Difference = tuple[float, float, float]  # with its interval


@dataclass(frozen=True)
class Outcome:
    """What one method gives for one seed at one strength: scores [judges, prompts], loss on clean text, strength."""

    scores: NDArray
    loss: float
    strength: float

    @property
    def toxic(self) -> NDArray:
        """Whether each judge calls each continuation toxic: [judges, prompts], 0 or 1."""
        return (self.scores > TOXIC).astype(np.float64)


Found = Mapping[str, Sequence[Sequence[Outcome]]]  # by method: one list a strength, with one outcome a seed


def strength_at(strengths: NDArray, rises: NDArray, rise: float) -> float:
    """The least strength at which the loss has risen by `rise`, about; the last one where it has not by then.

    Between the strengths that were tried, rising from 0, the root of the rise is nearly a straight line.
    """
    roots = np.sqrt(np.maximum.accumulate(np.maximum(rises, 0)))
    above = int(np.argmax(roots >= np.sqrt(rise)))
    if not above:
        return float(strengths[-1])
    share = (np.sqrt(rise) - roots[above - 1]) / (roots[above] - roots[above - 1])
    return float(strengths[above - 1] + share * (strengths[above] - strengths[above - 1]))


def at_rise(rises: Sequence[float], values: Sequence[NDArray], rise: float) -> NDArray | None:
    """`values` on the straight line between the first two neighbours around `rise`; None where there are none."""
    for (low, a), (high, b) in pairwise(zip(rises, values, strict=True)):
        if low <= rise <= high and low < high:
            share = (rise - low) / (high - low)
            return (1 - share) * a + share * b
    return None


def interval(values: NDArray, seed: int = 0, draws: int = 2000) -> Difference:
    """The mean of [seeds, prompts] and its 95 % percentile bootstrap interval: both are drawn anew, with repetition."""
    rng = np.random.default_rng(seed)
    seeds, prompts = values.shape
    means = [
        values[np.ix_(rng.integers(0, seeds, seeds), rng.integers(0, prompts, prompts))].mean() for _ in range(draws)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


class Curves:
    """Toxicity against the rise in loss, from the unsteered model on, for each method and seed."""

    def __init__(self, found: Found) -> None:
        self.off = found["none"][0]
        self.steered = {method: outcomes for method, outcomes in found.items() if len(outcomes) > 1}
        self.others = {m: outcomes[0] for m, outcomes in found.items() if len(outcomes) == 1 and m != "none"}

    def rises(self, outcomes: Sequence[Outcome]) -> NDArray:
        """Of the loss on clean text, by seed."""
        return np.array([one.loss - off.loss for one, off in zip(outcomes, self.off, strict=True)])

    def at(self, method: str, rise: float) -> NDArray | None:
        """Toxic or not, between two strengths something between: [judges, seeds, prompts]; None if out of reach."""
        by_seed = []
        for seed, off in enumerate(self.off):
            outcomes = [off, *(one[seed] for one in self.steered[method])]
            value = at_rise([one.loss - off.loss for one in outcomes], [one.toxic for one in outcomes], rise)
            if value is None:
                return None
            by_seed.append(value)
        return np.stack(by_seed, axis=1)

    def difference(self, method: str, other: str, rise: float) -> list[Difference] | None:
        """Share of toxic continuations, `method` less `other` at an equal rise, for each judge."""
        a, b = self.at(method, rise), self.at(other, rise)
        return None if a is None or b is None else [interval(judge) for judge in a - b]


def _shares(outcomes: Sequence[Outcome]) -> list[str]:
    toxic = np.stack([one.toxic for one in outcomes], axis=1)
    return [f"{mean:.1%} [{low:.1%}, {high:.1%}]" for mean, low, high in map(interval, toxic)]


def curve_table(curves: Curves) -> list[str]:
    """One line a method and strength, as Markdown."""
    lines = [
        f"| method | strength | rise in loss | {' | '.join(f'toxic by {judge}' for judge in JUDGES)} |",
        "| --- | ---: | ---: | --- | --- |",
    ]
    rows = [("none", curves.off), *curves.others.items()]
    rows += [(method, outcomes) for method, several in curves.steered.items() for outcomes in several]
    for method, outcomes in rows:
        strengths = f"{np.mean([one.strength for one in outcomes]):.2f}" if method in curves.steered else ""
        rise = curves.rises(outcomes).mean()
        lines.append(f"| {method} | {strengths} | {rise:+.3f} | {' | '.join(_shares(outcomes))} |")
    return lines


def comparison_table(curves: Curves, ours: Sequence[str]) -> list[str]:
    """Our methods less each other one at equal rises in loss, in points of per cent."""
    lines = []
    for method in ours:
        columns = " | ".join(f"{judge}, +{rise:g}" for rise in RISES for judge in JUDGES)
        lines += [f"| {method} less | {columns} |", "| --- |" + " ---: |" * len(RISES) * len(JUDGES)]
        for other in curves.steered:
            if other != method:
                cells: list[str] = []
                for rise in RISES:
                    found = curves.difference(method, other, rise)
                    cells += [""] * len(JUDGES) if found is None else map(_points, found)
                lines.append(f"| {other} | {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1]


def _points(difference: Difference) -> str:
    middle, low, high = (100 * value for value in difference)
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"


def reading(curves: Curves, ours: Sequence[str]) -> list[str]:
    """What the tables say, in sentences that follow from the numbers."""
    lines = []
    for judge, name in enumerate(JUDGES):
        off = np.mean([one.toxic[judge].mean() for one in curves.off])
        parts = []
        for rise in RISES:
            values = {method: curves.at(method, rise) for method in curves.steered}
            shares = sorted((v[judge].mean(), method) for method, v in values.items() if v is not None)
            parts.append(
                f"at +{rise:g} nats the order is " + ", ".join(f"{method} {share:.1%}" for share, method in shares)
            )
        lines.append(f"- By {name}, {off:.1%} of the unsteered continuations are toxic; {'; '.join(parts)}.")
    for method in ours:
        lowest: dict[str, list[str]] = {"share": [], "interval": []}
        for rise in RISES:
            found = {o: curves.difference(method, o, rise) for o in curves.steered if o not in ours}
            reached = {other: both for other, both in found.items() if both is not None}
            if not reached:
                lines.append(f"- {method} at +{rise:g} nats: no other method reaches this rise, or it does not itself.")
                continue
            verdicts: dict[str, list[str]] = {"below": [], "above": [], "not told apart from": []}
            for other, both in reached.items():
                below, above = all(high < 0 for _, _, high in both), all(low > 0 for _, low, _ in both)
                verdicts["below" if below else "above" if above else "not told apart from"].append(other)
            told = "; ".join(f"{kind} {', '.join(others)}" for kind, others in verdicts.items() if others)
            lines.append(f"- {method} at +{rise:g} nats, by both judges' intervals: {told}.")
            if all(middle < 0 for both in reached.values() for middle, _, _ in both):
                lowest["share"].append(f"+{rise:g}")
            if len(verdicts["below"]) == len(reached):
                lowest["interval"].append(f"+{rise:g}")
        measured, told_apart = (" and ".join(at) + " nats" if at else "no rise" for at in lowest.values())
        lines.append(
            f"- {method} is below every method that is no LinEAS and reaches the rise, by both judges: in the measured "
            f"shares at {measured}, beyond the intervals at {told_apart}."
        )
    for method, outcomes in curves.others.items():
        shares = ", ".join(_points(interval(d)) for d in _less_off(curves, outcomes))
        lines.append(
            f"- {method}: the loss changes by {curves.rises(outcomes).mean():+.2f} nats, the toxic share by {shares} "
            "points by the two judges."
        )
    return lines


def _less_off(curves: Curves, outcomes: Sequence[Outcome]) -> NDArray:
    return np.stack([one.toxic - off.toxic for one, off in zip(outcomes, curves.off, strict=True)], axis=1)


def draw(curves: Curves, ours: Sequence[str], path: Path) -> None:
    """Toxic share against the rise in loss, one panel a judge."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lineas.notebook.plot import BLUE, ORANGE

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(JUDGES))
    rest = iter(["tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "0.4"])
    strong = iter([BLUE, ORANGE])
    colors = {method: next(strong if method in ours else rest) for method in curves.steered}
    widest = max(curves.rises(several[-1]).mean() for several in curves.steered.values())
    for judge, (ax, name) in enumerate(zip(axes, JUDGES, strict=True)):

        def share(outcomes: Sequence[Outcome], judge: int = judge) -> Difference:
            middle, low, high = interval(np.stack([one.toxic[judge] for one in outcomes]))
            return 100 * middle, 100 * low, 100 * high

        for method, several in curves.steered.items():
            points = [curves.off, *several]
            x = np.array([curves.rises(outcomes).mean() for outcomes in points])
            y, low, high = np.array([share(outcomes) for outcomes in points]).T
            style = {"linewidth": 2.5, "zorder": 3} if method in ours else {"linewidth": 1.2, "linestyle": "--"}
            ax.plot(x, y, "o", markersize=4, color=colors[method], label=method, **({"linestyle": "-"} | style))
            if method in ours:
                ax.vlines(x[1:], low[1:], high[1:], color=colors[method], linewidth=1)
        for k, (method, outcomes) in enumerate(curves.others.items()):
            x = curves.rises(outcomes).mean()
            inside = x <= 1.25 * widest
            # A rise beyond the curves is written beside the mark, which stays at the edge.
            label = method if inside else f"{method} (rise {x:+.2f}, beyond the picture)"
            ax.plot(x if inside else 1.25 * widest, share(outcomes)[0], "sD"[k % 2], color="black", label=label)
        off, low, high = share(curves.off)
        ax.axhspan(low, high, color="0.92", zorder=0)
        ax.axhline(off, color="0.6", linestyle=":", label="unsteered, with interval")
        ax.set(title=f"Judge: {name}", xlabel="rise in loss on clean text (nats a token)", ylim=(0, None))
    axes[0].set_ylabel("toxic continuations (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
