"""What the command line sets for its process while it runs: SIGTERM ends it by an exception, a warning is one line."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TERMINATED = 128 + signal.SIGTERM
"""The exit code of a process that SIGTERM ended, as shells have it."""


@contextmanager
def own_process() -> Iterator[None]:
    """In the block, SIGTERM raises SystemExit(143), and what is warned of is one line on stderr.

    As after Ctrl-C, what is under way is then undone, such as a file that is written beside its place. The handler is
    set in the main thread only, which alone can, and not where SIGTERM has one already or is ignored. What was before
    is put back at the end.
    """
    main = threading.current_thread() is threading.main_thread()
    own = main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    shown = warnings.showwarning
    warnings.showwarning = _show
    if own:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except SystemExit as error:
        if error.code == TERMINATED:
            print("lineas: terminated", file=sys.stderr)
        raise
    finally:
        warnings.showwarning = shown
        if own:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: Any) -> None:
    raise SystemExit(TERMINATED)


def _show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None) -> None:
    """A warning without the line of Python that it came from, which says nothing to who types commands."""
    print(f"lineas: warning: {' '.join(str(message).split())}", file=sys.stderr if file is None else file)
