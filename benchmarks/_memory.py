"""Loads and runs a checkpoint in a new process and measures its time and peak memory.

python -m benchmarks._memory WAY DIRECTORY SETTINGS      prints the figures as one line of JSON
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
    """Figures of one way to load a checkpoint and run it, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks._memory", way, str(directory), json.dumps(settings)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{way} {settings} failed: {ended.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return figures


class PeakMemory:
    """Samples the memory of this process every two milliseconds during a `with` block (Linux).

    Counts anonymous memory, and the file pages of libraries that were mapped before the block. Pages of a mapped
    checkpoint are not counted, because the system can drop them; for weights that stay mapped see `mapped_bytes`.
    """

    def __init__(self) -> None:
        self.before = self.peak = sum(_pages())
        self._libraries = _pages()[1]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.002):
            self.peak = max(self.peak, _pages()[0] + self._libraries)


def mapped_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of those tensors that are in a memory-mapped file, as weights in their stored dtype are on a CPU."""
    files = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
    spans = [tuple(int(address, 16) for address in line[0].split("-")) for line in files]
    own = [each for each in tensors if not each.is_mkldnn]  # oneDNN's layout is a copy
    mapped = {each.data_ptr(): each.nbytes for each in own if any(a <= each.data_ptr() < b for a, b in spans)}
    return sum(mapped.values())


def _pages() -> tuple[int, int]:
    """Resident bytes of this process: anonymous, and of mapped files."""
    resident, shared = (int(word) * PAGE for word in Path("/proc/self/statm").read_text().split()[1:3])
    return resident - shared, shared


def kit(directory: Path, dtype: str) -> Any:
    """The kit's `load`."""
    import falcon_kit as fk

    return fk.load(directory, dtype=dtype).model


def transformers(directory: Path, dtype: str) -> Any:
    """transformers' own Falcon, loaded with from_pretrained."""
    from transformers import FalconForCausalLM

    return FalconForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def accelerate(directory: Path, dtype: str) -> Any:
    """transformers' own Falcon without weights, loaded with accelerate's load_checkpoint_and_dispatch."""
    import torch
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import FalconConfig, FalconForCausalLM

    with init_empty_weights():
        model = FalconForCausalLM(FalconConfig.from_pretrained(directory))
    model.tie_weights()
    return load_checkpoint_and_dispatch(model, str(directory), {"": "cpu"}, dtype=getattr(torch, dtype)).eval()


WAYS = {"kit": kit, "transformers": transformers, "accelerate": accelerate}


def main(way: str, directory: str, settings: str) -> None:
    """Loads the checkpoint, prefills `batch` rows of `context` tokens, and prints the figures."""
    import torch

    import falcon_kit.loading.load
    import falcon_kit.loading.quantization  # imported first, so that the import is not timed

    options = {"dtype": "bfloat16", "context": 1, "batch": 1} | json.loads(settings)
    with PeakMemory() as memory:
        start = time.perf_counter()
        model = WAYS[way](Path(directory), options["dtype"])
        loaded = memory.peak + mapped_bytes(model.parameters())
        weights = falcon_kit.loading.quantization.weights(model).total_bytes
        ids = torch.zeros(options["batch"], options["context"], dtype=torch.long)
        with torch.inference_mode():
            past = model(ids, logits_to_keep=1, use_cache=True).past_key_values
        seconds = time.perf_counter() - start
    figures = {
        "seconds": seconds,
        "before": memory.before,
        "peak while loading": loaded,
        "peak": memory.peak + mapped_bytes(model.parameters()),
        "cache": sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers),
        "weights": weights,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
