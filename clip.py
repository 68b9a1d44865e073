"""CLIP: Learning Transferable Visual Models From Natural Language Supervision
(Radford et al. 2021, arXiv 2103.00020).

An image encoder and a text encoder are trained so that, among the B x B pairings of a batch, the B
true pairs have the highest cosine similarity. The text encoder then turns class names into a
classifier for any set of classes.

Loss (Fig. 3), with image embeddings I and text embeddings T of unit length, logit scale s = exp(t):
    L = 1/2 [ CE(s I T^T, y) + CE(s T I^T, y) ],  y = (0, ..., B-1),  chance level ln B
B global batch, b = B / processes, N tokens, D width of a transformer, E of an embedding, S image
size.

Laptop        torchrun clip.py
1 GPU         torchrun clip.py --data flickr8k
8 GPUs        torchrun --nproc_per_node=8 clip.py --data yfcc15m
Own data      torchrun clip.py --data path/to/captions.csv --recipe flickr8k

Models and parameter names are OpenAI's, so its checkpoints load strictly
(evaluation.weights.load_released). OpenAI published no training code; where the paper leaves
something open, this file does what open_clip does. Differences:
 - Gathered features carry gradient: every process count trains with the gradient of the global
   batch (open_clip: --local-loss --gather-with-grad). --no-gather-grad lets it flow through the
   local side of each logit only.
 - The loss is computed in float32, whatever --dtype is; weights are float32 (the paper keeps some
   in half precision).
 - The crop is open_clip's RandomResizedCrop of 90 to 100% of the area; the paper says "a random
   square crop".
 - The warm-up starts from a rate of 1e-6, as SLIP's does; open_clip's starts from lr divided by
   the number of warm-up steps.
 - --accum-steps is exact, see replay_backward.
 - Batch norm of a ResNet is over the global batch (open_clip: --use-bn-sync).

Diff against: nothing, this is where the language-image files start.
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
from data import CLIP_MEAN, CLIP_STD, Loader, Tokenizer, normalize, open_dataset
from data import random_resized_crop, to_float
from monitor import EvalView, captions, language_eval, language_set
from run import Run, RunArgs, init_weights, parse_args


# ---------------------------------------- arguments ----------------------------------------
@dataclass
class Args(RunArgs):
    data: str = "shapes"  # named dataset or path, see docs/data.md
    eval_data: str = ""  # dataset of the evaluation in the loop (default: the val split of --data)
    recipe: str = ""  # entry of RECIPES to use instead of the one named like --data
    arch: str = "vit_base_patch32"  # image encoder: a key of ARCHS, a ViT with _patchP behind it
    embed_dim: int = 0  # width of the joint embedding, E (0: the architecture's in Tables 19, 20)
    text_width: int = 0  # width of the text transformer, with heads of 64 (0: the architecture's)
    text_layers: int = 12  # blocks of the text transformer (Sec. 2.4)
    gelu: Literal["quick", "exact"] = "quick"  # OpenAI's approximation, or GELU as in LAION's CLIP
    context_length: int = 77  # tokens of a caption, start and end included (paper 76; its code 77)
    tokenizer: str = "clip"  # clip, train (on the captions), a tokenizer.json, merges .gz, hub name
    vocab_size: int = 49408  # rows of the token table; at most so many with --tokenizer train
    image_size: int = 224  # side of an image in pixels (288, 384, 448 for resnet50x4, x16, x64)
    epochs: int = 32  # passes over the data (Table 18)
    max_steps: int = 0  # stop after so many steps, without changing the schedule (0: run all of it)
    batch_size: int = 32768  # pairs of a step, over all processes and pieces (Table 18)
    accum_steps: int = 1  # encode a batch in so many pieces, with the exact gradient (ViT only)
    grad_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute to save memory
    lr: float = 5e-4  # peak learning rate, here that of ViT-B (Table 20)
    min_lr: float = 0.0  # learning rate at the end of the cosine (Sec. 2.5)
    warmup_epochs: float = 0.164  # warm-up from 1e-6: 2,000 steps of 32,768 in 400M (Table 18)
    weight_decay: float = 0.2  # on all but gains and biases (Table 18)
    beta2: float = 0.98  # AdamW's beta2 for ViTs; 0.999 for ResNets (Table 18)
    eps: float = 1e-6  # AdamW's epsilon for ViTs; 1e-8 for ResNets (Table 18)
    clip_grad: float = 0.0  # largest gradient norm (0: off, as in the paper)
    gather_grad: bool = True  # gradient through gathered features, exact for any process count
    init: str = ""  # weights to start from: a run, released weights, a backbone (docs/init.md)
    freeze: Literal["", "image", "text"] = ""  # encoder that stays as --init left it
    seed: int = 0  # random seed of weights, order, crops and choice of captions
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on GPUs, else fp32


SMALL = dict(text_width=128, text_layers=3, embed_dim=128, context_length=32, tokenizer="train")
SMALL |= dict(batch_size=128, lr=1e-3, warmup_epochs=0.2)
# our choice for photos with several captions each: no published run trains on these alone
PHOTOS = dict(arch="vit_small_patch16", text_layers=6, tokenizer="train", vocab_size=16384)
PHOTOS |= dict(epochs=30, batch_size=1024, lr=1e-3, warmup_epochs=2.0)
# hyperparameters of the CLIP baseline of SLIP (arXiv 2112.12750). Its ImageNet zero-shot accuracy
# stands beside each entry; it comes from slip.py's ViT, crops and mean, so expect another here.
SLIPS = dict(arch="vit_base_patch16", eval_data="imagenet", batch_size=4096, warmup_epochs=1.0)
SLIPS |= dict(weight_decay=0.5, eps=1e-8, min_lr=1e-5)
RECIPES = {
    "shapes": dict(SMALL, arch="vit_micro_patch12", image_size=48, vocab_size=1024, text_layers=2,
                   epochs=2),
    "flickr8k": dict(SMALL, arch="vit_micro_patch16", image_size=112, vocab_size=4096, epochs=30),
    "flickr30k": PHOTOS,
    "coco": PHOTOS,
    "cc3m": dict(SLIPS, epochs=40),  # 17.1%
    "cc12m": dict(SLIPS, epochs=35),  # 36.5%
    "yfcc15m": dict(SLIPS, epochs=25),  # 37.6%
    "redcaps": dict(SLIPS, epochs=35),  # our choice, that of cc12m: no published run
}
RECIPES |= dict.fromkeys(("multi30k-en", "multi30k-de", "multi30k-fr", "multi30k-cs"), PHOTOS)


# ---------------------------------------- augmentation ----------------------------------------
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


def eval_view(args) -> EvalView:
    return EvalView(args.image_size, None, "bicubic", CLIP_MEAN, CLIP_STD)


# ---------------------------------------- backbone ----------------------------------------
class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


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


class VisionTransformer(nn.Module):
    """OpenAI's ViT (Sec. 2.4): no bias in the patch embedding, a norm before the first block.
    (B, 3, S, S) -> (B, E). In training the last block computes nothing but the class token."""

    def __init__(self, image_size, patch_size, width, layers, heads, embed_dim):
        super().__init__()
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        tokens = (image_size // patch_size) ** 2 + 1
        self.positional_embedding = nn.Parameter(scale * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def pool(self, x):
        """-> the class token after the last norm, (B, D): features of linear probes (Sec. 3.2)."""
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, N, D)
        class_token = self.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([class_token, x], dim=1) + self.positional_embedding
        place = x.new_zeros(len(x), dtype=torch.long)  # of the class token
        x = self.transformer(self.ln_pre(x), position=place if self.training else None)
        return self.ln_post(x[:, 0])

    def forward(self, x):
        return self.pool(x) @ self.proj


class Bottleneck(nn.Module):
    """ResNet-D block; its stride is an average pooling before the last convolution (Sec. 2.4)."""

    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = None
        if stride > 1 or inplanes != 4 * planes:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride))  # OpenAI's name
            self.downsample.add_module("0", nn.Conv2d(inplanes, 4 * planes, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(4 * planes))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(self.avgpool(x)))
        return F.relu(x + shortcut)


class AttentionPool2d(nn.Module):
    """Attention pooling (Sec. 2.4): the mean token is the only query. (B, D, H, W) -> (B, E)."""

    def __init__(self, grid, width, heads, embed_dim):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        self.heads = heads

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, D / heads)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # (B, HW, D)
        mean = x.mean(1, keepdim=True)
        x = torch.cat([mean, x], dim=1) + self.positional_embedding.to(x)
        q = self.split_heads(self.q_proj(x[:, :1]))
        k = self.split_heads(self.k_proj(x))
        v = self.split_heads(self.v_proj(x))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, 1, D / heads)
        return self.c_proj(x.flatten(1))


class ModifiedResNet(nn.Module):
    """ResNet with a stem of three convolutions and attention pooling (Sec. 2.4).
    (B, 3, S, S) -> (B, E)."""

    def __init__(self, image_size, layers, width, heads, embed_dim):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        inplanes = width
        for i, depth in enumerate(layers):
            planes = width * 2**i
            blocks = nn.Sequential()
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(Bottleneck(inplanes, planes, stride))
                inplanes = 4 * planes
            self.add_module(f"layer{i + 1}", blocks)
        self.attnpool = AttentionPool2d(image_size // 32, 32 * width, heads, embed_dim)
        for name, p in self.named_parameters():
            if name.endswith("_proj.weight"):
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            elif name.startswith("layer") and name.endswith("bn3.weight"):
                nn.init.zeros_(p)  # every residual branch starts at zero

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

    def pool(self, x):
        """-> (B, E), which is also the embedding: there is no projection after it."""
        return self(x)


# ---------------------------------------- model ----------------------------------------
class CLIP(nn.Module):
    """vision_layers: how many blocks a ViT has, or each of the four stages of a ResNet, whose
    vision_patch_size is None."""

    def __init__(self, embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size,
                 context_length, vocab_size, transformer_width, transformer_heads,
                 transformer_layers):
        super().__init__()
        if vision_patch_size is None:
            heads = vision_width * 32 // 64
            self.visual = ModifiedResNet(
                image_resolution, vision_layers, vision_width, heads, embed_dim
            )
        else:
            heads = vision_width // 64
            self.visual = VisionTransformer(
                image_resolution, vision_patch_size, vision_width, vision_layers, heads, embed_dim
            )
        self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
        self.ln_final = nn.LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(torch.empty(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # t; Sec. 2.5
        init_text(self)

    def encode_image(self, image):
        """(B, 3, S, S) -> (B, E), not normalised."""
        return self.visual(image)

    def encode_text(self, text):
        """(B, N <= context_length) token ids, padded after the end -> (B, E), not normalised."""
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
        end = text.argmax(dim=-1)  # position of the end token, which has the largest id
        x = self.transformer(x, mask, end)  # (B, 1, D)
        x = self.ln_final(x[:, 0])
        return x @ self.text_projection

    def forward(self, image, text):
        return self.encode_image(image), self.encode_text(text)


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


ARCHS = {  # Tables 19 and 20: embed_dim, layers, width, text_width (smaller ViTs: our own)
    "vit_micro": (128, 4, 128, 128),
    "vit_tiny": (256, 12, 192, 256),
    "vit_small": (384, 12, 384, 384),
    "vit_base": (512, 12, 768, 512),
    "vit_large": (768, 24, 1024, 768),
    "resnet50": (1024, (3, 4, 6, 3), 64, 512),
    "resnet101": (512, (3, 4, 23, 3), 64, 512),
    "resnet50x4": (640, (4, 6, 10, 6), 80, 640),
    "resnet50x16": (768, (6, 8, 18, 8), 96, 768),
    "resnet50x64": (1024, (3, 15, 36, 10), 128, 1024),
}


def build_model(args) -> CLIP:
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
    embed_dim, layers, width, text_width = ARCHS[name]
    embed_dim = args.embed_dim or embed_dim
    text_width = args.text_width or text_width
    if text_width % 64:
        raise UserError(f"--text-width {text_width} is not a multiple of 64, the width of a head")
    model = CLIP(
        embed_dim, args.image_size, layers, width, patch_size,
        args.context_length, args.vocab_size, text_width, text_width // 64, args.text_layers,
    )  # fmt: skip
    if args.gelu == "exact":
        for module in model.modules():
            if isinstance(module, ResidualAttentionBlock):
                module.mlp.gelu = nn.GELU()
    return model


def image_encoder(model: CLIP) -> nn.Module:
    """Module from images to pooled features: of a ViT those before the projection, of a ResNet
    those of the attention pooling."""

    class Pooled(nn.Module):
        def __init__(self, visual):
            super().__init__()
            self.visual = visual

        def forward(self, x):
            return self.visual.pool(x)

    return Pooled(model.visual)


# ---------------------------------------- loss ----------------------------------------
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


# ---------------------------------------- training ----------------------------------------
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
    views = {"image": LanguageView(args.image_size)}
    texts = {"text": tokenizer}
    loader = Loader(dataset, views, texts, args.batch_size, args.seed, args.workers, device)
    b = args.batch_size // world_size()

    # model and optimizer
    model = sync_batchnorm(build_model(args), device).to(device, memory_format=torch.channels_last)
    init_weights(model, args, tokenizer)
    if args.accum_steps > 1 and isinstance(model.visual, ModifiedResNet):
        raise UserError(
            f"--accum-steps cannot be exact for {args.arch}: batch norm must see the whole batch"
        )
    if b % args.accum_steps:
        raise UserError(f"--accum-steps {args.accum_steps} does not divide a process's {b} samples")
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
    betas = (0.9, args.beta2)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=betas, eps=args.eps, fused=True)

    # run directory; continues from its checkpoint if it has one
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = Run("clip", args, loader, state, {"tokenizer": tokenizer.to_json()})
    warmup = round(args.warmup_epochs * loader.steps_per_epoch)
    wrap = world_size() > 1 and args.accum_steps == 1  # replay_backward averages by itself
    ddp = DistributedDataParallel(model) if wrap else model
    chance = math.log(args.batch_size)

    def encode(image, text):
        with autocast:
            return ddp(image, text)

    def loss_of(image_embed, text_embed):
        scale = model.logit_scale.exp()
        loss = clip_loss(image_embed, text_embed, scale, args.gather_grad)
        return loss, {"loss": (loss, chance)}

    if val and not run.evaluation and run.due(args.eval_every):  # random weights, or one cut off
        run.log_evaluation(language_eval(model, tokenizer, val, eval_view(args), device))

    for step, batch in run.batches():
        inputs = batch["image"], batch["text"]
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
            # s <= 100 (Sec. 2.5), and s >= 1 as in open_clip
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
