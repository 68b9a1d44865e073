"""BYOL: Bootstrap Your Own Latent, A New Approach to Self-Supervised Learning
(Grill et al. 2020, arXiv 2006.07733).

An online network predicts, from one augmentation of an image, what a target network says of another
one; no image is pushed away from any other. The target follows the online network as a slow moving
average (EMA). Three things prevent collapse (a constant output): only the online network has a
predictor, only it gets gradients, and the target moves slowly. Even a target that is never updated
gives a useful signal (--target random, see docs/byol.md).

Loss (Eq. 2), f backbone, g projector, q predictor, theta online and xi target weights, x and x' two
views of an image:
    p = q(g_theta(f_theta(x))), z' = g_xi(f_xi(x')), both scaled to unit length
    L = |p - z'|^2 = 2 - 2 p.z', plus the same with x and x' exchanged, mean over the batch
    after the optimizer's step: xi <- tau xi + (1 - tau) theta (Eq. 1),
    where tau goes from --tau to --tau-end (the paper: 1) on half a cosine
    chance level 4 (independent directions: p.z' = 0), range 0 to 8; a collapsed network also
    reaches 0, and feature_std shows it: about 1 / sqrt(E) if outputs are spread, 0 if collapsed
B global batch, b = B / processes, D features of the backbone, E output of the projector, S image
size in pixels.

Laptop        torchrun byol.py
              torchrun byol.py --target random
1 GPU         torchrun byol.py --data cifar10
8 GPUs        torchrun --nproc_per_node=8 byol.py --data imagenet
300 epochs    torchrun --nproc_per_node=8 byol.py --data imagenet --recipe imagenet-300

Backbones are torchvision's ResNets. Differences from the official code:
 - No linear classifier is trained along on the labels. It does not reach the encoder, and kNN shows
   the same.
 - Colour operations are torchvision's: brightness is a factor, contrast and saturation mix with
   grey; official: brightness is added, contrast is per channel, saturation is HSV's.
 - Crops are antialiased, and drawn again until they fit into the image; official: TensorFlow's
   resizing, and a crop that does not fit is clipped.
 - Convolutions start as in simclr.py; official: Haiku's default.
 - A GPU computes in mixed precision; official: float32 (--dtype fp32).
 - Max-pooling and convolutions of stride 2 pad alike on all sides, as torch does; official: Haiku's
   SAME, which pads the far sides more where the side is even.
 - The blur reflects the border; official: zeros outside, which darken the rim.
 - The last, incomplete batch of an epoch is dropped; official: an epoch is a fractional number of
   batches.

Diff against: simclr.py.
"""

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
    arch: str = "resnet50"  # resnet{10,18,34,50,101,152}, with x2, x3, x4 behind it wider
    width: float = 1.0  # factor of the channels of a ResNet; 0.5 is half as wide everywhere
    stem: Literal["auto", "imagenet", "cifar", "small"] = "auto"  # cifar: 3x3; small: 3x3, stride 2
    hidden_dim: int = 4096  # hidden width of projector and predictor (Sec. 3.3)
    out_dim: int = 256  # E, output width of projector and predictor (Sec. 3.3)
    target: Literal["ema", "random"] = "ema"  # random: the target is never updated (Sec. 3)
    tau: float = 0.996  # the target's EMA momentum in the first step (Sec. 3.3)
    tau_end: float = 1.0  # the target's EMA momentum after the last step (Sec. 3.3)
    image_size: int = 224  # side of a view in pixels
    crop_min: float = 0.08  # smallest area of a crop, as a share of the image (App. B)
    jitter_strength: float = 1.0  # factor of the colour jitter's ranges, s of SimCLR (its App. A)
    blur: bool = True  # blur views (App. B); not for CIFAR-10
    epochs: int = 1000  # passes over the data (Sec. 3.3); 300 in the ablations
    max_steps: int = 0  # stop after so many steps, without changing the schedule (0: run all of it)
    batch_size: int = 4096  # images of a step, over all processes (Sec. 3.3)
    accum_steps: int = 1  # more is refused: batch norm needs the whole batch
    base_lr: float = 0.2  # peak learning rate: lr = base_lr * batch / 256 (Sec. 3.3)
    min_lr: float = 0.0  # learning rate at the end of the cosine
    warmup_epochs: float = 10.0  # linear warm-up from 0 (Sec. 3.3)
    optimizer: Literal["lars", "sgd"] = "lars"  # LARS in the paper (Sec. 3.3)
    momentum: float = 0.9  # momentum of either optimizer
    weight_decay: float = 1.5e-6  # on all but biases and batch norm (Sec. 3.3)
    clip_grad: float = 0.0  # largest gradient norm (0: off, as in the paper)
    init: str = ""  # weights to start from: a run, released weights, a backbone (docs/init.md)
    seed: int = 0  # random seed of weights, order and views
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on GPUs, else fp32


SGD = dict(
    image_size=32,
    blur=False,
    hidden_dim=1024,
    optimizer="sgd",
    weight_decay=5e-4,
    warmup_epochs=0.0,
)
# lightly's CIFAR-10 benchmark (kNN 86.8%): SGD with rate 0.06 * batch / 128 and decay 5e-4 on the
# loss (-cos - cos) / 2. The loss here is four times that (plus a constant), so a quarter of the
# rate and four times the decay make the same steps. What differs: norms and biases are not decayed,
# the cosine falls with every step and not with every epoch, the target does not start as a copy of
# the online network, crops are bicubic, and initial weights and the heads' biases are the official
# ones.
LIGHTLY = dict(base_lr=0.12 / 4, weight_decay=4 * 5e-4, tau=0.99, tau_end=0.99)
RECIPES = {
    # our own. With half the rate, larger crops and a target that comes to rest, all of three seeds
    # fell in the last epoch; with this all rise to their end
    "flocks": dict(SGD, arch="resnet10", width=0.25, stem="small", crop_min=0.3,
                   jitter_strength=0.25, hidden_dim=512, out_dim=128, tau=0.98, tau_end=0.98,
                   epochs=3, batch_size=128, base_lr=0.2, weight_decay=4e-4, warmup_epochs=0.1),
    "shapes": dict(SGD, arch="resnet18", stem="imagenet", tau=0.97, epochs=1, batch_size=64,
                   base_lr=1.0),
    "cifar10": dict(SGD, **LIGHTLY, arch="resnet18", epochs=200, batch_size=512),
    # our own, for 40 minutes of one core. With a target that stands still at the end, kNN hardly
    # rose after the third of five epochs
    "cifar10-cpu": dict(SGD, arch="resnet10", width=0.25, stem="small", crop_min=0.2,
                        jitter_strength=0.5, out_dim=128, tau=0.97, tau_end=0.97, epochs=10,
                        batch_size=128, base_lr=0.4, weight_decay=1e-4, warmup_epochs=0.2),
    # The paper's numbers, linear probes, come from networks in which the last norm of each block
    # started at 1. It starts at 0 here, as in the official code now, which says that this makes no
    # difference for a ResNet-50.
    "imagenet": {},  # Table 1: 74.3%
    "imagenet-300": dict(epochs=300, base_lr=0.3, tau=0.99, weight_decay=1e-6),  # ablations: 72.5%
    "imagenet-100": dict(epochs=100, base_lr=0.45, tau=0.99, weight_decay=1e-6),  # official configs
    "imagenet-b512": dict(batch_size=512, base_lr=0.4, tau=0.9995),  # App. G: 73.7%
}


# ---------------------------------------- augmentation ----------------------------------------
# Adapted from simclr.py: SimCLRView, other strengths, solarisation, normalised; two kinds of views
class BYOLView:
    """One of the two views, which differ in their probabilities of blur and solarisation (App. B,
    Table 6)."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, size, crop_min=0.08, blur=1.0, solarize=0.0, strength=1.0):
        self.size = size
        self.crop_min = crop_min
        self.blur = blur
        self.solarize = solarize
        self.strength = strength

    def crop(self, image, rng):
        """In a loader worker: uint8 (3, H, W) -> uint8 (3, size, size). rng: random.Random."""
        scale = (self.crop_min, 1.0)
        return random_resized_crop(image, rng, self.size, scale, interpolation="bicubic")

    def sample(self, rng):
        """In a loader worker: what else is random about this view of this sample."""
        s = self.strength
        jitter = dict(brightness=0.4 * s, contrast=0.4 * s, saturation=0.2 * s, hue=0.1 * s)
        return {
            "flip": rng.random() < 0.5,
            "jitter": rng.random() < 0.8,
            "gray": rng.random() < 0.2,
            "blur": rng.random() < self.blur,
            "sigma": rng.uniform(0.1, 2.0),  # pixels
            "solarize": rng.random() < self.solarize,
            **draw_jitter(rng, **jitter),
        }

    def __call__(self, x, params):
        """For a batch: uint8 (b, 3, size, size) and stacked parameters -> normalised float."""
        x = hflip(to_float(x), params["flip"])
        factors = [params[name] for name in ("brightness", "contrast", "saturation", "hue")]
        x = color_jitter(x, *factors, params["order"], params["jitter"])
        x = grayscale(x, params["gray"])
        if self.blur:
            kernel_size = self.size // 20 * 2 + 1  # a tenth of the image, odd
            x = gaussian_blur(x, params["sigma"], params["blur"], kernel_size)
        if self.solarize:
            x = solarize(x, params["solarize"])
        return normalize(x, self.mean, self.std)


# Adapted from simclr.py: eval_view, normalised
def eval_view(args) -> EvalView:
    """The central 87.5% of the shorter side, or the whole of a small image (official code)."""
    resize = round(args.image_size / 0.875)
    if args.image_size <= 32:  # CIFAR
        resize = args.image_size
    return EvalView(args.image_size, resize, "bicubic", IMAGENET_MEAN, IMAGENET_STD)


# ---------------------------------------- backbone ----------------------------------------
# Copied from simclr.py: ResNet
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


# Copied from simclr.py: resnet
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


# Copied from simclr.py: chosen_stem
def chosen_stem(args):
    """--stem, where "auto" is CIFAR's for images of up to 32 pixels and ImageNet's above."""
    if args.stem == "auto":
        return "cifar" if args.image_size <= 32 else "imagenet"
    return args.stem


# ---------------------------------------- model ----------------------------------------
def mlp(dim, hidden_dim, out_dim):
    """Projector g and predictor q (Sec. 3.3): Linear, BN, ReLU, Linear, nothing after it.
    (B, dim) -> (B, out_dim)."""
    layers = nn.Sequential(
        nn.Linear(dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, out_dim, bias=False),
    )
    for linear in (layers[0], layers[3]):  # official: Haiku's default
        std = linear.in_features**-0.5
        nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layers[0].bias)
    return layers


class Encoder(nn.Module):
    """g(f(x)): backbone and projector. (B, 3, S, S) -> (B, E)."""

    def __init__(self, backbone, projector):
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, x):
        return self.projector(self.backbone(x))


class BYOL(nn.Module):
    """The online network with its predictor, and the target, which gradients never reach."""

    def __init__(self, online, target, predictor):
        super().__init__()
        self.online = online
        self.target = target.requires_grad_(False)
        self.predictor = predictor

    def forward(self, view1, view2):
        """(B, 3, S, S) twice -> predictions p1, p2 and the target's projections z1, z2, each (B, E)
        and not normalised. Each view is a batch of its own to batch norm, the target's too
        (official code)."""
        p1, p2 = self.predictor(self.online(view1)), self.predictor(self.online(view2))
        with torch.no_grad():
            z1, z2 = self.target(view1), self.target(view2)
        return p1, p2, z1, z2


@torch.no_grad()
def update_target(online, target, tau):
    """xi <- tau xi + (1 - tau) theta (Eq. 1). Only parameters move: the target's batch norm has
    statistics of its own forward passes."""
    theta, xi = list(online.parameters()), list(target.parameters())
    torch._foreach_lerp_(xi, theta, 1 - tau)


def build_model(args) -> BYOL:
    encoders = []
    for _ in range(2):  # official: the target starts with other weights than the online network
        backbone = resnet(args.arch, chosen_stem(args), args.width)
        projector = mlp(backbone.feature_dim, args.hidden_dim, args.out_dim)
        encoders.append(Encoder(backbone, projector))
    online, target = encoders
    predictor = mlp(args.out_dim, args.hidden_dim, args.out_dim)
    return BYOL(online, target, predictor)


def image_encoder(model: BYOL) -> nn.Module:
    """Module from images to pooled features (B, D): f of the online network (Sec. 3.1)."""
    return model.online.backbone


# ---------------------------------------- loss ----------------------------------------
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
        raise UserError("--accum-steps cannot be exact: batch norm must see the whole batch, use 1")

    # data
    dataset = open_dataset(args.data, args.data_dir)
    probe, bank, val = probe_sets(args, dataset)
    blur1, blur2 = (1.0, 0.1) if args.blur else (0.0, 0.0)  # probabilities (Table 6)
    options = dict(crop_min=args.crop_min, strength=args.jitter_strength)
    view1 = BYOLView(args.image_size, blur=blur1, solarize=0.0, **options)
    view2 = BYOLView(args.image_size, blur=blur2, solarize=0.2, **options)
    views = {"view1": view1, "view2": view2}
    loader = Loader(dataset, views, {}, args.batch_size, args.seed, args.workers, device)

    # model and optimizer
    model = sync_batchnorm(build_model(args), device).to(device, memory_format=torch.channels_last)
    init_weights(model, args)
    if args.compile:
        model.compile()
    trained = [p for p in model.parameters() if p.requires_grad]  # all but the target's
    decay = [p for p in trained if p.ndim >= 2]
    no_decay = [p for p in trained if p.ndim < 2]  # norms and biases
    groups = [
        {"params": decay, "weight_decay": args.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    peak = args.base_lr * args.batch_size / 256
    if args.optimizer == "lars":
        groups[1]["exclude"] = True
        optimizer = LARS(groups, lr=peak, momentum=args.momentum)
    else:
        optimizer = torch.optim.SGD(groups, lr=peak, momentum=args.momentum)

    # run directory; continues from its checkpoint if it has one
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = Run("byol", args, loader, state)
    run.say(f"lr = {args.base_lr} * {args.batch_size} / 256 = {peak:g}")
    spread = args.out_dim**-0.5
    run.say(f"feature_std: 1 / sqrt({args.out_dim}) = {spread:.3f} if spread, 0 if collapsed")
    warmup = round(args.warmup_epochs * loader.steps_per_epoch)
    ddp = DistributedDataParallel(model) if world_size() > 1 else model
    chance = 4.0

    def evaluate():
        metrics = probe(image_encoder(model), bank, val, eval_view(args), device)
        if args.target == "random":  # the online network should surpass it
            target = probe(model.target.backbone, bank, val, eval_view(args), device)
            metrics |= {f"target_{name}": value for name, value in target.items()}
        return metrics

    if val and not run.evaluation and run.due(args.eval_every):  # random weights, or one cut off
        run.log_evaluation(evaluate())

    for step, batch in run.batches():
        view1, view2 = batch["view1"], batch["view2"]
        lr = warmup_cosine(step, run.total, warmup, peak, end=args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        with autocast:
            p1, p2, z1, z2 = ddp(view1, view2)
        loss = byol_loss(p1, p2, z1, z2)
        scaler.scale(loss).backward()
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        tau = warmup_cosine(step, run.total, 0, args.tau, end=args.tau_end)  # Sec. 3.3
        if args.target == "random":
            tau = 1.0
        update_target(model.online, model.target, tau)

        terms = {"loss": (loss, chance), "feature_std": (lambda: feature_std(z1), None)}
        run.end_step(terms, feature_std_chance=spread, tau=tau, lr=lr)
        if run.agree_to_stop() or run.due(args.save_every, args.keep_every):
            run.save()
        if val and run.due(args.eval_every):
            run.log_evaluation(evaluate())

    return run.finish("knn", val)


if __name__ == "__main__":
    with user_errors():
        train(parse_args(Args, RECIPES))
