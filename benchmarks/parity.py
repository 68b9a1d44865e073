"""The same training through lightly's modules, transforms and losses: does it end where ours ends?

    python simclr.py --data cifar10 --recipe cifar10-cpu --output-dir runs/simclr_cpu
    python benchmarks/parity.py runs/simclr_cpu --out results/parity.json

For runs of simclr, moco, byol, simsiam and dino. args.json of the run says what is repeated:
backbone and its first weights, pictures, their order and batches, number of steps, learning rates,
what is decayed, and running averages. From lightly come views, head, loss, queue and the loop, as
in its CIFAR-10 benchmark; their head has weights of its own, drawn after the same seed. Views are
those of the method's own transform there, with the run's size, smallest crop and strength of
jitter, without blur. Both encoders are then compared by kNN on the whole validation split among the
whole training split, and so are the weights both started from, and pixels averaged to 8 x 8, which
every method should beat. Runs with a flag of ONLY that has another value are refused.

Seconds are those of the training loop with its data, with the threads and workers this process has:
for a comparison give OMP_NUM_THREADS=1, and --workers 0 to the run.

Needs lightly (pip install -r requirements-test.txt).
"""

import argparse
import copy
import importlib
import importlib.metadata
import io
import json
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

from common import UserError, user_errors, warmup_cosine  # noqa: E402
from data import IMAGENET_MEAN, IMAGENET_STD, Loader, decode, open_dataset  # noqa: E402
from evaluation.results import environment  # noqa: E402
from evaluation.weights import open_network  # noqa: E402
from knn import knn_eval  # noqa: E402
from monitor import EvalView  # noqa: E402
from record import training_command, training_minutes, warn_of  # noqa: E402

try:
    from lightly import loss as losses
    from lightly import transforms
    from lightly.models import modules
    from lightly.models.utils import update_momentum
except ImportError:
    sys.exit("install lightly first: pip install -r requirements-test.txt")


# -------------------------------------------- lightly's methods ---------------------------------
# Each takes the arguments of the run and a backbone with features of width `dim`, and returns
#   encoder    what is evaluated
#   trained    {"name": modules} of the optimizer's groups
#   views      lightly's transform
#   step       function(views, progress of the schedule from 0 to 1) -> loss, called before the
#              optimizer's step
#   after      function(the same progress), called after it
def look(args):
    """What a transform takes from the run; none of them blurs."""
    return {
        "input_size": args.image_size,
        "cj_strength": args.jitter_strength,
        "min_scale": args.crop_min,
        "gaussian_blur": 0.0,
    }


def simclr(args, backbone, dim):
    head = modules.SimCLRProjectionHead(dim, dim, args.head_dim, num_layers=args.head_layers)
    criterion = losses.NTXentLoss(args.temperature)
    views = transforms.SimCLRTransform(**look(args))

    def step(x, progress):
        return criterion(head(backbone(x[0])), head(backbone(x[1])))

    return types.SimpleNamespace(encoder=backbone, trained=[backbone, head], views=views, step=step)


def moco(args, backbone, dim):
    query = nn.Sequential(backbone, modules.MoCoProjectionHead(dim, dim, args.head_dim))
    key = copy.deepcopy(query).requires_grad_(False)
    bank = args.queue_size, args.head_dim
    criterion = losses.NTXentLoss(args.temperature or 0.2, memory_bank_size=bank)  # version 2's
    views = transforms.MoCoV2Transform(**look(args))

    def one_way(x_query, x_key):
        # groups of batch norm, which lightly's example has by GPU
        order = torch.randperm(len(x_key))
        k = torch.cat([key(part) for part in x_key[order].split(args.bn_group)])
        q = torch.cat([query(part) for part in x_query.split(args.bn_group)])
        return criterion(q, k[order.argsort()].detach())

    def step(x, progress):
        update_momentum(query, key, args.key_momentum)
        if args.symmetric:
            return (one_way(x[0], x[1]) + one_way(x[1], x[0])) / 2
        return one_way(x[0], x[1])

    return types.SimpleNamespace(encoder=backbone, trained=[query], views=views, step=step)


def byol(args, backbone, dim):
    online = nn.Sequential(backbone, modules.BYOLProjectionHead(dim, args.hidden_dim, args.out_dim))
    target = copy.deepcopy(online).requires_grad_(False)
    predictor = modules.BYOLPredictionHead(args.out_dim, args.hidden_dim, args.out_dim)
    criterion = losses.NegativeCosineSimilarity()
    views = transforms.BYOLTransform(
        transforms.byol_transform.BYOLView1Transform(**look(args)),
        transforms.byol_transform.BYOLView2Transform(**look(args)),
    )

    def step(x, progress):
        p = [predictor(online(one)) for one in x]
        z = [target(one).detach() for one in x]
        cosines = (criterion(p[0], z[1]) + criterion(p[1], z[0])) / 2
        return 4 * cosines  # the run's rate is for |p - z|^2 both ways, which is 4 + 4 times this

    def after(progress):
        tau = warmup_cosine(progress, 1, 0, args.tau, end=args.tau_end)
        update_momentum(online, target, tau)

    trained = [online, predictor]
    return types.SimpleNamespace(
        encoder=backbone, trained=trained, views=views, step=step, after=after
    )


def simsiam(args, backbone, dim):
    sizes = [dim, *[args.hidden_dim or dim] * (args.projector_layers - 1)]
    blocks = [(a, b, nn.BatchNorm1d(b), nn.ReLU()) for a, b in zip(sizes, sizes[1:])]
    last = sizes[-1], args.out_dim, nn.BatchNorm1d(args.out_dim, affine=False), None
    # as many layers as the run has, for CIFAR-10 two
    head = modules.heads.ProjectionHead([*blocks, last])
    predictor = modules.SimSiamPredictionHead(args.out_dim, args.predictor_dim, args.out_dim)
    criterion = losses.NegativeCosineSimilarity()
    views = transforms.SimSiamTransform(**look(args))

    def step(x, progress):
        z = [head(backbone(one)) for one in x]
        p = [predictor(one) for one in z]
        return (criterion(z[0].detach(), p[1]) + criterion(z[1].detach(), p[0])) / 2

    fixed = [predictor] if args.fix_pred_lr else []
    trained = [backbone, head] if fixed else [backbone, head, predictor]
    return types.SimpleNamespace(
        encoder=backbone, trained=trained, fixed=fixed, views=views, step=step
    )


def dino(args, backbone, dim):
    def head():
        made = modules.DINOProjectionHead(
            dim, args.hidden_dim, 256, args.out_dim, batch_norm=args.head_bn,
            freeze_last_layer=-1, norm_last_layer=args.norm_last_layer,
        )  # fmt: skip
        size = 3 if args.head_bn else 2  # modules of a hidden layer, of which lightly has two
        made.layers = nn.Sequential(*made.layers[: size * (args.head_layers - 1)], made.layers[-1])
        return made

    student = nn.Sequential(backbone, head())
    teacher = nn.Sequential(copy.deepcopy(backbone), head())
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    criterion = losses.DINOLoss(
        args.out_dim, args.teacher_temp, args.teacher_temp, student_temp=args.temperature,
        center_momentum=args.center_momentum,
    )  # fmt: skip
    # not by cj_strength, which lightly 1.6 does not hand to the second view
    jitter = {"bright": 0.8, "contrast": 0.8, "sat": 0.4, "hue": 0.2}
    jitter = {f"cj_{name}": value * args.jitter_strength for name, value in jitter.items()}
    views = transforms.DINOTransform(
        global_crop_size=args.image_size, global_crop_scale=(args.crop_split, 1.0), n_local_views=0,
        gaussian_blur=(0, 0, 0), **jitter,
    )  # fmt: skip

    def step(x, progress):
        return criterion([teacher(one) for one in x], [student(one) for one in x], epoch=1)

    def after(progress):
        start, end = args.teacher_momentum, args.teacher_momentum_end
        update_momentum(student, teacher, warmup_cosine(progress, 1, 0, start, end=end))

    return types.SimpleNamespace(
        encoder=teacher[0], trained=[student], views=views, step=step, after=after
    )


# -------------------------------------------- training --------------------------------------------
def groups_of(peer, method, weight_decay):
    """moco.py and simsiam.py decay all parameters, the others neither biases nor norms."""
    groups, least = [], 0 if method in ("moco", "simsiam") else 2
    for parts, fixed in ((peer.trained, False), (getattr(peer, "fixed", []), True)):
        found = [p for part in parts for p in part.parameters() if p.requires_grad]
        decay = [p for p in found if p.ndim >= least]
        no_decay = [p for p in found if p.ndim < least]
        groups.append({"params": decay, "weight_decay": weight_decay, "fixed": fixed})
        groups.append({"params": no_decay, "weight_decay": 0.0, "fixed": fixed})
    return [group for group in groups if group["params"]]


class InOrder(torch.utils.data.Dataset):
    """lightly's views of the pictures, which come as PIL images."""

    def __init__(self, dataset, views):
        self.dataset = dataset
        self.views = views

    def __getitem__(self, i):
        image = self.dataset[i].image
        if isinstance(image, bytes):
            return self.views(Image.open(io.BytesIO(image)).convert("RGB"))
        return self.views(Image.fromarray(decode(image).permute(1, 2, 0).numpy()))  # a drawing


def rate(args, step, steps_per_epoch):
    """The run's learning rate, by the rule of its method file."""
    if args.method == "moco":  # by whole epochs
        return importlib.import_module("moco").learning_rate(args, step / steps_per_epoch)
    peak, total = args.base_lr * args.batch_size / 256, args.epochs * steps_per_epoch
    warmup, reach_peak = round(args.warmup_epochs * steps_per_epoch), args.method == "dino"
    return warmup_cosine(step, total, warmup, peak, end=args.min_lr, reach_peak=reach_peak)


def train(peer, args, dataset, loader, steps):
    """-> when the loop began and when each step ended, in seconds."""
    peak = args.lr if args.method == "moco" else args.base_lr * args.batch_size / 256
    groups = groups_of(peer, args.method, args.weight_decay)
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=args.momentum)
    order = ([index for _, index in batch] for batch in loader.order(0, steps))
    batches = torch.utils.data.DataLoader(
        InOrder(dataset, peer.views), batch_sampler=order, num_workers=loader.workers
    )
    total = args.epochs * loader.steps_per_epoch
    ended, shown = [time.time()], 0.0
    for i, x in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = peak
            if not group["fixed"]:
                group["lr"] = rate(args, i, loader.steps_per_epoch)
        loss = peer.step(x, i / total)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hasattr(peer, "after"):
            peer.after(i / total)
        shown = loss.item() if i == 0 else 0.98 * shown + 0.02 * loss.item()
        ended.append(time.time())
        if (i + 1) % 100 == 0:
            took = ended[-1] - ended[0]
            print(f"lightly: step {i + 1}/{steps} loss {shown:.3f}, {took:.0f} s", flush=True)
    return ended


# -------------------------------------------- comparing -----------------------------------------
def accuracy(encoder, view, args):
    """kNN in percent of the whole val split among the whole train split."""
    train_set = open_dataset(args.data, args.data_dir, "train")
    val_set = open_dataset(args.data, args.data_dir, "val")
    device = torch.device("cpu")
    if not (train_set.classes and val_set.classes):
        raise UserError(
            f"{args.data} has no classes to compare by: docs/data.md says where their names belong"
        )
    scores = knn_eval(encoder, train_set, val_set, view, device, max_train=0, max_val=0)
    return scores["knn_top1"]


def read_json(path):
    """-> the object in a .json, the list of objects in a .jsonl. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines()]
        return json.loads(text)
    except (OSError, ValueError) as error:
        advice = "give the folder of a finished run and an undamaged --out"
        raise UserError(f"{path} cannot be read ({error}): {advice}") from error


def read_run(folder):
    """-> arguments and rows of the log."""
    args = read_json(folder / "args.json")
    if (ROOT / f"{args['method']}.py").is_file():  # flags that are newer than the run
        args = vars(importlib.import_module(args["method"]).Args()) | args
    return types.SimpleNamespace(**args), read_json(folder / "metrics.jsonl")


# What the loop above does in one way, whatever the run did
ONLY = {"blur": False, "optimizer": "sgd", "local_crops": 0, "version": "2", "lr_scaling": "linear",
        "clip_grad": 0.0, "init": "", "stop_gradient": "on", "target": "ema",
        "freeze_last_layer": 0.0}  # fmt: skip


def refuse_others(args):
    if args.method not in (make.__name__ for make in (simclr, moco, byol, simsiam, dino)):
        raise UserError(
            f"lightly's loop for {args.method} is not written here: "
            "give a run of simclr, moco, byol, simsiam or dino"
        )
    only = dict(ONLY)
    if args.method == "dino":
        only |= {"warmup_teacher_temp": args.teacher_temp, "weight_decay_end": args.weight_decay}
        only |= {"head_layers": min(args.head_layers, 3)}  # lightly has no more
    for name, value in only.items():
        if getattr(args, name, value) != value:
            given = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise UserError(
                f"the run has {given}, and lightly's loop here knows only {value!r}: "
                "give a run of --recipe cifar10-cpu"
            )


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    where = "where the data is, if not where the run found it"
    parser.add_argument("--data-dir", default="", help=where)
    parser.add_argument("--out", type=Path, help="also write the numbers here, as json")
    options = parser.parse_args()
    args, rows = read_run(options.run)
    args.data_dir = options.data_dir or args.data_dir
    refuse_others(args)
    env, found = read_json(options.run / "env.json"), {}
    if options.out and not options.out.parent.is_dir():
        raise UserError(f"--out: make {options.out.parent} first")
    if options.out and options.out.exists():
        found = read_json(options.out)
    ours = open_network(options.run, torch.device("cpu"))
    start = open_network(options.run, torch.device("cpu"), random_weights=True)

    module = importlib.import_module(args.method)
    dataset = open_dataset(args.data, args.data_dir)
    loader = Loader(dataset, {}, {}, args.batch_size, args.seed, args.workers)
    torch.manual_seed(args.seed)
    backbone = module.image_encoder(module.build_model(args))
    backbone.requires_grad_(True)  # DINO evaluates its teacher, which has no gradients
    start.encoder.load_state_dict(backbone.state_dict())
    dim = backbone.eval()(torch.zeros(2, 3, args.image_size, args.image_size)).shape[1]
    peer = globals()[args.method](args, backbone.train(), dim)
    steps = ours.step  # the log may hold more, if the run was killed
    ended = train(peer, args, dataset, loader, steps)

    small = EvalView(8, interpolation="box", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    normalised = copy.copy(ours.view)  # lightly's transforms normalise
    normalised.mean, normalised.std = IMAGENET_MEAN, IMAGENET_STD
    row = {
        "steps": steps,
        "images": steps * args.batch_size,
        "here": accuracy(ours.encoder, ours.view, args),
        "lightly": accuracy(peer.encoder, normalised, args),
        "random weights": accuracy(start.encoder, start.view, args),
        "pixels": accuracy(nn.Flatten(), small, args),
        "seconds here": 60 * training_minutes([r for r in rows if "loss" in r], args.batch_size),
        "seconds lightly": ended[-1] - ended[0],
        "threads": torch.get_num_threads(),
        "workers": loader.workers,
        "command": training_command(env),
        "commit here": env.get("commit", ""),
        **environment(torch.device("cpu")),
    }
    row["versions"]["lightly"] = importlib.metadata.version("lightly")
    print(json.dumps(row, indent=1))
    if options.out:
        warn_of([row["commit"], row["commit here"]])
        found[args.method + (f"_s{args.seed}" if args.seed else "")] = row
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    with user_errors():
        main()
