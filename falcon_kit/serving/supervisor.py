"""A program that runs one server, and ends it when its own stdin closes or the process that started it ends.

    python supervisor.py FOLDER

The first line of stdin is JSON: {"command": [...], "environment": {...}}. The server's output goes to FOLDER/log, its
exit code to FOLDER/ended. At the end the server and all its processes are gone, and FOLDER is removed. Where this
program itself was killed, FOLDER/lock is no longer locked, and the next server on this machine removes FOLDER.

The process that started it may be killed at any time, and Linux's signal for that (PR_SET_PDEATHSIG) is sent when the
thread that started a child ends, which is too early. Only the standard library is imported, so that it starts at once.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0
"""Seconds from the request to end until the server is killed."""
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


def main(folder: Path) -> None:
    """Runs the server that the first line of stdin names, until stdin closes."""
    parent, closed, lock = os.getppid(), threading.Event(), _lock(folder)
    received: list[int] = []
    # Not closed.set(), which needs a lock that the main thread itself may hold.
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    first = sys.stdin.readline()
    threading.Thread(target=_wait_for_end, args=(closed,), daemon=True).start()
    server = _start(json.loads(first), folder, lock) if first else None
    while not received and not closed.wait(POLL_SECONDS) and os.getppid() == parent:
        if server and server.poll() is not None and not (folder / "ended").exists():
            _write_end(folder, str(server.returncode))
    if server:
        _end(server)
    shutil.rmtree(folder, ignore_errors=True)
    _signal_all(KILL)  # this program too


def _wait_for_end(closed: threading.Event) -> None:
    sys.stdin.read()
    closed.set()


def _lock(folder: Path) -> tuple[int, ...]:
    """Locks FOLDER/lock for as long as this program or the server runs: an unlocked folder may be removed."""
    if os.name != "posix":
        return ()
    import fcntl

    lock = os.open(folder / "lock.new", os.O_CREAT | os.O_WRONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / "lock.new").rename(folder / "lock")  # locked from the first moment
    return (lock,)


def _start(job: dict[str, Any], folder: Path, lock: tuple[int, ...]) -> subprocess.Popen[bytes] | None:
    """The server; None, with the reason in FOLDER/ended, if it cannot be started."""
    with (folder / "log").open("ab") as log:
        try:
            return subprocess.Popen(  # noqa: S603  # the kit's own command line
                job["command"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | job["environment"],
                pass_fds=lock,
            )
        except OSError as error:
            _write_end(folder, f"{job['command'][0]}: {error.strerror}")
            return None


def _write_end(folder: Path, text: str) -> None:
    (folder / "ended.new").write_text(text)
    (folder / "ended.new").replace(folder / "ended")


def _end(server: subprocess.Popen[bytes]) -> None:
    """Asks the server and the processes that it has started to end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _signal_all(signal.SIGTERM)
    try:
        server.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()


def _signal_all(number: int) -> None:
    """Sends a signal to the group of processes that this one leads: the server's are in it."""
    if os.name == "posix":
        with suppress(ProcessLookupError):
            os.killpg(os.getpid(), number)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
