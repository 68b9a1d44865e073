"""MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers
(Chen et al. 2021, arXiv 2104.02057).

MoCo without a queue: the keys of a large batch are enough. Both views are query and key, a
predictor follows the query encoder, and the key encoder is an EMA whose momentum rises to 1. Vision
transformers train stably when their patch embedding stays as it was initialised.

Loss (Eq. 1, Algorithm 1), q and k of unit length, tau the temperature, B keys of the other view:
    ctr(q, k) = -2 tau log( exp(q.k_+ / tau) / sum_j exp(q.k_j / tau) ), mean over the batch
    L = ctr(q1, k2) + ctr(q2, k1), chance level 4 tau ln B
    before the keys (official code; in Algorithm 1 after the step), m rises from 0.99 to 1:
        theta_k <- m theta_k + (1 - m) theta_q
B global batch, b = B / processes, N tokens, D features of the backbone, E output of the heads, S
image size in pixels.

Laptop        torchrun mocov3.py
1 GPU         torchrun mocov3.py --data cifar10
8 GPUs        torchrun --nproc_per_node=8 mocov3.py --data imagenet
ResNet-50     torchrun --nproc_per_node=8 mocov3.py --data imagenet --recipe imagenet-resnet50

Differences from the official code, whose checkpoints load:
 - Blur is a Gaussian over 13 pixels; official: Pillow's approximation of it by boxes.
 - Colours are computed in floats; official: in 8 bits.
 - Transformers with a convolutional stem are not implemented.
 - A GPU computes in bfloat16 where it can; official: float16.

Diff against: moco.py.
"""

import copy
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
    arch: str = "vit_small_patch16"  # vit_{nano,micro,small,base}_patchP or resnet10 to 152
    width: float = 1.0  # factor of the channels of a ResNet; 0.5 is half as wide everywhere
    stem: Literal["auto", "imagenet", "cifar", "small"] = "auto"  # cifar: 3x3; small: 3x3, stride 2
    mlp_dim: int = 4096  # hidden width of projector and predictor (Sec. 5)
    head_dim: int = 256  # output width of projector and predictor (Sec. 5)
    key_momentum: float = 0.99  # m at the start, rises to 1 (its code); 0.996 for 1000 epochs
    freeze_patch_embed: bool = True  # a transformer's patch embedding stays as initialised (Sec. 4)
    image_size: int = 224  # side of a view in pixels
    crop_min: float = 0.08  # smallest area of a crop, as a share of the image; ResNets: 0.2
    jitter_strength: float = 1.0  # factor of the colour jitter's ranges, s of SimCLR (its App. A)
    blur: bool = True  # blur view 1 always and view 2 with probability 0.1
    temperature: float = 0.2  # tau; 1.0 for ResNets (official code)
    epochs: int = 300  # passes over the data (Table 4)
    max_steps: int = 0  # stop after so many steps, without changing the schedule (0: run all of it)
    batch_size: int = 4096  # images of a step, over all processes (Sec. 5)
    accum_steps: int = 1  # more is refused: heads with batch norm would see one piece of a batch
    grad_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute to save memory
    base_lr: float = 1.5e-4  # peak learning rate: lr = base_lr * batch / 256 (Sec. 4.1)
    min_lr: float = 0.0  # learning rate at the end of the cosine
    warmup_epochs: float = 40.0  # linear warm-up from 0 (Sec. 5)
    optimizer: Literal["adamw", "lars"] = "adamw"  # LARS for ResNets
    trust: float = 1e-3  # trust coefficient of LARS
    weight_decay: float = 0.1  # on all parameters with AdamW, on all but biases and norms with LARS
    clip_grad: float = 0.0  # largest gradient norm (0: off, as in the paper)
    init: str = ""  # weights to start from: a run, released weights, a backbone (docs/init.md)
    seed: int = 0  # random seed of weights, order and views
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on GPUs, else fp32


RESNET = dict(
    arch="resnet50",
    crop_min=0.2,
    temperature=1.0,
    optimizer="lars",
    warmup_epochs=10.0,
    weight_decay=1e-6,
)
# solo-learn's CIFAR-10 configuration: rate 0.3 * batch / 256, trust 0.02, tau 0.2. What differs:
# crops are from 20% of the area here, and bilinear; images are normalised by ImageNet's mean and
# standard deviation; keys come after the EMA. And with r = trust |p| / |d|, its LARS moves a layer
# by min(r, rate) times the direction, and not by rate * r, so steps are about 3.3 times smaller
# here at the peak of the rate.
SMALL = dict(
    RESNET,
    arch="resnet18",
    image_size=32,
    blur=False,
    temperature=0.2,
    trust=0.02,
    base_lr=0.3,
)
RECIPES = {
    "flocks": dict(SMALL, arch="resnet10", width=0.25, stem="small", crop_min=0.3, mlp_dim=512,
                   head_dim=128, key_momentum=0.95, epochs=3, batch_size=128, base_lr=0.6,
                   warmup_epochs=0.1),
    "shapes": dict(SMALL, stem="imagenet", mlp_dim=512, epochs=2, batch_size=128,
                   warmup_epochs=0.2),
    # solo-learn reports 93.1% (linear, trained along). A user of its script got about 90% (its
    # issue 385)
    "cifar10": dict(SMALL, epochs=1000, batch_size=256),
    # our own, for 45 minutes of one core
    "cifar10-cpu": dict(SMALL, arch="resnet10", width=0.25, stem="small", mlp_dim=1024,
                        head_dim=128, key_momentum=0.95, epochs=10, batch_size=128, base_lr=0.3,
                        warmup_epochs=0.6),
    "cifar10-cpu-vit": dict(arch="vit_nano_patch8", image_size=32, crop_min=0.2, blur=False,
                            mlp_dim=1024, head_dim=128, key_momentum=0.95, epochs=10,
                            batch_size=128, base_lr=2e-3, weight_decay=0.05, warmup_epochs=0.3),
    "imagenet": {},  # ViT-S: linear probe 73.2% (official code)
    "imagenet-vit-base": dict(arch="vit_base_patch16"),  # 76.7%
    "imagenet-resnet50": dict(RESNET, epochs=100, base_lr=0.6),  # 68.9%
    "imagenet-resnet50-1000": dict(  # 74.6%
        RESNET,
        epochs=1000,
        base_lr=0.3,
        weight_decay=1.5e-6,
        key_momentum=0.996,
    ),
}


# ---------------------------------------- augmentation ----------------------------------------
# Adapted from moco.py: MoCoView, two kinds of views
class MoCoV3View:
    """One of the two views, which differ as BYOL's do. View 1: always blurred. View 2: blur 10%,
    solarise 20%."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, size, first=True, crop_min=0.08, blur=True, strength=1.0):
        self.size = size
        self.crop_min = crop_min
        self.blur = blur
        self.blur_p = 1.0 if first else 0.1
        self.solarize_p = 0.0 if first else 0.2
        self.strength = strength

    def crop(self, image, rng):
        """In a loader worker: uint8 (3, H, W) -> uint8 (3, size, size). rng: random.Random."""
        scale = (self.crop_min, 1.0)
        return random_resized_crop(image, rng, self.size, scale, interpolation="bilinear")

    def sample(self, rng):
        """In a loader worker: what else is random about this view of this sample."""
        s = self.strength
        jitter = dict(brightness=0.4 * s, contrast=0.4 * s, saturation=0.2 * s, hue=0.1 * s)
        return {
            "flip": rng.random() < 0.5,
            "jitter": rng.random() < 0.8,
            "gray": rng.random() < 0.2,
            "blur": rng.random() < self.blur_p,
            "sigma": rng.uniform(0.1, 2.0),  # pixels
            "solarize": rng.random() < self.solarize_p,
            **draw_jitter(rng, **jitter),
        }

    def __call__(self, x, params):
        """For a batch: uint8 (b, 3, size, size) and stacked parameters -> normalised float."""
        x = hflip(to_float(x), params["flip"])
        factors = [params[name] for name in ("brightness", "contrast", "saturation", "hue")]
        x = color_jitter(x, *factors, params["order"], params["jitter"])
        x = grayscale(x, params["gray"])
        if self.blur:
            x = gaussian_blur(x, params["sigma"], params["blur"], 13)  # 3 sigma on either side
        if self.solarize_p:
            x = solarize(x, params["solarize"])
        return normalize(x, self.mean, self.std)


# Copied from moco.py: eval_view
def eval_view(args) -> EvalView:
    """The central 87.5% of the shorter side, or the whole of a small image (official code)."""
    resize = round(args.image_size / 0.875)
    if args.image_size <= 32:  # CIFAR
        resize = args.image_size
    return EvalView(args.image_size, resize, "bilinear", IMAGENET_MEAN, IMAGENET_STD)


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


def sincos_position_embedding(side, dim):
    """Fixed positions of a grid of side x side patches and of the class token, which has zeros
    -> (1, 1 + side * side, dim). As in the official code the first half of the channels counts
    rows, which it calls w."""
    place = torch.arange(side, dtype=torch.float32)
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    rows, columns = torch.meshgrid(place, place, indexing="ij")
    rows = rows.flatten()[:, None] * omega  # (side * side, dim / 4)
    columns = columns.flatten()[:, None] * omega
    grid = torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=1)
    return torch.cat([torch.zeros(1, dim), grid])[None]


# Adapted from slip.py: VisionTransformer, fixed positions, other initial weights, a head
class VisionTransformer(nn.Module):
    """timm's ViT: no norm before the blocks. (B, 3, S, S) -> (B, D), the class token after the last
    norm, and through `head`. In training the last block computes nothing else."""

    def __init__(self, image_size, patch_size, dim, depth, heads, freeze_patch_embed=True):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        pos_embed = sincos_position_embedding(image_size // patch_size, dim)
        self.pos_embed = nn.Parameter(pos_embed, requires_grad=False)
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(3, dim, patch_size, stride=patch_size))
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Identity()
        nn.init.normal_(self.cls_token, std=1e-6)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                parts = 3 if name.endswith("qkv") else 1  # query, key and value each by itself
                for part in module.weight.chunk(parts):
                    nn.init.xavier_uniform_(part)
                nn.init.zeros_(module.bias)
        bound = (6 / (3 * patch_size**2 + dim)) ** 0.5  # Xavier's too
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        nn.init.zeros_(self.patch_embed.proj.bias)
        self.patch_embed.requires_grad_(not freeze_patch_embed)  # Sec. 4: random and never trained

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, N, D)
        cls_token = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1) + self.pos_embed
        x = self.blocks[:-1](x)
        x = self.blocks[-1](x, queries=1 if self.training else None)
        return self.head(self.norm(x[:, 0]))


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


ARCHS = {  # layers, width, heads
    "vit_nano": (3, 96, 3),  # our own, like the next
    "vit_micro": (4, 128, 4),
    "vit_small": (12, 384, 12),
    "vit_base": (12, 768, 12),
}


def make_encoder(args):
    """-> network without head, name of the attribute its head goes to, D. Raises UserError for an
    unknown --arch and for sizes that do not fit together."""
    name, _, patch = args.arch.partition("_patch")
    if args.arch.startswith("resnet"):
        encoder = resnet(args.arch, chosen_stem(args), args.width, zero_init_residual=True)
        return encoder, "fc", encoder.fc.in_features
    if name not in ARCHS or not patch.isdecimal() or int(patch) == 0:
        names = ", ".join(ARCHS)
        raise UserError(f"--arch {args.arch} is unknown, choose resnet50 or {names}, with _patchP")
    patch_size = int(patch)
    if args.image_size % patch_size:
        raise UserError(
            f"--image-size {args.image_size} is not a multiple of {patch_size} ({args.arch})"
        )
    layers, width, heads = ARCHS[name]
    encoder = VisionTransformer(
        args.image_size, patch_size, width, layers, heads, args.freeze_patch_embed
    )
    return encoder, "head", width


# ---------------------------------------- model ----------------------------------------
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


class MoCoV3(nn.Module):
    """Two encoders of one architecture, each with its projector, and the predictor of the queries.
    momentum_encoder starts as a copy of base_encoder."""

    def __init__(self, base_encoder, momentum_encoder, predictor):
        super().__init__()
        self.base_encoder = base_encoder
        self.momentum_encoder = momentum_encoder.requires_grad_(False)
        self.predictor = predictor
        self.momentum_encoder.load_state_dict(base_encoder.state_dict())

    def forward(self, *views):
        """(b, 3, S, S) each -> list of queries (b, E), not normalised."""
        return [self.predictor(self.base_encoder(x)) for x in views]

    @torch.no_grad()
    def update_momentum_encoder(self, m):
        """theta_k <- m theta_k + (1 - m) theta_q. Only parameters move: the momentum encoder's
        batch norm has statistics of its own forward passes."""
        theta_q = list(self.base_encoder.parameters())
        theta_k = list(self.momentum_encoder.parameters())
        torch._foreach_lerp_(theta_k, theta_q, 1 - m)


def build_model(args) -> MoCoV3:
    encoders = []
    for _ in range(2):
        encoder, head, dim = make_encoder(args)
        transformer = head == "head"
        layers = 3 if transformer else 2  # official: transformers have a deeper projector
        setattr(encoder, head, mlp(dim, args.mlp_dim, args.head_dim, layers))
        encoders.append(encoder)
    base_encoder, momentum_encoder = encoders
    predictor = mlp(args.head_dim, args.mlp_dim, args.head_dim, layers=2, last_norm=transformer)
    return MoCoV3(base_encoder, momentum_encoder, predictor)


def image_encoder(model: MoCoV3) -> nn.Module:
    """Module from images to pooled features (B, D): base_encoder without its projector, weights
    shared."""
    encoder = copy.copy(model.base_encoder)
    encoder._modules = dict(encoder._modules)  # copy() shares it, and base_encoder keeps its head
    if hasattr(encoder, "head"):
        encoder.head = nn.Identity()
    else:
        encoder.fc = nn.Identity()
    return encoder


# ---------------------------------------- loss ----------------------------------------
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


# Copied from byol.py: feature_std
def feature_std(z):
    """Collapse indicator (SimSiam, Sec. 4.1): standard deviation of each output of z (b, E), scaled
    to unit length, over the global batch; mean over outputs. 1 / sqrt(E): spread, 0: collapsed."""
    return all_gather(F.normalize(z.detach().float(), dim=-1)).std(0).mean()


# ---------------------------------------- training ----------------------------------------
def train(args: Args) -> dict:
    """Trains and returns the last evaluation. Raises UserError for mistakes the user can fix."""
    device = init_distributed(args.device)
    torch.manual_seed(args.seed)
    autocast, scaler = mixed_precision(args.dtype, device)
    if args.accum_steps > 1:
        raise UserError("--accum-steps is not implemented: batch norm would see one piece, use 1")

    # data
    dataset = open_dataset(args.data, args.data_dir)
    probe, bank, val = probe_sets(args, dataset)
    options = dict(crop_min=args.crop_min, blur=args.blur, strength=args.jitter_strength)
    view1 = MoCoV3View(args.image_size, first=True, **options)
    view2 = MoCoV3View(args.image_size, first=False, **options)
    views = {"view1": view1, "view2": view2}
    loader = Loader(dataset, views, {}, args.batch_size, args.seed, args.workers, device)

    # model and optimizer
    model = sync_batchnorm(build_model(args), device).to(device, memory_format=torch.channels_last)
    init_weights(model, args)
    checkpoint_blocks(model, args.grad_checkpointing, Block)
    if args.compile:
        model.compile()
        model.momentum_encoder.compile()
    trained = [p for p in model.parameters() if p.requires_grad]  # all but momentum_encoder's
    peak = args.base_lr * args.batch_size / 256
    if args.optimizer == "lars":
        decay = [p for p in trained if p.ndim >= 2]
        no_decay = [p for p in trained if p.ndim < 2]  # norms and biases
        groups = [
            {"params": decay, "weight_decay": args.weight_decay},
            {"params": no_decay, "weight_decay": 0.0, "exclude": True},
        ]
        optimizer = LARS(groups, lr=peak, trust=args.trust)
    else:  # official: AdamW decays norms and biases too
        groups = [{"params": trained, "weight_decay": args.weight_decay}]
        optimizer = torch.optim.AdamW(groups, lr=peak, fused=True)

    # run directory; continues from its checkpoint if it has one
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = Run("mocov3", args, loader, state)
    run.say(f"lr = {args.base_lr} * {args.batch_size} / 256 = {peak:g}")
    spread = args.head_dim**-0.5
    run.say(f"feature_std: 1 / sqrt({args.head_dim}) = {spread:.3f} if spread, 0 if collapsed")
    warmup = round(args.warmup_epochs * loader.steps_per_epoch)
    ddp = DistributedDataParallel(model) if world_size() > 1 else model
    chance = 4 * args.temperature * math.log(args.batch_size)
    if val and not run.evaluation and run.due(args.eval_every):  # random weights, or one cut off
        run.log_evaluation(probe(image_encoder(model), bank, val, eval_view(args), device))

    for step, batch in run.batches():
        view1, view2 = batch["view1"], batch["view2"]
        lr = warmup_cosine(step, run.total, warmup, peak, end=args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        with autocast:
            q1, q2 = ddp(view1, view2)
        m = warmup_cosine(step, run.total, 0, args.key_momentum, end=1.0)  # official code
        model.update_momentum_encoder(m)  # official: with the weights that gave the queries
        with autocast, torch.no_grad():
            k1, k2 = model.momentum_encoder(view1), model.momentum_encoder(view2)
        loss1 = contrastive_loss(q1, k2, args.temperature)
        loss2 = contrastive_loss(q2, k1, args.temperature)
        loss = loss1 + loss2
        scaler.scale(loss).backward()
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        terms = {"loss": (loss, chance), "feature_std": (lambda: feature_std(k1), None)}
        run.end_step(terms, feature_std_chance=spread, key_momentum=m, lr=lr)
        if run.agree_to_stop() or run.due(args.save_every, args.keep_every):
            run.save()
        if val and run.due(args.eval_every):
            run.log_evaluation(probe(image_encoder(model), bank, val, eval_view(args), device))

    return run.finish("knn", val)


if __name__ == "__main__":
    with user_errors():
        train(parse_args(Args, RECIPES))
