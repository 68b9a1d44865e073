"""sources.py and the first half of data.py: layouts, indices, hostile files, the evaluation view, the loader."""

import csv
import errno
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms

import data
import layouts
import scenes
import sources
from common import UserError
from data import Loader, Tokenizer, decode, open_dataset
from monitor import EvalView, what_classes_lack
from run import directory_of

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """Indices that cannot be written beside the data go to this home."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("DATA_DIR", raising=False)
    return folder


def encoded(image, form="JPEG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def picture(i, width=40, height=30):
    """Picture i: noise, no two alike."""
    return Image.fromarray(np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8))


N = 6
JPEG = [encoded(picture(i)) for i in range(N)]
CAPTIONS = [[f"picture {i}", f'the {i}th, with "quotes", a\ttab and é'] for i in range(N)]


# ------------------------------------------------ layouts ------------------------------------------------
def write_tar(path, samples):
    """samples: {name of the sample: {ending: bytes}}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, members in samples.items():
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def tars(root):
    """Two shards; as img2dataset writes them, with things to be ignored."""
    for shard in (0, 1):
        samples = {"__key__": {"notes": b"nothing"}}
        for i in range(3 * shard, 3 * shard + 3):
            members = {"jpg": JPEG[i], "json": json.dumps({"captions": CAPTIONS[i], "url": "x"}).encode()}
            samples[f"./part/{i:05d}"] = members | {
                "txt": b"another text",
                "cls": b"%d\n" % i,
                "seg.png": b"?",
            }
        write_tar(root / f"{shard:05d}.tar", samples)
    (root / "00000_stats.json").write_text("{}")
    (root / "00000.parquet").write_text("")
    return [f"{i // 3:05d}.tar:./part/{i:05d}.jpg" for i in range(N)], range(N)


def pictures_in(folder, names=None):
    for i in range(N):
        path = folder / (names[i] if names else f"{i}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(JPEG[i])


def table(root, ending, delimiter):
    pictures_in(root / "pictures")
    with open(root / f"pairs.{ending}", "w", newline="", encoding="utf-8-sig") as file:  # as Excel does
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["label", "filepath", "title"])
        for i in range(N):
            writer.writerows([i, f"pictures/{i}.jpg", caption] for caption in CAPTIONS[i])
    return [str(root / f"pictures/{i}.jpg") for i in range(N)], range(N)


def jsonl(root):
    pictures_in(root / "pictures")
    rows = [
        json.dumps({"filename": f"pictures/{i}.jpg", "caption": CAPTIONS[i], "label": i}) for i in range(N)
    ]
    (root / "pairs.jsonl").write_text("\n" + "\n\n".join(rows))
    return [str(root / f"pictures/{i}.jpg") for i in range(N)], range(N)


def jsonl_of_zip(root):
    root.mkdir(parents=True)
    with zipfile.ZipFile(root / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = b"a comment"
        for i in range(N):
            archive.writestr(f"sub/{i}.jpg", JPEG[i])
    rows = [json.dumps({"image": f"all.zip/sub/{i}.jpg", "text": CAPTIONS[i]}) for i in range(N)]
    (root / "train.jsonl").write_text("\n".join(rows))
    return [str(root / f"all.zip/sub/{i}.jpg") for i in range(N)], [-1] * N


def npz(root, **changes):
    root.mkdir(parents=True, exist_ok=True)
    arrays = {
        "jpeg": np.frombuffer(b"".join(JPEG), np.uint8),
        "offsets": np.cumsum([0] + [len(j) for j in JPEG]),
    }
    np.savez(root / "train.npz", **(arrays | {"labels": np.arange(N, dtype=np.uint8)} | changes))
    (root / "classnames.txt").write_text("".join(f"class {i}\n" for i in range(N)))
    return [f"train.npz[{i}]" for i in range(N)], range(N)


def image_folder(root):
    pictures_in(root, [f"c{i // 2}/{i}.JPEG" for i in range(N)])
    (root / "c0" / "notes.txt").write_text("")
    return [str(root / f"c{i // 2}/{i}.JPEG") for i in range(N)], [0, 0, 1, 1, 2, 2]


def just_pictures(root):
    pictures_in(root, [f"{i}.jpg" if i < 3 else f"more/{i}.jpg" for i in range(N)])
    (root / ".hidden.jpg").write_bytes(b"")
    return [str(root / (f"{i}.jpg" if i < 3 else f"more/{i}.jpg")) for i in range(N)], [-1] * N


def karpathy(root):
    pictures_in(root / "Images")
    images = [{"filename": "gone.jpg", "split": "val", "sentences": [{"raw": "?"}]}]
    for i in range(N):
        sentences = [{"raw": caption, "tokens": []} for caption in CAPTIONS[i]]
        images.append(
            {"filename": f"{i}.jpg", "split": "restval" if i % 2 else "train", "sentences": sentences}
        )
    (root / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    return [str(root / f"Images/{i}.jpg") for i in range(N)], [-1] * N


def coco(root):
    pictures_in(root / "train2017")
    (root / "annotations").mkdir()
    images = [{"id": 100 + i, "file_name": f"{i}.jpg"} for i in range(N)]
    captions = [
        {"image_id": 100 + i, "caption": c}
        for turn in (0, 1)
        for i, cs in enumerate(CAPTIONS)
        for c in cs[turn::2]
    ]
    tables = {"images": images, "annotations": captions}
    (root / "annotations/captions_train2017.json").write_text(json.dumps(tables))
    return [str(root / f"train2017/{i}.jpg") for i in range(N)], [-1] * N


def slip(root):
    """Pickle and zips. The indices are numpy numbers, which are more than plain pickle opcodes."""
    rows = []
    for i in range(N):
        index = 12345000 + 1000 * (i // 3) + i
        rows.append((np.int64(index), *CAPTIONS[i]))
        path = root / f"images/12/{345 + i // 3}.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{index % 1000:03d}.jpg", JPEG[i])
    (root / "yfcc15m.pkl").write_bytes(pickle.dumps(rows))
    return [str(root / f"images/12/{345 + i // 3}.zip/{i:03d}.jpg") for i in range(N)], [-1] * N


LAYOUTS = {
    "tars": tars,
    "csv": lambda root: table(root, "csv", ","),
    "tsv": lambda root: table(root, "tsv", "\t"),
    "jsonl": jsonl,
    "jsonl_of_zip": jsonl_of_zip,
    "npz": npz,
    "image_folder": image_folder,
    "just_pictures": just_pictures,
    "karpathy": karpathy,
    "coco": coco,
    "slip": slip,
}
WITHOUT_CAPTIONS = ("npz", "image_folder", "just_pictures")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, tmp_path):
    keys, labels = LAYOUTS[layout](tmp_path / "set")
    for _ in range(2):  # the second time from the index
        dataset = open_dataset(str(tmp_path / "set"))
        samples = [dataset[i] for i in range(len(dataset))]
        assert [s.image for s in samples] == JPEG
        assert [s.captions for s in samples] == ([[]] * N if layout in WITHOUT_CAPTIONS else CAPTIONS)
        assert [s.label for s in samples] == list(labels) and [s.key for s in samples] == keys
        assert dataset.captioned == (layout not in WITHOUT_CAPTIONS) and dataset.name == "set"
        with pytest.raises(IndexError):
            dataset[N]
    classes = {"npz": [f"class {i}" for i in range(N)], "image_folder": ["c0", "c1", "c2"]}
    assert dataset.classes == classes.get(layout)


def test_karpathy_splits(tmp_path):
    karpathy(tmp_path)
    assert len(open_dataset(str(tmp_path), split="val")) == 1
    with pytest.raises(OSError, match="gone.jpg"):
        open_dataset(str(tmp_path), split="val")[0]
    with pytest.raises(UserError, match="holds no pictures for test"):
        open_dataset(str(tmp_path), split="test")


def test_one_of_several_lists_of_karpathys(tmp_path):
    """As his caption_datasets.zip has them, all in one folder."""
    for name in ("coco", "flickr8k"):
        row = {"filename": "1.jpg", "split": "train", "sentences": [{"raw": f"of {name}"}]}
        for folder in ("flickr8k", "mine"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / "1.jpg").write_bytes(JPEG[1])
            (tmp_path / folder / f"dataset_{name}.json").write_text(json.dumps({"images": [row]}))
    assert open_dataset("flickr8k", tmp_path)[0].captions == ["of flickr8k"]
    with pytest.raises(UserError, match="mine has dataset_coco.json and dataset_flickr8k.json: keep one"):
        open_dataset(str(tmp_path / "mine"))


def test_karpathy_coco_has_its_pictures_one_level_deeper(tmp_path):
    pictures_in(tmp_path / "val2014")
    rows = [
        {"filename": f"{i}.jpg", "filepath": "val2014", "split": "test", "sentences": [{"raw": "x"}]}
        for i in range(N)
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": rows}))
    assert open_dataset(str(tmp_path), split="test")[3].image == JPEG[3]


def test_names_are_looked_for_in_data_dir(tmp_path, monkeypatch):
    jsonl(tmp_path / "cc3m")
    for data_dir in (tmp_path, tmp_path / "cc3m"):
        assert len(open_dataset("cc3m", data_dir)) == N
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    assert open_dataset("cc3m").name == "cc3m"
    monkeypatch.delenv("DATA_DIR")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "data").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    assert len(open_dataset("cc3m")) == N and len(open_dataset("../cc3m/pairs.jsonl")) == N


def test_splits(tmp_path, capsys):
    """Which of the parts of a dataset answers for train, val and test."""

    def size(root, split):
        try:
            return len(open_dataset(str(root), split=split))
        except UserError as error:
            assert f"has no {split} split" in str(error) and "\n" not in str(error)
            return None

    def sizes(root):
        return [size(root, split) for split in ("train", "val", "test")]

    def write(path, n):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join('{"image": "x.jpg"}\n' for _ in range(n)))

    write(tmp_path / "a/all.jsonl", 1)
    assert sizes(tmp_path / "a") == [1, None, None] and sizes(tmp_path / "a/all.jsonl") == [1, None, None]
    write(tmp_path / "a/train.jsonl", 2)
    assert sizes(tmp_path / "a") == [2, None, None]
    write(tmp_path / "a/test.jsonl", 3)
    capsys.readouterr()
    assert sizes(tmp_path / "a") == [2, 3, 3] and "a: no val split, its test is taken\n" in capsys.readouterr().err
    write(tmp_path / "a/validation.jsonl", 4)
    assert sizes(tmp_path / "a") == [2, 4, 3] and "is taken" not in capsys.readouterr().err
    write(tmp_path / "only/train.jsonl", 2)
    write(tmp_path / "only/valid.jsonl", 1)
    assert sizes(tmp_path / "only") == [2, 1, 1]
    assert [line for line in capsys.readouterr().err.splitlines() if "taken" in line] == [
        f"{tmp_path}/only: no test split, its valid is taken"]
    write(tmp_path / "a/values.jsonl", 6)  # no word for a split
    assert sizes(tmp_path / "a") == [2, 4, 3]
    pictures_in(tmp_path / "b/val", [f"cat/{i}.jpg" if i < 2 else f"dog/{i}.jpg" for i in range(N)])
    assert sizes(tmp_path / "b") == [None, N, N]
    pictures_in(tmp_path / "b/train")
    assert sizes(tmp_path / "b") == [N, N, N]
    assert open_dataset(str(tmp_path / "b"), split="val").classes == ["cat", "dog"]
    pictures_in(tmp_path / "d/Training", [f"cat/{i}.jpg" if i < 2 else f"dog/{i}.jpg" for i in range(N)])
    assert sizes(tmp_path / "d") == [N, None, None]
    pictures_in(tmp_path / "d/testing", [f"cat/{i}.jpg" if i < 2 else f"dog/{i}.jpg" for i in range(N)])
    pictures_in(tmp_path / "e/valid")
    pictures_in(tmp_path / "e/train")
    assert sizes(tmp_path / "d") == sizes(tmp_path / "e") == [N, N, N]
    write(tmp_path / "b/train.jsonl", 1)  # names pictures in train/
    assert sizes(tmp_path / "b") == [1, N, N]
    for name, count in (("train-0000", 2), ("train-0001", 3), ("val_000", 1)):
        write_tar(tmp_path / f"c/{name}.tar", {str(i): {"jpg": JPEG[i]} for i in range(count)})
    assert sizes(tmp_path / "c") == [5, 1, 1]
    with pytest.raises(UserError, match="unknown split dev"):
        open_dataset("shapes", split="dev")


@pytest.mark.parametrize("first, second", [("train.csv", "training-2.tar"), ("val.jsonl", "validation.jsonl"), ("train", "training.csv")])
def test_two_words_for_one_split_are_refused(tmp_path, first, second):
    """One of them would be left out."""
    for name in (first, second, "test.csv"):
        (tmp_path / name).write_text("image\n") if "." in name else (tmp_path / name).mkdir()
    for split in ("train", "val"):
        with pytest.raises(UserError, match=f"has {first} and {second} for one split: use one word for it"):
            open_dataset(str(tmp_path), split=split)


def test_rows_of_a_table(tmp_path):
    rows = [
        {"path": "0.jpg", "title": "A", "description": ""},
        {"file": "1.jpg", "description": "B", "label": "2.0"},
        {"image": "2.jpg", "captions": ["C", None, 3], "caption": "no", "label": 0},
        {"image": str(tmp_path / "3.jpg"), "text": "D", "label": ""},
        {"image": "4.jpg", "caption": "", "label": None},
    ]
    pictures_in(tmp_path)
    (tmp_path / "t.jsonl").write_text(
        "\n".join(map(json.dumps, rows)) + "\n{broken\n5\n{}\n"
    )
    dataset = open_dataset(str(tmp_path / "t.jsonl"))
    assert [dataset[i].captions for i in range(5)] == [["A", ""], ["B"], ["C"], ["D"], []]
    assert [dataset[i].label for i in range(5)] == [-1, 2, 0, -1, -1]
    for i in range(5, 8):
        with pytest.raises(ValueError):
            dataset[i]


@pytest.mark.parametrize("form", ["lines", "array", "csv", "apart"])
def test_rows_of_one_picture_that_follow_each_other(form, tmp_path, capsys):
    """A table makes them one sample. JSON lines stay as they are, as rows may differ in more than a caption; a line says so."""
    pictures_in(tmp_path)
    rows = [{"image": f"{i}.jpg", "caption": f"{word} thing"} for i in range(3) for word in ("a red", "one", "some")]
    if form == "apart":
        rows = sorted(rows, key=lambda row: row["caption"])
    path = tmp_path / ("t.csv" if form == "csv" else "t.jsonl")
    text = "\n".join(map(json.dumps, rows)) if form != "array" else json.dumps(rows)
    path.write_text("image,caption\n" + "".join(f"{row['image']},{row['caption']}\n" for row in rows) if form == "csv" else text)
    for _ in range(2):  # also when an index is there already
        assert len(open_dataset(str(path))) == (3 if form == "csv" else 9)
        said = "t.jsonl: 6 of 9 rows have the picture of the row before: each stays a sample of its own; give one row"
        assert (said in capsys.readouterr().err) == (form in ("lines", "array"))


def test_all_rows_of_one_picture_are_counted(tmp_path, capsys):
    """Three of 2,000, of which a sample of a hundred may see none. Quotes in a caption are no names of pictures."""
    rows = [{"meta": {"id": 1}, "image": f'a "{i}".jpg', "caption": '"image": "a.jpg"'} for i in range(2000)]
    for i in (5, 6, 1501):
        rows[i]["image"] = rows[i - 1]["image"]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "t.jsonl").write_text("".join([*lines[:6], "\n", *lines[6:]]))
    assert len(open_dataset(str(tmp_path / "t.jsonl"))) == 2000
    assert "t.jsonl: 3 of 2,000 rows have the picture of the row before" in capsys.readouterr().err


def test_what_a_split_or_an_archive_hides_is_counted(tmp_path, capsys):
    """A class that is called train takes all for itself, and an archive beside class folders all of them."""
    pictures_in(tmp_path / "vehicles", [f"{kind}/{i}.jpg" for i, kind in enumerate(["bus", "car", "train"] * 2)])
    pictures_in(tmp_path / "flowers", [f"{'ab'[i % 2]}/{i}.jpg" for i in range(N)])
    shard(tmp_path / "flowers/part.tar", "ab")
    for name, said in (("vehicles", "2 folders beside train"), ("flowers", "2 folders beside the tars")):
        assert len(open_dataset(str(tmp_path / name))) == 2
        assert f"{name} train: 2 samples; 2 left out ({said})" in capsys.readouterr().err


def test_links_in_an_archive_are_counted(tmp_path, capsys):
    pictures_in(tmp_path / "p")
    os.link(tmp_path / "p/0.jpg", tmp_path / "p/6.jpg")
    os.symlink("1.jpg", tmp_path / "p/7.jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "p", "p")
    assert len(open_dataset(str(tmp_path / "a.tar"))) == N
    assert "2 left out (2 links: tar with -h --hard-dereference)" in capsys.readouterr().err


def test_captions_that_begin_late_or_stand_beside_empty_titles(tmp_path):
    rows = "".join(f"{i}.jpg,{'a dog' if i == 149 else ''}\n" for i in range(150))
    (tmp_path / "t.csv").write_text("image,caption\n" + rows)
    assert open_dataset(str(tmp_path / "t.csv")).captioned
    write_tar(tmp_path / "t.tar", {"0": {"jpg": JPEG[0], "json": b'{"title": ""}', "txt": b"a dog"}})
    assert open_dataset(str(tmp_path / "t.tar"))[0].captions == ["a dog"]


def test_files_of_others_change_no_layout(tmp_path):
    """Hugging Face's infos are no list of Karpathy's, and a pickle is SLIP's list only beside images/."""
    for name in ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "stats.pkl"):
        pictures_in(tmp_path / name / "train", [f"{'ab'[i % 2]}/{i}.jpg" for i in range(N)])
        (tmp_path / name / name).write_text("{}")
        assert open_dataset(str(tmp_path / name)).classes == ["a", "b"]
    pictures_in(tmp_path / "food101", [f"{'ab'[i % 2]}/{i}.jpg" for i in range(N)])
    assert open_dataset("food101", str(tmp_path)).classes == ["a", "b"]  # one's own, not torchvision's


@pytest.mark.parametrize("named", [False, True])
def test_labels_that_are_texts(tmp_path, named):
    """They are no mistake for methods that need no label; where classnames.txt has them they are numbers."""
    if named:
        (tmp_path / "classnames.txt").write_text("dog\ncat\n")
    labels = ["cat", "dog", "1.0", "0.7", "nan", "-3"]
    write_tar(tmp_path / "train-0.tar", {str(i): {"jpg": JPEG[i], "cls": labels[i].encode()} for i in range(N)})
    pictures_in(tmp_path)
    lines = [f"{i}.jpg,{label}" for i, label in enumerate(labels)]
    (tmp_path / "t.csv").write_text("\n".join(["file,label", *lines]) + "\n")
    expected = [1, 0, 1, -1, -1, -1] if named else [-1, -1, 1, -1, -1, -1]
    for path in (tmp_path, tmp_path / "t.csv"):
        assert [sample.label for sample in map(open_dataset(str(path)).__getitem__, range(N))] == expected


@pytest.mark.parametrize("label", ["1e30", "99999999999999999999"])
def test_a_label_that_no_tensor_holds_is_refused(tmp_path, label):
    """Of a table when it is opened, elsewhere when the sample is read."""
    pictures_in(tmp_path)
    (tmp_path / "t.csv").write_text(f"file,label\n0.jpg,0\n1.jpg,{label}\n")
    with pytest.raises(UserError, match=f"1.jpg has the label {re.escape(label)}, which is too large"):
        open_dataset(str(tmp_path / "t.csv"))
    (tmp_path / "t.jsonl").write_text('{"file": "0.jpg"}\n' + json.dumps({"file": "1.jpg", "label": label}) + "\n")
    write_tar(tmp_path / "t.tar", {"0": {"jpg": JPEG[0]}, "1": {"jpg": JPEG[1], "cls": label.encode()}})
    for name in ("t.jsonl", "t.tar"):
        dataset = open_dataset(str(tmp_path / name))
        assert dataset[0].label == -1
        with pytest.raises(UserError, match=f"1.jpg has the label {re.escape(label)}, which is too large"):
            dataset[1]


def test_labels_of_an_npz_below_0_are_none(tmp_path):
    offsets = np.cumsum([0, *map(len, JPEG[:3])])
    np.savez(tmp_path / "t.npz", jpeg=np.frombuffer(b"".join(JPEG[:3]), np.uint8), offsets=offsets, labels=[-5, -1, 2])
    dataset = open_dataset(str(tmp_path / "t.npz"))
    assert [dataset[i].label for i in range(3)] == [-1, -1, 2]
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")  # labels may be names of classes
    named = {"offsets": offsets, "labels": ["dog", "cat", "cow"]}
    np.savez(tmp_path / "train.npz", jpeg=np.frombuffer(b"".join(JPEG[:3]), np.uint8), **named)
    (tmp_path / "t.npz").unlink()
    dataset = open_dataset(str(tmp_path))
    assert [dataset[i].label for i in range(3)] == [1, 0, -1]


def test_a_picture_beside_class_folders_takes_all_labels_and_says_so(tmp_path, capsys):
    pictures_in(tmp_path, [f"{'ab'[i % 2]}/{i}.jpg" if i else "cover.jpg" for i in range(N)])
    dataset = open_dataset(str(tmp_path))
    assert dataset.classes is None and dataset[0].label == -1
    assert "no labels, because of images beside the class folders: 1 (cover.jpg)" in capsys.readouterr().err


def test_folders_that_are_numbers(tmp_path, capsys):
    pictures_in(tmp_path, [f"{(0, 1, 10, 2, 9, 20)[i]}/{i}.jpg" for i in range(N)])
    dataset = open_dataset(str(tmp_path))
    assert dataset.classes == ["0", "1", "2", "9", "10", "20"] and "2 comes before 10" in capsys.readouterr().err
    assert {int(s.key.split("/")[-2]): s.label for s in map(dataset.__getitem__, range(N))} == {
        0: 0, 1: 1, 2: 2, 9: 3, 10: 4, 20: 5}  # fmt: skip
    (tmp_path / "classnames.txt").write_text("".join(f"name {i}\n" for i in range(N)))
    assert open_dataset(str(tmp_path)).classes == [f"name {i}" for i in range(N)]


WORDNET = {
    "classnames.txt": "n02 no id\nn01440764 x\n",
    "LOC_synset_mapping.txt": "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn01484850 great white shark\n",
    "imagenet_class_index.json": '{"1": ["n01443537", "goldfish"], "0": ["n01440764", "tench"], "2": ["n01484850", "great_white_shark"]}',
}


@pytest.mark.parametrize("file, text", [
    ("LOC_synset_mapping.txt", WORDNET["LOC_synset_mapping.txt"]), ("classnames.txt", WORDNET["LOC_synset_mapping.txt"]),
    ("imagenet_class_index.json", WORDNET["imagenet_class_index.json"]),
    ("imagenet_class_index.json", '{"n01484850": "great_white_shark", "n01440764": "tench", "n01443537": "goldfish"}'),
])  # fmt: skip
def test_names_of_wordnet_ids(tmp_path, file, text):
    """In a list of all classes beside the splits, of which a part has folders."""
    ids = ["n01440764", "n01484850"]
    for split in ("train", "val"):
        pictures_in(tmp_path / split, [f"{ids[i // 3]}/{i}.JPEG" for i in range(N)])
    assert open_dataset(str(tmp_path), split="val").classes == ids
    (tmp_path / file).write_text(text)
    for split in ("train", "val"):
        assert open_dataset(str(tmp_path), split=split).classes == ["tench", "great white shark"]
    shutil.rmtree(tmp_path / "train")
    write_tar(tmp_path / "train-0.tar", {str(i): {"jpg": JPEG[i], "cls": b"2"} for i in range(N)})
    assert open_dataset(str(tmp_path)).classes == ["tench", "goldfish", "great white shark"]


def test_members_of_zips(tmp_path, monkeypatch):
    """Stored, deflated and unusual members, and what is missing or damaged. zipfile, which is slow, is only used for what
    is unusual: bzip2, and a name that is in the comment; it parses the directory once."""
    path = str(tmp_path / "a.zip")

    def read_zip(path, name):
        return layouts.read_zip(path, name)

    content = {f"{i:03d}.jpg": os.urandom(200 + i) * 3 for i in range(300)}
    for method, unusual in ((zipfile.ZIP_STORED, 1), (zipfile.ZIP_DEFLATED, 1), (zipfile.ZIP_BZIP2, 300)):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.comment = b"000.jpg" * 5
            for name, value in content.items():
                archive.writestr(name, value)
        asked, plain = [], layouts.zip_of
        layouts.handle.cache_clear()
        layouts.zip_of.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(layouts, "zip_of", lambda *key: asked.append(key) or plain(*key))  # noqa: B023
            assert all(read_zip(path, name) == value for name, value in content.items())
        assert len(asked) == unusual and plain.cache_info().misses == 1
    with pytest.raises(ValueError, match="a.zip is damaged or does not hold 999.jpg"):
        read_zip(path, "999.jpg")
    Path(path).write_bytes(Path(path).read_bytes()[:1000])
    layouts.handle.cache_clear()
    layouts.zip_of.cache_clear()
    with pytest.raises(ValueError, match="damaged"):
        read_zip(path, "000.jpg")


def test_a_zip_that_was_replaced_is_read_again(tmp_path):
    for content in JPEG[:2]:
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as archive:
            archive.writestr("1.jpg", content)
        (tmp_path / "train.csv").write_text("image,caption\na.zip/1.jpg,a dog\n")
        assert open_dataset(str(tmp_path))[0].image == content


def test_a_member_behind_4_gib(tmp_path):
    """Its place is in the part of the entry that is for large zips. The file has a hole, and takes no space."""
    with open(tmp_path / "large.zip", "wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.jpg", JPEG[0])
            file.seek(2**32 + 100)
            archive.start_dir = file.tell()
            archive.writestr("b.jpg", JPEG[1])
    assert (tmp_path / "large.zip").stat().st_blocks * 512 < 2**20
    for name, content in zip(("a.jpg", "b.jpg"), JPEG):
        assert layouts.read_zip(str(tmp_path / "large.zip"), name) == content


def test_only_the_indices_of_a_pickle_are_plain(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    slip(tmp_path)
    (tmp_path / "yfcc15m.pkl").write_bytes(pickle.dumps([(1, "title", Harm())]))
    with pytest.raises(UserError, match=r"yfcc15m.pkl cannot be read: it holds (posix|nt)\.mkdir"):
        open_dataset(str(tmp_path))
    assert not (tmp_path / "harm").exists()


class FakeFood:
    """Stands in for torchvision.datasets.Food101; what is downloaded is a file."""

    classes = ["apple_pie", "b"]

    def __init__(self, root, split, download=False):
        if not (root / "there").exists():
            if not download or (root / "offline").exists():
                raise RuntimeError("not found")
            with open(root / "log", "a") as log:
                log.write(split + " ")
            time.sleep(0.3)
            (root / "there").touch()

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return picture(i), 1


def test_torchvision_sets(tmp_path, monkeypatch):
    """One of several processes downloads, the others wait for it."""
    monkeypatch.setattr(torchvision.datasets, "Food101", FakeFood)
    (tmp_path / "food101").mkdir()
    (tmp_path / "food101/offline").touch()
    with pytest.raises(UserError, match="food101 does not hold food101, nor can it be downloaded: not found"):
        open_dataset("food101", tmp_path)
    (tmp_path / "food101/offline").unlink()
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=open_dataset, args=("food101", tmp_path)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for split in ("train", "val", "test"):
        dataset = open_dataset("food101", tmp_path, split)
    assert (tmp_path / "food101/log").read_text() == "train " and dataset.classes == ["apple pie", "b"]
    assert not dataset.captioned and decode(dataset[2].image).shape == (3, 30, 40) and dataset[2].label == 1
    npz(tmp_path / "cifar10")  # a set of this name in another layout
    assert len(open_dataset("cifar10", tmp_path)) == N
    (tmp_path / "own/food101").mkdir(parents=True)  # photos of one's own
    picture(0).save(tmp_path / "own/food101/1.JPG")
    assert open_dataset("food101", tmp_path / "own")[0].label == -1
    assert [path.name for path in (tmp_path / "own/food101").iterdir()] == ["1.JPG"]


def test_stl10_with_what_has_no_labels(tmp_path, monkeypatch):
    """For training alone: both names are one folder, and are evaluated on the same images."""
    asked = []

    class FakeSTL(FakeFood):
        def __init__(self, root, split, download=False):
            asked.append((root, split))

        def __getitem__(self, i):
            return picture(i), i - 1

    monkeypatch.setattr(torchvision.datasets, "STL10", FakeSTL)
    for name in ("stl10", "stl10-unlabeled"):
        for split in ("train", "val"):
            dataset = open_dataset(name, tmp_path, split)
            assert dataset.name == name and [dataset[i].label for i in range(3)] == [-1, 0, 1]
    assert [root for root, _ in asked] == [tmp_path / "stl10"] * 4
    assert [split for _, split in asked] == ["train", "test", "train+unlabeled", "test"]


# ------------------------------------------ what the user can mend ------------------------------------------
def damaged(name, root):
    """Makes something wrong under root; -> what is opened, what the sentence has to say."""
    path = root / "set"
    path.mkdir()
    if name == "missing":
        return "/nowhere/photos", "no data at /nowhere/photos.*docs/data.md"
    if name == "missing name":
        return "imagenet", f"no data at {root}/imagenet"
    if name == "misspelt":
        return "yfcc15n", "did you mean yfcc15m"
    if name == "no name":
        return "", "no data at ''"
    if name == "empty":
        return path, "holds no pictures for train, see docs/data.md"
    if name == "no pickle":
        (path / "images/00").mkdir(parents=True)
        return path, "holds no pictures"
    if name == "csv columns":
        (path / "a.csv").write_text("url,words\nx,y\n")
        return path, r"a.csv are \['url', 'words'\], none of image, filepath"
    if name == "csv empty":
        (path / "a.csv").write_text("")
        return path, "a.csv is empty: its first line names the columns"
    if name == "csv of semicolons":
        (path / "a.csv").write_text("image;caption\nx.jpg;a dog\n")
        return path, "a.csv has the one column image;caption: separate columns with commas"
    if name == "tsv of commas":
        (path / "a.tsv").write_text("image,caption\nx.jpg,a dog\n")
        return path, "a.tsv has the one column image,caption: separate columns with tabs"
    if name == "utf-16":
        (path / "a.tsv").write_text("image\tcaption\nx.jpg\ta dog\n", encoding="utf-16")
        return path, "a.tsv is UTF-16, as Excel's Unicode text: save it as UTF-8"
    if name == "csv unbalanced":
        (path / "a.csv").write_text('image,caption\nx,"' + "y\n" * 100000)
        return path, r"a.csv cannot be read: line .*field larger than field limit \(131072\): shorten that text, or close the quote that"
    if name == "two columns":
        (path / "a.csv").write_text("image,caption,caption\nx.jpg,one,two\n")
        return path, "a.csv has two columns caption: rename one of them"
    if name == "folders like splits":
        image_folder(path)
        for was, now in zip(sorted(path.iterdir()), ("test_images", "train_images", "validated")):
            was.rename(path / now)
        return path, "set has the folders test_images, train_images, validated: rename splits to train, val and test"
    if name == "two tables":
        (path / "a.csv").write_text("")
        (path / "b.jsonl").write_text("")
        return path, "a.csv, b.jsonl"
    if name == "empty jsonl":
        (path / "a.jsonl").write_text("\n\n")
        return path, "holds no pictures"
    if name == "npz arrays":
        np.savez(path / "a.npz", x=np.zeros(3))
        return path, "a.npz must hold jpeg"
    if name == "npz offsets":
        npz(path, offsets=np.arange(3))
        return path, r"train.npz must hold jpeg \(uint8\), offsets"
    if name == "npz too short":
        npz(path, jpeg=np.zeros(5, np.uint8))
        return path, "must hold"
    if name == "npz labels":
        npz(path, labels=np.full(N, 6))
        return path, "label 6, but classnames.txt 6 lines"
    if name == "npz labels of objects":  # as pandas has them
        npz(path, labels=np.array(["a"] * N, object))
        return path, r"labels \(n, numbers or texts, no objects\)"
    if name == "npz broken":
        (path / "a.npz").write_bytes(b"PK\3\4 and then nothing")
        return path, "a.npz must hold jpeg"
    if name == "class names":
        image_folder(path)
        (path / "classnames.txt").write_text("a\nb\n")
        return path, "names 2 classes, but .* has 3 folders"
    if name == "json":
        (path / "dataset_x.json").write_text('{"images": [')
        return path, "dataset_x.json cannot be read"
    if name == "coco":
        (path / "annotations").mkdir()
        (path / "annotations/captions_val2017.json").write_text("{}")
        return path, "captions_train2017.json"
    if name.startswith("pickle"):
        (path / "images").mkdir()
    if name == "pickle":
        (path / "a.pkl").write_bytes(b"nothing pickled")
        return path, "a.pkl cannot be read"
    if name == "pickle of something else":
        (path / "a.pkl").write_bytes(pickle.dumps({"a": 1}))
        return path, "a.pkl cannot be read"
    whole = write_tar(
        root / "whole.tar", {"000": {"jpg": JPEG[0], "txt": b"text"}, "001": {"jpg": JPEG[1]}}
    ).read_bytes()
    end = whole.index(b"001.jpg")
    cuts = {"tar cut in a picture": end + 700, "tar cut in a header": end + 100, "tar cut between members": end,
            "tar without an end": end + 512 + -(-len(JPEG[1]) // 512) * 512}  # fmt: skip
    content = (
        whole[: cuts[name]]
        if name in cuts
        else {"tar empty": b"", "tar of something else": b"x" * 5000}[name]
    )
    (path / "a.tar").write_bytes(content)
    return path, "a.tar cannot be read"


@pytest.mark.parametrize("kind", ["tar", "npz", "npz of bytes", "csv"])
def test_labels_that_are_names(kind, tmp_path):
    """They stand for classes once classnames.txt lists them; without it a sentence says so, and not that there are none."""
    names = ["cat", "dog", "cat", "dog", "cat", "dog"]
    if kind == "tar":
        write_tar(tmp_path / "train.tar", {f"{i:03d}": {"jpg": JPEG[i], "cls": f"{name}\n".encode()} for i, name in enumerate(names)})
    elif kind == "csv":
        pictures_in(tmp_path / "images", [f"{i}.png" for i in range(N)])
        (tmp_path / "train.csv").write_text("file,label\n" + "".join(f"images/{i}.png,{name}\n" for i, name in enumerate(names)))
    else:
        npz(tmp_path, labels=np.array(names, "S" if "bytes" in kind else "U"))
        (tmp_path / "classnames.txt").unlink()
    lack = f"labels such as 'dog' are no numbers: list the names in {tmp_path}/classnames.txt"
    assert what_classes_lack(open_dataset(str(tmp_path))) == lack
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    dataset = open_dataset(str(tmp_path))
    assert [dataset[i].label for i in range(N)] == [0, 1] * 3 and not what_classes_lack(dataset)


DAMAGES = """missing/missing name/misspelt/no name/empty/no pickle/csv columns/csv empty/csv of semicolons/tsv of commas/utf-16/csv unbalanced/two columns/folders like splits/two tables/
empty jsonl/npz arrays/npz offsets/npz too short/npz labels/npz labels of objects/npz broken/class names/json/coco/pickle/
pickle of something else/tar cut in a picture/tar cut in a header/tar cut between members/tar without an end/tar empty/
tar of something else"""


@pytest.mark.parametrize("name", DAMAGES.replace("\n", "").split("/"))
def test_one_sentence(name, tmp_path):
    opened, sentence = damaged(name, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=sentence) as error:
        open_dataset(str(opened), tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert sorted(tmp_path.rglob("*")) == before  # nothing half made is left


def test_columns_in_any_case(tmp_path):
    """As spreadsheets write them; all others keep their names."""
    (tmp_path / "1.jpg").write_bytes(JPEG[0])
    (tmp_path / "a.csv").write_text("Image,CAPTION,Label,Source\n1.jpg,a dog,3,web\n")
    dataset = open_dataset(str(tmp_path))
    assert dataset.captioned and dataset[0].captions == ["a dog"] and dataset[0].label == 3
    (tmp_path / "a.csv").write_text("Image,image\n1.jpg,2.jpg\n")
    with pytest.raises(UserError, match="a.csv has two columns image"):
        open_dataset(str(tmp_path))


def test_a_folder_named_by_a_dot(tmp_path, monkeypatch):
    """Sentences and run directories have its own name."""
    image_folder(tmp_path / "photos")
    monkeypatch.chdir(tmp_path / "photos")
    with pytest.raises(UserError, match=f"{tmp_path}/photos has no val split"):
        open_dataset(".", split="val")
    assert open_dataset(".").name == "photos"
    for path, name in ((".", "photos"), ("..", tmp_path.name), ("cifar10", "cifar10"), ("../photos/", "photos")):
        args = types.SimpleNamespace(data=path, arch="resnet18", seed=0, output_dir="")
        assert directory_of("simclr", args).name.startswith(f"simclr_{name}_resnet18_s0_")


def test_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sources.os, "listdir", refuse)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be read: .*Permission denied"):
        open_dataset(str(tmp_path))


# ------------------------------------------------ indices ------------------------------------------------
def shard(path, captions):
    return write_tar(path, {f"{i:04d}": {"jpg": JPEG[0], "txt": c.encode()} for i, c in enumerate(captions)})


@pytest.fixture
def scans(monkeypatch):
    """Counts how often a tar file is opened to be indexed."""
    counted, plain = [], tarfile.open

    def count(name=None, mode="r", fileobj=None):
        if fileobj:
            counted.append(fileobj.name)
        return plain(name, mode, fileobj)

    monkeypatch.setattr(tarfile, "open", count)
    return counted


def texts(root):
    dataset = open_dataset(str(root))
    return [dataset[i].captions[0] for i in range(len(dataset))]


def test_index_is_made_once_and_when_the_shard_changes(tmp_path, scans, home):
    path = tmp_path / "a.tar"
    index = tmp_path / "a.tar.idx.npz"
    shard(path, "abc")
    assert (
        texts(tmp_path) == list("abc")
        and texts(tmp_path) == list("abc")
        and len(scans) == 1
        and index.exists()
    )
    size, when = path.stat().st_size, path.stat().st_mtime_ns
    shard(path, "de")
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))  # same size, another time
    os.utime(path, ns=(when, when + 1))
    assert texts(tmp_path) == list("de") and len(scans) == 2
    shard(path, "fghi" * 20)
    assert path.stat().st_size != size
    os.utime(path, ns=(when, when + 1))  # same time, another size
    assert texts(tmp_path) == list("fghi" * 20) and len(scans) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.idx.npz"]
    whole = index.read_bytes()
    for i, cut in enumerate((b"", whole[:2], whole[:100], whole[:-1])):  # by a power cut, a full disk
        index.write_bytes(cut)
        assert texts(tmp_path) == list("fghi" * 20) and index.read_bytes() == whole and len(scans) == 4 + i
    own = io.BytesIO()
    np.savez(own, x=np.zeros(3))
    for other in (b"a file of the user's own", own.getvalue()):
        index.write_bytes(other)
        assert texts(tmp_path) == list("fghi" * 20) and index.read_bytes() == other
    assert len(scans) == 8 and len(list(home.glob(".cache/contrastive/*.idx.npz"))) == 1


@pytest.mark.parametrize("how", ["mode", "error"])
def test_index_of_a_read_only_folder_is_in_the_cache(how, tmp_path, home, scans, monkeypatch):
    shard(tmp_path / "set/a.tar", "abc")
    if how == "mode":  # root could write there all the same
        (tmp_path / "set").chmod(0o555)
    else:
        plain = open

        def read_only(file, mode="r", *args, **options):
            if str(file).startswith(str(tmp_path)) and "w" in mode:
                raise OSError(30, "Read-only file system")
            return plain(file, mode, *args, **options)

        monkeypatch.setattr(layouts, "open", read_only, raising=False)
    assert (
        texts(tmp_path / "set") == list("abc") and texts(tmp_path / "set") == list("abc") and len(scans) == 1
    )
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["a.tar"]
    assert len(list((home / ".cache/contrastive").iterdir())) == 1
    (tmp_path / "set").chmod(0o755)


def test_indices_in_the_cache_have_names_of_their_own(tmp_path, home):
    """Paths that differ in a sign, or early in a long name."""
    for name in ("x-1.csv", "x_1.csv", f"a{'/long' * 50}.csv", f"b{'/long' * 50}.csv"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("image,caption\n1.png,x\n")
        Path(f"{path}.idx").write_text("a file of the user's own")
        index = layouts.index_rows(path, layouts.table_rows)
        assert index.parent == home / ".cache/contrastive"
    assert len(list(index.parent.iterdir())) == 4


@pytest.mark.parametrize("layout", ["tar", "csv"])
def test_index_of_a_full_disk_is_in_the_cache(layout, tmp_path, home, monkeypatch):
    """The file can be opened, and what is written into it finds no room."""
    shard(tmp_path / "set/a.tar", "abc") if layout == "tar" else table(tmp_path / "set", "csv", ",")
    there, number, plain = [str(tmp_path / "set")], errno.ENOSPC, open

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(number, os.strerror(number))

        writelines = write

    def full(file, mode="r", *args, **options):
        on_it = any(str(file).startswith(place) for place in there)
        return Full(file, mode) if on_it and "w" in mode else plain(file, mode, *args, **options)

    monkeypatch.setattr(layouts, "open", full, raising=False)
    assert len(texts(tmp_path / "set")) == (3 if layout == "tar" else N)
    (index,) = (home / ".cache/contrastive").iterdir()
    assert ".idx" in index.name and not list((tmp_path / "set").glob("*.idx*"))
    index.unlink()
    there.append(str(home))
    with pytest.raises(UserError, match=r"the index of .* neither beside it nor in ~/.cache \(\[Errno 28\] No space left .*\): allow one"):
        open_dataset(str(tmp_path / "set"))
    number = errno.EIO
    with pytest.raises(UserError, match="cannot be read: .*Input/output error"):
        open_dataset(str(tmp_path / "set"))
    assert not list((tmp_path / "set").glob("*.idx*")) and not list((home / ".cache/contrastive").iterdir())


def test_index_that_can_be_written_nowhere(tmp_path, home):
    shard(tmp_path / "set/a.tar", "abc")
    (tmp_path / "set").chmod(0o555)
    (home / ".cache").touch()
    with pytest.raises(UserError, match="the index of .*a.tar can be written neither"):
        open_dataset(str(tmp_path / "set"))
    (tmp_path / "set").chmod(0o755)


def _opens(root, barrier, results, locks):
    counted, plain = [], tarfile.open
    tarfile.open = lambda fileobj, mode: counted.append(fileobj) or plain(None, mode, fileobj)
    if not locks:
        layouts.fcntl.flock = lambda *_: os.close(-1)  # OSError, as on a file system without locks
    barrier.wait()
    results.put((texts(root), len(counted)))


@pytest.mark.parametrize("locks", [True, False])
def test_processes_may_index_at_the_same_time(tmp_path, locks):
    captions = [f"caption {i}" for i in range(300)]
    fork = multiprocessing.get_context("fork")
    for turn in range(2):
        for i in range(3):
            shard(tmp_path / f"{turn}/{i}.tar", captions[100 * i : 100 * i + 100])
        barrier, results = fork.Barrier(4), fork.Queue()
        args = tmp_path / str(turn), barrier, results, locks
        processes = [fork.Process(target=_opens, args=args) for _ in range(4)]
        for process in processes:
            process.start()
        found, scans = zip(*[results.get(timeout=30) for _ in processes])
        for process in processes:
            process.join()
        assert found == (captions,) * 4 and (sum(scans) == 3 or not locks)  # each shard once
        assert len(list((tmp_path / str(turn)).iterdir())) == 6  # no drafts


def test_a_lock_on_nfs(tmp_path, monkeypatch):
    """There an exclusive lock takes a file that is open for writing, and a folder has none."""
    plain, path = layouts.fcntl.flock, tmp_path / "a.tar"
    path.touch()

    def flock(file, how):
        if layouts.fcntl.fcntl(file, layouts.fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        plain(file, how)

    monkeypatch.setattr(layouts.fcntl, "flock", flock)
    with layouts.locked(path), open(path, "rb") as other:
        with pytest.raises(BlockingIOError):
            plain(other, layouts.fcntl.LOCK_EX | layouts.fcntl.LOCK_NB)
    with open(path, "rb") as other:
        plain(other, layouts.fcntl.LOCK_EX | layouts.fcntl.LOCK_NB)
    found = []

    class Set(FakeFood):
        def __init__(self, root, split, download=False):
            with open(root / ".lock", "rb") as other, pytest.raises(BlockingIOError):
                plain(other, layouts.fcntl.LOCK_EX | layouts.fcntl.LOCK_NB)
            found.append(root.name)

    monkeypatch.setattr(torchvision.datasets, "Food101", Set)
    assert len(open_dataset("food101", tmp_path)) == 3 and found == ["food101"]


def test_processes_share_the_indexing(tmp_path, scans, monkeypatch):
    for i in range(5):
        shard(tmp_path / f"{i}.tar", str(i))
    monkeypatch.setattr(layouts, "world_size", lambda: 2)
    firsts = []
    for turn in (0, 1):
        monkeypatch.setattr(layouts, "rank", lambda turn=turn: turn)
        scans.clear()
        assert texts(tmp_path) == list("01234")  # the order does not depend on who indexed what
        firsts.append([Path(path).name for path in scans])
        for index in tmp_path.glob("*.idx.npz"):
            index.unlink()
    assert firsts == [
        ["0.tar", "2.tar", "4.tar", "1.tar", "3.tar"],
        ["1.tar", "3.tar", "0.tar", "2.tar", "4.tar"],
    ]


@pytest.mark.parametrize("cell, captions", {
    '["a dog", "a caf\\u00e9"]': ["a dog", "a café"],  # JSON
    "['a dog', \"it's wet\"]": ["a dog", "it's wet"],  # str() of a list of Python
    " ['a dog'] ": ["a dog"],
    "[a dog]": ["[a dog]"],
    "['a', 'b'] or ['c']": ["['a', 'b'] or ['c']"],
    "['a' or 'b']": ["['a' or 'b']"],
}.items())  # fmt: skip
def test_a_cell_may_hold_a_list_of_captions(cell, captions, tmp_path):
    with open(tmp_path / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), ("1.jpg", cell)])
    (tmp_path / "1.jpg").write_bytes(JPEG[0])
    assert open_dataset(str(tmp_path))[0].captions == captions


def test_a_list_as_numpy_prints_it_is_refused(tmp_path):
    (tmp_path / "pairs.csv").write_text("image,caption\n1.jpg,['a dog' 'a cat']\n")
    with pytest.raises(UserError, match=r"no commas are between the captions \['a dog' 'a cat'\]: use a JSON list"):
        open_dataset(str(tmp_path))


def test_index_of_rows(tmp_path):
    table(tmp_path, "csv", ",")
    assert len(open_dataset(str(tmp_path))) == N and (tmp_path / "pairs.csv.idx").exists()
    (tmp_path / "pairs.csv").write_text("image,caption\npictures/2.jpg,two\n")
    assert open_dataset(str(tmp_path))[0].captions == ["two"] and len(open_dataset(str(tmp_path))) == 1


@pytest.mark.parametrize("n", [0, 1, 100_000])
def test_a_row_takes_eight_bytes_of_memory(n, tmp_path):
    """And sixteen while the file is read."""
    (tmp_path / "rows.jsonl").write_text('{"image": "1.png"}\n' * n)
    tracemalloc.start()
    rows = layouts.Rows(tmp_path, tmp_path / "rows.jsonl", None, sources.Sample)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == n and rows.starts.dtype == np.int64 and rows.starts[-1] == 19 * n
    assert held < 8.5 * n + 100_000 and peak < 20 * n + 500_000


def test_many_shards_do_not_use_up_the_file_handles(tmp_path):
    for i in range(140):
        shard(tmp_path / f"{i:03d}.tar", [str(i)])
    dataset = open_dataset(str(tmp_path))
    assert [dataset[i].captions[0] for i in range(140)] == [str(i) for i in range(140)]
    held = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
    assert 100 < sum(path.parent == tmp_path for path in held) <= 128


def test_a_sample_of_a_tar_is_a_read_for_each_part_that_it_has(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", {"0": {"jpg": JPEG[0]}, "1": {"jpg": JPEG[1], "txt": b"a dog", "json": b"{}"}})
    dataset, opened, plain = open_dataset(str(tmp_path)), [], layouts.handle
    monkeypatch.setattr(layouts, "handle", lambda *key: opened.append(key) or plain(*key))
    assert [dataset[i].image for i in range(2)] == JPEG[:2] and len(opened) == 1 + 3


def test_shard_that_shrinks_under_the_reader(tmp_path):
    path = shard(tmp_path / "a.tar", "abc")
    dataset = open_dataset(str(tmp_path))
    os.truncate(path, 600)
    with pytest.raises(ValueError, match="shorter than it was"):
        dataset[2]


# ------------------------------------------------ pictures ------------------------------------------------
def sixteen_bits():
    return Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16))


HOSTILE = {
    "cmyk": encoded(picture(0).convert("CMYK"), quality=95),
    "grey": encoded(picture(0).convert("L")),
    "progressive": encoded(picture(0), progressive=True),
    "16 bits": encoded(sixteen_bits(), "PNG"),
    "16 bits tiff": encoded(sixteen_bits(), "TIFF"),
    "palette": encoded(picture(0).convert("P"), "PNG", transparency=bytes(range(256))),
    "palette with one transparent colour": encoded(picture(0).convert("P"), "PNG", transparency=3),
    "grey and alpha": encoded(picture(0).convert("LA"), "PNG"),
    "alpha": encoded(picture(0).convert("RGBA"), "PNG"),
    "black and white": encoded(picture(0).convert("1"), "PNG"),
    "gif": encoded(picture(0), "GIF"),
    "webp": encoded(picture(0), "WEBP"),
    "one pixel": encoded(picture(0, 1, 1)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_decode_what_is_unusual(name, recwarn):
    plain = Image.open(io.BytesIO(HOSTILE[name]))
    out = decode(HOSTILE[name])
    assert out.dtype == torch.uint8 and out.shape == (3, plain.height, plain.width)
    assert out.permute(1, 2, 0).is_contiguous() and not recwarn.list
    if name.startswith("16 bits"):
        expected = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, 2)
    else:
        expected = np.array(
            plain.convert("RGBA").convert("RGB") if plain.mode == "P" else plain.convert("RGB")
        )
    assert (out.permute(1, 2, 0).numpy() == expected).all()
    assert torch.equal(decode(plain), out) and torch.equal(decode(expected), out)


def huge_header():
    """A JPEG that says it has 60,000 x 60,000 pixels."""
    content = bytearray(JPEG[0])
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", 60000, 60000)
    return bytes(content)


DEEP = {  # 32 bits whose values say how bright they are, each 0 to 255 in the end
    "floats up to 1": np.arange(256, dtype=np.float32) / 255,
    "floats up to 255": np.arange(256, dtype=np.float32),
    "32 bits up to 255": np.arange(256, dtype=np.int32),
    "32 bits up to 65535": np.arange(256, dtype=np.int32) * 257,
}


@pytest.mark.parametrize("name", DEEP)
def test_decode_floats_and_32_bits(name, recwarn):
    content = encoded(Image.fromarray(DEEP[name].reshape(16, 16)), "TIFF")
    assert Image.open(io.BytesIO(content)).mode in "IF" and not recwarn.list
    assert (decode(content).numpy() == np.arange(256).reshape(16, 16)).all()


def test_16_bits_that_are_dark_stay_dark():
    dark = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16))
    assert not decode(encoded(dark, "TIFF")).any()


def as_tiff(*values):
    return encoded(Image.fromarray(np.array([values])), "TIFF")


BROKEN = {
    "floats above 255": as_tiff(np.float32(0), np.float32(300)),
    "floats below 0": as_tiff(np.float32(-1), np.float32(1)),
    "floats that are none": as_tiff(np.float32(0), np.float32("nan")),
    "32 bits above 65535": as_tiff(np.int32(0), np.int32(70000)),
    "empty": b"",
    "cut jpeg": JPEG[0][: len(JPEG[0]) // 2],
    "only a header": JPEG[0][:200],
    "cut png": encoded(picture(0), "PNG")[:-100],
    "changed png": encoded(picture(0), "PNG").replace(b"IDAT", b"IDAX"),
    "web page": b"<html>404</html>",
    "zeros": bytes(1000),
    "bomb": huge_header(),
    "array of floats": np.zeros((4, 4, 3)),
    "array of one channel": np.zeros((4, 4, 1), np.uint8),
    "nothing": None,
}


@pytest.mark.parametrize("name", BROKEN)
def test_decode_what_is_broken(name):
    with pytest.raises(ValueError, match="broken image") as error:
        decode(BROKEN[name])
    assert "\n" not in str(error.value) and " at 0x" not in str(error.value)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size, resize", [(32, None), (32, 37), (50, 56)])
def test_eval_view_equals_torchvision(size, resize, interpolation):
    view = EvalView(size, resize, interpolation, data.IMAGENET_MEAN, data.IMAGENET_STD)
    for width, height in ((53, 40), (40, 53), (32, 32), (37, 90), (300, 31), (1, 1), (224, 225)):
        image = picture(width, width, height)
        expected = transforms.Compose([
            transforms.Resize(resize or size, getattr(transforms.InterpolationMode, interpolation.upper())),
            transforms.CenterCrop(size), transforms.ToTensor(),
            transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)])(image)  # fmt: skip
        crop = view.crop(decode(image), random.Random(0))
        assert crop.dtype == torch.uint8 and crop.shape == (3, size, size)
        assert torch.equal(view(crop[None], {})[0], expected)


def test_eval_view_of_a_line_takes_little_memory():
    for shape in ((1, 60000, 3), (60000, 1, 3)):
        image = decode(np.zeros(shape, np.uint8))
        image[:, shape[0] // 2 - 3 : shape[0] // 2 + 3, shape[1] // 2 - 3 : shape[1] // 2 + 3] = (
            200  # the middle
        )
        assert EvalView(224).crop(image).float().mean() == 200


# ------------------------------------------------ shapes ------------------------------------------------
def test_shapes_are_a_function_of_the_index():
    first, again = open_dataset("shapes"), open_dataset("shapes")
    picked = [7, 19999, 0, 4321]
    samples = [first[i] for i in picked]
    random.seed(1)
    for sample, i in reversed(list(zip(samples, picked))):
        assert (again[i].image == sample.image).all() and again[i][1:] == sample[1:]
    assert len(first) == 20000 and len(open_dataset("shapes", split="val")) == 2000
    with pytest.raises(IndexError):
        first[20000]


def test_shapes_are_labelled_and_described():
    train, val = open_dataset("shapes"), open_dataset("shapes", split="test")
    assert train.classes == val.classes and len(set(train.classes)) == 100 and train.captioned
    seen, wordings = set(), set()
    for dataset in (train, val):
        for i in range(200):
            sample = dataset[i]
            colour, shape = dataset.classes[sample.label].split()
            assert sample.image.shape == (64, 64, 3) and sample.image.dtype == np.uint8
            assert len(set(sample.captions)) == 3
            for caption in sample.captions:
                words = re.findall(r"\w+", caption)
                assert re.search(rf"{colour} {shape}|{shape} in {colour}", caption), caption
                assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  ", caption), caption
                main = [w for w in words if w in scenes.SHAPES][
                    0
                ]  # what is said of other objects comes later
                assert main == shape
                wordings.add(re.sub("|".join([*scenes.COLOURS, *scenes.SHAPES]), "_", caption))
            seen.add(hashlib.sha256(sample.image.tobytes()).digest())
    assert len(seen) == 400 and len(wordings) > 50
    assert [train[i].label for i in range(300)] == [i % 100 for i in range(300)]


def test_shapes_are_not_told_by_their_colours():
    """Nearest neighbour on histograms of 64 colours finds the colour, and of the shape no more than chance (10%)."""

    def features(split, count):
        dataset = open_dataset("shapes", split=split)
        samples = [dataset[i] for i in range(count)]
        cells = [(s.image.reshape(-1, 3) // 64).astype(int) @ [16, 4, 1] for s in samples]
        return np.stack([np.bincount(c, minlength=64) for c in cells]) ** 0.5, np.array(
            [s.label for s in samples]
        )

    (train, labels), (val, wanted) = features("train", 2000), features("val", 300)
    found = labels[((val[:, None] - train[None]) ** 2).sum(2).argmin(1)]
    assert (found == wanted).mean() < 0.2


# ------------------------------------------------ flocks ------------------------------------------------
def test_flocks_are_a_function_of_the_index():
    first, again, val = open_dataset("flocks"), open_dataset("flocks"), open_dataset("flocks", split="val")
    picked = [7, 19999, 0, 4321]
    samples = [first[i] for i in picked]
    random.seed(1)
    for sample, i in reversed(list(zip(samples, picked))):
        assert (again[i].image == sample.image).all() and again[i][1:] == sample[1:]
        assert sample.image.shape == (64, 64, 3) and sample.image.dtype == np.uint8
    assert len(first) == 20000 and len(val) == 2000 and not first.captioned and val[5].key == "flocks 20005"
    assert first.classes == val.classes == scenes.SHAPES
    assert [first[i].label for i in range(30)] == [i % 10 for i in range(30)]
    assert len({d[i].image.tobytes() for d in (first, val) for i in range(100)}) == 200
    with pytest.raises(IndexError):
        first[20000]


def test_flocks_differ_by_their_form_alone():
    """Every quarter of every picture has its own colour, on one grey; a form is not told by its area."""
    dataset = open_dataset("flocks")
    areas = np.zeros((10, 30))
    for i in range(300):
        pixels = dataset[i].image.astype(int)
        ground = np.abs(pixels - 128).max(2) < 40
        assert 120 < pixels[ground].mean() < 136
        areas[i % 10, i // 10] = (~ground).sum()
        for name, quarter in scenes.Flocks.colours.items():
            x, y = int(quarter.real), int(quarter.imag)
            around = pixels[y - 16 : y + 16, x - 16 : x + 16][~ground[y - 16 : y + 16, x - 16 : x + 16]]
            near = np.abs(around[:, None] - [scenes.COLOURS[c] for c in scenes.Flocks.colours]).sum(2).argmin(1)
            assert list(scenes.Flocks.colours)[np.bincount(near).argmax()] == name, (i, name)
    spread = areas.std(1).mean()  # of the pictures of a form
    assert np.ptp(np.delete(areas.mean(1), scenes.SHAPES.index("crescent"))) < 2 * spread


# ------------------------------------------------ loader ------------------------------------------------
class ToyView:
    """A random crop and one draw of every kind that a view may have."""

    size = 16

    def __init__(self, sign=1):
        self.sign = sign

    def crop(self, image, rng):
        return data.random_resized_crop(image, rng, self.size)

    def sample(self, rng):
        return {
            "flip": rng.random() < 0.5,
            "sigma": rng.uniform(0.1, 2),
            "order": rng.sample(range(4), 4),
            "turn": rng.randrange(9),
            "mask": torch.tensor([rng.random() for _ in range(3)]),
        }

    def __call__(self, x, draw):
        return self.sign * x * draw["sigma"].view(-1, 1, 1, 1)


def toy_text(caption, rng):
    """Two token ids per character, in part random."""
    return [t for c in caption for t in (ord(c), rng.randrange(1, 1000))]


class Toy:
    """n noisy pictures with their index in the first pixel; `broken` and `mute` ones have no picture or no caption."""

    name, classes, captioned = "toy", None, True

    def __init__(self, n=50, broken=(), mute=()):
        self.n, self.broken, self.mute = n, set(broken), set(mute)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        captions = ["", "  \n"] if i in self.mute else [f"caption {'x' * k} of {i}" for k in range(4)]
        return sources.Sample(
            b"" if i in self.broken else np.asarray(picture(i, 20, 20)), captions, i % 7, f"toy-{i}"
        )


def loader_of(dataset, batch_size=8, **options):
    return Loader(dataset, {"a": ToyView(), "b": ToyView(-1)}, {"text": toy_text}, batch_size, **options)


def flat(batch):
    """{name: tensor} of a batch, whatever the depth."""
    if torch.is_tensor(batch):
        return {"": batch}
    return {f"{key}.{name}": part for key, value in batch.items() for name, part in flat(value).items()}


def same(first, second):
    first, second = flat(first), flat(second)
    form = {k: (v.dtype, v.stride()) for k, v in first.items()}
    return form == {k: (v.dtype, v.stride()) for k, v in second.items()} and all(
        torch.equal(first[k], second[k]) for k in first
    )


def test_batch():
    ((step, batch),) = loader_of(Toy(), seed=3).batches(2, 3)
    assert step == 2 and set(batch) == {"index", "label", "a", "b", "text", "params"}
    assert batch["index"].dtype == torch.int64 and torch.equal(batch["label"], batch["index"] % 7)
    loader = loader_of(Toy(), seed=3, device="meta")  # for a GPU: the views are called there
    before = loader.collate([loader[item] for item in next(loader.order(2, 3))])
    pixels, draw, params = before["pixels"]["a"], before["params"]["a"], batch["params"]
    assert pixels.shape == (8, 3, 16, 16) and pixels.dtype == torch.uint8
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    for name, view in loader.views.items():
        assert batch[name].dtype == torch.float32
        assert torch.equal(batch[name], view(before["pixels"][name], before["params"][name]))
    assert draw.keys() == params["a"].keys() and all(torch.equal(draw[k], params["a"][k]) for k in draw)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in draw.items()} == {
        "flip": (torch.bool, (8,)), "sigma": (torch.float32, (8,)), "order": (torch.int64, (8, 4)),
        "turn": (torch.int64, (8,)), "mask": (torch.float32, (8, 3))}  # fmt: skip
    assert not torch.equal(batch["a"], batch["b"]) and not torch.equal(draw["sigma"], params["b"]["sigma"])
    # every sample by itself: one generator per view, text and choice of caption
    for row, index in enumerate(batch["index"].tolist()):
        image, captions = decode(Toy()[index].image), Toy()[index].captions
        rng = random.Random(f"3 0 {index} b")
        assert torch.equal(before["pixels"]["b"][row], ToyView().crop(image, rng))
        assert params["b"]["sigma"][row].item() == torch.tensor(ToyView().sample(rng)["sigma"]).item()
        caption = random.Random(f"3 0 {index} caption").choice(captions)
        ids = toy_text(caption, random.Random(f"3 0 {index} text"))
        padded = ids + [0] * (batch["text"].shape[1] - len(ids))
        assert batch["text"][row].tolist() == padded
    longest = int((batch["text"] > 0).sum(1).max())
    assert batch["text"].dtype == torch.int64 and batch["text"].shape[1] == longest


def test_text_is_not_padded_beyond_the_context():
    class Tokenizer:
        context_length = 9

        def __call__(self, caption, rng=None):
            return list(range(1, 10))

    samples = [{"index": 0, "label": -1, "skipped": {}, "t": list(range(1, n + 1))} for n in (9, 4, 1)]
    for device in ("cpu", "cuda"):  # on a GPU to a multiple of 8, for few lengths
        loader = Loader(Toy(), {}, {"t": Tokenizer()}, 4, device=device)
        assert loader.collate(samples)["t"].shape == (3, 9)
        assert loader.collate(samples[1:])["t"].shape == (2, 4 if device == "cpu" else 8)


def test_captions_and_crops_change_from_epoch_to_epoch():
    loader = loader_of(Toy(8), 8)
    seen = [batch for _, batch in loader.batches(0, 6)]
    rows = [{int(i): batch["text"][k].tolist() for k, i in enumerate(batch["index"])} for batch in seen]
    lengths = [{i: sum(t > 0 for t in row) for i, row in epoch.items()} for epoch in rows]
    assert len({tuple(sorted(epoch.items())) for epoch in lengths}) > 1
    assert len({batch["a"].sum().item() for batch in seen}) == 6


@pytest.mark.parametrize("kind", ["toy", "tars"])
def test_any_number_of_workers_gives_the_same_batches(kind, tmp_path):
    dataset = Toy(50, broken=[3, 4, 17], mute=[20])
    if kind == "tars":
        captions = [f"text {i}" for i in range(40)]
        for i in range(2):
            shard(tmp_path / f"{i}.tar", captions[20 * i : 20 * i + 20])
        dataset = open_dataset(str(tmp_path))
        dataset[0]  # the workers inherit open files
    runs = []
    for workers in (0, 2):
        loader = loader_of(dataset, workers=workers)
        runs.append([(batch, loader.bad) for _, batch in loader.batches(0, 2 * loader.steps_per_epoch)])
    assert len(runs[0]) == len(runs[1]) >= 10
    assert all(same(x, y) and bad == worse for (x, bad), (y, worse) in zip(*runs))


def test_who_calls_the_views():
    """Small ones a worker, where a CPU trains and there are workers; else the process that trains."""

    class Signed(ToyView):
        def __call__(self, x, draw):
            return torch.full(x.shape, float(os.getpid()))

    def called(device="cpu", size=16, **options):
        view = Signed()
        view.size = size
        loader = Loader(Toy(), {"a": view}, {}, 8, device=device, **options)
        return next(loader.batches(0, 1))[1]["a"][0, 0, 0, 0].item()

    assert called() == os.getpid() != called(workers=2) > 0
    assert called("meta", workers=2) == os.getpid()  # it stands for a GPU
    assert called(size=64, workers=2) != os.getpid() == called(size=65, workers=2)


def test_room_for_floats(monkeypatch):
    """Where /dev/shm is small, workers hand over bytes, and the process that trains calls the views."""
    batches = []
    for free in (10**9, 10**4):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: types.SimpleNamespace(free=free))
        loader = loader_of(Toy(), workers=2)
        assert ("pixels" in loader.collate([loader[0, 1]])) == (free < 10**5)
        batches.append([batch for _, batch in loader.batches(0, 3)])
    assert all(torch.equal(a[name], b[name]) for a, b in zip(*batches) for name in ("a", "b"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux tells which files are open")
def test_a_batch_of_many_crops_takes_few_open_files():
    """Two tensors and one for each view: what was drawn for a view, here five tensors, comes without a file."""
    loader = Loader(Toy(), {f"view{i}": ToyView() for i in range(10)}, {}, 8, workers=2)
    kept, before = [], len(os.listdir("/proc/self/fd"))
    for _, batch in loader.batches(0, 5):
        kept.append(batch)
        opened = len(os.listdir("/proc/self/fd")) - before
    assert len(kept) * 12 <= opened < len(kept) * 12 + 40  # and some of the workers
    assert torch.is_tensor(batch["params"]["view0"]["order"])


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_left_alone(workers):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    list(loader_of(Toy(), workers=workers).batches(0, 7))
    assert state() == before


def test_processes_take_slices_of_the_same_batch(monkeypatch):
    whole = [batch for _, batch in loader_of(Toy(50, broken=[9]), 12).batches(3, 9)]
    for world in (2, 4):
        monkeypatch.setattr(data, "world_size", lambda world=world: world)
        parts = []
        for rank in range(world):
            monkeypatch.setattr(data, "rank", lambda rank=rank: rank)
            parts.append([batch for _, batch in loader_of(Toy(50, broken=[9]), 12).batches(3, 9)])
        for step, batch in enumerate(whole):
            joined = [flat(part[step]) for part in parts]
            for name, value in flat(batch).items():
                pieces = [p[name] for p in joined]
                if name == "text.":  # padded to the longest of each part
                    pieces = [torch.nn.functional.pad(p, (0, value.shape[1] - p.shape[1])) for p in pieces]
                assert torch.equal(torch.cat(pieces), value), name


def test_epochs_are_permutations_without_a_pause():
    loader = loader_of(Toy(50), 8, seed=5)
    assert loader.steps_per_epoch == 6
    steps, batches = zip(*loader.batches(0, 18))
    order = torch.stack([b["index"] for b in batches]).view(3, 48)
    assert steps == tuple(range(18)) and all(len(set(epoch.tolist())) == 48 for epoch in order)
    assert len({tuple(epoch.tolist()) for epoch in order}) == 3 and order[0].tolist() != sorted(
        order[0].tolist()
    )
    other = torch.stack([b["index"] for _, b in loader_of(Toy(50), 8, seed=6).batches(0, 6)])
    assert other.flatten().tolist() != order[0].tolist()


def test_the_order_of_one_epoch_is_held_at_a_time():
    n = 100_000
    loader = loader_of(Toy(n), 100)
    tracemalloc.start()
    steps = sum(1 for _ in loader.order(0, 2 * loader.steps_per_epoch + 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert steps == 2001 and peak < 12 * n


@pytest.mark.parametrize("start", [1, 5, 6, 7, 13])
def test_restart_at_a_step(start):
    whole = dict(loader_of(Toy()).batches(0, 15))
    for step, batch in loader_of(Toy(), workers=1 if start == 7 else 0).batches(start, 15):
        assert same(batch, whole[step])
    assert step == 14


def test_bad_samples_are_replaced_counted_and_named_once(capfd):
    loader = loader_of(Toy(400, broken=[7, 8], mute=[30]), 40, workers=2)
    clean = loader_of(Toy(400), 40)
    for (step, batch), (_, expected) in zip(loader.batches(0, 20), clean.batches(0, 20)):
        replaced = {7: 9, 8: 9, 30: 31}
        assert batch["index"].tolist() == [replaced.get(i, i) for i in expected["index"].tolist()]
        good = batch["index"] == expected["index"]
        assert torch.equal(batch["a"][good], expected["a"][good])
        loader.check_bad()
        if step % 10 == 9:
            assert loader.bad == 3
    named = capfd.readouterr().err.strip().split("\n")
    broken = "broken image (cannot identify image file)"
    expected = ["toy-30: no caption", f"toy-7: {broken}", f"toy-8: {broken}"]
    assert sorted(re.search(r"toy-\d+: .*", line)[0] for line in named) == expected


def test_captions_do_not_matter_where_there_are_no_texts():
    loader = Loader(Toy(20, mute=range(20)), {"a": ToyView()}, {}, 4)
    assert len(list(loader.batches(0, 5))) == 5 and loader.bad == 0


def test_an_empty_caption_may_be_drawn_when_another_is_not():
    class TitleOnly(Toy):
        def __getitem__(self, i):
            return super().__getitem__(i)._replace(captions=["title", ""])

    lengths = {
        int((row > 0).sum()) for _, batch in loader_of(TitleOnly()).batches(0, 6) for row in batch["text"]
    }
    assert lengths == {0, 10}


def test_long_and_strange_captions():
    class Strange(Toy):
        def __getitem__(self, i):
            return super().__getitem__(i)._replace(captions=["a" * 10000 if i % 2 else "\x00\ud7ff😀\n"])

    widths = {batch["text"].shape[1] for _, batch in loader_of(Strange()).batches(0, 6)}
    assert widths == {20000}


@pytest.mark.parametrize("n, broken, stops", [(400, 4, False), (400, 5, True), (50, 1, False), (50, 2, True)])
def test_more_than_one_percent_of_bad_samples(n, broken, stops, capfd):
    """1% of 400 are 4; of fewer than 100, one may be bad."""
    bad = list(range(10, 10 + 3 * broken, 3))
    loader = loader_of(Toy(n, broken=bad), 10)
    for _ in loader.batches(0, loader.steps_per_epoch + 1):  # the next epoch has begun
        pass
    if stops:
        with pytest.raises(
            UserError, match=rf"{broken} samples of toy are bad, over 1% of an epoch: toy-\d+: bro.*; remove such rows or files"
        ):
            loader.check_bad()
    else:
        loader.check_bad()


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_bad_samples(workers):
    with pytest.raises(
        UserError, match="none of 100 samples of toy is usable: toy-[0-9]+: broken image"
    ) as error:
        list(loader_of(Toy(200, broken=range(200)), workers=workers).batches(0, 3))
    assert "\n" not in str(error.value)


def fail(error):
    raise error


def killed():
    """The first of the workers."""
    if torch.utils.data.get_worker_info().id == 0:
        os.kill(os.getpid(), signal.SIGKILL)


FULL = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


@pytest.mark.parametrize("go_wrong, sentence", [
    (lambda: fail(RuntimeError(FULL)), "can't allocate memory: you tried to allocate 9 bytes.: lower --batch-size"),
    (lambda: fail(MemoryError()), "out of memory: lower --batch-size"),
    (lambda: fail(MemoryError("bad allocation")), "bad allocation: lower --batch-size"),
    (killed, "a loader worker died"),
])  # fmt: skip
def test_where_a_worker_fails_all_have_ended_and_its_reason_is_said(monkeypatch, go_wrong, sentence):
    """A run saves its state then, and the workers would take up the memory and the files that it lacks."""
    before = set(multiprocessing.active_children())
    monkeypatch.setattr(Toy, "__getitem__", lambda *_: go_wrong() or sources.Sample(np.asarray(picture(0)), ["x"], 0, "toy"))
    try:
        list(loader_of(Toy(), workers=2).batches(0, 3))
    except UserError as error:  # pytest.raises would hold it, and with it all that its frames hold
        assert str(error).startswith(sentence)
        assert set(multiprocessing.active_children()) <= before
    else:
        pytest.fail("nothing was raised")


def test_what_a_loader_refuses(monkeypatch):
    with pytest.raises(UserError, match="toy has 50 samples, less than a batch of 51"):
        loader_of(Toy(50), 51)
    monkeypatch.setattr(data, "world_size", lambda: 3)
    with pytest.raises(UserError, match="batch size 8 cannot be divided among 3 processes"):
        loader_of(Toy(50), 8)
    monkeypatch.undo()
    toy = Toy(50)
    toy.captioned = False
    with pytest.raises(UserError, match="toy has no captions"):
        loader_of(toy)


def test_waiting_is_measured(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("data.time.perf_counter", lambda: clock[0])

    class Slow(Toy):
        def __getitem__(self, i):
            clock[0] += 0.01
            return super().__getitem__(i)

    loader = loader_of(Slow(), 5)
    for _ in loader.batches(0, 4):
        clock[0] += 0.05  # the time of a step is not waiting
    assert loader.wait == pytest.approx(4 * 5 * 0.01)


def test_workers_do_not_react_to_signals():
    """Ctrl-C and SIGTERM reach every process of a terminal or job; only the main one is to say something."""
    code = """
import signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from test_data import Toy, loader_of
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; a job in the background ignores it
for step, batch in loader_of(Toy(), workers=2).batches(0, 10**6):
    if step == 3: print("running", flush=True)
    if stop: print("stopped at a step", flush=True); stop.clear()
"""
    code = code.format(root=str(ROOT), tests=str(ROOT / "tests"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    assert process.stdout.readline() == "running\n"
    os.killpg(process.pid, signal.SIGTERM)
    assert process.stdout.readline() == "stopped at a step\n"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)  # it ends, and its workers with it
    assert (
        process.returncode != 0 and err.count("Traceback") == 1 and err.strip().endswith("KeyboardInterrupt")
    ), err


# ------------------------------------------------ docs/data.md ------------------------------------------------
def test_conversions_in_the_docs(tmp_path, monkeypatch):
    """Every Python script of docs/data.md, and the shell commands that need no internet, on small files."""
    text = (ROOT / "docs/data.md").read_text()
    photos, yfcc, there, npy, redcaps, vocabulary = re.findall(r"```python\n(.*?)```", text, re.S)
    (pack,) = [c for c in re.findall(r"```bash\n(.*?)```", text, re.S) if "part." in c]
    monkeypatch.chdir(tmp_path)

    def dataset(name):
        opened = open_dataset(name)
        return [opened[i] for i in range(len(opened))]

    pictures_in(tmp_path / "photos", [f"a_dog_{i}.jpg" for i in range(N)])
    exec(photos, {})
    assert [(s.image, s.captions) for s in dataset("photos")] == [(JPEG[i], [f"a dog {i}"]) for i in range(N)]

    (tmp_path / "photos/train.jsonl").unlink()
    for i in range(N):
        (tmp_path / f"photos/a_dog_{i}.txt").write_text(f"dog {i}\n")
    subprocess.run(["bash", "-ec", pack.replace("/tmp/part", "../part").replace("20000", "4")], check=True)
    assert len(list((tmp_path / "photos").glob("train-*.tar"))) == 3
    assert [(s.image, s.captions) for s in dataset("photos")] == [(JPEG[i], [f"dog {i}"]) for i in range(N)]

    lines = [
        [str(10 + i), *"abcdefg", f"T%C3%A9+{i}", f"see+%3Ca+href%3D1%3Ethis%3C/a%3E+http://x+{i}"]
        for i in range(4)
    ]
    lines[2][8:] = ["www.x", "%3Cb%3E%3C/b%3E"]
    lines = ["\t".join([*line, *"hijklm", f"http://pictures/{line[0]}.jpg", "more"]) for line in lines]
    (tmp_path / "yfcc100m_dataset.txt").write_text("\n".join(lines))
    (tmp_path / "yfcc100m_subset_data.tsv").write_text("".join(f"{n}\tid\thash\n" for n in (10, 12, 13, 99)))
    exec(yfcc, {})
    expected = [(10, "Té 0", "see this 0"), (13, "Té 3", "see this 3")]
    assert pickle.loads((tmp_path / "yfcc15m.pkl").read_bytes()) == expected
    assert list(csv.reader(open("yfcc15m.csv")))[1:] == [
        [f"http://pictures/{n}.jpg", *texts] for n, *texts in expected
    ]
    np.save("flickr_unique_ids.npy", np.array([13, 14]))
    exec(there, {})
    (tmp_path / "images/00").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "images/00/000.zip", "w") as archive:
        archive.writestr("013.jpg", JPEG[3])
    assert [(s.image, s.captions) for s in dataset(".")] == [(JPEG[3], ["Té 3", "see this 3"])]

    pictures_in(tmp_path / "cc3m")
    np.save("cc3m.npy", np.array([{"image_id": f"{i}.jpg", "captions": CAPTIONS[i]} for i in range(N)]))
    exec(npy, {})
    (tmp_path / "train.jsonl").rename(tmp_path / "cc3m/train.jsonl")
    assert [(s.image, s.captions) for s in dataset("./cc3m")] == list(zip(JPEG, CAPTIONS))

    pictures_in(tmp_path / "data/redcaps/aww")
    (tmp_path / "annotations").mkdir()
    rows = [{"image_id": str(i), "subreddit": "aww", "caption": CAPTIONS[i][0]} for i in range(N)]
    (tmp_path / "annotations/aww_2020.json").write_text(json.dumps({"annotations": rows}))
    exec(redcaps, {})
    assert [(s.image, s.captions) for s in dataset("redcaps")] == [
        (JPEG[i], CAPTIONS[i][:1]) for i in range(N)
    ]

    (tmp_path / "captions.txt").write_text("ein Hund läuft\nzwei Hunde laufen\n", encoding="utf-8")
    exec(vocabulary, {})
    tokenizer = Tokenizer("tokenizer.json", vocab_size=250_000)
    ids = tokenizer("läuft ein Hund")
    assert tokenizer.bpe.decode(ids[1:-1]).strip() == "läuft ein hund"
    assert len(ids) < len(Tokenizer("train", captions=())("läuft ein Hund"))


def test_example_in_the_docs():
    text = (ROOT / "docs/data.md").read_text()
    command, output = re.search(r"```bash\npython -c \"(.*?)\"\n```\n\n```\n(.*?)\n```", text, re.S).groups()
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == output
