"""The number of threads the engine may use: one setting a process, read by every call."""

import contextlib
import os
import threading
from collections.abc import Iterator

from ._checks import as_int

_threads: int | None = None
_here = threading.local()  # .alone: whether this thread is in `one_thread`


def _default() -> int:
    text = os.environ.get("LINEAS_NUM_THREADS", "").strip()
    if not text:
        # The affinity mask, not the machine: containers and schedulers hand out part of it.
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        return as_int(int(text), "LINEAS_NUM_THREADS", low=1)
    except ValueError:
        message = f"the environment variable LINEAS_NUM_THREADS must be a whole number >= 1, got {text!r}"
        raise ValueError(message) from None


def get_num_threads() -> int:
    """Return how many threads a call of the engine may use.

    Returns
    -------
    int
        What `set_num_threads` set; before that the environment variable ``LINEAS_NUM_THREADS``; without it the
        number of CPUs in the affinity mask of the process, as found at the first call.

    Raises
    ------
    ValueError
        If ``LINEAS_NUM_THREADS`` is needed and is not a whole number >= 1.
    """
    global _threads
    if getattr(_here, "alone", False):
        return 1
    if _threads is None:
        _threads = _default()
    return _threads


def set_num_threads(n: int) -> None:
    """Set how many threads a call of the engine may use, for the whole process.

    Results do not depend on it, bit for bit. Threads start and end within a call, and small calls use one whatever
    the setting, so there is no pool to wait for and nothing to break at a fork.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is smaller than 1.
    """
    global _threads
    _threads = as_int(n, "n", low=1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Calls of the engine use one thread within the block, in this thread of Python alone: others keep the setting.

    For work that somebody else has already spread over the cores.
    """
    before = getattr(_here, "alone", False)
    _here.alone = True
    try:
        yield
    finally:
        _here.alone = before
