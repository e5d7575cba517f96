"""The shards of a sharded run: trained weights and the optimizer's state, of which every process writes its own part.

They are torch's distributed checkpoints, whose list of tensors and whose numbers are pickles. torch reads these pickles
whatever they hold; here, one that holds more than torch writes is refused.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

_ADAPTERS = StateDictOptions(ignore_frozen_params=True, strict=False)
_LIST = ".metadata"
_OTHERS = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # of Python 3.13
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}
"""What torch writes into the list of tensors, beside dtypes and the classes of its module `metadata`."""


def save_shards(model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Saves the trained parameters and the optimizer's state; every process writes its own shard."""
    weights, state = get_state_dict(model, optimizer, options=_ADAPTERS)
    save({"model": weights, "optimizer": state}, checkpoint_id=directory)


def load_shards(model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Loads what `save_shards` saved into the model and the optimizer.

    Raises pickle.UnpicklingError for pickles that could run code, and what torch raises for other damage.
    """
    for path in directory.glob(f"*{_LIST}"):  # one for all ranks; torch would also read one of each rank
        with path.open("rb") as file:
            _List(file).load()
    weights, state = get_state_dict(model, optimizer, options=_ADAPTERS)
    loaded: dict[str, Any] = {"model": weights, "optimizer": state}
    try:
        load(loaded, checkpoint_id=directory, planner=_Planner())
    except CheckpointException as error:  # a BaseException, with the error of each rank that failed
        cause, _ = next(iter(error.failures.values()))
        raise cause from None
    set_state_dict(
        model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=_ADAPTERS
    )


class _List(pickle.Unpickler):
    """Reads the list of tensors, if it holds nothing but what torch writes there."""

    def find_class(self, module: str, name: str) -> Any:
        of_metadata = module == metadata.__name__ == getattr(vars(metadata).get(name), "__module__", None)
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if not (of_metadata or is_dtype or (module, name) in _OTHERS):
            raise pickle.UnpicklingError(f"{_LIST} is a pickle with {module}.{name}, which could run any code")
        return super().find_class(module, name)


class _Planner(DefaultLoadPlanner):
    """Reads the numbers of the optimizer, each a file of torch.save."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        checked = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)
