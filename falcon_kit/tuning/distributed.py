"""Training in several processes: rank and world size, sharded weights.

With copies (DDP) every process has the whole model, and gradients are averaged. With shards (FSDP2, torch's
`fully_shard`) every process has a part of each layer and gathers the other parts during the computation, for models
that do not fit on one device. `shards.py` saves and loads them.

The processes may run on several machines. Rank 0 alone decides where the ranks could disagree, and an error of one is
raised in all, because a launcher only ends the processes of its own machine.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from falcon_kit.loading.quantization import is_quantised

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=30)  # as TrainingArguments.ddp_timeout; NCCL's own is 10
_GATHERED = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, cpu_offload=True)


def world_size() -> int:
    """The number of processes that `torchrun` or `accelerate launch` started (the environment variable WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank0() -> bool:
    """Whether this process has rank 0. Only that one prints, and writes files that are not shards."""
    return int(os.environ.get("RANK", "0")) == 0


def computes_on_cpu(model: Any, shard: bool | None) -> bool:
    """Whether the CPU computes; a model to be sharded over GPUs is loaded into host memory first."""
    if model.device.type != "cpu" or not torch.cuda.is_available():
        return bool(model.device.type == "cpu")
    return not shard if shard is not None else world_size() == 1 or is_quantised(model)


def join_group(cpu: bool) -> None:
    """Makes the process group, if there are several processes and it was not made before. cpu: the CPU computes."""
    if world_size() > 1:
        PartialState(cpu=cpu, timeout=_TIMEOUT)


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank. Every process has to call it."""
    return [value] if world_size() == 1 else list(gather_object([value]))


def broadcast_from_rank0(value: T) -> T:
    """The `value` of rank 0, in every process. Every process has to call it."""
    return gathered(value if is_rank0() else None)[0]  # type: ignore[return-value]  # the first is a T


@contextmanager
def together() -> Iterator[None]:
    """An error of one process in the block is raised in all at its end.

    Whoever waits for the failed process within the block learns of it only after `_TIMEOUT`, as where shards are
    gathered. Raises RuntimeError with the rank and machine of the process that failed.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001  # raised again below
        failure = error
    reports = gathered(failure and f"{socket.gethostname()}: {type(failure).__name__}: {failure}")
    if failure:
        raise failure
    for rank, report in enumerate(reports):
        if report:
            raise RuntimeError(f"process {rank} of {len(reports)} failed, so that all end. {report}")


def on_rank0(function: Callable[[], T]) -> T:
    """What a function returns in rank 0, in every process; an error of it is raised in all."""
    with together():
        value = function() if is_rank0() else None
    return broadcast_from_rank0(value)  # type: ignore[return-value]  # that of rank 0 is a T


def check_shared(directory: Path) -> None:
    """Raises OSError, in all processes, if one does not see what rank 0 writes in a directory."""
    if world_size() == 1:
        return
    with NamedTemporaryFile(dir=directory, prefix=".shared-") if is_rank0() else nullcontext() as file:
        name = broadcast_from_rank0(file and Path(file.name).name)
        found = gathered((socket.gethostname(), (directory / str(name)).exists()))
    if blind := sorted({host for host, sees in found if not sees}):
        raise OSError(
            f"output_dir={str(directory)!r} is not one folder for all processes: {', '.join(blind)} does not see what "
            f"rank 0 on {found[0][0]} writes there. Every process reads the checkpoints, so give the absolute path of "
            "a folder that all machines share (NFS, Lustre, EFS)"
        )


def check_processes(running: int, started: int) -> None:
    """Raises RuntimeError for processes without a common group: each would train alone and overwrite the others' files.

    running: the size of the process group. started: `world_size()`. Also refuses accelerate's own sharding.
    """
    if running != started:
        raise RuntimeError(
            f"{started} processes were started, but their group has {running}: start them with `torchrun "
            "--nproc-per-node N`, on CPUs with ACCELERATE_USE_CPU=true set"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise RuntimeError(
            "accelerate is configured to shard (use_fsdp), which it silently omits on CPUs: set fk.tune(shard=True) "
            "instead, and launch with distributed_type MULTI_GPU, as in configs/accelerate_8gpu.yaml"
        )


def shard(model: nn.Module, layers: nn.ModuleList, device: str) -> None:
    """Shards the parameters of a model over all processes, in place: each layer separately, then the remaining ones.

    Raises RuntimeError in a single process.
    """
    if not dist.is_initialized() or dist.get_world_size() < 2:
        raise RuntimeError(
            "shard=True needs several processes: start them with `torchrun --nproc-per-node 8 configs/tune.py ...`"
        )
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are shards."""
    return isinstance(model, FSDPModule)  # parameters in use are gathered, so their type does not tell


def gathered_adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters; of a sharded model gathered on rank 0, and empty on the other ranks. Every process has to
    call it."""
    if not is_sharded(model):
        return {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}
    state: Any = get_model_state_dict(model, options=_GATHERED)
    return dict(state)
