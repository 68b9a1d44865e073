"""SimSiam: Exploring Simple Siamese Representation Learning (Chen and He 2020, arXiv 2011.10566).

BYOL without the moving average: the network predicts, from one augmentation of an image, its own
output for another one. Two things prevent collapse (a constant output): the predictor, and that no
gradient flows through the target branch (stop-gradient). Without the second (--stop-gradient off)
the network collapses, see docs/simsiam.md.

Loss (Eq. 4), f encoder (backbone and projector), h predictor, x1 and x2 the two views of an image:
    z = f(x), p = h(z), D(p, z) = -p.z / (|p| |z|) (Eq. 1)
    L = D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2, mean over the batch
    chance level 0 (independent directions), range -1 to 1; a collapsed network also reaches -1, and
    feature_std shows it: about 1 / sqrt(E) if outputs are spread, 0 if collapsed
B global batch, b = B / processes, D features of the backbone, E output of the projector, S image
size in pixels.

Laptop        torchrun simsiam.py
              torchrun simsiam.py --stop-gradient off
1 GPU         torchrun simsiam.py --data cifar10
8 GPUs        torchrun --nproc_per_node=8 simsiam.py --data imagenet
800 epochs    torchrun --nproc_per_node=8 simsiam.py --data imagenet --recipe imagenet-800

Parameters have the official names, `module.` in front stripped; encoder.fc is the projector.
Differences from the official code:
 - The cosine falls with every step; official: with every epoch, so it is half an epoch behind on
   average.
 - Blur is a Gaussian over 13 pixels; official: Pillow's approximation of it by boxes.
 - Colours are computed in floats; official: in 8 bits.
 - A GPU computes in mixed precision; official: float32 (--dtype fp32).

Diff against: byol.py.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import UserError, all_gather, init_distributed, mixed_precision, sync_batchnorm
from common import user_errors, warmup_cosine, world_size
from data import IMAGENET_MEAN, IMAGENET_STD, Loader, color_jitter, draw_jitter, gaussian_blur
from data import grayscale, hflip, normalize, open_dataset, random_resized_crop, to_float
from knn import probe_sets
from monitor import EvalView
from run import Run, RunArgs, init_weights, parse_args


# ---------------------------------------- arguments ----------------------------------------
@dataclass
class Args(RunArgs):
    data: str = "flocks"  # named dataset or path, see docs/data.md
    eval_data: str = ""  # dataset of the evaluation in the loop (default: the splits of --data)
    recipe: str = ""  # entry of RECIPES to use instead of the one named like --data
    arch: str = "resnet50"  # resnet{10,18,34,50,101,152}
    width: float = 1.0  # factor of the channels of a ResNet; 0.5 is half as wide everywhere
    stem: Literal["auto", "imagenet", "cifar", "small"] = "auto"  # cifar: 3x3; small: 3x3, stride 2
    projector_layers: int = 3  # layers of the projector (Sec. 3); 2 for CIFAR-10 (App. D)
    hidden_dim: int = 0  # width of the projector's other layers (0: D, as in the official code)
    out_dim: int = 2048  # E, output width of projector and predictor (Sec. 3)
    predictor_dim: int = 512  # hidden width of the predictor, a bottleneck (Sec. 3)
    stop_gradient: Literal["on", "off"] = "on"  # off: the network collapses (Sec. 4.1)
    image_size: int = 224  # side of a view in pixels
    crop_min: float = 0.2  # smallest area of a crop, as a share of the image (App. A)
    jitter_strength: float = 1.0  # factor of the colour jitter's ranges, s of SimCLR (its App. A)
    blur: bool = True  # blur views (App. A); not for CIFAR-10 (App. D)
    epochs: int = 100  # passes over the data (Sec. 3); up to 800 in Table 4
    max_steps: int = 0  # stop after so many steps, without changing the schedule (0: run all of it)
    batch_size: int = 512  # images of a step, over all processes (Sec. 3)
    accum_steps: int = 1  # more is refused: batch norm needs the whole batch
    base_lr: float = 0.05  # peak learning rate: lr = base_lr * batch / 256 (Sec. 3)
    fix_pred_lr: bool = True  # the predictor's learning rate stays at the peak (Sec. 4.2, official)
    min_lr: float = 0.0  # learning rate at the end of the cosine
    warmup_epochs: float = 0.0  # linear warm-up from 0; 10 for batches from 1024 (Sec. 4.3)
    momentum: float = 0.9  # momentum of SGD
    weight_decay: float = 1e-4  # on every parameter, batch norm too (Sec. 3)
    clip_grad: float = 0.0  # largest gradient norm (0: off, as in the paper)
    init: str = ""  # weights to start from: a run, released weights, a backbone (docs/init.md)
    seed: int = 0  # random seed of weights, order and views
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on GPUs, else fp32


SMALL = dict(
    image_size=32,
    blur=False,
    arch="resnet18",
    projector_layers=2,
    hidden_dim=2048,
    weight_decay=5e-4,
)
RECIPES = {
    "flocks": dict(SMALL, arch="resnet10", width=0.25, stem="small", crop_min=0.5,
                   jitter_strength=0.25, hidden_dim=512, out_dim=512, predictor_dim=128, epochs=3,
                   batch_size=128, base_lr=1.0, weight_decay=1e-4, warmup_epochs=0.1),
    "shapes": dict(SMALL, stem="imagenet", epochs=1, batch_size=64, base_lr=0.2),
    # lightly's CIFAR-10 benchmark for batch 512 (kNN 76.4%), that is App. D with fewer epochs. What
    # differs: the last norm of the projector has no gain and offset, the cosine falls with every
    # step and not with every epoch, and initial weights are the official ones
    "cifar10": dict(SMALL, fix_pred_lr=False, epochs=200, base_lr=0.03),
    # our own, for 40 minutes of one core
    "cifar10-cpu": dict(SMALL, arch="resnet10", width=0.25, stem="small", crop_min=0.2,
                        hidden_dim=1024, out_dim=1024, predictor_dim=256, jitter_strength=0.5,
                        epochs=10, batch_size=128, base_lr=1.0, weight_decay=1e-4,
                        warmup_epochs=0.2),
    "imagenet": {},  # official code: linear probe 68.1%
    "imagenet-800": dict(epochs=800, batch_size=256),  # Table 4: linear probe 71.3%
}


# ---------------------------------------- augmentation ----------------------------------------
# Adapted from byol.py: BYOLView, both views alike, larger crops, no solarisation
class SimSiamView:
    """One of the two views, both drawn alike: MoCo v2's augmentation (App. A)."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, size, crop_min=0.2, blur=True, strength=1.0):
        self.size = size
        self.crop_min = crop_min
        self.blur = blur
        self.strength = strength

    def crop(self, image, rng):
        """In a loader worker: uint8 (3, H, W) -> uint8 (3, size, size). rng: random.Random."""
        scale = (self.crop_min, 1.0)
        return random_resized_crop(image, rng, self.size, scale, interpolation="bilinear")

    def sample(self, rng):
        """In a loader worker: what else is random about this view of this sample."""
        s = self.strength
        jitter = dict(brightness=0.4 * s, contrast=0.4 * s, saturation=0.4 * s, hue=0.1 * s)
        return {
            "flip": rng.random() < 0.5,
            "jitter": rng.random() < 0.8,
            "gray": rng.random() < 0.2,
            "blur": rng.random() < 0.5,
            "sigma": rng.uniform(0.1, 2.0),  # pixels
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
        return normalize(x, self.mean, self.std)


# Copied from moco.py: eval_view
def eval_view(args) -> EvalView:
    """The central 87.5% of the shorter side, or the whole of a small image (official code)."""
    resize = round(args.image_size / 0.875)
    if args.image_size <= 32:  # CIFAR
        resize = args.image_size
    return EvalView(args.image_size, resize, "bilinear", IMAGENET_MEAN, IMAGENET_STD)


# ---------------------------------------- backbone ----------------------------------------
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
def projector(dim, hidden_dim, out_dim, layers=3):
    """Linear, BN, ReLU for each layer but the last, which is Linear, BN without gain and offset
    (Sec. 3; official code). (B, dim) -> (B, out_dim).

    Table 3: with BN on hidden layers alone 67.4%, on the last one too 68.1% (with gain and offset;
    68.2% without, as here), without any BN 34.6% (after a warm-up of 10 epochs)."""
    sizes = [dim] + [hidden_dim] * (layers - 1)
    modules = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        modules += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    last = nn.Linear(sizes[-1], out_dim)
    last.bias.requires_grad = False  # official: it is there, but batch norm takes it away again
    return nn.Sequential(*modules, last, nn.BatchNorm1d(out_dim, affine=False))


def predictor(dim, hidden_dim):
    """h: Linear, BN, ReLU, Linear; BN on its output would make training unstable (Table 3).
    (B, dim) -> (B, dim)."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, dim),
    )


class SimSiam(nn.Module):
    """One encoder for both views, and the predictor that only one side of the loss has."""

    def __init__(self, encoder, predictor):
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor

    def forward(self, view1, view2):
        """(B, 3, S, S) twice -> predictions p1, p2 and projections z1, z2, each (B, E) and not
        normalised. Each view is a batch of its own to batch norm (official code)."""
        z1, z2 = self.encoder(view1), self.encoder(view2)
        return self.predictor(z1), self.predictor(z2), z1, z2


def build_model(args) -> SimSiam:
    encoder = resnet(args.arch, chosen_stem(args), args.width, zero_init_residual=True)
    dim = encoder.fc.in_features
    hidden_dim = args.hidden_dim or dim
    encoder.fc = projector(dim, hidden_dim, args.out_dim, args.projector_layers)  # official name
    return SimSiam(encoder, predictor(args.out_dim, args.predictor_dim))


def image_encoder(model: SimSiam) -> nn.Module:
    """Module from images to pooled features (B, D): the encoder's layers, with torchvision's names,
    without the projector."""
    encoder = nn.Sequential()
    for name, layer in model.encoder.named_children():
        if name == "fc":
            layer = nn.Flatten()
        encoder.add_module(name, layer)
    return encoder


# ---------------------------------------- loss ----------------------------------------
def simsiam_loss(p1, p2, z1, z2, stop_gradient=True):
    """-cos(p, z) (SimSiam Eq. 4), p of one view and z of the other, mean of both ways; chance
    level 0.

    (b, E) each, of this process: predictions and projections of the two views of b images, any
    length and dtype. Call it outside autocast. Returns the mean over this process's b images: the
    mean over processes is the loss of the global batch, nothing needs to be gathered."""
    if stop_gradient:
        z1 = z1.detach()
        z2 = z2.detach()
    d1 = -F.cosine_similarity(p1.float(), z2.float()).mean()  # Eq. 1
    d2 = -F.cosine_similarity(p2.float(), z1.float()).mean()
    return d1 / 2 + d2 / 2


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
        raise UserError("--accum-steps cannot be exact: batch norm must see the whole batch, use 1")

    # data
    dataset = open_dataset(args.data, args.data_dir)
    probe, bank, val = probe_sets(args, dataset)
    options = dict(crop_min=args.crop_min, blur=args.blur, strength=args.jitter_strength)
    view = SimSiamView(args.image_size, **options)
    views = {"view1": view, "view2": view}
    loader = Loader(dataset, views, {}, args.batch_size, args.seed, args.workers, device)

    # model and optimizer
    model = sync_batchnorm(build_model(args), device).to(device, memory_format=torch.channels_last)
    init_weights(model, args)
    if args.compile:
        model.compile()
    encoder = [p for p in model.encoder.parameters() if p.requires_grad]  # all but a bias before BN
    groups = [
        {"params": encoder, "weight_decay": args.weight_decay},
        {"params": model.predictor.parameters(), "weight_decay": args.weight_decay},
    ]
    peak = args.base_lr * args.batch_size / 256
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=args.momentum)

    # run directory; continues from its checkpoint if it has one
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = Run("simsiam", args, loader, state)
    run.say(f"lr = {args.base_lr} * {args.batch_size} / 256 = {peak:g}")
    spread = args.out_dim**-0.5
    run.say(f"feature_std: 1 / sqrt({args.out_dim}) = {spread:.3f} if spread, 0 if collapsed")
    warmup = round(args.warmup_epochs * loader.steps_per_epoch)
    ddp = DistributedDataParallel(model) if world_size() > 1 else model
    chance = 0.0
    if val and not run.evaluation and run.due(args.eval_every):  # random weights, or one cut off
        run.log_evaluation(probe(image_encoder(model), bank, val, eval_view(args), device))

    for step, batch in run.batches():
        view1, view2 = batch["view1"], batch["view2"]
        lr = warmup_cosine(step, run.total, warmup, peak, end=args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if args.fix_pred_lr:
            optimizer.param_groups[1]["lr"] = peak

        with autocast:
            p1, p2, z1, z2 = ddp(view1, view2)
        loss = simsiam_loss(p1, p2, z1, z2, args.stop_gradient == "on")
        scaler.scale(loss).backward()
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        terms = {"loss": (loss, chance), "feature_std": (lambda: feature_std(z1), None)}
        run.end_step(terms, feature_std_chance=spread, lr=lr)
        if run.agree_to_stop() or run.due(args.save_every, args.keep_every):
            run.save()
        if val and run.due(args.eval_every):
            run.log_evaluation(probe(image_encoder(model), bank, val, eval_view(args), device))

    return run.finish("knn", val)


if __name__ == "__main__":
    with user_errors():
        train(parse_args(Args, RECIPES))
