"""Accuracy while training without captions: the vote of the k nearest neighbours, or a linear
classifier. monitor.py has the features, and says what "Collective" means.

Letters: N training and M validation samples, D width of a feature, C classes, b rows of a batch."""

import functools
import os

import torch
import torch.nn.functional as F

from common import UserError
from data import at_most_cores, has_shm, processes_here
from monitor import MOST, chunks, evaluation_set, extract_features, hit_rank, labelled, percent
from monitor import rank_scores, say_evaluation, some_images, subset_indices, what_classes_lack

BANK = 5000  # training images among which an evaluation looks for neighbours
PENALTY = 0.01  # of the linear classifier, see ridge


def extract(encoder, dataset, view, device, **options):
    """Collective. monitor.extract_features of images alone -> features (n, D) float32 and labels
    (n,), on the CPU, in order of the index. encoder: module, float images (b, 3, S, S) -> (b, D);
    options: dtype="fp32", batch_size=256, workers=0, indices=None (all)."""
    return extract_features(encoder, encoder, dataset, view, device, **options)[:2]


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


# -------------------------------------------- linear classifier --------------------------------
def ridge(features, labels, num_classes, penalty=PENALTY):
    """A linear classifier by ridge regression, in closed form: (N, D), (N,) -> mean (D,), weight
    (D, C) and bias (C,) of scores (x / |x| - mean) @ weight + bias, float64 on the CPU.

    W minimises |X W - Y|^2 + lambda |W|^2: X (N, D) unit vectors less their mean, Y (N, C) 1 for
    the class of a row and 0 elsewhere, less the share of each class, which is the bias. lambda is
    `penalty` times the mean eigenvalue of X^T X, and thereby does not depend on N and D."""
    x = F.normalize(features.cpu().double(), dim=1)
    y = F.one_hot(labels.cpu(), num_classes).double()
    mean, bias = x.mean(0), y.mean(0)
    x = x - mean
    gram = x.T @ x  # (D, D)
    scale = gram.diagonal().mean().clamp(min=1e-12)  # 0 if all features are the same
    gram.diagonal().add_(penalty * scale)
    weight = torch.cholesky_solve(x.T @ (y - bias), torch.linalg.cholesky(gram))
    return mean, weight, bias


@torch.no_grad()
def linear(bank, bank_labels, queries, query_labels, num_classes):
    """`ridge` of the bank, (N, D) and (N,), tried on queries, (M, D) and (M,) -> (top1, top5) in
    percent. Like knn, top5 counts the first 5 classes; equal scores rank in the classes' order."""
    mean, weight, bias = ridge(bank, bank_labels, num_classes)
    scores = (F.normalize(queries.cpu().double(), dim=1) - mean) @ weight + bias
    # rounded to float32: equal scores stay equal in any order of addition
    ranks = hit_rank(scores.float(), query_labels.cpu()[:, None] == torch.arange(num_classes))
    return percent(ranks < 1), percent(ranks < 5)


# -------------------------------------------- in the training loop --------------------------------
def probe_sets(args, dataset=None):
    """-> what measures accuracy while training, knn_eval or linear_eval as --probe says, and the
    train and the val split it is called with, or None for all three. Says which of the two it is.
    dataset: the train split of --data, which an --eval-data of a single file is compared with too.
    Raises UserError if the splits have different classes, which would pair wrong labels."""
    one_file = os.path.isfile(args.eval_data)
    if one_file and os.path.realpath(args.eval_data) == os.path.realpath(args.data):
        raise UserError("--eval-data is the file of --data, in which every image would be its own "
                        "neighbour: give images that are not trained on")  # fmt: skip
    apart = args.eval_data and not one_file  # it has a train split of its own
    bank = evaluation_set(args, "train", None if apart else dataset)
    val = evaluation_set(args) if bank else None
    if not val:
        return None, None, None
    for dataset in (bank, val):
        if lack := what_classes_lack(dataset):
            say_evaluation(f"none, because {lack}")
            return None, None, None
    refuse_other_classes(bank, val, "val", "or use other --eval-data")
    tested = some_images(min(MOST, len(val)), "validation")
    known = f"{some_images(min(BANK, len(bank)), 'training')} of {bank.name}"
    if args.probe == "linear":
        say_evaluation(f"linear classifier of {tested}, fitted to {known}")
        return functools.partial(linear_eval, workers=args.workers), bank, val
    say_evaluation(f"kNN of {tested} among {known}")
    return functools.partial(knn_eval, workers=args.workers), bank, val


def refuse_other_classes(train, test, split, advice):
    """Raises UserError if a split has other classes than the train split: labels count classes."""
    if train.classes != test.classes:
        odd = sorted({*(train.classes or ())} ^ {*(test.classes or ())})[:3] or ["their order"]
        differ = f"train and {split} of {test.name} differ in their classes ({', '.join(odd)})"
        raise UserError(f"{differ}: give both the same ones, {advice}")


def workers_with_room(workers, view):
    """At most as many workers for `extract` as there are cores; none if /dev/shm may lack room."""
    workers = at_most_cores(workers)
    batch = 256 * 3 * view.size**2  # bytes
    held = 3 * batch * workers * processes_here()  # up to three for each worker
    return workers if has_shm(held) else 0


def probe_features(encoder, train_set, val_set, view, device, max_train=BANK, max_val=MOST,
                   **options):  # fmt: skip
    """Collective. -> features and labels of fixed subsets of both splits (0: all), which makes an
    evaluation quick: bank (N, D), (N,), queries (M, D), (M,) on the device. options: those of
    `extract`."""
    options["workers"] = workers_with_room(options.get("workers", 0), view)
    inputs = []
    for dataset, most in ((train_set, max_train), (val_set, max_val)):
        indices = subset_indices(dataset, most)
        features, labels = extract(encoder, dataset, view, device, indices=indices, **options)
        inputs += [x.to(device) for x in labelled(dataset, features, labels)]
    return inputs


def knn_eval(encoder, train_set, val_set, view, device, k=20, temperature=0.07, **options):
    """Collective. -> {"knn_top1", "knn_top5", "knn_chance"} and rank_scores of the validation
    images; top5 from five classes on. options: those of `probe_features`."""
    inputs = probe_features(encoder, train_set, val_set, view, device, **options)
    classes = len(train_set.classes)
    top1, top5 = knn(*inputs, k, temperature, classes)
    scores = {"knn_top1": top1, "knn_top5": top5, "knn_chance": 100 / classes}
    if classes < 5:  # each image would be a hit
        del scores["knn_top5"]
    return scores | rank_scores(inputs[2])


def linear_eval(encoder, train_set, val_set, view, device, **options):
    """Collective. knn_eval's twin for --probe linear -> {"linear_top1", "linear_top5",
    "linear_chance"} and rank_scores of the validation images."""
    inputs = probe_features(encoder, train_set, val_set, view, device, **options)
    classes = len(train_set.classes)
    top1, top5 = linear(*inputs, classes)
    scores = {"linear_top1": top1, "linear_top5": top5, "linear_chance": 100 / classes}
    if classes < 5:
        del scores["linear_top5"]
    return scores | rank_scores(inputs[2])
