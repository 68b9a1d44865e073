"""How much of a picture two views have in common before anything is learned, which is the signal
that training starts from: cosines of the features of moco.py's random network, in percent, the
mean feature subtracted.

    python benchmarks/agreement.py                     # flocks
    python benchmarks/agreement.py --data cifar10

Columns: two views of one picture; of two pictures of one class; of two pictures of different
classes; how often the other view of a picture is the nearest of all (chance: 100 / pictures). Where
the first column is no higher than the others, views are too different for a small network and a
short run: --crop-min and --jitter-strength make them more alike. Views that are too alike share
more than the class, and that is learned instead.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import moco  # noqa: E402
from common import user_errors  # noqa: E402
from data import Loader, open_dataset  # noqa: E402


@torch.no_grad()
def agreement(dataset, args):
    """-> the four columns for views that are drawn as args say."""
    look = args.version, args.crop_min, args.blur, args.jitter_strength
    view = moco.MoCoView(args.image_size, *look)
    views = {"view1": view, "view2": view}
    loader = Loader(dataset, views, {}, args.batch_size, args.seed, 0, torch.device("cpu"))
    _, batch = next(iter(loader.batches(0, 1)))
    torch.manual_seed(args.seed)
    # in training mode: batch norm over the batch
    encoder = moco.image_encoder(moco.build_model(args))
    features = [encoder(batch[name]) for name in views]
    a, b = (F.normalize(x - x.mean(0), dim=1) for x in features)
    cosines = a @ b.T
    own = torch.eye(len(a), dtype=torch.bool)
    alike = (batch["label"][:, None] == batch["label"]) & ~own
    nearest = (cosines.argmax(1) == torch.arange(len(a))).float()
    columns = cosines[own], cosines[alike], cosines[~own & ~alike], nearest
    return [100 * float(x.mean()) for x in columns]


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--data", default="flocks", help="a set with labels (default: flocks)")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--pictures", type=int, default=512)
    given = parser.parse_args()
    dataset = open_dataset(given.data, given.data_dir)
    print(f"{given.pictures} pictures of {dataset.name}, cosines in percent")
    print(f"{'crops from':>12}{'jitter':>8}{'one picture':>13}{'one class':>11}{'others':>8}"
          f"{'nearest':>9}")  # fmt: skip
    for crop_min in (0.2, 0.3, 0.5, 0.7):
        for strength in (1.0, 0.5, 0.25, 0.0):
            flags = ["--batch-size", str(given.pictures), "--crop-min", str(crop_min)]
            flags += ["--jitter-strength", str(strength)]
            # the network of the recipe flocks, all of it: its blocks do not start at 0 here
            flags += ["--no-zero-init-residual"]
            args = moco.parse_args(moco.Args, moco.RECIPES, flags)
            columns = agreement(dataset, args)
            print(f"{100 * crop_min:>11.0f}%{strength:>8}{columns[0]:>13.1f}{columns[1]:>11.1f}"
                  f"{columns[2]:>8.1f}{columns[3]:>9.1f}")  # fmt: skip


if __name__ == "__main__":
    with user_errors():
        main()
