"""benchmarks/gpu.py, which measures on a GPU, at tiny sizes on the CPU: every part leaves a result."""

import argparse
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import weakref

import pytest

from runs import ROOT


# The processes of gpu.py as forks of the first one, which has imported torch here.
FORKED = """
import multiprocessing, subprocess
context, start = multiprocessing.get_context("fork"), subprocess.Popen

def child(command, env, stdin, stdout):
    for number, file in enumerate((stdin, stdout, stdout)):
        os.dup2(file, number)
    os.setsid()
    os.environ.update(env)
    sys.stdin, sys.argv = open(0), command[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")

class Forked:
    def __init__(self, command, env, stdout, **_):
        reader, writer = os.pipe()
        self.stdin = os.fdopen(writer, "wb")
        self.process = context.Process(target=child, args=(command, env, reader, stdout.fileno()))
        self.process.start()

    def wait(self, seconds=None):
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("fork", seconds)

    def kill(self):
        self.process.kill()

    @property
    def returncode(self):
        return self.process.exitcode

subprocess.Popen = lambda command, **options: (Forked if "--job" in command else start)(command, **options)
"""


DINOV2 = "--data imagenet --arch vit_micro_patch8 --image-size 32 --local-size 16 --local-crops 2 --drop-path 0 --out-dim 64"
DINOV2 = [*DINOV2.split(), *"--hidden-dim 64 --koleo-group 2 --batch-size 8".split()]


def rows_of(out):
    file = out / "gpu.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run(out, *flags, **env):
    """-> exit status, rows of gpu.jsonl, output."""
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--out", str(out), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, cwd=out.parent)
    return done.returncode, rows_of(out), done.stdout + done.stderr


def test_every_part_writes_its_result(server, tmp_path):
    """What starts and ends its processes elsewhere is the same as in test_what_fails_is_a_result_and_does_not_stop_the_rest."""
    pytest.importorskip("sklearn", reason="its two photos are the JPEG files that are read")
    nowhere = tmp_path / "nowhere"  # ./data may hold what the last parts would read
    done = server.run("benchmarks/gpu.py", "--out", tmp_path / "out", "--miniature", "--minutes", "12",
                      "--data-dir", nowhere, before=FORKED)  # fmt: skip
    status, rows, output = done.returncode, rows_of(tmp_path / "out"), done.stdout + done.stderr
    assert status == 0 and not [row for row in rows if "error" in row], output[-6000:]

    def of(part, key):
        return [row for row in rows if row["part"] == part and key in row]

    (tests,) = of("tests", "passed")
    assert tests["passed"] == 2 and tests["failed"] == tests["not_run"] == 0
    steps = {(row["model"], row["mode"]): row for row in of("steps", "mode")}
    assert len(steps) == 6 and ("dino_s16", "compiled") in steps
    for row in steps.values():
        assert row["ms"] > 0 and row["images_per_s"] > 0 and 0 < row["views_share"] < 1
        assert row["mfu"] == pytest.approx(row["tflops"] / row["matmul_tflops"], rel=1e-4)
    assert {row["model"] for row in of("data", "real_over_synthetic")} == {"clip_b16", "simclr_r50"}
    assert all(row["images_per_s"] > 0 for row in of("data", "real_over_synthetic"))
    assert of("data", "skipped") and of("peers", "skipped")
    found = [row["knn_top1"] for row in of("cifar", "evaluation")]
    (cifar,) = of("cifar", "best_knn_top1")
    assert len(found) == 3  # the first is that of random weights
    assert cifar["best_knn_top1"] == max(found) and cifar["last_knn_top1"] == found[-1] and cifar["method"] == "simclr"
    reached = [row["seconds"] for row in of("cifar", "evaluation") if row["knn_top1"] >= cifar["target"]]
    assert cifar["seconds_to_target"] == (reached[0] if reached else None)
    files = {"gpu.jsonl", "gpu.md", "gpu.log", "cifar10_simclr_metrics.jsonl"}
    assert {file.name for file in (tmp_path / "out").iterdir() if file.stat().st_size} == files
    assert "| clip_b16 | eager | 4 |" in (tmp_path / "out/gpu.md").read_text()

    done = server.run("benchmarks/gpu.py", "--out", tmp_path / "out", "--miniature", "--only", "tests", before=FORKED)
    again = rows_of(tmp_path / "out")[len(rows) :]  # the same code, so that no test is left to run
    assert done.returncode == 0 and not [row for row in again if "error" in row], done.stdout + done.stderr
    assert again[-1]["passed_before"] == 2 and again[-1]["passed"] == again[-1]["not_run"] == 0
    page = (tmp_path / "out/gpu.md").read_text()  # has what is older too
    assert "| clip_b16 | eager | 4 |" in page and page.count("--miniature") == 2


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("GPU_RESULTS", str(tmp_path / "gpu.jsonl"))
    import gpu
    import torch

    monkeypatch.setattr(torch.nn.Module, "compile", torch.nn.Module.compile)  # prepare() replaces it
    return gpu


def steps_row(gpu, folder, method, flags):
    """-> the last row of part_steps() in this process, eager and on the CPU."""
    job = {"part": "steps", "model": method, "method": method, "modes": ["eager"], "least": 1, "flags": " ".join(flags),
           "seconds": 0.01, "temp": str(folder), "miniature": True}  # fmt: skip
    assert gpu.part_steps(job) == 0
    return json.loads((folder / "gpu.jsonl").read_text().splitlines()[-1])


def test_operations_are_those_of_the_paper_s_model(gpu, tmp_path, monkeypatch):
    """A step of SimCLR with ResNet-50: two views, three times a forward pass of 8.2 billion operations. The second step is the
    one whose operations are counted, and the last one here."""
    steps = gpu.Meter.steps

    def until_counted(meter, *args, **options):
        batches = steps(meter, *args, **options)
        yield next(batches)
        yield next(batches)
        next(batches)
        meter.result = {"ms": 1.0}

    monkeypatch.setattr(gpu.Meter, "steps", until_counted)
    method, flags = gpu.MODELS["simclr_r50"]
    row = steps_row(gpu, tmp_path, method, gpu.with_batch(flags, 2))
    assert row["gflop_per_image"] == pytest.approx(2 * 3 * 8.2, rel=0.03)


def test_operations_that_are_done_again_are_not_counted(gpu, tmp_path):
    """With "selective" there are none, as matrix products are kept; DINOv2's recipe for ImageNet has "full"."""
    selective, full = (steps_row(gpu, tmp_path, "dinov2", [*more, *DINOV2]) for more in (["--grad-checkpointing", "selective"], []))
    assert selective["grad_checkpointing"] == "selective" and full["grad_checkpointing"] == "full" and full["batch"] == 8
    assert full["gflop_per_image"] == pytest.approx(selective["gflop_per_image"], rel=0.05)


def test_no_model_outlives_its_measurement(gpu, tmp_path, monkeypatch):
    """A Run handles SIGHUP too, where nobody ignores it, and would hold the model that the next one needs the memory of."""
    import simclr

    models, build_model = [], simclr.build_model

    def build(args):
        model = build_model(args)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(simclr, "build_model", build)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        steps_row(gpu, tmp_path, "simclr", gpu.MINIATURE["simclr_r50"][1].split())
        gc.collect()
        assert len(models) == 1 and models[0]() is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def session(gpu, tmp_path, monkeypatch):
    """-> function: a new Session, as of another invocation that continues the record, in the folder it was started in."""
    monkeypatch.chdir(tmp_path)

    def begin(*only):
        args = argparse.Namespace(out=".", minutes=10, only=only, miniature=False, data_dir=str(tmp_path), models=[])
        return gpu.Session(args, str(tmp_path))

    return begin


def test_a_relative_out_is_that_of_the_caller(gpu, session, tmp_path, monkeypatch):
    """The tests run in the folder of the repository."""
    begun = session("tests")
    monkeypatch.chdir(ROOT)
    gpu.record("tests", collected=3)
    begun.news()
    assert rows_of(tmp_path) == begun.rows == [{"part": "tests", "collected": 3}]


def test_a_record_says_what_code_it_is_of(gpu, session, tmp_path, monkeypatch):
    for folder in ("code", "code/tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "code/clip.py").write_text("1")
    monkeypatch.setattr(gpu, "ROOT", tmp_path / "code")  # .git is not there
    sources = []
    for number in range(3):
        (tmp_path / "code/clip.py").write_text(str(number // 2))
        session("steps").machine()
        gpu.record("steps", model="clip_b16", mode="eager", batch=number)
        sources.append(rows_of(tmp_path)[-2]["source"])
    assert sources[0] == sources[1] != sources[2] and len(sources[0]) == 8
    assert [row["source"] for row in session("steps").recorded() if row["part"] == "steps"] == sources
    machine = rows_of(tmp_path)[0]
    assert machine["date"].startswith("20") and "commit" in machine


def test_tests_that_have_passed_are_not_run_again(gpu, session, monkeypatch):
    def invocation(**outcomes):
        begun = session("tests")
        begun.machine()
        found = begun.passed_before()
        for test, outcome in outcomes.items():
            gpu.record("tests", test=test, outcome=outcome)
        return found

    assert invocation(a="passed", b="failed", c="passed", d="skipped") == []
    assert invocation(b="passed", c="failed") == ["a", "c"]
    assert invocation() == ["a", "b"]
    monkeypatch.setattr(gpu, "checksum", lambda pattern: "other code")
    assert invocation(d="passed") == []
    assert invocation() == ["d"]


def test_a_compilation_that_fails_or_is_too_slow_is_a_result(gpu, session, monkeypatch):
    class Child:
        def __init__(self, job, temp):
            self.job, self.name = job, f"steps_{job['model']}_warm"

        def wait(self, seconds):
            return {"clip_b16": 0, "dino_s16": 1, "ibot_s16": None}[self.job["model"]]

        def last_lines(self, number=12):
            return ["the last line"]

    begun = session("tests", "steps")
    begun.args.models = ["clip_b16", "dino_s16", "ibot_s16"]
    monkeypatch.setattr(gpu, "Child", Child)
    monkeypatch.setattr(begun, "left", lambda part: 60)
    begun.compile_all(threading.Event())
    assert begun.warmed == {"clip_b16"}
    errors = {row["process"]: row["error"] for row in begun.rows}
    assert errors == {"steps_dino_s16_warm": "exit status 1", "steps_ibot_s16_warm": "ended at its limit of 60 s"}


def test_a_package_that_is_missing_is_named_at_once(gpu, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("ftfy", "PIL") else find(name))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2 and "install pillow, ftfy first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gpu_tests_need_no_other_project(server):
    """Of several that are not there, none keeps them from running."""
    absent = "timm", "sklearn", "open_clip", "transformers", "lightly", "matplotlib"
    done = server.run("tests/test_gpu.py", before=f"sys.modules.update(dict.fromkeys({absent}))\nimport test_gpu\nsys.exit()")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("make", ["synthetic_loader", "real_loader"])
def test_a_measured_loader_does_not_wait_for_the_device(gpu, make):
    """As Loader.check_bad would after each epoch."""
    loader = getattr(gpu, make)(None, {})
    assert loader.check_bad(None) is None


def test_operations_that_cannot_be_counted_are_a_result_beside_the_time(gpu, tmp_path, monkeypatch):
    """Without activation checkpointing a quarter of the batch may not fit."""
    import torch

    attempt = gpu.attempt

    def out_of_memory(job, loader, flags, meter):
        if "--grad-checkpointing" in flags:
            raise torch.OutOfMemoryError("out of memory")
        return attempt(job, loader, flags, meter)

    monkeypatch.setattr(gpu, "attempt", out_of_memory)
    row = steps_row(gpu, tmp_path, "dinov2", DINOV2)
    assert row["ms"] > 0 and "mfu" not in row and "error" not in row
    assert rows_of(tmp_path)[0]["error"] == "operations were not counted: out of memory"


def test_cifar_goes_on_where_an_earlier_record_ends(gpu, session, tmp_path, monkeypatch):
    """A method that has no last row was cut off, and one with other code is another: both are trained again. The first that
    is left gets all the time, and the next one what it leaves."""
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10/train.npz").touch()

    def trained_before(**rows):
        session("cifar").machine()
        for method, row in rows.items():
            gpu.record("cifar", method=method, **row)

    checksum = gpu.checksum
    monkeypatch.setattr(gpu, "checksum", lambda pattern: "other code")
    trained_before(simclr={"best_knn_top1": 5.0})
    monkeypatch.setattr(gpu, "checksum", checksum)
    trained_before(byol={"evaluation": 1}, moco={"best_knn_top1": 5.0})
    begun, trained = session("cifar"), []
    monkeypatch.setattr(begun, "train_cifar", lambda method, folder, seconds: trained.append((method, seconds)))
    for left, expected in (([603, 20], {"simclr": 600}), ([603, 550, 42], {"simclr": 600, "byol": 547})):
        monkeypatch.setattr(begun, "left", lambda part, left=left: left.pop(0))
        begun.cifar()
        assert trained == list(expected.items()) and not left
        trained.clear()
    assert rows_of(tmp_path)[-1] == {"part": "cifar", "skipped": "no time was left for simsiam, dino"}
    trained_before(**dict.fromkeys(gpu.CIFAR, {"best_knn_top1": 5.0}))
    begun.cifar()
    assert not trained and begun.rows[-1]["skipped"] == f"{tmp_path}/gpu.jsonl has every method"


def test_without_time_every_part_says_so(tmp_path):
    status, rows, output = run(tmp_path / "out", "--minutes", "0.02", "--only", "steps,data", "--models", "clip_b16")
    assert status == 0, output
    skipped = {"steps": "", "data": ""}
    for row in rows:
        if "skipped" in row:  # a part may have two rows: models that run eagerly, then compiled ones
            skipped[row["part"]] += row["skipped"]
    assert "clip_b16 eager" in skipped["steps"] and "clip_b16" in skipped["data"]


def test_what_fails_is_a_result_and_does_not_stop_the_rest(tmp_path):
    flags = "--minutes", "6", "--only", "steps,cifar", "--models", "clip_b32", "--data-dir", str(tmp_path)
    status, rows, output = run(tmp_path / "out", *flags, CUDA_VISIBLE_DEVICES="")  # all of it needs a GPU
    assert status == 0, output
    errors = [row["error"] for row in rows if row["part"] == "steps"]
    assert len(errors) == 2 and "cuda is not available" in errors[0], output
    assert rows[-1]["part"] == "cifar" and "no folder cifar10" in rows[-1]["skipped"]


@pytest.mark.parametrize("flag", ["--only", "--models"])
def test_an_unknown_name_is_refused_with_those_there_are(tmp_path, flag):
    status, rows, output = run(tmp_path / "out", flag, "clip_b61")
    assert status == 2 and not rows and "clip_b61" in output and ("clip_b16" in output or "steps" in output)
