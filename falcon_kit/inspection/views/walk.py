"""A text whose tokens react to the pointer and the arrow keys. It has one tab stop, whatever its length."""

from __future__ import annotations

from collections.abc import Sequence

from falcon_kit.display.page import direction, text_html

STYLE = """
  & .tokens { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 26em; overflow: auto; line-height: 1.9; }
  & .tokens span { border-radius: 3px; padding: .1em 0; cursor: default; }
  & .tokens .current { outline: 2px solid var(--c5); }
  & .description { min-height: 3em; }
"""

SCRIPT = r"""
const tokens = [...root.querySelectorAll(".tokens span")];
let current = tokens.length - 1;
function select(index, show, focus) {
  tokens[current].tabIndex = -1;
  tokens[current].classList.remove("current");
  current = index;
  tokens[current].tabIndex = 0;
  tokens[current].classList.add("current");
  if (focus) tokens[current].focus();
  show();
}
function walk(show) {
  const box = root.querySelector(".tokens");
  const enter = event => {
    const at = tokens.indexOf(event.target.closest("span"));
    if (at >= 0 && at !== current) select(at, show);
  };
  box.addEventListener("pointerover", enter);
  box.addEventListener("focusin", enter);
  box.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    const to = step ? current + step : {Home: 0, End: tokens.length - 1}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    if (to >= 0 && to < tokens.length) select(to, show, true);
  });
  select(current, show);
}
"""
"""`walk(show)` calls `show` for the last token, and whenever the index `current` in `tokens` changes."""

SHOW_TITLE = """
if (tokens.length) walk(() => { root.querySelector(".description").textContent = tokens[current].title; });
"""
"""Shows the title of the current token in the element of `DESCRIPTION`."""

DESCRIPTION = '<p class="description" aria-live="polite"></p>'


def tokens_html(tokens: Sequence[str], attributes: Sequence[str] | None = None) -> str:
    """The text with a span for each token. `attributes` are those of each span, in escaped HTML.

    A line break is shown as a mark, followed by a new line.
    """
    spans = "".join(
        f'<span tabindex="{0 if at == len(tokens) - 1 else -1}"{attributes[at] if attributes else ""}>'
        f"{text_html(token)}</span>{'<br>' if token.endswith(chr(10)) else ''}"
        for at, token in enumerate(tokens)
    )
    return f'<div class="tokens" dir="{direction("".join(tokens))}">{spans}</div>'
