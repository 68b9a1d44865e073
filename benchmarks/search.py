"""Looks for a recipe by successive halving: many short runs, the better half of which goes on.

    python benchmarks/search.py dino --try teacher_temp=0.02,0.04 --try base_lr=2e-3,8e-3 \\
        --steps 120 --rounds 3
    python benchmarks/search.py byol --try base_lr=1,2 -- --image-size 40 --eval-every 40

Every combination of the values starts from the method's recipe and the flags behind `--`. A round
continues its runs up to its number of steps, under the schedule of the whole run, and the better
half by kNN accuracy goes into the next, which has twice as many steps. Nothing is trained twice,
because a run directory continues where it ended. One row for each run is added to
results/search_flocks.jsonl: method, flags, seed, accuracy by step (0: random weights) and the CPU
seconds of all its parts. The rows there now are of trials that were started by hand: their CPU
seconds are null, and `among` says what kNN was of.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def train(method, flags, directory, steps):
    """Trains or continues a run up to a step. -> CPU seconds; a failed run is told by its curve."""
    argv = [sys.executable, f"{method}.py"]
    argv += ["--output-dir", str(directory), "--max-steps", str(steps)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(directory.with_suffix(".log"), "a") as log:
        subprocess.run([*argv, *flags], cwd=ROOT, stdout=log, stderr=log)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def curve(directory):
    """-> [[step, kNN accuracy], ...] of a run, empty where it never came so far."""
    path = directory / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [[row["step"], row["knn_top1"]] for row in rows if "knn_top1" in row]


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=plain, epilog="Flags behind -- are given to all runs."
    )
    parser.add_argument("method")
    listed = dict(dest="tried", action="append", default=[], metavar="FLAG=VALUE,VALUE")
    parser.add_argument("--try", **listed)
    parser.add_argument("--steps", type=int, default=120, help="of the first round (default: 120)")
    parser.add_argument("--rounds", type=int, default=1, help="each with half the runs (default 1)")
    parser.add_argument("--out", type=Path, default=ROOT / "results/search_flocks.jsonl")
    # split here, as argparse takes no further positionals after an option
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, rest = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    if wrong := [text for text in args.tried if "=" not in text]:
        parser.error(f"--try {wrong[0]} has no values: --try FLAG=VALUE,VALUE")
    names = [text.split("=")[0] for text in args.tried]
    choices = [text.split("=")[1].split(",") for text in args.tried]
    folder = ROOT / "runs" / f"search_{args.method}_{time.strftime('%Y%m%d-%H%M%S')}_{os.getpid()}"
    folder.mkdir(parents=True)
    trials = []
    for i, values in enumerate(itertools.product(*choices)):
        flags = dict(zip(names, values))
        trials.append({"flags": flags, "directory": folder / str(i), "cpu_seconds": 0.0, "knn": []})
    going, steps = trials, args.steps
    for _ in range(args.rounds):
        for trial in going:
            words = [f"--{name}={value}" for name, value in trial["flags"].items()]
            directory = trial["directory"]
            trial["cpu_seconds"] += train(args.method, [*rest, *words], directory, steps)
            trial["knn"] = curve(directory)
            print(trial["flags"], trial["knn"], f"{trial['cpu_seconds']:.0f} s", flush=True)
        if not any(trial["knn"] for trial in going):
            sys.exit(f"no run of {args.method}.py reached an evaluation: {folder} has their logs")
        going.sort(key=lambda trial: -trial["knn"][-1][1] if trial["knn"] else 0)
        going, steps = going[: (len(going) + 1) // 2], 2 * steps
    with open(args.out, "a") as out:
        for trial in trials:
            settings = trial["directory"] / "args.json"
            known = json.loads(settings.read_text()) if settings.exists() else {}
            row = {"method": args.method, "flags": trial["flags"], "rest": rest}
            row |= {"seed": known.get("seed"), "knn": trial["knn"]}
            row |= {"cpu_seconds": round(trial["cpu_seconds"])}
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
