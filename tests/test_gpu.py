"""What only a GPU shows. One command: pytest -m gpu

Elsewhere every test here is skipped. GPU_TESTS_ON=cpu runs them on the CPU all the same, as far as that makes
sense, so that their code can be checked without a GPU."""

import copy
import functools
import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import byol
import clip
import common
import data
import dino
import dinov2
import ibot
import moco
import mocov3
import simclr
import simsiam
import slip
from command import Args
from evaluation import finetune
from runs import METHODS, environment, make_photos, rows, train_here
from test_resume import assert_same_run
from toys import QUICK, TRANSFORMER, VIEW, Toy, positions, vit

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
GPU = DEVICE == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPU and not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def full_precision(monkeypatch):
    """float32 in every convolution too: PyTorch's TF32 has 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def losses(name, photos, directory, *flags):
    """(steps,) losses of a run on the device, float32 unless flags say otherwise."""
    train_here(name, photos, directory, "--device", DEVICE, "--dtype", "fp32", "--eval-every", "0", *flags)
    return torch.tensor([row["loss"] for row in rows(directory) if "loss" in row])


def peak(function):
    """Bytes that function() allocates at most beyond what was there. The CPU does not tell, so there it is
    what autograd keeps for the backward pass."""
    if GPU:
        # The signal handlers of the last Run hold its model, which the next Run would free.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        gc.collect()
        # cuBLAS takes up to 32 MiB for the first product of a thread, and the backward pass has one of its own.
        a, b = (torch.ones(8, 8, device=DEVICE, requires_grad=True) for _ in range(2))
        (a @ b).sum().backward()
        del a, b
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function()
    return sum(kept.values())


# -------------------------------------------- precision --------------------------------------------
def test_automatic_precision():
    device = common.init_distributed(DEVICE)
    autocast, scaler = common.mixed_precision("auto", device)
    if GPU:
        assert device == torch.device("cuda:0")
        bf16 = torch.cuda.get_device_capability()[0] >= 8
        assert (
            autocast.fast_dtype == (torch.bfloat16 if bf16 else torch.float16) and scaler.is_enabled() != bf16
        )
    else:
        x = torch.ones(2, 2, device=device)
        with autocast:
            assert (x @ x).dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
        assert not scaler.is_enabled()


# A step as small as that of a large batch: where losses jump about, rounding soon makes another run.
CALM = {"clip": ["--lr", "1e-4"], "clip_resnet": ["--lr", "1e-4"], "slip": ["--lr", "3e-5"],
        "declip": ["--lr", "3e-5"], "align": ["--lr", "1e-4"]}  # fmt: skip
CALM |= {name: [] for name in METHODS if name not in CALM}
ATOL = {"simsiam": 1e-4}  # a negative cosine, which begins at 0, where no relative error is small enough
TWENTY = ["--batch-size", "16", "--epochs", "8", "--max-steps", "20"]


def finite_weights(directory):
    """The checkpoint of a run, after a look at its weights."""
    saved = torch.load(directory / "checkpoint.pt", weights_only=True)
    weights = [t for t in saved["model"].values() if t.is_floating_point()]
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in weights)
    return saved


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", CALM)
def test_low_precision_stays_close(name, dtype, photos, tmp_path, monkeypatch):
    """Twenty steps. fp16 starts with a scale at which nothing overflows: a skipped step is another run."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**6))
    full = losses(name, photos, tmp_path / "full", *TWENTY, *CALM[name])
    low = losses(name, photos, tmp_path / "low", *TWENTY, *CALM[name], "--dtype", dtype)
    assert len(full) == len(low) == 20 and low.isfinite().all() and not torch.equal(full, low)
    lowest = -1 if name == "simsiam" else 0  # of the loss: a negative cosine begins at 0 and tells nothing relative to that
    relative = ((low - full) / (full - lowest)).abs()
    assert relative[0] < 0.01 and relative.mean() < 0.03 and relative.max() < 0.12, relative
    scaler = finite_weights(tmp_path / "low")["scaler"]
    assert scaler["scale"] == 2**6 if dtype == "fp16" else scaler == {}


@pytest.mark.parametrize("name", METHODS)
def test_overflow_skips_the_step_and_lowers_the_scale(name, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**24))
    low = losses(name, photos, tmp_path / "low", *TWENTY, *CALM[name], "--dtype", "fp16")
    assert low.isfinite().all()
    assert 2**6 <= finite_weights(tmp_path / "low")["scaler"]["scale"] < 2**24


# -------------------------------------------- speed-ups --------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_compiled_is_the_same(name, photos, tmp_path, full_precision):
    torch._dynamo.reset()
    plain = losses(name, photos, tmp_path / "plain", "--max-steps", "10")
    compiled = losses(name, photos, tmp_path / "compiled", "--max-steps", "10", "--compile")
    torch.testing.assert_close(compiled, plain, rtol=2e-3, atol=ATOL.get(name, 0))
    saved = [
        torch.load(tmp_path / d / "checkpoint.pt", weights_only=True)["model"] for d in ("plain", "compiled")
    ]
    assert saved[0].keys() == saved[1].keys()  # no _orig_mod


def test_channels_last_is_the_same_and_stays(full_precision):
    """SimCLR's network computes channels last throughout, although its images come channel by channel."""
    torch.manual_seed(0)
    args = simclr.Args(arch="resnet18", image_size=64)
    plain = simclr.build_model(args).to(DEVICE)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    images, layout = torch.rand(16, 3, 64, 64, device=DEVICE), []
    hook = last.backbone.layer3.register_forward_hook(lambda module, x, y: layout.append(y))
    outputs = [model(images) for model in (plain, last)]
    hook.remove()
    assert layout[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
    for output in outputs:
        (output * torch.linspace(-1, 1, output.numel(), device=DEVICE).view_as(output)).sum().backward()
    for (name, a), b in zip(plain.named_parameters(), last.parameters(), strict=True):
        scale = a.grad.abs().max().item()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-2 * scale, msg=name)


def test_fused_adamw_is_plain_adamw():
    torch.manual_seed(0)
    shapes = [(64, 32), (64,), (), (8, 3, 4, 4)]
    weights = [torch.randn(shape) for shape in shapes]
    options = dict(lr=3e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    fused = [torch.nn.Parameter(w.to(DEVICE)) for w in weights]
    plain = [torch.nn.Parameter(w.double()) for w in weights]
    optimizers = [
        torch.optim.AdamW(fused, fused=True, **options),
        torch.optim.AdamW(plain, foreach=False, **options),
    ]
    for step in range(50):
        for f, p in zip(fused, plain):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            p.grad = noise.double() * 10.0 ** (step % 5 - 3)
            f.grad = p.grad.float().to(DEVICE)
        for optimizer in optimizers:
            optimizer.step()
    for f, p in zip(fused, plain):
        torch.testing.assert_close(f.detach().cpu().double(), p.detach(), rtol=1e-4, atol=1e-5)


def test_the_runs_use_it(photos, tmp_path, monkeypatch):
    used, original = [], torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *a, **k: used.append(k.get("fused")) or original(*a, **k)
    )
    for name in ("clip", "slip"):
        losses(name, photos, tmp_path / name, "--max-steps", "1")
    assert used == [True, True]


# -------------------------------------------- data --------------------------------------------
VIEWS = {
    "slip": lambda: slip.SSLView(96),
    "simclr": lambda: simclr.SimCLRView(96),
    "simclr cifar": lambda: simclr.SimCLRView(32, blur=False, strength=0.5),
    "clip": lambda: clip.LanguageView(96),
    "slip image": lambda: slip.LanguageView(96, (0.5, 1.0), "bilinear"),
    "moco 1": lambda: moco.MoCoView(96, "1"),
    "moco 2": lambda: moco.MoCoView(96, "2"),
    "mocov3": lambda: mocov3.MoCoV3View(96, first=False),
    "byol": lambda: byol.BYOLView(96, blur=0.5, solarize=0.5),
    "simsiam": lambda: simsiam.SimSiamView(96),
    "dino": lambda: dino.DINOView(96, depth=3),
}


@pytest.mark.parametrize("name", VIEWS)
def test_augmentation_equals_the_cpu_s(name, photos):
    """Every sample with its own draws. A GPU computes all of a batch, the CPU only the chosen samples."""
    view, dataset = VIEWS[name](), data.open_dataset(str(photos))
    loader = data.Loader(dataset, {"view": view}, {}, 48, device="meta")  # not a CPU: views are called later
    batch = loader.collate([loader[item] for item in next(loader.order(0, 1))])
    pixels, draw = batch["pixels"]["view"], batch["params"]["view"]
    on_cpu = view(pixels, draw)
    pixels, draw = pixels.to(DEVICE), {key: value.to(DEVICE) for key, value in draw.items()}
    moved = view(pixels, draw)
    assert moved.device.type == DEVICE and moved.dtype == torch.float32
    std = torch.tensor(getattr(view, "std", (1, 1, 1)))[:, None, None]
    assert ((moved.cpu() - on_cpu).abs() * std).max() < 1e-4  # in [0, 1]
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(view(pixels, draw), moved)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_whole(photos, workers, monkeypatch):
    """Pinned and copied while the host goes on: the same numbers as on the CPU."""
    monkeypatch.setattr(data.Loader, "call_views", lambda self, batch: batch)
    dataset, tokenizer = data.open_dataset(str(photos)), data.Tokenizer("train", 24, ["a red star"] * 9, 600)
    views = {"view1": slip.SSLView(64), "view2": slip.SSLView(64)}
    wanted = dict(data.Loader(dataset, views, {"text": tokenizer}, 16).batches(0, 5))
    loader = data.Loader(dataset, views, {"text": tokenizer}, 16, workers=workers, device=DEVICE)
    for step, batch in loader.batches(0, 5):
        for key in ("index", "label", "text"):
            assert batch[key].device.type == DEVICE and torch.equal(batch[key].cpu(), wanted[step][key])
        for key in views:
            pixels, wanted_pixels = batch["pixels"][key], wanted[step]["pixels"][key]
            draw, wanted_draw = batch["params"][key], wanted[step]["params"][key]
            assert pixels.device.type == DEVICE and pixels.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(pixels.cpu(), wanted_pixels)
            assert all(torch.equal(draw[k].cpu(), wanted_draw[k]) for k in wanted_draw)
    monkeypatch.undo()
    here, there = (next(data.Loader(dataset, views, {}, 16, device=device).batches(0, 1))[1] for device in ("cpu", DEVICE))
    assert all((here[key] - there[key].cpu()).abs().max() < 1e-3 for key in views)


# -------------------------------------------- processes --------------------------------------------
def python(*argv, **env):
    """A finished process that sees the GPUs, which tests/runs.py hides from others."""
    env = {**environment(), **env}
    if GPU:
        del env["CUDA_VISIBLE_DEVICES"]
        env |= {key: value for key, value in os.environ.items() if key == "CUDA_VISIBLE_DEVICES"}
    argv = [sys.executable, *map(str, argv)]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=600)


def gather_and_run(photos, directory):
    """Under torchrun: all_gather of device tensors with its gradient, then a short run of every method."""
    device = common.init_distributed(DEVICE)
    world, rank = common.world_size(), common.rank()
    backend = torch.distributed.get_backend_config()
    x = torch.arange(6.0, device=device).view(3, 2).add(10 * rank).requires_grad_()
    gathered = common._AllGather.apply(x)  # NCCL with one process too, to which all_gather() returns x
    assert world == 1 or torch.equal(common.all_gather(x), gathered)
    expected = torch.cat([torch.arange(6.0).view(3, 2) + 10 * r for r in range(world)])
    assert torch.equal(gathered.detach().cpu(), expected)
    weight = torch.arange(6.0 * world, device=device).view(3 * world, 2)
    (gathered * weight * (rank + 1)).sum().backward()
    total = sum(range(1, world + 1))  # what all processes say about the rows of this one
    assert torch.equal(x.grad.cpu(), total * weight[3 * rank : 3 * rank + 3].cpu())
    mean = common.all_reduce_mean(torch.tensor(float(rank), device=device))
    assert mean.item() == (world - 1) / 2
    for name in METHODS:
        losses(name, photos, Path(directory) / name, "--max-steps", "5")
    if rank == 0:
        Path(directory, "report.json").write_text(json.dumps({"backend": backend, "device": str(device)}))


@pytest.mark.parametrize("processes", [1, 2] if not GPU or torch.cuda.device_count() > 1 else [1])
def test_torchrun(photos, tmp_path, processes):
    """NCCL on one process and, where there are as many GPUs, on two: the losses of a run without torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher += ["--local-addr=127.0.0.1"]  # the machine's name may not be known to it
    done = python(*launcher, __file__, photos, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert ("cuda:nccl" in report["backend"] and report["device"] == "cuda:0") or not GPU
    for name in METHODS:
        alone = losses(name, photos, tmp_path / f"{name}_alone", "--max-steps", "5")
        together = [row["loss"] for row in rows(tmp_path / name) if "loss" in row]
        torch.testing.assert_close(torch.tensor(together), alone, rtol=5e-3, atol=ATOL.get(name, 0))  # TF32 in convolutions


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", METHODS)
def test_resume_is_bit_identical(name, dtype, photos, tmp_path):
    """10 steps = 5 + 5, with deterministic kernels, which have to be asked for before anything happens.
    Bicubic interpolation has none on a GPU, so local crops are as large as global ones here: then position
    embeddings are not interpolated."""
    code = f"""
import torch, runs
torch.use_deterministic_algorithms(True, warn_only=True)
torch.backends.cudnn.benchmark = False
torch.backends.cuda.enable_flash_sdp(False), torch.backends.cuda.enable_mem_efficient_sdp(False)
torch.backends.cuda.enable_cudnn_sdp(False)
flags = ["--local-size", "32"] if {name!r} in ("dino", "ibot", "dinov2") else []
for directory, steps in (("whole", 10), ("parts", 5), ("parts", 10)):
    runs.train_here({name!r}, {str(photos)!r}, f"{tmp_path}/{{directory}}", "--max-steps", str(steps),
                    "--eval-every", "4", "--device", {DEVICE!r}, "--dtype", {dtype!r}, *flags)
"""
    done = python("-c", code, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    saved = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    assert len(saved["rng"][0]) == (2 if GPU else 1)  # of the CPU and of the GPU


# -------------------------------------------- memory --------------------------------------------
def loss_memory(monkeypatch, name, local, world, dim=128):
    """Peak of forward and backward on one of `world` processes; what it would gather is made up."""
    torch.manual_seed(0)
    a, b = (torch.randn(local, dim, device=DEVICE, requires_grad=True) for _ in range(2))
    others = torch.nn.functional.normalize(torch.randn((world - 1) * local, dim, device=DEVICE), dim=1)
    module = clip if name == "clip_loss" else simclr
    monkeypatch.setattr(module, "all_gather", lambda x: torch.cat([x, others]))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    scale = 14.0 if name == "clip_loss" else 0.1
    return peak(lambda: getattr(module, name)(a, b, scale).backward())


def test_the_cpu_does_not_wait_for_the_gpu():
    """In MoCo's queue, DINOv2's stochastic depth and the masked patches of iBOT, forward and backward: PyTorch tells of any
    wait."""
    encoders = [torch.nn.Sequential() for _ in range(2)]
    for encoder in encoders:
        encoder.add_module("fc", torch.nn.Linear(6, 3))
    model, keys = moco.MoCo(*encoders, queue_size=8).to(DEVICE), torch.randn(4, 3, device=DEVICE)
    block, x = dinov2.Block(48, 3, drop_path=0.5).to(DEVICE), torch.randn(4, 5, 48, device=DEVICE)
    u = torch.tensor([[0.1, 0.9], [0.7, 0.2], [0.8, 0.8], [0.3, 0.4]])
    sizes = dict(arch="vit_micro_patch8", image_size=32, local_crops=0, out_dim=32, hidden_dim=32)
    student, mask = ibot.build_model(ibot.Args(**sizes)).to(DEVICE), torch.rand(4, 16) < 0.4
    inputs = [torch.randn(2, 3, 32, 32, device=DEVICE) for _ in range(2)], mask.to(DEVICE), positions(mask).to(DEVICE)

    def masked_patches():
        _, patches, _, whole = student(*inputs)
        ibot.patch_loss(patches, whole, *inputs[1:], student.center2, 0.04).backward()

    masked_patches()
    block(x, u).sum().backward()  # the first call may prepare something
    tell = torch.cuda.set_sync_debug_mode if GPU else lambda mode: None
    tell("error")
    try:
        model.enqueue(keys)
        block(x, u).sum().backward()
        masked_patches()
    finally:
        tell("default")
    assert model.queue_ptr.item() == 4


@pytest.mark.parametrize("name", ["clip_loss", "nt_xent_loss"])
def test_memory_of_a_loss_grows_with_local_times_global(monkeypatch, record_property, name):
    """With the global batch of B at b a process: twice the processes are twice the memory, not four times."""
    sizes = {(local, world): loss_memory(monkeypatch, name, local, world)
             for local, world in ((512, 8), (512, 16), (1024, 8), (256, 32))}  # fmt: skip
    for (local, world), size in sizes.items():
        record_property(f"{name}, b = {local}, B = {local * world}: MiB", round(size / 2**20, 1))
        matrices = size / (4 * local * local * world)  # float32 matrices of (b, B)
        assert matrices < (8 if name == "clip_loss" else 16)
    assert 1.6 < sizes[512, 16] / sizes[512, 8] < 2.4  # B doubled
    assert 3.2 < sizes[1024, 8] / sizes[512, 8] < 4.8  # both doubled
    assert 0.8 < sizes[256, 32] / sizes[512, 8] < 1.25  # b halved, B doubled: the same product


ACCUMULATES = {"clip": [], "slip": [], "align": ["--bn-group", "8"], "dino": [], "ibot": [], "dinov2": ["--koleo-group", "8"]}


@pytest.mark.parametrize("name", METHODS)
def test_peak_memory_of_a_step(name, photos, tmp_path, record_property):
    """Recorded (pytest --junitxml keeps it); exact accumulation needs less than the batch at once."""
    sizes = {}
    for accum in (1, 4) if name in ACCUMULATES else (1,):
        flags = ["--batch-size", "32", "--image-size", "96", "--max-steps", "2", "--accum-steps", str(accum)]
        flags += ACCUMULATES.get(name, [])
        sizes[accum] = peak(lambda f=flags, a=accum: losses(name, photos, tmp_path / f"accum{a}", *f))
        record_property(f"{name}, {accum} pieces: MiB", round(sizes[accum] / 2**20, 1))
        print(f"{name}, batch 32 of 96 pixels in {accum} pieces: {sizes[accum] / 2**20:.0f} MiB at most")
    if GPU and 4 in sizes:
        assert sizes[4] < 0.8 * sizes[1]
    assert all(size > 2**20 for size in sizes.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_fine_tuning(dtype):
    """Mixing, erasing, drop path and averages on the device; the gradient scaler with fp16."""
    flags = {**QUICK, **TRANSFORMER, "dtype": dtype, "epochs": 6, "ema": 0.5}
    model, rows = finetune.fine_tune(vit().to(DEVICE), Toy(160), VIEW, 3, Args(**flags), torch.device(DEVICE))
    assert rows[-1]["loss"] < 0.85 * rows[0]["loss"] and next(model.parameters()).dtype == torch.float32


# -------------------------------------------- mistakes --------------------------------------------
def test_a_gpu_that_is_not_there():
    with pytest.raises(common.UserError, match="cuda:99"):
        common.init_distributed("cuda:99")


def test_too_little_memory_is_a_sentence():
    allocate = (
        "torch.empty(2**44, device='cuda')" if GPU else "raise torch.OutOfMemoryError('out of memory. x')"
    )
    done = python("-c", f"import torch, common\nwith common.user_errors():\n    {allocate}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "out of memory: lower --batch-size" in done.stderr


if __name__ == "__main__":  # under torchrun
    gather_and_run(*sys.argv[1:])
