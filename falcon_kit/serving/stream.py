"""An answer as it arrives: pieces out of deltas, cut at stop strings, marked when it breaks off."""

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, suppress
from functools import cache
from queue import SimpleQueue
from typing import Any, TypeVar

from falcon_kit.generation.text import FinishReason, Generation, Piece, Stats, Text
from falcon_kit.serving.protocol import Delta, Server, retry_stream

T = TypeVar("T")
_LINGER = 1.0  # seconds to wait, after a stop string, for the endpoint's own count of tokens


class IncompleteAnswer(ConnectionError):
    """An answer broke off in the middle; `.generation` has the text so far, its finish_reason is "broken"."""

    def __init__(self, message: str, generation: Generation) -> None:
        super().__init__(message)
        self.generation = generation


class Answer:
    """One text as it grows: deltas in, pieces out."""

    def __init__(self, prompt: str, stop: tuple[str, ...], strip: bool) -> None:
        self.prompt, self._text = prompt, Text(stop, strip)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish: FinishReason | None = None
        self.prompt_tokens, self._counted, self._pieces = 0, 0, 0
        self.start = self.first = self.last = time.perf_counter()

    @property
    def text(self) -> str:
        """The text so far."""
        return str(self._text)

    @property
    def cut(self) -> bool:
        """Whether a stop string has come."""
        return self._text.stopped

    def push(self, delta: Delta) -> Piece | None:
        """Takes what came; a piece if there is a token or a character to hand on."""
        self.count(delta)
        if delta.text or delta.token_id is not None:
            self._clock()
        if delta.token_id is not None:
            self.tokens.append(delta.token_id)
            self.logprobs.append(delta.logprob)
        self._text.add(delta.text)
        self.finish = "stop" if self.cut else delta.finish
        text = self._text.show(self.finish is not None)
        return Piece(text, delta.token_id, delta.logprob) if text or delta.token_id is not None else None

    def count(self, delta: Delta) -> None:
        """Takes the endpoint's count of tokens."""
        self.prompt_tokens = delta.prompt_tokens or self.prompt_tokens
        self._counted = delta.new_tokens or self._counted

    def generation(self) -> Generation:
        """The text so far; "cancelled" unless it has ended."""
        return Generation(
            prompt=self.prompt,
            text=self.text,
            tokens=tuple(self.tokens),
            logprobs=tuple(self.logprobs) if self.tokens and self.logprobs[0] == self.logprobs[0] else None,
            finish_reason=self.finish or "cancelled",
            stats=Stats(
                rows=1,
                prompt_tokens=self.prompt_tokens,
                new_tokens=self._counted or len(self.tokens) or self._pieces,
                first_token_seconds=self.first - self.start,
                seconds=self.last - self.start,
            ),
        )

    def _clock(self) -> None:
        self._pieces += 1
        self.last = time.perf_counter()
        if self._pieces == 1:
            self.first = self.last


async def write(
    server: Server,
    body: dict[str, Any],
    answer: Answer,
    retries: int,
    context: int | None,
    emit: Callable[[Piece], None] = lambda _: None,
) -> Generation:
    """Lets the endpoint write `answer`. Leaving, by whatever cause, closes the connection."""
    begun = False
    try:
        async with aclosing(retry_stream(lambda: server.deltas(body), retries)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                begun = True
                if piece := answer.push(delta):
                    emit(piece)
                if answer.finish:
                    break
            if server.stops or not answer.cut:
                await _count(deltas, answer)
    except (ConnectionError, TimeoutError) as error:
        if not begun:
            raise
        answer.finish = "broken"
        raise IncompleteAnswer(
            f"the answer broke off after {len(answer.text)} characters: {error}", answer.generation()
        ) from None
    if not begun:
        raise ConnectionError(
            f"{server.facts.address} answered, but not in the protocol of {server.facts.server}: check the URL"
        )
    if not answer.finish:
        answer.finish = "broken"
        raise IncompleteAnswer(
            f"{server.facts.address} ended the answer without saying why, after {len(answer.text)} characters",
            answer.generation(),
        )
    generation = answer.generation()
    if context and (used := generation.stats.prompt_tokens + generation.stats.new_tokens) > context:
        raise ValueError(
            f"the endpoint went on to {used} tokens, past the model's context of {context}, where text is gibberish: "
            "shorten the prompt, or lower max_new_tokens"
        )
    return generation


async def _count(deltas: AsyncIterator[Delta], answer: Answer) -> None:
    """After the last piece, an endpoint may have a last word, its count of tokens; it is not waited for long."""
    with suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(_LINGER):
            async for delta in deltas:
                answer.count(delta)


@cache
def background() -> asyncio.AbstractEventLoop:
    """An event loop in a thread of its own, for all endpoints: that of a notebook is busy while a cell runs."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="falcon-remote", daemon=True).start()
    return loop


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` in the background loop and waits for it; Ctrl-C cancels it."""
    future = asyncio.run_coroutine_threadsafe(work, background())
    try:
        return future.result()
    finally:
        future.cancel()


class RemoteStream(Iterator[Piece]):
    """Iterator over the pieces of one answer. Closing it, dropping it or Ctrl-C closes the connection.

    `close` may be called from any thread, also while another waits for the next piece.
    """

    def __init__(
        self, answer: Answer, work: Callable[[Callable[[Any], None]], Coroutine[Any, Any, Generation]]
    ) -> None:
        self._answer = answer
        self._arrived: SimpleQueue[Piece | BaseException | None] = SimpleQueue()
        self._ended = False
        self._error: BaseException | None = None
        self._task = wait_for(_spawn(work, self._arrived.put))
        weakref.finalize(self, _cancel, self._task)

    def __next__(self) -> Piece:
        if self._ended:
            raise StopIteration
        try:
            item = self._arrived.get()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if isinstance(item, Piece):
            return item
        self._ended, self._error = True, item
        raise item or StopIteration

    def __repr__(self) -> str:
        return f"RemoteStream({'ended' if self._ended else 'iterate over it'})"

    def close(self) -> None:
        """Closes the connection and waits until it is closed."""
        wait_for(_stop(self._task))
        self._ended = True

    @property
    def generation(self) -> Generation:
        """The whole text and its statistics, once the stream has ended, broken off or was closed."""
        if not self._task.done():
            raise RuntimeError("the stream has not ended yet: iterate over it to the end, or close() it")
        if self._error and not isinstance(self._error, IncompleteAnswer):
            raise self._error
        return self._answer.generation()


async def _spawn(
    work: Callable[[Callable[[Any], None]], Coroutine[Any, Any, Generation]], put: Callable[[Any], None]
) -> "asyncio.Task[None]":
    async def run() -> None:
        try:
            await work(put)
        except Exception as error:  # noqa: BLE001  # raised again where the pieces are read
            put(error)
        finally:
            put(None)

    return asyncio.create_task(run())


def _cancel(task: "asyncio.Task[None]") -> None:
    background().call_soon_threadsafe(task.cancel)


async def _stop(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait({task})
