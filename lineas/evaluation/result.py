"""`Evaluation`: what was measured of maps at several strengths, as tables, pictures and choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .._checks import as_flag, as_positive
from .._lazy import lazy_method
from .._names import hint
from ..maps.records import Record
from .judges import JudgeError, as_judges, score
from .metrics import bootstrap_weights, interval, ratio_interval

if TYPE_CHECKING:
    from ..notebook.plot import evaluation as plot
    from .report import report

UNSTEERED = "unsteered"
"""The method that is the model as it is."""
STATISTICS = ("length", "stopped", "distinct_1", "distinct_2", "distinct_3", "repetition_4")
"""What is known of a continuation beside its text: tokens, whether it ended by itself, and its n-grams."""
FIELDS = ("tokens", "predicted", "loss", "unsteered_loss", "kl", "last_kl", "changed")
"""What is measured of every neutral text.

"tokens", after which the next one is predicted, the last one included; "predicted", those whose next token the text
has; sums of "loss" and "unsteered_loss" over the latter and of "kl" over the former, in nats; "last_kl", after the last
token; "changed", the number of tokens after which another next token is the likeliest.
"""
PRICES = ("kl", "last_kl", "loss_rise", "perplexity_ratio", "changed_top1")
"""What `Evaluation.rows` calls the prices."""
Interval = tuple[float, float, float]
Ratio = tuple[NDArray, NDArray, Callable[[NDArray], NDArray] | None]
_ENDS = ("", "_low", "_high")


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Record):
    """What `lineas.evaluate` measured: U points, each a method at a strength, the unsteered model first.

    Intervals are 95 % percentile bootstraps of 2000 draws over prompts (effects and continuations) or neutral texts
    (prices), with a fixed seed. They say how much the numbers would differ with other prompts of the same kind; the
    maps, fitted once, stay as they are.

    Attributes
    ----------
    methods : tuple of str
        The method of each point; "unsteered" is the model as it is.
    strengths : ndarray
        float64 [U], 0 for "unsteered" and for texts put before the prompts.
    prompts : list
        P texts, conversations or lists of token ids.
    continuations : list of list of list of str
        [U, P, S]: the texts that the model wrote, without the prompts, S for each prompt.
    statistics : ndarray
        float64 [U, P, S, 6]: length in tokens, whether the text ended by itself (1 or 0; NaN where that is not
        known), shares of distinct 1-, 2- and 3-grams, and of 4-grams that occurred before in the text; NaN where a text
        is too short.
    scores : dict of str to ndarray
        float64 [U, P, S] for each judge.
    price : ndarray
        float64 [U, N, 7] for the N neutral texts: see `lineas.evaluation.result.FIELDS`.
    neutral : list
        The neutral texts.
    metadata : dict
        Model, settings, and for each method the metadata of its maps.
    stopped : str
        "finished", or "interrupted" where Ctrl-C ended it: points that were not measured whole are left out.
    """

    FORMAT = "lineas evaluation"

    methods: tuple[str, ...]
    strengths: NDArray
    prompts: list[Any]
    continuations: list[list[list[str]]]
    statistics: NDArray
    scores: dict[str, NDArray]
    price: NDArray
    neutral: list[Any]
    metadata: Any = field(default_factory=dict)
    stopped: str = "finished"

    def __post_init__(self) -> None:
        points, prompts, texts = len(self.methods), len(self.prompts), len(self.neutral)
        samples = self.statistics.shape[2] if self.statistics.ndim == 4 else 0
        expected = {
            "strengths": (self.strengths, (points,)),
            "statistics": (self.statistics, (points, prompts, samples, len(STATISTICS))),
            "price": (self.price, (points, texts, len(FIELDS))),
            **{f"scores[{name!r}]": (one, (points, prompts, samples)) for name, one in self.scores.items()},
        }
        for name, (array, shape) in expected.items():
            if array.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
        if self.methods[:1] != (UNSTEERED,):
            raise ValueError(f"methods must begin with {UNSTEERED!r}, got {self.methods[:1]}")
        if [[len(several) for several in point] for point in self.continuations] != [[samples] * prompts] * points:
            raise ValueError(f"continuations must be {points} lists of {prompts} lists of {samples} texts")
        check_judges(self.scores)

    def __len__(self) -> int:
        return len(self.methods)

    def __repr__(self) -> str:
        judges = f", judges {', '.join(self.scores)}" if self.scores else ""
        ended = "" if self.stopped == "finished" else f", {self.stopped}"
        return (
            f"Evaluation({len(self)} points of {len(dict.fromkeys(self.methods))} methods, "
            f"{len(self.prompts)} prompts, {len(self.neutral)} neutral texts{judges}{ended})"
        )

    # ---- numbers -----------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """One dict a point: "method", "strength", and every number with its interval.

        Returns
        -------
        list of dict
            For each judge its name, the mean score over prompts, with "..._low" and "..._high", and "..._change", the
            mean difference from the unsteered model on the same prompts, with its interval; "kl" and "last_kl", the
            mean Kullback-Leibler divergence of the next token from the unsteered model's, in nats, over all tokens and
            after the last; "loss", in nats a token, and "loss_rise"; "perplexity_ratio"; "changed_top1", the share of
            tokens after which another next token is the likeliest; "distinct_1" to "distinct_3", "repetition_4",
            "length", "stopped": means over continuations. What was not measured is left out.
        """
        found = []
        weights = bootstrap_weights(len(self.prompts)) if self.prompts else None
        texts = bootstrap_weights(len(self.neutral)) if self.neutral else None
        for k, (method, strength) in enumerate(zip(self.methods, self.strengths, strict=True)):
            row: dict[str, Any] = {"method": method, "strength": float(strength)}
            if weights is not None:
                for name, scores in self.scores.items():
                    by_prompt = scores.mean(axis=2)
                    row |= named(name, interval(by_prompt[k], weights))
                    row |= named(f"{name}_change", interval(by_prompt[k] - by_prompt[0], weights))
            if texts is not None:
                row |= self._prices(self.price[k], texts)
            if weights is not None:
                for name, values in zip(STATISTICS, np.moveaxis(self.statistics[k], -1, 0), strict=True):
                    row[name] = float(_mean(_mean(values)))
            found.append(row)
        return found

    def _prices(self, price: NDArray, weights: NDArray) -> dict[str, float]:
        _, predicted, loss, _, _, last_kl, _ = price.T
        found = {"loss": float(loss.sum() / predicted.sum()), **named("last_kl", interval(last_kl, weights))}
        for name, (above, below, transform) in price_ratios(price).items():
            found |= named(name, ratio_interval(above, below, weights, transform=transform))
        return found

    def to_frame(self) -> Any:
        """`rows` as a pandas DataFrame; ImportError where pandas is not installed."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_frame needs pandas: pip install pandas; rows() gives the same as dicts") from error
        return pandas.DataFrame(self.rows())

    def table(self, *, markdown: bool = False) -> str:
        """A text table of the points: effects with intervals, prices, and what became of the continuations.

        Parameters
        ----------
        markdown : bool, default False
            With the bars of a Markdown table.
        """
        markdown = as_flag(markdown, "markdown")
        points = [self._cells(row) for row in self.rows()]
        lines = [[head for head, _ in points[0]], *([cell for _, cell in point] for point in points)]
        if markdown:
            lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
        if not markdown:
            return "\n".join("  ".join(line).rstrip() for line in lines)
        lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _cells(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The cells of a point in `table`, each with the head of its column."""
        found = [("method", row["method"])]
        found += [("strength", f"{row['strength']:.3g}" if row["strength"] else "")]
        found += [(name, _spelled(row, name, "{:.3f}")) for name in self.scores]
        if self.neutral:
            found += [("KL", _spelled(row, "kl", "{:.3f}")), ("loss rise", f"{row['loss_rise']:+.3f}")]
            found += [("perplexity", f"x{row['perplexity_ratio']:.3f}"), ("top-1", f"{row['changed_top1']:.1%}")]
        if self.prompts:
            found += [("distinct-2", f"{row['distinct_2']:.3f}"), ("repeated", f"{row['repetition_4']:.1%}")]
            found += [("tokens", f"{row['length']:.1f}")]
        return found

    def __str__(self) -> str:
        return f"{self!r}\n{self.table()}"

    # ---- choices -----------------------------------------------------------------------------------------------------

    def best(
        self,
        judge: str | None = None,
        *,
        max_kl: float | None = None,
        max_loss_rise: float | None = None,
        max_perplexity_ratio: float | None = None,
        minimize: bool = False,
    ) -> dict[str, Any]:
        """The point with the largest effect within a budget.

        Parameters
        ----------
        judge : str, optional
            The judge whose mean score is the effect. Default: the only one.
        max_kl, max_loss_rise, max_perplexity_ratio : float, optional
            The budget: the most that the mean divergence, the rise of the loss, both in nats a token, or the ratio of
            the perplexities may be on the neutral texts. Several must all hold; none is no budget.
        minimize : bool, default False
            The smallest score is the best, as with a judge of toxicity.

        Returns
        -------
        dict
            The point's row, as of `rows`. That may be the unsteered model's, where nothing within the budget is better.

        Raises
        ------
        ValueError
            If there is no such judge, none is named and there are several, or a budget is given and there are no
            neutral texts.
        """
        rows = self._within(max_kl, max_loss_rise, max_perplexity_ratio)
        judge, sign = self.judge_name(judge), -1 if as_flag(minimize, "minimize") else 1
        return max(rows, key=lambda row: sign * row[judge])

    def front(self, judge: str | None = None, *, price: str = "kl", minimize: bool = False) -> list[dict[str, Any]]:
        """The Pareto front, by rising price: no other point has a larger effect or a lower price, and is no worse else.

        Of points with the same effect and price the first is taken.

        Parameters
        ----------
        judge, minimize
            As of `best`.
        price : {"kl", "last_kl", "loss_rise", "perplexity_ratio", "changed_top1"}, default "kl"
        """
        judge, sign = self.judge_name(judge), -1 if as_flag(minimize, "minimize") else 1
        price = self.price_name(price)
        found: list[dict[str, Any]] = []
        for row in sorted(self.rows(), key=lambda row: (row[price], -sign * row[judge])):
            if not found or sign * row[judge] > sign * found[-1][judge]:
                found.append(row)
        return found

    def _within(self, max_kl: Any, max_loss_rise: Any, max_perplexity_ratio: Any) -> list[dict[str, Any]]:
        budget = read_budget(max_kl, max_loss_rise, max_perplexity_ratio)
        if budget and not self.neutral:
            raise ValueError(f"max_{next(iter(budget))}: there are no neutral texts, so no price was measured")
        return [
            row
            for row in self.rows()
            if all(row[name] <= most for name, most in budget.items()) or row["method"] == UNSTEERED
        ]

    def judge_name(self, judge: str | None = None) -> str:
        """The judge of this name, or the only one; ValueError if there is none, or several and no name."""
        if judge is None:
            if len(self.scores) != 1:
                known = ", ".join(map(repr, self.scores)) or "none"
                raise ValueError(f"judge: say which one, there are {len(self.scores)}: {known}")
            return next(iter(self.scores))
        if judge not in self.scores:
            raise ValueError(f"judge: there is no {judge!r}{hint(str(judge), list(self.scores), 'this evaluation')}")
        return judge

    def price_name(self, price: str) -> str:
        """`price`; ValueError if it is none of `PRICES`, or was not measured."""
        if price not in PRICES:
            raise ValueError(f"price must be one of {', '.join(map(repr, PRICES))}, got {price!r}")
        if not self.neutral:
            raise ValueError(f"price: there are no neutral texts, so {price!r} was not measured")
        return price

    def index(self, method: str = UNSTEERED, strength: float | None = None) -> int:
        """The number of the point of a method at a strength; ValueError if there is none, or several without one."""
        found = [
            k
            for k, (name, s) in enumerate(zip(self.methods, self.strengths, strict=True))
            if name == method and (strength is None or s == strength)
        ]
        if len(found) != 1:
            known = ", ".join(f"{m!r} at {s:g}" for m, s in zip(self.methods, self.strengths, strict=True))
            raise ValueError(
                f"{'no point' if not found else 'several points'} of {method!r}"
                f"{'' if strength is None else f' at {strength:g}'}: there are {known}"
            )
        return found[0]

    def judge(self, judges: Any) -> Evaluation:
        """This evaluation with the scores of more judges of the same continuations.

        Parameters
        ----------
        judges : judge, sequence or mapping
            As of `lineas.evaluate`. One whose name is there already replaces it.

        Raises
        ------
        lineas.judges.JudgeError
            If a judge fails; what the ones before it said is in ``error.evaluation``.
        TypeError, ValueError, ImportError
            As `lineas.evaluate` of its judges; or if nothing was continued.
        """
        named, found = as_judges(judges), self
        check_judges({**self.scores, **named})
        if not self.prompts:
            raise ValueError("judges: there are no continuations to judge, since there were no prompts")
        for name, one in named.items():
            found = found._judged(name, one)
        return found

    def _judged(self, name: str, judge: Callable[..., Any]) -> Evaluation:
        """With the scores of one judge, which gets the texts of all points at once."""
        texts = [text for point in self.continuations for prompt in point for text in prompt]
        prompts = [
            prompt
            for point in self.continuations
            for prompt, several in zip(self.prompts, point, strict=True)
            for _ in several
        ]
        try:
            scores = score(name, judge, texts, prompts)
        except JudgeError as error:
            error.evaluation = self
            error.add_note(
                "what was measured before is in the error's attribute `evaluation`, to be saved or judged anew"
            )
            raise
        return replace(self, scores={**self.scores, name: scores.reshape(self.statistics.shape[:3])})

    if TYPE_CHECKING:
        plot = plot
        report = report
    else:
        plot = lazy_method("notebook.plot", "evaluation")
        report = lazy_method("evaluation.report", "report")


def price_ratios(price: NDArray) -> dict[str, Ratio]:
    """The prices that are ratios of sums over neutral texts, of `FIELDS` [N, 7] of each text.

    Numerators [N], denominators [N], and what the ratio goes through, by the name of the price.
    """
    tokens, predicted, loss, unsteered, kl, _, changed = price.T
    return {
        "kl": (kl, tokens, None),
        "loss_rise": (loss - unsteered, predicted, None),
        "perplexity_ratio": (loss - unsteered, predicted, np.exp),
        "changed_top1": (changed, tokens, None),
    }


def read_budget(max_kl: Any, max_loss_rise: Any, max_perplexity_ratio: Any) -> dict[str, float]:
    """The budgets that are given, by the name of the price; TypeError or ValueError unless they are above 0."""
    given = {"kl": max_kl, "loss_rise": max_loss_rise, "perplexity_ratio": max_perplexity_ratio}
    return {name: as_positive(value, f"max_{name}") for name, value in given.items() if value is not None}


def check_judges(names: Iterable[str]) -> None:
    """ValueError where a judge is called what `Evaluation.rows` calls another number."""
    taken = {"method", "strength", "loss", *STATISTICS, *(name + end for name in PRICES for end in _ENDS)}
    for name in names:
        own = {name + end for end in (*_ENDS, *(f"_change{end}" for end in _ENDS))}
        if own & taken:
            raise ValueError(
                f"judges: {name!r} would name {min(own & taken)!r}, which rows() has already; give it another name, "
                "as in judges={'name': judge}"
            )
        taken |= own


def _mean(values: NDArray) -> NDArray:
    """Means over the last axis of what is known; NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis=-1)
    return np.where(count, np.where(known, values, 0).sum(axis=-1) / np.maximum(count, 1), np.nan)


def named(name: str, found: Interval) -> dict[str, float]:
    """A number and the ends of its interval, as `Evaluation.rows` calls them."""
    return {name + end: value for end, value in zip(_ENDS, found, strict=True)}


def _spelled(row: Mapping[str, float], name: str, pattern: str) -> str:
    middle, low, high = (pattern.format(row[name + end]) for end in _ENDS)
    return f"{middle} [{low}, {high}]"
