"""mocov3.py: the official code's numbers, its checkpoints, its vision transformer."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import mocov3
from common import warmup_cosine
from test_golden import GOLDEN, close, close_grad, golden, leaves
from test_moco import TinyEncoder
from test_structure import backward, cut


# ------------------------------------------------ golden ------------------------------------------------
@pytest.mark.parametrize("temperature", ["0.2", "1.0"])
def test_loss(temperature):
    x, y, _ = golden(f"mocov3_loss_n4_d8_t{temperature}")
    q, k = leaves(x["q"], x["k"])
    loss = mocov3.contrastive_loss(q, k, float(temperature))
    loss.backward()
    close(loss, y["loss"])
    close_grad(q.grad, y["grad_q"])
    assert k.grad is None


TWO_PROCESSES = """
import torch, mocov3
from common import rank
from test_golden import close, close_grad, golden, leaves
torch.distributed.init_process_group("gloo")
for temperature in ("0.2", "1.0"):
    x, y, _ = golden(f"dist2_mocov3_loss_t{temperature}")
    x, y = x[f"rank{rank()}"], y[f"rank{rank()}"]
    (q,) = leaves(x["q"])
    loss = mocov3.contrastive_loss(q, x["k"], float(temperature))
    loss.backward()
    close(loss, y["loss"])
    close_grad(q.grad, y["grad_q"])
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_loss_on_two_processes(server, tmp_path):
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    server.together(tmp_path / "two.py")


def test_a_whole_step():
    x, y, args = golden("mocov3_tiny_resnethead_full_step")
    encoders = [TinyEncoder(8), TinyEncoder(8)]
    for encoder in encoders:
        encoder.fc = mocov3.mlp(6, 12, 8, layers=2)
    model = mocov3.MoCoV3(*encoders, mocov3.mlp(8, 12, 8, layers=2, last_norm=False))
    model.load_state_dict(x["state_dict"], strict=True)
    q1, q2 = model(x["x1"], x["x2"])
    model.update_momentum_encoder(args["m"])
    with torch.no_grad():
        k1, k2 = model.momentum_encoder(x["x1"]), model.momentum_encoder(x["x2"])
    loss = mocov3.contrastive_loss(q1, k2, args["T"]) + mocov3.contrastive_loss(q2, k1, args["T"])
    loss.backward()
    close(loss, y["loss"])
    for name, grad in y["grads"].items():
        close_grad(model.get_parameter(name).grad, grad)
    for name, value in y["state_dict_after_forward"].items():
        close(model.state_dict()[name], value)


def test_vision_transformer():
    x, y, args = golden("mocov3_tiny_vit_forward")
    model = mocov3.VisionTransformer(32, 16, args["embed_dim"], args["depth"], args["num_heads"])
    close(model.pos_embed, x["state_dict"]["pos_embed"])
    head = nn.Linear(32, 10)
    model.load_state_dict({k: v for k, v in x["state_dict"].items() if not k.startswith("head")}, strict=True)
    head.load_state_dict({k[5:]: v for k, v in x["state_dict"].items() if k.startswith("head")})
    with torch.no_grad():
        close(model(x["x"]), y["features_cls"])
        model.head = head
        close(model(x["x"]), y["logits"])
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    assert trained == {k: bool(v) for k, v in y["requires_grad"].items()}


def test_position_embedding():
    _, y, _ = golden("mocov3_pos_embed_sincos")
    close(mocov3.sincos_position_embedding(3, 32), y["img48_dim32"])
    close(mocov3.sincos_position_embedding(4, 16), y["img64_dim16"])


def test_initialisation():
    torch.manual_seed(0)
    model = mocov3.VisionTransformer(32, 16, 192, 1, 3)
    block = model.blocks[0]
    for weight, fans in ((block.attn.qkv.weight, 2 * 192), (block.mlp.fc1.weight, 5 * 192), (model.patch_embed.proj.weight, 768 + 192)):
        bound = (6 / fans) ** 0.5
        assert 0.98 * bound < weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not block.attn.qkv.bias.any() and not model.patch_embed.proj.bias.any()
    assert 0 < model.cls_token.abs().max() < 1e-5


def test_schedules():
    x, y, _ = golden("mocov3_schedules")
    for name, out in y.items():
        a = out["args"]
        for e, lr, m in zip(x[name]["fractional_epoch"], out["lr"], out["momentum"], strict=True):
            close(warmup_cosine(e.item(), a["epochs"], a["warmup_epochs"], a["lr"]), lr)
            close(warmup_cosine(e.item(), a["epochs"], 0, a["moco_m"], end=1.0), m)


# ------------------------------------------------ method ------------------------------------------------
def test_only_queries_are_trained_and_the_patches_stay():
    args = mocov3.Args(arch="vit_micro_patch16", image_size=32, mlp_dim=32, head_dim=16)
    model = mocov3.build_model(args)
    fixed = {name for name, p in model.base_encoder.named_parameters() if not p.requires_grad}
    assert fixed == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert not any(p.requires_grad for p in model.momentum_encoder.parameters())
    args.freeze_patch_embed = False
    assert mocov3.build_model(args).base_encoder.patch_embed.proj.weight.requires_grad


# ------------------------------------------------ checkpoints ------------------------------------------------
@pytest.mark.parametrize("name, arch", [("resnet50", "resnet50"), ("vit_small", "vit_small_patch16"), ("vit_base", "vit_base_patch16")])
def test_official_checkpoints_load(name, arch):
    keys = json.loads((GOLDEN / f"state_dict_keys_moco_v3_{name}.json").read_text())
    with torch.device("meta"):
        model = mocov3.build_model(mocov3.Args(arch=arch))
        released = {f"module.{key}": torch.empty(shape, dtype=getattr(torch, kind)) for key, (shape, kind) in keys.items()}
    model.load_state_dict({key.removeprefix("module."): value for key, value in released.items()}, strict=True, assign=True)
    assert list(model.state_dict()) == list(keys)


def test_backbones_go_into_timm_and_torchvision():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    vit = mocov3.image_encoder(mocov3.build_model(mocov3.Args(arch="vit_micro_patch16", image_size=32, mlp_dim=32)))
    other = timm.models.vision_transformer.VisionTransformer(32, 16, num_classes=0, embed_dim=128, depth=4, num_heads=4)
    res = mocov3.image_encoder(mocov3.build_model(mocov3.Args(arch="resnet18", image_size=64, mlp_dim=32)))
    third = torchvision.models.resnet18()
    third.fc = nn.Identity()
    for mine, theirs in ((vit, other), (res, third)):
        theirs.load_state_dict(mine.state_dict(), strict=True)
        with torch.no_grad():
            close(mine.eval()(x), theirs.eval()(x))


# ------------------------------------------------ paste ------------------------------------------------
def test_paste():
    space = cut(["MoCoV3", "VisionTransformer", "mlp"], file="mocov3.py")
    encoders = [space["VisionTransformer"](32, 16, 64, 1, 2) for _ in range(2)]
    for encoder in encoders:
        encoder.head = space["mlp"](64, 32, 16, layers=3)
    model = space["MoCoV3"](*encoders, space["mlp"](16, 32, 16, layers=2))
    backward(*model(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)))
    loss = cut(["contrastive_loss"], ["all_gather"], file="mocov3.py")["contrastive_loss"]
    loss(torch.randn(4, 8, requires_grad=True), F.normalize(torch.randn(4, 8), dim=1), 0.2).backward()
