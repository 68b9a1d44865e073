"""Brings README.md and docs/*.md up to date with the tree and with results/*.json.

    python benchmarks/table.py              # rewrites the pages
    python benchmarks/table.py --check      # names the pages that differ, exit status 1

It writes the tables that stand between two comments such as <!-- methods --> and <!-- /methods -->,
and the line numbers in links such as [`clip_loss`](../clip.py#L364). The tables are:

    methods            every method file with its paper and its page         README.md
    diffs              how far a method file is from its parent              docs/choosing.md
    shared             the files that are no method                          docs/contributing.md
    results            every recorded run                                    docs/results.md
    knn DATA           kNN of all self-supervised methods on DATA            docs/results.md
    seeds DATA         zero-shot of all language-image methods, all seeds    docs/results.md
    parity             runs repeated through lightly, by parity.py            docs/results.md
    retrieval DATA     retrieval of all language-image methods on DATA       docs/results.md
    evaluations        every checkpoint that was evaluated on real data      docs/results.md
    speed              benchmarks of steps, augmentation and memory          docs/results.md
    scale              what runs on 1 to 1,024 GPUs cost                     docs/scale.md
    memory             what a compiled model keeps, and one that is not      docs/running.md
    results METHOD     the runs of one method                                docs/METHOD.md
    curves METHOD      their learning curves                                 docs/METHOD.md
    ends PREFIX        the last evaluation of runs with this prefix          docs/init.md
    spread PREFIX      the same of all seeds, with mean and deviation        docs/align.md
    ablations          the rows of SLIP's tables, published and measured     docs/slip_ablations.md
"""

import argparse
import ast
import functools
import json
import math
import re
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

from ablations import BUDGET, PAPER, ROWS, record_name

ROOT = Path(__file__).resolve().parent.parent
# Tables: those that are named by one word, and those of data, a prefix or a method
ALONE = "methods|diffs|shared|speed|scale|memory|evaluations|ablations|parity"
KINDS = rf"{ALONE}|(?:knn|seeds|retrieval|ends|spread) \w+|(?:results|curves)(?: \w+)?"
BLOCK = re.compile(rf"(<!-- ({KINDS}) -->\n).*?(<!-- /\2 -->)", re.S)
LINK = re.compile(r"\[`([\w.]+)`\]\(((?:\.\./)?)((?:\w+/)?\w+\.py)(?:#L\d+)?\)")
PROTOCOLS = {
    "zeroshot": "zero-shot",
    "retrieval": "mean recall",
    "knn": "kNN",
    "linear": "linear probe",
    "logreg": "logistic regression",
    "finetune": "fine-tuned",
    "semi": "fine-tuned",
}
SHARED = {
    "common.py": "what numbers depend on: processes, gathers, batch norm, precision, schedule, "
    "LARS",
    "data.py": "what numbers depend on: loader, batched image operations, tokenizer",
    "sources.py": "where samples come from: names and paths of datasets, their splits",
    "layouts.py": "layouts of files (folders, tables, shards): tells them apart, and reads them",
    "scenes.py": "the drawn sets, which need no download",
    "synonyms.py": "synonyms from a file or from WordNet, for declip.py alone",
    "run.py": "arguments that change no number, run directory, log, checkpoint",
    "pictures.py": "a run in pictures and on boards (TensorBoard, wandb), its last lines",
    "monitor.py": "accuracy while training: feature extraction, zero-shot, recall",
    "knn.py": "the same for methods without captions: nearest neighbours or a linear classifier",
    "trouble.py": "sentences for a full disk, too little memory, processes that do not meet",
    "init.py": "weights to start from, and encoders that stay as they are; only with --init",
    "recognise.py": "reads weights, says whose they are, and what the tensors do not tell",
    "names.py": "names of tensors in other projects and here, in both directions",
    "evaluate.py": "the evaluation command",
    "evaluation/protocols.py": "what its protocols do",
    "evaluation/features.py": "features that are kept on disk, and those of several blocks",
    "evaluation/scores.py": "accuracy, mean recall of the classes and ROC AUC",
    "evaluation/probes.py": "linear probes and logistic regression",
    "evaluation/finetune.py": "fine-tuning with all or some of the labels",
    "evaluation/pictures.py": "pictures of what a network sees",
    "evaluation/language.py": "pictures that a text asks for: explanations, search, DeCLIP's queue",
    "evaluation/robustness.py": "ImageNet's other test sets beside ImageNet",
    "evaluation/results.py": "tables, results.jsonl and the files of pictures",
    "evaluation/weights.py": "opens checkpoints as networks, those of other projects too",
    "evaluation/exports.py": "writes weights for other projects",
}
# Shared files that every language-image file loads; test_fork.py sees which they are
LOADED = ["common.py", "data.py", "monitor.py", "pictures.py", "run.py", "scenes.py", "sources.py",
          "trouble.py"]  # fmt: skip
START = ", random weights"  # end of a label
REAL = ("cifar10", "flickr8k")  # data of the table of evaluations
IN_LOOP = {
    "zeroshot_top1": "zero-shot",
    "recall@1": "recall@1",
    "knn_top1": "kNN",
    "linear_top1": "linear",
    "val_top1": "top-1",
}


# -------------------------------------------- the tree --------------------------------------------
def methods():
    """{name: (title, arXiv id, parent's name or None)} of the method files, parents first."""
    found = {}
    for path in sorted(ROOT.glob("*.py")):
        source = path.read_text()
        experiments = path.stem.endswith("_ablations")  # of a paper, on its method's page
        if experiments or "class Args" not in source or "\ndef train(" not in source:
            continue
        text = source.split('"""')[1]  # the docstring
        parent = re.search(r"Diff against: (\w+)\.py", text)
        arxiv = re.search(r"arXiv (\d+\.\d+)", text)[1]
        found[path.stem] = text.split(":")[0], arxiv, parent and parent[1]

    def below(parent):
        return [x for name in found if found[name][2] == parent for x in (name, *below(name))]

    return {name: found[name] for name in below(None)}


def line_count(path):
    return path.read_bytes().count(b"\n")


def diff_size(a, b):
    """Lines that `git diff --no-index a b` takes away and adds."""
    git = "git -c diff.algorithm=myers diff --no-ext-diff --no-index --numstat".split()
    done = subprocess.run([*git, a, b], cwd=ROOT, capture_output=True, text=True)
    added, removed, _ = done.stdout.split(maxsplit=2)
    return int(removed), int(added)


@functools.cache
def definitions(source):
    """The statements of a file. Many links lead to the same one."""
    return ast.parse(source).body


def definition_line(path, name):
    """Line of a definition or assignment, None where there is none; a dot goes into a class."""

    def names(node):
        assigned = [getattr(target, "id", None) for target in getattr(node, "targets", [])]
        return [getattr(node, "name", None), *assigned]

    if not path.exists():
        return None
    body = definitions(path.read_text())
    for part in name.split("."):
        node = next((node for node in body if part in names(node)), None)
        if node is None:
            return None
        body = getattr(node, "body", [])
    return node.lineno


# -------------------------------------------- the results ---------------------------------------
@functools.cache
def read_record(text):
    """Each table looks at all of them, and none changes one."""
    return json.loads(text)


def results():
    """{name: record} of the runs, in the order of methods()."""
    found = [read_record(path.read_text()) for path in sorted((ROOT / "results").glob("*.json"))]
    order = list(methods())
    runs = [r for r in found if "curve" in r and r["method"] in order]
    return {r["name"]: r for r in sorted(runs, key=lambda r: order.index(r["method"]))}


def number(x):
    return f"{x:.1f}" if abs(x) >= 10 or x == 0 else f"{x:.2f}"


def said(what, value, chance=None):
    return f"{what} {number(value)}" + (f" (chance {chance:.3g})" if chance else "")


def chance_of(name, metrics):
    """Chance level of a metric of the loop: knn_top1 has knn_chance, recall@1 recall_chance."""
    return metrics.get(re.split("_top|@", name)[0] + "_chance")


def found_by_evaluate(record, start=False):
    """Texts in percent of the trained network, or of the one that it started from."""
    return [
        said(PROTOCOLS[label.split()[0]], next(iter(metrics.values())))
        for label, metrics in record["metrics"].items()
        if label.split()[0] in PROTOCOLS and label.endswith(START) == start
    ]


def found_in_loop(record, start=False):
    """Texts in percent of the last evaluation in the training loop, or of the one at step 0."""
    at_start = next((values for step, values in record["curve"] if step == 0), {})
    values = at_start if start else record["metrics"]["training"]
    return [said(IN_LOOP[k], values[k]) for k in IN_LOOP if k in values]


def table(header, rows):
    rows = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def methods_table(prefix):
    rows = []
    for name, (title, arxiv, _) in methods().items():
        file, lines = f"[{name}.py]({prefix}{name}.py)", str(line_count(ROOT / f"{name}.py"))
        paper = f"[{arxiv}](https://arxiv.org/abs/{arxiv})"
        rows.append([title, file, lines, paper, f"[docs/{name}.md]({prefix}docs/{name}.md)"])
    return table(["method", "file", "lines", "paper", "docs"], rows)


def diffs(prefix):
    """A row for each method file with a parent: how many lines `git diff` takes away and adds."""
    rows = []
    for name, (_, _, parent) in methods().items():
        if parent:
            removed, added = diff_size(f"{parent}.py", f"{name}.py")
            files = [f"[{x}.py]({prefix}{x}.py)" for x in (name, parent)]
            rows.append([*files, f"-{removed}", f"+{added}"])
    return table(["file", "parent", "lines removed", "lines added"], rows)


def shared(prefix):
    """A row for each shared file, and how many lines of all of them a run of slip.py loads."""
    rows = [[f"[{file}]({prefix}{file})", str(line_count(ROOT / file)), what]
            for file, what in SHARED.items() if (ROOT / file).exists()]  # fmt: skip
    lines = sum(line_count(ROOT / file) for file in ("slip.py", *LOADED))
    more = line_count(ROOT / "layouts.py")
    told = f"A run of slip.py on a drawn set loads {lines:,} lines: its own and those of "
    told += f"{', '.join(LOADED[:5])},\n{', '.join(LOADED[5:-1])} and {LOADED[-1]}. "
    told += f"On other data it loads layouts.py too, {more} lines.\n"
    return f"{table(['file', 'lines', 'holds'], rows)}\n{told}"


def results_table(prefix, method=None):
    """A row for each run, with evaluate.py's results or, without those, the loop's; on the page of
    a method its commands too."""
    header = ["run", "network", "px", "batch", "steps", "epochs", "seed", "minutes"]
    header += ["result in percent", "random weights", "by"]
    mine, rows = {n: r for n, r in results().items() if method in (None, r["method"])}, []
    for name, r in mine.items():
        args, last = r["args"], r["metrics"]["training"]
        by = "evaluate.py" if found_by_evaluate(r) else "the loop"
        found = found_by_evaluate if by == "evaluate.py" else found_in_loop
        result = ", ".join(found(r)) or f"loss {last['loss']:.3f}"
        row = [f"[{name}]({prefix}results/{name}.json)", args["arch"]]
        row += [str(args[k]) for k in ("image_size", "batch_size")]
        row += [str(last["step"]), f"{last['epochs']:.3g}", str(args["seed"])]
        rows.append([*row, f"{r['minutes']:.1f}", result, ", ".join(found(r, start=True)), by])
    commands = "".join(f"- {name}: `{r['command']}`\n" for name, r in mine.items() if method)
    return f"{table(header, rows)}\n{commands}" if rows else "Nothing is recorded yet.\n"


def curves(prefix, method):
    """Up to eight points of each run: evaluations and the loss nearest to them, or losses alone."""
    text = ""
    for name, r in results().items():
        if r["method"] != method:
            continue
        losses = [(step, values["loss"]) for step, values in r["curve"] if "loss" in values]
        evals = [(step, values) for step, values in r["curve"] if any(k in values for k in IN_LOOP)]
        columns = [k for k in IN_LOOP if k in evals[-1][1]] if len(evals) > 1 else []
        points = evals if columns else [(step, {}) for step, _ in losses]
        if len(points) > 8:
            points = [points[round(i * (len(points) - 1) / 7)] for i in range(8)]
        training = r["metrics"]["training"]
        chance = f" (chance {training['chance']:.3f})" if "chance" in training else ""
        header = ["step", f"loss{chance}"]
        header += [f"{IN_LOOP[k]} (chance {chance_of(k, training):.3g})" for k in columns]
        spread = {step: row["feature_std"] for step, row in r["curve"] if "feature_std" in row}
        if spread:
            header.append(f"feature_std (spread: {training['feature_std_chance']:.4f})")
        rows = []
        for step, values in points:
            near, loss = min(losses, key=lambda p: abs(p[0] - step))
            row = [str(step), f"{loss:.3f}", *(number(values[k]) for k in columns)]
            rows.append(row + ([f"{spread[near]:.4f}"] if spread else []))
        text += f"{name}:\n\n" + table(header, rows) + "\n"
    return text or "No curve is recorded yet.\n"


def of_pixels(data):
    """What benchmarks/pixels.py measured without a network -> {"loop", "evaluate.py"} or None."""
    path = ROOT / "results/pixels.json"
    return json.loads(path.read_text()).get(data) if path.exists() else None


def knn_of_all(prefix, data):
    """A row for each method's run NAME_DATA that has a kNN curve: the curve by the number of images
    seen, its last point with other seeds (the runs NAME_DATA_sSEED), what evaluate.py measured of
    all seeds, and kNN of the same network with random weights."""
    curves, again = {}, defaultdict(list)
    for r in results().values():
        evals = [(step, row["knn_top1"]) for step, row in r["curve"] if "knn_top1" in row]
        points = {step * r["args"]["batch_size"]: value for step, value in evals}
        name = f"{r['method']}_{data}"
        if r["name"] == name and points:
            curves[name] = points
        elif points and re.fullmatch(rf"{name}_s\d+", r["name"]):
            again[name].append((points[max(points)], r))
    runs = [results()[name] for name in curves]
    times = Counter(images for points in curves.values() for images in points)
    seen = sorted(images for images, runs_then in times.items() if runs_then > 1 or len(runs) == 1)
    every = max(1, math.ceil(len(seen) / 6))  # at most seven columns, the last one among them
    seen = sorted({*seen[:1], *seen[::-every]})
    columns = [f"{images:,} images" if images else "random weights" for images in seen]
    # those whose end gets a column
    longer = [name for name, points in curves.items() if max(points) not in seen]
    columns += ["end of a longer run"] if longer else []
    protocols = {
        "knn {} val": "evaluate.py",
        "knn {} val, random weights": "evaluate.py, random weights",
        "linear {} val --cached": "linear probe",
    }

    def asked(protocol):
        return any(protocol.format(r["data"]) in r["metrics"] for r in runs)

    scored = {p: title for p, title in protocols.items() if asked(p)}
    columns += ["other seeds"] if again else []
    header, rows = ["method", *columns, *scored.values(), "minutes"], []
    for r in runs:
        points = curves[r["name"]]
        cells = [number(points[images]) if images in points else "" for images in seen]
        if longer:
            last = max(points)
            cells.append(f"{number(points[last])} ({last:,})" if r["name"] in longer else "")
        others = again.get(r["name"], [])
        cells += [", ".join(number(end) for end, _ in others)] if again else []
        for protocol in scored:
            label, same = protocol.format(r["data"]), [r, *(other for _, other in others)]
            found = [number(x["metrics"][label]["top1"]) for x in same if label in x["metrics"]]
            cells.append(", ".join(found[:1] if "random" in label else found))
        link = f"[{methods()[r['method']][0]}]({prefix}results/{r['name']}.json)"
        rows.append([link, *cells, f"{r['minutes']:.1f}"])
    if runs and (pixels := of_pixels(runs[0]["data"])):
        cells = [""] * len(header)
        cells[0] = f"[pixels, averaged to 8 x 8]({prefix}results/pixels.json)"
        cells[len(seen)] = number(pixels["loop"])  # where the methods end
        if "evaluate.py" in header:
            cells[header.index("evaluate.py")] = number(pixels["evaluate.py"])
        rows.append(cells)
    return table(header, rows) if rows else "Nothing is recorded yet.\n"


def parity_table(prefix):
    """From what benchmarks/parity.py wrote: a row for each method, its seeds one after another."""
    path, rows, by_method = ROOT / "results/parity.json", [], {}
    for name, row in json.loads(path.read_text()).items() if path.exists() else ():
        by_method.setdefault(name.partition("_s")[0], []).append(row)
    for method, seeds in by_method.items():
        link = f"[{methods()[method][0]}]({prefix}results/{path.name})"
        cells = []
        for kind in ("here", "lightly", "random weights"):
            cells.append(", ".join(f"{row[kind]:.1f}" for row in seeds))
        cells.append(f"{seeds[0]['pixels']:.1f}")
        for loop in ("here", "lightly"):
            cells.append(", ".join(f"{row['seconds ' + loop] / 60:.1f}" for row in seeds))
        rows.append([link, f"{seeds[0]['images']:,}", *cells])
    header = ["method", "images", "here", "lightly", "random weights", "8 x 8 pixels"]
    header += ["minutes here", "minutes lightly"]
    return table(header, rows) if rows else "Nothing is recorded yet.\n"


def evaluations(prefix):
    """A row for each checkpoint that evaluate.py scored on real data, a column for each protocol:
    the score and, behind the stroke, that of the same network with random weights. From the runs'
    files and from results/evaluation.json, which comes last and so wins."""
    path = ROOT / "results/evaluation.json"
    content = json.loads(path.read_text()) if path.exists() else {"rows": [], "note": ""}
    rows, note = content["rows"], content["note"]
    found = []
    for name, r in results().items():
        found += [(name, label, metrics) for label, metrics in r["metrics"].items()]
    found += [(r["run"], r["label"], r["metrics"]) for r in rows]
    with_start = [r for r in rows if "random weights" in r]
    found += [(r["run"], r["label"] + START, r["random weights"]) for r in with_start]
    first = {(name, label): next(iter(metrics.values())) for name, label, metrics in found}
    order, parts = list(PROTOCOLS), {label.removesuffix(START): m for _, label, m in found}
    labels = [x for x in parts if x.split()[0] in order and x.split()[1] in REAL]
    labels.sort(key=lambda x: (order.index(x.split()[0]), x))
    lines = []
    for name in dict.fromkeys(name for name, label, _ in found if label in labels):
        pairs = [[first.get((name, label + end)) for end in ("", START)] for label in labels]
        cells = [" / ".join(number(x) for x in pair if x is not None) for pair in pairs]
        there = (ROOT / f"results/{name}.json").exists()
        lines.append([f"[{name}]({prefix}results/{name}.json)" if there else name, *cells])
    titles = [f"{PROTOCOLS[label.split()[0]]} {label.partition(' ')[2]}" for label in labels]
    # the mean of recall at 1, 5 and 10, by chance: (1 + 5 + 10) / 3 times that at 1
    measured = [parts[label] for label in labels]
    chance = [m["chance"] if "chance" in m else m["chance@1"] * 16 / 3 for m in measured]
    header = ["checkpoint", *(f"{text} (chance {x:.3g})" for text, x in zip(titles, chance))]
    told = []
    for r in rows:
        where = f"{r['hardware']}, {r['minutes']:.0f} minutes, commit {r['commit']}"
        told.append(f"{r['run']}: `{r['command']}`, {where}")
    commands = "".join(f"- {line}\n" for line in [*dict.fromkeys(told), *([note] if note else [])])
    return f"{table(header, lines)}\n{commands}" if lines else "Nothing is recorded yet.\n"


def retrieval_of_all(prefix, data):
    """A row for each run METHOD_DATA that evaluate.py retrieval was run on, with its other seeds
    METHOD_DATA_sSEED, and its start. Recalls of each direction and minutes are of the first."""
    header = ["method", "steps", "px", "seeds", "mean recall", "mean and s.d.", "random weights",
              "image to text R@1/5/10", "text to image R@1/5/10", "minutes"]  # fmt: skip
    rows = []
    for name, r in results().items():
        label = f"retrieval {r['data']} test"
        if name != f"{r['method']}_{data}" or label not in r["metrics"]:
            continue
        runs = [run for run in with_seeds(name) if label in run["metrics"]]
        links = [f"[{run['args']['seed']}]({prefix}results/{run['name']}.json)" for run in runs]
        values = [run["metrics"][label]["mean_recall"] for run in runs]
        starts = [run["metrics"][label + START] for run in runs if label + START in run["metrics"]]
        start = number(starts[0]["mean_recall"]) if starts else ""
        recalls = []
        for way in ("image_to_text", "text_to_image"):
            found = (r["metrics"][label][f"{way}_recall@{k}"] for k in (1, 5, 10))
            recalls.append("/".join(map(number, found)))
        row = [methods()[r["method"]][0], str(r["metrics"]["training"]["step"])]
        row += [str(r["args"]["image_size"]), ", ".join(links), ", ".join(map(number, values))]
        row += [mean_and_deviation(values), start]
        rows.append([*row, *recalls, f"{r['minutes']:.1f}"])
    return table(header, rows) if rows else "Nothing is recorded yet.\n"


def ends(prefix, names):
    """A row for each run whose name begins so: its note, and the last loss and evaluation in the
    training loop."""
    runs = [r for name, r in results().items() if name.startswith(names)]
    keys = [k for k in IN_LOOP if any(k in r["metrics"]["training"] for r in runs)]
    header, rows = ["run", "what", "steps", "loss", *(IN_LOOP[k] for k in keys)], []
    for r in runs:
        last = r["metrics"]["training"]
        told = [said("", last[k], chance_of(k, last)).strip() if k in last else "" for k in keys]
        link = f"[{r['name'].removeprefix(names).strip('_')}]({prefix}results/{r['name']}.json)"
        loss = said("", last["loss"], last.get("chance")).strip()
        rows.append([link, r["note"], str(last["step"]), loss, *told])
    return table(header, rows) if rows else "Nothing is recorded yet.\n"


def with_seeds(name):
    """Records of the run NAME and of NAME_sSEED, by seed."""
    paths = (ROOT / "results").glob(f"{name}*.json")
    found = [json.loads(p.read_text()) for p in paths if re.fullmatch(rf"{name}(_s\d+)?", p.stem)]
    return sorted(found, key=lambda r: r["args"]["seed"])


def mean_and_deviation(values):
    if len(values) < 2:
        return ""
    return f"{number(statistics.mean(values))} ± {number(statistics.stdev(values))}"


SEEDS = ["seeds", "zero-shot", "mean and s.d.", "recall@1", "mean and s.d."]


def cells_of_seeds(prefix, runs):
    """Cells under SEEDS: links, then what each seed came to in the training loop, and their mean
    and standard deviation."""
    links = [f"[{r['args']['seed']}]({prefix}results/{r['name']}.json)" for r in runs]
    cells = [", ".join(links)]
    for key in ("zeroshot_top1", "recall@1"):
        values = [r["metrics"]["training"][key] for r in runs]
        cells += [", ".join(map(number, values)), mean_and_deviation(values)]
    return cells


def seeds(prefix, data):
    """A row for each language-image method's run METHOD_DATA and each METHOD_DATA_epochsN."""
    rows = []
    for method, (title, _, _) in methods().items():
        first = [n for n in results() if re.fullmatch(rf"{method}_{data}(_epochs\d+)?", n)]
        for runs in map(with_seeds, first):
            last = runs[0]["metrics"]["training"]
            if "zeroshot_top1" in last:
                size = [f"{last['epochs']:g}", str(last["step"])]
                rows.append([title, *size, *cells_of_seeds(prefix, runs)])
    return table(["method", "epochs", "steps", *SEEDS], rows)


def spread(prefix, names):
    """A row for each run whose name begins so and which has no seed in it: its note, its last step,
    and what all its seeds came to."""
    rows = []
    for name in results():
        if name.startswith(names) and not re.search(r"_s\d+$", name):
            runs = with_seeds(name)
            step = str(runs[0]["metrics"]["training"]["step"])
            what = f"{name.removeprefix(names).strip('_')}: {runs[0]['note']}"
            rows.append([what, step, *cells_of_seeds(prefix, runs)])
    return table(["run", "steps", *SEEDS], rows) if rows else "Nothing is recorded yet.\n"


def with_first(script, flags, command):
    """`command`, after the run that its --init names, if it does: that of `script` with `flags`."""
    start = re.search(r"--init (\S+)", command)
    before = f"`{script} {flags} --output-dir {start[1]}`, then " if start else ""
    return f"{before}`{command}`"


def ablations(prefix):
    """A row for each of ROWS in ablations.py: what is published, what its runs on `shapes` came to,
    all seeds, and its run on Flickr8k."""
    rows, paper, small = [], "", ""
    for name, row in ROWS.items():
        runs = with_seeds(record_name(name))
        cells = cells_of_seeds(prefix, runs) if runs else ["not run yet", "", "", "", ""]
        photos = ROOT / f"results/{record_name(name)}_flickr8k.json"
        recall = "not run yet"
        if photos.exists():
            found = json.loads(photos.read_text())["metrics"]["retrieval flickr8k test"]
            recall = f"[{found['mean_recall']:.2f}]({prefix}results/{photos.name})"
        rows.append([row.what, row.published, *cells, recall])
        paper += f"- {row.what}: {with_first(PAPER, row.paper_first, f'{PAPER} {row.paper}')}\n"
        if runs:
            first = f"{row.small_first} {BUDGET} --eval-every 0"
            command = with_first("python slip_ablations.py", first, runs[0]["command"])
            small += f"- {row.what}: {command}\n"
    header = ["row", "published", *SEEDS, "Flickr8k, mean recall"]
    if small:
        small = f"\nThe measured ones, other seeds with `--seed` in addition:\n\n{small}"
    return f"{table(header, rows)}\nThe paper's runs:\n\n{paper}{small}"


def speed(prefix):
    """From what augment.py, side_by_side.py, end_to_end.py and loss_memory.py wrote to results/."""
    rows = []
    for path in sorted((ROOT / "results").glob("*.json")):
        r, kind = json.loads(path.read_text()), re.match("[a-z]+", path.stem)[0]
        link, machine = f"[{path.stem}]({prefix}results/{path.name})", r.get("gpu") or r.get("cpu")
        if kind not in ("augment", "side", "end", "loss"):
            continue
        for name, found in r["results"].items():
            if kind == "augment":
                pil = found["ms"]["pil"][0]
                parts = {"worker": "loader worker", "worker+device": "and the device's part"}
                for way, part in parts.items():
                    ms, ratio = found["ms"][way][0], found["times_faster_than_pil"][way][0]
                    what = found.get("what", f"two 224 px views of {name}")
                    what = f"{what}, {machine}, one thread: {part}"
                    rows.append([link, what, f"PIL {pil:.1f} ms", f"{ms:.1f} ms", f"{ratio:.1f}x"])
            elif kind == "side":
                what = f"training step of {name}, {found['setting']}, {machine}, {r['dtype']}"
                ours = f"{found['rows']['here']['ms_median']:.0f} ms"
                for peer, theirs in found["rows"].items():
                    if not peer.startswith("here"):
                        there = f"{peer} {theirs['ms_median']:.0f} ms"
                        ratio = f"{theirs['over_here_median']:.2f}x"
                        rows.append([link, what, there, ours, ratio])
            elif kind == "end":
                what = f"training of {name} with its data, {r['data']}, two cores of {machine}"
                ours = f"{found['rows']['here']['images_per_second']:.0f} images/s"
                if len(found["rows"]) == 1:
                    rows.append([link, what, "", ours, ""])
                for peer, theirs in found["rows"].items():
                    if peer != "here":
                        there = f"{peer} {theirs['images_per_second']:.0f} images/s"
                        ratio = f"{theirs['here_over']:.2f}x"
                        rows.append([link, what, there, ours, ratio])
            else:
                each = []
                for p in (found[0], found[-1]):
                    batch = f"{p['local_batch']} x {p['global_batch']}"
                    each.append(f"{p['matrix_bytes_per_b_x_B']:.1f} at {batch}")
                what = f"{name}: bytes kept for backward per local x global pair"
                rows.append([link, what, *each, ""])
    header = ["record", "what", "beside", "here", "ratio"]
    return table(header, rows) if rows else "Nothing is recorded yet.\n"


def memory(prefix):
    """A row for each command that benchmarks/memory.py has predicted with --compile and without."""
    path = ROOT / "results/memory.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = {(r["command"], r["gpus"]): r["gib"]["kept for backward"] for r in rows}
    lines = []
    for r in rows:
        command = r["command"].replace(" --compile", "")
        if command != r["command"] and r["gpus"] == 8 and (command, 8) in kept:
            eager, compiled = kept[command, r["gpus"]], r["gib"]["kept for backward"]
            gib = [f"{x:.1f}" for x in (eager, compiled)]
            lines.append([f"`{command}`", str(r["batch"]), *gib, f"{compiled / eager:.2f}"])
    header = ["command", "samples", "without `--compile`", "with it", "ratio"]
    return table(header, lines) if lines else "Nothing is recorded yet.\n"


def scale_tables(prefix):
    """By benchmarks/scale.py."""
    import scale

    return scale.tables()


# -------------------------------------------- writing --------------------------------------------
def updated(path, missing):
    """The page as it should be. What a link names and no file defines is appended to `missing`."""
    prefix = "../" if path.parent.name == "docs" else ""

    def block(match):
        kind, _, method = match[2].partition(" ")
        make = {"methods": methods_table, "diffs": diffs, "shared": shared, "curves": curves,
                "results": results_table, "knn": knn_of_all, "retrieval": retrieval_of_all,
                "ends": ends, "spread": spread, "speed": speed, "scale": scale_tables,
                "memory": memory, "evaluations": evaluations, "ablations": ablations,
                "parity": parity_table, "seeds": seeds}[kind]  # fmt: skip
        return match[1] + make(prefix, *([method] if method else [])) + match[3]

    def link(match):
        name, up, file = match[1], match[2], match[3]
        line = definition_line(ROOT / file, name)
        if line is None:
            missing.append(f"{path.name} links {name} in {file}")
            return match[0]
        return f"[`{name}`]({up}{file}#L{line})"

    return LINK.sub(link, BLOCK.sub(block, path.read_text()))


def pages():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def parser():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    only = "write nothing, name the files that differ"
    parser.add_argument("--check", action="store_true", help=only)
    return parser


def main(argv=None):
    args, missing = parser().parse_args(argv), []
    new = {path: updated(path, missing) for path in pages()}
    stale = [path for path in new if path.read_text() != new[path]]
    names = ", ".join(path.name for path in stale)
    if not args.check:
        for path in stale:
            path.write_text(new[path])
    if missing:
        sys.exit("not defined there: " + "; ".join(missing))
    if args.check and stale:
        sys.exit(f"not up to date, run python benchmarks/table.py: {names}")
    print("up to date" if not stale else f"wrote {names}")


if __name__ == "__main__":
    main()
