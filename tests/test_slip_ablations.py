"""slip_ablations.py: its SimCLR branch is slip.py's, each loss and gradient equals one written out again, averages follow,
the losses see the images they are said to see, and a run is the same on two processes and after a restart."""

import contextlib
import json
import math
import os
import random
import sys

import pytest
import torch
import torch.nn.functional as F

import slip_ablations
from common import UserError, warmup_cosine
from evaluation.weights import open_network
from runs import FLAGS, ROOT, float64, make_photos, rows, train_here
from test_resume import assert_same_run

sys.path.insert(0, str(ROOT / "benchmarks"))
import ablations  # noqa: E402

KINDS = ["simclr", "mocov3", "byol", "beit"]
NAME = "slip_ablations"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


def args_of(*flags):
    return slip_ablations.parse_args(slip_ablations.Args, slip_ablations.RECIPES, [*FLAGS[NAME], *flags])


def losses(directory, name="loss"):
    return [row[name] for row in rows(directory) if "loss" in row]


# ------------------------------------------------ the same as slip.py ------------------------------------------------
def test_with_simclr_it_is_slip(photos, tmp_path):
    """Same weights, views, losses and gradients, over some steps."""
    grads = {}
    for name in ("slip", NAME):
        flags = ["--arch", "vit_micro_patch8", "--max-steps", "4", "--eval-every", "0"]
        grads[name] = train_here(name, photos, tmp_path / name, *flags)
    for term in ("loss", "clip_loss", "ssl_loss", "lr", "logit_scale", "chance"):
        assert losses(tmp_path / NAME, term) == pytest.approx(losses(tmp_path / "slip", term), rel=1e-5), term
    largest = max(float(g.abs().max()) for g in grads["slip"])
    for mine, theirs in zip(grads[NAME], grads["slip"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * largest)


def test_recipes_of_the_paper():
    clip = slip_ablations.parse_args(slip_ablations.Args, slip_ablations.RECIPES, ["--recipe", "yfcc15m-clip"])
    assert (clip.ssl, clip.lr, clip.weight_decay) == ("none", 5e-4, 0.5)
    first = slip_ablations.parse_args(slip_ablations.Args, slip_ablations.RECIPES, ["--recipe", "yfcc15m-simclr"])
    assert (first.ssl, first.clip_scale, first.lr, first.weight_decay) == ("simclr", 0, 3.2e-3, 0.1)
    slip = slip_ablations.parse_args(slip_ablations.Args, slip_ablations.RECIPES, ["--data", "yfcc15m"])
    assert (slip.lr, slip.weight_decay, slip.batch_size, slip.epochs) == (3e-3, 0.1, 4096, 25)


def test_measured_rows_differ_in_what_they_say():
    """One budget for all: steps, batch, rates. docs/slip_ablations.md has the commands of the paper's runs."""
    questions, budgets = set(), []
    for name in ablations.ROWS:
        words = ablations.small_flags(name).split()
        args = vars(slip_ablations.parse_args(slip_ablations.Args, slip_ablations.RECIPES, words))
        first = ablations.ROWS[name].small_first
        questions.add((args.pop("ssl"), args.pop("clip_views"), args.pop("images"), bool(first)))
        budgets.append(args)
        if first:  # and the run that it starts from
            words = f"{first} {ablations.BUDGET}".split()
            args = vars(slip_ablations.parse_args(slip_ablations.Args, slip_ablations.RECIPES, words))
            assert (args.pop("ssl"), args.pop("clip_views"), args.pop("images")) == ("simclr", "crop", "half")
            assert args == budgets[0] | {"clip_scale": 0.0}
    assert len(questions) == len(ablations.ROWS) == 10
    assert {images for *_, images, _ in questions} == {"half", "decoupled"}
    assert all(budget == budgets[0] for budget in budgets)


# ------------------------------------------------ losses ------------------------------------------------
def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def written_out(kind, model, args, views, mask):
    """L_ssl once more: every pair and every patch by itself."""
    branch, b, tau = model.ssl, len(views[0]), args.key_temperature
    if kind == "beit":
        patch, total = branch.patch_size, 0.0
        side = views[0].shape[-1] // patch
        x = model.visual.patch_embed(views[0]).flatten(2).transpose(1, 2).clone()
        x[mask] = branch.mask_token.expand(int(mask.sum()), -1)
        x = torch.cat([model.visual.cls_token.expand(b, -1, -1), x], 1) + model.visual.pos_embed
        predicted = branch.decoder(model.visual.norm(model.visual.blocks(x)))
        for i in range(b):
            of_image = []
            for j in mask[i].nonzero().flatten().tolist():
                row, column = divmod(j, side)
                pixels = views[0][i, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].flatten()
                target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
                of_image.append((predicted[i, 1 + j] - target).square().mean())
            total = total + sum(of_image) / len(of_image)
        return total / b
    if kind == "simclr":
        z = unit(torch.cat([branch.image_mlp(model.visual(view)) for view in views]))
        terms = []
        for i in range(2 * b):
            others = [z[i] @ z[k] / args.temperature for k in range(2 * b) if k != i]
            terms.append(torch.logsumexp(torch.stack(others), 0) - z[i] @ z[(i + b) % (2 * b)] / args.temperature)
        return sum(terms) / (2 * b)
    q = [unit(branch.predictor(branch.projector(model.visual(view)))) for view in views]
    k = [unit(branch.momentum_projector(branch.momentum_visual(view))).detach() for view in views]
    total = 0.0
    for one, other in ((0, 1), (1, 0)):
        for i in range(b):
            if kind == "byol":
                total = total + (q[one][i] - k[other][i]).square().sum()
            else:
                shares = (k[other] @ q[one][i] / tau).softmax(0)
                total = total - 2 * tau * shares[i].log()
    return total / b


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_of_each_branch(kind):
    args = args_of("--ssl", kind, "--vocab-size", "50")
    with float64():
        torch.manual_seed(0)
        model = slip_ablations.build_model(args)
        for p in model.parameters():  # the momentum encoder is no copy any more, and features are no constants
            p.data.add_(0.05 * torch.randn_like(p))
        views = [torch.randn(4, 3, 32, 32) for _ in range(1 if kind == "beit" else 2)]
        mask = torch.rand(4, 16) < 0.6
        inputs = [*views, mask] if kind == "beit" else views
        found = []
        for way in ("here", "written out"):
            model.zero_grad()
            if way == "here":
                embeddings, outputs = model((), inputs)
                assert embeddings == ()
                loss = slip_ablations.ssl_loss(outputs, args)
            else:
                loss = written_out(kind, model, args, views, mask)
            loss.backward()
            found.append((loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (loss, grads), (again, grads_again) = found
    torch.testing.assert_close(loss, again, rtol=1e-9, atol=0)
    assert grads.keys() == grads_again.keys() and len(grads) > 20
    assert not [name for name in grads if "momentum" in name]
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_again[name], rtol=1e-6, atol=1e-9)
        assert grad.abs().max() > 0 or name.endswith("k.bias")


@pytest.mark.parametrize("kind", KINDS)
def test_chance_is_the_loss_of_outputs_that_say_nothing(kind):
    args = args_of("--ssl", kind)
    torch.manual_seed(0)
    b = 64
    if kind == "beit":
        outputs = torch.zeros(b, 16, 192), torch.randn(b, 16, 192), torch.rand(b, 16) < 0.7
        assert float(slip_ablations.ssl_loss(outputs, args)) == pytest.approx(1, abs=0.01)  # 191 / 192 of the variance
        return
    same = [torch.ones(b, 8)] * 4  # all alike
    want = {"simclr": math.log(2 * b - 1), "mocov3": 4 * 0.2 * math.log(b), "byol": 0.0}[kind]
    outputs = same[:2] if kind == "simclr" else same
    assert float(slip_ablations.ssl_loss(outputs, args)) == pytest.approx(want, rel=1e-5, abs=1e-5)
    if kind == "byol":  # its chance is that of independent directions; a collapse reaches 0
        outputs = [torch.randn(b, 4096) for _ in range(4)]
        assert float(slip_ablations.ssl_loss(outputs, args)) == pytest.approx(4.0, abs=0.05)


# ------------------------------------------------ views and images ------------------------------------------------
COLOURS = {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": 0.5, "solarize": 0.0}  # SimCLR's
PLAIN = {"flip": 0.0, "jitter": 0.0, "gray": 0.0, "blur": 0.0, "solarize": 0.0}
DRAWN = {  # flags, view: probabilities, area of the crop, strength of the saturation, hue
    ("--ssl simclr", "view2"): (COLOURS, (0.08, 1.0), 0.4, 0.1),
    ("--ssl mocov3", "view1"): (COLOURS | {"blur": 1.0}, (0.08, 1.0), 0.2, 0.1),
    ("--ssl byol", "view2"): (COLOURS | {"blur": 0.1, "solarize": 0.2}, (0.08, 1.0), 0.2, 0.1),
    ("--ssl beit", "view1"): (PLAIN | {"flip": 0.5, "jitter": 1.0}, (0.08, 1.0), 0.4, 0.0),
    ("--clip-views crop", "image"): (PLAIN, (0.5, 1.0), None, None),
    ("--clip-views resize", "image"): (PLAIN | {"flip": 0.5}, (0.08, 1.0), None, None),
    ("--clip-views color", "image"): (COLOURS | {"flip": 0.0}, None, 0.4, 0.1),
    ("--clip-views ssl", "image"): (COLOURS, (0.08, 1.0), 0.4, 0.1),
}


@pytest.mark.parametrize("flags, name", DRAWN)
def test_what_a_view_draws(flags, name, monkeypatch):
    args = args_of(*flags.split())
    view = ({"image": slip_ablations.pair_view(args)} | slip_ablations.ssl_views(args, patches=16))[name]
    chances, area, saturation, hue = DRAWN[flags, name]
    draws = [view.sample(random.Random(f"{name} {i}")) for i in range(2000)]
    for operation, chance in chances.items():
        share = sum(draw[operation] for draw in draws) / len(draws)
        assert abs(share - chance) < 0.035 and (chance not in (0, 1) or share == chance), operation
    if saturation is not None:
        assert max(draw["saturation"] for draw in draws) == pytest.approx(1 + saturation, abs=0.01)
        assert max(draw["hue"] for draw in draws) == pytest.approx(hue, abs=0.002)
    assert {sum(draw["mask"]) for draw in draws} == ({12} if "beit" in flags else {0})  # 75% of 16 patches
    if "beit" in flags:
        share = torch.tensor([draw["mask"] for draw in draws]).float().mean(0)
        assert (share - 0.75).abs().max() < 0.04  # any patch as often as the others
    crops = []
    monkeypatch.setattr(slip_ablations, "random_resized_crop", lambda image, *rest, **more: crops.append((image, rest, more)))
    image = torch.arange(40 * 64).view(1, 40, 64).expand(3, -1, -1)
    for i in range(200):
        view.crop(image, random.Random(i))
    if area:
        assert all(rest[1:] == (32, area) for _, rest, _ in crops)
    else:  # the shorter side, anywhere along the longer one
        assert all(cut.shape == (3, 40, 40) and rest[2] == (1.0, 1.0) for cut, rest, _ in crops)
        assert {int(cut[0, 0, 0]) for cut, _, _ in crops} == set(range(25))


def test_views_apply_what_they_draw():
    """Solarisation and the mask are what slip.py's views have not."""
    args = args_of("--ssl", "mocov3")
    view = slip_ablations.ssl_views(args, 16)["view2"]
    off = {"flip": False, "jitter": False, "gray": False, "blur": False, "solarize": False}
    params = {**view.sample(random.Random(0)), **off}
    x = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    results = []
    for solarize in (False, True):
        given = {key: torch.as_tensor(value)[None] for key, value in {**params, "solarize": solarize}.items()}
        results.append(view(x, given))
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (view.mean, view.std))
    plain = x.float() / 255
    torch.testing.assert_close(results[0], (plain - mean) / std)
    torch.testing.assert_close(results[1], (torch.where(plain >= 0.5, 1 - plain, plain) - mean) / std)


def images_of(photos, directory, monkeypatch, *flags):
    """-> {name of a view: indices of the samples that the loader cropped for it}, of one epoch."""
    seen, plain = {}, slip_ablations.Loader.__getitem__

    def watched(self, item):
        for name in self.views:
            found = getattr(self.dataset, "indices", None)
            seen.setdefault(name, []).append(item[1] if found is None else int(found[item[1]]))
        return plain(self, item)

    monkeypatch.setattr(slip_ablations.Loader, "__getitem__", watched)
    train_here(NAME, photos, directory, "--arch", "vit_micro_patch16", "--epochs", "1", "--eval-every", "0", *flags)
    return {name: set(indices) for name, indices in seen.items()}


@pytest.mark.parametrize("images", ["all", "half", "decoupled"])
def test_which_images_the_losses_see(images, photos, tmp_path, monkeypatch):
    """52 photos, batches of 8: 6 an epoch, or 3 of a half."""
    seen = images_of(photos, tmp_path / "run", monkeypatch, "--images", images)
    assert {len(indices) for indices in seen.values()} == {48 if images == "all" else 24}
    assert seen["view1"] == seen["view2"]
    if images == "decoupled":
        assert not seen["view1"] & seen["image"]
    else:
        assert seen["view1"] == seen["image"]
    if images != "all":
        from sources import open_dataset

        dataset = open_dataset(str(photos))
        halves = [set(slip_ablations.half_of(dataset, which).indices.tolist()) for which in (0, 1)]
        assert not halves[0] & halves[1] and len(halves[0]) == len(halves[1]) == 26
        assert seen["image"] <= halves[0] and seen["view1"] <= halves[images == "decoupled"]


# ------------------------------------------------ averages ------------------------------------------------
def test_the_average_follows_before_the_keys_are_computed(photos, tmp_path, monkeypatch):
    branch, found = slip_ablations.MomentumBranch, []
    update, forward = branch.update, branch.forward

    def watched(self, visual, m):
        names = [("visual", visual, self.momentum_visual), ("projector", self.projector, self.momentum_projector)]
        before = {what: [p.clone() for p in momentum.parameters()] for what, _, momentum in names}
        update(self, visual, m)
        for what, online, momentum in names:
            for old, theta_q, theta_k in zip(before[what], online.parameters(), momentum.parameters(), strict=True):
                torch.testing.assert_close(theta_k, m * old + (1 - m) * theta_q.detach(), rtol=1e-5, atol=1e-7)
        moved = max(float((a - b).detach().abs().max()) for a, b in zip(before["visual"], visual.parameters()))
        found.append((m, moved))

    def after(self, *inputs):
        found.append("forward")
        return forward(self, *inputs)

    monkeypatch.setattr(branch, "update", watched)
    monkeypatch.setattr(branch, "forward", after)
    train_here(NAME, photos, tmp_path / "run", "--ssl", "mocov3", "--max-steps", "3", "--eval-every", "0", "--lr", "1e-2")
    assert found[1::2] == ["forward"] * 3
    momentums, moved = zip(*found[::2])
    assert momentums == pytest.approx([warmup_cosine(step, 24, 0, 0.99, end=1.0) for step in range(3)])
    assert moved[0] == 0 and moved[2] > 1e-4  # it starts as a copy


# ------------------------------------------------ runs ------------------------------------------------
VARIANTS = {
    "mocov3": ["--ssl", "mocov3", "--key-momentum", "0.9"],
    "byol": ["--ssl", "byol", "--images", "decoupled"],
    "beit": ["--ssl", "beit", "--clip-scale", "0.5", "--ssl-scale", "2"],
    "clip": ["--ssl", "none", "--clip-views", "ssl"],
    "first": ["--ssl", "simclr", "--clip-scale", "0"],
}


def test_same_run_on_two_processes(server, photos, tmp_path):
    """The fourth step of --images decoupled is in its second epoch."""
    jobs = []
    for variant, flags in VARIANTS.items():
        flags = [*flags, "--max-steps", "4", "--eval-every", "0"]
        jobs.append((NAME, str(photos), str(tmp_path / f"{variant}_2"), flags, True))
    server.together("tests/runs.py", json.dumps(jobs))
    for name, _, directory, flags, _ in jobs:
        with float64():
            one = train_here(name, photos, directory + "_one", *flags)
        many = torch.load(f"{directory}/grads.pt", weights_only=True)
        curve = losses(directory)
        assert len(set(curve)) == 4 and curve == pytest.approx(losses(directory + "_one"), rel=1e-9), directory
        for a, b in zip(one, many, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("variant", ["mocov3", "byol", "first"])
def test_a_run_is_continued(variant, photos, tmp_path, capsys):
    """EMA, the second loader of --images decoupled, no text encoder."""
    flags = [*VARIANTS[variant], "--eval-every", "2"]
    train_here(NAME, photos, tmp_path / "whole", *flags, "--max-steps", "6")
    assert ("evaluation: none, because --clip-scale 0 leaves out the texts" in capsys.readouterr().out) == (variant == "first")
    train_here(NAME, photos, tmp_path / "parts", *flags, "--max-steps", "3")
    train_here(NAME, photos, tmp_path / "parts", *flags, "--max-steps", "6", "--workers", "1")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_decoupled_images_are_one_loader(photos, monkeypatch):
    """Its waiting is that of both halves, and a bad sample of either counts."""
    views = {name: slip_ablations.View(32) for name in ("image", "view1")}
    dataset = slip_ablations.open_dataset(str(photos))
    loader = slip_ablations.Decoupled(dataset, {"image": views["image"]}, {"view1": views["view1"]}, {}, 8, 0, 0, "cpu")
    (_, batch), *_ = loader.batches(0, 2)
    assert {"image", "view1", "index", "label", "params"} == set(batch) and set(batch["params"]) == set(views) and loader.wait > 0 == loader.others.wait
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(2)), raising=False)
    shared = slip_ablations.Decoupled(dataset, {"image": views["image"]}, {"view1": views["view1"]}, {}, 8, 0, 8, "cpu")
    assert (shared.workers, shared.others.workers) == (1, 1)  # both together no more than the cores
    for first in (0, 3):  # in no epoch do the same places of both halves meet
        places = [torch.cat([batch["index"] for _, batch in half.batches(first, first + 3)])
                  for half in (slip_ablations.Loader(loader.dataset, {}, {}, 8, loader.seed), loader.others)]  # fmt: skip
        assert not torch.equal(*places)
    loader.check_bad()
    loader.others.bad = 5
    with pytest.raises(UserError, match="5 samples of photos.* are bad"):
        loader.check_bad()


def test_the_loss_is_the_weighted_sum(photos, tmp_path):
    train_here(NAME, photos, tmp_path / "run", *VARIANTS["beit"], "--max-steps", "2", "--eval-every", "0")
    for row in (row for row in rows(tmp_path / "run") if "loss" in row):
        assert row["loss"] == pytest.approx(0.5 * row["clip_loss"] + 2 * row["ssl_loss"], rel=1e-5)
        assert row["chance"] == pytest.approx(0.5 * math.log(8) + 2)
        assert (row["clip_chance"], row["ssl_chance"]) == pytest.approx((math.log(8), 1.0))


def test_logit_scale_is_held(photos, tmp_path):
    flags = ["--ssl", "none", "--lr", "1", "--clip-grad", "1e-3", "--warmup-epochs", "0", "--max-steps", "5", "--eval-every", "0"]
    train_here(NAME, photos, tmp_path / "run", *flags)
    assert 1 <= min(losses(tmp_path / "run", "logit_scale")) and max(losses(tmp_path / "run", "logit_scale")) <= 100.001


def test_decay_spares_vectors_and_averages_are_not_trained():
    model = slip_ablations.build_model(args_of("--ssl", "byol"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name in trained if "momentum" in name]
    assert {"ssl.predictor.0.weight", "ssl.projector.0.weight", "visual.cls_token", "text_projection"} <= trained
    for theta_q, theta_k in zip(model.visual.parameters(), model.ssl.momentum_visual.parameters(), strict=True):
        assert torch.equal(theta_q, theta_k) and not theta_k.requires_grad


def test_its_checkpoints_are_evaluated(photos, tmp_path):
    """With a text encoder as CLIP's, without one as an image encoder alone."""
    for variant in ("mocov3", "first"):
        flags = [*VARIANTS[variant], "--max-steps", "1", "--eval-every", "0"]
        train_here(NAME, photos, tmp_path / variant, *flags)
    net = open_network(tmp_path / "mocov3", torch.device("cpu"))
    assert net.tokenizer and net.model.encode_text(torch.tensor([net.tokenizer("a red star")])).shape == (1, 32)
    first = open_network(tmp_path / "first", torch.device("cpu"))
    assert first.tokenizer is None and not hasattr(first.model, "text_projection")
    assert first.encoder(torch.zeros(2, 3, 32, 32)).shape == net.encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 128)


@pytest.mark.parametrize("flags, sentence", [
    ("--ssl none --clip-scale 0", "leaves no loss"),
    ("--clip-scale 0 --ssl-scale 0", "--ssl-scale 0 leaves out L_ssl, which is --ssl none here"),
    ("--ssl mocov3 --key-temperature 0", "--key-temperature 0.0 must lie between 0.001 and 1000"),
    ("--ssl none --images decoupled", "here is one"),
    ("--clip-scale 0 --images decoupled", "here is one"),
    ("--clip-scale 0 --probe linear", "--probe has no use here"),
    ("--clip-scale 0 --clip-views color", "--clip-views has no use here: --clip-scale 0 leaves out the captions"),
    ("--arch vit_huge_patch8", "is unknown, choose"),
    ("--arch vit_tiny_patch00", "is unknown, choose"),
    ("--image-size 36", "is not a multiple of 8"),
    ("--text-width 60", "is not a multiple of 64"),
])  # fmt: skip
def test_one_sentence_for_a_mistake(flags, sentence, photos, tmp_path):
    with pytest.raises(UserError, match=sentence), contextlib.chdir(tmp_path):
        train_here(NAME, photos, tmp_path / "run", *flags.split())


def test_a_mean_over_masked_patches_counts_images_alike():
    """Images with few masked patches weigh as much as others, and unmasked patches do not count."""
    predicted, pixels = torch.zeros(2, 4, 6), torch.randn(2, 4, 6)
    mask = torch.tensor([[True, False, False, False], [True, True, True, False]])
    predicted[0, 1:] = 1e6
    target = F.layer_norm(pixels, (6,), eps=0) * (5 / 6) ** 0.5  # the unbiased variance
    each = target.square().mean(-1)
    want = (each[0, 0] + each[1, :3].mean()) / 2
    torch.testing.assert_close(slip_ablations.masked_pixel_loss(predicted, pixels, mask), want, rtol=1e-4, atol=0)
