"""Decoding on a CPU: transformers, the kit and llama.cpp with the same weights, in alternating rounds.

The model is a random Falcon with the ratios of the 40B (16 query heads per KV head), small enough for two cores. A step
generates one token in every row, with a cache of `context` tokens. The minimum time of a step is that for reading all
weights and the cache once; memory bandwidth is measured in the same rounds. The extra "serving" installs llama.cpp.
"""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import DynamicCache, FalconConfig, FalconForCausalLM

from benchmarks._timing import in_turns
from falcon_kit import FalconSpec, load
from falcon_kit.model import modeling
from falcon_kit.model.products import faster_without_onednn
from falcon_kit.serving.gguf import write_gguf

SHAPE = FalconSpec(
    "decode", layers=8, d_model=2048, query_heads=32, kv_heads=2, vocabulary=65024, intermediate_size=8192
)
BATCHES, CONTEXTS = (1, 4, 8, 16), (512, 1000, 2000)
PROMPTS = (512, 2000)
TOKENS = 8
"""Decoded at a time, so that the start, of threads or of a request, is a small part of the time."""
ROUNDS = {1: 9, 4: 6, 8: 5, 16: 4, "prefill": 4}
"""By batch size: more rounds for short steps. The first round of each is a warm-up."""
COLOURS = {"transformers": "#D55E00", "kit": "#0072B2", "llama.cpp": "#009E73"}  # Okabe and Ito's
_MEMORY, _BLOCK = "memory", torch.ones(2**26)  # 256 MiB, larger than any CPU cache
_PAUSE = 0.05  # seconds: torch's threads spin for a while after their work and would slow llama.cpp down


class Torch:
    """A transformers model with a cache of random keys and values."""

    def __init__(self, model: FalconForCausalLM) -> None:
        self.model = model
        self._cache, self._ids = DynamicCache(), torch.zeros(1, 1, dtype=torch.long)

    @torch.inference_mode()
    def fill(self, batch: int, context: int) -> None:
        """Makes the model's own cache with `context` tokens for `batch` rows, all but the first of them random."""
        self._ids = torch.full((batch, 1), 7)
        self._cache = self.model(self._ids).past_key_values
        for at, layer in enumerate(self._cache.layers):
            rows, heads, _, size = layer.keys.shape
            keys = torch.randn(rows, heads, context - 1, size, dtype=layer.keys.dtype)
            self._cache.update(keys, keys.clone(), at)

    @torch.inference_mode()
    def decode(self, tokens: int) -> None:
        """Decodes new tokens in every row, then removes them from the cache."""
        for _ in range(tokens):
            self.model(self._ids, past_key_values=self._cache)
        self._cache.crop(-tokens)

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> dict[int, float]:
        """Computes a prompt with an empty cache. Returns the log-probabilities of the next token, by its id."""
        logits = self.model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
        return dict(enumerate(logits.float().log_softmax(-1).tolist()))

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)


def run() -> dict[str, Any]:
    """Milliseconds of the fastest of alternating rounds, and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        contestants = _contestants(Path(folder) / "falcon.gguf")
        prefill = {str(length): prefills(contestants, length) for length in PROMPTS}
        cells = [_cell(contestants, batch, context) for context in CONTEXTS for batch in BATCHES]
    return {
        "model": f"{SHAPE.parameters:,} parameters, {SHAPE.query_heads} query / {SHAPE.kv_heads} KV heads, bfloat16",
        "threads": torch.get_num_threads(),
        "kit computes single rows without oneDNN": contestants["kit"].model.single_rows_without_onednn,
        "prefill, ms": prefill,
        "decode": cells,
    }


def _contestants(gguf: Path) -> dict[str, Any]:
    """transformers, the kit and, if it is installed, llama.cpp, with the same weights. gguf: the file for llama.cpp."""
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
    if importlib.util.find_spec("xllamacpp") is None:
        print("llama.cpp is not installed and is not measured: pip install xllamacpp")
    else:
        from benchmarks._llama_cpp import LlamaCpp

        write_gguf(kit, SHAPE, gguf, tokenizer=load("falconet").tokenizer)
        contestants["llama.cpp"] = LlamaCpp(gguf, torch.get_num_threads())
    check_agreement(contestants)
    return contestants


def check_agreement(contestants: Mapping[str, Any], limit: float = 0.1) -> None:
    """Raises RuntimeError if log-probabilities of probable tokens differ by more than the limit from the first's."""
    ids = list(range(100, 164))
    expected = next(iter(contestants.values())).prefill(ids)
    probable = set(sorted(expected, key=expected.__getitem__)[-10:])
    for name, contestant in contestants.items():
        found = contestant.prefill(ids)
        worst = max((abs(found[id] - expected[id]) for id in found.keys() & probable), default=float("inf"))
        if worst > limit:
            raise RuntimeError(f"{name} computes other log-probabilities: they differ by {worst:.3f}")


def prefills(contestants: Mapping[str, Any], length: int) -> dict[str, float]:
    """Milliseconds of each contestant for a prompt."""
    ids = [(7 * at) % SHAPE.vocabulary for at in range(length)]
    ms = least({name: partial(each.prefill, ids) for name, each in contestants.items()}, ROUNDS["prefill"])
    return {name: round(each, 1) for name, each in ms.items()}


def _cell(contestants: Mapping[str, Any], batch: int, context: int) -> dict[str, Any]:
    """One batch size and context: milliseconds per step, cache bytes, share of the memory bandwidth."""
    for contestant in contestants.values():
        contestant.fill(batch, context)
    ms = decoding(contestants, batch, {_MEMORY: _BLOCK.sum})
    bandwidth = _BLOCK.nbytes / ms.pop(_MEMORY)  # bytes per millisecond
    cache_bytes = SHAPE.kv_bytes_per_token() * batch * context
    minimum = (2 * SHAPE.parameters + cache_bytes) / bandwidth
    caches = {name: contestants[name].cache_bytes for name in ("transformers", "kit")}
    if caches["kit"] != cache_bytes:
        raise RuntimeError(f"the kit's cache has {caches['kit']} bytes, expected {cache_bytes}")
    cell = {
        "batch": batch,
        "context": context,
        "ms per step": {name: round(each, 1) for name, each in ms.items()},
        "kit is faster by": {name: round(each / ms["kit"], 2) for name, each in ms.items() if name != "kit"},
        "cache bytes": caches,
        "memory bandwidth, GB/s": round(bandwidth / 1e6, 1),
        "share of bandwidth": {name: round(minimum / each, 2) for name, each in ms.items()},
    }
    print(cell)
    return cell


def decoding(
    contestants: Mapping[str, Any], batch: int, beside: Mapping[str, Callable[[], Any]] | None = None
) -> dict[str, float]:
    """Milliseconds of each contestant for a step, after `fill`; and of other calls in the same rounds."""
    calls = {name: partial(each.decode, TOKENS) for name, each in contestants.items()} | (beside or {})
    ms = least(calls, ROUNDS[batch])
    return {name: each / TOKENS if name in contestants else each for name, each in ms.items()}


def least(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The least milliseconds of each call over alternating rounds, which other programs disturb least.

    The first round is a warm-up. With one thread the time is that of the processor, which they hardly disturb.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    return {name: 1000 * min(times[1:]) for name, times in in_turns(calls, rounds, clock, _PAUSE).items()}


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
