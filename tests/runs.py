"""Shared by the tests: tiny runs of every method, started in this process, as a command, or under torchrun."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pictures
import torch
from common import user_errors
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).parent.parent
COMMON = "--device cpu --batch-size 8 --epochs 4 --warmup-epochs 1 --workers 0 --log-every 1 --image-size 32".split()
TEXT = "--tokenizer train --vocab-size 600 --context-length 24 --text-width 64 --text-layers 1 --embed-dim 32".split()
RESNET = "--arch resnet10 --width 0.25 --stem imagenet".split()  # also where the demo's recipe says otherwise
RESNET18 = "--arch resnet18 --width 1".split()  # after FLAGS: a network that other projects have too
FLAGS = {
    "clip": [*COMMON, *TEXT, "--arch", "vit_micro_patch16", "--lr", "1e-3"],
    "clip_resnet": [*COMMON, *TEXT, "--arch", "resnet_test", "--lr", "1e-3"],
    "slip": [*COMMON, *TEXT, "--arch", "vit_micro_patch16", "--lr", "1e-4", "--ssl-mlp-dim", "64", "--ssl-emb-dim", "16"],
    "slip_ablations": [*COMMON, *TEXT, "--arch", "vit_micro_patch8", "--lr", "1e-4", "--ssl-mlp-dim", "64", "--ssl-emb-dim", "16"],
    "declip": [*COMMON, *TEXT, "--arch", "vit_micro_patch16", "--lr", "1e-4", "--ssl-dim", "32", "--queue-size", "256"],
    "declip_resnet": [*COMMON, *TEXT, "--arch", "resnet_test", "--lr", "1e-5", "--ssl-dim", "32", "--queue-size", "256",
                      "--seed", "1"],  # with seed 0 an activation sits on the kink of a ReLU,
    "align": [*COMMON, *TEXT, "--arch", "efficientnet_micro", "--image-size", "64", "--lr", "1e-3", "--temperature", "0.2",
              "--min-side", "0", "--bn-group", "0"],  # fmt: skip
    "simclr": [*COMMON, *RESNET, "--base-lr", "0.02", "--temperature", "0.5", "--head-dim", "16"],
    "simsiam": [*COMMON, *RESNET, "--base-lr", "0.001", "--out-dim", "16", "--predictor-dim", "8",
                "--projector-layers", "2", "--hidden-dim", "64"],
    "byol": [*COMMON, *RESNET, "--base-lr", "0.02", "--tau", "0.9", "--hidden-dim", "64", "--out-dim", "16"],
    "dino": [*COMMON, "--arch", "vit_micro_patch8", "--local-size", "16", "--local-crops", "2", "--out-dim", "64", "--hidden-dim", "64",
             "--base-lr", "0.016", "--warmup-teacher-temp-epochs", "2"],  # fmt: skip
    "ibot": [*COMMON, "--arch", "vit_micro_patch8", "--local-size", "16", "--local-crops", "2", "--out-dim", "64", "--hidden-dim", "64",
             "--mask-prob", "0.8", "--base-lr", "0.016", "--warmup-teacher-temp-epochs", "2"],  # fmt: skip
    "dinov2": [*COMMON, "--arch", "vit_micro_patch8", "--local-size", "16", "--local-crops", "2", "--out-dim", "64", "--hidden-dim", "64",
               "--mask-prob", "0.8", "--layer-scale", "0.1", "--freeze-last-layer", "1", "--base-lr", "0.006",
               "--koleo-group", "0", "--warmup-teacher-temp-epochs", "2"],  # fmt: skip
    "moco": [*COMMON, *RESNET, "--lr", "1e-3", "--temperature", "0.5", "--head-dim", "16",
             "--queue-size", "600", "--bn-group", "4", "--key-momentum", "0.9"],
    "mocov3": [*COMMON, "--arch", "vit_micro_patch16", "--base-lr", "3e-4", "--mlp-dim", "64", "--head-dim", "16",
               "--key-momentum", "0.9"],
}
METHODS = ["clip", "slip", "declip", "align", "simclr", "moco", "mocov3", "byol", "simsiam", "dino", "ibot", "dinov2"]


def module_of(name):
    """The method's module; clip_resnet is clip.py with a ResNet small enough for a test, declip_resnet declip.py."""
    module = importlib.import_module(name if (ROOT / f"{name}.py").exists() else name.split("_")[0])
    if name == "clip_resnet":
        module.ARCHS["resnet_test"] = (32, (1, 1, 1, 1), 8, 64)
    if name == "declip_resnet":
        module.ARCHS["resnet_test"] = (32, (1, 1, 1, 1), 2048)
    return module


def make_photos(folder: Path, train=52, val=12):
    """A folder with train.jsonl and val.jsonl: 6 steps an epoch at batch 8, 4 samples left over."""
    from data import decode, open_dataset
    from torchvision.transforms.functional import to_pil_image

    folder.mkdir(parents=True, exist_ok=True)
    shapes = open_dataset("shapes")
    for split, first, count in (("train", 0, train), ("val", train, val)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for i in range(first, first + count):
                sample = shapes[i]
                to_pil_image(decode(sample.image)).save(folder / f"{i}.png")
                file.write(json.dumps({"image": f"{i}.png", "captions": list(sample.captions)}) + "\n")
    return folder


def train_here(name, photos, directory, *flags, curves=False):
    """Runs train() in this process (or in all processes of this group); -> gradient of the first step, by parameter.
    curves.png is left out, unless it is asked for: to draw it takes longer than the steps."""
    module, grads = module_of(name), []

    def keep(optimizer, *_):
        if not grads:
            grads.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None])

    handle = register_optimizer_step_pre_hook(keep)
    argv = ["--data", str(photos), "--output-dir", str(directory), *FLAGS[name], *flags]
    drawing = contextlib.nullcontext() if curves else mock.patch.object(pictures, "save_curves")
    try:
        with drawing:
            module.train(module.parse_args(module.Args, module.RECIPES, argv))
    finally:
        handle.remove()
    return grads[0] if grads else None


@contextlib.contextmanager
def float64():
    """Networks and losses in float64: tells a wrong formula from float32's rounding, which batch norm amplifies."""
    single = torch.Tensor.float

    def widened(_, inputs):
        return tuple(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)

    wide = register_module_forward_pre_hook(widened)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = single
        torch.set_default_dtype(torch.float32)
        wide.remove()


def rows(directory):
    """metrics.jsonl without what depends on time."""
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("images_per_sec", "data_wait")} for line in lines]


def command(script, *flags, processes=1, **options):
    """A finished subprocess of `python script` or of torchrun, output captured as text."""
    return subprocess.run(argv_of(script, *flags, processes=processes), capture_output=True, text=True,
                          env=environment(), cwd=options.pop("cwd", ROOT), timeout=300, **options)  # fmt: skip


def argv_of(script, *flags, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, str(ROOT / script), *map(str, flags)]


def environment(matplotlib=False):
    """Of a command. It does not find matplotlib, unless that is asked for."""
    folders = [ROOT, ROOT / "tests", *([] if matplotlib else [ROOT / "tests/hidden"])]
    path = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


if __name__ == "__main__":  # under torchrun: python runs.py JOBS, a json list of [method, photos, directory, flags] and, for float64, true
    with user_errors():
        for name, photos, directory, flags, *precise in json.loads(sys.argv[1]):
            with float64() if any(precise) else contextlib.nullcontext():
                grads = train_here(name, photos, directory, *flags)
            if int(os.environ["RANK"]) == 0:
                torch.save(grads, Path(directory) / "grads.pt")
