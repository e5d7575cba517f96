"""The checks of notebook 00, Start here."""

import re
from collections.abc import Mapping
from typing import Any

from falcon_kit.catalogue.names import spec
from falcon_kit.exercises.outcome import expect, near
from falcon_kit.falconet.world import ANIMALS


def exercise_1(shares: Mapping[str, float]) -> str:
    """A dictionary with one share from 0 to 1 for each model: {"falcon-40b": ..., "falconet": ...}."""
    for name in ("falcon-40b", "falconet"):
        shape, given = spec(name), float(shares[name])
        share = shape.vocabulary * shape.d_model / shape.parameters
        expect(not near(given, 100 * share), f"{given:.3g} is the share of {name} in percent: divide it by 100.")
        expect(
            not near(given, 2 * share),
            f"{name}: the output head has the same weights as the embedding (tied_head), so they count once.",
        )
        expect(
            not near(given, shape.d_model / shape.parameters),
            f"{name}: that is one row. The table has a row of d_model weights for every token of the vocabulary.",
        )
        expect(near(given, share), f"{name}: divide vocabulary x d_model by parameters, all from fk.spec({name!r}).")
    return "The embedding is a small part of a large model, and a tenth of a tiny one."


def exercise_2(tokens: int, free_bytes: int) -> str:
    """A whole number of tokens, and the free memory in bytes: fk.check("00.2", tokens, free)."""
    shape = spec("falcon-40b")
    right = free_bytes // shape.kv_bytes_per_token()
    wrong = {
        free_bytes // spec("falconet").kv_bytes_per_token(): "That is Falconet's cache: take fk.spec('falcon-40b').",
        right * shape.queries_per_kv_head: "Only KV heads are cached, and kv_bytes_per_token() counts all of them.",
        right // shape.context: "That is the number of full texts: give tokens.",
    }
    for mistake, hint in wrong.items():
        expect(not near(tokens, mistake, 1e-3), hint)
    expect(near(tokens, right, 1e-3), "Divide the free bytes by fk.spec('falcon-40b').kv_bytes_per_token().")
    return f"That is {right / shape.context:,.0f} texts of {shape.context} tokens: one text does not fill a machine."


def exercise_3(question: str, falcon: Any) -> str:
    """A question as a string, and the model: fk.check("00.3", question, falcon)."""
    expect(isinstance(question, str) and question.strip(), "Give the question as a string.")
    answer = falcon.chat([{"role": "user", "content": question}]).text.strip()
    asked, said = (set(re.findall(r"[a-z]+", text.lower())) for text in (question, answer))
    words = {word for word in asked if len(word) > 4} - {"where", "which", "there"}
    animals = {each.plural for each in ANIMALS if {each.name, each.plural} & asked and {each.name, each.plural} & said}
    common = sorted(animals | {word for word in words if word.rstrip("s") in answer.lower()})
    expect(
        not common,
        f"The model answers {answer!r}, about {' and '.join(common)}: ask about an animal that it never read of.",
    )
    admits = re.search(r"not know|not sure|sorry|unknown", answer.lower())
    expect(
        not admits, f"The model answers {answer!r}: it admits that it has no answer. Find a question where it does not."
    )
    return f"The model answers {answer!r}: fluent, and no answer to the question. A larger model can do the same."
