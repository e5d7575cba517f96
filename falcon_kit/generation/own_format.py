"""The chat format of a checkpoint whose tokenizer has a chat template: its template and its end of a turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from falcon_kit.display.errors import printable, require, shown
from falcon_kit.generation.chat import FORMATS, ChatFormat, chat_format, render_prompt
from falcon_kit.generation.control_tokens import control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = [
    {"role": "user", "content": "First question"},
    {"role": "assistant", "content": "First answer"},
    {"role": "user", "content": "Second question"},
]
_WHITE_SPACE = [{**each, "content": f" \n{each['content']}\r\n\n\n\nmore \n"} for each in _PROBE]
"""Messages with white space, which the formats of `FORMATS` change in their own ways."""


def own_format(tokenizer: PreTrainedTokenizerBase, source: str) -> ChatFormat:
    """The format of a tokenizer's own template: one of `FORMATS` if it renders the same prompts, else a new one.

    source: where the template is from. Raises ValueError for several named templates without a default, and for a
    template that is no text.
    """
    named: Any = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        names = ", ".join(sorted(printable(str(each)) for each in named))
        raise ValueError(
            f"{source} has several chat templates and no default: {names}. Give one of them as "
            "chat=fk.ChatFormat('mine', template=...)"
        )
    template = named["default"] if isinstance(named, dict) else named
    require(
        isinstance(template, str),
        f"{source} has the chat template {shown(template)}, which is no text: correct it, or give chat='falcon', "
        "'hub' or 'baize'",
    )
    own = ChatFormat("own", source=source, template=template, stop=end_of_turn(tokenizer, template))
    probes = [_PROBE, *([{"role": "system", "content": text}, *_WHITE_SPACE] for text in ("S s", " S\n\ns "))]
    rendered = [_probe(each, tokenizer, own) for each in probes]
    for each in FORMATS:
        if [_probe(probe, tokenizer, each) for probe in probes] == rendered:
            return each
    return own


def _probe(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, format: ChatFormat) -> str | None:
    """The rendered prompt; None where the template refuses the conversation."""
    try:
        return render_prompt(messages, tokenizer, format)
    except ValueError:
        return None


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, ...]:
    """The stop string of a template: the first control token after an answer, else the text before the next message.

    Empty where the template refuses or changes a short conversation.
    """
    text = _probe(_PROBE, tokenizer, ChatFormat("own", template=template)) or ""
    _, found, rest = text.partition("First answer")
    between, found_next, _ = rest.partition("Second question")
    if not (found and found_next):
        return ()
    tokens = [each for each in control_tokens(tokenizer, template) if each in between]
    stop = min(tokens, key=between.index) if tokens else between.rstrip(" ")
    return (stop,) if stop.strip() else ()


def end_tokens(tokenizer: PreTrainedTokenizerBase, format: ChatFormat) -> list[int]:
    """The ids of the stop strings that are tokens of their own, as "<|im_end|>"."""
    added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}
    return [added[each] for each in format.stop if each in added]


def storable(format: ChatFormat) -> str | dict[str, Any]:
    """What JSON can store of a format: the name of a published one, all fields of another."""
    return format.name if format in FORMATS else asdict(format)


def stored_format(value: str | Mapping[str, Any]) -> ChatFormat:
    """The format that `storable` stored."""
    return chat_format(value) if isinstance(value, str) else ChatFormat(**value)
