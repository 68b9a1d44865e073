"""byol.py: numbers of the official code, the target and when it moves, the asymmetric views, pasting."""

import json
import random

import pytest
import torch
import torchvision
from torch import nn

import byol
from common import UserError, warmup_cosine
from copies import ROOT
from evaluation.weights import open_network
from run import load_checkpoint
from runs import make_photos, rows, train_here
from test_golden import close, close_grad, golden, leaves
from test_structure import backward, cut


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


# ------------------------------------------------ golden ------------------------------------------------
@pytest.mark.parametrize("name, key", [("byol_jax_loss_n4_d8", "loss"), ("byol_loss_n4_d8", "loss_sym")])
def test_loss(name, key):
    x, y, _ = golden(name)
    p1, p2, z1, z2 = leaves(x["p1"], x["p2"], x["z1"], x["z2"])
    loss = byol.byol_loss(p1, p2, z1, z2)
    loss.backward()
    close(loss, y[key])
    close_grad(p1.grad, y["grad_p1"])
    close_grad(p2.grad, y["grad_p2"])
    assert z1.grad is None and z2.grad is None
    each = [byol.byol_loss(*(x[k][i : i + 1] for k in ("p1", "p1", "z2", "z2"))) / 2 for i in range(len(p1))]
    close(torch.stack(each), y["per_sample_p1z2"])


@pytest.mark.parametrize("start", [0.97, 0.99, 0.996])
def test_tau_rises_on_half_a_cosine(start):
    """As train() calls warmup_cosine."""
    x, y, args = golden("byol_schedules")
    ours = [warmup_cosine(int(step), args["max_steps"], 0, start, end=1.0) for step in x["steps"]]
    close(ours, y[f"tau_base_{start}"], rtol=1e-6, atol=0)
    assert ours[0] == pytest.approx(start) and warmup_cosine(7, 7, 0, start, end=1.0) == 1
    assert {warmup_cosine(step, 9, 0, start, end=start) for step in range(9)} == {start}


def test_learning_rate():
    x, y, args = golden("byol_schedules")
    peak = args["base_learning_rate"] * args["batch_size"] / 256
    for steps, key in (("steps", "lr"), ("extra_steps", "lr_extra")):
        ours = [warmup_cosine(int(s), args["max_steps"], args["warmup_steps"], peak) for s in x[steps]]
        close(ours, y[key], rtol=1e-6, atol=1e-6)


def test_moving_average():
    """Parameters move, statistics of batch norm do not."""
    x, y, args = golden("ema_update")
    online, target = (nn.ModuleDict({"conv1": nn.Conv2d(3, 6, 3, bias=False), "bn1": nn.BatchNorm2d(6),
                                     "fc": nn.Linear(6, 5)}) for _ in range(2))  # fmt: skip
    online.load_state_dict(x["online"])
    target.load_state_dict(x["target0"])
    byol.update_target(online, target, args["m"])
    for name, value in target.state_dict().items():
        close(value, y["byol_style_target1"].get(name, x["target0"][name]))
    assert all(torch.equal(value, x["online"][name]) for name, value in online.state_dict().items())


# ------------------------------------------------ loss ------------------------------------------------
def test_range_and_chance_of_the_loss():
    x, y = torch.randn(2, 4000, 256)
    assert byol.byol_loss(x, y, y, x).item() == pytest.approx(0, abs=1e-5)
    assert byol.byol_loss(x, y, -3 * y, -3 * x).item() == pytest.approx(8, rel=1e-6)
    assert byol.byol_loss(*torch.randn(4, 4000, 256)).item() == pytest.approx(4, abs=0.02)
    assert byol.byol_loss(*torch.randn(4, 8, 16).bfloat16()).dtype == torch.float32


def test_feature_std():
    assert byol.feature_std(torch.randn(4000, 256)).item() == pytest.approx(1 / 16, rel=0.01)
    assert byol.feature_std(torch.randn(1, 256) * torch.rand(4000, 1)).item() < 1e-6


# ------------------------------------------------ model ------------------------------------------------
def tiny():
    torch.manual_seed(0)
    return byol.build_model(byol.Args(arch="resnet18", image_size=32, stem="imagenet", hidden_dim=32, out_dim=8))


def test_gradients_reach_the_online_network_alone():
    model = tiny()
    byol.byol_loss(*model(*torch.randn(2, 4, 3, 32, 32))).backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None) == (not name.startswith("target.")), name
    assert not any("predictor" in name for name in model.target.state_dict())
    pairs = zip(model.online.named_parameters(), model.target.parameters(), strict=True)
    assert any(not torch.equal(p, q) for (_, p), q in pairs)  # drawn apart


def test_each_view_is_a_batch_of_its_own_in_training_mode():
    """Batch norm must not see both views together, and the target's must use statistics of the batch."""
    view1, view2, other = torch.randn(3, 4, 3, 32, 32)
    a, b = tiny()(view1, view2), tiny()(view1, other)
    assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
    assert not torch.equal(a[1], b[1]) and not torch.equal(a[3], b[3])
    model = tiny()
    model(view1, view2)
    for network in (model.online, model.target):
        assert network.backbone.bn1.num_batches_tracked == 2 and network.backbone.bn1.running_mean.any()


def test_sizes():
    """Projector and predictor as published: hidden layer with bias, output without, nothing after it."""
    with torch.device("meta"):
        model = byol.build_model(byol.Args())
    for layers, dim in ((model.online.projector, 2048), (model.predictor, 256)):
        assert [tuple(p.shape) for p in layers.parameters()] == [(4096, dim), (4096,), (4096,), (4096,), (256, 4096)]
    assert isinstance(byol.image_encoder(model), byol.ResNet)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_backbone_is_torchvision_s(arch):
    model = byol.build_model(byol.Args(arch=arch, hidden_dim=16, out_dim=8))
    other = getattr(torchvision.models, arch)()
    other.fc = nn.Identity()
    other.load_state_dict(byol.image_encoder(model).state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(other.eval()(x), byol.image_encoder(model).eval()(x))


# ------------------------------------------------ training ------------------------------------------------
def start_of(directory):
    """The model of a run as it was before its first step."""
    args = load_checkpoint(directory)["args"]
    torch.manual_seed(args["seed"])
    return byol.build_model(byol.Args(**args))


def test_target_follows_after_the_step(photos, tmp_path):
    """Two steps, of which the first has learning rate 0: xi moves towards what theta is after each of them."""
    train_here("byol", photos, tmp_path, "--max-steps", "2", "--tau-end", "0.9", "--base-lr", "2", "--eval-every", "0")
    before, after = start_of(tmp_path), load_checkpoint(tmp_path)["model"]
    moved = 0.0
    for name, xi in before.target.named_parameters():
        first, second = before.get_parameter(f"online.{name}").detach(), after[f"online.{name}"]
        moved += float((second - first).abs().sum())
        expected = xi.detach().lerp(first, 0.1).lerp(second, 0.1)
        torch.testing.assert_close(after[f"target.{name}"], expected, rtol=1e-6, atol=1e-8, msg=name)
    assert moved > 0.1
    assert [row["tau"] for row in rows(tmp_path) if "loss" in row] == pytest.approx([0.9, 0.9])


def test_random_target_stays_random(photos, tmp_path):
    flags = ["--max-steps", "4", "--target", "random", "--base-lr", "2", "--eval-every", "2"]
    train_here("byol", photos, tmp_path, *flags)
    before, after = start_of(tmp_path), load_checkpoint(tmp_path)["model"]
    for name, p in before.named_parameters():
        assert torch.equal(p, after[name]) == name.startswith("target."), name
    assert all(row["tau"] == 1 for row in rows(tmp_path) if "loss" in row)
    evaluated = [row for row in rows(tmp_path) if "knn_top1" in row]
    assert [row["step"] for row in evaluated] == [0, 2, 4]
    assert all(row.keys() >= {"target_knn_top1", "target_knn_chance"} for row in evaluated)
    log = tmp_path / "metrics.jsonl"
    kept = [line for line in log.read_text().splitlines(keepends=True) if json.loads(line) != evaluated[-1]]
    log.write_text("".join(kept))  # as if the last evaluation had been cut off: it is made again, with all of its scores
    train_here("byol", photos, tmp_path, *flags)
    assert len(kept) < len(rows(tmp_path)) and rows(tmp_path)[-1] == evaluated[-1]


def test_logged(photos, tmp_path):
    train_here("byol", photos, tmp_path, "--max-steps", "3")
    trained = [row for row in rows(tmp_path) if "loss" in row]
    for row in trained:
        assert row["chance"] == 4 and row["feature_std_chance"] == 0.25  # 1 / sqrt(16)
        assert 0.1 < row["feature_std"] < 0.26
    assert [row["tau"] for row in trained] == pytest.approx([warmup_cosine(k, 24, 0, 0.9, end=1.0) for k in range(3)])
    assert not any("target_knn_top1" in row for row in rows(tmp_path))
    network = open_network(tmp_path, torch.device("cpu"))
    assert torch.equal(network.encoder.conv1.weight, load_checkpoint(tmp_path)["model"]["online.backbone.conv1.weight"])


def test_more_than_all_of_the_target_cannot_stay(photos, tmp_path):
    for flag in ("--tau", "--tau-end"):
        with pytest.raises(UserError, match=f"{flag} 1.1 must lie between 0 and 1"):
            train_here("byol", photos, tmp_path / "run", flag, "1.1")
    assert not (tmp_path / "run").exists()


def test_learns_from_a_target_without_collapsing(photos, tmp_path):
    """Without predictor this would be 0 soon, with a target that knows nothing it would stay at 4."""
    train_here("byol", photos, tmp_path, "--epochs", "10", "--base-lr", "8", "--eval-every", "0")
    trained = [row for row in rows(tmp_path) if "loss" in row]
    first, last = (sum(row["loss"] for row in part) / 10 for part in (trained[:10], trained[-10:]))
    assert last < 0.8 * first and trained[-1]["feature_std"] > 0.1


# ------------------------------------------------ views ------------------------------------------------
def test_views_differ_in_blur_and_solarisation():
    """Table 6: T blurs always and never solarises, T' blurs one in ten and solarises one in five."""
    for view, blur, solarize in ((byol.BYOLView(32), 1.0, 0.0), (byol.BYOLView(32, blur=0.1, solarize=0.2), 0.1, 0.2)):
        rng = random.Random(0)
        draws = [view.sample(rng) for _ in range(5000)]
        share = {k: sum(d[k] for d in draws) / 5000 for k in ("flip", "jitter", "gray", "blur", "solarize")}
        expected = {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": blur, "solarize": solarize}
        assert share == pytest.approx(expected, abs=0.02)
        for name, reach in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2)):
            factors = [d[name] for d in draws]
            assert (min(factors), max(factors)) == pytest.approx((1 - reach, 1 + reach), abs=0.01)
        assert max(abs(d["hue"]) for d in draws) == pytest.approx(0.1, abs=0.001)


def test_view_is_torchvision_s_in_order():
    """Flip, jitter, grey, blur, solarise, normalise: sample by sample what torchvision's functions give."""
    from torchvision.transforms.v2 import functional as tv

    view, rng = byol.BYOLView(40, blur=0.5, solarize=0.5), random.Random(3)
    draws = [view.sample(rng) for _ in range(16)]
    pixels = torch.randint(0, 256, (16, 3, 40, 40), dtype=torch.uint8)
    stacked = {k: torch.stack([torch.as_tensor(d[k]) for d in draws]) for k in draws[0]}
    for x, d, ours in zip(pixels, draws, view(pixels, stacked)):
        x = x.float() / 255
        x = tv.horizontal_flip(x) if d["flip"] else x
        adjust = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
        for i in d["order"] if d["jitter"] else ():
            x = adjust[i](x, d[("brightness", "contrast", "saturation", "hue")[i]])
        x = tv.rgb_to_grayscale(x, 3) if d["gray"] else x
        x = tv.gaussian_blur(x, [5, 5], [d["sigma"]]) if d["blur"] else x
        before = x
        x = tv.solarize(x, 0.5) if d["solarize"] else x
        x = tv.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        clear = ((before - 0.5).abs() > 1e-4).expand_as(x)  # beside the threshold, rounding decides
        torch.testing.assert_close(ours[clear], x[clear], rtol=0, atol=1e-4)


# ------------------------------------------------ layout ------------------------------------------------
def test_paste():
    space = cut(["ResNet", "Encoder", "BYOL", "mlp"], file="byol.py")

    def encoder():
        backbone = space["ResNet"](torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], stem="cifar")
        return space["Encoder"](backbone, space["mlp"](512, 32, 8))

    model = space["BYOL"](encoder(), encoder(), space["mlp"](8, 32, 8))
    backward(*model(*torch.randn(2, 4, 3, 32, 32))[:2])
    loss = cut(["byol_loss"], file="byol.py")["byol_loss"]
    loss(*torch.randn(4, 4, 8, requires_grad=True)).backward()
    std = cut(["feature_std"], ["all_gather"], file="byol.py")["feature_std"]
    assert std(torch.randn(4, 8)) > 0
    view = cut(["BYOLView"], allowed_data=["random_resized_crop", "draw_jitter", "to_float", "hflip", "color_jitter",
                                           "grayscale", "gaussian_blur", "solarize", "normalize"], file="byol.py")  # fmt: skip
    view, rng = view["BYOLView"](32, 0.5, 0.5), random.Random(0)
    crops = torch.stack([view.crop(torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8), rng) for _ in range(5)])
    draws = [view.sample(rng) for _ in range(5)]
    draws = {key: torch.stack([torch.as_tensor(draw[key]) for draw in draws]) for key in draws[0]}
    assert view(crops, draws).shape == (5, 3, 32, 32)


def test_adaptations_are_marked():
    text = (ROOT / "byol.py").read_text()
    assert text.count("# Copied from simclr.py: ") == 3 and text.count("# Adapted from simclr.py: ") == 2
