"""iBOT: Image BERT Pre-Training with Online Tokenizer (Zhou et al. 2021, arXiv 2111.07832).

DINO plus masked patch prediction. The student sees the two large crops with some patches replaced
by a mask token, and for each of these it predicts the distribution that the teacher gives for that
patch of the unmasked crop. The teacher is the tokenizer of a BERT for images and is learnt while it
is used; DINO's loss across crops gives its tokens a meaning.

Loss (Sec. 3.1), g and h logits of class token and patches, c and c2 their centers, s student,
t teacher, V = 2 + L crops, the first two large, u* the large crop u with the patches in M_u masked:
    P_s = softmax(g_s / tau_s),  P_t = softmax((g_t - c) / tau_t);  of patches: with h and c2
    L_cls = mean over u in {1, 2} and v in {1*, 2*, 3, ..., V}, v != u*, of
            -sum_k P_t(u)_k log P_s(v)_k
    L_patch = mean over u in {1, 2} and i in M_u of -sum_k P_t(u)_ik log P_s(u*)_ik,
              0 if M_u is empty
    L = lambda1 L_cls + lambda2 L_patch,
    chance level lambda1 ln K + lambda2 p ln K, p the share of large crops that are masked at all
B global batch, b = B / processes, N patches, D width, S image size in pixels.

Laptop        torchrun ibot.py
1 GPU         torchrun ibot.py --data cifar10
Own photos    torchrun ibot.py --data path/to/photos --recipe flickr8k
8 GPUs        torchrun --nproc_per_node=8 ibot.py --data imagenet

Parameter names are those of the official code, whose checkpoints load strictly (docs/ibot.md).
Differences from the official code:
 - Masks and stochastic depth are functions of seed, epoch, sample and crop, so a run is the same on
   any number of processes. Official: the global random state, seeded alike on all processes.
 - Student and teacher either both share prototypes between class token and patches or both do not,
   and both losses have one tau_t, as in all released runs. Official: separate flags.
 - Blur is a true Gaussian of sigma pixels, colours are floats, and a GPU computes in bfloat16 where
   it can. Official: Pillow's blur, which is made of box filters, bytes, and float16.

Diff against: dino.py.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import UserError, all_gather, checkpoint_blocks, init_distributed, mixed_precision
from common import user_errors, warmup_cosine, world_size
from data import IMAGENET_MEAN, IMAGENET_STD, Loader, color_jitter, draw_jitter, gaussian_blur
from data import grayscale, hflip, normalize, open_dataset, random_resized_crop, solarize, to_float
from knn import probe_sets
from monitor import EvalView
from run import Run, RunArgs, init_weights, parse_args


# ---------------------------------------- arguments ----------------------------------------
@dataclass
class Args(RunArgs):
    data: str = "flocks"  # named dataset or path, see docs/data.md
    eval_data: str = ""  # dataset of the evaluation in the loop (default: the splits of --data)
    recipe: str = ""  # entry of RECIPES to use instead of the one named like --data
    arch: str = "vit_small_patch16"  # vit_{nano,micro,tiny,small,base,large}_patchP
    init_std: float = 0.02  # std of the blocks' initial weights (official code); more if narrow
    zero_init_residual: bool = False  # start residual branches at 0, unlike the official code
    drop_path: float = 0.1  # stochastic depth of the student's last block (official code)
    hidden_dim: int = 2048  # hidden width of the head (as DINO); the bottleneck after it has 256
    out_dim: int = 8192  # K, number of prototypes (Sec. 3.2)
    shared_head: bool = True  # one set of prototypes for class token and patches (Sec. 3.2)
    norm_last_layer: bool = False  # prototypes keep length 1, which is more stable; used for ViT-B
    freeze_last_layer: float = 1.0  # epochs in which the prototypes stay fixed (0: none; official)
    image_size: int = 224  # side of the two global crops in pixels
    local_size: int = 96  # side of the local crops in pixels (as DINO)
    local_crops: int = 10  # L, number of local crops (0: none; --crop-split 0.14 goes with it)
    crop_split: float = 0.25  # s: global crops have area (s, 1), local ones (crop_min, s) (README)
    crop_min: float = 0.05  # smallest area of a local crop, as a share of the image (official code)
    jitter_strength: float = 1.0  # factor of the colour jitter's ranges, s of SimCLR (its App. A)
    blur: bool = True  # blur views as BYOL does; not for CIFAR-10
    mask_shape: Literal["block", "rand"] = "block"  # blocks as in BEiT, or single patches
    mask_prob: float = 0.5  # p, share of the global crops that are masked at all (official code)
    mask_ratio: float = 0.3  # mean share of masked patches in a masked crop (Sec. 3.2); rand: 0.7
    mask_ratio_var: float = 0.2  # that share is uniform within ratio +- this (Sec. 3.2); rand: 0.05
    temperature: float = 0.1  # tau_s, the student's temperature (as DINO)
    teacher_temp: float = 0.07  # tau_t, the teacher's temperature after its warm-up (official)
    warmup_teacher_temp: float = 0.04  # tau_t at the start of its warm-up (official code)
    warmup_teacher_temp_epochs: int = 30  # length of tau_t's linear warm-up (0: none; official)
    teacher_momentum: float = 0.996  # l, first EMA momentum (as DINO); 0.9995 for batch 256
    center_momentum: float = 0.9  # m, momentum of both centers (official code)
    cls_weight: float = 1.0  # lambda1, weight of the class tokens' loss (Sec. 3.2: no weights)
    patch_weight: float = 1.0  # lambda2, weight of the patches' loss
    epochs: int = 800  # passes over the data (Sec. 3.2); 400 for ViT-B
    max_steps: int = 0  # stop after so many steps, without changing the schedule (0: run all of it)
    batch_size: int = 1024  # images of a step, over all processes and pieces (Sec. 3.2)
    accum_steps: int = 1  # encode a batch in so many pieces, exactly
    grad_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute to save memory
    base_lr: float = 5e-4  # peak learning rate: lr = base_lr * batch / 256 (Sec. 3.2)
    min_lr: float = 1e-6  # learning rate at the end of the cosine, not scaled (official code)
    warmup_epochs: float = 10.0  # linear warm-up from 0 (Sec. 3.2)
    weight_decay: float = 0.04  # at the start, on all but biases and norms (as DINO)
    weight_decay_end: float = 0.4  # weight decay after the last step, on a cosine (as DINO)
    clip_grad: float = 3.0  # largest gradient norm of each parameter by itself (0: off)
    init: str = ""  # weights to start from: a run, released weights, a backbone (docs/init.md)
    seed: int = 0  # random seed of weights, order, views, masks and stochastic depth
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on GPUs, else fp32


VITB = dict(
    arch="vit_base_patch16", norm_last_layer=True, freeze_last_layer=3.0, crop_split=0.32,
    warmup_teacher_temp_epochs=50, epochs=400, base_lr=7.5e-4, min_lr=2e-6, clip_grad=0.3,
)
# Epochs and rate as the paper's text has them (its Table 15: 300 epochs). The arguments of this run
# were not published: stochastic depth is that of later users, the rest is ViT-B's
VITL = dict(VITB, arch="vit_large_patch16", epochs=250, base_lr=5e-4, drop_path=0.2)
VITL |= dict(grad_checkpointing="selective")  # to fit 8 GPUs of 80 GB
RAND = dict(mask_shape="rand", mask_ratio=0.7, mask_ratio_var=0.05)
RECIPES = {
    # our own, for the drawn scenes. At first every class token gets the same answer; a low
    # temperature of the teacher and a center that follows quickly make them differ
    "flocks": dict(
        arch="vit_nano_patch8", zero_init_residual=True, image_size=32, local_crops=0,
        crop_split=0.7, jitter_strength=0.0, blur=False, hidden_dim=512, out_dim=64,
        norm_last_layer=True, freeze_last_layer=0.0, drop_path=0.0, teacher_temp=0.02,
        warmup_teacher_temp=0.02, teacher_momentum=0.95, center_momentum=0.5, epochs=3,
        batch_size=128, base_lr=2.8e-3, warmup_epochs=0.2, weight_decay_end=0.04,
    ),
    "shapes": dict(
        arch="vit_micro_patch8", image_size=48, local_size=24, local_crops=2, crop_split=0.4,
        blur=False, hidden_dim=512, out_dim=512, freeze_last_layer=0.0, drop_path=0.0,
        teacher_temp=0.02, warmup_teacher_temp=0.02, teacher_momentum=0.98, epochs=2,
        batch_size=64, base_lr=4e-3, warmup_epochs=0.2,
    ),
    # our own; the second is for an hour of one core
    "cifar10": dict(
        arch="vit_tiny_patch4", image_size=32, local_size=16, local_crops=4, crop_split=0.4,
        blur=False, out_dim=2048, teacher_momentum=0.99, epochs=200, batch_size=512,
    ),
    "cifar10-cpu": dict(
        arch="vit_nano_patch8", init_std=0.08, drop_path=0.0, hidden_dim=512, out_dim=512,
        freeze_last_layer=0.0, image_size=32, local_crops=0, crop_split=0.2, jitter_strength=0.5,
        blur=False, teacher_temp=0.02, warmup_teacher_temp=0.02, teacher_momentum=0.98,
        center_momentum=0.5, epochs=10, batch_size=128, base_lr=2e-3, warmup_epochs=0.3,
        weight_decay_end=0.04,
    ),
    "flickr8k": dict(
        arch="vit_micro_patch8", image_size=96, local_size=48, local_crops=6, out_dim=4096,
        teacher_momentum=0.99, epochs=100, batch_size=128, base_lr=1e-3,
    ),
    # The official runs, with their kNN and linear probe in percent. What differs here stands in the
    # docstring. ViT-B's rate is that of the official arguments; the paper says 5e-4
    "imagenet": {},  # 75.2, 77.9
    "imagenet-vitb16": VITB,  # 77.1, 79.5
    "imagenet-vitb16-rand": dict(VITB, **RAND),  # 77.3, 79.8
    "imagenet-vitl16": VITL,  # 78.0, 81.0
    "imagenet-vitl16-rand": dict(VITL, **RAND),  # 77.7, 81.3
}


# ---------------------------------------- augmentation ----------------------------------------
def draw_mask(rng, side, shape="block", prob=0.5, ratio=0.3, var=0.2):
    """Which of side x side patches are masked: none with probability 1 - prob, otherwise at most a
    share that is uniform in ratio +- var (Sec. 3.2). rng: random.Random. -> bool (side, side)."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    share = min(1, max(0, rng.uniform(ratio - var, ratio + var)))
    budget = share * side**2  # patches that may still be masked
    if rng.random() >= prob:
        budget = 0
    if shape == "rand":
        mask.view(-1)[rng.sample(range(side**2), int(budget))] = True
        return mask
    tries = 0
    while budget > 0 and tries < 10:  # blocks as in BEiT (arXiv 2106.08254, Alg. 1); may overlap
        tries += 1
        area = rng.uniform((side // 3) ** 2, budget)
        aspect = 0.3 ** rng.uniform(-1, 1)
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if h >= side or w >= side:
            continue
        top, left = rng.randint(0, side - h), rng.randint(0, side - w)
        block = mask[top : top + h, left : left + w]
        new = h * w - int(block.sum())
        if 0 < new <= budget:
            block[:] = True
            budget -= new
            tries = 0
    return mask


# Adapted from dino.py: DINOView, with masks
class IBOTView:
    """One of the V crops. The first is always blurred. The second is blurred with probability 0.1
    and solarised with 0.2, local ones are blurred with 0.5 (official code). mask: options of
    draw_mask, for a large crop."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, size, scale=(0.25, 1.0), blur=1.0, solarize=0.0, depth=0, mask=None,
                 strength=1.0):
        self.size = size
        self.scale = scale
        self.blur = blur
        self.solarize = solarize
        self.depth = depth
        self.mask = mask
        self.strength = strength

    def crop(self, image, rng):
        """In a loader worker: uint8 (3, H, W) -> uint8 (3, size, size). rng: random.Random."""
        return random_resized_crop(image, rng, self.size, self.scale, interpolation="bicubic")

    def sample(self, rng):
        """In a loader worker: what else is random about this view of this sample."""
        s = self.strength
        jitter = dict(brightness=0.4 * s, contrast=0.4 * s, saturation=0.2 * s, hue=0.1 * s)
        params = {
            "flip": rng.random() < 0.5,
            "jitter": rng.random() < 0.8,
            "gray": rng.random() < 0.2,
            "blur": rng.random() < self.blur,
            "sigma": rng.uniform(0.1, 2.0),  # pixels
            "solarize": rng.random() < self.solarize,
            **draw_jitter(rng, **jitter),
        }
        # two numbers a block, drawn here: stochastic depth depends on the sample, not the process
        params["drop_path"] = [[rng.random(), rng.random()] for _ in range(self.depth)]
        if self.mask:
            params["mask"] = draw_mask(rng, **self.mask)
        return params

    def __call__(self, x, params):
        """For a batch: uint8 (b, 3, size, size) and stacked parameters -> normalised float."""
        x = hflip(to_float(x), params["flip"])
        factors = [params[name] for name in ("brightness", "contrast", "saturation", "hue")]
        x = color_jitter(x, *factors, params["order"], params["jitter"])
        x = grayscale(x, params["gray"])
        if self.blur:
            x = gaussian_blur(x, params["sigma"], params["blur"], 13)  # 3 sigma on either side
        if self.solarize:
            x = solarize(x, params["solarize"])
        return normalize(x, self.mean, self.std)


# Copied from dino.py: eval_view
def eval_view(args) -> EvalView:
    """The central 87.5% of the shorter side, or the whole of a small image (official code)."""
    resize = round(args.image_size / 0.875)
    if args.image_size <= 32:  # CIFAR
        resize = args.image_size
    return EvalView(args.image_size, resize, "bicubic", IMAGENET_MEAN, IMAGENET_STD)


# ---------------------------------------- backbone ----------------------------------------
# Copied from dino.py: Attention
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


# Copied from dino.py: Block
class Block(nn.Module):
    """Pre-norm block, timm's names. (B, N, D) -> (B, N, D), or the first `queries` tokens of it.
    Stochastic depth (arXiv 1603.09382) leaves either branch out for a share `drop_path` of the
    samples: those whose number in u, (B, 2), is below it."""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, 4 * dim))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * dim, dim))

    def drop(self, y, u):
        if u is None:
            return y
        kept = (u >= self.drop_path) / (1 - self.drop_path)  # (B,): the mean of y does not change
        return y * kept.to(y.dtype)[:, None, None]

    def forward(self, x, u=None, queries=None):
        u1, u2 = None, None
        if u is not None:
            u1, u2 = u.unbind(1)
        x = x[:, :queries] + self.drop(self.attn(self.norm1(x), queries), u1)
        return x + self.drop(self.mlp(self.norm2(x)), u2)


# Adapted from dino.py: VisionTransformer, with a mask token, all tokens on demand
class VisionTransformer(nn.Module):
    """timm's ViT: no norm before the blocks. (B, 3, S, S) -> (B, D), the class token after
    the last norm."""

    def __init__(self, image_size, patch_size, dim, depth, heads, drop_path=0.0, masked=False,
                 init_std=0.02):
        super().__init__()
        patches = (image_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, dim))
        self.masked_embed = None
        if masked:  # the student alone has a mask token
            self.masked_embed = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(3, dim, patch_size, stride=patch_size))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]  # rise linearly from 0
        self.blocks = nn.Sequential(*[Block(dim, heads, rate) for rate in rates])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=init_std)
                nn.init.zeros_(module.bias)

    def interpolate_pos_embed(self, rows, columns):
        """(1, 1 + rows * columns, D): that of the class token, then the trained grid, resized."""
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if rows == columns == side:
            return self.pos_embed
        of_class, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
        # official: 0.1 against rounding down; it shifts the samples too, and checkpoints expect it
        scale = (rows + 0.1) / side, (columns + 0.1) / side
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([of_class, grid.flatten(2).transpose(1, 2)], dim=1)

    def tokens(self, x, mask=None, drop_path=None, queries=None):
        """(B, 3, H, W) -> (B, 1 + N, D), class token and patches after the last norm, or the first
        `queries` of them: the last block computes nothing else. mask: of the patches, (B, N) bool;
        drop_path: uniform numbers (B, depth, 2), which decide about stochastic depth."""
        x = self.patch_embed(x)  # (B, D, rows, columns)
        pos_embed = self.interpolate_pos_embed(*x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)
        if mask is not None:  # before the position is added: a masked patch knows where it is
            x = torch.where(mask[..., None], self.masked_embed.to(x.dtype), x)
        cls_token = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1) + pos_embed
        for i, block in enumerate(self.blocks):
            u = None if drop_path is None else drop_path[:, i]
            last = i + 1 == len(self.blocks)
            x = block(x, u, queries if last else None)
        return self.norm(x)

    def forward(self, x):
        return self.tokens(x)[:, 0]


# ---------------------------------------- model ----------------------------------------
# Adapted from dino.py: DINOHead, with prototypes for patches
class IBOTHead(nn.Module):
    """MLP to a bottleneck, unit length, prototypes. Class tokens (B, D) -> logits (B, K); class
    token and patches (B, 1 + N, D) -> (B, K), (B, N, K2), by the same MLP; with `chosen`, (M,)
    positions among the B N patches, only of these, (M, K2). K2 is patch_out_dim; if that is 0, the
    patches have the prototypes of the class token (Sec. 3.2) and K2 = K."""

    def __init__(self, dim, out_dim, patch_out_dim=0, hidden_dim=2048, bottleneck_dim=256,
                 norm_last_layer=True):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

        def prototypes(number):
            layer = nn.Linear(bottleneck_dim, number, bias=False)  # row k becomes g_k v_k / |v_k|
            layer = nn.utils.parametrizations.weight_norm(layer)
            g = layer.parametrizations.weight.original0  # (K, 1); loads from weight_g too
            nn.init.ones_(g)
            g.requires_grad_(not norm_last_layer)
            return layer

        self.last_layer = prototypes(out_dim)
        self.last_layer2 = self.last_layer
        if patch_out_dim:
            self.last_layer2 = prototypes(patch_out_dim)

    def bottleneck(self, x):
        return F.normalize(self.mlp(x), dim=-1)

    def forward(self, x, chosen=None):
        if x.ndim == 2:
            return self.last_layer(self.bottleneck(x))
        class_token, patches = x[:, 0], x[:, 1:]
        if chosen is not None:
            patches = patches.flatten(0, 1)[chosen]
        logits = self.last_layer(self.bottleneck(class_token))
        return logits, self.last_layer2(self.bottleneck(patches))


# Adapted from dino.py: DINO, with masks and patches, MultiCrop's work in it
class IBOT(nn.Module):
    """Student, teacher, which gradients never reach, and the centers of the teacher's logits."""

    def __init__(self, student, teacher):
        super().__init__()
        teacher.load_state_dict(student.state_dict(), strict=False)  # it has no mask token
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        prototypes = student.head.last_layer.out_features
        patch_prototypes = student.head.last_layer2.out_features
        self.register_buffer("center", torch.zeros(1, prototypes))  # c
        self.register_buffer("center2", torch.zeros(1, 1, patch_prototypes))  # c2

    def forward(self, crops, mask, chosen, drop_path=()):
        """crops: V of (b, 3, S, S), the two global ones first; mask: of their patches, (2 b, N)
        bool; chosen: positions of the masked ones among all, (M,); drop_path: for each crop (b,
        depth, 2), see VisionTransformer.

        Returns logits, rows of the first crop first: of the student for all crops (V b, K) and for
        the M masked patches (M, K2), of the teacher for the unmasked global crops (2 b, K) and for
        all their patches (2 b, N, K2), which the center needs."""
        large, small = crops[:2], crops[2:]
        drop_large, drop_small = None, None
        if drop_path:
            drop_large = torch.cat(drop_path[:2])
        if drop_path and small:
            drop_small = torch.cat(drop_path[2:])
        large = torch.cat(large)
        with torch.no_grad():
            teacher, teacher_patches = self.teacher.head(self.teacher.backbone.tokens(large))
        tokens = self.student.backbone.tokens(large, mask, drop_large)
        student, patches = self.student.head(tokens, chosen)
        if small:  # never masked, and only their class tokens go through the head
            tokens = self.student.backbone.tokens(torch.cat(small), None, drop_small, queries=1)
            student = torch.cat([student, self.student.head(tokens[:, 0])])
        return student, patches, teacher, teacher_patches


# Adapted from dino.py: update_teacher, by name
@torch.no_grad()
def update_teacher(student, teacher, momentum):
    """theta_t <- l theta_t + (1 - l) theta_s (Sec. 3.1). Parameters are matched by name, since the
    student alone has a mask token."""
    theta_t = dict(teacher.named_parameters())
    theta_s = [student.get_parameter(name) for name in theta_t]
    torch._foreach_lerp_(list(theta_t.values()), theta_s, 1 - momentum)


# Copied from dino.py: teacher_temperature
def teacher_temperature(time, start, end, warmup):
    """tau_t in a 0-based epoch, or step: from `start` at 0 on a line to `end` at warmup - 1, then
    constant (official code)."""
    if time >= warmup:
        return end
    return start + (end - start) * time / max(1, warmup - 1)


ARCHS = {  # layers, width, heads
    "vit_nano": (3, 96, 3),  # our own, like the next
    "vit_micro": (4, 128, 4),
    "vit_tiny": (12, 192, 3),
    "vit_small": (12, 384, 6),
    "vit_base": (12, 768, 12),
    "vit_large": (24, 1024, 16),
}


def build_network(args, drop_path=0.0, masked=False) -> nn.ModuleDict:
    """Student or teacher. Raises UserError for an unknown --arch and for sizes that do not fit."""
    name, _, patch = args.arch.partition("_patch")
    if name not in ARCHS or not patch.isdecimal() or int(patch) == 0:
        names = ", ".join(ARCHS)
        raise UserError(f"--arch {args.arch} is unknown, choose one of {names}, with _patchP")
    patch_size = int(patch)
    sizes = {"--image-size": args.image_size}
    if args.local_crops:
        sizes["--local-size"] = args.local_size
    for flag, size in sizes.items():
        if size % patch_size:
            raise UserError(f"{flag} {size} is not a multiple of {patch_size} ({args.arch})")
    layers, width, heads = ARCHS[name]
    backbone = VisionTransformer(
        args.image_size, patch_size, width, layers, heads, drop_path, masked, args.init_std
    )
    if args.zero_init_residual:
        for block in backbone.blocks:
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.fc2.weight)
    patch_out_dim = 0 if args.shared_head else args.out_dim
    head = IBOTHead(width, args.out_dim, patch_out_dim, args.hidden_dim,
                    norm_last_layer=args.norm_last_layer)
    return nn.ModuleDict({"backbone": backbone, "head": head})  # official names


def build_model(args) -> IBOT:
    student = build_network(args, args.drop_path, masked=True)
    teacher = build_network(args)  # without stochastic depth and mask token
    return IBOT(student, teacher)


def image_encoder(model: IBOT) -> nn.Module:
    """Module from images to pooled features (B, D): the teacher's backbone (official code)."""
    return model.teacher.backbone


# ---------------------------------------- loss ----------------------------------------
# Copied from dino.py: dino_loss
def dino_loss(student, teacher, center, teacher_temp, student_temp=0.1):
    """Cross-entropy of the student's crops to the teacher's two (DINO Eq. 3), in nats; chance
    level ln K.

    student: (V b, K) and teacher: (2 b, K) logits of this process, rows of the first crop first,
    any dtype; center: (1, K). Call it outside autocast. Returns loss, entropy of P_t and
    KL(P_t, P_s) (DINO Eq. 5), means over this process's b images: the means over processes are
    those of the global batch, nothing needs to be gathered."""
    n_views = 2 * len(student) // len(teacher)
    log_p_s = F.log_softmax(student.float() / student_temp, dim=-1).chunk(n_views)  # DINO Eq. 1
    centered = teacher.detach().float() - center
    log_p_t = F.log_softmax(centered / teacher_temp, dim=-1)  # sharpened
    p_t = log_p_t.exp().chunk(2)
    terms = []
    for x in range(2):
        for y in range(n_views):
            if x != y:  # no crop predicts itself
                terms.append(-(p_t[x] * log_p_s[y]).sum(-1).mean())
    loss = sum(terms) / len(terms)
    entropy = -(log_p_t.exp() * log_p_t).sum(-1).mean()
    kl = loss.detach() - entropy  # DINO Eq. 5
    return loss, entropy, kl


def patch_loss(student, teacher, mask, chosen, center, teacher_temp, student_temp=0.1):
    """Cross-entropy of the student's masked patches to the teacher's unmasked ones (Sec. 3.1), in
    nats; chance level p ln K2, p the share of crops with a mask: the others count as 0 (official
    code).

    student: logits (M, K2) of this process, any dtype; teacher: (2 b, N, K2); mask: (2 b, N) bool;
    chosen: positions of the M patches in it (M,); center: (1, 1, K2). Call it outside autocast. A
    mean over the masked patches of a crop, then over the 2 b crops of this process."""
    log_p_s = F.log_softmax(student.float() / student_temp, dim=-1)  # (M, K2)
    centered = teacher.detach().flatten(0, 1)[chosen].float() - center[0]
    p_t = F.softmax(centered / teacher_temp, dim=-1)
    terms = (p_t * log_p_s).sum(-1)  # (M,)
    weight = 1 / mask.sum(1, keepdim=True).clamp(min=1)  # (2 b, 1): of each patch in its crop
    weight = weight.expand_as(mask).flatten()[chosen]
    return -(terms * weight).sum() / len(mask)


# Copied from dino.py: update_center
@torch.no_grad()
def update_center(center, teacher, momentum=0.9):
    """c <- m c + (1 - m) mean of the teacher's logits (2 b, K) over the global batch (DINO
    Eq. 4), in place. To be called after the loss: a batch is centered by the batches before it."""
    mean = teacher.float().mean(0, keepdim=True)  # (1, K), of this process
    mean = all_gather(mean).mean(0, keepdim=True)
    center.lerp_(mean, 1 - momentum)


# ---------------------------------------- training ----------------------------------------
def train(args: Args) -> dict:
    """Trains and returns the last evaluation. Raises UserError for mistakes the user can fix."""
    device = init_distributed(args.device)
    torch.manual_seed(args.seed)
    autocast, scaler = mixed_precision(args.dtype, device)

    # data
    dataset = open_dataset(args.data, args.data_dir)
    probe, bank, val = probe_sets(args, dataset)
    model = build_model(args)
    depth = 0  # blocks for which a view draws numbers
    if args.drop_path:
        depth = len(model.student.backbone.blocks)
    side = args.image_size // int(args.arch.partition("_patch")[2])  # patches
    masking = dict(
        side=side, shape=args.mask_shape, prob=args.mask_prob, ratio=args.mask_ratio,
        var=args.mask_ratio_var,
    )
    large = args.crop_split, 1.0  # shares of the area
    small = args.crop_min, args.crop_split
    s = args.jitter_strength
    local = IBOTView(args.local_size, small, 0.5 * args.blur, 0.0, depth, strength=s)
    views = {
        "global1": IBOTView(args.image_size, large, 1.0 * args.blur, 0.0, depth, masking, s),
        "global2": IBOTView(args.image_size, large, 0.1 * args.blur, 0.2, depth, masking, s),
    }
    for i in range(args.local_crops):
        views[f"local{i + 1}"] = local
    loader = Loader(dataset, views, {}, args.batch_size, args.seed, args.workers, device)
    b = args.batch_size // world_size()

    # model and optimizer
    if b % args.accum_steps:
        raise UserError(f"--accum-steps {args.accum_steps} does not divide a process's {b} samples")
    piece = b // args.accum_steps
    model = model.to(device, memory_format=torch.channels_last)
    init_weights(model, args)
    checkpoint_blocks(model, args.grad_checkpointing, Block)
    if args.compile:
        model.compile()
    trained = [p for p in model.parameters() if p.requires_grad]  # all but the teacher's
    decay = [p for p in trained if p.ndim >= 2]
    no_decay = [p for p in trained if p.ndim < 2]  # norms and biases
    groups = [
        {"params": decay, "weight_decay": args.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    peak = args.base_lr * args.batch_size / 256
    optimizer = torch.optim.AdamW(groups, lr=peak, fused=True)

    # run directory; continues from its checkpoint if it has one
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = Run("ibot", args, loader, state)
    run.say(f"lr = {args.base_lr} * {args.batch_size} / 256 = {peak:g}")
    cls_chance = math.log(args.out_dim)
    patch_chance = args.mask_prob * cls_chance  # on average over batches
    chance = args.cls_weight * cls_chance + args.patch_weight * patch_chance
    run.say(f"collapse: kl is 0 and teacher_entropy is ln {args.out_dim} = {cls_chance:.3f} or 0")
    warmup = round(args.warmup_epochs * loader.steps_per_epoch)
    ddp = DistributedDataParallel(model) if world_size() > 1 else model
    temp_warmup = args.warmup_teacher_temp_epochs
    if val and not run.evaluation and run.due(args.eval_every):  # random weights, or one cut off
        run.log_evaluation(probe(image_encoder(model), bank, val, eval_view(args), device))

    for step, batch in run.batches():
        crops = [batch[name] for name in views]
        params = batch["params"]
        drop_path = []
        if depth:
            drop_path = [params[name]["drop_path"] for name in views]
        # (b, N); counted on the CPU, which would wait for a GPU's count in the head and the loss
        masks = [params[name]["mask"].flatten(1).cpu() for name in ("global1", "global2")]
        lr = warmup_cosine(step, run.total, warmup, peak, end=args.min_lr, reach_peak=True)
        for group in optimizer.param_groups:
            group["lr"] = lr
        start, end = args.weight_decay, args.weight_decay_end
        weight_decay = warmup_cosine(step, run.total, 0, start, end=end)
        optimizer.param_groups[0]["weight_decay"] = weight_decay
        epoch = step // loader.steps_per_epoch
        start, end = args.warmup_teacher_temp, args.teacher_temp
        teacher_temp = teacher_temperature(epoch, start, end, temp_warmup)

        temps = teacher_temp, args.temperature
        sums, teachers, patch_means = 0.0, [], []
        for first in range(0, b, piece):
            rows = slice(first, first + piece)
            mask = torch.cat([m[rows] for m in masks])  # (2 b, N), b samples of a piece
            positions = torch.arange(mask.numel())
            chosen = positions[mask.flatten()]
            mask = loader.to_device(mask)
            chosen = loader.to_device(chosen)
            inputs = [x[rows] for x in crops], mask, chosen, [u[rows] for u in drop_path]
            ddp.require_backward_grad_sync = first + piece == b  # DDP sends gradients once
            with autocast:
                student, patches, teacher, teacher_patches = ddp(*inputs)
            cls, entropy, kl = dino_loss(student, teacher, model.center, *temps)
            patch = patch_loss(patches, teacher_patches, mask, chosen, model.center2, *temps)
            loss = args.cls_weight * cls + args.patch_weight * patch
            losses = torch.stack([loss, cls, patch, entropy, kl]) / args.accum_steps
            scaler.scale(losses[0]).backward()
            sums = sums + losses.detach()
            teachers.append(teacher)
            mean = teacher_patches.flatten(0, 1).mean(0, keepdim=True, dtype=torch.float32)
            patch_means.append(mean)  # of all patches, masked or not (official code)
        update_center(model.center, torch.cat(teachers), args.center_momentum)
        update_center(model.center2[0], torch.cat(patch_means), args.center_momentum)
        if args.clip_grad:
            scaler.unscale_(optimizer)
            for p in trained:  # each by itself (official code)
                nn.utils.clip_grad_norm_(p, args.clip_grad)
        if step < args.freeze_last_layer * loader.steps_per_epoch:
            for name, p in model.student.head.named_parameters():
                if "last_layer" in name:
                    p.grad = None  # no step, no decay and no moments either
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        momentum = warmup_cosine(step, run.total, 0, args.teacher_momentum, end=1.0)
        update_teacher(model.student, model.teacher, momentum)

        loss, cls, patch, entropy, kl = sums
        masked = loader.to_device(torch.cat(masks).float().mean())
        terms = {
            "loss": (loss, chance),
            "cls_loss": (cls, cls_chance),
            "patch_loss": (patch, patch_chance),
            "teacher_entropy": (entropy, None),
            "kl": (kl, None),
            "masked": (masked, None),
        }
        run.end_step(
            terms, teacher_entropy_chance=cls_chance, teacher_temp=teacher_temp,
            teacher_momentum=momentum, weight_decay=weight_decay, lr=lr,
        )
        if run.agree_to_stop() or run.due(args.save_every, args.keep_every):
            run.save()
        if val and run.due(args.eval_every):
            run.log_evaluation(probe(image_encoder(model), bank, val, eval_view(args), device))

    return run.finish("knn", val)


if __name__ == "__main__":
    with user_errors():
        train(parse_args(Args, RECIPES))
