"""A turn while its answers are generated: pieces of all models are added to their answers, until the end or a stop."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from falcon_kit.generation.text import Piece
from falcon_kit.generation.waiting import next_item
from falcon_kit.guardrails import Blocked
from falcon_kit.guardrails.guard import Guardrails
from falcon_kit.guardrails.stream import StreamCheck
from falcon_kit.playground.columns import Column, Reader
from falcon_kit.playground.records import Answer, Span, Token, Turn

_STATISTICS_TIMEOUT = 0.2  # seconds to wait for the statistics of a stopped model


class TurnWriter:
    """Fills the answers of one turn. Call it to generate; `stop` may be called from another thread."""

    def __init__(
        self, turn: Turn, columns: Sequence[Column], guard: Guardrails | None, changed: Callable[[], None]
    ) -> None:
        """changed: called after each event."""
        self.turn = turn
        self._changed = changed
        self._writers = [AnswerWriter(each, answer, guard) for each, answer in zip(columns, turn.answers, strict=True)]
        self._events: queue.SimpleQueue[tuple[AnswerWriter, Any] | None] = queue.SimpleQueue()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends all answers; their texts so far stay."""
        self._stopped.set()
        self._events.put(None)  # wakes the thread that waits for an event

    def __call__(self) -> None:
        """Returns when all answers have ended or `stop` is called; Ctrl-C stops them too."""
        readers: list[Reader] = []
        try:
            readers.extend(map(self._read, self._writers))
            while not self._stopped.is_set() and self._open():
                self._take(next_item(self._events))
                for writer, reader in zip(self._writers, readers, strict=True):
                    if writer.answer.ending is not None:  # for example refused by the guardrails
                        reader.end()
        finally:
            for reader in readers:
                reader.end()
            self._drain()

    def cancel(self) -> None:
        """Ends each answer that has not ended, for example after a second Ctrl-C, without waiting for its model."""
        for writer in self._open():
            writer.answer.ending = "cancelled"

    def _open(self) -> list["AnswerWriter"]:
        return [writer for writer in self._writers if writer.answer.ending is None]

    def _read(self, writer: "AnswerWriter") -> Reader:
        column, answer = writer.column, writer.answer
        reader = Reader(column, answer.prompt, answer.settings, lambda event: self._events.put((writer, event)))
        reader.start()
        return reader

    def _take(self, item: "tuple[AnswerWriter, Any] | None") -> None:
        """Handles a piece or the end of a stream."""
        if item is None or item[0].answer.ending is not None:
            return
        writer, event = item
        try:
            writer.push(event) if isinstance(event, Piece) else writer.end(event)
        except Exception as error:  # noqa: BLE001  # of a tokenizer, for example; shown in place of the answer
            writer.answer.ending, writer.answer.reason = "error", f"{type(error).__name__}: {error}"
        self._changed()

    def _drain(self) -> None:
        """Waits for the statistics of stopped models, up to a limit, and then ends their answers without."""
        until = time.perf_counter() + _STATISTICS_TIMEOUT
        while self._open():
            try:
                self._take(self._events.get(timeout=max(until - time.perf_counter(), 0.0)))
            except queue.Empty:
                for writer in self._open():
                    self._take((writer, None))


class AnswerWriter:
    """Fills one answer piece by piece; text that the guardrails have not checked yet is kept back."""

    def __init__(self, column: Column, answer: Answer, guard: Guardrails | None) -> None:
        self.column, self.answer = column, answer
        self._check: StreamCheck[Span] = guard.begin() if guard else StreamCheck((), "output")
        self._start = time.perf_counter()
        self._pending: list[Token] = []  # of an incomplete character, or of text that may become a stop string
        self._received = ""  # more than the answer has, if the guardrails hold text back

    def push(self, piece: Piece) -> None:
        self.answer.new_tokens += 1
        self.answer.seconds = time.perf_counter() - self._start
        if self.answer.first_token_seconds is None:
            self.answer.first_token_seconds = self.answer.seconds
        self._pending.append(self.column.token(piece))
        if piece.text:
            self._push(piece.text)

    def end(self, outcome: Any) -> None:
        """Ends the answer with a `Generation`, an error, or None for a stopped model without statistics."""
        failed = isinstance(outcome, BaseException)
        generation = next(iter(getattr(outcome, "generations", ())), None) if failed else outcome  # the text so far
        if generation is not None:
            self._set_statistics(generation.stats)
            if generation.text.startswith(self._received) and generation.text != self._received:
                self._push(generation.text[len(self._received) :])  # what might have become a stop string
        self._show(self._check.end)
        if self.answer.ending is None:
            self.answer.ending = "error" if failed else getattr(outcome, "finish_reason", "cancelled")
            self.answer.reason = f"{type(outcome).__name__}: {outcome}" if failed else ""

    def _push(self, text: str) -> None:
        """Passes text with its tokens to the guardrails."""
        span, self._pending = Span(text, tuple(self._pending)), []
        self._received += text
        self._show(lambda: self._check.push(span))

    def _show(self, passed: Callable[[], list[Span]]) -> None:
        """Adds the spans that passed to the answer, which ends if the guardrails refuse one."""
        if self.answer.ending == "refused":
            return
        try:
            self.answer.spans.extend(passed())
        except Blocked as blocked:
            self.answer.ending, self.answer.reason = "refused", blocked.verdict.reasons

    def _set_statistics(self, stats: Any) -> None:
        """Replaces the measured statistics by the model's own, if it has them."""
        for name in ("prompt_tokens", "new_tokens", "first_token_seconds", "seconds", "cache_bytes"):
            value = getattr(stats, name, None)
            if value is not None and value > 0:  # 0: the endpoint does not report it
                setattr(self.answer, name, value)
