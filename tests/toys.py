"""A small dataset and network for tests of evaluation and fine-tuning, which need no other project: those on a GPU too."""

from pathlib import Path

import numpy as np
import torch

import slip
from monitor import EvalView
from sources import Sample

VIEW = EvalView(16)
QUICK = dict(train_batch=16, epochs=4, workers=0, dtype="fp32")
TRANSFORMER = dict(optimizer="adamw", base_lr=0.016, weight_decay=0.05, layer_decay=0.9, warmup_epochs=1.0, drop_path=0.1,
                   mixup=0.2, cutmix=0.2, label_smoothing=0.1, randaugment=2, erase=0.1)  # fmt: skip


class Toy(torch.utils.data.Dataset):
    """Noise whose brightest channel is the class; every fifth image is broken on request."""

    name, classes, captioned = "toy", ["red", "green", "blue"], True

    def __init__(self, n, first=0, broken=False):
        self.n, self.first, self.broken = n, first, broken

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        pixels = np.random.default_rng(self.first + i).integers(0, 120, (12, 14, 3)).astype(np.uint8)
        pixels[..., i % 3] += 100
        image = b"not an image" if self.broken and i % 5 == 3 else pixels
        return Sample(image, [f"{Toy.classes[i % 3]} {i}", " ", *["again"] * (i % 2)], i % 3, str(i))


def vit():
    torch.manual_seed(0)
    return slip.VisionTransformer(16, 8, 64, 3, 2)


def positions(mask):
    """Where a mask is set, among all its elements, for ibot.py and dinov2.py."""
    return torch.nonzero(mask.flatten())[:, 0]


def full_disk(state, file):
    """torch.save where there is no space for all of a file."""
    Path(file).write_bytes(b"PK")
    raise RuntimeError("no space is left")
