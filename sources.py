"""Where samples come from: finds a dataset by its name or path. scenes.py draws its samples, or
layouts.py finds out how its files are stored and reads them; data.py does the rest."""

import difflib
import os
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common import UserError, rank

TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10", "food101": "Food101",
               "stl10-unlabeled": "STL10 train+unlabeled"}  # fmt: skip
DRAWN = ["shapes", "flocks"]  # by scenes.py
FOLDERS = "imagenet flickr8k flickr30k coco cc3m cc12m yfcc15m redcaps".split()
SHIFTED = "imagenet-v2 imagenet-r imagenet-a imagenet-sketch objectnet".split()  # ImageNet classes
MULTI30K = [f"multi30k-{language}" for language in ("en", "de", "fr", "cs")]
NAMES = [*DRAWN, *TORCHVISION, *FOLDERS, *SHIFTED, *MULTI30K]
VAL, TEST = ["val", "validation", "valid"], ["test", "testing"]
SPLITS = {"train": ["train", "training"], "val": VAL + TEST, "test": TEST + VAL}


class Sample(NamedTuple):
    image: object  # bytes of an image file, uint8 array (H, W, 3) or PIL image
    captions: list  # of str, may be empty
    label: int  # -1: none
    key: str  # names the sample in messages


def open_dataset(name, data_dir=None, split="train"):
    """name: one of NAMES, looked for in data_dir (else $DATA_DIR, else ./data), or a path.
    -> dataset with len, [i] -> Sample (ValueError or OSError if it cannot be read), .name, .classes
    (list of str or None), .captioned. What is left out is counted on stderr. Raises UserError."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split}, choose one of {', '.join(SPLITS)}")
    base = Path(data_dir or os.environ.get("DATA_DIR") or "data").expanduser()
    root = Path(name).expanduser()
    if name in NAMES:
        folder = name.split("-")[0] if name in (*MULTI30K, "stl10-unlabeled") else name
        root = base if base.name == folder else base / folder
    root = root if root.name.strip(".") else root.resolve()  # . and .. are no names
    if not name or not (root.exists() or name in (*DRAWN, *TORCHVISION)):
        near = [] if name in NAMES else difflib.get_close_matches(name, NAMES, 1)
        hint = f"did you mean {near[0]}?" if near else "see docs/data.md for how to get it there"
        raise UserError(f"there is no data at {root.absolute() if name else repr(name)}, {hint}")
    if name in DRAWN:  # imports stand where they are needed: few runs need both of these files
        import scenes
        dataset = scenes.SETS[name](split, Sample)
    else:
        import layouts
        kind = TORCHVISION.get(name, TORCHVISION.get(root.name))
        whole = split == "train" or root.name in SHIFTED  # may be a folder without splits
        with layouts.refuse_unreadable(root):
            if name in MULTI30K:
                rows = layouts.multi30k_rows(root, split, name[-2:])
                dataset = layouts.Rows(root, rows, None, Sample)
            else:
                dataset = layouts.open_root(root, split, SPLITS[split], kind, whole, Sample)
    left_out = +getattr(dataset, "left_out", Counter())
    kinds = ", ".join(f"{count} {why}" for why, count in left_out.most_common(8))
    left_out = f"{left_out.total()} left out ({kinds})" if kinds else ""
    if not len(dataset):
        missing = f"{root} holds no pictures for {split}" + (f" ({left_out})" if kinds else "")
        raise UserError(f"{missing}, see docs/data.md for what is expected there")
    dataset.name = name if name in NAMES else root.resolve().name
    if left_out and rank() == 0:
        print(f"{dataset.name} {split}: {len(dataset):,} samples; {left_out}", file=sys.stderr)
    return dataset
