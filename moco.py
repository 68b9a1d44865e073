"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning
(He et al. 2019, arXiv 1911.05722).

A view's query must match the key of another view of the same image among many other keys. The other
keys wait in a queue, so that there can be far more of them than a batch holds. They stay consistent
because the key encoder is not trained: it follows the query encoder as a slow moving average (EMA).

Loss InfoNCE (Eq. 1), q and k of unit length, k_i the keys in the queue, tau the temperature:
    L = -log( exp(q.k_+ / tau) / (exp(q.k_+ / tau) + sum_i exp(q.k_i / tau)) ), mean over the batch
    chance level ln(K + 1)
    before the keys are computed: theta_k <- m theta_k + (1 - m) theta_q (Eq. 2)
B global batch, b = B / processes, D features of the backbone, E output of the head, K keys in the
queue, S image size in pixels.

Laptop        torchrun moco.py
1 GPU         torchrun moco.py --data cifar10
8 GPUs        torchrun --nproc_per_node=8 moco.py --data imagenet
Version 1     torchrun --nproc_per_node=8 moco.py --data imagenet --version 1

Version 2 (arXiv 2003.04297) adds SimCLR's MLP head, stronger augmentation and the cosine.
Differences from the official code, whose checkpoints load:
 - Batch norm and its shuffling work on groups of --bn-group samples of the global batch, as many as
   one GPU holds there, for any number of processes.
 - Running statistics are means over all groups; official: those of the first GPU.
 - Blur is a Gaussian over 13 pixels; official: Pillow's approximation of it by boxes.
 - Colours are computed in floats; official: in 8 bits.
 - --symmetric, for small data, takes the mean of both losses; official (CIFAR notebook): their sum.
 - A GPU computes in mixed precision; official: float32 (--dtype fp32).

Diff against: simclr.py.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import UserError, all_gather, all_reduce_mean, init_distributed, mixed_precision, rank
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
    version: Literal["1", "2"] = "2"  # 2: MLP head, more augmentation, cosine (arXiv 2003.04297)
    arch: str = "resnet50"  # resnet{10,18,34,50,101,152}
    width: float = 1.0  # factor of the channels of a ResNet; 0.5 is half as wide everywhere
    stem: Literal["auto", "imagenet", "cifar", "small"] = "auto"  # cifar: 3x3; small: 3x3, stride 2
    zero_init_residual: bool = False  # start residual branches at 0, unlike the official code
    head_dim: int = 128  # output width of the head (Sec. 3.3)
    queue_size: int = 65536  # K, keys in the queue, a multiple of a step's new keys (Sec. 4.1)
    key_momentum: float = 0.999  # m, momentum of the key encoder (Eq. 2, Sec. 3.2)
    symmetric: bool = False  # take queries from both views, put keys of both into the queue
    bn_group: int = 32  # samples that batch norm sees together; the papers' batch per GPU
    image_size: int = 224  # side of a view in pixels
    crop_min: float = 0.2  # smallest area of a crop, as a share of the image (official code)
    jitter_strength: float = 1.0  # factor of the colour jitter's ranges, s of SimCLR (its App. A)
    blur: bool = True  # blur views, in version 2 (its Sec. 3)
    temperature: float | None = None  # tau (default: 0.07 in version 1, 0.2 in version 2)
    epochs: int = 200  # passes over the data (Sec. 4); 800 for version 2's best
    max_steps: int = 0  # stop after so many steps, without changing the schedule (0: run all of it)
    batch_size: int = 256  # images of a step, over all processes (Sec. 4)
    accum_steps: int = 1  # more is refused: the queue makes small batches enough
    lr: float = 0.03  # learning rate at the start, for batch 256 (Sec. 4); it is not scaled here
    min_lr: float = 0.0  # version 2: rate that the cosine reaches after the last whole epoch
    warmup_epochs: float = 0.0  # linear warm-up from 0; none in the papers
    momentum: float = 0.9  # momentum of SGD (Sec. 4)
    weight_decay: float = 1e-4  # on every parameter (Sec. 4)
    clip_grad: float = 0.0  # largest gradient norm (0: off, as in the paper)
    init: str = ""  # weights to start from: a run, released weights, a backbone (docs/init.md)
    seed: int = 0  # random seed of weights, order and views
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on GPUs, else fp32


# lightly's CIFAR-10 benchmark: rate 0.06 * batch / 128, batch norm in eight groups. What differs:
# the network and its initial weights are torchvision's, and the second loss of a step does not see
# the keys of the first one.
SMALL = dict(
    arch="resnet18",
    image_size=32,
    crop_min=0.08,
    blur=False,
    temperature=0.1,
    symmetric=True,
    key_momentum=0.99,
    weight_decay=5e-4,
)
RECIPES = {
    "flocks": dict(SMALL, arch="resnet10", width=0.25, stem="small", zero_init_residual=True,
                   crop_min=0.5, jitter_strength=0.25, temperature=0.2, queue_size=256, epochs=3,
                   batch_size=128, lr=0.06, weight_decay=1e-4, warmup_epochs=0.1),
    "shapes": dict(SMALL, stem="imagenet", symmetric=False, queue_size=4096, epochs=2,
                   batch_size=128, lr=0.06),
    # lightly reports kNN 84.7%
    "cifar10": dict(SMALL, queue_size=8192, bn_group=64, epochs=200, batch_size=512, lr=0.24),
    # our own, for 45 minutes of one core
    "cifar10-cpu": dict(SMALL, arch="resnet10", width=0.25, stem="small", crop_min=0.2,
                        queue_size=4096, epochs=10, batch_size=128, lr=0.06, weight_decay=1e-4,
                        warmup_epochs=0.2),
    # Linear probe 67.5%, after 800 epochs 71.1% (both version 2); 60.6% (version 1)
    "imagenet": {},
}


# ---------------------------------------- augmentation ----------------------------------------
# Adapted from simclr.py: SimCLRView, two versions, other strengths, normalised
class MoCoView:
    """One of the two views, both drawn alike. Version 1 (official code): crop, greyscale, colour
    jitter always and with a large share of hue, flip. Version 2: SimCLR's order, weaker jitter than
    there, and blur."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, size, version="2", crop_min=0.2, blur=True, strength=1.0):
        self.size = size
        self.version = version
        self.crop_min = crop_min
        self.blur = blur and version == "2"
        self.strength = strength

    def crop(self, image, rng):
        """In a loader worker: uint8 (3, H, W) -> uint8 (3, size, size). rng: random.Random."""
        scale = (self.crop_min, 1.0)
        return random_resized_crop(image, rng, self.size, scale, interpolation="bilinear")

    def sample(self, rng):
        """In a loader worker: what else is random about this view of this sample."""
        s = self.strength
        hue, often = (0.4, 1.0) if self.version == "1" else (0.1, 0.8)
        jitter = dict(brightness=0.4 * s, contrast=0.4 * s, saturation=0.4 * s, hue=hue * s)
        return {
            "flip": rng.random() < 0.5,
            "jitter": rng.random() < often,
            "gray": rng.random() < 0.2,
            "blur": rng.random() < 0.5,
            "sigma": rng.uniform(0.1, 2.0),  # pixels
            **draw_jitter(rng, **jitter),
        }

    def __call__(self, x, params):
        """For a batch: uint8 (b, 3, size, size) and stacked parameters -> normalised float."""
        x = hflip(to_float(x), params["flip"])
        if self.version == "1":  # before the jitter, whose hue and saturation leave grey as it is
            x = grayscale(x, params["gray"])
        factors = [params[name] for name in ("brightness", "contrast", "saturation", "hue")]
        x = color_jitter(x, *factors, params["order"], params["jitter"])
        if self.version == "2":
            x = grayscale(x, params["gray"])
        if self.blur:
            x = gaussian_blur(x, params["sigma"], params["blur"], 13)  # 3 sigma on either side
        return normalize(x, self.mean, self.std)


# Adapted from simclr.py: eval_view, bilinear, normalised
def eval_view(args) -> EvalView:
    """The central 87.5% of the shorter side, or the whole of a small image (official code)."""
    resize = round(args.image_size / 0.875)
    if args.image_size <= 32:  # CIFAR
        resize = args.image_size
    return EvalView(args.image_size, resize, "bilinear", IMAGENET_MEAN, IMAGENET_STD)


# ---------------------------------------- backbone ----------------------------------------
# Adapted from simclr.py: ResNet, first weights and classifier of torchvision
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


# Adapted from simclr.py: resnet, with options of torchvision's ResNet
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


class GroupBatchNorm(nn.BatchNorm2d):
    """Batch norm over every `group` samples that follow each other in the global batch: those that
    one GPU holds in the paper (Sec. 3.3), on any number of processes. Parameter names stay."""

    group = 32

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        if len(x) % self.group == 0:
            out, mean, var = self.whole_groups(x)
        else:
            out, mean, var = self.groups_across_processes(x)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        return out

    def whole_groups(self, x):
        """-> normalised x, means over the groups of their mean and variance."""
        mean = torch.zeros_like(self.running_mean)
        var = torch.zeros_like(self.running_var)
        parts = []
        for i, part in enumerate(x.split(self.group)):
            share = 1 / (i + 1)  # of this group, so that mean and var become means over the groups
            options = dict(training=True, momentum=share, eps=self.eps)
            parts.append(F.batch_norm(part, mean, var, self.weight, self.bias, **options))
        if len(parts) == 1:
            return parts[0], mean, var
        return torch.cat(parts), mean, var

    def groups_across_processes(self, x):
        """The same where the samples of a group lie on several processes, which add up moments."""
        b, channels = x.shape[:2]
        n = self.group * x[0, 0].numel()
        first = b * torch.distributed.get_rank()
        samples = torch.arange(first, first + b, device=x.device)  # places in the global batch
        groups = samples // self.group

        def group_means(x):  # (b, C, H, W) -> (B / group, C, 1, 1)
            sums = all_gather(x.sum((2, 3)))  # (B, C)
            return sums.view(-1, self.group, channels, 1, 1).sum(1) / n

        means = group_means(x.float())
        out = x.float() - means[groups]
        variances = group_means(out.square())
        out = out * (variances[groups] + self.eps).rsqrt()
        out = out * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        mean = means.detach().mean(0).flatten()
        var = variances.detach().mean(0).flatten() * n / (n - 1)
        return out, mean, var


def group_batchnorm(model, group):
    """Makes every batch norm of `model` use statistics of `group` samples."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = GroupBatchNorm  # parameters and buffers stay, forward() is another
            module.group = group
    return model


@torch.no_grad()
def average_statistics(model):
    """Running statistics become the mean over the processes, that is over all groups. They take no
    part in training, so once a step is enough."""
    buffers = [buffer for name, buffer in model.named_buffers() if "running" in name]
    sizes = [len(buffer) for buffer in buffers]
    mean = all_reduce_mean(torch.cat(buffers))
    torch._foreach_copy_(buffers, mean.split(sizes))


# ---------------------------------------- model ----------------------------------------
class MoCo(nn.Module):
    """Two networks of one architecture, each with a classifier `fc` that is the head (mlp=True,
    version 2: with another layer before it), and the queue of keys (E, K). encoder_k starts as a
    copy of encoder_q."""

    def __init__(self, encoder_q, encoder_k, queue_size=65536, mlp=False):
        super().__init__()
        out_dim, dim = encoder_q.fc.weight.shape
        if mlp:
            for encoder in (encoder_q, encoder_k):
                encoder.fc = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), encoder.fc)
        self.encoder_q = encoder_q
        self.encoder_k = encoder_k.requires_grad_(False)
        self.encoder_k.load_state_dict(encoder_q.state_dict())
        self.register_buffer("queue", F.normalize(torch.randn(out_dim, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, *views):
        """(b, 3, S, S) each -> list of queries (b, E), not normalised."""
        return [self.encoder_q(x) for x in views]

    @torch.no_grad()
    def update_key_encoder(self, m):
        """theta_k <- m theta_k + (1 - m) theta_q (Eq. 2). Only parameters move: the key encoder's
        batch norm has statistics of its own forward passes."""
        theta_q, theta_k = list(self.encoder_q.parameters()), list(self.encoder_k.parameters())
        torch._foreach_lerp_(theta_k, theta_q, 1 - m)

    @torch.no_grad()
    def enqueue(self, keys):
        """The keys of the global batch (B, E), of unit length, take the place of the oldest
        (Sec. 3.2)."""
        size = self.queue.shape[1]
        places = torch.arange(len(keys), device=keys.device) + self.queue_ptr
        self.queue[:, places % size] = keys.T
        self.queue_ptr.copy_((self.queue_ptr + len(keys)) % size)


@torch.no_grad()
def shuffled_keys(encoder, x, order):
    """Keys of the global batch (B, E), of unit length, from each process's images (b, 3, S, S).

    Shuffling batch norm (Sec. 3.3): the encoder sees the images in `order`, a permutation of B that
    all processes share, so that a key's batch statistics are not those of its query and do not give
    it away."""
    b = len(x)
    first = b * rank()
    shuffled = all_gather(x)[order[first : first + b]]
    keys = F.normalize(encoder(shuffled).float(), dim=-1)
    return all_gather(keys)[order.argsort()]


def build_model(args) -> MoCo:
    encoders = []
    for _ in range(2):
        options = dict(num_classes=args.head_dim, zero_init_residual=args.zero_init_residual)
        encoder = resnet(args.arch, chosen_stem(args), args.width, **options)
        encoders.append(encoder)  # its fc is the head (Sec. 3.3)
    encoder_q, encoder_k = encoders
    return MoCo(encoder_q, encoder_k, args.queue_size, mlp=args.version == "2")


def image_encoder(model: MoCo) -> nn.Module:
    """Module from images to pooled features (B, D): the layers of encoder_q, with torchvision's
    names, without the head."""
    encoder = nn.Sequential()
    for name, layer in model.encoder_q.named_children():
        if name == "fc":
            layer = nn.Flatten()
        encoder.add_module(name, layer)
    return encoder


# ---------------------------------------- loss ----------------------------------------
def info_nce_loss(q, k, queue, temperature):
    """InfoNCE (MoCo Eq. 1), in nats; chance level ln(K + 1).

    q, k: (b, E) of this process, query i belongs to key i, any length and dtype; queue: (E, K),
    columns of unit length. Gradient flows into q alone. Call it outside autocast, whose products
    are in half precision. Returns the mean over this process's b queries, and the share of them
    that are closer to their key than to any in the queue: the means over processes are those of
    the global batch."""
    q, k = F.normalize(q.float(), dim=-1), F.normalize(k.detach().float(), dim=-1)
    positive = (q * k).sum(1, keepdim=True)  # (b, 1)
    logits = torch.cat([positive, q @ queue], dim=1) / temperature  # (b, 1 + K)
    labels = torch.zeros(len(q), dtype=torch.long, device=q.device)
    top1 = (logits.argmax(1) == 0).float().mean()
    return F.cross_entropy(logits, labels), top1


# Copied from byol.py: feature_std
def feature_std(z):
    """Collapse indicator (SimSiam, Sec. 4.1): standard deviation of each output of z (b, E), scaled
    to unit length, over the global batch; mean over outputs. 1 / sqrt(E): spread, 0: collapsed."""
    return all_gather(F.normalize(z.detach().float(), dim=-1)).std(0).mean()


# ---------------------------------------- training ----------------------------------------
def learning_rate(args, epoch):
    """At a fractional epoch. By whole epochs (official code): a tenth after 60% and again after 80%
    of them in version 1 (120 and 160 of 200), half a cosine in version 2."""
    if epoch < args.warmup_epochs:
        return args.lr * epoch / args.warmup_epochs
    if args.version == "1":
        drops = sum(int(epoch) >= share * args.epochs for share in (0.6, 0.8))
        return args.lr * 0.1**drops
    epoch = max(int(epoch), args.warmup_epochs)
    return warmup_cosine(epoch, args.epochs, args.warmup_epochs, args.lr, end=args.min_lr)


def train(args: Args) -> dict:
    """Trains and returns the last evaluation. Raises UserError for mistakes the user can fix."""
    device = init_distributed(args.device)
    torch.manual_seed(args.seed)
    autocast, scaler = mixed_precision(args.dtype, device)
    if args.accum_steps > 1:
        raise UserError("--accum-steps is needless with a queue: use 1 and a smaller --batch-size")
    new = 2 * args.batch_size if args.symmetric else args.batch_size  # keys of a step
    if args.queue_size % new:
        raise UserError(f"--queue-size {args.queue_size} is not a multiple of {new}, a step's keys")
    if args.bn_group < 2 or args.batch_size % args.bn_group:
        raise UserError(
            f"--bn-group {args.bn_group} must be above 1 and divide the batch, {args.batch_size}"
        )

    # data
    dataset = open_dataset(args.data, args.data_dir)
    probe, bank, val = probe_sets(args, dataset)
    options = dict(crop_min=args.crop_min, blur=args.blur, strength=args.jitter_strength)
    view = MoCoView(args.image_size, args.version, **options)
    views = {"view1": view, "view2": view}
    loader = Loader(dataset, views, {}, args.batch_size, args.seed, args.workers, device)

    # model and optimizer
    model = group_batchnorm(build_model(args), args.bn_group)
    model = model.to(device, memory_format=torch.channels_last)
    init_weights(model, args)
    if args.compile:
        model.compile()
        model.encoder_k.compile()
    trained = [p for p in model.parameters() if p.requires_grad]  # all but encoder_k's
    groups = [{"params": trained, "weight_decay": args.weight_decay}]  # norms and biases too
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum)
    temperature = args.temperature or {"1": 0.07, "2": 0.2}[args.version]

    # run directory; continues from its checkpoint if it has one
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = Run("moco", args, loader, state)
    run.say(f"version {args.version}, temperature {temperature}")
    spread = args.head_dim**-0.5
    run.say(f"feature_std: 1 / sqrt({args.head_dim}) = {spread:.3f} if spread, 0 if collapsed")
    if args.bn_group == args.batch_size:
        run.say("warning: batch norm has one group, so shuffling has no effect: lower --bn-group")
    ddp = DistributedDataParallel(model) if world_size() > 1 else model
    chance = math.log(args.queue_size + 1)
    top1_chance = 1 / (args.queue_size + 1)
    if val and not run.evaluation and run.due(args.eval_every):  # random weights, or one cut off
        run.log_evaluation(probe(image_encoder(model), bank, val, eval_view(args), device))

    for step, batch in run.batches():
        view1, view2 = batch["view1"], batch["view2"]
        lr = learning_rate(args, step / loader.steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr

        if args.symmetric:
            query_views, key_views = (view1, view2), (view2, view1)
        else:
            query_views, key_views = (view1,), (view2,)
        with autocast:
            queries = ddp(*query_views)
        model.update_key_encoder(args.key_momentum)  # official: with the weights that gave queries
        shuffle = torch.Generator().manual_seed((args.seed * 2**32 + step) % 2**63)  # for all ranks
        keys = []
        for x in key_views:
            order = torch.randperm(args.batch_size, generator=shuffle).to(device)
            with autocast:
                keys.append(shuffled_keys(model.encoder_k, x, order))  # (B, E)
        here = slice(rank() * len(view1), (rank() + 1) * len(view1))  # of the global batch
        losses, hits = [], []
        for q, k in zip(queries, keys):
            one_loss, one_top1 = info_nce_loss(q, k[here], model.queue, temperature)
            losses.append(one_loss)
            hits.append(one_top1)
        loss = sum(losses) / len(losses)
        top1 = sum(hits) / len(hits)
        scaler.scale(loss).backward()
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.enqueue(torch.cat(keys))  # only now: a query's own key is no negative
        if world_size() > 1:
            average_statistics(model)

        terms = {
            "loss": (loss, chance),
            "top1": (top1, None),
            "feature_std": (lambda: feature_std(keys[0][here]), None),
        }
        run.end_step(terms, top1_chance=top1_chance, feature_std_chance=spread, lr=lr)
        if run.agree_to_stop() or run.due(args.save_every, args.keep_every):
            run.save()
        if val and run.due(args.eval_every):
            run.log_evaluation(probe(image_encoder(model), bank, val, eval_view(args), device))

    return run.finish("knn", val)


if __name__ == "__main__":
    with user_errors():
        train(parse_args(Args, RECIPES))
