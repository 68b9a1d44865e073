"""Pictures that a text asks for: where an image supports it, the images that fit it best, and the
captions that DeCLIP's queue finds for it.

Letters: R rows and C columns of patches, N tokens, T texts, E width of an embedding.
"""

import json
import math
import os
import sys
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

from common import UserError, all_gather, rank
from data import Loader, decode, open_dataset
from evaluation import pictures
from evaluation.features import cached_features
from evaluation.pictures import chosen_samples, fit_image, heat, neighbors_page, page
from evaluation.pictures import patch_sides, recorded_attention, title, transformer_in
from evaluation.protocols import parse_numbers
from layouts import PICTURES as IMAGE_ENDINGS
from layouts import ending_of
from monitor import evaluating, tokenize
from run import fingerprint, load_checkpoint

CELL = 150  # pixels of an image beside its captions, which get twice as much


def embedded_texts(net, texts, device):
    """-> unit vectors (T, E)."""
    with evaluating(net.model), torch.no_grad():
        return F.normalize(net.model.encode_text(tokenize(net.tokenizer, texts, device)), dim=1)


# -------------------------------------------- explain --------------------------------------------
def attention_relevance(attention, gradients):
    """Gradient-weighted attention (Chefer et al. 2021, arXiv 2103.15679, Eq. 5 and 6), (N,): how
    much each token contributes to a score through the class token.

    attention, gradients: for each block (heads, N, N), the weights and the derivative of the score
    by them. Relevance starts as the identity, every token stands for itself, and each block adds
    what it mixes, R <- R + A R, where A is the mean over heads of the positive part of attention
    times gradient."""
    relevance = torch.eye(attention[0].shape[-1])
    for weights, gradient in zip(attention, gradients):
        mixed = (weights * gradient).clamp_min(0).mean(0).cpu().float()
        relevance = relevance + mixed @ relevance
    return relevance[0]


def grad_cam(activation, gradient):
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391, Eq. 1 and 2), (R, C): the channels of a
    layer (D, R, C), each weighted with the mean of the score's derivative by it, then the positive
    part of their sum."""
    weights = gradient.mean((1, 2), keepdim=True)
    return (weights * activation).sum(0).clamp_min(0).cpu().float()


def supported(model, pixels, texts):
    """Where an image supports each text -> cosines (T,), maps (T, R, C) without negative numbers.

    model: has encode_image and visual, a vision transformer, or a convolutional network whose last
    layer is layer4 (ResNet) or features (EfficientNet). pixels (1, 3, S, S), normalised; texts (T,
    E), unit vectors. The score whose derivative is taken is the cosine."""
    vit, kept = transformer_in(model.visual), []
    with evaluating(model), torch.enable_grad():
        if vit is not None:
            with recorded_attention() as kept:
                image = model.encode_image(pixels)
        else:
            last = model.visual.layer4 if hasattr(model.visual, "layer4") else model.visual.features
            hook = last.register_forward_hook(lambda module, args, out: kept.append(out))
            try:
                image = model.encode_image(pixels.requires_grad_())
            finally:
                hook.remove()
        cosines = F.normalize(image, dim=1)[0] @ texts.T
        maps = []
        for cosine in cosines:
            gradients = torch.autograd.grad(cosine, kept, retain_graph=True)
            found = [x[0].detach() for x in kept], [x[0] for x in gradients]
            if vit is None:
                maps.append(grad_cam(found[0][-1], found[1][-1]))
                continue
            rows, columns = (s // p for s, p in zip(pixels.shape[2:], patch_sides(vit)))
            of_patches = attention_relevance(*found)[-rows * columns :]
            maps.append(of_patches.view(rows, columns))
    return cosines.detach().cpu(), torch.stack(maps)


def overlay(picture, relevance):
    """The picture under a heat map (R, C) of the same extent, both enlarged to 192 pixels or
    more."""
    scale = math.ceil(192 / picture.width)
    size = picture.width * scale, picture.height * scale
    colors = heat(relevance).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(picture.resize(size, Image.Resampling.NEAREST).convert("RGB"), colors, 0.6)


def explain_picture(net, train, test, args, options):
    """A row for each image: the image as the network sees it, then for each --text where the image
    supports it. Every map is scaled from its own smallest to its largest value; cosines compare
    texts."""
    if not args.text:
        raise UserError('explain needs --text "a red star", once or several times')
    if args.size:
        raise UserError("explain draws images at the size of the evaluation: leave --size out")
    device, rows = options["device"], []
    texts = embedded_texts(net, args.text, device)
    for i, sample, image in chosen_samples(test, args):
        pixels = net.view.crop(image)
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        cosines, maps = supported(net.model, net.view(pixels[None].to(device)), texts)
        rows.append([(picture, title(test, i, sample.label))])
        for text, cosine, relevance in zip(args.text, cosines, maps):
            rows[-1].append((overlay(picture, relevance), f"{text}\ncosine {cosine:.3f}"))
    return page(rows)


# -------------------------------------------- search ---------------------------------------------
class ImageEmbedding(nn.Module):
    """Images -> their embeddings beside texts, (b, E)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.encode_image(x)


def embedded(net, word, device):
    """A text, or the path of an image -> unit vector (E,). Raises UserError."""
    is_image = ending_of(word) in IMAGE_ENDINGS
    file = os.path.expanduser(word)
    if not is_image and not os.path.isfile(file):  # False for a text too long for a file's name
        return embedded_texts(net, [word], device)[0]
    try:
        image = decode(Path(file).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{word} cannot be read as an image ({error})") from error
    with evaluating(net.model), torch.no_grad():
        pixels = net.view(net.view.crop(image)[None].to(device))
        return F.normalize(net.model.encode_image(pixels), dim=1)[0]


def combined(plus, minus):
    """Unit vectors -> the unit vector along their sums and differences: ALIGN's arithmetic of image
    and text (Fig. 5). Raises UserError where nothing is left."""
    total = sum(plus) - sum(minus) if minus else sum(plus)
    if total.norm() < 1e-4:
        raise UserError("the query takes away all that it names: choose another --minus")
    return F.normalize(total, dim=0)


def search_picture(net, train, test, args, options):
    """The --k images of the split that are most similar to each query, a text or an image, plus
    every --plus, minus every --minus. Their cosines are printed."""
    if not args.text and not args.plus:
        raise UserError('search needs a query: "a dog", or --plus with a text or an image')
    device = options["device"]
    plus = [embedded(net, word, device) for word in args.plus]
    minus = [embedded(net, word, device) for word in args.minus]
    features, _, index = cached_features(ImageEmbedding(net.model), test, **options)
    images, most = F.normalize(features, dim=1), parse_numbers(args.k, int)[0]
    rows = []
    for text in args.text or [""]:
        first = [embedded(net, text, device)] if text else []
        query = combined([*first, *plus], minus).cpu()
        cosines, found = (images @ query).sort(descending=True, stable=True)
        words = [*([text] if text else []), *args.plus]
        name = " + ".join(words) + "".join(f" - {word}" for word in args.minus)
        hits = []
        row = [(Image.new("RGB", (net.view.size, net.view.size), "white"), name, None)]
        for cosine, place in zip(cosines[:most].tolist(), found[:most].tolist()):
            i = int(index[place])
            sample = test[i]
            picture = fit_image(decode(sample.image), net.view.size, 1, net.view.filter)
            row.append((picture, f"{cosine:.3f}\n{title(test, i, sample.label)}", None))
            hits.append({"sample": i, "cosine": round(cosine, 4), "key": sample.key})
        rows.append(row)
        say_hits(name, hits, args)
    return neighbors_page(rows)


def say_hits(name, hits, args):
    if rank() > 0:
        return
    if args.json:
        print(json.dumps({"query": name, "hits": hits}))
        return
    print(name)
    for hit in hits:
        print(f"{hit['cosine']:8.3f}  {hit['sample']:6d}  {hit['key']}")


# -------------------------------------------- DeCLIP's queue -------------------------------------
def queued_ids(saved, tokenizer, data_dir):
    """-> {row of the queue: token ids of the caption that its feature is of, with start and end}.

    saved: a checkpoint of declip.py without --released. The queue holds features alone; which
    captions they were follows from the loader, whose batches are a function of seed and step.
    Raises UserError if the data are no longer those of the run."""
    args, rows = saved["args"], len(saved["queue"]["features"])
    batch_size = args["batch_size"]
    dataset = open_dataset(args["data"], data_dir)
    found = [len(dataset), fingerprint(dataset)]
    if saved.get("data", found) != found:
        lost = "which captions are in the queue of the run is not known any more"
        raise UserError(f"{dataset.name} has changed: {lost}")
    loader = Loader(dataset, {}, {"text": tokenizer}, batch_size, args["seed"])
    first, ids = max(0, saved["step"] - rows // batch_size), {}
    for step, batch in loader.batches(first, saved["step"]):
        lacking = tokenizer.context_length - batch["text"].shape[1]  # processes differ in it
        text = all_gather(F.pad(batch["text"], (0, lacking)))
        for i, row in enumerate(text.tolist()):
            ids[(step * batch_size + i) % rows] = row[: row.index(tokenizer.eot) + 1]
    return ids


def queue_picture(net, train, test, args, options):
    """Images with their captions, and the captions in the queue of a DeCLIP run that are nearest to
    these: the pairs that its nearest-neighbour supervision adds (DeCLIP Sec. 3). They are printed
    too."""
    saved = load_checkpoint(net.path) if net.method == "declip" else {}
    if "queue" not in saved or saved["args"]["released"]:
        raise UserError(f"--queue needs a run of declip.py without --released, not {net.path}")
    if not test.captioned:
        raise UserError(f"--queue needs captions, which {test.name} does not have")
    ids = queued_ids(saved, net.tokenizer, args.data_dir)
    known = torch.tensor(sorted(ids))
    chosen = chosen_samples(test, args)
    samples = [s for s in chosen if any(map(str.strip, s[1].captions))]
    if not samples:
        raise UserError(f"none of the {len(chosen)} samples has a caption, give others (--samples)")
    if len(samples) < len(chosen) and rank() == 0:
        left_out = f"{len(chosen) - len(samples)} of {len(chosen)} samples"
        print(f"{test.name}: left out {left_out}, which have no caption", file=sys.stderr)
    captions = [next(filter(str.strip, sample.captions)) for _, sample, _ in samples]
    texts = embedded_texts(net, captions, options["device"]).cpu()
    cosines, nearest = (texts @ saved["queue"]["features"][known].T).max(1)
    found = []
    for row in known[nearest].tolist():
        caption = net.tokenizer.bpe.decode(ids[row][1:-1], skip_special_tokens=False)
        found.append(caption.strip())
    if rank() == 0:
        for caption, other, cosine in zip(captions, found, cosines.tolist()):
            pair = {"caption": caption, "found": other, "cosine": round(cosine, 4)}
            print(json.dumps(pair) if args.json else f"{caption}  ->  {other}  ({cosine:.3f})")
    return pairs_page(samples, captions, found, cosines.tolist())


def pairs_page(samples, captions, found, cosines):
    """Two columns of images, each with its caption and the one that was found beside it."""
    width, height = 3 * CELL + 10, CELL + 10
    sheet = Image.new("RGB", (2 * width, math.ceil(len(samples) / 2) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (_, _, image) in enumerate(samples):
        left, top = i % 2 * width, i // 2 * height
        picture = fit_image(image, CELL, 1)
        picture.thumbnail((CELL, CELL))
        sheet.paste(picture, (left, top))
        lines = [*textwrap.wrap(captions[i], 44), "", f"found, cosine {cosines[i]:.3f}:"]
        lines += textwrap.wrap(found[i], 44)
        words = "\n".join(lines).encode("ascii", "replace").decode()
        draw.multiline_text((left + CELL + 8, top + 10), words, fill="black", spacing=5)
    return sheet


def neighbors_picture(net, train, test, args, options):
    """Those of images, or with --queue those of captions."""
    draw = queue_picture if args.queue else pictures.neighbors_picture
    return draw(net, train, test, args, options)


# Pictures whose network needs its text encoder
WITH_TEXT = {"explain": explain_picture, "search": search_picture}
PICTURES = {**pictures.PICTURES, "neighbors": neighbors_picture, **WITH_TEXT}
