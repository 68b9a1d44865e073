"""dino.py: numbers of the official code, released checkpoints, stochastic depth by sample, what a step may change, pasting."""

import argparse
import math
import random

import pytest
import timm
import torch
import torchvision

import dino
import test_structure
from common import LARS, UserError, warmup_cosine
from data import Loader, open_dataset
from evaluation.weights import open_network
from run import load_checkpoint
from runs import FLAGS, make_photos, module_of, rows, train_here
from test_golden import close, close_grad, golden
from test_structure import backward, cut


def tiny(drop_path=0.0, dim=48):
    return dino.VisionTransformer(32, 8, dim, 2, 3, drop_path)


def tiny_network(**options):
    return dino.MultiCrop(tiny(), dino.DINOHead(48, 40, hidden_dim=64, bottleneck_dim=16, **options))


def arguments(*flags):
    return dino.parse_args(dino.Args, dino.RECIPES, ["--recipe", "imagenet", *FLAGS["dino"], *flags])


@pytest.mark.parametrize("name, arch", [("dino", "resnet18"), ("moco", "resnet18"), ("dino", "vit_nano_patch8"), ("ibot", "vit_nano_patch8")])
def test_zero_init_residual(name, arch):
    """Then every block returns what enters it (a ResNet's after ReLU); without the flag, as in the official code, it does not."""
    module = module_of(name)
    for zero in (True, False):
        args = module.Args(arch=arch, image_size=32, zero_init_residual=zero)
        args.local_size, args.out_dim = 16, 64  # of no use to moco.py
        model = module.build_model(args)
        network = model.encoder_q if name == "moco" else model.student.backbone
        block, shape = (network.layer1[1], (2, 64, 8, 8)) if arch == "resnet18" else (network.blocks[1], (2, 5, 96))
        x = torch.randn(shape).relu()
        assert torch.equal(block(x), x) == zero


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_init_std(name):
    """The spread of the blocks' linear layers, by default the official 0.02; all other weights stay the same."""
    module, found = module_of(name), {}
    for std in (None, 0.08):
        torch.manual_seed(0)
        args = module.Args(arch="vit_nano_patch8", image_size=32, local_size=16, out_dim=64)
        if std:
            args.init_std = std
        found[std] = module.build_model(args).student.state_dict()
    for key, x in found[0.08].items():
        if "blocks." in key and x.ndim == 2:
            assert x.std().item() == pytest.approx(0.08, rel=0.03)
            close(x, 4 * found[None][key])
        else:
            assert torch.equal(x, found[None][key])


# ------------------------------------------------ golden ------------------------------------------------
def test_loss_and_center():
    """Three calls in a row: the center of a call is made of the ones before it."""
    x, y, args = golden("dino_loss_3calls")
    center = torch.zeros(1, args["out_dim"])
    for call in ("call0", "call1", "call2"):
        student = x[call]["student"].clone().requires_grad_()
        temps = args["warmup_teacher_temp"], args["teacher_temp"], args["warmup_teacher_temp_epochs"]
        temp = dino.teacher_temperature(x[call]["epoch"], *temps)
        assert temp == pytest.approx(y[call]["teacher_temp"], rel=1e-9)
        loss, entropy, kl = dino.dino_loss(student, x[call]["teacher"], center, temp, args["student_temp"])
        loss.backward()
        close(loss, y[call]["loss"])
        close_grad(student.grad, y[call]["grad_student"])
        close(entropy + kl, loss.detach())
        p = torch.softmax((x[call]["teacher"] - center) / temp, -1)
        close(entropy, torch.distributions.Categorical(p).entropy().mean())
        dino.update_center(center, x[call]["teacher"], args["center_momentum"])
        close(center, y[call]["center_after"])
    close(center, y["state_dict"]["center"])


def test_loss_of_two_views_is_the_papers_algorithm():
    """Alg. 1: the mean of both directions."""
    s1, s2, t1, t2 = torch.randn(4, 6, 10)
    center, h = torch.randn(1, 10), lambda t, s: -(torch.softmax((t - center) / 0.05, 1) * torch.log_softmax(s / 0.1, 1)).sum(1).mean()
    loss, _, _ = dino.dino_loss(torch.cat([s1, s2]), torch.cat([t1, t2]), center, 0.05, 0.1)
    close(loss, h(t1, s2) / 2 + h(t2, s1) / 2)


@pytest.mark.parametrize("collapse, entropy", [("uniform", math.log(50)), ("one", 0.0)])
def test_both_collapses_show(collapse, entropy):
    logits = torch.zeros(1, 50) if collapse == "uniform" else 20.0 * torch.eye(50)[:1]
    loss, h, kl = dino.dino_loss(logits.repeat(12, 1), logits.repeat(4, 1), torch.zeros(1, 50), 0.04, 0.1)
    close(h, entropy, atol=1e-5)
    close(kl, 0.0, atol=1e-5)
    close(loss, entropy, atol=1e-5)


def test_schedules():
    _, y, args = golden("dino_schedules")
    total, per = args["epochs"] * args["niter_per_ep"], args["niter_per_ep"]
    lr = args["lr"]
    ours = [warmup_cosine(i, total, lr["warmup_epochs"] * per, lr["base"], end=lr["final"], reach_peak=True) for i in range(total)]
    close(ours, y["lr"], rtol=1e-6, atol=1e-12)
    for name in ("wd", "momentum"):
        ours = [warmup_cosine(i, total, 0, args[name][0], end=args[name][1]) for i in range(total)]
        close(ours, y[name], rtol=1e-6, atol=0)
    for key, warmup in (("100ep_warm30", 30), ("10ep_warm0", 0), ("10ep_warm1", 1)):
        expected = y[f"teacher_temp_{key}"]
        start, end = (0.04, 0.07) if warmup == 30 else (expected[0].item(), expected[-1].item())
        ours = [dino.teacher_temperature(i, start, end, warmup) for i in range(len(expected))]
        close(ours, expected, rtol=1e-6, atol=0)


def test_teacher_update():
    x, y, _ = golden("dino_ema_step")
    student, teacher = (torch.nn.Linear(7, 1, bias=False) for _ in range(2))
    student.weight.data[0], teacher.weight.data[0] = x["student"], x["teacher"]
    dino.update_teacher(student, teacher.requires_grad_(False), x["m"])
    close(teacher.weight[0], y["teacher_after"])


def test_clipping_is_by_parameter():
    x, y, _ = golden("dino_clip_and_cancel")
    params = {name: torch.nn.Parameter(torch.zeros_like(g)) for name, g in x["grads"].items()}
    for name, p in params.items():
        p.grad = x["grads"][name].clone()
    for p in [*params.values(), torch.nn.Parameter(torch.zeros(1))]:  # as in the loops; the last has no gradient
        torch.nn.utils.clip_grad_norm_(p, x["clip"])
    for name, p in params.items():
        close(p.grad, y["grads_after_clip"][name])


def test_lars():
    x, y, args = golden("dino_lars_3steps")
    params = {k: torch.nn.Parameter(v.clone()) for k, v in x["state_dict"].items()}
    groups = [{"params": [params["weight"]]}, {"params": [params["bias"]], "exclude": True}]
    optimizer = LARS(groups, lr=args["lr"], weight_decay=args["weight_decay"], momentum=args["momentum"], trust=args["eta"])
    for grads, expected in zip(x["grads"], y["states"], strict=True):
        for name, p in params.items():
            p.grad = grads[name].clone()
        optimizer.step()
        for name, p in params.items():
            close(p.detach(), expected[name])


HEADS = {"norm": {}, "nonorm": {"norm_last_layer": False}, "bn": {"bn": True}, "nl1": {"layers": 1}}


def old_name(name):
    """Of a parameter under torch's first weight_norm, which the official code uses."""
    return name.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v")


@pytest.mark.parametrize("case", HEADS)
def test_head(case):
    x, y, args = golden("dino_head_tiny")
    head = dino.DINOHead(args["in_dim"], args["out_dim"], hidden_dim=args["hidden_dim"], bottleneck_dim=args["bottleneck_dim"], **HEADS[case])
    head.load_state_dict(x[f"state_dict_{case}"], strict=True)
    out = head(x["x"])
    close(out, y[case]["out"])
    (out.square().sum() / 7 + out.sum()).backward()
    params = {old_name(name): p for name, p in head.named_parameters()}
    assert {name: p.requires_grad for name, p in params.items()} == y[case].get("requires_grad", {n: n != "last_layer.weight_g" for n in params})
    assert [name for name, p in params.items() if p.requires_grad] == y[case]["trainable"]
    largest = max(float(grad.abs().max()) for grad in y[case]["grads"].values())
    for name, grad in y[case].get("grads", {}).items():  # before batch norm, biases have gradient 0 but for rounding
        close(params[name].grad, grad, atol=1e-5 * largest)


@pytest.mark.parametrize("size", ["x32", "x16", "x24x40"])
def test_vit(size):
    x, y, _ = golden("dino_vit_tiny")
    vit = tiny()
    vit.load_state_dict(golden("dino_vit_tiny_weights")[0]["state_dict"], strict=True)
    image, seen = x[size].clone().requires_grad_(), {}
    vit.blocks[0].register_forward_hook(lambda module, args, out: seen.update(first=out))
    vit.blocks[-1].attn.qkv.register_forward_hook(lambda module, args, out: seen.update(qkv=out))
    out = vit(image)
    close(out, y[size]["cls"], atol=1e-5)
    out.square().sum().backward()
    close_grad(image.grad, y[size]["grad_input_of_sum_sq_cls"])
    close(vit.interpolate_pos_embed(*(side // 8 for side in image.shape[2:])), y[size]["pos_embed_used"])
    close(vit.norm(seen["first"]), y[size]["intermediate_n2"][0], atol=1e-5)
    q, k, _ = seen["qkv"].unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    close((q @ k.transpose(-2, -1) / 4).softmax(-1), y[size]["last_selfattention"])


def test_pos_embed_gets_gradient_from_every_size():
    vit = tiny()
    vit(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert (vit.pos_embed.grad[0, 1:].abs().sum(-1) > 0).all()


def test_multicrop():
    x, y, _ = golden("dino_multicrop_wrapper")
    network, sizes = tiny_network(), []
    network.load_state_dict(golden("dino_multicrop_backbone")[0]["state_dict"] | x["state_dict"], strict=True)
    network.backbone.register_forward_hook(lambda module, args, out: sizes.append(tuple(args[0].shape)))
    close(network(x["crops"]), y["out"])
    assert sizes == [(4, 3, 32, 32), (6, 3, 16, 16)]  # one pass for each resolution
    close(network(x["crops"][:2]), y["out_globals_only"])
    close(network(x["crops"][:1]), y["out_single_tensor"])


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_parameter_groups(norm_last_layer):
    """train() decays what has two dimensions or more, and leaves out what is not trained."""
    _, y, _ = golden(f"dino_params_groups_norm{norm_last_layer}")
    params = {old_name(name): p for name, p in tiny_network(norm_last_layer=norm_last_layer).named_parameters()}
    assert {n for n, p in params.items() if p.requires_grad and p.ndim >= 2} == set(y["decay"])
    assert {n for n, p in params.items() if p.requires_grad and p.ndim < 2} == set(y["no_decay"])
    assert {n for n, p in params.items() if not p.requires_grad} == set(y["not_in_optimizer"])


# ------------------------------------------------ checkpoints of others ------------------------------------------------
@pytest.mark.parametrize("style", ["old", "new"])
def test_official_training_checkpoint(tmp_path, style):
    """Student of DDP, teacher without, center, pickled arguments; names and shapes as the official code's."""
    x, _, _ = golden("dino_params_groups_normFalse")

    def state(prefix):
        names = x["all_names_shapes"]
        if style == "new":
            names = {n.replace("weight_g", "parametrizations.weight.original0").replace("weight_v", "parametrizations.weight.original1"): shape
                     for n, shape in names.items()}  # fmt: skip
        return {prefix + name: torch.randn(shape) for name, shape in names.items()}

    saved = {"student": state("module."), "teacher": state(""), "dino_loss": {"center": torch.randn(1, 40)},
             "epoch": 3, "args": argparse.Namespace(arch="vit_small")}  # fmt: skip
    torch.save(saved, tmp_path / "checkpoint.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = load_checkpoint(tmp_path / "checkpoint.pth")
    model = dino.DINO(tiny_network(norm_last_layer=False), tiny_network())
    for name in ("student", "teacher"):
        weights = {key.removeprefix("module."): value for key, value in loaded[name].items()}
        getattr(model, name).load_state_dict(weights, strict=True)
        g, v = (saved[name][key] for key in saved[name] if "last_layer" in key)
        close(getattr(model, name).head.last_layer.weight, g * v / v.norm(dim=1, keepdim=True))
        close(getattr(model, name).backbone.blocks[1].mlp.fc2.weight, next(v for k, v in saved[name].items() if "1.mlp.fc2.weight" in k))
    model.center.copy_(loaded["dino_loss"]["center"])
    assert torch.equal(model.state_dict()["center"], saved["dino_loss"]["center"])


@pytest.mark.parametrize("arch", ["vit_small_patch16", "vit_small_patch8", "vit_base_patch16", "vit_base_patch8"])
def test_released_backbones_have_these_names(arch):
    """Those files have timm's names and shapes, at 224 pixels."""
    with torch.device("meta"):
        model = dino.build_model(dino.parse_args(dino.Args, dino.RECIPES, ["--recipe", "imagenet", "--arch", arch, "--out-dim", "8"]))
        other = timm.create_model(f"{arch}_224", num_classes=0)
    mine, theirs = (m.state_dict() for m in (dino.image_encoder(model), other))
    assert list(mine) == list(theirs) and all(mine[k].shape == theirs[k].shape for k in mine)
    assert mine["pos_embed"].shape[1] == {"16": 197, "8": 785}[arch.split("patch")[1]]
    assert model.teacher.backbone.blocks[0].attn.heads == other.blocks[0].attn.num_heads


def test_vit_equals_timm():
    mine, x = tiny(dim=96), torch.randn(3, 3, 32, 32)
    other = timm.models.VisionTransformer(32, 8, num_classes=0, global_pool="token", embed_dim=96, depth=2, num_heads=3)
    for source, target in ((mine, other), (other, mine)):
        for p in source.parameters():
            p.data += 0.1 * torch.randn_like(p)
        target.load_state_dict(source.state_dict(), strict=True)
        close(mine(x), other.eval()(x), rtol=1e-4, atol=1e-5)


def test_resnet_equals_torchvision():
    args = arguments("--arch", "resnet50", "--stem", "imagenet", "--image-size", "64")
    encoder, other, x = dino.image_encoder(dino.build_model(args)), torchvision.models.resnet50(), torch.randn(2, 3, 64, 64)
    other.fc = torch.nn.Identity()
    other.load_state_dict(encoder.state_dict(), strict=True)
    close(encoder.eval()(x), other.eval()(x))
    assert encoder.feature_dim == 2048


# ------------------------------------------------ stochastic depth ------------------------------------------------
def test_stochastic_depth_is_the_samples_own():
    vit, x, u = tiny(drop_path=0.5), torch.randn(6, 3, 32, 32), torch.rand(6, 2, 2)
    out, order = vit(x, u), torch.tensor([3, 1, 5, 0, 4, 2])
    close(vit(x[order], u[order]), out[order], atol=1e-5)
    close(torch.cat([vit(x[:2], u[:2]), vit(x[2:], u[2:])]), out, atol=1e-5)
    assert not torch.allclose(vit(x), out)
    close(vit(x, torch.ones_like(u)), vit(x, torch.full_like(u, 0.5)))  # number against rate is all that counts


def test_stochastic_depth_leaves_out_and_rescales():
    block, x = dino.Block(48, 3, drop_path=0.25), torch.randn(3, 5, 48)
    u = torch.tensor([[0.2, 0.2], [0.9, 0.2], [0.25, 0.9]])
    out, attn = block(x, u), block.attn(block.norm1(x)) / 0.75
    close(out[0], x[0])
    close(out[1], (x + attn)[1])
    close(out[2], (x + attn + block.mlp(block.norm2(x + attn)) / 0.75)[2])
    rates = [b.drop_path for b in dino.VisionTransformer(32, 8, 48, 5, 3, 0.2).blocks]
    close(rates, [0, 0.05, 0.1, 0.15, 0.2])
    model = dino.build_model(arguments("--drop-path", "0.3"))
    assert model.student.backbone.blocks[-1].drop_path == 0.3 and model.teacher.backbone.blocks[-1].drop_path == 0


def test_draws_do_not_depend_on_the_batch():
    views, dataset = {"global1": dino.DINOView(32, depth=3), "local1": dino.DINOView(16, (0.05, 0.25), depth=3)}, open_dataset("shapes")
    drawn = {}
    for size in (8, 4):
        for _, batch in Loader(dataset, views, {}, size).batches(0, 16 // size):
            for name in views:
                u = batch["params"][name]["drop_path"]
                assert u.shape == (size, 3, 2)
                for index, numbers in zip(batch["index"].tolist(), u):
                    assert torch.equal(drawn.setdefault((name, index), numbers), numbers)
    assert len(drawn) == 32 and len({tuple(u.flatten().tolist()) for u in drawn.values()}) == 32


# ------------------------------------------------ runs ------------------------------------------------
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


def saved(directory):
    return torch.load(directory / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_the_loops_clip_each_parameter(name, photos, tmp_path):
    """To the same norm each by itself, not all of them together; smaller gradients stay as they are."""
    flags = ["--max-steps", "1", "--eval-every", "0", "--freeze-last-layer", "0", "--clip-grad"]
    free, clipped = (train_here(name, photos, tmp_path / clip, *flags, clip) for clip in ("0", "1e-4"))
    norms, wanted = ([min(float(g.norm()), 1e-4) for g in free], [float(g.norm()) for g in clipped])
    assert sum(norm == 1e-4 for norm in norms) > 20 and norms == pytest.approx(wanted, rel=0.02, abs=1e-7)


def test_first_epoch_leaves_the_prototypes(photos, tmp_path):
    torch.manual_seed(0)
    first = dino.build_model(arguments()).state_dict()
    train_here("dino", photos, tmp_path / "a", "--max-steps", "6")  # an epoch
    train_here("dino", photos, tmp_path / "b", "--max-steps", "7")
    frozen, free = (saved(tmp_path / d)["model"] for d in "ab")
    names = [name for name in first if "student.head.last_layer" in name]
    assert len(names) == 2 and all(torch.equal(first[name], frozen[name]) for name in names)
    assert not any(torch.equal(first[name], free[name]) for name in names)
    assert not torch.equal(first["student.head.mlp.4.weight"], frozen["student.head.mlp.4.weight"])
    assert frozen["center"].abs().max() > 0


def test_one_step(photos, tmp_path):
    """The teacher becomes the average; the last layer's length stays 1 if asked for; nothing else moves the teacher."""
    flags = ["--max-steps", "1", "--warmup-epochs", "0", "--norm-last-layer", "--freeze-last-layer", "0", "--teacher-momentum", "0.9"]
    torch.manual_seed(0)
    before = dino.build_model(arguments(*flags)).state_dict()
    train_here("dino", photos, tmp_path / "run", *flags)
    after = saved(tmp_path / "run")["model"]
    moved = 0
    for name in before:
        if name.startswith("teacher."):
            student = name.replace("teacher.", "student.")
            close(after[name], 0.9 * before[name] + 0.1 * after[student], atol=1e-7)
            moved += not torch.equal(after[student], before[student])
    assert moved > 40
    assert torch.equal(after["student.head.last_layer.parametrizations.weight.original0"], torch.ones(64, 1))


def test_log_and_evaluation(photos, tmp_path):
    train_here("dino", photos, tmp_path / "run", "--max-steps", "8", "--local-crops", "0")
    run = rows(tmp_path / "run")
    for row in run:
        assert [row["chance"], row["teacher_entropy_chance"]] == pytest.approx([math.log(64)] * 2)
        assert row["loss"] == pytest.approx(row["teacher_entropy"] + row["kl"], rel=1e-5)
    assert [row["teacher_temp"] for row in run] == pytest.approx([0.04] * 6 + [0.07] * 2)
    assert run[0]["weight_decay"] == pytest.approx(0.04) and run[-1]["weight_decay"] > 0.04 and run[-1]["teacher_momentum"] > 0.996
    net = open_network(tmp_path / "run", torch.device("cpu"))
    assert net.encoder is net.model.teacher.backbone
    assert net.encoder(torch.randn(2, 3, 32, 32)).shape == (2, 128)


def test_accumulation_is_exact(photos, tmp_path):
    """With stochastic depth, whose numbers are the samples' own; the center sees the whole batch."""
    runs = [[], ["--accum-steps", "4"]]
    grads = [train_here("dino", photos, tmp_path / str(len(f)), "--max-steps", "3", "--drop-path", "0.3", *f) for f in runs]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    a, b = (torch.tensor([[row[k] for k in ("loss", "kl")] for row in rows(tmp_path / str(len(f)))]) for f in runs)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    a, b = (saved(tmp_path / str(len(f)))["model"]["center"] for f in runs)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flags, sentence", [
    (["--arch", "vit_huge_patch8"], "vit_huge_patch8 is unknown"),
    (["--arch", "resnet20"], "resnet20 is unknown"),
    (["--image-size", "36"], "--image-size 36 is not a multiple of 8"),
    (["--local-size", "20"], "--local-size 20 is not a multiple of 8"),
    (["--accum-steps", "3"], "--accum-steps 3 does not divide a process's 8 samples"),
    (["--accum-steps", "2", "--head-bn"], "batch norm must see the whole batch"),
])  # fmt: skip
def test_mistakes(photos, tmp_path, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        train_here("dino", photos, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_recipes_build():
    for name in dino.RECIPES:
        args = dino.parse_args(dino.Args, dino.RECIPES, ["--recipe", name])
        with torch.device("meta"):
            model = dino.build_model(args)
        assert model.center.shape == (1, args.out_dim), name


# ------------------------------------------------ paste ------------------------------------------------
def test_paste():
    space = cut(["dino_loss", "update_center", "update_teacher", "DINO", "DINOHead", "MultiCrop", "VisionTransformer"],
                ["all_gather"], file="dino.py")  # fmt: skip
    student, teacher = (space["MultiCrop"](space["VisionTransformer"](32, 8, 48, 2, 3, 0.1), space["DINOHead"](48, 20, bn=True)) for _ in range(2))
    model = space["DINO"](student, teacher)
    crops = [torch.randn(4, 3, size, size) for size in (32, 32, 16, 16, 16)]
    logits, targets = model(crops, [torch.rand(4, 2, 2) for _ in crops])
    assert logits.shape == (20, 20) and targets.shape == (8, 20) and not targets.requires_grad
    loss, _, _ = space["dino_loss"](logits, targets, model.center, 0.04)
    loss.backward()
    space["update_center"](model.center, targets)
    space["update_teacher"](model.student, model.teacher, 0.996)
    assert all(p.grad is not None for p in model.student.parameters() if p.requires_grad)
    backward(space["Attention"](48, 3)(torch.randn(2, 5, 48)))


def test_paste_augmentation():
    test_structure.test_paste_augmentation("dino.py", "DINOView")
    draw = dino.DINOView(32, depth=2).sample(random.Random(0))
    assert len(draw["drop_path"]) == 2 and all(0 <= u < 1 for pair in draw["drop_path"] for u in pair)
