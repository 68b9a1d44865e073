"""dinov2.py: numbers of the official code, KoLeo and Sinkhorn-Knopp over processes, released checkpoints, --fsdp, pasting."""

import json
import math
import os
import random
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import dinov2
import pictures
import test_structure
from common import UserError, warmup_cosine
from data import Loader, normalize, open_dataset, to_float
from evaluation.features import NamedSubset
from evaluation.weights import open_network
from runs import FLAGS, ROOT, make_photos, rows, train_here
from test_dino import old_name
from test_golden import close, close_grad, golden
from test_structure import backward, cut
from toys import positions


def tiny(drop_path=0.0, registers=0, swiglu=False, layer_scale=0.5, dim=48):
    return dinov2.VisionTransformer(32, 8, dim, 2, 3, drop_path, registers, swiglu, layer_scale)


def tiny_network(heads=1, **options):
    heads = [dinov2.DINOHead(48, 40, 64, 16) for _ in range(heads)]
    return torch.nn.ModuleDict({"backbone": tiny(**options), "dino_head": heads[0], "ibot_head": heads[-1]})


def arguments(*flags):
    return dinov2.parse_args(dinov2.Args, dinov2.RECIPES, ["--recipe", "imagenet", *FLAGS["dinov2"], *flags])


# ------------------------------------------------ golden ------------------------------------------------
def test_class_token_loss_and_center():
    """Three calls in a row. The official loss comes in two parts, and its teacher's rows are swapped."""
    x, y, _ = golden("dinov2_dino_loss_centering")
    center = torch.zeros(1, 32)
    for call in ("call0", "call1", "call2"):
        close(center, y[call]["center_seen_in_this_call"])
        large, small = (x[call][f"student_{kind}"].clone().requires_grad_() for kind in ("global", "local"))
        b, a = x[call]["teacher_after_head_swapped"].chunk(2)
        p_t = dinov2.center_softmax(torch.cat([a, b]), center, x[call]["teacher_temp"])
        close(p_t.unflatten(0, (2, -1)).flip(0), y[call]["probs"])
        loss, entropy, kl = dinov2.dino_loss(torch.cat([large, small]), p_t)
        loss.backward()
        close(loss, y[call]["local_loss"] + y[call]["global_loss"])
        close_grad(large.grad, y[call]["grad_student_global"])
        close_grad(small.grad, y[call]["grad_student_local"])
        close(entropy, torch.distributions.Categorical(p_t).entropy().mean())
        close(entropy + kl, loss.detach())
    close(center, y["center_after_applying_last"])


def test_patch_loss_and_center():
    x, y, _ = golden("dinov2_ibot_patch_loss")
    center = torch.zeros(1, 1, 24)
    for call in ("call0", "call1", "call2"):
        close(center, y[call]["center_seen"])
        student = x[call]["student_masked"].clone().requires_grad_()
        p_t = dinov2.center_softmax(x[call]["teacher_masked"], center[0], x[call]["temp"])
        close(p_t, y[call]["probs"])
        mask = x[call]["masks"]
        loss = dinov2.patch_loss(student, p_t, mask, positions(mask))
        loss.backward()
        close(loss, y[call]["loss"])
        close(loss, y[call]["loss_scaled_like_meta_arch"])
        close_grad(student.grad, y[call]["grad"])
    close(center, y["center_after_applying_last"])
    before = center.clone()
    assert len(dinov2.center_softmax(torch.zeros(0, 24), center[0], 0.05)) == 0 and torch.equal(center, before)  # no mask
    x, y = x["sinkhorn"], y["sinkhorn"]
    close(dinov2.sinkhorn_knopp(x["teacher_masked"], x["temp"]), y)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn(iterations):
    x, y, _ = golden("dinov2_sinkhorn_cls")
    p = dinov2.sinkhorn_knopp(x["teacher"], x["temp"], iterations)
    close(p, y[f"iters{iterations}"])
    close(p.sum(1), torch.ones(len(p)))
    close(dinov2.sinkhorn_knopp(x["teacher"] + 1000, x["temp"], iterations), p, rtol=1e-2)  # no overflow
    assert dinov2.sinkhorn_knopp(torch.zeros(0, 5), 0.07).shape == (0, 5)


def test_koleo():
    x, y, _ = golden("dinov2_koleo")
    features = x["x"].clone().requires_grad_()
    loss = dinov2.koleo_loss(features)
    loss.backward()
    close(loss, y["loss"])
    close_grad(features.grad, y["grad"])
    groups = dinov2.koleo_loss(x["x"], group=4)
    close(groups, (dinov2.koleo_loss(x["x"][:4]) + dinov2.koleo_loss(x["x"][4:])) / 2)
    assert not torch.allclose(groups, loss)
    half = dinov2.koleo_loss(x["x"].half())  # in which eps would be 0
    assert half.dtype == torch.float32 and torch.isfinite(dinov2.koleo_loss(torch.ones(4, 8).half()))


def test_schedules():
    _, y, args = golden("dinov2_schedules")
    total = args["total"]
    close([warmup_cosine(i, total, args["warmup"], 4e-3, end=1e-6, reach_peak=True) for i in range(total)], y["lr"], atol=1e-12)
    close([warmup_cosine(i, total, 0, 0.04, end=0.4) for i in range(total)], y["wd"])
    close([warmup_cosine(i, total, 0, 0.992, end=1.0) for i in range(total)], y["momentum"])
    close([dinov2.teacher_temperature(i, 0.04, 0.07, 6) for i in range(6)], y["teacher_temp_warm6"])
    assert dinov2.teacher_temperature(13, 0.04, 0.07, 6) == dinov2.teacher_temperature(0, 0.04, 0.07, 0) == 0.07


@pytest.mark.parametrize("part", ["backbone", "dino_head"])
def test_learning_rate_by_layer(part):
    _, y, args = golden("dinov2_params_groups")
    for name, expected in y[part].items():
        prefix = f"{part}.{name}"
        factors = dinov2.multipliers(prefix, args["depth"], args["lr_decay_rate"], args["patch_embed_lr_mult"])
        assert factors["lr_factor"] == pytest.approx(expected["lr_multiplier"]), name
        assert factors["decay_factor"] == expected["wd_multiplier"], name
        assert factors["last_layer"] == expected["is_last_layer"]
    names = {old_name(name) for name, _ in tiny_network(registers=4).named_parameters()}
    assert {f"{part}.{name}" for name in y[part]} <= names


def test_parameters_with_the_same_factors_are_one_group():
    student = tiny_network(2, registers=4)
    groups = dinov2.parameter_groups(student, 0.9, 0.2)
    factors = {name: dinov2.multipliers(name, 2, 0.9, 0.2) for name, _ in student.named_parameters()}
    found = {id(p): {key: group[key] for key in ("lr_factor", "decay_factor", "last_layer")} for group in groups for p in group["params"]}
    assert {name: found[id(p)] for name, p in student.named_parameters()} == factors
    assert sum(len(group["params"]) for group in groups) == len(factors) > 50
    # decayed and not: patch embedding, blocks 1 and 2, norm and heads; decayed alone: tokens and position, prototypes
    assert len(groups) == len({tuple(f.values()) for f in factors.values()}) == 10


def test_head():
    x, y, args = golden("dinov2_head_tiny")
    head = dinov2.DINOHead(args["in_dim"], args["out_dim"], args["hidden_dim"], args["bottleneck_dim"])
    head.load_state_dict(x["state_dict"], strict=True)
    close(head(x["x"]), y["out"])
    assert {old_name(name): p.requires_grad for name, p in head.named_parameters()} == y["requires_grad"]


@pytest.mark.parametrize("registers", [0, 4])
def test_vit(registers):
    x, y, _ = golden(f"dinov2_vit_tiny_reg{registers}")
    vit, seen = tiny(registers=registers), {}
    vit.load_state_dict(golden(f"dinov2_vit_tiny_reg{registers}_weights")[0]["state_dict"], strict=True)
    vit.norm.register_forward_hook(lambda module, args, out: seen.update(before=args[0], after=out))
    for case in ("x32", "x16", "x24x40", "x32_masked"):
        out = vit.tokens(x[case.removesuffix("_masked")], x["masks"] if "masked" in case else None)
        close(out[:, 0], y[case]["x_norm_clstoken"], atol=1e-5)
        close(out[:, 1:], y[case]["x_norm_patchtokens"], atol=1e-5)
        close(seen["before"], y[case]["x_prenorm"], atol=1e-5)
        close(seen["after"][:, 1 : 1 + registers], y[case]["x_norm_regtokens"], atol=1e-5)
    close(vit(x["x32"]), y["forward_cls"], atol=1e-5)


# ------------------------------------------------ masks ------------------------------------------------
def test_mask_statistics():
    """Those of the official generator; half of the crops are masked on average instead of exactly."""
    _, y, _ = golden("dinov2_collate_masks")
    rng, stats = random.Random(1), y["stats_over_150_batches"]
    ratio = torch.stack([dinov2.draw_mask(rng, 14) for _ in range(2000)]).float().mean((1, 2))
    assert float((ratio == 0).float().mean()) == pytest.approx(stats["frac_images_unmasked"], abs=0.05)
    masked = ratio[ratio > 0]
    assert float(masked.mean()) == pytest.approx(stats["mean_ratio_masked_only"], abs=0.012)
    assert 0.05 < masked.min() and masked.max() <= 0.5


@pytest.mark.parametrize("side", [1, 2, 4, 7])
def test_masks_of_any_size(side):
    rng = random.Random(0)
    assert {dinov2.draw_mask(rng, side, 1.0, ratio, 0.2).shape for ratio in (0.0, 0.5, 1.0) for _ in range(20)} == {(side, side)}


def test_draws_do_not_depend_on_the_batch():
    views = {name: dinov2.DINOv2View(32, depth=3, mask=dict(side=4, prob=1.0)) for name in ("global1", "global2")}
    dataset, drawn = open_dataset("shapes"), {}
    for size, workers in ((8, 0), (4, 0), (8, 2)):
        for _, batch in Loader(dataset, views, {}, size, 0, workers).batches(0, 16 // size):
            for name in views:
                draw = batch["params"][name]
                for index, mask, u in zip(batch["index"].tolist(), draw["mask"], draw["drop_path"]):
                    numbers = mask.flatten().tolist() + u.flatten().tolist()
                    assert drawn.setdefault((name, index), numbers) == numbers
    assert len(drawn) == 32


# ------------------------------------------------ model ------------------------------------------------
def test_stochastic_depth_makes_no_gpu_wait():
    """How many samples a branch keeps is known on the CPU; a tensor without content cannot tell it. And the copy of which
    they are to the device is not waited for."""
    block, copies = dinov2.Block(12, 3, drop_path=0.5).to("meta"), []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                copies.append(kwargs.get("non_blocking", False))
            return func(*args, **(kwargs or {}))

    u = torch.tensor([[0.1, 0.9], [0.7, 0.2], [0.8, 0.8], [0.3, 0.4]])
    with Copies():
        x = block(torch.empty(4, 5, 12, device="meta"), u)
    assert x.is_meta and x.shape == (4, 5, 12) and copies == [True, True]


@pytest.mark.parametrize("swiglu", [False, True])
def test_stochastic_depth_by_subset(swiglu):
    """What is left out is not computed, the rest is scaled, and each sample's numbers are its own."""
    block, x = dinov2.Block(48, 3, 0.25, swiglu, 0.5), torch.randn(3, 5, 48)
    u, seen = torch.tensor([[0.2, 0.2], [0.9, 0.2], [0.25, 0.9]]), []
    block.norm1.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    block.norm2.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    out = block(x, u)
    assert seen == [2, 1]
    attended = x + 0.5 * block.attention(block.norm1(x)) / 0.75
    close(out[0], x[0])
    close(out[1], attended[1])
    close(out[2], (attended + 0.5 * block.feed_forward(block.norm2(attended)) / 0.75)[2])
    order = torch.tensor([2, 0, 1])
    close(block(x[order], u[order]), out[order])
    seen.clear()
    x.requires_grad_()
    alone = block(x, torch.zeros(3, 2))  # nobody is left, but flash attention refuses an empty batch
    alone.sum().backward()
    assert seen == [1, 1] and torch.equal(alone, x) and torch.equal(x.grad, torch.ones_like(x))
    assert all(p.grad.abs().sum() == 0 for p in block.parameters())


def test_only_masked_patches_reach_the_heads():
    model, seen = dinov2.DINOv2(tiny_network(2), tiny_network(2)), []
    for head in (model.student.ibot_head, model.teacher.ibot_head):
        head.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    mask = torch.rand(4, 16) < 0.3
    crops = [torch.randn(2, 3, size, size) for size in (32, 32, 16)]
    teacher, teacher_patches = model.teach(crops, positions(mask))
    student, patches, features = model(crops, mask, positions(mask))
    assert seen == [(int(mask.sum()), 48)] * 2
    assert student.shape == (6, 40) and teacher.shape == (4, 40) and patches.shape == teacher_patches.shape == (mask.sum(), 40)
    whole = model.teacher.backbone.tokens(torch.cat(crops[:2]))
    close(model.teacher.ibot_head(whole[:, 1:])[mask], teacher_patches, atol=1e-5)
    hidden = model.student.backbone.tokens(torch.cat(crops[:2]), mask)
    close(features, hidden[:, 0])
    assert not torch.allclose(hidden, whole)


def timm_name(arch, registers):
    return f"{arch}_reg{registers}_dinov2" if registers else f"{arch}_dinov2"


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("arch", ["vit_small_patch14", "vit_base_patch14"])
def test_released_backbones_have_these_names(arch, registers):
    """Hub files: names and shapes of the tiny official model's state dict, the sizes of S and B, 37 x 37 patches."""
    flags = ["--recipe", "imagenet", "--arch", arch, "--registers", str(registers), "--image-size", "518", "--local-size", "98", "--out-dim", "8"]
    with torch.device("meta"):
        model = dinov2.build_model(dinov2.parse_args(dinov2.Args, dinov2.RECIPES, flags))
        other = timm.create_model(timm_name(arch, registers), num_classes=0)
    mine = {name: tuple(p.shape) for name, p in dinov2.image_encoder(model).state_dict().items()}
    width = {"vit_small_patch14": 384, "vit_base_patch14": 768}[arch]
    tiny_names = golden(f"dinov2_vit_tiny_reg{registers}_weights")[0]["state_dict"]
    expected = {name.replace("blocks.1.", f"blocks.{i}.") for name in tiny_names for i in (range(12) if "blocks.1." in name else (0,))}
    assert set(mine) == expected
    assert mine["pos_embed"] == (1, 1370, width) and mine["patch_embed.proj.weight"] == (width, 3, 14, 14)
    assert mine["blocks.11.mlp.fc1.weight"] == (4 * width, width) and mine["mask_token"] == (1, width)
    theirs = {name.replace("reg_token", "register_tokens"): tuple(p.shape) for name, p in other.state_dict().items()}
    assert {name: shape for name, shape in mine.items() if name not in ("mask_token", "pos_embed")} == {
        name: shape for name, shape in theirs.items() if name != "pos_embed"}  # fmt: skip
    assert model.teacher.backbone.blocks[0].heads == other.blocks[0].attn.num_heads
    giant = dinov2.parse_args(dinov2.Args, dinov2.RECIPES, [*flags[:2], "--arch", "vit_giant_patch14", "--ffn", "swiglu", "--local-size", "98"])
    if arch == "vit_base_patch14" and not registers:
        with torch.device("meta"):
            assert dinov2.build_network(giant).backbone.blocks[39].mlp.w12.weight.shape == (8192, 1536)


@pytest.mark.parametrize("registers", [0, 4])
def test_vit_equals_timm(registers):
    """timm's DINOv2 gives registers no position either, and adds the class token's to it."""
    mine, x = tiny(registers=registers, dim=96), torch.randn(3, 3, 32, 32)
    other = timm.models.VisionTransformer(32, 8, num_classes=0, global_pool="token", embed_dim=96, depth=2, num_heads=3,
                                          init_values=1e-5, reg_tokens=registers, no_embed_class=registers > 0)  # fmt: skip
    for p in mine.parameters():
        p.data += 0.1 * torch.randn_like(p)
    state = {name.replace("register_tokens", "reg_token"): p for name, p in mine.state_dict().items() if name != "mask_token"}
    if registers:  # timm adds the class token's position when it converts the weights
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    other.load_state_dict(state, strict=True)
    tokens = other.eval().forward_features(x)
    close(mine.tokens(x), torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["old", "new"])
@pytest.mark.parametrize("heads", [1, 2])
def test_official_teacher_checkpoint(style, heads):
    """What the official run saves for evaluation: {"teacher": backbone, dino_head and, with untied heads, ibot_head}."""
    head = golden("dinov2_head_tiny")[0]["state_dict"]
    if style == "new":
        head = {k.replace("weight_g", "parametrizations.weight.original0").replace("weight_v", "parametrizations.weight.original1"): v
                for k, v in head.items()}  # fmt: skip
    state = {"backbone." + k: v for k, v in golden("dinov2_vit_tiny_reg4_weights")[0]["state_dict"].items()}
    state |= {f"{name}.{k}": torch.randn_like(v) for name in ("dino_head", "ibot_head")[:heads] for k, v in head.items()}
    network = tiny_network(heads, registers=4)
    if heads == 1:  # ours names the shared one twice
        state |= {k.replace("dino_head", "ibot_head"): v for k, v in state.items() if k.startswith("dino_head")}
    network.load_state_dict(state, strict=True)
    for name in ("dino_head", "ibot_head"):
        g, v = (state[k] for k in state if k.startswith(f"{name}.last_layer"))
        close(network[name].last_layer.weight, g * v / v.norm(dim=1, keepdim=True))


# ------------------------------------------------ runs ------------------------------------------------
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


def saved(directory):
    return torch.load(directory / "checkpoint.pt", weights_only=True)


def test_first_epoch_leaves_the_prototypes(photos, tmp_path):
    torch.manual_seed(0)
    first = dinov2.build_model(arguments("--no-shared-head")).state_dict()
    train_here("dinov2", photos, tmp_path / "a", "--max-steps", "6", "--no-shared-head")  # an epoch
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    train_here("dinov2", photos, tmp_path / "b", "--max-steps", "7", "--no-shared-head")
    frozen, free = (saved(tmp_path / d)["model"] for d in "ab")
    names = [name for name in first if "student" in name and "last_layer" in name]
    assert len(names) == 4 and all(torch.equal(first[name], frozen[name]) for name in names)
    assert not any(torch.equal(first[name], free[name]) for name in names)
    assert not torch.equal(first["student.dino_head.mlp.4.weight"], frozen["student.dino_head.mlp.4.weight"])
    assert frozen["center"].abs().max() > 0 and frozen["center2"].abs().max() > 0


def test_one_step(photos, tmp_path):
    """The teacher becomes the average; layers move the less the lower they are."""
    flags = ["--max-steps", "1", "--warmup-epochs", "0", "--freeze-last-layer", "0", "--teacher-momentum", "0.9", "--layer-decay", "0.5",
             "--weight-decay", "0"]  # fmt: skip
    torch.manual_seed(0)
    before = dinov2.build_model(arguments(*flags)).state_dict()
    train_here("dinov2", photos, tmp_path / "run", *flags)
    after = saved(tmp_path / "run")["model"]
    moved = 0
    for name in before:
        if name.startswith("teacher."):
            student = name.replace("teacher.", "student.")
            close(after[name], 0.9 * before[name] + 0.1 * after[student], atol=1e-7)
            moved += not torch.equal(after[student], before[student])
    assert moved > 40
    steps = [(after[name] - before[name]).abs().max() for name in (f"student.backbone.blocks.{i}.mlp.fc1.weight" for i in range(4))]
    close([b / a for a, b in zip(steps, steps[1:])], [2.0, 2.0, 2.0], rtol=0.05)  # Adam's first step is the learning rate


@pytest.mark.parametrize("flags", [[], ["--centering", "sinkhorn", "--no-shared-head", "--koleo-group", "4"], ["--ffn", "swiglu", "--registers", "2"],
                                   ["--drop-path", "0.6", "--mask-prob", "0.1"]])  # fmt: skip
def test_log_and_evaluation(photos, tmp_path, flags):
    train_here("dinov2", photos, tmp_path / "run", "--max-steps", "8", *flags)
    run = rows(tmp_path / "run")
    share = 0.1 if "--mask-prob" in flags else 0.8
    for row in run:
        assert [row["cls_chance"], row["teacher_entropy_chance"]] == pytest.approx([math.log(64)] * 2)
        assert row["patch_chance"] == pytest.approx(share * math.log(64)) and row["chance"] == pytest.approx((1 + share) * math.log(64))
        assert row["cls_loss"] == pytest.approx(row["teacher_entropy"] + row["kl"], rel=1e-5)
        assert row["loss"] == pytest.approx(row["cls_loss"] + row["patch_loss"] + 0.1 * row["koleo"], rel=1e-5)
    temps = [row["teacher_temp"] for row in run]
    assert temps[0] == pytest.approx(0.04) and temps[11:] == [] and temps[-1] > temps[0]
    net = open_network(tmp_path / "run", torch.device("cpu"))
    assert net.encoder is net.model.teacher.backbone
    assert net.encoder(torch.randn(2, 3, 32, 32)).shape == (2, 128)


@pytest.mark.parametrize("centering", ["center", "sinkhorn"])
def test_accumulation_is_exact(photos, tmp_path, centering):
    """The teacher's side is computed for the whole batch first, which Sinkhorn-Knopp and the centers see; KoLeo's groups
    lie in a piece."""
    runs = [[], ["--accum-steps", "4"]]
    flags = ["--max-steps", "3", "--no-shared-head", "--freeze-last-layer", "0", "--mask-prob", "0.5",
             "--koleo-group", "2", "--centering", centering]  # fmt: skip
    grads = [train_here("dinov2", photos, tmp_path / str(len(f)), *flags, *f) for f in runs]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    keys = "loss", "cls_loss", "patch_loss", "koleo", "teacher_entropy", "kl"
    a, b = (torch.tensor([[row[k] for k in keys] for row in rows(tmp_path / str(len(f)))]) for f in runs)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    a, b = (saved(tmp_path / str(len(f)))["model"] for f in runs)
    for name in ("center", "center2"):
        assert (a[name].abs().max() > 0) == (centering == "center")
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_fsdp_is_the_same_run(server, tmp_path):
    """Two processes with and without --fsdp: curve, gradient norm's effect, checkpoint; then a resumed one. Prototypes learn from
    the second epoch on, which begins with the fourth step."""
    photos = make_photos(tmp_path / "photos", train=28)
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)):
        folder = tmp_path / "classes" / ("train" if i < 28 else "val") / ("even" if i % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels // (1 + i % 2)).save(folder / f"{i}.png")
    evaluated = ["--eval-every", "0", "--eval-data", str(tmp_path / "classes")]
    sharded = ["--fsdp", "--grad-checkpointing", "full"]
    jobs = [["dinov2", str(photos), str(tmp_path / "ddp"), ["--max-steps", "5", "--no-shared-head", *evaluated]],
            ["dinov2", str(photos), str(tmp_path / "fsdp"), ["--max-steps", "5", "--no-shared-head", *evaluated, *sharded]],
            ["dinov2", str(photos), str(tmp_path / "parts"), ["--max-steps", "2", "--no-shared-head", *evaluated, *sharded]],
            ["dinov2", str(photos), str(tmp_path / "parts"), ["--max-steps", "5", "--no-shared-head", *evaluated, *sharded]],
            ["dinov2", str(photos), str(tmp_path / "shared"), ["--max-steps", "3", "--fsdp", "--koleo-group", "2"]],
            ["dinov2", str(photos), str(tmp_path / "pieces"),
             ["--max-steps", "3", "--fsdp", "--koleo-group", "2", "--accum-steps", "2"]]]  # fmt: skip
    server.together("tests/runs.py", json.dumps(jobs))
    ddp, fsdp, parts, shared, pieces = (rows(tmp_path / d) for d in ("ddp", "fsdp", "parts", "shared", "pieces"))
    for key in ("loss", "koleo", "patch_loss"):
        assert [row[key] for row in shared] == pytest.approx([row[key] for row in pieces], rel=1e-4)
        a, b = (torch.tensor([row[key] for row in run if key in row]) for run in (ddp, fsdp))
        assert len(a) == 5
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert [row["knn_top1"] for row in ddp if "knn_top1" in row] == [row["knn_top1"] for row in fsdp if "knn_top1" in row] != []
    a, b, c = (saved(tmp_path / d) for d in ("ddp", "fsdp", "parts"))
    assert a["model"].keys() == b["model"].keys()
    for name, value in a["model"].items():
        assert type(b["model"][name]) is torch.Tensor
        close(value, b["model"][name], rtol=1e-3, atol=1e-4)
        assert torch.equal(b["model"][name], c["model"][name]), name
    assert fsdp == parts
    for name, moments in b["optimizer"]["state"].items():
        assert all(torch.equal(moments[key], c["optimizer"]["state"][name][key]) for key in moments)
    net = open_network(tmp_path / "fsdp", torch.device("cpu"))
    assert net.encoder(torch.randn(2, 3, 32, 32)).shape == (2, 128)


def test_without_koleo_no_group_is_needed(photos, tmp_path):
    """It is logged even then: the mean over pieces, where no group fits these."""
    flags = ["--max-steps", "1", "--koleo-weight", "0", "--freeze-last-layer", "0", "--eval-every", "0"]
    runs = [[], ["--accum-steps", "2"], ["--accum-steps", "2", "--koleo-group", "8"]]
    whole, *others = [train_here("dinov2", photos, tmp_path / str(len(f)), *flags, *f) for f in runs]
    for pieces in others:
        for a, b in zip(whole, pieces, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    logged = [rows(tmp_path / str(len(f)))[0]["koleo"] for f in runs]
    assert logged[1] == logged[2] != logged[0]


@pytest.mark.parametrize("flags, sentence", [
    (["--arch", "vit_huge_patch8"], "vit_huge_patch8 is unknown"),
    (["--image-size", "36"], "--image-size 36 is not a multiple of 8"),
    (["--local-size", "20"], "--local-size 20 is not a multiple of 8"),
    (["--koleo-group", "3"], "--koleo-group 3 must be at least 2 and divide --batch-size 8"),
    (["--koleo-group", "1"], "--koleo-group 1 must be at least 2"),
    (["--fsdp"], "start it with torchrun"),
    (["--accum-steps", "3"], "--accum-steps 3 does not divide a process's 8 samples"),
    (["--accum-steps", "2"], "needs a --koleo-group that divides a piece of 4 samples"),
    (["--accum-steps", "4", "--koleo-group", "4"], "needs a --koleo-group that divides a piece of 2 samples"),
])  # fmt: skip
def test_mistakes(photos, tmp_path, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        train_here("dinov2", photos, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_the_official_run_looks_for_neighbours_among_64():
    args = dinov2.parse_args(dinov2.Args, dinov2.RECIPES, ["--data", "imagenet"])
    assert (args.batch_size, args.koleo_group) == (2048, 64)


def test_views_png_shows_the_pictures(photos, tmp_path, monkeypatch):
    """Normalised views must be brought back, or the page is nearly black: no view is without its mean and std."""
    with pytest.raises(AttributeError, match="mean"):
        pictures.save_views(tmp_path, {"v": torch.zeros(8, 3, 32, 32)}, {"v": object()})
    class Identity(dinov2.DINOv2View):
        def __call__(self, pixels, params):
            return normalize(to_float(pixels), self.mean, self.std)

    monkeypatch.setattr(dinov2, "DINOv2View", Identity)
    train_here("dinov2", photos, tmp_path / "run", "--max-steps", "1", "--eval-every", "0")
    page = np.asarray(Image.open(tmp_path / "run/views.png"))
    loader = Loader(open_dataset(str(photos)), {"global1": Identity(32, mask=dict(side=4))}, {}, 8, device="meta")
    shown = loader.collate([loader[item] for item in next(loader.order(0, 1))])["pixels"]["global1"]
    first = page[16 : 16 + 128, 2 : 2 + 128]  # below the name of the view, within a frame; each pixel is 4 x 4
    assert np.abs(first.astype(int) - shown[0].permute(1, 2, 0).numpy().repeat(4, 0).repeat(4, 1)).max() <= 1


def test_recipes_build():
    for name in dinov2.RECIPES:
        args = dinov2.parse_args(dinov2.Args, dinov2.RECIPES, ["--recipe", name])
        with torch.device("meta"):
            model = dinov2.build_model(args)
        assert model.center.shape == (1, args.out_dim) and model.center2.shape == (1, 1, args.out_dim), name


# ------------------------------------------------ paste ------------------------------------------------
def test_paste():
    space = cut(["dino_loss", "patch_loss", "koleo_loss", "center_softmax", "sinkhorn_knopp", "DINOv2", "DINOHead", "VisionTransformer"],
                ["all_gather"], file="dinov2.py")  # fmt: skip
    student, teacher = (torch.nn.ModuleDict({"backbone": space["VisionTransformer"](32, 8, 48, 2, 3, 0.3, 2, True),
                                             "dino_head": space["DINOHead"](48, 20), "ibot_head": space["DINOHead"](48, 20)})
                        for _ in range(2))  # fmt: skip
    model = space["DINOv2"](student, teacher)
    crops = [torch.randn(4, 3, size, size) for size in (32, 32, 16, 16, 16)]
    mask = torch.rand(8, 16) < 0.3
    targets, target_patches = model.teach(crops, positions(mask))
    logits, patches, features = model(crops, mask, positions(mask), [torch.rand(4, 2, 2) for _ in crops])
    assert not targets.requires_grad and not target_patches.requires_grad
    loss, _, _ = space["dino_loss"](logits, space["sinkhorn_knopp"](targets, 0.07))
    loss = loss + space["patch_loss"](patches, space["center_softmax"](target_patches, model.center2[0], 0.07), mask, positions(mask))
    (loss + space["koleo_loss"](features[:4])).backward()
    assert all(p.grad is not None for p in model.student.parameters())
    backward(space["Block"](48, 3)(torch.randn(2, 5, 48)))


def test_paste_augmentation():
    test_structure.test_paste_augmentation("dinov2.py", "DINOv2View")
    draw = dinov2.DINOv2View(32, depth=2, mask=dict(side=4)).sample(random.Random(0))
    assert len(draw["drop_path"]) == 2 and draw["mask"].shape == (4, 4)


# ------------------------------------------------ docs/curation.md ------------------------------------------------
def test_curation_in_the_docs(photos, tmp_path):
    """A copy, a chain of near ones, one like the test set, and retrieval; then on images, with a network."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/curation.md").read_text(), re.S)
    exec(program, doc := {})
    angles = torch.tensor([0.0, 0.0, 30.0, 60.0, 120.0, 200.0]).deg2rad()  # cosine above 0.6: less than 53 degrees apart
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert doc["without_duplicates"](x).tolist() == [0, 4, 5]
    assert doc["without_duplicates"](x, threshold=0.9).tolist() == [0, 2, 3, 4, 5]
    assert doc["far_from"](x, x[4:5]).tolist() == [0, 1, 2, 5]  # 60 degrees apart: 0.5
    assert doc["retrieved"](x[2:], x[:1], k=2).tolist() == [0, 1]

    train_here("dinov2", photos, tmp_path / "run", "--max-steps", "1", "--eval-every", "0")
    shapes = open_dataset("shapes")
    web = NamedSubset(shapes, [0, 1, 2, 3, 1, 4])  # the fifth is the second again
    alike = {"duplicate": 0.99999, "leaked": 0.99999}
    kept = doc["curate"](tmp_path / "run", web, NamedSubset(shapes, [3]), NamedSubset(shapes, [0, 1, 2, 4]), **alike, k=1)
    assert kept == [0, 1, 2, 5]
    doc["write"](tmp_path / "kept.jsonl", web, kept)
    assert [json.loads(line)["image"] for line in open(tmp_path / "kept.jsonl")] == [os.path.abspath(shapes[i].key) for i in (0, 1, 2, 4)]
    files = open_dataset(str(photos))
    doc["write"](tmp_path / "chosen.jsonl", files, [3, 1])
    chosen = open_dataset(str(tmp_path / "chosen.jsonl"))
    assert [chosen[i].image for i in range(2)] == [files[i].image for i in (3, 1)]
