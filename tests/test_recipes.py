"""Every named dataset with every method, flags as they are without any of the user's: a run has steps, and its warm-up is a
sensible part of it."""

import pytest
import torch

import sources
from runs import METHODS, module_of

LANGUAGE = ["clip", "slip", "declip", "align"]
CAPTIONED = {"shapes": 20_000, "flickr8k": 6_000, "flickr30k": 29_000, "coco": 118_287, "cc3m": 2_900_000,
             "cc12m": 10_900_000, "yfcc15m": 14_700_000, "redcaps": 12_000_000}  # fmt: skip
LABELLED = {"cifar10": 50_000, "cifar100": 50_000, "stl10": 5_000, "stl10-unlabeled": 105_000, "food101": 75_750,
            "imagenet": 1_281_167}  # fmt: skip
MULTI30K = dict.fromkeys(sources.MULTI30K, 29_000)  # one set of photos, with captions in four languages
CASES = [(method, data) for method in METHODS for data in CAPTIONED]
CASES += [(method, data) for method in LANGUAGE for data in MULTI30K]
CASES += [(method, data) for method in METHODS if method not in LANGUAGE for data in LABELLED]


def schedule(method, data):
    """-> steps of the whole run, steps of its warm-up, its arguments."""
    module = module_of(method)
    args = module.parse_args(module.Args, module.RECIPES, ["--data", data])
    epoch = (CAPTIONED | MULTI30K | LABELLED)[data] // args.batch_size
    return args.epochs * epoch, round(args.warmup_epochs * epoch), args


@pytest.mark.parametrize("method, data", CASES)
def test_the_warm_up_is_a_sensible_part_of_the_run(method, data):
    """CLIP's own is the shortest: 2,000 of 390,000 steps. None at all is right where a recipe says so."""
    steps, warmup, args = schedule(method, data)
    assert steps >= 100
    if args.warmup_epochs or method in LANGUAGE:
        assert 0.005 * steps <= warmup <= 0.2 * steps and warmup >= 5, (warmup, steps)


@pytest.mark.parametrize("method", LANGUAGE)
def test_every_captioned_set_has_an_entry(method):
    """The defaults are the paper's run on hundreds of millions of pairs: their warm-up is no fraction of an epoch of another set.
    DeCLIP's are those of YFCC15M."""
    assert set(CAPTIONED | MULTI30K) <= set(module_of(method).RECIPES)
    recipes = module_of(method).RECIPES
    assert all(recipes[name] == recipes["flickr30k"] for name in MULTI30K)


def network_of(method, recipe):
    """-> arguments of a recipe, and its model without memory."""
    module = module_of(method)
    args = module.parse_args(module.Args, module.RECIPES, ["--data", "photos", "--recipe", recipe])
    with torch.device("meta"):
        return args, module.build_model(args)


def test_ibot_vit_large():
    """Width 1024 and 24 layers of 12 D^2 + 13 D parameters, 197 positions, a class token, a norm, patches of 16."""
    for name in ("imagenet-vitl16", "imagenet-vitl16-rand"):
        args, model = network_of("ibot", name)
        d = 1024
        teacher = 24 * (12 * d * d + 13 * d) + 197 * d + d + 2 * d + 16 * 16 * 3 * d + d
        assert sum(p.numel() for p in model.teacher.backbone.parameters()) == teacher == 303_301_632
        assert (args.epochs, args.batch_size, args.base_lr, args.drop_path) == (250, 1024, 5e-4, 0.2)
        assert args.mask_shape == ("rand" if name.endswith("rand") else "block")


def test_dinov2_vit_large_14():
    """The official configuration vitl14 (spec/dinov2.md): 625,000 steps of 3,072 images, rate 3.46e-4, two heads."""
    args, model = network_of("dinov2", "imagenet22k-vitl14")
    images = 14_197_122  # of ImageNet-22k
    steps = args.epochs * (images // args.batch_size)
    assert steps == pytest.approx(625_000, rel=0.01)
    assert args.warmup_epochs / args.epochs == pytest.approx(80 / 500, rel=0.01)
    assert args.warmup_teacher_temp_epochs / args.epochs == pytest.approx(30 / 500, rel=0.01)
    assert args.freeze_last_layer / args.epochs == pytest.approx(1 / 500, rel=0.01)
    assert args.base_lr * (args.batch_size / 1024) ** 0.5 == pytest.approx(3.46e-4, rel=0.01)
    heads = model.student.dino_head, model.student.ibot_head
    assert [head.last_layer.in_features for head in heads] == [384, 256]
    assert [head.last_layer.out_features for head in heads] == [131072, 131072]
    assert model.student.backbone.pos_embed.shape == (1, 257, 1024) and model.student.backbone.blocks[0].swiglu
