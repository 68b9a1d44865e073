"""What a GPU has to tell, in a fixed time: tests, speed and memory, short trainings.

    python benchmarks/gpu.py --only tests --minutes 5        # results in $OUT, else in results/gpu/
    python benchmarks/gpu.py --only steps,data --minutes 9
    python benchmarks/gpu.py --only cifar --minutes 9 --data-dir data
    python benchmarks/gpu.py --only steps,data --minutes 5 --models clip_b16,clip_l14,dino_s16
    python benchmarks/gpu.py --miniature                     # tiny sizes on a CPU: does it run?

Without --only all parts share the time, and what does not fit is left out and named in the results.
The parts, in this order. Each runs in processes of its own and has a time limit:

    tests   pytest -m gpu, failures with their last lines; not_run counts what did not fit
    steps   time, memory and MFU of training steps: the documented commands at the batch of one GPU
            of eight, on random pixels that lie on the GPU and stay there (training gives them up),
            eager and with --compile
    data    the same loop fed by loader workers from JPEG files, against one batch repeated
    peers   benchmarks/side_by_side.py, where open_clip, lightly and transformers are installed
    cifar   simclr.py on CIFAR-10 for as many epochs as the time allows, and the seconds until the
            kNN classifier is right in 80% of the test images; next time byol, moco, simsiam, dino

An invocation continues a gpu.jsonl that is already in --out. Of the tests it leaves out those that
have passed on the same GPU with the same code and versions, and of the last part the methods that
have been trained with the same code. The first that is left gets all the time of that part, as 25
epochs reach 80% with none. SimSiam may not reach it at all: after 200 epochs with this batch
lightly publishes 76.4.

Every result is a line of gpu.jsonl, written at once, so that a machine that goes away leaves what
it has measured. What fails is a line too, and the next part starts. gpu.md has the same as tables,
gpu.log the last lines that every process has printed.

The steps are those of the method files: train() runs as it is, and only its loader is replaced. So
a step is everything between two batches: views, forward, losses, backward, optimizer, teacher, log.
MFU counts the matrix products and convolutions of an eager step, two operations for each
multiplication, against what a bfloat16 matrix product of 8192 x 8192 x 8192 reaches in the same
process. What activation checkpointing computes again takes its time and is not counted. Compilation
is not in any time: while the tests run, which leave the GPU mostly idle, it fills a cache on disk.
Without the tests nothing is compiled ahead, and few compiled rows fit: name fewer --models then.
Nor is compiling again, which flatters the compiled rows of ibot and dinov2: the one batch comes
with its masks, so that no shape changes, while in training the number of masked patches does.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import importlib.util
import itertools
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PARTS = {"tests": 110, "steps": 140, "data": 70, "peers": 40, "cifar": 100}  # shares of the time
# The most telling first: what the time does not allow is left out from the end. The batch is an
# eighth of the documented one, for the CLIPs of other sizes less: ViT-L/14 takes 78 GiB with 256.
# A batch that does not fit is halved.
MODELS = {
    "clip_b16": ("clip", "--data yfcc15m --batch-size 512"),
    "simclr_r50": ("simclr", "--data imagenet --batch-size 512"),
    "dino_s16": ("dino", "--data imagenet --batch-size 128"),
    "clip_l14": ("clip", "--data yfcc15m --arch vit_large_patch14 --batch-size 256"),
    "slip_b16": ("slip", "--data yfcc15m --batch-size 512"),
    "clip_b32": ("clip", "--data yfcc15m --arch vit_base_patch32 --batch-size 512"),
    "dinov2_l16": ("dinov2", "--data imagenet --batch-size 256"),
    "ibot_s16": ("ibot", "--data imagenet --batch-size 128"),
    "mocov3_s16": ("mocov3", "--data imagenet --batch-size 512"),
    "simclr_r18_cifar": ("simclr", "--data cifar10 --batch-size 512"),
}
# Compiled in this order, as far as the time allows.
COMPILED = ["clip_b16", "simclr_r50", "simclr_r18_cifar", "dino_s16", "clip_l14", "slip_b16"]
COMPILED += [name for name in MODELS if name not in COMPILED]
REAL = "clip_b16", "simclr_r50"  # fed with JPEG files
MINIATURE = {
    "clip_b16": ("clip", "--data shapes --batch-size 4"),
    "simclr_r50": ("simclr", "--data shapes --arch resnet10 --width 0.5 --batch-size 4"),
    "dino_s16": ("dino", "--data shapes --batch-size 4"),
}
# In this order. Their recipes for CIFAR-10 have no warm-up, in which a run of few epochs would end.
CIFAR = "simclr", "byol", "moco", "simsiam", "dino"
QUIET = "--eval-every 0 --save-every 0 --log-every 0"
TARGET = 80.0  # percent right of the kNN classifier on CIFAR-10


def record(part, **row):
    """Appends a line to gpu.jsonl, in one write: several processes do so."""
    row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
    line = json.dumps({"part": part, **row}) + "\n"
    with open(os.environ["GPU_RESULTS"], "ab", buffering=0) as file:
        file.write(line.encode())


def checksum(pattern):
    """Of the content of these files, which tells what code a result is of where git does not."""
    files = sorted(ROOT.glob(pattern))
    return f"{zlib.crc32(b''.join(file.read_bytes() for file in files)):08x}"


# ------------------------------- inside the training loops -------------------------------
# These run in the processes that measure, which import torch. The parent does not.
class Measured(Exception):
    """Raised from a loader when all is measured: train() ends without evaluation or checkpoint."""


class Clock:
    """Marks points in the stream of work and tells the seconds between two of them. On a GPU the
    host does not wait for that: it goes on as it does in training."""

    def __init__(self, device):
        import torch

        self.torch, self.gpu = torch, device.type == "cuda"

    def mark(self):
        if not self.gpu:
            return time.perf_counter()
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self):
        if self.gpu:
            self.torch.cuda.synchronize()

    def between(self, begin, end):
        """After wait()."""
        return begin.elapsed_time(end) / 1e3 if self.gpu else end - begin


class Meter:
    """Measures a training loop from inside its loader, where one step ends and the next begins."""

    def __init__(self, device, count_flops=True):
        self.clock, self.count_flops = Clock(device), count_flops
        self.flops, self.spans, self.counter, self.originals = None, [], None, {}

    def watch(self, views):
        """From now on the calls of these views are timed and their operations not counted."""
        from torch.utils.flop_counter import FlopCounterMode

        for cls in {type(view) for view in views} - set(self.originals):
            self.originals[cls] = original = cls.__call__

            def timed(view, x, params, original=original):
                begin = self.clock.mark()
                if self.counter:
                    with FlopCounterMode(display=False) as inner:
                        x = original(view, x, params)
                    self.flops -= inner.get_total_flops()
                else:
                    x = original(view, x, params)
                self.spans.append((begin, self.clock.mark()))
                return x

            cls.__call__ = timed

    def release(self):
        for cls, original in self.originals.items():
            cls.__call__ = original
        self.originals = {}

    def steps(self, source, call_views, job, warm):
        """Yields batches of the source after call_views(), which belongs to the step: `warm` of
        them, then as many as take job["seconds"]. Afterwards self.result describes the latter."""
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        for i in range(warm):
            if self.count_flops and i == 1:
                self.flops = 0
                with FlopCounterMode(display=False) as self.counter:
                    yield call_views(dict(next(source)))
                self.flops += self.counter.get_total_flops()
                self.counter = None
            else:
                yield call_views(dict(next(source)))
        first_peak = torch.cuda.max_memory_allocated() if self.clock.gpu else 0  # compiler included
        self.clock.wait()
        begin = time.perf_counter()
        yield call_views(dict(next(source)))
        self.clock.wait()
        number = job["seconds"] / (time.perf_counter() - begin)
        number = min(max(round(number), job["least"]), 400)
        if self.clock.gpu:
            torch.cuda.reset_peak_memory_stats()
        self.spans, waited, marks = [], 0.0, [self.clock.mark()]
        for _ in range(number):
            asked = time.perf_counter()
            batch = next(source)
            waited += time.perf_counter() - asked
            yield call_views(dict(batch))
            marks.append(self.clock.mark())
        self.clock.wait()
        seconds = [self.clock.between(a, b) for a, b in zip(marks, marks[1:])]
        total, views = sum(seconds), sum(self.clock.between(*span) for span in self.spans)
        self.result = {"steps": number, "ms": 1e3 * total / number, "ms_min": 1e3 * min(seconds),
                       "ms_median": 1e3 * statistics.median(seconds), "waited": waited / total,
                       "views_share": views / total}  # fmt: skip
        if self.clock.gpu:
            self.result |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
                            "first_steps_peak_gib": first_peak / 2**30}  # fmt: skip


class Unread:
    """Stands for a dataset of which only the number of samples matters."""

    classes = None

    def __init__(self, name, captioned):
        self.name, self.captioned = name, captioned

    def __len__(self):
        return {"yfcc15m": 14_689_580, "imagenet": 1_281_167}.get(self.name, 50_000)

    def __getitem__(self, i):
        raise OSError("it has no samples")


class FullCaptions:
    """Stands for CLIP's tokenizer, which is no part of a step: start token, random ids, end token,
    77 in all. In a batch of YFCC15M at least one caption is that long, and all are padded to it."""

    def __init__(self, spec, context_length=77, captions=(), vocab_size=49408, data_dir=None, **_):
        self.context_length, self.vocab_size, self.eot = context_length, vocab_size, vocab_size - 1

    def __call__(self, caption, rng):
        middle = (rng.randrange(1, self.vocab_size - 2) for _ in range(self.context_length - 2))
        return [self.vocab_size - 2, *middle, self.eot]

    def to_json(self):
        return "{}"


def wait_for_go():
    """Until the parent says so. What comes before, imports and first weights, may overlap with
    another process's measurements."""
    sys.stdin.readline()


def synthetic_loader(meter, job):
    """-> class of a loader that repeats one batch of random pixels, which lies on the device."""
    import torch

    from data import Loader

    class Synthetic(Loader):
        def call_views(self, batch):
            return batch  # Meter.steps() does it, as a part of a step

        def batches(self, start, stop):
            call_views = super().call_views
            rngs, samples = [random.Random(i) for i in range(self.batch_size)], []
            for i, rng in enumerate(rngs):
                sample = {"index": i, "label": -1, "skipped": {}}
                for name, view in self.views.items():
                    pixels = torch.randint(256, (view.size, view.size, 3), dtype=torch.uint8)
                    sample[name] = pixels.permute(2, 0, 1), view.sample(rng)
                samples.append(sample | {name: text("", rng) for name, text in self.texts.items()})
            batch = self.collate(samples)
            batch.pop("skipped")
            if job.pop("gate", False):
                wait_for_go()
            batch = self.to_device(batch)
            meter.watch(self.views.values())
            if job.get("warm"):  # only to fill the compiler's cache
                yield from ((step, call_views(dict(batch))) for step in range(2))
                raise Measured
            source = itertools.repeat(batch)
            yield from enumerate(meter.steps(source, call_views, job, warm=4))
            raise Measured

        def check_bad(self):
            pass

    return Synthetic


def real_loader(meter, job):
    """-> class of a loader that reads files, measured, and then repeats one of its batches,
    measured too. What the workers had read ahead is thrown away first, or they would seem fast."""
    from data import Loader

    class Real(Loader):
        def call_views(self, batch):
            return batch  # Meter.steps() does it, as a part of a step

        def batches(self, start, stop):
            call_views = super().call_views
            if job.pop("gate", False):
                wait_for_go()
            real = (batch for _, batch in super().batches(0, 10**6))
            batch = next(real)
            meter.watch(self.views.values())
            step = 0
            for _ in range(3):  # compiles, or not
                yield step, call_views(dict(batch))
                step += 1
            meter.clock.wait()
            for _ in range(2 * self.workers):
                next(real)
            for one in meter.steps(real, call_views, job, warm=max(2, self.workers)):
                yield step, one
                step += 1
            job["real"], job["real_steps"] = meter.result, (step - meter.result["steps"], step)
            real.close()
            if not job.get("real_only"):
                time.sleep(job["pause"])  # until the workers have gone
                for one in meter.steps(itertools.repeat(batch), call_views, job, warm=2):
                    yield step, one
                    step += 1
            raise Measured

        def check_bad(self):
            pass  # it would wait for the GPU, and so few files make an epoch of every step

    return Real


def attempt(job, loader, flags, meter):
    """Runs train() of job["method"] with that loader until all is measured. -> rows of its
    metrics.jsonl."""
    module = importlib.import_module(job["method"])
    replaced = {"Loader": loader, "language_set": lambda *_: None}
    replaced |= {"probe_sets": lambda *_: (None,) * 3, "evaluation_set": lambda *_: None}
    if "--tokenizer" not in flags:
        replaced["Tokenizer"] = FullCaptions
    if job["part"] == "steps":
        replaced["open_dataset"] = lambda name, *_: Unread(name, hasattr(module, "Tokenizer"))
    before = {name: getattr(module, name) for name in replaced if hasattr(module, name)}
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    handlers = {number: signal.getsignal(number) for number in numbers}
    with tempfile.TemporaryDirectory(dir=job["temp"]) as directory:
        flags = [*flags, *QUIET.split(), "--output-dir", directory + "/run", *job.get("extra", [])]
        try:
            for name in before:
                setattr(module, name, replaced[name])
            module.train(module.parse_args(module.Args, module.RECIPES, flags))
        except Measured:
            file = Path(directory, "run", "metrics.jsonl")
            return [json.loads(line) for line in file.read_text().splitlines()]
        finally:
            meter.release()
            for name in before:
                setattr(module, name, before[name])
            for number, handler in handlers.items():
                signal.signal(number, handler)  # those of a Run keep its model alive
    raise RuntimeError("train() ended before all was measured")


def matmul_rate(device, size=8192):
    """-> operations a second of a bfloat16 matrix product of random numbers, median of 30."""
    import torch

    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    clock, marks = Clock(device), []
    for _ in range(34):
        marks.append(clock.mark())
        a @ b
    marks.append(clock.mark())
    clock.wait()
    seconds = [clock.between(x, y) for x, y in zip(marks[4:], marks[5:])]
    return 2 * size**3 / statistics.median(seconds)


def free_memory():
    import torch

    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if (kept := torch.cuda.memory_allocated()) > 2**27:
            print(f"warning: {kept / 2**30:.1f} GiB of the last run are still in use", flush=True)


def with_batch(flags, batch):
    """Command line words with another batch size."""
    words = flags.split()
    words[words.index("--batch-size") + 1] = str(batch)
    return words


def prepare(job):
    """-> device, after imports and what a miniature does differently."""
    import torch

    importlib.import_module(job["method"])
    if job["miniature"]:
        compile_module = torch.nn.Module.compile
        torch.nn.Module.compile = lambda module: compile_module(module, backend="eager")
    device = "cpu" if job["miniature"] else "cuda"
    job["extra"] = ["--device", device, *job.get("extra", [])]
    return torch.device(device)


def in_full(flags, error):
    import torch

    text = "out of memory" if isinstance(error, torch.OutOfMemoryError) else repr(error)
    print(f"{' '.join(flags)}: {traceback.format_exc()}", flush=True)
    return text[:500]


def part_steps(job):
    """One model, its modes one after the other."""
    import torch

    device = prepare(job)
    batch = int(job["flags"].split()[-1])
    module = importlib.import_module(job["method"])
    args = module.parse_args(module.Args, module.RECIPES, job["flags"].split() + job["extra"])
    kept = getattr(args, "grad_checkpointing", "none")
    if kept == "full" and "eager" in job["modes"]:
        # FlopCounterMode would count the products that the backward pass computes again, and MFU be
        # a third too high. So they are counted without that, in a quarter of the batch, which fits.
        few, meter, brief = batch // 4, Meter(device), job | {"seconds": 0.0, "least": 1}
        flags = [*with_batch(job["flags"], few), "--grad-checkpointing", "none"]
        try:
            attempt(brief, synthetic_loader(meter, brief), flags, meter)
            job["flops"] = meter.flops / few
        except Exception as problem:  # without them the steps are measured all the same
            error = f"operations were not counted: {in_full(flags, problem)}"
            record("steps", model=job["model"], batch=few, grad_checkpointing="none", error=error)
        if "gate" not in brief:  # it has waited
            job.pop("gate", None)
        free_memory()
    for mode in job["modes"]:
        while True:
            meter = Meter(device, count_flops=mode == "eager" and kept != "full")
            flags = with_batch(job["flags"], batch) + ["--compile"] * (mode == "compiled")
            error = None
            try:
                attempt(job, synthetic_loader(meter, job), flags, meter)
            except Exception as problem:
                error = in_full(flags, problem)
            free_memory()
            if error != "out of memory" or batch < 16:
                break
            record("steps", model=job["model"], mode=mode, batch=batch, error=error)
            batch //= 2
        if job.get("warm"):  # a smaller batch has another graph
            return int(bool(error) or batch < int(job["flags"].split()[-1]))
        row = {"model": job["model"], "mode": mode, "batch": batch, "grad_checkpointing": kept}
        if error:
            record("steps", **row, error=error)
            continue
        if meter.flops:
            job["flops"] = meter.flops / batch
        row |= meter.result | {"images_per_s": 1e3 * batch / meter.result["ms"]}
        rate = matmul_rate(device, 256 if job["miniature"] else 8192)
        row["matmul_tflops"] = rate / 1e12
        if job.get("flops"):
            row["gflop_per_image"] = job["flops"] / 1e9
            row["tflops"] = job["flops"] * row["images_per_s"] / 1e12
            row["mfu"] = row["tflops"] * 1e12 / rate
        gpu = torch.cuda.get_device_name() if device.type == "cuda" else "none"
        record("steps", **row, gpu=gpu, command=f"{job['method']}.py {' '.join(flags)}")
    return 0


# ------------------------------- tests -------------------------------
def reporter():
    """-> pytest plugin: every outcome is a result at once, as the time limit may end the rest."""
    import pytest

    class Reporter:
        collected = 0

        def pytest_collection_finish(self, session):
            self.count(len(session.items))

        @pytest.hookimpl(optionalhook=True)
        def pytest_xdist_node_collection_finished(self, node, ids):
            self.count(len(ids))

        def count(self, number):
            if number and not self.collected:
                self.collected = number
                record("tests", collected=number)

        def pytest_collectreport(self, report):
            if report.outcome == "failed":
                lines = report.longreprtext.splitlines()[-12:]
                record("tests", test=report.nodeid, outcome="failed", seconds=0.0, last_lines=lines)

        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.outcome != "passed":
                row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
                if report.outcome == "failed":
                    row["last_lines"] = report.longreprtext.splitlines()[-12:]
                elif report.outcome == "skipped":
                    row["reason"] = str(report.longrepr)[-200:]
                record("tests", **row)

    return Reporter()


def part_tests(job):
    """pytest -m gpu, of the files that have such tests: others may need absent packages."""
    import pytest

    os.chdir(ROOT)
    # Of each pytest process, as they share the cores.
    os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "2"
    files = [str(f) for f in sorted(Path("tests").glob("test_*.py")) if "mark.gpu" in f.read_text()]
    flags = ["-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    if job["miniature"]:
        flags += ["-k", "test_fused_adamw_is_plain_adamw or test_automatic_precision"]
    elif importlib.util.find_spec("xdist"):
        processes = max(2, min(10, (os.cpu_count() or 2) * 5 // 8))
        flags += ["-n", str(processes), "--dist", "worksteal"]
    flags += [f"--deselect={test}" for test in job["passed"]]
    return int(pytest.main(flags, plugins=[reporter()]))


# ------------------------------- data -------------------------------
def photographs(folder, number, size=(500, 375)):
    """Writes a tar of JPEG files and long captions, as img2dataset does: parts of scikit-learn's
    two photos, which take about as long to decode as ImageNet's."""
    import io
    import tarfile

    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = random.Random(0)
    photos = [Image.fromarray(array) for array in load_sample_images().images]
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in range(400)]
    with tarfile.open(folder / "train-0000.tar", "w") as tar:
        for i in range(number):
            photo = photos[i % 2]
            left, top = (rng.randint(0, a - b) for a, b in zip(photo.size, size))
            photo = photo.crop((left, top, left + size[0], top + size[1]))
            jpeg = io.BytesIO()
            photo.save(jpeg, "JPEG", quality=90)
            caption = " ".join(rng.choices(words, k=90))  # cut to 77 tokens, as FullCaptions has
            for ending, content in (("jpg", jpeg.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i:06}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def part_data(job):
    """One model on files, then on a batch of them repeated."""
    device, data = prepare(job), job["data"]
    batch = int(job["flags"].split()[-1])
    if not data:
        data = job["temp"] + "/photos_" + job["model"]
        os.mkdir(data)
        photographs(Path(data), 12 if job["miniature"] else batch + 256)
    recipe = job["flags"].split()[1]
    flags = with_batch(job["flags"], batch) + ["--workers", str(job["workers"])]
    flags[1] = data
    # The learning rate stays close to 0, as the warm-up never ends: only the speed is of interest.
    flags += ["--recipe", recipe, "--epochs", "1000000", "--warmup-epochs", "1000000"]
    if hasattr(importlib.import_module(job["method"]), "Tokenizer"):
        flags += ["--tokenizer", "train"]
    flags += ["--compile"] * (job["mode"] == "compiled")
    job["extra"] = [*job.get("extra", []), "--log-every", "10"]
    meter = Meter(device, count_flops=False)
    rows = attempt(job, real_loader(meter, job), flags, meter)
    real, synthetic, (begin, end) = job["real"], meter.result, job["real_steps"]
    logged = [r for r in rows if begin + 10 <= r["step"] <= end and "data_wait" in r]
    row = {"model": job["model"], "files": job["name"], "mode": job["mode"], "batch": batch,
           "workers": job["workers"], "cpus": os.cpu_count(), "real_steps": real["steps"],
           "images_per_s": 1e3 * batch / real["ms"], "data_wait": real["waited"],
           "synthetic_images_per_s": 1e3 * batch / synthetic["ms"],
           "real_over_synthetic": synthetic["ms"] / real["ms"]}  # fmt: skip
    if logged:
        row["data_wait_logged"] = statistics.mean(r["data_wait"] for r in logged)
        row["images_per_s_logged"] = statistics.mean(r["images_per_sec"] for r in logged)
    record("data", **row)
    return 0


# ------------------------------- CIFAR-10 -------------------------------
def tiny_cifar(folder, train=16, val=8):
    """Writes as many drawn pictures in the form of CIFAR-10, with made-up labels."""
    import io

    import numpy as np
    from PIL import Image

    from data import decode, open_dataset

    folder.mkdir(parents=True)
    shapes = open_dataset("shapes")
    (folder / "classnames.txt").write_text("this\nthat\n")
    for split, first, number in (("train", 0, train), ("val", train, val)):
        files, labels = [], []
        for i in range(first, first + number):
            jpeg = io.BytesIO()
            pixels = decode(shapes[i].image).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).resize((32, 32)).save(jpeg, "JPEG")
            files.append(np.frombuffer(jpeg.getvalue(), np.uint8))
            labels.append(i % 2)
        offsets = np.cumsum([0, *map(len, files)], dtype=np.int64)
        labels = np.array(labels, np.uint8)
        file = folder / f"{split}.npz"
        np.savez(file, jpeg=np.concatenate(files), offsets=offsets, labels=labels)


class Evaluations:
    """knn_eval with the whole training set as its bank and all test images there are, timed."""

    def __init__(self, tell, knn_eval, workers):
        self.tell = tell
        self.knn_eval, self.options = knn_eval, {"max_train": 0, "max_val": 0, "workers": workers}
        self.spent, self.began, self.points = 0.0, None, []

    def __call__(self, encoder, bank, val, view, device):
        begin = time.perf_counter()
        scores = self.knn_eval(encoder, bank, val, view, device, **self.options)
        if self.began:
            point = {"knn_top1": scores["knn_top1"], "seconds": begin - self.began,
                     "training_seconds": begin - self.began - self.spent}  # fmt: skip
            self.points.append(point)
            self.tell(evaluation=len(self.points), **point)
        self.spent += time.perf_counter() - begin
        return scores

    def start(self):
        self.began, self.spent = time.perf_counter(), 0.0


def part_cifar(job):
    """Measures images/s and how long an evaluation takes, fits a schedule to the time that is left,
    and trains it."""
    import torch

    device = prepare(job)
    tell = functools.partial(record, "cifar", method=job["method"])
    method = importlib.import_module(job["method"])
    flags = [*job["flags"].split(), "--workers", str(job["workers"]), "--data-dir", job["data_dir"]]
    flags += ["--compile"] * (job["mode"] == "compiled")
    batch = method.parse_args(method.Args, method.RECIPES, flags).batch_size
    meter = Meter(device, count_flops=False)
    fast = job | {"real_only": True}
    attempt(fast, real_loader(meter, fast), [*flags, "--epochs", "100000"], meter)
    free_memory()
    speed = 1e3 * batch / meter.result["ms"]

    flags += job.get("extra", [])
    args = method.parse_args(method.Args, method.RECIPES, flags)
    knn_eval, bank, val = method.probe_sets(args)
    evaluate = Evaluations(tell, knn_eval, job["workers"])
    torch.manual_seed(args.seed)
    model = method.build_model(args).to(device, memory_format=torch.channels_last)
    scores = evaluate(method.image_encoder(model), bank, val, method.eval_view(args), device)
    steps_per_epoch = len(bank) // batch
    # Five seconds start the workers and compile; five more write the checkpoint and the curves.
    # Eight evaluations show the way. A tenth is kept back, as a run that is cut off says little.
    seconds = job["deadline"] - time.time() - 10 - 8 * evaluate.spent
    epochs = max(1, math.floor(0.9 * seconds * speed / (steps_per_epoch * batch)))
    epochs = 2 if job["miniature"] else epochs
    every = math.ceil(epochs / 8) * steps_per_epoch
    tell(images_per_s=speed, data_wait=meter.result["waited"], mode=job["mode"],
         workers=job["workers"], train=len(bank), val=len(val), epochs=epochs,
         untrained_knn_top1=scores["knn_top1"], evaluation_seconds=evaluate.spent)  # fmt: skip
    flags += ["--epochs", str(epochs), "--eval-every", str(every), "--save-every", "0"]
    flags += ["--output-dir", f"{job['temp']}/cifar_{job['method']}"]
    method.probe_sets = lambda *_: (evaluate, bank, val)
    evaluate.start()
    method.train(method.parse_args(method.Args, method.RECIPES, flags))
    reached = [point["seconds"] for point in evaluate.points if point["knn_top1"] >= job["target"]]
    tell(epochs=epochs, last_knn_top1=evaluate.points[-1]["knn_top1"],
         best_knn_top1=max(point["knn_top1"] for point in evaluate.points), target=job["target"],
         seconds_to_target=reached[0] if reached else None,
         seconds=time.perf_counter() - evaluate.began)  # fmt: skip
    return 0


def part_peers(job):
    """benchmarks/side_by_side.py, method after method, whose output is its own."""
    file, code = Path(job["temp"], "peers.json"), 0
    for method in ("clip", "dino", "simclr", "byol", "moco", "simsiam"):
        command = [sys.executable, str(ROOT / "benchmarks/side_by_side.py"), "--methods", method,
                   "--rounds", "10", "--clip-batch", "256", "--batch", "512", "--dino-batch", "64",
                   "--out", str(file)]  # fmt: skip
        code |= subprocess.run(command).returncode
        if file.exists():
            found = json.loads(file.read_text())["results"]
            if method in found:
                record("peers", method=method, **found[method])
    return code


# ------------------------------- the parent -------------------------------
class Child:
    """A part in processes of its own. They bear a mark in their environment, since some leave the
    process group, and what is left of them would disturb the next part."""

    every = []

    def __init__(self, job, temp):
        self.job, self.mark = job, f"GPU_CHILD={os.getpid()}-{len(Child.every)}"
        self.name = "_".join(filter(None, (job["part"], job.get("model"), job.get("name"))))
        self.name += "_warm" * bool(job.get("warm"))
        self.log = Path(temp, self.name + ".log")
        command = [sys.executable, __file__, "--job", json.dumps(job)]
        environment = os.environ | dict([self.mark.split("=")])
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        Child.every.append(self)

    def go(self):
        with contextlib.suppress(OSError):  # it has failed before
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()

    def wait(self, seconds):
        """-> exit status, or None if it had to be ended."""
        try:
            self.process.wait(max(1.0, seconds))
            code = self.process.returncode
        except subprocess.TimeoutExpired:
            code = None
        self.end()
        return code

    def end(self):
        for file in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has gone, or is not ours
                if self.mark.encode() in file.read_bytes().split(b"\0"):
                    os.kill(int(file.parent.name), signal.SIGKILL)
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()

    def last_lines(self, number=12):
        return self.log.read_text(errors="replace").splitlines()[-number:]


class Session:
    """What the parts of one invocation share: time, files and rows."""

    def __init__(self, args, temp):
        self.args, self.temp, self.began = args, temp, time.monotonic()
        self.out = Path(args.out).resolve()  # the tests run elsewhere
        self.out.mkdir(parents=True, exist_ok=True)
        self.results, self.rows, self.reading = self.out / "gpu.jsonl", [], threading.Lock()
        self.results.touch()
        self.read = len(self.results.read_bytes())  # of another invocation
        os.environ["GPU_RESULTS"] = str(self.results)
        self.end = self.began + 60 * args.minutes
        # For each measurement: its seconds, at least so many steps, the pause after loader workers.
        workers = max(1, (os.cpu_count() or 1) - 2)
        self.job = {"seconds": 3, "least": 5, "pause": 2, "workers": workers}
        if args.miniature:
            self.job = {"seconds": 0.05, "least": 2, "pause": 0.1, "workers": 2}
        self.job |= {"miniature": args.miniature, "temp": temp}
        self.warmed = set()
        self.shares = {part: PARTS[part] for part in args.only}
        if "peers" in self.shares and self.missing_peers():
            self.shares["peers"] = 1
        no_cifar = not self.folder("cifar10", "train.npz") and not args.miniature
        if "cifar" in self.shares and no_cifar:
            self.shares["cifar"] = 1

    def machine(self):
        """What a reader of the results has to know of the machine."""
        from importlib import metadata

        versions = {}
        for name in ("torch", "torchvision", "numpy", "pillow", "tokenizers"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        shared = shutil.disk_usage("/dev/shm").total / 2**30 if Path("/dev/shm").exists() else 0.0
        gpu, commit = "none", ""
        query = ["nvidia-smi", "--format=csv,noheader",
                 "--query-gpu=name,memory.total,driver_version"]  # fmt: skip
        with contextlib.suppress(OSError):
            if not self.args.miniature:
                gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip() or gpu
        with contextlib.suppress(OSError):
            git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        code = {"source": checksum("*.py"), "tests": checksum("tests/*.py")}
        record("machine", date=time.strftime("%Y-%m-%d %H:%M"), commit=commit, **code, gpu=gpu,
               cpus=os.cpu_count(), dev_shm_gib=shared, **versions,
               python=sys.version.split()[0], command=" ".join(sys.argv))  # fmt: skip
        self.news()

    def recorded(self):
        """All rows of gpu.jsonl, of earlier invocations too, each with the source it is of."""
        rows, source = [], {}
        for line in self.results.read_text().splitlines():
            row = json.loads(line)
            if row["part"] == "machine":
                source = {"source": row["source"]} if "source" in row else {}
            rows.append(row | source)
        return rows

    def passed_before(self):
        """Tests whose last outcome is that they have passed, on this GPU with this code."""
        rows, outcomes = self.recorded(), {}
        now = [row for row in rows if row["part"] == "machine"][-1]
        same = False
        for row in rows:
            if row["part"] == "machine":
                names = "source", "tests", "gpu", "python", "torch", "torchvision"
                same = all(row.get(name) == now.get(name) for name in names)
            elif same and "outcome" in row:
                outcomes[row["test"]] = row["outcome"]
        return [test for test, outcome in outcomes.items() if outcome == "passed"]

    def say(self, text):
        line = f"[{time.monotonic() - self.began:5.0f} s] {text}"
        print(line, flush=True)
        with open(self.out / "gpu.log", "a") as file:
            file.write(line + "\n")

    def news(self):
        """Reads what the children have recorded since, and prints it."""
        with self.reading, open(self.results, "ab+") as file:  # two threads do so
            file.seek(self.read)
            text = file.read()
            text = text[: text.rfind(b"\n") + 1]
            self.read += len(text)
        fresh = [json.loads(line) for line in text.splitlines()]
        self.rows += fresh
        for row in fresh:
            if row["part"] != "tests" or row.get("outcome") == "failed":
                shown = {k: v for k, v in row.items() if k != "last_lines"}
                self.say(", ".join(f"{k} {v}" for k, v in shown.items()))
            for line in row.get("last_lines", []):
                self.say("    " + line)
        return fresh

    def finish(self, child, seconds):
        """Waits for a child; a failure becomes a row. -> whether all went well."""
        code = child.wait(seconds)
        self.news()
        with open(self.out / "gpu.log", "a") as file:
            file.write(f"--- {child.name}\n" + "\n".join(child.last_lines(40)) + "\n---\n")
        if code == 0 or child.job["part"] == "tests" and code in (1, 5):
            return True  # 1: some tests have failed; 5: none was left to run
        error = f"ended at its limit of {seconds:.0f} s" if code is None else f"exit status {code}"
        record(child.job["part"], process=child.name, error=error, last_lines=child.last_lines())
        self.news()
        return False

    def left(self, part):
        """Seconds until a part's share of the time ends. What one part leaves, the next may use."""
        until = dict(zip(self.shares, itertools.accumulate(self.shares.values())))
        share = until[part] / sum(self.shares.values())
        return self.began + share * (self.end - self.began) - time.monotonic()

    # The parts
    def tests(self):
        """The tests, and beside them the compiler, whose graphs are kept on disk."""
        passed_before = self.passed_before()
        child = Child(self.job | {"part": "tests", "passed": passed_before}, self.temp)
        stop = threading.Event()
        compiler = threading.Thread(target=self.compile_all, args=(stop,))
        if not self.args.miniature and "steps" in self.args.only:
            compiler.start()
        limit = self.left("tests") - 3
        self.finish(child, limit)
        stop.set()
        if compiler.ident:
            compiler.join()
        rows = [r for r in self.rows if r["part"] == "tests" and "outcome" in r]
        counts = {o: sum(r["outcome"] == o for r in rows) for o in ("passed", "failed", "skipped")}
        collected = sum(r.get("collected", 0) for r in self.rows)
        slowest = sorted(rows, key=lambda r: -r["seconds"])[:3]
        slowest = {r["test"].split("::")[-1]: round(r["seconds"]) for r in slowest}
        counts |= {"passed_before": len(passed_before), "not_run": max(0, collected - len(rows))}
        record("tests", **counts, slowest=slowest)
        self.news()

    def compile_all(self, stop):
        for model in self.compiled():
            if stop.is_set() or self.left("tests") < 15:
                return
            child = Child(self.step_job(model, ["compiled"]) | {"warm": True}, self.temp)
            if self.finish(child, self.left("tests")):
                self.warmed.add(model)
            self.say(f"compiled ahead: {', '.join(sorted(self.warmed)) or 'nothing yet'}")

    def models(self):
        if self.args.miniature:
            return MINIATURE
        return {name: MODELS[name] for name in self.args.models or MODELS}

    def compiled(self):
        return [name for name in COMPILED if name in self.models()]

    def step_job(self, model, modes):
        method, flags = self.models()[model]
        rows = [r for r in self.rows if r["part"] == "steps" and r.get("model") == model]
        flops = [r["gflop_per_image"] * 1e9 for r in rows if "gflop_per_image" in r]
        return self.job | {"part": "steps", "model": model, "method": method, "flags": flags,
                           "modes": modes, "flops": flops[-1] if flops else None}  # fmt: skip

    def steps(self):
        """Every model eager, and compiled where that is quick; then the others compiled."""
        quick = self.compiled() if self.args.miniature else self.warmed
        jobs = [self.step_job(m, ["eager"] + ["compiled"] * (m in quick)) for m in self.models()]
        self.queue(jobs, "steps", limit=60, least=15)
        jobs = [self.step_job(m, ["compiled"]) for m in self.compiled() if m not in quick]
        self.queue(jobs, "steps", limit=75, least=40)

    def queue(self, jobs, part, limit, least):
        """The jobs one after another. While one runs, the next imports, builds its model, waits."""
        following = None
        for i, job in enumerate(jobs):
            if self.left(part) < least:
                names = (" ".join([j["model"], *j.get("modes", [j.get("name")])]) for j in jobs[i:])
                record(part, skipped=f"no time was left for {', '.join(names)}")
                self.news()
                break
            child = following or Child(job | {"gate": True}, self.temp)
            following = None
            child.go()
            if i + 1 < len(jobs) and self.left(part) > 2 * least:
                following = Child(jobs[i + 1] | {"gate": True}, self.temp)
            self.finish(child, min(limit, self.left(part)))
        if following:
            following.end()

    def data(self):
        jobs, folder = [], self.folder("flickr8k", "*.tar")
        for model in [m for m in REAL if m in self.models()]:
            method, flags = self.models()[model]
            mode = "compiled" if model in self.warmed else "eager"
            job = self.job | {"part": "data", "model": model, "method": method, "flags": flags,
                              "mode": mode, "data": "", "name": "photos of 500 x 375"}  # fmt: skip
            jobs.append(job)
            if folder and model == "clip_b16":  # eager, as batches have captions of several lengths
                jobs.append(job | {"data": str(folder), "name": "flickr8k", "mode": "eager"})
        if not folder:
            record("data", skipped="no folder flickr8k with tar files in --data-dir")
        jobs.sort(key=lambda job: job["name"] == "flickr8k")
        self.queue(jobs, "data", limit=60, least=15)

    def folder(self, name, pattern):
        base = Path(self.args.data_dir or os.environ.get("DATA_DIR") or ROOT / "data")
        return base / name if list((base / name).glob(pattern)) else None

    def missing_peers(self):
        needed = "open_clip", "lightly", "transformers"
        missing = [name for name in needed if not importlib.util.find_spec(name)]
        if missing:
            return f"{' and '.join(missing)} not installed"
        return "not in the miniature" if self.args.miniature else ""

    def peers(self):
        if reason := self.missing_peers():
            record("peers", skipped=reason)
            return self.news()
        return self.finish(Child(self.job | {"part": "peers"}, self.temp), self.left("peers"))

    def cifar(self):
        folder = self.folder("cifar10", "train.npz")
        if not folder and not self.args.miniature:
            record("cifar", skipped="no folder cifar10 with train.npz and val.npz in --data-dir")
            return self.news()
        source, rows = checksum("*.py"), [r for r in self.recorded() if "best_knn_top1" in r]
        known = {r["method"] for r in rows if r.get("source") == source}  # not of other code
        todo = [method for method in CIFAR if method not in known]
        if self.args.miniature:
            folder, todo = Path(self.temp, "data/cifar10"), todo[:1]
            tiny_cifar(folder)
        if not todo:
            record("cifar", skipped=f"{self.results} has every method")
            return self.news()
        for i, method in enumerate(todo):
            seconds = self.left("cifar") - 3
            if seconds < 40:
                record("cifar", skipped=f"no time was left for {', '.join(todo[i:])}")
                return self.news()
            self.train_cifar(method, folder, seconds)
        return None

    def train_cifar(self, method, folder, seconds):
        flags = "--data cifar10"
        if self.args.miniature:
            flags += " --batch-size 8 --arch resnet10 --width 0.5 --stem imagenet"
            flags += " --bn-group 4" * (method == "moco")
        warm = method == "simclr" and "simclr_r18_cifar" in self.warmed
        compiled = warm or seconds > 240 and not self.args.miniature
        mode = "compiled" if compiled else "eager"
        job = self.job | {"part": "cifar", "method": method, "flags": flags,
                          "mode": mode, "data_dir": str(folder.parent), "target": TARGET,
                          "name": method, "deadline": time.time() + seconds}  # fmt: skip
        self.finish(Child(job, self.temp), seconds)
        file = Path(self.temp, f"cifar_{method}", "metrics.jsonl")
        if file.exists():
            shutil.copy(file, self.out / f"cifar10_{method}_metrics.jsonl")

    def summary(self):
        """gpu.md: the rows of all invocations as tables, of each test the last outcome."""
        seconds, everything = time.monotonic() - self.began, self.recorded()
        lines = ["# benchmarks/gpu.py", "", f"The last invocation took {seconds:.0f} s.", ""]
        columns = {
            "machine": "date commit source gpu cpus torch command",
            "steps": "model mode batch ms ms_min images_per_s peak_gib reserved_gib "
                     "gflop_per_image tflops matmul_tflops mfu views_share source",
            "data": "model files mode batch workers images_per_s synthetic_images_per_s "
                    "real_over_synthetic data_wait data_wait_logged source",
            "cifar": "evaluation method knn_top1 seconds training_seconds source",
        }  # fmt: skip
        for part in ("machine", *PARTS):
            rows = [r for r in everything if r["part"] == part]
            if not rows:
                continue
            rows = list({r.get("test", i): r for i, r in enumerate(rows)}.values())
            lines += [f"## {part}", ""]
            names = columns.get(part, "").split()
            table = [r for r in rows if names and names[0] in r and "error" not in r]
            if table:
                lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
                for row in table:
                    cells = (row.get(name, "") for name in names)
                    cells = (f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells)
                    lines.append("| " + " | ".join(cells) + " |")
                lines.append("")
            others = [r for r in rows if r not in table]
            others = [r for r in others if r.get("outcome") not in ("passed", "skipped")]
            for row in others:
                last = row.get("last_lines", [])[-3:]
                row = {k: v for k, v in row.items() if k not in ("part", "last_lines")}
                lines.append("- " + ", ".join(f"{k}: {v}" for k, v in row.items()))
                lines += [f"      {line}" for line in last]
            lines.append("")
        (self.out / "gpu.md").write_text("\n".join(lines))
        print("\n".join(lines), flush=True)


def run_job(job):
    """In a child: one part, or one model of it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parts = {"tests": part_tests, "steps": part_steps, "data": part_data, "cifar": part_cifar}
    return (parts | {"peers": part_peers})[job["part"]](job)


def words(text):
    return text.split(",")


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--out", default=os.environ.get("OUT") or str(ROOT / "results/gpu"))
    parser.add_argument("--data-dir", default="", help="has cifar10/, flickr8k/, both or none")
    parser.add_argument("--only", type=words, default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--models", type=words, default=[], help=", ".join(MODELS))
    parser.add_argument("--miniature", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        sys.exit(run_job(args.job))
    for given, known in ((args.only, PARTS), (args.models, MODELS)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    args.only = [part for part in PARTS if part in args.only]
    needed = "torch", "torchvision", "numpy", "tokenizers", "PIL", "ftfy"
    if missing := [name for name in needed if not importlib.util.find_spec(name)]:
        names = ", ".join(missing).replace("PIL", "pillow")
        parser.error(f"install {names} first: pip install -r requirements.txt")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")))
    )
    os.environ["PYTHONUNBUFFERED"] = "1"
    if args.miniature:
        os.environ.update(GPU_TESTS_ON="cpu", CUDA_VISIBLE_DEVICES="")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="gpu_", ignore_cleanup_errors=True) as temp:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = temp + "/inductor"
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(8, os.cpu_count() or 1)))
        session = Session(args, temp)
        try:
            session.machine()
            for part in args.only:
                session.say(f"{part}: {session.left(part):.0f} s at most")
                try:
                    getattr(session, part)()
                except Exception:
                    record(part, error=traceback.format_exc()[-1500:])
                    session.news()
        finally:
            for child in Child.every:
                child.end()
            session.summary()


if __name__ == "__main__":
    main()
