"""The strength for a budget: the largest that neutral texts allow, or the smallest that has an effect."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from .._checks import as_finite, as_flag, as_positive
from .._warn import warn
from ..fitting.checkpoint import digest
from ..hooks.modules import check_runs, model_name
from ..hooks.settings import as_tokenizer, optional
from ..inputs.frozen import frozen
from ..maps.gates import gates_of
from ..maps.metadata import Selection, check_tokens, spell_tokens
from ..maps.steering import SteeringMaps
from .continuations import GenerationSettings, Generator, try_judges
from .judges import as_judges, score
from .metrics import bootstrap_weights, interval, ratio_interval
from .neutral import Neutral
from .points import Point, make_points
from .result import FIELDS, UNSTEERED, check_judges, named, price_ratios, read_budget

_FIRST, _FIRST_EFFECT = 1 / 16, 1 / 4  # the first strength that is tried; then each time twice as much
_LARGEST = 64.0
_WIDTH = 0.01  # a bracket is narrow enough at this share of its upper end, and a tenth of it,
_CLOSE = 0.02  # where the price at its lower end is further below the budget than this share of it


@dataclass(frozen=True, eq=False)
class Calibration:
    """A strength that was found, and how sure it is.

    Attributes
    ----------
    maps : SteeringMaps
        The same maps, whose metadata say what was found under "calibration", and the `tokens` that it was found for,
        where these were given: ``attach(model, strength="calibrated")`` takes both.
    strength : float
        The recommended strength.
    range : (float, float)
        95 % interval: what other neutral texts, or prompts, of the same kind would have given.
    budget : dict of str to float
        What was asked for, such as ``{"max_kl": 0.1}``.
    measured : dict of str to float
        The price on the half of the neutral texts that the strength was not chosen by, with "..._low" and "..._high",
        a 95 % interval; or the effect.
    tried : dict of str to ndarray
        "strength" [K], in the order of size, and what was measured there: "price" or "effect" [K].
    """

    maps: SteeringMaps
    strength: float
    range: tuple[float, float]
    budget: dict[str, float]
    measured: dict[str, float]
    tried: dict[str, NDArray]

    def __repr__(self) -> str:
        asked = ", ".join(f"{name}={value:g}" for name, value in self.budget.items())
        seen = ", ".join(f"{name} {value:.4g}" for name, value in self.measured.items())
        low, high = self.range
        return f"Calibration(strength={self.strength:.4g} [{low:.4g}, {high:.4g}] for {asked}; measured: {seen})"


def calibrate(
    maps: SteeringMaps,
    model: nn.Module,
    *,
    neutral: Any = None,
    max_kl: float | None = None,
    max_loss_rise: float | None = None,
    max_perplexity_ratio: float | None = None,
    prompts: Any = None,
    judge: Any = None,
    effect: float | None = None,
    tokenizer: Any = None,
    tokens: Selection | None = None,
    confidence: float = 0.95,
    max_strength: float = _LARGEST,
    max_length: int | None = None,
    samples: int = 1,
    max_new_tokens: int = 20,
    batch_size: int = 32,
    sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Find the largest strength within a budget, or the smallest that has an effect.

    For a budget, bisection finds the strength on every other neutral text; what it costs is then measured on the texts
    between, which the strength was not chosen by. To hold on texts that nobody has seen, the mean price of the first
    half, and with it the strength, leaves room for chance: not the mean itself but the upper end of its one-sided
    `confidence` interval (by bootstrap over texts) is within the budget. All smaller strengths that were tried are
    within the budget, too.

    For an effect, bisection over sampled continuations with the same random numbers finds the smallest strength at
    which the mean score reaches `effect`, from the side of the unsteered model's. With a budget as well, that strength
    must be within it.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded language model with modules of these names, and with nothing else that is to count as steering.
    neutral : list of texts, conversations or token ids, optional
        What the maps should leave alone; at least 4, better 32 and more, of which each half is used.
    max_kl, max_loss_rise, max_perplexity_ratio : float, optional
        The budget, one of them: the mean Kullback-Leibler divergence of the next token from the unsteered model's, or
        the rise of the loss, both in nats a token; or the ratio of the perplexities, above 1.
    prompts : list of texts, conversations or token ids, optional
        What is continued, for an effect.
    judge : callable or str, optional
        What scores continuations: as one of the judges of `lineas.evaluate`.
    effect : float, optional
        The mean score to reach.
    tokenizer : transformers tokenizer, optional
        For texts and conversations.
    tokens : "all", "last", "prompt", "generated", slice or callable, optional
        The tokens that the maps act on. Default: those that they were fitted for.
    confidence : float, default 0.95
        From 0.5, at which the mean itself is held against the budget, to below 1.
    max_strength : float, default 64
        The largest strength that is tried.
    max_length : int, optional
        Longest prompt or neutral text in tokens; longer ones are cut. Default: no limit.
    samples, max_new_tokens, batch_size, sampling, seed
        As of `lineas.evaluate`, for an effect.
    progress : bool, default True
        Show a progress bar.

    Returns
    -------
    Calibration

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong type or out of range, not exactly one budget or an effect is asked for, the maps
        change nothing on the neutral texts, the budget is not held even at the smallest strength tried, or the effect
        is not reached at `max_strength` or not within the budget.
    lineas.judges.JudgeError
        If the judge fails.

    Warns
    -----
    UserWarning
        If `max_strength` is within the budget still: it is the strength then.
    """
    check_runs(model)
    optional(as_tokenizer, tokenizer, "tokenizer")
    budget = read_budget(max_kl, max_loss_rise, max_perplexity_ratio)
    if len(budget) > 1 or (not budget and effect is None):
        raise ValueError(
            "give one of max_kl=, max_loss_rise= and max_perplexity_ratio=, or effect=, got "
            f"{', '.join(f'max_{name}' for name in budget) or 'none of them'}"
        )
    if budget.get("perplexity_ratio", 2.0) <= 1:
        raise ValueError(f"max_perplexity_ratio must be above 1, got {budget['perplexity_ratio']:g}")
    if bool(budget) != (neutral is not None):
        raise ValueError("neutral: a budget is for neutral texts: give both or neither")
    needed = {"effect": effect, "prompts": prompts, "judge": judge}
    missing = [name for name, value in needed.items() if value is None]
    if missing and len(missing) < 3:
        raise ValueError(f"effect, prompts and judge belong together, {' and '.join(missing)} missing")
    confidence = as_finite(confidence, "confidence")
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must be from 0.5 to below 1, got {confidence:g}")
    max_strength, progress = as_positive(max_strength, "max_strength"), as_flag(progress, "progress")
    settings = GenerationSettings(
        samples=samples,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        sampling=sampling,
        seed=seed,
    )
    metadata = maps.metadata
    if tokens is not None:  # what the strength is for
        metadata["tokens"] = spell_tokens(check_tokens(tokens))
    chosen = make_points(model, {"maps": maps}, {"maps": [1.0]}, tokens)[0].tokens

    def point(strength: float) -> Point:
        return Point("maps", strength, maps, chosen)

    facts: dict[str, Any] = {"model": model_name(model), "tokens": spell_tokens(chosen), "confidence": confidence}
    texts = generator = None
    if budget:
        texts = Neutral(model, neutral, tokenizer=tokenizer, max_length=settings.max_length)
        if len(texts) < 4:
            raise ValueError(f"neutral must hold at least 4 texts, of which each half is used, got {len(texts)}")
        facts["neutral"] = {"texts": len(texts), "sha256": digest(texts.texts.contents())}
    if effect is not None:
        effect = as_finite(effect, "effect")
        generator = Generator(model, prompts, tokenizer, settings)
        facts["prompts"] = {"texts": len(generator.prompts), "sha256": digest(generator.contents())}
        judges = as_judges(judge)
        check_judges(judges)
        if len(judges) > 1:
            raise ValueError(f"judge must be one, got {len(judges)}: {', '.join(judges)}")
        try_judges(judges, generator.prompts)

    with frozen(model, gradients=False), tqdm(desc="calibrate", unit="pass", disable=not progress) as bar:
        asked = {f"max_{name}": most for name, most in budget.items()}
        measured: dict[str, float] = {}
        if texts is not None:
            ((name, most),) = budget.items()
            price = _Price(texts, point, name, confidence, bar.update)
            found = price.calibrate(most, max_strength)
        if generator is not None and effect is not None:
            asked["effect"] = effect
            limit = max_strength if texts is None else found.strength
            within = "up to max_strength" if texts is None else "within the budget"
            found = _Effect(generator, point, judges, bar.update).calibrate(effect, limit, within)
        if texts is not None:
            measured = price.held_out(found.strength)
        measured |= found.measured
    record = {
        "strength": found.strength,
        "range": list(found.range),
        "budget": asked,
        "measured": measured,
        **facts,
    }
    noted = SteeringMaps(maps, {**metadata, "calibration": record}, gates_of(maps))
    return Calibration(noted, found.strength, found.range, asked, measured, found.tried)


class _Found(NamedTuple):
    strength: float
    range: tuple[float, float]
    tried: dict[str, NDArray]
    measured: dict[str, float]


class _Price:
    """The price on two halves of the neutral texts, by strength; a pass of the unsteered model serves several."""

    def __init__(
        self,
        texts: Neutral,
        point: Callable[[float], Point],
        name: str,
        confidence: float,
        done: Callable[[], Any],
    ) -> None:
        self.first, self.second = texts.half(False), texts.half(True)
        self.point, self.name, self.confidence, self.done = point, name, confidence, done
        self.weights = bootstrap_weights(len(self.first))
        self.found: dict[float, NDArray] = {}  # of the first half, by strength: `FIELDS` of every text
        # Ratios as their excess over 1: like the others they are 0 at strength 0 and grow from there.
        self.offset = 1.0 if name == "perplexity_ratio" else 0.0

    def calibrate(self, most: float, max_strength: float) -> _Found:
        limit = most - self.offset
        low, high, strength = 0.0, None, _FIRST
        while high is None and low < max_strength:
            # Several at a time: the pass of the unsteered model is shared.
            for s in self._try([min(strength * factor, max_strength) for factor in (1, 2, 4)]):
                if self.bound(s) > limit:
                    high = s
                    break
                low = s
            strength *= 8
        if not any(values[:, FIELDS.index("kl")].any() for values in self.found.values()):
            raise ValueError(
                "the maps change nothing on the neutral texts: there, they act on no token, or their support is 0"
            )
        if high is None:
            warn(
                f"max_{self.name}={most:g} is not reached at max_strength={max_strength:g}, which is taken", UserWarning
            )
        else:
            low, high = self._narrowed(low, high, limit)
            if low == 0:
                raise ValueError(
                    f"max_{self.name}={most:g} cannot be met: at strength {high:.3g}, the smallest tried, "
                    f"the {self.name} is {self.bound(high) + self.offset:.4g} already"
                )
        tried = np.array(sorted(self.found))
        price = np.array([float(self._price(self.found[s])) for s in tried]) + self.offset
        price[~np.isfinite(price)] = math.inf
        return _Found(low, self._range(limit, max_strength), {"strength": tried, "price": price}, {})

    def _narrowed(self, low: float, high: float, limit: float) -> tuple[float, float]:
        """The bracket of the largest strength within the budget, after bisection."""
        for _ in range(40):
            narrow, met = (high - low) / high, low > 0 and self.bound(low) >= (1 - _CLOSE) * limit
            if narrow <= (_WIDTH if met else _WIDTH / 10):
                break
            (middle,) = self._try([self._between(low, high, limit)])
            low, high = (low, middle) if self.bound(middle) > limit else (middle, high)
        return low, high

    def _between(self, low: float, high: float, limit: float) -> float:
        """A strength between: where a straight line in the root of the price meets the budget, not near the ends."""
        a, b = (math.sqrt(max(self.bound(s), 0)) if s else 0.0 for s in (low, high))
        share = (math.sqrt(limit) - a) / (b - a) if a < b < math.inf else 0.5
        # Just beyond it on the one side, then on the other: both ends of the bracket come near.
        share += 0.4 * _WIDTH if share < 0.5 else -0.4 * _WIDTH
        return low + min(max(share, 0.05), 0.95) * (high - low)

    def bound(self, strength: float) -> float:
        """The upper end of the interval of the price of the first half; infinite where logits are not finite."""
        values = self.found[strength]
        if not np.isfinite(values).all():
            return math.inf
        if self.confidence == 0.5:
            return float(self._price(values))
        return float(np.quantile(self._price(values, self.weights), self.confidence))

    def held_out(self, strength: float) -> dict[str, float]:
        """The price of the second half, with its interval."""
        (values,) = self._measure(self.second, [strength])
        above, below, transform = price_ratios(values)[self.name]
        return named(self.name, ratio_interval(above, below, bootstrap_weights(len(self.second)), transform=transform))

    def _try(self, strengths: list[float]) -> list[float]:
        """Measure the first half at the strengths, each once, and return them."""
        strengths = list(dict.fromkeys(strengths))
        self.found.update(zip(strengths, self._measure(self.first, strengths), strict=True))
        return strengths

    def _measure(self, texts: Neutral, strengths: list[float]) -> NDArray:
        """`FIELDS` of every text at each strength: [strengths, texts, fields]."""
        values = np.empty((len(strengths), len(texts), len(FIELDS)))
        points = [self.point(strength) for strength in strengths]
        for batch, rows in enumerate(texts.batches):
            for k, found in enumerate(texts.measure(points, batch)):
                values[k, rows] = found
                self.done()
        return values

    def _price(self, values: NDArray, weights: NDArray | None = None) -> NDArray:
        """The price of the texts, or of each of the weighted draws [draws, texts] of them."""
        above, below, _ = price_ratios(values)[self.name]
        ratio = above.sum() / below.sum() if weights is None else (weights @ above) / (weights @ below)
        return np.expm1(ratio) if self.name == "perplexity_ratio" else ratio

    def _range(self, limit: float, most: float) -> tuple[float, float]:
        """Where the price of other draws of the texts would meet the budget, up to `most`.

        By lines between the roots of prices, of which the first one goes on beyond the last strength tried.
        """
        tried = [s for s in sorted(self.found) if np.isfinite(self.found[s]).all()]
        prices = np.stack([self._price(self.found[s], self.weights) for s in tried], axis=1)  # [draws, K]
        roots = np.maximum.accumulate(np.sqrt(np.maximum(prices, 0)), axis=1)
        root = math.sqrt(limit)
        met = np.array([np.interp(root, [0, *line], [0, *tried]) for line in roots])
        beyond = roots[:, -1] < root  # the mean of the draw is within the budget at all strengths tried
        met[beyond] = np.minimum(tried[-1] * root / np.maximum(roots[beyond, -1], 1e-12), most)
        return _interval(met)


class _Effect:
    """The mean score of continuations, by strength."""

    def __init__(
        self,
        generator: Generator,
        point: Callable[[float], Point],
        judges: Mapping[str, Any],
        done: Callable[[], Any],
    ) -> None:
        (self.name, self.judge), self.generator, self.point, self.done = *judges.items(), generator, point, done
        self.found: dict[float, NDArray] = {}  # scores [P], means over samples

    def scores(self, strength: float) -> NDArray:
        """The mean score of every prompt's continuations."""
        if strength not in self.found:
            total = np.zeros(len(self.generator.prompts))
            rows, texts = [], []
            for batch, several in enumerate(self.generator.batches):
                rows += several
                point = self.point(strength) if strength else Point(UNSTEERED, 0.0)
                texts += [one.text for one in self.generator.run(point, batch)]
                self.done()
            values = score(self.name, self.judge, texts, [self.generator.prompts[k] for k in rows])
            np.add.at(total, rows, values)
            self.found[strength] = total / self.generator.samples
        return self.found[strength]

    def calibrate(self, effect: float, limit: float, within: str) -> _Found:
        before = float(self.scores(0.0).mean())
        if effect == before:
            raise ValueError(f"effect: {self.name} gives the unsteered model {before:.4g} already")
        sign = 1.0 if effect > before else -1.0

        def reached(strength: float) -> bool:
            return sign * (float(self.scores(strength).mean()) - effect) >= 0

        low, high = 0.0, min(_FIRST_EFFECT, limit)
        while not reached(high):
            if high >= limit:
                best = max(self.found, key=lambda s: sign * self.found[s].mean())
                raise ValueError(
                    f"effect={effect:g} by {self.name} is not reached {within}: at strength {limit:.4g} it is "
                    f"{self.found[limit].mean():.4g}, the best is {self.found[best].mean():.4g} at {best:.4g}; the "
                    f"unsteered model has {before:.4g}"
                )
            low, high = high, min(2 * high, limit)
        # Sampled scores are steps: a narrower bracket would follow noise.
        while high - low > max(0.04 * high, 1e-3):
            middle = (low + high) / 2
            low, high = (low, middle) if reached(middle) else (middle, high)
        tried = np.array(sorted(self.found))
        weights = bootstrap_weights(len(self.generator.prompts))
        means = np.stack([weights @ self.found[s] for s in tried], axis=1)
        rising = np.maximum.accumulate(sign * means, axis=1)
        return _Found(
            high,
            _interval([float(np.interp(sign * effect, line, tried)) for line in rising]),
            {"strength": tried, "effect": np.array([self.found[s].mean() for s in tried])},
            named(self.name, interval(self.found[high], weights)) | {f"{self.name}_unsteered": before},
        )


def _interval(draws: Sequence[float] | NDArray) -> tuple[float, float]:
    low, high = np.quantile(np.asarray(draws), [0.025, 0.975])
    return float(low), float(high)
