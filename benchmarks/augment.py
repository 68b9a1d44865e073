"""What two augmented views of a photo cost on one CPU core.

pil: torchvision transforms on PIL images, the way the official codes make views. Against it this project's
two parts: worker, what a loader worker does (decode, crop twice), and device, the batched operations that do
the rest on the training device. Here that is the same core; with a GPU only the worker's part is left to it.

    python benchmarks/augment.py                                     # about a minute
    python benchmarks/augment.py --out results/augment.json

Needs scikit-learn for its two photos. pil and the project take turns, round by round.
"""

import argparse
import io
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import PIL  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402
from torchvision import transforms as T  # noqa: E402

from common import init_distributed  # noqa: E402
from data import IMAGENET_MEAN, IMAGENET_STD, decode  # noqa: E402
from simclr import SimCLRView  # noqa: E402
from slip import SSLView  # noqa: E402

SIZE = 224


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


# -------------------------------------------- on PIL images --------------------------------------------
class PILBlur:
    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def pil_policy(strength, hue, interpolation, normalised):
    """Crop, jitter, grey, blur and flip with the probabilities that SimCLR and SLIP share."""
    steps = [
        T.RandomResizedCrop(SIZE, (0.08, 1.0), interpolation=interpolation),
        T.RandomApply([T.ColorJitter(strength, strength, strength, hue)], p=0.8),
        T.RandomGrayscale(0.2),
        T.RandomApply([PILBlur()], p=0.5),
        T.RandomHorizontalFlip(),
        T.ToTensor(),
    ]
    return T.Compose(steps + [T.Normalize(IMAGENET_MEAN, IMAGENET_STD)] * normalised)


def on_pil(policy, files):
    """-> float (2 n, 3, SIZE, SIZE)."""
    views = []
    for file in files:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        views += [policy(image), policy(image)]
    return torch.stack(views)


# -------------------------------------------- here --------------------------------------------
def in_worker(view, files, seed):
    """What a loader worker does for a batch: two pairs (uint8 (n, 3, SIZE, SIZE), draws)."""
    pairs = ([], [])
    for i, file in enumerate(files):
        image = decode(file)
        for number, pair in enumerate(pairs):
            rng = random.Random(f"{seed} {i} {number}")
            pair.append((view.crop(image, rng).permute(1, 2, 0), view.sample(rng)))
    batches = []
    for pair in pairs:
        crops, draws = zip(*pair)
        draws = {name: torch.tensor([draw[name] for draw in draws]) for name in draws[0]}
        batches.append((torch.stack(crops).permute(0, 3, 1, 2), draws))
    return batches


def on_device(view, batches):
    return [view(x, draws) for x, draws in batches]


# -------------------------------------------- measuring --------------------------------------------
def measure(view, policy, files, rounds):
    """-> {way: (fastest, median)} in ms per sample of two views."""
    times = {"pil": [], "worker": [], "device": [], "worker+device": []}
    for i in range(rounds + 1):
        start = time.perf_counter()
        on_pil(policy, files)
        pil = time.perf_counter()
        batches = in_worker(view, files, i)
        worker = time.perf_counter()
        on_device(view, batches)
        device = time.perf_counter()
        if i:  # the first round warms up
            for way, seconds in zip(times, (pil - start, worker - pil, device - worker, device - pil)):
                times[way].append(seconds / len(files) * 1e3)
    return {way: (min(ms), statistics.median(ms)) for way, ms in times.items()}


def environment():
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
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
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32, help="samples per round")
    parser.add_argument("--out", type=Path, help="also write the numbers here, as json")
    args = parser.parse_args()
    init_distributed("cpu")  # whatever a run sets
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    random.seed(0)
    torch.manual_seed(0)
    files = (photos() * args.batch_size)[: args.batch_size]
    bilinear, bicubic = T.InterpolationMode.BILINEAR, T.InterpolationMode.BICUBIC
    ways = {
        "slip": (SSLView(SIZE), pil_policy(0.4, 0.1, bilinear, normalised=True)),
        "simclr": (SimCLRView(SIZE), pil_policy(0.8, 0.2, bicubic, normalised=False)),
    }
    results = {}
    print(f"ms per sample of two {SIZE} px views, fastest round (median) of {args.rounds}, one thread")
    for name, (view, policy) in ways.items():
        ms = measure(view, policy, files, args.rounds)
        ratios = {way: [ms["pil"][i] / ms[way][i] for i in (0, 1)] for way in ("worker", "worker+device")}
        results[name] = {"ms": ms, "times_faster_than_pil": ratios}
        cells = [f"{way} {fastest:.2f} ({median:.2f})" for way, (fastest, median) in ms.items()]
        cells += [f"pil / {way} {fastest:.1f} ({median:.1f})" for way, (fastest, median) in ratios.items()]
        print(f"{name:7}", ", ".join(cells), flush=True)
    if args.out:
        settings = {"photo": "500x375 JPEG quality 90", "threads": 1, "rounds": args.rounds}
        settings["batch_size"] = args.batch_size
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**environment(), **settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
