"""Where samples come from: finds out how a dataset is stored, and indexes it. data.py does the rest.

Only the index is held in memory; pictures and captions are read when a sample is asked for.
Layouts, told apart by looking at the files (docs/data.md: how to make each):

    shapes flocks                     drawn here, need no files
    *.tar                             WebDataset shards of img2dataset: 0.jpg, 0.txt, 0.json, 0.cls
    *.csv *.tsv *.jsonl               image path, caption(s), label
    *.npz                             JPEG files end to end: arrays jpeg, offsets, labels
    dataset_*.json + pictures         Karpathy's splits of coco, flickr30k and flickr8k
    captions.txt + Images/            flickr8k as Kaggle has it
    annotations/captions_*2017.json   coco as published
    *.pkl + images/AA/BBB.zip         yfcc15m as SLIP's code keeps it
    raw/val.de + image_splits/        multi30k, a caption in each of four languages
    class/picture.jpg, picture.jpg    ImageFolder, or just pictures
    cifar10 cifar100 stl10 food101    the files that torchvision downloads
"""

import contextlib
import csv
import difflib
import functools
import io
import json
import os
import pickle
import re
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from array import array
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError, rank

TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10", "food101": "Food101"}
DRAWN = ["shapes", "flocks"]  # by scenes.py
SHIFTED = "imagenet-v2 imagenet-r imagenet-a imagenet-sketch objectnet".split()  # of ImageNet's classes
MULTI30K = [f"multi30k-{language}" for language in ("en", "de", "fr", "cs")]
NAMES = [*DRAWN, *TORCHVISION, *"imagenet flickr8k flickr30k coco cc3m cc12m yfcc15m redcaps".split(),
         *SHIFTED, *MULTI30K]  # fmt: skip
SPLITS = {"train": ["train"], "val": ["val", "validation", "test"], "test": ["test", "val", "validation"]}
TABLES = (".npz", ".csv", ".tsv", ".jsonl")
IMAGE_KEYS = ("image", "filepath", "image_path", "path", "file_name", "filename", "file")  # of a row
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError,
              csv.Error, struct.error, zlib.error, pickle.UnpicklingError, tarfile.TarError,
              zipfile.BadZipFile)  # fmt: skip


class Sample(NamedTuple):
    image: object  # bytes of an image file, uint8 array (H, W, 3) or PIL image
    captions: list  # of str, may be empty
    label: int  # -1: none
    key: str  # names the sample in messages


def open_dataset(name, data_dir=None, split="train"):
    """name: one of NAMES, looked for in data_dir (else $DATA_DIR, else ./data), or a path.
    -> dataset with len, [i] -> Sample (ValueError or OSError if it cannot be read), .name, .classes
    (list of str or None) and .captioned. What is left out is counted on stderr. Raises UserError."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split}, choose one of {', '.join(SPLITS)}")
    base = Path(data_dir or os.environ.get("DATA_DIR") or "data").expanduser()
    root = Path(name).expanduser()
    if name in NAMES:
        folder = name.split("-")[0] if name in MULTI30K else name
        root = base if base.name == folder else base / folder
    if not name or not (root.exists() or name in (*DRAWN, *TORCHVISION)):
        near = [] if name in NAMES else difflib.get_close_matches(name, NAMES, 1)
        hint = f"did you mean {near[0]}?" if near else "see docs/data.md for how to get it there"
        raise UserError(f"there is no data at {root.absolute() if name else repr(name)}, {hint}")
    _handle.cache_clear()  # files may have been replaced since they were opened
    try:
        if name in DRAWN:
            import scenes  # only here: most runs read files
            dataset = scenes.SETS[name](split, Sample)
        elif name in MULTI30K:
            import layouts
            dataset = Rows(root, layouts.multi30k_rows(root, split, name[-2:]))
        else:
            dataset = _open(root, split)
    except UNREADABLE as error:
        raise UserError(f"{root} cannot be read: {error}") from error
    left_out = +getattr(dataset, "left_out", Counter())
    kinds = ", ".join(f"{count} {why}" for why, count in left_out.most_common(8))
    left_out = f"{left_out.total()} files left out ({kinds})" if kinds else ""
    if not len(dataset):
        missing = f"{root} holds no pictures for {split}" + (f" ({left_out})" if kinds else "")
        raise UserError(f"{missing}, see docs/data.md for what is expected there")
    dataset.name = name if name in NAMES else root.resolve().name
    if left_out and rank() == 0:
        text = f"{dataset.name} {split}: {len(dataset):,} samples; {left_out}"
        print(text, file=sys.stderr, flush=True)
    return dataset


def _open(root, split):
    """Tells which layout a folder (or a single file) has, and which of its files are the split."""
    import layouts  # only here: runs on drawn data need none of them
    if not root.is_dir() and root.exists():
        if not root.is_file() or layouts.ending_of(root.name) not in (".tar", *TABLES):
            kinds = f"{' '.join(TABLES)} .tar"
            raise UserError(f"{root} is no folder and none of the files that are read ({kinds}): give one")
        if split == "train":
            return _open_files(root.parent, [root.name], root.parent)
    names, parts = _names(root) if root.is_dir() else [], {}
    mark = re.compile(r"(train|validation|val|test)(?![a-z])(.*\.(tar|npz|csv|tsv|jsonl))?", re.I)
    for name in names:  # train/, train.csv, val-0001.tar ...
        if match := mark.fullmatch(name):
            parts.setdefault(match[1].lower(), []).append(name)
    if root.name in TORCHVISION and not parts:
        return layouts.Torchvision(root, TORCHVISION[root.name], split, Sample)
    if karpathy := [n for n in names if re.fullmatch(r"dataset_\w+\.json", n)]:
        return Rows(root, layouts.index_rows(root / karpathy[0], layouts.karpathy_rows, split))
    if any(root.glob("annotations/captions_*2017.json")):
        part = "train2017" if split == "train" else "val2017"
        table = root / f"annotations/captions_{part}.json"
        return Rows(root / part, layouts.index_rows(table, layouts.coco_rows))
    if (pickles := [n for n in names if n.endswith((".pkl", ".pickle"))]) and split == "train":
        return Rows(root / "images", layouts.index_rows(root / pickles[0], layouts.slip_rows))
    if not parts and (split == "train" or root.name in SHIFTED):
        if {"captions.txt", "Images"} <= set(names):
            return Rows(root / "Images", layouts.index_rows(root / "captions.txt", _table_rows))
        return _open_files(root, names, root)
    part = next((parts[word] for word in SPLITS[split] if word in parts), None)
    if part is None:
        raise UserError(f"{root} has no {split} split, no folder {split}/, {split}*.tar, {split}.csv ...")
    if files := [n for n in part if "." in n]:
        return _open_files(root, files, root)
    return _open_files(root / part[0], _names(root / part[0]), root)


def _names(folder):
    return sorted(n for n in os.listdir(folder) if n[0] != "." and not n.endswith((".idx", ".idx.npz")))


def _open_files(folder, names, root):
    import layouts
    lists = [path / name for path in (folder, root) for name in layouts.CLASS_LISTS]
    lists = [path for path in lists if path.exists()]
    named = layouts.class_names(lists[0]) if lists else None  # a list or {WordNet id: name}
    classes = [named[i] for i in sorted(named)] if isinstance(named, dict) else named
    files = [n for n in names if layouts.ending_of(n) in (".tar", *TABLES) and (folder / n).is_file()]
    if tars := [folder / n for n in files if layouts.ending_of(n) == ".tar"]:
        others = {*TABLES, *layouts.PICTURES, ".gz", ".tgz"}
        beside = Counter(layouts.ending_of(n)[1:] for n in names if layouts.ending_of(n) in others)
        return layouts.Tars(tars, classes, beside, _read, _tar_sample)
    if len(files) > 1:
        raise UserError(f"give the path of one table of {folder}: {', '.join(files)}")
    for table in (folder / name for name in files):
        if layouts.ending_of(table.name) == ".npz":
            return layouts.Npz(table, classes, Sample)
        if layouts.ending_of(table.name) != ".jsonl":
            return Rows(folder, layouts.index_rows(table, _table_rows), classes)
        with open(table, "rb") as file:
            is_array = file.read(100).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"[")
        return Rows(folder, layouts.index_rows(table, layouts.array_rows) if is_array else table, classes)
    left_out = Counter()
    paths = sorted(layouts.pictures(folder, left_out), key=lambda path: path.split(os.sep))
    tops = layouts.class_folders({path.split(os.sep)[0] for path in paths})
    labelled = len(tops) > 1 and all(os.sep in path for path in paths)  # one folder per class
    if labelled and tops != sorted(tops) and rank() == 0:
        text = "class folders are numbers, and labels follow their values: 2 comes before 10"
        print(f"{folder}: {text}", file=sys.stderr, flush=True)
    if isinstance(named, dict):
        classes = [named.get(top, top) for top in tops]
    if labelled and len(classes or tops) != len(tops):
        count = f"{lists[0]} names {len(classes)} classes"
        raise UserError(f"{count}, but {folder} has {len(tops)} folders")
    tops = {top: i for i, top in enumerate(tops)}
    labels = (tops[path.split(os.sep)[0]] if labelled else -1 for path in paths)
    rows = ({"image": path, "label": label} for path, label in zip(paths, labels))
    dataset = Rows(folder, rows, (classes or list(tops)) if labelled else None)
    dataset.folders = list(tops)  # WordNet ids, where `classes` has their names
    dataset.left_out = left_out
    return dataset


class Rows:
    """Rows {"image": path below root, "captions": [...], "label": int}: the path of a file of JSON
    lines, of which only the line starts are held in memory, or an iterable of dicts."""

    captioned = False

    def __init__(self, root, rows, classes=None):
        self.root, self.rows, self.classes, position = root, rows, classes, 0
        if not isinstance(rows, Path):
            self.rows = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        starts = array("q")
        with open(rows, "rb") if isinstance(rows, Path) else io.BytesIO(self.rows) as lines:
            for line in lines:
                stamp = position == 0 and line[:1] == b"["  # of an index
                if not (stamp or line.isspace()):
                    starts.append(position)
                position += len(line)
        self.starts = np.array([*starts, position])
        for i in range(min(100, len(self))):
            with contextlib.suppress(ValueError):
                self.captioned = self.captioned or bool(_captions(self.row(i)))

    def __len__(self):
        return len(self.starts) - 1

    def row(self, i):
        start, end = int(self.starts[i]), int(self.starts[i + 1])
        if isinstance(self.rows, bytes):
            text = self.rows[start:end]
        else:
            text = _read(self.rows, start, end - start)
        return _object(text.partition(b"\n")[0])

    def __getitem__(self, i):
        row = self.row(i)
        name = next((str(row[key]) for key in IMAGE_KEYS if row.get(key)), None)
        if name is None:
            raise ValueError(f"row {i} names no picture ({' or '.join(IMAGE_KEYS)})")
        path = os.path.join(self.root, name)
        archive, zipped, member = path.partition(".zip/")
        if zipped:
            import layouts
            image = layouts.read_zip(archive + ".zip", member, _read)
        else:
            image = _read_file(path)
        return Sample(image, _captions(row), _label(row.get("label"), self.classes), path)


def _label(value, classes):
    """A label as a number: of 3, "3", "3.0" or the name of a class; -1 for what is none of these."""
    text = "" if value is None else str(value).strip()
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        return classes.index(text) if text in (classes or []) else -1


def _object(text):
    row = json.loads(text)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def _captions(row):
    """Captions in a row of a table or in the .json of a tar's sample."""
    found = row.get("captions") or row.get("caption") or row.get("text")
    found = found or [row.get("title"), row.get("description")]
    return [c for c in (found if isinstance(found, list) else [found]) if isinstance(c, str)]


def _table_rows(path):
    """.csv and .tsv with a header. Rows of one picture that follow each other become one sample."""
    import layouts
    for image, rows in layouts.table_rows(path, IMAGE_KEYS):
        captions = [caption for row in rows for caption in _captions(row)]
        yield {"image": image, "captions": captions, "label": rows[0].get("label")}


def _tar_sample(picture, text, meta, label, classes, key):
    """The members of a tar that belong to one sample, as bytes, b"" for one that is missing."""
    captions = _captions(_object(meta)) if meta else []
    if text and not captions:
        captions = [text.decode("utf-8-sig", "replace").strip()]
    return Sample(picture, captions, _label(label.decode(errors="replace"), classes), key)


@functools.lru_cache(maxsize=64)
def _handle(path, process):  # a forked worker opens its own: a shared one has one position
    return open(path, "rb", buffering=0)


def _read(path, start, size):
    file = _handle(path, os.getpid())
    file.seek(start)
    data = file.read(size)
    if len(data) < size:
        raise ValueError(f"{path} is shorter than it was when it was indexed")
    return data


def _read_file(path):
    """The bytes of a file. Reading a pipe or a device would never end."""
    name = path if path.isascii() else path.encode("utf-8", "surrogateescape")  # in any locale
    handle = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is no file but a pipe or a device")
        return file.read()
