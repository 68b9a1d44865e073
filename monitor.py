"""Accuracy while training: features of a dataset, zero-shot classification, retrieval. kNN: knn.py.

The training loops and evaluate.py share these functions, so that both measure in the same way, in
percent. All processes, however many, call a "Collective" function at once and get the same result.

Letters: N samples, D width of a feature, C classes, T texts, b rows of a batch, S image size."""

import contextlib
import functools
import math
import os
import random
import re
import sys
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common import UserError, mixed_precision, rank, world_size
from data import CLIP_MEAN, CLIP_STD, at_most_cores, decode, normalize, to_float
from data import open_dataset, prepare_worker, share, start_of

# Prompts for zero-shot classification, {} stands for the class; other datasets take "default"
TEMPLATES = {
    "default": ["a photo of a {}.", "a picture of a {}.", "an image that shows a {}."],
    "imagenet": ["a photo of a {}.", "a close photo of a {}.", "a dark photo of a {}.",
                 "a drawing of a {}.", "a {} seen from far away.", "a toy {}.",
                 "a photo of many {}."],
    "cifar10": ["a photo of a {}.", "a tiny photo of a {}.", "a blurry photo of a {}.",
                "a coarse {}."],
    "shapes": ["a {}", "a picture of a {}", "a {} on a plain background"],
}  # fmt: skip
TEMPLATES["cifar100"] = TEMPLATES["stl10"] = TEMPLATES["cifar10"]
CHUNK = 2**23  # the largest number of elements of a similarity matrix that is held at a time


# -------------------------------------------- features --------------------------------------------
class EvalView:
    """Resizes the shorter side, crops the centre, normalises: for RGB and grey CLIP's own bits."""

    def __init__(self, size, resize=None, interpolation="bicubic", mean=CLIP_MEAN, std=CLIP_STD):
        self.size, self.resize, self.mean, self.std = size, resize or size, mean, std
        self.filter = Image.Resampling[interpolation.upper()]

    def crop(self, image, rng=None):
        """In a loader worker: uint8 (3, H, W) -> uint8 (3, S, S)."""
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

    def sample(self, rng=None):
        """Nothing about this view is random."""
        return {}

    def __call__(self, x, params=None):
        """For a batch: uint8 (b, 3, S, S) -> normalised float."""
        return normalize(to_float(x), self.mean, self.std)


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
    """A progress bar, shown on a terminal and by the first process only."""
    return tqdm(iterable, title, total, leave=False, disable=rank() > 0 or not sys.stderr.isatty())


class Batches(torch.utils.data.Dataset):
    """A dataset of batches: a list of indices -> ((b,) indices, (b,) labels, uint8 (b, 3, S, S), b
    lists of captions), or () if no image can be read, and a description of each error."""

    def __init__(self, dataset, view):
        self.dataset, self.view = dataset, view

    def __getitem__(self, indices):
        good, errors = [], []
        for i in indices:
            try:
                sample = self.dataset[i]
                image = self.view.crop(decode(sample.image), random.Random(i))
                good.append((i, sample.label, image, sample.captions))
            except (ValueError, OSError) as error:
                errors.append(f"sample {i} ({error})")
        if not good:
            return (), errors
        index, labels, images, captions = zip(*good)
        return (torch.tensor(index), torch.tensor(labels), torch.stack(images), captions), errors


class Features(NamedTuple):
    """What extract_features returns, on the CPU and in the order of the samples' indices."""

    images: torch.Tensor  # (N, D)
    labels: torch.Tensor  # (N,), -1 without a label
    texts: torch.Tensor  # (T, E), empty without a tokenizer
    image_of_text: torch.Tensor  # (T,), the row of `images` that each text belongs to
    index: torch.Tensor  # (N,), indices in the dataset


@torch.no_grad()
def extract_features(module, encode, dataset, view, device, tokenizer=None, dtype="fp32",
                     batch_size=256, workers=0, indices=None) -> Features:  # fmt: skip
    """Collective. encode(images) and, with a tokenizer, module.encode_text(captions) of a dataset.

    Processes share out whole batches, so that rounding errors are the same for any number of them,
    and no sample is repeated to fill up. `module` is in eval mode; global random state stays.
    indices: None takes all. Unreadable samples are left out and counted on stderr. UserError if all
    are, or a feature is not finite."""
    indices = list(range(len(dataset)) if indices is None else indices)
    starts = range(0, len(indices), batch_size)[rank() :: world_size()]
    batches = [indices[i : i + batch_size] for i in starts]
    workers = min(at_most_cores(workers), len(batches))
    loader = torch.utils.data.DataLoader(
        Batches(dataset, view), sampler=batches, batch_size=None, collate_fn=share,
        num_workers=workers, worker_init_fn=prepare_worker, generator=torch.Generator(),
        multiprocessing_context=start_of(workers), pin_memory=device.type == "cuda")  # fmt: skip
    index = torch.tensor(indices).sort().values  # of each row of what is returned
    labels, read, images = torch.zeros_like(index), torch.zeros_like(index), torch.empty(0, 0)
    owners, texts_seen, errors = [], [], []
    with evaluating(module), mixed_precision(dtype, device)[0]:
        for batch, batch_errors in bar(loader, f"{dataset.name} features"):
            errors += batch_errors
            if not batch:
                continue
            batch_index, batch_labels, pixels, captions = batch
            features = encode(view(pixels.to(device, non_blocking=True), {})).float().cpu()
            if not len(images):  # a list of parts would take twice the memory when it is joined
                images = features.new_zeros(len(index), features.shape[1])
            rows = torch.searchsorted(index, batch_index)
            images[rows], labels[rows], read[rows] = features, batch_labels, 1
            pairs = []  # (index of the image, caption)
            if tokenizer:
                for i, several in zip(batch_index.tolist(), captions):
                    pairs += [(i, caption) for caption in several if caption.strip()]
            for j in range(0, len(pairs), batch_size):
                text_owners, texts = zip(*pairs[j : j + batch_size])
                features = module.encode_text(tokenize(tokenizer, texts, device)).float().cpu()
                texts_seen.append(features)
                owners += text_owners

    text_dim = texts_seen[0].shape[1] if texts_seen else 0
    every = [(errors, owners, images.shape[1], text_dim)] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(every, every[0])
    errors, owners, image_dims, text_dims = zip(*every)
    errors, counts = sum(errors, []), [len(o) for o in owners]
    if not len(images):
        images = torch.zeros(len(index), max(image_dims))
    owners, order = torch.tensor(sum(owners, []), dtype=torch.int64).sort(stable=True)
    texts = torch.zeros(len(owners), max(text_dims))
    rows = order.argsort().split(counts)[rank()]  # of this process's texts
    for features in texts_seen:
        texts[rows[: len(features)]], rows = features, rows[len(features) :]
    for x in (images, labels, read, texts):  # each number is 0 on all processes but one
        if dist.is_initialized() and x.numel():
            dist.all_reduce(x.view(torch.int32))  # adds up bits, which rounds nothing

    if not read.any():
        reason = errors[0] if errors else "there are none"
        raise UserError(f"none of {len(indices)} samples of {dataset.name} can be read: {reason}")
    if errors and rank() == 0:
        left_out = f"{dataset.name}: left out {len(errors)} of {len(indices)} samples"
        print(f"{left_out}, {errors[0]}", file=sys.stderr)
    if not read.all():
        index, labels, images = (x[read > 0] for x in (index, labels, images))
    extremes = [x for y in (images, texts) if y.numel() for x in y.aminmax()]  # NaN if there is one
    if not torch.stack(extremes).isfinite().all():
        raise UserError("features are not finite: the network diverged, or --dtype fp16 overflows")
    return Features(images, labels, texts, torch.searchsorted(index, owners), index)


def subset_indices(dataset, most):
    """At most `most` indices (0: all), the same in every run. They are drawn at random, because
    neighbours in a dataset often share a class."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return order[: most or None].sort().values.tolist()


def refuse_labels_beyond(dataset, label):
    """Raises UserError for a label that is not below the number of classes, if the set has any."""
    if dataset.classes and label >= len(dataset.classes):
        which = f"{dataset.name} has the label {label}, but only {len(dataset.classes)} classes"
        raise UserError(f"{which}, from 0 on: fix its labels or its list of classes")


@functools.cache  # once in a run, not at every evaluation
def say_without(what, name, count, total):
    """Says how many samples an evaluation cannot use."""
    if count and rank() == 0:
        print(f"{name}: {count} of {total} samples have no {what}", file=sys.stderr, flush=True)


def labelled(dataset, features, labels):
    """Features and labels of the samples that have a label. Raises UserError if none has one."""
    if not (labels >= 0).any():
        raise UserError(f"{dataset.name} has no labels")
    say_without("label", dataset.name, int((labels < 0).sum()), len(labels))
    refuse_labels_beyond(dataset, int(labels.max()))
    if (labels >= 0).all():  # without a copy: they may be gigabytes
        return features, labels
    return features[labels >= 0], labels[labels >= 0]


# -------------------------------------------- scores --------------------------------------------
def chunks(width, *tensors):
    """Walks through the rows of `tensors` together, at most CHUNK / width rows at a time."""
    return zip(*(t.split(max(1, CHUNK // width)) for t in tensors))


def hit_rank(scores, right):
    """scores (b, C), right (b, C) bool -> (b,) on the CPU: how many columns rank before the best
    right one, so that a rank below k is a hit among the first k. The smaller index wins a tie."""
    best, best_column = scores.masked_fill(~right, -math.inf).max(1, keepdim=True)
    column = torch.arange(scores.shape[1], device=scores.device)
    greater_or_nan = ~(scores <= best)  # comparisons with NaN are false: NaN is never a hit
    tied_before = (scores == best) & (column < best_column)
    return (greater_or_nan | tied_before).sum(1).cpu()


def percent(hits):
    """Share of True in a boolean tensor."""
    return 100 * hits.sum().item() / hits.numel()


def tokenize(tokenizer, texts, device):
    """T strings -> int64 (T, L), where L is the longest text's length rounded up to a multiple of
    8; shorter texts are padded with 0."""
    rows = [tokenizer(text) for text in texts]
    length = min(8 * math.ceil(max(map(len, rows)) / 8), tokenizer.context_length)
    return torch.tensor([ids + [0] * (length - len(ids)) for ids in rows], device=device)


@torch.no_grad()
def zeroshot_weights(encode_text, tokenizer, classnames, templates, device="cpu", batch_size=256):
    """One unit vector per class, (C, E): the embedding of every prompt is normalised, and so is
    their mean (CLIP Sec. 3.1.4: the ensemble is formed in embedding space). A class is a str or a
    list of synonyms; each synonym fills the {} of each template, and all are averaged (SLIP).
    encode_text: token ids (b, L) -> (b, E)."""
    names = [[c.replace("_", " ")] if isinstance(c, str) else c for c in classnames]
    prompts = [t.replace("{}", name) for synonyms in names for name in synonyms for t in templates]
    parts = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    embedded = torch.cat([encode_text(tokenize(tokenizer, part, device)).float() for part in parts])
    sizes = [len(synonyms) * len(templates) for synonyms in names]
    per_class = F.normalize(embedded, dim=1).split(sizes)
    return F.normalize(torch.stack([e.mean(0) for e in per_class]), dim=1)


def rank_scores(features):
    """RankMe (arXiv 2210.02885, Eq. 1; Roy and Vetterli 2007): over how many directions features
    spread. (N, D) -> {"effective_rank": from 1 (all on one line: collapsed) to min(N, D), without a
    unit, "full_rank": min(N, D)}, which stand beside an accuracy.

    exp(-sum_k p_k ln p_k), p_k = s_k / sum_j s_j, s the singular values of the features, which are
    not centred. The paper takes projector outputs, and adds 1e-7 to p_k; here values below 5e-7 of
    the largest are 0, and 0 ln 0 = 0. Three digits after the point do not depend on threads."""
    x = features.cpu().double()
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x  # the smaller one has the same spectrum
    squares = torch.linalg.eigvalsh(gram)
    values = squares.where(squares > 2.5e-13 * squares.max(), 0).sqrt()
    shares = values / values.sum().clamp(min=1e-300)
    spread = round(torch.special.entr(shares).sum().exp().item(), 3)
    return {"effective_rank": spread, "full_rank": min(features.shape)}


@torch.no_grad()
def recall(image_features, text_features, image_of_text, ks=(1, 5, 10)):
    """Retrieval among N images and T captions, as on Flickr30k and COCO -> dict in percent.

    (N, D), (T, D) and image_of_text (T,), the image of each caption; an image may have any number
    of captions. text_to_image_recall@k: share of captions whose image is among the k most similar
    images. image_to_text_recall@k: share of images with at least one of their captions among the k
    most similar captions (CLIP_benchmark); an image without a caption is only a candidate.
    mean_recall: mean of all of these. Only a part of the (T, N) similarities is held at a time."""
    images, texts = F.normalize(image_features, dim=1), F.normalize(text_features, dim=1)
    index = torch.arange(len(images), device=images.device)
    to_text, to_image = [], []
    for image, i in chunks(len(texts), images, index):
        to_text.append(hit_rank(image @ texts.T, i[:, None] == image_of_text))
    for text, i in chunks(len(images), texts, image_of_text):
        to_image.append(hit_rank(text @ images.T, i[:, None] == index))
    captioned = image_of_text.cpu().unique()
    to_text, to_image = torch.cat(to_text)[captioned], torch.cat(to_image)
    out = {f"image_to_text_recall@{k}": percent(to_text < k) for k in ks}
    out |= {f"text_to_image_recall@{k}": percent(to_image < k) for k in ks}
    return out | {"mean_recall": sum(out.values()) / len(out)}


# -------------------------------------------- in the training loop --------------------------------
MOST = 1000  # validation images that an evaluation takes


def some_images(count, kind):
    return f"{count:,} {kind} image" + ("s" if count != 1 else "")


def say_evaluation(text):
    """The line at a run's start that says what is evaluated while it trains, or why nothing is."""
    if rank() == 0:
        print(f"evaluation: {text}", flush=True)


def evaluation_set(args, split="val", dataset=None):
    """Collective. `dataset`, or a split of --eval-data, which may be a file, or of --data. None,
    with a line that says why, if it is missing. UserError if an --eval-data that no recipe names is
    missing, or if processes find different ones: they would wait for ever."""
    part = "train" if os.path.isfile(args.eval_data) else split  # what a file holds is called so
    try:
        dataset = dataset or open_dataset(args.eval_data or args.data, args.data_dir, part)
        found = f"{len(dataset):,} images of {len(dataset.classes or ())} classes"
        found += f" (checksum {zlib.crc32(repr(dataset.classes).encode()):08x})"  # of their names
        found += " with captions" * dataset.captioned
    except UserError as error:
        found = f"none, because {error}"
    if dataset and (lack := what_classes_lack(dataset, words=True)):  # a node may lack the pictures
        found += f" ({lack})"
    every = [found] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(every, found)
    if other := next((text for text in every if text != every[0]), ""):
        differ = f"processes differ in the {split} data of the evaluation, one finds {every[0]}"
        raise UserError(f"{differ}, another {other}: give all nodes the same --eval-data")
    if not dataset:
        recipes = getattr(sys.modules[type(args).__module__], "RECIPES", {})  # of the method's file
        recipe = recipes.get(args.recipe or args.data, {})
        if args.eval_data not in ("", recipe.get("eval_data")):  # the user named it
            raise UserError(f"--eval-data {args.eval_data}: {found.removeprefix('none, because ')}")
        say_evaluation(found)
    return dataset


def language_set(args):
    """-> the val split for language_eval, or None. Says which of the two it is."""
    if args.probe != "knn":
        raise UserError("--probe is for methods without captions, leave it out here")
    val = evaluation_set(args)
    if not val:
        return None
    lack = what_classes_lack(val, words=True)
    kinds = ["zero-shot classification"] * (not lack) + ["retrieval"] * val.captioned
    if not kinds:
        say_evaluation(f"none, because {lack}, and there are no captions")
        return None
    size = some_images(min(MOST, len(val)), "validation")
    say_evaluation(f"{' and '.join(kinds)} of {size} of {val.name}")
    return val


def what_classes_lack(dataset, words=False):
    """Why a dataset cannot be classified, with `words` by prompts, or "". Reads a few samples."""
    few, labels = range(0, len(dataset), 1 + len(dataset) // 20), []
    for i in few:
        with contextlib.suppress(OSError, ValueError):  # the loader will name unreadable samples
            labels.append(dataset[i].label)
    if max(labels, default=-1) < 0:
        return getattr(dataset, "labels_lack", f"{dataset.name} has no classes")
    if not dataset.classes:
        return f"{dataset.name} has labels but its classnames.txt is missing, see docs/data.md"
    if words and all(re.fullmatch(r"n\d{8}", str(name)) for name in dataset.classes):
        return f"the classes of {dataset.name} are WordNet ids and its classnames.txt is missing"
    return ""


def captions(dataset):
    """Captions of evenly spread images, at most 10,000, for a tokenizer to be trained on."""
    for index in range(0, len(dataset), 1 + len(dataset) // 10000):
        with contextlib.suppress(OSError, ValueError):  # the loader will name unreadable samples
            yield from dataset[index].captions


def language_scores(model, tokenizer, dataset, view, device, classnames=None, templates=None,
                    captions=False, **options):  # fmt: skip
    """Collective. -> ((logits (M, C), labels (M,)) of the images with a label or None without
    classnames, recall or {} without captions, image features (N, D)), from one pass over the
    dataset. classnames, templates: as in zeroshot_weights; options: those of extract_features."""
    options["tokenizer"] = tokenizer if captions else None
    extracted = extract_features(model, model.encode_image, dataset, view, device, **options)
    images, labels, texts, image_of_text, _ = (x.to(device) for x in extracted)
    scores = None
    if classnames:
        templates = templates or TEMPLATES.get(dataset.name, TEMPLATES["default"])
        with evaluating(model), mixed_precision(options.get("dtype", "fp32"), device)[0]:
            weights = zeroshot_weights(model.encode_text, tokenizer, classnames, templates, device)
        features, labels = labelled(dataset, images, labels)
        scores = F.normalize(features, dim=1) @ weights.T, labels
    if len(texts):
        say_without("caption", dataset.name, len(images) - len(image_of_text.unique()), len(images))
    retrieval = recall(images, texts, image_of_text) if len(texts) else {}
    return scores, retrieval, images


def language_eval(model, tokenizer, dataset, view, device, max_images=MOST, **options):
    """Collective. -> with classes {"zeroshot_top1", "zeroshot_chance"}, with captions {"recall@1"
    (mean of both directions), "recall_chance"}, and rank_scores of the images. It takes a fixed
    subset (0: all). model: has encode_image and encode_text. options: those of extract_features."""
    names = None if what_classes_lack(dataset, words=True) else dataset.classes
    options |= {"classnames": names, "captions": dataset.captioned}
    options["indices"] = subset_indices(dataset, max_images)
    scores, retrieval, images = language_scores(model, tokenizer, dataset, view, device, **options)
    out = {}
    if scores:
        logits, labels = scores
        right = labels[:, None] == torch.arange(len(names), device=device)
        top1 = percent(hit_rank(logits, right) < 1)
        out = {"zeroshot_top1": top1, "zeroshot_chance": 100 / len(names)}
    if retrieval:
        both = retrieval["image_to_text_recall@1"] + retrieval["text_to_image_recall@1"]
        out |= {"recall@1": both / 2, "recall_chance": 100 / len(images)}
    return out | rank_scores(images)
