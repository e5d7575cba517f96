"""Where the time of a step of one token goes: its kernels by name, and the products of a layer, each by itself."""

from typing import Any

import torch
from torch.autograd import DeviceType
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile
from transformers import StoppingCriteria

from benchmarks import full_size
from benchmarks._gpu_attention import distinct, timed
from benchmarks._gpu_models import built, freed
from benchmarks._gpu_parts import _static
from benchmarks.gpu import Settings
from falcon_kit import FalconSpec
from falcon_kit.catalogue.memory import linear_shapes
from falcon_kit.model import modeling

_FIRST, _LAST = 4, 36
"""The tokens after which the profiler begins and ends, of `full_size.NEW_TOKENS`."""
_LARGEST = 10
_PROJECTIONS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


# Kernels


def kernels(settings: Settings) -> dict[str, Any]:
    """A compiled step of the 7B at the first batch: its time, its largest kernels, the others, and the gaps.

    The time is that of steps without the profiler. The gaps are what is left of it: then, no kernel runs.
    """
    if not settings.compiled:
        return {"skipped": "nothing is compiled here"}
    model = built(settings.seven, settings.device, modeling.FalconForCausalLM, "bfloat16")
    step: Any = model, settings.batches[0], settings.context, _static(settings.compiled["kit"])
    with freed():
        if (seconds := full_size._decode(*step).seconds) is None:
            return {"fits": False}
        profiled = _Profiled(settings.device)
        full_size._generate(*step, profiled)
    rows = profiled.rows()
    others, total = rows[_LARGEST:], sum(microseconds for _, microseconds, _ in rows)
    return {
        "ms per step": round(1e3 * seconds, 3),
        "largest kernels": {name: _row(microseconds, calls) for name, microseconds, calls in rows[:_LARGEST]},
        "other kernels": _row(sum(each[1] for each in others), sum(each[2] for each in others)),
        "gaps": {"microseconds": round(1e6 * seconds - total, 2)},
    }


def _row(microseconds: float, calls: float) -> dict[str, float]:
    return {"microseconds": round(microseconds, 2), "calls": round(calls, 2)}


class _Profiled(StoppingCriteria):
    """Profiles the steps from one token to another; never stops the generation. On a CPU, kernels are operations."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._tokens = device, 0
        self._on_gpu = device.type == "cuda"
        self._profile = profile(activities=[ProfilerActivity.CUDA if self._on_gpu else ProfilerActivity.CPU])

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._tokens += 1
        if self._tokens in (_FIRST, _LAST):
            full_size._synchronize(self._device)
            (self._profile.start if self._tokens == _FIRST else self._profile.stop)()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def rows(self) -> list[tuple[str, float, float]]:
        """Name, microseconds and calls of each kernel in a step, the largest first."""
        kind, steps = DeviceType.CUDA if self._on_gpu else DeviceType.CPU, _LAST - _FIRST
        found = [
            (each.key, each.self_device_time_total if self._on_gpu else each.self_cpu_time_total, each.count)
            for each in self._profile.key_averages()
            if each.device_type == kind and not each.is_user_annotation
        ]
        rows = [(name, microseconds / steps, count / steps) for name, microseconds, count in found]
        return sorted(rows, key=lambda row: -row[1])


# Products


def products(settings: Settings) -> dict[str, Any]:
    """The projections of a layer of both shapes at the first and the last batch, each by itself and joined."""
    bandwidth = full_size._bandwidth(settings.device)
    return {
        f"{name}, batch {batch}": _compared(shape, batch, settings.device, bandwidth)
        for name, shape in (("7B", settings.seven), ("40B", settings.forty))
        for batch in (settings.batches[0], settings.batches[-1])
    }


def _compared(shape: FalconSpec, batch: int, device: torch.device, bandwidth: float) -> dict[str, Any]:
    sizes = dict(zip(_PROJECTIONS, linear_shapes(shape), strict=True))
    figures = {name: _product(out, into, batch, device, bandwidth) for name, (out, into) in sizes.items()}
    for parts, (out, into) in joined(shape).items():
        row = _product(out, into, batch, device, bandwidth)
        apart = sum(figures[name]["microseconds"] for name in parts)
        figures[" and ".join(parts)] = row | {"time over the separate ones'": round(row["microseconds"] / apart, 2)}
    return figures


def joined(shape: FalconSpec) -> dict[tuple[str, str], tuple[int, int]]:
    """(out, in) of the projections that could be one matrix: of the same input by rows, of added outputs by columns."""
    (fused, d), _, (up, _), (_, down) = linear_shapes(shape)
    by_rows = {(_PROJECTIONS[0], _PROJECTIONS[2]): (fused + up, d)} if shape.norms_per_block == 1 else {}
    by_columns = {(_PROJECTIONS[1], _PROJECTIONS[3]): (d, d + down)} if shape.parallel_block else {}
    return by_rows | by_columns


def _product(out: int, into: int, batch: int, device: torch.device, bandwidth: float) -> dict[str, Any]:
    """The time of rows (B, in) times a matrix (out, in), beside that of reading the matrix."""
    on: Any = {"device": device, "dtype": torch.bfloat16}
    bytes = 2 * out * into
    calls = [(torch.randn(batch, into, **on), torch.randn(out, into, **on)) for _ in range(distinct(bytes, device))]
    return timed(linear, calls, bytes / bandwidth, device)
