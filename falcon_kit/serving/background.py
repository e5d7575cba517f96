"""The thread in which all requests to endpoints run."""

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from falcon_kit.generation.waiting import result

T = TypeVar("T")
_LOOPS: dict[int, asyncio.AbstractEventLoop] = {}  # by the process: a fork has the loop, but not its thread
_STARTING = threading.RLock()


def background_loop() -> asyncio.AbstractEventLoop:
    """An event loop in its own thread, shared by all endpoints: a notebook's loop is blocked while a cell runs."""
    with _STARTING:  # or two threads that ask first would get a loop each
        if os.getpid() not in _LOOPS:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="falcon-remote", daemon=True).start()
            _LOOPS[os.getpid()] = loop
        return _LOOPS[os.getpid()]


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` in the background loop and returns its result; Ctrl-C cancels it."""
    future = asyncio.run_coroutine_threadsafe(work, background_loop())
    try:
        return result(future)
    finally:
        future.cancel()
