"""Methods that point down the import order: seen, described and pickled like any other, with torch and without."""

import inspect
import pickle
import pydoc
import rlcompleter
import subprocess
import sys

import numpy as np
import pytest

import lineas
from lineas import AffineMap, SteeringMaps

LAZY = [
    *("attach", "calibrate", "diagnose", "fold", "fold_gguf", "from_pretrained", "from_vector"),
    *("push_to_hub", "save", "save_pretrained", "to_diffusers_lora", "to_peft_lora"),
]


@pytest.fixture
def maps():
    pytest.importorskip("torch")
    return SteeringMaps({"a": AffineMap(np.array([2.0]), np.array([1.0]))})


@pytest.mark.parametrize("name", LAZY)
def test_a_lazy_method_is_described_where_its_function_is(maps, name):
    function, bound = getattr(SteeringMaps, name), getattr(maps, name)
    assert inspect.isfunction(function) and bound.__doc__ == function.__doc__ and len(function.__doc__) > 100
    parameters = list(inspect.signature(function).parameters)
    static = name.startswith("from_")
    assert list(inspect.signature(bound).parameters) == (parameters if static else parameters[1:])
    first = function.__doc__.splitlines()[0]
    assert first in pydoc.render_doc(function, renderer=pydoc.plaintext)
    assert first in pydoc.render_doc(SteeringMaps, renderer=pydoc.plaintext)
    assert name in dir(maps) and name in dir(SteeringMaps)


def test_one_signature_for_one_thing():
    assert SteeringMaps.from_pretrained is lineas.load
    assert SteeringMaps.save is lineas.SparsePath.save


def test_a_lazy_method_is_completed_and_pickled(maps):
    completer = rlcompleter.Completer({"maps": maps})
    found = [completer.complete("maps.", k) for k in range(40)]
    assert {f"maps.{name}(" for name in LAZY} <= set(found)
    again = pickle.loads(pickle.dumps(maps.attach))
    assert again.__self__ == maps and again.__func__ is SteeringMaps.attach
    assert pickle.loads(pickle.dumps(SteeringMaps.attach)) is SteeringMaps.attach


def test_without_torch_a_call_is_an_error_and_a_look_is_none():
    code = """
import sys
sys.modules["torch"] = None
import inspect, pydoc, rlcompleter
import numpy as np, lineas
maps = lineas.SteeringMaps({"a": lineas.AffineMap(np.array([2.0]), np.array([1.0]))})
assert hasattr(maps, "attach") and "needs torch" in lineas.SteeringMaps.attach.__doc__
assert dict(inspect.getmembers(lineas.SteeringMaps))["fold"] and pydoc.render_doc(lineas.SteeringMaps)
completer = rlcompleter.Completer({"maps": maps})
assert "maps.attach(" in [completer.complete("maps.", k) for k in range(40)]
try:
    maps.attach(None)
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == 'attach needs torch: pip install "lineas[torch]"'
