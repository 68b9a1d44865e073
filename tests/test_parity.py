"""benchmarks/parity.py repeats a run through lightly's modules: the same pictures in the same order, from the same weights."""

import copy
import functools
import io
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from common import UserError
from runs import ROOT, make_photos, module_of

sys.path.insert(0, str(ROOT / "benchmarks"))
pytest.importorskip("lightly")
import end_to_end  # noqa: E402
import parity  # noqa: E402
import table  # noqa: E402

FLAGS = ["--data", "cifar10", "--recipe", "cifar10-cpu", "--image-size", "16", "--workers", "0", "--batch-size", "16", "--epochs", "2", "--eval-every", "0"]
SMALL = ["--arch", "resnet10", "--width", "0.125"]
OWN = {"moco": ["--queue-size", "64", "--bn-group", "8"], "dino": ["--out-dim", "64"], "simsiam": ["--seed", "3"]}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "cifar10").mkdir()
    (folder / "cifar10/classnames.txt").write_text("\n".join("abcdefghij"))
    rng = np.random.default_rng(0)
    of_class = rng.integers(0, 256, (10, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    for split, count in (("train", 48), ("val", 200)):
        files = []
        for i, noise in enumerate(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)):
            file = io.BytesIO()
            Image.fromarray(noise // 4 * 3 + of_class[i % 10] // 4).save(file, "png")
            files.append(file.getvalue())
        content = np.frombuffer(b"".join(files), np.uint8)
        offsets = np.cumsum([0, *map(len, files)])
        np.savez(folder / f"cifar10/{split}.npz", jpeg=content, offsets=offsets, labels=np.arange(count) % 10)
    return folder


@pytest.mark.parametrize("method", ["simclr", "moco", "byol", "simsiam", "dino"])
def test_a_run_is_repeated(method, data_dir, tmp_path, monkeypatch, capsys):
    module, seen = module_of(method), []
    flags = [*FLAGS, *SMALL, *OWN.get(method, []), "--data-dir", str(data_dir), "--output-dir", str(tmp_path / "run")]
    build, make, start, peers = module.build_model, getattr(parity, method), [], []
    monkeypatch.setattr(module, "build_model", lambda args: start.append(build(args)) or copy.deepcopy(start[0]))
    module.train(module.parse_args(module.Args, module.RECIPES, flags))
    monkeypatch.setattr(module, "build_model", build)

    @functools.wraps(make)
    def kept(args, backbone, dim):
        assert all(p.requires_grad for p in backbone.parameters())
        peers.append((make(args, backbone, dim), copy.deepcopy(backbone.state_dict())))
        return peers[0][0]

    monkeypatch.setattr(parity, method, kept)
    get = parity.InOrder.__getitem__
    monkeypatch.setattr(parity.InOrder, "__getitem__", lambda self, i: seen.append(i) or get(self, i))
    monkeypatch.setattr(sys, "argv", ["parity.py", str(tmp_path / "run"), "--out", str(tmp_path / "out.json")])
    parity.main()
    seed = 3 if method == "simsiam" else 0
    ((name, row),) = json.loads((tmp_path / "out.json").read_text()).items()
    assert name == (f"{method}_s{seed}" if seed else method)
    assert row["steps"] == 6 and row["images"] == 96 and sorted(seen) == sorted([*range(48)] * 2)
    order = np.random.default_rng([seed, 0]).permutation(48)
    assert seen[:48] == order.tolist()
    assert row["seconds lightly"] > 0 and row["seconds here"] > 0
    assert row["command"].startswith("python ") and row["commit"] and row["hardware"].endswith("CPU cores")
    assert {"torch", "lightly"} < set(row["versions"])

    assert row["commit here"]

    # The first weights are the run's, the encoder has moved from them, and the heads have as many layers
    (peer, first), ours = peers[0], start[0]
    expected = module.image_encoder(ours).state_dict()
    assert first.keys() == expected.keys() and all(torch.equal(first[name], expected[name]) for name in first)

    # Each accuracy is of the network and the view that it stands for
    args, _ = parity.read_run(tmp_path / "run")
    opened = parity.open_network(tmp_path / "run", torch.device("cpu"))
    assert row["here"] == parity.accuracy(opened.encoder, opened.view, args)
    opened.encoder.load_state_dict(first)
    assert row["random weights"] == parity.accuracy(opened.encoder, opened.view, args)
    means = {"mean": parity.IMAGENET_MEAN, "std": parity.IMAGENET_STD}
    theirs_view = parity.EvalView(16, opened.view.resize, opened.view.filter.name, **means)
    assert row["lightly"] == parity.accuracy(peer.encoder, theirs_view, args)
    assert row["pixels"] == parity.accuracy(torch.nn.Flatten(), parity.EvalView(8, interpolation="box", **means), args)
    after = peer.encoder.state_dict()
    assert not any(torch.equal(first[name], after[name]) for name in first if "conv" in name or name == "0.weight")
    theirs = [m for part in [*peer.trained, *getattr(peer, "fixed", [])] for m in part.modules()]
    trained = ours.encoder_q if method == "moco" else ours.student if method == "dino" else ours
    left_out = ours.target if method == "byol" else torch.nn.Identity()
    count = sum(isinstance(m, torch.nn.Linear) for m in trained.modules())
    count -= sum(isinstance(m, torch.nn.Linear) for m in left_out.modules())
    assert sum(isinstance(m, torch.nn.Linear) for m in theirs) == count >= 2
    # Both views jitter colours alike, as here
    jitters = [repr(t) for view in peer.views.transforms for t in view.transform.transforms if "ColorJitter" in repr(t)]
    assert len(jitters) == 2 and jitters[0] == jitters[1]


@pytest.mark.parametrize("method", ["simclr", "moco", "byol", "simsiam", "dino"])
def test_rates_and_decay_are_the_run_s(method, data_dir, tmp_path, monkeypatch):
    """Step by step the rate of the run's first group; and decayed in lightly's modules is what the run decays in its own."""
    module, made = module_of(method), []

    class Seen(torch.optim.SGD):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append((self, []))

        def step(self, *args):
            made[-1][1].append([group["lr"] for group in self.param_groups])
            return super().step(*args)

    monkeypatch.setattr(torch.optim, "SGD", Seen)
    flags = [*FLAGS, *SMALL, *OWN.get(method, []), "--data-dir", str(data_dir), "--output-dir", str(tmp_path / "run")]
    module.train(module.parse_args(module.Args, module.RECIPES, flags))
    monkeypatch.setattr(sys, "argv", ["parity.py", str(tmp_path / "run")])
    parity.main()
    (ours, our_rates), (theirs, their_rates) = made
    assert len(our_rates) == len(their_rates) == 6 and len({rates[0] for rates in our_rates}) > 1
    assert [rates[0] for rates in their_rates] == pytest.approx([rates[0] for rates in our_rates])

    def decayed(optimizer):
        return {(p.ndim < 2, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}

    assert decayed(theirs) == decayed(ours)


def test_both_train_something(data_dir, tmp_path):
    """The peer's encoder has moved from the weights it shares with the run's start."""
    args = parity.types.SimpleNamespace(**vars(module_of("simclr").Args()) | {"image_size": 16, "batch_size": 16, "epochs": 1})
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 256, 8))
    before = backbone[1].weight.detach().clone()
    dataset = parity.open_dataset("cifar10", data_dir)
    loader = parity.Loader(dataset, {}, {}, 16, 0)
    args.warmup_epochs, args.optimizer, args.workers, args.method = 0.0, "sgd", 0, "simclr"
    parity.train(parity.simclr(args, backbone, 8), args, dataset, loader, 3)
    assert not torch.equal(before, backbone[1].weight)


@pytest.mark.parametrize("method", ["simclr", "dino", "mocov3"])
def test_end_to_end(method, server, data_dir, tmp_path, monkeypatch):
    """Three loops are timed: each has its own rate, and ratios are those of rates of the same round. MoCo v3 is alone."""
    forked = types.SimpleNamespace(run=lambda command, **_: server.run(*command[1:]))
    monkeypatch.setattr(end_to_end, "subprocess", forked)
    small = [*FLAGS, *SMALL, *OWN.get(method, []), "--epochs", "5", "--data-dir", str(data_dir)]
    monkeypatch.setattr(end_to_end, "flags_of", lambda options: small)
    argv = ["end_to_end.py", "--methods", method, "--steps", "5", "--rounds", "1", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", argv)
    end_to_end.main()
    record = json.loads((tmp_path / "out.json").read_text())
    rows = record["results"][method]["rows"]
    peers = [] if method == "mocov3" else ["lightly", "torchvision"]
    assert list(rows) == [*peers, "here"] and record["lightly"] and record["commit"]
    ours = rows["here"]["images_per_second"]
    for row in rows.values():
        assert row["here_over"] == pytest.approx(ours / row["images_per_second"])
    monkeypatch.setattr(end_to_end, "flags_of", lambda options: ["--data", "nothing"])
    with pytest.raises(UserError, match="simclr.py stopped: .*nothing"):
        end_to_end.here("simclr", end_to_end.argparse.Namespace(steps=5))


def test_steps_that_start_a_loop_are_not_timed(data_dir, monkeypatch):
    """Ten slow steps, then fast ones of known rates: theirs count."""
    monkeypatch.setattr(end_to_end, "flags_of", lambda options: [*FLAGS, *SMALL, "--data-dir", str(data_dir)])
    spans = [9.0] * end_to_end.UNTIMED + [1.0, 2.0, 2.0, 3.0]
    monkeypatch.setattr(parity, "train", lambda *_: [7.0, *(7.0 + sum(spans[: i + 1]) for i in range(len(spans)))])
    assert end_to_end.there("simclr", end_to_end.argparse.Namespace(steps=4), plain=False) == 16 * 4 / 8

    def log(command, **_):
        folder = parity.Path(command[command.index("--output-dir") + 1])
        folder.mkdir()
        rates = {1: 3, 10: 4, 20: 100, 25: 50}  # the steps since the row before
        rows = [{"step": step, "loss": 1.0, "images_per_sec": rate, "data_wait": step / 100} for step, rate in rates.items()]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 25, "knn_top1": 1.0}]))
        return end_to_end.argparse.Namespace(returncode=0)

    monkeypatch.setattr(end_to_end.subprocess, "run", log)
    steps = end_to_end.argparse.Namespace(steps=15)
    rate, wait = end_to_end.here("simclr", steps)
    assert rate == pytest.approx(15 / (10 / 100 + 5 / 50)) and wait == pytest.approx((0.2 + 0.25) / 2)  # of equal times


def test_every_other_round_goes_backwards(monkeypatch):
    """A row is the median of its rounds, and its ratio the median of those of a round, not the ratio of medians."""
    rates, order = {"lightly": [10, 20, 40], "torchvision": [5, 10, 20], "here": [20, 100, 60]}, []

    def timed(name):
        order.append(name)
        return rates[name][order.count(name) - 1]

    monkeypatch.setattr(end_to_end, "here", lambda *_: (timed("here"), order.count("here") / 10))
    monkeypatch.setattr(end_to_end, "there", lambda *_, plain: timed("torchvision" if plain else "lightly"))
    found = end_to_end.compare("simclr", end_to_end.argparse.Namespace(rounds=3, steps=7))
    assert order == [*rates, *reversed(rates), *rates]
    assert list(found["rows"]) == list(rates) and found["rounds"] == 3 and found["steps"] == 7
    assert found["rows"]["lightly"] == {"images_per_second": 20, "here_over": 2.0}
    assert found["rows"]["here"] == {"images_per_second": 60, "here_over": 1.0, "data_wait": pytest.approx(0.2)}


def test_the_table_has_a_row_for_all_seeds_of_a_method(tmp_path, monkeypatch):
    row = {"images": 96, "here": 39.8, "lightly": 41.4, "random weights": 25.9, "pixels": 46.4, "seconds here": 60, "seconds lightly": 90}
    rows = {"simsiam": row | {"here": 41.8}, "byol": row, "byol_s1": row | {"here": 39.0, "seconds here": 30}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results/parity.json").write_text(json.dumps(rows))
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "methods", lambda: {"simsiam": ["SimSiam"], "byol": ["BYOL"]})
    lines = table.parity_table("").splitlines()
    assert lines[2:] == [
        "| [SimSiam](results/parity.json) | 96 | 41.8 | 41.4 | 25.9 | 46.4 | 1.0 | 1.5 |",
        "| [BYOL](results/parity.json) | 96 | 39.8, 39.0 | 41.4, 41.4 | 25.9, 25.9 | 46.4 | 1.0, 0.5 | 1.5, 1.5 |",
    ]


def test_data_without_classes_are_refused(tmp_path):
    photos, view = make_photos(tmp_path / "photos", train=2, val=2), parity.EvalView(8)
    with pytest.raises(UserError, match="photos has no classes to compare by: docs/data.md"):
        parity.accuracy(torch.nn.Flatten(), view, types.SimpleNamespace(data=str(photos), data_dir=""))


@pytest.mark.parametrize("args, text", [
    ('{"method": "mocov3"}', "not written here"),
    ('{"method": "dino", "local_crops": 2, "blur": false}', "--optimizer adamw"),
    ('{"method": "dino", "local_crops": 2, "blur": false, "optimizer": "sgd"}', "--local-crops 2"),
    ('{"method": "moco", "version": "1", "blur": false}', "--version 1, and .* only '2'"),
    ('{"method": "simclr", "blur": false, "optimizer": "sgd", "lr_scaling": "sqrt"}', "--lr-scaling sqrt"),
    ('{"method": "simsiam", "blur": false, "stop_gradient": "off"}', "--stop-gradient off"),
    ('{"method": "byol", "blur": false, "optimizer": "sgd", "target": "random"}', "--target random"),
    ("{", "cannot be read"),
    (None, "cannot be read"),
])  # fmt: skip
def test_other_runs_are_refused(args, text, tmp_path, monkeypatch):
    if args:
        (tmp_path / "args.json").write_text(args.replace("{", '{"data_dir": "data", ', 1) if len(args) > 1 else args)
        (tmp_path / "metrics.jsonl").write_text("")
    monkeypatch.setattr(sys, "argv", ["parity.py", str(tmp_path)])
    with pytest.raises(UserError, match=text):
        parity.main()
