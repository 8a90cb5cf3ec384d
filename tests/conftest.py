"""Fixtures of all tests. torch is not imported here: the array tests run without it."""

import gc
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# Same examples in every run, and no clock: the machines are shared.
settings.register_profile("lineas", derandomize=True, deadline=None, database=None, max_examples=40)
settings.load_profile("lineas")


@pytest.fixture
def rng():
    return np.random.default_rng(20250310)


@pytest.fixture(scope="session")
def golden():
    """Load a file of golden vectors by its name without the ending."""
    folder = Path(__file__).parent / "golden"

    def load(name):
        with np.load(folder / f"{name}.npz") as file:
            return dict(file)

    return load


def pytest_configure(config):
    config.addinivalue_line("markers", "xdist_group: tests of one group run in one process, one after the other")
    # torch writes every step of every graph to its trace, which pytest would format and keep: many times as slow.
    logging.getLogger("torch.__trace").propagate = False


def pytest_collection_modifyitems(items):
    """A file is run by one process, but for the notebooks: these take minutes each, and so come first.

    The files of fits on several processes share what two of these have found.
    """
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")
    for item in items:
        alone = item.path.name == "test_notebooks.py"
        together = "test_distributed" if item.path.name.startswith("test_distributed") else item.path.name
        item.add_marker(pytest.mark.xdist_group(item.name if alone else together))


def pytest_collection_finish():
    """Leave what is imported by now out of every garbage collection to come: a tenth of all time would go there."""
    gc.collect()
    gc.freeze()
