"""Waiting in tests, and Ctrl-C while a call waits."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest


def until(condition: Callable[[], object]) -> None:
    """Returns when the condition is true, which has to be within 200 seconds."""
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def interrupt() -> None:
    """Sends SIGINT to this process; the system gives it to the main thread."""
    os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def interrupted_at_its_end() -> Iterator[None]:
    """A lock, for one block: Ctrl-C comes when the block is over, before the next statement."""
    yield
    raise KeyboardInterrupt


@contextmanager
def interrupted(seconds: float, send: Callable[[], None] = interrupt) -> Iterator[None]:
    """Ctrl-C after some seconds in the block, which it has to end. No signal comes after the block."""
    timer = threading.Timer(seconds, send)
    timer.daemon = True
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012  # the signal may not come outside of it
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join(10)
