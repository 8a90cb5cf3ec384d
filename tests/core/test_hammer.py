"""Many Python threads at once on the same arrays, also while somebody writes into them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from bad_calls import WRITTEN
from calls import NAMES, arrays_in, bits, sound
from samples import DTYPES, empty_summary, encode, summarise

from lineas import _core

THREADS = 8


def random_calls(rng, threads):
    """(name, arguments) of calls on random arrays: every function, in all ways, dtypes and kinds of sort."""
    for n, m, d in ((32, 32, 40), (7, 9, 33), (300, 270, 20)):
        for dtype in DTYPES:
            u, v = (encode(rng.normal(size=(rows, d)), dtype) for rows in (n, m))
            work = np.float64 if dtype == "float64" else np.float32
            weight, bias = rng.normal(size=(2, d)).astype(work)
            p, q = [rng.uniform(size=n)], [rng.uniform(size=m)]
            yield "sort_columns", ([u, v], ["u", "v"], threads)
            for masses in ((None, None), (p, q)):
                yield "wasserstein", ([u], [v], [weight], [bias], *masses, False, 2, ["u"], ["v"], threads)
                yield "fit_local", ([u], [v], *masses, "linear", ["u"], ["v"], threads)
            yield "fit_local", ([u], [v], None, None, "gaussian", ["u"], ["v"], threads)
            yield "quantile_moments", ([u], [v], None, None, ["u"], ["v"], threads)
            five = np.abs(rng.normal(size=(5, d)))
            yield "largest_penalty", ([five], 0.5)
            yield "sparse_path", ([five], None, np.array([1.0, 0.1]), 0.5, False, 1.0, threads)
            yield "covariance", (u, None, "u")
            z = encode(rng.normal(size=(n, d, 3)), dtype)
            yield "affine_apply", (z, weight, bias, 0.7, threads)
            yield "affine_backward", (z, weight, 0.7, z, True, threads)
            x = encode(rng.normal(size=(4, n, d)), dtype)
            mask = (rng.uniform(size=(4, n)) < 0.6).astype(np.uint8)
            mask[:, 0] = 1
            for mode in ("mean", "max", "last", "all"):
                yield "pool", (x, mask, mode, threads)
            grad, index = rng.normal(size=(4, d)).astype(work), rng.integers(n, size=(4, d), dtype=np.int32)
            for mode in ("mean", "min", "last"):
                yield "pool_backward", (grad, mask, mode, index, n, threads)
            yield "pool_backward", (rng.normal(size=(int(mask.sum()), d)), mask, "all", None, n, threads)
            state = [np.zeros(d), np.zeros(d), np.full(d, np.inf), np.full(d, -np.inf)]
            yield "moments_update", (u, 0, *state, "u", threads)
            yield "moments_merge", (3, *rng.normal(size=(4, d)), 5, *rng.normal(size=(4, d)))
            yield "quantiles_update", (u, *empty_summary(d, 8, work), "u", threads)
            summary = summarise(u, 8, 1)
            yield "quantiles_merge", (*summary, *[x.copy() if np.ndim(x) else x for x in summary], threads)
            yield "quantiles_rows", (*summary, threads)
            yield "quantiles_read", (*summary, np.array([1, n // 2, n]), 1, threads)
            yield "quantiles_read", (*summary, None, 5, threads)
    for dtype in (np.float32, np.float64):
        w, b, *grads = rng.normal(size=(4, 100)).astype(dtype)
        adam = (*rng.uniform(size=(4, 100)).astype(dtype), 3, 0.9, 0.99, 1e-8)
        yield "prox_sparse_group", (w, 0.1, 0.5, 0.3)
        for moments in (None, adam):
            yield "step", (w, b, *grads, np.array([0, 30, 31, 100]), 0.1, 0.5, 0.1, 0.3, 0.2, moments, threads)
    root = rng.normal(size=(40, 30))
    yield "bures_map", (root.T @ root, np.eye(30), 0.1)


def run(name, arguments):
    """Bits of the result, and of what is updated in place: that in copies, all the rest shared."""
    names = list(sound(name))
    own = [
        tuple(np.copy(x) if np.ndim(x) else x for x in value) if key == "adam" and value is not None
        else np.copy(value) if key in WRITTEN.get(name, ()) else value
        for key, value in zip(names, arguments, strict=True)
    ]  # fmt: skip
    return bits([getattr(_core, name)(*own), own])


@pytest.mark.parametrize("threads", [1, 2])
def test_shared_inputs(rng, threads):
    """Eight threads, each in an order of its own, find what one finds."""
    calls = list(random_calls(rng, threads))
    assert {name for name, _ in calls} == set(NAMES)
    expected = [run(*call) for call in calls]
    start = threading.Barrier(THREADS)

    def work(number):
        start.wait()
        return [k for k in np.random.default_rng(number).permutation(len(calls)) if run(*calls[k]) != expected[k]]

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(THREADS))) == [[]] * THREADS


def test_arrays_that_change_during_a_call(rng):
    """What comes out is arbitrary, but it comes out: a result or an error about values, and no other memory is touched.

    The writer puts any bits into any array, indices and offsets included.
    """
    calls = list(random_calls(rng, 2))
    memory = [x.reshape(-1).view(np.uint8) for x in arrays_in([arguments for _, arguments in calls])]
    outputs = [np.full(1 << 12, 7.0) for _ in range(64)]  # heap neighbours of what the calls allocate
    done = threading.Event()

    def write():
        own, rounds = np.random.default_rng(1), 0
        while not done.is_set():
            for x in memory:
                at = own.integers(len(x))
                x[at : at + 8] = own.integers(256, size=len(x[at : at + 8]))
            rounds += 1
        return rounds

    def read(number):
        seen = 0
        for k in np.random.default_rng(number).permutation(len(calls) * 4) % len(calls):
            name, arguments = calls[k]
            try:
                getattr(_core, name)(*arguments)
            except ValueError:
                pass
            seen += 1
        return seen

    with ThreadPoolExecutor(THREADS + 1) as pool:
        writer = pool.submit(write)
        try:
            assert list(pool.map(read, range(THREADS))) == [4 * len(calls)] * THREADS
        finally:
            done.set()
        assert writer.result() > 0
    assert all((x == 7).all() for x in outputs)
