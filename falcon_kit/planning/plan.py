"""Will it run here, and how: what a Falcon needs, on which device it lies, and what to do where it does not fit.

Nothing is loaded and nothing downloaded; neither torch nor transformers is imported.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from falcon_kit.catalogue import memory
from falcon_kit.catalogue.memory import dtype_name
from falcon_kit.catalogue.names import catalogue, spec
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import unknown_name
from falcon_kit.display.tables import format_bytes, html_table
from falcon_kit.planning.devices import Slot, find_slots
from falcon_kit.planning.placement import (
    CacheKind,
    Part,
    Purpose,
    Request,
    device_map,
    rank_rows,
    rank_slots,
    rows,
    split_by_memory,
    spread,
    within,
)
from falcon_kit.planning.plots import draw_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NotEnoughMemory(MemoryError):
    """A model does not fit; `.plan` says what it would take."""

    def __init__(self, plan: Plan, happened: str = "") -> None:
        lines = [happened or plan.verdict(), *(f"- {each}" for each in plan.suggestions)]
        super().__init__("\n".join(lines))
        self.plan = plan


@dataclass(frozen=True, repr=False)
class Plan:
    """Where everything goes; a table in Jupyter, stacked bars by `plot()`."""

    spec: FalconSpec
    """The model."""
    dtype: str
    """How its weights are kept: float32, bfloat16, float16, int8, nf4, nf4-double."""
    context: int
    """Tokens in each row, prompt and answer together."""
    batch: int
    """Rows at once."""
    purpose: Purpose
    """inference, lora, qlora, full (fine-tuning of all weights) or merge (adapters into weights)."""
    slots: tuple[Slot, ...]
    """The devices it is made for."""
    rows: tuple[Part, ...]
    """Every part with its device, size and reason."""
    device_map: Mapping[str, int | str]
    """For `from_pretrained`: each module's device, no decoder layer split. Empty where it does not fit, and under
    tensor parallelism, which splits each layer."""
    suggestions: tuple[str, ...]
    """What to do where it does not fit, the least loss of quality first."""

    @property
    def fits(self) -> bool:
        """Whether no device holds more than it has."""
        return within(self.slots, self.rows)

    @property
    def total_bytes(self) -> int:
        """Everything, on all devices."""
        return sum(row.bytes for row in self.rows)

    @property
    def weight_bytes(self) -> int:
        """The model's weights."""
        return memory.weight_bytes(self.spec, self.dtype)

    @property
    def kv_bytes(self) -> int:
        """The KV cache, full."""
        return sum(row.bytes for row in self.rows if row.part == "KV cache")

    @property
    def free_bytes(self) -> int:
        """Memory of all devices together."""
        return sum(slot.free_bytes for slot in self.slots)

    def verdict(self) -> str:
        """One sentence: what is needed, what is there, and whether it fits."""
        counts = Counter(f"{slot.name} {format_bytes(slot.free_bytes)}" for slot in self.slots)
        devices = ", ".join(f"{count} x {slot}" if count > 1 else slot for slot, count in counts.items())
        fits = "fits" if self.fits else "does not fit"
        work = "" if self.purpose == "inference" else f" for {self.purpose}"
        return (
            f"{self.spec.name} in {self.dtype}{work}, {self.batch} x {self.context} tokens, needs "
            f"{format_bytes(self.total_bytes)}: it {fits} into {devices}"
        )

    def plot(self) -> Figure:
        """Stacked bars: a bar for each device, its parts, and what stays free."""
        return draw_plan(self.rows, self.slots, self.verdict())

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
    devices: str | Sequence[Slot] | None = None,
    cache: CacheKind = "grouped",
    rank: int = 8,
    tensor_parallel: int = 1,
) -> Plan:
    """What a Falcon needs and whether it fits, before a byte of it is loaded.

    name: as for `fk.spec`, or a spec. dtype: float32, bfloat16, float16, int8, nf4, nf4-double. context: tokens a row,
    prompt and answer. purpose: inference, lora, qlora (lora on quantised weights), full, merge (of an adapter).
    devices: unset, the GPUs here, else this machine's memory; "4x40GiB"; a GPU ("2xA100-80GB"); an instance type
    ("ml.g5.12xlarge", "colab-t4"); slots of your own. cache: "transformers" shows what the library's own Falcon would
    keep. rank: of LoRA. tensor_parallel: ranks that hold a part of every layer each, on a device of their own, or all
    in one host memory.

    Raises LookupError for an unknown name and ValueError for a word or number out of range.
    """
    shape = name if isinstance(name, FalconSpec) else spec(name)
    kept = dtype_name(dtype)
    if purpose == "qlora" and kept not in memory.QUANTISED:
        kept = "nf4-double"
    _check(shape, context, batch, purpose, cache, rank)
    slots = find_slots(devices)
    request = Request(shape, kept, context, batch, purpose, cache, rank, tensor_parallel)
    if tensor_parallel != 1:
        return _plan_ranks(request, rank_slots(request, slots))
    counts = spread(request, slots)
    fits = sum(counts) == shape.layers
    counts = counts if fits else split_by_memory(request, slots)
    return Plan(
        spec=shape,
        dtype=kept,
        context=context,
        batch=batch,
        purpose=purpose,
        slots=slots,
        rows=tuple(rows(request, slots, counts)),
        device_map=device_map(slots, counts) if fits else {},
        suggestions=() if fits else tuple(_suggestions(request, slots)),
    )


def _check(shape: FalconSpec, context: int, batch: int, purpose: str, cache: str, rank: int) -> None:
    for name, given, known in (("purpose", purpose, get_args(Purpose)), ("cache", cache, get_args(CacheKind))):
        if given not in known:
            raise ValueError(unknown_name(name, str(given), known))
    if not 1 <= context <= shape.context:
        raise ValueError(f"context={context} is not within 1 and {shape.context}, the context of {shape.name}")
    if batch < 1:
        raise ValueError(f"batch={batch}: give at least one row")
    if rank < 1:
        raise ValueError(f"rank={rank}: LoRA takes at least 1")


def _plan_ranks(request: Request, slots: tuple[Slot, ...]) -> Plan:
    rows = tuple(rank_rows(request, slots))
    suggestions = () if within(slots, rows) else tuple(_rank_suggestions(request, slots))
    asked = request.spec, request.dtype, request.context, request.batch, request.purpose
    return Plan(*asked, slots=slots, rows=rows, device_map={}, suggestions=suggestions)


def _fits(request: Request, slots: Sequence[Slot]) -> bool:
    return sum(spread(request, slots)) == request.spec.layers


def _rank_suggestions(request: Request, slots: Sequence[Slot]) -> Iterator[str]:
    """What would help under tensor parallelism, the least loss of quality first."""
    more = [each for each in range(request.ranks + 1, request.spec.kv_heads + 1) if request.spec.kv_heads % each == 0]
    kind, shared = slots[0], slots[0].key == "cpu"
    for each in () if shared else more:
        larger = [Slot(kind.name, key, kind.free_bytes) for key in range(each)]
        if within(larger, list(rank_rows(replace(request, ranks=each), larger))):
            yield f"tensor_parallel={each} on {each} x {kind.name}"
            break
    whole = replace(request, ranks=1)
    for dtype in (request.dtype, *_smaller_dtypes(request.dtype)):
        if _fits(replace(whole, dtype=dtype), slots):
            yield f"split by layers, without tensor_parallel, in dtype={dtype!r}"
            break
    yield "an endpoint that serves it, on a machine of its own"


def _suggestions(request: Request, slots: Sequence[Slot]) -> Iterator[str]:
    """What would make it fit, the least loss of quality first: of each kind the first that does."""
    halvings = range(1, 8)
    kinds: dict[str, Sequence[Any]] = {
        "cache": ["grouped"] if request.cache == "transformers" else [],
        "dtype": _smaller_dtypes(request.dtype),
        "purpose": {"full": ["lora", "qlora"], "lora": ["qlora"]}.get(request.purpose, []),
        "context": [request.context >> times for times in halvings if request.context >> times >= 64],
        "batch": [request.batch >> times for times in halvings if request.batch >> times],
        "spec": _smaller_falcons(request.spec),
    }
    for name, values in kinds.items():
        found = next((value for value in values if _fits(_changed(request, name, value), slots)), None)
        if found is not None:
            yield f"another model: {found.name}" if isinstance(found, FalconSpec) else f"{name}={found!r}"
    if slots[0].key != "cpu" and not slots[-1].offload_target:
        yield from _other_places(request, slots)
    yield "an endpoint that serves it, on a machine of its own"


def _other_places(request: Request, slots: Sequence[Slot]) -> Iterator[str]:
    """More GPUs of the same kind, or host memory beside those there are."""
    kind = slots[0]
    for count in range(len(slots) + 1, 17):
        if _fits(request, [Slot(kind.name, key, kind.free_bytes) for key in range(count)]):
            yield f"more devices: {count} x {kind.name}"
            break
    if request.purpose == "inference" and request.dtype not in memory.QUANTISED:
        roomy = [*slots, Slot("host memory", "cpu", 2**50, offload_target=True)]
        if away := spread(request, roomy)[-1]:
            yield f"offload='cpu': {away} of {request.spec.layers} layers in host memory, read anew for each token"


def _changed(request: Request, name: str, value: Any) -> Request:
    """The request with another value; QLoRA brings its dtype along."""
    changes = {name: value}
    if value == "qlora" and request.dtype not in memory.QUANTISED:
        changes["dtype"] = "nf4-double"
    return replace(request, **changes)


def _smaller_dtypes(dtype: str) -> list[str]:
    order = ["float32", "bfloat16", "int8", "nf4", "nf4-double"]
    return order[order.index("bfloat16" if dtype == "float16" else dtype) + 1 :]


def _smaller_falcons(shape: FalconSpec) -> list[FalconSpec]:
    """Published models of the same kind, instruct or base, that have fewer parameters, the largest first."""
    alike = [
        each for each in catalogue() if each.published and bool(each.fine_tuned_from) == bool(shape.fine_tuned_from)
    ]
    return sorted((each for each in alike if each.parameters < shape.parameters), key=lambda each: -each.parameters)
