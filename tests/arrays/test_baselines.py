import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import lineas
from lineas import AffineMap, SteeringMaps, baselines

pytest.importorskip("sklearn")

ALL = [baselines.mean, baselines.iti_c, baselines.aura]
# Whole and half numbers: many ties, and no rounding.
SAMPLES = st.integers(2, 9).flatmap(
    lambda n: arrays(np.float64, (n, 3), elements=st.integers(-6, 6).map(lambda k: k / 2))
)


def two_samples(rng, dtype=np.float64):
    return rng.normal(size=(20, 5)).astype(dtype), (1 + 2 * rng.normal(size=(13, 5))).astype(dtype)


def test_mean_is_that_of_fit(rng):
    u, v = two_samples(rng)
    assert baselines.mean(u, v) == lineas.fit(u, v, method="mean")
    maps = baselines.mean({"a": u}, {"a": v})
    assert maps["a"] == lineas.fit(u, v, method="mean") and maps.metadata["method"] == "mean"


def test_iti_shifts_along_the_probe_by_the_standard_deviation(rng):
    from sklearn.linear_model import LogisticRegression

    u, v = two_samples(rng)
    one = baselines.iti_c(u, v, alpha=3.0, C=0.5)
    rows = np.concatenate([v, u])
    probe = LogisticRegression(C=0.5, tol=1e-10, max_iter=10000).fit(rows, [True] * 13 + [False] * 20)
    theta = probe.coef_[0] / np.linalg.norm(probe.coef_[0])
    np.testing.assert_array_equal(one.weight, 1)
    np.testing.assert_allclose(one.bias, 3 * (rows @ theta).std() * theta, rtol=1e-2, atol=1e-3)
    assert np.linalg.norm(one.bias) == pytest.approx(3 * (rows @ theta).std(), rel=1e-3)


def test_iti_finds_the_direction_in_which_the_sets_differ():
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(400, 3)), rng.normal([0.0, -2.0, 0.0], size=(300, 3))
    bias = baselines.iti_c(u, v).bias
    assert bias[1] < 0  # towards the target
    assert np.abs(bias[[0, 2]]).max() < 0.1 * abs(bias[1])


def test_iti_back_is_the_opposite(rng):
    u, v = two_samples(rng)
    np.testing.assert_allclose(baselines.iti_c(v, u).bias, -baselines.iti_c(u, v).bias, rtol=1e-2, atol=1e-3)


def test_iti_of_alpha_is_that_many_times_the_shift(rng):
    u, v = two_samples(rng)
    np.testing.assert_allclose(baselines.iti_c(u, v, alpha=4.0).bias, 4 * baselines.iti_c(u, v).bias, rtol=1e-15)


def test_iti_of_constant_or_equal_sets_is_the_identity(rng):
    same = rng.normal(size=(6, 3))
    assert not baselines.iti_c(np.ones((4, 3)), np.ones((5, 3))).bias.any()
    np.testing.assert_allclose(baselines.iti_c(same, same[::-1]).bias, 0, atol=1e-7)


@given(SAMPLES, SAMPLES)
def test_aura_dampens_by_the_gini_coefficient_of_scikit_learns_area(u, v):
    from sklearn.metrics import roc_auc_score

    one = baselines.aura(u, v)
    area = [roc_auc_score([1] * len(u) + [0] * len(v), np.concatenate([u, v])[:, k]) for k in range(3)]
    np.testing.assert_allclose(one.weight, 1 - 2 * (np.maximum(area, 0.5) - 0.5), atol=1e-15)
    assert not one.bias.any()


@given(SAMPLES, SAMPLES)
def test_aura_leaves_a_neuron_alone_in_one_direction_at_least(u, v):
    there, back = baselines.aura(u, v).weight, baselines.aura(v, u).weight
    assert (np.maximum(there, back) == 1).all() and (np.minimum(there, back) >= 0).all()


@given(SAMPLES, SAMPLES)
def test_aura_depends_on_ranks_only(u, v):
    assert baselines.aura(u, v) == baselines.aura(np.exp(u), np.exp(v))


def test_aura_silences_perfect_experts():
    one = baselines.aura(np.array([[2.0, 0.0], [3.0, 0.0]]), np.array([[0.0, 2.0], [1.0, 3.0]]))
    assert one.weight.tolist() == [0, 1]


@pytest.mark.parametrize("method", ALL)
def test_modules_are_fitted_one_by_one_and_keep_their_type(rng, method):
    (u, v), (p, q) = two_samples(rng), two_samples(rng, np.float16)
    maps = method({"b": u, "a": p}, {"a": q, "b": v})
    assert isinstance(maps, SteeringMaps) and list(maps) == ["b", "a"]
    assert maps["b"] == method(u, v) and maps["a"] == method(p, q)
    assert maps["b"].weight.dtype == np.float64 and maps["a"].weight.dtype == np.float32
    assert isinstance(method(u, v), AffineMap)
    assert maps.metadata["method"] == method.__name__ and maps.metadata["version"] == lineas.__version__


def test_metadata_of_iti_has_its_settings(rng):
    u, v = two_samples(rng)
    metadata = baselines.iti_c({"a": u}, {"a": v}, alpha=2, C=0.1).metadata
    assert (metadata["alpha"], metadata["C"]) == (2.0, 0.1)


@pytest.mark.parametrize("method", ALL)
def test_maps_are_saved_and_loaded(rng, method, tmp_path):
    u, v = two_samples(rng)
    maps = method({"a": u}, {"a": v})
    maps.save(tmp_path / "maps.safetensors")
    assert lineas.load(tmp_path / "maps.safetensors") == maps


@pytest.mark.parametrize("method", ALL)
def test_bfloat16_is_that_of_its_values_in_float32(rng, method):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    u, v = (x.astype(ml_dtypes.bfloat16) for x in two_samples(rng))
    assert method(u, v) == method(u.astype(np.float32), v.astype(np.float32))


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(
    ("source", "target", "error", "text"),
    [
        (np.ones((3, 2)), {"a": np.ones((3, 2))}, TypeError, "source and target must both be arrays or both be"),
        ({}, {}, ValueError, "source must hold at least one module"),
        ({"a": np.ones((3, 2))}, {"b": np.ones((3, 2))}, ValueError, "target must have the modules of source"),
        (np.ones((1, 2)), np.ones((3, 2)), ValueError, "source must have at least 2 rows and 1 column"),
        (np.ones((3, 2)), np.ones((3, 4)), ValueError, "source and target must have the same number of columns, got"),
        (np.ones((3, 2), bool), np.ones((3, 2)), TypeError, "source must be float16, bfloat16, float32, float64 or an"),
        (
            {"a": np.ones((3, 2))},
            {"a": np.array([[1, 2], [np.inf, 0], [np.nan, 0]])},
            ValueError,
            "target['a']: inf at row 1, column 0",
        ),
    ],
)
def test_wrong_samples(method, source, target, error, text):
    with pytest.raises(error, match=re.escape(text)):
        method(source, target)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"alpha": 0.0}, ValueError, "alpha must be above 0, got 0"),
        ({"alpha": "1"}, TypeError, "alpha must be a real number, got str"),
        ({"C": -1.0}, ValueError, "C must be above 0, got -1"),
        ({"C": np.nan}, ValueError, "C must be finite, got nan"),
    ],
)
def test_wrong_settings(rng, settings, error, text):
    with pytest.raises(error, match=text):
        baselines.iti_c(*two_samples(rng), **settings)


def test_a_shift_that_overflows_is_named(rng):
    u, v = two_samples(rng, np.float32)
    with pytest.raises(ValueError, match=r"the map of source\['a'\] overflows float32: bias must be finite, got -?inf"):
        baselines.iti_c({"a": u}, {"a": v}, alpha=1e300)


def test_iti_says_what_to_install(rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r'iti_c needs scikit-learn: pip install "lineas\[sklearn\]"'):
        baselines.iti_c(*two_samples(rng))


def test_scikit_learn_is_imported_for_probes_only():
    code = """
import sys, numpy as np, lineas
u = np.random.default_rng(0).normal(size=(4, 3))
lineas.baselines.aura({"a": u}, {"a": u + 1}), lineas.baselines.mean(u, u)
print([name for name in ("sklearn", "scipy", "torch") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
