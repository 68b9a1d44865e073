"""weights.py: everybody's weights are recognised, give their network's features, and a wrong file is named."""

import argparse
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
import transformers

import clip
import declip
import dino
import dinov2
import mocov3
import runs
import slip
from command import main
from common import UserError
from names import clip_from_transformers, clip_to_transformers, dinov2_to_timm
from recognise import FAMILIES, OTHERS, family, other, state_of
from evaluation.weights import load_released, open_network
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


def test_declip_s_tokens_make_room_for_its_mask(tmp_path):
    """Start and end of the released weights are 49407 and 49408 (docs/declip.md)."""
    args = declip.parse_args(declip.Args, declip.RECIPES, runs.FLAGS["declip"])
    args.vocab_size = 49409
    model = declip.build_model(args)
    net = open_network(saved(tmp_path / "released.pt", {"state_dict": model.state_dict()}), CPU)
    assert net.method == "DeCLIP"
    assert net.tokenizer("a cat") == [49407, 320, 2368, 49408] and net.tokenizer.vocab_size == 49409


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


def noisy(model):
    """Every parameter gets a value that matters, LayerScale's and the positions' too."""
    g = torch.Generator().manual_seed(1)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value += 0.1 * torch.randn(value.shape, generator=g) + 0.5 * (value.ndim == 1)
    return model.eval()


def same_features(path, want, image, **given):
    with torch.no_grad():
        net = open_network(path, CPU, text=False, **given)
        close(net.encoder.eval()(image), want(image) if callable(want) else want, atol=1e-4)
    return net


@pytest.mark.parametrize("width, heads", [(1280, 16), (1408, 16), (1152, 16), (1664, 16), (1536, 24), (1024, 16), (320, 5)])
def test_heads_of_known_widths(width, heads, tmp_path, capsys):
    """The table's, and one for 64 channels elsewhere; hidden layers of ViT-g and ViT-bigG are not 4 times as wide."""
    ratio = {1408: 48 / 11, 1664: 64 / 13}.get(width, 4)
    vit = timm.models.VisionTransformer(16, 8, num_classes=0, embed_dim=width, depth=1, num_heads=heads, mlp_ratio=ratio)
    torch.nn.init.normal_(vit.blocks[0].attn.qkv.weight, std=0.1)
    same_features(saved(tmp_path / "vit.pth", vit.state_dict()), vit.eval(), torch.rand(1, 3, 16, 16))
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f"{heads} heads" in line and "--heads" in line and "a ViT with timm's names" in line
    other_heads = 8 if width != 320 else 10
    assert open_network(tmp_path / "vit.pth", CPU, heads=other_heads).encoder.blocks[0].attn.heads == other_heads


def test_width_of_nobody(tmp_path):
    state = dino.VisionTransformer(16, 8, 416, 1, 8).state_dict()
    path = saved(tmp_path / "vit.pth", state)
    with pytest.raises(UserError, match="do not tell how many attention heads a transformer of width 416 has: give --heads"):
        open_network(path, CPU)
    assert open_network(path, CPU, heads=8).encoder.blocks[0].attn.heads == 8
    model = clip.CLIP(32, 32, 0, 64, 8, 16, 100, 416, 8, 1)
    model.visual = clip.VisionTransformer(32, 8, 416, 1, 8, 32)
    path = saved(tmp_path / "clip.pth", model.state_dict())
    for given in ({}, {"heads": 8}, {"text_heads": 8}):
        with pytest.raises(UserError, match="width 416 has: give --(text-)?heads"):
            open_network(path, CPU, text=False, **given)
    same_features(path, model.visual.pool, torch.rand(1, 3, 32, 32), heads=8, text_heads=8)


def test_zero_class_position_is_not_moco_v3(tmp_path):
    vit = noisy(dino.VisionTransformer(32, 8, 384, 1, 6))
    vit.pos_embed.data[:, 0] = 0
    assert same_features(saved(tmp_path / "vit.pth", vit.state_dict()), vit, torch.rand(1, 3, 32, 32)).encoder.blocks[0].attn.heads == 6
    half = vit.state_dict() | {"pos_embed": mocov3.sincos_position_embedding(4, 384).half()}
    assert open_network(saved(tmp_path / "half.pth", half), CPU).encoder.blocks[0].attn.heads == 12


@pytest.mark.parametrize("name", ["clip", "slip", "declip"])
def test_heads_of_language_image_networks(name, tmp_path):
    """They can be said for both encoders, and say in one line what they are otherwise."""
    if name == "clip":
        model = clip.CLIP(32, 32, 0, 64, 8, 16, 100, 192, 6, 1)
        model.visual = clip.VisionTransformer(32, 8, 192, 1, 6, 32)
    elif name == "slip":
        visual = slip.VisionTransformer(32, 8, 192, 1, 6)
        model = slip.SLIP(32, visual, 192, 16, 100, 192, 6, 1, 48, 24)
    else:
        visual, text = declip.VisionTransformer(32, 8, 192, 1, 32), declip.TextTransformer(16, 100, 192, 1, 32)
        for layer in (visual.transformer.resblocks[0].attn, text.transformer.resblocks[0].attn):
            layer.num_heads, layer.head_dim = 6, 32
        model = declip.DeCLIP(32, visual, text, 48)
    noisy(model)
    path, image, ids = saved(tmp_path / "x.pt", model.state_dict()), torch.rand(1, 3, 32, 32), torch.randint(1, 99, (2, 16))
    for given in ({"heads": 6, "text_heads": 6}, {}):
        net = open_network(path, CPU, text=False, **given)
        with torch.no_grad():
            same = [torch.allclose(net.model.eval().encode_image(image), model.encode_image(image), atol=1e-4),
                    torch.allclose(net.model.encode_text(ids), model.encode_text(ids), atol=1e-4)]  # fmt: skip
        assert all(same) if given else not any(same)
    with pytest.raises(UserError, match="--text-heads 7 does not divide the width 192"):
        open_network(path, CPU, text=False, text_heads=7)


def test_laions_clip_has_gelu(tmp_path, capsys):
    """By flag, by the file that open_clip puts beside the weights, or else as OpenAI's; with a hidden layer of ViT-g's form."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    vision = {"layers": 1, "width": 192, "patch_size": 8, "image_size": 32, "head_width": 32, "mlp_ratio": 4.5}
    text = {"context_length": 16, "vocab_size": 100, "width": 192, "heads": 6, "layers": 1}
    for quick in (True, False):
        model = noisy(open_clip.model.CLIP(32, vision, text, quick_gelu=quick))
        folder = tmp_path / str(quick)
        folder.mkdir()
        path = saved(folder / "open_clip_pytorch_model.bin", {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}})
        image, ids = torch.rand(1, 3, 32, 32), torch.randint(1, 99, (2, 16))

        def same(model=model, path=path, image=image, ids=ids, **given):
            module, ours = load_released(path, **given)
            assert module is clip
            with torch.no_grad():
                found = [(ours.eval().encode_image(image), model.encode_image(image)), (ours.encode_text(ids), model.encode_text(ids))]
            return [torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in found]

        assert all(same(heads=6, text_heads=6, gelu="quick" if quick else "exact"))
        assert not any(same(heads=6, text_heads=6, gelu="exact" if quick else "quick"))
        capsys.readouterr()
        assert all(same(heads=6, text_heads=6)) == quick
        assert "--gelu exact" in capsys.readouterr().err
        (folder / "open_clip_config.json").write_text(json.dumps({
            "model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, **({"quick_gelu": True} if quick else {})},
            "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear"}}))  # fmt: skip
        assert all(same())
        view = open_network(folder, CPU, text=False).view
        assert view.mean == (0.5, 0.5, 0.5) and view.filter.name == "BILINEAR" and view.size == 32
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["preprocess_cfg"] |= {"resize_mode": "squash", "interpolation": "random"}  # as CLIPA and DFN have them
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        capsys.readouterr()
        assert open_network(folder, CPU, text=False).view.filter.name == "BICUBIC"
        assert "cropped, where they were trained on images resized by 'squash'" in capsys.readouterr().err
    with pytest.raises(UserError, match="--text-heads and --gelu are for language-image weights"):
        open_network(saved(tmp_path / "vit.pth", dino.VisionTransformer(16, 8, 192, 1, 3).state_dict()), CPU, gelu="exact")


@pytest.mark.parametrize("width, exact", [(1280, True), (1408, True), (1664, True), (1024, False)])
def test_gelu_of_wide_clips(width, exact, tmp_path, capsys):
    """LAION's ViT-H, ViT-g and ViT-bigG have GELU; their bare files do not say so, and OpenAI's widest has 1024."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    vision = {"layers": 1, "width": width, "patch_size": 8, "image_size": 16, "head_width": width // 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1}
    model = noisy(open_clip.model.CLIP(32, vision, text, quick_gelu=not exact))
    path, image = saved(tmp_path / "x.bin", model.state_dict()), torch.rand(1, 3, 16, 16)
    ids = torch.randint(1, 99, (2, 8), generator=torch.Generator().manual_seed(0))
    for given, same in (({}, True), ({"gelu": "quick" if exact else "exact"}, False)):
        _, ours = load_released(path, **given)
        line = capsys.readouterr().err
        with torch.no_grad():
            found = [(ours.eval().encode_image(image), model.encode_image(image)), (ours.encode_text(ids), model.encode_text(ids))]
        assert [torch.allclose(a, b, atol=1e-3, rtol=1e-4) for a, b in found] == [same, same]
        if not given:
            assert (f"exact GELU (LAION's for width {width}, else --gelu quick)" if exact else "QuickGELU as OpenAI's") in line


def chunked(state):
    return {re.sub(r"blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", k): v for k, v in state.items()}


@pytest.mark.parametrize("kind", ["teacher", "chunks", "compiled", "wrapped", "nested", "beside"])
def test_forms_of_a_checkpoint(kind, tmp_path):
    """Of a DINOv2 with four blocks: as its training saves it, and as PyTorch's tools and people wrap it."""
    vit = noisy(dinov2.VisionTransformer(28, 14, 192, 4, 3, registers=4))
    state = vit.state_dict()
    heads = {f"{name}.mlp.0.weight": torch.rand(3, 3) for name in ("dino_head", "ibot_head")}
    content = {
        "teacher": {"teacher": chunked({f"backbone.{k}": v for k, v in state.items()}) | heads},
        "chunks": chunked(state),
        "compiled": {"model_state_dict": {f"_orig_mod.module.{k}": v for k, v in state.items()}},
        "wrapped": {"state_dict": {f"module._orig_mod.model.{k}": v for k, v in state.items()}},
        "nested": {"model": {f"model.net.{k}": v for k, v in state.items()} | {"loss.weight": torch.rand(2)}},
        "beside": {"model": state, "best": np.float64(71.5), "out": Path("runs"), "curve": np.arange(3), "args": argparse.Namespace(x=1)},
    }[kind]  # fmt: skip
    net = same_features(saved(tmp_path / "x.pth", content), vit, torch.rand(1, 3, 28, 28))
    assert net.method.startswith("DINOv2")


@pytest.mark.parametrize("kind", ["plain", "registers", "swiglu"])
def test_dinov2_of_timm(kind, tmp_path):
    """No mask token, and with registers no position of the class token; ViT-g's SwiGLU is called fc1 and fc2."""
    options = {"plain": {}, "registers": {"reg_tokens": 4, "no_embed_class": True}, "swiglu": {
        "mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 2.66667 * 2}}[kind]  # fmt: skip
    vit = noisy(timm.models.VisionTransformer(28, 14, num_classes=0, embed_dim=192, depth=2, num_heads=3, init_values=1.0, **options))
    net = same_features(saved(tmp_path / "x.pth", vit.state_dict()), vit, torch.rand(1, 3, 28, 28))
    assert net.method == "DINOv2"
    vit.load_state_dict(dinov2_to_timm(net.encoder.state_dict()) if kind == "registers" else vit.state_dict())


@pytest.mark.parametrize("form", ["memory", "hub"])
@pytest.mark.parametrize("kind", ["vit", "classifier", "dinov2", "registers"])
def test_transformers_of_transformers(kind, form, tmp_path):
    """As a state dict and as save_pretrained writes it, whose names differ in version 5; the number of heads is config.json's."""
    sizes = dict(hidden_size=192, num_hidden_layers=2, num_attention_heads=6, image_size=32, patch_size=8)
    if kind in ("vit", "classifier"):
        config = transformers.ViTConfig(**sizes, intermediate_size=768)
        model = transformers.ViTModel(config) if kind == "vit" else transformers.ViTForImageClassification(config)
    elif kind == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    else:
        model = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**sizes, use_swiglu_ffn=True))
    noisy(model)
    image, bare = torch.rand(2, 3, 32, 32), model.vit if kind == "classifier" else model
    with torch.no_grad():
        want = bare(image).last_hidden_state[:, 0]
    if form == "hub":
        model.save_pretrained(tmp_path)
        same_features(tmp_path, want, image)
    else:
        same_features(saved(tmp_path / "x.bin", model.state_dict()), want, image, heads=6)


@pytest.mark.parametrize("form", ["memory", "hub"])
def test_clip_of_transformers(form, tmp_path):
    text = dict(vocab_size=100, hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, eos_token_id=2,
                bos_token_id=None, pad_token_id=None, max_position_embeddings=16, hidden_act="gelu")  # fmt: skip
    vision = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8,
                  hidden_act="gelu")  # fmt: skip
    model = noisy(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)))
    given = dict(heads=4, text_heads=2, gelu="exact")
    if form == "hub":
        model.save_pretrained(tmp_path)
        path, given = tmp_path, {}
    else:
        path = saved(tmp_path / "x.bin", model.state_dict())
    module, ours = load_released(path, **given)
    image, ids = torch.rand(2, 3, 32, 32), torch.randint(3, 99, (2, 16))
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=image)
        unit = torch.nn.functional.normalize
        close(unit(ours.eval().encode_image(image), dim=1), out.image_embeds)
        close(unit(ours.encode_text(ids), dim=1), out.text_embeds)
    state = ours.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in clip_from_transformers(clip_to_transformers(state)).items())


def test_slips_baselines(tmp_path):
    """CLIP has no image_mlp, SimCLR no text; the ViT-S of both has 12 heads."""
    visual = slip.VisionTransformer(32, 8, 384, 1, 12)
    model = noisy(slip.SLIP(32, visual, 384, 16, 100, 64, 1, 1, 48, 24))
    every = {f"module.{k}": v for k, v in model.state_dict().items()}
    image, ids = torch.rand(1, 3, 32, 32), torch.randint(1, 99, (2, 16))
    path = saved(tmp_path / "clip_small.pt", {"state_dict": {k: v for k, v in every.items() if "image_mlp" not in k}})
    net = same_features(path, model.visual, image)
    assert net.method == "SLIP's CLIP" and load_released(path)[0] is slip
    with torch.no_grad():
        close(net.model.eval().encode_text(ids), model.encode_text(ids))
    some = {k: v for k, v in every.items() if k.startswith(("module.visual", "module.image_mlp"))}
    net = same_features(saved(tmp_path / "simclr_small.pt", {"state_dict": some}), model.visual, image)
    assert net.method == "SLIP's SimCLR" and net.tokenizer is None


def test_mae_and_swav(tmp_path, capsys):
    """What they hold beside the encoder is left out and counted."""
    vit, resnet = noisy(dino.VisionTransformer(32, 8, 192, 1, 3)), torchvision.models.resnet50().eval()
    decoder = {f"decoder_{name}": torch.rand(2) for name in ("embed.weight", "pos_embed", "pred.bias")} | {"mask_token": torch.rand(1, 1, 192)}
    net = same_features(saved(tmp_path / "mae.pth", {"model": vit.state_dict() | decoder}), vit, torch.rand(1, 3, 32, 32))
    assert net.method == "MAE" and "and 1 more" in capsys.readouterr().err
    extra = {"projection_head.0.weight": torch.rand(2, 2), "prototypes.weight": torch.rand(3, 2)}
    state = {f"module.{k}": v for k, v in {**resnet.state_dict(), **extra}.items() if "fc." not in k}
    resnet.fc = torch.nn.Identity()
    assert same_features(saved(tmp_path / "swav.pth.tar", state), resnet, torch.rand(1, 3, 64, 64)).method == "SwAV"


NAMED = {"SigLIP": "vit_base_patch16_siglip_224", "DINOv3": "vit_small_patch16_dinov3", "EVA": "eva02_tiny_patch14_224",
         "ConvNeXt": "convnext_atto", "BEiT": "beit_base_patch16_224", "CLIP's image encoder in timm's form": "vit_base_patch32_clip_224",
         "a distilled DeiT": "deit_tiny_distilled_patch16_224", "a Swin transformer": "swin_tiny_patch4_window7_224"}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_others_are_named(name):
    with torch.device("meta"):
        assert other(timm.create_model(NAMED[name]).state_dict()) == name


def test_other_forms_are_named(tmp_path):
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8)
    text = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, vocab_size=50, max_position_embeddings=8)
    siglip = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=sizes)).state_dict()
    dinov3 = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes)).state_dict()
    eva = {"visual.blocks.0.attn.q_bias": 0, "text.token_embedding.weight": 0}
    convnext = {"visual.trunk.stem.0.weight": 0, "text_projection": 0}
    for state, name in ((siglip, "SigLIP"), (dinov3, "DINOv3"), (eva, "EVA"), (convnext, "ConvNeXt-CLIP")):
        state = {f"module.{k}": torch.as_tensor(v) for k, v in state.items()}
        with pytest.raises(UserError, match=f"looks like {name}, which no method file here computes"):
            open_network(saved(tmp_path / "x.pt", {"state_dict": state}), CPU)
    with pytest.raises(UserError, match="looks like ConvNeXt-CLIP"):
        load_released(tmp_path / "x.pt")
    assert not any(other(state_of(m.state_dict())) for m in (clip.CLIP(8, 32, 1, 64, 8, 9, 99, 64, 1, 1), torchvision.models.resnet18()))
    assert set(NAMED) <= set(OTHERS)


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
        "code": {"x": os.system},
        "more": vit | {f"a.{i}": torch.rand(1) for i in range(9)},
        "shape": vit | {"norm.bias": torch.rand(7)},
        "flat": vit | {"pos_embed": torch.rand(192)},
        "patches": {"embeddings.patch_embeddings.projection.bias": torch.rand(4)},
        "nan": vit | {"norm.bias": torch.full((192,), float("nan"))},
        "infinity": vit | {"norm.bias": torch.full((192,), -float("inf"))},
        "integers": {k: v.to(torch.int8) for k, v in vit.items()},
        "args": {"method": "simclr", "args": [], "model": vit},
        "arch": {"method": "simclr", "args": vars(args) | {"arch": 3}, "model": vit},
        "model": {"method": "simclr", "args": vars(args), "model": {"a": 1}},
        "text": {"method": "clip", "args": {}, "model": {}, "tokenizer": 3},
    }[kind]


WRONG = [
    ("bert", "looks like nothing known here: it holds embeddings.word_embeddings.weight"),
    ("cut", "looks like a ViT with timm's names, but does not fit: it lacks norm.bias"),
    ("deit", "looks like a distilled DeiT, which no method file here computes"),
    ("more", "it also holds a.0, a.1, a.2 and 6 more"),
    ("shape", "norm.bias has the shape (7,), not (192,)"),
    ("flat", "does not fit: its tensors have shapes that do not fit each other"),
    ("patches", "looks like transformers' ViT, but does not fit: it lacks patch_embed.proj.weight"),
    ("nan", "does not fit: norm.bias holds NaN or infinity"),
    ("infinity", "does not fit: norm.bias holds NaN or infinity"),
    ("integers", "holds numbers of type int8, and not floating-point numbers"),
    ("args", "wrong.pt is damaged: its args are no dict"),
    ("arch", "wrong.pt is damaged: its args describe no network of simclr.py"),
    ("model", "wrong.pt is damaged: its model is no dict of tensors"),
    ("text", "wrong.pt is damaged: its tokenizer is no text"),
    ("conv", "looks like MoCo v3, but does not fit: it lacks patch_embed.proj.weight"),
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
    no_tensors, no_checkpoint = "is no safetensors file or is damaged (", "cannot be read, is damaged or holds code, which is never run"
    for name, content, sentence in (("x.safetensors", b"12345678901", no_tensors), ("x.pt", pickle.dumps({"a": 1}), no_checkpoint),
                                    ("x.pth", b"PK\x03\x04", no_checkpoint)):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=re.escape(f"{tmp_path / name} {sentence}")):
            open_network(tmp_path / name, CPU)


class Restored(torch.nn.Module):
    """TorchScript calls its second method when it reads the module."""

    def __init__(self):
        super().__init__()
        self.register_buffer("x", torch.zeros(3))

    @torch.jit.export
    def __getstate__(self):
        return self.x, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        print("this runs")
        self.x, self.training = state

    def forward(self, x):
        return x


@pytest.mark.parametrize("name", ["__torch__.py", "__torch__.PY"])  # torch finds both
def test_an_archive_that_would_run_code_is_refused(name, tmp_path, capfd):
    torch.jit.script(Restored()).save(tmp_path / "own.pt")
    with zipfile.ZipFile(tmp_path / "own.pt") as archive, zipfile.ZipFile(tmp_path / "other.pt", "w") as other:
        for member in archive.infolist():
            other.writestr(member.filename.replace("__torch__.py", name), archive.read(member))
    torch.jit.load(tmp_path / "other.pt")
    assert capfd.readouterr().out == "this runs\n"
    with pytest.raises(UserError, match="a __setstate__, code that runs when it is read: save the weights alone"):
        open_network(tmp_path / "other.pt", CPU)
    assert not capfd.readouterr().out


def test_exports_that_lack_something(tmp_path):
    safetensors.torch.save_file(dino.VisionTransformer(32, 8, 192, 2, 3).state_dict(), tmp_path / "model.safetensors")
    for said, sentence in (({"whole": True, "method": "clip"}, "lacks args, head_layer: export the run again"),
                           ({"args": {"a": 1}}, "lacks method, head_layer, whole: export the run again")):  # fmt: skip
        (tmp_path / "export.json").write_text(json.dumps(said))
        with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}/export.json {sentence}$"):
            open_network(tmp_path, CPU)
    with pytest.raises(UserError, match="there is no checkpoint at .*nothere.safetensors"):
        open_network(tmp_path / "nothere.safetensors", CPU)


def test_every_family_has_its_method():
    assert all(hasattr(runs.module_of(method), "eval_view") for _, _, method, _ in FAMILIES.values())
    assert family({}) is None


def test_published_weights_on_the_command_line(tmp_path):
    """kNN of a bare backbone, with the number of its checkpoint."""
    from toys import Toy
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
