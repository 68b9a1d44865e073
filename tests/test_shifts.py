"""ImageNet's other test sets, multi30k, and the lists of open_clip, on stand-ins with the layout of the published archives."""

import gzip
import json
import sys
import types

import pytest
import torch
from PIL import Image

from command import Args, main
from common import UserError
from data import open_dataset
from evaluation import robustness
from evaluation.protocols import chosen_names, chosen_templates
from sources import SHIFTED
from test_evaluate import FLAGS, folder, results  # noqa: F401

IDS = ["n01440764", "n01443537", "n01484850", "n01491361"]  # ImageNet's first four classes
FULL = ["tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark, white shark", "tiger shark"]
NAMES = ["tench", "goldfish", "great white shark", "tiger shark"]
HUES = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]


def pictures_of(root, folders):
    """{folder: number of the class}, two pictures in each."""
    for name, label in folders.items():
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40, 36), tuple(v + 5 * i for v in HUES[label])).save(root / name / f"{i}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A DATA_DIR with an ImageNet of four classes and its five other test sets as they are published."""
    root = tmp_path_factory.mktemp("data")
    pictures_of(root / "imagenet/val", dict(zip(IDS, range(4))))
    (root / "imagenet/LOC_synset_mapping.txt").write_text("\n".join(f"{i} {name}" for i, name in zip(IDS, FULL)))
    pictures_of(root / "imagenet-v2", {"0": 0, "1": 1, "2": 2, "3": 3})
    pictures_of(root / "imagenet-r", {IDS[3]: 3, IDS[1]: 1})
    pictures_of(root / "imagenet-a", {IDS[2]: 2})
    pictures_of(root / "imagenet-a", {IDS[0]: 0})
    pictures_of(root / "imagenet-sketch", dict(zip(IDS, range(4))))
    pictures_of(root / "objectnet/images", {"fish": 0, "shark": 2, "shoe": 3})
    mappings = root / "objectnet/mappings"
    mappings.mkdir()
    (mappings / "folder_to_objectnet_label.json").write_text(json.dumps({"fish": "Fish", "shark": "Shark", "shoe": "Shoe"}))
    to_imagenet = {"Fish": f"{FULL[0]}; {FULL[1]}", "Shark": f"{FULL[2]}; {FULL[3]}"}
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps(to_imagenet))
    (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(FULL))
    return root


# ------------------------------------------------ classes ------------------------------------------------
def test_classes_are_imagenets(data):
    """Each set's labels become ImageNet's: numbers by value, WordNet ids by their order, ObjectNet's names by its mappings."""
    imagenet = open_dataset("imagenet", data, "val")
    assert imagenet.classes == NAMES and robustness.wordnet_ids(imagenet, data / "imagenet") == IDS
    want = {"imagenet-v2": [[0], [1], [2], [3]], "imagenet-r": [[1], [3]], "imagenet-a": [[0], [2]],
            "imagenet-sketch": [[0], [1], [2], [3]]}  # fmt: skip
    for name, groups in want.items():
        found = open_dataset(name, data, "val")
        assert robustness.imagenet_classes(name, found, IDS, 4, data / name) == groups and found.name == name
        for i in range(len(found)):
            (place,) = groups[found[i].label]
            pixel = Image.open(found[i].key).getpixel((5, 5))
            assert [v // 100 for v in pixel] == [v // 100 for v in HUES[place]]
    objects = open_dataset(str(data / "objectnet/images"))
    groups = robustness.imagenet_classes("objectnet", objects, IDS, 4, data / "objectnet")
    assert dict(zip(objects.folders, groups)) == {"fish": [0, 1], "shark": [2, 3], "shoe": []}


def test_numbers_sort_by_value(tmp_path):
    """imagenet-v2's folders 0 to 999 are in the order 0, 1, 10, 100 on disk."""
    pictures_of(tmp_path / "imagenet-v2", {str(i): i % 4 for i in (0, 1, 2, 10, 100, 11)})
    found = open_dataset("imagenet-v2", tmp_path, "val")
    groups = robustness.imagenet_classes("imagenet-v2", found, [], 1000, tmp_path)
    assert groups == [[0], [1], [2], [10], [11], [100]]
    with pytest.raises(UserError, match="has a class folder above 99, the last one of ImageNet"):
        robustness.imagenet_classes("imagenet-v2", found, [], 100, tmp_path)


def test_what_cannot_be_matched_is_said(data, tmp_path):
    pictures_of(tmp_path / "imagenet-r", {"n99999999": 0, IDS[0]: 0})
    found = open_dataset("imagenet-r", tmp_path, "val")
    with pytest.raises(UserError, match="1 class folders that ImageNet does not have, n99999999"):
        robustness.imagenet_classes("imagenet-r", found, IDS, 4, tmp_path)
    with pytest.raises(UserError, match=r"put LOC_synset_mapping.txt into its folder"):
        robustness.imagenet_classes("imagenet-r", found, [], 4, tmp_path)
    with pytest.raises(UserError, match="imagenet-r must be a folder with a folder of images for each class"):
        robustness.imagenet_classes("imagenet-r", types.SimpleNamespace(name="imagenet-r"), IDS, 4, tmp_path)  # as of a tar
    with pytest.raises(UserError, match="no image has a class that ImageNet's images have too"):
        robustness.compare(torch.eye(2), torch.tensor([0, 1]), [[], []], torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="objectnet needs its archive's folder mappings"):
        robustness.objectnet_classes(["fish"], 4, tmp_path)
    with pytest.raises(UserError, match="tench, Tinca tinca, which is in no line"):
        copy = tmp_path / "objectnet/mappings"
        copy.mkdir(parents=True)
        for path in (data / "objectnet/mappings").iterdir():
            (copy / path.name).write_text("other" if path.suffix == "" else path.read_text())
        robustness.objectnet_classes(["fish"], 4, tmp_path / "objectnet")


# ------------------------------------------------ scores ------------------------------------------------
def test_comparison_by_hand():
    """Five classes of ImageNet; the set has two: one stands for classes 1 and 3, one for class 4; a third stands for none."""
    groups = [[1, 3], [4], []]
    logits = torch.tensor([[9.0, 1, 0, 2, 0], [0, 0, 9, 1, 2], [0, 5, 0, 0, 4], [9, 9, 9, 9, 9]])
    labels = torch.tensor([0, 1, 1, 2])  # right among 1, 3, 4; right; wrong; left out
    imagenet = torch.eye(5)[[1, 3, 4, 4, 0, 2]] + 0.1 * torch.eye(5)[[0, 0, 0, 0, 4, 4]]
    imagenet_labels = torch.tensor([1, 1, 4, 3, 0, 2])  # 1 as 1, 1 as 3 (same group), 4 as 4, 3 as 4 (wrong); two not counted
    found = robustness.compare(logits, labels, groups, imagenet, imagenet_labels)
    assert found == pytest.approx((100 * 2 / 3, 75, 75 - 100 * 2 / 3))


def test_the_red_frame_is_cut():
    image = torch.zeros(3, 20, 24, dtype=torch.uint8)
    image[0, :2] = image[0, -2:] = image[0, :, :2] = image[0, :, -2:] = 255

    class Whole:
        size = 1

        def crop(self, image, rng=None):
            return image

    inner = robustness.WithoutBorder(Whole(), 2).crop(image)
    assert inner.shape == (3, 16, 20) and inner.max() == 0


def test_one_table(data, folder, capsys, monkeypatch):  # noqa: F811
    """Every set beside ImageNet on the same classes; what is not there is named and counted."""
    argv = ["robustness", str(folder / "clip"), "--data", "imagenet", "--data-dir", str(data), *FLAGS]
    main(argv)
    lines = capsys.readouterr()
    rows = [line for line in lines.out.splitlines() if str(folder) in line]
    assert len(rows) == 6 and "difference" in lines.out and "left out" not in lines.err
    found = results(folder / "clip")[-1]["metrics"]
    assert list(found) == ["imagenet", *SHIFTED]
    assert [found[name]["classes"] for name in SHIFTED] == [4, 2, 2, 4, 2]
    for row in found.values():
        assert row["difference"] == pytest.approx(row["imagenet, same classes"] - row["top1"])
    (zeroshot,) = [found["imagenet"]["top1"]]
    main(["zeroshot", str(folder / "clip"), "--data", "imagenet", "--data-dir", str(data), "--templates", "imagenet", *FLAGS])
    assert results(folder / "clip")[-1]["metrics"]["top1"] == pytest.approx(zeroshot)
    (data / "imagenet-a").rename(data / "elsewhere")
    main(argv)
    (data / "elsewhere").rename(data / "imagenet-a")
    assert "left out 1 of 5 sets: imagenet-a (" in capsys.readouterr().err
    for name in SHIFTED:
        (data / name).rename(data / f"away-{name}")
    with pytest.raises(UserError, match="imagenet has .*% and nothing to compare with: left out 5 of 5 sets: "):
        main(argv)
    for name in SHIFTED:
        (data / f"away-{name}").rename(data / name)


# ------------------------------------------------ open_clip's lists ------------------------------------------------
def test_lists_of_open_clip(data, monkeypatch):
    pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    templates = chosen_templates(Args(templates="open_clip"))
    assert len(templates) == 80 and all(t.count("{}") == 1 for t in templates) and "a bad photo of a {}." in templates

    class Thousand:
        name, classes = "imagenet", [str(i) for i in range(1000)]

    names = chosen_names(Thousand(), Args(classnames="open_clip"))
    assert len(names) == 1000 and names[:4] == NAMES
    subset = open_dataset("imagenet-r", data, "val")  # two of the classes, by the ids in ImageNet's folder
    assert chosen_names(subset, Args(classnames="open_clip", data_dir=str(data))) == ["goldfish", "tiger shark"]


def test_without_open_clip_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.delitem(sys.modules, "open_clip.zero_shot_metadata", raising=False)
    sentence = "open_clip takes the lists of that package: `pip install open_clip_torch`, or give a file"
    with pytest.raises(UserError, match=f"--templates {sentence}"):
        chosen_templates(Args(templates="open_clip"))
    with pytest.raises(UserError, match=f"--classnames {sentence}"):
        chosen_names(types.SimpleNamespace(name="x", classes=["a"]), Args(classnames="open_clip"))


# ------------------------------------------------ multi30k and prefix ------------------------------------------------
def test_multi30k_has_four_languages(tmp_path):
    root = tmp_path / "multi30k"
    for part in ("images", "image_splits", "raw"):
        (root / part).mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(root / f"images/{i}.jpg")
    (root / "image_splits/test_2016_flickr.txt").write_text("2.jpg\n0.jpg\n1.jpg\n")
    texts = {"en": "a dog\na cat\na cow\n", "de": "ein Hund\neine Katze\neine Kuh", "fr": "un chien\nun chat\nune vache\n",
             "cs": "pes\nkočka\nkráva\n"}  # fmt: skip
    for language, text in texts.items():
        file = root / f"raw/test_2016_flickr.{language}"
        if language == "cs":
            file.with_name(file.name + ".gz").write_bytes(gzip.compress(text.encode()))
        else:
            file.write_text(text, encoding="utf-8")
    for language, text in texts.items():
        data = open_dataset(f"multi30k-{language}", tmp_path, "test")
        assert [data[i].captions for i in range(3)] == [[line] for line in text.split("\n")[:3]] and data.captioned
        assert [data[i].key[-5:] for i in range(3)] == ["2.jpg", "0.jpg", "1.jpg"] and data.name == f"multi30k-{language}"
    (root / "raw/test_2016_flickr.de").write_text("ein Hund\neine Katze\n")
    with pytest.raises(UserError, match="has 2 lines for 3 pictures"):
        open_dataset("multi30k-de", tmp_path, "test")
    with pytest.raises(UserError, match=r"there is no .*val.txt, see docs/data.md"):
        open_dataset("multi30k-de", tmp_path, "val")


def test_prefix_of_captions(folder):  # noqa: F811
    """It stands before each caption: the score is that of captions which begin with it already."""
    argv = ["retrieval", str(folder / "clip"), "--data", str(folder / "captions"), *FLAGS]
    main(argv)
    main([*argv, "--prefix", "a photo of "])
    plain, prefixed = (line["metrics"] for line in results(folder / "clip")[-2:])
    copy = folder / "prefixed"
    copy.mkdir()
    for path in (folder / "captions").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["captions"] = ["a photo of " + caption if caption.strip() else caption for caption in row["captions"]]
        (copy / path.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["retrieval", str(folder / "clip"), "--data", str(copy), *FLAGS])
    assert results(folder / "clip")[-1]["metrics"] == prefixed != plain and prefixed.keys() == plain.keys()
