"""Every request of the extension for memory or for a thread fails in turn, in a child process (see faults.c)."""

import ctypes
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from bad_calls import TYPE_ERRORS, VALUE_ERRORS
from calls import NAMES, SAME_PATH, bits, sound

from lineas import _core

HERE = Path(__file__).parent
MEMORY, THREADS = 0, 1  # the kinds of faults.c
ALL = 1 << 40

# The arrays exceed the blocks that NumPy keeps for itself, so that each of them asks for memory.
D = 256

# What makes a sound call take other ways, with outputs and copies of its own.
WAYS = [
    *(("fit_local", {"method": method}) for method in ("mean", "gaussian")),
    *(("pool", {"mode": mode}) for mode in ("max", "last", "all")),
    ("pool_backward", {"mode": "max", "index": np.zeros((2, D), np.int32)}),
    ("moments_update", {"count": 1 << 40}),  # the number returned needs memory too
    ("moments_merge", {"count": 1 << 40}),
    ("wasserstein", {"gradient": 1}),
    ("wasserstein", {"weight": None, "bias": None, "u_mass": [np.ones(4)], "v_mass": [np.ones(5)]}),
    ("covariance", {"mass": np.ones(4)}),
    ("step", {"adam": (*np.zeros((4, 2 + D)), 1, 0.9, 0.99, 1e-8)}),
]


def cases():
    """(label, function, a maker of fresh arguments): sound calls in all ways, and all calls that are refused."""
    for name in NAMES:
        yield name, name, lambda name=name: tuple(sound(name, D).values())
    for number, (name, changes) in enumerate(WAYS):
        make = lambda name=name, changes=changes: tuple((sound(name, D) | deepcopy(changes)).values())  # noqa: E731
        yield f"way {number} {name}", name, make
    for number, (name, changes, _) in enumerate(TYPE_ERRORS + VALUE_ERRORS):
        yield f"error {number} {name}", name, lambda name=name, new=changes: tuple((sound(name) | new).values())


def many_threads():
    """(name, arguments) of calls that are worth several threads."""
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(2, 512, 4096)).astype(np.float32)
    yield "sort_columns", ([u], ["u"], 4)
    yield "wasserstein", ([u], [v], None, None, None, None, False, 2, ["u"], ["v"], 4)
    yield "fit_local", ([u], [v], None, None, "linear", ["u"], ["v"], 4)


class Shim:
    """faults.c, by ctypes."""

    def __init__(self):
        self.library = ctypes.PyDLL(None)
        self.library.faults_call.restype = ctypes.py_object
        self.library.faults_call.argtypes = [ctypes.py_object] * 2 + [ctypes.c_int] + [ctypes.c_long] * 2
        for name in ("faults_failed", "faults_blocks"):
            getattr(self.library, name).restype = ctypes.c_long

    def call(self, function, arguments, kind, first, count):
        """(result or exception, how many requests failed)."""
        # Free lists would answer in the place of the allocator: gc.collect empties Python's, `kept` NumPy's of shapes.
        kept = [np.empty((1,) * ndim) for ndim in (1, 2, 3) for _ in range(10)]
        gc.collect()
        try:
            result = self.library.faults_call(function, arguments, kind, first, count)
        except Exception as error:
            result = error.with_traceback(None)
        del kept
        return result, self.library.faults_failed()

    def blocks(self):
        gc.collect()
        return self.library.faults_blocks()


def sweep(shim, name, make):
    """Fail the first, second, ... request alone, then all from there on; (how often that was, what went wrong)."""
    function, wrong, points = getattr(_core, name), [], 0
    arguments = make()
    expected, _ = shim.call(function, arguments, MEMORY, ALL, 1)
    after = bits(arguments)
    for count in (1, ALL):
        for first in itertools.count(1):
            arguments = make()
            before = bits(arguments)
            result, failed = shim.call(function, arguments, MEMORY, first, count)
            if not failed:
                break
            points += 1
            if isinstance(result, MemoryError):
                # Of what is updated in place nothing is, but for a step whose two numbers find no room afterwards.
                if bits(arguments) != before and not (name == "step" and bits(arguments) == after):
                    wrong.append(f"request {first}, {count}: arguments changed")
            elif isinstance(expected, Exception) and type(result) is type(expected) and not result.args:
                pass  # the refusal found no room for its text, and CPython 3.11.2 then passes it on without
            elif type(result) is not type(expected) or bits(result) != bits(expected):
                wrong.append(f"request {first}, {count}: {result!r:.200}")
    return points, wrong


def thread_sweep(shim, name, arguments):
    """The same for starts of threads: no error, and the bits of a run without."""
    function, wrong, points = getattr(_core, name), [], 0
    expected, _ = shim.call(function, arguments, THREADS, ALL, 1)
    for count in (1, ALL):
        for first in itertools.count(1):
            result, failed = shim.call(function, arguments, THREADS, first, count)
            if not failed:
                break
            points += 1
            if bits(result) != bits(expected):
                wrong.append(f"thread {first}, {count}: {result!r:.200}")
    return points, wrong


def child():
    """Print a line of JSON a case: its label, points of failure, what went wrong, blocks of memory lost a sweep."""
    shim = Shim()
    blocks = np.zeros(3, int)
    gc.freeze()
    for label, name, make in cases():
        points, wrong = sweep(shim, name, make)
        for k in range(len(blocks)):
            sweep(shim, name, make)
            blocks[k] = shim.blocks()
        print(json.dumps([label, points, wrong, int(np.diff(blocks).min())]), flush=True)
    for k in range(len(blocks)):
        LEAK.append(bytearray(1))
        blocks[k] = shim.blocks()
    print(json.dumps(["canary", 0, [], int(np.diff(blocks).min())]), flush=True)
    for name, arguments in many_threads():
        print(json.dumps([f"threads of {name}", *thread_sweep(shim, name, arguments), 0]), flush=True)


LEAK = []
LABELS = [label for label, _, _ in cases()] + [f"threads of {name}" for name, _ in many_threads()]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{label: (points, wrong, lost)}; a case at which the child died has none."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("needs a C compiler and LD_PRELOAD")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("a free-threaded Python takes no memory from malloc for its objects")
    shim = tmp_path_factory.mktemp("faults") / "faults.so"
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, HERE / "faults.c", "-o", shim, "-ldl"], check=True)
    preload = " ".join(filter(None, [str(shim), os.environ.get("LD_PRELOAD")]))
    asan = os.environ.get("ASAN_OPTIONS", "") + ":verify_asan_link_order=0:allocator_may_return_null=1"
    run = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | SAME_PATH | {"LD_PRELOAD": preload, "PYTHONMALLOC": "malloc", "ASAN_OPTIONS": asan},
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {label: rest for label, *rest in lines}, f"exit status {run.returncode}\n{run.stderr[-4000:]}"


@pytest.mark.parametrize("label", LABELS)
def test_a_request_that_fails(outcomes, label):
    """MemoryError or the right bits (for threads always those), nothing half done, nothing lost."""
    found, died = outcomes
    assert label in found, died
    points, wrong, lost = found[label]
    assert wrong == []
    assert lost <= 0
    if not label.startswith("error"):
        assert points > 0 or label == "moments_merge"  # which returns a small, ready-made number
        assert found["canary"][2] > 0  # a leak would have been seen


if __name__ == "__main__":
    child()
