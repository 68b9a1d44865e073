"""Fine-tuning a whole network on all labels or a small part of them: the protocols finetune and
semi.

    python evaluate.py finetune runs/slip_imagenet_* --data imagenet --random
    python evaluate.py semi runs/simclr_imagenet_* --data imagenet --labels 0.01 --head-layer 1

A linear classifier is put on the encoder, and both are trained on labelled crops. `recipe` holds
what differs between architectures: a transformer gets BEiT's and SLIP's settings, everything else
SimCLR's and BYOL's. The network counts as it is after the last epoch; nothing is ever chosen on the
split that is reported.

The result does not depend on the number of processes: everything random about a sample or a step is
a function of the seed and of its number, and batch norm takes its statistics from the global batch.
Batch norm is trained, as in SimCLR and BYOL; frozen statistics would come from the pre-training
augmentations.

Letters: B global batch, b = B / processes, C classes, D width of a feature, L blocks, S image size.
"""

import contextlib
import copy
import functools
import math
import os
import random
import re
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2
from tqdm import tqdm

from common import UserError, all_reduce_mean, mixed_precision, rank, sync_batchnorm, warmup_cosine
from common import world_size
from data import Loader, hflip, random_resized_crop
from evaluation.features import refuse_small
from monitor import say_without

# -------------------------------------------- recipes --------------------------------------------
# SLIP's fine-tuning of a ViT-B, which follows BEiT; its rate of 4e-3 is for a batch of 1024
VIT = dict(optimizer="adamw", base_lr=1e-3, train_batch=1024, epochs=100, warmup_epochs=20.0,
           min_lr=1e-6, weight_decay=0.05, layer_decay=0.65, drop_path=0.1, mixup=0.8, cutmix=1.0,
           label_smoothing=0.1, randaugment=9, erase=0.25)  # fmt: skip
VIT_SMALL = dict(VIT, drop_path=0.0)  # SLIP, ViT-S
VIT_LARGE = dict(VIT, layer_decay=0.75, epochs=50, warmup_epochs=5.0)  # SLIP, ViT-L
# iBOT's rate and epochs for few labels, with DINO's other settings for small datasets (DeiT's)
VIT_SEMI = dict(VIT, base_lr=1.25e-6, epochs=1000, warmup_epochs=5.0, layer_decay=1.0)
# SimCLR B.5 and B.8, which BYOL follows: only crops and flips, no warm-up. B.8 sweeps the rate
# from 1e-4 to 0.1
RESNET = dict(optimizer="sgd", nesterov=True, base_lr=0.05, train_batch=256, weight_decay=0.0)
STEPS = 20_000  # how long RESNET trains with all labels (SimCLR B.8)


def recipe(encoder, images, labels=1.0) -> dict:
    """The defaults of evaluate.py's flags for this encoder, number of images and share of
    labels."""
    if is_transformer(encoder):
        width = next(p.shape[-1] for p in blocks_of(encoder)[0].parameters() if p.ndim == 2)
        if labels < 1:
            return dict(VIT_SEMI)
        if width <= 384:
            return dict(VIT_SMALL)
        return dict(VIT if width < 1024 else VIT_LARGE)
    if labels == 1:
        return dict(RESNET, epochs=max(1, round(STEPS * RESNET["train_batch"] / images)))
    # SimCLR B.5 has a batch of 4096, which means three steps an epoch with 1% of ImageNet. With
    # less data the batch is smaller, so that an epoch still has three steps.
    batch = 2 ** int(math.log2(min(4096, max(2, labels * images / 3))))
    return dict(RESNET, train_batch=batch, epochs=60 if labels < 0.05 else 30)


# -------------------------------------------- augmentation ----------------------------------------
def seed_from(*words) -> int:
    """A seed that is a function of the words: a hash of them."""
    return random.Random(" ".join(map(str, words))).getrandbits(62)


@contextlib.contextmanager
def seeded(seed):
    """torchvision draws from torch's global generator: within this context it starts at `seed`, and
    afterwards it is as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class FineTuneView:
    """A crop of 8 to 100% of the area and a flip; for transformers RandAugment and random erasing
    too."""

    def __init__(self, view, randaugment=0, erase=0.0):
        self.size, self.view, self.erase = view.size, view, erase
        fill = [round(255 * m) for m in view.mean]
        # timm's rand-m9-mstd0.5-inc1 applies two operations, each with probability 1/2, with
        # strength 9 out of 10 (eleven bins; torchvision's default of 9 is out of 30). Here the
        # strength does not vary around 9.
        operation = v2.RandAugment(1, randaugment, 11, v2.InterpolationMode.BILINEAR, fill)
        self.randaugment = None
        if randaugment:
            self.randaugment = v2.Compose([v2.RandomApply([operation], p=0.5)] * 2)
        ranges = {"scale": (0.02, 1 / 3), "ratio": (0.3, 1 / 0.3)}
        self.erasing = v2.RandomErasing(p=1.0, value="random", **ranges)

    def crop(self, image, rng):
        """In a loader worker: uint8 (3, H, W) -> uint8 (3, S, S)."""
        x = random_resized_crop(image, rng, self.size, (0.08, 1.0), (3 / 4, 4 / 3), "bicubic")
        if not self.randaugment:
            return x
        with seeded(rng.getrandbits(62)):  # on Pillow images it takes half the time
            return v2.functional.pil_to_tensor(self.randaugment(v2.functional.to_pil_image(x)))

    def sample(self, rng):
        """In a loader worker: the random parameters of a sample. erase is a seed, or 0 for no
        erasing."""
        flip, erased, seed = rng.random() < 0.5, rng.random() < self.erase, rng.getrandbits(62)
        return {"flip": flip, "erase": seed if erased else 0}

    def __call__(self, x, params):
        """For a batch: uint8 (b, 3, S, S) and the stacked parameters -> normalised float."""
        x = self.view(hflip(x, params["flip"]), {})
        if not self.erase:
            return x
        for i, seed in enumerate(params["erase"].tolist()):
            if seed:
                with seeded(seed):
                    x[i] = self.erasing(x[i])
        return x


def swap_pairs(x):
    """(b, ...) -> rows 1, 0, 3, 2 and so on."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mix(x, targets, mixup, cutmix, seed):
    """x (b, 3, H, W), targets (b, C) -> both after MixUp (arXiv 1710.09412) or CutMix (arXiv
    1905.04899).

    mixup, cutmix: parameters of the Beta distributions that lambda, the share of a sample itself,
    is drawn from (0: off). With both, one of the two is drawn in every step. Samples 0 and 1, 2 and
    3 and so on are mixed with each other, so that it does not matter how many processes share a
    batch; all pairs have the same lambda, as in BEiT. The draws are those of torchvision's MixUp
    and CutMix."""
    if not (mixup or cutmix):
        return x, targets
    height, width = x.shape[2:]
    with seeded(seed):
        cut = cutmix > 0
        if mixup and cutmix:
            cut = torch.multinomial(torch.tensor([0.5, 0.5]), 1).item() == 1
        alpha = torch.tensor([cutmix if cut else mixup])
        share = torch.distributions.Beta(alpha, alpha).sample().item()  # lambda
        if cut:
            column, row = torch.randint(width, (1,)).item(), torch.randint(height, (1,)).item()

    others = swap_pairs(x)
    if cut:  # a rectangle around (row, column) with 1 - lambda of the area, as far as it is inside
        half = 0.5 * math.sqrt(1 - share)
        half_height, half_width = int(half * height), int(half * width)
        rows = slice(max(0, row - half_height), min(height, row + half_height))
        columns = slice(max(0, column - half_width), min(width, column + half_width))
        x = x.clone()
        x[:, :, rows, columns] = others[:, :, rows, columns]
        area = (rows.stop - rows.start) * (columns.stop - columns.start)
        share = 1 - area / (height * width)
    else:
        x = share * x + (1 - share) * others
    return x, share * targets + (1 - share) * swap_pairs(targets)


def smooth_targets(labels, num_classes, smoothing):
    """(b,) -> (b, C): 1 - smoothing + smoothing / C for the label and smoothing / C elsewhere.
    Samples without a label (-1) have only zeros, and so no part in the loss."""
    targets = F.one_hot(labels.clamp(min=0), num_classes).float()
    return (targets * (1 - smoothing) + smoothing / num_classes) * (labels >= 0)[:, None]


# -------------------------------------------- layers --------------------------------------------
# A block's name within a parameter's name, for ViTs of timm and OpenAI, ResNets, EfficientNet
BLOCK = re.compile(r"^(?:.*\.)?(?:blocks|resblocks|layer[1-4]|features\.[1-9])\.\d+(?=\.)")
STEM = re.compile(r"^(?:.*\.)?(?:conv|bn)[123]\.")  # what stands before a ResNet's blocks


def blocks_of(encoder) -> list:
    """The residual blocks of an encoder, in order."""
    found = (BLOCK.match(name) for name, _ in encoder.named_parameters())
    names = dict.fromkeys(match[0] for match in found if match)  # each once
    return [encoder.get_submodule(name) for name in names]


def is_transformer(encoder) -> bool:
    return bool(blocks_of(encoder)) and hasattr(blocks_of(encoder)[0], "attn")


def parameter_groups(model, names, weight_decay, layer_decay):
    """-> optimizer groups of the parameters with these names, each with "scale", its share of the
    learning rate (ELECTRA, BEiT). The share is layer_decay^(L + 1 - layer), where layer is 0 for
    what comes before the blocks, 1 to L for the blocks, and L + 1 for what comes after them.
    Biases, norms, class token and positions have no weight decay."""
    blocks = list(dict.fromkeys(m[0] for m in map(BLOCK.match, names) if m))
    groups, layer = {}, 0
    for name in names:
        p, match = model.get_parameter(name), BLOCK.match(name)
        # names are in the order of the network, but for DeCLIP's last norm and its ResNet's stem
        after = layer > 0 or name.startswith("head.") or ".ln_post." in name
        if match:
            layer = 1 + blocks.index(match[0])
        else:
            layer = len(blocks) + 1 if after else 0
        stem = not match and STEM.match(name)
        place = 0 if stem else layer
        token = re.search(
            r"(cls_token|pos_embed|register_tokens|(class|positional)_embedding)$", name
        )
        decay = 0.0 if p.ndim < 2 or token else weight_decay
        scale = layer_decay ** (len(blocks) + 1 - place)
        group = groups.setdefault(
            (place, decay), {"params": [], "weight_decay": decay, "scale": scale}
        )
        group["params"].append(p)
    return list(groups.values())


class DropPath:
    """Stochastic depth (arXiv 1603.09382): leaves a residual branch out for a share of the samples
    and scales it up for the others. The share grows from 0 in the first block to `rate` in the last
    one. It acts on the outputs of attention and MLP of transformer blocks in training mode;
    `sample` decides which samples they are."""

    def __init__(self, blocks, rate):
        self.rates = torch.linspace(0, rate, len(blocks)).repeat_interleave(2)  # (2 L,)
        for i, block in enumerate(blocks):
            last = getattr(block.attn, "proj", block.attn), list(block.mlp.children())[-1]  # layers
            for j, branch in enumerate(last):
                branch.register_forward_hook(functools.partial(self.drop, 2 * i + j))

    def sample(self, b, seed, device):
        """Draws factors for the global batch and keeps those of this process's b samples."""
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(b * world_size(), len(self.rates), generator=generator)
        u = u[rank() * b : (rank() + 1) * b]
        self.factors = ((u >= self.rates) / (1 - self.rates)).to(device)  # (b, 2 L)

    def drop(self, i, module, args, out):
        if not module.training:
            return out
        if isinstance(out, tuple):  # nn.MultiheadAttention returns its weights too
            y, *rest = out
            return (y * self.factors[:, i, None, None].to(y.dtype), *rest)
        return out * self.factors[:, i, None, None].to(out.dtype)


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, for the statistics of batch norm as well (timm's
    ModelEma)."""
    averaged = ([], [])
    for ours, theirs in zip(ema.state_dict().values(), model.state_dict().values()):
        if ours.is_floating_point():
            averaged[0].append(ours)
            averaged[1].append(theirs)
        else:
            ours.copy_(theirs)
    torch._foreach_lerp_(*averaged, 1 - decay)


# -------------------------------------------- few labels ------------------------------------------
# Copied from simclrv2.py: labelled_part
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


# -------------------------------------------- training --------------------------------------------
def classifier(encoder, num_classes, view, device):
    """-> a module with `encoder` and a linear `head`, and the names of the parameters to train. The
    head starts near 0, with 0.001 times the usual weights (SLIP). Parameters that no output depends
    on, such as mask tokens and unused projections, are frozen."""
    model = nn.Sequential()
    model.add_module("encoder", encoder.requires_grad_(True))
    image = view(torch.zeros(1, 3, view.size, view.size, dtype=torch.uint8, device=device), {})
    names, parameters = zip(*encoder.named_parameters())
    features = encoder.eval()(image)
    grads = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    for p, grad in zip(parameters, grads):
        p.requires_grad_(grad is not None)
    head = nn.Linear(features.shape[1], num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02 * 0.001)
    nn.init.zeros_(head.bias)
    model.add_module("head", head)
    return model.to(device), [name for name, p in model.named_parameters() if p.requires_grad]


def fine_tune(encoder, train_set, view, num_classes, args, device):
    """Collective. -> the trained model (from images as `view` makes them to logits; with --ema its
    average), and a row for each epoch. `encoder` is trained in place. args: the flags of
    evaluate.py."""
    size = args.train_batch // world_size()
    if (args.mixup or args.cutmix) and size % 2:
        raise UserError(f"--mixup and --cutmix need pairs, {size} images for each process are odd")
    if args.drop_path and not is_transformer(encoder):
        raise UserError("--drop-path is for transformers, leave it out")
    if args.warmup_epochs >= args.epochs:
        raise UserError(
            f"--warmup-epochs {args.warmup_epochs:g} must be below --epochs {args.epochs}"
        )
    shares = args.drop_path, args.label_smoothing, args.erase, args.ema
    if max(shares) >= 1 or not 0 < args.layer_decay <= 1 or args.randaugment > 10:
        raise UserError("--drop-path, --label-smoothing, --erase and --ema must be below 1, "
                        "--layer-decay above 0 and at most 1, "
                        "--randaugment at most 10")  # fmt: skip
    autocast, scaler = mixed_precision(args.dtype, device)

    # data
    train_view = FineTuneView(view, args.randaugment, args.erase)
    options = args.train_batch, args.seed, args.workers, device
    refuse_small(train_set, args.train_batch)
    loader = Loader(train_set, {"image": train_view}, {}, *options)
    total = args.epochs * loader.steps_per_epoch
    warmup = round(args.warmup_epochs * loader.steps_per_epoch)

    # model and optimizer
    torch.manual_seed(args.seed)
    model, names = classifier(encoder, num_classes, view, device)
    model = sync_batchnorm(model, device).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # its running statistics average about a tenth of an epoch (SimCLR B.8)
            module.momentum = min(0.1, 10 / loader.steps_per_epoch)
    ema = copy.deepcopy(model) if args.ema else None
    drop_path = DropPath(blocks_of(encoder), args.drop_path) if args.drop_path else None
    groups = parameter_groups(model, names, args.weight_decay, args.layer_decay)
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups)
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=args.nesterov)
    ddp = DistributedDataParallel(model) if world_size() > 1 else model
    peak, chance = args.base_lr * args.train_batch / 256, math.log(num_classes)
    title = f"{train_set.name}, {len(train_set):,} images, batch {args.train_batch}, lr {peak:g}"
    bar = tqdm(total=total, desc=title, leave=False, disable=rank() > 0 or not sys.stderr.isatty())
    if bar.disable and rank() == 0:
        print(f"{title}, {loader.steps_per_epoch} steps an epoch", file=sys.stderr, flush=True)

    model.train()
    losses, counts, rows, clock = [], [], [], time.time()
    for step, batch in loader.batches(0, total):
        lr = warmup_cosine(step, total, warmup, peak, end=args.min_lr, reach_peak=True)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        x = batch["image"]
        targets = smooth_targets(batch["label"], num_classes, args.label_smoothing)
        if args.mixup or args.cutmix:
            seed = seed_from(args.seed, step, "mix")
            x, targets = mix(x, targets, args.mixup, args.cutmix, seed)
        if drop_path:
            drop_path.sample(size, seed_from(args.seed, step, "drop path"), device)

        with autocast:
            logits = ddp(x)
        # the mean over the samples of all processes that have a label: DDP averages its parts
        labelled = all_reduce_mean(targets.sum()).clamp(min=1e-6)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum") / labelled
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if ema:
            update_ema(ema, model, args.ema)

        losses.append(loss.detach())
        counts.append(labelled)
        bar.update()
        if (step + 1) % loader.steps_per_epoch == 0:
            loader.check_bad()
            loss = all_reduce_mean(torch.stack(losses)).mean().item()
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} in epoch {len(rows) + 1}, lower --base-lr")
            speed = len(losses) * args.train_batch / (time.time() - clock)
            if not rows:
                seen = len(counts) * args.train_batch
                with_label = round(torch.stack(counts).sum().item() * world_size())
                say_without("label", f"{train_set.name}, epoch 1", seen - with_label, seen)
            rows.append({"epoch": len(rows) + 1, "loss": loss, "lr": lr})
            text = f"loss {loss:.3f} (chance {chance:.3f}), {speed:.0f} images/s"
            bar.set_postfix_str(text)
            if bar.disable and rank() == 0:
                print(f"epoch {len(rows)}/{args.epochs} {text}", file=sys.stderr, flush=True)
            losses, counts, clock = [], [], time.time()
    bar.close()
    return ema or model, rows


def save_classifier(model, file):
    """Saves what fine_tune returned, with the encoder's names and with those of timm or torchvision
    for the classifier. These projects load it strictly, except for the ViTs of DINOv2, CLIP and
    DeCLIP, which have names of their own. Raises UserError."""
    head = "head." if is_transformer(model.encoder) else "fc."
    state = {f"{head}{name}": value.cpu() for name, value in model.head.state_dict().items()}
    state |= {name: value.cpu() for name, value in model.encoder.state_dict().items()}
    whole = file.with_name(f"{file.name}.tmp")  # part of a file would be refused as there already
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, whole)
        os.replace(whole, file)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            whole.unlink(missing_ok=True)
        raise UserError(f"{file} cannot be written ({error}), use another --out") from error
