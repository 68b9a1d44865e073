"""What README.md and docs/ say is true: commands parse; files, flags, links and names exist; numbers are the
tree's."""

import ast
import functools
import importlib
import importlib.util
import itertools
import json
import math
import re
import shlex
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed.run as torchrun
from PIL import Image

import pictures
from common import UserError
from copies import ROOT, method_files
from run import parse_args
import test_fork

sys.path.insert(0, str(ROOT / "benchmarks"))
import figure  # noqa: E402
import record  # noqa: E402
import table  # noqa: E402

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in table.pages()}
FOLDERS = (".", "benchmarks", "tests", "evaluation")
OURS = {path.name: path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
COMMAND = re.compile(r"(?:torchrun|python) .*?\b(?:\w+/)*\w+\.py\b.*")
# What the pages name of other projects, and so is nowhere in this tree
FOREIGN_FLAGS = {"--local-loss", "--gather-with-grad", "--use-bn-sync"} | {"--no-index"}  # of open_clip, of git
FOREIGN_FLAGS |= {"--caption_col", "--output_format", "--image_size"}  # of img2dataset
FOREIGN_FLAGS |= {"--ntasks-per-node", "--shm-size", "--max-restarts"}  # of srun, docker, torchrun
FOREIGN_FLAGS |= {"--index-url", "--dist"}  # of pip, of pytest
FOREIGN_FLAGS |= {"--requeue", "--dependency", "--job-name", "--cpus-per-task"}  # of sbatch and srun
NO_FLAGS = {"--batchsize", "--flag"}  # the example of an error message, the synopsis


def commands(text):
    """Lines of fenced blocks and inline code spans that start one of our files, without their comments."""
    text = text.replace("\\\n", " ")
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)).splitlines()
    spans = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in [*fenced, *(span.replace("\n", " ") for span in spans)]:
        for part in line.split("&&"):
            if match := COMMAND.search(re.sub(r"\s#.*", "", part)):
                yield match[0].strip()


def method_docstrings():
    for path in [*method_files(experiments=True), ROOT / "evaluate.py"]:
        for line in ast.get_docstring(ast.parse(path.read_text())).splitlines():
            if match := re.search(r"(?:torchrun|python) (?:\S+ )*?\w+\.py(?: [^ (]\S*)*", line):
                yield path.name, match[0]


def split_launcher(command):
    """-> script and its arguments; what stands before it is parsed by torchrun itself."""
    launcher, *words = shlex.split(command)
    if launcher == "python":
        return words[0], words[1:]
    parsed = torchrun.parse_args(words)
    return parsed.training_script, parsed.training_script_args


def parse(script, words):
    """Raises whatever is wrong with the arguments of one of our files."""
    path = ROOT / script
    assert path.exists(), f"there is no {script}"
    if path.parent != ROOT:
        known = set(re.findall(r'"(--[a-z][\w-]*)"', path.read_text()))
        if path.name == "memory.py" and words:  # what is not its own it hands to the method that it predicts
            method = importlib.import_module(words[0])
            known |= {f"--{name.replace('_', '-')}" for name in vars(method.Args())}
        assert {w.split("=")[0] for w in words if w.startswith("--")} <= known, f"{script} has only {known}"
        return
    module = importlib.import_module(path.stem)
    if path.stem == "evaluate":
        before, flags, queries = module.split_words(words)
        assert words[0] in [*module.PROTOCOLS, *module.PICTURES, "export", "PROTOCOL"], words
        assert len(before) > 1, "no checkpoint"
        assert not queries or words[0] in module.WITH_TEXT, queries
        if words[0] == "PROTOCOL":  # the synopsis
            return
        assert parse_args(module.Args, {}, flags).data or words[0] == "export"
    elif "--help" not in words:
        args = parse_args(module.Args, module.RECIPES, words)
        if args.arch and not hasattr(args, "checkpoint"):  # simclrv2.py takes the rest from that
            with torch.device("meta"):  # names and sizes fit, no memory is touched
                module.build_model(args)


ALL = [(page, c) for page, text in PAGES.items() for c in commands(text)] + list(method_docstrings())


@pytest.mark.parametrize("page, command", ALL, ids=[f"{page}: {command}" for page, command in ALL])
def test_command_parses(page, command):
    parse(*split_launcher(command))


def test_commands_are_found():
    """A change of style in the pages must not turn the test above into one of nothing."""
    count = Counter(page for page, _ in ALL)
    assert count["README.md"] >= 15
    assert all(count[f"docs/{name}.md"] >= 4 for name in ("clip", "slip", "simclr", "evaluation"))
    assert all(count[f"docs/{name}.md"] >= 4 for name in ("running", "contributing"))
    assert any(command == "torchrun slip.py" for _, command in ALL)


def test_readme_can_be_finished():
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_shared_files_are_listed():
    """The table of docs/contributing.md has every file that is no method, and no other."""
    methods = {path.name for path in method_files(experiments=True)}
    flat = {path.name for path in ROOT.glob("*.py")} - methods
    package = {f"evaluation/{path.name}" for path in (ROOT / "evaluation").glob("*.py")} - {"evaluation/__init__.py"}
    assert set(table.SHARED) == flat | package
    assert {*table.LOADED, "layouts.py"} == set(test_fork.SHARED)  # that test sees what is loaded
    rows = re.findall(r"^\| \[([\w/.]+)\]\(\.\./\1\) \| (\d+) \|", PAGES["docs/contributing.md"], re.M)
    assert {name: int(lines) for name, lines in rows} == {
        name: len((ROOT / name).read_text().splitlines()) for name in table.SHARED
    }


def test_fork_set_is_named_as_the_tree_has_it():
    """Flat shared files without the evaluation command are what a method file needs beside it."""
    text = PAGES["README.md"].replace("\n", " ")
    named = re.search(r"copy slip\.py, (.*?) into an empty folder", text)[1]
    some = {"knn.py", "synonyms.py", "init.py", "recognise.py", "names.py"}  # need these too
    needed = {name for name in table.SHARED if "/" not in name} - {"evaluate.py"} - some
    assert set(re.findall(r"\w+\.py", named)) == needed
    sentence = "Methods without captions need knn.py too, declip.py needs synonyms.py, and `--init` needs init.py, "
    assert sentence + "recognise.py and names.py." in text


@pytest.mark.parametrize("line", ["torchrun slip.py --dat x", "python evaluate.py knn runs/x --data a --kk 3",
                                  "torchrun --nproc=8 --nope slip.py", "python nothere.py"])  # fmt: skip
def test_a_wrong_command_is_noticed(line):
    with pytest.raises((UserError, AssertionError, SystemExit)):
        parse(*split_launcher(line))


@functools.cache
def known_flags():
    modules = [importlib.import_module(path.stem) for path in [*method_files(experiments=True), ROOT / "evaluate.py"]]
    flags = {"--" + name.replace("_", "-") for module in modules for name in vars(module.Args())}
    flags |= {"--no-" + flag[2:] for flag in flags} | {"--help"}
    flags |= {w for path in OURS.values() for w in re.findall(r'"(--[a-z][\w-]*)"', path.read_text())}
    flags |= {w for action in torchrun.get_args_parser()._actions for w in action.option_strings}
    return flags


@pytest.mark.parametrize("page", PAGES)
def test_flags_and_files_exist(page):
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S))
    flags = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert flags - FOREIGN_FLAGS - NO_FLAGS <= known_flags()
    below = r"(?:tests|docs|benchmarks|results|evaluation|\.ci)/[\w/.-]+"
    ours = re.compile(rf"[\w-]+\.(?:py|md)|{below}|requirements\S*\.txt")
    assert not {span for span in spans if ours.fullmatch(span) and not (ROOT / span).exists()}


def anchors(text):
    """GitHub's names of the headings."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue  # the network is not asked
        name, _, anchor = target.partition("#")
        path = (folder / name).resolve() if name else ROOT / page
        assert path.exists(), f"{page} links {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path.read_text()), f"{page} links {target}"


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks(page):
    """They are Python, and what they import is there: our modules with these names in them, or packages."""
    for block in re.findall(r"^```python\n(.*?)^```", PAGES[page], re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module.replace('.', '/')}.py").exists():
                assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert importlib.util.find_spec(node.module.split(".")[0]), f"{page} imports {node.module}"
                assert node.module.split(".")[0] != "evaluation", f"{page} imports {node.module}"


@pytest.mark.parametrize("page", PAGES)
def test_logarithms(page):
    """ln(128) = 4.852 and the like, which people compare their loss with."""
    for terms, value in re.findall(r"((?:ln\(\d+\)(?: \+ )?)+) = (\d+\.\d+)", PAGES[page]):
        assert f"{sum(math.log(int(n)) for n in re.findall(r'[0-9]+', terms)):.3f}" == value


def test_tables_are_up_to_date():
    table.main(["--check"])


def longest_common(a, b):
    """Length of the longest common subsequence: how many lines a diff can keep at the most."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def test_line_counts_and_diffs():
    """Counted again, in another way than benchmarks/table.py does."""
    row = re.compile(r"^\| .*? \| \[(\w+)\.py\]\(\1\.py\) \| (\d+) \| \[\d+\.\d+\]\(https:.*\) \| \[docs/\1\.md\]", re.M)
    lines = {name: int(count) for name, count in row.findall(PAGES["README.md"])}
    assert lines == {path.stem: len(path.read_text().splitlines()) for path in method_files()}
    row = re.compile(r"^\| \[(\w+)\.py\]\(\.\./\1\.py\) \| \[(\w+)\.py\]\(\.\./\2\.py\) \| -(\d+) \| \+(\d+) \|$", re.M)
    rows = row.findall(PAGES["docs/choosing.md"])
    for name, parent, removed, added in rows:
        mine, theirs = ((ROOT / f"{x}.py").read_text().splitlines() for x in (name, parent))
        assert f"Diff against: {parent}.py" in (ROOT / f"{name}.py").read_text()
        kept = len(theirs) - int(removed)
        assert kept + int(added) == len(mine)
        most = longest_common(theirs, mine)  # git's heuristics may keep fewer, never more
        assert 0.8 * most <= kept <= most
    for name in set(lines) - {name for name, *_ in rows}:
        assert "Diff against: nothing" in (ROOT / f"{name}.py").read_text()


FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$\n]+(?:\n[^$\n]+)*?\$", re.S)


@pytest.mark.parametrize("page", PAGES)
def test_formulas(page):
    """GitHub shows them: dollars come in pairs, braces match, and Markdown takes nothing out of them."""
    text = re.sub(r"^```.*?^```|`[^`\n]+(?:\n[^`\n]+)?`", "", PAGES[page], flags=re.M | re.S)
    assert "$" not in FORMULA.sub("", text)
    for formula in FORMULA.findall(text):
        assert formula.count("{") == formula.count("}"), formula
        assert not re.search(r"\\[^a-zA-Z\\]|\\operatorname", formula), formula  # Markdown drops the stroke of \, and \{
        assert "|" not in formula, formula  # ends the cell of a table
    for row in re.findall(r"^\|.*\|$", text, re.M):
        assert row.count("$") % 2 == 0, row


def test_formulas_are_found():
    pages = [path.stem for path in method_files() if path.stem != "simclrv2"]
    assert all(len(FORMULA.findall(PAGES[f"docs/{name}.md"])) >= 3 for name in pages)


def test_console_output_is_of_a_recorded_run():
    """What README shows of torchrun slip.py is what results/slip_shapes.json recorded."""
    shown = re.search(r"<!-- output: slip -->\n```\n(.*?)```\n<!-- /output -->", PAGES["README.md"], re.S)[1]
    curve = dict(json.loads((ROOT / "results/slip_shapes.json").read_text())["curve"])
    rows = re.findall(r"^step (\d+)(?:/\d+ |, percent: )(.*)$", shown, re.M)
    compared = 0
    for step, text in rows:
        for name, value in re.findall(r"\b([a-z]+(?:_\w+|@1)?) ([\d.]+)(?= \(|[,;]|$)", text):
            if "chance" not in name and name in curve[int(step)]:
                recorded, digits = curve[int(step)][name], len(value.partition(".")[2])
                assert math.isclose(recorded, float(value), abs_tol=0.51 * 10**-digits), (step, name)
                compared += 1
    assert len(rows) >= 8 and compared >= 20  # evaluations among them


# ----------------------------------- the scripts behind the tables -----------------------------------
@pytest.fixture
def run(tmp_path):
    """The files of a run of 30 steps, one evaluation, with a result of evaluate.py."""
    args = {"method": "slip", "data": "/some/where/photos", "batch_size": 8, "device": "", "data_dir": "",
            "output_dir": str(tmp_path), "arch": "vit_micro_patch8", "image_size": 48, "seed": 0}  # fmt: skip
    command = f"/x/slip.py --data shapes --data-dir=/y --output-dir {tmp_path} --lr 1e-3 --no-gather-grad"
    env = {"command": command, "processes": 1, "gpu": None, "cpus": 2, "torch": "2.6", "python": "3.11",
           "commit": "abc"}  # fmt: skip
    log = [{"step": s, "epoch": s / 30, "loss": 3 - s / 30, "chance": 4.0, "lr": 0.1, "images_per_sec": 4.0,
            "data_wait": 0.0} for s in (1, 10, 20, 30)]  # fmt: skip
    log.insert(3, {"step": 25, "zeroshot_top1": 5.5, "zeroshot_chance": 1.0})
    found = {"protocol": "zeroshot", "data": "shapes", "split": "val", "step": 30,
             "metrics": {"top1": 7.25, "chance": 1.0}, "random weights": {"top1": 1.5, "chance": 1.0},
             "command": "evaluate.py zeroshot runs/x runs/y --data shapes --workers 2 --templates t.txt",
             "commit": "abc", "hardware": "2 CPU cores", "processes": 2, "minutes": 1.5}
    (tmp_path / "args.json").write_text(json.dumps(args))
    (tmp_path / "env.json").write_text(json.dumps(env))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (tmp_path / "results.jsonl").write_text(json.dumps(found) + "\n")
    return tmp_path


def test_record(run, capsys):
    record.main([str(run), "--name", "mine", "--note", "a note", "--out", str(run / "out")])
    found = json.loads((run / "out/mine.json").read_text())
    assert found["command"] == "python slip.py --data shapes --lr 1e-3 --no-gather-grad"
    assert found["minutes"] == 1.0 and found["hardware"] == "2 CPU cores" and found["data"] == "photos"
    metrics, label = found["metrics"], "zeroshot shapes val --templates t.txt"
    assert metrics["training"].items() >= {"step": 30, "loss": 2.0, "zeroshot_top1": 5.5}.items()
    assert metrics[label] == {"top1": 7.25, "chance": 1.0, "step": 30}
    assert metrics[label + ", random weights"]["top1"] == 1.5
    assert found["curve"][3] == [25, {"zeroshot_top1": 5.5}] and len(found["curve"]) == 5
    assert str(run) not in (run / "out/mine.json").read_text()
    assert not capsys.readouterr().err
    (run / "env.json").write_text((run / "env.json").read_text().replace('"abc"', '"abc-dirty"'))
    record.main([str(run), "--name", "mine", "--out", str(run / "out")])
    assert capsys.readouterr().err == "warning: recorded from commit abc-dirty, which others do not have\n"


def test_record_of_evaluations(run):
    """Of several directories, nothing but results.jsonl, and of equal protocols the last."""
    other = run / "other"
    other.mkdir()
    text = (run / "results.jsonl").read_text()
    (other / "results.jsonl").write_text(text.replace("7.25", "8.5") + text.replace("7.25", "9.5"))
    record.main(["--evaluations", str(run), str(other), "--name", "evaluation", "--out", str(run / "out")])
    rows = json.loads((run / "out/evaluation.json").read_text())["rows"]
    assert [row["run"] for row in rows] == [run.name, "other"]
    assert [row["metrics"]["top1"] for row in rows] == [7.25, 9.5] and rows[0]["random weights"]["top1"] == 1.5
    assert rows[0]["command"] == "torchrun --nproc_per_node=2 evaluate.py zeroshot RUN --data shapes --templates t.txt"
    assert rows[0]["commit"] == "abc" and rows[0]["minutes"] == 1.5
    for wrong in ([], [str(run), str(other)]):
        with pytest.raises(SystemExit, match="one run directory"):
            record.main([*wrong, "--name", "x", "--out", str(run / "out")])


class Shown(Exception):
    """views.png is written."""


def test_figures_are_of_recorded_runs(tmp_path, monkeypatch):
    """Each one is shown somewhere, and what is drawn in it is what the records say now. The run of which views.png is shown
    happens here, and ends with that."""
    save = pictures.save_batch

    def until_views(command, **_):
        module = importlib.import_module(Path(command[1]).stem)
        with pytest.raises(Shown):
            module.train(parse_args(module.Args, module.RECIPES, command[2:]))

    def save_and_end(*args):
        save(*args)
        raise Shown

    monkeypatch.setattr(pictures, "save_batch", save_and_end)
    monkeypatch.setattr(figure, "subprocess", types.SimpleNamespace(run=until_views, DEVNULL=None))
    drawn = sorted((ROOT / "docs/figures").glob("*.png"))
    assert drawn
    for path in drawn:
        assert any(f"figures/{path.name})" in text for text in PAGES.values())
        figure.draw(path.stem, tmp_path / path.name)
        assert (tmp_path / path.name).stat().st_size > 10000
        new, old = (Image.open(file) for file in (tmp_path / path.name, path))
        if path.stem.startswith("views_"):  # a run wrote it
            assert new.size == old.size
            continue
        now, then = (image.info["Comment"] for image in (new, old))
        assert now == then, f"run python benchmarks/figure.py {path.stem}"
    shapes = json.loads((ROOT / "results/slip_shapes.json").read_text())
    last = shapes["metrics"]["training"]
    name, points = figure.accuracy(shapes)
    assert name == "zeroshot_top1" and points[-1] == (last["step"] * shapes["args"]["batch_size"], last[name])
    assert figure.random_weights(shapes) == shapes["metrics"]["zeroshot shapes test, random weights"]["top1"]
    with pytest.raises(SystemExit, match="no run METHOD_nothing"):
        figure.draw("nothing", tmp_path / "x.png")


def test_speed_beside_others_is_drawn_and_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(figure, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="is not recorded"):
        figure.draw("speed", tmp_path / "speed.png")
    monkeypatch.setattr(table, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    rows = {"lightly": {"ms_median": 130.0, "over_here_median": 1.3}, "here": {"ms_median": 100.0, "over_here_median": 1.0}}
    record = {"gpu": None, "cpu": "a CPU", "dtype": "float32", "results": {"byol": {"setting": "small", "rows": rows}}}
    (tmp_path / "results/side_by_side.json").write_text(json.dumps(record))
    assert "training step of byol, small, a CPU, float32 | lightly 130 ms | 100 ms | 1.30x |" in table.speed("")
    rows = {"lightly": {"images_per_second": 200, "here_over": 2.1}, "here": {"images_per_second": 400, "here_over": 1.0}}
    record = {"gpu": None, "cpu": "a CPU", "data": "cifar10", "results": {"byol": {"rows": rows}}}
    (tmp_path / "results/end_to_end.json").write_text(json.dumps(record))
    what = "training of byol with its data, cifar10, two cores of a CPU"
    assert f"{what} | lightly 200 images/s | 400 images/s | 2.10x |" in table.speed("")
    monkeypatch.setattr(figure, "methods", lambda: {"byol": ("BYOL",)})
    figure.draw("speed", tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 3000


def test_an_ablation_is_drawn_beside_the_run_that_learns(tmp_path, monkeypatch):
    """The lines are METHOD_flocks and METHOD_flocks_NAME, and no run of another method or data."""
    curve = [[0, {"knn_top1": 17.0}], [1, {"feature_std": 0.04}], [9, {"feature_std": 0.03}], [9, {"knn_top1": 50.0}]]
    last = {"feature_std": 0.03, "feature_std_chance": 0.05, "knn_top1": 50.0, "knn_chance": 10.0}
    recorded = dict(method="simsiam", args={"batch_size": 8}, metrics={"training": last}, curve=curve)
    runs = {"simsiam_flocks": dict(recorded, command="python simsiam.py")}
    monkeypatch.setattr(figure, "results", lambda: runs)
    with pytest.raises(SystemExit, match="simsiam_flocks_NAME"):
        figure.draw("simsiam_ablation", tmp_path / "x.png")
    runs["simsiam_flocks_off"] = dict(recorded, command="python simsiam.py --stop-gradient off")
    for other in ("simsiam_shapes_off", "byol_flocks_random", "simsiam_flocks_s1"):
        runs[other] = {}  # would raise KeyError
    figure.draw("simsiam_ablation", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10000


@pytest.mark.parametrize("name", ["simclr", "moco", "mocov3", "byol", "simsiam", "dino", "ibot", "dinov2"])
def test_every_demo_learns(name):
    """Three recorded seeds of a self-supervised file without flags: at the end kNN is 25 points or more above random weights.
    DINOv2's, whose random weights tell half of the drawings, is so on average; its first seed gains 24.6."""
    gains = []
    for seed in range(3):
        run = json.loads((ROOT / f"results/{name}_flocks{f'_s{seed}' * (seed > 0)}.json").read_text())
        assert run["command"] == f"python {name}.py" + f" --seed {seed}" * (seed > 0)
        accuracy = [row["knn_top1"] for _, row in run["curve"] if "knn_top1" in row]
        assert run["curve"][0][0] == 0
        gains.append(accuracy[-1] - accuracy[0])
    assert sum(gains) / 3 >= 25 and min(gains) >= (24.5 if name == "dinov2" else 25)


def test_the_demo_of_all_three_stages_learns():
    """simclrv2.py's stages on flocks, as they are without flags: with a tenth of the labels, and then without any."""
    tuned, student = (json.loads((ROOT / f"results/simclrv2_flocks{end}.json").read_text()) for end in ("", "_distilled"))
    assert tuned["args"]["label_fraction"] == 0.1 and student["args"]["stage"] == "distill" and student["args"]["alpha"] == 1
    first, second = (run["metrics"]["training"]["val_top1"] for run in (tuned, student))
    assert first >= 60 and second >= first  # chance is 10


def test_longer_runs_and_other_seeds_have_columns_of_their_own(monkeypatch):
    def run(method, name, *points):
        curve = [[step, {"knn_top1": value}] for step, value in points]
        return name, {"name": name, "method": method, "data": "x", "args": {"batch_size": 2}, "curve": curve, "metrics": {}, "minutes": 1.0}

    runs = dict([run("byol", "byol_x", (0, 15.0), (9, 17.0)), run("dino", "dino_x", (0, 16.0), (9, 18.0), (99, 19.0)),
                 run("byol", "byol_x_s1", (0, 11.0), (9, 12.5)), run("byol", "byol_x_off", (0, 13.0))])  # fmt: skip
    monkeypatch.setattr(table, "results", lambda: runs)
    monkeypatch.setattr(table, "methods", lambda: {"byol": ("BYOL",), "dino": ("DINO",)})
    header, _, byol, dino = table.knn_of_all("", "x").splitlines()
    assert header == "| method | random weights | 18 images | end of a longer run | other seeds | minutes |"
    assert byol == "| [BYOL](results/byol_x.json) | 15.0 | 17.0 |  | 12.5 | 1.0 |"
    assert dino == "| [DINO](results/dino_x.json) | 16.0 | 18.0 | 19.0 (198) |  | 1.0 |"
    for name, score in (("byol_x", 20.0), ("byol_x_s1", 21.5)):
        runs[name]["metrics"] = {"knn x val": {"top1": score}, "knn x val, random weights": {"top1": 11.0}}
    header, _, byol, dino = table.knn_of_all("", "x").splitlines()
    assert header.endswith("| other seeds | evaluate.py | evaluate.py, random weights | minutes |")
    assert byol.endswith("|  | 12.5 | 20.0, 21.5 | 11.0 | 1.0 |") and dino.endswith("| 19.0 (198) |  |  |  | 1.0 |")
    runs.clear()  # of eleven evaluations every second one has a column, and the last one always
    runs.update([run("byol", "byol_x", *((5 * i, 10.0 + i) for i in range(11)))])
    header, _, byol = table.knn_of_all("", "x").splitlines()
    assert header == "| method | random weights | 20 images | 40 images | 60 images | 80 images | 100 images | minutes |"
    assert byol == "| [BYOL](results/byol_x.json) | 10.0 | 12.0 | 14.0 | 16.0 | 18.0 | 20.0 | 1.0 |"


def test_rows_of_a_run_are_evaluate_s_or_the_loop_s_and_retrieval_has_all_seeds(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    recalls = {f"{way}_recall@{k}": float(k) for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    for seed, recall in ((0, 4.0), (1, 5.0), (2, 6.0)):
        name = f"clip_photos_48{f'_s{seed}' * (seed > 0)}"
        last = {"step": 9, "epochs": 3.0, "loss": 0.5, "recall@1": 20.0 + seed, "recall_chance": 1.0}
        found = {"retrieval photos test": {"mean_recall": recall, **recalls},
                 "retrieval photos test, random weights": {"mean_recall": 0.5, **recalls}}  # fmt: skip
        run = {"name": name, "method": "clip", "data": "photos", "minutes": 2.0, "command": "python clip.py",
               "args": {"seed": seed, "arch": "vit", "image_size": 48, "batch_size": 8},
               "curve": [[0, {"recall@1": 1.5}], [9, {"loss": 0.5}]], "metrics": {"training": last, **(found if seed < 2 else {})}}
        (tmp_path / f"results/{name}.json").write_text(json.dumps(run))
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "methods", lambda: {"clip": ("CLIP",)})
    (row,) = table.retrieval_of_all("", "photos_48").splitlines()[2:]
    seeds = "[0](results/clip_photos_48.json), [1](results/clip_photos_48_s1.json)"
    assert row == f"| CLIP | 9 | 48 | {seeds} | 4.00, 5.00 | 4.50 ± 0.71 | 0.50 | 1.00/5.00/10.0 | 1.00/5.00/10.0 | 2.0 |"
    rows = table.results_table("").strip().splitlines()[2:]
    assert rows[0].endswith("| 0 | 2.0 | mean recall 4.00 | mean recall 0.50 | evaluate.py |")
    assert rows[2].endswith("| 2 | 2.0 | recall@1 22.0 | recall@1 1.50 | the loop |") and len(rows) == 3
    assert table.results_table("", "clip").endswith("- clip_photos_48_s2: `python clip.py`\n")


def test_tables_hold_what_is_recorded(run, monkeypatch):
    """And a number that is changed by hand is noticed."""
    kinds = ["*.py", "evaluation/*.py", "benchmarks/*.py", "*.md", "docs/*.md"]
    for path in itertools.chain(*map(ROOT.glob, kinds)):
        copy = run / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())
    monkeypatch.setattr(table, "ROOT", run)
    record.main([str(run), "--name", "mine", "--out", str(run / "results")])
    text = (run / "results.jsonl").read_text().replace("shapes", "cifar10").replace(" --templates t.txt", "")
    (run / "results.jsonl").write_text(text.replace('"chance": 1.0', '"chance": 10.0'))
    record.main(["--evaluations", str(run), "--name", "evaluation", "--out", str(run / "results")])
    with pytest.raises(SystemExit, match="results.md"):
        table.main(["--check"])
    table.main([])
    table.main(["--check"])
    page = run / "docs/results.md"
    text = page.read_text()
    row = "vit_micro_patch8 | 48 | 8 | 30 | 1 | 0 | 1.0 | zero-shot 7.25 | zero-shot 1.50 | evaluate.py |"
    assert f"| [mine](../results/mine.json) | {row}\n" in text
    assert "../results/mine.json" in (run / "docs/slip.md").read_text()
    assert "zero-shot cifar10 val (chance 10) |" in text and f"| {run.name} | 7.25 / 1.50 |" in text
    page.write_text(text.replace("7.25", "8.25"))
    with pytest.raises(SystemExit, match="results.md"):
        table.main(["--check"])
    page.write_text(text + "[`no_such_loss`](../slip.py#L1)\n")
    with pytest.raises(SystemExit, match="results.md links no_such_loss in slip.py"):
        table.main(["--check"])
