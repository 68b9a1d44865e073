"""SLIP: Self-supervision meets Language-Image Pre-training (Mu et al. 2021, arXiv 2112.12750).

CLIP plus SimCLR on one image encoder: the language branch sees a lightly cropped image and its
caption, the self-supervised branch two strongly augmented views of the same image (Algorithm 1).
The views teach the encoder what captions do not mention, and zero-shot transfer improves too.

Loss, with I, T, v of unit length, s = exp(t), tau = 0.1, c = --ssl-scale, j the other view of i's
image:
    L = L_clip + c L_ssl,  chance level ln B + c ln(2B - 1)
    L_clip = 1/2 [ CE(s I T^T, y) + CE(s T I^T, y) ],  y = (0, ..., B-1)         (CLIP Fig. 3)
    L_ssl = mean over the 2B views i of -log( exp(v_i.v_j / tau) / sum_{k != i} exp(v_i.v_k / tau) )
B global batch, b = B / processes, N tokens, D width of blocks, E of embeddings, S image size.

Laptop        torchrun slip.py
1 GPU         torchrun slip.py --data flickr8k
8 GPUs        torchrun --nproc_per_node=8 slip.py --data yfcc15m
Own data      torchrun slip.py --data path/to/captions.csv --recipe flickr8k

Parameter names are the official code's, so its checkpoints load strictly
(evaluation.weights.load_released). Differences from that code:
 - Features gathered for L_clip carry gradient, as those for L_ssl always did: any number of
   processes trains with the gradient of the global batch. In the official code they are constants.
   With more than one process each feature then learns as an anchor only, never as a candidate, and
   1 and 64 GPUs train differently (official issue 31). --no-gather-grad gives that back.
 - A long caption keeps its end token, where the text encoder pools; the official code cuts it off.
 - Blur is a true Gaussian, colours are floats, a GPU computes in bfloat16 where it can; official:
   Pillow's box filters, bytes, and float16.
 - The three images of a pair go through the encoder in one batch, in the official code in three.
   There is no batch norm in it, so the numbers are the same.
 - Losses are computed in float32. --accum-steps is exact; officially each piece is its own batch.

Diff against: clip.py (and simclr.py for L_ssl).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import UserError, all_gather, all_reduce_mean, checkpoint_blocks, init_distributed
from common import mixed_precision, sync_batchnorm, user_errors, warmup_cosine, world_size
from data import IMAGENET_MEAN, IMAGENET_STD, Loader, Tokenizer, normalize, open_dataset, to_float
from data import color_jitter, draw_jitter, gaussian_blur, grayscale, hflip, random_resized_crop
from monitor import EvalView, captions, language_eval, language_set
from run import Run, RunArgs, init_weights, parse_args


# ---------------------------------------- arguments ----------------------------------------
@dataclass
class Args(RunArgs):
    data: str = "shapes"  # named dataset or path, see docs/data.md
    eval_data: str = ""  # dataset of the evaluation in the loop (default: the val split of --data)
    recipe: str = ""  # entry of RECIPES to use instead of the one named like --data
    arch: str = "vit_base_patch16"  # image encoder: a key of ARCHS and _patchP (official models.py)
    embed_dim: int = 512  # width of the joint embedding, E (official models.py)
    text_width: int = 512  # width of the text transformer, with heads of 64 (CLIP Sec. 2.4)
    text_layers: int = 12  # blocks of the text transformer (CLIP Sec. 2.4)
    context_length: int = 77  # tokens of a caption, start and end included
    ssl_mlp_dim: int = 4096  # hidden width of the self-supervised projector (official main.py)
    ssl_emb_dim: int = 256  # output width of that projector (official main.py)
    ssl_scale: float = 1.0  # weight c of L_ssl (official main.py)
    temperature: float = 0.1  # tau of L_ssl (official losses.py); SimCLR Table 5 has it too
    tokenizer: str = "clip"  # clip, train (on the captions), a tokenizer.json, merges .gz, hub name
    vocab_size: int = 49408  # rows of the token table; at most so many with --tokenizer train
    image_size: int = 224  # side of an image in pixels
    epochs: int = 25  # passes over the data; 50 and 100 in longer runs (official README)
    max_steps: int = 0  # stop after so many steps, without changing the schedule (0: run all of it)
    batch_size: int = 4096  # pairs of a step, over all processes and pieces (official code)
    accum_steps: int = 1  # encode a batch in so many pieces, with the exact gradient
    grad_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute to save memory
    lr: float = 3e-3  # peak learning rate (official README); 5e-4 for CLIP alone
    min_lr: float = 1e-5  # learning rate at the end of the cosine (official main.py)
    warmup_epochs: float = 1.0  # linear warm-up from 1e-6; 2 for 100 epochs (paper)
    weight_decay: float = 0.1  # on all but gains and biases (official README); 0.5 for CLIP alone
    beta2: float = 0.98  # AdamW's beta2 (official main.py; CLIP Table 18)
    eps: float = 1e-8  # AdamW's epsilon (official main.py)
    clip_grad: float = 0.0  # largest gradient norm (0: off, as in the official code)
    gather_grad: bool = True  # gradient through features gathered for L_clip (official: without)
    init: str = ""  # weights to start from: a run, released weights, a backbone (docs/init.md)
    freeze: Literal["", "image", "text"] = ""  # encoder that stays as --init left it
    seed: int = 0  # random seed of weights, order, crops and choice of captions
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on GPUs, else fp32


SMALL = dict(text_width=128, text_layers=3, embed_dim=128, context_length=32, tokenizer="train")
SMALL |= dict(batch_size=128, lr=1e-3, warmup_epochs=0.2, ssl_mlp_dim=512, ssl_emb_dim=64)
# our choice for photos with several captions each: no published run trains on these alone
PHOTOS = dict(arch="vit_small_patch16", text_layers=6, tokenizer="train", vocab_size=16384)
PHOTOS |= dict(epochs=30, batch_size=1024, lr=1e-3, warmup_epochs=2.0)
# Beside an entry: the official README's ImageNet zero-shot accuracy after this run. CC3M has the
# hyperparameters of YFCC15M, as its authors say (official issue 9, where users report 18.4%); but
# the released file holds weight decay 0.5, is from epoch 36 and had 2 epochs of warm-up (issue 15).
LARGE = dict(eval_data="imagenet", grad_checkpointing="selective")  # to fit 8 GPUs of 80 GB
RECIPES = {
    "shapes": dict(SMALL, arch="vit_micro_patch12", image_size=48, vocab_size=1024, text_layers=2,
                   epochs=2),
    "flickr8k": dict(SMALL, arch="vit_micro_patch16", image_size=112, vocab_size=4096, epochs=30),
    "flickr30k": PHOTOS,
    "coco": PHOTOS,
    "cc3m": dict(LARGE, epochs=40),  # 23.0%
    "cc12m": dict(LARGE, epochs=35),  # 40.7%
    "yfcc15m": LARGE,  # 42.8%
    "redcaps": dict(LARGE, epochs=35),  # our choice, that of cc12m: no published run
}
RECIPES |= dict.fromkeys(("multi30k-en", "multi30k-de", "multi30k-fr", "multi30k-cs"), PHOTOS)


# ---------------------------------------- augmentation ----------------------------------------
# Copied from clip.py: LanguageView
class LanguageView:
    """The image beside a caption: a random crop (CLIP Sec. 2.3). It is not flipped, since captions
    say left and right."""

    def __init__(self, size, scale=(0.9, 1.0), interpolation="bicubic",
                 mean=(0.48145466, 0.4578275, 0.40821073),
                 std=(0.26862954, 0.26130258, 0.27577711)):
        self.size = size
        self.scale = scale
        self.interpolation = interpolation
        self.mean, self.std = mean, std

    def crop(self, image, rng):
        """In a loader worker: uint8 (3, H, W) -> uint8 (3, size, size). rng: random.Random."""
        return random_resized_crop(
            image, rng, self.size, self.scale, interpolation=self.interpolation
        )

    def sample(self, rng):
        """In a loader worker: what else is random about this view of this sample."""
        return {}

    def __call__(self, x, params):
        """For a batch: uint8 (b, 3, size, size) and stacked parameters -> normalised float."""
        return normalize(to_float(x), self.mean, self.std)


# Adapted from simclr.py: SimCLRView, weaker colours, crops resized bilinearly, normalised
class SSLView:
    """One view of L_ssl. The augmentation is that of the official main.py, MoCo v2's with crops
    from 8% of the area (SimCLR App. A); the paper says MoCo v3's, which also solarises."""

    def __init__(self, size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
        self.size = size
        self.mean, self.std = mean, std

    def crop(self, image, rng):
        """In a loader worker: uint8 (3, H, W) -> uint8 (3, size, size). rng: random.Random."""
        scale = (0.08, 1.0)
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


def eval_view(args) -> EvalView:
    return EvalView(args.image_size, None, "bilinear", IMAGENET_MEAN, IMAGENET_STD)


# ---------------------------------------- backbone ----------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention. (B, N, D) -> (B, N, D), or the first `queries` tokens of it."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, queries=None):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads) each
        x = F.scaled_dot_product_attention(q[:, :, :queries], k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block, timm's names. (B, N, D) -> (B, N, D), or the first `queries` tokens of it."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, 4 * dim))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * dim, dim))

    def forward(self, x, queries=None):
        x = x[:, :queries] + self.attn(self.norm1(x), queries)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """timm's ViT (official models.py): no norm before the blocks. (B, 3, S, S) -> (B, D), the class
    token after the last norm. In training the last block computes nothing else."""

    def __init__(self, image_size, patch_size, dim, depth, heads):
        super().__init__()
        tokens = (image_size // patch_size) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(3, dim, patch_size, stride=patch_size))
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, N, D)
        cls_token = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1) + self.pos_embed
        x = self.blocks[:-1](x)
        x = self.blocks[-1](x, queries=1 if self.training else None)
        return self.norm(x[:, 0])


# Copied from clip.py: QuickGELU
class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


# Copied from clip.py: ResidualAttentionBlock
class ResidualAttentionBlock(nn.Module):
    """Pre-norm block. (B, N, D) -> (B, N, D); with position (B,), one token each: (B, 1, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

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
        return x + self.mlp(self.ln_2(x))


# Copied from clip.py: Transformer
class Transformer(nn.Module):
    """mask: causal or none. (B, N, D) -> (B, N, D); with position (B,) of a token: (B, 1, D)."""

    def __init__(self, width, layers, heads):
        super().__init__()
        blocks = [ResidualAttentionBlock(width, heads) for _ in range(layers)]
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x, mask=None, position=None):
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x, mask)
        return last(x, mask, position)


# ---------------------------------------- model ----------------------------------------
class SLIP(nn.Module):
    """CLIP with a second head, image_mlp. train() applies it, so that its batch norm sees the
    features of the whole batch with --accum-steps too."""

    def __init__(self, embed_dim, visual, vision_width, context_length, vocab_size,
                 transformer_width, transformer_heads, transformer_layers, ssl_mlp_dim=4096,
                 ssl_emb_dim=256):
        super().__init__()
        self.visual = visual
        self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
        self.ln_final = nn.LayerNorm(transformer_width)
        image_projection = torch.randn(vision_width, embed_dim) * vision_width**-0.5
        self.image_projection = nn.Parameter(image_projection)
        self.text_projection = nn.Parameter(torch.empty(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # t; CLIP Sec. 2.5
        # three layers, in SimCLR two (its Sec. 2.1); no batch norm at the end (official models.py)
        self.image_mlp = nn.Sequential()
        self.image_mlp.add_module("layer1", nn.Linear(vision_width, ssl_mlp_dim))
        self.image_mlp.add_module("bn1", nn.BatchNorm1d(ssl_mlp_dim))
        self.image_mlp.add_module("relu1", nn.ReLU())
        self.image_mlp.add_module("layer2", nn.Linear(ssl_mlp_dim, ssl_mlp_dim))
        self.image_mlp.add_module("bn2", nn.BatchNorm1d(ssl_mlp_dim))
        self.image_mlp.add_module("relu2", nn.ReLU())
        self.image_mlp.add_module("layer3", nn.Linear(ssl_mlp_dim, ssl_emb_dim))
        init_text(self)

    def encode_image(self, image):
        """(B, 3, S, S) -> (B, E), not normalised."""
        return self.visual(image) @ self.image_projection

    def encode_text(self, text):
        """(B, N <= context_length) token ids, padded after the end -> (B, E), not normalised."""
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
        end = text.argmax(dim=-1)  # position of the end token, which has the largest id
        x = self.transformer(x, mask, end)  # (B, 1, D)
        x = self.ln_final(x[:, 0])
        return x @ self.text_projection

    def forward(self, image, text, *views):
        """-> embeddings of image and text (B, E), features of each view (B, D), for image_mlp."""
        image, *features = self.visual(torch.cat([image, *views])).chunk(1 + len(views))
        return image @ self.image_projection, self.encode_text(text), *features


# Copied from clip.py: init_text
def init_text(model):
    """Initialises the text side in place, as OpenAI's code does."""
    width = model.text_projection.shape[0]
    layers = len(model.transformer.resblocks)
    std = width**-0.5
    std_out = std * (2 * layers) ** -0.5  # of the last layer of each residual branch
    nn.init.normal_(model.token_embedding.weight, std=0.02)
    nn.init.normal_(model.positional_embedding, std=0.01)
    nn.init.normal_(model.text_projection, std=std)
    for block in model.transformer.resblocks:
        nn.init.normal_(block.attn.in_proj_weight, std=std)
        nn.init.normal_(block.attn.out_proj.weight, std=std_out)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=std_out)


# layers, width, heads; vit_small has 12 heads as in MoCo v3, not 6 (smaller ViTs: our own)
ARCHS = {
    "vit_micro": (4, 128, 4),
    "vit_tiny": (12, 192, 3),
    "vit_small": (12, 384, 12),
    "vit_base": (12, 768, 12),
    "vit_large": (24, 1024, 16),
}


def build_model(args) -> SLIP:
    """Raises UserError for an unknown --arch and for sizes that do not fit together."""
    name, _, patch = args.arch.partition("_patch")
    if name not in ARCHS or not patch.isdecimal() or int(patch) == 0:
        names = ", ".join(ARCHS)
        raise UserError(f"--arch {args.arch} is unknown, choose one of {names}, with _patchP")
    patch_size = int(patch)
    if args.image_size % patch_size:
        raise UserError(
            f"--image-size {args.image_size} is not a multiple of {patch_size} ({args.arch})"
        )
    layers, width, heads = ARCHS[name]
    text_width = args.text_width
    if text_width % 64:
        raise UserError(f"--text-width {text_width} is not a multiple of 64, the width of a head")
    visual = VisionTransformer(args.image_size, patch_size, width, layers, heads)
    return SLIP(
        args.embed_dim, visual, width, args.context_length, args.vocab_size, text_width,
        text_width // 64, args.text_layers, args.ssl_mlp_dim, args.ssl_emb_dim,
    )  # fmt: skip


def image_encoder(model: SLIP) -> nn.Module:
    """Module from images to pooled features (B, D), before the projection."""
    return model.visual


# ---------------------------------------- loss ----------------------------------------
# Copied from clip.py: clip_loss
def clip_loss(image_embed, text_embed, logit_scale, gather_grad=True):
    """Symmetric cross-entropy (Fig. 3 of CLIP) over the global batch, in nats; chance level ln B.

    image_embed, text_embed: (b, E) of this process, any length; logit_scale: s = exp(t), a number
    or 0-dim tensor. Call it outside autocast, whose products are in half precision. Returns the
    mean over this process's rows: the mean over processes is the loss of the global batch. Memory
    grows with b x B. gather_grad=False: gathered features are constants, as in the official SLIP
    code; with several processes each feature then learns as an anchor only."""
    image = F.normalize(image_embed.float(), dim=-1)  # (b, E)
    text = F.normalize(text_embed.float(), dim=-1)
    all_image, all_text = all_gather(image), all_gather(text)  # (B, E)
    b, first = len(image), 0
    if len(all_image) > b:
        first = b * torch.distributed.get_rank()
        if not gather_grad:
            all_image, all_text = all_image.detach(), all_text.detach()
    labels = torch.arange(first, first + b, device=image.device)
    loss_image = F.cross_entropy(logit_scale * image @ all_text.T, labels)
    loss_text = F.cross_entropy(logit_scale * text @ all_image.T, labels)
    return (loss_image + loss_text) / 2


# Copied from simclr.py: nt_xent_loss
def nt_xent_loss(z1, z2, temperature):
    """NT-Xent (SimCLR Eq. 1) over the global batch, in nats; chance level ln(2B - 1).

    z1, z2: (b, E) of this process, the two views of the same b images, any length and dtype.
    Call it outside autocast, whose products are in half precision. Returns the mean over this
    process's 2b views: the mean over processes is the loss of the global batch. Memory grows with
    b x B."""
    z1, z2 = F.normalize(z1.float(), dim=-1), F.normalize(z2.float(), dim=-1)  # (b, E)
    all_z1, all_z2 = all_gather(z1), all_gather(z2)  # (B, E)
    b, first = len(z1), 0
    if len(all_z1) > b:
        first = b * torch.distributed.get_rank()
    labels = torch.arange(first, first + b, device=z1.device)  # column of the other view of row i
    itself = F.one_hot(labels, len(all_z1)).bool()  # (b, B)
    same1 = (z1 @ all_z1.T / temperature).masked_fill(itself, float("-inf"))
    same2 = (z2 @ all_z2.T / temperature).masked_fill(itself, float("-inf"))
    loss1 = F.cross_entropy(torch.cat([z1 @ all_z2.T / temperature, same1], dim=1), labels)
    loss2 = F.cross_entropy(torch.cat([z2 @ all_z1.T / temperature, same2], dim=1), labels)
    return (loss1 + loss2) / 2


# ---------------------------------------- training ----------------------------------------
# Copied from clip.py: replay_backward
def replay_backward(model: nn.Module, encode, loss_of, pieces: list, scaler) -> tuple:
    """Exact gradient of a loss over a batch whose activations exceed the memory (GradCache, arXiv
    2101.06983).

    The features of all pieces are computed without graph; the loss sees all of them and gives
    their gradient; then each piece is encoded again to carry that gradient into the encoder.
    pieces: tuples of inputs; encode(*piece) -> tuple of (b, ...) tensors; loss_of(*features) ->
    (loss, anything), which is returned. Needs an encoder without dropout whose pieces do not see
    each other, and a `model` without DDP: gradients are averaged over the processes here."""
    with torch.no_grad():
        encoded = [encode(*piece) for piece in pieces]
    features = []  # of the whole batch, in the order in which encode() returns them
    for parts in zip(*encoded):
        features.append(torch.cat(parts).requires_grad_())
    loss, terms = loss_of(*features)
    scaler.scale(loss).backward()
    first = 0
    for piece in pieces:
        outputs = encode(*piece)
        last = first + len(outputs[0])
        learned = [x for x in outputs if x.requires_grad]  # not those of a frozen encoder
        grads = [f.grad[first:last] for x, f in zip(outputs, features) if x.requires_grad]
        torch.autograd.backward(learned, grads)
        first = last
    if world_size() > 1:
        for p in model.parameters():
            if p.grad is not None:
                p.grad = all_reduce_mean(p.grad)
    return loss, terms


def train(args: Args) -> dict:
    """Trains and returns the last evaluation. Raises UserError for mistakes the user can fix."""
    device = init_distributed(args.device)
    torch.manual_seed(args.seed)
    autocast, scaler = mixed_precision(args.dtype, device)

    # data
    dataset = open_dataset(args.data, args.data_dir)
    val = language_set(args)
    source = captions(dataset) if args.tokenizer == "train" else None
    vocab_size = args.vocab_size
    tokenizer = Tokenizer(args.tokenizer, args.context_length, source, vocab_size, args.data_dir)
    if tokenizer.eot != tokenizer.vocab_size - 1:
        raise UserError(f"--tokenizer {args.tokenizer} has an end token that is not its largest id")
    area = (0.5, 1.0)  # official main.py: at least half of the image
    views = {"image": LanguageView(args.image_size, area, "bilinear", IMAGENET_MEAN, IMAGENET_STD)}
    if args.ssl_scale:
        view = SSLView(args.image_size)
        views |= {"view1": view, "view2": view}
    texts = {"text": tokenizer}
    loader = Loader(dataset, views, texts, args.batch_size, args.seed, args.workers, device)
    b = args.batch_size // world_size()

    # model and optimizer
    model = sync_batchnorm(build_model(args), device).to(device)
    init_weights(model, args, tokenizer)
    if b % args.accum_steps:
        raise UserError(f"--accum-steps {args.accum_steps} does not divide a process's {b} samples")
    checkpoint_blocks(model, args.grad_checkpointing, Block, ResidualAttentionBlock)
    if args.compile:
        model.compile()
    if not args.ssl_scale:  # DDP would wait for its gradient
        model.image_mlp.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]  # all but those of --freeze
    decay = [p for p in trained if p.ndim >= 2]
    no_decay = [p for p in trained if p.ndim < 2]  # norms, biases, logit scale
    groups = [
        {"params": decay, "weight_decay": args.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    betas = (0.9, args.beta2)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=betas, eps=args.eps, fused=True)

    # run directory; continues from its checkpoint if it has one
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = Run("slip", args, loader, state, {"tokenizer": tokenizer.to_json()})
    warmup = round(args.warmup_epochs * loader.steps_per_epoch)
    wrap = world_size() > 1 and args.accum_steps == 1  # replay_backward averages by itself
    ddp = DistributedDataParallel(model) if wrap else model
    clip_chance = math.log(args.batch_size)
    ssl_chance = math.log(2 * args.batch_size - 1)
    chance = clip_chance + args.ssl_scale * ssl_chance

    def encode(image, text, *augmented):
        with autocast:
            return ddp(image, text, *augmented)

    def loss_of(image_embed, text_embed, *features):
        scale = model.logit_scale.exp()
        clip = clip_loss(image_embed, text_embed, scale, args.gather_grad)
        if not features:  # --ssl-scale 0
            return clip, {"loss": (clip, chance)}
        features1, features2 = features
        with autocast:  # not in forward: batch norm sees the whole batch, each view on its own
            view1_embed = model.image_mlp(features1)
            view2_embed = model.image_mlp(features2)
        ssl = nt_xent_loss(view1_embed, view2_embed, args.temperature)
        loss = clip + args.ssl_scale * ssl  # Algorithm 1
        terms = {"clip_loss": (clip, clip_chance), "ssl_loss": (ssl, ssl_chance)}
        return loss, {"loss": (loss, chance), **terms}

    if val and not run.evaluation and run.due(args.eval_every):  # random weights, or one cut off
        run.log_evaluation(language_eval(model, tokenizer, val, eval_view(args), device))

    for step, batch in run.batches():
        image, *augmented = (batch[name] for name in views)
        inputs = image, batch["text"], *augmented
        lr = warmup_cosine(
            step, run.total, warmup, args.lr, start=1e-6, end=args.min_lr, reach_peak=True
        )
        for group in optimizer.param_groups:
            group["lr"] = lr

        if args.accum_steps == 1:
            loss, terms = loss_of(*encode(*inputs))
            scaler.scale(loss).backward()
        else:
            pieces = list(zip(*[x.chunk(args.accum_steps) for x in inputs]))
            loss, terms = replay_backward(model, encode, loss_of, pieces, scaler)
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            # s <= 100 (CLIP Sec. 2.5), and s >= 1 (official main.py)
            model.logit_scale.clamp_(0, math.log(100))

        run.end_step(terms, logit_scale=model.logit_scale.detach().exp(), lr=lr)
        if run.agree_to_stop() or run.due(args.save_every, args.keep_every):
            run.save()
        if val and run.due(args.eval_every):
            run.log_evaluation(language_eval(model, tokenizer, val, eval_view(args), device))

    return run.finish("zeroshot", val)


if __name__ == "__main__":
    with user_errors():
        train(parse_args(Args, RECIPES))
