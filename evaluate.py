"""Evaluates checkpoints: python evaluate.py PROTOCOL CHECKPOINT [CHECKPOINT ...] --data NAME [--flag VALUE]

PROTOCOL is zeroshot, retrieval, knn or linear; CHECKPOINT a checkpoint.pt or the run directory that holds it.
Several give one table. Under torchrun the result is the same for any number of processes. Every result is
appended to results.jsonl beside its checkpoint.

    python evaluate.py knn runs/simclr_cifar10_* --data cifar10 --random
    python evaluate.py linear runs/simclr_cifar10_* --data cifar10 --cached
    torchrun --nproc_per_node=8 evaluate.py zeroshot runs/slip_yfcc15m_* --data imagenet

Scores are in percent; every function names the protocol it follows, without which a score says nothing.
Letters: N samples, D width of a feature, C classes, T texts, b rows of a batch or chunk.
"""

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shlex
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

from common import UserError, all_gather, init_distributed, load_checkpoint, mixed_precision, parse_args, rank
from common import user_errors, world_size
from data import CLIP_MEAN, CLIP_STD, Loader, Tokenizer, decode, hflip, ignore_signals, normalize
from data import open_dataset, random_resized_crop, to_float


@dataclass
class Args:
    data: str = ""  # named dataset or path, see docs/data.md
    data_dir: str = ""  # where named datasets are (default: $DATA_DIR, then ./data)
    split: str = "val"  # the split that is reported on
    batch_size: int = 256  # images per forward pass
    workers: int = min(8, os.cpu_count() or 1)  # loader processes per process
    device: str = ""  # cuda, mps or cpu (default: the first there is)
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the forward pass
    json: bool = False  # print JSON lines only
    random: bool = False  # evaluate networks of the same shape with random weights too
    templates: str = ""  # zeroshot: file of prompts, {} stands for the class; or a key of TEMPLATES
    classnames: str = ""  # zeroshot: file of classes, one a line, synonyms separated by |
    k: int = 20  # knn: neighbours (DINO reports 20)
    temperature: float = 0.07  # knn: a neighbour votes with exp(cosine / temperature)
    head_layer: int = 0  # knn, linear: features after so many layers of the projection head (SimCLR v2)
    cached: bool = False  # linear: features extracted once, not augmented; chooses base_lr among LRS
    base_lr: float = 0.1  # linear: lr = base_lr * probe_batch / 256
    probe_batch: int = 1024  # linear: global batch
    epochs: int = 90  # linear: passes over the train split
    weight_decay: float = 0.0  # linear (SimCLR: 1e-6)
    nesterov: bool = False  # linear (SimCLR: on)
    zero_init: bool = False  # linear: the head starts at 0 (SimCLR), not at N(0, 0.01) (MoCo v3, SLIP)
    seed: int = 0  # linear: order, crops, first weights of the head


TEMPLATES = {  # in our own words; a dataset without an entry takes "default"
    "default": ["a photo of a {}.", "a picture of a {}.", "an image that shows a {}."],
    "imagenet": ["a photo of a {}.", "a close photo of a {}.", "a dark photo of a {}.", "a drawing of a {}.",
                 "a {} seen from far away.", "a toy {}.", "a photo of many {}."],
    "cifar10": ["a photo of a {}.", "a tiny photo of a {}.", "a blurry photo of a {}.", "a coarse {}."],
    "shapes": ["a {}", "a picture of a {}", "a {} on a plain background"],
}  # fmt: skip
TEMPLATES["cifar100"] = TEMPLATES["stl10"] = TEMPLATES["cifar10"]
# What is quoted for a dataset where that is not top1 (SLIP eval_zeroshot.py)
METRIC = dict.fromkeys(["aircraft", "pets", "caltech101", "flowers"], "mean_per_class")
METRIC |= {"kinetics700": "mean_top1_top5", "hateful_memes": "roc_auc"}
LRS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # base learning rates that --cached tries
CHUNK = 2**23  # elements that a matrix of similarities may have


# -------------------------------------------- scores --------------------------------------------
def chunks(width, *tensors):
    """Walks along the first dimension of `tensors`, in steps whose rows * width is below CHUNK."""
    return zip(*(t.split(max(1, CHUNK // width)) for t in tensors))


def hit_rank(scores, right):
    """scores (b, C), right (b, C) bool -> (b,) on the CPU: how many columns stand before the best right one;
    below k is a hit at k. Equal scores stand in the order of their index; NaN stands last."""
    best, first = scores.masked_fill(~right, -math.inf).max(1, keepdim=True)
    earlier = torch.arange(scores.shape[1], device=scores.device) < first
    return (~(scores <= best) | ((scores == best) & earlier)).sum(1).cpu()


def percent(hits):
    """Share of True in a boolean tensor."""
    return 100 * hits.sum().item() / hits.numel()


class EvalView:
    """Resize the shorter side, crop the centre, normalise: bit for bit what CLIP does with PIL images."""

    def __init__(self, size, resize=None, interpolation="bicubic", mean=CLIP_MEAN, std=CLIP_STD):
        self.size, self.resize, self.mean, self.std = size, resize or size, mean, std
        self.filter = Image.Resampling[interpolation.upper()]

    def crop(self, image, rng=None):
        """In a worker: uint8 (3, H, W) -> uint8 (3, size, size)."""
        h, w = image.shape[1:]
        long = 20 * min(h, w)  # resized in full, a line of 1 x 60,000 pixels would take gigabytes
        if max(h, w) > long:
            image = image[:, max(0, (h - long) // 2) :, max(0, (w - long) // 2) :][:, :long, :long]
            h, w = image.shape[1:]
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        if min(h, w) != self.resize:
            shape = self.resize * w // min(h, w), self.resize * h // min(h, w)
            picture = picture.resize(shape, self.filter)
        left, top = (round((side - self.size) / 2) for side in picture.size)
        picture = picture.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def draw(self, rng=None):
        return {}

    def __call__(self, x, draw=None):
        """On the device: uint8 (B, 3, size, size) -> float."""
        return normalize(to_float(x), self.mean, self.std)


@torch.no_grad()
def knn(train_features, train_labels, test_features, test_labels, k=20, temperature=0.07, num_classes=None):
    """Weighted k-nearest-neighbour vote (DINO eval_knn.py; arXiv 1805.01978) -> (top1, top5) in percent.

    (N, D), (N,), (M, D), (M,) on one device. The k train features of largest cosine vote for their class with
    exp(cosine / temperature). As in DINO, top5 counts the first min(5, k) classes, also those without a vote.
    Equal cosines and equal votes stand in the order of their index."""
    train, test = F.normalize(train_features, dim=1), F.normalize(test_features, dim=1)
    num_classes = num_classes or int(max(train_labels.max(), test_labels.max())) + 1
    train_labels, k, ranks = train_labels.cpu(), min(k, len(train)), []
    for query, label in chunks(max(len(train), num_classes), test, test_labels.cpu()):
        cosine = query @ train.T  # (b, N)
        kth = cosine.topk(k).values[:, -1:]
        above, equal = cosine > kth, cosine == kth  # topk does not say which of equal ones it takes
        nearest = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= k - above.sum(1, keepdim=True)))
        nearest = nearest.nonzero()[:, 1].view(-1, k)
        cosine, nearest = cosine.gather(1, nearest).cpu().double(), nearest.cpu()
        weight = ((cosine - cosine.amax(1, keepdim=True)) / temperature).exp()  # never inf
        votes = weight.new_zeros(len(query), num_classes).scatter_add_(1, train_labels[nearest], weight)
        # float64 sums, rounded: equal votes stay equal in whatever order they were added
        ranks.append(hit_rank(votes.float(), label[:, None] == torch.arange(num_classes)))
    ranks = torch.cat(ranks)
    return percent(ranks < 1), percent(ranks < min(5, k))


def tokenize(tokenizer, texts, device):
    """T strings -> int64 (T, L), padded with 0 to a multiple of 8 that holds the longest, as in training."""
    ids = tokenizer.batch(texts)
    longest = int(ids.ne(0).any(0).nonzero().max()) + 1
    return ids[:, : -(-longest // 8) * 8].to(device)


@torch.no_grad()
def zeroshot_weights(encode_text, tokenizer, classnames, templates, device="cpu", batch_size=256):
    """One unit vector per class, (C, E): every prompt's embedding is normalised, their mean normalised again
    (CLIP Sec. 3.1.4: the ensemble is in embedding space). A class is a str or a list of synonyms: each fills
    the {} of each template, and all are averaged (SLIP). encode_text: token ids (b, L) -> (b, E)."""
    names = [[c.replace("_", " ")] if isinstance(c, str) else c for c in classnames]
    prompts = [t.replace("{}", name) for synonyms in names for name in synonyms for t in templates]
    parts = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    embedded = torch.cat([encode_text(tokenize(tokenizer, part, device)).float() for part in parts])
    per_class = F.normalize(embedded, dim=1).split([len(synonyms) * len(templates) for synonyms in names])
    return F.normalize(torch.stack([e.mean(0) for e in per_class]), dim=1)


def zeroshot_metrics(logits, labels):
    """logits (N, C), labels (N,) -> dict in percent: top1; from five classes on top5 and mean_top1_top5
    (Kinetics); mean_per_class, the mean recall of the classes that occur in `labels` (CLIP_benchmark; SLIP
    NaN when an absent class is predicted); with two classes roc_auc of logit 1 - logit 0, ties count half."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    ranks = torch.cat([hit_rank(x, y[:, None] == classes) for x, y in chunks(len(classes), logits, labels)])
    top1, top5, labels = percent(ranks < 1), percent(ranks < 5), labels.cpu()
    out = {"top1": top1} | ({"top5": top5, "mean_top1_top5": (top1 + top5) / 2} if len(classes) >= 5 else {})
    count, hits = (torch.bincount(y, minlength=len(classes)).double() for y in (labels, labels[ranks < 1]))
    out["mean_per_class"] = 100 * (hits / count)[count > 0].mean().item()
    if len(classes) == 2 and count.min() > 0:
        _, place, same = (logits[:, 1] - logits[:, 0]).cpu().unique(return_inverse=True, return_counts=True)
        mean_rank = (same.cumsum(0) - (same - 1) / 2).double()[place]  # from 1, shared by equal scores
        wins = mean_rank[labels == 1].sum() - count[1] * (count[1] + 1) / 2  # Mann-Whitney U
        out["roc_auc"] = 100 * (wins / count.prod()).item()
    return out


@torch.no_grad()
def recall(image_features, text_features, image_of_text, ks=(1, 5, 10)):
    """Retrieval among N images and T captions, as on Flickr30k and COCO (CLIP_benchmark) -> dict in percent.

    (N, D), (T, D) and image_of_text (T,), the image of each caption; any number of captions per image.
    text_to_image_recall@k: share of captions whose image is among the k most similar images.
    image_to_text_recall@k: share of images with at least one of their captions among the k most similar; an
    image without caption is only a candidate. mean_recall: mean of all. Holds only a part of (T, N) at a
    time."""
    images, texts = F.normalize(image_features, dim=1), F.normalize(text_features, dim=1)
    owner, index = image_of_text, torch.arange(len(images), device=images.device)
    to_text = [hit_rank(i @ texts.T, n[:, None] == owner) for i, n in chunks(len(texts), images, index)]
    to_image = [hit_rank(t @ images.T, n[:, None] == index) for t, n in chunks(len(images), texts, owner)]
    captioned = owner.cpu().unique()
    out = {f"image_to_text_recall@{k}": percent(torch.cat(to_text)[captioned] < k) for k in ks}
    out |= {f"text_to_image_recall@{k}": percent(torch.cat(to_image) < k) for k in ks}
    return out | {"mean_recall": sum(out.values()) / len(out)}


# -------------------------------------------- features --------------------------------------------
@contextlib.contextmanager
def evaluating(module):
    """`module` in eval mode; afterwards every submodule has its own mode back, frozen ones too."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def bar(iterable, title, total=None):
    """Progress, on a terminal and of the first process only."""
    return tqdm(iterable, title, total, leave=False, disable=rank() > 0 or not sys.stderr.isatty())


class _Batches(torch.utils.data.Dataset):
    """List of indices -> ((b,) indices, (b,) labels, uint8 (b, 3, S, S), captions) or (), and error texts."""

    def __init__(self, dataset, view):
        self.dataset, self.view = dataset, view

    def __getitem__(self, indices):
        good, wrong = [], []
        for i in indices:
            try:
                sample = self.dataset[i]
                image = self.view.crop(decode(sample.image), random.Random(i))
                good.append((i, sample.label, image, sample.captions))
            except (ValueError, OSError) as error:
                wrong.append(f"sample {i} ({error})")
        if not good:
            return (), wrong
        index, labels, images, captions = zip(*good)
        return (torch.tensor(index), torch.tensor(labels), torch.stack(images), captions), wrong


@torch.no_grad()
def _extract(module, encode, dataset, view, device, tokenizer=None, dtype="fp32", batch_size=256, workers=0,
             indices=None):  # fmt: skip
    """-> features (n, D), labels (n,), text features (T, E), row of each text's image (T,); on the CPU, the
    same on all processes. Whole batches are dealt out, so that each of them, and with it every rounding
    error, is the same for any number of processes; nothing is repeated to fill up."""
    indices = list(range(len(dataset)) if indices is None else indices)
    starts = range(0, len(indices), batch_size)[rank() :: world_size()]
    batches = [indices[i : i + batch_size] for i in starts]
    loader = torch.utils.data.DataLoader(
        _Batches(dataset, view), sampler=batches, batch_size=None, collate_fn=tuple,
        num_workers=min(workers, len(batches)), pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals, generator=torch.Generator())  # the global one must not move
    seen, read, wrong = [], [], []
    with evaluating(module), mixed_precision(dtype, device)[0]:
        for batch, errors in bar(loader, f"{dataset.name} features"):
            wrong += errors
            if not batch:
                continue
            index, labels, images, captions = batch
            seen.append((index, labels, encode(view(images.to(device, non_blocking=True), {})).float().cpu()))
            pairs = [(i, c) for i, several in zip(index.tolist(), captions) for c in several if c.strip()]
            pairs = pairs if tokenizer else []
            for part in [pairs[j : j + batch_size] for j in range(0, len(pairs), batch_size)]:
                owners, texts = zip(*part)
                texts = module.encode_text(tokenize(tokenizer, texts, device))
                read.append((torch.tensor(owners), texts.float().cpu()))
    every = [(seen, read, wrong)] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(every, (seen, read, wrong))
    seen, read, wrong = (sum(lists, []) for lists in zip(*every))
    if not seen:
        raise UserError(f"none of {len(indices)} samples of {dataset.name} can be read: {''.join(wrong[:1])}")
    if wrong and rank() == 0:
        print(f"{dataset.name}: left out {len(wrong)} of {len(indices)} samples, {wrong[0]}", file=sys.stderr)
    index, labels, features = map(torch.cat, zip(*seen))
    owners, texts = map(torch.cat, zip(*read)) if read else (index[:0], features[:0])
    if not (features.isfinite().all() and texts.isfinite().all()):
        raise UserError("some features are not finite: the network has diverged, or --dtype fp16 overflows")
    (index, order), (owners, text_order) = index.sort(), owners.sort(stable=True)
    return features[order], labels[order], texts[text_order], torch.searchsorted(index, owners)


def extract(encoder, dataset, view, device, **options):
    """Collective. -> features (n, D) float32 and labels (n,), in the order of the index, all on every CPU.

    encoder: module, float images (b, 3, S, S) -> (b, D); its modes and the global random state stay as they
    were. options: dtype="fp32", batch_size=256, workers=0, indices=None (all). What cannot be read is left
    out and counted on stderr. Raises UserError when nothing can be read or a feature is not finite."""
    return _extract(encoder, encoder, dataset, view, device, **options)[:2]


def some(dataset, most):
    """At most `most` (0: all) indices, the same in every run; drawn, as neighbours often share a class."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return order[: most or None].sort().values.tolist()


def labelled(dataset, features, labels):
    """Leaves out samples without a label (-1). Raises UserError when none is left."""
    if not (labels >= 0).any():
        raise UserError(f"{dataset.name} has no labels")
    return features[labels >= 0], labels[labels >= 0]


# -------------------------------------------- training loops --------------------------------------------
def knn_eval(encoder, train_set, val_set, view, device, k=20, temperature=0.07, max_train=5000, max_val=1000,
             **kw):  # fmt: skip
    """Collective. -> {"knn_top1", "knn_top5", "knn_chance"}, on fixed subsets so that it is quick (0: all);
    {} without classes. kw: options of `extract`."""
    if not (train_set and val_set and train_set.classes and val_set.classes):
        return {}
    train, val = (labelled(d, *extract(encoder, d, view, device, indices=some(d, most), **kw))
                  for d, most in ((train_set, max_train), (val_set, max_val)))  # fmt: skip
    top1, top5 = knn(*(x.to(device) for x in train + val), k, temperature, len(train_set.classes))
    return {"knn_top1": top1, "knn_top5": top5, "knn_chance": 100 / len(train_set.classes)}


def language_scores(model, tokenizer, dataset, view, device, classnames=None, templates=None, captions=False,
                    **kw):  # fmt: skip
    """Collective. -> (zeroshot_metrics if there are classnames, recall if captions, number of images), from
    one pass. classnames, templates: as in zeroshot_weights; kw: options of `extract`."""
    kw["tokenizer"] = tokenizer if captions else None
    extracted = _extract(model, model.encode_image, dataset, view, device, **kw)
    images, labels, texts, image_of_text = (x.to(device) for x in extracted)
    metrics = {}
    if classnames:
        templates = templates or TEMPLATES.get(dataset.name, TEMPLATES["default"])
        with evaluating(model), mixed_precision(kw.get("dtype", "fp32"), device)[0]:
            weights = zeroshot_weights(model.encode_text, tokenizer, classnames, templates, device)
        features, labels = labelled(dataset, images, labels)
        metrics = zeroshot_metrics(F.normalize(features, dim=1) @ weights.T, labels)
    return metrics, recall(images, texts, image_of_text) if len(texts) else {}, len(images)


def language_eval(model, tokenizer, dataset, view, device, max_images=1000, **kw):
    """Collective. What the dataset allows, on a fixed subset so that it is quick (0: all): with classes
    {"zeroshot_top1", "zeroshot_chance"}, with captions {"recall@1" (mean of both directions),
    "recall_chance"}. model: has encode_image and encode_text. kw: options of `extract`."""
    wordnet = all(re.fullmatch(r"n\d{8}", str(name)) for name in dataset.classes or [""])  # ids are no words
    kw |= {"classnames": None if wordnet else dataset.classes, "captions": dataset.captioned}
    kw["indices"] = some(dataset, max_images)
    zeroshot, retrieval, n = language_scores(model, tokenizer, dataset, view, device, **kw)
    out = {}
    if zeroshot:
        out = {"zeroshot_top1": zeroshot["top1"], "zeroshot_chance": 100 / len(dataset.classes)}
    if retrieval:
        both = retrieval["image_to_text_recall@1"] + retrieval["text_to_image_recall@1"]
        out |= {"recall@1": both / 2, "recall_chance": 100 / n}
    return out


def evaluation_set(args, split="val"):
    """The dataset that is evaluated on while training, or None (said once) when there is none."""
    try:
        return open_dataset(args.eval_data or args.data, args.data_dir, split)
    except UserError as error:
        if rank() == 0:
            print(f"no evaluation while training: {error}", file=sys.stderr, flush=True)


def captions(dataset, most=20000):
    """At most `most` captions of a dataset, evenly spread: what a tokenizer is trained on."""
    for index in range(0, len(dataset), 1 + len(dataset) * 2 // most):
        with contextlib.suppress(OSError, ValueError):  # the loader will name what cannot be read
            yield from dataset[index].captions


def save_views(directory, images, views):
    """Writes views.png: the first eight samples of a batch, a row for each view, as the model sees them.
    Wrong augmentations are found by looking, so this comes before the first step. images: name -> float (b,
    3, S, S), as normalised by views[name]."""
    strips = []
    for name, x in images.items() if rank() == 0 else ():
        mean, std = getattr(views[name], "mean", (0, 0, 0)), getattr(views[name], "std", (1, 1, 1))
        mean, std = (torch.tensor(t, dtype=torch.float32).view(3, 1, 1) for t in (mean, std))
        x = (x[:8].float().cpu() * std + mean).clamp(0, 1)
        x = F.interpolate(x, scale_factor=max(1, 128 // x.shape[-1]))  # small ones are enlarged
        strips.append((name, torchvision.transforms.functional.to_pil_image(torchvision.utils.make_grid(x))))
    if strips:
        size = max(strip.width for _, strip in strips), sum(strip.height + 14 for _, strip in strips)
        page, top = Image.new("RGB", size, "white"), 0
        for name, strip in strips:
            ImageDraw.Draw(page).text((2, top + 1), name, fill="black")
            page.paste(strip, (0, top + 14))
            top += strip.height + 14
        page.save(Path(directory) / "views.png")


def save_curves(directory):
    """Writes curves.png if matplotlib is there: every column of metrics.jsonl, its chance level dashed."""
    if rank() > 0 or not importlib.util.find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in dict.fromkeys(itertools.chain.from_iterable(rows))
             if name not in ("step", "epoch", "end") and "chance" not in name]  # fmt: skip
    figure = Figure(figsize=(4 * min(4, len(names)), 3 * -(-len(names) // 4)), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(-(-len(names) // 4), min(4, len(names)), i + 1, title=name, xlabel="step")
        chance = "chance" if name == "loss" else re.split("_loss|_top|@", name)[0] + "_chance"
        for key, style in ((name, "-"), (chance, "--")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot(*zip(*points), style) if points else None
    figure.savefig(Path(directory) / "curves.png", dpi=80)


# -------------------------------------------- linear probe --------------------------------------------
class ProbeView:
    """Training view of the linear probes since MoCo: a crop of 8 to 100% of the area, resized, and a flip."""

    def __init__(self, view):
        self.size, self.view = view.size, view

    def crop(self, image, rng):
        return random_resized_crop(image, rng, self.size, (0.08, 1.0), (3 / 4, 4 / 3), "bilinear")

    def draw(self, rng):
        return {"flip": rng.random() < 0.5}

    def __call__(self, x, draw):
        return self.view(hflip(x, draw["flip"]), {})


def fit_heads(batches, dim, num_classes, lrs, args, device):
    """One linear classifier per learning rate, all on the same batches: epoch, features (b, dim), labels
    (b,). SGD, momentum 0.9, rate on half a cosine per epoch to 0 (MoCo v3, SLIP); equal starts. -> nn.Linear
    each."""
    start = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(args.seed))
    heads = [nn.utils.skip_init(nn.Linear, dim, num_classes, device=device) for _ in lrs]
    for head in heads:
        head.weight.data.copy_(start * (0.0 if args.zero_init else 0.01))
        head.bias.data.zero_()
    groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(heads, lrs)]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=args.nesterov, weight_decay=args.weight_decay)
    for epoch, x, y in batches:
        for group, lr in zip(optimizer.param_groups, lrs):
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
        optimizer.zero_grad()
        sum(F.cross_entropy(head(x), y, ignore_index=-1) for head in heads).backward()  # no parameter shared
        optimizer.step()
    return heads


def cached_batches(features, labels, batch_size, args):
    """Shuffled batches of features in memory; what does not fill the last one waits for another epoch."""
    generator = torch.Generator().manual_seed(args.seed)
    for epoch in bar(range(args.epochs), "linear probe, epochs"):
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        for rows in order[: len(order) // batch_size * batch_size].split(batch_size):
            yield epoch, features[rows], labels[rows]


def augmented_batches(encoder, loader, view, args):
    """Features of freshly augmented images: every process gets the global batch and trains the same head."""
    steps = args.epochs * loader.steps_per_epoch
    for step, batch in bar(loader.batches(0, steps), "linear probe, steps", steps):
        images, draw = batch["image"]
        with evaluating(encoder), torch.no_grad(), mixed_precision(args.dtype, images.device)[0]:
            features = encoder(view(images, draw)).float()
        yield step // loader.steps_per_epoch, all_gather(features), all_gather(batch["label"])


def linear_probe(encoder, train_set, test_set, view, device, args, **kw):
    """Collective. A linear classifier on frozen features -> (test scores, head, base_lr).

    As MoCo v3 and SLIP: trained on crops and flips, lr = base_lr * batch / 256 (SimCLR: nesterov, weight
    decay 1e-6, zero_init, batch 4096). cached: on features of the eval view extracted once; the base_lr of
    LRS that is best on a held-out tenth of the train split then trains on all of it. The last epoch counts;
    nothing is ever chosen on the test split. args: an Args; kw: options of `extract`."""

    def extracted(dataset):
        return (x.to(device) for x in labelled(dataset, *extract(encoder, dataset, view, device, **kw)))

    test, test_labels = extracted(test_set)
    size, base_lr, b = (test.shape[1], len(train_set.classes)), args.base_lr, args.probe_batch
    if args.cached:
        x, y = extracted(train_set)
        if len(y) < 10:
            raise UserError(f"{train_set.name} has only {len(y)} labels, too few to choose a learning rate")
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(args.seed)).to(device)
        held, rest = order[: len(y) // 10], order[len(y) // 10 :]
        b = min(b, len(rest))
        lrs = [lr * b / 256 for lr in LRS]
        heads = fit_heads(cached_batches(x[rest], y[rest], b, args), *size, lrs, args, device)
        scores = [zeroshot_metrics(head(x[held]).detach(), y[held])["top1"] for head in heads]
        base_lr, batches = LRS[scores.index(max(scores))], cached_batches(x, y, b, args)
    else:
        probe_view = ProbeView(view)
        loader = Loader(train_set, {"image": probe_view}, {}, b, args.seed, args.workers, device)
        batches = augmented_batches(encoder, loader, probe_view, args)
    head = fit_heads(batches, *size, [base_lr * b / 256], args, device)[0]
    return zeroshot_metrics(head(test).detach(), test_labels), head, base_lr


# -------------------------------------------- command line --------------------------------------------
def open_network(path, device, head_layer=0, random_weights=False):
    """-> namespace of method, step, model, encoder, view, tokenizer (None without text). random_weights: as
    before training. Raises UserError unless one of our method files wrote `path`."""
    saved = load_checkpoint(path)
    if not (isinstance(saved, dict) and saved.keys() >= {"method", "args", "model"}):
        raise UserError(f"{path} was not written by one of our method files: it lacks method, args or model")
    name = str(saved["method"])
    if not (name.isidentifier() and Path(__file__).with_name(f"{name}.py").is_file()):
        raise UserError(f"{path} was written by {name}.py, which is not beside evaluate.py")
    method = importlib.import_module(name)
    args = types.SimpleNamespace(**{**vars(method.Args()), **saved["args"]})
    torch.manual_seed(0)
    model = method.build_model(args).to(device)
    try:
        if not random_weights:
            model.load_state_dict(saved["model"])
        encoder = method.image_encoder(model, **({"head_layer": head_layer} if head_layer else {})).to(device)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {name}.py: {str(error).splitlines()[-1].strip()}") from error
    except TypeError as error:
        raise UserError(f"{name} has no --head-layer, its encoder ends before any head") from error
    tokenizer = Tokenizer(saved["tokenizer"], args.context_length) if "tokenizer" in saved else None
    return types.SimpleNamespace(method=name, step=saved.get("step"), model=model, encoder=encoder,
                                 view=method.eval_view(args), tokenizer=tokenizer)  # fmt: skip


def _depth(state, prefix):
    """Number of different modules prefix0, prefix1, ... in a state dict."""
    return len({k.removeprefix(prefix).split(".")[0] for k in state if k.startswith(prefix)})


def _clip_of(state):
    """A state dict with OpenAI's names -> clip.CLIP of the sizes read off its tensors."""
    clip = importlib.import_module("clip")
    if "visual.proj" in state:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        layers = _depth(state, "visual.transformer.resblocks.")
        tokens = len(state["visual.positional_embedding"])
    else:
        width, patch = len(state["visual.conv3.weight"]), None
        layers = [_depth(state, f"visual.layer{i}.") for i in (1, 2, 3, 4)]
        tokens = len(state["visual.attnpool.positional_embedding"])
    text_width, embed_dim = state["text_projection"].shape
    context_length, vocab_size = len(state["positional_embedding"]), len(state["token_embedding.weight"])
    text_layers = _depth(state, "transformer.resblocks.")
    return clip.CLIP(embed_dim, (patch or 32) * math.isqrt(tokens - 1), layers, width, patch, context_length,
                     vocab_size, text_width, text_width // 64, text_layers)


def _slip_of(state):
    """A state dict with the names of SLIP_VIT{S,B,L}16 -> slip.SLIP of the sizes read off its tensors."""
    slip = importlib.import_module("slip")
    width, _, patch, _ = state["visual.patch_embed.proj.weight"].shape
    heads = next((heads for _, w, heads in slip.ARCHS.values() if w == width), width // 64)
    image_size = patch * math.isqrt(state["visual.pos_embed"].shape[1] - 1)
    visual = slip.VisionTransformer(image_size, patch, width, _depth(state, "visual.blocks."), heads)
    text_width, embed_dim = state["text_projection"].shape
    context_length, vocab_size = len(state["positional_embedding"]), len(state["token_embedding.weight"])
    ssl_emb_dim, ssl_mlp_dim = state["image_mlp.layer3.weight"].shape
    return slip.SLIP(embed_dim, visual, width, context_length, vocab_size, text_width, text_width // 64,
                     _depth(state, "transformer.resblocks."), ssl_mlp_dim, ssl_emb_dim)


def _declip_of(state):
    """A state dict with the names of DeCLIP, both encoders -> declip.DeCLIP of the sizes of its tensors."""
    declip = importlib.import_module("declip")
    embed_dim, text_width = state["encode_text.text_projection.weight"].shape
    if "visual.proj" in state:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        size = patch * math.isqrt(len(state["visual.positional_embedding"]) - 1)
        layers = _depth(state, "visual.transformer.resblocks.")
        visual = declip.VisionTransformer(size, patch, width, layers, embed_dim)
    else:
        size = 32 * math.isqrt(len(state["visual.attnpool.positional_embedding"]) - 1)
        layers = [_depth(state, f"visual.layer{i}.") for i in (1, 2, 3, 4)]
        visual = declip.ModifiedResNet(size, layers, embed_dim)
    context_length = len(state["encode_text.positional_embedding"])
    vocab_size = len(state["encode_text.token_embedding.weight"])
    text_layers = _depth(state, "encode_text.transformer.resblocks.")
    text = declip.TextTransformer(context_length, vocab_size, text_width, text_layers, embed_dim)
    return declip.DeCLIP(embed_dim, visual, text, len(state["projector.linear1.weight"]))


def _align_modules(model):
    """{module of an align.ALIGN: module of Hugging Face's AlignModel that holds the same tensors}."""
    names = {"text_projection": "text_projection", "text.norm": "text_model.embeddings.LayerNorm",
             "visual.features.0.0": "vision_model.embeddings.convolution",
             "visual.features.0.1": "vision_model.embeddings.batchnorm"}  # fmt: skip
    names |= {f"text.{kind}_embeddings": f"text_model.embeddings.{kind}_embeddings"
              for kind in ("word", "position", "token_type")}  # fmt: skip
    parts = {"self_attn": "attention.self", "self_attn.out_proj": "attention.output.dense",
             "norm1": "attention.output.LayerNorm", "linear1": "intermediate.dense",
             "linear2": "output.dense", "norm2": "output.LayerNorm"}  # fmt: skip
    for i in range(len(model.text.layers)):
        names |= {f"text.layers.{i}.{a}": f"text_model.encoder.layer.{i}.{b}" for a, b in parts.items()}
    parts = ["expansion.expand_conv", "expansion.expand_bn"]
    parts += ["depthwise_conv.depthwise_conv", "depthwise_conv.depthwise_norm"]
    parts += ["squeeze_excite.reduce", "squeeze_excite.expand"]
    parts += ["projection.project_conv", "projection.project_bn"]
    blocks = [name for name in dict(model.named_modules()) if re.fullmatch(r"visual(\.\w+){3}\.block", name)]
    for i, block in enumerate(blocks):
        steps = model.get_submodule(block)  # of two layers each, the first missing where nothing expands
        ours = [f"{block}.{j}.{end}" for j, step in enumerate(steps)
                for end in (("fc1", "fc2") if hasattr(step, "fc1") else "01")]  # fmt: skip
        names |= {a: f"vision_model.encoder.blocks.{i}.{b}" for a, b in zip(ours, parts[-len(ours) :])}
    return names


def align_state(model, theirs=None):
    """State dict of a Hugging Face AlignModel -> one that `model`, an align.ALIGN of the same sizes, loads
    strictly. Without `theirs`: the model's own -> one that an AlignModel loads strictly. It computes q, k and
    v with three layers, here one does; the pooler that it has and never uses is left out here, zero there."""
    modules, out = _align_modules(model), {}
    for key, tensor in model.state_dict().items():
        module, _, kind = key.rpartition(".")
        names = [f"{modules[module]}.{kind}" if module else key]
        if kind.startswith("in_proj_"):
            names = [f"{modules[module]}.{part}.{kind[8:]}" for part in ("query", "key", "value")]
        if theirs:
            out[key] = torch.cat([theirs[name] for name in names]) if len(names) > 1 else theirs[names[0]]
        else:
            out |= zip(names, tensor.chunk(len(names)) if tensor.ndim else [tensor])
    if not theirs:
        bias = torch.zeros_like(model.text.norm.bias)
        out |= {"text_model.pooler.dense.weight": torch.diag(bias), "text_model.pooler.dense.bias": bias}
    return out


def _align_of(state):
    """The state dict of an AlignModel with one of EfficientNet's sizes -> align.ALIGN of that size."""
    align = importlib.import_module("align")
    vocab_size, width = state["text_model.embeddings.word_embeddings.weight"].shape
    context_length = len(state["text_model.embeddings.position_embeddings.weight"])
    text = align.BERT(context_length, vocab_size, width, _depth(state, "text_model.encoder.layer."))
    blocks = _depth(state, "vision_model.encoder.blocks.")
    dim = len(state[f"vision_model.encoder.blocks.{blocks - 1}.projection.project_conv.weight"])
    for sizes in align.ARCHS.values():
        with torch.device("meta"):
            visual = align.EfficientNet(*sizes)
        if (visual.dim, sum(map(len, visual.features[1:]))) == (dim, blocks):
            return align.ALIGN(dim, align.EfficientNet(*sizes), text, width)
    raise ValueError(f"no EfficientNet has {blocks} blocks and {dim} features")


def load_released(path):
    """A published CLIP (OpenAI's half-precision TorchScript archives too), SLIP or DeCLIP checkpoint, a state
    dict with their names or those of Hugging Face's AlignModel -> (method module, model in float32), loaded
    strictly. Only tensors and argparse's Namespace are unpickled. Raises UserError."""
    try:
        state = torch.jit.load(path, map_location="cpu").state_dict()
    except (RuntimeError, ValueError):  # not TorchScript
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = load_checkpoint(path)
    state = next((state[key] for key in ("model", "state_dict") if isinstance(state.get(key), dict)), state)
    state = {k.removeprefix("module."): v for k, v in state.items()}
    for key in ("input_resolution", "context_length", "vocab_size"):  # numbers in OpenAI's archives
        state.pop(key, None)
    method, build = ("slip", _slip_of) if "visual.cls_token" in state else ("clip", _clip_of)
    if "encode_text.text_projection.weight" in state:
        method, build = "declip", _declip_of
    elif "vision_model.embeddings.convolution.weight" in state:
        method, build = "align", _align_of
    try:
        model = build(state)
        state = align_state(model, state) if method == "align" else state
        model.load_state_dict(state, strict=True)  # copies half into single precision
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} holds no CLIP, SLIP, DeCLIP or ALIGN: {reason}") from error
    return importlib.import_module(method), model


def lines(path, flag) -> list[str]:
    """The lines of a text file that are not empty. Raises UserError."""
    try:
        found = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path} cannot be read as text ({error})") from error
    if not found:
        raise UserError(f"{flag} {path} is empty")
    return found


# A protocol: (network, train split, test split, args, options of `extract`) -> metrics, the headline first
def zeroshot(net, train, test, args, kw):
    templates, names = TEMPLATES.get(args.templates), test.classes
    if args.templates and not templates:
        templates = lines(args.templates, "--templates")
    if not all("{}" in template for template in templates or []):
        raise UserError(f"--templates {args.templates} needs {{}} in every line, it stands for the class")
    if args.classnames:
        names = [re.split(r"\s*\|\s*", line) for line in lines(args.classnames, "--classnames")]
    elif all(re.fullmatch(r"n\d{8}", name) for name in names):
        raise UserError(f"the classes of {args.data} are WordNet ids, give names with --classnames FILE")
    if len(names) != len(test.classes):
        raise UserError(f"--classnames {args.classnames} has {len(names)} lines, not {len(test.classes)}")
    metrics, *_ = language_scores(net.model, net.tokenizer, test, classnames=names, templates=templates, **kw)
    headline = METRIC.get(test.name, "top1")
    metrics = {headline: metrics.pop(headline), **metrics}
    if headline != "mean_top1_top5":
        metrics.pop("mean_top1_top5", None)
    return {**metrics, "chance": 50.0 if headline == "roc_auc" else 100 / len(names)}


def retrieval(net, train, test, args, kw):
    _, metrics, n = language_scores(net.model, net.tokenizer, test, captions=True, **kw)
    return {"mean_recall": metrics.pop("mean_recall"), **metrics, "chance@1": 100 / n}


def knn_vote(net, train, test, args, kw):
    kw |= {"k": args.k, "temperature": args.temperature, "max_train": 0, "max_val": 0}
    found = knn_eval(net.encoder, train, test, **kw)
    return {name.removeprefix("knn_"): value for name, value in found.items()}


def linear(net, train, test, args, kw):
    metrics, _, base_lr = linear_probe(net.encoder, train, test, args=args, **kw)
    metrics.pop("mean_top1_top5", None)
    return {**metrics, "chance": 100 / len(test.classes), "base_lr": base_lr}


PROTOCOLS = {"zeroshot": zeroshot, "retrieval": retrieval, "knn": knn_vote, "linear": linear}


def table(rows: dict[str, dict]) -> str:
    """{row: {column: number}} -> aligned text."""
    header = ["", *next(iter(rows.values()))]
    header = [c.replace("image_to_text_recall", "i2t").replace("text_to_image_recall", "t2i") for c in header]
    cells = [header] + [[name, *(f"{x:.2f}" for x in row.values())] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join(map("  ".join, cells))


def main(argv: list[str]):
    if {"-h", "--help"} & set(argv):
        print(__doc__)
    first_flag = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    args, (protocol, *paths) = parse_args(Args, {}, argv[first_flag:]), argv[:first_flag] or [""]
    if protocol not in PROTOCOLS or not paths or not args.data:
        raise UserError(f"use: evaluate.py {'|'.join(PROTOCOLS)} CHECKPOINT ... --data NAME (see --help)")
    if not (args.k and args.temperature and args.probe_batch):
        raise UserError("--k, --temperature and --probe-batch must be above 0")
    device = init_distributed(args.device)
    torch.set_float32_matmul_precision("highest")  # TF32 would reorder close neighbours
    test = open_dataset(args.data, args.data_dir, args.split)
    train = open_dataset(args.data, args.data_dir, "train") if protocol in ("knn", "linear") else None
    needs = "captions" if protocol == "retrieval" else "classes"
    if not (test.captioned if needs == "captions" else test.classes):
        raise UserError(f"{protocol} needs {needs}, which {args.data} does not have")
    if train and (args.split == "train" or train.classes != test.classes):
        raise UserError(f"{protocol} needs a --split other than train, with the same classes")
    kw = {"device": device, "dtype": args.dtype, "batch_size": args.batch_size, "workers": args.workers}
    rows = {}
    for path in map(Path, paths):
        result = {"protocol": protocol, "data": args.data, "split": args.split, "checkpoint": str(path)}
        for kind in ["metrics", "random weights"][: 1 + args.random]:
            net = open_network(path, device, args.head_layer, kind == "random weights")
            if protocol in ("zeroshot", "retrieval") and not net.tokenizer:
                raise UserError(f"{protocol} needs a language-image checkpoint, {path} is {net.method}'s")
            result[kind] = PROTOCOLS[protocol](net, train, test, args, {**kw, "view": net.view})
            rows[f"{path}, {kind}" if kind != "metrics" else str(path)] = result[kind]
        result |= {"method": net.method, "step": net.step, "command": shlex.join(["evaluate.py", *argv])}
        result["versions"] = {m.__name__: m.__version__ for m in (torch, torchvision)}
        if rank() == 0:
            if args.json:
                print(json.dumps(result), flush=True)
            try:
                with open((path if path.is_dir() else path.parent) / "results.jsonl", "a") as file:
                    file.write(json.dumps(result) + "\n")
            except OSError as error:
                print(f"not recorded: {error}", file=sys.stderr)
    if rank() == 0 and not args.json:
        print(f"{protocol}, {args.data} {args.split}, percent", table(rows), sep="\n")


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
