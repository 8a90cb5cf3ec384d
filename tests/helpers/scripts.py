"""Scripts of benchmarks/ as modules, for tests that run them on tiny models."""

import importlib
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load_script(monkeypatch, name, *others):
    """The script, imported anew, with the `others` that it imports; tests may then set what stands in them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for module in (name, *others):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return importlib.import_module(name)
