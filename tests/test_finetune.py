"""finetune.py: its parts against their formulas, and fine-tuning as a whole, on one and two processes."""

import copy
import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm.optim
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import clip
import declip
import dino
import dinov2
import runs
import slip
from command import Args, main
from common import UserError, init_distributed, rank, user_errors
from data import decode
from evaluation import finetune
from knn import extract
from monitor import EvalView
from toys import QUICK, TRANSFORMER, VIEW, Toy, full_disk, vit

CPU = torch.device("cpu")


def resnet18():
    return runs.module_of("simclr").resnet("resnet18")


def small_resnet():
    return runs.module_of("simclr").resnet("resnet10", width=0.25)


# ------------------------------------------------ mixing ------------------------------------------------
@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_targets_are_the_shares_of_the_pixels(mixup, cutmix):
    """Each image is of one value, its own: what is in a mixed image says what its target has to be."""
    values = torch.tensor([1.0, 3.0, -1.0, 2.0, 0.0, 5.0])
    x = values.view(6, 1, 1, 1).expand(6, 3, 8, 10)
    labels = torch.tensor([0, 1, 2, 3, 4, 4])
    targets = finetune.smooth_targets(labels, 5, 0.1)
    seen = set()
    for seed in range(20):
        mixed, soft = finetune.mix(x, targets, mixup, cutmix, seed)
        torch.testing.assert_close(soft.sum(1), torch.ones(6))
        for i in range(6):
            own, other = values[i], values[i ^ 1]
            share = ((mixed[i] - other) / (own - other)).mean().item()
            torch.testing.assert_close(soft[i], share * targets[i] + (1 - share) * targets[i ^ 1], atol=1e-5, rtol=0)
            seen.add(round(share, 3))
        constant = all(len(image.unique()) == 1 for image in mixed)
        assert constant if not cutmix else True
    assert len(seen) > 10
    again, _ = finetune.mix(x, targets, mixup, cutmix, 19)
    assert torch.equal(mixed, again)


def test_mixing_keeps_to_pairs_and_to_the_global_generator():
    """Two halves of a batch, each by itself, are the whole batch: it does not matter which process has them."""
    g = torch.Generator().manual_seed(0)
    x, targets = torch.rand(8, 3, 6, 6, generator=g), torch.rand(8, 4, generator=g)
    state = torch.get_rng_state()
    for seed in range(8):
        whole = finetune.mix(x, targets, 0.8, 1.0, seed)
        halves = [finetune.mix(x[i : i + 4], targets[i : i + 4], 0.8, 1.0, seed) for i in (0, 4)]
        for a, b in zip(whole, zip(*halves)):
            torch.testing.assert_close(a, torch.cat(b))
    assert torch.equal(torch.get_rng_state(), state)
    assert finetune.mix(x, targets, 0, 0, 1) == (x, targets)


def test_mixup_is_torchvisions():
    x, targets = torch.rand(2, 3, 5, 5), F.one_hot(torch.tensor([2, 0]), 3).float()
    mixup, cutmix = v2.MixUp(alpha=0.8, num_classes=3), v2.CutMix(alpha=1.0, num_classes=3)
    for operation, ours in ((mixup, (0.8, 0)), (cutmix, (0, 1.0)), (v2.RandomChoice([mixup, cutmix]), (0.8, 1.0))):
        for seed in range(5):
            with finetune.seeded(seed):
                want = operation(x, torch.tensor([2, 0]))
            torch.testing.assert_close(finetune.mix(x, targets, *ours, seed), want)


def test_smoothed_targets():
    targets = finetune.smooth_targets(torch.tensor([1, -1, 3]), 4, 0.2)
    torch.testing.assert_close(targets[0], torch.tensor([0.05, 0.85, 0.05, 0.05]))
    assert not targets[1].any()  # without a label there is nothing to learn
    logits = torch.randn(3, 4)
    want = F.cross_entropy(logits[::2], torch.tensor([1, 3]), label_smoothing=0.2, reduction="sum") / 3
    torch.testing.assert_close(F.cross_entropy(logits, targets), want)


# ------------------------------------------------ augmentation ------------------------------------------------
def test_view_is_a_function_of_the_sample():
    view, image = finetune.FineTuneView(VIEW, randaugment=9, erase=0.5), decode(Toy(1)[0].image)
    state, crops = torch.get_rng_state(), []
    for _ in range(2):
        for seed in range(6):
            rng = random.Random(seed)
            crop, draw = view.crop(image, rng), view.sample(rng)
            assert crop.shape == (3, 16, 16) and crop.dtype == torch.uint8
            crops.append(view(crop[None], {k: torch.tensor([v]) for k, v in draw.items()}))
            torch.randn(3)
    assert all(torch.equal(a, b) for a, b in zip(crops[:6], crops[6:]))
    assert len({float(crop.sum()) for crop in crops}) == 6
    torch.set_rng_state(state)


def test_erasing_is_of_single_samples_and_rectangles():
    view = finetune.FineTuneView(VIEW, erase=0.25)
    x = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    out = view(x, {"flip": torch.zeros(4, dtype=torch.bool), "erase": torch.tensor([0, 7, 0, 9])})
    plain = VIEW(x, {})
    assert torch.equal(out[[0, 2]], plain[[0, 2]])
    for i in (1, 3):
        changed = (out[i] != plain[i]).any(0)
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        box = changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.float().mean() > 0.99 and 0.01 < changed.float().mean() < 0.4
        assert out[i][:, changed].unique().numel() > 10  # noise, not one colour
    assert [finetune.FineTuneView(VIEW).sample(random.Random(i))["erase"] for i in range(9)] == [0] * 9


# ------------------------------------------------ layers ------------------------------------------------
def scales(model, layer_decay=0.65, weight_decay=0.05):
    """{name: (scale, weight decay)} of all parameters."""
    names = [name for name, _ in model.named_parameters()]
    groups = finetune.parameter_groups(model, names, weight_decay, layer_decay)
    found = {id(p): (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(names) == len(found)
    return {name: found[id(p)] for name, p in model.named_parameters()}


def with_head(encoder, dim):
    model = nn.Sequential()
    model.add_module("encoder", encoder)
    model.add_module("head", nn.Linear(dim, 3))
    return model


def test_layer_decay_of_a_transformer():
    """lr * 0.65^(L + 1 - layer), as BEiT's get_num_layer_for_vit numbers them."""
    for encoder, depth in ((vit(), 3), (dino.VisionTransformer(16, 8, 64, 5, 2), 5)):
        found = scales(with_head(encoder, 64))
        for name, (scale, decay) in found.items():
            layer = depth + 1
            if "patch_embed" in name or "cls_token" in name or "pos_embed" in name:
                layer = 0
            elif ".blocks." in name:
                layer = int(name.split(".blocks.")[1].split(".")[0]) + 1
            assert scale == pytest.approx(0.65 ** (depth + 1 - layer)), name
            plain = name.endswith("bias") or "norm" in name or "cls_token" in name or "pos_embed" in name
            assert decay == (0.0 if plain else 0.05), name
        assert found["head.weight"] == (1.0, 0.05) and found["encoder.norm.weight"] == (1.0, 0.0)
        assert found["encoder.patch_embed.proj.weight"][0] == pytest.approx(0.65 ** (depth + 1))


def test_layer_decay_beside_timms():
    """The last norm alone differs: timm counts it to the last block, BEiT to the classifier."""
    vit = timm.models.VisionTransformer(32, 8, num_classes=7, embed_dim=64, depth=3, num_heads=2)
    options = {"no_weight_decay_list": vit.no_weight_decay(), "layer_decay": 0.65}
    theirs = {id(p): (g["lr_scale"], g["weight_decay"])
              for g in timm.optim.param_groups_layer_decay(vit, 0.05, **options) for p in g["params"]}  # fmt: skip
    ours, named = scales(vit), dict(vit.named_parameters())
    assert {name for name in ours if ours[name] != pytest.approx(theirs[id(named[name])])} == {"norm.weight", "norm.bias"}


def test_layer_decay_of_a_resnet():
    found = scales(with_head(resnet18(), 512))  # 8 blocks
    assert found["encoder.conv1.weight"] == (pytest.approx(0.65**9), 0.05)
    assert found["encoder.bn1.weight"] == (pytest.approx(0.65**9), 0.0)
    assert found["encoder.layer1.0.conv1.weight"][0] == pytest.approx(0.65**8)
    assert found["encoder.layer2.0.downsample.0.weight"][0] == pytest.approx(0.65**6)
    assert found["encoder.layer4.1.bn2.bias"] == (pytest.approx(0.65), 0.0)
    assert found["head.weight"] == (1.0, 0.05) and found["head.bias"] == (1.0, 0.0)


def test_layers_of_every_family():
    """OpenAI's names, registers and LayerScale, EfficientNet; a head kept below the classifier comes last."""
    visual = clip.VisionTransformer(16, 8, 64, 2, 2, 16)
    found = scales(with_head(visual, 64))
    assert found["encoder.positional_embedding"] == (pytest.approx(0.65**3), 0.0)
    assert found["encoder.transformer.resblocks.0.attn.in_proj_weight"] == (pytest.approx(0.65**2), 0.05)
    assert found["encoder.ln_post.weight"] == (1.0, 0.0)
    found = scales(with_head(declip.VisionTransformer(16, 8, 64, 2, 16), 64))  # registers its last norm before the blocks
    assert found["encoder.ln_post.weight"] == (1.0, 0.0)
    assert found["encoder.ln_pre.weight"] == (pytest.approx(0.65**3), 0.0)
    assert found["encoder.transformer.resblocks.1.attn.in_proj_weight"][0] == pytest.approx(0.65)
    found = scales(with_head(declip.ModifiedResNet(32, (1, 1, 1, 1), 16), 2048))  # and two of its first layers behind them
    for name, (scale, _) in found.items():
        if re.match(r"encoder\.(conv|bn)[123]\.", name):
            assert scale == pytest.approx(0.65**5), name
    assert found["encoder.layer1.0.bn3.weight"][0] == pytest.approx(0.65**4) and found["encoder.attnpool.positional_embedding"][0] == 1
    found = scales(with_head(dinov2.VisionTransformer(16, 8, 64, 2, 2, registers=2), 64))
    assert found["encoder.register_tokens"] == (pytest.approx(0.65**3), 0.0)
    assert found["encoder.blocks.1.ls1.gamma"] == (pytest.approx(0.65), 0.0)
    align = runs.module_of("align")
    net = align.EfficientNet(*align.ARCHS["efficientnet_micro"])
    found, depth = scales(with_head(net, net.dim)), sum(map(len, net.features[1:]))
    values = sorted({scale for scale, _ in found.values()})
    assert values == pytest.approx([0.65**k for k in range(depth + 1, -1, -1)])
    simclr = runs.module_of("simclr")
    model = simclr.build_model(simclr.parse_args(simclr.Args, simclr.RECIPES, [*runs.FLAGS["simclr"], *runs.RESNET18]))
    encoder = simclr.image_encoder(model, head_layer=1)
    found = scales(with_head(encoder, 512))
    assert found["encoder.head.linears.0.weight"][0] == 1.0 and found["encoder.backbone.conv1.weight"][0] < 0.03


def test_unused_parameters_are_frozen():
    """A mask token and the projection below a CLIP's pooled features: they would stall DistributedDataParallel."""
    model, names = finetune.classifier(dinov2.VisionTransformer(16, 8, 64, 2, 2), 3, VIEW, CPU)
    assert "encoder.mask_token" not in names and "encoder.pos_embed" in names and "head.bias" in names
    args = clip.parse_args(clip.Args, clip.RECIPES, runs.FLAGS["clip"])
    model, names = finetune.classifier(clip.image_encoder(clip.build_model(args)), 3, EvalView(32), CPU)
    assert "encoder.visual.proj" not in names and "encoder.visual.conv1.weight" in names
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names)
    assert 0 < model.head.weight.std() < 5e-5


@pytest.mark.parametrize("network", ["slip", "clip", "dinov2"])
def test_drop_path(network):
    """Rates grow to the last block; a sample whose branches all are left out only passes the embedding."""
    encoder = {"slip": vit, "clip": lambda: clip.VisionTransformer(16, 8, 64, 3, 2, 16),
               "dinov2": lambda: dinov2.VisionTransformer(16, 8, 64, 3, 2, gamma=1.0)}[network]()  # fmt: skip
    blocks, x = finetune.blocks_of(encoder), torch.randn(6, 3, 16, 16)
    with torch.no_grad():
        want = encoder.eval()(x)
        drop = finetune.DropPath(blocks, 0.6)
        assert drop.rates.tolist() == pytest.approx([0, 0, 0.3, 0.3, 0.6, 0.6])
        torch.testing.assert_close(encoder.eval()(x), want)  # nothing happens in evaluation
        drop.sample(4000, 1, CPU)
        share = (drop.factors == 0).float().mean(0)
        torch.testing.assert_close(share, drop.rates, atol=0.03, rtol=0)
        torch.testing.assert_close(drop.factors.mean(0), torch.ones(6), atol=0.06, rtol=0)  # scaled up
        drop.factors = torch.ones(6, 6)
        torch.testing.assert_close(encoder.train()(x), want)
        drop.factors = torch.ones(6, 6).index_fill(0, torch.tensor([2]), 0)
        got = encoder(x)
        without = copy.deepcopy(encoder)
        for block in finetune.blocks_of(without):
            block.forward = lambda x, *_, **__: x
        torch.testing.assert_close(got[2:3], without(x[2:3]))
        torch.testing.assert_close(got[[0, 1, 3, 4, 5]], want[[0, 1, 3, 4, 5]])


def test_ema_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = copy.deepcopy(model)
    want = {k: v.double() for k, v in ema.state_dict().items()}
    for _ in range(3):
        for p in model.parameters():
            p.data += torch.randn_like(p)
        model(torch.randn(5, 3))
        finetune.update_ema(ema, model, 0.9)
        for k, v in model.state_dict().items():
            want[k] = 0.9 * want[k] + 0.1 * v.double() if v.is_floating_point() else v.double()
    for k, v in ema.state_dict().items():
        torch.testing.assert_close(v.double(), want[k], atol=1e-6, rtol=1e-5)
    assert ema[1].num_batches_tracked == 3


# ------------------------------------------------ recipes ------------------------------------------------
def test_recipes():
    wide = [slip.VisionTransformer(16, 8, width, 1, 2) for width in (384, 768, 1024)]
    small, base, large = (finetune.recipe(encoder, 50000) for encoder in wide)
    assert (small["drop_path"], base["drop_path"], large["drop_path"]) == (0.0, 0.1, 0.1)
    assert (base["layer_decay"], large["layer_decay"]) == (0.65, 0.75) and (base["epochs"], large["epochs"]) == (100, 50)
    assert base["base_lr"] * 1024 / 256 == 4e-3
    assert finetune.recipe(clip.VisionTransformer(16, 8, 768, 1, 2, 16), 50000) == base
    few = finetune.recipe(wide[1], 50000, 0.1)
    assert few["epochs"] == 1000 and few["base_lr"] * 1024 / 256 == 5e-6
    net = resnet18()
    assert finetune.recipe(net, 1_281_167)["epochs"] == 4 and finetune.recipe(net, 50_000)["epochs"] == 102
    one, ten = (finetune.recipe(net, 1_281_167, labels) for labels in (0.01, 0.1))
    assert (one["train_batch"], ten["train_batch"], one["epochs"], ten["epochs"]) == (4096, 4096, 60, 30)
    assert finetune.recipe(net, 50_000, 0.01)["train_batch"] == 128
    assert set(one) | set(base) | set(few) <= set(vars(Args()))


class Uneven(Toy):
    """Of the first class there are as many as of the others together."""

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        return sample._replace(label=[0, 1, 0, 2][i % 4])


def test_few_labels_are_balanced_and_fixed_by_the_seed():
    data = Uneven(1200)
    part = finetune.labelled_part(data, 0.1, 0)
    labels = torch.tensor([data[i].label for i in part.nonzero().flatten().tolist()])
    assert labels.bincount().tolist() == [40, 40, 40]
    assert torch.equal(part, finetune.labelled_part(data, 0.1, 0))
    assert not torch.equal(part, finetune.labelled_part(data, 0.1, 1))
    less = finetune.labelled_part(data, 0.01, 0)
    assert less.sum() == 12 and not (less & ~part).any()
    assert torch.equal(part, runs.module_of("simclrv2").labelled_part(data, 0.1, 0))


class Torn(Uneven):
    """Every fifth sample cannot be read."""

    def __getitem__(self, i):
        if i % 5 == 0:
            raise ValueError("torn")
        return super().__getitem__(i)


def test_few_labels_say_what_they_passed_over(capsys):
    """Here all samples are read, because one class has too few, and those that cannot be read are counted."""
    for labelled_part in (finetune.labelled_part, runs.module_of("simclrv2").labelled_part):
        part = labelled_part(Torn(60), 0.75, 0)
        assert not part[::5].any() and part.sum() == 12 + 12 + 15
        assert capsys.readouterr().err == "toy: passed over 12 samples that cannot be read\n"
        labelled_part(Uneven(60), 0.75, 0)
        assert capsys.readouterr().err == ""


# ------------------------------------------------ training ------------------------------------------------
def top1(model, data):
    logits, labels = extract(model, data, VIEW, CPU)
    return (logits.argmax(1) == labels).float().mean().item()


def tuned(encoder, n=160, **flags):
    return finetune.fine_tune(encoder, Toy(n), VIEW, 3, Args(**{**QUICK, **flags}), CPU)


@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_transformer_learns(ema):
    model, rows = tuned(vit(), **TRANSFORMER, ema=ema, epochs=6)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["loss"] == pytest.approx(math.log(3), abs=0.15) and rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    fresh, _ = finetune.classifier(vit(), 3, VIEW, CPU)
    assert top1(model, Toy(60, first=900)) > 0.8 > 0.5 > top1(fresh, Toy(60, first=900))
    assert rows[-1]["lr"] < rows[1]["lr"] <= 1e-3 + 1e-9


class HalfLabelled(Toy):
    """Every second sample has no label."""

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        return sample._replace(label=-1) if i % 2 else sample


def test_loss_is_a_mean_over_samples_with_a_label(capsys):
    """With a rate of 0 it is that of the start, near ln 3; as a mean over all samples it would be half of that."""
    args = Args(**{**QUICK, "epochs": 1, "base_lr": 0.0})
    _, rows = finetune.fine_tune(vit(), HalfLabelled(64), VIEW, 3, args, CPU)
    assert rows[0]["loss"] == pytest.approx(math.log(3), abs=0.1)
    assert "epoch 1: 32 of 64 samples have no label" in capsys.readouterr().err


def test_resnet_learns_and_batch_norm_follows():
    torch.manual_seed(0)
    model, rows = tuned(small_resnet(), nesterov=True, base_lr=0.2, epochs=3)
    assert top1(model, Toy(60, first=900)) > 0.8
    momenta = {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta == {0.1}  # ten steps an epoch; of 1,000 steps it would be 0.01
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_same_with_workers_and_again():
    runs_ = [tuned(vit(), n=40, **TRANSFORMER, workers=w, epochs=2)[0].state_dict() for w in (0, 0, 2)]
    for other in runs_[1:]:
        assert all(torch.equal(other[k], v) for k, v in runs_[0].items())


def test_divergence_is_named():
    with pytest.raises(UserError, match="lower --base-lr"):
        tuned(vit(), n=40, base_lr=1e30, epochs=2)


# ------------------------------------------------ command line ------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Untrained checkpoints of SimCLR, SLIP and CLIP; `classes`: an ImageFolder of Toy."""
    root = tmp_path_factory.mktemp("finetune")
    for name in ("simclr", "slip", "clip"):
        module = runs.module_of(name)
        args = module.parse_args(module.Args, module.RECIPES, runs.FLAGS[name] + runs.RESNET18 * (name == "simclr"))
        torch.manual_seed(1)
        (root / name).mkdir()
        saved = {"method": name, "args": vars(args), "model": module.build_model(args).state_dict(), "step": 3}
        torch.save(saved, root / name / "checkpoint.pt")
    for split, n in (("train", 60), ("val", 13)):
        for i in range(n):
            sample = Toy(n, first=n)[i]
            path = root / "classes" / split / Toy.classes[sample.label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(sample.image).save(path)
    return root


COMMON = ["--device", "cpu", "--workers", "0", "--batch-size", "4"]


def run(folder, *words):
    """main() in this process -> the last line of the first checkpoint's results.jsonl."""
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    paths = [str(folder / word) for word in words[1:first]]
    main([words[0], *paths, "--data", str(folder / "classes"), *COMMON, *words[first:]])
    if rank() > 0:  # the first process has written it
        return None
    return json.loads((Path(paths[0]) / "results.jsonl").read_text().splitlines()[-1])


def test_commands(folder, capsys):
    flags = ["--epochs", "1", "--warmup-epochs", "0.5", "--train-batch", "8", "--random", "--out", str(folder / "kept")]
    row = run(folder, "finetune", "slip", "simclr", *flags)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 6 and table[1].split() == ["top1", "mean_per_class", "loss", "chance", "images"]
    assert row["protocol"] == "finetune" and row["metrics"]["images"] == 60 and "random weights" in row
    assert row["settings"]["optimizer"] == "adamw" and row["settings"]["epochs"] == 1  # flags win over recipes
    assert row["settings"]["layer_decay"] == 0.65 and row["settings"]["mixup"] == 0.8
    other = json.loads((folder / "simclr/results.jsonl").read_text().splitlines()[-1])
    assert other["settings"]["optimizer"] == "sgd" and other["settings"]["train_batch"] == 8
    kept = torch.load(folder / "kept/finetune_simclr.pt", weights_only=True)
    torchvision.models.resnet18(num_classes=3).load_state_dict(kept)
    semi = run(folder, "semi", "simclr", "--labels", "0.2", "--train-batch", "4", "--epochs", "2", "--head-layer", "1")
    assert semi["metrics"]["images"] == 12 and semi["settings"]["epochs"] == 2 and semi["protocol"] == "semi"
    clip_row = run(folder, "finetune", "clip", "--epochs", "1", "--warmup-epochs", "0", "--train-batch", "8", "--dtype", "bf16", "--ema", "0.9")
    assert math.isfinite(clip_row["metrics"]["loss"])


ERRORS = [
    ("finetune slip --epochs 20", "--warmup-epochs 20 must be below --epochs 20"),
    ("finetune slip", "classes has 60 samples, less than a batch of 1024: lower --train-batch"),
    ("semi simclr", "semi needs --labels, above 0 and below 1"),
    ("semi simclr --labels 1", "semi needs --labels"),
    ("finetune simclr --labels 0.1", "nothing else takes it"),
    ("knn simclr --labels 0.1", "nothing else takes it"),
    ("finetune simclr --train-batch 8 --drop-path 0.1", "--drop-path is for transformers"),
    ("finetune slip --train-batch 7", "7 images for each process are odd"),
    ("finetune slip --train-batch 8 --randaugment 11", "--randaugment at most 10"),
    ("finetune slip --train-batch 8 --label-smoothing 1", "must be below 1"),
    ("finetune slip --train-batch 8 --layer-decay 0", "--layer-decay above 0"),
    ("finetune slip --train-batch 8 --layer-decay 2", "--layer-decay 2.0 must lie between 0 and 1"),
    ("finetune slip --optimizer lars", "invalid choice"),
    ("finetune slip --layer-dekay 0.7", "did you mean --layer-decay"),
    ("finetune slip --split train", "other than train"),
    ("semi slip --labels 0.1 --head-layer 1", "no --head-layer"),
]


@pytest.mark.parametrize("words, sentence", ERRORS)
def test_mistakes_are_sentences(folder, words, sentence):
    with pytest.raises(UserError) as error:
        run(folder, *words.split())
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_out_is_checked_first_and_the_score_recorded(folder, tmp_path, capsys):
    """The folder before the training; if a file in it cannot be written after all, the score is in results.jsonl already."""
    flags, lines = ["--epochs", "1", "--warmup-epochs", "0", "--train-batch", "8"], folder / "slip/results.jsonl"
    (tmp_path / "file").write_text("")
    before = len(lines.read_text().splitlines()) if lines.exists() else 0
    with pytest.raises(UserError, match="use another --out"):
        run(folder, "finetune", "slip", *flags, "--out", str(tmp_path / "file"))
    assert "epoch 1" not in capsys.readouterr().err
    (tmp_path / "out/finetune_slip.pt").mkdir(parents=True)
    with pytest.raises(UserError, match="use another --out"):
        run(folder, "finetune", "slip", *flags, "--out", str(tmp_path / "out"))
    assert len(lines.read_text().splitlines()) == before + 1 and "slip" in capsys.readouterr().out


def test_a_full_disk_leaves_no_part_of_a_classifier(tmp_path, monkeypatch):
    """Which the next command would refuse as there already."""
    model, _ = finetune.classifier(small_resnet(), 3, VIEW, CPU)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(UserError, match="cannot be written .no space is left., use another --out"):
            finetune.save_classifier(model, tmp_path / "finetune_simclr.pt")
    assert not [*tmp_path.iterdir()]
    finetune.save_classifier(model, tmp_path / "finetune_simclr.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["finetune_simclr.pt"]


def test_classifiers_of_one_command_have_files_of_their_own(folder, tmp_path):
    for name in ("lr0.1", "lr0.2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.pt").write_bytes((folder / "slip/checkpoint.pt").read_bytes())
    paths = [str(tmp_path / "lr0.1/checkpoint.pt"), str(tmp_path / "lr0.2")]
    flags = ["--epochs", "1", "--warmup-epochs", "0", "--train-batch", "8", "--out", str(tmp_path / "out")]
    main(["finetune", *paths, "--data", str(folder / "classes"), *COMMON, *flags])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["finetune_lr0.1.pt", "finetune_lr0.2.pt"]
    with pytest.raises(UserError, match="out/finetune_lr0.1.pt is there already, use another --out"):
        main(["finetune", *paths, "--data", str(folder / "classes"), *COMMON, *flags])


def test_mistake_ends_with_status_2(server, folder):
    done = server.run("evaluate.py", "semi", folder / "simclr", "--data", folder / "classes", "--device", "cpu")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("evaluate.py: error: semi needs --labels")


# ------------------------------------------------ two processes ------------------------------------------------
def trained(folder):
    """Weights, losses and scores that have to be the same on any number of processes."""
    few = ["--labels", "0.2", "--train-batch", "4", "--epochs", "2", "--base-lr", "0.001"]
    row = run(folder, "semi", "simclr", *few)
    out = {"semi": row and row["metrics"]}
    flags = {**TRANSFORMER, "base_lr": 1e-3, "drop_path": 0.4, "mixup": 0.8, "cutmix": 1.0, "erase": 0.5, "ema": 0.5}
    torch.manual_seed(0)
    cases = {"vit": (vit(), flags), "resnet": (small_resnet(), dict(nesterov=True, base_lr=1e-3))}
    for name, (encoder, flags) in cases.items():
        model, rows = tuned(encoder, n=50, **{**flags, "epochs": 2})
        out[name] = {k: v.tolist() for k, v in model.state_dict().items() if "running" in k or "head" in k or v.ndim == 1}
        out[f"{name} loss"] = [row["loss"] for row in rows]
        out[f"{name} scores"] = extract(model, Toy(13, first=700), VIEW, CPU, batch_size=5)[0].tolist()
    return out


def test_world_size(server, folder):
    done = server.together("tests/test_finetune.py", folder)
    assert done.stderr.count("epoch 1/2") == 3  # of the first process alone
    starts = [line for line in done.stderr.splitlines() if re.search(r", \d+ images, batch \d+, lr .*, \d+ steps an epoch$", line)]
    assert len(starts) == 3 and done.stderr.index(starts[0]) < done.stderr.index("epoch 1/2")
    both, one = json.loads((folder / "out.json").read_text()), trained(folder)
    assert both.keys() == one.keys()
    for name, value in one.items():
        for key in value if isinstance(value, dict) else [None]:
            a, b = (x[name][key] if key else x[name] for x in (both, one))
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4, err_msg=f"{name} {key}")


if __name__ == "__main__":
    with user_errors():
        init_distributed("cpu")
        result = trained(Path(sys.argv[1]))
        if rank() == 0:
            Path(sys.argv[1], "out.json").write_text(json.dumps(result))
