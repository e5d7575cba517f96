"""One command for one GPU of 80 GB: correctness, speed and memory, within eight minutes, without network.

The parts, most wanted first; each is written to the results as it ends, and what a machine lacks is skipped with the
reason. All weights are random. The 7B is whole; of the 40B as many layers as fit. Steps are compared with the time to
read all weights and the cache once, at the bandwidth measured here, and peaks with `fk.plan`.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, FalconConfig, FalconForCausalLM

import falcon_kit as fk
from benchmarks import CannotRun, full_size
from benchmarks._gpu_models import RESERVED, built, cache_bytes, freed, pair, sliced, weight_bytes
from benchmarks.tuning import conversations
from falcon_kit import FalconSpec
from falcon_kit.catalogue import memory
from falcon_kit.loading.packed import PackedLinear, frozen, quantised4, quantised8
from falcon_kit.model import modeling
from falcon_kit.planning.devices import Device
from falcon_kit.planning.placement import GPU_OVERHEAD

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
    compiled: CompileConfig | None = None
    seconds: float = 460.0
    """No part begins later than this after the start."""

    @property
    def free(self) -> float:
        """Bytes that a model may use."""
        return float(torch.cuda.mem_get_info()[0]) if self.device.type == "cuda" else RESERVED + 6e6


def run() -> Iterator[dict[str, Any]]:
    """The figures after each part. Raises CannotRun without a GPU."""
    if not torch.cuda.is_available():
        raise CannotRun("torch finds no GPU; the whole run needs one of 80 GB")
    settings = Settings(fk.spec("falcon-7b"), fk.spec("falcon-40b"), torch.device("cuda"))
    yield from measure(replace(settings, compiled=CompileConfig(fullgraph=True)))


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """The figures after each part: a part that fails, or has no time left, is a figure with the reason."""
    start = time.perf_counter()
    figures: dict[str, Any] = {"packages": {name: _version(name) for name in PACKAGES}}
    for name, part in _parts(settings).items():
        begun = time.perf_counter()
        if begun - start > settings.seconds:
            figures[name] = {"skipped": f"{settings.seconds:.0f} seconds were over"}
        else:
            figures[name] = _attempted(part) | {"seconds of this part": round(time.perf_counter() - begun, 1)}
        yield figures


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _attempted(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        with freed():
            return part()
    except ImportError as error:
        return {"skipped": str(error)}
    except torch.OutOfMemoryError as error:
        return {"fits": False, "error": str(error).split(". ")[0]}
    except Exception as error:  # noqa: BLE001  # one part's error must not lose the others' results
        return {"failed": f"{type(error).__name__}: {error}"[:600]}


def _parts(settings: Settings) -> dict[str, Callable[[], dict[str, Any]]]:
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "against float64": lambda: against_float64(settings.device),
        "bandwidth, GB/s": lambda: {"copy": round(full_size._bandwidth(settings.device) / 1e9)},
    }
    forty = sliced(settings.forty, settings.free, max(settings.batches), settings.context)
    for shape in (settings.seven, forty):
        parts[f"{shape.name}, bfloat16"] = lambda shape=shape: both(shape, settings)
    for dtype in ("int4", "nf4", "int8"):
        parts[f"{settings.seven.name}, {dtype}"] = lambda dtype=dtype: quantised(settings.seven, dtype, settings)
    parts["attention statistics"] = lambda: statistics_of_attention(settings)
    for dtype in ("bfloat16", "nf4", "int4"):
        parts[f"tuning, {dtype}"] = lambda dtype=dtype: tuning(settings.seven, dtype, settings)
    parts[f"{forty.name}, int4"] = lambda: quantised(forty, "int4", settings)
    for dtype in ("bfloat16", "nf4"):
        parts[f"tuning with SFTTrainer, {dtype}"] = lambda dtype=dtype: peer_tuning(settings, dtype)
    return parts


# Against float64


def against_float64(device: torch.device) -> dict[str, Any]:
    """Relative errors of logits and products on the device against float64 on the CPU."""
    shapes = {
        "40B": FalconSpec("", 2, 512, 8, 2, 512, 2048),
        "7B": FalconSpec("", 2, 320, 5, 1, 512, 1280, norms_per_block=1, new_decoder_architecture=False),
    }
    errors = {
        f"{layout}, {dtype}, {mode}": _model_error(shape, getattr(torch, dtype), device, mode)
        for layout, shape in shapes.items()
        for dtype in ("float32", "bfloat16", "float16")
        for mode in ("prefill", "decode", "left-padded batch")
    }
    return errors | {
        f"product, {kind}, {rows} rows": _product_error(kind, rows, device)
        for kind in ("int4", "int8")
        for rows in (1, 8, 32, 512)
    }


def _model_error(shape: FalconSpec, dtype: torch.dtype, device: torch.device, mode: str) -> float:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exact = modeling.FalconForCausalLM(FalconConfig(**shape.to_config(), initializer_range=0.1)).double().eval()
        model = modeling.FalconForCausalLM(exact.config).to(dtype).to(device).eval()
    model.load_state_dict(exact.state_dict())
    ids = torch.arange(12, 12 + 2 * 130).view(2, 130) % shape.vocabulary
    mask = torch.ones_like(ids)
    if mode == "left-padded batch":
        mask[1, :50] = 0
    with torch.inference_mode():
        expected = exact(ids, attention_mask=mask).logits[:, -1]
        ids, mask = ids.to(device), mask.to(device)
        if mode == "decode":
            past = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
            found = model(ids[:, -1:], attention_mask=mask, past_key_values=past).logits[:, -1]
        else:
            found = model(ids, attention_mask=mask).logits[:, -1]
    return _relative(found, expected)


def _product_error(kind: str, rows: int, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, generator=generator) for size in ((512, 1024), (rows, 1024)))
    layer = PackedLinear(512, 1024, kind, None)
    values, scales = (quantised4 if kind == "int4" else quantised8)(weight)
    layer.weight, layer.scales = frozen(values), frozen(scales)
    x = x.bfloat16()
    expected = x.double() @ layer.dequantised(torch.float64).T
    with torch.inference_mode():
        return _relative(layer.to(device)(x.to(device)), expected)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found = found.double().cpu()
    return float(f"{float((found - expected).norm() / expected.norm()):.2e}")


# Speed and memory


def both(shape: FalconSpec, settings: Settings) -> dict[str, Any]:
    """The kit and transformers with the same bfloat16 weights: eager at each batch, compiled at the first and last."""
    models = pair(shape, settings.device)
    figures = {name: _speeds(model, shape, "bfloat16", settings) for name, model in models.items()}
    ratios = {
        f"{how}, batch {batch}": round(theirs["ms per step"] / ours["ms per step"], 2)
        for how, batch in figures["kit"]["decode"]
        if "ms per step" in (ours := figures["kit"]["decode"][how, batch])
        and "ms per step" in (theirs := figures["transformers"]["decode"].get((how, batch), {}))
    }
    return (
        {"layers": shape.layers}
        | {
            name: each | {"decode": {f"{how}, batch {batch}": row for (how, batch), row in each["decode"].items()}}
            for name, each in figures.items()
        }
        | {"transformers' time over the kit's": ratios}
    )


def quantised(shape: FalconSpec, dtype: str, settings: Settings) -> dict[str, Any]:
    """The kit in a quantised dtype; compiled where it can be."""
    model = built(shape, settings.device, modeling.FalconForCausalLM, dtype)
    figures = _speeds(model, shape, dtype, replace(settings, compiled=settings.compiled if dtype == "int4" else None))
    decode = {f"{how}, batch {batch}": row for (how, batch), row in figures["decode"].items()}
    return {"layers": shape.layers} | figures | {"decode": decode}


def _speeds(model: FalconForCausalLM, shape: FalconSpec, dtype: str, settings: Settings) -> dict[str, Any]:
    bandwidth = full_size._bandwidth(settings.device)
    size = weight_bytes(model)
    decode: dict[tuple[str, int], dict[str, Any]] = {}
    for batch in settings.batches:
        decode["eager", batch] = _decoded(model, shape, size, batch, settings, bandwidth, {})
    for batch in (settings.batches[0], settings.batches[-1]) if settings.compiled else ():
        arguments = {"cache_implementation": "static", "compile_config": settings.compiled}
        decode["compiled", batch] = _decoded(model, shape, size, batch, settings, bandwidth, arguments)
    return {
        "weights, GiB": round(size / 2**30, 3),
        "prefill": _prefill(model, shape, dtype, settings),
        "decode": decode,
    }


def _decoded(
    model: FalconForCausalLM,
    shape: FalconSpec,
    size: int,
    batch: int,
    settings: Settings,
    bandwidth: float,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    with freed():
        seconds = full_size._decode(model, batch, settings.context, arguments).seconds
    if seconds is None:
        return {"fits": False}
    least = (size + shape.kv_bytes_per_token() * batch * settings.context) / bandwidth
    return {
        "ms per step": round(1000 * seconds, 3),
        "ms per layer, head included": round(1000 * seconds / shape.layers, 4),
        "tokens/s": round(batch / seconds, 1),
        "share of the bandwidth": round(least / seconds, 3),
    }


def _prefill(model: FalconForCausalLM, shape: FalconSpec, dtype: str, settings: Settings) -> dict[str, Any]:
    """One text of the context: seconds, the bytes of its cache, and the peak beside the plan's."""
    device = settings.device
    ids = torch.randint(12, shape.vocabulary, (1, settings.context), device=device)
    past: Any = None

    def once() -> None:
        nonlocal past
        past = model(ids, logits_to_keep=1, use_cache=True).past_key_values

    with torch.inference_mode():
        once()
        if device.type == "cuda":
            past = None
            torch.cuda.reset_peak_memory_stats()
        seconds = [full_size._seconds(once, device) for _ in range(3)]
    figures = {"ms": round(1000 * statistics.median(seconds), 2), "cache bytes": cache_bytes(past)}
    figures["planned cache bytes"] = shape.kv_bytes_per_token() * settings.context
    return figures | _peak(shape, dtype, settings, "inference")


def _peak(shape: FalconSpec, dtype: str, settings: Settings, purpose: Any, **size: int) -> dict[str, Any]:
    """torch's peak and the plan's, without the CUDA context, which torch does not count."""
    device = Device("this GPU", 0, int(1e13))
    planned = fk.plan(shape, dtype, context=settings.context, purpose=purpose, devices=[device], **size).total_bytes
    planned -= GPU_OVERHEAD
    if settings.device.type != "cuda":
        return {"planned peak, GiB": round(planned / 2**30, 4), "peak": "measured on GPUs only"}
    peak = torch.cuda.max_memory_allocated()
    names = ("planned peak, GiB", "peak, GiB", "planned over measured")
    return dict(zip(names, (round(planned / 2**30, 3), round(peak / 2**30, 3), round(planned / peak, 3)), strict=True))


# Inspection and tuning


def _falcon(shape: FalconSpec, model: FalconForCausalLM) -> Any:
    """The model as `fk.load` would return it, with Falconet's tokenizer."""
    model.name_or_path = ""
    return replace(fk.load("falconet"), model=model, spec=shape)


def statistics_of_attention(settings: Settings) -> dict[str, Any]:
    """`fk.attention` of one text of the context, without maps."""
    shape = settings.seven
    falcon = _falcon(shape, built(shape, settings.device, modeling.FalconForCausalLM, "bfloat16"))
    ids = torch.randint(12, 2000, (settings.context,)).tolist()
    fk.attention(falcon, ids[:64])
    if settings.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = full_size._seconds(lambda: fk.attention(falcon, ids), settings.device)
    weights = memory.weight_bytes(shape, "bfloat16")
    peak = torch.cuda.max_memory_allocated() - weights if settings.device.type == "cuda" else None
    return {"tokens": len(ids), "seconds": round(seconds, 2), "bytes beside the weights": peak}


def tuning(shape: FalconSpec, dtype: str, settings: Settings, steps: int = 3) -> dict[str, Any]:
    """`fk.tune` for a few steps of one packed row each: tokens per second, and the peak beside the plan's."""
    falcon = _falcon(shape, built(shape, settings.device, modeling.FalconForCausalLM, dtype))
    rows = conversations(8 * steps, 0, falcon.tokenizer)
    options: dict[str, Any] = {"held_out": 0, "max_steps": steps, "quiet": True, "gradient_checkpointing": True, "r": 8}
    options |= {"context": min(2048, shape.context), "per_device_train_batch_size": 1, "save_steps": 10_000}
    with tempfile.TemporaryDirectory() as folder:
        if settings.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        fk.tune(falcon, rows, output_dir=Path(folder) / "run", **options)
        seconds = time.perf_counter() - start
    purpose = "lora" if dtype == "bfloat16" else "qlora"
    sized = replace(settings, context=options["context"])
    return {
        "steps": steps,
        "seconds, from rows to adapter": round(seconds, 2),
        "tokens/s": round(steps * options["context"] / seconds, 1),
    } | _peak(shape, dtype, sized, purpose, r=8)


def peer_tuning(settings: Settings, dtype: str, steps: int = 3) -> dict[str, Any]:
    """TRL's SFTTrainer with packing on the same rows and adapters. Raises ImportError without TRL."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from benchmarks.tuning import _arguments, _lora

    shape, tokenizer = settings.seven, fk.load("falconet").tokenizer
    model = built(shape, settings.device, FalconForCausalLM, dtype)
    tokens = min(2048, shape.context)
    with tempfile.TemporaryDirectory() as folder:
        options = _arguments(Path(folder), 1, 1) | {"max_steps": steps, "max_length": tokens, "packing": True}
        options |= {"use_cpu": settings.device.type == "cpu", "gradient_checkpointing": True}
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**options),
            train_dataset=Dataset.from_list(conversations(8 * steps, 0, tokenizer)),
            processing_class=tokenizer,
            peft_config=_lora(),
        )
        if settings.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = full_size._seconds(trainer.train, settings.device)
    peak = torch.cuda.max_memory_allocated() if settings.device.type == "cuda" else None
    return {
        "steps": steps,
        "seconds": round(seconds, 2),
        "tokens/s": round(steps * tokens / seconds, 1),
        "peak, GiB": peak and round(peak / 2**30, 3),
    }
