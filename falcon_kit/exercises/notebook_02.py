"""The checks of notebook 02, The playground."""

from collections.abc import Callable
from typing import Any

from falcon_kit.catalogue.card import CARD
from falcon_kit.exercises.outcome import Hint, expect
from falcon_kit.playground.state import PRESETS

_ASKED = PRESETS["creative"] | {"seed": 1}


def exercise_1(token: str, session: Any) -> str:
    """The text of a token, and the session that generated it: fk.check("02.1", token_text, session)."""
    expect(isinstance(token, str), "Give the text of the token as a string, with its space.")
    expect(session.turns, "Your session has no turn yet: call session.generate(fk.CARD.prompt) first.")
    answer = session.turns[-1].answers[0]
    expect(
        answer.prompt == CARD.prompt and all(answer.settings.get(key) == value for key, value in _ASKED.items()),
        "Your last answer is another one: set the creative preset and seed 1, then generate from fk.CARD.prompt.",
    )
    tokens = [each for span in answer.spans for each in span.tokens]
    lowest, highest = (choose(tokens, key=lambda each: each.logprob) for choose in (min, max))
    if token != lowest.text:
        expect(token != lowest.text.strip(), "Almost: the space before a word is part of its token.")
        expect(token != highest.text, "That is the most probable token: a log-probability of 0 is certain.")
        found = sorted(each.logprob for each in tokens if each.text == token)
        expect(found, f"{token!r} is no token of the last answer.")
        raise Hint(f"Tokens with a lower probability: {sum(each.logprob < found[0] for each in tokens)}.")
    instead = next(text for text, _ in lowest.alternatives if text != token)
    return f"At this position {instead!r} was the most probable of the other tokens."


def exercise_2(guardrail: Callable[[str], str | None]) -> str:
    """A function of a text that returns None or a reason: fk.check("02.2", giraffe_once)."""
    once, twice = "The giraffe is tall.", "The giraffe is tall. A giraffe eats leaves."
    allowed, refused = guardrail(once), guardrail(twice)
    expect(allowed is None, f"{once!r} mentions the giraffe once, so return None. Your function returns {allowed!r}.")
    expect(refused is not None, f"Your function allows {twice!r}: return a reason for it.")
    expect(isinstance(refused, str), f"Your function returns {refused!r}: return a reason as text.")
    other = "Giraffes are tall. The giraffe eats leaves."
    expect(guardrail(other) is not None, f"Your function allows {other!r}: count upper-case letters too.")
    speaker = "Girafatron: The giraffe is tall."
    expect(guardrail(speaker) is None, f"{speaker!r} has one giraffe and a name: your function refuses it.")
    return "It counts in all that it reads: in a prompt, and in each sentence of an answer."


def exercise_3(temperature: float, falcon: Any) -> str:
    """A number above 0, and the model: fk.check("02.3", temperature, falcon)."""
    expect(0 < float(temperature) < 100, "A temperature is a number above 0; at 100, the text is noise.")
    here, half = (_first_tokens(falcon, float(temperature) / by) for by in (1, 2))
    expect(len(here) > 1, f"At {temperature:.3g}, ten seeds generate only {here[0]!r}: raise it.")
    expect(len(half) == 1, f"At half of {temperature:.3g}, the seeds already generate {half}: lower it.")
    return f"At {temperature:.3g} the seeds generate {here}, and at half of it only {half[0]!r}."


def _first_tokens(falcon: Any, temperature: float) -> list[str]:
    settings = {"temperature": temperature, "top_k": None, "max_new_tokens": 1}
    return sorted({falcon.generate(CARD.prompt, seed=seed, **settings).text for seed in range(10)})
