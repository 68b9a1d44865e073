"""What evaluate.py leaves behind: a table on the console, lines in results.jsonl, pictures."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torchvision

from common import UserError, rank, world_size


def table(rows: dict[str, dict]) -> str:
    """{row: {column: number}} -> aligned text."""
    header = ["", *next(iter(rows.values()))]
    short = {"image_to_text_recall": "i2t", "text_to_image_recall": "t2i"}
    for long, abbreviation in short.items():
        header = [column.replace(long, abbreviation) for column in header]
    cells = [header]
    for name, row in rows.items():
        cells.append([name, *(f"{number:.2f}" for number in row.values())])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for name, *numbers in cells:
        padded = [number.rjust(width) for number, width in zip(numbers, widths[1:])]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    return "\n".join(lines)


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


def save_picture(picture, path, protocol, kind, args):
    """Writes a PNG beside the checkpoint or into --out. It is named after the protocol and the data
    and, unless the checkpoint is that of a run, after its file."""
    folder = Path(args.out) if args.out else folder_of(path)
    words = [protocol, Path(args.data).stem]
    if not (path.is_dir() or path.name == "checkpoint.pt"):
        words.insert(0, path.stem)
    if kind != "metrics":
        words.append("random")
    file = folder / ("_".join(words) + ".png")
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(file)
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error}), use another --out") from error
        print(file)


def save_result(result, path, args):
    """Appends a line to results.jsonl beside the checkpoint."""
    line = json.dumps(result)
    if args.json:
        print(line, flush=True)
    try:
        with open(folder_of(path) / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        print(f"not recorded: {error}", file=sys.stderr)


def folder_of(path):
    return path if path.is_dir() else path.parent
