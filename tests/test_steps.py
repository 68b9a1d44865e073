"""Eight real steps of every method's loop, watched: loss, gradient and update against a second definition of each,
moving averages, who is called with which weights, learning rates, weight decay, queues. The official numbers of whole
steps start with two equal encoders, so that an average that is left out, inverted or late moves nothing in them: here
it shows."""

import copy
import itertools
import math

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import references
import run
from runs import FLAGS, METHODS, make_photos, module_of, rows

STEPS = 8
EPOCH = 6  # steps of an epoch of the photos
TOTAL = 4 * EPOCH  # of the whole schedule, whose warm-up is the first epoch
FASTER = {  # than in other tests: an average has to move by more than the rounding
    "mocov3": ["--base-lr", "0.03"],
    "dino": ["--base-lr", "0.16", "--freeze-last-layer", "0"],
    "ibot": ["--base-lr", "0.16", "--freeze-last-layer", "0"],
    "dinov2": ["--base-lr", "0.06"],
}


class Trace:
    """What a run of STEPS steps did. states[t]: the model after t steps, others[t]: what else has weights or queues
    of its own; called[t], inputs[t]: a weight of the averaged network when step t called it first, and its input;
    batches[t], groups[t]: what the loop and the optimizer were given for step t."""

    def __init__(self, name, args, loader, state):
        self.name, self.args, self.model = name, args, state["model"]
        self.epoch_steps, self.state = loader.steps_per_epoch, state
        self.blank = copy.deepcopy(self.model)
        self.states, self.others, self.called, self.inputs = [], [], [], []
        self.batches, self.groups, self.rows, self.views, self.losses = [], [], [], {}, []
        self.keep()

    def keep(self):
        self.states.append(clone(self.model))
        modules = {key: item for key, item in self.state.items() if isinstance(item, torch.nn.Module)}
        self.others.append({key: clone(item) for key, item in modules.items() if key != "model"})


def clone(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def traced(name, photos, directory, averaged, *flags):
    module, found = module_of(name), []
    start, batches, end_step, loader_of = run.Run.__init__, run.Run.batches, run.Run.end_step, module.Loader
    views_of_run, precision = {}, module.mixed_precision

    def scaled(dtype, device):
        """With a scale, which float32 does not need: the loop has to multiply by it and to divide by it, in order."""
        return precision(dtype, device)[0], torch.amp.GradScaler(device.type, init_scale=1024.0)

    def loader(dataset, views, *rest):
        views_of_run.update(views)
        return loader_of(dataset, views, *rest)

    def heard(function):
        original = getattr(module, function)

        def with_note(*args):
            found[0].losses.append((function, torch.is_autocast_enabled("cpu"), args[0]))
            return original(*args)

        return with_note

    def watch(self, method, args, loader, state, *rest):
        start(self, method, args, loader, state, *rest)
        trace = Trace(name, args, loader, state)
        trace.views = views_of_run
        found.append(trace)
        if averaged:
            network = trace.model.get_submodule(averaged)
            probe = list(network.parameters())[0]

            def called(_, inputs):
                if len(trace.called) < len(trace.states):
                    trace.called.append(probe.detach().clone())
                    trace.inputs.append(copy.deepcopy(inputs[0]))

            for part in network.modules():
                part.register_forward_pre_hook(called)

    def noted(self):
        for step, batch in batches(self):
            found[0].batches.append(copy.deepcopy(batch))  # a loop may change its own
            yield step, batch

    def record(self, *terms, **numbers):
        end_step(self, *terms, **numbers)
        found[0].keep()

    def given(optimizer, *_):
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer divides by it itself
        scale = 1.0 if scale is None else float(scale)
        found[0].groups.append([
            {"lr": group["lr"], "weight_decay": group["weight_decay"], "params": list(group["params"]),
             "grads": [None if p.grad is None else p.grad / scale for p in group["params"]],
             "exclude": group.get("exclude")}
            for group in optimizer.param_groups
        ])  # fmt: skip

    patch = pytest.MonkeyPatch()
    patch.setattr(run.Run, "__init__", watch)
    patch.setattr(run.Run, "batches", noted)
    patch.setattr(run.Run, "end_step", record)
    patch.setattr(module, "Loader", loader)
    patch.setattr(module, "mixed_precision", scaled)
    for function in LOSSES:
        if hasattr(module, function):
            patch.setattr(module, function, heard(function))
    hook = register_optimizer_step_pre_hook(given)
    argv = ["--data", str(photos), "--output-dir", str(directory), *FLAGS[name], *FASTER.get(name, []),
            "--max-steps", str(STEPS), "--eval-every", "0", "--save-every", "0", "--clip-grad", "0", *flags]  # fmt: skip
    try:
        module.train(module.parse_args(module.Args, module.RECIPES, argv))
    finally:
        hook.remove()
        patch.undo()
    found[0].rows = [row for row in rows(directory) if "loss" in row]
    return found[0]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


AVERAGED = {"moco": "encoder_k", "mocov3": "momentum_encoder", "byol": "target", "dino": "teacher",
            "ibot": "teacher", "dinov2": "teacher"}  # fmt: skip
LOSSES = ("clip_loss", "nt_xent_loss", "info_nce", "simsiam_loss", "mlm_loss", "align_loss", "info_nce_loss", "byol_loss",
          "contrastive_loss", "dino_loss", "patch_loss", "koleo_loss")  # fmt: skip
ONLINE = {"moco": "encoder_q", "mocov3": "base_encoder", "byol": "online", "dino": "student", "ibot": "student",
          "dinov2": "student"}  # fmt: skip
TRACES = {}


@pytest.fixture(params=METHODS)
def step_trace(request, photos, tmp_path):
    """One run of a method serves all tests of this file."""
    name = request.param
    if name not in TRACES:
        TRACES[name] = traced(name, photos, tmp_path / name, AVERAGED.get(name))
    return name, TRACES[name]


def test_loss_and_gradient_are_those_of_the_paper(step_trace):
    """Of the last step, before which everything has moved: from the views it was given and the weights it had."""
    name, trace = step_trace
    step = STEPS - 1
    batch, model = trace.batches[step], copy.deepcopy(trace.blank)
    model.load_state_dict(trace.states[step])
    views = {key: batch[key] for key in trace.views}
    assert len({id(batch[key]) for key in views}) == len(views)
    loss = getattr(references, name)(trace, step, model, views, batch)
    assert trace.rows[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    expected, compared = dict(model.named_parameters()), 0
    names = {id(p): key for key, p in trace.model.named_parameters()}
    largest = max(float(p.grad.abs().max()) for p in expected.values() if p.grad is not None)
    for group in trace.groups[step]:
        for p, grad in zip(group["params"], group["grads"], strict=True):
            want = expected[names[id(p)]].grad
            assert (grad is None) == (want is None), names[id(p)]
            if want is not None:
                compared += 1
                torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-4 * largest, msg=lambda m, p=p: f"{names[id(p)]}: {m}")
    assert compared > 10
    for key in ("center", "center2"):
        if key in trace.states[0]:
            torch.testing.assert_close(trace.states[step + 1][key], getattr(trace, f"expected_{key}").detach())


def test_every_step_is_the_optimizer_s(step_trace):
    """From the gradients, rates and decays it was given, with the paper's moments and none left over."""
    name, trace = step_trace
    names, memory, moved = {id(p): key for key, p in trace.model.named_parameters()}, {}, 0.0
    for step in range(STEPS):
        for group in trace.groups[step]:
            for p, grad in zip(group["params"], group["grads"], strict=True):
                key = names[id(p)]
                before, after = (trace.states[t][key].double() for t in (step, step + 1))
                if grad is None:
                    assert torch.equal(before, after), key
                    continue
                given = group["lr"], group["weight_decay"], group["exclude"]
                want = references.updated(name, before, grad.double(), *given, memory.setdefault(key, {}))
                torch.testing.assert_close(after, want, rtol=1e-5, atol=1e-6 * group["lr"] + 1e-7, msg=lambda m, key=key: f"{key}: {m}")
                moved = max(moved, float((after - before).abs().max()))
    assert moved > 1e-5


def half_cosine(start, end, share):
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def momentum(name, args, step):
    """Of the average in 0-based `step`, from the papers: constant in MoCo, on half a cosine to 1 elsewhere."""
    if name == "moco":
        return args.key_momentum
    start = {"byol": "tau", "mocov3": "key_momentum"}.get(name, "teacher_momentum")
    return half_cosine(getattr(args, start), 1.0, step / TOTAL)


def test_the_average_follows_the_online_network(step_trace):
    """theta_k <- m theta_k + (1 - m) theta_q: with the weights that gave q in MoCo (official code), with those
    after the optimizer's step elsewhere."""
    name, trace = step_trace
    if name not in AVERAGED:
        assert not any(part in key for key in trace.states[0] for part in ("teacher", "target", "momentum"))
        return
    key, online = AVERAGED[name], ONLINE[name]
    weights = [n for n, _ in trace.model.get_submodule(key).named_parameters()]
    assert len(weights) > 10
    moved = 0.0
    for step in range(STEPS):
        m = momentum(name, trace.args, step)
        before, after = trace.states[step], trace.states[step + 1]
        source = before if name in ("moco", "mocov3") else after
        for w in weights:
            old, new = before[f"{key}.{w}"].double(), source[f"{online}.{w}"].double()
            torch.testing.assert_close(after[f"{key}.{w}"].double(), m * old + (1 - m) * new, rtol=1e-6, atol=1e-7)
            moved = max(moved, float((1 - m) * (new - old).abs().max()))
    assert moved > 1e-5  # otherwise an average that is left out would pass


def test_the_average_starts_as_a_copy(step_trace):
    """Everywhere but in BYOL, whose official code draws the target's weights by themselves."""
    name, trace = step_trace
    if name not in AVERAGED:
        return
    start, key = trace.states[0], AVERAGED[name]
    parts = [n for n, _ in trace.model.get_submodule(key).named_parameters()]
    same = [torch.equal(start[f"{key}.{n}"], start[f"{ONLINE[name]}.{n}"]) for n in parts]
    assert all(same) == (name != "byol")


def test_which_weights_give_the_targets(step_trace):
    """MoCo's keys come from the encoder that was just updated, the targets of the others from the last step's."""
    name, trace = step_trace
    if name not in AVERAGED:
        assert trace.called == []
        return
    weight = next(iter(dict(trace.model.get_submodule(AVERAGED[name]).named_parameters())))
    path = f"{AVERAGED[name]}.{weight}"
    differ = 0.0
    for step in range(STEPS):
        before, after = trace.states[step][path], trace.states[step + 1][path]
        assert torch.equal(trace.called[step], after if name in ("moco", "mocov3") else before)
        differ = max(differ, float((before - after).abs().max()))
    assert differ > 0


def test_averaged_networks_get_no_gradient(step_trace):
    name, trace = step_trace
    given = {id(p) for group in trace.groups[0] for p in group["params"]}
    trained = {id(p) for p in trace.model.parameters() if p.requires_grad}
    assert given == trained
    if name in AVERAGED:
        for p in trace.model.get_submodule(AVERAGED[name]).parameters():
            assert id(p) not in given and p.grad is None


WARMUP = {"clip": (1e-6, 5), "slip": (1e-6, 5), "declip": (1e-5, 5), "dino": (0, 5), "ibot": (0, 5), "dinov2": (0, 5)}


def peak(name, args):
    if name in ("clip", "slip", "declip", "align", "moco"):
        return args.lr
    if name == "dinov2":
        return args.base_lr * (args.batch_size / 1024) ** 0.5
    return args.base_lr * args.batch_size / 256


def rate(name, args, step):
    """Linear over the first epoch, then half a cosine; an inclusive linspace has the peak in its last step."""
    start, steps = WARMUP.get(name, (0, 6))
    top = peak(name, args)
    if step <= steps:
        return start + (top - start) * step / steps
    if name == "align":  # linear to 0 (Sec. 5)
        return top * (TOTAL - step) / (TOTAL - EPOCH)
    if name == "moco":  # by whole epochs (official code)
        step = step // EPOCH * EPOCH
    first, last = (5, TOTAL - 1) if name == "declip" else (EPOCH, TOTAL)  # its official code counts from 1
    return half_cosine(top, args.min_lr, (step - first) / (last - first))


def test_learning_rate_of_every_step(step_trace):
    name, trace = step_trace
    args = trace.args
    for step in range(STEPS):
        want = rate(name, args, step)
        assert trace.rows[step]["lr"] == pytest.approx(want, rel=1e-6), step
        rates = [group["lr"] for group in trace.groups[step]]
        if name == "simsiam":  # the predictor's learning rate is not scheduled (Sec. 4.2)
            assert rates.pop() == pytest.approx(peak(name, args))
        assert max(rates) == pytest.approx(want, rel=1e-6), step


def test_what_is_decayed(step_trace):
    """Weight decay spares biases, norms and other vectors wherever the paper's code does; LARS does not scale them."""
    name, trace = step_trace
    spared = {id(p) for p in trace.model.parameters() if p.ndim == 1}
    if name in ("moco", "mocov3", "simsiam"):  # their official code decays everything
        spared = set()
    elif name == "align":  # everything but batch norms
        norms = [m for m in trace.model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        spared = {id(p) for norm in norms for p in norm.parameters()}
        assert len(spared) > 10
    assert_only_these_are_spared(trace, spared)


def assert_only_these_are_spared(trace, spared):
    for group in trace.groups[0]:
        decayed = group["weight_decay"] > 0 and not group["exclude"]
        if decayed:
            assert group["weight_decay"] == pytest.approx(trace.args.weight_decay)
        for p in group["params"]:
            if p.ndim > 0:  # of a scalar, the temperature, the papers say nothing
                assert decayed == (id(p) not in spared), p.shape


@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_what_sgd_decays(name, photos, tmp_path):
    """LARS leaves norms and biases out by a mark of its own; SGD knows their weight decay alone."""
    flags = ["--optimizer", "sgd", "--weight-decay", "0.01", "--max-steps", "1"]
    trace = traced(name, photos, tmp_path / name, None, *flags)
    assert not any(group["exclude"] for group in trace.groups[0])
    assert_only_these_are_spared(trace, {id(p) for p in trace.model.parameters() if p.ndim == 1})


def test_what_lars_decays_in_mocov3(photos, tmp_path):
    """Its AdamW decays everything, its LARS, for ResNets, spares norms and biases."""
    trace = traced("mocov3", photos, tmp_path / "mocov3", None, "--optimizer", "lars", "--max-steps", "1")
    assert_only_these_are_spared(trace, {id(p) for p in trace.model.parameters() if p.ndim == 1})


def test_gradients_are_fresh_and_finite(step_trace):
    """A gradient that is not set back to zero would be the sum of two steps'."""
    _, trace = step_trace
    for groups in trace.groups:
        grads = [grad for group in groups for grad in group["grads"] if grad is not None]
        assert grads and all(torch.isfinite(grad).all() for grad in grads)
    assert all(p.grad is None for p in trace.model.parameters())


def test_the_loss_is_the_sum_the_paper_names(step_trace):
    name, trace = step_trace
    args = trace.args
    for row in trace.rows:
        if name == "slip":
            want = row["clip_loss"] + args.ssl_scale * row["ssl_loss"]
        elif name == "declip":
            assert args.nns_weight == args.ssl_weight == 0.2  # alpha = beta = gamma = 0.2 (Eq. 6)
            self_supervised = row["iss_loss"] + row["tss_loss"]
            want = 0.4 * row["clip_loss"] + 0.2 * (self_supervised + row["mvs_loss"] + row["nns_loss"])
        elif name == "ibot":
            want = args.cls_weight * row["cls_loss"] + args.patch_weight * row["patch_loss"]
        elif name == "dinov2":
            want = row["cls_loss"] + args.patch_weight * row["patch_loss"] + args.koleo_weight * row["koleo"]
        elif name == "dino":
            want = row["teacher_entropy"] + row["kl"]
        else:
            return
        assert row["loss"] == pytest.approx(want, rel=1e-5)


def test_moco_s_queue_takes_the_keys_of_the_step(photos, tmp_path):
    name, trace = "moco", TRACES.get("moco") or traced("moco", photos, tmp_path / "moco", "encoder_k")
    b = trace.args.batch_size * (2 if trace.args.symmetric else 1)
    for step in range(STEPS):
        before, after = trace.states[step]["queue"], trace.states[step + 1]["queue"]
        changed = (before != after).any(0).nonzero().flatten()
        first = step * b
        assert changed.tolist() == list(range(first, first + b)), name
        assert int(trace.states[step + 1]["queue_ptr"]) == first + b
        torch.testing.assert_close(after[:, changed].norm(dim=0), torch.ones(b))


@pytest.mark.parametrize("name", ["clip", "slip", "declip"])
def test_the_logit_scale_is_held_between_1_and_100(name, photos, tmp_path):
    """Between 0 and ln 100, and it starts at ln 1 / 0.07. Each step is made to leave a value that is too large or too small."""
    values = itertools.cycle((9.0, -9.0))

    def too_far(optimizer, *_):
        scale = next(p for group in optimizer.param_groups for p in group["params"] if p.numel() == 1)
        scale.data.fill_(next(values))

    handle = register_optimizer_step_post_hook(too_far)
    try:
        trace = traced(name, photos, tmp_path / name, None)
    finally:
        handle.remove()
    scales = [float(state["logit_scale"]) for state in trace.states]
    assert scales == pytest.approx([math.log(1 / 0.07), *[math.log(100), 0.0] * (STEPS // 2)], rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_clipping_and_precision(name, photos, tmp_path):
    """Gradients are clipped all together, or each network or weight by itself as DINO's official code does. Under bf16
    networks compute in bfloat16 and losses outside of autocast."""
    trace = traced(name, photos, tmp_path / name, None, "--max-steps", "1", "--clip-grad", "1e-4", "--dtype", "bf16")
    inputs = []
    for function, autocast, given in trace.losses:
        assert not autocast, function
        inputs.append(given if torch.is_tensor(given) else given[0])
    assert any(x.dtype == torch.bfloat16 for x in inputs)
    grads = [g for group in trace.groups[0] for g in group["grads"] if g is not None]
    norms = torch.stack([g.double().norm() for g in grads])
    limit = 1e-4 * 1.001
    if name in ("dino", "ibot"):
        assert norms.max() <= limit and (norms > 0.9e-4).sum() > 5  # each weight reaches the bound
    elif name == "dinov2":
        parts = list(trace.model.student.values())
        assert norms.norm() <= limit * len(parts) ** 0.5
    else:
        assert 0.9e-4 < norms.norm() <= limit
