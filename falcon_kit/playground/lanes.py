"""A model that a playground talks to: read in a thread of its own, so that nobody else ever waits for it."""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from falcon_kit.generation.chat import Message, encode
from falcon_kit.generation.text import Piece
from falcon_kit.playground.records import Token

Prompt = str | list[Message]
_starting = threading.Lock()  # tokenizers do not take two threads that read and change them at once


@dataclass
class Lane:
    """A model under a name, and the settings in which it differs from the others."""

    name: str
    """What it is called in the playground."""
    falcon: Any
    """A `Falcon`, or an endpoint with the same `stream`."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Sampling` that it is always given."""
    semaphore: threading.Lock = field(default_factory=threading.Lock)
    """Lets one text through at a time. Lanes of one compiled model share it, because that has one cache."""

    @property
    def local(self) -> bool:
        """Whether the model lies in this process, with its tokenizer."""
        return hasattr(self.falcon, "tokenizer")

    @property
    def context(self) -> int | None:
        """Tokens that prompt and answer may take together; None where an endpoint does not tell."""
        context = self.falcon.spec.context if self.local else getattr(self.falcon, "context", None)
        return None if context is None else int(context)

    def cache_bytes(self, tokens: int) -> int | None:
        """Bytes of keys and values for so many tokens, by the plan that the model was loaded with."""
        return int(tokens * self.falcon.plan.kv_bytes // self.falcon.plan.context) if self.local else None

    def count(self, prompt: Prompt) -> int | None:
        """Tokens of a prompt; None where the tokenizer is out of reach."""
        if not self.local:
            return None
        with _starting:
            if isinstance(prompt, str):
                return len(self.falcon.tokenizer(prompt, verbose=False)["input_ids"])
            return len(encode(prompt, self.falcon.tokenizer, self.falcon.chat_format))

    def source(self) -> str:
        """Python that makes the model."""
        return load_source(self.falcon) if self.local else connect_source(self.falcon)

    def read(self, prompt: Prompt, settings: Mapping[str, Any], arrived: "SimpleQueue[Any]", number: int) -> "Reading":
        """Streams in a thread: pieces come as (number, piece), then (number, the `Generation` or an error)."""
        reading = Reading(self, prompt, settings, lambda item: arrived.put((number, item)))
        reading.start()
        return reading

    def token(self, piece: Piece) -> Token:
        """A piece as it is remembered."""
        others = tuple((each.text, round(each.logprob, 4)) for each in piece.alternatives)
        text = next((each.text for each in piece.alternatives if each.token_id == piece.token_id), None)
        if text is None and self.local and piece.token_id is not None:
            text = self.falcon.tokenizer.decode([piece.token_id])
        logprob = piece.logprob
        known = logprob is not None and not math.isnan(logprob)
        return Token(piece.text if text is None else text, round(logprob, 4) if known else None, others)


class Reading(threading.Thread):
    """Reads one stream; `end` returns at once, while a model in the middle of a token takes its time."""

    def __init__(self, lane: Lane, prompt: Prompt, settings: Mapping[str, Any], put: Callable[[Any], None]) -> None:
        super().__init__(name="falcon-playground-reader", daemon=True)
        self._lane, self._prompt, self._settings, self._put = lane, prompt, settings, put
        self._ended = threading.Event()
        self._stream: Any = None

    def run(self) -> None:
        try:
            with self._lane.semaphore:
                if not self._ended.is_set():
                    self._put(self._read())
        except BaseException as error:  # noqa: BLE001  # shown where the answer would stand
            self._put(error)

    def _read(self) -> Any:
        """Hands on each piece, and returns the `Generation`."""
        with _starting:
            self._stream = self._lane.falcon.stream(self._prompt, **self._settings)
        try:
            for piece in self._stream:
                if self._ended.is_set():
                    break
                self._put(piece)
        finally:
            self._stream.close()
        return self._stream.generation

    def end(self) -> None:
        """Asks the model to stop; closes the connection to an endpoint, which may be silent for long."""
        again = self._ended.is_set() or not self.is_alive()
        self._ended.set()
        if self._stream is not None and not (again or self._lane.local):
            threading.Thread(target=self._stream.close, name="falcon-playground-close", daemon=True).start()


def load_source(falcon: Any) -> str:
    """The call of `fk.load` that a model came from, as far as it decides what the model writes."""
    arguments = [repr(falcon.name)]
    if falcon.dtype_reason == "as asked":
        arguments.append(f"dtype={falcon.plan.dtype!r}")
    arguments.append(f"chat={falcon.chat_format.name!r}")
    return f"fk.load({', '.join(arguments)})"


def connect_source(endpoint: Any) -> str:
    """The call of `fk.connect` that an endpoint came from."""
    arguments = [repr(getattr(endpoint, "address", "...")), f"model={model_name(endpoint)!r}"]
    if getattr(endpoint, "own_format", False):
        arguments.append(f"chat={endpoint.chat_format.name!r}")
    return f"fk.connect({', '.join(arguments)})"


def model_name(falcon: Any) -> str:
    """What a Falcon or an endpoint is called."""
    named = getattr(falcon, "model", None)
    return (
        named if isinstance(named, str) else str(getattr(getattr(falcon, "spec", None), "name", type(falcon).__name__))
    )
