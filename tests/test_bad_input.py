"""What a user can cause ends in one sentence and status 2, overwriting nothing; what is merely odd works."""

import contextlib
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from runs import FLAGS, METHODS, ROOT, command, environment, make_photos, module_of, rows
from server import Program

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("data") / "photos")


def run_of(name, data, run="", flags=""):
    """Script and flags of a short run; run: its directory, by default a new one in runs/."""
    fixed = [*FLAGS[name], "--data", data, "--eval-every", 0, "--output-dir", run]
    return [f"{name}.py", *fixed, *flags.split()]


def assert_sentence(done, script, *parts):
    """Status 2; one line that names the script; nothing else but whose weights were read before it."""
    said = [line for line in done.stderr.splitlines() if " is taken for " not in line]
    assert done.returncode == 2, done
    assert len(said) == 1 and said[0].startswith(f"{script}: error: ") and len(said[0]) < 500, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for part in parts:
        assert part in said[0], (part, said[0])


def contents(folder):
    """Every file below it. args.json keeps the latest of the flags that may change, such as --max-steps."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name not in (".lock", "args.json")]
    return {path: path.is_dir() or path.read_bytes() for path in paths}


@contextlib.contextmanager
def unchanged(*folders):
    before = [contents(folder) for folder in folders]
    yield
    assert [contents(folder) for folder in folders] == before


# -------------------------------------------- arguments --------------------------------------------
MISTAKES = [  # method, flags after those of tests/runs.py ({0}: the folder `things`, see below), sentence
    ("slip", "--batch-sise 4", "unknown argument --batch-sise, did you mean --batch-size?"),
    ("simclr", "--lr 0.1", "unknown argument --lr, did you mean --base-lr?"),
    ("dino", "--lr=0.1", "unknown argument --lr=0.1, did you mean --base-lr?"),
    ("moco", "--base-lr 0.1", "unknown argument --base-lr, did you mean --lr?"),
    ("simclr", "--epoch 3", "unknown argument --epoch, did you mean --epochs?"),
    ("simclr", "--blurr", "unknown argument --blurr, did you mean --blur?"),
    ("clip", "yfcc15m", "unknown argument yfcc15m"),
    ("clip", "--batch-size many", "--batch-size: invalid int value: 'many'"),
    ("clip", "--batch-size", "--batch-size: expected one argument"),
    ("simclr", "--lr-scaling cubic", "--lr-scaling: invalid choice: 'cubic'"),
    ("slip", "--dtype fp8", "--dtype: invalid choice: 'fp8'"),
    ("slip", "--lr nan", "--lr nan must be at least 0"),
    ("slip", "--lr inf", "--lr inf must be at least 0 and finite"),
    ("slip", "--lr 1e39", "--lr 1e+39 must be at least 0 and finite"),  # no float32
    ("slip", "--lr -1", "--lr -1.0 must be at least 0"),
    ("slip", "--seed 99999999999999999999", "--seed 99999999999999999999 must be"),
    ("slip", "--epochs 0", "--epochs 0 must be above 0"),
    ("slip", "--batch-size 0", "--batch-size 0 must be above 0"),
    ("slip", "--text-width 0", "--text-width 0 must be above 0"),
    ("slip", "--text-width 100", "--text-width 100 is not a multiple of 64"),
    ("simclr", "--head-layers 0", "--head-layers 0 must be above 0"),
    ("clip", "--recipe yfcc", "unknown recipe yfcc, choose one of shapes, flickr8k"),
    ("clip", "--arch vit_huge_patch16", "--arch vit_huge_patch16 is unknown, choose"),
    ("clip", "--arch vit_base", "--arch vit_base is unknown"),
    ("clip", "--arch vit_base_patch0", "--arch vit_base_patch0 is unknown"),
    ("clip", "--arch resnet50_patch16", "--arch resnet50_patch16 is unknown"),
    ("slip", "--arch resnet50", "--arch resnet50 is unknown, choose"),
    ("slip", "--arch vit_base_patch00", "--arch vit_base_patch00 is unknown"),
    ("simclr", "--arch resnet20", "--arch resnet20 is unknown, choose resnet10"),
    ("clip", "--arch resnet50 --image-size 100", "--image-size 100 is not a multiple of 32"),
    ("slip", "--image-size 33", "--image-size 33 is not a multiple of 16"),
    ("clip", "--batch-size 99", "52 samples"),
    ("slip", "--batch-size 1", "--batch-size 1 leaves no other sample"),
    ("simclr", "--accum-steps 2", "--accum-steps"),
    ("moco", "--accum-steps 2", "--accum-steps"),
    ("mocov3", "--accum-steps 2", "--accum-steps is not implemented: batch norm would see one piece"),
    ("mocov3", "--arch vit_giant_patch16", "--arch vit_giant_patch16 is unknown, choose resnet50 or vit_nano"),
    ("mocov3", "--image-size 40", "--image-size 40 is not a multiple of 16"),
    ("moco", "--queue-size 100", "--queue-size 100 is not a multiple of 8"),
    ("moco", "--symmetric", "--queue-size 600 is not a multiple of 16"),
    ("moco", "--bn-group 3", "--bn-group 3 must be above 1 and divide the batch, 8"),
    ("moco", "--bn-group 1", "--bn-group 1 must be above 1"),
    ("moco", "--version 3", "--version: invalid choice: '3'"),
    ("moco", "--arch resnet50x2", "--arch resnet50x2 is unknown, choose resnet10"),
    ("moco", "--width 0", "--width 0.0 leaves no channel"),
    ("simclr", "--arch resnet10 --width 0.001", "--width 0.001 leaves no channel"),
    ("clip", "--arch resnet50 --text-width 64 --accum-steps 2", "for resnet50"),
    ("mocov3", "--width 0.5", "--width changes nothing with vit_micro_patch16: leave it out"),
    ("dino", "--stem cifar", "--stem changes nothing with vit_micro_patch8: leave it out"),
    ("dino", "--drop-path 0.1 --arch resnet10", "--drop-path changes nothing with resnet10: leave it out"),
    ("dino", "--init-std 0.08 --arch resnet10", "--init-std changes nothing with resnet10: leave it out"),
    ("ibot", "--init-std 0", "--init-std 0.0 must lie between 0.001 and 1000"),
    ("mocov3", "--no-freeze-patch-embed --arch resnet10", "--freeze-patch-embed changes nothing with resnet10: leave it out"),
    ("dinov2", "--layer-decay 1e13", "--layer-decay 10000000000000.0 must lie between 0 and 1"),
    ("simclr", "--crop-min 1.5", "--crop-min 1.5 must lie between 0 and 1"),
    ("ibot", "--crop-min 0.3", "--crop-min 0.3 is above --crop-split 0.25, the largest local crop"),
    ("dinov2", "--bottleneck-dim 0", "--bottleneck-dim 0 must be above 0"),
    ("clip", "--probe linear", "--probe is for methods without captions"),
    ("slip", "--accum-steps 3", "--accum-steps 3 does not divide a process's 8 samples"),
    ("clip", "--device cuda", "--device cuda is not available here, use cpu"),
    ("clip", "--device tpu", "--device tpu is not available here"),
    ("clip", "--device cpu:x", "--device cpu:x is not available here"),
    ("slip", "--tokenizer {0}/nothing.json", "nothing.json: [Errno 2]"),
    ("slip", "--tokenizer {0}/file", "tokenizer {0}/file: "),
    ("slip", "--vocab-size 100", "its 514 tokens are more than --vocab-size 100"),
    ("slip", "--data imagenet --data-dir {0}", "there is no data at {0}/imagenet, see docs/data.md"),
    ("slip", "--data flickr8", "did you mean flickr8k?"),
    ("slip", "--data {0}/nowhere", "there is no data at {0}/nowhere, see docs/data.md"),
    ("slip", "--data {0}/empty", "{0}/empty holds no pictures"),
    ("simclr", "--data {0}/empty", "{0}/empty holds no pictures"),
    ("slip", "--data {0}/classes", "classes has no captions, docs/data.md"),
    ("clip", "--data {0}/classes", "classes has no captions, docs/data.md"),
    ("simclr", "--data {0}/tar", "{0}/tar/shard.tar cannot be read: "),
    ("slip", "--data {0}/table", "the columns of {0}/table/train.csv are ['a', 'b']"),
    ("simclr", "--data {0}/label", "/0.jpg has the label 1e30, which is too large: fix it or leave it out"),
    ("clip", "--data {0}/label.jsonl", "/0.jpg has the label 1e30, which is too large"),
    ("simclr", "--data {0}/label.jsonl --workers 1", "/0.jpg has the label 1e30, which is too large"),
    ("simclr", "--data {0}/gone", "none of 20 samples of gone is usable: gone["),
    ("simclr", "--data {0}/gone --workers 1", ".jpg, paths in its table are relative to {0}/gone (docs/data.md)"),
    ("slip", "--output-dir {0}/file", "{0}/file "),
    ("slip", "--output-dir {0}/full", "{0}/full is not empty and holds no run"),
    ("slip", "--output-dir {0}/half", "{0}/half/args.json is damaged ("),
    ("slip", "--output-dir /dev/null/run", "/dev/null/run "),  # not even root may write there
]


def picture(size=(40, 30), mode="RGB", **options):
    """The bytes of an image file full of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, **options)
    return file.getvalue()


def write_rows(folder, samples):
    """train.jsonl of (picture, caption) pairs."""
    text = "".join(json.dumps({"image": image, "captions": [caption]}) + "\n" for image, caption in samples)
    (folder / "train.jsonl").write_text(text)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    root, jpeg = tmp_path_factory.mktemp("things"), picture(format="JPEG")
    for name in ("empty", "full", "half", "tar", "table", "gone", "label", "classes/train/a", "classes/train/b"):
        (root / name).mkdir(parents=True)
    (root / "file").write_text("mine\n")
    (root / "full" / "thesis.txt").write_text("mine\n")
    (root / "half" / "args.json").write_text('{"method')
    (root / "table" / "train.csv").write_text("a,b\n1,2\n")
    write_rows(root / "gone", [(f"{i}.jpg", "gone") for i in range(20)])
    (root / "label" / "train.csv").write_text("image,label\n" + f"{root}/0.jpg,1e30\n" * 20)
    (root / "0.jpg").write_bytes(jpeg)
    two = [json.dumps({"image": name, "caption": "a dog", "label": "1e30"}) + "\n" for name in ("0.jpg", "./0.jpg")]
    (root / "label.jsonl").write_text(10 * "".join(two))  # rows of one picture that follow each other are named
    for i in range(20):
        (root / "classes" / "train" / "ab"[i % 2] / f"{i}.jpg").write_bytes(jpeg)
    with tarfile.open(root / "tar" / "shard.tar", "w") as tar:
        for i in range(20):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = len(jpeg)
            tar.addfile(info, io.BytesIO(jpeg))
    os.truncate(root / "tar" / "shard.tar", 9000)
    return root


@pytest.mark.parametrize("name, flags, sentence", MISTAKES)
def test_a_mistake_is_a_sentence(server, photos, things, name, flags, sentence):
    with unchanged(photos, things):
        program = Program(server, *run_of(name, photos, flags=flags.format(things)))
        assert_sentence(program.wait(), f"{name}.py", sentence.format(things))
    assert not contents(program.where) or "gone" in flags or "jsonl" in flags  # found out after the run has begun


def test_underscores_are_dashes(server, photos):
    spellings = ("--batch-size 99", "--batch_size 99", "--batch-size=99", "--batch_size=99")
    texts = {server.run(*run_of("slip", photos, flags=flags)).stderr for flags in spellings}
    assert len(texts) == 1 and "52 samples" in texts.pop()


@pytest.mark.parametrize("name", METHODS)
def test_help_has_every_flag_with_its_comment(server, name):
    done = server.run(f"{name}.py", "--help", env={"COLUMNS": "1000"})
    assert done.returncode == 0 and not done.stderr
    text = " ".join(done.stdout.split())
    run, method = (ROOT / "run.py").read_text(), (ROOT / f"{name}.py").read_text()
    source = "\n".join(text.split(f"class {start}")[1].split("\n\n")[0] for text, start in ((run, "RunArgs:"), (method, "Args(RunArgs):")))
    fields = re.findall(r"^ +(\w+): .*?(?:  # (.*))?$", source, re.M)
    assert [field for field, _ in fields] == list(vars(module_of(name).Args()))
    for field, comment in fields:
        assert comment, f"{field} has no comment"
        flag = "--" + field.replace("_", "-")
        assert re.search(rf"{flag}\b.*? {re.escape(' '.join(comment.split()))}( |$)", text), field


@pytest.mark.parametrize("script, flags", [
    ("evaluate.py", "--help"), ("evaluate.py", "-h"), ("evaluate.py", "knn --help"), ("evaluate.py", "search x.pt --data y --help"),
    ("simclrv2.py", "--help"), ("simclrv2.py", "finetune --help"), ("simclrv2.py", "distill --help"), ("slip_ablations.py", "--help"),
])  # fmt: skip
def test_help_of_the_other_commands(server, script, flags):
    done = server.run(script, *flags.split())
    assert done.returncode == 0 and not done.stderr
    assert "--data" in done.stdout and "--device" in done.stdout


@pytest.mark.parametrize("flags", ["", "--data shapes", "--split val --data shapes", "knn", "x.pt --data shapes", "knn x.pt"])
def test_an_evaluation_without_protocol_checkpoint_or_data(server, flags):
    assert_sentence(server.run("evaluate.py", *flags.split()), "evaluate.py", "use: evaluate.py zeroshot|", "CHECKPOINT ... --data NAME")


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_missing_package(server, photos, tmp_path, package):
    hide = f"sys.modules[{package!r}] = None"  # as if it were not installed
    argv = run_of("slip", photos, tmp_path / "run", f"--{package}")
    alone, both = server.run(*argv, before=hide), server.run_on(2, *argv, before=hide)
    for done in (alone, *both):
        assert_sentence(done, "slip.py", f"`pip install {package}` or leave its flag out")
    assert not (tmp_path / "run").exists()


# That wait is of ten seconds, see test_hostile.py; here it is of a fifth of one.
BRIEF = """
import trouble, types, time
trouble.time = types.SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 50))
"""


@pytest.mark.parametrize("flags, sentence", [
    ("--batch-size 7", "batch size 7 cannot be divided among 2 processes"),
    ("--batch-size 1", "batch size 1 cannot be divided among 2 processes"),
    ("--accum-steps 3", "--accum-steps 3 does not divide a process's 4 samples"),
    ("--output-dir {0}/full", "{0}/full is not empty and holds no run"),
])  # fmt: skip
def test_two_processes_without_torchrun(server, photos, things, flags, sentence):
    """Nothing ends the second one while it waits for the first one to say it, and so it says it too."""
    with unchanged(things):
        first, second = server.run_on(2, *run_of("slip", photos, flags=flags.format(things)), before=BRIEF)
    assert_sentence(first, "slip.py", sentence.format(things))
    assert_sentence(second, "slip.py", sentence.format(things))


@pytest.mark.parametrize("name", ["slip", "simclr"])
def test_processes_that_find_other_training_data_end(server, photos, tmp_path, name):
    """A caption differs; the images for the evaluation are the same. Both machines say it, and nothing is begun."""
    other = shutil.copytree(photos, tmp_path / "other" / photos.name)
    train = other / "train.jsonl"
    train.write_text(train.read_text().replace('"captions": ["', '"captions": ["not ', 1))
    places = [f"os.symlink({str(folder)!r}, 'photos')\n{BRIEF}" for folder in (photos, other)]
    for done in server.run_on(2, *run_of(name, "photos", tmp_path / "run"), before=places):
        assert_sentence(done, f"{name}.py", "processes find different training data: give all machines the same")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lines, sentence", [
    (3, "photos has 3 samples, less than a batch of 8: lower --batch-size, as recipes for small data do"),
    (0, "there is no data at "),
])  # fmt: skip
def test_a_mistake_on_one_machine_alone(server, photos, tmp_path, lines, sentence):
    """It says what is wrong; the other one, which waits for it then, neither waits for ever nor shows a traceback."""
    other = tmp_path / "other" / photos.name
    if lines:
        shutil.copytree(photos, other)
        train = (other / "train.jsonl").read_text().splitlines(keepends=True)
        (other / "train.jsonl").write_text("".join(train[:lines]))
    places = [f"os.symlink({str(folder)!r}, 'photos')\n{BRIEF}" for folder in (photos, other)]
    first, second = server.run_on(2, *run_of("slip", "photos", tmp_path / "run"), before=places)
    assert_sentence(first, "slip.py", "another process has ended, so this one ends too: see what the other one says")
    assert_sentence(second, "slip.py", sentence)
    assert not (tmp_path / "run").exists()


def test_the_same_under_torchrun(photos):
    """It adds a report of its own below the sentence."""
    done = command(*run_of("slip", photos, flags="--batch-size 7"), processes=2)
    said = "slip.py: error: batch size 7 cannot be divided among 2 processes\n"
    assert done.returncode and done.stderr.count(said) == 1
    assert str(ROOT / "common.py") not in done.stderr  # no traceback through our files


def test_memory_that_does_not_suffice(server, photos, tmp_path):
    """The first mistake on a GPU: what torch raises there."""
    full = """
def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has a capacity of")
torch.nn.functional.cross_entropy = full
"""
    done = server.run(*run_of("clip", photos, tmp_path / "run"), before=full)
    assert_sentence(done, "clip.py", "CUDA out of memory: lower --batch-size")


# -------------------------------------------- checkpoints --------------------------------------------
@pytest.fixture(scope="module")
def finished(server, photos, tmp_path_factory):
    """A run of one step and a folder of files that are not such a checkpoint, although they bear its name."""
    root = tmp_path_factory.mktemp("finished")
    done = server.run(*run_of("slip", photos, root / "run", "--max-steps 1"))
    assert done.returncode == 0 and not done.stderr, done.stderr
    good = root / "run" / "checkpoint.pt"

    class Code:
        def __reduce__(self):
            return os.system, (f"touch {root}/executed",)

    (root / "empty.pt").touch()
    (root / "text.pt").write_text("hello\n")
    (root / "cut.pt").write_bytes(good.read_bytes()[:20000])
    torch.save({"model": Code()}, root / "code.pt")
    torch.save({"model": Code()}, root / "code_old_format.pt", _use_new_zipfile_serialization=False)
    (root / "code_pickle.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    torch.save([1, 2], root / "list.pt")
    torch.save(torch.load(good, weights_only=True)["model"], root / "weights.pt")
    return root


REASONS = dict.fromkeys(["empty", "text", "cut"], "is damaged")
REASONS |= dict.fromkeys(["code", "code_old_format", "code_pickle"], "holds code, which is never run")
REASONS |= {"list": "holds a list, not a checkpoint", "weights": "own with --tokenizer"}
REASONS |= {"nothing": "there is no checkpoint at"}


@pytest.mark.parametrize("name, reason", REASONS.items())
def test_no_checkpoint_to_evaluate(server, photos, finished, name, reason):
    path = finished / f"{name}.pt"
    with unchanged(finished):
        done = server.run("evaluate.py", "retrieval", path, "--data", photos, "--device", "cpu")
    assert_sentence(done, "evaluate.py", str(path), reason)
    if "damaged" in reason or "code" in reason:
        assert ": give an undamaged copy, or a state dict alone" in done.stderr
    assert not (finished / "executed").exists()


@pytest.mark.parametrize("name", ["empty", "cut", "code", "list", "weights"])
def test_no_checkpoint_to_continue(server, photos, finished, tmp_path, name):
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copy(finished / f"{name}.pt", tmp_path / "run" / "checkpoint.pt")
    with unchanged(tmp_path):
        done = server.run(*run_of("slip", photos, tmp_path / "run"))
        mend = ": remove it to begin again, or use another --output-dir" if name in ("empty", "cut", "code") else ""
        assert_sentence(done, "slip.py", f"{tmp_path}/run/checkpoint.pt", mend)
    assert not (finished / "executed").exists()


def test_what_mends_a_damaged_checkpoint(server, photos, tmp_path):
    """The sentence says what works: a copy of the latest checkpoint that was kept, or to begin again."""
    argv = run_of("simclr", photos, tmp_path / "run", "--keep-every 1 --max-steps 2")
    assert server.run(*argv).returncode == 0
    saved = tmp_path / "run/checkpoint.pt"
    saved.unlink()  # it is the same file as the one that was kept
    saved.write_bytes(b"junk")
    done = server.run(*argv, "--max-steps", 3)
    assert_sentence(done, "simclr.py", "checkpoint.pt cannot be read", ": copy checkpoint_2.pt over it to go on from there, or")
    done = server.run("evaluate.py", "retrieval", tmp_path / "run", "--data", photos, "--device", "cpu")
    assert_sentence(done, "evaluate.py", "checkpoint.pt cannot be read", f": give {tmp_path}/run/checkpoint_2.pt instead")
    kept = tmp_path / "run/checkpoint_3.pt"  # a kept one that is damaged is not its own remedy
    kept.write_bytes(b"junk")
    done = server.run("evaluate.py", "retrieval", kept, "--data", photos, "--device", "cpu")
    assert_sentence(done, "evaluate.py", "checkpoint_3.pt cannot be read", ": give an undamaged copy, or a state dict alone")
    kept.unlink()
    shutil.copy(tmp_path / "run/checkpoint_2.pt", saved)
    done = server.run(*argv, "--max-steps", 3)
    assert done.returncode == 0 and "continued at 2" in done.stdout
    for path in (tmp_path / "run").glob("checkpoint*.pt"):
        path.unlink()
    saved.write_bytes(b"junk")
    done = server.run(*argv)
    assert_sentence(done, "simclr.py", ": remove it to begin again, or use another --output-dir")
    saved.unlink()
    assert server.run(*argv).returncode == 0 and [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [1, 2]


def test_a_finished_run_stays_as_it_is(server, photos, finished):
    """The last evaluation, which only the end of the run asked for, included."""
    before = (finished / "run" / "checkpoint.pt").read_bytes(), rows(finished / "run")
    done = server.run(*run_of("slip", photos, finished / "run", "--max-steps 1"))
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert ((finished / "run" / "checkpoint.pt").read_bytes(), rows(finished / "run")) == before


# -------------------------------------------- Ctrl-C --------------------------------------------
def losses_of(run):
    """The rows of metrics.jsonl that are not evaluations."""
    return [row for row in rows(run) if "loss" in row]


def wait_for_rows(folder, count):
    for _ in range(6000):
        log = list(folder.rglob("metrics.jsonl"))
        if log and len(rows(log[0].parent)) >= count:
            return log[0].parent
        time.sleep(0.01)
    raise TimeoutError("there was no step")


def test_ctrl_c_saves_and_says_how_to_continue(server, photos):
    """The terminal sends it to the loader's worker as well. Then the command that was printed is run."""
    program = Program(server, *run_of("slip", photos, flags="--epochs 400 --workers 1"))
    run = wait_for_rows(program.where, 3)
    os.killpg(program.pid, signal.SIGINT)
    done = program.wait()
    assert done.returncode == 128 + signal.SIGINT and "Traceback" not in done.stderr, done.stderr
    step = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert step == rows(run)[-1]["step"] >= 3
    launcher, script, *again = shlex.split(done.stdout.split("continue with: ")[1].splitlines()[0])
    assert launcher == "python" and f"{run.parent.name}/{run.name}" in again
    continued = server.run(script, *again, "--output-dir", run, "--max-steps", step + 2)
    assert continued.returncode == 0 and not continued.stderr, continued.stderr
    assert f"continued at {step}" in continued.stdout
    assert [row["step"] for row in losses_of(run)] == list(range(1, step + 3))


def test_ctrl_c_under_torchrun(photos, tmp_path):
    """torchrun gets the signal too, hands it on and adds its own traceback; the program must have saved."""
    script, *flags = map(str, run_of("slip", photos, tmp_path / "run", "--epochs 400"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process = subprocess.Popen([*launcher, str(ROOT / script), *flags], env=environment(), **options)
    wait_for_rows(tmp_path, 2)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert "continue with: torchrun" in out and (tmp_path / "run" / "checkpoint.pt").exists()
    assert str(ROOT) not in err  # no traceback through our files


def test_ctrl_c_before_the_first_step(server, photos):
    """While the data is being indexed, say: nothing to save, and no traceback either."""
    press = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; a job in the background ignores it
common.init_distributed = lambda *_: signal.raise_signal(signal.SIGINT)  # os.kill may come a little later
"""
    program = Program(server, *run_of("slip", photos), before=press)
    done = program.wait()
    assert done.returncode == 130 and not done.stdout + done.stderr and not contents(program.where)


# -------------------------------------------- training fails --------------------------------------------
# The eleventh cross-entropy is the first of L_ssl in SLIP's third step.
NAN = """
import itertools
calls, cross_entropy = itertools.count(1), torch.nn.functional.cross_entropy
def broken(*args, **options):
    return cross_entropy(*args, **options) * (float("nan") if next(calls) == 11 else 1)
torch.nn.functional.cross_entropy = broken
"""
# One weight overflows in the fourth update, after a loss that was finite.
OVERFLOW = """
import itertools
from torch.optim.optimizer import register_optimizer_step_post_hook
calls = itertools.count(1)
def overflow(optimizer, *_):
    if next(calls) == 4:
        weight = [p for group in optimizer.param_groups for p in group["params"]][3].data
        weight[(0,) * weight.ndim] = float("inf")
register_optimizer_step_post_hook(overflow)
"""


def assert_good_checkpoint(run, step=None):
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert step in (None, saved["step"]) and all(t.isfinite().all() for t in saved["model"].values())
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize("log_every", [1, 0])
def test_nan_names_step_and_term(server, photos, tmp_path, log_every):
    run = tmp_path / "run"
    argv = run_of("slip", photos, run, f"--save-every 1 --max-steps 4 --log-every {log_every}")
    done = server.run(*argv, before=NAN)
    assert_sentence(done, "slip.py", "ssl_loss is nan at step 3", f"{run}/checkpoint.pt holds the last good")
    assert "clip_loss" not in done.stderr
    assert_good_checkpoint(run, 2)
    assert server.run(*argv).returncode == 0  # the last good state can be continued
    assert_good_checkpoint(run, 4)


def test_nan_on_one_process_stops_both(server, photos, tmp_path):
    argv = run_of("slip", photos, tmp_path / "run", "--save-every 2")
    first, second = server.run_on(2, *argv, before=(BRIEF, BRIEF + NAN))
    said = first.stderr.splitlines()[-1]
    assert said.startswith("slip.py: error: ") and "ssl_loss is nan at step 3" in said
    assert first.returncode == second.returncode == 2 and "Traceback" not in first.stderr + second.stderr
    assert_good_checkpoint(tmp_path / "run", 2)


def test_absurd_learning_rate(server, photos, tmp_path):
    """The warm-up starts at 0, so the first step is good and saved."""
    done = server.run(*run_of("clip", photos, tmp_path / "run", "--lr 1e18 --save-every 1"))
    assert_sentence(done, "clip.py", "loss is nan at step", "try a lower lr")
    assert_good_checkpoint(tmp_path / "run")


@pytest.fixture(scope="module")
def overflowed(server, photos, tmp_path_factory):
    """-> function from a method to its run that overflows, finished, and the directory of that."""
    root, ended = tmp_path_factory.mktemp("overflowed"), {}

    def run(name):
        if name not in ended:
            argv = run_of(name, photos, root / name, "--save-every 2 --log-every 6")
            ended[name] = server.run(*argv, before=OVERFLOW)
        return ended[name], root / name

    return run


@pytest.mark.parametrize("name", METHODS)
def test_weights_that_overflow_are_not_saved(overflowed, name):
    done, run = overflowed(name)
    assert_sentence(done, f"{name}.py", "weights are not finite", "step 4")
    assert_good_checkpoint(run, 2)


# -------------------------------------------- hostile samples --------------------------------------------
@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """200 samples, of which two cannot be used: exactly 1% of an epoch."""
    folder, jpeg = tmp_path_factory.mktemp("hostile"), picture(format="JPEG")
    deep = Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (30, 40), dtype=np.uint16))
    deep.save(folder / "16bit.png")
    files = {
        "good.jpg": jpeg,
        "cmyk.jpg": picture(mode="CMYK", format="JPEG"),
        "grey.jpg": picture(mode="L", format="JPEG"),
        "palette.png": picture(mode="P", format="PNG"),
        "alpha.png": picture(mode="RGBA", format="PNG"),
        "pixel.png": picture(size=(1, 1), format="PNG"),
        "line.png": picture(size=(3000, 1), format="PNG"),
        "corrupt.jpg": jpeg[:300] + bytes(300),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    samples = [(name, f"a {name}") for name in [*files, "16bit.png"]]
    samples += [("good.jpg", ""), ("good.jpg", "word " * 2000), ("good.jpg", "\ud800 \0 \u202e \U0001f600")]
    samples += [("good.jpg", f"photo {i}") for i in range(200 - len(samples))]
    write_rows(folder, samples)
    return folder


TWO_EPOCHS = "--batch-size 100 --max-steps 4"


@pytest.mark.parametrize("name", METHODS)
def test_hostile_samples_train_on(server, hostile, tmp_path, name):
    done = server.run(*run_of(name, hostile, tmp_path / "run", f"--image-size {32 if name == 'align' else 16} {TWO_EPOCHS}"))
    assert done.returncode == 0, done.stderr[-2000:]
    expected = "no evaluation", "train.jsonl: "  # good.jpg stands in many rows
    said = [line for line in done.stderr.splitlines() if not line.startswith(expected)]
    wanted = ["corrupt.jpg: broken image", "good.jpg: no caption"][: 2 if hasattr(module_of(name).Args, "tokenizer") else 1]
    assert len(said) == len(wanted)  # once, although there are two epochs
    for text in wanted:
        assert any(text in line and " is replaced" in line for line in said), said
    losses = [row["loss"] for row in losses_of(tmp_path / "run")]
    assert len(losses) == 4 and all(map(math.isfinite, losses))


@pytest.mark.parametrize("name", ["slip", "simclr"])
def test_over_one_percent_of_bad_samples_stop_the_run(server, hostile, tmp_path, name):
    folder = tmp_path / "worse"
    shutil.copytree(hostile, folder)
    with open(folder / "train.jsonl", "a") as file:
        for bad in ("corrupt.jpg", "missing.jpg"):
            file.write(json.dumps({"image": bad, "captions": ["one more"]}) + "\n")
    done = server.run(*run_of(name, folder, tmp_path / "run", f"--image-size 16 {TWO_EPOCHS} --batch-size 101"))
    said = done.stderr.splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr and all(len(line) < 400 for line in said)
    assert re.search(r"error: \d samples of worse are bad, over 1% of an epoch.*broken image", said[-1])
    named = [line for line in said if " is replaced" in line]
    assert len(named) == len(set(named)) >= 3


# -------------------------------------------- chance --------------------------------------------
def chances(name, batch_size):
    clip, ssl = math.log(batch_size), math.log(2 * batch_size - 1)
    slip = {"chance": clip + ssl, "clip_chance": clip, "ssl_chance": ssl}
    declip = {"clip_chance": clip, "mvs_chance": 3 * clip, "nns_chance": clip, "tss_chance": math.log(600), "iss_chance": 0.0}
    declip |= {"chance": 1.2 * clip + 0.2 * math.log(600)}
    known = {"clip": {"chance": clip}, "simclr": {"chance": ssl}, "slip": slip, "declip": declip}
    known |= {"byol": {"chance": 4.0}, "align": {"chance": 2 * clip}}
    known |= {"moco": {"chance": math.log(601)}, "dino": {"chance": math.log(64)}}  # tests/runs.py
    patch = 0.8 * math.log(64)  # eight of ten large crops are masked
    known |= {name: {"chance": math.log(64) + patch, "cls_chance": math.log(64), "patch_chance": patch} for name in ("ibot", "dinov2")}
    return {**known, "mocov3": {"chance": 4 * 0.2 * clip}, "simsiam": {"chance": 0.0}}[name]


@pytest.mark.parametrize("name", METHODS)
def test_chance_stands_beside_every_loss(overflowed, name):
    """In the first row of a run, which ends with its fourth step."""
    done, run = overflowed(name)
    (row,) = losses_of(run)
    assert len([key for key in row if key.endswith("loss")]) == len(chances(name, 8))
    for key, chance in chances(name, 8).items():
        assert row[key] == pytest.approx(chance)
        assert f"(chance {chance:.3f})" in done.stdout


def test_chance_of_a_weighted_sum(server, photos, tmp_path):
    done = server.run(*run_of("slip", photos, tmp_path / "run", "--max-steps 1 --ssl-scale 0.5"))
    assert done.returncode == 0, done.stderr
    (row,) = losses_of(tmp_path / "run")
    assert row["loss"] == pytest.approx(row["clip_loss"] + 0.5 * row["ssl_loss"])
    assert row["chance"] == pytest.approx(math.log(8) + 0.5 * math.log(15))
    assert row["ssl_chance"] == pytest.approx(math.log(15))


@pytest.mark.parametrize("name, term, flags", [
    ("clip", "loss", "--lr 0"),
    ("slip", "clip_loss", "--lr 0"),
    ("simclr", "loss", "--temperature 1000"),
])  # fmt: skip
def test_a_loss_at_chance_is_warned_about(server, tmp_path, name, term, flags):
    """Pictures and captions that are all the same leave nothing to tell them apart by."""
    data = tmp_path / "same"
    data.mkdir()
    Image.new("RGB", (32, 32), (90, 120, 60)).save(data / "0.png")
    write_rows(data, [("0.png", "the same")] * 16)
    done = server.run(*run_of(name, data, tmp_path / "run", f"{flags} --max-steps 4"))
    chance = chances(name, 8)[term.replace("loss", "chance")]
    warned = re.findall(rf"warning: after (\d+) steps {term} is still at .*chance.*{chance:.3f}", done.stdout)
    assert len(warned) == 1 and int(warned[0]) == 4, done.stdout  # after the warm-up of two steps and 40% of eight
    if name == "clip":
        argv = run_of(name, data, tmp_path / "warming", f"{flags} --max-steps 4 --warmup-epochs 2")
        done = server.run(*argv)
        assert done.returncode == 0 and "warning" not in done.stdout


def test_a_loss_that_falls_is_not_warned_about(server, tmp_path):
    few = make_photos(tmp_path / "few", train=16, val=4)
    done = server.run(*run_of("clip", few, tmp_path / "run", "--epochs 40 --log-every 0"))
    assert done.returncode == 0 and "warning" not in done.stdout + done.stderr
    assert losses_of(tmp_path / "run")[-1]["loss"] < 0.8 * math.log(8)
