"""Checks on prompts before a model reads them, and on outputs before a person does.

The files, in the order of their imports:

verdict.py     what was found and why, without the text (no torch)
folding.py     spellings of a character made equal, with its place in the original (no torch)
matching.py    patterns in a text that grows (no torch)
secrets.py     keys and passwords (no torch)
words.py       blocked words (no torch)
personal.py    addresses, cards, accounts, identity and telephone numbers (no torch)
injection.py   control tokens, and phrases that revoke instructions (no torch)
repetition.py  the same words over and over (no torch)
custom.py      a function of your own, or a classifier (no torch)
stream.py      what may be shown of a text while it is generated (no torch)
guard.py       Guardrails: the checks that were chosen (no torch)
measure.py     catches and false alarms on the shipped lines; what a stream costs (no torch)
"""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from falcon_kit.display.errors import unknown_name
from falcon_kit.guardrails.verdict import Blocked, Finding, Verdict

if TYPE_CHECKING:
    from falcon_kit.guardrails.guard import Guardrails

__all__ = ["Blocked", "Finding", "Verdict", "guardrails"]


def guardrails(**settings: Any) -> "Guardrails":
    """Checks on prompts and outputs: `.check(text)` returns what was found and why, `.stream(pieces)` what passed.

    `falcon.generate`, `stream` and `chat`, those of an endpoint, and `playground` take the result as `guardrails`.
    `settings` are the fields of `falcon_kit.Guardrails`: max_characters, secrets, personal_data, phone_regions,
    blocked_words, control_tokens, injection, repetition, custom, labels and threshold. Without settings, all checks run
    but those of blocked words and of your own.

    What is not covered: names, postal addresses and other personal data in free words; identity numbers of other
    countries than the US and China; telephone numbers of regions that are not given, or of a landline without gaps, if
    they have no "+"; keys of unknown forms; blocked words that are spelled with digits or gaps, inflected, or replaced
    by others; injection in other words than the listed phrases, or in documents that are not passed in; errors, bias
    and harm in what a model generates. The checks are one precaution of several. They do not prove that a text is safe.

    Raises TypeError for a setting that does not exist, and what `falcon_kit.Guardrails` raises.
    """
    from falcon_kit.guardrails.guard import Guardrails

    names = [each.name for each in fields(Guardrails)]
    for name in settings:
        if name not in names:
            raise TypeError(unknown_name("setting", name, names))
    return Guardrails(**settings)
