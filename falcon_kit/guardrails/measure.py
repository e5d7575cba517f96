"""Catches and false alarms of the checks on the shipped lines, and what they cost in a stream.

    python -m falcon_kit.guardrails.measure

`lines.jsonl` has 200 lines: prompts and outputs in English, German, Chinese and Arabic. They contain no real person's
data; keys and numbers are documented examples or made up. The author of the rules wrote all of them before the rules,
and changed the rules until they fitted the half "tuning". The half "held out" was measured afterwards, and no rule was
changed for it. Texts that other people write are caught less often.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from falcon_kit.guardrails.guard import Guardrails
from falcon_kit.guardrails.verdict import Where

Half = Literal["tuning", "held out"]
CHECKS = ("secrets", "personal_data", "blocked_words", "control_tokens", "injection", "repetition")
"""The checks that are measured; the length of a text needs no measurement."""
BLOCKED_WORDS = ("cunt", "ass", "sex", "damn", "kill yourself", "Schlampe", "Mörder", "傻瓜", "炸弹", "غبي", "قنبلة")
"""The blocked words of the measurement."""
TOKENS_PER_SECOND = 50
"""The speed of the stream whose time is compared."""


@dataclass(frozen=True)
class Line:
    """One labelled line."""

    half: Half
    where: Where
    language: str
    """"en", "de", "zh" or "ar"."""
    checks: tuple[str, ...]
    """The checks that should find something; none for a harmless line."""
    text: str


@dataclass(frozen=True)
class Score:
    """One check on one half."""

    check: str
    half: Half
    caught: int
    """Lines that it should block and does."""
    labelled: int
    """Lines that it should block."""
    false_alarms: int
    """Lines that it blocks and should not."""
    others: int
    """Lines that it should not block."""


@cache
def lines() -> tuple[Line, ...]:
    """The shipped lines."""
    rows = map(json.loads, (Path(__file__).parent / "lines.jsonl").read_text(encoding="utf-8").splitlines())
    return tuple(Line(**{**row, "checks": tuple(row["checks"])}) for row in rows)


def measured_guardrails() -> Guardrails:
    """The guardrails that are measured: all checks of the kit, with telephone numbers of the US and Germany."""
    return Guardrails(blocked_words=BLOCKED_WORDS, phone_regions=("US", "DE"))


def scores(guard: Guardrails) -> Iterator[Score]:
    """Catches and false alarms of each check on each half."""
    found = {line: {finding.check for finding in guard.check(line.text, line.where).findings} for line in lines()}
    for check in CHECKS:
        for half in ("tuning", "held out"):
            own = [line for line in lines() if line.half == half and check in line.checks]
            others = [line for line in lines() if line.half == half and check not in line.checks]
            caught, alarms = (sum(check in found[line] for line in group) for group in (own, others))
            yield Score(check, half, caught, len(own), alarms, len(others))


def seconds_per_token(guard: Guardrails, tokens: Sequence[str]) -> float:
    """Processor seconds that the checks take for each token of a stream that passes."""
    start = time.thread_time()
    passed = sum(1 for _ in guard.stream(iter(tokens)))
    return (time.thread_time() - start) / passed


def sample_tokens(count: int) -> list[str]:
    """Made-up text without findings, in tokens of four characters."""
    words = "the falcon sees 1914 small birds, mail and key cards near a river; it turns (slowly) and dives.".split()
    text = " ".join(words[(number * number + number // 7) % len(words)] for number in range(count))
    return [text[place : place + 4] for place in range(0, 4 * count, 4)]


def report() -> str:
    """The table, and the cost in a stream."""
    guard = measured_guardrails()
    head = f"{'check':16} {'half':10} {'caught':>10} {'false alarms':>14}"
    rows = [
        f"{each.check:16} {each.half:10} {each.caught:4} of {each.labelled:2} {each.false_alarms:7} of {each.others:3}"
        for each in scores(guard)
    ]
    cost = seconds_per_token(guard, sample_tokens(1000))
    share = cost * TOKENS_PER_SECOND
    return "\n".join(
        [head, *rows, f"{cost * 1e6:.0f} us a token: {share:.2%} of a stream of {TOKENS_PER_SECOND} tokens/s"]
    )


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
