"""ibot.py: numbers of the official code, masks by sample, released checkpoints, what a step may change, pasting."""

import argparse
import math
import random

import pytest
import timm
import torch

import ibot
import test_structure
from common import UserError
from data import Loader, open_dataset
from evaluation.weights import open_network
from run import load_checkpoint
from runs import FLAGS, make_photos, rows, train_here
from test_dino import old_name
from test_golden import close, close_grad, golden
from test_structure import backward, cut
from toys import positions

NEW = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


def tiny(drop_path=0.0, masked=True, dim=48):
    return ibot.VisionTransformer(32, 8, dim, 2, 3, drop_path, masked)


def tiny_network(masked=True, patch_out_dim=0, **options):
    head = ibot.IBOTHead(48, 40, patch_out_dim, hidden_dim=64, bottleneck_dim=16, **options)
    return torch.nn.ModuleDict({"backbone": tiny(masked=masked), "head": head})


def arguments(*flags):
    return ibot.parse_args(ibot.Args, ibot.RECIPES, ["--recipe", "imagenet", *FLAGS["ibot"], *flags])


# ------------------------------------------------ golden ------------------------------------------------
def test_losses_and_centers():
    """Three calls in a row: the centers of a call are made of the ones before it."""
    x, y, args = golden("ibot_loss_3calls_multicrop")
    center, center2 = torch.zeros(1, args["out_dim"]), torch.zeros(1, 1, args["patch_out_dim"])
    for call in ("call0", "call1", "call2"):
        large, patches, small = (x[call][name].clone().requires_grad_() for name in ("student_cls", "student_patch", "student_local_cls"))
        teacher, teacher_patches = x[call]["teacher_cls"], x[call]["teacher_patch"]
        mask = torch.cat([m.flatten(1) for m in x[call]["masks"]])
        assert not mask[1].any()  # one crop without a mask
        temp = ibot.teacher_temperature(x[call]["epoch"], 0.04, 0.07, 30)
        cls, entropy, kl = ibot.dino_loss(torch.cat([large, small]), teacher, center, temp, 0.1)
        patch = ibot.patch_loss(patches[mask], teacher_patches, mask, positions(mask), center2, temp, 0.1)
        (cls + patch).backward()
        close(cls, y[call]["cls"])
        close(patch, y[call]["patch"])
        close(cls + patch, y[call]["loss"])
        close_grad(large.grad, y[call]["grad_student_cls"])
        close_grad(patches.grad, y[call]["grad_student_patch"])
        close_grad(small.grad, y[call]["grad_student_local_cls"])
        ibot.update_center(center, teacher, 0.9)
        ibot.update_center(center2[0], teacher_patches.flatten(0, 1), 0.9)
        close(center, y[call]["center_after"])
        close(center2, y[call]["center2_after"])


def test_patch_loss_by_hand():
    student, teacher, center = torch.randn(4, 3, 7), torch.randn(4, 3, 7), torch.randn(1, 1, 7)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 1, 1]]).bool()
    by_crop = []
    for s, t, m in zip(student, teacher, mask):
        terms = [-(((ti - center[0, 0]) / 0.05).softmax(0) * (si / 0.1).log_softmax(0)).sum() for si, ti, mi in zip(s, t, m) if mi]
        by_crop.append(sum(terms) / max(1, len(terms)))
    close(ibot.patch_loss(student[mask], teacher, mask, positions(mask), center, 0.05), sum(by_crop) / 4)
    nothing = torch.zeros_like(mask)
    empty = ibot.patch_loss(student.requires_grad_()[nothing], teacher, nothing, positions(nothing), center, 0.05)
    empty.backward()
    assert empty == 0 and student.grad.abs().sum() == 0  # a batch without any mask is no accident
    flat = ibot.patch_loss(torch.zeros(int(mask.sum()), 7), teacher, mask, positions(mask), center, 0.05)
    close(flat, 0.75 * math.log(7))  # chance level: p ln K


@pytest.mark.parametrize("case", ["shared", "separate", "separate_nonorm"])
def test_head(case):
    x, y, args = golden("ibot_head_tiny")
    patch_out_dim = 0 if case == "shared" else args["patch_out_dim"]
    head = ibot.IBOTHead(args["in_dim"], args["out_dim"], patch_out_dim, args["hidden_dim"], args["bottleneck_dim"], "nonorm" not in case)
    head.load_state_dict(x[f"state_dict_{case}"], strict=True)
    cls, patch = head(x["x3d"])
    close(cls, y[case]["cls"])
    close(patch, y[case]["patch"])
    mask = torch.rand(patch.shape[:2]) < 0.5
    alone = head(x["x3d"], positions(mask))
    close(alone[0], y[case]["cls"])
    close(alone[1], y[case]["patch"][mask])
    close(head(x["x2d"]), y[case]["out2d"])
    named = {old_name(name): p.requires_grad for name, p in head.named_parameters()}
    assert named.items() <= y[case]["requires_grad"].items()
    assert [old_name(name) for name in head.state_dict()] == y[case]["keys"]
    assert (head.last_layer is head.last_layer2) == (case == "shared")


def test_vit_with_mask():
    x, y, _ = golden("ibot_vit_tiny_masked")
    vit = tiny()
    vit.load_state_dict(golden("ibot_vit_tiny_masked_weights")[0]["state_dict"], strict=True)
    mask = x["mask"].flatten(1)
    close(vit.tokens(x["x"], mask), y["tokens_masked"], atol=1e-5)
    close(vit.tokens(x["x"]), y["tokens_unmasked"], atol=1e-5)
    close(vit.tokens(x["x"], torch.zeros_like(mask)), y["tokens_zero_mask"], atol=1e-5)
    close(vit.tokens(x["x16"]), y["tokens_x16"], atol=1e-5)
    close(vit(x["x"]), y["tokens_unmasked"][:, 0], atol=1e-5)


def test_multicrop():
    x, y, _ = golden("ibot_multicrop_wrapper")
    state = golden("ibot_multicrop_backbone")[0]["state_dict"] | x["state_dict"]
    model = ibot.IBOT(tiny_network(), tiny_network(masked=False))
    model.student.load_state_dict(state, strict=True)
    model.teacher.load_state_dict({k: v for k, v in state.items() if "masked_embed" not in k}, strict=True)
    mask = torch.cat([m.flatten(1) for m in x["masks"]])
    student, patches, teacher, teacher_patches = model(x["crops"], mask, positions(mask))
    close(student, torch.cat([y["global_cls"], y["local_cls"]]))
    close(patches, y["global_patch"][mask])
    nothing = torch.zeros_like(mask)
    whole = model(x["crops"], nothing, positions(nothing))
    close(whole[0][:4], teacher)  # the teacher sees no mask
    assert len(whole[1]) == 0
    close(model.student.head(model.student.backbone.tokens(torch.cat(x["crops"][:2])))[1], teacher_patches)
    student, _, _, _ = model(x["crops"][:2], mask, positions(mask))
    close(student, y["global_cls"])


def test_only_masked_patches_reach_the_students_head():
    """The logits of all the others count for nothing: loss and gradient are those of a head that makes them too."""
    torch.manual_seed(0)
    model, seen = ibot.IBOT(tiny_network(), tiny_network(masked=False)), []
    mask, center = torch.rand(4, 16) < 0.3, torch.randn(1, 1, 40)
    crops = [torch.randn(2, 3, 32, 32) for _ in range(2)]
    hooks = [network.head.mlp.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
             for network in (model.student, model.teacher)]  # fmt: skip
    student, patches, _, teacher_patches = model(crops, mask, positions(mask))
    assert seen == [(4, 48), (4, 16, 48), (4, 48), (int(mask.sum()), 48)]  # the teacher's are all needed: its center is their mean
    [hook.remove() for hook in hooks]
    assert 0 < mask.sum() < mask.numel()
    loss = student.square().mean() + ibot.patch_loss(patches, teacher_patches, mask, positions(mask), center, 0.05)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.student.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits, everywhere = model.student.head(model.student.backbone.tokens(torch.cat(crops), mask))
    log_p = (everywhere / 0.1).log_softmax(-1)
    by_patch = -(((teacher_patches - center) / 0.05).softmax(-1) * log_p).sum(-1) * mask
    whole = logits.square().mean() + (by_patch.sum(1) / mask.sum(1).clamp(min=1)).mean()
    whole.backward()
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    assert len(grads) > 20
    for name, p in model.student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)


def test_accumulation_is_exact(photos, tmp_path):
    """With stochastic depth and masks, which are the samples' own; both centers see the whole batch."""
    runs = [[], ["--accum-steps", "4"]]
    flags = ["--max-steps", "3", "--no-shared-head", "--freeze-last-layer", "0", "--mask-prob", "0.5"]
    grads = [train_here("ibot", photos, tmp_path / str(len(f)), *flags, *f) for f in runs]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    keys = "loss", "cls_loss", "patch_loss", "teacher_entropy", "kl", "masked"
    a, b = (torch.tensor([[row[k] for k in keys] for row in rows(tmp_path / str(len(f)))]) for f in runs)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    a, b = (torch.load(tmp_path / str(len(f)) / "checkpoint.pt", weights_only=True)["model"] for f in runs)
    for name in ("center", "center2"):
        assert a[name].abs().max() > 0
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_parameter_groups():
    """train() decays what has two dimensions or more: the mask token too."""
    _, y, _ = golden("ibot_multicrop_wrapper")
    params = {old_name(name): p for name, p in tiny_network().named_parameters() if p.requires_grad}
    assert {n for n, p in params.items() if p.ndim >= 2} == {n for n in y["decay"] if "last_layer2" not in n}
    assert {n for n, p in params.items() if p.ndim < 2} == set(y["no_decay"])


def test_teacher_temperature():
    _, y, args = golden("ibot_teacher_temp_schedules")
    close([ibot.teacher_temperature(i, 0.04, 0.07, args["warmup_epochs"]) for i in range(args["nepochs"])], y["temp"])


# ------------------------------------------------ masks ------------------------------------------------
MASKS = {"block_0_03_var_0_02": dict(prob=0.5, ratio=0.3, var=0.2), "block_03": dict(prob=1.0, ratio=0.3, var=0.0),
         "rand_065": dict(prob=0.5, ratio=0.65, var=0.0, shape="rand")}  # fmt: skip


@pytest.mark.parametrize("case", MASKS)
def test_mask_statistics(case):
    _, y, _ = golden("ibot_mask_statistics")
    rng = random.Random(1)
    masks = torch.stack([ibot.draw_mask(rng, 14, **MASKS[case]) for _ in range(1000)])
    ratio, y = masks.float().mean((1, 2)), y[case]
    error = 5 * y["std_ratio"] * (1 / 1000 + 1 / 2000) ** 0.5  # of the two means
    assert float(ratio.mean()) == pytest.approx(y["mean_ratio"], abs=error)
    assert float((ratio == 0).float().mean()) == pytest.approx(y["frac_empty"], abs=0.08)
    assert float(ratio.std()) == pytest.approx(y["std_ratio"], rel=0.1 if y["std_ratio"] > 0.05 else 0.4)
    assert ratio.max() <= y["max_ratio"] + 0.02
    where = masks.float().mean(0) - y["mean_mask_map"]  # blocks rarely reach the corners
    assert where.abs().max() < 0.09, where.abs().max()


def test_blocks_are_blocks():
    """Of a masked patch most neighbours are masked too, unlike with single ones."""
    together = {}
    for shape in ("block", "rand"):
        rng = random.Random(0)
        masks = torch.stack([ibot.draw_mask(rng, 14, shape, 1.0, 0.3, 0.0) for _ in range(200)])
        together[shape] = float((masks[:, 1:] & masks[:, :-1]).sum() / masks[:, 1:].sum())
    assert together["block"] > 0.7 and together["rand"] == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("ratio, var", [(0.0, 0.0), (0.1, 0.5), (1.0, 0.3)])
@pytest.mark.parametrize("shape", ["block", "rand"])
@pytest.mark.parametrize("side", [1, 2, 6])
def test_masks_of_any_share_and_size(side, shape, ratio, var):
    rng = random.Random(0)
    for _ in range(50):
        assert ibot.draw_mask(rng, side, shape, 1.0, ratio, var).shape == (side, side)


def test_draws_do_not_depend_on_the_batch():
    """Masks are a function of seed, epoch, sample and crop."""
    mask = dict(side=4, prob=1.0, ratio=0.4, var=0.1)
    views = {name: ibot.IBOTView(32, depth=3, mask=mask) for name in ("global1", "global2")} | {"local1": ibot.IBOTView(16, depth=3)}
    dataset, drawn = open_dataset("shapes"), {}
    steps = len(dataset) // 8

    def draws(size, first, seed=0, workers=0):
        loader = Loader(dataset, views, {}, size, seed, workers)
        for _, batch in loader.batches(first * 8 // size, first * 8 // size + 16 // size):
            assert "mask" not in batch["params"]["local1"]
            for name in ("global1", "global2"):
                draw = batch["params"][name]
                assert draw["mask"].shape == (size, 4, 4) and draw["mask"].dtype == torch.bool and draw["drop_path"].shape == (size, 3, 2)
                for index, m, u in zip(batch["index"].tolist(), draw["mask"], draw["drop_path"]):
                    yield (name, index), (m.flatten().tolist(), u.flatten().tolist())

    drawn = dict(draws(8, 0))
    assert len(drawn) == 32 and len({str(m) for m, _ in drawn.values()}) > 16
    assert dict(draws(4, 0)) == dict(draws(8, 0, workers=2)) == drawn
    other = dict(draws(8, 0, seed=1))
    assert not any(other.get(key) == value for key, value in drawn.items())
    later = dict(draws(8, steps))  # another epoch: other masks of whichever samples come again
    assert not any(later.get(key) == value for key, value in drawn.items())


# ------------------------------------------------ checkpoints of others ------------------------------------------------
@pytest.mark.parametrize("style", ["old", "new"])
@pytest.mark.parametrize("shared", [True, False])
def test_official_training_checkpoint(tmp_path, style, shared):
    """Student of DDP with mask token, teacher without, two centers, pickled arguments; shared prototypes stand in it twice."""
    names = {"backbone." + k: v.shape for k, v in golden("ibot_vit_tiny_masked_weights")[0]["state_dict"].items()}
    heads = golden("ibot_head_tiny")[0]["state_dict_shared" if shared else "state_dict_separate"]
    names |= {"head." + k: v.shape for k, v in heads.items()}

    def state(prefix, left_out=""):
        weights = {name: torch.randn(shape) for name, shape in names.items() if not left_out or left_out not in name}
        if shared:
            weights |= {f"head.last_layer2.{k}": weights[f"head.last_layer.{k}"] for k in NEW}
        if style == "new":
            weights = {k.replace(k.split(".")[-1], NEW.get(k.split(".")[-1], k.split(".")[-1])): v for k, v in weights.items()}
        return {prefix + k: v for k, v in weights.items()}

    saved = {"student": state("module."), "teacher": state("", "masked_embed"), "epoch": 3, "args": argparse.Namespace(arch="vit_small"),
             "ibot_loss": {"center": torch.randn(1, 40), "center2": torch.randn(1, 1, 40 if shared else 28)}}  # fmt: skip
    torch.save(saved, tmp_path / "checkpoint.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = load_checkpoint(tmp_path / "checkpoint.pth")
    patch_out_dim = 0 if shared else 28
    model = ibot.IBOT(tiny_network(patch_out_dim=patch_out_dim), tiny_network(masked=False, patch_out_dim=patch_out_dim))
    for name in ("student", "teacher"):
        weights = {key.removeprefix("module."): value for key, value in loaded[name].items()}
        getattr(model, name).load_state_dict(weights, strict=True)
        for layer in ("last_layer", "last_layer2"):
            g, v = (saved[name][key] for key in saved[name] if f"{layer}." in key)
            close(getattr(getattr(model, name).head, layer).weight, g * v / v.norm(dim=1, keepdim=True))
    model.load_state_dict(loaded["ibot_loss"], strict=False)
    assert torch.equal(model.center2, saved["ibot_loss"]["center2"]) and torch.equal(model.center, saved["ibot_loss"]["center"])
    close(model.student.backbone.masked_embed, saved["student"]["module.backbone.masked_embed"])


@pytest.mark.parametrize("arch", ["vit_small_patch16", "vit_base_patch16"])
def test_released_backbones_have_these_names(arch):
    """Those files have timm's names and shapes, at 224 pixels; the student's has a mask token as well."""
    with torch.device("meta"):
        model = ibot.build_model(ibot.parse_args(ibot.Args, ibot.RECIPES, ["--recipe", "imagenet", "--arch", arch, "--out-dim", "8"]))
        other = timm.create_model(f"{arch}_224", num_classes=0)
    mine, theirs = (m.state_dict() for m in (ibot.image_encoder(model), other))
    assert list(mine) == list(theirs) and all(mine[k].shape == theirs[k].shape for k in mine)
    assert set(model.student.backbone.state_dict()) == {*theirs, "masked_embed"}
    assert model.teacher.backbone.blocks[0].attn.heads == other.blocks[0].attn.num_heads


def test_vit_equals_timm():
    mine, x = tiny(masked=False, dim=96), torch.randn(3, 3, 32, 32)
    other = timm.models.VisionTransformer(32, 8, num_classes=0, global_pool="token", embed_dim=96, depth=2, num_heads=3)
    for source, target in ((mine, other), (other, mine)):
        for p in source.parameters():
            p.data += 0.1 * torch.randn_like(p)
        target.load_state_dict(source.state_dict(), strict=True)
        close(mine.tokens(x), other.eval().forward_features(x), rtol=1e-4, atol=1e-5)


# ------------------------------------------------ runs ------------------------------------------------
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


def saved(directory):
    return torch.load(directory / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("head", ["--shared-head", "--no-shared-head"])
def test_first_epoch_leaves_the_prototypes(photos, tmp_path, head):
    torch.manual_seed(0)
    first = ibot.build_model(arguments(head)).state_dict()
    train_here("ibot", photos, tmp_path / "a", "--max-steps", "6", head)  # an epoch
    train_here("ibot", photos, tmp_path / "b", "--max-steps", "7", head)
    frozen, free = (saved(tmp_path / d)["model"] for d in "ab")
    names = [name for name in first if "student.head.last_layer" in name]
    assert len(names) == 4 and all(torch.equal(first[name], frozen[name]) for name in names)
    assert not any(torch.equal(first[name], free[name]) for name in names)
    assert torch.equal(free[names[0]], free[names[2]]) == (head == "--shared-head")
    assert not torch.equal(first["student.head.mlp.4.weight"], frozen["student.head.mlp.4.weight"])
    assert frozen["student.backbone.masked_embed"].abs().max() > 0
    assert frozen["center"].abs().max() > 0 and frozen["center2"].abs().max() > 0


def test_one_step(photos, tmp_path):
    """The teacher becomes the average; nothing else moves it."""
    flags = ["--max-steps", "1", "--warmup-epochs", "0", "--freeze-last-layer", "0", "--teacher-momentum", "0.9", "--no-shared-head"]
    torch.manual_seed(0)
    before = ibot.build_model(arguments(*flags)).state_dict()
    train_here("ibot", photos, tmp_path / "run", *flags)
    after = saved(tmp_path / "run")["model"]
    moved = 0
    for name in before:
        if name.startswith("teacher."):
            student = name.replace("teacher.", "student.")
            close(after[name], 0.9 * before[name] + 0.1 * after[student], atol=1e-7)
            moved += not torch.equal(after[student], before[student])
    assert moved > 40


def test_weights_of_the_losses(photos, tmp_path):
    """Without the patches' loss nothing reaches their prototypes, and without masks it is 0."""
    flags = ["--max-steps", "2", "--no-shared-head"]
    train_here("ibot", photos, tmp_path / "a", *flags, "--patch-weight", "0.5", "--cls-weight", "2")
    row = rows(tmp_path / "a")[0]
    assert row["loss"] == pytest.approx(2 * row["cls_loss"] + 0.5 * row["patch_loss"], rel=1e-5)
    assert row["chance"] == pytest.approx(2 * math.log(64) + 0.5 * 0.8 * math.log(64))
    train_here("ibot", photos, tmp_path / "b", *flags, "--mask-prob", "0")
    row = rows(tmp_path / "b")[0]
    assert row["masked"] == row["patch_loss"] == 0 and row["loss"] == row["cls_loss"]


def test_log_and_evaluation(photos, tmp_path):
    train_here("ibot", photos, tmp_path / "run", "--max-steps", "8", "--local-crops", "0")
    run = rows(tmp_path / "run")
    for row in run:
        assert row["teacher_entropy_chance"] == pytest.approx(math.log(64)) and row["cls_chance"] == pytest.approx(math.log(64))
        assert row["cls_loss"] == pytest.approx(row["teacher_entropy"] + row["kl"], rel=1e-5)
        assert row["loss"] == pytest.approx(row["cls_loss"] + row["patch_loss"], rel=1e-5)
        assert 0 < row["masked"] < 0.6
    assert [row["teacher_temp"] for row in run] == pytest.approx([0.04] * 6 + [0.07] * 2)
    net = open_network(tmp_path / "run", torch.device("cpu"))
    assert net.encoder is net.model.teacher.backbone
    assert net.encoder(torch.randn(2, 3, 32, 32)).shape == (2, 128)


@pytest.mark.parametrize("flags, sentence", [
    (["--arch", "vit_huge_patch8"], "vit_huge_patch8 is unknown"),
    (["--arch", "resnet50"], "resnet50 is unknown"),
    (["--image-size", "36"], "--image-size 36 is not a multiple of 8"),
    (["--local-size", "20"], "--local-size 20 is not a multiple of 8"),
    (["--accum-steps", "3"], "--accum-steps 3 does not divide a process's 8 samples"),
])  # fmt: skip
def test_mistakes(photos, tmp_path, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        train_here("ibot", photos, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_recipes_build():
    for name in ibot.RECIPES:
        args = ibot.parse_args(ibot.Args, ibot.RECIPES, ["--recipe", name])
        with torch.device("meta"):
            model = ibot.build_model(args)
        assert model.center.shape == (1, args.out_dim) and model.center2.shape == (1, 1, args.out_dim), name


# ------------------------------------------------ paste ------------------------------------------------
def test_paste():
    space = cut(["dino_loss", "patch_loss", "update_center", "update_teacher", "IBOT", "IBOTHead", "VisionTransformer"],
                ["all_gather"], file="ibot.py")  # fmt: skip
    student, teacher = (torch.nn.ModuleDict({"backbone": space["VisionTransformer"](32, 8, 48, 2, 3, 0.1, masked),
                                             "head": space["IBOTHead"](48, 20)}) for masked in (True, False))  # fmt: skip
    model = space["IBOT"](student, teacher)
    crops = [torch.randn(4, 3, size, size) for size in (32, 32, 16, 16, 16)]
    mask = torch.rand(8, 16) < 0.3
    chosen = positions(mask)
    logits, patches, targets, target_patches = model(crops, mask, chosen, [torch.rand(4, 2, 2) for _ in crops])
    assert logits.shape == (20, 20) and targets.shape == (8, 20)
    assert patches.shape == (int(mask.sum()), 20) and target_patches.shape == (8, 16, 20)
    assert not targets.requires_grad and not target_patches.requires_grad
    loss, _, _ = space["dino_loss"](logits, targets, model.center, 0.04)
    (loss + space["patch_loss"](patches, target_patches, mask, chosen, model.center2, 0.04)).backward()
    space["update_center"](model.center2[0], target_patches.flatten(0, 1))
    space["update_teacher"](model.student, model.teacher, 0.996)
    assert all(p.grad is not None for p in model.student.parameters() if p.requires_grad)
    backward(space["Attention"](48, 3)(torch.randn(2, 5, 48)))


def test_paste_augmentation():
    test_structure.test_paste_augmentation("ibot.py", "IBOTView")
    draw = ibot.IBOTView(32, depth=2, mask=dict(side=4)).sample(random.Random(0))
    assert len(draw["drop_path"]) == 2 and draw["mask"].shape == (4, 4)
