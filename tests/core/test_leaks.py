"""Nothing is left behind: memory exactly, by tracemalloc, and the size of the process over many calls."""

import gc
import resource
import sys
import tracemalloc

import numpy as np
import pytest
from bad_calls import TYPE_ERRORS, VALUE_ERRORS
from calls import NAMES, arrays_in, sound

from lineas import _core

ERRORS = [(name, changes) for name, changes, _ in TYPE_ERRORS + VALUE_ERRORS]


@pytest.fixture(scope="module", autouse=True)
def what_is_there_already_is_not_searched():
    """Where torch is loaded, half a second for every full collection, of which these tests make hundreds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def caller(name, changes):
    """A function that makes one call, sound or refused, on the same arguments each time; and those arguments."""
    function, arguments = getattr(_core, name), tuple((sound(name) | changes).values())

    def once():
        try:
            function(*arguments)
        except (TypeError, ValueError):
            pass

    return once, arguments


def references(value):
    """Counts of references to all arrays of the arguments and to the lists that hold them."""
    return [sys.getrefcount(x) for x in arrays_in(value)] + [sys.getrefcount(x) for x in value if isinstance(x, list)]


def memory_after(once, calls):
    for _ in range(calls):
        once()
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize(
    ("name", "changes"), [*((name, {}) for name in NAMES), *ERRORS], ids=[*NAMES, *(name for name, _ in ERRORS)]
)
def test_references_and_memory(name, changes):
    """One byte lost in each call would be a hundred.

    What Python and NumPy keep for reuse does not grow, and a thread of another library that wakes up adds less.
    """
    once, arguments = caller(name, changes)
    once()
    counts, used = references(arguments), np.zeros(4, int)  # not a list, whose numbers would count as memory
    gc.collect()
    tracemalloc.start()
    try:
        for k in range(len(used)):
            used[k] = memory_after(once, 100)
    finally:
        tracemalloc.stop()
    assert references(arguments) == counts
    assert np.diff(used).min() < 100, used


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", NAMES)
def test_the_process_does_not_grow(name):
    """100 000 calls, a tenth of them refused: eight bytes lost in each would be 800 kB."""
    once, _ = caller(name, {})
    refused = [caller(name, changes)[0] for other, changes in ERRORS if other == name]

    def many(calls):
        for k in range(calls // 10):
            for _ in range(9):
                once()
            refused[k % len(refused)]()
        gc.collect()
        return resident()

    many(10_000)
    used = [many(25_000) for _ in range(5)]
    assert used[4] - used[0] < 400_000, used
