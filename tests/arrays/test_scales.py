"""Neurons that are constant up to rounding, rows of weight zero, and numbers of any size."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from samples import encode

import lineas
from lineas import _core
from lineas.arrays import reference

METHODS = ("mean", "gaussian", "linear")


def fit_local(source, target, method, u_mass=None, v_mass=None):
    """The engine's map of one module."""
    masses = (None if mass is None else [mass] for mass in (u_mass, v_mass))
    weights, biases = _core.fit_local([source], [target], *masses, method, ["u"], ["v"], 1)
    return weights[0], biases[0]


# --- constant up to rounding ---


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_a_neuron_of_rounding_is_constant(rng, dtype, method, weighted):
    """Whatever its size: its values are one step of their type apart, and the next step is another value."""
    step = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    sizes = np.array([0.72, -0.72, 1.0, 1.99, -5e3, 3e-3])
    exponents = np.exp2(np.floor(np.log2(np.abs(sizes))))
    noise = np.where(rng.uniform(size=(32, 6)) < 0.2, 1.0, 0.0)
    noise[:2] = [[0], [1]]
    nearest = reference.widen(encode(sizes, dtype)).astype(np.float64)
    source, target = encode(nearest + step * exponents * noise, dtype), encode(rng.normal(size=(40, 6)), dtype)
    assert all(len(np.unique(column)) == 2 for column in source.T)
    mass = rng.uniform(0.1, 1, size=32) if weighted else None
    for fitted in (fit_local(source, target, method, mass), reference.fit_local(source, target, mass, None, method)):
        np.testing.assert_array_equal(fitted[0], 1)
        gap = np.mean(reference.widen(target), axis=0, dtype=np.float64) - nearest
        np.testing.assert_allclose(fitted[1], gap, atol=8 * step * np.abs(sizes).max())
    moments = _core.quantile_moments([source], [target], None if mass is None else [mass], None, ["u"], ["v"], 1)[0]
    np.testing.assert_array_equal(moments[2:4], 0)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_a_neuron_of_a_few_steps_is_not(dtype):
    step = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    values = np.arange(-16, 17, dtype=np.float64)[:, None]
    source, target = encode(1 + 64 * step * (values + 16), dtype), encode(values, dtype)
    slope = fit_local(source, target, "linear")[0]
    np.testing.assert_allclose(slope, reference.fit_local(source, target, None, None, "linear")[0], rtol=1e-6)
    np.testing.assert_allclose(slope, 1 / (64 * step), rtol=0.3 if dtype == "bfloat16" else 1e-6)


def test_a_new_value_of_a_constant_neuron_stays_where_it_is(rng):
    source = np.full((32, 1), 0.7, np.float32)
    source[5] = np.nextafter(np.float32(0.7), np.float32(1))
    target = rng.normal(size=(32, 1)).astype(np.float32)
    for method in METHODS:
        moved = lineas.fit(source, target, method=method).transform(np.array([[0.72]], np.float32))
        np.testing.assert_allclose(moved, 0.02 + target.mean(), atol=1e-6)
    sparse = lineas.fit(source, target, l1=1e-6)
    assert abs(sparse.weight[0]) < 5  # at most what takes 0.7 to the mean of the target
    assert len(lineas.sparse_path(source, target, n_penalties=5).loss) == 5


def test_an_estimator_of_a_constant_neuron(rng):
    pytest.importorskip("sklearn")
    rows = np.concatenate([np.nextafter(np.full((32, 1), 0.7), np.arange(32)[:, None] % 2), rng.normal(size=(32, 1))])
    one = lineas.AffineTransport(source="u").fit(rows, ["u"] * 32 + ["v"] * 32)
    assert one.weight_.tolist() == [1]


def test_constant_agrees_with_scikit_learn(rng):
    """In float64, where both sum in the type of the data."""
    is_constant = pytest.importorskip("sklearn.preprocessing._data")._is_constant_feature
    for size in 10.0 ** np.arange(0, 14):
        source = size + rng.normal(size=(50, 4)) * 1e-2
        slope = fit_local(source, rng.normal(size=(50, 4)), "gaussian")[0]
        np.testing.assert_array_equal(slope == 1, is_constant(source.var(0), source.mean(0), 50))


# --- rows of weight zero ---


@pytest.mark.parametrize("outside", [1e6, 1e12, 1e20, -1e12, np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [5, 40, 1200])
def test_rows_of_weight_zero_are_not_there(rng, n, dtype, outside):
    """The bits are those of the samples without them, wherever they stand and whatever they hold."""
    m = n + 3
    u, v = rng.normal(size=(n, 9)).astype(dtype), rng.normal(1, 2, size=(m, 9)).astype(dtype)
    p, q = rng.uniform(0.1, 1, size=n), rng.uniform(0.1, 1, size=m)
    for x, mass in ((u, p), (v, q)):
        gone = rng.permutation(len(x))[: len(x) // 3] if outside < 0 else np.r_[0, 2, len(x) - 1]
        x[gone], mass[gone] = outside, 0
    some_u, some_v = u[p > 0], v[q > 0]
    value, grad = lineas.wasserstein_grad(u, v, u_weights=p, v_weights=q)
    some, some_grad = lineas.wasserstein_grad(some_u, some_v, u_weights=p[p > 0], v_weights=q[q > 0])
    assert np.array_equal(value, some) and np.array_equal(grad[p > 0], some_grad) and not grad[p == 0].any()
    twin = reference.wasserstein(u, v, u_mass=p, v_mass=q)
    np.testing.assert_allclose(value, twin[0], rtol=1e-5)
    np.testing.assert_allclose(grad, twin[1], rtol=1e-4, atol=1e-5)
    for method in METHODS:
        one = lineas.fit(u, v, method=method, source_weights=p, target_weights=q)
        assert one == lineas.fit(some_u, some_v, method=method, source_weights=p[p > 0], target_weights=q[q > 0])
        np.testing.assert_allclose(one.weight, reference.fit_local(u, v, p, q, method)[0], rtol=1e-5)
    sparse = lineas.fit(u, v, l1=0.01, source_weights=p, target_weights=q)
    assert sparse == lineas.fit(some_u, some_v, l1=0.01, source_weights=p[p > 0], target_weights=q[q > 0])


def test_rows_of_weight_zero_against_pot(rng):
    ot = pytest.importorskip("ot")
    u, v, p, q = rng.normal(size=(30, 4)), rng.normal(2, size=(30, 4)), rng.uniform(size=30), rng.uniform(size=30)
    for x, mass in ((u, p), (v, q)):
        x[-1], mass[-1] = 1e12, 0
    expected = ot.wasserstein_1d(u[:-1], v[:-1], p[:-1] / p.sum(), q[:-1] / q.sum(), p=2)
    np.testing.assert_allclose(lineas.wasserstein(u, v, u_weights=p, v_weights=q), expected, rtol=1e-11)


def test_a_value_in_a_row_that_counts_is_still_refused(rng):
    u, v = rng.normal(size=(4, 2)), rng.normal(size=(4, 2))
    u[0, 0], u[2, 1] = np.nan, np.nan
    for call in (
        lambda: lineas.fit(u, v, source_weights=[0, 1, 1, 1]),
        lambda: lineas.wasserstein(u, v, u_weights=[0, 1, 1, 1]),
    ):
        with pytest.raises(ValueError, match=r": nan at row 2, column 1"):
            call()


def test_one_row_that_counts_is_constant(rng):
    u, v = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))
    for method in METHODS:
        one = lineas.fit(u, v, method=method, source_weights=[0, 0, 2, 0])
        np.testing.assert_array_equal(one.weight, 1)
        np.testing.assert_allclose(one.bias, v.mean(0) - u[2], atol=1e-14)


# --- numbers of any size ---


@pytest.mark.parametrize("weights", [[5e-324, 5e-324, 1e-323], [1e-310, 1e-310, 2e-310], [1e307, 1e307, 2e307]])
def test_weights_of_any_size(rng, weights):
    u, v = rng.normal(size=(3, 4)), rng.normal(size=(5, 4))
    expected = lineas.wasserstein_grad(u, v, u_weights=[1, 1, 2])
    for ours, theirs in zip(lineas.wasserstein_grad(u, v, u_weights=weights), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-14)
    for method in METHODS:
        one = lineas.fit(u, v, method=method, source_weights=weights)
        np.testing.assert_allclose(one.weight, lineas.fit(u, v, method=method, source_weights=[1, 1, 2]).weight)


@pytest.mark.parametrize(("n", "m"), [(32, 32), (32, 40), (1, 32), (300, 300), (300, 70)])
def test_squares_beyond_float32_have_a_mean_within(rng, n, m):
    u, v = np.full((n, 3), 1e19, np.float32), np.zeros((m, 3), np.float32)
    value, grad = lineas.wasserstein_grad(u, v)
    np.testing.assert_allclose(value, 1e38, rtol=1e-6)
    np.testing.assert_allclose(grad, 2e19 / n, rtol=1e-6)
    weighted = lineas.wasserstein_grad(u, v, u_weights=rng.uniform(0.5, 1, n))
    np.testing.assert_allclose(weighted[0], 1e38, rtol=1e-6)
    normal = (5e18 * rng.normal(size=(n, 3))).astype(np.float32)
    expected = reference.wasserstein(normal, v)
    for ours, theirs in zip(lineas.wasserstein_grad(normal, v), expected[:2], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_squares_beyond_float64(rng):
    u, v = 1e154 * rng.uniform(-1, 1, size=(32, 3)), 1e154 * rng.uniform(-1, 1, size=(40, 3))
    value, grad = lineas.wasserstein_grad(u, v)
    small, small_grad = lineas.wasserstein_grad(u * 2.0**-512, v * 2.0**-512)
    np.testing.assert_allclose(value * 2.0**-512 * 2.0**-512, small, rtol=1e-14)
    np.testing.assert_allclose(grad * 2.0**-512, small_grad, rtol=1e-13)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-162, 1e-160, 1e-155, 1e155, 1e160, 1e300])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weighted", [False, True])
def test_slopes_of_any_scale(rng, scale, method, weighted):
    """By exact rational arithmetic."""
    u, v = scale * rng.normal(size=(6, 3)), 3 * scale * rng.normal(size=(6, 3))
    mass = np.array([1.0, 1, 1, 1, 1, 1]) if weighted else None
    one = lineas.fit(u, v, method=method, source_weights=mass, target_weights=mass)
    for j in range(3):
        x, y = (sorted(map(Fraction, column)) for column in (u[:, j].tolist(), v[:, j].tolist()))
        mean_x, mean_y = sum(x) / 6, sum(y) / 6
        var_x, var_y = sum((a - mean_x) ** 2 for a in x), sum((b - mean_y) ** 2 for b in y)
        cov = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
        slope = {"mean": 1.0, "gaussian": float(var_y / var_x) ** 0.5, "linear": float(cov / var_x)}[method]
        np.testing.assert_allclose(one.weight[j], slope, rtol=1e-14)
        shift = float(mean_y - Fraction(float(one.weight[j])) * mean_x)
        np.testing.assert_allclose(one.bias[j], shift, atol=1e-14 * scale)


# Multiples of 1/8 up to 64: their squares, and products of those with 1 / (n m), are exact at any scale in between.
grid = st.integers(-512, 512).map(lambda k: k / 8)
powers = st.integers(-500, 500)


@st.composite
def pairs(draw):
    """Two samples in float64, and weights of their rows or None."""
    d = draw(st.integers(1, 9))
    sizes = [draw(st.integers(2, 40)) for _ in range(2)]
    samples = [draw(arrays(np.float64, (n, d), elements=grid)) for n in sizes]
    weights = [draw(arrays(np.float64, n, elements=st.integers(1, 8))) for n in sizes]
    return *samples, *(weights if draw(st.booleans()) else (None, None))


@given(pairs(), powers, powers, st.sampled_from(METHODS))
def test_maps_of_samples_times_powers_of_two(pair, k, l, method):
    u, v, p, q = pair
    one = lineas.fit(u, v, method=method, source_weights=p, target_weights=q)
    if method == "mean":
        l = k
    scaled = lineas.fit(np.ldexp(u, k), np.ldexp(v, l), method=method, source_weights=p, target_weights=q)
    varies = np.ptp(u, axis=0) > 0  # a constant neuron keeps slope 1
    np.testing.assert_array_equal(scaled.weight[varies], np.ldexp(one.weight[varies], l - k))
    np.testing.assert_array_equal(scaled.bias[varies], np.ldexp(one.bias[varies], l))


@given(pairs(), powers)
def test_losses_of_samples_times_powers_of_two(pair, k):
    u, v, p, q = pair
    value, grad = lineas.wasserstein_grad(u, v, u_weights=p, v_weights=q)
    scaled, scaled_grad = lineas.wasserstein_grad(np.ldexp(u, k), np.ldexp(v, k), u_weights=p, v_weights=q)
    np.testing.assert_array_equal(scaled, np.ldexp(value, 2 * k))
    np.testing.assert_array_equal(scaled_grad, np.ldexp(grad, k))


@given(pairs(), powers)
def test_moments_of_samples_times_powers_of_two(pair, k):
    """What a sparse path depends on: its losses and supports follow."""
    u, v, p, q = pair
    masses = (None if p is None else [p], None if q is None else [q], ["u"], ["v"], 1)
    moments = _core.quantile_moments([u], [v], *masses)[0]
    scaled = _core.quantile_moments([np.ldexp(u, k)], [np.ldexp(v, k)], *masses)[0]
    np.testing.assert_array_equal(scaled, np.ldexp(moments, np.array([[k], [k], [2 * k], [2 * k], [2 * k]])))
