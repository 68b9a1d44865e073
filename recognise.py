"""Whose weights are these? Reads a file of weights, takes the tensors out of what was saved,
without wrappers and prefixes, and recognises the project that they come from by their names. What
the names and sizes do not tell, such as the number of attention heads, is looked up or asked for.

Only tensors, numbers and argparse's Namespace are ever unpickled, so that a file cannot run code.
init.py starts training from what is read here, evaluation/ measures it."""

import argparse
import importlib
import json
import re
import warnings
import zipfile
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import torch

import names
from common import UserError
from pictures import latest_kept
from run import load_checkpoint

# What a folder may hold, ours first and then as transformers and open_clip call their files
FILES = ("checkpoint.pt", "model.safetensors", "model.pt", "open_clip_model.safetensors",
         "open_clip_pytorch_model.bin", "pytorch_model.bin")  # fmt: skip


# -------------------------------------------- files -----------------------------------------------
class Ignored:
    """Stands for an object beside the weights that is of no use here."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# Objects that other projects save beside their weights, such as the best accuracy as numpy's number
# or the output folder as a Path. They become Ignored; argparse's Namespace is read as it is.
HARMLESS = ["numpy.dtype", "numpy.ndarray", "pathlib.PosixPath", "pathlib.WindowsPath",
            "pathlib._local.PosixPath", "pathlib._local.WindowsPath"]  # fmt: skip
HARMLESS += [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core")
             for name in ("scalar", "_reconstruct")]  # fmt: skip


def stand_in(name):
    """A class that the unpickler takes for the one with this name."""
    module, _, own = name.rpartition(".")
    return type(own, (Ignored,), {"__module__": module})


def file_of(path):
    """The file of weights in a run directory or in a folder that another project wrote."""
    path = Path(path)
    if not path.is_dir():
        return path
    return next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])


def read(path):
    """-> the dict in a file, which may be written by torch.save, be a safetensors file or one of
    OpenAI's TorchScript archives. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint at {path}")
    if str(path).endswith(".safetensors"):
        load_file = importlib.import_module("safetensors.torch").load_file
        try:
            return load_file(path)
        except Exception as error:  # safetensors raises a class of its own for a damaged file
            raise UserError(f"{path} is no safetensors file or is damaged ({error})") from error
    try:
        inside = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        if any(name.endswith("/constants.pkl") for name in inside):
            reader = torch._C.PyTorchFileReader(str(path))  # sees the members that torch.jit sees
            sources = [name for name in reader.get_all_records() if name.lower().endswith(".py")]
            if any(b"__setstate__" in reader.get_record(name) for name in sources):
                what = "a TorchScript archive with a __setstate__, code that runs when it is read"
                raise UserError(f"{path} is {what}: save the weights alone, as a state dict")
            # torch.jit is deprecated, but nothing else reads these archives
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                return torch.jit.load(path, map_location="cpu").state_dict()
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *map(stand_in, HARMLESS)]):
            saved = load_checkpoint(path)
    except UserError as error:
        own = Path(path).name == "checkpoint.pt"  # of a run, which may have kept earlier ones
        kept = latest_kept(Path(path).parent) if own else None
        advice = f"give {kept} instead" if kept else "give an undamaged copy, or a state dict alone"
        raise UserError(f"{error}: {advice}") from error
    if not isinstance(saved, dict):
        raise UserError(f"{path} holds a {type(saved).__name__}, not a checkpoint")
    return saved


def first_three(words):
    """At most three of these words, and how many more there are."""
    words = list(words)
    rest = f" and {len(words) - 3} more" if len(words) > 3 else ""
    return ", ".join(words[:3]) + rest


# What a file raises whose tensors or arguments are not those of a network
MISFITS = LookupError, AttributeError, TypeError, ValueError, RuntimeError


def reason_of(error):
    """Why weights do not fit, in a few words: of one of MISFITS."""
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]}"
    if isinstance(error, IndexError | TypeError | RuntimeError):
        return "its tensors have shapes that do not fit each other"
    return str(error).splitlines()[-1].strip()


def wrong_numbers(state, like):
    """Why tensors cannot take the place of those of the same names in `like`, empty if they can."""
    for name, tensor in state.items():
        if like[name].is_floating_point() and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            return f"{name} holds numbers of type {kind}, and not floating-point numbers"
        if like[name].is_floating_point() and not tensor.float().isfinite().all():
            return f"{name} holds NaN or infinity"
    return ""


# -------------------------------------------- families --------------------------------------------
# marks: patterns, each of which has to begin the name of some tensor; prefix: that of the evaluated
# encoder's tensors; method: the file whose preprocessing is taken; rename: to the names used here.
Family = namedtuple("Family", "marks prefix method rename", defaults=[None])

# The first family whose marks occur is taken.
FAMILIES = {
    "SLIP": Family(["visual.cls_token", "token_embedding", "image_mlp"], "visual.", "slip"),
    "SLIP's CLIP": Family(["visual.cls_token", "token_embedding"], "visual.", "slip"),
    "SLIP's SimCLR": Family(["visual.cls_token"], "visual.", "slip"),
    "DeCLIP": Family(["encode_text.text_projection."], "visual.", "declip"),
    "Hugging Face's ALIGN": Family(["vision_model.embeddings.convolution."], "", "align"),
    "ALIGN": Family(["visual.features.0.", "text.word_embeddings."], "visual.", "align"),
    "transformers' CLIP": Family(["vision_model.pre_layrnorm."], "", "clip",
                                 names.clip_from_transformers),
    "open_clip's CLIP": Family(["visual.conv1", "text.token_embedding"], "", "clip",
                               names.clip_from_open_clip),
    "CLIP": Family(["visual."], "visual.", "clip"),
    "MoCo v3": Family(["momentum_encoder.", "base_encoder."], "base_encoder.", "mocov3"),
    "MoCo": Family(["encoder_q."], "encoder_q.", "moco"),
    "SimSiam": Family(["predictor.", "encoder."], "encoder.", "simsiam"),
    "SimCLR": Family(["head.linears."], "backbone.", "simclr"),
    "DINOv2's teacher": Family(["backbone.blocks.0.ls1."], "backbone.", "dinov2",
                               names.dinov2_from_timm),
    "DINO or iBOT": Family(["head.last_layer."], "backbone.", "dino"),
    "DINOv2": Family(["blocks.0.ls1."], "", "dinov2", names.dinov2_from_timm),
    "transformers' DINOv2": Family([r"(.*\.)?encoder.layer.0.layer_scale1."], "", "dinov2",
                                   names.vit_from_transformers),
    "transformers' ViT": Family([r"(.*\.)?embeddings.patch_embeddings.projection."], "", "dino",
                                names.vit_from_transformers),
    "MAE": Family(["decoder_embed.", "patch_embed.proj."], "", "dino"),
    "SwAV": Family(["projection_head.", "layer1.0.conv1."], "", "moco"),
    "torchvision's ViT": Family(["conv_proj."], "", "dino", names.vit_from_torchvision),
    "a ViT with timm's names": Family(["patch_embed.proj."], "", "dino"),
    "a ViT backbone with timm's names": Family(["backbone.patch_embed.proj."], "backbone.", "dino"),
    "a ResNet with torchvision's names": Family(["layer1.0.conv1."], "", "dino"),
    "a ResNet backbone with torchvision's names": Family(["backbone.layer1.0.conv1."], "backbone.",
                                                         "dino"),
}  # fmt: skip

# Networks that no method file has, by names that only they use
OTHERS = {
    "SigLIP": r"logit_bias$|vision_model\.head\.probe|(.*\.)?attn_pool\.latent",
    "DINOv3": r"(.*\.)?rope_embed\.|storage_tokens|embeddings\.patch_embeddings\.weight",
    "a Swin transformer": r"layers\.0\.blocks\.0\.",
    "BEiT": r"(.*\.)?rel(ative)?_pos(ition)?_bias|(.*\.)?layer\.0\.lambda_1|blocks\.0\.gamma_1",
    "EVA": r"(.*\.)?blocks\.0\.(attn\.q_bias|mlp\.(fc1_g|w1)\.)|(.*\.)?rope\.freqs",
    "ConvNeXt-CLIP": r"visual\.trunk\.(stem|stages)\.",
    "ConvNeXt": r"stages\.0\.(blocks\.0\.conv_dw|0\.dwconv)\.|features\.1\.0\.layer_scale",
    "CLIP with an image encoder of timm's": r"visual\.trunk\.",
    "CLIP with a text encoder of transformers": r"text\.transformer\.(embeddings|encoder|shared)\.",
    "CoCa": r"text_decoder\.|visual\.attn_pool\.",
    "a distilled DeiT": r"dist_token|(.*\.)?embeddings\.distillation_token",
    "CLIP's image encoder in timm's form": r"norm_pre\.",
    "a ViT that averages its patches": r"fc_norm\.",
}


def has(state, mark):
    return any(re.match(mark, key) for key in state)


def other(state):
    """-> the key of OTHERS that a state dict belongs to, or None."""
    if has(state, "blocks.0.gamma_1") and has(state, "reg_token") and not has(state, "pos_embed"):
        return "DINOv3"  # in timm's form
    return next((name for name, mark in OTHERS.items() if has(state, mark)), None)


def family(state):
    """-> the key of FAMILIES that a state dict belongs to, or None."""
    for name, (marks, *_) in FAMILIES.items():
        if all(has(state, mark) for mark in marks):
            return name
    return None


# -------------------------------------------- what was saved --------------------------------------
# Where projects put the weights: DINO, iBOT, DINOv2; SLIP, MoCo, SimSiam; DeiT, MAE; many others
WRAPPERS = ("teacher", "state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema")
# What torch.compile, FSDP and activation checkpointing add in the midst of a name
ADDED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
NUMBERS = ("input_resolution", "context_length", "vocab_size")  # tensors in OpenAI's archives


def state_of(saved):
    """The state dict in what another project saved, with its tensors' own names."""
    inner = saved
    while inner is not None:
        saved = inner
        inner = next((saved[key] for key in WRAPPERS if isinstance(saved.get(key), dict)), None)
    tensors = {str(k): v for k, v in saved.items() if torch.is_tensor(v)}
    return unwrapped({k: v for k, v in tensors.items() if k not in NUMBERS})


def tensors_in(path, saved, key):
    """The state dict that a checkpoint holds under this key. Raises UserError if it is none."""
    found = saved[key]
    if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
        raise UserError(f"{path} is damaged: its {key} is no dict of tensors")
    return {str(k): v for k, v in found.items()}


def run_of(file, saved):
    """What one of our method files saved, or what evaluate.py exported of it to safetensors -> a
    dict of method, args, model and perhaps tokenizer, of an export also head_layer and whole; None
    for weights of others. Raises UserError where a part of it is missing or damaged."""
    beside = file.parent / "export.json"
    said = read_json(beside) if file.suffix == ".safetensors" else {}
    if said.keys() & {"args", "whole"}:
        lacks = [key for key in ("method", "args", "head_layer", "whole") if key not in said]
        if lacks:
            raise UserError(f"{beside} lacks {first_three(lacks)}: export the run again")
        saved = {**said, "model": saved}
        own = file.parent / "tokenizer.json"
        if own.is_file():
            saved["tokenizer"] = own.read_text(encoding="utf-8")
    elif not saved.keys() >= {"method", "args", "model"}:
        return None
    if not isinstance(saved["args"], dict):
        raise UserError(f"{beside if said else file} is damaged: its args are no dict")
    if not isinstance(saved.get("tokenizer", ""), str):
        raise UserError(f"{file} is damaged: its tokenizer is no text")
    return {**saved, "method": str(saved["method"]), "model": tensors_in(file, saved, "model")}


def unwrapped(state):
    """A state dict without the prefixes of data parallelism, compilation and enclosing modules, and
    without the number of DINOv2's chunk of blocks: blocks.0.3. is blocks.3."""
    out = {}
    for key, value in state.items():
        for word in ADDED:
            key = key.replace(word, "")
        key = re.sub(r"^(module\.)+", "", key)
        out[re.sub(r"^(.*\.)?blocks\.\d+\.(\d+)\.", r"\1blocks.\2.", key)] = value
    if family(out) or other(out):
        return out
    words = {key.partition(".")[0] for key in out}
    if "model" in words:
        words = {"model"}
    if len(words) == 1:
        word = words.pop()
        inside = {k.removeprefix(f"{word}."): v for k, v in out.items() if k.startswith(f"{word}.")}
        found = unwrapped(inside)
        if inside and (family(found) or other(found)):
            return found
    return out


def depth(state, prefix):
    """How many modules prefix0, prefix1, ... a state dict has."""
    return len({k.removeprefix(prefix).split(".")[0] for k in state if k.startswith(prefix)})


# -------------------------------------------- what tensors do not tell ----------------------------
# Attention heads of published transformers by their width: ViT-Ti, S, B and L; MAE's and CLIP's
# ViT-H (1280), SigLIP's and others' SO400M (1152), ViT-g (1408), DINOv2's ViT-g (1536), CLIP's
# ViT-bigG (1664) and ViT-e (1792).
HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 896: 14, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24,
         1664: 16, 1792: 16}  # fmt: skip
LAIONS_WIDTHS = (1280, 1408, 1664)  # of CLIP's ViT-H, ViT-g and ViT-bigG


@dataclass
class Known:
    """What is known of a network beside its tensors: from flags, and from files beside the weights.
    `notes` collects what was found and what was assumed, for the line that is printed."""

    heads: int = 0
    text_heads: int = 0
    gelu: str = ""
    beside: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)

    def heads_of(self, width, table=HEADS, certain=0, flag="--heads"):
        """-> the attention heads of a transformer of this width. The flag wins over a file beside
        the weights, that over `certain`, that over the table, and that over one for 64 channels."""
        kind = flag.removeprefix("--").replace("-", "_")
        asked, said = getattr(self, kind), self.beside.get(kind)
        if asked or said or certain:
            heads = asked or said or certain
            why = flag if asked else self.beside["file"] if said else "by its positions"
        elif width in table:
            heads, why = table[width], f"usual for width {width}, else {flag}"
        elif width % 64 == 0:
            heads, why = width // 64, f"one for 64 channels, else {flag}"
        else:
            raise UserError(
                "the weights do not tell how many attention heads a transformer of width "
                f"{width} has: give {flag}"
            )
        if width % heads:
            raise UserError(f"{flag} {heads} does not divide the width {width} of this transformer")
        self.notes.append(f"{heads} {kind.replace('_', ' ')} ({why})")
        return heads

    def text_heads_of(self, width):
        return self.heads_of(width, {}, flag="--text-heads")

    def exact_gelu(self, width=0):
        """Whether a CLIP has GELU itself and not OpenAI's approximation of it, QuickGELU. width: of
        its vision transformer. OpenAI's end at 1024; LAION trained all wider ones with GELU."""
        gelu = self.gelu or self.beside.get("gelu")
        if gelu:
            self.notes.append(f"{gelu} GELU ({'--gelu' if self.gelu else self.beside['file']})")
        elif width in LAIONS_WIDTHS:
            gelu = "exact"
            self.notes.append(f"exact GELU (LAION's for width {width}, else --gelu quick)")
        else:
            self.notes.append("QuickGELU as OpenAI's (LAION's: --gelu exact)")
        return gelu == "exact"


def read_json(path):
    """The dict in a JSON file, empty where there is none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def beside(file, name):
    """What the files beside a file of weights say of a network of this family -> dict of heads,
    text_heads, gelu, view and file, which is the one that says it. Files: the export.json of ours,
    open_clip's open_clip_config.json, transformers' config.json."""
    folder = Path(file).parent
    ours = read_json(folder / "export.json")
    if ours.get("weights") == Path(file).name:
        return {**ours, "file": "export.json"}
    found = {}
    if name.startswith("transformers'") or "ALIGN" in name:
        config = read_json(folder / "config.json")
        vision, text = (config.get(f"{part}_config") or {} for part in ("vision", "text"))
        found = {"heads": (vision or config).get("num_attention_heads"), "file": "config.json"}
        found["text_heads"] = text.get("num_attention_heads")
        activation = vision.get("hidden_act", "quick_gelu" if vision else None)
        found["gelu"] = {"quick_gelu": "quick", "gelu": "exact"}.get(activation)
        pictures = read_json(folder / "preprocessor_config.json")
        if "image_mean" in pictures and "image_std" in pictures:
            found["view"] = {"mean": pictures["image_mean"], "std": pictures["image_std"]}
    elif FAMILIES[name].method == "clip":
        config = read_json(folder / "open_clip_config.json")
        model, pictures = config.get("model_cfg") or {}, config.get("preprocess_cfg") or {}
        if model:
            vision, text = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
            found = {"gelu": "quick" if model.get("quick_gelu") else "exact"}
            found |= {"text_heads": text.get("heads"), "file": "open_clip_config.json"}
            if isinstance(vision.get("width"), int) and vision.get("patch_size"):
                found["heads"] = vision["width"] // vision.get("head_width", 64)
            kept = ("interpolation", "mean", "std", "resize_mode")
            found["view"] = {key: pictures[key] for key in kept if key in pictures}
    return found
