"""A stream: the model runs in a thread, one token ahead of its reader."""

import threading
import weakref
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Protocol

import torch

from falcon_kit.generation.text import Generation, Piece


class Writing(Protocol):
    """A text to be written, wherever the model is."""

    cancelled: threading.Event
    """Set by whoever does not want it any more."""

    def __call__(self, emit: Callable[[Piece], None] | None = None) -> list[Generation]:
        """Writes it; `emit` gets each piece as it comes."""


class Stream(Iterator[Piece]):
    """Iterator over the pieces of one text. Closing it, dropping it or Ctrl-C stops the model at the next token."""

    def __init__(self, run: Writing) -> None:
        self._run, self._reading = run, threading.RLock()
        self._finished: list[Generation] = []
        self._pieces = _pieces(run, self._finished)
        # With the last reference, and before the interpreter shuts down: a thread inside torch must not outlive it.
        weakref.finalize(self, self._pieces.close)

    def __next__(self) -> Piece:
        with self._reading:
            return next(self._pieces)

    def __repr__(self) -> str:
        return f"Stream({'ended' if self._finished else 'iterate over it'})"

    def close(self) -> None:
        """Stops the model and waits until it has stopped; from any thread, also while another waits for a piece."""
        self._run.cancelled.set()  # so that whoever reads now does not wait for longer than a token
        with self._reading:
            self._pieces.close()

    @property
    def generation(self) -> Generation:
        """The whole text and its statistics, once the stream has ended or was closed."""
        if not self._finished:
            raise RuntimeError("the stream has not ended yet: iterate over it to the end, or close() it")
        return self._finished[0]


def _pieces(run: Writing, finished: list[Generation]) -> Any:
    """Runs the model in a thread and hands its pieces over; whoever stops listening stops the model."""
    arrived: SimpleQueue[Piece | BaseException | None] = SimpleQueue()
    ahead = threading.Semaphore(1)  # the model is one token ahead of its reader at most, and waits for one who paused

    def emit(piece: Piece) -> None:
        arrived.put(piece)
        ahead.acquire()

    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def work() -> None:
        try:
            if device is not None:  # the current one is a matter of each thread
                torch.cuda.set_device(device)
            finished.extend(run(emit))
            arrived.put(None)
        except BaseException as error:  # noqa: BLE001  # raised again where the pieces are read
            arrived.put(error)

    worker = threading.Thread(target=work, name="falcon-stream", daemon=True)
    worker.start()
    try:
        while (item := arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
            ahead.release()
    finally:
        run.cancelled.set()
        ahead.release()
        worker.join()
