"""Gates fitted to token activations of source and target: when maps are to act, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import as_choice, as_int, as_not_negative, as_positive, as_sample, as_share, is_tensor, widen
from .._warn import warn
from ..maps.gates import CONTEXTS, AnyGate, Gate, NeuronGate
from .samples import check_modules
from .separability import group_folds, logistic_regression, principal_components, roc_area

Texts = ArrayLike | Sequence[ArrayLike]
"""Activations [n, d] of tokens, or a list of arrays [T, d], one a text."""

KINDS = ("scalar", "neuron")
RIDGES = (100.0, 10.0, 1.0, 0.1, 0.01, 0.001)
"""Penalties that are tried. The activations of tokens are many, and their neurons correlated: strong ones win."""
_SHARPNESS = 3.0
_MIN_AUROC = 0.55
_BLOCK = 4096  # neurons whose posteriors are worked out at a time


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """What kind of gate is fitted, and how.

    Parameters
    ----------
    kind : {"scalar", "neuron"}, default "scalar"
        "scalar": one number for each token, by logistic regression; "neuron": one for each token and neuron, the
        posterior of two Gaussians (GAPS).
    context : {"token", "mean"}, default "token"
        What a scalar gate reads: the token's activation, or the mean over the tokens of its text up to and including
        it, which is less noisy and remembers what a text began with.
    components : int, optional
        Let a scalar gate read so many principal components of the standardised activations only (DSAS takes 5), at most
        one a neuron; where fewer tokens or directions vary, those that do. Default: all neurons.
    ridge : float, optional
        The penalty ridge / 2 |weight|^2 of a scalar gate beside the mean loss over tokens, for standardised
        activations. Default: of 100, 10, 1, 0.1, 0.01 and 0.001 the one with the largest cross-validated area under
        the ROC curve.
    open_on_target : float, optional
        The share of target tokens on which a scalar gate may be open, g >= 0.5: the logit is shifted to its quantile
        1 - open_on_target there, and divided by its standard deviation there. Default: calibrated, so that g is the
        probability of source where both are as frequent.
    sharpness : float, default 3
        What the logit is multiplied with where `open_on_target` is given, in units of its standard deviation.
    min_auroc : float, default 0.55
        Neurons with a smaller cross-validated area under the ROC curve are closed; for kind "neuron".
    folds : int, default 5
        Of the cross-validation, at least 2: at most as many as there are texts on either side.
    seed : int, default 0
        Of the order in which texts are dealt out to folds.
    """

    kind: str = "scalar"
    context: str = "token"
    components: int | None = None
    ridge: float | None = None
    open_on_target: float | None = None
    sharpness: float | None = None
    min_auroc: float | None = None
    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_gate()

    def _check_gate(self) -> None:
        def given(check: Any, name: str, **bounds: Any) -> Any:
            value = getattr(self, name)
            return None if value is None else check(value, name, **bounds)

        as_choice(self.kind, "kind", KINDS)
        as_choice(self.context, "context", CONTEXTS)
        checked = {
            "components": given(as_int, "components", low=1),
            "ridge": given(as_not_negative, "ridge"),
            "open_on_target": given(as_share, "open_on_target"),
            "sharpness": given(as_positive, "sharpness"),
            "min_auroc": given(as_share, "min_auroc"),
            "folds": as_int(self.folds, "folds", low=2),
            "seed": as_int(self.seed, "seed", low=0),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.kind == "neuron":
            scalar = {"components", "ridge", "open_on_target", "sharpness"}
            others = [name for name in sorted(scalar) if checked[name] is not None]
            if self.context != "token":
                others.append("context")
            if others:
                raise ValueError(f"{others[0]} is for gates of kind 'scalar', got kind 'neuron'")
        elif self.min_auroc is not None:
            raise ValueError("min_auroc is for gates of kind 'neuron', got kind 'scalar'")
        if self.sharpness is not None and self.open_on_target is None:
            raise ValueError("sharpness goes with open_on_target: a calibrated gate has its own")


class Rows(NamedTuple):
    """The tokens of one side [n, d], how many each text has, and what a gate reads at each of them [n, d]."""

    x: NDArray
    sizes: list[int]
    read: NDArray

    @classmethod
    def of(cls, texts: Sequence[NDArray], read: Sequence[NDArray] | None = None) -> Rows:
        """The rows of texts, of which a gate reads the tokens themselves unless it is said what."""
        x = np.concatenate(texts)
        return cls(x, [len(text) for text in texts], x if read is None else np.concatenate(read))


def fit_gate(
    source: Texts | Mapping[str, Texts],
    target: Texts | Mapping[str, Texts],
    *,
    kind: str = "scalar",
    context: str = "token",
    components: int | None = None,
    ridge: float | None = None,
    open_on_target: float | None = None,
    sharpness: float | None = None,
    min_auroc: float | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Any:
    """Fit a gate that is open where activations look like those of source, and closed where they look like target's.

    A scalar gate is a logistic regression of standardised activations, both sides counting the same however many tokens
    they have (DSAS, arXiv 2512.03661, without its choice of layers). Its logits on texts that it was not fitted to are
    calibrated by Platt's method, or shifted so that few target tokens are let through. A gate of neurons has for each
    of them the posterior of two Gaussians (GAPS, arXiv 2609.01878), and no training. `lineas.fit_gates` does it for the
    modules of a model.

    Parameters
    ----------
    source, target : array_like, list of array_like, or Mapping of either
        Activations of tokens, float16, bfloat16, float32, float64 or integers: [n, d], or a list of arrays [T, d], one
        a text. With a list whole texts are held out in the cross-validation; the rows of one array count as texts of
        one token each. Where both sides have as many texts, the texts k of both are held out together: they may be a
        pair, and differ in little but their side. Context "mean" needs lists. Mappings from module name to these give a
        gate for each.
    kind : {"scalar", "neuron"}, default "scalar"
        "scalar": one number for each token; "neuron": one for each token and neuron.
    context : {"token", "mean"}, default "token"
        What a scalar gate reads: the token's activation, or the mean over the tokens of its text up to and including
        it, which is less noisy and remembers what a text began with.
    components : int, optional
        Let a scalar gate read so many principal components of the standardised activations only (DSAS takes 5), at most
        one a neuron; where fewer tokens or directions vary, those that do. Default: all neurons.
    ridge : float, optional
        The penalty ridge / 2 |weight|^2 of a scalar gate beside the mean loss over tokens, for standardised
        activations. Default: of 100, 10, 1, 0.1, 0.01 and 0.001 the one with the largest cross-validated area under
        the ROC curve.
    open_on_target : float, optional
        The share of target tokens on which a scalar gate may be open, g >= 0.5: the logit is shifted to its quantile
        1 - open_on_target there, and divided by its standard deviation there. Default: calibrated, so that g is the
        probability of source where both are as frequent.
    sharpness : float, default 3
        What the logit is multiplied with where `open_on_target` is given, in units of its standard deviation.
    min_auroc : float, default 0.55
        Neurons with a smaller cross-validated area under the ROC curve are closed; for kind "neuron".
    folds : int, default 5
        Of the cross-validation, at least 2: at most as many as there are texts on either side.
    seed : int, default 0
        Of the order in which texts are dealt out to folds.

    Returns
    -------
    Gate or NeuronGate, or a dict of them by module
        float32, for float64 activations and integers float64. `Gate.auroc`, `Gate.accuracy` and `Gate.left_alone`, and
        those of neurons, are on held-out texts; where the ridge was chosen by them they are a little too good.

    Raises
    ------
    TypeError
        If an argument is of a wrong type.
    ValueError
        If there are fewer than 2 texts on a side, arrays have other shapes or numbers of columns, hold no token or a
        value that is not finite, context "mean" is asked for of one array, or a setting is out of range.

    Warns
    -----
    UserWarning
        If no neuron is left open.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> rng = np.random.default_rng(0)
    >>> source, target = ([rng.normal(mean, 1.0, (10, 4)) for _ in range(8)] for mean in (1.0, 0.0))
    >>> gate = lineas.fit_gate(source, target, context="mean")
    >>> round(gate.auroc, 1)
    1.0
    """
    settings = GateSettings(
        kind=kind,
        context=context,
        components=components,
        ridge=ridge,
        open_on_target=open_on_target,
        sharpness=sharpness,
        min_auroc=min_auroc,
        folds=folds,
        seed=seed,
    )
    if isinstance(source, Mapping) != isinstance(target, Mapping):
        kinds = f"{type(source).__name__} and {type(target).__name__}"
        raise TypeError(f"source and target must both be arrays, both be lists or both be mappings, got {kinds}")
    if not isinstance(source, Mapping):
        sides = read_texts(source, "source", settings), read_texts(target, "target", settings)
        return fit_rows(*sides, settings)
    assert isinstance(target, Mapping)
    if not source:
        raise ValueError("source must hold at least one module")
    check_modules(list(source), target, "target")
    return {
        name: fit_rows(
            read_texts(texts, f"source[{name!r}]", settings),
            read_texts(target[name], f"target[{name!r}]", settings),
            settings,
            name,
        )
        for name, texts in source.items()
    }


def read_texts(given: Any, name: str, settings: GateSettings) -> Rows:
    """What a gate of these settings reads of activations that a user gave; TypeError or ValueError as `fit_gate`."""
    if isinstance(given, list | tuple) and given and all(np.ndim(one) == 2 or is_tensor(one) for one in given):
        texts = [check_finite(widen(as_sample(one, f"{name}[{k}]")), f"{name}[{k}]") for k, one in enumerate(given)]
        widths = {x.shape[1] for x in texts}
        if len(widths) > 1:
            raise ValueError(f"{name}: all texts must have the same number of columns, got {sorted(widths)}")
        return Rows.of(texts, [causal_means(x) for x in texts] if settings.context == "mean" else None)
    if settings.context == "mean":
        raise ValueError(f"{name} must be a list of arrays [tokens, d], one a text, for context='mean'")
    x = check_finite(widen(as_sample(given, name)), name)
    return Rows(x, [1] * len(x), x)


def check_finite(x: NDArray, name: str) -> NDArray:
    """`x` [n, d]; ValueError, which says where, if a value of it is not finite."""
    finite = np.isfinite(x)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise ValueError(f"{name}: {x[row, column]} at row {row}, column {column}")
    return x


def causal_means(x: NDArray) -> NDArray:
    """The mean of the rows of [T, d] up to and including each."""
    return (np.cumsum(x, axis=0, dtype=np.float64) / np.arange(1, len(x) + 1)[:, None]).astype(x.dtype)


def fit_rows(source: Rows, target: Rows, settings: GateSettings, module: str | None = None) -> AnyGate:
    """The gate of these rows; ValueError, which names the module, as `fit_gate`."""
    at = "" if module is None else f" of {module}"
    if source.x.shape[1] != target.x.shape[1]:
        shapes = f"{source.x.shape} and {target.x.shape}"
        raise ValueError(f"source and target{at} must have the same number of columns, got shapes {shapes}")
    for name, side in (("source", source), ("target", target)):
        if len(side.sizes) < 2:
            raise ValueError(f"{name}{at} must hold at least 2 texts, of which some are held out, got 1")
    if settings.components is not None and settings.components > source.x.shape[1]:
        raise ValueError(f"components must be at most the {source.x.shape[1]} neurons{at}, got {settings.components}")
    dtype = np.result_type(source.x, target.x)
    ours, theirs = (
        Rows(side.x.astype(np.float64, copy=False), side.sizes, side.read.astype(np.float64, copy=False))
        for side in (source, target)
    )
    rng = np.random.default_rng(settings.seed)
    count = min(settings.folds, len(ours.sizes), len(theirs.sizes))
    if len(ours.sizes) == len(theirs.sizes):  # they may be pairs, of which one would tell the other's side
        both = group_folds([n + m for n, m in zip(ours.sizes, theirs.sizes, strict=True)], count, rng)
        texts = both, both
    else:
        texts = group_folds(ours.sizes, count, rng), group_folds(theirs.sizes, count, rng)
    folds = tuple(np.repeat(fold, side.sizes) for fold, side in zip(texts, (ours, theirs), strict=True))
    if settings.kind == "neuron":
        return _neurons(ours.x, theirs.x, folds, count, settings, dtype, at)
    return _scalar(ours, theirs, folds, count, settings, dtype)


# --- scalar -----------------------------------------------------------------------------------------------------------


def _scalar(source: Rows, target: Rows, folds: tuple, count: int, settings: GateSettings, dtype: np.dtype) -> Gate:
    """A regression of tokens, judged and calibrated by what the gate reads, which may be means of them.

    The logit is linear: that of a mean is the mean of logits. Means of the first tokens of a text say little, and a
    regression of means is led by them: it tells texts apart less well than one of tokens.
    """
    # Standardised and turned once, with the rows that folds hold out: that looks at no row's side.
    mean, directions, parts = _turned(source.x, target.x, settings.components)
    read = parts if settings.context == "token" else [(side.read - mean) @ directions for side in (source, target)]
    ridges = RIDGES if settings.ridge is None else (settings.ridge,)
    found = [np.empty((len(ridges), len(side))) for side in parts]
    areas = np.zeros(len(ridges))
    for k in range(count):
        kept = [side[fold != k] for side, fold in zip(parts, folds, strict=True)]
        held_out = [fold == k for fold in folds]
        for r, (turned, bias) in enumerate(_regressions(kept[0], kept[1], ridges)):
            for logits, rows, out in zip(found, read, held_out, strict=True):
                logits[r, out] = rows[out] @ turned + bias
        # Fold by fold: the regressions of several have biases of their own.
        areas += roc_area(*(logits[:, out].T for logits, out in zip(found, held_out, strict=True))) / count
    best = int(areas.argmax())  # the strongest of those that are as good
    ours, theirs = found[0][best], found[1][best]
    ((turned, bias),) = _regressions(parts[0], parts[1], ridges[best : best + 1])
    weight = directions @ turned
    slope, shift = _platt(ours, theirs) if settings.open_on_target is None else _opened(theirs, settings)
    hit, left_alone = float((slope * ours + shift >= 0).mean()), float((slope * theirs + shift < 0).mean())
    return Gate(
        (slope * weight).astype(dtype),
        float(slope * (bias - weight @ mean) + shift),
        context=settings.context,
        auroc=float(areas[best]),
        accuracy=(hit + left_alone) / 2,
        left_alone=left_alone,
    )


def _turned(source: NDArray, target: NDArray, components: int | None) -> tuple[NDArray, NDArray, list[NDArray]]:
    """Mean [d], directions [d, k] and ``(x - mean) @ directions``: principal components of standardised activations."""
    mass = np.repeat([0.5 / len(source), 0.5 / len(target)], [len(source), len(target)])
    x = np.concatenate([source, target])
    mean = mass @ x
    x = x - mean
    deviation = np.sqrt(mass @ np.square(x))
    deviation[deviation <= 1e-12 * np.abs(mean)] = 0
    inverse = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0)  # 0 for what does not vary
    x *= inverse
    directions = principal_components(x, mass, components)
    turned = x @ directions
    return mean, inverse[:, None] * directions, [turned[: len(source)], turned[len(source) :]]


def _regressions(source: NDArray, target: NDArray, ridges: Sequence[float]) -> list[tuple[NDArray, float]]:
    """Weight [k] and bias for each ridge; the classes count the same."""
    x, y = np.concatenate([source, target]), np.repeat([1.0, 0.0], [len(source), len(target)])
    mass = np.repeat([0.5 / len(source), 0.5 / len(target)], [len(source), len(target)])
    fitted: list[tuple[NDArray, float]] = []
    for ridge in ridges:
        fitted.append(logistic_regression(x, y, mass, ridge, fitted[-1] if fitted else None))
    return fitted


def _platt(source: NDArray, target: NDArray) -> tuple[float, float]:
    """Slope and shift that make probabilities of logits: Platt (1999), with his targets, the classes counting the same.

    A slope below 0 would say that the logits are right the other way round; there the gate cannot tell, and is 1/2.
    """
    logits = np.concatenate([source, target])
    n, m = len(source), len(target)
    mass = np.repeat([0.5 / n, 0.5 / m], [n, m])
    y = np.repeat([(n + 1) / (n + 2), 1 / (m + 2)], [n, m])
    mean, spread = float(mass @ logits), float(logits.std())
    if spread == 0:
        return 0.0, 0.0
    (slope,), shift = logistic_regression(((logits - mean) / spread)[:, None], y, mass, 0.0)
    slope = float(slope) / spread
    return (slope, shift - slope * mean) if slope > 0 else (0.0, 0.0)


def _opened(target: NDArray, settings: GateSettings) -> tuple[float, float]:
    """Slope and shift by which the logit of a share of target tokens is at least 0."""
    assert settings.open_on_target is not None
    spread = float(target.std())
    slope = (_SHARPNESS if settings.sharpness is None else settings.sharpness) / (spread or 1.0)
    threshold = float(np.quantile(target, 1 - settings.open_on_target, method="lower"))
    if settings.open_on_target < 1:  # between the last token that is left alone and the first that is not
        above = target[target > threshold]
        threshold = (threshold + float(above.min())) / 2 if above.size else threshold + spread / 1000
    return slope, -slope * threshold


# --- neurons ----------------------------------------------------------------------------------------------------------


def _neurons(
    source: NDArray, target: NDArray, folds: tuple, count: int, settings: GateSettings, dtype: np.dtype, at: str
) -> NeuronGate:
    d = source.shape[1]
    areas, shares = np.empty(d), np.empty(d)
    for start in range(0, d, _BLOCK):
        part = slice(start, start + _BLOCK)
        ours, theirs = source[:, part], target[:, part]
        logits = np.empty_like(ours), np.empty_like(theirs)
        for k in range(count):
            parts = _posterior(ours[folds[0] != k], theirs[folds[1] != k])
            for made, side, fold in zip(logits, (ours, theirs), folds, strict=True):
                z = side[fold == k]
                made[fold == k] = (parts[0] * z + parts[1]) * z + parts[2]
        areas[part], shares[part] = roc_area(*logits), (logits[1] < 0).mean(axis=0)
    quadratic, linear, constant = (x.astype(dtype) for x in _posterior(source, target))
    varies = (source.var(axis=0) > 0) & (target.var(axis=0) > 0)
    least = _MIN_AUROC if settings.min_auroc is None else settings.min_auroc
    closed = (areas < least) | ~varies
    for x in (quadratic, linear, constant):
        closed |= ~np.isfinite(x)  # neurons that hardly vary
    for x in (quadratic, linear, constant):
        x[closed] = 0
    if closed.all():
        warn(
            f"no neuron{at} tells source from target with an area under the ROC curve of at least "
            f"{least:g} (the best has {areas.max():.3f}): the gate is closed everywhere",
            UserWarning,
        )
    left_alone = float(shares[~closed].mean()) if not closed.all() else 1.0
    return NeuronGate(quadratic, linear, constant, closed=closed, auroc=areas, left_alone=left_alone)


def _posterior(source: NDArray, target: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """The logit of "source" as a polynomial of the activation: its three coefficients, each [d].

    Those of neurons that do not vary are made up; they are closed.
    """
    (m1, v1), (m0, v0) = ((x.mean(axis=0), x.var(axis=0)) for x in (source, target))
    v1, v0 = np.where(v1 > 0, v1, 1.0), np.where(v0 > 0, v0, 1.0)
    with np.errstate(over="ignore", invalid="ignore"):
        quadratic = (1 / v0 - 1 / v1) / 2
        linear = m1 / v1 - m0 / v0
        constant = (np.log(v0 / v1) + m0 * m0 / v0 - m1 * m1 / v1) / 2
    return quadratic, linear, constant
