"""Processes that work for this one: started, spoken to in lines of JSON, ended together.

Both ends trust each other only as far as JSON goes: no pickle, no open port. A worker's standard output is its line to
whoever started it; what else is printed goes to its standard error, whose end is quoted if it dies. Workers end when
they are closed, and when the process that started them is gone, however that happened.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, cast

Message = dict[str, Any]
_Arrived = queue.SimpleQueue[tuple[int, Message | None]]

_PARENT, _FOLDER = "FALCON_KIT_PARENT", "FALCON_KIT_FOLDER"  # what a worker finds in its environment
_LINE = "FALCON_KIT_LINE"  # there too, put by the worker itself: the number of its end of the line
_REDIRECT_STDOUT = (
    f"import os; os.environ[{_LINE!r}] = str(os.dup(1)); os.dup2(2, 1); "  # before an import can print into the line
)
_PARENT_POLL_SECONDS = 1.0  # seconds between two looks at whether the parent is alive
_STDERR_TAIL = 2000  # characters quoted of what a dead worker wrote


class WorkerDied(RuntimeError):
    """A worker ended without having been asked to."""


class Workers:
    """As many processes as there are environments, all running the same code."""

    def __init__(self, code: str, environments: list[Mapping[str, str]]) -> None:
        self._folder = TemporaryDirectory(prefix="falcon-kit-", ignore_cleanup_errors=True)  # for this user's eyes only
        self._arrived: _Arrived = queue.SimpleQueue()
        self._sending = threading.Lock()
        self.processes: list[subprocess.Popen[str]] = []
        self._end = weakref.finalize(self, _end, self.processes, self._folder)
        for rank, environment in enumerate(environments):
            self.processes.append(self._start(rank, code, environment))
            facts = rank, self.processes[rank], self._arrived, self._words(rank)
            threading.Thread(target=_read, args=facts, daemon=True).start()

    @property
    def folder(self) -> Path:
        """A folder that lives as long as the workers do; they know it as `Link.folder`."""
        return Path(self._folder.name)

    def _start(self, rank: int, code: str, environment: Mapping[str, str]) -> subprocess.Popen[str]:
        inherited = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # what can be imported here
        with self._words(rank).open("a") as words:
            return subprocess.Popen(  # noqa: S603  # this interpreter, and code of the kit's own
                [sys.executable, "-c", _REDIRECT_STDOUT + code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                text=True,
                errors="replace",
                env=inherited | dict(environment) | {_PARENT: str(os.getpid()), _FOLDER: str(self.folder)},
                start_new_session=True,  # Ctrl-C is for this process, which then asks the workers to stop
            )

    def send(self, message: Message, rank: int | None = None) -> None:
        """Sends to one worker, or to all. One that is gone is noticed by `receive`."""
        line = json.dumps(message) + "\n"
        with self._sending:
            for process in self.processes if rank is None else [self.processes[rank]]:
                pipe = cast(IO[str], process.stdin)
                try:
                    pipe.write(line)
                    pipe.flush()
                except (BrokenPipeError, ValueError):
                    continue

    def receive(self, seconds: float | None = None) -> tuple[int, Message]:
        """The next message, and whose it is. Raises WorkerDied, with all workers ended, or queue.Empty for silence."""
        block = seconds is None or seconds > 0
        rank, message = self._arrived.get(block, seconds if block else None)
        if message is None:
            raise WorkerDied(self._death_message(rank))
        return rank, message

    def _death_message(self, rank: int) -> str:
        if self.closed:
            return "the workers were closed"
        code = self.processes[rank].wait()
        cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = ": out of memory, perhaps" if cause.endswith("SIGKILL") else ""  # Windows has no such signal
        words = self._words(rank).read_text(errors="replace").strip()[-_STDERR_TAIL:]
        self.close()
        return f"worker {rank} {cause}{hint}" + (f". Its last words:\n{words}" if words else "")

    def _words(self, rank: int) -> Path:
        return self.folder / f"stderr-{rank}"

    @property
    def closed(self) -> bool:
        """Whether they have been ended."""
        return not self._end.alive

    def close(self) -> None:
        """Ends all of them, at once if need be. Nothing happens the second time."""
        self._end()


def _read(rank: int, process: subprocess.Popen[str], arrived: _Arrived, words: Path) -> None:
    """Hands a worker's messages on, and then None. What is no message was printed before its code began."""
    try:
        for line in cast(IO[str], process.stdout):
            if (message := _message(line)) is not None:
                arrived.put((rank, message))
            elif line.strip():
                with suppress(OSError), words.open("a") as file:  # the folder may just have been removed
                    file.write(line)
    finally:
        arrived.put((rank, None))


def _message(line: str) -> Message | None:
    """The object that a line holds; None where it is no message."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _end(processes: list[subprocess.Popen[str]], folder: TemporaryDirectory[str]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    folder.cleanup()


class Link:
    """A worker's end of the line. Once made, it ends this process when the one at the other end is gone."""

    def __init__(self) -> None:
        self._out = os.fdopen(int(os.environ[_LINE]), "w")
        self._arrived: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.cancelled: int | None = None
        """The number of the request that is not wanted any more."""
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=_follow, args=(int(os.environ[_PARENT]),), daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if "cancel" in message:
                self.cancelled = message["cancel"]
            else:
                self._arrived.put(message)
        self._arrived.put(None)

    @property
    def folder(self) -> Path:
        """A folder that lives as long as the workers do."""
        return Path(os.environ[_FOLDER])

    def send(self, **message: Any) -> None:
        """Sends one message."""
        self._out.write(f"\n{json.dumps(message)}\n")  # on a line of its own, even after half a printed one
        self._out.flush()

    def receive(self) -> Message:
        """The next message. Raises EOFError when the other end is gone."""
        message = self._arrived.get()
        if message is None:
            raise EOFError("whoever started this worker is gone")
        return message


def _follow(parent: int) -> None:
    """Ends this process when its parent is gone. Linux's signal for that comes when the thread that started it ends."""
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_SECONDS)
    os._exit(1)
