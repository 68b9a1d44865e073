"""Features for the protocols: kept on disk between commands, and of several blocks of a
transformer."""

import contextlib
import hashlib
import io
import os
import sys
from pathlib import Path

import torch
from torch import nn

from common import UserError, all_reduce_mean, rank
from knn import extract
from monitor import extract_features, refuse_labels_beyond
from run import load_checkpoint


class NamedSubset(torch.utils.data.Subset):
    """Some samples of a dataset, with its classes and under its name or another one."""

    captioned = False

    def __init__(self, dataset, indices, name=""):
        super().__init__(dataset, indices)
        self.name, self.classes = name or dataset.name, dataset.classes


# Copied from simclrv2.py: WithinClasses
class WithinClasses:
    """A dataset that raises UserError for a label that none of its classes has: the loss would end
    with a traceback, on a GPU with one that names no sample."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.name = dataset.name
        self.classes = dataset.classes
        self.captioned = dataset.captioned

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        sample = self.dataset[i]
        refuse_labels_beyond(self, sample.label)
        return sample


def refuse_small(dataset, batch):
    """Raises UserError where a split has less than one batch to train on."""
    if len(dataset) < batch:
        few = f"{dataset.name} has {len(dataset)} samples, less than a batch of {batch}"
        raise UserError(f"{few}: lower --train-batch")


# -------------------------------------------- kept on disk ----------------------------------------
def cached_extract(encoder, dataset, view, device, cache="", **options):
    """Collective. knn.extract, whose result is kept in the folder `cache`, if one is given, and
    read from there the next time."""
    return cached_features(encoder, dataset, view, device, cache, **options)[:2]


def cached_features(encoder, dataset, view, device, cache="", **options):
    """Collective. As cached_extract, and the indices (n,) of the samples that could be read. The
    number of those that could not is printed each time, also when kept features are read."""
    code = fingerprint(encoder, dataset, view, device, options) if cache else ""
    if code:
        file = Path(cache) / f"features_{code}.pt"
        if all_reduce_mean(torch.tensor(float(file.is_file()))) > 0.999:  # every process sees it
            with contextlib.suppress(UserError):  # a damaged file is written anew
                saved = load_checkpoint(file)
                say_left_out(dataset, options.get("indices"), saved["index"], file)
                return saved["features"], saved["labels"], saved["index"]
    found = extract_features(encoder, encoder, dataset, view, device, **options)
    if code and rank() == 0:
        kept = {"features": found.images, "labels": found.labels, "index": found.index}
        whole = file.with_suffix(f".{os.getpid()}.tmp")  # another command may write the same file
        try:
            torch.save(kept, whole)
            os.replace(whole, file)
        except (OSError, RuntimeError) as error:
            print(f"features are not kept: {error}", file=sys.stderr)
            with contextlib.suppress(OSError):
                whole.unlink(missing_ok=True)
    return found.images, found.labels, found.index


def say_left_out(dataset, indices, index, file):
    """How many of the samples were not among those that could be read when a file was written."""
    wanted = range(len(dataset)) if indices is None else indices
    missing = sorted({*wanted} - {*index.tolist()}) if len(index) < len(wanted) else []
    if missing and rank() == 0:
        left_out = f"{dataset.name}: left out {len(missing)} of {len(wanted)} samples"
        first = f"sample {missing[0]} could not be read"
        print(f"{left_out}, {first} when {file} was written", file=sys.stderr)


def fingerprint(encoder, dataset, view, device, options):
    """Collective. -> a hash of all that the features depend on. The features of eight samples stand
    for network, preprocessing, precision, machine and images; everything else enters by its
    value. "" if none of the eight can be read."""
    few = sorted({i * (len(dataset) - 1) // 7 for i in range(8)})
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what is broken is counted among all
            features, labels = extract(encoder, dataset, view, device, **options | {"indices": few})
    except UserError as error:
        if "can be read" not in str(error):
            raise
        return ""
    asked = options.get("batch_size"), options.get("indices")
    rest = dataset.name, len(dataset), dataset.classes, *asked
    text = repr((features.tolist(), labels.tolist(), rest, torch.__version__, "with index"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -------------------------------------------- several blocks --------------------------------------
class LastBlocks(nn.Module):
    """Images -> the features of the linear probes of DINO and DINOv2.

    They are the class tokens of the last n blocks of a transformer, each after the final norm, the
    last block's at the end: (b, n D). With `average` the mean of the last block's patches follows:
    (b, (n + 1) D). DINO's published classifiers want class tokens and mean interleaved."""

    def __init__(self, vit, n, average):
        super().__init__()
        self.vit, self.n, self.average = vit, n, average

    def forward(self, x):
        outputs = []
        hooks = []
        for block in self.vit.blocks[-self.n :]:
            keep = block.register_forward_hook(lambda module, args, out: outputs.append(out))
            hooks.append(keep)
        try:
            self.vit(x)
        finally:
            for hook in hooks:
                hook.remove()
        tokens = [self.vit.norm(out) for out in outputs]
        patch = self.vit.patch_embed.proj.kernel_size[0]
        patches = (x.shape[2] // patch) * (x.shape[3] // patch)  # without registers
        return block_features(tokens, patches, self.average)


def block_features(tokens, patches, average):
    """tokens: (b, N, D) of each block, with the class token first and `patches` patches last."""
    parts = [t[:, 0] for t in tokens]
    if average:
        parts.append(tokens[-1][:, -patches:].mean(1))
    return torch.cat(parts, dim=1)
