"""Linear classifiers on frozen features: heads trained by SGD, and logistic regression solved by L-BFGS.

Everything here is a function of tensors. Letters: N samples, D width of a feature, C classes, b rows.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common import LARS

CHUNK = 2**23  # logits that are held at a time


# -------------------------------------------- features of several blocks --------------------------
class LastBlocks(nn.Module):
    """Images -> (b, n D): class tokens of a transformer's last n blocks, each after the last norm, the last
    one at the end; average: (b, (n + 1) D), then the mean of its patches (linear probes of DINO and DINOv2;
    DINO's weights want the two interleaved)."""

    def __init__(self, vit, n, average):
        super().__init__()
        self.vit, self.n, self.average = vit, n, average

    def forward(self, x):
        outs = []
        last = self.vit.blocks[-self.n :]
        hooks = [block.register_forward_hook(lambda module, args, out: outs.append(out)) for block in last]
        try:
            self.vit(x)
        finally:
            for hook in hooks:
                hook.remove()
        tokens = [self.vit.norm(out) for out in outs]
        patch = self.vit.patch_embed.proj.kernel_size[0]
        patches = x.shape[2] // patch * (x.shape[3] // patch)  # registers, where there are some, are none
        return block_features(tokens, patches, self.average)


def block_features(tokens, patches, average):
    """tokens: (b, N, D) of each block, class token first, the last `patches` tokens being the patches."""
    parts = [t[:, 0] for t in tokens] + ([tokens[-1][:, -patches:].mean(1)] if average else [])
    return torch.cat(parts, dim=1)


def grid(n, dim, lrs):
    """DINOv2's heads on LastBlocks(vit, n, True) -> [(lr, range of features)]: each rate on the last class
    token, on those of all n blocks, and on either of these with the mean of the patches."""
    width = dim // (n + 1)
    parts = [(a, b) for a in ((n - 1) * width, 0) for b in (n * width, dim)]
    return [(lr, part) for part in parts for lr in lrs]


# -------------------------------------------- heads by SGD --------------------------------------------
def fit_heads(batches, dim, num_classes, lrs, args, device, parts=None):
    """One linear classifier per learning rate, all on the same batches: epoch, features (b, dim), labels
    (b,). SGD, momentum 0.9, rate on half a cosine per epoch to 0 (MoCo v3, SLIP) or, with --lr-steps, a tenth
    after each of these (MoCo); --lars instead of SGD (SimSiam). parts: for each the range of features that it
    sees (default: all). Equal starts. -> nn.Linear each."""
    parts = parts or [(0, dim)] * len(lrs)
    start = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(args.seed))
    heads = [nn.utils.skip_init(nn.Linear, b - a, num_classes, device=device) for a, b in parts]
    for head, (a, b) in zip(heads, parts):
        head.weight.data.copy_(start[:, a:b] * (0.0 if args.zero_init else 0.01))
        head.bias.data.zero_()
    groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(heads, lrs)]
    if args.lars:
        optimizer = LARS(groups, momentum=0.9, weight_decay=args.weight_decay)
    else:
        options = {"nesterov": args.nesterov, "weight_decay": args.weight_decay}
        optimizer = torch.optim.SGD(groups, momentum=0.9, **options)
    steps = [int(word) for word in args.lr_steps.split(",")] if args.lr_steps else None
    for epoch, x, y in batches:
        falls = 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
        if steps:
            falls = 0.1 ** sum(epoch >= step for step in steps)
        for group, lr in zip(optimizer.param_groups, lrs):
            group["lr"] = lr * falls
        optimizer.zero_grad()
        losses = (F.cross_entropy(head(x[:, a:b]), y, ignore_index=-1) for head, (a, b) in zip(heads, parts))
        sum(losses).backward()  # no parameter is shared
        optimizer.step()
    return heads


# -------------------------------------------- logistic regression -------------------------------------------
def logistic_regression(x, y, C, num_classes, max_iter=1000):
    """x (N, D) float64, y (N,) -> function from (M, D) to logits (M, num_classes).

    The minimum of C sum_i CE(w x_i + b, y_i) + |w|^2 / 2, scikit-learn's LogisticRegression(C=C), by L-BFGS
    from 0, in as much memory as CHUNK logits need. The offset b is not penalised, and classes without a
    sample would drive it to minus infinity: as in scikit-learn they are never predicted."""
    present, y = y.unique(return_inverse=True)
    C = C / 2 if len(present) == 2 else C  # of two classes scikit-learn has one w, the difference of ours
    w = torch.zeros(len(present), x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    b = torch.zeros(len(present), dtype=x.dtype, device=x.device, requires_grad=True)
    size = max(1, CHUNK // len(present))
    optimizer = torch.optim.LBFGS([w, b], max_iter=max_iter, max_eval=2 * max_iter, tolerance_grad=1e-9,
                                  tolerance_change=0.0, line_search_fn="strong_wolfe")  # fmt: skip

    def objective():  # divided by C N, so that the tolerance means the same for all C
        optimizer.zero_grad()
        total = w.square().sum() / (2 * C * len(x))
        total.backward()
        for rows, labels in zip(x.split(size), y.split(size)):
            loss = F.cross_entropy(rows @ w.T + b, labels, reduction="sum") / len(x)
            loss.backward()
            total = total + loss
        return total.detach()

    optimizer.step(objective)
    w, b = w.detach(), b.detach()

    def logits(features):
        out = features.new_full((len(features), num_classes), -math.inf)
        out[:, present] = features @ w.T + b
        return out

    return logits


def best_exponent(score):
    """CLIP's search (App. A.3) among 10^-6 to 10^6, eight steps to a factor of ten: seven values first, then
    the two beside the best one at half the distance, four times. score(exponent) -> number; of equal ones the
    smaller exponent, which is the stronger penalty."""
    scores = {e: score(e) for e in (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)}
    for step in (1.0, 0.5, 0.25, 0.125):
        best = min(scores, key=lambda e: (-scores[e], e))
        scores |= {e: score(e) for e in (best - step, best + step) if -6 <= e <= 6}
    return min(scores, key=lambda e: (-scores[e], e))
