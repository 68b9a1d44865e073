"""DeCLIP: Supervision Exists Everywhere, a data efficient CLIP (Li et al. 2021, arXiv 2110.05208).

Where CLIP learns from one pairing per sample, a sample gives four kinds of supervision: its image alone, its
text alone, two views of each, and the nearest neighbour of its text among those of earlier samples.

Loss, with I1, I2 embeddings of two views of an image, T of its text, T' of the text augmented, N and N' the
entries of a queue nearest to T and T', s = exp(t), alpha = beta = gamma = 0.2:
    L = (1 - alpha - beta - gamma) C(I1, T) + alpha (L_ISS + L_TSS) + beta L_MVS + gamma L_NNS
    C(I, T) = 1/2 [ CE(s I T^T, y) + CE(s T I^T, y) ], y = (0, ..., B-1), unit lengths,  chance level ln B
    L_MVS = C(I1, T') + C(I2, T) + C(I2, T'),  chance 3 ln B;  L_NNS = 1/2 [ C(I1, N) + C(I2, N) ],  ln B
    L_ISS = -1/2 [ cos(p1, z2) + cos(p2, z1) ], z = projector(I), p = predictor(z); no gradient through z
    L_TSS = mean over the masked tokens of -log p(token),  chance level ln V
B global batch, b = B / processes, D a width, E of embeddings, K length of the queue, V tokens there are.

Laptop, 1 GPU   torchrun declip.py    torchrun declip.py --data flickr8k
8 GPUs          torchrun --nproc_per_node=8 declip.py --data yfcc15m      (or with --arch resnet50)

Official checkpoints load strictly (evaluation.weights.load_released). With --released, as in that code:
 - C of all four pairs has the weight (1 - alpha - beta - gamma) / 4; beta has no other effect.
 - L_NNS from image to text alone, and over N' too; the queue takes T' as well. The paper enqueues T.
 - One masked text serves L_TSS and T, and a random token in it may end it. Here T sees it unmasked.
 - s is at least exp(3) = 20; a ViT's patch embedding is not trained.
Not even then: batch norm and queue of each process alone, a queue that is lost at a restart and drops what is
too long for its end, L_TSS averaged over processes, not tokens. Runs would depend on their number.

Diff against: slip.py (backbones: clip.py).
"""

import copy
import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import UserError, all_gather, init_distributed, mixed_precision, sync_batchnorm
from common import user_errors, warmup_cosine, world_size
from data import IMAGENET_MEAN, IMAGENET_STD, Loader, Tokenizer, color_jitter, draw_jitter
from data import gaussian_blur, grayscale, hflip, normalize, open_dataset, random_resized_crop
from data import to_float
from monitor import EvalView, captions, evaluation_set, language_eval
from run import Run, RunArgs, parse_args


# -------------------------------------------- arguments --------------------------------------------
@dataclass
class Args(RunArgs):
    data: str = "shapes"  # named dataset or path, see docs/data.md
    eval_data: str = ""  # dataset of the evaluation in the loop (default: the val split of --data)
    recipe: str = ""  # entry of RECIPES to use instead of the one named like --data
    arch: str = "vit_base_patch32"  # image encoder: a key of ARCHS, a ViT with _patchP behind it
    embed_dim: int = 0  # width of the joint embedding (0: the architecture's; 3072 in the 88M ViT)
    text_width: int = 512  # width of the text transformer, with heads of 64 (official code)
    text_layers: int = 12  # blocks of the text transformer (official code)
    context_length: int = 77  # tokens of a caption with start and end (paper: 76; its code: 77)
    ssl_dim: int = 1024  # width of projector and predictor, their hidden layer has half (official)
    ssl_weight: float = 0.2  # alpha, weight of L_ISS and of L_TSS
    mvs_weight: float = 0.2  # beta, weight of L_MVS (--released: 0.2 is C's share, the 88M ViT 0)
    nns_weight: float = 0.2  # gamma, weight of L_NNS
    queue_size: int = 65536  # K, embeddings in the queue of texts
    released: bool = False  # objective and behaviour of the released code, see the top of this file
    synonyms: str = ""  # file of lines "word, synonym, ..." (default: WordNet, if it is installed)
    tokenizer: str = "clip"  # clip, train (on the captions), a tokenizer.json, merges .gz, hub name
    vocab_size: int = 49409  # V, CLIP's tokens and a mask; for --tokenizer train the most tokens
    image_size: int = 224  # side of an image in pixels
    epochs: int = 32  # passes over the data (Sec. 4.1); officially 128,000 steps of YFCC15M
    max_steps: int = 0  # stop after so many steps, without changing the schedule (0: run all of it)
    batch_size: int = 4096  # pairs of a step, over all processes (official)
    accum_steps: int = 1  # more is refused: batch norm, negatives and queue need the whole batch
    lr: float = 1e-3  # peak learning rate (official)
    min_lr: float = 0.0  # learning rate at the end of the cosine (official)
    warmup_epochs: float = 0.665  # linear warm-up from lr / 10: 2,500 steps (official)
    weight_decay: float = 0.1  # of everything but gains and biases (official)
    clip_grad: float = 0.0  # largest gradient norm (0: off, as in the official code)
    seed: int = 0  # random seed of weights, order, crops, choice of captions and masks
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on GPUs, else fp32


SMALL = dict(text_width=128, text_layers=3, embed_dim=128, context_length=32, tokenizer="train", lr=1e-3)
SMALL |= dict(batch_size=128, warmup_epochs=0.2, ssl_dim=512, queue_size=4096)
RECIPES = {
    "shapes": dict(SMALL, arch="vit_micro_patch12", image_size=48, vocab_size=1024, text_layers=2, epochs=2),
    "flickr8k": dict(SMALL, arch="vit_micro_patch16", image_size=112, vocab_size=4096, epochs=30),
    "yfcc15m": dict(eval_data="imagenet"),
}


# -------------------------------------------- augmentation --------------------------------------------
# Adapted from slip.py: SSLView, crops from 20%
class SSLView:
    """One view of an image, MoCo v2's, as in the official code. Both kinds of loss see the same two views."""

    def __init__(self, size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
        self.size, self.mean, self.std = size, mean, std

    def crop(self, image, rng):
        return random_resized_crop(image, rng, self.size, scale=(0.2, 1.0), interpolation="bilinear")

    def sample(self, rng):
        return {"flip": rng.random() < 0.5, "jitter": rng.random() < 0.8, "gray": rng.random() < 0.2,
                "blur": rng.random() < 0.5, "sigma": rng.uniform(0.1, 2.0),  # pixels
                **draw_jitter(rng, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)}  # fmt: skip

    def __call__(self, x, params):
        x = hflip(to_float(x), params["flip"])
        factors = (params[name] for name in ("brightness", "contrast", "saturation", "hue"))
        x = color_jitter(x, *factors, params["order"], params["jitter"])
        x = grayscale(x, params["gray"])
        x = gaussian_blur(x, params["sigma"], params["blur"], kernel_size=13)  # 3 sigma on either side
        return normalize(x, self.mean, self.std)


# Words that WordNet knows as something else ("in": inch)
STOP_WORDS = """a an the in on at by to of off up out over is are was be am as it its he his she who have
has no not so or and but for from with do does can will more most some than then"""


def open_synonyms(path=""):
    """-> function from a word in lower case to a list of its synonyms (or None): those of a file with a line
    "word, synonym, ..." for each, else WordNet's; None where nltk or its WordNet is not there. UserError."""
    if path:
        try:
            lines = Path(path).read_text(encoding="utf-8").lower().splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"--synonyms {path} cannot be read as text ({error})") from error
        rows = [[word.strip() for word in line.split(",") if word.strip()] for line in lines]
        return {row[0]: row[1:] for row in rows if row}.get
    try:
        return wordnet().get
    except (ImportError, LookupError, OSError):
        return None


def wordnet(debian=Path("/usr/share/wordnet")):
    """-> {word: its synonyms} of WordNet, without inflected forms: Debian's wordnet-base, else nltk's."""
    parts = [debian / f"data.{part}" for part in ("noun", "verb", "adj", "adv")]
    if not parts[0].exists():
        import nltk  # only to find the files: its reader would share open ones with forked workers

        parts = [nltk.data.find(f"corpora/wordnet/{part.name}") for part in parts]
    table, stop_words = {}, set(STOP_WORDS.split())
    for part in parts:
        with part.open("rb") if isinstance(part, Path) else part.open() as file:
            lines = file.read().decode().splitlines()
        for line in lines:
            if not line.startswith(" "):  # not the licence
                fields = line.split()  # offset, file, kind, count, then word, id for each
                words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
                words = {re.sub(r"\(\w+\)$", "", word).replace("_", " ").lower() for word in words}
                for word in words - stop_words:
                    table.setdefault(word, set()).update(words - {word})
    return {word: sorted(synonyms) for word, synonyms in table.items()}


def augmented_text(tokenizer, synonyms, caption, rng):
    """-> ids of the caption after one operation of EDA (arXiv 1901.11196), without insertion as officially.
    synonyms: function from a word to a list of words or None; without it only the other two are there."""
    words = caption.split()
    if len(words) > 1:
        operation = rng.choice(["swap", "delete", "replace"][: 3 if synonyms else 2])
        if operation == "swap":
            i, j = rng.sample(range(len(words)), 2)
            words[i], words[j] = words[j], words[i]
        elif operation == "delete":
            words = [word for word in words if rng.random() > 0.1] or [rng.choice(words)]
        elif known := [word for word in words if synonyms(word.lower())]:
            old = rng.choice(known)
            new = rng.choice(synonyms(old.lower()))
            words = [new if word == old else word for word in words]
    return tokenizer(" ".join(words))


def masked_text(tokenizer, any_id, caption, rng):
    """-> ids with BERT's masks: a token is chosen with p 0.15 and stored as ~id, which is below 0. Its id is
    the mask with p 0.8, a random one with 0.1, or stays. any_id: even a mask, start or end token."""
    ids, mask = tokenizer(caption), tokenizer.sot - 1  # see add_mask_token
    for i in range(1, len(ids) - 1):  # neither start nor end
        if rng.random() < 0.15:
            other = rng.randrange(tokenizer.vocab_size if any_id else mask)
            ids[i] = ~rng.choices([mask, other, ids[i]], [0.8, 0.1, 0.1])[0]
    return ids


def add_mask_token(tokenizer):
    """-> a Tokenizer with <|mask|> in front of start and end, whose ids go up by one, as officially."""
    if (tokenizer.sot, tokenizer.eot) != (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1):
        raise UserError("the last two ids of --tokenizer are not its start and end tokens: use clip or train")
    form = json.loads(tokenizer.to_json()) | {"post_processor": None}  # never used, and holds ids
    for token in form["added_tokens"]:
        token["id"] += token["id"] >= tokenizer.sot
        form["model"]["vocab"][token["content"]] = token["id"]
    form["model"]["vocab"]["<|mask|>"] = tokenizer.sot
    return Tokenizer(json.dumps(form), tokenizer.context_length)


def eval_view(args) -> EvalView:
    return EvalView(args.image_size, args.image_size * 256 // 224, "bilinear", IMAGENET_MEAN, IMAGENET_STD)


# -------------------------------------------- backbone --------------------------------------------
# Adapted from clip.py: ResidualAttentionBlock, QuickGELU in forward, initialised here
class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block; causal: a token sees itself and the ones before it. (B, N, D) -> same."""

    def __init__(self, width, layers, causal=False):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1, self.ln_2, self.causal = nn.LayerNorm(width), nn.LayerNorm(width), causal
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        nn.init.normal_(self.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(self.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
        nn.init.normal_(self.mlp["c_fc"].weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.mlp["c_proj"].weight, std=(2 * layers * width) ** -0.5)

    def forward(self, x):
        y = self.ln_1(x)
        mask = x.new_full([x.shape[1]] * 2, float("-inf")).triu(1) if self.causal else None
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask, is_causal=self.causal)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


# Adapted from clip.py: VisionTransformer, initialised as the text encoder is (official code)
class VisionTransformer(nn.Module):
    """OpenAI's ViT: no bias in the patch embedding, a norm before the first block. (B, 3, S, S) -> (B, E)."""

    def __init__(self, image_size, patch_size, width, layers, embed_dim):
        super().__init__()
        scale, tokens = width**-0.5, (image_size // patch_size) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        blocks = [ResidualAttentionBlock(width, layers) for _ in range(layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def pool(self, x):
        """-> the class token after the last norm, (B, D): the features of linear probes."""
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer["resblocks"](self.ln_pre(x))[:, 0])

    def forward(self, x):
        return self.pool(x) @ self.proj


# Adapted from clip.py: AttentionPool2d, heads of 64
class AttentionPool2d(nn.Module):
    """Attention pooling: the mean token is the only query. (B, D, H, W) -> (B, E)."""

    def __init__(self, grid, width, embed_dim):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) / width**0.5)
        for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
            self.add_module(name, nn.Linear(width, embed_dim if name == "c_proj" else width))
            nn.init.normal_(getattr(self, name).weight, std=width**-0.5)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # (B, HW, D)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding.to(x)
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in (q, k, v))  # (B, heads, N, 64)
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).flatten(1))


class ModifiedResNet(torchvision.models.ResNet):
    """clip.py's, made of torchvision's: a stem of three convolutions, 2 x 2 means in place of strides, and
    attention pooling. (B, 3, S, S) -> (B, E)."""

    def __init__(self, image_size, layers, embed_dim):
        super().__init__(torchvision.models.resnet.Bottleneck, layers, embed_dim, zero_init_residual=True)
        self.fc.requires_grad_(False)  # in official files, never used
        for i, (inputs, outputs) in enumerate([(3, 32), (32, 32), (32, 64)], 1):
            self.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, 3, 1 + (i == 1), padding=1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(outputs))
        for block in (self.layer2[0], self.layer3[0], self.layer4[0]):
            block.conv2.stride = block.downsample[0].stride = (1, 1)
            for layer in (block.conv3, block.downsample):
                layer.register_forward_pre_hook(lambda module, x: F.avg_pool2d(x[0], 2))
        self.apply(lambda m: isinstance(m, nn.Conv2d) and m.reset_parameters())  # not torchvision's
        self.attnpool = AttentionPool2d(image_size // 32, 2048, embed_dim)

    def forward(self, x):
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(bn(conv(x)))
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(F.avg_pool2d(x, 2))))))

    pool = forward


class TextTransformer(nn.Module):
    """CLIP's text encoder as a module of its own; its projection has a bias."""

    def __init__(self, context_length, vocab_size, width, layers, embed_dim):
        super().__init__()
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        blocks = [ResidualAttentionBlock(width, layers, causal=True) for _ in range(layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, embed_dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text_projection.weight, std=width**-0.5)

    def forward(self, text, return_words=False):
        """(B, N <= context_length) token ids, any padding after the end token -> (B, E), not normalised, and
        on request (B, N, D), what each token has become."""
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
        x = self.ln_final(self.transformer["resblocks"](x))
        end = x[torch.arange(len(x), device=x.device), text.argmax(dim=-1)]  # the end token, the largest id
        return (self.text_projection(end), x) if return_words else self.text_projection(end)


# -------------------------------------------- model --------------------------------------------
class DeCLIP(nn.Module):
    """visual: images -> (B, E); text: a TextTransformer."""

    def __init__(self, embed_dim, visual, text, ssl_dim=1024):
        super().__init__()
        self.visual, self.encode_text = visual, text
        self.logit_scale = nn.Parameter(torch.tensor([1 / 0.07]).log())  # t
        self.projector, self.predictor = nn.Sequential(), nn.Sequential()
        for i, dim in ((1, embed_dim), (2, ssl_dim), (3, ssl_dim)):
            self.projector.add_module(f"linear{i}", nn.Linear(dim, ssl_dim))
            self.projector.add_module(f"bn{i}", nn.BatchNorm1d(ssl_dim))
            if i < 3:
                self.projector.add_module(f"relu{i}", nn.ReLU())
        self.predictor.add_module("linear1", nn.Linear(ssl_dim, ssl_dim // 2))
        self.predictor.add_module("bn1", nn.BatchNorm1d(ssl_dim // 2))
        self.predictor.add_module("relu", nn.ReLU())
        self.predictor.add_module("layer2", nn.Linear(ssl_dim // 2, ssl_dim))
        self.text_label_predictor = nn.Linear(*text.token_embedding.weight.T.shape)

    def encode_image(self, image):
        """(B, 3, S, S) -> (B, E), not normalised."""
        return self.visual(image)

    def forward(self, view1, view2, text, text_aug, masked):
        """-> (I1, I2), (T, T') each (B, E); (p1, p2), (z1, z2) each (B, ssl_dim); logits (M, V) of the tokens
        below 0 in `masked`, see masked_text. text None: T is that of the masked caption."""
        images = self.visual(view1), self.visual(view2)
        z = self.projector(images[0]), self.projector(images[1])
        masked_embed, words = self.encode_text(masked.where(masked >= 0, ~masked), return_words=True)
        texts = masked_embed if text is None else self.encode_text(text), self.encode_text(text_aug)
        p = self.predictor(z[0]), self.predictor(z[1])
        return images, texts, p, z, self.text_label_predictor(words[masked < 0])


class TextQueue(nn.Module):
    """The last K text features of all processes, of unit length, first in first out; random ones at first."""

    def __init__(self, size, dim):
        super().__init__()
        self.register_buffer("features", F.normalize(torch.randn(size, dim), dim=-1))  # (K, E)
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))  # of the next one

    @torch.no_grad()
    def nearest(self, text_embed):
        """(b, E) of any length -> (b, E): of each, the entry of largest cosine."""
        return self.features[(text_embed.float() @ self.features.T).argmax(dim=1)]

    @torch.no_grad()
    def enqueue(self, features):
        """(n <= K, E) of unit length, the same on every process."""
        rows = torch.arange(len(features), device=features.device) + self.place
        self.features[rows % len(self.features)] = features
        self.place.copy_((self.place + len(features)) % len(self.features))


ARCHS = {  # embed_dim, layers, width (below base: our own)
    "vit_micro": (128, 4, 128),
    "vit_base": (512, 12, 768),
    "resnet50": (1024, (3, 4, 6, 3), 2048),
}


def build_model(args) -> DeCLIP:
    """Raises UserError for an unknown --arch and for sizes that do not fit together."""
    name, _, patch = args.arch.partition("_patch")
    if name not in ARCHS or not (patch.lstrip("0").isdecimal() if name[:3] == "vit" else name == args.arch):
        raise UserError(f"--arch {args.arch} is unknown, choose vit_SIZE_patchP or one of {', '.join(ARCHS)}")
    if args.image_size % (int(patch or 32)) or args.text_width % 64:
        raise UserError(f"--image-size must be a multiple of {patch or 32} ({args.arch}), --text-width of 64")
    embed_dim, layers, width = ARCHS[name]
    embed_dim = args.embed_dim or embed_dim
    visual = (ModifiedResNet(args.image_size, layers, embed_dim) if not patch
              else VisionTransformer(args.image_size, int(patch), width, layers, embed_dim))  # fmt: skip
    text = TextTransformer(args.context_length, args.vocab_size, args.text_width, args.text_layers, embed_dim)
    return DeCLIP(embed_dim, visual, text, args.ssl_dim)


def image_encoder(model: DeCLIP) -> nn.Module:
    """Module from images to pooled features: a ViT's before the projection, a ResNet's attention pooling."""
    encoder = copy.copy(model.visual)  # with the same parameters
    encoder.forward = encoder.pool
    return encoder


# -------------------------------------------- loss --------------------------------------------
# Adapted from clip.py: clip_loss, several images and texts per sample, directions apart
def info_nce(images, texts, logit_scale):
    """InfoNCE of every image view with every text over the global batch, in nats; chance level ln B.

    images, texts: lists of (b, E) of this process, any length. Call it outside autocast, whose products are
    in half precision. -> image to text and text to image, (images, texts) each: means over this process's
    rows; the mean over processes is that of the global batch."""
    images, texts = ([F.normalize(x.float(), dim=-1) for x in side] for side in (images, texts))
    all_images, all_texts = ([all_gather(x) for x in side] for side in (images, texts))  # (B, E) each
    b = len(images[0])
    first = b * torch.distributed.get_rank() if len(all_images[0]) > b else 0
    y = torch.arange(first, first + b, device=images[0].device)
    to_text = [F.cross_entropy(logit_scale * i @ t.T, y) for i in images for t in all_texts]
    to_image = [F.cross_entropy(logit_scale * t @ i.T, y) for i in all_images for t in texts]
    return (torch.stack(losses).view(len(images), len(texts)) for losses in (to_text, to_image))


def simsiam_loss(p1, p2, z1, z2):
    """L_ISS (SimSiam, Eq. 2): 0 for unrelated directions, -1 at best. (b, D) each, any length."""
    p1, p2, z1, z2 = p1.float(), p2.float(), z1.detach().float(), z2.detach().float()
    return -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2


def mlm_loss(logits, labels):
    """L_TSS: logits (M, V), labels (M,) of this process's masked tokens, M another on each; chance ln V.
    -> what has as its mean over processes the mean over all masked tokens (0 if there are none)."""
    counts = all_gather(torch.full((1,), float(len(labels)), device=logits.device))  # (processes,)
    return F.cross_entropy(logits.float(), labels, reduction="sum") * len(counts) / counts.sum().clamp(min=1)


# -------------------------------------------- training --------------------------------------------
def train(args: Args) -> dict:
    """Trains and returns the last evaluation. Raises UserError for mistakes the user can fix."""
    device = init_distributed(args.device)
    torch.manual_seed(args.seed)
    autocast, scaler = mixed_precision(args.dtype, device)
    clip_weight, mvs_weight = 1 - args.ssl_weight - args.mvs_weight - args.nns_weight, args.mvs_weight
    if clip_weight < 0:
        raise UserError("--ssl-weight, --mvs-weight and --nns-weight are above 1 in sum, lower them")
    if args.released:  # all four pairs alike
        clip_weight = mvs_weight = clip_weight / 4
    if args.accum_steps > 1:
        raise UserError("--accum-steps is refused: batch norm, negatives, queue need the whole batch, use 1")
    if args.queue_size < args.batch_size * (1 + args.released):
        raise UserError(f"--queue-size {args.queue_size} is less than a batch adds to it: raise it")

    # data
    dataset, val = open_dataset(args.data, args.data_dir), evaluation_set(args)
    text_source, most = captions(dataset) if args.tokenizer == "train" else None, args.vocab_size - 1
    tokenizer = Tokenizer(args.tokenizer, args.context_length, text_source, most, args.data_dir)
    tokenizer, synonyms = add_mask_token(tokenizer), open_synonyms(args.synonyms)
    views = {"view1": SSLView(args.image_size), "view2": SSLView(args.image_size)}
    texts = {"text": tokenizer, "text_aug": functools.partial(augmented_text, tokenizer, synonyms),
             "masked": functools.partial(masked_text, tokenizer, args.released)}  # fmt: skip
    loader = Loader(dataset, views, texts, args.batch_size, args.seed, args.workers, device)

    # model and optimizer
    model = sync_batchnorm(build_model(args), device).to(device)
    model.visual.conv1.requires_grad_(not (args.released and "_patch" in args.arch))
    queue = TextQueue(args.queue_size, model.encode_text.text_projection.out_features).to(device)
    if args.compile:
        model.compile()
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-8, fused=True)

    # run directory; continues from its checkpoint if it has one
    state = {"model": model, "queue": queue, "optimizer": optimizer, "scaler": scaler}
    run = Run("declip", args, loader, state, {"tokenizer": tokenizer.to_json()})
    if synonyms is None:
        run.say("no --synonyms and no WordNet: captions are augmented by swapping and deleting words alone")
    warmup, total = round(args.warmup_epochs * loader.steps_per_epoch) - 1, run.total - 1  # as officially
    ddp = DistributedDataParallel(model) if world_size() > 1 else model
    clip_chance, tss_chance = math.log(args.batch_size), math.log(args.vocab_size)
    chance = (clip_weight + 3 * mvs_weight + args.nns_weight) * clip_chance + args.ssl_weight * tss_chance

    for step, batch in run.batches():
        view1, view2 = (views[name](*batch[name]) for name in views)
        text, text_aug, masked = (batch[name][:, : args.context_length] for name in texts)
        for group in optimizer.param_groups:
            group["lr"] = lr = warmup_cosine(step, total, warmup, args.lr, args.lr / 10, args.min_lr)

        with autocast:
            seen = None if args.released else text
            image_embeds, text_embeds, p, z, word_logits = ddp(view1, view2, seen, text_aug, masked)
        known = text_embeds[: 1 + args.released]
        nearest = [queue.nearest(x) for x in known]
        to_text, to_image = info_nce(image_embeds, [*text_embeds, *nearest], model.logit_scale.exp())
        both = (to_text + to_image) / 2  # (I1, I2) x (T, T', N and, as released, N')
        clip, mvs = both[0, 0], both[0, 1] + both[1, 0] + both[1, 1]
        nns = (to_text if args.released else both)[:, 2:].mean()
        iss, tss = simsiam_loss(*p, *z), mlm_loss(word_logits, text[masked < 0])
        loss = clip_weight * clip + mvs_weight * mvs + args.nns_weight * nns + args.ssl_weight * (iss + tss)
        scaler.scale(loss).backward()
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():  # s <= 100 as in CLIP; official: t in [3, 6], then s <= 100
            model.logit_scale.clamp_(3 if args.released else 0, math.log(100))
            queue.enqueue(torch.cat([all_gather(F.normalize(x.float(), dim=-1)) for x in reversed(known)]))
            feature_std = F.normalize(all_gather(z[0].float()), dim=-1).std(0).mean()

        terms = {"loss": (loss, chance), "clip_loss": (clip, clip_chance), "mvs_loss": (mvs, 3 * clip_chance)}
        terms |= {"nns_loss": (nns, clip_chance), "iss_loss": (iss, 0.0), "tss_loss": (tss, tss_chance)}
        terms["nn_cosine"] = F.cosine_similarity(known[0].float(), nearest[0]).mean(), None
        run.end_step(terms, feature_std=feature_std, feature_std_chance=args.ssl_dim**-0.5,
                     logit_scale=model.logit_scale.detach().exp(), lr=lr)  # fmt: skip
        if val and run.due(args.eval_every):
            run.log_evaluation(language_eval(model, tokenizer, val, eval_view(args), device))
        if run.agree_to_stop() or run.due(args.save_every):
            run.save()

    return run.finish("zeroshot", val)


if __name__ == "__main__":
    with user_errors():
        train(parse_args(Args, RECIPES))
