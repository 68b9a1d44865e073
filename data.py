"""Data: decoding, the loader, batched image operations, the tokenizer.

A method file opens a dataset (of sources.py), names its views and texts, and takes batches:

    dataset = open_dataset("yfcc15m")                 # dataset[7]: image, captions, label, key
    loader = Loader(dataset, {"view1": view, "view2": view}, {"text": tokenizer}, batch_size=4096)
    for step, batch in loader.batches(0, 10 * loader.steps_per_epoch):
        x, ids = batch["view1"], batch["text"]        # float (b, 3, S, S), int64 (b, L)
"""

import contextlib
import gzip
import html
import importlib.util
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import urllib.request
from pathlib import Path

import ftfy
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tokenizers import decoders, models, pre_tokenizers, trainers

from common import UserError, rank, world_size
from sources import open_dataset  # noqa: F401, method files import it from here

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# -------------------------------------------- decoding and loading ------------------------------
def decode(image):
    """Bytes of an image file, uint8 array (H, W, 3) or PIL image -> uint8 (3, H, W), stored as
    (H, W, 3) for fast crops. ValueError when it is broken or has more than 179 million pixels."""
    try:
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))  # reads the header, checks the number of pixels
            with contextlib.suppress(Exception):  # of damaged EXIF data; damaged pixels fail below
                ImageOps.exif_transpose(image, in_place=True)
        if isinstance(image, Image.Image):
            if image.mode[0] in "IF":  # 16 or 32 bits, which convert() would clip at 255
                x, white = np.asarray(image), {"I": (255, 65535), "F": (1, 255)}
                white = [w for w in white.get(image.mode, [65535]) if 0 <= x.min() <= x.max() <= w]
                if not white:
                    raise ValueError(f"values from {x.min()} to {x.max()}")
                image = Image.fromarray((x / white[0] * 255.998).astype(np.uint8))  # 256 wraps to 0
            if image.mode != "RGB":  # convert() copies even then, which takes longer than decoding
                transparent = "transparency" in image.info
                image = (image.convert("RGBA") if transparent else image).convert("RGB")
            image = np.array(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"array of {image.dtype} {image.shape}")
        return torch.from_numpy(np.require(image, requirements="CW")).permute(2, 0, 1)
    except Exception as error:  # Pillow raises anything on hostile bytes
        raise ValueError(f"broken image ({str(error).split(' <')[0]})") from error


def processes_here():
    """How many processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def has_shm(size):
    """Whether /dev/shm has so many bytes free. Docker gives it 64 MB; other systems have none."""
    return not os.path.isdir("/dev/shm") or shutil.disk_usage("/dev/shm").free > size


def start_of(workers):
    """How workers start: "fork" on Linux. Python's default from 3.14 on imports torch in each."""
    return "fork" if workers and sys.platform == "linux" else None


def at_most_cores(workers):
    """No more workers than there are cores for this process."""
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))  # on Linux
    return min(workers, max(1, len(usable(0)) // processes_here()))


class Loader:
    """Batches are a function of (seed, step): the same for any number of workers and after a
    restart, and together the same for any number of processes.

    views: {name: object with crop(image, rng) and sample(rng), called for a sample in a worker, and
    __call__(pixels, params), called for a batch on the device, or in a worker where that is a CPU
    and all have a size of at most 64}; texts: {name: function(caption, rng) -> ids}; batch_size: of
    all processes. Each view and text of a sample has its own random.Random. bad: replaced samples
    of this epoch and process. wait: seconds waited, to be reset."""

    def __init__(self, dataset, views, texts, batch_size, seed=0, workers=0, device="cpu"):
        if batch_size % (world := world_size()):
            raise UserError(f"batch size {batch_size} cannot be divided among {world} processes")
        if len(dataset) < batch_size:
            few = f"{dataset.name} has {len(dataset)} samples, less than a batch of {batch_size}"
            raise UserError(f"{few}: lower --batch-size, as recipes for small data do")
        if texts and not dataset.captioned:
            raise UserError(f"{dataset.name} has no captions, docs/data.md says where to put them")
        self.dataset, self.views, self.texts, self.batch_size = dataset, views, texts, batch_size
        self.seed, self.workers = seed, at_most_cores(workers)
        self.device = torch.device(device)
        self.sharing = processes_here() * self.workers  # workers that put batches into /dev/shm
        sizes = [getattr(view, "size", 224) for view in views.values()]
        self.small = self.device.type == "cpu" and max(sizes, default=224) <= 64
        self.steps_per_epoch = len(dataset) // batch_size  # the rest differs from epoch to epoch
        self.wait, self.bad, self.bad_before, self.epoch, self.named = 0.0, 0, 0, None, {}

    def batches(self, start, stop):
        """Yields (step, batch), start <= step < stop. On the device are "index", "label" (b,), per
        view float (b, 3, S, S), per text int64 (b, L), and in "params" per view what was drawn for
        its samples, {"flip": bool (b,), ...}."""
        start_by = start_of(self.workers)
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=self.order(start, stop), collate_fn=self.collate,
            num_workers=self.workers, worker_init_fn=prepare_worker, generator=torch.Generator(),
            multiprocessing_context=start_by, pin_memory=self.device.type == "cuda")  # fmt: skip
        try:
            batches, threads = iter(loader), torch.get_num_threads()
        except OSError as error:
            if "open files" in str(error):
                raise
            raise UserError(f"{SHM_FULL}: {error}") from error
        if self.workers:  # torch's handler would raise a worker's death amid a step; next() sees it
            with contextlib.suppress(ValueError, AttributeError):  # in another thread, on Windows
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for step in range(start, stop):
            begin = time.perf_counter()
            torch.set_num_threads(threads if self.workers else 1)  # several slow down small crops
            try:
                batch = next(batches)
            except (UserError, RuntimeError, MemoryError, EOFError, OSError) as error:
                import trouble
                if not (text := trouble.sentence(error)):
                    raise
                trouble.let_go(error)  # of `batches`
                failed, batches = UserError(text), None  # ends the workers
                failed.alone = True  # others may read better ones
                raise failed from None
            torch.set_num_threads(threads)
            self.wait += time.perf_counter() - begin
            if step // self.steps_per_epoch != self.epoch:
                self.epoch, self.bad_before, self.bad = step // self.steps_per_epoch, self.bad, 0
            for skipped in batch.pop("skipped"):
                self.bad += bool(skipped)
                for where, reason in skipped.items():
                    if where not in self.named and len(self.named) < 100:
                        text = f"{self.dataset.name}: sample {where} is replaced, {reason}"
                        print(text, file=sys.stderr)
                        self.named[where] = reason
            yield step, self.call_views(self.to_device(batch))

    def check_bad(self):
        """Called by all processes. UserError when over 1% of this or the last epoch was bad."""
        bad = torch.tensor([self.bad, self.bad_before], device=self.device)
        if world_size() > 1:
            torch.distributed.all_reduce(bad)
        if (worst := int(bad.max())) > max(1, 0.01 * self.steps_per_epoch * self.batch_size):
            example = next(iter(self.named.values()), "other processes name them")
            found = f"{worst} samples of {self.dataset.name} are bad, over 1% of an epoch"
            raise UserError(f"{found}: {example}; remove such rows or files")

    def order(self, start, stop):
        """The (epoch, index) pairs of this process, a list per step."""
        size, epoch = self.batch_size // world_size(), None
        for step in range(start, stop):
            if step // self.steps_per_epoch != epoch:
                epoch, order = step // self.steps_per_epoch, None  # frees that of the last epoch
                order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
            first = step % self.steps_per_epoch * self.batch_size + rank() * size
            yield [(epoch, int(index)) for index in order[first : first + size]]

    def __getitem__(self, item):
        """In a worker: (epoch, index) -> views and ids of that sample, or of the next good one."""
        (epoch, index), dataset, bad = item, self.dataset, {}
        for where in (i % len(dataset) for i in range(index, index + 100)):
            name = f"{dataset.name}[{where}]"
            try:
                sample = dataset[where]
                name = sample.key
                image = decode(sample.image)
                if self.texts and not any(caption.strip() for caption in sample.captions):
                    raise ValueError("no caption")
                break
            except (OSError, ValueError) as error:
                bad[where] = f"{name}: {error}"
        else:
            raise UserError(f"none of {len(bad)} samples of {dataset.name} is usable: {bad[index]}")

        def rng(use):
            return random.Random(f"{self.seed} {epoch} {index} {use}")

        out = {"index": where, "label": sample.label, "skipped": bad}
        for name, view in self.views.items():
            view_rng = rng(name)
            out[name] = view.crop(image, view_rng), view.sample(view_rng)
        if self.texts:
            caption = rng("caption").choice(sample.captions)
            out |= {name: text(caption, rng(name)) for name, text in self.texts.items()}
        return out

    def collate(self, samples):
        """In a worker: list of samples -> batch, which has uint8 (b, 3, S, S), channels last, per
        view in "pixels", or what views have made of small ones."""
        batch = {"skipped": [s["skipped"] for s in samples], "pixels": {}, "params": {}}
        batch |= {key: torch.tensor([s[key] for s in samples]) for key in ("index", "label")}
        for name in self.views:
            crops, params = zip(*(s[name] for s in samples))
            crops = torch.stack([crop.permute(1, 2, 0) for crop in crops]).permute(0, 3, 1, 2)
            stacked = {k: torch.stack([torch.as_tensor(p[k]) for p in params]) for k in params[0]}
            batch["pixels"][name], batch["params"][name] = crops, stacked
        for name, text in self.texts.items():
            length = max(len(s[name]) for s in samples)
            if self.device.type == "cuda":  # multiples of 8: few lengths, which suit tensor cores
                length = min((length + 7) // 8 * 8, getattr(text, "context_length", 2**31))
            batch[name] = torch.tensor([s[name] + [0] * (length - len(s[name])) for s in samples])
        if self.small and self.has_room(batch):
            self.call_views(batch)
        if self.device.type == "cpu" and torch.utils.data.get_worker_info():
            # each tensor on its way takes one of the files that a process may have open
            for name, params in batch["params"].items():
                batch["params"][name] = {k: v.numpy() for k, v in params.items()}
        return share(batch)

    def has_room(self, batch):
        """Whether /dev/shm, where workers put batches, can hold them as floats, and not only as
        bytes: up to two for each worker, and as much is to stay free."""
        size = sum(4 * pixels.numel() for pixels in batch["pixels"].values())
        return not self.sharing or has_shm(4 * self.sharing * size)

    def call_views(self, batch):
        """"pixels" -> a float (b, 3, S, S) per view, in place, unless a worker has done it."""
        for name, pixels in batch.pop("pixels", {}).items():
            batch[name] = self.views[name](pixels, batch["params"][name])
        return batch

    def to_device(self, x):
        if isinstance(x, dict):
            return {key: self.to_device(value) for key, value in x.items()}
        return torch.as_tensor(x).to(self.device, non_blocking=self.device.type == "cuda")


SHM_FULL = "/dev/shm is too small for loader workers: raise --shm-size (Docker) or lower --workers"


def share(batch):
    """Called in a worker: moves all tensors in a batch to shared memory. The thread that sends the
    batch would do it too, but the main process would not hear of its errors and wait for ever."""
    if isinstance(batch, dict | tuple | list):
        for part in batch.values() if isinstance(batch, dict) else batch:
            share(part)
    elif torch.is_tensor(batch) and torch.utils.data.get_worker_info():
        try:
            batch.share_memory_()
        except RuntimeError as error:
            if "open files" in str(error):
                raise
            raise UserError(SHM_FULL) from error
    return batch


def prepare_worker(worker):
    """Called in a worker, before it reads anything."""
    import trouble
    trouble.ignore_signals()
    trouble.end_where_a_batch_is_lost()


# -------------------------------------------- image operations ----------------------------------
# The first two serve one sample in a worker. The others do to a float batch (B, 3, H, W) in [0, 1]
# what torchvision.transforms.v2.functional does to one, where mask (B,) is set; parameters (B,).
def random_resized_crop(image, rng, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3),
                        interpolation="bilinear"):  # fmt: skip
    """torchvision's RandomResizedCrop, antialiased: uint8 (3, H, W) -> uint8 (3, size, size). rng:
    random.Random. Fastest on an image stored as (H, W, 3), as by decode(); so is the crop then."""
    height, width = image.shape[1:]
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** rng.random()  # log-uniform
        h, w = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
        if 0 < h <= height and 0 < w <= width:
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            break
    else:  # nothing fitted: the largest central crop of an allowed aspect
        h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
        top, left = (height - h) // 2, (width - w) // 2
    crop = image.permute(1, 2, 0)[top : top + h, left : left + w][None].permute(0, 3, 1, 2)
    return F.interpolate(crop, (size, size), mode=interpolation, antialias=True)[0]


def draw_jitter(rng, brightness, contrast, saturation, hue):
    """color_jitter's arguments for one sample, drawn as torchvision's ColorJitter draws them."""
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    factors = {name: rng.uniform(max(0, 1 - s), 1 + s) for name, s in strengths.items()}
    return {**factors, "hue": rng.uniform(-hue, hue), "order": rng.sample(range(4), 4)}


def to_float(x):
    """uint8 -> float32 in [0, 1], stored channel by channel, as suits the operations below."""
    return x.to(torch.float32, memory_format=torch.contiguous_format, copy=True).div_(255)


def normalize(x, mean, std):
    """(x - mean) / std by channel; both are floats, which no step has to copy to the device."""
    return torch.stack([(channel - m).div_(s) for channel, m, s in zip(x.unbind(1), mean, std)], 1)


def on_masked(operation, x, mask, *params, at_a_time=8):
    """operation(x, *params) where mask is set, else x; params (B, ...). A GPU computes all samples,
    as picking would make it wait for the host; the CPU picks, a few at a time for its cache."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(mask.view(-1, 1, 1, 1), operation(x, *params), x)
    x, rows = x.clone(), mask.nonzero().squeeze(1)
    if len(rows):
        for some in rows.split(at_a_time):
            x[some] = operation(x[some], *(p[some] for p in params))
    return x


def hflip(x, mask):
    return on_masked(lambda x: x.flip(3), x, mask)


def luma(x):
    """Grey level (B, 1, H, W), by torchvision's weights."""
    red, green, blue = x.unbind(1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(1)


def grayscale(x, mask):
    return on_masked(lambda x: luma(x).expand_as(x), x, mask)


def solarize(x, mask, threshold=0.5):
    return on_masked(lambda x: torch.where(x >= threshold, 1 - x, x), x, mask)


def shift_hue(x, hue):
    """Turns the hue of every pixel by hue (B,), -0.5 to 0.5 of a circle. No HSV is needed: a
    pixel's smallest and largest value stay, and its place on the colour hexagon (0 red, 2 green, 4
    blue, 6 red) says where between these two each channel lies."""
    red, green, blue = x.unbind(1)
    low, high = x.amin(1), x.amax(1)
    chroma = high - low
    to_red = (high - 2 * low).sub_(red).add_(green).add_(blue).div_(chroma.clamp_min(1e-12))
    place = to_red.copysign_(green - blue).add_(6 * hue.view(-1, 1, 1)).remainder_(6)
    share = torch.stack(((place - 3).abs_() - 1, 2 - (place - 2).abs_(), 2 - (place - 4).abs_()), 1)
    return share.clamp_(0, 1).mul_(chroma.unsqueeze(1)).add_(low.unsqueeze(1))


def jitter_one(x, factors, hue, order):
    """color_jitter of one sample, whose x (1, 3, H, W) is changed in place: only needed steps."""
    for kind in order[0].tolist():
        if kind == 3:
            x = shift_hue(x, hue)
            continue
        factor = factors[0, kind].item()
        if kind == 0:
            x.mul_(factor)
        elif kind == 1:
            mean = luma(x).mean()
            x.mul_(factor).add_(mean * (1 - factor))
        else:
            grey = luma(x)
            x.mul_(factor).add_(grey, alpha=1 - factor)
        x.clamp_(0, 1)
    return x


def color_jitter(x, brightness, contrast, saturation, hue, order, mask):
    """adjust_brightness, _contrast, _saturation (factors from 0) and _hue (-0.5 to 0.5), in each
    sample's own order (B, 4), a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue. The
    CPU takes sample after sample. A GPU takes all together; hue costs most, so it is computed once,
    between three steps and three steps of the others, of which idle ones have factor 1."""
    factors = torch.stack((brightness, contrast, saturation, torch.ones_like(hue)), 1)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return on_masked(jitter_one, x, mask, factors, hue.to(x.dtype), order, at_a_time=1)
    slot, hue_slot = torch.arange(4, device=x.device), order.argmax(1, keepdim=True)
    before, after = order.where(slot < hue_slot, 3), order.where(slot > hue_slot, 3)  # 3: nothing
    kind = torch.cat((before[:, :3], after[:, 1:]), 1)  # (B, 6)
    factor = factors.gather(1, kind)
    # A step mixes x with black, its mean grey or its grey image: weights (B, 6, 3) of x, mean, grey
    steps = torch.stack((factor, (1 - factor) * (kind == 1), (1 - factor) * (kind == 2)), 2)

    def jitter(x, steps, hue):
        for i in range(6):
            x = shift_hue(x, hue) if i == 3 else x
            of_x, of_mean, of_grey = steps[:, i, :, None, None, None].unbind(1)
            grey = luma(x)
            mean = grey.mean((2, 3), keepdim=True)
            x = (x * of_x).add_(grey.mul_(of_grey).add_(mean * of_mean)).clamp_(0, 1)
        return x

    return on_masked(jitter, x, mask, steps.to(x.dtype), hue.to(x.dtype))


def gaussian_blur(x, sigma, mask, kernel_size):
    """Gaussian of standard deviation sigma pixels on kernel_size (odd) pixels, borders reflected.
    Images too small for that get the largest kernel that can be reflected, 2 * min(H, W) - 1."""
    radius = min(kernel_size // 2, x.shape[2] - 1, x.shape[3] - 1)
    pixels = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)

    def blur(x, sigma):
        b, c, h, w = x.shape
        kernel = (pixels / sigma.view(-1, 1)).square().mul(-0.5).softmax(1)  # (B, K)
        kernel = kernel.repeat_interleave(c, 0)
        x = F.pad(x, [radius] * 4, mode="reflect").view(1, b * c, h + 2 * radius, w + 2 * radius)
        x = F.conv2d(x, kernel[:, None, None, :], groups=b * c)  # a group per sample and channel
        return F.conv2d(x, kernel[:, None, :, None], groups=b * c).view(b, c, h, w)

    with torch.autocast(x.device.type, enabled=False):  # bfloat16 would keep 8 bits at most
        return on_masked(blur, x, mask, sigma.to(x.dtype))


# -------------------------------------------- tokenizer -----------------------------------------
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
SOT_EOT = [("<|startoftext|>", "<|endoftext|>"), ("<start_of_text>", "<end_of_text>"),
           ("[CLS]", "[SEP]")]  # fmt: skip


def clip_bpe(merges=(), captions=None, vocab_size=49408):
    """Byte-pair encoding of CLIP's form with these merges (left, right), or those learnt from
    captions. Ids: 256 bytes, 256 that end a word (so any text can be encoded), merges, sot, eot."""
    start = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = [character + "</w>" for character in start]
    tokens = dict.fromkeys([*start, *end, *map("".join, merges), *SOT_EOT[0]])
    ids = {token: i for i, token in enumerate(tokens)}
    bpe = tokenizers.Tokenizer(models.BPE(ids, list(map(tuple, merges)), end_of_word_suffix="</w>"))
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), "removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    bpe.decoder = decoders.Sequence([decoders.Replace("</w>", "Ġ"), decoders.ByteLevel()])
    bpe.add_special_tokens(list(SOT_EOT[0]))
    if captions is None:
        return bpe
    # Ties between pairs go by id, and the ids of `end`, if not given, would follow a random hash.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, min_frequency=2, show_progress=False,
        initial_alphabet=start, special_tokens=end, end_of_word_suffix="</w>")  # fmt: skip
    # Training takes the square of a word's length, and no word has a thousand letters.
    bpe.train_from_iterator((re.sub(r"(\S{1000})\S+", r"\1", text) for text in captions), trainer)
    return clip_bpe(json.loads(bpe.to_str())["model"]["merges"])


class Tokenizer:
    """Captions to token ids [sot, ..., eot], at most context_length, the last is always eot.
    spec: "clip" (its merges, from data_dir, an installed open_clip or the Hugging Face hub),
    "train" (CLIP's form learnt from captions, at most vocab_size tokens), a hub name, the path or
    text of a tokenizer.json, or the path of bpe_simple_vocab_16e6.txt.gz. Raises UserError."""

    def __init__(self, spec, context_length=77, captions=(), vocab_size=0, data_dir=None):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns in forked workers
        self.context_length = context_length
        try:
            self.bpe = self.open_once(spec, captions, vocab_size or 49408, data_dir)
            self.vocab_size = size = self.bpe.get_vocab_size()
            if size > (vocab_size or size):
                raise ValueError(f"its {size} tokens are more than --vocab-size {vocab_size}")
            ends = [[self.bpe.token_to_id(token) for token in pair] for pair in SOT_EOT]
            self.sot, self.eot = next((pair for pair in ends if None not in pair), (None, None))
            if self.eot is None:
                raise ValueError("it has no start and end token")
        except Exception as error:  # tokenizers raises nothing narrower
            name = spec if len(spec) < 200 else "of the checkpoint"
            other = "use --tokenizer train, a tokenizer.json or bpe_simple_vocab_16e6.txt.gz"
            advice = "raise it" if "--vocab-size" in str(error) else other
            raise UserError(f"tokenizer {name}: {error}; {advice}") from error
        self.bpe.no_truncation()
        self.bpe.no_padding()
        self.clip_form = getattr(self.bpe.model, "end_of_word_suffix", None) == "</w>"
        if self.clip_form:
            self.bpe.normalizer = None  # clean() does that, exactly as CLIP's own

    def open_once(self, *where):
        """The first process asks the hub or learns for all, so that all have the same tokens."""
        made = ["", ""]  # the text of a tokenizer.json, or an error
        if rank() == 0:
            try:
                made[0] = self.open(*where).to_str()
            except Exception as error:
                made[1] = str(error)
        if world_size() > 1:
            torch.distributed.broadcast_object_list(made)
        if not made[0]:
            raise ValueError(made[1])
        return tokenizers.Tokenizer.from_str(made[0])

    def open(self, spec, captions, vocab_size, data_dir):
        if spec == "train":
            return clip_bpe(captions=map(self.clean, captions), vocab_size=vocab_size)
        if spec == "clip":
            open_clip = importlib.util.find_spec("open_clip")  # located, not imported
            folders = [os.path.expanduser(data_dir or os.environ.get("DATA_DIR") or "data")]
            folders += open_clip.submodule_search_locations if open_clip else []
            files = [os.path.join(folder, "bpe_simple_vocab_16e6.txt.gz") for folder in folders]
            spec = next(filter(os.path.isfile, files), "openai/clip-vit-base-patch32")
        if spec.endswith(".gz"):  # a title, then merges, of which CLIP has the first 48,894
            lines = gzip.decompress(Path(spec).read_bytes()).decode().splitlines()[1:48895]
            return clip_bpe([line.split() for line in lines])
        if spec.startswith("{"):
            return tokenizers.Tokenizer.from_str(spec)
        if spec.endswith(".json") or Path(spec).is_file():
            return tokenizers.Tokenizer.from_str(Path(spec).read_text(encoding="utf-8"))
        url = f"https://huggingface.co/{spec}/resolve/main/tokenizer.json"
        with urllib.request.urlopen(url, timeout=10) as reply:  # the hub's client tries for 20 s
            return tokenizers.Tokenizer.from_str(reply.read().decode())

    @staticmethod
    def clean(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        return re.sub(r"\s+", " ", text).strip().lower().encode(errors="replace").decode()

    def encode(self, caption):
        """Ids without sot and eot, not cut."""
        text = self.clean(caption) if self.clip_form else caption
        return self.bpe.encode(text, add_special_tokens=False).ids

    def __call__(self, caption, rng=None):
        caption = caption[: 1000 * self.context_length]  # of megabytes, all but that is cut anyway
        ids = [self.sot, *self.encode(caption), self.eot][: self.context_length]
        return [*ids[:-1], self.eot]

    def to_json(self):
        return self.bpe.to_str()
