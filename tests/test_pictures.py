"""pictures.py: against the official numbers, against scikit-learn, on what can be seen by eye, and as commands."""

import io
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from sklearn.decomposition import PCA

import dino
import dinov2
import mocov3
import runs
import slip
from command import Args, main
from common import UserError, init_distributed, user_errors
from data import open_dataset
from evaluation import pictures
from evaluation.weights import open_network
from sources import Sample
from test_golden import close, golden

CPU = torch.device("cpu")


# ------------------------------------------------ patches ------------------------------------------------
@pytest.mark.parametrize("mass", ["0.3", "0.6", "0.9"])
def test_mass_official(mass):
    x, y, _ = golden("dino_attention_threshold")
    mask = pictures.mass_mask(x["cls_attention"], float(mass))
    assert torch.equal(mask.view(3, 4, 4).float(), y["mask_by_threshold"][mass].float())


@pytest.mark.parametrize("size", ["x32", "x16", "x24x40"])
def test_attention_and_features_official(size):
    """At the size of training, at a smaller one, and on a grid that is no square."""
    x, y, _ = golden("dino_vit_tiny")
    vit = dino.VisionTransformer(32, 8, 48, 2, 3).eval()
    vit.load_state_dict(golden("dino_vit_tiny_weights")[0]["state_dict"])
    attention, features = pictures.attention_and_features(vit, x[size])
    close(attention.flatten(2), y[size]["last_selfattention"][:, :, 0, 1:])
    assert attention.shape[2:] == features.shape[1:3] == tuple(side // 8 for side in x[size].shape[2:])
    vit.blocks = vit.blocks[:1]  # the numbers are of the first of two blocks
    close(pictures.attention_and_features(vit, x[size])[1].flatten(1, 2), y[size]["intermediate_n2"][0][:, 1:], atol=1e-5)


@pytest.mark.parametrize("module", [slip, mocov3])
def test_networks_of_one_size(module):
    """Their positions are resized for the picture only."""
    vit = module.VisionTransformer(32, 8, 48, 2, 3).eval()
    torch.nn.init.normal_(vit.pos_embed)
    before, x = vit.pos_embed.clone(), torch.randn(2, 3, 32, 32)
    flexible = dino.VisionTransformer(32, 8, 48, 2, 3).eval()
    flexible.load_state_dict(vit.state_dict())
    for ours, other in zip(pictures.attention_and_features(vit, x), pictures.attention_and_features(flexible, x)):
        close(ours, other)
    attention, features = pictures.attention_and_features(vit, torch.randn(1, 3, 24, 56))
    assert attention.shape == (1, 3, 3, 7) and features.shape == (1, 3, 7, 48)
    assert torch.equal(vit.pos_embed, before) and not vit.blocks[-1]._forward_hooks


def test_registers_are_no_patches():
    """DINOv2's, whose blocks attend themselves."""
    vit, x, seen = dinov2.VisionTransformer(32, 8, 48, 2, 3, 0.0, 4, False, 0.5).eval(), torch.randn(1, 3, 32, 32), []
    vit.blocks[-1].norm1.register_forward_hook(lambda module, args, out: seen.append(out))
    attention, features = pictures.attention_and_features(vit, x)
    close(features.flatten(1, 2), vit.tokens(x)[:, 1:].detach())
    q, k, _ = (t.unflatten(-1, (3, 16)).transpose(1, 2) for t in vit.blocks[-1].attn["qkv"](seen[0]).chunk(3, dim=-1))
    close(attention.flatten(2), (q @ k.transpose(2, 3) / 4).softmax(-1)[:, :, 0, 5:].detach())
    assert attention.sum() < 3  # three heads, part of whose attention the others get


def test_components_equal_scikit_learn():
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 8) + 5
    theirs = torch.from_numpy(PCA(3, svd_solver="full").fit_transform(x.double().numpy()))
    ours = pictures.principal_components(x, 3)
    torch.testing.assert_close(ours, theirs * (ours * theirs).sum(0).sign(), atol=1e-9, rtol=1e-9)
    turned = pictures.principal_components(x.flip(0), 3).flip(0)  # a direction's sign is not left to chance
    torch.testing.assert_close(turned, ours, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_foreground_is_what_the_borders_lack(sign):
    """A disc of two halves before a ground, in images of unequal size: equal halves have equal colours."""
    g, features, discs = torch.Generator().manual_seed(0), [], []
    axes = sign * torch.eye(8)
    for rows, columns in ((12, 12), (10, 16)):
        y, x = torch.meshgrid(torch.arange(rows) - rows / 2, torch.arange(columns) - columns / 2, indexing="ij")
        disc, upper = (x**2 + y**2 < 16), y < 0
        f = 0.01 * torch.randn(rows, columns, 8, generator=g)
        f += disc[..., None] * 3 * axes[0] + (disc & upper)[..., None] * axes[1]
        features.append(f)
        discs.append((disc, upper))
    fronts, colors = pictures.pca_colors(features)
    for front, (disc, _) in zip(fronts, discs):
        assert torch.equal(front, disc)
    halves = [[c[disc & half].mean(0) for half in (upper, ~upper)] for c, (disc, upper) in zip(colors, discs)]
    assert (halves[0][0] - halves[0][1]).abs().max() > 0.5
    assert max((a - b).abs().max() for a, b in zip(*halves)) < 0.2
    assert all((c[~front] == 0).all() and c.min() >= 0 and c.max() <= 1 for c, front in zip(colors, fronts))
    assert not any(front.any() for front in pictures.pca_colors(features, threshold=99.0)[0])
    flat = pictures.pca_colors([torch.ones(3, 3, 8)])  # nothing varies
    assert torch.isfinite(flat[1][0]).all()


def test_matches_find_moved_patches():
    a = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    b = 7 * a.flip(0, 1)[:, :4]  # another grid; the length of a feature does not count
    weight = torch.arange(15.0).view(3, 5)
    weight[2, 4] = -1
    found = pictures.matches(a, b, weight, 4)
    assert [m[:2] for m in found] == [(2, 3), (2, 2), (2, 1), (2, 0)]
    assert [m[2:4] for m in found][:3] == [(0, 1), (0, 2), (0, 3)]  # the column of the fourth was cut off
    assert all(m[4] == pytest.approx(1, abs=1e-6) for m in found[:3]) and found[3][4] < 0.95
    assert len(pictures.matches(a, b, weight, 99)) == 15


# ------------------------------------------------ drawing ------------------------------------------------
@pytest.mark.parametrize("h, w", [(48, 48), (100, 60), (31, 640), (5, 5), (1, 300)])
@pytest.mark.parametrize("patch", [1, 8, 14])
def test_images_of_any_size(h, w, patch):
    picture = pictures.fit_image(torch.randint(0, 256, (3, h, w), dtype=torch.uint8), 56, patch)
    assert picture.width % patch == picture.height % patch == 0
    assert 56 - patch < min(picture.size) <= 56 and max(picture.size) <= 112
    if patch == 8:
        assert max(picture.size) == {(48, 48): 56, (100, 60): 88, (31, 640): 112, (5, 5): 56, (1, 300): 112}[h, w]


def test_the_middle_is_kept():
    image = torch.zeros(3, 20, 100, dtype=torch.uint8)
    image[0, :, 49:51] = 255
    pixels = np.asarray(pictures.fit_image(image, 20, 8))
    assert pixels.shape == (16, 40, 3) and pixels[:, 19:21, 0].min() == 255 and pixels[:, :19].max() == 0


def test_heat_goes_from_dark_to_bright():
    assert np.asarray(pictures.heat(torch.tensor([[1.0, 3.0]]))).tolist() == [[[0, 0, 4], [252, 255, 164]]]
    assert np.asarray(pictures.heat(torch.ones(2, 2))).tolist() == [[[0, 0, 4]] * 2] * 2


def test_page():
    red, blue = Image.new("RGB", (50, 25), "red"), Image.new("RGB", (2, 4), "blue")
    sheet = np.asarray(pictures.page([[(red, "a name"), (blue, "café " * 40)], [(blue, "two\nlines")]]))
    assert sheet.shape == (4 + 14 + 300 + 4 + 28 + 300 + 4, 4 + 2 * 154, 3)  # 50 px became 150, and so 2 px
    assert (sheet[18:93, 4:154] == (255, 0, 0)).all() and (sheet[18:318, 158:308] == (0, 0, 255)).all()
    assert (sheet[4:18, 4:60] < 128).any() and (sheet[4:18, 308:] == 255).all()  # text does not leave its cell


def test_attention_page_shows_picture_and_head():
    attention = torch.zeros(2, 4, 4)
    attention[0, 1, 2], attention[1, 0, 0] = 1.0, 1.0
    green = Image.new("RGB", (32, 32), (0, 200, 0))
    sheet = np.asarray(pictures.attention_page([(green, "x", attention)], 0.6))
    cells = [slice(4 + i * 132, 132 + i * 132) for i in range(4)]  # picture, all heads, head 1, head 2
    heads, kept = sheet[18:146], sheet[164:292]
    assert (heads[32:64, cells[2]][:, 64:96] == pictures.INFERNO[-1]).all()
    assert (heads[:32, cells[3]][:, :32] == pictures.INFERNO[-1]).all()
    assert (kept[32:64, cells[2]][:, 64:96] == (0, 200, 0)).all() and (kept[64:, cells[2]] == (0, 40, 0)).all()
    assert (kept[:32, cells[1]][:, :32] == (0, 200, 0)).all() and (kept[:, cells[0]] == 255).all()


def test_matches_page_draws_lines():
    black = Image.new("RGB", (32, 16), "black")
    sheet = np.asarray(pictures.matches_page((black, "a", (2, 4)), (black, "b", (2, 4)), [(0, 0, 1, 3, 0.9)]))
    assert sheet.shape == (16 + 192, 2 * 384 + 32, 3)
    red = (sheet == pictures.HUES[0]).all(-1)
    assert red[16:112, :96].any() and red[112:, -96:].any() and red[:, 384:416].any() and not red[:16].any()


def test_neighbors_page_has_frames():
    def cell(right):
        return Image.new("RGB", (24, 24), "black"), "n", right

    sheet = np.asarray(pictures.neighbors_page([[cell(None), cell(True), cell(False), cell(None)]], columns=2))
    shown = {color: (sheet == color).all(-1).any() for color in ((40, 160, 60), (210, 50, 40))}
    assert all(shown.values()) and sheet.shape[0] == 2 * (14 + 130 + 4) + 4  # two lines, the query once


# ------------------------------------------------ commands ------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of small networks, weights as DINO publishes them, photos with and without classes."""
    root = tmp_path_factory.mktemp("pictures")
    for name in ("dino", "ibot", "dinov2", "slip", "mocov3", "simclr"):
        module = runs.module_of(name)
        args = module.parse_args(module.Args, module.RECIPES, runs.FLAGS[name])
        torch.manual_seed(1)
        model = module.build_model(args)
        (root / name).mkdir()
        torch.save({"method": name, "args": vars(args), "model": model.state_dict(), "step": 3}, root / name / "checkpoint.pt")
        if name == "dino":
            torch.save(module.image_encoder(model).state_dict(), root / "dino_published.pth")
    for split, n in (("train", 12), ("val", 6)):
        for i in range(n):
            kind = ("round", "square")[i % 2]
            path = root / "classes" / split / kind / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.new("RGB", (60 + 10 * (i % 3), 50), (90, 10 * i, 20))
            draw = ImageDraw.Draw(picture)
            (draw.ellipse if kind == "round" else draw.rectangle)((15, 10, 45, 40), fill=(20, 200, 255 - 10 * i))
            picture.save(path)
    (root / "photos").mkdir()
    for path in (root / "classes/val").rglob("*.png"):
        (root / "photos" / path.name).write_bytes(path.read_bytes())
    (root / "photos" / "9.png").write_bytes(b"broken")
    return root


def run(folder, protocol, checkpoint, *flags, data="classes"):
    flags = ["--device", "cpu", "--workers", "0", "--out", str(folder / "out"), *flags]
    main([protocol, str(folder / checkpoint), "--data", str(folder / data), *flags])
    return folder / "out" / f"{checkpoint.removesuffix('.pth')}_{protocol}_{data}.png"


@pytest.mark.parametrize("checkpoint", ["dino", "ibot", "dinov2", "slip", "mocov3"])
def test_every_picture_of_every_transformer(folder, checkpoint, capsys):
    width, height = Image.open(run(folder, "attention", checkpoint, "--images", "2")).size
    columns = 4 + 2  # heads, their mean and the picture
    assert (width - 4) % columns == 0 and (width - 4) // columns >= 132
    file = run(folder, "pca", checkpoint, "--images", "3", "--size", "96")
    patch = 16 if checkpoint in ("slip", "mocov3") else 8
    assert Image.open(file).width == 4 + 3 * (96 * 80 // 50 // patch * patch + 4)
    assert Image.open(run(folder, "matches", checkpoint, "--k", "5")).width == 2 * 384 + 32
    assert Image.open(run(folder, "neighbors", checkpoint, "--k", "4")).size[1] > 4 * 128
    assert capsys.readouterr().out.count(".png") == 4


def test_published_weights_give_the_same_picture(folder):
    ours, theirs = (run(folder, "attention", name, "--size", "64") for name in ("dino", "dino_published.pth"))
    assert theirs != ours and theirs.read_bytes() == ours.read_bytes()


def test_a_file_of_the_users_own_stays(folder, tmp_path):
    file = tmp_path / "dino_attention_classes.png"
    words = ["attention", str(folder / "dino"), "--data", str(folder / "classes"), "--device", "cpu", "--out", str(tmp_path)]
    for content in (b"mine", picture_bytes()):
        file.write_bytes(content)
        with pytest.raises(UserError, match="attention_classes.png is no picture of this script: use another --out"):
            main(words)
        assert file.read_bytes() == content
    beside = folder / "dino/attention_classes.png"
    kept = beside.read_bytes() if beside.exists() else None
    beside.write_bytes(b"mine")
    with pytest.raises(UserError, match="attention_classes.png is no picture of this script"):
        main(words[:-2])
    assert beside.read_bytes() == b"mine"
    beside.write_bytes(kept) if kept else beside.unlink()
    file.unlink()
    for _ in range(2):  # its own picture is drawn again
        main(words)


def picture_bytes():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


def test_random_weights_and_default_folder(folder):
    main(["pca", str(folder / "dino"), "--data", str(folder / "classes"), "--random", "--device", "cpu"])
    drawn, random = ((folder / "dino" / f"pca_classes{end}.png").read_bytes() for end in ("", "_random"))
    assert drawn != random and not (folder / "dino/results.jsonl").exists()


def test_samples_are_chosen(folder):
    val = open_dataset(str(folder / "classes"), split="val")
    args = Args(images=3)
    assert len({s.label for _, s, _ in pictures.chosen_samples(val, args, one_class=True)}) == 1
    assert [i for i, *_ in pictures.chosen_samples(val, args)] == [i for i, *_ in pictures.chosen_samples(val, args)]
    assert [i for i, *_ in pictures.chosen_samples(val, Args(samples="5,0,5"))] == [5, 0, 5]
    photos = open_dataset(str(folder / "photos"))
    assert len(pictures.chosen_samples(photos, Args(images=99), one_class=True)) == 6  # without the broken one
    run(folder, "matches", "dino", "--samples", "0,1", data="photos")  # a folder without splits or classes


def test_neighbors_are_nearest(folder, monkeypatch):
    """In a cell stand the number of a sample and the cosine of its features with the query's, which is no neighbour of itself."""
    rows, net = [], open_network(folder / "dino", CPU)
    monkeypatch.setattr(pictures, "neighbors_page", lambda r: rows.extend(r) or Image.new("RGB", (1, 1)))
    for data, k in (("classes", 12), ("photos", 5)):
        rows.clear()
        run(folder, "neighbors", "dino", "--samples", "0,3", data=data)
        assert [len(row) for row in rows] == [1 + k, 1 + k]  # all of them, as k is larger than the set
        splits = ("val", "train") if data == "classes" else ("train", "train")
        sets = (open_dataset(str(folder / data), split=split) for split in splits)
        queries, bank = (pictures.extract_features(net.encoder, net.encoder, x, net.view, CPU) for x in sets)
        of_query, of_bank = ({int(i): x for i, x in zip(f.index, F.normalize(f.images, dim=1))} for f in (queries, bank))
        for number, ((query, *_), *cells) in zip((0, 3), rows):
            cosines = [float(text.split("\n")[0]) for _, text, _ in cells]
            assert cosines == sorted(cosines, reverse=True)
            numbers = [int(text.split("\n")[1].split(",")[0]) for _, text, _ in cells]
            assert len({*numbers}) == k
            assert cosines == pytest.approx([float(of_query[number] @ of_bank[i]) for i in numbers], abs=6e-4)
            if data == "photos":
                assert not any(np.array_equal(np.asarray(query), np.asarray(cell)) for cell, _, _ in cells)
            else:
                assert {right for _, _, right in cells} == {True, False}


ERRORS = [
    ("attention simclr", "this picture needs a transformer, not simclr's"),
    ("pca simclr", "not simclr's resnet10"),
    ("attention dino --samples 1,x", "must be numbers"),
    ("attention dino --samples 6", "has those from 0 to 5"),
    ("attention dino --samples -1", "has those from 0 to 5"),
    ("matches dino --samples 2", "matches needs two images"),
    ("attention dino --size 4", "smaller than a patch, 8"),
    ("attention dino --size 100000", "--size 100000 is too large, at most 4096 pixels"),
    ("attention dino --images 0", "must be above 0"),
    ("attention dino --split tset", "unknown split"),
]


@pytest.mark.parametrize("words, sentence", ERRORS)
def test_mistakes_are_sentences(folder, words, sentence):
    protocol, checkpoint, *flags = words.split()
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        run(folder, protocol, checkpoint, *flags)
    assert "\n" not in str(error.value)


def test_broken_sample_and_folder_that_cannot_be_written(folder):
    with pytest.raises(UserError, match="sample 6 of photos cannot be read"):
        run(folder, "attention", "dino", "--samples", "6", data="photos")
    (folder / "file").write_text("")
    with pytest.raises(UserError, match="use another --out"):
        run(folder, "attention", "dino", "--out", str(folder / "file"))


def test_pictures_of_nothing(folder, tmp_path, capsys):
    """Files that are no pictures, and one photo, which has no neighbour; what is left out of others is counted."""
    for name, files in (("junk", ["1.png", "2.png"]), ("single", ["1.png"])):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes(b"junk" if name == "junk" else (folder / "photos/0.png").read_bytes())
    for protocol in ("attention", "pca", "matches", "neighbors"):
        with pytest.raises(UserError, match="none of 2 samples of junk can be read: sample . .broken image"):
            run(folder, protocol, "dino", data=tmp_path / "junk")
    with pytest.raises(UserError, match="neighbors needs another image to show, single has only one"):
        run(folder, "neighbors", "dino", data=tmp_path / "single")
    capsys.readouterr()
    run(folder, "pca", "dino", "--images", "7", data="photos")
    assert capsys.readouterr().err.count("photos: the picture leaves out 1 that cannot be read, sample 6 (broken image") == 1
    run(folder, "neighbors", "dino", "--images", "7", data="photos")  # the bank is all of them, and has counted it
    assert (said := capsys.readouterr().err).count("broken image") == 1 and "photos: left out 1 of " in said


def test_another_split_is_said(folder, tmp_path, capsys):
    """A val split that is there and broken is not the same as none."""
    run(folder, "neighbors", "dino", "--images", "1", data="photos")
    assert "photos has no val split" in (said := capsys.readouterr().err) and said.count("the picture is of the split train") == 1
    shutil.copytree(folder / "classes/val", tmp_path / "both")
    picture = next((tmp_path / "both").rglob("*.png")).relative_to(tmp_path / "both")
    (tmp_path / "both/train.csv").write_text(f"image,caption\n{picture},a dog\n")
    (tmp_path / "both/val.csv").write_text(f"image,caption\n{picture},a dog, wet\n")
    run(folder, "attention", "dino", "--images", "1", data=tmp_path / "both")
    assert "val.csv cannot be read: line 2 has 3 fields" in (said := capsys.readouterr().err) and "the picture is of the split train" in said


def test_labels_of_other_classes_are_neither_right_nor_wrong(monkeypatch):
    """train has the classes a, b, c, val has b, c: label 0 is not the same class in both."""
    seen, photo = [], picture_bytes()
    monkeypatch.setattr(pictures, "neighbors_page", lambda rows: seen.extend(rows))
    monkeypatch.setattr(pictures, "extract_features", lambda *args, indices=None, **rest: types.SimpleNamespace(
        images=torch.eye(2)[indices or [0, 1]], index=torch.tensor([0, 1])))  # fmt: skip

    class Two(list):
        name = "two"

    val, train = (Two(Sample(photo, (), label, "x") for label in (0, 1)) for _ in range(2))
    view = types.SimpleNamespace(size=8, filter=Image.Resampling.BICUBIC)
    for classes, right in ((["b", "c"], [True, False]), (["a", "b", "c"], [None, None])):
        val.classes, train.classes = ["b", "c"], classes
        args = types.SimpleNamespace(samples="0", images=1, size=0, k="2")
        pictures.neighbors_picture(types.SimpleNamespace(encoder=None, view=view), train, val, args, {})
        assert [cell[2] for cell in seen.pop()] == [None, *right]


def test_title_of_a_label_without_a_name():
    data = types.SimpleNamespace(classes=["red", "green"])
    assert [pictures.title(data, 3, label) for label in (-1, 1, 2)] == ["3", "3, green", "3, 2"]
    assert pictures.title(types.SimpleNamespace(classes=None), 3, 7) == "3, 7"


def test_checkpoints_of_one_command_have_pictures_of_their_own(folder, tmp_path):
    """In one --out; a directory's name is not cut off at a dot, a checkpoint of an earlier step keeps its number."""
    for name in ("lr0.1", "lr0.2"):
        (tmp_path / name).mkdir()
        for file in ("checkpoint.pt", "checkpoint_2.pt"):
            shutil.copy(folder / "dino/checkpoint.pt", tmp_path / name / file)
    shutil.copytree(tmp_path / "lr0.1", tmp_path / "more/lr0.1")
    paths = ["lr0.1", "lr0.2/checkpoint.pt", "lr0.2/checkpoint_2.pt", "more/lr0.1"]
    flags = ["--device", "cpu", "--workers", "0", "--images", "1", "--out", str(tmp_path / "pictures")]
    main(["attention", *(str(tmp_path / path) for path in paths), "--data", str(folder / "classes"), *flags])
    names = ["lr0.1", "lr0.1_2", "lr0.2", "lr0.2_checkpoint_2"]
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {f"{name}_attention_classes.png" for name in names}


def test_two_processes_draw_the_same(server, folder):
    one = run(folder, "neighbors", "dino", "--images", "2").read_bytes()
    done = server.together("tests/test_pictures.py", folder)
    assert (folder / "out/dino_neighbors_classes.png").read_bytes() == one and done.stdout.count(".png") == 1


if __name__ == "__main__":
    with user_errors():
        init_distributed("cpu")
        run(Path(sys.argv[1]), "neighbors", "dino", "--images", "2")
