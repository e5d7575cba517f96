"""A stream: the model computes a token when its reader asks for it, in the reader's thread."""

import inspect
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import AbstractContextManager
from typing import Any

from falcon_kit.generation.text import Generation, Piece, PieceStream


class GenerationTask(ABC):
    """A call that generates texts, in this process or in others."""

    cancelled: threading.Event
    """Set to stop the generation after the current token."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.generations: list[Generation] = []
        """The texts, once `pieces` has ended; also the texts so far after Ctrl-C or an error."""

    @abstractmethod
    def pieces(self) -> Generator[Piece]:
        """Generates the texts while it is iterated over; yields the pieces of a stream."""

    @abstractmethod
    def nothing(self) -> Generation:
        """The generation of a text that was cancelled before its first token."""

    def run(self) -> list[Generation]:
        """Generates the texts to their ends."""
        for _ in self.pieces():
            pass
        return self.generations


class Stream(PieceStream):
    """Iterator over the pieces of one text.

    `close()`, the end of a `with` block, deleting it and Ctrl-C stop the model after the next token.
    """

    def __init__(self, task: GenerationTask) -> None:
        self._task, self._pieces, self._read_lock = task, task.pieces(), threading.RLock()
        weakref.finalize(self, _stop, task, self._pieces, self._read_lock)

    def __next__(self) -> Piece:
        with self._read_lock:
            return next(self._pieces)

    def __repr__(self) -> str:
        return f"Stream({'ended' if self._task.generations else 'iterate over it'})"

    def close(self) -> None:
        """Stops the model and waits until it has stopped. Any thread may call it, also while another one reads."""
        _stop(self._task, self._pieces, self._read_lock)
        self._task.generations = self._task.generations or [self._task.nothing()]

    @property
    def generation(self) -> Generation:
        """The whole text and its statistics. Raises RuntimeError before the stream has ended or was closed."""
        if not self._task.generations:
            raise RuntimeError("the stream has not ended yet: iterate over it to the end, or close() it")
        return self._task.generations[0]


def _stop(task: GenerationTask, pieces: Generator[Piece], read_lock: AbstractContextManager[Any]) -> None:
    """Cancels a task. One that has begun runs to its end, which it reaches without a further token.

    It also runs before the interpreter shuts down: a thread that reads must not be inside torch then.
    """
    task.cancelled.set()  # before the lock: a thread that reads releases it after at most one token
    with read_lock:
        if inspect.getgeneratorstate(pieces) == inspect.GEN_CREATED:
            pieces.close()
        for _ in pieces:
            pass
