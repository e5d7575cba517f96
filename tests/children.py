"""Child processes that the kernel ends when the tests end or crash."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

# PR_SET_PDEATHSIG outlasts exec. Popen's preexec_fn would do the same in a fork of a process with many threads, which
# may wait for ever for a lock that one of them held.
_PROGRAM = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, {}); os.execv(sys.argv[1], sys.argv[1:])"


def ends_with_parent(command: Sequence[str | Path], by: signal.Signals = signal.SIGKILL) -> list[str]:
    """A command that does the same, and on Linux gets a signal when the thread that started it ends."""
    start = [sys.executable, "-c", _PROGRAM.format(int(by))] if sys.platform == "linux" else []
    return [*start, *map(str, command)]
