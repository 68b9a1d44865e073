"""ImageNet's classes on other pictures: how far a zero-shot classifier falls from ImageNet to its
test sets of another kind, beside ImageNet itself on the same classes.

    imagenet-v2      1,000 classes, folders 0 to 999 in the order of ImageNet's classes
    imagenet-sketch  1,000 classes, folders are WordNet ids
    imagenet-r       200 classes, folders are WordNet ids
    imagenet-a       200 classes, folders are WordNet ids
    objectnet        113 of 313 classes, each of which stands for one or more of ImageNet's

ImageNet's classes are in the order of their WordNet ids, everywhere. Letters: N images, C classes
of ImageNet, E width of an embedding."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from common import UserError, mixed_precision, rank
from data import open_dataset
from layouts import CLASS_LISTS, class_names
from monitor import evaluating, extract_features, labelled, percent, zeroshot_weights
from sources import SHIFTED

BORDER = 2  # pixels that are cut from each side of ObjectNet's pictures, which have a red frame


# -------------------------------------------- classes --------------------------------------------
def wordnet_ids(dataset, root):
    """ImageNet's WordNet ids in the order of its labels: from its class folders, or from a list of
    ids beside it. Empty if there is neither."""
    folders = getattr(dataset, "folders", None) or dataset.classes
    if all(str(name).startswith("n") and str(name)[1:].isdigit() for name in folders):
        return list(folders)
    return listed_ids(root)


def listed_ids(root):
    """The WordNet ids in a folder's list of classes, in their order, empty without such a list."""
    for path in (Path(root) / name for name in CLASS_LISTS):
        if path.is_file():
            found = class_names(path)
            if isinstance(found, dict):
                return sorted(found)
    return []


def imagenet_classes(name, dataset, ids, count, root):
    """-> for each class of one of SHIFTED, the list of ImageNet's classes that it stands for, empty
    for one that ImageNet does not have. Raises UserError."""
    folders = getattr(dataset, "folders", None)
    if not folders:
        raise UserError(f"{name} must be a folder with a folder of images for each class")
    if name == "objectnet":
        return objectnet_classes(folders, count, root)
    if all(folder.isdecimal() for folder in folders):
        groups = [[int(folder)] for folder in folders]
    elif not ids:
        raise UserError(f"the classes of {name} are WordNet ids, whose order imagenet does not "
                        f"tell: put {CLASS_LISTS[1]} into its folder")  # fmt: skip
    else:
        unknown = [folder for folder in folders if folder not in ids]
        if unknown:
            raise UserError(f"{name} has {len(unknown)} class folders that ImageNet does not have, "
                            f"{unknown[0]} for one")  # fmt: skip
        groups = [[ids.index(folder)] for folder in folders]
    if any(not 0 <= i < count for group in groups for i in group):
        raise UserError(f"{name} has a class folder above {count - 1}, the last one of ImageNet")
    return groups


def groups_of(dataset, count, args):
    """imagenet_classes of a named set, with the order of ImageNet's classes from the folder of the
    dataset called imagenet."""
    imagenet = place_of("imagenet", args)
    try:
        ids = wordnet_ids(open_dataset("imagenet", args.data_dir, "val"), imagenet)
    except UserError:
        ids = listed_ids(imagenet)
    return imagenet_classes(dataset.name, dataset, ids, count, place_of(dataset.name, args))


def objectnet_classes(folders, count, root):
    """By the files of ObjectNet's archive: mappings/folder_to_objectnet_label.json names each
    folder, mappings/objectnet_to_imagenet_1k.json has for 113 names ImageNet's, with semicolons
    between them, as mappings/imagenet_to_label_2012_v2 lists these in the order of their ids."""
    place = Path(root) / "mappings"
    try:
        names = json.loads((place / "folder_to_objectnet_label.json").read_text("utf-8"))
        to_imagenet = json.loads((place / "objectnet_to_imagenet_1k.json").read_text("utf-8"))
        lines = (place / "imagenet_to_label_2012_v2").read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"objectnet needs its archive's folder mappings ({error})") from error
    order = {line.strip(): i for i, line in enumerate(lines)}
    groups = []
    for folder in folders:
        wanted = to_imagenet.get(names.get(folder, folder), "")
        parts = [part.strip() for part in wanted.split(";") if part.strip()]
        missing = [part for part in parts if order.get(part, count) >= count]
        if missing:
            raise UserError(f"objectnet's {folder} stands for {missing[0]}, which is in no line of "
                            f"{place / 'imagenet_to_label_2012_v2'}")  # fmt: skip
        groups.append([order[part] for part in parts])
    return groups


# -------------------------------------------- scores ---------------------------------------------
def owners(groups, classes):
    """Lists of ImageNet's classes -> (classes,): the list that a class stands in, -1 if in none."""
    owner = torch.full((classes,), -1)
    for place, group in enumerate(groups):
        owner[group] = place
    return owner


def grouped_hits(logits, labels, groups):
    """logits (n, C), labels (n,) index `groups`, lists of ImageNet's classes -> (n,) bool: whether
    the highest logit among the classes of all groups belongs to a sample's own group."""
    owner = owners(groups, logits.shape[1])
    outside = (owner < 0).to(logits.device)
    return owner[logits.masked_fill(outside, -torch.inf).argmax(1).cpu()] == labels.cpu()


def compare(logits, labels, groups, imagenet_logits, imagenet_labels):
    """-> top-1 accuracy in percent on a set, on ImageNet's images of the same classes among the
    same classes, and the second minus the first. Raises UserError if one of the two has no images
    of these classes."""
    known = torch.tensor([bool(group) for group in groups])[labels]
    owner = owners(groups, imagenet_logits.shape[1])
    same = owner[imagenet_labels.cpu()]
    if not known.any() or not (same >= 0).any():
        raise UserError("no image has a class that ImageNet's images have too")
    on_set = percent(grouped_hits(logits[known], labels[known], groups))
    hits = grouped_hits(imagenet_logits[same >= 0], same[same >= 0], groups)
    return on_set, percent(hits), percent(hits) - on_set


class WithoutBorder:
    """A view of images without their outermost pixels."""

    def __init__(self, view, border):
        self.view, self.border, self.size = view, border, view.size

    def crop(self, image, rng=None):
        inner = slice(self.border, -self.border)
        return self.view.crop(image[:, inner, inner], rng)

    def __call__(self, x, params=None):
        return self.view(x, params)


def robustness(net, imagenet, args, options, names, templates):
    """Collective. Every set of SHIFTED that is there, beside ImageNet -> {set: {column: percent}}.
    Those that are not there are named on stderr. names, templates: as in zeroshot_weights."""
    device, model = options["device"], net.model
    options = {key: value for key, value in options.items() if key != "cache"}
    with evaluating(model), torch.no_grad(), mixed_precision(args.dtype, device)[0]:
        weights = zeroshot_weights(model.encode_text, net.tokenizer, names, templates, device)

    def logits_of(dataset, view):
        found = extract_features(model, model.encode_image, dataset, **{**options, "view": view})
        features, labels = labelled(dataset, found.images, found.labels)
        return F.normalize(features.to(device), dim=1) @ weights.T, labels

    logits, labels = logits_of(imagenet, net.view)
    top1, missing = percent(logits.argmax(1).cpu() == labels), []
    columns = "top1", "imagenet, same classes", "difference", "classes"
    rows = {imagenet.name: dict(zip(columns, (top1, top1, 0.0, len(names))))}
    ids = wordnet_ids(imagenet, place_of("imagenet", args))
    for name in SHIFTED:
        root = place_of(name, args)
        try:
            path = root / "images" if name == "objectnet" and root.is_dir() else name
            dataset = open_dataset(str(path), args.data_dir, "train" if path != name else "val")
            groups = imagenet_classes(name, dataset, ids, len(names), root)
            view = WithoutBorder(net.view, BORDER) if name == "objectnet" else net.view
            found = compare(*logits_of(dataset, view), groups, logits, labels)
        except UserError as error:
            missing.append(f"{name} ({error})")
            continue
        rows[name] = dict(zip(columns, (*found, sum(map(bool, groups)))))
    text = f"left out {len(missing)} of {len(SHIFTED)} sets: {'; '.join(missing)}"
    if len(rows) == 1:
        raise UserError(f"{imagenet.name} has {top1:.2f}% and nothing to compare with: {text}")
    if missing and rank() == 0:
        print(text, file=sys.stderr)
    return rows


def place_of(name, args):
    """The folder of a named set, as open_dataset finds it."""
    base = Path(args.data_dir or os.environ.get("DATA_DIR") or "data").expanduser()
    return base if base.name == name else base / name
