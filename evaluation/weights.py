"""Weights in: opens a checkpoint of one of our method files, or published weights of another
project, as a network that is ready to be evaluated. Whose weights a file holds is recognised by the
names of its tensors.

    net = open_network("runs/dino_shapes", device)  # or dino_deitsmall16_pretrain.pth, RN50.pt, ...
    features = net.encoder(net.view(pixels, {}))    # uint8 (b, 3, S, S), as net.view.crop() returns

Only tensors, numbers and argparse's Namespace are ever unpickled, so that a file cannot run code.
Everything is loaded with strict=True; tensors that are not needed, such as heads, are removed by
name before that."""

import argparse
import importlib
import math
import re
import types
import warnings
import zipfile
from pathlib import Path

import torch
import torchvision
from torch import nn

from common import UserError
from data import Tokenizer
from run import load_checkpoint

ROOT = Path(__file__).parent.parent  # where the method files are


def read(path):
    """-> the dict in a file or run directory, which may be written by torch.save, be a safetensors
    file or one of OpenAI's TorchScript archives. Raises UserError."""
    if str(path).endswith(".safetensors"):
        load_file = importlib.import_module("safetensors.torch").load_file
        try:
            return load_file(path)
        except Exception as error:  # safetensors raises a class of its own for a damaged file
            raise UserError(f"{path} is no safetensors file or is damaged ({error})") from error
    try:
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        if any(name.endswith("/constants.pkl") for name in names):
            # torch.jit is deprecated, but nothing else reads these archives
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                return torch.jit.load(path, map_location="cpu").state_dict()
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = load_checkpoint(path)
    if not isinstance(saved, dict):
        raise UserError(f"{path} holds a {type(saved).__name__}, not a checkpoint")
    return saved


def state_of(saved):
    """The state dict in a dict that another project saved, without the prefix that data parallelism
    adds."""
    for key in ("teacher", "state_dict", "model"):  # DINO, iBOT; SLIP, MoCo, SimSiam; DeiT, MAE
        if isinstance(saved.get(key), dict):
            saved = saved[key]
    state = {str(k).removeprefix("module."): v for k, v in saved.items() if torch.is_tensor(v)}
    for key in ("input_resolution", "context_length", "vocab_size"):  # numbers in OpenAI's archives
        state.pop(key, None)
    return state


# -------------------------------------------- whose it is -----------------------------------------
# Family: (prefix that one of its tensors' names has, prefix of the evaluated encoder, method file
# whose preprocessing it takes). The first family whose prefix occurs is taken.
FAMILIES = {
    "SLIP": ("visual.cls_token", "visual.", "slip"),
    "DeCLIP": ("encode_text.text_projection.", "visual.", "declip"),
    "Hugging Face's ALIGN": ("vision_model.embeddings.convolution.", "vision_model.", "align"),
    "CLIP": ("visual.", "visual.", "clip"),
    "MoCo v3": ("momentum_encoder.", "base_encoder.", "mocov3"),
    "MoCo": ("encoder_q.", "encoder_q.", "moco"),
    "SimSiam": ("predictor.", "encoder.", "simsiam"),
    "SimCLR": ("head.linears.", "backbone.", "simclr"),
    "DINO or iBOT": ("head.last_layer.", "backbone.", "dino"),
    "DINOv2": ("blocks.0.ls1.", "", "dinov2"),
    "torchvision's ViT": ("conv_proj.", "", "dino"),
    "a ViT with timm's names": ("patch_embed.proj.", "", "dino"),
    "a ViT backbone with timm's names": ("backbone.patch_embed.proj.", "backbone.", "dino"),
    "a ResNet with torchvision's names": ("layer1.0.conv1.", "", "dino"),
    "a ResNet backbone with torchvision's names": ("backbone.layer1.0.conv1.", "backbone.", "dino"),
}
# heads beside an encoder, which are never evaluated
HEADS = ("fc.", "head.", "heads.", "head_dist.", "masked_embed")


def family(state):
    """-> the key of FAMILIES that a state dict belongs to, or None."""
    for name, (mark, _, _) in FAMILIES.items():
        if any(key.startswith(mark) for key in state):
            return name
    return None


def depth(state, prefix):
    """How many modules prefix0, prefix1, ... a state dict has."""
    return len({k.removeprefix(prefix).split(".")[0] for k in state if k.startswith(prefix)})


def timm_names(state):
    """A ViT's state dict with torchvision's names -> with timm's."""
    renamed = {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed",
               "encoder.ln": "norm", "conv_proj": "patch_embed.proj",
               r"encoder.layers.encoder_layer_(\d+)": r"blocks.\1",
               "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj",
               "ln_([12])": r"norm\1", r"mlp.(0|linear_1)\.": "mlp.fc1.",
               r"mlp.(3|linear_2)\.": "mlp.fc2."}  # fmt: skip
    out = {}
    for key, value in state.items():
        for old, new in renamed.items():
            key = re.sub(rf"(?:^|(?<=\.)){old}", new, key)
        out[key] = value
    return out


def vit_of(state, heads=0):
    """A state dict with timm's names -> dino.VisionTransformer with the sizes of its tensors, image
    size.

    The tensors do not tell the number of attention heads. It is one for 64 channels, except for the
    ViT-S of MoCo v3 and of SLIP, which have 12: they would load with 6 and give other features.
    MoCo v3's is recognised by its positions, which are fixed; for others there is `heads`."""
    dino = importlib.import_module("dino")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    fixed = not state["pos_embed"][:, 0].any()  # sines and cosines have zeros for the class token
    usual = next((heads for _, w, heads in dino.ARCHS.values() if w == width), max(1, width // 64))
    if not heads:
        heads = 12 if width == 384 and fixed else usual
    if width % heads:
        raise UserError(f"--heads {heads} does not divide the width {width} of this transformer")
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    return dino.VisionTransformer(
        side * patch, patch, width, depth(state, "blocks."), heads
    ), side * patch


def dinov2_of(state, heads=0):
    """A state dict with DINOv2's names -> dinov2.VisionTransformer with the sizes of its tensors,
    image size. There is one head for 64 channels unless `heads` says otherwise. The image size is
    224, as in DINOv2's evaluations, although the last part of its training had 518."""
    dinov2 = importlib.import_module("dinov2")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    swiglu = "blocks.0.mlp.w12.weight" in state
    heads = heads or max(1, width // 64)
    if width % heads:
        raise UserError(f"--heads {heads} does not divide the width {width} of this transformer")
    net = dinov2.VisionTransformer(side * patch, patch, width, depth(state, "blocks."), heads,
                                   registers=registers, swiglu=swiglu)  # fmt: skip
    return net, 224


def resnet_of(state):
    """A state dict with torchvision's names -> ResNet without classifier, image size. The weights
    do not tell the image size; it is 32 with CIFAR's stem and 224 otherwise."""
    layers = [depth(state, f"layer{i}.") for i in (1, 2, 3, 4)]
    if layers not in (
        [2, 2, 2, 2],
        [3, 4, 6, 3],
        [3, 4, 23, 3],
        [3, 8, 36, 3],
    ):  # blocks are missing
        raise ValueError(f"no ResNet has {layers} blocks")
    block, options = torchvision.models.resnet.BasicBlock, {}
    if "layer1.0.conv3.weight" in state:
        out, per_group, _, _ = state["layer1.0.conv2.weight"].shape  # wide and grouped ones too
        block, groups = torchvision.models.resnet.Bottleneck, out // per_group
        options = {"groups": groups, "width_per_group": out // groups}
    net = torchvision.models.resnet.ResNet(block, layers, **options)
    net.fc = nn.Identity()
    if state["conv1.weight"].shape[-1] != 3:
        return net, 224
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net, 32


def encoder_of(state, name, heads=0):
    """-> the image encoder of a family with random weights, image size, the part of the state dict
    that fits."""
    prefix = FAMILIES[name][1]
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    state = timm_names(state) if name == "torchvision's ViT" else state
    state = {k: v for k, v in state.items() if not k.startswith(HEADS)}
    if name == "DINOv2":
        encoder, image_size = dinov2_of(state, heads)
        return encoder, image_size, state
    is_vit = any(key.startswith("patch_embed.") for key in state)
    encoder, image_size = vit_of(state, heads) if is_vit else resnet_of(state)
    return encoder, image_size, state


def clip_of(state):
    """A state dict with OpenAI's names -> clip.CLIP with the sizes of its tensors, image size."""
    clip = importlib.import_module("clip")
    if "visual.proj" in state:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        layers = depth(state, "visual.transformer.resblocks.")
        tokens = state["visual.positional_embedding"]
    else:
        width, patch = len(state["visual.conv3.weight"]), None
        layers = [depth(state, f"visual.layer{i}.") for i in (1, 2, 3, 4)]
        tokens = state["visual.attnpool.positional_embedding"]
    image_size = (patch or 32) * math.isqrt(len(tokens) - 1)
    text_width, embed_dim = state["text_projection"].shape
    context_length = len(state["positional_embedding"])
    vocab_size = len(state["token_embedding.weight"])
    text_layers = depth(state, "transformer.resblocks.")
    text = context_length, vocab_size, text_width, text_width // 64, text_layers
    model = clip.CLIP(embed_dim, image_size, layers, width, patch, *text)
    return model, image_size


def slip_of(state):
    """A state dict with the names of SLIP_VIT{S,B,L}16 -> slip.SLIP with the sizes of its tensors,
    image size."""
    slip = importlib.import_module("slip")
    width, _, patch, _ = state["visual.patch_embed.proj.weight"].shape
    heads = next((heads for _, w, heads in slip.ARCHS.values() if w == width), width // 64)
    image_size = patch * math.isqrt(state["visual.pos_embed"].shape[1] - 1)
    visual = slip.VisionTransformer(image_size, patch, width, depth(state, "visual.blocks."), heads)
    text_width, embed_dim = state["text_projection"].shape
    context_length = len(state["positional_embedding"])
    vocab_size = len(state["token_embedding.weight"])
    ssl_emb_dim, ssl_mlp_dim = state["image_mlp.layer3.weight"].shape
    text_layers = depth(state, "transformer.resblocks.")
    text = context_length, vocab_size, text_width, text_width // 64, text_layers
    model = slip.SLIP(embed_dim, visual, width, *text, ssl_mlp_dim, ssl_emb_dim)
    return model, image_size


def declip_of(state):
    """A state dict with DeCLIP's names, of either image encoder -> declip.DeCLIP with the sizes of
    its tensors, image size."""
    declip = importlib.import_module("declip")
    embed_dim, text_width = state["encode_text.text_projection.weight"].shape
    if "visual.proj" in state:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        size = patch * math.isqrt(len(state["visual.positional_embedding"]) - 1)
        layers = depth(state, "visual.transformer.resblocks.")
        visual = declip.VisionTransformer(size, patch, width, layers, embed_dim)
    else:
        size = 32 * math.isqrt(len(state["visual.attnpool.positional_embedding"]) - 1)
        layers = [depth(state, f"visual.layer{i}.") for i in (1, 2, 3, 4)]
        visual = declip.ModifiedResNet(size, layers, embed_dim)
    context_length = len(state["encode_text.positional_embedding"])
    vocab_size = len(state["encode_text.token_embedding.weight"])
    text_layers = depth(state, "encode_text.transformer.resblocks.")
    text = declip.TextTransformer(context_length, vocab_size, text_width, text_layers, embed_dim)
    model = declip.DeCLIP(embed_dim, visual, text, len(state["projector.linear1.weight"]))
    return model, size


def align_modules(model):
    """-> {module of an align.ALIGN: the module of Hugging Face's AlignModel that holds the same
    tensors}."""
    names = {"text_projection": "text_projection", "text.norm": "text_model.embeddings.LayerNorm",
             "visual.features.0.0": "vision_model.embeddings.convolution",
             "visual.features.0.1": "vision_model.embeddings.batchnorm"}  # fmt: skip
    names |= {f"text.{kind}_embeddings": f"text_model.embeddings.{kind}_embeddings"
              for kind in ("word", "position", "token_type")}  # fmt: skip
    parts = {"self_attn": "attention.self", "self_attn.out_proj": "attention.output.dense",
             "norm1": "attention.output.LayerNorm", "linear1": "intermediate.dense",
             "linear2": "output.dense", "norm2": "output.LayerNorm"}  # fmt: skip
    for i in range(len(model.text.layers)):
        for ours, theirs in parts.items():
            names[f"text.layers.{i}.{ours}"] = f"text_model.encoder.layer.{i}.{theirs}"
    parts = ["expansion.expand_conv", "expansion.expand_bn"]
    parts += ["depthwise_conv.depthwise_conv", "depthwise_conv.depthwise_norm"]
    parts += ["squeeze_excite.reduce", "squeeze_excite.expand"]
    parts += ["projection.project_conv", "projection.project_bn"]
    modules = dict(model.named_modules())
    blocks = [name for name in modules if re.fullmatch(r"visual(\.\w+){3}\.block", name)]
    for i, block in enumerate(blocks):
        ours = []  # two layers of each step; the first step is missing where nothing is expanded
        for j, step in enumerate(modules[block]):
            ends = ("fc1", "fc2") if hasattr(step, "fc1") else ("0", "1")
            ours += [f"{block}.{j}.{end}" for end in ends]
        for our, their in zip(ours, parts[-len(ours) :]):
            names[our] = f"vision_model.encoder.blocks.{i}.{their}"
    return names


def align_state(model, theirs=None):
    """Translates between the state dicts of Hugging Face's AlignModel and of `model`, an
    align.ALIGN of the same sizes; the result loads strictly. With `theirs`, an AlignModel's state
    dict -> one for `model`. Without it, the model's own state dict -> one for an AlignModel.

    AlignModel computes q, k and v with three layers, where we have one. It also has a pooler that
    is never used: we leave it out, and fill it with zeros for an AlignModel."""
    modules, out = align_modules(model), {}
    for key, tensor in model.state_dict().items():
        module, _, kind = key.rpartition(".")
        names = [f"{modules[module]}.{kind}" if module else key]
        if kind.startswith("in_proj_"):
            names = [f"{modules[module]}.{part}.{kind[8:]}" for part in ("query", "key", "value")]
        if theirs:
            parts = [theirs[name] for name in names]
            out[key] = torch.cat(parts) if len(parts) > 1 else parts[0]
        else:
            out |= zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor])
    if not theirs:
        bias = torch.zeros_like(model.text.norm.bias)
        out |= {
            "text_model.pooler.dense.weight": torch.diag(bias),
            "text_model.pooler.dense.bias": bias,
        }
    return out


def align_of(state):
    """The state dict of an AlignModel with one of EfficientNet's sizes -> align.ALIGN of that size,
    and 289, the size of the images it was trained with."""
    align = importlib.import_module("align")
    vocab_size, width = state["text_model.embeddings.word_embeddings.weight"].shape
    context_length = len(state["text_model.embeddings.position_embeddings.weight"])
    text = align.BERT(context_length, vocab_size, width, depth(state, "text_model.encoder.layer."))
    blocks = depth(state, "vision_model.encoder.blocks.")
    dim = len(state[f"vision_model.encoder.blocks.{blocks - 1}.projection.project_conv.weight"])
    for sizes in align.ARCHS.values():
        with torch.device("meta"):
            visual = align.EfficientNet(*sizes)
        if (visual.dim, sum(map(len, visual.features[1:]))) == (dim, blocks):
            return align.ALIGN(dim, align.EfficientNet(*sizes), text, width), 289
    raise ValueError(f"no EfficientNet has {blocks} blocks and {dim} features")


CONTEXT = r"^(encode_text\.)?positional_embedding$|^text_model\.embeddings\.position_embeddings"
TOKENS = r"^(encode_text\.)?token_embedding\.|^text_model\.embeddings\.word_embeddings"
# Families that are loaded with their text encoder: (function that builds it, published tokenizer)
LANGUAGE_IMAGE = {
    "SLIP": (slip_of, "clip"),
    "CLIP": (clip_of, "clip"),
    "DeCLIP": (declip_of, "clip"),
    "Hugging Face's ALIGN": (align_of, "google-bert/bert-base-uncased"),
}


# -------------------------------------------- networks --------------------------------------------
def reason_of(error):
    """Why weights do not fit, in a few words."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return str(error).splitlines()[-1].strip()


def language_image_model(state, name):
    """-> the model of a family of LANGUAGE_IMAGE with random weights, image size, the state dict
    that fits it."""
    build, _ = LANGUAGE_IMAGE[name]
    model, image_size = build(state)
    if "ALIGN" in name:
        state = align_state(model, state)
    return model, image_size, state


def load_released(path):
    """Opens a published language-image model -> (method module, model in float32), loaded strictly.

    path: a checkpoint of CLIP (also OpenAI's half-precision TorchScript archives), SLIP or DeCLIP,
    or a state dict with their names or those of Hugging Face's AlignModel. Raises UserError."""
    state = state_of(read(path))
    name = family(state) if family(state) in LANGUAGE_IMAGE else "CLIP"
    try:
        model, _, state = language_image_model(state, name)
        model.load_state_dict(state, strict=True)  # copies half into single precision
    except (KeyError, ValueError, RuntimeError) as error:
        reason = reason_of(error)
        raise UserError(
            f"{path} does not hold a CLIP, SLIP, DeCLIP or ALIGN model: {reason}"
        ) from error
    return importlib.import_module(FAMILIES[name][2]), model


def open_network(path, device, head_layer=0, random_weights=False, heads=0, text=True,
                 tokenizer="", data_dir=None):  # fmt: skip
    """-> namespace of method, arch, step, model, encoder, view and tokenizer (None without text).

    head_layer: how many layers of the projection head the encoder includes; random_weights: the
    same network before training; heads: attention heads of another project's transformer (0:
    infer); text: whether to look for the tokenizer of a published language-image model; tokenizer,
    data_dir: another one than the published, and the folder of CLIP's merges. Raises UserError."""
    saved = read(path)
    torch.manual_seed(0)
    if saved.keys() >= {"method", "args", "model"}:
        net = open_ours(path, saved, head_layer, random_weights)
    else:
        state = state_of(saved)
        net = open_published(path, state, random_weights, heads, text, tokenizer, data_dir)
        if head_layer:
            raise UserError(
                f"{path} has no --head-layer, of others' checkpoints only the encoder is read"
            )
    net.model, net.encoder = net.model.to(device), net.encoder.to(device)
    return net


def open_ours(path, saved, head_layer, random_weights):
    """A checkpoint that one of our method files saved -> the namespace of open_network."""
    name = str(saved["method"])
    if not (name.isidentifier() and (ROOT / f"{name}.py").is_file()):
        raise UserError(f"{path} was written by {name}.py, which is not beside evaluate.py")
    method = importlib.import_module(name)
    args = types.SimpleNamespace(**{**vars(method.Args()), **saved["args"]})
    model = method.build_model(args)
    try:
        if not random_weights:
            model.load_state_dict(saved["model"])
        if head_layer:
            encoder = method.image_encoder(model, head_layer=head_layer)
        else:
            encoder = method.image_encoder(model)
    except RuntimeError as error:
        looks = f", it looks like {family(saved['model'])}" if family(saved["model"]) else ""
        raise UserError(f"{path} does not fit {name}.py{looks}: {reason_of(error)}") from error
    except TypeError as error:
        raise UserError(f"{name} has no --head-layer, its encoder ends before any head") from error
    tokenizer = Tokenizer(saved["tokenizer"], args.context_length) if "tokenizer" in saved else None
    return types.SimpleNamespace(
        method=name,
        arch=args.arch,
        step=saved.get("step"),
        model=model,
        encoder=encoder,
        view=method.eval_view(args),
        tokenizer=tokenizer,
    )


def open_published(path, state, random_weights, heads, text, spec="", data_dir=None):
    """A state dict of another project -> the namespace of open_network. `model` is the full model
    for families of LANGUAGE_IMAGE, and the encoder alone for the others."""
    name = family(state)
    if name is None:
        first = ", ".join(list(state)[:3]) or "no tensors"
        raise UserError(f"{path} was not written by one of our method files, and looks like "
                        f"nothing known here: it holds {first} ...")  # fmt: skip
    method = FAMILIES[name][2]
    if not (ROOT / f"{method}.py").is_file():
        raise UserError(f"{path} looks like {name}, for which there is no {method}.py here")
    module, tokenizer = importlib.import_module(method), None
    try:
        if name in LANGUAGE_IMAGE:
            model, size, fitting = language_image_model(state, name)
        else:
            model, size, fitting = encoder_of(state, name, heads)
        if not random_weights:
            model.load_state_dict(fitting)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} looks like {name}, but does not fit: {reason_of(error)}"
        ) from error
    if name in LANGUAGE_IMAGE and text:
        length, tokens = (next(len(value) for key, value in state.items() if re.search(what, key))
                          for what in (CONTEXT, TOKENS))  # fmt: skip
        _, published = LANGUAGE_IMAGE[name]
        tokenizer = Tokenizer(spec or published, length, data_dir=data_dir)
        if tokenizer.vocab_size > tokens:
            raise UserError(
                f"{path} knows {tokens} tokens, but tokenizer {spec or published} has "
                f"{tokenizer.vocab_size}: give {name}'s own with --tokenizer"
            )
        if published == "clip" and tokenizer.eot != tokenizer.vocab_size - 1:
            raise UserError(f"--tokenizer {spec} has an end token that is not its largest id, "
                            f"where {name} pools")  # fmt: skip
    encoder = module.image_encoder(model) if name in LANGUAGE_IMAGE else model
    view = module.eval_view(types.SimpleNamespace(image_size=size))
    return types.SimpleNamespace(method=name, arch=type(model).__name__, step=None, model=model,
                                 encoder=encoder, view=view, tokenizer=tokenizer)  # fmt: skip
