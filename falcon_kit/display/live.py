"""What changes while a cell runs: in a notebook below the cell, elsewhere in the terminal."""

import sys
import time
from importlib import import_module
from typing import Any


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell, kernel = sys.modules.get("IPython"), sys.modules.get("ipykernel.zmqshell")
    if shell is None or kernel is None:
        return False
    return isinstance(shell.get_ipython(), kernel.ZMQInteractiveShell)  # Colab has a subclass


def show(content: Any, **options: Any) -> Any:
    """IPython's `display`, for a notebook."""
    return import_module("IPython.display").display(content, **options)  # IPython is installed in every notebook


class Waiting:
    """One line with the seconds so far and the last message, in a `with` block; it is removed at the end.

    after: seconds until it is shown first.
    """

    def __init__(self, title: str, after: float) -> None:
        self._title, self._after, self._begin = title, after, time.monotonic()
        self._last = ""
        self._handle: Any = None

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(self, *error: object) -> None:
        if self._last:
            self._write("")

    def update(self, message: str) -> None:
        """Shows a message; call it as often as you like."""
        seconds = time.monotonic() - self._begin
        line = f"{self._title}: {seconds:.0f} s{', ' if message else ''}{message}"
        if seconds >= self._after and line != self._last:
            self._write(line)
            self._last = line

    def _write(self, line: str) -> None:
        if not in_notebook():
            sys.stderr.write(f"\r{line}{' ' * (len(self._last) - len(line))}\r")
            sys.stderr.flush()
        elif self._handle is None:
            self._handle = show({"text/plain": line}, raw=True, display_id=True)
        else:
            self._handle.update({"text/plain": line}, raw=True)
