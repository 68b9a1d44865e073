"""Faithful: losses, gradients, models, schedules and optimisers equal numbers computed with the official code."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import clip
import simclr
import slip
from common import LARS, user_errors, warmup_cosine

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    case = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
    return case["inputs"], case["outputs"], case["meta"]["args"] if "args" in case["meta"] else {}


def close(a, b, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=rtol, atol=atol)


def close_grad(a, b):
    close(a, b, atol=1e-5 * float(b.abs().max()))


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


# ------------------------------------------------ losses ------------------------------------------------
@pytest.mark.parametrize("case", [0, 1])
def test_clip_loss_openai(case):
    x, y, _ = golden(f"clip_openai_loss_{case}")
    image, text, t = leaves(x["image_features"], x["text_features"], x["log_logit_scale"])
    loss = clip.clip_loss(image, text, t.exp())
    loss.backward()
    close(loss, y["loss"])
    close_grad(image.grad, y["grad_image_features"])
    close_grad(text.grad, y["grad_text_features"])
    close_grad(t.grad, y["grad_log_logit_scale"])


@pytest.mark.parametrize("gather_grad", [True, False])
def test_clip_loss_slip(gather_grad):
    x, y, _ = golden("slip_cliploss_0")
    image, text, scale = leaves(x["image_embed"], x["text_embed"], x["logit_scale"])
    loss = slip.clip_loss(image, text, scale, gather_grad)
    loss.backward()
    close(loss, y["loss"])
    close_grad(image.grad, y["grad_image_embed"])
    close_grad(text.grad, y["grad_text_embed"])
    close_grad(scale.grad, y["grad_logit_scale"])


@pytest.mark.parametrize("case", [0, 1])
def test_nt_xent_slip(case):
    x, y, _ = golden(f"slip_simclr_{case}")
    a, b = leaves(x["aug1_embed"], x["aug2_embed"])
    loss = slip.nt_xent_loss(a, b, temperature=0.1)
    loss.backward()
    close(loss, y["ssl_loss"])
    close_grad(a.grad, y["grad_aug1_embed"])
    close_grad(b.grad, y["grad_aug2_embed"])


def test_slip_loss_is_the_sum():
    x, y, _ = golden("slip_sliploss_0")
    image, text, a, b, scale = leaves(*(x[k] for k in ("image_embed", "text_embed", "aug1_embed", "aug2_embed", "logit_scale")))
    loss = slip.clip_loss(image, text, scale) + slip.nt_xent_loss(a, b, temperature=0.1)
    loss.backward()
    close(loss, y["loss"])
    for tensor, name in ((image, "image_embed"), (text, "text_embed"), (a, "aug1_embed"), (b, "aug2_embed"), (scale, "logit_scale")):
        close_grad(tensor.grad, y[f"grad_{name}"])


@pytest.mark.parametrize("name", ["ntxent_n4_d8_t0.1", "ntxent_n8_d16_t0.5"])
def test_nt_xent_mean_over_2n(name):
    x, y, args = golden(name)
    a, b = leaves(x["z0"], x["z1"])
    loss = simclr.nt_xent_loss(a, b, args["temperature"])
    loss.backward()
    close(loss, y["loss_mean_over_2N"])
    close_grad(a.grad, y["grad_z0"])
    close_grad(b.grad, y["grad_z1"])


def test_nt_xent_is_half_of_the_tensorflow_code():
    x, y, args = golden("simclr_tf_loss_n4_d8_t0.1")
    a, b = leaves(x["z0"], x["z1"])
    loss = 2 * simclr.nt_xent_loss(a, b, args["temperature"])
    loss.backward()
    close(loss, y["loss"])
    close_grad(a.grad, y["grad_z0"])


GATHERED = {  # golden case -> loss of (rank's inputs), names of the inputs
    "dist2_openclip_local1_grad0": ("clip", False, ("image_embed", "text_embed", "logit_scale")),
    "dist2_slip_cliploss": ("slip", False, ("image_embed", "text_embed", "logit_scale")),
    "dist2_slip_simclr": ("slip", None, ("aug1_embed", "aug2_embed")),
    "dist2_ntxent_4_8_0.1": ("simclr", None, ("z0", "z1")),
}


def rank_result(rank, name):
    """In one of two gloo processes: loss and gradients of this rank's inputs, before any averaging."""
    module, gather_grad, names = GATHERED[name]
    x, _, _ = golden(name)
    inputs = leaves(*(x[f"rank{rank}"][key] for key in names))
    if module == "clip" or name == "dist2_slip_cliploss":
        loss = {"clip": clip, "slip": slip}[module].clip_loss(*inputs, gather_grad)
    else:
        loss = {"slip": slip, "simclr": simclr}[module].nt_xent_loss(*inputs, 0.1)
    loss.backward()
    return [loss.item()] + [t.grad.tolist() for t in inputs]


def test_two_processes(server, tmp_path):
    server.together("tests/test_golden.py", tmp_path)
    for rank in (0, 1):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert set(results) == set(GATHERED)
        for name, (loss, *grads) in results.items():
            y = golden(name)[1][f"rank{rank}"]
            close(loss, y["loss"])
            for grad, key in zip(grads, GATHERED[name][2], strict=True):
                close_grad(torch.tensor(grad), y[f"grad_{key}"])


# ------------------------------------------------ models ------------------------------------------------
@pytest.mark.parametrize("name", ["clip_openai_vit", "clip_openai_rn"])
def test_clip_model(name):
    x, y, args = golden(name)
    model = clip.CLIP(**args)
    model.load_state_dict(x["state_dict"], strict=True)
    model.eval()
    image, text = model(x["image"], x["text"])
    close(image, y["image_features"], atol=1e-5)
    close(text, y["text_features"], atol=1e-5)
    scale = model.logit_scale.exp()
    close(scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T, y["logits_per_image"], atol=1e-4)
    loss = clip.clip_loss(image, text, scale)
    loss.backward()
    close(loss, y["loss"])
    params = dict(model.named_parameters())
    for key, grad in y["grads_eval_mode"].items():
        close_grad(params[key].grad, grad)
    if name == "clip_openai_rn":
        model.train()
        image, text = model(x["image"], x["text"])
        logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        close(logits, y["train_mode_logits_per_image"], atol=1e-4)


def test_clip_initialisation():
    _, stats, _ = golden("clip_openai_init_stats")
    torch.manual_seed(1)
    vit = clip.CLIP(256, 224, 3, 256, 32, 77, 2000, 256, 4, 3)
    rn = clip.CLIP(128, 96, (1, 1, 1, 1), 16, None, 77, 2000, 256, 4, 3)
    for model, expected in ((vit, stats["vit"]), (rn, stats["rn"])):
        assert {name: list(p.shape) for name, p in model.named_parameters()} == {name: row["shape"] for name, row in expected.items()}
        for name, p in model.named_parameters():
            n, std = p.numel(), expected[name]["std"]
            assert abs(p.std(unbiased=False).item() - std) <= std * 5 / (2 * n) ** 0.5 + 1e-8 if n > 50 else True, name
            assert abs(p.mean().item() - expected[name]["mean"]) <= 7 * std / n**0.5 + 1e-8, name


def test_slip_model():
    x, y, args = golden("slip_model_SLIP")
    visual = slip.VisionTransformer(32, 8, 64, depth=2, heads=4)
    model = slip.SLIP(args.pop("embed_dim"), visual, args.pop("vision_width"), **args)
    model.load_state_dict(x["state_dict"], strict=True)
    inputs = x["image"], x["text"], x["aug1"], x["aug2"]
    keys = ("image_embed", "text_embed", "aug1_embed", "aug2_embed")
    model.train()

    def embed(dtype=torch.float32):
        image, text, features1, features2 = model(*[i.to(dtype) if i.is_floating_point() else i for i in inputs])
        return image, text, model.image_mlp(features1), model.image_mlp(features2)

    def losses(outputs):
        return slip.clip_loss(*outputs[:2], model.logit_scale.exp()), slip.nt_xent_loss(*outputs[2:], 0.1)

    outputs = embed()
    for output, key in zip(outputs, keys):
        close(output, y["outputs_train"][key], atol=1e-5)
    clip_term, ssl_term = losses(outputs)
    close(clip_term, y["loss_dict"]["clip_loss"])
    close(ssl_term, y["loss_dict"]["ssl_loss"])
    model.double()  # batch norm over 6 samples amplifies rounding: in float32 gradients change by 2e-4 with the number of threads
    sum(losses(embed(torch.float64))).backward()
    params = dict(model.named_parameters())
    for key, grad in y["grads"].items():  # of float32: 8e-5 from those of float64
        close(params[key].grad, grad, rtol=0, atol=1e-4 * float(grad.abs().max()))
    model.float().load_state_dict(x["state_dict"])  # the running statistics before the step
    model.eval()
    for output, key in zip(embed(), keys):
        close(output, y["outputs_eval"][key], atol=1e-5)
    assert {n for n, p in params.items() if p.ndim < 2} == set(y["no_decay_param_names"])  # train() splits by ndim


# ------------------------------------------------ schedules and optimisers ------------------------------------------------
def test_slip_schedule():
    _, y, _ = golden("slip_lr_schedule")
    ours = [warmup_cosine(i, 50, 10, 3e-3, 1e-6, 1e-5, reach_peak=True) for i in range(50)]
    close(ours, y["lr"], rtol=1e-6, atol=1e-12)


def test_simclr_schedules():
    x, y, _ = golden("simclr_lr_schedules")
    for name, case in x.items():
        scaling, base, batch = name.split("_")
        peak = float(base) * (int(batch) / 256 if scaling == "linear" else int(batch) ** 0.5)
        ours = [warmup_cosine(int(s), case["total_steps"], case["warmup_steps"], peak) for s in case["steps"]]
        close(ours, y[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["lars_simclr_tf_style", "lars_mocov3", "lars_byol"])
def test_lars(name):
    x, y, args = golden(name)
    params = {k: torch.nn.Parameter(v.clone()) for k, v in x["params0"].items()}
    excluded = [p for p in params.values() if p.ndim <= 1]
    groups = [{"params": [p for p in params.values() if p.ndim > 1]}, {"params": excluded, "exclude": True}]
    optimizer = LARS(groups, weight_decay=args["weight_decay"], momentum=0.9, lr_in_momentum=name == "lars_simclr_tf_style")
    lrs = x.get("lrs", [args.get("lr")] * 3)
    for lr, grads, expected in zip(lrs, x["grads"], y["steps"], strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for k, p in params.items():
            p.grad = grads[k].clone()
        optimizer.step()
        for k, p in params.items():
            close(p.detach(), expected["params"][k])


if __name__ == "__main__":
    with user_errors():
        torch.distributed.init_process_group("gloo")
        this = torch.distributed.get_rank()
        results = {name: rank_result(this, name) for name in GATHERED}
        Path(sys.argv[1], f"{this}.json").write_text(json.dumps(results))
