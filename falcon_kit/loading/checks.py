"""Refuses settings of `load` that do not go together, before anything is downloaded."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import FalconForCausalLM

from falcon_kit.catalogue.memory import QUANTISED
from falcon_kit.display.errors import unknown_name
from falcon_kit.display.tables import format_bytes
from falcon_kit.loading.checkpoints import Checkpoint
from falcon_kit.loading.quantization import (
    stored_quantisation,
)
from falcon_kit.model import modeling

ATTENTIONS = {"grouped": modeling.FalconForCausalLM, "transformers": FalconForCausalLM}


def check_settings(dtype: str | None, device_map: Any, max_memory: Any, attention: str, offload: str | None) -> None:
    """Raises ValueError for words that are not known, and for settings that do not go together."""
    if attention not in ATTENTIONS:
        raise ValueError(
            f"attention {attention!r} is not one of {', '.join(ATTENTIONS)}; sdpa, eager or flash-attention are chosen "
            "by model.set_attn_implementation"
        )
    if dtype in QUANTISED and attention != "grouped":
        raise ValueError(
            f"dtype={dtype!r} has no effect on transformers' own Falcon, whose linear layers bitsandbytes passes over: "
            "leave attention at 'grouped'"
        )
    if dtype in QUANTISED and offload:
        raise ValueError(
            f"dtype={dtype!r} with offload={offload!r}: bitsandbytes computes where its weights lie, so quantised "
            "layers cannot visit a GPU: use max_memory and more devices, or dtype='bfloat16' with offload"
        )
    if offload and device_map not in (None, "auto"):
        raise ValueError(f"offload={offload!r} places the layers itself: leave device_map={device_map!r} out")
    if max_memory is not None and device_map not in (None, "auto"):
        raise ValueError(f"max_memory is what the plan's own map goes by: leave it or device_map={device_map!r} out")
    if isinstance(device_map, str):
        check_device(device_map)


def check_device(device_map: str) -> None:
    """Raises ValueError for a device that there is not, with those there are."""
    known = ["auto", "balanced", "balanced_low_0", "sequential", "cpu"]
    known += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    known += ["cuda"] if torch.cuda.is_available() else []
    known += ["mps"] if torch.backends.mps.is_available() else []
    if device_map.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device_map={device_map!r}, but torch finds no GPU here: leave it out to use the CPU")
    if device_map not in known:
        raise ValueError(unknown_name("device_map", device_map, known))


def check_adapters(found: Checkpoint, offload: str | None) -> None:
    """Raises ValueError where adapters cannot be added to the weights as they are read."""
    merge = "fk.merge(adapter, base, output_dir=...) writes a checkpoint that can"
    if found.adapters and offload == "disk":
        raise ValueError(f"offload='disk' reads weights where they lie, so {found.spec.name} cannot: {merge}")
    if found.adapters and (quantised := stored_quantisation(found.config)):
        raise ValueError(
            f"{found.spec.name} is an adapter for {found.directory}, whose weights are kept in {quantised}: added to "
            "those, it would be rounded away. fk.merge(adapter, base) with the unquantised base"
        )


def check_disk(folder: Path, needed: int) -> None:
    """Raises OSError where offloaded weights would not fit on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"offload='disk' writes up to {format_bytes(needed)} of pickled weights to {folder}, where "
            f"{format_bytes(free)} are free: give offload_folder on a larger disk, or convert the checkpoint to "
            "safetensors, which are read where they are"
        )
