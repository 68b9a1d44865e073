"""The book: every page is there, complete, small, and readable without a network, a mouse or a picture."""

import colorsys
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

from urllib.parse import unquote, urljoin, urlparse

import pytest
from copies import ROOT, method_files

sys.path[:0] = [str(ROOT / "book"), str(ROOT / "benchmarks")]
import difference  # noqa: E402
import family  # noqa: E402
import figures  # noqa: E402
import formulas  # noqa: E402
import glossary  # noqa: E402
import hooks  # noqa: E402
import source  # noqa: E402
import table  # noqa: E402

METHODS = [path.stem for path in method_files()]
CHILDREN = {name: parent for name, (_, _, parent) in table.methods().items() if parent}
SITE = "http://book.test/base/"  # a folder below a host, as on GitHub Pages
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
OPEN_END = {"p", "li", "dt", "dd", "path", "rect", "circle", "polyline"}  # browsers close these themselves


class Page(HTMLParser):
    """What the tests ask of a page: its tags, the text of each, headings, links and ids."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.stack, self.ids, self.headings, self.text = [], [], [], [], ""
        self.code, self.problems = "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if re.fullmatch("h[1-6]", tag):
            self.headings.append([int(tag[1]), ""])
        if tag not in VOID:
            self.stack.append((tag, attributes.get("class") or ""))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        while self.stack and self.stack[-1][0] != tag and self.stack[-1][0] in OPEN_END:
            self.stack.pop()
        if self.stack and self.stack[-1][0] == tag:
            self.stack.pop()
        else:
            self.problems.append(f"</{tag}> closes {self.stack[-1:]}")

    def handle_data(self, data):
        names = [tag for tag, _ in self.stack]
        if "script" in names or "style" in names:
            return
        self.text += data
        if any(re.fullmatch("h[1-6]", name) for name in names):
            self.headings[-1][1] += data
        if any("line" in kind.split() for _, kind in self.stack):
            self.code += data
        elif self.code and not self.code.endswith("\n"):
            self.code += "\n"


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """{path in the book: Page}, and the folder."""
    folder = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "SITE_URL": SITE, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.html")}
    return {name: Page(path.read_text()) for name, path in paths.items()}, folder


def pages_of(book):
    return {name: page for name, page in book[0].items() if name != "404.html"}


def source_of(name):
    return (ROOT / f"{name}.py").read_text()


# ------------------------------------ all pages ------------------------------------
def test_pages_exist(book):
    names = ["", "family/", "curves/", "pictures/", "glossary/", "quickstart/"]
    names += [f"{path.stem}/" for path in (ROOT / "docs").glob("*.md")]
    names += [f"source/{name}/" for name in METHODS] + [f"difference/{name}/" for name in CHILDREN]
    names += [f"source/{file.removesuffix('.py')}/" for file in [*table.SHARED, "slip_ablations.py"]]
    assert {f"{name}index.html" for name in names} == set(pages_of(book))
    assert len(METHODS) == 13 and len(CHILDREN) == 11


def test_links_resolve(book):
    """Inside the book, with their anchors; the others are not asked for, and none is a picture, script or font."""
    pages, folder = book
    checked = 0
    for name, page in pages.items():
        here = SITE + name.removesuffix("index.html")
        for tag, attributes in page.tags:
            target = attributes.get("href") or attributes.get("src")
            if not target or target.startswith("data:"):
                continue
            url = urlparse(urljoin(here, target))
            if url.netloc != "book.test":
                assert tag == "a" and url.scheme in ("https", "mailto"), f"{name} loads {target}"
                continue
            assert url.path.startswith("/base/"), f"{name} links {target}"
            path = unquote(url.path.removeprefix("/base/"))
            path += "index.html" if path in ("", ".") or path.endswith("/") else ""
            assert (folder / path).is_file(), f"{name} links {target}"
            if url.fragment and path in pages and not url.fragment.startswith("__"):
                assert unquote(url.fragment) in pages[path].ids, f"{name} links {target}"
            checked += 1
    assert checked > 2000


def test_nothing_comes_from_elsewhere(book):
    """No page, style or script of the pages names another host for anything that is loaded by itself."""
    pages, folder = book
    for name, page in pages.items():
        for tag, attributes in page.tags:
            for key in ("src", "srcset", "data", "poster"):
                assert not re.match(r"(https?:)?//", attributes.get(key) or ""), f"{name}: {tag} {attributes}"
            if tag == "link" and attributes.get("rel") != "canonical":
                assert not re.match(r"https?://(?!book\.test)", attributes.get("href") or ""), f"{name}: {attributes}"
            assert "url(http" not in (attributes.get("style") or "")
    for path in folder.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", path.read_text()), path.name


def test_pictures_have_words(book):
    for name, page in pages_of(book).items():
        for tag, attributes in page.tags:
            if tag == "img":
                assert attributes.get("alt"), f"{name}: {attributes}"
            if tag == "svg" and "chart" in (attributes.get("class") or ""):
                assert len(attributes["aria-label"]) > 20, name


def test_headings_are_in_order(book):
    for name, page in pages_of(book).items():
        levels = [level for level, _ in page.headings]
        assert levels[0] == 1 and levels.count(1) == 1, f"{name}: {page.headings[:4]}"
        for (before, _), (level, text) in zip(page.headings, page.headings[1:]):
            assert level <= before + 1, f"{name}: {text} of level {level} below level {before}"


def test_pages_are_sound(book):
    """Tags close in order, ids are unique, and nothing is left of what stands for HTML while a page is made."""
    for name, page in pages_of(book).items():
        assert not page.problems, f"{name}: {page.problems[:3]}"
        assert len(page.ids) == len(set(page.ids)), f"{name}: {[i for i in page.ids if page.ids.count(i) > 1][:5]}"
        assert not re.search(r"KEPT\d|\{ ?[:#.]|\$\$|\{id=", page.text.replace(page.code, "")), name


def test_pages_are_light(book):
    for path in book[1].rglob("*.html"):
        page = path.read_text()
        pictures = [tag for tag in re.findall(r"<img [^>]*>", page) if "lazy" not in tag]
        sources = {unquote(re.search(r'src="([^"]+)"', tag)[1]) for tag in pictures if "data:" not in tag}
        sizes = [(path.parent / source).stat().st_size for source in sources]
        total = path.stat().st_size + sum(sizes)
        assert total < 500_000, f"{path.parent.name}: {total:,} bytes, pictures included"


def test_formulas_are_mathml(book):
    for name in ("clip", "byol", "dino", "mocov3"):
        page = book[0][f"{name}/index.html"]
        wanted = len(formulas.FORMULA.findall((ROOT / f"docs/{name}.md").read_text()))
        assert sum(tag == "math" for tag, _ in page.tags) >= wanted > 3
        assert "$" not in page.text and "\\frac" not in page.text


def test_search_finds_terms(book):
    index = json.loads((book[1] / "search/search_index.json").read_text())
    found = [entry for entry in index["docs"] if "stop-gradient" in (entry["title"] + entry["text"]).lower()]
    assert any(entry["location"].startswith("glossary/") for entry in found)
    assert any(entry["location"].startswith("simsiam/") for entry in found)


# ------------------------------------ annotated source ------------------------------------
@pytest.mark.parametrize("name", [*METHODS, "common", "evaluation/probes"])
def test_source_is_complete(book, name):
    """Every line of code and every word of the docstrings and comments is on the page, in the file's order."""
    page, text = book[0][f"source/{name}/index.html"], source_of(name)
    shown = page.code.split("\n")
    prose = re.sub(r"\W", "", page.text)
    rows, lines = source.rows(text), text.splitlines()
    assert [line for line in shown if line.strip()] == [lines[i - 1] for row in rows for i in row.code if lines[i - 1].strip()]
    in_rows = {i for row in rows for i in row.code}
    rest = [line for i, line in enumerate(lines, 1) if i not in in_rows and line.strip()]
    for row in rows:
        for words in row.prose:
            if not words.startswith("Loss") and row.start > 1:
                for word in re.findall(r"[A-Za-z]{4,}", words):
                    assert word in prose, f"{name}: {word}"
    for line in rest:  # what is no code line is a banner, a comment or part of a docstring
        known = source.BANNER.match(line) or line.strip().startswith("#")
        assert known or any(line.strip().strip("\"") in words for row in rows for words in row.prose), line
    assert {definition for definition, _ in source.definitions(source.ast.parse(text))} <= set(page.ids)


def test_rows_of_a_small_file():
    text = '"""Title.\n\nMore."""\n\nimport os\n\n\n# ---------------------- loss ----------------------\n# why\ndef f(x):\n    """What."""\n    y = x  # beside\n    # then\n    return y\n'
    rows = source.rows(text)
    assert [(row.name, row.banner, row.prose, row.code) for row in rows] == [
        ("", "", ["Title.\n\nMore."], [5]), ("", "loss", [], []), ("f", "", ["why", "What."], [10, 12]), ("", "", ["then"], [14])]


def test_formulas_stand_beside_their_code(book):
    """What the method's page says of a definition is beside the definition."""
    page = book[0]["source/slip/index.html"]
    assert sum(tag == "math" for tag, _ in page.tags) >= 5
    assert any("beside" in (attributes.get("class") or "").split() for _, attributes in page.tags)


def test_docstring_formulas():
    """Symbols become MathML, words stay words."""
    html = formulas.from_text("theta_k <- m theta_k + 1/2 q'^T x (Eq. 2), mean over the batch, chance ln(K + 1)")
    assert "<msub><mi>θ</mi><mrow><mi>k</mi></mrow></msub><mo>←</mo>" in html
    assert "<mfrac><mn>1</mn><mn>2</mn></mfrac>" in html and "(Eq. 2)" in html and "mean over the batch" in html
    assert re.sub("<.*?>", "", formulas.from_text("L = -log(p), a mean of sums")) == "L=−log(p), a mean of sums"


def test_docstring_formulas_have_no_words():
    """Words, names of files and flags stay outside of MathML; norms, labels and indices are typeset."""
    line = "byol    |p1 - z2|^2 as in slip.py, a ln B of the optimizer's step (BYOL Eq. 2), feature_std 1 / sqrt(E)"
    html = formulas.from_text(line)
    assert html.startswith("<b>byol</b> <math>")
    bar = '<mo stretchy="false" lspace="0" rspace="0">|</mo>'
    assert f"{bar}<msub><mi>p</mi>" in html and f"<msup>{bar}<mn>2</mn></msup>" in html
    assert "<msqrt><mi>E</mi></msqrt>" in html and "<code>feature_std</code>" in html
    assert " as in slip.py, " in html and " of the optimizer's step (BYOL Eq. 2), " in html
    assert "<mi>a</mi><mi>ln</mi>" in html and "<msub><mo>)</mo><mi>k</mi></msub>" in formulas.from_text("P_t(x)_k")
    assert formulas.from_text("a collapse (independent directions: one)") == "a collapse (independent directions: one)"
    assert "<msup><mi>u</mi><mrow><mo>∗</mo></mrow></msup>" in formulas.from_text("u* and 2*")


NAMES = set("ctr clip ssl ISS TSS MVS NNS cls patch DINO iBOT KoLeo projector predictor token".split())


@pytest.mark.parametrize("name", [*METHODS, "slip_ablations"])
def test_formulas_of_a_file_are_symbols(name):
    """Long words in the MathML of a file's loss are functions, or names that the loss gives itself; no symbol is
    left as text."""
    html = source.prose(source.rows(source_of(name))[0].prose[0], lambda *_: None)
    loss = re.search(r"<p>Loss.*?(?=<pre)", html, re.S)[0]
    words = re.findall(r"<mi>([^<]{2,})</mi>", loss)
    assert set(words) <= formulas.FUNCTIONS | NAMES | {"ik"}
    plain = re.sub("<.*?>", "", re.sub(r"<(math|code)\b.*?</\1>", "", loss, flags=re.S))
    assert not re.search(r"\btau\b|theta|lambda|\w_\w|<-|\^|sqrt", plain)
    assert loss.count("<math>") >= 8


@pytest.mark.parametrize("name", METHODS)
def test_sections_leave_no_empty_rows(book, name):
    page = (book[1] / f"source/{name}/index.html").read_text()
    assert page.count('<div class="row">') > 20
    assert not re.search(r'<div class="prose">\s*</div><div class="code" data-search-exclude></div>', page)


def test_updates_in_sentences_are_formulas():
    html = source.inline("theta_k <- m theta_k + (1 - m) theta_q (Eq. 2). Of tau_t, `tau_t`", lambda *_: None)
    assert html.count("<math>") == 2 and "</math> (Eq. 2). Of <math>" in html and "<code>tau_t</code>" in html


def test_lines_break_between_flags():
    html = hooks.unbroken("<pre><code>a --b</code></pre><code>a --b-c 2</code><table><td>42.8 / 72.1</td><td>3 words</td>")
    assert html == (
        '<pre><code>a --b</code></pre><code>a <span class="flag">--b-c</span> 2</code>'
        '<table><td class="numbers">42.8 / 72.1</td><td>3 words</td>'
    )


# ------------------------------------ difference ------------------------------------
@pytest.mark.parametrize("name", CHILDREN)
def test_difference_is_the_real_one(book, name):
    """Both files can be put together again from the hunks, and every changed line is on the page."""
    old, new = (source_of(x).splitlines() for x in (CHILDREN[name], name))
    hunks = difference.hunks(old, new)
    assert [i for hunk in hunks for i in hunk.old] == list(range(len(old)))
    assert [i for hunk in hunks for i in hunk.new] == list(range(len(new)))
    assert all([old[i] for i in h.old] == [new[i] for i in h.new] for h in hunks if h.equal)
    equal = sum(len(hunk.new) for hunk in hunks if hunk.equal)
    assert equal >= 40
    page = book[0][f"difference/{name}/index.html"]
    shown = page.code.split("\n")
    for hunk in hunks:
        for line in [old[i] for i in hunk.old] + [new[i] for i in hunk.new]:
            assert line in shown, line


@pytest.mark.parametrize("name", CHILDREN)
def test_reasons_are_shown(book, name):
    """Each of the page's reasons, most of them at a hunk."""
    page = book[0][f"difference/{name}/index.html"]
    reasons = difference.reasons((ROOT / f"docs/{name}.md").read_text())
    assert reasons or name == "simclrv2"
    shown = re.sub(r"\W", "", page.text)
    for reason in reasons:
        text = re.sub(r"\$.*?\$", "", reason)
        words = re.findall(r"[A-Za-z_]{4,}", re.sub(r"\]\([^)]*\)", "]", text))
        assert all(word in shown for word in words), reason


def test_reasons_find_their_hunk():
    old = ["# ---------------------- loss ----------------------", "def old(x):", "    return x", *[f"line {i} of several" for i in range(6)]]
    new = ["# ---------------------- loss ----------------------", "def new(x):", "    return 2 * x", *[f"line {i} of several" for i in range(6)], "tau = 1"]
    hunks = difference.hunks(old, new)
    changed = [hunk for hunk in hunks if not hunk.equal]
    texts = ["\n".join([old[i] for i in h.old] + [new[i] for i in h.new]) for h in changed]
    assert len(changed) == 2 and changed[0].section == "loss"
    assert difference.place("`new` replaces `old`", changed, texts) is changed[0]
    assert difference.place("`tau` is new", changed, texts) is changed[1]
    assert difference.place("Loss: twice as large", changed, texts) is changed[0]
    assert difference.place("nothing of the kind", changed, texts) is None


# ------------------------------------ family, curves, glossary ------------------------------------
HAS = {  # by the papers
    "clip": "negatives text", "align": "negatives text", "slip": "negatives text",
    "declip": "negatives predictor masks text", "simclr": "negatives", "simclrv2": "",
    "moco": "negatives momentum", "mocov3": "negatives momentum predictor", "byol": "momentum predictor",
    "simsiam": "predictor", "dino": "momentum prototypes", "ibot": "momentum prototypes masks",
    "dinov2": "momentum prototypes masks"}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_table_of_parts(name):
    """What is read off the code is what the paper describes."""
    found = {part.split()[0] for part, where in family.parts(source_of(name)).items() if where}
    assert found == set(HAS[name].split())


def test_family_tree(book):
    """A box for each method, a line for each child, and all of them can be clicked."""
    page = book[0]["family/index.html"]
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a" and attributes.get("href")}
    assert {f"../{name}/" for name in METHODS} <= links
    assert {f"../difference/{name}/" for name in CHILDREN} <= links


def test_curves_show_what_is_recorded(book):
    page = book[0]["curves/index.html"]
    said = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg" and "aria-label" in attributes]
    for name, record in table.results().items():
        losses = [values["loss"] for _, values in record["curve"] if "loss" in values]
        chance = record["metrics"]["training"].get("chance")
        text = next(text for text in said if text.startswith(f"loss of {name} "))
        assert f"to {losses[-1]:.2f}" in text and (chance is None or f"chance is {chance:.3f}" in text)
    assert any("images: " in text and text.count(",") >= 4 for text in said)  # several methods in one figure
    assert sum(tag == "circle" for tag, _ in page.tags) >= 4  # random weights


def test_single_points_are_seen():
    """A run that was evaluated once has a dot, because a line through one point shows nothing."""
    once, often = ([(x, 1.0 + x) for x in range(1, count + 1)] for count in (1, 9))
    assert '<path class="dot line0" d="M' in figures.chart([figures.Line("a", once, None, None)], 1.0, "x", "y", "once")
    assert "dot" not in figures.chart([figures.Line("a", often, None, None)], 1.0, "x", "y", "often")


def test_glossary_is_linked(book):
    terms = glossary.terms((ROOT / "docs/glossary.md").read_text())
    assert {"collapse", "ema", "stop-gradient", "infonce", "prototype", "centering"} <= set(terms)
    assert set(terms.values()) <= set(book[0]["glossary/index.html"].ids)
    used = set()
    for name, page in pages_of(book).items():
        links = [attributes["href"].partition("#")[2] for tag, attributes in page.tags
                 if tag == "a" and attributes.get("class") == "term"]  # fmt: skip
        assert len(links) == len(set(links)), name
        used |= set(links)
        if name.removesuffix("/index.html") in [f"source/{method}" for method in METHODS]:
            assert len(links) >= 3, name
    assert {"collapse", "stop-gradient", "infonce", "prototype", "centering"} <= used


def test_first_use_only():
    html = "<h2>Collapse</h2><p>a <code>collapse</code>, <a href='x'>collapse</a> Collapse collapse</p>"
    linked = glossary.link_first_uses(html, {"collapse": "collapse"}, "g/")
    assert linked == html.replace("</a> Collapse", '</a> <a class="term" href="g/#collapse">Collapse</a>')


def test_file_names_are_no_terms():
    html = "<p>knn.py measures kNN.</p>"
    assert glossary.link_first_uses(html, {"knn": "knn"}, "") == html.replace("kNN", '<a class="term" href="#knn">kNN</a>')


def contrast(first, second):
    """WCAG's ratio of two colours (r, g, b) from 0 to 1."""

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(first), luminance(second)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["default", "slate"])
def test_colours_are_legible(scheme):
    """Every colour that book.css gives to text, on the grounds of material's two schemes."""
    css = (ROOT / "book/theme/assets/book.css").read_text()
    rules = re.findall(r"^(:root|\[data-md-color-scheme[^{]*) \{(.*?)\}", css, re.M | re.S)
    rules = [body for where, body in rules if where == ":root" or "=" not in where or scheme in where]
    colours = {}
    for body in rules:  # a later rule takes the place of an earlier one
        colours |= dict(re.findall(r"(--[\w-]+): #([0-9a-f]{6});", body))
    dark = scheme == "slate"
    ground = colorsys.hls_to_rgb(230 / 360, 0.14, 0.15) if dark else (1.0, 1.0, 1.0)
    code = colorsys.hls_to_rgb(230 / 360, 0.18, 0.15) if dark else (0.96, 0.96, 0.96)
    assert len(colours) >= 18
    for name, value in colours.items():
        colour = [int(value[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        assert contrast(colour, code if "code" in name else ground) >= 4.5, name


def test_workflow_and_ci_build_it():
    assert "mkdocs build --strict" in (ROOT / ".ci/run").read_text()
    assert "mkdocs build --strict" in (ROOT / ".github/workflows/book.yml").read_text()
