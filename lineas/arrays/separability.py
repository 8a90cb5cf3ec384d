"""How well activations tell source from target: ROC areas, and a logistic regression that needs NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_STEPS, _INNER = 100, 60
_CLOSE = 1e-9  # of the gradient, where the mean loss is about 1


def roc_area(positive: NDArray, negative: NDArray) -> NDArray[np.float64]:
    """The share of pairs in which the positive row is larger, ties counted half (Mann and Whitney): [d]."""
    # Twice the count of pairs is an integer, and exact.
    doubled = np.empty(positive.shape[1])
    for k, (above, below) in enumerate(zip(positive.T, np.sort(negative, axis=0).T, strict=True)):
        doubled[k] = sum(np.searchsorted(below, above, side).sum() for side in ("left", "right"))
    return doubled / (2 * len(positive) * len(negative))


def sigmoid(x: NDArray) -> NDArray:
    """1 / (1 + exp(-x)), without a warning where exp overflows."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def logistic_regression(
    x: NDArray, y: NDArray, mass: NDArray, ridge: float, start: tuple[NDArray, float] | None = None
) -> tuple[NDArray[np.float64], float]:
    """The weight [d] and bias that minimise sum_i mass_i loss(y_i, x_i weight + bias) + ridge / 2 |weight|^2.

    The loss is the logistic one, -y log g - (1 - y) log(1 - g); y may be any numbers from 0 to 1, the mass sums to 1.
    Newton's method, whose steps are solved by conjugate gradients. The preconditioner is the diagonal of the largest
    Hessian that can be, so uncorrelated columns, such as principal components, need few of them. scikit-learn's C is
    1 / (ridge n) where every mass is 1 / n.
    """
    weight, bias = (np.zeros(x.shape[1]), 0.0) if start is None else (start[0].copy(), start[1])
    columns = np.append(mass @ np.square(x) / 4 + ridge, 0.25)
    columns[columns == 0] = 1.0

    def loss(w: NDArray, b: float) -> float:
        t = x @ w + b
        return float(mass @ (np.logaddexp(0, t) - y * t) + ridge / 2 * (w @ w))

    value = loss(weight, bias)
    for _ in range(_STEPS):
        g = sigmoid(x @ weight + bias)
        apart, curve = mass * (g - y), mass * g * (1 - g)
        gradient = np.append(apart @ x + ridge * weight, apart.sum())
        size = float(np.abs(gradient).max())
        if size <= _CLOSE:
            break

        def hessian(v: NDArray, curve: NDArray = curve) -> NDArray:
            along = curve * (x @ v[:-1] + v[-1])
            return np.append(along @ x + ridge * v[:-1], along.sum())

        step = _conjugate_gradients(hessian, -gradient, columns, min(0.1, np.sqrt(size)))
        length, slope = 1.0, float(gradient @ step)
        while True:
            new = weight + length * step[:-1], bias + length * float(step[-1])
            found = loss(*new)
            if found <= value + 1e-4 * length * slope or length < 1e-10:
                break
            length /= 2
        if not found < value:  # rounding: as near as float64 gets
            break
        (weight, bias), value = new, found
    return weight, bias


def _conjugate_gradients(product, wanted: NDArray, columns: NDArray, tolerance: float) -> NDArray:  # type: ignore[no-untyped-def]
    """What `product` makes `wanted` of, to a relative tolerance; preconditioned by dividing by `columns`."""
    found, left = np.zeros_like(wanted), wanted.copy()
    scaled = left / columns
    direction, rest = scaled.copy(), float(left @ scaled)
    goal = rest * tolerance**2
    for _ in range(_INNER):
        made = product(direction)
        curved = float(direction @ made)
        if curved <= 0:  # flat, to rounding
            return found if found.any() else scaled
        found += rest / curved * direction
        left -= rest / curved * made
        scaled = left / columns
        before, rest = rest, float(left @ scaled)
        if rest <= goal:
            break
        direction = scaled + rest / before * direction
    return found


def principal_components(x: NDArray, mass: NDArray, most: int | None = None) -> NDArray[np.float64]:
    """Unit directions [d, k] of falling variance of rows [n, d] about 0, as many as there are and at most `most`."""
    weighted = x * np.sqrt(mass)[:, None]
    n, d = x.shape
    if d <= n:
        variances, directions = np.linalg.eigh(weighted.T @ weighted)
        keep = variances > max(variances[-1], 0) * d * np.finfo(np.float64).eps
        found = directions[:, keep][:, ::-1]
    else:
        variances, rows = np.linalg.eigh(weighted @ weighted.T)
        keep = variances > max(variances[-1], 0) * n * np.finfo(np.float64).eps
        found = (weighted.T @ (rows[:, keep] / np.sqrt(variances[keep])))[:, ::-1]
    return np.ascontiguousarray(found[:, :most])


def group_folds(groups: Sequence[int], folds: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """The fold [n] of each of n groups, in random order; every fold gets about as many rows, of which a group has some.

    The largest groups are dealt first, each to the fold with the fewest rows so far.
    """
    fold, rows = np.empty(len(groups), np.intp), np.zeros(folds, np.intp)
    order = rng.permutation(len(groups))
    for k in order[np.argsort(-np.asarray(groups)[order], kind="stable")]:
        fold[k] = int(rows.argmin())
        rows[fold[k]] += max(groups[k], 1)
    return fold
