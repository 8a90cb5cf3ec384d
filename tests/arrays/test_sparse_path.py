"""Sparse paths of arrays: optimal at every penalty, exact at their ends, and found again by penalty and by support."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DTYPES, assert_close, encode, sample

import lineas
from lineas import _core
from lineas.arrays import reference
from lineas.maps.path import SparsePath

RATIOS = (0.0, 1.0, 0.5)


def problem(rng, d, n=None, m=None):
    """Samples in which some neurons are constant, zero, ill-scaled or far from zero."""
    n, m = n or int(rng.integers(2, 40)), m or int(rng.integers(2, 40))
    scale, mean = 10.0 ** rng.uniform(-1, 1, size=2)
    u = rng.normal(size=(n, d)) * scale * rng.lognormal(0, 0.5, d) + rng.normal(0, mean, d)
    v = rng.normal(size=(m, d)) * rng.lognormal(0, 0.5, d) + rng.normal(0, mean, d)
    kinds = rng.integers(0, 8, size=d)
    u[:, kinds == 0] = u[0, kinds == 0]
    v[:, kinds == 1] = v[0, kinds == 1]
    u[:, (kinds == 2) & (rng.uniform() < 0.3)] = 0
    return u, v


def moments_of(u, v):
    return _core.quantile_moments([u], [v], None, None, ["u"], ["v"], 1)[0]


def test_every_point_of_3000_problems_is_optimal():
    rng = np.random.default_rng(0)
    worst = 0.0
    for k in range(3000):
        ratio = RATIOS[k % 4] if k % 4 < 3 else rng.uniform(0.02, 0.98)
        moments = moments_of(*problem(rng, int(rng.choice([1, 2, 9, 64]))))
        largest = _core.largest_penalty([moments], ratio)[0]
        penalties = np.geomspace(largest, largest * 1e-3, 6)
        weight, bias, _, _, distance, _ = _core.sparse_path([moments], None, penalties, ratio, True, largest, 1)
        assert (weight[0] == 1).all() and (bias[0] == 0).all()
        for j, penalty in enumerate(penalties):
            exact = reference.kkt_distance(moments, weight[j], bias[j], penalty * ratio, penalty * (1 - ratio))
            worst = max(worst, exact / largest)
            assert abs(exact - distance[0, j]) <= 1e-9 * largest
    assert worst <= 1e-8


@pytest.mark.parametrize("ratio", [*RATIOS, 0.9])
def test_the_largest_penalty_is_the_least_that_leaves_nothing(ratio):
    rng = np.random.default_rng(1)
    for d in (1, 7, 300):
        moments = moments_of(*problem(rng, d))
        largest = _core.largest_penalty([moments], ratio)[0]
        assert largest == pytest.approx(reference.largest_penalty(moments, ratio), rel=1e-12)
        below = _core.sparse_path([moments], None, np.array([largest * (1 - 1e-9)]), ratio, True, largest, 1)
        assert (below[0] != 1).any() or (below[1] != 0).any()


@pytest.mark.parametrize("ratio", RATIOS)
def test_points_agree_with_proximal_gradient_steps(ratio):
    rng = np.random.default_rng(2)
    u = rng.normal(size=(20, 30)) * rng.uniform(0.5, 2, 30) + rng.normal(size=30)
    moments = moments_of(u, rng.normal(size=(25, 30)) + rng.normal(size=30))
    largest = _core.largest_penalty([moments], ratio)[0]
    penalties = largest * np.array([0.8, 0.3, 0.05])
    weight, bias, loss, _, _, _ = _core.sparse_path([moments], None, penalties, ratio, True, largest, 1)
    slow = reference.sparse_path(moments, penalties, ratio, tolerance=1e-10 * largest)
    for ours, theirs in zip((weight, bias), slow[:2], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-7)
    np.testing.assert_allclose(loss[0], slow[2], rtol=1e-7)


def test_a_slope_that_would_be_negative_is_zero():
    # Constant targets: the unconstrained slope overshoots where the mean is to change its sign.
    rng = np.random.default_rng(3)
    u = rng.normal(size=(16, 40)) * 0.1 + 3
    moments = moments_of(u, np.full((16, 40), -3.0) + rng.normal(size=(16, 40)) * 0.01)
    largest = _core.largest_penalty([moments], 0.5)[0]
    penalties = np.geomspace(largest, largest * 1e-3, 30)
    weight, bias, _, _, distance, _ = _core.sparse_path([moments], None, penalties, 0.5, True, largest, 1)
    assert weight.min() == 0
    assert (weight >= 0).all()
    assert distance.max() <= 1e-9 * largest
    slow = reference.sparse_map(moments, penalties[-1] / 2, penalties[-1] / 2, tolerance=1e-10 * largest)
    np.testing.assert_allclose(weight[-1], slow[0], atol=1e-6)
    np.testing.assert_allclose(bias[-1], slow[1], atol=1e-6)


@pytest.mark.parametrize("seed", [180, 384])
def test_slopes_and_shifts_that_do_nearly_the_same(seed):
    # Means of fifty standard deviations: Newton's steps get stuck on the way from changed slopes to changed shifts.
    rng = np.random.default_rng(seed)
    u = 1.03 + 0.005 * rng.normal(size=(1, 38)) + 0.02 * rng.normal(size=(28, 38))
    v = 0.07 * rng.normal(size=(1, 38)) + 0.28 * rng.normal(size=(17, 38))
    path = lineas.sparse_path(u, v, n_penalties=6, min_ratio=10**-2.5, l1_ratio=1e-9)
    assert path.kkt_residual.max() <= 1e-8


def test_constant_neurons_at_one_share_slope_and_shift_in_any_way():
    # At |u| = 1 both cost the same: many solutions, of which rounding must not make none.
    rng = np.random.default_rng(11)
    for _ in range(100):
        u = np.tile(rng.choice([1.0, -1.0, 0.3], 8), (3, 1))
        v = 10 * rng.normal(size=(5, 8))
        path = lineas.sparse_path(u, v, n_penalties=4, l1_ratio=1.0)
        assert np.isfinite(path.weight).all() and np.isfinite(path.bias).all() and (path.weight >= 0).all()
        gap = np.abs(path.weight * u[0] + path.bias - v.mean(axis=0))
        limit = np.minimum(path.penalties[:, None] / 2 / np.maximum(np.abs(u[0]), 1), np.abs(u[0] - v.mean(axis=0)))
        free = path.weight > 0
        np.testing.assert_allclose(gap[free], limit[free], rtol=1e-9, atol=1e-12)


def test_moments_are_those_of_the_pairs():
    rng = np.random.default_rng(4)
    for dtype in DTYPES:
        u, v = sample(rng, 33, 20, dtype), sample(rng, 50, 20, dtype, ties=True)
        mass = rng.uniform(size=33)
        for u_mass in (None, mass):
            got = _core.quantile_moments([u], [v], None if u_mass is None else [u_mass], None, ["u"], ["v"], 2)[0]
            np.testing.assert_allclose(got, reference.quantile_moments(u, v, u_mass), rtol=1e-9, atol=1e-9)
    constant = _core.quantile_moments([np.full((5, 2), 0.1)], [rng.normal(size=(4, 2))], None, None, ["u"], ["v"], 1)
    assert (constant[0][2:4] == 0).all()


def test_losses_are_the_distances():
    rng = np.random.default_rng(5)
    u, v, x, y = (rng.normal(size=(n, 30)) + rng.normal(size=30) for n in (20, 33, 12, 25))
    path = lineas.sparse_path(u, v, held_out=(x, y), n_penalties=7, l1_ratio=0.5)
    for k in range(7):
        one = path.at(index=k)
        assert path.loss[k] == pytest.approx(lineas.wasserstein(one.transform(u), v).sum(), rel=1e-10)
        assert path.held_out_loss[k] == pytest.approx(lineas.wasserstein(one.transform(x), y).sum(), rel=1e-10)
    assert path.index(best=True) == np.argmin(path.held_out_loss)


def test_without_penalties_left_it_is_the_linear_map():
    rng = np.random.default_rng(6)
    u, v = rng.normal(size=(32, 50)), rng.normal(size=(40, 50)) * 2 + 1
    path = lineas.sparse_path(u, v, min_ratio=1e-9, n_penalties=20, l1_ratio=0.5)
    dense = lineas.fit(u, v)
    np.testing.assert_allclose(path.at(index=-1).weight, dense.weight, atol=1e-6)
    np.testing.assert_allclose(path.at(index=-1).bias, dense.bias, atol=1e-6)


@pytest.mark.parametrize(("l1", "group"), [(0.5, 0.0), (0.0, 0.3), (0.4, 0.2)])
def test_fit_is_one_point(l1, group):
    rng = np.random.default_rng(7)
    source = {"a": rng.normal(size=(20, 30)), "b": rng.normal(size=(20, 11)) * 2}
    target = {"a": rng.normal(size=(31, 30)) + 1, "b": rng.normal(size=(31, 11))}
    maps = lineas.fit(source, target, l1=l1, group=group)
    path = lineas.sparse_path(source, target, penalties=[l1 + group], l1_ratio=l1 / (l1 + group))
    for name in source:
        np.testing.assert_allclose(maps[name].weight, path.at(index=0)[name].weight, atol=1e-8)
        moments = moments_of(source[name], target[name])
        largest = _core.largest_penalty([moments], l1 / (l1 + group))[0]
        distance = reference.kkt_distance(moments, maps[name].weight, maps[name].bias, l1, group)
        assert distance <= 1e-8 * largest
    assert maps.metadata["l1"] == l1
    assert lineas.fit(source["a"], target["a"], l1=l1, group=group) == maps["a"]


def test_threads_and_modules_do_not_change_a_bit():
    rng = np.random.default_rng(8)
    moments = [moments_of(*problem(rng, 500)) for _ in range(40)]
    penalties = np.geomspace(1, 1e-3, 30)
    alone = [_core.sparse_path([one], [one], penalties, 0.5, False, 1.0, 1) for one in moments]
    together = _core.sparse_path(moments, moments, penalties, 0.5, False, 1.0, 3)
    assert np.hstack([one[0] for one in alone]).tobytes() == together[0].tobytes()
    for part in (2, 3, 4, 5):
        assert np.vstack([one[part] for one in alone]).tobytes() == together[part].tobytes()


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), d=st.integers(1, 40), ratio=st.sampled_from([0.0, 0.3, 1.0]))
def test_a_larger_penalty_never_fits_better(seed, d, ratio):
    u, v = problem(np.random.default_rng(seed), d)
    path = lineas.sparse_path(u, v, n_penalties=12, l1_ratio=ratio)
    assert (np.diff(path.loss) <= 1e-9 * path.loss[0]).all()
    assert path.support[0] == 0
    assert (path.weight >= 0).all()


def test_neurons_permute_with_the_columns():
    rng = np.random.default_rng(9)
    u, v = problem(rng, 50)
    order = rng.permutation(50)
    path, other = lineas.sparse_path(u, v, l1_ratio=0.5), lineas.sparse_path(u[:, order], v[:, order], l1_ratio=0.5)
    np.testing.assert_allclose(path.weight[:, order], other.weight, atol=1e-7)


# ---- the container --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path():
    rng = np.random.default_rng(10)
    source = {"a": rng.normal(size=(20, 40)), "b": rng.normal(size=(20, 60))}
    target = {name: x + rng.normal(size=x.shape[1]) for name, x in source.items()}
    return lineas.sparse_path(source, target, held_out=(target, source))


def test_points_by_support(path):
    for count in (0, 1, 7, 50):
        assert path.at(support=count).support == count
    assert path.at(support=0.1).support == 10
    assert path.at(support=0.0).support == 0
    assert path.support[path.index(support=30)] <= 30
    with pytest.raises(ValueError, match="support must be from 0 to 100 neurons, got 101"):
        path.at(support=101)
    with pytest.raises(
        ValueError, match=r"support must be a share from 0.0 to 1.0 or a whole number of neurons, got 1.5"
    ):
        path.at(support=1.5)
    with pytest.raises(TypeError, match="support must be an int"):
        path.at(support="1 %")
    with pytest.raises(TypeError, match="support must be an int"):
        path.at(support=True)


def test_an_impossible_support_names_the_nearest():
    rng = np.random.default_rng(11)
    u = rng.normal(size=(20, 100))
    path = lineas.sparse_path(u, u + rng.normal(size=100), min_ratio=0.5, n_penalties=5, l1_ratio=0.5)
    most = int(path.support.max())
    with pytest.raises(
        ValueError, match=f"no point of the path has a support of 100 of 100 neurons; the nearest is {most} "
    ):
        path.at(support=100)
    dense = lineas.sparse_path(u, u + 1.0, penalties=[1e-3, 1e-4], l1_ratio=0.5)
    with pytest.raises(ValueError, match=r"a support of 5 of 100 neurons; the nearest is 100 \(100.00%\), index 0"):
        dense.at(support=5)


def test_a_support_that_a_group_skips_names_the_nearest():
    rng = np.random.default_rng(12)
    u = rng.normal(size=(20, 50))
    path = lineas.sparse_path(u, u + 1.0, l1_ratio=0.1, n_penalties=6)
    message = r"no point of the path has a support from 1 to 10 of 50 neurons; the nearest are 0 and (\d+) \(.*l1_ratio"
    for find in (path.at, path.index):
        with pytest.raises(ValueError, match=message):
            find(support=10)
    assert path.at(support=0).support == 0


def test_a_support_that_shrinks_again_at_the_last_penalty():
    weight = np.ones((3, 4))
    weight[1] = 2
    path = SparsePath(
        penalties=np.array([3.0, 2.0, 1.0]),
        l1_ratio=0.5,
        loss=np.ones(3),
        held_out_loss=None,
        modules=None,
        widths=(4,),
        weight=weight,
        bias=np.zeros((3, 4)),
    )
    for find in (path.at, path.index):
        with pytest.raises(ValueError, match=r"support from 1 to 2 of 4 neurons; the nearest are 0 and 4 .*, index 1;"):
            find(support=2)
    assert path.index(support=4) == 1 and path.index(support=0) == 2


def test_points_by_penalty(path):
    assert path.at(penalty=float(path.penalties[3])) == path.at(index=3)
    assert path.at(penalty=1e9).support == 0
    between = float(np.sqrt(path.penalties[3] * path.penalties[4]))
    one = path.at(penalty=between)
    assert path.support[3] <= one.support <= path.support[4]
    assert one.metadata["penalty"] == between
    with pytest.raises(ValueError, match=r"penalty must be at least .*, the smallest of the path, got 1e-09"):
        path.at(penalty=1e-9)
    with pytest.raises(ValueError, match=r"penalty must be above 0, got -1"):
        path.at(penalty=-1)


def test_points_by_index(path):
    assert len(path) == 50
    assert path[2] == path.at(index=2)
    assert path.at(index=-1) == path[49]
    assert len(list(path)) == 50
    with pytest.raises(IndexError, match="index must be from -50 to 49, got 50"):
        path[50]
    with pytest.raises(TypeError, match="index must be an int, got float"):
        path.at(index=1.0)
    with pytest.raises(TypeError, match="exactly one of penalty, support, index and best=True"):
        path.at()
    with pytest.raises(TypeError, match="exactly one of"):
        path.at(index=1, best=True)
    with pytest.raises(TypeError, match="best must be True or False, got 1"):
        path.at(best=1)
    with pytest.raises(ValueError, match="best: the path has no held-out loss"):
        lineas.sparse_path(np.eye(3), np.eye(3) + 1).at(best=True)


def test_what_a_path_tells(path):
    assert path.module_support.shape == (50, 2)
    assert (path.module_support.sum(axis=1) == path.support).all()
    assert path.module_support[-1].tolist() == [path[49]["a"].support, path[49]["b"].support]
    assert path.kkt_residual.max() <= 1e-8
    assert repr(path).startswith("SparsePath(50 penalties from ")
    assert path[5].metadata["method"] == "sparse linear"
    assert path.l1_ratio == path[5].metadata["l1_ratio"] == 1.0
    one = lineas.sparse_path(np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32) * 2)
    assert isinstance(one[0], lineas.AffineMap)
    assert one[0].dtype == np.float32


# ---- bad input ------------------------------------------------------------------------------------------------------

GOOD = np.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"source": {"a": GOOD}}, TypeError, "source and target must both be arrays or both be mappings"),
        ({"target": GOOD[:, :2]}, ValueError, "source and target must have the same number of columns"),
        ({"source": np.full((3, 3), np.nan)}, ValueError, "source: nan at row 0, column 0"),
        ({"source": GOOD[:1]}, ValueError, "source must have at least 2 rows"),
        (
            {"source": GOOD.astype(bool)},
            TypeError,
            "source must be float16, bfloat16, float32, float64 or an integer type, got dtype bool",
        ),
        ({"n_penalties": 1}, ValueError, "n_penalties must be at least 2, got 1"),
        ({"n_penalties": 2.5}, TypeError, "n_penalties must be an int, got float"),
        ({"min_ratio": 0}, ValueError, "min_ratio must be above 0"),
        ({"min_ratio": 1}, ValueError, "min_ratio must be below 1"),
        ({"l1_ratio": 1.5}, ValueError, "l1_ratio must be from 0 to 1, got 1.5"),
        ({"l1_ratio": "all"}, TypeError, "l1_ratio must be a real number"),
        ({"penalties": [1.0, 2.0]}, ValueError, "penalties must fall, got 1 and then 2 at index 1"),
        ({"penalties": []}, ValueError, "penalties is empty"),
        ({"penalties": [1.0, 0.0]}, ValueError, r"penalties\[1\] must be above 0, got 0"),
        ({"held_out": GOOD}, TypeError, r"held_out must be a pair \(source, target\)"),
        ({"held_out": (GOOD[:, :2], GOOD[:, :2])}, ValueError, "held_out source must have 3 columns"),
        ({"held_out": ({"a": GOOD}, {"a": GOOD})}, TypeError, "held_out must hold mappings where source is one"),
        ({"held_out": (GOOD, np.full((4, 3), np.inf))}, ValueError, "held_out target: inf at row 0"),
        ({"target": GOOD}, ValueError, "source already has the quantiles of target"),
        ({"source": GOOD * 1e200}, ValueError, "the squares of source or its target overflow float64"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"source": GOOD, "target": GOOD + 1, **change}
    with pytest.raises(error, match=message):
        lineas.sparse_path(arguments.pop("source"), arguments.pop("target"), **arguments)


def test_held_out_modules_must_be_those_of_the_source():
    with pytest.raises(ValueError, match="held_out must have the modules of source: it lacks 'a', it also has 'b'"):
        lineas.sparse_path({"a": GOOD}, {"a": GOOD + 1}, held_out=({"b": GOOD}, {"b": GOOD}))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"l1": -1.0}, ValueError, "l1 must not be negative"),
        ({"group": np.nan}, ValueError, "group must be finite"),
        ({"l1": 1.0, "method": "mean"}, ValueError, "l1 and group are penalties of method 'linear', got method 'mean'"),
    ],
)
def test_bad_penalties_of_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        lineas.fit(GOOD, GOOD + 1, **arguments)


def test_the_engine_refuses_what_is_not_moments():
    moments = [np.zeros((5, 3))]
    good = (moments, None, np.ones(1), 0.5, True, 1.0, 1)
    for change, error, message in [
        ({0: [np.zeros((4, 3))]}, ValueError, r"moments must have shape \[5, d\] with d >= 1, got \[4, 3\]"),
        ({0: [np.zeros((5, 0))]}, ValueError, r"moments must have shape"),
        ({0: [np.zeros((5, 3), np.float32)]}, TypeError, "moments must have dtype float64"),
        ({0: 3}, TypeError, "moments must be a sequence, got int"),
        ({1: [np.zeros((5, 4))]}, ValueError, "held_out must have the modules and widths of moments"),
        ({2: np.array([0.0])}, ValueError, "penalties must be one or more finite numbers above 0"),
        ({2: np.empty(0)}, ValueError, "penalties must be one or more finite numbers above 0"),
        ({3: 2.0}, ValueError, "l1_ratio must be from 0 to 1, got 2.0"),
        ({5: "x"}, TypeError, "largest must be a real number"),
    ]:
        arguments = [change.get(k, value) for k, value in enumerate(good)]
        with pytest.raises(error, match=message):
            _core.sparse_path(*arguments)
    assert (_core.sparse_path(*good)[0] == 1).all()


@pytest.mark.parametrize("fill", [np.nan, np.inf, 1e300, -1.0])
def test_the_engine_survives_moments_that_mean_nothing(fill):
    for row in range(5):
        moments = np.random.default_rng(0).uniform(1, 2, size=(5, 20))
        moments[row, 3] = fill
        for ratio in RATIOS:
            largest = _core.largest_penalty([moments], ratio)[0]
            largest = float(largest or 1) if np.isfinite(largest) else 1.0
            arguments = [moments], None, np.geomspace(1, 1e-3, 5), ratio, False, largest, 1
            if fill == -1:
                _core.sparse_path(*arguments)
            else:
                with pytest.raises(ValueError, match="numbers so large or small that a result is out of range"):
                    _core.sparse_path(*arguments)


def test_types_of_activations():
    rng = np.random.default_rng(12)
    x = rng.normal(size=(16, 9))
    for dtype in ("float32", "float16"):
        path = lineas.sparse_path(encode(x, dtype), encode(x + 1, dtype))
        assert path.weight.dtype == np.float32
    assert_close(lineas.sparse_path(x, x + 1).at(index=-1).bias, lineas.sparse_path(x, x + 1).bias[-1])
