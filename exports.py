"""Weights out: a network of ours in the form that another project loads, and the lines that load it there.

timm, torchvision: the image encoder, a state dict in model.pt; open_clip: model.pt and a description of the
model; transformers: a folder for from_pretrained; safetensors: model.safetensors, with the names used here.
"""

import importlib
import json
import re
from pathlib import Path

import torch

from common import UserError
from weights import depth, family

DEPTHS = {("BasicBlock", 2, 2, 2, 2): "resnet18", ("BasicBlock", 3, 4, 6, 3): "resnet34",
          ("Bottleneck", 3, 4, 6, 3): "resnet50", ("Bottleneck", 3, 4, 23, 3): "resnet101",
          ("Bottleneck", 3, 8, 36, 3): "resnet152"}  # fmt: skip


# -------------------------------------------- what it is --------------------------------------------
def vit_sizes(vit):
    """-> image size, patch, blocks, heads, width of a transformer with timm's names."""
    patch = vit.patch_embed.proj.kernel_size[0]
    side = round((vit.pos_embed.shape[1] - 1) ** 0.5)
    block = vit.blocks[0]
    heads = block.heads if hasattr(block, "heads") else block.attn.heads  # DINOv2's blocks attend themselves
    return side * patch, patch, len(vit.blocks), heads, vit.pos_embed.shape[2]


def resnet_name(state):
    """-> torchvision's name of a ResNet, lines that change it. Raises UserError if it has no such network."""
    block = "Bottleneck" if "layer1.0.conv3.weight" in state else "BasicBlock"
    name = DEPTHS.get((block, *(depth(state, f"layer{i}.") for i in (1, 2, 3, 4))))
    if name is None or state["layer1.0.conv2.weight"].shape[:2] != (64, 64):
        raise UserError("only a ResNet of the usual depth and width fits there, --to safetensors takes any")
    small = "model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)\nmodel.maxpool = nn.Identity()\n"
    return name, small if state["conv1.weight"].shape[-1] == 3 else ""


def encoder_state(net, to):
    """-> state dict of the image encoder, whether it is a transformer. Raises UserError if it is neither that
    nor a ResNet with torchvision's names."""
    state = net.encoder.state_dict()
    found = family(state)
    if found not in ("a ViT with timm's names", "a ResNet with torchvision's names"):
        raise UserError(f"{net.method}'s {net.arch} has no counterpart in {to}, try open_clip or safetensors")
    return state, "ViT" in found


# -------------------------------------------- names --------------------------------------------
def torchvision_names(state):
    """timm's names of a ViT -> torchvision's."""
    renamed = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding", "norm": "encoder.ln",
               r"blocks\.(\d+)": r"encoder.layers.encoder_layer_\1",
               "patch_embed.proj": "conv_proj"}  # fmt: skip
    inner = {"norm": "ln_", "attn.qkv.": "self_attention.in_proj_", "attn.proj": "self_attention.out_proj",
             "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}  # fmt: skip
    out = {}
    for key, value in state.items():
        if key.startswith("blocks."):
            for old, new in inner.items():
                key = key.replace(old, new)
        for old, new in renamed.items():
            key = re.sub(f"^{old}", new, key)
        out[key] = value
    return out


def transformers_vit_names(state):
    """timm's names of a ViT -> those of transformers' ViTModel, as on its hub."""
    renamed = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
               "patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks.": "encoder.layer.",
               "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
               "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}  # fmt: skip
    out = {}
    for key, value in state.items():
        key = re.sub("^norm", "layernorm", key)
        for old, new in renamed.items():
            key = key.replace(old, new)
        parts = zip(("query", "key", "value"), value.chunk(3)) if "attn.qkv" in key else [("", value)]
        out |= {key.replace("attn.qkv", f"attention.attention.{name}"): part for name, part in parts}
    return out


def transformers_clip_names(state):
    """OpenAI's names -> those of transformers' CLIPModel."""
    renamed = {"transformer.resblocks": "encoder.layers", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
               "c_fc": "fc1", "c_proj": "fc2", "attn.": "self_attn.", "ln_final": "final_layer_norm",
               "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm", "conv1": "embeddings.patch_embedding",
               "token_embedding": "embeddings.token_embedding",
               "class_embedding": "embeddings.class_embedding",
               "positional_embedding": "embeddings.position_embedding.weight"}  # fmt: skip
    out = {"logit_scale": state["logit_scale"], "visual_projection.weight": state["visual.proj"].T,
           "text_projection.weight": state["text_projection"].T}  # fmt: skip
    for key, value in state.items():
        if key in ("logit_scale", "visual.proj", "text_projection"):
            continue
        tower = "vision_model." if key.startswith("visual.") else "text_model."
        key = key.removeprefix("visual.")
        for old, new in renamed.items():
            key = key.replace(old, new)
        parts = zip("qkv", value.chunk(3)) if "in_proj_" in key else [("", value)]
        out |= {tower + key.replace("in_proj_", f"{name}_proj."): part for name, part in parts}
    return out


# -------------------------------------------- other projects --------------------------------------------
# Network -> state dict, {file name: what it holds, as JSON}, Python that loads it; FOLDER is where they are.
LOAD = 'model.load_state_dict(torch.load("FOLDER/model.pt", weights_only=True))'


def timm(net):
    if family(net.encoder.state_dict()) == "DINOv2":
        return timm_dinov2(net)
    state, is_vit = encoder_state(net, "timm")
    if is_vit:
        size, patch, layers, heads, width = vit_sizes(net.encoder)
        make = (f"model = timm.models.VisionTransformer(img_size={size}, patch_size={patch}, "
                f"depth={layers},\n    num_heads={heads}, embed_dim={width}, num_classes=0)\n")  # fmt: skip
    else:
        name, small = resnet_name(state)
        make = f'model = timm.create_model("{name}", num_classes=0)\n{small}'
    return state, {}, f"import timm, torch\nfrom torch import nn\n{make}{LOAD}"


def timm_dinov2(net):
    """There positions are those of patches alone, that of the class token is added to it once and for all."""
    if net.encoder.blocks[0].swiglu:
        raise UserError("DINOv2 goes to timm with --ffn mlp, with swiglu use --to safetensors")
    state = {name: x for name, x in net.encoder.state_dict().items() if name != "mask_token"}
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
    size, patch, layers, heads, width = vit_sizes(net.encoder)
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    make = (f"model = timm.models.VisionTransformer(img_size={size}, patch_size={patch}, depth={layers},\n"
            f"    num_heads={heads}, embed_dim={width}, num_classes=0, init_values=1.0,\n"
            f"    no_embed_class=True, reg_tokens={registers})\n")  # fmt: skip
    return state, {}, f"import timm, torch\n{make}{LOAD}"


def torchvision(net):
    state, is_vit = encoder_state(net, "torchvision")
    if is_vit:
        size, patch, layers, heads, width = vit_sizes(net.encoder)
        sizes = f"{size}, {patch}, {layers}, {heads}, {width}, {4 * width}"
        make = f"model = torchvision.models.VisionTransformer({sizes})\nmodel.heads = nn.Identity()\n"
        state = torchvision_names(state)
    else:
        name, small = resnet_name(state)
        make = f"model = torchvision.models.{name}()\nmodel.fc = nn.Identity()\n{small}"
    return state, {}, f"import torch, torchvision\nfrom torch import nn\n{make}{LOAD}"


def open_clip(net):
    state = net.model.state_dict()
    if family(state) != "CLIP":
        raise UserError(f"open_clip takes CLIP, {net.method}'s image encoder goes to timm or torchvision")
    vision = {"image_size": net.view.size, "head_width": 64}
    if "visual.proj" in state:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        layers = depth(state, "visual.transformer.resblocks.")
        vision |= {"width": width, "patch_size": patch, "layers": layers}
    else:
        layers = [depth(state, f"visual.layer{i}.") for i in (1, 2, 3, 4)]
        vision |= {"width": len(state["visual.conv3.weight"]), "patch_size": None, "layers": layers}
    width, embed_dim = state["text_projection"].shape
    text = {"context_length": len(state["positional_embedding"]), "width": width, "heads": width // 64,
            "vocab_size": len(state["token_embedding.weight"]),
            "layers": depth(state, "transformer.resblocks.")}  # fmt: skip
    config = {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    return state, {"ours.json": config}, (
        'import open_clip\nopen_clip.add_model_config("FOLDER/ours.json")\n'
        'model = open_clip.create_model("ours", pretrained="FOLDER/model.pt")')  # fmt: skip


def transformers(net):
    if family(net.model.state_dict()) == "CLIP":
        return transformers_clip(net)
    state, is_vit = encoder_state(net, "transformers")
    if not is_vit:
        raise UserError("transformers takes transformers, a ResNet goes to timm or torchvision")
    size, patch, layers, heads, width = vit_sizes(net.encoder)
    config = {"model_type": "vit", "architectures": ["ViTModel"], "image_size": size, "patch_size": patch,
              "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width,
              "intermediate_size": 4 * width, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}  # fmt: skip
    return transformers_vit_names(state), {"config.json": config}, (
        "from transformers import ViTModel\n"
        'model = ViTModel.from_pretrained("FOLDER", add_pooling_layer=False)\n'
        "features = model(images).last_hidden_state[:, 0]")  # fmt: skip


def transformers_clip(net):
    state, clip_config = net.model.state_dict(), open_clip(net)[1]["ours.json"]
    if "visual.proj" not in state:
        raise UserError("transformers has no CLIP with a ResNet, --to open_clip takes it")
    towers = []
    for tower in (clip_config["text_cfg"], clip_config["vision_cfg"]):
        width = tower["width"]
        towers.append({"hidden_size": width, "intermediate_size": 4 * width, "hidden_act": "quick_gelu",
                       "num_attention_heads": width // 64, "num_hidden_layers": tower["layers"]})  # fmt: skip
    text, vision = towers
    text |= {"vocab_size": clip_config["text_cfg"]["vocab_size"], "bos_token_id": None, "pad_token_id": None,
             "max_position_embeddings": clip_config["text_cfg"]["context_length"],
             "eos_token_id": 2}  # there this means: read out where the id is largest, as here
    vision |= {name: clip_config["vision_cfg"][name] for name in ("image_size", "patch_size")}
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "text_config": text,
              "vision_config": vision, "projection_dim": clip_config["embed_dim"]}  # fmt: skip
    return transformers_clip_names(state), {"config.json": config}, (
        'from transformers import CLIPModel\nmodel = CLIPModel.from_pretrained("FOLDER")')


def safetensors(net):
    whole = family(net.model.state_dict()) in ("CLIP", "SLIP")
    state = (net.model if whole else net.encoder).state_dict()
    usage = 'from safetensors.torch import load_file\nstate = load_file("FOLDER/model.safetensors")'
    return state, {}, usage


EXPORTS = {"timm": timm, "torchvision": torchvision, "open_clip": open_clip, "transformers": transformers,
           "safetensors": safetensors}  # fmt: skip


def export(net, to, folder):
    """Writes the network in the form of `to` into `folder` -> lines of Python that load it there, and what it
    expects. Raises UserError."""
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
            (folder / name).write_text(json.dumps(content, indent=1))
        if net.tokenizer:
            (folder / "tokenizer.json").write_text(net.tokenizer.to_json())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be written ({error}), use another --out") from error
    view = net.view
    expects = (f"# images: shorter side to {view.resize}, centre of {view.size} pixels, minus {view.mean} "
               f"over {view.std}")  # fmt: skip
    return usage.replace("FOLDER", str(folder)) + "\n" + expects
