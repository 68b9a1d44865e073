"""What features of a run on flocks tell of a drawing: the form, which is the class, or how large
its objects are and where they stand, which two crops of a picture share as well.

    python benchmarks/learnt.py runs/dino_flocks runs/simclr_flocks

Form: percent of 1,000 drawings that a ridge classifier on the features of 3,000 others gets right
(chance 10). Size and place: what share of their variance ridge regression explains (R^2: 0 for
guessing the mean, 1 for knowing), as means over the four objects. Each object has its own colour,
so that its size is the number of pixels of that colour and its place is their center. Beside each
run stands the same network with random weights.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from common import user_errors  # noqa: E402
from data import open_dataset  # noqa: E402
from evaluation.weights import open_network  # noqa: E402
from knn import extract  # noqa: E402
from scenes import COLOURS, Flocks  # noqa: E402

FITTED, TESTED = 3000, 1000  # drawings
RIDGE = 10.0  # on features and targets of unit variance


def sizes_and_places(image):
    """(64, 64, 3) uint8 -> (12,): pixels, x and y of the center of each colour."""
    found = []
    for name in Flocks.colours:
        distance = np.abs(image.astype(int) - COLOURS[name]).sum(2)
        y, x = np.nonzero(distance < 60)  # without the mixed colours of edges
        found += [len(x), x.mean(), y.mean()]
    return found


def ridge(features, targets):
    """-> predictions for the drawings behind the first FITTED."""
    x = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    known = x[:FITTED]
    normal = known.T @ known + RIDGE * torch.eye(x.shape[1])
    return x[FITTED:] @ torch.linalg.solve(normal, known.T @ targets[:FITTED])


def unit_variance(x):
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-6)


def learnt(features, labels, drawn):
    """-> percent of the forms, R^2 of sizes, R^2 of places."""
    features, drawn = unit_variance(features), unit_variance(drawn)
    forms = torch.eye(10)[labels]
    right = ridge(features, forms).argmax(1) == labels[FITTED:]
    left = (ridge(features, drawn) - drawn[FITTED:]).square().mean(0)
    explained = (1 - left / drawn[FITTED:].var(0)).view(4, 3)  # of each colour: size, x, y
    return 100 * right.float().mean(), explained[:, 0].mean(), explained[:, 1:].mean()


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("runs", nargs="+", help="run directories or checkpoints")
    given = parser.parse_args()
    dataset, device = open_dataset("flocks"), torch.device("cpu")
    indices = list(range(FITTED + TESTED))
    drawn = torch.tensor([sizes_and_places(np.array(dataset[i].image)) for i in indices])
    print(f"{'form, %':>40}{'size, R^2':>12}{'place, R^2':>12}")
    for run in given.runs:
        for random_weights in (False, True):
            net = open_network(run, device, random_weights=random_weights)
            found = extract(net.encoder, dataset, net.view, device, indices=indices)
            form, size, place = learnt(*found, drawn.float())
            name = f"{Path(run).name}{', random weights' * random_weights}"
            print(f"{name:32}{form:>8.1f}{size:>12.2f}{place:>12.2f}", flush=True)


if __name__ == "__main__":
    with user_errors():
        main()
