"""align.py: Hugging Face's AlignModel, LAMB, EfficientNet's parts, the filters, captions in any script, pasting."""

import collections
import importlib
import json
import math
import os
import random
import sys
import tracemalloc

import pytest
import timm.optim
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torchvision.transforms.functional import to_pil_image

import align
from common import UserError
from data import Loader, Tokenizer, decode, open_dataset
from evaluation.weights import align_state, load_released, open_network
from run import load_checkpoint
from runs import FLAGS, ROOT, float64, make_photos, rows, train_here
from test_golden import close, close_grad, golden, leaves
from test_structure import backward, cut

STAGES = ((1, 3, 1, 32, 16, 1), (6, 5, 2, 16, 24, 2), (6, 3, 2, 24, 40, 1), (6, 5, 1, 40, 48, 2))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


# ------------------------------------------------ golden ------------------------------------------------
@pytest.mark.parametrize("case", [0, 1])
def test_loss_of_hugging_face_and_coyo(case):
    x, y, _ = golden(f"hf_align_loss_{case}")
    image, text, tau = leaves(x["image"], x["text"], x["temperature"])
    loss = align.align_loss(image, text, tau)
    close(loss, y["loss_sum_of_two_coyo"])
    loss.backward()
    for ours, key in ((image, "image"), (text, "text"), (tau, "temperature")):  # recorded for the mean of the directions
        close_grad(ours.grad, 2 * y[f"grad_{key}"])


def test_smoothed_labels_have_the_chance_level():
    for b in (4, 64):
        same = torch.ones(b, 8)
        close(align.align_loss(same, same, 0.1), 2 * math.log(b))


def tiny_pair(size=33):
    """A random AlignModel of transformers and an ALIGN of the same shape, both in evaluation mode."""
    torch.manual_seed(0)
    columns = list(zip(*STAGES))
    vision = transformers.AlignVisionConfig(
        image_size=size, width_coefficient=1.0, depth_coefficient=1.0, depth_divisor=8, expand_ratios=list(columns[0]),
        kernel_sizes=list(columns[1]), strides=list(columns[2]), in_channels=list(columns[3]), out_channels=list(columns[4]),
        num_block_repeats=list(columns[5]), depthwise_padding=[], squeeze_expansion_ratio=0.25, hidden_dim=48, drop_connect_rate=0.0)  # fmt: skip
    text = transformers.AlignTextConfig(vocab_size=90, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
                                        max_position_embeddings=16, hidden_act="gelu", hidden_dropout_prob=0.0,
                                        attention_probs_dropout_prob=0.0)  # fmt: skip
    config = transformers.AlignConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=48)
    theirs = transformers.AlignModel(config)
    for name, tensor in theirs.state_dict().items():  # every parameter and statistic gets a value that matters
        if tensor.is_floating_point():
            noise = torch.randn_like(tensor)
            tensor.copy_(noise.abs() + 0.5 if "running_var" in name else 0.1 * noise + 0.5 * (tensor.ndim == 1) + (tensor.ndim == 0))
    ours = align.ALIGN(48, align.EfficientNet(1.0, 1.0, 0.0, STAGES), align.BERT(16, 90, 128, 2), 128)
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("size", [33, 64])
def test_hugging_faces_weights_load_and_go_back(size):
    theirs, ours = tiny_pair(size)
    ours.load_state_dict(align_state(ours, theirs.state_dict()), strict=True)
    image, ids = torch.randn(3, 3, size, size), torch.randint(1, 90, (3, 12))
    ids[0, 7:] = ids[1, 3:] = 0
    ids[2, 4] = 0  # a token of id 0 inside a text is no padding
    lengths = torch.tensor([7, 3, 12])
    mask = (torch.arange(12) < lengths[:, None]).long()
    with torch.no_grad():
        out = theirs(pixel_values=image, input_ids=ids, attention_mask=mask)
        for grad in (False, True):  # torch has a path of its own without gradients
            with torch.set_grad_enabled(grad):
                mine = F.normalize(ours.encode_image(image), dim=-1), F.normalize(ours.encode_text(ids), dim=-1)
            torch.testing.assert_close(mine[0], out.image_embeds, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mine[1], out.text_embeds, rtol=1e-4, atol=1e-5)
        close(2 * theirs(pixel_values=image, input_ids=ids, attention_mask=mask, return_loss=True).loss,
              align.align_loss(*mine, ours.temperature), rtol=1e-4)  # fmt: skip
        for p in ours.parameters():
            p.add_(0.01 * torch.randn_like(p))
        theirs.load_state_dict(align_state(ours), strict=True)
        again = theirs(pixel_values=image, input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(again.image_embeds, F.normalize(ours.encode_image(image), dim=-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again.text_embeds, F.normalize(ours.encode_text(ids), dim=-1), rtol=1e-4, atol=1e-5)


def test_align_base_loads_from_a_file(tmp_path):
    """Names of kakaobrain/align-base, the sizes found from the tensors; a shallow BERT keeps the test small."""
    torch.manual_seed(0)
    ours = align.ALIGN(320, align.EfficientNet(1.0, 1.0), align.BERT(16, 90, 64, 1), 64)
    torch.save(align_state(ours), tmp_path / "pytorch_model.bin")
    module, loaded = load_released(tmp_path / "pytorch_model.bin")
    assert module is align
    for a, b in zip(ours.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_texts_of_align_base_are_as_long_as_in_its_training(tmp_path):
    """64 tokens, as transformers' AlignProcessor has them; the table of positions has BERT's 512."""
    from tokenizers import BertWordPieceTokenizer

    bert = BertWordPieceTokenizer()
    bert.train_from_iterator(["a red star"], vocab_size=40, show_progress=False)
    bert.save(str(tmp_path / "tokenizer.json"))
    for positions, length in ((512, 64), (48, 48)):
        ours = align.ALIGN(320, align.EfficientNet(1.0, 1.0), align.BERT(positions, 90, 64, 1), 64)
        torch.save(align_state(ours), tmp_path / "pytorch_model.bin")
        net = open_network(tmp_path / "pytorch_model.bin", torch.device("cpu"))
        assert len(net.tokenizer("a red star " * 99)) == length
        assert torch.equal(net.model.text.position_embeddings.weight, ours.text.position_embeddings.weight)


def test_alignmodel_has_no_image_projection():
    """A network of another width than the embedding has one, which the names of AlignModel cannot hold."""
    with torch.device("meta"):
        model = align.build_model(align.parse_args(align.Args, align.RECIPES, ["--recipe", "coco"]))
    assert isinstance(model.image_projection, torch.nn.Linear)
    with pytest.raises(ValueError, match="AlignModel has no image projection: embed_dim must be visual.dim"):
        align_state(model)


def test_sizes_are_those_of_the_published_model():
    with torch.device("meta"):
        model = align.build_model(align.Args(context_length=512))
        config = transformers.AlignConfig(text_config=transformers.AlignTextConfig().to_dict(),
                                          vision_config=transformers.AlignVisionConfig(hidden_dim=640).to_dict())  # fmt: skip
        theirs = {name: t.shape for name, t in transformers.AlignModel(config).state_dict().items()}
    ours = {name: t.shape for name, t in align_state(model).items()}
    assert ours == theirs and len(ours) == 1394
    assert sum(p.numel() for p in model.parameters()) + 768 * 769 == 172_117_841  # and the pooler
    assert isinstance(model.image_projection, torch.nn.Identity)
    draws = align.AlignView(32).sample(random.Random(0))["depth"]
    assert sum(isinstance(m, align.DropConnect) for m in model.modules()) == 55 <= len(draws)
    for name in ("b0", "b3"):
        with torch.device("meta"):
            net = align.build_model(align.Args(arch=f"efficientnet_{name}"))
            peer = getattr(torchvision.models, f"efficientnet_{name}")()
        shapes = [t.shape for name, t in peer.features[:-1].state_dict().items()]
        assert [t.shape for t in net.visual.features.state_dict().values()] == shapes
        assert isinstance(net.image_projection, torch.nn.Linear)


def test_batch_norm_and_initialisation():
    model = align.build_model(align.Args(arch="efficientnet_b0", vocab_size=900, text_layers=2))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}
    for weight in (model.text.word_embeddings.weight, model.text.layers[1].self_attn.in_proj_weight):
        assert weight.std().item() == pytest.approx(0.0176, rel=0.03)  # a normal of 0.02 that is cut at two deviations
        assert 0.039 < weight.abs().max().item() <= 0.04
    assert model.temperature.item() == 1 and not model.text_projection.bias.any()


def test_pieces_of_groups_are_exact(photos, tmp_path, monkeypatch):
    """Four pieces of one group each give loss, gradient and running statistics of the whole batch: groups do not see each
    other, DropConnect's draws go with their samples, statistics take one step a step, to the mean over the groups."""
    found, update = [], align.update_statistics

    def watched(model):
        norm = model.visual.features[0][1]
        before, (mean, _, passes) = norm.running_mean.clone(), norm.seen.clone()
        update(model)
        torch.testing.assert_close(norm.running_mean, 0.9 * before + 0.1 * mean / passes)
        found.append((int(norm.num_batches_tracked), int(passes[0])))

    monkeypatch.setattr(align, "update_statistics", watched)
    flags = ["--bn-group", "2", "--max-steps", "2", "--bn-momentum", "0.1", "--drop-connect", "0.4", "--eval-every", "0"]
    flags += ["--save-every", "0"]
    with float64():
        whole = train_here("align", photos, tmp_path / "whole", *flags)
        pieces = train_here("align", photos, tmp_path / "pieces", *flags, "--accum-steps", "4")
    assert found == [(1, 1), (2, 1), (1, 4), (2, 4)]
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    losses = [[row["loss"] for row in rows(tmp_path / run) if "loss" in row] for run in ("whole", "pieces")]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-8)
    saved = [torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)["model"] for run in ("whole", "pieces")]
    for key, value in saved[0].items():
        torch.testing.assert_close(value, saved[1][key], rtol=1e-6, atol=1e-8)


def test_many_pieces_do_not_compile_again(monkeypatch):
    """Each compilation counts, up to a limit beyond which a model runs uncompiled."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = align.group_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), 2)
    compiled = torch.compile(model, backend=count)
    for _ in range(12):
        compiled(torch.randn(4, 3, 5, 5, requires_grad=True))
    assert model[0].seen[2].tolist() == [12, 12, 12] and 1 <= len(graphs) <= 3


def test_groups_of_a_frozen_image_side_stay_as_they_are(photos, tmp_path):
    """And the text side gets the same gradient from the whole batch and from its pieces. As in the paper's networks the
    image side has no projection, so nothing of it learns."""
    flags = ["--bn-group", "2", "--max-steps", "2", "--eval-every", "0", "--embed-dim", "160"]
    train_here("align", photos, tmp_path / "first", *flags)
    init = ["--init", str(tmp_path / "first"), "--tokenizer", str(tmp_path / "first/tokenizer.json")]
    before, grads = load_checkpoint(tmp_path / "first")["model"], []
    names = [name for name in before if "running" in name]
    for pieces in ("1", "2"):
        directory = tmp_path / f"frozen{pieces}"
        grads.append(train_here("align", photos, directory, *flags, *init, "--freeze", "image", "--accum-steps", pieces))
        after = load_checkpoint(directory)["model"]
        assert len(names) > 20 and all(torch.equal(before[name], after[name]) for name in names)
        assert not torch.equal(before["text_projection.weight"], after["text_projection.weight"])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_group_is_a_batch_of_its_own():
    torch.manual_seed(0)
    norm, plain = torch.nn.BatchNorm2d(3, eps=1e-3), torch.nn.BatchNorm2d(3, eps=1e-3)
    model = torch.nn.Sequential(norm)
    align.group_batchnorm(model, 4)
    x = torch.randn(12, 3, 5, 5, requires_grad=True)
    y = model(x)
    assert isinstance(norm, align.GroupBatchNorm) and norm.seen[2].tolist() == [1, 1, 1]
    torch.testing.assert_close(y, torch.cat([plain(part) for part in x.split(4)]))
    with torch.no_grad():
        model(x)
    assert norm.seen[2].tolist() == [1, 1, 1] and norm.running_mean.abs().max() == 0  # a pass without gradient does not count


def test_convolutions_start_as_in_the_released_code():
    """TensorFlow's variance scaling, 2 / fan-out, does not divide a depthwise kernel's fan-out by the number of channels."""
    torch.manual_seed(0)
    net, depthwise = align.EfficientNet(1.0, 1.0), 0
    for name, conv in net.named_modules():
        if not isinstance(conv, torch.nn.Conv2d):
            continue
        fan_out = conv.kernel_size[0] ** 2 * (1 if conv.groups > 1 else conv.out_channels)
        depthwise += conv.groups > 1
        spread = 4 * (2 * conv.weight.numel()) ** -0.5  # four standard errors of a standard deviation
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=spread), name
    assert depthwise == 16


def test_drop_connect_is_a_function_of_its_draws():
    torch.manual_seed(0)
    module = align.DropConnect(0.4, block=1).train()
    x = torch.rand(1000, 2, 1, 1) + 0.5
    assert torch.equal(module(x), x)  # nothing was drawn
    module.draws = torch.rand(1000, 3)
    out = module(x)
    stays = module.draws[:, 1] >= 0.4
    assert torch.equal(out[~stays], torch.zeros_like(out[~stays])) and stays.float().mean().item() == pytest.approx(0.6, abs=0.05)
    close(out[stays], x[stays] / 0.6)
    assert torch.equal(module.eval()(x), x)
    net = align.EfficientNet(1.0, 1.0)
    drops = [m for m in net.modules() if isinstance(m, align.DropConnect)]
    assert [d.block for d in drops] == list(range(16)) and drops[8].p == pytest.approx(0.2 * 8 / 16)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_lamb_is_timms(weight_decay):
    torch.manual_seed(0)
    shapes = (5, 3), (7,), (4, 2, 3, 3), (2,)
    mine, theirs = ([torch.nn.Parameter(torch.randn(s)) for s in shapes] for _ in range(2))
    for a, b in zip(mine, theirs):
        b.data.copy_(a.data)
    mine[3].data.zero_()
    theirs[3].data.zero_()  # a norm of 0: the step is lr r
    ours = align.LAMB(mine, lr=0.02, weight_decay=weight_decay)
    peer = timm.optim.Lamb(theirs, lr=0.02, eps=1e-6, weight_decay=weight_decay, max_grad_norm=None, always_adapt=True)
    for _ in range(5):
        for a, b in zip(mine, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        peer.step()
        for a, b in zip(mine, theirs):
            close(a.detach(), b.detach(), atol=1e-6)
    before = mine[0].detach().clone()
    plain = align.LAMB([{"params": [mine[0]], "exclude": True}], lr=0.02)
    adam_p = torch.nn.Parameter(before.clone())
    adam = torch.optim.Adam([adam_p], lr=0.02, eps=1e-6)
    adam_p.grad = mine[0].grad.clone()
    plain.step()
    adam.step()
    close(mine[0].detach(), adam_p.detach())


def test_schedule_and_groups(photos, tmp_path):
    train_here("align", photos, tmp_path / "run", "--max-steps", "24", "--eval-every", "0", "--image-size", "32")
    lrs = [row["lr"] for row in rows(tmp_path / "run") if "lr" in row]
    peak = float(FLAGS["align"][FLAGS["align"].index("--lr") + 1])
    assert lrs[:7] == pytest.approx([peak * i / 6 for i in range(7)]) and max(lrs) == pytest.approx(peak)
    assert lrs[6:] == pytest.approx([peak * (24 - i) / 18 for i in range(6, 24)])
    groups = load_checkpoint(tmp_path / "run")["optimizer"]["param_groups"]
    assert [(g["weight_decay"], g["exclude"]) for g in groups] == [(1e-5, False), (0.0, True)]
    with torch.device("meta"):
        model = align.build_model(align.parse_args(align.Args, {}, FLAGS["align"]))
    norms = [p for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()]
    assert len(groups[1]["params"]) == len(norms)


# ------------------------------------------------ views ------------------------------------------------
def test_views_are_squashed_and_cropped():
    image = torch.randint(0, 256, (3, 200, 150), dtype=torch.uint8)
    view, resized = align.AlignView(289), align.squash(image, 346)
    assert view.full == 346
    pil = torchvision.transforms.functional.pil_to_tensor(to_pil_image(image).resize((346, 346), 2))
    assert (resized.int() - pil.int()).abs().max() <= 1  # Hugging Face's processor
    crop = view.crop(image, random.Random(3))
    rng = random.Random(3)
    top, left = rng.randint(0, 57), rng.randint(0, 57)
    assert torch.equal(crop, resized[:, top : top + 289, left : left + 289])
    draw = {"flip": torch.tensor([True, False])}
    out = view(torch.stack([crop, crop]), draw)
    close(out[1], crop / 127.5 - 1)
    assert torch.equal(out[0], out[1].flip(-1))
    test = align.eval_view(align.Args())
    centre = test.crop(image)
    assert torch.equal(centre, resized[:, 28:317, 28:317])
    close(test(centre[None])[0], centre / 127.5 - 1)


# ------------------------------------------------ filters ------------------------------------------------
def picture(index, captions, size=(300, 300), hash=0):
    return align.Picture(index, f"k{index}", size, hash, captions)


def dropped_by(rules, p, caption):
    return [name for name, drops in rules.items() if drops(p, caption)]


def test_image_rules():
    good = "a dog on grass"
    pictures = [picture(0, [good]), picture(1, [good], (200, 900)), picture(2, [good], (201, 602)), picture(3, [good], (603, 201)),
                picture(4, [f"text number {i} here" for i in range(1001)]), picture(5, [good], None), picture(6, [good], (500, 200))]  # fmt: skip
    rules = align.filter_rules(pictures)
    assert not dropped_by(rules, pictures[0], good) and not dropped_by(rules, pictures[2], good)
    assert "image side of 200 or less" in dropped_by(rules, pictures[1], good)
    assert dropped_by(rules, pictures[3], good) == ["image aspect of 3 or more"]
    assert dropped_by(rules, pictures[4], pictures[4].captions[0]) == ["image with over 1000 texts"]
    assert not dropped_by(rules, pictures[5], good)  # a text alone
    assert dropped_by(rules, pictures[6], good) == ["image side of 200 or less"]
    assert not dropped_by(align.filter_rules(pictures, min_side=0), pictures[6], good)


def test_text_rules():
    shared, ten = "click here to enlarge", "shared by ten images"
    pictures = [picture(i, [shared, shared, *([ten] if i < 10 else [])]) for i in range(11)]
    rules = align.filter_rules(pictures)
    assert dropped_by(rules, pictures[0], shared) == ["text of over 10 images"]
    assert not dropped_by(rules, pictures[0], ten)  # and twice at one image counts once
    for text, name in (("two words", "text of under 3 words"), ("", "text of under 3 words"), ("😀 😀 😀 😀", "text of under 3 words"),
                       (" ".join(f"w{i}" for i in range(21)), "text of over 20 words")):  # fmt: skip
        p = picture(99, [text])
        assert dropped_by(align.filter_rules([p]), p, text) == [name]
    for n in (3, 20):
        text = " ".join(f"w{i}" for i in range(n))
        p = picture(99, [text])
        assert not dropped_by(align.filter_rules([p]), p, text)


def test_rare_words_and_pairs():
    common = "a red dog runs"  # 4 words and 3 pairs
    pictures = [picture(i, [common]) for i in range(5)] + [picture(5, ["a red xyzzy runs"]), picture(6, ["dog a red runs"])]
    rules = align.filter_rules(pictures, common_tokens=7)
    assert not dropped_by(rules, pictures[0], common)
    for p in pictures[5:]:  # a rare word; a rare pair of frequent ones
        assert dropped_by(rules, p, p.captions[0]) == ["text with a rare word or pair"]
    assert not dropped_by(align.filter_rules(pictures), pictures[5], pictures[5].captions[0])  # few tokens: none is rare
    assert align.grams("Red, red DOG!") == ["red", "red", "dog", "red red", "red dog"]


def test_words_of_any_script():
    assert align.unigrams("강아지가 풀밭에서 뛴다") == ["강아지가", "풀밭에서", "뛴다"]
    assert align.unigrams("犬が走る 🐕") == list("犬が走る")
    assert align.unigrams("كلب يركض على العشب") == ["كلب", "يركض", "على", "العشب"]
    assert align.unigrams("Straße №5, naïve café") == ["straße", "5", "naïve", "café"]
    assert align.unigrams("हरे मैदान में खेल") == ["हरे", "मैदान", "में", "खेल"]  # vowel signs are no letters, and end no word
    assert align.unigrams("ஒரு நாய் ஓடுகிறது") == ["ஒரு", "நாய்", "ஓடுகிறது"]
    assert align.unigrams("كَلْبٌ يَرْكُضُ") == ["كَلْبٌ", "يَرْكُضُ"]
    assert align.unigrams("می\u200cخواهم بروم") == ["می\u200cخواهم", "بروم"]
    assert align.unigrams("un cafe\u0301 \u2764\ufe0f") == ["un", "café"]  # composed, and no word of a mark alone


def test_near_duplicates_of_test_images():
    images = [decode(open_dataset("shapes")[i].image) for i in range(40)]
    hashes = [align.image_hash(image) for image in images]
    generator = torch.Generator().manual_seed(0)
    for image, code in zip(images, hashes):
        larger = F.interpolate(image[None].float(), (150, 120), mode="bilinear")[0]
        noisy = (larger * 0.9 + 8 + 2 * torch.randn(larger.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
        rules = align.filter_rules([picture(0, ["a b c"], hash=align.image_hash(noisy))], [code], min_side=0)
        distance = (align.image_hash(noisy) ^ code).bit_count()
        assert ("image close to a test image" in dropped_by(rules, picture(0, ["a b c"]), "a b c")) == (distance <= 4)
    near = sum((a ^ b).bit_count() <= 4 for i, a in enumerate(hashes) for b in hashes[:i])
    assert near <= 8  # of 780 pairs
    assert all(0 <= code < 2**64 for code in hashes)


def test_filter_only_reports_and_training_keeps(server, photos, tmp_path):
    done = server.run("align.py", "--filter-only", "--data", photos, "--output-dir", tmp_path / "kept", "--min-side", "0",
                   "--common-tokens", "150")  # fmt: skip
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in (tmp_path / "kept/kept.jsonl").read_text().splitlines()]
    dataset = open_dataset(str(photos))
    pairs = sum(len(dataset[i].captions) for i in range(len(dataset)))
    stay = sum(len(row["captions"]) for row in kept)
    assert f"{stay} pairs stay" in done.stdout and "text of under 3 words" in done.stdout and 0 < stay < pairs
    for row in kept:
        sample = dataset[row["index"]]
        assert sample.key == row["key"] and set(row["captions"]) <= set(sample.captions)
        assert all(3 <= len(align.unigrams(caption)) <= 20 for caption in row["captions"])
    numbers = [int(line.split(": ")[1].split(" of ")[0]) for line in done.stdout.splitlines() if " of " in line and " pairs (" in line]
    assert sum(numbers) == pairs - stay
    subset = align.Kept(dataset, tmp_path / "kept/kept.jsonl")
    assert [subset[i].captions for i in range(len(subset))] == [row["captions"] for row in kept]
    (tmp_path / "other.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in (kept[0], kept[1] | {"key": "x.png"}, *kept[2:])))
    with pytest.raises(ValueError, match="--keep has the captions of x.png for "):  # a bad sample, which is counted
        align.Kept(dataset, tmp_path / "other.jsonl")[1]
    train_here("align", photos, tmp_path / "run", "--keep", str(tmp_path / "kept/kept.jsonl"), "--max-steps", "2", "--eval-every", "0")
    for change in ({"captions": "a dog"}, {"captions": [3]}, {"captions": None}, {"index": -3}, {"index": "1"}, {"index": 2**70},
                   {"key": 5}):  # fmt: skip
        wrong = [kept[0], kept[1] | change, *kept[2:]]
        (tmp_path / "wrong.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in wrong))
        with pytest.raises(UserError, match="wrong.jsonl cannot be read: line 2 lacks an index from 0 on, a key or a list of"):
            align.Kept(dataset, tmp_path / "wrong.jsonl")
    (tmp_path / "wrong.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in (kept[0], kept[1] | {"index": 99999}, kept[2])))
    with pytest.raises(UserError, match="wrong.jsonl names no picture of .*, see --filter-only"):
        align.Kept(dataset, tmp_path / "wrong.jsonl")
    with pytest.raises(UserError, match="--keep .*/nothing.jsonl cannot be read: .*No such file.*, see --filter-only"):
        align.Kept(dataset, tmp_path / "nothing.jsonl")
    other = make_photos(tmp_path / "other", train=9, val=4)
    (tmp_path / "empty.jsonl").write_text("\n")
    for data, kept, reason in ((other, tmp_path / "kept/kept.jsonl", "names no picture"), (photos, tmp_path / "empty.jsonl", "it is empty")):
        with pytest.raises(UserError, match=f"--keep .*{reason}.*, see --filter-only"):
            train_here("align", data, tmp_path / "run2", "--keep", str(kept))


def test_a_kept_image_takes_eight_bytes_of_memory(tmp_path):
    """Dicts would be half a kilobyte, and workers that only read them would copy them in time."""
    pictures, n = open_dataset("shapes"), 10_000
    two = [{"index": i, "key": pictures[i].key, "captions": [f"caption {i} of a picture"]} for i in (0, n - 1)]
    (tmp_path / "kept.jsonl").write_text("".join(f"{json.dumps(two[i == n - 1])}\n" for i in range(n)))
    tracemalloc.start()
    kept = align.Kept(pictures, tmp_path / "kept.jsonl")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept) == n and kept[5].captions == two[0]["captions"] and kept[n - 1].captions == two[1]["captions"]
    assert held < 9 * n + 200_000 and peak < 40 * n + 500_000


def test_filter_only_overwrites_nothing_and_says_what_it_could_not_read(server, tmp_path):
    folder = make_photos(tmp_path / "photos", train=6, val=2)
    (folder / "0.png").write_bytes(b"broken")
    flags = ["--filter-only", "--data", folder / "train.jsonl", "--min-side", "0", "--output-dir", tmp_path / "kept"]
    done = server.run("align.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "5 of 6 pictures read, compared with 0 of 0 test images" in done.stdout and not done.stderr
    (folder / "6.png").write_bytes(b"broken")  # one of two test images
    other = server.run("align.py", "--filter-only", "--data", folder, "--min-side", "0", "--output-dir", tmp_path / "second")
    assert "5 of 6 pictures read, compared with 1 of 2 test images" in other.stdout
    third = server.run("align.py", *flags[:-1], tmp_path / "third", "--eval-data", folder / "val.jsonl")
    assert "5 of 6 pictures read, compared with 1 of 2 test images" in third.stdout
    before = (tmp_path / "kept/kept.jsonl").read_bytes()
    done = server.run("align.py", *flags, env={"WORLD_SIZE": "2"})  # as torchrun says it
    assert "--filter-only is work for one process" in done.stderr and done.returncode == 2
    done = server.run("align.py", *flags, "--common-tokens", "3")
    assert done.returncode == 2 and "is there already" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "kept/kept.jsonl").read_bytes() == before
    done = server.run("align.py", *flags[:-1], tmp_path / "other", "--eval-data", tmp_path / "nowhere")
    assert done.returncode == 2 and "nowhere" in done.stderr and not (tmp_path / "other").exists()


def filtering(*flags):
    return align.parse_args(align.Args, align.RECIPES, ["--filter-only", *map(str, flags)])


def test_filter_only_refuses_before_it_reads(photos, tmp_path, monkeypatch):
    """A dataset may take hours, and what could be known before is said before; no folder is made."""
    monkeypatch.setattr(align, "open_dataset", None)
    (tmp_path / "file").write_text("")
    locked, access = tmp_path / "locked", os.access
    locked.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked and access(path, mode))  # a superuser may write anywhere
    for flags, sentence in ((["--keep", "kept.jsonl"], "--filter-only reads all of --data: leave --keep out"),
                            (["--output-dir", tmp_path / "file"], "/file cannot hold kept.jsonl: choose another --output-dir"),
                            (["--output-dir", tmp_path / "file/a/b"], "/file cannot hold kept.jsonl: choose another"),
                            (["--output-dir", locked / "a"], "/locked cannot hold kept.jsonl: choose another")):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            align.filter_data(filtering("--data", photos, *flags))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "locked"]


@pytest.mark.parametrize("dropped", range(1, 8))
def test_filter_only_shows_three_of_what_it_drops(dropped, tmp_path, capsys):
    lines = [f"{i}\tshort {i}" for i in range(dropped)] + ["9\tquite a good text"]
    (tmp_path / "texts.tsv").write_text("\n".join(lines) + "\n")
    align.filter_data(filtering("--data", tmp_path / "texts.tsv", "--output-dir", tmp_path / "out"))
    shown = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert len(set(shown)) == len(shown) == min(dropped, 3) and shown[0] == "short 0"


def test_help_says_which_flags_only_filter(capsys):
    with pytest.raises(SystemExit):
        align.parse_args(align.Args, align.RECIPES, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("--min-side INT", "--common-tokens INT"):
        assert f"{flag} --filter-only" in text


def test_filter_only_reads_texts_alone(server, tmp_path):
    lines = [f"{i}\tthe same words\u2028again" for i in range(11)] + ["11\tshort", "12\tquite a good text"]
    (tmp_path / "texts.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = server.run("align.py", "--filter-only", "--data", tmp_path / "texts.tsv", "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/kept.jsonl").read_text()) == {"index": 12, "key": "12", "captions": ["quite a good text"]}
    assert "text of over 10 images: 11 of 13 pairs" in done.stdout and "the same words" in done.stdout
    for name, text in (("nothing.jsonl", '{"image": "0.png", "captions": []}\n'), ("spaces.tsv", "0 a dog runs\n"), ("empty.tsv", "")):
        (tmp_path / name).write_text(text)
        done = server.run("align.py", "--filter-only", "--data", tmp_path / name, "--output-dir", tmp_path / "none")
        assert done.returncode == 2 and "no captions" in done.stderr and not (tmp_path / "none").exists()


# ------------------------------------------------ noise ------------------------------------------------
def test_noisy_data_and_what_the_filters_see_of_it(photos, tmp_path, monkeypatch, capsys):
    """benchmarks/noise.py: swapped captions pass the filters, junk is dropped, and nobody keeps a wrong one by chance."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    noise = importlib.import_module("noise")
    (tmp_path / "texts.tsv").write_text("".join(f"{i}\tforeign words number {i}\n" for i in range(99)))
    right, found = open_dataset(str(photos)), {}
    for kind in ("swap", "junk", "junk again"):
        flags = ["--kind", kind[:4], "--share", "0.5", "--texts", str(tmp_path / "texts.tsv"), "--output", str(tmp_path / kind)]
        monkeypatch.setattr(sys, "argv", ["noise.py", "--data", str(photos), *flags])
        noise.main()
        found[kind] = noisy = open_dataset(str(tmp_path / kind))
        assert len(noisy) == len(right) == 52
        wrong = [i for i in range(52) if noisy[i].captions != right[i].captions]
        assert len(wrong) == 26 == sum("clean" not in noisy[i].key for i in range(52))
        assert all(noisy[i].image == right[i].image and len(noisy[i].captions) == len(right[i].captions) for i in range(52))
        assert all(("clean" in noisy[i].key) == (i not in wrong) for i in range(52))
    swapped = [found["swap"][i].captions for i in range(52)]
    assert sorted(swapped) == sorted(right[i].captions for i in range(52))
    assert [found["junk"][i] for i in range(52)] == [found["junk again"][i] for i in range(52)]
    kept = {}
    for kind in ("swap", "junk"):
        pictures = list(align.read_pictures(found[kind]))
        rules = align.filter_rules(pictures, min_side=0)
        kept[kind] = collections.Counter(p.key.split("-")[-1] for p in pictures for c in p.captions if not dropped_by(rules, p, c))
    assert kept["swap"]["swap.jpg"] > 60 and kept["junk"]["short.jpg"] == 0 and kept["junk"]["foreign.jpg"] > 20
    with pytest.raises(UserError, match="--texts"):
        noise.wrong_captions(right, 52, "junk", 1.0, texts=["one", "two"])


# ------------------------------------------------ any language ------------------------------------------------
CAPTIONS = ["강아지가 풀밭에서 뛰고 있다", "犬が草の上を走っている", "كلب يركض على العشب الأخضر", "🐕 🌱 a dog 👍🏽 runs 🏃"]


def test_any_script_from_captions_to_retrieval(server, tmp_path):
    """Trains, evaluates and opens again a model on captions in Korean, Japanese, Arabic and emoji."""
    folder = make_photos(tmp_path / "photos")
    for split in ("train", "val"):
        table = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        texts = [json.dumps(row | {"captions": [f"{CAPTIONS[i % 4]} {i}"]}, ensure_ascii=False) for i, row in enumerate(table)]
        (folder / f"{split}.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    train_here("align", folder, tmp_path / "run", "--max-steps", "2")
    assert any("recall@1" in row for row in rows(tmp_path / "run"))
    net = open_network(tmp_path / "run", torch.device("cpu"))
    for caption in CAPTIONS:
        assert net.tokenizer.bpe.decode(net.tokenizer.encode(caption)).replace(" ", "") == caption.replace(" ", "")
    ids = [tuple(net.tokenizer(caption)) for caption in CAPTIONS]
    assert len(set(ids)) == 4
    done = server.run("align.py", "--filter-only", "--data", folder, "--output-dir", tmp_path / "kept", "--min-side", "0")
    assert done.returncode == 0 and CAPTIONS[0] in (tmp_path / "kept/kept.jsonl").read_text(encoding="utf-8")


def test_word_pieces_of_bert(photos, tmp_path):
    """A tokenizer.json of BERT's kind: [CLS] in front, [SEP] behind, [PAD] is 0 and masked."""
    from tokenizers import BertWordPieceTokenizer

    bert = BertWordPieceTokenizer()
    bert.train_from_iterator(["a red star", "two green squares on the left", *CAPTIONS] * 3, vocab_size=400, show_progress=False)
    bert.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(str(tmp_path / "tokenizer.json"), 24)
    ids = tokenizer("a red star")
    assert bert.id_to_token(ids[0]) == "[CLS]" and bert.id_to_token(ids[-1]) == "[SEP]" and bert.token_to_id("[PAD]") == 0
    train_here("align", photos, tmp_path / "run", "--tokenizer", str(tmp_path / "tokenizer.json"), "--max-steps", "2")
    net = open_network(tmp_path / "run", torch.device("cpu"))
    short, padded = torch.tensor([ids]), torch.tensor([ids + [0] * (16 - len(ids))])
    with torch.no_grad():
        close(net.model.eval().encode_text(short), net.model.encode_text(padded), atol=1e-5)


def test_without_warm_up_the_first_step_has_the_full_rate(photos, tmp_path):
    train_here("align", photos, tmp_path / "run", "--warmup-epochs", "0", "--max-steps", "1", "--lr", "0.002", "--eval-every", "0")
    assert rows(tmp_path / "run")[0]["lr"] == pytest.approx(0.002)


# ------------------------------------------------ errors, paste ------------------------------------------------
@pytest.mark.parametrize("flags, word", [
    (["--bn-group", "1"], "--bn-group 1 leaves batch norm nothing to average"), (["--accum-steps", "2"], "add --bn-group 16"), (["--bn-group", "3"], "--bn-group 3 do not fit in the 8 samples"),
    (["--bn-group", "4", "--accum-steps", "4"], "--accum-steps 4 pieces of whole"), (["--bn-group", "0", "--accum-steps", "3"], "--accum-steps"),
    (["--arch", "resnet50"], "--arch"), (["--text-width", "65"], "--text-width"),
    (["--keep", "/nothing"], "--keep")])  # fmt: skip
def test_what_the_user_can_mend_is_one_sentence(photos, tmp_path, flags, word):
    with pytest.raises(UserError, match=word) as error:
        train_here("align", photos, tmp_path / "run", *flags)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_loader_gives_the_same_draws_to_any_number_of_workers(photos):
    dataset = open_dataset(str(photos))
    batches = [next(Loader(dataset, {"image": align.AlignView(32)}, {}, 8, workers=n).batches(0, 1))[1] for n in (0, 2)]
    assert torch.equal(batches[0]["image"], batches[1]["image"])
    for a, b in zip(*(batch["params"]["image"].values() for batch in batches), strict=True):
        assert torch.equal(a, b)


def test_paste():
    image, text = torch.randn(4, 3, 64, 64), torch.randint(1, 40, (4, 8))
    space = cut(["ALIGN", "EfficientNet", "BERT", "LAMB"], file="align.py")
    model = space["ALIGN"](16, space["EfficientNet"](0.5, 0.5), space["BERT"](8, 40, 64, 1), 64)
    backward(*model(image, text, torch.rand(4, 64)))
    space["LAMB"](model.parameters(), lr=0.1).step()
    loss = cut(["align_loss"], ["all_gather"], file="align.py")["align_loss"]
    loss(torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), 0.1).backward()
    view = cut(["AlignView"], allowed_data=["hflip", "normalize", "to_float"], file="align.py")["AlignView"](32)
    crop = view.crop(torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8), random.Random(0))
    assert view(crop[None], {"flip": torch.tensor([True])}).shape == (1, 3, 32, 32)
