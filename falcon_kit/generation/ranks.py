"""What the ranks of a tensor-parallel model agree on while they generate."""

import threading

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


class SharedEvent(threading.Event):
    """Set once it is set on any rank of a tensor-parallel model: they ask together, and stop at the same token."""

    def __init__(self, ranks: DeviceMesh, device: torch.device) -> None:
        super().__init__()
        self._ranks, self._device = ranks, device

    def is_set(self) -> bool:
        """Whether any rank has set it; every rank has to ask."""
        return anywhere(super().is_set(), self._ranks, self._device)


def anywhere(flag: bool, ranks: DeviceMesh, device: torch.device) -> bool:
    """Whether the flag is up on any rank; every rank has to ask. `device` is this rank's own.

    The current one would be the first GPU on all ranks, in a thread that nobody told otherwise.
    """
    said = torch.tensor(int(flag), device=device)
    dist.all_reduce(said, dist.ReduceOp.MAX, group=ranks.get_group())
    return bool(said)


def shared_seed(ranks: DeviceMesh, device: torch.device) -> int:
    """A seed from the first rank's random state, the same on all ranks: they have to draw the same tokens."""
    seed = torch.randint(2**62, (1,)).to(device)
    dist.broadcast(seed, group=ranks.get_group(), group_src=0)
    return int(seed)
