"""DINO: Emerging Properties in Self-Supervised Vision Transformers
(Caron et al. 2021, arXiv 2104.14294).

A student sees any crop of an image and learns to give the distribution over K prototypes that a
teacher gives for two large crops of it: the parts predict the whole. The teacher is an EMA of the
student. Its logits are centered, which alone would lead to uniform outputs, and sharpened by a low
temperature, which alone would lead to one prototype for all images. Together they prevent collapse.

Loss (Eq. 1 to 3), g logits, c center, s student, t teacher, V = 2 + L crops, the first two large:
    P_s(x) = softmax(g_s(x) / tau_s),  P_t(x) = softmax((g_t(x) - c) / tau_t)
    L = mean over x in {1, 2} and x' in {1, ..., V}, x' != x, of -sum_k P_t(x)_k log P_s(x')_k
      = entropy of P_t + KL(P_t, P_s) (Eq. 5), chance level ln K
    after the loss: c <- m c + (1 - m) batch mean of g_t (Eq. 4)
    after the optimizer's step: theta_t <- l theta_t + (1 - l) theta_s (Sec. 3.1)
    Entropy and KL are logged. Collapse: KL is 0 and the entropy is ln K (uniform) or 0 (one
    prototype).
B global batch, b = B / processes, N tokens, D width, S image size in pixels.

Laptop        torchrun dino.py
1 GPU         torchrun dino.py --data cifar10
Own photos    torchrun dino.py --data path/to/photos --recipe flickr8k
8 GPUs        torchrun --nproc_per_node=8 dino.py --data imagenet
  100 epochs  torchrun --nproc_per_node=8 dino.py --data imagenet --recipe imagenet-100

Parameter names are those of the official code, whose checkpoints load strictly (docs/dino.md).
Differences from the official code:
 - The samples that stochastic depth leaves out are a function of seed, epoch, sample and crop, like
   everything random about a sample, so a run is the same on any number of processes. Official: the
   global random state of each process.
 - Blur is a true Gaussian of sigma pixels, colours are floats. Official: Pillow's blur, which is
   made of box filters, and bytes.
 - A GPU computes in mixed precision. The paper's runs are in float32 (--dtype fp32).

Diff against: byol.py.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import LARS, UserError, all_gather, checkpoint_blocks, init_distributed, mixed_precision
from common import sync_batchnorm, user_errors, warmup_cosine, world_size
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
    arch: str = "vit_small_patch16"  # vit_{nano,micro,tiny,small,base}_patchP or resnet10 to 152
    width: float = 1.0  # factor of the channels of a ResNet; 0.5 is half as wide everywhere
    stem: Literal["auto", "imagenet", "cifar", "small"] = "auto"  # cifar: 3x3; small: 3x3, stride 2
    init_std: float = 0.02  # std of initial weights in a ViT's blocks (official); more if narrow
    zero_init_residual: bool = False  # start residual branches at 0, unlike the official code
    drop_path: float = 0.1  # stochastic depth of the student's last ViT block (official code)
    head_layers: int = 3  # linear layers of the head before its bottleneck is normalised (App. C)
    hidden_dim: int = 2048  # hidden width of the head (App. C); the bottleneck after it has 256
    head_bn: bool = False  # batch norm in the head (App. C: without)
    out_dim: int = 65536  # K, number of prototypes (App. C)
    norm_last_layer: bool = False  # prototypes keep length 1, which is more stable; used for ViT-B
    freeze_last_layer: float = 1.0  # epochs in which the prototypes stay fixed (0: none; official)
    image_size: int = 224  # side of the two global crops in pixels
    local_size: int = 96  # side of the local crops in pixels (Sec. 3.1)
    local_crops: int = 10  # L, number of local crops (0: none; --crop-split 0.14 goes with it)
    crop_split: float = 0.25  # s: global crops have area (s, 1), local ones (crop_min, s) (App. E)
    crop_min: float = 0.05  # smallest area of a local crop, as a share of the image (official code)
    jitter_strength: float = 1.0  # factor of the colour jitter's ranges, s of SimCLR (its App. A)
    blur: bool = True  # blur views as BYOL does; not for CIFAR-10
    temperature: float = 0.1  # tau_s, the student's temperature (Sec. 3.2)
    teacher_temp: float = 0.07  # tau_t, the teacher's temperature after its warm-up (Sec. 3.2)
    warmup_teacher_temp: float = 0.04  # tau_t at the start of its warm-up (Sec. 3.2)
    warmup_teacher_temp_epochs: int = 30  # length of tau_t's linear warm-up (0: none; Sec. 3.2)
    teacher_momentum: float = 0.996  # l, first EMA momentum (Sec. 3.1); 0.9995 for batch 256
    teacher_momentum_end: float = 1.0  # EMA momentum after the last step (Sec. 3.1)
    center_momentum: float = 0.9  # m, momentum of the center (App. D)
    epochs: int = 800  # passes over the data (Table 2); 100 and 300 in the ablations
    max_steps: int = 0  # stop after so many steps, without changing the schedule (0: run all of it)
    batch_size: int = 1024  # images of a step, over all processes and pieces (Sec. 3.2)
    accum_steps: int = 1  # encode a batch in so many pieces, exactly; refused with batch norm
    grad_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute to save memory
    base_lr: float = 5e-4  # peak learning rate: lr = base_lr * batch / 256 (Sec. 3.2)
    min_lr: float = 1e-5  # learning rate at the end of the cosine, not scaled (official run)
    warmup_epochs: float = 10.0  # linear warm-up from 0 (Sec. 3.2)
    optimizer: Literal["adamw", "lars", "sgd"] = "adamw"  # AdamW in the paper (Sec. 3.2)
    momentum: float = 0.9  # momentum of LARS and SGD
    weight_decay: float = 0.04  # at the start, on all but biases and norms (Sec. 3.2)
    weight_decay_end: float = 0.4  # weight decay after the last step, on a cosine (Sec. 3.2)
    clip_grad: float = 0.0  # largest gradient norm of each parameter by itself (0: off)
    init: str = ""  # weights to start from: a run, released weights, a backbone (docs/init.md)
    seed: int = 0  # random seed of weights, order, views and stochastic depth
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on GPUs, else fp32


STEADY = dict(norm_last_layer=True, freeze_last_layer=3.0, warmup_teacher_temp_epochs=50)
SMALL = dict(
    image_size=32, jitter_strength=0.5, blur=False, local_crops=0, head_layers=2, head_bn=True,
    hidden_dim=1024, out_dim=1024, freeze_last_layer=0.0, teacher_temp=0.04,
    warmup_teacher_temp=0.04, teacher_momentum=0.98, epochs=10, batch_size=128,
)
RECIPES = {
    # our own, for the drawn scenes: as cifar10 below, but with a smaller network, batch and K,
    # milder crops, no jitter, a faster teacher, and a rate that falls to a third
    "flocks": dict(
        arch="resnet10", width=0.25, stem="small", zero_init_residual=True, image_size=32,
        local_crops=0, crop_split=0.6, jitter_strength=0.0, blur=False, head_layers=2,
        head_bn=True, out_dim=256, norm_last_layer=True, teacher_temp=0.05,
        warmup_teacher_temp=0.05, teacher_momentum=0.97, teacher_momentum_end=0.97, epochs=3,
        batch_size=128, optimizer="sgd", base_lr=0.3, min_lr=0.05, warmup_epochs=0.0,
        weight_decay=5e-4, weight_decay_end=5e-4,
    ),
    "shapes": dict(
        arch="vit_micro_patch8", image_size=48, local_size=24, local_crops=2, crop_split=0.4,
        blur=False, hidden_dim=512, out_dim=512, freeze_last_layer=0.0, drop_path=0.0,
        teacher_temp=0.02, warmup_teacher_temp=0.02, teacher_momentum=0.98, epochs=2,
        batch_size=64, base_lr=4e-3, warmup_epochs=0.2,
    ),
    # lightly's CIFAR-10 benchmark (kNN 81.3%), except that here norms and biases are not decayed,
    # the cosine falls with every step and not with every epoch, the prototypes stay fixed in the
    # first epoch, and crops are bicubic
    "cifar10": dict(
        arch="resnet18", image_size=32, blur=False, local_crops=0, crop_split=0.4, head_layers=2,
        head_bn=True, out_dim=2048, norm_last_layer=True, teacher_temp=0.04,
        teacher_momentum=0.99, teacher_momentum_end=0.99, epochs=200, batch_size=512,
        optimizer="sgd", base_lr=0.12, min_lr=0.0, warmup_epochs=0.0,
        weight_decay=5e-4, weight_decay_end=5e-4,
    ),
    # our own, for 40 minutes of one core; the second for a small ViT
    "cifar10-cpu": dict(
        SMALL, arch="resnet10", width=0.25, stem="small", crop_split=0.3, optimizer="sgd",
        base_lr=0.24, min_lr=0.0, warmup_epochs=0.2, weight_decay=1e-4, weight_decay_end=1e-4,
    ),
    "cifar10-cpu-vit": dict(
        SMALL, arch="vit_nano_patch8", init_std=0.08, drop_path=0.0, crop_split=0.2,
        base_lr=2e-3, warmup_epochs=0.3, weight_decay_end=0.04,
    ),
    # our own
    "flickr8k": dict(
        arch="vit_micro_patch8", image_size=96, local_size=48, local_crops=6, out_dim=4096,
        teacher_momentum=0.99, epochs=100, batch_size=128, base_lr=1e-3, min_lr=1e-6,
    ),
    # The official runs, with their kNN and linear probe in percent. What differs here stands in the
    # docstring
    "imagenet": {},  # 74.5, 77.0
    "imagenet-300": dict(
        epochs=300, min_lr=1e-6, local_crops=8, crop_split=0.4, clip_grad=3.0,
    ),  # 73.3, 76.0
    "imagenet-100": dict(
        epochs=100, batch_size=512, min_lr=1e-6, local_crops=8, crop_split=0.4, clip_grad=3.0,
        teacher_temp=0.04, norm_last_layer=True,
    ),  # 69.3, 74.0
    "imagenet-vitb16": dict(
        STEADY, arch="vit_base_patch16", epochs=400, base_lr=7.5e-4, min_lr=2e-6, clip_grad=0.3,
    ),  # 76.1, 78.2
    "imagenet-vitb8": dict(
        STEADY, arch="vit_base_patch8", epochs=300, batch_size=1056, min_lr=2e-6, clip_grad=3.0,
        warmup_teacher_temp=0.03, grad_checkpointing="full",  # to fit 8 GPUs of 80 GB
    ),  # 77.4, 80.1
    "imagenet-resnet50": dict(
        STEADY, arch="resnet50", head_bn=True, out_dim=60000, freeze_last_layer=1.0,
        local_crops=6, crop_split=0.14, batch_size=4080, optimizer="lars", base_lr=0.3,
        min_lr=4.8e-3, weight_decay=1e-6, weight_decay_end=1e-6,
    ),  # 67.5, 75.3
}


# ---------------------------------------- augmentation ----------------------------------------
# Adapted from byol.py: BYOLView, scale of the crop, wider blur, numbers for stochastic depth
class DINOView:
    """One of the V crops. The first is always blurred. The second is blurred with probability 0.1
    and solarised with 0.2, local ones are blurred with 0.5 (official code)."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, size, scale=(0.25, 1.0), blur=1.0, solarize=0.0, depth=0, strength=1.0):
        self.size = size
        self.scale = scale
        self.blur = blur
        self.solarize = solarize
        self.depth = depth
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


# Copied from byol.py: eval_view
def eval_view(args) -> EvalView:
    """The central 87.5% of the shorter side, or the whole of a small image (official code)."""
    resize = round(args.image_size / 0.875)
    if args.image_size <= 32:  # CIFAR
        resize = args.image_size
    return EvalView(args.image_size, resize, "bicubic", IMAGENET_MEAN, IMAGENET_STD)


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


# Adapted from slip.py: Block, with stochastic depth
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


# Adapted from slip.py: VisionTransformer, with stochastic depth, for images of any size
class VisionTransformer(nn.Module):
    """timm's ViT: no norm before the blocks. (B, 3, S, S) -> (B, D), the class token after
    the last norm. In training the last block computes nothing else."""

    def __init__(self, image_size, patch_size, dim, depth, heads, drop_path=0.0, init_std=0.02):
        super().__init__()
        self.feature_dim = dim
        patches = (image_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, dim))
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

    def prepare_tokens(self, x):
        """(B, 3, H, W) -> (B, N, D), what the first block sees, the class token first."""
        x = self.patch_embed(x)  # (B, D, rows, columns)
        pos_embed = self.interpolate_pos_embed(*x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)
        cls_token = self.cls_token.expand(len(x), -1, -1)
        return torch.cat([cls_token, x], dim=1) + pos_embed

    def forward(self, x, drop_path=None):
        """drop_path: uniform numbers (B, depth, 2), which decide about stochastic depth."""
        x = self.prepare_tokens(x)
        for i, block in enumerate(self.blocks):
            u = None if drop_path is None else drop_path[:, i]
            last = i + 1 == len(self.blocks)
            x = block(x, u, queries=1 if last and self.training else None)
        return self.norm(x[:, 0])


# Copied from moco.py: ResNet
class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet, `width` times as wide everywhere.
    (B, 3, S, S) -> (B, outputs of fc). stem: "imagenet", or for small images one 3 x 3 convolution
    without pooling, of stride 1 ("cifar") or 2 ("small")."""

    def __init__(self, block, layers, width=1.0, stem="imagenet", **options):
        nn.Module.__init__(self)  # twice: here so that `width` can be set before layers are made
        self.width = width
        super().__init__(block, layers, **options)
        channels = round(64 * width)
        if width != 1:  # torchvision makes these three for width 1
            self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(channels)
            self.fc = nn.Linear(round(512 * width) * block.expansion, self.fc.out_features)
        if stem != "imagenet":
            stride = 2 if stem == "small" else 1
            self.conv1 = nn.Conv2d(3, channels, 3, stride, padding=1, bias=False)
            self.maxpool = nn.Identity()
        if width != 1 or stem != "imagenet":
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        if planes == 64:
            self.inplanes = round(64 * self.width)
        return super()._make_layer(block, round(planes * self.width), blocks, stride, dilate)


# Copied from moco.py: resnet
def resnet(arch, stem="imagenet", width=1.0, **options):
    """"resnet50" -> ResNet. Raises UserError for other names."""
    basic = torchvision.models.resnet.BasicBlock
    bottleneck = torchvision.models.resnet.Bottleneck
    depths = {
        "10": (basic, [1, 1, 1, 1]),
        "18": (basic, [2, 2, 2, 2]),
        "34": (basic, [3, 4, 6, 3]),
        "50": (bottleneck, [3, 4, 6, 3]),
        "101": (bottleneck, [3, 4, 23, 3]),
        "152": (bottleneck, [3, 8, 36, 3]),
    }
    depth = arch.removeprefix("resnet")
    if depth not in depths or depth == arch:
        raise UserError(f"--arch {arch} is unknown, choose resnet{', '.join(depths)}")
    if 64 * width < 1:
        raise UserError(f"--width {width} leaves no channel, use 0.5 for half as many")
    block, layers = depths[depth]
    return ResNet(block, layers, width, stem, **options)


# Copied from simclr.py: chosen_stem
def chosen_stem(args):
    """--stem, where "auto" is CIFAR's for images of up to 32 pixels and ImageNet's above."""
    if args.stem == "auto":
        return "cifar" if args.image_size <= 32 else "imagenet"
    return args.stem


# ---------------------------------------- model ----------------------------------------
class DINOHead(nn.Module):
    """MLP to a bottleneck, unit length, prototypes (App. C). (B, D) -> (B, K), the logits."""

    def __init__(self, dim, out_dim, layers=3, hidden_dim=2048, bottleneck_dim=256, bn=False,
                 norm_last_layer=True):
        super().__init__()
        sizes = [dim] + [hidden_dim] * (layers - 1)
        modules = []
        for inputs, outputs in zip(sizes, sizes[1:]):
            modules.append(nn.Linear(inputs, outputs))
            if bn:
                modules.append(nn.BatchNorm1d(outputs))
            modules.append(nn.GELU())
        modules.append(nn.Linear(sizes[-1], bottleneck_dim))
        self.mlp = nn.Sequential(*modules) if layers > 1 else modules[0]  # official names
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        prototypes = nn.Linear(bottleneck_dim, out_dim, bias=False)  # row k becomes g_k v_k / |v_k|
        self.last_layer = nn.utils.parametrizations.weight_norm(prototypes)
        g = self.last_layer.parametrizations.weight.original0  # (K, 1); loads from weight_g too
        nn.init.ones_(g)
        g.requires_grad_(not norm_last_layer)

    def forward(self, x):
        x = F.normalize(self.mlp(x), dim=-1)
        return self.last_layer(x)


class MultiCrop(nn.Module):
    """g: backbone and head. A list of V crops (b, 3, S, S) -> logits (V b, K), rows of the first
    crop first. drop_path: for each crop (b, depth, 2), see VisionTransformer."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops, drop_path=()):
        starts = [0]  # where crops of another size begin
        for i in range(1, len(crops)):
            if crops[i].shape[-1] != crops[i - 1].shape[-1]:
                starts.append(i)
        ends = starts[1:] + [len(crops)]
        features = []
        for i, j in zip(starts, ends):  # crops of one size are one batch
            x = torch.cat(crops[i:j])
            if drop_path:
                features.append(self.backbone(x, torch.cat(drop_path[i:j])))
            else:
                features.append(self.backbone(x))
        return self.head(torch.cat(features))  # batch norm in the head sees all crops as one batch


class DINO(nn.Module):
    """Student, teacher, which gradients never reach, and the center of the teacher's logits."""

    def __init__(self, student, teacher):
        super().__init__()
        teacher.load_state_dict(student.state_dict())
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        prototypes = student.head.last_layer.out_features
        self.register_buffer("center", torch.zeros(1, prototypes))  # c

    def forward(self, crops, drop_path=()):
        """V crops, the two global ones first -> logits of the student for all of them (V b, K), of
        the teacher for those two (2 b, K). The teacher stays in training mode: its batch norm uses
        the statistics of the batch (official code)."""
        with torch.no_grad():
            teacher = self.teacher(crops[:2])
        student = self.student(crops, drop_path)
        return student, teacher


# Adapted from byol.py: update_target, other names
@torch.no_grad()
def update_teacher(student, teacher, momentum):
    """theta_t <- l theta_t + (1 - l) theta_s (Sec. 3.1). Only parameters move: the teacher's batch
    norm has statistics of its own forward passes."""
    theta_s, theta_t = list(student.parameters()), list(teacher.parameters())
    torch._foreach_lerp_(theta_t, theta_s, 1 - momentum)


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
}


def build_network(args, drop_path=0.0) -> MultiCrop:
    """Student or teacher. Raises UserError for an unknown --arch and for sizes that do not fit."""
    name, _, patch = args.arch.partition("_patch")
    if args.arch.startswith("resnet"):
        backbone = resnet(
            args.arch, chosen_stem(args), args.width, zero_init_residual=args.zero_init_residual
        )
        backbone.feature_dim = backbone.fc.in_features
        backbone.fc = nn.Identity()
    elif name in ARCHS and patch.isdecimal() and int(patch) > 0:
        patch_size = int(patch)
        sizes = {"--image-size": args.image_size}
        if args.local_crops:
            sizes["--local-size"] = args.local_size
        for flag, size in sizes.items():
            if size % patch_size:
                raise UserError(f"{flag} {size} is not a multiple of {patch_size} ({args.arch})")
        layers, width, heads = ARCHS[name]
        backbone = VisionTransformer(
            args.image_size, patch_size, width, layers, heads, drop_path, args.init_std
        )
        if args.zero_init_residual:
            for block in backbone.blocks:
                nn.init.zeros_(block.attn.proj.weight)
                nn.init.zeros_(block.mlp.fc2.weight)
    else:
        names = ", ".join(ARCHS)
        raise UserError(f"--arch {args.arch} is unknown, choose resnet50 or {names}, with _patchP")
    head = DINOHead(backbone.feature_dim, args.out_dim, args.head_layers, args.hidden_dim,
                    bn=args.head_bn, norm_last_layer=args.norm_last_layer)
    return MultiCrop(backbone, head)


def build_model(args) -> DINO:
    student = build_network(args, args.drop_path)
    teacher = build_network(args)  # without stochastic depth
    return DINO(student, teacher)


def image_encoder(model: DINO) -> nn.Module:
    """Module from images to pooled features (B, D): the teacher's backbone, the better one
    (Sec. 5.2)."""
    return model.teacher.backbone


# ---------------------------------------- loss ----------------------------------------
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
    depth = 0  # blocks for which a view draws numbers: a ResNet has no stochastic depth
    if args.drop_path and hasattr(model.student.backbone, "blocks"):
        depth = len(model.student.backbone.blocks)
    large = args.crop_split, 1.0  # shares of the area
    small = args.crop_min, args.crop_split
    s = args.jitter_strength
    local = DINOView(args.local_size, small, 0.5 * args.blur, 0.0, depth, strength=s)
    views = {
        "global1": DINOView(args.image_size, large, 1.0 * args.blur, 0.0, depth, strength=s),
        "global2": DINOView(args.image_size, large, 0.1 * args.blur, 0.2, depth, strength=s),
    }
    for i in range(args.local_crops):
        views[f"local{i + 1}"] = local
    loader = Loader(dataset, views, {}, args.batch_size, args.seed, args.workers, device)
    b = args.batch_size // world_size()

    # model and optimizer
    has_bn = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if args.accum_steps > 1 and has_bn:
        raise UserError("--accum-steps cannot be exact: batch norm must see the whole batch, use 1")
    if b % args.accum_steps:
        raise UserError(f"--accum-steps {args.accum_steps} does not divide a process's {b} samples")
    piece = b // args.accum_steps
    model = sync_batchnorm(model, device).to(device, memory_format=torch.channels_last)
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
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=peak, fused=True)
    elif args.optimizer == "lars":
        groups[1]["exclude"] = True
        optimizer = LARS(groups, lr=peak, momentum=args.momentum)
    else:
        optimizer = torch.optim.SGD(groups, lr=peak, momentum=args.momentum)

    # run directory; continues from its checkpoint if it has one
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = Run("dino", args, loader, state)
    run.say(f"lr = {args.base_lr} * {args.batch_size} / 256 = {peak:g}")
    chance = math.log(args.out_dim)
    run.say(f"collapse: kl is 0 and teacher_entropy is ln {args.out_dim} = {chance:.3f} or 0")
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
        lr = warmup_cosine(step, run.total, warmup, peak, end=args.min_lr, reach_peak=True)
        for group in optimizer.param_groups:
            group["lr"] = lr
        start, end = args.weight_decay, args.weight_decay_end
        weight_decay = warmup_cosine(step, run.total, 0, start, end=end)
        optimizer.param_groups[0]["weight_decay"] = weight_decay
        epoch = step // loader.steps_per_epoch
        start, end = args.warmup_teacher_temp, args.teacher_temp
        teacher_temp = teacher_temperature(epoch, start, end, temp_warmup)

        sums, teachers = 0.0, []
        for first in range(0, b, piece):
            rows = slice(first, first + piece)
            ddp.require_backward_grad_sync = first + piece == b  # DDP sends gradients once
            with autocast:
                student, teacher = ddp([x[rows] for x in crops], [u[rows] for u in drop_path])
            losses = dino_loss(student, teacher, model.center, teacher_temp, args.temperature)
            losses = torch.stack(losses) / args.accum_steps
            scaler.scale(losses[0]).backward()
            sums = sums + losses.detach()
            teachers.append(teacher)
        update_center(model.center, torch.cat(teachers), args.center_momentum)
        if args.clip_grad:
            scaler.unscale_(optimizer)
            for p in trained:  # each by itself (official code)
                nn.utils.clip_grad_norm_(p, args.clip_grad)
        if step < args.freeze_last_layer * loader.steps_per_epoch:
            for p in model.student.head.last_layer.parameters():
                p.grad = None  # no step, no decay and no moments either
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        start, end = args.teacher_momentum, args.teacher_momentum_end
        momentum = warmup_cosine(step, run.total, 0, start, end=end)
        update_teacher(model.student, model.teacher, momentum)

        loss, entropy, kl = sums
        terms = {"loss": (loss, chance), "teacher_entropy": (entropy, None), "kl": (kl, None)}
        run.end_step(
            terms, teacher_entropy_chance=chance, teacher_temp=teacher_temp,
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
