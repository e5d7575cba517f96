"""Loading a sharded checkpoint: the kit, transformers' from_pretrained and accelerate, each time in a new process.

Seconds include one token, since weights that are mapped into memory are only read when they are used. "Above the
model" is the process's own memory at its highest while loading, less what it had before and what the weights take.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._memory import WAYS, measured
from benchmarks.decode import SHAPE
from benchmarks.planning import checkpoint

ROUNDS = 5


def run() -> dict[str, Any]:
    """Medians of alternating rounds; all read the same files, which the first round brings into the system's cache."""
    with tempfile.TemporaryDirectory() as folder:
        directory = checkpoint(Path(folder) / "falcon", SHAPE.to_config(), max_shard_size="200MB")
        shards = [file.stat().st_size for file in directory.glob("*.safetensors")]
        rounds = [{way: measured(way, directory) for way in WAYS} for _ in range(1 + ROUNDS)][1:]
    figures = {way: _figures([each[way] for each in rounds], max(shards)) for way in WAYS}
    return {
        "parameters": SHAPE.parameters,
        "shards": len(shards),
        "largest shard, bytes": max(shards),
        "ways": figures,
        "seconds, ratio to transformers": {
            way: round(each["seconds"] / figures["transformers"]["seconds"], 2) for way, each in figures.items()
        },
    }


def _figures(rounds: list[dict[str, Any]], largest: int) -> dict[str, Any]:
    above = statistics.median(each["peak while loading"] - each["before"] - each["weights"] for each in rounds)
    return {
        "seconds": round(statistics.median(each["seconds"] for each in rounds), 2),
        "weights, bytes": rounds[0]["weights"],
        "above the model, bytes": int(above),
        "above the model, in largest shards": round(above / largest, 2),
    }
