"""Wrong lines that the tests have to notice. Each entry of MUTANTS changes one line of one file; the tests named for it
run on a copy of the project with that line, and at least one must fail. What no test notices is a line that anybody can
break without knowing.

    python tests/mutants.py                      all of them, one at a time; prints the score and the survivors
    python tests/mutants.py --file byol.py       those of a file
    python tests/mutants.py --sample 10 --seed 3 ten of them, drawn with this seed
    python tests/mutants.py --check              runs nothing: every old line stands exactly once in its file

The packages that the tests import are loaded once, and each wrong line is tried in a fork of the process that holds them.
Tests that noticed another wrong line of the file come first. At the end all tests that noticed one run without any wrong
line and have to pass.
"""

import argparse
import ast
import contextlib
import importlib
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

from wrong_lines import TESTS, wrong_lines

ROOT = Path(__file__).parent.parent
LIMIT = 600  # seconds a mutant's tests may take
LATE = f"its tests did not end within {LIMIT} seconds"  # which counts as not noticed: slow is not wrong


class Mutant(NamedTuple):
    file: str
    old: str  # stands exactly once in the file
    new: str
    tests: str  # arguments of pytest, separated by blanks

    def __str__(self):
        return f"{self.file}: {self.old.strip()!r} -> {self.new.strip()!r}"


def mutants() -> list[Mutant]:
    """The lists of tests/wrong_lines.py, with the tests of a file where an entry names none."""
    found = []
    for file, entries in wrong_lines(lambda file: (ROOT / file).read_text()).items():
        for old, new, *tests in entries:
            found.append(Mutant(file, old, new, tests[0] if tests else TESTS[file]))
    return found


def problems(listed) -> list[str]:
    """A line for each entry that cannot be applied: its old text is not there or not unique, or the new one is no
    Python or says the same."""
    wrong, right = [], {}
    for mutant in listed:
        text = (ROOT / mutant.file).read_text()
        if (count := text.count(mutant.old)) != 1:
            wrong.append(f"{mutant.file}: {mutant.old!r} stands there {count} times")
            continue
        if mutant.file not in right:
            right[mutant.file] = compile(text, mutant.file, "exec")
        try:
            same = compile(text.replace(mutant.old, mutant.new), mutant.file, "exec") == right[mutant.file]
        except SyntaxError:
            wrong.append(f"{mutant.file}: {mutant.new!r} is not Python there")
            continue
        if same:
            wrong.append(f"{mutant.file}: {mutant.new!r} changes nothing")
    return wrong


def copy_project(folder: Path):
    """What the tests need, with links to the large files that none of them changes."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.md"), *ROOT.glob("*.txt")]:
        shutil.copy(path, folder)
    for name in ("evaluation", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    for path in (ROOT / "tests").glob("*.py"):
        shutil.copy(path, folder / "tests")
    for name in ("tests/golden", "tests/hidden", "docs", "results"):
        (folder / name).symlink_to(ROOT / name, target_is_directory=True)


def load_packages(tests: str):
    """Imports what the named files of tests import from other projects, here and so in every fork."""
    own = {path.stem for folder in (".", "tests", "benchmarks") for path in (ROOT / folder).glob("*.py")} | {"evaluation"}
    for file in set(re.findall(r"tests/\w+\.py", tests)):
        for node in ast.parse((ROOT / file).read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.split(".")[0] not in own:
                    importlib.import_module(name)


class Order:
    """Plugin of pytest: `first` come first, the most frequent of them at the front; writes down what failed."""

    def __init__(self, first: Counter, failed: Path):
        self.first, self.failed = first, failed
        failed.write_text("")

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: -self.first[item.nodeid])  # stable: the others stay in the order of the files

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.write_text(report.nodeid)


def run_tests(folder: Path, tests: str, first: Counter):
    """In a fork: pytest in folder/project, whose exit status becomes that of the process."""
    os.setsid()  # a leader's group holds whatever the tests start
    file = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder / "project")
    sys.path[0] = str(folder / "project")  # where the parent has the tests of the project itself
    for name in ("mutants", "wrong_lines"):
        sys.modules.pop(name, None)
    status = 3
    try:
        argv = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *shlex.split(tests)]
        status = int(pytest.main(argv, [Order(first, folder / "failed")]))
    finally:
        sys.stdout.flush()
        os._exit(status)


class Bench:
    """A copy of the project in which one wrong line after the other is tried."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "project").mkdir(parents=True)
        copy_project(folder / "project")

    def start(self, mutant: Mutant, first: Counter):
        self.mutant, self.began = mutant, time.time()
        self.write(mutant.old, mutant.new)
        self.process = os.fork()
        if not self.process:
            run_tests(self.folder, mutant.tests, first)

    def write(self, old, new):
        """The file of the mutant, with `new` for `old`. A compiled file may be as old and as long, so it goes."""
        if not old:
            return
        path = self.folder / "project" / self.mutant.file
        path.write_text((ROOT / self.mutant.file).read_text().replace(old, new))
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()

    def result(self):
        """-> None while the tests run, else what noticed the wrong line, "" for nothing, and what pytest printed.
        RuntimeError if the tests could not run at all."""
        ended, status = os.waitpid(self.process, os.WNOHANG)
        late = not ended and time.time() - self.began > LIMIT
        if not ended and not late:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        if late:
            os.waitpid(self.process, 0)
        self.write(self.mutant.old, self.mutant.old)
        output = (self.folder / "output").read_text(errors="replace")
        if late:
            return LATE, output
        status = os.waitstatus_to_exitcode(status)
        if status > 2:
            raise RuntimeError(f"pytest {self.mutant.tests}\n{output[-4000:]}")
        if status < 0:
            return f"signal {-status} ended its tests", output
        by = (self.folder / "failed").read_text()
        return by or "its tests cannot be imported" * (status != 0), output


def try_all(listed, jobs=1):
    """Yields (mutant, what noticed it or "", what pytest printed) in the order in which they end."""
    waiting, first = list(listed)[::-1], defaultdict(Counter)
    with tempfile.TemporaryDirectory() as folder:
        idle = [Bench(Path(folder) / str(i)) for i in range(min(jobs, len(waiting)))]
        busy = []
        while waiting or busy:
            while waiting and idle:
                busy.append(idle.pop())
                busy[-1].start(waiting[-1], first[waiting.pop().file])
            for bench in list(busy):
                if result := bench.result():
                    busy.remove(bench)
                    idle.append(bench)
                    first[bench.mutant.file][result[0]] += 1
                    yield bench.mutant, *result
            time.sleep(0.05)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="", help="only the wrong lines of this file")
    parser.add_argument("--sample", type=int, default=0, help="only so many, drawn at random (0: all)")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--jobs", type=int, default=1, help="how many are tried at once")
    parser.add_argument("--check", action="store_true", help="only look whether all can be applied")
    args = parser.parse_args(argv)
    listed = [m for m in mutants() if args.file in ("", m.file)]
    wrong = problems(listed)
    print("\n".join(wrong) or f"{len(listed)} wrong lines, all of them can be applied")
    if wrong or args.check:
        return bool(wrong)
    if args.sample:
        listed = random.Random(args.seed).sample(listed, min(args.sample, len(listed)))
    load_packages(" ".join(mutant.tests for mutant in listed))
    survivors, noticing, began = [], defaultdict(set), time.time()
    for mutant, by, _ in try_all(listed, args.jobs):
        if by in ("", LATE):
            print(f"SURVIVED {mutant}  {by}", flush=True)
            survivors.append(mutant)
            continue
        print(f"noticed  {mutant}  by {by}", flush=True)
        if "::" in by:
            noticing[mutant.file].add(by)
    score = len(listed) - len(survivors)
    print(f"{score} of {len(listed)} noticed ({100 * score / len(listed):.1f}%) in {(time.time() - began) / 60:.0f} minutes")
    right = [Mutant(file, "", "", shlex.join(sorted(tests))) for file, tests in noticing.items()]
    red = [by for _, by, _ in try_all(right, args.jobs) if by]
    print("\n".join(f"not counted: {by} fails without any wrong line" for by in red) or "all tests that noticed one pass without it")
    return bool(survivors or red)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
