"""Waiting for another thread so that Ctrl-C is always noticed.

CPython ends the wait of its main thread when a signal interrupts that wait. A signal that comes just before the wait
begins, or that the system gives to another thread, is noticed when the wait is over. So no wait here is long.
"""

import concurrent.futures
import math
import time
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
_SECONDS = 0.2  # until Ctrl-C is noticed at the latest


def next_item(items: SimpleQueue[T], seconds: float = math.inf) -> T:
    """As `items.get()`; raises queue.Empty after some seconds."""
    end = time.monotonic() + seconds
    while True:
        try:
            return items.get(timeout=max(0.0, min(_SECONDS, end - time.monotonic())))
        except Empty:
            if time.monotonic() >= end:
                raise


def result(future: concurrent.futures.Future[T]) -> T:
    """As `future.result()`."""
    wait(future)
    return future.result()


def wait(future: concurrent.futures.Future[Any], seconds: float = math.inf) -> None:
    """Waits until a future is done, for some seconds at most."""
    end = time.monotonic() + seconds
    while not future.done() and time.monotonic() < end:
        concurrent.futures.wait([future], timeout=_SECONDS)
