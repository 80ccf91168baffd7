"""Notebooks of the documentation: what is stored in them, and, slow, that they still run."""

import os
import re
from pathlib import Path

import pytest

from invirtuo.cells.datasets import describe

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed; it comes with the extra notebooks")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {  # to the data set that it needs
    "01-new-cell-type": "kang",
    "02-crispr-screen": "papalexi",
    "03-generate-an-atlas": "kang",
    "04-time-course": "hematopoiesis",
}
BUDGET = "0.01"
LARGEST = 1_500_000  # bytes of a file
ABSOLUTE = re.compile(r"(?<![\w.:/<])/(?:home|root|tmp|usr|var|opt|work|mnt|data|Users|private)/|\b[A-Z]:\\")


def read(name):
    return nbformat.read(ROOT / "docs" / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(output):
    """What an output shows as text."""
    if output.output_type == "stream":
        return [output.text]
    data = output.get("data", {})
    return [text for kind, text in data.items() if not kind.startswith("image/")]


def test_every_notebook_is_tested_and_listed():
    folder = ROOT / "docs" / "notebooks"
    assert {path.stem for path in folder.glob("*.ipynb")} == set(NOTEBOOKS)
    index = (folder / "index.md").read_text(encoding="utf-8")
    assert all(f"({name}.ipynb)" in index and f"\n{name}\n" in index for name in NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_outputs_are_clean(name):
    path = ROOT / "docs" / "notebooks" / f"{name}.ipynb"
    assert path.stat().st_size < LARGEST
    for cell in code_cells(read(name)):
        for output in cell.outputs:
            assert output.output_type != "error", f"a traceback after: {cell.source}"
            assert output.get("name") != "stderr", f"{output.text!r} after: {cell.source}"
            for text in texts(output):
                assert not ABSOLUTE.search(text), f"an absolute path in {text!r}"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_were_executed_in_order(name):
    counts = [cell.execution_count for cell in code_cells(read(name))]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_settings_come_first(name):
    first = code_cells(read(name))[0].source
    assert 'os.environ.get("INVIRTUO_NOTEBOOK_BUDGET", "1.0")' in first


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the Jupyter packages, about each other
def test_notebook_runs(name, tmp_path, monkeypatch):
    """A run of seconds, in a folder of its own; nothing is downloaded, as all data are bundled or put there by hand."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed; it comes with the extra notebooks")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed; it comes with the extra notebooks")
    if not describe().loc[NOTEBOOKS[name], "here"]:
        pytest.skip(
            f"the file of {NOTEBOOKS[name]} is not there; INVIRTUO_DATA names the folder in which it is looked for"
        )
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("INVIRTUO_NOTEBOOK_BUDGET", BUDGET)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    if "INVIRTUO_DATA" in os.environ:
        monkeypatch.setenv("INVIRTUO_DATA", str(Path(os.environ["INVIRTUO_DATA"]).resolve()))
    notebook = read(name)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert all(cell.execution_count for cell in code_cells(client.nb))
