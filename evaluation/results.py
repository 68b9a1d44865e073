"""What evaluate.py leaves behind: a table on the console, lines in results.jsonl, pictures."""

import contextlib
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import torch
import torchvision
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common import UserError, rank, world_size


def table(rows: dict[str, dict]) -> str:
    """{row: {column: number}} -> aligned text."""
    header = ["", *next(iter(rows.values()))]
    short = {"image_to_text_recall": "i2t", "text_to_image_recall": "t2i"}
    for long, abbreviation in short.items():
        header = [column.replace(long, abbreviation) for column in header]
    cells = [header]
    for name, row in rows.items():
        cells.append([name, *map(shown, row.values())])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for name, *numbers in cells:
        padded = [number.rjust(width) for number, width in zip(numbers, widths[1:])]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join(lines)


def shown(number):
    """Percent with two decimals; three digits of a learning rate or C that these would hide; a
    count as it is."""
    if isinstance(number, int):
        return f"{number:,}"
    return f"{number:.3g}" if 0 < abs(number) < 0.1 else f"{number:.2f}"


def environment(device) -> dict:
    """Which code ran on what. "commit" is git's, with -dirty if files are changed, and "" without
    git."""
    root, commit = Path(__file__).parent.parent, ""
    with contextlib.suppress(OSError):
        git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    hardware = f"{os.cpu_count()} CPU cores"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    versions = {m.__name__: m.__version__ for m in (torch, torchvision)}
    return {"commit": commit, "hardware": hardware, "processes": world_size(), "versions": versions}


def names_of(paths):
    """A name for each checkpoint of a command, different from the others': that of its run
    directory, with the step in a checkpoint_STEP.pt, or of its file, with its folder where there
    are several. Nothing of a directory's name is cut off at a dot."""
    names = []
    for path in map(Path, map(os.path.abspath, paths)):
        name, step = folder_of(path).name, re.fullmatch(r"checkpoint_\d+", path.stem)
        if not (path.is_dir() or path.name == "checkpoint.pt"):
            name = f"{name}_{path.stem}" if step or len(paths) > 1 else path.stem
        number = 2
        plain = name
        while name in names:
            name, number = f"{plain}_{number}", number + 1
        names.append(name)
    return names


def slug(words):
    """Texts as a part of a file's name: their letters and digits. Where more than 40 of them, or
    signs beyond ASCII, as emoji, are left out, a checksum stands for these."""
    whole = " ".join(words)
    text = re.sub(r"\W+", "-", whole).strip("-")
    if len(text) <= 40 and not re.search(r"[^\w\s!-~]", whole):
        return text
    return f"{text[:40]}-{zlib.crc32(whole.encode(errors='replace')):08x}"


def check_folder(folder):
    """Makes a folder for what a command will write. Raises UserError where that cannot be done."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}), use another --out") from error


MARK = "evaluate.py of a collection of contrastive methods"  # stands in each PNG


def drawn_by(path):
    """What a PNG says about the software that wrote it; None of another file."""
    with contextlib.suppress(OSError), Image.open(path) as picture:
        return picture.info.get("Software")


def save_picture(picture, path, protocol, kind, args, own_name):
    """Writes a PNG beside the checkpoint or into --out. It is named after the protocol, the data
    and the texts. own_name: what tells it in --out from the pictures of other checkpoints. Beside
    the checkpoint it is named after its file, unless that is the one of a run."""
    folder = Path(args.out) if args.out else folder_of(path)
    data = Path(os.path.abspath(args.data))
    words = [protocol, data.name if data.is_dir() else data.stem]
    if args.out:
        words.insert(0, own_name)
    elif not (path.is_dir() or path.name == "checkpoint.pt"):
        words.insert(0, path.stem)
    if texts := [*args.text, *args.plus, *(f"minus {word}" for word in args.minus)]:
        words.append(slug(texts))
    if kind != "metrics":
        words.append("random")
    file = folder / ("_".join(words) + ".png")
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if file.exists() and drawn_by(file) != MARK:
                raise UserError(f"{file} is no picture of this script: use another --out")
            mark = PngInfo()
            mark.add_text("Software", MARK)
            picture.save(file, pnginfo=mark)
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error}), use another --out") from error
        print(file, file=sys.stderr if args.json else sys.stdout)


def save_result(result, path, args):
    """Appends a line to results.jsonl beside the checkpoint."""
    line = json.dumps(result)
    if args.json:
        print(line, flush=True)
    try:
        with open(folder_of(path) / "results.jsonl", "ab+") as file:
            file.seek(max(0, file.tell() - 1))
            if file.read() not in (b"", b"\n"):  # a kill cut the last line off
                file.write(b"\n")
            file.write(line.encode() + b"\n")
    except OSError as error:
        print(f"not recorded: {error}", file=sys.stderr)


def folder_of(path):
    return path if path.is_dir() else path.parent


def export_folder(path, to):
    """Where a checkpoint goes without --out: one folder for each file of weights."""
    plain = path.is_dir() or path.name == "checkpoint.pt"
    return folder_of(path) / (f"export_{to}" if plain else f"export_{to}_{path.stem}")
