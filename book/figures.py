"""Pictures of the book, drawn when it is built: the family tree, learning curves, samples of the
drawn sets.

Drawings are SVG inside the page. Their colours come from book.css, so that they follow the dark
mode.
"""

import html
import io
import math
from collections import namedtuple

import numpy as np
from PIL import Image

Line = namedtuple(
    "Line", "label points url start"
)  # points: (x, y); start: with random weights, or None
Sample = namedtuple("Sample", "image captions label key")  # what scenes.py makes of an index


# ------------------------------------ family tree ------------------------------------
def tree(methods, url):
    """methods: {name: (title, arXiv id, parent)}, parents first, as benchmarks/table.py has them. A
    box links url(name); a branch links url(name, parent), the difference between the two files."""
    wide, high, step_x, step_y = 118, 40, 178, 62
    places, row = {}, 0

    def put(name, depth):
        nonlocal row
        children = [child for child in methods if methods[child][2] == name]
        for child in children:
            put(child, depth + 1)
        if not children:
            row += 1
        y = (row - 1) if not children else (places[children[0]][1] + places[children[-1]][1]) / 2
        places[name] = depth, y

    for name in methods:
        if methods[name][2] is None:
            put(name, 0)
    width = max(depth for depth, _ in places.values()) * step_x + wide + 4
    out, edges = "", ""
    for name, (depth, y) in places.items():
        title, arxiv, parent = methods[name]
        left, top = 2 + depth * step_x, 2 + y * step_y
        year, center = f"20{arxiv[:2]}", left + wide / 2
        out += (f'<a href="{url(name)}">'
                f'<rect x="{left}" y="{top}" width="{wide}" height="{high}" rx="5"/>'
                f'<text x="{center}" y="{top + 18}">{title}</text>'
                f'<text class="year" x="{center}" y="{top + 33}">{year}</text></a>')  # fmt: skip
        if parent:
            start = 2 + places[parent][0] * step_x + wide, 2 + places[parent][1] * step_y + high / 2
            end, middle = (left, top + high / 2), left - (step_x - wide) / 2
            line = (
                f"M{start[0]} {start[1]} C{middle} {start[1]} {middle} {end[1]} {end[0]} {end[1]}"
            )
            said = f"what turns {methods[parent][0]} into {title}"
            edges += (f'<a href="{url(name, parent)}" aria-label="{said}"><title>{said}</title>'
                      f'<path class="wide" d="{line}"/><path d="{line}"/></a>')  # fmt: skip
    label = "Family tree of the method files: a line leads from each file to those that are read "
    label += "against it"
    box = f"0 0 {width} {row * step_y - step_y + high + 4}"
    return (f'<div class="scroll"><svg class="tree" viewBox="{box}" '
            f'role="group" aria-label="{label}">{edges}{out}</svg></div>')  # fmt: skip


# ------------------------------------ curves ------------------------------------
def ticks(low, high, count=5):
    """Round numbers from low to high."""
    step = (high - low) / count or 1.0
    power = 10 ** math.floor(math.log10(step))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= step * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def apart(heights, least):
    """Heights of labels moved so that neighbours are at least so far from each other, their order
    kept."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = [heights[i] for i in order]
    for _ in range(200):
        for i in range(1, len(moved)):
            lack = least - (moved[i] - moved[i - 1])
            if lack > 0:
                moved[i - 1] -= lack / 2
                moved[i] += lack / 2
    out = [0.0] * len(heights)
    for i, y in zip(order, moved):
        out[i] = y
    return out


def chart(lines, chance, x_label, y_label, said, from_zero=True):
    """SVG of a few lines with their names at their ends. The dashed line is chance. The same
    network with random weights is a dotted line if there is one network, and a ring at the left end
    for each of several ones. said: what the figure shows, for those who do not see it."""
    width, height, left, right, top, bottom = 640, 300, 60, 166, 14, 46
    starts = [line.start for line in lines if line.start is not None]
    xs = [x for line in lines for x, _ in line.points]
    ys = (
        [y for line in lines for _, y in line.points]
        + starts
        + ([chance] if chance is not None else [])
    )
    low, high = (0 if from_zero and min(ys) >= 0 else min(ys)), max(ys)
    low, high = low - (0.05 * (high - low) if low else 0), high + 0.05 * (high - low)

    def x_at(x):
        return left + (width - left - right) * x / max(xs)

    def y_at(y):
        return height - bottom - (height - top - bottom) * (y - low) / (high - low)

    out = ""
    for y in ticks(low, high):
        out += f'<path class="grid" d="M{left} {y_at(y):.1f}H{width - right}"/>'
        out += f'<text x="{left - 8}" y="{y_at(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
    for x in ticks(0, max(xs)):
        out += f'<text x="{x_at(x):.1f}" y="{height - bottom + 17}" text-anchor="middle">'
        out += f"{x:,.6g}</text>"
    out += f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">'
    out += f"{x_label}</text>"
    turned = f"translate(14 {(height - bottom + top) / 2}) rotate(-90)"
    out += f'<text transform="{turned}" text-anchor="middle">{html.escape(y_label)}</text>'
    labels = [
        (line.label, line.points[-1][1], f"line{i}", line.url) for i, line in enumerate(lines)
    ]
    levels = [("chance", chance)] if chance is not None else []
    if len(lines) == 1:
        levels += [("random weights", start) for start in starts]
    for kind, y in levels:
        mark = kind.replace("random weights", "start")
        out += f'<path class="{mark}" d="M{left} {y_at(y):.1f}H{width - right}"/>'
        labels.append((f"{kind} {y:.4g}", y, mark, None))
    for i, line in enumerate(lines):
        points = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line.points)
        out += f'<polyline class="line{i}" points="{points}"/>'
        if len(line.points) <= 3:  # a single point would be no line at all
            dots = "".join(f"M{x_at(x):.1f} {y_at(y):.1f}h0" for x, y in line.points)
            out += f'<path class="dot line{i}" d="{dots}"/>'
        if line.start is not None and len(lines) > 1:
            out += f'<circle class="line{i}" cx="{left}" cy="{y_at(line.start):.1f}" r="4.5"/>'
    for (label, _, kind, url), y in zip(labels, apart([y_at(y) for _, y, *_ in labels], 16)):
        text = f'<text class="{kind}" x="{width - right + 8}" y="{y + 4:.1f}">'
        text += f"{html.escape(label)}</text>"
        out += f'<a href="{url}">{text}</a>' if url else text
    said = html.escape(said)
    return (f'<svg class="chart" viewBox="0 0 {width} {height}" role="group" aria-label="{said}">'
            f"<title>{said}</title>{out}</svg>")  # fmt: skip


# ------------------------------------ drawn sets ------------------------------------
def samples(dataset, count, columns, zoom=2):
    """PNG of the first samples of a drawn set, and their (caption or class) in the same order."""
    shown = [dataset[i] for i in range(count)]
    images = [np.asarray(sample.image) for sample in shown]
    images = [image.transpose(1, 2, 0) if image.shape[0] == 3 else image for image in images]
    side, gap = images[0].shape[0] * zoom, 4
    rows = -(count // -columns)
    sheet = Image.new("RGBA", (columns * (side + gap) - gap, rows * (side + gap) - gap))
    for i, image in enumerate(images):
        tile = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(tile, (i % columns * (side + gap), i // columns * (side + gap)))
    # a palette takes a third of the bytes
    sheet = sheet.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue(), [sample.captions[0] if sample.captions else "" for sample in shown]
