import doctest
import importlib
import importlib.metadata
import inspect
import subprocess
import sys

import pytest

import lineas

HEAVY = ("torch", "transformers", "matplotlib", "scipy", "sklearn", "tqdm", "pandas")


def test_importing_and_using_arrays_does_not_import_torch():
    code = f"""
import sys, numpy as np, lineas, lineas.arrays.reference
u = np.random.default_rng(0).normal(size=(4, 3))
maps = lineas.fit({{"a": u}}, {{"a": u + 1}})
maps.transform({{"a": u}}); maps.summary(); lineas.moments(u); lineas.wasserstein(u, u)
print([name for name in {HEAVY} if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_public_surface_is_there():
    for name in lineas.__all__:
        assert getattr(lineas, name).__doc__, name
    assert list(lineas.__all__) == sorted(lineas.__all__)
    assert lineas.__version__ == importlib.metadata.version("lineas")


def test_every_public_method_has_a_docstring():
    arrays = (lineas.Moments, lineas.Quantiles, lineas.GaussianMap)
    for cls in (lineas.AffineMap, lineas.SteeringMaps, lineas.SparsePath, *arrays):
        for name, member in inspect.getmembers(cls):
            if not name.startswith("_") and (callable(member) or isinstance(member, property)):
                assert member.__doc__, f"{cls.__name__}.{name}"


def test_every_kernel_has_a_twin():
    from lineas import _core
    from lineas.arrays import reference

    kernels = {name for name in dir(_core) if not name.startswith("_")} - {"cpu", "blas"}
    assert kernels and all(callable(getattr(reference, name, None)) for name in kernels)


@pytest.mark.parametrize(
    "module",
    [
        "arrays.activations",
        "arrays.baselines",
        "arrays.closed_form",
        "arrays.moments",
        "arrays.quantiles",
        "arrays.sparse_path",
        "arrays.wasserstein",
        "maps.affine",
        "maps.steering",
        "maps.vectors",
    ],
)
def test_the_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"lineas.{module}"))
    assert result.attempted > 0 and result.failed == 0
