"""Chat formats of the Falcon family: how a conversation becomes one prompt, and which stop strings end an answer.

Three formats are in use, because the instruct models were published without one. Each has a chat template, which as
`tokenizer.chat_template` serves all tools that call `apply_chat_template`. The templates mark the assistant's messages
with `{% generation %}`, so that training can compute the loss on them alone.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.documented import documented
from falcon_kit.display.errors import check_encodable, require, shown, unknown_name
from falcon_kit.generation.control_tokens import Marks, control_tokens, encode_marked
from falcon_kit.generation.rendering import plain_text, transformers_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn of a conversation."""

    role: Role
    """The author: "system" (first message only), "user" or "assistant"."""
    content: str
    """The text; the templates strip white space around it."""


@documented
@dataclass(frozen=True, repr=False)
class ChatFormat:
    """A chat template with its prefixes and stop strings; `fk.load` and `fk.connect` take one as `chat`.

    `ChatFormat("mine", template=..., stop=("<|im_end|>",))` is enough for a format of your own.
    """

    name: str
    """The name that `chat_format` takes; "own" for a checkpoint's own template."""
    user_prefix: str = ""
    """The text before each message of the user."""
    assistant_prefix: str = ""
    """The last text of a prompt. No space follows: the first token of an answer begins with one."""
    stop: tuple[str, ...] = ()
    """Stop strings: each ends an answer or begins the next speaker's message, which is not part of the answer."""
    source: str = ""
    """Where the format is published."""
    template: str = field(kw_only=True)
    """The chat template (Jinja, as `tokenizer.chat_template` takes it)."""
    system: str | None = None
    """The system message that was published with the format; it is not sent by default."""

    def __post_init__(self) -> None:
        stop: Any = self.stop  # a caller may give one text or a list
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        fields = (self.name, self.user_prefix, self.assistant_prefix, *self.stop, self.source, self.template)
        for each in fields:
            require(isinstance(each, str), f"a chat format is made of texts; {shown(self.name)} has {shown(each)}")

    def __repr__(self) -> str:
        prefixes = f", {self.user_prefix!r} / {self.assistant_prefix!r}" if self.assistant_prefix else ""
        return f"ChatFormat({self.name!r}{prefixes})"

    @property
    def marks_answers(self) -> bool:
        """Whether the template marks the assistant's messages with `{% generation %}`, as training needs."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None


def _published(template: str, **fields: Any) -> ChatFormat:
    """A format of formats.json; `template` names the file of its chat template, which gets the prefixes."""
    text = (_TEMPLATES / template).read_text(encoding="utf-8").removesuffix("\n")
    filled = Template(text).substitute(user=fields["user_prefix"], assistant=fields["assistant_prefix"])
    return ChatFormat(template=filled, **fields)


_TEMPLATES = Path(__file__).with_name("templates")
_STORED = json.loads((_TEMPLATES / "formats.json").read_text(encoding="utf-8"))
FALCON, HUB, BAIZE = FORMATS = tuple(_published(**each) for each in _STORED)


def default_format(spec: FalconSpec | None) -> ChatFormat:
    """`HUB` for the published models except falcon-180B, `FALCON` for all others."""
    return HUB if spec and spec.published and not spec.name.startswith("falcon-180B") else FALCON


def chat_format(name: str | ChatFormat) -> ChatFormat:
    """The format "falcon", "hub" or "baize"; a ChatFormat is returned as it is.

    Raises LookupError for another name; the error lists the nearest.
    """
    if isinstance(name, ChatFormat):
        return name
    for each in FORMATS:
        if isinstance(name, str) and each.name == name.strip().lower():
            return each
    raise LookupError(unknown_name("chat format", name, [each.name for each in FORMATS]))


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The conversation, reduced to roles and contents.

    Raises ValueError for an empty conversation, a role other than system, user and assistant, a system message that is
    not the first, messages that do not alternate between user and assistant, and blank content. The error numbers
    messages from 1.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(
            'A conversation is a list of messages, such as [{"role": "user", "content": "Hello"}]; '
            f"got a {type(messages).__name__}."
        )
    if not messages:
        raise ValueError('A conversation needs at least one message, such as [{"role": "user", "content": "Hello"}].')
    checked = [_check_message(number, message) for number, message in enumerate(messages, 1)]
    turns = [(number, each["role"]) for number, each in enumerate(checked, 1)]
    turns = turns[1:] if turns[0][1] == "system" else turns
    if not turns:
        raise ValueError("The conversation has only a system message: add a message of the user.")
    for turn, (number, role) in enumerate(turns):
        expected = "assistant" if turn % 2 else "user"
        if role == "system":
            raise ValueError(f"Message {number} has the role 'system', which only the first message may have.")
        if role != expected:
            raise ValueError(
                f"Message {number} has the role {role!r}, but it must have {expected!r}: "
                "user and assistant alternate, and the user begins."
            )
    return checked


def latest_turns(messages: Sequence[Message], fits: Callable[[Sequence[Message]], bool]) -> Sequence[Message]:
    """The system message and as many of the last turns as fit, at least one; of messages that were checked."""
    system = [each for each in messages[:1] if each["role"] == "system"]
    beginnings = range(len(system), len(messages), 2)  # the messages of the user
    first = bisect_left(beginnings, True, key=lambda beginning: fits([*system, *messages[beginning:]]))
    return [*system, *messages[beginnings[min(first, len(beginnings) - 1)] :]]


def _check_message(number: int, message: Any) -> Message:
    """Role and content of one message, checked without the others."""
    if isinstance(message, list | tuple) and message and isinstance(message[0], Mapping):
        raise ValueError(f"Message {number} is a list of messages: chat takes one conversation, so call it for each.")
    if not isinstance(message, Mapping):
        raise ValueError(
            f'Message {number} is {message!r}, but it must be like {{"role": "user", "content": "Hello"}}.'
        )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        other = message and not {"role", "content"} & message.keys()
        keys = f" Its keys are {', '.join(map(repr, message))}: call them role and content." if other else ""
        raise ValueError(f"Message {number} has the role {role!r}; allowed are {', '.join(ROLES)}.{keys}")
    if not isinstance(content, str) or not content.strip():
        instead = ": give its .text" if hasattr(content, "text") else ""
        raise ValueError(
            f"Message {number} has the content {content!r}, but it must be a text that is not blank{instead}."
        )
    check_encodable(f"Message {number}", content)
    return {"role": role, "content": content}


def render(
    messages: Sequence[Mapping[str, Any]],
    format: ChatFormat,
    add_generation_prompt: bool = True,
    eos_token: str = "<|endoftext|>",
) -> str:
    """The conversation as one text, rendered by jinja2's sandbox without torch and transformers.

    With `add_generation_prompt` it ends with the assistant's prefix, so that the model answers. Without it, `eos_token`
    follows the last message if that is the assistant's; a template that wants other special tokens gets none. Raises
    ValueError as `check_messages` does, if the template refuses the conversation, and with `add_generation_prompt` if
    the last message is the assistant's.
    """
    checked = _check_turn(messages, add_generation_prompt)
    variables = {"add_generation_prompt": add_generation_prompt, "eos_token": eos_token}
    return plain_text(plain_template(format.template), format.name, messages=checked, **variables)


def plain_template(template: str) -> str:
    """A chat template that plain jinja2 parses and that renders the same text.

    Only transformers parses `{% generation %}`. It becomes `{% if true %}`, which keeps the white space control ("-").
    """
    started = re.sub(r"(\{%-?)\s*generation\s*(-?%\})", r"\1 if true \2", template)
    return re.sub(r"(\{%-?)\s*endgeneration\s*(-?%\})", r"\1 endif \2", started)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Saves a tokenizer with `plain_template`, for servers that use plain jinja2 or minijinja; `load` marks it again.

    The tokenizer itself keeps its template, which another thread may read meanwhile.
    """
    saved = copy(tokenizer)
    if isinstance(tokenizer.chat_template, str):
        saved.chat_template = plain_template(tokenizer.chat_template)
    saved.save_pretrained(folder)


def encode(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    format: ChatFormat,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of the conversation: those of `apply_chat_template` with the format's template.

    The template's own special tokens become tokens; those in messages, as "<|endoftext|>", are encoded as text.
    Raises ValueError as `check_messages` does, if the template refuses the conversation, and if an end-of-sequence
    token is needed but the tokenizer has none.
    """
    checked = _check_turn(messages, add_generation_prompt)
    marks = _marks(checked, tokenizer, format)
    text, _ = _render_marked(checked, marks, tokenizer, format, add_generation_prompt)
    return encode_marked(text, marks, tokenizer)[0]


def encode_answers(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    format: ChatFormat,
    untrained: Sequence[int] = (),
) -> tuple[list[int], list[bool]]:
    """The token ids of a whole conversation as from `encode`, and for each whether the template marks it as an answer.

    untrained: indices of assistant messages whose tokens are not marked.
    Raises ValueError as `encode` does, and for a template that marks nothing.
    """
    if not format.marks_answers:
        raise ValueError(
            f"the chat template {format.name!r} does not mark the assistant's messages with {{% generation %}}, so it "
            "is not clear what to train on: load the model with chat='falcon', 'hub' or 'baize', or with "
            "chat=fk.ChatFormat('mine', template=...), a template that marks them"
        )
    checked = _check_turn(messages, add_generation_prompt=False)
    marks = _marks(checked, tokenizer, format)
    text, spans = _render_marked(checked, marks, tokenizer, format, add_generation_prompt=False, answers=True)
    if untrained:
        answers = [index for index, each in enumerate(checked) if each["role"] == "assistant"]
        spans = [span for index, span in zip(answers, spans, strict=True) if index not in untrained]
    ids, offsets = encode_marked(text, marks, tokenizer)
    return ids, [any(end > first and start < last for first, last in spans) for start, end in offsets]


def answer_texts(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, format: ChatFormat
) -> list[str]:
    """The assistant's messages as the template writes them, which may change them: "hub" drops blank lines.

    Without the white space around them and what ends them. Raises ValueError as `encode` does.
    """
    checked = _check_turn(messages, add_generation_prompt=False)
    text, spans = _render_marked(checked, Marks((), ()), tokenizer, format, add_generation_prompt=False, answers=True)
    given = [each["content"].strip() for each in checked if each["role"] == "assistant"]
    written = [text[first:last].removesuffix(tokenizer.eos_token or "").strip() for first, last in spans]
    if len(given) != len(written):
        return given  # the template marks other messages too, so it is not clear which is which
    return [content if content in each else each for content, each in zip(given, written, strict=True)]


def render_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    format: ChatFormat,
    add_generation_prompt: bool = True,
) -> str:
    """The text of `encode`, with the tokenizer's special tokens."""
    checked = _check_turn(messages, add_generation_prompt)
    return _render_marked(checked, Marks((), ()), tokenizer, format, add_generation_prompt)[0]


def _check_turn(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> list[Message]:
    """The checked conversation; ValueError if the assistant has to answer itself."""
    checked = check_messages(messages)
    if add_generation_prompt and checked[-1]["role"] == "assistant":
        raise ValueError(
            "The last message is the assistant's, so there is nothing to answer: add a message of the user."
        )
    return checked


def _marks(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, format: ChatFormat) -> Marks:
    return Marks(control_tokens(tokenizer, format.template), (each["content"] for each in messages))


def _render_marked(
    messages: Sequence[Message],
    marks: Marks,
    tokenizer: PreTrainedTokenizerBase,
    format: ChatFormat,
    add_generation_prompt: bool,
    answers: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as `apply_chat_template` renders it, with the contents marked, and the spans of the answers."""
    closes = not add_generation_prompt and messages[-1]["role"] == "assistant"
    if closes and "eos_token" in format.template and tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-sequence token to end the conversation: set tokenizer.eos_token.")
    special_tokens: Any = tokenizer.special_tokens_map
    marked = [{**each, "content": marks.mark(each["content"])} for each in messages]
    return transformers_text(
        format.template, format.name, marked, answers, add_generation_prompt=add_generation_prompt, **special_tokens
    )
