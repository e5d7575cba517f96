"""Devices to plan for: those of this machine, or GPUs and instance types by name.

Neither torch nor transformers is imported, unless the GPUs of this machine are read.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from falcon_kit.display.errors import LARGEST, is_number, is_whole, require, shown, unknown_name
from falcon_kit.planning.environment import Accelerator, find_accelerators, free_disk, host_memory
from falcon_kit.planning.machines import GPUS, MACHINES, Machine, count_and_kind, find_gpu, find_machine, unknown_device

MARGIN = 0.04
"""The share of a GPU's memory that a plan leaves free, for the fragments of torch's allocator and the buffers of
libraries. Assumed, not measured: the 40B in bfloat16 on four A10G, which is published as running, takes 95.5 percent of
the first one."""


@dataclass(frozen=True)
class Device:
    """A GPU, the CPU, or an offload target."""

    name: str
    """The name in texts and tables: "T4", "cpu"."""
    key: int | str
    """The key in a device map: the index of the GPU, "cpu" or "disk"."""
    free_bytes: int
    """Memory that the model may use."""
    offload_target: bool = False
    """Whether layers are only stored here (in host memory beside GPUs, or on disk) and copied to the first device to be
    computed. Offload targets come after all other devices."""
    host_bytes: int | None = None
    """Host memory beside the device, for offloading; None where it is not known."""
    machine: str = ""
    """The name of the machine that has the device, for a machine of `MACHINES`."""
    here: bool = False
    """Whether this machine has the device."""

    @property
    def safe_bytes(self) -> int:
        """Memory that a plan may fill: on a GPU, without `MARGIN`."""
        return self.free_bytes if self.key in ("cpu", "disk") else int(self.free_bytes * (1 - MARGIN))


def resolve_devices(devices: str | Sequence[Device] | None) -> tuple[Device, ...]:
    """The devices of the argument `devices` of `plan`. Raises ValueError for an unknown name."""
    if devices is None:
        found = [each for each in find_accelerators() if each.kind == "cuda"]
        return tuple(map(_gpu, found)) or (host_device(),)
    if isinstance(devices, str):
        return _named_devices(devices)
    given: tuple[object, ...] = tuple(devices) if isinstance(devices, Sequence) else ()
    checked = tuple(each for each in given if isinstance(each, Device))
    require(
        bool(checked) and len(checked) == len(given),
        f"devices={shown(devices)} names no device: leave it out for this machine, or give one text, such as "
        "'2xA100-80GB' or '4x40GiB', or a list of Device",
    )
    _check_own(checked)
    return checked


def _gpu(found: Accelerator) -> Device:
    return Device(found.name, found.index, found.free_bytes, host_bytes=host_memory()[1], here=True)


def host_device() -> Device:
    """The CPU of this machine, with the host memory that is free."""
    return Device("cpu", "cpu", host_memory()[1], here=True)


def _check_own(devices: Sequence[Device]) -> None:
    """Raises ValueError for a list of devices that no plan can be made of."""
    keys, targets = [device.key for device in devices], [device.offload_target for device in devices]
    require(not all(targets), "devices holds only offload targets: add a GPU or the CPU, which computes")
    require(targets == sorted(targets), "devices names an offload target before a device that computes: put it last")
    twice = [key for key in keys if keys.count(key) > 1]
    require(not twice, f"devices has the key {shown(next(iter(twice), None))} twice: give each Device a key of its own")
    for device in devices:
        known = device.machine in ("", *MACHINES)
        require(known, f"devices has a Device of the unknown machine {shown(device.machine)}: leave its machine out")


def _named_devices(words: str) -> tuple[Device, ...]:
    """The devices of a machine, or of a GPU or memory size with an optional count: "4x40GiB"."""
    if machine := find_machine(words):
        return devices_of(machine)
    if (size := _bytes(words.strip().lower())) is not None:
        return _equal_devices(1, _size_name(words.strip()), size)
    count, kind = count_and_kind(words)
    if (size := _bytes(kind)) is not None:
        return _equal_devices(count, _size_name(kind), size)
    if gpu := find_gpu(kind) or find_gpu(kind.removesuffix("s")):
        return _equal_devices(count, gpu, GPUS[gpu])
    raise ValueError(unknown_device(words))


def _size_name(size: str) -> str:
    return size.upper().replace("I", "i")


def devices_of(machine: Machine) -> tuple[Device, ...]:
    """The GPUs of a machine."""
    gpus = _equal_devices(machine.count, machine.gpu, GPUS[machine.gpu])
    return tuple(replace(each, host_bytes=machine.host_bytes, machine=machine.name) for each in gpus)


def devices_by_key(keys: Collection[int | str], folder: Path = Path()) -> tuple[Device, ...]:
    """The devices of this machine with these keys of a device map; the memory of no other GPU is read.

    folder: where the disk is. Beside a GPU, host memory only stores layers, as the disk always does.
    """
    indices = sorted(key for key in keys if isinstance(key, int))
    found = [each for index in indices for each in find_accelerators(only=index) if each.kind == "cuda"]
    devices = [*map(_gpu, found)] or [host_device()]
    if "cpu" in keys and found:
        devices.append(_host_target())
    if "disk" in keys:
        devices.append(_disk_target(folder))
    return tuple(devices)


def _host_target() -> Device:
    return replace(host_device(), name="host memory", offload_target=True)


def _disk_target(folder: Path) -> Device:
    return Device("disk", "disk", free_disk(folder), offload_target=True, here=True)


def identical_gpus(index: int, count: int) -> tuple[Device, ...]:
    """`count` GPUs that are all assumed equal to GPU `index`, the only one whose memory is read.

    For the ranks of tensor parallelism: reading the memory of a GPU creates a CUDA context there, and a context of each
    process on each GPU would take gigabytes.
    """
    (found,) = find_accelerators(only=index)
    return tuple(Device(found.name, key, found.free_bytes, here=True) for key in range(count))


def places(device_map: Any) -> set[str]:
    """The devices that a device map of `from_pretrained` names, as texts: None is the CPU."""
    found = device_map.values() if isinstance(device_map, Mapping) else ["cpu" if device_map is None else device_map]
    return {str(each) for each in found}


def local_devices(
    max_memory: Mapping[int | str, float | str] | None = None, offload: str | None = None, folder: Path = Path()
) -> tuple[Device, ...]:
    """The devices of this machine, for loading.

    max_memory: bytes, or a size such as "20GiB", by GPU index, "cpu" or "disk"; other devices are not used.
    offload: "cpu" adds host memory after the GPUs, "disk" adds that and the disk of `folder`.
    Raises ValueError for an unknown device or word, an unreadable size, or offload="cpu" without a GPU.
    """
    devices = list(resolve_devices(None))
    if offload not in (None, "cpu", "disk"):
        raise ValueError(unknown_name("offload", str(offload), ("cpu", "disk")))
    if offload and devices[0].key != "cpu":
        devices.append(_host_target())
    elif offload == "cpu":
        raise ValueError("offload='cpu' moves layers from a GPU to host memory, but there is no GPU here: try 'disk'")
    if offload == "disk":
        devices.append(_disk_target(folder))
    return tuple(devices) if max_memory is None else _limited(devices, max_memory)


def _limited(devices: Sequence[Device], max_memory: Mapping[int | str, float | str]) -> tuple[Device, ...]:
    """The devices that `max_memory` names, with at most this memory."""
    keys = [device.key for device in devices]
    available = f"this machine has {', '.join(map(repr, keys))}"
    if not isinstance(max_memory, Mapping):
        raise ValueError(f"max_memory={max_memory!r} is not a dict: give {{{keys[0]!r}: '20GiB'}}; {available}")
    if unknown := [key for key in max_memory if key not in keys]:
        raise ValueError(f"max_memory names {unknown[0]!r}, but {available}")
    if not any(device.key in max_memory for device in devices if not device.offload_target):
        raise ValueError(f"max_memory={dict(max_memory)!r} names only offload targets; {available}")
    return tuple(
        replace(device, free_bytes=min(device.free_bytes, _limit(max_memory[device.key])))
        for device in devices
        if device.key in max_memory
    )


def _limit(size: float | str) -> int:
    """The bytes of an entry of `max_memory`: a number, or a size such as "20GiB"."""
    count = _bytes(size.strip().lower()) if isinstance(size, str) else size
    if not is_number(count, 1, LARGEST):
        raise ValueError(f"max_memory has {shown(size)}: give bytes, or a size such as '20GiB'")
    return int(count)  # type: ignore[arg-type]  # a number, as was just checked


def _bytes(text: str) -> int | None:
    """The bytes of a size such as "40gib" or "1.5 gb"; None for other text. Raises ValueError for more than exist."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]i?b)", text)
    count = float(size[1]) * _UNITS[size[2]] if size else None
    require(count is None or count <= LARGEST, f"{shown(text)} is more than any device has: at most 2**63 - 1 bytes")
    return None if count is None else int(count)


_UNITS = {f"{letter}{i}b": (1024 if i else 1000) ** power for power, letter in enumerate("kmgt", 1) for i in ("", "i")}


def _equal_devices(count: int, name: str, size: int) -> tuple[Device, ...]:
    most = 4096
    require(is_whole(count, 1, most), f"{shown(count)} x {name}: give from 1 to {most} devices")
    require(size >= 1, f"{name} has no memory: give a larger size")
    return tuple(Device(name, index, size) for index in range(count))
