"""The checks of notebook 10, Serving."""

from collections.abc import Collection, Mapping
from typing import Any

from falcon_kit.catalogue.names import spec
from falcon_kit.exercises.outcome import Hint, expect, near

_BITS = 8.5
"""Bits per value of q8_0: 8, and a scale of 16 bits for 32 values."""


def exercise_1(share: float, falcon: Any) -> str:
    """A number from 0 to 1, and the exported model: fk.check("10.1", share, falcon)."""
    bits = 8 * falcon.model.dtype.itemsize
    expect(not near(share, bits / _BITS, 0.05), "That is how many times smaller it is: give its size over the other.")
    expect(
        not near(share, 8 / bits, 0.01),
        "That counts 8 bits per value: measure the files. Each 32 values have a scale of 16 bits as well.",
    )
    expect(
        near(share, _BITS / bits, 0.05), "Divide the size of the q8_0 file by that of the file in the model's dtype."
    )
    return f"8.5 of {bits} bits per value. The LayerNorms stay as they are."


def exercise_2(counts: Mapping[str, Collection[int]]) -> str:
    """A dictionary with a list of numbers of GPUs for each model: {"falcon-7b": ..., "falcon-40b": ..., ...}."""
    for name in ("falcon-7b", "falcon-40b", "falcon-rw-7b"):
        shape, given = spec(name), set(counts[name])
        right = {number for number in (1, 2, 4, 8) if shape.kv_heads % number == 0}
        expect(given <= {1, 2, 4, 8}, "Give numbers out of 1, 2, 4 and 8.")
        if not given <= right:
            heads = f"{shape.query_heads} query heads and {shape.kv_heads} KV head"
            raise Hint(f"{name} has {heads}: one head cannot be divided.")
        expect(given == right, f"{name} has {shape.kv_heads} KV heads: which numbers divide it? One GPU counts too.")
    return "The number of KV heads decides. The 7B has one, so it runs on one GPU, or as a pipeline."


def exercise_3(finish_reason: str) -> str:
    """The finish reason, as a string."""
    expect(finish_reason not in ("stop", "eos"), "That is the reason of a text that ended by itself.")
    expect(finish_reason != "length", "That is the reason of a text that reached max_new_tokens.")
    expect(finish_reason == "broken", "Read stream.generation.finish_reason after the exception.")
    return "The text so far is kept, and the kit does not ask again: another answer could begin with other tokens."
