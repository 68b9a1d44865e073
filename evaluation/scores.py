"""The scores of a classifier, whatever it is: prompts, a probe or a fine-tuned network."""

import torch

from monitor import chunks, hit_rank, percent


def classification_metrics(logits, labels):
    """logits (N, C), labels (N,) -> dict in percent. top1; from five classes on top5 and
    mean_top1_top5 (Kinetics); mean_per_class, the mean recall of the classes that occur (SLIP's is
    NaN when an absent class is predicted); with two classes roc_auc of logit 1 - logit 0."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    ranks = [hit_rank(x, y[:, None] == classes) for x, y in chunks(len(classes), logits, labels)]
    ranks, labels = torch.cat(ranks), labels.cpu()
    out = {"top1": percent(ranks < 1)}
    if len(classes) >= 5:
        out["top5"] = percent(ranks < 5)
        out["mean_top1_top5"] = (out["top1"] + out["top5"]) / 2
    count = torch.bincount(labels, minlength=len(classes)).double()
    hits = torch.bincount(labels[ranks < 1], minlength=len(classes)).double()
    out["mean_per_class"] = 100 * (hits / count)[count > 0].mean().item()
    if len(classes) == 2 and count.min() > 0:
        out["roc_auc"] = roc_auc((logits[:, 1] - logits[:, 0]).cpu(), labels == 1)
    return out


def roc_auc(scores, positive):
    """(N,), (N,) bool -> percent of the pairs of a positive and a negative in which the positive
    has the larger score; ties count half."""
    _, place, same = scores.unique(return_inverse=True, return_counts=True)
    # ranks are counted from 1, and equal scores share the mean of theirs
    mean_rank = (same.cumsum(0) - (same - 1) / 2).double()[place]
    n = positive.sum().double()
    wins = mean_rank[positive].sum() - n * (n + 1) / 2  # Mann-Whitney U
    return 100 * (wins / (n * (len(scores) - n))).item()
