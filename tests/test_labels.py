"""A recipe's label means what it says: the recipes beside the numbers of the runs that they are named after, which are
written here as those runs state them (a rate per 128 images, a decay for another scale of the loss)."""

import pytest
import torch
import torch.nn.functional as F

import byol
import moco
import mocov3
import simclr
import simclrv2
import simsiam
from run import parse_args

COSINE = dict(min_lr=0.0, accum_steps=1, clip_grad=0.0)
LIGHTLY = dict(COSINE, epochs=200, batch_size=512, image_size=32, arch="resnet18", blur=False, momentum=0.9, warmup_epochs=0.0)
LIGHTLY_LR = 0.06 * 512 / 128


def resolved(module, recipe):
    """A recipe's arguments, and the learning rate that follows from them."""
    args = parse_args(module.Args, module.RECIPES, ["--recipe", recipe])
    lr = args.lr if module is moco else args.base_lr * args.batch_size / 256
    if module is simclrv2 or getattr(args, "lr_scaling", "linear") == "sqrt":
        lr = args.base_lr * args.batch_size**0.5
    return {**vars(args), "lr": lr}


def check(module, recipe, expected):
    found = resolved(module, recipe)
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value) if isinstance(value, float) else value), (recipe, name)


# ------------------------------------------------ SimCLR ------------------------------------------------
LARS = dict(COSINE, optimizer="lars", momentum=0.9, warmup_epochs=10.0)


@pytest.mark.parametrize("recipe, expected", [
    ("cifar10", dict(LIGHTLY, optimizer="sgd", lr=LIGHTLY_LR, weight_decay=5e-4, temperature=0.5, jitter_strength=0.5,
                     head_layers=2, head_dim=128)),
    ("cifar10-paper", dict(LARS, arch="resnet50", batch_size=1024, epochs=1000, lr=1.0 * 1024 / 256, weight_decay=1e-6,
                           temperature=0.5, jitter_strength=0.5, blur=False, image_size=32)),
    ("imagenet", dict(LARS, arch="resnet50", batch_size=4096, epochs=1000, lr=4.8, weight_decay=1e-6, temperature=0.1,
                      jitter_strength=1.0, blur=True, head_layers=2, head_dim=128)),
    ("imagenet-v2", dict(LARS, batch_size=4096, epochs=800, lr=6.4, weight_decay=1e-4, temperature=0.1, head_layers=3,
                         warmup_epochs=0.05 * 800)),
])  # fmt: skip
def test_simclr(recipe, expected):
    check(simclr, recipe, expected)


# ------------------------------------------------ SimCLR v2 ------------------------------------------------
FINETUNE = dict(COSINE, stage="finetune", optimizer="lars", momentum=0.9, batch_size=1024, lr=0.16, weight_decay=0.0,
                warmup_epochs=0.0)  # fmt: skip
DISTILL = dict(COSINE, stage="distill", optimizer="lars", momentum=0.9, batch_size=4096, lr=6.4, weight_decay=1e-4, epochs=400,
               warmup_epochs=0.05 * 400, alpha=1.0, head_layer=0)  # fmt: skip


@pytest.mark.parametrize("recipe, expected", [
    ("imagenet", dict(FINETUNE, label_fraction=0.01, epochs=60, head_layer=1)),
    ("imagenet-10", dict(FINETUNE, label_fraction=0.1, epochs=30, head_layer=1)),
    ("imagenet-100", dict(FINETUNE, label_fraction=1.0, epochs=30, head_layer=0)),
    ("imagenet-distill", dict(DISTILL, temperature=1.0, arch="resnet50")),
    ("imagenet-self-distill", dict(DISTILL, temperature=0.1, arch="")),
])  # fmt: skip
def test_simclrv2(recipe, expected):
    check(simclrv2, recipe, expected)


# ------------------------------------------------ BYOL ------------------------------------------------
BYOL = dict(LARS, arch="resnet50", batch_size=4096, hidden_dim=4096, out_dim=256, tau_end=1.0, blur=True)


@pytest.mark.parametrize("recipe, expected", [
    ("cifar10", dict(LIGHTLY, optimizer="sgd", hidden_dim=1024, out_dim=256, tau=0.99, tau_end=0.99)),
    ("imagenet", dict(BYOL, epochs=1000, lr=3.2, weight_decay=1.5e-6, tau=0.996)),
    ("imagenet-300", dict(BYOL, epochs=300, lr=0.3 * 16, weight_decay=1e-6, tau=0.99)),
    ("imagenet-100", dict(BYOL, epochs=100, lr=0.45 * 16, weight_decay=1e-6, tau=0.99)),
    ("imagenet-b512", dict(BYOL, epochs=1000, batch_size=512, lr=0.4 * 2, weight_decay=1.5e-6, tau=0.9995)),
])  # fmt: skip
def test_byol(recipe, expected):
    check(byol, recipe, expected)


def test_byol_s_steps_on_cifar_are_lightly_s():
    """lightly's script: rate 0.06 per 128 images and decay 5e-4 on the mean of both negative cosines."""
    ours = resolved(byol, "cifar10")
    torch.manual_seed(0)
    start, inputs, z1, z2 = torch.randn(6, 5), torch.randn(2, 7, 6), torch.randn(7, 5), torch.randn(7, 5)

    def cosines(p1, p2):
        return 0.5 * (-F.cosine_similarity(p1, z2).mean() - F.cosine_similarity(p2, z1).mean())

    weights = []
    for lr, decay, loss in ((LIGHTLY_LR, 5e-4, cosines),
                            (ours["lr"], ours["weight_decay"], lambda p1, p2: byol.byol_loss(p1, p2, z1, z2))):  # fmt: skip
        weight = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=lr, momentum=ours["momentum"], weight_decay=decay)
        for _ in range(5):
            optimizer.zero_grad()
            loss(inputs[0] @ weight, inputs[1] @ weight).backward()
            optimizer.step()
        weights.append(weight.detach())
    assert (weights[0] - start).abs().max() > 0.05
    torch.testing.assert_close(*weights)


# ------------------------------------------------ SimSiam ------------------------------------------------
SIMSIAM = dict(COSINE, out_dim=2048, predictor_dim=512, momentum=0.9, warmup_epochs=0.0)


@pytest.mark.parametrize("recipe, expected", [
    ("cifar10", dict(SIMSIAM | LIGHTLY, **dict(lr=0.06, weight_decay=5e-4, fix_pred_lr=False, projector_layers=2, hidden_dim=2048))),
    ("imagenet", dict(SIMSIAM, batch_size=512, epochs=100, lr=0.1, weight_decay=1e-4, fix_pred_lr=True, projector_layers=3)),
    ("imagenet-800", dict(SIMSIAM, batch_size=256, epochs=800, lr=0.05, weight_decay=1e-4, fix_pred_lr=True, projector_layers=3)),
])  # fmt: skip
def test_simsiam(recipe, expected):
    check(simsiam, recipe, expected)


# ------------------------------------------------ MoCo ------------------------------------------------
@pytest.mark.parametrize("recipe, expected", [
    ("cifar10", dict(LIGHTLY, lr=LIGHTLY_LR, weight_decay=5e-4, temperature=0.1, key_momentum=0.99, queue_size=8192, head_dim=128,
                     bn_group=512 // 8, symmetric=True, version="2")),
    ("imagenet", dict(COSINE, arch="resnet50", batch_size=256, epochs=200, lr=0.03, weight_decay=1e-4, momentum=0.9, head_dim=128,
                      warmup_epochs=0.0, queue_size=65536, key_momentum=0.999, bn_group=256 // 8, symmetric=False, crop_min=0.2)),
])  # fmt: skip
def test_moco(recipe, expected):
    check(moco, recipe, expected)


# ------------------------------------------------ MoCo v3 ------------------------------------------------
VIT = dict(COSINE, batch_size=4096, epochs=300, lr=2.4e-3, weight_decay=0.1, optimizer="adamw", warmup_epochs=40.0,
           temperature=0.2, key_momentum=0.99, crop_min=0.08, mlp_dim=4096, head_dim=256)  # fmt: skip
R50 = dict(COSINE, arch="resnet50", batch_size=4096, optimizer="lars", trust=1e-3, warmup_epochs=10.0, temperature=1.0,
           crop_min=0.2, mlp_dim=4096, head_dim=256)  # fmt: skip


@pytest.mark.parametrize("recipe, expected", [
    ("cifar10", dict(COSINE, arch="resnet18", batch_size=256, epochs=1000, lr=0.3, weight_decay=1e-6, trust=0.02, temperature=0.2,
                     optimizer="lars", warmup_epochs=10.0, blur=False, mlp_dim=4096, head_dim=256)),
    ("imagenet", dict(VIT, arch="vit_small_patch16")),
    ("imagenet-vit-base", dict(VIT, arch="vit_base_patch16")),
    ("imagenet-resnet50", dict(R50, epochs=100, lr=9.6, weight_decay=1e-6, key_momentum=0.99)),
    ("imagenet-resnet50-1000", dict(R50, epochs=1000, lr=4.8, weight_decay=1.5e-6, key_momentum=0.996)),
])  # fmt: skip
def test_mocov3(recipe, expected):
    check(mocov3, recipe, expected)
