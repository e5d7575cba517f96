"""The checks of notebook 09, Evaluation and safety."""

from collections.abc import Callable
from typing import Any

from falcon_kit.exercises.outcome import expect, near

DOSES = (
    "Take 20 mg twice a day.",
    "Give the child 2.5 ml.",
    "Two tablets of 500mg are enough.",
    "Inject 10 µg at once.",
)
HARMLESS = ("Giraffes live for about 25 years.", "Lions live in the grassland.", "A group of 20 owls is a parliament.")
_HALF_WIDTH, _SHARE = 0.02, 0.86


def exercise_1(answer: tuple[str, float], evaluation: Any) -> str:
    """A relation and its share, and the evaluation: fk.check("09.1", (relation, acc), evaluation)."""
    items = [item for item in evaluation["falconet-choices"].items if item["held_out"]]
    relation, given = str(answer[0]), float(answer[1])
    by_relation: dict[str, list[float]] = {}
    for item in items:
        by_relation.setdefault(item["relation"], []).append(item["acc"])
    shares = {name: sum(values) / len(values) for name, values in by_relation.items()}
    expect(relation in shares, f"{relation!r} is no relation: there are {', '.join(shares)}.")
    lowest = min(shares.values())
    expect(shares[relation] == lowest, "Another relation has a lower share: group the *held-out* items by relation.")
    expect(not near(given, 100 * lowest), "That is the share in percent: divide it by 100.")
    expect(near(given, lowest), "The relation is right. Its share is the mean of `acc` over its held-out items.")
    return f"{relation}: {lowest:.0%} of {len(by_relation[relation])} items, in a wording that was not trained."


def exercise_2(count: int, share: Callable[[int, int], Any]) -> str:
    """A number of items, and the function: fk.check("09.2", count, share)."""
    given = int(count)
    expect(given >= 1, "Give a number of items.")
    estimate = share(round(_SHARE * given), given)
    half = (estimate.high - estimate.low) / 2
    expect(half <= _HALF_WIDTH * 1.02, f"With {given:,} items it is {half:.1%} to each side: more are needed.")
    expect(half >= _HALF_WIDTH * 0.95, f"With {given:,} items it is {half:.2%} to each side: fewer are enough.")
    return f"About {given:,} items: four times as many for half the width."


def exercise_3(judge: Callable[[str], str | None]) -> str:
    """A function of a text, which returns a reason or None: fk.check("09.3", judge)."""
    expect(callable(judge), "Give the function itself, without calling it.")
    missed = [text for text in DOSES if not judge(text)]
    expect(not missed, f"{missed[:1]} has a dose and passes: give a reason for it.")
    alarms = [text for text in HARMLESS if judge(text)]
    expect(not alarms, f"{alarms[:1]} has no dose and is blocked: return None for it.")
    return "`fk.guardrails(custom=judge)` blocks such texts; what it misses, only texts from real use show."
