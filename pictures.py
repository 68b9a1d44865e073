"""Pictures: what a transformer's patches attend to and resemble, nearest neighbours; views, curves of a run.

Everything takes tensors and Pillow images and gives a Pillow image; evaluate.py picks networks and samples.
Letters: R rows and C columns of patches, N = R C, D width, H and W pixels.
"""

import importlib.util
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch.func import functional_call

from common import rank

INFERNO = [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)]  # dark to bright
HUES = [(230, 60, 60), (60, 170, 75), (60, 110, 230), (240, 170, 30), (150, 60, 190), (40, 190, 200)]


# -------------------------------------------- patches --------------------------------------------
def fit_image(image, size, patch, filter=Image.Resampling.BICUBIC):
    """uint8 (3, H, W) -> Pillow image whose shorter side has `size` pixels, cut centrally so that both sides
    are multiples of `patch` and the longer is at most twice the shorter."""
    h, w = image.shape[1:]
    scale = size / min(h, w)
    h, w = min(h, 2 * min(h, w)), min(w, 2 * min(h, w))
    cut = torchvision.transforms.functional.center_crop(image, [h, w])
    picture = Image.fromarray(cut.permute(1, 2, 0).numpy()).resize(
        (round(w * scale), round(h * scale)), filter
    )
    w, h = (side // patch * patch for side in picture.size)
    left, top = (picture.width - w) // 2, (picture.height - h) // 2
    return picture.crop((left, top, left + w, top + h))


@torch.no_grad()
def patches(vit, x):
    """x (b, 3, H, W), normalised, sides multiples of the patch -> attention (b, heads, R, C) that the class
    token pays each patch in the last block, after the softmax; features (b, R, C, D) of the patches after the
    last norm."""
    seen, last = {}, vit.blocks[-1]
    rows, columns = (side // patch for side, patch in zip(x.shape[2:], vit.patch_embed.proj.kernel_size))
    swapped = {}  # positions, for networks that know only those of their training
    if not hasattr(vit, "interpolate_pos_embed") and vit.pos_embed.shape[1] != 1 + rows * columns:
        side = math.isqrt(vit.pos_embed.shape[1] - 1)
        grid = vit.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (rows, columns), mode="bicubic").flatten(2).transpose(1, 2)
        swapped["pos_embed"] = torch.cat([vit.pos_embed[:, :1], grid], dim=1)
    hooks = [last.attn.qkv.register_forward_hook(lambda module, args, out: seen.update(qkv=out.float())),
             last.register_forward_hook(lambda module, args, out: seen.update(tokens=out))]  # fmt: skip
    try:
        functional_call(vit, swapped, (x,))
    finally:
        for hook in hooks:
            hook.remove()
    heads = last.heads if hasattr(last, "heads") else last.attn.heads  # DINOv2's blocks attend themselves
    q, k, _ = seen["qkv"].unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (b, heads, N, .)
    attention = (q[:, :, :1] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0]
    features = vit.norm(seen["tokens"]).float()
    first = features.shape[1] - rows * columns  # after the class token, and registers where there are some
    return (attention[:, :, first:].unflatten(-1, (rows, columns)),
            features[:, first:].unflatten(1, (rows, columns)))  # fmt: skip


def mass_mask(attention, mass=0.6):
    """(..., N) -> bool: the patches of largest attention that together get this share of it. As in DINO's
    visualize_attention.py, what the class token pays itself does not count."""
    share, order = (attention / attention.sum(-1, keepdim=True)).sort(dim=-1)
    kept = share.cumsum(-1) > 1 - mass
    return torch.zeros_like(kept).scatter(-1, order, kept)


def principal_components(x, n):
    """x (N, D) -> (N, n): x - mean on the n directions of largest variance. The sign of a direction is
    arbitrary; here its entry of largest size is positive."""
    x = x.double() - x.double().mean(0)
    _, directions = torch.linalg.eigh(x.T @ x)  # of ascending variance
    directions = directions[:, -n:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return x @ (directions * largest.sign())


def pca_colors(features, threshold=0.0):
    """features (R, C, D) of each image -> of each foreground (R, C) bool and colours (R, C, 3) in [0, 1].

    DINOv2's picture: the first component of the patches of all images, above or below the threshold, tells
    foreground from background; three components of the foreground alone, again of all images, are red, green
    and blue, so that equal colours mean equal parts. Which side of the threshold is the foreground, the data
    do not say: it is the one that has less of the images' borders."""
    sizes = [f.shape[:2] for f in features]
    every = torch.cat([f.flatten(0, 1) for f in features])
    border = [torch.ones(size, dtype=torch.bool) for size in sizes]
    for edge in border:
        edge[1:-1, 1:-1] = False
    first = principal_components(every, 1)[:, 0]
    first = first / first.std().clamp_min(1e-12)  # the threshold counts standard deviations
    if first[torch.cat([edge.flatten() for edge in border])].median() > 0:
        first = -first
    front = first > threshold
    colors = torch.zeros(len(every), 3, dtype=torch.float64)
    if front.any():
        parts = principal_components(every[front], 3)
        low, high = parts.amin(0), parts.amax(0)
        colors[front] = (parts - low) / (high - low).clamp_min(1e-12)
    counts = [rows * columns for rows, columns in sizes]
    return ([f.view(size) for f, size in zip(front.split(counts), sizes)],
            [c.view(*size, 3) for c, size in zip(colors.split(counts), sizes)])  # fmt: skip


def matches(a, b, weight, k):
    """a (R, C, D), b (R', C', D), weight (R, C) -> [(row, column, row', column', cosine)]: for each of the k
    patches of a that weigh most, the patch of b that is most like it. iBOT's picture, where the weight is the
    attention of the class token; its official code takes the dot product for the cosine."""
    flat_a, flat_b = F.normalize(a.flatten(0, 1), dim=1), F.normalize(b.flatten(0, 1), dim=1)
    chosen = weight.flatten().topk(min(k, weight.numel())).indices
    cosine, found = (flat_a[chosen] @ flat_b.T).max(1)
    return [(*divmod(i, a.shape[1]), *divmod(j, b.shape[1]), c)
            for i, j, c in zip(chosen.tolist(), found.tolist(), cosine.tolist())]  # fmt: skip


# -------------------------------------------- drawing --------------------------------------------
def heat(x):
    """(R, C) -> Pillow image of R x C pixels, dark to bright from its smallest to its largest value."""
    x = ((x - x.min()) / (x.max() - x.min()).clamp_min(1e-12)).double().numpy()
    stops = np.linspace(0, 1, len(INFERNO))
    channels = [np.interp(x, stops, values) for values in zip(*INFERNO)]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def rgb(x):
    """(R, C, 3) in [0, 1] -> Pillow image of R x C pixels."""
    return Image.fromarray((x * 255).round().to(torch.uint8).numpy())


def dim_outside(picture, mask):
    """The picture with its pixels outside of mask, bool (R, C), at a fifth of their brightness."""
    mask = Image.fromarray(mask.numpy().astype(np.uint8) * 255).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(picture, picture.point(lambda value: value // 5), mask)


def page(rows):
    """rows of cells (Pillow image, text over it) -> one Pillow image. All cells are as wide as the widest, or
    a multiple from 128 pixels on; they are enlarged without smoothing, so that a patch stays a square."""
    width = max(picture.width for row in rows for picture, _ in row)
    width, margin, line = width * -(-128 // width), 4, 14
    strips = []  # height of the text, cells
    for row in rows:
        sizes = [(width, max(1, round(p.height * width / p.width))) for p, _ in row]
        cells = [(p.resize(size, Image.Resampling.NEAREST), text) for (p, text), size in zip(row, sizes)]
        strips.append((line * max(text.count("\n") + 1 for _, text in row), cells))
    height = margin + sum(text + max(p.height for p, _ in cells) + margin for text, cells in strips)
    sheet = Image.new("RGB", (margin + max(map(len, rows)) * (width + margin), height), "white")
    draw, y = ImageDraw.Draw(sheet), margin
    for text_height, cells in strips:
        for i, (picture, text) in enumerate(cells):
            x = margin + i * (width + margin)
            for n, words in enumerate(text.split("\n")):
                words = words.encode("ascii", "replace").decode()  # what every font of Pillow can write
                while len(words) > 4 and draw.textlength(words) > width:
                    words = words[:-4] + "..."
                draw.text((x, y + n * line), words, fill="black")
            sheet.paste(picture, (x, y + text_height))
        y += text_height + max(p.height for p, _ in cells) + margin
    return sheet


def attention_page(samples, mass):
    """samples: (picture, text, attention (heads, R, C)) each. In two rows each: where the heads look, dark to
    bright, and the patches that get `mass` of that. First comes the mean of the heads."""
    rows = []
    for picture, text, attention in samples:
        maps = torch.cat([attention.mean(0, keepdim=True), attention])
        names = ["all heads", *(f"head {i + 1}" for i in range(len(attention)))]
        rows.append([(picture, text), *((heat(x), name) for x, name in zip(maps, names))])
        masks = mass_mask(maps.flatten(1), mass).view(maps.shape)
        blank = Image.new("RGB", picture.size, "white")
        kept = [
            (dim_outside(picture, mask), f"{mass:.0%} on {mask.float().mean():.0%}") for mask in masks
        ]
        rows.append([(blank, ""), *kept])
    return page(rows)


def pca_page(samples, threshold):
    """samples: (picture, text, features (R, C, D)) each: the pictures, their foreground, its components."""
    fronts, colors = pca_colors([features for _, _, features in samples], threshold)
    kept = [(dim_outside(s[0], front), f"foreground, {front.float().mean():.0%}")
            for s, front in zip(samples, fronts)]  # fmt: skip
    return page([[s[:2] for s in samples], kept, [(rgb(color), "components 1 to 3") for color in colors]])


def matches_page(first, second, found):
    """(picture, text, grid (R, C)) of two images, what `matches` found -> both, with a line for every one."""
    width, gap, top = 384, 32, 16
    pictures = [p.resize((width, round(p.height * width / p.width)), Image.Resampling.NEAREST)
                for p, _, _ in (first, second)]  # fmt: skip
    sheet = Image.new("RGB", (2 * width + gap, top + max(p.height for p in pictures)), "white")
    draw = ImageDraw.Draw(sheet)
    sides = []  # left edge, width and height of a patch
    for left, picture, (_, text, (rows, columns)) in zip((0, width + gap), pictures, (first, second)):
        draw.text((left + 2, 1), text.encode("ascii", "replace").decode(), fill="black")
        sheet.paste(picture, (left, top))
        sides.append((left, width / columns, picture.height / rows))
    for i, (row, column, other_row, other_column, _) in enumerate(found):
        color, ends = HUES[i % len(HUES)], []
        for (left, w, h), (r, c) in zip(sides, ((row, column), (other_row, other_column))):
            x, y = left + c * w, top + r * h
            draw.rectangle((x, y, x + w - 1, y + h - 1), outline=color, width=2)
            ends.append((x + w / 2, y + h / 2))
        draw.line(ends, fill=color, width=2)
    return sheet


def neighbors_page(rows, columns=10):
    """rows: a query and its neighbours, (picture, text, right) each, in lines of `columns`; their frames are
    green where right is True, red where it is False."""
    lines = []
    for row in rows:
        query, *cells = [(framed(picture, right), text) for picture, text, right in row]
        blank = Image.new("RGB", query[0].size, "white"), ""
        for i in range(0, len(cells), columns):
            lines.append([blank if i else query, *cells[i : i + columns]])
    return page(lines)


def framed(picture, right):
    color = {None: "white", True: (40, 160, 60), False: (210, 50, 40)}[right]
    return ImageOps.expand(picture, max(1, picture.width // 24), color)


# -------------------------------------------- a run --------------------------------------------
def save_views(directory, images, views):
    """Writes views.png: the first eight samples of a batch, a row for each view, as the model sees them.
    Wrong augmentations are found by looking, so this comes before the first step. images: name -> float (b,
    3, S, S), as normalised by views[name]."""
    strips = []
    for name, x in images.items() if rank() == 0 else ():
        mean, std = getattr(views[name], "mean", (0, 0, 0)), getattr(views[name], "std", (1, 1, 1))
        mean, std = (torch.tensor(t, dtype=torch.float32).view(3, 1, 1) for t in (mean, std))
        x = (x[:8].float().cpu() * std + mean).clamp(0, 1)
        x = F.interpolate(x, scale_factor=max(1, 128 // x.shape[-1]))  # small ones are enlarged
        strips.append((name, torchvision.transforms.functional.to_pil_image(torchvision.utils.make_grid(x))))
    if strips:
        size = max(strip.width for _, strip in strips), sum(strip.height + 14 for _, strip in strips)
        page, top = Image.new("RGB", size, "white"), 0
        for name, strip in strips:
            ImageDraw.Draw(page).text((2, top + 1), name, fill="black")
            page.paste(strip, (0, top + 14))
            top += strip.height + 14
        page.save(Path(directory) / "views.png")


def save_curves(directory):
    """Writes curves.png if matplotlib is there: every column of metrics.jsonl, its chance level dashed."""
    if rank() > 0 or not importlib.util.find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in dict.fromkeys(itertools.chain.from_iterable(rows))
             if name not in ("step", "epoch", "end") and "chance" not in name]  # fmt: skip
    figure = Figure(figsize=(4 * min(4, len(names)), 3 * -(-len(names) // 4)), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(-(-len(names) // 4), min(4, len(names)), i + 1, title=name, xlabel="step")
        chance = "chance" if name == "loss" else re.split("_loss|_top|@", name)[0] + "_chance"
        for key, style in ((name, "-"), (chance, "--")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot(*zip(*points), style) if points else None
    figure.savefig(Path(directory) / "curves.png", dpi=80)
