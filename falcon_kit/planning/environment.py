"""`environment`: the notebook service, versions, accelerators, CPU cores, memory and disk of this process.

Importing has no effects, nothing is sent anywhere, and values of environment variables are never shown, only the name
of a variable that identifies the notebook service.
"""

import gc
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

from falcon_kit.display.documented import documented
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
class Accelerator:
    """One GPU that torch can use."""

    name: str
    """The vendor's name, such as "NVIDIA A100-SXM4-40GB"."""
    kind: str
    """The device type in torch: "cuda" (also for AMD, through ROCm) or "mps"."""
    index: int
    """The index among the devices of this type."""
    total_bytes: int
    """Memory of the GPU; for mps, the maximum that the system recommends."""
    free_bytes: int
    """Unused memory, including the cache of torch's allocator in this process."""


@documented
@dataclass(frozen=True, repr=False)
class Environment:
    """The result of `environment()`; a table in Jupyter."""

    where: str
    """"Colab", "Kaggle", "SageMaker Studio", "SageMaker notebook instance", "VS Code", "JupyterLab", "Jupyter",
    "IPython" or "plain Python"."""
    reason: str
    """What identifies the service, such as a variable that is set."""
    python: str
    versions: Mapping[str, str | None]
    """The installed version of each package, None for a missing one."""
    devices: tuple[Accelerator, ...]
    """The GPUs that torch can use; empty without torch."""
    cores: int
    """CPU cores that this process may use: its affinity, or the quota of its container if that is lower."""
    memory_bytes: int
    """Host memory, or the limit of the container if that is lower."""
    available_bytes: int
    """Host memory that is available without swapping, within the limit of the container."""
    cache_directory: Path
    """The cache directory of huggingface_hub."""
    cache_free_bytes: int
    gpu_problem: str = ""
    """Why torch cannot use the GPU that is there; empty where it can, or where there is none."""

    def __repr__(self) -> str:
        gpus = ", ".join(f"{each.name} {format_bytes(each.total_bytes)}" for each in self.devices) or "no GPU"
        memory = f"{format_bytes(self.available_bytes)} of {format_bytes(self.memory_bytes)} free"
        return f"Environment({self.where}, Python {self.python}, {gpus}, {self.cores} cores, {memory})"

    def _repr_html_(self) -> str:
        rows = [
            ("notebook service", f"{self.where} ({self.reason})"),
            ("Python", self.python),
            *((name, installed or "not installed") for name, installed in self.versions.items()),
            *((f"{each.kind}:{each.index}", _accelerator_text(each)) for each in self.devices),
            *([] if self.devices else [("GPU", self.gpu_problem or "none usable by torch")]),
            ("CPU cores", self.cores),
            ("host memory", f"{format_bytes(self.available_bytes)} free of {format_bytes(self.memory_bytes)}"),
            ("downloads", f"{_short(self.cache_directory)}, {format_bytes(self.cache_free_bytes)} free"),
        ]
        return html_table("This environment", (), rows)


def _short(path: Path) -> str:
    """The path with "~" for the home directory, so that a shared notebook does not show the user's name."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def environment(
    environ: Mapping[str, str] | None = None, modules: Mapping[str, Any] | None = None, root: Path = Path("/")
) -> Environment:
    """The notebook service, versions, GPUs, CPU cores, memory and disk of this process.

    environ, modules, root: environment variables, imported modules and the root of the file system; by default those of
    this process. Reading the free memory of a GPU creates a CUDA context there.
    """
    environ = os.environ if environ is None else environ
    modules = sys.modules if modules is None else modules
    where, reason = detect_place(environ, modules, root)
    memory_bytes, available_bytes = host_memory(root)
    cache = cache_directory()
    return Environment(
        where=where,
        reason=reason,
        python=platform.python_version(),
        versions={name: _installed(name) for name in PACKAGES},
        devices=find_accelerators(),
        cores=usable_cores(root),
        memory_bytes=memory_bytes,
        available_bytes=available_bytes,
        cache_directory=cache,
        cache_free_bytes=free_disk(cache),
        gpu_problem=gpu_problem(),
    )


def find_accelerators(torch: Any = None, only: int | None = None) -> tuple[Accelerator, ...]:
    """The GPUs that torch can use; none without torch. One of several processes (torchrun) finds its own GPU only.

    torch: the module, imported if not given. only: the index of one GPU, so that no CUDA context is created on others.
    """
    if torch is None:
        if importlib.util.find_spec("torch") is None:
            return ()
        import torch
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        only = own_gpu(count) if only is None else only
        return tuple(_cuda_device(torch, index) for index in (range(count) if only is None else (only,)))
    if torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        return (Accelerator("Apple GPU", "mps", 0, total, total - torch.mps.driver_allocated_memory()),)
    return ()


def gpu_problem() -> str:
    """Why torch cannot use an NVIDIA GPU that is there, and what to do; empty where it can, or without torch."""
    if importlib.util.find_spec("torch") is None:
        return ""
    import torch

    if torch.cuda.is_available() or torch.version.hip is not None:
        return ""
    remedy = "install torch for the driver's CUDA version, see pytorch.org"
    if torch.version.cuda is None:  # the wheels of PyPI for Windows, and of pytorch.org for CPUs
        driver = shutil.which("nvidia-smi")
        return f"this torch was built without CUDA, so the NVIDIA GPU is not used: {remedy}" if driver else ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # also for a machine without a GPU, which is no problem
        if "too old" in str(error):  # c10/cuda/CUDAFunctions.cpp; the number is its CUDA version, 11040 for 11.4
            return (
                f"the NVIDIA driver is too old for this torch, built for CUDA {torch.version.cuda}, so the GPU is not "
                f"used: update the driver, or {remedy}"
            )
    return ""


def native_bfloat16() -> bool:
    """Whether torch's GPU computes bfloat16 in instructions of its own; True without a GPU."""
    import torch

    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def own_gpu(count: int) -> int | None:
    """The index of this process's GPU, of `count`, if a launcher started several processes; None in a single process.

    The same as accelerate's PartialState chooses.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not count:
        return None
    return int(os.environ.get("LOCAL_RANK", "0")) % count


def _cuda_device(torch: Any, index: int) -> Accelerator:
    free, total = torch.cuda.mem_get_info(index)
    cached = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return Accelerator(torch.cuda.get_device_name(index), "cuda", index, total, free + cached)


def empty_gpu_cache() -> None:
    """Gives the memory of deleted tensors, which torch keeps for this process, back to the GPUs for other processes."""
    if torch := sys.modules.get("torch"):  # otherwise nothing is kept
        gc.collect()
        torch.cuda.empty_cache()


def _accelerator_text(each: Accelerator) -> str:
    return f"{each.name}, {format_bytes(each.free_bytes)} free of {format_bytes(each.total_bytes)}"


def usable_cores(root: Path) -> int:
    """CPU cores that this process may use: its affinity, or the quota of its control group, rounded up, if lower."""
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
    """Bytes of host memory, total and available; the limit of the container if that is lower."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for directory in _control_groups(root, "memory"):
        limit = read_text(directory / "memory.max").strip() or read_text(directory / "memory.limit_in_bytes").strip()
        if limit.isdigit():  # "max" means no limit
            total = min(total, int(limit))
            available = min(available, max(int(limit) - _group_use(directory), 0))
    return total, available


def _group_use(directory: Path) -> int:
    """Bytes that a control group uses, without the inactive file cache, which the kernel can free at any time."""
    used = (
        read_text(directory / "memory.current").strip() or read_text(directory / "memory.usage_in_bytes").strip() or "0"
    )
    statistics = dict(line.split(maxsplit=1) for line in read_text(directory / "memory.stat").splitlines())
    droppable = statistics.get("total_inactive_file", statistics.get("inactive_file", "0"))
    return int(used) - int(droppable)


def _control_groups(root: Path, controller: str) -> list[Path]:
    """Directories of the control groups of this process, innermost first; empty if there are none.

    Version 2 has one directory tree, version 1 one per controller. In a container, the path in /proc/self/cgroup is
    often not mounted; the group of the container is then the root of the tree.
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


def cache_directory() -> Path:
    """The cache directory of huggingface_hub, which reads HF_HOME and HF_HUB_CACHE once, at its first import."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def free_disk(path: Path) -> int:
    """Free bytes of the disk of `path`, which need not exist yet."""
    existing = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    return shutil.disk_usage(existing).free


def _installed(package: str) -> str | None:
    """The installed version, without importing the package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
