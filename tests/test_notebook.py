"""docs/quickstart.ipynb runs from top to bottom, with a few steps of training in place of a few minutes."""

import json
import re

import nbformat
from nbclient import NotebookClient
from runs import ROOT

PATH = ROOT / "docs/quickstart.ipynb"


# Before the first step and behind the last one 100 of 2,000 scenes are evaluated; those that are trained on stay as they are.
FEW = "import scenes; scenes.Shapes.__len__ = lambda self: len(self.indices) if len(self.indices) > 2000 else 100"


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def test_it_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(PATH, as_version=4)
    parameters = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1 and re.findall(r"^(\w+) = ", parameters[0].source, re.M) == ["EPOCHS", "MAX_STEPS", "OUTPUT"]
    parameters[0].source = f"EPOCHS, MAX_STEPS, OUTPUT = 1, 12, {str(tmp_path)!r}\n{FEW}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    training = next(cell for cell in code if "slip.train(" in cell.source)
    losses = [float(loss) for loss in re.findall(r"^step \d+/12 loss (\S+)", text_of(training), re.M)]
    assert len(losses) >= 2 and losses[-1] < losses[0]
    zeroshot = next(cell for cell in code if "zero-shot accuracy on" in cell.source)
    assert float(re.search(r"scenes: (\S+)%", text_of(zeroshot))[1]) > 1.5  # chance is 1
    pictures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 6  # data, views, curve, zero-shot, own sentences, neighbours


def test_outputs_are_small_and_of_one_run():
    """What is committed was run in order, and says nothing of the machine that it ran on."""
    text = PATH.read_text()
    assert len(text) < 1_000_000
    notebook = nbformat.read(PATH, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not re.search(r"/(?:home|root|Users|tmp)/", json.dumps([cell.outputs for cell in code]))
