"""SimCLR v2: Big Self-Supervised Models are Strong Semi-Supervised Learners
(Chen et al. 2020, arXiv 2006.10029).

Stages 2 and 3 of three; stage 1 is simclr.py. The pretrained network becomes a classifier with the
labels of a small part of the images; that classifier then teaches a student on all images, without
their labels. Three things make this work: fine-tuning from inside the projection head, bigger
networks where labels are fewer, and images without labels once the task is known.

Losses, f(x) the C logits of an image x, tau the temperature, P(y|x; tau) = softmax(f(x) / tau)[y]:
    finetune   L = -mean over the labelled x of log P(y|x; 1)
    distill    L = -mean over all x of sum_y P_T(y|x; tau) log P_S(y|x; tau)                (Eq. 2)
               or alpha times this plus 1 - alpha times that of finetune                    (Eq. 3)
    chance level of each: ln C
B global batch, b = B / processes, N images, D features of the backbone, T teacher, S student.

Laptop     python simclrv2.py (without flags: all three stages, see whole_sequence)
           torchrun simclrv2.py --checkpoint runs/simclr_flocks_...
           torchrun simclrv2.py --recipe flocks-distill --teacher runs/simclrv2_flocks_...
           (and --checkpoint runs/simclr_flocks_..., or the student's weights are random)
1 GPU      torchrun simclrv2.py --data cifar10 --checkpoint RUN
8 GPUs     torchrun --nproc_per_node=8 simclrv2.py --data imagenet --checkpoint RUN
           (then with --recipe cifar10-distill or imagenet-self-distill, and --teacher RUN)

Differences from the official code:
 - When distilling, the update takes tau^2 times the loss, as in the official notebook (where tau is
   1); Eq. 2 has no such factor. Without it the gradient of whatever LARS does not scale (biases,
   norms, the classifier), and with SGD of everything, would grow as 1 / tau^2.
 - With LARS the weight decay takes the factor too. It then has the weight that it has in Eq. 2, and
   layers that LARS scales make the steps of Eq. 2 itself, for any tau.
 - With SGD the classifier's bias is not decayed; official: it is.
 - Eq. 3 has sums over the labelled and over all images, here both are means; the notebook has no
   Eq. 3. Losses are in nats.
 - The labelled images are drawn by --seed; official: lists of files.
 - Crops are torchvision's (see simclr.py), max-pooling pads as torch does; official: TensorFlow's.
 - A GPU computes in mixed precision; official: float32 (--dtype fp32).
 - The last, incomplete batch of an epoch is dropped; official: an epoch is a fractional number of
   batches.

Diff against: simclr.py.
"""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import LARS, UserError, all_gather, init_distributed, mixed_precision, rank
from common import sync_batchnorm, user_errors, warmup_cosine, world_size
from data import Loader, hflip, open_dataset, random_resized_crop, to_float
from knn import extract, workers_with_room
from monitor import EvalView, chunks, evaluation_set, hit_rank, labelled, percent
from monitor import refuse_labels_beyond, say_evaluation
from run import Run, RunArgs, fingerprint, init_weights, load_checkpoint, parse_args


# ---------------------------------------- arguments ----------------------------------------
@dataclass
class Args(RunArgs):
    data: str = "flocks"  # named dataset or path, see docs/data.md
    eval_data: str = ""  # dataset of the evaluation in the loop (default: the val split of --data)
    recipe: str = ""  # entry of RECIPES to use instead of the one named like --data
    stage: Literal["finetune", "distill"] = "finetune"  # distill is set by --recipe NAME-distill
    checkpoint: str = ""  # run of simclr.py to start from (distill: default is a new network)
    teacher: str = ""  # distill: run of this file to learn from
    label_fraction: float = 0.01  # class-balanced part of the labels (distill: that of the teacher)
    head_layer: int = 1  # layers of the head to keep (0: none: all labels, students; Sec. 3.1)
    temperature: float = 1.0  # distill: tau; 0.1 for a student as large as its teacher (Sec. 3.1)
    alpha: float = 1.0  # distill: weight of the teacher in Eq. 3; 1 needs no labels
    arch: str = ""  # resnet{10,18,34,50,101,152}, maybe x2, x3, x4 (default: the earlier run's)
    width: float = 0.0  # factor of the channels of a ResNet (0: that of the earlier run)
    stem: Literal["auto", "imagenet", "cifar", "small"] = "auto"  # auto: the earlier run's
    image_size: int | None = None  # side of a view in pixels (default: that of the earlier run)
    crop_min: float = 0.08  # smallest area of a crop, as a share of the image (official code)
    epochs: int = 60  # passes over the data (Sec. 3.1); 30 with 10% or all labels, 400 to distill
    max_steps: int = 0  # stop after so many steps, without changing the schedule (0: run all of it)
    batch_size: int = 1024  # images of a step, over all processes (Sec. 3.1)
    accum_steps: int = 1  # more is refused: batch norm needs the whole batch
    base_lr: float = 0.005  # peak: lr = base_lr * sqrt(batch) (Sec. 3.1); wide: 0.002, distill: 0.1
    min_lr: float = 0.0  # learning rate at the end of the cosine
    warmup_epochs: float = 0.0  # linear warm-up from 0 (Sec. 3.1)
    optimizer: Literal["lars", "sgd"] = "lars"  # LARS in the paper (Sec. 3.1)
    momentum: float = 0.9  # momentum of either optimizer
    weight_decay: float = 0.0  # on all but biases and batch norm (Sec. 3.1); 1e-4 to distill
    clip_grad: float = 0.0  # largest gradient norm (0: off, as in the paper)
    init: str = ""  # weights to start from: a run, released weights, a backbone (docs/init.md)
    seed: int = 0  # random seed of weights, order, views and the choice of labels
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on GPUs, else fp32


DISTILL = dict(  # Sec. 3.1
    stage="distill",
    head_layer=0,
    epochs=400,
    batch_size=4096,
    base_lr=0.1,
    weight_decay=1e-4,
    warmup_epochs=20.0,
)
SMALL = dict(
    DISTILL,
    temperature=0.1,
    optimizer="sgd",
    weight_decay=5e-4,
    warmup_epochs=0.0,
)
# The paper's numbers for a ResNet-50 with 1, 10 and 100% of the labels, 57.9, 68.4 and 76.3%, come
# from a network that was pretrained with a memory of negatives (linear probe 71.7%). simclr.py has
# none (71.1% in a run of the authors without it). Those for a student, 73.9 and 77.5% with 1 and
# 10% of the labels, come from a ResNet-152 x3 with selective kernels, which cannot be built here.
RECIPES = {
    "flocks": dict(label_fraction=0.1, epochs=20, batch_size=128, base_lr=0.02),
    "flocks-distill": dict(SMALL, epochs=2, batch_size=128),
    "shapes": dict(label_fraction=0.1, epochs=20, batch_size=128, base_lr=0.02),
    "shapes-distill": dict(SMALL, epochs=2, batch_size=128),
    "cifar10": dict(label_fraction=0.1, epochs=60, batch_size=512),
    "cifar10-distill": dict(SMALL, epochs=200, batch_size=512, base_lr=0.01),
    # our own, for one core, after simclr.py --recipe cifar10-cpu
    "cifar10-cpu": dict(label_fraction=0.1, epochs=60, batch_size=128, base_lr=0.02),
    "cifar10-cpu-distill": dict(SMALL, epochs=3, batch_size=128),
    "imagenet": {},  # 1% of the labels
    "imagenet-10": dict(label_fraction=0.1, epochs=30),
    "imagenet-100": dict(label_fraction=1.0, epochs=30, head_layer=0),
    "imagenet-distill": dict(DISTILL, arch="resnet50"),  # for a larger teacher
    "imagenet-self-distill": dict(DISTILL, temperature=0.1),
}


# ---------------------------------------- augmentation ----------------------------------------
class CropFlipView:
    """The only view (Sec. 3.1); the teacher sees the same one as its student. Images stay in
    [0, 1]."""

    mean, std = (0, 0, 0), (1, 1, 1)

    def __init__(self, size, crop_min=0.08):
        self.size = size
        self.crop_min = crop_min

    def crop(self, image, rng):
        """In a loader worker: uint8 (3, H, W) -> uint8 (3, size, size). rng: random.Random."""
        scale = (self.crop_min, 1.0)
        return random_resized_crop(image, rng, self.size, scale, interpolation="bicubic")

    def sample(self, rng):
        """In a loader worker: what else is random about this view of this sample."""
        return {"flip": rng.random() < 0.5}

    def __call__(self, x, params):
        """For a batch: uint8 (b, 3, size, size) and stacked parameters -> float in [0, 1]."""
        return hflip(to_float(x), params["flip"])


# Copied from simclr.py: eval_view
def eval_view(args) -> EvalView:
    """The central 87.5% of the shorter side, or the whole of a small image (official code)."""
    resize = round(args.image_size / 0.875)
    if args.image_size <= 32:  # CIFAR
        resize = args.image_size
    return EvalView(args.image_size, resize, "bicubic", mean=(0, 0, 0), std=(1, 1, 1))


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
# Adapted from simclr.py: ProjectionHead, only layers below its output, which all end in ReLU
class HeadLayers(nn.Module):
    """The first `layers` layers of the projection head; none: identity. (B, D) -> (B, D)."""

    def __init__(self, dim, layers):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm1d(dim) for _ in range(layers))
        for linear in self.linears:
            nn.init.normal_(linear.weight, std=0.01)

    def forward(self, h):
        for linear, norm in zip(self.linears, self.norms):
            h = F.relu(norm(linear(h)))
        return h


class Classifier(nn.Module):
    """f of Sec. 2: backbone, the kept layers of the head, a linear classifier. That starts at 0, as
    the official code can, so the initial loss is ln C."""

    def __init__(self, backbone, head_layer, num_classes):
        super().__init__()
        self.backbone = backbone
        self.head = HeadLayers(backbone.feature_dim, head_layer)
        self.classifier = nn.Linear(backbone.feature_dim, num_classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x):
        """(B, 3, S, S) -> logits (B, C)."""
        return self.classifier(self.head(self.backbone(x)))


def build_model(args) -> Classifier:
    """args: as train() completes them."""
    backbone = resnet(args.arch, args.stem, args.width)
    return Classifier(backbone, args.head_layer, args.num_classes)


def image_encoder(model: Classifier) -> nn.Module:
    """Module from images to pooled features (B, D), those that the classifier sees."""
    return nn.Sequential(model.backbone, model.head)


# ---------------------------------------- loss ----------------------------------------
def supervised_loss(logits, labels):
    """Mean cross-entropy over the labelled images of the global batch, in nats; chance level ln C.

    logits (b, C), labels (b,) of this process, -1: none. The mean over processes is that of the
    global batch, however many labels a process has; 0 when there is none at all."""
    all_labels = all_gather(labels)  # (B,)
    share = (all_labels >= 0).sum().clamp(min=1) / len(all_labels)
    loss = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum")
    return loss / (len(labels) * share)


def distillation_loss(student_logits, teacher_logits, temperature):
    """Eq. 2: cross-entropy of the student with the softened prediction of the teacher, in nats;
    chance level ln C, lowest possible value the entropy of that prediction, which is
    distillation_loss(teacher, teacher, temperature).

    (b, C) each, of this process: the mean over processes is the loss of the global batch. A
    gradient step on it changes predictions 1 / temperature^2 times as much; multiply it by
    temperature^2 against that."""
    target = F.softmax(teacher_logits.float() / temperature, dim=-1)
    return F.cross_entropy(student_logits.float() / temperature, target)


# ---------------------------------------- training ----------------------------------------
class WithinClasses:
    """A dataset that raises UserError for a label that none of its classes has: the loss would end
    with a traceback, on a GPU with one that names no sample."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.name = dataset.name
        self.classes = dataset.classes
        self.captioned = dataset.captioned

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        sample = self.dataset[i]
        refuse_labels_beyond(self, sample.label)
        return sample


def labelled_part(dataset, fraction, seed):
    """(N,) bool: a class-balanced part of a dataset, fraction * N / C images of every class
    (rounded, at least one, all where there are fewer). A function of the seed, contained in what a
    larger fraction gives. Reads samples in random order until it has enough: 2 to 3% of ImageNet
    for a fraction of 1%. Says how many of them could not be read."""
    if fraction == 1:
        return torch.full((len(dataset),), True)
    chosen = torch.full((len(dataset),), False)
    each = max(1, round(fraction * len(dataset) / len(dataset.classes)))
    missing = [each] * len(dataset.classes)
    broken = 0
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    while order and any(missing):
        index = order.pop()
        try:
            label = dataset[index].label
        except (OSError, ValueError):
            broken += 1
            continue
        if label >= 0 and missing[label]:
            missing[label] -= 1
            chosen[index] = True
    if broken and rank() == 0:
        print(f"{dataset.name}: passed over {broken} samples that cannot be read", file=sys.stderr)
    return chosen


def earlier_stages(args):
    """-> checkpoints of --checkpoint and --teacher, None where there is none. Raises UserError when
    they are not what the stage needs."""
    stages = {name: recipe.get("stage", "finetune") for name, recipe in RECIPES.items()}
    if stages.get(args.recipe or args.data, "finetune") != args.stage:
        fitting = ", ".join(name for name, stage in stages.items() if stage == args.stage)
        raise UserError(f"--stage {args.stage} needs a --recipe of its own: {fitting}")
    if args.stage == "finetune" and args.teacher:
        raise UserError("--teacher is for distilling: choose a --recipe NAME-distill")
    if args.stage == "finetune" and not (args.checkpoint or args.init):
        raise UserError(
            "fine-tuning needs --checkpoint, a run of simclr.py, or --init; without any flag this "
            "file runs all three stages"
        )
    if args.checkpoint and args.init:
        raise UserError("--checkpoint and --init both say where training starts: give one of them")
    if args.stage == "distill" and not args.teacher:
        raise UserError("distilling needs --teacher, a run of this file")
    if args.teacher and not os.path.exists(args.teacher):
        raise UserError(f"there is no --teacher {args.teacher}: a student needs it also to go on")
    pretrained = own_checkpoint(args) if args.checkpoint else None
    if args.checkpoint and not pretrained:
        pretrained = checkpoint_of("simclr", args.checkpoint)
    taught = checkpoint_of("simclrv2", args.teacher) if args.teacher else None
    return [pretrained, taught]


def own_checkpoint(args):
    """What a run that continues has saved, None in a new one. It holds the weights of --checkpoint
    as they are by now, and what --checkpoint said of the network, so that it may be gone."""
    path = Path(args.output_dir) / "checkpoint.pt"
    try:
        saved = load_checkpoint(path) if args.output_dir and path.exists() else None
    except UserError:  # Run says what to do about a damaged one
        return None
    ours = isinstance(saved, dict) and saved.get("method") == "simclrv2"  # Run refuses others
    return saved if ours else None


def checkpoint_of(method, path):
    """The checkpoint of a run of this method file. Raises UserError for anything else."""
    saved = load_checkpoint(path)
    if not (isinstance(saved, dict) and saved.get("method") == method):
        raise UserError(f"{path} was not written by {method}.py, give a run that was")
    return saved


def take_network_of(before, args):
    """What `args` leave open about the network becomes what it was in a run with args `before`."""
    args.arch = args.arch or before["arch"]
    args.image_size = args.image_size or before["image_size"]
    if not args.arch or not args.image_size:
        raise UserError("--init does not say which network to build: give --arch and --image-size")
    args.width = args.width or before.get("width", 1.0)  # older runs have no such flag
    if args.stem == "auto":
        args.stem = chosen_stem(types.SimpleNamespace(**before) if before["arch"] else args)


def accuracy(model, val, view, device, workers):
    """Collective. -> {"val_top1", "val_top5", "val_chance"} on all of a split, in percent."""
    workers = workers_with_room(workers, view)
    logits, labels = labelled(val, *extract(model, val, view, device, workers=workers))
    classes = torch.arange(logits.shape[1])
    parts = chunks(len(classes), logits, labels)
    ranks = torch.cat([hit_rank(x, y[:, None] == classes) for x, y in parts])
    scores = {"val_top1": percent(ranks < 1)}
    if len(classes) >= 5:
        scores["val_top5"] = percent(ranks < 5)
    return {**scores, "val_chance": 100 / len(classes)}


def train(args: Args) -> dict:
    """Trains and returns the last evaluation. Raises UserError for mistakes the user can fix."""
    device = init_distributed(args.device)
    torch.manual_seed(args.seed)
    autocast, scaler = mixed_precision(args.dtype, device)
    if args.accum_steps > 1:
        raise UserError("--accum-steps cannot be exact: batch norm must see the whole batch, use 1")
    if not 0 < args.label_fraction <= 1:
        raise UserError(f"--label-fraction {args.label_fraction:g} must be above 0 and at most 1")
    if args.probe != "knn":
        raise UserError("--probe has no use here, where a classifier is trained: leave it out")
    pretrained, taught = earlier_stages(args)
    before = pretrained or taught or {"args": {"arch": "", "image_size": None, "stem": args.stem}}
    take_network_of(before["args"], args)

    # data
    dataset = open_dataset(args.data, args.data_dir)
    val = evaluation_set(args)
    known = [dataset.classes, args.label_fraction, args.seed, fingerprint(dataset)]
    if taught:  # a student may use the labels that its teacher had, and no others
        known = json.loads(taught["labels"])
    classes, args.label_fraction, label_seed = known[:3]
    images = known[3:]  # their checksum, which older teachers did not keep
    labels_used = not taught or args.alpha < 1
    if not classes or (labels_used and dataset.classes != classes):
        raise UserError(f"{dataset.name} lacks the labels that are needed, see docs/data.md")
    if labels_used and images not in ([], [fingerprint(dataset)]):
        raise UserError(
            f"the images of {dataset.name} are not those whose labels the teacher had: leave "
            "--alpha at 1 for others"
        )
    args.num_classes = len(classes)  # not a flag, but build_model needs it
    if labels_used:
        dataset = WithinClasses(dataset)
        has_label = labelled_part(dataset, args.label_fraction, label_seed).to(device)  # (N,)
    if not taught:
        name = f"{100 * args.label_fraction:g}% of {dataset.name}"
        dataset = torch.utils.data.Subset(dataset, has_label.nonzero().flatten().tolist())
        dataset.name = name
        dataset.captioned = False
    view = CropFlipView(args.image_size, args.crop_min)
    views = {"view": view}
    loader = Loader(dataset, views, {}, args.batch_size, args.seed, args.workers, device)

    # model and optimizer
    model = build_model(args)
    if pretrained:
        names = [name for name in model.state_dict() if not name.startswith("classifier.")]
        try:
            state = {name: pretrained["model"][name] for name in names}
            model.load_state_dict(state, strict=False)
        except (KeyError, RuntimeError) as error:
            network = f"--arch {args.arch} --stem {args.stem} --head-layer {args.head_layer}"
            raise UserError(f"{args.checkpoint} does not fit {network}") from error
    teacher = None
    if taught:
        teacher_args = {"width": 1.0} | taught["args"]  # older runs have no such flag
        teacher = build_model(types.SimpleNamespace(**teacher_args))
        teacher.load_state_dict(taught["model"])
        teacher.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    model = sync_batchnorm(model, device).to(device, memory_format=torch.channels_last)
    init_weights(model, args)
    if args.compile:
        model.compile()
        if teacher:
            teacher.compile()
    update_scale = 1.0
    if taught:
        update_scale = args.temperature**2  # see the top of this file
    weight_decay = args.weight_decay
    if args.optimizer == "lars":
        weight_decay = weight_decay * update_scale
    trained = list(model.parameters())
    last = model.classifier.weight  # official: LARS neither scales nor decays it, but the loss does
    decay = [p for p in trained if p.ndim >= 2 and p is not last]
    no_decay = [p for p in trained if p.ndim < 2 or p is last]  # norms and biases
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    peak = args.base_lr * args.batch_size**0.5
    if args.optimizer == "lars":
        groups[1]["exclude"] = True
        optimizer = LARS(groups, lr=peak, momentum=args.momentum, lr_in_momentum=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=peak, momentum=args.momentum)

    # run directory; continues from its checkpoint if it has one
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = Run("simclrv2", args, loader, state, {"labels": json.dumps(known)})
    run.say(f"lr = {args.base_lr} * sqrt({args.batch_size}) = {peak:g}")
    if val and val.classes == classes:
        say_evaluation(f"accuracy of {len(val):,} validation images of {val.name}")
    elif val:
        say_evaluation(f"none, because {val.name} has other classes, see --eval-data")
        val = None
    warmup = round(args.warmup_epochs * loader.steps_per_epoch)
    ddp = DistributedDataParallel(model) if world_size() > 1 else model
    chance = math.log(len(classes))
    if val and run.step and not run.evaluation and run.due(args.eval_every):  # one cut off
        run.log_evaluation(accuracy(model, val, eval_view(args), device, args.workers))

    for step, batch in run.batches():
        x, labels = batch["view"], batch["label"]
        lr = warmup_cosine(step, run.total, warmup, peak, end=args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        with autocast:
            logits = ddp(x)
            with torch.no_grad():
                teacher_logits = teacher(x) if teacher else None
        terms = {}
        if not taught:
            loss = supervised_loss(logits, labels)
        else:
            loss = distillation_loss(logits, teacher_logits, args.temperature)
            entropy = distillation_loss(teacher_logits, teacher_logits, args.temperature)
            terms["teacher_entropy"] = (entropy, None)  # the loss cannot fall below it
            if args.alpha < 1:
                labels = labels.where(has_label[batch["index"]], -1)
                label_loss = supervised_loss(logits, labels)
                terms |= {"distill_loss": (loss, chance), "label_loss": (label_loss, chance)}
                loss = args.alpha * loss + (1 - args.alpha) * label_loss  # Eq. 3
        penalty = weight_decay / 2 * last.square().sum()
        scaler.scale(update_scale * loss + penalty).backward()
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        run.end_step({"loss": (loss, chance), **terms}, lr=lr)
        if run.agree_to_stop() or run.due(args.save_every, args.keep_every):
            run.save()
        if val and run.due(args.eval_every):
            run.log_evaluation(accuracy(model, val, eval_view(args), device, args.workers))

    then = []
    if not taught:  # next: a student as large as this network, which starts from the same weights
        start = ["--checkpoint", args.checkpoint] if args.checkpoint else ["--init", args.init]
        then = ["torchrun", "simclrv2.py", "--data", args.data, "--teacher", run.dir, *start]
        then += ["--recipe"]
        recipe = args.recipe or args.data
        if recipe in RECIPES and recipe.startswith("imagenet"):
            then += ["imagenet-self-distill"]
        elif f"{recipe}-distill" in RECIPES:
            then += [f"{recipe}-distill"]
        else:
            then += ["imagenet-self-distill", "--batch-size", args.batch_size]
        if args.eval_data:
            then += ["--eval-data", args.eval_data]
    return run.finish("knn", val, then)


def whole_sequence():
    """The three stages on the drawn scenes, one process after the other: simclr.py with version
    2's head of three layers (Sec. 3.1), this file with 10% of the labels, and a student of the same
    size that goes on from the first stage's weights without labels. Ends with the exit status of a
    stage that fails or is stopped, and says how to go on with it and with those behind it. Raises
    UserError without simclr.py beside this file."""
    here = Path(__file__)
    first = here.with_name("simclr.py")
    if not first.exists():
        raise UserError(f"put simclr.py beside {here.name}, or name a run of it by --checkpoint")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("without flags this runs three stages in one process: give --checkpoint")
    folder = Path(f"runs/{here.stem}_{time.strftime('%Y%m%d-%H%M%S')}")
    pretrained, finetuned = folder / "pretrain", folder / "finetune"
    stages = [
        [first, "--head-layers", 3, "--output-dir", pretrained],
        [here, "--checkpoint", pretrained, "--output-dir", finetuned],
        [here, "--recipe", "flocks-distill", "--teacher", finetuned, "--checkpoint", pretrained,
         "--output-dir", folder / "distill"],
    ]
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the stage too, which saves
    stages = [[str(word) for word in stage] for stage in stages]
    for number, words in enumerate(stages):
        print(f"\n$ python {shlex.join(words)}", flush=True)
        process = subprocess.Popen([sys.executable, *words])
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        if status := process.wait():
            print("\nTo go on with this stage and those that remain, run these, one by one:")
            for left in stages[number:]:
                print(f"python {shlex.join(left)}")
            sys.exit(status if status > 0 else 128 - status)  # killed by a signal


if __name__ == "__main__":
    with user_errors():
        if sys.argv[1:]:
            train(parse_args(Args, RECIPES))
        else:
            whole_sequence()
