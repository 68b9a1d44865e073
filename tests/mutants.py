"""Wrong lines that the tests have to notice. Each entry of MUTANTS changes one line of one file; the tests named for it
run on a copy of the project with that line, and at least one must fail. What no test notices is a line that anybody can
break without knowing.

    python tests/mutants.py                      all of them, two at a time; prints the score and the survivors
    python tests/mutants.py --file byol.py       those of a file
    python tests/mutants.py --sample 10 --seed 3 ten of them, drawn with this seed
    python tests/mutants.py --check              runs nothing: every old line stands exactly once in its file
"""

import argparse
import ast
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from wrong_lines import TESTS, wrong_lines

ROOT = Path(__file__).parent.parent
LIMIT = 600  # seconds a mutant's tests may take; a run that hangs has been noticed too


class Mutant(NamedTuple):
    file: str
    old: str  # stands exactly once in the file
    new: str
    tests: str  # arguments of pytest, separated by blanks


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
    wrong = []
    for mutant in listed:
        text = (ROOT / mutant.file).read_text()
        if (count := text.count(mutant.old)) != 1:
            wrong.append(f"{mutant.file}: {mutant.old!r} stands there {count} times")
            continue
        changed = text.replace(mutant.old, mutant.new)
        try:
            same = ast.dump(ast.parse(changed)) == ast.dump(ast.parse(text))
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
    for name in ("tests/golden", "docs", "results"):
        (folder / name).symlink_to(ROOT / name, target_is_directory=True)


def noticed(mutant: Mutant) -> tuple[bool, str]:
    """-> whether a test failed, and the last lines of pytest. RuntimeError if the tests could not run at all."""
    with tempfile.TemporaryDirectory() as folder:
        copy_project(Path(folder))
        if mutant.old:
            path = Path(folder) / mutant.file
            path.write_text(path.read_text().replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(mutant.tests)]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return True, f"its tests did not end within {LIMIT} seconds"
    if done.returncode not in (0, 1, 2):  # 2: a file of tests cannot even be imported
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode != 0, done.stdout[-800:]


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="", help="only the wrong lines of this file")
    parser.add_argument("--sample", type=int, default=0, help="only so many, drawn at random (0: all)")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--jobs", type=int, default=2, help="how many are tried at once")
    parser.add_argument("--check", action="store_true", help="only look whether all can be applied")
    args = parser.parse_args(argv)
    listed = [m for m in mutants() if args.file in ("", m.file)]
    wrong = problems(listed)
    print("\n".join(wrong) or f"{len(listed)} wrong lines, all of them can be applied")
    if wrong or args.check:
        return bool(wrong)
    if args.sample:
        listed = random.Random(args.seed).sample(listed, min(args.sample, len(listed)))
    survivors = []
    for tests in dict.fromkeys(mutant.tests for mutant in listed):  # without a wrong line they have to pass
        failed, output = noticed(Mutant("", "", "", tests))
        if failed:
            print(f"{tests} fails without any wrong line:\n{output}")
            return True
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, (seen, _) in zip(listed, pool.map(noticed, listed)):
            print(f"{'noticed ' if seen else 'SURVIVED'} {mutant.file}: {mutant.old.strip()!r} -> {mutant.new.strip()!r}", flush=True)
            if not seen:
                survivors.append(mutant)
    print(f"{len(listed) - len(survivors)} of {len(listed)} noticed ({100 - 100 * len(survivors) / len(listed):.1f}%)")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
