"""GiB of GPU memory that one process of a training command needs, without a GPU and without data.

    python benchmarks/memory.py slip --data yfcc15m --gpus 8             # predicted, in seconds
    python benchmarks/memory.py dinov2 --recipe imagenet --gpus 8 --grad-checkpointing selective
    python benchmarks/memory.py clip --data yfcc15m --compile  # what a compiled model keeps
    python benchmarks/memory.py slip --recipe yfcc15m --gpus 8 --measure # on a GPU, beside that
    python benchmarks/memory.py slip --data yfcc15m --out results/memory.json

train() of the method file runs two steps as it is, with the flags of the command, on tensors that
have a shape and no content (torch's FakeTensorMode), under bf16 autocast, at the batch of one
process. Counted is every storage that an operation makes, from its birth to its death, so the
peak holds parameters, EMA copies, buffers, gradients, the optimizer's state, everything autograd
keeps, what is computed again by --grad-checkpointing, and what lives for a moment. The other
processes are played by constants: gathered features have the size of the global batch, DDP's
buckets that of the gradients. Masks and stochastic depth choose as many rows as they do on
average, and captions have full length. Where simclrv2.py takes a run, it gets a ResNet-50, or the
network that stands in its place: --teacher resnet152x3.

Not counted: the CUDA context, NCCL's buffers, workspaces of cuDNN and cuBLAS, and what the
allocator loses between blocks; leave 4 GiB or more for them. With --fsdp parameters, gradients and
optimizer are divided by the processes, and two blocks of student and teacher are whole.

With --compile the model is compiled by inductor up to the code, which is not generated: inductor's
passes and functorch's min-cut partitioner decide what is kept for the backward pass and what is
computed again, and the operations of the graphs run one by one. The graphs are those for a CPU.
What fusion saves of "peak" is not known, so only "kept for backward" says something then.

--measure runs the same two steps on random pixels on this machine's GPU and prints
torch.cuda.max_memory_allocated() beside the prediction. It is one process with the batch of one
of --gpus, so gathered features and buckets are those of --gpus there too.

--out writes what is predicted into a record of many commands: a row that it has of the same command
and --gpus is replaced, otherwise one is added at the end. docs/running.md has the table.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import json
import random
import sys
import time
import types
import weakref
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import init  # noqa: E402
from common import UserError, user_errors  # noqa: E402
from data import Loader  # noqa: E402
from evaluation.results import environment  # noqa: E402
from record import warn_of  # noqa: E402
from run import parse_args  # noqa: E402

GIB = 2**30
STEPS = 2  # the first one makes the optimizer's state, the second one meets it
SAMPLES = {"yfcc15m": 14_689_580, "cc12m": 10_900_000, "redcaps": 12_000_000, "cc3m": 2_900_000}
SAMPLES |= {"imagenet": 1_281_167, "coco": 118_287, "flickr30k": 29_000, "flickr8k": 6_000}


# ---------------------------------------- counting ----------------------------------------
class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations have made and that are still alive, and their peak."""

    def __init__(self, results=None):
        super().__init__()
        self.bytes, self.peak, self.kept, self.seen = 0, 0, 0, {}
        self.results = results or {}  # of operations that have to be replaced

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = self.results.get(func, func)(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.bytes += size
                    self.peak = max(self.peak, self.bytes)
                    self.seen[key] = weakref.ref(storage, functools.partial(self.gone, key, size))
        return out

    @classmethod
    def ignore_compile_internals(cls):
        return True  # or torch.compile() would leave alone what runs in this mode

    def gone(self, key, size, _):
        del self.seen[key]
        self.bytes -= size

    def backward_starts(self):
        self.kept = max(self.kept, self.bytes)


def on_average(args):
    """{operation: what it returns}, for those whose result depends on values, which tensors without
    content do not have. A mask chooses as many rows as it does on average."""
    aten = torch.ops.aten
    found = 0.15  # share that nonzero() finds: masked tokens of captions (declip.py)
    if hasattr(args, "drop_path"):
        found = 1 - args.drop_path  # samples that stochastic depth keeps (dinov2.py)
    masked = 0.0
    if hasattr(args, "mask_ratio"):
        masked = getattr(args, "mask_prob", 1.0) * args.mask_ratio  # slip_ablations.py masks all

    def item(x):
        return 1.0 if x.is_floating_point() else 0  # False for a bool

    def nonzero(x):
        return torch.empty(max(1, round(x.numel() * found)), x.ndim, dtype=torch.int64)

    def index(x, indices):
        mask = indices[0]
        if mask is None or mask.dtype != torch.bool:
            return aten.index.Tensor(x, indices)
        return x.new_empty(max(1, round(mask.numel() * masked)), *x.shape[mask.ndim :])

    def in_place(*_, **__):
        return None

    return {
        aten._local_scalar_dense.default: item,
        aten.nonzero.default: nonzero,
        aten.index.Tensor: index,
        aten._fused_adamw_.default: in_place,
    }


# ---------------------------------------- rehearsal ----------------------------------------
class Unread:
    """Stands for a dataset of which only the numbers of samples and classes matter."""

    captioned = True

    def __init__(self, name):
        self.name = name
        self.classes = [str(i) for i in range(1000 if name == "imagenet" else 10)]

    def __len__(self):
        return SAMPLES.get(self.name, 100_000)

    def __getitem__(self, i):
        raise ValueError("no sample is read")


class Labelled:
    """Stands for the mask that simclrv2.labelled_part() makes: the first images have labels."""

    def __init__(self, dataset, fraction, seed):
        self.count = round(fraction * len(dataset))

    def to(self, *_):
        return self

    nonzero = flatten = to

    def tolist(self):
        return range(self.count)

    def __getitem__(self, index):
        return index < self.count


class FullCaptions:
    """Stands for a tokenizer: every caption fills the context."""

    def __init__(self, spec, context_length=77, captions=(), vocab_size=49408, *_, **__):
        self.context_length, self.vocab_size = context_length, vocab_size
        self.sot, self.eot = vocab_size - 2, vocab_size - 1

    def __call__(self, caption, rng=None):
        return [self.sot, *[i % 100 + 1 for i in range(self.context_length - 2)], self.eot]

    def to_json(self):
        return "{}"


class Silent:
    """Stands for run.Run: keeps what is to be saved, writes nothing."""

    def __init__(self, method, args, loader, state, extra=None):
        self.loader, self.state, self.step, self.dir = loader, state, 0, Path("runs")
        self.epoch_steps = loader.steps_per_epoch
        self.total = self.last = args.epochs * self.epoch_steps

    def batches(self):
        return self.loader.batches(0, STEPS)

    def end_step(self, terms, **numbers):
        self.step += 1

    def say(self, text):
        pass

    def due(self, every, at_end=True):
        return False

    def agree_to_stop(self):
        return False

    def finish(self, *_, **__):
        return self.state


def make_batch(loader, b, device):
    """What the loader of a process yields before it calls the views, with random or no pixels."""
    few = min(b, 64)
    repeated = torch.arange(b) % few
    batch = {
        "index": torch.arange(b, device=device),
        "label": torch.zeros(b, dtype=torch.int64, device=device),
        "pixels": {},
        "params": {},
    }
    for name, view in loader.views.items():
        draws = [view.sample(random.Random(f"{name} {i}")) for i in range(few)]
        params = {}
        for key in draws[0]:
            values = [torch.as_tensor(draw[key]) for draw in draws]
            params[key] = torch.stack(values)[repeated].to(device)
        pixels = torch.randint(256, (b, view.size, view.size, 3), dtype=torch.uint8, device=device)
        batch["pixels"][name], batch["params"][name] = pixels.permute(0, 3, 1, 2), params
    for name, text in loader.texts.items():
        batch[name] = torch.tensor([text("a b c", random.Random(0))] * b, device=device)
    return batch


def earlier_stages(module, args):
    """-> checkpoints that simclrv2.py starts from, of random weights, None where it takes none."""
    found = []
    for run in (getattr(args, "checkpoint", ""), getattr(args, "teacher", "")):
        arch = run if run.startswith("resnet") else "resnet50"
        before = dict(arch=arch, stem="imagenet", width=1.0, image_size=224, head_layer=1)
        classes = Unread(args.data).classes
        if run:
            network = types.SimpleNamespace(**before, num_classes=len(classes))
            weights = module.build_model(network).state_dict()
            labels = json.dumps([classes, args.label_fraction, args.seed])
            found.append({"args": vars(network), "model": weights, "labels": labels})
        else:
            found.append(None)
    return found


@contextlib.contextmanager
def alone_among(module, gpus, device, marks, stages=()):
    """Replaces in a method file what needs data, runs, a run directory or other processes."""
    buckets = []

    def start(model, args, tokenizer=None):  # no weights of --init are read
        if getattr(args, "freeze", ""):
            init.freeze(model, args.freeze)

    class Repeated(Loader):
        def batches(self, start, stop):
            for step in range(start, stop):
                yield step, self.call_views(make_batch(self, self.batch_size // gpus, device))

    def gather(x):
        parts = [torch.empty_like(x) for _ in range(gpus)]
        return torch.cat([x, *parts[1:]])

    def distributed(model, *_, **__):
        buckets.extend(torch.empty_like(p) for p in model.parameters() if p.requires_grad)
        return model

    replaced = {
        "Run": Silent,
        "Loader": Repeated,
        "Tokenizer": FullCaptions,
        "open_dataset": lambda name, *_: Unread(name),
        "language_set": lambda *_: None,
        "probe_sets": lambda *_: (None, None, None),
        "evaluation_set": lambda *_: None,
        "captions": lambda *_: (),
        "open_synonyms": lambda *_: None,
        "init_weights": start,
        "add_mask_token": lambda tokenizer: tokenizer,
        "earlier_stages": lambda *_: stages,
        "labelled_part": Labelled,
        "init_distributed": lambda *_: device,
        "sync_batchnorm": lambda model, *_: model,
        "all_gather": gather,
        "all_reduce_mean": lambda x: x.detach() / gpus,
        "world_size": lambda: gpus,
        "rank": lambda: 0,
        "DistributedDataParallel": distributed,
        "fully_shard": lambda module, *_, **__: module,
    }
    backward = torch.Tensor.backward

    def watched(tensor, *args, **kwargs):
        marks()
        return backward(tensor, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(mock.patch("torch.distributed.get_rank", lambda *_: 0))
        stack.enter_context(mock.patch("torch.distributed.get_world_size", lambda *_: gpus))
        stack.enter_context(mock.patch("torch.Tensor.backward", watched))
        yield
    buckets.clear()


@contextlib.contextmanager
def partitioned(args):
    """With --compile models are compiled, but no code is generated: inductor's passes and the
    partitioner make a forward and a backward graph, and each of their operations is counted."""
    if not args.compile:
        yield
        return
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._inductor.compile_fx import compile_fx

    torch._dynamo.reset()  # graphs of a model that was counted before
    graphs = []

    def as_it_is(graph, inputs, **_):
        graphs.append(graph)
        return boxed_nop(graph, inputs)

    backend = functools.partial(compile_fx, inner_compile=as_it_is)
    with mock.patch("torch.compile", functools.partial(torch.compile, backend=backend)):
        yield
    if not graphs:
        raise UserError("this torch does not compile what is counted: use a newer one, or leave "
                        "out --compile")  # fmt: skip


def nbytes(tensors):
    """Of the distinct storages."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def parts(state, gpus):
    """Bytes of what lives through the whole step, by what it is."""
    model, optimizer = state["model"], state["optimizer"]
    trained = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    if "queue" in state:
        others += list(state["queue"].buffers())
    moments = [t for t in tree_leaves([optimizer.state[p] for p in trained]) if torch.is_tensor(t)]
    return {
        "parameters": nbytes(trained),
        "copies and buffers": nbytes(others),
        "gradients": nbytes(trained),
        "buckets of DDP": nbytes(trained) * (gpus > 1),
        "optimizer": nbytes(moments),
    }


def predict(module, args, gpus):
    """-> {part: bytes}: the peak of one process, what lives all the time, what the backward pass
    starts with."""
    fsdp = getattr(args, "fsdp", False)
    live = LiveBytes(on_average(args))
    device = torch.device("cpu")

    def view_on_gpu(original):  # the form that a GPU computes, which needs no values
        def call(view, x, params):
            with mock.patch("torch.compiler.is_compiling", lambda: True):
                return original(view, x, params)

        return call

    def copied(x, memo):  # copy.deepcopy() of a buffer wants a storage
        return memo.setdefault(id(x), x.detach().clone())

    views = [c for c in vars(module).values() if isinstance(c, type) and hasattr(c, "crop")]
    views = [c for c in views if "__call__" in vars(c)]
    with contextlib.ExitStack() as stack:
        for view in views:
            stack.enter_context(mock.patch.object(view, "__call__", view_on_gpu(view.__call__)))
        stack.enter_context(mock.patch("torch.Tensor.__deepcopy__", copied))
        stack.enter_context(mock.patch("torch.nn.Module.to", lambda model, *_, **__: model))
        stack.enter_context(mock.patch("torch.distributed.is_initialized", lambda: fsdp))
        stack.enter_context(partitioned(args))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        with LiveBytes(on_average(args)):  # not in `live`: a run is read into the CPU's memory
            stages = earlier_stages(module, args)
        stack.enter_context(alone_among(module, gpus, device, live.backward_starts, stages))
        stack.enter_context(live)
        state = module.train(args)
        if fsdp:
            state["model"], state["optimizer"] = state["optimizer"].items
        found = parts(state, gpus)
        if stages[1]:  # the teacher
            found["copies and buffers"] += nbytes(stages[1]["model"].values())
        static = sum(found.values())
        found["kept for backward"] = live.kept - static + found["gradients"]
        peak = live.peak
        if fsdp:
            found["buckets of DDP"] = 0
            blocks = len(state["model"].student.backbone.blocks)
            whole = 2 * (found["parameters"] + found["copies and buffers"]) / blocks
            peak += static * (1 / gpus - 1) + whole
        del state
    gc.collect()
    return {"peak": peak, **found}


def measure(module, args, gpus):
    """-> bytes at the peak of two steps on real tensors: torch.cuda.max_memory_allocated() or,
    without a GPU, counted."""
    device, stages = torch.device(args.device), earlier_stages(module, args)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        with alone_among(module, gpus, device, lambda: None, stages):
            module.train(args)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    live = LiveBytes()
    with partitioned(args), alone_among(module, gpus, device, live.backward_starts, stages), live:
        module.train(args)
    return live.peak


# ---------------------------------------- commands ----------------------------------------
def resolve(method, words):
    """-> module and Args of a command line. --recipe alone also names the data."""
    known = method.isidentifier() and (ROOT / f"{method}.py").exists()
    module = importlib.import_module(method) if known else None
    if not hasattr(module, "RECIPES"):
        raise UserError(f"{method} is not a method file: name one without .py, for example slip")
    if "--recipe" in words and "--data" not in words:
        words = [*words, "--data", words[words.index("--recipe") + 1].split("-")[0]]
    return module, parse_args(module.Args, module.RECIPES, words)


def say(found):
    for name, size in found.items():
        print(f"  {name:20} {size / GIB:8.2f} GiB", flush=True)


def read_record(path):
    """-> what the file holds, rows of commands, or a new record."""
    what = "benchmarks/memory.py METHOD FLAGS, predicted on tensors without content, no GPU"
    try:
        found = json.loads(path.read_text()) if path.exists() else {"what": what, "rows": []}
        if isinstance(found["rows"], list):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is no record of this script: use another --out")


def write_row(path, row):
    """Replaces the row of the same command and number of processes, or adds one."""
    record = read_record(path)
    same = [all(old.get(k) == row[k] for k in ("command", "gpus")) for old in record["rows"]]
    i = same.index(True) if any(same) else len(same)
    record["rows"][i : i + 1] = [row]
    path.write_text(json.dumps(record, indent=1) + "\n")


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain, allow_abbrev=False)
    parser.add_argument("method", help="name of a method file")
    parser.add_argument("--gpus", type=int, default=8, help="processes of the command")
    more = "also run two steps on this machine's GPU, if it has one"
    parser.add_argument("--measure", action="store_true", help=more)
    parser.add_argument("--out", type=Path, help="also write what is predicted here, as json")
    options, words = parser.parse_known_args()
    began = time.time()
    module, args = resolve(options.method, words)
    if options.out:
        read_record(options.out)  # not a minute later
    args.device, args.dtype = "cpu", "bf16"
    found = predict(module, args, options.gpus)
    command, batch = f"{options.method}.py {' '.join(words)}", args.batch_size // options.gpus
    print(f"{command}: batch {batch} on each of {options.gpus}")
    say(found)
    print(f"  predicted in {time.time() - began:.0f} s", flush=True)
    if options.out:
        gib = {name: round(size / GIB, 2) for name, size in found.items()}
        row = {"command": command, "gpus": options.gpus, "batch": batch, "gib": gib}
        row |= {"commit": environment(torch.device("cpu"))["commit"], "torch": torch.__version__}
        warn_of([row["commit"]])
        write_row(options.out, row)
    if options.measure:
        cuda = torch.cuda.is_available()
        args.device, began = "cuda:0" if cuda else "cpu", time.time()
        name = torch.cuda.get_device_name() if cuda else "the CPU"
        row = {"method": options.method, "flags": words, "gpus": options.gpus, "device": name,
               "predicted_gib": round(found["peak"] / GIB, 3)}  # fmt: skip
        try:
            row["measured_gib"] = round(measure(module, args, options.gpus) / GIB, 3)
            ratio = row["predicted_gib"] / row["measured_gib"]
            text = f"{row['measured_gib']:.2f} GiB, predicted / measured {ratio:.3f}"
        except torch.cuda.OutOfMemoryError as error:
            row["error"] = text = f"out of memory: {str(error)[:150]}"
        print(f"  measured on {name} in {time.time() - began:.0f} s: {text}")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    with user_errors():
        main()
