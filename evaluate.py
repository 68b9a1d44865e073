"""Evaluates checkpoints: python evaluate.py PROTOCOL CHECKPOINT [CHECKPOINT ...] --data NAME
[--flag VALUE]

PROTOCOL is zeroshot, robustness, retrieval, knn, logreg, linear, finetune or semi, which give
scores, or attention, pca, matches, neighbors, explain or search, which draw a picture. `export`
writes the weights for another project. CHECKPOINT is a checkpoint.pt, the run directory that holds
it, or a file of published weights; several of them give one table. Under torchrun the result is the
same for any number of processes. Every result is appended to results.jsonl beside its checkpoint,
and every picture is a PNG there.

    python evaluate.py knn runs/simclr_cifar10_* --data cifar10 --random
    python evaluate.py linear runs/simclr_cifar10_* --data cifar10 --cached
    python evaluate.py semi runs/simclr_cifar10_* --data cifar10 --labels 0.1 --random
    python evaluate.py attention runs/dino_shapes_* --data shapes
    python evaluate.py explain runs/clip_shapes_* --data shapes --text "a red star"
    python evaluate.py search runs/align_shapes_* --data shapes "a red star" --minus red
    torchrun --nproc_per_node=8 evaluate.py zeroshot runs/slip_yfcc15m_* --data imagenet

Scores are in percent. evaluation/protocols.py says which protocol each of them follows; a score
means nothing without its protocol."""

import os
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_type_hints

import torch

from common import UserError, init_distributed, rank, user_errors
from data import open_dataset
from evaluation import exports, finetune
from evaluation.features import WithinClasses
from evaluation.language import PICTURES, WITH_TEXT
from evaluation.protocols import PROTOCOLS, parse_numbers
from evaluation.results import check_folder, environment, export_folder, folder_of, names_of
from evaluation.results import save_picture, save_result, table
from evaluation.weights import open_network
from knn import refuse_other_classes
from monitor import what_classes_lack
from recognise import file_of
from run import parse_args

LARGEST = 4096  # pixels of --size
Project = Literal["timm", "torchvision", "open_clip", "transformers", "safetensors"]


@dataclass
class Args:
    data: str = ""  # dataset to evaluate on, a name or a path, see docs/data.md
    data_dir: str = ""  # folder of named data and CLIP's vocabulary (default: $DATA_DIR, ./data)
    split: str = "val"  # split whose samples are scored or shown
    batch_size: int = 256  # images per forward pass when features are extracted
    workers: int = min(8, os.cpu_count() or 1)  # loader processes per process
    device: str = ""  # cuda, mps or cpu (default: the first of them that this machine has)
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # precision of forward passes and fine-tuning
    json: bool = False  # print JSON lines in place of the table
    random: bool = False  # evaluate the network with random weights too, which a score has to beat
    tokenizer: str = ""  # of others' language-image weights, as in clip.py (default: published one)
    templates: str = ""  # zeroshot, robustness: prompts with {}: file, key of TEMPLATES, open_clip
    classnames: str = ""  # zeroshot, robustness: file of classes, synonyms behind |; or open_clip
    prefix: str = ""  # retrieval: text before each caption, as "a photo of " (CLIP's)
    cache: bool = True  # knn, logreg, search, linear --cached: keep features beside the checkpoint
    k: str = "20"  # how many neighbours (knn: several too, 10,20), hits of search, lines of matches
    temperature: str = "0.07"  # knn: a neighbour votes with exp(cosine / temperature); also several
    head_layer: int = 0  # keep this many layers of the projection head (SimCLR v2's semi: 1)
    cached: bool = False  # linear: extract features once, without augmentation; choose base_lr
    blocks: int = 0  # linear: class tokens of so many last blocks (DINO's ViT-S: 4; 0: 1, grid: 4)
    average: bool = False  # linear: append the mean of the patches (DINO's ViT-B)
    grid: bool = False  # linear: train DINOv2's heads, 13 rates x 4 kinds of features; choose one
    base_lr: float = 0.1  # linear, finetune, semi: the learning rate is base_lr * train_batch / 256
    lr_steps: str = ""  # linear: a tenth of the rate after these epochs (MoCo: 60,80), no cosine
    lars: bool = False  # linear: optimize with LARS (SimSiam) in place of SGD
    train_batch: int = 1024  # linear, finetune, semi: global batch size
    epochs: int = 90  # linear, finetune, semi: passes over the train split
    weight_decay: float = 0.0  # linear, finetune, semi: weight decay (SimCLR's linear: 1e-6)
    nesterov: bool = False  # linear, finetune, semi: Nesterov momentum (SimCLR)
    zero_init: bool = False  # linear: the head starts at 0 (SimCLR), not at N(0, 0.01) (MoCo v3)
    seed: int = 0  # seed of order, crops and first weights, of held-out tenths, of semi's labels
    labels: float = 0.0  # semi: share of the labels, balanced over the classes, as 0.01 or 0.1
    # For finetune and semi, the defaults of these and of the flags above depend on the architecture
    optimizer: Literal["sgd", "adamw"] = "sgd"  # finetune, semi: the optimizer
    warmup_epochs: float = 0.0  # finetune, semi: epochs of linear warm-up from 0
    min_lr: float = 0.0  # finetune, semi: learning rate at the end of the cosine
    layer_decay: float = 1.0  # finetune, semi: a block's rate as a share of the next block's
    drop_path: float = 0.0  # finetune, semi: stochastic depth of the last block (0: off)
    mixup: float = 0.0  # finetune, semi: Beta parameter of MixUp's proportions (0: off)
    cutmix: float = 0.0  # finetune, semi: that of CutMix; with both, one in each step (0: off)
    label_smoothing: float = 0.0  # finetune, semi: share of the target spread over all classes
    randaugment: int = 0  # finetune, semi: strength of two random operations, 1 to 10 (0: off)
    erase: float = 0.0  # finetune, semi: share of the images in which a rectangle is erased
    ema: float = 0.0  # finetune, semi: score averaged weights with this decay, as 0.9999 (0: off)
    C: float = 0.0  # logreg: inverse regularisation strength (0: search)
    heads: int = 0  # attention heads of an external ViT (0: infer)
    text_heads: int = 0  # attention heads of an external text encoder (0: infer)
    gelu: Literal["", "quick", "exact"] = ""  # an external CLIP's: OpenAI's is quick, LAION's exact
    text: tuple[str, ...] = ()  # explain, search: a text; may be given several times
    plus: tuple[str, ...] = ()  # search: text or image file to add to the query, also several times
    minus: tuple[str, ...] = ()  # search: text or image file to subtract, also several times
    queue: bool = False  # neighbors: of captions, in the queue of a DeCLIP run
    images: int = 4  # pictures: how many samples are shown, the same ones in every run
    samples: str = ""  # pictures: samples to show, by their number in the split, as 3,14,15
    size: int = 0  # pictures: pixels of the shorter side (0: as evaluated; DINO's figures: 480)
    mass: float = 0.6  # attention: share of the attention that the kept patches have (DINO: 0.6)
    threshold: float = 0.0  # pca: foreground is above this many std of component 1, 0 or more
    out: str = ""  # folder of pictures (default: beside the checkpoint), export, fine-tuned weights
    to: Project = "timm"  # export: the project, or format, that the weights are for


def split_words(argv):
    """-> the words before the first flag, the flags with their values, the words behind those:
    evaluate.py search CHECKPOINT --data NAME "a dog" """
    takes_no_value = {"-h", "--help"}
    for name, kind in get_type_hints(Args).items():
        if kind is bool:
            flag = name.replace("_", "-")
            takes_no_value |= {f"--{flag}", f"--no-{flag}"}
    first, flags, others = [], [], []
    value_follows = False
    for word in argv:
        if value_follows or word.startswith("-"):
            plain = word.replace("_", "-")
            value_follows = not (value_follows or "=" in word or plain in takes_no_value)
            flags.append(word)
        elif flags:
            others.append(word)
        else:
            first.append(word)
    return first, flags, others


def check(protocol, paths, args):
    """Raises UserError for flags that do not fit the protocol or each other."""
    if protocol not in PROTOCOLS | PICTURES or not paths or not args.data:
        known = "|".join([*PROTOCOLS, *PICTURES, "export"])
        raise UserError(f"use: evaluate.py {known} CHECKPOINT ... --data NAME (see --help)")
    if not re.fullmatch(r"(\d+(,\d+)*)?", args.lr_steps):
        raise UserError(f"--lr-steps {args.lr_steps} must be epochs with commas between them")
    parse_numbers(args.k, int)
    parse_numbers(args.temperature)
    if args.size > LARGEST:
        raise UserError(f"--size {args.size} is too large, at most {LARGEST} pixels")
    if not all(word.strip() for word in (*args.text, *args.plus, *args.minus)):
        raise UserError('a text is empty, write what to look for, as in "a red star"')
    fits = 0 < args.labels < 1 if protocol == "semi" else args.labels == 0
    if not fits:
        raise UserError(
            "semi needs --labels, above 0 and below 1 as 0.01 or 0.1, and nothing else takes it"
        )
    for path in paths:  # before the first one is computed
        if not file_of(path).is_file():
            raise UserError(f"there is no checkpoint at {file_of(path)}")


def open_splits(protocol, args):
    """-> the train split (None where the protocol needs none) and the split to report on. Raises
    UserError."""
    if protocol in PICTURES:
        return open_splits_for_picture(protocol, args)
    train, test = None, open_dataset(args.data, args.data_dir, args.split)
    if protocol in ("knn", "linear", "logreg", "finetune", "semi"):
        train = open_dataset(args.data, args.data_dir, "train")
    if protocol == "retrieval" and not test.captioned:
        raise UserError(f"retrieval needs captions, which {args.data} does not have")
    named = protocol == "zeroshot" and args.classnames  # which may name the classes of any labels
    if protocol != "retrieval" and not (test.classes or named):
        raise UserError(f"{protocol} needs classes: {what_classes_lack(test)}")
    if train and args.split == "train":
        raise UserError(f"{protocol} needs a --split other than train")
    if train:
        refuse_other_classes(train, test, args.split, "or use another --split or other --data")
    return WithinClasses(train) if train else None, test


def open_splits_for_picture(protocol, args):
    """A picture can be drawn of a folder of photos too, which has one split, called train."""
    train = None
    try:
        test = open_dataset(args.data, args.data_dir, args.split)
    except UserError as error:
        if args.split != "val":
            raise
        test = open_dataset(args.data, args.data_dir, "train")
        say(f"{error}: the picture is of the split train")
        return train, test
    if protocol == "neighbors" and args.split != "train":
        try:
            train = open_dataset(args.data, args.data_dir, "train")
        except UserError as error:
            say(f"{error}: the neighbours are of the same split")
    return train, test


def say(text):
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)


def say_start(protocol, name, train, test, args):
    """One line where no terminal shows the bars of what goes on for minutes. Fine-tuning has its
    own."""
    if sys.stderr.isatty() or protocol in ("finetune", "semi"):
        return
    split = f"{args.split} " if protocol in PROTOCOLS else ""  # pictures say theirs
    counts = [f"{len(test):,} {split}images"]
    if train:
        counts.insert(0, f"{len(train):,} train images")
    if protocol == "linear":
        counts[0] = f"{args.epochs} epochs of {counts[0]}"
    say(f"{protocol} of {name}: {' and '.join(counts)} of {args.data}")


def export(args, path, *others):
    """Writes a checkpoint's network for another project and prints the lines that load it there."""
    if others:
        raise UserError("export takes one checkpoint at a time")
    given = {"heads": args.heads, "text_heads": args.text_heads, "gelu": args.gelu}
    net = open_network(path, torch.device("cpu"), args.head_layer, text=False, **given)
    folder = Path(args.out) if args.out else export_folder(Path(path), args.to)
    if folder.resolve() == folder_of(Path(path)).resolve():
        raise UserError(f"{folder} holds the checkpoint itself, use another --out")
    print(exports.export(net, args.to, folder))


def main(argv: list[str]):
    if {"-h", "--help"} & set(argv):
        print(__doc__)
    words, flags, queries = split_words(argv)
    protocol, *paths = words or [""]
    if queries and protocol not in WITH_TEXT:
        raise UserError(f"{queries[0]} is no flag: checkpoints come first (--help lists the flags)")
    flags += [word for query in queries for word in ("--text", query)]
    args = parse_args(Args, {}, flags)
    paths = [os.path.expanduser(path) for path in paths]
    if protocol == "export" and paths:
        export(args, *paths)
        return
    check(protocol, paths, args)
    device = init_distributed(args.device)
    torch.set_float32_matmul_precision("highest")  # TF32 would reorder close neighbours
    torch.backends.cudnn.allow_tf32 = False  # of convolutions
    train, test = open_splits(protocol, args)
    with_text = protocol in ("zeroshot", "robustness", "retrieval", *WITH_TEXT)
    tuning = protocol in ("finetune", "semi")
    cached_linear = protocol == "linear" and args.cached
    keeps_features = protocol in ("knn", "logreg", "search") or cached_linear
    kinds = ["metrics", "random weights"] if args.random else ["metrics"]
    if args.out and (tuning or protocol in PICTURES):
        check_folder(args.out)
        kept = [Path(args.out) / f"{protocol}_{name}.pt" for name in names_of(paths)]
        if there := [file for file in kept if tuning and file.is_file()]:
            raise UserError(f"{there[0]} is there already, use another --out")
    rows = {}
    try:
        for path, own_name in zip(map(Path, paths), names_of(paths)):
            began, not_saved = time.time(), None
            result = {
                "protocol": protocol,
                "data": args.data,
                "split": args.split,
                "checkpoint": str(path),
            }
            for kind in kinds:
                random_weights = kind == "random weights"
                texts = {"text": with_text, "tokenizer": args.tokenizer, "data_dir": args.data_dir}
                given = {"heads": args.heads, "text_heads": args.text_heads, "gelu": args.gelu}
                options = {**texts, **given}
                net = open_network(path, device, args.head_layer, random_weights, **options)
                if with_text and not net.tokenizer:
                    raise UserError(
                        f"{protocol} needs a language-image checkpoint, {path} is {net.method}'s"
                    )
                if tuning:  # the defaults depend on the architecture, and flags win over them
                    recipe = finetune.recipe(net.encoder, len(train), args.labels or 1.0)
                    args = parse_args(Args, {args.data: recipe}, flags)
                    result["settings"] = {name: getattr(args, name) for name in recipe}
                options = {"view": net.view, "device": device, "dtype": args.dtype}
                options |= {"batch_size": args.batch_size, "workers": args.workers}
                if keeps_features and args.cache:
                    options["cache"] = str(folder_of(path))
                name = f"{path}, {kind} of seed 0" if random_weights else str(path)
                if protocol in PROTOCOLS or protocol in ("neighbors", "search"):  # take all images
                    say_start(protocol, name, train, test, args)
                if protocol in PICTURES:
                    net.path = path
                    picture = PICTURES[protocol](net, train, test, args, options)
                    save_picture(picture, path, protocol, kind, args, own_name)
                    continue
                result[kind] = PROTOCOLS[protocol](net, train, test, args, options)
                found = result[kind]
                per_set = {f"{name}, {data}": row for data, row in found.items()}  # of robustness
                rows |= per_set if protocol == "robustness" else {name: found}
                if tuning and args.out and not random_weights and rank() == 0:
                    file = Path(args.out) / f"{protocol}_{own_name}.pt"
                    try:
                        finetune.save_classifier(net.tuned, file)
                    except UserError as error:
                        not_saved = error  # the score comes first
            if protocol in PROTOCOLS and rank() == 0:
                command = shlex.join(["evaluate.py", *argv])
                result |= {"method": net.method, "step": net.step, "command": command}
                result |= {"minutes": (time.time() - began) / 60, **environment(device)}
                save_result(result, path, args)
            if not_saved:
                raise not_saved
    finally:  # an error leaves the rows before it
        if rank() == 0 and rows and not args.json:
            print(f"{protocol}, {args.data} {args.split}, percent", table(rows), sep="\n")


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
