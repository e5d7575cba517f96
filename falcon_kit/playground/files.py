"""A playground's history as a JSON file, and back: checked field by field, and nothing in it is ever run.

Tokens are lists rather than objects: names for each of 10,000 numbers would be most of the file.
"""

import ast
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from falcon_kit.display.errors import require
from falcon_kit.generation.chat import ROLES, Message
from falcon_kit.generation.sampling import Sampling
from falcon_kit.playground.records import ENDINGS, MODES, Answer, Span, Token, Turn

Item = TypeVar("Item")
_FORMAT = {"format": "falcon-kit playground", "version": 1}


def save(turns: Sequence[Turn], path: str | Path) -> Path:
    """Writes turns into a JSON file; whoever is interrupted keeps the file of before."""
    require(bool(str(path).strip()), "give the name of a file to save to")
    file = Path(path).expanduser()
    content = {**_FORMAT, "turns": [pack_turn(turn) for turn in turns]}
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)
    return file


def load(path: str | Path) -> list[Turn]:
    """The turns of a saved file. Raises ValueError that says where and what, for a file that `save` would not write."""
    require(bool(str(path).strip()), "give the name of a file to load")
    file = Path(path).expanduser()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a saved playground: it is not JSON ({error})") from error
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{file} holds half a character, which no tokenizer gave: it is damaged") from error
    good = isinstance(content, dict) and all(content.get(name) == value for name, value in _FORMAT.items())
    require(good, f"{file} is not a saved playground: it does not say {json.dumps(_FORMAT)[1:-1]}")
    require(isinstance(content.get("turns"), list), f"{file}: turns is not a list")
    return [unpack_turn(packed, f"{file}, turn {number}") for number, packed in enumerate(content["turns"], 1)]


def pack_span(span: Span) -> list[Any]:
    """[text, [[token, log-probability or null, [[alternative, log-probability], ...]], ...]]."""
    return [span.text, [[each.text, each.logprob, each.alternatives] for each in span.tokens]]


def pack_turn(turn: Turn) -> dict[str, Any]:
    """A turn as plain JSON values."""
    answers = [vars(answer) | {"spans": [pack_span(span) for span in answer.spans]} for answer in turn.answers]
    return vars(turn) | {"answers": answers}


def unpack_turn(packed: Any, where: str) -> Turn:
    """A turn from JSON values. Raises ValueError that says where and what for anything `pack_turn` would not write."""
    read = _Fields(packed, where)
    answers = read.items("answers", _unpack_answer)
    require(bool(answers), f"{where} has no answers: it cannot be shown")
    return Turn(
        id=read.text("id"),
        mode=read.one_of("mode", MODES),
        user=read.text("user"),
        answers=answers,
        before=read.items("before", _unpack_text),
    )


def _unpack_answer(packed: Any, where: str) -> Answer:
    read = _Fields(packed, where)
    prompt = packed.get("prompt")
    settings = read.value("settings", dict, "an object")
    try:
        Sampling(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: settings: {error}") from error
    return Answer(
        model=read.text("model"),
        source=_unpack_source(read.text("source"), where),
        prompt=prompt if isinstance(prompt, str) else list(read.items("prompt", _unpack_message)),
        settings=settings,
        spans=list(read.items("spans", _unpack_span)),
        ending=read.one_of("ending", ENDINGS),
        reason=read.text("reason"),
        prompt_tokens=read.count("prompt_tokens"),
        new_tokens=read.count("new_tokens") or 0,
        first_token_seconds=read.number("first_token_seconds"),
        seconds=read.number("seconds") or 0.0,
        cache_bytes=read.count("cache_bytes"),
    )


def _unpack_source(text: str, where: str) -> str:
    """The Python that makes a model, if it can do nothing else: it comes into a cell that people copy and run."""
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        call = None
    good = isinstance(call, ast.Call) and ast.unparse(call.func) in ("fk.load", "fk.connect")
    if isinstance(call, ast.Call):
        given = [*call.args, *(each.value for each in call.keywords)]
        good = good and all(isinstance(each, ast.Constant) for each in given)
    require(good, f"{where}: source is {text!r:.60}, not fk.load or fk.connect with plain texts and numbers")
    return text


def _unpack_message(packed: Any, where: str) -> Message:
    read = _Fields(packed, where)
    return {"role": read.one_of("role", ROLES), "content": read.text("content")}


def _unpack_span(packed: Any, where: str) -> Span:
    require(_is_list(packed, 2), f"{where} is not [text, tokens]")
    text, tokens = packed
    require(isinstance(tokens, list), f"{where} is not [text, tokens]")
    return Span(_unpack_text(text, where), tuple(_unpack_token(token, where) for token in tokens))


def _unpack_token(packed: Any, where: str) -> Token:
    require(_is_list(packed, 3), f"{where} has a token that is not [text, log-probability, alternatives]")
    text, logprob, alternatives = packed
    good = isinstance(alternatives, list) and all(_is_list(each, 2) for each in alternatives)
    require(good, f"{where} has alternatives that are not pairs of a text and a log-probability")
    pairs = tuple((_unpack_text(word, where), _logprob(value, where)) for word, value in alternatives)
    return Token(_unpack_text(text, where), None if logprob is None else _logprob(logprob, where), pairs)


def _unpack_text(value: Any, where: str) -> str:
    require(isinstance(value, str), f"{where} has {value!r:.60} where a text belongs")
    return str(value)


def _logprob(value: Any, where: str) -> float:
    good = _is_number(value) and value <= 1e-3  # rounding may leave a little above 0
    require(good, f"{where} has {value!r:.60} where a log-probability belongs: a number, 0 at most")
    return float(value)


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _Fields:
    """Reads the fields of a JSON object, each by its kind."""

    def __init__(self, packed: Any, where: str) -> None:
        require(isinstance(packed, Mapping), f"{where} is not an object")
        self._packed, self._where = packed, where

    def value(self, name: str, kind: type, called: str) -> Any:
        value = self._packed.get(name)
        require(isinstance(value, kind), f"{self._where}: {name} is {value!r:.60}, not {called}")
        return value

    def text(self, name: str) -> str:
        return str(self.value(name, str, "a text"))

    def one_of(self, name: str, allowed: tuple[str, ...]) -> Any:
        value = self._packed.get(name)
        require(value in allowed, f"{self._where}: {name} is {value!r:.60}, not one of {', '.join(allowed)}")
        return value

    def number(self, name: str) -> float | None:
        value = self._packed.get(name)
        good = value is None or (_is_number(value) and value >= 0)
        require(good, f"{self._where}: {name} is {value!r:.60}, not a number from 0 on")
        return value

    def count(self, name: str) -> int | None:
        value = self.number(name)
        require(value is None or value == int(value), f"{self._where}: {name} is {value!r}, not a whole number")
        return None if value is None else int(value)

    def items(self, name: str, unpack: Callable[[Any, str], Item]) -> tuple[Item, ...]:
        values = self.value(name, list, "a list")
        return tuple(unpack(value, f"{self._where}, {name} {number}") for number, value in enumerate(values, 1))
