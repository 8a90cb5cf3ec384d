"""Sorting and ranking of more rows than fit into registers: every number of rows around runs and powers of two, and the
data that ranking by packed keys finds hard."""

import numpy as np
import pytest
from samples import DTYPES, assert_close, assert_same_bits, encode, w2

from lineas import _core
from lineas.arrays import reference
from lineas.arrays.reference import widen

ROWS = (33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 224, 255, 256, 257, 480, 513, 992, 1000, 1025, 1500, 2049, 4100)


def columns_of(rng, n):
    """float64 [n, columns]: each column another way in which values lie."""
    normal = rng.normal(size=n)
    outlier, near_one, few = normal.copy(), 1 + 1e-6 * normal, rng.integers(-3, 4, size=n) / 2
    outlier[n // 2] = 1e9  # all others then share the few highest bits of a packed key
    near_one[0] = -1e6
    zeros = np.where(rng.uniform(size=n) < 0.5, -0.0, 0.0)
    return np.stack(
        [
            normal,
            outlier,
            near_one,
            few,
            zeros,
            np.where(few > 0, normal, zeros),
            np.full(n, 0.1),
            np.sort(normal),
            np.sort(normal)[::-1],
            np.exp(5 * normal),
            np.repeat([3.0, -2.0], [n - 1, 1]),
            1e-40 * normal,
            1e38 * np.clip(normal, -3, 3),
            np.arange(n) % 7,
            25 + normal,
            np.sort(outlier)[::-1],
            np.arange(n, 0, -1) * 1e-7,
        ],
        axis=1,
    )


def numbers(rng, n, dtype):
    """`columns_of` in one of the input types, without the columns that do not fit into its range."""
    x = columns_of(rng, n)
    return encode(np.clip(x, -6e4, 6e4) if dtype == "float16" else x, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", ROWS)
def test_sort(n, dtype):
    x = numbers(np.random.default_rng(n), n, dtype)
    work = widen(x)
    bits = work.view(np.int32 if work.dtype == np.float32 else np.int64)
    keys = bits ^ ((bits >> (8 * bits.itemsize - 1)) & np.iinfo(bits.dtype).max)  # orders -0 before 0
    expected = np.take_along_axis(work, np.argsort(keys, axis=0, kind="stable"), axis=0)
    assert_same_bits(_core.sort_columns([x], ["x"], 1)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", ROWS)
def test_gradient(n, dtype):
    """Against float64 in NumPy, relative to the largest number of each column."""
    rng = np.random.default_rng(n)
    u, v = numbers(rng, n, dtype), numbers(rng, n, dtype)
    value, grad, _, _ = w2(u, v)
    size = np.maximum(np.abs(widen(u)).max(axis=0), np.abs(widen(v)).max(axis=0)).astype(np.float64)
    exact_value, exact_grad, _, _ = reference.wasserstein(widen(u).astype(np.float64), widen(v).astype(np.float64))
    assert (grad[:, size == 0] == 0).all()
    some = (size > 1e-15) & (size < 1e15)  # other squares underflow or overflow in float32
    size = size[some]
    tolerance = 3e-6 if value.dtype == np.float32 else 1e-12
    np.testing.assert_allclose(value[some] / size**2, exact_value[some] / size**2, rtol=0, atol=tolerance)
    np.testing.assert_allclose(n * grad[:, some] / size, n * exact_grad[:, some] / size, rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [33, 256, 1000, 4099, 70_000])
def test_gradient_is_exact_without_ties(n, dtype):
    """An entry without equals meets the target of its rank: the gradient is one subtraction and one product."""
    rng = np.random.default_rng(n)
    u, v = rng.normal(size=(2, n, 4)).astype(dtype)
    u[:, 1] = rng.permutation(np.linspace(1, 2, n, dtype=dtype))
    u[0, 1] = -1e9  # the others' packed keys are equal
    u[:, 2] *= 1e-40  # denormal in float32
    u[:, 3] = rng.permutation(np.arange(n))  # packed exactly
    v = np.sort(v, axis=0)
    _, grad, _, _ = w2(u, v, v_sorted=True)
    order = np.argsort(u, axis=0)
    expected = np.empty_like(u)
    residual = np.take_along_axis(u, order, axis=0) - v
    np.put_along_axis(expected, order, np.dtype(dtype).type(2 / n) * residual, axis=0)
    for ours, theirs, column in zip(grad.T, expected.T, u.T, strict=True):
        _, where, counts = np.unique(column, return_inverse=True, return_counts=True)
        once = counts[where] == 1
        assert once.sum() > n / 10
        assert_same_bits(ours[once], theirs[once])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 16, 33, 100, 1000])
def test_weighted(n, dtype):
    rng = np.random.default_rng(n)
    some = [0, 3, 5, 7, 8, 10, 13, 14]  # neither tiny nor huge
    u = np.take(numbers(rng, n, dtype), some, axis=1)
    v = np.take(numbers(rng, n + 7, dtype), some[::-1], axis=1)
    u_mass, v_mass = rng.uniform(size=n), rng.uniform(size=n + 7)
    u_mass[n // 2] = 0
    expected = reference.wasserstein(u, v, None, None, u_mass, v_mass)
    for ours, theirs in zip(w2(u, v, u_mass=u_mass, v_mass=v_mass)[:2], expected[:2], strict=True):
        assert_close(ours, theirs, scale=1000)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [33, 64, 100, 1000])
def test_not_finite_is_found_anywhere(n, bad, dtype):
    rng = np.random.default_rng(n)
    for row in (0, 1, 31, 32, n // 2, n - 1):
        x = rng.normal(size=(n, 20))
        x[row, 17] = bad
        for call in (
            lambda u: w2(u, u[:5]),
            lambda u: w2(u, u[:5], gradient=0),
            lambda u: w2(u, u[:5], u_mass=np.ones(n)),
            lambda u: _core.sort_columns([u], ["u"], 1),
        ):
            with pytest.raises(ValueError, match=rf"u.*{'nan' if bad != bad else 'inf'}.*row {row}, column 17"):
                call(encode(x, dtype))
