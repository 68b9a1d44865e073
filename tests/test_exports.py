"""exports.py: the lines it prints load the weights strictly in the other project, where outputs are the same."""

import pytest
import torch

import runs
from command import main
from common import UserError
from data import Tokenizer
from evaluation.weights import open_network
from test_golden import close

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


def checkpoint(folder, name):
    """A small run of a method, with weights and statistics that no initialisation has. simclr_cifar: CIFAR's stem."""
    path = folder / name
    if path.exists():
        return path
    module = runs.module_of(name)
    more = {"simclr_cifar": ["--stem", "cifar"], "dinov2_registers": ["--registers", "4"], "dinov2_swiglu": ["--ffn", "swiglu"]}
    flags = [*runs.FLAGS[name.split("_")[0]], *more[name]] if name in more else runs.FLAGS[name]
    args = module.parse_args(module.Args, module.RECIPES, flags)
    torch.manual_seed(0)
    model, g = module.build_model(args), torch.Generator().manual_seed(1)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value += 0.05 * torch.rand(value.shape, generator=g)
    saved = {"method": name.split("_")[0], "args": vars(args), "model": model.state_dict(), "step": 3}
    if name in ("clip", "slip"):
        captions = ["a red thing", "a green thing"] * 99
        saved["tokenizer"] = Tokenizer("train", args.context_length, captions, args.vocab_size).to_json()
    path.mkdir()
    torch.save(saved, path / "checkpoint.pt")
    return path


def exported(folder, name, to, capsys):
    """-> the network here, the namespace in which the printed lines ran, those lines."""
    path = checkpoint(folder, name)
    main(["export", str(path), "--to", to])
    printed, space = capsys.readouterr().out, {"images": torch.rand(2, 3, 32, 32)}
    exec(printed, space)
    return open_network(path, CPU), space, printed


RESNETS, VITS = ["simclr", "simclr_cifar", "moco", "byol", "simsiam"], ["dino", "ibot", "mocov3", "slip"]


@pytest.mark.parametrize("to", ["timm", "torchvision"])
@pytest.mark.parametrize("name", [*RESNETS, *VITS])
def test_encoders(folder, name, to, capsys):
    net, space, printed = exported(folder, name, to, capsys)
    with torch.no_grad():
        close(space["model"].eval()(space["images"]), net.encoder.eval()(space["images"]), atol=1e-4)
    assert f"centre of {net.view.size} pixels" in printed and (folder / name / f"export_{to}/model.pt").exists()


@pytest.mark.parametrize("name", ["dinov2", "dinov2_registers"])
def test_dinov2_in_timm(folder, name, capsys):
    net, space, _ = exported(folder, name, "timm", capsys)
    with torch.no_grad():
        close(space["model"].eval()(space["images"]), net.encoder.eval()(space["images"]), atol=1e-4)
    assert space["model"].num_reg_tokens == 4 * (name == "dinov2_registers")


def test_swiglu_stays_here(folder, capsys):
    with pytest.raises(UserError, match="use --to safetensors"):
        exported(folder, "dinov2_swiglu", "timm", capsys)


@pytest.mark.parametrize("name", VITS)
def test_transformers_vit(folder, name, capsys):
    net, space, _ = exported(folder, name, "transformers", capsys)
    with torch.no_grad():
        want = net.encoder.eval()(space["images"])
        close(space["model"].eval()(space["images"]).last_hidden_state[:, 0], want, atol=1e-4)


@pytest.mark.parametrize("name, to", [("clip", "open_clip"), ("clip_resnet", "open_clip"), ("clip", "transformers")])
def test_clip(folder, name, to, capsys):
    net, space, _ = exported(folder, name, to, capsys)
    images, ids, other = space["images"], torch.randint(1, 500, (3, 24)), space["model"].eval()
    ids[:, 9], ids[:, 10:] = 599, 0
    with torch.no_grad():
        if to == "open_clip":
            found = other.encode_image(images), other.encode_text(ids)
        else:
            out = other(input_ids=ids, pixel_values=images)
            found = out.image_embeds, out.text_embeds
            unit = torch.nn.functional.normalize
        for theirs, ours in zip(found, (net.model.eval().encode_image(images), net.model.encode_text(ids))):
            close(theirs, ours if to == "open_clip" else unit(ours, dim=1), atol=1e-4)
    assert (folder / name / f"export_{to}/tokenizer.json").exists() == (name == "clip")


@pytest.mark.parametrize("name", ["clip", "slip", "dino", "moco"])
def test_safetensors(folder, name, capsys):
    """CLIP and SLIP whole; of others what is evaluated. It is read here again."""
    net, space, _ = exported(folder, name, "safetensors", capsys)
    want = (net.model if name in ("clip", "slip") else net.encoder).state_dict()
    assert space["state"].keys() == want.keys() and all(torch.equal(space["state"][k], want[k]) for k in want)
    again = open_network(folder / name / "export_safetensors/model.safetensors", CPU, text=False)
    if name != "dino":  # whose small one has a number of heads of its own
        with torch.no_grad():
            close(again.encoder.eval()(space["images"]), net.encoder.eval()(space["images"]))


ERRORS = [
    ("clip --to timm", "clip's vit_micro_patch16 has no counterpart in timm"),
    ("simclr --to open_clip", "open_clip takes CLIP, simclr's image encoder goes to timm"),
    ("moco --to transformers", "a ResNet goes to timm or torchvision"),
    ("clip_resnet --to transformers", "has no CLIP with a ResNet"),
    ("clip slip --to timm", "one checkpoint at a time"),
    ("nowhere --to timm", "no checkpoint"),
    ("clip --to keras", "keras"),
]


@pytest.mark.parametrize("words, sentence", ERRORS)
def test_mistakes_are_sentences(folder, words, sentence):
    paths = words.split("--")[0].split()
    paths = [str(folder / p if p == "nowhere" else checkpoint(folder, p)) for p in paths]
    with pytest.raises(UserError, match=sentence) as error:
        main(["export", *paths, *words.split()[len(paths) :]])
    assert "\n" not in str(error.value)


def test_width_that_nobody_has(folder, tmp_path):
    simclr = runs.module_of("simclr")
    args = simclr.parse_args(simclr.Args, {}, [*runs.FLAGS["simclr"], "--arch", "resnet18x2"])
    saved = {"method": "simclr", "args": vars(args), "model": simclr.build_model(args).state_dict()}
    torch.save(saved, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="usual depth and width"):
        main(["export", str(tmp_path), "--to", "torchvision"])
    main(["export", str(tmp_path), "--to", "safetensors", "--out", str(tmp_path / "there")])
    assert (tmp_path / "there/model.safetensors").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="use another --out"):
        main(["export", str(tmp_path), "--to", "safetensors", "--out", str(tmp_path / "file")])
