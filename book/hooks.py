"""Makes the book: mkdocs calls the functions on_... below
(https://www.mkdocs.org/dev-guide/plugins/#events).

docs/*.md are pages as they are. The README is the home page; each Python file becomes a page of
annotated source, each method with a parent a page of their difference; the family tree, the curves
of results/*.json and the pictures have a page each. Nothing is written twice, and nothing is
written into docs/.
"""

import ast
import functools
import io
import re
import sys
from pathlib import Path

import markdown as python_markdown
from mkdocs.structure.files import File
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "book"), str(ROOT / "benchmarks"), str(ROOT)]

import difference  # noqa: E402
import family  # noqa: E402
import figures  # noqa: E402
import formulas  # noqa: E402
import glossary  # noqa: E402
import notebook  # noqa: E402
import scenes  # noqa: E402
import source  # noqa: E402
import table  # noqa: E402

LINK = re.compile(r"(\[[^\[\]]*\])\(([^)\s]+)\)")
kept = {}  # {a word without meaning to Markdown: the HTML that takes its place in the end}
generated = {}  # {path of a page or file in the book: its content}


def keep(content, block=False):
    """Puts HTML out of Markdown's reach until the page is done."""
    word = f"KEPT{len(kept):06d}KEPT"
    kept[word] = content
    return f"\n\n{word}\n\n" if block else word


@functools.cache
def methods():
    return table.methods()


@functools.cache
def results():
    return table.results()


@functools.cache
def definitions(path):
    """{name: node} of a file's definitions, those that have an anchor."""
    return dict(source.definitions(ast.parse(read(path))))


def read(path):
    return (ROOT / path).read_text()


# ------------------------------------ the pages there are ------------------------------------
@functools.cache
def python_files():
    """Files that get a page of annotated source, methods first."""
    experiments = sorted(path.name for path in ROOT.glob("*_ablations.py"))
    return [f"{name}.py" for name in methods()] + experiments + list(table.SHARED)


def place(path):
    """Where the book has a file of the repository."""
    if path in python_files():
        return f"source/{path.removesuffix('.py')}.md"
    if path == "README.md":
        return "index.md"
    if path == "docs/quickstart.ipynb":
        return "quickstart.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def relative(target, page):
    """A link from one page below docs/ to another."""
    up = "../" * page.count("/")
    return up + target


def source_link(page):
    """Function of (file, name) -> HTML that links a definition or the page of a file, None if there
    is none."""

    def link(file, name=""):
        path = file if (ROOT / file).exists() else f"evaluation/{file}"
        if (
            path not in python_files()
            and not path.startswith("docs/")
            or not (ROOT / path).exists()
        ):
            return None
        if name and name not in definitions(path):
            return None
        target = place(path)
        target = re.sub(r"\.md$", "/", target)
        folder = page.removesuffix(".md").count("/") + 1
        return f'<a href="{"../" * folder}{target}{"#" + name if name else ""}">{name or file}</a>'

    return link


def methods_nav():
    items = []
    for name, (title, _, parent) in methods().items():
        pages = [f"{name}.md", f"source/{name}.md"] + ([f"difference/{name}.md"] if parent else [])
        if (ROOT / f"{name}_ablations.py").exists():
            pages += [f"{name}_ablations.md", f"source/{name}_ablations.md"]
        items.append({title: pages})
    return items


def on_config(config):
    for memory in (kept, generated):
        memory.clear()
    for function in (methods, results, definitions, python_files):
        function.cache_clear()  # mkdocs serve builds again and again
    running = ["running.md", "scale.md", "init.md", "data.md", "curation.md", "evaluation.md"]
    placed = {"choosing.md", "glossary.md", "results.md"} | set(running)
    placed |= {f"{name}.md" for name in methods()} | {f"{name}_ablations.md" for name in methods()}
    others = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in placed)
    shared = [{file: f"source/{file.removesuffix('.py')}.md"} for file in table.SHARED]
    config.nav = [
        {"Home": ["index.md", "quickstart.md", "choosing.md", "family.md", "glossary.md"]},
        {"Methods": methods_nav()},
        {"Running": running},
        {"Results": ["results.md", "curves.md", "pictures.md"]},
        {"Shared files": [*others, *shared]},
    ]
    return config


def on_files(files, config):
    generated["index.md"] = read("README.md")
    generated["family.md"] = family_page()
    generated["curves.md"] = curves_page()
    generated["pictures.md"] = pictures_page()
    for path in python_files():
        page = f"source/{path.removesuffix('.py')}.md"
        generated[page] = source_page(path, page)
    for name, (_, _, parent) in methods().items():
        if parent:
            generated[f"difference/{name}.md"] = difference_page(name, parent)
    generated["quickstart.md"] = notebook_page(ROOT / "docs/quickstart.ipynb")
    for path, content in generated.items():
        files.append(File.generated(config, path, content=content))
    texts = [file.read_text() for file in table.pages()]
    linked = {target.partition("#")[0] for text in texts for _, target in LINK.findall(text)}
    for target in sorted(linked):  # what is linked and has no page: results, licence, scripts
        path = target.removeprefix("../")
        if (ROOT / path).is_file() and place(path).startswith("files/"):
            files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_serve(server, config, builder):
    """Builds again when a Python file changes."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("evaluation/*.py")]:
        server.watch(str(path))


# ------------------------------------ generated pages ------------------------------------
def beside(name):
    """{definition: HTML}: the rows of the formula table of a method's page that link the
    definition."""
    path, found = ROOT / f"docs/{name}.md", {}
    for row in re.findall(r"^\| (.*) \|$", path.read_text() if path.exists() else "", re.M):
        formula, _, where = row.rpartition(" | ")
        for definition in re.findall(rf"\[`([\w.]+)`\]\(\.\./{name}\.py#L\d+\)", where):
            found[definition] = found.get(definition, "") + f"<p>{to_html(formula)}</p>"
    return {definition: f'<div class="beside">{text}</div>' for definition, text in found.items()}


def to_html(text):
    """A line of Markdown with formulas -> HTML without links, which would be of another page."""
    text = LINK.sub(lambda m: m[1][1:-1], formulas.replace_tex(text, lambda math, _: keep(math)))
    return restore(python_markdown.markdown(text)).removeprefix("<p>").removesuffix("</p>")


def switch(name, here):
    """Links between the three pages of a method, those that are not this one."""
    title, _, parent = methods()[name]
    pages = {f"{name}.md": f"{title}, the method", f"source/{name}.md": "annotated source"}
    if parent:
        pages[f"difference/{name}.md"] = f"difference from {methods()[parent][0]}"
    children = {f"difference/{child}.md": f"what turns it into {other[0]}"
                for child, other in methods().items() if other[2] == name}  # fmt: skip
    links = [
        f"[{text}]({relative(page, here)})"
        for page, text in (pages | children).items()
        if page != here
    ]
    return " · ".join(links) + "\n{ .switch }\n\n"


def source_page(path, page):
    name = path.removesuffix(".py")
    text = read(path)
    is_method = name in methods()
    head = "---\nhide: [navigation, toc]\n---\n\n"
    title = f"# {path}\n\n"
    if is_method:
        title = f"# {methods()[name][0]}: annotated source\n\n" + switch(name, page)
    elif (ROOT / f"docs/{name}.md").exists():
        about = relative(f"{name}.md", page)
        heading = read(f"docs/{name}.md").partition("\n")[0]
        title = f"{heading}: annotated source\n\n"
        title += f"[What the experiments are]({about})\n{{ .switch }}\n\n"
    names = [definition for definition in definitions(path) if "." not in definition]
    contents = " · ".join(f"[`{definition}`](#{definition})" for definition in names)
    contents = f"{contents}\n{{ .contents }}\n\n" if names else ""
    said = beside(name) if is_method else {}
    return head + title + contents + source.page(text, source_link(page), keep, said)


def difference_page(name, parent):
    page, title, other = f"difference/{name}.md", methods()[name][0], methods()[parent][0]
    head = "---\nhide: [navigation, toc]\nsearch:\n  exclude: true\n---\n\n"
    head += f"# What turns {other} into {title}\n\n" + switch(name, page)
    head += f"`{parent}.py` is on the left and `{name}.py` on the right. Equal lines are folded; "
    head += "click to see them. The reasons are those of "
    head += f"[the method's page]({relative(f'{name}.md', page)}).\n\n"
    old, new = f"{parent}.py", f"{name}.py"
    reasons = read(f"docs/{name}.md")
    return head + difference.page(old, new, read(old), read(new), reasons, keep, to_html)


def family_page():
    def url(name, parent=None):
        return f"../difference/{name}/" if parent else f"../{name}/"

    text = "---\nhide: [toc]\n---\n\n# Family tree\n\n"
    text += "Every file names a parent to read it against. "
    text += "Click a method for its page, or a line for what turns the one file into the other.\n"
    text += keep(figures.tree(methods(), url), True)
    text += "\n\n## What each method has\n\n"
    text += "Read off the code: every entry links the definition that provides the part.\n\n"
    rows = []
    for name, (title, _, _) in methods().items():
        cells = [f"[{title}]({name}.md)"]
        for found in family.parts(read(f"{name}.py")).values():
            labels = {where: where.removesuffix(".__init__").split(".")[-1] for where in found}
            links = [f"[`{label}`](source/{name}.md#{where})" for where, label in labels.items()]
            cells.append(", ".join(links) or "–")
        rows.append(cells)
    return text + table.table(["method", *family.PARTS], rows)


def notebook_page(path):
    def picture(name, content):
        generated[f"pictures/{name}"] = content
        return f"pictures/{name}"

    return notebook.page(path, picture)


# ------------------------------------ curves ------------------------------------
def accuracies(record):
    """{name of an accuracy in the training loop: points (step, percent)}"""
    curves = {}
    for step, values in record["curve"]:
        for name in table.IN_LOOP:
            if name in values:
                curves.setdefault(name, []).append((step, values[name]))
    return curves


def random_weights(record, accuracy):
    """Score of the same network with random weights, by the protocol that measures this
    accuracy."""
    protocol = {"zeroshot_top1": "zeroshot", "knn_top1": "knn", "recall@1": "retrieval"}.get(
        accuracy
    )
    for label, metrics in record["metrics"].items():
        if (
            protocol
            and label.startswith(f"{protocol} {record['data']} ")
            and label.endswith(table.START)
        ):
            if protocol == "retrieval":  # the loop logs the mean of both directions
                return (metrics["image_to_text_recall@1"] + metrics["text_to_image_recall@1"]) / 2
            return metrics["top1"]
    return None


def curves_of(name):
    """Charts of one run: its loss, and each accuracy that was measured on the way."""
    record = results()[name]
    last = record["metrics"]["training"]
    points = [(step, values["loss"]) for step, values in record["curve"] if "loss" in values]
    chance = last.get("chance")
    said = (
        f"loss of {name} over {points[-1][0]} steps, from {points[0][1]:.2f} to {points[-1][1]:.2f}"
    )
    said += f", chance is {chance:.3f}" if chance is not None else ""
    charts = [
        figures.chart([figures.Line("loss", points, None, None)], chance, "step", "loss", said)
    ]
    for accuracy, points in accuracies(record).items():
        start, chance = random_weights(record, accuracy), table.chance_of(accuracy, last)
        said = f"{table.IN_LOOP[accuracy]} of {name} in percent, at the end {points[-1][1]:.1f}"
        said += f", chance is {chance:.3g}" if chance is not None else ""
        said += f", with random weights {start:.1f}" if start is not None else ""
        line = figures.Line(table.IN_LOOP[accuracy], points, None, start)
        charts.append(figures.chart([line], chance, "step", f"{table.IN_LOOP[accuracy]}, %", said))
    return f'<div class="charts">{"".join(charts)}</div>'


def budgets():
    """{(data, accuracy, images seen): records}: runs that can be compared, three methods or
    more."""
    found = {}
    for name, record in results().items():
        if name == f"{record['method']}_{record['data']}":
            kinds = accuracies(record)
            if kinds:
                images = record["metrics"]["training"]["step"] * record["args"]["batch_size"]
                found.setdefault((record["data"], next(iter(kinds)), images), []).append(record)
    return {key: records for key, records in found.items() if len(records) >= 3}


def comparison(data, accuracy, images, records):
    lines = []
    for r in records:
        points = [(step * r["args"]["batch_size"], y) for step, y in accuracies(r)[accuracy]]
        title, start = methods()[r["method"]][0], random_weights(r, accuracy)
        lines.append(figures.Line(title, points, f"../{r['method']}/", start))
    chance = table.chance_of(accuracy, records[-1]["metrics"]["training"])
    best = ", ".join(f"{line.label} {line.points[-1][1]:.1f}" for line in lines)
    said = f"{table.IN_LOOP[accuracy]} on {data} in percent after {images:,} images: {best}"
    return figures.chart(lines, chance, "images seen", f"{table.IN_LOOP[accuracy]}, %", said)


def curves_page():
    text = "# Curves\n\nDrawn from results/*.json. A ring at the left end or a dotted line is the "
    text += "same network with random weights, the dashed line is chance. "
    text += "[Results](results.md) has the numbers with their commands, machines and commits.\n"
    text += "\n## Methods under one budget\n\n"
    for (data, accuracy, images), records in budgets().items():
        text += f"\n### {table.IN_LOOP[accuracy]} on {data}, {images:,} images\n\n"
        text += keep(comparison(data, accuracy, images, records), True)
    text += "\n\n## Every run\n\nOne seed each.\n"
    for name, record in results().items():
        text += f"\n### {name}\n\n`{record['command']}`\n" + keep(curves_of(name), True)
    return text


# ------------------------------------ pictures ------------------------------------
def later(picture):
    """Attributes of a picture that is loaded when the reader comes near it, in the place it will
    need."""
    width, height = Image.open(picture).size
    return f'{{loading=lazy width="{width}" height="{height}"}}'


def pictures_page():
    text = "# Pictures\n\n## Drawn data sets\n\nThese sets need no files: "
    text += "every sample is a function of its number ([scenes.py](source/scenes.md)).\n"
    for name, dataset in scenes.SETS.items():
        png, captions = figures.samples(dataset("train", figures.Sample), 16, 8)
        generated[f"pictures/{name}.png"] = png
        alt = f"sixteen samples of the drawn set {name}"
        text += f"\n### {name}\n\n![{alt}](pictures/{name}.png){later(io.BytesIO(png))}\n\n"
        if any(captions):
            text += "Captions, row by row: " + "; ".join(captions) + ".\n"
    text += "\n## Pictures of our own checkpoints\n"
    seen = set()
    for page in table.pages():
        for alt, target in re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", page.read_text()):
            path = place((page.parent / target).resolve().relative_to(ROOT).as_posix())
            if path not in seen:
                seen.add(path)
                title = alt[0].upper() + alt[1:]
                where = place(page.relative_to(ROOT).as_posix())
                heading = page.read_text().partition("\n")[0].removeprefix("# ")
                shown = f"![{alt}]({path}){later(page.parent / target)}"
                text += f"\n### {title}\n\n{shown}\n\nFrom the page [{heading}]({where}).\n"
    return text


# ------------------------------------ every page ------------------------------------
def rewritten_links(text, here):
    """Links to files of the repository become links to the book's pages of them."""
    folder = ROOT / "docs" if here != "index.md" else ROOT

    def new(match):
        target, _, anchor = match[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = (folder / target).resolve()
        if not path.is_relative_to(ROOT) or not path.exists():
            return match[0]
        path = path.relative_to(ROOT).as_posix()
        found = place(path)
        name = re.fullmatch(r"\[`([\w.]+)`\]", match[1])
        if name and path in python_files() and anchor.startswith("L"):
            anchor = name[1] if name[1] in definitions(path) else anchor
        return f"{match[1]}({relative(found, here)}{'#' + anchor if anchor else ''})"

    return LINK.sub(new, text)


def on_page_markdown(text, page, config, files):
    here = page.file.src_uri
    if here == "index.md" or here not in generated:
        name = here.removesuffix(".md")
        text = rewritten_links(text, here)
        if name in methods():
            text = text.replace("\n\n", "\n\n" + switch(name, here), 1)
            text = re.sub(
                r"^(<!-- curves \w+ -->)$", lambda m: m[1] + drawn(name), text, flags=re.M
            )
    return formulas.replace_tex(text, lambda math, display: keep(math, display))


def drawn(method):
    """Charts of the method's runs, to stand above the table of the same numbers."""
    runs = [name for name, record in results().items() if record["method"] == method]
    return "".join(keep(f"<p>{name}:</p>{curves_of(name)}", True) for name in runs)


def restore(content):
    """Puts the kept HTML back, which may hold kept words itself."""
    while re.search(r"KEPT\d{6}KEPT", content):
        content = re.sub(
            r"<p>(KEPT\d{6}KEPT)</p>|(KEPT\d{6}KEPT)", lambda m: kept[m[1] or m[2]], content
        )
    return content


def unbroken(content):
    """HTML in which browsers break no line inside of a flag, nor between the numbers of a cell."""

    def flags(match):
        if match[0].startswith("<pre"):
            return match[0]
        return re.sub(r"--[a-z][\w-]*", r'<span class="flag">\g<0></span>', match[0])

    content = re.sub(r"<pre.*?</pre>|<code>[^<]*</code>|<th>[^<]*</th>", flags, content, flags=re.S)
    number = r"[\d.]+"
    cell = rf"<td>(?={number}(?: / {number})*(?: \([\w ,.]{{1,14}}\))?</td>)"
    return re.sub(cell, '<td class="numbers">', content)


def on_page_content(content, page, config, files):
    content = restore(content)
    content = unbroken(content)
    content = re.sub(r"<table>", '<div class="scroll" tabindex="0"><table>', content)
    content = content.replace("</table>", "</table></div>")
    if page.file.src_uri != "glossary.md":
        url = files.get_file_from_path("glossary.md").url_relative_to(page.file)
        content = glossary.link_first_uses(content, glossary.terms(read("docs/glossary.md")), url)
    return content
