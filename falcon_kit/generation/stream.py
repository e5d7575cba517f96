"""A stream: the model generates in a thread, at most one token ahead of the reader."""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Protocol

import torch

from falcon_kit.generation.decoding import SamplingRNG
from falcon_kit.generation.text import Generation, Piece


class GenerationTask(Protocol):
    """A function that generates one text, in this process or in others."""

    cancelled: threading.Event
    """Set to stop the generation after the current token."""

    def __call__(self, emit: Callable[[Piece], None] | None = None) -> list[Generation]:
        """Generates the text; `emit` is called with each piece."""

    def nothing(self) -> Generation:
        """The generation of a text that was cancelled before its first token."""


class Stream(Iterator[Piece]):
    """Iterator over the pieces of one text. Closing it, deleting it or Ctrl-C stops the model after the next token."""

    def __init__(self, task: GenerationTask) -> None:
        self._task, self._read_lock = task, threading.RLock()
        self._finished: list[Generation] = []
        self._pieces = _run_in_thread(task, self._finished)
        # It also runs before the interpreter shuts down: a thread inside torch must not outlive the interpreter.
        weakref.finalize(self, self._pieces.close)

    def __next__(self) -> Piece:
        if SamplingRNG.is_sampling():
            raise RuntimeError(
                "a stream generates in another thread, which would wait for ever for the text whose logits processor "
                "reads it: call generate there"
            )
        with self._read_lock:
            return next(self._pieces)

    def __repr__(self) -> str:
        return f"Stream({'ended' if self._finished else 'iterate over it'})"

    def close(self) -> None:
        """Stops the model and waits until it has stopped. Any thread may call it, also while another one reads."""
        self._task.cancelled.set()  # before the lock: a thread that reads releases it after at most one token
        with self._read_lock:
            begun = inspect.getgeneratorstate(self._pieces) != inspect.GEN_CREATED
            self._pieces.close()
            if not begun:
                self._finished.append(self._task.nothing())

    @property
    def generation(self) -> Generation:
        """The whole text and its statistics. Raises RuntimeError before the stream has ended or was closed."""
        if not self._finished:
            raise RuntimeError("the stream has not ended yet: iterate over it to the end, or close() it")
        return self._finished[0]


def _run_in_thread(task: GenerationTask, finished: list[Generation]) -> Any:
    """A generator of the task's pieces; the task runs in a thread. Closing the generator cancels the task."""
    results: SimpleQueue[Piece | BaseException | None] = SimpleQueue()
    may_continue = threading.Semaphore(1)  # the model waits here once it is one token ahead of the reader

    def emit(piece: Piece) -> None:
        results.put(piece)
        may_continue.acquire()

    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def work() -> None:
        try:
            if device is not None:  # the current device is a setting of each thread
                torch.cuda.set_device(device)
            finished.extend(task(emit))
            results.put(None)
        except BaseException as error:  # noqa: BLE001  # raised again in the reader's thread
            finished.extend(getattr(error, "generations", ()))  # the text so far, where memory ran out
            results.put(error)

    worker = threading.Thread(target=work, name="falcon-stream", daemon=True)
    worker.start()
    try:
        while (item := results.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
            may_continue.release()
    finally:
        task.cancelled.set()
        may_continue.release()
        worker.join()
