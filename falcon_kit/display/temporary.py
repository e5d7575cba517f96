"""Folders for temporary files, which are removed with their object, with its process, or by a later one."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Self

PREFIX = "falcon-kit-"
"""The beginning of the names of all temporary folders."""


class TemporaryFolder:
    """A folder that only this user can read. It is removed with this object, and when its process ends.

    That is also at the end of a process of multiprocessing, which `tempfile.TemporaryDirectory` outlasts. A fork of the
    process removes nothing. The file `lock` is locked as long as the process or a fork of it runs: a process that was
    killed removes nothing either, and the next one to make a folder does it.
    """

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix=PREFIX))
        """The folder."""
        remove_leftovers(self.path.parent)
        # Below 0, so that at the end of Python the processes that read here are waited for.
        self._end = Finalize(self, _remove, (self.path, _lock(self.path)), exitpriority=-1)

    def remove(self) -> None:
        """Removes the folder. A second call does nothing."""
        self._end()

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> tuple[Callable[[str], Path], tuple[str]]:
        return Path, (str(self.path),)  # another process may read here, and removes nothing


def _lock(folder: Path) -> int | None:
    """Locks FOLDER/lock, as the supervisor of a server does; None where files cannot be locked."""
    if os.name != "posix":
        return None
    import fcntl

    file = os.open(folder / "lock.new", os.O_CREAT | os.O_WRONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    (folder / "lock.new").rename(folder / "lock")  # locked from the first moment
    return file


def _remove(folder: Path, lock: int | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def remove_leftovers(parent: Path) -> None:
    """Removes this user's folders whose processes were killed: nobody locks their file `lock` any more."""
    if os.name != "posix":
        return
    import fcntl

    for lock in parent.glob(f"{PREFIX}*/lock"):
        with suppress(OSError):
            if lock.parent.lstat().st_uid != os.getuid():
                continue
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
