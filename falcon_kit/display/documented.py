"""The fields of a dataclass in its help: the text that stands below a field in the source is shown there too."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cached_property
from typing import TypeVar

Class = TypeVar("Class", bound=type)


def documented(kind: Class) -> Class:
    """A class decorator: `help(kind)`, and `kind?` in a notebook, show each public field with its text.

    The source is read when someone asks. Where there is none, the help is the docstring alone.
    """
    kind.__doc__ = _Help(kind.__doc__ or "", kind)  # type: ignore[assignment]  # a descriptor, which returns a text
    return kind


class _Help:
    """The docstring of a class, as a descriptor."""

    def __init__(self, text: str, kind: type) -> None:
        self._text, self._kind = text, kind

    def __get__(self, instance: object, owner: type) -> str:
        return self._whole

    @cached_property
    def _whole(self) -> str:
        lines = [line for base in reversed(self._kind.__mro__) for line in _fields(base)]
        return "\n".join([inspect.cleandoc(self._text), *(["", "Fields:", "", *lines] if lines else [])])


def _fields(kind: type) -> Iterator[str]:
    """The lines about the fields that a class declares; none for a class without them or without a source."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, TypeError, SyntaxError):
        return
    statements = body.body if isinstance(body, ast.ClassDef) else []
    for field, below in zip(statements, [*statements[1:], None], strict=True):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if field.target.id.startswith("_"):
            continue
        if isinstance(field.value, ast.Call):
            field.value = None  # dataclasses.field(...), which says nothing to a reader
        yield ast.unparse(field)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            yield textwrap.indent(inspect.cleandoc(below.value.value).rstrip(), "    ")
