"""Accuracy while training without captions: the vote of the k nearest neighbours. monitor.py has the
features, and says what "Collective" means.

Letters: N training and M validation samples, D width of a feature, b rows of a batch."""

import torch
import torch.nn.functional as F

from common import UserError
from monitor import EvalView  # noqa: F401, so that a method finds all it needs here
from monitor import MOST, chunks, evaluation_set, extract, hit_rank, labelled, percent
from monitor import say_evaluation, subset_indices, what_classes_lack

BANK = 5000  # training images among which an evaluation looks for neighbours


def nearest(queries, bank, k):
    """(b, D) and (N, D), unit vectors -> cosines (b, k) in float64 and rows of the bank (b, k), on
    the CPU, the most similar first; of equal ones the smaller row first."""
    cosine = queries @ bank.T  # (b, N)
    kth = cosine.topk(k).values[:, -1:]
    above, equal = cosine > kth, cosine == kth
    # topk does not say which of equal ones it takes; here the first of them fill up the k
    missing = k - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))
    rows = chosen.nonzero()[:, 1].view(-1, k)
    cosine, rows = cosine.gather(1, rows).cpu().double(), rows.cpu()
    cosine, order = cosine.sort(dim=1, descending=True, stable=True)
    return cosine, rows.gather(1, order)


@torch.no_grad()
def knn_sweep(bank, bank_labels, queries, query_labels, ks, temperatures, num_classes=None):
    """Weighted k-nearest-neighbour vote (DINO eval_knn.py; arXiv 1805.01978) for several k and
    temperatures, with one search for neighbours -> {(k, temperature): (top1, top5)} in percent.

    (N, D), (N,), (M, D), (M,) on one device. The k rows of the bank with the largest cosine vote
    for their class with weight exp(cosine / temperature). As in DINO, top5 counts the first min(5,
    k) classes, also those without a vote. Equal cosines and equal votes rank in the order of their
    index."""
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    bank_labels, query_labels = bank_labels.cpu(), query_labels.cpu()
    num_classes = num_classes or int(max(bank_labels.max(), query_labels.max())) + 1
    most = min(max(ks), len(bank))
    ranks = {(k, temperature): [] for k in ks for temperature in temperatures}
    for query, label in chunks(max(len(bank), num_classes), queries, query_labels):
        cosine, rows = nearest(query, bank, most)
        classes = bank_labels[rows]  # (b, most)
        right = label[:, None] == torch.arange(num_classes)
        for k, temperature in ranks:
            # relative to the largest cosine, so that no weight is infinite
            weight = ((cosine[:, :k] - cosine[:, :1]) / temperature).exp()
            votes = weight.new_zeros(len(query), num_classes)
            votes.scatter_add_(1, classes[:, :k], weight)
            # sums in float64, rounded to float32: equal votes stay equal in any order of addition
            ranks[k, temperature].append(hit_rank(votes.float(), right))
    out = {}
    for (k, temperature), parts in ranks.items():
        found_at, few = torch.cat(parts), min(5, k, len(bank))
        out[k, temperature] = percent(found_at < 1), percent(found_at < few)
    return out


def knn(bank, bank_labels, queries, query_labels, k=20, temperature=0.07, num_classes=None):
    """knn_sweep for one k and one temperature -> (top1, top5) in percent."""
    found = knn_sweep(bank, bank_labels, queries, query_labels, [k], [temperature], num_classes)
    return found[k, temperature]


# -------------------------------------------- in the training loop --------------------------------
def knn_sets(args):
    """-> the train and the val split for knn_eval, or None for both. Says which of the two it is.
    Raises UserError if the splits have different classes, which would pair wrong labels."""
    bank = evaluation_set(args, "train")
    val = evaluation_set(args) if bank else None
    if not val:
        return None, None
    for dataset in (bank, val):
        if lack := what_classes_lack(dataset):
            say_evaluation(f"none, because {lack}")
            return None, None
    if bank.classes != val.classes:
        odd = sorted(set(bank.classes) ^ set(val.classes))[:3] or ["their order"]
        raise UserError(f"train and val of {val.name} differ in their classes ({', '.join(odd)}): "
                        "give both the same ones, or use other --eval-data")  # fmt: skip
    sizes = f"{min(MOST, len(val)):,} validation images among {min(BANK, len(bank)):,} training images"
    say_evaluation(f"kNN of {sizes} of {val.name}")
    return bank, val


def knn_eval(encoder, train_set, val_set, view, device, k=20, temperature=0.07,
             max_train=BANK, max_val=MOST, **options):  # fmt: skip
    """Collective. -> {"knn_top1", "knn_top5", "knn_chance"}, or {} without classes. It is quick
    because it takes fixed subsets of both splits (0: all). options: those of `extract`."""
    if not (train_set and val_set and train_set.classes and val_set.classes):
        return {}
    inputs = []
    for dataset, most in ((train_set, max_train), (val_set, max_val)):
        indices = subset_indices(dataset, most)
        features, labels = extract(encoder, dataset, view, device, indices=indices, **options)
        inputs += [x.to(device) for x in labelled(dataset, features, labels)]
    top1, top5 = knn(*inputs, k, temperature, len(train_set.classes))
    return {"knn_top1": top1, "knn_top5": top5, "knn_chance": 100 / len(train_set.classes)}
