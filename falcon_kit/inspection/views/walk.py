"""A text whose tokens are pointed at, or walked through with the arrow keys: one stop for the tab key, however long."""

from __future__ import annotations

from collections.abc import Sequence

from falcon_kit.display.page import direction, text_html

STYLE = """
  & .tokens { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 26em; overflow: auto; line-height: 1.9; }
  & .tokens span { border-radius: 3px; padding: .1em 0; cursor: default; }
  & .tokens .here { outline: 2px solid var(--c5); }
"""

SCRIPT = r"""
const tokens = [...root.querySelectorAll(".tokens span")];
let here = tokens.length - 1;
function point(index, show, focus) {
  tokens[here].tabIndex = -1;
  tokens[here].classList.remove("here");
  here = index;
  tokens[here].tabIndex = 0;
  tokens[here].classList.add("here");
  if (focus) tokens[here].focus();
  show();
}
function walk(show) {
  const box = root.querySelector(".tokens");
  const enter = event => {
    const at = tokens.indexOf(event.target.closest("span"));
    if (at >= 0 && at !== here) point(at, show);
  };
  box.addEventListener("pointerover", enter);
  box.addEventListener("focusin", enter);
  box.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    const to = step ? here + step : {Home: 0, End: tokens.length - 1}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    if (to >= 0 && to < tokens.length) point(to, show, true);
  });
  point(here, show);
}
"""
"""`walk(show)` calls `show` whenever another token is `here`, an index of `tokens`; at first the last one is."""


def tokens_html(words: Sequence[str], attributes: Sequence[str] | None = None) -> str:
    """The text, each token in a span of its own, with attributes for each where there are any (escaped HTML).

    A line break is shown as a mark, and the text goes on in a new line.
    """
    spans = "".join(
        f'<span tabindex="{0 if at == len(words) - 1 else -1}"{attributes[at] if attributes else ""}>'
        f"{text_html(word)}</span>{'<br>' if word.endswith(chr(10)) else ''}"
        for at, word in enumerate(words)
    )
    return f'<div class="tokens" dir="{direction("".join(words))}">{spans}</div>'
