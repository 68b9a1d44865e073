"""ALIGN: Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision
(Jia et al. 2021, arXiv 2102.05918).

CLIP's two encoders, an EfficientNet and a BERT from scratch, on far more and far noisier data: 1.8
billion images with the alt-text that stood beside them, filtered by a few simple rules (Sec. 3).
Scale makes up for the noise.

Loss (Eq. 1 and 2), with I, T embeddings of unit length, temperature tau, label smoothing 0.1 over
the batch:
    L = CE(I T^T / tau, y') + CE(T I^T / tau, y'),  y' = 0.9 y + 0.1 / B,  chance level 2 ln B
B global batch, b = B / processes, N tokens, D width of an encoder, E of an embedding, S image size.

Laptop        torchrun align.py
1 GPU         torchrun align.py --data flickr8k
8 GPUs        torchrun --nproc_per_node=8 align.py --data cc3m
Own data      python align.py --data path/to/shards --filter-only --output-dir filtered
              torchrun align.py --data path/to/shards --keep filtered/kept.jsonl --recipe flickr8k

Google published neither code nor weights. Where the paper leaves something open, this file does
what coyo-align (kakaobrain) does, whose weights load from Hugging Face's AlignModel and go back
there (evaluation.weights.align_state). Differences:
 - EfficientNet-B7 and BERT-Base, coyo's pair and the paper's ablation (Sec. 6.1). The paper's
   headline is EfficientNet-L2 and BERT-Large.
 - Running statistics of batch norm move once a step, by the mean over all groups of 16 (coyo's
   groups, as on one TPU core each, Sec. 5). The small recipes normalise over the global batch.
 - BERT has no dropout. coyo's is 0.1; its draws would depend on the number of processes.
 - Images are shrunk with antialiasing, as Hugging Face does. coyo shrinks without.
 - Projections run under autocast, as all layers do. coyo computes them in float32.
 - tau >= 0.01, below the 1/64 where it ends. coyo has no bound, and small runs could pass 0.
 - --tokenizer train learns byte pairs, which spell any script. The paper has 100,000 word pieces.

Diff against: clip.py.
"""

import collections
import json
import math
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import UserError, all_gather, all_reduce_mean, checkpoint_blocks, init_distributed
from common import mixed_precision, sync_batchnorm, user_errors, world_size
from data import Loader, Tokenizer, decode, hflip, normalize, open_dataset, to_float
from layouts import Kept, refuse_unwritable, text_rows
from monitor import EvalView, bar, captions, language_eval, language_set
from run import Run, RunArgs, init_weights, parse_args, replace_text


# ---------------------------------------- arguments ----------------------------------------
@dataclass
class Args(RunArgs):
    data: str = "shapes"  # named dataset or path, see docs/data.md
    eval_data: str = ""  # dataset of the evaluation in the loop (default: the val split of --data)
    recipe: str = ""  # entry of RECIPES to use instead of the one named like --data
    filter_only: bool = False  # report what the filters drop from --data, write what stays, and end
    keep: str = ""  # the kept.jsonl of --filter-only: train on what is in it alone
    min_side: int = 200  # --filter-only drops images whose side is at most this, Sec. 3 (0: none)
    common_tokens: int = 100_000_000  # --filter-only: so many unigrams, bigrams are common (Sec. 3)
    arch: str = "efficientnet_b7"  # image encoder: a key of ARCHS
    embed_dim: int = 640  # width of the joint embedding, E, as B7's; others get a linear layer
    text_width: int = 768  # width of BERT, with heads of 64 (BERT-Base, Sec. 6.1)
    text_layers: int = 12  # blocks of BERT (BERT-Base, Sec. 6.1)
    context_length: int = 64  # tokens of a caption, start and end included (Sec. 5)
    tokenizer: str = "google-bert/bert-base-uncased"  # train, a tokenizer.json or a hub name
    vocab_size: int = 30522  # rows of the token table; at most so many with --tokenizer train
    temperature: float = 1.0  # tau at the start; it is trained (Sec. 5)
    label_smoothing: float = 0.1  # label smoothing over the global batch (Sec. 5)
    drop_connect: float = 0.2  # how often a branch is dropped, times b / n in block b of n
    bn_group: int = 16  # samples of a batch norm (0: all; coyo: 16), as a TPU core had (Sec. 5)
    bn_momentum: float = 0.01  # share of the last batch in the batch norm's mean; short runs: more
    image_size: int = 289  # side of an image in pixels, cropped from 346 (Sec. 5)
    epochs: int = 11  # passes over the data: 1.2 million steps of 1.8 billion pairs (Sec. 5)
    max_steps: int = 0  # stop after so many steps, without changing the schedule (0: run all of it)
    batch_size: int = 16384  # pairs of a step, over all processes and pieces (Sec. 5)
    accum_steps: int = 1  # encode a batch in so many pieces, exactly; needs a --bn-group
    grad_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute to save memory
    lr: float = 1e-3  # peak learning rate (Sec. 5)
    warmup_epochs: float = 0.091  # linear warm-up from 0: 10,000 steps (Sec. 5)
    optimizer: Literal["lamb", "adamw"] = "lamb"  # LAMB in the paper (Sec. 5)
    weight_decay: float = 1e-5  # on all but batch norms (Sec. 5, coyo)
    clip_grad: float = 0.0  # largest gradient norm (0: off, as in coyo)
    init: str = ""  # weights to start from: a run, released weights, a backbone (docs/init.md)
    freeze: Literal["", "image", "text"] = ""  # encoder that stays as --init left it
    seed: int = 0  # random seed of weights, order, crops and choice of captions
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on GPUs, else fp32


# LAMB and groups are for large batches, a momentum of 0.01 for long runs: not in small recipes
SMALL = dict(optimizer="adamw", lr=1e-3, bn_momentum=0.1, tokenizer="train", min_side=0)
SMALL |= dict(temperature=0.07, bn_group=0)
MICRO = dict(SMALL, arch="efficientnet_micro", text_width=128, embed_dim=128, context_length=32)
MICRO |= dict(batch_size=128, warmup_epochs=0.2, drop_connect=0.0)
# our choice for photos with several captions each: no published run trains on these alone
PHOTOS = dict(SMALL, arch="efficientnet_b0", text_width=256, text_layers=4, image_size=224)
PHOTOS |= dict(vocab_size=16384, epochs=30, batch_size=1024, warmup_epochs=2.0)
# The networks of the ablation on CC3M (Sec. 6.2), a tenth of the steps of the others: 100,000. Its
# recall@1 on COCO is 22.1 and 17.3. coyo, which reaches 21.2 and 17.0, has lr 5e-3.
MINI = dict(arch="efficientnet_b3", text_width=256, text_layers=4, accum_steps=8)
RECIPES = {
    "shapes": dict(MICRO, image_size=64, vocab_size=1024, text_layers=2, epochs=2),
    "flickr8k": dict(MICRO, image_size=112, vocab_size=4096, text_layers=3, epochs=30),
    "flickr30k": PHOTOS,
    "coco": PHOTOS,
    "cc3m": dict(MINI, epochs=580, warmup_epochs=58),
    # our choice, some 40,000 to 55,000 steps: no published run trains on these alone
    "cc12m": dict(MINI, epochs=60, warmup_epochs=6),
    "yfcc15m": dict(MINI, epochs=60, warmup_epochs=6),
    "redcaps": dict(MINI, epochs=60, warmup_epochs=6),
}
RECIPES |= dict.fromkeys(("multi30k-en", "multi30k-de", "multi30k-fr", "multi30k-cs"), PHOTOS)


# ---------------------------------------- augmentation ----------------------------------------
def squash(image, size):
    """uint8 (3, H, W) -> uint8 (3, size, size), whatever its aspect was."""
    return F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]


class AlignView:
    """Squashed to 346 / 289 of the size, then a crop of it, flipped half of the time; in [-1, 1]
    (Sec. 5)."""

    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, size):
        self.size = size
        self.full = round(size * 346 / 289)

    def crop(self, image, rng):
        """In a loader worker: uint8 (3, H, W) -> uint8 (3, size, size). rng: random.Random."""
        most = self.full - self.size
        top, left = rng.randint(0, most), rng.randint(0, most)
        image = squash(image, self.full)
        return image[:, top : top + self.size, left : left + self.size]

    def sample(self, rng):
        """In a loader worker: what else is random about this sample. depth: see DropConnect."""
        flip = rng.random() < 0.5
        depth = torch.tensor([rng.random() for _ in range(64)])  # B7, the deepest, has 55 blocks
        return {"flip": flip, "depth": depth}

    def __call__(self, x, params):
        """For a batch: uint8 (b, 3, size, size) and stacked parameters -> normalised float."""
        x = hflip(to_float(x), params["flip"])
        return normalize(x, self.mean, self.std)


class AlignEvalView(EvalView):
    """Squashed to the same size, then the central crop (Sec. 5)."""

    def crop(self, image, rng=None):
        """In a loader worker: uint8 (3, H, W) -> uint8 (3, S, S)."""
        first = (self.resize - self.size) // 2
        last = first + self.size
        return squash(image, self.resize)[:, first:last, first:last]


def eval_view(args) -> EvalView:
    view = AlignView(args.image_size)
    return AlignEvalView(args.image_size, view.full, "bilinear", view.mean, view.std)


# ---------------------------------------- data filters ----------------------------------------
class Picture(NamedTuple):
    """What the filters look at."""

    index: int  # of the sample in its dataset
    key: str
    size: tuple | None  # (width, height), None for a text alone
    hash: int  # see image_hash
    captions: list


# accents and vowel signs stand within the words of Hindi, Tamil or Arabic, but are not \w
MARKS = "".join(c for c in map(chr, range(0x10000)) if unicodedata.category(c)[0] == "M")
MARKS += "\u200c\u200d"  # joiners, as in Persian
CHINESE = r"\u3040-\u30ff\u3400-\u9fff"  # and Japanese
WORD = re.compile(rf"[{CHINESE}]|[^\W{CHINESE}]+(?:[{MARKS}]+[^\W{CHINESE}]*)*")


def unigrams(caption):
    """Words in lower case; a Chinese or Japanese character is one: these scripts have no spaces."""
    return WORD.findall(unicodedata.normalize("NFC", caption.lower()))


def grams(caption):
    """Unigrams and bigrams."""
    words = unigrams(caption)
    bigrams = [f"{a} {b}" for a, b in zip(words, words[1:])]
    return words + bigrams


def image_hash(image):
    """Perceptual hash of a uint8 (3, H, W) image, 64 bits: is a cell of 8 x 8 brighter than that to
    its left? Copies that were scaled or compressed again differ in few bits. The paper has a
    network for similarity in its place."""
    grey = image.float().mean(0)
    cells = F.interpolate(grey[None, None], (8, 9), mode="area")[0, 0]
    brighter = cells[:, 1:] > cells[:, :-1]
    return sum(1 << i for i, bit in enumerate(brighter.flatten().tolist()) if bit)


def filter_rules(pictures, test_hashes=(), min_side=200, common_tokens=100_000_000):
    """The paper's filters (Sec. 3) -> {name: function of (picture, caption), true: drop the pair}.
    Counts are those of these pictures. test_hashes: of the test sets' images. The paper drops
    pornography too."""
    images = collections.Counter()  # caption -> number of images that have it
    count = collections.Counter()  # unigram or bigram -> number of times it stands in a caption
    for picture in pictures:
        images.update(set(picture.captions))
        for caption in picture.captions:
            count.update(grams(caption))
    common = count
    if len(count) > common_tokens:
        common = {gram for gram, _ in count.most_common(common_tokens)}
    near = set()  # indices of pictures that look like a test image
    for picture in pictures:
        if any((picture.hash ^ test).bit_count() <= 4 for test in test_hashes):
            near.add(picture.index)
    return {
        f"image side of {min_side} or less": lambda p, _: p.size and min(p.size) <= min_side,
        "image aspect of 3 or more": lambda p, _: p.size and max(p.size) >= 3 * min(p.size),
        "image with over 1000 texts": lambda p, _: len(p.captions) > 1000,
        "image close to a test image": lambda p, _: p.index in near,
        "text of over 10 images": lambda _, text: images[text] > 10,
        "text of under 3 words": lambda _, text: len(unigrams(text)) < 3,
        "text of over 20 words": lambda _, text: len(unigrams(text)) > 20,
        "text with a rare word or pair": lambda _, text: any(g not in common for g in grams(text)),
    }


def read_pictures(dataset):
    """Pictures of a dataset; what is broken is left out, and the caller says how many are."""
    for index in bar(range(len(dataset)), f"pictures of {dataset.name}"):
        try:
            sample = dataset[index]
            image = decode(sample.image)
        except (ValueError, OSError):
            continue
        _, height, width = image.shape
        yield Picture(index, sample.key, (width, height), image_hash(image), sample.captions)


def filter_data(args):
    """--filter-only: says what each rule drops, with examples, and writes kept.jsonl: a line for
    each picture that keeps a text. A pair that several rules drop counts for the first."""
    kept = Path(args.output_dir or "filtered", "kept.jsonl")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("--filter-only is work for one process: start it with python align.py")
    if args.keep:
        raise UserError("--filter-only reads all of --data: leave --keep out")
    refuse_unwritable(kept)
    texts, tests, hashes = text_rows(args.data), [], []
    if texts is not None:
        pictures = [Picture(i, key, None, 0, [text]) for i, key, text in texts]
    else:
        dataset = open_dataset(args.data, args.data_dir)
        try:
            part = "train" if os.path.isfile(args.eval_data) else "test"  # a file is one split
            tests = open_dataset(args.eval_data or args.data, args.data_dir, part)
        except UserError:
            if args.eval_data:  # --data need not have a test split
                raise
        else:
            hashes = [picture.hash for picture in read_pictures(tests)]
        pictures = list(read_pictures(dataset))
        compared = f"compared with {len(hashes)} of {len(tests)} test images"
        print(f"{len(pictures)} of {len(dataset)} pictures read, {compared}")
    pairs = sum(len(picture.captions) for picture in pictures)
    if not pairs:
        raise UserError(f"--data {args.data} has no captions to filter, or no readable picture")
    rules = filter_rules(pictures, hashes, args.min_side, args.common_tokens)
    dropped, rows, left = {name: [] for name in rules}, [], 0
    for picture in pictures:
        stay = []
        for text in picture.captions:
            for name, drops in rules.items():
                if drops(picture, text):
                    dropped[name].append(text)
                    break
            else:
                stay.append(text)
        if stay:
            rows.append({"index": picture.index, "key": picture.key, "captions": stay})
            left += len(stay)
    kept.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    replace_text(kept, "".join(lines).encode(errors="backslashreplace").decode())  # odd file names
    for name, found in dropped.items():
        print(f"{name}: {len(found)} of {pairs} pairs ({len(found) / pairs:.1%})")
        for text in found[:: max(1, len(found) // 3)][:3]:
            print(f"    {text[:100]}")
    where = f"at {len(rows)} of {len(pictures)} images"
    print(f"{left} pairs stay ({left / pairs:.1%}), {where}: {kept}")


# ---------------------------------------- backbone ----------------------------------------
class DropConnect(nn.Module):
    """Drops the residual branch of a block for some samples. draws, (B, blocks) in [0, 1), come
    with the samples from the loader, so that they are the same for any number of processes."""

    def __init__(self, p, block):
        super().__init__()
        self.p = p
        self.block = block
        self.draws = None

    def forward(self, x):
        """(B, D, H, W) -> the same shape, 0 for the samples that are dropped."""
        if not self.training or self.draws is None:
            return x
        stays = self.draws[:, self.block] >= self.p
        scale = stays.to(x) / (1 - self.p)
        return x * scale.view(-1, 1, 1, 1)


def pad_as_tensorflow(conv, inputs):
    """A hook before a convolution of stride 2: like TensorFlow, it pads one pixel more
    on the right and below than on the left and above."""
    (x,) = inputs
    side = conv.kernel_size[0] // 2
    left, right, top, bottom = side - 1, side, side - 1, side
    return F.pad(x, (left, right, top, bottom))


# Adapted from moco.py: GroupBatchNorm, whole groups alone, one step of statistics for all pieces
class GroupBatchNorm(nn.BatchNorm2d):
    """Batch norm over every `group` samples that follow each other: those of a TPU core, as
    in coyo. Parameter names stay. Running statistics wait for update_statistics."""

    group = 16
    seen = 0.0  # means, variances and number of the forward passes of this step, summed

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        parts = []
        for i, part in enumerate(x.split(self.group)):
            share = 1 / (i + 1)  # of this group, so that mean and var become means over the groups
            options = dict(training=True, momentum=share, eps=self.eps)
            parts.append(F.batch_norm(part, mean, var, self.weight, self.bias, **options))
        if torch.is_grad_enabled():  # replay_backward encodes a piece once more, without gradient
            self.seen = self.seen + torch.stack([mean, var, torch.ones_like(mean)])
        return torch.cat(parts)


# Copied from moco.py: group_batchnorm
def group_batchnorm(model, group):
    """Makes every batch norm of `model` use statistics of `group` samples."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = GroupBatchNorm  # parameters and buffers stay, forward() is another
            module.group = group
    return model


@torch.no_grad()
def update_statistics(model):
    """Running statistics move toward the mean over all groups of the step, of all pieces and
    processes. They take no part in training, so once a step is enough."""
    for module in model.modules():
        if torch.is_tensor(getattr(module, "seen", None)):  # a frozen one saw no batch
            mean, var, passes = all_reduce_mean(module.seen)
            module.running_mean.lerp_(mean / passes, module.momentum)
            module.running_var.lerp_(var / passes, module.momentum)
            module.num_batches_tracked += 1
            module.seen = 0.0


class EfficientNet(torchvision.models.EfficientNet):
    """torchvision's up to the mean of the last block (no 1x1 convolution after it), with
    TensorFlow's batch norm, padding and initialisation. (B, 3, S, S) -> (B, D). width, depth:
    multipliers of B0."""

    # expansion, kernel, stride, channels in and out, layers (EfficientNet, Table 1)
    b0 = (
        (1, 3, 1, 32, 16, 1),
        (6, 3, 2, 16, 24, 2),
        (6, 5, 2, 24, 40, 2),
        (6, 3, 2, 40, 80, 3),
        (6, 5, 1, 80, 112, 3),
        (6, 5, 2, 112, 192, 4),
        (6, 3, 1, 192, 320, 1),
    )

    def __init__(self, width, depth, drop_connect=0.2, stages=b0, momentum=0.01):
        MBConv = torchvision.models.efficientnet.MBConv
        MBConvConfig = torchvision.models.efficientnet.MBConvConfig

        def batch_norm(channels):
            return nn.BatchNorm2d(channels, eps=1e-3, momentum=momentum)

        config = [MBConvConfig(*stage, width, depth) for stage in stages]
        super().__init__(config, 0.0, drop_connect, norm_layer=batch_norm)
        self.dim = self.features[-1][0].in_channels
        del self.features[-1], self.avgpool, self.classifier
        blocks = [module for module in self.modules() if isinstance(module, MBConv)]
        for i, block in enumerate(blocks):
            block.stochastic_depth = DropConnect(block.stochastic_depth.p, i)
        for conv in self.modules():
            if not isinstance(conv, nn.Conv2d):
                continue
            if conv.groups > 1:  # depthwise: coyo's standard deviation, 8 to 62 times torchvision's
                k = conv.kernel_size[0]
                nn.init.normal_(conv.weight, std=(2 / (k * k)) ** 0.5)
            if conv.stride == (2, 2):
                conv.padding = (0, 0)
                conv.register_forward_pre_hook(pad_as_tensorflow)

    def forward(self, x):
        return self.features(x).mean((2, 3))


class BERT(nn.Module):
    """(B, N <= context_length) token ids, 0 after the end token -> (B, D), the output for the first
    token, [CLS] (Sec. 4.1)."""

    def __init__(self, context_length, vocab_size, width, layers):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, width)
        self.position_embeddings = nn.Embedding(context_length, width)
        self.token_type_embeddings = nn.Embedding(2, width)  # the second is never used
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList()
        options = dict(dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True)
        for _ in range(layers):
            layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, **options)
            self.layers.append(layer)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.trunc_normal_(p, std=0.02, a=-0.04, b=0.04)  # as TensorFlow cuts it
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, text):
        later = text.flip(1).cumsum(1).flip(1)  # sum of this id and those behind it
        padding = later == 0  # a 0 before the end token is a token: an end token is never 0
        positions = self.position_embeddings.weight[: text.shape[1]]
        token_type = self.token_type_embeddings.weight[0]
        x = self.norm(self.word_embeddings(text) + positions + token_type)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return x[:, 0]


# ---------------------------------------- model ----------------------------------------
class ALIGN(nn.Module):
    """visual: an EfficientNet; text: a BERT of this width."""

    def __init__(self, embed_dim, visual, text, text_width, temperature=1.0):
        super().__init__()
        self.visual = visual
        self.text = text
        self.text_projection = nn.Linear(text_width, embed_dim)  # to the image's width (Sec. 4.1)
        self.image_projection = nn.Identity()
        if visual.dim != embed_dim:  # as in the ablation (Sec. 6.1)
            self.image_projection = nn.Linear(visual.dim, embed_dim)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))  # tau
        for module in (self.text_projection, self.image_projection):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def encode_image(self, image):
        """(B, 3, S, S) -> (B, E), not normalised."""
        return self.image_projection(self.visual(image))

    def encode_text(self, text):
        """(B, N <= context_length) token ids, 0 after the end token -> (B, E), not normalised."""
        return self.text_projection(self.text(text))

    def forward(self, image, text, depth=None):
        """depth: (B, blocks) in [0, 1), see DropConnect."""
        for module in self.visual.modules():
            if isinstance(module, DropConnect):
                module.draws = depth
        return self.encode_image(image), self.encode_text(text)


class LAMB(torch.optim.Optimizer):
    """Adam whose step of each tensor is as long as the tensor times lr (arXiv 1904.00962, Algorithm
    2, as in tensorflow-addons).

    r = m / (sqrt(v) + eps) + weight_decay p, with Adam's m and v; p -= lr r |p| / |r| (lr r if a
    norm is 0). A parameter group with exclude=True (batch norms) is not scaled. step() takes no
    closure."""

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, exclude=False)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)

    def update(self, p, group):
        beta1, beta2 = group["betas"]
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["m"] = torch.zeros_like(p)
            state["v"] = torch.zeros_like(p)
        state["step"] += 1
        t = state["step"].item()
        m = state["m"].lerp_(p.grad, 1 - beta1)
        v = state["v"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        r = m_hat / (v_hat.sqrt() + group["eps"]) + group["weight_decay"] * p
        if not group["exclude"]:
            p_norm, r_norm = p.norm(), r.norm()
            scale = torch.where((p_norm > 0) & (r_norm > 0), p_norm / r_norm, 1.0)
            r = r * scale
        p.sub_(r, alpha=group["lr"])


ARCHS = {  # width and depth (micro: our own)
    "efficientnet_micro": (0.5, 0.5),
    "efficientnet_b0": (1.0, 1.0),
    "efficientnet_b1": (1.0, 1.1),
    "efficientnet_b2": (1.1, 1.2),
    "efficientnet_b3": (1.2, 1.4),
    "efficientnet_b4": (1.4, 1.8),
    "efficientnet_b5": (1.6, 2.2),
    "efficientnet_b6": (1.8, 2.6),
    "efficientnet_b7": (2.0, 3.1),
}


def build_model(args) -> ALIGN:
    """Raises UserError for an unknown --arch and for sizes that do not fit together."""
    if args.arch not in ARCHS:
        names = ", ".join(ARCHS)
        raise UserError(f"--arch {args.arch} is unknown, choose one of {names}")
    text_width = args.text_width
    if text_width % 64:
        raise UserError(f"--text-width {text_width} is not a multiple of 64, the width of a head")
    if args.image_size < 32:
        raise UserError(f"--image-size {args.image_size} is too small, use at least 32")
    width, depth = ARCHS[args.arch]
    visual = EfficientNet(width, depth, args.drop_connect, momentum=args.bn_momentum)
    text = BERT(args.context_length, args.vocab_size, text_width, args.text_layers)
    return ALIGN(args.embed_dim, visual, text, text_width, args.temperature)


def image_encoder(model: ALIGN) -> nn.Module:
    """Module from images to pooled features (B, D), before the projection."""
    return model.visual


# ---------------------------------------- loss ----------------------------------------
# Adapted from clip.py: clip_loss, the sum of both directions, smoothed labels, tau divides
def align_loss(image_embed, text_embed, temperature, label_smoothing=0.1):
    """Normalised softmax loss (Eq. 1 + Eq. 2) over the global batch, in nats; chance level 2 ln B.

    image_embed, text_embed: (b, E) of this process, any length; temperature: tau, a number or 0-dim
    tensor. Call it outside autocast, whose products are in half precision. Returns the mean over
    this process's rows: the mean over processes is the loss of the global batch, over all of whose
    columns labels are smoothed. Memory grows with b x B."""
    image = F.normalize(image_embed.float(), dim=-1)  # (b, E)
    text = F.normalize(text_embed.float(), dim=-1)
    all_image, all_text = all_gather(image), all_gather(text)  # (B, E)
    b, first = len(image), 0
    if len(all_image) > b:
        first = b * torch.distributed.get_rank()
    labels = torch.arange(first, first + b, device=image.device)
    to_text = image @ all_text.T / temperature  # (b, B)
    to_image = text @ all_image.T / temperature
    loss_image = F.cross_entropy(to_text, labels, label_smoothing=label_smoothing)
    loss_text = F.cross_entropy(to_image, labels, label_smoothing=label_smoothing)
    return loss_image + loss_text


# ---------------------------------------- training ----------------------------------------
# Copied from clip.py: replay_backward
def replay_backward(model: nn.Module, encode, loss_of, pieces: list, scaler) -> tuple:
    """Exact gradient of a loss over a batch whose activations exceed the memory (GradCache, arXiv
    2101.06983).

    The features of all pieces are computed without graph; the loss sees all of them and gives
    their gradient; then each piece is encoded again to carry that gradient into the encoder.
    pieces: tuples of inputs; encode(*piece) -> tuple of (b, ...) tensors; loss_of(*features) ->
    (loss, anything), which is returned. Needs an encoder without dropout whose pieces do not see
    each other, and a `model` without DDP: gradients are averaged over the processes here."""
    with torch.no_grad():
        encoded = [encode(*piece) for piece in pieces]
    features = []  # of the whole batch, in the order in which encode() returns them
    for parts in zip(*encoded):
        features.append(torch.cat(parts).requires_grad_())
    loss, terms = loss_of(*features)
    scaler.scale(loss).backward()
    first = 0
    for piece in pieces:
        outputs = encode(*piece)
        last = first + len(outputs[0])
        learned = [x for x in outputs if x.requires_grad]  # not those of a frozen encoder
        grads = [f.grad[first:last] for x, f in zip(outputs, features) if x.requires_grad]
        torch.autograd.backward(learned, grads)
        first = last
    if world_size() > 1:
        for p in model.parameters():
            if p.grad is not None:
                p.grad = all_reduce_mean(p.grad)
    return loss, terms


def train(args: Args) -> dict:
    """Trains and returns the last evaluation. Raises UserError for mistakes the user can fix."""
    device = init_distributed(args.device)
    torch.manual_seed(args.seed)
    autocast, scaler = mixed_precision(args.dtype, device)
    b = args.batch_size // world_size()
    if args.bn_group == 1:
        raise UserError("--bn-group 1 leaves batch norm nothing to average: use at least 2, or 0")
    if args.accum_steps > 1 and not args.bn_group:
        raise UserError("--accum-steps cannot be exact if batch norm sees all: add --bn-group 16")
    if b % (args.accum_steps * (args.bn_group or 1)):
        pieces = f"--accum-steps {args.accum_steps} pieces of whole --bn-group {args.bn_group}"
        raise UserError(f"{pieces} do not fit in the {b} samples of a process")

    # data
    dataset = open_dataset(args.data, args.data_dir)
    if args.keep:
        dataset = Kept(dataset, args.keep)
    val = language_set(args)
    source = captions(dataset) if args.tokenizer == "train" else None
    vocab_size = args.vocab_size
    tokenizer = Tokenizer(args.tokenizer, args.context_length, source, vocab_size, args.data_dir)
    views = {"image": AlignView(args.image_size)}
    texts = {"text": tokenizer}
    loader = Loader(dataset, views, texts, args.batch_size, args.seed, args.workers, device)

    # model and optimizer
    model = build_model(args)
    if args.bn_group:
        model = group_batchnorm(model, args.bn_group)
    else:
        model = sync_batchnorm(model, device)
    model = model.to(device, memory_format=torch.channels_last)
    init_weights(model, args, tokenizer)
    checkpoint_blocks(model, args.grad_checkpointing, nn.TransformerEncoderLayer)
    if args.compile:
        model.compile()
    norms = set()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            norms |= {id(p) for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]  # all but those of --freeze
    decay = [p for p in trained if id(p) not in norms]  # biases, layer norms and tau too (coyo)
    no_decay = [p for p in trained if id(p) in norms]
    groups = [
        {"params": decay, "weight_decay": args.weight_decay},
        {"params": no_decay, "weight_decay": 0.0, "exclude": True},
    ]
    if args.optimizer == "lamb":
        optimizer = LAMB(groups, lr=args.lr)
    else:
        optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)

    # run directory; continues from its checkpoint if it has one
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = Run("align", args, loader, state, {"tokenizer": tokenizer.to_json()})
    warmup = round(args.warmup_epochs * loader.steps_per_epoch)
    wrap = world_size() > 1 and args.accum_steps == 1  # replay_backward averages by itself
    ddp = DistributedDataParallel(model) if wrap else model
    chance = 2 * math.log(args.batch_size)

    def encode(image, text, depth):
        with autocast:
            return ddp(image, text, depth)

    def loss_of(image_embed, text_embed):
        loss = align_loss(image_embed, text_embed, model.temperature, args.label_smoothing)
        return loss, {"loss": (loss, chance)}

    if val and not run.evaluation and run.due(args.eval_every):  # random weights, or one cut off
        run.log_evaluation(language_eval(model, tokenizer, val, eval_view(args), device))

    for step, batch in run.batches():
        depth = batch["params"]["image"]["depth"]  # see DropConnect
        inputs = batch["image"], batch["text"], depth
        rise = step / warmup if warmup else 1.0  # linear from 0, then linear to 0 (Sec. 5)
        fall = (run.total - step) / max(1, run.total - warmup)
        lr = args.lr * min(rise, fall)
        for group in optimizer.param_groups:
            group["lr"] = lr

        if args.accum_steps == 1:
            loss, terms = loss_of(*encode(*inputs))
            scaler.scale(loss).backward()
        else:
            pieces = list(zip(*[x.chunk(args.accum_steps) for x in inputs]))
            loss, terms = replay_backward(model, encode, loss_of, pieces, scaler)
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        update_statistics(model)
        with torch.no_grad():
            model.temperature.clamp_(min=0.01)

        run.end_step(terms, temperature=model.temperature.detach(), lr=lr)
        if run.agree_to_stop() or run.due(args.save_every, args.keep_every):
            run.save()
        if val and run.due(args.eval_every):
            run.log_evaluation(language_eval(model, tokenizer, val, eval_view(args), device))

    return run.finish("zeroshot", val)


if __name__ == "__main__":
    with user_errors():
        args = parse_args(Args, RECIPES)
        if args.filter_only:
            filter_data(args)
        else:
            train(args)
