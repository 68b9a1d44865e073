"""Pictures of what a network has learned: where a transformer attends, what its patches have in
common, which patches of two images match, and the nearest neighbours of an image.

The first two sections are functions of tensors and Pillow images; the last one chooses the samples.
Letters: R rows and C columns of patches, N = R C, D width of a feature, H and W pixels.
"""

import contextlib
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch.func import functional_call

from common import UserError, rank
from data import decode
from evaluation.protocols import parse_numbers
from monitor import evaluating, extract_features

# colours of a heat map, dark to bright, and of the lines between matches
INFERNO = [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)]
HUES = [(230, 60, 60), (60, 170, 75), (60, 110, 230),
        (240, 170, 30), (150, 60, 190), (40, 190, 200)]  # fmt: skip


# -------------------------------------------- patches --------------------------------------------
def fit_image(image, size, patch, filter=Image.Resampling.BICUBIC):
    """uint8 (3, H, W) -> Pillow image whose shorter side has `size` pixels. It is cut around the
    centre, so that both sides are multiples of `patch` and the longer side is at most twice the
    shorter one."""
    h, w = image.shape[1:]
    scale = size / min(h, w)
    h, w = min(h, 2 * min(h, w)), min(w, 2 * min(h, w))
    cut = torchvision.transforms.functional.center_crop(image, [h, w])
    picture = Image.fromarray(cut.permute(1, 2, 0).numpy())
    picture = picture.resize((round(w * scale), round(h * scale)), filter)
    w, h = (side // patch * patch for side in picture.size)
    left, top = (picture.width - w) // 2, (picture.height - h) // 2
    return picture.crop((left, top, left + w, top + h))


@contextlib.contextmanager
def recorded_attention(last_only=False):
    """-> a list that grows by the weights of every attention that is computed in the block, after
    the softmax, (b, heads, N, N), or that has the last ones alone: those of all blocks may be
    gigabytes. They carry gradient. Causal attention, as of texts, is left out.

    All networks here call PyTorch's function, which keeps no weights; meanwhile this one stands in
    its place. The fast path of nn.MultiheadAttention would go around it."""
    seen, fused = [], F.scaled_dot_product_attention
    fast = torch.backends.mha.get_fastpath_enabled()

    def explicit(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        if attn_mask is not None or is_causal:
            return fused(q, k, v, attn_mask, dropout_p, is_causal, **options)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        if last_only:
            seen.clear()
        seen.append(weights)
        return weights @ v

    F.scaled_dot_product_attention = explicit
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention = fused
        torch.backends.mha.set_fastpath_enabled(fast)


def transformer_in(encoder):
    """The vision transformer in an encoder, with timm's names or with CLIP's, or None."""
    for module in encoder.modules():
        if hasattr(module, "blocks") or hasattr(module, "class_embedding"):
            return module
    return None


def patch_sides(vit):
    """-> height and width of a patch."""
    layer = vit.conv1 if hasattr(vit, "class_embedding") else vit.patch_embed.proj
    return layer.kernel_size


def resized_positions(vit, rows, columns):
    """{name: positions for this grid}, for transformers that know only that of their training;
    empty for others."""
    name = "positional_embedding" if hasattr(vit, "class_embedding") else "pos_embed"
    positions = getattr(vit, name)
    if hasattr(vit, "interpolate_pos_embed") or positions.shape[-2] == 1 + rows * columns:
        return {}
    of_class, of_patches = positions.view(1, *positions.shape[-2:]).tensor_split([1], dim=1)
    side = math.isqrt(of_patches.shape[1])
    grid = of_patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (rows, columns), mode="bicubic").flatten(2).transpose(1, 2)
    resized = torch.cat([of_class, grid], dim=1)
    return {name: resized.view(*positions.shape[:-2], *resized.shape[1:])}


@torch.no_grad()
def attention_and_features(vit, x):
    """x (b, 3, H, W), normalised, with sides that are multiples of the patch -> attention (b,
    heads, R, C) of the class token to each patch in the last block, after the softmax, and features
    (b, R, C, D) of the patches after the final norm."""
    seen = {}
    patch_height, patch_width = patch_sides(vit)
    rows, columns = x.shape[2] // patch_height, x.shape[3] // patch_width
    if hasattr(vit, "class_embedding"):  # CLIP's names
        last, norm = vit.transformer.resblocks[-1], vit.ln_post
    else:
        last, norm = vit.blocks[-1], vit.norm
    hook = last.register_forward_hook(lambda module, args, out: seen.update(tokens=out))
    try:
        with recorded_attention(last_only=True) as attention:
            functional_call(vit, resized_positions(vit, rows, columns), (x,))
    finally:
        hook.remove()
    features = norm(seen["tokens"]).float()
    first = features.shape[1] - rows * columns  # the class token, and registers if any, come before
    of_class = attention[-1][:, :, 0, first:].float().unflatten(-1, (rows, columns))
    return of_class, features[:, first:].unflatten(1, (rows, columns))


def mass_mask(attention, mass=0.6):
    """(..., N) -> bool: the patches with the largest attention that together have the share `mass`
    of it. As in DINO's visualize_attention.py, the attention of the class token to itself does not
    count."""
    share, order = (attention / attention.sum(-1, keepdim=True)).sort(dim=-1)
    kept = share.cumsum(-1) > 1 - mass
    return torch.zeros_like(kept).scatter(-1, order, kept)


def principal_components(x, n):
    """x (N, D) -> (N, n): x - mean, projected on the n directions of largest variance. The sign of
    a direction is arbitrary; here its entry of largest size is positive."""
    x = x.double() - x.double().mean(0)
    _, directions = torch.linalg.eigh(x.T @ x)  # in order of ascending variance
    directions = directions[:, -n:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return x @ (directions * largest.sign())


def pca_colors(features, threshold=0.0):
    """features: (R, C, D) of each image -> for each image its foreground (R, C) bool, and its
    colours (R, C, 3) in [0, 1].

    DINOv2's picture: the first component of the patches of all images tells foreground from
    background, by the threshold. Three components of the foreground alone, again of all images,
    become red, green and blue, so that equal colours mean equal parts. The sign is arbitrary; the
    side that touches the border less is called foreground."""
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
    fronts = [f.view(size) for f, size in zip(front.split(counts), sizes)]
    return fronts, [c.view(*size, 3) for c, size in zip(colors.split(counts), sizes)]


def matches(a, b, weight, k):
    """a (R, C, D), b (R', C', D), weight (R, C) -> [(row, column, row', column', cosine)]: for each
    of the k patches of a with the largest weight, the most similar patch of b. This is iBOT's
    picture, where the weight is the attention of the class token; the official code takes the dot
    product in place of the cosine."""
    flat_a, flat_b = F.normalize(a.flatten(0, 1), dim=1), F.normalize(b.flatten(0, 1), dim=1)
    chosen = weight.flatten().sort(descending=True, stable=True).indices[:k]
    cosine, found = (flat_a[chosen] @ flat_b.T).max(1)
    out = []
    for i, j, c in zip(chosen.tolist(), found.tolist(), cosine.tolist()):
        out.append((*divmod(i, a.shape[1]), *divmod(j, b.shape[1]), c))
    return out


# -------------------------------------------- drawing --------------------------------------------
def heat(x):
    """(R, C) -> Pillow image of R x C pixels, dark to bright from its smallest to its largest
    value."""
    x = ((x - x.min()) / (x.max() - x.min()).clamp_min(1e-12)).double().numpy()
    stops = np.linspace(0, 1, len(INFERNO))
    channels = [np.interp(x, stops, values) for values in zip(*INFERNO)]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def rgb(x):
    """(R, C, 3) in [0, 1] -> Pillow image of R x C pixels."""
    return Image.fromarray((x * 255).round().to(torch.uint8).numpy())


def dim_outside(picture, mask):
    """The picture with its pixels outside of mask, bool (R, C), at a fifth of their brightness."""
    mask = Image.fromarray(mask.numpy().astype(np.uint8) * 255).resize(
        picture.size, Image.Resampling.NEAREST
    )
    return Image.composite(picture, picture.point(lambda value: value // 5), mask)


def page(rows):
    """rows of cells (Pillow image, text over it) -> one Pillow image. All cells get the width of
    the widest one, or a multiple of it that is at least 128 pixels. They are enlarged without
    smoothing, so that a patch stays a square."""
    margin, line = 4, 14
    width = max(picture.width for row in rows for picture, _ in row)
    width = width * math.ceil(128 / width)
    strips = []  # height of the text, cells
    for row in rows:
        cells = []
        for picture, text in row:
            size = width, max(1, round(picture.height * width / picture.width))
            cells.append((picture.resize(size, Image.Resampling.NEAREST), text))
        strips.append((line * max(text.count("\n") + 1 for _, text in row), cells))
    height = margin + sum(text + max(p.height for p, _ in cells) + margin for text, cells in strips)
    sheet = Image.new("RGB", (margin + max(map(len, rows)) * (width + margin), height), "white")
    draw, y = ImageDraw.Draw(sheet), margin
    for text_height, cells in strips:
        for i, (picture, text) in enumerate(cells):
            x = margin + i * (width + margin)
            for n, words in enumerate(text.split("\n")):
                words = words.encode("ascii", "replace").decode()  # what Pillow's font has
                while len(words) > 4 and draw.textlength(words) > width:
                    words = words[:-4] + "..."
                draw.text((x, y + n * line), words, fill="black")
            sheet.paste(picture, (x, y + text_height))
        y += text_height + max(p.height for p, _ in cells) + margin
    return sheet


def attention_page(samples, mass):
    """samples: a list of (picture, text, attention (heads, R, C)). Each sample has two rows: the
    attention of the heads, dark to bright, and the patches that have the share `mass` of it. The
    mean of the heads comes first."""
    rows = []
    for picture, text, attention in samples:
        maps = torch.cat([attention.mean(0, keepdim=True), attention])
        names = ["all heads", *(f"head {i + 1}" for i in range(len(attention)))]
        rows.append([(picture, text), *((heat(x), name) for x, name in zip(maps, names))])
        masks = mass_mask(maps.flatten(1), mass).view(maps.shape)
        blank = Image.new("RGB", picture.size, "white")
        rows.append([(blank, "")])
        for mask in masks:
            text = f"{mass:.0%} on {mask.float().mean():.0%}"
            rows[-1].append((dim_outside(picture, mask), text))
    return page(rows)


def pca_page(samples, threshold):
    """samples: a list of (picture, text, features (R, C, D)). The three rows are the pictures,
    their foreground and its first three components as colours."""
    fronts, colors = pca_colors([features for _, _, features in samples], threshold)
    given = [(picture, text) for picture, text, _ in samples]
    kept = []
    for (picture, _), front in zip(given, fronts):
        kept.append((dim_outside(picture, front), f"foreground, {front.float().mean():.0%}"))
    return page([given, kept, [(rgb(color), "components 1 to 3") for color in colors]])


def matches_page(first, second, found):
    """first, second: (picture, text, grid (R, C)); found: what `matches` returned -> both pictures
    side by side, with a line for every match."""
    width, gap, top = 384, 32, 16
    pictures = []
    for p, _, _ in (first, second):
        size = width, round(p.height * width / p.width)
        pictures.append(p.resize(size, Image.Resampling.NEAREST))
    sheet = Image.new("RGB", (2 * width + gap, top + max(p.height for p in pictures)), "white")
    draw = ImageDraw.Draw(sheet)
    sides = []  # left edge, width and height of a patch
    for left, picture, (_, text, (rows, columns)) in zip(
        (0, width + gap), pictures, (first, second)
    ):
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
    """rows: lists of (picture, text, right), the query first and then its neighbours, `columns` of
    them on a line. The frame of a neighbour is green where right is True and red where it is
    False."""
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


# -------------------------------------------- of a network and a dataset --------------------------
def chosen_samples(dataset, args, one_class=False, counted=False):
    """-> [(index, Sample, uint8 (3, H, W))] of the samples that --samples names, or else of
    --images samples that can be read, the same in every run; how many cannot is printed, unless
    they are counted already. one_class: all of the class of the first one, if there are classes.
    Raises UserError."""
    try:
        wanted = [int(word) for word in args.samples.split(",")] if args.samples else []
    except ValueError as error:
        message = f"--samples {args.samples} must be numbers with commas between them"
        raise UserError(message) from error
    if any(not 0 <= i < len(dataset) for i in wanted):
        has = f"{dataset.name} has those from 0 to {len(dataset) - 1}"
        raise UserError(f"--samples {args.samples}: {has}")
    shuffled = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    found, errors = [], []
    for i in wanted or shuffled:
        try:
            sample = dataset[i]
            image = decode(sample.image)
        except (ValueError, OSError) as error:
            if wanted:
                message = f"sample {i} of {dataset.name} cannot be read ({error})"
                raise UserError(message) from error
            errors.append(f"sample {i} ({error})")
            continue
        other_class = one_class and found and sample.label != found[0][1].label
        if wanted or not other_class:
            found.append((i, sample, image))
        if len(found) == (len(wanted) or args.images):
            break
    if not found:
        reason = errors[0] if errors else "there are none"
        raise UserError(f"none of {len(dataset)} samples of {dataset.name} can be read: {reason}")
    if errors and not counted and rank() == 0:
        left_out = f"{dataset.name}: the picture leaves out {len(errors)} that cannot be read"
        print(f"{left_out}, {errors[0]}", file=sys.stderr)
    return found


def title(dataset, i, label):
    """A sample's number and its class; the number of a class that has no name."""
    if label < 0:
        return str(i)
    named = dataset.classes and label < len(dataset.classes)
    return f"{i}, {dataset.classes[label] if named else label}"


def inspected_samples(net, dataset, args, one_class=False):
    """-> [(picture, title, attention (heads, R, C), features (R, C, D))] of the chosen samples.
    Raises UserError unless the network is a transformer."""
    vit = transformer_in(net.encoder)
    if vit is None:
        raise UserError(f"this picture needs a transformer, not {net.method}'s {net.arch}")
    patch, size = patch_sides(vit)[0], args.size or net.view.size
    if size < patch:
        raise UserError(f"--size {size} is smaller than a patch, {patch}")
    out, device = [], next(net.encoder.parameters()).device
    for i, sample, image in chosen_samples(dataset, args, one_class):
        picture = fit_image(image, size, patch, net.view.filter)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(device)
        with evaluating(net.encoder):
            attention, features = attention_and_features(vit, net.view(pixels))
        text = title(dataset, i, sample.label)
        out.append((picture, text, attention[0].cpu(), features[0].cpu()))
    return out


# A picture takes the same as a protocol (see protocols.py) and returns a Pillow image.
def attention_picture(net, train, test, args, options):
    samples = [(p, t, attention) for p, t, attention, _ in inspected_samples(net, test, args)]
    return attention_page(samples, args.mass)


def pca_picture(net, train, test, args, options):
    inspected = inspected_samples(net, test, args, one_class=True)
    return pca_page([(p, t, features) for p, t, _, features in inspected], args.threshold)


def matches_picture(net, train, test, args, options):
    samples = inspected_samples(net, test, args, one_class=True)
    if len(samples) < 2:
        raise UserError("matches needs two images, give --samples or a larger --images")
    (picture, text, attention, a), (other, other_text, _, b) = samples[:2]
    found = matches(a, b, attention.mean(0), parse_numbers(args.k, int)[0])
    return matches_page((picture, text, a.shape[:2]), (other, other_text, b.shape[:2]), found)


def neighbors_picture(net, train, test, args, options):
    """Neighbours come from the train split or, where there is none, from the others of the same
    split."""
    bank, size = train or test, args.size or net.view.size
    found_in_bank = extract_features(net.encoder, net.encoder, bank, **options)

    def cell(dataset, i, text, query=None):
        sample = dataset[i]
        picture = fit_image(decode(sample.image), size, 1, net.view.filter)
        comparable = query is not None and query.label >= 0 and dataset.classes == test.classes
        right = query.label == sample.label if comparable else None
        return picture, f"{text}{title(dataset, i, sample.label)}", right

    rows = []
    for i, sample, _ in chosen_samples(test, args, counted=bank is test):
        query = extract_features(net.encoder, net.encoder, test, **options, indices=[i]).images
        cosine = F.normalize(found_in_bank.images, dim=1) @ F.normalize(query, dim=1)[0]
        candidates = len(cosine)
        if bank is test:
            cosine[found_in_bank.index == i] = -2  # an image is no neighbour of itself
            candidates -= 1
        if not candidates:
            only = f"{bank.name} has only one image that can be read"
            raise UserError(f"neighbors needs another image to show, {only}")
        nearest = cosine.sort(descending=True, stable=True)
        most = min(parse_numbers(args.k, int)[0], candidates)
        row = [cell(test, i, "")]
        for c, j in zip(nearest.values[:most], nearest.indices[:most]):
            row.append(cell(bank, int(found_in_bank.index[j]), f"{c:.3f}\n", sample))
        rows.append(row)
    return neighbors_page(rows)


PICTURES = {"attention": attention_picture, "pca": pca_picture, "matches": matches_picture}
PICTURES |= {"neighbors": neighbors_picture}
