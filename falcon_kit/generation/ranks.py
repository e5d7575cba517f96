"""State that the ranks of a tensor-parallel model share while they generate."""

import threading

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


class SharedEvent(threading.Event):
    """An event that is set for all ranks once one rank has set it, so that all stop after the same token."""

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        super().__init__()
        self._mesh, self._device = mesh, device

    def is_set(self) -> bool:
        """Whether any rank has set it. A collective operation: all ranks must call it together."""
        return any_rank(super().is_set(), self._mesh, self._device)


def any_rank(flag: bool, mesh: DeviceMesh, device: torch.device) -> bool:
    """Whether the flag is true on any rank. A collective operation: all ranks must call it together.

    `device` is this rank's device: in a new thread, the current CUDA device is the first GPU on every rank.
    """
    largest = torch.tensor(int(flag), device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=mesh.get_group())
    return bool(largest)


def shared_seed(mesh: DeviceMesh, device: torch.device) -> int:
    """A random seed, drawn on rank 0 and broadcast, so that all ranks sample the same tokens."""
    seed = torch.randint(2**62, (1,)).to(device)
    dist.broadcast(seed, group=mesh.get_group(), group_src=0)
    return int(seed)
