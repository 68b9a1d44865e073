"""What saves memory changes no number: activation checkpointing."""

import functools
import json
import re
import types
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import slip
from common import UserError, checkpoint_blocks
from runs import ROOT, command, make_photos, module_of, rows, train_here

CHECKPOINTED = ["clip", "clip_resnet", "slip", "slip_ablations", "declip", "align", "mocov3", "dino", "ibot", "dinov2"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_changes_no_number(name, dtype, photos, tmp_path):
    """Three steps of the loop: stochastic depth, masks, EMA and batch norm in heads included. In bf16 weights are cast, and
    most methods call their blocks more than once."""
    flags = ["--max-steps", "3", "--eval-every", "0", "--save-every", "0", "--dtype", dtype]
    grads = {}
    for how in ("none", "selective", "full"):
        grads[how] = train_here(name, photos, tmp_path / how, *flags, "--grad-checkpointing", how)
    for how in ("selective", "full"):
        for a, b in zip(grads["none"], grads[how], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        curves = [[row["loss"] for row in rows(tmp_path / run) if "loss" in row] for run in ("none", how)]
        assert len(curves[0]) == 3 and curves[0] == pytest.approx(curves[1], rel=1e-6)


class Dropping(nn.Module):
    """A block that draws from the global random state."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.5), nn.Linear(256, 64))

    def forward(self, x):
        return x + self.layers(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_blocks_draw_the_same_random_numbers(compiled):
    results, x = {}, torch.randn(32, 64)
    for how in ("none", "selective", "full"):
        torch.manual_seed(0)
        model = nn.Sequential(*[Dropping() for _ in range(4)])
        names = list(model.state_dict())
        checkpoint_blocks(model, how, Dropping)
        assert list(model.state_dict()) == names
        if compiled:
            model.compile(backend="aot_eager")
        torch.manual_seed(1)
        model(x).square().mean().backward()
        results[how] = [p.grad for p in model.parameters()]
    for how in ("selective", "full"):
        for a, b in zip(results["none"], results[how], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are still alive."""

    def __init__(self):
        super().__init__()
        self.bytes, self.seen = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.bytes += size
                    self.seen[key] = weakref.ref(storage, functools.partial(self.gone, key, size))
        return out

    def gone(self, key, size, _):
        del self.seen[key]
        self.bytes -= size


def test_how_much_blocks_keep():
    """Of a ViT's block, in float32 and in widths D of a token: all of it, or what "selective" promises (the input, qkv 3,
    attention, projection, the products of the MLP 4 and 1), or the input alone."""
    width, tokens, kept = 64, 17, {}
    for how in ("none", "selective", "full"):
        model = nn.Sequential(*[slip.Block(width, 4) for _ in range(8)])
        checkpoint_blocks(model, how, slip.Block)
        live, x = LiveBytes(), torch.randn(16, tokens, width)
        live.seen = {t.untyped_storage()._cdata: t for t in (x, *model.parameters())}
        with live:
            y = model(x)
        kept[how] = live.bytes / (8 * 16 * tokens * width * 4)
        assert y.requires_grad
    assert kept["none"] > 15 and 11 <= kept["selective"] < 11.5 and 1 <= kept["full"] < 1.1, kept


@pytest.mark.parametrize("name, flags", [("dino", ["--arch", "resnet18"]), ("mocov3", ["--arch", "resnet18"])])
def test_a_network_without_blocks_is_refused(name, flags, photos, tmp_path):
    with pytest.raises(UserError, match="--grad-checkpointing is for transformer blocks"):
        train_here(name, photos, tmp_path / "run", *flags, "--grad-checkpointing", "full")
    assert not (tmp_path / "run").exists()
    assert module_of(name).Args.grad_checkpointing == "none"


def compiled_table():
    page = (ROOT / "docs/running.md").read_text()
    return page[page.index("<!-- memory -->") : page.index("<!-- /memory -->")]


def test_the_table_of_gib_is_what_was_recorded():
    text = (ROOT / "docs/running.md").read_text().replace(compiled_table(), "")
    recorded = json.loads((ROOT / "results/memory.json").read_text())["rows"]
    recorded = [row for row in recorded if "--compile" not in row["command"]]
    lines = [f"| `{row['command']}` | {row['batch']} | {row['gib']['kept for backward']:.1f} | {row['gib']['peak']:.1f} |"
             for row in recorded]  # fmt: skip
    assert len(lines) >= 40 and [line for line in text.splitlines() if line.startswith("| `") and ".py --data" in line] == lines


@pytest.mark.parametrize("words", [
    "slip --recipe shapes --batch-size 32",
    "simclrv2 --data flocks --checkpoint resnet10 --image-size 32 --batch-size 32",
    "simclrv2 --recipe flocks-distill --teacher resnet18 --arch resnet10 --image-size 32 --batch-size 32",
])  # fmt: skip
def test_predicted_is_what_real_tensors_take(words, monkeypatch):
    """The peak of two steps, counted without and with content; a view may choose another form of an operation."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import memory

    peaks = []
    for count in (lambda *run: memory.predict(*run)["peak"], memory.measure):
        method, *flags = words.split()
        module, args = memory.resolve(method, flags)
        args.device, args.dtype = "cpu", "bf16"
        peaks.append(count(module, args, 1))
    assert peaks[0] == pytest.approx(peaks[1], rel=1e-3)


def test_a_prediction_is_recorded_and_is_what_the_record_says(tmp_path, monkeypatch, capsys):
    """One of the documented commands again: only its row is replaced."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import memory

    path, text = tmp_path / "memory.json", (ROOT / "results/memory.json").read_text()
    before = json.loads(text)["rows"]
    at = next(i for i, row in enumerate(before) if row["command"] == "moco.py --data imagenet")
    path.write_text(text.replace(f'"peak": {before[at]["gib"]["peak"]}', '"peak": 99.0'))
    monkeypatch.setattr("sys.argv", ["memory.py", "moco", "--data", "imagenet", "--out", str(path)])
    memory.main()
    printed = {name: float(gib) for name, gib in re.findall(r"^  ([a-zA-Z ]+?) +(\d+\.\d\d) GiB$", capsys.readouterr().out, re.M)}
    after = json.loads(path.read_text())["rows"]
    assert len(after) == len(before) and after[:at] + after[at + 1 :] == before[:at] + before[at + 1 :]
    assert after[at]["gib"] == printed and list(printed) == list(before[at]["gib"])
    assert printed == pytest.approx(before[at]["gib"], abs=0.006) and after[at]["batch"] == before[at]["batch"]
    assert after[at]["torch"] == torch.__version__ and after[at]["commit"]
    for more in ({"gpus": 2}, {"command": "moco.py --data flickr8k"}):  # other rows
        memory.write_row(path, after[at] | more)
    rows = json.loads(path.read_text())["rows"]
    assert rows[: len(after)] == after and [(row["command"], row["gpus"]) for row in rows[len(after) :]] == [
        ("moco.py --data imagenet", 2), ("moco.py --data flickr8k", 8)]  # fmt: skip
    memory.write_row(tmp_path / "new.json", after[at])
    assert json.loads((tmp_path / "new.json").read_text())["rows"] == [after[at]]
    for wrong in ("{", "[]", "{}"):
        path.write_text(wrong)
        with pytest.raises(UserError, match="is no record of this script: use another --out"):
            memory.main()


WIDTH, SAMPLES = 64, 48


class Cosines(nn.Module):
    """Two matrix products with three cosines between them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.last(self.first(x).cos().cos().cos())


def train_cosines(args):
    model, x = Cosines(), torch.randn(SAMPLES, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if args.compile:
        model.compile()
    for _ in range(2):
        model(x).backward(torch.ones(SAMPLES, WIDTH))
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize("compiled, matrices", [(False, 7), (True, 5)])
def test_what_a_compiled_model_keeps(compiled, matrices, monkeypatch):
    """In matrices of samples x width. There are always the input, the result, the gradient that backward() is given, and
    what the second product is applied to, which its weight's gradient needs. Beside them autograd keeps the input of each
    cosine, and a compiled model that of the first alone, from which it computes the other two again."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import memory

    module = types.SimpleNamespace(train=train_cosines)
    found = memory.predict(module, types.SimpleNamespace(data="shapes", compile=compiled), 1)
    assert found["parameters"] == found["optimizer"] == 2 * WIDTH * WIDTH * 4
    assert found["kept for backward"] == matrices * SAMPLES * WIDTH * 4


def test_a_torch_that_compiles_nothing_is_one_sentence(monkeypatch):
    """As older ones do in the mode that counts."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import memory

    monkeypatch.setattr(memory.LiveBytes, "ignore_compile_internals", classmethod(lambda mode: False))
    module = types.SimpleNamespace(train=train_cosines)
    with pytest.raises(UserError, match="^this torch does not compile what is counted: use a newer one, or"):
        memory.predict(module, types.SimpleNamespace(data="shapes", compile=True), 1)


def test_frozen_weights_take_neither_gradients_nor_moments(monkeypatch):
    """And need not be there."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import memory

    gib = []
    for words in ([], ["--init", "not/there.pth"], ["--init", "not/there.pth", "--freeze", "image"]):
        module, args = memory.resolve("slip", ["--recipe", "shapes", "--batch-size", "32", *words])
        args.device, args.dtype = "cpu", "bf16"
        gib.append(memory.predict(module, args, 1))
    assert gib[0] == gib[1]
    assert gib[2]["gradients"] < 0.7 * gib[0]["gradients"] and gib[2]["copies and buffers"] > gib[0]["copies and buffers"]
    assert gib[2]["optimizer"] < 0.7 * gib[0]["optimizer"] and gib[2]["peak"] < gib[0]["peak"]


def test_a_method_that_is_none_is_one_sentence():
    for name in ("clp", "common"):
        done = command("benchmarks/memory.py", name, "--gpus", "1")
        assert done.returncode == 2
        assert done.stderr.endswith(f"error: {name} is not a method file: name one without .py, for example slip\n")


NEUTRAL = {"--data-dir", "--output-dir", "--epochs", "--warmup-epochs", "--lr", "--weight-decay", "--init", "--clip-views", "--images",
           "--eval-every", "--gelu"}  # fmt: skip


def documented(launcher):
    """-> commands of the pages behind this launcher, without flags that take no memory. --images decoupled shows a step as
    many images as --images all."""
    found = set()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for words in re.findall(rf"(?:^|`){launcher} ((?:\w+)\.py --data [^#`\n]*)", page.read_text(), re.M):
            words, kept = words.split(), []
            while words:
                word = words.pop(0)
                if word in NEUTRAL:
                    words.pop(0)
                else:
                    kept.append(word)
            found.add(" ".join(kept))
    return found


def recorded(gpus):
    rows = json.loads((ROOT / "results/memory.json").read_text())["rows"]
    return {row["command"]: row["gib"]["peak"] for row in rows if row["gpus"] == gpus and "--compile" not in row["command"]}


def test_every_documented_command_for_one_gpu_has_its_gib():
    """But for those of the small networks that the recipes for these sets have."""
    small, commands = {"cifar10", "cifar10-cpu", "cifar10-cpu-vit", "cifar10-distill", "flickr8k"}, set()
    for line in documented("torchrun"):
        recipe = re.search(r"--recipe (\S+)", line) or re.search(r"--data (\S+)", line)
        if recipe[1] not in small:
            commands.add(line)
    assert len(commands) >= 10 and commands <= set(recorded(1)), commands - set(recorded(1))


def test_every_documented_command_for_eight_gpus_has_its_gib():
    gib, commands = recorded(8), documented("torchrun --nproc_per_node=8")
    assert len(commands) >= 44 and commands <= set(gib), commands - set(gib)
    shown = [command for command, peak in gib.items() if peak + 4 > 79.6]  # of an H100 or A100 of 80 GB
    assert shown == ["slip.py --data yfcc15m --grad-checkpointing none"]
