"""What runs on 1 to 1,024 GPUs cost: the tables of docs/scale.md, computed from its formulas.

    python benchmarks/scale.py          # prints them; benchmarks/table.py writes them into the page

Measured: the rates and the memory per image, by benchmarks/gpu.py on one H200
(results/gpu/gpu.jsonl), the loader's milliseconds and the size of a photo, by benchmarks/augment.py
(results/augment.json). Counted: the parameters and the bytes on the wire. Assumed: the two
bandwidths. tests/test_scale.py compares each with the code or with a record.
"""

import json
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
GPUS = (1, 8, 64, 256, 1024)
INSIDE, BETWEEN = 400e9, 50e9  # bytes/s for each GPU: NVLink, 400 Gbit/s adapters
MEMORY = 127 * GIB  # of an H200's 141 GB, what training may fill
PICTURE = 51e3  # bytes of a JPEG of 500 x 375 pixels, quality 90: mean of augment.py's two photos


@dataclass
class Plan:
    title: str
    command: str
    measured: str  # model of results/gpu/gpu.jsonl
    parameters: int
    pairs: int
    epochs: int
    batch: int  # B
    gathered: int  # floats for each pair that every process needs of the others
    matrix: int  # bytes kept for each entry of a b x B matrix of logits


SLIP, B32, L14 = 170_616_321, 151_277_313, 427_616_513
PLANS = [
    Plan("SLIP ViT-B/16, 15M pairs", "slip.py --data yfcc15m", "slip_b16", SLIP,
         14_689_580, 25, 4096, 2 * 512 + 2 * 256, 8 + 17),
    Plan("CLIP ViT-B/32, 400M pairs", "clip.py --data SHARDS", "clip_b32", B32,
         400_000_000, 32, 32768, 2 * 512, 8),
    Plan("CLIP ViT-L/14, 400M pairs", "clip.py --data SHARDS --arch vit_large_patch14", "clip_l14",
         L14, 400_000_000, 32, 32768, 2 * 768, 8),
    Plan("CLIP ViT-L/14, 5B pairs", "clip.py --data SHARDS --arch vit_large_patch14 --epochs 6",
         "clip_l14", L14, 5_000_000_000, 6, 32768, 2 * 768, 8),
]  # fmt: skip


def measured():
    """-> {model: its last eager row of results/gpu/gpu.jsonl}, ms of a worker for two views."""
    rows, source = {}, {}
    for line in (ROOT / "results/gpu/gpu.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["part"] == "machine":  # begins what one invocation has recorded
            source = {"source": row["source"]} if "source" in row else {}
        elif row["part"] == "steps" and row.get("mode") == "eager" and "error" not in row:
            rows[row["model"]] = row | source
    cases = json.loads((ROOT / "results/augment.json").read_text())["results"]
    return rows, cases["slip"]["ms"]["worker"][0]


# -------------------------------------------- formulas --------------------------------------------
def forward_flops(layers, width, tokens):
    """Of a transformer, two for each multiplication and addition: four D x D and two D x 4 D
    products for each token, and two N x N x D for all."""
    return layers * (24 * tokens * width**2 + 4 * tokens**2 * width)


def saved_flops(width, tokens, each):
    """In training the last block of an encoder computes the class or end token alone: without each
    other token's queries (clip.py) and attention, its output and MLP. each: D x D, 20 in clip.py
    and for every text, 18 for slip.py's images, whose queries are part of one product for all."""
    return (tokens - 1) * (each * width**2 + 4 * tokens * width)


def states(parameters, gpus):
    """Bytes of weights, gradients, AdamW's two moments and DDP's copy of the gradients: float32."""
    return (20 if gpus > 1 else 16) * parameters


def activations(row, plan):
    """Bytes kept for one pair, from a peak measured on one GPU: what is above states and logits."""
    kept = row["peak_gib"] * GIB - states(plan.parameters, 1) - plan.matrix * row["batch"] ** 2
    return kept / row["batch"]


def pieces(plan, gpus, each):
    """The least --accum-steps, a power of two, with which the pairs of a GPU fit."""
    local = plan.batch // gpus
    free = MEMORY - states(plan.parameters, gpus) - plan.matrix * local * plan.batch
    steps = 1
    while local * each / steps > free:
        steps *= 2
    return steps


def feature_bytes(gpus, batch, floats):
    """Sent by each process in a step, forward (all-gather) and backward (ring all-reduce)."""
    return 3 * 4 * floats * batch * (gpus - 1) / gpus


def gradient_bytes(gpus, parameters):
    """Sent by each process in a step: ring all-reduce of float32 gradients."""
    return 2 * 4 * parameters * (gpus - 1) / gpus


def costs(plan, gpus, row, worker_ms):
    """-> dict of what the plan needs on so many GPUs, None if a GPU would have under 32 pairs."""
    local = plan.batch // gpus
    if local < 32:
        return None
    each = activations(row, plan)
    steps = pieces(plan, gpus, each)
    again = 4 / 3 if steps > 1 else 1.0  # each piece is encoded once more, without gradient
    compute = local / row["images_per_s"] * again
    wire = feature_bytes(gpus, plan.batch, plan.gathered), gradient_bytes(gpus, plan.parameters)
    waiting = sum(wire) / (INSIDE if gpus <= 8 else BETWEEN)  # if nothing overlaps
    rate = plan.batch / (compute + waiting)  # pairs/s of all GPUs
    days = plan.pairs * plan.epochs / rate / 86400
    memory = states(plan.parameters, gpus) + each * local / steps + plan.matrix * local * plan.batch
    return {"b": local, "accum": steps, "gib": memory / GIB, "compute_ms": 1e3 * compute,
            "features_mb": wire[0] / 1e6, "gradients_mb": wire[1] / 1e6, "wire_ms": 1e3 * waiting,
            "pairs_per_s": rate, "storage_gb_per_s": rate * PICTURE / 1e9,
            "cores": rate / gpus * worker_ms / 1e3, "days": days,
            "gpu_hours": 24 * gpus * days}  # fmt: skip


# -------------------------------------------- the page --------------------------------------------
def short(value):
    """Two or three digits that mean something."""
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"


HEADER = ["GPUs", "pairs per GPU", "`--accum-steps`", "GiB per GPU", "computing, ms",
          "features, MB", "gradients, MB", "wire, ms", "pairs/s", "storage, GB/s", "cores per GPU",
          "days", "GPU-hours"]  # fmt: skip


def how_measured(row):
    """Rows that do not say so are of a time when no recipe had activation checkpointing."""
    kept = row.get("grad_checkpointing", "none")
    return f"{'without' if kept == 'none' else f'with {kept}'} activation checkpointing"


def tables():
    """-> markdown, a table per plan."""
    rates, worker_ms = measured()
    text = ""
    for plan in PLANS:
        seen = plan.pairs * plan.epochs / 1e9
        text += f"### {plan.title}\n\n`{plan.command}`: {plan.epochs} epochs, "
        text += f"{seen:.2g} billion pairs seen, "
        text += f"batch {plan.batch:,}, {plan.parameters / 1e6:.0f}M parameters.\n"
        text += f"Measured {how_measured(rates[plan.measured])}.\n\n"
        text += f"| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}\n"
        for gpus in GPUS:
            found = costs(plan, gpus, rates[plan.measured], worker_ms)
            if found:
                cells = [str(gpus), f"{found.pop('b'):,}", str(found.pop("accum"))]
                cells += map(short, found.values())
                text += f"| {' | '.join(cells)} |\n"
        text += "\n"
    return text.rstrip() + "\n"


def main():
    print(tables(), end="")


if __name__ == "__main__":
    main()
