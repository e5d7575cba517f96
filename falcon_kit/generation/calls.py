"""What `generate` returns for which prompt, for type checkers and editors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, cast, overload

from falcon_kit.generation.guarding import Guard
from falcon_kit.generation.prompts import Prompt
from falcon_kit.generation.text import Generation

Generated = Generation | list[Generation]


class Generate(Protocol):
    """The method `generate`: one text gives a `Generation`, several prompts or sequences a list of them.

    A str is a sequence of str too: the first that fits counts.
    """

    @overload
    def __call__(
        self,
        prompt: str | Sequence[int],
        *,
        guardrails: Guard | None = None,
        num_return_sequences: Literal[1] = 1,
        **settings: Any,
    ) -> Generation: ...

    @overload
    def __call__(
        self, prompt: Sequence[str], *, guardrails: Guard | None = None, **settings: Any
    ) -> list[Generation]: ...

    @overload
    def __call__(self, prompt: Prompt, *, guardrails: Guard | None = None, **settings: Any) -> Any: ...


def typed(method: Callable[..., Generated]) -> Generate:
    """A decorator: the method itself, with the types of `Generate`."""
    return cast(Generate, method)
