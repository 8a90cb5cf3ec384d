"""Dask arrays against the same blocks merged by hand and against NumPy arrays, under every scheduler."""

import os
import pickle
import subprocess
import sys
from copy import copy
from itertools import pairwise

import numpy as np
import pytest

import lineas
from lineas import _threads

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

SCHEDULERS = ("synchronous", "threads")
ROWS, COLUMNS = (200, 1, 350, 0, 449, 300, 200, 250, 250), (3, 16, 18)


@pytest.fixture
def x(rng):
    return rng.gamma(1.0, size=(sum(ROWS), sum(COLUMNS))).astype(np.float32)


@pytest.fixture
def chunked(x):
    """The array in uneven chunks of rows and columns, one of them empty."""
    return da.from_array(x, chunks=(ROWS, COLUMNS))


@pytest.fixture(scope="module")
def client():
    """A cluster of two processes, made the current one while a test asks for it."""
    distributed = pytest.importorskip("distributed")
    with (
        dask.config.set({"distributed.worker.daemon": True}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


def bits(state):
    """Everything a state holds."""
    count, arrays = state.__getstate__()
    arrays = arrays if isinstance(state, lineas.Moments) else arrays[1:]
    return count, state.count, [(x.dtype, x.shape, x.tobytes()) for x in arrays]


def by_hand(x, new):
    """Blocks of rows, all columns at once, merged four by four as decision 27 has it."""
    starts = np.cumsum([0, *ROWS])
    states = [new().update(x[a:b]) for a, b in pairwise(starts) if b > a]
    while len(states) > 1:
        groups = [states[k : k + 4] for k in range(0, len(states), 4)]
        states = [copy(group[0]) for group in groups]
        for state, group in zip(states, groups, strict=True):
            for other in group[1:]:
                state.merge(other)
    return states[0]


def new_quantiles():
    return lineas.Quantiles(512)


def results(chunked, target):
    """What dask arrays that do not fit into memory give, as bytes."""
    maps = lineas.fit({"a": chunked, "b": chunked[:, :20]}, {"a": target, "b": target[:, :20]}, memory=2**16)
    path = lineas.sparse_path(chunked, target, memory=2**16, n_penalties=4, held_out=(chunked, target))
    arrays = [lineas.wasserstein(chunked, target, memory=2**16), path.loss, path.held_out_loss]
    arrays += [array for map in maps.values() for array in (map.weight, map.bias)]
    states = lineas.moments(chunked), lineas.quantiles(chunked, size=512), lineas.quantiles(chunked)
    return [x.tobytes() for x in arrays], maps.metadata, [bits(state) for state in states]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_states_are_those_of_the_blocks_merged_by_hand(x, chunked, scheduler):
    with dask.config.set(scheduler=scheduler):
        assert bits(lineas.quantiles(chunked, size=512)) == bits(by_hand(x, new_quantiles))
        assert bits(lineas.moments(chunked)) == bits(by_hand(x, lineas.Moments))
    assert not lineas.quantiles(chunked, size=512).exact and lineas.quantiles(chunked).exact


def test_against_numpy(x, chunked):
    moments, exact = lineas.moments(chunked), lineas.quantiles(chunked)
    np.testing.assert_allclose(moments.mean, x.mean(0, dtype=np.float64), rtol=1e-7)
    np.testing.assert_allclose(moments.variance(), x.var(0, ddof=1, dtype=np.float64), rtol=1e-7)
    assert np.array_equal(moments.min, x.min(0)) and np.array_equal(moments.max, x.max(0))
    shares = [0.0, 0.01, 0.5, 0.9, 1.0]
    assert np.array_equal(exact.quantile(shares), np.quantile(x, shares, axis=0, method="inverted_cdf"))
    rough = lineas.quantiles(chunked, size=512)
    for share in (0.1, 0.5, 0.8):
        below = (x < rough.quantile(share)).mean(0)
        assert (abs(below - share) <= rough.rank_error + 1 / len(x)).all()
    rough.update(x[:10])
    assert rough.count == len(x) + 10


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_what_fits_into_memory_is_the_fit_of_the_arrays(x, rng, dtype):
    u, v = (10 * x).astype(dtype), (10 * rng.normal(size=(300, x.shape[1]))).astype(dtype)
    lazy_u, lazy_v = da.from_array(u, chunks=(ROWS, COLUMNS)), da.from_array(v, chunks=(100, 30))
    weights = rng.random(len(u))
    for use in (
        lambda u, v: lineas.fit({"a": u, "b": u[:, :4]}, {"a": v, "b": v[:, :4]}),
        lambda u, v: lineas.fit(u, v, method="gaussian", source_weights=weights),
        lambda u, v: lineas.fit(u, v, shrinkage="auto"),
        lambda u, v: lineas.fit(u, v, l1=0.1),
        lambda u, v: lineas.sparse_path(u, v, n_penalties=3).at(index=1),
        lambda u, v: lineas.wasserstein(u, v).tobytes(),
        lambda u, v: lineas.wasserstein(u, v, u_weights=weights).tobytes(),
    ):
        assert use(lazy_u, lazy_v) == use(lazy_u, v) == use(u, v)


def test_activations_of_dask_arrays_keep_their_metadata(x, chunked):
    source = lineas.Activations({"a": chunked}, {"tokens": "last"})
    for memory in (2**30, 2**16):
        assert lineas.fit(source, {"a": chunked + 1}, memory=memory).metadata["tokens"] == "last"
        assert lineas.sparse_path(source, {"a": chunked + 1}, memory=memory).metadata["tokens"] == "last"


def test_what_does_not_fit_is_a_stream(x, chunked, rng):
    target = rng.normal(size=(900, x.shape[1])).astype(np.float32)
    expected = lineas.fit({"a": x}, {"a": target})
    memory = x.nbytes - 1
    maps = lineas.fit({"a": chunked}, {"a": target}, memory=memory)
    u = by_hand(x, lambda: lineas.Quantiles(memory // (2 * 4 * x.shape[1])))
    assert maps == lineas.fit({"a": u}, {"a": target})
    assert maps.metadata["rank_error"] == u.rank_error > 0
    np.testing.assert_allclose(maps["a"].weight, expected["a"].weight, rtol=0.03)
    names = ("a", "b", "c")  # each fits, but not all of them
    exact = lineas.fit(dict.fromkeys(names, chunked), dict.fromkeys(names, target), memory=int(2.9 * x.nbytes))
    assert "rank_error" not in exact.metadata
    np.testing.assert_allclose(exact["b"].weight, expected["a"].weight, rtol=1e-5)


def test_chunks_of_columns_change_nothing(x, chunked, rng):
    target = rng.normal(size=(900, x.shape[1])).astype(np.float32)
    assert results(chunked, target) == results(da.from_array(x, chunks=(ROWS, -1)), target)
    wide = chunked.astype(np.float64)  # tiles of other widths
    assert bits(lineas.quantiles(wide, size=512)) == bits(by_hand(x.astype(np.float64), new_quantiles))


def test_all_schedulers_give_the_same_bits(x, chunked, rng, client):
    target = rng.normal(size=(900, x.shape[1])).astype(np.float32)
    found = []
    for scheduler in SCHEDULERS:
        with dask.config.set(scheduler=scheduler):
            found.append(results(chunked, target))
    assert found[0] == found[1]
    expected = by_hand(x, new_quantiles), by_hand(x, lineas.Moments)
    with client.as_current():
        kept = client.persist(chunked)
        states = lineas.quantiles(kept, size=512), lineas.moments(kept)
        assert lineas.fit(kept, target, memory=2**16) == lineas.fit(expected[0], target)
    assert [bits(state) for state in states] == [bits(state) for state in expected]
    states[0].update(x[:3])
    assert states[0].count == len(x) + 3


@pytest.mark.slow
def test_a_worker_that_dies_loses_nothing(x, chunked, client, tmp_path):
    flag = tmp_path / "dead"

    def die_once(block, block_info=None):
        if block_info[0]["chunk-location"] == (5, 1) and not flag.exists():
            flag.touch()
            os._exit(1)
        return block

    with client.as_current():
        found = lineas.quantiles(da.map_blocks(die_once, chunked, dtype=x.dtype, meta=chunked._meta), size=512)
    assert flag.exists() and bits(found) == bits(by_hand(x, new_quantiles))


def test_errors_of_workers_are_those_of_arrays(x, chunked, client):
    at = da.from_array(np.arange(x.size).reshape(x.shape) == 700 * x.shape[1], chunks=(ROWS, COLUMNS))
    bad = da.where(at, np.nan, chunked)
    with client.as_current(), pytest.raises(ValueError, match=r"data\[551:1000, 0:3\]: nan at row 149, column 0"):
        lineas.moments(bad)


def test_values_that_are_not_finite(x):
    x[700, 20] = np.inf
    u, good = da.from_array(x, chunks=(ROWS, COLUMNS)), np.abs(np.nan_to_num(x, posinf=1))
    for use, text in (
        (lambda: lineas.fit(u, good), "source: inf at row 700, column 20"),
        (lambda: lineas.fit(u, good, memory=1), r"source\[551:1000, 19:37\]: inf at row 149, column 1"),
        (
            lambda: lineas.fit({"a": good}, {"a": u}, memory=1),
            r"target\['a'\]\[551:1000, 19:37\]: inf at row 149, column 1",
        ),
        (lambda: lineas.wasserstein(u, good), "u: inf at row 700, column 20"),
        (lambda: lineas.quantiles(u), r"data\[551:1000, 19:37\]: inf at row 149, column 1"),
        (lambda: lineas.moments(u.rechunk((ROWS, -1))), r"data\[551:1000\]: inf at row 149, column 20"),
        (lambda: lineas.moments(u.rechunk(-1)), "data: inf at row 700, column 20"),
    ):
        with pytest.raises(ValueError, match=text):
            use()


def test_arrays_that_are_no_samples(x, chunked):
    for array, error, text in (
        (
            chunked[chunked[:, 0] > 1],
            ValueError,
            r"must have known chunk sizes, got \(\(nan, .*compute_chunk_sizes\(\)",
        ),
        (chunked[:, 0], ValueError, r"must have shape \[n, d\], got shape \(2000,\)"),
        (chunked[None], ValueError, r"must have shape \[n, d\], got shape \(1, 2000, 37\)"),
        (chunked[:0], ValueError, r"must have at least 1 row and 1 column, got shape \(0, 37\)"),
        (chunked[:, :0], ValueError, r"must have at least 1 row and 1 column, got shape \(2000, 0\)"),
        (chunked.astype(object), TypeError, "must be float16, .* got dtype object"),
        (chunked > 0, TypeError, "must be float16, .* got dtype bool"),
        (chunked.astype(np.complex64), TypeError, "must be float16, .* got dtype complex64"),
        (
            dask.delayed(x),
            TypeError,
            "must be an array or a dask array, got a dask collection of type DelayedLeaf; pass ",
        ),
    ):
        for name, use in (
            ("source", lambda array=array: lineas.fit(array, x)),
            ("target", lambda array=array: lineas.sparse_path(x, array, memory=1)),
            (
                r"held_out target\['a'\]",
                lambda array=array: lineas.sparse_path({"a": x}, {"a": x + 1}, held_out=({"a": x}, {"a": array})),
            ),
            ("v", lambda array=array: lineas.wasserstein(x, array)),
            ("data", lambda array=array: lineas.moments(array)),
            ("data", lambda array=array: lineas.quantiles(array)),
        ):
            with pytest.raises(error, match=f"^{name} {text}"):
                use()
    filtered = chunked[chunked[:, 0] > 1].compute_chunk_sizes()
    np.testing.assert_allclose(lineas.moments(filtered).mean, x[x[:, 0] > 1].mean(0, dtype=np.float64), rtol=1e-7)


def test_bad_use(x, chunked):
    wrong = da.from_delayed(dask.delayed(x[:5]), shape=(6, 37), dtype=x.dtype)
    for use, error, text in (
        (lambda: lineas.fit(chunked[:1], x), ValueError, "source must have at least 2 rows and 1 column"),
        (lambda: lineas.fit(chunked[:1], x, memory=1), ValueError, "source must have seen at least 2 rows, got 1"),
        (lambda: lineas.fit(chunked, x[:, :5]), ValueError, r"same number of columns, got shapes \(2000, 37\) and"),
        (
            lambda: lineas.fit(chunked, x[:, :5], memory=1),
            ValueError,
            r"same number of columns, got shapes \(2000, 37\)",
        ),
        (
            lambda: lineas.fit(chunked, {"a": x}),
            TypeError,
            "must both be arrays or both be mappings, got Array and dict",
        ),
        (lambda: lineas.fit(chunked, x, memory=1, source_weights=x[:, 0]), ValueError, "got Quantiles or a stream"),
        (lambda: lineas.fit(chunked, x, memory=1, shrinkage=0.5), ValueError, "got Quantiles or a stream"),
        (lambda: lineas.wasserstein(x, chunked, memory=1, v_sorted=True), ValueError, "got Quantiles or a stream"),
        (lambda: lineas.moments(chunked, chunk_rows=3), ValueError, "chunk_rows does not go with dask arrays"),
        (
            lambda: lineas.moments(wrong),
            ValueError,
            r"data must have shape \(6, 37\) as its chunks say, got a block of",
        ),
        (lambda: lineas.moments(da.ma.masked_array(chunked, chunked > 1)), TypeError, "got a masked array"),
        (lambda: lineas.fit(chunked, x, memory=0), ValueError, "memory must be at least 1, got 0"),
    ):
        with pytest.raises(error, match=text):
            use()


def test_data_frames(x):
    frames = pytest.importorskip("dask.dataframe")
    pandas = pytest.importorskip("pandas")
    frame = frames.from_pandas(pandas.DataFrame(x[:, :5], columns=list("abcde")), npartitions=3)
    with pytest.raises(
        TypeError, match=r"got a dask collection of type DataFrame; pass .to_dask_array\(lengths=True\)"
    ):
        lineas.moments(frame)
    found = lineas.moments(frame.to_dask_array(lengths=True))
    np.testing.assert_allclose(found.mean, x[:, :5].mean(0, dtype=np.float64), rtol=1e-7)


def test_parquet(x, tmp_path):
    pytest.importorskip("pyarrow")
    frames, pandas = pytest.importorskip("dask.dataframe"), pytest.importorskip("pandas")
    for k, part in enumerate(np.array_split(x, 3)):
        pandas.DataFrame(part, columns=[f"n{j}" for j in range(x.shape[1])]).to_parquet(tmp_path / f"{k}.parquet")
    read = frames.read_parquet(tmp_path).to_dask_array(lengths=True)
    assert read.shape == x.shape and read.numblocks == (3, 1)
    assert lineas.fit(read, x[:50] + 1) == lineas.fit(x, x[:50] + 1)


def test_zarr(x, tmp_path):
    zarr = pytest.importorskip("zarr")
    stored = zarr.create_array(str(tmp_path / "x.zarr"), data=x, chunks=(300, 10))
    read = da.from_zarr(str(tmp_path / "x.zarr"))
    assert read.chunks[1] == (10, 10, 10, 7)
    assert bits(lineas.quantiles(read, size=512)) == bits(
        lineas.quantiles(da.from_array(x, chunks=(300, -1)), size=512)
    )
    assert lineas.fit(read, x[:50] + 1) == lineas.fit(x, x[:50] + 1)
    assert lineas.fit(stored, x[:50] + 1) == lineas.fit(x, x[:50] + 1)  # without dask, by slices
    assert lineas.moments(stored).count == len(x)


def test_files_of_activations(x, tmp_path):
    """As dask cuts blocks out of them in processes of their own, from the paths that they hold."""
    np.save(tmp_path / "x.npy", x)
    read = da.from_array(lineas.open_activations(tmp_path / "x.npy"), chunks=(ROWS, COLUMNS))
    assert bits(lineas.quantiles(read, size=512)) == bits(by_hand(x, new_quantiles))


def test_tasks_use_one_thread(chunked, monkeypatch):
    """As many tasks as cores run at once."""
    seen, core = [], sys.modules["lineas.arrays.moments"]._core

    class Spy:
        def __getattr__(self, name):
            return getattr(core, name)

        def moments_update(self, *args):
            seen.append(args[-1])
            return core.moments_update(*args)

    monkeypatch.setattr(sys.modules["lineas.arrays.moments"], "_core", Spy())
    monkeypatch.setattr(_threads, "_threads", 5)
    with dask.config.set(scheduler="threads"):
        lineas.moments(chunked)
    assert seen == [1] * 24 and lineas.get_num_threads() == 5
    lineas.moments(np.ones((4, 2)))
    assert seen[24:] == [5]


def test_tasks_leave_the_states_of_others_alone(chunked, x):
    """A task may be run again, and a state be wanted by two."""
    from lineas.arrays.dask_arrays import _merged, _state_of

    empty = new_quantiles()
    states = [_state_of(x[k : k + 400], empty, (400, 37), "x") for k in range(0, 1600, 400)]
    before = [bits(state) for state in states]
    assert bits(_merged(states)) == bits(_merged(states))
    assert [bits(state) for state in states] == before and empty.count == 0


@pytest.mark.parametrize("new", [lineas.Moments, new_quantiles])
def test_states_come_out_of_read_only_buffers(new, x):
    """As distributed hands them over."""
    state, buffers = new().update(x), []
    frames = pickle.dumps(state, protocol=5, buffer_callback=buffers.append)
    found = pickle.loads(frames, buffers=[bytes(buffer.raw()) for buffer in buffers])
    assert buffers and bits(found) == bits(state)
    assert bits(found.update(x[:100])) == bits(state.update(x[:100]))


def test_sizes_that_dask_plans_with(x):
    from dask.sizeof import sizeof

    state = lineas.quantiles(x)
    assert state.nbytes <= sizeof(state) <= state.nbytes + 1000


def test_reading_shared_data_once(x):
    reads = []

    def read():
        reads.append(1)
        return x

    both = da.from_delayed(dask.delayed(read)(), shape=x.shape, dtype=x.dtype)
    with dask.config.set(scheduler="synchronous"):
        lineas.fit(both[:1000], both[1000:], memory=2**16)
    assert len(reads) == 1


def test_arrays_that_dask_plans_as_queries():
    code = """
import dask
dask.config.set({"array.query-planning": True})
import dask.array as da, lineas
lineas.moments(da.ones((4, 2)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "TypeError: data must have blocks, got an array of dask's experimental array.query-planning" in run.stderr


def test_dask_is_not_imported_for_others():
    code = """
import sys, numpy as np, lineas
x = np.ones((4, 2)) * np.arange(4)[:, None]
lineas.fit(x, x + 1), lineas.moments(x), lineas.quantiles(iter([x])), lineas.wasserstein(x, x)
print([name for name in ("dask", "h5py", "zarr", "pandas") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
