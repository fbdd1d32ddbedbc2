"""Notebooks run unchanged but for small settings, and are stored without outputs."""

import base64
import os
from pathlib import Path

import nbclient
import nbformat
import pytest
from quick_xla import QUICK_XLA

FOLDER = Path(__file__).parents[1] / "notebooks"
SMALL = {"02_growth.ipynb": ("STEPS = 200", "STEPS = 4")}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebook_is_stored_without_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert cells[0].source.startswith("%pip install --quiet --editable ..\n")  # a copy would be frozen


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_notebook_runs(name, tmp_path):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    settings, small = SMALL[name]
    assert sum(settings in cell.source for cell in notebook.cells) == 1
    for cell in notebook.cells:
        cell.source = cell.source.replace(settings, small)
    notebook.cells = [cell for cell in notebook.cells if "%pip" not in cell.source]
    environment = {**os.environ, "XLA_FLAGS": QUICK_XLA}
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    for family in ("zero", "duplicate", "mask"):
        assert f"'{family}' (exact" in text
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    assert all(len(base64.b64decode(picture)) > 10_000 for picture in pictures)
