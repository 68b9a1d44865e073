"""Which method has what, read off the method files: a cell names the definition that provides the
part.

A part is found by the names that a file defines or assigns to. tests/test_book.py compares the
outcome with what the papers say.
"""

import ast
import re

PARTS = {
    "negatives": r"clip_loss|align_loss|nt_xent_loss|info_nce\w*|contrastive_loss",
    "momentum encoder": r"update_(target|teacher|key_encoder|momentum_encoder)|teacher_momentum",
    "predictor": r"predictor",
    "prototypes": r"prototypes|dino_loss|sinkhorn_knopp",
    "masks": r"draw_mask|masked_text",
    "text": r"encode_text",
}


def names(text):
    """{name: the definition that it is or stands in} of functions, classes, arguments and
    attributes of a file."""
    found = {}

    def visit(node, path):
        for child in ast.iter_child_nodes(node):
            below = path
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                below = [*path, child.name]
                found.setdefault(child.name, ".".join(below[:2]))
            elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
                found.setdefault(child.attr, path[0] if path else "")
            elif isinstance(child, ast.AnnAssign) and path == ["Args"]:
                found.setdefault(child.target.id, "Args")
            visit(child, below)

    visit(ast.parse(text), [])
    return found


def parts(text):
    """{part: [definitions that provide it, as anchors of the annotated source]}"""
    found, out = names(text), {}
    for part, pattern in PARTS.items():
        where = {found[name] for name in found if re.fullmatch(pattern, name)}
        out[part] = sorted(
            where - {"Args"} or where
        )  # a flag tells less than the code that it steers
    return out
