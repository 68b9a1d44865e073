"""Draws docs/figures/NAME.png: the learning curves of all methods on one dataset, from
results/METHOD_NAME.json.

    python benchmarks/figure.py shapes      # zero-shot accuracy of the language-image files
    python benchmarks/figure.py flocks      # kNN accuracy of the self-supervised files
    python benchmarks/figure.py cifar10_cpu # over minutes, by the rates of end_to_end.json
    python benchmarks/figure.py simsiam_ablation    # a run on flocks beside those without a part
    python benchmarks/figure.py speed       # steps beside other libraries, of side_by_side.json
    python benchmarks/figure.py drawings    # scenes of both drawn sets
    python benchmarks/figure.py views_simclr        # views.png of simclr.py without flags

A line is the accuracy in the training loop; a dashed line in its colour is the same network with
random weights, which the loop measured before the first step. Older runs did not: there a ring at
the left end is what evaluate.py gave random weights on the whole split. The dotted line is chance,
and the line of dots and dashes is kNN of the pixels themselves, by pixels.py.
A PNG holds a checksum of what is drawn in it, by which a test knows figures of earlier records.
Needs matplotlib.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from table import IN_LOOP, PROTOCOLS, ROOT, START, chance_of, methods, of_pixels, results

SIZE = (8.0, 3.6)  # inches
INDICATORS = {
    "feature_std": "feature_std (dotted: 1 / sqrt(E))",
    "teacher_entropy": "teacher_entropy, nats (dotted: ln K)",
}


def accuracy(record):
    """-> name of the first accuracy that was measured in the loop, and its points (images seen,
    percent)."""
    name = next(k for k in IN_LOOP if any(k in values for _, values in record["curve"]))
    batch = record["args"]["batch_size"]
    curve = [(step * batch, values[name]) for step, values in record["curve"] if name in values]
    return name, curve


def random_weights(record):
    """Score of the same network with random weights, None if evaluate.py was not asked for it."""
    for label, metrics in record["metrics"].items():
        if label.endswith(START) and label.split()[0] in PROTOCOLS:
            return next(iter(metrics.values()))
    return None


def checksum(figure):
    """Of lines, bars and words, which are the same with every version of matplotlib."""
    drawn = []
    for axis in figure.axes:
        for line in axis.get_lines():
            drawn += [line.get_label(), *(f"{value:.6g}" for value in line.get_xydata().flat)]
        for bar in axis.patches:
            drawn += [bar.get_label(), f"{bar.get_width():.6g}"]
        drawn += [axis.get_title(), axis.get_xlabel(), axis.get_ylabel()]
    return hashlib.sha256("\n".join(drawn).encode()).hexdigest()[:16]


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"Software": None, "Comment": f"drawn: {checksum(figure)}"}
    figure.savefig(path, dpi=110, metadata=about)


def idle_rates():
    """-> images per second of each method's whole loop on two idle cores, by end_to_end.py. The
    minutes of the runs themselves are those of cores that did other work too."""
    found = json.loads((ROOT / "results/end_to_end.json").read_text())["results"]
    return {method: row["rows"]["here"]["images_per_second"] for method, row in found.items()}


def draw_curves(data, path):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    runs = [r for name, r in results().items() if name == f"{r['method']}_{data}"]
    if not runs:
        raise SystemExit(f"figure.py: no run METHOD_{data} is recorded in results/")
    kind = accuracy(runs[0])[0]  # zero-shot and kNN are different measures: one of them in a figure
    runs = [record for record in runs if accuracy(record)[0] == kind]
    figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
    colours = plt.get_cmap("tab10").colors
    rates = idle_rates() if data == "cifar10_cpu" else {}
    for record, colour in zip(runs, colours):
        points = accuracy(record)[1]
        if rates:
            points = [(images / rates[record["method"]] / 60, score) for images, score in points]
        axis.plot(*zip(*points), color=colour, marker=".", label=methods()[record["method"]][0])
        if points[0][0] == 0:
            axis.axhline(points[0][1], color=colour, linestyle="--", linewidth=0.8, alpha=0.6)
        elif (start := random_weights(record)) is not None:
            axis.plot(0, start, "o", color=colour, fillstyle="none", clip_on=False)
    chance = chance_of(kind, runs[-1]["metrics"]["training"])
    axis.axhline(chance, color="grey", linestyle=":", label=f"chance, {chance:.3g}")
    pixels = of_pixels(runs[0]["data"])
    if pixels and kind == "knn_top1":
        label = f"pixels, {pixels['loop']:.3g}"
        axis.axhline(pixels["loop"], color="black", linestyle="-.", linewidth=1, label=label)
    if any(accuracy(record)[1][0][0] == 0 for record in runs):
        axis.plot([], [], "--", color="grey", linewidth=0.8, label="random weights")
    seen = "minutes of training on two idle cores" if rates else "images seen"
    axis.set(xlabel=seen, ylabel=f"{IN_LOOP[kind]}, %", title=data)
    axis.set(xlim=(0, None), ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save(figure, path)


def draw_ablation(method, path):
    """kNN and the collapse indicator of METHOD_flocks and of every METHOD_flocks_NAME, with the
    flags of each."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    mark = re.compile(rf"{method}_flocks(_[a-z]+)?")
    runs = [record for name, record in results().items() if mark.fullmatch(name)]
    if len(runs) < 2:
        raise SystemExit(
            f"figure.py: results/ needs {method}_flocks and a run beside it, {method}_flocks_NAME"
        )
    figure, axes = plt.subplots(1, 2, figsize=SIZE, layout="constrained")
    indicator = next(name for name in INDICATORS if name in runs[0]["curve"][1][1])
    for record in runs:
        name, points = accuracy(record)
        label = record["command"].removeprefix("python ")
        seen, values = zip(*points)
        axes[0].plot([images / 1000 for images in seen], values, marker=".", label=label)
        thousands = record["args"]["batch_size"] / 1000  # images of a step
        curve = [(step, row[indicator]) for step, row in record["curve"] if indicator in row]
        steps, values = zip(*curve)
        axes[1].plot([step * thousands for step in steps], values, label=label)
    last = runs[0]["metrics"]["training"]
    for axis, value, title in (
        (axes[0], chance_of(name, last), f"{IN_LOOP[name]}, %"),
        (axes[1], last[f"{indicator}_chance"], INDICATORS[indicator]),
    ):
        axis.axhline(value, color="grey", linestyle=":", label=f"chance, {value:.3g}")
        axis.set(xlabel="images seen, thousands", title=title, xlim=(0, None), ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    save(figure, path)


def draw_speed(path):
    """A bar for each library and method: seconds of its step / seconds of the step here, the
    medians of rounds; then those of whole loops."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    file = ROOT / "results/side_by_side.json"
    if not file.exists():
        raise SystemExit(
            f"figure.py: {file.name} is not recorded, run "
            f"python benchmarks/side_by_side.py --out results/{file.name}"
        )
    record, bars = json.loads(file.read_text()), []
    for method, found in record["results"].items():
        for name, row in found["rows"].items():
            if not name.startswith("here"):
                bars.append((f"{methods()[method][0]} beside {name}", row["over_here_median"]))
    whole = ROOT / "results/end_to_end.json"
    if whole.exists():
        for method, found in json.loads(whole.read_text())["results"].items():
            label = f"{methods()[method][0]} with its data beside lightly"
            if lightly := found["rows"].get("lightly"):
                bars.append((label, lightly["here_over"]))
    names, ratios = zip(*reversed(bars))
    figure, axis = plt.subplots(figsize=(SIZE[0], 0.6 + 0.28 * len(bars)), layout="constrained")
    colours = ["tab:blue" if ratio >= 1 else "tab:orange" for ratio in ratios]
    drawn = axis.barh(names, ratios, color=colours, label=names)
    axis.bar_label(drawn, fmt="%.2f", padding=3)
    axis.axvline(1, color="grey", linestyle=":")
    machine = f"{record['gpu'] or record['cpu']}, {record['dtype']}"
    axis.set(xlabel=f"time there / here ({machine})", xlim=(0, 1.1 * max(ratios)))
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_drawings(path):
    """Eight scenes of flocks with their classes, and of shapes with a caption of each."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    sys.path.insert(0, str(ROOT))
    from data import open_dataset

    figure, axes = plt.subplots(2, 8, figsize=(SIZE[0], 2.8), layout="constrained")
    for row, name in zip(axes, ("flocks", "shapes")):
        dataset = open_dataset(name)
        for index, axis in enumerate(row):
            sample = dataset[11 * index]  # another form and another colour
            text = sample.captions[0] if sample.captions else dataset.classes[sample.label]
            axis.imshow(sample.image, interpolation="nearest")
            axis.set_title(textwrap.fill(text, 16), fontsize=6)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    save(figure, path)


def draw_views(method, path):
    """views.png of METHOD.py without flags, which a run writes before its first step."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--max-steps", "1", "--eval-every", "0", "--workers", "0"]
        command = [sys.executable, str(ROOT / f"{method}.py"), *flags, "--output-dir", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        shutil.copyfile(Path(folder) / "views.png", path)


def draw(name, path):
    if name == "speed":
        draw_speed(path)
    elif name == "drawings":
        draw_drawings(path)
    elif name.startswith("views_"):
        draw_views(name.removeprefix("views_"), path)
    elif name.endswith("_ablation"):
        draw_ablation(name.removesuffix("_ablation"), path)
    else:
        draw_curves(name, path)


def parser():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("data", help="what to draw, see above")
    return parser


def main(argv=None):
    args = parser().parse_args(argv)
    path = ROOT / f"docs/figures/{args.data}.png"
    draw(args.data, path)
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
