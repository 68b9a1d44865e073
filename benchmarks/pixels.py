"""What kNN finds in the pixels themselves, without a network: the row of a table that every method
should be above.

    python benchmarks/pixels.py flocks cifar10 --out results/pixels.json

A picture is averaged to 8 x 8, and normalised by ImageNet's mean and standard deviation. "loop" is
kNN in percent as the training loop measures it, of 1,000 validation images among 5,000 training
images; "evaluate.py" takes all images of both splits. Datasets that --out has already are measured
again if they are named, and stay otherwise.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import user_errors  # noqa: E402
from data import IMAGENET_MEAN, IMAGENET_STD, open_dataset  # noqa: E402
from evaluation.results import environment  # noqa: E402
from knn import knn_eval  # noqa: E402
from monitor import EvalView  # noqa: E402
from parity import read_json  # noqa: E402
from record import warn_of  # noqa: E402


def measure(data, data_dir):
    """-> {"loop", "evaluate.py"}, kNN in percent."""
    train, val = open_dataset(data, data_dir), open_dataset(data, data_dir, "val")
    view = EvalView(8, interpolation="box", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    inputs = nn.Flatten(), train, val, view, torch.device("cpu")
    whole = knn_eval(*inputs, max_train=0, max_val=0)
    return {"loop": knn_eval(*inputs)["knn_top1"], "evaluate.py": whole["knn_top1"]}


def parser():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    add = parser.add_argument
    add("data", nargs="+", help="name or path of a dataset with classes, as for --data")
    add("--data-dir", help="folder that holds it (default: data)")
    add("--out", type=Path, help="file to put the rows in, beside those it has")
    return parser


def main():
    options = parser().parse_args()
    found = read_json(options.out) if options.out and options.out.exists() else {}
    for data in options.data:
        row = measure(data, options.data_dir)
        row["command"] = f"python benchmarks/pixels.py {data}"
        row |= environment(torch.device("cpu"))
        print(json.dumps({data: row}), flush=True)
        found[data] = row
    if options.out:
        warn_of([found[data]["commit"] for data in options.data])
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    with user_errors():
        main()
