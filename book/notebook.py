"""A notebook as a page: its text and code in Markdown, its printed lines and pictures below
them."""

import base64
import json
import re


def text_of(value):
    return "".join(value) if isinstance(value, list) else value


def page(path, picture):
    """The page in Markdown. picture(name, bytes) stores a picture and gives the path to link it
    by."""
    out, about = "", ""  # about: the title above
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        text = text_of(cell["source"])
        if cell["cell_type"] == "markdown":
            out += text + "\n\n"
            title = re.findall(r"^#+ (.*)", text, re.M)
            about = title[-1] if title else about
            continue
        out += f"```python\n{text}\n```\n\n"
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{number}.png"
                target = picture(name, base64.b64decode(text_of(data["image/png"])))
                out += f"![{about}: output of the code above]({target})\n\n"
            elif printed := text_of(output.get("text", data.get("text/plain", ""))):
                out += f"```text\n{printed.rstrip()}\n```\n\n"
    return out
