import numpy as np
import pytest
from samples import assert_close

import lineas
from lineas.arrays import reference


def ot_distance(u, v, p=None, q=None):
    ot = pytest.importorskip("ot")
    u, v = np.asarray(u, np.float64), np.asarray(v, np.float64)
    return ot.wasserstein_1d(u, v, None if p is None else p / p.sum(), None if q is None else q / q.sum(), p=2)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 6), (2, 3), (32, 32), (32, 48), (100, 33)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_against_pot(rng, n, m, dtype):
    u, v = rng.normal(size=(n, 7)).astype(dtype), rng.normal(2, 3, size=(m, 7)).astype(dtype)
    value = lineas.wasserstein(u, v)
    assert value.dtype == dtype and value.shape == (7,)
    np.testing.assert_allclose(value, ot_distance(u, v), rtol=1e-5 if dtype == np.float32 else 1e-11)


@pytest.mark.parametrize("sides", ["u", "v", "uv"])
def test_weights_against_pot(rng, sides):
    u, v = rng.normal(size=(9, 4)), rng.normal(size=(12, 4))
    p = rng.uniform(size=9) if "u" in sides else None
    q = rng.uniform(size=12) if "v" in sides else None
    if p is not None:
        p[3] = 0
    value = lineas.wasserstein(u, v, u_weights=p, v_weights=q)
    np.testing.assert_allclose(value, ot_distance(u, v, p, q), rtol=1e-11)


def test_weights_need_only_be_numbers(rng):
    u, v = rng.normal(size=(3, 2)), rng.normal(size=(4, 2))
    expected = lineas.wasserstein(u, v, u_weights=np.array([1.0, 0.0, 3.0]))
    for weights in ([1, 0, 3], np.array([2, 0, 6], np.float32), np.array([1, 0, 3], np.uint8)):
        np.testing.assert_allclose(lineas.wasserstein(u, v, u_weights=weights), expected, rtol=1e-14)
    both = lineas.wasserstein(u, v, u_weights=[True, False, True])
    np.testing.assert_allclose(both, lineas.wasserstein(u[[0, 2]], v), rtol=1e-14)


def test_gradient_against_torch(rng):
    torch = pytest.importorskip("torch")
    u, v = rng.normal(size=(32, 5)), rng.normal(size=(32, 5))
    leaf = torch.tensor(u, requires_grad=True)
    expected = ((leaf.sort(0).values - torch.tensor(v).sort(0).values) ** 2).mean(0)
    expected.sum().backward()
    value, grad = lineas.wasserstein_grad(u, v)
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-12)
    np.testing.assert_allclose(grad, leaf.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_against_finite_differences(rng, weighted):
    u, v, step = rng.normal(size=(6, 3)), rng.normal(size=(10, 3)), 1e-6
    weights = {"u_weights": rng.uniform(size=6), "v_weights": rng.uniform(size=10)} if weighted else {}
    grad = lineas.wasserstein_grad(u, v, **weights)[1]
    for i in range(6):
        for j in range(3):
            du = np.zeros_like(u)
            du[i, j] = step
            slope = lineas.wasserstein(u + du, v, **weights) - lineas.wasserstein(u - du, v, **weights)
            np.testing.assert_allclose(slope[j] / (2 * step), grad[i, j], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("n", "m"), [(1, 1_000_000), (2, 999_999), (7, 3000), (3, 100)])
def test_gradient_in_few_rows_against_many(rng, n, m):
    """A row's gradient is a sum over m / n rows, without the error of a float32 sum of so many."""
    u, v = rng.normal(5, 1, size=(n, 2)).astype(np.float32), rng.exponential(size=(m, 2)).astype(np.float32)
    grad = lineas.wasserstein_grad(u, v)[1]
    wide = lineas.wasserstein_grad(u.astype(np.float64), v.astype(np.float64), u_weights=np.ones(n))[1]
    for j in range(2):
        order, target = np.argsort(u[:, j]), np.sort(v[:, j].astype(np.longdouble))
        if m % n == 0:
            mean = target.reshape(n, -1).mean(axis=1)
            exact = 2 / n * (u[order, j] - mean)
            np.testing.assert_allclose(grad[order, j], exact.astype(np.float64), rtol=3e-7)
    np.testing.assert_allclose(grad, wide, rtol=3e-7)


def test_tied_rows_share_their_gradient():
    u, v = np.array([[1.0], [0.0], [1.0], [1.0]]), np.array([[0.0], [1.0], [2.0], [6.0]])
    grad = lineas.wasserstein_grad(u, v)[1]
    np.testing.assert_allclose(grad[:, 0], [-1.0, 0.0, -1.0, -1.0])  # 2/4 (1 - (1 + 2 + 6)/3)


def test_value_is_the_same_with_and_without_gradient(rng):
    u, v = rng.normal(size=(33, 20)).astype(np.float32), rng.normal(size=(40, 20)).astype(np.float32)
    assert np.array_equal(lineas.wasserstein(u, v), lineas.wasserstein_grad(u, v)[0])


@pytest.mark.parametrize("m", [8, 13])
def test_sorted_target(rng, m):
    u, v = rng.normal(size=(8, 4)), rng.normal(size=(m, 4))
    for loss in (lineas.wasserstein, lineas.wasserstein_grad):
        assert np.array_equal(loss(u, v)[0], loss(u, np.sort(v, axis=0), v_sorted=True)[0])


def test_types_are_promoted(rng):
    u, v = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    value, grad = lineas.wasserstein_grad(u.astype(np.float32), v)
    assert value.dtype == grad.dtype == np.float64
    assert_close(value, reference.wasserstein(u.astype(np.float32).astype(np.float64), v)[0])
    half = lineas.wasserstein(u.astype(np.float16), v.astype(np.float32))
    assert half.dtype == np.float32
    assert np.array_equal(half, lineas.wasserstein(u.astype(np.float16).astype(np.float32), v.astype(np.float32)))
    mixed = lineas.wasserstein(u, v.astype(np.float16))
    assert np.array_equal(mixed, lineas.wasserstein(u, v.astype(np.float16).astype(np.float64)))


def test_bfloat16_of_ml_dtypes_and_torch(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    u, v = rng.normal(size=(2, 6, 3)).astype(ml_dtypes.bfloat16)
    expected = lineas.wasserstein(u.astype(np.float32), v.astype(np.float32))
    assert np.array_equal(lineas.wasserstein(u, v), expected)
    torch = pytest.importorskip("torch")
    as_tensor = torch.tensor(u.astype(np.float32)).to(torch.bfloat16).requires_grad_()
    assert np.array_equal(lineas.wasserstein(as_tensor, v), expected)


def test_any_layout(rng):
    u, v = rng.normal(size=(4, 6)), rng.normal(size=(4, 12))
    expected = lineas.wasserstein(u.T.copy(), v[:, ::3].T.copy())
    assert np.array_equal(lineas.wasserstein(u.T, v[:, ::3].T), expected)
    assert np.array_equal(lineas.wasserstein(np.asfortranarray(u.T), v[:, ::3].T.astype(">f8")), expected)
    assert np.array_equal(lineas.wasserstein(u.T.tolist(), v[:, ::3].T), expected)


def test_read_only_and_memory_mapped(rng, tmp_path):
    u, v = rng.normal(size=(5, 6)), rng.normal(size=(3, 6))
    np.save(tmp_path / "u.npy", u)
    mapped = np.load(tmp_path / "u.npy", mmap_mode="r")
    v.flags.writeable = False
    assert np.array_equal(lineas.wasserstein(mapped, v), lineas.wasserstein(u, v.copy()))


@pytest.mark.parametrize("function", [lineas.wasserstein, lineas.wasserstein_grad])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"u": np.ones(3)}, ValueError, r"u must have shape \[n, d\], got shape \(3,\)"),
        ({"v": np.ones((1, 2, 3))}, ValueError, r"v must have shape \[n, d\], got shape \(1, 2, 3\)"),
        ({"u": np.ones((0, 3))}, ValueError, r"u must have at least 1 row and 1 column, got shape \(0, 3\)"),
        ({"v": np.ones((2, 0))}, ValueError, r"v must have at least 1 row and 1 column, got shape \(2, 0\)"),
        ({"v": np.ones((2, 4))}, ValueError, r"u and v must have the same number of columns, got .*\(2, 3\).*\(2, 4\)"),
        (
            {"u": np.ones((2, 3), bool)},
            TypeError,
            "u must be float16, bfloat16, float32, float64 or an integer type, got",
        ),
        ({"v": np.ones((2, 3), bool)}, TypeError, "v must be .* got dtype bool"),
        ({"u": np.ones((2, 3), complex)}, TypeError, "u must be .* got dtype complex128"),
        ({"u": np.ma.ones((2, 3))}, TypeError, "u must be a plain array, got a masked array"),
        ({"u": "text"}, TypeError, "u must be .* got dtype <U4"),
        ({"u": [[0.0, 1, 2], [0, np.nan, 0]]}, ValueError, r"u: nan at row 1, column 1"),
        ({"v": [[0.0, 1, 2], [0, 0, -np.inf]]}, ValueError, r"v: -?inf at row 1, column 2"),
        ({"u_weights": [1.0]}, ValueError, r"u_weights must have shape \(2,\), one weight a row, got shape \(1,\)"),
        ({"v_weights": [[1.0, 1.0]]}, ValueError, r"v_weights must have shape \(2,\), .* got shape \(1, 2\)"),
        ({"u_weights": [1.0, -0.5]}, ValueError, "u_weights must be finite and not negative, got -0.5 at row 1"),
        ({"u_weights": [np.nan, 1.0]}, ValueError, "u_weights must be finite and not negative, got nan at row 0"),
        ({"v_weights": [0.0, 0.0]}, ValueError, "v_weights must have a positive sum, but all weights are zero"),
        ({"v_weights": ["a", "b"]}, TypeError, "v_weights must hold real numbers, got dtype <U1"),
        ({"v_weights": [1, 1], "v_sorted": True}, ValueError, "v_sorted does not go with v_weights"),
    ],
)
def test_bad_input(function, change, error, text):
    arguments = {"u": np.ones((2, 3)), "v": np.zeros((2, 3))} | change
    with pytest.raises(error, match=text):
        function(arguments.pop("u"), arguments.pop("v"), **arguments)


def test_bad_tensors():
    torch = pytest.importorskip("torch")
    v = np.zeros((2, 3))
    with pytest.raises(TypeError, match=r"u must be float16, .* got dtype torch.bool"):
        lineas.wasserstein(torch.ones(2, 3, dtype=torch.bool), v)
    with pytest.raises(TypeError, match=r"u must be a dense tensor, got layout torch.sparse_coo"):
        lineas.wasserstein(torch.ones(2, 3).to_sparse(), v)


# --- the proximal step ---


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_prox_by_hand(dtype):
    x = np.array([3.0, -0.5, -4.0, 0.0], dtype)
    out = lineas.prox_sparse_group(x, tau=0.5, l1=2.0, group=0.0)
    assert out.dtype == dtype and out.tolist() == [2, 0, -3, 0]
    out = lineas.prox_sparse_group(np.array([3.0, 4.0], dtype), tau=1.0, l1=0.0, group=1.0)
    np.testing.assert_allclose(out, np.array([3, 4]) * (1 - 2**0.5 / 5), rtol=1e-6)
    assert x.tolist() == [3, -0.5, -4, 0]


def test_prox_of_nothing_is_nothing(rng):
    x = rng.normal(size=20)
    assert np.array_equal(lineas.prox_sparse_group(x, tau=0.0, l1=1.0, group=1.0), x)
    assert np.array_equal(lineas.prox_sparse_group(x, tau=1.0, l1=0.0, group=0.0), x)
    assert not lineas.prox_sparse_group(x, tau=1.0, l1=0.0, group=100.0).any()
    assert not lineas.prox_sparse_group(x, tau=1.0, l1=100.0, group=0.0).any()
    assert not lineas.prox_sparse_group(np.zeros(4), tau=1.0, l1=0.1, group=0.1).any()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": np.ones((2, 2))}, ValueError, r"x must have shape \[d\] with d >= 1, got shape \(2, 2\)"),
        ({"x": np.ones(0)}, ValueError, r"x must have shape \[d\] with d >= 1, got shape \(0,\)"),
        ({"x": np.ones(2, np.float16)}, TypeError, "x must be float32 or float64, got dtype float16"),
        ({"x": np.ones(2, bool)}, TypeError, "x must be .* got dtype bool"),
        ({"x": np.array([1.0, np.nan])}, ValueError, "x must be finite, got nan at entry 1"),
        ({"tau": -1.0}, ValueError, "tau must not be negative, got -1"),
        ({"l1": np.inf}, ValueError, "l1 must be finite, got inf"),
        ({"group": np.nan}, ValueError, "group must be finite, got nan"),
        ({"group": "a"}, TypeError, "group must be a real number, got str"),
    ],
)
def test_bad_prox(change, error, text):
    arguments = {"x": np.ones(3), "tau": 1.0, "l1": 1.0, "group": 1.0} | change
    with pytest.raises(error, match=text):
        lineas.prox_sparse_group(**arguments)
