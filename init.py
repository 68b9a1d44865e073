"""--init PATH: training starts from weights that exist, at step 0 and with a fresh optimizer
(docs/init.md). --freeze keeps those of one side of a language-image model as they are. run.py
imports this file for these flags alone.

Weights of the same method are taken whole. From other weights come the encoders: that of images,
wherever the model has one (student and teacher, query and key encoder), and that of texts where
both have one for the same tokens; heads and projections stay random. Position embeddings are
resized, and conversions that do not change what an encoder computes are made. What else does not
fit is refused; what was loaded, what stayed random and what was left out is printed."""

import inspect
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import UserError, rank
from names import align_state, vit_to_clip
from recognise import FAMILIES, HEADS, MISFITS, beside, family, file_of, other, read, reason_of
from recognise import first_three, run_of, state_of, tensors_in, unwrapped, wrong_numbers
from run import directory_of

# A tensor that only this kind of image encoder has, and how to call it
KINDS = {
    "attnpool.k_proj.weight": "a ResNet of CLIP's kind",
    "class_embedding": "a ViT of CLIP's kind",
    "blocks.0.norm1.weight": "a ViT with timm's names",
    "features.0.0.weight": "an EfficientNet",
    "layer1.0.conv1.weight": "a ResNet with torchvision's names",
}
CLIP_RESNET, CLIP_VIT, VIT, _, RESNET = KINDS.values()

# Of several image encoders in a checkpoint, the one that is evaluated
EVALUATED = ("teacher.backbone.", "online.backbone.", "encoder_q.", "base_encoder.")
# What stands beside the layers of an image encoder: heads and projections, tokens of a method
HEADS_BESIDE = ("fc.", "head.", "heads.", "proj", "attnpool.c_proj.", "pre_logits.", "decoder_",
                "projection_head.", "prototypes.")  # fmt: skip
MASK_TOKENS = ("mask_token", "masked_embed")
TOKENS = (*MASK_TOKENS, "register_tokens")
# What belongs to a run and not to a network: MoCo's queue holds keys of other images
STATE = ("queue", "queue_ptr")

# Into the joint space of images and texts
PROJECTIONS = ("visual.proj", "visual.attnpool.c_proj.", "image_projection", "text_projection",
               "encode_text.text_projection")  # fmt: skip

TEXT_MARKS = ("token_embedding.weight", "word_embeddings.weight")  # of CLIP's kind, of BERT's
TEXT_PARTS = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.")  # CLIP's

# Families whose weights are the whole model of these methods, heads included
WHOLE = {
    "SLIP": {"slip"}, "SLIP's CLIP": {"slip"}, "SLIP's SimCLR": {"slip"}, "DeCLIP": {"declip"},
    "Hugging Face's ALIGN": {"align"}, "ALIGN": {"align"}, "transformers' CLIP": {"clip"},
    "open_clip's CLIP": {"clip"}, "CLIP": {"clip"}, "MoCo v3": {"mocov3"}, "MoCo": {"moco"},
    "SimSiam": {"simsiam"}, "SimCLR": {"simclr", "simclrv2"}, "DINO or iBOT": {"dino", "ibot"},
    "DINOv2's teacher": {"dinov2"},
}  # fmt: skip


# -------------------------------------------- the source ------------------------------------------
@dataclass
class Source:
    """Weights to start from: their file, what they are, the methods whose whole model they are, the
    tensors, the tokenizer of a run, what a file beside the weights says of attention heads and the
    activation of CLIP's transformers, and what a run says of the stem of its ResNet. `notes`
    collects what was converted and assumed."""

    path: str
    kind: str
    methods: set
    state: dict
    tokenizer: str = ""
    heads: int = 0
    gelu: str = ""  # quick or exact where something says so
    stride: int = 0  # of the stem for small images where something says so: 1 (cifar) or 2 (small)
    notes: list = field(default_factory=list)

    def refuse(self, why):
        raise UserError(f"--init {self.path} ({self.kind}) does not fit: {why}")


def open_source(path, model):
    """A run directory, a checkpoint or another project's weights -> Source. Raises UserError."""
    file = file_of(Path(path).expanduser())
    saved = read(file)
    run = run_of(file, saved)
    if run and run.get("whole", True):  # of an export of the encoder the tensors alone are taken
        method, args = run["method"], run["args"]
        methods = {"simclr", "simclrv2"} if method == "simclr" else {method}  # which keeps its head
        source = Source(path, f"a run of {method}.py", methods, run["model"])
        source.tokenizer = run.get("tokenizer", "")
        if method in ("clip", "slip", "slip_ablations", "declip"):
            source.gelu = args.get("gelu", "quick")
        stem = args.get("stem")
        cifar = stem == "auto" and args.get("image_size") in range(33)  # as chosen_stem() has it
        source.stride = 2 if stem == "small" else int(cifar or stem == "cifar")
        return source
    if isinstance(saved.get("student"), dict) and isinstance(saved.get("teacher"), dict):
        return both_networks(path, saved)
    state = state_of(saved)
    if other(state):
        raise UserError(f"{path} looks like {other(state)}, which no method file here computes")
    name = family(state)
    if name is None:
        first = first_three(state) if state else "no tensors"
        raise UserError(f"{path} looks like nothing known here: it holds {first}")
    source = Source(path, f"weights of {name}", WHOLE.get(name, set()), state)
    try:
        if FAMILIES[name].rename:
            state = FAMILIES[name].rename(state)
        if name == "Hugging Face's ALIGN" and hasattr(model, "text"):
            state = whole_align(path, state, model)
    except MISFITS as error:
        source.refuse(reason_of(error))
    source.state, files = official(state), beside(file, name)
    source.heads, source.gelu = files.get("heads") or 0, files.get("gelu") or ""
    source.stride = files.get("stride") or 0
    return source


def whole_align(path, state, model):
    """A state dict of Hugging Face's AlignModel with our names. Refuses other numbers of layers."""
    named = align_state(model)
    spared = ("pooler", "position_ids", "num_batches_tracked")
    differ = [k for k in state.keys() ^ named.keys() if not any(word in k for word in spared)]
    if differ:
        reason = f"it and this --arch and --text-layers differ in {first_three(sorted(differ))}"
        raise UserError(f"--init {path} (Hugging Face's ALIGN) does not fit: {reason}")
    return align_state(model, state)


def official(state):
    """The official codes keep the rows of the prototypes under names of an older torch."""
    old = {"weight_g": "parametrizations.weight.original0"}
    old["weight_v"] = "parametrizations.weight.original1"
    out = {}
    for key, value in state.items():
        start, _, last = key.rpartition(".")
        out[f"{start}.{old[last]}" if last in old else key] = value
    return out


def both_networks(path, saved):
    """A full checkpoint of the official DINO or iBOT -> Source with student, teacher, centers."""
    state = {}
    for network in ("student", "teacher"):
        for key, value in official(unwrapped(tensors_in(path, saved, network))).items():
            state[f"{network}.{key}"] = value
    for loss in ("dino_loss", "ibot_loss"):
        state |= tensors_in(path, saved, loss) if saved.get(loss) else {}
    return Source(path, "a full checkpoint of DINO or iBOT", {"dino", "ibot"}, state)


# -------------------------------------------- image encoders --------------------------------------
def inside(state, prefix):
    """The part of a state dict whose names begin like this, without that beginning."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def image_encoders(state):
    """-> the kind of the image encoders in a state dict, a value of KINDS, and their prefixes."""
    for mark, kind in KINDS.items():
        prefixes = [k.removesuffix(mark) for k in state if k == mark or k.endswith(f".{mark}")]
        if prefixes:
            return kind, prefixes
    return "", []


def resized(positions, tokens):
    """Position embeddings (..., 1 + side * side, D), that of the class token first, for another
    number of tokens: the grid is resized bicubically. Raises ValueError if it is no square."""
    flat = positions.reshape(-1, positions.shape[-1]).float()
    side, new = math.isqrt(len(flat) - 1), math.isqrt(tokens - 1)
    if side**2 != len(flat) - 1 or new**2 != tokens - 1:
        raise ValueError("its position embeddings are no square grid")
    grid = flat[1:].T.reshape(1, -1, side, side)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic")
    flat = torch.cat([flat[:1], grid.flatten(2)[0].T])
    return flat.reshape(*positions.shape[:-2], tokens, -1)


def with_layer_scale(theirs, own, notes):
    """DINOv2 multiplies the output of each branch by gamma, other ViTs do not. Where only the
    source has it, gamma becomes a part of the last layer of its branch; where only the model has
    it, gamma is 1. Neither changes what the encoder computes."""
    theirs = dict(theirs)
    for name in [name for name in theirs if name.endswith(".gamma") and name not in own]:
        block, _, which = name.removesuffix(".gamma").rpartition(".")
        last = f"{block}.attn.proj" if which == "ls1" else f"{block}.mlp.fc2"
        if f"{last}.weight" not in theirs:  # SwiGLU, which is refused by its names
            continue
        gamma = theirs.pop(name)
        theirs[f"{last}.weight"] = theirs[f"{last}.weight"] * gamma[:, None]
        theirs[f"{last}.bias"] = theirs[f"{last}.bias"] * gamma
        notes.append("LayerScale became a part of the layers before it")
    for name in own:
        if name.endswith(".gamma") and name not in theirs:
            theirs[name] = torch.ones_like(own[name])
            notes.append("LayerScale is 1")
    return theirs


def heads_of(source, theirs, kind):
    """-> attention heads of the ViT of a source. Tensors do not tell them: they are those of a file
    beside the weights, or of the method, or the usual ones of the width."""
    if kind == CLIP_VIT:
        return source.heads or len(theirs["class_embedding"]) // 64
    table = HEADS | {96: 3, 128: 4}  # as in our smallest ones
    width = theirs["cls_token"].shape[-1]
    positions = theirs.get("pos_embed", torch.ones(1, 1, width))
    sines = not positions[:, 0].any() and "blocks.0.ls1.gamma" not in theirs  # as MoCo v3 has them
    if source.methods & {"slip", "slip_ablations", "mocov3"} or sines:
        table = table | {384: 12}
    return source.heads or table.get(width)


def own_heads(encoder):
    """-> attention heads of a ViT here."""
    for module in encoder.modules():
        if hasattr(module, "num_heads") or hasattr(module, "heads"):
            return getattr(module, "num_heads", 0) or module.heads
    return 0


def fit_image(source, theirs, own, kinds, whole):
    """The tensors of an image encoder for that of the model, both without prefix -> {name: tensor}
    for the model, names that were used. whole: with the heads beside it. Refuses what does not
    fit."""
    kind, here = kinds
    if not whole:
        theirs = {k: v for k, v in theirs.items() if not k.startswith(HEADS_BESIDE)}
    if kind == RESNET and here == CLIP_RESNET:  # whose stem and pooling are others
        theirs = {k: v for k, v in theirs.items() if k.startswith("layer")}
        own = {k: v for k, v in own.items() if k.startswith("layer")}
    used = set(theirs)
    try:
        if kind == VIT and here == CLIP_VIT:
            theirs = vit_to_clip(with_layer_scale(theirs, {}, source.notes))
            own = {k: v for k, v in own.items() if not k.startswith("ln_pre.")}
        elif kind == here == VIT:
            theirs = with_layer_scale(theirs, own, source.notes)
    except MISFITS as error:
        source.refuse(reason_of(error))
    if kind != here and (kind, here) not in ((RESNET, CLIP_RESNET), (VIT, CLIP_VIT)):
        source.refuse(f"it holds {kind or 'no image encoder'}, and here is {here}")
    spared = [k for k in theirs if k not in own and k.startswith(HEADS_BESIDE + MASK_TOKENS)]
    missing = [k for k in own if k not in theirs and not k.startswith(HEADS_BESIDE + TOKENS)]
    unknown = [k for k in theirs if k not in own and k not in spared]
    if missing or unknown:
        lacks = [f"it lacks {first_three(missing)}"] if missing else []
        holds = [f"it also holds {first_three(unknown)}"] if unknown else []
        source.refuse("; ".join(lacks + holds))
    out = {name: theirs[name] for name in own if name in theirs}
    for name in out:
        if name.endswith(("pos_embed", "positional_embedding")):
            out[name] = positions_of(source, name, out[name], own[name])
    return out, used - set(spared)


def positions_of(source, name, theirs, own):
    """Position embeddings with as many places as the model has."""
    if theirs.ndim != own.ndim or theirs.shape[-1] != own.shape[-1]:
        return theirs  # nothing helps
    if theirs.shape[-2] == own.shape[-2]:
        return theirs
    try:
        theirs, before = resized(theirs, own.shape[-2]), theirs.shape[-2]
    except ValueError as error:
        source.refuse(f"{name}: {error}")
    places = f"from {before - 1} to {own.shape[-2] - 1} places"
    source.notes.append(f"{name} resized {places}, bicubic")
    return theirs


# -------------------------------------------- text encoders ---------------------------------------
def text_encoder(state):
    """-> the mark of a text encoder, its prefix, its tensors without prefix and projection."""
    for mark in TEXT_MARKS:
        prefix = next((k.removesuffix(mark) for k in state if k.endswith(mark)), None)
        if prefix is not None:
            part = inside(state, prefix)
            if mark == TEXT_MARKS[0]:
                part = {k: v for k, v in part.items() if k.startswith(TEXT_PARTS)}
            return mark, prefix, part
    return "", "", {}


def fit_text(source, theirs, own):
    """The tensors of a text encoder for that of the model. A shorter context is cut off the end."""
    missing = [k for k in own if k not in theirs]
    unknown = [k for k in theirs if k not in own]
    if missing or unknown:
        differ = first_three(missing + unknown)
        source.refuse(f"the text encoders differ in {differ}: see --text-layers")
    out = {name: theirs[name] for name in own}
    for name in ("positional_embedding", "position_embeddings.weight"):
        longer = name in own and theirs[name].ndim == 2 and len(own[name]) < len(theirs[name])
        if longer:
            out[name] = theirs[name][: len(own[name])]
            note = f"context cut from {len(theirs[name])} to {len(own[name])} tokens"
            source.notes.append(note)
    return out


def check_stem(source, resnet):
    """A stem for small images has the same tensors with either stride, but computes features of
    another size: notes that."""
    stride = resnet.conv1.stride[0]
    if stride != source.stride:
        stem = "small" if source.stride == 2 else "cifar"
        same = f"--stem {stem} computes what it computed"
        source.notes.append(f"its stem has stride {source.stride}, and here {stride}: {same}")


def check_gelu(source, args):
    """CLIP's transformers have either of two activations, which no tensor tells."""
    gelu = getattr(args, "gelu", "quick")
    if source.gelu and source.gelu != gelu:
        source.refuse(f"it has {source.gelu} GELU, and here is {gelu} GELU (clip.py: --gelu)")
    if not source.gelu:
        source.notes.append(f"{gelu} GELU assumed")


def check_tokens(source, args, tokenizer):
    """Each row of a token table means one token: refuses another tokenizer than that of before."""
    own = file_of(Path(source.path).expanduser()).parent / "tokenizer.json"
    if source.tokenizer:
        try:
            before = json.loads(source.tokenizer)["model"]
        except MISFITS:
            source.refuse("its tokenizer is damaged")
        if before != json.loads(tokenizer.to_json())["model"]:
            source.refuse(f"its tokens are others, give --tokenizer {own}")
    elif args.tokenizer == "train":
        published = "google-bert/bert-base-uncased" if "ALIGN" in source.kind else "clip"
        theirs = f"--tokenizer {own}" if own.is_file() else f"that of these weights ({published})"
        source.refuse(f"--tokenizer train makes other tokens, give {theirs}")


# -------------------------------------------- the model -------------------------------------------
def method_of(model):
    """The name of the file that defines a model, which may be the script itself."""
    return Path(inspect.getfile(type(model))).stem


def fit(source, model, args, tokenizer):
    """-> {name in the model: tensor}, names of the source that were used."""
    own = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    state = {k: v for k, v in source.state.items() if not k.endswith("num_batches_tracked")}
    source.state = state
    whole = method_of(model) in source.methods
    if whole and "student.backbone.pos_embed" in own and "backbone.pos_embed" in state:
        both = {f"{network}.{k}": v for network in ("student", "teacher") for k, v in state.items()}
        source.state = state = both  # released was the teacher alone
    kind, found = image_encoders(state)
    here, places = image_encoders(own)
    evaluated = next((prefix for prefix in EVALUATED if prefix in found), (found or [""])[0])
    fitted, used, ours = {}, set(), set()
    for place in places:
        start = place if whole and place in found else evaluated
        theirs, mine = inside(state, start), inside(own, place)
        part, names = fit_image(source, theirs, mine, (kind, here), whole)
        if kind == here == RESNET and source.stride:
            check_stem(source, model.get_submodule(place[:-1]))
        fits = all(tensor.shape == mine[name].shape for name, tensor in part.items())
        if fits and kind in (VIT, CLIP_VIT):  # other shapes are refused below
            heads = heads_of(source, theirs, kind)
            needed = own_heads(model.get_submodule(place[:-1]))
            if heads is None:
                source.notes.append(f"{needed} attention heads assumed")
            elif heads != needed:
                source.refuse(f"it has {heads} attention heads, and here are {needed}")
        fitted |= {place + name: tensor for name, tensor in part.items()}
        used |= {start + name for name in names}
        ours |= {place + name for name in mine}
    mark, start, theirs = text_encoder(state)
    my_mark, place, mine = text_encoder(own)
    both = mark and mark == my_mark
    if both and ("encode_text." in start) != ("encode_text." in place):
        source.notes.append("text encoder left out, as DeCLIP's tokens are shifted by its mask")
        if kind == here == CLIP_VIT:
            check_gelu(source, args)
    elif both:
        check_tokens(source, args, tokenizer)
        if mark == TEXT_MARKS[0]:
            check_gelu(source, args)
        part = fit_text(source, theirs, mine)
        fitted |= {place + name: tensor for name, tensor in part.items()}
        used |= {start + name for name in part}
        ours |= {place + name for name in mine}
    if whole:  # heads, projections, temperatures, centers
        for name in own:
            if name in state and name not in ours and name not in STATE:
                fitted[name] = state[name]
                used.add(name)
    for name, tensor in fitted.items():
        if tensor.shape != own[name].shape:
            if tensor.numel() == own[name].numel() == 1:
                fitted[name] = tensor.reshape(own[name].shape)
                continue
            theirs, mine = tuple(tensor.shape), tuple(own[name].shape)
            source.refuse(f"{name} has the shape {theirs}, and here {mine}")
    if wrong := wrong_numbers(fitted, own):
        source.refuse(wrong)
    return fitted, used


def load(model, args, tokenizer):
    """Copies the weights of --init into a model, in place. -> names of its tensors that stay
    random. Raises UserError."""
    source = open_source(args.init, model)
    fitted, used = fit(source, model, args, tokenizer)
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in fitted.items():
            own[name].copy_(tensor)
    for name, tensor in fitted.items():  # two names of one tensor, such as a shared head
        if not torch.equal(own[name], tensor.to(own[name])):
            source.refuse(f"{name} is shared here, and not in these weights")
    counted = [name for name in own if not name.endswith("num_batches_tracked")]
    stay = [name for name in counted if name not in fitted]
    left = [name for name in source.state if name not in used]
    if rank() == 0:
        print(f"--init {args.init}: {'; '.join([source.kind, *dict.fromkeys(source.notes)])}")
        for what, names in (("loaded", fitted), ("stay random", stay), ("left out", left)):
            listed = f": {first_three(names)}" if names else ""
            print(f"  {what} {len(names)}{listed}", flush=True)
    return stay


# -------------------------------------------- freezing --------------------------------------------
def is_frozen(name, side):
    """Whether a tensor belongs to the encoder of this side. Its projection into the joint space
    does not: it learns."""
    if name.startswith(PROJECTIONS):
        return False
    if side == "image":
        return name.startswith("visual.")
    return name.startswith((*TEXT_PARTS, "encode_text.", "text."))


def freeze(model, side):
    """Parameters of an encoder take no gradient, and its modules stay in eval mode."""
    for name, p in model.named_parameters():
        if is_frozen(name, side):
            p.requires_grad_(False)
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def start(model: nn.Module, args, tokenizer=None):
    """Carries out --init and --freeze. A run that continues has its weights in its checkpoint, so
    that those of --init are not read again. Raises UserError."""
    side = getattr(args, "freeze", "")
    if not args.init:
        raise UserError(f"--freeze {side} keeps weights as they are: give some with --init")
    if not (directory_of(method_of(model), args) / "checkpoint.pt").exists():
        stay = load(model, args, tokenizer)
        random = [name for name in stay if side and is_frozen(name, side)]
        if random:
            raise UserError(f"--freeze {side} would keep random weights: {first_three(random)}")
    if side:
        freeze(model, side)
