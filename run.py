"""The paper trail of a training run: its command line, directory, log, checkpoint and pictures.

Nothing here changes a number, but for --init, or knows a method, but for ranges of its flags."""

import argparse
import atexit
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zipfile
import zlib
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import UserError, all_reduce_mean, rank, world_size


# -------------------------------------------- arguments -----------------------------------------
@dataclasses.dataclass
class RunArgs:
    """Flags that change no number but by rounding. Every method file's Args inherits them."""
    data_dir: str = ""  # folder of the named datasets (default: $DATA_DIR, then ./data)
    output_dir: str = ""  # run directory, continued if it has a checkpoint (default: new, in runs/)
    workers: int = 8  # loader processes per training process
    device: str = ""  # cuda, mps or cpu (default: the first of them that this machine has)
    compile: bool = False  # compile the model with torch.compile
    eval_every: int | None = None  # steps between evaluations (default: one epoch; 0: at the end)
    save_every: int | None = None  # steps between checkpoints (default: one epoch; 0: at the end)
    keep_every: int = 0  # steps between checkpoints that stay, checkpoint_STEP.pt (0: none)
    probe: Literal["knn", "linear"] = "knn"  # accuracy while training, of methods without captions
    log_every: int = 10  # steps between rows of the log (0: the first and the last step only)
    tensorboard: bool = False  # write the log for TensorBoard too
    wandb: bool = False  # send the log to Weights & Biases too
    profile: bool = False  # write a trace of the 10th to 14th step to the run directory


THREADS = torch.get_num_threads()  # before a run takes one less
# Smallest and largest value of some flags; others would abort, or train nonsense
RANGES = {name: (least, most) for names, least, most in [
    ("image_size local_size bottleneck_dim", 8, 4096),
    ("embed_dim text_width hidden_dim out_dim head_dim mlp_dim vocab_size", 0, 2**20),
    ("ssl_mlp_dim ssl_emb_dim predictor_dim", 0, 2**20),
    ("ssl_dim", 2, 2**20),
    ("text_layers head_layers projector_layers local_crops", 0, 1000),
    ("momentum key_momentum center_momentum bn_momentum teacher_momentum tau tau_end ema", 0, 1),
    ("teacher_momentum_end mass mask_prob mask_ratio crop_min crop_split", 0, 1),
    ("label_smoothing alpha layer_decay", 0, 1),
    ("drop_path drop_connect erase beta2", 0, 0.9999),
    ("init_std temperature key_temperature teacher_temp warmup_teacher_temp", 0.001, 1000),
    ("context_length", 3, 4096),
] for name in names.split()}
UNUSED_BY = dict(width="vit", stem="vit", drop_path="resnet", init_std="resnet",
                 freeze_patch_embed="resnet")


def build_parser(Args, comments: dict, recipe: str, values: dict) -> argparse.ArgumentParser:
    """A parser of the fields of Args. Its --help shows what a recipe puts in a default's place."""
    parser = argparse.ArgumentParser(usage="%(prog)s [--flag VALUE ...]", allow_abbrev=False)
    groups = [parser, parser]
    if issubclass(Args, RunArgs):
        titles = "flags of the method, which may change numbers", "flags of the run, which do not"
        groups = [parser.add_argument_group(title) for title in titles]
    for name, kind in get_type_hints(Args).items():
        default = getattr(Args, name)
        notes = [f"default: {default}"] if default else []
        if values.get(name, default) != default:
            notes.append(f"{recipe}: {values[name]}")
        text = comments.get(name, "") + (f" ({'; '.join(notes)})" if notes else "")
        options = dict(default=argparse.SUPPRESS, help=text.replace("%", "%%"), dest=name)
        if kind is bool:
            options.update(action=argparse.BooleanOptionalAction)
        elif get_origin(kind) is Literal:
            options.update(choices=get_args(kind))
        else:
            if get_origin(kind) is tuple:  # a flag that may be given several times
                options.update(action="append")
            kind = (*get_args(kind), kind)[0]  # `int | None` is read as int
            options.update(type=kind, metavar=kind.__name__.upper())
        groups[hasattr(RunArgs, name)].add_argument("--" + name.replace("_", "-"), **options)
    return parser


def parse_args(Args, recipes: dict, argv: list[str] | None = None):
    """Command line -> Args. A field's trailing comment is its --help text; `--batch_size` works
    too. A flag wins over recipes[--recipe or --data], which wins over the field's default. Raises
    UserError for an unknown flag (naming the nearest) or recipe and a value of the wrong kind."""

    def refuse(message):
        raise UserError(f"{message} (--help lists the flags)")

    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub("^--[^=]+", lambda match: match[0].replace("_", "-"), word) for word in argv]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # --help needs the recipe
    first.error = refuse
    first.add_argument("--data", default=Args.data)
    first.add_argument("--recipe", default="")
    chosen = first.parse_known_args(argv)[0]
    if chosen.recipe and hasattr(Args, "recipe") and chosen.recipe not in recipes:
        refuse(f"unknown recipe {chosen.recipe}, choose one of {', '.join(recipes)}")
    recipe = chosen.recipe or os.path.expanduser(chosen.data)
    values = recipes.get(recipe, {})
    source = "".join(map(inspect.getsource, reversed(Args.__mro__[:-1])))  # of Args and its bases
    comments = dict(re.findall(r"^ +(\w+):.*?  # (.*)$", source, re.M))
    parser = build_parser(Args, comments, recipe, values)
    parser.error = refuse
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        word, flags = unknown[0].split("=")[0], list(parser._option_string_actions)
        near = []
        if len(word) > 3:  # --epoch means --epochs, --lr means --base-lr and the other way round
            near = [flag for flag in flags if flag.startswith(word) or flag.endswith(word[1:])]
            near += [flag for flag in flags[1:] if word.endswith(f"-{flag[2:]}")]  # but -h
        near = near or difflib.get_close_matches(word, flags, n=1)
        refuse(f"unknown argument {unknown[0]}" + (f", did you mean {near[0]}?" if near else ""))
    args = Args(**(values | vars(given)))
    for name, value in vars(args).items():
        if isinstance(value, str):
            setattr(args, name, os.path.expanduser(value))  # bash leaves --flag=~/path as it is
        default = getattr(Args, name)
        takes_zero = name == "workers" or "(0:" in comments.get(name, "")  # it says what 0 does
        least = int(type(default) is int and default > 0 and not takes_zero)
        if isinstance(value, int | float) and not least <= value < 2**63:
            bound = "above" if least else "at least"
            refuse(f"--{name.replace('_', '-')} {value} must be {bound} 0 and finite")
        least, most = RANGES.get(name, (0, 0))
        if most and isinstance(value, int | float) and not least <= value <= most:
            refuse(f"--{name.replace('_', '-')} {value} must lie between {least} and {most}")
        if name in given and getattr(args, "arch", "").startswith(UNUSED_BY.get(name, "-")):
            refuse(f"--{name.replace('_', '-')} changes nothing with {args.arch}: leave it out")
    if getattr(args, "local_crops", 0) and args.crop_min > (split := args.crop_split):
        refuse(f"--crop-min {args.crop_min} is above --crop-split {split}, the largest local crop")
    return args


# -------------------------------------------- a run --------------------------------------------
def load_checkpoint(path: str | Path) -> dict:
    """A file or a run directory's checkpoint.pt, onto the CPU, without unpickling objects. Files of
    torch.save hold checksums, which torch.load ignores: here those of a run must fit."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}")
    try:
        mapped = os.name != "nt" and zipfile.is_zipfile(path)  # processes share it in memory
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        ours = isinstance(saved, dict) and ("method" in saved or "features" in saved)
        if ours and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum does not fit")
        return saved
    except Exception as error:
        text = f"{path} cannot be read, is damaged or holds code, which is never run"
        raise UserError(text) from error


def fingerprint(dataset) -> str:
    """A cheap checksum, of 32 evenly spread samples, which notices other data under an old name."""
    total = 0
    for i in range(0, len(dataset), math.ceil(len(dataset) / 32)):
        try:
            sample = dataset[i]
            image = sample.image if isinstance(sample.image, bytes) else sample.image.tobytes()
            total = zlib.crc32(image + repr((sample.captions, sample.label)).encode(), total)
        except (OSError, ValueError):
            total = zlib.crc32(b"cannot be read", total)
    return f"{total:08x}"


def replace_text(path: Path, text: str):
    """Writes a file under another name and then renames it, so that a crash leaves the old one."""
    with open(path.with_suffix(".tmp"), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def directory_of(method, args) -> Path:
    """Where a run with these arguments writes, and has written if torchrun starts it again."""
    when, run_id = time.strftime("%Y%m%d-%H%M%S"), os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":  # it is to find the same folder
        when = run_id if run_id != "none" else f"torchrun{os.getppid()}"
    name = f"{method}_{Path(os.path.abspath(args.data)).stem}_{args.arch}_s{args.seed}_{when}"
    return Path(args.output_dir or f"runs/{name}").expanduser()


def init_weights(model, args, tokenizer=None):
    """--init and --freeze (docs/init.md), by init.py, which only runs with these flags load."""
    if args.init or getattr(args, "freeze", ""):
        if not Path(__file__).with_name("init.py").exists():
            raise UserError("--init needs init.py, recognise.py and names.py beside run.py")
        importlib.import_module("init").start(model, args, tokenizer)


class Run:
    """The directory of one run: args.json, env.json, metrics.jsonl, checkpoint.pt, pictures.

    `state` is what a checkpoint restores: name -> object with state_dict and load_state_dict;
    `extra` is text that must be the same then. A directory with a checkpoint is continued from
    `self.step`, and its log is cut back to that step, so that a killed run leaves the log of one
    that was not. UserError if the directory is no run's, another one's, in use or lacks a part."""

    MAY_CHANGE = {"max_steps", "grad_checkpointing", *vars(RunArgs())}  # in a restart

    def __init__(self, method: str, args, loader, state: dict, extra: dict | None = None):
        self.method, self.args, self.loader = method, args, loader
        self.state, self.extra = state, extra or {}
        self.epoch_steps = loader.steps_per_epoch
        self.total = args.epochs * self.epoch_steps  # steps of the schedule
        self.last = min(self.total, args.max_steps or self.total)  # steps of this run
        self.step, self.signal, self.stop, self.profiler = 0, 0, 0, None
        self.data = [len(loader.dataset), fingerprint(loader.dataset)]
        other = self.data != self._first_does(lambda: self.data)
        if all_reduce_mean(torch.tensor(float(other))) > 0:  # all of them end
            raise UserError("processes find different training data: give all machines the same")
        self.pictures = importlib.import_module("pictures")  # not above: no number depends on it
        self.pending, self.warned, self.evaluation, self.began = [], set(), {}, time.perf_counter()
        self.recent = []  # (seconds, steps) between the last ten rows of the log
        for name in filter(vars(args).get, ("tensorboard", "wandb")):
            importlib.import_module(name)  # a missing one ends all, before anything is written
        self._load(self._first_does(self._open))
        self.bar = tqdm(total=self.last, initial=self.step, unit="step", dynamic_ncols=True,
                        disable=rank() > 0 or None)  # None: unless stderr is a terminal
        self.writers = []
        self.evaluation = self._first_does(self._start_log)
        size, at = args.batch_size, f", continued at {self.step}" if self.step else ""
        at += ", which leaves nothing to do" if self.step >= self.last else ""
        self.say(" ".join(f"{k}={v}" for k, v in vars(args).items()))
        self.say(f"{loader.dataset.name}: {len(loader.dataset):,} samples")
        self.say(f"{method}: batch {size} = {world_size()} x {size // world_size()}, "
                 f"{self.epoch_steps} steps an epoch, {self.last} steps{at}, writing to {self.dir}")
        # Small images have small networks, of which threads share little: one core is for workers
        if loader.small and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(min(torch.get_num_threads(), max(1, THREADS - 1)))
        for text in self.pictures.warnings(self):
            self.say(f"warning: {text}")
        if args.profile and rank() == 0:
            self.profiler = torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=8, warmup=1, active=5, repeat=1),
                on_trace_ready=lambda p: p.export_chrome_trace(str(self.dir / "trace.json")))
            self.profiler.start()
            atexit.register(self.profiler.stop)  # where a run ends within these steps
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # the terminal was closed
        if signal.getsignal(hangup) is not signal.SIG_IGN:  # nohup wants it so
            signal.signal(hangup, self._on_signal)
        self._restart_clock()

    def _first_does(self, work):
        """work() in the first process; all return what it returns, or raise its error."""
        done = [None, ""]
        if rank() == 0:
            try:
                done[0] = work()
            except UserError as error:
                done[1] = str(error)
            except (OSError, ValueError) as error:
                done[1] = f"{self.args.output_dir or 'runs'} can hold no run ({error}), use another"
        if dist.is_initialized():
            dist.broadcast_object_list(done)
        if done[1]:
            raise UserError(done[1])
        return done[0]

    def _load(self, directory):
        """Continues from the checkpoint of this directory if it has one."""
        self.dir = Path(directory)
        path = self.dir / "checkpoint.pt"
        if not self._first_does(path.exists):
            return
        try:
            saved = load_checkpoint(self.dir)
        except UserError as error:
            raise UserError(f"{error}: {self.pictures.instead_of_damaged(self.dir)}") from error
        try:
            for name, item in self.state.items():
                if saved[name] or name != "scaler":  # {}: the run began in bf16 or fp32
                    item.load_state_dict(saved[name])
            self.step, rng = saved["step"], saved["rng"][rank() % len(saved["rng"])]
            if type(self.step) is not int or self.step < 0:
                raise ValueError("its step is no number of steps")
            torch.set_rng_state(rng[0])
            if len(rng) > 1 and torch.cuda.is_available():
                torch.cuda.set_rng_state(rng[1])
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().rpartition("\n")[2].strip()
            raise UserError(f"{path} does not fit ({reason}), use another --output-dir") from error
        if (before := saved.get("data", self.data)) != self.data:
            was, now = (f"{n:,} samples with checksum {crc}" for n, crc in (before, self.data))
            raise UserError(f"{self.dir} was trained on {was}, but --data {self.args.data} holds "
                            f"{now}: bring the data back or use another --output-dir")
        if other := [k for k, text in self.extra.items() if saved.get(k, text) != text]:
            raise UserError(f"{path} does not have this run's {other[0]}: bring back the data and "
                            "files that it was started with, or use another --output-dir")

    def _open(self) -> str:
        if self.args.batch_size < 2:
            raise UserError("--batch-size 1 leaves no other sample to compare with: use at least 2")
        args = {"method": self.method, **vars(self.args)}
        path = directory_of(self.method, self.args)
        path.mkdir(parents=True, exist_ok=True)
        if (path / "args.json").exists():
            before = self.pictures.read_args(path)
            before = vars(type(self.args)()) | before  # flags that are newer than the run
            changed = [k for k in args if k not in self.MAY_CHANGE and before.get(k) != args[k]]
            if changed:
                was = ", ".join(f"{k}={before.get(k)} (now {args[k]})" for k in changed)
                raise UserError(f"{path} holds a run with {was}: use those or another --output-dir")
        elif {file.name for file in path.iterdir()} - {".lock", "args.tmp"}:  # a cut-off start
            raise UserError(f"{path} is not empty and holds no run: choose another --output-dir")
        if not (path / "checkpoint.pt").exists() and any(path.glob("checkpoint_*.pt")):
            raise UserError(f"{path} has no checkpoint.pt any more: name a copy of one of its "
                            "checkpoint_STEP.pt so, or use another --output-dir")
        self.lock = open(path / ".lock", "w", encoding="utf-8")
        try:
            import fcntl
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
        except (BlockingIOError, PermissionError):
            raise UserError(f"{path} is in use by another run: use another --output-dir") from None
        except (ImportError, OSError):  # Windows, and file systems without locks
            pass
        return str(path)

    def _start_log(self) -> dict:
        """Fills self.writers, which write a row. If steps are left, writes args.json and env.json
        and cuts the log back. -> this step's evaluation in the log, {} where it has none."""
        args = {"method": self.method, **vars(self.args)}
        unfinished = self.step < self.last
        if unfinished:
            replace_text(self.dir / "args.json", json.dumps(args, indent=1))  # first: marks a run
            replace_text(self.dir / "env.json", json.dumps(self.pictures.environment(), indent=1))
            for name, text in self.extra.items():  # the tokenizer, for example
                replace_text(self.dir / f"{name}.json", text)
        path = self.dir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if lines and not lines[-1].endswith("}"):  # a kill cut it off
            del lines[-1]
        try:  # nothing stays of a run that is at step 0 again
            rows = [json.loads(line) for line in lines]
            if self.step == 0 and any(row["step"] for row in rows):  # the checkpoint is lost
                with open(self.dir / "metrics_old.jsonl", "a", encoding="utf-8") as old:
                    old.writelines(f"{line}\n" for line in lines)
            rows = [row for row in rows if row["step"] <= self.step and self.step > 0]
            found = [row for row in rows if row["step"] == self.step and "epoch" not in row]
        except (ValueError, LookupError, TypeError) as error:
            text = f"{path} is damaged ({error!r}): fix it or use another --output-dir"
            raise UserError(text) from error
        if unfinished:
            replace_text(path, "".join(json.dumps(row) + "\n" for row in rows if "end" not in row))
        file = open(path, "a", buffering=1, encoding="utf-8")
        self.writers.append(lambda row: file.write(json.dumps(row) + "\n"))
        if (unfinished or not found) and (self.args.tensorboard or self.args.wandb):
            self.writers += self.pictures.boards(self, args)
        return found[-1] if found else {}

    def batches(self):
        """Yields (step, batch) from where the run stands to its last step. Wrong augmentations are
        found by looking at them, so it writes views.png before the first step of all."""
        try:
            for step, batch in self.loader.batches(self.step, self.last):
                if step == 0 and rank() == 0:
                    self.pictures.save_batch(self.dir, batch, self.loader.views)
                yield step, batch
        except UserError as error:  # of the loader; the weights are those of the step before
            if world_size() > 1 or self.step == 0:  # saving takes all processes
                raise
            self.save()
            raise UserError(f"{error}; step {self.step} is saved in {self.dir}") from error

    def end_step(self, terms: dict, **numbers):
        """Counts an optimizer step; every --log-every steps it writes terms and numbers to the log.
        terms: name -> (0-dim tensor, chance level or None), averaged over processes, must be
        finite. A function in place of a tensor is called only in written steps."""
        self.step += 1
        scheduled = self.step == 1 or self.due(self.args.log_every, at_end=False)
        written = scheduled or self.step == self.last
        values = [term for term, _ in terms.values()]
        if written:
            values = [v() if callable(v) else v for v in values]
        else:
            values = [values[0].new_zeros(()) if callable(v) else v for v in values]
        values = torch.stack([v.detach().float() for v in values])
        self.pending.append((list(terms), values))
        self.bar.update()
        if self.profiler:
            self.profiler.step()
        if written or self.step % self.epoch_steps == 0:
            self.loader.check_bad()
        if not written:
            return
        row, texts = {"epoch": self.step / self.epoch_steps}, []
        warm = self.step > max(self.args.warmup_epochs * self.epoch_steps, 0.4 * self.total)
        for (name, (_, chance)), value in zip(terms.items(), self._means()):
            row[name] = value
            texts.append(f"{name} {value:.3f}")
            if chance is not None:
                texts[-1] += f" (chance {chance:.3f})"
                row["chance" if name == "loss" else name.replace("loss", "chance")] = chance
                if warm and abs(value - chance) < 0.01 * abs(chance) and name not in self.warned:
                    self.warned.add(name)
                    self.say(f"warning: after {self.step} steps {name} is still at chance level "
                             f"{chance:.3f}")
        seconds, steps = time.perf_counter() - self.clock, self.step - self.clock_step
        speed, wait = self.args.batch_size * steps / seconds, self.loader.wait / seconds
        row |= {name: torch.as_tensor(number).item() for name, number in numbers.items()}
        self._write({**row, "images_per_sec": speed, "data_wait": wait}, scheduled)
        left = self._left(seconds, steps)
        text = ", ".join([*texts, f"{speed:.0f} images/s"])
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            self.say(f"step {self.step}/{self.last} {text}, data wait {wait:.0%}, left {left}")
        self._restart_clock()

    def _left(self, seconds, steps) -> str:
        """Time left, H:M:S, at the rate of the last ten rows: one row jumps on busy machines."""
        self.recent = [*self.recent[-9:], (seconds, steps)]
        spent, done = map(sum, zip(*self.recent))
        left = round((self.last - self.step) * spent / done)
        return f"{left // 3600:02d}:{left // 60 % 60:02d}:{left % 60:02d}"

    def _means(self) -> list[float]:
        """The latest terms, averaged over ranks. UserError if one was not finite at any step."""
        names, rows = zip(*self.pending)
        values = all_reduce_mean(torch.stack(rows)).cpu()  # (steps since the last call, terms)
        bad = (~torch.isfinite(values)).any(1)
        if bad.any():
            first = int(bad.nonzero()[0])
            step, terms = self.step - len(values) + 1 + first, zip(names[0], values[first].tolist())
            found = " and ".join(f"{k} is {v}" for k, v in terms if not math.isfinite(v))
            path = self.dir / "checkpoint.pt"
            kept = f"{path} holds the last good state" if path.exists() else "nothing was saved yet"
            raise UserError(f"{found} at step {step}, try a lower lr; {kept}")
        self.pending = []
        return values[-1].tolist()

    def _write(self, row: dict, scheduled: bool):
        end = {} if scheduled else {"end": True}  # only the end asked for it: dropped if continued
        for writer in self.writers:
            writer({"step": self.step, **row, **end})

    def _restart_clock(self):
        self.clock, self.clock_step, self.loader.wait = time.perf_counter(), self.step, 0.0

    def say(self, text: str):
        if rank() == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def due(self, *periods: int | None, at_end=True) -> bool:
        """True at the last step and at multiples of a period (None: one epoch; 0: never)."""
        if at_end and self.step == self.last:
            return True
        periods = [self.epoch_steps if every is None else every for every in periods]
        return any(every > 0 and self.step % every == 0 for every in periods)

    def log_evaluation(self, metrics: dict):
        self._write(metrics, self.due(self.args.eval_every, at_end=False))
        self.evaluation = {"step": self.step, **metrics}
        ranks = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if "rank" in k)
        scores = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if "rank" not in k)
        self.say(f"step {self.step}, percent: {'; '.join(filter(None, (scores, ranks)))}")
        self._restart_clock()  # evaluation is not training time

    def _on_signal(self, number, frame):
        if self.signal and time.perf_counter() - self.signalled > 10:  # it hangs and cannot save
            os._exit(128 + number)
        self.signalled = self.signalled if self.signal else time.perf_counter()
        self.signal = number
        with contextlib.suppress(OSError):  # of a terminal that was closed
            os.write(2, b"\nsaving after this step; a second Ctrl-C ends without saving\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # SIGTERM stays: launchers repeat it

    def agree_to_stop(self) -> bool:
        """True if any process got SIGINT or SIGTERM. All agree, over a CPU tensor: no GPU waits."""
        number = torch.tensor(self.signal)
        if dist.is_initialized():
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        self.stop = int(number)
        return self.stop > 0

    def save(self):
        """Writes checkpoint.pt under another name and then renames it, so that a crash or a full
        disk leaves the old one. Every --keep-every steps it stays as checkpoint_STEP.pt too.
        UserError if weights are not finite. After a signal, ends the process."""
        if self.pending:
            self._means()
        path, temporary = self.dir / "checkpoint.pt", self.dir / "checkpoint.tmp"
        content = {k: v.state_dict() for k, v in self.state.items()}  # sharded ones: all together
        if not all(torch.isfinite(t).all() for t in content["model"].values()):
            text = f"weights are not finite at step {self.step}, lower the lr"
            raise UserError(f"{text}; {path} is as before")
        cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
        rngs = [[torch.get_rng_state(), *cuda]] * world_size()
        if dist.is_initialized():
            dist.all_gather_object(rngs, rngs[0])
        if rank() == 0:
            args = dict(vars(self.args))
            for name, value in args.items():
                if isinstance(value, str):  # names of files that are not UTF-8 could not be read
                    args[name] = value.encode(errors="surrogateescape").decode(errors="replace")
            content |= {"method": self.method, "args": args, "step": self.step}
            content |= {"rng": rngs, "data": self.data, **self.extra}
            try:
                with open(temporary, "wb") as file:
                    torch.save(content, file)
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
                temporary.unlink(missing_ok=True)
                text = f"cannot write {path} ({error}), free some space; it is as before"
                raise UserError(text) from error
            if self.due(self.args.keep_every, at_end=False):
                self._keep(path, temporary)
        if self.stop:
            all_reduce_mean(torch.zeros(1))  # end together: torchrun ends others when one leaves
            how = self.pictures.how_to_continue(self)
            self.say(f"saved at step {self.step}, continue {how}")
            sys.exit(128 + self.stop)

    def _keep(self, path, temporary):
        """checkpoint.pt as checkpoint_STEP.pt: a second name of the same file, which costs no space
        until the next save, or a copy where the file system has no hard links."""
        kept = self.dir / f"checkpoint_{self.step}.pt"
        try:
            with contextlib.suppress(OSError):
                os.link(path, temporary)
            if not temporary.exists():
                shutil.copyfile(path, temporary)
            os.replace(temporary, kept)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write {kept} ({error}), make room; {path} is good") from error

    def finish(self, protocol: str, dataset, then=()) -> dict:
        """Writes curves.png, says where all is and what comes next; -> the last evaluation.
        protocol: what evaluate.py measures, dataset: on what; then: words of a better command."""
        self.bar.close()
        if rank() == 0:
            self.pictures.save_curves(self.dir)
            for line in self.pictures.accuracies(self.dir):
                self.say(line)
            self.lock.close()
        hint = self.pictures.next_command(self, protocol, dataset, then)
        minutes, seconds = divmod(round(time.perf_counter() - self.began), 60)
        self.say(f"done in {minutes}m{seconds:02d}s: checkpoint, log, pictures in {self.dir}")
        if Path(__file__).with_name("evaluate.py").exists():
            self.say(f"next: {hint}")
        return self.evaluation
