"""The checks of notebook 01, Inference."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from falcon_kit.catalogue.card import CARD
from falcon_kit.exercises.outcome import expect, near

_SLACK = 3
"""Tokens that a stream may compute before it notices that nobody reads it."""


def exercise_1(temperature: float, logits: Any) -> str:
    """A number above 0, and the logits: fk.check("01.1", temperature, logits)."""
    expect(float(temperature) > 0, "A temperature is above 0.")
    highest = float((logits / float(temperature)).softmax(-1).max())
    inverse = float((logits * float(temperature)).softmax(-1).max())
    expect(
        near(highest, 0.1) or not near(inverse, 0.1), "The temperature divides the logits: take one over your answer."
    )
    way = "raise" if highest > 0.1 else "lower"
    expect(near(highest, 0.1), f"At {float(temperature):.2f} the highest probability is {highest:.1%}: {way} it.")
    return f"At {float(temperature):.2f}, 90% of the probability is on other tokens: the text would be nearly random."


def exercise_2(first_sentence: Callable[[Any, str], str], falcon: Any) -> str:
    """A function of the model and a prompt, and the model: fk.check("01.2", first_sentence, falcon)."""
    text, passes = _with_passes(first_sentence, falcon)
    expect(text is not None, "Your function returns nothing yet: return the text.")
    expect(isinstance(text, str), f"Your function returns a {type(text).__name__}: return the text as a string.")
    expect("." in text, f"The text {text!r} has no full stop: a stop string is not part of the text, so add it again.")
    rest = text.partition(".")[2]
    expect(
        len(rest) < 10 and "." not in rest, f"The text goes on after the full stop, with {rest[:40]!r}: stop earlier."
    )
    tokens = len(falcon.tokenizer(text)["input_ids"])
    expect(
        passes <= tokens + _SLACK,
        f"The text has {tokens} tokens, but the model computed {passes}: stop it while it generates, do not cut the "
        "text afterwards.",
    )
    return f"{text.strip()!r}: {tokens} tokens, from {passes} passes through the model. Generation ended here."


def _with_passes(first_sentence: Callable[[Any, str], str], falcon: Any) -> tuple[str, int]:
    """What a function returns for the card's prompt, and how often it ran the model."""
    passes: list[None] = []
    model = getattr(falcon, "model", None)
    with model.register_forward_hook(lambda *_: passes.append(None)) if model else nullcontext():
        return first_sentence(falcon, CARD.prompt), len(passes)


def exercise_3(prompt: str, falcon: Any) -> str:
    """A prompt as a string, and the model: fk.check("01.3", prompt, falcon)."""
    expect(isinstance(prompt, str), "Give the prompt as a string, not the answer of the model.")
    text = falcon.generate(prompt, seed=0, **CARD.sampling).text
    left = "giraf" in prompt.lower()
    hint = "your prompt still has giraffes, perhaps inside a name" if left else "name penguins in the prompt"
    expect("giraf" not in text.lower(), f"The text mentions a giraffe: {hint}.")
    expect("penguin" in text.lower(), f"The text mentions no penguin: {hint}.")
    return "The prompt is all that the model has about the speaker, so another prompt makes another character."
