"""docs/quickstart.ipynb runs from top to bottom, with a few steps of training in place of a few minutes."""

import json
import re

import nbformat
from data import open_dataset
from nbclient import NotebookClient
from runs import ROOT

PATH = ROOT / "docs/quickstart.ipynb"


# Before the first step and behind the last one 100 of 2,000 scenes are evaluated; those that are trained on stay as they are.
FEW = "import scenes; scenes.Shapes.__len__ = lambda self: len(self.indices) if len(self.indices) > 2000 else 100"


# What the pool that the notebook looks at holds: printed by a cell behind the last one.
POOL = """import collections
print(json.dumps({"labels": collections.Counter(sample.label for sample in samples),
                  "lacking": [s for s in sentences if not any(s in sample.captions for sample in samples)]}))"""


def printed(code, words):
    """The lines of the cell whose source has these words."""
    return text_of(next(cell for cell in code if words in cell.source))


def shares(text, name):
    """-> {"class": 26.6, ...} of the line "name: class 26.6%, colour 97.8%, form 28.4%"."""
    line = re.search(rf"^{name}: (.*)", text, re.M)[1]
    return {part: float(value) for part, value in re.findall(r"(\w+) ([\d.]+)%", line)}


def check_chances(code):
    """A guess is right by chance as often as there are candidates: classes, colours, forms. Two different scenes of the
    pool agree by chance as often as the others of the pool do, if every class occurs five times in it."""
    classes = open_dataset("shapes", split="val").classes
    kinds = {"class": set(classes), "colour": {c.split()[0] for c in classes}, "form": {c.split()[1] for c in classes}}
    zeroshot = printed(code, "zero-shot accuracy on")
    assert zeroshot.startswith(f"zero-shot accuracy on {5 * len(classes)} held-out scenes of {len(classes)} classes\n")
    assert shares(zeroshot, "chance") == {kind: 100 / len(names) for kind, names in kinds.items()}
    pool = 5 * len(classes)
    others = {kind: 100 * (pool / len(names) - 1) / (pool - 1) for kind, names in kinds.items()}
    found = shares(printed(code, "nearest neighbours have"), "chance")
    assert found == {kind: round(percent, 1) for kind, percent in others.items()}


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def test_it_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(PATH, as_version=4)
    parameters = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1 and re.findall(r"^(\w+) = ", parameters[0].source, re.M) == ["EPOCHS", "MAX_STEPS", "OUTPUT"]
    parameters[0].source = f"EPOCHS, MAX_STEPS, OUTPUT = 1, 12, {str(tmp_path)!r}\n{FEW}"
    notebook.cells.append(nbformat.v4.new_code_cell(POOL))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    *code, pool = [cell for cell in notebook.cells if cell.cell_type == "code"]
    training = next(cell for cell in code if "slip.train(" in cell.source)
    losses = [float(loss) for loss in re.findall(r"^step \d+/12 loss (\S+)", text_of(training), re.M)]
    assert len(losses) >= 2 and losses[-1] < losses[0]
    # Twelve steps teach colours before forms. By chance 10% are right, with a standard deviation of 1.3 on 500 scenes.
    assert shares(printed(code, "zero-shot accuracy on"), "network")["colour"] > 15
    check_chances(code)
    found = json.loads(text_of(pool))
    assert found == {"labels": {str(label): 5 for label in range(100)}, "lacking": []}
    pictures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 6  # data, views, curve, zero-shot, own sentences, neighbours


def test_outputs_are_small_and_of_one_run():
    """What is committed was run in order, and says nothing of the machine that it ran on."""
    text = PATH.read_text()
    assert len(text) < 1_000_000
    notebook = nbformat.read(PATH, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    check_chances(code)
    assert not re.search(r"/(?:home|root|Users|tmp)/", json.dumps([cell.outputs for cell in code]))
