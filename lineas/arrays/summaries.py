"""What maps and distances need of a pair of samples of which one at least is a `Quantiles`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._checks import same_working_type, working_dtype
from .._threads import get_num_threads
from .quantiles import Quantiles


def rows_of(x: Quantiles, name: str, min_rows: int) -> tuple[NDArray, NDArray | None]:
    """The values kept and their weights, None where all are there; ValueError if it has seen too few rows."""
    if x.count < min_rows:
        raise ValueError(f"{name} must have seen at least {min_rows} row{'s' * (min_rows > 1)}, got {x.count}")
    rows, weights = x.weighted_sample()
    return rows, None if weights.max() == 1 else weights


def paired_moments(
    u: Any, v: Any, u_rows: NDArray, v_rows: NDArray, weights: tuple[NDArray | None, NDArray | None], names: list[str]
) -> NDArray:
    """Moments [5, d] of the paired quantiles of `u` and `v`, arrays or `Quantiles`, as the engine has them.

    Means and variances of a `Quantiles` are those of all rows that it has seen, which are exact. Of the values it kept
    comes the correlation of the quantile functions alone, close to 1 where the two have similar shapes, so that the
    error of the covariance is of second order in that of the quantiles.
    """
    u_rows, v_rows = same_working_type(u_rows, v_rows)
    masses = [None if mass is None else [mass] for mass in weights]
    found = _core.quantile_moments([u_rows], [v_rows], *masses, names[:1], names[1:], get_num_threads())[0]
    kept = found[[2, 4]].copy()
    for side, mean, variance in ((u, 0, 2), (v, 1, 4)):
        if isinstance(side, Quantiles) and not side.exact:
            seen = side.moments
            found[mean], found[variance] = seen.mean, seen.variance(ddof=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = found[3] / np.sqrt(kept[0]) / np.sqrt(kept[1])
    # Where the values kept are constant and those seen were not, they say nothing about the shape.
    correlation = np.where(kept.min(axis=0) > 0, np.clip(correlation, 0, 1), 1)
    found[3] = correlation * np.sqrt(found[2]) * np.sqrt(found[4])
    constant = _constant(found[0], found[2], u.count if isinstance(u, Quantiles) else len(u_rows), u_rows)
    found[2:4, constant] = 0
    return found


def _constant(mean: NDArray, variance: NDArray, count: int, rows: NDArray) -> NDArray:
    """Which neurons are constant up to rounding, as `lineas.fit` has it."""
    noise, step = count * 2.0**-52, 2.0**-52 if working_dtype(rows) == np.float64 else 2.0**-23
    return variance <= noise * variance + (noise * mean) ** 2 + (step * mean) ** 2


def map_of(moments: NDArray, counts: tuple[int, int], method: str, dtype: np.dtype) -> tuple[NDArray, NDArray]:
    """Slopes and shifts [d] of a closed-form map from the moments of the paired quantiles of `counts` rows."""
    mean_u, mean_v, var_u, cov, var_v = moments
    weight, varies = np.ones_like(mean_u), var_u > 0
    if method == "linear":
        weight[varies] = cov[varies] / var_u[varies]
    elif method == "gaussian":
        unbiased = np.sqrt(counts[1] / (counts[1] - 1)) / np.sqrt(counts[0] / (counts[0] - 1))
        weight[varies] = np.sqrt(var_v[varies]) / np.sqrt(var_u[varies]) * unbiased
    with np.errstate(over="ignore"):  # the map says what overflows
        weight = weight.astype(dtype)
        # The shift goes with the slope as it is stored.
        return weight, (mean_v - weight.astype(np.float64) * mean_u).astype(dtype)


def distance_of(moments: NDArray) -> NDArray:
    """Squared 2-Wasserstein distances [d] from the moments of the paired quantiles."""
    mean_u, mean_v, var_u, cov, var_v = moments
    sd_u, sd_v = np.sqrt(var_u), np.sqrt(var_v)
    return (mean_u - mean_v) ** 2 + (sd_u - sd_v) ** 2 + 2 * np.maximum(sd_u * sd_v - cov, 0)
