"""Whole training loops with their data, on two cores, in turn: images per second.

    here          python METHOD.py --data cifar10 --recipe cifar10-cpu, as a process of its own
    lightly       its transforms, modules, loss and loop, as in parity.py
    torchvision   that loop with views made by torchvision's transforms on PIL images

    python benchmarks/end_to_end.py --methods simclr dino --out results/end_to_end.json

All three have the same backbone, pictures, order, batch, number of loader workers (two) and threads
of the model (one). The first ten steps are not timed: workers start, buffers are allocated. Every
other round goes backwards, so that no loop always follows the same. A row is the median of the
rounds and the median ratio of a round; data_wait is the share of the time in which the network
here waited for its data, the mean of the rounds. What the views are is in parity.py; there is no
blur. mocov3 has no loop of lightly's in parity.py and is timed alone. With --out, methods that were
measured before stay in the file.

Needs lightly (pip install -r requirements-test.txt).
"""

import argparse
import importlib
import importlib.metadata
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import parity  # noqa: E402
from common import UserError, user_errors  # noqa: E402
from data import Loader, open_dataset  # noqa: E402
from record import warn_of  # noqa: E402
from run import parse_args  # noqa: E402
from step import environment  # noqa: E402

METHODS = "simclr", "moco", "mocov3", "byol", "simsiam", "dino"
UNTIMED = 10  # steps


def flags_of(options):
    flags = ["--data", options.data, "--recipe", options.recipe, "--workers", str(options.workers)]
    return flags + (["--data-dir", options.data_dir] if options.data_dir else [])


def here(method, options):
    """-> images per second of METHOD.py, and the share of the time in which it waited for data."""
    steps = UNTIMED + options.steps
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / f"{method}.py"), *flags_of(options)]
        command += ["--max-steps", str(steps), "--log-every", "10", "--eval-every", "0"]
        command += ["--save-every", "0", "--output-dir", f"{folder}/run"]
        threads = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=threads)
        if done.returncode:
            said = done.stderr.strip() or f"status {done.returncode}"
            raise UserError(f"{method}.py stopped: {said.splitlines()[-1]}")
        rows = parity.read_json(Path(folder) / "run/metrics.jsonl")
    rows = [row for row in rows if "loss" in row and row["step"] > UNTIMED]
    rates = [row["images_per_sec"] for row in rows]  # each of the steps since the row before
    ends = [UNTIMED, *(row["step"] for row in rows)]
    steps = [end - start for start, end in itertools.pairwise(ends)]
    times = [number / rate for number, rate in zip(steps, rates)]  # over the batch
    waited = sum(time * row["data_wait"] for time, row in zip(times, rows))
    return sum(steps) / sum(times), waited / sum(times)


class PlainViews:
    """Two views of a PIL image, made by torchvision's transforms: SimCLR's without blur."""

    def __init__(self, args):
        from torchvision import transforms as t

        s = args.jitter_strength
        jitter = t.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
        self.view = t.Compose([
            t.RandomResizedCrop(args.image_size, (args.crop_min, 1.0)),
            t.RandomHorizontalFlip(),
            t.RandomApply([jitter], 0.8),
            t.RandomGrayscale(0.2),
            t.ToTensor(),
            t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ])  # fmt: skip

    def __call__(self, image):
        return [self.view(image), self.view(image)]


def there(method, options, plain):
    """-> images per second of lightly's loop, with its views or plain ones."""
    module = importlib.import_module(method)
    args = parse_args(module.Args, module.RECIPES, flags_of(options))
    args.method = method
    if method == "moco":
        args.bn_group = args.batch_size  # lightly's own loop has no groups of batch norm
    torch.manual_seed(args.seed)
    dataset = open_dataset(args.data, args.data_dir)
    loader = Loader(dataset, {}, {}, args.batch_size, args.seed, args.workers)
    backbone = module.image_encoder(module.build_model(args)).requires_grad_(True)
    size = args.image_size
    dim = backbone.eval()(torch.zeros(2, 3, size, size)).shape[1]
    peer = getattr(parity, method)(args, backbone.train(), dim)
    if plain:
        peer.views = PlainViews(args)
    ended = parity.train(peer, args, dataset, loader, UNTIMED + options.steps)
    return options.steps * args.batch_size / (ended[-1] - ended[UNTIMED])


def compare(method, options):
    """-> what goes into the record."""
    loops = {}
    if hasattr(parity, method):
        loops["lightly"] = lambda: there(method, options, plain=False)
        loops["torchvision"] = lambda: there(method, options, plain=True)
    waits = []

    def ours():
        rate, wait = here(method, options)
        waits.append(wait)
        return rate

    loops["here"] = ours
    rates = {name: [] for name in loops}
    for i in range(options.rounds):
        order = list(loops)
        if i % 2:
            order.reverse()
        for name in order:
            rates[name].append(loops[name]())
    found = {"rounds": options.rounds, "steps": options.steps, "rows": {}}
    found["date"] = time.strftime("%Y-%m-%d")
    for name, measured in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["here"], measured))
        row = {"images_per_second": statistics.median(measured), "here_over": ratio}
        found["rows"][name] = row
        print(f"{method:8} {name:12} {row['images_per_second']:7.0f} images/s, "
              f"here {ratio:.2f} times as fast", flush=True)  # fmt: skip
    found["rows"]["here"]["data_wait"] = statistics.mean(waits)
    print(f"{method:8} here         waited {statistics.mean(waits):.1%} of the time for data")
    return found


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--data", default="cifar10", help="named dataset or path")
    parser.add_argument("--data-dir", default="", help="where named datasets are")
    parser.add_argument("--recipe", default="cifar10-cpu", help="of the methods")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of a loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="of the loaders")
    parser.add_argument("--out", type=Path, help="also write the numbers here, as json")
    options = parser.parse_args()
    if options.steps < 1 or options.rounds < 1:
        raise UserError("--steps and --rounds must be at least 1")
    torch.set_num_threads(1)
    results = {}
    if options.out and options.out.exists():
        results = parity.read_json(options.out).get("results")
        if results is None:
            raise UserError(f"{options.out} is not of this script: use another --out")
    for method in options.methods:
        results[method] = compare(method, options)
        if options.out:
            record = environment() | {"data": options.data, "workers": options.workers}
            record |= {"lightly": importlib.metadata.version("lightly"), "results": results}
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    if options.out:
        warn_of([record["commit"]])


if __name__ == "__main__":
    with user_errors():
        main()
