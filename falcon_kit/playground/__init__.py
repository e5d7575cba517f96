"""The playground: prompts by hand in a notebook, on one model or two.

The files, in the order of their imports:

records.py  turns, answers, tokens
export.py   the code that writes an answer again
files.py    the history as a JSON file
lanes.py    the models, each read in its own thread
writing.py  a turn while it is written
state.py    Session: the playground without its widget
widget.py   Playground: what the browser shows
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from falcon_kit.playground.widget import Playground
    from falcon_kit.playground.writing import Guard


def playground(falcon: Any, compare: Any = None, guardrails: Guard | None = None) -> Playground:
    """A widget to write prompts and chat in: words appear as they come, with the odds behind each token.

    falcon: what `fk.load` or `fk.connect` returned. compare: another one, or a dict of settings such as
    {"temperature": 0}; both write side by side. guardrails: a function that takes a text and gives a reason to refuse
    it, or None; it sees every prompt, and every answer sentence by sentence before it is shown.

    What it shows can be read and set as plain Python: `playground(falcon).session`. Everything stays in the kernel and
    its page. Raises ValueError for something that cannot write.
    """
    from falcon_kit.playground.state import Session
    from falcon_kit.playground.widget import Playground

    return Playground(Session(falcon, compare, guardrails))
