"""One step in a process of its own: how long it took, and how much memory it had at its highest.

python -m benchmarks._memory WAY DIRECTORY SETTINGS      a row of figures as JSON, for the benchmarks beside
"""

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = resource.getpagesize()


def measured(way: str, directory: Path, **settings: Any) -> dict[str, Any]:
    """Figures of one way of loading a checkpoint and running it, from a fresh process."""
    command = [sys.executable, "-m", "benchmarks._memory", way, str(directory), json.dumps(settings)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{way} {settings} failed: {ended.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return figures


class Watch:
    """Follows this process's memory, every two milliseconds, between `with` and its end (Linux).

    What counts is memory of its own and what the libraries' files had before: pages of a mapped checkpoint are the
    system's to drop, but for the weights that stay there, see `mapped_bytes`.
    """

    def __init__(self) -> None:
        self.before = self.peak = sum(_pages())
        self._libraries = _pages()[1]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._ended.wait(0.002):
            self.peak = max(self.peak, _pages()[0] + self._libraries)


def mapped_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of those tensors that lie in a file mapped into memory, as weights in their stored dtype do on a CPU."""
    files = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
    spans = [tuple(int(address, 16) for address in line[0].split("-")) for line in files]
    found = {each.data_ptr(): each.nbytes for each in tensors if any(a <= each.data_ptr() < b for a, b in spans)}
    return sum(found.values())


def _pages() -> tuple[int, int]:
    """Bytes of this process: its own, and of mapped files."""
    resident, shared = (int(word) * PAGE for word in Path("/proc/self/statm").read_text().split()[1:3])
    return resident - shared, shared


def kit(directory: Path, dtype: str) -> Any:
    """The kit's way."""
    import falcon_kit as fk

    return fk.load(directory, dtype=dtype).model


def transformers(directory: Path, dtype: str) -> Any:
    """transformers' own Falcon, by from_pretrained."""
    from transformers import FalconForCausalLM

    return FalconForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def accelerate(directory: Path, dtype: str) -> Any:
    """transformers' own Falcon, empty, filled by accelerate's load_checkpoint_and_dispatch."""
    import torch
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import FalconConfig, FalconForCausalLM

    with init_empty_weights():
        model = FalconForCausalLM(FalconConfig.from_pretrained(directory))
    model.tie_weights()
    return load_checkpoint_and_dispatch(model, str(directory), {"": "cpu"}, dtype=getattr(torch, dtype)).eval()


WAYS = {"kit": kit, "transformers": transformers, "accelerate": accelerate}


def main(way: str, directory: str, settings: str) -> None:
    """Loads, reads `batch` rows of `context` tokens, and prints the figures."""
    import torch

    import falcon_kit.loading.load
    import falcon_kit.loading.quantization  # so that importing is no part of the time

    wish = {"dtype": "bfloat16", "context": 1, "batch": 1} | json.loads(settings)
    with Watch() as watch:
        start = time.perf_counter()
        model = WAYS[way](Path(directory), wish["dtype"])
        loaded = watch.peak + mapped_bytes(model.parameters())
        weights = falcon_kit.loading.quantization.weights(model).total_bytes
        ids = torch.zeros(wish["batch"], wish["context"], dtype=torch.long)
        with torch.inference_mode():
            past = model(ids, logits_to_keep=1, use_cache=True).past_key_values
        seconds = time.perf_counter() - start
    figures = {
        "seconds": seconds,
        "before": watch.before,
        "peak while loading": loaded,
        "peak": watch.peak + mapped_bytes(model.parameters()),
        "cache": sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers),
        "weights": weights,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
