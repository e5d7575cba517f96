"""A Falcon on a CPU: every dtype of the kit, transformers and llama.cpp, with the instructions of several CPUs.

A process for each instruction set, since torch reads the limits ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA when it
starts. llama.cpp is compiled for this processor and has no such limit, so it is measured with all instructions only.
The model is random, of the 40B's layout; its head has 5% of the weights, as that of the 7B. Contestants take turns, as
in `benchmarks.decode`. Steps are decoded after 512 tokens.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import FalconConfig, FalconForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks import decode
from benchmarks.gpu import quantised_layer
from falcon_kit import load
from falcon_kit.loading.quantization import quantisation_config
from falcon_kit.model import modeling, products
from falcon_kit.serving.gguf import write_gguf

SHAPE = replace(decode.SHAPE, layers=4, vocabulary=4096)
CONTEXT, PROMPT = 512, 512
BATCHES = (1, 8, 16)
INSTRUCTIONS: dict[str, dict[str, str]] = {
    "all": {},
    "AVX2 and VNNI": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
"""All of this CPU, and those of laptops with and without instructions for integers, which have none for 16 bits."""
KIT = ("float32", "bfloat16", "int8", "int4")
PEERS = {"bfloat16": "bfloat16", "int8": "q8_0", "int4": "q4_0"}
"""llama.cpp's dtype for each of the kit's."""
ROWS = (1, 4, 8, 16, 32, 128, 512)
LAYER = (8192, 2048)
"""(out, in) of the one layer that is measured by rows, the MLP's up projection."""


def run() -> dict[str, Any]:
    """Milliseconds by instruction set, the ratios to the peers, and one layer by rows."""
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder))
        found = {name: _measured_with(limits, folder) for name, limits in INSTRUCTIONS.items()}
    return {
        "model": f"{SHAPE.parameters:,} parameters, {SHAPE.query_heads} query / {SHAPE.kv_heads} KV heads",
        "ms by instructions": found,
        "time over that of the peer": {name: _ratios(each) for name, each in found.items()},
    }


def _write(folder: Path) -> None:
    """The checkpoint for torch, and the files for llama.cpp where it is installed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = modeling.FalconForCausalLM(FalconConfig(**SHAPE.to_config()))
    model.to(torch.bfloat16).eval()
    model.save_pretrained(folder / "bfloat16")
    for dtype in ("int8", "int4"):
        options: dict[str, Any] = {"quantization_config": quantisation_config(dtype, on_cpu=True)}
        quantised = modeling.FalconForCausalLM.from_pretrained(folder / "bfloat16", dtype=torch.bfloat16, **options)
        quantised.save_pretrained(folder / dtype)
    if importlib.util.find_spec("xllamacpp") is None:
        print("llama.cpp is not installed and is not measured: pip install xllamacpp")
        return
    for name in PEERS.values():
        try:
            write_gguf(model, SHAPE, folder / f"{name}.gguf", name, tokenizer=load("falconet").tokenizer)
        except ValueError as reason:
            print(f"llama.cpp's {name} is not measured: {reason}")


def _measured_with(limits: Mapping[str, str], folder: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.cpu", folder, "limited" if limits else "all"]
    ended = subprocess.run(command, env=os.environ | limits, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def _ratios(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The kit's time over transformers' and over llama.cpp's of the same size, and over that of its own bfloat16."""
    pairs = [("kit bfloat16", "transformers bfloat16")]
    pairs += [(f"kit {dtype}", f"llama.cpp {peer}") for dtype, peer in PEERS.items()]
    pairs += [(f"kit {dtype}", "kit bfloat16") for dtype in KIT if dtype != "bfloat16"]
    return {
        f"{one} / {other}": {work: round(ms[one] / ms[other], 2) for work, ms in found["ms"].items()}
        for one, other in pairs
        if other in found["ms"]["prefill of 512"]
    }


# In the process of one instruction set


def measure(folder: Path, with_llama_cpp: bool) -> dict[str, Any]:
    """Milliseconds of each contestant for one step at each batch size, and for a prefill."""
    disable_progress_bar()
    layer = _layer()
    contestants = _contestants(folder, with_llama_cpp)
    decode.check_agreement(contestants, limit=0.5)  # 4 bits round as they do
    found = {}
    for batch in BATCHES:
        for each in contestants.values():
            each.fill(batch, CONTEXT)
        ms = decode.decoding(contestants, batch)
        found[f"one step of {batch} x {CONTEXT}"] = {name: round(each, 2) for name, each in ms.items()}
    found[f"prefill of {PROMPT}"] = decode.prefills(contestants, PROMPT)
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16 products": products.has_products(torch.bfloat16),
        "integer products": products.multiplies_in_integers(*LAYER),
        "threads": torch.get_num_threads(),
        "ms": found,
        "one layer, ms by rows": layer,
    }


def _contestants(folder: Path, with_llama_cpp: bool) -> dict[str, Any]:
    stock = FalconForCausalLM.from_pretrained(folder / "bfloat16", dtype=torch.bfloat16)
    made: dict[str, Any] = {"transformers bfloat16": decode.Torch(stock)}
    for dtype in KIT:
        made[f"kit {dtype}"] = decode.Torch(_kit(folder, dtype))
    if with_llama_cpp and next(folder.glob("*.gguf"), None):
        from benchmarks._llama_cpp import LlamaCpp

        for file in sorted(folder.glob("*.gguf")):
            made[f"llama.cpp {file.stem}"] = LlamaCpp(file, torch.get_num_threads())
    return made


def _kit(folder: Path, dtype: str) -> modeling.FalconForCausalLM:
    """The kit's model as `fk.load` makes it."""
    source, weights = ("bfloat16", torch.float32) if dtype == "float32" else (dtype, torch.bfloat16)
    model = modeling.FalconForCausalLM.from_pretrained(folder / source, dtype=weights)
    linears = [module.weight for module in model.modules() if type(module) is nn.Linear]
    model.single_rows_without_onednn = products.faster_without_onednn(linears)
    return model


def _layer() -> dict[str, dict[str, float]]:
    """Milliseconds of one linear layer by rows: torch's way and the kit's for each dtype."""
    weight = torch.randn(LAYER, generator=torch.Generator().manual_seed(0))
    ways: dict[str, tuple[torch.dtype, Callable[[torch.Tensor], Any]]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cast, name = weight.to(dtype), str(dtype).removeprefix("torch.")
        ways[f"{name}, torch"] = dtype, partial(functional.linear, weight=cast)
        ways[f"{name}, torch without oneDNN"] = dtype, partial(_without_onednn, weight=cast)
        ways[f"{name} in slabs"] = dtype, partial(products.linear_in_slabs, weight=cast)
    for kind in ("int8", "int4"):
        layer = quantised_layer(weight, kind)
        if kind == "int4":
            layer.pack()
        ways[f"{kind}, kernel"] = torch.bfloat16, layer.by_kernel
        ways[f"{kind} in slabs"] = torch.bfloat16, layer.in_slabs
        if kind == "int8" and products.multiplies_in_integers(*LAYER):
            packed = products.packed_for_integers(layer.weight)
            ways["int8 in integers"] = torch.bfloat16, partial(_in_integers, packed, layer.scales)
    found: dict[str, dict[str, float]] = {name: {} for name in ways}
    for rows in ROWS:
        x = torch.randn(rows, LAYER[1])
        calls = {name: partial(each, x.to(dtype)) for name, (dtype, each) in ways.items()}
        with torch.inference_mode():
            for name, ms in decode.least(calls, 4).items():
                found[name][str(rows)] = round(ms, 2)
    return found


def _in_integers(weight: torch.Tensor, scales: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return products.integer_product(x, weight, scales)


def _without_onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with products.without_onednn():
        return functional.linear(x, weight)


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2] == "all")))
