"""Copies between method files are honest: a definition under `# Copied from clip.py: NAME` equals the original, comments
and blank lines included. `python tests/copies.py` lists what differs, `--fix` rewrites the copies."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"^# Copied from (\w+\.py): (\w+)$")


def definition(source: str, name: str) -> tuple[int, int]:
    """First and last line (0-based, exclusive) of a top-level definition, its decorators included."""
    for node in ast.parse(source).body:
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


def method_files():
    """Files with an Args dataclass and a train function."""
    names = [p for p in sorted(ROOT.glob("*.py")) if "class Args" in p.read_text() and "\ndef train(" in p.read_text()]
    return names


if __name__ == "__main__":
    problems = [line for path in method_files() for line in compare(path, "--fix" in sys.argv)[1]]
    print("\n".join(problems) or "all copies equal their originals")
    sys.exit(bool(problems))
