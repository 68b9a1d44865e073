"""Training steps beside the libraries people would use, in one process, row after row in turn.

    clip      clip.py against open_clip and transformers: the same ViT-S/16 at 112 px
    simclr    simclr.py against lightly's modules and loss, as in its example (ResNet-18, 64 px)
    moco, byol, simsiam    the same
    dino      dino.py against lightly's loop, which encodes crop after crop (ViT-S/16, 2 x 96 px
              and 6 x 48 px). Its loop has PyTorch's default AdamW, a row has the fused one

    python benchmarks/side_by_side.py --methods byol dino --out results/side_by_side.json
    python benchmarks/side_by_side.py --clip-batch 256 --batch 512 --dino-batch 64    # on a GPU
    python benchmarks/side_by_side.py --clip-batch 256 --batch 512 --dino-batch 64 --compile

All rows of a method have the same weights, batch and precision. Nothing is timed before two steps
of each gave the same losses, to 1e-4; the second one compares gradient, optimizer, running average
and queue. On the CPU the clock counts work of this process only. On a GPU step_gib is the memory
that a step takes at most, beyond what all rows keep between steps. With --out, methods that were
measured before stay in the file. benchmarks/step.py holds the rows of clip and simclr, and says
where their differences come from.

Needs open_clip_torch, lightly and transformers.
"""

import argparse
import copy
import functools
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402

import byol  # noqa: E402
import dino  # noqa: E402
import moco  # noqa: E402
import simsiam  # noqa: E402
from common import init_distributed  # noqa: E402

NEEDED = "lightly", "open_clip", "transformers"
if lacking := [name for name in NEEDED if not importlib.util.find_spec(name)]:
    sys.exit(f"install {', '.join(lacking)} first: pip install -r requirements-test.txt")

import step  # noqa: E402
from record import warn_of  # noqa: E402
from step import Row  # noqa: E402


# -------------------------------------------- equal weights -------------------------------------
def copy_weights(ours, theirs):
    """Layer by layer, in the order in which the two networks hold them. A bias that only one side
    has is set to 0 and kept there: before a batch norm it changes nothing."""
    kinds = nn.Linear, nn.Conv2d, nn.modules.batchnorm._BatchNorm
    a, b = ([m for m in net.modules() if isinstance(m, kinds)] for net in (ours, theirs))
    if len(a) != len(b):
        sys.exit(f"not the same network: {len(a)} layers here, {len(b)} there")
    for x, y in zip(a, b):
        for name in ("weight", "bias"):
            p, q = getattr(x, name), getattr(y, name)
            if p is not None and q is not None:
                q.data.copy_(p.data)
            elif p is not None or q is not None:
                alone = q if p is None else p
                alone.data.fill_(float(name == "weight"))
                alone.requires_grad_(False)


def spread_norms(network):
    """Gains of batch norms at random: some start at 0 here, which would hide what follows them."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)


def resnet18():
    import torchvision

    return nn.Sequential(*list(torchvision.models.resnet18().children())[:-1], nn.Flatten())


def sgd(*networks):
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=0.03)


def pair(batch_size, device):
    return torch.rand(2, batch_size, 3, 64, 64, device=device)


# -------------------------------------------- the methods ---------------------------------------
def byol_rows(batch_size, device, compiled):
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import update_momentum

    mine = byol.build_model(byol.Args(arch="resnet18", image_size=64, hidden_dim=1024, out_dim=256))
    spread_norms(mine)
    mine.target.load_state_dict(mine.online.state_dict())  # as lightly starts
    peer = nn.ModuleList([resnet18(), BYOLProjectionHead(512, 1024, 256)])
    predictor = BYOLPredictionHead(256, 1024, 256)
    copy_weights(mine.online, peer)
    copy_weights(mine.predictor, predictor)
    mine.target.load_state_dict(mine.online.state_dict())
    mine = mine.to(device, memory_format=torch.channels_last).train()
    peer, predictor = peer.to(device).train(), predictor.to(device).train()
    slow = copy.deepcopy(peer).requires_grad_(False)
    criterion, (x1, x2) = NegativeCosineSimilarity(), pair(batch_size, device)
    forward = compile_if(mine, compiled)

    def ours(autocast):
        with autocast:
            outputs = forward(x1, x2)
        return byol.byol_loss(*outputs)

    encode = compile_if(nn.Sequential(*peer), compiled)
    encode_slow = compile_if(nn.Sequential(*slow), compiled)
    predict = compile_if(predictor, compiled)

    def theirs(autocast):
        with autocast:
            p = [predict(encode(x)) for x in (x1, x2)]
            with torch.no_grad():
                z = [encode_slow(x) for x in (x1, x2)]
        loss = 0.5 * (criterion(p[0].float(), z[1].float()) + criterion(p[1].float(), z[0].float()))
        return 4 * loss + 4  # lightly has -cos, the paper |p - z|^2 of both ways

    def their_update():
        update_momentum(peer, slow, 0.99)

    def our_update():
        byol.update_target(mine.online, mine.target, 0.99)

    return {
        "lightly": Row(peer, sgd(peer, predictor), theirs, their_update),
        "here": Row(mine, sgd(mine), ours, our_update),
    }, f"ResNet-18, 64 px, batch {batch_size}"


def simsiam_rows(batch_size, device, compiled):
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead

    flags = {"arch": "resnet18", "image_size": 64, "hidden_dim": 512, "out_dim": 512}
    args = simsiam.Args(**flags, predictor_dim=128, projector_layers=3)
    mine = simsiam.build_model(args)
    spread_norms(mine)
    peer = nn.Sequential(resnet18(), SimSiamProjectionHead(512, 512, 512))
    predictor = SimSiamPredictionHead(512, 128, 512)
    copy_weights(mine.encoder, peer)
    copy_weights(mine.predictor, predictor)
    mine = mine.to(device, memory_format=torch.channels_last).train()
    peer, predictor = peer.to(device).train(), predictor.to(device).train()
    criterion, (x1, x2) = NegativeCosineSimilarity(), pair(batch_size, device)
    forward = compile_if(mine, compiled)

    def ours(autocast):
        with autocast:
            outputs = forward(x1, x2)
        return simsiam.simsiam_loss(*outputs)

    encode, predict = compile_if(peer, compiled), compile_if(predictor, compiled)

    def theirs(autocast):
        with autocast:
            z = [encode(x) for x in (x1, x2)]
            p = [predict(one) for one in z]
        z = [one.detach().float() for one in z]
        return 0.5 * (criterion(z[0], p[1].float()) + criterion(z[1], p[0].float()))

    return {
        "lightly": Row(peer, sgd(peer, predictor), theirs),
        "here": Row(mine, sgd(mine), ours),
    }, f"ResNet-18, 64 px, batch {batch_size}"


def moco_rows(batch_size, device, compiled):
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import update_momentum

    size = 64 * batch_size
    flags = {"arch": "resnet18", "image_size": 64, "version": "2", "head_dim": 128}
    args = moco.Args(**flags, queue_size=size, batch_size=batch_size)
    mine = moco.group_batchnorm(moco.build_model(args), batch_size)
    spread_norms(mine.encoder_q)
    mine.encoder_k.load_state_dict(mine.encoder_q.state_dict())
    mine.queue = mine.queue.float()  # its loss is in float32
    peer = nn.Sequential(resnet18(), MoCoProjectionHead(512, 512, 128))
    copy_weights(mine.encoder_q, peer)
    mine = mine.to(device, memory_format=torch.channels_last).train()
    peer = peer.to(device).train()
    slow = copy.deepcopy(peer).requires_grad_(False)
    criterion = NTXentLoss(temperature=0.1, memory_bank_size=(size, 128)).to(device)
    bank, queue = criterion.memory_bank.bank, mine.queue
    bank.copy_(queue if bank.shape == queue.shape else queue.T)
    (x1, x2), keys = pair(batch_size, device), []
    order = torch.arange(batch_size - 1, -1, -1, device=device)
    forward = compile_if(mine, compiled)

    def ours(autocast):
        with autocast:
            (q,) = forward(x1)
        mine.update_key_encoder(0.99)
        with autocast:
            k = moco.shuffled_keys(mine.encoder_k, x2, order)
        keys.append(k)
        return moco.info_nce_loss(q, k, mine.queue, 0.1)[0]

    encode = compile_if(peer, compiled)

    def theirs(autocast):
        update_momentum(peer, slow, 0.99)
        with autocast:
            q = encode(x1)
            with torch.no_grad():
                k = slow(x2)
        return criterion(q.float(), k.float())

    return {
        "lightly": Row(peer, sgd(peer), theirs),
        "here": Row(mine, sgd(mine.encoder_q), ours, lambda: mine.enqueue(keys.pop())),
    }, f"ResNet-18, 64 px, batch {batch_size}, queue {size}"


def dino_rows(batch_size, device, compiled, outputs=4096):
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import update_momentum

    args = dino.Args(arch="vit_small_patch16", image_size=96, local_size=48, drop_path=0.0)
    args.out_dim = outputs
    mine = dino.build_model(args)
    mine.center = mine.center.float()  # its loss is in float32
    backbone, own_head = copy.deepcopy(mine.student.backbone), copy.deepcopy(mine.student.head)
    mine = mine.to(device, memory_format=torch.channels_last).train()
    crops = [torch.rand(batch_size, 3, 96, 96, device=device) for _ in range(2)]
    crops += [torch.rand(batch_size, 3, 48, 48, device=device) for _ in range(6)]
    teachers = []
    forward = compile_if(mine, compiled)

    def ours(autocast):
        with autocast:
            student, teacher = forward(crops)
        teachers.append(teacher)
        return dino.dino_loss(student, teacher, mine.center, 0.04, 0.1)[0]

    def after():
        dino.update_center(mine.center, teachers.pop(), 0.9)
        dino.update_teacher(mine.student, mine.teacher, 0.99)

    def adamw(network, fused):
        trained = [p for p in network.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-4, fused=fused)

    def network():
        head = DINOProjectionHead(backbone.feature_dim, args.hidden_dim, 256, outputs)
        copy_weights(own_head.mlp, head.layers)
        direction = own_head.last_layer.parametrizations.weight.original1
        head.last_layer.weight_v.data.copy_(direction.data)
        return nn.Sequential(copy.deepcopy(backbone), head).to(device).train()

    def lightly_row(fused):
        student, teacher = network(), network().requires_grad_(False)
        criterion = DINOLoss(output_dim=outputs, teacher_temp=0.04, warmup_teacher_temp_epochs=1)
        criterion = criterion.to(device).float()  # as here: its center is of torch's default dtype
        encode, encode_slow = compile_if(student, compiled), compile_if(teacher, compiled)

        def loss(autocast):
            with autocast:
                with torch.no_grad():
                    t = [encode_slow(x) for x in crops[:2]]
                s = [encode(x) for x in crops]
            return criterion([x.float() for x in t], [x.float() for x in s], epoch=1)

        after = functools.partial(update_momentum, student, teacher, 0.99)
        return Row(student, adamw(student, fused), loss, after)

    return {
        "lightly": lightly_row(fused=None),
        "lightly, fused AdamW": lightly_row(fused=True),
        "here": Row(mine, adamw(mine, True), ours, after),
    }, f"ViT-S/16, 2 x 96 + 6 x 48 px, batch {batch_size}, {outputs} prototypes"


def compile_if(network, compiled):
    return torch.compile(network) if compiled else network


# -------------------------------------------- measuring -----------------------------------------
def methods(args):
    """name -> (function that makes the rows, its batch, pairs of rows that compute the same)."""
    plain = [("lightly", "here")]
    clip = "open_clip", "open_clip, fused AdamW", "transformers", "here"
    clip = [(name, "here, 77 tokens") for name in clip]
    dino = [(name, "here") for name in ("lightly", "lightly, fused AdamW")]
    one = [("lightly", "here, one view at a time"), ("lightly, views in one batch", "here")]
    return {
        "clip": (step.clip_rows, args.clip_batch, clip),
        "simclr": (step.simclr_rows, args.batch, one),
        "moco": (moco_rows, args.batch, plain),
        "byol": (byol_rows, args.batch, plain),
        "simsiam": (simsiam_rows, args.batch, plain),
        "dino": (dino_rows, args.dino_batch, dino),
    }


def compare(method, args, device):
    """-> what goes into the record."""
    make, batch_size, pairs = methods(args)[method]
    torch.manual_seed(0)
    step.check(make, pairs, device)
    rows, setting = make(batch_size, device, args.compile)
    seconds = step.measure(rows, args.rounds, args.dtype, device)
    found = {"setting": setting, "rows": {}}
    ours = seconds["here"]
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, ours)]  # of the same round
        row = {
            "ms_min": 1e3 * min(taken),
            "ms_median": 1e3 * statistics.median(taken),
            "over_here": min(taken) / min(ours),
            "over_here_median": statistics.median(ratios),
        }
        if device.type == "cuda":
            row["step_gib"] = step.peak_gib(rows[name], args.dtype)
        found["rows"][name] = row
        print(f"{method:8}{name:28}{row['ms_min']:10.1f} ms, {row['over_here']:.2f} times ours "
              f"(median of {row['over_here_median']:.2f})", flush=True)  # fmt: skip
    return found


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    names = "clip", "simclr", "moco", "byol", "simsiam", "dino"
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clip-batch", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64, help="of simclr, moco, byol and simsiam")
    parser.add_argument("--dino-batch", type=int, default=4)
    kinds = "auto (bf16 on a GPU, else fp32), fp32, bf16, fp16"
    parser.add_argument("--dtype", default="auto", help=kinds)
    parser.add_argument("--compile", action="store_true", help="torch.compile every model")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, help="also write the numbers here, as json")
    args = parser.parse_args()
    device = init_distributed("")
    torch.set_num_threads(args.threads)
    machine = step.environment()  # before --out, where git knows that file, changes the tree
    results = {}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text())["results"]
    for method in args.methods:
        results[method] = compare(method, args, device)
        results[method] |= {"rounds": args.rounds, "date": time.strftime("%Y-%m-%d")}
        results[method]["commit"] = machine["commit"]
        if args.out:
            record = machine | {"gpu": None}
            record["dtype"] = step.computed_in(args.dtype, device)
            if device.type == "cuda":
                record["gpu"] = torch.cuda.get_device_name()
            for name in ("lightly", "transformers"):
                record[name] = importlib.metadata.version(name)
            record["open_clip"] = importlib.metadata.version("open_clip_torch")
            args.out.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")
    if args.out:
        warn_of(found.get("commit", "") for found in results.values())


if __name__ == "__main__":
    main()
