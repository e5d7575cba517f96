"""Tensor parallelism: every rank holds a part of each layer, so that all of them work on each token.

Under `torchrun` each process loads its part and runs the same program. From a notebook, worker processes are started,
the model lives there, and a `ParallelFalcon` speaks for it.

`ranks.py`: what a rank holds. `serving.py`: a worker's side. `launching.py`: the notebook's side.
"""

from falcon_kit.parallel.launching import ParallelFalcon, launch
from falcon_kit.parallel.ranks import Rank, check_request, needs_launch, own, own_bytes, placement
from falcon_kit.parallel.serving import serve

__all__ = [
    "ParallelFalcon",
    "Rank",
    "check_request",
    "launch",
    "needs_launch",
    "own",
    "own_bytes",
    "placement",
    "serve",
]
