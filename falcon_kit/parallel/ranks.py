"""What a rank is: a process with a part of every layer, and what can be divided so.

transformers' own engine divides the weights while it reads them (torch's DTensor); how Falcon's layers are divided
stands in `modeling.py` and `layers.py`.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging as transformers_logging

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # what torchrun tells each process


@dataclass(frozen=True)
class Rank:
    """One process of a `ParallelFalcon`, and what it holds."""

    rank: int
    """Its number."""
    device: str
    """Where its part lies."""
    weight_bytes: int
    """Its part of the weights."""
    cache_bytes: int
    """Its part of the KV cache at the end of the last request."""


def check_request(ranks: int | None, **others: Any) -> None:
    """Refuses what cannot be loaded on `ranks` ranks here; `others` are arguments of `load` that do not go with it.

    None, for one process, is always right. `memory.check_tensor_parallel` checks the model's heads.
    Raises ValueError.
    """
    if ranks is None:
        return
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 2:
        raise ValueError(f"tensor_parallel={ranks!r}: give the number of ranks, 2 or more, or leave it out")
    if given := [f"{name}={value!r}" for name, value in others.items() if value]:
        raise ValueError(f"tensor_parallel={ranks} divides the kit's own model by itself: leave out {', '.join(given)}")
    local = _check_launcher(ranks)
    if torch.cuda.is_available() and torch.cuda.device_count() < local:
        raise ValueError(f"tensor_parallel={ranks} needs {local} GPUs here, torch finds {torch.cuda.device_count()}")


def _check_launcher(ranks: int) -> int:
    """Refuses what a launcher says otherwise; the number of ranks on this machine."""
    if found := [name for name in _LAUNCHED if name in os.environ]:
        if missing := [name for name in _LAUNCHED if name not in os.environ]:
            raise ValueError(
                f"{', '.join(found)} is set, as by a launcher, but not {', '.join(missing)}: start with torchrun "
                f"--nproc-per-node {ranks}, or remove it from the environment"
            )
        if (started := int(os.environ["WORLD_SIZE"])) != ranks:
            raise ValueError(
                f"tensor_parallel={ranks}, but the launcher started {started}: torchrun --nproc-per-node {ranks}"
            )
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


def needs_launch(ranks: int | None) -> bool:
    """Whether the ranks are still to be started, by `launch`; torchrun has, where it started this process."""
    return ranks is not None and not any(name in os.environ for name in _LAUNCHED)


@contextmanager
def placement(ranks: int | None) -> Iterator[dict[str, Any]]:
    """The arguments of `from_pretrained` that have each rank read its part; none for one process."""
    if ranks is None:
        yield {}
        return
    remarks = transformers_logging.get_logger("transformers.distributed.tensor_parallel")
    before, remarks.level = remarks.level, logging.ERROR  # that LayerNorms are not divided is no news
    try:
        yield {"distributed_config": DistributedConfig(tp_size=ranks)}
    finally:
        remarks.setLevel(before)


def own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its part where it is divided, else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers in this process, tied ones once."""
    return sum(own(tensor).nbytes for tensor in (*model.parameters(), *model.buffers()))
