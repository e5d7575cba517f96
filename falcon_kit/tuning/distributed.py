"""Training in several processes: what each of them is, and weights sharded over all of them.

With copies (DDP) every process holds the whole model and they average gradients. Sharded (FSDP2, torch's
`fully_shard`), each holds its part of every layer and fetches the rest while it computes; that is for models which one
device does not hold. Shards are saved and read as shards (torch's distributed checkpoints).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

_ADAPTERS = StateDictOptions(ignore_frozen_params=True, strict=False)
_WHOLE = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, cpu_offload=True)


def world_size() -> int:
    """How many processes `torchrun` or `accelerate launch` started, by what they left in the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that reports."""
    return int(os.environ.get("RANK", "0")) == 0


def wait(cpu: bool) -> None:
    """Until all processes are here, where there are several."""
    if world_size() > 1:
        PartialState(cpu=cpu).wait_for_everyone()


def broadcast_from_rank0(value: bool, cpu: bool) -> bool:
    """What the first process decided, in each of them; all have to call it."""
    PartialState(cpu=cpu)  # makes the group, where there are several
    return bool(broadcast_object_list([value])[0])


def check_processes(running: int, started: int) -> None:
    """Raises RuntimeError where processes do not know of each other: each would train alone, and overwrite the rest."""
    if running != started:
        raise RuntimeError(
            f"{started} processes were started, but {running} train together: start them with `torchrun "
            "--nproc-per-node N`, on CPUs with ACCELERATE_USE_CPU=true set"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise RuntimeError(
            "accelerate was told to shard (use_fsdp), which on CPUs it silently does not: leave it to "
            "fk.tune(..., shard=True), and launch with distributed_type MULTI_GPU, as in configs/accelerate_8gpu.yaml"
        )


def shard(model: nn.Module, layers: nn.ModuleList, device: str) -> None:
    """Shards the parameters of a model over all processes, in place: each layer by itself, then what remains.

    Raises RuntimeError without other processes, or where parameters did not become shards.
    """
    if not dist.is_initialized() or dist.get_world_size() < 2:
        raise RuntimeError(
            "shard=True needs several processes: start them with `torchrun --nproc-per-node 8 configs/tune.py ...`"
        )
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    whole = [name for name, each in model.named_parameters() if not isinstance(each, DTensor)]
    if whole:
        raise RuntimeError(f"{len(whole)} parameters are not sharded, such as {whole[0]}")


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are shards."""
    return isinstance(model, FSDPModule)  # parameters that are in use are whole for a moment


def whole_adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters, gathered on the first process; the others get nothing. All have to call it."""
    whole: Any = get_model_state_dict(model, options=_WHOLE)
    return dict(whole)


def save_shards(model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Trained parameters and the state of the optimizer; each process writes its own part."""
    weights, state = get_state_dict(model, optimizer, options=_ADAPTERS)
    save({"model": weights, "optimizer": state}, checkpoint_id=directory)


def load_shards(model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Reads what `save_shards` wrote, in place."""
    weights, state = get_state_dict(model, optimizer, options=_ADAPTERS)
    held: dict[str, Any] = {"model": weights, "optimizer": state}
    load(held, checkpoint_id=directory)
    set_state_dict(
        model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"], options=_ADAPTERS
    )


@contextmanager
def without_reduction(model: Any) -> Iterator[None]:
    """Gradients stay where they are until the last batch of a step."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
