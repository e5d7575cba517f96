"""The models of a playground, a column each; a thread reads each stream, so that no model blocks another."""

import copy
import math
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from falcon_kit.catalogue.spec import context_limit
from falcon_kit.display.errors import require, shown, to_save
from falcon_kit.display.reading import UNEXPECTED
from falcon_kit.generation.chat import ChatFormat, Message, encode
from falcon_kit.generation.control_tokens import encode_prompt
from falcon_kit.generation.own_format import storable
from falcon_kit.generation.prompts import least_tokens
from falcon_kit.generation.sampling import SAMPLING_FIELDS, Sampling, unknown_setting
from falcon_kit.generation.text import Piece
from falcon_kit.playground.records import MOST_LOGPROB, Token

Prompt = str | list[Message]


@dataclass
class Column:
    """A model with the name and the settings under which the playground shows its answers."""

    name: str
    """The heading of the column."""
    falcon: Any
    """A `Falcon`, or an endpoint with the same `stream`."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Sampling` that replace the session's."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held during generation. Columns with one compiled model share it, because that has a single KV cache."""

    _counted: tuple[Prompt, int | None] | None = field(default=None, init=False, repr=False)

    @property
    def local(self) -> bool:
        """Whether the model is in this process, with its tokenizer."""
        return hasattr(self.falcon, "tokenizer")

    @property
    def context(self) -> int | None:
        """The limit for tokens of prompt and answer together; None if an endpoint does not report it."""
        model: Any = getattr(self.falcon, "model", None)  # a name for an endpoint
        if hasattr(model, "config"):
            return context_limit(model.config)  # as it is now; `spec` is what was loaded
        context = self.falcon.spec.context if self.local else getattr(self.falcon, "context", None)
        return None if context is None else int(context)

    @property
    def checkpoint_settings(self) -> dict[str, Any]:
        """The settings of the panel that the checkpoint's generation_config.json contains."""
        values = getattr(self.falcon, "generation_settings", {})
        names = ("max_new_tokens", "temperature", "top_k", "top_p")
        return {name: values[name] for name in names if name in values}

    def in_force(self, settings: Sampling) -> Sampling:
        """The session's settings with the overrides, without what these exclude, and "off" written out where the
        checkpoint's value would count.

        Raises ValueError for settings that exclude an override.
        """
        excluded = ["temperature", "top_k", "top_p"] if self.overrides.get("do_sample") is False else []
        if self.overrides.get("max_length") is not None:
            excluded.append("max_new_tokens")
        settings = replace(settings, **{**dict.fromkeys(excluded), **self.overrides})
        if settings.do_sample is False:
            return settings
        unset = [name for name in self.checkpoint_settings if getattr(settings, name) is None]
        off: dict[str, Any] = {name: 1.0 for name in ("temperature", "top_p") if name in unset}
        return replace(settings, **off, **({"top_k": self.falcon.spec.vocabulary} if "top_k" in unset else {}))

    def changed(self, settings: Sampling) -> dict[str, Any]:
        """The session's settings that are not the default, after the overrides."""
        settings = self.in_force(settings)
        chosen = asdict(settings) | {"stop": list(settings.stop_strings)}
        changed = {name: value for name, value in chosen.items() if value not in (getattr(Sampling(), name), [])}
        accepted = self.local or (hasattr(self.falcon, "accepts") and self.falcon.accepts(**changed))
        if not accepted:  # perhaps without alternatives; a setting that an endpoint has no field for is refused by it
            changed.pop("alternatives", None)
        return changed

    def cache_bytes(self, tokens: int) -> int | None:
        """Bytes of the KV cache for so many tokens, by the model's memory plan; None for an endpoint."""
        return int(tokens * self.falcon.plan.kv_bytes // self.falcon.plan.context) if self.local else None

    def count(self, prompt: Prompt) -> int | None:
        """Tokens of a prompt; None for an endpoint, whose tokenizer is not available, and for a conversation that the
        chat template refuses: its answer has the error.

        A lower bound for a prompt that is certainly longer than the context. The last count is stored: the playground
        asks for it with every state that it sends.
        """
        if not self.local:
            return None
        counted = self._counted
        if counted is None or counted[0] != prompt:
            count = None
            with suppress(*UNEXPECTED):
                count = self._count(prompt)
            self._counted = counted = copy.deepcopy(prompt), count
        return counted[1]

    def _count(self, prompt: Prompt) -> int:
        tokenizer = self.falcon.tokenizer
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        least = sum(least_tokens(text, tokenizer) for text in texts)
        if least > (self.context or math.inf):
            return least
        if isinstance(prompt, str):
            return len(encode_prompt(prompt, tokenizer))
        return len(encode(prompt, tokenizer, self.falcon.chat_format))

    def source(self) -> str:
        return load_source(self.falcon) if self.local else connect_source(self.falcon)

    def token(self, piece: Piece) -> Token:
        likely = ((each.text, _stored(each.logprob)) for each in piece.alternatives)
        alternatives = tuple((text, logprob) for text, logprob in likely if logprob is not None)
        return Token(self._token_text(piece), _stored(piece.logprob), alternatives)

    def _token_text(self, piece: Piece) -> str:
        """The token of a piece by itself; the text of the piece where the token is not known."""
        if piece.token_id is None:
            return piece.text
        for each in piece.alternatives:
            if each.token_id == piece.token_id:
                return each.text
        return str(self.falcon.tokenizer.decode([piece.token_id])) if self.local else piece.text


def _stored(logprob: float) -> float | None:
    """A log-probability as it is saved; None for nan, and for what is none, of any model with a `stream`."""
    return round(logprob, 4) if -math.inf < logprob <= MOST_LOGPROB else None


class Reader(threading.Thread):
    """Passes each piece of one stream to `put`, and at the end the `Generation` or an error.

    `end` returns at once; a local model stops after the token that it is computing.
    """

    def __init__(self, column: Column, prompt: Prompt, settings: Mapping[str, Any], put: Callable[[Any], None]) -> None:
        super().__init__(name="falcon-playground-reader", daemon=True)
        self._column, self._prompt, self._settings, self._put = column, prompt, settings, put
        self._ended = threading.Event()
        self._stream: Any = None

    def run(self) -> None:
        try:
            with self._column.lock:
                if not self._ended.is_set():
                    self._put(self._read())
        except BaseException as error:  # noqa: BLE001  # shown in place of the answer
            self._put(error)

    def _read(self) -> Any:
        self._stream = self._column.falcon.stream(self._prompt, **self._settings)
        try:
            # `end` found no stream to close if it was called before there was one.
            for piece in () if self._ended.is_set() else self._stream:
                if self._ended.is_set():
                    break
                self._put(piece)
        finally:
            self._stream.close()
        return self._stream.generation

    def end(self) -> None:
        """Stops the model; closes the connection to an endpoint, which may send nothing for a long time."""
        already_ended = self._ended.is_set() or not self.is_alive()
        self._ended.set()
        if self._stream is not None and not (already_ended or self._column.local):
            threading.Thread(target=self._stream.close, name="falcon-playground-close", daemon=True).start()


def load_source(falcon: Any) -> str:
    """The call of `fk.load` that made a model, with the arguments that affect the generated text."""
    arguments = [repr(falcon.name)]
    if falcon.dtype_reason == "as asked":
        arguments.append(f"dtype={falcon.plan.dtype!r}")
    if falcon.chat_format.name != "own":
        arguments.append(f"chat={_format_source(falcon.chat_format)}")
    return f"fk.load({', '.join(arguments)})"


def connect_source(endpoint: Any) -> str:
    """The call of `fk.connect`, or of `fk.serve`, that made an endpoint."""
    function, addresses = "fk.connect", getattr(endpoint, "addresses", ["..."])
    arguments = [repr(addresses if len(addresses) > 1 else addresses[0]), f"model={model_name(endpoint)!r}"]
    if api := getattr(endpoint, "api", None):
        arguments.append(f"api={api!r}")
    if engine := getattr(endpoint, "engine", None):  # another server has another port and key
        function, arguments = "fk.serve", [repr(endpoint.name), repr(engine), f"dtype={endpoint.plan.dtype!r}"]
        arguments.append(f"context={endpoint.context}")
    if getattr(endpoint, "own_format", False):
        arguments.append(f"chat={_format_source(endpoint.chat_format)}")
    return f"{function}({', '.join(arguments)})"


def _format_source(format: ChatFormat) -> str:
    """Python code for the argument `chat`."""
    stored = storable(format)
    return repr(stored) if isinstance(stored, str) else f"fk.ChatFormat(**{stored!r})"


def model_name(falcon: Any) -> str:
    """The name of a Falcon or an endpoint."""
    name = getattr(falcon, "model", None)  # a name for an endpoint, a module for a Falcon
    return name if isinstance(name, str) else str(getattr(getattr(falcon, "spec", None), "name", type(falcon).__name__))


def columns_of(falcon: Any, compare: Any) -> tuple[Column, ...]:
    """One column, or two that differ in the model or in settings."""
    got = shown(falcon) if isinstance(falcon, str) else f"{type(falcon).__name__}{to_save(falcon)}"
    require(hasattr(falcon, "stream"), f"a playground needs what fk.load or fk.connect returns, got {got}")
    if compare is None:
        return (Column(model_name(falcon), falcon),)
    if isinstance(compare, Mapping):
        check_names(compare)
        Sampling(**compare)
        changes = ", ".join(f"{name}={value}" for name, value in compare.items())
        first = Column(model_name(falcon), falcon)
        second = Column(f"{first.name}, {changes}", falcon, dict(compare))
        if getattr(falcon, "decoding", None):  # compiled
            second.lock = first.lock
        return first, second
    require(hasattr(compare, "stream"), f"compare takes another model, or a dict of settings, got {compare!r:.60}")
    names = [model_name(falcon), model_name(compare)]
    names = [f"{name} ({letter})" for name, letter in zip(names, "AB", strict=True)] if len({*names}) == 1 else names
    return Column(names[0], falcon), Column(names[1], compare)


def check_names(settings: Mapping[str, Any]) -> None:
    """Raises TypeError for a setting that does not exist, with what to give."""
    names = list(SAMPLING_FIELDS)
    for name in settings:
        if name not in names:
            raise TypeError(unknown_setting(name, names))
