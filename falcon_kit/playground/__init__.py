"""The playground: a widget for prompts, on one model or two.

The files, in the order of their imports:

records.py  turns, answers, tokens, the meter
files.py    the history as a JSON file, an answer as code
columns.py  the models, each with a thread that reads its stream
writing.py  a turn while its answers are generated
state.py    Session: the playground without its widget
widget.py   Playground: what the browser shows
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from falcon_kit.guardrails.guard import Guardrails
    from falcon_kit.playground.widget import Playground


def playground(falcon: Any, compare: Any = None, guardrails: "Guardrails | None" = None) -> "Playground":
    """A widget for prompts and conversations: generated text appears as it is streamed, with token probabilities.

    falcon: what `fk.load` or `fk.connect` returned. compare: another one, or a dict of settings such as
    {"temperature": 0}; both generate side by side. guardrails: what `fk.guardrails(...)` returned; it checks every
    prompt, and every answer before it is shown. A switch turns them off and on.

    `playground(falcon).session` reads and changes what it shows from Python. All data stays in the kernel and the
    browser. Raises ValueError for an object without a `stream` method, and TypeError for other guardrails.
    """
    from falcon_kit.playground.state import Session
    from falcon_kit.playground.widget import Playground

    return Playground(Session(falcon, compare, guardrails))
