"""Looking at attention on a CPU: what it takes beside `output_attentions=True`, nnsight and bertviz on the same Falcon.

A random Falcon of 12 layers and 32 query heads. The kit gives statistics of every head; transformers, with its eager
attention, and nnsight hand out every probability, from which statistics would still have to be made; bertviz turns
those into its page. Peak memory is what a process of its own took beyond the loaded model, the activations of the
forward pass included. For the times all but bertviz take turns in one process, on shared weights.
"""

import gc
import importlib.util
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import FalconConfig, FalconForCausalLM

import falcon_kit as fk
from falcon_kit import FalconSpec
from falcon_kit.model import modeling

SHAPE = FalconSpec(
    "inspection", layers=12, d_model=2048, query_heads=32, kv_heads=2, vocabulary=2048, intermediate_size=8192
)
LENGTHS = (256, 1024, 2048)
ROUNDS = {256: 5, 1024: 3, 2048: 3}
KIT, FORWARD, STOCK, NNSIGHT, BERTVIZ = "kit", "forward pass", "output_attentions", "nnsight", "bertviz"
COLOURS = {KIT: "#0072B2", FORWARD: "#777777", STOCK: "#D55E00", NNSIGHT: "#E69F00", BERTVIZ: "#CC79A7"}
LIMIT = 14 * 2**30  # bytes of address space for a peer: what needs more counts as not fitting

Turn = Callable[[], Any]


def run() -> dict[str, Any]:
    """Peak memory and median seconds of each contestant, at each length."""
    rows = [_row(length) for length in LENGTHS]
    return {
        "model": f"{SHAPE.parameters:,} parameters, {SHAPE.layers} layers, {SHAPE.query_heads} query / "
        f"{SHAPE.kv_heads} KV heads, float32",
        "threads": torch.get_num_threads(),
        "lengths": rows,
    }


def _row(length: int) -> dict[str, Any]:
    peaks = {name: _worker("memory", name, length) for name in COLOURS if _installed(name)}
    seconds = _worker("times", "all", length)
    row: dict[str, Any] = {"tokens": length, "peak MiB": peaks, "seconds": seconds}
    if seconds:
        row["kit takes, of a forward pass"] = round(seconds[KIT] / seconds[FORWARD], 2)
    if peaks[STOCK] and peaks[KIT]:
        row["output_attentions takes so many times the kit's memory"] = round(peaks[STOCK] / peaks[KIT], 1)
    print(row, flush=True)
    return row


def _installed(name: str) -> bool:
    """Peers come with the extra "bench"; one that is missing is left out."""
    return name not in (NNSIGHT, BERTVIZ) or importlib.util.find_spec(name) is not None


def _worker(*arguments: Any) -> Any:
    """What one measurement in a process of its own says; None where it did not fit."""
    command = [sys.executable, "-m", "benchmarks.inspection", *map(str, arguments)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(ended.stdout.splitlines()[-1]) if ended.returncode == 0 else None


def contestants(shape: FalconSpec, length: int) -> dict[str, Callable[[], Turn]]:
    """By name, what builds a contestant; what it builds looks at a text of `length` tokens each time it is called.

    All share one set of weights.
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
        model.transformer.rotary_emb = type(model.transformer.rotary_emb)(config)  # buffers no checkpoint holds
        model.tie_weights()
        return model

    all_of_them = {
        KIT: lambda: _kit(kit, ids),
        FORWARD: lambda: _forward(kit, ids),
        STOCK: lambda: _stock(stock(), ids),
        NNSIGHT: lambda: _nnsight(stock(), ids),
        BERTVIZ: lambda: _bertviz(stock(), ids),
    }
    return {name: build for name, build in all_of_them.items() if _installed(name)}


def _kit(model: FalconForCausalLM, ids: torch.Tensor) -> Turn:
    tokenizer = fk.load("falconet").tokenizer
    return lambda: fk.attention((model, tokenizer), ids[0].tolist()).statistics


def _forward(model: FalconForCausalLM, ids: torch.Tensor) -> Turn:
    return torch.inference_mode()(lambda: model(ids, logits_to_keep=1).logits)


def _stock(model: FalconForCausalLM, ids: torch.Tensor) -> Turn:
    return torch.inference_mode()(lambda: model(ids, output_attentions=True, logits_to_keep=1).attentions)


def _nnsight(model: FalconForCausalLM, ids: torch.Tensor) -> Turn:
    import nnsight

    wrapped = nnsight.NNsight(model)

    def turn() -> Any:
        with torch.no_grad(), wrapped.trace(ids, output_attentions=True, logits_to_keep=1):
            saved = nnsight.save([])
            for layer in wrapped.transformer.h:
                saved.append(layer.self_attention.output[1])
        return saved

    return turn


def _bertviz(model: FalconForCausalLM, ids: torch.Tensor) -> Turn:
    from bertviz import head_view

    probabilities = _stock(model, ids)
    names = [str(each) for each in ids[0].tolist()]
    return lambda: head_view(probabilities(), names, html_action="return").data


def measure_memory(turn: Turn) -> float:
    """MiB that the process had at its highest while `turn` ran, beyond what it had before. Linux only."""
    gc.collect()  # what is freed meanwhile would hide as much of the turn
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest mark so far
    before = _status("VmRSS")
    kept = turn()
    peak = _status("VmHWM") - before
    del kept
    return round(peak / 1024, 1)


def _status(name: str) -> int:
    """A line of the process's own memory account, in KiB."""
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(found[1])


def measure_times(turns: Mapping[str, Turn], rounds: int) -> dict[str, float]:
    """Median seconds of each, taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            start = time.perf_counter()
            turn()
            taken[name].append(time.perf_counter() - start)
    return {name: round(statistics.median(each), 3) for name, each in taken.items()}


def check_agreement(shape: FalconSpec, length: int) -> None:
    """The contestants must see the same attention, or their figures mean nothing."""
    built = {name: build() for name, build in contestants(shape, length).items() if name in (KIT, STOCK, NNSIGHT)}
    ours = torch.tensor(built.pop(KIT)()["sink"])
    for turn in built.values():
        theirs = torch.stack([each[0, :, :, 0].mean(-1) for each in turn()])
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def main(what: str, name: str, length: int) -> None:
    """One measurement, in this process."""
    if name == BERTVIZ:
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    for build in (each for key, each in contestants(SHAPE, 16).items() if key == name):
        build()()  # what is loaded on first use
    builders = contestants(SHAPE, length)
    if what == "memory":
        print(json.dumps(measure_memory(builders[name]())))
        return
    check_agreement(SHAPE, 64)
    turns = {key: build() for key, build in builders.items() if key != BERTVIZ}
    print(json.dumps(measure_times(turns, ROUNDS[length])))


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
    figure.suptitle(f"Looking at every head: {figures['model']}", fontsize=9, x=0.42)
    return figure


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
