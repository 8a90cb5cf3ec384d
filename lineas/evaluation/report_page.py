"""What `report` says of an evaluation: its numbers as text, the best points, and warnings. No markup."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .metrics import bootstrap_weights, interval
from .report_facts import origin
from .report_figure import figure
from .report_words import (
    KL,
    LONGEST_PROMPT,
    PERCENT,
    POINTS,
    Cell,
    Column,
    Interval,
    Style,
    by_size,
    compact,
    counted,
    cut,
    is_number,
    listed,
    named,
    spelled,
)
from .result import STATISTICS, UNSTEERED, Evaluation, _mean

BUDGETS = (0.02, 0.05, 0.1, 0.2)
"""Budgets of KL divergence, in nats, for each of which the page names the best point."""
LEAST_REPEATED, LEAST_DISTINCT, LEAST_SHORTER, LEAST_UNSTOPPED = 0.05, 0.05, 0.5, 0.25
"""The differences to the unsteered model from which on the page warns of continuations: see `_RULES`."""


class _Effect(NamedTuple):
    """A judge: means over prompts and mean changes from the unsteered model, with intervals, for each point."""

    name: str
    minimized: bool
    means: list[Interval]
    changes: list[Interval]

    @property
    def style(self) -> Style:
        return by_size([end for found in self.means for end in found])

    @property
    def change_style(self) -> Style:
        return self.style._replace(pattern=f"+{self.style.pattern}")


class Page:
    """What the page says, as text and numbers; the template puts it in order."""

    def __init__(self, evaluation: Evaluation, judge: str | None, minimized: set[str]) -> None:
        self.evaluation, self.rows = evaluation, evaluation.rows()
        self.metadata: dict[str, Any] = evaluation.metadata if isinstance(evaluation.metadata, dict) else {}
        self.model = named(self.metadata.get("model"))
        self.methods = list(dict.fromkeys(evaluation.methods[1:]))
        self.names = [
            method if method == UNSTEERED or not strength else f"{method} at strength {strength:.4g}"
            for method, strength in zip(evaluation.methods, evaluation.strengths, strict=True)
        ]
        self.weights = bootstrap_weights(len(evaluation.prompts)) if evaluation.prompts else None
        points = range(len(self.rows))
        self.effects = [
            _Effect(
                name, name in minimized, *([self._number(k, one) for k in points] for one in (name, f"{name}_change"))
            )
            for name in evaluation.scores
        ]
        self.judge = judge or (self.effects[0].name if self.effects else None)
        self.warnings = self._warnings()
        self.marked = self._marked()

    def _mean(self, by_prompt: NDArray) -> Interval:
        assert self.weights is not None
        return interval(by_prompt, self.weights)

    def _number(self, point: int, name: str) -> Interval:
        row = self.rows[point]
        return row[name], row[f"{name}_low"], row[f"{name}_high"]

    # ---- beginning -----------------------------------------------------------------------------------------------

    @property
    def lead(self) -> str:
        """What was evaluated, in one sentence."""
        here, points = self.evaluation, len(self.evaluation) - 1
        model = f"The model {self.model}" if self.model else "A model"
        what = f"{model} was evaluated as it is"
        if points:
            what += f" and at {counted(points, 'point')} of {counted(len(self.methods), 'method')}"
            what += f" ({listed([*self.methods[:8], *(['others'] if len(self.methods) > 8 else [])])})"
        on = []
        if here.prompts:
            each = counted(here.statistics.shape[2], "continuation")
            on.append(f"on {counted(len(here.prompts), 'prompt')}, with {each} of each at every point")
        if here.neutral:
            tokens = counted(int(here.price[0, :, 0].sum()), "token")
            on.append(f"on {counted(len(here.neutral), 'neutral text')} of {tokens} together")
        return f"{', '.join(filter(None, (what, ', and '.join(on))))}."

    @property
    def intervals(self) -> str:
        """What the intervals are."""
        over = [
            *(["prompts, for effects and continuations"] if self.evaluation.prompts else []),
            *(["neutral texts, for prices"] if self.evaluation.neutral else []),
        ]
        if not over:
            return ""
        return (
            f"Numbers in brackets are 95 % intervals by bootstrap over {', and over '.join(over)}. They say how much "
            "the numbers would differ with others of the same kind; the maps stay as they are."
        )

    def facts(self) -> list[tuple[str, str]]:
        """Settings of the evaluation."""
        here = self.evaluation
        found = [("Model", self.model or "not known")]
        if here.prompts:
            longest = self.metadata.get("max_new_tokens")
            each = counted(here.statistics.shape[2], "continuation")
            limit = f" of at most {counted(int(longest), 'token')}" if is_number(longest) else ""
            found.append(("Prompts", f"{len(here.prompts):,}, {each} of each{limit}"))
            if "sampling" in self.metadata:
                sampling = self.metadata["sampling"]
                found.append(("Sampling", "by a function of the caller" if sampling is None else spelled(sampling)))
        else:
            found.append(("Prompts", "none, so no effect was measured"))
        if here.neutral:
            loss = self.rows[0]["loss"]
            tokens = counted(int(here.price[0, :, 0].sum()), "token")
            unsteered = f"; the unsteered model's loss on them is {loss:.3f} nats a token" if loss == loss else ""
            found.append(("Neutral texts", f"{len(here.neutral):,}, {tokens}{unsteered}"))
        else:
            found.append(("Neutral texts", "none, so no price was measured"))
        found.append(("Judges", ", ".join(here.scores) or "none"))
        if is_number(self.metadata.get("seed")):
            found.append(("Seed", str(self.metadata["seed"])))
        return found

    def origins(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Where each method comes from: what its maps' metadata say, in short."""
        methods, support, instructions = (
            value if isinstance(value := self.metadata.get(name), dict) else {}
            for name in ("methods", "support", "instructions")
        )
        found = []
        for name in self.methods:
            if name in instructions:
                facts = [("Text before every prompt", cut(str(instructions[name]), LONGEST_PROMPT))]
            else:
                facts = origin(methods.get(name), support.get(name))
            found.append((name, facts))
        return found

    # ---- effect and price ----------------------------------------------------------------------------------------

    def judges(self) -> list[dict[str, Any]]:
        """A curve and the best points in words for each judge."""
        found = []
        for k, effect in enumerate(self.effects):
            drawn = self.evaluation.neutral and len(self.evaluation) > 1
            style = effect.style
            ends = [self._alternative(method, effect) for method in self.methods[:8]] if drawn else []
            more = f" The table has {len(self.methods) - 8} methods more." if len(self.methods) > 8 else ""
            alternative = (
                f"Mean score by {effect.name} against the KL divergence of the next token on neutral texts, one curve "
                f"a method. The unsteered model has {style.write(effect.means[0][0])}. {' '.join(ends)}{more}"
            )
            found.append(
                {
                    "name": effect.name,
                    "minimized": effect.minimized,
                    "figure": figure(self.evaluation, effect.name, f"c{k}", alternative) if drawn else None,
                    "best": self._best(effect) if len(self.evaluation) > 1 else [],
                }
            )
        return found

    def _alternative(self, method: str, effect: _Effect) -> str:
        """One curve of a picture in words."""
        points = [k for k, name in enumerate(self.evaluation.methods) if name == method]
        last = max(points, key=lambda k: abs(self.evaluation.strengths[k]))
        value, price = effect.style.write(effect.means[last][0]), KL.write(self._number(last, "kl")[0])
        return f"{self.names[last]} has {value} at {price} nats."

    def _winner(self, effect: _Effect, budget: float | None) -> int:
        """The best point within a budget, the first of equals; the unsteered model costs nothing."""
        within = [k for k in range(len(self.rows)) if not k or budget is None or self._number(k, "kl")[0] <= budget]
        sign = -1 if effect.minimized else 1
        return max(within, key=lambda k: sign * effect.means[k][0])

    def _best(self, effect: _Effect) -> list[tuple[str, str]]:
        """The best points within budgets: the budgets, and a sentence."""
        if not self.evaluation.neutral:
            return [("At any price, which was not measured", self._praise(effect, self._winner(effect, None)))]
        found = []
        for winner, several in groupby(BUDGETS, key=lambda budget: self._winner(effect, budget)):
            budgets = listed([f"{budget:g}" for budget in several], "or")
            found.append((f"KL of at most {budgets} nats", self._praise(effect, winner)))
        return found

    def _praise(self, effect: _Effect, point: int) -> str:
        mean = effect.style.both(effect.means[point])
        if not point:
            return f"no point is better than the unsteered model, which has {mean}."
        change = effect.changes[point]
        said = f"{self.names[point]}, mean score {mean}, {effect.change_style.both(change)} from the unsteered model"
        if self.evaluation.neutral:
            said += f", at a KL of {KL.both(self._number(point, 'kl'))}"
        said += "."
        if change[1] <= 0 <= change[2]:
            said += " The interval of the change includes 0: it may be chance."
        if point in self.warnings:
            said += " Its continuations degenerate, see below."
        return said

    def _marked(self) -> dict[int, str]:
        """The points that are the best by `judge` within budgets, and what to write beside them."""
        effect = next((one for one in self.effects if one.name == self.judge), None)
        if effect is None or len(self.evaluation) < 2:
            return {}
        if not self.evaluation.neutral:
            winner = self._winner(effect, None)
            return {winner: "best"} if winner else {}
        found: dict[int, list[str]] = {}
        for budget in BUDGETS:
            found.setdefault(self._winner(effect, budget), []).append(f"{budget:g}")
        return {k: f"best for KL ≤ {', '.join(budgets)}" for k, budgets in found.items() if k}

    def effect_columns(self) -> list[Column]:
        """The table of effects and prices."""
        found = []
        for effect in self.effects:
            meaning = f"mean score by {effect.name} over prompts"
            found.append(Column(effect.name, meaning, [effect.style.cell(one) for one in effect.means]))
            meaning = "mean difference from the unsteered model on the same prompts"
            cells = [effect.change_style.cell(one) for one in effect.changes]
            found.append(Column(f"{effect.name}, change", meaning, _without_first(cells)))
        if self.evaluation.neutral:
            for name, head, meaning, style in _PRICES:
                cells = [style.cell(self._number(k, name)) for k in range(len(self.rows))]
                found.append(Column(head, meaning, _without_first(cells)))
        return found

    # ---- continuations -------------------------------------------------------------------------------------------

    def text_columns(self) -> list[Column]:
        """The table of what became of the continuations; statistics of which nothing is known are left out."""
        if not self.evaluation.prompts:
            return []
        found = []
        for name, head, meaning, style in _TEXTS:
            values = self.evaluation.statistics[..., STATISTICS.index(name)]
            if np.isfinite(values).any():
                found.append(Column(head, meaning, [style.cell(self._mean(_mean(one))) for one in values]))
        return found

    def _warnings(self) -> dict[int, list[str]]:
        """Points at which continuations degenerate, each with what happens in words."""
        found: dict[int, list[str]] = {}
        if not self.evaluation.prompts:
            return found
        for k in range(1, len(self.evaluation)):
            said = []
            for name, broken, words, style, difference_style in _RULES:
                values = self.evaluation.statistics[..., STATISTICS.index(name)]
                before, after = _mean(values[0]), _mean(values[k])
                known = np.isfinite(after - before)
                if not known.any():
                    continue
                means = float(after[known].mean()), float(before[known].mean())
                if broken(means[0] - means[1], means[1]):
                    difference = self._mean(after - before)
                    if not difference[1] <= 0 <= difference[2]:
                        numbers = f"{style.write(means[0])} against {style.write(means[1])}"
                        unit = " percentage points" if difference_style is POINTS else ""
                        said.append(f"{words}: {numbers}, a difference of {difference_style.both(difference)}{unit}")
            if said:
                found[k] = said
        return found

    rules = (
        f"A point is named where, against the unsteered model on the same prompts, the share of repeated 4-grams rises "
        f"by {LEAST_REPEATED * 100:g} percentage points or more, distinct-2 falls by {LEAST_DISTINCT:g} or more, "
        f"continuations have on average less than {(1 - LEAST_SHORTER) * 100:g} % of the tokens, or the share that "
        f"ends by itself falls by {LEAST_UNSTOPPED * 100:g} percentage points or more, and the 95 % interval of the "
        "difference does not include 0. These limits are conventions: what is not named may be bad text still."
    )

    # ---- texts ---------------------------------------------------------------------------------------------------

    def texts(self, samples: int) -> list[dict[str, Any]]:
        """Some prompts, each with the first continuation of every point."""
        count = min(samples, len(self.evaluation.prompts))
        chosen = np.linspace(0, len(self.evaluation.prompts) - 1, count).round().astype(int).tolist()
        found = []
        for prompt in chosen:
            texts = [point[prompt][0].strip() for point in self.evaluation.continuations]
            said = [
                {"same": same, "kept": text[:same], "other": text[same:], "equal": text == texts[0]}
                for text, same in ((text, _shared(texts[0], text) if k else len(text)) for k, text in enumerate(texts))
            ]
            for k, one in enumerate(said):
                one["scores"] = [
                    (effect.name, effect.style.write(float(self.evaluation.scores[effect.name][k, prompt, 0])))
                    for effect in self.effects
                ]
            found.append({"number": prompt + 1, "turns": _turns(self.evaluation.prompts[prompt]), "said": said})
        return found

    @property
    def chosen(self) -> int:
        """The point whose texts are shown first: the best for a middling budget, or else the strongest of the first."""
        for effect in self.effects:
            if effect.name == self.judge:
                winner = self._winner(effect, 0.1 if self.evaluation.neutral else None)
                if winner:
                    return winner
        return len(self.evaluation.methods) - 1 - self.evaluation.methods[::-1].index(self.evaluation.methods[1])

    def groups(self) -> list[tuple[str, list[tuple[int, str]]]]:
        """The points by method, for the picker."""
        points = list(enumerate(self.evaluation.methods))[1:]
        return [(method, [(k, self.names[k]) for k, name in points if name == method]) for method in self.methods]


_PRICES: tuple[tuple[str, str, str, Style], ...] = (
    ("kl", "KL", "mean KL divergence of the next token from the unsteered model's on neutral texts, in nats", KL),
    ("last_kl", "KL at the end", "the same after the last token of each neutral text alone", KL),
    ("loss_rise", "loss rise", "rise of the loss on neutral texts, in nats a token", Style("+.3f")),
    (
        "perplexity_ratio",
        "perplexity",
        "perplexity on neutral texts, as a multiple of the unsteered model's",
        Style(".3f", before="×"),
    ),
    ("changed_top1", "top-1", "share of neutral tokens after which another next token is the likeliest", PERCENT),
)
_TEXTS: tuple[tuple[str, str, str, Style], ...] = (
    ("distinct_1", "distinct-1", "share of different tokens among all of a continuation", Style(".3f")),
    ("distinct_2", "distinct-2", "share of different pairs of tokens", Style(".3f")),
    ("distinct_3", "distinct-3", "share of different triples of tokens", Style(".3f")),
    ("repetition_4", "repeated", "share of 4-grams that occurred before in the same continuation", PERCENT),
    ("length", "tokens", "length of a continuation in tokens", Style(".1f")),
    ("stopped", "ends itself", "share of continuations that end by themselves, not at the limit", PERCENT),
)
_RULES: tuple[tuple[str, Callable[[float, float], bool], str, Style, Style], ...] = (
    ("repetition_4", lambda d, _: d >= LEAST_REPEATED, "repeats itself (share of repeated 4-grams)", PERCENT, POINTS),
    ("distinct_2", lambda d, _: d <= -LEAST_DISTINCT, "varies less (distinct-2)", Style(".3f"), Style("+.3f")),
    ("length", lambda d, before: d < -LEAST_SHORTER * before, "breaks off (tokens)", Style(".1f"), Style("+.1f")),
    ("stopped", lambda d, _: d <= -LEAST_UNSTOPPED, "finds no end (share that ends by itself)", PERCENT, POINTS),
)


def _shared(first: str, second: str) -> int:
    """How many characters two texts begin with in common, whole words of them."""
    pairs = enumerate(zip(first, second, strict=False))
    same = next((k for k, (a, b) in pairs if a != b), min(len(first), len(second)))
    while _in_a_word(first, same) or _in_a_word(second, same):
        same -= 1
    return same


def _in_a_word(text: str, at: int) -> bool:
    """Whether two letters or digits meet there, of a script that has spaces between its words."""
    return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum() and text[at] < "\u2e80"


def _without_first(cells: list[Cell]) -> list[Cell]:
    """Cells of which the first, of the unsteered model against itself, says nothing."""
    return [cells[0]._replace(text="–", span=""), *cells[1:]]


def _turns(prompt: Any) -> list[tuple[str, str]]:
    """A prompt as texts, each with who says it; "" for a text alone."""
    if isinstance(prompt, str):
        return [("", cut(prompt, LONGEST_PROMPT))]
    if isinstance(prompt, list | tuple) and prompt and all(isinstance(turn, Mapping) for turn in prompt):
        turns = []
        for turn in prompt:
            content = turn.get("content", "")
            text = content if isinstance(content, str) else compact(content)
            turns.append((str(turn.get("role", "")), cut(text, LONGEST_PROMPT)))
        return turns
    if isinstance(prompt, Sequence | np.ndarray):
        return [("token ids", cut(" ".join(map(str, prompt)), LONGEST_PROMPT))]
    return [("", cut(str(prompt), LONGEST_PROMPT))]
