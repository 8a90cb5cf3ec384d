"""Shrinkage of closed-form maps: against its twin, scipy and simulations, and that it lowers held-out distances."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import lineas
from lineas.arrays import reference
from lineas.arrays.shrinkage import Sample, factors

METHODS = ["mean", "gaussian", "linear"]


def kept(u, v, weight, u_mass=None, v_mass=None):
    return factors(Sample(u, u_mass), Sample(v, v_mass), weight)


def expected(u, v, full, of_shift, of_slope):
    """The shrunk map by its definition."""
    weight = 1 + of_slope * (full.weight - 1)
    mean_u, mean_v = u.mean(axis=0), v.mean(axis=0)
    return weight, mean_u * (1 - weight) + of_shift * (mean_v - mean_u)


# --- what it is -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_number_is_the_map_at_a_lower_strength(rng, method):
    u, v = rng.normal(size=(9, 4)), rng.normal(2, 3, size=(12, 4))
    full = lineas.fit(u, v, method=method)
    for shrinkage in (0, 0.25, 1):
        found, wanted = lineas.fit(u, v, method=method, shrinkage=shrinkage), full.scaled(1 - shrinkage)
        np.testing.assert_allclose(found.weight, wanted.weight, rtol=1e-14)
        np.testing.assert_allclose(found.bias, wanted.bias, rtol=1e-12, atol=1e-14)
    assert lineas.fit(u, v, method=method, shrinkage=0.0) == full
    assert lineas.fit(u, v, method=method, shrinkage=1).support == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weighted", [False, True])
def test_it_equals_its_twin(rng, method, weighted):
    u, v = rng.standard_t(5, size=(9, 6)), rng.normal(0.5, 1.5, size=(14, 6))
    masses = (rng.integers(1, 4, 9).astype(float), rng.random(14)) if weighted else (None, None)
    weight = lineas.fit(u, v, method=method, source_weights=masses[0], target_weights=masses[1]).weight
    found = kept(u, v, weight, *masses)
    np.testing.assert_allclose(found, reference.shrinkage_factors(u, v, weight, *masses), rtol=1e-10)
    assert 0 < found[0] < 1 and (found[1] == 1 if method == "mean" else 0 < found[1] < 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_map_has_the_two_factors(rng, method, dtype):
    u, v = rng.normal(size=(10, 5)).astype(dtype), rng.normal(0.7, 2, size=(8, 5)).astype(dtype)
    full, found = (lineas.fit(u, v, method=method, shrinkage=shrinkage) for shrinkage in (None, "auto"))
    wide = u.astype(float), v.astype(float)
    weight, bias = expected(*wide, full, *kept(*wide, full.weight))
    np.testing.assert_allclose(found.weight, weight, rtol=1e-6)
    np.testing.assert_allclose(found.bias, bias, rtol=1e-5, atol=1e-6)
    assert found.dtype == full.dtype


def test_the_kurtosis_is_that_of_scipy(rng):
    x = rng.exponential(size=(11, 40))
    np.testing.assert_allclose(Sample(x, None).kurtosis(), 3 + stats.kurtosis(x, bias=False).mean(), rtol=1e-12)
    np.testing.assert_allclose(Sample(x, None).variance(), x.var(axis=0, ddof=1), rtol=1e-12)


def test_equal_weights_are_none_and_rows_of_weight_zero_are_not_there(rng):
    u, v = rng.normal(size=(8, 5)), rng.normal(0.4, 1.3, size=(7, 5))
    plain = lineas.fit(u, v, shrinkage="auto")
    odd = np.concatenate([u, np.full((1, 5), np.nan)])
    for source, weights in ((u, np.full(8, 0.3)), (odd, [2.0] * 8 + [0.0])):
        found = lineas.fit(source, v, source_weights=weights, shrinkage="auto")
        np.testing.assert_allclose(found.weight, plain.weight, rtol=1e-12)
        np.testing.assert_allclose(found.bias, plain.bias, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e160])
def test_any_scale_will_do(rng, scale):
    u, v = rng.normal(size=(8, 5)), rng.normal(0.4, 1.3, size=(7, 5))
    one, other = (lineas.fit(u * s, v * s, method="mean", shrinkage="auto") for s in (1, scale))
    np.testing.assert_allclose(other.bias / scale, one.bias, rtol=1e-10)


def test_modules_share_the_median_of_their_factors(rng):
    sizes, shifts = {"a": 5, "b": 3, "c": 4}, {"a": 1.0, "b": 0.6, "c": 0.8}
    u = {name: rng.normal(size=(8, d)).astype(np.float32 if name == "b" else np.float64) for name, d in sizes.items()}
    v = {name: rng.normal(shifts[name], 1.5, size=(9, d)) for name, d in sizes.items()}
    v["b"] = v["b"].astype(np.float32)
    full, maps = (lineas.fit(u, v, shrinkage=shrinkage) for shrinkage in (None, "auto"))
    found = [kept(u[name].astype(float), v[name].astype(float), full[name].weight) for name in sizes]
    assert len(set(found)) == 3
    for name in sizes:
        weight, bias = expected(u[name], v[name], full[name], *np.median(found, axis=0))
        np.testing.assert_allclose(maps[name].weight, weight, rtol=1e-6)
        np.testing.assert_allclose(maps[name].bias, bias, rtol=1e-5, atol=1e-6)
    assert {name: one.dtype for name, one in maps.items()} == {name: one.dtype for name, one in full.items()}
    assert maps.metadata["shrinkage"] == "auto" and "shrinkage" not in full.metadata


def test_samples_that_do_not_differ_give_the_identity(rng):
    u = rng.normal(size=(8, 5))
    assert lineas.fit(u, u[::-1], shrinkage="auto").support == 0
    assert lineas.fit(np.ones((4, 3)), np.ones((5, 3)), shrinkage="auto").support == 0


def test_what_cannot_be_by_chance_is_kept():
    u, v = np.zeros((4, 2)), np.full((5, 2), 3.0)
    np.testing.assert_allclose(lineas.fit(u, v, shrinkage="auto").bias, 3.0, rtol=1e-14)


# --- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gaussian", "linear"])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 64), (64, 32)])
def test_the_sampling_variance_of_the_slopes_is_about_what_the_formula_says(method, sizes):
    rng = np.random.default_rng(0)
    n, m = sizes
    for draw, tolerance in ((rng.standard_normal, 0.1), (lambda size: rng.uniform(size=size), 0.2)):
        u, v = draw((n, 20_000)), 1.5 * draw((m, 20_000))
        weight = lineas.fit(u, v, method=method).weight
        spread = ((Sample(u, None).kurtosis() - 1) / (n - 1) + (Sample(v, None).kurtosis() - 1) / (m - 1)) / 4
        assert np.mean(weight**2) * spread == pytest.approx(weight.var(), rel=tolerance)


def test_without_a_difference_nearly_all_is_held_back():
    rng = np.random.default_rng(0)
    found = [kept(u, v, lineas.fit(u, v).weight) for u, v in (rng.normal(size=(2, 8, 500)) for _ in range(50))]
    of_shift, of_slope = np.mean(found, axis=0)
    assert of_shift < 0.05 and of_slope < 0.15


def test_with_many_rows_nothing_is_held_back():
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(20_000, 50)), rng.normal(0.5, 1.5, size=(20_000, 50))
    assert min(kept(u, v, lineas.fit(u, v).weight)) > 0.999


def missed(map_, shift, slope, spread):
    """The squared distance of what a map does from what it should do to N(0, spread^2), summed over the neurons."""
    return np.sum((map_.bias - shift) ** 2 + (spread * (map_.weight - slope)) ** 2)


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.tuples(st.sampled_from([4, 8, 32, 128]), st.sampled_from([4, 8, 32, 128])),
    size=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    correlated=st.booleans(),
    method=st.sampled_from(METHODS),
)
def test_it_lowers_the_held_out_risk(seed, rows, size, correlated, method):
    """On average over draws, for neurons of other scales, independent or driven by 30 common factors."""
    rng = np.random.default_rng(seed)
    d = 200
    mixing = rng.normal(size=(30, d)) / np.sqrt(30) if correlated else None
    spread = np.exp(0.5 * rng.normal(size=d))
    slope = np.exp(size / 2 * rng.normal(size=d)) if method != "mean" else np.ones(d)
    shift = size * spread * rng.normal(size=d)

    def draw(n):
        return spread * (rng.normal(size=(n, d)) if mixing is None else rng.normal(size=(n, 30)) @ mixing)

    actual = spread * (1 if mixing is None else np.sqrt(np.sum(mixing**2, axis=0)))
    full = held_back = 0.0
    for _ in range(6):
        u, v = draw(rows[0]), shift + slope * draw(rows[1])
        full += missed(lineas.fit(u, v, method=method), shift, slope, actual)
        held_back += missed(lineas.fit(u, v, method=method, shrinkage="auto"), shift, slope, actual)
    assert held_back < 1.02 * full  # chance, where there is next to nothing to hold back
    if size <= 0.1 and max(rows) <= 8:
        assert held_back < 0.6 * full


@pytest.mark.parametrize("method", METHODS)
def test_it_lowers_the_distance_of_held_out_samples(method):
    rng = np.random.default_rng(1)
    shift, slope = 0.5 * rng.normal(size=300), np.exp(0.2 * rng.normal(size=300))
    u, v = rng.normal(size=(8, 300)), shift + slope * rng.normal(size=(8, 300))
    source, target = rng.normal(size=(200, 300)), shift + slope * rng.normal(size=(200, 300))
    distances = [
        lineas.wasserstein(lineas.fit(u, v, method=method, shrinkage=held).transform(source), target).sum()
        for held in ("auto", None)
    ]
    assert distances[0] < 0.9 * lineas.wasserstein(source, target).sum()
    assert distances[0] < 0.8 * distances[1]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"shrinkage": "some"}, ValueError, "^shrinkage must be None, 'auto' or a number from 0 to 1, got 'some'$"),
        ({"shrinkage": 1.5}, ValueError, "^shrinkage must be from 0 to 1, got 1.5$"),
        ({"shrinkage": -0.5}, ValueError, "^shrinkage must be from 0 to 1, got -0.5$"),
        ({"shrinkage": float("nan")}, ValueError, "^shrinkage must be finite, got nan$"),
        ({"shrinkage": True}, TypeError, "^shrinkage must be a real number, got bool$"),
        ({"shrinkage": [0.5]}, TypeError, "^shrinkage must be a real number, got list$"),
        (
            {"shrinkage": "auto", "l1": 0.5},
            ValueError,
            "^shrinkage is for maps without penalties, got l1=0.5 and group=0$",
        ),
        (
            {"shrinkage": "auto", "source_weights": [1, 0, 0]},
            ValueError,
            "^source must have at least 2 rows with a weight for shrinkage='auto', got 1$",
        ),
        (
            {"shrinkage": "auto", "target_weights": [0, 0, 0, 2]},
            ValueError,
            "^target must have at least 2 rows with a weight for shrinkage='auto', got 1$",
        ),
    ],
)
def test_errors(rng, settings, error, message):
    with pytest.raises(error, match=message):
        lineas.fit(rng.normal(size=(3, 2)), rng.normal(size=(4, 2)), **settings)


def test_values_that_are_not_finite_are_named_as_ever(rng):
    u = rng.normal(size=(4, 2))
    u[2, 1] = np.inf
    with pytest.raises(ValueError, match="source: inf at row 2, column 1"):
        lineas.fit(u, rng.normal(size=(4, 2)), shrinkage="auto")
