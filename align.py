"""ALIGN: Scaling Up Visual and Vision-Language Learning With Noisy Text (Jia et al. 2021, arXiv 2102.05918).

CLIP's two encoders, an EfficientNet and a BERT from scratch, on far more and far noisier data: 1.8 billion
images with the alt-text that stood beside them, filtered by frequency alone. Scale makes up for the noise.

Loss (Eq. 1 and 2), with I, T embeddings of unit length, temperature tau, label smoothing 0.1 over the batch:
    L = CE(I T^T / tau, y') + CE(T I^T / tau, y'),  y' = 0.9 y + 0.1 / B,  chance level 2 ln B
B global batch, b = B / processes, N tokens, D width of an encoder, E of an embedding, S image size.

Laptop        torchrun align.py
1 GPU         torchrun align.py --data flickr8k
8 GPUs        torchrun --nproc_per_node=8 align.py --data cc3m
Own data      python align.py --data path/to/shards --filter-only --output-dir filtered
              torchrun align.py --data path/to/shards --keep filtered/kept.jsonl

Google published neither code nor weights. What the paper leaves open follows coyo-align (kakaobrain), whose
weights load from Hugging Face's AlignModel and go back there (evaluation.weights.align_state). Differences:
 - EfficientNet-B7 and BERT-Base, coyo's pair. The paper's headline is EfficientNet-L2 and BERT-Large.
 - Batch norm is over the global batch. coyo: groups of 16, as on one TPU core each.
 - No dropout in BERT (coyo: 0.1), whose draws would depend on the number of processes. The paper names none.
 - Images are shrunk with antialiasing, as Hugging Face does. coyo: without.
 - tau >= 0.01, far below the 1/64 where it ends. coyo: no bound, and small runs could pass 0.
 - --tokenizer train learns byte pairs, which spell any script. Paper: 100,000 word pieces of its texts.

Diff against: clip.py.
"""

import collections
import contextlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import UserError, all_gather, init_distributed, mixed_precision, sync_batchnorm
from common import user_errors, world_size
from data import Loader, Tokenizer, decode, hflip, normalize, open_dataset, to_float
from monitor import EvalView, bar, captions, evaluation_set, language_eval
from run import Run, RunArgs, parse_args
from sources import IMAGE_KEYS


# -------------------------------------------- arguments --------------------------------------------
@dataclass
class Args(RunArgs):
    data: str = "shapes"  # named dataset or path, see docs/data.md
    eval_data: str = ""  # dataset of the evaluation in the loop (default: the val split of --data)
    recipe: str = ""  # entry of RECIPES to use instead of the one named like --data
    filter_only: bool = False  # report what the filters drop from --data, write what stays, and end
    keep: str = ""  # the kept.jsonl of --filter-only: train on what is in it alone
    min_side: int = 200  # filters drop images whose shorter side is not longer than this (0: none)
    common_tokens: int = 100_000_000  # so many most frequent unigrams and bigrams count as common
    arch: str = "efficientnet_b7"  # image encoder: a key of ARCHS
    embed_dim: int = 640  # width of the joint embedding, E, as B7's; others get a linear layer
    text_width: int = 768  # width of BERT, with heads of 64
    text_layers: int = 12  # blocks of BERT
    context_length: int = 64  # tokens of a caption, start and end included (coyo)
    tokenizer: str = "google-bert/bert-base-uncased"  # train, a tokenizer.json or a hub name
    vocab_size: int = 30522  # rows of the token table; at most so many with --tokenizer train
    temperature: float = 1.0  # tau at the start, which is trained
    label_smoothing: float = 0.1  # label smoothing over the global batch
    drop_connect: float = 0.2  # how often the last block's branch is dropped, rising from 0
    bn_momentum: float = 0.01  # share of the last batch in the batch norm's mean; short runs: more
    image_size: int = 289  # side of an image in pixels, cropped from 346
    epochs: int = 11  # passes over the data: 1.2 million steps of 1.8 billion pairs
    max_steps: int = 0  # stop after so many steps, without changing the schedule (0: run all of it)
    batch_size: int = 16384  # pairs of a step, over all processes
    accum_steps: int = 1  # more is refused: batch norm and negatives need the whole batch
    optimizer: Literal["lamb", "adamw"] = "lamb"  # LAMB in the paper
    lr: float = 1e-3  # peak learning rate
    warmup_epochs: float = 0.091  # linear warm-up from 0: 10,000 steps
    weight_decay: float = 1e-5  # weight decay of everything but batch norms
    clip_grad: float = 0.0  # largest gradient norm (0: off, as in coyo)
    seed: int = 0  # random seed of weights, order, crops and choice of captions
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on GPUs, else fp32


SMALL = dict(text_width=128, embed_dim=128, context_length=32, tokenizer="train", arch="efficientnet_micro")
SMALL |= dict(batch_size=128, warmup_epochs=0.2, temperature=0.07, drop_connect=0.0, min_side=0)
SMALL |= dict(optimizer="adamw", lr=1e-3, bn_momentum=0.1)  # LAMB is for large batches, 0.01 for long runs
RECIPES = {
    "shapes": dict(SMALL, image_size=64, vocab_size=1024, text_layers=2, epochs=2),
    "flickr8k": dict(SMALL, image_size=112, vocab_size=4096, text_layers=3, epochs=30),
    # the paper's ablation, a tenth of the steps: COCO recall@1 22.1 and 17.3 there; coyo has lr 5e-3
    "cc3m": dict(arch="efficientnet_b3", text_width=256, text_layers=4, epochs=580, warmup_epochs=58),
}


# -------------------------------------------- augmentation --------------------------------------------
def squash(image, size):
    """uint8 (3, H, W) -> uint8 (3, size, size), whatever its aspect was."""
    return F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]


class AlignView:
    """Squashed to 346 / 289 of the size, then a crop of it, flipped half of the time; in [-1, 1]."""

    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, size):
        self.size, self.full = size, round(size * 346 / 289)

    def crop(self, image, rng):
        """In a loader worker: uint8 (3, H, W) -> uint8 (3, size, size). rng: random.Random."""
        top, left = rng.randint(0, self.full - self.size), rng.randint(0, self.full - self.size)
        return squash(image, self.full)[:, top : top + self.size, left : left + self.size]

    def sample(self, rng):
        """In a loader worker: what else is random about this sample. depth: see DropConnect."""
        return {"flip": rng.random() < 0.5, "depth": torch.tensor([rng.random() for _ in range(64)])}

    def __call__(self, x, params):
        """On the device: uint8 (b, 3, size, size) and the stacked parameters -> normalised float."""
        return normalize(hflip(to_float(x), params["flip"]), self.mean, self.std)


class AlignEvalView(EvalView):
    def crop(self, image, rng=None):
        first = (self.resize - self.size) // 2
        return squash(image, self.resize)[:, first : first + self.size, first : first + self.size]


def eval_view(args) -> EvalView:
    return AlignEvalView(args.image_size, AlignView(args.image_size).full, "bilinear", *[AlignView.mean] * 2)


class Picture(NamedTuple):
    """What the filters look at. size: (width, height) or None for a text alone; hash: see image_hash."""

    index: int
    key: str
    size: tuple | None
    hash: int
    captions: list


def unigrams(caption):
    """Words in lower case; a Chinese or Japanese character is one, as these scripts have no spaces."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", caption.lower())


def grams(caption):
    """Unigrams and bigrams."""
    words = unigrams(caption)
    return words + [f"{a} {b}" for a, b in zip(words, words[1:])]


def image_hash(image):
    """Perceptual hash of a uint8 (3, H, W) image, 64 bits: is a cell of 8 x 8 brighter than that to its left.
    Copies that were scaled or compressed again differ in few bits. Paper: a network for similarity."""
    grey = F.interpolate(image.float().mean(0)[None, None], (8, 9), mode="area")[0, 0]
    return sum(1 << i for i, bit in enumerate((grey[:, 1:] > grey[:, :-1]).flatten().tolist()) if bit)


def filter_rules(pictures, test_hashes=(), min_side=200, common_tokens=100_000_000):
    """The paper's filters (Sec. 3) -> {name: function of (picture, caption), true: drop the pair}. Counts are
    those of these pictures. test_hashes: of the test sets' images. The paper drops pornography too."""
    images, count = collections.Counter(), collections.Counter()
    for picture in pictures:
        images.update(set(picture.captions))
        count.update(gram for caption in picture.captions for gram in grams(caption))
    common = {gram for gram, _ in count.most_common(common_tokens)} if len(count) > common_tokens else count
    near = {p.index for p in pictures if any((p.hash ^ test).bit_count() <= 4 for test in test_hashes)}
    return {
        f"image side of {min_side} or less": lambda p, _: p.size and min(p.size) <= min_side,
        "image aspect of 3 or more": lambda p, _: p.size and max(p.size) >= 3 * min(p.size),
        "image with over 1000 texts": lambda p, _: len(p.captions) > 1000,
        "image close to a test image": lambda p, _: p.index in near,
        "text of over 10 images": lambda _, text: images[text] > 10,
        "text of under 3 words": lambda _, text: len(unigrams(text)) < 3,
        "text of over 20 words": lambda _, text: len(unigrams(text)) > 20,
        "text with a rare word or pair": lambda _, text: not all(gram in common for gram in grams(text)),
    }


def read_texts(path):
    """Pictures, without an image, of a .tsv with lines of key and text; None if it is another."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        if path.endswith(".tsv") and not {*file.readline(10_000).strip().split("\t")} & {*IMAGE_KEYS}:
            file.seek(0)
            lines = enumerate(line.rstrip("\r\n").partition("\t") for line in file)
            return [Picture(i, key, None, 0, [text]) for i, (key, tab, text) in lines if tab]
    return None


def read_pictures(dataset):
    """Pictures of a dataset; what is broken is left out."""
    for index in bar(range(len(dataset)), f"pictures of {dataset.name}"):
        with contextlib.suppress(ValueError, OSError):
            sample = dataset[index]
            image = decode(sample.image)
            yield Picture(index, sample.key, tuple(image.shape[:0:-1]), image_hash(image), sample.captions)


def filter_data(args):
    """--filter-only: says what each rule drops, with examples, and writes kept.jsonl: a line per picture that
    keeps a text. A pair that several rules drop counts for the first."""
    kept = Path(args.output_dir or "filtered", "kept.jsonl")
    if kept.exists():
        raise UserError(f"{kept} is there already: remove it, or choose another --output-dir")
    pictures, hashes = read_texts(args.data), []
    if pictures is None:
        dataset, test = open_dataset(args.data, args.data_dir), args.eval_data or args.data
        with contextlib.suppress(*() if args.eval_data else (UserError,)):  # not all data has a test split
            hashes = [p.hash for p in read_pictures(open_dataset(test, args.data_dir, "test"))]
        pictures = list(read_pictures(dataset))
        print(f"{len(pictures)} of {len(dataset)} pictures read, compared with {len(hashes)} test images")
    if not (pairs := sum(len(picture.captions) for picture in pictures)):
        raise UserError(f"--data {args.data} has no captions to filter, or no pictures that can be read")
    rules = filter_rules(pictures, hashes, args.min_side, args.common_tokens)
    dropped, rows = {name: [] for name in rules}, []
    for picture in pictures:
        stay = []
        for text in picture.captions:
            rule = next((name for name, drops in rules.items() if drops(picture, text)), None)
            (dropped[rule] if rule else stay).append(text)
        rows += [{"index": picture.index, "key": picture.key, "captions": stay}] if stay else []
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    for name, found in dropped.items():
        some = "".join(f"\n    {text[:100]}" for text in found[:: len(found) // 3 + 1])
        print(f"{name}: {len(found)} of {pairs} pairs ({len(found) / pairs:.1%}){some}")
    left = pairs - sum(map(len, dropped.values()))
    print(f"{left} pairs stay ({left / pairs:.1%}), at {len(rows)} of {len(pictures)} images: {kept}")


class Kept:
    """The samples of a dataset that a kept.jsonl names, with the captions that it keeps."""

    def __init__(self, dataset, path):
        try:
            self.rows = [json.loads(line) for line in Path(path).read_text("utf-8").strip().split("\n")]
            for row in (self.rows[0], self.rows[-1]):
                if Path(dataset[row["index"]].key).name != Path(row["key"]).name:
                    raise ValueError("another picture")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"--keep {path} names no picture of {dataset.name}, see --filter-only") from error
        self.dataset, self.name, self.classes, self.captioned = dataset, dataset.name, dataset.classes, True

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.dataset[self.rows[i]["index"]]._replace(captions=self.rows[i]["captions"])


# -------------------------------------------- backbone --------------------------------------------
class DropConnect(nn.Module):
    """Drops the residual branch of a block for some samples. draws, (B, blocks) in [0, 1), come with the
    samples from the loader, so that they are the same for any number of processes."""

    def __init__(self, p, block):
        super().__init__()
        self.p, self.block, self.draws = p, block, None

    def forward(self, x):
        if not self.training or self.draws is None:
            return x
        stays = self.draws[:, self.block] >= self.p
        return x * (stays.to(x) / (1 - self.p)).view(-1, 1, 1, 1)


class EfficientNet(torchvision.models.EfficientNet):
    """torchvision's up to the mean of the last block (no 1x1 convolution after it), with TensorFlow's batch
    norm and padding. (B, 3, S, S) -> (B, D). width, depth: multipliers of B0."""

    # expansion, kernel, stride, channels in and out, layers (EfficientNet, Table 1)
    b0 = ((1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3),
          (6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1))  # fmt: skip

    def __init__(self, width, depth, drop_connect=0.2, stages=b0, momentum=0.01):
        config, MBConv = torchvision.models.efficientnet.MBConvConfig, torchvision.models.efficientnet.MBConv
        super().__init__([config(*stage, width, depth) for stage in stages], 0.0, drop_connect,
                         norm_layer=lambda dim: nn.BatchNorm2d(dim, eps=1e-3, momentum=momentum))  # fmt: skip
        self.dim = self.features[-1][0].in_channels
        del self.features[-1], self.avgpool, self.classifier
        for i, block in enumerate(m for m in self.modules() if isinstance(m, MBConv)):
            block.stochastic_depth = DropConnect(block.stochastic_depth.p, i)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d) and conv.stride == (2, 2):  # pixels more to the right and below
                conv.padding, side = (0, 0), conv.kernel_size[0] // 2
                conv.register_forward_pre_hook(lambda _, x, side=side: F.pad(x[0], 2 * (side - 1, side)))

    def forward(self, x):
        return self.features(x).mean((2, 3))


class BERT(nn.Module):
    """(B, N <= context_length) token ids, 0 after the end token -> (B, D), the first token at the end."""

    def __init__(self, context_length, vocab_size, width, layers):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, width)
        self.position_embeddings = nn.Embedding(context_length, width)
        self.token_type_embeddings = nn.Embedding(2, width)  # the second is never used
        self.norm = nn.LayerNorm(width, eps=1e-12)
        options = dict(dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 64, 4 * width, **options) for _ in range(layers)
        )
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, text):
        padding = text.flip(1).cumsum(1).flip(1) == 0  # also where 0 is a token: an end token is never 0
        positions = self.position_embeddings.weight[: text.shape[1]]
        x = self.norm(self.word_embeddings(text) + positions + self.token_type_embeddings.weight[0])
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return x[:, 0]


# -------------------------------------------- model --------------------------------------------
class ALIGN(nn.Module):
    """visual: an EfficientNet; text: a BERT of this width."""

    def __init__(self, embed_dim, visual, text, text_width, temperature=1.0):
        super().__init__()
        self.visual, self.text = visual, text
        self.text_projection = nn.Linear(text_width, embed_dim)
        # the paper's towers share a width; its ablation has a layer on the image side too
        self.image_projection = nn.Identity() if visual.dim == embed_dim else nn.Linear(visual.dim, embed_dim)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))  # tau
        for p in [*self.text_projection.parameters(), *self.image_projection.parameters()]:
            nn.init.xavier_uniform_(p) if p.ndim > 1 else nn.init.zeros_(p)

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
    """Adam whose step of each tensor is as long as the tensor times lr (arXiv 1904.00962, tensorflow-addons).

    r = m / (sqrt(v) + eps) + weight_decay p, with Adam's m and v; p -= lr r |p| / |r| (lr r if a norm is 0).
    A parameter group with exclude=True (batch norms) is not scaled. step() takes no closure."""

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, exclude=False)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group, p in ((g, p) for g in self.param_groups for p in g["params"] if p.grad is not None):
            state, (beta1, beta2) = self.state[p], group["betas"]
            if not state:
                state |= {"step": torch.tensor(0.0), "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            state["step"] += 1
            m, v, t = state["m"].lerp_(p.grad, 1 - beta1), state["v"], state["step"].item()
            v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            r = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + group["eps"]) + group["weight_decay"] * p
            if not group["exclude"]:
                p_norm, r_norm = p.norm(), r.norm()
                r = r * torch.where((p_norm > 0) & (r_norm > 0), p_norm / r_norm, 1.0)
            p.sub_(r, alpha=group["lr"])


ARCHS = {  # width and depth (micro: our own)
    "efficientnet_micro": (0.5, 0.5),
    "efficientnet_b0": (1.0, 1.0), "efficientnet_b1": (1.0, 1.1), "efficientnet_b2": (1.1, 1.2),
    "efficientnet_b3": (1.2, 1.4), "efficientnet_b4": (1.4, 1.8), "efficientnet_b5": (1.6, 2.2),
    "efficientnet_b6": (1.8, 2.6), "efficientnet_b7": (2.0, 3.1)}  # fmt: skip


def build_model(args) -> ALIGN:
    """Raises UserError for an unknown --arch and for sizes that do not fit together."""
    if args.arch not in ARCHS:
        raise UserError(f"--arch {args.arch} is unknown, choose one of {', '.join(ARCHS)}")
    if args.text_width % 64 or args.image_size < 32:
        raise UserError("--text-width must be a multiple of 64, the width of a head, --image-size 32 or more")
    visual = EfficientNet(*ARCHS[args.arch], args.drop_connect, momentum=args.bn_momentum)
    text = BERT(args.context_length, args.vocab_size, args.text_width, args.text_layers)
    return ALIGN(args.embed_dim, visual, text, args.text_width, args.temperature)


def image_encoder(model: ALIGN) -> nn.Module:
    """Module from images to pooled features (B, D), before the projection."""
    return model.visual


# -------------------------------------------- loss --------------------------------------------
# Adapted from clip.py: clip_loss, the sum of both directions, smoothed labels, tau divides
def align_loss(image_embed, text_embed, temperature, label_smoothing=0.1):
    """Normalised softmax loss (Eq. 1 + Eq. 2) over the global batch, in nats; chance level 2 ln B.

    image_embed, text_embed: (b, E) of this process, any length; temperature: tau, a number or 0-dim tensor.
    Call it outside autocast, whose products are in half precision. -> the mean over this process's rows: the
    mean over processes is the loss of the global batch, over all of whose columns labels are smoothed."""
    image, text = F.normalize(image_embed.float(), dim=-1), F.normalize(text_embed.float(), dim=-1)  # (b, E)
    all_image, all_text = all_gather(image), all_gather(text)  # (B, E)
    b, first = len(image), 0
    if len(all_image) > b:
        first = b * torch.distributed.get_rank()
    labels = torch.arange(first, first + b, device=image.device)
    loss_image = F.cross_entropy(image @ all_text.T / temperature, labels, label_smoothing=label_smoothing)
    loss_text = F.cross_entropy(text @ all_image.T / temperature, labels, label_smoothing=label_smoothing)
    return loss_image + loss_text


# -------------------------------------------- training --------------------------------------------
def train(args: Args) -> dict:
    """Trains and returns the last evaluation. Raises UserError for mistakes the user can fix."""
    device = init_distributed(args.device)
    torch.manual_seed(args.seed)
    autocast, scaler = mixed_precision(args.dtype, device)
    if args.accum_steps > 1:
        raise UserError("--accum-steps is refused: batch norm and negatives need the whole batch, use 1")

    # data
    dataset, val = open_dataset(args.data, args.data_dir), evaluation_set(args)
    dataset = Kept(dataset, args.keep) if args.keep else dataset
    texts = captions(dataset)  # read only by --tokenizer train
    tokenizer = Tokenizer(args.tokenizer, args.context_length, texts, args.vocab_size, args.data_dir)
    views = {"image": AlignView(args.image_size)}
    loader = Loader(dataset, views, {"text": tokenizer}, args.batch_size, args.seed, args.workers, device)

    # model and optimizer
    model = sync_batchnorm(build_model(args), device).to(device)
    if args.compile:
        model.compile()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    params, excluded = list(model.parameters()), {id(p) for norm in norms for p in norm.parameters()}
    groups = [{"params": [p for p in params if id(p) not in excluded], "weight_decay": args.weight_decay},
              {"params": [p for p in params if id(p) in excluded], "weight_decay": 0.0, "exclude": True}]
    optimizer = {"lamb": LAMB, "adamw": torch.optim.AdamW}[args.optimizer](groups, lr=args.lr)

    # run directory; continues from its checkpoint if it has one
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = Run("align", args, loader, state, {"tokenizer": tokenizer.to_json()})
    warmup, chance = round(args.warmup_epochs * loader.steps_per_epoch), 2 * math.log(args.batch_size)
    ddp = DistributedDataParallel(model) if world_size() > 1 else model
    if val and run.step == 0 and run.due(args.eval_every):  # random weights
        run.log_evaluation(language_eval(model, tokenizer, val, eval_view(args), device))

    for step, batch in run.batches():
        image, text = views["image"](*batch["image"]), batch["text"]
        lr = args.lr * min(step / max(1, warmup), (run.total - step) / max(1, run.total - warmup))
        for group in optimizer.param_groups:  # linear from 0, linear to 0
            group["lr"] = lr

        with autocast:
            image_embed, text_embed = ddp(image, text, batch["image"][1]["depth"])
        loss = align_loss(image_embed, text_embed, model.temperature, args.label_smoothing)
        scaler.scale(loss).backward()
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            model.temperature.clamp_(min=0.01)

        run.end_step({"loss": (loss, chance)}, temperature=model.temperature.detach(), lr=lr)
        if val and run.due(args.eval_every):
            run.log_evaluation(language_eval(model, tokenizer, val, eval_view(args), device))
        if run.agree_to_stop() or run.due(args.save_every):
            run.save()

    return run.finish("zeroshot", val)


if __name__ == "__main__":
    with user_errors():
        args = parse_args(Args, RECIPES)
        filter_data(args) if args.filter_only else train(args)
