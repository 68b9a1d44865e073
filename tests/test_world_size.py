"""The same run everywhere: loss, gradient and a 20-step curve do not depend on the number of processes."""

import json

import pytest
import torch

from runs import METHODS, argv_of, environment, make_photos, rows, train_here

NAMES = [*METHODS, "clip_resnet", "declip_resnet"]
VARIANTS = {name: (name, []) for name in NAMES} | {
    "clip_accum": ("clip", ["--accum-steps", "2"]),
    "slip_accum": ("slip", ["--accum-steps", "2"]),
    "declip_released": ("declip", ["--released"]),
    "dino_accum": ("dino", ["--accum-steps", "2"]),
    # Batch norm over fewer than eight values amplifies rounding. Groups: one in all; two, which four processes share
    "moco": ("moco", ["--bn-group", "8"]),
    "moco_v1": ("moco", ["--version", "1", "--bn-group", "8", "--batch-size", "16", "--queue-size", "48", "--epochs", "8"]),
    "mocov3_resnet": ("mocov3", ["--arch", "resnet18", "--stem", "imagenet", "--optimizer", "lars"]),
    "moco_symmetric": ("moco", ["--symmetric", "--queue-size", "48", "--bn-group", "8"]),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every variant on 1, 2 and 4 processes, started once for all of them: (variant, processes) -> directory, grads."""
    import subprocess

    root = tmp_path_factory.mktemp("world")
    photos, out = make_photos(root / "photos"), {}
    for processes in (1, 2, 4):
        jobs = [(name, str(photos), str(root / f"{variant}_{processes}"), [*flags, "--max-steps", "20"])
                for variant, (name, flags) in VARIANTS.items()]  # fmt: skip
        if processes == 1:
            for variant, job in zip(VARIANTS, jobs):
                out[variant, 1] = job[2], train_here(*job[:3], *job[3])
            continue
        argv = argv_of("tests/runs.py", json.dumps(jobs), processes=processes)
        done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        for variant, job in zip(VARIANTS, jobs):
            out[variant, processes] = job[2], torch.load(f"{job[2]}/grads.pt", weights_only=True)
    return out


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_run_on_more_processes(results, variant, processes):
    (one, one_grads), (many, many_grads) = results[variant, 1], results[variant, processes]
    losses = [[row["loss"] for row in rows(directory) if "loss" in row] for directory in (one, many)]
    assert len(losses[0]) == 20 and len(set(losses[0])) > 15  # it moves
    atol = 1e-5 if variant == "simsiam" else 0  # a cosine near 0
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=atol)
    largest = max(g.abs().max() for g in one_grads)
    for a, b in zip(one_grads, many_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(largest))


@pytest.mark.parametrize("name", ["clip", "slip", "dino"])
def test_accumulation_is_exact(results, name):
    (plain, plain_grads), (accum, accum_grads) = results[name, 1], results[f"{name}_accum", 1]
    assert rows(plain)[0]["loss"] == pytest.approx(rows(accum)[0]["loss"], rel=1e-6)
    for a, b in zip(plain_grads, accum_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_no_gather_grad_differs_only_with_processes(tmp_path):
    """--no-gather-grad is official SLIP: with one process nothing changes, the golden test holds its two-process values."""
    photos = make_photos(tmp_path / "photos")
    exact = train_here("slip", photos, tmp_path / "a", "--max-steps", "1")
    official = train_here("slip", photos, tmp_path / "b", "--max-steps", "1", "--no-gather-grad")
    assert all(torch.equal(a, b) for a, b in zip(exact, official, strict=True))
