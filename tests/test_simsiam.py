"""simsiam.py: numbers and names of the official code, the stop-gradient and its absence, pasting."""

import json
import random

import pytest
import torch
import torchvision
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import simsiam
from common import warmup_cosine
from copies import ROOT
from evaluation.weights import open_network
from run import load_checkpoint
from runs import make_photos, rows, train_here
from test_golden import GOLDEN, close, close_grad, golden, leaves
from test_structure import backward, cut


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


# ------------------------------------------------ golden ------------------------------------------------
def test_loss():
    x, y, _ = golden("simsiam_loss_n4_d8")
    p1, p2, z1, z2 = leaves(x["p1"], x["p2"], x["z1"], x["z2"])
    loss = simsiam.simsiam_loss(p1, p2, z1, z2)
    loss.backward()
    close(loss, y["loss"])
    close_grad(p1.grad, y["grad_p1"])
    close_grad(p2.grad, y["grad_p2"])
    assert z1.grad is None and z2.grad is None


def official(depth, dim, pred_dim):
    """The network as the official code puts it together, in its order of random draws (spec of its builder.py)."""
    model = nn.Module()
    model.encoder = getattr(torchvision.models, f"resnet{depth}")(num_classes=dim, zero_init_residual=True)
    width = model.encoder.fc.in_features
    hidden = [m for _ in range(2) for m in (nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())]
    model.encoder.fc = nn.Sequential(*hidden, model.encoder.fc, nn.BatchNorm1d(dim, affine=False))
    model.predictor = nn.Sequential(nn.Linear(dim, pred_dim, bias=False), nn.BatchNorm1d(pred_dim), nn.ReLU(),
                                    nn.Linear(pred_dim, dim))  # fmt: skip
    return model


def test_network():
    """The golden file holds no weights but their sums: they are drawn again, and loaded strictly."""
    x, y, _ = golden("simsiam_resnet18_dim64_pred16")
    torch.manual_seed(0)
    reference = official(18, 64, 16).train()
    state = {name: value.clone() for name, value in reference.state_dict().items()}
    for name, value in state.items():
        close(value.double().abs().sum(), y["init_fingerprint"][name]["abs_sum"], rtol=1e-6)
    model = simsiam.build_model(simsiam.Args(arch="resnet18", image_size=32, stem="imagenet", out_dim=64, predictor_dim=16))
    model.load_state_dict(state, strict=True)
    assert list(model.state_dict()) == list(x["keys_shapes"])
    torch.manual_seed(9)
    p1, p2, z1, z2 = model.train()(x["x1"], x["x2"])
    assert torch.equal(z1, reference.encoder(x["x1"])) and torch.equal(p1, reference.predictor(z1))
    close(p1, y["p1"], atol=3e-5)  # batch norm over four samples amplifies rounding, which differs between machines
    close(z2, y["z2"], atol=3e-5)
    close(simsiam.simsiam_loss(p1, p2, z1, z2), y["loss"])


def test_official_names():
    """Every entry of the released ResNet-50 checkpoints, in order, with its shape and type."""
    expected = json.loads((GOLDEN / "state_dict_keys_simsiam_resnet50.json").read_text())
    model = simsiam.build_model(simsiam.Args())
    state = model.state_dict()
    found = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in state.items()}
    assert found == expected and list(found) == list(expected)
    released = {"state_dict": {f"module.{k}": torch.zeros(shape, dtype=getattr(torch, kind)) for k, (shape, kind) in expected.items()}}
    model.load_state_dict({k.removeprefix("module."): v for k, v in released["state_dict"].items()}, strict=True)
    assert not model.encoder.layer1[0].conv1.weight.any()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["encoder.fc.6.bias"]


def test_initialisation():
    """torchvision's for the backbone, also for the small stem; the last norm of each block starts at 0."""
    torch.manual_seed(0)
    for stem in ("imagenet", "cifar"):
        encoder = simsiam.build_model(simsiam.Args(arch="resnet18", stem=stem)).encoder
        for conv in (m for m in encoder.modules() if isinstance(m, nn.Conv2d)):
            std = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
            assert conv.weight.std().item() == pytest.approx(std, rel=5 / (2 * conv.weight.numel()) ** 0.5)
        assert not encoder.layer3[1].bn2.weight.any() and encoder.layer3[1].bn1.weight.all()


def test_learning_rates():
    """Official: cosine by epoch for the encoder, none for the predictor; here the same at the start of each epoch."""
    x, y, args = golden("moco12_simsiam_lr_schedules")
    for epoch, (encoder, predictor) in zip(x["simsiam_epoch"], y["simsiam_encoder_predictor_lr"], strict=True):
        close(warmup_cosine(7 * epoch, 7 * args["simsiam epochs"], 0, args["simsiam init_lr"]), encoder, rtol=1e-6, atol=1e-9)
        assert predictor == args["simsiam init_lr"]


# ------------------------------------------------ loss ------------------------------------------------
def test_range_and_chance_of_the_loss():
    x, y = torch.randn(2, 4000, 256)
    assert simsiam.simsiam_loss(x, y, y, x).item() == pytest.approx(-1, rel=1e-6)
    assert simsiam.simsiam_loss(x, y, -3 * y, -3 * x).item() == pytest.approx(1, rel=1e-6)
    assert simsiam.simsiam_loss(*torch.randn(4, 4000, 256)).item() == pytest.approx(0, abs=0.01)
    assert simsiam.simsiam_loss(*torch.randn(4, 8, 16).bfloat16()).dtype == torch.float32


def test_without_stop_gradient_the_targets_have_one():
    inputs = leaves(*torch.randn(4, 8, 16))
    values = [simsiam.simsiam_loss(*inputs, stop_gradient=stop) for stop in (True, False)]
    assert torch.equal(*values)
    values[1].backward()
    assert all(x.grad.any() for x in inputs)


# ------------------------------------------------ model ------------------------------------------------
def tiny(**more):
    torch.manual_seed(0)
    return simsiam.build_model(simsiam.Args(arch="resnet18", image_size=32, out_dim=16, predictor_dim=8, **more))


def test_each_view_is_a_batch_of_its_own():
    view1, view2, other = torch.randn(3, 4, 3, 32, 32)
    model = tiny()
    a, b = model(view1, view2), model(view1, other)
    assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2]) and not torch.equal(a[1], b[1])
    assert model.encoder.bn1.num_batches_tracked == model.predictor[1].num_batches_tracked == 4
    torch.testing.assert_close(a[2].mean(0), torch.zeros(16), atol=1e-5, rtol=0)  # batch norm ends the projector


def test_projector_of_cifar():
    """App. D: two layers; lightly's are 2048 wide."""
    args = simsiam.Args(**simsiam.RECIPES["cifar10"])
    with torch.device("meta"):
        model = simsiam.build_model(args)
    shapes = [tuple(p.shape) for p in model.encoder.fc.parameters()]
    assert shapes == [(2048, 512), (2048,), (2048,), (2048, 2048), (2048,)]
    assert model.encoder.conv1.kernel_size == (3, 3) and isinstance(model.encoder.maxpool, nn.Identity)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_backbone_is_torchvision_s(arch):
    model = simsiam.build_model(simsiam.Args(arch=arch, out_dim=16, predictor_dim=8))
    encoder = simsiam.image_encoder(model)
    other = getattr(torchvision.models, arch)()
    other.fc = nn.Identity()
    other.load_state_dict(encoder.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(other.eval()(x), encoder.eval()(x))
    encoder.conv1.weight.data.zero_()
    assert not model.encoder.conv1.weight.any()  # the same weights, no copy


# ------------------------------------------------ training ------------------------------------------------
def trained(directory):
    return [row for row in rows(directory) if "loss" in row]


COLLAPSE = "--warmup-epochs 0 --base-lr 1 --batch-size 48 --epochs 40 --image-size 16 --eval-every 0"
COLLAPSE = [*COLLAPSE.split(), "--projector-layers", "3", "--hidden-dim", "0", "--stem", "small"]


def test_without_stop_gradient_it_collapses(photos, tmp_path):
    """Outputs become one and the loss -1; with it they keep their spread (Fig. 2). Batch norm ends the projector, so one
    sample of a batch remains apart from the other 47, for which 2 sqrt(47) / 48 = 0.29 of the spread is left."""
    for stop in ("on", "off"):
        train_here("simsiam", photos, tmp_path / stop, *COLLAPSE, "--stop-gradient", stop)
    on, off = trained(tmp_path / "on"), trained(tmp_path / "off")
    assert on[0]["loss"] == off[0]["loss"] and on[0]["feature_std"] == off[0]["feature_std"]
    for run, low, high, least, most in ((on, -0.6, 0.0, 0.9, 1.1), (off, -1.0, -0.8, 0.29, 0.55)):
        loss, std = (sum(row[name] for row in run[-10:]) / 10 for name in ("loss", "feature_std"))
        assert low < loss < high and least < std / run[0]["feature_std"] < most


def test_predictor_has_a_constant_learning_rate(photos, tmp_path):
    """Official --fix-pred-lr, also during the encoder's warm-up (official issue 11)."""
    seen = {}

    def spy(optimizer, *_):
        seen.setdefault(name, []).append([group["lr"] for group in optimizer.param_groups])

    handle = register_optimizer_step_pre_hook(spy)
    try:
        for name in ("--fix-pred-lr", "--no-fix-pred-lr"):
            train_here("simsiam", photos, tmp_path / name, "--epochs", "1", name, "--eval-every", "0")
    finally:
        handle.remove()
    peak = 0.001 * 8 / 256
    cosine = [warmup_cosine(step, 6, 6, peak) for step in range(6)]
    assert seen["--no-fix-pred-lr"] == [[lr, lr] for lr in cosine]
    assert seen["--fix-pred-lr"] == [[lr, peak] for lr in cosine]


def test_logged(photos, tmp_path):
    train_here("simsiam", photos, tmp_path, "--max-steps", "3")
    for row in trained(tmp_path):
        assert row["chance"] == 0 and row["feature_std_chance"] == 0.25  # 1 / sqrt(16)
        assert 0.25 < row["feature_std"] < 0.27  # of 8 samples, with the n - 1 of std
    network = open_network(tmp_path, torch.device("cpu"))
    assert torch.equal(network.encoder.conv1.weight, load_checkpoint(tmp_path)["model"]["encoder.conv1.weight"])


# ------------------------------------------------ views ------------------------------------------------
def test_view_is_torchvision_s_in_order():
    """Flip, jitter, grey, blur, normalise: sample by sample what torchvision's functions give."""
    from torchvision.transforms.v2 import functional as tv

    view, rng = simsiam.SimSiamView(40), random.Random(3)
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
        x = tv.gaussian_blur(x, [13, 13], [d["sigma"]]) if d["blur"] else x
        x = tv.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)


def test_strengths_of_the_view():
    view, rng = simsiam.SimSiamView(32), random.Random(0)
    draws = [view.sample(rng) for _ in range(5000)]
    share = {k: sum(d[k] for d in draws) / 5000 for k in ("flip", "jitter", "gray", "blur")}
    assert share == pytest.approx({"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": 0.5}, abs=0.02)
    for name in ("brightness", "contrast", "saturation"):
        factors = [d[name] for d in draws]
        assert (min(factors), max(factors)) == pytest.approx((0.6, 1.4), abs=0.01)
    assert max(abs(d["hue"]) for d in draws) == pytest.approx(0.1, abs=0.001)
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 200, 200)
    widths = [int(crop[0, 0, -1]) - int(crop[0, 0, 0]) for crop in (view.crop(ramp, rng) for _ in range(500))]
    assert 200 * (0.2 * 3 / 4) ** 0.5 - 6 <= min(widths) < 90 and max(widths) > 180  # 20% of the area or more


# ------------------------------------------------ layout ------------------------------------------------
def test_paste():
    space = cut(["projector", "predictor", "SimSiam", "image_encoder"], file="simsiam.py")
    encoder = torchvision.models.resnet18()
    encoder.fc = space["projector"](512, 32, 16)
    model = space["SimSiam"](encoder, space["predictor"](16, 8))
    backward(*model(*torch.randn(2, 4, 3, 32, 32))[:2])
    loss = cut(["simsiam_loss"], file="simsiam.py")["simsiam_loss"]
    loss(*torch.randn(4, 4, 8, requires_grad=True)).backward()
    std = cut(["feature_std"], ["all_gather"], file="simsiam.py")["feature_std"]
    assert std(torch.randn(4, 8)) > 0
    view = cut(["SimSiamView"], allowed_data=["random_resized_crop", "draw_jitter", "to_float", "hflip", "color_jitter",
                                              "grayscale", "gaussian_blur", "normalize"], file="simsiam.py")  # fmt: skip
    view, rng = view["SimSiamView"](32), random.Random(0)
    crops = torch.stack([view.crop(torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8), rng) for _ in range(5)])
    draws = [view.sample(rng) for _ in range(5)]
    draws = {key: torch.stack([torch.as_tensor(draw[key]) for draw in draws]) for key in draws[0]}
    assert view(crops, draws).shape == (5, 3, 32, 32)


def test_adaptations_are_marked():
    text = (ROOT / "simsiam.py").read_text()
    assert text.count("# Copied from byol.py: ") == 1 and text.count("# Adapted from ") == 1
    assert text.count("# Copied from moco.py: eval_view") == 1
