"""Streaming quantiles: exact while all values are there, within the promised error afterwards, whatever the order."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lineas
from lineas import Quantiles

SMALLEST = 512  # values kept: runs of 32 rows


def rank_error(seen, x):
    """The largest error of the share of rows up to any value seen or kept, over all neurons."""
    rows, weights = seen.weighted_sample()
    assert weights.sum() == seen.count == len(x)
    worst = 0.0
    for ours, share, column in zip(rows.T, np.tile(weights, (x.shape[1], 1)), x.T, strict=True):
        order, true = np.argsort(ours, kind="stable"), np.sort(column)
        reached = np.append(0, np.cumsum(share[order]))
        for values in (ours, column):
            told = reached[np.searchsorted(ours[order], values, side="right")]
            worst = max(worst, np.abs(told - np.searchsorted(true, values, side="right")).max())
    return worst / len(x)


def organ_pipe(x):
    return np.concatenate([np.sort(x[::2], axis=0), np.sort(x[1::2], axis=0)[::-1]])


ORDERS = {
    "as drawn": lambda x: x,
    "sorted": lambda x: np.sort(x, axis=0),
    "reversed": lambda x: np.sort(x, axis=0)[::-1],
    "organ pipe": organ_pipe,
    "constant": np.ones_like,
    "heavy ties": lambda x: np.round(x),
    "half zero": lambda x: np.maximum(x, 0),
    "alternating ends": lambda x: np.sort(x, axis=0)[np.arange(len(x)) * np.where(np.arange(len(x)) % 2, 1, -1)],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_promise_holds_in_any_order(rng, order, dtype):
    x = ORDERS[order](rng.normal(size=(12_345, 18))).astype(dtype)
    seen = Quantiles(SMALLEST)
    for block in np.array_split(x, [1, 40, 41, 3000, 9000]):
        seen.update(block)
    assert not seen.exact and 0 < seen.rank_error < 0.1
    assert rank_error(seen, x) <= seen.rank_error
    np.testing.assert_allclose(seen.sample(50).mean(axis=0), x.mean(axis=0, dtype=np.float64), atol=1e-6)
    check_quantiles(seen, x)


def check_quantiles(seen, x):
    """Each quantile is where the true share of rows is the one asked for, up to the promise."""
    q = np.array([0, 0.001, 0.1, 0.5, 0.77, 0.999, 1])
    found, slack = seen.quantile(q), seen.rank_error + 1e-12
    assert np.array_equal(found[0], x.min(0)) and np.array_equal(found[-1], x.max(0))
    assert (np.diff(found, axis=0) >= 0).all() and seen.run == 32
    at_most, below = (x[None] <= found[:, None]).mean(1), (x[None] < found[:, None]).mean(1)
    assert (at_most >= q[:, None] - slack).all() and (below <= q[:, None] + slack).all()


@given(
    sizes=st.lists(st.integers(1, 900), min_size=1, max_size=8),
    seed=st.integers(0, 2**32),
    order=st.sampled_from(sorted(ORDERS)),
    data=st.data(),
)
def test_merges_in_any_tree(sizes, seed, order, data):
    """Summaries of parts, merged two by two in any order, are exact or keep their promise."""
    x = ORDERS[order](np.random.default_rng(seed).normal(size=(sum(sizes), 3)).astype(np.float32))
    parts = [lineas.quantiles(part, size=SMALLEST) for part in np.split(x, np.cumsum(sizes)[:-1])]
    while len(parts) > 1:
        other = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts[data.draw(st.integers(0, len(parts) - 1))].merge(other)
    seen = parts[0]
    assert seen.count == len(x)
    assert rank_error(seen, x) <= seen.rank_error
    assert np.array_equal(seen.min, x.min(0)) and np.array_equal(seen.max, x.max(0))
    if len(x) <= SMALLEST:
        assert seen.exact and seen.rank_error == 0
        assert np.array_equal(seen.sample(len(x)), np.sort(x, axis=0))


@pytest.mark.parametrize("n", [1, 2, 31, 33, 500, 512])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_all_there(rng, n, dtype):
    x = (20 * rng.normal(size=(n, 37))).astype(dtype)
    seen = Quantiles(SMALLEST)
    for row in np.array_split(x, min(n, 7)):
        seen.update(row)
    work = np.float64 if dtype in (np.float64, np.int64) else np.float32
    assert seen.exact and seen.rank_error == 0 and seen.count == n and seen.d == 37 and seen.dtype == work
    q = np.append(rng.uniform(size=40), [0, 1, 0.5, 0.25])  # in no order
    expected = np.quantile(x.astype(work), q, axis=0, method="inverted_cdf")
    assert seen.quantile(q).dtype == work and np.array_equal(seen.quantile(q), expected)
    assert np.array_equal(seen.quantile(0.3), np.quantile(x.astype(work), 0.3, axis=0, method="inverted_cdf"))
    assert seen.quantile([]).shape == (0, 37)
    assert np.array_equal(seen.sample(n), np.sort(x, axis=0).astype(work))
    rows, weights = seen.weighted_sample()
    assert np.array_equal(np.sort(rows, axis=0), np.sort(x, axis=0).astype(work)) and (weights == 1).all()


def test_one_row_more_than_fit(rng):
    x = rng.normal(size=(SMALLEST + 1, 3))
    assert Quantiles(SMALLEST).update(x[:-1]).exact
    seen = Quantiles(SMALLEST).update(x)
    assert not seen.exact and seen.rank_error == 1 / len(x)


def test_means_over_parts(rng):
    """Rows are means of the quantile function, also where a value reaches over several parts or parts over values."""
    x = rng.normal(size=(300, 5))
    seen, ordered = Quantiles(SMALLEST).update(x), np.sort(x, axis=0)
    np.testing.assert_allclose(seen.sample(100), ordered.reshape(100, 3, 5).mean(1), rtol=1e-13)
    np.testing.assert_allclose(seen.sample(900), np.repeat(ordered, 3, axis=0), rtol=1e-13)
    np.testing.assert_allclose(seen.sample(1)[0], x.mean(0), rtol=1e-12)
    fine = np.repeat(ordered, 7, axis=0).reshape(7, 300, 5)
    np.testing.assert_allclose(seen.sample(7), fine.mean(1), rtol=1e-12)


def test_the_cut_into_batches_does_not_matter(rng):
    x = rng.normal(size=(3000, 20)).astype(np.float32)
    whole, parts = lineas.quantiles(x, size=SMALLEST), Quantiles(SMALLEST)
    for part in np.array_split(x, [1, 2, 700, 701, 2900]):
        parts.update(part)
    for a, b in zip(whole.weighted_sample(), parts.weighted_sample(), strict=True):
        assert np.array_equal(a, b)
    assert whole.rank_error == parts.rank_error


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_threads_do_not_matter(rng, dtype):
    x = rng.normal(size=(3000, 200)).astype(dtype)
    before, found = lineas.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            lineas.set_num_threads(threads)
            seen = lineas.quantiles(x, size=SMALLEST)
            seen.merge(lineas.quantiles(x[::-1], size=SMALLEST))
            found.append([*seen.weighted_sample(), seen.sample(99), seen.quantile([0.2, 0.9])])
    finally:
        lineas.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a.tobytes() == b.tobytes()


def test_moments_are_exact(rng):
    x = (3 + rng.normal(size=(5000, 4))).astype(np.float32)
    seen, moments = lineas.quantiles(x, size=SMALLEST, chunk_rows=777), lineas.moments(x, chunk_rows=777)
    assert seen.moments.count == 5000 and Quantiles().moments.count == 0
    for name in ("mean", "min", "max"):
        assert np.array_equal(getattr(seen.moments, name), getattr(moments, name))
    assert np.array_equal(seen.moments.variance(), moments.variance())
    before = seen.max
    seen.moments.update(x + 100)
    seen.min[:] = 0
    assert np.array_equal(seen.max, before) and (seen.min < 2).all()


def test_mixed_batches_widen(rng):
    """Values kept become float64 with the first batch that needs it; what was there stays as it was."""
    x = rng.normal(size=(2000, 21))
    narrow = x[:1000].astype(np.float32)
    seen, same = Quantiles(SMALLEST).update(narrow), Quantiles(SMALLEST).update(narrow.astype(np.float64))
    assert seen.dtype == np.float32
    for one in (seen, same):
        one.update(x[1000:]).update(narrow)
        assert one.dtype == np.float64
    assert seen.rank_error == same.rank_error
    # Means of neighbours were rounded to float32 before.
    np.testing.assert_allclose(seen.sample(50), same.sample(50), atol=1e-6)
    wide = Quantiles(SMALLEST).update(narrow[:9]).merge(Quantiles(SMALLEST).update(x[:7]))
    assert wide.dtype == np.float64
    assert np.array_equal(wide.sample(16), np.sort(np.concatenate([narrow[:9], x[:7]]), axis=0))


def test_tensors_and_memory_maps(rng, tmp_path):
    np.save(tmp_path / "x.npy", rng.normal(size=(900, 5)).astype(np.float32))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    expected = lineas.quantiles(np.array(x), size=SMALLEST)
    assert np.array_equal(lineas.quantiles(x, size=SMALLEST, chunk_rows=100).sample(9), expected.sample(9))
    assert np.array_equal(lineas.quantiles(iter([x[:50], x[50:]]), size=SMALLEST).sample(9), expected.sample(9))
    torch = pytest.importorskip("torch")
    tensor = torch.tensor(np.array(x)).bfloat16()
    seen = lineas.quantiles([tensor[:300]], size=SMALLEST)
    assert np.array_equal(seen.sample(300), np.sort(tensor[:300].float().numpy(), axis=0))


def test_memory_stays_within_size(rng):
    block, seen, most = rng.normal(size=(4096, 16)).astype(np.float32), Quantiles(1000), 0
    assert seen.size == 992 and seen.nbytes == 0
    for _ in range(60):
        most = max(most, seen.update(block).nbytes)
    assert seen.count == 60 * 4096 and len(seen.weighted_sample()[0]) <= 992
    assert most <= 992 * 16 * 4 + 1200
    assert Quantiles(16384).update(block[:5]).nbytes <= 2 * 1024 * 16 * 4 + 1200  # two runs, not all


def test_more_rows_than_runs_of_different_weights_hold(rng):
    """Where merged summaries stand for so many rows that weights run out, runs are added."""
    seen = lineas.quantiles(rng.normal(size=(4096, 2)), size=SMALLEST)
    for _ in range(20):
        seen.merge(seen)
    assert seen.count == 4096 << 20 and seen.rank_error < 0.5
    assert seen.weighted_sample()[1].sum() == seen.count
    assert abs(seen.quantile(0.5)).max() < 0.5
    assert seen.nbytes < 3 * SMALLEST * 8 * 8


def test_copies_and_pickles(rng):
    seen = lineas.quantiles(rng.normal(size=(2000, 3)), size=SMALLEST)
    before = seen.sample(20)
    for twin in (copy.copy(seen), copy.deepcopy(seen), pickle.loads(pickle.dumps(seen))):
        assert np.array_equal(twin.sample(20), before) and twin.rank_error == seen.rank_error
        twin.update(np.full((600, 3), 1e6))
        assert seen.count == 2000 and np.array_equal(seen.sample(20), before) and twin.count == 2600
    assert pickle.loads(pickle.dumps(Quantiles(600))).update(np.ones((1, 2))).size == Quantiles(600).size == 576


def test_repr():
    assert repr(Quantiles()) == "Quantiles(size=16384, count=0, d=None)"
    assert repr(Quantiles().update(np.ones((2, 3)))) == "Quantiles(size=16384, count=2, d=3, exact)"
    assert repr(Quantiles(512).update(np.ones((600, 3)))) == "Quantiles(size=512, count=600, d=3, rank_error=0.005)"


def test_several_threads_lose_no_rows(rng):
    x = rng.normal(size=(40, 300, 16)).astype(np.float32)
    seen = Quantiles(SMALLEST)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(seen.update, x))
    assert rank_error(seen, x.reshape(-1, 16)) <= seen.rank_error


def test_merging_with_itself_and_both_ways_at_once(rng):
    one, other = (lineas.quantiles(rng.normal(size=(700, 40)), size=SMALLEST) for _ in range(2))
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(one.merge, other), pool.submit(other.merge, one)]:
            job.result(timeout=60)
    assert {one.count, other.count} <= {1400, 2100}
    count = one.count
    assert one.merge(one).count == 2 * count
    assert one.merge(Quantiles(SMALLEST)).count == 2 * count
    assert Quantiles(SMALLEST).merge(one).count == 2 * count


def test_a_bad_batch_changes_nothing(rng):
    x = rng.normal(size=(700, 3)).astype(np.float32)
    seen = lineas.quantiles(x, size=SMALLEST)
    before = seen.sample(30)
    bad = rng.normal(size=(40, 3))
    bad[4, 2] = np.nan
    for use, text in (
        (lambda: seen.update(bad), r"x: nan at row 4, column 2"),
        (lambda: seen.update(np.ones((2, 4))), r"x must have 3 columns as before, got shape \(2, 4\)"),
        (lambda: seen.merge(lineas.quantiles(np.ones((2, 4)), size=512)), "cannot merge quantiles of 3 and 4 neurons"),
        (lambda: seen.merge(lineas.quantiles(np.ones((2, 3)))), "cannot merge quantiles of size 512 and 16384"),
    ):
        with pytest.raises(ValueError, match=text):
            use()
        assert np.array_equal(seen.sample(30), before) and seen.count == 700 and seen.dtype == np.float32
    fresh = Quantiles()
    with pytest.raises(ValueError, match=r"x: nan at row 4, column 2"):
        fresh.update(bad)
    assert fresh.count == 0 and fresh.d is None and fresh.dtype is None and fresh.exact and fresh.rank_error == 0
    assert fresh.update(np.ones((2, 5))).d == 5


@pytest.mark.parametrize(
    ("data", "options", "error", "text"),
    [
        (np.ones(3), {}, ValueError, r"data must have shape \[n, d\], got shape \(3,\)"),
        (np.ones((2, 3), bool), {}, TypeError, "data must be float16, .* got dtype bool"),
        ([np.ones((2, 3)), np.ones((2, 4))], {}, ValueError, r"batch 1 must have 3 columns as before"),
        ([], {}, ValueError, "data must hold at least one batch"),
        (3, {}, TypeError, "data must be an array or an iterable of arrays, got int"),
        (np.ones((2, 3)), {"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, got 0"),
        (np.ones((2, 3)), {"size": 511}, ValueError, "size must be at least 512, got 511"),
        (np.ones((2, 3)), {"size": 1 << 25}, ValueError, "size must be at most 16777216, got 33554432"),
        (np.ones((2, 3)), {"size": 1e4}, TypeError, "size must be an int, got float"),
        (np.array([[1.0], [np.inf]]), {"chunk_rows": 1}, ValueError, r"data\[1:2\]: inf at row 0, column 0"),
    ],
)
def test_bad_data(data, options, error, text):
    with pytest.raises(error, match=text):
        lineas.quantiles(data, **options)


def test_bad_use():
    for read in (
        lambda x: x.min,
        lambda x: x.max,
        lambda x: x.quantile(0.5),
        lambda x: x.sample(3),
        lambda x: x.weighted_sample(),
    ):
        with pytest.raises(ValueError, match=r"these quantiles have seen no rows yet"):
            read(Quantiles())
    seen = Quantiles().update(np.ones((2, 3)))
    for q, text in ((1.5, "got 1.5"), ([0.5, -0.25], "got -0.25"), ([np.nan], "got nan")):
        with pytest.raises(ValueError, match=f"q must be from 0 to 1, {text}"):
            seen.quantile(q)
    with pytest.raises(ValueError, match=r"q must be a number or have shape \[k\], got shape \(1, 1\)"):
        seen.quantile([[0.5]])
    with pytest.raises(ValueError, match=r"m must be at least 1, got 0"):
        seen.sample(0)
    with pytest.raises(TypeError, match=r"m must be an int, got float"):
        seen.sample(2.0)
    with pytest.raises(TypeError, match=r"other must be a Quantiles, got Moments"):
        seen.merge(lineas.Moments())


def test_the_default_chunks(rng, monkeypatch):
    monkeypatch.setattr(sys.modules["lineas.arrays.streams"], "_CHUNK", 10)  # 3 rows of 3
    x = rng.normal(size=(50, 3))
    assert np.array_equal(lineas.quantiles(np.asfortranarray(x)).sample(50), np.sort(x, axis=0))
