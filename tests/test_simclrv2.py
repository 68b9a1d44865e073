"""simclrv2.py, which needs runs of earlier stages: a tiny one of simclr.py to fine-tune, that to distil."""

import copy
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import simclr
import simclrv2
from common import LARS, UserError, user_errors
from data import Loader, decode, open_dataset
from evaluation.weights import open_network
from run import Run, load_checkpoint
from runs import COMMON, ROOT, make_photos, rows
from runs import train_here as train_method
from sources import Sample
from test_resume import assert_same_run
from test_structure import BANNER, SECTIONS, backward, cut

FLAGS = {
    "finetune": ["--image-size", "16", "--warmup-epochs", "0", "--label-fraction", "0.5", "--base-lr", "0.003"],
    "distill": ["--image-size", "16", "--warmup-epochs", "0", "--recipe", "shapes-distill", "--alpha", "0.25",
                "--temperature", "0.5", "--base-lr", "0.01"],
}


def argv_for(stage, photos, stages, directory, *flags):
    start = ["--checkpoint", stages / "simclr"] if stage == "finetune" else ["--teacher", stages / "finetune"]
    paths = ["--data", photos, "--output-dir", directory, *start]
    return [*map(str, paths), *COMMON, *FLAGS[stage], *flags]


def train_here(argv):
    """Runs train() in this process (or in all processes of this group) -> gradients of its first three steps."""
    grads = []

    def keep(optimizer, *_):
        if len(grads) < 3:
            grads.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    handle = register_optimizer_step_pre_hook(keep)
    try:
        simclrv2.train(simclrv2.parse_args(simclrv2.Args, simclrv2.RECIPES, argv))
    finally:
        handle.remove()
    return grads


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """52 and 12 pictures of four classes."""
    folder = make_photos(tmp_path_factory.mktemp("photos"))
    (folder / "classnames.txt").write_text("a\nb\nc\nd\n")
    for split in ("train", "val"):
        lines = (folder / f"{split}.jsonl").read_text().splitlines()
        labelled = [json.dumps({**json.loads(line), "label": i % 4}) for i, line in enumerate(lines)]
        (folder / f"{split}.jsonl").write_text("\n".join(labelled) + "\n")
    return folder


@pytest.fixture(scope="module")
def stages(photos, tmp_path_factory):
    """A folder with a run of simclr.py, whose head has three layers, and one of 10 steps of each stage."""
    root = tmp_path_factory.mktemp("stages")
    flags = ["--max-steps", "2", "--head-layers", "3", "--eval-every", "0"]
    train_method("simclr", photos, root / "simclr", *flags)
    for stage in ("finetune", "distill"):
        train_here(argv_for(stage, photos, root, root / stage, "--max-steps", "10", "--eval-every", "4"))
    return root


@pytest.mark.parametrize("stage", FLAGS)
def test_five_and_five(stage, photos, stages, tmp_path):
    argv = argv_for(stage, photos, stages, tmp_path, "--eval-every", "4")
    train_here([*argv, "--max-steps", "5"])
    assert rows(tmp_path)[-1]["step"] == 5
    train_here([*argv, "--max-steps", "10", "--workers", "1"])
    assert_same_run(stages / stage, tmp_path)


def test_a_run_that_continues_does_not_need_its_start(photos, stages, tmp_path):
    """Its own checkpoint has the weights, and says which network they are of."""
    shutil.copytree(stages / "simclr", tmp_path / "start")
    argv = argv_for("finetune", photos, stages, tmp_path / "run", "--checkpoint", str(tmp_path / "start"), "--eval-every", "4")
    train_here([*argv, "--max-steps", "5"])
    shutil.rmtree(tmp_path / "start")
    train_here([*argv, "--max-steps", "10"])
    runs_of = stages / "finetune", tmp_path / "run"
    assert rows(runs_of[0]) == rows(runs_of[1]) and len(rows(runs_of[0])) == 13
    with pytest.raises(UserError, match="there is no checkpoint at .*start"):
        train_here([*argv, "--output-dir", str(tmp_path / "new")])
    shutil.copytree(stages / "simclr", tmp_path / "start")
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match="run/checkpoint.pt cannot be read.*: remove it to begin again"):
        train_here([*argv, "--max-steps", "10"])


def test_a_student_that_continues_needs_its_teacher(photos, stages, tmp_path):
    """It learns from it in each step. The sentence says so, and nothing of the run changes."""
    shutil.copytree(stages / "finetune", tmp_path / "teacher")
    argv = argv_for("distill", photos, stages, tmp_path / "run", "--teacher", str(tmp_path / "teacher"), "--eval-every", "0")
    train_here([*argv, "--max-steps", "1"])
    shutil.rmtree(tmp_path / "teacher")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError, match=f"there is no --teacher {tmp_path}/teacher: a student needs it also to go on"):
        train_here([*argv, "--max-steps", "2"])
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_signal_saves_before_an_evaluation(photos, stages, tmp_path, monkeypatch):
    """The run that continues makes it."""

    def stop(run):
        run.stop = signal.SIGTERM * (run.step == 4)
        return run.stop > 0

    argv = argv_for("finetune", photos, stages, tmp_path, "--eval-every", "4", "--max-steps", "10")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "agree_to_stop", stop)
        with pytest.raises(SystemExit):
            train_here(argv)
    assert [row["step"] for row in rows(tmp_path) if "val_top1" in row] == []
    train_here(argv)
    assert_same_run(stages / "finetune", tmp_path)


EIGHT = ["--max-steps", "8", "--eval-every", "4"]


@pytest.fixture(scope="module")
def one(photos, stages, tmp_path_factory):
    """{stage: directory of a run on one process, its gradients}."""
    root = tmp_path_factory.mktemp("one")
    return {stage: (root / stage, train_here(argv_for(stage, photos, stages, root / stage, *EIGHT))) for stage in FLAGS}


@pytest.mark.parametrize("processes", [2, 4])
def test_same_run_on_more_processes(processes, server, photos, stages, one, tmp_path):
    jobs = [argv_for(stage, photos, stages, tmp_path / stage, *EIGHT) for stage in FLAGS]
    server.together("tests/test_simclrv2.py", json.dumps(jobs), processes=processes)
    for stage, (directory, grads) in one.items():
        logs = [rows(directory), rows(tmp_path / stage)]
        single, several = ([row for row in log if "loss" in row] for log in logs)
        assert len(single) == 8 and len({row["loss"] for row in single}) == 8  # it moves
        for a, b in zip(single, several, strict=True):
            assert a.keys() == b.keys()
            for name, value in a.items():
                assert b[name] == pytest.approx(value, rel=1e-4), (stage, a["step"], name)
        many = torch.load(tmp_path / stage / "grads.pt", weights_only=True)
        third = grads[2]  # the classifier starts at 0, then each block's last gain is 0: nothing passes
        largest = max(g.abs().max() for g in third)
        assert sum(bool(g.any()) for g in many) > 0.9 * len(many)  # the network is reached
        for a, b in zip(third, many, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(largest))
        evaluated = [[row["step"] for row in log if "val_top1" in row] for log in logs]
        assert evaluated == [[4, 8], [4, 8]]


def test_chance_stands_beside_the_losses(stages):
    finetune, distill = ([r for r in rows(stages / stage) if "loss" in r] for stage in FLAGS)
    assert finetune[0]["loss"] == pytest.approx(math.log(4), rel=1e-6)  # the classifier starts at 0
    assert finetune[0]["chance"] == pytest.approx(math.log(4))
    for row in distill:
        assert row["chance"] == row["distill_chance"] == row["label_chance"] == pytest.approx(math.log(4))
        assert row["loss"] == pytest.approx(0.25 * row["distill_loss"] + 0.75 * row["label_loss"], rel=1e-5)
        assert row["teacher_entropy"] < row["distill_loss"] * (1 + 1e-6)
    assert distill[0]["distill_loss"] == pytest.approx(math.log(4), rel=1e-6)


def test_learns_its_labels_then_its_teacher(photos, stages, tmp_path):
    """Eight labelled pictures, sixty times, then all of them from that teacher. Cropping makes steps noisy."""
    flags = ["--label-fraction", "0.16", "--base-lr", "0.003", "--epochs", "60", "--eval-every", "0"]
    train_here(argv_for("finetune", photos, stages, tmp_path / "teacher", *flags))
    losses = [row["loss"] for row in rows(tmp_path / "teacher") if "loss" in row]
    assert sum(losses[-20:]) / 20 < 0.7 * math.log(4)  # a share of 0.3 to 0.5 with seeds 0 to 2
    flags = ["--teacher", str(tmp_path / "teacher"), "--alpha", "1", "--base-lr", "0.003", "--epochs", "20"]
    train_here(argv_for("distill", photos, stages, tmp_path / "student", *flags, "--eval-every", "0"))
    apart = [row["loss"] - row["teacher_entropy"] for row in rows(tmp_path / "student") if "loss" in row]
    assert sum(apart[-20:]) < 0.8 * sum(apart[:20])


@pytest.mark.parametrize("stage", FLAGS)
def test_three_steps_by_hand(stage, photos, stages, tmp_path, monkeypatch):
    """Rates, gradients and updates of the loop against a second definition of each, from the views it made."""
    nets, views, labelled, seen = [], [], [], []
    build, supervised = simclrv2.build_model, simclrv2.supervised_loss


    def keep_input(net, inputs):
        if net.training and net is nets[0]:
            views.append(inputs[0].clone())

    def built(args):
        nets.append(build(args))
        nets[-1].register_forward_pre_hook(keep_input)
        return nets[-1]

    def keep(optimizer, *_):
        grads = {name: p.grad.clone() for name, p in nets[0].named_parameters()}
        seen.append((copy.deepcopy(nets[0]), grads, [dict(group, params=None) for group in optimizer.param_groups]))

    monkeypatch.setattr(simclrv2, "build_model", built)
    monkeypatch.setattr(simclrv2, "supervised_loss", lambda x, y: labelled.append(y.clone()) or supervised(x, y))
    handle = register_optimizer_step_pre_hook(keep)
    try:
        flags = ["--warmup-epochs", "0.5", "--base-lr", "0.01", "--weight-decay", "0.2", "--max-steps", "4", "--eval-every", "0"]
        argv = argv_for(stage, photos, stages, tmp_path, *flags)
        simclrv2.train(simclrv2.parse_args(simclrv2.Args, simclrv2.RECIPES, argv))
    finally:
        handle.remove()

    steps_per_epoch = {"finetune": 3, "distill": 6}[stage]  # of 24 labelled pictures, of all 52
    warmup, total, peak = round(0.5 * steps_per_epoch), 4 * steps_per_epoch, 0.01 * 8**0.5
    scale = 0.5**2 if stage == "distill" else 1.0  # temperature squared
    momenta = {}
    for t, (before, grads, groups) in enumerate(seen):
        lr = peak * t / warmup if t < warmup else peak / 2 * (1 + math.cos(math.pi * (t - warmup) / (total - warmup)))
        assert [group["lr"] for group in groups] == [pytest.approx(lr)] * 2
        logits = before.train()(views[t])
        loss = F.cross_entropy(logits, labelled[t], ignore_index=-1)
        if stage == "distill":
            teacher = load_checkpoint(stages / "finetune")["model"]
            nets[1].load_state_dict(teacher)
            p = (nets[1].eval()(views[t]) / 0.5).softmax(1).detach()
            loss = -0.25 * (p * (logits / 0.5).log_softmax(1)).sum(1).mean() + 0.75 * loss
        decay = 0.2 * scale if stage == "finetune" else 0.2  # LARS; SGD
        before.zero_grad()
        (scale * loss + decay / 2 * before.classifier.weight.square().sum()).backward()
        largest = max(float(g.abs().max()) for g in grads.values())
        for name, p in before.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}")
        if stage == "finetune":  # LARS's step has a test of its own; here: what it leaves alone and its form
            assert [group["exclude"] for group in groups] == [False, True]
            assert all(group["lr_in_momentum"] for group in groups)
            continue
        after = seen[t + 1][0] if t + 1 < len(seen) else nets[0]
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
            decayed = old.ndim >= 2 and name != "classifier.weight"
            momenta[name] = 0.9 * momenta.get(name, 0) + grads[name] + 0.2 * decayed * old.detach()
            torch.testing.assert_close(new.detach(), old.detach() - lr * momenta[name], rtol=1e-4, atol=1e-6)
    assert len(seen) == 4


def test_the_only_view_is_a_crop_that_may_be_flipped(monkeypatch):
    asked = []

    def crop(image, rng, size, scale, **rest):
        asked.append((size, scale, rest))
        return image

    monkeypatch.setattr(simclrv2, "random_resized_crop", crop)
    view, rng = simclrv2.CropFlipView(16), random.Random(0)
    view.crop(torch.zeros(3, 20, 20, dtype=torch.uint8), rng)
    simclrv2.CropFlipView(16, 0.5).crop(torch.zeros(3, 20, 20, dtype=torch.uint8), rng)
    assert asked == [(16, (smallest, 1.0), {"interpolation": "bicubic"}) for smallest in (0.08, 0.5)]
    drawn = [view.sample(rng) for _ in range(4000)]
    assert {tuple(params) for params in drawn} == {("flip",)}
    assert sum(params["flip"] for params in drawn) / 4000 == pytest.approx(0.5, abs=0.03)
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    y = view(x, {"flip": torch.tensor([True, False])})
    torch.testing.assert_close(y, torch.stack([x[0].flip(2), x[1]]) / 255)


# ------------------------------------------------ losses ------------------------------------------------
@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_distillation_loss(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    loss = simclrv2.distillation_loss(student, teacher, temperature)
    expected = 0.0
    for s, t in zip(student.detach().double().tolist(), teacher.double().tolist()):  # Eq. 2, as it stands
        s, t = ([math.exp(f / temperature) for f in row] for row in (s, t))
        expected -= sum(p / sum(t) * math.log(q / sum(s)) for p, q in zip(t, s)) / 6
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    (grad,) = torch.autograd.grad(loss, student)
    target = F.softmax(teacher / temperature, dim=1)
    kl = F.kl_div(F.log_softmax(student / temperature, dim=1), target, reduction="batchmean")
    torch.testing.assert_close(grad, *torch.autograd.grad(kl, student))
    entropy = simclrv2.distillation_loss(teacher, teacher, temperature)
    assert loss.item() - entropy.item() == pytest.approx(kl.item(), rel=1e-4, abs=1e-6)
    uniform = simclrv2.distillation_loss(torch.zeros(6, 5), teacher, temperature)
    assert uniform.item() == pytest.approx(math.log(5), rel=1e-6)
    half = simclrv2.distillation_loss(student.bfloat16(), teacher.bfloat16(), temperature)
    assert half.dtype == torch.float32


def test_a_step_on_temperature_squared_times_the_loss_changes_predictions_alike():
    """What the loop does, and why: for teachers with the same prediction any temperature trains alike."""
    torch.manual_seed(0)
    features, sharp = torch.randn(6, 3), torch.randn(6, 5)
    predictions = []
    for temperature in (0.1, 1.0, 4.0):
        weight = torch.zeros(3, 5, requires_grad=True)
        for _ in range(3):
            loss = simclrv2.distillation_loss(features @ weight, temperature * sharp, temperature)
            (grad,) = torch.autograd.grad(temperature**2 * loss, weight)
            weight = (weight - 0.5 * grad).detach().requires_grad_()
        predictions.append(F.softmax(features @ weight / temperature, dim=1).detach())
    assert predictions[0].std() > 0.01
    torch.testing.assert_close(predictions[1:], predictions[:1] * 2, rtol=1e-5, atol=1e-6)


def test_supervised_loss():
    logits, labels = torch.randn(6, 5), torch.tensor([3, 0, -1, 4, -1, 1])
    loss = simclrv2.supervised_loss(logits, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits[labels >= 0], labels[labels >= 0]))
    assert simclrv2.supervised_loss(logits, torch.full((6,), -1)) == 0
    assert simclrv2.supervised_loss(torch.zeros(6, 5), labels).item() == pytest.approx(math.log(5))


# ------------------------------------------------ labels ------------------------------------------------
class Labels:
    """A dataset of labels alone; asking for a broken one raises."""

    name = "labels"

    def __init__(self, labels, broken=()):
        self.labels, self.broken, self.reads, self.classes = labels, set(broken), 0, ["a", "b", "c"]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        self.reads += 1
        if i in self.broken:
            raise ValueError("broken")
        return types.SimpleNamespace(label=self.labels[i])


def test_labelled_part_is_balanced_and_a_function_of_the_seed():
    labels = torch.arange(3).repeat(500)
    dataset = Labels(labels.tolist())
    part = simclrv2.labelled_part(dataset, 0.1, seed=0)
    assert part.dtype == torch.bool and part.shape == (1500,)
    assert labels[part].bincount().tolist() == [50, 50, 50]
    assert dataset.reads < 300
    torch.manual_seed(5)
    assert torch.equal(part, simclrv2.labelled_part(dataset, 0.1, seed=0))
    assert not torch.equal(part, simclrv2.labelled_part(dataset, 0.1, seed=1))
    assert not (part & ~simclrv2.labelled_part(dataset, 0.2, seed=0)).any()  # nested
    assert simclrv2.labelled_part(dataset, 1.0, seed=0).all()
    assert sorted(labels[simclrv2.labelled_part(dataset, 1e-6, seed=0)].tolist()) == [0, 1, 2]  # at least one


def test_labelled_part_of_a_set_that_is_uneven_broken_or_partly_unlabelled():
    labels = [0] * 90 + [1] * 4 + [2] * 90 + [-1] * 16
    part = simclrv2.labelled_part(Labels(labels, broken=range(80)), 0.15, seed=0)  # 10 of each class
    chosen = torch.tensor(labels)[part]
    assert (chosen >= 0).all() and chosen.bincount().tolist() == [10, 4, 10] and not part[:80].any()


def relabelled(photos, folder, label_of):
    """A copy of the photos in which training sample i has the label label_of(i)."""
    shutil.copytree(photos, folder)
    lines = (folder / "train.jsonl").read_text().splitlines()
    labelled = [json.dumps({**json.loads(line), "label": label_of(i)}) for i, line in enumerate(lines)]
    (folder / "train.jsonl").write_text("\n".join(labelled) + "\n")
    return folder


@pytest.mark.parametrize("stage, fraction", [("finetune", "0.5"), ("finetune", "1"), ("distill", "0.5")])
def test_a_label_beyond_the_classes_is_refused(stage, fraction, photos, stages, tmp_path):
    folder = relabelled(photos, tmp_path / "photos", lambda i: i % 4 if i % 8 else 7)
    flags = ["--max-steps", "20", "--eval-every", "0", "--label-fraction", fraction]
    wrong = {"finetune": "photos.* has the label 7, but only 4 classes",
             "distill": "the images of photos.* are not those whose labels the teacher had"}  # fmt: skip
    with pytest.raises(UserError, match=wrong[stage]) as error:
        train_here(argv_for(stage, folder, stages, tmp_path / "run", *flags))
    assert "\n" not in str(error.value)


def test_a_label_below_0_is_none(photos, stages, tmp_path):
    folder = relabelled(photos, tmp_path / "photos", lambda i: i % 8 - 4)
    flags = ["--max-steps", "3", "--eval-every", "0", "--label-fraction", "1"]
    train_here(argv_for("finetune", folder, stages, tmp_path / "run", *flags))
    assert all(0 < row["loss"] < 10 for row in rows(tmp_path / "run") if "loss" in row)


def test_a_student_sees_the_labels_of_its_teacher_alone(photos, stages, tmp_path, monkeypatch):
    seen, original = [], simclrv2.supervised_loss
    monkeypatch.setattr(simclrv2, "supervised_loss", lambda x, y: seen.append(y.clone()) or original(x, y))
    flags = ["--max-steps", "6", "--eval-every", "0", "--seed", "7", "--label-fraction", "1.0"]
    train_here(argv_for("distill", photos, stages, tmp_path, *flags))
    dataset = open_dataset(str(photos))
    part = simclrv2.labelled_part(dataset, 0.5, seed=0)  # what the teacher was trained with
    assert part.sum() == 24
    order = Loader(dataset, {}, {}, 8, seed=7).order(0, 6)
    expected = [[dataset[i].label if part[i] else -1 for _, i in batch] for batch in order]
    assert [y.tolist() for y in seen] == expected


def test_unlabelled_images_are_enough_for_a_student(photos, stages, tmp_path):
    folder = make_photos(tmp_path / "unlabelled")
    argv = argv_for("distill", folder, stages, tmp_path / "run", "--alpha", "1", "--max-steps", "2")
    train_here([*argv, "--eval-data", str(photos)])
    assert rows(tmp_path / "run")[-1].keys() >= {"val_top1", "val_chance"}
    assert "label_loss" not in rows(tmp_path / "run")[0]
    with pytest.raises(UserError, match="labels"):
        train_here([*argv, "--alpha", "0.9", "--output-dir", str(tmp_path / "other")])
    train_here([*argv, "--output-dir", str(tmp_path / "other")])  # nothing to evaluate on
    assert not any("val_top1" in row for row in rows(tmp_path / "other"))


# ------------------------------------------------ network ------------------------------------------------
@pytest.mark.parametrize("head_layer", [0, 1, 2])
def test_starts_from_that_head_layer(head_layer, photos, stages, tmp_path):
    flags = ["--max-steps", "1", "--base-lr", "0", "--head-layer", str(head_layer), "--eval-every", "0"]
    train_here(argv_for("finetune", photos, stages, tmp_path, *flags))
    before, after = (open_network(d, torch.device("cpu")) for d in (stages / "simclr", tmp_path))
    names = {name.split(".")[2] for name, _ in after.model.named_parameters() if name.startswith("head.")}
    assert names == {str(k) for k in range(head_layer)}
    expected = simclr.image_encoder(before.model, head_layer)
    kept = after.model.state_dict().keys() & before.model.state_dict().keys()  # one step has moved batch norm's
    after.model.load_state_dict({name: before.model.state_dict()[name] for name in kept}, strict=False)
    x = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(expected.eval()(x), after.encoder.eval()(x), rtol=0, atol=0)
    unmoved = after.model.state_dict()
    for name, value in load_checkpoint(tmp_path)["model"].items():
        if not name.startswith("classifier") and "running" not in name and "num_batches" not in name:
            assert torch.equal(value, unmoved[name]), name
    assert not after.model.classifier.weight.any()


class Noise(list):
    """Samples of one random image each."""

    name, captioned = "noise", False

    def __init__(self, n, classes):
        self.classes = [str(c) for c in range(classes)]
        images = torch.randint(0, 256, (n, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        super().__init__(Sample(image.numpy(), [], i % classes, str(i)) for i, image in enumerate(images))


@pytest.mark.parametrize("classes", [4, 5, 9])
def test_accuracy_in_the_training_loop(classes):
    """From five classes on also with the five that rank first."""
    val, view = Noise(60, classes), simclrv2.eval_view(simclrv2.Args(image_size=16))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, classes))
    hits = []
    for sample in val:
        x = view(view.crop(decode(sample.image))[None])
        hits.append((model(x)[0].argsort(descending=True) == sample.label).tolist())
    expected = {"val_top1": 100 * sum(row[0] for row in hits) / 60, "val_chance": 100 / classes}
    if classes >= 5:
        expected["val_top5"] = 100 * sum(any(row[:5]) for row in hits) / 60
    assert simclrv2.accuracy(model, val, view, torch.device("cpu"), 0) == pytest.approx(expected)


def test_checkpoints_open_in_evaluate(photos, stages, tmp_path):
    for stage in FLAGS:
        net = open_network(stages / stage, torch.device("cpu"))
        assert net.method == "simclrv2" and net.step == 10
        val, scores = open_dataset(str(photos), split="val"), []
        for i in range(len(val)):  # what the loop logged, by hand
            x = net.view(net.view.crop(decode(val[i].image))[None])
            scores.append(net.model.eval()(x).argmax().item() == val[i].label)
        logged = [row for row in rows(stages / stage) if "val_top1" in row][-1]
        assert logged["step"] == 10 and logged["val_chance"] == 25
        assert logged["val_top1"] == pytest.approx(100 * sum(scores) / len(scores))
    head, no_head = (open_network(stages / stage, torch.device("cpu")).encoder for stage in FLAGS)
    assert len(head[1].linears) == 1 and len(no_head[1].linears) == 0


def test_starts_from_weights_alone(photos, stages, tmp_path):
    """--init says nothing of the network; --stem auto is then that of the image size."""
    argv = argv_for("finetune", photos, stages, tmp_path / "run", "--checkpoint", "", "--init", str(stages / "simclr"), "--arch", "resnet10",
                    "--width", "0.25", "--max-steps", "1", "--eval-every", "0")  # fmt: skip
    args = simclrv2.parse_args(simclrv2.Args, simclrv2.RECIPES, argv)
    simclrv2.take_network_of({"arch": "", "image_size": None, "stem": "auto"}, args)
    assert (args.stem, args.image_size) == ("cifar", 16)
    stem = json.loads((stages / "simclr/args.json").read_text())["stem"]
    train_here([*argv, "--stem", stem])
    assert load_checkpoint(tmp_path / "run")["args"]["stem"] == stem


def test_students_may_differ_from_their_teacher(photos, stages, tmp_path):
    flags = ["--arch", "resnet34", "--width", "0.5", "--stem", "imagenet", "--max-steps", "1", "--eval-every", "0"]
    train_here(argv_for("distill", photos, stages, tmp_path / "other", *flags))
    net = open_network(tmp_path / "other", torch.device("cpu"))
    assert len(net.model.backbone.layer3) == 6 and net.model.backbone.conv1.stride == (2, 2)
    argv = argv_for("distill", photos, stages, tmp_path / "started", "--max-steps", "1", "--base-lr", "0")
    train_here([*argv, "--checkpoint", str(stages / "simclr"), "--head-layer", "1"])
    started, before = (load_checkpoint(d)["model"] for d in (tmp_path / "started", stages / "simclr"))
    for name in ("backbone.layer4.0.conv2.weight", "head.linears.0.weight"):
        assert torch.equal(started[name], before[name])


def test_whole_sequence(server, photos, monkeypatch, tmp_path, capfd):
    """Without flags: three stages, each of which takes the run of the one before; here of one small step each."""
    start, statuses = subprocess.Popen, []
    flags = f"--max-steps 1 --batch-size 8 --image-size 16 --eval-every 0 --eval-data {photos} --workers 0".split()

    def small(argv):
        done = server.run(*argv[1:], *flags, before=f"os.chdir({str(tmp_path)!r})")
        statuses.append(done.returncode)
        return types.SimpleNamespace(wait=lambda: done.returncode)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", small)
    monkeypatch.setattr(simclrv2.signal, "signal", lambda *_: None)  # pytest's own handlers stay
    simclrv2.whole_sequence()
    assert statuses == [0, 0, 0]
    (folder,) = (tmp_path / "runs").iterdir()
    saved = [load_checkpoint(folder / stage) for stage in ("pretrain", "finetune", "distill")]
    assert [content["method"] for content in saved] == ["simclr", "simclrv2", "simclrv2"]
    assert saved[0]["args"]["head_layers"] == 3 and saved[1]["args"]["label_fraction"] == 0.1
    assert saved[2]["args"]["stage"] == "distill" and saved[2]["args"]["teacher"].endswith("finetune")
    assert saved[2]["args"]["checkpoint"].endswith("pretrain")
    printed = [line for line in capfd.readouterr().out.splitlines() if line.startswith("$ python ")]
    assert len(printed) == 3 and "simclr.py --head-layers 3" in printed[0]

    monkeypatch.setattr(subprocess, "Popen", lambda argv: start([sys.executable, "-c", "raise SystemExit(3)"]))
    with pytest.raises(SystemExit) as stopped:  # a stage that fails is the last one
        simclrv2.whole_sequence()
    said = capfd.readouterr().out
    assert stopped.value.code == 3 and said.count("$ python") == 1
    started = [line.removeprefix("$ ") for line in said.splitlines() if line.startswith("$ python ")]
    remaining = said.split("To go on with this stage and those that remain, run these, one by one:\n")[1].splitlines()
    assert remaining[:1] == started and len(remaining) == 3
    words = [shlex.split(line) for line in remaining]
    folders = [command[command.index("--output-dir") + 1] for command in words]
    assert folders[0] in words[1] and folders[0] in words[2] and folders[1] in words[2]  # each needs those before it
    killed = [sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"]
    monkeypatch.setattr(subprocess, "Popen", lambda argv: start(killed))
    with pytest.raises(SystemExit) as stopped:
        simclrv2.whole_sequence()
    assert stopped.value.code == 128 + 15
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="give --checkpoint"):
        simclrv2.whole_sequence()


@pytest.mark.parametrize("recipe, following", [
    ("cifar10-cpu", "--recipe cifar10-cpu-distill"),
    ("imagenet-10", "--recipe imagenet-self-distill"),
    ("", "--recipe imagenet-self-distill --batch-size 8"),
])  # fmt: skip
def test_the_next_line_names_the_recipe_that_distils(recipe, following, photos, stages, tmp_path, capsys):
    """That of the same data; ImageNet's where there is none, and then with the batch of the small data."""
    train_here(argv_for("finetune", photos, stages, tmp_path, "--recipe", recipe, "--max-steps", "1", "--eval-every", "0"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    assert line.endswith(f"--teacher {tmp_path} --checkpoint {stages}/simclr {following}")


def test_the_next_line_of_a_run_from_weights_alone(photos, stages, tmp_path, capsys):
    """A student then starts from those weights, as its teacher did."""
    flags = ["--init", str(stages / "simclr"), "--checkpoint", "", "--arch", "resnet10", "--width", "0.25", "--stem", "imagenet",
             "--max-steps", "1", "--eval-every", "0"]  # fmt: skip
    train_here(argv_for("finetune", photos, stages, tmp_path, *flags))
    assert f" --teacher {tmp_path} --init {stages}/simclr --recipe " in capsys.readouterr().out


def test_the_program_of_the_page(stages, tmp_path, monkeypatch, capsys):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/simclrv2.md").read_text(), re.S)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(program.replace("runs/simclrv2_cifar10_resnet18_s0_...", str(stages / "finetune")), found := {})
    assert found["features"].shape == (1, 128) and capsys.readouterr().out.strip() in found["classes"]


def test_weight_decay_reaches_the_classifier_once(photos, stages, tmp_path):
    """LARS does not decay it. Step 1 starts at 0, where there is nothing to decay; the other weights decay so
    little in it that the gradients of step 2 differ by weight decay times the classifier alone."""
    argv = argv_for("finetune", photos, stages, tmp_path / "run", "--eval-every", "0")
    train_here([*argv, "--max-steps", "1"])
    weight = load_checkpoint(tmp_path / "run")["model"]["classifier.weight"]
    plain = train_here([*argv, "--max-steps", "2"])
    decayed = [*argv, "--weight-decay", "0.5", "--output-dir", str(tmp_path / "decayed")]
    decayed = train_here([*decayed, "--max-steps", "2"])
    (a, b) = (next(g for g in grads[-1] if g.shape == weight.shape) for grads in (plain, decayed))
    assert weight.any() and (b - a - 0.5 * weight).norm() < 0.05 * (b - a).norm()


def test_lars_keeps_the_balance_of_eq_2(photos, stages, tmp_path):
    """The update takes tau^2 times the loss. LARS, which sees a gradient's direction alone, must not let weight decay weigh
    1 / tau^2 times as much for it: a layer moves as it would on Eq. 2 itself."""
    seen = {}

    def keep(optimizer, *_):
        seen[name] = [group["weight_decay"] for group in optimizer.param_groups]

    handle = register_optimizer_step_pre_hook(keep)
    try:
        for name in ("lars", "sgd"):
            flags = ["--max-steps", "1", "--eval-every", "0", "--optimizer", name, "--weight-decay", "0.5", "--temperature", "0.1"]
            train_here(argv_for("distill", photos, stages, tmp_path / name, *flags))
    finally:
        handle.remove()
    assert seen == {"lars": [pytest.approx(0.005), 0.0], "sgd": [0.5, 0.0]}

    torch.manual_seed(0)
    features, start, teacher = torch.randn(6, 3), torch.randn(3, 5), torch.randn(6, 5)
    steps = []
    for scale in (1.0, 0.01):
        weight = start.clone().requires_grad_()
        optimizer = LARS([weight], lr=0.1, weight_decay=0.5 * scale)
        (scale * simclrv2.distillation_loss(features @ weight, teacher, 0.1)).backward()
        optimizer.step()
        steps.append((weight - start).detach())
    assert steps[0].any()
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-9)


# ------------------------------------------------ bad input ------------------------------------------------
def test_what_the_user_can_mend_is_one_sentence(photos, stages, tmp_path):
    def refused(stage, *flags):
        argv = argv_for(stage, photos, stages, tmp_path / "run", *flags)
        with pytest.raises(UserError) as error:
            train_here(argv)
        assert not (tmp_path / "run").exists() and "\n" not in str(error.value)
        return str(error.value)

    assert "was not written by simclr.py" in refused("finetune", "--checkpoint", str(stages / "finetune"))
    assert "was not written by simclrv2.py" in refused("distill", "--teacher", str(stages / "simclr"))
    assert "there is no checkpoint" in refused("finetune", "--checkpoint", str(tmp_path / "nothing"))
    assert "needs --checkpoint" in (text := refused("finetune", "--checkpoint", ""))
    assert "without any flag this file runs all three stages" in text
    assert "--teacher" in refused("distill", "--teacher", "")
    assert "--teacher" in refused("finetune", "--teacher", str(stages / "finetune"))
    assert "shapes-distill" in refused("finetune", "--stage", "distill")
    assert "--head-layer 3" in refused("finetune", "--head-layer", "3")
    assert "--arch resnet34" in refused("finetune", "--arch", "resnet34")
    assert "--stem cifar" in refused("finetune", "--stem", "cifar")
    assert "--label-fraction" in refused("finetune", "--label-fraction", "1.5")
    assert "--label-fraction" in refused("finetune", "--label-fraction", "0")
    assert "--accum-steps" in refused("finetune", "--accum-steps", "2")
    assert "4 samples" in refused("finetune", "--label-fraction", "0.01")
    other = shutil.copytree(photos, tmp_path / "other")  # the same classes, but the labels of other images
    lines = (other / "train.jsonl").read_text().splitlines()
    (other / "train.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    assert "are not those whose labels the teacher had" in refused("distill", "--data", str(other))
    assert "labels" in refused("finetune", "--data", str(make_photos(tmp_path / "unlabelled")))
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"no checkpoint")
    assert "cannot be read" in refused("finetune", "--checkpoint", str(broken))
    torch.save([1, 2], broken)
    assert "was not written by" in refused("finetune", "--checkpoint", str(broken))


def test_status_2_and_no_traceback(server, photos, stages, tmp_path):
    argv = argv_for("finetune", photos, stages, tmp_path, "--checkpoint", stages / "finetune")
    done = server.run("simclrv2.py", *argv)
    assert done.returncode == 2 and "simclrv2.py: error: " in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------ layout ------------------------------------------------
def test_layout_and_paste():
    assert BANNER.findall(Path(simclrv2.__file__).read_text()) == SECTIONS
    space = cut(["ResNet", "Classifier"], file="simclrv2.py")
    backbone = space["ResNet"](space["torchvision"].models.resnet.BasicBlock, [1, 1, 1, 1], stem="cifar")
    backward(space["Classifier"](backbone, 1, 10)(torch.randn(4, 3, 32, 32)))
    loss = cut(["supervised_loss"], ["all_gather"], file="simclrv2.py")["supervised_loss"]
    loss(torch.randn(4, 8, requires_grad=True), torch.arange(4)).backward()
    loss = cut(["distillation_loss"], file="simclrv2.py")["distillation_loss"]
    loss(torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), 0.1).backward()


if __name__ == "__main__":  # under torchrun: python test_simclrv2.py JOBS, a json list of command lines
    with user_errors():
        for argv in json.loads(sys.argv[1]):
            grads = train_here(argv)
            if int(os.environ["RANK"]) == 0:
                torch.save(grads[2], Path(argv[argv.index("--output-dir") + 1]) / "grads.pt")
