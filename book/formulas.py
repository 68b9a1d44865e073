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
WORDS = {"a", "of", "to", "in", "is", "if", "on", "or", "as", "by"}
OPERATORS = {"<-": "←", "!=": "≠", ">=": "≥", "<=": "≤", "...": "…", "-": "−", "*": "·", ".": "·"}
TOKEN = re.compile(
    r"(?P<cited>\((?:Eq|Sec|App|Fig|Table|Algorithm)[^)]*\))"
    r"|(?P<flag>--[\w-]+)"
    r"|(?P<name>[A-Za-z]+\d*(?:_(?:\{[^}]*\}|\+|[A-Za-z]+|\d+))?(?:\^\w)?'?)"
    r"|(?P<number>\d+(?:\.\d+)?(?:/\d+)?)"
    r"|(?P<sign><-|!=|>=|<=|\.\.\.|[^\w\s])"
)


def letter(name):
    """A letter, which MathML slants, the name of a Greek one, or a word, which MathML leaves
    upright."""
    return "<mo>∑</mo>" if name == "sum" else f"<mi>{GREEK.get(name, name)}</mi>"


def symbol(text):
    """MathML of a name with its digits, subscript, power and prime: theta_k, x1', T^T, sum_{k !=
    i}."""
    base, _, sub = text.rstrip("'").partition("_")
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
    above += "<mo>′</mo>" if text.endswith("'") else ""
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
            above, _, below = match["number"].partition("/")
            out += (
                f"<mfrac><mn>{above}</mn><mn>{below}</mn></mfrac>" if below else f"<mn>{above}</mn>"
            )
        else:
            out += f"<mo>{html.escape(OPERATORS.get(match[0], match[0]))}</mo>"
    return out


def is_word(match):
    """Part of a sentence rather than of a formula: chance, mean over, the, a."""
    name = match["name"] or ""
    if name in ("mean", "sum", "min", "max"):  # mean_i would have an index
        return True
    return name not in {*GREEK, *FUNCTIONS} and (name in WORDS or name.isalpha() and len(name) > 2)


def from_text(line):
    """A line of a docstring's loss -> HTML: runs of symbols become MathML, words stay text between
    them."""
    out, run, end = "", "", 0

    def closed():
        return f"<math>{symbols(run)}</math>" if re.search(r"\w", run) else html.escape(run)

    for match in TOKEN.finditer(line):
        gap, end = line[end : match.start()], match.end()
        if match["flag"]:
            out, run = out + closed() + gap + f"<code>{match[0]}</code>", ""
        elif match["cited"] or is_word(match) and not line[end:].startswith("("):
            out, run = out + closed() + gap + html.escape(match[0]), ""
        elif match[0] in ",;:" and run.count("(") <= run.count(")"):
            out, run = (
                out + closed() + gap + match[0],
                "",
            )  # a browser breaks lines between formulas only
        elif run:
            run += gap + match[0]
        else:
            out, run = out + gap, match[0]
    return out + closed()
