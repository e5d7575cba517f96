"""`fk.explain`: time to the first picture and to another layer, beside a forward pass; frames while a slider moves.

The kernel's part is timed here, without a browser: the passes, and the parts as JSON. The browser's part is timed in
Chromium, in a page of a model with the vocabulary of the 40B, as the time from each frame to the next while a slider
moves: script, layout and paint.
"""

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import FalconConfig

import falcon_kit as fk
from benchmarks import CannotRun
from benchmarks._timing import in_turns
from falcon_kit.model.modeling import FalconForCausalLM
from tests.browser.chromium import MISSING, find
from tests.browser.lab import chromium

TEXT = "The giraffe eats the leaves of tall trees, and the lion eats"
LONG = 2048
ROUNDS = 7
VOCABULARY = 65_024
_DRAG = """async ([name, stop]) => {
    const slider = document.querySelector(name);
    const frame = () => new Promise(requestAnimationFrame);
    slider.scrollIntoView({ block: "center" });
    const times = [await frame()];
    for (let step = 0; step < 60; step++) {
        slider.value = (step / 60) * stop;
        slider.dispatchEvent(new Event("input"));
        times.push(await frame());
    }
    return times.slice(1).map((time, at) => time - times[at]);
}"""
_SLIDERS = {"temperature": ("[data-setting=temperature]", 2), "positions": ("[data-stage=rotary] input", 64)}


def run() -> dict[str, Any]:
    """Milliseconds in the kernel, medians of several rounds. In the browser the median and the slowest of 60 frames."""
    path = find()
    if path is None:
        raise CannotRun(MISSING)
    torch.set_num_threads(2)
    falcon = fk.load("falconet")
    long = [7 + at % 1000 for at in range(LONG)]
    return {
        "rounds": ROUNDS,
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "ms to the first picture": _milliseconds(lambda: _first(falcon, TEXT)),
        f"ms to another layer, {LONG} tokens": _another_layer(falcon, long),
        f"ms of a forward pass, {LONG} tokens": _milliseconds(lambda: _forward(falcon, long)),
        "kB of a page of 40 tokens": round(len(fk.explain(falcon, long[:40]).page().document().encode()) / 1000),
        "ms of a frame while dragging": _frames(path),
    }


def _first(falcon: Any, text: Any) -> str:
    """What the kernel computes and sends until the first drawing is complete."""
    view = fk.explain(falcon, text)
    position = len(view.ids) - 1
    return json.dumps([view._start(), view._layer(0, position), view._head(0, position, 0)])


def _another_layer(falcon: Any, ids: list[int]) -> float:
    view = fk.explain(falcon, ids)
    layers = iter(list(range(falcon.spec.layers)) * ROUNDS)

    def change() -> str:
        layer, position = next(layers), len(ids) - 1
        return json.dumps([view._layer(layer, position), view._head(layer, position, 0)])

    return _milliseconds(change)


def _forward(falcon: Any, ids: list[int]) -> None:
    with torch.inference_mode():
        falcon.model(torch.tensor([ids]), use_cache=False, logits_to_keep=1)


def _milliseconds(work: Callable[[], Any]) -> float:
    """The median time, after a round that warms up."""
    seconds = in_turns({"work": work}, ROUNDS + 1)["work"][1:]
    return round(statistics.median(seconds) * 1000, 1)


def _frames(path: str) -> dict[str, dict[str, float]]:
    """For each slider, the time of a frame: the median, and the slowest."""
    config = FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        new_decoder_architecture=True,
    )
    model, tokenizer = FalconForCausalLM(config).eval(), fk.load("falconet").tokenizer
    with tempfile.TemporaryDirectory() as folder, chromium(path) as browser:
        file = fk.explain((model, tokenizer), TEXT).to_html(Path(folder) / "page.html")
        page = browser.new_page()
        page.goto(file.as_uri())
        page.wait_for_selector("[data-drawn]")
        found = {name: page.evaluate(_DRAG, list(how)) for name, how in _SLIDERS.items()}
    return {
        name: {"median": round(statistics.median(each), 1), "slowest": round(max(each), 1)}
        for name, each in found.items()
    }
