"""init.py: training starts from the weights of --init, and an encoder that --freeze names stays as they left it."""

import json
import shutil
import subprocess
import sys
import types

import open_clip
import pytest
import safetensors.torch
import timm
import torch
import torchvision
import transformers

import init
from common import UserError
from names import align_state
from run import init_weights
from runs import FLAGS, METHODS, RESNET18, ROOT, environment, make_photos, module_of, rows, train_here
from test_resume import assert_same_run

VIT = ["--arch", "vit_tiny_patch8"]  # 12 blocks, 192 channels and 3 heads in every file


class Tokens:
    """A tokenizer as far as init.py and an export ask it."""

    context_length = 24

    def __init__(self, words="a"):
        self.words = words

    def to_json(self):
        return f'{{"model": "{self.words}"}}'


def args_of(name, *flags):
    module = module_of(name)
    return module.parse_args(module.Args, module.RECIPES, [*FLAGS[name], *flags])


def network(name, *flags, seed=0):
    """A model of a method with random weights, all of them, so that no two tensors are equal by chance."""
    torch.manual_seed(seed)
    args = args_of(name, *flags)
    model = module_of(name).build_model(args)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn(p.shape))
    return model, args


def saved(folder, name, *flags, tokenizer=None):
    """A checkpoint of a method as a run writes it -> its path, the model."""
    model, args = network(name, *flags, seed=1)
    content = {"method": name.split("_")[0], "args": vars(args), "model": model.state_dict(), "step": 7}
    if tokenizer:
        content["tokenizer"] = tokenizer.to_json()
    torch.save(content, folder / "checkpoint.pt")
    return folder / "checkpoint.pt", model


def started(path, name, *flags, tokenizer=None):
    model, args = network(name, "--init", str(path), *flags)
    init_weights(model, args, tokenizer)
    return model


def staying(path, name, *flags):
    """Names of the tensors of a model that --init leaves random."""
    model, args = network(name, "--init", str(path), *flags)
    return init.load(model, args, Tokens())


def differing(a, b):
    a, b = a.state_dict(), b.state_dict()
    return {name for name in a if not torch.equal(a[name], b[name])}


def features(name, model, size=32):
    encoder = module_of(name).image_encoder(model).eval()
    with torch.no_grad():
        return encoder(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", [*METHODS, "clip_resnet", "declip_resnet"])
def test_whole_models(name, tmp_path, capsys):
    """A run's weights become those of a run of the same method, in both networks where it has two."""
    path, before = saved(tmp_path, name, tokenizer=Tokens())
    model = started(path, name, tokenizer=Tokens())
    state = {"queue", "queue_ptr"} if name == "moco" else set()
    assert {k for k in differing(model, before) if not k.endswith("num_batches_tracked")} <= state
    out = capsys.readouterr().out
    count = len([k for k in before.state_dict() if not k.endswith("num_batches_tracked")]) - len(state)
    assert f"loaded {count}: " in out and f"stay random {len(state)}" in out and f"left out {len(state)}" in out


@pytest.mark.parametrize("source, target", [("clip", "declip"), ("declip", "clip")])
def test_declips_tokens_are_others(source, target, tmp_path, capsys):
    """The mask token stands before start and end, so no tokenizer would fit both tables: the image encoder alone is taken."""
    path, before = saved(tmp_path, source, tokenizer=Tokens(source))
    model = started(path, target, tokenizer=Tokens(target))
    torch.testing.assert_close(features(target, model), features(source, before), rtol=1e-4, atol=1e-4)
    assert "text encoder left out, as DeCLIP's tokens are shifted by its mask" in capsys.readouterr().out
    torch.save(before.state_dict(), tmp_path / "weights.pt")  # as published ones are
    assert not [name for name in staying(tmp_path / "weights.pt", target) if name.startswith("visual.") and "proj" not in name]
    with pytest.raises(UserError, match="--freeze text would keep random weights"):
        started(path, target, "--freeze", "text", tokenizer=Tokens(target))
    if target == "clip":
        with pytest.raises(UserError, match="it has quick GELU, and here is exact GELU"):
            started(path, target, "--gelu", "exact", tokenizer=Tokens(target))


SAME = [("dino", "slip"), ("dino", "ibot"), ("dino", "dinov2"), ("dinov2", "dino"), ("dinov2", "slip"),
        ("ibot", "dinov2"), ("slip", "dino"), ("ibot", "slip"), ("slip", "ibot")]  # fmt: skip


@pytest.mark.parametrize("source, target", SAME)
def test_vits_of_other_methods(source, target, tmp_path):
    """They compute what they computed before, student and teacher alike."""
    path, before = saved(tmp_path, source, *VIT)
    model = started(path, target, *VIT, tokenizer=Tokens())
    want = features(source, before)
    assert want.std() > 0.1
    torch.testing.assert_close(features(target, model), want, rtol=1e-4, atol=1e-4)
    if target != "slip":
        student = model.student.backbone.eval()
        with torch.no_grad():
            x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(student(x), want, rtol=1e-4, atol=1e-4)


RESNETS = [("simclr", "moco"), ("moco", "byol"), ("byol", "simsiam"), ("simsiam", "simclr"), ("simclr", "mocov3"), ("mocov3", "dino")]


@pytest.mark.parametrize("source, target", RESNETS)
def test_resnets_of_other_methods(source, target, tmp_path):
    """With their batch statistics, in every network of the method."""
    resnet = ["--arch", "resnet18", "--stem", "imagenet", "--width", "1"]
    path, before = saved(tmp_path, source, *resnet)
    for module in before.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    saved_again(path, before)
    model = started(path, target, *resnet)
    torch.testing.assert_close(features(target, model), features(source, before), rtol=0, atol=0)
    layers = [name for name in model.state_dict() if name.endswith("layer3.1.conv2.weight")]
    networks = {"moco": 2, "byol": 2, "simsiam": 1, "simclr": 1, "mocov3": 2, "dino": 2}
    assert len(layers) == networks[target] and len({model.state_dict()[name].sum().item() for name in layers}) == 1


def saved_again(path, model):
    content = torch.load(path, weights_only=True)
    torch.save(content | {"model": model.state_dict()}, path)


def test_simclr_in_a_classifier(tmp_path, capsys):
    import simclrv2

    path, before = saved(tmp_path, "simclr", *RESNET18)
    args = simclrv2.Args(arch="resnet18", image_size=32, width=1.0, stem="imagenet", head_layer=1, init=str(path))
    args.num_classes = 5
    model = simclrv2.build_model(args)
    init_weights(model, args)
    assert torch.equal(model.backbone.layer4[1].conv2.weight, before.backbone.layer4[1].conv2.weight)
    assert "stay random 2: classifier.weight, classifier.bias" in capsys.readouterr().out  # the head came along
    path, before = saved(tmp_path, "moco", *RESNET18)
    init_weights(model, args)
    assert torch.equal(model.backbone.layer4[1].conv2.weight, before.encoder_q.layer4[1].conv2.weight)
    with pytest.raises(UserError, match="give one of them"):
        simclrv2.earlier_stages(simclrv2.Args(checkpoint=str(path), init=str(path), data=FOLDER))
    assert simclrv2.earlier_stages(simclrv2.Args(init=str(path), data=FOLDER)) == [None, None]
    with pytest.raises(UserError, match="give --arch and --image-size"):
        simclrv2.take_network_of({"arch": "", "image_size": None}, simclrv2.Args())


FOLDER = "a folder"


def test_simclr_in_a_resnet_of_clip(tmp_path, capsys, monkeypatch):
    """The four stages fit; the stem, which has three layers in CLIP, and the attention pooling stay random."""
    path, before = saved(tmp_path, "simclr", "--arch", "resnet50", "--width", "1")
    module = module_of("clip_resnet")
    monkeypatch.setitem(module.ARCHS, "resnet_test", (32, (3, 4, 6, 3), 64, 64))
    model = started(path, "clip", "--arch", "resnet_test", tokenizer=Tokens())
    for name, tensor in before.backbone.state_dict().items():
        if name.startswith("layer"):
            assert torch.equal(model.visual.state_dict()[name], tensor), name
    assert "left out 14: backbone.conv1.weight, " in capsys.readouterr().out
    stay = {k for k in staying(path, "clip", "--arch", "resnet_test") if k.startswith("visual.")}
    assert stay == {f"visual.{k}" for k in model.visual.state_dict() if not k.startswith("layer") and "num_batches" not in k}
    with pytest.raises(UserError, match="--freeze image would keep random weights: visual.conv1.weight"):
        started(path, "clip", "--arch", "resnet_test", "--freeze", "image", tokenizer=Tokens())


# ------------------------------------------------ released weights ------------------------------------------------
def test_a_vit_of_timm_at_another_size(tmp_path, capsys, monkeypatch):
    other = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7).eval()
    torch.nn.init.normal_(other.pos_embed)
    torch.save(other.state_dict(), tmp_path / "vit.pth")
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        want = other.forward_head(other.forward_features(image), pre_logits=True)
        for name in "slip", "dino", "mocov3":
            arch = ["--arch", "vit_tiny_patch16" if name != "mocov3" else "vit_test_patch16"]
            if name == "mocov3":
                monkeypatch.setitem(module_of(name).ARCHS, "vit_test", (12, 192, 3))
            model = started(tmp_path / "vit.pth", name, *arch, "--image-size", "64", tokenizer=Tokens())
            torch.testing.assert_close(module_of(name).image_encoder(model).eval()(image), want, rtol=1e-4, atol=1e-4)
    assert "resized" not in capsys.readouterr().out
    model = started(tmp_path / "vit.pth", "slip", "--arch", "vit_tiny_patch16", tokenizer=Tokens())  # 32 px
    assert "pos_embed resized from 16 to 4 places" in (out := capsys.readouterr().out)
    grid = other.pos_embed[0, 1:].T.reshape(1, 192, 4, 4)
    small = torch.nn.functional.interpolate(grid, size=(2, 2), mode="bicubic")
    torch.testing.assert_close(model.visual.pos_embed[0, 1:].T.reshape(1, 192, 2, 2), small)
    torch.testing.assert_close(model.visual.pos_embed[0, 0], other.pos_embed[0, 0])
    assert "left out 2: head.weight, head.bias" in out


def test_a_vit_of_timm_in_clip(tmp_path):
    """The bias of its patch embedding moves into the positions; with exact GELU and without the norm before the blocks
    the network is the same."""
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0).eval()
    torch.nn.init.normal_(other.patch_embed.proj.bias)
    for module in other.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5  # CLIP's
    torch.save(other.state_dict(), tmp_path / "vit.pth")
    flags = ["--arch", "vit_tiny_patch16", "--gelu", "exact"]
    model = started(tmp_path / "vit.pth", "clip", *flags, tokenizer=Tokens())
    stay = [k for k in staying(tmp_path / "vit.pth", "clip", *flags) if k.startswith("visual.")]
    assert stay == ["visual.proj", "visual.ln_pre.weight", "visual.ln_pre.bias"]
    model.visual.ln_pre = torch.nn.Identity()
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.visual.pool(image), other(image), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_of_timm(registers, tmp_path, monkeypatch):
    """Student and teacher, at another size; then in slip.py, where LayerScale becomes a part of the layers."""
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    other = timm.create_model(name, img_size=56, depth=2, init_values=0.3, num_classes=0).eval()
    torch.nn.init.normal_(other.pos_embed, std=0.1)
    torch.save(other.state_dict(), tmp_path / "dinov2.pth")
    monkeypatch.setitem(module_of("dinov2").ARCHS, "vit_test", (2, 384, 6))
    flags = ["--arch", "vit_test_patch14", "--image-size", "56", "--local-size", "28", "--registers", str(registers)]
    model = started(tmp_path / "dinov2.pth", "dinov2", *flags)
    image = torch.rand(2, 3, 56, 56)
    with torch.no_grad():
        for encoder in model.student.backbone, model.teacher.backbone:
            torch.testing.assert_close(encoder.eval()(image), other(image), rtol=1e-4, atol=1e-4)
        monkeypatch.setitem(module_of("slip").ARCHS, "vit_test", (2, 384, 6))
        flags = ["--arch", "vit_test_patch14", "--image-size", "56"]
        if registers:
            with pytest.raises(UserError, match="it also holds register_tokens"):
                started(tmp_path / "dinov2.pth", "slip", *flags, tokenizer=Tokens())
            return
        model = started(tmp_path / "dinov2.pth", "slip", *flags, tokenizer=Tokens())
        torch.testing.assert_close(model.visual(image), other(image), rtol=1e-4, atol=1e-4)


def test_vits_of_torchvision_and_transformers(tmp_path):
    sizes = dict(image_size=32, patch_size=8, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)
    other = torchvision.models.VisionTransformer(**sizes).eval()
    other.heads = torch.nn.Identity()
    config = transformers.ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768,
                                    image_size=32, patch_size=8, layer_norm_eps=1e-6)  # fmt: skip
    hugging = transformers.ViTModel(config, add_pooling_layer=False).eval()
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        cases = [(other, other(image)), (hugging, hugging(image).last_hidden_state[:, 0])]
        for network_there, want in cases:
            torch.save(network_there.state_dict(), tmp_path / "vit.pth")
            model = started(tmp_path / "vit.pth", "ibot", *VIT)
            torch.testing.assert_close(model.teacher.backbone.eval()(image), want, rtol=1e-4, atol=1e-4)


CLIP_SIZES = dict(image_size=32, layers=4, width=128, head_width=64, patch_size=16)
TEXT_SIZES = dict(context_length=30, vocab_size=600, width=64, heads=1, layers=1)


@pytest.mark.parametrize("gelu", ["quick", "exact"])
def test_open_clip(gelu, tmp_path, capsys):
    """Both towers, projections and temperature; a longer context is cut. Its configuration says which activation it has."""
    other = open_clip.CLIP(32, CLIP_SIZES, TEXT_SIZES, quick_gelu=gelu == "quick").eval()
    torch.save(other.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {"quick_gelu": gelu == "quick", "vision_cfg": {"width": 128, "patch_size": 16}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    flags = ["--tokenizer", "clip", "--gelu", gelu]
    model = started(tmp_path, "clip", *flags, tokenizer=Tokens()).eval()
    assert "stay random 0" in (out := capsys.readouterr().out) and "context cut from 30 to 24 tokens" in out
    image, text = torch.rand(3, 3, 32, 32), torch.randint(1, 599, (3, 24))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(image), other.encode_image(image), rtol=1e-4, atol=1e-5)
        padded = torch.nn.functional.pad(text, (0, 6))
        torch.testing.assert_close(model.encode_text(text), other.encode_text(padded), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.logit_scale, other.logit_scale)
    wrong = "exact" if gelu == "quick" else "quick"
    with pytest.raises(UserError, match=f"it has {gelu} GELU, and here is {wrong} GELU"):
        started(tmp_path, "clip", "--tokenizer", "clip", "--gelu", wrong, tokenizer=Tokens())


@pytest.mark.parametrize("name, target", [("moco_v2_resnet50", "moco"), ("moco_v3_vit_small", "mocov3"), ("simsiam_resnet50", "simsiam")])
def test_official_checkpoints(name, target, tmp_path, capsys):
    """Names, shapes and wrappers of the published files; a file without the key encoder fills both."""
    keys = json.loads((ROOT / f"tests/golden/state_dict_keys_{name}.json").read_text())
    g = torch.Generator().manual_seed(0)
    state = {}
    for key, (shape, kind) in keys.items():
        if key.startswith("encoder_k."):
            continue
        state[f"module.{key}"] = torch.zeros(shape, dtype=torch.int64) if kind.startswith("int") else torch.rand(shape, generator=g)
    torch.save({"epoch": 9, "arch": "x", "state_dict": state}, tmp_path / "released.pth.tar")
    module = module_of(target)
    flags = {"moco": ["--arch", "resnet50"], "simsiam": ["--arch", "resnet50"], "mocov3": ["--arch", "vit_small_patch16"]}[target]
    argv = ["--data", "imagenet", *flags, "--init", str(tmp_path / "released.pth.tar")]
    args = module.parse_args(module.Args, module.RECIPES, argv)
    model = module.build_model(args)
    init_weights(model, args)
    own = model.state_dict()
    for key, value in state.items():
        key = key.removeprefix("module.")
        if key not in ("queue", "queue_ptr") and not key.endswith("num_batches_tracked"):
            assert torch.equal(own[key], value), key
    if target == "moco":
        for key in [key for key in own if key.startswith("encoder_k.") and not key.endswith("num_batches_tracked")]:
            assert torch.equal(own[key], own[key.replace("encoder_k.", "encoder_q.")]), key
    random = capsys.readouterr().out.split("stay random")[1].split("\n")[0]
    assert random.strip() == ("2: queue, queue_ptr" if target == "moco" else "0")


def test_full_checkpoints_of_dino(tmp_path, capsys):
    """Student, teacher and center under the official names, and a teacher alone, which starts both."""
    model, _ = network("dino", seed=1)
    model.center.normal_()
    renamed = {"original0": "weight_g", "original1": "weight_v"}
    parts = {"student": {}, "teacher": {}}
    for name, tensor in model.state_dict().items():
        if name == "center":
            continue
        part, _, key = name.partition(".")
        for new, old in renamed.items():
            key = key.replace(f"parametrizations.weight.{new}", old)
        parts[part][f"module.{key}" if part == "student" else key] = tensor
    torch.save({**parts, "epoch": 3, "dino_loss": {"center": model.center}}, tmp_path / "full.pth")
    assert not differing(started(tmp_path / "full.pth", "dino"), model)
    assert "stay random 0" in capsys.readouterr().out
    torch.save({"teacher": parts["teacher"]}, tmp_path / "teacher.pth")
    new = started(tmp_path / "teacher.pth", "dino")
    assert not differing(new.teacher, model.teacher) and not differing(new.student, model.teacher)
    assert "stay random 1: center" in capsys.readouterr().out


# ------------------------------------------------ refusals ------------------------------------------------
REFUSED = [
    ("simclr", [], "moco", ["--stem", "cifar"], "conv1.weight has the shape (16, 3, 7, 7), and here (16, 3, 3, 3)"),
    ("simclr", [], "dino", [], "it holds a ResNet with torchvision's names, and here is a ViT with timm's names"),
    ("dino", VIT, "slip", ["--arch", "vit_micro_patch8"], "it also holds blocks.4."),
    ("dino", ["--arch", "vit_micro_patch8"], "slip", VIT, "it lacks blocks.4."),
    ("dino", VIT, "slip", ["--arch", "vit_tiny_patch16"], "patch_embed.proj.weight has the shape (192, 3, 8, 8), and here"),
    ("dino", ["--arch", "vit_micro_patch8"], "clip", ["--arch", "vit_micro_patch8"], "4 attention heads, and here are 2"),
    ("slip", ["--arch", "vit_small_patch8"], "dino", ["--arch", "vit_small_patch8"], "12 attention heads, and here are 6"),
    ("dinov2", [*VIT, "--ffn", "swiglu"], "dino", VIT, "it lacks blocks.0.mlp.fc1.weight"),
    ("dino", ["--out-dim", "32"], "dino", [], "center has the shape (1, 32), and here (1, 64)"),
    ("dinov2", ["--no-shared-head"], "dinov2", [], "is shared here, and not in these weights"),
    ("clip", ["--text-layers", "2"], "clip", [], "the text encoders differ in transformer.resblocks.1."),
    ("clip", ["--context-length", "8"], "clip", [], "positional_embedding has the shape (8, 64), and here (24, 64)"),
    ("clip", [], "slip", [], "it holds a ViT of CLIP's kind, and here is a ViT with timm's names"),
]  # fmt: skip


@pytest.mark.parametrize("source, flags, target, others, sentence", REFUSED)
def test_refused(source, flags, target, others, sentence, tmp_path):
    path, _ = saved(tmp_path, source, *flags, tokenizer=Tokens())
    model, args = network(target, "--init", str(path), *others)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        init_weights(model, args, Tokens())
    assert sentence in str(error.value) and f"--init {path} (a run of {source}.py)" in str(error.value)
    if "shared" not in sentence:  # that is found after copying, and ends the run as well
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_other_tokens_are_refused(tmp_path):
    path, _ = saved(tmp_path, "clip", tokenizer=Tokens("ours"))
    with pytest.raises(UserError, match=rf"its tokens are others, give --tokenizer {tmp_path}/tokenizer.json"):
        started(path, "clip", tokenizer=Tokens("theirs"))
    other = open_clip.CLIP(32, CLIP_SIZES, TEXT_SIZES, quick_gelu=True)
    torch.save(other.state_dict(), tmp_path / "clip.pt")
    with pytest.raises(UserError, match="--tokenizer train makes other tokens"):
        started(tmp_path / "clip.pt", "clip", tokenizer=Tokens())


@pytest.mark.parametrize("content, sentence", [
    ({"a.b": torch.ones(2)}, "looks like nothing known here: it holds a.b"),
    ({"vision_model.head.probe": torch.ones(2)}, "looks like SigLIP, which no method file here computes"),
    ([1], "holds a list, not a checkpoint"),
])  # fmt: skip
def test_unknown_files_are_refused(content, sentence, tmp_path):
    torch.save(content, tmp_path / "some.pt")
    with pytest.raises(UserError, match=sentence):
        started(tmp_path / "some.pt", "simclr")
    with pytest.raises(UserError, match="there is no checkpoint at"):
        started(tmp_path / "none.pt", "simclr")


def vit_state():
    """Weights with timm's names, of the sizes of VIT."""
    return network("dino", *VIT, seed=1)[0].teacher.backbone.state_dict()


def without(name):
    return {k: v for k, v in vit_state().items() if k != name}


def without_keys():
    """Weights of transformers' ViTModel that lack the attention's keys, under the names of either version."""
    config = transformers.ViTConfig(hidden_size=192, num_hidden_layers=1, num_attention_heads=3, intermediate_size=768, image_size=32)
    state = transformers.ViTModel(config, add_pooling_layer=False).state_dict()
    return {k: v for k, v in state.items() if ".key." not in k and ".k_proj." not in k}


DAMAGED = {
    "no class token": (lambda: without("cls_token"), "it lacks cls_token"),
    "no positions": (lambda: without("pos_embed"), "it lacks pos_embed"),
    "flat positions": (lambda: vit_state() | {"pos_embed": torch.ones(17, 192)}, {
        "clip": "its tensors have shapes that do not fit each other", "ibot": "pos_embed has the shape (17, 192), and here (1, 17, 192)"}),
    "no dimension": (lambda: vit_state() | {"cls_token": torch.ones(())}, {
        "clip": "class_embedding has the shape (1,), and here (192,)", "ibot": "cls_token has the shape (), and here (1, 1, 192)"}),
    "scalar positions": (lambda: vit_state() | {"pos_embed": torch.ones(())}, {
        "clip": "its tensors have shapes that do not fit each other", "ibot": "pos_embed has the shape (), and here (1, 17, 192)"}),
    "scalar LayerScale": (lambda: vit_state() | {"blocks.1.ls1.gamma": torch.ones(())}, "its tensors have shapes that do not fit each other"),
    "no keys": (without_keys, "(weights of transformers' ViT) does not fit: it lacks blocks.0.attn.k."),
    "patches' bias alone": (lambda: {"embeddings.patch_embeddings.projection.bias": torch.ones(4)}, "it holds no image encoder"),
    "NaN": (lambda: vit_state() | {"norm.weight": torch.full((192,), float("nan"))}, {
        "clip": "visual.ln_post.weight holds NaN or infinity", "ibot": "student.backbone.norm.weight holds NaN or infinity"}),
    "infinity": (lambda: vit_state() | {"norm.bias": torch.full((192,), float("inf"))}, "holds NaN or infinity"),
    "integers": (lambda: {k: v.to(torch.int8) for k, v in vit_state().items()}, "holds numbers of type int8, and not floating-point numbers"),
    "list of args": (lambda: {"method": "clip", "args": [], "model": vit_state()}, "some.pth is damaged: its args are no dict"),
    "list of tensors": (lambda: {"method": "clip", "args": {}, "model": [1]}, "some.pth is damaged: its model is no dict of tensors"),
    "no tensors": (lambda: {"method": "clip", "args": {}, "model": {"a": 1}}, "some.pth is damaged: its model is no dict of tensors"),
    "number of tokens": (lambda: {"method": "clip", "args": {}, "model": {}, "tokenizer": 3}, "some.pth is damaged: its tokenizer is no text"),
    "loss": (lambda: {"student": vit_state(), "teacher": vit_state(), "dino_loss": 5}, "some.pth is damaged: its dino_loss is no dict of tensors"),
}  # fmt: skip


@pytest.mark.parametrize("target", ["clip", "ibot"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_weights_are_one_sentence(kind, target, tmp_path):
    make, sentence = DAMAGED[kind]
    torch.save(make(), tmp_path / "some.pth")
    with pytest.raises(UserError) as error:
        started(tmp_path / "some.pth", target, *VIT, tokenizer=Tokens())
    assert (sentence if isinstance(sentence, str) else sentence[target]) in str(error.value)
    assert str(tmp_path / "some.pth") in str(error.value) and "\n" not in str(error.value)


def test_damaged_texts_are_one_sentence(tmp_path):
    """Scalars in the place of a table, and a tokenizer that is none."""
    path, before = saved(tmp_path, "clip", tokenizer=Tokens())
    content = torch.load(path, weights_only=True)
    for change, sentence in (({"tokenizer": "{"}, "its tokenizer is damaged"), ({"tokenizer": "[]"}, "its tokenizer is damaged"),
                             ({"model": before.state_dict() | {"positional_embedding": torch.ones(())}},
                              "positional_embedding has the shape (), and here (24, 64)")):  # fmt: skip
        torch.save(content | change, path)
        with pytest.raises(UserError) as error:
            started(path, "clip", tokenizer=Tokens())
        assert sentence in str(error.value)


def test_exports_that_lack_something(tmp_path):
    safetensors.torch.save_file(vit_state(), tmp_path / "model.safetensors")
    for said, sentence in (({"whole": True, "method": "clip"}, "export.json lacks args, head_layer: export the run again"),
                           ({"args": {"a": 1}}, "export.json lacks method, head_layer, whole: export the run again"),
                           ({"args": [], "method": "clip", "head_layer": 0, "whole": True}, "export.json is damaged: its args are no dict")):  # fmt: skip
        (tmp_path / "export.json").write_text(json.dumps(said))
        with pytest.raises(UserError) as error:
            started(tmp_path, "clip", *VIT, tokenizer=Tokens())
        assert str(error.value) == f"{tmp_path}/{sentence}"
    with pytest.raises(UserError, match=f"there is no checkpoint at {tmp_path}/nothere.safetensors"):
        started(tmp_path / "nothere.safetensors", "clip", tokenizer=Tokens())


def test_the_tokenizer_beside_an_export_is_named(tmp_path):
    """What evaluate.py export --to transformers writes of a run with a tokenizer of its own; without one, and of ALIGN."""
    from evaluation.exports import export

    _, before = saved(tmp_path, "clip")
    net = types.SimpleNamespace(model=before, encoder=before.visual, method="clip", arch="", args=None, tokenizer=Tokens(),
                                view=module_of("clip").eval_view(types.SimpleNamespace(image_size=32)))  # fmt: skip
    export(net, "transformers", tmp_path / "out")
    with pytest.raises(UserError) as error:
        started(tmp_path / "out", "clip", tokenizer=Tokens("theirs"))
    assert str(error.value).endswith(f"makes other tokens, give --tokenizer {tmp_path}/out/tokenizer.json")
    (tmp_path / "out/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"give that of these weights \(clip\)"):
        started(tmp_path / "out", "clip", tokenizer=Tokens("theirs"))
    width = ["--embed-dim", "160"]
    torch.save(align_state(saved(tmp_path, "align", *width)[1]), tmp_path / "align.bin")
    with pytest.raises(UserError, match=r"give that of these weights \(google-bert/bert-base-uncased\)"):
        started(tmp_path / "align.bin", "align", *width, tokenizer=Tokens())


@pytest.mark.parametrize("before, now, note", [
    ("small", "cifar", "its stem has stride 2, and here 1: --stem small computes what it computed"),
    ("small", "auto", "its stem has stride 2, and here 1: --stem small computes what it computed"),
    ("auto", "small", "its stem has stride 1, and here 2: --stem cifar computes what it computed"),
    ("small", "small", ""), ("cifar", "auto", ""), ("auto", "auto", ""), ("imagenet", "imagenet", ""),
])  # fmt: skip
def test_another_stem_is_noted(before, now, note, tmp_path, capsys):
    """With a stride of 2 or of 1 it has the same tensors, but computes something else; 32 px are "auto" for cifar's."""
    path, model = saved(tmp_path, "simclr", "--stem", before)
    state = model.state_dict()
    for target in ("simclr", "byol"):
        started(path, target, "--stem", now)
        line = capsys.readouterr().out.splitlines()[0]
        assert line == f"--init {path}: a run of simclr.py" + (f"; {note}" if note else "")
    inside = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    torch.save(inside, tmp_path / "model.pt")
    (tmp_path / "export.json").write_text(json.dumps({"weights": "model.pt", "stride": model.backbone.conv1.stride[0]}))
    started(tmp_path / "model.pt", "simclr", "--stem", now)
    line = capsys.readouterr().out.splitlines()[0]
    assert note in line and ("stride" in line) == bool(note)


# ------------------------------------------------ training ------------------------------------------------
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


def load(directory):
    return torch.load(directory / "checkpoint.pt", weights_only=True)


def test_without_the_flag_nothing_is_loaded_or_drawn():
    code = ("import sys, torch, runs, run; args = runs.module_of('clip').Args(); "
            "model = torch.nn.Linear(2, 2); state = torch.get_rng_state(); run.init_weights(model, args); assert torch.equal(state, torch.get_rng_state()); "
            "assert not {'init', 'recognise', 'names'} & set(sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_starts_at_the_weights(photos, tmp_path, capsys):
    """Its step 0 scores as the other run did at its end, and its schedule is at its beginning."""
    train_here("clip", photos, tmp_path / "first", "--max-steps", "3", "--eval-every", "0")
    flags = ["--tokenizer", str(tmp_path / "first/tokenizer.json"), "--init", str(tmp_path / "first")]
    train_here("clip", photos, tmp_path / "second", *flags, "--eval-every", "3", "--max-steps", "1")
    out = capsys.readouterr().out
    assert "a run of clip.py" in out and "(weights of --init " in out
    first, second = rows(tmp_path / "first"), rows(tmp_path / "second")
    assert [row["step"] for row in second[:2]] == [0, 1] and second[1]["lr"] == first[0]["lr"]
    scores = [{k: v for k, v in row.items() if k not in ("step", "end")} for row in (first[-1], second[0])]
    assert scores[0] == scores[1] and "recall@1" in scores[0]
    assert {p["step"].item() for p in load(tmp_path / "second")["optimizer"]["state"].values()} == {1}


@pytest.mark.parametrize("name, side", [("clip", "image"), ("clip", "text"), ("clip_resnet", "image"), ("slip", "image"),
                                        ("slip", "text"), ("declip_resnet", "image"), ("declip", "text"), ("align", "image"),
                                        ("align", "text")])  # fmt: skip
def test_frozen(name, side, photos, tmp_path):
    """Bit for bit, batch statistics too; the other side and the projections learn. The optimizer knows nothing of it, and
    3 + 3 steps are 6."""
    train_here(name, photos, tmp_path / "first", "--max-steps", "1", "--eval-every", "0")
    before = load(tmp_path / "first")["model"]
    flags = ["--init", str(tmp_path / "first"), "--freeze", side, "--tokenizer", str(tmp_path / "first/tokenizer.json"), "--eval-every", "2"]
    train_here(name, photos, tmp_path / "whole", *flags, "--max-steps", "6")
    after = load(tmp_path / "whole")
    text = ("encode_text.", "text.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.")
    start = {"image": ("visual.",), "text": text}[side]
    projections = ("visual.proj", "visual.attnpool.c_proj", "encode_text.text_projection")
    learns = {key for key in before if not key.startswith(start) or key.startswith(projections)}
    for key in before:
        if before[key].is_floating_point():
            assert torch.equal(after["model"][key], before[key]) == (key not in learns), key
    parameters = {key for key, _ in network(name)[0].named_parameters()}
    assert len(after["optimizer"]["state"]) == len(learns & parameters) < len(parameters)
    train_here(name, photos, tmp_path / "parts", *flags, "--max-steps", "3")
    shutil.move(tmp_path / "first/checkpoint.pt", tmp_path / "gone.pt")
    train_here(name, photos, tmp_path / "parts", *flags, "--max-steps", "6")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("name", ["clip", "slip"])
def test_frozen_in_pieces(name, photos, tmp_path):
    """--accum-steps gives the gradient of the whole batch."""
    train_here(name, photos, tmp_path / "first", "--max-steps", "1", "--eval-every", "0")
    flags = ["--init", str(tmp_path / "first"), "--freeze", "image", "--tokenizer", str(tmp_path / "first/tokenizer.json"),
             "--max-steps", "1", "--eval-every", "0"]  # fmt: skip
    whole = train_here(name, photos, tmp_path / "whole", *flags)
    pieces = train_here(name, photos, tmp_path / "pieces", *flags, "--accum-steps", "2")
    assert len(whole) > 10 and len(whole) == len(pieces)
    for a, b in zip(whole, pieces):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_freezing_needs_weights(photos, tmp_path):
    with pytest.raises(UserError, match="--freeze image keeps weights as they are: give some with --init"):
        train_here("clip", photos, tmp_path / "run", "--freeze", "image")


def test_frozen_on_two_processes(server, photos, tmp_path):
    """Everybody reads the same weights, and DDP passes a frozen encoder over: the run of one process."""
    train_here("slip", photos, tmp_path / "first", "--max-steps", "1", "--eval-every", "0")
    flags = ["--init", str(tmp_path / "first"), "--freeze", "image", "--tokenizer", str(tmp_path / "first/tokenizer.json"),
             "--max-steps", "3", "--eval-every", "0"]  # fmt: skip
    one = train_here("slip", photos, tmp_path / "one", *flags)
    done = server.together("tests/runs.py", json.dumps([["slip", str(photos), str(tmp_path / "two"), flags]]))
    assert done.stdout.count("a run of slip.py") == 1
    two = torch.load(tmp_path / "two/grads.pt", weights_only=True)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    losses = [[row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("one", "two")]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=0)


def test_a_restart_by_torchrun_does_not_look_at_the_weights_again(photos, tmp_path, monkeypatch, capsys):
    """It finds its own folder without --output-dir."""
    train_here("simclr", photos, tmp_path / "first", "--max-steps", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    for steps in ("1", "2"):
        train_here("simclr", photos, "", "--init", str(tmp_path / "first"), "--max-steps", steps)
        shutil.rmtree(tmp_path / "first", ignore_errors=True)
    out = capsys.readouterr().out
    assert out.count("a run of simclr.py") == 1 and "2 steps, continued at 1" in out


def test_a_run_that_is_older_than_the_flag_continues(photos, tmp_path, capsys):
    train_here("simclr", photos, tmp_path / "run", "--max-steps", "1")
    path = tmp_path / "run/args.json"
    args = json.loads(path.read_text())
    assert args.pop("init") == ""
    path.write_text(json.dumps(args))
    train_here("simclr", photos, tmp_path / "run", "--max-steps", "2")
    assert "continued at 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a run with init= "):
        train_here("simclr", photos, tmp_path / "run", "--max-steps", "3", "--init", "elsewhere", "--output-dir", str(tmp_path / "run"))


def test_align_of_hugging_face(tmp_path, capsys):
    """The whole model under its names, which other depths of a text encoder refuse."""
    import align

    width = ["--embed-dim", "160"]  # that of the image encoder, as AlignModel has no projection of images
    _, before = saved(tmp_path, "align", *width)
    torch.save(align_state(before), tmp_path / "align.bin")
    model = started(tmp_path / "align.bin", "align", *width, "--tokenizer", "clip", tokenizer=Tokens())
    assert {k for k in differing(model, before) if not k.endswith("num_batches_tracked")} == set()
    assert isinstance(model, align.ALIGN) and "stay random 0" in capsys.readouterr().out
    with pytest.raises(UserError, match="differ in text_model.encoder.layer.1"):
        started(tmp_path / "align.bin", "align", *width, "--text-layers", "2", tokenizer=Tokens())
