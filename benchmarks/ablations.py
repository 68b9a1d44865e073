"""Trains the rows of SLIP's tables on `shapes`, all with one small budget, for results/.

    python benchmarks/ablations.py                       # every row that results/ does not have yet
    python benchmarks/ablations.py simclr clip --seed 1  # these rows with another seed

`python benchmarks/table.py` then writes the table of docs/slip_ablations.md, which also has what
the paper reports and the command of its own run, from ROWS here.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Half of the data, so that --images decoupled, which shows each loss one half, can be compared
BUDGET = "--images half --epochs 1 --batch-size 64"
PAPER = "torchrun --nproc_per_node=8 slip_ablations.py --data yfcc15m"
RATES = "--recipe yfcc15m-clip"  # CLIP's learning rate and weight decay


class Row(NamedTuple):
    what: str
    published: str  # ImageNet zero-shot / linear / fine-tuned, ViT-B/16, YFCC15M, 25 epochs
    paper: str  # flags of the paper's run
    small: str  # flags of ours, beside BUDGET
    paper_first: str = ""  # flags of the paper's run whose image encoder this one starts from
    small_first: str = ""  # flags of ours, which has the same budget


ROWS = {
    "simclr": Row("SLIP, with SimCLR", "42.8 / 72.1 / 82.6", "--ssl simclr", "--ssl simclr"),
    "mocov3": Row("SLIP with MoCo v3", "41.8 / 71.4 / 82.4", "--ssl mocov3", "--ssl mocov3"),
    "byol": Row("SLIP with BYOL", "41.3 / 71.1 / 82.2", "--ssl byol", "--ssl byol"),
    "beit": Row("SLIP with BEiT, here masked pixels", "39.1 / 66.5 / 82.2",
                "--ssl beit", "--ssl beit"),
    "clip": Row("CLIP", "37.6 / 66.5 / 80.5", RATES, "--ssl none"),
    "clip_color": Row("CLIP, colour and blur", "38.4 / 68.5 / 81.5",
                      f"{RATES} --clip-views color", "--ssl none --clip-views color"),
    "clip_resize": Row("CLIP, resized crop and flip", "36.0 / 66.1 / 80.5",
                       f"{RATES} --clip-views resize", "--ssl none --clip-views resize"),
    "clip_ssl": Row("CLIP, all of SimCLR's augmentation", "36.3 / 65.2 / 80.6",
                    f"{RATES} --clip-views ssl", "--ssl none --clip-views ssl"),
    "decoupled": Row("SLIP, decoupled", "42.7 / 72.0 / 82.8",
                     "--ssl simclr --images decoupled --epochs 50 --warmup-epochs 2",
                     "--images decoupled"),
    "two_runs": Row("SimCLR first, CLIP second", "41.1 / 68.2 / 82.3",
                    f"{RATES} --init runs/simclr_first", "--ssl none",
                    "--recipe yfcc15m-simclr", "--clip-scale 0"),
}  # fmt: skip


def small_flags(name):
    """Flags of a row's run on `shapes`, but for those of a run before it."""
    budget = BUDGET.replace("--images half ", "") if "--images" in ROWS[name].small else BUDGET
    return f"{ROWS[name].small} {budget}"


def record_name(name, seed=0):
    return f"slip_ablations_{name}" + (f"_s{seed}" if seed else "")


def train(*flags):
    subprocess.run([sys.executable, "slip_ablations.py", *flags], cwd=ROOT, check=True)


def main(argv=None):
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    which = f"of {', '.join(ROWS)} (default: all)"
    parser.add_argument("rows", nargs="*", metavar="ROW", help=which)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.rows) - set(ROWS)):
        sys.exit(f"ablations.py: there is no row {', '.join(unknown)}, choose of {', '.join(ROWS)}")
    for name in args.rows or ROWS:
        record = record_name(name, args.seed)
        if (ROOT / f"results/{record}.json").exists():
            continue
        seed = ["--eval-every", "0", *(["--seed", str(args.seed)] if args.seed else [])]
        flags = [*small_flags(name).split(), *seed]
        if ROWS[name].small_first:
            first = str(args.runs / f"{record}_first")
            train(*f"{ROWS[name].small_first} {BUDGET}".split(), *seed, "--output-dir", first)
            flags += ["--init", first]
        train(*flags, "--output-dir", str(args.runs / record))
        command = [sys.executable, "benchmarks/record.py", str(args.runs / record)]
        subprocess.run([*command, "--name", record], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
