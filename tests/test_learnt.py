"""benchmarks/learnt.py: what it reads from a drawing is what was drawn, and features that know something get full marks for it."""

import random
import sys

import numpy as np
import pytest
import torch

from data import open_dataset
from runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import learnt  # noqa: E402


def test_sizes_and_places_are_those_of_the_drawing():
    dataset, sizes = open_dataset("flocks"), []
    for index in range(0, 400, 10):  # circles: their center is the place, their area 2.2 radius^2 or less
        rng = random.Random(f"flocks {index}")
        rng.getrandbits(32)
        found = np.array(learnt.sizes_and_places(np.array(dataset[index].image))).reshape(4, 3)
        for (pixels, x, y), quarter in zip(found, learnt.Flocks.colours.values(), strict=True):
            radius = rng.uniform(10, 13)
            place = quarter + complex(rng.uniform(-3, 3), rng.uniform(-3, 3))
            rng.uniform(-0.8, 0.8)
            assert abs(complex(x, y) - place) < 1.2
            sizes.append((radius**2, pixels))
    assert np.corrcoef(np.array(sizes).T)[0, 1] > 0.97


def test_what_features_know_is_told(monkeypatch):
    monkeypatch.setattr(learnt, "FITTED", 300)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (400,), generator=generator)
    drawn = torch.randn(400, 12, generator=generator)
    noise = torch.randn(400, 4, generator=generator)
    form, size, place = learnt.learnt(torch.cat([torch.eye(10)[labels], noise], 1), labels, drawn)
    assert form == 100 and abs(size) < 0.2 and abs(place) < 0.2
    form, size, place = learnt.learnt(drawn.view(400, 4, 3)[:, :, 0].clone(), labels, drawn)
    assert form < 25 and size == pytest.approx(1, abs=0.01) and abs(place) < 0.2
    form, size, place = learnt.learnt(drawn.view(400, 4, 3)[:, :, 1:].flatten(1), labels, drawn)
    assert form < 25 and abs(size) < 0.2 and place == pytest.approx(1, abs=0.01)
