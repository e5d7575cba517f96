"""Decoding on a CPU: transformers, the kit and llama.cpp with the same weights, in alternating rounds.

The model is a random Falcon with the ratios of the 40B (16 query heads per KV head), small enough for two cores. A step
generates one token in every row, with a cache of `context` tokens. The minimum time of a step is that for reading all
weights and the cache once; memory bandwidth is measured in the same rounds. The extra "bench" installs llama.cpp.
"""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import DynamicCache, FalconConfig, FalconForCausalLM

from falcon_kit import FalconSpec
from falcon_kit.model import modeling
from falcon_kit.model.products import faster_without_onednn

SHAPE = FalconSpec(
    "decode", layers=8, d_model=2048, query_heads=32, kv_heads=2, vocabulary=65024, intermediate_size=8192
)
BATCHES, CONTEXTS = (1, 4, 8, 16), (512, 1000, 2000)
PROMPTS = (512, 2000)
ROUNDS = {
    1: 21,
    4: 9,
    8: 9,
    16: 7,
}  # by batch size: more rounds for short steps, whose times vary more; the first round is a warm-up
COLOURS = {"transformers": "#D55E00", "kit": "#0072B2", "llama.cpp": "#009E73"}  # Okabe and Ito's
_MEMORY, _BLOCK = "memory", torch.ones(2**26)  # 256 MiB, larger than any CPU cache
_PAUSE = 0.05  # seconds: torch's threads spin for a while after their work and would slow llama.cpp down


class Torch:
    """A transformers model with a cache of random keys and values."""

    def __init__(self, model: FalconForCausalLM) -> None:
        self.model = model
        self._cache, self._tokens = DynamicCache(), torch.zeros(1, 1, dtype=torch.long)

    def fill(self, batch: int, context: int) -> None:
        """Makes a random cache of `context` tokens for `batch` rows, with as many heads as this model caches."""
        with torch.inference_mode():
            heads = self.model(torch.tensor([[7]])).past_key_values.layers[0].keys.shape[1]
            self._tokens = torch.full((batch, 1), 7)
            self._cache = DynamicCache()
            for layer in range(self.model.config.num_hidden_layers):
                keys = torch.randn(batch, heads, context, self.model.config.head_dim, dtype=self.model.dtype)
                self._cache.update(keys, keys.clone(), layer)

    def step(self) -> None:
        """Decodes one token in every row, then removes it from the cache."""
        with torch.inference_mode():
            self.model(self._tokens, past_key_values=self._cache)
            self._cache.crop(-1)

    def prefill(self, ids: list[int]) -> torch.Tensor:
        """Prefills an empty cache and returns the logits (V,) after the last token."""
        with torch.inference_mode():
            return self.model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float()

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)


def run() -> dict[str, Any]:
    """Medians of alternating rounds in milliseconds, and their ratios."""
    contestants = _contestants()
    prefill = {str(length): _prefill(contestants, length) for length in PROMPTS}
    cells = [_cell(contestants, batch, context) for context in CONTEXTS for batch in BATCHES]
    return {
        "model": f"{SHAPE.parameters:,} parameters, {SHAPE.query_heads} query / {SHAPE.kv_heads} KV heads, bfloat16",
        "threads": torch.get_num_threads(),
        "kit computes single rows without oneDNN": contestants["kit"].model.single_rows_without_onednn,
        "prefill, ms": prefill,
        "decode": cells,
    }


def _contestants() -> dict[str, Any]:
    """transformers, the kit and, if it is installed, llama.cpp, with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = FalconConfig(**SHAPE.to_config())
        kit = modeling.FalconForCausalLM(config).to(torch.bfloat16).eval()
        stock = FalconForCausalLM(config).to(torch.bfloat16).eval()
    stock.load_state_dict(kit.state_dict(), assign=True)
    stock.tie_weights()
    kit.single_rows_without_onednn = faster_without_onednn(
        [module.weight for module in kit.modules() if isinstance(module, torch.nn.Linear)]
    )
    contestants: dict[str, Any] = {"transformers": Torch(stock), "kit": Torch(kit)}
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama.cpp is not installed and is not measured: pip install llama-cpp-python")
        return contestants
    from benchmarks._llama_cpp import LlamaCpp
    from falcon_kit.serving.gguf import write_gguf

    with tempfile.TemporaryDirectory() as folder:
        write_gguf(kit, SHAPE, Path(folder) / "falcon.gguf")
        contestants["llama.cpp"] = LlamaCpp(Path(folder) / "falcon.gguf", SHAPE, torch.get_num_threads())
    _check_agreement(contestants)
    return contestants


def _check_agreement(contestants: Mapping[str, Any]) -> None:
    """Raises RuntimeError if the contestants compute different logits."""
    ids = list(range(100, 164))
    expected = contestants["transformers"].prefill(ids)
    for name, contestant in contestants.items():
        logits = torch.as_tensor(contestant.prefill(ids))
        if (cosine := torch.cosine_similarity(logits, expected, dim=0)) < 0.999:
            raise RuntimeError(f"{name} and transformers compute different logits: cosine similarity {cosine:.4f}")


def _prefill(contestants: Mapping[str, Any], length: int) -> dict[str, float]:
    ids = [(7 * at) % SHAPE.vocabulary for at in range(length)]
    medians = _alternate({name: (lambda each=each: each.prefill(ids)) for name, each in contestants.items()}, 5)
    return {name: round(seconds * 1000, 1) for name, seconds in medians.items()}


def _cell(contestants: Mapping[str, Any], batch: int, context: int) -> dict[str, Any]:
    """One batch size and context: milliseconds per step, cache bytes, share of the memory bandwidth."""
    for contestant in contestants.values():
        contestant.fill(batch, context)
    medians = _alternate({name: each.step for name, each in contestants.items()} | {_MEMORY: _BLOCK.sum}, ROUNDS[batch])
    bandwidth = _BLOCK.nbytes / medians.pop(_MEMORY)
    cache_bytes = SHAPE.kv_bytes_per_token() * batch * context
    minimum = (2 * SHAPE.parameters + cache_bytes) / bandwidth
    caches = {name: contestants[name].cache_bytes for name in ("transformers", "kit")}
    if caches["kit"] != cache_bytes:
        raise RuntimeError(f"the kit's cache has {caches['kit']} bytes, expected {cache_bytes}")
    cell = {
        "batch": batch,
        "context": context,
        "ms per step": {name: round(seconds * 1000, 1) for name, seconds in medians.items()},
        "kit is faster by": {name: round(each / medians["kit"], 2) for name, each in medians.items() if name != "kit"},
        "cache bytes": caches,
        "memory bandwidth, GB/s": round(bandwidth / 1e9, 1),
        "share of bandwidth": {name: round(minimum / seconds, 2) for name, seconds in medians.items()},
    }
    print(cell)
    return cell


def _alternate(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each contestant over alternating rounds; the first round is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run_once in contestants.items():
            time.sleep(_PAUSE)
            start = time.perf_counter()
            run_once()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def draw(figures: Mapping[str, Any]) -> Figure:
    """Milliseconds per step over the batch size, one panel per context length."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, len(CONTEXTS), sharey=True)
    for axes, context in zip(panels, CONTEXTS, strict=True):
        _panel(axes, [cell for cell in figures["decode"] if cell["context"] == context])
        axes.set_title(f"{context} tokens in the cache", fontsize=10)
    panels[0].set_ylabel("ms per step (log)")
    panels[-1].legend(frameon=False, fontsize=9)
    figure.suptitle(f"One decoding step: {figures['model']}", fontsize=10)
    return figure


def _panel(axes: Axes, cells: list[dict[str, Any]]) -> None:
    batches = [cell["batch"] for cell in cells]
    for name in cells[0]["ms per step"]:
        axes.plot(batches, [cell["ms per step"][name] for cell in cells], "o-", color=COLOURS[name], label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("rows in the batch")
    axes.grid(alpha=0.3, which="both")
