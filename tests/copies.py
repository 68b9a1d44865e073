"""Copies between method files are honest: a definition under `# Copied from clip.py: NAME` equals the original, comments
and blank lines included, and the original of `# Adapted from clip.py: NAME` exists. `python tests/copies.py` lists what is
wrong in any file, `--fix` rewrites the copies."""

import ast
import functools
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"^# Copied from (\w+\.py): (\w+)$")
VARIANT = re.compile(r"^# Adapted from (\w+\.py): (\w+)\b")
INDENTED_MARK = re.compile(r"^\s+# (Copied|Adapted) from\b")


parsed = functools.lru_cache(64)(ast.parse)  # the same few files are asked for hundreds of times


def definition(source: str, name: str) -> tuple[int, int]:
    """First and last line (0-based, exclusive) of a top-level definition, its decorators included."""
    for node in parsed(source).body:
        if getattr(node, "name", None) == name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            return first - 1, node.end_lineno
    raise KeyError(name)


def compare(path: Path, fix=False) -> tuple[int, list[str]]:
    """-> number of copies in a file, and a line for each that differs from its original or stands over another name."""
    differing, count = [], 0
    for mark in [line for line in path.read_text().splitlines() if line.startswith("# Copied from")]:
        count += 1
        source = path.read_text()
        lines = source.splitlines()
        match = MARK.match(mark)
        if not match:
            differing.append(f"{path.name}: cannot read {mark!r}")
            continue
        origin, name = match.groups()
        original = (ROOT / origin).read_text()
        try:
            a, b = definition(original, name)
            c, d = definition(source, name)
        except KeyError:
            differing.append(f"{path.name}: {name} is not in both files")
            continue
        if lines[c - 1] != mark:
            differing.append(f"{path.name}: {mark!r} does not stand right above {name}")
        elif lines[c:d] != original.splitlines()[a:b]:
            if fix:
                path.write_text("\n".join(lines[:c] + original.splitlines()[a:b] + lines[d:]) + "\n")
            else:
                differing.append(f"{path.name}:{c + 1}: {name} differs from {origin}")
    return count, differing


def wrong_variants(path: Path) -> list[str]:
    """A line for each `# Adapted from` whose original does not exist."""
    wrong = []
    for mark in [line for line in path.read_text().splitlines() if line.startswith("# Adapted from")]:
        match = VARIANT.match(mark)
        try:
            definition((ROOT / match[1]).read_text(), match[2])
        except (KeyError, OSError, TypeError):
            wrong.append(f"{path.name}: {mark!r} names no definition")
    return wrong


def problems(fix=False) -> list[str]:
    """A line for everything that is wrong with a mark, in whatever file of this repository it stands."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        found += compare(path, fix)[1] + wrong_variants(path)
        indented = [line.strip() for line in path.read_text().splitlines() if INDENTED_MARK.match(line)]
        found += [f"{path.name}: {mark!r} stands over no definition of the file itself" for mark in indented]
    return found


def method_files(experiments=False):
    """Files with an Args dataclass and a train function. NAME_ablations.py, which holds the experiments of the paper of
    NAME.py, is one with `experiments` alone."""
    names = [p for p in sorted(ROOT.glob("*.py")) if "class Args" in p.read_text() and "\ndef train(" in p.read_text()]
    return [p for p in names if experiments or not p.stem.endswith("_ablations")]


if __name__ == "__main__":
    found = problems("--fix" in sys.argv)
    print("\n".join(found) or "all copies equal their originals")
    sys.exit(bool(found))
