"""What the views of a photo cost on one CPU core.

pil: torchvision transforms on PIL images, the way the official codes make views. Against it this
project's two parts: worker, what a loader worker does (decode, crop), and device, the batched
operations that do the rest on the training device. Here that is the same core; with a GPU only the
worker's part is left to it.

    python benchmarks/augment.py                                     # about a minute
    python benchmarks/augment.py --out results/augment.json
    python benchmarks/augment.py --profile                           # operations of slip's views

Needs scikit-learn for its two photos. pil and the project take turns, round by round. The clock
counts work of this process alone, not what others on the machine take.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import PIL  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402
from torchvision import transforms as T  # noqa: E402

import data  # noqa: E402
import slip  # noqa: E402
from data import IMAGENET_MEAN, IMAGENET_STD, decode  # noqa: E402
from clip import LanguageView  # noqa: E402
from dino import DINOView  # noqa: E402
from evaluation import results  # noqa: E402
from record import warn_of  # noqa: E402
from simclr import SimCLRView  # noqa: E402
from slip import SSLView  # noqa: E402

SIZE = 224
OPERATIONS = [(slip, name) for name in ("to_float", "hflip", "color_jitter", "grayscale")]
OPERATIONS += [(slip, "gaussian_blur"), (slip, "normalize"), (data, "shift_hue")]
BILINEAR, BICUBIC = T.InterpolationMode.BILINEAR, T.InterpolationMode.BICUBIC


def photos():
    """The JPEG bytes of two photos, 500 x 375 pixels, quality 90."""
    from sklearn.datasets import load_sample_images

    files = []
    for array in load_sample_images().images:
        file = io.BytesIO()
        photo = Image.fromarray(array).resize((500, 375), Image.Resampling.LANCZOS)
        photo.save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


# -------------------------------------------- on PIL images -------------------------------------
class PILBlur:
    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def pil_policy(jitter, interpolation, size=SIZE, scale=(0.08, 1.0), blur=0.5, solarize=0.0,
               normalised=True):  # fmt: skip
    """Crop, flip, colours, blur; with jitter None crop alone."""
    steps = [T.RandomResizedCrop(size, scale, interpolation=interpolation)]
    if jitter:
        steps += [T.RandomHorizontalFlip(), T.RandomApply([T.ColorJitter(*jitter)], p=0.8),
                  T.RandomGrayscale(0.2), T.RandomApply([PILBlur()], p=blur)]  # fmt: skip
    if solarize:
        steps.append(T.RandomSolarize(128, p=solarize))
    steps.append(T.ToTensor())
    if normalised:
        steps.append(T.Normalize(IMAGENET_MEAN, IMAGENET_STD))
    return T.Compose(steps)


def on_pil(policies, files):
    """-> a list of float (n, 3, S, S), one per view."""
    views = [[] for _ in policies]
    for file in files:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        for policy, view in zip(policies, views):
            view.append(policy(image))
    return [torch.stack(view) for view in views]


# -------------------------------------------- here --------------------------------------------
def in_worker(views, files, seed):
    """What a loader worker does for a batch: per view uint8 (n, 3, S, S) and its draws."""
    taken = [([], []) for _ in views]
    for i, file in enumerate(files):
        image = decode(file)
        for number, (view, (crops, draws)) in enumerate(zip(views, taken)):
            rng = random.Random(f"{seed} {i} {number}")
            crops.append(view.crop(image, rng).permute(1, 2, 0))
            draws.append(view.sample(rng))
    batches = []
    for crops, draws in taken:
        stacked = {name: torch.tensor([draw[name] for draw in draws]) for name in draws[0]}
        batches.append((torch.stack(crops).permute(0, 3, 1, 2), stacked))
    return batches


def on_device(views, batches):
    return [view(x, draws) for view, (x, draws) in zip(views, batches)]


def cases():
    """name -> (description, views here, policies on PIL images)."""
    strong = pil_policy((0.8, 0.8, 0.8, 0.2), BICUBIC, normalised=False)
    weak = pil_policy((0.4, 0.4, 0.4, 0.1), BILINEAR)
    colours, large, small = (0.4, 0.4, 0.2, 0.1), (0.4, 1.0), (0.05, 0.4)
    dino = [pil_policy(colours, BICUBIC, SIZE, large, blur=1.0)]
    dino += [pil_policy(colours, BICUBIC, SIZE, large, blur=0.1, solarize=0.2)]
    dino += [pil_policy(colours, BICUBIC, 96, small)] * 8
    views = [DINOView(SIZE, large, 1.0), DINOView(SIZE, large, 0.1, 0.2)]
    views += [DINOView(96, small, 0.5)] * 8
    crop = pil_policy(None, BICUBIC, scale=(0.9, 1.0))
    return {
        "slip": (f"two {SIZE} px views of slip", [SSLView(SIZE)] * 2, [weak] * 2),
        "simclr": (f"two {SIZE} px views of simclr", [SimCLRView(SIZE)] * 2, [strong] * 2),
        "dino": (f"two {SIZE} px and eight 96 px views of dino", views, dino),
        "clip": (f"one {SIZE} px crop of clip", [LanguageView(SIZE)], [crop]),
    }


# -------------------------------------------- measuring -----------------------------------------
def measure(views, policies, files, rounds):
    """-> {way: (fastest, median)} in ms per sample, of all its views together."""
    times = {"pil": [], "worker": [], "device": [], "worker+device": []}
    for i in range(rounds + 1):
        start = time.process_time()
        on_pil(policies, files)
        pil = time.process_time()
        batches = in_worker(views, files, i)
        worker = time.process_time()
        on_device(views, batches)
        device = time.process_time()
        if i:  # the first round warms up
            spent = pil - start, worker - pil, device - worker, device - pil
            for way, seconds in zip(times, spent):
                times[way].append(seconds / len(files) * 1e3)
    return {way: (min(ms), statistics.median(ms)) for way, ms in times.items()}


def profile(files, rounds):
    """-> {operation: ms} of the device's part of one of slip's views, of all rounds together: they
    draw differently. What shift_hue takes is in color_jitter's share too."""
    spent = Counter()

    def timed(name, operation):
        def call(*args, **kwargs):
            start = time.process_time()
            result = operation(*args, **kwargs)
            spent[name] += time.process_time() - start
            return result

        return call

    with contextlib.ExitStack() as stack:
        for module, name in OPERATIONS:
            operation = timed(name, getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, operation))
        for i in range(rounds + 1):
            on_device([SSLView(SIZE)], in_worker([SSLView(SIZE)], files, i))
            if i == 0:  # it warms up
                spent.clear()
    return {name: seconds / len(files) / rounds * 1e3 for name, seconds in spent.items()}


def environment():
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": results.environment(torch.device("cpu"))["commit"],
        "cpu": cpu,
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
    }


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="samples per round")
    parser.add_argument("--out", type=Path, help="also write the numbers here, as json")
    parser.add_argument("--profile", action="store_true", help="what slip's views consist of")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    random.seed(0)
    torch.manual_seed(0)
    files = (photos() * args.batch_size)[: args.batch_size]
    if args.profile:
        print(f"CPU ms per view of slip, {args.rounds} rounds, one thread")
        ms = profile(files, args.rounds)
        total = sum(ms.values()) - ms["shift_hue"]
        for name in sorted(ms, key=ms.get, reverse=True):
            print(f"{name:15}{ms[name]:6.2f}{100 * ms[name] / total:5.0f}%")
        return
    found = {}
    print(f"CPU ms per sample, fastest round (median) of {args.rounds}, one thread")
    for name, (what, views, policies) in cases().items():
        ms = measure(views, policies, files, args.rounds)
        ratios = {}
        for way in ("worker", "worker+device"):
            ratios[way] = [ms["pil"][i] / ms[way][i] for i in (0, 1)]
        found[name] = {"what": what, "ms": ms, "times_faster_than_pil": ratios}
        cells = [f"{way} {fastest:.2f} ({median:.2f})" for way, (fastest, median) in ms.items()]
        for way, (fastest, median) in ratios.items():
            cells.append(f"pil / {way} {fastest:.1f} ({median:.1f})")
        print(f"{name:7}", ", ".join(cells), flush=True)
    if args.out:
        settings = {
            "photo": "500x375 JPEG quality 90",
            "photo_bytes": [len(file) for file in photos()],
            "threads": 1,
            "rounds": args.rounds,
            "batch_size": args.batch_size,
        }
        written = {**environment(), **settings, "results": found}
        warn_of([written["commit"]])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
