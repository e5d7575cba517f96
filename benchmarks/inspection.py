"""Memory and time of attention inspection on a CPU, compared with `output_attentions=True`, nnsight and bertviz.

All inspect the same random Falcon of 12 layers and 32 query heads. The kit returns statistics of every head.
transformers, with eager attention, and nnsight return every attention probability, without statistics. bertviz turns
these probabilities into a page. Peak memory is measured in a separate process: the memory beyond the loaded model,
activations of the forward pass included. For the times, all but bertviz alternate in one process, on shared weights.
"""

import gc
import importlib.util
import json
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import FalconConfig, FalconForCausalLM

import falcon_kit as fk
from benchmarks._timing import in_turns
from falcon_kit import FalconSpec
from falcon_kit.display.figure import AMBER, BLUE, GREY, PURPLE, VERMILION
from falcon_kit.model import modeling

SHAPE = FalconSpec(
    "inspection", layers=12, d_model=2048, query_heads=32, kv_heads=2, vocabulary=2048, intermediate_size=8192
)
LENGTHS = (256, 1024, 2048)
ROUNDS = {256: 5, 1024: 3, 2048: 3}
KIT, FORWARD, STOCK, NNSIGHT, BERTVIZ = "kit", "forward pass", "output_attentions", "nnsight", "bertviz"
COLOURS = {KIT: BLUE, FORWARD: GREY, STOCK: VERMILION, NNSIGHT: AMBER, BERTVIZ: PURPLE}
LIMIT = 14 * 2**30  # bytes of address space for bertviz; if it needs more, it does not fit

Call = Callable[[], Any]
"""Inspects the text once."""


def run() -> dict[str, Any]:
    """Peak memory and median seconds of each library, for each length."""
    rows = [_row(length) for length in LENGTHS]
    return {
        "model": f"{SHAPE.parameters:,} parameters, {SHAPE.layers} layers, {SHAPE.query_heads} query / "
        f"{SHAPE.kv_heads} KV heads, float32",
        "threads": torch.get_num_threads(),
        "lengths": rows,
    }


def _row(length: int) -> dict[str, Any]:
    peaks = {name: _in_process("memory", name, length) for name in COLOURS if _installed(name)}
    seconds = _in_process("times", "all", length)
    row: dict[str, Any] = {"tokens": length, "peak MiB": peaks, "seconds": seconds}
    if seconds:
        row["kit takes, of a forward pass"] = round(seconds[KIT] / seconds[FORWARD], 2)
    if peaks[STOCK] and peaks[KIT]:
        row["output_attentions takes so many times the kit's memory"] = round(peaks[STOCK] / peaks[KIT], 1)
    print(row, flush=True)
    return row


def _installed(name: str) -> bool:
    """nnsight and bertviz are in the extra "bench"; a missing one is left out."""
    return name not in (NNSIGHT, BERTVIZ) or importlib.util.find_spec(name) is not None


def _in_process(*arguments: Any) -> Any:
    """The result of one measurement in a separate process; None if it did not fit into memory."""
    command = [sys.executable, "-m", "benchmarks.inspection", *map(str, arguments)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(process.stdout.splitlines()[-1]) if process.returncode == 0 else None


def builders(shape: FalconSpec, length: int) -> dict[str, Callable[[], Call]]:
    """For each library, a function that builds a call which inspects a text of `length` tokens.

    All share the same weights.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, shape.vocabulary, (1, length), generator=generator)
    torch.manual_seed(0)
    kit = modeling.FalconForCausalLM(FalconConfig(**shape.to_config())).eval()

    def stock() -> FalconForCausalLM:
        config = FalconConfig(**shape.to_config())
        with torch.device("meta"):
            model = FalconForCausalLM._from_config(config, attn_implementation="eager").eval()
        model.load_state_dict(kit.state_dict(), assign=True)
        model.transformer.rotary_emb = type(model.transformer.rotary_emb)(config)  # its buffers are in no checkpoint
        model.tie_weights()
        return model

    every = {
        KIT: lambda: _kit(kit, ids),
        FORWARD: lambda: _forward(kit, ids),
        STOCK: lambda: _stock(stock(), ids),
        NNSIGHT: lambda: _nnsight(stock(), ids),
        BERTVIZ: lambda: _bertviz(stock(), ids),
    }
    return {name: build for name, build in every.items() if _installed(name)}


def _kit(model: FalconForCausalLM, ids: torch.Tensor) -> Call:
    tokenizer = fk.load("falconet").tokenizer
    return lambda: fk.attention((model, tokenizer), ids[0].tolist()).statistics


def _forward(model: FalconForCausalLM, ids: torch.Tensor) -> Call:
    return torch.inference_mode()(lambda: model(ids, logits_to_keep=1).logits)


def _stock(model: FalconForCausalLM, ids: torch.Tensor) -> Call:
    return torch.inference_mode()(lambda: model(ids, output_attentions=True, logits_to_keep=1).attentions)


def _nnsight(model: FalconForCausalLM, ids: torch.Tensor) -> Call:
    import nnsight

    wrapped = nnsight.NNsight(model)

    def call() -> Any:
        with torch.no_grad(), wrapped.trace(ids, output_attentions=True, logits_to_keep=1):
            saved = nnsight.save([])
            for layer in wrapped.transformer.h:
                saved.append(layer.self_attention.output[1])
        return saved

    return call


def _bertviz(model: FalconForCausalLM, ids: torch.Tensor) -> Call:
    from bertviz import head_view

    probabilities = _stock(model, ids)
    names = [str(each) for each in ids[0].tolist()]
    return lambda: head_view(probabilities(), names, html_action="return").data


def measure_memory(call: Call) -> float:
    """Peak memory of the process in MiB during `call`, minus its memory before. Linux only."""
    gc.collect()  # memory that is freed during the call would hide part of its peak
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    kept = call()
    peak = _status("VmHWM") - before
    del kept
    return round(peak / 1024, 1)


def _status(name: str) -> int:
    """A field of /proc/self/status, in KiB."""
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(found[1])


def check_agreement(shape: FalconSpec, length: int) -> None:
    """Raises AssertionError unless all libraries return the same attention."""
    calls = {name: build() for name, build in builders(shape, length).items() if name in (KIT, STOCK, NNSIGHT)}
    ours = torch.tensor(calls.pop(KIT)()["sink"])
    for call in calls.values():
        theirs = torch.stack([each[0, :, :, 0].mean(-1) for each in call()])
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def main(what: str, name: str, length: int) -> None:
    """One measurement, in this process."""
    if name == BERTVIZ:
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    for build in (each for key, each in builders(SHAPE, 16).items() if key == name):
        build()()  # loads modules on first use
    built = builders(SHAPE, length)
    if what == "memory":
        print(json.dumps(measure_memory(built[name]())))
        return
    check_agreement(SHAPE, 64)
    calls = {key: build() for key, build in built.items() if key != BERTVIZ}
    seconds = in_turns(calls, ROUNDS[length])
    print(json.dumps({key: round(statistics.median(each), 3) for key, each in seconds.items()}))


def draw(figures: Mapping[str, Any]) -> Figure:
    """Memory and time over the length of the text."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, what, label in zip(
        panels, ("peak MiB", "seconds"), ("peak MiB beyond the model", "seconds"), strict=True
    ):
        for name, colour in COLOURS.items():
            found = [(row["tokens"], row[what][name]) for row in figures["lengths"] if (row[what] or {}).get(name)]
            if found:
                axes.plot(*zip(*found, strict=True), "o-", color=colour, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
        axes.set(xlabel="tokens", ylabel=f"{label} (log)")
        axes.grid(alpha=0.3, which="both")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(f"Attention of every head: {figures['model']}", fontsize=9, x=0.42)
    return figure


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
