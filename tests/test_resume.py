"""10 steps are 5 + 5, bit for bit, in metrics.jsonl and in every tensor of the checkpoint."""

import contextlib
import errno
import fcntl
import importlib
import importlib.metadata
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from command import main
from common import UserError
from data import Loader, decode, open_dataset
from run import Run, replace_text
from runs import FLAGS, METHODS, argv_of, command, environment, make_photos, module_of, rows, train_here


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


def test_random_weights_are_evaluated_once(photos, tmp_path, capsys):
    """As step 0 of the log, also when a run starts anew after it was killed, and the end repeats it."""
    for _ in range(2):
        train_here("clip", photos, tmp_path / "run", "--max-steps", "2", "--eval-every", "2")
        (tmp_path / "run/checkpoint.pt").unlink()
    found = [row for row in rows(tmp_path / "run") if "recall@1" in row]
    assert [row["step"] for row in found] == [0, 2]
    before, after = (row["recall@1"] for row in found)
    assert f"recall@1 {after:.1f} (random weights {before:.1f}, chance 8.33)" in capsys.readouterr().out
    train_here("clip", photos, tmp_path / "other", "--max-steps", "2", "--eval-every", "0")
    assert [row["step"] for row in rows(tmp_path / "other") if "recall@1" in row] == [2]
    assert f"recall@1 {after:.1f} (chance 8.33)" in capsys.readouterr().out


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


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """Runs that nothing ends early, each for all tests that compare with it: (method, processes) -> directory."""
    found = {}

    def run_of(name, processes, *flags):
        if (name, processes) not in found:
            found[name, processes] = directory = tmp_path_factory.mktemp("whole") / name
            argv = ["--data", photos, "--output-dir", directory, *FLAGS[name], *flags]
            done = command(f"{name}.py", *argv, processes=processes)
            assert done.returncode == 0, done.stderr[-2000:]
        return found[name, processes]

    return run_of


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("name, processes", [("slip", 1), ("moco", 2)])
def test_killed_and_continued(photos, whole, tmp_path, name, processes, number):
    """SLIP: two encoders, batch norm, AdamW. MoCo: a queue that all processes hold, batch norm that they share."""
    flags = ["--save-every", "2", "--eval-every", "0", "--max-steps", "20"]
    process = start(name, photos, tmp_path / "killed", *flags, processes=processes)
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
    done = command(f"{name}.py", "--data", photos, "--output-dir", tmp_path / "killed", *FLAGS[name], *flags,
                   processes=processes)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(whole(name, processes, *flags), tmp_path / "killed")


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


def test_a_run_that_has_come_further_is_left_alone(photos, tmp_path, capsys):
    train_here("simclr", photos, tmp_path / "run", "--max-steps", "3")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.name != "curves.png"}
    capsys.readouterr()
    for steps in "3", "2":
        train_here("simclr", photos, tmp_path / "run", "--max-steps", steps)
        assert f"{steps} steps, continued at 3, which leaves nothing to do" in capsys.readouterr().out
        assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.name != "curves.png"}


@pytest.mark.parametrize("change, was, now", [("fewer rows", 52, 51), ("another picture", 52, 52), ("another caption", 52, 52)])
def test_refused_when_the_data_changed(tmp_path, change, was, now):
    photos = make_photos(tmp_path / "photos")
    train_here("simclr", photos, tmp_path / "run", "--max-steps", "1")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    lines = (photos / "train.jsonl").read_text().splitlines()
    if change == "fewer rows":
        lines = lines[:-1]
    elif change == "another picture":
        shutil.copy(photos / "3.png", photos / "0.png")
    else:
        lines[0] = json.dumps({"image": "0.png", "captions": ["something else"]})
    (photos / "train.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError) as error:
        train_here("simclr", photos, tmp_path / "run", "--max-steps", "2")
    assert re.search(rf"trained on {was} samples .* holds {now} samples", str(error.value))
    checksums = set(re.findall("checksum ([0-9a-f]{8})", str(error.value)))
    assert len(checksums) == 2 or change == "fewer rows"  # the last of 52 samples is none of the 32
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_refused_when_bytes_of_the_checkpoint_changed(photos, tmp_path, part):
    """They would be weights like any others, and the loss not a number some steps later."""
    train_here("simclr", photos, tmp_path / "run", "--max-steps", "1")
    saved = bytearray((tmp_path / "run" / "checkpoint.pt").read_bytes())
    start = int(part * len(saved))
    saved[start : start + 64] = random.Random(0).randbytes(64)
    (tmp_path / "run" / "checkpoint.pt").write_bytes(saved)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 1  # torch does not notice
    with pytest.raises(UserError, match="checkpoint.pt .* is damaged"):
        train_here("simclr", photos, tmp_path / "run", "--max-steps", "2")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == saved


def test_two_processes_in_one_directory(photos, tmp_path):
    process = start("simclr", photos, tmp_path / "run", "--epochs", "1000000")  # it must not end before the other has begun
    try:
        wait_for_step(tmp_path / "run", 1)
        done = command("simclr.py", "--data", photos, "--output-dir", tmp_path / "run", *FLAGS["simclr"], "--epochs", "1000000")
        sentence = f"{tmp_path}/run is in use by another run: use another --output-dir"
        assert done.returncode == 2 and done.stderr.strip().endswith(sentence)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("missing", ["a file system without locks", "Windows"])
def test_a_run_without_locks(missing, photos, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if missing == "Windows":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "lockf", refuse)
    train_here("simclr", photos, tmp_path / "run", "--max-steps", "1", "--eval-every", "0")
    assert (tmp_path / "run/checkpoint.pt").exists()


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A folder of train and val with a folder for each of two classes, so that runs evaluate."""
    folder, shapes = tmp_path_factory.mktemp("classes"), open_dataset("flocks")
    for i in range(40):
        part = folder / ("train" if i < 28 else "val") / ("even" if i % 2 == 0 else "odd")
        part.mkdir(parents=True, exist_ok=True)
        to_pil_image(decode(shapes[i].image)).save(part / f"{i}.png")
    return folder


def test_a_tokenizer_that_was_learnt_again_is_not_put_under_old_weights(tmp_path):
    """The fingerprint looks at 32 samples; words of another one change the ids of all."""
    photos = make_photos(tmp_path / "photos")
    train_here("clip", photos, tmp_path / "run", "--max-steps", "1", "--eval-every", "0")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    lines = (photos / "train.jsonl").read_text().splitlines()
    lines[1] = json.dumps({"image": "1.png", "captions": ["zebra zebra zebra"]})
    (photos / "train.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"checkpoint.pt does not have this run's tokenizer: bring back the data and files"):
        train_here("clip", photos, tmp_path / "run", "--max-steps", "2", "--eval-every", "0")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


def test_a_lost_checkpoint_costs_nothing_else(photos, tmp_path):
    """A run that begins again keeps the old log; where checkpoints were kept, it asks for one of them."""
    train_here("simclr", photos, tmp_path / "run", "--max-steps", "2", "--eval-every", "0")
    log = (tmp_path / "run/metrics.jsonl").read_bytes()
    (tmp_path / "run/checkpoint.pt").unlink()
    train_here("simclr", photos, tmp_path / "run", "--max-steps", "1", "--eval-every", "0")
    assert (tmp_path / "run/metrics_old.jsonl").read_bytes() == log and len(rows(tmp_path / "run")) < log.count(b"\n")
    second = (tmp_path / "run/metrics.jsonl").read_bytes()
    (tmp_path / "run/checkpoint.pt").unlink()
    train_here("simclr", photos, tmp_path / "run", "--max-steps", "1", "--eval-every", "0")
    assert (tmp_path / "run/metrics_old.jsonl").read_bytes() == log + second  # both logs
    (tmp_path / "run/checkpoint.pt").rename(tmp_path / "run/checkpoint_1.pt")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="run has no checkpoint.pt any more: name a copy of one of its checkpoint_STEP.pt so"):
        train_here("simclr", photos, tmp_path / "run", "--max-steps", "2", "--eval-every", "0")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    (tmp_path / "run/checkpoint_1.pt").rename(tmp_path / "run/checkpoint.pt")
    train_here("simclr", photos, tmp_path / "run", "--max-steps", "2", "--eval-every", "0")
    assert rows(tmp_path / "run")[-1]["step"] == 2


def evaluations(directory):
    return [row["step"] for row in rows(directory) if "epoch" not in row]


@pytest.mark.parametrize("name, module, function", [("simclr", "knn", "knn_eval"), ("clip", "clip", "language_eval")])
def test_an_evaluation_that_fails_loses_no_step(classes, photos, tmp_path, monkeypatch, name, module, function):
    """The last one, too: the state is saved before it. The run that continues makes it, once."""
    data = classes if name == "simclr" else photos
    flags = ["--save-every", "0", "--eval-every", "0", "--max-steps", "6"]
    train_here(name, data, tmp_path / "whole", *flags)

    def fail(*_, **__):
        raise UserError("none of 12 samples can be read")

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module(module), function, fail)
        with pytest.raises(UserError, match="none of 12"):
            train_here(name, data, tmp_path / "parts", *flags)
    assert torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)["step"] == 6
    assert evaluations(tmp_path / "parts") == []
    for _ in range(2):
        train_here(name, data, tmp_path / "parts", *flags)
        assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_saves_before_an_evaluation(classes, tmp_path, monkeypatch):
    """Which may take longer than a scheduler waits. The run that continues makes it, and not those before it again."""
    flags = ["--save-every", "0", "--eval-every", "2", "--max-steps", "6"]
    train_here("simclr", classes, tmp_path / "whole", *flags)

    def stop(run):
        run.stop = signal.SIGTERM * (run.step == 4)
        return run.stop > 0

    with monkeypatch.context() as patch:
        patch.setattr(Run, "agree_to_stop", stop)
        with pytest.raises(SystemExit):
            train_here("simclr", classes, tmp_path / "parts", *flags)
    assert evaluations(tmp_path / "parts") == [0, 2]
    train_here("simclr", classes, tmp_path / "parts", *flags)
    assert evaluations(tmp_path / "parts") == [0, 2, 4, 6]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


KEPT = ["--probe", "linear", "--eval-every", "2", "--save-every", "0", "--keep-every", "2"]


def test_kept_checkpoints_and_the_linear_probe(classes, tmp_path, monkeypatch, capsys):
    """--keep-every saves too. What it kept stays when checkpoint.pt goes on, and resuming looks at checkpoint.pt alone;
    the evaluations of a run that went on are those of one that did not stop, as on two processes."""
    train_here("dino", classes, tmp_path / "whole", *KEPT, "--max-steps", "5")
    kept = sorted(path.name for path in (tmp_path / "whole").glob("checkpoint*"))
    assert kept == ["checkpoint.pt", "checkpoint_2.pt", "checkpoint_4.pt"]
    for step in (2, 4):
        saved = torch.load(tmp_path / "whole" / f"checkpoint_{step}.pt", weights_only=True)
        assert saved["step"] == step
    found = [row for row in rows(tmp_path / "whole") if "linear_top1" in row]
    assert [row["step"] for row in found] == [0, 2, 4, 5]
    for row in found:
        assert row["linear_chance"] == 50 and 1 < row["effective_rank"] <= row["full_rank"] == 12

    train_here("dino", classes, tmp_path / "parts", *KEPT, "--max-steps", "2")

    def no_links(*_):
        raise OSError("this file system has no hard links")

    monkeypatch.setattr(os, "link", no_links)
    train_here("dino", classes, tmp_path / "parts", *KEPT, "--max-steps", "5")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert sorted(path.name for path in (tmp_path / "parts").glob("checkpoint*")) == kept
    for name in kept:
        first, second = (torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "parts"))
        assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())
    out = capsys.readouterr().out
    assert re.search(r"step 2, percent: linear_top1 \S+, .*; effective_rank \S+, full_rank 12\n", out)
    assert re.search(r"\neffective rank \S+ \(random weights \S+, at most 12\)\n", out)
    main(["knn", str(tmp_path / "parts/checkpoint_2.pt"), "--data", str(classes), "--device", "cpu", "--workers", "0"])
    (result,) = (json.loads(line) for line in (tmp_path / "parts/results.jsonl").read_text().splitlines())
    assert result["step"] == 2

    done = command("dino.py", "--data", classes, "--output-dir", tmp_path / "two", *FLAGS["dino"], *KEPT,
                   "--max-steps", "2", processes=2)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = ([row for row in rows(tmp_path / run) if "linear_top1" in row][:2] for run in ("whole", "two"))
    assert one[0] == two[0] and one[1].keys() == two[1].keys()  # random weights; later ones differ by rounding
    assert one[1]["effective_rank"] == pytest.approx(two[1]["effective_rank"], rel=1e-3)


def test_no_room_to_keep_a_checkpoint(photos, tmp_path, monkeypatch):
    """Where there are no hard links a copy is written, and the disk may fill up meanwhile."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="checkpoint_1.pt .*No space left on device.*checkpoint.pt is good"):
        train_here("simclr", photos, tmp_path / "run", "--keep-every", "1", "--max-steps", "1")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 1
    assert not list((tmp_path / "run").glob("checkpoint_*")) and not list((tmp_path / "run").glob("*.tmp"))


def test_a_start_that_was_cut_off_is_begun_again(photos, tmp_path):
    """A kill or a full disk may come before args.json has its name."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").touch()
    (tmp_path / "run/args.tmp").write_text('{"method": "sim')
    train_here("simclr", photos, tmp_path / "run", "--max-steps", "1", "--eval-every", "0")
    assert (tmp_path / "run/checkpoint.pt").exists() and not list((tmp_path / "run").glob("*.tmp"))


def test_a_text_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Or a power cut would leave an empty args.json."""
    done, sync, path = [], os.fsync, tmp_path / "args.json"

    def fsync(number):
        sync(number)
        done.append((path.with_suffix(".tmp").read_text(), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    replace_text(path, "{}")
    assert done == [("{}", False)] and path.read_text() == "{}" and not path.with_suffix(".tmp").exists()


def test_a_run_without_a_scaler_goes_on_with_one(photos, tmp_path, monkeypatch):
    """--dtype auto is bf16 on one machine and fp16 on another."""
    train_here("simclr", photos, tmp_path / "run", "--max-steps", "1", "--eval-every", "0")
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["scaler"] == {}
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    monkeypatch.setattr(module_of("simclr"), "mixed_precision", lambda *_: (contextlib.nullcontext(), scaler))
    train_here("simclr", photos, tmp_path / "run", "--max-steps", "2", "--eval-every", "0")
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert saved["step"] == 2 and saved["scaler"]["scale"] == 8


def test_runs_of_weights_and_biases(photos, tmp_path, monkeypatch):
    """A run there has an id that its directory keeps: two directories may have the same name."""
    begun = []
    fake = types.SimpleNamespace(init=lambda **words: begun.append(words), log=lambda row, step: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for folder, steps in (("a", "1"), ("a", "2"), ("b", "1")):
        train_here("simclr", photos, tmp_path / folder / "run", "--max-steps", steps, "--eval-every", "0", "--wandb")
    first, again, other = (words["id"] for words in begun)
    assert first == again != other and {words["name"] for words in begun} == {"run"}

    def fail(**words):
        raise RuntimeError("api_key not configured (no-tty).\n call wandb.login")

    fake.init = fail
    sentence = r"wandb cannot begin \(api_key not configured \(no-tty\). call wandb.login\): run `wandb login` or leave --wandb out"
    with pytest.raises(UserError, match=sentence):
        train_here("simclr", photos, tmp_path / "c", "--max-steps", "1", "--eval-every", "0", "--wandb")


def test_how_to_continue_on_several_machines(photos, tmp_path, monkeypatch, capsys):
    """What torchrun was told there, such as --rdzv_endpoint, its processes do not know."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setattr(Run, "agree_to_stop", lambda run: bool(setattr(run, "stop", signal.SIGTERM) or run.stop))
    started = "saved at step 1, continue with the command that started it on each machine"
    for folder, more in ((tmp_path / "run", ""), ("", r" and --output-dir runs/simclr_\S+")):
        with pytest.raises(SystemExit):
            train_here("simclr", photos, folder, "--eval-every", "0")
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("saved at")]
        assert re.fullmatch(started + more, line)


def test_versions_that_are_not_known_are_left_out(photos, tmp_path, monkeypatch):
    """pillow-simd is imported as PIL, and nothing is installed under the name pillow."""
    version = importlib.metadata.version

    def of_others(name):
        if name == "pillow":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", of_others)
    train_here("simclr", photos, tmp_path / "run", "--max-steps", "1", "--eval-every", "0")
    env = json.loads((tmp_path / "run/env.json").read_text())
    assert "pillow" not in env and {"ftfy", "tokenizers", "torch"} <= env.keys()


def test_bad_samples_are_counted_without_a_log_too(photos, tmp_path, monkeypatch, capsys):
    """--log-every 0 writes the first row and the last: the check has to come at the ends of epochs, which have 6 steps."""
    steps = []
    monkeypatch.setattr(Loader, "check_bad", lambda self: steps.append(1))
    train_here("simclr", photos, tmp_path / "run", "--log-every", "0", "--max-steps", "13", "--eval-every", "0", "--warmup-epochs", "9")
    assert len(steps) == 4  # after steps 1, 6, 12 and 13
    assert "warning: the warm-up is longer than the run" in capsys.readouterr().out
