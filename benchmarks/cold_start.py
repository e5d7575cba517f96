"""Cold start: from the start of `python` to Falconet's first word, in the kit and by `transformers.pipeline`.

Each run is a process of its own, the ways in turns. Almost all of the time is the import of torch and of transformers'
Falcon, which both ways need: it is measured too. transformers' models import some packages wherever they are installed,
of which hqq takes longest, because it imports torch's compiler. The least time of all rounds counts, since other
processes only add to it.
"""

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import Any

from falcon_kit.catalogue.names import embedded_directory

ROUNDS = 4
PROMPT = "The giraffe"
_BASE = str(embedded_directory("falconet"))
WAYS = {
    "torch, imported": "import torch",
    "transformers' Falcon, imported": "from transformers import FalconForCausalLM, PreTrainedTokenizerFast",
    "transformers pipeline": f"""
from transformers import pipeline
print(pipeline("text-generation", model={_BASE!r})({PROMPT!r}, max_new_tokens=1))
""",
    "kit": f"""
import falcon_kit as fk
print(fk.load("falconet").generate({PROMPT!r}, max_new_tokens=1))
""",
}


def run() -> dict[str, Any]:
    """Seconds by the clock and of the processor for each way, and the ratio of the kit to the pipeline."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name, code in WAYS.items():
            times[name].append(_seconds(code))
    clock, processor = ({name: min(each[kind] for each in times[name]) for name in WAYS} for kind in (0, 1))
    return {
        "rounds": ROUNDS,
        "installed, and imported by transformers": [name for name in ("hqq", "scipy") if find_spec(name)],
        "seconds": {name: round(value, 2) for name, value in clock.items()},
        "seconds of the processor": {name: round(value, 2) for name, value in processor.items()},
        "kit, ratio to the pipeline": round(clock["kit"] / clock["transformers pipeline"], 3),
        "of the processor": round(processor["kit"] / processor["transformers pipeline"], 3),
    }


def _seconds(code: str) -> tuple[float, float]:
    """Seconds by the clock and of the processor (user and system) that a fresh Python takes to run the code."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)  # this interpreter
    elapsed, after = time.perf_counter() - start, os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return elapsed, spent
