"""The engine against numbers of the published implementation (tests/golden)."""

import numpy as np
import pytest

import lineas
from lineas import AffineMap, _core
from lineas.arrays import reference

RTOL = {"f32": 1e-5, "f64": 1e-10}
DTYPE = {"f32": np.float32, "f64": np.float64}


@pytest.fixture(scope="module")
def w2(golden):
    return golden("w2")


@pytest.fixture(scope="module")
def prox(golden):
    return golden("prox")


@pytest.fixture(scope="module")
def pooling(golden):
    return golden("pooling_hooks")


@pytest.fixture(scope="module")
def local(golden):
    return golden("local")


def reference_grad(u, v):
    value, grad, _, _ = reference.wasserstein(u, v)
    return value, grad


# --- W2: per_neuron is the sum over n, loss its mean over d, both of arrays [d, n] ---


@pytest.mark.parametrize("function", [lineas.wasserstein_grad, reference_grad], ids=["engine", "reference"])
@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c5"])
def test_w2(w2, case, dtype, function):
    u, v = w2[f"{case}_{dtype}_u"].T, w2[f"{case}_{dtype}_v"].T
    n, d = u.shape
    value, grad = function(u, v)
    assert value.dtype == DTYPE[dtype]
    rtol = RTOL[dtype]
    np.testing.assert_allclose(n * value, w2[f"{case}_{dtype}_p2_per_neuron"], rtol=rtol)
    np.testing.assert_allclose(n * value.mean(), w2[f"{case}_{dtype}_p2_loss"], rtol=rtol)
    theirs, ours = w2[f"{case}_{dtype}_p2_grad_u"].T, n / d * grad
    if case == "c1":  # has ties: equal sums within the groups, and equal entries there
        assert any(len(np.unique(u[:, j])) < n for j in range(d))
        for j in range(d):
            for number in np.unique(u[:, j]):
                tied = u[:, j] == number
                np.testing.assert_allclose(ours[tied, j].sum(), theirs[tied, j].sum(), rtol=rtol, atol=rtol)
                assert len(np.unique(ours[tied, j])) == 1
    else:
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * np.abs(theirs).max())


def test_w2_of_unequal_sizes(w2):
    """The published code keeps some of the longer sample's columns; on those the distance is the same."""
    u, v = w2["uneq_u"].T, w2["uneq_v"].T
    n = len(u)
    kept = np.ascontiguousarray(v[w2["uneq_idx"]])
    np.testing.assert_allclose(n * lineas.wasserstein(u, kept).mean(), w2["uneq_loss"], rtol=1e-5)


# --- the proximal step (of the cases listed in the file, the first six have results) ---


def penalties(case):
    _, tau, l1, l2, l1_bias, l2_bias = case
    return tau, l1, l2, l1 if np.isnan(l1_bias) else l1_bias, l2 if np.isnan(l2_bias) else l2_bias


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("case", range(6))
def test_prox(prox, case, dtype):
    tau, l1, l2, l1_bias, l2_bias = penalties(prox["cases"][case])
    for group in range(len(prox["dims"]) + 1):
        w, b = (prox[f"{x}_in_{group}"][0].astype(DTYPE[dtype]) for x in "wb")
        ours_w = 1 + lineas.prox_sparse_group(w - 1, tau=tau, l1=l1, group=l2)
        ours_b = lineas.prox_sparse_group(b, tau=tau, l1=l1_bias, group=l2_bias)
        for ours, theirs in ((ours_w, f"k{case}_{dtype}_w_{group}"), (ours_b, f"k{case}_{dtype}_b_{group}")):
            np.testing.assert_allclose(ours, prox[theirs][0], rtol=RTOL[dtype], atol=RTOL[dtype] / 10)
        assert np.array_equal(ours_w == 1, prox[f"k{case}_{dtype}_w_{group}"][0] == 1)  # the zeros are the same
        assert np.array_equal(ours_b == 0, prox[f"k{case}_{dtype}_b_{group}"][0] == 0)


@pytest.mark.parametrize("engine", [True, False], ids=["engine", "reference"])
@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("case", range(6))
def test_step_without_gradient_is_the_prox(prox, case, dtype, engine):
    tau, l1, l2, l1_bias, l2_bias = penalties(prox["cases"][case])
    groups = range(len(prox["dims"]) + 1)
    w, b = (np.concatenate([prox[f"{x}_in_{g}"][0] for g in groups]).astype(DTYPE[dtype]) for x in "wb")
    offsets = np.cumsum([0] + [prox[f"w_in_{g}"].size for g in groups])
    still = np.zeros_like(w)
    if engine:
        penalty, support = _core.step(w, b, still, still, offsets, tau, l1, l2, l1_bias, l2_bias, None, 1)
    else:
        penalty, support = reference.step(w, b, still, still, offsets, tau, l1, l2, l1_bias, l2_bias)
    for ours, x in ((w, "w"), (b, "b")):
        theirs = np.concatenate([prox[f"k{case}_{dtype}_{x}_{g}"][0] for g in groups])
        np.testing.assert_allclose(ours, theirs, rtol=RTOL[dtype], atol=RTOL[dtype] / 10)
    np.testing.assert_allclose(penalty, prox[f"k{case}_{dtype}_reg"], rtol=RTOL[dtype])
    assert support == np.count_nonzero((w != 1) | (b != 0))


# --- pooling ---


def as_bytes(mask):
    return None if mask is None else mask.astype(np.uint8)


SIDES = {"min": "none left right", "max": "none left right", "mean": "none left right", "last": "none left"}


@pytest.mark.parametrize(("mode", "side"), [(mode, side) for mode in SIDES for side in SIDES[mode].split()])
def test_pooling(pooling, mode, side):
    mask = None if side == "none" else pooling[f"mask_{side}"]
    for pool in (lambda *a: _core.pool(*a, 1), reference.pool):
        pooled, _ = pool(pooling["x"], as_bytes(mask), mode)
        np.testing.assert_allclose(pooled, pooling[f"{mode}_{side}"], rtol=1e-5, atol=1e-7)


def test_last_token_under_right_padding(pooling):
    """The published code refuses it; ours takes the last real token."""
    mask = pooling["mask_right"]
    last = mask.sum(axis=1) - 1
    pooled, _ = _core.pool(pooling["x"], as_bytes(mask), "last", 1)
    assert np.array_equal(pooled, pooling["x"][np.arange(4), last])


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_all(pooling, side):
    """Theirs keeps the padding, ours the real tokens of it."""
    mask = pooling[f"mask_{side}"]
    pooled, index = _core.pool(pooling["x"], as_bytes(mask), "all", 1)
    assert index is None and np.array_equal(pooled, pooling[f"all_{side}"][mask == 1])


@pytest.mark.parametrize("mode", ["min", "max", "mean"])
def test_pooling_over_space(pooling, mode):
    x = pooling["x4"]
    tokens = np.ascontiguousarray(x.reshape(*x.shape[:2], -1).transpose(0, 2, 1))
    np.testing.assert_allclose(_core.pool(tokens, None, mode, 1)[0], pooling[f"{mode}_4d"], rtol=1e-5, atol=1e-7)


def test_pooling_backward(pooling):
    mask = as_bytes(pooling["mask_left"])
    grad = _core.pool_backward(pooling["mean_left_gout"], mask, "mean", None, 6, 1)
    np.testing.assert_allclose(grad, pooling["mean_left_gx"], rtol=1e-5, atol=1e-8)


# --- maps at a strength, as the published hooks apply them ---


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
def test_hook_output(pooling, strength):
    one = AffineMap(pooling["h_w"][0], pooling["h_b"][0])
    np.testing.assert_allclose(
        one.transform(pooling["x"], strength), pooling[f"h_all_s{strength}"], rtol=1e-5, atol=1e-6
    )


def test_hook_output_over_space(pooling):
    one = AffineMap(pooling["h4_w"][0], pooling["h4_b"][0])
    np.testing.assert_allclose(one.transform(pooling["x4"], 0.7, axis=1), pooling["h4_all_s0.7"], rtol=1e-5, atol=1e-6)


def test_hook_inverse(pooling):
    one = AffineMap(pooling["h_w"][0], pooling["h_b"][0])
    np.testing.assert_allclose(one.inverse().transform(pooling["x"]), pooling["h_inverse"], rtol=1e-5, atol=1e-6)


# --- local maps: theirs add noise of 1e-8 to the source, so the slopes agree to about 1e-6 ---


@pytest.mark.parametrize("case", ["l0", "l1"])
def test_linear_map(local, case):
    u, v = local[f"{case}_src"], local[f"{case}_dst"]
    weight, bias = reference.fit_local(u, v, None, None, "linear")
    one = lineas.fit(u, v)
    for ours_w, ours_b in ((one.weight, one.bias), (weight, bias)):
        np.testing.assert_allclose(ours_w, local[f"{case}_linear_w"][0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours_b, local[f"{case}_linear_b"][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize(("method", "name"), [("linear", "linear"), ("gaussian", "gauss"), ("mean", "mean")])
@pytest.mark.parametrize("case", ["l0", "l1"])
def test_local_map_output(local, case, method, name, strength):
    one = lineas.fit(local[f"{case}_src"], local[f"{case}_dst"], method=method)
    out = one.transform(local[f"{case}_z"], strength)
    np.testing.assert_allclose(out, local[f"{case}_{name}_q_all_s{strength}_out"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", ["l0", "l1"])
def test_moments_of_the_local_samples(local, case):
    for sample, number in (("src", 1), ("dst", 2)):
        seen = lineas.moments(local[f"{case}_{sample}"])
        np.testing.assert_allclose(seen.mean, local[f"{case}_mu{number}"], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(seen.std(), local[f"{case}_std{number}"], rtol=1e-5)


def test_degenerate_neurons(local):
    """0: constant source (theirs is noise over noise; ours the shift), 1: constant target, 2: both constant."""
    u, v = local["deg_src"], local["deg_dst"]
    one = lineas.fit(u, v)
    np.testing.assert_allclose(one.weight[0], 1)
    np.testing.assert_allclose(one.bias[0], v[:, 0].mean(dtype=np.float64) - u[0, 0], rtol=1e-5)
    np.testing.assert_allclose([one.weight[1], one.bias[1]], [0, -1], atol=1e-6)
    np.testing.assert_allclose(one.transform(u[:, 2:3].repeat(3, axis=1))[:, 2], v[:, 2], rtol=1e-6)
