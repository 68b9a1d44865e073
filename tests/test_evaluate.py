"""monitor.py and evaluate.py against the official numbers, against references written out in float64, and on two processes."""

import gzip
import itertools
import json
import math
import multiprocessing
import random
import re
import shutil
import sys
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

import dino
import knn as knn_module
import monitor
import pictures as drawn
import runs
import test_golden
from command import Args, main
from common import LARS, UserError, init_distributed, rank, user_errors
from data import Loader, Tokenizer, decode
from evaluation import pictures, probes
from evaluation.features import LastBlocks, block_features, cached_extract
from evaluation.protocols import chosen_names, logreg
from evaluation.probes import best_exponent, fit_heads, linear_probe, logistic_regression
from evaluation.results import table
from evaluation.scores import classification_metrics
from evaluation.weights import open_network
from knn import extract, knn, knn_eval, knn_sweep, linear, linear_eval, ridge
from monitor import EvalView, language_eval, recall, zeroshot_weights
from run import parse_args
from toys import Toy, full_disk

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")


def golden(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def signs(n, seed, dim=4):
    """Vectors of +-1: of equal norm, so that cosines are exact and very often equal."""
    return torch.randint(0, 2, (n, dim), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


# ------------------------------------------------ scores ------------------------------------------------
@pytest.mark.parametrize("k, temperature", itertools.product((1, 5, 10, 20, 100, 200), (0.07, 0.2)))
def test_knn_official(k, temperature):
    g = golden("eval_knn_dino")
    assert knn(*g["inputs"].values(), k, temperature, 7) == pytest.approx(
        g["outputs"][f"k{k}_T{temperature}"], abs=1e-4
    )


def knn_reference(train, train_labels, test, test_labels, k, temperature, classes):
    """One loop per test row, float64; equal cosines and equal votes in the order of their index."""
    top1 = top5 = 0
    for row, label in zip(F.normalize(test.double(), dim=1), test_labels.tolist()):
        cosine = [round(float(row @ x), 9) for x in F.normalize(train.double(), dim=1)]
        nearest = sorted(range(len(cosine)), key=lambda i: (-cosine[i], i))[:k]
        votes = [
            math.fsum(math.exp(cosine[i] / temperature) for i in nearest if train_labels[i] == c)
            for c in range(classes)
        ]
        ranking = sorted(range(classes), key=lambda c: (-votes[c], c))
        top1 += label == ranking[0]
        top5 += label in ranking[: min(5, k, len(cosine))]
    return 100 * top1 / len(test), 100 * top5 / len(test)


@pytest.mark.parametrize("k", [1, 3, 10, 500])  # 500: more than there are
@pytest.mark.parametrize("n_test", [1, 7, 61])  # DINO's code fails below 100
@pytest.mark.parametrize("ties", [True, False])
def test_knn_reference(k, n_test, ties, monkeypatch):
    g = torch.Generator().manual_seed(k * n_test)
    train, test = (signs(90, 1), signs(n_test, 2)) if ties else (torch.randn(n, 8, generator=g) for n in (90, n_test))
    train_labels, test_labels = (torch.randint(0, 9, (n,), generator=g) for n in (90, n_test))  # 8 is absent below
    train_labels[train_labels == 8] = 7
    inputs = (train, train_labels, test, test_labels, k, 0.07, 9)
    assert knn(*inputs) == pytest.approx(knn_reference(*inputs))
    whole = knn(*inputs)
    monkeypatch.setattr(monitor, "CHUNK", 200)  # two rows at a time
    assert knn(*inputs) == whole


def test_knn_sweep_is_every_single_one():
    g = torch.Generator().manual_seed(0)
    inputs = signs(90, 1), torch.randint(0, 9, (90,), generator=g), signs(61, 2), torch.randint(0, 9, (61,), generator=g)
    found = knn_sweep(*inputs, [1, 5, 20, 500], [0.07, 0.5], 9)
    assert found == {(k, t): knn(*inputs, k, t, 9) for k in (1, 5, 20, 500) for t in (0.07, 0.5)} and len(found) == 8


def test_knn_thousand_classes_and_cold_temperature():
    features = F.normalize(torch.randn(1000, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(1000)
    assert knn(features, labels, features, labels, k=20, temperature=1e-3, num_classes=1000) == (100.0, 100.0)
    assert knn(features, labels, features[:1], labels[:1] + 1, k=1, num_classes=1000) == (0.0, 0.0)


def test_accuracy_official():
    g = golden("eval_accuracy_dino")
    out = classification_metrics(g["inputs"]["logits"], g["inputs"]["target"])
    assert [out["top1"], out["top5"]] == pytest.approx([x.item() for x in g["outputs"]["top1_top5"]])


class Lookup:
    """A tokenizer and text encoder in one: a prompt's only token is its place in a table of embeddings."""

    context_length = 10

    def __init__(self, prompts, table):
        self.prompts, self.table = prompts, table

    def __call__(self, text):
        return [1 + self.prompts.index(text)]

    def encode_text(self, ids):
        assert ids.shape[1] == 8  # padded to a multiple of 8
        return self.table[ids[:, 0] - 1]


def test_zeroshot_official():
    g = golden("eval_zeroshot")
    table, want = g["inputs"]["per_prompt_text_emb"], g["outputs"]  # (6 classes, 4 templates, 12)
    templates = ["a {}", "the {}", "one {} of many", "{}"]
    lookup = Lookup([t.replace("{}", f"c{c}") for c in range(6) for t in templates], table.flatten(0, 1))
    for batch_size in (256, 5):
        names = [f"c{c}" for c in range(6)]
        weights = zeroshot_weights(lookup.encode_text, lookup, names, templates, batch_size=batch_size)
        torch.testing.assert_close(weights, want["classifier_weights"].T, atol=1e-6, rtol=0)
    logits = 100 * F.normalize(g["inputs"]["image_emb"], dim=1) @ weights.T
    torch.testing.assert_close(logits, want["logits"], atol=1e-4, rtol=0)
    out, official = classification_metrics(logits, g["inputs"]["target"]), want["clip_benchmark_metrics"]
    assert out["top1"] == pytest.approx(100 * official["acc1"])
    assert out["top5"] == pytest.approx(100 * official["acc5"])
    assert out["mean_top1_top5"] == pytest.approx(50 * (official["acc1"] + official["acc5"]))
    assert out["mean_per_class"] == pytest.approx(want["slip_mean_per_class_percent"])
    two = classification_metrics(logits[:, :2], g["inputs"]["target"] % 2)
    assert two["roc_auc"] == pytest.approx(want["slip_roc_auc_percent_binary"])
    # a class of four synonyms is the same as four templates
    lookup.prompts = [f"a {name}" for name in range(24)]
    synonyms = [[str(4 * c + i) for i in range(4)] for c in range(6)]
    torch.testing.assert_close(zeroshot_weights(lookup.encode_text, lookup, synonyms, ["a {}"]), weights)


@pytest.mark.parametrize("classes", [2, 3, 9, 1000])
def test_metrics_reference(classes, monkeypatch):
    g = torch.Generator().manual_seed(classes)
    logits = torch.randint(-3, 4, (153, classes), generator=g).float()  # ties
    labels = torch.randint(0, classes, (153,), generator=g)
    labels[labels == 1] = 0 if classes > 2 else 1  # absent
    ranking = [sorted(range(classes), key=lambda c, row=row: (-row[c], c)) for row in logits.tolist()]
    hits = [label in r[:1] for r, label in zip(ranking, labels.tolist())]
    out = classification_metrics(logits, labels)
    assert out["top1"] == pytest.approx(100 * np.mean(hits))
    per_class = [np.mean([h for h, label in zip(hits, labels.tolist()) if label == c]) for c in set(labels.tolist())]
    assert out["mean_per_class"] == pytest.approx(100 * np.mean(per_class))
    if classes >= 5:
        top5 = [label in r[:5] for r, label in zip(ranking, labels.tolist())]
        assert out["top5"] == pytest.approx(100 * np.mean(top5))
        assert out["mean_top1_top5"] == pytest.approx(50 * (np.mean(hits) + np.mean(top5)))
    else:
        assert "top5" not in out
    if classes == 2:
        score = (logits[:, 1] - logits[:, 0]).double()
        pairs = [(p > n) + 0.5 * (p == n) for p in score[labels == 1].tolist() for n in score[labels == 0].tolist()]
        assert out["roc_auc"] == pytest.approx(100 * np.mean(pairs))
        assert "roc_auc" not in classification_metrics(logits, labels * 0)
    monkeypatch.setattr(monitor, "CHUNK", 7 * classes)
    assert classification_metrics(logits, labels) == out


def test_not_a_number_is_never_a_hit():
    nothing = torch.full((4, 6), math.nan)
    assert classification_metrics(nothing, torch.zeros(4, dtype=torch.int64))["top1"] == 0
    assert recall(nothing, nothing, torch.arange(4), ks=(1,))["mean_recall"] == 0


def test_recall_official():
    g = golden("eval_retrieval_recall")
    inputs, want = g["inputs"], g["outputs"]["metrics"]
    owner = torch.arange(100) // inputs["captions_per_image"]
    out = recall(inputs["image_emb"], inputs["text_emb"], owner)
    for k in (1, 5, 10):  # image_retrieval is text to image
        assert out[f"text_to_image_recall@{k}"] == pytest.approx(100 * want[f"image_retrieval_recall@{k}"], abs=1e-4)
        assert out[f"image_to_text_recall@{k}"] == pytest.approx(100 * want[f"text_retrieval_recall@{k}"], abs=1e-4)
    assert out["mean_recall"] == pytest.approx(np.mean(list(want.values())) * 100, abs=1e-4)


def recall_reference(images, texts, owner, ks):
    images, texts = F.normalize(images.double(), dim=1), F.normalize(texts.double(), dim=1)
    scores, owner, out = (texts @ images.T).round(decimals=9).tolist(), owner.tolist(), {}
    for k in ks:
        to_image = [o in sorted(range(len(images)), key=lambda i, s=s: (-s[i], i))[:k] for s, o in zip(scores, owner)]
        to_text = []
        for i in sorted(set(owner)):
            first = sorted(range(len(texts)), key=lambda t, i=i: (-scores[t][i], t))[:k]
            to_text.append(any(owner[t] == i for t in first))
        out[f"image_to_text_recall@{k}"], out[f"text_to_image_recall@{k}"] = (
            100 * np.mean(to_text),
            100 * np.mean(to_image),
        )
    return out | {"mean_recall": np.mean(list(out.values()))}


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("n, t", [(1, 1), (1, 3), (40, 97)])  # one image; k larger than the set; unequal numbers
def test_recall_reference(n, t, ties, monkeypatch):
    g = torch.Generator().manual_seed(n)
    images, texts = (signs(n, 3), signs(t, 4)) if ties else (torch.randn(m, 6, generator=g) for m in (n, t))
    owner = torch.randint(0, n, (t,), generator=g).clamp(max=max(0, n - 3))  # any order; the last images have none
    whole = recall(images, texts, owner)
    assert whole == pytest.approx(recall_reference(images, texts, owner, (1, 5, 10)))
    monkeypatch.setattr(monitor, "CHUNK", 100)
    assert recall(images, texts, owner) == whole


# ------------------------------------------------ features ------------------------------------------------
class Net(nn.Module):
    """A language-image model of two linear maps, with a batch norm and a dropout that only eval mode makes harmless."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.image = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
            self.text = nn.EmbeddingBag(256, 8, padding_idx=0)  # as every text tower: padding is not seen
        self.frozen = nn.Dropout().eval()

    def forward(self, x):
        return self.image(x)

    encode_image = forward

    def encode_text(self, ids):
        return self.text(ids)


class Letters:
    context_length = 20

    def __call__(self, text):
        return [*text.encode()[:20]]


VIEW = EvalView(8)


def test_extract_leaves_everything_as_it_was():
    net, before = Net(), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    net.train()
    net.frozen.eval()
    features, labels = extract(net, Toy(23), VIEW, CPU, batch_size=5)
    for workers in (1, 2):
        assert torch.equal(extract(net, Toy(23), VIEW, CPU, batch_size=5, workers=workers)[0], features)
    assert net.training and net.image.training and not net.frozen.training
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert features.dtype == torch.float32 and not features.requires_grad
    net.eval()
    with torch.no_grad():
        one_by_one = [net(VIEW(VIEW.crop(decode(Toy(23)[i].image), None)[None], {})) for i in range(23)]
    torch.testing.assert_close(features, torch.cat(one_by_one))
    assert labels.tolist() == [i % 3 for i in range(23)]
    some = extract(net, Toy(23), VIEW, CPU, indices=[1, 4, 22])
    torch.testing.assert_close(some[0], features[[1, 4, 22]])


def test_broken_images_are_left_out(capsys):
    features, labels = extract(Net(), Toy(23, broken=True), VIEW, CPU, batch_size=4)
    kept = [i for i in range(23) if i % 5 != 3]
    assert labels.tolist() == [i % 3 for i in kept]
    torch.testing.assert_close(features, extract(Net(), Toy(23), VIEW, CPU)[0][kept])
    assert "left out 4 of 23 samples, sample 3" in capsys.readouterr().err
    with pytest.raises(UserError, match="none of 1 samples"):
        extract(Net(), Toy(23, broken=True), VIEW, CPU, indices=[3])


def test_diverged_network_is_named():
    net = Net()
    net.image[1].weight.data[0, 0] = math.inf
    with pytest.raises(UserError, match="not finite"):
        extract(net, Toy(5), VIEW, CPU)


def test_calls_of_training_loops():
    net, options = Net().train(), {"view": VIEW, "device": CPU, "batch_size": 7}
    out = knn_eval(net, Toy(120), Toy(60, first=500), **options, k=5)
    assert out["knn_top1"] > 70 and out["knn_chance"] == pytest.approx(100 / 3)
    few = [knn_eval(net, Toy(120), Toy(60, first=500), **options, k=5, max_train=9, max_val=6) for _ in range(2)]
    assert few[0] == few[1] and round(few[0]["knn_top1"] * 6 / 100, 6).is_integer()
    out = language_eval(net, Letters(), Toy(30), **options)
    ranks = {"effective_rank", "full_rank"}
    assert out.keys() == {"zeroshot_top1", "zeroshot_chance", "recall@1", "recall_chance"} | ranks
    assert out["recall_chance"] == pytest.approx(100 / 30)
    (logits, labels), _, _ = monitor.language_scores(net, Letters(), Toy(30), classnames=Toy.classes, **options)
    assert out["zeroshot_top1"] == classification_metrics(logits, labels)["top1"]
    no_classes, no_captions = Toy(30), Toy(30)
    no_classes.classes, no_captions.captioned = None, False
    assert language_eval(net, Letters(), no_classes, **options).keys() == {"recall@1", "recall_chance"} | ranks
    assert language_eval(net, Letters(), no_captions, **options).keys() == {"zeroshot_top1", "zeroshot_chance"} | ranks
    bank, val = Toy(120), Toy(60, first=500)
    fitted, features = linear_eval(net, bank, val, **options), extract(net, val, **options)[0]
    inputs = *extract(net, bank, **options), features, extract(net, val, **options)[1]
    assert fitted["linear_top1"] == linear(*inputs, 3)[0] > 70
    assert fitted["linear_chance"] == pytest.approx(100 / 3)
    for found in (fitted, knn_eval(net, bank, val, **options)):
        assert found.items() >= monitor.rank_scores(features).items()
        assert found["full_rank"] == features.shape[1] < len(features)
        assert not any("top5" in name for name in found)  # all would be hits
    for count in (4, 5):
        bank.classes = val.classes = list("abcde"[:count])
        fitted, voted = linear_eval(net, bank, val, **options), knn_eval(net, bank, val, **options)
        assert ("linear_top5" in fitted) == ("knn_top5" in voted) == (count == 5)
    assert (fitted["linear_top1"], fitted["linear_top5"]) == linear(*inputs, 5)
    assert (voted["knn_top1"], voted["knn_top5"]) == knn(*inputs, num_classes=5)
    assert net.training


def test_effective_rank_by_hand():
    """RankMe: singular values 3 and 1 are shares 3/4 and 1/4, of entropy 2 ln 2 - 3/4 ln 3: rank 4 / 3^(3/4)."""
    def effective_rank(features):
        return monitor.rank_scores(features)["effective_rank"]

    known = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
    assert effective_rank(known) == round(4 / 3**0.75, 3) == 1.755
    turned = torch.linalg.qr(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)))[0] @ known
    for features in (turned, turned.T, -5 * turned):  # more rows than columns, fewer; neither sign nor scale counts
        assert effective_rank(features) == 1.755
    assert effective_rank(torch.eye(6)) == 6
    assert effective_rank(torch.ones(6, 4)) == 1  # collapsed
    assert effective_rank(torch.zeros(6, 4)) == 1
    assert monitor.rank_scores(torch.eye(6)[:, :4]) == {"effective_rank": 4, "full_rank": 4}


def test_ridge_by_hand():
    """Two classes along two axes: less their mean both points lie at +-sqrt(1/2) on one line, X^T X has eigenvalues 1 and
    0 of mean 1/2, and the score of the right class is 1/2 + 1/2 / (1 + penalty / 2)."""
    points, labels = torch.tensor([[2.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 1])
    for penalty in (0.01, 0.5):
        mean, weight, bias = ridge(points, labels, 2, penalty)
        scores = (F.normalize(points, dim=1) - mean) @ weight + bias
        right = 0.5 + 0.5 / (1 + penalty / 2)
        torch.testing.assert_close(scores, torch.tensor([[right, 1 - right], [1 - right, right]], dtype=torch.float64))


def test_ridge_is_scikit_learn_s():
    """Of three classes that are not equally frequent."""
    noise = torch.Generator().manual_seed(1)
    x, labels = torch.randn(40, 5, generator=noise).double(), torch.randint(0, 9, (40,), generator=noise).clamp(max=2)
    mean, weight, bias = ridge(x, labels, 3, penalty=0.1)
    unit = F.normalize(x, dim=1)
    alpha = 0.1 * float((unit - unit.mean(0)).square().sum(0).mean())
    theirs = Ridge(alpha).fit(unit.numpy(), F.one_hot(labels, 3).double().numpy())
    torch.testing.assert_close(weight, torch.from_numpy(theirs.coef_.T.copy()))
    torch.testing.assert_close((unit - mean) @ weight + bias, torch.from_numpy(theirs.predict(unit.numpy())))


def test_linear_separates_what_a_line_separates():
    """One direction of sixteen tells the classes apart and is a small part of each feature: the nearest neighbours do
    not see it. Opposite corners of a square are what no line separates, and the nearest neighbours do."""
    noise = torch.Generator().manual_seed(0)
    features, labels = torch.randn(600, 16, generator=noise), torch.arange(600) % 2
    features[:, 0] = 0.3 * (2 * labels - 1)
    train, test = (features[:500], labels[:500]), (features[500:], labels[500:])
    assert linear(*train, *test, 2)[0] == 100
    assert knn(*train, *test, num_classes=2)[0] < 75
    corners, labels = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]), torch.tensor([0, 0, 1, 1])
    assert linear(corners, labels, corners, labels, 2) == (50, 100)
    assert knn(corners, labels, corners, labels, k=1)[0] == 100
    same = torch.ones(4, 3)  # a collapsed network: the most frequent class, and no error
    assert linear(same, torch.tensor([1, 1, 0, 1]), same, torch.tensor([1, 0, 1, 1]), 2)[0] == 75


def test_captions_stay_with_their_images():
    net, data = Net().eval(), Toy(31, broken=True)
    kept = [i for i in range(31) if i % 5 != 3]
    owners, captions = zip(*[(row, c) for row, i in enumerate(kept) for c in data[i].captions if c.strip()])
    images = [VIEW(VIEW.crop(decode(data[i].image), None)[None], {}) for i in kept]
    with torch.no_grad():
        images, texts = torch.cat([net(x) for x in images]), net.encode_text(monitor.tokenize(Letters(), captions, CPU))
    want = recall(images, texts, torch.tensor(owners))
    (logits, labels), found, features = monitor.language_scores(
        net, Letters(), data, VIEW, CPU, Toy.classes, ["a {}"], captions=True, batch_size=4
    )
    assert found == pytest.approx(want) and len(features) == len(kept)
    weights = zeroshot_weights(net.encode_text, Letters(), Toy.classes, ["a {}"])
    torch.testing.assert_close(logits, F.normalize(images, dim=1) @ weights.T)
    assert labels.tolist() == [i % 3 for i in kept]


def test_features_are_kept(tmp_path, capsys, monkeypatch):
    """And taken again only if nothing has changed that they depend on."""

    class Longer(Toy):
        def __getitem__(self, i):
            if i == 40:
                opened.append(i)
            return super().__getitem__(i)

    opened, data, options = [], Longer(50), {"batch_size": 7, "cache": str(tmp_path)}
    first = cached_extract(Net(), data, VIEW, CPU, **options)
    again = cached_extract(Net(), data, VIEW, CPU, **options)
    assert len(opened) == 1 and all(torch.equal(a, b) for a, b in zip(first, again))
    assert torch.equal(first[0], cached_extract(Net(), Toy(50), VIEW, CPU, batch_size=7)[0])
    trained = Net()
    trained.image[1].bias.data += 1
    narrow = Longer(50)
    narrow.classes = ["red", "green", "else"]
    for changed in ((trained, data, VIEW), (Net(), Longer(49), VIEW), (Net(), Longer(50, first=1), VIEW), (Net(), narrow, VIEW),
                    (Net(), data, EvalView(8, 10))):  # fmt: skip
        cached_extract(*changed, CPU, **options)
    cached_extract(Net(), data, VIEW, CPU, **{**options, "batch_size": 8})
    cached_extract(Net(), data, VIEW, CPU, **options, dtype="bf16")
    cached_extract(Net(), data, VIEW, CPU, **options, indices=[40, 41])
    assert len(opened) == 9 and len(list(tmp_path.iterdir())) == 9
    for file in tmp_path.iterdir():
        file.write_bytes(b"damaged")
    assert torch.equal(first[0], cached_extract(Net(), data, VIEW, CPU, **options)[0])
    part = first[0].numpy().tobytes()[:64]
    holed = [file for file in tmp_path.iterdir() if part in file.read_bytes()]
    assert holed and any(part)
    for file in holed:  # as after a power cut: the file opens, its checksums do not fit
        file.write_bytes(file.read_bytes().replace(part, bytes(64)))
    assert torch.equal(first[0], cached_extract(Net(), data, VIEW, CPU, **options)[0])
    options["cache"] = str(tmp_path / "nowhere")
    cached_extract(Net(), data, VIEW, CPU, **options)
    assert "features are not kept" in capsys.readouterr().err
    options["cache"] = str(tmp_path / "full")
    (tmp_path / "full").mkdir()
    monkeypatch.setattr(torch, "save", full_disk)
    assert torch.equal(first[0], cached_extract(Net(), data, VIEW, CPU, **options)[0])
    assert "features are not kept: no space is left" in capsys.readouterr().err and not [*(tmp_path / "full").iterdir()]


def test_what_is_left_out_is_counted_each_time(tmp_path, capsys):
    """Also by features that an older version kept, which say nothing but who could be read."""
    data, options = Toy(23, broken=True), {"batch_size": 7, "cache": str(tmp_path)}
    first = cached_extract(Net(), data, VIEW, CPU, **options)
    assert "left out 4 of 23 samples" in capsys.readouterr().err
    again = cached_extract(Net(), data, VIEW, CPU, **options)
    assert torch.equal(first[0], again[0]) and len(again[0]) == 19
    (file,) = tmp_path.iterdir()
    printed = capsys.readouterr().err
    assert printed.count("left out 4 of 23 samples, sample ") == 1 and f"could not be read when {file} was written" in printed


def test_labelled_copies_only_where_labels_are_missing():
    features, labels = torch.randn(4, 3), torch.tensor([2, 0, 1, 1])
    found = monitor.labelled(Toy(4), features, labels)
    assert found[0] is features and found[1] is labels
    labels = torch.tensor([2, -1, 1, -1])
    found = monitor.labelled(Toy(4), features, labels)
    assert torch.equal(found[0], features[::2]) and found[1].tolist() == [2, 1]


# ------------------------------------------------ logistic regression ------------------------------------------------
def test_what_chose_C_is_gone_in_the_last_fit(monkeypatch):
    axes, fit, kept, alive = probes.principal_axes, logistic_regression, [], []

    def watched_axes(x):
        found = axes(x)
        kept.append(weakref.ref(found.x))
        return found

    def watched_fit(x, *args, **options):
        if torch.is_tensor(x):  # the last one
            alive.extend(ref() for ref in kept)
        return fit(x, *args, **options)

    monkeypatch.setattr("evaluation.protocols.principal_axes", watched_axes)
    monkeypatch.setattr("evaluation.protocols.logistic_regression", watched_fit)
    net, options = types.SimpleNamespace(encoder=Net().eval()), {"view": VIEW, "device": CPU}
    metrics = logreg(net, Toy(60), Toy(30, first=900), Args(), options)
    assert metrics["C"] > 0 and alive == [None]


@pytest.mark.parametrize("C", [1e-4, 0.316, 100.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_logistic_regression_equals_scikit_learn(C, classes, monkeypatch):
    g = torch.Generator().manual_seed(classes)
    y = torch.randint(0, classes, (300,), generator=g)
    x = torch.randn(300, 12, generator=g, dtype=torch.float64) + F.one_hot(y, 12) * 2 + 1
    theirs = LogisticRegression(C=C, max_iter=10000, tol=1e-10).fit(x.numpy(), y.numpy())
    asked = torch.randn(40, 12, generator=g, dtype=torch.float64)
    want = torch.from_numpy(theirs.predict_log_proba(asked.numpy()))
    torch.testing.assert_close(logistic_regression(x, y, C, classes)(asked).log_softmax(1), want, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(probes, "CHUNK", 7 * classes)  # seven rows at a time
    torch.testing.assert_close(logistic_regression(x, y, C, classes)(asked).log_softmax(1), want, atol=1e-5, rtol=1e-5)


def test_logistic_regression_of_absent_classes():
    """1,000 classes of which 3 occur: the same as scikit-learn, which knows no others."""
    g = torch.Generator().manual_seed(0)
    y = torch.tensor([5, 700, 999])[torch.randint(0, 3, (60,), generator=g)]
    x, asked = torch.randn(60, 6, generator=g, dtype=torch.float64), torch.randn(9, 6, generator=g, dtype=torch.float64)
    theirs = LogisticRegression(C=1.0, max_iter=1000, tol=1e-10).fit(x.numpy(), y.numpy())
    logits = logistic_regression(x, y, 1.0, 1000)(asked)
    want = torch.from_numpy(theirs.predict_proba(asked.numpy()))
    torch.testing.assert_close(logits.softmax(1)[:, [5, 700, 999]], want, atol=1e-6, rtol=1e-5)
    scores = classification_metrics(logits, torch.tensor([5, 700, 999, 0, 1, 2, 3, 4, 6]))
    assert scores["top1"] <= 100 / 3 and math.isfinite(scores["mean_per_class"])
    one = logistic_regression(x[:1], y[:1], 1.0, 1000)(asked)  # one sample, one class
    assert (one.argmax(1) == y[0]).all()


@pytest.mark.parametrize("peak", [-6.0, -5.125, 0.375, 5.0, 6.0])
def test_search_finds_the_peak(peak):
    tried = []
    assert best_exponent(lambda e: tried.append(e) or -abs(e - peak)) == peak
    assert len(tried) <= 15 and all((8 * e).is_integer() and -6 <= e <= 6 for e in tried)
    assert best_exponent(lambda e: 0.0) == -6  # of equal ones the strongest penalty


# ------------------------------------------------ linear probe ------------------------------------------------
class Pixels(nn.Module):
    """Mean colour: what the class of Toy is, linearly."""

    def forward(self, x):
        return x.mean((2, 3))


def test_head_equals_momentum_by_hand():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 16, 5, generator=g), torch.randint(0, 4, (3, 16), generator=g)
    for args in (Args(epochs=3, weight_decay=0.1), Args(epochs=3, nesterov=True, zero_init=True)):
        heads = fit_heads([(i, x[i], y[i]) for i in range(3)], 5, 4, [0.5, 2.0], args, CPU)
        for lr, head in zip([0.5, 2.0], heads):
            w = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double() * (0 if args.zero_init else 0.01)
            v = torch.zeros(4, 5, dtype=torch.float64)
            bias, bias_v = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
            for i in range(3):
                p = (x[i].double() @ w.T + bias).softmax(1) - F.one_hot(y[i], 4)
                grad, bias_grad = p.T @ x[i].double() / 16 + args.weight_decay * w, p.mean(0) + args.weight_decay * bias
                v, bias_v = 0.9 * v + grad, 0.9 * bias_v + bias_grad
                rate = lr * (1 + math.cos(math.pi * i / 3)) / 2
                w = w - rate * (grad + 0.9 * v if args.nesterov else v)
                bias = bias - rate * (bias_grad + 0.9 * bias_v if args.nesterov else bias_v)
            torch.testing.assert_close(head.weight.detach().double(), w, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(head.bias.detach().double(), bias, atol=1e-5, rtol=1e-4)


def test_lars_and_steps():
    """MoCo's rate falls to a tenth twice; SimSiam's optimizer is LARS."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 16, 5, generator=g), torch.randint(0, 4, (4, 16), generator=g)
    args = Args(epochs=4, lr_steps="1,3", lars=True, weight_decay=1e-3)
    head = fit_heads([(i, x[i], y[i]) for i in range(4)], 5, 4, [0.5], args, CPU)[0]
    other = nn.Linear(5, 4)
    other.weight.data = 0.01 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    other.bias.data.zero_()
    optimizer = LARS(other.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3)
    for i, rate in enumerate((0.5, 0.05, 0.05, 0.005)):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(other(x[i]), y[i]).backward()
        optimizer.step()
    torch.testing.assert_close(head.weight, other.weight)
    torch.testing.assert_close(head.bias, other.bias)


def test_features_of_blocks_official():
    g = golden("eval_linear_features_dino")
    tokens, out = g["inputs"]["intermediate_n2"], g["outputs"]
    torch.testing.assert_close(block_features(tokens, 16, False), out["n2_noavgpool"])
    interleaved = block_features(tokens[-1:], 16, True).unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
    torch.testing.assert_close(interleaved, out["n1_avgpool"])
    g = golden("eval_linear_features_dinov2")
    tokens = [torch.cat([cls[:, None], patches], 1) for patches, cls in g["inputs"]["tokens"]]
    every = block_features(tokens, 5, True)
    heads = [every[:, a:b] for _, (a, b) in probes.grid(4, every.shape[1], [0.1])]
    for found, name in zip(heads, ("n1_avgFalse", "n1_avgTrue", "n4_avgFalse", "n4_avgTrue"), strict=True):
        torch.testing.assert_close(found, g["outputs"][name])


def test_blocks_of_a_network_official():
    x, y, _ = test_golden.golden("dino_vit_tiny")
    vit = dino.VisionTransformer(32, 8, 48, 2, 3).eval()
    vit.load_state_dict(test_golden.golden("dino_vit_tiny_weights")[0]["state_dict"])
    with torch.no_grad():
        features = LastBlocks(vit, 2, True)(x["x24x40"])
        test_golden.close(features[:, :48], y["x24x40"]["intermediate_n2"][0][:, 0], atol=1e-5)
        test_golden.close(features[:, 48:96], y["x24x40"]["cls"], atol=1e-5)
        test_golden.close(features[:, 96:], pictures.attention_and_features(vit, x["x24x40"])[1].mean((1, 2)), atol=1e-5)
    assert not vit.blocks[0]._forward_hooks


class Blocks(nn.Module):
    """LastBlocks of two blocks of two channels: what is of use is in the mean of the patches alone."""

    def forward(self, x):
        colour = x.mean((2, 3))
        return torch.cat([torch.zeros(len(x), 6), 20 * colour], dim=1)


@pytest.mark.parametrize("cached", [True, False])
def test_grid_chooses_kind_and_rate(cached):
    args = Args(grid=True, cached=cached, blocks=2, train_batch=32, epochs=5, workers=0)
    out, head, base_lr = linear_probe(Blocks(), Toy(130), Toy(61, first=900), VIEW, CPU, args, batch_size=16)
    assert out["top1"] == 100 and head.in_features in (6, 9) and base_lr in probes.GRID_LRS
    again, same, _ = linear_probe(Blocks(), Toy(130), Toy(61, first=900), VIEW, CPU, args, batch_size=16)
    assert torch.equal(head.weight, same.weight) and again == out


def test_grid_is_dinov2s():
    """Four kinds of features unless --blocks 1 leaves two; the cosine moves in each step; crops are bicubic."""
    assert [len(probes.grid(n, 6 * (n + 1), [0.1, 0.2])) for n in (1, 2, 4)] == [4, 8, 8]
    assert len(set(probes.grid(1, 12, probes.GRID_LRS))) == 26
    assert [probes.block_count(Args(**flags)) for flags in ({}, {"grid": True}, {"grid": True, "blocks": 1})] == [1, 4, 1]
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 16, 5, generator=g), torch.randint(0, 4, (6, 16), generator=g)
    passes = [step / 3 for step in range(6)]
    for grid in (True, False):
        head = fit_heads(zip(passes, x, y), 5, 4, [0.5], Args(epochs=2, grid=grid), CPU)[0]
        other = nn.Linear(5, 4)
        other.weight.data = 0.01 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
        other.bias.data.zero_()
        optimizer = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6 if grid else 2)  # DINOv2: of all iterations
        for step in range(6):
            optimizer.zero_grad()
            F.cross_entropy(other(x[step]), y[step]).backward()
            optimizer.step()
            if grid or step % 3 == 2:
                schedule.step()
        torch.testing.assert_close(head.weight, other.weight)
        torch.testing.assert_close(head.bias, other.bias)
    image = decode(Toy(1)[0].image)
    bilinear, bicubic = (probes.ProbeView(VIEW, *kind).crop(image, random.Random(0)) for kind in ((), ("bicubic",)))
    assert not torch.equal(bilinear, bicubic)


def test_batches_count_their_passes():
    x, y = torch.arange(10.0)[:, None], torch.arange(10)
    found = [passes for passes, _, _ in probes.cached_batches(x, y, 4, Args(epochs=2))]
    assert found == [0, 0.5, 1, 1.5]
    loader = Loader(Toy(10), {"image": probes.ProbeView(VIEW)}, {}, 4)
    found = [passes for passes, _, _ in probes.augmented_batches(Pixels(), loader, Args(epochs=2))]
    assert found == [0, 0.5, 1, 1.5]
    loader = Loader(Toy(10, broken=True), {"image": probes.ProbeView(VIEW)}, {}, 4)
    with pytest.raises(UserError, match="2 samples of toy are bad, over 1% of an epoch"):
        list(probes.augmented_batches(Pixels(), loader, Args(epochs=2)))


def test_augmented_batches_count_what_has_no_label(capsys):
    class Partly(Toy):
        labelled = 5

        def __getitem__(self, i):
            sample = super().__getitem__(i)
            return sample if i < self.labelled else sample._replace(label=-1)

    dataset = Partly(8)
    list(probes.augmented_batches(Pixels(), Loader(dataset, {"image": probes.ProbeView(VIEW)}, {}, 4), Args(epochs=2)))
    assert capsys.readouterr().err.count("toy, epoch 1: 3 of 8 samples have no label\n") == 1
    dataset.labelled = 0
    with pytest.raises(UserError, match="toy has no labels"):
        list(probes.augmented_batches(Pixels(), Loader(dataset, {"image": probes.ProbeView(VIEW)}, {}, 4), Args(epochs=2)))


def test_kept_features_say_once_what_is_left_out(tmp_path, capsys):
    """Also where one of the eight samples that give the file its name cannot be read, or none of them can."""

    class Partly(Toy):
        unreadable = {0}

        def __getitem__(self, i):
            return super().__getitem__(i)._replace(image=b"broken") if i in self.unreadable else super().__getitem__(i)

    dataset = Partly(40)
    for _ in range(2):  # made, and read again
        features, _ = cached_extract(Pixels(), dataset, VIEW, CPU, str(tmp_path))
        said = capsys.readouterr().err
        assert len(features) == 39 and said.count("left out") == 1 and "left out 1 of 40 samples" in said
    assert len(list(tmp_path.iterdir())) == 1
    dataset.unreadable = {i * 39 // 7 for i in range(8)}
    features, _ = cached_extract(Pixels(), dataset, VIEW, CPU, str(tmp_path))
    assert len(features) == 32 and "left out 8 of 40 samples" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1  # without them nothing tells one dataset from another


@pytest.mark.parametrize("room, workers", [(True, 1), (False, 0)])
def test_evaluations_in_the_loop_need_room_for_workers(room, workers, monkeypatch):
    seen = []
    monkeypatch.setattr(knn_module, "has_shm", lambda size: seen.append(size) or room)
    monkeypatch.setattr(knn_module, "extract", lambda *args, **options: seen.append(options["workers"]) or (torch.eye(3), torch.arange(3)))
    knn_eval(Pixels(), Toy(3), Toy(3), VIEW, CPU, workers=1)
    assert seen == [3 * 256 * 3 * VIEW.size**2, workers, workers]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes cannot be copied")
def test_workers_of_an_evaluation_are_copies():
    """Whatever Python's default is, which in 3.14 became forkserver: to that, data would have to be pickled."""

    class Local(Toy):
        """Of a function, so that it cannot be pickled."""

    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        features, labels = extract(Pixels(), Local(20), VIEW, CPU, batch_size=5, workers=1)
    finally:
        multiprocessing.set_start_method(before, force=True)
    alone = extract(Pixels(), Local(20), VIEW, CPU, batch_size=5)
    assert len(labels) == 20 and torch.equal(features, alone[0]) and torch.equal(labels, alone[1])


def test_a_table_hides_no_setting():
    text = table({"run": {"top1": 51.234, "base_lr": 0.001, "C": 10**-3.125, "alpha": 0.0, "images": 20000}})
    assert text.splitlines()[1].split() == ["run", "51.23", "0.001", "0.00075", "0.00", "20,000"]


@pytest.mark.parametrize("cached", [True, False])
def test_linear_probe_separates(cached):
    net = Pixels().train()
    args = Args(cached=cached, train_batch=32, epochs=20, base_lr=8.0, workers=0)
    out, head, base_lr = linear_probe(net, Toy(130), Toy(61, first=900), VIEW, CPU, args, batch_size=16)
    assert out["top1"] == 100 and net.training
    again, same, _ = linear_probe(net, Toy(130), Toy(61, first=900), VIEW, CPU, args, batch_size=16)
    assert torch.equal(head.weight, same.weight) and again == out
    assert base_lr in probes.LRS or not cached


def test_nothing_is_chosen_on_the_test_split():
    """With the test labels mixed up, the rate that suits the test split best is another one: it must not be taken."""

    class Mixed(Toy):
        def __getitem__(self, i):
            sample = super().__getitem__(i)
            return sample._replace(label=(sample.label + 1) % 3)

    class Faint(Pixels):  # so faint that the small rates of LRS learn too little
        def forward(self, x):
            return 0.2 * super().forward(x)

    args, train = Args(cached=True, train_batch=32, epochs=2), Toy(130)
    right = linear_probe(Faint(), train, Toy(60, first=900), VIEW, CPU, args)
    wrong = linear_probe(Faint(), train, Mixed(60, first=900), VIEW, CPU, args)
    assert wrong[2] == right[2] > probes.LRS[0] and torch.equal(wrong[1].weight, right[1].weight)
    assert right[0]["top1"] == 100 and wrong[0]["top1"] == 0


# ------------------------------------------------ command line ------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """simclr/checkpoint.pt and clip/checkpoint.pt, untrained; `classes` with labels and `captions` with captions."""
    root = tmp_path_factory.mktemp("evaluate")
    for name in ("simclr", "clip"):
        module = runs.module_of(name)
        args = module.parse_args(module.Args, module.RECIPES, runs.FLAGS[name])
        torch.manual_seed(1)
        saved = {"method": name, "args": vars(args), "model": module.build_model(args).state_dict(), "step": 3}
        if name == "clip":
            tokenizer = Tokenizer("train", args.context_length, ["a red thing", "a green thing"] * 99, args.vocab_size)
            saved["tokenizer"] = tokenizer.to_json()
        (root / name).mkdir()
        torch.save(saved, root / name / "checkpoint.pt")
    for split, n in (("train", 40), ("val", 11)):
        rows = []
        for i, sample in enumerate(Toy(n, first=n)[i] for i in range(n)):
            picture = root / "classes" / split / Toy.classes[sample.label] / f"{i}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(sample.image).save(picture)
            rows.append({"image": str(picture.relative_to(root)), "captions": sample.captions})
        (root / "captions").mkdir(exist_ok=True)
        text = "".join(json.dumps({**row, "image": "../" + row["image"]}) + "\n" for row in rows)
        (root / "captions" / f"{split}.jsonl").write_text(text)
    torch.save({"weights": 1}, root / "other.pt")
    torch.save({"method": "os.path", "args": {}, "model": {}}, root / "method.pt")
    torch.save({**saved, "model": {**saved["model"], "logit_scale": torch.zeros(7)}}, root / "shape.pt")
    (root / "text").write_text("a photo\n")
    (root / "names").write_text("red | crimson\ngreen\nblue\n")
    return root


FLAGS = ["--device", "cpu", "--workers", "0", "--batch-size", "4", "--epochs", "2"]
LINEAR = ["--train-batch", "8"]


def run(folder, protocol, *words, data="classes"):
    """main() in this process -> the lines it appended."""
    first = [i for i, word in enumerate(words) if word.startswith("-")][:1] or [len(words)]
    paths, flags = [str(folder / w) for w in words[: first[0]]], words[first[0] :]
    before = {p: len(results(p)) for p in paths}
    main([protocol, *paths, "--data", str(folder / data), *FLAGS, *flags])
    return [line for p in paths for line in results(p)[before[p] :]]


def results(path):
    file = (Path(path) if Path(path).is_dir() else Path(path).parent) / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_samples_without_a_label_are_counted(folder, tmp_path, capsys):
    """And a line that a kill cut off stays one of its own."""
    shutil.copytree(folder / "simclr", tmp_path / "simclr")
    (tmp_path / "simclr/results.jsonl").write_text('{"protocol": "knn", "cut')
    pictures = sorted((folder / "classes").rglob("*.png"))[:6]
    (tmp_path / "set").mkdir()
    for split, names in (("train", ["red", "green", "green", "Green"] * 2), ("val", ["red", "green", "gren"])):
        rows = "".join(f"{path},{name}\n" for path, name in zip(pictures * 2, names))
        (tmp_path / "set" / f"{split}.csv").write_text("image,label\n" + rows)
    (tmp_path / "set/classnames.txt").write_text("red\ngreen\n")
    main(["knn", str(tmp_path / "simclr"), "--data", str(tmp_path / "set"), "--k", "3", *FLAGS])
    said = capsys.readouterr().err
    assert "set: 2 of 8 samples have no label" in said and "set: 1 of 3 samples have no label" in said
    lines = (tmp_path / "simclr/results.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["protocol"] == "knn"


def test_commands(folder, tmp_path, capsys):
    knn, clip = run(folder, "knn", "simclr", "clip/checkpoint.pt", "--random", "--k", "3")
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 6 and table[1].split() == ["top1", "chance"]
    assert table[3].split() == [
        f"{folder}/simclr,",
        *"random weights of seed 0".split(),
        *(f"{x:.2f}" for x in knn["random weights"].values()),
    ]
    assert knn["protocol"] == "knn" and knn["split"] == "val" and knn["method"] == "simclr" and knn["step"] == 3
    assert knn["metrics"]["top1"] > 60 and "--k 3" in knn["command"] and knn["versions"]["torch"] == torch.__version__
    assert clip["method"] == "clip" and clip["checkpoint"].endswith("checkpoint.pt")
    (zeroshot,) = run(
        folder, "zeroshot", "clip", "--json", "--classnames", str(folder / "names"), "--templates", "cifar10"
    )
    assert json.loads(capsys.readouterr().out) == zeroshot and zeroshot["metrics"].keys() == {
        "top1",
        "mean_per_class",
        "chance",
    }
    (retrieval,) = run(folder, "retrieval", "clip", data="captions")
    assert len(retrieval["metrics"]) == 8 and retrieval["metrics"]["chance@1"] == 100 / 11
    capsys.readouterr()
    run(folder, "knn", "simclr", "--k", "1000", "--no-cache")
    assert "--k 1000 is more than the 40 labelled samples of classes: all of them vote" in capsys.readouterr().err
    (sweep,) = run(folder, "knn", "simclr", "--k", "1,3", "--temperature", "0.07,1", "--no-cache")
    assert list(sweep["metrics"]) == ["top1_k1_T0.07", "top1_k1_T1", "top1_k3_T0.07", "top1_k3_T1", "chance"]
    assert sweep["metrics"]["top1_k3_T0.07"] == knn["metrics"]["top1"]
    assert len(list((folder / "simclr").glob("features_*.pt"))) == 4  # both splits, trained and random; not the last one's
    capsys.readouterr()
    (logreg,) = run(folder, "logreg", "simclr", "--random")
    sets = f": 40 train images and 11 val images of {folder}/classes"
    assert capsys.readouterr().err.splitlines() == [f"logreg of {folder}/simclr{w}{sets}" for w in ("", ", random weights of seed 0")]
    assert logreg["metrics"].keys() == {"top1", "mean_per_class", "chance", "C"} and logreg["metrics"]["top1"] > 60
    assert len(list((folder / "simclr").glob("features_*.pt"))) == 4  # taken from there
    assert run(folder, "logreg", "clip", "--C", "0.316")[0]["metrics"]["C"] == 0.316
    cached, plain = run(folder, "linear", "simclr", "--cached", *LINEAR), run(folder, "linear", "simclr", *LINEAR)
    assert capsys.readouterr().err.count(f"linear of {folder}/simclr: 2 epochs of 40 train images and 11 val") == 2
    assert cached[0]["metrics"]["base_lr"] in probes.LRS and plain[0]["metrics"]["base_lr"] == 0.1
    deeper = run(folder, "knn", "simclr", "--head-layer", "1")
    assert deeper[0]["metrics"].keys() == {"top1", "chance"}
    for split, name in itertools.product(("train", "val"), "abcde"):
        (tmp_path / split / name).mkdir(parents=True)
        shutil.copy(next((folder / "classes").rglob("*.png")), tmp_path / split / name)
    (five,) = run(folder, "knn", "simclr", "--no-cache", "--k", "3", data=tmp_path)
    assert list(five["metrics"]) == ["top1", "top5", "chance"]  # from five classes on


def test_a_recipe_is_found_under_a_folder_of_the_user(monkeypatch):
    """A shell leaves ~ in --data=~/photos as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    for word in ("--data=~/photos", "--data=/home/me/photos"):
        assert parse_args(Args, {"/home/me/photos": {"train_batch": 7}}, [word]).train_batch == 7


def test_class_names_between_bars(tmp_path):
    file, classes = tmp_path / "names", types.SimpleNamespace(name="x", classes=["a", "b"])
    file.write_text("tabby_cat|kitten|\n dog \n")
    assert chosen_names(classes, Args(classnames=str(file))) == [["tabby cat", "kitten"], ["dog"]]
    file.write_text("cat\n|\n")
    with pytest.raises(UserError, match="has a line without a name"):
        chosen_names(classes, Args(classnames=str(file)))


def test_class_names_for_labels_without_any(folder, tmp_path):
    """A labelled table needs no classnames.txt where --classnames names its labels, which may be numbers or these names."""
    pictures = sorted((folder / "classes/val").rglob("*.png"))
    names = sorted({path.parent.name for path in pictures})
    for kind in ("number", "name"):
        labels = [path.parent.name if kind == "name" else names.index(path.parent.name) for path in pictures]
        rows = "".join(f"{path},{label}\n" for path, label in zip(pictures, labels))
        (tmp_path / f"{kind}.csv").write_text("image,label\n" + rows)
    (tmp_path / "names").write_text("\n".join(names))
    shown = []
    for data in ("number.csv", "name.csv", None):
        where = str(tmp_path / data) if data else str(folder / "classes")
        argv = ["zeroshot", str(folder / "clip"), "--data", where, "--classnames", str(tmp_path / "names"), *FLAGS]
        main([*argv, "--split", "train"] if data else argv)
        shown.append(results(folder / "clip")[-1]["metrics"])
    assert shown[0] == shown[1] == shown[2]
    (tmp_path / "names").write_text("\n".join(names[:2]))
    with pytest.raises(UserError, match="number.csv has the label 2, but only 2 classes"):
        main(["zeroshot", str(folder / "clip"), "--data", str(tmp_path / "number.csv"), "--classnames", str(tmp_path / "names"),
              "--split", "train", *FLAGS])  # fmt: skip
    with pytest.raises(UserError, match="zeroshot needs classes: number.csv has labels but its classnames.txt is missing, see"):
        main(["zeroshot", str(folder / "clip"), "--data", str(tmp_path / "number.csv"), "--split", "train", *FLAGS])
    lack = f"zeroshot needs classes: labels such as '.*' are no numbers: list the names in {tmp_path}/classnames.txt"
    with pytest.raises(UserError, match=lack):
        main(["zeroshot", str(folder / "clip"), "--data", str(tmp_path / "name.csv"), "--split", "train", *FLAGS])


def test_rows_before_an_error_are_shown(folder, capsys):
    """Of a checkpoint that cannot be opened; one that is not there ends the command before anything is computed."""
    with pytest.raises(UserError, match="not written by one of our method files"):
        run(folder, "knn", "simclr", "other.pt", "--k", "3")
    assert capsys.readouterr().out.splitlines()[2].startswith(f"{folder}/simclr")
    with pytest.raises(UserError, match="there is no checkpoint at"):
        run(folder, "knn", "simclr", "nowhere", "--k", "3")
    assert capsys.readouterr().out == ""


def test_tokenizer_of_published_weights(folder, tmp_path):
    """One that --tokenizer names, or the merges in --data-dir."""
    saved = torch.load(folder / "clip/checkpoint.pt", weights_only=True)
    torch.save(saved["model"], tmp_path / "ViT.pt")
    (tmp_path / "own.json").write_text(saved["tokenizer"])
    argv = ["zeroshot", str(tmp_path / "ViT.pt"), "--data", str(folder / "classes"), *FLAGS]
    main([*argv, "--tokenizer", str(tmp_path / "own.json")])
    merges = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    merges.write_bytes(gzip.compress(b"title\na b\n"))
    main([*argv, "--tokenizer", str(merges)])
    main([*argv, "--data-dir", str(tmp_path)])
    own, named, found = (line["metrics"] for line in results(tmp_path / "ViT.pt"))
    assert named == found and own.keys() == named.keys()
    many = gzip.compress("\n".join(["title", *(f"{a} {b}" for a in "abcdefghij" for b in "klmnopqrstu")]).encode())
    merges.write_bytes(many)
    with pytest.raises(UserError, match="own with --tokenizer"):
        main([*argv, "--data-dir", str(tmp_path)])


def test_weights_are_loaded_or_random(folder):
    saved = torch.load(folder / "simclr/checkpoint.pt", weights_only=True)["model"]
    loaded, drawn, again = (
        open_network(folder / "simclr", CPU, 0, r).model.state_dict() for r in (False, True, True)
    )
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert all(torch.equal(drawn[name], again[name]) for name in saved)
    assert not torch.equal(loaded["backbone.conv1.weight"], drawn["backbone.conv1.weight"])
    net = open_network(folder / "simclr", CPU)  # one image by itself is not normalised by its own statistics
    assert not net.model.training and not net.encoder.training


def test_splits_of_different_classes_are_told_apart(folder, tmp_path):
    """A class folder that the val split lacks would shift all labels behind it."""
    shutil.copytree(folder / "classes", tmp_path / "fold")
    shutil.rmtree(tmp_path / "fold/val" / Toy.classes[1])
    for split, sentence in (("val", rf"train and val of fold differ in their classes \({Toy.classes[1]}\): give both the same"),
                            ("train", "knn needs a --split other than train$")):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            main(["knn", str(folder / "simclr"), "--data", str(tmp_path / "fold"), "--split", split, *FLAGS])


ERRORS = [
    ("nothing clip", "use: evaluate.py zeroshot"),
    ("knn", "use: evaluate.py zeroshot"),
    ("knn clip --k 0", "must be above 0"),
    ("knn clip --k 1,x", "numbers with commas"),
    ("knn clip --k 2.5", "numbers with commas"),
    ("knn clip --temperature 0.1,inf", "must be above 0 and finite"),
    ("knn clip --tempratur 1", "did you mean --temperature"),
    ("knn clip --split train", "other than train"),
    ("knn clip --data nowhere", "nowhere"),
    ("knn clip --data captions", "needs classes"),
    ("knn clip --head-layer 1", "no --head-layer"),
    ("knn simclr --head-layer 9", "head layer 9"),
    ("retrieval clip", "needs captions"),
    ("retrieval simclr --data captions", "language-image checkpoint"),
    ("zeroshot simclr", "language-image checkpoint"),
    ("zeroshot clip --templates text", "needs {} in every line"),
    ("zeroshot clip --templates nowhere", "cannot be read"),
    ("zeroshot clip --classnames text", "has 1 lines, not 3"),
    ("zeroshot clip --classnames clip/checkpoint.pt", "cannot be read as text"),
    ("knn nowhere", "no checkpoint"),
    ("knn text", "text"),
    ("knn other.pt", "not written by one of our method files"),
    ("knn method.pt", "not beside evaluate.py"),
    ("zeroshot shape.pt", "does not fit clip.py"),
    ("linear simclr", "classes has 40 samples, less than a batch of 1024: lower --train-batch"),
    ("knn simclr nowhere", "there is no checkpoint at"),
    ("logreg simclr --split train", "other than train"),
    ("linear simclr --grid", "need a transformer with 4 blocks"),
    ("linear simclr --blocks 4", "need a transformer with 4 blocks and timm's names, not simclr's resnet10"),
    ("linear simclr --lr-steps 6O", "must be epochs"),
]


@pytest.mark.parametrize("words, sentence", ERRORS)
def test_mistakes_are_sentences(folder, words, sentence):
    where = ("clip", "simclr", "captions", "nowhere", "text", "other.pt", "method.pt", "shape.pt", "clip/checkpoint.pt")
    argv = [str(folder / w) if w in where else w for w in words.split()]
    data = [] if "--data" in argv else ["--data", str(folder / "classes")]
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        main([*argv, *data, "--device", "cpu", "--workers", "0"])
    assert "\n" not in str(error.value)


# ------------------------------------------------ two processes ------------------------------------------------
def collective():
    """What has to be the same on any number of processes: odd numbers, broken images, fewer batches than processes."""
    options = {"view": VIEW, "device": CPU}
    out = {"features": [x.tolist() for x in extract(Net(), Toy(23, broken=True), **options, batch_size=5)]}
    out["one"] = [x.tolist() for x in extract(Net(), Toy(23), **options, indices=[7])]
    out["language"] = language_eval(Net(), Letters(), Toy(31, broken=True), **options, batch_size=4, workers=1)
    out["knn"] = knn_eval(Net(), Toy(41), Toy(17, first=500), **options, k=5, batch_size=3)
    out["ridge"] = linear_eval(Net(), Toy(41), Toy(17, first=500), **options, batch_size=3)
    probe = [Args(train_batch=16, epochs=3, base_lr=4.0, workers=0), Args(train_batch=16, epochs=3, cached=True)]
    heads = [linear_probe(Net(), Toy(50), Toy(21, first=900), args=args, **options)[1].weight for args in probe]
    args = Args(grid=True, blocks=2, train_batch=16, epochs=3, workers=0)
    scores, head, base_lr = linear_probe(Blocks(), Toy(50), Toy(21, first=900), args=args, **options)
    out["grid"] = [scores, base_lr, head.in_features]
    return {**out, "augmented": heads[0].tolist(), "cached": heads[1].tolist()}


def protocols(folder):
    lines = run(folder, "knn", "simclr", "clip") + run(folder, "zeroshot", "clip", "--random")
    lines += run(folder, "retrieval", "clip", data="captions") + run(folder, "linear", "simclr", "--cached")
    lines += run(folder, "logreg", "simclr", "--no-cache") + run(folder, "linear", "simclr", *LINEAR)
    return [{key: line[key] for key in ("metrics", "random weights") if key in line} for line in lines]


def test_world_size(server, folder):
    done = server.together("tests/test_evaluate.py", folder)
    assert done.stderr.count("left out 4 of 23") == 1
    both, one = json.loads((folder / "out.json").read_text()), json.loads(json.dumps(collective()))
    torch.testing.assert_close(
        torch.tensor(both.pop("augmented")), torch.tensor(one.pop("augmented")), atol=1e-5, rtol=1e-4
    )
    assert both.pop("protocols") == protocols(folder)
    assert both == one


def test_flags_for_others_weights_do_nothing_to_ours_and_say_so(folder, capsys):
    run(folder, "knn", "simclr", "--k", "3", "--random")
    assert "not used" not in capsys.readouterr().err
    run(folder, "knn", "simclr", "--k", "3", "--heads", "2", "--gelu", "exact", "--random")
    run(folder, "zeroshot", "clip", "--text-heads", "2", "--tokenizer", "clip")
    said = [line for line in capsys.readouterr().err.splitlines() if line.endswith("not used")]
    assert said == [f"{folder}/simclr is of this project and holds these settings: --heads, --gelu not used",
                    f"{folder}/clip is of this project and holds these settings: --text-heads, --tokenizer not used"]  # fmt: skip


def test_mistake_ends_with_status_2(server, folder):
    done = server.run("evaluate.py", "knn", folder / "other.pt", "--data", folder / "classes")
    assert done.returncode == 2 and done.stderr.startswith("evaluate.py: error: ") and done.stderr.count("\n") == 1


def test_views_of_different_sizes_in_one_picture(tmp_path):
    class Halved:
        mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    red = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1)
    images = {"small": red.expand(9, 3, 32, 32), "large": red.expand(9, 3, 150, 150)}
    drawn.save_views(tmp_path, images, dict.fromkeys(images, Halved()))
    page = np.asarray(Image.open(tmp_path / "views.png"))
    assert page.shape == (2 * 14 + 132 + 154, 8 * 152 + 2, 3)  # 32 px are enlarged four times, borders of 2
    assert (page[14 + 66, 66] == (255, 0, 0)).all() and (page[-77, -77] == (255, 0, 0)).all()
    assert (page[:14, :40] < 128).any()  # a name


if __name__ == "__main__":
    with user_errors():
        init_distributed("cpu")
        root = Path(sys.argv[1])
        result = {**collective(), "protocols": protocols(root)}
        if rank() == 0:
            (root / "out.json").write_text(json.dumps(result))
