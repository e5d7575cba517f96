"""The ranks of tensor parallelism: what can be loaded on them, and what one process holds of a divided model.

transformers divides the weights while it reads them, as torch's DTensor; `modeling.py` and `layers.py` say how Falcon's
layers are divided.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging as transformers_logging

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # set by torchrun in each process


@dataclass(frozen=True)
class Rank:
    """One process of a `ParallelFalcon`, and the bytes it holds."""

    rank: int
    device: str
    """The device of its weights."""
    weight_bytes: int
    """Its part of the weights."""
    cache_bytes: int
    """Its part of the KV cache at the end of the last request."""


def check_request(ranks: int | None, on_cpu: bool, **others: Any) -> None:
    """Raises ValueError where a model cannot be loaded on `ranks` ranks here; None, for one process, always passes.

    on_cpu: whether the ranks leave GPUs alone. others: arguments of `load` that exclude tensor_parallel.
    `memory.check_tensor_parallel` checks whether the model's KV heads can be divided.
    """
    if ranks is None:
        return
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 2:
        raise ValueError(f"tensor_parallel={ranks!r}: give the number of ranks, 2 or more, or leave it out")
    if excluded := [f"{name}={value!r}" for name, value in others.items() if value]:
        raise ValueError(
            f"tensor_parallel={ranks} divides every layer of the model among the ranks: leave out {', '.join(excluded)}"
        )
    local = _local_ranks(ranks)
    if torch.cuda.is_available() and torch.cuda.device_count() < local and not on_cpu:
        on_the_cpu = "give device_map='cpu'" if needs_launch(ranks) else "start torchrun with CUDA_VISIBLE_DEVICES=''"
        raise ValueError(
            f"tensor_parallel={ranks} needs {local} GPUs here, torch finds {torch.cuda.device_count()}: to compute on "
            f"the CPU, {on_the_cpu}"
        )


def _local_ranks(ranks: int) -> int:
    """The number of ranks on this machine. Raises ValueError where a launcher's variables contradict `ranks`."""
    if present := [name for name in _LAUNCHER_VARIABLES if name in os.environ]:
        if missing := [name for name in _LAUNCHER_VARIABLES if name not in os.environ]:
            raise ValueError(
                f"{', '.join(present)} is set, as by a launcher, but not {', '.join(missing)}: start with torchrun "
                f"--nproc-per-node {ranks}, or remove it from the environment"
            )
        if (started := int(os.environ["WORLD_SIZE"])) != ranks:
            raise ValueError(
                f"tensor_parallel={ranks}, but the launcher started {started}: torchrun --nproc-per-node {ranks}"
            )
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


def needs_launch(ranks: int | None) -> bool:
    """Whether `launch` has to start the ranks: there are several, and no launcher started this process."""
    return ranks is not None and not any(name in os.environ for name in _LAUNCHER_VARIABLES)


@contextmanager
def placement(ranks: int | None) -> Iterator[dict[str, Any]]:
    """The arguments of `from_pretrained` with which each rank reads its part; none for one process."""
    if ranks is None:
        yield {}
        return
    logger = transformers_logging.get_logger("transformers.distributed.tensor_parallel")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it warns that LayerNorms are not divided, which is intended
    try:
        yield {"distributed_config": DistributedConfig(tp_size=ranks)}
    finally:
        logger.setLevel(before)


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's part of a divided tensor; a tensor that is not divided, as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
