"""Numbers near the ends of their type's range: right results, or an error that says why there is none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lineas
from lineas.arrays import reference

# Powers of two by which small integers, and what is computed from them, can be multiplied within a type.
EXPONENTS = {np.float64: (-1060, 1010), np.float32: (-140, 115), np.float16: (-20, 4)}
seeds = st.integers(0, 2**32 - 1)


@st.composite
def scaled(draw, rows=(2, 40, 300), dtypes=tuple(EXPONENTS)):
    """Integers [n, d] up to 512, and the exponents of the powers of two that their columns are multiplied by."""
    dtype, n, d = draw(st.sampled_from(dtypes)), draw(st.sampled_from(rows)), draw(st.integers(1, 20))
    x = np.random.default_rng(draw(seeds)).integers(-512, 513, size=(n, d)).astype(np.float64)
    if draw(st.booleans()):
        x[:, 0] = x[0, 0]
    low, high = EXPONENTS[dtype]
    common, own = draw(st.integers(low, high)), draw(st.booleans())
    exponents = np.random.default_rng(draw(seeds)).integers(low, high + 1, size=d) if own else np.full(d, common)
    return x, exponents, np.ldexp(x, exponents).astype(dtype)


def ldexp(x, exponent):
    with np.errstate(over="ignore"):
        return np.ldexp(x, exponent)


@given(scaled())
def test_moments(case):
    x, exponents, given = case
    seen = lineas.moments(given)
    size = ldexp(np.abs(x).max(0), exponents)
    assert (np.abs(seen.mean - ldexp(x.mean(0), exponents)) <= 1e-6 * size).all()
    variance = ldexp(x.var(0, ddof=1), 2 * exponents)
    if np.isfinite(ldexp(np.sum((x - x.mean(0)) ** 2, 0), 2 * exponents)).all():
        np.testing.assert_allclose(seen.variance(), variance, rtol=1e-6, atol=1e-320)
    else:
        with pytest.raises(ValueError, match=r"squared deviations of neuron \d+ are out of the range of float64"):
            seen.variance()


@pytest.mark.parametrize("n", [2, 255, 256, 300, 5000])
@pytest.mark.parametrize("value", [1e38, -3.4e38, 1e-45, 0.1, 0.0, 1e308, 5e-324])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moments_of_a_constant(n, value, dtype):
    if abs(value) > 1e40 or 0 < abs(value) < 1e-45:
        dtype = np.float64
    x = np.full((n, 17), value, dtype)
    seen = lineas.moments(x)
    assert (seen.mean == x[0]).all() and not seen.variance().any()


def test_moments_between_the_ends():
    end = np.finfo(np.float64).max
    seen = lineas.moments([np.full((1, 1), end), np.full((1, 1), -end)])
    assert seen.mean[0] == 0 and seen.max[0] == end
    assert abs(lineas.moments(np.array([[end], [-end]] * 200)).mean[0]) < 1e-15 * end
    assert lineas.moments(np.full((3, 1), end)).mean[0] == end


@given(scaled(), st.booleans(), seeds, st.sampled_from([-1074, -1040, -600, 0, 900]))
def test_covariance(case, weighted, seed, exponent):
    x, exponents, given = case
    shares = np.random.default_rng(seed).integers(0, 9, size=len(x)) + (np.arange(len(x)) == 0)
    weights = ldexp(shares.astype(np.float64), exponent) if weighted else None
    centred = x - (np.average(x, axis=0, weights=shares) if weighted else x.mean(0))
    usual = (shares[:, None] * centred).T @ centred / shares.sum() if weighted else np.cov(x.T).reshape(2 * x.shape[1:])
    expected = ldexp(usual, exponents[:, None] + exponents)
    if np.isfinite(expected).all():
        got = lineas.covariance(given, weights=weights)
        error = np.abs(np.ldexp(got, -exponents[:, None] - exponents) - usual)
        tiny = exponents[:, None] + exponents < -900  # rounded to subnormal numbers, or to 0
        assert (error[~tiny] <= 1e-9 * np.abs(x).max() ** 2).all()
        np.testing.assert_allclose(got[tiny], expected[tiny], atol=1e-280)
    else:
        with pytest.raises(ValueError, match="x: numbers so large or small that a result is out of range"):
            lineas.covariance(given, weights=weights)


@settings(max_examples=30)
@given(seeds, st.integers(-1000, 1000), st.integers(-1000, 1000), st.sampled_from([0.0, 0.3]))
def test_bures_map(seed, at_u, at_v, ridge):
    rng = np.random.default_rng(seed)
    u, v = rng.integers(-64, 65, size=(2, 30, 4)).astype(np.float64)
    if ridge:
        at_v, ridge = at_u, ridge * 2.0 ** (2 * max(min(at_u, 500), -500))
        at_u = at_v = max(min(at_u, 500), -500)
    usual = lineas.bures_map(u, v, ridge=ridge * 2.0 ** (-2 * at_u) if ridge else 0.0)
    if abs(at_v - at_u) > 1010:
        if at_v > at_u:
            with pytest.raises(ValueError, match="differ so much in scale"):
                lineas.bures_map(np.ldexp(u, at_u), np.ldexp(v, at_v))
        return
    got = lineas.bures_map(np.ldexp(u, at_u), np.ldexp(v, at_v), ridge=ridge)
    np.testing.assert_allclose(np.ldexp(got.matrix, at_u - at_v), usual.matrix, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(np.ldexp(got.bias, -at_v), usual.bias, rtol=1e-9, atol=1e-8)


def test_bures_map_without_variance_in_some_directions(rng):
    """They are mapped to the mean of the target: the least norm among all maps that match the rest."""
    source, target = rng.normal(size=(4, 7)), rng.normal(size=(50, 7))
    found = lineas.bures_map(source, target)
    values, vectors = np.linalg.eigh(np.cov(source.T))
    none = vectors[:, values < 1e-12]
    assert none.shape == (7, 4)
    np.testing.assert_allclose(found.matrix @ none, 0, atol=1e-10)
    np.testing.assert_allclose(found.transform(source.mean(0) + none.T), np.tile(target.mean(0), (4, 1)), atol=1e-9)


@given(seeds, st.sampled_from([np.float32, np.float64]), st.floats(0, 1), st.floats(0, 1), st.data())
def test_prox(seed, dtype, l1, group, data):
    rng = np.random.default_rng(seed)
    x = rng.integers(-512, 513, size=rng.integers(1, 1200)).astype(dtype)
    low, high = (-110, 115) if dtype == np.float32 else (-1000, 1010)
    exponent = data.draw(st.integers(low, high))
    usual = reference.prox_sparse_group(x.astype(np.float64), 20.0, l1, group)
    got = lineas.prox_sparse_group(np.ldexp(x, exponent), tau=np.ldexp(20.0, exponent), l1=l1, group=group)
    np.testing.assert_allclose(np.ldexp(got, -exponent), usual, rtol=1e-5, atol=1e-4 if dtype == np.float32 else 1e-11)


@pytest.mark.parametrize("scale", [1e-170, 1e200])
def test_prox_where_squares_leave_the_range(scale):
    got = lineas.prox_sparse_group(scale * np.array([3.0, 4.0]), tau=scale, l1=0.0, group=2.5 / np.sqrt(2))
    np.testing.assert_allclose(got, scale * np.array([1.5, 2.0]), rtol=1e-15)


@given(seeds, st.sampled_from([np.float32, np.float64, np.float16]), st.integers(1, 70))
def test_pooled_means(seed, dtype, tokens):
    rng, end = np.random.default_rng(seed), np.finfo(dtype).max
    x = rng.choice(np.array([end, -end, end / 2, 1], dtype), size=(2, tokens, 20))
    x[0, :, 0] = end
    mask = rng.integers(0, 2, size=(2, tokens)) + (np.arange(tokens) == 0)
    mean = np.array([np.mean(a[m != 0].astype(np.longdouble), axis=0) for a, m in zip(x, mask, strict=True)])
    got = lineas._core.pool(x, mask.astype(np.uint8), "mean", 1)[0]
    assert np.isfinite(got).all()
    np.testing.assert_allclose((got / end).astype(float), (mean / end).astype(float), atol=1e-6)
    assert got[0, 0] == pytest.approx(end, rel=1e-15)


@settings(max_examples=20)
@given(seeds, st.integers(-500, 500), st.sampled_from([1.0, 0.5, 0.0]))
def test_sparse_path(seed, exponent, l1_ratio):
    rng = np.random.default_rng(seed)
    source, target = (np.ldexp(rng.integers(-64, 65, size=(16, 6)) / 8.0, exponent) for _ in range(2))
    if exponent > 150 or exponent < -310:
        with pytest.raises(ValueError, match=r"source and target are too (large|small)|out of range"):
            lineas.sparse_path(source, target, n_penalties=4, l1_ratio=l1_ratio)
    elif -290 < exponent < 142:
        path = lineas.sparse_path(source, target, n_penalties=4, l1_ratio=l1_ratio)
        moments = reference.quantile_moments(source, target)
        for k, penalty in enumerate(path.penalties):
            weight, bias = path.weight[k], path.bias[k]
            miss = reference.kkt_distance(moments, weight, bias, penalty * l1_ratio, penalty * (1 - l1_ratio))
            assert miss <= 1e-8 * path.penalties[0]
            assert k > 0 or ((weight == 1).all() and not bias.any())
        assert path.support[-1] > 0
