"""What contrastive losses keep in memory for their backward pass: it grows with b x B, not B x B.

b embeddings of this process meet B = W b of all W processes. One process is enough to see it:
all_gather is replaced by a concatenation with W - 1 constant blocks, which is what the real one
returns. Counted is every distinct storage that autograd saves: features, (b, E) and (B, E), and
matrices, everything else.

    python benchmarks/loss_memory.py --out results/loss_memory.json    # seconds, on any machine
"""

import argparse
import json
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from augment import environment  # noqa: E402
from record import warn_of  # noqa: E402

from clip import clip_loss  # noqa: E402
from simclr import nt_xent_loss  # noqa: E402

E = 384  # width of an embedding, told from b and B by not being a power of two
FIXED_LOCAL = [(256, w) for w in (1, 2, 4, 8, 16, 32)]  # b, W: more machines
FIXED_GLOBAL = [(8192 // w, w) for w in (16, 8, 4, 2)]  # the last batch on fewer of them
LOSSES = {"clip_loss": lambda x, y: clip_loss(x, y, torch.tensor(14.3, requires_grad=True)),
          "nt_xent_loss": lambda x, y: nt_xent_loss(x, y, 0.1)}  # fmt: skip


def kept_bytes(loss, b, processes):
    """-> bytes of features and bytes of matrices that one process saves for its backward pass."""
    x, y = (torch.randn(b, E, requires_grad=True) for _ in "xy")
    blocks, features, matrices = torch.randn(processes * b - b, E), {}, {}

    def save(tensor):  # the graph keeps it alive, so that no address comes twice
        storage = tensor.untyped_storage()
        (features if E in tensor.shape else matrices)[storage.data_ptr()] = storage.nbytes()
        return tensor

    gather = {"all_gather": lambda local: torch.cat([local, blocks])}
    with (
        mock.patch.dict(clip_loss.__globals__, gather),
        mock.patch.dict(nt_xent_loss.__globals__, gather),
        mock.patch("torch.distributed.get_rank", lambda: 0),
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
    ):
        loss(x, y)
    return sum(features.values()), sum(matrices.values())


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--out", type=Path, help="also write the numbers here, as json")
    args = parser.parse_args()
    torch.manual_seed(0)
    results = {}
    for name, loss in LOSSES.items():
        print(f"{name}, kept for backward by one process, MB")
        print(f"{'b':>6}{'W':>4}{'B':>6}{'features':>10}{'matrices':>10}{'bytes / (b B)':>15}"
              f"{'if they were B x B':>20}")  # fmt: skip
        results[name] = []
        for b, w in [*FIXED_LOCAL, *FIXED_GLOBAL]:
            features, matrices = kept_bytes(loss, b, w)
            each, squared = matrices / (w * b * b), matrices * w
            print(f"{b:6}{w:4}{w * b:6}{features / 1e6:10.1f}{matrices / 1e6:10.1f}{each:15.2f}"
                  f"{squared / 1e6:20.1f}", flush=True)  # fmt: skip
            results[name].append({"local_batch": b, "processes": w, "global_batch": w * b,
                                  "feature_bytes": features, "matrix_bytes": matrices,
                                  "matrix_bytes_per_b_x_B": each})  # fmt: skip
    if args.out:
        record = environment() | {"date": time.strftime("%Y-%m-%d"), "width": E, "dtype": "float32"}
        warn_of([record["commit"]])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
