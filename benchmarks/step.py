"""What a training step costs beside other libraries' steps: forward, loss, backward, optimizer.

clip.py against open_clip and, where it is installed, transformers (the same ViT-S/16 at 112 px),
simclr.py against lightly's modules and loss, put together as in its examples/pytorch/simclr.py
(ResNet-18, 64 px). Both sides have the same weights, batch and precision. Nothing is timed before
two steps of each gave the same losses, to 1e-4: two, so that gradient and optimizer are compared
too. With --compile these two steps are not compiled, while those that are timed are. On the CPU the
clock counts work of this process only. Rows in between say where a difference comes from:

    here, 77 tokens                open_clip pads all captions to 77, clip.py to a batch's longest
    open_clip, fused AdamW         its script has PyTorch's default, transformers' and clip.py fused
    lightly, views in one batch    its example encodes one view at a time: half for batch norm
    here, one view at a time       simclr.py doing the same

    python benchmarks/step.py --out step.json                        # two minutes of one core
    python benchmarks/step.py --clip-batch 256 --simclr-batch 512    # on a GPU: bfloat16; --compile

All rows take turns, round by round. Needs open_clip_torch and lightly.
"""

import argparse
import copy
import importlib.util
import json
import math
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lightly  # noqa: E402
import open_clip  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from augment import environment  # noqa: E402
from lightly.loss import NTXentLoss  # noqa: E402
from lightly.models.modules import SimCLRProjectionHead  # noqa: E402
from record import warn_of  # noqa: E402
from torch import nn  # noqa: E402

import clip  # noqa: E402
import simclr  # noqa: E402
from common import init_distributed, mixed_precision  # noqa: E402


class Row:
    """A model, its optimizer and its loss: everything of a step but the data."""

    def __init__(self, model, optimizer, loss, after=lambda: None):
        self.model, self.optimizer, self.loss, self.after = model, optimizer, loss, after

    def step(self, autocast, scaler):
        """-> the loss before the step."""
        loss = self.loss(autocast)
        scaler.scale(loss).backward()
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad()
        self.after()
        return loss.detach()


# -------------------------------------------- CLIP --------------------------------------------
def caption_ids(batch_size, vocab_size):
    """-> token ids (b, 77), padded with 0, and the longest length. Lengths are log-normal with mean
    15: those of Flickr8k with a few longer ones. Quantiles, not draws, so that every batch size has
    them."""
    ids = torch.zeros(batch_size, 77, dtype=torch.long)
    normal = torch.special.ndtri((torch.arange(batch_size) + 0.5) / batch_size)
    lengths = (math.log(14.1) + 0.35 * normal).exp().round().int().clamp(4, 77).tolist()
    for row, length in zip(ids, lengths):
        row[:length] = torch.randint(1, vocab_size - 2, (length,))
        row[0], row[length - 1] = vocab_size - 2, vocab_size - 1
    return ids, max(lengths)


def transformers_clip(model):
    """-> transformers' CLIPModel with the weights of a clip.CLIP for images of 112 px."""
    from transformers import CLIPConfig, CLIPModel

    from evaluation import exports

    view = SimpleNamespace(size=112)
    state, files, _ = exports.to_transformers_clip(SimpleNamespace(model=model, view=view))
    peer = CLIPModel(CLIPConfig.from_dict(files["config.json"]))
    missing, unexpected = peer.load_state_dict(state, strict=False)
    wrong = [*unexpected, *(name for name in missing if not name.endswith("position_ids"))]
    assert not wrong, wrong
    return peer


def clip_rows(batch_size, device, compiled):
    """-> {name: Row}, a description of the batch."""
    args = clip.Args(arch="vit_small_patch16", image_size=112)
    embed_dim, layers, width, text_width = clip.ARCHS["vit_small"]
    vision = {"image_size": 112, "patch_size": 16, "layers": layers, "width": width}
    vision["head_width"] = 64
    text = {"context_length": 77, "vocab_size": 49408, "layers": 12, "width": text_width}
    text["heads"] = text_width // 64
    mine, peer = clip.build_model(args), open_clip.CLIP(embed_dim, vision, text, quick_gelu=True)
    peer.load_state_dict(mine.state_dict())
    models = {"open_clip": peer, "open_clip, fused AdamW": copy.deepcopy(peer)}
    if importlib.util.find_spec("transformers"):
        models["transformers"] = transformers_clip(mine)
    models |= {"here, 77 tokens": copy.deepcopy(mine), "here": mine}
    criterion = open_clip.ClipLoss()
    image = torch.randn(batch_size, 3, 112, 112, device=device)
    ids, longest = caption_ids(batch_size, 49408)
    cut = (longest + 7) // 8 * 8 if device.type == "cuda" else longest  # as data.Loader does
    ids = ids.to(device)

    def row(name, model):
        model = model.to(device).train()
        decay = [p for p in model.parameters() if p.ndim >= 2]
        no_decay = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decay, "weight_decay": 0.2}, {"params": no_decay, "weight_decay": 0.0}]
        here = name.startswith("here")
        fused = True if name != "open_clip" else None  # each as its own training loop has it
        optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.98), eps=1e-6, fused=fused)
        batch = ids[:, :cut] if name == "here" else ids
        forward = torch.compile(model) if compiled else model

        def loss(autocast):
            with autocast:
                if name == "transformers":
                    return forward(input_ids=batch, pixel_values=image, return_loss=True).loss
                embeds = forward(image, batch)
            if here:
                return clip.clip_loss(*embeds, model.logit_scale.exp())
            with autocast:
                return criterion(*embeds)

        def clamp():
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))

        return Row(model, optimizer, loss, clamp)

    rows = {name: row(name, model) for name, model in models.items()}
    mean = ids.ne(0).sum(1).float().mean()
    captions = f"captions of {mean:.1f} tokens (longest {longest})"
    return rows, f"ViT-S/16, 112 px, batch {batch_size}, {captions}"


# -------------------------------------------- SimCLR --------------------------------------------
def simclr_rows(batch_size, device, compiled):
    """-> {name: Row}, a description of the batch."""
    resnet = torchvision.models.resnet18()
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):  # else some start at 0 here and at 1 there
            nn.init.uniform_(module.weight, 0.5, 1.5)
    head = SimCLRProjectionHead(512, 512, 128)
    peer = nn.Sequential(*list(resnet.children())[:-1], nn.Flatten(), head)
    peer[-1].layers[-1].bias.requires_grad_(False)  # the last batch norm has none here
    mine = simclr.build_model(simclr.Args(arch="resnet18", image_size=64))
    theirs, names = peer.state_dict(), {"linears.0": "layers.0", "norms.0": "layers.1"}
    names |= {"linears.1": "layers.3", "norms.1": "layers.4"}
    state = {f"backbone.{k}": v for k, v in resnet.state_dict().items() if not k.startswith("fc.")}
    for ours, name in names.items():
        prefix = f"{len(peer) - 1}.{name}."
        found = {k.removeprefix(prefix): v for k, v in theirs.items() if k.startswith(prefix)}
        state |= {f"head.{ours}.{k}": v for k, v in found.items()}
    del state["head.norms.1.bias"]
    mine.load_state_dict(state)
    views = torch.rand(2, batch_size, 3, 64, 64, device=device)
    criterion = NTXentLoss(temperature=0.5)

    def row(name):
        here, together = "here" in name, name in ("here", "lightly, views in one batch")
        layout = torch.channels_last if here else torch.contiguous_format
        model = copy.deepcopy(mine if here else peer).to(device, memory_format=layout).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.06)
        forward = torch.compile(model) if compiled else model

        def loss(autocast):
            with autocast:
                z1, z2 = forward(torch.cat([*views])).chunk(2) if together else map(forward, views)
            return simclr.nt_xent_loss(z1, z2, 0.5) if here else criterion(z1.float(), z2.float())

        return Row(model, optimizer, loss)

    names = "lightly", "here, one view at a time", "lightly, views in one batch", "here"
    return {name: row(name) for name in names}, f"ResNet-18, 64 px, batch {batch_size}"


# -------------------------------------------- measuring -----------------------------------------
def check(make, pairs, device):
    """Exits unless each pair of rows has the same losses in its first two steps, on a small batch
    in float64: float32 would blur the second, as a ReLU that turns over is enough. Every row is in
    a pair. -> losses by name."""
    precision = torch.get_float32_matmul_precision()
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("highest")  # the losses here compute in float32
    rows, (plain, scaler) = make(8, device, compiled=False)[0], mixed_precision("fp32", device)
    assert set(rows) == {name for pair in pairs for name in pair}
    losses = {}
    for name, row in rows.items():
        losses[name] = [row.step(plain, scaler).item() for _ in range(2)]
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision(precision)
    for a, b in pairs:
        # not any(... > 1e-4), which is false for NaN
        if not all(abs(x / y - 1) <= 1e-4 for x, y in zip(losses[a], losses[b])):
            sys.exit(f"not the same computation: {a} has losses {losses[a]}, {b} {losses[b]}")
    return losses


def computed_in(dtype, device):
    """Name of the type that matrix products have under --dtype."""
    one = torch.ones(1, 1, device=device)
    with mixed_precision(dtype, device)[0]:
        return str((one @ one).dtype).removeprefix("torch.")


def measure(rows, rounds, dtype, device):
    """-> seconds by name, one per round. Every other round goes backwards, so that no row always
    follows the same. On the CPU, seconds of its work: what other processes take meanwhile does not
    count."""
    autocast, scaler = mixed_precision(dtype, device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds = {name: [] for name in rows}
    for i in range(rounds + 1):
        for name, row in [*rows.items()][:: 1 if i % 2 else -1]:
            start = clock()
            row.step(autocast, scaler)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return {name: s[1:] for name, s in seconds.items()}  # the first round warms up


def peak_gib(row, dtype):
    """-> GiB that one more step on a GPU takes at most, beyond what all rows keep between steps."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    row.step(*mixed_precision(dtype, torch.device("cuda")))
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clip-batch", type=int, default=16)
    parser.add_argument("--simclr-batch", type=int, default=64)
    kinds = "auto (bf16 on a GPU, else fp32), fp32, bf16, fp16"
    parser.add_argument("--dtype", default="auto", help=kinds)
    parser.add_argument("--compile", action="store_true", help="torch.compile every model")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, help="also write the numbers here, as json")
    args = parser.parse_args()
    device = init_distributed("")  # the first there is, as in a run
    torch.set_num_threads(args.threads)
    dtype = computed_in(args.dtype, device)
    clip_pairs = [("open_clip", "here"), ("open_clip", "here, 77 tokens")]
    clip_pairs.append(("open_clip, fused AdamW", "here, 77 tokens"))
    if importlib.util.find_spec("transformers"):
        clip_pairs.append(("transformers", "here, 77 tokens"))
    simclr_pairs = [("lightly", "here, one view at a time")]
    simclr_pairs += [("lightly, views in one batch", "here")]
    cases = {
        "clip": (clip_rows, args.clip_batch, clip_pairs),
        "simclr": (simclr_rows, args.simclr_batch, simclr_pairs),
    }
    results = {}
    for method, (make, batch_size, pairs) in cases.items():
        torch.manual_seed(0)
        losses = check(make, pairs, device)
        rows, setting = make(batch_size, device, args.compile)
        seconds = measure(rows, args.rounds, args.dtype, device)
        first = next(iter(rows))  # the library as it is
        fastest, median = min(seconds[first]), statistics.median(seconds[first])
        print(f"{method}: {setting}, {device.type}, {dtype}, losses agree", flush=True)
        title = f"{first} takes: min"
        print(f"{'':28}{'ms: min':>10}{'median':>10}{title:>24}{'median':>10}", flush=True)
        results[method] = {"setting": setting, "rows": {}}
        for name, s in seconds.items():
            a, b = min(s), statistics.median(s)
            cells = f"{1e3 * a:10.1f}{1e3 * b:10.1f}{fastest / a:22.2f} x{median / b:8.2f} x"
            print(f"{name:28}{cells}", flush=True)
            results[method]["rows"][name] = {
                "ms_min": 1e3 * a,
                "ms_median": 1e3 * b,
                f"{first}_over_this_min": fastest / a,
                f"{first}_over_this_median": median / b,
                "first_two_losses": losses[name],
            }
    if args.out:
        flags = {k: v for k, v in vars(args).items() if k != "out"}
        flags |= {"device": device.type, "dtype": dtype}
        versions = {m.__name__: m.__version__ for m in (open_clip, lightly)}
        gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
        record = environment() | {"gpu": gpu, "date": time.strftime("%Y-%m-%d")} | versions | flags
        warn_of([record["commit"]])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
