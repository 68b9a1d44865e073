"""The protocols of evaluate.py: one function each, which says whose protocol it follows.

A protocol takes the opened network, the train split (None where it needs none), the split that is
reported on, the flags of evaluate.py and the options of knn.extract. It returns its scores in
percent, the headline first."""

import importlib
import math
import re
import sys
from pathlib import Path

import torch

from common import UserError, rank
from evaluation import finetune, robustness
from evaluation.features import LastBlocks, NamedSubset, cached_extract
from evaluation.probes import best_exponent, block_count, linear_probe, logistic_regression
from evaluation.probes import principal_axes, split_off_tenth
from evaluation.scores import classification_metrics
from knn import extract, knn_sweep
from monitor import TEMPLATES, labelled, language_scores
from sources import SHIFTED

# The score that is quoted for a dataset where that is not top1 (SLIP eval_zeroshot.py)
METRIC = dict.fromkeys(["aircraft", "pets", "caltech101", "flowers"], "mean_per_class")
METRIC |= {"kinetics700": "mean_top1_top5", "hateful_memes": "roc_auc"}


# -------------------------------------------- flags --------------------------------------------
def read_lines(path, flag) -> list[str]:
    """The lines of a text file that are not empty. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path} cannot be read as text ({error})") from error
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise UserError(f"{flag} {path} is empty")
    return found


def parse_numbers(text, kind=float) -> list:
    """ "10,20" -> [10, 20]. Raises UserError unless all are above 0."""
    try:
        found = [kind(word) for word in text.split(",")]
    except ValueError as error:
        message = f"--k and --temperature are numbers with commas between them, not {text}"
        raise UserError(message) from error
    if not all(0 < x < math.inf for x in found):
        raise UserError(f"--k and --temperature must be above 0 and finite, not {text}")
    return found


def headline_first(metrics, dataset):
    """classification_metrics with the score first that is quoted for this dataset."""
    headline = METRIC.get(dataset, "top1")
    if headline not in metrics:
        headline = "top1"
    metrics = {headline: metrics[headline], **metrics}
    if headline != "mean_top1_top5":
        metrics.pop("mean_top1_top5", None)
    return metrics


# -------------------------------------------- language and image ----------------------------------
def open_clip_lists(flag):
    """The module of an installed open_clip that has OpenAI's prompts and names for ImageNet."""
    try:
        return importlib.import_module("open_clip.zero_shot_metadata")
    except ImportError as error:
        raise UserError(f"{flag} open_clip takes the lists of that package: "
                        "`pip install open_clip_torch`, or give a file") from error  # fmt: skip


def chosen_templates(args):
    """The prompts that --templates asks for, None for those of the dataset. Raises UserError."""
    templates = TEMPLATES.get(args.templates)
    if args.templates == "open_clip":
        functions = open_clip_lists("--templates").OPENAI_IMAGENET_TEMPLATES
        templates = [function("{}") for function in functions]
    elif args.templates and not templates:
        templates = read_lines(args.templates, "--templates")
    if not all("{}" in template for template in templates or []):
        stands = "needs {} in every line, it stands for the class"
        raise UserError(f"--templates {args.templates} {stands}")
    return templates


def chosen_names(test, args):
    """The names of a dataset's classes, or those that --classnames asks for, which also become the
    classes of a dataset that has labels alone. Raises UserError."""
    names = test.classes
    if args.classnames == "open_clip":
        names = list(open_clip_lists("--classnames").IMAGENET_CLASSNAMES)
        test.classes = test.classes or names
        if test.name in SHIFTED and len(test.classes) < len(names):
            groups = robustness.groups_of(test, len(names), args)
            if any(len(group) != 1 for group in groups):
                raise UserError(f"{test.name} has other classes than ImageNet: use robustness")
            names = [names[group[0]] for group in groups]
    elif args.classnames:
        lines = read_lines(args.classnames, "--classnames")
        lines = [[word.strip() for word in line.split("|") if word.strip()] for line in lines]
        if not all(lines):  # synonyms of each class
            raise UserError(f"--classnames {args.classnames} has a line without a name")
        test.classes = test.classes or [synonyms[0] for synonyms in lines]
        names = [[word.replace("_", " ") for word in synonyms] for synonyms in lines]
    elif all(re.fullmatch(r"n\d{8}|\d+", name) for name in names):
        kind = "numbers" if names[0].isdecimal() else "WordNet ids"
        raise UserError(
            f"the classes of {args.data} are {kind}, give names with --classnames FILE"
        )
    if len(names) != len(test.classes):
        counts = f"has {len(names)} lines, not {len(test.classes)}"
        raise UserError(f"--classnames {args.classnames} {counts}")
    return names


def zeroshot(net, train, test, args, options):
    """CLIP Sec. 3.1: the class whose prompts are most similar to the image."""
    names, templates = chosen_names(test, args), chosen_templates(args)
    options = {**options, "classnames": names, "templates": templates}
    (logits, labels), _, _ = language_scores(net.model, net.tokenizer, test, **options)
    metrics = headline_first(classification_metrics(logits, labels), test.name)
    chance = 50.0 if next(iter(metrics)) == "roc_auc" else 100 / len(names)
    return {**metrics, "chance": chance}


def robust(net, train, test, args, options):
    """Zero-shot accuracy on ImageNet's other test sets beside that on ImageNet (CLIP Sec. 3.3)."""
    names = chosen_names(test, args)
    templates = chosen_templates(args) or TEMPLATES["imagenet"]
    return robustness.robustness(net, test, args, options, names, templates)


class Prefixed:
    """A dataset with a text before each caption."""

    def __init__(self, dataset, prefix):
        self.dataset, self.prefix, self.name = dataset, prefix, dataset.name

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        sample = self.dataset[i]
        captions = [self.prefix + caption for caption in sample.captions if caption.strip()]
        return sample._replace(captions=captions)


def retrieval(net, train, test, args, options):
    """Images by captions and captions by images, as on Flickr30k and COCO (monitor.recall), with
    --prefix before each caption."""
    data = Prefixed(test, args.prefix) if args.prefix else test
    _, metrics, images = language_scores(net.model, net.tokenizer, data, captions=True, **options)
    if not metrics:
        raise UserError(f"{test.name} has no captions")
    return {"mean_recall": metrics.pop("mean_recall"), **metrics, "chance@1": 100 / len(images)}


# -------------------------------------------- frozen features -------------------------------------
def knn(net, train, test, args, options):
    """DINO's vote of the nearest neighbours (knn.knn_sweep). One k and one temperature give
    top1 and, from five classes on, top5; several give the top1 of each pair, and none of them is
    chosen."""
    inputs = []
    for dataset in (train, test):
        inputs += labelled(dataset, *cached_extract(net.encoder, dataset, **options))
    inputs = [x.to(options["device"]) for x in inputs]
    ks, temperatures = parse_numbers(args.k, int), parse_numbers(args.temperature)
    if max(ks) > len(inputs[0]) and rank() == 0:
        few = f"the {len(inputs[0])} labelled samples of {train.name}"
        print(f"--k {max(ks)} is more than {few}: all of them vote", file=sys.stderr)
    found = knn_sweep(*inputs, ks, temperatures, len(train.classes))
    if len(found) == 1:
        (top1, top5), *_ = found.values()
        metrics = {"top1": top1, "top5": top5}
        if len(train.classes) < 5:  # each image would be a hit
            del metrics["top5"]
    else:
        metrics = {f"top1_k{k}_T{t:g}": top1 for (k, t), (top1, _) in found.items()}
    return {**metrics, "chance": 100 / len(train.classes)}


def linear(net, train, test, args, options):
    """A linear classifier trained by SGD (probes.linear_probe)."""
    encoder, n = net.encoder, block_count(args)
    if args.grid or n > 1 or args.average:
        if len(getattr(encoder, "blocks", ())) < n:
            raise UserError("--grid, --blocks and --average need a transformer with "
                            f"{n} blocks and timm's names, not {net.method}'s "
                            f"{net.arch}")  # fmt: skip
        encoder = LastBlocks(encoder, n, args.average or args.grid)
    metrics, _, base_lr = linear_probe(encoder, train, test, args=args, **options)
    metrics = headline_first(metrics, test.name)
    return {**metrics, "chance": 100 / len(test.classes), "base_lr": base_lr}


def logreg(net, train, test, args, options):
    """CLIP's logistic regression (App. A.3). Unless --C sets it, C is chosen on a held-out tenth of
    the train split. The last fit is on all of the train split."""
    device, num_classes = options["device"], len(train.classes)
    double = torch.float32 if device.type == "mps" else torch.float64
    inputs = []
    for dataset in (train, test):
        features, labels = labelled(dataset, *cached_extract(net.encoder, dataset, **options))
        inputs += [features.to(device, double), labels.to(device)]
    x, y, test_x, test_y = inputs
    C = args.C
    if not C:
        if len(y) < 10:
            raise UserError(f"{train.name} has only {len(y)} labels, too few to choose --C")
        C = chosen_C(x, y, num_classes, args.seed)
    predict = logistic_regression(x, y, C, num_classes)
    metrics = headline_first(classification_metrics(predict(test_x), test_y), test.name)
    return {**metrics, "chance": 100 / num_classes, "C": C}


def chosen_C(x, y, num_classes, seed):
    """The best on a held-out tenth. A function of its own, as the others' axes take as much memory
    as features and are not needed any more."""
    held_out, rest = (part.to(x.device) for part in split_off_tenth(len(y), seed))
    axes = principal_axes(x[rest])

    def score(exponent):
        predict = logistic_regression(axes, y[rest], 10**exponent, num_classes, tolerance=1e-4)
        return classification_metrics(predict(x[held_out]), y[held_out])["top1"]

    return 10 ** best_exponent(score)


# -------------------------------------------- the whole network -----------------------------------
def fine_tuned(net, train, test, args, options):
    """Trains the whole network, with all labels or with the share --labels of them, and scores it
    as it is after the last epoch. loss: its mean over that epoch. The trained network is kept as
    net.tuned."""
    if args.labels:
        indices = finetune.labelled_part(train, args.labels, args.seed).nonzero().flatten().tolist()
        train = NamedSubset(train, indices, f"{100 * args.labels:g}% of {train.name}")
    num_classes, device = len(train.classes), options["device"]
    net.tuned, rows = finetune.fine_tune(net.encoder, train, net.view, num_classes, args, device)
    metrics = classification_metrics(*labelled(test, *extract(net.tuned, test, **options)))
    rest = {"loss": rows[-1]["loss"], "chance": 100 / len(test.classes), "images": len(train)}
    return {**headline_first(metrics, test.name), **rest}


PROTOCOLS = {"zeroshot": zeroshot, "retrieval": retrieval, "knn": knn, "linear": linear}
PROTOCOLS |= {"robustness": robust, "logreg": logreg, "finetune": fine_tuned, "semi": fine_tuned}
