"""A playground's history as a JSON file, and an answer as Python code.

A file is validated completely before it is used, and no code in it is run. Tokens are lists, not objects: the names of
the fields would take most of the file.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from falcon_kit.display.errors import require
from falcon_kit.display.saving import write_text
from falcon_kit.display.tables import counted
from falcon_kit.generation.chat import Message, Role
from falcon_kit.generation.sampling import Sampling
from falcon_kit.playground.records import MOST_LOGPROB, Answer, Ending, Mode, Span, Token, Turn
from falcon_kit.serving.engines import ENGINES

_FORMAT = {"format": "falcon-kit playground", "version": 1}


# The file format


def _check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    try:
        Sampling(**settings)
    except TypeError as error:  # pydantic handles ValueError only
        raise ValueError(str(error)) from error
    return settings


def _check_source(source: str) -> str:
    """Raises ValueError unless the code only makes a model or an endpoint: people copy it into a cell and run it."""
    try:
        _check_call(ast.parse(source, mode="eval").body, "fk.load", "fk.connect", "fk.serve")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise ValueError("not fk.load, fk.connect or fk.serve with constants as arguments") from None
    return source


def _check_call(node: ast.expr, *functions: str) -> None:
    """Raises ValueError unless the code calls one of the functions with literals and chat formats."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func) not in functions:
        raise ValueError("another call")
    for each in [*node.args, *(keyword.value for keyword in node.keywords)]:
        if isinstance(each, ast.Call):
            _check_call(each, "fk.ChatFormat")
        else:
            ast.literal_eval(each)
    if ast.unparse(node.func) == "fk.serve":  # it also takes the path of a program, and arguments for one
        _, engine = node.args
        others = {keyword.arg for keyword in node.keywords} - {"dtype", "context", "chat"}
        if others or ast.literal_eval(engine) not in ENGINES:
            raise ValueError("another program")


_Logprob = Annotated[float, Field(le=MOST_LOGPROB, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Alternatives = tuple[tuple[str, _Logprob], ...]
_Token = Annotated[tuple[str, _Logprob | None, _Alternatives], AfterValidator(Token._make)]
_Span = Annotated[tuple[str, tuple[_Token, ...]], AfterValidator(Span._make)]


class _SavedMessage(BaseModel):
    role: Role
    content: str


class _SavedAnswer(BaseModel):
    model: str
    source: Annotated[str, AfterValidator(_check_source)]
    prompt: str | list[_SavedMessage]
    settings: Annotated[dict[str, Any], AfterValidator(_check_settings)]
    spans: list[_Span]
    ending: Ending
    reason: str
    prompt_tokens: _Count | None
    new_tokens: _Count
    first_token_seconds: _Seconds | None
    seconds: _Seconds
    cache_bytes: _Count | None

    def record(self) -> Answer:
        return Answer(**dict(self) | self.model_dump(include={"prompt"}))


class _SavedTurn(BaseModel):
    id: str
    mode: Mode
    user: str
    answers: Annotated[tuple[_SavedAnswer, ...], Field(min_length=1)]
    before: tuple[str, ...]

    def record(self) -> Turn:
        return Turn(**dict(self) | {"answers": tuple(each.record() for each in self.answers)})


class _SavedHistory(BaseModel):
    format: Literal["falcon-kit playground"]
    version: Literal[1]
    guarded: bool = False  # files of earlier versions do not have it
    turns: list[_SavedTurn]


# Saving and loading


def save(turns: Sequence[Turn], path: str | Path, guarded: bool = False) -> Path:
    """Writes turns, and whether guardrails are on, into a JSON file, completely or not at all; returns its path."""
    require(bool(str(path).strip()), "give the name of a file to save to")
    content = {**_FORMAT, "guarded": guarded, "turns": [pack_turn(turn) for turn in turns]}
    return write_text(path, json.dumps(content, ensure_ascii=False, allow_nan=False))


def check_nothing_is_lost(turns: Sequence[Turn], path: str | Path) -> None:
    """Raises ValueError for a file with something else than these turns, which saving them would replace."""
    file = Path(path).expanduser()
    if not str(path).strip() or not file.is_file():
        return
    try:
        lost = {turn.id for turn in load(file)[0]} - {turn.id for turn in turns}
    except ValueError:
        raise ValueError(f"{file} exists and is not a saved playground: give another name, or remove it") from None
    has = f"{file} has {counted(len(lost), 'turn')} that this history does not have"
    require(not lost, f"{has}: load it first, or give another name")


def load(path: str | Path) -> tuple[list[Turn], bool]:
    """The turns of a saved file, and whether guardrails were on.

    Raises ValueError, with place and reason, for a file that `save` did not write, and FileNotFoundError for none.
    """
    require(bool(str(path).strip()), "give the name of a file to load")
    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"there is no file {file}: give the path that session.save returned")
    try:
        history = _SavedHistory.model_validate_json(file.read_bytes(), strict=True)
    except ValidationError as error:
        problem = max(error.errors(include_url=False), key=lambda each: len(each["loc"]))
        raise ValueError(f"{file} is not a saved playground: {_explain(problem)}") from None
    return [turn.record() for turn in history.turns], history.guarded


def _explain(problem: Mapping[str, Any]) -> str:
    """One problem that pydantic found, as "turns 2, answers 1, mode: Input should be ..., got 7"."""
    place = ""
    for part in problem["loc"]:
        place += f" {part + 1}" if isinstance(part, int) else f", {part}"
    reason = problem["msg"].removeprefix("Value error, ")
    got = "" if problem["type"] in ("json_invalid", "missing") else f", got {problem['input']!r:.60}"
    return f"{place.removeprefix(', ')}: {reason}{got}".removeprefix(": ")


def pack_turn(turn: Turn) -> dict[str, Any]:
    """A turn as plain JSON values."""
    return vars(turn) | {"answers": [vars(answer) for answer in turn.answers]}


# Copy as code


def as_code(turn: Turn) -> str:
    """Python that makes the models of a turn and generates the same texts again, on the same machine."""
    return "import falcon_kit as fk\n" + "".join(_answer_code(answer) for answer in turn.answers)


def _answer_code(answer: Answer) -> str:
    method = "generate" if isinstance(answer.prompt, str) else "chat"
    # `alternatives` does not change the text.
    settings = {name: value for name, value in answer.settings.items() if name != "alternatives"}
    arguments = [_literal(answer.prompt), *(f"{name}={value!r}" for name, value in settings.items())]
    lines = "".join(f"    {argument},\n" for argument in arguments)
    # Guardrails are an object, which code cannot repeat.
    refusal = f"# Guardrails refused this answer: {answer.reason!r}.\n# Give them as guardrails=fk.guardrails(...).\n"
    note = refusal if answer.ending == "refused" else ""
    return f"\nfalcon = {answer.source}\n{note}answer = falcon.{method}(\n{lines})\nprint(answer)\n"


def _literal(prompt: str | list[Message]) -> str:
    """A prompt as Python, with one line for each message of a conversation."""
    if isinstance(prompt, str):
        return repr(prompt)
    messages = "".join(f"        {message!r},\n" for message in prompt)
    return f"[\n{messages}    ]"
