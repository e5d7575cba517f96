"""What the kit's generation costs on top of transformers': the same greedy tokens by four roads, alternating.

The kit watches each token (stop strings, log-probabilities, statistics). On Falconet, where a forward pass takes a few
milliseconds, that weighs as much as it ever can; on a larger model the same work disappears behind the model's.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import transformers

import falcon_kit as fk

ROUNDS = 15
NEW_TOKENS = 64
PROMPT = fk.CARD.prompt


def run() -> dict[str, Any]:
    """Median milliseconds per token of each road, and each as a ratio to transformers' `generate`."""
    falcon = fk.load("falconet")
    roads = _roads(falcon)
    taken: dict[str, list[float]] = {name: [] for name in roads}
    for _ in range(ROUNDS + 1):  # the first round warms up
        for name, road in roads.items():
            start = time.perf_counter()
            road()
            taken[name].append((time.perf_counter() - start) / NEW_TOKENS * 1000)
    medians = {name: statistics.median(times[1:]) for name, times in taken.items()}
    peer = medians["transformers generate"]
    return {
        "model": "falconet",
        "new tokens": NEW_TOKENS,
        "rounds": ROUNDS,
        "ms per token": {name: round(value, 3) for name, value in medians.items()},
        "ratio to transformers generate": {name: round(value / peer, 3) for name, value in medians.items()},
    }


def _roads(falcon: fk.Falcon) -> dict[str, Callable[[], Any]]:
    """Ways to write `NEW_TOKENS` tokens after `PROMPT`, the end token switched off so that all write as many."""
    model, tokenizer = falcon
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    return {
        "transformers generate": lambda: model.generate(**tokenizer(PROMPT, return_tensors="pt"), **options),
        "transformers pipeline": lambda: pipeline(PROMPT, **options),
        "kit generate": lambda: falcon.generate(PROMPT, stop="\nDaniel:" * 3, **options),
        "kit stream": lambda: list(falcon.stream(PROMPT, stop="\nDaniel:" * 3, **options)),
    }
