"""`plan`: the memory that a Falcon needs, which device holds which part, and what to change if it does not fit.

No weights are downloaded or loaded; neither torch nor transformers is imported.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from falcon_kit.catalogue import memory
from falcon_kit.catalogue.memory import dtype_name
from falcon_kit.catalogue.names import catalogue, spec
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import is_whole, printable, require, shown, unknown_name
from falcon_kit.display.tables import format_bytes, html_table
from falcon_kit.planning.devices import Device, resolve_devices
from falcon_kit.planning.placement import (
    CacheKind,
    Part,
    Purpose,
    Request,
    device_map,
    fits_in_memory,
    layer_split_parts,
    layers_per_device,
    split_by_memory,
    tensor_parallel_devices,
    tensor_parallel_parts,
)
from falcon_kit.planning.plots import draw_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ENDPOINT = "an endpoint on another machine: fk.connect"


class NotEnoughMemory(MemoryError):
    """Raised if a model does not fit; `.plan` is the memory plan."""

    def __init__(self, plan: Plan, message: str = "") -> None:
        lines = [message or plan.verdict(), *(f"- {each}" for each in plan.suggestions)]
        super().__init__("\n".join(lines))
        self.plan = plan


@dataclass(frozen=True, repr=False)
class Plan:
    """The memory of each part on each device; a table in Jupyter, a bar chart by `plot()`."""

    spec: FalconSpec
    """The model."""
    dtype: str
    """The dtype of the weights: float32, bfloat16, float16, int8, nf4 or nf4-double."""
    context: int
    """Tokens per sequence, prompt and answer together."""
    batch: int
    """Sequences per batch."""
    purpose: Purpose
    """inference, lora, qlora, full (fine-tuning of all weights) or merge (of an adapter into the weights)."""
    devices: tuple[Device, ...]
    """The devices of the plan."""
    rows: tuple[Part, ...]
    """Every part with its device, size and reason."""
    device_map: Mapping[str, int | str]
    """The device of each module, for `from_pretrained`; no decoder layer is split. Empty if the model does not fit, and
    under tensor parallelism, which divides each layer."""
    suggestions: tuple[str, ...]
    """What to change if the model does not fit, the least loss of quality first."""

    @property
    def fits(self) -> bool:
        """Whether the parts on each device fit into its memory."""
        return fits_in_memory(self.devices, self.rows)

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
        """The memory of all devices together."""
        return sum(device.free_bytes for device in self.devices)

    def verdict(self) -> str:
        """One sentence: the memory that is needed, the devices, and whether the model fits."""
        counts = Counter(f"{printable(device.name)} {format_bytes(device.free_bytes)}" for device in self.devices)
        devices = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())
        fits = "fits" if self.fits else "does not fit"
        work = "" if self.purpose == "inference" else f" for {self.purpose}"
        return (
            f"{printable(self.spec.name)} in {self.dtype}{work}, {self.batch} x {self.context} tokens, needs "
            f"{format_bytes(self.total_bytes)}: it {fits} into {devices}"
        )

    def plot(self) -> Figure:
        """Stacked bars: one bar per device, with its parts and its free memory."""
        return draw_plan(self.rows, self.devices, self.verdict())

    def __repr__(self) -> str:
        return f"Plan({self.verdict()})"

    def _repr_html_(self) -> str:
        rows = [(row.part, row.device, format_bytes(row.bytes), row.reason) for row in self.rows]
        table = html_table(self.verdict(), ("part", "device", "bytes", "why"), rows)
        return table + (html_table("What would help", (), enumerate(self.suggestions, 1)) if self.suggestions else "")


def plan(
    name: str | os.PathLike[str] | FalconSpec,
    dtype: Any = "bfloat16",
    context: int = 2048,
    batch: int = 1,
    purpose: Purpose = "inference",
    devices: str | Sequence[Device] | None = None,
    cache: CacheKind = "grouped",
    r: int = 8,
    tensor_parallel: int = 1,
    **unknown: Any,
) -> Plan:
    """The memory that a Falcon needs, and whether it fits. No weights are downloaded or loaded.

    name: as for `fk.spec`, or a FalconSpec. dtype: float32, bfloat16, float16, int8, nf4 or nf4-double. context: tokens
    per sequence, prompt and answer together. batch: sequences per batch. purpose: inference, lora, qlora (LoRA on
    quantised weights), full (fine-tuning of all weights) or merge (of an adapter into the weights).
    devices: unset, the GPUs of this machine, or its host memory if it has none; "4x40GiB"; a GPU ("2xA100-80GB"); an
    instance type ("ml.g5.12xlarge", "colab-t4"); or a list of `falcon_kit.planning.devices.Device`.
    cache: "grouped", or "transformers" for the KV cache of transformers' own Falcon. r: the rank of LoRA.
    tensor_parallel: number of ranks that divide each layer among them, one GPU per rank, or all in host memory.

    Raises LookupError for an unknown model, ValueError for an argument out of range, and TypeError for an unknown one.
    """
    if unknown:
        hint = ": LoRA's rank is called r, as in PEFT's LoraConfig" if "rank" in unknown else ""
        raise TypeError(f"plan has no argument {', '.join(unknown)}{hint}")
    shape = name if isinstance(name, FalconSpec) else spec(name)
    dtype = dtype_name(dtype)
    if purpose == "qlora" and dtype not in memory.QUANTISED:
        dtype = "nf4-double"
    request = Request(shape, dtype, context, batch, purpose, cache, r, tensor_parallel)
    _check(request)
    devices = resolve_devices(devices)
    if tensor_parallel != 1:
        return _plan_tensor_parallel(request, tensor_parallel_devices(request, devices))
    counts = layers_per_device(request, devices)
    fits = sum(counts) == shape.layers
    counts = counts if fits else split_by_memory(request, devices)
    rows = layer_split_parts(request, devices, counts)
    if fits:
        return _plan(request, devices, rows, device_map(devices, counts))
    return _plan(request, devices, rows, {}, _suggestions(request, devices))


def _plan_tensor_parallel(request: Request, devices: tuple[Device, ...]) -> Plan:
    rows = list(tensor_parallel_parts(request, devices))
    fits = fits_in_memory(devices, rows)
    return _plan(request, devices, rows, {}, () if fits else _tensor_parallel_suggestions(request, devices))


def _plan(
    request: Request,
    devices: tuple[Device, ...],
    rows: Iterable[Part],
    modules: Mapping[str, int | str],
    suggestions: Iterable[str] = (),
) -> Plan:
    arguments = request.spec, request.dtype, request.context, request.batch, request.purpose
    return Plan(*arguments, devices, tuple(rows), modules, tuple(suggestions))


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


def _fits(request: Request, devices: Sequence[Device]) -> bool:
    return sum(layers_per_device(request, devices)) == request.spec.layers


def _like(device: Device, count: int) -> list[Device]:
    return [replace(device, key=key) for key in range(count)]


def _tensor_parallel_suggestions(request: Request, devices: Sequence[Device]) -> Iterator[str]:
    """Changes with which the model fits, the least loss of quality first."""
    kv_heads, device = request.spec.kv_heads, devices[0]
    larger = [each for each in range(request.tensor_parallel + 1, kv_heads + 1) if kv_heads % each == 0]
    for ranks in larger if device.key != "cpu" else ():
        more = _like(device, ranks)
        if fits_in_memory(more, list(tensor_parallel_parts(replace(request, tensor_parallel=ranks), more))):
            yield f"tensor_parallel={ranks} on {ranks} x {device.name}"
            break
    undivided = replace(request, tensor_parallel=1)
    for dtype in (request.dtype, *_smaller_dtypes(request.dtype)):
        if _fits(replace(undivided, dtype=dtype), devices):
            yield f"split by layers, without tensor_parallel, in dtype={dtype!r}"
            break
    yield _ENDPOINT


def _suggestions(request: Request, devices: Sequence[Device]) -> Iterator[str]:
    """Changes with which the model fits, the least loss of quality first; per argument the first value that fits."""
    halvings = range(1, 8)
    candidates: dict[str, Sequence[Any]] = {
        "cache": ["grouped"] if request.cache == "transformers" else [],
        "dtype": _smaller_dtypes(request.dtype),
        "purpose": {"full": ["lora", "qlora"], "lora": ["qlora"]}.get(request.purpose, []),
        "context": [request.context >> times for times in halvings if request.context >> times >= 64],
        "batch": [request.batch >> times for times in halvings if request.batch >> times],
        "spec": _smaller_falcons(request.spec),
    }
    for name, values in candidates.items():
        fitting = next((value for value in values if _fits(_changed(request, name, value), devices)), None)
        if fitting is not None:
            yield f"another model: {fitting.name}" if isinstance(fitting, FalconSpec) else f"{name}={fitting!r}"
    if devices[0].key != "cpu" and not devices[-1].offload_target:
        yield from _more_memory(request, devices)
    yield _ENDPOINT


def _more_memory(request: Request, devices: Sequence[Device]) -> Iterator[str]:
    """More GPUs like the first one, or offloading to host memory."""
    for count in range(len(devices) + 1, 17):
        if _fits(request, _like(devices[0], count)):
            yield f"more devices: {count} x {devices[0].name}"
            break
    if request.purpose == "inference" and request.dtype not in memory.QUANTISED:
        host = Device("host memory", "cpu", 2**50, offload_target=True)  # more than any machine has
        if offloaded := layers_per_device(request, [*devices, host])[-1]:
            layers = f"{offloaded} of {request.spec.layers} layers"
            yield f"offload='cpu': {layers} in host memory, copied to the GPU for each token"


def _changed(request: Request, name: str, value: Any) -> Request:
    """The request with another value of one field. For QLoRA, the dtype changes too."""
    changes = {name: value}
    if value == "qlora" and request.dtype not in memory.QUANTISED:
        changes["dtype"] = "nf4-double"
    return replace(request, **changes)


def _smaller_dtypes(dtype: str) -> list[str]:
    """From large to small, without float16, which takes as much memory as bfloat16."""
    smaller = memory.DTYPES[memory.DTYPES.index(dtype) + 1 :]
    return [each for each in smaller if each != "float16"]


def _smaller_falcons(shape: FalconSpec) -> list[FalconSpec]:
    """Published models of the same kind, instruct or base, with fewer parameters, the largest first."""
    published = [each for each in catalogue() if each.published and each.parameters < shape.parameters]
    same_kind = [each for each in published if bool(each.fine_tuned_from) == bool(shape.fine_tuned_from)]
    return sorted(same_kind, key=lambda each: -each.parameters)
