"""Links the first use of a term on each page to docs/glossary.md.

A term is a heading of level 3 there. A line below it that begins with *Also:* lists other
spellings.
"""

import re

TERM = re.compile(r"^### (.+?)\n\n(?:\*Also: (.+?)\*\n)?", re.M)
TAG = re.compile(r"(<[^>]+>)")
SKIPPED = {
    "a",
    "code",
    "pre",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "math",
    "svg",
    "summary",
    "script",
    "style",
}


def anchor(term):
    """mkdocs' name of the heading."""
    return re.sub(r"[^\w -]", "", term.lower()).replace(" ", "-")


def terms(page):
    """{spelling in small letters: anchor}"""
    found = {}
    for name, also in TERM.findall(page):
        spellings = [re.sub(r" \(.*\)", "", name), *re.findall(r"[^,]+", also)]
        found |= {spelling.strip().lower(): anchor(name) for spelling in spellings}
    return found


def link_first_uses(page, spellings, url):
    """HTML -> the same, in which the first use of each term outside of links, code and headings is
    a link."""
    longest_first = sorted(spellings, key=len, reverse=True)
    any_term = "|".join(map(re.escape, longest_first))
    pattern = re.compile(rf"(?<![\w-])({any_term})(?![\w-]|\.\w)", re.I)
    seen, depth, out = set(), 0, []

    def linked(match):
        target = spellings[match[1].lower()]
        if target in seen:
            return match[0]
        seen.add(target)
        return f'<a class="term" href="{url}#{target}">{match[0]}</a>'

    for part in TAG.split(page):
        if part.startswith("<"):
            name = re.match(r"</?([a-zA-Z0-9]+)", part)
            if name and name[1].lower() in SKIPPED and not part.endswith("/>"):
                depth += -1 if part.startswith("</") else 1
        elif not depth:
            part = pattern.sub(linked, part)
        out.append(part)
    return "".join(out)
