"""Annotated source: docstrings and comments as prose on the left, the code that they belong to on
the right.

A file is cut into rows. A row begins with a definition, or with a comment that has lines of its
own; its prose is that comment and the docstring, its code is all else up to the next row. Comments
that end a line of code stay there.
"""

import ast
import html
import io
import re
import textwrap
import tokenize
from dataclasses import dataclass, field

import formulas
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

BANNER = re.compile(r"^# -{20,} (.*) -{20,}$")
# formulas in sentences: theta_k <- m theta_k + (1 - m) theta_q (Eq. 2), tau_t
UPDATE = re.compile(r"(?<!`)\b\w+ <- [^.,;:]*?(?= \(\w+\.? [\w.]+\)| mean\b|[.,;:])")
SYMBOL = re.compile(r"(?<![`\w])(?:(?:theta|tau)_[a-z]|L_[A-Za-z]+)\b(?!`)")
COMMAND = re.compile(r"^(.*?)\b((?:torchrun|python) .*)$")


@dataclass
class Row:
    start: int  # number of its first line
    name: str = ""  # of the definition: SLIP, SLIP.forward
    banner: str = ""  # title of the section that begins here
    prose: list = field(default_factory=list)  # texts: comments, docstring
    code: list = field(default_factory=list)  # numbers of lines


# ------------------------------------ rows ------------------------------------
def definitions(tree):
    """(name, node) of classes and functions, and of methods as Class.method."""
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, (ast.ClassDef, ast.FunctionDef)):
                    yield f"{node.name}.{inner.name}", inner


def own_comments(text):
    """Numbers of the lines that hold nothing but a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {
        t.start[0]
        for t in tokens
        if t.type == tokenize.COMMENT and not t.line[: t.start[1]].strip()
    }


def docstrings(tree):
    """{number of its first line: number of its last line} of docstrings with lines of their own."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            line = node.body[0]
            if isinstance(node, ast.Module) or line.lineno > node.lineno:
                found[line.lineno] = line.end_lineno
    return found


def rows(text):
    """The file as a list of Row."""
    lines, tree = text.splitlines(), ast.parse(text)
    comments, docs = own_comments(text), docstrings(tree)
    names = {}
    for name, node in definitions(tree):
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        while first - 1 in comments and not BANNER.match(lines[first - 2]):
            first -= 1
        names[first] = name
    out, number = [Row(1)], 0
    while number < len(lines):
        number += 1
        line, row = lines[number - 1], out[-1]
        banner = BANNER.match(line)
        if banner or number in names:
            row = Row(number, names.get(number, ""), banner[1] if banner else "")
            out.append(row)
        if banner:
            continue
        if number in docs:
            last = docs[number]
            row.prose.append(ast.literal_eval(textwrap.dedent("\n".join(lines[number - 1 : last]))))
            number = last
        elif number in comments:
            if any(lines[i - 1].strip() for i in row.code):
                row = Row(number)
                out.append(row)
            words = line.strip().removeprefix("#").removeprefix(" ")
            if row.prose and number - 1 in comments:
                words = row.prose.pop() + "\n" + words
            row.prose.append(words)
        else:
            row.code.append(number)
    for row in out:
        for end in (0, -1):  # blank lines at either end
            while row.code and not lines[row.code[end] - 1].strip():
                row.code.pop(end)
    return [row for row in out if row.code or row.prose or row.banner or row.name]


# ------------------------------------ prose ------------------------------------
def inline(text, link):
    """Text -> HTML with code, flags, files, papers and names of definitions in other files marked
    as such."""
    formula = UPDATE.search(text) or SYMBOL.search(text)
    if formula:
        before, after = text[: formula.start()], text[formula.end() :]
        return inline(before, link) + formulas.from_text(formula[0]) + inline(after, link)
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"(?<![\w<>/-])(--[a-z][\w-]*)", r"<code>\1</code>", text)
    text = re.sub(
        r"\barXiv (\d{4}\.\d{5})", r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', text
    )

    def copied(match):
        names = re.sub(r"\w+(?:\.\w+)?", lambda m: link(match[2], m[0]) or m[0], match[3])
        return f"{match[1]} {link(match[2]) or match[2]}: {names}"

    text = re.sub(
        r"\b((?:Copied|Adapted) from) (\w+\.py): (\w[\w.]*(?:, [A-Z]\w+|, \w+_\w+)*)", copied, text
    )
    return files(text, link)


def files(text, link):
    """HTML with the names of files linked."""
    return re.sub(
        r"(?<![\w/>.])((?:docs/)?\w+\.(?:py|md))\b(?![^<]*</(?:code|a)>)",
        lambda m: link(m[1]) or m[1],
        text,
    )


def prose(text, link):
    """A docstring or comment -> HTML: paragraphs, lists, commands, and the formulas of a loss."""
    out = ""
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.split("\n")
        rest = (
            textwrap.dedent("\n".join(lines[1:]))
            if not lines[0].startswith(" ")
            else "\n".join(lines[1:])
        )
        lines = [lines[0], *rest.split("\n")] if len(lines) > 1 else lines
        is_loss = bool(re.match(r"Loss(es)?\b", block))
        groups = []  # (kind, lines)
        for line in lines:
            if COMMAND.match(line) and (re.search(r"^ {2,}|\S {2,}(torchrun|python) ", line)):
                kind = "commands"
            elif line.startswith((" - ", "- ")):
                kind = "item"
            elif groups and groups[-1][0] == "item" and line.startswith(" "):
                groups[-1][1].append(line)
                continue
            elif line.startswith("  "):
                kind = "formulas" if is_loss else "lines"
            else:
                kind = "text"
            if kind == "item" or not groups or groups[-1][0] != kind:
                groups.append((kind, []))
            groups[-1][1].append(line)
        for kind, part in groups:
            joined = " ".join(line.strip() for line in part)
            if kind == "text" and is_loss:
                out += f"<p>{files(formulas.from_text(joined), link)}</p>\n"
            elif kind == "text":
                out += f"<p>{inline(joined, link)}</p>\n"
            elif kind == "item":
                out += f"<ul><li>{inline(joined.removeprefix('- '), link)}</li></ul>\n"
            elif kind == "formulas":
                for line in part:
                    formula = files(formulas.from_text(line.strip()), link)
                    out += f'<p class="formula-line">{formula}</p>\n'
            else:
                lines_as_they_are = html.escape(textwrap.dedent("\n".join(part)))
                out += f'<pre class="plain" tabindex="0">{lines_as_they_are}</pre>\n'
    return out.replace("</ul>\n<ul>", "\n")


# ------------------------------------ code ------------------------------------
def highlighted(text):
    """HTML of each line of a Python file."""
    return highlight(text, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).split("\n")


def code(lines, numbers, anchors=True):
    """HTML of the lines with these numbers; each has its number, and is a target for links such as
    #L12."""
    out = ""
    for number in numbers:
        mark = f' id="L{number}"' if anchors else ""
        out += f'<span class="line"{mark} data-line="{number}">{lines[number - 1]}</span>\n'
    return f'<div class="highlight"><pre tabindex="0"><code>{out}</code></pre></div>'


def page(text, link, keep, beside):
    """The page of a file in Markdown: headings are Markdown's, what stands between them is kept
    HTML. beside: {name of a definition: HTML of what the method's page says of it}."""
    lines, out = highlighted(text), ""
    all_rows = rows(text)
    if all_rows[0].prose and not all_rows[0].name:
        intro = prose(all_rows[0].prose.pop(0), link)
        out += keep(f'<div class="intro">{intro}</div>', True)
    below = "##"  # level of definitions: one lower as soon as there is a section
    for row in all_rows:
        if row.banner:
            below = "###"
            anchor = re.sub("[^a-z]+", "-", row.banner.lower())
            out += f'\n\n## {row.banner} {{id="section-{anchor}"}}\n\n'
        if not (row.name or row.prose or row.code):
            continue
        out += keep('<div class="row"><div class="prose">', True)
        if row.name:
            level, anchor = below + "#" * row.name.count("."), row.name.replace("_", "\\_")
            out += f'\n\n{level} `{row.name.split(".")[-1]}` {{id="{anchor}"}}\n\n'
        said = "".join(prose(text, link) for text in row.prose) + beside.get(row.name, "")
        shown = code(lines, row.code) if row.code else ""
        out += keep(f'{said}</div><div class="code" data-search-exclude>{shown}</div></div>', True)
    return out
