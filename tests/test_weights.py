"""weights.py: everybody's weights are recognised, give their network's features, and a wrong file is named."""

import argparse
import json
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision

import clip
import dino
import dinov2
import mocov3
import runs
import slip
from command import main
from common import UserError
from evaluation.weights import FAMILIES, family, open_network
from test_golden import close

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent / "golden"


def official(name, like):
    """A state dict with the names, shapes and types of a released checkpoint, and values of the network `like`."""
    state, values = {}, list(like.state_dict().values())
    g = torch.Generator().manual_seed(0)
    for key, (shape, kind) in json.loads((GOLDEN / f"state_dict_keys_{name}.json").read_text()).items():
        fit = next((i for i, v in enumerate(values) if list(v.shape) == shape), None)
        if kind.startswith("int"):
            state[key] = torch.zeros(shape, dtype=torch.int64)
        elif fit is not None and ("encoder_q." in key or "encoder." in key and "momentum" not in key):
            state[key] = values[fit] + 0.01 * torch.rand(shape, generator=g)
        else:
            state[key] = torch.rand(shape, generator=g)
    return state


def saved(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("name, prefix, looks", [
    ("moco_v1_resnet50", "encoder_q.", "MoCo"), ("moco_v2_resnet50", "encoder_q.", "MoCo"),
    ("simsiam_resnet50", "encoder.", "SimSiam"), ("moco_v3_resnet50", "base_encoder.", "MoCo v3"),
])  # fmt: skip
def test_released_resnets(name, prefix, looks, tmp_path):
    """With `module.` before each name, below state_dict, as they are published."""
    other = torchvision.models.resnet50().eval()
    state = official(name, other)
    content = {"epoch": 99, "arch": "resnet50", "state_dict": {f"module.{k}": v for k, v in state.items()}}
    net = open_network(saved(tmp_path / "released.pth.tar", content), CPU)
    assert net.method == looks and net.tokenizer is None and net.view.size == 224
    other.fc = torch.nn.Identity()
    other.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix) and ".fc." not in k})
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        close(net.encoder.eval()(image), other(image))


@pytest.mark.parametrize("size, width", [("small", 384), ("base", 768)])
def test_heads_of_moco_v3(size, width, tmp_path):
    """ViT-S has 12, not the 6 of other networks of its width: also as a bare backbone."""
    state = official(f"moco_v3_vit_{size}", torch.nn.Identity())
    positions = mocov3.sincos_position_embedding(14, width)
    state["base_encoder.pos_embed"] = state["momentum_encoder.pos_embed"] = positions
    whole = open_network(saved(tmp_path / "vit.pth.tar", {"state_dict": {f"module.{k}": v for k, v in state.items()}}), CPU)
    assert whole.method == "MoCo v3" and whole.encoder.blocks[0].attn.heads == 12 and whole.view.size == 224
    assert torch.equal(whole.encoder.pos_embed, positions)
    bare = {k.removeprefix("base_encoder."): v for k, v in state.items() if k.startswith("base_encoder.")}
    net = open_network(saved(tmp_path / "bare.pth", bare), CPU)
    assert net.encoder.blocks[0].attn.heads == 12 and not hasattr(net.encoder, "head")


@pytest.mark.parametrize("kind", ["backbone", "whole", "ibot", "student"])
def test_dino(kind, tmp_path):
    """Of a training checkpoint the teacher is taken. iBOT's student has a mask token, which is not evaluated."""
    vit = dino.VisionTransformer(32, 8, 192, 2, 3).eval()
    head = {f"head.{name}": torch.rand(3, 3) for name in ("mlp.0.weight", "last_layer.weight_g", "last_layer2.weight_g")}
    whole = {f"backbone.{k}": v for k, v in vit.state_dict().items()} | head
    content = {
        "backbone": vit.state_dict(),
        "whole": {"student": {f"module.{k}": v + 1 for k, v in whole.items()}, "teacher": whole, "epoch": 9,
                  "dino_loss": {"center": torch.rand(1, 3)}, "args": argparse.Namespace(arch="vit_tiny")},
        "ibot": {"state_dict": vit.state_dict() | {"masked_embed": torch.rand(1, 192)}},
        "student": {f"module.{k}": v for k, v in whole.items()},
    }[kind]  # fmt: skip
    net = open_network(saved(tmp_path / "dino.pth", content), CPU)
    image = torch.rand(2, 3, 48, 32)  # another size than that of its training
    with torch.no_grad():
        close(net.encoder.eval()(image), vit(image))
    assert net.view.size == 32


@pytest.mark.parametrize("registers, swiglu", [(0, False), (4, True)])
def test_dinov2(registers, swiglu, tmp_path):
    vit = dinov2.VisionTransformer(56, 14, 192, 2, 3, registers=registers, swiglu=swiglu, gamma=0.5).eval()
    net = open_network(saved(tmp_path / "dinov2.pth", vit.state_dict()), CPU)
    image = torch.rand(2, 3, 70, 42)
    with torch.no_grad():
        close(net.encoder.eval()(image), vit(image))
    assert net.method == "DINOv2" and net.view.size == 224


def test_timm_and_torchvision(tmp_path):
    image = torch.rand(2, 3, 32, 32)
    vit = timm.models.VisionTransformer(32, 8, num_classes=7, embed_dim=192, depth=2, num_heads=3).eval()
    other = torchvision.models.VisionTransformer(32, 8, 2, 3, 192, 768, num_classes=7).eval()
    torch.nn.init.normal_(other.encoder.pos_embedding)
    resnet = timm.create_model("resnet18", num_classes=7).eval()
    wide = torchvision.models.resnet.ResNet(torchvision.models.resnet.Bottleneck, [2, 2, 2, 2], groups=4, width_per_group=8).eval()
    wanted = {"vit": vit.forward_head(vit.forward_features(image), pre_logits=True), "resnet": resnet.forward_head(
        resnet.forward_features(image), pre_logits=True)}  # fmt: skip
    other.heads, wide.fc = torch.nn.Identity(), torch.nn.Identity()
    for name, network in (("vit", vit), ("other", other), ("resnet", resnet), ("wide", wide)):
        safetensors.torch.save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
        for path in (saved(tmp_path / f"{name}.pth", network.state_dict()), tmp_path / f"{name}.safetensors"):
            with torch.no_grad():
                want = wanted[name].detach() if name in wanted else network(image)
                close(open_network(path, CPU).encoder.eval()(image), want, atol=1e-5)


def test_clip_and_slip(tmp_path):
    """As language-image networks; the tokenizer is looked for only where text is asked for."""
    for name, module in (("CLIP", clip), ("SLIP", slip)):
        args = module.parse_args(module.Args, module.RECIPES, runs.FLAGS[name.lower()])
        model = module.build_model(args).eval()
        net = open_network(saved(tmp_path / "released.pt", {"state_dict": model.state_dict()}), CPU, text=False)
        image = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            close(net.encoder.eval()(image), module.image_encoder(model)(image))
            close(net.model.eval().encode_image(image), model.encode_image(image))
        assert net.method == name and net.view.size == 32 and net.tokenizer is None
    model.token_embedding = torch.nn.Embedding(49408, 64)
    net = open_network(saved(tmp_path / "released.pt", {"state_dict": model.state_dict()}), CPU)
    assert net.tokenizer("a cat") == [49406, 320, 2368, 49407] and net.tokenizer.context_length == 24


def test_random_weights_have_the_same_shape(tmp_path):
    vit = dino.VisionTransformer(32, 8, 192, 2, 3)
    path = saved(tmp_path / "dino.pth", vit.state_dict())
    drawn = open_network(path, CPU, random_weights=True).encoder.state_dict()
    assert all(v.shape == vit.state_dict()[k].shape for k, v in drawn.items())
    assert not torch.equal(drawn["blocks.0.attn.qkv.weight"], vit.state_dict()["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("module", [slip, dinov2])
def test_heads_can_be_said(module, tmp_path):
    """The bare ViT-S of SLIP has 12 heads and looks like any other; so may a DINOv2 of one's own."""
    vit = module.VisionTransformer(32, 8, 384, 2, 12).eval()
    if module is dinov2:  # else its branches start with next to no weight
        vit.load_state_dict({k: torch.ones_like(v) if "gamma" in k else v for k, v in vit.state_dict().items()})
    path, image = saved(tmp_path / "slip_vit.pth", vit.state_dict()), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        close(open_network(path, CPU, heads=12).encoder.eval()(image), vit(image))
        assert not torch.allclose(open_network(path, CPU).encoder.eval()(image), vit(image), atol=1e-3)
    with pytest.raises(UserError, match="--heads 5 does not divide the width 384"):
        open_network(path, CPU, heads=5)


def wrong(kind):
    vit = dino.VisionTransformer(32, 8, 192, 2, 3).state_dict()
    resnet = torchvision.models.resnet18().state_dict()
    args = runs.module_of("simclr").parse_args(runs.module_of("simclr").Args, {}, runs.FLAGS["simclr"])
    return {
        "bert": {"embeddings.word_embeddings.weight": torch.rand(3, 3)},
        "cut": {k: v for k, v in vit.items() if k != "norm.bias"},
        "deit": vit | {"dist_token": torch.rand(1, 1, 192)},
        "conv": {f"base_encoder.{k.replace('proj.', 'proj.0.')}": v for k, v in vit.items()} | {"momentum_encoder.x": torch.rand(1)},
        "dinov2": vit | {"blocks.0.ls1.gamma": torch.rand(192)},
        "resnet": {k: v for k, v in resnet.items() if "layer3.1" not in k},
        "mixed": {"method": "simclr", "args": vars(args), "model": {f"visual.{k}": v for k, v in vit.items()}},
        "numbers": {"epoch": 3},
        "list": [1, 2],
        "code": {"x": Path("x")},
    }[kind]


WRONG = [
    ("bert", "looks like nothing known here: it holds embeddings.word_embeddings.weight"),
    ("cut", "looks like a ViT with timm's names, but does not fit: Missing key(s) in state_dict: \"norm.bias\""),
    ("deit", "Unexpected key(s) in state_dict: \"dist_token\""),
    ("conv", "looks like MoCo v3, but does not fit: 'patch_embed.proj.weight' is missing"),
    ("dinov2", "looks like DINOv2, but does not fit: "),
    ("resnet", "looks like a ResNet with torchvision's names, but does not fit: no ResNet has [2, 2, 1, 2] blocks"),
    ("mixed", "does not fit simclr.py, it looks like SLIP"),
    ("numbers", "it holds no tensors"),
    ("list", "holds a list"),
    ("code", "holds code, which is never run"),
]


@pytest.mark.parametrize("kind, sentence", WRONG)
def test_wrong_files_are_sentences(kind, sentence, tmp_path):
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        open_network(saved(tmp_path / "wrong.pt", wrong(kind)), CPU)
    assert "\n" not in str(error.value)


def test_files_of_other_kinds(tmp_path):
    for name, content in (("x.safetensors", b"12345678901"), ("x.pt", pickle.dumps({"a": 1})), ("x.pth", b"PK\x03\x04")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError):
            open_network(tmp_path / name, CPU)


def test_every_family_has_its_method():
    assert all(hasattr(runs.module_of(method), "eval_view") for _, _, method in FAMILIES.values())
    assert family({}) is None


def test_published_weights_on_the_command_line(tmp_path):
    """kNN of a bare backbone, with the number of its checkpoint."""
    from test_evaluate import Toy
    from PIL import Image

    for split, n in (("train", 30), ("val", 9)):
        for i in range(n):
            sample = Toy(n, first=n)[i]
            path = tmp_path / "data" / split / Toy.classes[sample.label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(sample.image).save(path)
    path = saved(tmp_path / "vit.pth", dino.VisionTransformer(32, 8, 192, 2, 3).state_dict())
    main(["knn", str(path), "--data", str(tmp_path / "data"), "--device", "cpu", "--workers", "0", "--random"])
    line = json.loads((tmp_path / "results.jsonl").read_text())
    assert line["method"] == "a ViT with timm's names" and line["step"] is None and "random weights" in line
