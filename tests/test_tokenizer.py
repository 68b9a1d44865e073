"""The tokenizer of data.py: CLIP's own ids, byte-pair encodings learnt from captions, and what a user may get
wrong."""

import functools
import gzip
import io
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import tokenizers
import torch

from common import UserError, init_distributed, rank, user_errors
from data import Tokenizer
from monitor import tokenize

ROOT = Path(__file__).parent.parent
WORDS = ("a big", "one small", "the"), ("red", "blue", "grey"), ("star", "stars", "Zürich café", "数字 7", "😀")
CAPTIONS = ["a photo of " + " ".join(words) for words in itertools.product(*WORDS)]


@pytest.fixture(scope="module")
def published():
    """CLIP's merges from the open_clip package."""
    pytest.importorskip("open_clip", reason="the published merges come with the open_clip package")
    return Tokenizer("clip", data_dir="/nonexistent")


@pytest.fixture(scope="module")
def golden():
    """OpenAI's and SLIP's own tokenizers on 32 texts, six of which ftfy changes."""
    case = torch.load(ROOT / "tests/golden/clip_tokenizer.pt", weights_only=True)
    return case["inputs"]["texts"], case["outputs"]


@pytest.fixture(scope="module")
def trained():
    return Tokenizer("train", captions=iter(CAPTIONS), vocab_size=600)


@pytest.fixture
def offline(monkeypatch):
    def refuse(url, timeout):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


# ------------------------------------------------ CLIP's ids ------------------------------------------------
def padded(ids, length):
    return ids + [0] * (length - len(ids))


def test_ids_are_openai_s(published, golden):
    texts, expected = golden
    assert (published.vocab_size, published.sot, published.eot) == (49408, 49406, 49407)
    assert [padded(published(text), 77) for text in texts] == expected["ids"].tolist()
    assert [published.encode(text) for text in texts] == expected["encode_no_special"]
    decode = functools.partial(published.bpe.decode, skip_special_tokens=False)
    assert [decode(published.encode(text)) for text in texts] == expected["decoded"]
    published.context_length = 16
    assert [padded(published(text), 16) for text in texts] == expected["ids_context16"].tolist()
    published.context_length = 77


def test_cleaning(published):
    assert Tokenizer.clean("  A\u00a0&amp;lt;B&gt;\n\tCafÃ© ") == "a <b> café"
    assert len(published.encode("it\u2019s")) == 2  # four tokens where ftfy does not straighten the quote


def test_plain_cut_is_slip_s(published, golden):
    """Its code leaves the last of a long caption's ids as it is, where CLIP's puts the end token."""
    texts, expected = golden
    for text, row in zip(texts, expected["slip_ids"].tolist(), strict=True):
        ids = [published.sot, *published.encode(text), published.eot][:77]
        assert row == ids + [0] * (77 - len(ids))


def test_ids_are_open_clip_s_on_random_text(published):
    theirs = pytest.importorskip("open_clip").tokenizer.SimpleTokenizer()
    pieces = [*"abcABC 0123.,!?-_'\"&<>()/#@\t\n", *"éß你😀Ж²\u00a0", "'s", "'LL", "'ſ", " the ", "&amp;"]
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randrange(30)))
        assert published.encode(text) == theirs.encode(text), text


# ------------------------------------------------ training ------------------------------------------------
def test_trained_vocabulary_has_clip_s_form(trained):
    vocabulary = sorted(trained.bpe.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    assert [i for _, i in vocabulary] == list(range(trained.vocab_size)) and 514 < trained.vocab_size <= 600
    assert tokens[0] == "!" and all(len(token) == 1 for token in tokens[:256])
    assert tokens[256:512] == [token + "</w>" for token in tokens[:256]]
    assert tokens[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert (trained.sot, trained.eot) == (trained.vocab_size - 2, trained.vocab_size - 1)
    merges = json.loads(trained.to_json())["model"]["merges"]
    assert ["".join(pair) for pair in merges] == tokens[512:-2]
    assert len(trained.encode("a photo of a red star")) == 6  # every frequent word is one token


def test_vocab_size_is_an_upper_bound():
    assert Tokenizer("train", captions=CAPTIONS, vocab_size=530).vocab_size == 530
    assert Tokenizer("train", captions=CAPTIONS).vocab_size < 700  # so few words have no more to learn
    assert Tokenizer("train", captions=[]).vocab_size == 514
    twice = Tokenizer("train", captions=["zq zq xw"])  # what was seen but once is not learnt
    assert twice.vocab_size == 515 and len(twice.encode("zq")) == 1 and len(twice.encode("xw")) == 2
    with pytest.raises(UserError, match="its 514 tokens are more than --vocab-size 500; raise it$"):
        Tokenizer("train", captions=CAPTIONS, vocab_size=500)


def test_training_is_the_same_in_every_process(trained):
    """Also: no warning of tokenizers when a process that has used it forks, as the loader's workers do."""
    code = ("import os; from data import Tokenizer; import test_tokenizer as t\n"
            "tok = Tokenizer('train', captions=t.CAPTIONS, vocab_size=600)\n"
            "tok.bpe.encode_batch(t.CAPTIONS)\n"
            "assert os.environ['TOKENIZERS_PARALLELISM'] == 'false'\n"
            "if os.fork() == 0: tok.bpe.encode_batch(t.CAPTIONS); os._exit(0)\n"
            "os.wait(); print(tok.to_json())")  # fmt: skip
    env = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "fork" not in done.stderr, done.stderr
    assert done.stdout.strip() == trained.to_json()


def test_any_text_can_be_encoded(trained):
    """Bytes are the fallback: what was never seen comes back as it was, but for blanks and upper case."""
    rng = random.Random(0)
    ranges = [(0x20, 0x3000), (0x3000, 0xD800), (0xE000, 0x20000), (0xE0000, 0x10FFFF)]
    texts = ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(12)) for _ in range(500)]
    for text in [*texts, "العربية", "日本語のテキスト", "👨‍👩‍👧", "a\x00b\x07", "</w>", "Ġ", "x" * 5000]:
        ids = trained.encode(text)
        assert max(ids, default=0) < trained.sot
        assert trained.bpe.decode(ids, skip_special_tokens=False).replace(" ", "") == trained.clean(text).replace(" ", "")
    assert trained.encode("\ud83d")  # half of a surrogate pair, as some JSON files hold


# ------------------------------------------------ calling ------------------------------------------------
@pytest.mark.parametrize("caption", ["", "   ", "\n\t"])
def test_empty_caption(trained, caption):
    assert trained(caption) == [trained.sot, trained.eot]


def test_long_captions_are_cut(trained):
    long, sot, eot = "star " * 100, trained.sot, trained.eot
    star = trained.encode("star")[0]
    assert trained(long) == [sot, *[star] * 75, eot]
    short = Tokenizer(trained.to_json(), context_length=5)
    assert short(long) == [sot, star, star, star, eot] and short("star star star") == [
        sot,
        star,
        star,
        star,
        eot,
    ]


def test_batch(trained):
    ids = tokenize(trained, ["red star", "", "star " * 100], "cpu")
    assert ids.dtype == torch.int64 and ids.shape == (3, 77)
    assert ids[0].tolist() == trained("red star") + [0] * 73
    assert ids[1].tolist() == [trained.sot, trained.eot] + [0] * 75 and ids[2, -1] == trained.eot
    assert tokenize(trained, ["red star"], "cpu").tolist() == [trained("red star") + [0] * 4]  # 8, no more


def test_copies_tokenize_alike(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_text(trained.to_json(), encoding="utf-8")
    file = Tokenizer(str(tmp_path / "tokenizer.json"))
    for copy in (Tokenizer(trained.to_json()), file, pickle.loads(pickle.dumps(trained))):
        assert [copy(caption) for caption in CAPTIONS] == [trained(caption) for caption in CAPTIONS]
        assert copy.to_json() == trained.to_json()


# ------------------------------------------ where it comes from ------------------------------------------
def merges_file(folder):
    path = folder / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress(b'"title line\na b\nc d</w>\n'))
    return path


def test_merges_file_and_data_dir(tmp_path, monkeypatch, offline):
    path = merges_file(tmp_path)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    for tok in (Tokenizer(str(path)), Tokenizer("clip", data_dir=str(tmp_path)), Tokenizer("clip")):
        assert tok.vocab_size == 516 and tok.encode("abcd") == [512, 513]
        assert tok.encode("ab") == [64, 256 + 65]  # a and b</w>, which no merge joins
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_DIR", "")  # as good as none: ./data, not the current folder
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / path.name).write_bytes(gzip.compress(b'"title line\na b\n'))
    assert Tokenizer("clip").vocab_size == 515


def test_another_form_from_the_hub(monkeypatch):
    """A cased WordPiece with [CLS] and [SEP] keeps its own rules."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "A", "a", "star", "##s"]
    piece = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    piece.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    piece.enable_truncation(4)
    piece.enable_padding(length=16)
    asked = []

    def answer(url, timeout):
        asked.append(url)
        return io.BytesIO(piece.to_str().encode())

    monkeypatch.setattr("urllib.request.urlopen", answer)
    tok = Tokenizer("somebody/some-model")
    assert asked == ["https://huggingface.co/somebody/some-model/resolve/main/tokenizer.json"]
    assert tok("A stars a star star") == [2, 4, 6, 7, 5, 6, 6, 3] and tok("") == [2, 3]


def two_processes():
    """Under torchrun: only the first process asks the hub, and both have its tokenizer or its error."""
    import urllib.request

    init_distributed("cpu")
    asked, text = [], Tokenizer("train", captions=CAPTIONS, vocab_size=600).to_json()

    def answer(url, timeout):
        asked.append(url)
        if "nothing" in url:
            raise urllib.error.URLError("Name or service not known")
        return io.BytesIO(text.encode())

    urllib.request.urlopen = answer
    tok = Tokenizer("somebody/some-model")
    assert tok.to_json() == text and len(asked) == (rank() == 0)
    learnt = Tokenizer("train", captions=CAPTIONS if rank() == 0 else [], vocab_size=600)
    assert learnt.to_json() == text
    with pytest.raises(UserError, match="nobody/nothing: .*Name or service not known"):
        Tokenizer("nobody/nothing")
    assert len(asked) == 2 * (rank() == 0)


def test_one_process_asks_the_hub(server):
    server.together("tests/test_tokenizer.py")


@pytest.mark.parametrize("spec, reason", [
    ("nobody/nothing", "Name or service not known"), ("clip", "Name or service not known"),
    ("missing.json", "No such file"), ("missing.txt.gz", "No such file"), ("{broken", "key must be a string"),
    ("bad.txt.gz", "Not a gzipped file"), ("bad.json", "expected"), ("ends.json", "no start and end token"),
])  # fmt: skip
def test_what_cannot_be_loaded_is_said_in_a_sentence(spec, reason, tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no open_clip here
    for name in ("bad.txt.gz", "bad.json"):
        Path(name).write_text("rubbish")
    Path("ends.json").write_text(tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).to_str())
    with pytest.raises(UserError, match=reason) as error:
        Tokenizer(spec)
    assert spec in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("; use --tokenizer train, a tokenizer.json or bpe_simple_vocab_16e6.txt.gz")


def test_vocabulary_larger_than_the_model_s_is_refused(trained):
    with pytest.raises(UserError, match=f"{trained.vocab_size} tokens"):
        Tokenizer(trained.to_json(), vocab_size=trained.vocab_size - 1)


def test_the_vocabulary_is_found_below_home(tmp_path, monkeypatch):
    """bash leaves --data-dir=~/data as it is; the images are found there, and so must the list of merges be."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(b"title\na b\n"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Tokenizer("clip", data_dir="~/data").vocab_size == 2 * 256 + 1 + 2  # bytes, the merge, start and end


if __name__ == "__main__":
    with user_errors():
        two_processes()
