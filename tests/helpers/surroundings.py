"""The table of docs/compatibility.md about surroundings: every row is a test, which the decorator `row` makes of it.

``python tests/helpers/surroundings.py --write`` writes the table into the page; a test compares them.
"""

import functools
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- python tests/helpers/surroundings.py --write -->", "<!-- end -->"
MODULES = ("test_surroundings", "test_surroundings_libraries", "test_surroundings_compile")
ROWS = []


def row(surrounding, verdict, note=""):
    """Make a row of a test: what it runs "works", works but "needs" what the note says, or is "refused".

    A refused one must raise a ValueError whose text holds the note.
    """
    assert verdict in ("works", "needs", "refused")

    def register(test):
        ROWS.append((surrounding, verdict, note))
        if verdict != "refused":
            return test

        @functools.wraps(test)
        def refused(*args, **kwargs):
            with pytest.raises(ValueError, match=re.escape(note)):
                test(*args, **kwargs)

        return refused

    return register


def table():
    """The table, in the order of the tests."""
    ROWS.clear()
    folder = str(ROOT / "tests" / "hooks")
    if folder not in sys.path:
        sys.path.append(folder)
    for name in MODULES:
        # Those that pytest has imported already have their rows in another copy of this list.
        sys.modules.pop(name, None)
        importlib.import_module(name)
    lines = ["| surrounding | | what to know |", "| --- | --- | --- |"]
    for what, verdict, note in ROWS:
        lines.append(f"| {what} | {verdict} | {f'“{note}”' if verdict == 'refused' else note} |")
    return "\n".join(lines)


def page(text):
    """The page with the table of now in it."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}"


if __name__ == "__main__":
    sys.modules["surroundings"] = sys.modules["__main__"]
    text = page(PAGE.read_text())
    if "--write" in sys.argv:
        PAGE.write_text(text)
    else:
        print(table())
