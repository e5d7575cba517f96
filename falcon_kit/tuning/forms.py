"""Rows of several forms become conversations or plain texts; a row that asks for what no form here has is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from falcon_kit.display.errors import shown
from falcon_kit.generation.chat import BAIZE, Message, check_messages
from falcon_kit.tuning.files import BAIZE_MARK

FORMS = (
    '"messages" (chat), "conversations" (ShareGPT), "instruction" and "output" (Alpaca), "input" and "output", '
    '"prompt" and "completion", "question" and "answer", "input" (Baize), "text" or "content"'
)
_TRL = ("prompt", "completion")
_PAIRS = (("instruction", "output"), ("input", "output"), _TRL, ("question", "answer"))
_ANSWERS = ("response", "output", "answer", "completion", "reply", "target", "chosen")
"""What the answer of a pair is called elsewhere, as Dolly's "response"."""
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_SYSTEM = ("system", "system_prompt", "system_message")
_WEIGHTS = ("weight", "train", "training", "loss")
"""Whether an answer is trained on: 0 or 1, as in OpenAI's files, or true or false, as axolotl and ms-swift name it."""
_TOOLS = "the chat formats of Falcon have no tools"
_MEDIA = "Falcon reads text only"
_REASONING = "the chat formats of Falcon have no reasoning beside the answer: put it into the content, or leave it out"
_REFUSED = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "tool_call_id"), _TOOLS),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _MEDIA),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking"), _REASONING),
    "chat_template_kwargs": "the chat formats of Falcon take no arguments",
}
"""Keys of a row or of a message that change what it means, and why no form here can keep that meaning."""
UNANSWERED = "its last message, of the user, has no answer: used without it"
_BESIDE_A_PAIR = {
    "choices": "training has no choices: write them into the question, and the right one as the answer",
    "context": "write it into the question",
}
"""Keys beside a question and its answer that change the question."""


def document(row: Any) -> dict[str, Any]:
    """A row of any form as "messages" and "untrained", or as "text"; ValueError for one that cannot be trained on.

    The first form of `FORMS` that the row has is taken. A key that is None or empty counts as absent. "cut": what of a
    conversation is not used, if anything.
    """
    if isinstance(row, str):
        row = {"text": row}
    if row is None or isinstance(row, int | float):
        raise ValueError(f"it is {shown(row)}, which is no row")
    if not isinstance(row, Mapping):
        row = {"messages": row}
    row = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()}  # numpy's
    _check_keys(row)
    if row.get("weight") not in (None, "", 1, "1"):
        raise ValueError(f"its weight is {row['weight']!r}, but a row has a weight of 1 here or is left out")
    turns = _turns(row)
    if turns is None:
        return {"text": _text(row)}
    if not (row.get("messages") or row.get("conversations")):
        _check_keys(row, _BESIDE_A_PAIR)
    if str(row.get("label")).strip().lower() == "false":  # in a CSV file it is a text
        raise ValueError('its "label" is false: it is an example of a bad answer')
    rest = turns[1:] if _has_system(turns) else turns
    turns = [*_system(row, turns), *_history(row.get("history") or []), *rest]
    messages = _checked(turns)
    cut = {"cut": UNANSWERED} if len(messages) < len(turns) else {}
    return {"messages": messages, "untrained": _untrained(turns[: len(messages)], row.get("untrained")), **cut}


def _check_keys(given: Mapping[str, Any], refused: Mapping[str, str] = _REFUSED) -> None:
    """Raises ValueError for a key whose meaning would be lost."""
    for key, reason in refused.items():
        if given.get(key):
            raise ValueError(f"it has {key!r}: {reason}")


def _text(row: Mapping[str, Any]) -> str:
    text = next((row[key] for key in ("text", "content") if isinstance(row.get(key), str)), None)
    if text is None:
        raise ValueError(_unusable(row))
    if row.get("role") or row.get("parent_id"):
        raise ValueError(
            "it is one message, a node of a tree as in OASST: join the messages from the first to an answer in one row "
            'with "messages"'
        )
    for key in (*_SYSTEM, "history", "untrained"):
        if row.get(key):
            raise ValueError(f"it has {key!r} beside a plain text, where it has no meaning")
    if not text.strip():
        raise ValueError("its text is blank")
    return str(text)


def _unusable(row: Mapping[str, Any]) -> str:
    """Why a row is neither a conversation nor a text: the field that is wrong, or all its keys."""
    given = {key: value for key, value in row.items() if value not in (None, "")}
    for key in ("messages", "conversations"):
        if isinstance(given.get(key), list):
            check_messages(given[key])  # raises: `_turns` takes every list that is not empty
        elif key in given:
            return f"its {key!r} is {shown(given[key])}, but it has to be a list of messages"
    for asked, answered in _PAIRS:
        if asked in given or answered in given:
            return _unusable_pair(given, asked, answered)
    for key in ("text", "content"):
        if key in given:
            return f"its {key!r} is {shown(given[key])}, but it has to be a text"
    if not given:
        return f"it is empty: a row has {FORMS}"
    return f"it has none of {FORMS}, but {', '.join(map(repr, given))}: rename these"


def _unusable_pair(given: Mapping[str, Any], asked: str, answered: str) -> str:
    """Why a question and its answer are no conversation: one of them is missing, or is not a text."""
    if asked not in given:
        return f"it has {answered!r}, but its {asked!r} is missing or empty"
    if answered not in given:
        other = next((key for key in _ANSWERS if key in given), None)
        rename = f": rename {other!r} to {answered!r}" if other else ""
        return f"it has {asked!r}, but its {answered!r} is missing or empty{rename}"
    kinds = "both have to be texts" + (", or both lists of messages" if asked == "prompt" else "")
    return f"its {asked!r} is {shown(given[asked])} and its {answered!r} {shown(given[answered])}: {kinds}"


def _turns(row: Mapping[str, Any]) -> list[Any] | None:
    """The messages of a row, not yet checked; None for a row that is not a conversation."""
    for key, turn in (("messages", _turn), ("conversations", _share_gpt)):
        if isinstance(row.get(key), list | tuple) and row[key]:
            return [turn(each) for each in row[key]]
    asked = [row[key] for key in ("instruction", "input") if isinstance(row.get(key), str)]
    if asked and row.get("output") is not None:
        return _pair("\n\n".join(each for each in asked if each.strip()), row["output"])
    prompt, completion = (row.get(key) for key in _TRL)
    if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple) and completion:
        return [*map(_only_read, prompt), *map(_turn, completion)]
    for asked_as, answered_as in (_TRL, ("question", "answer")):
        if isinstance(row.get(asked_as), str) and row.get(answered_as) is not None:
            return _pair(row[asked_as], row[answered_as])
    if isinstance(row.get("input"), str) and BAIZE_MARK.search(row["input"]):
        return _baize(row["input"])
    return None


def _pair(prompt: str, answer: Any) -> list[Any]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _baize(text: str) -> list[Any]:
    """The messages between Baize's marks, after a system message if another text than Baize's default precedes them."""
    before, *parts = BAIZE_MARK.split(text)
    messages = [
        {"role": "user" if mark == "Human" else "assistant", "content": content.strip()}
        for mark, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if before.strip() not in ("", BAIZE.system):
        messages.insert(0, {"role": "system", "content": before.strip()})
    return messages if messages[-1]["content"] else messages[:-1]  # Baize's files end with an empty one


def _turn(turn: Any) -> Any:
    if isinstance(turn, Mapping):
        _check_keys(turn)
    return turn


def _only_read(turn: Any) -> Any:
    """A message of a prompt: an answer in it is not trained on, as in TRL."""
    is_answer = isinstance(_turn(turn), Mapping) and turn.get("role") == "assistant"
    return {**turn, "weight": 0} if is_answer else turn


def _share_gpt(turn: Any) -> Any:
    if not isinstance(_turn(turn), Mapping):
        return turn
    role = str(turn.get("from") or turn.get("role"))
    content = turn.get("content") if turn.get("value") is None else turn["value"]
    return {**turn, "role": _ROLES.get(role, role), "content": content}


def _history(given: Any) -> list[Any]:
    """The earlier turns of Alpaca's "history": pairs of a question and an answer, or messages."""
    turns: list[Any] = []
    for each in given if isinstance(given, list | tuple) else [None]:
        if isinstance(each, list | tuple) and len(each) == 2:
            turns += _pair(*each)
        elif isinstance(each, Mapping):
            turns.append(_turn(each))
        else:
            raise ValueError('its "history" is not a list of pairs [question, answer]')
    return turns


def _has_system(turns: list[Any]) -> bool:
    return bool(turns) and isinstance(turns[0], Mapping) and turns[0].get("role") == "system"


def _system(row: Mapping[str, Any], turns: list[Any]) -> list[Any]:
    """The system message of the turns or of the row's own key; ValueError for two that differ."""
    own = turns[:1] if _has_system(turns) else []
    added = [{"role": "system", "content": row[key]} for key in _SYSTEM if row.get(key)]
    found = [*own, *added]
    if len({str(each.get("content")).strip() for each in found}) > 1:
        raise ValueError("it has two system messages that differ")
    return found[:1]


def _checked(turns: list[Any]) -> list[Message]:
    """The conversation up to the last answer; ValueError for one without an answer."""
    checked = check_messages(turns)
    if checked[-1]["role"] == "user":
        checked = checked[:-1]
    if not any(each["role"] == "assistant" for each in checked):
        raise ValueError("it has no message of the assistant, so there is nothing to train on")
    return checked


def _untrained(turns: list[Any], listed: Any) -> list[int]:
    """The indices of the answers that are only read: their own weight is 0, or a row of `Documents` lists them."""
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    untrained = {index for index in answers if isinstance(listed, list) and index in listed}
    for index, turn in enumerate(turns):
        for key in _WEIGHTS:
            if (weight := turn.get(key)) is None:
                continue
            if not isinstance(weight, int | float) or weight not in (0, 1):
                raise ValueError(f"message {index + 1} has {key}={weight!r}, but only 0 and 1 have a meaning here")
            if weight == 1 and index not in answers:
                raise ValueError(f"message {index + 1} has {key}={weight!r}, but only answers are trained on")
            if weight == 0 and index in answers:
                untrained.add(index)
    if len(untrained) == len(answers):
        raise ValueError("every answer has a weight of 0, so there is nothing to train on")
    return sorted(untrained)
