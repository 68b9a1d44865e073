"""exports.py: the lines it prints load the weights strictly in the other project, where outputs are the same."""

import math
import resource
import signal

import pytest
import torch

import clip
import dinov2
import runs
from command import main
from common import UserError
from data import Tokenizer
from evaluation.exports import EXPORTS, is_whole
from evaluation.weights import open_network
from monitor import tokenize
from test_golden import close

CPU = torch.device("cpu")
WIDE = torch.randint(0, 256, (3, 40, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))  # a photo


SIMCLRV2 = "--data shapes --arch resnet18 --width 1 --stem small --image-size 32".split()  # what its train() takes from the start


DRAWS = {name: getattr(torch.nn.init, name) for name in ("normal_", "trunc_normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_")}


@pytest.fixture
def no_draws(monkeypatch):
    """Whoever opens a checkpoint draws first weights, which takes longer than all the rest, and puts the loaded ones in their
    place. Here the first ones are NaN, and so would be what is computed with one that is not replaced."""
    for name in DRAWS:
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor.data.fill_(math.nan))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


def checkpoint(folder, name):
    """A small run of a method, with weights and statistics that no initialisation has. simclr_cifar: CIFAR's stem."""
    path = folder / name
    if path.exists():
        return path
    module = runs.module_of(name)
    more = {"simclr_cifar": ["--stem", "cifar"], "simclr_small": ["--stem", "small"],
            "dinov2_registers": ["--registers", "4"], "dinov2_swiglu": ["--ffn", "swiglu"],
            "align_hf": ["--embed-dim", "160"], "align_long": ["--embed-dim", "160", "--context-length", "512"],
            "simclr_imagenet": ["--stem", "imagenet", "--image-size", "64"],
            "simclrv2_bare": ["--head-layer", "0"], "slip_ablations": ["--clip-scale", "0"]}  # fmt: skip
    flags = SIMCLRV2 if name.startswith("simclrv2") else runs.FLAGS.get(name) or runs.FLAGS[name.split("_")[0]]
    flags = [*flags, *more.get(name, [])]
    if name in RESNETS or name == "simclr_imagenet":
        flags = [*flags, *runs.RESNET18]
    args = module.parse_args(module.Args, module.RECIPES, flags)
    if name.startswith("simclrv2"):
        args.num_classes = 5  # which its train() adds
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        for draw, function in DRAWS.items():
            patch.setattr(torch.nn.init, draw, function)
        model, g = module.build_model(args), torch.Generator().manual_seed(1)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value += 0.05 * torch.rand(value.shape, generator=g)
    saved = {"method": module.__name__, "args": vars(args), "model": model.state_dict(), "step": 3}
    if name in ("clip", "slip", "align_long"):
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


RESNETS, VITS = ["simclr", "simclr_cifar", "simclr_small", "moco", "byol", "simsiam"], ["dino", "ibot", "mocov3", "slip"]


@pytest.mark.usefixtures("no_draws")
@pytest.mark.parametrize("to", ["timm", "torchvision"])
@pytest.mark.parametrize("name", [*RESNETS, *VITS])
def test_encoders(folder, name, to, capsys):
    net, space, printed = exported(folder, name, to, capsys)
    with torch.no_grad():
        close(space["model"].eval()(space["images"]), net.encoder.eval()(space["images"]), atol=1e-4)
    filter = "bilinear" if name in ("moco", "mocov3", "simsiam", "slip") else "bicubic"
    assert f"# images: shorter side to {net.view.resize} ({filter}), centre of {net.view.size} pixels, minus" in printed
    assert (folder / name / f"export_{to}/model.pt").exists()


@pytest.mark.parametrize("to", ["timm", "transformers"])
@pytest.mark.parametrize("name", ["dinov2", "dinov2_registers", "dinov2_swiglu"])
def test_dinov2(folder, name, to, capsys):
    net, space, _ = exported(folder, name, to, capsys)
    with torch.no_grad():
        out = space["features"] if to == "transformers" else space["model"].eval()(space["images"])
        close(out, net.encoder.eval()(space["images"]), atol=1e-4)
    if to == "timm":
        assert space["model"].num_reg_tokens == 4 * (name == "dinov2_registers")
    else:
        kind = "Dinov2WithRegistersModel" if name == "dinov2_registers" else "Dinov2Model"
        assert type(space["model"]).__name__ == kind


@pytest.mark.parametrize("to", ["timm", "transformers"])
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_of_518_pixels(registers, to, tmp_path, capsys):
    """It is evaluated with 224, and so is what the lines load."""
    vit = dinov2.VisionTransformer(518, 14, 192, 1, 3, registers=registers, gamma=0.5).eval()
    torch.nn.init.normal_(vit.pos_embed)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    main(["export", str(tmp_path / "vit.pth"), "--to", to, "--out", str(tmp_path / to)])
    space = {"images": torch.rand(1, 3, 224, 224)}
    exec(capsys.readouterr().out, space)
    back = open_network(tmp_path / to, CPU)
    with torch.no_grad():
        want = vit(space["images"])
        close(space["features"] if to == "transformers" else space["model"].eval()(space["images"]), want, atol=1e-4)
        close(back.encoder.eval()(space["images"]), want, atol=1e-4)
    assert back.view.size == 224


@pytest.mark.usefixtures("no_draws")
def test_align_in_transformers(folder, capsys):
    net, space, printed = exported(folder, "align_hf", "transformers", capsys)
    assert "# images: both sides to 77 (bilinear), centre of 64 pixels, minus (0.5, 0.5, 0.5)" in printed
    images, ids, other = torch.rand(2, 3, 64, 64), torch.randint(1, 500, (3, 24)), space["model"].eval()
    with torch.no_grad():
        close(other.get_image_features(images).pooler_output, net.model.eval().encode_image(images), atol=1e-4)
        out = other(input_ids=ids, pixel_values=images, attention_mask=torch.ones_like(ids))
        unit = torch.nn.functional.normalize
        close(out.text_embeds, unit(net.model.encode_text(ids), dim=1), atol=1e-4)
    with pytest.raises(UserError, match="another width than the embedding: --to safetensors takes it"):
        main(["export", str(checkpoint(folder, "align")), "--to", "transformers"])


def test_a_long_context_comes_back(folder, capsys):
    """Of published weights with 512 positions the first 64 were trained, of a run with as many all."""
    path = checkpoint(folder, "align_long")
    main(["export", str(path), "--to", "transformers"])
    capsys.readouterr()
    net, back = open_network(path, CPU), open_network(path / "export_transformers", CPU)
    text = ["a red thing and a green thing " * 40]
    ids = tokenize(net.tokenizer, text, CPU)
    assert net.tokenizer.context_length == back.tokenizer.context_length == 512
    assert ids[0, 100] > 0 and torch.equal(tokenize(back.tokenizer, text, CPU), ids)
    with torch.no_grad():
        close(back.model.encode_text(ids), net.model.encode_text(ids), atol=1e-4)


METHODS = ["clip", "clip_resnet", "slip", "slip_ablations", "declip", "declip_resnet", "align", "align_hf", "simclr_small", "simclr_cifar",
           "simclr_imagenet", "simclrv2", "simclrv2_bare", "moco", "mocov3",
           "byol", "simsiam", "dino", "ibot", "dinov2", "dinov2_registers", "dinov2_swiglu"]  # fmt: skip


@pytest.mark.usefixtures("no_draws")
@pytest.mark.parametrize("name", METHODS)
def test_everything_comes_back(folder, name, capsys):
    """Whatever a checkpoint goes to is read here again, with equal features and preprocessing; what is named in a refusal works."""
    path, done = checkpoint(folder, name), []
    net, images = open_network(path, CPU), torch.rand(2, 3, *[64 if "align" in name else 32] * 2)
    with torch.no_grad():
        want = net.encoder.eval()(images)
        for to in EXPORTS:
            try:
                main(["export", str(path), "--to", to])
            except UserError as error:
                words = str(error)
                assert words.endswith("takes it") and f"--to {to}" not in words
                named = set(words.rpartition(": ")[2].replace("--to ", "").removesuffix(" takes it").split(" or "))
                continue
            done.append(to)
            back = open_network(path / f"export_{to}", CPU, text=bool(net.tokenizer))
            assert bool(back.tokenizer) == (bool(net.tokenizer) and is_whole(back)), to
            close(back.encoder.eval()(images), want, atol=1e-4)
            assert vars(back.view) == vars(net.view) and type(back.view) is type(net.view), to
            assert torch.equal(back.view.crop(WIDE), net.view.crop(WIDE)), to  # ALIGN's squashes
            if is_whole(net) and is_whole(back):
                ids = torch.randint(1, 500, (2, 24), generator=torch.Generator().manual_seed(0))
                close(back.model.eval().encode_text(ids), net.model.eval().encode_text(ids), atol=1e-4)
    capsys.readouterr()
    assert "safetensors" in done and (len(done) == len(EXPORTS) or named == set(done))


def test_laions_clip_keeps_its_gelu_and_heads(tmp_path, capsys):
    model = clip.CLIP(32, 32, 0, 64, 8, 16, 600, 128, 4, 1)
    model.visual = clip.VisionTransformer(32, 8, 128, 1, 4, 32)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    given = ["--heads", "4", "--text-heads", "4", "--gelu", "exact"]
    net = open_network(tmp_path / "x.pt", CPU, heads=4, text_heads=4, gelu="exact", text=False)
    images, ids = torch.rand(2, 3, 32, 32), torch.randint(1, 500, (2, 16))
    for to in ("open_clip", "transformers", "safetensors"):
        folder = tmp_path / to
        main(["export", str(tmp_path / "x.pt"), "--to", to, "--out", str(folder), *given])
        space = {}
        exec(capsys.readouterr().out, space)
        back = open_network(folder, CPU, text=False)
        with torch.no_grad():
            close(back.encoder.eval()(images), net.encoder.eval()(images), atol=1e-5)
            close(back.model.eval().encode_text(ids), net.model.eval().encode_text(ids), atol=1e-5)
            if to == "open_clip":
                close(space["model"].eval().encode_image(images), net.model.encode_image(images), atol=1e-4)


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


@pytest.mark.parametrize("name", ["clip", "slip", "declip", "dino", "moco"])
def test_safetensors(folder, name, capsys):
    """Language-image models whole; of others what is evaluated."""
    net, space, _ = exported(folder, name, "safetensors", capsys)
    want = (net.model if "lip" in name else net.encoder).state_dict()
    assert space["state"].keys() == want.keys() and all(torch.equal(space["state"][k], want[k]) for k in want)


ERRORS = [
    ("clip --to timm", "which has no such image encoder: --to open_clip or --to transformers or --to safetensors takes it"),
    ("declip --to timm", "which has no such image encoder: --to safetensors takes it"),
    ("declip_resnet --to torchvision", "which has no such image encoder: --to safetensors takes it"),
    ("simclr --to open_clip", "which takes no other language-image model than CLIP: --to timm or --to torchvision or --to safetensors"),
    ("moco --to transformers", "which has ResNets in a form of its own: --to timm or --to torchvision or --to safetensors takes it"),
    ("clip_resnet --to transformers", "has no CLIP with a ResNet: --to open_clip or --to safetensors takes it"),
    ("dinov2 --to torchvision", "has no LayerScale: --to timm or --to transformers or --to safetensors takes it"),
    ("clip slip --to timm", "one checkpoint at a time"),
    ("nowhere --to timm", "no checkpoint"),
    ("clip --to keras", "keras"),
]


@pytest.mark.usefixtures("no_draws")
@pytest.mark.parametrize("words, sentence", ERRORS)
def test_mistakes_are_sentences(folder, words, sentence):
    paths = words.split("--")[0].split()
    paths = [str(folder / p if p == "nowhere" else checkpoint(folder, p)) for p in paths]
    with pytest.raises(UserError, match=sentence) as error:
        main(["export", *paths, *words.split()[len(paths) :]])
    assert "\n" not in str(error.value)


def test_width_that_nobody_has(folder, tmp_path):
    simclr = runs.module_of("simclr")
    args = simclr.parse_args(simclr.Args, {}, [*runs.FLAGS["simclr"], "--arch", "resnet10x2"])
    saved = {"method": "simclr", "args": vars(args), "model": simclr.build_model(args).state_dict()}
    torch.save(saved, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="usual depth and width: --to safetensors takes it"):
        main(["export", str(tmp_path), "--to", "torchvision"])
    main(["export", str(tmp_path), "--to", "safetensors", "--out", str(tmp_path / "there")])
    wide, image = open_network(tmp_path, CPU), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        close(open_network(tmp_path / "there", CPU).encoder.eval()(image), wide.encoder.eval()(image))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="use another --out"):
        main(["export", str(tmp_path), "--to", "safetensors", "--out", str(tmp_path / "file")])


@pytest.mark.usefixtures("no_draws")
def test_files_of_others_stay(folder, tmp_path, capsys):
    """Neither a user's model nor a run nor an export in another form is written over, an earlier export of the same form is."""
    path = checkpoint(folder, "simclr")
    for name in ("mine/model.pt", "run/args.json", "older/checkpoint.pt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("mine")
    cases = [("mine", "timm", "has a file model.pt, which is not from an export"), ("run", "timm", "is the directory of a run"),
             ("older", "safetensors", "is the directory of a run")]  # fmt: skip
    for name, to, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            main(["export", str(path), "--to", to, "--out", str(tmp_path / name)])
    assert [(tmp_path / name).read_text() for name in ("mine/model.pt", "run/args.json", "older/checkpoint.pt")] == ["mine"] * 3
    assert len(list(tmp_path.rglob("*.*"))) == 3
    for _ in range(2):
        main(["export", str(path), "--to", "timm", "--out", str(tmp_path / "new")])
    with pytest.raises(UserError, match="has a file model.pt, which is not from an export of the same form"):
        main(["export", str(path), "--to", "torchvision", "--out", str(tmp_path / "new")])
    with pytest.raises(UserError, match="has a file export.json"):
        main(["export", str(path), "--to", "safetensors", "--out", str(tmp_path / "new")])
    with pytest.raises(UserError, match="holds the checkpoint itself"):
        main(["export", str(tmp_path / "new"), "--to", "torchvision", "--out", str(tmp_path / "new")])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("no_draws")
@pytest.mark.parametrize("to", ["timm", "safetensors"])
def test_a_full_disk_leaves_the_earlier_export(to, folder, tmp_path, capsys):
    """And no part of the weights, neither in a new folder."""
    path = str(checkpoint(folder, "clip" if to == "safetensors" else "simclr"))
    main(["export", path, "--to", to, "--out", str(tmp_path / "earlier")])
    before = contents(tmp_path / "earlier")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # which would end the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file can grow beyond that
    try:
        for name in ("earlier", "new"):
            with pytest.raises(UserError, match=f"{name} cannot be written .*, use another --out"):
                main(["export", path, "--to", to, "--out", str(tmp_path / name)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(tmp_path / "earlier") == before and not contents(tmp_path / "new")


@pytest.mark.usefixtures("no_draws")
def test_each_step_has_a_folder_of_its_own(folder, tmp_path, capsys):
    path = checkpoint(folder, "simclr") / "checkpoint.pt"
    for name in ("checkpoint.pt", "checkpoint_1.pt", "checkpoint_4.pt"):
        (tmp_path / name).write_bytes(path.read_bytes())
        main(["export", str(tmp_path / name), "--to", "timm"])
    folders = {file.parent.name for file in tmp_path.rglob("model.pt")}
    assert folders == {"export_timm", "export_timm_checkpoint_1", "export_timm_checkpoint_4"}
