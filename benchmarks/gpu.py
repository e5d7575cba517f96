"""One command for one GPU of 80 GB: correctness, speed and memory, within eight minutes, without network.

The parts, most wanted first; each is written to the results as it ends, and what a machine lacks is skipped with the
reason. All weights are random. The 7B is whole; of the 40B as many layers as fit. Steps are compared with the time to
read all weights and the cache once, at the bandwidth measured here, and peaks with `fk.plan`.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import falcon_kit as fk
from benchmarks import CannotRun
from falcon_kit import FalconSpec
from falcon_kit.loading.packed import PackedLinear, frozen, quantised4, quantised8

PACKAGES = ("torch", "transformers", "triton", "bitsandbytes", "peft", "accelerate", "trl")


@dataclass(frozen=True)
class Settings:
    """What is measured, and for how long."""

    seven: FalconSpec
    forty: FalconSpec
    """A slice of it is measured."""
    device: torch.device
    batches: tuple[int, ...] = (1, 8, 32)
    context: int = 2000
    compiled: Mapping[str, Any] = field(default_factory=dict)
    """A transformers.CompileConfig for "kit" and "transformers"; without them, nothing is compiled."""
    seconds: float = 460.0
    """No part begins later than this after the start."""


def run() -> Iterator[dict[str, Any]]:
    """The figures after each part. Raises CannotRun without a GPU."""
    if not torch.cuda.is_available():
        raise CannotRun("torch finds no GPU; the whole run needs one of 80 GB")
    from transformers import CompileConfig

    from falcon_kit.loading.compiling import compile_options

    settings = Settings(fk.spec("falcon-7b"), fk.spec("falcon-40b"), torch.device("cuda"))
    options = {"kit": compile_options(True), "transformers": CompileConfig(fullgraph=True)}
    return measure(replace(settings, compiled=options))


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """The figures after each part: a part that fails, or has no time left, is a figure with the reason."""
    start = time.perf_counter()
    figures: dict[str, Any] = {"packages": {name: _version(name) for name in PACKAGES}}
    for name, part in _parts(settings).items():
        begun = time.perf_counter()
        if begun - start > settings.seconds:
            figures[name] = {"skipped": f"{settings.seconds:.0f} seconds were over"}
        else:
            figures[name] = attempted(part) | {"seconds of this part": round(time.perf_counter() - begun, 1)}
        yield dict(figures)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def attempted(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a part measured, or why it did not; its memory is free afterwards."""
    try:
        return part()
    except ImportError as error:
        return {"skipped": f"{error}; transformers here is {_version('transformers')}"}
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {"fits": False, "error": str(error).split(". ")[0]}
    except Exception as error:  # noqa: BLE001  # one part's error must not lose the others' results
        return {"failed": f"{type(error).__name__}: {error}"[:600]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _parts(settings: Settings) -> dict[str, Callable[[], dict[str, Any]]]:
    """The parts by name. Those of the files `_gpu_*` import the kit's model as they run."""

    def of_the_model(name: str, *arguments: Any, file: str = "_gpu_parts") -> Callable[[], dict[str, Any]]:
        return lambda: getattr(import_module(f"benchmarks.{file}"), name)(settings, *arguments)

    return {
        "products against float64": lambda: product_errors(settings.device),
        "logits against float64": of_the_model("against_float64"),
        "bandwidth, GB/s": of_the_model("bandwidth"),
        "7B, bfloat16": of_the_model("both", settings.seven),
        "7B, bfloat16, compiled": of_the_model("compiled", settings.seven, settings.batches[:1]),
        **{f"7B, {dtype}": of_the_model("quantised", settings.seven, dtype) for dtype in ("int4", "nf4", "int8")},
        **{f"tuning, {dtype}": of_the_model("tuning", dtype) for dtype in ("bfloat16", "nf4", "int4")},
        **{f"tuning with SFTTrainer, {dtype}": of_the_model("peer_tuning", dtype) for dtype in ("bfloat16", "nf4")},
        "slice of the 40B, bfloat16": of_the_model("both", None),
        "attention statistics": of_the_model("statistics_of_attention"),
        "slice of the 40B, int4": of_the_model("quantised", None, "int4"),
        "packed rows": of_the_model("packed_rows"),
        "attention of a step": of_the_model("measure_forms", file="_gpu_attention"),
        "7B, int4, compiled": of_the_model("quantised_compiled", settings.seven, "int4"),
        "slice of the 40B, bfloat16, compiled": of_the_model("compiled", None, settings.batches[-1:]),
        "products of a step": of_the_model("products", file="_gpu_step"),
        "kernels of a compiled step": of_the_model("kernels", file="_gpu_step"),
    }


def product_errors(device: torch.device) -> dict[str, Any]:
    """Relative errors of packed layers' products on the device against float64 on the CPU."""
    return {
        f"{kind}, {rows} rows": _product_error(kind, rows, device)
        for kind in ("int4", "int8")
        for rows in (1, 8, 32, 512)
    }


def _product_error(kind: str, rows: int, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, generator=generator) for size in ((512, 1024), (rows, 1024)))
    layer, x = quantised_layer(weight, kind), x.bfloat16()
    expected = x.double() @ layer.dequantised(torch.float64).T
    with torch.inference_mode():
        return relative_error(layer.to(device)(x.to(device)), expected)


def quantised_layer(weight: torch.Tensor, kind: str) -> PackedLinear:
    """A layer with a weight in int8 or int4, which is not packed for a kernel yet."""
    layer = PackedLinear(*weight.shape, kind, None)
    layer.weight, layer.scales = map(frozen, (quantised4 if kind == "int4" else quantised8)(weight))
    return layer


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected, with three digits."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float(f"{float((found - expected).norm() / expected.norm()):.2e}")
