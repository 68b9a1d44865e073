"""10 steps are 5 + 5, bit for bit, in metrics.jsonl and in every tensor of the checkpoint."""

import shutil
import signal
import subprocess
import time

import pytest
import torch

from runs import FLAGS, METHODS, argv_of, command, environment, make_photos, rows, train_here


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


def tensors(content, path=""):
    """Every leaf of a checkpoint by path, without what may differ: where it lies and how far it was to go."""
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    else:
        return {path: content}
    leaves = {}
    for key, value in items:
        if key not in ("output_dir", "max_steps", "workers"):
            leaves |= tensors(value, f"{path}/{key}")
    return leaves


def assert_same_run(a, b):
    assert rows(a) == rows(b) and len(rows(a)) > 5
    first, second = (tensors(torch.load(d / "checkpoint.pt", weights_only=True)) for d in (a, b))
    assert first.keys() == second.keys() and len(first) > 20
    for path, value in first.items():
        same = torch.equal(value, second[path]) if isinstance(value, torch.Tensor) else value == second[path]
        assert same, path


@pytest.mark.parametrize("name", METHODS)
def test_five_and_five(name, photos, tmp_path):
    train_here(name, photos, tmp_path / "whole", "--max-steps", "10", "--eval-every", "4")
    train_here(name, photos, tmp_path / "parts", "--max-steps", "5", "--eval-every", "4")
    assert rows(tmp_path / "parts")[-1]["step"] == 5
    train_here(name, photos, tmp_path / "parts", "--max-steps", "10", "--eval-every", "4", "--workers", "1")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def start(name, photos, directory, *flags, processes=1):
    argv = argv_of(f"{name}.py", "--data", photos, "--output-dir", directory, *FLAGS[name], *flags, processes=processes)
    return subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)  # fmt: skip


def wait_for_step(directory, step, seconds=120):
    deadline = time.time() + seconds
    while time.time() < deadline:
        if (directory / "metrics.jsonl").exists() and any(row["step"] >= step for row in rows(directory)):
            return
        time.sleep(0.05)
    raise TimeoutError(f"step {step} was not reached")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_continued(photos, tmp_path, processes, number):
    """SLIP holds everything a checkpoint can hold of the three methods: two encoders, batch norm, AdamW."""
    flags = ["--save-every", "2", "--eval-every", "0", "--max-steps", "20"]
    done = command("slip.py", "--data", photos, "--output-dir", tmp_path / "whole", *FLAGS["slip"], *flags,
                   processes=processes)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    process = start("slip", photos, tmp_path / "killed", *flags, processes=processes)
    wait_for_step(tmp_path / "killed", 3)
    if number == signal.SIGKILL:
        subprocess.run(["pkill", "-9", "-f", str(tmp_path / "killed")])  # torchrun and all it started
    else:
        process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    if number == signal.SIGTERM:
        launcher = f"torchrun --nproc_per_node={processes}" if processes > 1 else "python"
        assert f"continue with: {launcher} " in output and "Traceback" not in output.split("torch/distributed")[0]
    assert torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["step"] < 20
    done = command("slip.py", "--data", photos, "--output-dir", tmp_path / "killed", *FLAGS["slip"], *flags,
                   processes=processes)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_refused_when_arguments_changed(photos, tmp_path):
    train_here("simclr", photos, tmp_path / "run", "--max-steps", "1")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    done = command("simclr.py", "--data", photos, "--output-dir", tmp_path / "run", *FLAGS["simclr"], "--base-lr", "2",
                   "--seed", "3")  # fmt: skip
    assert done.returncode == 2 and "base_lr" in done.stderr and "seed" in done.stderr and "Traceback" not in done.stderr
    done = command("slip.py", "--data", photos, "--output-dir", tmp_path / "run", *FLAGS["slip"])
    assert done.returncode == 2 and "method=simclr" in done.stderr
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


def test_a_full_disk_leaves_the_old_checkpoint(photos, tmp_path):
    train_here("simclr", photos, tmp_path / "run", "--max-steps", "2")
    old = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    shutil.rmtree(tmp_path / "small", ignore_errors=True)
    limit = len(old) // 2  # bytes a file may have: writing the next checkpoint fails in the middle
    code = (f"import resource, runs; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); import common\n"
            f"with common.user_errors(): runs.train_here('simclr', {str(photos)!r}, {str(tmp_path / 'run')!r}, '--max-steps', '4')")
    done = subprocess.run([argv_of("")[0], "-c", code], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "free some space" in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == old
    assert not list((tmp_path / "run").glob("*.tmp"))
    train_here("simclr", photos, tmp_path / "run", "--max-steps", "4")


def test_two_processes_in_one_directory(photos, tmp_path):
    process = start("simclr", photos, tmp_path / "run", "--max-steps", "500", "--epochs", "500")
    try:
        wait_for_step(tmp_path / "run", 1)
        done = command("simclr.py", "--data", photos, "--output-dir", tmp_path / "run", *FLAGS["simclr"], "--epochs", "500")
        assert done.returncode == 2 and "in use" in done.stderr
    finally:
        process.kill()
        process.communicate()
