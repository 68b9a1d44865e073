"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations
(Chen et al. 2020, arXiv 2002.05709).

Two random augmentations of an image are pulled together, all other images of the batch are pushed
away. Four things make this work: strong colour augmentation, a non-linear head that is thrown away
afterwards, large batches, and a low temperature.

Loss NT-Xent (Eq. 1), z of unit length, tau the temperature, i and j the two views of one image:
    l(i, j) = -log( exp(z_i.z_j / tau) / sum_{k != i} exp(z_i.z_k / tau) )
    L = mean over the 2B views,  chance level ln(2B - 1)
B global batch, b = B / processes, D features of the backbone, E output of the head, S image size in
pixels.

Laptop        torchrun simclr.py
1 GPU         torchrun simclr.py --data cifar10
8 GPUs        torchrun --nproc_per_node=8 simclr.py --data imagenet
SimCLR v2     torchrun --nproc_per_node=8 simclr.py --data imagenet --recipe imagenet-v2
              (its later stages are in simclrv2.py)

Backbones are torchvision's ResNets. Version 2 (arXiv 2006.10029) deepens the head; its selective
kernels and its memory of negatives are not implemented. Differences from the official code:
 - The loss is the paper's mean over the 2B views; official: the sum of the two views' means, which
   is twice that. LARS absorbs the factor, except for biases and norms, and except that weight decay
   has twice the weight beside the gradient here.
 - Each image has its own blur sigma, and the border is reflected; official: one sigma per device
   and view, and zeros outside, which darken the rim.
 - Crops are torchvision's, antialiased and with log-uniform aspect ratios, and so are the colour
   operations, where brightness is a factor as in version 2; official: TensorFlow's.
 - A GPU computes in mixed precision; official: float32 (--dtype fp32).
 - Max-pooling pads as torch does; TensorFlow's padding differs where the side is even.
 - The last, incomplete batch of an epoch is dropped; official: an epoch is a fractional number of
   batches.

Diff against: nothing, this is where the self-supervised files start.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import LARS, UserError, all_gather, init_distributed, mixed_precision, sync_batchnorm
from common import user_errors, warmup_cosine, world_size
from data import Loader, color_jitter, draw_jitter, gaussian_blur, grayscale, hflip, open_dataset
from data import random_resized_crop, to_float
from knn import probe_sets
from monitor import EvalView
from run import Run, RunArgs, init_weights, parse_args


# ---------------------------------------- arguments ----------------------------------------
@dataclass
class Args(RunArgs):
    data: str = "flocks"  # named dataset or path, see docs/data.md
    eval_data: str = ""  # dataset of the evaluation in the loop (default: the splits of --data)
    recipe: str = ""  # entry of RECIPES to use instead of the one named like --data
    arch: str = "resnet50"  # resnet{10,18,34,50,101,152}, with x2, x3, x4 behind it wider
    width: float = 1.0  # factor of the channels of a ResNet; 0.5 is half as wide everywhere
    stem: Literal["auto", "imagenet", "cifar", "small"] = "auto"  # cifar: 3x3; small: 3x3, stride 2
    head_layers: int = 2  # layers of the projection head; 3 in version 2 (its Sec. 3.1)
    head_dim: int = 128  # output width of the projection head (Sec. 2.3)
    image_size: int = 224  # side of a view in pixels
    crop_min: float = 0.08  # smallest area of a crop, as a share of the image (App. A)
    jitter_strength: float = 1.0  # strength s of the jitter (App. A); 0.5 for CIFAR-10 (App. B.9)
    blur: bool = True  # blur views (App. A); not for CIFAR-10 (App. B.9)
    temperature: float = 0.1  # tau (Table 5); 0.5 for CIFAR-10 (App. B.9)
    epochs: int = 1000  # passes over the data (Sec. 6); 100 in the ablations
    max_steps: int = 0  # stop after so many steps, without changing the schedule (0: run all of it)
    batch_size: int = 4096  # images of a step, over all processes (Sec. 2.3)
    accum_steps: int = 1  # more is refused: batch norm and negatives need the whole batch
    base_lr: float = 0.3  # peak learning rate: lr = base_lr * batch / 256 (Sec. 2.3)
    lr_scaling: Literal["linear", "sqrt"] = "linear"  # sqrt: lr = base_lr * sqrt(batch) (App. B.1)
    min_lr: float = 0.0  # learning rate at the end of the cosine
    warmup_epochs: float = 10.0  # linear warm-up from 0 (Sec. 2.3)
    optimizer: Literal["lars", "sgd"] = "lars"  # LARS in the paper (Sec. 2.2)
    momentum: float = 0.9  # momentum of either optimizer
    weight_decay: float = 1e-6  # on all but biases and batch norm (Sec. 2.3); 1e-4 in version 2
    clip_grad: float = 0.0  # largest gradient norm (0: off, as in the paper)
    init: str = ""  # weights to start from: a run, released weights, a backbone (docs/init.md)
    seed: int = 0  # random seed of weights, order and views
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on GPUs, else fp32


SMALL = dict(image_size=32, jitter_strength=0.5, blur=False, temperature=0.5)  # App. B.9
SGD = dict(optimizer="sgd", base_lr=0.12, weight_decay=5e-4, warmup_epochs=0.0)
RECIPES = {
    "flocks": dict(SMALL, arch="resnet10", width=0.25, stem="small", crop_min=0.3, temperature=0.2,
                   epochs=3, batch_size=128, optimizer="sgd", base_lr=0.25, weight_decay=1e-4,
                   warmup_epochs=0.1),
    "shapes": dict(SMALL, **SGD, arch="resnet18", stem="imagenet", epochs=2, batch_size=128),
    # lightly's CIFAR-10 benchmark (kNN 84.8%), except that here norms are not decayed, the cosine
    # falls with every step and not with every epoch, images are not normalised by mean and standard
    # deviation, crops are bicubic, batch norm sees both views together, and the head and all
    # initial weights are the official ones
    "cifar10": dict(SMALL, **SGD, arch="resnet18", epochs=200, batch_size=512),
    # our own, for 30 minutes of one core
    "cifar10-cpu": dict(SMALL, arch="resnet10", width=0.25, stem="small", temperature=0.2,
                        epochs=10, batch_size=128, optimizer="sgd", base_lr=0.4, weight_decay=1e-4,
                        warmup_epochs=0.2),
    # App. B.9: linear probe 94.0% with the best batch and rate; it searched rates 0.5, 1 and 1.5
    "cifar10-paper": dict(SMALL, batch_size=1024, base_lr=1.0),
    "imagenet": {},  # Table 6: linear probe 69.3%
    # Stage 1 of version 2 (its Sec. 3), but without its memory of negatives: linear probe 71.7%
    # with that, 71.1% in a run of the authors without it (issue 77 of the official code)
    "imagenet-v2": dict(
        head_layers=3,
        epochs=800,
        base_lr=0.1,
        lr_scaling="sqrt",
        weight_decay=1e-4,
        warmup_epochs=40.0,
    ),
}


# ---------------------------------------- augmentation ----------------------------------------
class SimCLRView:
    """One of the two views, both drawn alike (App. A). Images stay in [0, 1], because the official
    code does not normalise them."""

    mean, std = (0, 0, 0), (1, 1, 1)

    def __init__(self, size, crop_min=0.08, blur=True, strength=1.0):
        self.size = size
        self.crop_min = crop_min
        self.blur = blur
        self.strength = strength

    def crop(self, image, rng):
        """In a loader worker: uint8 (3, H, W) -> uint8 (3, size, size). rng: random.Random."""
        scale = (self.crop_min, 1.0)
        return random_resized_crop(image, rng, self.size, scale, interpolation="bicubic")

    def sample(self, rng):
        """In a loader worker: what else is random about this view of this sample."""
        s = self.strength
        jitter = dict(brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s)
        return {
            "flip": rng.random() < 0.5,
            "jitter": rng.random() < 0.8,
            "gray": rng.random() < 0.2,
            "blur": rng.random() < 0.5,
            "sigma": rng.uniform(0.1, 2.0),  # pixels
            **draw_jitter(rng, **jitter),
        }

    def __call__(self, x, params):
        """For a batch: uint8 (b, 3, size, size) and stacked parameters -> float in [0, 1]."""
        x = hflip(to_float(x), params["flip"])
        factors = [params[name] for name in ("brightness", "contrast", "saturation", "hue")]
        x = color_jitter(x, *factors, params["order"], params["jitter"])
        x = grayscale(x, params["gray"])
        if self.blur:
            kernel_size = self.size // 20 * 2 + 1  # a tenth of the image, odd
            x = gaussian_blur(x, params["sigma"], params["blur"], kernel_size)
        return x


def eval_view(args) -> EvalView:
    """The central 87.5% of the shorter side, or the whole of a small image (official code)."""
    resize = round(args.image_size / 0.875)
    if args.image_size <= 32:  # CIFAR
        resize = args.image_size
    return EvalView(args.image_size, resize, "bicubic", mean=(0, 0, 0), std=(1, 1, 1))


# ---------------------------------------- backbone ----------------------------------------
class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet, `width` times as wide everywhere, without classifier.
    (B, 3, S, S) -> (B, D). stem: "imagenet", or for small images one 3 x 3 convolution without
    pooling, of stride 1 ("cifar") or 2 ("small")."""

    def __init__(self, block, layers, width=1.0, stem="imagenet"):
        nn.Module.__init__(self)  # twice: here so that `width` can be set before layers are made
        self.width = width
        super().__init__(block, layers, zero_init_residual=True)
        channels = round(64 * width)
        self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        if stem != "imagenet":
            stride = 2 if stem == "small" else 1
            self.conv1 = nn.Conv2d(3, channels, 3, stride, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.feature_dim = round(512 * width) * block.expansion
        self.fc = nn.Identity()
        # SimCLR's official code: normal of variance 1 / fan-in, cut off at two standard deviations
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                std = module.weight[0].numel() ** -0.5 / 0.87962566  # the cut leaves 0.88 of it
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        if planes == 64:
            self.inplanes = round(64 * self.width)
        return super()._make_layer(block, round(planes * self.width), blocks, stride, dilate)


def resnet(arch, stem="imagenet", width=1.0):
    """"resnet50" or, twice as wide, "resnet50x2" -> ResNet. Raises UserError for other names."""
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
    match = re.fullmatch(r"resnet(\d+)(?:x([1-4]))?", arch)
    if not match or match[1] not in depths:
        names = ", ".join(depths)
        raise UserError(f"--arch {arch} is unknown, choose resnet{names} or wider, resnet50x2")
    if 64 * width < 1:
        raise UserError(f"--width {width} leaves no channel, use 0.5 for half as many")
    block, layers = depths[match[1]]
    return ResNet(block, layers, width * int(match[2] or 1), stem)


def chosen_stem(args):
    """--stem, where "auto" is CIFAR's for images of up to 32 pixels and ImageNet's above."""
    if args.stem == "auto":
        return "cifar" if args.image_size <= 32 else "imagenet"
    return args.stem


# ---------------------------------------- model ----------------------------------------
class ProjectionHead(nn.Module):
    """g of Sec. 2.1: Linear, BN, ReLU as wide as its input, then Linear, BN without offset (BN is
    the official code's, the paper does not mention it). (B, D) -> (B, out_dim).

    forward(h, layers=k) stops after k layers; version 2 fine-tunes from there with k = 1."""

    def __init__(self, dim, out_dim=128, layers=2):
        super().__init__()
        sizes = [dim] * layers + [out_dim]
        linears = [nn.Linear(a, b, bias=False) for a, b in zip(sizes, sizes[1:])]
        norms = [nn.BatchNorm1d(size) for size in sizes[1:]]
        norms[-1].register_parameter("bias", None)
        for linear in linears:
            nn.init.normal_(linear.weight, std=0.01)
        self.linears = nn.ModuleList(linears)
        self.norms = nn.ModuleList(norms)

    def forward(self, h, layers=None):
        last = len(self.linears) - 1
        for k, (linear, norm) in enumerate(zip(self.linears, self.norms)):
            if k == layers:
                break
            h = norm(linear(h))
            if k < last:
                h = F.relu(h)
        return h


class SimCLR(nn.Module):
    """Backbone f and head g; training sees g(f(x)), evaluation f(x) (Sec. 2.1)."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x):
        """(B, 3, S, S) -> (B, out_dim), not normalised."""
        return self.head(self.backbone(x))


def build_model(args) -> SimCLR:
    backbone = resnet(args.arch, chosen_stem(args), args.width)
    head = ProjectionHead(backbone.feature_dim, args.head_dim, args.head_layers)
    return SimCLR(backbone, head)


class HeadFeatures(nn.Module):
    """The backbone and the first layers of its head, from which version 2 fine-tunes (its Sec. 2).
    (B, 3, S, S) -> (B, D)."""

    def __init__(self, backbone, head, layers):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.layers = layers

    def forward(self, x):
        return self.head(self.backbone(x), layers=self.layers)


def image_encoder(model: SimCLR, head_layer: int = 0) -> nn.Module:
    """Module from images to pooled features (B, D): the backbone, or the output of layer
    `head_layer` of the head."""
    if head_layer == 0:
        return model.backbone
    if head_layer >= len(model.head.linears):
        below = len(model.head.linears) - 1
        raise UserError(f"head layer {head_layer} is not one of the first {below}")
    return HeadFeatures(model.backbone, model.head, head_layer)


# ---------------------------------------- loss ----------------------------------------
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


# ---------------------------------------- training ----------------------------------------
def train(args: Args) -> dict:
    """Trains and returns the last evaluation. Raises UserError for mistakes the user can fix."""
    device = init_distributed(args.device)
    torch.manual_seed(args.seed)
    autocast, scaler = mixed_precision(args.dtype, device)
    if args.accum_steps > 1:
        raise UserError("--accum-steps cannot be exact: batch norm must see the whole batch, use 1")

    # data
    dataset = open_dataset(args.data, args.data_dir)
    probe, bank, val = probe_sets(args, dataset)
    options = dict(crop_min=args.crop_min, blur=args.blur, strength=args.jitter_strength)
    view = SimCLRView(args.image_size, **options)
    views = {"view1": view, "view2": view}
    loader = Loader(dataset, views, {}, args.batch_size, args.seed, args.workers, device)

    # model and optimizer
    model = sync_batchnorm(build_model(args), device).to(device, memory_format=torch.channels_last)
    init_weights(model, args)
    if args.compile:
        model.compile()
    trained = list(model.parameters())
    decay = [p for p in trained if p.ndim >= 2]
    no_decay = [p for p in trained if p.ndim < 2]  # norms and biases
    groups = [
        {"params": decay, "weight_decay": args.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    peak = args.base_lr * args.batch_size / 256
    if args.lr_scaling == "sqrt":
        peak = args.base_lr * args.batch_size**0.5
    if args.optimizer == "lars":
        groups[1]["exclude"] = True
        optimizer = LARS(groups, lr=peak, momentum=args.momentum, lr_in_momentum=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=peak, momentum=args.momentum)

    # run directory; continues from its checkpoint if it has one
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = Run("simclr", args, loader, state)
    if args.lr_scaling == "sqrt":
        run.say(f"lr = {args.base_lr} * sqrt({args.batch_size}) = {peak:g}")
    else:
        run.say(f"lr = {args.base_lr} * {args.batch_size} / 256 = {peak:g}")
    warmup = round(args.warmup_epochs * loader.steps_per_epoch)
    ddp = DistributedDataParallel(model) if world_size() > 1 else model
    chance = math.log(2 * args.batch_size - 1)
    if val and not run.evaluation and run.due(args.eval_every):  # random weights, or one cut off
        run.log_evaluation(probe(image_encoder(model), bank, val, eval_view(args), device))

    for step, batch in run.batches():
        view1, view2 = batch["view1"], batch["view2"]
        lr = warmup_cosine(step, run.total, warmup, peak, end=args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        with autocast:
            z1, z2 = ddp(torch.cat([view1, view2])).chunk(2)
        loss = nt_xent_loss(z1, z2, args.temperature)
        scaler.scale(loss).backward()
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        run.end_step({"loss": (loss, chance)}, lr=lr)
        if run.agree_to_stop() or run.due(args.save_every, args.keep_every):
            run.save()
        if val and run.due(args.eval_every):
            run.log_evaluation(probe(image_encoder(model), bank, val, eval_view(args), device))

    return run.finish("knn", val)


if __name__ == "__main__":
    with user_errors():
        train(parse_args(Args, RECIPES))
