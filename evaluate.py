"""Evaluates checkpoints: python evaluate.py PROTOCOL CHECKPOINT [CHECKPOINT ...] --data NAME [--flag VALUE]

PROTOCOL is zeroshot, retrieval, knn, logreg, linear, finetune or semi, or a picture: attention, pca, matches,
neighbors; export writes the weights for another project.
CHECKPOINT is a checkpoint.pt, the run directory that holds it or a file of published weights; several give
one table. Under torchrun the result is the same for any number of processes. Every result is appended to
results.jsonl beside its checkpoint, every picture is a PNG there.

    python evaluate.py knn runs/simclr_cifar10_* --data cifar10 --random
    python evaluate.py linear runs/simclr_cifar10_* --data cifar10 --cached
    python evaluate.py semi runs/simclr_cifar10_* --data cifar10 --labels 0.1 --random
    python evaluate.py attention runs/dino_shapes_* --data shapes
    torchrun --nproc_per_node=8 evaluate.py zeroshot runs/slip_yfcc15m_* --data imagenet

Scores are in percent; every function names the protocol it follows, without which a score says nothing.
Letters: N samples, D width of a feature, C classes, T texts, b rows of a batch or chunk.
"""

import contextlib
import hashlib
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from tqdm import tqdm

import exports
import finetune
import pictures
from common import UserError, all_gather, all_reduce_mean, init_distributed, load_checkpoint, mixed_precision
from common import parse_args, rank, user_errors, world_size
from data import CLIP_MEAN, CLIP_STD, Loader, decode, hflip, ignore_signals, normalize, open_dataset
from data import random_resized_crop, to_float
from pictures import save_curves, save_views  # noqa: F401
from probes import LastBlocks, best_exponent, fit_heads, grid, logistic_regression
from weights import align_state, load_released, open_network  # noqa: F401


@dataclass
class Args:
    data: str = ""  # named dataset or path, see docs/data.md
    data_dir: str = ""  # where named datasets are (default: $DATA_DIR, then ./data)
    split: str = "val"  # the split that is reported on
    batch_size: int = 256  # images per forward pass
    workers: int = min(8, os.cpu_count() or 1)  # loader processes per process
    device: str = ""  # cuda, mps or cpu (default: the first there is)
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the forward pass; finetune, semi: of training
    json: bool = False  # print JSON lines only
    random: bool = False  # evaluate networks of the same shape with random weights too
    templates: str = ""  # zeroshot: file of prompts, {} stands for the class; or a key of TEMPLATES
    classnames: str = ""  # zeroshot: file of classes, one a line, synonyms separated by |
    cache: bool = True  # knn, logreg, linear --cached: keep features beside the checkpoint for the next time
    k: str = "20"  # knn, neighbors: neighbours (DINO's is 20; knn: also several, 10,20,100); matches: lines
    temperature: str = "0.07"  # knn: a neighbour votes with exp(cosine / temperature); also several
    head_layer: int = 0  # encoder with so many layers of the projection head (SimCLR v2's semi: 1)
    cached: bool = False  # linear: features extracted once, not augmented; chooses base_lr among LRS
    blocks: int = 1  # linear: class tokens of so many last blocks (DINO: 4 for ViT-S; --grid: 4 in DINOv2)
    average: bool = False  # linear: and the mean of the patches (DINO: for ViT-B)
    grid: bool = False  # linear: DINOv2's heads, 13 rates on 4 kinds of features, at once; chooses one
    base_lr: float = 0.1  # linear, finetune, semi: lr = base_lr * train_batch / 256
    lr_steps: str = ""  # linear: a tenth of the rate after these epochs (MoCo: 60,80), no cosine
    lars: bool = False  # linear: in place of SGD (SimSiam)
    train_batch: int = 1024  # linear, finetune, semi: global batch
    epochs: int = 90  # linear, finetune, semi: passes over the train split
    weight_decay: float = 0.0  # linear (SimCLR: 1e-6), finetune, semi
    nesterov: bool = False  # linear, finetune, semi (SimCLR: on)
    zero_init: bool = False  # linear: the head starts at 0 (SimCLR), not at N(0, 0.01) (MoCo v3, SLIP)
    seed: int = 0  # linear, finetune, semi: order, crops, first weights; logreg: held-out tenth; semi: labels
    labels: float = 0.0  # semi: share of the train split's labels, as many of every class, 0.01 or 0.1
    # finetune, semi: these and the ones above are by default as finetune.recipe says for the architecture
    optimizer: Literal["sgd", "adamw"] = "sgd"  # finetune, semi
    warmup_epochs: float = 0.0  # finetune, semi: linear, from 0
    min_lr: float = 0.0  # finetune, semi: end of the cosine
    layer_decay: float = 1.0  # finetune, semi: rate of a block, as a share of the next one's
    drop_path: float = 0.0  # finetune, semi: stochastic depth of a transformer's last block
    mixup: float = 0.0  # finetune, semi: parameter of the Beta distribution of proportions (0: off)
    cutmix: float = 0.0  # finetune, semi: that of areas; with mixup too, either one in each step (0: off)
    label_smoothing: float = 0.0  # finetune, semi
    randaugment: int = 0  # finetune, semi: strength of two random operations, 1 to 10 (0: off)
    erase: float = 0.0  # finetune, semi: share of the images of which a rectangle is erased
    ema: float = 0.0  # finetune, semi: decay of the averaged weights that are scored, as 0.9999 (0: the last)
    C: float = 0.0  # logreg: scikit-learn's C, how much data count beside |w|^2 / 2 (0: swept)
    heads: int = 0  # of a transformer from elsewhere whose weights do not say it (0: recognised)
    images: int = 4  # pictures: how many samples, the same in every run
    samples: str = ""  # pictures: these instead, numbers in the split, as 3,14,15
    size: int = 0  # pictures: pixels of the shorter side (0: as evaluated; DINO's figures have 480)
    mass: float = 0.6  # attention: share of it that the kept patches have (DINO: 0.6)
    threshold: float = 0.0  # pca: foreground above so many standard deviations of the first component
    out: str = ""  # pictures, export: folder to write to (default: the checkpoint's); finetune: weights
    to: Literal["timm", "torchvision", "open_clip", "transformers", "safetensors"] = "timm"  # export: target


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
GRID_LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1)  # DINOv2's code
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


def knn(train_features, train_labels, test_features, test_labels, k=20, temperature=0.07, num_classes=None):
    """knn_sweep for one k and one temperature -> (top1, top5) in percent."""
    inputs = train_features, train_labels, test_features, test_labels
    return knn_sweep(*inputs, [k], [temperature], num_classes)[k, temperature]


@torch.no_grad()
def knn_sweep(train_features, train_labels, test_features, test_labels, ks, temperatures, num_classes=None):
    """Weighted k-nearest-neighbour vote (DINO eval_knn.py; arXiv 1805.01978) -> {(k, temperature): (top1,
    top5)} in percent, the neighbours being looked for once.

    (N, D), (N,), (M, D), (M,) on one device. The k train features of largest cosine vote for their class with
    exp(cosine / temperature). As in DINO, top5 counts the first min(5, k) classes, also those without a vote.
    Equal cosines and equal votes stand in the order of their index."""
    train, test = F.normalize(train_features, dim=1), F.normalize(test_features, dim=1)
    num_classes = num_classes or int(max(train_labels.max(), test_labels.max())) + 1
    train_labels, most = train_labels.cpu(), min(max(ks), len(train))
    ranks = {(k, temperature): [] for k in ks for temperature in temperatures}
    for query, label in chunks(max(len(train), num_classes), test, test_labels.cpu()):
        cosine = query @ train.T  # (b, N)
        kth = cosine.topk(most).values[:, -1:]
        above, equal = cosine > kth, cosine == kth  # topk does not say which of equal ones it takes
        nearest = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= most - above.sum(1, keepdim=True)))
        nearest = nearest.nonzero()[:, 1].view(-1, most)
        cosine, nearest = cosine.gather(1, nearest).cpu().double(), nearest.cpu()
        cosine, order = cosine.sort(dim=1, descending=True, stable=True)
        classes, right = train_labels[nearest.gather(1, order)], label[:, None] == torch.arange(num_classes)
        for k, temperature in ranks:
            weight = ((cosine[:, :k] - cosine[:, :1]) / temperature).exp()  # never inf
            votes = weight.new_zeros(len(query), num_classes).scatter_add_(1, classes[:, :k], weight)
            # float64 sums, rounded: equal votes stay equal in whatever order they were added
            ranks[k, temperature].append(hit_rank(votes.float(), right))
    ranks = {key: torch.cat(parts) for key, parts in ranks.items()}
    return {key: (percent(r < 1), percent(r < min(5, key[0], len(train)))) for key, r in ranks.items()}


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
    """-> features (n, D), labels (n,), text features (T, E), row of each text's image (T,), index (n,); on
    the CPU, the same on all processes. Whole batches are dealt out, so that each of them, and with it every
    rounding error, is the same for any number of processes; nothing is repeated to fill up."""
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
    return features[order], labels[order], texts[text_order], torch.searchsorted(index, owners), index


def extract(encoder, dataset, view, device, cache="", **options):
    """Collective. -> features (n, D) float32 and labels (n,), in the order of the index, all on every CPU.

    encoder: module, float images (b, 3, S, S) -> (b, D); its modes and the global random state stay as they
    were. cache: folder in which they are kept for the next time. options: dtype="fp32", batch_size=256,
    workers=0, indices=None (all). What cannot be read is left out and counted on stderr. Raises UserError
    when nothing can be read or a feature is not finite."""
    if not cache:
        return _extract(encoder, encoder, dataset, view, device, **options)[:2]
    file = Path(cache) / f"features_{fingerprint(encoder, dataset, view, device, options)}.pt"
    if all_reduce_mean(torch.tensor(float(file.is_file()))) == 1:  # every process sees it
        with contextlib.suppress(UserError):
            return load_checkpoint(file)["features"], load_checkpoint(file)["labels"]
    features, labels = _extract(encoder, encoder, dataset, view, device, **options)[:2]
    if rank() == 0:
        try:
            torch.save({"features": features, "labels": labels}, file.with_suffix(".tmp"))
            os.replace(file.with_suffix(".tmp"), file)
        except (OSError, RuntimeError) as error:
            print(f"features are not kept: {error}", file=sys.stderr)
    return features, labels


def fingerprint(encoder, dataset, view, device, options):
    """Name for what features depend on. Eight of them tell network, preprocessing, precision, machine and
    data; the number of samples, the classes and what else is asked for are added."""
    few = sorted({i * (len(dataset) - 1) // 7 for i in range(8)})
    features, labels = _extract(encoder, encoder, dataset, view, device, **{**options, "indices": few})[:2]
    rest = dataset.name, len(dataset), dataset.classes, options.get("batch_size"), options.get("indices")
    text = repr((features.tolist(), labels.tolist(), rest, torch.__version__))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    images, labels, texts, image_of_text, _ = (x.to(device) for x in extracted)
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


class Part:
    """Some samples of a dataset."""

    def __init__(self, dataset, indices):
        self.dataset, self.indices, self.captioned = dataset, indices, False
        self.name, self.classes = dataset.name, dataset.classes

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return self.dataset[self.indices[i]]


def linear_probe(encoder, train_set, test_set, view, device, args, **kw):
    """Collective. A linear classifier on frozen features -> (test scores, head, base_lr).

    As MoCo v3 and SLIP: trained on crops and flips, lr = base_lr * batch / 256 (SimCLR: nesterov, weight
    decay 1e-6, zero_init, batch 4096; MoCo: lr_steps; SimSiam: lars). cached: on features of the eval view
    extracted once. cached chooses among LRS, grid among GRID_LRS and kinds of features, by the scores on a
    held-out tenth of the train split; cached then trains on all of it, grid takes the head as it is. The last
    epoch counts; nothing is ever chosen on the test split. args: an Args; kw: options of `extract`."""

    def extracted(dataset):
        return [x.to(device) for x in labelled(dataset, *extract(encoder, dataset, view, device, **kw))]

    def scores(heads, parts, x, y):
        return [zeroshot_metrics(h(x[:, a:b]).detach(), y)["top1"] for h, (a, b) in zip(heads, parts)]

    def loader_of(dataset, batch):
        return Loader(dataset, {"image": probe_view}, {}, batch, args.seed, args.workers, device)

    test, test_labels = extracted(test_set)
    dim, classes, probe_view = test.shape[1], len(train_set.classes), ProbeView(view)
    b, base_lr, lrs, parts = args.train_batch, args.base_lr, [args.base_lr], [(0, dim)]
    if args.grid:
        lrs, parts = zip(*grid(args.blocks, dim, GRID_LRS))
    elif args.cached:
        lrs, parts = LRS, [(0, dim)] * len(LRS)
    if args.cached:
        x, y = extracted(train_set)
        if len(y) < 10:
            raise UserError(f"{train_set.name} has only {len(y)} labels, too few to choose a learning rate")
    n = len(y) if args.cached else len(train_set)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(args.seed))
    held, rest = order[: n // 10], order[n // 10 :]
    if args.cached:
        b = min(b, len(rest))
        batches, (held_x, held_y) = cached_batches(x[rest], y[rest], b, args), (x[held], y[held])
    elif args.grid:
        batches = augmented_batches(encoder, loader_of(Part(train_set, rest.tolist()), b), probe_view, args)
        held_x, held_y = extracted(Part(train_set, held.tolist()))
    else:
        batches = augmented_batches(encoder, loader_of(train_set, b), probe_view, args)
    heads = fit_heads(batches, dim, classes, [lr * b / 256 for lr in lrs], args, device, parts)
    best = 0
    if len(heads) > 1:
        found = scores(heads, parts, held_x, held_y)
        best = found.index(max(found))
    head, part, base_lr = heads[best], parts[best], lrs[best]
    if args.cached and not args.grid:
        head = fit_heads(cached_batches(x, y, b, args), dim, classes, [base_lr * b / 256], args, device)[0]
    return zeroshot_metrics(head(test[:, slice(*part)]).detach(), test_labels), head, base_lr


# -------------------------------------------- protocols --------------------------------------------
def lines(path, flag) -> list[str]:
    """The lines of a text file that are not empty. Raises UserError."""
    try:
        found = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path} cannot be read as text ({error})") from error
    if not found:
        raise UserError(f"{flag} {path} is empty")
    return found


def numbers(text, kind=float) -> list:
    """"10,20" -> [10, 20]. Raises UserError unless all are above 0."""
    try:
        found = [kind(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"--k and --temperature are numbers with commas between them, not {text}") from error
    if not all(0 < x < math.inf for x in found):
        raise UserError(f"--k and --temperature must be above 0 and finite, not {text}")
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
    metrics = headline_first(metrics, test.name)
    return {**metrics, "chance": 50.0 if next(iter(metrics)) == "roc_auc" else 100 / len(names)}


def headline_first(metrics, dataset):
    """zeroshot_metrics with the one first that is quoted for this dataset."""
    headline = METRIC.get(dataset, "top1") if METRIC.get(dataset) in metrics else "top1"
    metrics = {headline: metrics[headline], **metrics}
    if headline != "mean_top1_top5":
        metrics.pop("mean_top1_top5", None)
    return metrics


def retrieval(net, train, test, args, kw):
    _, metrics, n = language_scores(net.model, net.tokenizer, test, captions=True, **kw)
    return {"mean_recall": metrics.pop("mean_recall"), **metrics, "chance@1": 100 / n}


def knn_vote(net, train, test, args, kw):
    """One k and temperature: top1 and top5; several: the top1 of each. None is chosen."""
    memory, asked = (labelled(d, *extract(net.encoder, d, **kw)) for d in (train, test))
    inputs = [x.to(kw["device"]) for x in memory + asked]
    found = knn_sweep(*inputs, numbers(args.k, int), numbers(args.temperature), len(train.classes))
    if len(found) == 1:
        metrics = dict(zip(("top1", "top5"), *found.values()))
    else:
        metrics = {f"top1_k{k}_T{temperature:g}": top1 for (k, temperature), (top1, _) in found.items()}
    return {**metrics, "chance": 100 / len(train.classes)}


def linear(net, train, test, args, kw):
    encoder = net.encoder
    if args.grid or args.blocks > 1 or args.average:
        if len(getattr(encoder, "blocks", ())) < args.blocks:
            raise UserError(f"--grid, --blocks and --average need a transformer with {args.blocks} blocks "
                            f"and timm's names, not {net.method}'s {net.arch}")
        encoder = LastBlocks(encoder, args.blocks, args.average or args.grid)
    metrics, _, base_lr = linear_probe(encoder, train, test, args=args, **kw)
    return {**headline_first(metrics, test.name), "chance": 100 / len(test.classes), "base_lr": base_lr}


def logreg(net, train, test, args, kw):
    """CLIP's protocol (App. A.3): C is swept on a held-out tenth of the train split, unless --C sets it; the
    last fit is on all of it."""
    device, n = kw["device"], len(train.classes)
    double = torch.float32 if device.type == "mps" else torch.float64
    splits = [labelled(d, *extract(net.encoder, d, **kw)) for d in (train, test)]
    (x, y), (asked, right) = [(features.to(device, double), labels.to(device)) for features, labels in splits]
    if not (C := args.C):
        if len(y) < 10:
            raise UserError(f"{train.name} has only {len(y)} labels, too few to choose --C")
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(args.seed)).to(device)
        held, rest = order[: len(y) // 10], order[len(y) // 10 :]

        def score(exponent):
            logits = logistic_regression(x[rest], y[rest], 10**exponent, n)(x[held])
            return zeroshot_metrics(logits, y[held])["top1"]

        C = 10 ** best_exponent(score)
    metrics = zeroshot_metrics(logistic_regression(x, y, C, n)(asked), right)
    return {**headline_first(metrics, test.name), "chance": 100 / n, "C": C}


def fine_tuned(net, train, test, args, kw):
    """All of the network is trained, with all labels or --labels of them; scored as it is after the last
    epoch. loss: the mean of that epoch."""
    if args.labels:
        indices = finetune.labelled_part(train, args.labels, args.seed).nonzero().flatten().tolist()
        name, train = train.name, Part(train, indices)
        train.name = f"{100 * args.labels:g}% of {name}"
    options = net.view, len(train.classes), args, kw["device"]
    net.tuned, rows = finetune.fine_tune(net.encoder, train, *options)
    metrics = zeroshot_metrics(*labelled(test, *extract(net.tuned, test, **kw)))
    rest = {"loss": rows[-1]["loss"], "chance": 100 / len(test.classes)}
    return {**headline_first(metrics, test.name), **rest, "images": len(train)}


def save_tuned(net, file):
    """With the encoder's names and that of timm or torchvision for the classifier, which load it strictly."""
    head = "head." if finetune.is_transformer(net.encoder) else "fc."
    state = {f"{head}{k}": v.cpu() for k, v in net.tuned.head.state_dict().items()}
    state |= {k: v.cpu() for k, v in net.tuned.encoder.state_dict().items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, file)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file} cannot be written ({error}), use another --out") from error


PROTOCOLS = {"zeroshot": zeroshot, "retrieval": retrieval, "knn": knn_vote, "linear": linear}
PROTOCOLS |= {"logreg": logreg, "finetune": fine_tuned, "semi": fine_tuned}


# -------------------------------------------- pictures --------------------------------------------
def picked(dataset, args, one_kind=False):
    """-> [(index, Sample, uint8 (3, H, W))]: --samples or, the same in every run, --images that can be read;
    one_kind: of one class, if there are classes."""
    try:
        wanted = [int(word) for word in args.samples.split(",")] if args.samples else []
    except ValueError as error:
        raise UserError(f"--samples {args.samples} must be numbers with commas between them") from error
    if any(not 0 <= i < len(dataset) for i in wanted):
        raise UserError(f"--samples {args.samples}: {dataset.name} has those from 0 to {len(dataset) - 1}")
    found = []
    for i in wanted or torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist():
        try:
            sample = dataset[i]
            image = decode(sample.image)
        except (ValueError, OSError) as error:
            if wanted:
                raise UserError(f"sample {i} of {dataset.name} cannot be read ({error})") from error
            continue
        if wanted or not (one_kind and found) or sample.label == found[0][1].label:
            found.append((i, sample, image))
        if len(found) == (len(wanted) or args.images):
            break
    return found


def title(dataset, i, label):
    return f"{i}, {dataset.classes[label]}" if dataset.classes and label >= 0 else str(i)


def looked_at(net, dataset, args, one_kind=False):
    """-> [(picture, title, attention (heads, R, C), features (R, C, D))] of the samples. Raises UserError
    unless the network is a transformer with timm's names."""
    if not hasattr(net.encoder, "blocks"):
        raise UserError("this picture needs a transformer with timm's names, as DINO, SLIP and MoCo v3 have, "
                        f"not {net.method}'s {net.arch}")  # fmt: skip
    patch = net.encoder.patch_embed.proj.kernel_size[0]
    if (size := args.size or net.view.size) < patch:
        raise UserError(f"--size {size} is smaller than a patch, {patch}")
    out, device = [], next(net.encoder.parameters()).device
    for i, sample, image in picked(dataset, args, one_kind):
        picture = pictures.fit_image(image, size, patch, net.view.filter)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(device)
        with evaluating(net.encoder):
            attention, features = pictures.patches(net.encoder, net.view(pixels))
        out.append((picture, title(dataset, i, sample.label), attention[0].cpu(), features[0].cpu()))
    return out


# A picture: (network, train split, test split, args, options of `extract`) -> Pillow image
def attention(net, train, test, args, kw):
    return pictures.attention_page([(p, t, a) for p, t, a, _ in looked_at(net, test, args)], args.mass)


def pca(net, train, test, args, kw):
    samples = [(p, t, f) for p, t, _, f in looked_at(net, test, args, one_kind=True)]
    return pictures.pca_page(samples, args.threshold)


def matches(net, train, test, args, kw):
    samples = looked_at(net, test, args, one_kind=True)
    if len(samples) < 2:
        raise UserError("matches needs two images, give --samples or a larger --images")
    (picture, name, looks, a), (other, other_name, _, b) = samples[:2]
    found = pictures.matches(a, b, looks.mean(0), numbers(args.k, int)[0])
    return pictures.matches_page((picture, name, a.shape[:2]), (other, other_name, b.shape[:2]), found)


def neighbors(net, train, test, args, kw):
    """From the train split or, where there is none, from the others of the same split."""
    memory, size, rows = train or test, args.size or net.view.size, []
    x, _, _, _, index = _extract(net.encoder, net.encoder, memory, **kw)

    def cell(dataset, i, text, query=None):
        sample = dataset[i]
        picture = pictures.fit_image(decode(sample.image), size, 1, net.view.filter)
        right = None if query is None or query.label < 0 else query.label == sample.label
        return picture, f"{text}{title(dataset, i, sample.label)}", right

    for i, sample, _ in picked(test, args):
        asked = _extract(net.encoder, net.encoder, test, **kw, indices=[i])[0]
        cosine = F.normalize(x, dim=1) @ F.normalize(asked, dim=1)[0]
        if memory is test:
            cosine[index == i] = -2  # it is no neighbour of itself
        nearest = cosine.topk(min(numbers(args.k, int)[0], len(x) - (memory is test)))
        found = [cell(memory, int(index[j]), f"{c:.3f}\n", sample) for c, j in zip(*nearest)]
        rows.append([cell(test, i, ""), *found])
    return pictures.neighbors_page(rows)


PICTURES = {"attention": attention, "pca": pca, "matches": matches, "neighbors": neighbors}


# -------------------------------------------- command line --------------------------------------------
def table(rows: dict[str, dict]) -> str:
    """{row: {column: number}} -> aligned text."""
    header = ["", *next(iter(rows.values()))]
    header = [c.replace("image_to_text_recall", "i2t").replace("text_to_image_recall", "t2i") for c in header]
    cells = [header] + [[name, *(f"{x:.2f}" for x in row.values())] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join(map("  ".join, cells))


def open_splits(protocol, args):
    """-> train split (None where the protocol needs none), split to report on. Raises UserError."""
    try:
        test = open_dataset(args.data, args.data_dir, args.split)
    except UserError:
        if protocol not in PICTURES or args.split != "val":
            raise
        return None, open_dataset(args.data, args.data_dir, "train")  # a folder of photos has no other
    if protocol in PICTURES:
        train = None
        if protocol == "neighbors" and args.split != "train":
            with contextlib.suppress(UserError):
                train = open_dataset(args.data, args.data_dir, "train")
        return train, test
    fits = protocol in ("knn", "linear", "logreg", "finetune", "semi")
    train = open_dataset(args.data, args.data_dir, "train") if fits else None
    needs = "captions" if protocol == "retrieval" else "classes"
    if not (test.captioned if needs == "captions" else test.classes):
        raise UserError(f"{protocol} needs {needs}, which {args.data} does not have")
    if train and (args.split == "train" or train.classes != test.classes):
        raise UserError(f"{protocol} needs a --split other than train, with the same classes")
    return train, test


def environment(device) -> dict:
    """Which code ran on what: "commit" is that of git, with -dirty if files are changed, "" without git."""
    commit, git = "", ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    versions = {m.__name__: m.__version__ for m in (torch, torchvision)}
    return {"commit": commit, "hardware": name, "processes": world_size(), "versions": versions}


def save_picture(picture, path, protocol, kind, args):
    """Beside the checkpoint or in --out, named after protocol, data and, unless it is a run's, the file."""
    folder = Path(args.out) if args.out else path if path.is_dir() else path.parent
    words = [] if path.is_dir() or path.name == "checkpoint.pt" else [path.stem]
    words += [protocol, Path(args.data).stem, *(["random"] if kind != "metrics" else [])]
    file = folder / ("_".join(words) + ".png")
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(file)
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error}), use another --out") from error
        print(file)


def export(args, path, *others):
    """Writes a checkpoint's network for another project and prints the lines that load it there."""
    if others:
        raise UserError("export takes one checkpoint at a time")
    net = open_network(path, torch.device("cpu"), args.head_layer, heads=args.heads, text=False)
    folder = args.out or (Path(path) if Path(path).is_dir() else Path(path).parent) / f"export_{args.to}"
    print(exports.export(net, args.to, folder))


def main(argv: list[str]):
    if {"-h", "--help"} & set(argv):
        print(__doc__)
    first_flag = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    flags, (protocol, *paths) = argv[first_flag:], argv[:first_flag] or [""]
    args = parse_args(Args, {}, flags)
    if protocol == "export" and paths:
        export(args, *paths)
        return
    if protocol not in PROTOCOLS | PICTURES or not paths or not args.data:
        known = "|".join([*PROTOCOLS, *PICTURES, "export"])
        raise UserError(f"use: evaluate.py {known} CHECKPOINT ... --data NAME (see --help)")
    if not re.fullmatch(r"(\d+(,\d+)*)?", args.lr_steps):
        raise UserError(f"--lr-steps {args.lr_steps} must be epochs with commas between them")
    numbers(args.k, int), numbers(args.temperature)
    if not (0 < args.labels < 1 if protocol == "semi" else args.labels == 0):
        raise UserError("semi needs --labels, above 0 and below 1 as 0.01 or 0.1, and nothing else takes it")
    device = init_distributed(args.device)
    torch.set_float32_matmul_precision("highest")  # TF32 would reorder close neighbours
    train, test = open_splits(protocol, args)
    kw = {"device": device, "dtype": args.dtype, "batch_size": args.batch_size, "workers": args.workers}
    rows = {}
    for path in map(Path, paths):
        began = time.time()
        result = {"protocol": protocol, "data": args.data, "split": args.split, "checkpoint": str(path)}
        for kind in ["metrics", "random weights"][: 1 + args.random]:
            text = protocol in ("zeroshot", "retrieval")
            net = open_network(path, device, args.head_layer, kind == "random weights", args.heads, text)
            if text and not net.tokenizer:
                raise UserError(f"{protocol} needs a language-image checkpoint, {path} is {net.method}'s")
            options = {**kw, "view": net.view}
            if protocol in ("finetune", "semi"):  # flags win over what suits the architecture
                recipe = finetune.recipe(net.encoder, len(train), args.labels or 1.0)
                args = parse_args(Args, {args.data: recipe}, flags)
                result["settings"] = {name: getattr(args, name) for name in recipe}
            if args.cache and (protocol in ("knn", "logreg") or protocol == "linear" and args.cached):
                options["cache"] = str(path if path.is_dir() else path.parent)
            if protocol in PICTURES:
                save_picture(PICTURES[protocol](net, train, test, args, options), path, protocol, kind, args)
                continue
            result[kind] = PROTOCOLS[protocol](net, train, test, args, options)
            rows[f"{path}, {kind}" if kind != "metrics" else str(path)] = result[kind]
            if protocol in ("finetune", "semi") and args.out and kind == "metrics" and rank() == 0:
                save_tuned(net, Path(args.out) / f"{protocol}_{path.stem}.pt")
        result |= {"method": net.method, "step": net.step, "command": shlex.join(["evaluate.py", *argv])}
        result |= {"minutes": (time.time() - began) / 60, **environment(device)}
        if rank() == 0 and protocol in PROTOCOLS:
            if args.json:
                print(json.dumps(result), flush=True)
            try:
                with open((path if path.is_dir() else path.parent) / "results.jsonl", "a") as file:
                    file.write(json.dumps(result) + "\n")
            except OSError as error:
                print(f"not recorded: {error}", file=sys.stderr)
    if rank() == 0 and rows and not args.json:
        print(f"{protocol}, {args.data} {args.split}, percent", table(rows), sep="\n")


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
