"""The pictures of a training run, views.png and curves.png, the boards that draw its log, the
versions that env.json keeps, and what its last lines and warnings say. run.py imports this when a
run begins."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw

from common import UserError, world_size


def environment():
    """What env.json says: how a run was started, on what machine and with which versions."""
    env = {"command": shlex.join(sys.argv), "processes": world_size(), "cpus": os.cpu_count(),
           "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
           "torch": torch.__version__, "python": platform.python_version(),
           "host": platform.platform()}  # fmt: skip
    with contextlib.suppress(OSError):  # git is not installed
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        env["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    for name in ("ftfy", "tokenizers", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of pillow-simd
            env[name] = importlib.metadata.version(name)
    return env


def read_args(directory):
    """args.json of a run. Raises UserError if it is damaged."""
    path, advice = Path(directory) / "args.json", "bring it back or use another --output-dir"
    try:
        args = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {advice}") from error
    if not isinstance(args, dict):
        raise UserError(f"{path} is damaged: {advice}")
    return args


def latest_kept(directory):
    """The checkpoint_STEP.pt of the largest step in a directory, None where there is none."""
    kept = [path for path in directory.glob("checkpoint_*.pt") if path.stem[11:].isdecimal()]
    return max(kept, key=lambda path: int(path.stem[11:]), default=None)


def instead_of_damaged(directory):
    """What to do where a run is to go on from a checkpoint.pt that cannot be read."""
    latest = latest_kept(directory)
    if not latest:
        return "remove it to begin again, or use another --output-dir"
    return f"copy {latest.name} over it to go on from there, or use another --output-dir"


def warnings(run):
    """What is odd about a run that begins -> sentences."""
    args, found = run.args, []
    if args.warmup_epochs > args.epochs:
        found.append("the warm-up is longer than the run: the rate never reaches its peak")
    load, cores = getattr(os, "getloadavg", lambda: [0])()[0], os.cpu_count() or 1
    if run.loader.device.type == "cpu" and torch.get_num_threads() > 1 and load > 2 * cores:
        wait = f"{load:.0f} processes want {cores} cores, and threads will wait for each other"
        found.append(f"{wait}: OMP_NUM_THREADS=1 avoids that")
    return found


def boards(run, args):
    """What TensorBoard and wandb take of a run's log -> list of functions of a row. args: the run's
    arguments. Raises UserError where wandb cannot begin."""
    writers = []
    if run.args.tensorboard:
        board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(run.dir)
        writers.append(lambda row: [board.add_scalar(k, v, row["step"]) for k, v in row.items()])
    if run.args.wandb:
        wandb = importlib.import_module("wandb")
        own = run.dir / "wandb_id.txt"  # two folders of one name are two runs there
        if not own.exists():  # runs of earlier versions had the name of their folder
            new = own.with_suffix(".tmp")
            new.write_text(run.dir.name if run.step else os.urandom(6).hex(), encoding="utf-8")
            os.replace(new, own)
        options = {"id": own.read_text(encoding="utf-8"), "resume": "allow", "config": args}
        try:
            wandb.init(project=run.method, name=run.dir.name, **options)
        except Exception as error:  # it raises classes of its own
            text = f"wandb cannot begin ({' '.join(str(error).split())})"
            raise UserError(f"{text}: run `wandb login` or leave --wandb out") from error
        writers.append(lambda row: wandb.log(row, step=row["step"]))
    return writers


def how_to_continue(run):
    """The end of a sentence: the command that goes on with a run that is saved."""
    more = [] if run.args.output_dir else ["--output-dir", str(run.dir)]
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":  # torchrun's own flags are not known
        same = "with the command that started it on each machine"
        return same + (f" and {shlex.join(more)}" if more else "")
    n = os.environ.get("LOCAL_WORLD_SIZE")
    python = f"torchrun --nproc_per_node={n}" if n else "python"
    return f"with: {python} {shlex.join(sys.argv + more)}"


def save_batch(directory, batch, views):
    """Writes views.png of a batch of the loader."""
    save_views(directory, {name: batch[name] for name in views}, views)


def save_views(directory, images, views):
    """Writes views.png: the first eight samples of a batch, with a row for each view, as the model
    sees them. images: name -> float (b, 3, S, S), as normalised by views[name], with its mean and
    std: a view without them is an error, as its picture would be black."""
    strips = []
    for name, x in images.items():
        mean = torch.tensor(views[name].mean, dtype=torch.float32).view(3, 1, 1)
        std = torch.tensor(views[name].std, dtype=torch.float32).view(3, 1, 1)
        x = (x[:8].float().cpu() * std + mean).clamp(0, 1)
        x = F.interpolate(x, scale_factor=max(1, 128 // x.shape[-1]))  # small ones are enlarged
        grid = torchvision.utils.make_grid(x)
        strips.append((name, torchvision.transforms.functional.to_pil_image(grid)))
    size = max(strip.width for _, strip in strips), sum(strip.height + 14 for _, strip in strips)
    page, top = Image.new("RGB", size, "white"), 0
    for name, strip in strips:
        ImageDraw.Draw(page).text((2, top + 1), name, fill="black")
        page.paste(strip, (0, top + 14))
        top += strip.height + 14
    page.save(Path(directory) / "views.png")


def read_log(directory):
    path = Path(directory) / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): fix it, or delete the line") from error


def accuracies(directory):
    """-> what a run came to, a line for each accuracy of its last evaluation and one for the
    effective rank of its features, beside the same network at the start, with random weights or
    those of --init (a row of the log at step 0), and chance."""
    rows, lines = [row for row in read_log(directory) if "loss" not in row], []
    evaluations = [row for row in rows if any(name.endswith("_chance") for name in row)]
    last = evaluations[-1] if evaluations else {}
    args = read_args(directory)
    start = "weights of --init" if args.get("init") else "random weights"
    for name, value in last.items():
        chance = re.split("_top1|@", name)[0] + "_chance"
        if chance in last:
            first = evaluations[0]
            known = first["step"] == 0 and name in first  # older logs lack byol.py's random target
            random = f"{start} {first[name]:.1f}, " if known else ""
            title = name.removesuffix("_top1").replace("knn", "kNN")
            lines.append(f"{title} {value:.1f} ({random}chance {last[chance]:.3g})")
    if "effective_rank" in last:
        first, random = evaluations[0], ""
        if first["step"] == 0 and "effective_rank" in first:
            random = f"{start} {first['effective_rank']:.1f}, "
        found = f"effective rank {last['effective_rank']:.1f}"
        lines.append(f"{found} ({random}at most {last['full_rank']})")
    return lines


def save_curves(directory):
    """Writes curves.png if matplotlib is installed: each column of metrics.jsonl; dashed are chance
    and the full rank, which an effective rank cannot exceed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = read_log(directory)
    names = dict.fromkeys(name for row in rows for name in row)  # each once, in this order
    names = [n for n in names if n not in ("step", "epoch", "end") and "chance" not in n]
    names = [n for n in names if not n.endswith("full_rank")]
    width, height = min(4, len(names)), math.ceil(len(names) / 4)
    figure = Figure(figsize=(4 * width, 3 * height), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(height, width, i + 1, title=name, xlabel="step")
        chance = "chance" if name == "loss" else re.split("_loss|_top|@", name)[0] + "_chance"
        if name.endswith("effective_rank"):
            chance = name.replace("effective", "full")
        for key, style in ((name, "-"), (chance, "--")):
            if points := [(row["step"], row[key]) for row in rows if key in row]:
                axes.plot(*zip(*points), style)
    figure.savefig(Path(directory) / "curves.png", dpi=80)


def command(run, launcher, script, *words) -> str:
    """A command line that can be pasted where the run was started."""
    n = os.environ.get("LOCAL_WORLD_SIZE", "1")
    processes = [f"--nproc_per_node={n}"] if launcher == "torchrun" and n != "1" else []
    path = Path(__file__).with_name(script)
    path = path.name if path.parent == Path.cwd() else path
    if data_dir := run.args.data_dir or os.environ.get("DATA_DIR"):
        words += ("--data-dir", data_dir)
    return shlex.join(map(str, [launcher, *processes, path, *words]))


def next_command(run, protocol, dataset, then=()) -> str:
    """The command of evaluate.py that measures a finished run, or a better one, see Run.finish."""
    if then:
        return command(run, *then)
    if not dataset and len(run.loader.dataset) > 100_000:  # too many to compare all with each other
        return command(run, "python", "evaluate.py", protocol, run.dir, "--data", "cifar10")
    tested, words = dataset or run.loader.dataset, ["--data", run.args.data]
    # a WordNet id is no name
    named = [c for c in tested.classes or [] if not re.fullmatch(r"n\d{8}", str(c))]
    if protocol == "zeroshot" and not named:
        protocol = "retrieval"
    if dataset:
        words = ["--data", run.args.eval_data or run.args.data]
    whole = not dataset or os.path.isfile(run.args.eval_data)  # all that is there is called train
    if whole and protocol == "knn":
        protocol = "neighbors"  # it needs no labels and no second split
    elif whole:
        words += ["--split", "train"]
    return command(run, "python", "evaluate.py", protocol, run.dir, *words)
