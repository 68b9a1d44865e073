"""SLIP's experiments: what its paper compares it with (Mu et al. 2021, arXiv 2112.12750, Sec. 4.6
and Sec. 5).

slip.py is the method; here its parts are exchanged. --ssl: must self-supervision be SimCLR's?
--clip-scale 0: is it enough to train with it first and CLIP afterwards? --clip-views: is it only
the augmentation that helps CLIP? --images: must both losses see the same images?

Loss, with a = --clip-scale, c = --ssl-scale and L_clip as in slip.py; p, q, k, z of unit length:
    L = a L_clip + c L_ssl,  chance level a ln B + c times that of L_ssl:
    simclr  as in slip.py, chance ln(2B - 1)
    mocov3  ctr(q1, k2) + ctr(q2, k1), chance 4 tau ln B                 (MoCo v3, Algorithm 1)
            ctr(q, k) = -2 tau log( exp(q.k_+ / tau) / sum_j exp(q.k_j / tau) )
    byol    |p1 - z2|^2 + |p2 - z1|^2, chance 4                          (BYOL Eq. 2)
    beit    |g(h_i) - x_i|^2 / (3 P^2), mean over masked patches i, chance 1      (MAE Sec. 3)
            h_i output of patch i, g linear, x_i its pixels with zero mean and unit variance
    before keys k or targets z are computed: theta_k <- m theta_k + (1 - m) theta_q
B global batch, b = B / processes, N patches, P their side, D width, E of embeddings, S image size.

Laptop        torchrun slip_ablations.py --ssl mocov3
8 GPUs        torchrun --nproc_per_node=8 slip_ablations.py --data yfcc15m --ssl mocov3

Every row of the paper's tables has its command in docs/slip_ablations.md. The code of these
experiments was never published. What is known to differ:
 - BEiT predicts tokens of DALL-E's dVAE, the weights of another project. Here it is pixels, with
   MAE's random masks: like tokens they are a fixed function of the image, where online targets
   (ibot.py) would be a network of their own that learns, and so another experiment.
 - --images decoupled gives each loss a half of the data. In the paper L_clip keeps all of its
   pairs, and L_ssl has as many other images: here compare it with --images half.
 - MoCo v3 has SLIP's --ssl-scale, and BYOL SLIP's learning rate and weight decay. The paper tuned
   these and does not give the values.

Diff against: slip.py.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import UserError, all_gather, checkpoint_blocks, init_distributed, mixed_precision
from common import sync_batchnorm, user_errors, warmup_cosine, world_size
from data import IMAGENET_MEAN, IMAGENET_STD, Loader, Tokenizer, normalize, open_dataset, to_float
from data import color_jitter, draw_jitter, gaussian_blur, grayscale, hflip, random_resized_crop
from data import solarize
from monitor import EvalView, captions, language_eval, language_set, say_evaluation
from run import Run, RunArgs, init_weights, parse_args


# ---------------------------------------- arguments ----------------------------------------
@dataclass
class Args(RunArgs):
    data: str = "shapes"  # named dataset or path, see docs/data.md
    eval_data: str = ""  # dataset of the evaluation in the loop (default: the val split of --data)
    recipe: str = ""  # entry of RECIPES to use instead of the one named like --data
    ssl: Literal["simclr", "mocov3", "byol", "beit", "none"] = "simclr"  # L_ssl; none: CLIP
    clip_views: Literal["crop", "color", "resize", "ssl"] = "crop"  # augmentation beside a caption
    images: Literal["all", "half", "decoupled"] = "all"  # half: one for both losses; decoupled: two
    clip_scale: float = 1.0  # weight a of L_clip (0: self-supervision alone, without captions)
    ssl_scale: float = 1.0  # weight c of L_ssl (official main.py)
    arch: str = "vit_base_patch16"  # image encoder: a key of ARCHS and _patchP (official models.py)
    embed_dim: int = 512  # width of the joint embedding, E (official models.py)
    text_width: int = 512  # width of the text transformer, with heads of 64 (CLIP Sec. 2.4)
    text_layers: int = 12  # blocks of the text transformer (CLIP Sec. 2.4)
    context_length: int = 77  # tokens of a caption, start and end included
    ssl_mlp_dim: int = 4096  # hidden width of projector and predictor (official main.py; MoCo v3)
    ssl_emb_dim: int = 256  # output width of projector and predictor (official main.py; MoCo v3)
    temperature: float = 0.1  # tau of simclr (official losses.py)
    key_temperature: float = 0.2  # tau of mocov3 (its official code, for transformers)
    key_momentum: float = 0.99  # m of mocov3 and byol at the start, rises to 1 (MoCo v3 Sec. 4.1)
    mask_ratio: float = 0.75  # share of the patches that beit masks (MAE Sec. 3)
    tokenizer: str = "clip"  # clip, train (on the captions), a tokenizer.json, merges .gz, hub name
    vocab_size: int = 49408  # rows of the token table; at most so many with --tokenizer train
    image_size: int = 224  # side of an image in pixels
    epochs: int = 25  # passes over the data, or over a half of it
    max_steps: int = 0  # stop after so many steps, without changing the schedule (0: run all of it)
    batch_size: int = 4096  # pairs of a step, over all processes (official code)
    grad_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute to save memory
    lr: float = 3e-3  # peak learning rate (official README)
    min_lr: float = 1e-5  # learning rate at the end of the cosine (official main.py)
    warmup_epochs: float = 1.0  # linear warm-up from 1e-6 (paper)
    weight_decay: float = 0.1  # on all but gains and biases (official README)
    clip_grad: float = 0.0  # largest gradient norm (0: off, as in the official code)
    init: str = ""  # weights to start from: a run, released weights, a backbone (docs/init.md)
    seed: int = 0  # random seed of weights, order, crops, masks and choice of captions
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on GPUs, else fp32


SMALL = dict(text_width=128, text_layers=3, embed_dim=128, context_length=32, tokenizer="train")
SMALL |= dict(batch_size=128, lr=1e-3, warmup_epochs=0.2, ssl_mlp_dim=512, ssl_emb_dim=64)
SMALL |= dict(key_momentum=0.97)  # an average over fewer steps, because these runs are short
# Beside an entry: ImageNet zero-shot accuracy, or a linear probe's, of the official README
LARGE = dict(eval_data="imagenet", grad_checkpointing="selective")  # to fit 8 GPUs of 80 GB
RECIPES = {
    "shapes": dict(SMALL, arch="vit_micro_patch12", image_size=48, vocab_size=1024, text_layers=2,
                   epochs=2),
    "flickr8k": dict(SMALL, arch="vit_micro_patch16", image_size=112, vocab_size=4096, epochs=30),
    # full: the EMA of mocov3 and byol takes memory that slip.py does not need
    "yfcc15m": dict(LARGE, grad_checkpointing="full"),  # 42.8%
    "yfcc15m-clip": dict(LARGE, ssl="none", lr=5e-4, weight_decay=0.5),  # 37.6%
    "yfcc15m-simclr": dict(LARGE, clip_scale=0.0, lr=3.2e-3),  # linear 64.0%
}


# ---------------------------------------- augmentation ----------------------------------------
# Adapted from slip.py: SSLView, with the views of the other methods, and that beside a caption
@dataclass
class View:
    """A view, by default that of L_ssl in the official main.py. flip, jitter, gray, blur, solarize:
    probabilities; saturation, hue: strengths of the jitter."""

    size: int
    area: tuple = (0.08, 1.0)  # bounds of a crop's area; (): a square as wide as the shorter side
    flip: float = 0.5
    jitter: float = 0.8
    saturation: float = 0.4
    hue: float = 0.1
    gray: float = 0.2
    blur: float = 0.5
    solarize: float = 0.0
    patches: int = 0  # how many an image has
    mask_ratio: float = 0.0  # share of them to mask
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def crop(self, image, rng):
        """In a loader worker: uint8 (3, H, W) -> uint8 (3, size, size). rng: random.Random."""
        if self.area:
            return random_resized_crop(image, rng, self.size, self.area)
        side = min(image.shape[1:])
        top = rng.randint(0, image.shape[1] - side)
        left = rng.randint(0, image.shape[2] - side)
        square = image[:, top : top + side, left : left + side]
        return random_resized_crop(square, rng, self.size, (1.0, 1.0), ratio=(1.0, 1.0))

    def sample(self, rng):
        """In a loader worker: what else is random about this view of this sample."""
        params = {
            "flip": rng.random() < self.flip,
            "jitter": rng.random() < self.jitter,
            "gray": rng.random() < self.gray,
            "blur": rng.random() < self.blur,
            "sigma": rng.uniform(0.1, 2.0),  # pixels
            **draw_jitter(rng, 0.4, 0.4, self.saturation, self.hue),  # brightness, contrast
            "solarize": rng.random() < self.solarize,
        }
        masked = set(rng.sample(range(self.patches), round(self.mask_ratio * self.patches)))
        params["mask"] = [i in masked for i in range(self.patches)]
        return params

    def __call__(self, x, params):
        """For a batch: uint8 (b, 3, size, size) and stacked parameters -> normalised float."""
        x = hflip(to_float(x), params["flip"])
        factors = [params[name] for name in ("brightness", "contrast", "saturation", "hue")]
        x = color_jitter(x, *factors, params["order"], params["jitter"])
        x = grayscale(x, params["gray"])
        x = gaussian_blur(x, params["sigma"], params["blur"], 13)  # 3 sigma on either side
        x = solarize(x, params["solarize"])
        return normalize(x, self.mean, self.std)


def pair_view(args) -> View:
    """The view beside a caption. --clip-views: a light crop as in slip.py, or SimCLR's colours and
    blur with the CLIP paper's random square, SimCLR's crop and flip, or all of SimCLR's."""
    plain = dict(jitter=0.0, gray=0.0, blur=0.0)
    options = {
        "crop": dict(plain, area=(0.5, 1.0), flip=0.0),
        "color": dict(area=(), flip=0.0),
        "resize": plain,
        "ssl": {},
    }
    chosen = options[args.clip_views]
    return View(args.image_size, **chosen)


def ssl_views(args, patches) -> dict:
    """The views of L_ssl by name, those of the method. patches: how many an image has."""
    size = args.image_size
    if args.ssl == "none":
        return {}
    if args.ssl == "simclr":
        return {"view1": View(size), "view2": View(size)}
    if args.ssl == "beit":  # crop, flip and colours, as BEiT itself has them
        colours = dict(jitter=1.0, hue=0.0, gray=0.0, blur=0.0)
        mask = dict(patches=patches, mask_ratio=args.mask_ratio)
        return {"view1": View(size, **colours, **mask)}
    return {  # MoCo v3's, which BYOL has too (Sec. 4.6)
        "view1": View(size, saturation=0.2, blur=1.0),
        "view2": View(size, saturation=0.2, blur=0.1, solarize=0.2),
    }


# Copied from slip.py: eval_view
def eval_view(args) -> EvalView:
    return EvalView(args.image_size, None, "bilinear", IMAGENET_MEAN, IMAGENET_STD)


def half_of(dataset, which):
    """One of two disjoint halves, 0 or 1, drawn at random and always the same."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).numpy()
    half = torch.utils.data.Subset(dataset, order[which::2][: len(dataset) // 2])
    half.name = dataset.name
    half.classes = dataset.classes
    half.captioned = dataset.captioned
    return half


class Decoupled(Loader):
    """Pairs from one half of the images, and views from the other half (Sec. 5.3)."""

    def __init__(self, dataset, pair_views, other_views, texts, batch_size, seed, workers, device):
        super().__init__(half_of(dataset, 0), pair_views, texts, batch_size, seed, workers, device)
        other_workers = self.workers // 2
        # with the same seed, image i of one half would meet image i of the other in every epoch
        rest = batch_size, seed + 1, other_workers, device
        self.others = Loader(half_of(dataset, 1), other_views, {}, *rest)
        self.workers -= other_workers

    def batches(self, start, stop):
        pairs, others = super().batches(start, stop), self.others.batches(start, stop)
        for (step, batch), (_, other) in zip(pairs, others):
            self.wait += self.others.wait
            self.others.wait = 0.0
            params = batch["params"] | other["params"]
            yield step, {**batch, **other, "params": params}

    def check_bad(self):
        super().check_bad()
        self.others.check_bad()


# ---------------------------------------- backbone ----------------------------------------
# Copied from slip.py: Attention
class Attention(nn.Module):
    """Multi-head self-attention. (B, N, D) -> (B, N, D), or the first `queries` tokens of it."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, queries=None):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads) each
        x = F.scaled_dot_product_attention(q[:, :, :queries], k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


# Copied from slip.py: Block
class Block(nn.Module):
    """Pre-norm block, timm's names. (B, N, D) -> (B, N, D), or the first `queries` tokens of it."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, 4 * dim))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * dim, dim))

    def forward(self, x, queries=None):
        x = x[:, :queries] + self.attn(self.norm1(x), queries)
        return x + self.mlp(self.norm2(x))


# Adapted from slip.py: VisionTransformer, all tokens on demand, some of the patches masked
class VisionTransformer(nn.Module):
    """timm's ViT (official models.py): no norm before the blocks. (B, 3, S, S) -> (B, D), the class
    token after the last norm."""

    def __init__(self, image_size, patch_size, dim, depth, heads):
        super().__init__()
        tokens = (image_size // patch_size) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(3, dim, patch_size, stride=patch_size))
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def tokens(self, x, mask=None, mask_token=None, queries=None):
        """(B, 3, S, S) -> (B, 1 + N, D), class token and patches after the last norm, or the first
        `queries` of them. Patches in mask, (B, N) bool, are replaced by mask_token, (1, D)."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, N, D)
        if mask is not None:  # before the position is added: a masked patch knows where it is
            x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
        cls_token = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1) + self.pos_embed
        x = self.blocks[:-1](x)
        return self.norm(self.blocks[-1](x, queries))

    def forward(self, x):
        return self.tokens(x, queries=1 if self.training else None)[:, 0]


# Copied from clip.py: QuickGELU
class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


# Copied from clip.py: ResidualAttentionBlock
class ResidualAttentionBlock(nn.Module):
    """Pre-norm block. (B, N, D) -> (B, N, D); with position (B,), one token each: (B, 1, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, mask=None, position=None):
        q = y = self.ln_1(x)
        key_mask = None  # (B, N): 0 where the token at `position` attends, -inf after it
        if position is not None:
            x = x.take_along_dim(position[:, None, None], dim=1)  # (B, 1, D)
            q = self.ln_1(x)
            if mask is not None:
                key_mask = mask[position]  # a row of the causal mask for each sample
                mask = None
        causal = mask is not None
        y, _ = self.attn(q, y, y, key_mask, need_weights=False, attn_mask=mask, is_causal=causal)
        x = x + y
        return x + self.mlp(self.ln_2(x))


# Copied from clip.py: Transformer
class Transformer(nn.Module):
    """mask: causal or none. (B, N, D) -> (B, N, D); with position (B,) of a token: (B, 1, D)."""

    def __init__(self, width, layers, heads):
        super().__init__()
        blocks = [ResidualAttentionBlock(width, heads) for _ in range(layers)]
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x, mask=None, position=None):
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x, mask)
        return last(x, mask, position)


# ---------------------------------------- model ----------------------------------------
# Copied from mocov3.py: mlp
def mlp(dim, hidden_dim, out_dim, layers, last_norm=True):
    """Projector and predictor (MoCo v3 Sec. 5): Linear, BN, ReLU, ..., Linear and, if last_norm,
    BN without scale and offset. No biases. (B, dim) -> (B, out_dim)."""
    sizes = [dim] + [hidden_dim] * (layers - 1)
    modules = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        modules += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    modules.append(nn.Linear(sizes[-1], out_dim, bias=False))
    if last_norm:
        modules.append(nn.BatchNorm1d(out_dim, affine=False))
    return nn.Sequential(*modules)


class SimCLRBranch(nn.Module):
    """image_mlp of slip.py: three layers with biases, no batch norm at the end."""

    def __init__(self, visual, dim, hidden_dim, out_dim):
        super().__init__()
        self.image_mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, out_dim),
        )

    def forward(self, visual, view1, view2):
        """(B, 3, S, S) twice -> z1, z2 (B, E)."""
        features1, features2 = visual(torch.cat([view1, view2])).chunk(2)
        return self.image_mlp(features1), self.image_mlp(features2)


class MomentumBranch(nn.Module):
    """MoCo v3's and BYOL's: a projector and a predictor, both MoCo v3's (Sec. 4.6), and an EMA of
    encoder and projector, which starts as a copy and gets no gradient."""

    def __init__(self, visual, dim, hidden_dim, out_dim):
        super().__init__()
        self.projector = mlp(dim, hidden_dim, out_dim, layers=3)
        self.predictor = mlp(out_dim, hidden_dim, out_dim, layers=2)
        self.momentum_visual = copy.deepcopy(visual).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, visual, view1, view2):
        """(B, 3, S, S) twice -> queries q1, q2 (BYOL: p1, p2), keys k1, k2 (z1, z2), (B, E)."""
        features1, features2 = visual(torch.cat([view1, view2])).chunk(2)
        q1 = self.predictor(self.projector(features1))
        q2 = self.predictor(self.projector(features2))
        with torch.no_grad():
            features1, features2 = self.momentum_visual(torch.cat([view1, view2])).chunk(2)
            k1, k2 = self.momentum_projector(features1), self.momentum_projector(features2)
        return q1, q2, k1, k2

    @torch.no_grad()
    def update(self, visual, m):
        """theta_k <- m theta_k + (1 - m) theta_q. Only parameters move: batch norm has statistics
        of its own forward passes."""
        theta_q = [*visual.parameters(), *self.projector.parameters()]
        theta_k = [*self.momentum_visual.parameters(), *self.momentum_projector.parameters()]
        torch._foreach_lerp_(theta_k, theta_q, 1 - m)


class MaskedBranch(nn.Module):
    """Masked patches: a linear layer predicts the pixels of each from its output."""

    def __init__(self, visual, dim, hidden_dim, out_dim):
        super().__init__()
        self.patch_size = visual.patch_embed.proj.stride[0]
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.decoder = nn.Linear(dim, 3 * self.patch_size**2)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, visual, view, mask):
        """(B, 3, S, S), (B, N) bool -> predicted and true pixels (B, N, 3 P P), the mask."""
        tokens = visual.tokens(view, mask, self.mask_token)
        predicted = self.decoder(tokens[:, 1:])
        pixels = F.unfold(view, self.patch_size, stride=self.patch_size)  # (B, 3 P P, N)
        return predicted, pixels.transpose(1, 2), mask


BRANCHES = {"simclr": SimCLRBranch, "mocov3": MomentumBranch, "byol": MomentumBranch,
            "beit": MaskedBranch}  # fmt: skip


# Adapted from slip.py: SLIP, self-supervision is a module, and either branch may be missing
class SLIP(nn.Module):
    """One image encoder with a branch for language and one for self-supervision, `ssl`: a key of
    BRANCHES, or "none". language=False: no text encoder and no projections."""

    def __init__(self, embed_dim, visual, vision_width, context_length, vocab_size,
                 transformer_width, transformer_heads, transformer_layers, ssl_mlp_dim=4096,
                 ssl_emb_dim=256, ssl="simclr", language=True):
        super().__init__()
        self.visual = visual
        if language:
            self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads)
            self.token_embedding = nn.Embedding(vocab_size, transformer_width)
            self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
            self.ln_final = nn.LayerNorm(transformer_width)
            image_projection = torch.randn(vision_width, embed_dim) * vision_width**-0.5
            self.image_projection = nn.Parameter(image_projection)
            self.text_projection = nn.Parameter(torch.empty(transformer_width, embed_dim))
            self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # t; CLIP Sec. 2.5
        self.ssl = None
        if ssl != "none":
            self.ssl = BRANCHES[ssl](visual, vision_width, ssl_mlp_dim, ssl_emb_dim)
        if language:
            init_text(self)

    def encode_image(self, image):
        """(B, 3, S, S) -> (B, E), not normalised."""
        return self.visual(image) @ self.image_projection

    def encode_text(self, text):
        """(B, N <= context_length) token ids, padded after the end -> (B, E), not normalised."""
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
        end = text.argmax(dim=-1)  # position of the end token, which has the largest id
        x = self.transformer(x, mask, end)  # (B, 1, D)
        x = self.ln_final(x[:, 0])
        return x @ self.text_projection

    def forward(self, pair, views):
        """pair: image and text, views: inputs of the self-supervised branch, either may be empty ->
        embeddings of image and text (B, E), outputs of that branch, each as tuple."""
        embeddings, outputs = (), ()
        if pair:
            image, text = pair
            embeddings = self.encode_image(image), self.encode_text(text)
        if views:
            outputs = self.ssl(self.visual, *views)
        return embeddings, outputs


# Copied from clip.py: init_text
def init_text(model):
    """Initialises the text side in place, as OpenAI's code does."""
    width = model.text_projection.shape[0]
    layers = len(model.transformer.resblocks)
    std = width**-0.5
    std_out = std * (2 * layers) ** -0.5  # of the last layer of each residual branch
    nn.init.normal_(model.token_embedding.weight, std=0.02)
    nn.init.normal_(model.positional_embedding, std=0.01)
    nn.init.normal_(model.text_projection, std=std)
    for block in model.transformer.resblocks:
        nn.init.normal_(block.attn.in_proj_weight, std=std)
        nn.init.normal_(block.attn.out_proj.weight, std=std_out)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=std_out)


# layers, width, heads, as in slip.py
ARCHS = {
    "vit_micro": (4, 128, 4),
    "vit_tiny": (12, 192, 3),
    "vit_small": (12, 384, 12),
    "vit_base": (12, 768, 12),
    "vit_large": (24, 1024, 16),
}


def build_model(args) -> SLIP:
    """Raises UserError for an unknown --arch and for sizes that do not fit together."""
    name, _, patch = args.arch.partition("_patch")
    if name not in ARCHS or not patch.isdecimal() or int(patch) == 0:
        names = ", ".join(ARCHS)
        raise UserError(f"--arch {args.arch} is unknown, choose one of {names}, with _patchP")
    patch_size = int(patch)
    if args.image_size % patch_size:
        raise UserError(
            f"--image-size {args.image_size} is not a multiple of {patch_size} ({args.arch})"
        )
    layers, width, heads = ARCHS[name]
    text_width = args.text_width
    if text_width % 64:
        raise UserError(f"--text-width {text_width} is not a multiple of 64, the width of a head")
    visual = VisionTransformer(args.image_size, patch_size, width, layers, heads)
    return SLIP(
        args.embed_dim, visual, width, args.context_length, args.vocab_size, text_width,
        text_width // 64, args.text_layers, args.ssl_mlp_dim, args.ssl_emb_dim, args.ssl,
        language=args.clip_scale > 0,
    )  # fmt: skip


# Copied from slip.py: image_encoder
def image_encoder(model: SLIP) -> nn.Module:
    """Module from images to pooled features (B, D), before the projection."""
    return model.visual


# ---------------------------------------- loss ----------------------------------------
# Copied from clip.py: clip_loss
def clip_loss(image_embed, text_embed, logit_scale, gather_grad=True):
    """Symmetric cross-entropy (Fig. 3 of CLIP) over the global batch, in nats; chance level ln B.

    image_embed, text_embed: (b, E) of this process, any length; logit_scale: s = exp(t), a number
    or 0-dim tensor. Call it outside autocast, whose products are in half precision. Returns the
    mean over this process's rows: the mean over processes is the loss of the global batch. Memory
    grows with b x B. gather_grad=False: gathered features are constants, as in the official SLIP
    code; with several processes each feature then learns as an anchor only."""
    image = F.normalize(image_embed.float(), dim=-1)  # (b, E)
    text = F.normalize(text_embed.float(), dim=-1)
    all_image, all_text = all_gather(image), all_gather(text)  # (B, E)
    b, first = len(image), 0
    if len(all_image) > b:
        first = b * torch.distributed.get_rank()
        if not gather_grad:
            all_image, all_text = all_image.detach(), all_text.detach()
    labels = torch.arange(first, first + b, device=image.device)
    loss_image = F.cross_entropy(logit_scale * image @ all_text.T, labels)
    loss_text = F.cross_entropy(logit_scale * text @ all_image.T, labels)
    return (loss_image + loss_text) / 2


# Copied from simclr.py: nt_xent_loss
def nt_xent_loss(z1, z2, temperature):
    """NT-Xent (SimCLR Eq. 1) over the global batch, in nats; chance level ln(2B - 1).

    z1, z2: (b, E) of this process, the two views of the same b images, any length and dtype.
    Call it outside autocast, whose products are in half precision. Returns the mean over this
    process's 2b views: the mean over processes is the loss of the global batch. Memory grows with
    b x B."""
    z1, z2 = F.normalize(z1.float(), dim=-1), F.normalize(z2.float(), dim=-1)  # (b, E)
    all_z1, all_z2 = all_gather(z1), all_gather(z2)  # (B, E)
    b, first = len(z1), 0
    if len(all_z1) > b:
        first = b * torch.distributed.get_rank()
    labels = torch.arange(first, first + b, device=z1.device)  # column of the other view of row i
    itself = F.one_hot(labels, len(all_z1)).bool()  # (b, B)
    same1 = (z1 @ all_z1.T / temperature).masked_fill(itself, float("-inf"))
    same2 = (z2 @ all_z2.T / temperature).masked_fill(itself, float("-inf"))
    loss1 = F.cross_entropy(torch.cat([z1 @ all_z2.T / temperature, same1], dim=1), labels)
    loss2 = F.cross_entropy(torch.cat([z2 @ all_z1.T / temperature, same2], dim=1), labels)
    return (loss1 + loss2) / 2


# Copied from mocov3.py: contrastive_loss
def contrastive_loss(q, k, temperature):
    """ctr of MoCo v3's Algorithm 1 over the global batch, 2 tau times nats; chance 2 tau ln B. The
    factor keeps the size of the gradient when tau changes (BYOL's appendix).

    q, k: (b, E) of this process, query i belongs to key i, any length and dtype. Gradient flows
    into q alone. Call it outside autocast, whose products are in half precision. Returns the mean
    over this process's queries: the mean over processes is the loss of the global batch."""
    q, k = F.normalize(q.float(), dim=-1), F.normalize(k.detach().float(), dim=-1)
    all_k = all_gather(k)  # (B, E)
    b, first = len(q), 0
    if len(all_k) > b:
        first = b * torch.distributed.get_rank()
    labels = torch.arange(first, first + b, device=q.device)
    logits = q @ all_k.T / temperature  # (b, B)
    return 2 * temperature * F.cross_entropy(logits, labels)


# Copied from byol.py: byol_loss
def byol_loss(p1, p2, z1, z2):
    """2 - 2 cos(p, z) (BYOL Eq. 2), p of one view and z of the other, both ways added; chance
    level 4.

    p1, p2: (b, E) predictions of this process; z1, z2: (b, E) projections of the target for the
    same views, through which no gradient flows; any length and dtype. Call it outside autocast.
    Returns the mean over this process's b images: the mean over processes is the loss of the global
    batch, nothing needs to be gathered."""
    p1, p2 = F.normalize(p1.float(), dim=-1), F.normalize(p2.float(), dim=-1)
    z1, z2 = F.normalize(z1.detach().float(), dim=-1), F.normalize(z2.detach().float(), dim=-1)
    loss1 = (2 - 2 * (p1 * z2).sum(-1)).mean()
    loss2 = (2 - 2 * (p2 * z1).sum(-1)).mean()
    return loss1 + loss2


def masked_pixel_loss(predicted, pixels, mask):
    """Mean squared error of the masked patches' pixels, which are normalised in each patch (MAE,
    Sec. 3); chance level 1, for a prediction of 0, less where patches are of one colour.

    predicted, pixels: (b, N, 3 P P) of this process, any dtype; mask: (b, N) bool. Call it outside
    autocast. A mean over the masked patches of an image, then over this process's b images: the
    mean over processes is the loss of the global batch."""
    pixels = pixels.float()
    mean = pixels.mean(-1, keepdim=True)
    var = pixels.var(-1, keepdim=True)
    target = (pixels - mean) / (var + 1e-6).sqrt()
    error = (predicted.float() - target).square().mean(-1)  # (b, N)
    masked = mask.float()
    count = masked.sum(1).clamp(min=1)
    error = (error * masked).sum(1) / count  # (b,)
    return error.mean()


def ssl_loss(outputs, args):
    """L_ssl of what one of BRANCHES returned, a mean over this process as each of its terms."""
    if args.ssl == "simclr":
        return nt_xent_loss(*outputs, args.temperature)
    if args.ssl == "byol":
        return byol_loss(*outputs)
    if args.ssl == "beit":
        return masked_pixel_loss(*outputs)
    q1, q2, k1, k2 = outputs
    loss1 = contrastive_loss(q1, k2, args.key_temperature)
    loss2 = contrastive_loss(q2, k1, args.key_temperature)
    return loss1 + loss2


# ---------------------------------------- training ----------------------------------------
def train(args: Args) -> dict:
    """Trains and returns the last evaluation. Raises UserError for mistakes the user can fix."""
    device = init_distributed(args.device)
    torch.manual_seed(args.seed)
    autocast, scaler = mixed_precision(args.dtype, device)
    language = args.clip_scale > 0
    if not language and args.ssl == "none":
        raise UserError("--ssl none with --clip-scale 0 leaves no loss, drop one of them")
    if args.ssl != "none" and not args.ssl_scale:
        raise UserError("--ssl-scale 0 leaves out L_ssl, which is --ssl none here")

    # data
    model = build_model(args)
    dataset = open_dataset(args.data, args.data_dir)
    val = tokenizer = None
    if language:
        val = language_set(args)
        source = captions(dataset) if args.tokenizer == "train" else None
        tokenizer = Tokenizer(
            args.tokenizer, args.context_length, source, args.vocab_size, args.data_dir
        )
        if tokenizer.eot != tokenizer.vocab_size - 1:
            raise UserError(
                f"--tokenizer {args.tokenizer} has an end token that is not its largest id"
            )
    else:
        if args.clip_views != "crop":
            raise UserError("--clip-views has no use here: --clip-scale 0 leaves out the captions")
        if args.probe != "knn":
            raise UserError("--probe has no use here: --clip-scale 0 leaves nothing to evaluate")
        say_evaluation("none, because --clip-scale 0 leaves out the texts; evaluate.py does it")
    pair_views = {"image": pair_view(args)} if language else {}
    texts = {"text": tokenizer} if language else {}
    extra = {"tokenizer": tokenizer.to_json()} if language else {}
    other_views = ssl_views(args, patches=model.visual.pos_embed.shape[1] - 1)
    views = pair_views | other_views
    rest = args.batch_size, args.seed, args.workers, device
    if args.images == "all":
        loader = Loader(dataset, views, texts, *rest)
    elif args.images == "half":
        loader = Loader(half_of(dataset, 0), views, texts, *rest)
    elif pair_views and other_views:
        loader = Decoupled(dataset, pair_views, other_views, texts, *rest)
    else:
        raise UserError("--images decoupled separates two losses, and here is one: use half")

    # model and optimizer
    model = sync_batchnorm(model, device).to(device)
    init_weights(model, args, tokenizer)
    checkpoint_blocks(model, args.grad_checkpointing, Block, ResidualAttentionBlock)
    if args.compile:
        model.compile()
    trained = [p for p in model.parameters() if p.requires_grad]  # all but an EMA's
    decay = [p for p in trained if p.ndim >= 2]
    no_decay = [p for p in trained if p.ndim < 2]  # norms, biases, logit scale
    groups = [
        {"params": decay, "weight_decay": args.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-8, fused=True)

    # run directory; continues from its checkpoint if it has one
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = Run("slip_ablations", args, loader, state, extra)
    warmup = round(args.warmup_epochs * loader.steps_per_epoch)
    ddp = DistributedDataParallel(model) if world_size() > 1 else model
    clip_chance = math.log(args.batch_size)
    ssl_chances = {
        "simclr": math.log(2 * args.batch_size - 1),
        "mocov3": 4 * args.key_temperature * math.log(args.batch_size),
        "byol": 4.0,
        "beit": 1.0,
        "none": 0.0,
    }
    ssl_chance = ssl_chances[args.ssl]
    chance = args.clip_scale * clip_chance + args.ssl_scale * ssl_chance

    if val and not run.evaluation and run.due(args.eval_every):  # random weights, or one cut off
        run.log_evaluation(language_eval(model, tokenizer, val, eval_view(args), device))

    for step, batch in run.batches():
        inputs = [batch[name] for name in other_views]
        pair = ()
        terms = {}
        numbers = {}
        if language:
            pair = batch["image"], batch["text"]
        if args.ssl == "beit":
            inputs.append(batch["params"]["view1"]["mask"])
        lr = warmup_cosine(
            step, run.total, warmup, args.lr, start=1e-6, end=args.min_lr, reach_peak=True
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        if args.ssl in ("mocov3", "byol"):  # official MoCo v3: with the weights of the queries
            m = warmup_cosine(step, run.total, 0, args.key_momentum, end=1.0)
            model.ssl.update(model.visual, m)
            numbers["key_momentum"] = m

        with autocast:
            embeddings, outputs = ddp(pair, inputs)
        loss = 0.0
        if language:
            clip = clip_loss(*embeddings, model.logit_scale.exp())
            loss = loss + args.clip_scale * clip
            terms["clip_loss"] = (clip, clip_chance)
        if inputs:
            ssl = ssl_loss(outputs, args)
            loss = loss + args.ssl_scale * ssl
            terms["ssl_loss"] = (ssl, ssl_chance)
        scaler.scale(loss).backward()
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if language:
            with torch.no_grad():
                # s <= 100 (CLIP Sec. 2.5), and s >= 1 (official main.py)
                model.logit_scale.clamp_(0, math.log(100))
            numbers["logit_scale"] = model.logit_scale.detach().exp()

        run.end_step({"loss": (loss, chance), **terms}, **numbers, lr=lr)
        if run.agree_to_stop() or run.due(args.save_every, args.keep_every):
            run.save()
        if val and run.due(args.eval_every):
            run.log_evaluation(language_eval(model, tokenizer, val, eval_view(args), device))

    return run.finish("zeroshot" if language else "knn", val)


if __name__ == "__main__":
    with user_errors():
        train(parse_args(Args, RECIPES))
