"""Statistics of continuations, and bootstrap intervals of means and ratios. NumPy alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import as_engine, as_int, as_share, is_number, is_tensor, widen

Vector = NDArray[np.float64]
Interval = tuple[float, float, float]


def as_numbers(x: Any, name: str) -> Vector:
    """`x` as a float64 array of its shape; booleans are 0 and 1.

    `x` is array_like: also a torch tensor on any device, which may require a gradient, and a list of such numbers.
    TypeError or ValueError, which call it `name`, for what holds no real numbers and for lists of other lengths.
    """
    if isinstance(x, list | tuple):
        x = [entry.item() if is_tensor(entry) and entry.ndim == 0 else entry for entry in x]
    if is_tensor(x):
        x = x.byte() if str(x.dtype) == "torch.bool" else x
    elif not np.ma.isMaskedArray(x):
        try:
            array = np.asarray(x)
        except (TypeError, ValueError):  # as_engine says why
            array = np.empty(0)
        plain = array.dtype.kind == "O" and all(is_number(entry) or isinstance(entry, bool) for entry in array.flat)
        if plain or array.dtype.kind == "b":
            x = array.astype(np.float64)
    return widen(as_engine(x, name)).astype(np.float64, copy=False)


# --- texts ------------------------------------------------------------------------------------------------------------


def ngram_statistics(tokens: Sequence[int] | ArrayLike) -> dict[str, float]:
    """How varied a continuation is, by its n-grams.

    Parameters
    ----------
    tokens : sequence of int [T]
        Token ids of one continuation, without its prompt and without padding. May be empty.

    Returns
    -------
    dict
        ``"distinct_1"``, ``"distinct_2"``, ``"distinct_3"``: different n-grams, as a share of all (Li et al. 2016,
        arXiv 1510.03055, who divide by the number of tokens; in short texts that is never 1). ``"repetition_4"``: the
        share of 4-grams that occurred before in the same continuation, which is 1 - distinct-4. NaN where the
        continuation has fewer than n tokens.

    Raises
    ------
    TypeError, ValueError
        If `tokens` is no sequence of integers.
    """
    array = np.asarray(tokens.tolist() if is_tensor(tokens) else tokens)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"tokens must be token ids, got dtype {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"tokens must have shape [T], got shape {array.shape}")
    ids = array.tolist()
    found = {f"distinct_{n}": _distinct(ids, n) for n in (1, 2, 3)}
    return found | {"repetition_4": 1 - _distinct(ids, 4)}


def _distinct(ids: Sequence[int], n: int) -> float:
    total = len(ids) - n + 1
    return len(set(zip(*(ids[k:] for k in range(n)), strict=False))) / total if total > 0 else np.nan


def harmonic_mean(values: ArrayLike, axis: int = -1) -> Vector:
    """The harmonic mean of numbers that are not negative, along one axis: 0 where one of them is 0.

    Parameters
    ----------
    values : array_like
        Finite real numbers that are not negative.
    axis : int, default -1
        The axis along which the mean is taken.

    Returns
    -------
    float64 array, without that axis

    Raises
    ------
    TypeError, ValueError
        If a value is no real number, not finite or negative, or there are none.
    """
    array = as_numbers(values, "values")
    bad = array[~(np.isfinite(array) & (array >= 0))]
    if bad.size:
        raise ValueError(f"values must be finite and not negative, got {bad[0]:g}")
    if array.ndim == 0 or not array.shape[axis]:
        raise ValueError(f"values must have an entry along axis {axis}, got shape {array.shape}")
    low = array.min(axis=axis, keepdims=True)
    # Relative to the least, of which the inverse may be beyond float64.
    ratios = np.divide(low, array, out=np.ones_like(array), where=array > 0)
    return low.squeeze(axis) / ratios.mean(axis=axis)


# --- intervals --------------------------------------------------------------------------------------------------------


def bootstrap_weights(n: int, draws: int = 2000, seed: int = 0) -> Vector:
    """Weights of `n` rows in bootstrap samples: the share of each sample that is a copy of each row.

    One set of weights for all strengths and metrics keeps them comparable: intervals of differences of paired rows
    then come from the same samples.

    Parameters
    ----------
    n : int
        Number of rows.
    draws : int, default 2000
        Number of samples, each of `n` rows drawn with replacement.
    seed : int, default 0

    Returns
    -------
    float64 array [draws, n]
        Multiples of 1 / n; each sample's sum to 1.

    Raises
    ------
    TypeError, ValueError
        If `n` or `draws` is no int from 1 on, or `seed` none from 0 on.
    """
    n, draws = as_int(n, "n", low=1), as_int(draws, "draws", low=1)
    rng = np.random.default_rng(as_int(seed, "seed", low=0))
    return rng.multinomial(n, np.full(n, 1 / n), size=draws) / n


def interval(values: ArrayLike, weights: ArrayLike, level: float = 0.95) -> Interval:
    """The mean of `values`, and its percentile bootstrap interval.

    Parameters
    ----------
    values : array_like [n]
        Real numbers. NaN are left out: mean and samples are those of the rest, their weights scaled to sum to 1. An
        infinite one makes the mean infinite, and the bounds that its samples reach.
    weights : array_like [draws, n]
        Of `bootstrap_weights`.
    level : float, default 0.95
        The share of the samples' means between the bounds, from 0 to 1.

    Returns
    -------
    mean, low, high : float
        NaN where every value is.

    Raises
    ------
    TypeError, ValueError
        If shapes do not match, weights are not finite or negative, or `level` is not from 0 to 1.
    """
    values, weights, level = _as_values(values, "values"), as_numbers(weights, "weights"), as_share(level, "level")
    kept = ~np.isnan(values)
    values, weights = values[kept], _kept_weights(weights, kept)
    if not values.size:
        return np.nan, np.nan, np.nan
    with np.errstate(invalid="ignore", divide="ignore"):  # samples without any of the rows: no mean
        means = _sums(weights, values) / weights.sum(axis=1)
        mean = values.mean()
    # No mean lies outside of the values, however it is rounded.
    return float(mean), *_bounds(np.clip(means, values.min(), values.max()), level)


def ratio_interval(
    numerator: ArrayLike,
    denominator: ArrayLike,
    weights: ArrayLike,
    level: float = 0.95,
    transform: Callable[[Vector], ArrayLike] | None = None,
) -> Interval:
    """The ratio of two sums over the same rows, and its percentile bootstrap interval.

    The loss per token of texts of different lengths is one, with the texts' losses and numbers of tokens; with
    ``transform=np.exp`` it is the perplexity.

    Parameters
    ----------
    numerator, denominator : array_like [n]
        Real numbers, those of the denominator not negative. Rows where either is NaN are left out.
    weights : array_like [draws, n]
        Of `bootstrap_weights`.
    level : float, default 0.95
        The share of the samples' ratios between the bounds, from 0 to 1.
    transform : callable, optional
        Taken of the ratio and of every sample's: a function of an array that returns one of the same shape.

    Returns
    -------
    ratio, low, high : float
        NaN where there is no row, or the denominators sum to 0.

    Raises
    ------
    TypeError, ValueError
        As `interval`; and if a denominator is negative.
    """
    above, below = _as_values(numerator, "numerator"), _as_values(denominator, "denominator")
    weights, level = as_numbers(weights, "weights"), as_share(level, "level")
    if above.shape != below.shape:
        raise ValueError(f"numerator and denominator must have one shape, got {above.shape} and {below.shape}")
    if (below < 0).any():
        raise ValueError(f"denominator must not be negative, got {below[below < 0][0]:g}")
    kept = ~(np.isnan(above) | np.isnan(below))
    above, below, weights = above[kept], below[kept], _kept_weights(weights, kept)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        tops, bottoms = (np.append(_sums(weights, x), x.sum()) for x in (above, below))  # the last: of all rows
        ratios = np.where(bottoms > 0, tops / bottoms, np.nan)
        if transform is not None:
            ratios = _as_values(transform(ratios), "what transform returns")
    if ratios.shape != (len(weights) + 1,):
        raise ValueError(f"transform must return shape {(len(weights) + 1,)}, got {ratios.shape}")
    if np.isnan(ratios[-1]):
        return np.nan, np.nan, np.nan
    return float(ratios[-1]), *_bounds(ratios[:-1], level)


def _as_values(x: ArrayLike, name: str) -> Vector:
    array = as_numbers(x, name)
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape [n], got shape {array.shape}")
    return array


def _kept_weights(weights: Vector, kept: NDArray[np.bool_]) -> Vector:
    """The columns of the rows that are kept."""
    if weights.ndim != 2 or weights.shape[1] != kept.size or not len(weights):
        raise ValueError(f"weights must have shape [draws, {kept.size}], got shape {weights.shape}")
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError("weights must be finite and not negative")
    return weights if kept.all() else weights[:, kept]


def _sums(weights: Vector, values: Vector) -> Vector:
    """Weighted sums [draws] of values [n]; infinite values count in the samples that they are in."""
    if np.isfinite(values).all():
        return weights @ values
    return np.where(weights > 0, weights * values, 0.0).sum(axis=1)


def _bounds(draws: Vector, level: float) -> tuple[float, float]:
    draws = draws[~np.isnan(draws)]
    if not draws.size:
        return np.nan, np.nan
    # Between two infinite samples there is no number to interpolate to.
    method: Any = "linear" if np.isfinite(draws).all() else "inverted_cdf"
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], method=method)
    return float(low), float(high)
