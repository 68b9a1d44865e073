"""Weights in: opens a checkpoint of one of our method files, or published weights of another
project, as a network that is ready to be evaluated. recognise.py reads a file and says whose
weights it holds, names.py translates the names of its tensors.

    net = open_network("runs/dino_shapes", device)  # or dino_deitsmall16_pretrain.pth, RN50.pt, ...
    features = net.encoder(net.view(pixels, {}))    # uint8 (b, 3, S, S), as net.view.crop() returns

Everything is loaded strictly; tensors that are not needed, such as heads, are removed by name and
counted before that."""

import importlib
import math
import sys
import types
from pathlib import Path

import torch
import torchvision
from torch import nn

from common import UserError, rank
from data import Tokenizer
from names import align_state
from recognise import FAMILIES, HEADS, MISFITS, Known, beside, depth, family, file_of, other, read
from recognise import first_three, reason_of, run_of, state_of, wrong_numbers

ROOT = Path(__file__).parent.parent  # where the method files are


# -------------------------------------------- strictly --------------------------------------------
def load_strictly(model, state):
    """Copies a state dict into a model; half precision becomes single. Raises ValueError, which
    names up to three tensors of a kind and counts the others."""
    own, problems = model.state_dict(), []
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in own]
    differ = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing:
        problems.append(f"it lacks {first_three(missing)}")
    if unknown:
        problems.append(f"it also holds {first_three(unknown)}")
    if differ:
        shapes = (tuple(x[differ[0]].shape) for x in (state, own))
        problems.append("{} has the shape {}, not {}".format(first_three(differ), *shapes))
    if not problems and (wrong := wrong_numbers(state, own)):
        problems.append(wrong)
    if problems:
        raise ValueError("; ".join(problems))
    model.load_state_dict(state)


# -------------------------------------------- encoders --------------------------------------------
# heads beside an encoder, which are never evaluated
BESIDE_ENCODERS = ("fc.", "head.", "heads.", "head_dist.", "pre_logits.", "masked_embed",
                   "decoder_", "prototypes.", "projection_head.")  # fmt: skip


def fit_linear(net, state):
    """Gives the feed-forward layers of `net` the sizes of the tensors, for transformers whose
    hidden layer is not four times as wide as the others (ViT-g, ViT-bigG)."""
    for name, module in list(net.named_modules()):
        weight = state.get(f"{name}.weight")
        if isinstance(module, nn.Linear) and ".mlp." in name and weight is not None:
            if weight.ndim == 2 and weight.shape != module.weight.shape:
                parent, _, own = name.rpartition(".")
                setattr(net.get_submodule(parent), own, nn.Linear(weight.shape[1], len(weight)))


def has_sines(state):
    """Whether positions are MoCo v3's, which are fixed: a grid of sines and cosines."""
    mocov3 = importlib.import_module("mocov3")
    positions = state["pos_embed"].float()
    side = math.isqrt(positions.shape[1] - 1)
    if positions.shape[2] % 4 or side**2 != positions.shape[1] - 1:
        return False
    sines = mocov3.sincos_position_embedding(side, positions.shape[2])
    return torch.allclose(positions, sines, atol=2e-3)  # as half precision has them


def vit_of(state, known, table):
    """A state dict with timm's names -> dino.VisionTransformer with the sizes of its tensors, image
    size. For 384 channels MoCo v3 has 12 heads, others have 6."""
    dino = importlib.import_module("dino")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    heads = known.heads_of(width, table, 12 if width in (384, 768) and has_sines(state) else 0)
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    net = dino.VisionTransformer(side * patch, patch, width, depth(state, "blocks."), heads)
    fit_linear(net, state)
    return net, side * patch


def dinov2_of(state, known, table):
    """A state dict with DINOv2's names -> dinov2.VisionTransformer with the sizes of its tensors,
    image size. The image size is 224, as in DINOv2's evaluations, although the last part of its
    training had 518."""
    dinov2 = importlib.import_module("dinov2")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    swiglu = "blocks.0.mlp.w12.weight" in state
    heads = known.heads_of(width, table)
    net = dinov2.VisionTransformer(side * patch, patch, width, depth(state, "blocks."), heads,
                                   registers=registers, swiglu=swiglu)  # fmt: skip
    fit_linear(net, state)
    return net, 224 if 224 % patch == 0 else side * patch


def resnet_of(state, known, table):
    """A state dict with torchvision's names -> ResNet without classifier, image size. The weights
    do not tell the image size; it is 32 with CIFAR's stem and 224 otherwise."""
    if known.heads:
        raise UserError("a ResNet has no attention heads: leave --heads out")
    layers = [depth(state, f"layer{i}.") for i in (1, 2, 3, 4)]
    usual = [2, 2, 2, 2], [3, 4, 6, 3], [3, 4, 23, 3], [3, 8, 36, 3]
    if layers not in usual:  # blocks are missing
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
    stride = known.beside.get("stride", 1)  # 1 for CIFAR; ours for small images has 2
    net.conv1 = nn.Conv2d(3, 64, 3, stride, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net, 32


def encoder_of(state, name, known):
    """-> the image encoder of a family with random weights, image size, the part of the state dict
    that fits."""
    marks, prefix, method, rename = FAMILIES[name]
    every = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    every = rename(every) if rename else every
    fitting = {k: v for k, v in every.items() if not k.startswith(BESIDE_ENCODERS)}
    if method != "dinov2":
        fitting.pop("mask_token", None)
    left_out = [k for k in every if k not in fitting]
    left_out += [k for k in state if not k.startswith(prefix)]
    if left_out:
        known.notes.append(f"without {first_three(left_out)}")
    if any(key.startswith("patch_embed.") for key in fitting):
        build = dinov2_of if method == "dinov2" else vit_of
        table = HEADS | {128: 4}  # as in our smallest ones
        table = table | {384: 12} if method == "slip" or name == "MoCo v3" else table
    else:
        build, table = resnet_of, {}
    encoder, image_size = build(fitting, known, table)
    return encoder, image_size, fitting


# -------------------------------------------- language and image ----------------------------------
def text_of(state, known):
    """Context length, vocabulary size, width, heads and layers of CLIP's text encoder."""
    width = state["text_projection"].shape[0]
    context_length = len(state["positional_embedding"])
    vocab_size = len(state["token_embedding.weight"])
    heads, layers = known.text_heads_of(width), depth(state, "transformer.resblocks.")
    return context_length, vocab_size, width, heads, layers


def clip_of(state, known):
    """A state dict with OpenAI's names -> clip.CLIP with the sizes of its tensors, image size."""
    clip = importlib.import_module("clip")
    embed_dim = state["text_projection"].shape[1]
    if "visual.proj" in state:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        layers = depth(state, "visual.transformer.resblocks.")
        image_size = patch * math.isqrt(len(state["visual.positional_embedding"]) - 1)
        heads = known.heads_of(width)
        model = clip.CLIP(embed_dim, 32, 0, 64, 32, *text_of(state, known))
        sizes = image_size, patch, width, layers, heads, embed_dim
        model.visual = clip.VisionTransformer(*sizes)  # CLIP itself has one for 64 channels
    else:
        width = len(state["visual.conv3.weight"])
        layers = [depth(state, f"visual.layer{i}.") for i in (1, 2, 3, 4)]
        image_size = 32 * math.isqrt(len(state["visual.attnpool.positional_embedding"]) - 1)
        model = clip.CLIP(embed_dim, image_size, layers, width, None, *text_of(state, known))
        model.visual.attnpool.heads = known.heads_of(32 * width, {})
    fit_linear(model, state)
    if known.exact_gelu(width):
        for module in model.modules():
            if isinstance(module, clip.ResidualAttentionBlock):
                module.mlp.gelu = nn.GELU()
    return model, image_size, state


def slip_of(state, known):
    """A state dict with the names of {SLIP,CLIP}_VIT{S,B,L}16 -> slip.SLIP with the sizes of its
    tensors, image size. The CLIP baseline has no image_mlp."""
    slip = importlib.import_module("slip")
    width, _, patch, _ = state["visual.patch_embed.proj.weight"].shape
    heads = known.heads_of(width, HEADS | {w: heads for _, w, heads in slip.ARCHS.values()})
    image_size = patch * math.isqrt(state["visual.pos_embed"].shape[1] - 1)
    visual = slip.VisionTransformer(image_size, patch, width, depth(state, "visual.blocks."), heads)
    embed_dim, ssl = state["text_projection"].shape[1], (1, 1)
    if "image_mlp.layer3.weight" in state:
        ssl = reversed(state["image_mlp.layer3.weight"].shape)
    model = slip.SLIP(embed_dim, visual, width, *text_of(state, known), *ssl)
    if "image_mlp.layer3.weight" not in state:
        del model.image_mlp
    return model, image_size, state


def set_heads(module, heads):
    """Gives every attention layer in a module this number of heads; no weight depends on it."""
    for layer in module.modules():
        if isinstance(layer, nn.MultiheadAttention):
            layer.num_heads, layer.head_dim = heads, layer.embed_dim // heads


def declip_of(state, known):
    """A state dict with DeCLIP's names, of either image encoder -> declip.DeCLIP with the sizes of
    its tensors, image size."""
    declip = importlib.import_module("declip")
    embed_dim, text_width = state["encode_text.text_projection.weight"].shape
    width = len(state["visual.conv1.weight"])
    if any(w % 64 for w in (text_width, width) if "visual.proj" in state):
        raise ValueError("declip.py has widths that are multiples of 64")
    if "visual.proj" in state:
        patch = state["visual.conv1.weight"].shape[-1]
        size = patch * math.isqrt(len(state["visual.positional_embedding"]) - 1)
        layers = depth(state, "visual.transformer.resblocks.")
        visual = declip.VisionTransformer(size, patch, width, layers, embed_dim)
        set_heads(visual, known.heads_of(width))
    else:
        size = 32 * math.isqrt(len(state["visual.attnpool.positional_embedding"]) - 1)
        layers = [depth(state, f"visual.layer{i}.") for i in (1, 2, 3, 4)]
        visual = declip.ModifiedResNet(size, layers, embed_dim)
        if known.heads:
            raise UserError("DeCLIP's ResNet has heads of 64 channels: leave --heads out")
    context_length = len(state["encode_text.positional_embedding"])
    vocab_size = len(state["encode_text.token_embedding.weight"])
    text_layers = depth(state, "encode_text.transformer.resblocks.")
    text = declip.TextTransformer(context_length, vocab_size, text_width, text_layers, embed_dim)
    set_heads(text, known.text_heads_of(text_width))
    model = declip.DeCLIP(embed_dim, visual, text, len(state["projector.linear1.weight"]))
    return model, size, state


def align_of(state, known):
    """The state dict of an AlignModel, or of ours, with one of EfficientNet's sizes -> align.ALIGN
    of that size, 289, the size of the images it was trained with, and the state dict that fits."""
    align = importlib.import_module("align")
    ours = "text.word_embeddings.weight" in state
    embeddings = "text." if ours else "text_model.embeddings."
    vocab_size, width = state[f"{embeddings}word_embeddings.weight"].shape
    context_length = len(state[f"{embeddings}position_embeddings.weight"])
    layers = depth(state, "text.layers." if ours else "text_model.encoder.layer.")
    text = align.BERT(context_length, vocab_size, width, layers)
    set_heads(text, known.text_heads_of(width))
    if known.heads:
        raise UserError("ALIGN's EfficientNet has no attention heads: leave --heads out")
    embed_dim = len(state["text_projection.weight"])
    side = "visual." if ours else "vision_model."
    shapes = [v.shape for k, v in state.items() if k.startswith(side) and v.ndim == 4]
    for name, sizes in align.ARCHS.items():
        with torch.device("meta"):
            visual = align.EfficientNet(*sizes)
        # the sizes differ in the number of convolutions or in their shapes
        if sorted(v.shape for v in visual.state_dict().values() if v.ndim == 4) == sorted(shapes):
            known.notes.append(name)
            model = align.ALIGN(embed_dim, align.EfficientNet(*sizes), text, width)
            return model, 289, state if ours else align_state(model, state)
    raise ValueError("its image encoder has the size of no EfficientNet")


# Families that are loaded with their text encoder: (function that builds it, published tokenizer)
BERT = "google-bert/bert-base-uncased"
LANGUAGE_IMAGE = {
    "SLIP": (slip_of, "clip"), "SLIP's CLIP": (slip_of, "clip"), "DeCLIP": (declip_of, "clip"),
    "CLIP": (clip_of, "clip"), "transformers' CLIP": (clip_of, "clip"),
    "open_clip's CLIP": (clip_of, "clip"), "ALIGN": (align_of, BERT),
    "Hugging Face's ALIGN": (align_of, BERT)}  # fmt: skip


# -------------------------------------------- networks --------------------------------------------
def language_image_model(state, name, known):
    """-> the model of a family of LANGUAGE_IMAGE with random weights, image size, the state dict
    that fits it."""
    build, _ = LANGUAGE_IMAGE[name]
    rename = FAMILIES[name].rename
    model, image_size, state = build(rename(state) if rename else state, known)
    if known.gelu and FAMILIES[name].method != "clip":
        raise UserError(f"--gelu is for CLIP's weights, these look like {name}'s: leave it out")
    return model, image_size, state


def refuse_others(path, state):
    if other(state):
        raise UserError(f"{path} looks like {other(state)}, which no method file here computes")


def report(path, name, known):
    """Says in one line what was recognised and what was assumed."""
    if rank() == 0:
        notes = [*known.notes, f"preprocessed as in {FAMILIES[name].method}.py"]
        print(f"{path} is taken for {name}: {', '.join(notes)}", file=sys.stderr)


def load_released(path, heads=0, text_heads=0, gelu=""):
    """Opens a published language-image model -> (method module, model in float32), loaded strictly.

    path: a checkpoint of CLIP (also OpenAI's half-precision TorchScript archives), SLIP or DeCLIP,
    or a state dict with their names or those of transformers' CLIPModel or AlignModel. heads,
    text_heads, gelu: as the flags of evaluate.py. Raises UserError."""
    file = file_of(path)
    state = state_of(read(file))
    refuse_others(path, state)
    name = family(state) if family(state) in LANGUAGE_IMAGE else "CLIP"
    known = Known(heads, text_heads, gelu, beside(file, name))
    try:
        model, _, state = language_image_model(state, name, known)
        load_strictly(model, state)
    except MISFITS as error:
        reason = reason_of(error)
        raise UserError(
            f"{path} does not hold a CLIP, SLIP, DeCLIP or ALIGN model: {reason}"
        ) from error
    report(path, name, known)
    return importlib.import_module(FAMILIES[name].method), model


def open_network(path, device, head_layer=0, random_weights=False, heads=0, text=True,
                 tokenizer="", data_dir=None, text_heads=0, gelu=""):  # fmt: skip
    """-> namespace of method, arch, step, model, encoder, view and tokenizer (None without text).
    Model and encoder are in evaluation mode.

    head_layer: how many layers of the projection head the encoder includes; random_weights: the
    same network before training, of seed 0 whatever the run's was; heads, text_heads, gelu: of
    another project's transformer, as the flags of evaluate.py (0 and empty: inferred); text:
    whether to look for the tokenizer of a published language-image model; tokenizer, data_dir:
    another one than the published, and the folder of CLIP's merges. Raises UserError."""
    file = file_of(path)
    saved = read(file)
    torch.manual_seed(0)
    run = run_of(file, saved)
    given = {"heads": heads, "text-heads": text_heads, "gelu": gelu, "tokenizer": tokenizer}
    if run and any(given.values()) and not random_weights and rank() == 0:
        unused = ", ".join(f"--{name}" for name in given if given[name])
        text = f"{path} is of this project and holds these settings: {unused} not used"
        print(text, file=sys.stderr)
    if run and "whole" not in run:
        net = open_ours(path, run, head_layer, random_weights)
    elif run:
        if head_layer:
            raise UserError(f"{path} was exported, use --head-layer for the export")
        net = open_export(file, run, random_weights)
    else:
        known = Known(heads, text_heads, gelu)
        net = open_published(file, state_of(saved), random_weights, known)
        if text and net.method in LANGUAGE_IMAGE:
            net.tokenizer = published_tokenizer(file, net, tokenizer, data_dir)
        if head_layer:
            raise UserError(
                f"{path} has no --head-layer, of others' checkpoints only the encoder is read"
            )
    net.model, net.encoder = net.model.to(device).eval(), net.encoder.to(device).eval()
    return net


def open_ours(path, saved, head_layer, random_weights):
    """A checkpoint that one of our method files saved -> the namespace of open_network."""
    name = saved["method"]
    if not (name.isidentifier() and (ROOT / f"{name}.py").is_file()):
        raise UserError(f"{path} was written by {name}.py, which is not beside evaluate.py")
    method = importlib.import_module(name)
    try:
        args = types.SimpleNamespace(**{**vars(method.Args()), **saved["args"]})
        model = method.build_model(args)
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: its args describe no network of {name}.py") from error
    try:
        if not random_weights:
            load_strictly(model, saved["model"])
        if head_layer:
            encoder = method.image_encoder(model, head_layer=head_layer)
        else:
            encoder = method.image_encoder(model)
    except (ValueError, RuntimeError) as error:
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
        args=saved["args"],
        head_layer=head_layer,
    )


def open_export(file, saved, random_weights):
    """What `export --to safetensors` wrote of one of our checkpoints, with what export.json says of
    it -> the namespace of open_network."""
    if saved["whole"]:
        return open_ours(file, saved, saved["head_layer"], random_weights)
    net = open_ours(file, saved, saved["head_layer"], random_weights=True)
    try:
        if not random_weights:
            load_strictly(net.encoder, saved["model"])
    except ValueError as error:
        raise UserError(f"{file} does not fit its export.json: {reason_of(error)}") from error
    return net


def open_published(path, state, random_weights, known):
    """A state dict of another project -> the namespace of open_network, without tokenizer. `model`
    is the full model for families of LANGUAGE_IMAGE, and the encoder alone for the others."""
    refuse_others(path, state)
    name = family(state)
    if name is None:
        first = first_three(state) if state else "no tensors"
        raise UserError(f"{path} was not written by one of our method files, and looks like "
                        f"nothing known here: it holds {first}")  # fmt: skip
    method = FAMILIES[name].method
    if not (ROOT / f"{method}.py").is_file():
        raise UserError(f"{path} looks like {name}, for which there is no {method}.py here")
    module, known.beside = importlib.import_module(method), beside(path, name)
    try:
        if name in LANGUAGE_IMAGE:
            model, size, fitting = language_image_model(state, name, known)
        elif known.text_heads or known.gelu:
            raise UserError("--text-heads and --gelu are for language-image weights, "
                            f"{path} looks like {name}: leave them out")  # fmt: skip
        else:
            model, size, fitting = encoder_of(state, name, known)
        if not random_weights:
            load_strictly(model, fitting)
    except MISFITS as error:
        raise UserError(
            f"{path} looks like {name}, but does not fit: {reason_of(error)}"
        ) from error
    view = module.eval_view(types.SimpleNamespace(image_size=size))
    view = view_of(known.beside.get("view", {}), view)
    known.notes.append(f"{view.size} px")
    mode = known.beside.get("view", {}).get("resize_mode", "shortest")
    if mode != "shortest":
        known.notes.append(f"cropped, where they were trained on images resized by {mode!r}")
    if not random_weights:
        report(path, name, known)
    encoder = module.image_encoder(model) if name in LANGUAGE_IMAGE else model
    return types.SimpleNamespace(method=name, arch=type(model).__name__, step=None, model=model,
                                 encoder=encoder, view=view, tokenizer=None, args=None,
                                 head_layer=0)  # fmt: skip


def view_of(said, view):
    """The evaluation view of a method, changed as files beside the weights say."""
    size = said.get("size", view.size)
    resize = said.get("resize", view.resize if size == view.size else size)
    own = view.filter.name.lower()
    interpolation = said.get("interpolation", own)
    if interpolation not in ("bilinear", "bicubic"):  # open_clip's "random" is for training
        interpolation = own
    mean, std = (tuple(said.get(key, getattr(view, key))) for key in ("mean", "std"))
    return type(view)(size, resize, interpolation, mean, std)  # ALIGN's squashes


def published_tokenizer(path, net, asked, data_dir):
    """The tokenizer that --tokenizer asks for, the tokenizer.json beside the weights, or the
    published one of a family, with the context length of the text encoder. Raises UserError for one
    with more tokens than the network, or whose end token is not where CLIP pools."""
    words, places = "token_embedding.weight", "positional_embedding"  # CLIP's and SLIP's names
    if net.method == "DeCLIP":
        words, places = f"encode_text.{words}", f"encode_text.{places}"
    elif "ALIGN" in net.method:
        words, places = "text.word_embeddings.weight", "text.position_embeddings.weight"
    state, own = net.model.state_dict(), path.parent / "tokenizer.json"
    tokens, length = len(state[words]), len(state[places])
    said = beside(path, net.method).get("context_length")  # by an export of a run of ours
    if net.method == "Hugging Face's ALIGN" and length == 512 != said:
        length = 64  # align-base was trained with 64, the other positions were not
    published = LANGUAGE_IMAGE[net.method][1]
    spec = asked or (str(own) if own.is_file() else published)
    tokenizer = Tokenizer(spec, length, data_dir=data_dir)
    if net.method == "DeCLIP":  # its mask token stands before start and end: their ids are one up
        tokenizer = importlib.import_module("declip").add_mask_token(tokenizer)
    if tokenizer.vocab_size > tokens:
        raise UserError(
            f"{path} knows {tokens} tokens, but tokenizer {spec} has "
            f"{tokenizer.vocab_size}: give {net.method}'s own with --tokenizer"
        )
    if published == "clip" and tokenizer.eot != tokenizer.vocab_size - 1:
        raise UserError(f"--tokenizer {spec} has an end token that is not its largest id, "
                        f"where {net.method} pools")  # fmt: skip
    return tokenizer
