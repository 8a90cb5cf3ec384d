"""What maps and distances need of a pair of samples of which one at least is a `Quantiles`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._checks import same_working_type, working_dtype
from .._threads import get_num_threads
from .quantiles import Quantiles, quantiles


def paired_moments(u: Any, v: Any, names: list[str]) -> NDArray:
    """Moments [5, d] of the paired quantiles of `u` and `v`, `Quantiles` or checked arrays, as the engine has them.

    Means and variances are those of all rows, which are exact. If values were left out, the covariance of the quantile
    functions is that of their means over equal parts of [0, 1], plus what is within the parts: there their covariance
    is at least 0, since both rise, and at most the root of the product of their variances, which are what the parts
    leave of the exact ones. It is taken as so large, which is right where both rise alike, as smooth functions do over
    short parts.
    """
    exact = all(x.exact for x in (u, v) if isinstance(x, Quantiles))
    if exact:
        rows = [x.weighted_sample()[0] if isinstance(x, Quantiles) else x for x in (u, v)]
    else:
        seen = [x if isinstance(x, Quantiles) else quantiles(x) for x in (u, v)]
        # In as many parts as a run has values: runs of different weights overlap, and blur what is finer.
        parts = min(x.run for x in seen if not x.exact)
        rows = [x.sample(parts) for x in seen]
    rows = list(same_working_type(*rows))
    found = _core.quantile_moments([rows[0]], [rows[1]], None, None, names[:1], names[1:], get_num_threads())[0]
    if exact:
        return found
    within = np.ones_like(found[0])
    for x, mean, variance in ((seen[0], 0, 2), (seen[1], 1, 4)):
        moments = x.moments
        total = moments.variance(ddof=0)
        within *= np.sqrt(np.maximum(total - found[variance], 0))
        found[mean], found[variance] = moments.mean, total
    found[3] = np.minimum(found[3] + within, np.sqrt(found[2]) * np.sqrt(found[4]))
    found[2:4, _constant(found[0], found[2], seen[0].count, rows[0])] = 0
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
