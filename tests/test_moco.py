"""moco.py: the official code's numbers, its checkpoints, batch norm over groups, shuffling, the queue."""

import json
import types

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import moco
from evaluation.weights import open_network
from run import load_checkpoint
from runs import FLAGS, make_photos, module_of, rows, train_here
from test_golden import GOLDEN, close, close_grad, golden, leaves
from test_structure import backward, cut


class TinyEncoder(nn.Module):
    """The golden cases' network."""

    def __init__(self, out_dim):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, out_dim)

    def forward(self, x):
        return self.fc(F.relu(self.bn1(self.conv1(x))).mean((2, 3)))


def official_logits(q, k, queue, temperature):
    """The definition, from which info_nce_loss's numbers follow."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    return torch.cat([(q * k).sum(1, keepdim=True), q @ queue], dim=1) / temperature


# ------------------------------------------------ golden ------------------------------------------------
def test_five_steps_of_the_queue():
    x, y, args = golden("moco_v1_steps")
    model = moco.MoCo(TinyEncoder(8), TinyEncoder(8), queue_size=16)
    model.queue.copy_(x["queue0"])
    for q, k, step in zip(x["q"], x["k"], y["steps"], strict=True):
        close(model.queue, step["queue_before"])
        assert int(model.queue_ptr) == step["ptr_before"]
        (q,) = leaves(q)
        loss, top1 = moco.info_nce_loss(q, k, model.queue, args["T"])
        loss.backward()
        close(loss, step["loss"])
        close_grad(q.grad, step["grad_q"])
        close(top1, (step["logits"].argmax(1) == 0).float().mean())
        model.enqueue(F.normalize(k, dim=1))
        close(model.queue, step["queue_after"])
        assert int(model.queue_ptr) == step["ptr_after"]


def test_a_whole_step():
    """Order of EMA, batch norm and queue, and every buffer afterwards."""
    x, y, args = golden("moco_v1_tiny_full_step")
    model = moco.MoCo(TinyEncoder(8), TinyEncoder(8), queue_size=12)
    model.load_state_dict(x["state_dict"], strict=True)
    model = moco.group_batchnorm(model, 6)
    (q,) = model(x["im_q"])
    model.update_key_encoder(args["m"])
    k = moco.shuffled_keys(model.encoder_k, x["im_k"], torch.randperm(6))
    loss, _ = moco.info_nce_loss(q, k, model.queue, args["T"])
    loss.backward()
    model.enqueue(k)
    close(loss, y["loss"])
    for name, grad in y["grads"].items():
        # The loss is 3e-4: softmax is 1 - 3e-4 there, which float32 holds to 6e-8, a five-thousandth of what is left
        close(model.get_parameter(name).grad, grad, rtol=0, atol=5e-4 * float(grad.abs().max()))
    for name, value in y["state_dict_after"].items():
        close(model.state_dict()[name], value)


@pytest.mark.parametrize("version", ["1", "2"])
def test_resnet18_from_a_seed(version):
    """Initialisation in the official order gives the official weights, and these the official loss."""
    x, y, _ = golden(f"moco_v{version}_resnet18_dim32_K64")
    torch.manual_seed(0)
    model = moco.MoCo(*(moco.resnet("resnet18", num_classes=32) for _ in range(2)), 64, mlp=version == "2")
    state = model.state_dict()
    assert list(state) == list(x["keys_shapes"])
    for name, mark in y["init_fingerprint"].items():
        assert tuple(state[name].shape) == tuple(mark["shape"])
        close(state[name].flatten()[:4], mark["first4"])
        close(state[name].double().sum(), mark["sum"], atol=1e-3)
    (q,) = model(x["x1"])
    with torch.no_grad():
        k = model.encoder_k(x["x2"])
    loss, _ = moco.info_nce_loss(q, k, model.queue, {"1": 0.07, "2": 0.2}[version])
    cosines = official_logits(q, k, model.queue, 1.0)
    close(cosines, y["logits"] * {"1": 0.07, "2": 0.2}[version], atol=3e-5)  # batch norm over 4 values, four times
    close(loss, y["loss"], rtol=1e-4)


def test_learning_rate():
    x, y, _ = golden("moco12_simsiam_lr_schedules")
    for version, name in (("1", "moco_v1_step"), ("2", "moco_v2_cos")):
        args = moco.Args(version=version)
        close([moco.learning_rate(args, epoch) for epoch in x["moco_epoch"]], y[name])
        close([moco.learning_rate(args, epoch + 0.99) for epoch in x["moco_epoch"]], y[name])  # by whole epochs
        warm = moco.Args(version=version, warmup_epochs=2.5)
        rates = [moco.learning_rate(warm, epoch / 10) for epoch in range(30)]
        assert rates[0] == 0 and rates[24] == pytest.approx(0.96 * 0.03) and max(rates) <= 0.03


TWO_PROCESSES = """
import torch, torch.nn.functional as F, moco, test_moco
from common import rank
from test_golden import close, close_grad, golden, leaves
torch.distributed.init_process_group("gloo")
r = f"rank{rank()}"

x, y, args = golden("dist2_moco_v2_steps")
model = moco.MoCo(test_moco.TinyEncoder(6), test_moco.TinyEncoder(6), queue_size=12)
model.queue.copy_(x["queue0"])
for inputs, outputs in zip(x[r], y[r], strict=True):
    keys = moco.shuffled_keys(lambda x: x, inputs["k"], torch.randperm(4, generator=torch.Generator().manual_seed(3)))
    (q,) = leaves(inputs["q"])
    loss, _ = moco.info_nce_loss(q, keys[2 * rank() : 2 * rank() + 2], model.queue, args["T"])
    loss.backward()
    close(loss, outputs["loss"])
    close_grad(q.grad, outputs["grad_q"])
    model.enqueue(keys)
    close(model.queue, outputs["queue_after"])
    assert int(model.queue_ptr) == outputs["ptr_after"]

x, y, args = golden("dist2_moco_shuffle_bn")
model = moco.MoCo(test_moco.TinyEncoder(5), test_moco.TinyEncoder(5), queue_size=16)
model.load_state_dict(x[r]["state0"], strict=True)
model = moco.group_batchnorm(model, 4)
(q,) = model(x[r]["im_q"])
model.update_key_encoder(args["m"])
keys = moco.shuffled_keys(model.encoder_k, x[r]["im_k"], x["rank0"]["perm_rank0"])
logits = test_moco.official_logits(q, keys[4 * rank() : 4 * rank() + 4], model.queue, args["T"])
close(logits, y[r]["logits"])
model.enqueue(keys)
for name, value in y[r]["state1"].items():  # before the mean over processes, which the official code has not
    close(model.state_dict()[name], value)
moco.average_statistics(model)
for name, value in model.state_dict().items():
    if "running" in name:
        close(value, (y["rank0"]["state1"][name] + y["rank1"]["state1"][name]) / 2)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_are_the_official_two(server, tmp_path):
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    server.together(tmp_path / "two.py")


# ------------------------------------------------ batch norm ------------------------------------------------
def test_groups_are_batches_of_their_own():
    torch.manual_seed(0)
    whole, x = nn.BatchNorm2d(5), torch.randn(12, 5, 3, 2) * 3 + 1
    nn.init.normal_(whole.weight), nn.init.normal_(whole.bias)
    grouped = nn.Sequential(nn.BatchNorm2d(5))
    grouped[0].load_state_dict(whole.state_dict())
    grouped = moco.group_batchnorm(grouped, 4)[0]
    parts, means, variances = [], [], []
    for part in x.split(4):
        one = nn.BatchNorm2d(5)
        one.load_state_dict(whole.state_dict())
        parts.append(one(part))
        means.append(one.running_mean), variances.append(one.running_var)
    close(grouped(x), torch.cat(parts))
    close(grouped.running_mean, torch.stack(means).mean(0))
    close(grouped.running_var, torch.stack(variances).mean(0))
    assert int(grouped.num_batches_tracked) == 1
    assert not torch.allclose(whole(x), grouped(x))
    whole.load_state_dict(grouped.state_dict())
    close(grouped.eval()(x), whole.eval()(x))


def test_shuffling_changes_keys_only_where_there_are_several_groups():
    torch.manual_seed(0)
    x, order = torch.randn(8, 3, 8, 8), torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    for group, same in ((8, True), (4, False)):
        encoder = moco.group_batchnorm(TinyEncoder(5), group)
        plain = moco.shuffled_keys(encoder, x, torch.arange(8))
        shuffled = moco.shuffled_keys(encoder, x, order)
        assert torch.allclose(plain, shuffled, atol=1e-5) == same
        assert not shuffled.requires_grad
    keys = moco.shuffled_keys(lambda x: x.flatten(1), x, order)
    close(keys, F.normalize(x.flatten(1), dim=1))  # every key comes back to its place


# ------------------------------------------------ method ------------------------------------------------
def test_loss_at_chance_and_without_gradient_to_keys():
    q, k = leaves(torch.ones(4, 8), torch.ones(4, 8))
    loss, _ = moco.info_nce_loss(q, k, torch.ones(8, 30) / 8**0.5, 0.07)
    assert loss.item() == pytest.approx(torch.tensor(31.0).log().item(), rel=1e-6)
    loss.backward()
    assert k.grad is None
    assert moco.info_nce_loss(q.bfloat16(), k.bfloat16(), torch.ones(8, 30), 0.07)[0].dtype == torch.float32


def test_only_queries_are_trained():
    torch.manual_seed(0)
    model = moco.build_model(moco.Args(arch="resnet18", image_size=32, head_dim=16, queue_size=24))
    assert not any(p.requires_grad for p in model.encoder_k.parameters())
    for a, b in zip(model.encoder_q.state_dict().values(), model.encoder_k.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    close(model.queue.norm(dim=0), torch.ones(24))
    before = model.encoder_k.fc[0].weight.clone()
    with torch.no_grad():
        model.encoder_q.fc[0].weight.add_(1.0)
    model.update_key_encoder(0.9)
    close(model.encoder_k.fc[0].weight, before + 0.1, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_run_fills_the_queue(tmp_path, symmetric):
    photos = make_photos(tmp_path / "photos")
    flags = ["--max-steps", "2", "--eval-every", "0", "--queue-size", "48", *(["--symmetric"] if symmetric else [])]
    train_here("moco", photos, tmp_path / "run", *flags)
    saved = load_checkpoint(tmp_path / "run")["model"]
    new = 32 if symmetric else 16
    assert int(saved["queue_ptr"]) == new
    start = moco.build_model(types.SimpleNamespace(**load_checkpoint(tmp_path / "run")["args"])).queue
    close(saved["queue"].norm(dim=0), torch.ones(48))
    assert saved["queue"].shape == start.shape and len(saved["queue"].unique(dim=1)[0]) == 48
    logged = rows(tmp_path / "run")[0]
    assert logged["top1_chance"] == pytest.approx(1 / 49)  # a key and the queue
    assert 0 <= logged["top1"] <= 1 and 0 < logged["feature_std"] <= 0.25 * 1.2  # 1 / sqrt(16) at most, but for 7 of 8
    assert not any(k.startswith("encoder_k") and "running_mean" in k and not v.any() for k, v in saved.items())


def test_one_group_is_warned_of(tmp_path, capsys):
    photos = make_photos(tmp_path / "photos")
    for group, warned in (("4", False), ("8", True)):
        train_here("moco", photos, tmp_path / group, "--max-steps", "1", "--eval-every", "0", "--bn-group", group)
        assert ("shuffling has no effect" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("version, temperature", [("1", "0.07"), ("2", "0.2")])
def test_each_version_has_the_temperature_of_its_paper(tmp_path, version, temperature, monkeypatch):
    photos, losses = make_photos(tmp_path / "photos"), []
    flags = [flag for flag in FLAGS["moco"] if flag not in ("--temperature", "0.5")]
    monkeypatch.setitem(FLAGS, "moco", flags)
    for number, given in enumerate(([], ["--temperature", temperature])):
        flags = ["--version", version, "--max-steps", "2", "--eval-every", "0", *given]
        train_here("moco", photos, tmp_path / str(number), *flags)
        losses.append([row["loss"] for row in rows(tmp_path / str(number))])
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]


def test_versions_differ_as_the_papers_say():
    import random

    v1, v2 = moco.MoCoView(32, "1"), moco.MoCoView(32, "2")
    draws1, draws2 = ([view.sample(random.Random(i)) for i in range(300)] for view in (v1, v2))
    assert all(d["jitter"] for d in draws1) and 0.7 < sum(d["jitter"] for d in draws2) / 300 < 0.9
    assert max(abs(d["hue"]) for d in draws1) > 0.3 and max(abs(d["hue"]) for d in draws2) <= 0.1
    assert v2.blur and not v1.blur
    one, two = (moco.build_model(moco.Args(version=v, arch="resnet18", queue_size=256)) for v in "12")
    assert isinstance(one.encoder_q.fc, nn.Linear) and isinstance(two.encoder_q.fc, nn.Sequential)


# ------------------------------------------------ checkpoints ------------------------------------------------
@pytest.mark.parametrize("version", ["1", "2"])
def test_official_checkpoints_load(version):
    """A checkpoint with the released one's keys, shapes and types, `module.` before each."""
    keys = json.loads((GOLDEN / f"state_dict_keys_moco_v{version}_resnet50.json").read_text())
    released = {f"module.{key}": torch.zeros(shape, dtype=getattr(torch, kind)) for key, (shape, kind) in keys.items()}
    model = moco.build_model(moco.Args(version=version))
    model.load_state_dict({key.removeprefix("module."): value for key, value in released.items()}, strict=True)
    assert not model.encoder_q.conv1.weight.any() and list(model.state_dict()) == list(keys)
    assert {key: str(value.dtype) for key, value in model.state_dict().items()} == {k: f"torch.{t}" for k, (_, t) in keys.items()}


def test_backbone_goes_into_torchvision_and_timm():
    torch.manual_seed(0)
    args = moco.Args(arch="resnet18", image_size=64, queue_size=256)
    model, other = moco.build_model(args), torchvision.models.resnet18()
    other.fc, encoder = nn.Identity(), moco.image_encoder(model)
    other.load_state_dict(encoder.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    third = timm.create_model("resnet18", num_classes=0)
    third.load_state_dict(encoder.state_dict(), strict=True)
    with torch.no_grad():
        close(encoder.eval()(x), other.eval()(x))
        close(encoder(x), third.eval()(x))
    assert model.encoder_q.training and isinstance(model.encoder_q.fc, nn.Sequential)  # left as it was
    assert encoder.conv1.weight is model.encoder_q.conv1.weight


def test_checkpoint_opens_in_evaluate(tmp_path):
    photos = make_photos(tmp_path / "photos")
    train_here("moco", photos, tmp_path / "run", "--max-steps", "1", "--eval-every", "0")
    net = open_network(tmp_path / "run", torch.device("cpu"))
    assert net.method == "moco" and net.encoder(torch.randn(2, 3, 32, 32)).shape == (2, 128)


@pytest.mark.parametrize("name, second", [("moco", "encoder_k"), ("mocov3", "momentum_encoder")])
def test_the_network_of_the_keys_is_compiled_too(name, second, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    module, build = module_of(name), module_of(name).build_model
    models = []
    monkeypatch.setattr(module, "build_model", lambda args: models.append(build(args)) or models[-1])
    train_here(name, make_photos(tmp_path / "photos"), tmp_path / "run", "--max-steps", "1", "--eval-every", "0", "--compile")
    assert compiled == [models[0], getattr(models[0], second)]


# ------------------------------------------------ paste ------------------------------------------------
def test_paste():
    space = cut(["MoCo", "MoCoView"], allowed_data=["hflip", "normalize", "to_float"], file="moco.py")
    r18 = torchvision.models.resnet18
    model = space["MoCo"](r18(num_classes=16), r18(num_classes=16), 32, mlp=True)
    (q,) = model(torch.randn(4, 3, 32, 32))
    backward(q)
    model.update_key_encoder(0.9)
    model.enqueue(F.normalize(q.detach(), dim=1))
    loss = cut(["info_nce_loss"], file="moco.py")["info_nce_loss"]
    loss(torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), torch.randn(8, 12), 0.1)[0].backward()
    norm = cut(["GroupBatchNorm"], ["all_gather"], file="moco.py")["GroupBatchNorm"](5)
    norm.group = 2
    backward(norm(torch.randn(4, 5, 3, 3)))
