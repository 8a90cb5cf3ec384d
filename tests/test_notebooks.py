"""The notebooks run from start to end, and are committed as they ran."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("sklearn")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def figures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_what_was_committed(path, tmp_path):
    committed = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in code_cells(committed)] == [*range(1, len(code_cells(committed)) + 1)]
    # In an empty folder: a notebook must not need files that lie about, nor leave any.
    fresh = nbclient.NotebookClient(
        nbformat.read(path, as_version=4),
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    assert list(tmp_path.iterdir()) == []
    for old, new in zip(code_cells(committed), code_cells(fresh), strict=True):
        assert [output.output_type for output in old.outputs] == [output.output_type for output in new.outputs]
        assert figures(old) == figures(new)
        assert not any(output.get("name") == "stderr" for output in new.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_small_and_names_no_machine(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    for word in ("/root/", "/home/", "/tmp/", "site-packages", "Traceback"):
        assert word not in text
