"""Plans compared with measured memory: a grid of small Falcons, dtypes, contexts and batch sizes, one process each.

Every model is loaded by `fk.load` from a checkpoint and prefills a full context in every row. The figures are the peak
memory of the process (the median of three runs), and the bytes of weights and cache.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import FalconConfig

import falcon_kit as fk
from benchmarks._memory import measured
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.model import modeling
from falcon_kit.planning.devices import Device

SIZE = {"hidden_size": 1536, "num_attention_heads": 24, "num_hidden_layers": 4, "vocab_size": 8192}
LAYOUTS = {
    "40B": {"new_decoder_architecture": True, "num_kv_heads": 4},
    "7B": {"new_decoder_architecture": False, "multi_query": True},
    "rw": {
        "new_decoder_architecture": False,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
        "bias": True,
    },
}
ROUNDS = 3  # the allocator's part of the peak differs between processes
ROWS, LONG = (512, 8), (2048, 1)
DTYPES = ("float32", "bfloat16", "int8", "nf4", "nf4-double")
GRID = {
    "40B": [(dtype, *size) for dtype in DTYPES for size in (LONG, ROWS)],
    "7B": [(dtype, *ROWS) for dtype in ("float32", "bfloat16", "nf4")],
    "rw": [(dtype, *LONG) for dtype in ("float32", "bfloat16", "nf4")],
}


def run() -> dict[str, Any]:
    """Predicted and measured bytes, and the relative error of the prediction."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for layout in LAYOUTS:
            directory = checkpoint(Path(folder) / layout, SIZE | LAYOUTS[layout])
            rows += [{"layout": layout} | _cell(directory, *cell) for cell in GRID[layout]]
    errors = {part: [abs(row[part]["off by"]) for row in rows] for part in ("weights", "cache", "peak")}
    summary = {"at most": max, "median": statistics.median}
    return {f"off by, {word}": {part: of(errors[part]) for part in errors} for word, of in summary.items()} | {
        "rows": rows
    }


def checkpoint(directory: Path, config: dict[str, Any], **saving: Any) -> Path:
    """Saves a random bfloat16 model of that config, with Falconet's tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modeling.FalconForCausalLM(FalconConfig(**config)).to(torch.bfloat16).save_pretrained(directory, **saving)
    for file in embedded_directory("falconet").glob("token*.json"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def _cell(directory: Path, dtype: str, context: int, batch: int) -> dict[str, Any]:
    plan = fk.plan(directory, dtype, context=context, batch=batch, devices=[Device("cpu", "cpu", 2**40)])
    rounds = [measured("kit", directory, dtype=dtype, context=context, batch=batch) for _ in range(ROUNDS)]
    measurement = {part: int(statistics.median(each[part] for each in rounds)) for part in ("weights", "cache", "peak")}
    predicted = {"weights": plan.weight_bytes, "cache": plan.kv_bytes, "peak": plan.total_bytes}
    compared = {
        part: {"predicted": size, "measured": measurement[part], "off by": round(size / measurement[part] - 1, 3)}
        for part, size in predicted.items()
    }
    row = {"dtype": dtype, "context": context, "batch": batch, **compared}
    print(row, flush=True)
    return row
