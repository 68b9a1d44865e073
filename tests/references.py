"""The loss of one step of every method, and the optimizers' updates, written down a second time from the papers: what
the training loops are compared with. Nothing here is fast or stable; a model gives features, the rest is formulas."""

import torch


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def info_nce(queries, keys, scale, smoothing=0.0):
    """Mean over i of -ln softmax(scale * cos(query i, all keys))[i]."""
    log_p = (scale * unit(queries) @ unit(keys).T).log_softmax(1)
    return -(1 - smoothing) * log_p.diagonal().mean() - smoothing * log_p.mean()


def both_ways(image, text, scale):
    return (info_nce(image, text, scale) + info_nce(text, image, scale)) / 2


def nt_xent(z1, z2, temperature):
    """SimCLR Eq. 1 over all 2B views."""
    z, b = unit(torch.cat([z1, z2])), len(z1)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(2 * b, dtype=torch.bool), float("-inf"))
    other = torch.arange(2 * b).roll(b)
    return -logits.log_softmax(1)[torch.arange(2 * b), other].mean()


def cosine(x, y):
    return (unit(x) * unit(y)).sum(1).mean()


def clip(trace, step, model, views, batch):
    return both_ways(model.encode_image(views["image"]), model.encode_text(batch["text"]), model.logit_scale.exp())


def slip(trace, step, model, views, batch):
    z1, z2 = (model.image_mlp(model.visual(views[name])) for name in ("view1", "view2"))
    return clip(trace, step, model, views, batch) + trace.args.ssl_scale * nt_xent(z1, z2, trace.args.temperature)


def declip(trace, step, model, views, batch):
    """Eq. 6 with alpha = beta = gamma = 0.2; the nearest neighbours are those in the queue before this step."""
    images = [model.visual(views[name]) for name in ("view1", "view2")]
    length = batch["text"].shape[1]
    texts = [model.encode_text(batch["text"]), model.encode_text(batch["text_aug"][:, : trace.args.context_length])]
    ids, labels = batch["masked"][:, :length], batch["masked"][:, trace.args.context_length :][:, :length]
    words = model.text_label_predictor(model.encode_text(ids, return_words=True)[1])
    z = [model.projector(image) for image in images]
    p = [model.predictor(x) for x in z]
    queue, s = trace.others[step]["queue"]["features"], model.logit_scale.exp()
    near = queue[(unit(texts[0]) @ queue.T).argmax(1)]
    clip_term = both_ways(images[0], texts[0], s)
    iss = -(cosine(p[0], z[1].detach()) + cosine(p[1], z[0].detach())) / 2
    chosen = labels != -100
    tss = -words[chosen].log_softmax(1)[torch.arange(int(chosen.sum())), labels[chosen]].mean()
    mvs = both_ways(images[0], texts[1], s) + both_ways(images[1], texts[0], s) + both_ways(images[1], texts[1], s)
    nns = (both_ways(images[0], near, s) + both_ways(images[1], near, s)) / 2
    return (1 - 3 * 0.2) * clip_term + 0.2 * (iss + tss) + 0.2 * mvs + 0.2 * nns


def align(trace, step, model, views, batch):
    image, text = model(views["image"], batch["text"], batch["params"]["image"]["depth"])
    scale, smoothing = 1 / model.temperature, trace.args.label_smoothing
    return info_nce(image, text, scale, smoothing) + info_nce(text, image, scale, smoothing)


def simclr(trace, step, model, views, batch):
    """Batch norm sees both views as one batch (official code)."""
    z1, z2 = model(torch.cat([views["view1"], views["view2"]])).chunk(2)
    return nt_xent(z1, z2, trace.args.temperature)


def moco(trace, step, model, views, batch):
    """The key encoder has moved already and saw the second views in another order, which differs from theirs."""
    q = model.encoder_q(views["view1"])
    seen = trace.inputs[step]
    order = torch.cdist(seen.flatten(1), views["view2"].flatten(1)).argmin(1)
    assert torch.equal(seen, views["view2"][order])  # so each view occurs once, if the order has each number once
    assert sorted(order.tolist()) == list(range(len(q))) != order.tolist()
    load(model.encoder_k, trace.states[step + 1], "encoder_k.")
    k = model.encoder_k(seen).detach()[order.argsort()]
    queue = trace.states[step]["queue"]
    logits = torch.cat([(unit(q) * unit(k)).sum(1, keepdim=True), unit(q) @ queue], 1) / trace.args.temperature
    return -logits.log_softmax(1)[:, 0].mean()


def mocov3(trace, step, model, views, batch):
    """Algorithm 1, with the factor 2 tau; the momentum encoder has moved already."""
    load(model.momentum_encoder, trace.states[step + 1], "momentum_encoder.")
    q = [model.predictor(model.base_encoder(views[name])) for name in ("view1", "view2")]
    k = [model.momentum_encoder(views[name]).detach() for name in ("view1", "view2")]
    tau = trace.args.temperature
    return 2 * tau * (info_nce(q[0], k[1], 1 / tau) + info_nce(q[1], k[0], 1 / tau))


def byol(trace, step, model, views, batch):
    p = [model.predictor(model.online(views[name])) for name in ("view1", "view2")]
    z = [model.target(views[name]).detach() for name in ("view1", "view2")]
    return 4 - 2 * cosine(p[0], z[1]) - 2 * cosine(p[1], z[0])


def simsiam(trace, step, model, views, batch):
    z = [model.encoder(views[name]) for name in ("view1", "view2")]
    p = [model.predictor(x) for x in z]
    return -cosine(p[0], z[1].detach()) / 2 - cosine(p[1], z[0].detach()) / 2


def softened(logits, center, temperature):
    return ((logits - center) / temperature).softmax(-1).detach()


def cross_entropy(p, logits):
    return -(p * (logits / 0.1).log_softmax(-1)).sum(-1)


def between_crops(p_t, student):
    """DINO Eq. 3: p_t of the two global crops, logits of all crops in the same order."""
    terms = [cross_entropy(p, s).mean() for i, p in enumerate(p_t) for j, s in enumerate(student) if i != j]
    return sum(terms) / len(terms)


def of_masked_patches(p_t, logits, masks):
    """A mean over a crop's masked patches, then over crops. p_t, logits, masks: lists with an entry for each crop."""
    terms = []
    for p, s, mask in zip(p_t, logits, masks):
        terms.append(cross_entropy(p[mask], s[mask]).mean() if mask.any() else torch.zeros(()))
    return sum(terms) / len(terms)


def teacher_temp(trace, step):
    """On a line from the first to the last epoch of its warm-up, or step in DINOv2."""
    args = trace.args
    time, last = step // trace.epoch_steps, args.warmup_teacher_temp_epochs - 1
    if trace.name == "dinov2":
        time, last = step, args.warmup_teacher_temp_epochs * trace.epoch_steps - 1
    share = min(time, last) / last
    return (1 - share) * args.warmup_teacher_temp + share * args.teacher_temp


def drawn(trace, batch, names):
    return torch.cat([batch["params"][name]["drop_path"] for name in names]) if trace.args.drop_path else None


def dino(trace, step, model, views, batch):
    names, large = list(views), ["global1", "global2"]
    teacher = model.teacher.backbone(torch.cat([views[name] for name in large]))
    teacher = model.teacher.head(teacher)
    trace.expected_center = 0.9 * model.center + 0.1 * teacher.mean(0)
    student = []
    for group in (large, names[2:]):
        x = torch.cat([views[name] for name in group])
        student += model.student.head(model.student.backbone(x, drawn(trace, batch, group))).chunk(len(group))
    return between_crops(softened(teacher, model.center, teacher_temp(trace, step)).chunk(2), student)


def student_and_teacher(trace, model, views, batch, tokens_of_teacher):
    """Tokens of the student's global crops, which are masked, and class tokens of its local ones; the mask."""
    large, small = ["global1", "global2"], list(views)[2:]
    mask = torch.cat([batch["params"][name]["mask"] for name in large]).flatten(1)
    assert mask.any() and not mask.all()
    x = torch.cat([views[name] for name in large])
    tokens = model.student.backbone.tokens(x, mask, drawn(trace, batch, large))
    x_small = torch.cat([views[name] for name in small])
    local = model.student.backbone.tokens(x_small, None, drawn(trace, batch, small))[:, 0]
    return tokens, local, mask, tokens_of_teacher(x), len(small)


def ibot(trace, step, model, views, batch):
    """Both losses of Sec. 3.1, and DINO's for the local crops."""
    tokens, local, mask, teacher, n = student_and_teacher(trace, model, views, batch, model.teacher.backbone.tokens)
    teacher, patches_t = model.teacher.head(teacher)
    trace.expected_center = 0.9 * model.center + 0.1 * teacher.mean(0)
    trace.expected_center2 = 0.9 * model.center2 + 0.1 * patches_t.mean((0, 1))
    student, patches = model.student.head(tokens)
    student = [*student.chunk(2), *model.student.head(local).chunk(n)]
    tau = teacher_temp(trace, step)
    cls = between_crops(softened(teacher, model.center, tau).chunk(2), student)
    patch = of_masked_patches(softened(patches_t, model.center2[0], tau), patches, mask)
    return trace.args.cls_weight * cls + trace.args.patch_weight * patch


def dinov2(trace, step, model, views, batch):
    tokens, local, mask, teacher, n = student_and_teacher(trace, model, views, batch, model.teacher.backbone.tokens)
    cls_t, patches_t = model.teacher.dino_head(teacher[:, 0]), model.teacher.ibot_head(teacher[:, 1:])
    trace.expected_center = 0.9 * model.center + 0.1 * cls_t.mean(0)
    trace.expected_center2 = 0.9 * model.center2 + 0.1 * patches_t[mask].mean(0)  # of masked patches alone
    student = [*model.student.dino_head(tokens[:, 0]).chunk(2), *model.student.dino_head(local).chunk(n)]
    tau = teacher_temp(trace, step)
    cls = between_crops(softened(cls_t, model.center, tau).chunk(2), student)
    patches = model.student.ibot_head(tokens[:, 1:])
    patch = of_masked_patches(softened(patches_t, model.center2[0], tau), patches, mask)
    koleo = 0.0
    for crop in tokens[:, 0].chunk(2):
        distance = torch.cdist(unit(crop), unit(crop)) + 9 * torch.eye(len(crop))
        koleo = koleo - distance.min(1).values.log().mean()
    return cls + trace.args.patch_weight * patch + trace.args.koleo_weight * koleo


def load(module, state, prefix):
    """The parameters of a part of a recorded model into `module`; its buffers stay."""
    for name, p in module.named_parameters():
        p.data.copy_(state[prefix + name])


# ------------------------------------------------ optimizers ------------------------------------------------
ADAM = {"clip": (0.9, 0.98, 1e-6), "slip": (0.9, 0.98, 1e-8), "declip": (0.9, 0.98, 1e-8), "align": (0.9, 0.999, 1e-6)}
ADAM |= dict.fromkeys(("mocov3", "dino", "ibot", "dinov2"), (0.9, 0.999, 1e-08))


def updated(name, p, grad, lr, weight_decay, exclude, memory):
    """The parameter after one step. memory: a dict of this parameter, empty before its first step."""
    if name in ADAM:
        beta1, beta2, eps = ADAM[name]
        t = memory["t"] = memory.get("t", 0) + 1
        m = memory["m"] = beta1 * memory.get("m", 0) + (1 - beta1) * grad
        v = memory["v"] = beta2 * memory.get("v", 0) + (1 - beta2) * grad**2
        direction = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
        if name != "align":
            return (1 - lr * weight_decay) * p - lr * direction
        direction = direction + weight_decay * p  # LAMB, Algorithm 2
        return p - lr * direction * (1 if exclude else ratio(p, direction))
    lars = name in ("simclr", "byol")
    direction = grad if lars and exclude else grad + weight_decay * p
    if lars and not exclude:
        direction = 0.001 * ratio(p, direction) * direction
    if name == "simclr":
        memory["v"] = 0.9 * memory.get("v", 0) + lr * direction
        return p - memory["v"]
    memory["v"] = 0.9 * memory.get("v", 0) + direction
    return p - lr * memory["v"]


def ratio(p, direction):
    return p.norm() / direction.norm() if p.norm() > 0 and direction.norm() > 0 else 1.0
