"""What evaluation costs and what it refuses: memory of features, time of the logistic regression, labels without a class,
files under ~, processes that find different data."""

import json
import os
import re
import sys
import time
import types
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

import common
from command import main
from common import UserError, init_distributed, rank, user_errors
from data import decode, open_dataset
from evaluation.probes import logistic_regression, principal_axes
from knn import extract
from monitor import EvalView, evaluation_set
from sources import Sample
from test_evaluate import CPU, FLAGS, LINEAR, folder, results  # noqa: F401
from toys import Toy


# ------------------------------------------------ labels ------------------------------------------------
@pytest.mark.parametrize("protocol, flags", [("knn", []), ("logreg", []), ("linear", LINEAR), ("linear", ["--cached"]),
                                             ("zeroshot", []), ("semi", ["--labels", "0.5", *LINEAR]), ("finetune", LINEAR)])  # fmt: skip
@pytest.mark.parametrize("split, workers", [("train", "1"), ("val", "0")])
def test_a_label_beyond_the_classes_is_one_sentence(server, folder, tmp_path, protocol, flags, split, workers):  # noqa: F811
    """Class lists that are too short, and tables that count from 1: neither a traceback nor a score."""
    if split == "train" and protocol == "zeroshot":
        pytest.skip("it reads no train split")
    (tmp_path / "classnames.txt").write_text("red\ngreen\nblue\n")
    for part in ("train", "val"):
        rows = []
        for path in sorted((folder / "classes" / part).rglob("*.png")):
            rows.append({"image": str(path), "label": Toy.classes.index(path.parent.name) + (part == split)})
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    method = "clip" if protocol == "zeroshot" else "simclr"
    argv = [protocol, folder / method, "--data", tmp_path, *FLAGS, *flags, "--no-cache", "--workers", workers]
    done = server.run("evaluate.py", *argv)
    last = done.stderr.splitlines()[-1]  # fine-tuning says before that how it goes
    assert done.returncode == 2 and last.startswith("evaluate.py: error: ") and "Traceback" not in done.stderr
    assert last.endswith(" has the label 3, but only 3 classes, from 0 on: fix its labels or its list of classes")


# ------------------------------------------------ files under ~ ------------------------------------------------
def test_the_home_folder(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """--out=~/x reaches Python as it is: the shell puts the home folder only at the start of a word."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    saved = torch.load(folder / "clip/checkpoint.pt", weights_only=True)
    torch.save(saved["model"], tmp_path / "ViT.pt")
    (tmp_path / "own.json").write_text(saved["tokenizer"])
    (tmp_path / "prompts").write_text("a {}\n")
    (tmp_path / "names").write_text("red\ngreen\nblue\n")
    data = ["--data", str(folder / "classes"), *FLAGS]
    files = ["--tokenizer=~/own.json", "--templates=~/prompts", "--classnames=~/names"]
    main(["zeroshot", "~/ViT.pt", *data, *files])
    main(["neighbors", "~/ViT.pt", *data, "--out=~/pictures", "--tokenizer=~/own.json", "--images", "1"])
    assert (tmp_path / "pictures/ViT_neighbors_classes.png").exists() and len(results(tmp_path)) == 1
    main(["export", "~/ViT.pt", "--to", "open_clip", "--out=~/exported"])
    assert (tmp_path / "exported/model.pt").exists() and not (tmp_path / "~").exists()
    capsys.readouterr()


# ------------------------------------------------ memory of features ------------------------------------------------
class Grey:
    """Images of one colour, which cost next to nothing."""

    name, classes, captioned = "grey", ["a", "b"], False

    def __init__(self, n):
        self.n, self.pixels = n, torch.zeros(2, 2, 3, dtype=torch.uint8).numpy()

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return Sample(self.pixels, [], i % 2, str(i))


class Wide(torch.nn.Module):
    """8,192 features of an image, which cost more than anything else here."""

    def forward(self, x):
        return x.new_ones(len(x), 8192)


def kilobytes(name):
    return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def memory(n):
    """-> the size of n features, and by how much reading them raised the peak memory of this process, in MiB."""
    view = EvalView(2)
    extract(Wide(), Grey(300), view, CPU, batch_size=64)
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    features, labels = extract(Wide(), Grey(n), view, CPU, batch_size=64)
    peak = (kilobytes("VmHWM") - before) / 1024
    assert features.shape == (n, 8192) and features.min() == 1 and labels.tolist() == [i % 2 for i in range(n)]
    return features.numel() * 4 / 2**20, peak


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says what the peak was")
@pytest.mark.parametrize("processes", [1, 2])
def test_features_are_held_once(processes, server, tmp_path):
    """Not as lists, their concatenation, its sorted copy and, of several processes, everybody's pickles."""
    server.together("tests/test_limits.py", "memory", tmp_path / "out.json", processes=processes)
    size, peak = json.loads((tmp_path / "out.json").read_text())
    print(f"{processes} processes: {size:.0f} MiB of features, {peak / size:.2f} times that at the peak")
    assert size > 250 and peak < 1.3 * size


# ------------------------------------------------ time of the logistic regression ------------------------------------------------
def test_logistic_regression_takes_no_longer_than_scikit_learn():
    """Over CLIP's seven first values of C, on features as a ResNet's, whose variances differ by orders of magnitude. scikit-learn
    stops after 1,000 iterations, short of the minimum."""
    g = torch.Generator().manual_seed(0)
    samples = [open_dataset("shapes")[i] for i in range(300)]
    y = torch.tensor([sample.label // 10 for sample in samples])  # the colour
    pixels = torch.stack([decode(sample.image)[:, ::4, ::4].flatten() for sample in samples]).float() / 255
    x = (pixels @ torch.randn(768, 384, generator=g) / 30).relu() @ torch.randn(384, 384, generator=g) / 20
    x = x.relu().double()
    taken, losses = [0.0, 0.0], []
    began = time.process_time()
    axes = principal_axes(x)
    taken[0] += time.process_time() - began
    for C in (1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6):
        began = time.process_time()
        ours = logistic_regression(axes, y, C, 10, tolerance=1e-4)
        between = time.process_time()
        with warnings.catch_warnings(action="ignore"):
            theirs = LogisticRegression(C=C, max_iter=1000).fit(x.numpy(), y.numpy())
        taken[0], taken[1] = taken[0] + between - began, taken[1] + time.process_time() - between
        logits = ours(x), x @ torch.from_numpy(theirs.coef_).T + torch.from_numpy(theirs.intercept_)
        losses.append([torch.nn.functional.cross_entropy(z, y).item() for z in logits])
        assert (logits[0].argmax(1) == y).double().mean() >= (logits[1].argmax(1) == y).double().mean() - 0.01
    print("CPU seconds, ours and scikit-learn's:", taken, losses)
    assert taken[0] < taken[1]


# ------------------------------------------------ processes that differ ------------------------------------------------
def test_processes_that_find_other_data_end(server, tmp_path):
    """They would wait for each other's scores for ever: one sentence from each machine."""
    done = server.together("tests/test_limits.py", "differ", tmp_path)
    for which in DIFFERENT:
        for line in (lines := [line for line in done.stdout.splitlines() if line.startswith(f"{which}: ")]):
            assert "processes differ in the val data of the evaluation" in line and "give all nodes the same --eval-data" in line
        assert len(lines) == 2
    assert done.stdout.count("same: found 3\n") == 2


DIFFERENT = "missing", "shorter", "without pictures", "other names"


def differ(root):
    for which in (*DIFFERENT, "same"):
        try:
            said = f"found {len(evaluation_set(files_of(which, root)))}"
        except UserError as error:
            said = error
        os.write(1, f"{which}: {said}\n".encode())  # in one piece, as two processes write at once


def files_of(which, root):
    """-> what a method's arguments are on a machine whose files may be others."""
    root = Path(root) / f"{which}{rank()}" / "set"
    root.mkdir(parents=True)
    count = {"missing": 3 * (rank() == 0), "shorter": 3 - rank()}.get(which, 3)
    if count:
        rows = [json.dumps({"image": f"{i}.png", "captions": ["x"], "label": 0}) for i in range(count)]
        (root / "val.jsonl").write_text("\n".join(rows))
        (root / "classnames.txt").write_text("y" if which == "other names" and rank() else "x")
    for i in range(count):
        if which != "without pictures" or rank() == 0:
            Image.new("RGB", (8, 8)).save(root / f"{i}.png")
    return types.SimpleNamespace(data=str(root), eval_data="", data_dir="")


def test_one_process_on_a_mac(monkeypatch):
    """gloo, which torchrun's processes talk through there, has no collective on its devices: one process needs none."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        assert init_distributed() == torch.device("mps") and torch.distributed.is_initialized()
        x = torch.ones(2, requires_grad=True, device="meta")  # a device without collectives, too
        assert common.all_gather(x) is x and common.all_reduce_mean(x).shape == (2,)
    finally:
        torch.distributed.destroy_process_group()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device mps is not available here, use cpu"):
        init_distributed("mps")


if __name__ == "__main__":
    with user_errors():
        init_distributed("cpu")
        if sys.argv[1] == "differ":
            differ(*sys.argv[2:])
        else:
            measured = memory(8500)
            if rank() == 0:
                Path(sys.argv[2]).write_text(json.dumps(measured))
