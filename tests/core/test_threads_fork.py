"""Same bits for any number of threads and any kernel variant; safe under Python threads and after a fork."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from calls import SAME_PATH
from samples import all_kernels, assert_same_bits, digest, fingerprint, special_values

import lineas
from lineas import _core, _threads


@pytest.fixture(autouse=True)
def keep_the_setting(monkeypatch):
    monkeypatch.setattr(_threads, "_threads", None)


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_the_number_of_threads_changes_no_bit(threads):
    for ours, one in zip(all_kernels(threads, scale=6), all_kernels(1, scale=6), strict=True):
        assert_same_bits(ours, one)


@pytest.mark.parametrize("threads", [2, 5])
def test_large_batches_change_no_bit(rng, threads):
    """Enough work for threads to be worth starting."""
    us, vs = ([rng.normal(size=(n, 700)).astype(np.float32) for n in (256, 300, 64)] for _ in range(2))
    names = ["0", "1", "2"]
    one, many = (
        [
            _core.sort_columns(us, names, count),
            *_core.wasserstein(us, vs, None, None, None, None, False, 2, names, names, count)[:2],
            *_core.fit_local(us, vs, None, None, "linear", names, names, count),
        ]
        for count in (1, threads)
    )
    for part, other in zip(one, many, strict=True):
        for a, b in zip(part, other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("variant", ["portable", ""])
def test_every_kernel_variant_gives_the_same_bits(variant):
    """Empty means the best one for this processor; `portable` is what every other must agree with."""
    code = (
        "from samples import digest, fingerprint, special_values; from lineas import _core;"
        "print(_core.cpu(), digest(1), digest(1, 7, 3), fingerprint(special_values(1)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | SAME_PATH | {"LINEAS_CPU": variant},
        capture_output=True,
        text=True,
        check=True,
    )
    name, *digests = run.stdout.split()
    assert name == "portable" if variant else name in ("portable", "avx2", "avx512")
    assert digests == [digest(1), digest(1, 7, 3), fingerprint(special_values(1))]


def test_an_unknown_kernel_variant_is_an_error():
    run = subprocess.run(
        [sys.executable, "-c", "import lineas"],
        env=os.environ | SAME_PATH | {"LINEAS_CPU": "abacus"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "LINEAS_CPU" in run.stderr and "abacus" in run.stderr


def test_many_python_threads_at_once():
    expected = digest(2)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(digest, [2] * 16)) == [expected] * 16


def _in_the_child(expected):
    if digest(2) != expected:
        raise AssertionError("other bits after the fork")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_use_fork_and_use_again():
    expected = digest(2)
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_in_the_child, args=(expected,)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert digest(2) == expected


def test_the_default_is_the_affinity_mask(monkeypatch):
    monkeypatch.delenv("LINEAS_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 8}, raising=False)
    assert lineas.get_num_threads() == 3


def test_without_affinity_the_default_is_the_machine(monkeypatch):
    monkeypatch.delenv("LINEAS_NUM_THREADS", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert lineas.get_num_threads() == 6


def test_the_environment_sets_the_number(monkeypatch):
    monkeypatch.setenv("LINEAS_NUM_THREADS", " 7 ")
    assert lineas.get_num_threads() == 7
    lineas.set_num_threads(np.int64(2))
    assert lineas.get_num_threads() == 2


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_a_bad_environment(monkeypatch, text):
    monkeypatch.setenv("LINEAS_NUM_THREADS", text)
    message = rf"the environment variable LINEAS_NUM_THREADS must be a whole number >= 1, got '{text}'"
    with pytest.raises(ValueError, match=message):
        lineas.wasserstein(np.ones((2, 2)), np.ones((2, 2)))


def test_bad_numbers_of_threads():
    with pytest.raises(TypeError, match=r"n must be an int, got float"):
        lineas.set_num_threads(2.0)
    with pytest.raises(ValueError, match=r"n must be at least 1, got 0"):
        lineas.set_num_threads(0)
