"""What the layout promises: honest copies, line caps, pasteable pieces, the same banners, imports without side effects."""

import ast
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
    assert set(METHODS) <= {p.stem for p in method_files()}


def test_copies_equal_their_originals():
    counts = {}
    for path in method_files():
        counts[path.name], differing = compare(path)
        assert not differing
    assert counts["slip.py"] >= 5


def test_a_changed_copy_is_noticed_and_mended(tmp_path, monkeypatch):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(copies, "ROOT", tmp_path)
    changed = (tmp_path / "slip.py").read_text().replace("torch.sigmoid(1.702 * x)", "torch.sigmoid(1.7 * x)")
    (tmp_path / "slip.py").write_text(changed)
    assert compare(tmp_path / "slip.py")[1]
    compare(tmp_path / "slip.py", fix=True)
    assert (tmp_path / "slip.py").read_text() == (ROOT / "slip.py").read_text()


def test_line_caps():
    lines = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    for path in method_files():
        assert lines[path.name] <= 600, path
        assert lines[path.name] + lines["common.py"] + lines["data.py"] <= 1400, path
    assert max(len(line) for path in method_files() for line in path.read_text().splitlines()) <= 110


@pytest.mark.parametrize("name", METHODS)
def test_same_sections_in_the_same_order(name):
    assert BANNER.findall((ROOT / f"{name}.py").read_text()) == SECTIONS


@pytest.mark.parametrize("name", [*METHODS, "common", "data", "evaluate", "exports", "finetune", "pictures", "probes", "weights"])
def test_import_has_no_side_effect(name, tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch, torchvision, os; before = dict(os.environ); "
            f"state = torch.get_rng_state(); import {name}; "
            "assert torch.equal(state, torch.get_rng_state()) and before == dict(os.environ); "
            "assert not torch.distributed.is_initialized()")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout and not list(tmp_path.iterdir()), done.stderr


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
    backbone = space["ResNet"](torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], width=2, cifar_stem=True)
    backward(space["SimCLR"](backbone, space["ProjectionHead"](backbone.feature_dim))(torch.randn(4, 3, 32, 32)))
    for file in ("simclr.py", "slip.py"):
        loss = cut(["nt_xent_loss"], ["all_gather"], file=file)["nt_xent_loss"]
        loss(torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), 0.1).backward()


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
    rng = random.Random(0)
    crops = torch.stack([view.crop(torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8), rng) for _ in range(5)])
    draws = [view.draw(rng) for _ in range(5)]
    draws = {key: torch.stack([torch.as_tensor(draw[key]) for draw in draws]) for key in draws[0]}
    assert view(crops, draws).shape == (5, 3, 32, 32)
