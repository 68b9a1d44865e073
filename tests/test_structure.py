"""What the layout promises: honest copies, imports one way, few lines to read, pasteable pieces, the same banners, imports
without side effects."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torchvision

import copies
from copies import ROOT, compare, definition, method_files
from runs import METHODS

BANNER = re.compile(r"^# -{20,} (.*) -{20,}$", re.M)
SECTIONS = ["arguments", "augmentation", "backbone", "model", "loss", "training"]


def test_method_files_are_known():
    assert {*METHODS, "simclrv2"} == {p.stem for p in method_files()}


# ------------------------------------------------ copies ------------------------------------------------
def test_copies_equal_their_originals():
    assert not copies.problems()
    counts = {path.name: compare(path)[0] for path in method_files(experiments=True)}
    assert counts["slip.py"] >= 5 and counts["slip_ablations.py"] >= 10 and sum(counts.values()) >= 20


@pytest.mark.parametrize("file, old, new", [
    ("slip.py", "torch.sigmoid(1.702 * x)", "torch.sigmoid(1.7 * x)"),  # a copy differs
    ("slip.py", "# Copied from clip.py: init_text", "# Copied from clip.py: no_such_thing"),
    ("byol.py", "# Adapted from simclr.py: SimCLRView", "# Adapted from simclr.py: NoSuchView"),
    ("byol.py", "# Adapted from simclr.py: SimCLRView", "# Adapted from nothere.py: SimCLRView"),
    ("byol.py", "# Adapted from simclr.py: SimCLRView", "# Adapted from SimCLR"),
    ("data.py", "class Loader:", "# Copied from clip.py: LanguageView\nclass Loader:"),  # not a method file
    ("clip.py", "    def crop(self", "    # Copied from slip.py: crop\n    def crop(self"),
])  # fmt: skip
def test_a_wrong_mark_is_noticed(tmp_path, monkeypatch, file, old, new):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(copies, "ROOT", tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text and not copies.problems()
    (tmp_path / file).write_text(text.replace(old, new, 1))
    assert [line for line in copies.problems() if line.startswith(file)]


def test_a_changed_copy_is_mended(tmp_path, monkeypatch):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(copies, "ROOT", tmp_path)
    changed = (tmp_path / "slip.py").read_text().replace("torch.sigmoid(1.702 * x)", "torch.sigmoid(1.7 * x)")
    (tmp_path / "slip.py").write_text(changed)
    assert compare(tmp_path / "slip.py")[1]
    compare(tmp_path / "slip.py", fix=True)
    assert (tmp_path / "slip.py").read_text() == (ROOT / "slip.py").read_text()


# ------------------------------------------------ layout ------------------------------------------------
METHOD_NAMES = [path.stem for path in method_files()]
EXPERIMENTS = ["slip_ablations"]  # of the papers, in files of the same form
LONGEST = 100  # characters of a line, of code, comment or docstring, in every file outside tests/
DENSEST = 11.5  # nodes of the syntax tree in a code line of a method file, on average
LOADED = 2400  # lines that `import slip` loads, all together


def imported(path):
    """Names of this project's modules that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(modules())


def modules():
    """{name: file} of the project, without tests and benchmarks."""
    files = [*ROOT.glob("*.py"), *(ROOT / "evaluation").glob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def test_line_caps():
    lines = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert lines["common"] <= 220
    most = {"align": 733, "declip": 733, "dino": 704, "dinov2": 773, "ibot": 708}  # their flags are more than fit without making other lines dense
    assert {name: lines[name] for name in METHOD_NAMES if lines[name] > most.get(name, 700)} == {}


def test_no_line_is_long():
    files = [path for folder in (".", "evaluation", "benchmarks", "book") for path in (ROOT / folder).glob("*.py")]
    assert {"common.py", "slip.py", "probes.py", "table.py", "hooks.py"} <= {path.name for path in files}
    lines = [(path.name, i, line) for path in files for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)]
    assert not [f"{name}:{i}: {len(line)}" for name, i, line in lines if len(line) > LONGEST]


def density(text):
    """Nodes of the syntax tree per line of code, which is neither blank nor a comment nor part of a docstring."""
    tree, documented = ast.parse(text), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    code = [line for i, line in lines if i not in documented and line.strip() and not line.strip().startswith("#")]
    return len(list(ast.walk(tree))) / len(code)


def test_method_files_have_air():
    found = {name: density(modules()[name].read_text()) for name in [*METHOD_NAMES, *EXPERIMENTS]}
    print({name: round(nodes, 2) for name, nodes in found.items()})
    assert {name: nodes for name, nodes in found.items() if nodes > DENSEST} == {}


def test_lines_that_import_slip_loads():
    """Whoever wants to know all that decides a number of SLIP has this much to read."""
    code = ("import sys; before = set(sys.modules); import slip; "
            "print(*(m.__file__ for n, m in sys.modules.items() if n not in before and getattr(m, '__file__', None)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = [path for path in modules().values() if str(path) in done.stdout.split()]
    lines = {path.name: len(path.read_text().splitlines()) for path in ours}
    print(f"`import slip` loads {sum(lines.values())} lines: {lines}")
    assert set(lines) == {"slip.py", "common.py", "data.py", "sources.py", "run.py", "monitor.py"}
    assert sum(lines.values()) <= LOADED


def by_name(path):
    """Names of this project's modules that a file imports by importlib.import_module("NAME") while it runs."""
    return set(re.findall(r'import_module\("([\w.]+)"\)', path.read_text())) & set(modules())


def test_modules_that_are_imported_by_name():
    """run.py opens init.py for --init alone, which reads checkpoints with run.py: the one circle."""
    found = {name: by_name(path) for name, path in modules().items() if by_name(path)}
    assert found.pop("run") == {"init", "pictures"}
    assert set(found) == {"evaluation.exports", "evaluation.weights"}
    assert set().union(*found.values()) <= {*METHOD_NAMES}


def test_imports_run_one_way():
    """No circle, inside functions neither, but for what is imported by name."""
    edges = {name: imported(path) for name, path in modules().items()}
    assert edges["slip"] == {"common", "data", "monitor", "run"}  # the parser sees something
    assert "scenes" in edges["sources"]
    done = set()
    while ready := [name for name, needs in edges.items() if name not in done and needs - {name} <= done]:
        done |= set(ready)
    assert done == set(edges), {name: needs - done for name, needs in edges.items() if name not in done}
    assert edges["common"] == {"trouble"} and edges["run"] == {"common"}
    assert edges["scenes"] == edges["trouble"] == set() and edges["pictures"] == {"common"}
    assert edges["sources"] == {"common", "layouts", "scenes"} and edges["layouts"] == {"common"}
    assert edges["data"] == {"common", "sources", "trouble"}
    assert edges["monitor"] <= {"common", "data", "run"} and edges["synonyms"] == {"common"}
    assert edges["knn"] <= {"common", "data", "monitor"}
    for name in [*METHOD_NAMES, *EXPERIMENTS]:
        more = {"declip": {"synonyms"}, "align": {"layouts"}}.get(name, set())
        assert edges[name] <= {"common", "data", "knn", "monitor", "run"} | more, name
    users = [*modules().values(), *(ROOT / "benchmarks").glob("*.py")]
    assert not [path.name for path in users if "evaluate" in imported(path)]


def test_method_files_say_the_same_thing_with_the_same_line():
    for name in [*METHOD_NAMES, *EXPERIMENTS]:
        text = modules()[name].read_text()
        for line in ("class Args(RunArgs):", "    for step, batch in run.batches():", "        run.end_step(",
                     "        if run.agree_to_stop() or run.due(args.save_every, args.keep_every):", "    return run.finish("):  # fmt: skip
            assert text.count(line) == 1, (name, line)
        saves, evaluates = text.index("            run.save()"), text.index("        if val and run.due(args.eval_every):")
        assert saves < evaluates, name  # which may fail, or take longer than a scheduler waits
        if name != "dinov2":  # it has a rate for each group
            assert text.count('        for group in optimizer.param_groups:\n            group["lr"] = lr\n') == 1, name
        if name not in ("declip", "dinov2"):  # they have more state
            line = '    state = {"model": model, "optimizer": optimizer, "scaler": scaler}\n'
            assert text.count(line) == 1, name
        if name != "simclrv2":  # it starts from trained weights
            line = "    if val and not run.evaluation and run.due(args.eval_every):  # random weights, or one cut off"
            assert text.count(line) == 1, name


def test_experiments_may_be_longer():
    """slip_ablations.py holds four kinds of self-supervision; with 700 lines it would be dense."""
    assert {path.stem for path in method_files(experiments=True)} == {*METHOD_NAMES, *EXPERIMENTS}
    for name in EXPERIMENTS:
        assert len(modules()[name].read_text().splitlines()) <= 800, name


@pytest.mark.parametrize("name", [*METHODS, *EXPERIMENTS])
def test_same_sections_in_the_same_order(name):
    filters = ["data filters"] if name == "align" else []
    assert BANNER.findall((ROOT / f"{name}.py").read_text()) == SECTIONS[:2] + filters + SECTIONS[2:]


IMPORT_EACH = """
import importlib, io, json, os, sys, traceback
import torch, torchvision
found = {}
for name in sys.argv[1:]:
    if process := os.fork():
        found[name] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        continue
    before, state = dict(os.environ), torch.get_rng_state()
    sys.stdout = io.StringIO()
    status = 1
    try:
        importlib.import_module(name)
        assert torch.equal(state, torch.get_rng_state()) and before == dict(os.environ)
        assert not torch.distributed.is_initialized()
        assert not sys.stdout.getvalue() and not os.listdir()
        status = 0
    finally:
        traceback.print_exc()
        os._exit(status)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def importing(tmp_path_factory):
    """name -> exit status of a process that has torch and imports this one file, in an empty folder; and what they said."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", IMPORT_EACH, *sorted(modules())]
    done = subprocess.run(argv, cwd=tmp_path_factory.mktemp("empty"), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("name", sorted(modules()))
def test_import_has_no_side_effect(importing, name):
    statuses, output = importing
    assert statuses[name] == 0, output


# ------------------------------------------------ paste ------------------------------------------------
def cut(names, allowed_common=(), allowed_data=(), file="clip.py"):
    """The definitions `names` of a method file, with those of the same file they need, executed in a namespace that has
    torch and torchvision alone, and what is allowed from common.py and data.py. -> namespace."""
    space = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "torchvision": torchvision, "__name__": "pasted"}
    sources = {file: names, "common.py": allowed_common, "data.py": allowed_data}
    for origin, wanted in reversed(sources.items()):
        text = (ROOT / origin).read_text()
        tops = {node.name for node in ast.parse(text).body if hasattr(node, "name")}
        todo, seen = list(wanted), []
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.append(name)
            piece = "\n".join(text.splitlines()[slice(*definition(text, name))])
            used = {node.id for node in ast.walk(ast.parse(piece)) if isinstance(node, ast.Name)}
            todo += sorted(used & tops - set(seen))
        for name in sorted(seen, key=lambda n: definition(text, n)[0]):  # in the order of the file
            exec("\n".join(text.splitlines()[slice(*definition(text, name))]), space)
    return space


def backward(*outputs):
    sum(output.float().square().sum() for output in outputs).backward()


def test_paste_clip_and_slip():
    image, text = torch.randn(4, 3, 32, 32), torch.randint(1, 40, (4, 8))
    for layers, width, patch in ((2, 64, 8), ((1, 1, 1, 1), 8, None)):
        model = cut(["CLIP"])["CLIP"](16, 32, layers, width, patch, 8, 40, 64, 1, 1)
        backward(*model(image, text))
    for file in ("clip.py", "slip.py"):
        loss = cut(["clip_loss"], ["all_gather"], file=file)["clip_loss"]
        loss(torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), 10.0).backward()
    space = cut(["SLIP", "VisionTransformer"], file="slip.py")
    model = space["SLIP"](16, space["VisionTransformer"](32, 8, 64, 2, 4), 64, 8, 40, 64, 1, 1, 32, 8)
    backward(*model(image, text, image, image))


def test_paste_simclr():
    space = cut(["ResNet", "ProjectionHead", "SimCLR"], file="simclr.py")
    backbone = space["ResNet"](torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], width=2, stem="cifar")
    backward(space["SimCLR"](backbone, space["ProjectionHead"](backbone.feature_dim))(torch.randn(4, 3, 32, 32)))
    for file in ("simclr.py", "slip.py"):
        loss = cut(["nt_xent_loss"], ["all_gather"], file=file)["nt_xent_loss"]
        loss(torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), 0.1).backward()


@pytest.mark.parametrize("name", [*METHOD_NAMES, *EXPERIMENTS])
def test_every_piece_can_be_carried_away(name):
    """What stands before the training section needs no more of this project than common.py and data.py, but for the view
    of evaluations, and for align.py's filters, which read and write files."""
    text = modules()[name].read_text()
    begins = next(i for i, line in enumerate(text.splitlines(), 1) if re.match(r"# -+ training -+$", line))
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    origin = {alias.name: node.module for node in imports for alias in node.names}
    filters = {"Picture", "read_pictures", "filter_data"} if name == "align" else set()
    found, pieces = {}, [node for node in ast.parse(text).body if hasattr(node, "name") and node.lineno < begins]
    assert len(pieces) > 4
    for piece in pieces:
        used = {node.id for node in ast.walk(piece) if isinstance(node, ast.Name)} - {"EvalView"}
        of_the_run = {x for x in used if origin.get(x) in {"run", "monitor", "knn", "layouts", "sources", "synonyms"}}
        if of_the_run and piece.name not in {"Args", *filters}:
            found[piece.name] = of_the_run
    assert found == {}


@pytest.mark.parametrize("file, name", [("clip.py", "LanguageView"), ("slip.py", "LanguageView"), ("slip.py", "SSLView"),
                                        ("simclr.py", "SimCLRView"), ("moco.py", "MoCoView"), ("mocov3.py", "MoCoV3View")])  # fmt: skip
def test_paste_augmentation(file, name):
    """With the image operations it names, and Python's random generator that is handed in."""
    import random

    text = (ROOT / file).read_text()
    piece = ast.parse("\n".join(text.splitlines()[slice(*definition(text, name))]))
    data_tops = {node.name for node in ast.parse((ROOT / "data.py").read_text()).body if hasattr(node, "name")}
    named = {node.id for node in ast.walk(piece) if isinstance(node, ast.Name)} & data_tops
    view = cut([name], allowed_data=sorted(named), file=file)[name](32)
    assert len(view.mean) == len(view.std) == 3  # views.png needs them
    rng = random.Random(0)
    crops = torch.stack([view.crop(torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8), rng) for _ in range(5)])
    draws = [view.sample(rng) for _ in range(5)]
    draws = {key: torch.stack([torch.as_tensor(draw[key]) for draw in draws]) for key in draws[0]}
    assert view(crops, draws).shape == (5, 3, 32, 32)
