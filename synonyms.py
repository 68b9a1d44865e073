"""Synonyms of English words, from a file or from WordNet, for the captions of declip.py."""

import json
import re
import zlib
from pathlib import Path

import torch.distributed as dist

from common import UserError, world_size

# Words that WordNet knows as something else ("in": inch)
STOP_WORDS = """a an the in on at by to of off up out over is are was be am as it its he his she who
have has no not so or and but for from with do does can will more most some than then"""


def open_synonyms(path=""):
    """-> {word in lower case: list of its synonyms}: those of a file with a line
    "word, synonym, ..." for each word, else WordNet's; None where WordNet is not installed. Raises
    UserError for a file that cannot be read."""
    if not path:
        try:
            return wordnet()
        except (ImportError, LookupError, OSError):
            return None
    try:
        lines = Path(path).read_text(encoding="utf-8").lower().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--synonyms {path} cannot be read as text ({error})") from error
    table = {}
    for line in lines:
        words = [word.strip() for word in line.split(",") if word.strip()]
        if words:
            table[words[0]] = words[1:]
    return table


def synonyms_checksum(table):
    """Collective. -> text that differs for other synonyms, which would change the captions of a run
    without a word. Raises UserError if processes, of which each opens its own, have others."""
    checksum = zlib.crc32(json.dumps(table, sort_keys=True).encode())
    text = json.dumps({"words": len(table or ()), "checksum": f"{checksum:08x}"})
    every = [text] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(every, text)
    if set(every) != {text}:
        raise UserError("processes differ in their synonyms: give all the same --synonyms")
    return text


def wordnet(debian=Path("/usr/share/wordnet")):
    """-> {word: its synonyms} of WordNet, without inflected forms: Debian's wordnet-base, else
    nltk's."""
    names = ["data.noun", "data.verb", "data.adj", "data.adv"]
    if (debian / names[0]).exists():
        files = [(debian / name).open("rb") for name in names]
    else:
        import nltk  # only to find the files: its reader would share open ones with forked workers

        files = [nltk.data.find(f"corpora/wordnet/{name}").open() for name in names]
    table, stop_words = {}, set(STOP_WORDS.split())
    for file in files:
        with file:
            lines = file.read().decode().splitlines()
        for line in lines:
            if line.startswith(" "):  # the licence
                continue
            fields = line.split()  # offset, file, kind, count, then word, id for each
            count = int(fields[3], 16)
            words = set()
            for word in fields[4 : 4 + 2 * count : 2]:
                word = re.sub(r"\(\w+\)$", "", word)  # red(p): where an adjective may stand
                words.add(word.replace("_", " ").lower())
            for word in words - stop_words:
                table.setdefault(word, set()).update(words - {word})
    return {word: sorted(synonyms) for word, synonyms in table.items()}
