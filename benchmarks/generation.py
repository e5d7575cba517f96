"""The overhead of the kit's generation over transformers': the same greedy tokens generated in five ways, alternating.

The kit does work for each token (stop strings, log-probabilities, statistics). Falconet shows the largest possible
overhead, because its forward pass takes only a few milliseconds; on a larger model the overhead is negligible.

The last way drafts tokens by prompt lookup. On a GPU or a larger model its time follows the number of forward passes;
here a pass over a draft also computes more.
"""

import statistics
from collections.abc import Callable
from typing import Any

import transformers

import falcon_kit as fk
from benchmarks._timing import in_turns

ROUNDS = 15
NEW_TOKENS = 64
PROMPT = fk.CARD.prompt


def run() -> dict[str, Any]:
    """Median milliseconds per token of each way, and the ratio of each to transformers' `generate`."""
    falcon = fk.load("falconet")
    ways = _ways(falcon)
    seconds = in_turns(ways, ROUNDS + 1)  # the first round warms up
    medians = {name: statistics.median(times[1:]) / NEW_TOKENS * 1000 for name, times in seconds.items()}
    peer = medians["transformers generate"]
    return {
        "model": "falconet",
        "new tokens": NEW_TOKENS,
        "rounds": ROUNDS,
        "ms per token": {name: round(value, 3) for name, value in medians.items()},
        "ratio to transformers generate": {name: round(value / peer, 3) for name, value in medians.items()},
        "prompt lookup": _passes(falcon, ways["kit stream, prompt lookup"]),
    }


def _passes(falcon: fk.Falcon, generate: Callable[[], list[fk.Piece]]) -> dict[str, int]:
    """The forward passes of a call, and the tokens that it accepted from drafts."""
    calls: list[int] = []
    handle = falcon.model.register_forward_hook(lambda *_: calls.append(1))
    pieces = generate()
    handle.remove()
    return {"tokens": len(pieces), "accepted": sum(each.accepted for each in pieces), "forward passes": len(calls)}


def _ways(falcon: fk.Falcon) -> dict[str, Callable[[], Any]]:
    """Ways to generate exactly `NEW_TOKENS` tokens after `PROMPT`; the end-of-sequence token is suppressed."""
    model, tokenizer = falcon
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    return {
        "transformers generate": lambda: model.generate(**tokenizer(PROMPT, return_tensors="pt"), **options),
        "transformers pipeline": lambda: pipeline(PROMPT, **options),
        "kit generate": lambda: falcon.generate(PROMPT, stop="\nDaniel:" * 3, **options),
        "kit stream": lambda: list(falcon.stream(PROMPT, stop="\nDaniel:" * 3, **options)),
        "kit stream, prompt lookup": lambda: list(falcon.stream(PROMPT, prompt_lookup_num_tokens=5, **options)),
    }
