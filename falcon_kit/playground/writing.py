"""A turn as it is being written: pieces of all its models come in, answers grow, and anybody may stop it."""

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from falcon_kit.generation.text import Piece
from falcon_kit.playground.lanes import Lane, Reading
from falcon_kit.playground.records import Answer, Span, Token, Turn

Guard = Callable[[str], str | None]
"""Looks at a text, and gives a reason to refuse it, or None."""
_SENTENCE_ENDS = frozenset(".!?:;\n。！？…")
_GRACE = 0.2  # seconds that a model which was stopped has to hand over its statistics


class Writing:
    """One turn that its models are writing. Call it to write; `stop` comes from another thread."""

    def __init__(
        self, turn: Turn, lanes: Sequence[Lane], guard: Guard | None, changed: Callable[[], None] = lambda: None
    ) -> None:
        self.turn = turn
        self._lanes, self._changed = lanes, changed
        self._writers = [Writer(lane, answer, guard) for lane, answer in zip(lanes, turn.answers, strict=True)]
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends all answers; what there is of them stays."""
        self._stopped.set()
        self._arrived.put(None)

    def __call__(self) -> None:
        """Writes until all answers have ended, or somebody stops them; Ctrl-C stops them too."""
        readings: list[Reading] = []
        try:
            for number, (lane, answer) in enumerate(zip(self._lanes, self.turn.answers, strict=True)):
                readings.append(lane.read(answer.prompt, answer.settings, self._arrived, number))
            while not self._stopped.is_set() and self._open():
                self._take(self._arrived.get())
                for writer, reading in zip(self._writers, readings, strict=True):
                    if writer.answer.ending is not None:  # refused, say: its model need not go on
                        reading.end()
        finally:
            for reading in readings:
                reading.end()
            self._drain()

    def _open(self) -> list["Writer"]:
        return [writer for writer in self._writers if writer.answer.ending is None]

    def _take(self, item: tuple[int, Any] | None) -> None:
        """A piece or the end of one model's stream; None only wakes up."""
        if item is None or self._writers[item[0]].answer.ending is not None:
            return
        writer, came = self._writers[item[0]], item[1]
        try:
            writer.push(came) if hasattr(came, "logprob") else writer.end(came)
        except Exception as error:  # noqa: BLE001  # of the guardrails, say: shown where the answer would stand
            writer.fail(error)
        self._changed()

    def _drain(self) -> None:
        """Waits a moment for the statistics of what was stopped, and closes what is still open then."""
        until = time.perf_counter() + _GRACE
        while self._open():
            try:
                self._take(self._arrived.get(timeout=max(until - time.perf_counter(), 0.0)))
            except queue.Empty:
                for writer in self._open():
                    self._take((self._writers.index(writer), None))


class Writer:
    """Writes one answer down, piece by piece; what the guardrails have not seen yet is not in it."""

    def __init__(self, lane: Lane, answer: Answer, guard: Guard | None) -> None:
        self.lane, self.answer, self.guard = lane, answer, guard
        self._start = time.perf_counter()
        self._unseen: list[Token] = []  # of a character, or a possible stop string, that is not complete yet
        self._unchecked: list[Span] = []

    def push(self, piece: Piece) -> None:
        """Takes the next piece."""
        self.answer.new_tokens += 1
        self.answer.seconds = time.perf_counter() - self._start
        if self.answer.first_token_seconds is None:
            self.answer.first_token_seconds = self.answer.seconds
        self._unseen.append(self.lane.token(piece))
        if piece.text:
            self._unchecked.append(Span(piece.text, tuple(self._unseen)))
            self._unseen = []
            if self.guard is None or not _SENTENCE_ENDS.isdisjoint(piece.text):
                self._release()

    def end(self, outcome: Any) -> None:
        """Takes what the stream ended with: a `Generation`, an error, or None for a model that was told to stop."""
        failed = isinstance(outcome, BaseException)
        whole = getattr(outcome, "generation", None) if failed else outcome  # an answer that broke off has one too
        if whole is not None:
            self._statistics(whole.stats)
            self._rest(whole.text)
        self._release()
        if self.answer.ending is None:
            self.answer.ending = "error" if failed else getattr(outcome, "finish_reason", "cancelled")
            self.answer.reason = f"{type(outcome).__name__}: {outcome}" if failed else ""

    def fail(self, error: Exception) -> None:
        """Ends the answer with an error other than the model's: of the guardrails, say. What is unchecked stays out."""
        self._unchecked.clear()
        self.answer.ending, self.answer.reason = "error", f"{type(error).__name__}: {error}"

    def _rest(self, text: str) -> None:
        """Takes what was held back as the beginning of a stop string when the model was told to stop."""
        seen = self.answer.text + "".join(span.text for span in self._unchecked)
        if text.startswith(seen) and text != seen:
            self._unchecked.append(Span(text[len(seen) :], tuple(self._unseen)))

    def _release(self) -> None:
        """Shows what has been held back, if the guardrails have nothing against the text so far."""
        held, self._unchecked = self._unchecked, []
        if not held or self.answer.ending == "refused":
            return
        text = self.answer.text + "".join(span.text for span in held)
        reason = self.guard(text) if self.guard else None
        if reason is None:
            self.answer.spans.extend(held)
        else:
            self.answer.ending, self.answer.reason = "refused", reason

    def _statistics(self, stats: Any) -> None:
        """The model's own figures, where it has them."""
        for name in ("prompt_tokens", "new_tokens", "first_token_seconds", "seconds", "cache_bytes"):
            value = getattr(stats, name, None)
            if value and not math.isnan(value):  # an endpoint that did not count says 0
                setattr(self.answer, name, value)
