"""Turns a run directory into results/NAME.json: what was run, on what, how long, what came of it.

    python benchmarks/record.py runs/slip_shapes_... --name slip_shapes
    python benchmarks/record.py runs/simclr_cifar10_... --name simclr_cifar10 --note "one of three"
    python benchmarks/record.py --evaluations runs/simclr_cifar10 runs/byol_cifar10 \\
        --name evaluation

Every number is read, none is typed: arguments from args.json, machine and commit from env.json,
curve and minutes from metrics.jsonl, and what evaluate.py found from results.jsonl (of several rows
with the same protocol and options the last one counts; --result chooses rows). --evaluations takes
of several directories nothing but the latter. `python benchmarks/table.py` then brings README.md
and docs/ up to date.
"""

import argparse
import json
import re
import shlex
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Flags that say where or how fast something ran, and that nobody else needs to repeat it
PLACES = ("--output-dir", "--data-dir", "--workers", "--log-every", "--device")
CLOCK = ("step", "epoch", "lr", "images_per_sec", "data_wait", "end")
# What is kept of a row of results.jsonl
KEPT = ("method", "step", "metrics", "random weights", "settings", "minutes", "hardware", "commit")
POINTS = 60  # of a curve, at most, and as many evaluations


def rounded(value):
    """Floats to 7 significant digits, in whatever they are nested."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return float(f"{value:.7g}") if isinstance(value, float) else value


def read(path):
    """-> the object in a .json, the list of objects in a .jsonl. Ends the script when that is
    impossible."""
    try:
        text = path.read_text()
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line]
        return json.loads(text)
    except (OSError, ValueError) as error:
        sys.exit(f"record.py: {path} cannot be read ({error})")


def without(words, flags):
    """Command line words without these flags and their values."""
    out, words = [], list(words)
    while words:
        word = words.pop(0)
        name = word.split("=")[0].replace("_", "-")
        if name not in flags:
            out.append(word)
        elif "=" not in word and words and not words[0].startswith("--"):
            words.pop(0)
    return out


def launcher(processes):
    return ["torchrun", f"--nproc_per_node={processes}"] if processes > 1 else ["python"]


def from_first_flag(words):
    return words[next((i for i, w in enumerate(words) if w.startswith("--")), len(words)) :]


def training_command(env):
    script, *flags = shlex.split(env["command"])
    words = [*launcher(env["processes"]), Path(script).name, *without(flags, PLACES)]
    return shlex.join(words)


def evaluation_name(row):
    """Protocol, data, split and what else was not the default: "linear cifar10 val --cached"."""
    flags = from_first_flag(shlex.split(row["command"])[2:])
    flags = without(flags, (*PLACES, "--batch-size", "--data", "--split", "--json", "--random"))
    return " ".join([row["protocol"], row["data"], row["split"], *flags])


def training_minutes(rows, batch_size):
    """Of the optimizer steps, without evaluations: each row says how fast those before it were."""
    seconds, before = 0.0, 0
    for row in rows:
        if "images_per_sec" in row:
            seconds += (row["step"] - before) * batch_size / row["images_per_sec"]
            before = row["step"]
    return seconds / 60


def thinned(rows, most=POINTS):
    """At most that many, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def record(directory, name, note="", chosen=None):
    """-> what results/NAME.json holds."""
    args, env = read(directory / "args.json"), read(directory / "env.json")
    rows = read(directory / "metrics.jsonl")
    log, evals = ([r for r in rows if ("loss" in r) == kind] for kind in (True, False))
    training = {k: v for row in (log[-1:] + evals[-1:]) for k, v in row.items() if k not in CLOCK}
    metrics = {"training": {"step": rows[-1]["step"], "epochs": log[-1]["epoch"], **training}}
    speeds = [r["images_per_sec"] for r in log[1:] or log]
    metrics["training"]["images_per_sec"] = statistics.median(speeds)
    found = read(directory / "results.jsonl") if (directory / "results.jsonl").exists() else []
    for i, row in enumerate(found):
        if chosen is None or i in chosen:
            label = evaluation_name(row)
            metrics[label] = {**row["metrics"], "step": row["step"]}
            if "random weights" in row:
                metrics[label + ", random weights"] = row["random weights"]
    points = sorted(thinned(log) + thinned(evals), key=lambda row: row["step"])
    curve = {}
    for row in points:
        keep = {k: v for k, v in row.items() if k not in CLOCK and "chance" not in k}
        curve.setdefault(row["step"], {}).update(rounded(keep))
    on_gpu = env["gpu"] and args["device"] != "cpu"
    ended = time.localtime((directory / "metrics.jsonl").stat().st_mtime)
    words = directory / "synonyms.json"  # of declip.py: how many words WordNet or a file gave it
    synonyms = {"synonyms": read(words)} if words.exists() else {}
    return {
        "name": name,
        "method": args["method"],
        "data": Path(args["data"]).name,
        "command": training_command(env),
        "commit": env.get("commit", ""),
        "date": time.strftime("%Y-%m-%d", ended),
        "hardware": f"{env['processes']} x {env['gpu']}" if on_gpu else f"{env['cpus']} CPU cores",
        "minutes": rounded(training_minutes(log, args["batch_size"])),
        "metrics": rounded(metrics),
        "curve": [[step, values] for step, values in curve.items()],
        "note": note,
        "args": {k: v for k, v in args.items() if k not in ("output_dir", "data_dir", "method")},
        **synonyms,
        "versions": {"torch": env["torch"], "python": env["python"]},
    }


def evaluations(directories, note=""):
    """-> what results/evaluation.json holds: for each directory, run and protocol the last row of
    results.jsonl, called after the directory."""
    rows = {}
    for directory in directories:
        for found in read(directory / "results.jsonl"):
            script, protocol, *words = shlex.split(found["command"])
            flags = without(from_first_flag(words), (*PLACES, "--batch-size", "--json"))
            command = [*launcher(found["processes"]), script, protocol, "RUN", *flags]
            row = {"run": directory.name, "label": evaluation_name(found)}
            row["command"] = shlex.join(command)
            row |= {k: rounded(found[k]) for k in KEPT if k in found}
            rows[row["run"], row["label"]] = row
    date = time.strftime("%Y-%m-%d")
    return {"name": "evaluation", "date": date, "note": note, "rows": list(rows.values())}


def write(path, content):
    """JSON with a line for each point of the curve, if there is one."""
    lines = ",\n".join("  " + json.dumps(point) for point in content.get("curve", []))
    text = json.dumps({**content, **({"curve": "CURVE"} if lines else {})}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace('"CURVE"', f"[\n{lines}\n ]", 1) + "\n")


def warn_of(commits):
    """Says which numbers are of a tree that nobody else can check out."""
    for commit in sorted(set(commits)):
        if "dirty" in commit or not commit:
            text = f"recorded from commit {commit or 'unknown'}, which others do not have"
            print(f"warning: {text}", file=sys.stderr)


def parser():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    add = parser.add_argument
    add("run", type=Path, nargs="*", help="run directory; with --evaluations several")
    add("--evaluations", action="store_true", help="record what evaluate.py found, nothing else")
    add("--name", required=True, help="of the file below results/, such as slip_shapes")
    add("--result", type=int, action="append", metavar="ROW",
        help="row of results.jsonl, from 0, may be repeated (default: all)")  # fmt: skip
    add("--note", default="", help="one sentence that the numbers need")
    add("--out", type=Path, default=ROOT / "results", help="directory (default: results)")
    return parser


def main(argv=None):
    args = parser().parse_args(argv)
    if not re.fullmatch(r"[\w-]+", args.name):
        sys.exit(f"record.py: --name {args.name} may have letters, digits, _ and - only")
    if not args.run or len(args.run) > 1 and not args.evaluations:
        sys.exit("record.py: give one run directory, or several with --evaluations")
    if args.evaluations:
        content = evaluations(args.run, args.note)
    else:
        content = record(args.run[0], args.name, args.note, args.result)
    warn_of(row["commit"] for row in content.get("rows", [content]))
    write(args.out / f"{args.name}.json", content)
    print(f"{args.out / args.name}.json; now run: python benchmarks/table.py")


if __name__ == "__main__":
    main()
