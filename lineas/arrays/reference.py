"""NumPy twins of the engine's kernels: slow and readable, what the C is tested against.

A twin has the name and the arguments of its kernel in ``lineas._core`` with three differences: it takes one module
where the kernel takes a batch of them, it has no ``names`` and ``threads``, and it does not look for bad input.
uint16 stands for bfloat16 bits here too. Sums are taken in float64 and results are rounded to the working type
(float64 for float64 input, else float32).

References
----------
LinEAS: arXiv 2503.10679. AcT: arXiv 2410.23054.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .._checks import widen
from ..maps.affine import at_strength
from .quantiles import ERROR, FILLED, MOST_SLOTS, OPEN, flip


def narrow(x: NDArray, like: NDArray) -> NDArray:
    """Round `x`, float32 or float64, once to the type of `like`, where uint16 means bfloat16 bits."""
    if like.dtype != np.uint16:
        return x.astype(like.dtype)
    bits = x.astype(np.float32).view(np.uint32)
    to_even = 0x7FFF + ((bits >> 16) & 1)
    rounded = ((bits + to_even) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def sort_columns(x: NDArray) -> NDArray:
    """Sort every column of `x` [n, d] in the working type; -0 comes before +0."""
    x = widen(x)
    return np.take_along_axis(x, np.lexsort((~np.signbit(x), x), axis=0), axis=0)


def _counted(x: NDArray, mass: NDArray | None) -> tuple[NDArray, NDArray | None]:
    """The rows of `x` [n, d] that count, and their weights: one of weight 0 is not there, whatever it holds."""
    return (x, None) if mass is None else (x[mass > 0], mass[mass > 0])


def _shares(rows: int, mass: NDArray | None) -> NDArray:
    """Row masses that sum to 1; equal ones where there are none."""
    return np.full(rows, 1 / rows) if mass is None else mass / mass.sum()


def _steps(x: NDArray, mass: NDArray | None) -> tuple[NDArray, NDArray]:
    """The rows of `x` [n] in the order of its quantile function, and where in (0, 1] the step of each ends."""
    order = np.argsort(x, kind="stable")
    ends = np.cumsum(np.ones(len(x)) if mass is None else mass[order])
    return order, ends / ends[-1]


def _coupling(
    u: NDArray, v: NDArray, u_mass: NDArray | None, v_mass: NDArray | None
) -> tuple[NDArray, NDArray, NDArray]:
    """Rows i of `u` [n] and k of `v` [m] whose steps overlap (the monotone coupling), and on what mass > 0."""
    (order_u, ends_u), (order_v, ends_v) = _steps(u, u_mass), _steps(v, v_mass)
    ends = np.union1d(ends_u, ends_v)  # equal shares i / n = k / m are equal to the last bit
    ends, mass = ends[ends > 0], np.diff(ends[ends > 0], prepend=0)
    return order_u[np.searchsorted(ends_u, ends)], order_v[np.searchsorted(ends_v, ends)], mass


def wasserstein(
    u: NDArray,
    v: NDArray,
    weight: NDArray | None = None,
    bias: NDArray | None = None,
    u_mass: NDArray | None = None,
    v_mass: NDArray | None = None,
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Squared W2 of each column of (weight * u + bias) [n, d] against that of `v` [m, d], and its gradients.

    Tied entries of a column share the mean of their target quantiles, so the gradient does not depend on the order
    of the rows. Returns (value [d], gradient in u [n, d], in weight [d], in bias [d]).
    """
    rows, shape = slice(None) if u_mass is None else u_mass > 0, u.shape
    u, u_mass = _counted(widen(u), u_mass)
    v, v_mass = _counted(widen(v), v_mass)
    (n, d), dtype = u.shape, u.dtype
    weight = np.ones(d, dtype) if weight is None else weight
    bias = np.zeros(d, dtype) if bias is None else bias
    x, p = weight * u + bias, _shares(n, u_mass)
    value, grad = np.empty(d), np.zeros((n, d))
    for j in range(d):
        xj, vj = x[:, j].astype(np.float64), v[:, j].astype(np.float64)
        i, k, mass = _coupling(xj, vj, u_mass, v_mass)
        value[j] = np.sum(mass * (xj[i] - vj[k]) ** 2)
        tie = np.unique(xj, return_inverse=True)[1]
        tie_mass = np.bincount(tie[i], weights=mass, minlength=n)
        tie_target = np.bincount(tie[i], weights=mass * vj[k], minlength=n)
        some = tie_mass[tie] > 0  # rounding can leave a row without mass
        grad[some, j] = 2 * p[some] * (xj[some] - tie_target[tie][some] / tie_mass[tie][some])
    grad_u = np.zeros(shape, dtype)
    grad_u[rows] = grad * weight
    grad_weight = np.sum(grad * u, axis=0)
    grad_bias = np.sum(grad, axis=0)
    return value.astype(dtype), grad_u, grad_weight.astype(dtype), grad_bias.astype(dtype)


def affine_apply(z: NDArray, weight: NDArray, bias: NDArray, strength: float) -> NDArray:
    """z + s ((weight - 1) z + bias) on `z` [outer, d, inner], in the type of `z`."""
    work = widen(z)
    at = at_strength(weight.astype(np.float64), bias.astype(np.float64), strength)
    slope, shift = (part.astype(work.dtype)[:, None] for part in at)
    return narrow(slope * work + shift, like=z)


def affine_backward(
    z: NDArray, weight: NDArray, strength: float, grad_out: NDArray
) -> tuple[NDArray, NDArray, NDArray]:
    """Gradients of `affine_apply` in z (with its type), weight [d] and bias [d] (in the working type)."""
    work, grad = widen(z), widen(grad_out)
    slope = at_strength(weight.astype(np.float64), 0, strength)[0].astype(work.dtype)
    grad_weight = strength * np.sum(grad.astype(np.float64) * work, axis=(0, 2))
    grad_bias = strength * np.sum(grad, axis=(0, 2), dtype=np.float64)
    grad_z = narrow(slope[:, None] * grad, like=z)
    return grad_z, grad_weight.astype(work.dtype), grad_bias.astype(work.dtype)


def pool(x: NDArray, mask: NDArray | None, mode: str) -> tuple[NDArray, NDArray | None]:
    """Pool `x` [B, T, d] over the tokens where `mask` [B, T] is not zero; see ``_core.pool`` for the modes.

    Returns ([B, d], or [sum(mask), d] for "all", in the working type; the winning token [B, d] for min and max).
    """
    work = widen(x)
    batch, tokens, d = x.shape
    real = np.ones((batch, tokens), dtype=bool) if mask is None else mask != 0
    if mode == "all":
        return work[real], None
    if mode == "mean":
        return np.mean(work, axis=1, dtype=np.float64, where=real[..., None]).astype(work.dtype), None
    index = np.empty((batch, d), dtype=np.int32)
    for b in range(batch):
        at = np.flatnonzero(real[b])
        index[b] = at[-1] if mode == "last" else at[getattr(work[b, at], f"arg{mode}")(axis=0)]
    out = np.take_along_axis(work, index[:, None], axis=1)[:, 0]
    return out, None if mode == "last" else index


def pool_backward(grad_out: NDArray, mask: NDArray | None, mode: str, index: NDArray | None, tokens: int) -> NDArray:
    """Gradient of `pool` in x [B, tokens, d]: a mean spreads it, the other modes hand it to the chosen tokens."""
    if mask is None:
        mask = np.ones((len(grad_out) // tokens if mode == "all" else len(grad_out), tokens))
    grad = np.zeros((len(mask), tokens, grad_out.shape[1]), dtype=grad_out.dtype)
    if mode == "all":
        grad[mask != 0] = grad_out
        return grad
    for b, at in enumerate(map(np.flatnonzero, mask)):
        if mode == "mean":
            grad[b, at] = grad_out[b] / len(at)
        elif mode == "last":
            grad[b, at[-1]] = grad_out[b]
        else:
            assert index is not None  # min and max come with one
            np.put_along_axis(grad[b], index[None, b], grad_out[None, b], axis=0)
    return grad


def moments_update(x: NDArray, count: int, mean: NDArray, m2: NDArray, low: NDArray, high: NDArray) -> int:
    """Merge the rows of `x` [n, d] into the float64 state [d] in place; returns the new count."""
    x = widen(x).astype(np.float64)
    mean_x = x.mean(axis=0)
    m2_x = np.sum((x - mean_x) ** 2, axis=0)
    return moments_merge(count, mean, m2, low, high, len(x), mean_x, m2_x, x.min(axis=0), x.max(axis=0))


def moments_merge(
    count: int, mean: NDArray, m2: NDArray, low: NDArray, high: NDArray,
    count_b: int, mean_b: NDArray, m2_b: NDArray, low_b: NDArray, high_b: NDArray,
) -> int:  # fmt: skip
    """Merge state b into the first one in place (Chan, Golub and LeVeque 1979); returns the new count."""
    total = count + count_b
    if count_b:
        shift = mean_b - mean
        mean += shift * (count_b / total)
        m2 += m2_b + shift**2 * (count * count_b / total)
        np.minimum(low, low_b, out=low)
        np.maximum(high, high_b, out=high)
    return total


def _by_row(keys: NDArray) -> NDArray:
    """Keys [tiles, slots, rows, lanes] of a summary as [slots, rows, columns]: a copy."""
    return keys.transpose(1, 2, 0, 3).reshape(*keys.shape[1:3], -1)


def _by_tile(slots: NDArray, keys: NDArray) -> None:
    """Write slots [slots, rows, columns] back into the keys of a summary."""
    keys[...] = slots.reshape(*slots.shape[:2], keys.shape[0], -1).transpose(2, 0, 1, 3)


def _free_slot(slots: NDArray, schedule: NDArray) -> int:
    """A free slot; where there is none, two of the least equal weight become one, of the means of neighbours."""
    weights = schedule[: len(slots)]
    taken = weights > 0
    taken[schedule[OPEN]] |= schedule[FILLED] > 0
    if not taken.all():
        return int(np.argmin(taken))
    weight = min(w for w in weights if w > 0 and np.sum(weights == w) > 1)
    into, other = np.flatnonzero(weights == weight)[:2]
    merged = np.sort(np.concatenate([slots[into], slots[other]]), axis=0)
    low, high = merged[::2], merged[1::2]
    real = np.dtype(f"f{slots.itemsize}").type
    mean = flip(low).view(real) * real(0.5) + flip(high).view(real) * real(0.5)
    slots[into] = np.clip(flip(mean.view(slots.dtype)), low, high)  # halves of subnormal numbers are rounded
    schedule[into], schedule[other] = 2 * weight, 0
    schedule[ERROR] += weight
    return int(other)


def _take_row(row: NDArray, slots: NDArray, schedule: NDArray) -> None:
    """Put one row into the open slot, which is sorted and closed when it is full."""
    if schedule[FILLED] == 0:
        schedule[OPEN] = _free_slot(slots, schedule)
    slot = slots[schedule[OPEN]]
    slot[schedule[FILLED]] = row
    schedule[FILLED] = (schedule[FILLED] + 1) % len(slot)
    if schedule[FILLED] == 0:
        slot.sort(axis=0)
        schedule[schedule[OPEN]] = 1


def quantiles_update(
    x: NDArray, count: int, mean: NDArray, m2: NDArray, low: NDArray, high: NDArray, keys: NDArray, schedule: NDArray
) -> int:
    """Take the rows of `x` [n, d] into a summary in place; returns the new count."""
    slots, row = _by_row(keys), np.zeros((len(x), keys.shape[0] * keys.shape[3]), f"f{keys.itemsize}")
    row[:, : x.shape[1]] = widen(x)
    for one in flip(row.view(keys.dtype)):
        _take_row(one, slots, schedule)
    _by_tile(slots, keys)
    return moments_update(x, count, mean, m2, low, high)


def quantiles_merge(
    count: int, mean: NDArray, m2: NDArray, low: NDArray, high: NDArray, keys: NDArray, schedule: NDArray,
    count_b: int, mean_b: NDArray, m2_b: NDArray, low_b: NDArray, high_b: NDArray, keys_b: NDArray, schedule_b: NDArray,
) -> int:  # fmt: skip
    """Take summary b into the first one in place; returns the new count."""
    slots, others = _by_row(keys), _by_row(keys_b)
    for weight, other in zip(schedule_b[:MOST_SLOTS], others, strict=False):
        if weight > 0:
            at = _free_slot(slots, schedule)
            slots[at], schedule[at] = other, weight
    for row in others[schedule_b[OPEN], : schedule_b[FILLED]] if len(others) else ():
        _take_row(row, slots, schedule)
    schedule[ERROR] += schedule_b[ERROR]
    _by_tile(slots, keys)
    return moments_merge(count, mean, m2, low, high, count_b, mean_b, m2_b, low_b, high_b)


def quantiles_rows(
    count: int, mean: NDArray, m2: NDArray, low: NDArray, high: NDArray, keys: NDArray, schedule: NDArray
) -> tuple[NDArray, NDArray]:
    """The values that a summary holds [held, d], slot by slot, and their weights [held]."""
    rows, weights = [], []
    for number, slot in enumerate(_by_row(keys)):
        weight, held = schedule[number], len(slot) if schedule[number] else 0
        if number == schedule[OPEN] and schedule[FILLED]:
            weight, held = 1, schedule[FILLED]
        rows.append(flip(slot[:held, : mean.size]).view(f"f{keys.itemsize}"))
        weights.append(np.full(held, float(weight)))
    return np.concatenate(rows), np.concatenate(weights)


def quantiles_read(
    count: int, mean: NDArray, m2: NDArray, low: NDArray, high: NDArray, keys: NDArray, schedule: NDArray,
    ranks: NDArray | None, parts: int,
) -> NDArray:  # fmt: skip
    """Values at ascending `ranks` from 1 to count, or means over equal parts where these are None."""
    rows, weights = quantiles_rows(count, mean, m2, low, high, keys, schedule)
    found = np.empty((parts if ranks is None else len(ranks), mean.size), rows.dtype)
    for j, column in enumerate(rows.T):
        order = np.argsort(column, kind="stable")
        reached = np.cumsum(weights[order])
        if ranks is not None:
            found[:, j] = column[order][np.searchsorted(reached, ranks)]
            continue
        ends = np.union1d(reached, count * (np.arange(parts) + 1) / parts)
        middles = (ends + np.append(0, ends[:-1])) / 2
        values = column[order][np.searchsorted(reached, middles)].astype(np.float64)
        part = np.minimum(middles * parts // count, parts - 1).astype(int)
        found[:, j] = np.bincount(part, values * np.diff(ends, prepend=0), parts) * parts / count
    return found


def _soft(h: NDArray, l1: float) -> NDArray:
    return np.sign(h) * np.maximum(np.abs(h) - l1, 0)


def prox_sparse_group(x: NDArray, tau: float, l1: float, group: float) -> NDArray:
    """prox of tau (l1 ||x||_1 + group sqrt(d) ||x||_2) at `x` [d]: soft threshold, then group shrink."""
    soft = _soft(x, x.dtype.type(tau * l1))
    norm = np.sqrt(np.sum(soft.astype(np.float64) ** 2))
    if norm == 0:
        return np.zeros_like(x)
    return x.dtype.type(max(1 - tau * group * np.sqrt(len(x)) / norm, 0)) * soft


def step(
    weight: NDArray,
    bias: NDArray,
    grad_weight: NDArray,
    grad_bias: NDArray,
    offsets: NDArray,
    lr: float,
    l1: float,
    group: float,
    l1_bias: float,
    group_bias: float,
    adam: tuple[NDArray, NDArray, NDArray, NDArray, int, float, float, float] | None = None,
) -> tuple[float, int]:
    """One SGD or Adam step, then the prox with tau = lr, in place on flat parameters; see ``_core.step``.

    Returns (the penalty of the new parameters, the number of neurons that are not the identity).
    """
    if adam is None:
        weight -= lr * grad_weight
        bias -= lr * grad_bias
    else:
        m_weight, v_weight, m_bias, v_bias, t, beta1, beta2, eps = adam
        for x, g, m, v in ((weight, grad_weight, m_weight, v_weight), (bias, grad_bias, m_bias, v_bias)):
            m[...] = beta1 * m + (1 - beta1) * g
            v[...] = beta2 * v + (1 - beta2) * g * g
            x -= lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    penalty = 0.0
    for a, b in pairwise(offsets):
        weight[a:b] = 1 + prox_sparse_group(weight[a:b] - 1, lr, l1, group)
        bias[a:b] = prox_sparse_group(bias[a:b], lr, l1_bias, group_bias)
        for x, lam1, lam2 in ((weight[a:b] - 1, l1, group), (bias[a:b], l1_bias, group_bias)):
            x = x.astype(np.float64)
            penalty += lam1 * np.sum(np.abs(x)) + lam2 * np.sqrt(len(x)) * np.sqrt(np.sum(x * x))
    return float(penalty), int(np.count_nonzero((weight != 1) | (bias != 0)))


def _varies(variance: NDArray, mean: NDArray, rows: int, like: NDArray) -> NDArray:
    """Whether neurons vary by more than rounding, from their population variances.

    They do not below the error of means and variances summed in float64, as scikit-learn has it for constant features,
    nor where values are as close to each other as different numbers of the type of `like` can be.
    """
    eps = np.finfo(np.float64).eps
    step = 2.0**-7 if like.dtype == np.uint16 else np.finfo(like.dtype).eps
    return variance > rows * eps * variance + (rows * eps * mean) ** 2 + (step * mean) ** 2


def quantile_moments(
    source: NDArray, target: NDArray, source_mass: NDArray | None = None, target_mass: NDArray | None = None
) -> NDArray:
    """Moments of the paired quantiles of `source` [n, d] and `target` [m, d]: float64 [5, d], as ``_core`` has them."""
    like = source
    source, source_mass = _counted(widen(source).astype(np.float64), source_mass)
    target, target_mass = _counted(widen(target).astype(np.float64), target_mass)
    out = np.empty((5, source.shape[1]))
    for j, (u, v) in enumerate(zip(source.T, target.T, strict=True)):
        i, k, mass = _coupling(u, v, source_mass, target_mass)
        mean_u, mean_v = np.sum(mass * u[i]), np.sum(mass * v[k])
        x, y = u[i] - mean_u, v[k] - mean_v
        out[:, j] = mean_u, mean_v, np.sum(mass * x * x), np.sum(mass * x * y), np.sum(mass * y * y)
    out[2:4] *= _varies(out[2], out[0], len(source), like)
    return out


def fit_local(
    source: NDArray, target: NDArray, source_mass: NDArray | None, target_mass: NDArray | None, method: str
) -> tuple[NDArray, NDArray]:
    """Closed-form map of `source` [n, d] to `target` [m, d]: (weight [d], bias [d]) in the working type.

    "mean" moves the mean, "gaussian" also matches the standard deviation, "linear" is the least-squares line
    through the sorted pairs (Lin-AcT, AcT). A source column that is constant up to rounding gets slope 1 and the shift
    of the mean.
    """
    n, m, dtype = len(source), len(target), widen(source).dtype
    mean_u, mean_v, var_u, cov, var_v = quantile_moments(source, target, source_mass, target_mass)
    weight, varies = np.ones_like(mean_u), var_u > 0
    if method == "linear":
        weight[varies] = cov[varies] / var_u[varies]
    elif method == "gaussian":  # ddof = 1; with masses, the weighted population variance
        sample_u = var_u if source_mass is not None else var_u * n / (n - 1)
        sample_v = var_v if target_mass is not None else var_v * m / (m - 1)
        weight[varies] = np.sqrt(sample_v[varies] / sample_u[varies])
    weight = weight.astype(dtype)  # first: the shift goes with the slope as it is stored
    return weight, (mean_v - weight.astype(np.float64) * mean_u).astype(dtype)


def shrinkage_factors(
    source: NDArray, target: NDArray, weight: NDArray, source_mass: NDArray | None = None,
    target_mass: NDArray | None = None,
) -> tuple[float, float]:  # fmt: skip
    """What `shrinkage.factors` keeps of the shift and of the slopes `weight` [d], neuron by neuron."""
    chance, effective, means, variances = [], [], [], []
    for x, mass in ((source, source_mass), (target, target_mass)):
        p = _shares(len(x), mass)
        rows = 1 / np.sum(p**2)
        mean, variance, kurtosis = np.empty(x.shape[1]), np.empty(x.shape[1]), np.empty(x.shape[1])
        for j, column in enumerate(x.T.astype(np.float64)):
            mean[j] = np.sum(p * column)
            second, fourth = (np.sum(p * (column - mean[j]) ** power) for power in (2, 4))
            variance[j] = second * rows / (rows - 1)
            excess = fourth / second**2 - 3
            kurtosis[j] = 3 + (rows - 1) / ((rows - 2) * (rows - 3)) * ((rows + 1) * excess + 6)
        means.append(mean)
        variances.append(variance)
        effective.append(rows)
        chance.append((np.mean(kurtosis) - 1) / (4 * (rows - 1)))
    shift = np.sum((means[1] - means[0]) ** 2)
    of_shift = 1 - np.sum(variances[0] / effective[0] + variances[1] / effective[1]) / shift
    slopes = np.sum(variances[0] * (weight - 1) ** 2)
    of_slope = 1 - sum(chance) * np.sum(variances[0] * weight**2) / slopes if slopes else 1.0
    return float(max(0.0, of_shift)), float(max(0.0, of_slope))


def sparse_loss(moments: NDArray, weight: NDArray, bias: NDArray) -> float:
    """Sum over neurons of squared W2 at slopes >= 0 and shifts [d], from moments [5, d]."""
    mean_u, mean_v, var_u, cov, var_v = moments
    gap = mean_u * weight + bias - mean_v
    return float(np.sum((weight * var_u - 2 * cov) * weight + var_v + gap * gap))


def _sparse_gradient(moments: NDArray, x: NDArray, b: NDArray) -> tuple[NDArray, NDArray]:
    """Gradient of `sparse_loss` in x = weight - 1 and in b."""
    mean_u, mean_v, var_u, cov, _ = moments
    gap = mean_u * (1 + x) + b - mean_v
    return 2 * (var_u * (1 + x) - cov + mean_u * gap), 2 * gap


def kkt_distance(moments: NDArray, weight: NDArray, bias: NDArray, l1: float, group: float) -> float:
    """Distance of 0 to the subdifferential of `sparse_loss` plus penalties under weight >= 0, at a map [d]."""
    x, tau, total = weight - 1, group * np.sqrt(len(weight)), 0.0
    for part, slope, is_weight in zip((x, bias), _sparse_gradient(moments, x, bias), (True, False), strict=True):
        norm = np.linalg.norm(part)
        if norm == 0:
            total += max(float(np.linalg.norm(_soft(slope, l1))) - tau, 0.0) ** 2
            continue
        slope = slope + tau * part / norm
        left = np.where(part == 0, _soft(slope, l1), slope + l1 * np.sign(part))
        if is_weight:  # at weight 0 a slope that points out of the bound is allowed
            left = np.where(weight == 0, np.minimum(left, 0), left)
        total += float(np.sum(left**2))
    return float(np.sqrt(total))


def largest_penalty(moments: NDArray, l1_ratio: float) -> float:
    """The smallest penalty at which the sparse map is the identity, by bisection."""
    d, still = moments.shape[1], np.zeros(moments.shape[1])
    steepest = float(np.linalg.norm(_sparse_gradient(moments, still, still)))
    low, high = 0.0, steepest / max((1 - l1_ratio) * np.sqrt(d), l1_ratio / np.sqrt(d))
    while (middle := low + (high - low) / 2) > low and middle < high:
        if kkt_distance(moments, 1 + still, still, middle * l1_ratio, middle * (1 - l1_ratio)) > 0:
            low = middle
        else:
            high = middle
    return high


def _prox_bounded(v: NDArray, tau: float, l1: float, group: float) -> NDArray:
    """`prox_sparse_group` under x >= -1: the group shrink, in which entries at the bound stay there."""
    x = prox_sparse_group(v, tau, l1, group)
    if x.min() >= -1:
        return x
    soft, shrink = _soft(v, tau * l1), tau * group * np.sqrt(len(v))
    low, high = 0.0, float(np.linalg.norm(soft))  # the norm of the solution
    for _ in range(200):
        size = (low + high) / 2
        x = np.maximum(soft * size / (size + shrink), -1)
        low, high = (size, high) if np.linalg.norm(x) > size else (low, size)
    return x


def sparse_map(
    moments: NDArray, l1: float, group: float, start: tuple[NDArray, NDArray] | None = None,
    tolerance: float = 1e-9, iterations: int = 100_000,
) -> tuple[NDArray, NDArray, int]:  # fmt: skip
    """One point of the sparse path by proximal gradient steps with restarts (FISTA, Beck and Teboulle 2009).

    Returns (weight [d], bias [d], steps). Ends when `kkt_distance` is at most `tolerance`.
    """
    mean_u, _, var_u, _, _ = moments
    a = var_u + mean_u**2
    rate = 1 / np.max(a + 1 + np.sqrt((a - 1) ** 2 + 4 * mean_u**2))  # largest curvature: of [[2 a, 2 m], [2 m, 2]]
    x, b = (np.zeros(len(a)), np.zeros(len(a))) if start is None else (start[0] - 1, start[1].copy())
    ahead_x, ahead_b, momentum = x, b, 1.0
    for k in range(iterations):
        if k % 10 == 0 and kkt_distance(moments, 1 + x, b, l1, group) <= tolerance:
            return 1 + x, b, k
        slope_x, slope_b = _sparse_gradient(moments, ahead_x, ahead_b)
        new_x = _prox_bounded(ahead_x - rate * slope_x, rate, l1, group)
        new_b = prox_sparse_group(ahead_b - rate * slope_b, rate, l1, group)
        uphill = np.sum((ahead_x - new_x) * (new_x - x)) + np.sum((ahead_b - new_b) * (new_b - b)) > 0
        following = 1.0 if uphill else (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        push = 0.0 if uphill else (momentum - 1) / following
        ahead_x, ahead_b = new_x + push * (new_x - x), new_b + push * (new_b - b)
        x, b, momentum = new_x, new_b, following
    return 1 + x, b, iterations


def sparse_path(
    moments: NDArray, penalties: NDArray, l1_ratio: float, tolerance: float = 1e-9
) -> tuple[NDArray, NDArray, NDArray]:
    """Points of the sparse path of one module: weight [K, d], bias [K, d] and loss [K], by `sparse_map`."""
    start, points = None, []
    for penalty in penalties:
        weight, bias, _ = sparse_map(moments, penalty * l1_ratio, penalty * (1 - l1_ratio), start, tolerance)
        start = (weight, bias)
        points.append((weight, bias, sparse_loss(moments, weight, bias)))
    weights, biases, losses = zip(*points, strict=True)
    return np.array(weights), np.array(biases), np.array(losses)


def covariance(x: NDArray, mass: NDArray | None = None) -> tuple[NDArray, NDArray]:
    """(mean [d], covariance [d, d]) in float64; ddof = 1, with `mass` the weighted population covariance."""
    x = widen(x).astype(np.float64)
    p = _shares(len(x), mass)
    mean = p @ x
    centred = x - mean
    cov = (p[:, None] * centred).T @ centred
    cov = (cov + cov.T) / 2
    return mean, cov if mass is not None else cov * (len(x) / (len(x) - 1))


def bures_map(cov_source: NDArray, cov_target: NDArray, ridge: float = 0.0) -> NDArray:
    """Symmetric A [d, d] with A (cov_source + ridge I) A = cov_target + ridge I: optimal transport of Gaussians.

    Directions without variance in the source (eigenvalue <= d eps max) are mapped to zero.
    """
    d = len(cov_source)
    values, vectors = np.linalg.eigh(cov_source + ridge * np.eye(d))
    keep = values > d * np.finfo(np.float64).eps * values[-1]
    root = np.sqrt(np.where(keep, values, 0))
    inverse_root = np.where(keep, 1 / np.where(keep, root, 1), 0)
    middle = (root[:, None] * (vectors.T @ (cov_target + ridge * np.eye(d)) @ vectors)) * root
    inner, basis = np.linalg.eigh(middle)
    half = inverse_root[:, None] * basis
    matrix = (half * np.sqrt(np.maximum(inner, 0))) @ half.T
    matrix = vectors @ matrix @ vectors.T
    return (matrix + matrix.T) / 2
