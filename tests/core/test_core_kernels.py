"""Every kernel against its NumPy twin, in all input types and at sizes around the widths of the vector code."""

import numpy as np
import pytest
from samples import DTYPES, assert_close, assert_same_bits, encode, sample, w2

from lineas import _core
from lineas.arrays import reference
from lineas.arrays.reference import widen

# Rows: around the sizes of the sorting networks; columns: around the widths of vectors and tiles.
SHAPES = [
    (1, 1),
    (2, 3),
    (3, 16),
    (7, 17),
    (16, 5),
    (31, 64),
    (32, 33),
    (33, 130),
    (64, 8),
    (65, 9),
    (200, 4),
    (513, 2),
]
PAIRS = [
    (1, 1, 5),
    (1, 4, 3),
    (5, 1, 3),
    (2, 2, 17),
    (32, 32, 33),
    (32, 48, 16),
    (33, 7, 9),
    (64, 64, 5),
    (100, 101, 3),
]


def check_w2(actual, expected, u, v):
    """To the rounding of the working type, relative to the spread of the numbers."""
    spread = max(1.0, float(np.abs(widen(u)).max()), float(np.abs(widen(v)).max())) ** 2
    for ours, theirs in zip(actual, expected, strict=True):
        if ours is not None:
            assert_close(ours, theirs, scale=2 * spread)


# --- sort ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", [False, True])
def test_sort(rng, dtype, ties):
    samples = [sample(rng, n, d, dtype, ties=ties) for n, d in SHAPES]
    before = [x.copy() for x in samples]
    out = _core.sort_columns(samples, [str(x.shape) for x in samples], 1)
    assert len(out) == len(samples)
    for x, same, ours in zip(samples, before, out, strict=True):
        assert_same_bits(x, same)
        assert not np.shares_memory(x, ours)
        assert ours.dtype == widen(x).dtype
        assert np.array_equal(ours, reference.sort_columns(x))


@pytest.mark.parametrize("n", [1000, 4096, 5000])
def test_sort_of_long_columns(rng, n):
    for x in (
        rng.normal(size=(n, 3)).astype(np.float32),
        rng.normal(size=(n, 3)),
        -np.arange(2.0 * n).reshape(n, 2),
    ):
        assert np.array_equal(_core.sort_columns([x], ["x"], 1)[0], np.sort(x, axis=0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sort_of_extreme_numbers(rng, dtype):
    info = np.finfo(dtype)
    numbers = [info.max, info.min, info.tiny, -info.tiny, info.smallest_subnormal, -info.smallest_subnormal]
    x = np.array([*numbers, 0.0, -0.0, 0.0, -0.0, 1.0, -1.0], dtype)
    x = np.stack([rng.permutation(x) for _ in range(37)], axis=1)
    ours = _core.sort_columns([x], ["x"], 1)[0]
    assert_same_bits(ours, reference.sort_columns(x))
    zeros = np.signbit(ours[ours == 0].reshape(4, 37))
    assert zeros[:2].all() and not zeros[2:].any()  # -0 before +0


# --- squared W2 ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", [False, True])
def test_wasserstein(rng, dtype, ties):
    us = [sample(rng, n, d, dtype, ties=ties) for n, _, d in PAIRS]
    vs = [sample(rng, m, d, dtype, ties=ties) for _, m, d in PAIRS]
    names = [str(k) for k in range(len(us))]
    values, grads, none_weight, none_bias = _core.wasserstein(us, vs, None, None, None, None, False, 2, names, names, 1)
    assert none_weight is None and none_bias is None
    for u, v, value, grad in zip(us, vs, values, grads, strict=True):
        expected = reference.wasserstein(u, v)
        check_w2((value, grad), expected[:2], u, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wasserstein_through_a_map(rng, dtype):
    for n, m, d in PAIRS:
        u, v = sample(rng, n, d, dtype), sample(rng, m, d, dtype)
        weight, bias = rng.normal(size=(2, d)).astype(widen(u).dtype)
        weight[: d // 3] = 0  # everything tied
        check_w2(w2(u, v, weight, bias), reference.wasserstein(u, v, weight, bias), u, v)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sides", ["u", "v", "uv"])
def test_wasserstein_with_masses(rng, dtype, sides):
    for n, m, d in PAIRS:
        u, v = sample(rng, n, d, dtype, ties=True), sample(rng, m, d, dtype)
        masses = [rng.uniform(0.1, 5, size=size) for size in (n, m)]
        for mass in masses:
            mass[1::3] = 0
        u_mass, v_mass = (mass if side in sides else None for mass, side in zip(masses, "uv", strict=True))
        weight, bias = rng.normal(size=(2, d)).astype(u.dtype)
        expected = reference.wasserstein(u, v, weight, bias, u_mass, v_mass)
        check_w2(w2(u, v, weight, bias, u_mass, v_mass), expected, u, v)


def test_masses_may_be_given_for_some_modules(rng):
    u, v, mass = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), rng.uniform(size=5)
    values, _, _, _ = _core.wasserstein([u, u], [v, v], None, None, [None, mass], None, False, 0, "ab", "ab", 1)
    assert_close(values[0], reference.wasserstein(u, v)[0])
    assert_close(values[1], reference.wasserstein(u, v, u_mass=mass)[0])


@pytest.mark.parametrize("gradient", [0, 1, 2])
def test_gradient_levels(rng, gradient):
    u, v = rng.normal(size=(32, 20)), rng.normal(size=(32, 20))
    weight, bias = rng.normal(size=(2, 20))
    everything = w2(u, v, weight, bias)
    some = w2(u, v, weight, bias, gradient=gradient)
    assert [part is not None for part in some] == [True, gradient == 2, gradient >= 1, gradient >= 1]
    for ours, theirs in zip(some, everything, strict=True):
        if ours is not None:
            assert_close(ours, theirs)


@pytest.mark.parametrize("m", [32, 20])
def test_sorted_target(rng, m):
    u, v = sample(rng, 32, 33), sample(rng, m, 33)
    for ours, theirs in zip(w2(u, np.sort(v, axis=0), v_sorted=True)[:2], w2(u, v)[:2], strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("n", [4, 32, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_do_not_depend_on_the_order_of_rows(rng, dtype, n):
    u, v = sample(rng, n, 20, dtype, ties=True), sample(rng, n, 20, dtype)
    value, grad, _, _ = w2(u, v)
    order = rng.permutation(n)
    again_value, again_grad, _, _ = w2(u[order], v[rng.permutation(n)])
    assert_same_bits(again_value, value)
    assert_same_bits(again_grad, grad[order])


def test_zeros_of_both_signs_are_tied():
    u, v = np.array([[0.0], [-0.0], [0.0], [-0.0]]), np.arange(4.0).reshape(4, 1)
    assert w2(u, v)[1].tolist() == [[-0.75]] * 4
    assert w2(u.astype(np.float32), v.astype(np.float32))[1].tolist() == [[-0.75]] * 4


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_denormals_are_not_flushed(dtype):
    small = np.finfo(dtype).smallest_subnormal
    u, v = np.array([[3 * small], [small]], dtype), np.array([[0.0], [0.0]], dtype)
    assert w2(u, v)[1].tolist() == [[float(3 * small)], [float(small)]]
    assert _core.sort_columns([u], ["u"], 1)[0].tolist() == [[float(small)], [float(3 * small)]]


def test_wasserstein_against_torch(rng):
    torch = pytest.importorskip("torch")
    u, v = rng.normal(size=(32, 9)), rng.normal(size=(32, 9))
    weight, bias = rng.normal(size=(2, 9))
    leaves = [torch.tensor(x, requires_grad=True) for x in (u, weight, bias)]
    x = leaves[1] * leaves[0] + leaves[2]
    loss = ((x.sort(0).values - torch.tensor(v).sort(0).values) ** 2).mean(0)
    loss.sum().backward()
    value, grad_u, grad_weight, grad_bias = w2(u, v, weight, bias)
    np.testing.assert_allclose(value, loss.detach(), rtol=1e-12)
    for ours, leaf in zip((grad_u, grad_weight, grad_bias), leaves, strict=True):
        np.testing.assert_allclose(ours, leaf.grad, rtol=1e-11, atol=1e-13)


# --- maps ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 1), (3, 5, 16), (2, 64, 9), (1, 130, 1), (40, 1, 3)])
@pytest.mark.parametrize("strength", [0.0, 0.7, 1.0, -2.0])
def test_affine(rng, dtype, shape, strength):
    z, grad_out = encode(rng.normal(size=shape), dtype), encode(rng.normal(size=shape), dtype)
    weight, bias = rng.normal(size=(2, shape[1])).astype(widen(z).dtype)
    weight[::3] = 1
    out, expected = _core.affine_apply(z, weight, bias, strength, 1), reference.affine_apply(z, weight, bias, strength)
    assert_same_bits(out, expected)
    if strength == 0:
        assert_same_bits(out, z)
    grads, expected = (
        _core.affine_backward(z, weight, strength, grad_out, True, 1),
        reference.affine_backward(z, weight, strength, grad_out),
    )
    assert_same_bits(grads[0], expected[0])
    for ours, theirs in zip(grads[1:], expected[1:], strict=True):
        assert_close(ours, theirs, scale=10)
    assert _core.affine_backward(z, weight, strength, grad_out, False, 1)[0] is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types_round_to_the_nearest_even(rng, dtype):
    """All bit patterns of finite numbers through x * w + b, against NumPy's own rounding (ml_dtypes for bfloat16)."""
    bits = np.arange(2**16, dtype=np.uint16)
    z = bits if dtype == "bfloat16" else bits.view(np.float16)
    z = z[np.isfinite(widen(z))].reshape(1, 1, -1)
    weight, bias = np.array([1.0009766], np.float32), np.array([3e-6], np.float32)
    work = weight * widen(z) + bias
    out = _core.affine_apply(z, weight, bias, 1.0, 1)
    if dtype == "bfloat16":
        ml_dtypes = pytest.importorskip("ml_dtypes")
        assert_same_bits(out, work.astype(ml_dtypes.bfloat16).view(np.uint16))
    else:
        with np.errstate(over="ignore"):
            assert_same_bits(out, work.astype(np.float16))


def test_affine_keeps_what_is_not_finite(rng):
    for dtype in DTYPES:
        z = encode(np.array([[np.nan, np.inf, -np.inf, 1.0]]), dtype).reshape(1, 4, 1)
        ones = np.ones(4, widen(z).dtype)
        out = widen(_core.affine_apply(z, 2 * ones, ones, 1.0, 1)).ravel()
        assert np.isnan(out[0]) and out[1:].tolist() == [np.inf, -np.inf, 3.0]


# --- pooling ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["mean", "min", "max", "last", "all"])
@pytest.mark.parametrize("masked", [False, True])
def test_pool(rng, dtype, mode, masked):
    for batch, tokens, d in [(1, 1, 1), (3, 5, 17), (2, 33, 8), (4, 7, 130)]:
        x = encode(rng.normal(size=(batch, tokens, d)).round(1), dtype)  # ties
        mask = None
        if masked:
            mask = rng.integers(0, 2, size=(batch, tokens)).astype(np.uint8) * 7
            mask[np.arange(batch), rng.integers(0, tokens, size=batch)] = 1
        out, index = _core.pool(x, mask, mode, 1)
        expected, expected_index = reference.pool(x, mask, mode)
        if mode == "mean":
            assert_close(out, expected)
        else:
            assert_same_bits(out, expected)
        if mode in ("min", "max"):
            assert_same_bits(index, expected_index)
        else:
            assert index is None
        grad_out = rng.normal(size=out.shape).astype(out.dtype)
        grad = _core.pool_backward(grad_out, mask, mode, index, tokens, 1)
        assert_close(grad, reference.pool_backward(grad_out, mask, mode, index, tokens))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["mean", "min", "max", "last", "all"])
def test_pool_of_many_tokens_and_columns(rng, dtype, mode):
    """Whole and broken groups of rows, and columns beyond a strip."""
    x = sample(rng, 2 * 21, 2085, dtype, ties=True).reshape(2, 21, 2085)
    mask = np.ones((2, 21), np.uint8)
    mask[0, [0, 5, 6, 20]] = 0
    mask[1, 8:] = 0
    out, index = _core.pool(x, mask, mode, 1)
    expected, expected_index = reference.pool(x, mask, mode)
    assert_close(out, expected)
    if index is not None:
        assert_same_bits(index, expected_index)


def test_padding_is_not_looked_at(rng):
    x = rng.normal(size=(1, 4, 3)).astype(np.float32)
    x[0, 0], x[0, 3] = np.nan, np.inf
    mask = np.array([[0, 1, 1, 0]], np.uint8)
    for mode in ("mean", "min", "max", "last", "all"):
        assert np.isfinite(_core.pool(x, mask, mode, 1)[0]).all()


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_extreme_of_a_token_that_is_nan(rng, mode):
    x = rng.normal(size=(2, 6, 3))
    x[0, 2, 1] = x[0, 4, 1] = np.nan
    out, index = _core.pool(x, None, mode, 1)
    assert np.isnan(out[0, 1]) and index[0, 1] == 2
    assert np.isnan(out).sum() == 1
    infinite = np.full((1, 3, 1), np.inf if mode == "min" else -np.inf)
    out, index = _core.pool(infinite, np.array([[0, 1, 1]], np.uint8), mode, 1)
    assert np.isinf(out[0, 0]) and index[0, 0] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_mean_takes_what_is_not_finite_from_every_lane(rng, dtype, value):
    for j in range(37):
        x = sample(rng, 11, 37, dtype).reshape(1, 11, 37)
        x[0, j % 11, j] = encode(np.array([value]), dtype)[0]
        (out,) = _core.pool(x, None, "mean", 1)[0]
        assert out[j] == value or (np.isnan(out[j]) and np.isnan(value))
        assert np.count_nonzero(~np.isfinite(out)) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_moments_find_what_is_not_finite_in_every_lane(rng, dtype, value):
    x = sample(rng, 300, 37, dtype)
    for j in range(37):
        bad = x.copy()
        bad[7 * j, j] = encode(np.array([value]), dtype)[0]
        state = fresh(37)
        with pytest.raises(ValueError, match=f"x: {value} at row {7 * j}, column {j}"):
            _core.moments_update(bad, 0, *state, "x", 1)
        for after, before in zip(state, fresh(37), strict=True):
            assert_same_bits(after, before)


def test_pool_of_nan_is_nan(rng):
    x = rng.normal(size=(1, 3, 2))
    x[0, 1, 0] = np.nan
    assert np.isnan(_core.pool(x, None, "mean", 1)[0]).tolist() == [[True, False]]


@pytest.mark.parametrize("mode", ["mean", "min", "max", "last", "all"])
def test_pool_against_torch(rng, mode):
    torch = pytest.importorskip("torch")
    x, mask = rng.normal(size=(3, 6, 4)), np.array([[0, 0, 1, 1, 1, 1], [1] * 6, [1, 1, 0, 1, 0, 0]], np.uint8)
    leaf, real = torch.tensor(x, requires_grad=True), torch.tensor(mask).bool()
    if mode == "all":
        pooled = leaf[real]
    elif mode == "last":
        pooled = leaf[[0, 1, 2], [5, 5, 3]]
    elif mode == "mean":
        pooled = (leaf * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    else:
        fill = torch.inf if mode == "min" else -torch.inf
        pooled = getattr(leaf.masked_fill(~real[..., None], fill), mode)(1).values
    weights = rng.normal(size=tuple(pooled.shape))
    (pooled * torch.tensor(weights)).sum().backward()
    ours, index = _core.pool(x, mask, mode, 1)
    np.testing.assert_allclose(ours, pooled.detach(), rtol=1e-13)
    np.testing.assert_allclose(_core.pool_backward(weights, mask, mode, index, 6, 1), leaf.grad, rtol=1e-13)


# --- moments ---


def fresh(d):
    return [np.zeros(d), np.zeros(d), np.full(d, np.inf), np.full(d, -np.inf)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments(rng, dtype):
    for d in (1, 17, 130):
        ours, theirs, ours_count, theirs_count = fresh(d), fresh(d), 0, 0
        for n in (1, 5, 64, 333):
            x = sample(rng, n, d, dtype)
            ours_count = _core.moments_update(x, ours_count, *ours, "x", 1)
            theirs_count = reference.moments_update(x, theirs_count, *theirs)
            assert ours_count == theirs_count
        rtol = 1e-11 if dtype == "float64" else 1e-7  # 256 rows and more are summed in float32
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)
        other = fresh(d)
        other_count = _core.moments_update(sample(rng, 9, d, dtype), 0, *other, "x", 1)
        copy = [x.copy() for x in other]
        assert _core.moments_merge(ours_count, *ours, other_count, *other) == ours_count + 9
        assert reference.moments_merge(theirs_count, *theirs, other_count, *other) == ours_count + 9
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)
        for a, b in zip(other, copy, strict=True):
            assert_same_bits(a, b)


def test_merging_empty_moments(rng):
    x = rng.normal(size=(9, 3))
    state, empty = fresh(3), fresh(3)
    count = _core.moments_update(x, 0, *state, "x", 1)
    before = [part.copy() for part in state]
    assert _core.moments_merge(count, *state, 0, *fresh(3)) == 9
    assert _core.moments_merge(0, *empty, count, *state) == 9
    for a, b, c in zip(state, before, empty, strict=True):
        assert np.array_equal(a, b)
        np.testing.assert_allclose(c, a, rtol=1e-15)
    assert _core.moments_merge(0, *fresh(3), 0, *fresh(3)) == 0


# --- proximal step and optimiser ---


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("d", [1, 7, 64, 1025])
def test_prox(rng, dtype, d):
    x = rng.normal(size=d).astype(dtype)
    for tau, l1, group in [(0.3, 0.5, 0.2), (1.0, 0.0, 0.5), (1.0, 0.4, 0.0), (0.0, 1.0, 1.0), (1.0, 0.1, 9.0)]:
        ours, theirs = _core.prox_sparse_group(x, tau, l1, group), reference.prox_sparse_group(x, tau, l1, group)
        assert_close(ours, theirs)
        assert np.array_equal(ours == 0, theirs == 0)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e25, 1e36])
def test_prox_where_squares_leave_the_range_of_float32(rng, scale):
    x = (scale * rng.normal(size=1000)).astype(np.float32)
    expected = reference.prox_sparse_group(x, 1.0, 0.1 * scale, 0.3 * scale)
    ours = _core.prox_sparse_group(x, 1.0, 0.1 * scale, 0.3 * scale)
    assert np.count_nonzero(expected)
    assert_close(ours / np.float32(scale), expected / np.float32(scale))
    assert np.array_equal(ours == 0, expected == 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_step_along_a_bad_gradient_changes_nothing(rng, bad, dtype):
    for position, name in [(0, "weight"), (1234, "bias"), (2999, "weight")]:
        w, b, gw, gb = rng.normal(size=(4, 3000)).astype(dtype)
        (gw if name == "weight" else gb)[position] = bad
        before = w.copy(), b.copy()
        with pytest.raises(ValueError, match=f"grad_{name} is not finite at position {position} "):
            _core.step(w, b, gw, gb, np.array([0, 1000, 3000]), 0.1, 0.1, 0.1, 0.1, 0.1, None, 1)
        assert_same_bits(w, before[0])
        assert_same_bits(b, before[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_step_without_penalty_keeps_denormals_and_settles_zeros(dtype):
    tiny = np.finfo(dtype).smallest_subnormal
    w, b, zero = np.ones(37, dtype), np.resize(np.array([-0.0, tiny, -3 * tiny], dtype), 37), np.zeros(37, dtype)
    expected = b + dtype(0)
    _, support = _core.step(w, b, zero, zero.copy(), np.array([0, 1, 37]), 0.1, 0, 0, 0, 0, None, 1)
    assert_same_bits(b, expected)
    assert np.all(w == 1) and support == np.count_nonzero(expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("adam", [False, True])
def test_step(rng, dtype, adam):
    sizes = [3, 64, 1, 200]
    offsets, total = np.cumsum([0, *sizes]), sum(sizes)
    start = [np.ones(total, dtype), np.zeros(total, dtype)]
    ours, theirs = [[x.copy() for x in start] for _ in range(2)]
    ours_adam, theirs_adam = [list(np.zeros((4, total), dtype)) for _ in range(2)]
    for t in range(1, 6):
        grads = list(rng.normal(size=(2, total)).astype(dtype))
        settings = (offsets, 0.1 / t, 0.9, 0.02, 0.7, 0.05)
        (p, s), (q, r) = (
            _core.step(*ours, *grads, *settings, (*ours_adam, t, 0.9, 0.99, 1e-8) if adam else None, 1),
            reference.step(*theirs, *grads, *settings, (*theirs_adam, t, 0.9, 0.99, 1e-8) if adam else None),
        )
        for a, b in zip(ours + ours_adam, theirs + theirs_adam, strict=True):
            assert_close(a, b, scale=10)
        np.testing.assert_allclose(p, q, rtol=1e-5 if dtype == np.float32 else 1e-12)
        assert s == r == np.count_nonzero((ours[0] != 1) | (ours[1] != 0))
        assert np.array_equal(ours[0] == 1, theirs[0] == 1) and np.array_equal(ours[1] == 0, theirs[1] == 0)
    assert 0 < s < total  # the penalties were neither idle nor all there was


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_step_against_torch(rng, name):
    torch = pytest.importorskip("torch")
    w, b = rng.normal(size=(2, 40))
    leaves = [torch.tensor(x, requires_grad=True) for x in (w, b)]
    settings = {"lr": 0.1} | ({"betas": (0.8, 0.95), "eps": 1e-8} if name == "Adam" else {})
    theirs = getattr(torch.optim, name)(leaves, **settings)
    moments = np.zeros((4, 40))
    for t in range(1, 8):
        grads = rng.normal(size=(2, 40))
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = torch.tensor(grad)
        theirs.step()
        adam = (*moments, t, 0.8, 0.95, 1e-8) if name == "Adam" else None
        _core.step(w, b, *grads, np.array([0, 40]), 0.1, 0.0, 0.0, 0.0, 0.0, adam, 1)
    np.testing.assert_allclose(w, leaves[0].detach(), rtol=1e-12)
    np.testing.assert_allclose(b, leaves[1].detach(), rtol=1e-12)


# --- closed-form maps ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["mean", "gaussian", "linear"])
@pytest.mark.parametrize("masses", ["", "u", "v", "uv"])
def test_fit_local(rng, dtype, method, masses):
    shapes = [(n, m, d) for n, m, d in PAIRS if min(n, m) > 1]
    us = [sample(rng, n, d, dtype, ties=True) for n, _, d in shapes]
    vs = [sample(rng, m, d, dtype) for _, m, d in shapes]
    for u in us:
        u[:, 0] = u[0, 0]  # a constant neuron
    names = [str(k) for k in range(len(us))]
    u_mass = [rng.uniform(0.1, 1, size=len(u)) for u in us] if "u" in masses else None
    v_mass = [rng.uniform(0.1, 1, size=len(v)) for v in vs] if "v" in masses else None
    weights, biases = _core.fit_local(us, vs, u_mass, v_mass, method, names, names, 1)
    for k, (u, v) in enumerate(zip(us, vs, strict=True)):
        expected = reference.fit_local(u, v, u_mass and u_mass[k], v_mass and v_mass[k], method)
        assert weights[k][0] == 1
        assert_close(weights[k], expected[0], scale=20)
        assert_close(biases[k], expected[1], scale=50)


def test_fit_local_far_from_zero(rng):
    """A mean of 1000 spreads: the sums must be taken about it."""
    u, v = (1000 + rng.normal(size=(64, 20))).astype(np.float32), (rng.normal(size=(64, 20)) - 500).astype(np.float32)
    (weight,), (bias,) = _core.fit_local([u], [v], None, None, "linear", ["u"], ["v"], 1)
    expected = reference.fit_local(u, v, None, None, "linear")
    np.testing.assert_allclose(weight, expected[0], rtol=1e-4)
    np.testing.assert_allclose(weight * u + bias, expected[0] * u + expected[1], rtol=1e-5, atol=1e-3)


# --- covariances ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_covariance(rng, dtype, weighted):
    for n, d in [(2, 1), (5, 33), (100, 17), (3000, 4)]:
        x = sample(rng, n, d, dtype)
        mass = rng.uniform(size=n) if weighted else None
        ours, theirs = _core.covariance(x, mass, "x"), reference.covariance(x, mass)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == np.float64
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
        assert np.array_equal(ours[1], ours[1].T)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("rank", [3, 40])
def test_bures_map(rng, ridge, rank):
    d = 12
    source, target = (np.cov(rng.normal(size=(d, n)) * 2) for n in (rank + 1, 50))
    before = source.copy()
    ours, theirs = _core.bures_map(source, target, ridge), reference.bures_map(source, target, ridge)
    assert np.array_equal(source, before) and np.array_equal(ours, ours.T)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7 * np.abs(theirs).max())
    if rank > d or ridge:
        eye = ridge * np.eye(d)
        np.testing.assert_allclose(ours @ (source + eye) @ ours, target + eye, rtol=1e-8, atol=1e-9)


def test_bures_map_of_nothing():
    assert not _core.bures_map(np.zeros((3, 3)), np.eye(3), 0.0).any()


def test_descriptions():
    assert _core.cpu() in ("portable", "avx2", "avx512")
    assert "OpenBLAS" in _core.blas()


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("weighted", [False, True])
def test_sixteen_bits_give_what_their_float32_copies_give(rng, n, dtype, weighted):
    """Ties, which are likely in 16 bits, are looked for earlier there."""
    u, v = sample(rng, n, 37, dtype), sample(rng, n, 37, dtype)
    u[:, 3] = u[0, 3]
    mass = rng.uniform(size=n) if weighted else None
    for ours, theirs in zip(w2(u, v, u_mass=mass), w2(widen(u), widen(v), u_mass=mass), strict=True):
        if theirs is not None:
            assert_same_bits(ours, theirs)
    for ours, theirs in zip(_core.sort_columns([u], ["u"], 1), _core.sort_columns([widen(u)], ["u"], 1), strict=True):
        assert_same_bits(widen(ours), theirs)
