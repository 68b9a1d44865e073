"""What no paper claims: arguments, processes, gathers, schedules, LARS, checkpoints, the run directory and
its log. Every method file imports a handful of names from here, and nothing here knows any method."""

import argparse
import contextlib
import difflib
import fcntl
import importlib
import inspect
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend. Its text is one sentence that says how."""


@contextlib.contextmanager
def user_errors():
    """Around a script's work: what the user can mend becomes one sentence and exit status 2, no traceback."""
    try:
        yield
    except KeyboardInterrupt:  # before a Run listens to it: there is nothing to save
        os._exit(130)
    except (UserError, ModuleNotFoundError, torch.OutOfMemoryError) as error:
        hint = ""
        if isinstance(error, ModuleNotFoundError):
            hint = f"; `pip install {error.name}` or leave its flag out"
        elif isinstance(error, torch.OutOfMemoryError):
            error, hint = str(error).split(". ")[0], ": lower --batch-size or raise --accum-steps"
        alone = getattr(error, "alone", not isinstance(error, UserError))
        if os.environ.get("LOCAL_RANK", "0") == "0" or alone:  # else every process fails alike: say it once
            print(f"{Path(sys.argv[0]).name}: error: {error}{hint}", file=sys.stderr, flush=True)
        os._exit(2)  # without waiting for loader workers or for processes that still train
    finally:
        if dist.is_initialized():
            time.sleep(0.2)  # gloo's threads free tensors; destroying them holds the GIL they need
            dist.destroy_process_group()


# -------------------------------------------- arguments --------------------------------------------
def parse_args(Args, recipes: dict, argv: list[str] | None = None):
    """Dataclass -> command line -> dataclass. A field's trailing comment is its --help text; `--batch-size`
    and `--batch_size` are one flag. Precedence: flag over recipes[--recipe or --data] over field default.
    Raises UserError for an unknown flag (naming the nearest) or recipe and for a value of the wrong kind."""
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub("^--[^=]+", lambda match: match[0].replace("_", "-"), word) for word in argv]
    comments = dict(re.findall(r"^ +(\w+):.*?  # (.*)$", inspect.getsource(Args), re.M))
    parser = argparse.ArgumentParser(usage="%(prog)s [--flag VALUE ...]", allow_abbrev=False)
    for name, kind in typing.get_type_hints(Args).items():
        default = f" (default: {getattr(Args, name)})" if getattr(Args, name) else ""
        text = comments.get(name, "").replace("%", "%%") + default
        options = dict(default=argparse.SUPPRESS, help=text, dest=name)
        if kind is bool:
            options.update(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is typing.Literal:
            options.update(choices=typing.get_args(kind))
        else:  # `int | None` is read as int
            kind = next((t for t in typing.get_args(kind) if t is not type(None)), kind)
            options.update(type=kind, metavar=kind.__name__.upper())
        parser.add_argument("--" + name.replace("_", "-"), **options)

    def refuse(message):
        raise UserError(f"{message} (--help lists the flags)")

    parser.error = refuse
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=1)
        refuse(f"unknown argument {unknown[0]}" + (f", did you mean {near[0]}?" if near else ""))
    given = vars(given)
    if given.get("recipe") and given["recipe"] not in recipes:
        refuse(f"unknown recipe {given['recipe']}, choose one of {', '.join(recipes)}")
    args = Args(**{**recipes.get(given.get("recipe") or given.get("data", Args.data), {}), **given})
    for name, value in vars(args).items():
        default, zero = getattr(Args, name), name == "workers" or "(0:" in comments.get(name, "")
        least = int(type(default) is int and default > 0 and not zero)  # unless the comment says what 0 does
        if isinstance(value, int | float) and not least <= value < 2**63:
            bound = "above" if least else "at least"
            refuse(f"--{name.replace('_', '-')} {value} must be {bound} 0 and finite")
    return args


# -------------------------------------------- processes --------------------------------------------
def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def init_distributed(device: str = "") -> torch.device:
    """Joins torchrun's processes, if any; -> this one's device: `device`, or the first of cuda, mps, cpu that
    is there. Raises UserError when there is no such device, or fewer than processes."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = device or next(name for name in there if there[name])
    if not there.get(kind.split(":")[0]) or not re.fullmatch(r"\w+(:\d+)?", kind):
        raise UserError(f"--device {kind} is not available here, use {' or '.join(filter(there.get, there))}")
    if kind.startswith("cuda"):
        kind = kind if ":" in kind else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        if int(kind[5:]) >= torch.cuda.device_count():
            raise UserError(f"there is no {kind} among {torch.cuda.device_count()}, lower --nproc_per_node")
        torch.cuda.set_device(kind)
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind.startswith("cuda") else "gloo")
        all_reduce_mean(torch.zeros(1))  # all are connected, so that whoever leaves early disturbs nobody
    return torch.device(kind)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        torch.distributed.all_reduce(grad)
        return grad.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def all_gather(x: torch.Tensor) -> torch.Tensor:
    """(b, ...), b equal on all processes -> (world * b, ...) in rank order, with gradient: it sums over the
    processes what their losses say about this one's rows. With a local-mean loss and DDP's mean of gradients,
    the result is exactly the gradient of the global batch's mean loss. Without processes: x itself."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    return _AllGather.apply(x.contiguous())


def all_reduce_mean(x: torch.Tensor) -> torch.Tensor:
    """Mean over the processes, no gradient."""
    x = x.detach() / world_size()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


class GlooSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the global batch for CPU tensors, which torch's refuses. Needs running statistics."""

    def forward(self, x):
        if not self.training:
            statistics = self.running_mean, self.running_var
            return nn.functional.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)
        x = x.float()  # statistics in float32, as torch's
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        n = x.numel() // x.shape[1] * world_size()  # every process holds as many
        mean = all_gather(x.sum(dims)[None]).sum(0) / n
        var = all_gather((x - mean.view(shape)).square().sum(dims)[None]).sum(0) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        x = (x - mean.view(shape)) * (var + self.eps).rsqrt().view(shape)
        x = x if self.weight is None else x * self.weight.view(shape)
        return x if self.bias is None else x + self.bias.view(shape)


def sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Makes every batch norm of `model` use the statistics of the global batch. Parameter names stay."""
    if world_size() > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules() if world_size() > 1 else []:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = GlooSyncBatchNorm  # same parameters and buffers, other forward
    return model


# -------------------------------------------- optimisation --------------------------------------------
def mixed_precision(dtype: str, device: torch.device):
    """-> (autocast context, GradScaler). dtype "auto" is bf16 on GPUs that compute in it, fp16 on older ones,
    else fp32. The scaler only acts for fp16: bf16 and fp32 have range enough."""
    if dtype == "auto":
        ampere = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
        dtype = "bf16" if ampere else "fp16" if device.type == "cuda" else "fp32"
    low = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    autocast = torch.autocast(device.type, dtype=low) if dtype != "fp32" else contextlib.nullcontext()
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == "fp16")


def warmup_cosine(step, total, warmup, peak, start=0.0, end=0.0, reach_peak=False) -> float:
    """Value at 0-based `step`: linear from `start` to `peak` over `warmup` steps, then half a cosine to `end`
    at `total` (the last step of a run is one before it). reach_peak: the last step of the warm-up already has
    the peak (an inclusive linspace, as in SLIP and DINO); otherwise the first step after it does (SimCLR)."""
    if step < warmup:
        return start + (peak - start) * step / max(1, warmup - reach_peak)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888) with momentum, in its two published forms.

    d = g + weight_decay p, times trust |p| / |d| (1 if either norm is 0). lr_in_momentum: v = m v + lr d,
    p -= v (SimCLR); otherwise v = m v + d, p -= lr v (BYOL, MoCo v3). They differ whenever lr changes.
    A parameter group with exclude=True (biases, norms) has no decay, no scaling. step() takes no closure."""

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, trust=1e-3, lr_in_momentum=False):
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust, exclude=False)
        super().__init__(params, {**defaults, "lr_in_momentum": lr_in_momentum})

    @torch.no_grad()
    def step(self):
        for group, p in ((g, p) for g in self.param_groups for p in g["params"] if p.grad is not None):
            d, inside = p.grad, group["lr_in_momentum"]
            if not group["exclude"]:
                d = d + group["weight_decay"] * p
                p_norm, d_norm = p.norm(), d.norm()
                d = d * torch.where((p_norm > 0) & (d_norm > 0), group["trust"] * p_norm / d_norm, 1.0)
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            v = self.state[p]["momentum_buffer"].mul_(group["momentum"])
            p.sub_(v.add_(d, alpha=group["lr"] if inside else 1), alpha=1 if inside else group["lr"])


# -------------------------------------------- a run --------------------------------------------
def load_checkpoint(path: str | Path) -> dict:
    """A file or a run directory's checkpoint.pt, onto the CPU; unpickles no objects. Raises UserError."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is no checkpoint, is damaged or holds code, which is never run") from error


class Run:
    """The directory of one run (args.json, env.json, metrics.jsonl, checkpoint.pt, pictures) and its console.

    `state`: what a checkpoint restores, name -> object with state_dict and load_state_dict; `extra`: what it
    only carries. A directory that holds a checkpoint is continued from `self.step`, its log cut back to that
    step, so that a killed run leaves the log of one that was not. Raises UserError when the directory belongs
    to other arguments, a running process or no run."""

    MAY_CHANGE = ("max_steps workers output_dir data_dir device compile "
                  "log_every eval_every save_every tensorboard wandb profile")

    def __init__(self, method: str, args, loader, state: dict, extra: dict | None = None):
        self.method, self.args, self.loader, self.state, self.extra = method, args, loader, state, extra or {}
        self.epoch_steps = loader.steps_per_epoch
        self.total = args.epochs * self.epoch_steps  # steps of the schedule
        self.last = min(self.total, args.max_steps or self.total)  # steps of this run
        self.step, self.signal, self.stop, self.profiler = 0, 0, 0, None
        self.pending, self.warned, self.evaluation = [], set(), {}
        for name in filter(vars(args).get, ("tensorboard", "wandb")):
            importlib.import_module(name)  # a missing one ends every process alike, nothing written
        opened = ["", "", False]  # directory, error, is there a checkpoint: as the first process sees it
        if rank() == 0:
            try:
                opened[0] = str(self._open())
                opened[2] = Path(opened[0], "checkpoint.pt").exists()
            except UserError as error:
                opened[1] = str(error)
            except (OSError, ValueError) as error:
                opened[1] = f"{args.output_dir or 'runs/'} can hold no run ({error}), use another"
        if dist.is_initialized():
            dist.broadcast_object_list(opened)
        if opened[1]:
            raise UserError(opened[1])
        self.dir = Path(opened[0])
        if opened[2]:
            saved = load_checkpoint(self.dir)
            try:
                for name, item in state.items():
                    item.load_state_dict(saved[name])
                self.step, rng = saved["step"], saved["rng"][rank() % len(saved["rng"])]
            except (LookupError, RuntimeError, TypeError, ValueError) as error:
                raise UserError(f"{self.dir}/checkpoint.pt does not fit, use another --output-dir") from error
            torch.set_rng_state(rng[0])
            if len(rng) > 1 and torch.cuda.is_available():
                torch.cuda.set_rng_state(rng[1])
        quiet = rank() > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=self.last, initial=self.step, unit="step", dynamic_ncols=True, disable=quiet)
        self.writers = self._writers() if rank() == 0 else []
        size, n, at = args.batch_size, len(loader.dataset), f", continued at {self.step}" if self.step else ""
        self.say(" ".join(f"{k}={v}" for k, v in vars(args).items()))
        self.say(f"{method}: {n:,} samples, batch {size} = {world_size()} x {size // world_size()}, "
                 f"{self.epoch_steps} steps an epoch, {self.last} steps{at}, writing to {self.dir}")
        if args.profile and rank() == 0:
            self.profiler = torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=8, warmup=1, active=5, repeat=1),
                on_trace_ready=lambda profile: profile.export_chrome_trace(str(self.dir / "trace.json")))
            self.profiler.start()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        self.began = time.time()
        self._restart_clock()

    def _open(self) -> Path:
        if self.args.batch_size < 2:
            raise UserError("--batch-size 1 leaves no other sample to compare with: use at least 2")
        args = {"method": self.method, **vars(self.args)}
        name = "_".join([self.method, Path(args["data"]).stem, args["arch"], f"s{args['seed']}"])
        path = Path(args["output_dir"] or f"runs/{name}_{time.strftime('%Y%m%d-%H%M%S')}")
        path.mkdir(parents=True, exist_ok=True)
        if (path / "args.json").exists():
            before = json.loads((path / "args.json").read_text())
            changed = [k for k in args if k not in self.MAY_CHANGE.split() and before.get(k) != args[k]]
            if changed:
                was = ", ".join(f"{k}={before.get(k)} (now {args[k]})" for k in changed)
                raise UserError(f"{path} holds a run with {was}: use those values or another --output-dir")
        elif any(path.iterdir()):
            raise UserError(f"{path} is not empty and holds no run: choose another --output-dir")
        self.lock = open(path / ".lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path} is in use by a running process: choose another --output-dir") from None
        (path / "args.json").write_text(json.dumps(args, indent=1))
        return path

    def _writers(self) -> list:
        """Writes env.json and cuts the log back; -> functions of a row: metrics.jsonl, tensorboard, wandb."""
        env = {"command": shlex.join(sys.argv), "processes": world_size(), "cpus": os.cpu_count(),
               "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
               "torch": torch.__version__, "python": platform.python_version(), "host": platform.platform()}
        with contextlib.suppress(OSError):  # no git
            git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
            env["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        (self.dir / "env.json").write_text(json.dumps(env, indent=1))
        for name, text in self.extra.items():  # the tokenizer
            (self.dir / f"{name}.json").write_text(text)
        path = self.dir / "metrics.jsonl"
        lines = [s for s in path.read_text().splitlines() if s.endswith("}")] if path.exists() else []
        ends = self.step == self.last  # nothing is left to do: the end stays the end
        rows = [r for r in map(json.loads, lines) if r["step"] <= self.step and (ends or "end" not in r)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        file = open(path, "a", buffering=1)
        writers = [lambda row: file.write(json.dumps(row) + "\n")]
        if self.args.tensorboard:
            board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(self.dir)
            writers.append(lambda row: [board.add_scalar(k, v, row["step"]) for k, v in row.items()])
        if self.args.wandb:
            wandb = importlib.import_module("wandb")
            wandb.init(project=self.method, config=vars(self.args), id=self.dir.name, resume="allow")
            writers.append(lambda row: wandb.log(row, step=row["step"]))
        return writers

    def _on_signal(self, number, frame):
        self.signal = number
        os.write(2, b"\nsaving after this step; a second Ctrl-C ends without saving\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends it; launchers repeat SIGTERM

    def say(self, text: str):
        if rank() == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def due(self, every: int | None, at_end=True) -> bool:
        """True at every `every`-th step (None: once an epoch; 0: never) and at the last."""
        every = self.epoch_steps if every is None else every
        return at_end and self.step == self.last or bool(every) and self.step % every == 0

    def _write(self, row: dict, scheduled: bool):
        for writer in self.writers:  # a run that is continued drops what only its end had asked for
            writer({"step": self.step, **row} | ({} if scheduled else {"end": True}))

    def _means(self) -> list[float]:
        """The latest step's terms, mean over processes. UserError if any since last time was not finite."""
        names, rows = zip(*self.pending)
        values = all_reduce_mean(torch.stack(rows)).cpu()  # (steps since the last call, terms)
        for row in (~torch.isfinite(values)).any(1).nonzero().flatten().tolist()[:1]:
            bad = [f"{n} is {v}" for n, v in zip(names[0], values[row].tolist()) if not math.isfinite(v)]
            step, kept = self.step - len(values) + 1 + row, self.dir / "checkpoint.pt"
            kept = f"{kept} holds the last good state" if kept.exists() else "nothing was saved yet"
            raise UserError(f"{' and '.join(bad)} at step {step}, try a lower lr; {kept}")
        self.pending = []
        return values[-1].tolist()

    def log(self, terms: dict, **numbers):
        """Counts one optimizer step. terms: name -> (0-dim tensor, chance level or None), averaged over the
        processes; written every --log-every steps, as are the numbers. UserError if a term is not finite."""
        self.step += 1
        self.pending.append((list(terms), torch.stack([term.detach().float() for term, _ in terms.values()])))
        self.bar.update()
        self.profiler and self.profiler.step()
        scheduled = self.step == 1 or self.due(self.args.log_every, at_end=False)
        if not scheduled and self.step < self.last:
            return
        self.loader.check_bad()
        row, texts = {"epoch": self.step / self.epoch_steps}, []
        warm = self.step > max(self.args.warmup_epochs * self.epoch_steps, 0.1 * self.total)
        for (name, (_, chance)), value in zip(terms.items(), self._means()):
            row[name] = value
            texts.append(f"{name} {value:.3f}" + (f" (chance {chance:.3f})" if chance else ""))
            if chance:
                row["chance" if name == "loss" else name.replace("loss", "chance")] = chance
                if warm and abs(value / chance - 1) < 0.01 and name not in self.warned:
                    self.warned.add(name)
                    self.say(f"warning: after {self.step} steps {name} is still at chance level {chance:.3f}")
        seconds, steps = time.time() - self.clock, self.step - self.clock_step
        speed, wait = self.args.batch_size * steps / seconds, self.loader.wait / seconds
        row |= {name: torch.as_tensor(number).item() for name, number in numbers.items()}
        self._write({**row, "images_per_sec": speed, "data_wait": wait}, scheduled)
        left = time.strftime("%H:%M:%S", time.gmtime((self.last - self.step) * self.args.batch_size / speed))
        text = ", ".join([*texts, f"{speed:.0f} images/s"])
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            self.say(f"step {self.step}/{self.last} {text}, data wait {wait:.0%}, left {left}")
        self._restart_clock()

    def _restart_clock(self):
        self.clock, self.clock_step, self.loader.wait = time.time(), self.step, 0.0

    def log_evaluation(self, metrics: dict):
        if not metrics:
            return
        self._write(metrics, self.due(self.args.eval_every, at_end=False))
        self.evaluation = {"step": self.step, **metrics}
        self.say(f"step {self.step}, percent: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        self._restart_clock()  # evaluation is not training time

    def interrupted(self) -> bool:
        """Whether any process got SIGINT or SIGTERM. All agree, over a CPU tensor: no GPU waits for it."""
        number = torch.tensor(self.signal)
        if dist.is_initialized():
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        self.stop = int(number)
        return self.stop > 0

    def save(self):
        """Writes checkpoint.pt beside itself, then renames: a crash or full disk leaves the old one.
        After a signal, ends the process. Raises UserError for weights that are not finite, or a full disk."""
        if self.pending:
            self._means()
        path, temporary = self.dir / "checkpoint.pt", self.dir / "checkpoint.tmp"
        if not all(torch.isfinite(t).all() for t in self.state["model"].state_dict().values()):
            raise UserError(f"weights are not finite at step {self.step}, lower the lr; {path} is as before")
        rng = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
        rngs = [rng] * world_size()
        if dist.is_initialized():
            dist.all_gather_object(rngs, rng)
        if rank() == 0:
            content = {name: item.state_dict() for name, item in self.state.items()}
            content |= {"method": self.method, "args": vars(self.args), "step": self.step, "rng": rngs}
            content |= self.extra
            try:
                with open(temporary, "wb") as file:
                    torch.save(content, file)
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
                temporary.unlink(missing_ok=True)
                raise UserError(f"cannot write {path} ({error}), free some space; it is as before") from error
        if self.stop:
            all_reduce_mean(torch.zeros(1))  # together: torchrun ends the others when one leaves
            n = os.environ.get("LOCAL_WORLD_SIZE")
            where = "" if self.args.output_dir else f" --output-dir {self.dir}"
            python = f"torchrun --nproc_per_node={n}" if n else "python"
            self.say(f"saved at step {self.step}, continue with: {python} {shlex.join(sys.argv)}{where}")
            sys.exit(128 + self.stop)

    def finish(self, hint: str) -> dict:
        """Says where everything is and what to do next; -> the last evaluation."""
        self.bar.close()
        if rank() == 0:
            self.lock.close()
        minutes, seconds = divmod(round(time.time() - self.began), 60)
        self.say(f"done in {minutes}m{seconds:02d}s: checkpoint, log, pictures in {self.dir}\nnext: {hint}")
        return self.evaluation
