"""docs/scale.md: its formulas against the code and against what was measured; its Slurm script."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import clip
import slip
from copies import ROOT
from run import parse_args

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import scale  # noqa: E402

PAGE = (ROOT / "docs/scale.md").read_text()
MODULES = {"clip": clip, "slip": slip}


@pytest.mark.parametrize("plan", scale.PLANS, ids=lambda plan: plan.title)
def test_plans_are_what_their_commands_train(plan):
    script, *words = plan.command.split()
    module = MODULES[script.removesuffix(".py")]
    args = parse_args(module.Args, module.RECIPES, words)
    assert (args.epochs, args.batch_size) == (plan.epochs, plan.batch)
    with torch.device("meta"):
        model = module.build_model(args)
    assert sum(p.numel() for p in model.parameters()) == plan.parameters
    assert plan.gathered == 2 * model.text_projection.shape[1] + 2 * getattr(args, "ssl_emb_dim", 0)


def test_matrices_are_as_large_as_recorded():
    found = json.loads((ROOT / "results/loss_memory.json").read_text())["results"]
    clip_bytes, ssl_bytes = (round(found[name][-1]["matrix_bytes_per_b_x_B"])
                             for name in ("clip_loss", "nt_xent_loss"))  # fmt: skip
    for plan in scale.PLANS:
        assert plan.matrix == clip_bytes + ssl_bytes * plan.command.startswith("slip")


@pytest.fixture
def eight(monkeypatch):
    """A process that believes itself one of eight -> bytes that it sends in a ring."""
    dist.init_process_group("fake", rank=3, world_size=8, store=FakeStore())
    sent = []
    monkeypatch.setattr(dist, "all_gather", lambda parts, x: sent.append(7 * x.nbytes))
    monkeypatch.setattr(dist, "all_reduce", lambda x: sent.append(2 * 7 * x.nbytes / 8))
    yield sent
    dist.destroy_process_group()


def test_features_on_the_wire(eight):
    b, parts = 4, {"clip": (512, 512), "slip": (512, 512, 256, 256)}
    for name, widths in parts.items():
        eight.clear()
        features = [torch.randn(b, width, requires_grad=True) for width in widths]
        loss = clip.clip_loss(*features[:2], 10.0)
        if name == "slip":
            loss = loss + slip.nt_xent_loss(*features[2:], 0.1)
        loss.backward()
        assert sum(eight) == scale.feature_bytes(8, 8 * b, sum(widths))


SIDES = {"clip_b32": (32, 12, 768, 512, 1, 20), "clip_b16": (16, 12, 768, 512, 1, 20),
         "clip_l14": (14, 24, 1024, 768, 1, 20), "slip_b16": (16, 12, 768, 512, 3, 18)}  # fmt: skip


def forward_flops(name, saves):
    """Of a pair, by the formulas of the page."""
    patch, layers, width, text_width, images, each = SIDES[name]
    grid = (224 // patch) ** 2
    image = scale.forward_flops(layers, width, grid + 1) + 2 * grid * 3 * patch**2 * width
    image -= saves * scale.saved_flops(width, grid + 1, each)
    text = scale.forward_flops(12, text_width, 77) - saves * scale.saved_flops(text_width, 77, 20)
    return images * image + text


def test_operations_are_those_that_were_counted():
    """Records that do not name their source are of a time when the last block computed all tokens."""
    rows, _ = scale.measured()
    assert len(rows.keys() & SIDES.keys()) >= 3
    for name in rows.keys() & SIDES.keys():
        forward = forward_flops(name, saves="source" in rows[name])
        assert 3e-9 * forward == pytest.approx(rows[name]["gflop_per_image"], rel=0.02), name


@pytest.mark.parametrize("name", SIDES)
def test_operations_are_those_of_the_code(name):
    method, flags = gpu.MODELS[name]
    args = parse_args(MODULES[method].Args, MODULES[method].RECIPES, flags.split())
    with torch.device("meta"):
        model, pixels = MODULES[method].build_model(args), torch.rand(1, 3, 224, 224)
        ids = torch.zeros(1, 77, dtype=torch.long)
        with FlopCounterMode(display=False) as image:
            model.encode_image(pixels)
        with FlopCounterMode(display=False) as text:
            model.encode_text(ids)
    found = SIDES[name][4] * image.get_total_flops() + text.get_total_flops()
    assert forward_flops(name, saves=True) == pytest.approx(found, rel=1e-3)
    assert forward_flops(name, saves=False) > 1.02 * found  # so that it makes a difference


def test_a_record_that_is_continued_names_the_source_of_each_step(tmp_path, monkeypatch):
    """The last step of a model that was measured counts, and one without memory is none."""
    (tmp_path / "results/gpu").mkdir(parents=True)
    (tmp_path / "results/augment.json").symlink_to(ROOT / "results/augment.json")
    step = {"part": "steps", "mode": "eager", "images_per_s": 1.0}
    rows = [{"part": "machine"}, step | {"model": "clip_b16"}, step | {"model": "clip_b32"},
            {"part": "machine", "source": "abcd"}, step | {"model": "clip_b32"},
            {"part": "steps", "mode": "eager", "model": "clip_b16", "error": "out of memory"}]  # fmt: skip
    (tmp_path / "results/gpu/gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(scale, "ROOT", tmp_path)
    assert scale.measured()[0] == {"clip_b16": rows[1], "clip_b32": rows[4] | {"source": "abcd"}}


def test_one_gpu_is_what_was_measured():
    """With the measured batch alone on a GPU the formulas give the measured peak and rate."""
    rows, worker_ms = scale.measured()
    for plan in scale.PLANS:
        row = rows[plan.measured]
        plan = scale.Plan(**{**vars(plan), "batch": row["batch"]})
        found = scale.costs(plan, 1, row, worker_ms)
        assert found["gib"] == pytest.approx(row["peak_gib"])
        assert found["pairs_per_s"] == pytest.approx(row["images_per_s"])
        assert found["features_mb"] == found["gradients_mb"] == 0
        assert found["gpu_hours"] == pytest.approx(plan.pairs * plan.epochs / row["images_per_s"] / 3600)


def test_each_table_says_how_it_was_measured(monkeypatch):
    """slip.py's recipe has turned activation checkpointing on, and gpu.py measures what the recipe says."""
    (rows, worker_ms), said = scale.measured(), "Measured without activation checkpointing."
    kept = [rows[plan.measured].get("grad_checkpointing", "none") for plan in scale.PLANS]
    assert PAGE.count(said) == kept.count("none")
    slip_row = rows["slip_b16"]
    if "grad_checkpointing" not in slip_row:  # of a time before: its peak says the same
        gib = {row["command"]: row["gib"]["peak"] for row in json.loads((ROOT / "results/memory.json").read_text())["rows"]}
        none, selective = gib["slip.py --data yfcc15m --grad-checkpointing none"], gib["slip.py --data yfcc15m"]
        assert abs(slip_row["peak_gib"] - none) < abs(slip_row["peak_gib"] - selective)
    fresh = rows | {"slip_b16": slip_row | {"grad_checkpointing": "selective"}}
    monkeypatch.setattr(scale, "measured", lambda: (fresh, worker_ms))
    first, *others = scale.tables().split("### ")[1:]
    assert "Measured with selective activation checkpointing." in first and all(said in text for text in others)


def test_numbers_in_the_text():
    logits = 8 * 4096 * 32768 / scale.GIB
    assert logits == 1 and "1 GiB for CLIP with 4,096 of 32,768 pairs" in PAGE
    assert 40 * 400e6 == 16e9 and 40 * 5e9 == 200e9 and "16 GB for 400 million\n  pairs and 200 GB" in PAGE
    _, worker_ms = scale.measured()
    assert f"{worker_ms:.1f} ms for two views" in PAGE and f"{1800 * worker_ms / 1e3:.1f} cores" in PAGE
    b32 = next(plan for plan in scale.PLANS if plan.measured == "clip_b32")
    found = scale.costs(b32, 256, scale.measured()[0]["clip_b32"], worker_ms)
    assert found["b"] == 128 and found["wire_ms"] == pytest.approx(found["compute_ms"], rel=0.1)
    shares = [scale.measured()[0][plan.measured]["mfu"] for plan in scale.PLANS]
    assert f"{100 * min(shares):.0f} to {100 * max(shares):.0f}%" in PAGE


def test_photos_are_as_large_as_stated():
    pytest.importorskip("sklearn", reason="the two photos are its own")
    import augment

    sizes = [len(file) for file in augment.photos()]
    assert sum(sizes) / len(sizes) == pytest.approx(scale.PICTURE, rel=0.03)


@pytest.mark.parametrize("outcome", ["ends", "saves", "fails"])
def test_slurm_script(tmp_path, outcome):
    """It comes back exactly if the run did not end but has saved a checkpoint."""
    (script,) = re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
    run, bin = tmp_path / "run", tmp_path / "bin"
    run.mkdir()
    bin.mkdir()
    (run / "checkpoint.pt").write_text("of the time before")
    os.utime(run / "checkpoint.pt", (1, 1))
    save = f"sleep 0.05; touch {run}/checkpoint.pt; " if outcome == "saves" else ""
    srun = f'echo "$@" > {tmp_path}/srun; echo $TORCH_ELASTIC_SHUTDOWN_TIMEOUT > {tmp_path}/seconds; {save}'
    stubs = {"srun": f'{srun}exit {0 if outcome == "ends" else 1}',
             "scontrol": f'echo "$@" >> {tmp_path}/scontrol; [ $1 != show ] || printf "a1\\na2\\n"'}  # fmt: skip
    for name, text in stubs.items():
        (bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin / name).chmod(0o755)
    env = {"PATH": f"{bin}:{os.environ['PATH']}", "RUN": str(run), "SLURM_JOB_ID": "7", "SLURM_NNODES": "8",
           "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_CPUS_PER_TASK": "96"}  # fmt: skip
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    words = (tmp_path / "srun").read_text().split()
    assert "--rdzv_endpoint=a1:29500" in words and words[words.index("--output-dir") + 1] == str(run)
    assert words[0] == "--cpus-per-task=96"  # which Slurm 22.05 and later do not hand on to srun
    seconds, warned = int((tmp_path / "seconds").read_text()), int(re.search("--signal=TERM@([0-9]+)", script)[1])
    assert 30 < seconds < warned  # torchrun's 30 are too few for a large model, and afterwards Slurm kills it
    assert "\n#SBATCH --dependency=singleton\n" in script  # or a second job would come back while the first one saves
    assert ("requeue 7" in (tmp_path / "scontrol").read_text()) == (outcome == "saves")
    assert (done.returncode == 0) == (outcome != "fails")
