"""Shared plumbing that belongs to no single paper: processes and what they exchange, batch norm
over all, precision, activation checkpointing, schedule, LARS. run.py writes experiments down."""

import contextlib
import math
import os
import re
import sys
import time
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint


class UserError(Exception):
    """A mistake that the user can fix. Its text is one sentence that says how."""


@contextlib.contextmanager
def user_errors():
    """Around a script's work: a mistake ends it with one sentence and status 2, not a traceback."""
    import trouble  # not above: scripts need it, functions that were pasted elsewhere do not
    out, err = trouble.Stream(1, sys.stdout), trouble.Stream(2, sys.stderr)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    except KeyboardInterrupt:  # it comes before a Run handles signals, so there is nothing to save
        out.flush()
        os._exit(130)
    except Exception as error:
        if not (text := trouble.sentence(error)):
            raise  # without leaving the group, which may take for ever, with no traceback printed
        out.flush()
        trouble.let_the_first_report(error)
        print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=err, flush=True)
        os._exit(2)  # without waiting for loader workers or for processes that still train
    finally:
        out.flush()
        if dist.is_initialized() and not isinstance(sys.exc_info()[1], Exception):
            time.sleep(0.2)  # gloo's threads free tensors; destroying them holds the GIL they need
            dist.destroy_process_group()


# -------------------------------------------- processes -----------------------------------------
def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def init_distributed(device: str = "") -> torch.device:
    """Joins the processes that torchrun started, if it did, and returns the device of this one:
    `device`, or the first of cuda, mps and cpu that this machine has. Raises UserError if the
    machine has no such device, or fewer GPUs than processes."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # gloo has no collectives on mps
    cuda, mps = torch.cuda.is_available(), alone and torch.backends.mps.is_available()
    names = ["cuda"] * cuda + ["mps"] * mps + ["cpu"]
    kind = device or names[0]
    if kind.split(":")[0] not in names or not re.fullmatch(r"\w+(:\d+)?", kind):
        raise UserError(f"--device {kind} is not available here, use {' or '.join(names)}")
    if kind.startswith("cuda"):
        kind = kind if ":" in kind else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        if int(kind[5:]) >= (count := torch.cuda.device_count()):
            raise UserError(f"no {kind} among {count} GPUs, lower --nproc_per_node or --device")
        torch.cuda.set_device(kind)
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        import trouble
        if wrong := trouble.launched(os.environ):
            raise UserError(wrong)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind.startswith("cuda") else "gloo")
        all_reduce_mean(torch.zeros(1))  # connects all, so one that leaves early disturbs no other
    return torch.device(kind)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        torch.distributed.all_reduce(grad)
        return grad.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def all_gather(x: torch.Tensor) -> torch.Tensor:
    """(b, ...), with the same b on all processes -> (world * b, ...) in the order of the ranks.
    The result carries gradient: what the losses of all processes say about this process's rows is
    summed. If every process takes the mean loss of its own rows and DDP averages the gradients,
    then the result is exactly the gradient of the global batch's mean loss. One process gets x."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return x
    return _AllGather.apply(x.contiguous())


def all_reduce_mean(x: torch.Tensor) -> torch.Tensor:
    """Mean over the processes, without gradient."""
    x = x.detach() / world_size()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


class GlooSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the global batch on CPUs, where torch has none. (b, C, ...) -> the same."""

    def forward(self, x):
        if not self.training:
            statistics = self.running_mean, self.running_var
            return nn.functional.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)
        x = x.float()  # statistics are computed in float32, as torch does
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        n = x.numel() // x.shape[1] * world_size()  # all processes hold equally many values
        mean = all_gather(x.sum(dims)[None]).sum(0) / n
        var = all_gather((x - mean.view(shape)).square().sum(dims)[None]).sum(0) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        x = (x - mean.view(shape)) * (var + self.eps).rsqrt().view(shape)
        x = x if self.weight is None else x * self.weight.view(shape)
        return x if self.bias is None else x + self.bias.view(shape)


def sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Makes every batch norm of `model` use the global batch's statistics. Parameter names stay."""
    if world_size() == 1:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = GlooSyncBatchNorm  # parameters and buffers stay, forward() changes
    return model


# -------------------------------------------- optimisation --------------------------------------
def mixed_precision(dtype: str, device: torch.device):
    """-> (autocast context, GradScaler). dtype "auto" means bf16 on GPUs that compute in it, fp16
    on older GPUs and fp32 elsewhere. The scaler acts only for fp16, whose range is too small."""
    if dtype == "auto" and device.type == "cuda":
        dtype = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    elif dtype == "auto":
        dtype = "fp32"
    low = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[dtype]
    # cast anew in each call: gradients of calls add up in fp32, and checkpoints recompute the same
    autocast = torch.autocast(device.type, low, enabled=low is not None, cache_enabled=False)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == "fp16")


def checkpoint_blocks(model: nn.Module, how: str, *classes):
    """Blocks of these classes keep less and compute the rest again, unchanged, in the backward pass
    (arXiv 1604.06174): "full" keeps inputs, "selective" matrix products and attention too."""
    if how == "none":
        return
    blocks = [block for block in model.modules() if isinstance(block, classes)]
    if not blocks:
        raise UserError("--grad-checkpointing is for transformer blocks, and this --arch has none")
    def policy(_, op, *args, **kwargs):  # mm, addmm, bmm and every kind of attention are kept
        kept = re.search("mm|attention", op.name())
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
    contexts = partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, policy)
    options = {"context_fn": contexts} if how == "selective" else {}
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)


def warmup_cosine(step, total, warmup, peak, start=0.0, end=0.0, reach_peak=False) -> float:
    """Value at a step that counts from 0: linear from `start` to `peak` over `warmup` steps, then
    half a cosine to `end` at step `total`, which is one after a run's last step. With reach_peak
    the last step of the warm-up already has the peak (an inclusive linspace, as in SLIP and DINO);
    without it the first step after the warm-up does (SimCLR)."""
    if step < warmup:
        return start + (peak - start) * step / max(1, warmup - reach_peak)
    angle = math.pi * (step - warmup) / max(1, total - warmup)
    return end + (peak - end) * 0.5 * (1 + math.cos(angle))


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888) with momentum, in two published forms.

    With gradient g, parameter p and momentum m, the direction is d = g + weight_decay p, multiplied
    by trust |p| / |d| (by 1 if either norm is 0). Then, with lr_in_momentum, v = m v + lr d and p
    -= v (SimCLR); otherwise v = m v + d and p -= lr v (BYOL, MoCo v3). The two differ whenever lr
    changes. A parameter group with exclude=True (biases, norms) is neither decayed nor scaled."""

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, trust=1e-3,
                 lr_in_momentum=False):  # fmt: skip
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust)
        super().__init__(params, defaults | dict(exclude=False, lr_in_momentum=lr_in_momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                d = p.grad
                if not group["exclude"]:
                    d = d + group["weight_decay"] * p
                    p_norm, d_norm = p.norm(), d.norm()
                    scale = group["trust"] * p_norm / d_norm
                    d = d * torch.where((p_norm > 0) & (d_norm > 0), scale, 1.0)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                v = state["momentum_buffer"].mul_(group["momentum"])
                if group["lr_in_momentum"]:
                    p.sub_(v.add_(d, alpha=group["lr"]))
                else:
                    p.sub_(v.add_(d), alpha=group["lr"])
