"""A server in a process of its own: started, waited for, and ended together with this process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

import httpx2

from falcon_kit.display.errors import check_whole, exit_cause, printable
from falcon_kit.display.live import Waiting
from falcon_kit.display.temporary import new_folder

_POLL_SECONDS = 0.1
_SHOWN_AFTER = 2.0  # seconds: a server that is ready earlier shows no progress
_LAST_WORDS = 2000  # characters of the log in an error
_CLOSE_SECONDS = 10.0  # more than the supervisor's own grace
_LISTENING = "0A"  # TCP_LISTEN of Linux's tcp_states.h


class ServerDied(RuntimeError):
    """A local server that ended by itself; the message has the end of its log."""


class LocalProcess:
    """A server under a supervisor, and a folder for its files; both end with this object, and with this process.

    secret: the server's key, which is replaced in its log.
    """

    def __init__(self, secret: str) -> None:
        self.secret = secret
        program = Path(__file__).with_name("supervisor.py")
        with new_folder() as self.folder:
            self._supervisor = subprocess.Popen(  # noqa: S603  # this interpreter, and the kit's own code
                [sys.executable, "-P", str(program), str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C reaches only this process
            )
            self._end = weakref.finalize(self, _end, self._supervisor, self.folder, os.getpid())

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts the server. The environment is passed by a pipe, so that a key in it is in no command line."""
        pipe = cast(IO[str], self._supervisor.stdin)
        pipe.write(json.dumps({"command": [*command], "environment": dict(environment)}) + "\n")
        pipe.flush()

    @property
    def log(self) -> str:
        """What the server has written so far, without its key; empty once it is closed."""
        try:
            return (self.folder / "log").read_text(errors="replace").replace(self.secret, "***")
        except OSError:
            return ""

    @property
    def ended(self) -> str | None:
        """How the server ended; None while it runs."""
        if not self._end.alive:
            return "was closed"
        with suppress(OSError):
            text = (self.folder / "ended").read_text()
            return exit_cause(int(text)) if text.lstrip("-").isdigit() else f"could not be started ({text})"
        return None if self._supervisor.poll() is None else "was ended together with its supervisor"

    def check(self) -> None:
        """Raises ServerDied, with the last words of the server, if it has ended, and closes what is left of it."""
        if not (cause := self.ended):
            return
        words = "\n".join(printable(line, keep="\t") for line in self.log.strip()[-_LAST_WORDS:].splitlines())
        self.close()
        raise ServerDied(f"the server {cause}" + (f". The end of its log:\n{words}" if words else ""))

    def wait_until_ready(self, url: str, name: str, seconds: float) -> None:
        """Returns when a GET of `url` responds with HTTP 200; shows the time and the last line of the log meanwhile.

        Raises ServerDied if the server ends before, and TimeoutError after `seconds`.
        """
        begin = time.monotonic()
        with httpx2.Client(timeout=1.0, trust_env=False) as client, Waiting(f"{name} starts", _SHOWN_AFTER) as line:
            while not _responds(client, url):
                self.check()
                if time.monotonic() - begin > seconds:
                    raise TimeoutError(
                        f"{name} is not ready after {seconds:g} s, and was ended: give a longer timeout=. Its last "
                        f"line is {self._last_line()!r}"
                    )
                line.update(self._last_line())
                time.sleep(_POLL_SECONDS)

    def _last_line(self) -> str:
        lines = self.log.strip().splitlines()
        return printable(lines[-1])[:100] if lines else ""

    def close(self) -> None:
        """Ends the server and removes the folder. A second call does nothing."""
        self._end()


def _responds(client: httpx2.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 200
    except httpx2.HTTPError:
        return False


def _end(supervisor: subprocess.Popen[str], folder: Path, owner: int) -> None:
    """Lets the supervisor end the server; what is left of its group of processes afterwards is killed here."""
    if os.getpid() != owner:  # a fork of the process that started it
        return
    with suppress(OSError):
        cast(IO[str], supervisor.stdin).close()
    if os.name == "posix":
        supervisor.terminate()  # a fork may hold the pipe open
    try:
        supervisor.wait(_CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        supervisor.kill()
    if os.name == "posix":
        with suppress(ProcessLookupError):
            os.killpg(supervisor.pid, signal.SIGKILL)
    supervisor.wait()
    shutil.rmtree(folder, ignore_errors=True)


def free_port(port: int | None) -> int:
    """The port, or any free one. Raises OSError if another program listens there."""
    if port is not None:
        check_whole("port", port, 1, 65535)
    try:
        with socket.create_server(("127.0.0.1", port or 0)) as one:  # also a port that a server has just left
            return int(one.getsockname()[1])
    except OSError:
        raise OSError(
            f"port {port} is in use on 127.0.0.1: give another one, or leave port= out for any free one"
        ) from None


def check_own(port: int) -> None:
    """Raises OSError if a program of another user, except root, listens at a port. Only Linux tells whose it is.

    Every user can read the port in the server's command line, up to a minute before the server takes it.
    """
    if any(user not in (0, os.getuid()) for user in _users(port)):
        raise OSError(
            f"another user's program took port {port} while the server started, and nothing was sent there: call "
            "again, with another port= if you gave one"
        )


def _users(port: int) -> Iterator[int]:
    """The users whose programs listen at a port; none where the system does not say."""
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.is_file() else ():
            _, address, _, state, _, _, _, user, *_ = line.split()
            if state == _LISTENING and address.endswith(f":{port:04X}"):
                yield int(user)
