"""One response while it is received: events become pieces, the text is cut at stop strings."""

import asyncio
import math
import os
import sys
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from falcon_kit.display.errors import Portable, require
from falcon_kit.generation.text import Alternative, FinishReason, Generation, Piece, PieceStream, Stats, Text, overlap
from falcon_kit.generation.waiting import next_item, result, wait
from falcon_kit.serving.background import background_loop
from falcon_kit.serving.connection import Connection
from falcon_kit.serving.failures import token_count, within
from falcon_kit.serving.protocol import END_SECONDS, Delta, Server, retry_stream

Work = Callable[[Callable[[Any], None]], Coroutine[Any, Any, Generation]]
"""A coroutine function that calls its argument with each piece."""
_CLOSE_SECONDS = 5.0
_MOST_PER_TOKEN = 256  # events and characters; the longest token of the published vocabulary has 80 characters


class _WithText(Portable, Exception):
    """An error with the text that was received."""

    def __init__(self, message: str, generation: Generation) -> None:
        super().__init__(message)
        self.generation, self.generations = generation, (generation,)


class IncompleteAnswer(_WithText, ConnectionError):
    """A response broke before its end; `.generation` has the text so far, with finish_reason "broken"."""


class TextBeyondContext(_WithText, ValueError):
    """Prompt and answer have more tokens than the model's context; `.generation` has the text all the same."""


class Answer:
    """One generated text while it is received."""

    def __init__(
        self, prompt: str, stop: tuple[str, ...], strip: bool, alternatives: int = 0, limit: int | None = None
    ) -> None:
        """alternatives: how many there are at each step, as in `Sampling`. limit: the most tokens."""
        self.prompt, self.stop, self._text, self._wanted = prompt, stop, Text(stop, strip), alternatives
        self._limit, self._received = limit, 0
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.alternatives: list[tuple[Alternative, ...]] = []
        self.finish: FinishReason | None = None
        self.server_ended = False
        """Whether the server itself has ended the text, and soon ends the response too."""
        self.prompt_tokens, self._new_tokens, self._events = 0, 0, 0
        self.begin()

    def begin(self) -> None:
        """Measures the time from here."""
        self.start = self.first = self.last = time.perf_counter()

    @property
    def text(self) -> str:
        return str(self._text)

    @property
    def begun(self) -> bool:
        """Whether an event has arrived."""
        return self._received > 0

    @property
    def too_long(self) -> bool:
        """Whether more than `limit` tokens have arrived: by their ids, or by far more characters than they have."""
        return self._limit is not None and (
            len(self.tokens) > self._limit or self._received > _MOST_PER_TOKEN * (self._limit + 1)
        )

    def push(self, delta: Delta) -> Piece | None:
        """Adds an event; returns a piece if the event has a token, or if more of the text can be shown."""
        self.count(delta)
        self._received += 1 + len(delta.text)
        alternatives = delta.alternatives[: self._wanted]
        require(
            not (self._wanted and delta.text) or bool(alternatives or self.tokens),
            f"the endpoint sends no alternatives, although alternatives={self._wanted} asks for them: leave it out",
        )
        if delta.text or delta.token_id is not None:
            self._events += 1
            self.last = time.perf_counter()
            if self._events == 1:
                self.first = self.last
        if delta.token_id is not None:
            self.tokens.append(delta.token_id)
            self.logprobs.append(delta.logprob)
            self.alternatives.append(alternatives)
        self._text.add(delta.text)
        self.server_ended = delta.finish is not None
        self.finish = "stop" if self._text.stopped else None if self.too_long else delta.finish
        text = self._text.show(self.finish is not None)
        return Piece(text, delta.token_id, delta.logprob, alternatives) if text or delta.token_id is not None else None

    def add_rest(self, characters: str) -> None:
        """Adds what no piece has shown to a text that has not ended: it broke off, or was cancelled."""
        if not self.finish:
            self._text.add(characters)

    def count(self, delta: Delta) -> None:
        """Stores the endpoint's token counts."""
        self.prompt_tokens = token_count(delta.prompt_tokens) or self.prompt_tokens
        self._new_tokens = token_count(delta.new_tokens) or self._new_tokens

    def generation(self) -> Generation:
        """The text so far; its finish_reason is "cancelled" unless the text has ended."""
        return Generation(
            prompt=self.prompt,
            text=self.text,
            tokens=tuple(self.tokens),
            logprobs=None if math.isnan(next(iter(self.logprobs), math.nan)) else tuple(self.logprobs),
            finish_reason=self.finish or "cancelled",
            stats=Stats(
                rows=1,
                prompt_tokens=self.prompt_tokens,
                new_tokens=self._new_tokens or len(self.tokens) or self._events,
                first_token_seconds=self.first - self.start,
                seconds=self.last - self.start,
            ),
            alternatives=tuple(self.alternatives) if self._wanted else None,
        )


@asynccontextmanager
async def turn(turns: asyncio.Semaphore | None) -> AsyncIterator[None]:
    """Waits for a turn. After an error the turn is given to no other: the caller cancels those that wait."""
    if turns:
        await turns.acquire()
    yield
    if turns:
        turns.release()


async def request_answer(
    server: Server,
    body: dict[str, Any],
    answer: Answer,
    context: int | None,
    emit: Callable[[Piece], None] = lambda _: None,
) -> Generation:
    """Sends the request and fills `answer`, with a call of `emit` for each piece. Cancellation closes the connection.

    Raises `IncompleteAnswer` if the response breaks after its first event, and `TextBeyondContext` for a text that is
    longer than `context` tokens.
    """
    address = server.facts.address
    # TGI takes four stop strings, llama.cpp is given none: at one that it was not sent, a server goes on.
    sent = {*body.get("parameters", body).get("stop", ())}
    try:
        async with (
            within(server.connection.deadline, address, "deadline"),
            aclosing(retry_stream(lambda: server.deltas(body), server.connection)) as deltas,  # type: ignore[type-var]
        ):
            await _receive(deltas, server, answer, emit)
            if answer.server_ended or sent >= {*answer.stop}:
                await _read_usage(deltas, answer)
    except (ConnectionError, TimeoutError) as error:
        if not answer.begun:
            raise
        if not answer.finish:
            raise _incomplete(answer, f"the answer broke off after {len(answer.text)} characters: {error}") from None
    if not answer.begun:
        raise ConnectionError(f"{address} does not use the protocol of {server.facts.server}: check the URL")
    if not answer.finish:
        raise _incomplete(answer, f"{address} gave no finish reason after {len(answer.text)} characters")
    generation = answer.generation()
    used = generation.stats.prompt_tokens + generation.stats.new_tokens
    if context and used > context:
        raise TextBeyondContext(
            f"prompt and answer have {used} tokens, and text beyond the model's context of {context} is meaningless: "
            "shorten the prompt, or lower max_new_tokens",
            generation,
        )
    return generation


async def _receive(deltas: AsyncIterator[Delta], server: Server, answer: Answer, emit: Callable[[Piece], None]) -> None:
    """Fills `answer` until it ends. Raises ConnectionError if it does not end where it should."""
    scrubber = _Scrubber(server.connection)
    try:
        async for delta in deltas:
            if piece := answer.push(scrubber(delta)):
                emit(piece)
            if answer.finish:
                return
            if answer.too_long:
                raise ConnectionError(f"{server.facts.address} sends more new tokens than were asked for")
    finally:
        answer.add_rest(scrubber.waiting)


class _Scrubber:
    """Removes the key from the events of a response. What may be the beginning of a key waits for the next event."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self.waiting = connection, ""

    def __call__(self, delta: Delta) -> Delta:
        """The event without the key; the last one has all that waited."""
        scrub = self._connection.scrub
        text = scrub(self.waiting + delta.text)
        ready = len(text) - (0 if delta.finish else overlap(text, self._connection.secrets))
        self.waiting = text[ready:]
        alternatives = tuple(replace(each, text=scrub(each.text)) for each in delta.alternatives)
        return replace(delta, text=text[:ready], alternatives=alternatives)


def _incomplete(answer: Answer, message: str) -> IncompleteAnswer:
    answer.finish = "broken"
    return IncompleteAnswer(message, answer.generation())


async def _read_usage(deltas: AsyncIterator[Delta], answer: Answer) -> None:
    """Reads the token counts that an endpoint may send after the last piece; no error there undoes the answer."""
    with suppress(Exception):
        async with asyncio.timeout(END_SECONDS):
            async for delta in deltas:
                answer.count(delta)


def with_shared_stats(generations: list[Generation]) -> list[Generation]:
    """The generations, each with the statistics of the whole call, as for a local batch."""
    if len(generations) == 1:
        return generations
    each = [generation.stats for generation in generations]
    stats = replace(
        each[0],
        rows=len(each),
        prompt_tokens=sum(one.prompt_tokens for one in each),
        new_tokens=sum(one.new_tokens for one in each),
        first_token_seconds=min(one.first_token_seconds for one in each),
        seconds=max(one.seconds for one in each),
    )
    return [replace(generation, stats=stats) for generation in generations]


class RemoteStream(PieceStream):
    """Iterator over the pieces of one answer.

    `close()`, the end of a `with` block, garbage collection and Ctrl-C close the connection.

    `close` may be called from any thread, also while another thread waits for the next piece.
    """

    def __init__(self, answer: Answer, work: Work) -> None:
        self._answer = answer
        self._queue: SimpleQueue[Piece | BaseException | None] = SimpleQueue()
        self._ended = False
        self._error: BaseException | None = None
        start = asyncio.run_coroutine_threadsafe(_start_task(work, self._queue.put), background_loop())
        try:
            self._task = result(start)
        except BaseException:  # Ctrl-C; the request begins all the same, and then ends
            start.add_done_callback(lambda started: _cancel(started.result()))
            raise
        self._process = os.getpid()
        weakref.finalize(self, _cancel, self._task)

    def __next__(self) -> Piece:
        if self._ended:
            raise StopIteration
        try:
            item = next_item(self._queue)
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if isinstance(item, Piece):
            return item
        self._ended, self._error = True, self._error or item
        self._queue.put(None)  # another thread may wait for the next piece
        raise item or StopIteration

    def __repr__(self) -> str:
        return f"RemoteStream({'ended' if self._ended else 'iterate over it'})"

    def close(self) -> None:
        """Closes the connection and waits until it is closed, for five seconds at most.

        Waiting can be in vain, because generators that are garbage call this too: in any thread, also the connections'
        own or one with a lock that they need, in a fork, which has no thread for them, and while Python ends.
        """
        loop = self._task.get_loop()
        if loop is asyncio._get_running_loop():
            self._task.cancel()
        elif self._process == os.getpid() and not sys.is_finalizing():
            wait(asyncio.run_coroutine_threadsafe(_stop(self._task), loop), _CLOSE_SECONDS)
        self._ended = True

    def wait(self) -> Generation:
        """The whole text and its statistics, once the stream has ended. Raises what iterating over it raises."""
        for _ in self:
            pass
        return self.generation

    @property
    def generation(self) -> Generation:
        """The whole text and its statistics, after the stream has ended, broken or been closed."""
        if not (self._ended or self._task.done()):  # the last piece is received before its task is done
            raise RuntimeError("the stream has not ended yet: iterate over it to the end, or close() it")
        if self._error and not isinstance(self._error, _WithText):
            raise self._error
        return self._answer.generation()


async def _start_task(work: Work, put: Callable[[Any], None]) -> "asyncio.Task[None]":
    """Starts `work`; `put` is called with each piece, then with the error if there is one, then with None."""

    async def run() -> None:
        try:
            await work(put)
        except Exception as error:  # noqa: BLE001  # raised again by RemoteStream.__next__
            put(error)
        finally:
            put(None)

    return asyncio.create_task(run())


def _cancel(task: "asyncio.Task[None]") -> None:
    task.get_loop().call_soon_threadsafe(task.cancel)


async def _stop(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait({task})
