"""Gates fitted to arrays: against scikit-learn and SciPy, how they are cross-validated, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lineas
from lineas.arrays import gate as gates
from lineas.arrays import separability

D = 6


def texts(count, shift, seed, *, d=D, shortest=3, longest=12):
    """Tokens of texts; what tells a text's side is in one direction, beside noise that its tokens share."""
    rng = np.random.default_rng(seed)
    scale = np.linspace(0.5, 3, d)
    return [
        ((rng.normal(0, 1, (int(rng.integers(shortest, longest)), d)) + rng.normal(0, 0.3, d) + shift) * scale + 5)
        for _ in range(count)
    ]


SOURCE, TARGET = texts(12, 0.5, 0), texts(15, 0.0, 1)


# --- the parts --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.sampled_from([1e-4, 1e-2, 1.0]), st.integers(1, 30))
@settings(deadline=None, max_examples=25)
def test_logistic_regression_is_scikit_learns(seed, ridge, d):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, d)) @ rng.normal(size=(d, d))
    y = (x[:, 0] + rng.normal(size=60) > 0).astype(float)
    y[:2] = 0, 1
    mass = rng.uniform(0.5, 2, 60)
    mass /= mass.sum()
    weight, bias = separability.logistic_regression(x, y, mass, ridge)
    oracle = LogisticRegression(C=1 / ridge, tol=1e-12, max_iter=100000).fit(x, y, sample_weight=mass)
    np.testing.assert_allclose(x @ weight + bias, oracle.decision_function(x), atol=2e-3, rtol=2e-3)
    # Nearer to the minimum than where scikit-learn stops: the gradient is zero.
    apart = mass * (separability.sigmoid(x @ weight + bias) - y)
    np.testing.assert_allclose(apart @ x + ridge * weight, 0, atol=1e-7)
    assert abs(apart.sum()) < 1e-7


def test_a_weak_penalty_on_separable_rows_stays_finite():
    x = np.array([[-1.0], [-2.0], [1.0], [3.0]])
    weight, bias = separability.logistic_regression(x, np.array([0.0, 0, 1, 1]), np.full(4, 0.25), 1e-9)
    assert np.isfinite([*weight, bias]).all()
    assert weight[0] > 5


@given(st.integers(0, 1000), st.booleans())
def test_roc_areas_are_scikit_learns(seed, ties):
    rng = np.random.default_rng(seed)
    u, v = rng.normal(0.3, 1, (7, 3)), rng.normal(0, 1, (9, 3))
    if ties:
        u, v = u.round(), v.round()
    y = np.repeat([1, 0], [7, 9])
    expected = [roc_auc_score(y, column) for column in np.concatenate([u, v]).T]
    np.testing.assert_allclose(separability.roc_area(u, v), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_principal_components_are_those_of_the_svd(shape):
    rng = np.random.default_rng(0)
    x, mass = rng.normal(size=shape) * np.linspace(1, 3, shape[1]), np.full(shape[0], 1 / shape[0])
    found = separability.principal_components(x, mass)
    values, directions = np.linalg.svd(x, full_matrices=False)[1:]
    assert found.shape == (shape[1], len(values))
    np.testing.assert_allclose(np.abs(np.sum(found.T * directions, axis=1)), 1, atol=1e-8)
    assert separability.principal_components(x, mass, 2).shape == (shape[1], 2)


@given(st.lists(st.integers(1, 50), min_size=3, max_size=30), st.integers(2, 3), st.integers(0, 9))
def test_folds_hold_whole_groups_of_about_as_many_rows(sizes, folds, seed):
    fold = separability.group_folds(sizes, folds, np.random.default_rng(seed))
    rows = np.bincount(fold, weights=sizes, minlength=folds)
    assert (np.bincount(fold, minlength=folds) > 0).all()
    assert rows.max() - rows.min() <= max(sizes)


# --- scalar gates -----------------------------------------------------------------------------------------------------


def by_hand(source, target, ridge, folds, seed=0):
    """The same gate by scikit-learn: standardised, penalised, calibrated on held-out texts."""
    x = np.concatenate([*source, *target])
    n, m = sum(map(len, source)), sum(map(len, target))
    y = np.repeat([1, 0], [n, m])
    mass = np.repeat([0.5 / n, 0.5 / m], [n, m])
    rng = np.random.default_rng(seed)
    fold = np.concatenate(
        [
            np.repeat(separability.group_folds(list(map(len, s)), folds, rng), list(map(len, s)))
            for s in (source, target)
        ]
    )
    scaled = StandardScaler().fit(x, sample_weight=mass)
    z = scaled.transform(x)
    splits = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(folds)]
    logits = np.empty(len(x))
    for train, held_out in splits:
        weights = np.where(y[train] == 1, 0.5 / (y[train] == 1).sum(), 0.5 / (y[train] == 0).sum())
        model = LogisticRegression(C=1 / ridge, tol=1e-12, max_iter=10000).fit(z[train], y[train], weights)
        logits[held_out] = model.decision_function(z[held_out])
    whole = LogisticRegression(C=1 / ridge, tol=1e-12, max_iter=10000).fit(z, y, mass)
    area = np.mean([roc_auc_score(y[held_out], logits[held_out]) for _, held_out in splits])
    return logits, y, mass, whole.decision_function(z), x, area, fold


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_a_calibrated_gate_is_scikit_learns_regression_with_platts_sigmoid(ridge):
    found = lineas.fit_gate(SOURCE, TARGET, ridge=ridge, folds=4)
    logits, y, mass, whole, x, area, _ = by_hand(SOURCE, TARGET, ridge, 4)
    assert found.auroc == pytest.approx(area, abs=1e-9)
    # Platt's sigmoid, with his targets for probabilities.
    counts = np.bincount(y)
    wanted = np.where(y == 1, (counts[1] + 1) / (counts[1] + 2), 1 / (counts[0] + 2))
    twice = np.concatenate([logits, logits])[:, None]
    platt = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10000).fit(
        twice, np.repeat([1, 0], len(y)), np.concatenate([mass * wanted, mass * (1 - wanted)])
    )
    expected = platt.predict_proba(whole[:, None])[:, 1]
    np.testing.assert_allclose(found.values(x)[:, 0], expected, atol=2e-4)
    g = platt.predict_proba(logits[:, None])[:, 1]
    assert found.left_alone == pytest.approx((g[y == 0] < 0.5).mean(), abs=0.02)
    assert found.accuracy == pytest.approx(((g[y == 1] >= 0.5).mean() + (g[y == 0] < 0.5).mean()) / 2, abs=0.02)


def test_calibration_is_that_of_scikit_learn_on_rows():
    source, target = np.concatenate(SOURCE), np.concatenate(TARGET)
    n = min(len(source), len(target))
    source, target = source[:n], target[:n]
    found = lineas.fit_gate(source, target, ridge=0.05)
    y = np.repeat([1, 0], n)
    x = np.concatenate([source, target])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (0.05 * 2 * n * 0.8)))
    oracle = CalibratedClassifierCV(model, method="sigmoid", cv=5, ensemble=False).fit(x, y)
    np.testing.assert_allclose(found.values(x)[:, 0], oracle.predict_proba(x)[:, 1], atol=0.05)


def test_the_ridge_is_that_of_the_largest_area():
    areas = {ridge: lineas.fit_gate(SOURCE, TARGET, ridge=ridge).auroc for ridge in gates.RIDGES}
    found = lineas.fit_gate(SOURCE, TARGET)
    assert found.auroc == max(areas.values())
    best = max(areas, key=areas.get)
    np.testing.assert_allclose(found.weight, lineas.fit_gate(SOURCE, TARGET, ridge=best).weight, rtol=1e-4, atol=1e-7)


def test_whole_texts_are_held_out():
    rng = np.random.default_rng(0)
    # Every text has a point of its own and nothing else: what is learnt of one says nothing of others.
    source, target = ([np.repeat(rng.normal(size=(1, 40)), 10, axis=0) for _ in range(10)] for _ in range(2))
    assert lineas.fit_gate(source, target, ridge=0.01).auroc < 0.8
    assert lineas.fit_gate(np.concatenate(source), np.concatenate(target), ridge=0.01).auroc == 1.0


def test_pairs_are_held_out_together():
    rng = np.random.default_rng(0)
    subjects = rng.normal(0, 3, (20, 1, 60))
    side = rng.normal(0, 0.3, 60)
    source, target = ([one + sign * side + rng.normal(0, 1, (8, 60)) for one in subjects] for sign in (1, -1))
    found, others = lineas.fit_gate(source, target).auroc, lineas.fit_gate(source, [*target, target[0][:1]]).auroc
    assert found > others + 0.05


def test_where_there_is_nothing_to_tell_the_gate_is_half_open_or_nearly():
    found = lineas.fit_gate(texts(10, 0, 2), texts(10, 0, 3))
    g = found.values(np.concatenate(SOURCE))
    assert np.abs(g - 0.5).max() < 0.25


def test_few_components_are_read():
    found = lineas.fit_gate(SOURCE, TARGET, components=1, ridge=0.01)
    x = np.concatenate([*SOURCE, *TARGET])
    mass = np.repeat([0.5 / sum(map(len, s)) for s in (SOURCE, TARGET)], [sum(map(len, s)) for s in (SOURCE, TARGET)])
    z = StandardScaler().fit(x, sample_weight=mass)
    weighted = z.transform(x) * np.sqrt(mass)[:, None]
    direction = np.linalg.svd(weighted, full_matrices=False)[2][0]
    read = found.weight * z.scale_
    assert abs(read @ direction) / np.linalg.norm(read) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_a_share_of_the_target_may_be_open(share):
    found = lineas.fit_gate(SOURCE, TARGET, open_on_target=share)
    tokens = sum(map(len, TARGET))
    assert 1 - found.left_alone <= share + 1 / tokens
    assert 1 - found.left_alone >= share - 1.5 / tokens
    sharper = lineas.fit_gate(SOURCE, TARGET, open_on_target=share, sharpness=6.0)
    np.testing.assert_allclose(sharper.weight, 2 * found.weight, rtol=1e-6)
    assert sharper.bias == pytest.approx(2 * found.bias, rel=1e-6)


def test_means_are_read_where_they_are_asked_for():
    of_means, of_tokens = (lineas.fit_gate(SOURCE, TARGET, context=c, ridge=0.1) for c in ("mean", "token"))
    assert (of_means.context, of_tokens.context) == ("mean", "token")
    # The direction is that of the tokens; judged and calibrated is what is read.
    along = of_means.weight / np.linalg.norm(of_means.weight)
    np.testing.assert_allclose(along, of_tokens.weight / np.linalg.norm(of_tokens.weight), rtol=1e-5)
    assert of_means.auroc > of_tokens.auroc  # less noise
    logits, y, *_, fold = by_hand(SOURCE, TARGET, 0.1, 5)
    ends = np.cumsum([len(x) for side in (SOURCE, TARGET) for x in side])[:-1]
    logits = np.concatenate([np.cumsum(x) / np.arange(1, len(x) + 1) for x in np.split(logits, ends)])
    areas = [roc_auc_score(y[fold == k], logits[fold == k]) for k in range(5)]
    assert of_means.auroc == pytest.approx(np.mean(areas), abs=1e-9)


def test_neurons_that_do_not_vary_are_not_read():
    flat = [[np.column_stack([x, np.full(len(x), 7.0)]) for x in side] for side in (SOURCE, TARGET)]
    found, expected = lineas.fit_gate(*flat), lineas.fit_gate(SOURCE, TARGET)
    assert found.weight[-1] == 0
    np.testing.assert_allclose(found.weight[:-1], expected.weight, rtol=1e-5)
    nothing = [[np.full((4, 2), 3.0)] * 3] * 2
    gate = lineas.fit_gate(*nothing)
    assert not gate.weight.any()
    assert gate.values(np.ones((1, 2))) == 0.5


def test_modules_types_and_seeds():
    source, target = {"a": SOURCE, "b": TARGET}, {"a": TARGET, "b": SOURCE}
    found = lineas.fit_gate(source, target)
    assert list(found) == ["a", "b"]
    assert found["a"] == lineas.fit_gate(SOURCE, TARGET)
    assert found["a"].weight.dtype == np.float64
    narrow = [[x.astype(np.float32) for x in side] for side in (SOURCE, TARGET)]
    assert lineas.fit_gate(*narrow).weight.dtype == np.float32
    assert lineas.fit_gate(*narrow, kind="neuron").linear.dtype == np.float32
    assert lineas.fit_gate(SOURCE, TARGET, seed=3) == lineas.fit_gate(SOURCE, TARGET, seed=3)


# --- neurons ----------------------------------------------------------------------------------------------------------


def test_neurons_have_the_posterior_of_two_gaussians():
    source, target = np.concatenate(SOURCE), np.concatenate(TARGET)
    found = lineas.fit_gate(SOURCE, TARGET, kind="neuron", min_auroc=0.0)
    z = np.random.default_rng(0).normal(5, 3, (50, D))
    densities = [norm.pdf(z, side.mean(axis=0), side.std(axis=0)) for side in (source, target)]
    np.testing.assert_allclose(found.values(z), densities[0] / (densities[0] + densities[1]), rtol=1e-7, atol=1e-9)


def test_neurons_that_tell_too_little_are_closed():
    source = [np.column_stack([x, np.random.default_rng(k).normal(size=len(x))]) for k, x in enumerate(SOURCE)]
    target = [np.column_stack([x, np.random.default_rng(k + 99).normal(size=len(x))]) for k, x in enumerate(TARGET)]
    found = lineas.fit_gate(source, target, kind="neuron", min_auroc=0.62)
    assert (found.closed == (found.auroc < 0.62)).all()
    assert found.closed[-1]
    assert not found.closed.all()
    assert 0 < found.left_alone < 1
    with pytest.warns(UserWarning, match="no neuron tells source from target with an area .* of at least 0.999"):
        shut = lineas.fit_gate(source, target, kind="neuron", min_auroc=0.999)
    assert not shut.values(np.ones((1, D + 1))).any()


def test_a_neuron_that_is_constant_on_one_side_is_closed():
    found = lineas.fit_gate(
        [np.column_stack([x[:, 0], np.ones(len(x))]) for x in SOURCE], [x[:, :2] for x in TARGET], kind="neuron"
    )
    assert found.closed[1]
    assert np.isfinite([found.quadratic, found.linear, found.constant]).all()


# --- what is refused --------------------------------------------------------------------------------------------------

X = np.concatenate(SOURCE)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: lineas.fit_gate(SOURCE, TARGET, kind="vector"),
            "kind must be one of 'scalar', 'neuron', got 'vector'",
        ),
        (lambda: lineas.fit_gate(SOURCE, TARGET, context="text"), "context must be one of 'token', 'mean', got 'text'"),
        (lambda: lineas.fit_gate(SOURCE, TARGET, components=0), "components must be at least 1, got 0"),
        (lambda: lineas.fit_gate(SOURCE, TARGET, ridge=-1.0), "ridge must not be negative, got -1"),
        (lambda: lineas.fit_gate(SOURCE, TARGET, open_on_target=2), "open_on_target must be from 0 to 1, got 2"),
        (lambda: lineas.fit_gate(SOURCE, TARGET, sharpness=2.0), "sharpness goes with open_on_target"),
        (lambda: lineas.fit_gate(SOURCE, TARGET, open_on_target=0.1, sharpness=0), "sharpness must be above 0, got 0"),
        (lambda: lineas.fit_gate(SOURCE, TARGET, folds=1), "folds must be at least 2, got 1"),
        (lambda: lineas.fit_gate(SOURCE, TARGET, seed=-1), "seed must be at least 0, got -1"),
        (lambda: lineas.fit_gate(SOURCE, TARGET, min_auroc=1.5), "min_auroc must be from 0 to 1, got 1.5"),
        (lambda: lineas.fit_gate(SOURCE, TARGET, min_auroc=0.9), "min_auroc is for gates of kind 'neuron', got kind"),
        (
            lambda: lineas.fit_gate({"a": SOURCE}, {"a": TARGET}, components=D + 1),
            f"components must be at most the {D} neurons of a, got {D + 1}",
        ),
        (
            lambda: lineas.fit_gate(SOURCE, TARGET, kind="neuron", ridge=1.0),
            "ridge is for gates of kind 'scalar', got kind 'neuron'",
        ),
        (
            lambda: lineas.fit_gate(SOURCE, TARGET, kind="neuron", context="mean"),
            "context is for gates of kind 'scalar', got kind 'neuron'",
        ),
        (lambda: lineas.fit_gate(X, X, context="mean"), "source must be a list of arrays .* for context='mean'"),
        (lambda: lineas.fit_gate(X[:1], X), "source must hold at least 2 texts, of which some are held out, got 1"),
        (lambda: lineas.fit_gate(SOURCE, TARGET[:1]), "target must hold at least 2 texts"),
        (
            lambda: lineas.fit_gate({"a": X}, {"a": X[:1]}),
            "target of a must hold at least 2 texts, of which some are held out, got 1",
        ),
        (lambda: lineas.fit_gate({"a": X}, X), "must both be arrays, both be lists or both be mappings"),
        (lambda: lineas.fit_gate({}, {}), "source must hold at least one module"),
        (lambda: lineas.fit_gate({"a": X}, {"b": X}), "target must have the modules of source: it lacks 'a'"),
        (lambda: lineas.fit_gate(X, X[:, :2]), "source and target must have the same number of columns"),
        (
            lambda: lineas.fit_gate([X, X[:, :2]], TARGET),
            r"source: all texts must have the same number of columns, got \[2, 6\]",
        ),
        (lambda: lineas.fit_gate([X, X[:0]], TARGET), r"source\[1\] must have at least 1 row and 1 column"),
        (lambda: lineas.fit_gate([X, np.full((2, D), np.nan)], TARGET), r"source\[1\]: nan at row 0, column 0"),
        (lambda: lineas.fit_gate(SOURCE, "text"), "target must be"),
    ],
)
def test_bad_inputs(call, text):
    with pytest.raises((TypeError, ValueError), match=text):
        call()
