"""Linear classifiers on frozen features: heads trained by SGD, and logistic regression solved by
Newton's method.

Letters: N samples, D width of a feature, C classes, b rows of a batch.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common import LARS, UserError, all_gather, mixed_precision
from data import Loader, hflip, random_resized_crop
from evaluation.features import NamedSubset, cached_extract, refuse_small
from evaluation.scores import classification_metrics
from monitor import bar, evaluating, labelled, say_without

LRS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # base learning rates that --cached tries
# base learning rates that --grid tries, those of DINOv2's code
GRID_LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1)
CHUNK = 2**23  # logits of the logistic regression that are held at a time


# -------------------------------------------- batches of features ---------------------------------
class ProbeView:
    """The training view of linear probes since MoCo: a crop of 8 to 100% of the area, resized, and
    a flip. MoCo, SLIP and DINO resize bilinearly, DINOv2 bicubically."""

    def __init__(self, view, interpolation="bilinear"):
        self.size, self.view, self.interpolation = view.size, view, interpolation

    def crop(self, image, rng):
        scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
        return random_resized_crop(image, rng, self.size, scale, ratio, self.interpolation)

    def sample(self, rng):
        return {"flip": rng.random() < 0.5}

    def __call__(self, x, params):
        return self.view(hflip(x, params["flip"]), {})


def cached_batches(features, labels, batch_size, args):
    """Shuffled batches of extracted features: passes over the data before this batch, (b, D), (b,).
    An incomplete last batch is left out."""
    generator = torch.Generator().manual_seed(args.seed)
    for epoch in bar(range(args.epochs), "linear probe, epochs"):
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        whole = len(order) // batch_size * batch_size
        for first in range(0, whole, batch_size):
            rows = order[first : first + batch_size]
            yield epoch + first / whole, features[rows], labels[rows]


def augmented_batches(encoder, loader, args):
    """Features of freshly augmented images: passes over the data before this batch, (B, D), (B,).
    Every process yields the whole global batch, so that all train the same head. Says after the
    first epoch how many samples have no label, and raises UserError if all lack one."""
    steps, missing = args.epochs * loader.steps_per_epoch, 0
    for step, batch in bar(loader.batches(0, steps), "linear probe, steps", steps):
        x = batch["image"]
        with evaluating(encoder), torch.no_grad(), mixed_precision(args.dtype, x.device)[0]:
            features = encoder(x).float()
        labels = all_gather(batch["label"])
        missing += (labels < 0).sum()
        yield step / loader.steps_per_epoch, all_gather(features), labels
        if (step + 1) % loader.steps_per_epoch == 0:
            loader.check_bad()
        if step + 1 == loader.steps_per_epoch:
            seen = (step + 1) * len(labels)
            if missing == seen:
                raise UserError(f"{loader.dataset.name} has no labels")
            say_without("label", f"{loader.dataset.name}, epoch 1", int(missing), seen)


# -------------------------------------------- heads by SGD ----------------------------------------
def fit_heads(batches, dim, num_classes, lrs, args, device, columns=None):
    """Trains one linear classifier per learning rate, all on the same batches -> list of nn.Linear.

    batches yields passes over the data before this batch, features (b, dim), labels (b,). The
    optimizer is SGD with momentum 0.9 or, with --lars, LARS (SimSiam). The rate follows half a
    cosine to 0, which moves once per epoch (MoCo v3, SLIP, DINO) or, with --grid, in each step
    (DINOv2). With --lr-steps it falls to a tenth after each of these epochs instead (MoCo).
    columns: for each head the range of features that it sees (default: all). All heads start from
    the same random weights."""
    columns = columns or [(0, dim)] * len(lrs)
    start = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(args.seed))
    heads = [nn.utils.skip_init(nn.Linear, b - a, num_classes, device=device) for a, b in columns]
    for head, (a, b) in zip(heads, columns):
        head.weight.data.copy_(start[:, a:b] * (0.0 if args.zero_init else 0.01))
        head.bias.data.zero_()
    groups = [{"params": head.parameters(), "lr": lr} for head, lr in zip(heads, lrs)]
    if args.lars:
        optimizer = LARS(groups, momentum=0.9, weight_decay=args.weight_decay)
    else:
        options = {"nesterov": args.nesterov, "weight_decay": args.weight_decay}
        optimizer = torch.optim.SGD(groups, momentum=0.9, **options)
    steps = [int(word) for word in args.lr_steps.split(",")] if args.lr_steps else []
    for passes, x, y in batches:
        if steps:
            share = 0.1 ** sum(passes >= step for step in steps)
        else:
            place = passes if args.grid else math.floor(passes)
            share = 0.5 * (1 + math.cos(math.pi * place / args.epochs))
        for group, lr in zip(optimizer.param_groups, lrs):
            group["lr"] = lr * share
        optimizer.zero_grad()
        losses = []
        for head, (a, b) in zip(heads, columns):
            losses.append(F.cross_entropy(head(x[:, a:b]), y, ignore_index=-1))
        sum(losses).backward()  # no parameter is shared: each head gets its own loss's gradient
        optimizer.step()
    return heads


def block_count(args):
    """How many last blocks give their class tokens to the probe: DINOv2's --grid has 4."""
    return args.blocks or (4 if args.grid else 1)


def grid(n, dim, lrs):
    """DINOv2's heads on the features of LastBlocks(vit, n, average=True) -> [(lr, range of
    columns)]. Each rate is tried on the last class token and on those of all n blocks, without and
    with the mean of the patches. With one block these are two kinds of features, not four."""
    width = dim // (n + 1)
    starts = [(n - 1) * width, 0] if n > 1 else [0]
    columns = [(first, end) for first in starts for end in (n * width, dim)]
    return [(lr, part) for part in columns for lr in lrs]


def split_off_tenth(n, seed):
    """n samples -> indices of a random tenth, on which a setting may be chosen, and of the
    others."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[: n // 10], order[n // 10 :]


def linear_probe(encoder, train_set, test_set, view, device, args, **options):
    """Collective. A linear classifier on frozen features -> (test scores, head, base_lr).

    As in MoCo v3, it is trained on crops and flips with lr = base_lr * batch / 256. With
    args.cached it is trained on features of the evaluation view that are extracted once.

    args.cached chooses among LRS, args.grid among GRID_LRS and kinds of features, by the scores on
    a held-out tenth of the train split. Afterwards cached trains on all of the train split, and
    grid takes the head as it is. The head counts as it is after the last epoch: nothing is ever
    chosen on the test split.

    args: the flags of evaluate.py; for SimCLR's probe nesterov, weight_decay 1e-6, zero_init and
    batch 4096, for MoCo's lr_steps, for SimSiam's lars. options: those of cached_extract."""

    def features_of(dataset):
        extracted = cached_extract(encoder, dataset, view, device, **options)
        return [x.to(device) for x in labelled(dataset, *extracted)]

    def loader_of(dataset):
        refuse_small(dataset, batch)
        return Loader(dataset, {"image": probe_view}, {}, batch, args.seed, args.workers, device)

    test_x, test_y = features_of(test_set)
    dim, num_classes = test_x.shape[1], len(train_set.classes)
    probe_view = ProbeView(view, "bicubic" if args.grid else "bilinear")
    batch = args.train_batch

    base_lrs, columns = [args.base_lr], [(0, dim)]
    if args.grid:
        base_lrs, columns = zip(*grid(block_count(args), dim, GRID_LRS))
    elif args.cached:
        base_lrs, columns = LRS, [(0, dim)] * len(LRS)

    if args.cached:
        x, y = features_of(train_set)
        if len(y) < 10:
            few = f"{train_set.name} has only {len(y)} labels"
            raise UserError(f"{few}, too few to choose a learning rate")
        held_out, rest = split_off_tenth(len(y), args.seed)
        batch = min(batch, len(rest))
        batches = cached_batches(x[rest], y[rest], batch, args)
        held_x, held_y = x[held_out], y[held_out]
    elif args.grid:
        held_out, rest = split_off_tenth(len(train_set), args.seed)
        loader = loader_of(NamedSubset(train_set, rest.tolist()))
        batches = augmented_batches(encoder, loader, args)
        held_x, held_y = features_of(NamedSubset(train_set, held_out.tolist()))
    else:
        batches = augmented_batches(encoder, loader_of(train_set), args)

    lrs = [base_lr * batch / 256 for base_lr in base_lrs]
    heads = fit_heads(batches, dim, num_classes, lrs, args, device, columns)
    best = 0
    if len(heads) > 1:
        scores = []
        for head, (a, b) in zip(heads, columns):
            scores.append(classification_metrics(head(held_x[:, a:b]).detach(), held_y)["top1"])
        best = scores.index(max(scores))
    head, (a, b) = heads[best], columns[best]
    if args.cached and not args.grid:
        batches = cached_batches(x, y, batch, args)
        (head,) = fit_heads(batches, dim, num_classes, [lrs[best]], args, device)
    return classification_metrics(head(test_x[:, a:b]).detach(), test_y), head, base_lrs[best]


# -------------------------------------------- logistic regression ---------------------------------
class PrincipalAxes(NamedTuple):
    """Features (N, D) without their mean along their R = min(N, D) principal axes."""

    x: torch.Tensor  # (N, R)
    variances: torch.Tensor  # (R,)
    mean: torch.Tensor  # (D,)
    directions: torch.Tensor  # (D, R)


def principal_axes(x) -> PrincipalAxes:
    """x (N, D), which stays as it is."""
    mean, n = x.mean(0), len(x)
    if n < x.shape[1]:
        left, sizes, directions = torch.linalg.svd(x - mean, full_matrices=False)
        return PrincipalAxes(left * sizes, sizes.square() / n, mean, directions.T)
    variances, directions = torch.linalg.eigh(x.T @ x / n - torch.outer(mean, mean))
    along = (x @ directions).sub_(mean @ directions)
    return PrincipalAxes(along, variances.clamp_min(0), mean, directions)


def logistic_regression(x, y, C, num_classes, tolerance=1e-9, max_iter=200):
    """x (N, D) float64 or its PrincipalAxes, y (N,) -> function from (M, D) to logits (M,
    num_classes).

    Finds the minimum of C sum_i CE(w x_i + b, y_i) + |w|^2 / 2, as scikit-learn's
    LogisticRegression(C=C) does, and holds CHUNK logits at a time. A class without a sample is
    never predicted, as in scikit-learn: its offset b, which has no penalty, would go to minus
    infinity. It stops once no number of the gradient of the mean loss is above the tolerance,
    which is scikit-learn's criterion (its default: 1e-4).

    Features of networks have variances that differ by orders of magnitude, and L-BFGS takes
    hundreds of steps for them. Here w is sought along the principal axes of x, where the second
    derivative is nearly diagonal, by Newton's method. Each of its steps minimises the quadratic
    approximation by conjugate gradients, preconditioned with that diagonal, and only as exactly as
    it is worth (inexact Newton, Nocedal and Wright, Numerical Optimization, Sec. 7.1)."""
    axes = x if isinstance(x, PrincipalAxes) else principal_axes(x)
    present, y = y.unique(return_inverse=True)
    classes, n = len(present), len(axes.x)
    if classes == 2:
        C = C / 2  # for two classes scikit-learn has one w, the difference of our two
    parts = axes.x.split(max(1, CHUNK // classes))
    targets = y.split(max(1, CHUNK // classes))
    one = torch.ones_like(axes.variances[:1])  # the last coordinate is the offset
    variances = torch.cat([axes.variances, one])
    penalty = torch.cat([one.expand_as(axes.variances) / (C * n), 0 * one])

    def logits_of(v, part):
        return torch.addmm(v[:, -1], part, v[:, :-1].T)

    def gradient(part, errors):
        """That by the logits of some rows -> that by the coordinates."""
        return torch.cat([errors.T @ part, errors.sum(0)[:, None]], dim=1) / n

    def loss_at(v):
        loss = (v.square() * penalty).sum() / 2
        for part, labels in zip(parts, targets):
            loss = loss + F.cross_entropy(logits_of(v, part), labels, reduction="sum") / n
        return loss

    def slope_at(v):
        """-> gradient, mean curvature of the logits, probabilities of the last part."""
        slope, curvature = v * penalty, 0.0
        for part, labels in zip(parts, targets):
            p = logits_of(v, part).softmax(1)
            curvature += (p * (1 - p)).sum() / (n * classes)
            slope = slope + gradient(part, p - F.one_hot(labels, classes).to(p))
        return slope, curvature, p

    def hessian_times(q, v, p):
        """The second derivative at v, times q. p: the probabilities at v if there is one part."""
        out = q * penalty
        for part in parts:
            if len(parts) > 1:  # all of them together would take too much memory
                p = logits_of(v, part).softmax(1)
            change = p * logits_of(q, part)
            change -= p * change.sum(1, keepdim=True)
            out = out + gradient(part, change)
        return out

    v = axes.x.new_zeros(classes, len(variances))
    loss = loss_at(v)
    for _ in range(max_iter):
        slope, curvature, p = slope_at(v)
        inverse = 1 / (curvature * variances + penalty).clamp_min(1e-12)
        size = (slope.square() * inverse).sum().sqrt()
        if slope.abs().max() < tolerance:
            break
        step, rest, way = torch.zeros_like(v), -slope, -slope * inverse
        length, limit = (rest * way).sum(), min(0.1, size.sqrt()) * size
        for _ in range(100):  # conjugate gradients
            turned = hessian_times(way, v, p)
            share = length / (way * turned).sum()
            step, rest = step + share * way, rest - share * turned
            before, length = length, (rest.square() * inverse).sum()
            if length.sqrt() < limit:
                break
            way = inverse * rest + length / before * way
        share, wanted = 1.0, 1e-4 * (slope * step).sum()
        while share > 1e-6 and (found := loss_at(v + share * step)) > loss + share * wanted:
            share /= 2
        if share <= 1e-6:  # only rounding is left
            break
        v, loss = v + share * step, found
    w = v[:, :-1] @ axes.directions.T
    b = v[:, -1] - w @ axes.mean

    def logits(features):
        out = features.new_full((len(features), num_classes), -math.inf)
        out[:, present] = features @ w.T + b
        return out

    return logits


def best_exponent(score):
    """CLIP's search for C = 10^exponent (App. A.3) between -6 and 6 in steps of 1/8: first seven
    values, then four times the two neighbours of the best one, at half the distance each time.
    score(exponent) -> accuracy. Of equal scores the smaller exponent is taken, which is the
    stronger penalty."""
    scores = {e: score(e) for e in (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)}
    for step in (1.0, 0.5, 0.25, 0.125):
        best = min(scores, key=lambda e: (-scores[e], e))
        scores |= {e: score(e) for e in (best - step, best + step) if -6 <= e <= 6}
    return min(scores, key=lambda e: (-scores[e], e))
