"""Makes a captioned dataset as noisy as the web: a share of its images get wrong captions.

    python benchmarks/noise.py --data flickr8k --kind swap --share 0.4 --output data/flickr8k_swap40
    python benchmarks/noise.py --data shapes --images 6400 --kind junk --share 0.4 \\
        --texts alttexts.tsv --output data/junk40

--kind swap: the chosen images get the captions of each other. Each text is a good one, at the
             wrong image.
--kind junk: a third of them each get file names and single words (short), phrases that stand at
             many images (boilerplate, both from the lists below), and alt-texts of other images
             (foreign), drawn from --texts, a .tsv of key and text.

An image has all its captions right or all wrong, as on the web, where it has one. The output is a
train.tar as data.py reads it; the kind is a part of each name in it, which stands in the key of
kept.jsonl too:

    python align.py --data data/junk40 --filter-only --min-side 0 --output-dir filtered
    grep -c boilerplate.png filtered/kept.jsonl
"""

import argparse
import collections
import io
import json
import random
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError, user_errors  # noqa: E402
from data import decode  # noqa: E402
from PIL import Image  # noqa: E402
from sources import open_dataset  # noqa: E402

BOILERPLATE = """click to enlarge this image
image may contain one or more people
this image has been resized
photo courtesy of the author
please log in to see this picture
no description is available for this photo
photo from the gallery of our website
share this picture with your friends
view full size image in a new window
stock photo all rights reserved
opens in a new tab
related image for this article""".split("\n")
SHORT = ("image", "photo", "untitled", "IMG {}", "DSC{}", "img_{}.jpg", "picture {}", "thumbnail",
         "logo", "figure {}")  # fmt: skip


def wrong_captions(dataset, images, kind, share, seed=0, texts=()):
    """-> {index: (kind, captions)} of a share of the first samples, as many captions for each as it
    had."""
    rng = random.Random(f"noise {seed}")
    chosen = rng.sample(range(images), round(share * images))
    if kind == "swap":  # a circle, so that none keeps its own
        return {i: ("swap", dataset[j].captions) for i, j in zip(chosen, chosen[1:] + chosen[:1])}
    wrong, texts, third = {}, rng.sample(texts, len(texts)), len(chosen) / 3
    for place, i in enumerate(chosen):
        n = len(dataset[i].captions)
        if place < third:
            short = [text.format(rng.randrange(1000, 9999)) for text in rng.choices(SHORT, k=n)]
            wrong[i] = "short", short
        elif place < 2 * third:
            wrong[i] = "boilerplate", rng.choices(BOILERPLATE, k=n)
        else:
            if len(texts) < n:
                raise UserError("--texts has too few lines for this --share, each is used once")
            wrong[i], texts = ("foreign", texts[:n]), texts[n:]
    return wrong


def write(dataset, images, wrong, path):
    """Writes samples with their captions, or the wrong ones, to a .tar. -> images of each kind."""
    counts = collections.Counter()
    with tarfile.open(path, "w") as tar:
        for i in range(images):
            sample, image, ending = dataset[i], io.BytesIO(), "png"
            if isinstance(sample.image, bytes):  # a file, which is copied as it is
                image, ending = io.BytesIO(sample.image), "jpg"
            else:
                Image.fromarray(decode(sample.image).permute(1, 2, 0).numpy()).save(image, "png")
            kind, captions = wrong.get(i, ("clean", sample.captions))
            captions = json.dumps({"captions": captions}).encode()
            for name, content in ((ending, image.getvalue()), ("json", captions)):
                member = tarfile.TarInfo(f"{i:08d}-{kind}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            counts[kind] += 1
    return counts


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--data", required=True, help="named dataset or path, see docs/data.md")
    parser.add_argument("--data-dir", default="", help="where named datasets are")
    parser.add_argument("--images", type=int, default=0, help="first of the train split (0: all)")
    parser.add_argument("--kind", choices=["swap", "junk"], required=True)
    parser.add_argument("--share", type=float, required=True, help="of the images, 0 to 1")
    parser.add_argument("--texts", default="", help=".tsv of key and text, for junk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder, not there yet")
    flags = parser.parse_args()
    if not 0 <= flags.share <= 1:
        raise UserError(f"--share {flags.share} is not between 0 and 1")
    texts = []
    if flags.kind == "junk":
        try:
            text = Path(flags.texts).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            needed = f"--kind junk needs --texts, a .tsv of key and text ({error})"
            raise UserError(needed) from error
        texts = [line.partition("\t")[2] for line in text.strip().split("\n")]
    dataset = open_dataset(flags.data, flags.data_dir)
    images = min(flags.images or len(dataset), len(dataset))
    wrong = wrong_captions(dataset, images, flags.kind, flags.share, flags.seed, texts)
    try:
        flags.output.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output {flags.output} cannot be made: {error}") from error
    counts = write(dataset, images, wrong, flags.output / "train.tar")
    print(f"{flags.output}: {', '.join(f'{n} {kind}' for kind, n in sorted(counts.items()))}")


if __name__ == "__main__":
    with user_errors():
        main()
