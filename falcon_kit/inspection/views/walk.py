"""A text whose tokens react to the pointer and the arrow keys. It has one tab stop, whatever its length."""

from collections.abc import Sequence

from falcon_kit.display.page import direction, static_text, text_html
from falcon_kit.inspection.views.tables import fitting

STYLE = static_text(__file__, "walk.css")

SCRIPT = static_text(__file__, "walk.js")
"""`walk(show)` calls `show` for the last token, and whenever the index `current` in `tokens` changes."""

SHOW_TITLE = """
if (tokens.length) walk(() => { root.querySelector(".description").textContent = tokens[current].title; });
"""
"""Shows the title of the current token in the element of `DESCRIPTION`."""

DESCRIPTION = '<p class="description" aria-live="polite"></p>'


def tokens_html(tokens: Sequence[str], attributes: Sequence[str] | None = None, room: int | None = None) -> str:
    """The text with a span for each token. `attributes` are those of each span, in escaped HTML.

    A line break is shown as a mark, followed by a new line. room: bytes for the last tokens, and a note if the first
    ones do not fit; None is no limit.
    """
    spans = [
        f'<span tabindex="{0 if at == len(tokens) - 1 else -1}"{attributes[at] if attributes else ""}>'
        f"{text_html(token)}</span>{'<br>' if token.endswith(chr(10)) else ''}"
        for at, token in enumerate(tokens)
    ]
    if room is not None:
        spans = fitting(([each] for each in reversed(spans)), room)[::-1]
    cut = len(spans) < len(tokens)
    note = f'<p class="note">The last {len(spans):,} of {len(tokens):,} tokens.</p>' if cut else ""
    return f'<div class="tokens" dir="{direction("".join(tokens))}">{"".join(spans)}</div>{note}'
