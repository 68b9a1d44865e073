"""What nobody wishes for and somebody meets: files that are left out, tables with stray quotes, pipes
as pictures, a full /dev/shm, dead workers, closed terminals, launchers that set half of what they
should. Nothing is left out without a count, and nothing hangs."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import layouts
import trouble
from common import UserError, init_distributed, user_errors
from data import Loader, Tokenizer, clip_bpe, decode, open_dataset, share
from run import RANGES, load_checkpoint, parse_args
from runs import METHODS, ROOT, argv_of, environment, make_photos, module_of, rows, train_here
from server import Program
from test_bad_input import assert_sentence, losses_of, run_of, wait_for_rows


def picture(i=0, form="JPEG", size=(8, 6), **options):
    noise = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, form, **options)
    return file.getvalue()


JPEG = [picture(i) for i in range(8)]


def write(folder, names):
    """Pictures under these names, told apart by the digit in the name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digit = re.search(r"\d", name)
        path.write_bytes(JPEG[int(digit[0]) if digit else 0])
    return folder


def opened(path, capsys, **options):
    """-> dataset and what was said about files that are left out."""
    capsys.readouterr()
    dataset = open_dataset(str(path), **options)
    return dataset, capsys.readouterr().err


# -------------------------------------------- samples that vanish --------------------------------------------
def karpathy(folder, names, splits):
    images = [{"filename": name, "split": split, "sentences": [{"raw": name}]} for name, split in zip(names, splits)]
    folder.mkdir(exist_ok=True)
    (folder / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    return folder


def test_karpathys_pictures_may_come_later_and_the_first_be_missing(tmp_path):
    folder = karpathy(tmp_path / "set", ["0.jpg", "1.jpg", "2.jpg", "3.jpg"], ["train", "restval", "train", "val"])
    assert len(open_dataset(str(folder))) == 3  # the index is made, and no picture is there
    write(folder / "Images", ["1.jpg", "2.jpg", "3.jpg"])
    write(folder / "a folder before it", ["7.jpg"])
    dataset = open_dataset(str(folder))
    assert [dataset[i].image for i in (1, 2)] == JPEG[1:3] and dataset[2].captions == ["2.jpg"]
    with pytest.raises(FileNotFoundError, match="Images/0.jpg"):
        dataset[0]
    with pytest.raises(UserError, match="the split dev is none of train, restval, val and test"):
        open_dataset(str(karpathy(tmp_path / "other", ["0.jpg", "1.jpg"], ["train", "dev"])))


def test_captions_of_images_that_are_not_listed(tmp_path):
    (tmp_path / "annotations").mkdir()
    table = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": i, "caption": "a"} for i in (1, 7)]}
    (tmp_path / "annotations/captions_train2017.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match="captions of image 7, which is not among its images"):
        open_dataset(str(tmp_path))


def test_runs_within_the_data_are_no_pictures(tmp_path, capsys):
    write(tmp_path / "set", ["cat/0.jpg", "dog/1.jpg", "runs/a/views.png", "runs/a/curves.png"])
    for name in ("args.json", "metrics.jsonl"):
        (tmp_path / "set/runs/a" / name).write_text("{}")
    dataset, said = opened(tmp_path / "set", capsys)
    assert dataset.classes == ["cat", "dog"] and len(dataset) == 2 and "1 left out (1 folders of runs)" in said


@pytest.mark.parametrize("folders", ["train Train", "train training", "train val validation"])
def test_two_folders_for_one_split(tmp_path, folders):
    folders = folders.split()
    write(tmp_path, [f"{name}/{i}.jpg" for name in folders for i in (1, 2)])
    with pytest.raises(UserError, match=f"has the folders ({folders[-1]} and .*|.* and {folders[-1]}) for one split: keep one"):
        open_dataset(str(tmp_path))


def test_files_beside_a_split_are_counted(tmp_path, capsys):
    write(tmp_path, ["train/0.jpg", "train/1.jpg", "2.jpg", "val/3.jpg"])
    for name in ("captions.csv", "classnames.txt"):
        (tmp_path / name).write_text("a")
    assert "2 left out (2 files beside train)" in opened(tmp_path, capsys)[1]


def test_lines_without_a_tab_are_counted(tmp_path, capsys):
    (tmp_path / "texts.tsv").write_text("k1\ta dog\nno tab\n\nk2\ta cat\n")
    assert [text for *_, text in layouts.text_rows(str(tmp_path / "texts.tsv"))] == ["a dog", "a cat"]
    assert "texts.tsv: 1 lines without a tab are left out" in capsys.readouterr().err


@pytest.mark.parametrize("row, captions", [
    ({"captions": ["", "  "], "title": "a title"}, ["a title"]),
    ({"caption": " ", "text": "a text"}, ["a text"]),
    ({"captions": ["a", None, ""], "title": "a title"}, ["a", ""]),
    ({"title": None, "description": " "}, []),
    ({"caption": "half an emoji \ud83d"}, ["half an emoji ?"]),
])  # fmt: skip
def test_the_first_column_with_a_text_counts(row, captions):
    assert layouts.captions_of(row) == captions


def test_an_index_that_was_copied_in_part_is_made_again(tmp_path):
    path = table(tmp_path, "image,caption\n" + "".join(f"{i}.jpg,number {i}\n" for i in range(8)))
    assert len(open_dataset(str(path))) == 8
    index = tmp_path / "pairs.csv.idx"
    for end in range(30, index.stat().st_size, 10):
        os.truncate(index, end)
        assert len(open_dataset(str(path))) == 8, end


def test_a_file_of_the_users_own_is_no_index(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = table(tmp_path, "image,caption\n0.jpg,a dog\n")
    (tmp_path / "pairs.csv.idx").write_text("mine")
    for _ in range(2):
        assert open_dataset(str(path))[0].captions == ["a dog"]
    assert (tmp_path / "pairs.csv.idx").read_text() == "mine" and len(list((tmp_path / "home").rglob("*.idx"))) == 1


def test_a_folder_may_be_called_like_an_archive(tmp_path):
    dataset = open_dataset(str(write(tmp_path / "photos.zip", ["a.zip/0.jpg", "b/1.jpg"])))
    assert [dataset[i].image for i in range(2)] == JPEG[:2]


def test_lists_of_classes(tmp_path):
    table(tmp_path, "image,label\n0.jpg,cat\n1.jpg,dog\n")
    (tmp_path / "classnames.txt").write_text("cat \n dog\n")
    dataset = open_dataset(str(tmp_path))
    assert dataset.classes == ["cat", "dog"] and [dataset[i].label for i in range(2)] == [0, 1]
    write(tmp_path / "folders", ["cat/0.jpg", "dog/1.jpg"])
    (tmp_path / "folders/imagenet_class_index.json").write_text('{"0": "cat", "1": "dog"}')
    with pytest.raises(UserError, match="no WordNet id beside cat: put the names of the classes into a classnames.txt"):
        open_dataset(str(tmp_path / "folders"))


def test_files_beside_pictures_are_counted(tmp_path, capsys):
    write(tmp_path / "set", ["0.jpg", "1.jfif", "2.PNG"])
    for name in ("a.heic", "b.heic", "a.txt", ".DS_Store", "noending"):
        (tmp_path / "set" / name).write_text("?")
    dataset, said = opened(tmp_path / "set", capsys)
    assert len(dataset) == 3 and said.startswith("set train: 3 samples; 5 left out (")
    for part in ("2 heic: Pillow cannot read them", "1 txt", "1 hidden", "1 without an ending"):
        assert part in said, said
    (tmp_path / "set" / "a.txt").unlink()
    for path in (tmp_path / "set").glob("[0-9]*"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds no pictures for train \(4 left out \(2 heic"):
        open_dataset(str(tmp_path / "set"))


def test_nothing_is_said_when_nothing_is_left_out(tmp_path, capsys):
    assert not opened(write(tmp_path, ["0.jpg", "1.jpg"]), capsys)[1]
    assert not opened("shapes", capsys)[1]


def test_pictures_that_this_pillow_cannot_read(tmp_path, capsys, monkeypatch):
    write(tmp_path, ["0.jpg", "1.avif"])
    layouts.readable.cache_clear()
    endings = {key: value for key, value in Image.registered_extensions().items() if key != ".avif"}
    monkeypatch.setattr(layouts.Image, "registered_extensions", lambda: endings)
    dataset, said = opened(tmp_path, capsys)
    layouts.readable.cache_clear()
    assert len(dataset) == 1 and "(1 avif: Pillow cannot read them)" in said


def test_hidden_folders_are_no_classes(tmp_path, capsys):
    names = ["cat/0.jpg", "dog/1.jpg", ".ipynb_checkpoints/2.jpg", "dog/.hidden/3.jpg", "dog/._4.jpg"]
    dataset, said = opened(write(tmp_path, names), capsys)
    assert dataset.classes == ["cat", "dog"] and len(dataset) == 2
    assert "3 left out (3 hidden)" in said


def test_linked_folders_are_visited_once(tmp_path, capsys):
    """A link to the folder itself, to one around it, to a part of it that sorts behind the link; and
    to a folder elsewhere, which belongs to the set, but once."""
    write(tmp_path / "set", ["cat/0.jpg", "dog/1.jpg"])
    write(tmp_path / "elsewhere", ["2.jpg", "more/3.jpg"])
    links = {"cat/loop": "set", "dog/up": "", "bird": "set/dog", "owl": "elsewhere", "zoo": "elsewhere"}
    for link, target in links.items():
        (tmp_path / "set" / link).symlink_to(tmp_path / target)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    dataset, said = opened(tmp_path / "set", capsys)
    assert sorted(dataset[i].image for i in range(len(dataset))) == sorted(JPEG[:4])
    assert dataset.classes == ["cat", "dog", "owl"]
    assert "5 left out (5 linked folders that are here already)" in said


def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path, monkeypatch):
    write(tmp_path, ["a/0.jpg", "b/1.jpg"])
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot be read: .*Permission denied.*b"):
        open_dataset(str(tmp_path))


def shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_members_of_a_shard_are_samples_or_counted(tmp_path, capsys):
    bmp, gif = picture(0, "BMP"), picture(1, "GIF")
    members = [("0.bmp", bmp), ("0.txt", b"\xef\xbb\xbfa dog"), ("1.gif", gif), ("2.JFIF", JPEG[2]),
               ("3.v2.jpg", JPEG[3]), ("._4.jpg", b"?"), ("5.heic", b"?"), ("6.txt", b"no picture"),
               ("7.jpg", JPEG[7]), ("7.jpg", JPEG[6])]  # fmt: skip
    shard(tmp_path / "a.tar", members)
    write(tmp_path, ["beside.jpg"])
    (tmp_path / "b.tar.gz").write_text("?")
    for _ in range(2):  # the second time from the index
        dataset, said = opened(tmp_path, capsys)
        assert [dataset[i].image for i in range(len(dataset))] == [bmp, gif, JPEG[2], JPEG[6]]
        assert dataset[0].captions == ["a dog"]
        assert "4 samples; 7 left out (" in said, said
        for part in ("1 with a second dot", "1 hidden", "1 heic: Pillow cannot read them", "1 without a picture",
                     "1 of a name that comes again", "1 jpg", "1 gz"):  # fmt: skip
            assert part in said, said


def test_a_second_archive_behind_the_first(tmp_path, capsys):
    """cat a.tar b.tar > both.tar, whose samples may have the same names."""
    parts = [shard(tmp_path / f"{i}.tar", [("0.jpg", JPEG[i]), ("1.jpg", JPEG[i + 1])]) for i in (0, 2)]
    both = tmp_path / "set" / "both.tar"
    both.parent.mkdir()
    both.write_bytes(b"".join(part.read_bytes() for part in parts) + bytes(2**21))
    dataset, said = opened(both, capsys)
    assert [dataset[i].image for i in range(len(dataset))] == JPEG[:4] and not said
    both.write_bytes(both.read_bytes() + b"something else".ljust(1024, b"?"))
    with pytest.raises(UserError, match="both.tar cannot be read"):
        open_dataset(str(both))


def table(folder, text, name="pairs.csv"):
    write(folder, [f"{i}.jpg" for i in range(6)])
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


STRAY = [
    ('image,caption\n0.jpg,"a dog\n1.jpg,a cat\n2.jpg,a "cow"\n', "line"),  # never closed
    ('image,caption\n0.jpg,"a dog\n1.jpg,a cat"\n2.jpg,a cow\n', "ends in line 3"),  # two rows in one text
    ('image,caption\n0.jpg,"big" dog\n1.jpg,a cat\n', "line 2"),
    ("image,caption\n0.jpg,a dog, wet\n1.jpg,a cat\n", "line 2 has 3 fields, the header 2"),
    ("image,caption\n0.jpg,a dog\n1.jpg\n", "line 3 has 1 fields, the header 2"),
]


@pytest.mark.parametrize("ending, delimiter", [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("text, where", STRAY)
def test_a_table_with_a_stray_quote_is_refused(tmp_path, ending, delimiter, text, where):
    path = table(tmp_path, text.replace(",", delimiter), f"pairs.{ending}")
    with pytest.raises(UserError, match=f"pairs.{ending} cannot be read: .*{where}.* in quotes") as error:
        open_dataset(str(path))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.idx*"))


def test_captions_that_are_not_utf8_are_counted(tmp_path, capsys):
    """They stay, with U+FFFD in place of letters that are lost."""
    latin, utf8 = "a café".encode("latin-1"), "a café".encode()
    write(tmp_path, ["0.jpg", "1.jpg", "2.jpg"])
    rows = [b"image,caption", b"0.jpg," + latin, b"1.jpg," + utf8, b"2.jpg," + latin]
    (tmp_path / "t.csv").write_bytes(b"\n".join(rows) + b"\n")
    members = [("0.jpg", JPEG[0]), ("0.txt", latin), ("1.jpg", JPEG[1]), ("1.txt", utf8), ("2.jpg", JPEG[2]), ("2.txt", latin)]
    shard(tmp_path / "set" / "a.tar", members)
    for path in (tmp_path / "t.csv", tmp_path / "set"):
        for _ in range(2):  # the second time from the index
            dataset, said = opened(path, capsys)
            assert [dataset[i].captions for i in range(3)] == [["a caf\ufffd"], ["a café"], ["a caf\ufffd"]]
            assert f"{path.name}: 2 texts have U+FFFD in place of letters that are lost" in said
            assert len(said.splitlines()) == 1 and "left out" not in said, said
    (tmp_path / "texts.tsv").write_bytes(b"0\t" + latin + b"\n1\t" + utf8 + b"\n")
    assert layouts.text_rows(str(tmp_path / "texts.tsv"))[1] == (1, "1", "a café")
    assert "texts.tsv: 1 texts have U+FFFD" in capsys.readouterr().err
    (tmp_path / "t.csv").write_bytes(rows[0] + b"\n" + rows[2] + b"\n")
    assert not opened(tmp_path / "t.csv", capsys)[1]


def test_a_table_that_is_right(tmp_path):
    """Spaces after commas, a byte order mark, texts of several lines, quotes within and an empty line."""
    captions = ["a dog, wet", 'a "cat"', "two\nlines, of prose", 'a 5" nail', "ends"]
    lines = ["\ufeffimage, caption", '0.jpg, "a dog, wet"', '1.jpg, "a ""cat"""', '2.jpg,"two\nlines, of prose"',
             '3.jpg,a 5" nail', "", "4.jpg, ends"]  # fmt: skip
    dataset = open_dataset(str(table(tmp_path, "\n".join(lines))))
    assert [dataset[i].captions for i in range(len(dataset))] == [[caption] for caption in captions]
    with open(tmp_path / "pairs.csv", "w", newline="") as file:  # as Python writes it
        csv.writer(file).writerows([["image", "caption"], *[[f"{i}.jpg", c] for i, c in enumerate(captions)]])
    dataset = open_dataset(str(tmp_path / "pairs.csv"))
    assert [dataset[i].captions for i in range(len(dataset))] == [[caption] for caption in captions]


def test_an_index_of_an_older_version_is_made_again(tmp_path):
    path = table(tmp_path, "image,caption\n0.jpg,a dog\n")
    status = path.stat()
    old = [[status.st_size, status.st_mtime_ns], {"image": "1.jpg", "captions": ["swallowed"]}]
    (tmp_path / "pairs.csv.idx").write_text("".join(json.dumps(row) + "\n" for row in old))
    assert open_dataset(str(path))[0].captions == ["a dog"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("indent", [None, 1])
def test_json_lines_that_are_an_array(tmp_path, mark, indent):
    content = [{"image": f"{i}.jpg", "caption": f"number {i}"} for i in range(3)]
    path = table(tmp_path, mark + json.dumps(content, indent=indent), "pairs.jsonl")
    dataset = open_dataset(str(path))
    assert [dataset[i].captions for i in range(len(dataset))] == [[f"number {i}"] for i in range(3)]
    path.write_text(json.dumps([["0.jpg", "no object"]]))
    with pytest.raises(UserError, match="element 0 of the array is not a JSON object"):
        open_dataset(str(path))
    path.write_text('["0.jpg", "a"]\n["1.jpg", "b"]\n')
    with pytest.raises(UserError, match="pairs.jsonl cannot be read"):
        open_dataset(str(path))


def test_json_lines_with_a_byte_order_mark(tmp_path):
    path = table(tmp_path, '\ufeff{"image": "0.jpg", "caption": "é"}\n  \n{"image": "1.jpg"}\n', "pairs.jsonl")
    dataset = open_dataset(str(path))
    assert len(dataset) == 2 and dataset[0].captions == ["é"] and dataset[0].image == JPEG[0]


@pytest.mark.parametrize("name", ["x.tar.gz", "rows.json", "0.jpg", "weights.pt", "pipe", "/dev/zero"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_file_of_unknown_kind_is_refused(tmp_path, name, split):
    """What lies beside it is not taken in its place."""
    write(tmp_path, ["0.jpg", "1.jpg"])
    for file in ("x.tar.gz", "rows.json", "weights.pt"):
        (tmp_path / file).write_text("?")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name)) + " is no folder and none of the files"):
        open_dataset(str(tmp_path / name), split=split)


def test_flickr8k_as_kaggle_has_it(tmp_path):
    write(tmp_path / "flickr8k" / "Images", ["0.jpg", "1.jpg"])
    text = "image,caption\n" + "".join(f'{i}.jpg,"{c} , {i}"\n' for i in (0, 1) for c in "ab")
    (tmp_path / "flickr8k" / "captions.txt").write_text(text)
    dataset = open_dataset("flickr8k", tmp_path)
    assert dataset.captioned and dataset.name == "flickr8k" and len(dataset) == 2
    assert dataset[1].captions == ["a , 1", "b , 1"] and dataset[1].image == JPEG[1]
    with pytest.raises(UserError, match="has no val split"):
        open_dataset("flickr8k", tmp_path, "val")


# -------------------------------------------- pictures --------------------------------------------
@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photos_stand_upright(turn, form):
    """EXIF orientations 1 to 8 of a picture whose upper left corner is red and whose right is blue."""
    seen = np.full((32, 48, 3), 255, np.uint8)
    seen[:16, :16], seen[:, 32:] = (255, 0, 0), (0, 0, 255)
    back = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}[turn]  # fmt: skip
    held, exif, file = Image.fromarray(seen), Image.Exif(), io.BytesIO()
    held = held.transpose(Image.Transpose[back]) if back else held
    exif[0x0112] = turn
    held.save(file, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    found = decode(file.getvalue()).permute(1, 2, 0).int().numpy()
    assert found.shape == seen.shape and np.abs(found - seen.astype(int)).mean() < 12


def test_damaged_exif_data_lose_no_picture():
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03"):
        assert decode(picture(exif=exif)).shape == (3, 6, 8)


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "folder", "socket"])
def test_a_pipe_or_a_device_as_a_picture_is_a_bad_sample(tmp_path, kind):
    import socket

    path = tmp_path / "0.jpg"
    with contextlib.ExitStack() as stack:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "link to a device":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        else:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(os.path.relpath(path))
        (tmp_path / "pairs.jsonl").write_text('{"image": "0.jpg", "caption": "a"}\n')
        with pytest.raises((ValueError, OSError)):
            open_dataset(str(tmp_path / "pairs.jsonl"))[0]


# -------------------------------------------- tokenizer --------------------------------------------
def test_a_tokenizer_learns_from_megabytes_without_a_space():
    began = time.process_time()
    captions = ["a" * 2_000_000, "ab" * 1_000_000, "漢" * 1_000_000, "a dog and a cat"] * 2
    bpe = clip_bpe(captions=captions, vocab_size=600)
    assert time.process_time() - began < 20 and 514 < bpe.get_vocab_size() <= 600


def test_a_caption_of_megabytes_becomes_ids():
    tokenizer = Tokenizer("train", 24, ["a dog and a cat"] * 3, 600)
    began = time.process_time()
    ids = tokenizer("word " * 400_000)
    assert len(ids) == 24 and ids == tokenizer("word " * 100)
    assert len(tokenizer("ab" * 1_000_000)) == 24 and time.process_time() - began < 20


# -------------------------------------------- arguments --------------------------------------------
@pytest.mark.parametrize("name", [*METHODS, "simclrv2"])
def test_defaults_and_recipes_lie_within_the_ranges(name):
    module = module_of(name)
    for recipe in module.RECIPES:
        parse_args(module.Args, module.RECIPES, ["--recipe", recipe])
    parse_args(module.Args, module.RECIPES, ["--data", "/some/where"])


def test_ranges_are_of_flags_that_exist():
    import command

    known = {name for method in (*METHODS, "simclrv2", "slip_ablations") for name in vars(module_of(method).Args())}
    assert set(RANGES) <= known | set(vars(command.Args()))


@pytest.mark.parametrize("name, flags, sentence", [
    ("clip", "--context-length 1", "--context-length 1 must lie between 3 and"),
    ("clip", "--vocab-size 100000000000", "--vocab-size 100000000000 must lie between"),
    ("clip", "--embed-dim 1000000000000", "--embed-dim 1000000000000 must lie between"),
    ("clip", "--beta2 1", "--beta2 1.0 must lie between 0 and 0.9999"),
    ("simclr", "--image-size 1200000", "--image-size 1200000 must lie between 8 and"),
    ("simclr", "--temperature 0", "--temperature 0.0 must lie between"),
    ("simclr", "--momentum 2", "--momentum 2.0 must lie between 0 and 1"),
    ("dino", "--drop-path 1", "--drop-path 1.0 must lie between"),
    ("byol", "--tau 5", "--tau 5.0 must lie between 0 and 1"),
])  # fmt: skip
def test_nonsense_is_refused(name, flags, sentence):
    module = module_of(name)
    with pytest.raises(UserError, match=re.escape(sentence)):
        parse_args(module.Args, module.RECIPES, flags.split())


def test_mass_of_the_evaluation():
    import command

    with pytest.raises(UserError, match="--mass 5.0 must lie between 0 and 1"):
        parse_args(command.Args, {}, ["--mass", "5"])


# -------------------------------------------- texts --------------------------------------------
def test_every_file_is_opened_as_utf8():
    """Whatever the locale: LC_ALL=C makes ASCII the default."""
    call = re.compile(r"(?<![\w.])open\((?!\))|\.read_text\(|\.write_text\(|\bos\.fdopen\(")
    files = [*ROOT.glob("*.py"), *(ROOT / "evaluation").glob("*.py")]
    checked = 0
    for path in files:
        text = path.read_text(encoding="utf-8")
        for match in call.finditer(text):
            depth, end = 1, match.end()
            while depth:  # to the bracket that closes the call
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                end += 1
            inside = text[match.end() : end]
            checked += 1
            plain = "utf-8" in inside or re.search(r"[\"'][rwa+]*b[rwa+]*[\"']", inside)
            assert plain or text[: match.start()].endswith("def "), f"{path.name}: {match[0]}{inside}"
    assert checked > 15


def test_a_run_in_the_locale_c(tmp_path):
    """Pictures, captions and a folder with letters that ASCII lacks, printed and written."""
    photos = make_photos(tmp_path / "bücher", train=8, val=4)
    shutil.move(photos / "0.png", photos / "é.png")
    lines = (photos / "train.jsonl").read_text().replace('"0.png"', '"\\u00e9.png"')
    (photos / "train.jsonl").write_text(lines)
    script, *flags = map(str, run_of("clip", photos, tmp_path / "run", "--max-steps 1 --batch-size 8"))
    env = {**environment(), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([*argv_of(script), *flags], env=env, capture_output=True, timeout=120)
    assert done.returncode == 0 and b"replaced" not in done.stderr, done.stderr[-2000:]
    assert (tmp_path / "run/checkpoint.pt").exists()


# -------------------------------------------- commands --------------------------------------------
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("data") / "photos")


LAUNCHED = [
    ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS is 4, and each of these processes would train the whole run alone"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2"),
    ({"LOCAL_RANK": "1"}, "LOCAL_RANK is set without MASTER_ADDR: start with torchrun"),
    ({"RANK": "0"}, "RANK is set without MASTER_ADDR"),
    ({"RANK": "1", "LOCAL_RANK": "1"}, "RANK is set without MASTER_ADDR"),
    ({"MASTER_ADDR": "a1", "MASTER_PORT": "29500", "WORLD_SIZE": "8", "SLURM_NTASKS": "8"}, "WORLD_SIZE is set without RANK: start"),
    ({"MASTER_ADDR": "a1", "MASTER_PORT": "29500", "SLURM_NTASKS": "8"}, "SLURM_NTASKS is 8, and each of these"),
    ({"MASTER_ADDR": "a1", "LOCAL_RANK": "0"}, "LOCAL_RANK is set without RANK"),
    ({"RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "WORLD_SIZE expected, but not set"),
]


@pytest.mark.parametrize("env, sentence", LAUNCHED)
def test_processes_that_torchrun_did_not_start(server, photos, tmp_path, env, sentence):
    done = server.run(*run_of("simclr", photos, tmp_path / "run"), env=env)
    assert_sentence(done, "simclr.py", sentence)
    assert not (tmp_path / "run").exists()


def test_what_was_printed_stays_before_an_error(tmp_path):
    """Into a file, which Python writes in blocks."""
    code = "import common\nwith common.user_errors():\n    print('a table')\n    raise common.UserError('no more')"
    env = {name: value for name, value in environment().items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "a table\n" and done.stderr.endswith("error: no more\n") and done.returncode == 2


LATE = """
import os, time, common
with common.user_errors():
    if os.environ["LOCAL_RANK"] == "0":
        time.sleep(3)
    raise common.UserError("there is no such thing, choose another")
"""


def test_a_mistake_of_all_processes_is_said_once_though_the_first_is_late(tmp_path):
    """torchrun ends all processes as soon as one has ended, which must neither be silent nor one of two that say it.
    Processes that find it at once are those of test_bad_input.py::test_the_same_under_torchrun."""
    (tmp_path / "late.py").write_text(LATE)
    done = subprocess.run(argv_of(tmp_path / "late.py", processes=2), env=environment(), capture_output=True, text=True)
    assert done.stderr.count("late.py: error: there is no such thing, choose another") == 1 and done.returncode


def test_a_mistake_that_the_first_process_does_not_report_is_said_too(server, tmp_path):
    """After ten seconds, which are not waited for here."""
    (tmp_path / "late.py").write_text(LATE)
    before = "import trouble, types\ntrouble.time = types.SimpleNamespace(sleep=lambda seconds: print('waits', seconds, flush=True))"
    done = server.run(tmp_path / "late.py", env={"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "1"}, before=before)
    assert done.stderr == "late.py: error: there is no such thing, choose another\n" and done.returncode == 2
    assert done.stdout == "waits 10\n"


def test_one_task_of_slurm_is_enough_to_train():
    assert not trouble.launched({"SLURM_NTASKS": "1", "OMPI_COMM_WORLD_SIZE": "1"})


@pytest.mark.parametrize("env", [{}, {"MASTER_ADDR": "a1", "MASTER_PORT": "29500"}])
def test_one_process_needs_no_launcher(env, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert init_distributed("cpu").type == "cpu" and not torch.distributed.is_initialized()


NCCL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:77, unhandled system error, NCCL version 2.27.5
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
socketStartConnect: Connect to 10.0.0.2<41000> failed : Software caused connection abort
"""


def test_what_nccl_says_last_is_said():
    said = trouble.sentence(torch.distributed.DistBackendError(NCCL))
    assert said.startswith("the processes cannot exchange data: NCCL error in: ") and "\n" not in said
    assert said.endswith("2.27.5 (socketStartConnect: Connect to 10.0.0.2<41000> failed : Software caused connection abort)")
    one = torch.distributed.DistNetworkError("The client socket has timed out after 60000ms")
    assert trouble.sentence(one) == "the processes cannot exchange data: The client socket has timed out after 60000ms"


@pytest.mark.parametrize("error, left", [(None, True), (SystemExit(130), True), (KeyError("a mistake of ours"), False)])
def test_an_error_with_a_traceback_does_not_wait_for_other_processes(monkeypatch, error, left):
    """Python prints it when the error has left the with block; NCCL may wait in destroy_process_group for ever."""
    calls = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("left"))
    with pytest.raises(type(error)) if error else contextlib.nullcontext():
        with user_errors():
            if error:
                raise error
    assert calls == ["left"] * left


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_streams(server, photos, tmp_path, closed):
    """As with >&- 2>&-. A file that is opened later must not take the number of a closed stream."""
    before = "import os\n" + "".join(f"os.close({number})\n" for number in closed)
    before += "".join(f"sys.std{['in', 'out', 'err'][number]} = None\n" for number in closed)
    done = server.run(*run_of("simclr", photos, tmp_path / "run", "--max-steps 2"), before=before)
    assert done.returncode == 0, done.stderr
    assert len(losses_of(tmp_path / "run")) == 2 and (tmp_path / "run/checkpoint.pt").exists()


@pytest.mark.parametrize("stream", [1, 2])
def test_nobody_reads_any_more(server, photos, tmp_path, stream):
    """As with | head."""
    before = f"import os\nreader, writer = os.pipe()\nos.close(reader)\nos.dup2(writer, {stream})\n"
    argv = run_of("simclr", photos, tmp_path / "run", "--max-steps 3")
    done = server.run(*argv, before=before)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(losses_of(tmp_path / "run")) == 3 and (tmp_path / "run/checkpoint.pt").exists()


def test_a_closed_terminal_saves(server, photos):
    before = "signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # also where these tests run under nohup
    program = Program(server, *run_of("simclr", photos, flags="--epochs 400 --workers 1"), before=before)
    run = wait_for_rows(program.where, 2)
    os.killpg(program.pid, signal.SIGHUP)
    done = program.wait()
    assert done.returncode == 128 + signal.SIGHUP and "Traceback" not in done.stderr, done.stderr
    assert "continue with: python" in done.stdout and (run / "checkpoint.pt").exists()


def test_nohup_goes_on(server, photos, tmp_path):
    before = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    argv = run_of("simclr", photos, tmp_path / "run", "--max-steps 20 --epochs 400")
    program = Program(server, *argv, before=before)
    wait_for_rows(tmp_path, 1)
    os.killpg(program.pid, signal.SIGHUP)
    assert program.wait().returncode == 0 and len(losses_of(tmp_path / "run")) == 20


# The clock of run.py runs a hundred times as fast; the third batch never comes.
HANG = """
import run, data, time, types
clock = types.SimpleNamespace(**vars(time))
clock.perf_counter = lambda: 100 * time.perf_counter()
run.time, batches = clock, data.Loader.batches
def hanging(self, start, stop):
    for step, batch in batches(self, start, stop):
        while step == 2:
            time.sleep(0.01)
        yield step, batch
data.Loader.batches = hanging
"""


def test_a_second_sigterm_ends_what_hangs(server, photos):
    program = Program(server, *run_of("simclr", photos, flags="--epochs 400"), before=HANG)
    wait_for_rows(program.where, 2)
    for _ in range(2):  # at once, as Slurm and torchrun together do it: it may still save
        os.kill(program.pid, signal.SIGTERM)
        time.sleep(0.02)
        assert server.ask(poll=program.pid) == "running"
    time.sleep(0.2)
    os.kill(program.pid, signal.SIGTERM)
    assert program.wait().returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("turn", range(3))  # it may die while it computes or hands on a batch
def test_a_killed_worker_is_a_sentence_and_the_state_is_saved(server, photos, turn):
    program = Program(server, *run_of("simclr", photos, flags="--epochs 400 --workers 1 --save-every 0"))
    run = wait_for_rows(program.where, 2)
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    for child in children:
        with contextlib.suppress(OSError):
            os.kill(int(child), signal.SIGKILL)
    done = program.wait()
    assert_sentence(done, "simclr.py", "a loader worker died", "lower --workers", "is saved in")
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["step"]
    assert saved == rows(run)[-1]["step"] and f"step {saved} is saved" in done.stderr


MAY_MOUNT = shutil.which("unshare") and not subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode
MOUNT = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x20000) == 0  # a mount namespace of its own
assert libc.mount(b"none", b"/", None, 0x44000, None) == 0  # nobody else sees what is mounted
assert libc.mount(b"tmpfs", {path!r}, b"tmpfs", 0, b"size={size}") == 0
"""


@pytest.mark.skipif(not MAY_MOUNT, reason="this user may not mount a small tmpfs")
@pytest.mark.parametrize("size", ["300k", "4k"])
def test_a_small_dev_shm_is_a_sentence(server, photos, tmp_path, size):
    """64 MB is what Docker gives. Two views of 16 x 3 x 64 x 64 are 393 kB as bytes."""
    argv = run_of("simclr", photos, tmp_path / "run", "--workers 2 --batch-size 16 --image-size 64")
    done = server.run(*argv, before=MOUNT.format(path=b"/dev/shm", size=size))
    assert_sentence(done, "simclr.py", "/dev/shm is too small", "--shm-size", "lower --workers")


@pytest.mark.skipif(not MAY_MOUNT, reason="this user may not mount a small tmpfs")
def test_a_dev_shm_without_room_for_floats(server, photos, tmp_path):
    """Up to five batches of 393 kB lie there; as floats they would be 8 MB."""
    argv = run_of("simclr", photos, tmp_path / "run", "--workers 2 --batch-size 16 --image-size 64 --max-steps 6")
    done = server.run(*argv, before=MOUNT.format(path=b"/dev/shm", size="3m"))
    assert done.returncode == 0, done.stderr


FEW_FILES = """
import data, os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
batches, taken = data.Loader.batches, []
def with_four_files_left(self, start, stop):
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        for number in taken[-4:]:
            os.close(number)
    yield from batches(self, start, stop)
data.Loader.batches = with_four_files_left
"""


def test_too_many_open_files_are_a_sentence(server, photos, tmp_path):
    """Where workers are started; the two others are raised where a batch comes in, and where a worker shares it."""
    sentence = "too many files are open at once: raise `ulimit -n` or lower --workers"
    done = server.run(*run_of("simclr", photos, tmp_path / "run", "--workers 2"), before=FEW_FILES)
    assert_sentence(done, "simclr.py", sentence)
    assert trouble.sentence(RuntimeError("received 0 items of ancdata")) == sentence
    worker = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback: ...\n"
    assert trouble.sentence(RuntimeError(f"{worker}RuntimeError: {MANY}")) == sentence


LOST = """
import errno, multiprocessing.connection, multiprocessing.reduction
def no_more_files(*_):
    raise OSError(errno.EMFILE, "Too many open files")
multiprocessing.{function} = no_more_files
"""


@pytest.mark.parametrize("function", ["reduction.DupFd", "connection.Listener.accept"])
def test_a_batch_that_a_thread_of_a_worker_loses_is_a_sentence(server, photos, tmp_path, function):  # noqa: F811
    """The threads that hand on a batch open files too. The main process would wait for it for ever."""
    argv = run_of("simclr", photos, tmp_path / "run", "--workers 1")
    done = server.run(*argv, before=LOST.format(function=function))
    assert_sentence(done, "simclr.py", "a loader worker died", "lower --workers, as memory or open files may be used up")


MANY = "unable to open shared memory object </torch_1_2_3> in read-write mode: Too many open files (24)"


@pytest.mark.parametrize("reason, kind", [(MANY, RuntimeError), ("unable to write to file </torch_1_2_3>", UserError)])
def test_a_full_dev_shm_and_too_many_files_are_told_apart(monkeypatch, reason, kind):
    def fail(tensor):
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "a worker")
    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with pytest.raises(kind):
        share({"a": torch.zeros(3)})


@pytest.mark.skipif(not MAY_MOUNT, reason="this user may not mount a small tmpfs")
@pytest.mark.parametrize("size", ["4k", "12k", "64k"])
def test_a_full_disk_at_the_start(server, photos, tmp_path, size):
    (tmp_path / "run").mkdir()
    argv = run_of("simclr", photos, tmp_path / "run", "--max-steps 2")
    done = server.run(*argv, before=MOUNT.format(path=bytes(tmp_path / "run"), size=size))
    assert_sentence(done, "simclr.py", "No space left on device")


@pytest.mark.parametrize("make", ["torch.empty(10**15)", "torch.empty(2**62)", "bytearray(2**60)"])
def test_too_little_memory_is_a_sentence(server, photos, make):
    before = f"common.init_distributed = lambda *_: {make}"
    done = server.run(*run_of("simclr", photos), before=before)
    assert_sentence(done, "simclr.py", "lower --batch-size or --image-size")
    assert "--embed-dim" not in done.stderr  # SimCLR has no such flag


def test_a_restarted_torchrun_finds_its_folder(server, photos, tmp_path):
    before = f"os.chdir({str(tmp_path)!r})"
    env = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RUN_ID": "job7"}
    for steps in (1, 2):
        argv = run_of("simclr", photos, flags=f"--max-steps {steps}")
        done = server.run(*argv, before=before, env=env)
        assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("_s0_job7") and "continued at 1" in done.stdout


def test_a_tilde_is_the_home(server, photos, tmp_path):
    program = Program(server, *run_of("simclr", photos, "~/run", "--max-steps 1"), env={"HOME": str(tmp_path)})
    assert program.wait().returncode == 0
    assert (tmp_path / "run/checkpoint.pt").exists() and not (program.where / "~").exists()


@pytest.fixture(scope="module")
def trained(server, photos, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    assert server.run(*run_of("simclr", photos, run, "--max-steps 2")).returncode == 0
    return run


@pytest.mark.parametrize("file, content, sentence", [
    ("args.json", "[1, 2]", "args.json is damaged"),
    ("args.json", "{", "run/args.json is damaged (Expecting property name"),
    ("args.json", "{", "): bring it back or use another --output-dir"),
    ("metrics.jsonl", '{"loss": 1}\n', "metrics.jsonl is damaged"),
    ("metrics.jsonl", "[3]}\n", "metrics.jsonl is damaged"),
    ("metrics.jsonl", '{"step": "one"}\n', "metrics.jsonl is damaged"),
    ("metrics.jsonl", '{"step": 1, "lo\n{"step": 2}\n', "metrics.jsonl is damaged"),
])  # fmt: skip
def test_tampered_files_of_a_run(server, photos, trained, tmp_path, file, content, sentence):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / file).write_text(content)
    done = server.run(*run_of("simclr", photos, tmp_path / "run", "--max-steps 4"))
    assert_sentence(done, "simclr.py", sentence)
    assert (tmp_path / "run" / file).read_text() == content


def test_a_damaged_log_of_a_run_that_is_done(server, photos, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    with open(tmp_path / "run/metrics.jsonl", "a") as log:
        log.write('{"step": 1, "lo\n')
    done = server.run(*run_of("simclr", photos, tmp_path / "run", "--max-steps 2"))
    assert_sentence(done, "simclr.py", "metrics.jsonl is damaged")


def test_a_name_that_is_not_utf8_costs_no_run(photos, tmp_path):
    """Python has such bytes as halves of characters, which a checkpoint may hold but not give back."""
    data = Path(shutil.copytree(photos, tmp_path / "d\udce9t"))
    for steps in (1, 2):
        train_here("simclr", data, tmp_path / "run", "--max-steps", str(steps), "--eval-every", "0")
    assert load_checkpoint(tmp_path / "run")["args"]["data"] == str(tmp_path / "d\ufffdt")
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [1, 2]


def test_every_path_may_begin_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for name, flag in (("simclrv2", "checkpoint"), ("align", "keep"), ("declip", "synonyms"), ("clip", "tokenizer")):
        module = module_of(name)
        assert getattr(parse_args(module.Args, module.RECIPES, [f"--{flag}=~/a"]), flag) == "/home/me/a"


@pytest.mark.parametrize("name, value", [("step", "two"), ("step", -3), ("step", 1.5), ("rng", []), ("rng", [[torch.zeros(3)]])])
def test_tampered_checkpoint(server, photos, trained, tmp_path, name, value):
    shutil.copytree(trained, tmp_path / "run")
    content = torch.load(trained / "checkpoint.pt", weights_only=True) | {name: value}
    torch.save(content, tmp_path / "run" / "checkpoint.pt")
    done = server.run(*run_of("simclr", photos, tmp_path / "run", "--max-steps 4"))
    assert_sentence(done, "simclr.py", "checkpoint.pt does not fit")


def test_more_samples_are_needed_or_a_smaller_batch(photos):
    with pytest.raises(UserError, match="less than a batch of 99: lower --batch-size, as recipes for small data do"):
        Loader(open_dataset(str(photos)), {}, {}, 99)
