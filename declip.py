"""DeCLIP: Supervision Exists Everywhere, a data efficient CLIP (Li et al. 2021, arXiv 2110.05208).

CLIP learns from one pairing per sample. Here a sample gives four kinds of supervision: its image
alone, its text alone, two views of each, and a similar text of an earlier sample.

Loss (Sec. 3), with I1, I2 embeddings of two views of an image, T of its text, T' of the augmented
text, N and N' the entries of a queue nearest to T and T', s = exp(t), alpha = beta = gamma = 0.2:
    L = (1 - alpha - beta - gamma) C(I1, T) + alpha (L_ISS + L_TSS) + beta L_MVS + gamma L_NNS
    C(I, T) = 1/2 [ CE(s I T^T, y) + CE(s T I^T, y) ], unit lengths (CLIP Fig. 3),  chance ln B
    L_MVS = C(I1, T') + C(I2, T) + C(I2, T'),  chance 3 ln B
    L_NNS = 1/2 [ C(I1, N) + C(I2, N) ],  chance ln B
    L_ISS = -[cos(p1, stopgrad(z2)) + cos(p2, stopgrad(z1))] / 2, z = projector(I), p = predictor(z)
    L_TSS = mean over the masked tokens of -log p(token),  chance ln V
B global batch, b = B / processes, y = (0, ..., B-1), D a width, E of embeddings, K queue, V tokens.

Laptop        torchrun declip.py
1 GPU         torchrun declip.py --data flickr8k
8 GPUs        torchrun --nproc_per_node=8 declip.py --data yfcc15m
              torchrun --nproc_per_node=8 declip.py --data cc12m      (ResNet-50)
Own data      torchrun declip.py --data path/to/captions.csv --recipe flickr8k

Official checkpoints load strictly (evaluation.weights.load_released). The default follows the text
of the paper. With --released the following is done as in the released code:
 - C of all four pairs has the weight (1 - alpha - beta - gamma) / 4; beta has no other effect.
 - L_NNS goes from image to text only, and over N' too; the queue takes T' as well.
 - The masked text serves L_TSS and is also T, and a random token in it can be an end token, which
   the text encoder then pools at. By default T is the embedding of the text without masks.
 - s is at least exp(3) = 20, and a ViT's patch embedding is not trained.
Never reproduced, even with --released: queue and batch norm of the heads per process; a queue that
is lost at a restart and drops entries that do not fit before its end; L_TSS averaged over
processes, not over tokens. All of these would make a run depend on the number of processes or
restarts. The class token and in_proj's biases are not decayed; there they are. One of a sample's
captions is drawn, not the first taken; a GPU computes in mixed precision, not in float32.

Diff against: slip.py (backbones: clip.py).
"""

import copy
import functools
import json
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import UserError, all_gather, checkpoint_blocks, init_distributed, mixed_precision
from common import sync_batchnorm, user_errors, warmup_cosine, world_size
from data import IMAGENET_MEAN, IMAGENET_STD, Loader, Tokenizer, normalize, open_dataset, to_float
from data import color_jitter, draw_jitter, gaussian_blur, grayscale, hflip, random_resized_crop
from monitor import EvalView, captions, language_eval, language_set
from run import Run, RunArgs, init_weights, parse_args
from synonyms import open_synonyms, synonyms_checksum


# ---------------------------------------- arguments ----------------------------------------
@dataclass
class Args(RunArgs):
    data: str = "shapes"  # named dataset or path, see docs/data.md
    eval_data: str = ""  # dataset of the evaluation in the loop (default: the val split of --data)
    recipe: str = ""  # entry of RECIPES to use instead of the one named like --data
    arch: str = "vit_base_patch32"  # image encoder: a key of ARCHS, a ViT with _patchP behind it
    embed_dim: int = 0  # width of the joint embedding (0: the arch's; paper: 1024; 88M ViT: 3072)
    text_width: int = 512  # width of the text transformer, with heads of 64 (CLIP Sec. 2.4)
    text_layers: int = 12  # blocks of the text transformer (CLIP Sec. 2.4)
    context_length: int = 77  # tokens of a caption, start and end included (paper 76; its code 77)
    ssl_dim: int = 1024  # width of the projector; the predictor has half (SimSiam: a quarter)
    ssl_weight: float = 0.2  # alpha, weight of L_ISS and of L_TSS (Sec. 3)
    mvs_weight: float = 0.2  # beta, weight of L_MVS (--released: part of C's; 0 in its 88M ViT)
    nns_weight: float = 0.2  # gamma, weight of L_NNS (Sec. 3)
    queue_size: int = 65536  # K, embeddings in the queue of texts (Sec. 3)
    released: bool = False  # objective and behaviour of the released code, see top of this file
    synonyms: str = ""  # file of lines "word, synonym, ..." (default: WordNet, if it is installed)
    tokenizer: str = "clip"  # clip, train (on the captions), a tokenizer.json, merges .gz, hub name
    vocab_size: int = 49409  # V, CLIP's tokens and a mask; at most so many with --tokenizer train
    image_size: int = 224  # side of an image in pixels
    epochs: int = 32  # passes over the data (Sec. 4.1); official code: 128,000 steps of YFCC15M
    max_steps: int = 0  # stop after so many steps, without changing the schedule (0: run all of it)
    batch_size: int = 4096  # pairs of a step, over all processes (official code)
    accum_steps: int = 1  # more is refused: heads with batch norm would see one piece of a batch
    grad_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute to save memory
    lr: float = 1e-3  # peak learning rate (official code)
    min_lr: float = 0.0  # learning rate at the end of the cosine (official code)
    warmup_epochs: float = 0.665  # linear warm-up from lr / 10: 2,500 steps of 15.4M pairs
    weight_decay: float = 0.1  # on all but gains, biases, class token and logit scale
    clip_grad: float = 0.0  # largest gradient norm (0: off, as in the official code)
    init: str = ""  # weights to start from: a run, released weights, a backbone (docs/init.md)
    freeze: Literal["", "image", "text"] = ""  # encoder that stays as --init left it
    seed: int = 0  # random seed of weights, order, crops, choice of captions and masks
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on GPUs, else fp32


SMALL = dict(text_width=128, text_layers=3, embed_dim=128, context_length=32, tokenizer="train")
SMALL |= dict(batch_size=128, lr=1e-3, warmup_epochs=0.2, ssl_dim=512, queue_size=4096)
# our choice for photos with several captions each: no published run trains on these alone
PHOTOS = dict(arch="vit_small_patch16", text_layers=6, tokenizer="train", vocab_size=16384)
PHOTOS |= dict(epochs=30, batch_size=1024, lr=1e-3, warmup_epochs=2.0, queue_size=16384)
# Beside CC3M and CC12M: ImageNet zero-shot accuracy in the paper, whose ResNet-50, batch and epochs
# these are. We do not know the other hyperparameters of its runs: the warm-up is our choice.
RESNET = dict(arch="resnet50", eval_data="imagenet", warmup_epochs=1.0)
RESNET |= dict(grad_checkpointing="full")  # of the text encoder, to fit 8 GPUs of 80 GB
RECIPES = {
    "shapes": dict(SMALL, arch="vit_micro_patch12", image_size=48, vocab_size=1024, text_layers=2,
                   epochs=2),
    "flickr8k": dict(SMALL, arch="vit_micro_patch16", image_size=112, vocab_size=4096, epochs=30),
    "flickr30k": PHOTOS,
    "coco": PHOTOS,
    "cc3m": dict(RESNET, batch_size=2048),  # 27.8%
    "cc12m": RESNET,  # 41.0%
    "yfcc15m": dict(eval_data="imagenet"),  # official README: 43.2% (V2, --released)
    "redcaps": dict(eval_data="imagenet", warmup_epochs=1.0),  # our choice: no published run
}
RECIPES |= dict.fromkeys(("multi30k-en", "multi30k-de", "multi30k-fr", "multi30k-cs"), PHOTOS)


# ---------------------------------------- augmentation ----------------------------------------
# Adapted from slip.py: SSLView, crops from 20%
class SSLView:
    """One view of an image, MoCo v2's (official code); all losses see the same two views."""

    def __init__(self, size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
        self.size = size
        self.mean, self.std = mean, std

    def crop(self, image, rng):
        """In a loader worker: uint8 (3, H, W) -> uint8 (3, size, size). rng: random.Random."""
        scale = (0.2, 1.0)
        return random_resized_crop(image, rng, self.size, scale, interpolation="bilinear")

    def sample(self, rng):
        """In a loader worker: what else is random about this view of this sample."""
        return {
            "flip": rng.random() < 0.5,
            "jitter": rng.random() < 0.8,
            "gray": rng.random() < 0.2,
            "blur": rng.random() < 0.5,
            "sigma": rng.uniform(0.1, 2.0),  # pixels
            **draw_jitter(rng, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
        }

    def __call__(self, x, params):
        """For a batch: uint8 (b, 3, size, size) and stacked parameters -> normalised float."""
        x = hflip(to_float(x), params["flip"])
        factors = [params[name] for name in ("brightness", "contrast", "saturation", "hue")]
        x = color_jitter(x, *factors, params["order"], params["jitter"])
        x = grayscale(x, params["gray"])
        x = gaussian_blur(x, params["sigma"], params["blur"], 13)  # 3 sigma on either side
        return normalize(x, self.mean, self.std)


def augmented_text(tokenizer, synonyms, caption, rng):
    """-> ids of the caption after one operation of EDA (arXiv 1901.11196, Sec. 2); no insertion,
    like the official code. synonyms: {word in lower case: list of words}; None: no replacement."""
    words = caption.split()
    operations = ["swap", "delete", "replace"] if synonyms else ["swap", "delete"]
    operation = rng.choice(operations) if len(words) > 1 else ""  # a single word stays
    if operation == "swap":
        i, j = rng.sample(range(len(words)), 2)
        words[i], words[j] = words[j], words[i]
    elif operation == "delete":
        stay = [word for word in words if rng.random() > 0.1]
        words = stay or [rng.choice(words)]
    elif operation == "replace":
        known = [word for word in words if synonyms.get(word.lower())]
        if known:
            old = rng.choice(known)
            new = rng.choice(synonyms[old.lower()])
            words = [new if word == old else word for word in words]
    return tokenizer(" ".join(words))


def masked_text(tokenizer, any_id, caption, rng):
    """-> (ids, labels) of BERT's masked language model (its Sec. 3.1): a token is chosen with p
    0.15. Of a chosen one the label is its id, and in ids stands the mask with p 0.8, a random token
    with p 0.1, or it stays. The label of all others is -100. any_id: a random token may also be a
    mask, start or end token (official code)."""
    ids = tokenizer(caption)
    labels = [-100] * len(ids)
    mask = tokenizer.sot - 1  # see add_mask_token
    for i in range(1, len(ids) - 1):  # neither start nor end
        if rng.random() < 0.15:
            labels[i] = ids[i]
            other = rng.randrange(tokenizer.vocab_size if any_id else mask)
            outcomes = [mask, other, ids[i]]
            ids[i] = rng.choices(outcomes, [0.8, 0.1, 0.1])[0]
    return ids, labels


def masked_row(tokenizer, any_id, caption, rng):
    """Both lists of masked_text, padded to the context length, as the one row that Loader takes."""
    ids, labels = masked_text(tokenizer, any_id, caption, rng)
    padding = tokenizer.context_length - len(ids)
    ids += [0] * padding
    labels += [-100] * padding
    return ids + labels


def add_mask_token(tokenizer):
    """-> a Tokenizer with <|mask|> before start and end, whose ids go up by one (official code)."""
    if tokenizer.bpe.token_to_id("<|mask|>") == tokenizer.sot - 1:  # that of an earlier run
        return tokenizer
    last_two = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    if (tokenizer.sot, tokenizer.eot) != last_two:
        raise UserError(
            "the last two ids of --tokenizer are not its start and end tokens: use clip or train"
        )
    form = json.loads(tokenizer.to_json())
    form["post_processor"] = None  # it is never used, and holds the old ids
    vocab = form["model"]["vocab"]
    for token in form["added_tokens"]:
        if token["id"] >= tokenizer.sot:
            token["id"] += 1
        vocab[token["content"]] = token["id"]
    vocab["<|mask|>"] = tokenizer.sot
    return Tokenizer(json.dumps(form), tokenizer.context_length)


def eval_view(args) -> EvalView:
    resize = args.image_size * 256 // 224
    return EvalView(args.image_size, resize, "bilinear", IMAGENET_MEAN, IMAGENET_STD)


# ---------------------------------------- backbone ----------------------------------------
# Adapted from clip.py: ResidualAttentionBlock, QuickGELU in forward, initialised here
class ResidualAttentionBlock(nn.Module):
    """Pre-norm block. (B, N, D) -> (B, N, D); with position (B,), one token each: (B, 1, D)."""

    def __init__(self, width, layers):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Module()
        self.mlp.c_fc = nn.Linear(width, 4 * width)
        self.mlp.c_proj = nn.Linear(4 * width, width)
        std_out = (2 * layers * width) ** -0.5  # of the last layer of each residual branch
        nn.init.normal_(self.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(self.attn.out_proj.weight, std=std_out)
        nn.init.normal_(self.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.mlp.c_proj.weight, std=std_out)

    def forward(self, x, mask=None, position=None):
        q = y = self.ln_1(x)
        key_mask = None  # (B, N): 0 where the token at `position` attends, -inf after it
        if position is not None:
            x = x.take_along_dim(position[:, None, None], dim=1)  # (B, 1, D)
            q = self.ln_1(x)
            if mask is not None:
                key_mask = mask[position]  # a row of the causal mask for each sample
                mask = None
        causal = mask is not None
        y, _ = self.attn(q, y, y, key_mask, need_weights=False, attn_mask=mask, is_causal=causal)
        x = x + y
        y = self.mlp.c_fc(self.ln_2(x))
        y = y * torch.sigmoid(1.702 * y)  # QuickGELU
        return x + self.mlp.c_proj(y)


# Adapted from clip.py: Transformer, heads of 64
class Transformer(nn.Module):
    """mask: causal or none. (B, N, D) -> (B, N, D); with position (B,) of a token: (B, 1, D)."""

    def __init__(self, width, layers):
        super().__init__()
        blocks = [ResidualAttentionBlock(width, layers) for _ in range(layers)]
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x, mask=None, position=None):
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x, mask)
        return last(x, mask, position)


# Adapted from clip.py: VisionTransformer, initialised as the text encoder is (official code)
class VisionTransformer(nn.Module):
    """OpenAI's ViT (CLIP Sec. 2.4): no bias in the patch embedding, a norm before the first block.
    (B, 3, S, S) -> (B, E). In training the last block computes nothing but the class token."""

    def __init__(self, image_size, patch_size, width, layers, embed_dim):
        super().__init__()
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        tokens = (image_size // patch_size) ** 2 + 1
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def pool(self, x):
        """-> the class token after the last norm, (B, D): the features of linear probes."""
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, N, D)
        class_token = self.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([class_token, x], dim=1) + self.positional_embedding
        place = x.new_zeros(len(x), dtype=torch.long)  # of the class token
        x = self.transformer(self.ln_pre(x), position=place if self.training else None)
        return self.ln_post(x[:, 0])

    def forward(self, x):
        return self.pool(x) @ self.proj


# Adapted from clip.py: Bottleneck, made of torchvision's
class Bottleneck(torchvision.models.resnet.Bottleneck):
    """torchvision's block with means over 2 x 2 pixels in place of its strides (CLIP Sec. 2.4)."""

    def __init__(self, inplanes, planes, stride=1, downsample=None, *args, **kwargs):
        super().__init__(inplanes, planes, 1, downsample, *args, **kwargs)
        self.avgpool = nn.AvgPool2d(stride)
        if downsample is not None:
            downsample[0].stride = (1, 1)

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(self.avgpool(x))
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(self.avgpool(x)))
        return F.relu(x + shortcut)


# Adapted from clip.py: AttentionPool2d, heads of 64
class AttentionPool2d(nn.Module):
    """Attention pooling (CLIP Sec. 2.4), its query is the mean token. (B, D, H, W) -> (B, E)."""

    def __init__(self, grid, width, embed_dim):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) / width**0.5)
        for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
            linear = nn.Linear(width, embed_dim if name == "c_proj" else width)
            nn.init.normal_(linear.weight, std=width**-0.5)
            self.add_module(name, linear)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # (B, HW, D)
        mean = x.mean(1, keepdim=True)
        x = torch.cat([mean, x], dim=1) + self.positional_embedding.to(x)
        q = self.q_proj(x[:, :1])
        k = self.k_proj(x)
        v = self.v_proj(x)
        q, k, v = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, 1, 64)
        return self.c_proj(x.flatten(1))


# Adapted from clip.py: ModifiedResNet, with a classifier that is never used
class ModifiedResNet(torchvision.models.ResNet):
    """ResNet with a stem of three convolutions and attention pooling (CLIP Sec. 2.4).
    (B, 3, S, S) -> (B, E)."""

    def __init__(self, image_size, layers, embed_dim):
        super().__init__(Bottleneck, layers, embed_dim, zero_init_residual=True)
        self.fc.requires_grad_(False)  # torchvision's classifier: in official files, never used
        self.conv1 = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()  # torch's own initialisation in place of torchvision's
        self.attnpool = AttentionPool2d(image_size // 32, 2048, embed_dim)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.avg_pool2d(x, 2)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return self.attnpool(x)

    pool = forward  # no projection follows


class TextTransformer(nn.Module):
    """CLIP's text encoder (its Sec. 2.4) as a module of its own; the projection has a bias."""

    def __init__(self, context_length, vocab_size, width, layers, embed_dim):
        super().__init__()
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.transformer = Transformer(width, layers)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, embed_dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text_projection.weight, std=width**-0.5)

    def forward(self, text, return_words=False):
        """(B, N <= context_length) token ids, any padding after the end token -> (B, E), not
        normalised, and on request the output for every token, (B, N, D)."""
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
        end = text.argmax(dim=-1)  # position of the end token, which has the largest id
        position = None if return_words else end  # words need every token
        x = self.ln_final(self.transformer(x, mask, position))
        if return_words:
            rows = torch.arange(len(x), device=x.device)
            return self.text_projection(x[rows, end]), x
        return self.text_projection(x[:, 0])


# ---------------------------------------- model ----------------------------------------
class DeCLIP(nn.Module):
    """visual: images -> (B, E); text: a TextTransformer."""

    def __init__(self, embed_dim, visual, text, ssl_dim=1024):
        super().__init__()
        self.visual = visual
        self.encode_text = text
        self.logit_scale = nn.Parameter(torch.tensor([1 / 0.07]).log())  # t; CLIP Sec. 2.5
        # SimSiam's (its Sec. 3), on the embedding I, which is not normalised (official code)
        self.projector = nn.Sequential()
        for i, dim in ((1, embed_dim), (2, ssl_dim), (3, ssl_dim)):
            self.projector.add_module(f"linear{i}", nn.Linear(dim, ssl_dim))
            self.projector.add_module(f"bn{i}", nn.BatchNorm1d(ssl_dim))
            if i < 3:
                self.projector.add_module(f"relu{i}", nn.ReLU())
        self.predictor = nn.Sequential()
        self.predictor.add_module("linear1", nn.Linear(ssl_dim, ssl_dim // 2))
        self.predictor.add_module("bn1", nn.BatchNorm1d(ssl_dim // 2))
        self.predictor.add_module("relu", nn.ReLU())
        self.predictor.add_module("layer2", nn.Linear(ssl_dim // 2, ssl_dim))
        vocab_size, width = text.token_embedding.weight.shape
        self.text_label_predictor = nn.Linear(width, vocab_size)

    def encode_image(self, image):
        """(B, 3, S, S) -> (B, E), not normalised."""
        return self.visual(image)

    def forward(self, view1, view2, text, text_aug, masked, chosen):
        """-> (I1, I2), (T, T') each (B, E); (p1, p2), (z1, z2) each (B, ssl_dim); logits (M, V) of
        the M tokens of `masked` at `chosen`, rows and columns. text None: T is that of `masked`."""
        image1 = self.visual(view1)
        image2 = self.visual(view2)
        z1 = self.projector(image1)
        z2 = self.projector(image2)
        masked_embed, words = self.encode_text(masked, return_words=True)
        text_embed = masked_embed if text is None else self.encode_text(text)
        text_aug_embed = self.encode_text(text_aug)
        p1 = self.predictor(z1)
        p2 = self.predictor(z2)
        logits = self.text_label_predictor(words[chosen])
        return (image1, image2), (text_embed, text_aug_embed), (p1, p2), (z1, z2), logits


class TextQueue(nn.Module):
    """The last K text features of all processes, of unit length; random ones at the start."""

    def __init__(self, size, dim):
        super().__init__()
        features = F.normalize(torch.randn(size, dim), dim=-1)
        self.register_buffer("features", features)  # (K, E)
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))  # of the next one

    @torch.no_grad()
    def nearest(self, text_embed):
        """(b, E) of any length -> (b, E): for each, the entry of largest cosine."""
        similarity = text_embed.float() @ self.features.T  # (b, K)
        return self.features[similarity.argmax(dim=1)]

    @torch.no_grad()
    def enqueue(self, features):
        """(n <= K, E) of unit length, the same on every process."""
        size = len(self.features)
        rows = torch.arange(len(features), device=features.device) + self.place
        self.features[rows % size] = features
        self.place.copy_((self.place + len(features)) % size)


ARCHS = {  # embed_dim, layers, width (smaller ViTs: our own)
    "vit_micro": (128, 4, 128),
    "vit_small": (384, 12, 384),
    "vit_base": (512, 12, 768),
    "resnet50": (1024, (3, 4, 6, 3), 2048),
}


def build_model(args) -> DeCLIP:
    """Raises UserError for an unknown --arch and for sizes that do not fit together."""
    name, _, patch = args.arch.partition("_patch")
    if name.startswith("vit"):
        known = name in ARCHS and patch.isdecimal() and int(patch) > 0
    else:
        known = args.arch in ARCHS
    if not known:
        names = ", ".join(ARCHS)
        raise UserError(f"--arch {args.arch} is unknown, choose one of {names}, vits with _patchP")
    patch_size = int(patch) if patch else None
    stride = patch_size or 32  # pixels of the image for one token
    if args.image_size % stride:
        raise UserError(
            f"--image-size {args.image_size} is not a multiple of {stride} ({args.arch})"
        )
    text_width = args.text_width
    if text_width % 64:
        raise UserError(f"--text-width {text_width} is not a multiple of 64, the width of a head")
    embed_dim, layers, width = ARCHS[name]
    embed_dim = args.embed_dim or embed_dim
    if patch_size:
        visual = VisionTransformer(args.image_size, patch_size, width, layers, embed_dim)
    else:
        visual = ModifiedResNet(args.image_size, layers, embed_dim)
    text = TextTransformer(
        args.context_length, args.vocab_size, text_width, args.text_layers, embed_dim
    )
    return DeCLIP(embed_dim, visual, text, args.ssl_dim)


def image_encoder(model: DeCLIP) -> nn.Module:
    """Module from images to pooled features, those of a ViT before its projection."""
    encoder = copy.copy(model.visual)  # a second module with the same parameters ...
    encoder.forward = encoder.pool  # ... whose output is the features in place of the embedding
    return encoder


# ---------------------------------------- loss ----------------------------------------
# Adapted from clip.py: clip_loss, several images and texts per sample, directions apart
def info_nce(images, texts, logit_scale):
    """InfoNCE of every image view with every text over the global batch, in nats; chance ln B.

    images, texts: lists of (b, E) of this process, any length. Call it outside autocast, whose
    products are in half precision. Returns two matrices (images, texts) of losses, image to text
    and text to image: means over this process's rows, whose mean over processes is that of the
    global batch."""
    images = [F.normalize(image.float(), dim=-1) for image in images]  # (b, E) each
    texts = [F.normalize(text.float(), dim=-1) for text in texts]
    all_images = [all_gather(image) for image in images]  # (B, E) each
    all_texts = [all_gather(text) for text in texts]
    b, first = len(images[0]), 0
    if len(all_images[0]) > b:
        first = b * torch.distributed.get_rank()
    labels = torch.arange(first, first + b, device=images[0].device)
    to_text = []
    for image in images:
        for all_text in all_texts:
            to_text.append(F.cross_entropy(logit_scale * image @ all_text.T, labels))
    to_image = []
    for all_image in all_images:
        for text in texts:
            to_image.append(F.cross_entropy(logit_scale * text @ all_image.T, labels))
    shape = len(images), len(texts)
    return torch.stack(to_text).view(shape), torch.stack(to_image).view(shape)


# Adapted from simsiam.py: simsiam_loss, always with the stop-gradient
def simsiam_loss(p1, p2, z1, z2):
    """L_ISS (SimSiam Eq. 4): 0 for unrelated directions, -1 at best. (b, D) each, any length."""
    z1 = z1.detach()
    z2 = z2.detach()
    d1 = -F.cosine_similarity(p1.float(), z2.float()).mean()  # SimSiam Eq. 1
    d2 = -F.cosine_similarity(p2.float(), z1.float()).mean()
    return d1 / 2 + d2 / 2


def mlm_loss(logits, labels):
    """L_TSS (BERT Sec. 3.1), chance level ln V: logits (M, V), labels (M,) of this process's masked
    tokens. Returns a value whose average over processes is the loss over all masked tokens."""
    count = torch.full((1,), float(len(labels)), device=logits.device)
    counts = all_gather(count)  # (processes,)
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return total * len(counts) / counts.sum().clamp(min=1)


# Copied from byol.py: feature_std
def feature_std(z):
    """Collapse indicator (SimSiam, Sec. 4.1): standard deviation of each output of z (b, E), scaled
    to unit length, over the global batch; mean over outputs. 1 / sqrt(E): spread, 0: collapsed."""
    return all_gather(F.normalize(z.detach().float(), dim=-1)).std(0).mean()


# ---------------------------------------- training ----------------------------------------
def train(args: Args) -> dict:
    """Trains and returns the last evaluation. Raises UserError for mistakes the user can fix."""
    device = init_distributed(args.device)
    torch.manual_seed(args.seed)
    autocast, scaler = mixed_precision(args.dtype, device)
    mvs_weight = args.mvs_weight
    clip_weight = 1 - args.ssl_weight - mvs_weight - args.nns_weight
    if clip_weight < -1e-6:  # beyond rounding
        raise UserError("--ssl-weight, --mvs-weight, --nns-weight are above 1 in sum, lower them")
    clip_weight = max(0.0, clip_weight)
    if args.released:  # all four pairs alike
        clip_weight = mvs_weight = clip_weight / 4
    if args.accum_steps > 1:
        raise UserError("--accum-steps is not implemented: batch norm would see one piece, use 1")
    entries = args.batch_size * (2 if args.released else 1)  # of a step, into the queue
    if args.queue_size < entries:
        raise UserError(f"--queue-size {args.queue_size} is less than a batch adds to it: raise it")

    # data
    dataset = open_dataset(args.data, args.data_dir)
    val = language_set(args)
    source = captions(dataset) if args.tokenizer == "train" else None
    vocab_size = args.vocab_size
    if args.tokenizer == "train":
        vocab_size = max(514, vocab_size - 1)  # 512 bytes, start and end; the mask is one more
    tokenizer = Tokenizer(args.tokenizer, args.context_length, source, vocab_size, args.data_dir)
    tokenizer = add_mask_token(tokenizer)
    if tokenizer.vocab_size > args.vocab_size:
        raise UserError(
            f"--vocab-size must be at least {tokenizer.vocab_size}, with the tokenizer's mask token"
        )
    synonyms = open_synonyms(args.synonyms)
    view = SSLView(args.image_size)
    views = {"view1": view, "view2": view}
    texts = {
        "text": tokenizer,
        "text_aug": functools.partial(augmented_text, tokenizer, synonyms),
        "masked": functools.partial(masked_row, tokenizer, args.released),
    }
    loader = Loader(dataset, views, texts, args.batch_size, args.seed, args.workers, device)

    # model and optimizer
    model = sync_batchnorm(build_model(args), device).to(device, memory_format=torch.channels_last)
    init_weights(model, args, tokenizer)
    if args.released and isinstance(model.visual, VisionTransformer):
        model.visual.conv1.requires_grad_(False)
    dim = model.encode_text.text_projection.out_features
    queue = TextQueue(args.queue_size, dim).to(device)
    checkpoint_blocks(model, args.grad_checkpointing, ResidualAttentionBlock)
    if args.compile:
        model.compile()
    trained = [p for p in model.parameters() if p.requires_grad]  # all but those of --freeze
    decay = [p for p in trained if p.ndim >= 2]
    no_decay = [p for p in trained if p.ndim < 2]  # norms, biases, logit scale, class token
    groups = [
        {"params": decay, "weight_decay": args.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-8, fused=True)

    # run directory; continues from its checkpoint if it has one
    state = {"model": model, "queue": queue, "optimizer": optimizer, "scaler": scaler}
    extra = {
        "tokenizer": tokenizer.to_json(),
        "synonyms": synonyms_checksum(synonyms),
    }
    run = Run("declip", args, loader, state, extra)
    if synonyms is None:
        run.say("no --synonyms and no WordNet: captions are augmented by swaps and deletions alone")
    spread = args.ssl_dim**-0.5
    run.say(f"feature_std: 1 / sqrt({args.ssl_dim}) = {spread:.3f} if spread, 0 if collapsed")
    # one less each: the official code counts steps from 1 and reaches min_lr in the last one
    warmup = max(0, round(args.warmup_epochs * loader.steps_per_epoch) - 1)
    ddp = DistributedDataParallel(model) if world_size() > 1 else model
    clip_chance = math.log(args.batch_size)
    tss_chance = math.log(args.vocab_size)
    chance = (clip_weight + 3 * mvs_weight + args.nns_weight) * clip_chance
    chance += args.ssl_weight * tss_chance
    if val and not run.evaluation and run.due(args.eval_every):  # random weights, or one cut off
        run.log_evaluation(language_eval(model, tokenizer, val, eval_view(args), device))

    for step, batch in run.batches():
        view1, view2 = batch["view1"], batch["view2"]
        text = batch["text"]
        text_aug = batch["text_aug"][:, : args.context_length]
        length = text.shape[1]  # of the longest caption, on a GPU rounded up
        masked = batch["masked"][:, :length]
        labels = batch["masked"][:, args.context_length :][:, :length]  # see masked_row
        chosen = torch.where(labels != -100)  # the CPU waits for the number of masked tokens
        lr = warmup_cosine(
            step, run.total - 1, warmup, args.lr, start=args.lr / 10, end=args.min_lr
        )
        for group in optimizer.param_groups:
            group["lr"] = lr

        seen = None if args.released else text
        with autocast:
            outputs = ddp(view1, view2, seen, text_aug, masked, chosen)
        image_embeds, text_embeds, p, z, word_logits = outputs
        known = text_embeds if args.released else text_embeds[:1]  # T, and T' with --released
        nearest = [queue.nearest(embed) for embed in known]
        scale = model.logit_scale.exp()
        candidates = [*text_embeds, *nearest]
        to_text, to_image = info_nce(image_embeds, candidates, scale)
        both = (to_text + to_image) / 2  # C of (I1, I2) with (T, T', N and, with --released, N')
        clip = both[0, 0]
        mvs = both[0, 1] + both[1, 0] + both[1, 1]
        neighbours = to_text if args.released else both
        nns = neighbours[:, 2:].mean()
        iss = simsiam_loss(*p, *z)
        tss = mlm_loss(word_logits, labels[chosen])
        loss = clip_weight * clip + mvs_weight * mvs + args.nns_weight * nns
        loss += args.ssl_weight * (iss + tss)
        scaler.scale(loss).backward()
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():  # s <= 100 (CLIP Sec. 2.5); official code: t in [3, 6], then s <= 100
            least = 3 if args.released else 0
            model.logit_scale.clamp_(least, math.log(100))
            unit = [F.normalize(embed.float(), dim=-1) for embed in reversed(known)]  # T' before T
            gathered = [all_gather(features) for features in unit]
            queue.enqueue(torch.cat(gathered))

        nn_cosine = F.cosine_similarity(known[0].float(), nearest[0])
        terms = {
            "loss": (loss, chance),
            "clip_loss": (clip, clip_chance),
            "mvs_loss": (mvs, 3 * clip_chance),
            "nns_loss": (nns, clip_chance),
            "iss_loss": (iss, 0.0),
            "tss_loss": (tss, tss_chance),
            "nn_cosine": (nn_cosine.mean(), None),
            "feature_std": (lambda: feature_std(z[0]), None),
        }
        run.end_step(
            terms, feature_std_chance=spread,
            logit_scale=model.logit_scale.detach().exp(), lr=lr,
        )
        if run.agree_to_stop() or run.due(args.save_every, args.keep_every):
            run.save()
        if val and run.due(args.eval_every):
            run.log_evaluation(language_eval(model, tokenizer, val, eval_view(args), device))

    return run.finish("zeroshot", val)


if __name__ == "__main__":
    with user_errors():
        train(parse_args(Args, RECIPES))
