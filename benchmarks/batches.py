"""Many prompts of different lengths, with the same weights: transformers' pipeline and the kit, alone and in batches.

The pipeline's batches are of prompts in the order in which they come, padded to the longest; those of
`falcon.generate_each` are of similar lengths. All ways continue each prompt greedily by the same number of tokens.
"""

import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

import falcon_kit as fk
from benchmarks._timing import in_turns
from benchmarks.decode import SHAPE
from benchmarks.planning import checkpoint

ROUNDS, PROMPTS, BATCH, NEW_TOKENS = 3, 48, 8, 16
_ALONE, _TOGETHER = "one at a time", f"batches of {BATCH}"


def run() -> dict[str, Any]:
    """Median seconds for all prompts of each way, and transformers' seconds over the kit's."""
    shape = replace(SHAPE, name="batches", vocabulary=fk.spec("falconet").vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        directory = checkpoint(Path(folder) / "falcon", shape.to_config())
        ways = _ways(directory, _prompts())
        seconds = in_turns(ways, ROUNDS + 1)  # the first round warms up
    medians = {name: round(statistics.median(times[1:]), 1) for name, times in seconds.items()}
    return {
        "parameters": shape.parameters,
        "prompts": PROMPTS,
        "new tokens of each": NEW_TOKENS,
        "seconds": medians,
        "transformers' seconds over the kit's": {
            how: round(medians[f"transformers, {how}"] / medians[f"kit, {how}"], 2) for how in (_ALONE, _TOGETHER)
        },
    }


def _prompts() -> list[str]:
    """Prompts of 1 to 300 words: many short ones, and a few long ones."""
    numbers = random.Random(0)
    return [" giraffe" * min(300, int(numbers.expovariate(1 / 60)) + 1) for _ in range(PROMPTS)]


def _ways(directory: Path, prompts: list[str]) -> dict[str, Callable[[], Any]]:
    falcon = fk.load(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    pipeline = transformers.pipeline("text-generation", str(directory), tokenizer=tokenizer, dtype=falcon.model.dtype)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    return {
        f"transformers, {_ALONE}": lambda: pipeline(prompts, **options),
        f"transformers, {_TOGETHER}": lambda: pipeline(prompts, batch_size=BATCH, **options),
        f"kit, {_ALONE}": lambda: [falcon.generate(each, **options) for each in prompts],
        f"kit, {_TOGETHER}": lambda: list(falcon.generate_each(prompts, batch_size=BATCH, **options)),
    }
