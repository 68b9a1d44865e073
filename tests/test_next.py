"""The line `next:` that ends a run works when it is pasted, and the line `evaluation:` at its start is true; for every
method, and with a space in every path."""

import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

import command
import pictures as drawn
from common import UserError
from data import open_dataset
from knn import knn_eval, linear_eval, probe_sets
from monitor import language_set
from run import Run
from runs import COMMON, FLAGS, METHODS, ROOT, environment, make_photos, module_of

LANGUAGE = ["clip", "slip", "declip", "align"]
SHORT = ["--max-steps", "2", "--eval-every", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`with captions` and `with classes`, folders of named data: a flickr8k and a redcaps."""
    root = tmp_path_factory.mktemp("next") / "a folder"
    make_photos(root / "with captions" / "flickr8k", train=20, val=9)
    for split, count in (("train", 20), ("val", 9)):
        for i in range(count):
            red = i % 2
            picture = root / "with classes" / "redcaps" / split / ("red" if red else "blue") / f"{i}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (200 * red + i, 0, 200)).save(picture)
    return root


@pytest.fixture
def train(folder, capsys, monkeypatch):
    """-> function(method, flags) that runs it -> (its lines `evaluation:`, what `next:` says)."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DATA_DIR", raising=False)

    def run(name, *flags):
        module = module_of(name)
        defaults = [*COMMON, *SHORT] if name == "simclrv2" else [*FLAGS[name], *SHORT]
        module.train(module.parse_args(module.Args, module.RECIPES, [*defaults, *flags]))
        out = capsys.readouterr().out
        (line,) = re.findall("^next: (.*)$", out, re.M)
        return re.findall("^evaluation: (.*)$", out, re.M), line

    return run


def paste(line):
    """The command of a line, in this process -> its words."""
    python, script, *words = shlex.split(line)
    assert python == "python" and os.path.samefile(script, ROOT / "evaluate.py")
    command.main([*words, "--workers", "0"])
    return words


@pytest.mark.parametrize("name", METHODS)
def test_next_line_of_every_method(name, train, folder, capsys):
    protocol, data, sets = "knn", "redcaps", "with classes"
    if name in LANGUAGE:
        protocol, data, sets = "retrieval", "flickr8k", "with captions"
    directory = f"runs/one of {name}"
    evaluation, line = train(name, "--data", data, "--data-dir", sets, "--output-dir", directory)
    assert paste(line) == [protocol, directory, "--data", data, "--data-dir", sets]
    assert f"{protocol}, {data} val, percent" in capsys.readouterr().out
    (result,) = map(json.loads, (folder / directory / "results.jsonl").read_text().splitlines())
    assert result["protocol"] == protocol and result["step"] == 2
    if name in LANGUAGE:
        assert evaluation == ["retrieval of 9 validation images of flickr8k"]
    else:
        assert evaluation == ["kNN of 9 validation images among 20 training images of redcaps"]
    scores = [row for row in map(json.loads, (folder / directory / "metrics.jsonl").read_text().splitlines())
              if {"recall@1", "knn_top1"} & row.keys()]  # fmt: skip
    assert scores[-1]["step"] == 2


def test_next_line_of_simclrv2(train, folder):
    """It teaches a student; the line of that one evaluates it."""
    sets = ["--data", "redcaps", "--data-dir", "with classes"]
    train("simclr", *sets, "--output-dir", "runs/to fine-tune")
    more = ["--checkpoint", "runs/to fine-tune", "--label-fraction", "1", "--warmup-epochs", "0"]
    evaluation, line = train("simclrv2", *sets, *more, "--output-dir", "runs/fine tuned")
    assert evaluation == ["accuracy of 9 validation images of redcaps"]
    launcher, script, *words = shlex.split(line)
    assert launcher == "torchrun" and os.path.samefile(script, ROOT / "simclrv2.py")
    assert words[words.index("--data-dir") + 1] == "with classes" and words[words.index("--teacher") + 1] == "runs/fine tuned"
    assert words[words.index("--checkpoint") + 1] == "runs/to fine-tune"
    evaluation, line = train("simclrv2", *words, "--output-dir", "runs/a student")
    assert evaluation == ["accuracy of 9 validation images of redcaps"]
    assert paste(line)[0] == "knn"


@pytest.mark.parametrize("name", ["clip", "dino", "simclrv2"])
def test_evaluation_data_that_the_user_names_must_be_there(name, train, folder):
    """A run without them would go on to its end, and nothing would have measured it."""
    init = ["--init", "no such/weights", "--arch", "resnet18"] if name == "simclrv2" else []
    with pytest.raises(UserError, match="--eval-data cifr10: there is no data at .*/cifr10, did you mean cifar10?"):
        train(name, "--data", "with classes/redcaps", "--eval-data", "cifr10", "--output-dir", "runs/misspelt", *init)
    with pytest.raises(UserError, match="--eval-data with classes/redcaps/train: .* has no val split"):
        train(name, "--data", "with classes/redcaps", "--eval-data", "with classes/redcaps/train", "--output-dir", "runs/misspelt", *init)
    assert not (folder / "runs/misspelt").exists()


def test_next_line_without_what_is_evaluated(train, folder, monkeypatch):
    """Evaluation data that are not there are not named, and what has neither classes nor captions is not retrieved."""
    data = "with captions/flickr8k"
    monkeypatch.setitem(module_of("clip").RECIPES, "ours", {"eval_data": "imagenet"})
    evaluation, line = train("clip", "--data", data, "--recipe", "ours", "--output-dir", "runs/no data")
    assert len(evaluation) == 1 and evaluation[0].startswith("none, because there is no data at ")
    assert paste(line) == ["retrieval", "runs/no data", "--data", data, "--split", "train"]
    evaluation, line = train("dino", "--data", data, "--output-dir", "runs/no classes")
    assert evaluation == ["none, because flickr8k has no classes"]
    assert paste(line) == ["neighbors", "runs/no classes", "--data", data]
    evaluation, line = train("simclr", "--data", data + "/train.jsonl", "--output-dir", "runs/no val")
    assert len(evaluation) == 1 and "has no val split" in evaluation[0]
    assert paste(line) == ["neighbors", "runs/no val", "--data", data + "/train.jsonl"]


@pytest.fixture
def said(tmp_path, capsys):
    """-> function that opens evaluation data, a folder below tmp_path -> (line it prints, the sets)."""

    def ask(sets, data, probe="knn"):
        found = sets(types.SimpleNamespace(data="shapes", eval_data=str(tmp_path / data), data_dir="", recipe="", probe=probe, workers=3))
        (line,) = capsys.readouterr().out.splitlines()
        return line.removeprefix("evaluation: "), found

    return ask


def pictures(folder, classes):
    for split in ("train", "val"):
        for i, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / split / name / f"{i}.png")


def test_what_will_be_evaluated(said, tmp_path, capsys):
    pictures(tmp_path / "words", ["cat", "dog"])
    text, (probe, bank, val) = said(probe_sets, "words")
    assert text == "kNN of 2 validation images among 2 training images of words" and len(bank) == len(val) == 2
    assert probe.func is knn_eval and probe.keywords == {"workers": 3}
    opened = bank
    bank = probe_sets(types.SimpleNamespace(data=str(tmp_path / "words"), eval_data="", data_dir="", probe="knn", workers=0), opened)[1]
    assert bank is opened  # it is not read twice
    args = types.SimpleNamespace(data="shapes", eval_data=str(tmp_path / "words"), data_dir="", probe="knn", workers=0)
    assert probe_sets(args, opened)[1] is not opened
    capsys.readouterr()
    text, (probe, bank, val) = said(probe_sets, "words", probe="linear")
    assert text == "linear classifier of 2 validation images, fitted to 2 training images of words" and probe.func is linear_eval
    text, val = said(language_set, "words")
    assert text == "zero-shot classification of 2 validation images of words" and val.classes == ["cat", "dog"]

    with pytest.raises(UserError, match="--probe is for methods without captions"):
        said(language_set, "words", probe="linear")

    pictures(tmp_path / "ids", ["n01440764", "n01443537"])
    assert said(probe_sets, "ids")[1][1].classes == ["n01440764", "n01443537"]
    text, val = said(language_set, "ids")
    assert "WordNet ids and its classnames.txt is missing" in text and text.startswith("none, because ") and val is None

    pictures(tmp_path / "numbers", ["1.5"])  # one folder is no class
    for split in ("train", "val"):
        (tmp_path / "numbers" / f"{split}.csv").write_text(f"file,label\n{split}/1.5/0.png,0\n")
    text, (probe, bank, val) = said(probe_sets, "numbers")
    assert text == "none, because numbers has labels but its classnames.txt is missing, see docs/data.md"
    assert bank is None and val is None
    for split in ("train", "val"):
        (tmp_path / "numbers" / f"{split}.csv").write_text(f"file,label\n{split}/1.5/0.png,dog\n")
    lack = f"labels such as 'dog' are no numbers: list the names in {tmp_path}/numbers/classnames.txt"
    assert said(probe_sets, "numbers")[0] == f"none, because {lack}"
    (tmp_path / "numbers" / "classnames.txt").write_text("cat\ndog\n")
    assert said(probe_sets, "numbers")[1][1].classes == ["cat", "dog"]
    with pytest.raises(UserError, match=f"--eval-data .*: there is no data at {tmp_path}/nowhere"):
        said(language_set, "nowhere")


def test_a_single_file_may_be_evaluated(said, tmp_path, capsys, monkeypatch):
    """As it may be trained on. Neighbours are those of --data: the file's own would be its images themselves."""
    pictures(tmp_path / "words", ["cat", "dog"])
    (tmp_path / "held.csv").write_text("file,caption,label\n" + "".join(f"words/val/{x}/{i}.png,a {x},{i}\n" for i, x in enumerate(["cat", "dog"])))
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "one.csv").write_text("file,caption\nwords/val/cat/0.png,a cat\n")
    assert said(language_set, "one.csv")[0] == "retrieval of 1 validation image of one.csv"
    text, val = said(language_set, "held.csv")
    assert text == "zero-shot classification and retrieval of 2 validation images of held.csv" and len(val) == 2
    opened = open_dataset(str(tmp_path / "words"))
    args = types.SimpleNamespace(data="x", eval_data=str(tmp_path / "held.csv"), data_dir="", probe="knn", workers=0)
    _, bank, val = probe_sets(args, opened)
    assert bank is opened and [val[i].label for i in range(2)] == [0, 1]
    assert "kNN of 2 validation images among 2 training images of words" in capsys.readouterr().out
    monkeypatch.setenv("DATA_DIR", "")
    run = Run.__new__(Run)
    run.args, run.dir, run.loader = args, Path("runs/x"), types.SimpleNamespace(dataset=opened)
    for protocol, words in (("knn", ["neighbors"]), ("zeroshot", ["zeroshot", "--split", "train"])):
        following = shlex.split(drawn.next_command(run, protocol, val))[2:]
        assert following == [words[0], "runs/x", "--data", args.eval_data, *words[1:]]
    args.data = args.eval_data
    with pytest.raises(UserError, match="in which every image would be its own neighbour"):
        probe_sets(args, opened)


def test_splits_of_different_classes_are_refused(tmp_path):
    """Labels count classes: 1 would be a dog in one split and a cow in the other."""
    pictures(tmp_path, ["cat", "dog"])
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "cow")
    with pytest.raises(UserError, match=r"differ in their classes \(cow, dog\)"):
        probe_sets(types.SimpleNamespace(data=str(tmp_path), eval_data="", data_dir="", probe="knn"))


def test_next_line_in_a_shell(folder):
    """From another folder, with named data where $DATA_DIR says, which the next command need not know."""
    env = environment() | {"DATA_DIR": str(folder / "with classes"), "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    argv = [ROOT / "simclr.py", *FLAGS["simclr"], *SHORT, "--data", "redcaps", "--output-dir", "runs/in a shell"]
    done = subprocess.run([sys.executable, *argv], cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    env.pop("DATA_DIR")
    line = done.stdout.rpartition("\nnext: ")[2].strip()
    done = subprocess.run(line, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "knn, redcaps val, percent" in done.stdout, done.stderr[-2000:]
