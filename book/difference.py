"""What turns a parent into its child: both files side by side, folded where they are equal.

The reasons are those of the method's page, from its section about the difference. A reason stands
at the first hunk that holds a name which the reason has in backticks. One without such a name
stands at the first hunk of the section that it begins with, such as "Augmentation:", or else at the
hunk whose words are the most like its own.
"""

import difflib
import math
import re
from collections import Counter
from dataclasses import dataclass, field

import source

SHORT = 4  # so many equal lines between two changes are shown, more are folded
HEADING = re.compile(r"^## [^\n]*\bdiffer[^\n]*\n(.*?)(?=^## |\Z)", re.M | re.S | re.I)
SECTIONS = {
    "argument": "arguments", "augment": "augmentation", "backbone": "backbone", "model": "model",
    "method": "model", "head": "model", "loss": "loss", "loop": "training", "training": "training",
}  # fmt: skip


@dataclass
class Hunk:
    old: range  # indices of lines of the parent
    new: range  # indices of lines of the child
    equal: bool
    section: str = ""  # banner above it in the child
    reasons: list = field(default_factory=list)


# ------------------------------------ hunks ------------------------------------
def hunks(old, new):
    """The two lists of lines as a list of Hunk, equal ones and changed ones in turn."""
    found = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        trivial = tag == "equal" and sum(len(line.strip()) for line in new[c:d]) < 12
        if tag == "equal" and not (trivial and found):
            found.append(Hunk(range(a, b), range(c, d), True))
        elif found and not found[-1].equal:
            last = found[-1]
            last.old, last.new = range(last.old.start, b), range(last.new.start, d)
        else:
            found.append(Hunk(range(a, b), range(c, d), False))
    section = ""
    for hunk in found:
        banners = [(i, source.BANNER.match(new[i])) for i in hunk.new]
        banners = [(i, match[1]) for i, match in banners if match]
        hunk.section = section if not banners or hunk.equal else banners[0][1]
        section = banners[-1][1] if banners else section
    return found


def words(text):
    """Counter of the words of a text, in small letters; a name with underscores counts as its parts
    too."""
    return Counter(word for word in re.findall(r"[a-z]{3,}", text.lower()))


# ------------------------------------ reasons ------------------------------------
def reasons(page):
    """Texts in Markdown: rows of the tables and items of the lists in the page's section about the
    difference."""
    match = HEADING.search(page)
    if not match:
        return []
    found = []
    for row in re.findall(r"^\|(.+)\|$", match[1], re.M):
        cells = [cell.strip() for cell in row.split("|")]
        if not re.fullmatch(r"[-: |]+", row) and not re.match(r"`(git )?diff", cells[0]):
            found.append(": ".join(cell for cell in cells if cell not in ("", "-")))
    for item in re.findall(r"^(?:- |\d+\. )(.*(?:\n {2,}.*)*)", match[1], re.M):
        found.append(" ".join(item.split()))
    return found


def place(reason, changed, texts):
    """The hunk that a reason belongs to, None for the file as a whole. texts: the lines of each
    hunk."""
    spans = re.findall(r"`([^`]+)`", reason)
    names = [word for span in spans for word in re.findall(r"[A-Za-z_]\w+", span.replace("-", "_"))]
    names = [name.removeprefix("__") for name in names]
    for name in names:
        for pattern in (rf"(?:class|def) {name}\b|^    {name}: ", rf"\b{name}\b"):
            for hunk, text in zip(changed, texts):
                if re.search(pattern, text, re.M):
                    return hunk
    head = re.match(r"([A-Z][\w ,]*):", reason)
    for start, section in SECTIONS.items() if head else ():
        if start in head[1].lower():
            return next((hunk for hunk in changed if hunk.section == section), None)
    seen = Counter(word for text in texts for word in words(text).keys())
    mine = words(reason)

    def likeness(text):
        shared = mine.keys() & words(text).keys()
        return sum(math.log(len(texts) / seen[word] + 1) for word in shared) / (
            1 + math.log(1 + len(text))
        )

    best = max(zip(changed, texts), key=lambda pair: likeness(pair[1]), default=None)
    return best[0] if best and likeness(best[1]) > 0.2 else None


# ------------------------------------ page ------------------------------------
def around(lines, hunk):
    """Name of the definition that a hunk's first new line stands in, empty outside of
    definitions."""
    for line in reversed(lines[: hunk.new.start + 1]):
        match = re.match(r"(?:class|def) (\w+)", line)
        if match or source.BANNER.match(line):
            return match[1] if match else ""
    return ""


def side(lines, indices, kind, name):
    """One column of a hunk; its name is shown where the columns stand below each other."""
    if not indices:
        return '<div class="side none"></div>'
    shown = source.code(lines, [i + 1 for i in indices], anchors=False)
    return f'<div class="side {kind}"><p class="label">{name}</p>{shown}</div>'


def page(parent, child, old_text, new_text, method_page, keep, markdown):
    """The page in Markdown, in which what is HTML already is kept. parent, child: names of the
    files. markdown: turns a reason into HTML."""
    old, new = old_text.splitlines(), new_text.splitlines()
    old_html, new_html = source.highlighted(old_text), source.highlighted(new_text)
    all_hunks = hunks(old, new)
    changed = [hunk for hunk in all_hunks if not hunk.equal and hunk.section]
    texts = [
        "\n".join([*(old[i] for i in hunk.old), *(new[i] for i in hunk.new)]) for hunk in changed
    ]
    general = []
    for reason in reasons(method_page):
        hunk = place(reason, changed, texts)
        (hunk.reasons if hunk else general).append(reason)
    out = "".join(f"- {reason}\n" for reason in general) + "\n"
    section = None
    heads = f'<div class="sides heads"><p>{parent}</p><p>{child}</p></div>'
    for hunk in all_hunks:
        title = hunk.section or "docstring and imports"
        if not hunk.equal and title != section:
            section = title
            out += f"\n\n## {title}\n\n" + keep(heads, True)
        if hunk.equal and len(hunk.new) > SHORT:
            lines = source.code(new_html, [i + 1 for i in hunk.new], anchors=False)
            where = around(new, hunk)
            said = f"{len(hunk.new)} equal lines from line {hunk.new.start + 1}"
            said += f", in {where}" if where else ""
            out += keep(f'<details class="equal"><summary>{said}</summary>{lines}</details>', True)
            continue
        kinds = ("same", "same") if hunk.equal else ("removed", "added")
        notes = "".join(f"<p>{markdown(reason)}</p>" for reason in hunk.reasons)
        notes = f'<div class="reasons" role="note">{notes}</div>' if notes else ""
        sides = side(old_html, hunk.old, kinds[0], parent) + side(
            new_html, hunk.new, kinds[1], child
        )
        out += keep(f'<div class="hunk">{notes}<div class="sides">{sides}</div></div>', True)
    return out
