"""The augmentation of every view that a run uses, against the papers' tables: how often each operation is drawn, how
strong it is, where the crop comes from, and the order in which the operations reach the image."""

import importlib
import random

import pytest
import torch

from runs import FLAGS, make_photos

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
STRONG = dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)  # SimCLR, App. A
MOCO = dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)  # MoCo v2
BYOL = dict(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)  # BYOL, Table 6


def policy(scale, interpolation, jitter=None, blur=0.5, solarize=0.0, kernel=13, norm=IMAGENET):
    return dict(scale=scale, interpolation=interpolation, jitter=jitter, blur=blur, solarize=solarize, kernel=kernel, norm=norm)


BLUR_TENTH = 3  # pixels: a tenth of the 32 of these runs, odd
POLICIES = {
    ("clip", "image"): policy((0.9, 1.0), "bicubic", norm=CLIP),
    ("slip", "image"): policy((0.5, 1.0), "bilinear"),
    ("slip", "view1"): policy((0.08, 1.0), "bilinear", MOCO),
    ("slip", "view2"): policy((0.08, 1.0), "bilinear", MOCO),
    ("declip", "view1"): policy((0.2, 1.0), "bilinear", MOCO),
    ("declip", "view2"): policy((0.2, 1.0), "bilinear", MOCO),
    ("simclr", "view1"): policy((0.08, 1.0), "bicubic", STRONG, kernel=BLUR_TENTH, norm=None),
    ("simclr", "view2"): policy((0.08, 1.0), "bicubic", STRONG, kernel=BLUR_TENTH, norm=None),
    ("byol", "view1"): policy((0.08, 1.0), "bicubic", BYOL, 1.0, 0.0, kernel=BLUR_TENTH),
    ("byol", "view2"): policy((0.08, 1.0), "bicubic", BYOL, 0.1, 0.2, kernel=BLUR_TENTH),
    ("simsiam", "view1"): policy((0.2, 1.0), "bilinear", MOCO),
    ("simsiam", "view2"): policy((0.2, 1.0), "bilinear", MOCO),
    ("moco", "view1"): policy((0.2, 1.0), "bilinear", MOCO),
    ("moco", "view2"): policy((0.2, 1.0), "bilinear", MOCO),
    ("mocov3", "view1"): policy((0.08, 1.0), "bilinear", BYOL, 1.0, 0.0),
    ("mocov3", "view2"): policy((0.08, 1.0), "bilinear", BYOL, 0.1, 0.2),
    ("dino", "global1"): policy((0.25, 1.0), "bicubic", BYOL, 1.0, 0.0),
    ("dino", "global2"): policy((0.25, 1.0), "bicubic", BYOL, 0.1, 0.2),
    ("dino", "local1"): policy((0.05, 0.25), "bicubic", BYOL, 0.5, 0.0),
    ("ibot", "global1"): policy((0.25, 1.0), "bicubic", BYOL, 1.0, 0.0),
    ("ibot", "global2"): policy((0.25, 1.0), "bicubic", BYOL, 0.1, 0.2),
    ("ibot", "local1"): policy((0.05, 0.25), "bicubic", BYOL, 0.5, 0.0),
    ("dinov2", "global1"): policy((0.32, 1.0), "bicubic", BYOL, 0.0, 0.0, kernel=9),
    ("dinov2", "global2"): policy((0.32, 1.0), "bicubic", BYOL, 0.9, 0.2, kernel=9),
    ("dinov2", "local1"): policy((0.05, 0.32), "bicubic", BYOL, 0.5, 0.0, kernel=9),
}
OPERATIONS = "to_float hflip color_jitter grayscale gaussian_blur solarize normalize".split()
DRAWS = 3000  # a share of them is known to 0.03 (three standard deviations)


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def views_of(tmp_path_factory):
    """The views that train() hands to the loader, by method."""
    photos, found = make_photos(tmp_path_factory.mktemp("photos"), train=10, val=2), {}

    def loader(dataset, views, *_):
        raise Stop(views)

    def views_of(name, *flags):
        if (name, *flags) not in found:
            module = importlib.import_module(name)
            argv = ["--data", str(photos), *FLAGS[name], *flags]
            args = module.parse_args(module.Args, module.RECIPES, argv)
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop) as stopped:
                patch.setattr(module, "Loader", loader)
                module.train(args)
            found[(name, *flags)] = stopped.value.args[0]
        return found[(name, *flags)]

    return views_of


JITTERED = [name for name, key in POLICIES if key in ("view1", "global1") and name not in ("slip", "declip")]


@pytest.mark.parametrize("name", JITTERED)
def test_the_strength_of_the_jitter_is_a_factor_of_every_range(name, views_of):
    """The same random numbers give half the deviation from the image as it is."""
    whole, half = views_of(name), views_of(name, "--jitter-strength", "0.5")
    for key, view in whole.items():
        for i in range(5):
            a, b = (v.sample(random.Random(f"{key} {i}")) for v in (view, half[key]))
            for factor, nothing in dict(brightness=1, contrast=1, saturation=1, hue=0).items():
                assert b[factor] - nothing == pytest.approx(0.5 * (a[factor] - nothing), abs=1e-9), (key, factor)
            assert a["jitter"] == b["jitter"] and a["order"] == b["order"]


@pytest.mark.parametrize("name, key", POLICIES)
def test_what_is_drawn(name, key, views_of, monkeypatch):
    view, want = views_of(name)[key], POLICIES[name, key]
    module, crops = importlib.import_module(name), []

    def cut(image, rng, size, *scale, **options):
        scale = options.pop("scale", scale[0] if scale else None)
        crops.append((size, tuple(scale), {"interpolation": "bilinear", **options}))

    monkeypatch.setattr(module, "random_resized_crop", cut)
    view.crop(torch.zeros(3, 8, 8, dtype=torch.uint8), random.Random(0))
    assert crops == [(view.size, want["scale"], {"interpolation": want["interpolation"]})]

    draws = [view.sample(random.Random(f"{name} {key} {i}")) for i in range(DRAWS)]
    if want["jitter"] is None:
        assert not any(draws)  # a caption's left and right hold, so its image is not flipped
        return

    def share(operation):
        return sum(draw.get(operation, False) for draw in draws) / DRAWS

    shares = {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": want["blur"], "solarize": want["solarize"]}
    for operation, chance in shares.items():
        got = share(operation)
        assert abs(got - chance) < 0.03 and (chance not in (0, 1) or got == chance), operation
    strengths = want["jitter"]
    ranges = {factor: (1 - s, 1 + s) for factor, s in strengths.items() if factor != "hue"}
    ranges |= {"hue": (-strengths["hue"], strengths["hue"]), "sigma": (0.1, 2.0)}
    for number, (least, most) in ranges.items():
        values = torch.tensor([draw[number] for draw in draws])
        slack = 0.01 * (most - least)
        assert least <= values.min() < least + slack and most - slack < values.max() <= most, number
        assert abs(values.mean() - (least + most) / 2) < 3 * slack, number  # uniform
    assert len({tuple(draw["order"]) for draw in draws}) == 24  # of the four colour operations


@pytest.mark.parametrize("name, key", POLICIES)
def test_what_is_applied_in_which_order(name, key, views_of, monkeypatch):
    """The operations are recorded in place of being done; the parameters that are drawn for one reach that one."""
    view, want = views_of(name)[key], POLICIES[name, key]
    module, calls = importlib.import_module(name), []
    for operation in OPERATIONS:
        if hasattr(module, operation):
            def recorded(x, *given, operation=operation, **options):
                calls.append((operation, [*given, *options.values()]))
                return x

            monkeypatch.setattr(module, operation, recorded)
    params = {parameter: f"<{parameter}>" for parameter in view.sample(random.Random(0))}
    view(torch.zeros(1, 3, view.size, view.size), params)
    given = dict(calls)
    expected = ["to_float"]
    if want["jitter"]:
        expected += ["hflip", "color_jitter", "grayscale"]
        assert given["hflip"] == [params["flip"]] and given["grayscale"] == [params["gray"]]
        factors = [params[factor] for factor in ("brightness", "contrast", "saturation", "hue")]
        assert given["color_jitter"] == [*factors, params["order"], params["jitter"]]
        if want["blur"]:
            expected.append("gaussian_blur")
            assert given["gaussian_blur"] == [params["sigma"], params["blur"], want["kernel"]]
        if want["solarize"]:
            expected.append("solarize")
            assert given["solarize"] == [params["solarize"]]
    if want["norm"]:
        expected.append("normalize")
        assert given["normalize"] == list(want["norm"])
    names = [operation for operation, _ in calls]
    if not want["solarize"] and "solarize" in names:  # it may be called where nothing is ever drawn for it
        names.remove("solarize")
    assert names == expected
