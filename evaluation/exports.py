"""Weights out: writes a network of ours in the form that another project loads, with the lines that
load it.

timm and torchvision get the image encoder, as a state dict in model.pt; open_clip gets model.pt and
a description of the model; transformers gets a folder for from_pretrained; safetensors keeps the
names used here, in model.safetensors."""

import importlib
import json
from pathlib import Path

import torch

from common import UserError
from evaluation.names import clip_to_transformers, vit_to_torchvision
from evaluation.names import vit_to_transformers
from evaluation.recognise import depth, family

DEPTHS = {("BasicBlock", 2, 2, 2, 2): "resnet18", ("BasicBlock", 3, 4, 6, 3): "resnet34",
          ("Bottleneck", 3, 4, 6, 3): "resnet50", ("Bottleneck", 3, 4, 23, 3): "resnet101",
          ("Bottleneck", 3, 8, 36, 3): "resnet152"}  # fmt: skip


# -------------------------------------------- what it is ------------------------------------------
def vit_sizes(vit):
    """-> image size, patch size, number of blocks, heads and width of a transformer with timm's
    names."""
    patch = vit.patch_embed.proj.kernel_size[0]
    side = round((vit.pos_embed.shape[1] - 1) ** 0.5)
    block = vit.blocks[0]
    # a block of DINOv2 computes its attention itself, others have a module for it
    heads = block.heads if hasattr(block, "heads") else block.attn.heads
    return side * patch, patch, len(vit.blocks), heads, vit.pos_embed.shape[2]


def resnet_name(state):
    """-> torchvision's name of a ResNet, and the lines that turn it into one with CIFAR's stem, if
    it has that. Raises UserError if torchvision has no such network."""
    block = "Bottleneck" if "layer1.0.conv3.weight" in state else "BasicBlock"
    name = DEPTHS.get((block, *(depth(state, f"layer{i}.") for i in (1, 2, 3, 4))))
    if name is None or state["layer1.0.conv2.weight"].shape[:2] != (64, 64):
        raise UserError(
            "only a ResNet of the usual depth and width fits there, --to safetensors takes any"
        )
    if state["conv1.weight"].shape[-1] != 3:
        return name, ""
    convolution = "model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)\n"
    return name, convolution + "model.maxpool = nn.Identity()\n"


def encoder_state(net, to):
    """-> the state dict of the image encoder, and whether it is a transformer. Raises UserError if
    it is neither a transformer with timm's names nor a ResNet with torchvision's."""
    state = net.encoder.state_dict()
    found = family(state)
    if found not in ("a ViT with timm's names", "a ResNet with torchvision's names"):
        raise UserError(
            f"{net.method}'s {net.arch} has no counterpart in {to}, try open_clip or safetensors"
        )
    return state, "ViT" in found


# -------------------------------------------- other projects --------------------------------------
# Each function takes a network and returns its state dict, {file name: content, written as JSON},
# and the Python lines that load it, in which FOLDER stands for the folder of these files.
LOAD = 'model.load_state_dict(torch.load("FOLDER/model.pt", weights_only=True))'


def to_timm(net):
    if family(net.encoder.state_dict()) == "DINOv2":
        return to_timm_dinov2(net)
    state, is_vit = encoder_state(net, "timm")
    if is_vit:
        size, patch, layers, heads, width = vit_sizes(net.encoder)
        make = (f"model = timm.models.VisionTransformer(img_size={size}, patch_size={patch}, "
                f"depth={layers},\n    num_heads={heads}, embed_dim={width}, "
                "num_classes=0)\n")  # fmt: skip
    else:
        name, small = resnet_name(state)
        make = f'model = timm.create_model("{name}", num_classes=0)\n{small}'
    return state, {}, f"import timm, torch\nfrom torch import nn\n{make}{LOAD}"


def to_timm_dinov2(net):
    """In timm only the patches have positions; that of the class token is added to the token
    here."""
    if net.encoder.blocks[0].swiglu:
        raise UserError("DINOv2 goes to timm with --ffn mlp, with swiglu use --to safetensors")
    state = {name: x for name, x in net.encoder.state_dict().items() if name != "mask_token"}
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
    size, patch, layers, heads, width = vit_sizes(net.encoder)
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    make = (f"model = timm.models.VisionTransformer(img_size={size}, patch_size={patch}, "
            f"depth={layers},\n"
            f"    num_heads={heads}, embed_dim={width}, num_classes=0, init_values=1.0,\n"
            f"    no_embed_class=True, reg_tokens={registers})\n")  # fmt: skip
    return state, {}, f"import timm, torch\n{make}{LOAD}"


def to_torchvision(net):
    state, is_vit = encoder_state(net, "torchvision")
    if is_vit:
        size, patch, layers, heads, width = vit_sizes(net.encoder)
        sizes = f"{size}, {patch}, {layers}, {heads}, {width}, {4 * width}"
        make = f"model = torchvision.models.VisionTransformer({sizes})\n"
        make += "model.heads = nn.Identity()\n"
        state = vit_to_torchvision(state)
    else:
        name, small = resnet_name(state)
        make = f"model = torchvision.models.{name}()\nmodel.fc = nn.Identity()\n{small}"
    return state, {}, f"import torch, torchvision\nfrom torch import nn\n{make}{LOAD}"


def to_open_clip(net):
    state = net.model.state_dict()
    if family(state) != "CLIP":
        raise UserError(
            f"open_clip takes CLIP, {net.method}'s image encoder goes to timm or torchvision"
        )
    vision = {"image_size": net.view.size, "head_width": 64}
    if "visual.proj" in state:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        layers = depth(state, "visual.transformer.resblocks.")
        vision |= {"width": width, "patch_size": patch, "layers": layers}
    else:
        layers = [depth(state, f"visual.layer{i}.") for i in (1, 2, 3, 4)]
        vision |= {"width": len(state["visual.conv3.weight"]), "patch_size": None, "layers": layers}
    width, embed_dim = state["text_projection"].shape
    text = {"context_length": len(state["positional_embedding"]), "width": width,
            "heads": width // 64, "vocab_size": len(state["token_embedding.weight"]),
            "layers": depth(state, "transformer.resblocks.")}  # fmt: skip
    config = {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    return state, {"ours.json": config}, (
        'import open_clip\nopen_clip.add_model_config("FOLDER/ours.json")\n'
        'model = open_clip.create_model("ours", pretrained="FOLDER/model.pt")')  # fmt: skip


def to_transformers(net):
    if family(net.model.state_dict()) == "CLIP":
        return to_transformers_clip(net)
    state, is_vit = encoder_state(net, "transformers")
    if not is_vit:
        raise UserError("transformers takes transformers, a ResNet goes to timm or torchvision")
    size, patch, layers, heads, width = vit_sizes(net.encoder)
    config = {"model_type": "vit", "architectures": ["ViTModel"], "image_size": size,
              "patch_size": patch,
              "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width,
              "intermediate_size": 4 * width, "layer_norm_eps": 1e-6,
              "hidden_act": "gelu"}  # fmt: skip
    return vit_to_transformers(state), {"config.json": config}, (
        "from transformers import ViTModel\n"
        'model = ViTModel.from_pretrained("FOLDER", add_pooling_layer=False)\n'
        "features = model(images).last_hidden_state[:, 0]")  # fmt: skip


def to_transformers_clip(net):
    state, clip_config = net.model.state_dict(), to_open_clip(net)[1]["ours.json"]
    if "visual.proj" not in state:
        raise UserError("transformers has no CLIP with a ResNet, --to open_clip takes it")
    towers = []
    for tower in (clip_config["text_cfg"], clip_config["vision_cfg"]):
        width = tower["width"]
        towers.append({"hidden_size": width, "intermediate_size": 4 * width,
                       "hidden_act": "quick_gelu", "num_attention_heads": width // 64,
                       "num_hidden_layers": tower["layers"]})  # fmt: skip
    text, vision = towers
    text |= {
        "vocab_size": clip_config["text_cfg"]["vocab_size"],
        "bos_token_id": None,
        "pad_token_id": None,
        "max_position_embeddings": clip_config["text_cfg"]["context_length"],
        "eos_token_id": 2,
    }  # transformers takes 2 to mean: pool where the id is largest
    vision |= {name: clip_config["vision_cfg"][name] for name in ("image_size", "patch_size")}
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "text_config": text,
              "vision_config": vision, "projection_dim": clip_config["embed_dim"]}  # fmt: skip
    return (
        clip_to_transformers(state),
        {"config.json": config},
        ('from transformers import CLIPModel\nmodel = CLIPModel.from_pretrained("FOLDER")'),
    )


def to_safetensors(net):
    with_text = family(net.model.state_dict()) in ("CLIP", "SLIP")
    state = (net.model if with_text else net.encoder).state_dict()
    usage = 'from safetensors.torch import load_file\nstate = load_file("FOLDER/model.safetensors")'
    return state, {}, usage


EXPORTS = {"timm": to_timm, "torchvision": to_torchvision, "open_clip": to_open_clip}
EXPORTS |= {"transformers": to_transformers, "safetensors": to_safetensors}


def export(net, to, folder):
    """Writes the network in the form of `to` into `folder` -> the lines of Python that load it, and
    the preprocessing that it expects. Raises UserError."""
    state, files, usage = EXPORTS[to](net)
    state = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if to in ("transformers", "safetensors"):
            save_file = importlib.import_module("safetensors.torch").save_file
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        else:
            torch.save(state, folder / "model.pt")
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        if net.tokenizer:
            (folder / "tokenizer.json").write_text(net.tokenizer.to_json(), encoding="utf-8")
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be written ({error}), use another --out") from error
    view = net.view
    expects = (f"# images: shorter side to {view.resize}, centre of {view.size} pixels, "
               f"minus {view.mean} over {view.std}")  # fmt: skip
    return usage.replace("FOLDER", str(folder)) + "\n" + expects
