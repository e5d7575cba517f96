"""A chat template becomes text: by plain jinja2, or by transformers, which knows where the answers are."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from falcon_kit.display.errors import printable
from falcon_kit.display.reading import UNEXPECTED

if TYPE_CHECKING:
    import jinja2

_RENDERING = threading.Lock()
"""Held while transformers renders: all threads share a compiled template, which finds the answers of one text at a
time."""


def plain_text(template: str, name: str, **variables: Any) -> str:
    """The text of a template that plain jinja2 parses, in jinja2's sandbox, without torch and transformers.

    name: the template in the error. Raises ValueError where the template refuses the conversation.
    """
    with _refusals(name):
        return _compiled(template).render(tools=None, documents=None, **variables)  # as transformers gives them


def transformers_text(
    template: str, name: str, messages: Any, find_answers: bool, **variables: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text as `apply_chat_template` renders it, and with `find_answers` the spans that `{% generation %}` marks.

    Arguments and errors otherwise as for `plain_text`.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    with _refusals(name), _RENDERING:
        rendered: Any = render_jinja_template(
            conversations=[messages], chat_template=template, return_assistant_tokens_mask=find_answers, **variables
        )
    (text,), spans = rendered
    return str(text), [tuple(each) for each in spans[0]] if find_answers else []


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Raises an error of a template as a ValueError with its name."""
    from jinja2 import TemplateError

    try:
        yield
    except TemplateError as error:
        raise ValueError(f"The chat template {name!r} refuses this conversation: {printable(str(error))}") from error
    except (*UNEXPECTED, ArithmeticError, SyntaxError) as error:  # a template is a program
        cause = printable(f"{type(error).__name__}: {error}")
        raise ValueError(f"The chat template {name!r} fails on this conversation ({cause})") from error


@lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    """The compiled template, with the jinja2 settings, functions and filters of transformers' chat templates."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    sandbox.globals["raise_exception"] = _raise
    sandbox.globals["strftime_now"] = lambda format: datetime.now().strftime(format)  # local time, as in transformers
    sandbox.filters["tojson"] = _to_json  # jinja2's own escapes HTML
    return sandbox.from_string(template)


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
