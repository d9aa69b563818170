"""Test that the notebooks in examples/ run, and print the stored output."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """Return each code cell's output on stdout, and its other outputs by type."""
    shown = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                shown += [output.text] if output.name == "stdout" else []
            else:
                # The stored notebook omits the JPEG that Pillow also gives for an RGB image.
                shown.append(" ".join(sorted({*output.data} - {"image/jpeg"})))
    return shown


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "tests" / "photographs", tmp_path / "tests" / "photographs")
    (tmp_path / "examples").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stored = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    expected = printed(stored)
    client = NotebookClient(
        stored, timeout=250, resources={"metadata": {"path": tmp_path / "examples"}}
    )
    assert printed(client.execute()) == expected
