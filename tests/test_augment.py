"""The augmentation policies of the method files: what they draw and what comes of it, against torchvision."""

import copy
import functools
import importlib
import itertools
import math
import random
import types

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as TV

import clip
import data
import simclr
import slip
from sources import Sample

N = 20000  # draws: a probability is known to 0.003, five times that is far below 0.05
ORDERS = list(itertools.permutations(range(4)))
CLIP_NORM = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Captured(Exception):
    pass


@functools.cache
def policy(name, recipe, view):
    """The view that train() of a method hands to its loader."""
    module = importlib.import_module(name)

    def loader(dataset, views, *_):
        raise Captured(views)

    with pytest.MonkeyPatch.context() as patch:
        for part in {"open_dataset", "language_set", "evaluation_set", "Tokenizer"} & vars(module).keys():
            patch.setattr(module, part, lambda *_, **__: types.SimpleNamespace(eot=0, vocab_size=1))
        patch.setattr(module, "probe_sets", lambda *_: (None, None, None), raising=False)
        patch.setattr(module, "Loader", loader)
        with pytest.raises(Captured) as caught:
            argv = ["--device", "cpu", "--data", recipe]
            module.train(module.parse_args(module.Args, module.RECIPES, argv))
    return caught.value.args[0][view]


STRONG = {  # brightness, contrast, saturation, hue
    ("slip", "yfcc15m", "view1"): (0.4, 0.4, 0.4, 0.1),
    ("slip", "yfcc15m", "view2"): (0.4, 0.4, 0.4, 0.1),
    ("simclr", "imagenet", "view1"): (0.8, 0.8, 0.8, 0.2),
    ("simclr", "imagenet", "view2"): (0.8, 0.8, 0.8, 0.2),
    ("simclr", "cifar10", "view1"): (0.4, 0.4, 0.4, 0.1),
}
FACTORS = ("brightness", "contrast", "saturation", "hue")
FLAGS = {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": 0.5}


def draws_of(view, n=N):
    """{name: n draws}, each from a generator as the loader makes it."""
    draws = [view.sample(random.Random(f"0 0 {i} view1")) for i in range(n)]
    return {name: np.array([np.asarray(draw[name]) for draw in draws]) for name in draws[0]}


# -------------------------------------------- what is drawn --------------------------------------------
def assert_uniform(values, low, high):
    """All within [low, high], and the Kolmogorov-Smirnov distance to that distribution below 1.9 / sqrt(n),
    which a uniform sample exceeds once in 700 times; a range 5% wider gives nearly twice that."""
    assert low <= values.min() and values.max() <= high
    order = np.sort((values - low) / (high - low))
    assert np.abs(order - np.arange(0.5, len(order)) / len(order)).max() < 1.9 / len(order) ** 0.5


@pytest.mark.parametrize("name, strengths", STRONG.items())
def test_probabilities_ranges_and_order(name, strengths):
    draws = draws_of(policy(*name))
    assert draws.keys() == {*FLAGS, *FACTORS, "order", "sigma"}  # nothing else is random: no solarisation
    for flag, probability in FLAGS.items():
        assert draws[flag].dtype == bool and abs(draws[flag].mean() - probability) < 0.015, flag
    for factor, strength in zip(FACTORS[:3], strengths):
        assert_uniform(draws[factor], max(0, 1 - strength), 1 + strength)
    assert_uniform(draws["hue"], -strengths[3], strengths[3])
    assert_uniform(draws["sigma"], 0.1, 2.0)
    counts = [(draws["order"] == order).all(1).sum() for order in ORDERS]
    assert sum(counts) == N and max(abs(24 * count / N - 1) for count in counts) < 0.17


def test_strong_jitter_never_has_a_negative_factor():
    draws = draws_of(simclr.SimCLRView(64, strength=1.5))
    for factor in FACTORS[:3]:
        assert_uniform(draws[factor], 0, 2.2)
    assert_uniform(draws["hue"], -0.3, 0.3)


@pytest.mark.parametrize("view", [slip.SSLView(8), simclr.SimCLRView(8)], ids=["slip", "simclr"])
def test_draws_are_independent_of_each_other(view):
    """Grey does not depend on jitter, strong brightness not on strong contrast."""
    draws = draws_of(view)
    for values in itertools.product([False, True], repeat=4):
        share = np.logical_and.reduce([draws[flag] == value for flag, value in zip(FLAGS, values)]).mean()
        assert abs(share - math.prod(p if v else 1 - p for p, v in zip(FLAGS.values(), values))) < 0.015
    numbers = np.stack([draws[key].astype(float) for key in (*FLAGS, *FACTORS, "sigma")])
    numbers = np.concatenate([numbers, draws["order"].T[:3]])
    correlation = np.corrcoef(numbers) - np.eye(len(numbers))
    correlation[-3:, -3:] = 0  # places of one permutation do depend on each other
    assert np.abs(correlation).max() < 0.03


class Gradient:
    """Pictures whose red grows to the right and whose green grows downwards: a crop tells its place."""

    name, captioned, classes = "gradient", True, None

    def __init__(self, n, size=64):
        self.n, ramp = n, np.linspace(0, 255, size).round().astype(np.uint8)
        red, green = np.meshgrid(ramp, ramp)
        self.image = np.ascontiguousarray(np.stack([red, green, np.full_like(red, 90)], 2))

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return Sample(self.image, ["a caption"], -1, f"{i}")


def two_views(view, n, seed=0, device="cpu"):
    return data.Loader(Gradient(n), {"view1": view, "view2": view}, {}, 4, seed=seed, device=device)


@pytest.mark.parametrize("view", [slip.SSLView(8), simclr.SimCLRView(8)], ids=["slip", "simclr"])
def test_two_views_of_a_sample_are_independent(view):
    n = 2000
    loader = two_views(view, n)
    samples = [loader[0, i] for i in range(n)]
    columns = {"view1": [], "view2": []}
    for sample in samples:
        for name, column in columns.items():
            crop, draw = sample[name]
            place = crop.float().mean((1, 2))[:2].tolist()
            column.append([*(draw[key] for key in (*FLAGS, *FACTORS, "sigma")), *place, draw["order"][0]])
    first, second = (np.array(column, float) for column in columns.values())
    assert (first[:, 4:9] != second[:, 4:9]).all()  # no number is shared
    between = np.corrcoef(first.T, second.T)[: first.shape[1], first.shape[1] :]
    assert np.abs(between).max() < 0.1  # of 2,000 pairs: 4.5 standard deviations
    for k, p in enumerate(FLAGS.values()):
        assert abs((first[:, k] == second[:, k]).mean() - (p * p + (1 - p) ** 2)) < 0.05
    assert np.corrcoef(first.T)[9, 10] < 0.1 and first[:, 9].std() > 15  # crops are all over the place


def plain(sample):
    """The two views as nested lists, to compare with ==."""
    views = {name: sample[name] for name in ("view1", "view2")}
    return {
        name: (crop.tolist(), {key: np.asarray(value).tolist() for key, value in draw.items()})
        for name, (crop, draw) in views.items()
    }


@pytest.mark.parametrize("view", [slip.SSLView(8), simclr.SimCLRView(8)], ids=["slip", "simclr"])
def test_draws_are_functions_of_seed_epoch_index_and_view(view):
    wanted = {i: plain(two_views(view, 40)[3, i]) for i in range(8)}
    loader = data.Loader(Gradient(99), {"view2": view, "other": slip.SSLView(9), "view1": view}, {}, 8)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    again = {}
    for i in (5, 2, 7, 0, 1, 3, 6, 4):  # another order, batch size, dataset size, with another view between
        again[i] = plain(loader[3, i])
    assert again == wanted
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    assert plain(loader[3, 5]) == wanted[5]
    others = [two_views(view, 40)[4, 5], two_views(view, 40)[3, 6], two_views(view, 40, seed=1)[3, 5]]
    everything = [pair for sample in (wanted[5], *map(plain, others)) for pair in sample.values()]
    sigmas = [draw["sigma"] for _, draw in everything]
    assert len(set(sigmas)) == 8 and len({str(crop) for crop, _ in everything}) == 8


# -------------------------------------------- what comes of it --------------------------------------------
class Noise(Gradient):
    def __init__(self, n, size):
        super().__init__(n, size)
        rng = np.random.default_rng(0)
        blocks = rng.integers(0, 256, (n, size // 8 + 1, size // 8 + 1, 3), dtype=np.uint8)  # smooth parts
        noise = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        large = blocks.repeat(8, 1).repeat(8, 2)[:, :size, :size]
        self.images = np.where(rng.random((n, 1, 1, 1)) < 0.5, large, noise)

    def __getitem__(self, i):
        return Sample(self.images[i], ["a caption"], -1, f"{i}")


def batch_of(view, n, size):
    """Pixels and draws of n samples, stacked as the loader stacks them."""
    loader = data.Loader(Noise(n, size), {"view": view}, {}, n, device="meta")  # for a GPU views are called later
    batch = loader.collate([loader[item] for item in next(loader.order(0, 1))])
    return batch["pixels"]["view"], batch["params"]["view"]


def by_torchvision(x, draw, kernel_size, norm=None):
    """One sample, uint8 (3, S, S), with its own draws, one function after the other."""
    x = TV.to_dtype(x, torch.float32, scale=True)
    if draw["flip"]:
        x = TV.hflip(x)
    if draw["jitter"]:
        for kind in draw["order"].tolist():
            x = getattr(TV, f"adjust_{FACTORS[kind]}")(x, draw[FACTORS[kind]].item())
    if draw["gray"]:
        x = TV.rgb_to_grayscale(x, 3)
    if kernel_size and draw["blur"]:
        x = TV.gaussian_blur(x, [kernel_size, kernel_size], [draw["sigma"].item()] * 2)
    return TV.normalize(x, *norm) if norm else x


@pytest.mark.parametrize("view, n, size, kernel_size, norm", [
    (slip.SSLView(48), 96, 60, 13, IMAGENET_NORM),
    (slip.SSLView(224), 8, 300, 13, IMAGENET_NORM),
    (simclr.SimCLRView(48), 96, 60, 5, None),
    (simclr.SimCLRView(224), 8, 300, 23, None),
    (simclr.SimCLRView(32, strength=0.5, blur=False), 96, 32, None, None),
], ids=["slip 48", "slip 224", "simclr 48", "simclr 224", "simclr cifar10"])  # fmt: skip
def test_a_batch_equals_torchvision_sample_by_sample(view, n, size, kernel_size, norm):
    pixels, draws = batch_of(view, n, size)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous(memory_format=torch.channels_last)
    out = view(pixels, draws)
    assert out.dtype == torch.float32 and out.shape == (n, 3, view.size, view.size)
    scale = torch.tensor(norm[1] if norm else (1, 1, 1))[:, None, None]  # 1e-3 in [0, 1]
    for i in range(n):
        expected = by_torchvision(pixels[i], {name: v[i] for name, v in draws.items()}, kernel_size, norm)
        assert ((out[i] - expected).abs() * scale).max() < 1e-3, i
    if not norm:
        assert 0 <= out.min() and out.max() < 1 + 1e-6  # the official code does not normalise
    used = [draws[flag].float().mean() for flag in FLAGS]
    assert n < 20 or all(0.05 < share < 0.95 for share in used)


@pytest.mark.parametrize("size", [32, 48, 96, 160, 224])
def test_blur_reaches_as_far_as_it_should(size):
    """SimCLR: a tenth of the image (official: size // 10, half of it on either side); SLIP: three sigma."""
    point = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    point[..., size // 2, size // 2] = 255
    off, on = torch.tensor([False]), torch.tensor([True])
    draw = {"flip": off, "jitter": off, "gray": off, "blur": on, "sigma": torch.tensor([2.0])}
    draw |= {name: torch.ones(1) for name in FACTORS} | {"order": torch.arange(4)[None]}
    for view, radius in ((simclr.SimCLRView(size), size // 10 // 2), (slip.SSLView(size), 6)):
        change = view(point, draw) - view(torch.zeros_like(point), draw)
        for axis in (0, 1):
            assert (change[0, 0].abs().sum(axis) > 1e-9).sum() == 2 * radius + 1
    assert torch.equal(simclr.SimCLRView(size, blur=False)(point, draw), data.to_float(point))


@pytest.mark.parametrize("name, norm", [("clip", CLIP_NORM), ("slip", IMAGENET_NORM)])
def test_the_language_view_is_a_crop_and_nothing_else(name, norm):
    """Red still grows to the right in every crop: captions say left."""
    view = policy(name, "yfcc15m", "image")
    image = torch.from_numpy(Gradient(1, size=80).image).permute(2, 0, 1)
    assert view.size == 224 and view.sample(random.Random(0)) == {}
    small = clip.LanguageView(32, view.scale, view.interpolation, view.mean, view.std)
    crops = torch.stack([small.crop(image, random.Random(i)) for i in range(500)])
    rows, columns = crops.float().mean(2)[:, 0], crops.float().mean(3)[:, 1]
    assert (rows.diff() >= 0).all() and (columns.diff() >= 0).all() and (rows[:, -1] - rows[:, 0] > 100).all()
    expected = torch.stack(
        [TV.normalize(TV.to_dtype(crop, torch.float32, scale=True), *norm) for crop in crops]
    )
    torch.testing.assert_close(small(crops, {}), expected, atol=1e-5, rtol=0)


def test_the_strong_views_do_flip():
    """What the test above would see if the language view flipped."""
    view = simclr.SimCLRView(32, strength=0.0, blur=False)
    loader = two_views(view, 300, device="meta")
    batch = loader.collate([loader[0, i] for i in range(300)])
    draw = batch["params"]["view1"]
    falling = view(batch["pixels"]["view1"], draw).mean(2)[:, 0].diff().mean(1) < 0
    assert torch.equal(falling[~draw["gray"]], draw["flip"][~draw["gray"]])


def test_views_do_not_depend_on_threads():
    """A worker has one; the process that makes views where /dev/shm has no room has several. 0 workers too must agree."""
    before, runs = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        torch.randn(512, 512).exp().sum()  # OpenMP's threads have started when the workers are forked
        for workers, room in ((2, True), (2, False), (0, True)):
            loader = data.Loader(Noise(16, 80), {"view": slip.SSLView(64)}, {}, 8, workers=workers)
            loader.has_room = lambda batch, room=room: room
            runs.append(torch.cat([batch["view"] for _, batch in loader.batches(0, 2)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


# -------------------------------------------- crops --------------------------------------------
@pytest.fixture
def cuts(monkeypatch):
    """What data.random_resized_crop cuts out, (top, left, height, width), and how it resizes that."""
    seen, interpolate = [], torch.nn.functional.interpolate

    def spy(crop, size, mode, antialias):
        row, column = crop.stride()[2:]
        box = crop.storage_offset() // row, crop.storage_offset() % row // column, *crop.shape[2:]
        seen.append((box, tuple(size), mode, antialias))
        return interpolate(crop, size, mode=mode, antialias=antialias)

    monkeypatch.setattr(data.F, "interpolate", spy)
    return seen


@pytest.mark.parametrize("name, scale, interpolation", [
    (("clip", "yfcc15m", "image"), (0.9, 1.0), "bicubic"),
    (("slip", "yfcc15m", "image"), (0.5, 1.0), "bilinear"),
    (("slip", "yfcc15m", "view1"), (0.08, 1.0), "bilinear"),
    (("slip", "yfcc15m", "view2"), (0.08, 1.0), "bilinear"),
    (("simclr", "imagenet", "view1"), (0.08, 1.0), "bicubic"),
    (("simclr", "imagenet", "view2"), (0.08, 1.0), "bicubic"),
    (("simclr", "cifar10", "view1"), (0.08, 1.0), "bicubic"),
])  # fmt: skip
def test_scale_aspect_and_interpolation_of_crops(cuts, name, scale, interpolation):
    view = policy(*name)
    size, height, width, n = view.size, 90, 110, 1500
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    for i in range(3):
        crop = view.crop(image, random.Random(i))
        box, sides, mode, antialias = cuts[-1]
        assert sides == (size, size) and mode == interpolation and antialias
        expected = TV.resized_crop(
            image, *box, [size, size], InterpolationMode(interpolation), antialias=True
        )
        assert (crop.int() - expected.int()).abs().max() <= 1
    view = copy.copy(view)
    view.size = 4  # the same policy, quick to resize
    del cuts[:]
    for i in range(n):
        view.crop(image, random.Random(f"0 0 {i} view1"))
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)]
    area = np.array([h * w for (_, _, h, w), *_ in cuts]) / (height * width)
    assert area.min() > scale[0] - 0.01 and area.min() < scale[0] + 0.1
    ours, theirs = (np.array(boxes, float).T for boxes in ([cut[0] for cut in cuts], theirs))  # (4, n)
    for statistic in (lambda b: b[2] * b[3], lambda b: b[3] / b[2], lambda b: b[0], lambda b: b[1]):
        one, other = np.sort(statistic(ours)), np.sort(statistic(theirs))
        at = np.concatenate([one, other])
        below = np.searchsorted(one, at, side="right") - np.searchsorted(other, at, side="right")
        assert np.abs(below).max() / n < 2.2 * (2 / n) ** 0.5  # equal distributions exceed it once in 8,000


def test_evaluation_views():
    """Language-image: resized to the size itself; SimCLR: the central 87.5%, but all of a CIFAR picture."""
    cases = [(clip, "BICUBIC", *CLIP_NORM), (slip, "BILINEAR", *IMAGENET_NORM),
             (simclr, "BICUBIC", (0, 0, 0), (1, 1, 1))]  # fmt: skip
    for module, *case in cases:
        view = module.eval_view(module.Args())
        assert [view.filter.name, tuple(view.mean), tuple(view.std)] == case
        assert (view.size, view.resize) == (224, 256 if module is simclr else 224)
    small = simclr.eval_view(simclr.Args(image_size=32))
    assert (small.size, small.resize) == (32, 32)
