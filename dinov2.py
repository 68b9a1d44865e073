"""DINOv2: Learning Robust Visual Features without Supervision (2023, arXiv 2304.07193).

DINO's loss on class tokens and iBOT's on masked patches, with what lets them grow: KoLeo keeps the features
of a batch apart, LayerScale and much stochastic depth steady deep networks, the lower a layer the slower it
learns, Sinkhorn-Knopp may replace the centers, registers (arXiv 2309.16588) keep the patches clean.

Loss (App. A), logits, centers and masks as in ibot.py, f the student's class token of unit length, no head:
    P_s = softmax(g_s / tau_s),  P_t = softmax((g_t - c) / tau_t) or Sinkhorn-Knopp of g_t / tau_t
    L_DINO, L_iBOT: cross-entropies of P_s to P_t as in ibot.py, chance level ln K and p ln K
    L_KoLeo = sum over large crops of -mean_i ln min_{j != i} |f_i - f_j|, j in the global batch
    L = L_DINO + lambda1 L_iBOT + lambda2 L_KoLeo, chance level without the last
B global batch, b = B / processes, N patches, D width, S image size, K prototypes.
Laptop        torchrun dinov2.py
1 GPU         torchrun dinov2.py --data cifar10
Own photos    torchrun dinov2.py --data path/to/photos --recipe flickr8k
8 GPUs        torchrun --nproc_per_node=8 dinov2.py --data imagenet (--fsdp for large models)

Parameter names are the official code's: its backbones load strictly (docs/dinov2.md). Differences from it:
 - KoLeo's neighbours, Sinkhorn-Knopp and centers are of the global batch (official: a GPU's, as with
   --koleo-group 64); masks and stochastic depth are the sample's own, each crop masked with probability p
   (official: exactly a share p of a GPU's crops). So the run is one on any number of processes.
 - Epochs are passes over the data. Official: 1,250 steps, 2 passes over ImageNet at batch 2048.

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
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from common import UserError, all_gather, init_distributed, mixed_precision, user_errors
from common import warmup_cosine, world_size
from data import IMAGENET_MEAN, IMAGENET_STD, Loader, color_jitter, draw_jitter, gaussian_blur
from data import grayscale, hflip, normalize, open_dataset, random_resized_crop, solarize, to_float
from monitor import EvalView, evaluation_set, knn_eval
from run import Run, RunArgs, parse_args


# -------------------------------------------- arguments --------------------------------------------
@dataclass
class Args(RunArgs):
    data: str = "flocks"  # named dataset or path, see docs/data.md
    eval_data: str = ""  # dataset of the evaluation in the loop (default: the splits of --data)
    recipe: str = ""  # entry of RECIPES to use instead of the one named like --data
    arch: str = "vit_large_patch16"  # a key of ARCHS with _patchP behind it
    ffn: Literal["mlp", "swiglu"] = "mlp"  # feed-forward layer of the blocks (swiglu: ViT-g)
    registers: int = 0  # R, tokens without a place or a loss (0: none; 4 in arXiv 2309.16588)
    layer_scale: float = 1e-5  # factor of each residual branch at the start (official code)
    drop_path: float = 0.3  # stochastic depth of every block of the student (official code)
    hidden_dim: int = 2048  # hidden width of the heads; the bottleneck after it has 256
    out_dim: int = 65536  # K, number of prototypes (official code)
    shared_head: bool = True  # one head for class token and patches; off ("untied") for large data
    freeze_last_layer: float = 2.0  # epochs in which the prototypes stay fixed (0: none; official)
    image_size: int = 224  # side of the two global crops in pixels
    local_size: int = 96  # side of the local crops in pixels
    local_crops: int = 8  # L, number of local crops (0: global crops alone)
    crop_split: float = 0.32  # s: global crops cover (s, 1) of the area, local ones (--crop-min, s)
    crop_min: float = 0.05  # smallest area of a local crop, as a share of the image (official code)
    blur: bool = True  # blur views; not for CIFAR-10
    mask_prob: float = 0.5  # p, share of the global crops that are masked at all
    mask_ratio: float = 0.3  # mean share of masked patches in a masked crop
    mask_ratio_var: float = 0.2  # that share is uniform within ratio +- this
    centering: Literal["center", "sinkhorn"] = "center"  # sinkhorn for large data
    teacher_temp: float = 0.07  # tau_t, the teacher's temperature after its warm-up
    warmup_teacher_temp: float = 0.04  # tau_t at the start of its warm-up
    warmup_teacher_temp_epochs: float = 60.0  # length of tau_t's linear warm-up (0: no warm-up)
    teacher_momentum: float = 0.992  # l, EMA momentum in the first step, on a cosine to 1
    patch_weight: float = 1.0  # lambda1, weight of the patches' loss
    koleo_weight: float = 0.1  # lambda2, weight of the KoLeo loss (0: without)
    koleo_group: int = 0  # samples among which KoLeo looks for neighbours (0: the global batch)
    epochs: int = 200  # passes over the data; official: 100 of 1,250 steps
    max_steps: int = 0  # stop after so many steps, without changing the schedule (0: run all of it)
    batch_size: int = 2048  # images of a step, over all processes
    base_lr: float = 4e-3  # peak learning rate: lr = base_lr * sqrt(batch / 1024)
    min_lr: float = 1e-6  # learning rate at the end of the cosine, not scaled
    warmup_epochs: float = 20.0  # linear warm-up from 0
    layer_decay: float = 0.9  # learning rate of a layer, as a share of that of the layer above
    patch_embed_lr: float = 0.2  # factor of the patch embedding's learning rate, beside that decay
    weight_decay: float = 0.04  # at the start, of everything but biases, norms and scales
    weight_decay_end: float = 0.4  # weight decay after the last step, on a cosine
    clip_grad: float = 3.0  # largest gradient norm of backbone and of each head (0: off)
    fsdp: bool = False  # shard parameters, gradients and optimizer over the processes
    seed: int = 0  # random seed of weights, order, views, masks and stochastic depth
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on GPUs, else fp32


RECIPES = {  # of ImageNet: kNN and linear probe of the official code, in percent
    "flocks": dict(arch="vit_nano_patch8", image_size=48, local_size=24, local_crops=2, crop_split=0.4,
                   crop_min=0.15, blur=False, layer_scale=1.0, hidden_dim=512, out_dim=256,
                   freeze_last_layer=0.0, drop_path=0.0, teacher_temp=0.04, warmup_teacher_temp=0.04,
                   teacher_momentum=0.98, layer_decay=1.0, patch_embed_lr=1.0, epochs=3, batch_size=64,
                   base_lr=8e-3, warmup_epochs=0.2, weight_decay_end=0.04),
    "shapes": dict(arch="vit_micro_patch8", image_size=48, local_size=24, local_crops=2, layer_scale=1.0,
                   blur=False, hidden_dim=512, out_dim=512, freeze_last_layer=0.0, drop_path=0.0,
                   teacher_temp=0.02, warmup_teacher_temp=0.02, teacher_momentum=0.98, epochs=2,
                   batch_size=64, base_lr=4e-3, warmup_epochs=0.2),
    "cifar10": dict(arch="vit_tiny_patch4", image_size=32, local_size=16, local_crops=4, crop_split=0.4,
                    blur=False, out_dim=2048, drop_path=0.1, teacher_momentum=0.99, batch_size=512),
    "flickr8k": dict(arch="vit_micro_patch8", image_size=96, local_size=48, local_crops=6, out_dim=4096,
                     drop_path=0.1, teacher_momentum=0.99, epochs=100, batch_size=128),
    "imagenet": {},  # 81.6, 82.9
}


# -------------------------------------------- augmentation --------------------------------------------
# Adapted from ibot.py: draw_mask, smaller blocks only
def draw_mask(rng, side, prob=0.5, ratio=0.3, var=0.2):
    """Which of side x side patches are masked: none with probability 1 - prob, otherwise at most a share that
    is uniform in ratio +- var. rng: random.Random. -> bool (side, side)."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    share = min(1, max(0, rng.uniform(ratio - var, ratio + var))) * (rng.random() < prob)
    budget, tries = int(share * side**2), 0
    while budget > 0 and tries < 10:  # BEiT's blocks (arXiv 2106.08254, Alg. 1), which may overlap
        most = min(budget, side**2 / 2)
        area, aspect = rng.uniform(4, most), 0.3 ** rng.uniform(-1, 1)
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        tries += 1
        if h < side and w < side:
            top, left = rng.randint(0, side - h), rng.randint(0, side - w)
            block = mask[top : top + h, left : left + w]
            if 0 < (new := h * w - int(block.sum())) <= most:
                block[:], budget, tries = True, budget - new, 0
    return mask


# Adapted from ibot.py: IBOTView, other blur
class DINOv2View:
    """One of the V crops. The second is blurred with probability 0.9 and solarised with 0.2; local ones are
    blurred with 0.5 (the released models; docs/dinov2.md). mask: options of draw_mask, for large crops."""

    def __init__(self, size, scale=(0.32, 1.0), blur=0.0, solarize=0.0, depth=0, mask=None):
        self.size, self.scale, self.blur, self.solarize = size, scale, blur, solarize
        self.depth, self.mask = depth, mask

    def crop(self, image, rng):
        return random_resized_crop(image, rng, self.size, self.scale, interpolation="bicubic")

    def sample(self, rng):
        chances = {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": self.blur, "solarize": self.solarize}
        return {
            **{name: rng.random() < chance for name, chance in chances.items()},
            "sigma": rng.uniform(0.1, 2.0),  # pixels
            **draw_jitter(rng, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1),
            "drop_path": [[rng.random(), rng.random()] for _ in range(self.depth)],  # by block
            **({"mask": draw_mask(rng, **self.mask)} if self.mask else {}),
        }

    def __call__(self, x, params):
        """On the device: uint8 (b, 3, size, size) and the stacked parameters -> float, normalised."""
        x = hflip(to_float(x), params["flip"])
        factors = (params[name] for name in ("brightness", "contrast", "saturation", "hue"))
        x = color_jitter(x, *factors, params["order"], params["jitter"])
        x = grayscale(x, params["gray"])
        if self.blur:
            x = gaussian_blur(x, params["sigma"], params["blur"], kernel_size=9)
        if self.solarize:
            x = solarize(x, params["solarize"])
        return normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# Copied from dino.py: eval_view
def eval_view(args) -> EvalView:
    """The central 87.5% of the shorter side, or the whole of a small image (official code)."""
    resize = round(args.image_size / 0.875)
    if args.image_size <= 32:  # CIFAR
        resize = args.image_size
    return EvalView(args.image_size, resize, "bicubic", IMAGENET_MEAN, IMAGENET_STD)


# -------------------------------------------- backbone --------------------------------------------
# Adapted from dino.py: Block, with LayerScale and SwiGLU; what stochastic depth leaves out is not computed
class Block(nn.Module):
    """Pre-norm block, LayerScale (arXiv 2103.17239). (B, N, D) -> (B, N, D). Stochastic depth leaves either
    branch out for a share `drop_path` of the samples: those whose number in u, (B, 2), is below it."""

    def __init__(self, dim, heads, drop_path=0.0, swiglu=False, gamma=1e-5):
        super().__init__()
        self.heads, self.drop_path, self.swiglu = heads, drop_path, swiglu
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.ls1 = nn.ParameterDict({"gamma": torch.full((dim,), gamma)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = (int(8 * dim / 3) + 7) // 8 * 8  # makes SwiGLU about as large as the MLP
        layers = {"w12": (dim, 2 * hidden), "w3": (hidden, dim)}
        layers = layers if swiglu else {"fc1": (dim, 4 * dim), "fc2": (4 * dim, dim)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*sizes) for name, sizes in layers.items()})
        self.ls2 = nn.ParameterDict({"gamma": torch.full((dim,), gamma)})

    def attention(self, x):
        q, k, v = self.attn.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def feed_forward(self, x):
        if not self.swiglu:
            return self.mlp.fc2(F.gelu(self.mlp.fc1(x)))
        gate, value = self.mlp.w12(x).chunk(2, dim=-1)  # arXiv 2002.05202
        return self.mlp.w3(F.silu(gate) * value)

    def add(self, x, branch, u):
        if u is None:
            return x + branch(x)
        kept = (u >= self.drop_path).nonzero().squeeze(1)
        return x.index_add(0, kept, (branch(x[kept]) / (1 - self.drop_path)).to(x.dtype))

    def forward(self, x, u=None):
        u1, u2 = (None, None) if u is None else u.unbind(1)
        x = self.add(x, lambda x: self.ls1.gamma * self.attention(self.norm1(x)), u1)
        return self.add(x, lambda x: self.ls2.gamma * self.feed_forward(self.norm2(x)), u2)


# Adapted from ibot.py: VisionTransformer, with registers, LayerScale and SwiGLU
class VisionTransformer(nn.Module):
    """timm's ViT: no norm before the blocks. (B, 3, S, S) -> (B, D), the class token after the last norm."""

    def __init__(self, image_size, patch_size, dim, depth, heads, drop_path=0.0, registers=0, swiglu=False,
                 gamma=1e-5):
        super().__init__()
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (image_size // patch_size) ** 2 + 1, dim))
        self.register_tokens = nn.Parameter(1e-6 * torch.randn(1, registers, dim)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, stride=patch_size)})
        self.blocks = nn.Sequential(*[Block(dim, heads, drop_path, swiglu, gamma) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def interpolate_pos_embed(self, rows, columns):
        """(1, 1 + rows * columns, D): the class token's, and the trained grid resized, as released."""
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if rows == columns == side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        # official: 0.1 against rounding down; it also shifts the samples. Not so in models with registers
        resize = dict(size=(rows, columns), antialias=True)
        if self.register_tokens is None:
            resize = dict(scale_factor=((rows + 0.1) / side, (columns + 0.1) / side))
        grid = F.interpolate(grid, mode="bicubic", **resize)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def tokens(self, x, mask=None, drop_path=None):
        """(B, 3, H, W) -> (B, 1 + N, D), class token and patches after the last norm. mask: (B, N) bool;
        drop_path: (B, depth, 2) uniform numbers, with which stochastic depth acts."""
        x = self.patch_embed.proj(x)
        pos_embed = self.interpolate_pos_embed(*x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)
        if mask is not None:  # before the position is added: a masked patch knows where it is
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + pos_embed
        if self.register_tokens is not None:  # after the class token, without a position
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        for i, block in enumerate(self.blocks):
            x = block(x, None if drop_path is None else drop_path[:, i])
        x = self.norm(x)
        return torch.cat([x[:, :1], x[:, 1 - pos_embed.shape[1] :]], 1)  # without the registers

    def forward(self, x):
        return self.tokens(x)[:, 0]


# -------------------------------------------- model --------------------------------------------
# Adapted from ibot.py: IBOTHead, for class token or patches; all prototypes learn their length
class DINOHead(nn.Module):
    """MLP to a bottleneck, unit length, prototypes. (B, D) -> (B, K), the logits."""

    def __init__(self, dim, out_dim, hidden_dim=2048, bottleneck=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim),
                                 nn.GELU(), nn.Linear(hidden_dim, bottleneck))
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck, out_dim, bias=False))
        nn.init.ones_(self.last_layer.parametrizations.weight.original0)  # g; row k is g_k v_k / |v_k|

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


# Adapted from ibot.py: IBOT, only masked patches go through the heads
class DINOv2(nn.Module):
    def __init__(self, student, teacher):
        super().__init__()
        teacher.load_state_dict(student.state_dict())
        self.student, self.teacher = student, teacher.requires_grad_(False)
        k = student.dino_head.last_layer.out_features
        self.register_buffer("center", torch.zeros(1, k))  # c
        self.register_buffer("center2", torch.zeros(1, 1, k))  # c2

    def forward(self, crops, mask, drop_path=()):
        """Crops and mask as in ibot.py, M patches are masked -> logits of the student for crops (V b, K) and
        masked patches (M, K), of the teacher for the whole global crops (2 b, K), (M, K); f (2 b, D)."""
        large, small = torch.cat(crops[:2]), crops[2:]
        drop = [torch.cat(u) if u else None for u in (drop_path[:2], drop_path[2:])]
        with torch.no_grad():
            tokens = self.teacher.backbone.tokens(large)
            teacher = self.teacher.dino_head(tokens[:, 0]), self.teacher.ibot_head(tokens[:, 1:][mask])
        tokens = self.student.backbone.tokens(large, mask, drop[0])
        patches, features = self.student.ibot_head(tokens[:, 1:][mask]), [tokens[:, 0]]
        if small:  # never masked
            features.append(self.student.backbone.tokens(torch.cat(small), None, drop[1])[:, 0])
        return self.student.dino_head(torch.cat(features)), patches, *teacher, features[0]


ARCHS = {"vit_nano": (3, 96, 3), "vit_micro": (4, 128, 4), "vit_tiny": (12, 192, 3),  # nano, micro: our own
         "vit_small": (12, 384, 6), "vit_base": (12, 768, 12),
         "vit_large": (24, 1024, 16), "vit_giant": (40, 1536, 24)}


def build_network(args, drop_path=0.0) -> nn.ModuleDict:
    """Student or teacher. Raises UserError for an unknown --arch and for sizes that do not fit together."""
    name, _, patch = args.arch.partition("_patch")
    if name not in ARCHS or not patch.lstrip("0").isdecimal():
        raise UserError(f"--arch {args.arch} is unknown, use one of {', '.join(ARCHS)}, with _patchP")
    for flag, size in (("image", args.image_size), ("local", args.local_size if args.local_crops else 0)):
        if size % int(patch):
            raise UserError(f"--{flag}-size {size} is not a multiple of {int(patch)} ({args.arch})")
    layers, width, heads = ARCHS[name]
    backbone = VisionTransformer(args.image_size, int(patch), width, layers, heads, drop_path,
                                 args.registers, args.ffn == "swiglu", args.layer_scale)
    heads = [DINOHead(width, args.out_dim, args.hidden_dim) for _ in range(2 - args.shared_head)]
    return nn.ModuleDict({"backbone": backbone, "dino_head": heads[0], "ibot_head": heads[-1]})


def build_model(args) -> DINOv2:
    return DINOv2(build_network(args, args.drop_path), build_network(args))


def image_encoder(model: DINOv2) -> nn.Module:
    """Module from images to features (B, D): the teacher's backbone (official code)."""
    return model.teacher.backbone


# -------------------------------------------- loss --------------------------------------------
# Adapted from ibot.py: update_center, after the softmax, for any number of rows
@torch.no_grad()
def center_softmax(teacher, center, teacher_temp, momentum=0.9):
    """Logits (n, K) of this process, center (1, K) -> P_t (n, K), of the center before the update
    c <- m c + (1 - m) mean of all processes' logits, in place."""
    p_t = F.softmax((teacher.float() - center) / teacher_temp, dim=-1)
    total = all_gather(teacher.float().sum(0, keepdim=True)).sum(0)  # (K,)
    rows = all_gather(center.new_tensor([len(teacher)])).sum()
    center.lerp_(total / rows.clamp(min=1), (1 - momentum) * (rows > 0))
    return p_t


@torch.no_grad()
def sinkhorn_knopp(teacher, teacher_temp, iterations=3):
    """Logits (n, K) of this process -> P_t (n, K): softmax, then columns and rows rescaled in turn, so that
    the global batch takes every prototype about equally often (arXiv 2006.09882)."""
    q = teacher.float() / teacher_temp  # logarithms, which neither overflow nor vanish
    for _ in range(iterations):
        q = q - all_gather(q.logsumexp(0, keepdim=True)).logsumexp(0)  # prototypes; there may be no row here
        q = q - q.logsumexp(1, keepdim=True)  # samples
    return q.exp()


def dino_loss(student, p_t, student_temp=0.1):
    """Cross-entropy of the student's crops, logits (V b, K), to the teacher's two, (2 b, K), in nats; chance
    level ln K. Call it outside autocast. -> loss, entropy of P_t, KL(P_t, P_s), means over b images."""
    n_views = 2 * len(student) // len(p_t)
    log_p_s = F.log_softmax(student.float() / student_temp, dim=-1).chunk(n_views)
    p_t = p_t.chunk(2)
    pairs = [(x, y) for x in range(2) for y in range(n_views) if x != y]  # no crop predicts itself
    loss = sum(-(p_t[x] * log_p_s[y]).sum(-1).mean() for x, y in pairs) / len(pairs)
    entropy = torch.special.entr(torch.cat(p_t)).sum(-1).mean()
    return loss, entropy, loss.detach() - entropy


def patch_loss(student, p_t, mask, student_temp=0.1):
    """Cross-entropy of the student's masked patches, logits (M, K), to the teacher's whole ones, (M, K), in
    the order of mask (2 b, N); chance level p ln K: crops without a mask count as 0 (official code)."""
    log_p_s = F.log_softmax(student.float() / student_temp, dim=-1)
    weight = (1 / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(mask)[mask]
    return -((p_t * log_p_s).sum(-1) * weight).sum() / len(mask)


def koleo_loss(features, group=0, eps=1e-8):
    """-mean ln distance to the nearest neighbour, of features (b, D) of this process, among the global batch
    or in groups of it, of samples that follow each other. The global loss. Large: two images became one."""
    x = F.normalize(all_gather(features.float()), dim=-1, eps=eps)
    x = x.unflatten(0, (-1, group or len(x)))  # (groups, n, D)
    cosines = (x @ x.mT).detach()
    cosines.diagonal(dim1=1, dim2=2).fill_(-1)
    nearest = cosines.argmax(-1, keepdim=True).expand_as(x)
    return -(F.pairwise_distance(x, x.gather(1, nearest), eps=eps) + eps).log().mean()


# -------------------------------------------- training --------------------------------------------
def multipliers(name, depth, layer_decay, patch_embed_lr):
    """What a parameter's name says of its learning rate and weight decay, as factors of the run's."""
    found = re.search(r"blocks\.(\d+)|_token|_embed", name)
    layer = int(found[1] or -1) + 1 if found else depth + 1  # 0: what comes before the blocks
    lr = layer_decay ** (depth + 1 - layer) * (patch_embed_lr if "patch_embed" in name else 1.0)
    return {"lr_factor": lr, "decay_factor": 0.0 if re.search("bias$|norm|gamma", name) else 1.0}


# Models that do not fit one GPU: --fsdp shards them with torch's own fully_shard
def parallel(model, blocks, fsdp=False):
    """What to call in place of the model, to be made before its optimizer. fsdp: parameters, gradients and
    optimizer are sharded over the processes, each of `blocks` whole only while it is computed; otherwise
    DistributedDataParallel, if there are several processes. Both average gradients over them."""
    if not fsdp:
        return DistributedDataParallel(model) if world_size() > 1 else model
    if not torch.distributed.is_initialized():
        raise UserError("--fsdp shards a model over several processes, start them with torchrun")
    for module in (*blocks, model):
        fully_shard(module)
    return model


class Gathered:
    """State of a sharded model, or of its optimizer, as a checkpoint holds it: whole tensors, on the CPU of
    the first process. All processes are to ask for it together."""

    def __init__(self, kind, *items):
        self.kind, self.items = kind, items

    def state_dict(self):
        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        return getattr(dcp, f"get_{self.kind}_state_dict")(*self.items, options=options)

    def load_state_dict(self, state):
        options = dcp.StateDictOptions(full_state_dict=True)
        getattr(dcp, f"set_{self.kind}_state_dict")(*self.items, state, options=options)


def checkpointed(model, optimizer, fsdp=False) -> dict:
    """A run's state: name -> object with state_dict and load_state_dict."""
    if not fsdp:
        return {"model": model, "optimizer": optimizer}
    return {"model": Gathered("model", model), "optimizer": Gathered("optimizer", model, optimizer)}


def whole(module, build):
    """The module itself or, of a sharded one, a copy with whole parameters; build() makes one like it."""
    state = module.state_dict()
    if not any(isinstance(value, DTensor) for value in state.values()):
        return module
    with torch.device("meta"):  # neither memory nor random numbers
        copy = build()
    state = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}
    copy.load_state_dict(state, assign=True)
    return copy


def train(args: Args) -> dict:
    """Trains and returns the last evaluation. Raises UserError for mistakes the user can fix."""
    device = init_distributed(args.device)
    torch.manual_seed(args.seed)
    autocast, scaler = mixed_precision(args.dtype, device)

    # data
    dataset = open_dataset(args.data, args.data_dir)
    bank, val = evaluation_set(args, "train"), evaluation_set(args)
    model = build_model(args).to(device)
    depth = len(model.student.backbone.blocks) if args.drop_path else 0
    mask = dict(side=args.image_size // int(args.arch.partition("_patch")[2]), prob=args.mask_prob,
                ratio=args.mask_ratio, var=args.mask_ratio_var)
    views = {"global1": DINOv2View(args.image_size, (args.crop_split, 1), 0.0, 0.0, depth, mask),
             "global2": DINOv2View(args.image_size, (args.crop_split, 1), 0.9 * args.blur, 0.2, depth, mask)}
    local = DINOv2View(args.local_size, (args.crop_min, args.crop_split), 0.5 * args.blur, 0.0, depth)
    views |= {f"local{i + 1}": local for i in range(args.local_crops)}
    loader = Loader(dataset, views, {}, args.batch_size, args.seed, args.workers, device)

    # model and optimizer
    if args.koleo_group and (args.koleo_group < 2 or args.batch_size % args.koleo_group):
        raise UserError(f"--koleo-group {args.koleo_group} does not divide the batch in groups of 2 or more")
    if args.compile:
        model.compile()
    ddp = parallel(model, [*model.student.backbone.blocks, *model.teacher.backbone.blocks], args.fsdp)
    groups = [{"params": [p], "last": "last_layer" in name,
               **multipliers(name, len(model.student.backbone.blocks), args.layer_decay, args.patch_embed_lr)}
              for name, p in model.student.named_parameters()]  # fmt: skip
    peak = args.base_lr * (args.batch_size / 1024) ** 0.5
    optimizer = torch.optim.AdamW(groups, lr=peak, fused=True)

    # run directory; continues from its checkpoint if it has one
    run = Run("dinov2", args, loader, checkpointed(model, optimizer, args.fsdp) | {"scaler": scaler})
    run.say(f"lr = {args.base_lr} * sqrt({args.batch_size} / 1024) = {peak:g}")
    cls_chance = math.log(args.out_dim)
    warmup = round(args.warmup_epochs * loader.steps_per_epoch)
    temp_warmup = round(args.warmup_teacher_temp_epochs * loader.steps_per_epoch)
    if val and run.step == 0 and run.due(args.eval_every):  # random weights
        encoder = whole(image_encoder(model), lambda: build_network(args).backbone)
        run.log_evaluation(knn_eval(encoder, bank, val, eval_view(args), device))

    for step, batch in run.batches():
        crops = [views[name](*batch[name]) for name in views]
        drop_path = [batch[name][1]["drop_path"] for name in views] if depth else []
        mask = torch.cat([batch[name][1]["mask"] for name in ("global1", "global2")]).flatten(1)  # (2b, N)
        lr = warmup_cosine(step, run.total, warmup, peak, end=args.min_lr, reach_peak=True)
        weight_decay = warmup_cosine(step, run.total, 0, args.weight_decay, end=args.weight_decay_end)
        frozen = step < args.freeze_last_layer * loader.steps_per_epoch  # moments accumulate (official code)
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if frozen and group["last"] else lr * group["lr_factor"]
            group["weight_decay"] = weight_decay * group["decay_factor"]
        temps = args.warmup_teacher_temp, args.teacher_temp
        teacher_temp = warmup_cosine(step, run.total, temp_warmup, temps[1], *temps, reach_peak=True)

        with autocast:
            student, patches, teacher, teacher_patches, features = ddp(crops, mask, drop_path)
        if args.centering == "sinkhorn":
            p_t, p_t_patches = (sinkhorn_knopp(g, teacher_temp) for g in (teacher, teacher_patches))
        else:
            p_t = center_softmax(teacher, model.center, teacher_temp)
            p_t_patches = center_softmax(teacher_patches, model.center2[0], teacher_temp)
        cls, entropy, kl = dino_loss(student, p_t)
        patch = patch_loss(patches, p_t_patches, mask)
        koleo = sum(koleo_loss(f, args.koleo_group) for f in features.chunk(2))
        loss = cls + args.patch_weight * patch + args.koleo_weight * koleo
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        for module in model.student.values() if args.clip_grad else ():
            nn.utils.clip_grad_norm_(module.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        momentum = warmup_cosine(step, run.total, 0, args.teacher_momentum, end=1.0)
        with torch.no_grad():  # theta_t <- l theta_t + (1 - l) theta_s
            for theta_s, theta_t in zip(model.student.parameters(), model.teacher.parameters()):
                theta_t.lerp_(theta_s, 1 - momentum)
        terms = {"loss": (loss, cls_chance * (1 + args.patch_weight * args.mask_prob)),  # on average
                 "cls_loss": (cls, cls_chance), "patch_loss": (patch, cls_chance * args.mask_prob),
                 "koleo": (koleo, None), "teacher_entropy": (entropy, None), "kl": (kl, None)}
        run.end_step(terms, teacher_entropy_chance=cls_chance, teacher_temp=teacher_temp,
                     teacher_momentum=momentum, weight_decay=weight_decay, lr=lr)  # fmt: skip
        if val and run.due(args.eval_every):
            encoder = whole(image_encoder(model), lambda: build_network(args).backbone)
            run.log_evaluation(knn_eval(encoder, bank, val, eval_view(args), device))
        if run.agree_to_stop() or run.due(args.save_every):
            run.save()

    return run.finish("knn", val, bank)


if __name__ == "__main__":
    with user_errors():
        train(parse_args(Args, RECIPES))
