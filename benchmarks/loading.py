"""Loading a sharded checkpoint: the kit, transformers' from_pretrained and accelerate, each in a new process per round.

The seconds include the forward pass of one token, because memory-mapped weights are only read when they are used.
"Above the model" is the process's peak memory while loading, minus its memory before and minus the weights.
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
    """Medians of alternating rounds. All ways read the same files; the first round fills the page cache."""
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


def _figures(rounds: list[dict[str, Any]], largest_shard: int) -> dict[str, Any]:
    above = statistics.median(each["peak while loading"] - each["before"] - each["weights"] for each in rounds)
    return {
        "seconds": round(statistics.median(each["seconds"] for each in rounds), 2),
        "weights, bytes": rounds[0]["weights"],
        "above the model, bytes": int(above),
        "above the model, in largest shards": round(above / largest_shard, 2),
    }
