"""Weights out: writes a network of ours in the form that another project loads, with the lines that
load it.

timm and torchvision get the image encoder, as a state dict in model.pt; open_clip gets model.pt and
a description of the model; transformers gets a folder for from_pretrained; safetensors keeps the
names used here, in model.safetensors. An export.json beside them says what the tensors do not, so
that the weights can be read here again."""

import contextlib
import importlib
import json
import os
from pathlib import Path

import torch

from common import UserError
from names import align_state, clip_to_transformers, dinov2_to_timm, vit_to_torchvision
from names import vit_to_transformers
from recognise import depth, family, read_json

DEPTHS = {("BasicBlock", 2, 2, 2, 2): "resnet18", ("BasicBlock", 3, 4, 6, 3): "resnet34",
          ("Bottleneck", 3, 4, 6, 3): "resnet50", ("Bottleneck", 3, 4, 23, 3): "resnet101",
          ("Bottleneck", 3, 8, 36, 3): "resnet152"}  # fmt: skip


class NoCounterpart(Exception):
    """Why a network cannot go to a project, as the end of a sentence."""


# -------------------------------------------- what it is ------------------------------------------
def vit_sizes(vit):
    """-> image size, patch size, number of blocks, heads, width and hidden width of a transformer
    with timm's names."""
    patch = vit.patch_embed.proj.kernel_size[0]
    side = round((vit.pos_embed.shape[1] - 1) ** 0.5)
    block = vit.blocks[0]
    # a block of DINOv2 computes its attention itself, others have a module for it
    heads = block.heads if hasattr(block, "heads") else block.attn.heads
    layer = block.mlp.w3 if hasattr(block.mlp, "w3") else block.mlp.fc2
    return side * patch, patch, len(vit.blocks), heads, vit.pos_embed.shape[2], layer.in_features


def heads_of(transformer):
    """The attention heads of CLIP's, DeCLIP's or ALIGN's blocks; None for a ResNet."""
    for module in transformer.modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            return module.num_heads
    return None


def resnet_name(net, state):
    """-> torchvision's name of a ResNet, and the lines that turn it into one with a stem for
    small images, if it has that. Raises NoCounterpart if torchvision has no such network."""
    block = "Bottleneck" if "layer1.0.conv3.weight" in state else "BasicBlock"
    name = DEPTHS.get((block, *(depth(state, f"layer{i}.") for i in (1, 2, 3, 4))))
    if name is None or state["layer1.0.conv2.weight"].shape[:2] != (64, 64):
        raise NoCounterpart("has only ResNets of the usual depth and width")
    if state["conv1.weight"].shape[-1] != 3:
        return name, ""
    # a state dict has no strides: CIFAR's stem has 1, --stem small has 2
    options = f"3, stride={net.encoder.conv1.stride[0]}, padding=1, bias=False"
    convolution = f"model.conv1 = nn.Conv2d(3, 64, {options})\n"
    return name, convolution + "model.maxpool = nn.Identity()\n"


def encoder_state(net):
    """-> the state dict of the image encoder, and its family: a transformer with timm's names,
    DINOv2's, or a ResNet with torchvision's."""
    state = net.encoder.state_dict()
    found = family(state)
    known = "DINOv2", "a ViT with timm's names", "a ResNet with torchvision's names"
    if found not in known or hasattr(net.encoder, "attnpool"):
        raise NoCounterpart("has no such image encoder")
    return state, found


def resized(net, state):
    """A DINOv2's state dict with positions for the size of its evaluation view, and that size.
    Released weights have those of 518 pixels, and every project resizes them in its own way."""
    size, (_, patch, *_) = net.view.size, vit_sizes(net.encoder)
    rows = size // patch
    positions = net.encoder.interpolate_pos_embed(rows, rows)
    return {**state, "pos_embed": positions}, rows * patch


# -------------------------------------------- other projects --------------------------------------
# Each function takes a network and returns its state dict, {file name: content, written as JSON},
# and the Python lines that load it, in which FOLDER stands for the folder of these files. Raises
# NoCounterpart.
LOAD = 'model.load_state_dict(torch.load("FOLDER/model.pt", weights_only=True))'


def to_timm(net):
    state, found = encoder_state(net)
    if "ResNet" in found:
        name, small = resnet_name(net, state)
        make = f'model = timm.create_model("{name}", num_classes=0)\n{small}'
        return state, {}, f"import timm, torch\nfrom torch import nn\n{make}{LOAD}"
    size, patch, layers, heads, width, hidden = vit_sizes(net.encoder)
    more = ""
    if found == "DINOv2":
        state, size = resized(net, state)
        state = dinov2_to_timm(state)
        registers = state["reg_token"].shape[1] if "reg_token" in state else 0
        more = f",\n    init_values=1.0, no_embed_class=True, reg_tokens={registers}"
        if net.encoder.blocks[0].swiglu:
            hidden *= 2  # gate and value
            more += ",\n    mlp_layer=timm.layers.SwiGLUPacked, act_layer=nn.SiLU"
    ratio = ""
    if hidden != 4 * width:
        ratio = f",\n    mlp_ratio={hidden}.5 / {width}"  # timm rounds the product down
    make = (f"model = timm.models.VisionTransformer(img_size={size}, patch_size={patch}, "
            f"depth={layers},\n    num_heads={heads}, embed_dim={width}, "
            f"num_classes=0{more}{ratio})\n")  # fmt: skip
    return state, {}, f"import timm, torch\nfrom torch import nn\n{make}{LOAD}"


def to_torchvision(net):
    state, found = encoder_state(net)
    if found == "DINOv2":
        raise NoCounterpart("has no LayerScale")
    if "ResNet" in found:
        name, small = resnet_name(net, state)
        make = f"model = torchvision.models.{name}()\nmodel.fc = nn.Identity()\n{small}"
    else:
        size, patch, layers, heads, width, hidden = vit_sizes(net.encoder)
        sizes = f"{size}, {patch}, {layers}, {heads}, {width}, {hidden}"
        make = f"model = torchvision.models.VisionTransformer({sizes})\n"
        make += "model.heads = nn.Identity()\n"
        state = vit_to_torchvision(state)
    return state, {}, f"import torch, torchvision\nfrom torch import nn\n{make}{LOAD}"


def clip_config(net):
    """The description of a CLIP that open_clip reads."""
    state, clip = net.model.state_dict(), importlib.import_module("clip")
    if not isinstance(net.model, clip.CLIP):
        raise NoCounterpart("takes no other language-image model than CLIP")
    vision = {"image_size": net.view.size}
    if "visual.proj" in state:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        hidden = len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"])
        ratio = 4 if hidden == 4 * width else (hidden + 0.5) / width  # open_clip rounds down
        vision |= {"width": width, "patch_size": patch, "mlp_ratio": ratio}
        vision["layers"] = depth(state, "visual.transformer.resblocks.")
        vision["head_width"] = width // heads_of(net.model.visual)
    else:
        layers = [depth(state, f"visual.layer{i}.") for i in (1, 2, 3, 4)]
        vision |= {"width": len(state["visual.conv3.weight"]), "patch_size": None, "layers": layers}
        vision["head_width"] = 32 * vision["width"] // net.model.visual.attnpool.heads
    width, embed_dim = state["text_projection"].shape
    text = {"context_length": len(state["positional_embedding"]), "width": width,
            "vocab_size": len(state["token_embedding.weight"]),
            "heads": heads_of(net.model.transformer),
            "layers": depth(state, "transformer.resblocks.")}  # fmt: skip
    gelu = net.model.transformer.resblocks[0].mlp.gelu
    quick = isinstance(gelu, clip.QuickGELU)
    return {"embed_dim": embed_dim, "quick_gelu": quick, "vision_cfg": vision, "text_cfg": text}


def to_open_clip(net):
    return net.model.state_dict(), {"ours.json": clip_config(net)}, (
        'import open_clip\nopen_clip.add_model_config("FOLDER/ours.json")\n'
        'model = open_clip.create_model("ours", pretrained="FOLDER/model.pt")')  # fmt: skip


def to_transformers(net):
    if isinstance(net.model, importlib.import_module("clip").CLIP):
        return to_transformers_clip(net)
    if "text.word_embeddings.weight" in net.model.state_dict():
        return to_transformers_align(net)
    state, found = encoder_state(net)
    if "ResNet" in found:
        raise NoCounterpart("has ResNets in a form of its own")
    size, patch, layers, heads, width, hidden = vit_sizes(net.encoder)
    config = {"model_type": "vit", "architectures": ["ViTModel"], "image_size": size,
              "patch_size": patch, "num_hidden_layers": layers, "num_attention_heads": heads,
              "hidden_size": width, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}  # fmt: skip
    load, options = "ViTModel", ", add_pooling_layer=False"
    if found == "DINOv2":
        state, config["image_size"] = resized(net, state)
        load, options = "Dinov2Model", ""
        config |= {"model_type": "dinov2", "architectures": [load]}
        config |= {"mlp_ratio": 4, "use_swiglu_ffn": net.encoder.blocks[0].swiglu}
        if "register_tokens" in state:
            load = "Dinov2WithRegistersModel"
            config |= {"model_type": "dinov2_with_registers", "architectures": [load]}
            config["num_register_tokens"] = state["register_tokens"].shape[1]
        usual = (int(8 * width / 3) + 7) // 8 * 8 if config["use_swiglu_ffn"] else 4 * width
        if hidden != usual:
            raise NoCounterpart("has no DINOv2 with this hidden width")
    else:
        config["intermediate_size"] = hidden
    return vit_to_transformers(state), {"config.json": config}, (
        f"from transformers import {load}\n"
        f'model = {load}.from_pretrained("FOLDER"{options}).eval()\n'
        "features = model(images).last_hidden_state[:, 0]")  # fmt: skip


def to_transformers_clip(net):
    sizes = clip_config(net)
    if "visual.proj" not in net.model.state_dict():
        raise NoCounterpart("has no CLIP with a ResNet")
    towers = []
    for tower in (sizes["text_cfg"], sizes["vision_cfg"]):
        width = tower["width"]
        heads = tower.get("heads") or width // tower["head_width"]
        towers.append({"hidden_size": width, "num_attention_heads": heads,
                       "intermediate_size": int(tower.get("mlp_ratio", 4) * width),
                       "hidden_act": "quick_gelu" if sizes["quick_gelu"] else "gelu",
                       "num_hidden_layers": tower["layers"]})  # fmt: skip
    text, vision = towers
    text |= {
        "vocab_size": sizes["text_cfg"]["vocab_size"],
        "bos_token_id": None,
        "pad_token_id": None,
        "max_position_embeddings": sizes["text_cfg"]["context_length"],
        "eos_token_id": 2,
    }  # transformers takes 2 to mean: pool where the id is largest
    vision |= {name: sizes["vision_cfg"][name] for name in ("image_size", "patch_size")}
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "text_config": text,
              "vision_config": vision, "projection_dim": sizes["embed_dim"]}  # fmt: skip
    return (
        clip_to_transformers(net.model.state_dict()),
        {"config.json": config},
        ('from transformers import CLIPModel\nmodel = CLIPModel.from_pretrained("FOLDER")'),
    )


def to_transformers_align(net):
    """AlignModel has no layer between image encoder and embedding. It describes EfficientNet by the
    stages of B0 and by how much wider and deeper they are."""
    align, model = importlib.import_module("align"), net.model
    if model.visual.dim != len(model.text_projection.weight):
        raise NoCounterpart("has no ALIGN whose image encoder has another width than the embedding")
    own, multipliers = model.visual.state_dict(), None
    for width, deep in align.ARCHS.values():
        with torch.device("meta"):
            like = align.EfficientNet(width, deep).state_dict()
        if [x.shape for x in like.values()] == [x.shape for x in own.values()]:
            multipliers = width, deep
    if not multipliers:
        raise NoCounterpart("has EfficientNets of the usual sizes alone")
    words, positions = model.text.word_embeddings, model.text.position_embeddings
    text = {"vocab_size": words.num_embeddings, "hidden_size": words.embedding_dim,
            "num_hidden_layers": len(model.text.layers),
            "num_attention_heads": heads_of(model.text), "hidden_act": "gelu",
            "intermediate_size": model.text.layers[0].linear1.out_features,
            "max_position_embeddings": positions.num_embeddings,
            "layer_norm_eps": 1e-12, "pad_token_id": 0}  # fmt: skip
    names = ("expand_ratios", "kernel_sizes", "strides", "in_channels", "out_channels",
             "num_block_repeats")  # fmt: skip
    vision = {name: list(column) for name, column in zip(names, zip(*align.EfficientNet.b0))}
    vision |= {"image_size": net.view.size, "hidden_dim": model.visual.dim, "depthwise_padding": []}
    vision |= {"width_coefficient": multipliers[0], "depth_coefficient": multipliers[1]}
    config = {"model_type": "align", "architectures": ["AlignModel"], "text_config": text,
              "vision_config": vision, "projection_dim": model.visual.dim}  # fmt: skip
    return align_state(model), {"config.json": config}, (
        "from transformers import AlignModel\n"
        'model = AlignModel.from_pretrained("FOLDER")')  # fmt: skip


def to_safetensors(net):
    state = (net.model if is_whole(net) else net.encoder).state_dict()
    usage = 'from safetensors.torch import load_file\nstate = load_file("FOLDER/model.safetensors")'
    return state, {}, usage


def is_whole(net):
    """Whether a network is written with its text encoder. slip_ablations.py has models without."""
    tables = "token_embedding.weight", "word_embeddings.weight"
    return any(name.endswith(tables) for name in net.model.state_dict())


EXPORTS = {"timm": to_timm, "torchvision": to_torchvision, "open_clip": to_open_clip}
EXPORTS |= {"transformers": to_transformers, "safetensors": to_safetensors}


def where_else(net, to):
    """The other projects that take this network."""
    found = []
    for name, function in EXPORTS.items():
        try:
            if name != to:
                function(net)
                found.append(name)
        except NoCounterpart:
            pass
    return found


def described(net, to, file):
    """What export.json says: whose network it is, what the tensors do not tell, and the evaluation
    view. Weights with the names used here carry the arguments that build their network."""
    view = {"size": net.view.size, "resize": net.view.resize, "mean": net.view.mean,
            "std": net.view.std, "interpolation": net.view.filter.name.lower()}  # fmt: skip
    found = {"to": to, "weights": file, "method": net.method, "arch": net.arch, "view": view}
    encoder = net.encoder
    if hasattr(encoder, "conv1"):
        found["stride"] = encoder.conv1.stride[0]
    if hasattr(encoder, "blocks"):
        found["heads"] = vit_sizes(encoder)[3]
    if is_whole(net):
        visual = net.model.visual
        if hasattr(visual, "attnpool"):
            found["heads"] = getattr(visual.attnpool, "heads", None)
        elif not hasattr(visual, "blocks"):
            found["heads"] = heads_of(visual)
        texts = [getattr(net.model, name, None) for name in ("transformer", "text", "encode_text")]
        text = next(x for x in texts if isinstance(x, torch.nn.Module))
        found["text_heads"] = heads_of(text)
        clip = importlib.import_module("clip")
        if isinstance(net.model, clip.CLIP):
            found["gelu"] = "quick" if clip_config(net)["quick_gelu"] else "exact"
    if net.tokenizer:
        found["context_length"] = net.tokenizer.context_length
    if to == "safetensors" and net.args:
        found |= {"args": net.args, "head_layer": net.head_layer, "whole": is_whole(net)}
    return found


def refuse_to_overwrite(folder, to, weights, names):
    """Raises UserError unless the folder has none of these files, or those of an earlier export in
    the form of `to`."""
    for name in ("args.json", "checkpoint.pt"):
        if (folder / name).exists():
            raise UserError(f"{folder} is the directory of a run ({name}), use another --out")
    before = read_json(folder / "export.json")
    ours = before.get("weights") == weights and before.get("to", to) == to
    there = [name for name in [weights, *names] if (folder / name).exists()]
    if there and not ours:
        what = "which is not from an export of the same form"
        raise UserError(f"{folder} has a file {there[0]}, {what}: use another --out")


def save_weights(state, path):
    """Writes a state dict in the form that the ending of a path, before its .tmp, stands for.
    Raises OSError or RuntimeError where the disk is full."""
    if not path.stem.endswith(".safetensors"):
        torch.save(state, path)
        return
    save_file = importlib.import_module("safetensors.torch").save_file
    try:
        save_file(state, path, metadata={"format": "pt"})
    except Exception as error:  # safetensors raises a class of its own
        raise OSError(str(error)) from error


def export(net, to, folder):
    """Writes the network in the form of `to` into `folder` -> the lines of Python that load it, and
    the preprocessing that it expects. Raises UserError."""
    try:
        state, files, usage = EXPORTS[to](net)
    except NoCounterpart as error:
        others = " or ".join(f"--to {name}" for name in where_else(net, to))
        raise UserError(f"{net.method}'s {net.arch} cannot go to {to}, which {error}: {others} "
                        "takes it") from error  # fmt: skip
    state = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    folder = Path(folder)
    file = "model.safetensors" if to in ("transformers", "safetensors") else "model.pt"
    files = {**files, "export.json": described(net, to, file)}
    refuse_to_overwrite(folder, to, file, [*files, *["tokenizer.json"] * bool(net.tokenizer)])
    texts = {name: json.dumps(content, indent=1) for name, content in files.items()}
    if net.tokenizer:
        texts["tokenizer.json"] = net.tokenizer.to_json()
    whole = {name: folder / f"{name}.tmp" for name in [*texts, file]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            whole[name].write_text(text, encoding="utf-8")
        save_weights(state, whole[file])
        for name, path in whole.items():  # a full disk leaves an earlier export as it is
            os.replace(path, folder / name)
    except (OSError, RuntimeError) as error:
        for path in whole.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise UserError(f"{folder} cannot be written ({error}), use another --out") from error
    return usage.replace("FOLDER", str(folder)) + "\n" + preprocessing(net.view)


def preprocessing(view):
    """What the images of a network need, as a line of Python that is a comment."""
    squashes = isinstance(view, importlib.import_module("align").AlignEvalView)
    sides = "both sides" if squashes else "shorter side"
    resize = f"{sides} to {view.resize} ({view.filter.name.lower()})"
    return (f"# images: {resize}, centre of {view.size} pixels, "
            f"minus {view.mean} over {view.std}")  # fmt: skip
