"""How the files of a layout become samples: reads them all once for an index, then one at a time.

sources.py uses it when a run reads files at all, align.py for what its filters read and leave, and
evaluation/ for its names of endings and lists. What it leaves out it counts, in `left_out`.

Only the index is held in memory, and all of an .npz, of CIFAR and of STL-10; other pictures and
captions are read when a sample is asked for.
Layouts, told apart by looking at the files (docs/data.md: how to make each):

    *.tar                             WebDataset shards of img2dataset: 0.jpg, 0.txt, 0.json, 0.cls
    *.csv *.tsv *.jsonl               image path, caption(s), label
    *.npz                             JPEG files end to end: arrays jpeg, offsets, labels
    dataset_*.json + pictures         Karpathy's splits of coco, flickr30k and flickr8k
    captions.txt + Images/            flickr8k as Kaggle has it
    annotations/captions_*2017.json   coco as published
    *.pkl + images/AA/BBB.zip         yfcc15m as SLIP's code keeps it
    raw/val.de + image_splits/        multi30k, a caption in each of four languages
    class/picture.jpg, picture.jpg    ImageFolder, or just pictures
    cifar10 cifar100 stl10 food101    the files that torchvision downloads, stl10-unlabeled too
"""

import ast
import codecs
import contextlib
import csv
import errno
import functools
import gzip
import io
import itertools
import json
import math
import os
import pickle
import re
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import torchvision
from PIL import Image
from tqdm import tqdm

from common import UserError, rank, world_size

try:
    import fcntl
except ImportError:  # Windows: processes do not wait for each other there
    fcntl = None

TABLES = (".npz", ".csv", ".tsv", ".jsonl")
IMAGE_KEYS = ("image", "filepath", "image_path", "path", "file_name", "filename", "file")  # of rows
DOWNLOADED = ("cifar-10", "stl10_binary", "food-101")  # how torchvision's own files begin
CAPTION_KEYS = ("captions", "caption", "text")
INDEX_VERSION = 5  # an index that an older version of this file wrote is made again

# Pillow reads .avif not everywhere, and the last three only with a plugin.
PICTURES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
            ".avif", ".heic", ".heif", ".jxl")  # fmt: skip


# ---------------------------------------- pictures ----------------------------------------
def ending_of(name):
    return os.path.splitext(name)[1].lower()


@functools.cache
def readable(ending):
    return ending in PICTURES and Image.registered_extensions().get(ending) in Image.OPEN


def why(name):
    """Why a file is no sample, as it stands behind a count."""
    if name.startswith("."):
        return "hidden"
    ending = ending_of(name)
    if ending in PICTURES:
        return f"{ending[1:]}: Pillow cannot read them"
    return ending[1:] or "without an ending"


def pictures(folder, left_out):
    """Paths of the pictures below folder, relative to it, each once, whatever links there are.
    Counts the other files in left_out."""

    def fail(error):  # os.walk would pass over a folder that it may not read
        raise error

    base, seen = os.path.join(os.path.realpath(folder), ""), set()
    cut = len(os.path.join(folder, ""))
    for where, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.join(os.path.realpath(where), "")
        # A link to another part of this tree, which is visited anyway, or to a folder around it
        back = os.path.islink(where) and seen and (real.startswith(base) or base.startswith(real))
        if back or real in seen:
            left_out["linked folders that are here already"] += 1
            folders.clear()
            continue
        seen.add(real)
        if {"args.json", "metrics.jsonl"} <= set(files):
            left_out["folders of runs"] += 1
            folders.clear()
            continue
        left_out["hidden"] += sum(name.startswith(".") for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and readable(ending_of(name)):
                yield os.path.join(where, name)[cut:]
            elif name not in CLASS_LISTS:
                left_out[why(name)] += 1


# ---------------------------------------- classes ----------------------------------------
CLASS_LISTS = ("classnames.txt", "LOC_synset_mapping.txt", "imagenet_class_index.json")


def class_names(path):
    """A list of class names -> the names in the order of the labels or, where they stand beside
    WordNet ids, {id: name}. Of several names for a class, the first is taken."""
    text = path.read_text(encoding="utf-8-sig").strip()
    if path.suffix != ".json":
        lines = [line.strip() for line in text.splitlines()]
        pairs = [re.fullmatch(r"(n\d{8})\s+(.+)", line) for line in lines]
        if not all(pairs):
            return lines
        return {pair[1]: pair[2].split(",")[0] for pair in pairs}
    names = {}
    # {"0": ["n01440764", "tench"]} or {"n01440764": "tench"}
    for key, value in json.loads(text).items():
        words = [key, *([value] if isinstance(value, str) else value)]
        number = next((i for i, word in enumerate(words) if re.fullmatch(r"n\d{8}", word)), None)
        if number is None:
            raise UserError(f"{path} has no WordNet id beside {words[-1]}: put the names of the "
                            "classes into a classnames.txt, one per line")
        names[words[number]] = words[number + 1].replace("_", " ")
    return names


def class_folders(names):
    """Names of class folders in the order of their labels: numbers by value, all others by name."""
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


# ---------------------------------------- multi30k ----------------------------------------
MULTI30K_PARTS = {"train": "train", "val": "val", "test": "test_2016_flickr"}


def multi30k_rows(root, split, language):
    """Multi30k (arXiv 1605.00459), task 1, as its repository has it: image_splits/PART.txt names
    the pictures, raw/PART.LANGUAGE or .gz has a caption on each line. Pictures lie in images/."""
    part = MULTI30K_PARTS[split]
    names, captions = (root / "image_splits" / f"{part}.txt", root / "raw" / f"{part}.{language}")
    if not captions.is_file():
        captions = captions.with_name(captions.name + ".gz")
    for path in (names, captions):
        if not path.is_file():
            raise UserError(f"there is no {path}, see docs/data.md for how to get multi30k there")
    names = names.read_text(encoding="utf-8").split()
    data = captions.read_bytes()
    text = (gzip.decompress(data) if captions.suffix == ".gz" else data).decode("utf-8-sig")
    lines = text.removesuffix("\n").split("\n")
    if len(names) != len(lines):
        found = f"{captions} has {len(lines)} lines for {len(names)} pictures"
        raise UserError(f"{found}: get both anew")
    for name, line in zip(names, lines):
        yield {"image": f"images/{name.split('#')[0]}", "captions": [line.strip()]}


# ---------------------------------------- bytes ----------------------------------------
@functools.lru_cache(maxsize=128)  # a Mac lets a process open 256 files
def handle(path, process):  # a forked worker opens its own: a shared one has one position
    return open(path, "rb", buffering=0)


def read_part(path, start, size):
    if not size:
        return b""  # most samples of a tar lack some of the parts
    file = handle(path, os.getpid())
    file.seek(start)
    data = file.read(size)
    if len(data) < size:
        raise ValueError(f"{path} is shorter than it was when it was indexed")
    return data


def read_file(path):
    """The bytes of a file. Reading a pipe or a device would never end."""
    name = path if path.isascii() else path.encode("utf-8", "surrogateescape")  # in any locale
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(name, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no file but a pipe or a device")
        return file.read()


# ---------------------------------------- fields ----------------------------------------
def label_number(value, classes, name):
    """A label as a number: of 3, "3", "3.0" or the name of a class; -1 for what is none of them, as
    2.7, or below 0. Raises UserError for a number beyond 64 bits, which no tensor of labels can
    hold."""
    text = "" if value is None else str(value).strip()
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer():
        return classes.index(text) if text in (classes or []) else -1
    if number >= 2**63:
        raise UserError(f"{name} has the label {text}, which is too large: fix it or leave it out")
    return max(-1, int(number))


def is_unlisted(label, classes):
    """Whether a label is a text, neither a number nor the name of a class."""
    if not isinstance(label, str) or not label.strip() or label.strip() in (classes or []):
        return False
    with contextlib.suppress(ValueError):
        float(label)
        return False
    return True


def label_of(dataset, value, folder, name):
    """label_number of a sample. A text that is the name of no class is remembered in labels_lack,
    for monitor.what_classes_lack, which reads samples before it asks."""
    number = label_number(value, dataset.classes, name)
    if number < 0 and is_unlisted(value, dataset.classes):
        names = f"list the names in {folder}/classnames.txt"
        dataset.labels_lack = f"labels such as {str(value).strip()!r} are no numbers: {names}"
    return number


def json_object(text):
    row = json.loads(text)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def captions_of(row):
    """Captions in a row of a table or in the .json of a tar's sample: of the first that has any."""
    for found in (*map(row.get, CAPTION_KEYS), [row.get("title"), row.get("description")]):
        found = found if isinstance(found, list) else [found]
        if any(isinstance(caption, str) and caption.strip() for caption in found):
            # JSON may hold half of an emoji, which cannot be written as UTF-8: it becomes "?"
            texts = [caption for caption in found if isinstance(caption, str)]
            return [text.encode(errors="replace").decode() for text in texts]
    return []


def picture_of(row):
    """The path of the picture in a row of a table; None if it names none."""
    return next((str(row[key]) for key in IMAGE_KEYS if row.get(key)), None)


LOST = "texts that lost letters"  # how an index counts them


def say_lost(name, lost):
    """Says that a text is not UTF-8, or was not before it came here: such letters are replaced."""
    if lost and rank() == 0:
        text = f"{name}: {lost:,} texts have U+FFFD in place of letters that are lost"
        print(f"{text}: save what is not UTF-8 as UTF-8", file=sys.stderr, flush=True)


def rows_again(path, key):
    """How many rows of a file of JSON lines have the picture of the row before. It compares what
    stands behind the key, as reading the JSON of all rows would take several times as long."""
    picture_in = re.compile(rf'"{key}"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*")'.encode()).search
    again, before = 0, None
    with open(path, "rb") as lines:
        for line in lines:
            if line.isspace():
                continue
            found = picture_in(line)
            picture = found[1] if found else None
            again += picture is not None and picture == before
            before = picture
    return again


def say_again(name, again, total):
    """Says that rows of one picture follow each other, which CSV and TSV would make one sample."""
    if again:
        text = f"{name}: {again:,} of {total:,} rows have the picture of the row before"
        advice = "each stays a sample of its own; give one row per picture, with a list of captions"
        print(f"{text}: {advice}", file=sys.stderr, flush=True)


# ---------------------------------------- tables ----------------------------------------
def table_rows(path):
    """.csv and .tsv with a header. Rows of one picture that follow each other become one sample.
    Read strictly, as a stray quote would swallow the rows behind it."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        if file.buffer.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{path} is UTF-16, as Excel's Unicode text: save it as UTF-8")
        rows = strict_rows(file, delimiter)
        header = [name.strip() for name in next(rows, [])]
        if not header:
            raise UserError(f"{path} is empty: its first line names the columns (docs/data.md)")
        known = (*IMAGE_KEYS, *CAPTION_KEYS, "title", "description", "label")
        header = [name.lower() if name.lower() in known else name for name in header]
        twice = [name for name, count in Counter(header).items() if name and count > 1]
        if twice:
            raise UserError(f"{path} has two columns {twice[0]}: rename one of them")
        key = next((key for key in IMAGE_KEYS if key in header), None)
        if key is None and len(header) == 1:
            advice = "separate columns with " + ("tabs" if delimiter == "\t" else "commas")
            raise UserError(f"{path} has the one column {header[0]}: {advice}")
        if key is None:
            raise UserError(f"the columns of {path} are {header}, none of {', '.join(IMAGE_KEYS)}")
        table = (dict(zip(header, fields)) for fields in rows)
        for image, same in itertools.groupby(table, lambda row: row[key]):
            same = list(same)
            captions = [c for row in same for cell in captions_of(row) for c in listed(cell)]
            label = same[0].get("label")
            label_number(label, None, f"{path}: {image}")  # refuses it before a run begins
            yield {"image": image, "captions": captions, "label": label}


def listed(cell):
    """The captions in a cell of a table: itself, or those of a list as JSON or Python writes it."""
    if not re.fullmatch(r"""\s*\[\s*['"].*['"]\s*\]\s*""", cell, re.DOTALL):
        return [cell]
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError):
            found = read(cell.strip())
            if len(found) == 1 and re.search(r"""['"]\s+['"]""", cell):  # Python would join them
                raise UserError(f"no commas are between the captions {cell[:60]}: use a JSON list")
            return [c for c in found if isinstance(c, str)]
    return [cell]


def strict_rows(file, delimiter):
    """The rows of a table, lists of one length. ValueError names a line that is not so."""
    table = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
    advice = "put a text with a comma or a quote in quotes, and write the quote in it twice"
    width = 0
    try:
        for fields in table:
            width = width or len(fields)
            if fields and len(fields) != width:
                found = f"line {table.line_num} has {len(fields)} fields, the header {width}"
                raise ValueError(f"{found}: {advice}")
            if any(holds_rows(field, delimiter) for field in fields if "\n" in field):
                found = f"the quote that ends in line {table.line_num} begins in a row before it"
                raise ValueError(f"{found}: {advice}")
            if fields:
                yield fields
    except csv.Error as error:
        if "field limit" in str(error):
            advice = "shorten that text, or close the quote that it begins with"
        raise ValueError(f"line {table.line_num}: {error}: {advice}") from error


def holds_rows(text, delimiter):
    """Whether one of the lines of a text that was read as one field names a picture of its own."""
    pieces = [line.split(delimiter) for line in text.split("\n")[1:]]
    names = [piece.strip('" \r').lower() for line in pieces if len(line) > 1 for piece in line]
    return any(name.endswith(PICTURES) for name in names)


def array_rows(path):
    """A JSON array of rows."""
    for i, row in enumerate(json.loads(path.read_bytes())):
        if not isinstance(row, dict):
            raise ValueError(f"element {i} of the array is not a JSON object")
        yield row


def karpathy_rows(path, split):
    """dataset_{coco,flickr8k,flickr30k}.json."""
    for image in json.loads(path.read_bytes())["images"]:
        part = image["split"].replace("restval", "train")
        if part not in ("train", "val", "test"):
            raise ValueError(f"the split {part} is none of train, restval, val and test")
        if part == split:
            name = os.path.join(image.get("filepath", ""), image["filename"])
            yield {"image": name, "captions": [sentence["raw"] for sentence in image["sentences"]]}


def open_karpathy(path, split, Sample):
    """The pictures are beside the .json or in a folder there, where most of the first are found."""
    dataset = Rows(path.parent, index_rows(path, karpathy_rows, split), None, Sample)
    names = [dataset.row(i)["image"] for i in range(min(100, len(dataset)))]
    places = [path.parent, *sorted(place for place in path.parent.iterdir() if place.is_dir())]
    dataset.root = max(places, key=lambda place: sum((place / name).exists() for name in names))
    return dataset


def coco_rows(path):
    """captions_{train,val}2017.json."""
    tables, captions = json.loads(path.read_bytes()), {}
    for row in tables["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    for image in tables["images"]:
        yield {"image": image["file_name"], "captions": captions.pop(image["id"], [])}
    if captions:
        raise ValueError(f"captions of image {min(captions)}, which is not among its images")


def slip_rows(path):
    """Pickled list of (index, title, description). An empty one of the two is kept, as SLIP's code
    does."""
    with open(path, "rb") as file:
        for index, title, description in _Plain(file).load():
            digits = f"{int(index):08d}"
            name = f"{digits[:2]}/{digits[2:5]}.zip/{digits[5:]}.jpg"
            yield {"image": name, "captions": [title or "", description or ""]}


def text_rows(path):
    """[(line, key, text)] of a .tsv with lines of key and text, without images; None of another
    file."""
    if not path.endswith(".tsv"):
        return None
    rows, others = [], 0
    try:
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            columns = file.readline(10_000).strip().split("\t")
            if set(columns) & set(IMAGE_KEYS):
                return None  # a table of images
            file.seek(0)
            for i, line in enumerate(file):
                key, tab, text = line.rstrip("\r\n").partition("\t")
                if tab:
                    rows.append((i, key, text))
                others += not tab and not line.isspace()
    except OSError:
        return None
    if others and rank() == 0:
        print(f"{path}: {others:,} lines without a tab are left out", file=sys.stderr, flush=True)
    say_lost(path, sum("\ufffd" in text for _, _, text in rows))
    return rows


class _Plain(pickle.Unpickler):
    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name == "dtype":
            return np.dtype
        if module.split(".")[0] == "numpy" and name == "scalar":
            return lambda dtype, data: np.frombuffer(data, dtype)[0]
        raise pickle.UnpicklingError(f"it holds {module}.{name}, not only numbers and texts")


# ---------------------------------------- archives ----------------------------------------
def index_archive(shard, start, samples, left_out):
    """Adds the samples of the archive that starts there -> the start of the next one or None."""
    kinds = {".txt": 1, ".json": 2, ".cls": 3}
    shard.seek(start)
    with tarfile.open(fileobj=shard, mode="r:") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            key, _, ending = name.partition(".")  # WebDataset: the first dot ends a sample's name
            if not member.isfile():
                left_out["links: tar with -h --hard-dereference"] += not member.isdir()
                continue
            kind = 0 if readable(f".{ending.lower()}") else kinds.get(f".{ending.lower()}")
            if kind is None or not key:
                left_out["with a second dot" if key and "." in ending else why(name)] += 1
                continue
            row = samples.setdefault((start, folder, key), np.zeros((4, 2), np.uint32))
            left_out["of a name that comes again"] += bool(row[kind, 0])
            row[kind] = member.offset_data // 512, member.size
            if kind == 1:
                text = tar.extractfile(member).read().decode(errors="replace")
                left_out[LOST] += "\ufffd" in text
    shard.seek(tar.offset)
    if shard.read(512) != bytes(512):
        raise tarfile.ReadError("it is cut off")
    position = shard.tell()
    while block := shard.read(2**20):
        if rest := block.lstrip(b"\0"):
            return position + (len(block) - len(rest)) // 512 * 512
        position += len(block)
    return None


@functools.lru_cache(maxsize=8)
def zip_of(path, process):  # its directory is parsed once
    return zipfile.ZipFile(path)


def read_zip(path, name):
    """A member of a zip. Reading its entry takes 0.1 ms where it is near the end of the directory;
    zipfile parses all of it, in 2.3 ms for 1,000 members."""
    size = os.path.getsize(path)
    tail = read_part(path, max(0, size - 2**17), min(size, 2**17))  # the directory is at the end
    entry = tail[max(0, tail.rfind(name.encode()) - 46) :][:46]
    try:
        if len(entry) == 46 and entry[:4] == b"PK\1\2":
            method, stored, length, start = struct.unpack("<10xH8xI4xH12xI", entry)
            small = max(stored, start) < 2**32 - 1  # else zip64 has them in another place
            if length == len(name.encode()) and method in (0, 8) and small:
                start += 30 + sum(struct.unpack("<HH", read_part(path, start + 26, 4)))
                data = read_part(path, start, stored)
                return zlib.decompress(data, -15) if method else data
        return zip_of(path, os.getpid()).read(name)
    except Exception as error:  # zipfile raises anything on a damaged file
        raise ValueError(f"{path} is damaged or does not hold {name}: {error}") from error


# ---------------------------------------- indices ----------------------------------------
@contextlib.contextmanager
def locked(path):
    """Waits until no other process is here with this path, if files can be locked (some NFS cannot
    do that)."""
    if fcntl is None:
        yield
        return
    with contextlib.ExitStack() as opened:
        file = os.open(path, os.O_RDONLY)
        opened.callback(os.close, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # NFS locks only what is open for writing
            with contextlib.suppress(OSError):
                file = os.open(path, os.O_RDWR)
                opened.callback(os.close, file)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def index(path, ending, write):
    """Path of the index of `path`, which write(file, stamp) fills once: beside `path`, or in
    ~/.cache if that may not be written or is a file of someone else's. The stamp in it has size and
    time of `path`; when these change it is made again."""
    path, facts = os.path.abspath(path), os.stat(path)
    stamp = [INDEX_VERSION, facts.st_size, facts.st_mtime_ns]
    cache = os.path.expanduser("~/.cache/contrastive/")
    own = f"{zlib.crc32(os.fsencode(path)):08x}_"  # or /a-1.csv and /a_1.csv would have one name
    places = [path + ending, cache + own + re.sub(r"\W", "_", path)[-200:] + ending]
    problem = ""
    with locked(path):
        stamps = {place: stamp_of(place) for place in places}
        for place in places:
            if stamps[place] == stamp:
                return Path(place)
        for place in places:
            if stamps[place] is None and os.path.exists(place):
                continue  # this is no index
            draft = Path(f"{place}.{os.urandom(6).hex()}")
            try:
                draft.parent.mkdir(parents=True, exist_ok=True)
                if not draft.parent.stat().st_mode & 0o222:
                    continue  # marked read-only: root, who could write there, leaves it alone too
                file = open(draft, "wb")
            except OSError as error:
                problem = f" ({error})"
                continue
            try:
                with file:
                    write(file, stamp)
                os.replace(draft, place)  # processes that do not wait see the whole index or none
                return Path(place)
            except UserError:
                raise
            except Exception as error:
                full = errno.ENOSPC, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", None)
                if getattr(error, "errno", 0) not in full:
                    raise UserError(f"{path} cannot be read: {error}") from error
                problem = f" ({error})"  # the disk is full, or a quota
            finally:
                draft.unlink(missing_ok=True)
    text = f"the index of {path} can be written neither beside it nor in ~/.cache{problem}"
    raise UserError(f"{text}: allow one")


def stamp_of(path):
    """The stamp of an index, [] of one that is cut off, None of anything else."""
    with contextlib.suppress(Exception), open(path, "rb") as file:
        start = file.read(2)
        if not start or (start == b"PK" and not zipfile.is_zipfile(file)):
            return []  # an .npz has its directory at its end
        file.seek(0)
        if path.endswith(".npz"):
            return np.load(file)["stamp"].tolist()
        found = json.loads(file.readline())
        if isinstance(found, list) and len(found) == 3:
            file.seek(-len(END), os.SEEK_END)
            return found if file.read() == END else []
    return None


END = b'["end"]\n'  # the last line of an index of rows: one that was copied in part lacks it


def index_rows(path, make, *args):
    """Index of JSON lines: the stamp, then the rows that make(path, *args) yields, then END."""

    def write(file, stamp):
        rows = itertools.chain([stamp], make(path, *args))
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        file.write(END)

    return index(path, "".join(f".{a}" for a in args) + ".idx", write)


def index_tar(path):
    """Index with "members" (samples, 4, 2): where, in blocks of 512 bytes, and how long the
    picture, .txt, .json and .cls of a sample are, 0 where there is none; and "left_out", a JSON
    object."""

    def write(file, stamp):
        samples, left_out, start = {}, Counter(), 0
        with open(path, "rb") as shard:
            while start is not None:  # cat joins archives to one file
                start = index_archive(shard, start, samples, left_out)
        members = [row for row in samples.values() if row[0, 0]]
        left_out["without a picture"] = len(samples) - len(members)
        members = np.array(members, np.uint32).reshape(-1, 4, 2)
        np.savez(file, stamp=stamp, members=members, left_out=json.dumps(+left_out))

    return index(path, ".idx.npz", write)


# ---------------------------------------- arrays ----------------------------------------
class Tars:
    """WebDataset shards, read at random."""

    def __init__(self, shards, classes, left_out, Sample):
        self.Sample = Sample  # (image, captions, label, key), see sources.py
        # every process begins with another shard
        turns = sorted(range(len(shards)), key=lambda s: (s - rank()) % world_size())
        quiet = rank() > 0 or None
        bar = tqdm(turns, f"index of {shards[0].parent}", leave=False, delay=2, disable=quiet)
        indices = {s: dict(np.load(index_tar(shards[s]))) for s in bar}
        self.shards, self.classes, self.left_out = shards, classes, Counter(left_out)
        self.members = [indices[s]["members"] for s in range(len(shards))]
        for index in indices.values():
            self.left_out += Counter(json.loads(str(index["left_out"])))
        say_lost(shards[0].parent, self.left_out.pop(LOST, 0))
        self.ends = np.cumsum([len(m) for m in self.members])
        self.captioned = any(m[:, 1:3].any() for m in self.members)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i):
        shard = int(np.searchsorted(self.ends, i, side="right"))
        path, rows = self.shards[shard], self.members[shard]
        picture, *others = rows[i - self.ends[shard]].tolist()
        start = 512 * picture[0]
        data = read_part(path, start - 512, 512 + picture[1])  # the block before holds its name
        parts = [read_part(path, 512 * block, size) for block, size in others]
        text, meta, label = parts  # b"" for a missing one
        name = f"{path.name}:" + data[:100].partition(b"\0")[0].decode(errors="replace")
        captions = captions_of(json_object(meta)) if meta else []
        if text and not any(caption.strip() for caption in captions):
            captions = [text.decode("utf-8-sig", "replace").strip()]
        label = label_of(self, label.decode(errors="replace"), path.parent, name)
        return self.Sample(data[512:], captions, label, name)


class Npz:
    captioned = False

    def __init__(self, path, classes, Sample):
        self.Sample = Sample  # (image, captions, label, key), see sources.py
        try:
            with np.load(path) as arrays:
                self.jpeg, self.offsets = arrays["jpeg"], arrays["offsets"]
                self.labels = arrays["labels"]
            if self.labels.dtype.kind == "S":  # names as bytes
                self.labels = np.char.decode(self.labels, "utf-8")
            good = len(self.offsets) == len(self.labels) + 1 and (np.diff(self.offsets) >= 0).all()
            good = good and self.jpeg.dtype == np.uint8 and self.offsets[-1] <= len(self.jpeg)
        except Exception:  # numpy raises anything on a damaged file
            good = False
        if not good:
            labels = "labels (n, numbers or texts, no objects)"
            raise UserError(f"{path} must hold jpeg (uint8), offsets (n + 1, rising), {labels}")
        numbers = self.labels if self.labels.dtype.kind in "iuf" else np.zeros(0)  # or names
        if classes and (largest := numbers.max(initial=0)) >= len(classes):
            lines = f"classnames.txt {len(classes)} lines"
            raise UserError(f"{path} has label {largest}, but {lines}")
        self.path, self.classes = path, classes

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        data = self.jpeg[self.offsets[i] : self.offsets[i + 1]].tobytes()
        name = f"{self.path.name}[{i}]"
        label = label_of(self, self.labels[i], self.path.parent, name)
        return self.Sample(data, [], label, name)


# ---------------------------------------- torchvision ----------------------------------------
class Torchvision:
    """cifar10, cifar100, stl10, food101; downloaded when missing, by one process while others wait.
    kind: torchvision's class, perhaps with what is the train split ("STL10 train+unlabeled")."""

    captioned = False

    def __init__(self, root, kind, split, Sample):
        self.Sample = Sample  # (image, captions, label, key), see sources.py
        kind, _, train = kind.partition(" ")
        part = (train or "train") if split == "train" else "test"
        part = {"train": part == "train"} if "cifar" in root.name else {"split": part}
        make = functools.partial(getattr(torchvision.datasets, kind), root, **part)
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock = root / ".lock"  # NFS locks no folders
            with contextlib.suppress(OSError):
                lock.touch()
            with locked(lock if os.access(lock, os.R_OK) else root):
                self.data = make(download=True)  # what is there is only checked
        except (OSError, RuntimeError) as error:
            missing = f"{root} does not hold {root.name}, nor can it be downloaded"
            raise UserError(f"{missing}: {error}") from error
        self.classes = [name.replace("_", " ") for name in self.data.classes]

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        image, label = self.data[i]
        return self.Sample(image, [], int(label), f"sample {i}")


# ---------------------------------------- folders ----------------------------------------
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError,
              csv.Error, struct.error, zlib.error, pickle.UnpicklingError, tarfile.TarError,
              zipfile.BadZipFile)  # fmt: skip


@contextlib.contextmanager
def refuse_unreadable(root):
    """Around the opening of a dataset: raises UserError for files that are damaged."""
    try:
        yield
    except UNREADABLE as error:
        raise UserError(f"{root} cannot be read: {error}") from error


def open_root(root, split, words, kind, whole, Sample):
    """Tells which layout a folder (or a single file) has, and which of its files are the split.
    words: names of the split, the first that is there counts; kind: torchvision's class of this
    set; whole: the split may be all that is there."""
    handle.cache_clear()  # files may have been replaced since they were opened
    zip_of.cache_clear()
    if not root.is_dir() and root.exists():
        if not root.is_file() or ending_of(root.name) not in (".tar", *TABLES):
            kinds = f"{' '.join(TABLES)} .tar"
            what = f"no folder and none of the files that are read ({kinds})"
            raise UserError(f"{root} is {what}: give one")
        if split == "train":
            return open_files(root.parent, [root.name], root.parent, Sample)
    names, parts = visible(root) if root.is_dir() else [], {}
    word = r"(train|training|val|validation|valid|test|testing)(?![a-z])"
    for name in names:  # train/, train.csv, val-0001.tar ...
        if match := re.fullmatch(word + r"(.*\.(tar|npz|csv|tsv|jsonl))?", name, re.I):
            parts.setdefault(match[1].lower(), []).append(name)
    for start in ("train", "val", "test"):
        same = [word for word in parts if word.startswith(start)]
        folders = [name for word in same for name in parts[word] if "." not in name]
        if len(folders) > 1:
            found = " and ".join(folders)
            raise UserError(f"{root} has the folders {found} for one split: keep one")
        if len(same) > 1:
            found = " and ".join(parts[word][0] for word in same)
            raise UserError(f"{root} has {found} for one split: use one word for it")
    downloaded = any(n.startswith(DOWNLOADED) for n in names)
    endings = (".tar", *TABLES, *PICTURES)
    other = any((root / n).is_dir() or ending_of(n) in endings for n in names)
    if kind and not parts and (downloaded or not other):
        return Torchvision(root, kind, split, Sample)
    if karpathy := [n for n in names if re.fullmatch(r"dataset_(?!infos?\.|dict\.)\w+\.json", n)]:
        own = f"dataset_{root.absolute().name}.json"
        if len(karpathy) > 1 and own not in karpathy:
            raise UserError(f"{root} has {' and '.join(karpathy)}: keep one")
        return open_karpathy(root / (own if own in karpathy else karpathy[0]), split, Sample)
    if any(root.glob("annotations/captions_*2017.json")):
        part = "train2017" if split == "train" else "val2017"
        table = root / f"annotations/captions_{part}.json"
        rows = index_rows(table, coco_rows)
        return Rows(root / part, rows, None, Sample)
    pickles = [n for n in names if n.endswith((".pkl", ".pickle"))]
    if pickles and "images" in names and split == "train":
        rows = index_rows(root / pickles[0], slip_rows)
        return Rows(root / "images", rows, None, Sample)
    folders = [n for n in names if n not in sum(parts.values(), []) and (root / n).is_dir()]
    if len(folders) > 1 and not parts and all(re.match("train|val|test", n) for n in folders):
        raise UserError(f"{root} has the folders {', '.join(folders)}: rename splits to train, val "
                        "and test, and put classes below a folder train")
    if not parts and whole:
        if {"captions.txt", "Images"} <= set(names):
            rows = index_rows(root / "captions.txt", table_rows)
            return Rows(root / "Images", rows, None, Sample)
        return open_files(root, names, root, Sample)
    word = next((word for word in words if word in parts), None)
    if word is None:
        places = f"{split}/, {split}*.tar, {split}.csv ..."
        raise UserError(f"{root} has no {split} split, no folder {places}")
    if not word.startswith(split) and rank() == 0:
        print(f"{root}: no {split} split, its {word} is taken", file=sys.stderr, flush=True)
    part = parts[word]
    if files := [n for n in part if "." in n]:
        return open_files(root, files, root, Sample)
    dataset = open_files(root / part[0], visible(root / part[0]), root, Sample)
    others = set(names).difference(*parts.values(), folders, CLASS_LISTS)
    beside = Counter({f"folders beside {part[0]}": len(folders)})
    beside[f"files beside {part[0]}"] = len(others)
    dataset.left_out = beside + getattr(dataset, "left_out", Counter())
    return dataset


def visible(folder):
    indices = (".idx", ".idx.npz")
    return sorted(n for n in os.listdir(folder) if n[0] != "." and not n.endswith(indices))


def open_files(folder, names, root, Sample):
    """The dataset of these files of a folder, or of all pictures below it; class lists may be in
    root."""
    lists = [path / name for path in (folder, root) for name in CLASS_LISTS]
    lists = [path for path in lists if path.exists()]
    named = class_names(lists[0]) if lists else None  # a list or {WordNet id: name}
    classes = [named[i] for i in sorted(named)] if isinstance(named, dict) else named
    files = [n for n in names if ending_of(n) in (".tar", *TABLES) and (folder / n).is_file()]
    if tars := [folder / n for n in files if ending_of(n) == ".tar"]:
        others = {*TABLES, *PICTURES, ".gz", ".tgz"}
        beside = Counter(ending_of(n)[1:] for n in names if ending_of(n) in others)
        beside["folders beside the tars"] = sum((folder / n).is_dir() for n in names)
        return Tars(tars, classes, beside, Sample)
    if len(files) > 1:
        raise UserError(f"give the path of one table of {folder}: {', '.join(files)}")
    for table in (folder / name for name in files):
        if ending_of(table.name) == ".npz":
            return Npz(table, classes, Sample)
        if ending_of(table.name) != ".jsonl":
            return Rows(folder, index_rows(table, table_rows), classes, Sample)
        with open(table, "rb") as file:
            is_array = file.read(100).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"[")
        rows = index_rows(table, array_rows) if is_array else table
        return Rows(folder, rows, classes, Sample)
    left_out = Counter()
    paths = sorted(pictures(folder, left_out), key=lambda path: path.split(os.sep))
    tops = class_folders({path.split(os.sep)[0] for path in paths})
    loose = [path for path in paths if os.sep not in path]
    labelled = len(tops) > 1 and not loose  # one folder per class
    if loose and len(tops) > len(loose) + 1 and rank() == 0:
        text = f"no labels, because of images beside the class folders: {len(loose):,} ({loose[0]})"
        print(f"{folder}: {text}", file=sys.stderr, flush=True)
    if labelled and tops != sorted(tops) and rank() == 0:
        text = "class folders are numbers, and labels follow their values: 2 comes before 10"
        print(f"{folder}: {text}", file=sys.stderr, flush=True)
    if isinstance(named, dict):
        classes = [named.get(top, top) for top in tops]
    if labelled and len(classes or tops) != len(tops):
        count = f"{lists[0]} names {len(classes)} classes"
        raise UserError(f"{count}, but {folder} has {len(tops)} folders")
    tops = {top: i for i, top in enumerate(tops)}
    labels = (tops[path.split(os.sep)[0]] if labelled else -1 for path in paths)
    rows = ({"image": path, "label": label} for path, label in zip(paths, labels))
    dataset = Rows(folder, rows, (classes or list(tops)) if labelled else None, Sample)
    dataset.folders = list(tops)  # WordNet ids, where `classes` has their names
    dataset.left_out = left_out
    return dataset


class Rows:
    """Rows {"image": path below root, "captions": [...], "label": int}: the path of a file of JSON
    lines, of which only the line starts are held in memory, or an iterable of dicts."""

    captioned = False

    def __init__(self, root, rows, classes, Sample):
        self.Sample = Sample  # (image, captions, label, key), see sources.py
        self.root, self.rows, self.classes, position = root, rows, classes, 0
        if not isinstance(rows, Path):
            self.rows = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        starts, lost, indexed = array("q"), 0, getattr(rows, "suffix", "") == ".idx"
        with open(rows, "rb") if isinstance(rows, Path) else io.BytesIO(self.rows) as lines:
            for line in lines:
                frame = indexed and line[:1] == b"["  # the stamp and the end of an index
                if not (frame or line.isspace()):
                    starts.append(position)
                lost += b"\\ufffd" in line  # an index is ASCII
                position += len(line)
        self.starts = np.append(starts, position)  # a list would take 40 bytes a row
        keys = Counter()
        for i in np.linspace(0, len(self) - 1, min(100, len(self)), dtype=int):
            with contextlib.suppress(ValueError):
                row = self.row(i)
                self.captioned = self.captioned or bool(captions_of(row))
                keys.update([key for key in IMAGE_KEYS if row.get(key)][:1])
        if isinstance(rows, Path):
            say_lost(rows.name.removesuffix(".idx"), lost)
            if self.captioned and keys and rank() == 0:
                key = keys.most_common(1)[0][0]
                say_again(rows.name.removesuffix(".idx"), rows_again(rows, key), len(self))

    def __len__(self):
        return len(self.starts) - 1

    def row(self, i):
        start, end = int(self.starts[i]), int(self.starts[i + 1])
        if isinstance(self.rows, bytes):
            text = self.rows[start:end]
        else:
            text = read_part(self.rows, start, end - start)
        return json_object(text.partition(b"\n")[0])

    def __getitem__(self, i):
        row = self.row(i)
        name = picture_of(row)
        if name is None:
            raise ValueError(f"row {i} names no picture ({' or '.join(IMAGE_KEYS)})")
        path = os.path.join(self.root, name)
        archive, zipped, member = name.partition(".zip/")
        archive = os.path.join(self.root, archive + ".zip")
        try:
            if zipped and not os.path.isdir(archive):
                image = read_zip(archive, member)
            else:
                image = read_file(path)
        except FileNotFoundError as error:
            if isinstance(self.rows, bytes):  # its path is no table's
                raise
            begin = f"paths in its table are relative to {self.root}"
            raise FileNotFoundError(f"there is no {path}, {begin} (docs/data.md)") from error
        label = label_of(self, row.get("label"), self.root, path)
        return self.Sample(image, captions_of(row), label, path)


# ---------------------------------------- subsets ----------------------------------------
def refuse_unwritable(path):
    """Raises UserError for a file that is there already or that could not be written. Makes no
    folder, because nothing is to be left of work that fails."""
    if path.exists():
        raise UserError(f"{path} is there already: remove it, or choose another --output-dir")
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot hold {path.name}: choose another --output-dir")


def kept_row(line, number):
    """A line of a kept.jsonl as a dict. ValueError for one that --filter-only would not write."""
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        row = json.loads(line)
        index, key, captions = row["index"], row["key"], row["captions"]
        texts = isinstance(captions, list) and all(isinstance(text, str) for text in captions)
        if texts and isinstance(key, str) and isinstance(index, int) and 0 <= index < 2**63:
            return row
    raise ValueError(f"line {number} lacks an index from 0 on, a key or a list of captions")


class Kept:
    """The samples of a dataset that a kept.jsonl names, with the captions that it keeps."""

    def __init__(self, dataset, path):
        indices = array("q")
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.isspace():
                        indices.append(kept_row(line, number)["index"])
            if not indices:
                raise ValueError("it is empty")
            self.lines = Rows(None, Path(path), None, None)  # of which each is read when needed
        except (OSError, ValueError) as error:
            raise UserError(f"--keep {path} cannot be read: {error}, see --filter-only") from error
        try:
            for i in (0, len(indices) - 1, int(np.argmax(indices))):
                row = self.lines.row(i)
                there = Path(dataset[row["index"]].key).name
                if there != Path(row["key"]).name:
                    raise ValueError(f"sample {row['index']} is {there}, not {row['key']}")
        except (OSError, ValueError, LookupError) as error:
            reason = f"names no picture of {dataset.name} ({error}), see --filter-only"
            raise UserError(f"--keep {path} {reason}") from error
        self.dataset = dataset
        self.name = dataset.name
        self.classes = dataset.classes
        self.captioned = True

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, i):
        row = self.lines.row(i)
        sample = self.dataset[row["index"]]
        if Path(sample.key).name != Path(row["key"]).name:
            raise ValueError(f"--keep has the captions of {row['key']} for {sample.key}")
        return sample._replace(captions=row["captions"])
