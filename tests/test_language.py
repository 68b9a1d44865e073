"""language.py: a map lies on what the text names, the arithmetic of search, the captions in DeCLIP's queue."""

import json
import shutil
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import align
import clip
import declip
import runs
import slip
from command import main
from common import UserError
from data import Tokenizer, decode, open_dataset
from evaluation import language, pictures
from scenes import COLOURS
from test_golden import close

RED, GREEN = torch.tensor(COLOURS["red"]) / 255, torch.tensor(COLOURS["green"]) / 255
WORDS = torch.eye(16)[:2]  # the embeddings of "red" and "green" in the networks below


# ------------------------------------------------ networks whose answer is known ------------------------------------------------
def filters():
    """For red and for green the colour that answers to it, not to grey and not to the other one."""
    grey = torch.stack([RED - RED.mean(), GREEN - GREEN.mean()])
    return torch.linalg.pinv(grey).T


def beside_a_constant(colours, constant):
    """(b, 2) -> (b, 16): of a picture with one colour alone, the cosine would be 1 whatever there is of it."""
    return torch.cat([colours, constant * torch.ones(len(colours), 1), torch.zeros(len(colours), 13)], dim=1)


def colour_clip(module):
    """A ViT of one block: a patch's channel 0 says how red it is, channel 1 how green. The class token attends to coloured
    patches and hands on what they are, so the image embedding is (red, green)."""
    if module is clip:
        visual = clip.VisionTransformer(64, 8, 64, 1, 1, 16)
        conv, block = visual.conv1, visual.transformer.resblocks[0]
    else:
        visual = slip.VisionTransformer(64, 8, 64, 1, 1)
        conv, block = visual.patch_embed.proj, visual.blocks[0]
    for p in visual.parameters():
        p.data.zero_()
    for m in visual.modules():
        if isinstance(m, nn.LayerNorm):
            m.weight.data.fill_(1)
    for channel, colour in enumerate(filters()):
        conv.weight.data[channel] = colour[:, None, None] / 64
        conv.weight.data[channel + 8] = -colour[:, None, None] / 64
    places = visual.positional_embedding if module is clip else visual.pos_embed[0]
    places.data[1:, 40], places.data[1:, 41] = 1.0, -1.0  # or the norm would make faint colours as strong as others
    qkv = torch.zeros(3, 64, 64)
    qkv[0, :2, 20] = 8.0  # the class token asks for channels 0 and 1
    qkv[1, :2, :2] = torch.eye(2)
    qkv[2, :2, :2] = torch.eye(2)
    if module is clip:
        visual.class_embedding.data[20], visual.class_embedding.data[21] = 3.0, -3.0
        block.attn.in_proj_weight.data.copy_(qkv.flatten(0, 1))
        block.attn.out_proj.weight.data.copy_(torch.eye(64))
        visual.proj.data[:2, :2] = torch.eye(2)
    else:
        visual.cls_token.data[..., 20], visual.cls_token.data[..., 21] = 3.0, -3.0
        block.attn.qkv.weight.data.copy_(qkv.flatten(0, 1))
        block.attn.proj.weight.data.copy_(torch.eye(64))
    model = nn.Module()
    model.visual = visual
    model.encode_image = lambda x: beside_a_constant(visual(x)[:, :2], 5.0)
    return model


def colour_convnet(name):
    """A convolutional network whose channels are colours: `name` is what its last layer is called."""
    visual = nn.Module()
    conv = nn.Conv2d(3, 2, 8, 8, bias=False)
    for channel, colour in enumerate(filters()):
        conv.weight.data[channel] = colour[:, None, None] / 64
    visual.add_module(name, nn.Sequential(conv, nn.ReLU()))
    model = nn.Module()
    model.visual = visual
    model.encode_image = lambda x: beside_a_constant(getattr(visual, name)(x).mean((2, 3)), 0.2)
    return model


def scene(index):
    """A picture of `shapes` and which pixels the object with the colour of its class covers, where it is red or green."""
    shapes = open_dataset("shapes", split="val")
    sample = shapes[index]
    image, colour = decode(sample.image), shapes.classes[sample.label].split()[0]
    wanted = torch.tensor(COLOURS[colour])[:, None, None]
    return image, colour, ((image.int() - wanted).abs().amax(0) < 40)


NETWORKS = {"clip": lambda: colour_clip(clip), "slip": lambda: colour_clip(slip), "resnet": lambda: colour_convnet("layer4"),
            "efficientnet": lambda: colour_convnet("features")}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_the_map_lies_on_the_object(name):
    """On drawn scenes: the share of the map on the red object is well above the share of its area, and so for the green one."""
    model, found = NETWORKS[name](), {"red": 0, "green": 0}
    for index in range(400):
        colour = open_dataset("shapes", split="val").classes[index % 100].split()[0]
        if colour not in found or found[colour] == 4:
            continue
        image, _, mask = scene(index)
        found[colour] += 1
        _, maps = language.supported(model, image[None].float() / 255, WORDS)
        relevance = maps[list(found).index(colour)]
        assert relevance.shape == (8, 8) and relevance.min() >= 0
        share = mask.float().unflatten(1, (8, 8)).mean(2).unflatten(0, (8, 8)).mean(1)  # of each patch
        on_object = (relevance * (share > 0.25)).sum() / relevance.sum()
        area = (share > 0.25).float().mean()
        assert on_object > max(0.6, 1.5 * area), (index, float(on_object), float(area))
    assert found == {"red": 4, "green": 4}


def test_two_objects_and_two_texts():
    """One image, red left and green right: each text has its own half."""
    image = torch.zeros(1, 3, 64, 64)
    image[:, :, 16:48, 0:24] = RED[:, None, None]
    image[:, :, 16:48, 40:64] = GREEN[:, None, None]
    for make in NETWORKS.values():
        cosines, (red, green) = language.supported(make(), image.clone(), WORDS)
        assert red[:, :4].sum() > 0.9 * red.sum() and green[:, 4:].sum() > 0.9 * green.sum()
        assert cosines.shape == (2,) and cosines.min() > 0.1


def test_relevance_by_hand():
    """Two blocks of one head on a class token and two patches, with Chefer's rule written out."""
    g = torch.Generator().manual_seed(0)
    attention, gradients = ([torch.randn(2, 3, 3, generator=g) for _ in range(2)] for _ in range(2))
    first, second = ((a * d).clamp_min(0).mean(0) for a, d in zip(attention, gradients))
    want = (torch.eye(3) + second) @ (torch.eye(3) + first)
    close(language.attention_relevance(attention, gradients), want[0])
    activation, gradient = torch.randn(5, 2, 3, generator=g), torch.randn(5, 2, 3, generator=g)
    want = torch.zeros(2, 3)
    for channel, slope in zip(activation, gradient):
        want += slope.mean() * channel
    close(language.grad_cam(activation, gradient), want.relu())


# ------------------------------------------------ real networks ------------------------------------------------
LANGUAGE = ["clip", "clip_resnet", "slip", "declip", "declip_resnet", "align"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("language")
    captions = ["a red thing", "a green thing", "a blue star", "a dog", "snow"] * 99
    for name in LANGUAGE:
        module = runs.module_of(name)
        args = module.parse_args(module.Args, module.RECIPES, runs.FLAGS[name])
        torch.manual_seed(1)
        tokenizer = Tokenizer("train", args.context_length, captions, args.vocab_size)
        saved = {"method": name.split("_")[0], "args": vars(args), "model": module.build_model(args).state_dict(), "step": 3}
        (root / name).mkdir()
        torch.save({**saved, "tokenizer": tokenizer.to_json()}, root / name / "checkpoint.pt")
    photos = root / "photos"
    photos.mkdir()
    for i, colour in enumerate([(200, 20, 20), (20, 200, 20), (20, 20, 200), (200, 200, 20), (20, 200, 200)]):
        noise = np.random.default_rng(i).integers(0, 50, (40, 50, 3))
        Image.fromarray((noise + colour).astype(np.uint8)).save(photos / f"{i}.png")
    return root


def command(folder, protocol, name, *words):
    """-> the picture, in whose name the texts are too."""
    flags = ["--device", "cpu", "--workers", "0", "--out", str(folder / "out")]
    shutil.rmtree(folder / "out", ignore_errors=True)
    main([protocol, str(folder / name), "--data", str(folder / "photos"), *flags, *words])
    (file,) = (folder / "out").glob(f"{name}_{protocol}_photos*.png")
    return file


@pytest.mark.parametrize("name", LANGUAGE)
def test_explain_draws_every_kind_of_network(folder, name):
    file = command(folder, "explain", name, "--text", "a red thing", "--text", "snow", "--images", "2")
    width, height = Image.open(file).size
    assert (width - 4) % 3 == 0 and height > 2 * 128  # image and two texts, two rows


@pytest.mark.parametrize("name", ["clip", "declip", "slip"])
def test_attention_of_language_transformers(folder, name):
    """Also at another size than that of training; the weights are those that the network multiplies with."""
    assert command(folder, "attention", name, "--images", "2", "--size", "64").exists()
    for protocol in ("pca", "matches"):
        assert command(folder, protocol, name, "--images", "2").exists()


@pytest.mark.parametrize("make", [lambda: clip.VisionTransformer(32, 8, 128, 2, 2, 16), lambda: slip.VisionTransformer(32, 8, 128, 2, 2),
                                  lambda: declip.VisionTransformer(32, 8, 128, 2, 16)])  # fmt: skip
def test_recorded_attention_changes_nothing(make):
    """The same output with and without; rows sum to 1; PyTorch's function is back afterwards, in its fast path too."""
    torch.manual_seed(0)
    vit, x, fused = make().eval(), torch.randn(2, 3, 32, 32), F.scaled_dot_product_attention
    with torch.no_grad():
        want = vit(x)
        with pictures.recorded_attention() as seen:
            close(vit(x), want, atol=1e-5)
    assert len(seen) == 2 and seen[0].shape == (2, 2, 17, 17)
    close(torch.stack(seen).sum(-1), torch.ones(2, 2, 2, 17), atol=1e-5)
    assert F.scaled_dot_product_attention is fused and torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), pictures.recorded_attention(last_only=True) as last:
        vit(x)
    assert len(last) == 1 and torch.equal(last[0], seen[-1])
    attention, features = pictures.attention_and_features(vit, x)
    close(attention.flatten(2), seen[-1][:, :, 0, 1:], atol=1e-5)
    assert features.shape == (2, 4, 4, 128)


def test_gradient_reaches_every_parameter_s_attention():
    """Real CLIPs and ALIGNs: maps are finite, differ between texts and are not zero everywhere. With few cells and random
    weights a map may well be 0, so that several texts are asked."""
    torch.manual_seed(0)
    small = runs.FLAGS["align"]
    models = [clip.CLIP(16, 32, 2, 64, 8, 8, 100, 64, 1, 1), clip.CLIP(16, 64, (1, 1, 1, 1), 8, None, 8, 100, 64, 1, 1),
              align.build_model(align.parse_args(align.Args, align.RECIPES, small))]  # fmt: skip
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # a residual branch that starts at 0 would hide the last convolution
                module.weight.data.fill_(1)
        size = 32 if models[0] is model else 64
        dim = 16 if model is not models[2] else model.encode_image(torch.zeros(2, 3, 64, 64)).shape[1]
        cosines, maps = language.supported(model, torch.randn(1, 3, size, size), F.normalize(torch.randn(12, dim), dim=1))
        assert cosines.shape == (12,) and maps.isfinite().all() and (maps >= 0).all()
        assert len(maps.flatten(1).unique(dim=0)) >= 4 and (maps.flatten(1).sum(1) > 0).sum() >= 4


# ------------------------------------------------ search ------------------------------------------------
class Colours(nn.Module):
    """Embeds an image as its mean colour, and a text as the colour that it names."""

    named = {"red": (1.0, 0.1, 0.1), "green": (0.1, 1.0, 0.1), "blue": (0.1, 0.1, 1.0)}
    context_length = 8

    def encode_image(self, x):
        return x.mean((2, 3))

    def encode_text(self, ids):
        return torch.tensor([list(self.named.values())[int(row[0]) - 1] for row in ids])

    def __call__(self, text):
        return [1 + list(self.named).index(text)]


def test_arithmetic_of_search():
    """Sums and differences of unit vectors, of unit length again."""
    a, b, c = F.normalize(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    close(language.combined([a, b], [c]), (a + b - c) / (a + b - c).norm())
    close(language.combined([a], []), a)


@pytest.mark.parametrize("words, first", [
    (["red"], 0), (["green"], 1), (["green", "--plus", "blue"], 4), (["--plus", "PHOTOS/3.png", "--minus", "red"], 1),
    (["--plus", "PHOTOS/4.png", "--minus", "green"], 2), (["red", "--plus", "green", "--minus", "blue"], 3),
])  # fmt: skip
def test_search_finds_the_colour(folder, words, first, monkeypatch, capsys):
    """Photos 0 to 4 are red, green, blue, yellow and cyan: yellow without red is green, green and blue are cyan."""
    colours = Colours()
    net = types.SimpleNamespace(model=colours, tokenizer=colours, encoder=colours, method="clip", arch="", step=0,
                                view=language_view())
    module = __import__("command").module
    monkeypatch.setattr(module, "open_network", lambda *args, **options: net)
    words = [word.replace("PHOTOS", str(folder / "photos")) for word in words]
    file = command(folder, "search", "clip", *words, "--k", "3", "--json", "--no-cache")
    printed = capsys.readouterr()
    hits = json.loads(printed.out)["hits"]  # lines of JSON alone, the picture's path is beside them
    assert [hit["sample"] for hit in hits][0] == first and len(hits) == 3
    split, begun, written = printed.err.splitlines()
    assert split.endswith(": the picture is of the split train") and written == str(file)
    assert begun.startswith("search of ") and begun.endswith(f": 5 images of {folder / 'photos'}")
    assert [hit["cosine"] for hit in hits] == sorted((hit["cosine"] for hit in hits), reverse=True)
    assert hits[0]["key"].endswith(f"{first}.png")
    file = command(folder, "search", "clip", *words, "--k", "3", "--no-cache")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5 and printed[1].split()[1] == str(first)
    assert all(word in printed[0] for word in words if not word.startswith("--"))


def language_view():
    from monitor import EvalView

    return EvalView(32, mean=(0, 0, 0), std=(1, 1, 1))


def test_search_of_a_real_network(folder, capsys):
    """Several queries are several rows; features are kept for the next query."""
    file = command(folder, "search", "clip", "a dog", "snow", "--minus", "a red thing", "--k", "2")
    assert Image.open(file).height > 2 * 128
    out = capsys.readouterr().out
    assert "a dog - a red thing" in out and "snow - a red thing" in out
    assert len(list((folder / "clip").glob("features_*.pt"))) == 1
    before = out.splitlines()[1:3]
    command(folder, "search", "clip", "a dog", "--minus", "a red thing", "--k", "2")
    assert capsys.readouterr().out.splitlines()[1:3] == before
    assert len(list((folder / "clip").glob("features_*.pt"))) == 1


def test_texts_are_in_the_name_and_may_be_long(folder):
    assert command(folder, "search", "clip", "a dog", "--minus", "snow!").name == "clip_search_photos_a-dog-minus-snow.png"
    names = [command(folder, "search", "clip", "a dog, " * 50 + last).name for last in ("", "snow")]
    emoji = [command(folder, "search", "clip", text).name for text in ("a dog", "a dog \N{DOG FACE}", "a dog \N{CAT FACE}")]
    assert len(set(emoji)) == 3 and emoji[0] == "clip_search_photos_a-dog.png"
    assert names[0] != names[1] and all(name.startswith("clip_search_photos_a-dog-a-dog") and len(name) < 85 for name in names)
    assert command(folder, "explain", "clip", "--text", "a dog", "--images", "1").name == "clip_explain_photos_a-dog.png"


@pytest.mark.parametrize("words", [["search", ""], ["search", "--plus", " "], ["search", "x", "--minus", ""], ["explain", "--text", ""]])
def test_empty_texts(folder, words):
    with pytest.raises(UserError, match="a text is empty"):
        command(folder, words[0], "clip", *words[1:])


ERRORS = [
    ("explain clip", "explain needs --text"),
    ("search clip snow --minus snow", "the query takes away all that it names"),
    ("search clip x --plus ~nobody/x.png", "cannot be read as an image"),
    ("explain clip --text x --size 64", "leave --size out"),
    ("search clip", "search needs a query"),
    ("search clip x --plus nowhere.png", "nowhere.png cannot be read as an image"),
    ("attention clip x", "x is no flag: checkpoints come first"),
    ("attention align", "this picture needs a transformer, not align's efficientnet_micro"),
    ("neighbors clip --queue", "--queue needs a run of declip.py without --released"),
    ("neighbors declip --queue", "--queue needs a run of declip.py without --released"),
]


@pytest.mark.parametrize("words, sentence", ERRORS)
def test_mistakes_are_sentences(folder, words, sentence):
    protocol, name, *rest = words.split()
    with pytest.raises(UserError, match=sentence) as error:
        command(folder, protocol, name, *rest)
    assert "\n" not in str(error.value)


def test_words_behind_the_flags():
    split = __import__("command").module.split_words
    first, flags, others = split(["search", "run", "--data", "x", "a dog", "--no-cache", "b", "--minus", "snow", "--k=3", "c", "--json"])
    assert first == ["search", "run"] and others == ["a dog", "b", "c"]
    assert flags == ["--data", "x", "--no-cache", "--minus", "snow", "--k=3", "--json"]
