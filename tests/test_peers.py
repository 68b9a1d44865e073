"""The same weights give the same outputs in open_clip, timm, torchvision and transformers, loaded strictly both ways."""

import argparse
import importlib

import pytest
import timm
import torch
import torchvision
import transformers

import clip
import simclr
import slip
from common import UserError
from evaluation.weights import load_released

open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
lightly = pytest.importorskip("lightly", reason="lightly is not installed")
pytest.importorskip("lightly.loss")  # a submodule, which lightly does not import by itself


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


def randomise(model):
    """Every parameter and statistic gets a value that matters."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() + 0.5 if "running_var" in name else 0.1 * noise + (tensor.ndim == 1))
    return model.eval()


def ours(vit):
    layers, width, patch = (2, 128, 8) if vit else ((1, 1, 2, 1), 16, None)
    return randomise(clip.CLIP(32, 64, layers, width, patch, 16, 100, 64, 1, 2))


@pytest.mark.parametrize("vit", [True, False])
def test_open_clip(vit):
    mine = ours(vit)
    vision = {"layers": 2, "width": 128, "patch_size": 8} if vit else {"layers": (1, 1, 2, 1), "width": 16}
    text = {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 1, "layers": 2}
    vision |= {"image_size": 64, "head_width": 64 if vit else 64}
    other = open_clip.model.CLIP(32, vision, text, quick_gelu=True).eval()
    other.load_state_dict(mine.state_dict(), strict=True)
    image, ids = torch.randn(3, 3, 64, 64), torch.randint(1, 99, (3, 16))
    with torch.no_grad():
        close(mine.encode_image(image), other.encode_image(image), atol=1e-4)
        close(mine.encode_text(ids), other.encode_text(ids), atol=1e-4)
        randomise(other)
        mine.load_state_dict(other.state_dict(), strict=True)
        close(mine.encode_image(image), other.encode_image(image), atol=1e-4)
        features = [torch.nn.functional.normalize(f, dim=-1) for f in mine(image, ids)]
        theirs = open_clip.loss.ClipLoss()(*features, torch.tensor(14.3))
    close(clip.clip_loss(*features, torch.tensor(14.3)), theirs)


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50"])
def test_released_archive(name, tmp_path):
    """OpenAI's files are TorchScript archives in half precision that carry three numbers beside the weights: one is made
    from open_clip's model of the real size and read back."""
    model = open_clip.create_model(f"{name}-quickgelu", pretrained=None, precision="fp32").eval()

    class Archive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for key, value in model.state_dict().items():  # dots make submodules, as in the real files
                *parents, leaf = key.split(".")
                module = self
                for parent in parents:
                    if parent not in module._modules:
                        module.add_module(parent, torch.nn.Module())
                    module = module._modules[parent]
                module.register_buffer(leaf, value.half() if value.ndim > 1 else value)
            for key, value in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
                self.register_buffer(key, torch.tensor(value))

        def forward(self, x):
            return x

    torch.jit.script(Archive()).save(tmp_path / "released.pt")
    module, mine = load_released(tmp_path / "released.pt")
    assert module is clip
    model.load_state_dict({k: v.half().float() if v.ndim > 1 else v for k, v in model.state_dict().items()})
    image, ids = torch.randn(1, 3, 224, 224), open_clip.tokenize(["a photo of a cat"])
    with torch.no_grad():
        close(mine.eval().encode_image(image), model.encode_image(image), atol=1e-4)
        close(mine.encode_text(ids), model.encode_text(ids), atol=1e-4)


FIXED = {  # spec of OpenAI's models: number of parameters, number of state dict entries
    "vit_base_patch32": (151_277_313, 302),
    "vit_base_patch16": (149_620_737, 302),
    "resnet50": (102_007_137, 489),
    "resnet101": (119_688_033, 795),
}


@pytest.mark.parametrize("arch", FIXED)
def test_clip_sizes(arch):
    with torch.device("meta"):
        model = clip.build_model(clip.Args(arch=arch))
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == FIXED[arch]


@pytest.mark.parametrize("arch, entries, parameters", [("vit_base_patch16", 317, 170_616_321),
                                                       ("vit_large_patch16", 461, 389_298_945)])  # fmt: skip
def test_slip_sizes(arch, entries, parameters):
    with torch.device("meta"):
        model = slip.build_model(slip.Args(arch=arch))
    assert (len(model.state_dict()), sum(p.numel() for p in model.parameters())) == (entries, parameters)


def test_slip_released_checkpoint(tmp_path):
    """The released files hold `module.` names and an argparse.Namespace."""
    visual = slip.VisionTransformer(32, 8, 384, depth=2, heads=12)
    model = randomise(slip.SLIP(32, visual, 384, 16, 100, 64, 1, 2, 48, 24))
    content = {"epoch": 25, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()},
               "args": argparse.Namespace(model="SLIP_VITS16", lr=3e-3), "best_acc1": 38.3}  # fmt: skip
    torch.save(content, tmp_path / "released.pt")
    module, loaded = load_released(tmp_path / "released.pt")
    assert module is slip and loaded.visual.blocks[0].attn.heads == 12
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        close(loaded.eval().encode_image(image), model.encode_image(image))
    torch.save({"state_dict": {k: v for k, v in content["state_dict"].items() if "ln_final" not in k}}, tmp_path / "cut.pt")
    with pytest.raises(UserError, match="does not hold"):
        load_released(tmp_path / "cut.pt")


def test_timm_vit():
    mine = randomise(slip.VisionTransformer(32, 8, 64, depth=2, heads=4))
    other = timm.models.vision_transformer.VisionTransformer(32, 8, num_classes=0, embed_dim=64, depth=2, num_heads=4).eval()
    other.load_state_dict(mine.state_dict(), strict=True)
    image = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        close(mine(image), other(image))
        randomise(other)
        mine.load_state_dict(other.state_dict(), strict=True)
        close(mine(image), other(image))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torchvision_resnet(arch):
    mine = randomise(simclr.resnet(arch))
    other = getattr(torchvision.models, arch)().eval()
    other.fc = torch.nn.Identity()
    other.load_state_dict(mine.state_dict(), strict=True)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        close(mine(image), other(image), atol=1e-4)
        randomise(other)
        mine.load_state_dict(other.state_dict(), strict=True)
        close(mine(image), other(image), atol=1e-4)


def test_resnet_width():
    one, two = simclr.resnet("resnet50"), simclr.resnet("resnet50x2")
    assert two.feature_dim == 4096 and two(torch.randn(2, 3, 32, 32)).shape == (2, 4096)
    convs = [[m for m in net.modules() if isinstance(m, torch.nn.Conv2d)] for net in (one, two)]
    assert all(b.out_channels == 2 * a.out_channels for a, b in zip(*convs, strict=True))


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_small_resnets(method):
    """Ten layers, half as wide, and a stem for small images that halves them once."""
    module = importlib.import_module(method)
    net, full = module.resnet("resnet10", "small", 0.5), module.resnet("resnet10")
    convs = [[m for m in n.modules() if isinstance(m, torch.nn.Conv2d)] for n in (net, full)]
    assert [2 * c.out_channels for c in convs[0]] == [c.out_channels for c in convs[1]]
    assert list(net.state_dict()) == list(full.state_dict()) and len(convs[0]) == 12
    last = []
    net.layer4.register_forward_hook(lambda module, inputs, output: last.append(output.shape))
    assert net(torch.randn(2, 3, 48, 48)).shape[0] == 2
    assert last == [(2, 256, 3, 3)]  # 48 / 16


def test_lightly_loss():
    z1, z2 = torch.randn(6, 16), torch.randn(6, 16)
    close(simclr.nt_xent_loss(z1, z2, 0.3), lightly.loss.NTXentLoss(temperature=0.3)(z1, z2))


def hf_names(state):
    """OpenAI's names -> those of transformers.CLIPModel."""
    out = {}
    for key, value in state.items():
        tower = "vision_model" if key.startswith("visual.") else "text_model"
        key = key.removeprefix("visual.").replace("transformer.resblocks", "encoder.layers")
        for a, b in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("c_fc", "fc1"), ("c_proj", "fc2"),
                     ("attn.", "self_attn."), ("ln_final", "final_layer_norm"), ("ln_pre", "pre_layrnorm"),
                     ("ln_post", "post_layernorm"), ("conv1", "embeddings.patch_embedding"),
                     ("token_embedding", "embeddings.token_embedding"),
                     ("class_embedding", "embeddings.class_embedding")):  # fmt: skip
            key = key.replace(a, b)
        if "in_proj" in key:
            for name, part in zip("qkv", value.chunk(3)):
                out[f"{tower}." + key.replace("in_proj_", f"{name}_proj.")] = part
        elif key == "positional_embedding":
            out[f"{tower}.embeddings.position_embedding.weight"] = value
        elif key == "proj":
            out["visual_projection.weight"] = value.T
        elif key == "text_projection":
            out["text_projection.weight"] = value.T
        elif key == "logit_scale":
            out[key] = value
        else:
            out[f"{tower}.{key}"] = value
    return out


def test_transformers_clip():
    mine = randomise(clip.CLIP(32, 64, 2, 128, 8, 16, 100, 64, 1, 2))
    text = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "eos_token_id": 2,
            "num_attention_heads": 1, "max_position_embeddings": 16, "hidden_act": "quick_gelu"}  # fmt: skip
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 64, "patch_size": 8, "hidden_act": "quick_gelu"}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    other = transformers.CLIPModel(config).eval()
    extra = {k: v for k, v in other.state_dict().items() if k.endswith("position_ids")}
    other.load_state_dict({**hf_names(mine.state_dict()), **extra}, strict=True)
    image, ids = torch.randn(3, 3, 64, 64), torch.randint(3, 99, (3, 16))
    with torch.no_grad():
        output = other(input_ids=ids, pixel_values=image)
        normalised = [torch.nn.functional.normalize(f, dim=-1) for f in mine(image, ids)]
    close(normalised[0], output.image_embeds)
    close(normalised[1], output.text_embeds)
    randomise(other)
    theirs, back = other.state_dict(), {}
    for key, value in mine.state_dict().items():
        parts = [theirs[name] for name in hf_names({key: value})]
        back[key] = torch.cat(parts) if "in_proj" in key else parts[0].T if key.endswith(("proj", "projection")) else parts[0]
    mine.load_state_dict(back, strict=True)
    with torch.no_grad():
        output = other(input_ids=ids, pixel_values=image)
        normalised = [torch.nn.functional.normalize(f, dim=-1) for f in mine(image, ids)]
    close(normalised[0], output.image_embeds)
    close(normalised[1], output.text_embeds)
