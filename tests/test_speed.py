"""What makes a run cheaper: that it happens, and that the values stay."""

import copy
import json
import os

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import byol
import clip
import declip
import dino
import dinov2
import ibot
import moco
import mocov3
import run
import slip
import slip_ablations
from common import checkpoint_blocks
from data import Loader
from evaluation import finetune
from run import parse_args
from runs import FLAGS, make_photos, module_of
from toys import positions


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    make_photos(folder, train=24)
    return folder


def train(name, photos, directory, *flags):
    """-> rows of training in metrics.jsonl."""
    module = module_of(name)
    argv = ["--data", str(photos), "--output-dir", str(directory), *FLAGS[name], "--eval-every", "0",
            "--save-every", "0", *flags]  # fmt: skip
    module.train(parse_args(module.Args, module.RECIPES, argv))
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def transformers():
    torch.manual_seed(0)
    yield clip.VisionTransformer(32, 8, 64, 3, 1, 16)
    yield declip.VisionTransformer(32, 8, 64, 3, 16)
    yield slip.VisionTransformer(32, 8, 64, 3, 2)
    yield slip_ablations.VisionTransformer(32, 8, 64, 3, 2)
    yield mocov3.VisionTransformer(32, 8, 64, 3, 2)
    yield dino.VisionTransformer(32, 8, 64, 3, 2)


@pytest.mark.parametrize("network", transformers(), ids=lambda network: network.__module__)
def test_in_training_the_last_block_computes_the_class_token_alone(network):
    """Output and gradients are those of evaluation, where all tokens are computed and can be looked at."""
    network = network.double()
    x, found = torch.randn(2, 3, 32, 32, dtype=torch.float64), {}
    weights = torch.randn_like(network(x))
    block = [module for module in network.modules() if hasattr(module, "mlp")][-1]
    first = next(block.mlp.children())  # layer of the last MLP
    for training in (True, False):
        tokens = []
        hook = first.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
        network.train(training).zero_grad()
        y = network(x)
        (y * weights).sum().backward()
        hook.remove()
        assert tokens == [1 if training else 17]
        found[training] = [y.detach()] + [p.grad.clone() for p in network.parameters() if p.requires_grad]
    for a, b in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def text_encoders():
    """-> (module, model, what encodes text in it) of the files whose text transformer is CLIP's."""
    torch.manual_seed(0)
    words = {"context_length": 9, "vocab_size": 40, "transformer_width": 64, "transformer_heads": 2, "transformer_layers": 3}
    network = clip.CLIP(16, 32, 1, 64, 8, **words)
    yield clip, network, network.encode_text
    for module in (slip, slip_ablations):
        network = module.SLIP(16, module.VisionTransformer(32, 8, 64, 1, 2), 64, **words, ssl_mlp_dim=8, ssl_emb_dim=8)
        yield module, network, network.encode_text
    network = declip.TextTransformer(9, 40, 64, 3, 16)
    yield declip, network, network


@pytest.mark.parametrize("lengths", [(3, 7, 2, 5), (9, 9, 9, 9), (9, 2, 6, 9)], ids=["short", "full", "mixed"])
@pytest.mark.parametrize("module, network, encode", text_encoders(), ids=["clip", "slip", "slip_ablations", "declip"])
def test_the_last_block_of_the_text_computes_the_end_token_alone(module, network, encode, lengths, monkeypatch):
    """Values and gradients are those with all tokens, also where a block is computed again in the backward pass."""
    original, ids = module.Transformer.forward, torch.randint(1, 38, (4, max(lengths)))
    for row, length in zip(ids, lengths):
        row[0], row[length - 1], row[length:] = 38, 39, 0

    def every_token(self, x, mask=None, position=None):
        x = original(self, x, mask)
        return x if position is None else x[torch.arange(len(x)), position].unsqueeze(1)

    def gradients(network, encode, how, computed):
        tokens, blocks = [], [m for m in network.transformer.modules() if isinstance(m, module.ResidualAttentionBlock)]
        for block in blocks:
            block.mlp.c_fc.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
        checkpoint_blocks(network, how, module.ResidualAttentionBlock)
        y = encode(ids)
        assert tokens == [max(lengths), max(lengths), computed]
        y.pow(3).sum().backward()
        return {"y": y.detach()} | {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for how in ("none", "selective", "full"):
            copies = [copy.deepcopy(network).to(dtype).train() for _ in range(2)]
            encoders = [c if encode is network else c.encode_text for c in copies]
            found = gradients(copies[0], encoders[0], how, 1)
            with monkeypatch.context() as patch:
                patch.setattr(module.Transformer, "forward", every_token)
                want = gradients(copies[1], encoders[1], "none", max(lengths))
            assert len(found) == len(want) > 40
            for name, y in want.items():
                largest = y.abs().max()
                torch.testing.assert_close(found[name] / largest, y / largest, rtol=0, atol=tolerance)


def test_words_and_embedding_of_declips_text_agree():
    """Where all words are asked for, all are computed, and the embedding is that of the end token alone."""
    *_, (_, text, _) = text_encoders()
    ids = torch.tensor([[38, 5, 39, 0, 0], [38, 1, 2, 3, 39]])
    embed, words = text.double()(ids, return_words=True)
    assert words.shape == (2, 5, 64)
    torch.testing.assert_close(text(ids), embed, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(text.text_projection(words[[0, 1], [2, 4]]), embed, rtol=1e-10, atol=1e-12)


def test_of_local_crops_the_last_block_computes_the_class_token_alone():
    """Of ibot.py's student, as only their class tokens go on. All outputs and gradients are those with all tokens."""
    torch.manual_seed(0)
    args = ibot.Args(arch="vit_micro_patch8", image_size=32, local_size=16, out_dim=32, hidden_dim=32, drop_path=0.3)
    model = ibot.build_model(args).double().train()
    crops = [torch.randn(2, 3, size, size, dtype=torch.float64) for size in (32, 32, 16, 16)]
    drop_path = [torch.rand(2, len(model.student.backbone.blocks), 2) for _ in crops]
    mask, found, tokens = torch.rand(4, 16) < 0.4, [], ibot.VisionTransformer.tokens
    for queries in (1, None):
        seen, network = [], copy.deepcopy(model)
        last = network.student.backbone.blocks[-1].mlp
        last.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape[1]))
        with pytest.MonkeyPatch.context() as patch:
            if queries is None:
                patch.setattr(ibot.VisionTransformer, "tokens", lambda self, x, mask=None, u=None, queries=None: tokens(self, x, mask, u))
            outputs = network(crops, mask, positions(mask), drop_path)
        assert seen == [17, 1 if queries else 5]
        sum(y.square().mean() for y in outputs[:2]).backward()
        found.append([*outputs] + [p.grad for p in network.student.parameters() if p.grad is not None])
    assert len(found[0]) > 20
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Waits(TorchDispatchMode):
    """Operations whose result the host has to know, for which it would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_moco_and_declip_do_not_wait_for_a_gpu():
    """Neither the queue, which goes round here, nor the choice of masked tokens, once their number is known."""
    torch.manual_seed(0)
    encoders = [nn.Sequential() for _ in range(2)]
    for encoder in encoders:
        encoder.add_module("fc", nn.Linear(6, 3))
    model = moco.MoCo(*encoders, queue_size=12)
    keys = [torch.randn(4, 3) for _ in range(4)]
    with Waits() as waits:
        for key in keys:
            model.enqueue(key)
    assert not waits.found and model.queue_ptr.tolist() == [4]
    assert torch.equal(model.queue, torch.cat([keys[3], *keys[1:3]]).T)
    vocabulary, ids = 40, torch.randint(1, 40, (4, 8))
    text = declip.TextTransformer(8, vocabulary, 64, 1, 16)
    network = declip.DeCLIP(16, declip.VisionTransformer(32, 8, 64, 2, 16), text, 32)
    images = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    chosen = torch.tensor([0, 1, 3]), torch.tensor([1, 0, 7])
    with Waits() as waits:
        logits = network(*images, ids, ids, ids, chosen)[-1]
        logits.sum().backward()
    assert not waits.found
    words = network.encode_text(ids, return_words=True)[1]
    torch.testing.assert_close(logits, network.text_label_predictor(words)[chosen])


@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
def test_masked_patches_do_not_wait_for_a_gpu(centering):
    """Their number is known on the CPU: tensors without content, as these are, could not tell it. Forward, losses, centers
    and backward of a step of ibot.py and dinov2.py."""
    mask = torch.rand(4, 16) < 0.4
    chosen = positions(mask).to("meta")
    with torch.device("meta"):
        crops = [torch.empty(2, 3, size, size) for size in (32, 32, 16)]
        sizes = dict(arch="vit_micro_patch8", image_size=32, local_size=16, out_dim=32, hidden_dim=32)
        student = ibot.build_model(ibot.Args(**sizes))
        scaled = dinov2.build_model(dinov2.Args(**sizes))
    mask = mask.to("meta")
    with Waits() as waits:
        _, patches, _, whole = student(crops, mask, chosen)
        ibot.patch_loss(patches, whole, mask, chosen, student.center2, 0.04).backward()
        _, patches, _ = scaled(crops, mask, chosen)
        _, target = scaled.teach(crops, chosen)
        if centering == "sinkhorn":
            p_t = dinov2.sinkhorn_knopp(target, 0.04)
        else:
            p_t = dinov2.center_softmax(target, scaled.center2[0], 0.04)
        dinov2.patch_loss(patches, p_t, mask, chosen).backward()
    assert len(patches) == len(chosen) and not waits.found


class Enough(Exception):
    pass


@pytest.mark.parametrize("name", ["clip_resnet", "declip_resnet", "align"])
def test_convnets_of_the_language_files_are_channels_last(name, photos, tmp_path, monkeypatch):
    """train() lays them out so; activations follow; outputs and gradients are those of the plain layout."""
    found = []

    def start(self, method, args, loader, state, *rest):
        found.append(state["model"])
        raise Enough

    monkeypatch.setattr(run.Run, "__init__", start)
    with pytest.raises(Enough):
        train(name, photos, tmp_path)
    network = found[0].visual
    network.double()  # tells a wrong result from rounding, which batch norm amplifies
    plain = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) > 10
    weights = [m.weight for m in convolutions if min(m.weight.shape[1:]) > 1]
    assert weights and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    layouts = []
    for m in convolutions:
        m.register_forward_hook(lambda m, x, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last)))
    size = 64 if name == "align" else 32
    x = torch.rand(4, 3, size, size, dtype=torch.float64)
    ours, theirs = network(x), plain(x)
    assert len(layouts) >= len(convolutions) and all(layouts)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for p, q in zip(network.parameters(), plain.parameters()):
        if p.grad is not None:
            scale = q.grad.abs().max().clamp_min(1e-3).item()
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-4 * scale)


def pair():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))


def key_encoder(cls, method, names):
    """-> a function like byol.update_target, of the method of a MoCo."""

    def update(online, target, momentum):
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        setattr(model, names[0], online)
        setattr(model, names[1], target)
        getattr(model, method)(momentum)

    return update


EMAS = {
    "byol": byol.update_target,
    "moco": key_encoder(moco.MoCo, "update_key_encoder", ("encoder_q", "encoder_k")),
    "mocov3": key_encoder(mocov3.MoCoV3, "update_momentum_encoder", ("base_encoder", "momentum_encoder")),
    "dino": dino.update_teacher,
    "ibot": ibot.update_teacher,
    "dinov2": dinov2.update_teacher,
    "finetune": lambda online, target, momentum: finetune.update_ema(target, online, momentum),
}


@pytest.mark.parametrize("name", EMAS)
def test_averages_are_taken_in_one_call(name, monkeypatch):
    """Bit for bit those of a call per tensor."""
    online, target = pair()
    expected = [b.detach().clone().lerp_(a, 0.1) for a, b in zip(online.parameters(), target.parameters())]
    calls, foreach = [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *args: calls.append(foreach(*args)))
    EMAS[name](online, target, 0.9)
    assert len(calls) == 1
    for a, b in zip(expected, target.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["byol", "simsiam", "moco", "mocov3", "declip"])
def test_what_is_only_logged_is_computed_only_then(name, photos, tmp_path, monkeypatch):
    """Steps 1, 2 and 3 of every step's log equal those of a log of every second one."""
    module, calls = module_of(name), []
    original = module.feature_std
    monkeypatch.setattr(module, "feature_std", lambda z: calls.append(1) or original(z))
    every = train(name, photos, tmp_path / "every", "--max-steps", "3")
    assert len(calls) == 3
    second = train(name, photos, tmp_path / "second", "--max-steps", "3", "--log-every", "2")
    assert len(calls) == 6  # the first, the second, the last
    last = train(name, photos, tmp_path / "last", "--max-steps", "3", "--log-every", "0")
    assert len(calls) == 8
    for rows, steps in ((second, (1, 2, 3)), (last, (1, 3))):
        assert [row["step"] for row in rows] == [*steps]
        for row, step in zip(rows, steps):
            assert row["feature_std"] > 0
            assert (row["feature_std"], row["loss"]) == (every[step - 1]["feature_std"], every[step - 1]["loss"])


def test_slip_without_views_encodes_none(photos, tmp_path, monkeypatch):
    """--ssl-scale 0 neither crops nor encodes them, and trains as a vanishing weight does."""
    seen, cropped = [], []
    forward, crop = slip.VisionTransformer.forward, slip.SSLView.crop
    monkeypatch.setattr(slip.VisionTransformer, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    monkeypatch.setattr(slip.SSLView, "crop", lambda self, *args: cropped.append(1) or crop(self, *args))
    flags = "--max-steps", "3", "--weight-decay", "0"
    tiny = train("slip", photos, tmp_path / "tiny", *flags, "--ssl-scale", "1e-9")
    assert seen[:3] == [24] * 3 and len(cropped) == 48  # then comes the evaluation
    seen.clear()
    cropped.clear()
    none = train("slip", photos, tmp_path / "none", *flags, "--ssl-scale", "0")
    assert seen[:3] == [8] * 3 and not cropped
    assert none[0]["chance"] == pytest.approx(tiny[0]["clip_chance"])
    for a, b in zip(none, tiny):
        assert a["loss"] == pytest.approx(b["clip_loss"], abs=1e-4)
        assert "ssl_loss" not in a


class Numbers:
    name, captioned = "numbers", False

    def __len__(self):
        return 8


@pytest.mark.parametrize("cores, processes, workers", [(16, 1, 8), (16, 4, 4), (2, 1, 2), (2, 4, 1)])
def test_loader_workers_share_the_cores(cores, processes, workers, monkeypatch):
    """Those that the process may use, among the processes that torchrun started on this machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    loader = Loader(Numbers(), {}, {}, 8, workers=8)
    assert loader.workers == workers and loader.sharing == processes * workers  # the latter share /dev/shm
    assert Loader(Numbers(), {}, {}, 8, workers=0).workers == 0


@pytest.mark.parametrize("flags, given, threads", [([], False, 2), ([], True, 3), (["--workers", "0"], False, 2), (["--image-size", "80"], False, 3)])
def test_a_run_on_small_images_leaves_a_core_to_its_workers(photos, tmp_path, monkeypatch, flags, given, threads):
    """Threads that wait for each other would take it. OMP_NUM_THREADS is obeyed; large images keep all threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(run, "THREADS", 3)
    before, seen = torch.get_num_threads(), []
    end_step = run.Run.end_step
    monkeypatch.setattr(run.Run, "end_step", lambda self, *a, **k: (seen.append(torch.get_num_threads()), end_step(self, *a, **k)))
    torch.set_num_threads(3)
    try:
        for name in ("first", "second"):  # takes nothing more
            train("simclr", photos, tmp_path / name, "--max-steps", "2", "--workers", "1", *flags)
    finally:
        torch.set_num_threads(before)
    assert seen == 4 * [threads]


def test_time_left_is_that_of_the_last_rows():
    """A row in which others took the machine does not move it far, and days are hours."""
    one = object.__new__(run.Run)
    one.recent, one.last, one.step = [], 1000, 100
    for _ in range(9):
        assert one._left(10.0, 10) == "00:15:00"
    assert one._left(30.0, 10) == "00:18:00"  # 120 s for 100 steps
    for _ in range(10):
        left = one._left(1200.0, 10)
    assert left == "30:00:00"


def test_a_busy_machine_is_named(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    for threads in (2, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        train("clip", photos, tmp_path / str(threads), "--max-steps", "1")
        assert ("OMP_NUM_THREADS=1 avoids that" in capsys.readouterr().out) == (threads == 2)
