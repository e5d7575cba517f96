"""Worker processes: started together, sent messages as lines of JSON, and ended together.

Messages are JSON through pipes: no pickle, no open port. A worker sends its messages through its stdout. What its code
prints goes to its stderr, whose end is quoted if the worker dies. Workers end when they are closed, and when the
process that started them ends, even if it is killed.
"""

import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

from falcon_kit.display.errors import exit_cause
from falcon_kit.display.temporary import TemporaryFolder
from falcon_kit.generation.waiting import next_item

Message = dict[str, Any]
_Queue = queue.SimpleQueue[tuple[int, Message | None]]

_PARENT, _FOLDER = "FALCON_KIT_PARENT", "FALCON_KIT_FOLDER"  # environment variables of a worker: parent's pid, folder
_MESSAGES_FD = "FALCON_KIT_MESSAGES_FD"  # set by the worker itself: the file descriptor for its messages
_REDIRECT_STDOUT = (  # runs first, before an import can print between the messages
    f"import os; os.environ[{_MESSAGES_FD!r}] = str(os.dup(1)); os.dup2(2, 1); "
)
_PARENT_POLL_SECONDS = 1.0  # how often a worker checks that its parent is alive
_STDERR_TAIL = 2000  # characters of a dead worker's stderr in the error


class WorkerDied(RuntimeError):
    """A worker ended although it was not closed."""


class Workers:
    """One process for each environment; all run the same code."""

    def __init__(self, code: str, environments: list[Mapping[str, str]]) -> None:
        temporary = TemporaryFolder()
        self.folder = temporary.path
        """A folder that is removed when the workers end; a worker reads its path in `Link.folder`."""
        self._arrived: _Queue = queue.SimpleQueue()
        self._sending = threading.Lock()
        self.processes: list[subprocess.Popen[str]] = []
        self._end = weakref.finalize(self, _end, self.processes, temporary, os.getpid())
        try:
            for rank, environment in enumerate(environments):
                self.processes.append(self._start(rank, code, environment))
                arguments = rank, self.processes[rank], self._arrived, self._stderr(rank)
                threading.Thread(target=_read, args=arguments, daemon=True).start()
        except BaseException:  # Ctrl-C too: Jupyter keeps the error, and with it these processes
            self.close()
            raise

    def _start(self, rank: int, code: str, environment: Mapping[str, str]) -> subprocess.Popen[str]:
        inherited = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # the same imports
        with self._stderr(rank).open("a") as stderr:
            return subprocess.Popen(  # noqa: S603  # this interpreter, and the kit's own code
                [sys.executable, "-c", _REDIRECT_STDOUT + code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                errors="replace",
                env=inherited | dict(environment) | {_PARENT: str(os.getpid()), _FOLDER: str(self.folder)},
                start_new_session=True,  # Ctrl-C reaches only this process, which then cancels the request
            )

    def send(self, message: Message, rank: int | None = None) -> None:
        """Sends a message to one worker, or to all. `receive` raises for a worker that has ended."""
        line = f"\n{json.dumps(message)}\n"  # a line of its own, even after one that Ctrl-C cut off
        with self._sending:
            for process in self.processes if rank is None else [self.processes[rank]]:
                pipe = cast(IO[str], process.stdin)
                with suppress(BrokenPipeError, ValueError):
                    pipe.write(line)
                    pipe.flush()

    def receive(self, seconds: float = math.inf) -> tuple[int, Message]:
        """The rank of a worker and its next message. Raises queue.Empty after `seconds`.

        Raises WorkerDied, after it has ended all workers, when one has ended.
        """
        rank, message = next_item(self._arrived, seconds)
        if message is None:
            raise WorkerDied(self._death_message(rank))
        return rank, message

    def _death_message(self, rank: int) -> str:
        if self.closed:
            return "the workers were closed"
        cause = exit_cause(self.processes[rank].wait())
        stderr = self._stderr(rank).read_text(errors="replace").strip()[-_STDERR_TAIL:]
        self.close()
        return f"worker {rank} {cause}" + (f". The end of its stderr:\n{stderr}" if stderr else "")

    def _stderr(self, rank: int) -> Path:
        return self.folder / f"stderr-{rank}"

    @property
    def closed(self) -> bool:
        return not self._end.alive

    def close(self) -> None:
        """Kills all workers. A second call does nothing."""
        self._end()


def _read(rank: int, process: subprocess.Popen[str], arrived: _Queue, stderr: Path) -> None:
    """Puts a worker's messages into the queue, and None at their end. Other lines were printed before its code ran."""
    try:
        for line in cast(IO[str], process.stdout):
            if (message := _message(line)) is not None:
                arrived.put((rank, message))
            elif line.strip():
                with suppress(OSError), stderr.open("a") as file:  # `close` may have removed the folder
                    file.write(line)
    finally:
        cast(IO[str], process.stdout).close()
        arrived.put((rank, None))


def _message(line: str) -> Message | None:
    """The JSON object in a line; None for another line."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _end(processes: list[subprocess.Popen[str]], folder: TemporaryFolder, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the process that started them
        return
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
        with suppress(OSError):  # what was not sent has no reader any more
            cast(IO[str], process.stdin).close()
    folder.remove()


class Link:
    """A worker's connection to its parent. Once made, it ends the worker when the parent ends."""

    def __init__(self) -> None:
        self.folder = Path(os.environ[_FOLDER])
        """A folder that is removed when the workers end."""
        self._out = os.fdopen(int(os.environ[_MESSAGES_FD]), "w")
        self._arrived: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.cancelled: int | None = None
        """The number of the last cancelled request."""
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=_end_with_parent, args=(int(os.environ[_PARENT]),), daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            if (message := _message(line)) is None:
                continue
            self.cancelled = message.get("cancel", self.cancelled)
            self._arrived.put(message)
        os._exit(1)  # the parent has ended

    def send(self, **message: Any) -> None:
        self._out.write(f"\n{json.dumps(message)}\n")  # a line of its own, even after text without a newline
        self._out.flush()

    def receive(self) -> Message:
        return self._arrived.get()


def _end_with_parent(parent: int) -> None:
    """Ends this process when its parent has ended, also where a child of the parent keeps its stdin open.

    Linux's own signal for that (PR_SET_PDEATHSIG) is sent when the thread that started the worker ends, which is too
    early.
    """
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_SECONDS)
    os._exit(1)
