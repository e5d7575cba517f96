"""Devices to plan for: those of this machine, or those that a few words name.

Neither torch nor transformers is imported, unless this machine's own GPUs are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from falcon_kit.display.errors import unknown_name
from falcon_kit.planning.environment import environment, find_devices, free_disk

MIB = 2**20
GPUS = {
    "T4": 15_360,
    "V100-16GB": 16_384,
    "A10G": 23_028,
    "L4": 23_034,
    "RTX-4090": 24_564,
    "A100-40GB": 40_960,
    "L40S": 46_068,
    "A100-80GB": 81_920,
    "H100-80GB": 81_559,
    "H200": 143_771,
}
"""MiB of memory, as nvidia-smi reports it."""
MACHINES = {
    "colab-t4": (1, "T4"),
    "colab-l4": (1, "L4"),
    "colab-a100": (1, "A100-40GB"),
    "ml.g4dn.xlarge": (1, "T4"),
    "ml.g4dn.12xlarge": (4, "T4"),
    "ml.g5.xlarge": (1, "A10G"),
    "ml.g5.2xlarge": (1, "A10G"),
    "ml.g5.12xlarge": (4, "A10G"),
    "ml.g5.48xlarge": (8, "A10G"),
    "ml.g6.xlarge": (1, "L4"),
    "ml.g6.12xlarge": (4, "L4"),
    "ml.g6.48xlarge": (8, "L4"),
    "ml.g6e.xlarge": (1, "L40S"),
    "ml.g6e.12xlarge": (4, "L40S"),
    "ml.g6e.48xlarge": (8, "L40S"),
    "ml.p3.2xlarge": (1, "V100-16GB"),
    "ml.p3.8xlarge": (4, "V100-16GB"),
    "ml.p4d.24xlarge": (8, "A100-40GB"),
    "ml.p4de.24xlarge": (8, "A100-80GB"),
    "ml.p5.48xlarge": (8, "H100-80GB"),
    "ml.p5e.48xlarge": (8, "H200"),
}
"""GPUs of Colab's runtimes and of SageMaker's instance types (aws.amazon.com/sagemaker/pricing)."""


@dataclass(frozen=True)
class Slot:
    """A device to put things on."""

    name: str
    """For people: "T4", "cpu"."""
    key: int | str
    """For a device map: the number of the GPU, or "cpu"."""
    free_bytes: int
    """Memory that may be used."""
    offload_target: bool = False
    """Layers are only kept here, and visit a GPU, or host memory, to be computed: host memory beside GPUs, or a disk.
    Such places come last."""


def find_slots(devices: str | Sequence[Slot] | None) -> tuple[Slot, ...]:
    """The devices that a word or nothing stands for; see `plan`."""
    if devices is None:
        here = environment()
        found = tuple(Slot(each.name, each.index, each.free_bytes) for each in here.devices if each.kind == "cuda")
        return found or (Slot("cpu", "cpu", here.available_bytes),)
    if not isinstance(devices, str):
        given: tuple[object, ...] = tuple(devices) if isinstance(devices, Sequence) else ()
        own = tuple(each for each in given if isinstance(each, Slot))
        if not own or len(own) < len(given):
            raise ValueError(
                f"devices={devices!r} names none: leave it out for this machine, or give '4x40GiB' or a list of Slot"
            )
        return own
    word = devices.strip().lower()
    for name, (count, gpu) in MACHINES.items():
        if word in (name, name.removeprefix("ml.")):
            return _alike(count, gpu, GPUS[gpu] * MIB)
    count_word, kind = re.fullmatch(r"(?:(\d+)\s*x\s*)?(.*)", word).groups()  # type: ignore[union-attr]  # .* fits anything
    if size := _bytes(kind):
        return _alike(int(count_word or 1), kind.upper().replace("I", "i"), size)
    for gpu in GPUS:
        if kind in (gpu.lower(), gpu.lower().removesuffix("gb")):
            return _alike(int(count_word or 1), gpu, GPUS[gpu] * MIB)
    raise ValueError(f"{unknown_name('devices', devices, [*GPUS, *MACHINES])} Or give a size, such as '4x40GiB'.")


def slots_of_ranks(own: int, ranks: int) -> tuple[Slot, ...]:
    """GPUs of `ranks` processes as one of them takes them to be: like its own, the only one whose memory it asks for.

    To ask the driver opens a context, and one of each process on each GPU would take gigabytes.
    """
    (found,) = find_devices(only=own)
    return tuple(Slot(found.name, index, found.free_bytes) for index in range(ranks))


def slots_here(
    max_memory: Mapping[int | str, int | str] | None = None, offload: str | None = None, folder: Path = Path()
) -> tuple[Slot, ...]:
    """The devices of this machine, for loading.

    max_memory: bytes, or words such as "20GiB", by GPU number, "cpu" or "disk": what is not named is not used. offload:
    "cpu" adds host memory behind the GPUs, "disk" the disk that `folder` is on behind that.
    Raises ValueError for a device that is not here, an unknown word, or an offload that leads nowhere.
    """
    slots = list(find_slots(None))
    if offload not in (None, "cpu", "disk"):
        raise ValueError(unknown_name("offload", str(offload), ("cpu", "disk")))
    if offload and slots[0].key != "cpu":
        slots.append(Slot("host memory", "cpu", environment().available_bytes, offload_target=True))
    elif offload == "cpu":
        raise ValueError("offload='cpu' is for layers that find no room on a GPU, and there is none here: try 'disk'")
    if offload == "disk":
        slots.append(Slot("disk", "disk", free_disk(folder), offload_target=True))
    if max_memory is None:
        return tuple(slots)
    keys = [slot.key for slot in slots]
    here = f"here are {', '.join(map(repr, keys))}"
    if not isinstance(max_memory, Mapping):
        raise ValueError(f"max_memory={max_memory!r} names no device: give {{{keys[0]!r}: '20GiB'}}; {here}")
    if unknown := [key for key in max_memory if key not in keys]:
        raise ValueError(f"max_memory names {unknown[0]!r}, but {here}")
    if not any(slot.key in max_memory for slot in slots if not slot.offload_target):
        raise ValueError(f"max_memory={dict(max_memory)!r} names no device that computes; {here}")
    return tuple(
        replace(slot, free_bytes=min(slot.free_bytes, _limit(max_memory[slot.key])))
        for slot in slots
        if slot.key in max_memory
    )


def _limit(size: int | str) -> int:
    """Bytes of a number, or of words such as "20GiB"."""
    count = _bytes(size.strip().lower()) if isinstance(size, str) else size
    if count is None or count < 1:
        raise ValueError(f"max_memory has {size!r}: give bytes, or a size such as '20GiB'")
    return count


def _bytes(words: str) -> int | None:
    """Bytes that words such as "40gib" or "1.5 gb" stand for; None if they are no size."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]i?b)", words)
    return int(float(size[1]) * _UNITS[size[2]]) if size else None


_UNITS = {f"{letter}{i}b": (1024 if i else 1000) ** power for power, letter in enumerate("kmgt", 1) for i in ("", "i")}


def _alike(count: int, name: str, size: int) -> tuple[Slot, ...]:
    if count < 1 or size < 1:
        raise ValueError(f"{count} x {name} is no memory to plan with: give at least one device")
    return tuple(Slot(name, index, size) for index in range(count))
