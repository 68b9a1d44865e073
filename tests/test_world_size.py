"""The same run everywhere: loss, gradient and a 12-step curve do not depend on the number of processes."""

import contextlib
import copy
import json
import subprocess

import pytest
import torch

from common import GlooSyncBatchNorm
from runs import METHODS, RESNET, argv_of, environment, float64, make_photos, rows, train_here

NAMES = [*METHODS, "clip_resnet", "declip_resnet"]
VARIANTS = {name: (name, []) for name in NAMES} | {
    "clip_accum": ("clip", ["--accum-steps", "2"]),
    "slip_accum": ("slip", ["--accum-steps", "2"]),
    "clip_checkpointed": ("clip", ["--grad-checkpointing", "full"]),
    "align_groups": ("align", ["--bn-group", "2"]),
    "align_groups_accum": ("align", ["--bn-group", "2", "--accum-steps", "2"]),
    "declip_released": ("declip", ["--released"]),
    "dino_accum": ("dino", ["--accum-steps", "2"]),
    "ibot_accum": ("ibot", ["--accum-steps", "2"]),
    "dinov2_sinkhorn": ("dinov2", ["--centering", "sinkhorn", "--no-shared-head", "--koleo-group", "4", "--mask-prob", "0.3",
                                   "--grad-checkpointing", "selective"]),  # fmt: skip
    "dinov2_pairs": ("dinov2", ["--koleo-group", "2"]),  # of KoLeo, which lie in one piece
    "dinov2_pairs_accum": ("dinov2", ["--koleo-group", "2", "--accum-steps", "2"]),
    "mocov3_resnet": ("mocov3", [*RESNET, "--optimizer", "lars"]),
    "simsiam": ("simsiam", ["--base-lr", "0.05"]),
    "dino_resnet": ("dino", [*RESNET, "--head-bn", "--optimizer", "sgd"]),
    # One group of 8, which the processes share; two groups, one for each of two processes (groups of 4 are chaotic)
    "moco": ("moco", ["--bn-group", "8"]),
    "moco_symmetric": ("moco", ["--bn-group", "8", "--symmetric", "--queue-size", "48"]),
    "moco_v1": ("moco", ["--bn-group", "8", "--version", "1", "--batch-size", "16", "--queue-size", "48", "--epochs", "8"]),
}
# Batch norm over a few values magnifies float32's rounding, up to 1e-2 within 20 steps: float64 is compared all the closer
PRECISE = {"align", "clip_resnet", "declip_resnet", "simclr", "byol", "simsiam", "mocov3_resnet", "dino_resnet", "moco", "moco_symmetric", "moco_v1",
           "align_groups", "align_groups_accum"}  # fmt: skip


# A method's curve has two epochs, an evaluation between them; its variants differ in a step, and 8 of them show it
STEPS = {v: ["--max-steps", "12"] if v in METHODS else ["--max-steps", "8", "--eval-every", "0"] for v in VARIANTS}
STEPS["declip_resnet"] = ["--max-steps", "4", "--eval-every", "0"]  # a step of this large network takes ten times as long
FOUR = ["--max-steps", "6", "--eval-every", "0"]  # on four processes: the first steps of the same curve
CASES = [(v, n) for v in VARIANTS for n in (2, 4) if n == 2 or v in (*METHODS, "clip_resnet")]  # other variants on 2 only


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """Every variant that a chosen test names on 1, 2 and 4 processes, started once for all of them:
    (variant, processes) -> directory, grads."""
    uses = [item.callspec.params for item in request.session.items if "results" in getattr(item, "fixturenames", ())]
    wanted = {value for params in uses for value in params.values()}
    root, out = tmp_path_factory.mktemp("world"), {}
    photos = make_photos(root / "photos")
    for processes in (1, 2, 4):
        chosen = [v for v in VARIANTS if v in wanted and (processes == 1 or (v, processes) in CASES)]
        steps = {v: FOUR if processes == 4 else STEPS[v] for v in chosen}
        jobs = [(VARIANTS[v][0], str(photos), str(root / f"{v}_{processes}"), [*VARIANTS[v][1], *steps[v]], v in PRECISE)
                for v in chosen]  # fmt: skip
        if processes == 1:
            for variant, (name, _, directory, flags, precise) in zip(chosen, jobs):
                with float64() if precise else contextlib.nullcontext():
                    out[variant, 1] = directory, train_here(name, photos, directory, *flags)
            continue
        argv = argv_of("tests/runs.py", json.dumps(jobs), processes=processes)
        done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        for variant, job in zip(chosen, jobs):
            out[variant, processes] = job[2], torch.load(f"{job[2]}/grads.pt", weights_only=True)
    return out


@pytest.mark.parametrize("variant, processes", CASES)
def test_same_run_on_more_processes(results, variant, processes):
    (one, one_grads), (many, many_grads) = results[variant, 1], results[variant, processes]
    losses = [[row["loss"] for row in rows(directory) if "loss" in row] for directory in (one, many)]
    assert len(losses[1]) == int((FOUR if processes == 4 else STEPS[variant])[1])
    losses[0] = losses[0][: len(losses[1])]
    assert len(set(losses[0])) > 0.75 * len(losses[0])  # it moves
    rtol, atol = (1e-9, 1e-10) if variant in PRECISE else (1e-4, 1e-5)
    torch.testing.assert_close(*(torch.tensor(curve, dtype=torch.float64) for curve in losses), rtol=rtol, atol=0)
    # What is logged beside the loss is of the global batch too, features' spread and teachers' entropy for example
    first, same = ([row for row in rows(directory) if "loss" in row][0] for directory in (one, many))
    assert first.keys() == same.keys()
    for name in first:
        assert same[name] == pytest.approx(first[name], rel=10 * rtol, abs=1e-5), name
    largest = max(g.abs().max() for g in one_grads)
    for a, b in zip(one_grads, many_grads, strict=True):
        assert a.dtype == (torch.float64 if variant in PRECISE else torch.float32)
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol * float(largest))


@pytest.mark.parametrize("variant, whole", [(v, v.removesuffix("_accum")) for v in VARIANTS if v.endswith("_accum")])
def test_accumulation_is_exact(results, variant, whole):
    (plain, plain_grads), (accum, accum_grads) = results[whole, 1], results[variant, 1]
    first, second = ([row["loss"] for row in rows(run) if "loss" in row][0] for run in (plain, accum))
    assert first == pytest.approx(second, rel=1e-6)
    for a, b in zip(plain_grads, accum_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_on_cpus_is_torch_s(affine):
    """In one process, which has the whole batch: outputs, gradients and running statistics, of images and of vectors."""
    for plain, shape in ((torch.nn.BatchNorm2d, (5, 3, 4, 2)), (torch.nn.BatchNorm1d, (5, 3))):
        theirs = plain(3, eps=1e-3, momentum=0.2, affine=affine)
        ours = copy.deepcopy(theirs)
        ours.__class__ = GlooSyncBatchNorm
        for mode in (True, True, False):
            x = 3 * torch.randn(shape) + 1
            both = [x.clone().requires_grad_(), x.clone().requires_grad_()]
            outputs = [net.train(mode)(y) for net, y in zip((theirs, ours), both)]
            for output in outputs:
                output.square().mul(torch.arange(len(x)).view(-1, *[1] * (x.ndim - 1))).sum().backward()
            torch.testing.assert_close(*outputs)
            torch.testing.assert_close(*(y.grad for y in both), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("variant, processes", [("align_groups", 2)])
def test_running_statistics_are_the_mean_over_all_processes(results, variant, processes):
    """Batch norm over groups sees one process alone, its running statistics average all of them."""
    paths = [f"{results[variant, n][0]}/checkpoint.pt" for n in (1, processes)]
    one, two = (torch.load(path, weights_only=True)["model"] for path in paths)
    names = [name for name in one if "running" in name]
    assert len(names) > 20
    for name in names:
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-8)


def test_no_gather_grad_differs_only_with_processes(tmp_path):
    """--no-gather-grad is official SLIP: with one process nothing changes, the golden test holds its two-process values."""
    photos = make_photos(tmp_path / "photos")
    exact = train_here("slip", photos, tmp_path / "a", "--max-steps", "1")
    official = train_here("slip", photos, tmp_path / "b", "--max-steps", "1", "--no-gather-grad")
    assert all(torch.equal(a, b) for a, b in zip(exact, official, strict=True))
