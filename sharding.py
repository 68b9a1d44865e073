"""What models need that do not fit one GPU, with torch's own fully_shard; dinov2.py's --fsdp uses it."""

import torch
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from common import UserError, world_size


def parallel(model, blocks, fsdp=False):
    """What to call in place of the model, to be made before its optimizer. fsdp: parameters, gradients and
    optimizer are sharded over the processes, each of `blocks` whole only while it is computed; otherwise
    DistributedDataParallel, if there are several processes. Both average gradients over them."""
    if not fsdp:
        return DistributedDataParallel(model) if world_size() > 1 else model
    if not torch.distributed.is_initialized():
        raise UserError("--fsdp shards a model over several processes, start them with torchrun")
    for module in (*blocks, model):
        fully_shard(module)
    return model


class Gathered:
    """State of a sharded model, or of its optimizer, as a checkpoint holds it: whole tensors, on the CPU of
    the first process. All processes are to ask for it together."""

    def __init__(self, kind, *items):
        self.kind, self.items = kind, items

    def state_dict(self):
        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        return getattr(dcp, f"get_{self.kind}_state_dict")(*self.items, options=options)

    def load_state_dict(self, state):
        options = dcp.StateDictOptions(full_state_dict=True)
        getattr(dcp, f"set_{self.kind}_state_dict")(*self.items, state, options=options)


def checkpointed(model, optimizer, fsdp=False) -> dict:
    """A run's state: name -> object with state_dict and load_state_dict."""
    if not fsdp:
        return {"model": model, "optimizer": optimizer}
    return {"model": Gathered("model", model), "optimizer": Gathered("optimizer", model, optimizer)}


def whole(module, build):
    """The module itself or, of a sharded one, a copy with whole parameters; build() makes one like it."""
    state = module.state_dict()
    if not any(isinstance(value, DTensor) for value in state.values()):
        return module
    with torch.device("meta"):  # neither memory nor random numbers
        copy = build()
    state = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}
    copy.load_state_dict(state, assign=True)
    return copy
