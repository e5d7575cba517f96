"""Copy as code: the cell that writes an answer again."""

from falcon_kit.generation.chat import Message
from falcon_kit.playground.records import Answer, Turn


def code(turn: Turn) -> str:
    """Python that makes the models of a turn and has each write the same text again (same machine, same seed)."""
    return "import falcon_kit as fk\n" + "".join(_call(answer) for answer in turn.answers)


def _call(answer: Answer) -> str:
    method = "generate" if isinstance(answer.prompt, str) else "chat"
    # What another answer could have been like is of no use to the text.
    settings = {name: value for name, value in answer.settings.items() if name != "alternatives"}
    arguments = [_literal(answer.prompt), *(f"{name}={value!r}" for name, value in settings.items())]
    lines = "".join(f"    {argument},\n" for argument in arguments)
    return f"\nfalcon = {answer.source}\nanswer = falcon.{method}(\n{lines})\nprint(answer)\n"


def _literal(prompt: str | list[Message]) -> str:
    """A prompt as Python, conversations a message a line."""
    if isinstance(prompt, str):
        return repr(prompt)
    messages = "".join(f"        {message!r},\n" for message in prompt)
    return f"[\n{messages}    ]"
