"""Laws that must hold for any numbers, on examples that hypothesis makes up."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import lineas
from lineas import AffineMap, SteeringMaps

# Multiples of 1/8 up to 64: ties are frequent, and sums and products of two are exact.
grid = st.integers(-512, 512).map(lambda k: k / 8)
dtypes = st.sampled_from([np.float32, np.float64])
strengths = st.floats(-2, 2)


@st.composite
def samples(draw, count=2, same_size=False):
    """`count` samples of one width and one dtype."""
    d, dtype = draw(st.integers(1, 6)), draw(dtypes)
    n = draw(st.integers(1, 40))
    sizes = [n if same_size else draw(st.integers(1, 40)) for _ in range(count)]
    return [draw(arrays(dtype, (size, d), elements=grid)) for size in sizes]


@st.composite
def maps(draw, d, *, invertible=False):
    slope = st.floats(0.1, 8) | st.floats(-8, -0.1) if invertible else st.floats(-8, 8)
    return AffineMap(
        draw(arrays(np.float64, d, elements=slope)), draw(arrays(np.float64, d, elements=st.floats(-8, 8)))
    )


def close(a, b, scale=1.0):
    """To rounding in the dtype of `a`, for numbers of the size of `scale`."""
    eps = np.finfo(a.dtype).eps
    np.testing.assert_allclose(a, b, rtol=64 * eps, atol=64 * eps * scale)


@given(samples(), grid)
def test_a_common_shift_changes_nothing(pair, shift):
    u, v = pair
    close(lineas.wasserstein(u + u.dtype.type(shift), v + v.dtype.type(shift)), lineas.wasserstein(u, v), 64**2)


@given(samples(), grid)
def test_a_shift_of_equal_samples_costs_its_square(pair, shift):
    u = pair[0]
    close(lineas.wasserstein(u + u.dtype.type(shift), u), np.full(u.shape[1], shift**2), 64**2)


@given(samples(), st.floats(-8, 8, width=16))
def test_scaling_both_scales_by_the_square(pair, scale):
    u, v = pair
    s = u.dtype.type(scale)
    close(lineas.wasserstein(s * u, s * v), s**2 * lineas.wasserstein(u, v), (64 * scale) ** 2 + 1e-30)


@given(samples())
def test_symmetry(pair):
    u, v = pair
    close(lineas.wasserstein(u, v), lineas.wasserstein(v, u), 64**2)


@given(samples(count=1))
def test_the_distance_to_itself_is_zero(one):
    (u,) = one
    value, grad = lineas.wasserstein_grad(u, u)
    assert not value.any()
    close(grad, np.zeros_like(grad), 64)


@given(samples(count=3))
def test_triangle_inequality(three):
    u, v, x = three
    root = [np.sqrt(lineas.wasserstein(a, b).astype(np.float64)) for a, b in ((u, x), (u, v), (v, x))]
    assert (root[0] <= root[1] + root[2] + 1e-2 * np.sqrt(np.finfo(u.dtype).eps) * 64 + 1e-6).all()


@given(samples())
def test_the_distance_is_at_least_that_of_the_means(pair):
    u, v = pair
    means = (u.mean(0, dtype=np.float64) - v.mean(0, dtype=np.float64)) ** 2
    assert (lineas.wasserstein(u, v) >= means * (1 - 1e-5) - 1e-6).all()


@given(samples(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(pair, random):
    u, v = pair
    order_u, order_v = (random.sample(range(len(x)), len(x)) for x in pair)
    value, grad = lineas.wasserstein_grad(u, v)
    again, again_grad = lineas.wasserstein_grad(u[order_u], v[order_v])
    assert value.tobytes() == again.tobytes() and grad[order_u].tobytes() == again_grad.tobytes()


@given(samples(), st.integers(2, 4), st.integers(2, 4))
def test_repeating_all_rows_changes_nothing(pair, k, l):
    u, v = pair
    close(lineas.wasserstein(np.repeat(u, k, axis=0), np.repeat(v, l, axis=0)), lineas.wasserstein(u, v), 64**2)


@given(samples(), st.data())
def test_whole_weights_are_repetitions(pair, data):
    u, v = pair
    p, q = (data.draw(arrays(np.int64, len(x), elements=st.integers(0, 3)).filter(lambda w: w.sum() > 0)) for x in pair)
    value, grad = lineas.wasserstein_grad(u, v, u_weights=p, v_weights=q)
    many, many_grad = lineas.wasserstein_grad(np.repeat(u, p, axis=0), np.repeat(v, q, axis=0))
    close(value, many, 64**2)
    first = np.cumsum(p) - p  # where each row's repetitions start; rows of weight 0 have no gradient
    expected = np.where(p[:, None] > 0, many_grad[np.minimum(first, len(many_grad) - 1)] * p[:, None], 0)
    close(grad, expected.astype(grad.dtype), 128)


@given(samples())
def test_the_gradient_sums_to_that_of_a_shift(pair):
    u, v = pair
    grad = lineas.wasserstein_grad(u, v)[1]
    means = u.mean(0, dtype=np.float64) - v.mean(0, dtype=np.float64)
    close(grad.sum(0, dtype=np.float64).astype(grad.dtype), 2 * means, 256)


@given(samples(), st.data())
def test_the_gradient_is_a_slope_from_below(pair, data):
    """Along any line W2 in u is semiconcave: W(u + e) <= W(u) + <g, e> + |e|^2 / n."""
    u, v = (x.astype(np.float64) for x in pair)
    e = data.draw(arrays(np.float64, u.shape, elements=st.floats(-1, 1)))
    value, grad = lineas.wasserstein_grad(u, v)
    bound = value + (grad * e).sum(0) + (e * e).mean(0)
    assert (lineas.wasserstein(u + e, v) <= bound + 1e-9).all()


@given(
    st.integers(1, 8).flatmap(lambda d: st.tuples(maps(d, invertible=True), arrays(np.float64, (5, d), elements=grid)))
)
def test_the_inverse_undoes_the_map(case):
    one, z = case
    np.testing.assert_allclose(one.inverse().transform(one.transform(z)), z, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(one.transform(one.inverse().transform(z)), z, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 8).flatmap(lambda d: st.tuples(maps(d), maps(d), arrays(np.float64, (5, d), elements=grid))))
def test_composing_is_applying_twice(case):
    first, second, z = case
    twice = second.transform(first.transform(z))
    np.testing.assert_allclose((second @ first).transform(z), twice, rtol=1e-12, atol=1e-11)
    both = SteeringMaps({"a": second}) @ SteeringMaps({"a": first})
    np.testing.assert_allclose(both.transform({"a": z})["a"], twice, rtol=1e-12, atol=1e-11)


@given(st.integers(1, 8).flatmap(lambda d: st.tuples(maps(d), arrays(np.float64, (5, d), elements=grid))), strengths)
def test_strength_goes_along_a_line(case, strength):
    one, z = case
    expected = z + strength * (one.transform(z) - z)
    np.testing.assert_allclose(one.transform(z, strength), expected, rtol=1e-12, atol=1e-10)


@given(st.integers(1, 8).flatmap(lambda d: st.tuples(maps(d), maps(d), arrays(np.float64, (5, d), elements=grid))))
def test_sums_add_changes(case):
    a, b, z = case
    assert a + b == b + a and SteeringMaps({"a": a}) + SteeringMaps({"a": b}) == SteeringMaps({"a": b + a})
    assert a - a == AffineMap.identity(a.d) == b - b
    changed = z + (a.transform(z) - z) + (b.transform(z) - z)
    np.testing.assert_allclose((a + b).transform(z), changed, rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose((a + b - b).transform(z), a.transform(z), rtol=1e-12, atol=1e-10)
    shifts = [AffineMap(np.ones(a.d), one.bias) for one in (a, b)]
    assert shifts[0] + shifts[1] == shifts[1] @ shifts[0]


@given(st.integers(1, 8).flatmap(lambda d: st.tuples(maps(d), arrays(np.float64, (5, d), elements=grid))), strengths)
def test_a_number_times_a_map_is_the_map_at_that_strength(case, strength):
    one, z = case
    np.testing.assert_allclose((strength * one).transform(z), one.transform(z, strength), rtol=1e-12, atol=1e-10)
    assert strength * one == one * strength == one.scaled(strength)


@given(samples(), st.sampled_from(["mean", "gaussian", "linear"]))
def test_a_fitted_map_matches_the_mean(pair, method):
    u, v = (np.concatenate([x, x[:1] + 1]).astype(np.float64) for x in pair)  # two rows at least
    one = lineas.fit(u, v, method=method)
    np.testing.assert_allclose(one.transform(u).mean(0), v.mean(0), rtol=1e-10, atol=1e-9)
    assert (one.weight >= -1e-12).all()


@given(samples(), st.data())
def test_the_linear_map_is_the_best_one(pair, data):
    """Of all maps with slopes >= 0 (others turn the order round)."""
    u, v = (np.concatenate([x, x[:1] + 1]).astype(np.float64) for x in pair)
    best = lineas.wasserstein(lineas.fit(u, v).transform(u), v)
    d = u.shape[1]
    weight = data.draw(arrays(np.float64, d, elements=st.floats(0, 4)))
    bias = data.draw(arrays(np.float64, d, elements=st.floats(-64, 64)))
    other = lineas.wasserstein(AffineMap(weight, bias).transform(u), v)
    assert (best <= other + 1e-9 * (1 + other)).all()


def objective(y, x, tau, l1, group):
    return np.sum((y - x) ** 2) / 2 + tau * (l1 * np.abs(y).sum() + group * np.sqrt(len(x)) * np.linalg.norm(y))


@given(
    st.integers(1, 10).flatmap(lambda d: st.tuples(*[arrays(np.float64, d, elements=st.floats(-4, 4))] * 2)),
    st.floats(0, 2), st.floats(0, 2), st.floats(0, 2),
)  # fmt: skip
@settings(max_examples=80)
def test_the_prox_is_the_minimiser(case, tau, l1, group):
    x, direction = case
    y = lineas.prox_sparse_group(x, tau=tau, l1=l1, group=group)
    least = objective(y, x, tau, l1, group)
    # The objective is strongly convex with modulus 1: every other point is worse by half the squared distance.
    for size in (1.0, 1e-2, 1e-4):
        other = y + size * direction
        gain = objective(other, x, tau, l1, group) - least
        assert gain >= np.sum((other - y) ** 2) / 2 - 1e-12 * (1 + least)


@given(
    st.integers(1, 10).flatmap(lambda d: st.tuples(*[arrays(np.float64, d, elements=st.floats(-4, 4))] * 2)),
    st.floats(0, 2), st.floats(0, 2), st.floats(0, 2),
)  # fmt: skip
def test_the_prox_is_a_contraction(pair, tau, l1, group):
    x, y = (lineas.prox_sparse_group(z, tau=tau, l1=l1, group=group) for z in pair)
    assert np.linalg.norm(x - y) <= np.linalg.norm(pair[0] - pair[1]) + 1e-12


@given(
    st.integers(1, 5).flatmap(
        lambda d: st.lists(
            arrays(np.float64, st.tuples(st.integers(1, 9), st.just(d)), elements=grid), min_size=1, max_size=5
        )
    )
)
def test_moments_of_the_parts_are_those_of_the_whole(batches):
    whole = np.concatenate(batches)
    parts = lineas.Moments()
    for batch in reversed(batches):
        parts.merge(lineas.moments(batch))
    for seen in (parts, lineas.moments(batches), lineas.moments(whole, chunk_rows=3)):
        assert seen.count == len(whole)
        np.testing.assert_allclose(seen.mean, whole.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(seen.variance(ddof=0), whole.var(0), rtol=1e-11, atol=1e-11)
        assert np.array_equal(seen.min, whole.min(0)) and np.array_equal(seen.max, whole.max(0))


@given(st.data())
def test_files_keep_everything(tmp_path_factory, data):
    names = data.draw(
        st.lists(st.text(min_size=1, max_size=8).filter(lambda s: s.isprintable()), min_size=1, max_size=4, unique=True)
    )
    values = {name: data.draw(maps(data.draw(st.integers(1, 4)))) for name in names}
    metadata = data.draw(
        st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(max_size=5), max_size=3)
    )
    path = tmp_path_factory.mktemp("maps") / "x.safetensors"
    saved = SteeringMaps(values, metadata)
    saved.save(path)
    loaded = lineas.load(path)
    assert loaded == saved and loaded.metadata == saved.metadata
