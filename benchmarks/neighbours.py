"""A picture of what DeCLIP's queue finds: images with their captions, and the captions nearest to these.

    python benchmarks/neighbours.py runs/declip_shapes_... --output docs/declip_neighbours.png

The queue is that of the run's checkpoint, as training left it. Its entries are features; which captions they
were follows from the loader, whose batches are a function of seed and step. Images come from the val split.
"""

import argparse
import sys
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import user_errors  # noqa: E402
from data import Loader, decode  # noqa: E402
from evaluation.weights import open_network  # noqa: E402
from monitor import evaluating, subset_indices, tokenize  # noqa: E402
from run import load_checkpoint  # noqa: E402
from sources import open_dataset  # noqa: E402

CELL = 150  # pixels of an image; the text beside it is twice as wide


def queued_ids(saved, tokenizer, data_dir):
    """-> {row of the queue: token ids of the caption that its feature is of, start and end included}."""
    args, rows = saved["args"], len(saved["queue"]["features"])
    dataset = open_dataset(args["data"], data_dir)
    loader = Loader(dataset, {}, {"text": tokenizer}, args["batch_size"], args["seed"])
    first, ids = max(0, saved["step"] - rows // args["batch_size"]), {}
    for step, batch in loader.batches(first, saved["step"]):
        for i, row in enumerate(batch["text"].tolist()):
            ids[(step * args["batch_size"] + i) % rows] = row[: row.index(tokenizer.eot) + 1]
    return ids


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory or checkpoint of declip.py, without --released")
    parser.add_argument("--data-dir", default="", help="where named datasets are")
    parser.add_argument("--output", required=True, help="the picture, a .png")
    parser.add_argument("--images", type=int, default=8)
    flags = parser.parse_args()
    saved, net = load_checkpoint(flags.run), open_network(flags.run, torch.device("cpu"))
    if net.method != "declip" or saved["args"]["released"]:
        sys.exit(f"{flags.run} is no run of declip.py without --released")
    ids = queued_ids(saved, net.tokenizer, flags.data_dir)
    known = torch.tensor(sorted(ids))
    features = saved["queue"]["features"][known]
    val = open_dataset(saved["args"]["data"], flags.data_dir, "val")
    samples = [val[i] for i in subset_indices(val, flags.images)]
    with evaluating(net.model), torch.no_grad():
        texts = net.model.encode_text(tokenize(net.tokenizer, [s.captions[0] for s in samples], "cpu"))
    cosine, nearest = (F.normalize(texts, dim=-1) @ features.T).max(1)
    page = Image.new("RGB", (2 * (3 * CELL + 10), -(-len(samples) // 2) * (CELL + 10)), "white")
    draw = ImageDraw.Draw(page)
    for i, sample in enumerate(samples):
        left, top = i % 2 * (3 * CELL + 10), i // 2 * (CELL + 10)
        image = Image.fromarray(decode(sample.image).permute(1, 2, 0).numpy()).resize((CELL, CELL))
        page.paste(image, (left, top))
        found = net.tokenizer.decode(ids[int(known[nearest[i]])][1:-1]).strip()
        text = [*textwrap.wrap(sample.captions[0], 44), "", f"found, cosine {cosine[i]:.3f}:", *textwrap.wrap(found, 44)]
        draw.multiline_text((left + CELL + 8, top + 10), "\n".join(text), fill="black", spacing=5)
        print(f"{sample.captions[0]}  ->  {found}  ({cosine[i]:.3f})")
    page.save(flags.output)


if __name__ == "__main__":
    with user_errors():
        main()
