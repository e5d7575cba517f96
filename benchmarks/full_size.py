"""A full-size Falcon with random weights on one GPU: memory, and tokens per second relative to the bandwidth limit.

Measures the 40B on a GPU with 100 GB, else the 7B. transformers and the kit use the same weights, and each its own
loop, eager and compiled. The bandwidth limit is the time to read all weights and the cache once, at the bandwidth
measured for copying memory on this GPU.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import CompileConfig, FalconForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks import CannotRun
from benchmarks._gpu_models import pair
from falcon_kit import FalconSpec, load, spec
from falcon_kit.generation.generate import generate
from falcon_kit.model import modeling

BATCHES, CONTEXT, NEW_TOKENS = (1, 8, 32), 2000, 40
NEEDS = {"falcon-40b": 100e9, "falcon-7b": 18e9}
"""Bytes of GPU memory that each model needs: weights, caches and the prefill."""


def run() -> dict[str, Any]:
    """Measures the largest Falcon that fits. Raises CannotRun without a GPU of at least 18 GB."""
    if not torch.cuda.is_available():
        raise CannotRun("torch finds no GPU; the 40B needs one of 100 GB, the 7B one of 18 GB")
    total = torch.cuda.mem_get_info()[1]
    fitting = [name for name, needed in NEEDS.items() if total >= needed]
    if not fitting:
        raise CannotRun(f"the GPU has {total / 1e9:.0f} GB; the 7B needs 18 GB, the 40B 100 GB")
    return measure(spec(fitting[0]), torch.device("cuda"), BATCHES, CONTEXT, CompileConfig(fullgraph=True))


def measure(
    shape: FalconSpec, device: torch.device, batches: tuple[int, ...], context: int, compiled: CompileConfig | None
) -> dict[str, Any]:
    """Every contestant at every batch size; with `compiled=None` only in eager mode."""
    models = pair(shape, device)
    bandwidth = _bandwidth(device)
    options: dict[str, dict[str, Any]] = {"eager": {}}
    if compiled is not None:
        options["compiled"] = {"cache_implementation": "static", "compile_config": compiled}
    rows = [
        {"model": name, "decoding": how, "batch": batch, "context": context}
        | _decode(model, batch, context, arguments).figures(shape, batch, context, bandwidth)
        for batch in batches
        for how, arguments in options.items()
        for name, model in models.items()
    ]
    return {
        "shape": shape.name,
        "parameters": shape.parameters,
        "weight bytes": 2 * shape.parameters,
        "memory bandwidth, GB/s": round(bandwidth / 1e9),
        "the model card asks for": "85-100 GB to run Falcon-40B swiftly",
        "decode": rows,
    }


@cache
def _bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, for copying a gigabyte: the median of ten copies."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    seconds = [_seconds(lambda: target.copy_(source), device) for _ in range(11)][1:]
    return 2 * source.nbytes / statistics.median(seconds)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak_bytes(device: torch.device) -> int | None:
    """The most that torch has had allocated on a GPU since `_reset_peak`; None on a CPU, where torch does not count."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


@dataclass
class Decoding:
    """One contestant's decoding: seconds between tokens, and peak bytes; None if it ran out of memory."""

    seconds: float | None
    peak_bytes: int | None

    def figures(self, shape: FalconSpec, batch: int, context: int, bandwidth: float) -> dict[str, Any]:
        """The figures as the result file contains them."""
        if self.seconds is None:
            return {"fits": False}
        minimum = (2 * shape.parameters + shape.kv_bytes_per_token() * batch * context) / bandwidth
        return {
            "fits": True,
            "ms per step": round(self.seconds * 1000, 2),
            "tokens/s": round(batch / self.seconds, 1),
            "share of the bandwidth floor": round(minimum / self.seconds, 3),
            "peak GB": None if self.peak_bytes is None else round(self.peak_bytes / 1e9, 1),
        }


def _decode(model: FalconForCausalLM, batch: int, context: int, arguments: dict[str, Any]) -> Decoding:
    """Median seconds between tokens; of the second of two generations where the first one compiles.

    transformers' model generates with transformers' `generate`, the kit's with that of `Falcon.generate`.
    """
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    _reset_peak(model.device)
    clock = _Clock()
    try:
        for _ in range(2 if arguments else 1):
            clock.ticks.clear()
            _generate(model, batch, context, arguments, clock)
    except (torch.OutOfMemoryError, MemoryError):  # the second is the kit's
        return Decoding(None, None)
    gaps = [later - earlier for earlier, later in zip(clock.ticks, clock.ticks[1:], strict=False)]
    return Decoding(statistics.median(gaps), _peak_bytes(model.device))


def _generate(
    model: FalconForCausalLM, batch: int, context: int, arguments: dict[str, Any], criterion: StoppingCriteria
) -> None:
    """Generates NEW_TOKENS tokens; the criterion is called after each."""
    model.generation_config.eos_token_id = None  # nothing ends a text early, and nothing is spent on preventing it
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **arguments}
    options["stopping_criteria"] = StoppingCriteriaList([criterion])
    own_loop = _with_the_kit if isinstance(model, modeling.FalconForCausalLM) else _with_transformers
    own_loop(model, batch, context, options)


def _with_transformers(model: FalconForCausalLM, batch: int, context: int, options: dict[str, Any]) -> None:
    ids = torch.randint(12, model.config.vocab_size, (batch, context - NEW_TOKENS), device=model.device)
    model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def _with_the_kit(model: FalconForCausalLM, batch: int, context: int, options: dict[str, Any]) -> None:
    words = (" giraffe", " lion", " seal")  # each is one token
    texts = [words[each % len(words)] * (context - NEW_TOKENS) for each in range(batch)]
    generate(model, _tokenizer(), texts, eos_token_id=[], **options)


@cache
def _tokenizer() -> Any:
    return load("falconet", device_map="cpu").tokenizer


class _Clock(StoppingCriteria):
    """Records the time of each token; never stops the generation.

    It does not wait for the GPU: each loop does so once a token, and the median gap is the time of a step.
    """

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.ticks.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
