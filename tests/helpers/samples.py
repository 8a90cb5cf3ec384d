"""Random samples in the four input types of the engine, and every kernel run once on a fixed set of them."""

import hashlib

import numpy as np

from lineas import _core
from lineas.arrays.quantiles import MOST_SLOTS
from lineas.arrays.reference import narrow, widen

DTYPES = ("float32", "float64", "float16", "bfloat16")

# Per working type: what two ways to sum and round may differ by, relative to the size of the numbers.
TOLERANCE = {np.dtype(np.float32): 3e-6, np.dtype(np.float64): 1e-12}


def encode(x, dtype):
    """float64 numbers as the engine takes them: bfloat16 as uint16 bits."""
    if dtype == "bfloat16":
        return narrow(x.astype(np.float32), np.empty(0, np.uint16))
    return x.astype(dtype)


def sample(rng, n, d, dtype="float32", *, ties=False):
    """Normal numbers [n, d]; with `ties` a few values only."""
    x = rng.normal(size=(n, d)) * rng.uniform(0.5, 2, size=d) + rng.normal(size=d)
    return encode(x.round() if ties else x, dtype)


def assert_close(actual, expected, scale=1.0):
    """Same dtype and shape, and equal to the rounding of the working type."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    tolerance = TOLERANCE[expected.dtype]
    np.testing.assert_allclose(actual, expected, rtol=tolerance * scale, atol=tolerance * scale)


def assert_same_bits(actual, expected):
    """Equal to the last bit, the sign of zeros included."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def empty_summary(d, slots, dtype, rows=32):
    """Count, moments, keys and schedule of a summary that has seen nothing, for values of dtype float32 or float64."""
    bytes_each = np.dtype(dtype).itemsize
    lanes = 64 // bytes_each
    keys = np.zeros((-(-d // lanes), slots, rows, lanes), f"i{bytes_each}")
    moments = np.zeros(d), np.zeros(d), np.full(d, np.inf), np.full(d, -np.inf)
    return [0, *moments, keys, np.zeros(MOST_SLOTS + 3, np.int64)]


def summarise(x, slots, threads):
    """A summary that has seen the rows of x."""
    summary = empty_summary(x.shape[1], slots, widen(x[:1]).dtype)
    summary[0] = _core.quantiles_update(x, *summary, "x", threads)
    return summary


def all_kernels(threads, seed=0, scale=1):
    """Results of every kernel of our own (not BLAS products) on fixed data, as a flat list of arrays."""
    rng = np.random.default_rng(seed)
    out = []
    for dtype in DTYPES:
        work = widen(encode(np.zeros(1), dtype)).dtype
        us = [sample(rng, n, d * scale, dtype) for n, d in ((32, 70), (33, 16), (7, 100), (300, 9))]
        vs = [sample(rng, n, d * scale, dtype, ties=True) for n, d in ((32, 70), (40, 16), (7, 100), (128, 9))]
        names = [str(k) for k in range(len(us))]
        weight = [rng.normal(size=u.shape[1]).astype(work) for u in us]
        bias = [rng.normal(size=u.shape[1]).astype(work) for u in us]
        masses = [rng.uniform(size=len(u)) for u in us]
        out += _core.sort_columns(us, names, threads)
        for u_mass in (None, masses):
            for part in _core.wasserstein(us, vs, weight, bias, u_mass, None, False, 2, names, names, threads):
                out += part
            for method in ("mean", "gaussian", "linear"):
                for part in _core.fit_local(us, vs, u_mass, None, method, names, names, threads):
                    out += part
        z = us[0].reshape(8, 14 * scale, 20)
        grad = vs[0].reshape(z.shape)
        w, b = rng.normal(size=(2, 14 * scale)).astype(work)
        out.append(_core.affine_apply(z, w, b, 0.7, threads))
        out += _core.affine_backward(z, w, 0.7, grad, True, threads)
        x = us[0].reshape(4, 8, 70 * scale)
        mask = (rng.uniform(size=(4, 8)) < 0.6).astype(np.uint8)
        mask[:, 3] = 1
        for mode in ("mean", "min", "max", "last", "all"):
            pooled, index = _core.pool(x, mask, mode, threads)
            out += [pooled, _core.pool_backward(pooled, mask, mode, index, 8, threads)]
        d = us[3].shape[1]
        state = [np.zeros(d), np.zeros(d), np.full(d, np.inf), np.full(d, -np.inf)]
        count = _core.moments_update(us[3], 0, *state, "x", threads)
        count = _core.moments_update(vs[3], count, *state, "x", threads)
        out += [np.array(count), *state]
        summary, other = summarise(us[3], 8, threads), summarise(vs[3], 8, threads)
        summary[0] = _core.quantiles_merge(*summary, *other, threads)
        out += [np.array(summary[0]), *summary[1:], *_core.quantiles_rows(*summary, threads)]
        out.append(_core.quantiles_read(*summary, np.arange(1, summary[0], 7), 1, threads))
        out.append(_core.quantiles_read(*summary, None, 50, threads))
    for dtype in (np.float32, np.float64):
        size = 1000 * scale
        offsets = np.array([0, 300, 301, size])
        w, b, gw, gb = rng.normal(size=(4, size)).astype(dtype)
        adam = (*np.zeros((4, size), dtype), 1, 0.9, 0.99, 1e-8)
        out.append(_core.prox_sparse_group(w, 0.1, 0.5, 0.3))
        for moments in (None, adam):
            out.append(np.array(_core.step(w, b, gw, gb, offsets, 0.1, 0.5, 0.1, 0.3, 0.2, moments, threads)))
            out += [w.copy(), b.copy()]
    return out


def special_values(threads):
    """Results of the streaming kernels on NaN, infinities, negative zeros and denormals, in every lane."""
    out = []
    for dtype in DTYPES:
        x = sample(np.random.default_rng(1), 12 * 37, 1, dtype).reshape(1, 12, 37)
        numbers = encode(np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, -1e-40, 6e-8]), dtype)
        for j in range(37):
            x[0, j % 11, j] = numbers[j % 7]
        w = np.linspace(-1, 1, 37).astype(widen(x).dtype)
        out.append(_core.affine_apply(x[0][..., None], w, -w, 1.0, threads))
        for mode in ("mean", "min", "max"):
            out += _core.pool(x, None, mode, threads)[: 1 if mode == "mean" else 2]
        state = [np.zeros(37), np.zeros(37), np.full(37, np.inf), np.full(37, -np.inf)]
        _core.moments_update(np.tile(numbers[3:], (260, 10))[:, :37].copy(), 0, *state, "x", threads)
        out += state
    for dtype in (np.float32, np.float64):
        b = np.resize(np.array([-0.0, 0.0, 1e-45, -1e-40, 1e-310], dtype), 37)
        w, zero = 1 + b, np.zeros(37, dtype)
        out.append(np.array(_core.step(w, b, zero, zero.copy(), np.array([0, 1, 37]), 0.1, 0, 0, 0, 0, None, threads)))
        out += [w, b]
    return out


def fingerprint(arrays):
    """Equal exactly if every array has the same type, shape and bits."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def digest(threads, seed=0, scale=1):
    """One fingerprint of `all_kernels`."""
    return fingerprint(all_kernels(threads, seed, scale))


def w2(u, v, weight=None, bias=None, u_mass=None, v_mass=None, v_sorted=False, gradient=2, threads=1):
    """`_core.wasserstein` of one module."""
    parts = _core.wasserstein(
        [u],
        [v],
        None if weight is None else [weight],
        None if bias is None else [bias],
        None if u_mass is None else [u_mass],
        None if v_mass is None else [v_mass],
        v_sorted,
        gradient,
        ["u"],
        ["v"],
        threads,
    )
    return tuple(None if part is None else part[0] for part in parts)
