"""The image operations of data.py against torchvision.transforms.v2.functional, one sample at a time."""

import itertools
import random

import pytest
import torch
import torchvision
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TV

import data

ORDERS = list(itertools.permutations(range(4)))


def images(n=48, height=37, width=50, seed=0):
    """uint8 (n, 3, height, width), stored as (n, height, width, 3): noise, grey images, few colours, black,
    white."""
    x = torch.randint(
        0, 256, (n, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    if n >= 8:
        x[0], x[1], x[2] = 0, 255, x[2, :, :, :1]
        x[3] = x[3] // 64 * 85  # all corners of the colour cube, and many equal channels
        x[4, :, ::2], x[5, ::2] = x[4, :, ::2, :1], 255
    return x.permute(0, 3, 1, 2)


def floats(*shape, seed=0):
    return data.to_float(images(*shape, seed=seed))


def half(n):
    return torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.5


@pytest.fixture(params=["cpu form", "gpu form"])
def form(request, monkeypatch):
    """The CPU computes the chosen samples, a GPU all of them: the second branch, run on the CPU."""
    if request.param == "gpu form":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def operations(x, seed=0):
    """name -> (batched operation of mask, operation on sample i by torchvision), every parameter drawn at
    random."""
    n, rng = len(x), random.Random(seed)
    jitters = [data.draw_jitter(rng, 0.8, 0.8, 0.8, 0.5) for _ in range(n)]
    for i, jitter in enumerate(jitters):
        jitter["order"] = ORDERS[i % 24]
    jitter = {key: torch.tensor([j[key] for j in jitters]) for key in jitters[0]}
    sigma = torch.tensor(
        [rng.uniform(0.1, 2) for _ in range(n)], dtype=torch.float64
    )  # as default_collate would
    adjust = (TV.adjust_brightness, TV.adjust_contrast, TV.adjust_saturation, TV.adjust_hue)

    def one_after_another(i):
        y = x[i]
        for number in jitters[i]["order"]:
            y = adjust[number](y, jitters[i][("brightness", "contrast", "saturation", "hue")[number]])
        return y

    return {
        "hflip": (lambda mask: data.hflip(x, mask), lambda i: TV.hflip(x[i])),
        "grayscale": (lambda mask: data.grayscale(x, mask), lambda i: TV.rgb_to_grayscale(x[i], 3)),
        "solarize": (lambda mask: data.solarize(x, mask), lambda i: TV.solarize(x[i], 0.5)),
        "blur": (
            lambda mask: data.gaussian_blur(x, sigma, mask, 9),
            lambda i: TV.gaussian_blur(x[i], 9, float(sigma[i])),
        ),
        "jitter": (lambda mask: data.color_jitter(x, mask=mask, **jitter), one_after_another),
    }


@pytest.mark.parametrize("shape", [(48, 37, 50), (5, 64, 64), (1, 11, 9), (24, 16, 90)])
@pytest.mark.parametrize("name", ["hflip", "grayscale", "solarize", "blur", "jitter"])
def test_each_sample_equals_torchvision(name, shape, form):
    x = floats(*shape)
    before = x.clone()
    batched, single = operations(x)[name]
    for mask in (torch.ones(len(x), dtype=torch.bool), half(len(x)), torch.zeros(len(x), dtype=torch.bool)):
        y = batched(mask)
        assert y.dtype == torch.float32 and y.shape == x.shape
        for i in range(len(x)):
            if mask[i]:
                torch.testing.assert_close(y[i], single(i), rtol=0, atol=1e-5)
            else:
                assert torch.equal(y[i], x[i])
    assert torch.equal(x, before)


def test_jitter_in_another_order_is_another_jitter():
    x, mask = floats()[10:11].expand(24, -1, -1, -1), torch.ones(24, dtype=torch.bool)
    factors = (torch.full((24,), value) for value in (1.7, 0.4, 1.6, 0.3))
    y = data.color_jitter(x, *factors, torch.tensor(ORDERS), mask)
    distance = torch.cdist(y.flatten(1), y.flatten(1))
    assert (distance + torch.eye(24) > 1e-3).all()


@pytest.mark.parametrize("factor, hue", [(0.0, -0.5), (1.0, 0.0), (1.8, 0.5)])
def test_jitter_at_the_ends_of_its_range(factor, hue, form):
    x, order = floats(24), torch.tensor(ORDERS)
    f, mask = torch.full((24,), factor), torch.ones(24, dtype=torch.bool)
    y = data.color_jitter(x, f, f, f, torch.full((24,), hue), order, mask)
    adjust = (TV.adjust_brightness, TV.adjust_contrast, TV.adjust_saturation, TV.adjust_hue)
    for i in range(24):
        expected = x[i]
        for number in ORDERS[i]:
            expected = adjust[number](expected, hue if number == 3 else factor)
        torch.testing.assert_close(y[i], expected, rtol=0, atol=1e-5)
    if factor == 1:
        torch.testing.assert_close(y, x, rtol=0, atol=1e-6)


def test_hue_of_every_kind_of_pixel():
    """A grid through the whole colour cube, its grey diagonal and all ties between channels included."""
    level = torch.linspace(0, 1, 18)
    cube = torch.stack(torch.meshgrid(level, level, level, indexing="ij")).view(1, 3, 18, -1)
    shifts = torch.linspace(-0.5, 0.5, 23)
    y = data.shift_hue(cube.expand(23, -1, -1, -1), shifts)
    for shift, got in zip(shifts.tolist(), y):
        torch.testing.assert_close(got, TV.adjust_hue(cube[0], shift), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kernel_size", [1, 3, 13, 23])
@pytest.mark.parametrize("height, width", [(40, 41), (23, 60), (5, 7), (3, 90), (9, 3), (8, 1), (1, 1)])
def test_blur_of_small_images_uses_the_largest_kernel_that_fits(height, width, kernel_size, form):
    x, sigma, mask = floats(6, height, width), torch.linspace(0.1, 4, 6), torch.ones(6, dtype=torch.bool)
    fits = min(kernel_size, 2 * min(height, width) - 1)
    expected = [TV.gaussian_blur(image, fits, s.item()) for image, s in zip(x, sigma)]
    torch.testing.assert_close(
        data.gaussian_blur(x, sigma, mask, kernel_size), torch.stack(expected), rtol=0, atol=1e-5
    )


def test_blur_of_samples_that_are_off_needs_no_sigma(form):
    x, mask = floats(4), torch.tensor([True, False, True, False])
    y = data.gaussian_blur(x, torch.tensor([1.0, 0.0, 2.0, float("nan")]), mask, 5)
    assert torch.equal(y[~mask], x[~mask]) and y.isfinite().all() and (y[mask] != x[mask]).any()


def test_blur_keeps_float32_under_autocast(form):
    x, sigma, mask = floats(4), torch.full((4,), 1.5), torch.ones(4, dtype=torch.bool)
    expected = data.gaussian_blur(x, sigma, mask, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = data.gaussian_blur(x, sigma, mask, 5)
    assert y.dtype == torch.float32 and torch.equal(y, expected)


def test_to_float_and_normalize_are_exactly_totensor_and_normalize():
    x = images()
    y = data.to_float(x)
    expected = torch.stack(
        [torchvision.transforms.functional.to_tensor(TV.to_pil_image(image)) for image in x]
    )
    assert y.is_contiguous() and torch.equal(y, expected)
    for mean, std in ((data.IMAGENET_MEAN, data.IMAGENET_STD), (data.CLIP_MEAN, data.CLIP_STD)):
        expected = torchvision.transforms.functional.normalize(y, mean, std)
        assert torch.equal(data.normalize(y, mean, std), expected)


def test_hflip_of_uint8():
    x, mask = images(), half(48)
    y = data.hflip(x, mask)
    assert (
        y.dtype == torch.uint8 and torch.equal(y[mask], x[mask].flip(3)) and torch.equal(y[~mask], x[~mask])
    )


def test_a_whole_policy_is_one_graph():
    """torch.compile finds nothing that depends on the values, in the form that runs on a GPU."""
    rng = random.Random(0)
    draws = [data.draw_jitter(rng, 0.4, 0.4, 0.4, 0.1) for _ in range(8)]
    jitter = {key: torch.tensor([draw[key] for draw in draws]) for key in draws[0]}

    def policy(x, mask, sigma, jitter):
        x = data.hflip(data.to_float(x), mask)
        x = data.grayscale(data.color_jitter(x, mask=mask, **jitter), ~mask)
        x = data.solarize(data.gaussian_blur(x, sigma, mask, 7), mask)
        return data.normalize(x, data.IMAGENET_MEAN, data.IMAGENET_STD)

    inputs = images(8), half(8), torch.linspace(0.1, 2, 8), jitter
    compiled = torch.compile(policy, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), policy(*inputs), rtol=0, atol=1e-4)


# ------------------------------------------------ crops ------------------------------------------------
@pytest.fixture
def boxes(monkeypatch):
    """The (top, left, height, width) that random_resized_crop cuts, appended as it does so."""
    cut, interpolate = [], torch.nn.functional.interpolate

    def spy(crop, *args, **kwargs):
        row, column = crop.stride()[2:]
        cut.append((crop.storage_offset() // row, crop.storage_offset() % row // column, *crop.shape[2:]))
        return interpolate(crop, *args, **kwargs)

    monkeypatch.setattr(data.F, "interpolate", spy)
    return cut


def photo(height, width):
    return images(1, height, width)[0]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "height, width, size", [(70, 45, 32), (33, 97, 24), (20, 20, 64), (224, 1, 16), (1, 50, 8)]
)
def test_crop_equals_torchvision_resized_crop(boxes, height, width, size, interpolation):
    image, rng = photo(height, width), random.Random(0)
    for _ in range(20):
        y = data.random_resized_crop(image, rng, size, interpolation=interpolation)
        assert y.dtype == torch.uint8 and y.shape == (3, size, size)
        if boxes[-1][2:] == (size, size):
            expected = TV.crop(image, *boxes[-1])
        else:
            mode = InterpolationMode(interpolation)
            expected = TV.resized_crop(image, *boxes[-1], [size, size], interpolation=mode, antialias=True)
        # torchvision computes bilinear in float where the processor has no AVX2
        assert (y.int() - expected.int()).abs().max() <= 1


def test_crop_keeps_the_memory_order_of_the_image():
    y = data.random_resized_crop(photo(60, 80), random.Random(0), 32)
    assert y.permute(1, 2, 0).is_contiguous()


def test_crop_is_a_function_of_the_generator():
    image = photo(60, 80)
    a, b, c = (
        data.random_resized_crop(image, random.Random(f"0 1 2 {view}"), 32)
        for view in ("view1", "view1", "view2")
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_crop_of_everything_is_the_image():
    image = photo(40, 40)
    assert torch.equal(
        data.random_resized_crop(image, random.Random(0), 40, scale=(1, 1), ratio=(1, 1)), image
    )


def ks(a, b):
    """Kolmogorov-Smirnov distance of two samples."""
    a, b = (
        torch.as_tensor(a, dtype=torch.float64).sort()[0],
        torch.as_tensor(b, dtype=torch.float64).sort()[0],
    )
    at = torch.cat((a, b))
    below = (torch.searchsorted(s, at, right=True) / len(s) for s in (a, b))
    return (next(below) - next(below)).abs().max().item()


@pytest.mark.parametrize("height, width", [(300, 400), (500, 180), (64, 64)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 1.0), (0.05, 0.25)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.5, 3.0)])
def test_crops_are_distributed_as_torchvision_s(boxes, height, width, scale, ratio):
    n, image, rng = 1500, photo(height, width), random.Random(0)
    torch.manual_seed(0)
    for _ in range(n):
        data.random_resized_crop(image, rng, 1, scale, ratio)
    theirs = [
        torchvision.transforms.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)
    ]
    for statistic in (
        lambda top, left, h, w: h * w,
        lambda top, left, h, w: w / h,
        lambda top, left, h, w: top,
        lambda top, left, h, w: left + w,
    ):
        distance = ks([statistic(*box) for box in boxes], [statistic(*box) for box in theirs])
        assert (
            distance < 2.2 * (2 / n) ** 0.5
        )  # exceeded once in 8000 times by two samples of one distribution


@pytest.mark.parametrize("height, width", [(1, 200), (200, 1), (1, 1), (2, 300), (300, 7), (1, 2)])
def test_crop_of_extreme_shapes_falls_back_to_the_centre(boxes, height, width):
    image, rng = photo(height, width), random.Random(0)
    torch.manual_seed(0)
    for _ in range(50):
        y = data.random_resized_crop(image, rng, 8, scale=(0.5, 1.0))
        assert y.shape == (3, 8, 8)
    theirs = [
        torchvision.transforms.RandomResizedCrop.get_params(image, [0.5, 1.0], [3 / 4, 4 / 3])
        for _ in range(50)
    ]
    assert set(boxes) == set(theirs)


def test_crops_of_a_tiny_image_reach_every_place(boxes):
    image, rng = photo(4, 3), random.Random(0)
    torch.manual_seed(0)
    for _ in range(6000):
        data.random_resized_crop(image, rng, 2)
    get_params = torchvision.transforms.RandomResizedCrop.get_params
    assert set(boxes) == {get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(6000)}


def test_draw_jitter_is_torchvision_s_colorjitter():
    rng, n = random.Random(0), 2000
    ours = [data.draw_jitter(rng, 0.4, 0.8, 1.2, 0.1) for _ in range(n)]
    torch.manual_seed(0)
    jitter = torchvision.transforms.ColorJitter(0.4, 0.8, 1.2, 0.1)
    theirs = [
        jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(n)
    ]
    for i, name in enumerate(("brightness", "contrast", "saturation", "hue"), start=1):
        assert ks([o[name] for o in ours], [t[i] for t in theirs]) < 2.2 * (2 / n) ** 0.5
    counts = [sum(tuple(o["order"]) == order for o in ours) for order in ORDERS]
    assert min(counts) > n / 24 * 0.5 and max(counts) < n / 24 * 1.5
