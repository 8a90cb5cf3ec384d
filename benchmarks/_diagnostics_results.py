"""Tables of the study of diagnostics: what each number of a diagnosis says of the effect and of the price."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lineas.evaluation import diagnose
from lineas.evaluation.metrics import bootstrap_weights, interval

KLS = (diagnose.KL_SHOWS, diagnose.KL_BREAKS)


@dataclass(frozen=True)
class Row:
    """One fit: what was diagnosed, and what it did."""

    concept: str
    label: str
    support: float
    fit_closing: float
    """The share that the fit took off the loss of its own prompts."""
    diagnosis: dict[str, Any]
    gains: NDArray
    """What the maps at strength 1 add to the score of each continuation."""
    strengths: tuple[float, ...]
    price: dict[str, NDArray]
    """The divergence "kl" and the numbers of the damage, at each strength."""

    @property
    def effect(self) -> float:
        return float(self.gains.mean())

    @property
    def kl(self) -> float:
        return float(self.price["kl"][self.strengths.index(1.0)])

    def check(self, name: str) -> dict[str, Any]:
        return next(check for check in self.diagnosis["checks"] if check["name"] == name)

    def value(self, name: str) -> float:
        value = self.check(name)["value"]
        return np.nan if value is None else float(value)

    def mean(self, detail: str) -> float:
        """The mean over modules of a detail."""
        values = np.array(self.diagnosis["modules"][detail], dtype=np.float64)
        return float(np.nanmean(values)) if np.isfinite(values).any() else np.nan


NUMBERS: dict[str, Callable[[Row], float]] = {
    "share of the gap closed": lambda row: row.value(diagnose.W2),
    "what is closed, in variances": lambda row: row.mean("unsteered") - row.mean("steered"),
    "share that the fit took off its own loss": lambda row: row.fit_closing,
    "separability, median module": lambda row: row.value(diagnose.SEPARABILITY),
    "separability, best module": lambda row: float(np.max(row.diagnosis["modules"]["auc"])),
    "stability of the support": lambda row: row.value(diagnose.STABILITY),
    "damage": lambda row: row.value(diagnose.DAMAGE),
    "change": lambda row: row.value(diagnose.CHANGE),
    "damage, own maps alone": lambda row: row.mean("own_damage"),
    "change, own maps alone": lambda row: row.mean("own_change"),
}
OUTCOMES: dict[str, Callable[[Row], float]] = {"effect": lambda row: row.effect, "price": lambda row: row.kl}


def spearman(x: NDArray, y: NDArray) -> tuple[float, float, float]:
    """Spearman's correlation and its 95 % interval by Fisher's z with the error of Bonett and Wright (2000)."""
    if len(x) < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan, np.nan, np.nan
    rho = float(stats.spearmanr(x, y).statistic)
    error = np.sqrt((1 + rho**2 / 2) / (len(x) - 3)) * stats.norm.isf(0.025)
    z = np.arctanh(np.clip(rho, -0.9999, 0.9999))
    return rho, float(np.tanh(z - error)), float(np.tanh(z + error))


def _spell(found: tuple[float, float, float]) -> str:
    return "" if np.isnan(found[0]) else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*found)


class Rows:
    """The fits, and what follows from them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.concepts = list(dict.fromkeys(row.concept for row in rows))

    def of(self, concept: str) -> list[Row]:
        return [row for row in self.rows if row.concept == concept]

    def report(self) -> list[list[str]]:
        return [self.fits(), self.correlations(), self.verdicts(), self.thresholds(), self.reading()]

    def fits(self) -> list[str]:
        lines = [
            "| concept | fit | neurons changed | share of the gap closed | separability | stability | damage | change "
            "| effect | price, nats |",
            "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | --- | ---: |",
        ]
        for row in self.rows:
            share = row.check(diagnose.W2)
            closed = share["verdict"] if share["value"] is None else f"{share['value']:.2f}, {share['verdict']}"
            _, low, high = interval(row.gains, bootstrap_weights(len(row.gains)))
            values = [row.value(name) for name in (diagnose.SEPARABILITY, diagnose.STABILITY)]
            cells = ["" if np.isnan(value) else f"{value:.2f}" for value in values]
            cells += [f"{row.value(name):.3g}" for name in (diagnose.DAMAGE, diagnose.CHANGE)]
            lines.append(
                f"| {row.concept} | {row.label} | {row.support:.0%} | {closed} | {' | '.join(cells)} | "
                f"{row.effect:+.3f} [{low:+.3f}, {high:+.3f}] | {row.kl:.3f} |"
            )
        return lines

    def correlation(self, number: str, outcome: str, concept: str | None) -> tuple[float, float, float]:
        """Spearman's of a number with an outcome, over the fits that have it.

        Pooled, where `concept` is None, numbers are ranked within each concept, since these have other scales.
        """
        ranks: list[tuple[NDArray, NDArray]] = []
        for one in self.concepts if concept is None else [concept]:
            pairs = np.array([(NUMBERS[number](row), OUTCOMES[outcome](row)) for row in self.of(one)]).reshape(-1, 2)
            pairs = pairs[np.isfinite(pairs).all(axis=1)]
            ranks.append(tuple(stats.rankdata(side) / (len(side) + 1) for side in pairs.T))  # type: ignore[arg-type]
        x, y = (np.concatenate(side) for side in zip(*ranks, strict=True))
        return spearman(x, y)

    def correlations(self) -> list[str]:
        columns = [(outcome, concept) for outcome in OUTCOMES for concept in (*self.concepts, None)]
        heads = [f"{outcome}, {concept or 'pooled'}" for outcome, concept in columns]
        lines = [f"| number | fits | {' | '.join(heads)} |", f"| --- | ---: |{' --- |' * len(heads)}"]
        for number, value in NUMBERS.items():
            count = sum(bool(np.isfinite(value(row))) for row in self.rows)
            cells = [_spell(self.correlation(number, *column)) for column in columns]
            lines.append(f"| {number} | {count} | {' | '.join(cells)} |")
        return lines

    def verdicts(self) -> list[str]:
        """What the fits of each verdict did."""
        lines = ["| check | verdict | fits | mean effect on sentiment | on toxicity | mean price, nats |"]
        lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
        for name in (diagnose.W2, diagnose.SEPARABILITY, diagnose.STABILITY, diagnose.DAMAGE, diagnose.CHANGE):
            groups: dict[str, list[Row]] = {}
            for row in self.rows:
                groups.setdefault(row.check(name)["verdict"], []).append(row)
            for verdict, rows in sorted(groups.items(), key=lambda group: -len(group[1])):
                effects = [[row.effect for row in rows if row.concept == concept] for concept in self.concepts]
                cells = [f"{np.mean(one):+.3f} ({len(one)})" if one else "" for one in effects]
                price = np.mean([row.kl for row in rows])
                lines.append(f"| {name} | {verdict} | {len(rows)} | {' | '.join(cells)} | {price:.3f} |")
        return lines

    def _scale(self, number: str, rows: Sequence[Row]) -> tuple[float, float, float]:
        """Intercept, slope and residual of log KL over the log of a number, over all strengths."""
        x = np.log(np.concatenate([row.price[number] for row in rows]))
        y = np.log(np.concatenate([row.price["kl"] for row in rows]))
        kept = np.isfinite(x) & np.isfinite(y)
        line = stats.linregress(x[kept], y[kept])
        rest = y[kept] - line.intercept - line.slope * x[kept]
        return float(line.intercept), float(line.slope), float(rest.std(ddof=2))

    def thresholds(self) -> list[str]:
        """Where the price reaches the two amounts, by a line through the logarithms at all fits and strengths."""
        lines = [
            f"| number | price {KLS[0]:g} nats | price {KLS[1]:g} nats | in use | slope | price foretold to a factor "
            "| of the other concept |",
            "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
        ]
        for number in ("damage", "change", "own_damage", "own_change"):
            intercept, slope, rest = self._scale(number, self.rows)
            crossings = [float(np.exp((np.log(kl) - intercept) / slope)) for kl in KLS]
            used = " and ".join(f"{value:g}" for value in diagnose.THRESHOLDS.get(number, ()))
            lines.append(
                f"| {number.replace('own_', 'own maps alone, ')} | {crossings[0]:.3g} | {crossings[1]:.3g} | {used} | "
                f"{slope:.2f} | {np.exp(1.96 * rest):.1f} | {self._across(number)} |"
            )
        return lines

    def _across(self, number: str) -> str:
        """How far off the price of one concept is, foretold by the line of the other: 95 % of cases, and the mean."""
        if len(self.concepts) < 2:
            return ""
        off = []
        for concept in self.concepts:
            intercept, slope, _ = self._scale(number, [row for row in self.rows if row.concept != concept])
            for row in self.of(concept):
                off += list(np.log(row.price["kl"]) - intercept - slope * np.log(row.price[number]))
        finite = np.array(off)[np.isfinite(off)]
        return f"{np.exp(np.quantile(np.abs(finite), 0.95)):.1f}"

    def reliability(self, concept: str) -> float:
        """Spearman's between the effects by odd and by even continuations, stepped up to all (Spearman and Brown)."""
        rows = self.of(concept)
        if len(rows) < 3:
            return np.nan
        halves = [[row.gains[start::2].mean() for row in rows] for start in (0, 1)]
        rho = float(stats.spearmanr(*halves).statistic)
        return 2 * rho / (1 + rho) if rho > 0 else 0.0

    def reading(self) -> list[str]:
        """What the tables say, in sentences that follow from their numbers."""
        lines = []
        for concept in self.concepts:
            found = self.reliability(concept)
            ceiling = "" if np.isnan(found) else f": no number can be expected to correlate above {np.sqrt(found):.2f}"
            lines.append(f"- The effect on {concept} is measured with a reliability of {found:.2f}{ceiling}.")
        for outcome in OUTCOMES:
            found = {number: self.correlation(number, outcome, None) for number in NUMBERS}
            sure = [f"{number} ({rho:+.2f})" for number, (rho, low, high) in found.items() if low > 0 or high < 0]
            unsure = [number for number, (rho, low, high) in found.items() if low <= 0 <= high]
            lines.append(
                f"- Pooled, these rank the {outcome}, with an interval that leaves out 0: {', '.join(sure) or 'none'}. "
                f"These do not: {', '.join(unsure) or 'none'}."
            )
        cost = [row.diagnosis["seconds"] for row in self.rows]
        spelled = ", ".join(f"{name} {np.median([one[name] for one in cost]):.1f}" for name in cost[0])
        lines.append(f"- Seconds of a diagnosis, medians: {spelled}.")
        return lines
