"""`plan`: the memory that a Falcon needs, which device holds which part, and what to change if it does not fit.

No weights are downloaded or loaded; neither torch nor transformers is imported.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from falcon_kit.catalogue import memory
from falcon_kit.catalogue.memory import dtype_name
from falcon_kit.catalogue.names import spec
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.documented import documented
from falcon_kit.display.errors import (
    Portable,
    check_flag,
    is_whole,
    plain_scalar,
    printable,
    require,
    shown,
    unknown_name,
)
from falcon_kit.display.reading import texts_by_name
from falcon_kit.display.tables import byte_column, format_bytes, html_table
from falcon_kit.planning import placement
from falcon_kit.planning.devices import Device, resolve_devices
from falcon_kit.planning.downloads import Disk, disk_for
from falcon_kit.planning.placement import CacheKind, Part, Purpose, Request, fits_in_memory, layers_per_device
from falcon_kit.planning.plots import draw_plan
from falcon_kit.planning.processor import cpu_dtype, fast_dtypes, gpu_dtype, has_instructions_for, has_vnni
from falcon_kit.planning.suggestions import (
    MARGIN_DOUBT,
    Suggestion,
    report_doubt,
    suggestions,
    tensor_parallel_suggestions,
    without_margin,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class NotEnoughMemory(Portable, MemoryError):
    """Raised if a model does not fit; `.plan` is the memory plan."""

    def __init__(self, plan: Plan, message: str = "") -> None:
        lines = [message or plan.verdict(), *(f"- {each}" for each in plan.suggestions)]
        super().__init__("\n".join(lines))
        self.plan = plan


@documented
@dataclass(frozen=True, repr=False)
class Plan:
    """The memory of each part on each device; a table in Jupyter, a bar chart by `plot()`."""

    spec: FalconSpec
    dtype: str
    """The dtype of the weights: float32, bfloat16, float16, int8, int4, nf4 or nf4-double."""
    context: int
    """Tokens per sequence, prompt and answer together."""
    batch: int
    """Sequences per batch."""
    purpose: Purpose
    """inference, lora, qlora or full (fine-tuning of all weights)."""
    devices: tuple[Device, ...]
    rows: tuple[Part, ...]
    """Every part with its device, size and reason."""
    device_map: Mapping[str, int | str]
    """The device of each module, for `from_pretrained`; no decoder layer is split. Empty if the model does not fit, and
    under tensor parallelism, which divides each layer."""
    suggestions: tuple[Suggestion, ...]
    """What to change if the model does not fit or is tight, the least loss of quality first."""
    tight: str = ""
    """Why a model that fits by arithmetic is not counted as fitting; empty otherwise. fk.load(force=True) tries."""
    disk: Disk | None = None
    """The files to download and the disk for them; None where there are none."""

    @property
    def fits(self) -> bool:
        """Whether the parts on each device fit into its memory, with a margin, and no published report speaks
        against it."""
        return not self.tight and fits_in_memory(self.devices, self.rows)

    @property
    def total_bytes(self) -> int:
        """All parts on all devices."""
        return sum(row.bytes for row in self.rows)

    @property
    def weight_bytes(self) -> int:
        """The weights of the model, on all devices together."""
        return memory.weight_bytes(self.spec, self.dtype)

    @property
    def kv_bytes(self) -> int:
        """The KV cache of `batch` sequences of `context` tokens."""
        return sum(row.bytes for row in self.rows if row.part == "KV cache")

    @property
    def free_bytes(self) -> int:
        """The memory of all devices together that a plan may use."""
        return sum(device.free_bytes for device in self.devices)

    @property
    def advice(self) -> str:
        """Which dtypes are fast on the CPU of this machine, why, and the bytes of their weights; else empty."""
        if self.devices[0].key != "cpu" or not self.devices[0].here or self.purpose != "inference":
            return ""
        return fast_dtypes(self.spec, has_instructions_for("bfloat16"), has_vnni())

    def verdict(self) -> str:
        """One sentence: the memory that is needed, the devices, and whether the model fits."""
        counts = Counter((printable(device.name), format_bytes(device.free_bytes)) for device in self.devices)
        devices = ", ".join(
            f"{count} x {name} ({size} each)" if count > 1 else f"{name} {size}"
            for (name, size), count in counts.items()
        )
        fits = "may not fit into" if self.tight else "fits into" if self.fits else "does not fit into"
        reason = f": {self.tight}" if self.tight else ""
        disk = f". {self.disk.shortage}" if self.disk and self.disk.shortage else ""
        work = "" if self.purpose == "inference" else f" for {self.purpose}"
        return (
            f"{printable(self.spec.name)} in {self.dtype}{work}, {self.batch} x {self.context} tokens, needs "
            f"{format_bytes(self.total_bytes)}: it {fits} {devices}{reason}{disk}"
        )

    def plot(self) -> Figure:
        """Stacked bars: one bar per device, with its parts and its free memory."""
        return draw_plan(self.rows, self.devices, self.verdict())

    figure = plot

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each part: part, device, bytes, reason."""
        import pandas as pd

        return pd.DataFrame([*map(asdict, self.rows)])

    def __repr__(self) -> str:
        return f"Plan({self.verdict()})"

    def _repr_html_(self) -> str:
        disk = [] if self.disk is None else [("files to download", "disk", self.disk.bytes, self.disk.reason)]
        parts = [*((row.part, row.device, row.bytes, row.reason) for row in self.rows), *disk]
        sizes = byte_column([size for _, _, size, _ in parts])
        rows = [(part, device, size, why) for (part, device, _, why), size in zip(parts, sizes, strict=True)]
        table = html_table(self.verdict(), ("part", "device", "bytes", "why"), rows)
        table += html_table("What would help", (), enumerate(self.suggestions, 1)) if self.suggestions else ""
        return table + (html_table("What is fast", (), [("CPU", self.advice)]) if self.advice else "")


_INSTEAD = texts_by_name(Path(__file__).with_name("other_names.json"))["instead"]
"""What to give instead of arguments that `plan` does not have."""


def _check_names(unknown: Mapping[str, Any]) -> None:
    """Raises TypeError for arguments that `plan` does not have, with the one to give instead."""
    if unknown:
        known = [*signature(plan).parameters][:-1]  # without **unknown
        near = get_close_matches(next(iter(unknown)), known)
        hint = f": did you mean {near[0]}?" if near else ""
        hint = next((f": {_INSTEAD[name]}" for name in unknown if name in _INSTEAD), hint)
        raise TypeError(f"plan has no argument {', '.join(unknown)}{hint}")


def plan(
    name: str | os.PathLike[str] | FalconSpec,
    dtype: Any = None,
    context: int = 2048,
    batch: int = 1,
    purpose: Purpose = "inference",
    devices: str | Sequence[Device] | None = None,
    cache: CacheKind = "grouped",
    r: int = 8,
    tensor_parallel: int = 1,
    gradient_checkpointing: bool = True,
    **unknown: Any,
) -> Plan:
    """The memory that a Falcon needs, and whether it fits. No weights are downloaded or loaded.

    name: as for `fk.spec`, or a FalconSpec. dtype: float32, bfloat16, float16, int8, int4, nf4 or nf4-double; unset,
    bfloat16, or nf4-double for qlora; "auto", the one `fk.load` would choose, as far as the config is on this machine.
    context: tokens per sequence, prompt and answer together. batch: sequences per batch. purpose: inference, lora,
    qlora (LoRA on quantised weights) or full (fine-tuning of all weights).
    devices: unset, the GPUs of this machine, or its host memory if it has none; "4x40GiB"; a GPU ("2xA100-80GB", "8 x
    H100"); a machine of AWS, Google Cloud, Azure, Colab or Kaggle ("ml.g5.12xlarge", "a2-highgpu-1g", "colab-t4"); or a
    list of `falcon_kit.planning.devices.Device`.
    cache: "grouped", or "transformers" for the KV cache of transformers' own Falcon. r: the rank of LoRA.
    tensor_parallel: number of ranks that divide each layer among them, one GPU per rank, or all in host memory.
    gradient_checkpointing: whether training recomputes each layer instead of keeping its activations.

    Raises LookupError for an unknown model, ValueError for an argument out of range, and TypeError for an unknown one.
    """
    _check_names(unknown)
    shape = name if isinstance(name, FalconSpec) else spec(name)
    places = resolve_devices(devices)
    check_flag("gradient_checkpointing", gradient_checkpointing)
    values = context, batch, purpose, cache, r, tensor_parallel, gradient_checkpointing
    request = Request(shape, _dtype(dtype, shape, purpose, places), *map(plain_scalar, values))
    _check(request)
    _check_dtype(request, places)
    return _planned(request, places, disk_for(shape, here=places[0].here))


def _dtype(dtype: Any, shape: FalconSpec, purpose: Purpose, devices: Sequence[Device]) -> str:
    """The dtype by name: the one asked for, that of the purpose, or the one `fk.load` would choose for "auto"."""
    if dtype is None:
        return "nf4-double" if purpose == "qlora" else "bfloat16"
    if not (isinstance(dtype, str) and dtype == "auto"):
        return dtype_name(dtype)
    if devices[0].key == "cpu":
        return cpu_dtype(shape.stored_dtype, shape, devices[0].free_bytes)[0]
    return gpu_dtype(shape.stored_dtype)[0] if devices[0].here else shape.stored_dtype


def _planned(request: Request, devices: tuple[Device, ...], disk: Disk | None) -> Plan:
    split, changes = _by_layers, suggestions
    if request.tensor_parallel != 1:
        split, changes = _by_ranks, tensor_parallel_suggestions
        devices = placement.tensor_parallel_devices(request, devices)
    rows, modules, fits, safe = split(request, devices)
    tight = report_doubt(request, devices) or ("" if safe else MARGIN_DOUBT)
    advice = tuple(changes(request, devices)) if tight else ()
    arguments = request.spec, request.dtype, request.context, request.batch, request.purpose
    return Plan(*arguments, devices, tuple(rows), modules, advice, tight if fits else "", disk)


_Split = tuple[Iterable[Part], dict[str, int | str], bool, bool]
"""The rows, the device map, whether they fit, and whether they do so with the margin."""


def _by_layers(request: Request, devices: Sequence[Device]) -> _Split:
    counts = layers_per_device(request, without_margin(devices))
    safe = sum(counts) == request.spec.layers
    counts = counts if safe else layers_per_device(request, devices)
    if sum(counts) == request.spec.layers:
        return placement.layer_split_parts(request, devices, counts), placement.device_map(devices, counts), True, safe
    counts = placement.split_by_memory(request, devices)
    return placement.layer_split_parts(request, devices, counts), {}, False, False


def _by_ranks(request: Request, devices: Sequence[Device]) -> _Split:
    rows = list(placement.tensor_parallel_parts(request, devices))
    return rows, {}, fits_in_memory(devices, rows), fits_in_memory(without_margin(devices), rows)


def _check(request: Request) -> None:
    for name, values in (("purpose", get_args(Purpose)), ("cache", get_args(CacheKind))):
        if (given := getattr(request, name)) not in values:
            raise ValueError(unknown_name(name, str(given), values))
    shape, context = request.spec, request.context
    require(
        is_whole(context, 1, shape.context),
        f"context={shown(context)} must be from 1 to {shape.context}, the context of {shape.name}",
    )
    require(is_whole(request.batch, 1, 2**31), f"batch={shown(request.batch)} must be at least 1, and at most 2**31")
    require(is_whole(request.r, 1, 2**31), f"r={shown(request.r)}: the rank of LoRA must be at least 1")
    ranks = request.tensor_parallel
    require(is_whole(ranks, -(2**31), 2**31), f"tensor_parallel must be a whole number, got {shown(ranks)}")


def _check_dtype(request: Request, devices: Sequence[Device]) -> None:
    """Raises ValueError for weights that cannot be trained or offloaded in this dtype."""
    dtype, purpose, quantised = request.dtype, request.purpose, request.dtype in memory.QUANTISED
    require(
        quantised or purpose != "qlora",
        f"dtype={dtype!r} with purpose='qlora', which trains LoRA on quantised weights: leave dtype out, give "
        f"{', '.join(memory.QUANTISED)}, or use purpose='lora'",
    )
    require(
        not quantised or purpose != "full",
        f"dtype={dtype!r} with purpose='full': quantised weights are not trained: give "
        f"{', '.join(memory.FLOAT_DTYPES)}, or use purpose='qlora'",
    )
    require(
        not quantised or not any(device.offload_target for device in devices),
        f"dtype={dtype!r} with an offload target: quantised layers compute where their weights are, so they cannot be "
        "offloaded: leave the target out, or use dtype='bfloat16'",
    )
