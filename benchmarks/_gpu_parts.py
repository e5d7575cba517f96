"""The parts of `python -m benchmarks gpu` that need the kit's model, and with it the kit's version of transformers."""

import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import FalconConfig, FalconForCausalLM
from transformers.trainer_callback import CallbackHandler

import falcon_kit as fk
from benchmarks import full_size
from benchmarks._gpu_models import RESERVED, built, cache_bytes, freed, pair, sliced, weight_bytes
from benchmarks.gpu import Settings, relative_error
from benchmarks.tuning import conversations
from falcon_kit import FalconSpec
from falcon_kit.catalogue import memory
from falcon_kit.model import modeling, packed_documents
from falcon_kit.planning.devices import Device
from falcon_kit.planning.placement import GPU_OVERHEAD

_GPU = Device("this GPU", 0, int(1e13))
"""For plans: larger than any."""


def bandwidth(settings: Settings) -> dict[str, Any]:
    """Bytes read and written per second by a copy."""
    return {"copy": round(full_size._bandwidth(settings.device) / 1e9)}


def slice_of(settings: Settings) -> FalconSpec:
    """As much of the 40B as fits with transformers' cache at the largest batch."""
    free = float(torch.cuda.mem_get_info()[0]) if settings.device.type == "cuda" else RESERVED + 6e6
    return sliced(settings.forty, free, max(settings.batches), settings.context)


# Against float64


def against_float64(settings: Settings) -> dict[str, Any]:
    """Relative errors of logits on the device against float64 on the CPU."""
    shapes = {
        "40B": FalconSpec("", 2, 512, 8, 2, 512, 2048),
        "7B": FalconSpec("", 2, 320, 5, 1, 512, 1280, norms_per_block=1, new_decoder_architecture=False),
    }
    return {
        f"{layout}, {dtype}, {mode}": error
        for layout, shape in shapes.items()
        for dtype in ("float32", "bfloat16", "float16")
        for mode, error in _model_errors(shape, getattr(torch, dtype), settings.device).items()
    }


def _model_errors(shape: FalconSpec, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exact = modeling.FalconForCausalLM(FalconConfig(**shape.to_config(), initializer_range=0.1)).double().eval()
        model = modeling.FalconForCausalLM(exact.config).to(dtype).to(device).eval()
    model.load_state_dict(exact.state_dict())
    ids = torch.arange(12, 12 + 2 * 130).view(2, 130) % shape.vocabulary
    whole, padded = torch.ones_like(ids), torch.ones_like(ids)
    padded[1, :50] = 0

    def logits(of: torch.nn.Module, mask: torch.Tensor) -> torch.Tensor:
        return of(ids.to(of.device), attention_mask=mask.to(of.device)).logits[:, -1]

    with torch.inference_mode():
        expected, on_device = logits(exact, whole), whole.to(device)
        past = model(ids[:, :-1].to(device), attention_mask=on_device[:, :-1], use_cache=True).past_key_values
        step = model(ids[:, -1:].to(device), attention_mask=on_device, past_key_values=past).logits[:, -1]
        return {
            "prefill": relative_error(logits(model, whole), expected),
            "decode": relative_error(step, expected),
            "left-padded batch": relative_error(logits(model, padded), logits(exact, padded)),
        }


# Speed and memory


def both(settings: Settings, shape: FalconSpec | None) -> dict[str, Any]:
    """The kit and transformers with the same bfloat16 weights, eager at each batch, and what the kit's prefill takes.

    shape: None for the slice of the 40B.
    """
    shape = shape or slice_of(settings)
    models = pair(shape, settings.device)
    steps = {
        name: {batch: _decoded(model, shape, batch, settings) for batch in settings.batches}
        for name, model in models.items()
    }
    prefill = {name: _prefill(model, shape, "bfloat16", settings) for name, model in models.items()}
    return {"layers": shape.layers, "prefill": prefill, "decode": _named(steps), "ratios": _ratios(steps)}


def compiled(settings: Settings, shape: FalconSpec | None, batches: tuple[int, ...]) -> dict[str, Any]:
    """Both models as above, compiled. shape: None for the slice of the 40B."""
    if not settings.compiled:
        return {"skipped": "nothing is compiled here"}
    shape = shape or slice_of(settings)
    steps = {
        name: {batch: _decoded(model, shape, batch, settings, _static(settings.compiled[name])) for batch in batches}
        for name, model in pair(shape, settings.device).items()
    }
    return {"layers": shape.layers, "decode": _named(steps), "ratios": _ratios(steps)}


def _named(steps: dict[str, dict[int, Any]]) -> dict[str, Any]:
    return {f"{name}, batch {batch}": row for name, rows in steps.items() for batch, row in rows.items()}


def _ratios(steps: dict[str, dict[int, Any]]) -> dict[str, float]:
    """transformers' time over the kit's, at each batch that fits with both."""
    unit = "ms per step"
    pairs = {batch: (steps["transformers"][batch], ours) for batch, ours in steps["kit"].items()}
    return {
        f"batch {batch}": round(theirs[unit] / ours[unit], 2)
        for batch, (theirs, ours) in pairs.items()
        if unit in theirs and unit in ours
    }


def quantised(settings: Settings, shape: FalconSpec | None, dtype: str) -> dict[str, Any]:
    """The kit in a quantised dtype, eager. shape: None for the slice of the 40B."""
    shape = shape or slice_of(settings)
    model = built(shape, settings.device, modeling.FalconForCausalLM, dtype)
    batches = (settings.batches[0], settings.batches[-1])
    steps = {"kit": {batch: _decoded(model, shape, batch, settings) for batch in batches}}
    weights = round(weight_bytes(model) / 2**30, 3)
    prefill = _prefill(model, shape, dtype, settings)
    return {"layers": shape.layers, "weights, GiB": weights, "prefill": prefill, "decode": _named(steps)}


def quantised_compiled(settings: Settings, shape: FalconSpec, dtype: str) -> dict[str, Any]:
    """The kit in a quantised dtype at the first batch, compiled."""
    if not settings.compiled:
        return {"skipped": "nothing is compiled here"}
    model = built(shape, settings.device, modeling.FalconForCausalLM, dtype)
    options = _static(settings.compiled["kit"])
    return {"layers": shape.layers} | _decoded(model, shape, settings.batches[0], settings, options)


def _static(compiled: Any) -> dict[str, Any]:
    return {"cache_implementation": "static", "compile_config": compiled}


def _decoded(
    model: FalconForCausalLM, shape: FalconSpec, batch: int, settings: Settings, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Time per step and per layer, and the share of it that reading weights and cache once takes."""
    bandwidth = full_size._bandwidth(settings.device)
    start = time.perf_counter()
    with freed():
        seconds = full_size._decode(model, batch, settings.context, options or {}).seconds
    if seconds is None:
        return {"fits": False}
    least = (weight_bytes(model) + shape.kv_bytes_per_token() * batch * settings.context) / bandwidth
    return {
        "ms per step": round(1000 * seconds, 3),
        "ms per layer, head included": round(1000 * seconds / shape.layers, 4),
        "tokens/s": round(batch / seconds, 1),
        "share of the bandwidth": round(least / seconds, 3),
        "seconds to measure": round(time.perf_counter() - start, 1),
    }


def _prefill(model: FalconForCausalLM, shape: FalconSpec, dtype: str, settings: Settings) -> dict[str, Any]:
    """One text of the context: seconds, the bytes of its cache, and the peak beside the plan's."""
    device = settings.device
    ids = torch.randint(12, shape.vocabulary, (1, settings.context), device=device)
    past: Any = None

    def once() -> None:
        nonlocal past
        past = None  # the cache of the call before
        past = model(ids, logits_to_keep=1, use_cache=True).past_key_values

    with torch.inference_mode():
        once()
        full_size._reset_peak(device)
        seconds = [full_size._seconds(once, device) for _ in range(3)]
    figures = {"ms": round(1000 * statistics.median(seconds), 2), "cache bytes": cache_bytes(past)}
    cache: Any = "grouped" if isinstance(model, modeling.FalconForCausalLM) else "transformers"
    plan = fk.plan(shape, dtype, context=settings.context, devices=[_GPU], cache=cache)
    return figures | {"planned cache bytes": plan.kv_bytes} | _peak(plan, settings)


def _peak(plan: fk.Plan, settings: Settings) -> dict[str, Any]:
    """torch's peak and the plan's, without the CUDA context, which torch does not count."""
    planned = plan.total_bytes - GPU_OVERHEAD
    peak = full_size._peak_bytes(settings.device)
    if peak is None:
        return {"planned peak, GiB": round(planned / 2**30, 4), "peak": "measured on GPUs only"}
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
    full_size._reset_peak(settings.device)
    seconds = full_size._seconds(lambda: fk.attention(falcon, ids), settings.device)
    peak = full_size._peak_bytes(settings.device)
    beside = peak and peak - memory.weight_bytes(shape, "bfloat16")
    return {"tokens": len(ids), "seconds": round(seconds, 2), "bytes beside the weights": beside}


def packed_rows(settings: Settings) -> dict[str, Any]:
    """Forward and backward through four layers of the 7B, for one row of eight documents: torch's variable-length
    kernel against attention under a mask."""
    shape = replace(settings.seven, layers=min(4, settings.seven.layers))
    model = built(shape, settings.device, modeling.FalconForCausalLM, "bfloat16").transformer
    tokens = min(2048, shape.context)
    positions = (torch.arange(tokens, device=settings.device) % (tokens // 8))[None]
    hidden = torch.randn(1, tokens, shape.d_model, dtype=torch.bfloat16, device=settings.device, requires_grad=True)

    def step() -> torch.Tensor:
        output = model(inputs_embeds=hidden, position_ids=positions).last_hidden_state
        (gradient,) = torch.autograd.grad(output.float().square().sum(), hidden)
        return gradient

    figures: dict[str, Any] = {"has the kernel": packed_documents.has_kernel(hidden)}
    gradients = []
    for way, has_kernel in {"within documents": packed_documents.has_kernel, "under a mask": lambda _: False}.items():
        with patch.object(packed_documents, "has_kernel", has_kernel):
            gradients.append(step())
            full_size._reset_peak(settings.device)
            seconds = min(full_size._seconds(step, settings.device) for _ in range(3))
            figures[way] = {"ms": round(1e3 * seconds, 2), "peak bytes": full_size._peak_bytes(settings.device)}
    return figures | {"relative difference": relative_error(*(each.double().cpu() for each in gradients))}


def tuning(settings: Settings, dtype: str, steps: int = 8) -> dict[str, Any]:
    """`fk.tune` for a few steps of one packed row each: tokens per second, and the peak beside the plan's."""
    shape = settings.seven
    falcon = _falcon(shape, built(shape, settings.device, modeling.FalconForCausalLM, dtype))
    rows = conversations(8 * steps, 0, falcon.tokenizer)
    options: dict[str, Any] = {"held_out": 0, "max_steps": steps, "quiet": True, "gradient_checkpointing": True, "r": 8}
    options |= {"context": min(2048, shape.context), "per_device_train_batch_size": 1, "save_steps": 10_000}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\d+ conversations are cut")  # at the short context of the tiny form
        full_size._reset_peak(settings.device)
        start = time.perf_counter()
        with _step_ends(settings.device) as ends:
            fk.tune(falcon, rows, output_dir=Path(folder) / "run", **options)
        seconds = time.perf_counter() - start
    purpose = "lora" if dtype == "bfloat16" else "qlora"
    sized = replace(settings, context=options["context"])
    return {
        "seconds, from rows to adapter": round(seconds, 2),
        **_speed(ends, options["context"]),
    } | _peak(fk.plan(shape, dtype, context=sized.context, purpose=purpose, r=8, devices=[_GPU]), sized)


def peer_tuning(settings: Settings, dtype: str, steps: int = 8) -> dict[str, Any]:
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
        full_size._reset_peak(settings.device)
        with _step_ends(settings.device) as ends:
            trainer.train()
    peak = full_size._peak_bytes(settings.device)
    return _speed(ends, tokens) | {"peak, GiB": peak and round(peak / 2**30, 3)}


@contextmanager
def _step_ends(device: torch.device) -> Iterator[list[float]]:
    """When each step of transformers' Trainer ends, from which both `fk.tune` and SFTTrainer are derived."""
    ends: list[float] = []
    on_step_end = CallbackHandler.on_step_end

    def recorded(*arguments: Any) -> Any:
        full_size._synchronize(device)
        ends.append(time.perf_counter())
        return on_step_end(*arguments)

    with patch.object(CallbackHandler, "on_step_end", recorded):
        yield ends


def _speed(ends: list[float], tokens: int) -> dict[str, Any]:
    """The median step without the first two, in which CUDA loads its kernels, and tokens per second."""
    seconds = statistics.median(later - earlier for earlier, later in pairwise(ends[1:]))
    return {"steps": len(ends), "ms per step": round(1000 * seconds, 1), "tokens/s": round(tokens / seconds, 1)}
