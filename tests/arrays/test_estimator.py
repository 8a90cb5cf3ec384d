"""lineas.AffineTransport: scikit-learn's own checks, and that it is `lineas.fit` behind them."""

import doctest
import subprocess
import sys

import numpy as np
import pytest

import lineas

pytest.importorskip("sklearn", minversion="1.6")

import sklearn
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from lineas import AffineTransport

CHECKED = [AffineTransport(method=method) for method in ("linear", "mean")] + [
    AffineTransport(method="gaussian", strength=0.5)
]


def known_failures(estimator):
    """scikit-learn 1.6 makes two labels of three by the first row's, after it has shuffled one of the two fits."""
    if sklearn.__version__.startswith("1.6."):
        return {"check_sample_weight_equivalence_on_dense_data": "compares fits to different labels before 1.7"}
    return {}


@parametrize_with_checks(CHECKED, expected_failed_checks=known_failures)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def make_samples(n=30, m=20, d=4, dtype=np.float64, seed=0):
    """n source rows labelled "calm" and m target rows labelled "angry" in one shuffled array."""
    rng = np.random.default_rng(seed)
    rows = np.concatenate([rng.normal(size=(n, d)), rng.normal(2.0, [[0.5, 1.0, 2.0, 3.0][:d]], (m, d))]).astype(dtype)
    labels = np.array(["calm"] * n + ["angry"] * m)
    order = rng.permutation(n + m)
    return rows[order], labels[order]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", ["linear", "gaussian", "mean"])
def test_it_is_fit_for_unequal_sizes(method, dtype):
    X, y = make_samples(dtype=dtype)
    calm = y == "calm"
    transport = AffineTransport(method=method, source="calm").fit(X, y)
    wanted = lineas.fit(X[calm], X[~calm], method=method)
    assert transport.map_ == wanted and transport.map_.dtype == dtype
    assert transport.weight_ is transport.map_.weight and transport.bias_ is transport.map_.bias
    assert transport.classes_.tolist() == ["angry", "calm"] and transport.n_features_in_ == 4
    out = transport.transform(X)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, wanted.transform(X))


def test_the_source_is_the_first_label_or_the_named_one():
    X, y = make_samples()
    forth, back = AffineTransport(source="calm").fit(X, y), AffineTransport(source="angry").fit(X, y)
    assert AffineTransport().fit(X, y).map_ == back.map_ != forth.map_
    numbers = np.where(y == "calm", 1, 0)
    assert AffineTransport(source=1).fit(X, numbers).map_ == forth.map_
    assert AffineTransport(source=True).fit(X, numbers == 1).map_ == forth.map_


def test_row_weights_reach_their_side():
    X, y = make_samples()
    weights = np.random.default_rng(1).uniform(0.1, 2.0, len(y))
    calm = y == "calm"
    transport = AffineTransport(source="calm").fit(X, y, sample_weight=weights)
    assert transport.map_ == lineas.fit(X[calm], X[~calm], source_weights=weights[calm], target_weights=weights[~calm])
    scored = transport.score(X, y, sample_weight=weights)
    distances = lineas.wasserstein(
        transport.transform(X[calm]), X[~calm], u_weights=weights[calm], v_weights=weights[~calm]
    )
    assert scored == pytest.approx(-distances.mean(), rel=1e-12)


@pytest.mark.parametrize("strength", [1.0, 0.4, 0.0])
def test_the_inverse_undoes_the_transform_at_its_strength(strength):
    X, y = make_samples()
    transport = AffineTransport(strength=strength).fit(X, y)
    moved = transport.transform(X)
    np.testing.assert_array_equal(moved, transport.map_.transform(X, strength=strength))
    np.testing.assert_allclose(transport.inverse_transform(moved), X, atol=1e-12)


def test_the_score_is_minus_the_mean_distance():
    X, y = make_samples()
    calm = y == "calm"
    transport = AffineTransport(source="calm").fit(X, y)
    assert transport.score(X, y) == pytest.approx(
        -lineas.wasserstein(transport.transform(X[calm]), X[~calm]).mean(), rel=1e-12
    )
    off = transport.set_params(strength=0.0)
    assert off.score(X, y) == pytest.approx(-lineas.wasserstein(X[calm], X[~calm]).mean(), rel=1e-12)


def test_a_clone_has_the_settings_but_no_map():
    X, y = make_samples()
    transport = AffineTransport(method="mean", strength=0.5, source="calm").fit(X, y)
    copy = clone(transport)
    wanted = {"method": "mean", "l1": 0.0, "group": 0.0, "shrinkage": None, "strength": 0.5, "source": "calm"}
    assert copy.get_params() == wanted
    with pytest.raises(NotFittedError):
        copy.transform(X)


def test_shrinkage_is_that_of_fit():
    X, y = make_samples()
    calm = y == "calm"
    for shrinkage in ("auto", 0.25):
        transport = AffineTransport(source="calm", shrinkage=shrinkage).fit(X, y)
        assert transport.map_ == lineas.fit(X[calm], X[~calm], shrinkage=shrinkage)
        assert transport.map_ != AffineTransport(source="calm").fit(X, y).map_
    with pytest.raises(ValueError, match=r"^shrinkage must be from 0 to 1, got 2$"):
        AffineTransport(shrinkage=2.0).fit(X, y)


def test_a_pipeline():
    X, y = make_samples()
    pipeline = make_pipeline(StandardScaler(), PCA(n_components=3), AffineTransport(source="calm"))
    out = pipeline.fit(X, y).transform(X[y == "calm"])
    reduced = pipeline[:-1].transform(X)
    np.testing.assert_allclose(out.mean(axis=0), reduced[y == "angry"].mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(pipeline[-1].inverse_transform(out), reduced[y == "calm"], atol=1e-12)
    assert pipeline.get_feature_names_out(list("abcd")).tolist() == ["pca0", "pca1", "pca2"]


def test_a_grid_search_finds_the_settings_of_least_held_out_distance():
    X, y = make_samples(60, 50)
    folds = StratifiedKFold(4, shuffle=True, random_state=0)
    search = GridSearchCV(
        AffineTransport(source="calm"), {"method": ["mean", "linear"], "strength": [0.3, 1.0]}, cv=folds
    )
    search.fit(X, y)
    assert search.best_params_ == {"method": "linear", "strength": 1.0}
    train, test = next(folds.split(X, y))
    alone = AffineTransport(source="calm").fit(X[train], y[train]).score(X[test], y[test])
    scores = search.cv_results_["split0_test_score"]
    assert scores[search.best_index_] == pytest.approx(alone, rel=1e-12)


def test_a_grid_search_over_the_penalty():
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(size=(60, 6)), rng.normal([2, 0, 0, 0, 0, 0], 1, (50, 6))])  # one neuron differs
    y = np.repeat([0, 1], [60, 50])
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    search = GridSearchCV(AffineTransport(), {"l1": [0.0, 0.03, 0.1, 0.3, 1.0, 10.0]}, cv=folds).fit(X, y)
    assert search.best_params_ == {"l1": 0.3}
    assert search.best_estimator_.map_ == lineas.fit(X[:60], X[60:], l1=0.3)
    assert 0 < search.best_estimator_.map_.support < 6
    grouped = AffineTransport(l1=0.1, group=0.2).fit(X, y)
    assert grouped.map_ == lineas.fit(X[:60], X[60:], l1=0.1, group=0.2)
    with pytest.raises(ValueError, match="l1 must not be negative, got -1"):
        AffineTransport(l1=-1).fit(X, y)
    with pytest.raises(TypeError, match="group must be a real number, got NoneType"):
        AffineTransport(group=None).fit(X, y)


@pytest.mark.parametrize(
    ("settings", "y", "weights", "message"),
    [
        ({}, [0, 0, 0, 0], None, r"two labels, .*only one label, \[0\] \(in cross-validation, pass cv=StratifiedKFold"),
        ({}, [0, 1, 2, 2], None, r"y must have two labels, source and target, got 3 labels, \[0, 1, 2\]$"),
        ({}, ["a", "b", "b", "b"], None, "each label of y must have at least 2 rows, got 1 of 'a'"),
        ({"source": "c"}, ["a", "a", "b", "b"], None, r"source must be one of the labels \['a', 'b'\], got 'c'"),
        ({"method": "median"}, [0, 0, 1, 1], None, "method must be one of .*, got 'median'"),
        ({"strength": np.inf}, [0, 0, 1, 1], None, "strength must be finite, got inf"),
        ({}, [0, 0, 1, 1], [1, 1, 0, 0], "sample_weight must have a positive sum for each label, got 0 for 1"),
        ({}, [0, 0, 1, 1], [0, 0, 0, 0], "sample_weight must have a positive sum, but all weights are zero"),
        ({}, [0, 0, 1, 1], [1, -1, 1, 1], "sample_weight must be finite and not negative, got -1.0 at row 1"),
    ],
)
def test_fit_refuses_what_is_not_two_samples(settings, y, weights, message):
    X = np.arange(8.0).reshape(4, 2)
    with pytest.raises(ValueError, match=message):
        AffineTransport(**settings).fit(X, y, sample_weight=weights)


def test_many_labels_are_not_all_shown():
    with pytest.raises(ValueError, match=r"got 6 labels, \[0, 1, 2, 3, \.\.\.\]$"):
        AffineTransport().fit(np.zeros((6, 1)), np.arange(6))


def test_a_strength_that_is_no_number_is_refused():
    X, y = make_samples()
    with pytest.raises(TypeError, match="strength must be a real number, got str"):
        AffineTransport(strength="full").fit(X, y)


def test_score_refuses_other_labels():
    X, y = make_samples()
    transport = AffineTransport().fit(X, y)
    with pytest.raises(ValueError, match=r"y must have the labels of fit, \['angry', 'calm'\], got only one label"):
        transport.score(X[y == "calm"], y[y == "calm"])
    with pytest.raises(ValueError, match=r"labels of fit, \['angry', 'calm'\], got 2 labels, \['calm', 'glad'\]"):
        transport.score(X, np.where(y == "angry", "glad", y))


def test_a_map_without_inverse_names_the_neuron():
    X, y = make_samples()
    X[y == "calm", 2] = 1.0  # a constant target
    transport = AffineTransport(method="gaussian").fit(X, y)
    with pytest.raises(ValueError, match="the map has no inverse: weight is 0 at neuron 2"):
        transport.inverse_transform(X)


def test_the_example_in_the_docstring():
    import lineas.arrays.estimator

    result = doctest.testmod(lineas.arrays.estimator)
    assert result.attempted > 0 and result.failed == 0


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_scikit_learn_is_imported_when_the_estimator_is_asked_for():
    code = """
import sys, lineas
assert "AffineTransport" in dir(lineas) and "sklearn" not in sys.modules
assert lineas.AffineTransport is lineas.AffineTransport and "sklearn" in sys.modules
print(lineas.AffineTransport.__name__)
"""
    assert run(code) == "AffineTransport"


def test_without_scikit_learn_the_error_names_the_extra_and_the_rest_works():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sklearn":
            raise ModuleNotFoundError("No module named 'sklearn'", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "sklearn" else find_spec(name, package)
import lineas
from lineas import *
assert "AffineTransport" not in dir(lineas) and fit is lineas.fit
try:
    lineas.AffineTransport
except ImportError as error:
    print(error)
"""
    assert run(code) == 'AffineTransport needs scikit-learn 1.6 or later: pip install "lineas[sklearn]"'


def test_other_missing_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'lineas' has no attribute 'AffineTransports'"):
        lineas.AffineTransports  # noqa: B018
