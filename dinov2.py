"""DINOv2: Learning Robust Visual Features without Supervision
(Oquab et al. 2023, arXiv 2304.07193).

DINO's loss on class tokens and iBOT's on masked patches, plus changes for scale (Table 1): KoLeo
spreads features; LayerScale and strong stochastic depth stabilise training; Sinkhorn-Knopp may
replace centers. The official short run has lower rates for lower layers too. Registers (arXiv
2309.16588) take up what large networks otherwise store in patches of the background.

Loss (Sec. 4), symbols as in ibot.py, f the student's class token of unit length, before the head:
    P_s = softmax(g_s / tau_s),  P_t = softmax((g_t - c) / tau_t) or Sinkhorn-Knopp of g_t / tau_t
    L_DINO, L_iBOT: cross-entropies of P_s to P_t as in ibot.py, chance level ln K and p ln K
    L_KoLeo = sum over large crops of -mean_i ln min_{j != i} |f_i - f_j|, j in the batch or group
    L = L_DINO + lambda1 L_iBOT + lambda2 L_KoLeo,  chance level (1 + lambda1 p) ln K without KoLeo
B global batch, b = B / processes, N patches, M masked ones here, D width, S image size in pixels.

Laptop        torchrun dinov2.py
1 GPU         torchrun dinov2.py --data cifar10
Own photos    torchrun dinov2.py --data path/to/photos --recipe flickr8k
8 GPUs        torchrun --nproc_per_node=8 dinov2.py --data imagenet (--fsdp for large models)

Official backbones load strictly (docs/dinov2.md). Differences from the official code:
 - Masks and stochastic depth are the sample's own, so a run is the same on any number of processes.
   Official: exactly half of a GPU's crops are masked, and a fixed number of samples is dropped.
 - All masked patches weigh the same in their center. Official: all GPUs weigh the same.
 - Epochs are passes over the data. Official: 1,250 steps, 2 passes over ImageNet at batch 2048.
 - Colours are floats and a GPU computes by autocast. Official: bytes, and float16 parameters.

Diff against: ibot.py.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
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
    arch: str = "vit_large_patch16"  # vit_{nano,micro,tiny,small,base,large,giant}_patchP
    ffn: Literal["mlp", "swiglu"] = "mlp"  # feed-forward layer (Table 17: swiglu from scratch)
    registers: int = 0  # tokens without a place or a loss (0: none; 4 in arXiv 2309.16588)
    layer_scale: float = 1e-5  # factor of each residual branch at the start (official code)
    drop_path: float = 0.3  # stochastic depth of every block of the student (official code)
    hidden_dim: int = 2048  # hidden width of the heads
    bottleneck_dim: int = 256  # bottleneck of the head; untied: of class tokens' (large data: 384)
    out_dim: int = 65536  # K, number of prototypes (official code)
    shared_head: bool = True  # one head for both losses; off ("untied") for large data (Sec. 4)
    freeze_last_layer: float = 2.0  # epochs in which the prototypes stay fixed (0: none; official)
    image_size: int = 224  # side of the two global crops in pixels
    local_size: int = 96  # side of the local crops in pixels
    local_crops: int = 8  # L, number of local crops (0: global crops alone)
    crop_split: float = 0.32  # s: global crops have area (s, 1), local ones (crop_min, s)
    crop_min: float = 0.05  # smallest area of a local crop, as a share of the image (official code)
    jitter_strength: float = 1.0  # factor of the colour jitter's ranges, s of SimCLR (its App. A)
    blur: bool = True  # blur views; not for CIFAR-10
    mask_prob: float = 0.5  # p, share of the global crops that are masked at all
    mask_ratio: float = 0.3  # mean share of masked patches in a masked crop
    mask_ratio_var: float = 0.2  # that share is uniform within ratio +- this
    centering: Literal["center", "sinkhorn"] = "center"  # sinkhorn for large data (Sec. 4)
    teacher_temp: float = 0.07  # tau_t, the teacher's temperature after its warm-up
    warmup_teacher_temp: float = 0.04  # tau_t at the start of its warm-up
    warmup_teacher_temp_epochs: float = 60.0  # length of tau_t's linear warm-up (0: none)
    teacher_momentum: float = 0.992  # l, first EMA momentum (official code; App. B.1: 0.994)
    patch_weight: float = 1.0  # lambda1, weight of the patches' loss (official code)
    koleo_weight: float = 0.1  # lambda2, weight of the KoLeo loss (App. B.1; 0: without)
    koleo_group: int = 0  # samples among which KoLeo looks for neighbours (0: the global batch)
    epochs: int = 200  # passes over the data; official: 100 of 1,250 steps
    max_steps: int = 0  # stop after so many steps, without changing the schedule (0: run all of it)
    batch_size: int = 2048  # images of a step, over all processes and pieces
    accum_steps: int = 1  # encode a batch in so many pieces, exactly; each holds whole KoLeo groups
    grad_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute to save memory
    base_lr: float = 4e-3  # peak learning rate: lr = base_lr * sqrt(batch / 1024)
    min_lr: float = 1e-6  # learning rate at the end of the cosine, not scaled
    warmup_epochs: float = 20.0  # linear warm-up from 0
    layer_decay: float = 0.9  # learning rate of a layer, as a share of that of the layer above
    patch_embed_lr: float = 0.2  # factor of the patch embedding's learning rate, beside that decay
    weight_decay: float = 0.04  # at the start, on all but biases, norms and scales
    weight_decay_end: float = 0.4  # weight decay after the last step, on a cosine
    clip_grad: float = 3.0  # largest gradient norm of backbone and of each head (0: off)
    fsdp: bool = False  # shard parameters, gradients and optimizer over the processes (Sec. 5)
    init: str = ""  # weights to start from: a run, released weights, a backbone (docs/init.md)
    seed: int = 0  # random seed of weights, order, views, masks and stochastic depth
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on GPUs, else fp32


SMALL = dict(arch="vit_nano_patch8", image_size=32, local_crops=0, blur=False, layer_scale=1.0,
             freeze_last_layer=0.0, drop_path=0.0, centering="sinkhorn", layer_decay=1.0,
             patch_embed_lr=1.0, batch_size=128, weight_decay_end=0.04)
RECIPES = {  # our own, but for the last two
    "flocks": dict(SMALL, crop_split=0.7, jitter_strength=0.0, hidden_dim=512, out_dim=64,
                   teacher_temp=0.02, warmup_teacher_temp=0.02, teacher_momentum=0.95,
                   koleo_weight=0.5, epochs=3, warmup_epochs=0.2),
    "cifar10-cpu": dict(SMALL, crop_split=0.3, jitter_strength=0.25, hidden_dim=1024, out_dim=512,
                        teacher_temp=0.03, warmup_teacher_temp=0.03, teacher_momentum=0.97,
                        epochs=10, warmup_epochs=0.3),
    "shapes": dict(arch="vit_micro_patch8", image_size=48, local_size=24, local_crops=2,
                   layer_scale=1.0, blur=False, hidden_dim=512, out_dim=512, freeze_last_layer=0.0,
                   drop_path=0.0, teacher_temp=0.02, warmup_teacher_temp=0.02,
                   teacher_momentum=0.98, epochs=2, batch_size=64, base_lr=4e-3, warmup_epochs=0.2),
    "cifar10": dict(arch="vit_tiny_patch4", image_size=32, local_size=16, local_crops=4,
                    crop_split=0.4, blur=False, out_dim=2048, drop_path=0.1, teacher_momentum=0.99,
                    batch_size=512),
    "flickr8k": dict(arch="vit_micro_patch8", image_size=96, local_size=48, local_crops=6,
                     out_dim=4096, drop_path=0.1, teacher_momentum=0.99, epochs=100,
                     batch_size=128),
    # the official short run on GPUs with 64 images each; what differs stands in the docstring
    "imagenet": dict(koleo_group=64, grad_checkpointing="full"),  # kNN 81.6%, linear probe 82.9%
    # the official vitl14, from scratch: 625,000 steps, 135 passes over ImageNet-22k on 96 GPUs of
    # 32 images each; warm-ups are shares of it. kNN 82.0%, linear probe 84.5%
    "imagenet22k-vitl14": dict(
        arch="vit_large_patch14", local_size=98, ffn="swiglu", drop_path=0.4, shared_head=False,
        out_dim=131072, bottleneck_dim=384, centering="sinkhorn", teacher_momentum=0.994,
        epochs=135, batch_size=3072, base_lr=2e-4, warmup_epochs=21.6, layer_decay=1.0,
        warmup_teacher_temp_epochs=8.1, freeze_last_layer=0.27, weight_decay_end=0.2,
        koleo_group=32,
    ),
}


# ---------------------------------------- augmentation ----------------------------------------
# Adapted from ibot.py: draw_mask, smaller blocks only
def draw_mask(rng, side, prob=0.5, ratio=0.3, var=0.2):
    """Which of side x side patches are masked: none with probability 1 - prob, otherwise at most a
    share that is uniform in ratio +- var (official code). -> bool (side, side)."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    share = min(1, max(0, rng.uniform(ratio - var, ratio + var)))
    budget = int(share * side**2)  # patches that may still be masked
    if rng.random() >= prob:
        budget = 0
    tries = 0
    while budget > 0 and tries < 10:  # blocks as in BEiT (arXiv 2106.08254, Alg. 1); may overlap
        tries += 1
        most = min(budget, side**2 / 2)
        area = rng.uniform(4, most)
        aspect = 0.3 ** rng.uniform(-1, 1)
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if h >= side or w >= side:
            continue
        top, left = rng.randint(0, side - h), rng.randint(0, side - w)
        block = mask[top : top + h, left : left + w]
        new = h * w - int(block.sum())
        if 0 < new <= most:
            block[:] = True
            budget -= new
            tries = 0
    return mask


# Adapted from ibot.py: IBOTView, other blur
class DINOv2View:
    """One of the V crops, blurred as for the released models (docs/dinov2.md): the first never, the
    second with probability 0.9, local ones with 0.5. mask: options of draw_mask, or None."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, size, scale=(0.32, 1.0), blur=0.0, solarize=0.0, depth=0, mask=None,
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
            "solarize": rng.random() < self.solarize,
            "sigma": rng.uniform(0.1, 2.0),  # pixels
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
            x = gaussian_blur(x, params["sigma"], params["blur"], 9)  # official code
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
# Adapted from dino.py: Block, with LayerScale and SwiGLU; dropped samples are not computed
class Block(nn.Module):
    """Pre-norm block with LayerScale (arXiv 2103.17239). (B, N, D) -> (B, N, D). Stochastic depth
    leaves a branch out for samples whose number in u, (B, 2), is below `drop_path` (Sec. 5)."""

    def __init__(self, dim, heads, drop_path=0.0, swiglu=False, gamma=1e-5):
        super().__init__()
        self.heads = heads
        self.drop_path = drop_path
        self.swiglu = swiglu
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.ls1 = nn.ParameterDict({"gamma": torch.full((dim,), gamma)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        if swiglu:
            hidden = (int(8 * dim / 3) + 7) // 8 * 8  # about as many weights as the MLP
            layers = {"w12": nn.Linear(dim, 2 * hidden), "w3": nn.Linear(hidden, dim)}
        else:
            layers = {"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.ModuleDict(layers)
        self.ls2 = nn.ParameterDict({"gamma": torch.full((dim,), gamma)})

    def attention(self, x):
        qkv = self.attn.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads) each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.attn.proj(x.transpose(1, 2).flatten(2))

    def feed_forward(self, x):
        if not self.swiglu:
            return self.mlp.fc2(F.gelu(self.mlp.fc1(x)))
        gate, value = self.mlp.w12(x).chunk(2, dim=-1)  # arXiv 2002.05202
        return self.mlp.w3(F.silu(gate) * value)

    def add(self, x, branch, u):
        if u is None:
            return x + branch(x)
        kept = (u >= self.drop_path).nonzero().squeeze(1)  # rows
        kept = kept.to(x.device, non_blocking=x.device.type != "mps")  # which would read too late
        if len(kept) == 0:  # flash attention refuses an empty batch: compute one row, add nothing
            return x + 0 * branch(x[:1])
        y = branch(x[kept]) / (1 - self.drop_path)
        return x.index_add(0, kept, y.to(x.dtype))

    def forward(self, x, u=None):
        u1, u2 = (None, None) if u is None else u.unbind(1)
        x = self.add(x, lambda x: self.ls1.gamma * self.attention(self.norm1(x)), u1)
        return self.add(x, lambda x: self.ls2.gamma * self.feed_forward(self.norm2(x)), u2)


# Adapted from ibot.py: VisionTransformer, with registers, LayerScale and SwiGLU
class VisionTransformer(nn.Module):
    """timm's ViT. (B, 3, S, S) -> (B, D), the class token after the last norm."""

    def __init__(self, image_size, patch_size, dim, depth, heads, drop_path=0.0, registers=0,
                 swiglu=False, gamma=1e-5):
        super().__init__()
        patches = (image_size // patch_size) ** 2
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, patches + 1, dim))
        self.register_tokens = None
        if registers:
            self.register_tokens = nn.Parameter(1e-6 * torch.randn(1, registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, stride=patch_size)})
        blocks = [Block(dim, heads, drop_path, swiglu, gamma) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def interpolate_pos_embed(self, rows, columns):
        """(1, 1 + rows * columns, D): that of the class token, then the trained grid, resized."""
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if rows == columns == side:
            return self.pos_embed
        of_class, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
        # Official: 0.1 against rounding down, which shifts the samples too; not with registers
        if self.register_tokens is None:
            scale = (rows + 0.1) / side, (columns + 0.1) / side
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        else:
            grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True)
        return torch.cat([of_class, grid.flatten(2).transpose(1, 2)], dim=1)

    def tokens(self, x, mask=None, drop_path=None):
        """(B, 3, H, W) -> (B, 1 + N, D), class token and patches after the last norm. mask: (B, N)
        bool; drop_path: uniform numbers (B, depth, 2), which decide about stochastic depth."""
        x = self.patch_embed.proj(x)  # (B, D, rows, columns)
        pos_embed = self.interpolate_pos_embed(*x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)
        if mask is not None:  # before the position is added: a masked patch knows where it is
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        cls_token = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1) + pos_embed
        if self.register_tokens is not None:  # after the class token, without a position
            registers = self.register_tokens.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        for i, block in enumerate(self.blocks):
            u = None if drop_path is None else drop_path[:, i]
            x = block(x, u)
        x = self.norm(x)
        patches = x[:, 1 - pos_embed.shape[1] :]
        return torch.cat([x[:, :1], patches], dim=1)  # without the registers

    def forward(self, x):
        return self.tokens(x)[:, 0]


# ---------------------------------------- model ----------------------------------------
# Adapted from ibot.py: IBOTHead, for class token or patches; all prototypes learn their length
class DINOHead(nn.Module):
    """MLP to a bottleneck, unit length, prototypes (Sec. 4). (B, D) -> (B, K), the logits."""

    def __init__(self, dim, out_dim, hidden_dim=2048, bottleneck_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        prototypes = nn.Linear(bottleneck_dim, out_dim, bias=False)  # row k becomes g_k v_k / |v_k|
        self.last_layer = nn.utils.parametrizations.weight_norm(prototypes)
        g = self.last_layer.parametrizations.weight.original0  # (K, 1); loads from weight_g too
        nn.init.ones_(g)

    def forward(self, x):
        x = F.normalize(self.mlp(x), dim=-1)
        return self.last_layer(x)


# Adapted from ibot.py: IBOT, only masked patches go through the heads
class DINOv2(nn.Module):
    """Student, teacher, which gradients never reach, and the centers of the teacher's logits."""

    def __init__(self, student, teacher):
        super().__init__()
        teacher.load_state_dict(student.state_dict())
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        prototypes = student.dino_head.last_layer.out_features
        self.register_buffer("center", torch.zeros(1, prototypes))  # c
        self.register_buffer("center2", torch.zeros(1, 1, prototypes))  # c2

    def forward(self, crops, mask, chosen, drop_path=()):
        """The student. crops: V of (b, 3, S, S), global ones first; mask: of their patches, (2 b,
        N) bool; chosen: positions of the masked ones among all, (M,); drop_path: (b, depth, 2) for
        each crop. -> logits, rows of the first crop first, for all crops (V b, K) and masked
        patches (M, K); class tokens of the global crops."""
        large = torch.cat(crops[:2])
        small = crops[2:]
        drop_large, drop_small = None, None
        if drop_path:
            drop_path = torch.cat(drop_path)  # (V b, depth, 2)
            drop_large, drop_small = drop_path[: len(large)], drop_path[len(large) :]
        tokens = self.student.backbone.tokens(large, mask, drop_large)
        patches = tokens[:, 1:].flatten(0, 1)
        patches = self.student.ibot_head(patches[chosen])
        features = class_tokens = tokens[:, 0]
        if small:  # never masked
            tokens = self.student.backbone.tokens(torch.cat(small), None, drop_small)
            class_tokens = torch.cat([features, tokens[:, 0]])
        return self.student.dino_head(class_tokens), patches, features

    @torch.no_grad()
    def teach(self, crops, chosen):
        """The teacher's logits for unmasked global crops (2 b, K) and the same patches (M, K)."""
        tokens = self.teacher.backbone.tokens(torch.cat(crops[:2]))
        patches = tokens[:, 1:].flatten(0, 1)
        patches = self.teacher.ibot_head(patches[chosen])
        return self.teacher.dino_head(tokens[:, 0]), patches


# Adapted from dino.py: update_teacher, of networks without batch norm
@torch.no_grad()
def update_teacher(student, teacher, momentum):
    """theta_t <- l theta_t + (1 - l) theta_s (App. B.1)."""
    theta_s, theta_t = list(student.parameters()), list(teacher.parameters())
    torch._foreach_lerp_(theta_t, theta_s, 1 - momentum)


# Copied from dino.py: teacher_temperature
def teacher_temperature(time, start, end, warmup):
    """tau_t in a 0-based epoch, or step: from `start` at 0 on a line to `end` at warmup - 1, then
    constant (official code)."""
    if time >= warmup:
        return end
    return start + (end - start) * time / max(1, warmup - 1)


ARCHS = {  # layers, width, heads (Table 17)
    "vit_nano": (3, 96, 3),  # our own, like the next
    "vit_micro": (4, 128, 4),
    "vit_tiny": (12, 192, 3),  # not in the paper
    "vit_small": (12, 384, 6),
    "vit_base": (12, 768, 12),  # as released; the table prints 18 layers
    "vit_large": (24, 1024, 16),
    "vit_giant": (40, 1536, 24),
}


def build_network(args, drop_path=0.0) -> nn.ModuleDict:
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
        args.image_size, patch_size, width, layers, heads, drop_path,
        args.registers, args.ffn == "swiglu", args.layer_scale,
    )
    dino_head = DINOHead(width, args.out_dim, args.hidden_dim, args.bottleneck_dim)
    ibot_head = dino_head
    if not args.shared_head:  # its bottleneck stays 256 (official code)
        ibot_head = DINOHead(width, args.out_dim, args.hidden_dim)
    return nn.ModuleDict({"backbone": backbone, "dino_head": dino_head, "ibot_head": ibot_head})


def build_model(args) -> DINOv2:
    student = build_network(args, args.drop_path)
    teacher = build_network(args)  # without stochastic depth
    return DINOv2(student, teacher)


def image_encoder(model: DINOv2) -> nn.Module:
    """Module from images to pooled features (B, D): the teacher's backbone (official code)."""
    return model.teacher.backbone


# ---------------------------------------- loss ----------------------------------------
# Adapted from ibot.py: update_center, after the softmax, for any number of rows
@torch.no_grad()
def center_softmax(teacher, center, teacher_temp, momentum=0.9):
    """Logits (n, K) of this process, center (1, K) -> P_t (n, K) with the center before the update
    c <- m c + (1 - m) mean of all processes' logits (DINO Eq. 4), in place."""
    p_t = F.softmax((teacher.float() - center) / teacher_temp, dim=-1)
    total = all_gather(teacher.float().sum(0, keepdim=True)).sum(0)  # (K,)
    rows = torch.full((1,), len(teacher), device=center.device)
    rows = all_gather(rows).sum()
    mean = total / rows.clamp(min=1)
    # it can happen that no patch of the global batch is masked, and then the center stays
    center.lerp_(mean, (1 - momentum) * (rows > 0))
    return p_t


@torch.no_grad()
def sinkhorn_knopp(teacher, teacher_temp, iterations=3):
    """Logits (n, K) of this process -> P_t (n, K): columns and rows are rescaled in turn, so that
    the global batch takes all prototypes about equally often (Sec. 4; arXiv 2006.09882)."""
    q = teacher.float() / teacher_temp  # logarithms, which neither overflow nor vanish
    for _ in range(iterations):
        columns = q.logsumexp(0, keepdim=True)  # (1, K), -inf if this process has no row
        q = q - all_gather(columns).logsumexp(0)  # prototypes
        q = q - q.logsumexp(1, keepdim=True)  # samples
    return q.exp()


def dino_loss(student, p_t, student_temp=0.1):
    """Cross-entropy of the student's crops to the teacher's two (Sec. 4), in nats; chance level
    ln K. student: logits (V b, K) of this process, any dtype; p_t: (2 b, K). Call it outside
    autocast. Returns loss, entropy of P_t and KL(P_t, P_s), means over this process's b images."""
    n_views = 2 * len(student) // len(p_t)
    log_p_s = F.log_softmax(student.float() / student_temp, dim=-1).chunk(n_views)
    entropy = torch.special.entr(p_t).sum(-1).mean()
    p_t = p_t.chunk(2)
    terms = []
    for x in range(2):
        for y in range(n_views):
            if x != y:  # no crop predicts itself
                terms.append(-(p_t[x] * log_p_s[y]).sum(-1).mean())
    loss = sum(terms) / len(terms)
    kl = loss.detach() - entropy
    return loss, entropy, kl


def patch_loss(student, p_t, mask, chosen, student_temp=0.1):
    """The same for the student's masked patches (Sec. 4), chance level p ln K: crops without a mask
    count as 0 (official code). student: logits (M, K); p_t: (M, K); mask: (2 b, N) bool; chosen:
    positions of the M patches in it (M,). A mean over the masked patches of a crop, then over this
    process's 2 b crops."""
    log_p_s = F.log_softmax(student.float() / student_temp, dim=-1)
    terms = (p_t * log_p_s).sum(-1)  # (M,)
    weight = 1 / mask.sum(1, keepdim=True).clamp(min=1)  # (2 b, 1): of each patch in its crop
    weight = weight.expand_as(mask).flatten()[chosen]
    return -(terms * weight).sum() / len(mask)


def koleo_loss(features, group=0, eps=1e-8):
    """-mean ln of the distance to the nearest neighbour (Sec. 4; arXiv 1806.03198), of features
    (b, D) of this process, any length and dtype. Call it outside autocast. Neighbours are looked
    for in the gathered batch or, with group, among that many samples which follow each other in it.
    Every process returns the loss of the global batch, large if two features are nearly equal."""
    x = all_gather(features.float())
    x = F.normalize(x, dim=-1, eps=eps)
    x = x.unflatten(0, (-1, group or len(x)))  # (groups, n, D)
    cosines = (x @ x.mT).detach()
    cosines.diagonal(dim1=1, dim2=2).fill_(-1)  # no sample is its own neighbour
    nearest = cosines.argmax(-1, keepdim=True)  # (groups, n, 1)
    neighbours = x.gather(1, nearest.expand_as(x))
    distance = F.pairwise_distance(x, neighbours, eps=eps)
    return -(distance + eps).log().mean()


# ---------------------------------------- training ----------------------------------------
def multipliers(name, depth, layer_decay, patch_embed_lr):
    """Factors of a parameter's learning rate and weight decay, and whether it is frozen at first.
    Layer 0 stands before the blocks, layer depth + 1 behind them (official code)."""
    block = re.search(r"blocks\.(\d+)\.", name)
    if block:
        layer = int(block[1]) + 1
    elif "_token" in name or "_embed" in name:
        layer = 0
    else:
        layer = depth + 1
    lr_factor = layer_decay ** (depth + 1 - layer)
    if "patch_embed" in name:
        lr_factor *= patch_embed_lr
    decay_factor = 1.0
    if name.endswith("bias") or "norm" in name or "gamma" in name:
        decay_factor = 0.0
    last_layer = "last_layer" in name
    return {"lr_factor": lr_factor, "decay_factor": decay_factor, "last_layer": last_layer}


def parameter_groups(student, layer_decay, patch_embed_lr):
    """Groups for the optimizer. Parameters with the same factors are one group."""
    depth = len(student.backbone.blocks)
    groups = {}
    for name, p in student.named_parameters():
        factors = multipliers(name, depth, layer_decay, patch_embed_lr)
        group = groups.setdefault(tuple(factors.values()), {"params": [], **factors})
        group["params"].append(p)
    return list(groups.values())


class Gathered:
    """State of a model sharded by --fsdp, or of its optimizer, as a checkpoint holds it: whole
    tensors, on the CPU of the first process. All processes have to ask for it together."""

    def __init__(self, get, put, *items):
        self.get, self.put, self.items = get, put, items

    def state_dict(self):
        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        return self.get(*self.items, options=options)

    def load_state_dict(self, state):
        options = dcp.StateDictOptions(full_state_dict=True)
        self.put(*self.items, state, options=options)


def full_encoder(model, args):
    """image_encoder(model); with --fsdp a copy of it whose parameters are whole."""
    encoder = image_encoder(model)
    if args.fsdp:
        options = dcp.StateDictOptions(full_state_dict=True)
        state = dcp.get_model_state_dict(encoder, options=options)
        with torch.device("meta"):  # takes neither memory nor random numbers
            encoder = build_network(args).backbone
        encoder.load_state_dict(state, assign=True)
    return encoder


def train(args: Args) -> dict:
    """Trains and returns the last evaluation. Raises UserError for mistakes the user can fix."""
    device = init_distributed(args.device)
    torch.manual_seed(args.seed)
    autocast, scaler = mixed_precision(args.dtype, device)

    # data
    dataset = open_dataset(args.data, args.data_dir)
    probe, bank, val = probe_sets(args, dataset)
    model = build_model(args).to(device)
    blocks = model.student.backbone.blocks
    depth = 0  # blocks for which a view draws numbers
    if args.drop_path:
        depth = len(blocks)
    side = args.image_size // int(args.arch.partition("_patch")[2])  # patches
    masking = dict(side=side, prob=args.mask_prob, ratio=args.mask_ratio, var=args.mask_ratio_var)
    large = args.crop_split, 1.0  # shares of the area
    small = args.crop_min, args.crop_split
    s = args.jitter_strength
    local = DINOv2View(args.local_size, small, 0.5 * args.blur, 0.0, depth, strength=s)
    views = {
        "global1": DINOv2View(args.image_size, large, 0.0, 0.0, depth, masking, s),
        "global2": DINOv2View(args.image_size, large, 0.9 * args.blur, 0.2, depth, masking, s),
    }
    for i in range(args.local_crops):
        views[f"local{i + 1}"] = local
    loader = Loader(dataset, views, {}, args.batch_size, args.seed, args.workers, device)
    b = args.batch_size // world_size()

    # model and optimizer
    koleo_group = args.koleo_group
    if koleo_group == 1 or (koleo_group and args.batch_size % koleo_group):
        raise UserError(f"--koleo-group {koleo_group} must be at least 2 and divide --batch-size "
                        f"{args.batch_size}, or be 0 for the global batch")
    if b % args.accum_steps:
        raise UserError(f"--accum-steps {args.accum_steps} does not divide a process's {b} samples")
    piece = b // args.accum_steps
    if args.accum_steps > 1 and (not koleo_group or piece % koleo_group):  # KoLeo sees one piece
        if args.koleo_weight:
            raise UserError(f"--accum-steps {args.accum_steps} needs a --koleo-group that divides "
                            f"a piece of {piece} samples")
        koleo_group = 0  # it is only logged: the mean over pieces
    init_weights(model, args)
    checkpoint_blocks(model, args.grad_checkpointing, Block)
    if args.compile:
        model.compile()
        model.teach = torch.compile(model.teach)
    if args.fsdp:  # each block is whole only while it is computed (Sec. 5)
        if not torch.distributed.is_initialized():
            raise UserError("--fsdp shards a model over several processes: start it with torchrun")
        for module in (*blocks, *model.teacher.backbone.blocks, model):
            fully_shard(module)
        register_fsdp_forward_method(model, "teach")
    groups = parameter_groups(model.student, args.layer_decay, args.patch_embed_lr)
    peak = args.base_lr * (args.batch_size / 1024) ** 0.5
    optimizer = torch.optim.AdamW(groups, lr=peak, fused=True)

    # run directory; continues from its checkpoint if it has one
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    if args.fsdp:
        state["model"] = Gathered(dcp.get_model_state_dict, dcp.set_model_state_dict, model)
        get, put = dcp.get_optimizer_state_dict, dcp.set_optimizer_state_dict
        state["optimizer"] = Gathered(get, put, model, optimizer)
    run = Run("dinov2", args, loader, state)
    run.say(f"lr = {args.base_lr} * sqrt({args.batch_size} / 1024) = {peak:g}")
    cls_chance = math.log(args.out_dim)
    patch_chance = args.mask_prob * cls_chance  # on average over batches
    chance = cls_chance + args.patch_weight * patch_chance
    run.say(f"collapse: kl is 0 and teacher_entropy is ln {args.out_dim} = {cls_chance:.3f} or 0")
    warmup = round(args.warmup_epochs * loader.steps_per_epoch)
    ddp = DistributedDataParallel(model) if world_size() > 1 and not args.fsdp else model
    temp_warmup = round(args.warmup_teacher_temp_epochs * loader.steps_per_epoch)
    if val and not run.evaluation and run.due(args.eval_every):  # random weights, or one cut off
        run.log_evaluation(probe(full_encoder(model, args), bank, val, eval_view(args), device))

    for step, batch in run.batches():
        crops = [batch[name] for name in views]
        params = batch["params"]
        # the CPU counts what is kept: it would wait for a GPU's count in each branch and head
        drop_path = []
        if depth:
            drop_path = [params[name]["drop_path"].cpu() for name in views]
        masks = [params[name]["mask"].flatten(1).cpu() for name in ("global1", "global2")]  # (b, N)
        lr = warmup_cosine(step, run.total, warmup, peak, end=args.min_lr, reach_peak=True)
        start, end = args.weight_decay, args.weight_decay_end
        weight_decay = warmup_cosine(step, run.total, 0, start, end=end)
        frozen = step < args.freeze_last_layer * loader.steps_per_epoch
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
            group["weight_decay"] = weight_decay * group["decay_factor"]
            if frozen and group["last_layer"]:
                group["lr"] = 0.0  # moments accumulate all the same (official code)
        start, end = args.warmup_teacher_temp, args.teacher_temp
        teacher_temp = teacher_temperature(step, start, end, temp_warmup)

        pieces, targets = [], []
        for first in range(0, b, piece):
            rows = slice(first, first + piece)
            mask = torch.cat([m[rows] for m in masks])  # (2 b, N), b samples of a piece
            positions = torch.arange(mask.numel())
            chosen = positions[mask.flatten()]
            mask = loader.to_device(mask)
            chosen = loader.to_device(chosen)
            part = [x[rows] for x in crops]
            pieces.append((part, mask, chosen, [u[rows] for u in drop_path]))
            with autocast:
                targets.append(model.teach(part, chosen))
        teacher = torch.cat([logits for logits, _ in targets])  # of the whole batch
        teacher_patches = torch.cat([logits for _, logits in targets])
        if args.centering == "sinkhorn":
            p_t = sinkhorn_knopp(teacher, teacher_temp)
            p_t_patches = sinkhorn_knopp(teacher_patches, teacher_temp)
        else:
            p_t = center_softmax(teacher, model.center, teacher_temp)
            p_t_patches = center_softmax(teacher_patches, model.center2[0], teacher_temp)
        sizes = [len(patches) for _, patches in targets]
        del targets, teacher, teacher_patches  # some GiB, and P_t alone is needed
        p_t = p_t.split(2 * piece)
        p_t_patches = p_t_patches.split(sizes)
        sums = 0.0
        for inputs, p, p_patches in zip(pieces, p_t, p_t_patches):
            ddp.require_backward_grad_sync = inputs is pieces[-1]  # DDP sends gradients once
            with autocast:
                student, patches, features = ddp(*inputs)
            cls, entropy, kl = dino_loss(student, p)
            _, mask, chosen, _ = inputs
            patch = patch_loss(patches, p_patches, mask, chosen)
            koleo = sum(koleo_loss(f, koleo_group) for f in features.chunk(2))  # by crop
            loss = cls + args.patch_weight * patch + args.koleo_weight * koleo
            losses = torch.stack([loss, cls, patch, koleo, entropy, kl]) / args.accum_steps
            scaler.scale(losses[0]).backward()
            sums = sums + losses.detach()
        if args.clip_grad:
            scaler.unscale_(optimizer)
            for module in model.student.children():  # backbone and heads, each by itself and once
                nn.utils.clip_grad_norm_(module.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        momentum = warmup_cosine(step, run.total, 0, args.teacher_momentum, end=1.0)
        update_teacher(model.student, model.teacher, momentum)

        loss, cls, patch, koleo, entropy, kl = sums
        terms = {
            "loss": (loss, chance),
            "cls_loss": (cls, cls_chance),
            "patch_loss": (patch, patch_chance),
            "koleo": (koleo, None),
            "teacher_entropy": (entropy, None),
            "kl": (kl, None),
        }
        run.end_step(
            terms, teacher_entropy_chance=cls_chance, teacher_temp=teacher_temp,
            teacher_momentum=momentum, weight_decay=weight_decay, lr=lr,
        )
        if run.agree_to_stop() or run.due(args.save_every, args.keep_every):
            run.save()
        if val and run.due(args.eval_every):
            run.log_evaluation(probe(full_encoder(model, args), bank, val, eval_view(args), device))

    return run.finish("knn", val)


if __name__ == "__main__":
    with user_errors():
        train(parse_args(Args, RECIPES))
