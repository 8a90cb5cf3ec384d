"""Shrinkage of closed-form maps towards the identity, by how much of them the samples can be told to have by chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .._checks import as_share, widen
from .samples import Pair

AUTO = "auto"
Map: TypeAlias = tuple[NDArray, NDArray]
"""Slopes and shifts [d]."""


def as_shrinkage(value: Any) -> float | str | None:
    """None, "auto" or a number from 0 to 1; TypeError or ValueError where it is none of them."""
    if value is None:
        return None
    if isinstance(value, str):
        if value != AUTO:
            raise ValueError(f"shrinkage must be None, 'auto' or a number from 0 to 1, got {value!r}")
        return value
    return as_share(value, "shrinkage")


def shrunk(pairs: Mapping[Any, Pair], maps: Mapping[Any, Map], shrinkage: float | str) -> dict[Any, Map]:
    """The maps of all modules, moved towards the identity.

    A map takes z to ``mean(u) + shift + w (z - mean(u))`` with ``shift = mean(v) - mean(u)``. The shift is multiplied
    by one factor, w - 1 by another: both ``1 - shrinkage`` if that is a number, else the medians over the modules of
    their `factors`. Neurons of a module are correlated, so that what one module tells is itself left to chance; the
    median of several holds against single ones that a few prompts dominate.

    Parameters
    ----------
    pairs : mapping to Pair
        The samples by module.
    maps : mapping to (ndarray, ndarray)
        Slopes and shifts [d] that `lineas.fit` found for them, in their working type.
    shrinkage : float or "auto"
        As in `lineas.fit`.

    Returns
    -------
    dict
        As `maps`.

    Raises
    ------
    ValueError
        With "auto" if a side has fewer than 2 rows whose weight is not 0: chance cannot be told from one.
    """
    if shrinkage == 0:
        return dict(maps)
    sides = {module: _Sides(pair) for module, pair in pairs.items()}
    if isinstance(shrinkage, str):
        for side in sides.values():
            for sample, name in zip((side.u, side.v), side.names, strict=True):
                if len(sample.share) < 2:
                    raise ValueError(f"{name} must have at least 2 rows with a weight for shrinkage='auto', got 1")
        found = [factors(side.u, side.v, maps[module][0]) for module, side in sides.items()]
        of_shift, of_slope = np.median(found, axis=0)
    else:
        of_shift = of_slope = 1 - shrinkage
    return {module: side.hold_back(*maps[module], of_shift, of_slope) for module, side in sides.items()}


class _Sides:
    """What shrinkage asks of the two samples of a module."""

    def __init__(self, pair: Pair) -> None:
        # A row of weight 0 is not there, whatever it holds.
        masses = [None if mass is None else mass[mass > 0] for mass in (pair.u_mass, pair.v_mass)]
        rows = [
            widen(x if mass is None else x[mass > 0]).astype(np.float64)
            for x, mass in ((pair.u, pair.u_mass), (pair.v, pair.v_mass))
        ]
        # By a power of 2, which changes no bit: squares of samples of any scale are numbers then.
        self.unit = 2.0 ** (np.frexp(max(np.abs(x).max() for x in rows))[1] - 1)
        self.u, self.v = (Sample(x / self.unit, mass) for x, mass in zip(rows, masses, strict=True))
        self.names = pair.u_name, pair.v_name

    def hold_back(self, weight: NDArray, bias: NDArray, of_shift: float, of_slope: float) -> Map:
        """A map of which `of_shift` and `of_slope` are kept."""
        found = (1 + of_slope * (weight.astype(np.float64) - 1)).astype(weight.dtype)
        # The shift goes with the slope as it is stored.
        shift = self.u.mean * (1 - found.astype(np.float64)) + of_shift * (self.v.mean - self.u.mean)
        with np.errstate(over="ignore"):  # the map says what overflows
            return found, (shift * self.unit).astype(bias.dtype)


class Sample:
    """What shrinkage asks of one side: means, variances and kurtosis of its neurons, and how many rows it stands for.

    Parameters
    ----------
    x : ndarray
        float64 [n, d].
    mass : ndarray or None
        [n], weights of the rows, above 0.
    """

    def __init__(self, x: NDArray, mass: NDArray | None) -> None:
        self.share = np.full(len(x), 1 / len(x)) if mass is None else mass / mass.sum()
        # Kish's effective number: that of equal weights with the same variance of the weighted mean.
        self.rows = 1 / float(np.sum(self.share**2))
        self.mean = self.share @ x
        self._centred = x - self.mean

    def variance(self) -> NDArray:
        """The variance of each neuron, unbiased for equal weights: [d]."""
        return self.share @ self._centred**2 / (1 - 1 / self.rows)

    def kurtosis(self) -> float:
        """The mean over the neurons of the fourth moment over the squared variance; 3, as of Gaussians, below 4 rows.

        Its excess over 3 is corrected for the bias of few rows (G2 of Joanes and Gill 1998).
        """
        n, spread = self.rows, np.sqrt(self.share @ self._centred**2)
        varies = spread > 0
        if n < 4 or not varies.any():
            return 3.0
        excess = float(np.mean(self.share @ (self._centred[:, varies] / spread[varies]) ** 4)) - 3
        return max(3 + (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * excess + 6), 1.0)


def factors(u: Sample, v: Sample, weight: NDArray) -> tuple[float, float]:
    """What is kept of the shift and of the slopes of a module, each from 0 to 1.

    Moved by ``c shift`` in place of the true shift, the means of d neurons miss those of the target by a sum of squares
    whose expectation ``(1 - c)^2 S + c^2 E`` is lowest at ``c = S / (S + E)``: S is the sum of the squared true shifts,
    E that of the sampling variances ``var(u) / n + var(v) / m``. The sum of the squared shifts that were found has the
    expectation S + E, however neurons are correlated, so that ``c = max(0, 1 - E / sum(shift^2))`` (James and Stein
    1961, with the positive part of Baranchik 1964).

    The squared 2-Wasserstein distance weighs an error of the slope by ``var(u)``, beside that of the shift, so that
    the same holds of the slopes with the sums of ``var(u) (w - 1)^2`` and of ``var(u)`` times the sampling variance of
    w. That is ``w^2 / 4 ((k_u - 1) / (n - 1) + (k_v - 1) / (m - 1))`` by the delta method, with the kurtosis k, where
    the two distributions have the same shape: for the ratio of standard deviations and for the slope of sorted pairs.
    """
    shift = v.mean - u.mean
    u_variance, v_variance = u.variance(), v.variance()
    of_shift = _kept(shift**2, u_variance / u.rows + v_variance / v.rows)
    moved = weight != 1  # slopes that are not fitted are not by chance
    if not moved.any():
        return of_shift, 1.0
    slope, spread = weight[moved].astype(np.float64), u_variance[moved]
    chance = (u.kurtosis() - 1) / (4 * (u.rows - 1)) + (v.kurtosis() - 1) / (4 * (v.rows - 1))
    return of_shift, _kept(spread * (slope - 1) ** 2, chance * spread * slope**2)


def _kept(found: NDArray, by_chance: NDArray) -> float:
    """The positive part of 1 - by_chance / found, of the sums of both; 0 where nothing was found."""
    total = float(np.sum(found))
    return max(0.0, 1 - float(np.sum(by_chance)) / total) if total else 0.0
