"""Formulas as MathML: the TeX of docs/*.md, and the plain text in which docstrings write a loss.

A browser draws MathML by itself, so that no page needs a script or a font from somewhere else.
"""

import html
import re

from latex2mathml.converter import convert

CODE = re.compile(r"^```.*?^```|`[^`\n]+(?:\n[^`\n]+)?`", re.M | re.S)
FUNCTIONS = {
    "log",
    "ln",
    "exp",
    "cos",
    "sin",
    "softmax",
    "sum",
    "mean",
    "min",
    "max",
    "stopgrad",
    "CE",
    "KL",
}
SPACE = '<mspace width="0.2em"></mspace>'  # between ln and B, which MathML would set as lnB
FORMULA = re.compile(r"\$\$(?P<display>.*?)\$\$|\$(?P<inline>[^$\n]+(?:\n[^$\n]+)*?)\$", re.S)


# ------------------------------------ TeX ------------------------------------
def from_tex(tex, display=False):
    """-> MathML that screen readers can read, with its TeX as the label."""
    tex = " ".join(tex.split())
    math = convert(tex, display="block" if display else "inline")
    math = re.sub(rf"(<mi>(?:{'|'.join(FUNCTIONS)})</mi>)(?=<m[insf])", rf"\1{SPACE}", math)
    math = math.replace("<math ", f'<math aria-label="{html.escape(tex)}" ', 1)
    return f'<div class="formula">{math}</div>' if display else math


def replace_tex(markdown, keep):
    """The page with each $formula$ outside of code replaced by keep(its MathML, whether it is
    displayed)."""
    codes = [match.span() for match in CODE.finditer(markdown)]

    def replaced(match):
        if any(start <= match.start() < end for start, end in codes):
            return match[0]
        display = match["display"] is not None
        return keep(from_tex(match["display"] or match["inline"], display), display)

    return FORMULA.sub(replaced, markdown)


# ------------------------------------ docstrings ------------------------------------
GREEK = dict(zip("alpha beta gamma theta lambda tau xi sigma".split(), "αβγθλτξσ"))
WORDS = {"a", "of", "to", "in", "is", "if", "it", "an", "no", "on", "or", "as", "at", "by"}
OPERATORS = {"<-": "←", "!=": "≠", ">=": "≥", "<=": "≤", "...": "…", "-": "−", "*": "·", ".": "·"}
TOKEN = re.compile(
    r"(?P<cited>\((?:[\w ,]+ )?(?:Eq|Sec|App|Fig|Table|Algorithm)\b[^)]*\)|\b\w+\.(?:py|md)\b)"
    r"|(?P<code>--[\w-]+|\b(?!sum_|min_|max_)[a-z]{3,}_[a-z]{2,}\b)"
    r"|(?P<word>'s\b|\b[A-Za-z]{2,}(?:-[A-Za-z]+)+)"
    r"|sqrt\((?P<root>\w+)\)"
    r"|(?P<name>[A-Za-z]+\d*(?:_(?:\{[^}]*\}|\+|[A-Za-z]+|\d+))?(?:\^\w)?(?:'(?!s\b)|\*)?)"
    r"|(?P<number>\d+(?:\.\d+)?(?:/\d+)?\*?)"
    r"|(?P<sign>(?:<-|!=|>=|<=|\.\.\.|[^\w\s])(?:\^\d|(?<=\))_\w+)?)"
)
LABEL = re.compile(r"[a-z]\w{3,}(?=  )")  # of one of several losses, in front of it


def letter(name):
    """A letter, which MathML slants, the name of a Greek one, or a word, which MathML leaves
    upright."""
    return "<mo>∑</mo>" if name == "sum" else f"<mi>{GREEK.get(name, name)}</mi>"


def symbol(text):
    """MathML of a name with its digits, subscript, power and prime: theta_k, x1', T^T, sum_{k !=
    i}."""
    base, _, sub = text.rstrip("'*").partition("_")
    power = ""
    if "^" in base + sub:
        base, sub, power = (*base.split("^"), "")[:1] + (
            sub.split("^")[0],
            (base + sub).split("^")[1],
        )
    digits = re.search(r"\d*$", base)[0]
    base = base.removesuffix(digits)
    below = symbols(sub.strip("{}")) if sub else f"<mn>{digits}</mn>" if digits else ""
    above = "<mo>⊤</mo>" if power == "T" else symbols(power)
    above += {"'": "<mo>′</mo>", "*": "<mo>∗</mo>"}.get(text[-1], "")
    if below and above:
        return f"<msubsup>{letter(base)}<mrow>{below}</mrow><mrow>{above}</mrow></msubsup>"
    if below:
        return f"<msub>{letter(base)}<mrow>{below}</mrow></msub>"
    return f"<msup>{letter(base)}<mrow>{above}</mrow></msup>" if above else letter(base)


def symbols(text):
    """MathML of an expression without words."""
    out = ""
    for match in TOKEN.finditer(text):
        if match["name"]:
            out += symbol(match["name"])
            if match["name"] in FUNCTIONS and text[match.end() :].startswith(" "):
                out += SPACE
        elif match["number"]:
            above, _, below = match["number"].rstrip("*").partition("/")
            number = f"<mn>{above}</mn>"
            if below:
                number = f"<mfrac>{number}<mn>{below}</mn></mfrac>"
            out += f"<msup>{number}<mo>∗</mo></msup>" if match[0].endswith("*") else number
        elif match["root"]:
            out += f"<msqrt>{symbols(match['root'])}</msqrt>"
        else:
            sign, mark, small = match[0], "", ""
            if "^" in sign[1:] or "_" in sign:  # |x|^2, P(x)_k
                sign, mark, small = re.split(r"([\^_])", sign)
            # as a fence, | would grow
            stays = ' stretchy="false" lspace="0" rspace="0"' if sign == "|" else ""
            operator = f"<mo{stays}>{html.escape(OPERATORS.get(sign, sign))}</mo>"
            tag = "msup" if mark == "^" else "msub"
            out += f"<{tag}>{operator}{symbols(small)}</{tag}>" if mark else operator
    return out


def is_word(match):
    """Part of a sentence rather than of a formula: chance, mean over, the, a."""
    name, rest = match["name"] or "", match.string[match.end() :]
    if name in ("mean", "sum", "min", "max"):  # mean_i would have an index
        return True
    is_argument = rest.startswith(")") and re.search(r"\w\($", match.string[: match.start()])
    if rest.startswith("(") or is_argument:
        return False  # projector(I), p(token)
    if name == "a":  # an article, or a weight as in a ln B
        following = re.match(r" ([A-Za-z]{2,})(?!\w)", rest)
        return bool(following) and following[1] not in {*GREEK, *FUNCTIONS}
    return name not in {*GREEK, *FUNCTIONS} and (name in WORDS or name.isalpha() and len(name) > 2)


def is_aside(match):
    """A parenthesis around words, as in: 4 (independent directions: p.z' = 0)."""
    rest = match.string[match.end() :]
    return match[0] == "(" and re.match(r"[a-z]{3,}(?: [a-z]{3,}|\)|$)", rest)


def from_text(line):
    """A line of a docstring's loss -> HTML: runs of symbols become MathML, words stay text between
    them."""
    label = LABEL.match(line)
    if label:
        return f"<b>{label[0]}</b> {from_text(line[label.end() :].lstrip())}"
    out, run, end = "", "", 0

    def closed():
        has_symbols = re.search(r"\w", run)
        return f"<math>{symbols(run)}</math>" if has_symbols else html.escape(run, quote=False)

    def is_open():
        return sum(run.count(mark) for mark in "([{") > sum(run.count(mark) for mark in ")]}")

    for match in TOKEN.finditer(line):
        gap, end = line[end : match.start()], match.end()
        if match["code"]:
            out, run = out + closed() + gap + f"<code>{match[0]}</code>", ""
        elif match["cited"] or match["word"] or is_word(match) or is_aside(match):
            out, run = out + closed() + gap + html.escape(match[0], quote=False), ""
        elif match[0] in ",;:)" and not is_open():  # a browser breaks lines between formulas only
            out, run = out + closed() + gap + match[0], ""
        elif run:
            run += gap + match[0]
        else:
            out, run = out + gap, match[0]
    return out + closed()
