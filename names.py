"""Names of tensors: from other projects' to those used here, and back for exports.

Images pass through transformers whose names are timm's, through ResNets whose names are
torchvision's, and through CLIP, whose names are OpenAI's."""

import math
import re

import torch


def renamed(state, patterns):
    """A state dict whose names are changed by each of (pattern, replacement) in turn. A name that
    becomes empty is left out."""
    out = {}
    for key, value in state.items():
        for pattern, replacement in patterns:
            key = re.sub(pattern, replacement, key)
        if key:
            out[key] = value
    return out


def joined(state, parts, whole):
    """A state dict in which the tensors named by `parts` are one, such as q, k and v."""
    out = {}
    for key, value in state.items():
        if parts[0] in key:
            value = torch.cat([state[key.replace(parts[0], part)] for part in parts])
            out[key.replace(parts[0], whole)] = value
        elif not any(part in key for part in parts[1:]):
            out[key] = value
    return out


def split(state, whole, parts):
    """A state dict in which the tensor named by `whole` is several again."""
    out = {}
    for key, value in state.items():
        if whole in key:
            pieces = value.chunk(len(parts))
            out |= {key.replace(whole, part): piece for part, piece in zip(parts, pieces)}
        else:
            out[key] = value
    return out


# -------------------------------------------- ViT: torchvision ------------------------------------
def vit_from_torchvision(state):
    return renamed(state, [
        (r"^class_token", "cls_token"), (r"^encoder\.pos_embedding", "pos_embed"),
        (r"^encoder\.ln\.", "norm."), (r"^conv_proj\.", "patch_embed.proj."),
        (r"^encoder\.layers\.encoder_layer_(\d+)", r"blocks.\1"),
        (r"self_attention\.in_proj_", "attn.qkv."), (r"self_attention\.out_proj", "attn.proj"),
        (r"\.ln_([12])", r".norm\1"), (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
        (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    ])  # fmt: skip


def vit_to_torchvision(state):
    return renamed(state, [
        (r"^cls_token", "class_token"), (r"^pos_embed", "encoder.pos_embedding"),
        (r"^norm\.", "encoder.ln."), (r"^patch_embed\.proj\.", "conv_proj."),
        (r"^blocks\.(\d+)", r"encoder.layers.encoder_layer_\1"),
        (r"attn\.qkv\.", "self_attention.in_proj_"), (r"attn\.proj", "self_attention.out_proj"),
        (r"\.norm([12])", r".ln_\1"), (r"\.mlp\.fc1\.", ".mlp.0."), (r"\.mlp\.fc2\.", ".mlp.3."),
    ])  # fmt: skip


# -------------------------------------------- ViT, DINOv2: transformers ---------------------------
def vit_from_transformers(state):
    """ViTModel's and Dinov2Model's names, with and without a task's head: those on the hub, which
    transformers 4 has in memory, and those of transformers 5."""
    mark = "embeddings.patch_embeddings.projection.weight"
    prefix = next((key for key in state if key.endswith(mark)), mark).removesuffix(mark)
    inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    out = renamed(inside, [
        (r"^(pooler|classifier|decoder)\..*", ""),
        (r"^embeddings\.position_embeddings", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.", ""),
        (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."), (r"^layernorm\.", "norm."),
        (r"\.attention\.(attention\.)?q(uery|_proj)\.", ".attn.q."),
        (r"\.attention\.(attention\.)?k(ey|_proj)\.", ".attn.k."),
        (r"\.attention\.(attention\.)?v(alue|_proj)\.", ".attn.v."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."),
        (r"\.layer_scale([12])\.lambda1", r".ls\1.gamma"),
        (r"\.intermediate\.dense\.", ".mlp.fc1."), (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.mlp\.weights_in\.", ".mlp.w12."), (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.w3."),
    ])  # fmt: skip
    out = joined(out, (".attn.q.", ".attn.k.", ".attn.v."), ".attn.qkv.")
    return joined(out, (".mlp.gate_proj.", ".mlp.up_proj."), ".mlp.w12.")


def vit_to_transformers(state):
    """-> the names on the hub, of ViTModel, or of Dinov2Model where there is LayerScale."""
    own = [(r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."),
           (r"\.mlp\.fc1\.", ".intermediate.dense."),
           (r"\.mlp\.fc2\.", ".output.dense.")]  # fmt: skip
    if "blocks.0.ls1.gamma" in state:
        own = [(r"\.ls([12])\.gamma", r".layer_scale\1.lambda1"),
               (r"\.mlp\.w12\.", ".mlp.weights_in."),
               (r"\.mlp\.w3\.", ".mlp.weights_out.")]  # fmt: skip
    out = renamed(state, [
        (r"^(cls_token|mask_token|register_tokens)", r"embeddings.\1"), (r"^norm\.", "layernorm."),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."), *own,
        (r"\.attn\.proj\.", ".attention.output.dense."), (r"^blocks\.", "encoder.layer."),
    ])  # fmt: skip
    parts = [f".attention.attention.{name}." for name in ("query", "key", "value")]
    return split(out, ".attn.qkv.", parts)


# -------------------------------------------- DINOv2: timm ----------------------------------------
def dinov2_from_timm(state):
    """The official names, also where they are timm's: there the position of the class token may be
    a part of the token, SwiGLU's layers are called fc1 and fc2, and there is no mask token, which
    is never used without masks."""
    state = {"register_tokens" if k.endswith("reg_token") else k: v for k, v in state.items()}
    wide, narrow = (state.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if wide is not None and narrow is not None and len(wide) == 2 * narrow.shape[1]:
        state = renamed(state, [(r"\.mlp\.fc1\.", ".mlp.w12."), (r"\.mlp\.fc2\.", ".mlp.w3.")])
    positions = state.get("pos_embed")
    if positions is not None and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    if positions is not None:
        state.setdefault("mask_token", torch.zeros_like(positions[:, 0]))
    return state


def dinov2_to_timm(state):
    """In timm only the patches have positions; that of the class token is added to the token."""
    state = {k: v for k, v in state.items() if k != "mask_token"}
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    return renamed(state, [
        (r"^register_tokens$", "reg_token"), (r"\.mlp\.w12\.", ".mlp.fc1."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    ])  # fmt: skip


# -------------------------------------------- CLIP ------------------------------------------------
CLIP_NAMES = {  # OpenAI's: those of transformers' CLIPModel
    "transformer.resblocks": "encoder.layers", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
    "c_fc": "fc1", "c_proj": "fc2", "attn.": "self_attn.", "ln_final": "final_layer_norm",
    "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm", "conv1": "embeddings.patch_embedding",
    "token_embedding": "embeddings.token_embedding",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
}  # fmt: skip


def vit_to_clip(state):
    """timm's names -> those of CLIP's image encoder, whose patch embedding has no bias: it becomes
    a part of the positions, to which it is added. CLIP's norm before the blocks is not there."""
    state = dict(state)
    bias = state.pop("patch_embed.proj.bias", 0)
    positions = state.pop("pos_embed")[0]
    state["positional_embedding"] = torch.cat([positions[:1], positions[1:] + bias])
    state["cls_token"] = state["cls_token"].flatten()
    return renamed(state, [
        (r"^cls_token$", "class_embedding"), (r"^patch_embed\.proj\.", "conv1."),
        (r"^blocks\.", "transformer.resblocks."), (r"\.norm([12])\.", r".ln_\1."),
        (r"\.attn\.qkv\.", ".attn.in_proj_"), (r"\.attn\.proj\.", ".attn.out_proj."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."), (r"\.mlp\.fc2\.", ".mlp.c_proj."),
        (r"^norm\.", "ln_post."),
    ])  # fmt: skip


def clip_to_transformers(state):
    out = {"logit_scale": state["logit_scale"], "visual_projection.weight": state["visual.proj"].T,
           "text_projection.weight": state["text_projection"].T}  # fmt: skip
    for key, value in state.items():
        if key in ("logit_scale", "visual.proj", "text_projection"):
            continue
        tower = "vision_model." if key.startswith("visual.") else "text_model."
        key = key.removeprefix("visual.")
        for ours, theirs in CLIP_NAMES.items():
            key = key.replace(ours, theirs)
        out[tower + key.replace("in_proj_", "in_proj.")] = value
    return split(out, ".in_proj.", [".q_proj.", ".k_proj.", ".v_proj."])


def clip_from_transformers(state):
    state = {k: v for k, v in state.items() if not k.endswith("position_ids")}
    state = joined(state, (".q_proj.", ".k_proj.", ".v_proj."), ".in_proj.")
    out = {}
    for key, value in state.items():
        if key in ("visual_projection.weight", "text_projection.weight"):
            value = value.T
            key = "visual.proj" if key.startswith("visual") else "text_projection"
        elif key.startswith(("vision_model.", "text_model.")):
            tower = "visual." if key.startswith("vision") else ""
            key = key.partition(".")[2]
            for ours, theirs in CLIP_NAMES.items():
                key = key.replace(theirs, ours)
            key = tower + key.replace("in_proj.", "in_proj_")
        out[key] = value
    return out


def clip_from_open_clip(state):
    """open_clip can keep the text encoder in a module of its own."""
    return {key.removeprefix("text."): value for key, value in state.items()}


# -------------------------------------------- ALIGN -----------------------------------------------
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
    if model.visual.dim != len(model.text_projection.weight):
        raise ValueError("AlignModel has no image projection: embed_dim must be visual.dim")
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
