"""Data sets that are drawn here and need no files. Every sample is a function of its index.

sources.py opens them when a drawn set is asked for, and gives the class of its samples.
"""

import functools
import math
import random

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (214, 40, 40), "orange": (247, 140, 30), "yellow": (250, 220, 60),
           "green": (50, 160, 70), "cyan": (70, 205, 215), "blue": (40, 80, 210),
           "purple": (125, 60, 175), "pink": (245, 135, 185), "brown": (120, 75, 40),
           "white": (245, 245, 245)}  # fmt: skip
SHAPES = "circle square triangle star heart cross ring diamond hexagon crescent".split()


@functools.cache
def _outlines():
    """Corners of SHAPES, each about as large as the unit circle. They are complex numbers: the real
    part goes to the right, the imaginary part down."""
    t = np.linspace(0, 2 * math.pi, 48)
    polygon = lambda n: -1j * np.exp(2j * math.pi * np.arange(n) / n)  # noqa: E731
    arc = lambda a: np.exp(1j * math.pi * np.linspace(a, 2 - a, 36))  # noqa: E731
    disc, arm = polygon(48), np.array([1.1 - 0.36j, 1.1 + 0.36j, 0.36 + 0.36j])
    down = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return {
        "circle": disc,
        "square": 1.15 * np.exp(0.25j * math.pi) * polygon(4),
        "triangle": 1.25 * polygon(3) + 0.2j,
        "star": polygon(10) * np.where(np.arange(10) % 2, 0.5, 1.2),
        "heart": (16 * np.sin(t) ** 3 - 1j * down) / 15,
        "cross": np.concatenate([arm, 1j * arm, -arm, -1j * arm]),
        "ring": np.concatenate([disc, disc[:1], 0.58 * disc[:1], 0.58 * disc[::-1]]),
        "diamond": np.array([-1.3j, 0.75, 1.3j, -0.75]),
        "hexagon": polygon(6),
        "crescent": 1.15 * np.concatenate([arc(0.25), 0.86 * arc(0.32)[::-1] + 0.22]),
    }


class Shapes:
    """Captioned scenes, 64 x 64, functions of the index: an object, up to two small ones and a
    background."""

    classes, captioned = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES], True

    def __init__(self, split, Sample):
        self.Sample = Sample  # (image, captions, label, key), see sources.py
        self.indices = range(20000) if split == "train" else range(20000, 22000)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        index = self.indices[i]
        rng = random.Random(f"shapes {index}")
        colour, shape = self.classes[index % 100].split()
        ground = rng.choice([c for c in COLOURS if c not in (colour, "white")])
        texture = rng.choice(["plain", "plain", "striped", "spotted", "shaded"])
        radius = rng.uniform(17, 27)  # pixels
        x, y = rng.uniform(radius + 1, 63 - radius), rng.uniform(radius + 1, 63 - radius)
        objects = [(colour, shape, radius, x, y)]
        for _ in range(rng.choice([0, 1, 1, 2, 2])):  # small ones, if one of eight places is free
            small = rng.uniform(0.28, 0.42) * radius
            free = []
            for _ in range(8):
                place = rng.uniform(small, 64 - small), rng.uniform(small, 64 - small)
                if all(math.dist(place, o[3:]) > 1.1 * o[2] + small for o in objects):
                    free.append(place)
            other_colour = rng.choice([c for c in COLOURS if c != ground])
            other_shape = rng.choice([s for s in SHAPES if s != shape])
            objects += [(other_colour, other_shape, small, *place) for place in free[:1]]
        image = self.background(rng, ground, texture)
        for name, kind, size, *place in objects:
            fill = tuple(min(255, v + rng.randint(-16, 16)) for v in COLOURS[name])
            turn = np.exp(1j * rng.uniform(-0.3, 0.3))
            corners = 4 * (_outlines()[kind] * size * turn + complex(*place))
            ImageDraw.Draw(image).polygon(corners.view(float).tolist(), fill=fill)
        captions = self.describe(rng, objects, ground, texture)
        return self.Sample(np.array(image.reduce(4)), captions, index % 100, f"shapes {index}")

    @staticmethod
    def background(rng, ground, texture):
        """Four times as large as the sample, so that what is drawn on it gets smooth edges."""
        down, right = np.mgrid[0:64, 0:64]
        angle, pitch = rng.uniform(0, math.pi), rng.uniform(0.5, 0.9)
        u = pitch * (right * math.cos(angle) + down * math.sin(angle))
        v = pitch * (down * math.cos(angle) - right * math.sin(angle))
        dark = {
            "plain": np.zeros_like(u),
            "striped": 0.5 + 2 * np.sin(u),
            "spotted": 4 * np.sin(u) * np.sin(v) - 1,
            "shaded": (u - u.min()) / np.ptp(u),
        }[texture]
        pixels = np.multiply.outer(0.35 - 0.12 * dark.clip(0, 1), COLOURS[ground]).astype(np.uint8)
        return Image.fromarray(pixels).resize((256, 256), Image.Resampling.NEAREST)

    @staticmethod
    def describe(rng, objects, ground, texture):
        """Three captions; all of them name colour and shape of the main object."""
        a = lambda words: ("an " if words[0] in "aeiou" else "a ") + words  # noqa: E731
        (colour, shape, radius, x, _), *others = objects
        size = "small " if radius < 19.5 else "large " if radius > 24.5 else ""
        where = "on the left" if x < 28 else "on the right" if x > 36 else "in the middle"
        ground = f"{texture} dark {ground} background"
        scene = "on " + a(ground.removeprefix("plain "))
        beside = "with " + " and ".join(a(f"{c} {s}") for c, s, *_ in others) if others else scene
        what = f"{size}{colour} {shape}"
        wordings = {
            a(what), f"{a(what)} {scene}", f"{what}, {ground}", f"{a(what)} {where}",
            f"{a(what)} {beside}", f"{what} {where}, {beside}", f"there is {a(what)} {where}",
            f"a picture of {a(f'{colour} {shape}')}", f"{a(size + shape)} in {colour}"}  # fmt: skip
        return rng.sample(sorted(wordings), 3)


class Flocks:
    """Scenes of four objects of one form, 64 x 64, functions of the index; the class is the form.

    Every crop shows the class. What else tells pictures apart is kept small, because a network
    would learn that instead, from what two crops of a picture share: the ground is the same grey
    everywhere, and the same four colours stand in the same four quarters. Size, turn and place are
    each object's own. All forms cover about the same area, or counting pixels would tell them."""

    classes, captioned = SHAPES, False
    colours = {"red": 16 + 16j, "blue": 48 + 16j, "yellow": 16 + 48j, "white": 48 + 48j}  # centers

    def __init__(self, split, Sample):
        self.Sample = Sample  # (image, captions, label, key), see sources.py
        self.indices = range(20000) if split == "train" else range(20000, 22000)

    def __len__(self):
        return len(self.indices)

    @staticmethod
    @functools.cache
    def outline(shape):
        """Corners of a form of area 2.2 in the units of _outlines(), or less: a crescent gets no
        larger."""
        corners = _outlines()[shape]
        left = np.roll(corners, 1)
        area = abs((left.conj() * corners).imag.sum()) / 2  # shoelace formula
        return corners * min(1.3, (2.2 / area) ** 0.5)

    def __getitem__(self, i):
        index = self.indices[i]
        rng = random.Random(f"flocks {index}")
        shape = self.classes[index % 10]
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 8, (64, 64, 1))
        grey = (128 + noise).clip(0, 255).astype(np.uint8).repeat(3, 2)
        # drawn twice as large as the sample, so that the objects get smooth edges
        image = Image.fromarray(grey).resize((128, 128), Image.Resampling.NEAREST)
        for name, quarter in self.colours.items():
            radius = rng.uniform(10, 13)  # pixels
            place = quarter + complex(rng.uniform(-3, 3), rng.uniform(-3, 3))
            turn = np.exp(1j * rng.uniform(-0.8, 0.8))
            corners = 2 * (self.outline(shape) * radius * turn + place)
            ImageDraw.Draw(image).polygon(corners.view(float).tolist(), fill=COLOURS[name])
        return self.Sample(np.array(image.reduce(2)), [], index % 10, f"flocks {index}")


SETS = {"shapes": Shapes, "flocks": Flocks}
