import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import lineas
from lineas import Moments


def check(seen, x):
    # Long runs of narrow numbers are summed in float32 around their mean.
    rtol = 1e-11 if x.dtype == np.float64 or len(x) < 256 else 1e-7
    x = np.asarray(x, np.float64)
    assert seen.count == len(x) and seen.d == x.shape[1]
    for array in (seen.mean, seen.min, seen.max, seen.variance(), seen.std()):
        assert array.dtype == np.float64 and array.shape == (x.shape[1],)
    np.testing.assert_allclose(seen.mean, x.mean(0), rtol=rtol / 10, atol=1e-14)
    np.testing.assert_allclose(seen.variance(), x.var(0, ddof=1), rtol=rtol)
    np.testing.assert_allclose(seen.variance(ddof=0), x.var(0), rtol=rtol)
    np.testing.assert_allclose(seen.std(), x.std(0, ddof=1), rtol=rtol)
    assert np.array_equal(seen.min, x.min(0)) and np.array_equal(seen.max, x.max(0))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_one_array_against_numpy(rng, dtype):
    x = (5 + rng.normal(size=(1000, 7))).astype(dtype)
    check(lineas.moments(x), x)


@pytest.mark.parametrize("chunk_rows", [1, 7, 100, 5000])
def test_chunks_of_a_memory_mapped_array(rng, tmp_path, chunk_rows):
    np.save(tmp_path / "x.npy", rng.normal(size=(100, 5)).astype(np.float32))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    check(lineas.moments(x, chunk_rows=chunk_rows), x)


def test_the_default_chunks(rng, monkeypatch):
    monkeypatch.setattr(sys.modules["lineas.arrays.streams"], "_CHUNK", 10)  # 3 rows of 3
    x = rng.normal(size=(50, 3))
    check(lineas.moments(np.asfortranarray(x)), x)


def test_batches_from_a_generator(rng):
    batches = [rng.normal(size=(n, 4)) for n in (1, 10, 3, 100)]
    check(lineas.moments(iter(batches)), np.concatenate(batches))
    mixed = [batches[0].astype(np.float32), batches[1]]
    check(lineas.moments(mixed), np.concatenate([batches[0].astype(np.float32), batches[1]]))


def test_tensors(rng):
    torch = pytest.importorskip("torch")
    x = torch.tensor(rng.normal(size=(30, 4)), dtype=torch.bfloat16)
    check(lineas.moments(x, chunk_rows=7), x.double().numpy())
    check(lineas.moments([x[:5], x[5:]]), x.double().numpy())


def test_a_large_mean_does_not_drown_the_variance(rng):
    x = 1e8 + rng.normal(size=(1000, 3))
    np.testing.assert_allclose(lineas.moments(x, chunk_rows=64).variance(), x.var(0, ddof=1), rtol=1e-7)


@pytest.mark.parametrize("n", [255, 256, 263, 5000])
@pytest.mark.parametrize("mean", [0.0, 25.0, 1000.0])
def test_the_error_of_the_variance(rng, n, mean):
    x = (mean + rng.normal(size=(n, 37))).astype(np.float32)
    seen = lineas.moments(x)
    np.testing.assert_allclose(seen.variance(), x.var(0, dtype=np.float64, ddof=1), rtol=1e-7)
    np.testing.assert_allclose(seen.mean, x.mean(0, dtype=np.float64), rtol=1e-12, atol=1e-7)


@pytest.mark.parametrize("row", [0, 3, 40, 299])
def test_an_outlier_costs_no_digits(rng, row):
    x = rng.normal(size=(300, 20)).astype(np.float32)
    x[row] = 3e4  # the whole variance: the rounding of a single square shows
    np.testing.assert_allclose(lineas.moments(x).variance(), x.var(0, dtype=np.float64, ddof=1), rtol=3e-7)


@pytest.mark.parametrize("first", [32, 250])
def test_a_mean_that_moves_costs_no_digits(rng, first):
    x = rng.normal(size=(4000, 20)).astype(np.float32)
    x[first:] += 1e4
    np.testing.assert_allclose(lineas.moments(x).variance(), x.var(0, dtype=np.float64, ddof=1), rtol=1e-7)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e25, 1e38])
def test_squares_outside_the_range_of_float32(rng, scale):
    x = (rng.uniform(-1, 1, size=(400, 20)) * scale).astype(np.float32)
    x[:, 3] = x[0, 3]  # a dead neuron
    x[:, 4] = 1 + rng.normal(size=400)
    seen = lineas.moments(x)
    np.testing.assert_allclose(seen.variance(), x.var(0, dtype=np.float64, ddof=1), rtol=1e-7)
    assert seen.variance()[3] == 0 and seen.min[3] == seen.max[3] == x[0, 3]


def test_merge_is_as_if_seen_by_one(rng):
    x = rng.normal(size=(60, 4))
    parts = [lineas.moments(part) for part in (x[:1], x[1:20], x[20:])]
    check(Moments().merge(parts[2]).merge(parts[0]).merge(parts[1]), x)
    assert parts[0].count == 1 and np.array_equal(parts[0].mean, x[0])
    check(parts[0].merge(Moments()).merge(lineas.moments(x[1:])), x)


def test_merge_with_itself(rng):
    x = rng.normal(size=(10, 3))
    seen = lineas.moments(x)
    check(seen.merge(seen), np.concatenate([x, x]))


def test_results_are_copies(rng):
    seen = lineas.moments(rng.normal(size=(10, 3)))
    before = seen.mean
    seen.mean[:] = 0
    seen.max[:] = 0
    assert np.array_equal(seen.mean, before) and seen.max.any()


def test_repr_and_pickle(rng):
    assert repr(Moments()) == "Moments(count=0, d=None)"
    seen = lineas.moments(rng.normal(size=(10, 3)))
    assert repr(seen) == "Moments(count=10, d=3)"
    twin = pickle.loads(pickle.dumps(seen))
    assert twin.count == 10 and np.array_equal(twin.variance(), seen.variance())
    assert pickle.loads(pickle.dumps(Moments())).update(np.ones((1, 2))).count == 1


def test_copies_are_apart(rng):
    seen = lineas.moments(rng.normal(size=(10, 3)))
    before = seen.mean
    for twin in (copy.copy(seen), copy.deepcopy(seen), pickle.loads(pickle.dumps(seen))):
        twin.update(np.full((5, 3), 1e6))
        assert seen.count == 10 and np.array_equal(seen.mean, before) and twin.count == 15


def test_several_threads_lose_no_rows(rng):
    x = rng.normal(size=(200, 2000, 16)).astype(np.float32)
    seen = Moments()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(seen.update, x))
    assert seen.count == 400_000
    np.testing.assert_allclose(seen.variance(), x.reshape(-1, 16).var(0, dtype=np.float64, ddof=1), rtol=1e-6)


def test_merging_both_ways_at_once(rng):
    """Two states that merge each other neither wait forever nor count a row in halves."""
    one, other = lineas.moments(np.zeros((3, 1000))), lineas.moments(np.ones((5, 1000)))
    with ThreadPoolExecutor(2) as pool:
        for k in range(20):
            jobs = [pool.submit(one.merge, other), pool.submit(other.merge, one)]
            for job in jobs:
                job.result(timeout=60)
            assert one.min.max() == 0 and one.max.min() == 1 and 0 < one.mean[0] < 1, k
            one, other = lineas.moments(np.zeros((3, 1000))), lineas.moments(np.ones((5, 1000)))
    assert one.merge(one).count == 6


def test_a_bad_batch_changes_nothing(rng):
    x = rng.normal(size=(10, 3))
    seen = lineas.moments(x)
    bad = x.copy()
    bad[4, 2] = np.nan
    with pytest.raises(ValueError, match=r"x: nan at row 4, column 2"):
        seen.update(bad)
    with pytest.raises(ValueError, match=r"x must have 3 columns as before, got shape \(2, 4\)"):
        seen.update(np.ones((2, 4)))
    check(seen, x)
    fresh = Moments()
    with pytest.raises(ValueError, match=r"x: nan at row 4, column 2"):
        fresh.update(bad)
    assert fresh.count == 0 and fresh.d is None
    check(fresh.update(np.ones((2, 5)) * [[1], [2]]), np.ones((2, 5)) * [[1], [2]])


@pytest.mark.parametrize(
    ("data", "options", "error", "text"),
    [
        (np.ones(3), {}, ValueError, r"data must have shape \[n, d\], got shape \(3,\)"),
        (np.ones((0, 3)), {}, ValueError, r"data must have at least 1 row and 1 column, got shape \(0, 3\)"),
        (np.ones((3, 0)), {}, ValueError, r"data must have at least 1 row and 1 column, got shape \(3, 0\)"),
        (np.ones((2, 3), bool), {}, TypeError, "data must be float16, .* got dtype bool"),
        ([np.ones((2, 3)), np.ones((2, 3), bool)], {}, TypeError, "batch 1 must be float16, .* got dtype bool"),
        (
            [np.ones((2, 3)), np.ones((2, 4))],
            {},
            ValueError,
            r"batch 1 must have 3 columns as before, got shape \(2, 4\)",
        ),
        ([np.ones((2, 3)), np.ones((0, 3))], {}, ValueError, "batch 1 must have at least 1 row"),
        ([], {}, ValueError, "data must hold at least one batch$"),
        (iter([]), {}, ValueError, "data must hold at least one batch: an iterator can be read once$"),
        (3, {}, TypeError, "data must be an array or an iterable of arrays, got int"),
        ({"a": np.ones((2, 3))}, {}, TypeError, "batch 0 must be float16, .* got dtype <U1"),
        (np.ones((2, 3)), {"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, got 0"),
        (np.array([[1.0], [2.0], [np.inf]]), {}, ValueError, "data: inf at row 2, column 0"),
        (np.array([[1.0], [2.0], [np.inf]]), {"chunk_rows": 2}, ValueError, r"data\[2:3\]: inf at row 0, column 0"),
    ],
)
def test_bad_data(data, options, error, text):
    with pytest.raises(error, match=text):
        lineas.moments(data, **options)


def test_bad_use(rng):
    for read in ("mean", "min", "max"):
        with pytest.raises(ValueError, match=r"these moments have seen no rows yet"):
            getattr(Moments(), read)
    with pytest.raises(ValueError, match=r"a variance with ddof=1 needs more than 1 rows, got 0"):
        Moments().variance()
    one = lineas.moments(np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"a variance with ddof=1 needs more than 1 rows, got 1"):
        one.std()
    assert np.array_equal(one.variance(ddof=0), np.zeros(3))
    with pytest.raises(ValueError, match=r"ddof must be at least 0, got -1"):
        one.variance(ddof=-1)
    with pytest.raises(ValueError, match=r"cannot merge moments of 3 and 2 neurons"):
        one.merge(lineas.moments(np.ones((1, 2))))
    with pytest.raises(TypeError, match=r"other must be a Moments, got ndarray"):
        one.merge(np.ones((1, 3)))


def test_a_data_frame_is_one_array():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1.0, 2.0, 4.0], "b": [0.5, 0.25, 1.0]})
    for found in (lineas.moments(frame), lineas.quantiles(frame).moments):
        assert found.count == 3
        np.testing.assert_array_equal(found.mean, lineas.moments(frame.to_numpy()).mean)
    with pytest.raises(TypeError, match="data must be float16"):
        lineas.moments(pandas.DataFrame({"a": ["x"]}))
