"""The extension is loaded into the main interpreter of a process, and once."""

import importlib
import importlib.util
import os
import subprocess
import sys

import pytest
from calls import SAME_PATH
from samples import digest

import lineas
from lineas import _core

LOADING = {
    "the package": "import lineas",
    "the extension alone": f"""
import importlib.util
spec = importlib.util.spec_from_file_location("lineas._core", {_core.__file__!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
""",
}


def run(code):
    """What a child process prints that runs the code, with the paths of this one."""
    child = subprocess.run([sys.executable, "-c", code], env=os.environ | SAME_PATH, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


@pytest.mark.parametrize("settings", ["legacy", "isolated"])
@pytest.mark.parametrize("what", LOADING)
def test_a_sub_interpreter_is_refused(what, settings):
    """With an ImportError; the main interpreter goes on."""
    names = [name for name in ("_interpreters", "_xxsubinterpreters") if importlib.util.find_spec(name)]
    if not names:
        pytest.skip("no sub-interpreters in this Python")
    if sys.version_info < (3, 13):
        create = f"create(isolated={settings == 'isolated'})"
    else:
        create = f"create({settings!r})"
    # The text on one line: NumPy's own has many.
    say = "print('refused:', repr(error), flush=True)"
    inner = f"try:\n    exec({LOADING[what]!r})\nexcept ImportError as error:\n    {say}"
    first, last = run(
        f"import {names[0]} as interpreters; from samples import digest; before = digest(1)\n"
        f"interpreters.run_string(interpreters.{create}, {inner!r})\n"
        "print(digest(1) == before)"
    )
    assert first.startswith("refused: ") and last == "True"
    if what == "the extension alone":  # before that, NumPy itself refuses
        assert "sub-interpreter" in first or "subinterpreter" in first


def test_importing_anew(monkeypatch):
    """A second module of the same process shares the engine, whatever the environment says by then."""
    before, variant = digest(1), _core.cpu()
    monkeypatch.setenv("LINEAS_CPU", "abacus")
    spec = importlib.util.spec_from_file_location("lineas._core", _core.__file__)
    for _ in range(3):
        anew = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(anew)
        assert anew is not _core and anew.cpu() == variant
        assert [name for name in dir(anew) if not name.startswith("_")] == [
            name for name in dir(_core) if not name.startswith("_")
        ]
    del anew
    assert digest(1) == before


def test_the_package_can_be_imported_after_it_was_forgotten():
    code = """
import sys, lineas
first = lineas.wasserstein([[0.0], [2.0]], [[3.0], [1.0]])
for name in [name for name in sys.modules if name.split(".")[0] == "lineas"]:
    del sys.modules[name]
import lineas as again
print(again is not lineas, again.wasserstein([[0.0], [2.0]], [[3.0], [1.0]]) == first)
"""
    assert run(code) == ["True [ True]"]


def test_the_module_keeps_no_state():
    """What it is was fixed when it was built: nothing to clean up, and nothing that calls leave behind."""
    before = dict(vars(_core))
    digest(2)
    lineas.wasserstein([[0.0]], [[1.0]])
    assert vars(_core) == before
