import numpy as np
import pytest

import lineas
from lineas import AffineMap, GaussianMap, SteeringMaps

METHODS = ["mean", "gaussian", "linear"]


def test_mean(rng):
    u, v = rng.normal(size=(10, 3)), rng.normal(size=(15, 3))
    one = lineas.fit(u, v, method="mean")
    assert isinstance(one, AffineMap) and np.array_equal(one.weight, np.ones(3))
    np.testing.assert_allclose(one.bias, v.mean(0) - u.mean(0), rtol=1e-12)


def test_gaussian(rng):
    u, v = rng.normal(size=(10, 3)), rng.normal(2, 3, size=(15, 3))
    one = lineas.fit(u, v, method="gaussian")
    z = one.transform(u)
    np.testing.assert_allclose(z.mean(0), v.mean(0), rtol=1e-12)
    np.testing.assert_allclose(z.std(0, ddof=1), v.std(0, ddof=1), rtol=1e-12)


def test_linear_is_least_squares_on_sorted_pairs(rng):
    u, v = rng.normal(size=(40, 3)), rng.normal(2, 3, size=(40, 3)) ** 3
    one = lineas.fit(u, v)
    for j in range(3):
        slope, shift = np.polyfit(np.sort(u[:, j]), np.sort(v[:, j]), 1)
        np.testing.assert_allclose([one.weight[j], one.bias[j]], [slope, shift], rtol=1e-9)


def test_linear_of_unequal_sizes_is_that_of_repeated_rows(rng):
    u, v = rng.normal(size=(4, 5)), rng.exponential(size=(6, 5))
    one, repeated = lineas.fit(u, v), lineas.fit(np.repeat(u, 3, axis=0), np.repeat(v, 2, axis=0))
    np.testing.assert_allclose(one.weight, repeated.weight, rtol=1e-12)
    np.testing.assert_allclose(one.bias, repeated.bias, rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_line_is_found_exactly(rng, method):
    u = rng.normal(size=(20, 4))
    slope = 1.0 if method == "mean" else 2.5
    one = lineas.fit(u, (slope * u - 1)[::-1], method=method)
    np.testing.assert_allclose(one.weight, slope, rtol=1e-12)
    np.testing.assert_allclose(one.bias, -1, rtol=1e-12)


def test_the_linear_map_minimises_the_distance(rng):
    u, v = rng.normal(size=(12, 4)), rng.exponential(size=(17, 4))
    one = lineas.fit(u, v)
    best = lineas.wasserstein(one.transform(u), v)
    for dw, db in [(0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)]:
        other = AffineMap(one.weight + dw, one.bias + db)
        assert (lineas.wasserstein(other.transform(u), v) > best).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_constant_source_neuron_gets_the_shift(rng, method, dtype):
    u, v = rng.normal(size=(9, 2)).astype(dtype), rng.normal(size=(9, 2)).astype(dtype)
    u[:, 1] = 0.1
    one = lineas.fit(u, v, method=method)
    assert one.weight[1] == 1
    np.testing.assert_allclose(one.bias[1], np.mean(v[:, 1], dtype=np.float64) - np.float64(u[0, 1]), rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target_weights", [None, [1, 0, 3, 2]])
def test_rows_without_weight_do_not_make_a_constant_source_neuron_vary(rng, method, target_weights):
    u, v = rng.normal(size=(5, 40)), rng.normal(size=(4, 40))
    u[3] = u[1]  # the only rows that count, below or above the others
    one = lineas.fit(u, v, method=method, source_weights=[0, 3, 0, 4, 0], target_weights=target_weights)
    np.testing.assert_array_equal(one.weight, 1)
    np.testing.assert_allclose(one.bias, np.average(v, axis=0, weights=target_weights) - u[1], atol=1e-14)


def test_a_constant_target_neuron_is_erased(rng):
    one = lineas.fit(rng.normal(size=(9, 1)), np.full((9, 1), 3.0))
    assert abs(one.weight[0]) < 1e-15 and abs(one.bias[0] - 3) < 1e-14


@pytest.mark.parametrize("method", METHODS)
def test_whole_weights_are_repeated_rows(rng, method):
    u, v = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))
    p, q = np.array([1, 0, 3, 2, 1]), np.array([2, 1, 0, 4])
    one = lineas.fit(u, v, method=method, source_weights=p, target_weights=q)
    many_u, many_v = np.repeat(u, p, axis=0), np.repeat(v, q, axis=0)
    many = lineas.fit(many_u, many_v, method=method)
    if method == "gaussian":  # population variances here, ddof = 1 there
        np.testing.assert_allclose(one.weight, many_v.std(0) / many_u.std(0), rtol=1e-12)
    else:
        np.testing.assert_allclose(one.weight, many.weight, rtol=1e-12)
        np.testing.assert_allclose(one.bias, many.bias, rtol=1e-12)


def test_modules(rng):
    source = {"b": rng.normal(size=(8, 3)), "a": rng.normal(size=(6, 5)).astype(np.float32)}
    target = {"a": rng.normal(size=(7, 5)).astype(np.float32), "b": rng.normal(size=(9, 3))}
    maps = lineas.fit(source, target)
    assert isinstance(maps, SteeringMaps) and list(maps) == ["b", "a"]
    for name in source:
        assert maps[name] == lineas.fit(source[name], target[name])
    assert [one.dtype for one in maps.values()] == [np.float64, np.float32]
    assert maps.metadata == {"method": "linear", "version": lineas.__version__}


def test_weights_for_all_modules_or_each(rng):
    source = {"a": rng.normal(size=(5, 3)), "b": rng.normal(size=(5, 2))}
    target = {"a": rng.normal(size=(4, 3)), "b": rng.normal(size=(6, 2))}
    p, q = rng.uniform(size=5), {"b": rng.uniform(size=6), "a": rng.uniform(size=4)}
    maps = lineas.fit(source, target, source_weights=p, target_weights=q)
    for name in source:
        assert maps[name] == lineas.fit(source[name], target[name], source_weights=p, target_weights=q[name])


def test_dtypes(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    u, v = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    for a, b, expected in [
        (np.float64, np.float64, np.float64),
        (np.float64, np.float32, np.float64),
        (np.float16, np.float64, np.float64),
        (np.float32, np.float32, np.float32),
        (np.float16, ml_dtypes.bfloat16, np.float32),
    ]:
        a, b = u.astype(a), v.astype(b)
        one = lineas.fit(a, b)
        assert one.dtype == expected
        assert one == lineas.fit(a.astype(expected), b.astype(expected))


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.uint16, ">i4"])
def test_integers_are_taken_as_float64(rng, dtype):
    u, v = rng.integers(0, 50, (6, 3)).astype(dtype), rng.integers(0, 90, (7, 3)).astype(dtype)
    wide = u.astype(np.float64), v.astype(np.float64)
    for use in (
        lineas.fit,
        lineas.wasserstein,
        lambda u, v: lineas.fit(u, v.astype(np.float32), l1=0.1),
        lambda u, v: lineas.sparse_path(u, v, n_penalties=3)[2],
        lineas.baselines.aura,
        lineas.baselines.mean,
        lambda u, v: lineas.bures_map(u, v, ridge=0.1).matrix,
        lambda u, v: lineas.covariance(u),
        lambda u, v: lineas.moments(u).variance(),
        lambda u, v: lineas.fit({"a": u}, {"a": v.tolist()})["a"],
        lambda u, v: lineas.bures_map(u, v).transform(u),
        lambda u, v: lineas.fit(u, v).transform(v),
    ):
        found, expected = use(u, v), use(*wide)
        assert found.dtype == np.float64 and np.array_equal(found == expected, np.ones(np.shape(found == expected)))
    torch = pytest.importorskip("torch")
    tensors = torch.from_numpy(u.astype(np.int32)), torch.from_numpy(v.astype(np.uint8))
    assert lineas.fit(*tensors) == lineas.fit(*wide)


def test_tensors_and_memory_mapped_arrays(rng, tmp_path):
    u, v = rng.normal(size=(6, 3)).astype(np.float32), rng.normal(size=(7, 3)).astype(np.float32)
    expected = lineas.fit(u, v)
    np.save(tmp_path / "u.npy", u)
    mapped = np.load(tmp_path / "u.npy", mmap_mode="r")
    assert lineas.fit(mapped, np.asfortranarray(v)) == expected
    torch = pytest.importorskip("torch")
    tensor = torch.tensor(u, requires_grad=True)
    assert lineas.fit(tensor, torch.tensor(v)) == expected
    half = tensor.detach().to(torch.bfloat16)
    assert lineas.fit(half, v) == lineas.fit(half.float(), v)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"source": np.ones((1, 3))}, ValueError, r"source must have at least 2 rows and 1 column, got shape \(1, 3\)"),
        ({"target": np.ones((1, 3))}, ValueError, r"target must have at least 2 rows and 1 column, got shape \(1, 3\)"),
        ({"source": np.ones(3)}, ValueError, r"source must have shape \[n, d\], got shape \(3,\)"),
        ({"source": np.ones((2, 4))}, ValueError, r"source and target must have the same number of columns"),
        (
            {"source": np.ones((2, 3), bool)},
            TypeError,
            "source must be float16, bfloat16, float32, float64 or an integer type, got dtype bool",
        ),
        (
            {"source": {"a": np.ones((2, 3))}},
            TypeError,
            "source and target must both be arrays or both .* dict and ndarray",
        ),
        (
            {"target": {"a": np.ones((2, 3))}},
            TypeError,
            "source and target must both be arrays or both .* ndarray and dict",
        ),
        ({"method": "median"}, ValueError, "method must be one of 'mean', 'gaussian', 'linear', got 'median'"),
        ({"method": None}, ValueError, "method must be one of 'mean', 'gaussian', 'linear', got None"),
        ({"source_weights": [1.0]}, ValueError, r"source_weights must have shape \(2,\)"),
        ({"target_weights": [0, 0, 0]}, ValueError, "target_weights must have .* sum, but all weights are zero"),
        (
            {"source_weights": {"a": [1, 1]}},
            TypeError,
            "source_weights must be an array where source is one, got a mapping",
        ),
        ({"target": [[0.0, 1, 2], [0, np.nan, 0]]}, ValueError, "target: nan at row 1, column 1"),
        ({"source": [[0.0, 1, 2], [np.inf, 0, 0]]}, ValueError, "source: inf at row 1, column 0"),
    ],
)
def test_bad_arrays(change, error, text):
    arguments = {"source": np.ones((2, 3)), "target": np.ones((3, 3))} | change
    with pytest.raises(error, match=text):
        lineas.fit(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"source": {}}, ValueError, "source must hold at least one module"),
        ({"target": {"a": np.ones((2, 3))}}, ValueError, "target must have the modules of source: it lacks 'b'"),
        (
            {"target": {"c": 0, "b": 0}},
            ValueError,
            "target must have the modules of source: it lacks 'a', it also has 'c'",
        ),
        ({"source_weights": {"a": [1, 1]}}, ValueError, "source_weights must have the modules of source: it lacks 'b'"),
        ({"source_weights": {"a": [1, 1], "b": [1]}}, ValueError, r"source_weights\['b'\] must have shape \(2,\)"),
        (
            {"target": {"a": np.ones((2, 3)), "b": np.ones((1, 3))}},
            ValueError,
            r"target\['b'\] must have at least 2 rows",
        ),
        (
            {"target": {"a": np.ones((2, 3)), "b": np.ones((2, 4))}},
            ValueError,
            r"source\['b'\] and target\['b'\] must have",
        ),
        ({"target": {"a": np.ones((2, 3)), "b": "x"}}, TypeError, r"target\['b'\] must be float16"),
    ],
)
def test_bad_modules(change, error, text):
    arguments = {
        "source": {"a": np.ones((2, 3)), "b": np.ones((2, 3))},
        "target": {"a": np.ones((2, 3)), "b": np.ones((2, 3))},
    } | change
    with pytest.raises(error, match=text):
        lineas.fit(**arguments)


def test_not_finite_names_the_module(rng):
    source = {"a": rng.normal(size=(4, 3)), "b": rng.normal(size=(4, 3))}
    target = {"a": rng.normal(size=(4, 3)), "b": rng.normal(size=(4, 3))}
    target["b"][2, 1] = np.nan
    with pytest.raises(ValueError, match=r"target\['b'\]: nan at row 2, column 1"):
        lineas.fit(source, target)


def test_a_map_that_overflows_names_the_module():
    u, v = np.array([[0.0], [1e-38]], np.float32), np.array([[0.0], [1e38]], np.float32)
    with pytest.raises(ValueError, match=r"the map of source\['a'\] overflows float32: weight must be finite, got inf"):
        lineas.fit({"a": u}, {"a": v})


@pytest.mark.parametrize("method", ["gaussian", "linear"])
def test_a_variance_may_overflow_where_the_map_does_not(method):
    huge = np.array([[-1e200], [0.0], [1e200]])
    one = lineas.fit(huge, huge[::-1] / 3, method=method)
    np.testing.assert_allclose([one.weight[0], one.bias[0]], [1 / 3, 0], rtol=1e-15, atol=1e184)
    with pytest.raises(ValueError, match="the map of source overflows float64: weight must be finite, got inf"):
        lineas.fit(huge * 1e-320, huge, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_means_match_to_rounding_far_from_zero(rng, method):
    """The shift goes with the slope as it is stored: what is left is the rounding of the shift."""
    u, v = (rng.normal(1e4, sd, size=(500, 64)).astype(np.float32) for sd in (1, 1.7))
    one = lineas.fit(u, v, method=method)
    moved = one.weight.astype(np.float64) * u.mean(0, dtype=np.float64) + one.bias
    left = np.abs(moved - v.mean(0, dtype=np.float64))
    assert (left <= np.spacing(np.abs(one.bias)) / 2 + 1e-9).all()


# --- covariance and the Gaussian map ---


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_covariance_against_numpy(rng, dtype):
    x = (rng.normal(size=(30, 5)) @ rng.normal(size=(5, 5))).astype(dtype)
    cov = lineas.covariance(x)
    assert cov.dtype == np.float64 and np.array_equal(cov, cov.T)
    np.testing.assert_allclose(cov, np.cov(x.astype(np.float64).T), rtol=1e-10, atol=1e-12)


def test_weighted_covariance_against_numpy(rng):
    x, weights = rng.normal(size=(30, 5)), rng.uniform(size=30)
    expected = np.cov(x.T, aweights=weights, ddof=0)
    np.testing.assert_allclose(lineas.covariance(x, weights=weights), expected, rtol=1e-11, atol=1e-13)


def test_covariance_errors():
    with pytest.raises(ValueError, match=r"x must have at least 2 rows and 1 column, got shape \(1, 3\)"):
        lineas.covariance(np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"x: nan at row 1, column 0"):
        lineas.covariance(np.array([[0.0], [np.nan]]))
    with pytest.raises(ValueError, match=r"weights must be finite and not negative, got -1.0 at row 0"):
        lineas.covariance(np.ones((2, 3)), weights=[-1, 1])


def test_bures_map_matches_mean_and_covariance(rng):
    u = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)) + 3
    v = rng.normal(size=(50, 5)) @ rng.normal(size=(5, 5)) - 1
    one = lineas.bures_map(u, v)
    assert isinstance(one, GaussianMap) and repr(one) == "GaussianMap(d=5)"
    z = one.transform(u)
    np.testing.assert_allclose(z.mean(0), v.mean(0), rtol=1e-10)
    np.testing.assert_allclose(np.cov(z.T), np.cov(v.T), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(one.matrix, one.matrix.T, rtol=1e-12)
    assert np.linalg.eigvalsh(one.matrix)[0] > 0  # the gradient of a convex function: optimal transport
    np.testing.assert_allclose(one.inverse().transform(z), u, rtol=1e-8, atol=1e-9)


def test_bures_map_against_scipy(rng):
    linalg = pytest.importorskip("scipy.linalg")
    u, v = rng.normal(size=(40, 4)) @ rng.normal(size=(4, 4)), rng.normal(size=(40, 4)) @ rng.normal(size=(4, 4))
    cu, cv = np.cov(u.T) + 0.1 * np.eye(4), np.cov(v.T) + 0.1 * np.eye(4)
    root = linalg.sqrtm(cu)
    inverse = np.linalg.inv(root)
    expected = inverse @ linalg.sqrtm(root @ cv @ root) @ inverse
    np.testing.assert_allclose(lineas.bures_map(u, v, ridge=0.1).matrix, expected, rtol=1e-9, atol=1e-10)


def test_bures_map_of_one_neuron_is_the_gaussian_map(rng):
    u, v = rng.normal(size=(9, 1)), rng.normal(size=(7, 1))
    full, one = lineas.bures_map(u, v), lineas.fit(u, v, method="gaussian")
    np.testing.assert_allclose([full.matrix[0, 0], full.bias[0]], [one.weight[0], one.bias[0]], rtol=1e-12)


def test_bures_map_of_few_rows(rng):
    u, v = rng.normal(size=(3, 6)), rng.normal(size=(20, 6))
    one = lineas.bures_map(u, v)
    assert np.isfinite(one.matrix).all() and np.linalg.matrix_rank(one.matrix) == 2
    np.testing.assert_allclose(one.transform(u).mean(0), v.mean(0), rtol=1e-10, atol=1e-12)
    with pytest.raises(
        ValueError, match=r"the map has no inverse: its matrix of 6 neurons is singular; fit it with a ridge"
    ):
        one.inverse()
    ridged = lineas.bures_map(u, v, ridge=0.01)
    np.testing.assert_allclose(ridged.inverse().transform(ridged.transform(u)), u, rtol=1e-8, atol=1e-9)


def test_gaussian_map_transform(rng):
    one = GaussianMap(rng.normal(size=(3, 3)), rng.normal(size=3))
    z = rng.normal(size=(2, 4, 3))
    for s in (0.0, 0.4, 1.0):
        expected = z + s * (z @ one.matrix.T + one.bias - z)
        np.testing.assert_allclose(one.transform(z, s), expected, rtol=1e-12, atol=1e-14)
    assert one.transform(z.astype(np.float16)).dtype == np.float16
    assert np.array_equal(one.transform(z.astype(np.float32), 0.0), z.astype(np.float32))
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert one.transform(z.astype(ml_dtypes.bfloat16)).dtype == ml_dtypes.bfloat16
    torch = pytest.importorskip("torch")
    for dtype in (torch.bfloat16, torch.float64):
        tensor = torch.tensor(z, dtype=dtype)
        out = one.transform(tensor, 0.4)
        assert out.dtype == dtype
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-12
        np.testing.assert_allclose(
            out.double(), one.transform(tensor.double().numpy(), 0.4), rtol=tolerance, atol=tolerance
        )


def test_gaussian_map_errors(rng):
    one = GaussianMap(np.eye(3), np.zeros(3))
    with pytest.raises(ValueError, match=r"z must have 3 channels on the last axis, got shape \(2, 4\)"):
        one.transform(np.ones((2, 4)))
    with pytest.raises(TypeError, match=r"z must be float16, .* got dtype bool"):
        one.transform(np.ones((2, 3), bool))
    with pytest.raises(ValueError, match=r"strength must be finite, got nan"):
        one.transform(np.ones((2, 3)), np.nan)
    with pytest.raises(
        ValueError, match=r"matrix and bias must have shapes \[d, d\] and \[d\], got \(3, 2\) and \(3,\)"
    ):
        GaussianMap(np.ones((3, 2)), np.zeros(3))
    with pytest.raises(TypeError, match=r"matrix and bias must be float64, got dtypes float32 and float64"):
        GaussianMap(np.ones((3, 3), np.float32), np.zeros(3))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"source": np.ones((1, 3))}, ValueError, "source must have at least 2 rows and 1 column"),
        ({"target": np.ones((2, 4))}, ValueError, "source and target must have the same number of columns"),
        ({"ridge": -1.0}, ValueError, "ridge must not be negative, got -1"),
        ({"ridge": np.nan}, ValueError, "ridge must be finite, got nan"),
        ({"ridge": "x"}, TypeError, "ridge must be a real number, got str"),
        ({"target": [[0.0, 0, np.nan], [0, 0, 0]]}, ValueError, "target: nan at row 0, column 2"),
    ],
)
def test_bad_bures_map(change, error, text):
    arguments = {"source": np.ones((2, 3)), "target": np.ones((2, 3))} | change
    with pytest.raises(error, match=text):
        lineas.bures_map(**arguments)
