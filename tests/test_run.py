"""run.py: what --help says, which flag a slip of the pen meant, which command a run names at its end."""

import gc
import itertools
import json
import re
import shlex
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import pictures
import run
from common import UserError
from pictures import command as command_line
from pictures import next_command
from run import Run, RunArgs, load_checkpoint, parse_args
from runs import METHODS, ROOT, command, make_photos, module_of, train_here
from test_readme import parse


def help_of(name, capsys, *flags):
    module = module_of(name)
    with pytest.raises(SystemExit) as ended:
        parse_args(module.Args, module.RECIPES, [*flags, "--help"])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", [*METHODS, "simclrv2"])
def test_help_lists_the_flags_of_the_method_first(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    method, run = help_of(name, capsys).split("flags of the run")
    fields = vars(module_of(name).Args())
    assert {"data_dir", "workers", "compile", "profile"} <= set(vars(RunArgs())) < set(fields)
    for field in fields:
        where, elsewhere = (run, method) if hasattr(RunArgs, field) else (method, run)
        flag = f" --{field.replace('_', '-')}"
        assert f"{flag} " in where.replace(",", " ") and f"{flag} " not in elsewhere.replace(",", " "), field


def test_help_says_what_the_recipe_makes_of_a_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    text = help_of("slip", capsys)
    assert "(default: 4096; shapes: 128)" in text and "(default: vit_base_patch16; shapes: vit_micro_patch12)" in text
    assert "(default: 0.1) --tokenizer" in text  # shapes leaves --temperature alone
    for flags in (["--data", "cc3m"], ["--data=cc3m"], ["--recipe", "cc3m"], ["--data", "flickr8k", "--recipe", "cc3m"]):
        text = help_of("slip", capsys, *flags)
        assert "(default: 25; cc3m: 40)" in text and "shapes:" not in text and "flickr8k:" not in text
        assert "(default: the val split of --data) (cc3m: imagenet)" in text
    assert "cifar10: 0.5" in help_of("simclr", capsys, "--data", "cifar10")


@pytest.mark.parametrize("word, meant", [("--batch", "--batch-size"), ("--batch=8", "--batch-size"), ("--warm", "--warmup-epochs"),
                                         ("--eval_e", "--eval-every"), ("--epoches", "--epochs"), ("--batch-sise", "--batch-size")])  # fmt: skip
def test_the_flag_that_was_meant(word, meant):
    module = module_of("slip")
    with pytest.raises(UserError, match=f"did you mean {meant}[?]"):
        parse_args(module.Args, module.RECIPES, [word, "8"])


def test_a_flag_wins_over_the_recipe_and_that_over_the_default():
    module = module_of("slip")
    args = parse_args(module.Args, module.RECIPES, ["--data", "/x", "--recipe", "flickr8k", "--epochs", "3"])
    assert (args.epochs, args.batch_size, args.temperature, args.workers) == (3, 128, 0.1, 8)
    assert module.RECIPES["flickr8k"]["epochs"] == 30  # is not written to


class some_set:
    def __init__(self, classes=None, captioned=False, size=9):
        self.classes, self.captioned, self.size = classes, captioned, size

    def __len__(self):
        return self.size


WORDS, IDS = some_set(["cat", "dog"]), some_set(["n01440764", "n01443537"])
PAIRS = some_set(captioned=True)


@pytest.mark.parametrize("protocol, trained_on, dataset, command", [
    ("zeroshot", PAIRS, WORDS, "zeroshot RUN --data EVAL"),
    ("zeroshot", PAIRS, PAIRS, "retrieval RUN --data EVAL"),
    ("zeroshot", PAIRS, some_set(IDS.classes, True), "retrieval RUN --data EVAL"),  # ids are no words
    ("zeroshot", PAIRS, None, "retrieval RUN --data x --split train"),  # what is not there is not named
    ("zeroshot", some_set(["cat"], True), None, "zeroshot RUN --data x --split train"),
    ("zeroshot", some_set(None, True, 10**7), None, "zeroshot RUN --data cifar10"),  # too many to retrieve one
    ("knn", WORDS, WORDS, "knn RUN --data EVAL"),
    ("knn", IDS, IDS, "knn RUN --data EVAL"),
    ("knn", WORDS, None, "neighbors RUN --data x"),
    ("knn", some_set(None, False, 10**7), None, "knn RUN --data cifar10"),
])  # fmt: skip
@pytest.mark.parametrize("data_dir, variable, eval_data", [("", "", ""), ("/my data", "/other", ""), ("", "/my data", "a b.csv")])
def test_next_command(monkeypatch, protocol, trained_on, dataset, command, data_dir, variable, eval_data):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DATA_DIR", variable)
    run = Run.__new__(Run)
    run.args = types.SimpleNamespace(data="x", eval_data=eval_data, data_dir=data_dir)
    run.dir, run.loader = Path("runs/of mine"), types.SimpleNamespace(dataset=trained_on)
    words = shlex.split(next_command(run, protocol, dataset))
    places = {"RUN": "runs/of mine", "EVAL": eval_data or "x"}
    expected = [places.get(word, word) for word in command.split()]
    if data_dir or variable:
        expected += ["--data-dir", "/my data"]
    assert words == ["python", "evaluate.py", *expected]
    parse(words[1], words[2:])  # evaluate.py takes it
    monkeypatch.chdir(ROOT / "tests")
    assert shlex.split(next_command(run, protocol, dataset))[1] == str(ROOT / "evaluate.py")


@pytest.mark.parametrize("environment, launcher", [
    ({}, "torchrun"),  # started with python, or
    ({"LOCAL_WORLD_SIZE": "1"}, "torchrun"),
    ({"LOCAL_WORLD_SIZE": "8"}, "torchrun --nproc_per_node=8"),
])  # fmt: skip
def test_next_stage_runs_on_as_many_processes(monkeypatch, environment, launcher):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("DATA_DIR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = Run.__new__(Run)
    run.args = types.SimpleNamespace(data_dir="")
    then = ["torchrun", "simclrv2.py", "--data", "imagenet", "--teacher", "runs/x"]
    assert next_command(run, "knn", None, then) == f"{launcher} simclrv2.py --data imagenet --teacher runs/x"
    assert command_line(run, "python", "evaluate.py", "knn") == "python evaluate.py knn"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much memory is private")
def test_processes_share_the_memory_of_a_checkpoint_and_its_file_stays_as_it_is(tmp_path):
    def private():
        return int(re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    path, size = tmp_path / "checkpoint.pt", 200_000_000
    torch.save({"method": "clip", "model": {"weight": torch.ones(size // 4)}}, path)
    gc.collect()
    before = private()
    weight = load_checkpoint(path)["model"]["weight"]
    assert weight.sum() == size // 4
    assert private() - before < size / 4
    weight[0] = 5.0  # as an optimizer does with a state that it took over
    assert weight[0] == 5.0 and load_checkpoint(path)["model"]["weight"][0] == 1.0


def test_a_run_may_end_while_it_is_profiled(tmp_path):
    """The trace is of steps 10 to 14; a profiler that is not stopped takes the process with it."""
    flags = ["--max-steps", "11", "--batch-size", "8", "--eval-every", "0", "--device", "cpu", "--workers", "0"]
    done = command("simclr.py", *flags, "--profile", "--output-dir", tmp_path / "run")
    assert done.returncode == 0 and (tmp_path / "run/trace.json").stat().st_size > 1000, done.stderr


def test_a_clock_that_is_set_back_changes_no_speed(tmp_path, monkeypatch, capsys):
    """As a machine's is when it hears the right time. Each look at it here finds it an hour earlier."""
    hours = itertools.count(400_000, -1)
    monkeypatch.setattr(run, "time", types.SimpleNamespace(**{**vars(time), "time": lambda: 3600 * next(hours)}))
    train_here("simclr", make_photos(tmp_path / "photos"), tmp_path / "run", "--max-steps", "2", "--eval-every", "0")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(row["images_per_sec"] > 0.1 for row in lines if "loss" in row) and "done in 0m" in capsys.readouterr().out


def test_curves_of_every_column(tmp_path, monkeypatch):
    """With their chance levels, and for an effective rank the full one."""
    found, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: (found.append(figure), save(figure, *args, **options)))
    log = [{"step": 0, "knn_top1": 10.0, "knn_chance": 10, "effective_rank": 2.0, "full_rank": 8},
           {"step": 1, "epoch": 0.5, "loss": 3.0, "chance": 2.5, "lr": 0.1},
           {"step": 2, "epoch": 1.0, "loss": 1.0, "chance": 2.5, "lr": 0.2},
           {"step": 2, "knn_top1": 30.0, "knn_chance": 10, "effective_rank": 4.0, "full_rank": 8}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    pictures.save_curves(tmp_path)
    drawn = {axes.get_title(): {line.get_linestyle(): line.get_xydata().tolist() for line in axes.get_lines()} for axes in found[0].axes}
    assert drawn == {
        "knn_top1": {"-": [[0, 10], [2, 30]], "--": [[0, 10], [2, 10]]},
        "effective_rank": {"-": [[0, 2], [2, 4]], "--": [[0, 8], [2, 8]]},
        "loss": {"-": [[1, 3], [2, 1]], "--": [[1, 2.5], [2, 2.5]]},
        "lr": {"-": [[1, 0.1], [2, 0.2]]},
    }
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (4 * 4 * 80, 3 * 80)


def test_a_run_ends_with_its_curves(tmp_path, monkeypatch):
    photos = make_photos(tmp_path / "photos")
    flags = ["--max-steps", "2", "--eval-every", "0"]
    train_here("simclr", photos, tmp_path / "run", *flags, curves=True)
    assert (tmp_path / "run/curves.png").stat().st_size > 1000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # it is not installed
    train_here("simclr", photos, tmp_path / "bare", *flags, curves=True)
    assert not (tmp_path / "bare/curves.png").exists() and (tmp_path / "bare/checkpoint.pt").exists()
