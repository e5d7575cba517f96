"""Where this Python runs and what it may use: the notebook service, versions, accelerators, cores, memory and disk.

Nothing happens at import, nothing leaves the machine, and no value of an environment variable is ever shown, only the
name of the mark that gave a place away.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from falcon_kit.display.tables import format_bytes, html_table
from falcon_kit.planning.places import detect_place, read_text

PACKAGES = (
    "falcon-kit",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "accelerate",
    "peft",
    "bitsandbytes",
    "ipywidgets",
    "jupyterlab",
)


@dataclass(frozen=True)
class Device:
    """One accelerator."""

    name: str
    """The maker's name, such as "NVIDIA A100-SXM4-40GB"."""
    kind: str
    """torch's word for it: "cuda" (also AMD's, through ROCm) or "mps"."""
    index: int
    """Number among the devices of its kind."""
    total_bytes: int
    """Memory of the device; for mps, what the system recommends as the most to use."""
    free_bytes: int
    """Memory that nobody uses now, what torch keeps in store for this process included."""


@dataclass(frozen=True, repr=False)
class Environment:
    """What `environment()` found; short as text, a table in Jupyter."""

    where: str
    """"Colab", "Kaggle", "SageMaker Studio", "SageMaker notebook instance", "VS Code", "JupyterLab", "Jupyter",
    "IPython" or "plain Python"."""
    reason: str
    """The mark that says so."""
    python: str
    """Version of Python."""
    versions: Mapping[str, str | None]
    """Installed versions by package, None for a package that is missing."""
    devices: tuple[Device, ...]
    """Accelerators that torch can use; empty without torch."""
    cores: int
    """CPU cores that this process may use: its affinity, and the quota of its container rounded up."""
    memory_bytes: int
    """Host memory, or the container's limit where that is lower."""
    available_bytes: int
    """Host memory that can still be had without swapping, within the container's limit."""
    cache_directory: Path
    """Where the Hugging Face hub keeps downloads."""
    cache_free_bytes: int
    """Free disk there."""

    def __repr__(self) -> str:
        gpus = ", ".join(f"{each.name} {format_bytes(each.total_bytes)}" for each in self.devices) or "no GPU"
        memory = f"{format_bytes(self.available_bytes)} of {format_bytes(self.memory_bytes)} free"
        return f"Environment({self.where}, Python {self.python}, {gpus}, {self.cores} cores, {memory})"

    def _repr_html_(self) -> str:
        rows = [
            ("running in", f"{self.where} ({self.reason})"),
            ("Python", self.python),
            *((name, found or "not installed") for name, found in self.versions.items()),
            *((f"{each.kind}:{each.index}", _device_text(each)) for each in self.devices),
            *([] if self.devices else [("GPU", "none that torch can use")]),
            ("CPU cores", self.cores),
            ("host memory", f"{format_bytes(self.available_bytes)} free of {format_bytes(self.memory_bytes)}"),
            ("downloads", f"{_short(self.cache_directory)}, {format_bytes(self.cache_free_bytes)} free"),
        ]
        return html_table("This environment", (), rows)


def _short(path: Path) -> str:
    """The path with "~" for the home directory: a shared notebook need not show whose machine it ran on."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def environment(
    environ: Mapping[str, str] | None = None, modules: Mapping[str, Any] | None = None, root: Path = Path("/")
) -> Environment:
    """Look around: which notebook service, which versions, which devices, how much memory and disk.

    The arguments say where to look, by default this process and its machine: environment variables, imported modules,
    and the root of the file system. Free memory of a GPU is asked of its driver, which opens a CUDA context there.
    """
    environ = os.environ if environ is None else environ
    modules = sys.modules if modules is None else modules
    where, reason = detect_place(environ, modules, root)
    memory_bytes, available_bytes = host_memory(root)
    cache = cache_directory(environ)
    return Environment(
        where=where,
        reason=reason,
        python=platform.python_version(),
        versions={name: _installed(name) for name in PACKAGES},
        devices=find_devices(),
        cores=usable_cores(root),
        memory_bytes=memory_bytes,
        available_bytes=available_bytes,
        cache_directory=cache,
        cache_free_bytes=free_disk(cache),
    )


def find_devices(torch: Any = None, only: int | None = None) -> tuple[Device, ...]:
    """The accelerators that torch can use, none without torch; `torch` is the module, imported if not given.

    only: the number of one GPU, for who does not want a CUDA context on the others.
    """
    if torch is None:
        if importlib.util.find_spec("torch") is None:
            return ()
        import torch
    if torch.cuda.is_available():
        indices = range(torch.cuda.device_count()) if only is None else (only,)
        return tuple(_cuda_device(torch, index) for index in indices)
    if torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        return (Device("Apple GPU", "mps", 0, total, total - torch.mps.driver_allocated_memory()),)
    return ()


def _cuda_device(torch: Any, index: int) -> Device:
    free, total = torch.cuda.mem_get_info(index)
    cached = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return Device(torch.cuda.get_device_name(index), "cuda", index, total, free + cached)


def _device_text(device: Device) -> str:
    return f"{device.name}, {format_bytes(device.free_bytes)} free of {format_bytes(device.total_bytes)}"


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: those of its affinity, or its control group's quota rounded up, if lower."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    for directory in _control_groups(root, "cpu"):
        quota, period = ([*read_text(directory / "cpu.max").split(), "", ""])[:2]
        quota = quota or read_text(directory / "cpu.cfs_quota_us").strip()
        period = period or read_text(directory / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit():  # "max" and -1 mean no limit
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(cores, 1)


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of host memory, total and still available; a container's limit counts where it is lower."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for directory in _control_groups(root, "memory"):
        limit = read_text(directory / "memory.max").strip() or read_text(directory / "memory.limit_in_bytes").strip()
        if limit.isdigit():  # "max" means no limit
            total = min(total, int(limit))
            available = min(available, max(int(limit) - _group_use(directory), 0))
    return total, available


def _group_use(directory: Path) -> int:
    """Bytes that a control group holds and cannot simply drop: its use without the inactive file cache."""
    used = (
        read_text(directory / "memory.current").strip() or read_text(directory / "memory.usage_in_bytes").strip() or "0"
    )
    statistics = dict(line.split(maxsplit=1) for line in read_text(directory / "memory.stat").splitlines())
    droppable = statistics.get("total_inactive_file", statistics.get("inactive_file", "0"))
    return int(used) - int(droppable)


def _control_groups(root: Path, controller: str) -> list[Path]:
    """Directories of the control groups that this process is in, innermost first; empty where there are none.

    Version 2 keeps one tree, version 1 a tree for each controller. In a container the path that the kernel names is
    often not mounted; the container's own group is then the top of the tree.
    """
    mounted = root / "sys/fs/cgroup"
    lines = [line.split(":", 2) for line in read_text(root / "proc/self/cgroup").splitlines()]
    for _, controllers, path in lines:
        if controller in controllers.split(","):
            mounted, inner = mounted / controller, path
            break
    else:
        inner = next((path for number, _, path in lines if number == "0"), "/")
    directory = mounted / inner.lstrip("/")
    return [each for each in (directory, *directory.parents) if each.is_relative_to(mounted) and each.is_dir()]


def cache_directory(environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps downloads, by the variables that it documents."""
    home = environ.get("HF_HOME") or str(Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    chosen = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or str(Path(home) / "hub")
    return Path(os.path.expandvars(chosen)).expanduser()


def free_disk(path: Path) -> int:
    """Free bytes of the disk that `path` is or will be on."""
    existing = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    return shutil.disk_usage(existing).free


def _installed(package: str) -> str | None:
    """The installed version, without importing the package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
