"""Decoding on a CPU: transformers, the kit and llama.cpp on the same weights, taking turns.

A random Falcon with the ratios of the 40B (16 query heads to a KV head), small enough for two cores. A step is one new
token in every row, after a cache that already holds `context` tokens. The least it can do is to read all weights and
the cache once; how fast memory can be read is measured in the same rounds. llama.cpp comes with the extra "bench".
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
from falcon_kit.model.attention import faster_without_onednn

SHAPE = FalconSpec(
    "decode", layers=8, d_model=2048, query_heads=32, kv_heads=2, vocabulary=65024, intermediate_size=8192
)
BATCHES, CONTEXTS = (1, 4, 8, 16), (512, 1000, 2000)
PROMPTS = (512, 2000)
ROUNDS = {1: 21, 4: 9, 8: 9, 16: 7}  # by batch: of short steps more, for they are the noisier; the first warms up
COLOURS = {"transformers": "#D55E00", "kit": "#0072B2", "llama.cpp": "#009E73"}  # Okabe and Ito's
_MEMORY, _BLOCK = "memory", torch.ones(2**26)  # 256 MiB, which no cache keeps
_PAUSE = 0.05  # seconds: torch's threads spin on after their work, and would take a core from llama.cpp's


class Torch:
    """A transformers model with a cache of random keys and values."""

    def __init__(self, model: FalconForCausalLM) -> None:
        self.model = model
        self._cache, self._tokens = DynamicCache(), torch.zeros(1, 1, dtype=torch.long)

    def fill(self, batch: int, context: int) -> None:
        """A cache of `context` tokens in each of `batch` rows, with as many heads as this model caches."""
        with torch.inference_mode():
            heads = self.model(torch.tensor([[7]])).past_key_values.layers[0].keys.shape[1]
            self._tokens = torch.full((batch, 1), 7)
            self._cache = DynamicCache()
            for layer in range(self.model.config.num_hidden_layers):
                one = torch.randn(batch, heads, context, self.model.config.head_dim, dtype=self.model.dtype)
                self._cache.update(one, one.clone(), layer)

    def step(self) -> None:
        """One new token in every row, taken back afterwards."""
        with torch.inference_mode():
            self.model(self._tokens, past_key_values=self._cache)
            self._cache.crop(-1)

    def prefill(self, ids: list[int]) -> torch.Tensor:
        """Reads a prompt into an empty cache and returns the logits (V,) after its last token."""
        with torch.inference_mode():
            return self.model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float()

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)


def run() -> dict[str, Any]:
    """Medians of alternating rounds, in milliseconds, and as ratios."""
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
    """transformers, the kit and, where it is installed, llama.cpp, on the same weights."""
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
        print('llama.cpp is not installed and is left out: pip install "falcon-kit[bench]"')
        return contestants
    from benchmarks._llama_cpp import LlamaCpp
    from falcon_kit.serving.gguf import write_gguf

    with tempfile.TemporaryDirectory() as folder:
        write_gguf(kit, SHAPE, Path(folder) / "falcon.gguf")
        contestants["llama.cpp"] = LlamaCpp(Path(folder) / "falcon.gguf", SHAPE, torch.get_num_threads())
    _check_agreement(contestants)
    return contestants


def _check_agreement(contestants: Mapping[str, Any]) -> None:
    """The contestants must compute the same thing, or their times mean nothing."""
    ids = list(range(100, 164))
    expected = contestants["transformers"].prefill(ids)
    for name, contestant in contestants.items():
        logits = torch.as_tensor(contestant.prefill(ids))
        if (likeness := torch.cosine_similarity(logits, expected, dim=0)) < 0.999:
            raise RuntimeError(f"{name} computes other logits than transformers: cosine {likeness:.4f}")


def _prefill(contestants: Mapping[str, Any], length: int) -> dict[str, float]:
    ids = [(7 * at) % SHAPE.vocabulary for at in range(length)]
    taken = _alternate({name: (lambda each=each: each.prefill(ids)) for name, each in contestants.items()}, 5)
    return {name: round(seconds * 1000, 1) for name, seconds in taken.items()}


def _cell(contestants: Mapping[str, Any], batch: int, context: int) -> dict[str, Any]:
    """One batch size and context: milliseconds a step, cache, share of the bandwidth."""
    for contestant in contestants.values():
        contestant.fill(batch, context)
    taken = _alternate({name: each.step for name, each in contestants.items()} | {_MEMORY: _BLOCK.sum}, ROUNDS[batch])
    bandwidth = _BLOCK.nbytes / taken.pop(_MEMORY)
    kept = SHAPE.kv_bytes_per_token() * batch * context
    least = (2 * SHAPE.parameters + kept) / bandwidth
    caches = {name: contestants[name].cache_bytes for name in ("transformers", "kit")}
    if caches["kit"] != kept:
        raise RuntimeError(f"the kit's cache holds {caches['kit']} bytes, the architecture's number is {kept}")
    cell = {
        "batch": batch,
        "context": context,
        "ms per step": {name: round(seconds * 1000, 1) for name, seconds in taken.items()},
        "kit is faster by": {name: round(each / taken["kit"], 2) for name, each in taken.items() if name != "kit"},
        "cache bytes": caches,
        "memory bandwidth, GB/s": round(bandwidth / 1e9, 1),
        "share of bandwidth": {name: round(least / seconds, 2) for name, seconds in taken.items()},
    }
    print(cell)
    return cell


def _alternate(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taking turns; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, turn in contestants.items():
            time.sleep(_PAUSE)
            start = time.perf_counter()
            turn()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def draw(figures: Mapping[str, Any]) -> Figure:
    """Milliseconds per step over the batch, a panel for each context."""
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
