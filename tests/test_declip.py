"""declip.py: golden numbers of the official code, text augmentation and masks, the queue, the mask token, layout."""

import json
import math
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import clip
import declip
from command import main
from common import UserError, warmup_cosine
from data import Tokenizer
from evaluation.language import queued_ids
from evaluation.weights import load_released, open_network
from run import load_checkpoint
from runs import FLAGS, make_photos, rows, train_here
from synonyms import synonyms_checksum, wordnet
from test_golden import close, close_grad, golden, leaves
from test_resume import assert_same_run
from test_structure import backward, cut

CAPTIONS = ["a red star on the left of a blue circle", "two green squares", "one small dog and a large cat"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def plain():
    return Tokenizer("train", context_length=24, captions=iter(CAPTIONS * 4), vocab_size=600)


@pytest.fixture(scope="module")
def tokenizer(plain):
    return declip.add_mask_token(plain)


# ------------------------------------------------ golden ------------------------------------------------
def test_info_nce_and_queue():
    x, y, _ = golden("declip_itc_0")
    image1, image2, text, text_aug, scale = leaves(*(x[k] for k in ("image1", "image2", "text", "text_aug", "logit_scale")))
    queue = declip.TextQueue(32, 16)
    queue.features.copy_(x["bank"].T)
    nearest = [queue.nearest(t) for t in (text, text_aug)]
    for ours, key in zip(nearest, ("nn_text", "nn_text_aug")):
        close(ours, y[key])
    to_text, to_image = declip.info_nce([image1, image2], [text, text_aug, *nearest], scale)
    both = (to_text + to_image) / 2
    for i, j, key in ((0, 0, "image1_text"), (0, 1, "image1_text_aug"), (1, 0, "image2_text"), (1, 1, "image2_text_aug")):
        close(both[i, j], y["terms"][key])
    close(both[:, :2].mean(), y["clip_loss"])
    close(to_text[:, 2:].mean(), y["nn_text_loss"])
    for i, key in enumerate(("nn_loss_image1", "nn_loss_image2")):
        close(to_text[i, 2:].mean(), y[key])
    names = {"image1": image1, "image2": image2, "text": text, "text_aug": text_aug, "logit_scale": scale}
    for loss, grads in ((both[:, :2].mean(), y["grads_clip"]), (to_text[:, 2:].mean(), y["grads_nn"])):
        for tensor in names.values():
            tensor.grad = None
        loss.backward(retain_graph=True)
        for key, grad in grads.items():
            close_grad(names[key].grad, grad)
    assert not text.grad.any() and not text_aug.grad.any()  # none through the neighbours
    for t in (text_aug, text):
        queue.enqueue(F.normalize(t.detach(), dim=-1))
    close(queue.features.T, y["bank_after"])
    assert queue.place == y["ptr_after"]


@pytest.mark.parametrize("case, most", [(0, 6), (1, 1)])
def test_queue_order(case, most):
    """Case 1 has 10 places for 8 entries a step: the official code drops what does not fit, here it goes round."""
    x, y, args = golden(f"declip_nnbank_{case}")
    queue = declip.TextQueue(args["size"], args["D"])
    queue.features.copy_(x["bank0"].T)
    for text, text_aug, after in list(zip(x["text"], x["text_aug"], y["steps"], strict=True))[:most]:
        close(F.normalize(queue.nearest(text), dim=-1), after["nn_of_text"])
        close(F.normalize(queue.nearest(text_aug), dim=-1), after["nn_of_text_aug"])
        queue.enqueue(F.normalize(text_aug, dim=-1))
        queue.enqueue(F.normalize(text, dim=-1))
        close(queue.features.T, after["bank_after"])
        assert queue.place == after["ptr_after"]


def test_queue_is_first_in_first_out():
    queue, seen = declip.TextQueue(10, 4), []
    for step in range(7):
        new = F.normalize(torch.randn(4, 4), dim=-1)
        queue.enqueue(new)
        seen.append(new)
        held = torch.cat(seen)[-10:]
        assert all((queue.features == row).all(1).sum() == 1 for row in held), step
    text = torch.randn(5, 4)
    best = [max(queue.features, key=lambda entry: F.cosine_similarity(entry, t, dim=0).item()) for t in text]
    assert torch.equal(queue.nearest(3 * text), torch.stack(best))
    assert set(queue.state_dict()) == {"features", "place"}


def test_simsiam_loss():
    x, y, _ = golden("declip_simsiam_0")
    p1, z1, p2, z2 = leaves(*(x[k] for k in ("p1", "z1", "p2", "z2")))
    loss = declip.simsiam_loss(p1, p2, z1, z2)
    loss.backward()
    close(loss, y["loss"])
    close_grad(p1.grad, y["grad_p1"])
    close_grad(p2.grad, y["grad_p2"])
    assert z1.grad is None and z2.grad is None


def test_schedule():
    _, y, args = golden("declip_lr_schedule")
    peak, total = args["warmup_lr"], args["max_iter"]
    ours = [warmup_cosine(step, total - 1, args["warmup_steps"] - 1, peak, args["base_lr"]) for step in range(total)]
    call = " ".join(Path(declip.__file__).read_text().split())
    assert "warmup = max(0, round(args.warmup_epochs * loader.steps_per_epoch) - 1)" in call
    assert "step, run.total - 1, warmup, args.lr, start=args.lr / 10, end=args.min_lr )" in call  # as train() has it
    close(ours, y["lr"], rtol=1e-6, atol=1e-9)


def tiny_model(x, args):
    visual = declip.VisionTransformer(32, 8, args["width"], args["layers"], args["embed_dim"])
    text = declip.TextTransformer(args["context"], args["vocab"], 64, args["layers"], args["embed_dim"])
    for encoder, width in ((visual, args["width"]), (text, 64)):
        for block in encoder.transformer.resblocks:
            block.attn.num_heads, block.attn.head_dim = args["heads"], width // args["heads"]
    model = declip.DeCLIP(args["embed_dim"], visual, text, ssl_dim=32)
    model.load_state_dict(x["state_dict"], strict=True)
    return model


def test_model_and_objective_of_the_released_code():
    x, y, args = golden("declip_model")
    model = tiny_model(x, args).train()
    queue = declip.TextQueue(args["nn_size"], args["embed_dim"])
    queue.features.copy_(x["bank0"].T)
    labels = torch.where(x["mlm_labels"] >= 0, x["mlm_labels"], -100)
    labels = labels.flatten()
    chosen = (labels != -100).nonzero().squeeze(1)
    inputs = x["images"][:, :3], x["images"][:, 3:], None, x["aug_ids"], x["masked_ids"], chosen
    images, texts, p, z, logits = model(*inputs)
    unit = [F.normalize(image, dim=-1) for image in images]
    for ours, key in zip((*unit, *p, *z), ("image_features_1", "image_features_2", "p1", "p2", "z1", "z2")):
        close(ours, y[key], atol=1e-4 if key[0] in "pz" else 1e-5)
    close(F.normalize(texts[0], dim=-1), F.normalize(y["text_features"], dim=-1), atol=1e-5)
    nearest = [queue.nearest(t) for t in texts]
    to_text, to_image = declip.info_nce(images, [*texts, *nearest], model.logit_scale.exp())
    both = (to_text + to_image) / 2
    clip_loss, nns, iss = both[:, :2].mean(), to_text[:, 2:].mean(), declip.simsiam_loss(*p, *z)
    tss = declip.mlm_loss(logits, labels[chosen])
    for ours, key in ((clip_loss, "clip_loss"), (nns, "nn_text_loss"), (iss, "simsiam_loss"), (tss, "mlm_loss")):
        close(ours, y[key])
    loss = 0.4 * clip_loss + 0.2 * (nns + iss + tss)
    close(loss, y["loss"])
    loss.backward()
    params = dict(model.named_parameters())
    for key, grad in y["grads"].items():  # batch norm over 6 samples amplifies rounding
        close(params[key].grad, grad, rtol=0, atol=1.5e-4 * float(grad.abs().max()))
    for t in reversed(texts):
        queue.enqueue(F.normalize(t.detach(), dim=-1))
    close(queue.features.T, y["bank_after"], atol=1e-5)
    assert queue.place == y["ptr_after"]
    with torch.no_grad():  # without masks T is that of the caption as it is
        unmasked = model(*inputs[:2], x["aug_ids"], *inputs[3:])[1]
    close(unmasked[0], unmasked[1])


def test_two_processes_as_the_released_code(server, tmp_path):
    """Its losses are divided by the number of processes and its gradients summed: ours are twice them, then averaged."""
    server.together("tests/test_declip.py", tmp_path)
    for rank in (0, 1):
        loss, *grads = json.loads((tmp_path / f"{rank}.json").read_text())
        y = golden("dist2_declip_clip")[1][f"rank{rank}"]
        close(loss, 2 * y["loss"])
        for grad, key in zip(grads, ("image_embed", "text_embed", "logit_scale"), strict=True):
            close_grad(torch.tensor(grad), 2 * y[f"grad_{key}"])


# ------------------------------------------------ released checkpoints ------------------------------------------------
def released_names(arch):
    """Names and shapes in the published files, from the tower of clip.py (golden there) and the code's other modules."""
    embed_dim = 3072 if arch == "vit_base_patch32" else 1024
    with torch.device("meta"):
        tower = clip.build_model(clip.Args(arch=arch, embed_dim=embed_dim))
    names = {k: v.shape for k, v in tower.state_dict().items() if k.startswith("visual.")}
    for key in ("positional_embedding", "ln_final.weight", "ln_final.bias"):
        names[f"encode_text.{key}"] = tower.state_dict()[key].shape
    names |= {f"encode_text.{k}": v.shape for k, v in tower.state_dict().items() if k.startswith("transformer.")}
    names |= {"encode_text.token_embedding.weight": (49409, 512), "encode_text.text_projection.weight": (embed_dim, 512),
              "encode_text.text_projection.bias": (embed_dim,), "logit_scale": (1,)}  # fmt: skip
    names |= {"text_label_predictor.weight": (49409, 512), "text_label_predictor.bias": (49409,)}
    if arch == "resnet50":
        names |= {"visual.fc.weight": (1024, 2048), "visual.fc.bias": (1024,)}
    linears = {"projector.linear1": (1024, embed_dim), "projector.linear2": (1024, 1024), "projector.linear3": (1024, 1024),
               "predictor.linear1": (512, 1024), "predictor.layer2": (1024, 512)}  # fmt: skip
    for name, shape in linears.items():
        names |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, size in {"projector.bn1": 1024, "projector.bn2": 1024, "projector.bn3": 1024, "predictor.bn1": 512}.items():
        names |= {f"{name}.{k}": (size,) for k in ("weight", "bias", "running_mean", "running_var")}
        names[f"{name}.num_batches_tracked"] = ()
    return names, embed_dim


@pytest.mark.parametrize("arch", ["vit_base_patch32", "resnet50"])
def test_names_and_shapes_are_those_of_the_published_files(arch):
    expected, embed_dim = released_names(arch)
    with torch.device("meta"):
        model = declip.build_model(declip.Args(arch=arch, embed_dim=embed_dim))
    ours = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert ours == {name: tuple(shape) for name, shape in expected.items()}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} <= {"visual.fc.weight", "visual.fc.bias"}


@pytest.mark.parametrize("arch", ["vit_micro_patch16", "resnet50"])
def test_released_file_loads(arch, tmp_path):
    """A file as the official trainer writes it, names with `module.`; also in evaluate.py's error a sentence."""
    args = declip.Args(arch=arch, image_size=64, text_width=64, text_layers=2, vocab_size=70, embed_dim=24, ssl_dim=32)
    torch.manual_seed(0)
    model = declip.build_model(args)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": state, "optimizer": {}, "last_iter": 7}, tmp_path / "released.pth.tar")
    module, loaded = load_released(tmp_path / "released.pth.tar")
    assert module is declip
    x, ids = torch.randn(2, 3, 64, 64), torch.randint(1, 70, (2, 9))
    for net in (model.eval(), loaded.eval()):
        net.requires_grad_(False)
    assert torch.equal(model.encode_image(x), loaded.encode_image(x)) and torch.equal(model.encode_text(ids), loaded.encode_text(ids))
    del state["module.projector.bn1.bias"]
    torch.save({"model": state}, tmp_path / "cut.pth.tar")
    with pytest.raises(UserError, match="does not hold a CLIP"):
        load_released(tmp_path / "cut.pth.tar")


def test_resnet_is_clips():
    """Its own is made of torchvision's: the same names (golden in test_golden.py) give the same features and gradients."""
    torch.manual_seed(0)
    theirs, ours = clip.ModifiedResNet(64, (2, 1, 1, 2), 64, 32, 24), declip.ModifiedResNet(64, (2, 1, 1, 2), 24)
    for name, p in theirs.named_parameters():  # initialised alike; what is zero or one is so in both
        q = dict(ours.named_parameters())[name]
        assert q.std().item() == pytest.approx(p.std().item(), rel=0.1 if p.numel() > 2000 else 0.5, abs=1e-6), name
    for name, p in theirs.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.constant_(p, 0.5)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    x = torch.randn(3, 3, 64, 64)
    for train in (True, False):
        a, b = (net.train(train)(x) for net in (theirs, ours))
        close(a, b, atol=1e-5)
    for net in (theirs, ours):
        net.train()(x).square().sum().backward()
    grads = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        close(grads[name].grad, p.grad, rtol=1e-4, atol=1e-4 * float(p.grad.abs().max()))


def test_initialisation_of_the_vit_is_the_text_encoders():
    torch.manual_seed(0)
    args = declip.Args(arch="vit_base_patch32", image_size=64, vocab_size=600, text_layers=2, text_width=128)
    model = declip.build_model(args)
    block = model.visual.transformer.resblocks[0]
    for p, std in ((block.attn.in_proj_weight, 768**-0.5), (block.mlp.c_fc.weight, 1536**-0.5),
                   (block.mlp.c_proj.weight, 768**-0.5 * 24**-0.5), (model.visual.positional_embedding, 0.01),
                   (model.encode_text.text_projection.weight, 128**-0.5), (model.encode_text.token_embedding.weight, 0.02)):  # fmt: skip
        assert p.std().item() == pytest.approx(std, rel=0.05)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


# ------------------------------------------------ texts ------------------------------------------------
def test_mask_token(plain, tokenizer):
    assert (tokenizer.sot, tokenizer.eot) == (plain.sot + 1, plain.eot + 1) and tokenizer.vocab_size == plain.vocab_size + 1
    assert tokenizer.bpe.id_to_token(plain.sot) == "<|mask|>" and tokenizer.context_length == plain.context_length
    for caption in (*CAPTIONS, "<|mask|> 7 stars", "Zürich 😀", ""):
        expected = [i + (i >= plain.sot) for i in plain(caption)]
        assert tokenizer(caption) == expected and plain.sot not in tokenizer(caption)
    again = Tokenizer(tokenizer.to_json(), 24)  # as evaluate.py opens it
    assert again(CAPTIONS[0]) == tokenizer(CAPTIONS[0]) and again.eot == tokenizer.eot
    assert tokenizer.sot - 1 == plain.sot  # the mask, for masked_text
    bert = re.sub(r"<\|startoftext\|>", "[SEP]", re.sub(r"<\|endoftext\|>", "[CLS]", plain.to_json()))
    with pytest.raises(UserError, match="--tokenizer"):
        declip.add_mask_token(Tokenizer(bert, 24))
    model = tokenizers.models.WordPiece({"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "a": 3}, unk_token="[UNK]")
    first = tokenizers.Tokenizer(model)  # the start has id 0
    with pytest.raises(UserError, match="the last two ids of --tokenizer are not its start and end tokens"):
        declip.add_mask_token(Tokenizer(first.to_str(), 24))


def test_mask_token_of_the_published_vocabulary():
    pytest.importorskip("open_clip", reason="the published merges come with the open_clip package")
    tokenizer = declip.add_mask_token(Tokenizer("clip", data_dir="/nonexistent"))
    assert (tokenizer.sot - 1, tokenizer.sot, tokenizer.eot, tokenizer.vocab_size) == (49406, 49407, 49408, 49409)
    assert tokenizer("a dog") == [49407, 320, 1929, 49408]


@pytest.mark.parametrize("any_id", [False, True])
def test_masks_have_the_statistics_of_the_released_code(any_id, tokenizer):
    x, y, _ = golden("declip_mask_tokens")
    assert len(x["tokens"]) == 4002 and y["first_last_untouched"]
    caption = CAPTIONS[0] + " " + CAPTIONS[2]
    ids, mask = tokenizer(caption), tokenizer.sot - 1
    total, kinds, random_ids = 0, {"mask": 0, "same": 0, "other": 0}, set()
    for seed in range(4000):
        out, labels = declip.masked_text(tokenizer, any_id, caption, random.Random(seed))
        assert (out, labels) == declip.masked_text(tokenizer, any_id, caption, random.Random(seed))
        assert len(out) == len(labels) == len(ids) and labels[0] == labels[-1] == -100
        assert (out[0], out[-1]) == (tokenizer.sot, tokenizer.eot)
        row = declip.masked_row(tokenizer, any_id, caption, random.Random(seed))
        assert len(row) == 48 and row[: len(ids)] == out and row[24 : 24 + len(ids)] == labels
        assert not any(row[len(ids) : 24]) and set(row[24 + len(ids) :]) <= {-100}
        for a, b, label in list(zip(ids, out, labels))[1:-1]:
            total += 1
            if label == -100:
                assert a == b
                continue
            assert label == a  # the token to be predicted is the one that stood there
            kinds["mask" if b == mask else "same" if b == a else "other"] += 1
            random_ids.add(b)
    chosen, n = sum(kinds.values()), len(x["tokens"]) - 2

    def close_share(ours, theirs, count):  # within four standard deviations of the smaller sample
        assert abs(ours - theirs) < 4 * (theirs * (1 - theirs) / count) ** 0.5, (ours, theirs)

    close_share(chosen / total, y["frac_selected"], n)
    close_share(kinds["mask"] / chosen, y["frac_mask"], 0.15 * n)
    close_share(kinds["same"] / chosen, y["frac_same"], 0.15 * n)
    assert kinds["other"] / chosen == pytest.approx(0.1, abs=0.01)
    assert (max(random_ids) > mask) == any_id  # a false end token: only as released
    assert min(random_ids) >= 0


def test_augmentation_is_eda(tokenizer):
    synonyms = {"dog": ["hound", "canine friend"], "red": ["crimson"]}
    def augment(caption, seed, synonyms=synonyms):  # str stands for a tokenizer: the words as they are
        return declip.augmented_text(str, synonyms, caption, random.Random(seed))

    caption = "Red dog and one red dog run"
    swapped, deleted, replaced = set(), 0, set()
    for seed in range(3000):
        out = augment(caption, seed)
        assert out == augment(caption, seed)
        a, b = caption.split(), out.split()
        if sorted(a) == sorted(b):
            swapped.add(sum(x != y for x, y in zip(a, b)))
        elif set(b) <= set(a):
            deleted += len(a) - len(b)
            words = iter(a)
            assert all(word in words for word in b)  # in their order
        else:
            replaced.add(out)
    assert swapped <= {0, 2} and 2 in swapped
    assert deleted / 1000 == pytest.approx(0.1 * 7, rel=0.15)  # a third of the captions, seven words each
    assert replaced == {"crimson dog and one red dog run", "Red hound and one red hound run", "Red dog and one crimson dog run",
                        "Red canine friend and one red canine friend run"}  # fmt: skip
    for caption in ("", "dog", "  dog "):
        assert augment(caption, 0) == caption.strip()
    assert declip.augmented_text(tokenizer, None, "dog", random.Random(0)) == tokenizer("dog")
    for seed in range(200):  # at least one word stays, and without synonyms no word is new
        out = augment("a dog", seed, None)
        assert out and set(out.split()) <= {"a", "dog"}


def test_synonyms_from_a_file(tmp_path, tokenizer):
    file = tmp_path / "synonyms.txt"
    file.write_text("Dog, hound, canine friend\n\nred,crimson\n")
    synonyms = declip.open_synonyms(str(file))
    assert synonyms == {"dog": ["hound", "canine friend"], "red": ["crimson"]}
    outputs = {declip.augmented_text(str, synonyms, "a red dog", random.Random(seed)) for seed in range(99)}
    assert {"a crimson dog", "a red hound"} <= outputs
    with pytest.raises(UserError, match="--synonyms"):
        declip.open_synonyms(str(tmp_path / "nothing"))


WORDNET = {  # of a few words, in its own format
    "noun": "00000028 05 n 02 dog 0 domestic_dog 0 001 ~ 00000099 n 0000 | an animal  \n"
            "00000099 05 n 02 Inch 0 in 0 000 | a length  \n00000150 05 n 01 star 0 000 | a thing  \n",
    "verb": "00000028 30 v 03 chase 0 tag 0 dog 1 000 00 | go after  \n",
    "adj": "00000028 00 s 02 red(p) 0 crimson(a) 1 000 | a colour  \n",
    "adv": "",
}  # fmt: skip


def write_wordnet(folder):
    folder.mkdir(parents=True)
    for part, text in WORDNET.items():
        (folder / f"data.{part}").write_text("  1 a line of its licence  \n" + text)


def test_synonyms_from_debians_wordnet(tmp_path):
    """The package wordnet-base; no nltk is needed."""
    write_wordnet(tmp_path / "wordnet")
    synonyms = wordnet(tmp_path / "wordnet")
    assert synonyms["dog"] == ["chase", "domestic dog", "tag"] and synonyms["red"] == ["crimson"] and "in" not in synonyms


def test_synonyms_from_wordnet(tmp_path, monkeypatch):
    """Found by nltk itself, as a folder and as the zip that it downloads."""
    nltk = pytest.importorskip("nltk", reason="nltk is optional")
    for root in ("folder", "zip"):
        write_wordnet(tmp_path / root / "corpora" / "wordnet")
    shutil.make_archive(str(tmp_path / "zip/corpora/wordnet"), "zip", tmp_path / "zip/corpora", "wordnet")
    shutil.rmtree(tmp_path / "zip/corpora/wordnet")
    for root in ("folder", "zip"):
        monkeypatch.setattr(nltk.data, "path", [str(tmp_path / root)])
        synonyms = declip.open_synonyms()
        assert synonyms["dog"] == ["chase", "domestic dog", "tag"] and synonyms["domestic dog"] == ["dog"]
        assert synonyms["red"] == ["crimson"] and synonyms["inch"] == ["in"]
        assert not synonyms.get("in") and not synonyms["star"] and "cat" not in synonyms
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    assert declip.open_synonyms() is None


def test_without_wordnet_the_log_says_so_once(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nltk", None)
    assert declip.open_synonyms() is None
    train_here("declip", photos, tmp_path / "a", "--max-steps", "2", "--eval-every", "0")
    assert capsys.readouterr().out.count("no WordNet") == 1
    file = tmp_path / "synonyms.txt"
    file.write_text("red, crimson\n")
    train_here("declip", photos, tmp_path / "b", "--max-steps", "2", "--eval-every", "0", "--synonyms", str(file))
    assert "WordNet" not in capsys.readouterr().out


def test_other_synonyms_do_not_continue_a_run(server, photos, tmp_path):
    """Another machine may have another WordNet, or none, under the same arguments."""
    file, flags = tmp_path / "synonyms.txt", ["--eval-every", "0", "--synonyms", str(tmp_path / "synonyms.txt"), "--max-steps"]
    file.write_text("red, crimson\n")
    train_here("declip", photos, tmp_path / "run", *flags, "1")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert json.loads(before["synonyms.json"])["words"] == 1
    done = server.run("benchmarks/record.py", tmp_path / "run", "--name", "mine", "--out", tmp_path / "records")
    recorded = json.loads((tmp_path / "records/mine.json").read_text())
    assert done.returncode == 0 and recorded["synonyms"] == json.loads(before["synonyms.json"])
    file.write_text("red, crimson, ruby\n")
    with pytest.raises(UserError, match=r"checkpoint.pt does not have this run's synonyms: bring back"):
        train_here("declip", photos, tmp_path / "run", *flags, "2")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    file.write_text("red,  CRIMSON\n")  # the same ones
    train_here("declip", photos, tmp_path / "run", *flags, "2")
    texts = {synonyms_checksum(table) for table in (None, {}, {"red": ["crimson"]}, {"red": ["ruby"]}, {"crimson": ["red"]})}
    assert len(texts) == 5


def test_processes_must_have_the_same_synonyms(server, tmp_path):
    """Each opens its own; where they differ all of them say so."""
    server.together("tests/test_declip.py", tmp_path, "synonyms")
    first, second = ((tmp_path / f"synonyms{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert first == second and len(first) == 2
    assert "differ" not in first[0] and first[1] == "processes differ in their synonyms: give all the same --synonyms"


# ------------------------------------------------ runs ------------------------------------------------
def test_without_a_warm_up_the_first_step_has_the_peak_rate(photos, tmp_path):
    flags = ["--warmup-epochs", "0", "--lr", "2e-4", "--max-steps", "1", "--eval-every", "0"]
    train_here("declip", photos, tmp_path / "run", *flags)
    assert [row["lr"] for row in rows(tmp_path / "run") if "lr" in row] == [pytest.approx(2e-4, rel=1e-6)]


def test_queue_is_global_and_survives(server, photos, tmp_path):
    """On two processes it is that of one; three and four steps there are seven, and it is full after five."""
    flags = ["--eval-every", "0", "--queue-size", "40", "--max-steps"]
    jobs = [("declip", str(photos), str(tmp_path / "two"), [*flags, "7"], False),
            ("declip", str(photos), str(tmp_path / "parts"), [*flags, "3"], False),
            ("declip", str(photos), str(tmp_path / "parts"), [*flags, "7"], False)]  # fmt: skip
    server.together("tests/runs.py", json.dumps(jobs))
    assert_same_run(tmp_path / "two", tmp_path / "parts")
    train_here("declip", photos, tmp_path / "one", *flags, "7")
    one, two = (load_checkpoint(tmp_path / d)["queue"] for d in ("one", "two"))
    assert one["place"] == two["place"] == 56 % 40
    torch.testing.assert_close(one["features"], two["features"], rtol=1e-3, atol=1e-4)


def test_captions_of_the_queue_are_found_again(server, photos, tmp_path, capsys):
    """evaluate.py neighbors --queue knows whose feature is where: with weights that stand still they are the captions' features."""
    train_here("declip", photos, tmp_path / "run", *"--max-steps 9 --eval-every 0 --queue-size 64 --lr 1e-9".split())
    saved, net = load_checkpoint(tmp_path / "run"), open_network(tmp_path / "run", torch.device("cpu"))
    with pytest.raises(UserError, match="has changed: which captions are in the queue of the run is not known"):
        queued_ids(saved | {"data": [saved["data"][0], "0"]}, net.tokenizer, "")
    ids = queued_ids(saved, net.tokenizer, "")
    assert sorted(ids) == list(range(64))  # 72 went in
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids.values()], batch_first=True)
    with torch.no_grad():  # of the ids, not of their text: a caption that was cut within a word is read otherwise
        ours = F.normalize(net.model.eval().encode_text(padded), dim=-1)
    torch.testing.assert_close(ours, saved["queue"]["features"][list(ids)], rtol=1e-4, atol=1e-5)
    flags = ["--queue", "--images", "3", "--device", "cpu", "--workers", "0", "--out", str(tmp_path)]
    main(["neighbors", str(tmp_path / "run"), "--data", str(photos), *flags])
    lines = capsys.readouterr().out.splitlines()
    assert Image.open(tmp_path / f"run_neighbors_{photos.stem}.png").width > 100
    pairs = [line for line in lines if "  ->  " in line]
    done = server.together("evaluate.py", "neighbors", tmp_path / "run", "--data", photos, *flags)
    assert [line for line in done.stdout.splitlines() if "  ->  " in line] == pairs
    assert len(pairs) == 3 and all(-1 <= float(line.split("(")[-1][:-1]) <= 1 for line in pairs)


def test_released_behaviour(photos, tmp_path, monkeypatch):
    texts, original = [], declip.DeCLIP.forward
    monkeypatch.setattr(declip.DeCLIP, "forward", lambda self, *inputs: texts.append(inputs[2]) or original(self, *inputs))
    for name, flags in (("paper", []), ("released", ["--released"])):
        train_here("declip", photos, tmp_path / name, "--max-steps", "3", "--eval-every", "0", *flags)
    assert [text is None for text in texts] == [False] * 3 + [True] * 3
    paper, released = (load_checkpoint(tmp_path / name) for name in ("paper", "released"))
    assert paper["queue"]["place"] == 24 and released["queue"]["place"] == 48
    assert released["model"]["logit_scale"].item() >= 3 > paper["model"]["logit_scale"].item()
    torch.manual_seed(0)
    conv = declip.build_model(declip.parse_args(declip.Args, {}, FLAGS["declip"])).visual.conv1.weight
    assert torch.equal(released["model"]["visual.conv1.weight"], conv)
    assert not torch.equal(paper["model"]["visual.conv1.weight"], conv)
    row = rows(tmp_path / "released")[0]
    parts = 0.1 * (row["clip_loss"] + row["mvs_loss"]) + 0.2 * (row["nns_loss"] + row["iss_loss"] + row["tss_loss"])
    assert row["loss"] == pytest.approx(parts, rel=1e-5)
    row = rows(tmp_path / "paper")[0]
    parts = 0.4 * row["clip_loss"] + 0.2 * (row["mvs_loss"] + row["nns_loss"] + row["iss_loss"] + row["tss_loss"])
    assert row["loss"] == pytest.approx(parts, rel=1e-5)
    assert row["chance"] == pytest.approx((0.4 + 0.6 + 0.2) * math.log(8) + 0.2 * math.log(600))


def test_mlm_loss_without_masked_tokens():
    logits = torch.randn(0, 7, requires_grad=True)
    loss = declip.mlm_loss(logits, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("flags, word", [
    (["--accum-steps", "2"], "--accum-steps is not implemented: batch norm would see one piece, use 1"), (["--queue-size", "7"], "--queue-size"),
    (["--vocab-size", "514"], "--vocab-size must be at least 515, with the tokenizer's mask token"),
    (["--queue-size", "15", "--released"], "--queue-size"), (["--synonyms", "/nothing"], "--synonyms"),
    (["--ssl-weight", "0.7"], "--ssl-weight"),
    (["--arch", "vit_huge"], "--arch"), (["--text-width", "65"], "--text-width")])  # fmt: skip
def test_what_the_user_can_mend_is_one_sentence(photos, tmp_path, flags, word):
    with pytest.raises(UserError, match=word) as error:
        train_here("declip", photos, tmp_path / "run", *flags)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_weights_may_sum_to_1(photos, tmp_path):
    """1 - 0.3 - 0.6 - 0.1 is below 0 in floating point."""
    flags = "--ssl-weight 0.3 --mvs-weight 0.6 --nns-weight 0.1 --max-steps 1 --eval-every 0".split()
    train_here("declip", photos, tmp_path / "run", *flags)
    assert rows(tmp_path / "run")[0]["loss"] > 0


def test_status_2(server, photos, tmp_path):
    done = server.run("declip.py", "--data", photos, "--output-dir", tmp_path / "run", *FLAGS["declip"], "--accum-steps", "2")
    assert done.returncode == 2 and "declip.py: error: " in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------ paste ------------------------------------------------
def test_paste():
    space = cut(["DeCLIP", "VisionTransformer", "TextTransformer"], file="declip.py")
    text = space["TextTransformer"](8, 40, 64, 1, 16)
    model = space["DeCLIP"](16, space["VisionTransformer"](32, 8, 64, 2, 16), text, 32)
    image, ids = torch.randn(4, 3, 32, 32), torch.randint(1, 40, (4, 8))
    images, texts, p, z, logits = model(image, image, ids, ids, ids, torch.tensor([3, 8, 31]))
    backward(*images, *texts, *p, *z, logits)
    info_nce = cut(["info_nce"], ["all_gather"], file="declip.py")["info_nce"]
    a, b = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    backward(*info_nce([a, a], [b], 10.0))
    backward(cut(["simsiam_loss"], file="declip.py")["simsiam_loss"](a, b, a, b))
    mlm_loss = cut(["mlm_loss"], ["all_gather"], file="declip.py")["mlm_loss"]
    backward(mlm_loss(a, torch.randint(0, 8, (4,))))
    queue = cut(["TextQueue"], file="declip.py")["TextQueue"](16, 8)
    queue.enqueue(queue.nearest(a))
    backward(cut(["ModifiedResNet"], file="declip.py")["ModifiedResNet"](32, (1, 1, 1, 1), 16)(image))
    assert cut(["augmented_text"], file="declip.py")["augmented_text"](str, None, "a dog", random.Random(0))
    assert cut(["masked_text"], file="declip.py")["masked_text"]


def write_loss(this, folder):
    names = ("image_embed", "text_embed", "logit_scale")
    image, text, scale = leaves(*(golden("dist2_declip_clip")[0][f"rank{this}"][key] for key in names))
    loss = sum(losses.squeeze() for losses in declip.info_nce([image], [text], scale)) / 2
    loss.backward()
    Path(folder, f"{this}.json").write_text(json.dumps([loss.item(), *(t.grad.tolist() for t in (image, text, scale))]))


def write_checksums(this, folder):
    """Of synonyms that all processes have, and of those that the first alone has."""
    texts = [synonyms_checksum({"red": ["crimson"]})]
    try:
        texts.append(synonyms_checksum({"red": ["crimson"]} if this == 0 else None))
    except UserError as error:
        texts.append(str(error))
    Path(folder, f"synonyms{this}.txt").write_text("\n".join(texts))


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    this = torch.distributed.get_rank()
    if "synonyms" in sys.argv:
        write_checksums(this, sys.argv[1])
    else:
        write_loss(this, sys.argv[1])
    torch.distributed.barrier()  # who leaves with the group still open can abort the other
    torch.distributed.destroy_process_group()
