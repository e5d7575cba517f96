"""What to change where a model does not fit, and the doubts about one that fits by arithmetic alone."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from falcon_kit.catalogue import memory
from falcon_kit.catalogue.names import catalogue
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.tables import format_bytes
from falcon_kit.planning import placement
from falcon_kit.planning.devices import MARGIN, Device, devices_of
from falcon_kit.planning.machines import MACHINES, machines_of, published_report
from falcon_kit.planning.placement import CPU_OVERHEAD, Request, layers_per_device

MARGIN_DOUBT = f"less than {MARGIN:.0%} of a GPU would stay free, and torch's allocator and libraries need some of it"
"""The doubt about a model that fits, but without the margin."""
_UNKNOWN_HOST = 2**50
"""Bytes of host memory, more than any machine has, where the plan's devices do not tell it."""


class Suggestion(str):
    """One change that helps by itself: a text, with the arguments that it changes and their values."""

    __slots__ = ("changes",)

    changes: dict[str, Any]
    """Arguments of `plan`, or "offload" or "max_memory" of `fk.load`; empty for another machine, or another call."""

    def __new__(cls, text: str = "", **changes: Any) -> Self:
        """The text is that of the arguments unless it is given."""
        made = super().__new__(cls, text or ", ".join(f"{name}={value!r}" for name, value in changes.items()))
        made.changes = changes
        return made


_ENDPOINT = Suggestion("an endpoint on another machine: fk.connect")


def in_words_of(names: Mapping[str, str], changes: Iterable[Suggestion]) -> Iterator[Suggestion]:
    """The changes as arguments of another function; those with an argument that it does not have are left out.

    names: its arguments by those of `plan`.
    """
    for each in changes:
        if each.changes.keys() <= names.keys():
            renamed = {names[name]: value for name, value in each.changes.items()}
            yield each if renamed == each.changes else Suggestion(**renamed)


def without_margin(devices: Sequence[Device]) -> tuple[Device, ...]:
    """The devices with the memory that a plan may fill."""
    return tuple(replace(device, free_bytes=device.safe_bytes) for device in devices)


def report_doubt(request: Request, devices: Sequence[Device]) -> str:
    """What published reports say against a model that fits by arithmetic; empty where they say nothing."""
    applies = not (request.trains or devices[0].key == "cpu" or any(device.offload_target for device in devices))
    report = published_report(request.spec, request.dtype) if applies else None
    needed, source = report or (0, "")
    if sum(device.free_bytes for device in devices) >= needed:
        return ""
    return f"published reports needed {format_bytes(needed)} ({source})"


def _fits(request: Request, devices: Sequence[Device]) -> bool:
    placed = sum(layers_per_device(request, without_margin(devices)))
    return placed == request.spec.layers and not report_doubt(request, devices)


def _like(device: Device, count: int) -> list[Device]:
    return [replace(device, key=key) for key in range(count)]


def tensor_parallel_suggestions(request: Request, devices: Sequence[Device]) -> Iterator[Suggestion]:
    """Changes with which the model fits, the least loss of quality first."""
    kv_heads, device = request.spec.kv_heads, devices[0]
    larger = [each for each in range(request.tensor_parallel + 1, kv_heads + 1) if kv_heads % each == 0]
    for ranks in larger if device.key != "cpu" else ():
        more = _like(device, ranks)
        parts = list(placement.tensor_parallel_parts(replace(request, tensor_parallel=ranks), more))
        if placement.fits_in_memory(without_margin(more), parts):
            yield Suggestion(f"tensor_parallel={ranks} on {ranks} x {device.name}")
            break
    undivided = replace(request, tensor_parallel=1)
    for dtype in (request.dtype, *_smaller_dtypes(request, devices)):
        if _fits(replace(undivided, dtype=dtype), devices):
            text = f"split by layers, without tensor_parallel, in dtype={dtype!r}"
            yield Suggestion(text, tensor_parallel=1, dtype=dtype)
            break
    yield _ENDPOINT


def suggestions(request: Request, devices: Sequence[Device]) -> Iterator[Suggestion]:
    """Changes with which the model fits, the least loss of quality first; per argument the first value that fits."""
    halvings = range(1, 8)
    candidates: dict[str, Sequence[Any]] = {
        "cache": ["grouped"] if request.cache == "transformers" else [],
        "dtype": _smaller_dtypes(request, devices),
        "purpose": _less_training(request, devices),
        "context": [request.context >> times for times in halvings if request.context >> times >= 64],
        "batch": [request.batch >> times for times in halvings if request.batch >> times],
        "spec": _smaller_falcons(request),
    }
    splits = devices[0].key != "cpu" and not devices[-1].offload_target
    if splits:
        yield from _later_gpus(request, devices)
    for name, values in candidates.items():
        fitting = next((value for value in values if _fits(_changed(request, name, value), devices)), None)
        if fitting is not None:
            yield _suggestion(request, name, fitting)
    if splits:
        yield from _larger_machine(request, devices) if devices[0].machine else _more_devices(request, devices)
        yield from _offloading(request, devices)
    if not request.trains:
        yield _ENDPOINT


def _suggestion(request: Request, name: str, value: Any) -> Suggestion:
    if isinstance(value, FalconSpec):
        return Suggestion(f"another model: {value.name}", name=value.name)
    dtype = _changed(request, name, value).dtype
    return Suggestion(**{name: value} | ({} if dtype == request.dtype else {"dtype": dtype}))


def _later_gpus(request: Request, devices: Sequence[Device]) -> Iterator[Suggestion]:
    """The later GPUs alone, where the first one, which holds the embedding, has no room: another program may use it."""
    for first in range(1, len(devices)):
        if _fits(request, devices[first:]):
            sizes = {device.key: f"{math.ceil(device.free_bytes / 2**30)}GiB" for device in devices[first:]}
            yield Suggestion(f"fk.load(..., max_memory={sizes}): the other GPUs have no room", max_memory=sizes)
            break


def _more_devices(request: Request, devices: Sequence[Device]) -> Iterator[Suggestion]:
    for count in range(len(devices) + 1, 17):
        if _fits(request, _like(devices[0], count)):
            yield Suggestion(f"more devices: {count} x {devices[0].name}")
            break


def _larger_machine(request: Request, devices: Sequence[Device]) -> Iterator[Suggestion]:
    """The machine of the same provider with the least GPU memory in which the model fits."""
    offered = machines_of(MACHINES[devices[0].machine].provider)
    if larger := next((each for each in offered if _fits(request, devices_of(each))), None):
        yield Suggestion(f"another machine: {larger.name}, {larger.count} x {larger.gpu}")


def _offloading(request: Request, devices: Sequence[Device]) -> Iterator[Suggestion]:
    """Layers in host memory, where the machine has it; where its host memory is not known, with the size it needs."""
    if request.trains or request.dtype in memory.QUANTISED:
        return
    known = devices[0].host_bytes
    free = _UNKNOWN_HOST if known is None else max(0, known - CPU_OVERHEAD)
    targets = [*without_margin(devices), Device("host memory", "cpu", free, offload_target=True)]
    if offloaded := layers_per_device(request, targets)[-1]:
        weights, _ = request.layer_parts()["weights"]
        needs = "" if known else f" ({format_bytes(offloaded * weights)} of it)"
        layers = f"{offloaded} of {request.spec.layers} layers in host memory{needs}"
        yield Suggestion(f"fk.load(..., offload='cpu'): {layers}, copied to the GPU for each token", offload="cpu")


def _changed(request: Request, name: str, value: Any) -> Request:
    """The request with another value of one field. For QLoRA, the dtype changes too."""
    changes = {name: value}
    if value == "qlora" and request.dtype not in memory.QUANTISED:
        changes["dtype"] = "nf4-double"
    return replace(request, **changes)


def _smaller_dtypes(request: Request, devices: Sequence[Device]) -> list[str]:
    """From large to small, without float16, which takes as much memory as bfloat16.

    Of the two with four bits, int4 to run on a CPU, where it is several times as fast, and nf4 everywhere else: QLoRA
    was published with it, and on a GPU it was the faster one for prompts (`benchmarks/README.md`).
    """
    on_cpu = devices[0].key == "cpu" and request.purpose == "inference"
    other = "nf4" if on_cpu else "int4"
    smaller = memory.DTYPES[memory.DTYPES.index(request.dtype) + 1 :]
    allowed = smaller if _can_be_quantised(request, devices) else memory.FLOAT_DTYPES
    return [each for each in smaller if each in allowed and each not in ("float16", other)]


def _can_be_quantised(request: Request, devices: Sequence[Device]) -> bool:
    """Whether `fk.load` quantises it: no layer of transformers' own Falcon, and none that is offloaded."""
    offloads = any(device.offload_target for device in devices)
    return request.purpose != "full" and request.cache == "grouped" and not offloads


def _less_training(request: Request, devices: Sequence[Device]) -> list[str]:
    """Purposes that train fewer weights, or quantised ones."""
    less = {"full": ["lora", "qlora"], "lora": ["qlora"]}.get(request.purpose, [])
    return [each for each in less if each == "lora" or _can_be_quantised(replace(request, purpose="qlora"), devices)]


def _smaller_falcons(request: Request) -> list[FalconSpec]:
    """Published models of the same kind, instruct or base, with fewer parameters, the largest first."""
    shape, long_enough = request.spec, [each for each in catalogue() if each.context >= request.context]
    published = [each for each in long_enough if each.published and each.parameters < shape.parameters]
    same_kind = [each for each in published if bool(each.fine_tuned_from) == bool(shape.fine_tuned_from)]
    return sorted(same_kind, key=lambda each: -each.parameters)
