"""Folders for temporary files, which are removed with their object, when its process ends, or by a later process."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.util import Finalize
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Self

PREFIX = "falcon-kit-"
"""The beginning of the names of all temporary folders."""


class TemporaryFolder:
    """A folder that only this user can read. It is removed with this object, or when its process ends.

    `tempfile.TemporaryDirectory` leaves its folder behind when a process of multiprocessing ends; this one does not. A
    fork does not remove its parent's folder. A process that is killed leaves its folder behind; the next process that
    makes a folder removes it, since nobody holds the lock on its file `lock` any more.
    """

    path: Path

    def __init__(self) -> None:
        with new_folder() as self.path:
            # Below 0, so that at the end of Python the processes that read here are waited for.
            self._end = Finalize(self, _remove, (self.path, _lock(self.path)), exitpriority=-1)

    def remove(self) -> None:
        """Removes the folder. A second call does nothing."""
        self._end()

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> tuple[Callable[[str], Path], tuple[str]]:
        return Path, (str(self.path),)  # another process may read here, and removes nothing


@contextmanager
def new_folder() -> Iterator[Path]:
    """A new folder that only this user can read, and those of killed processes removed. An error in the block removes
    it."""
    folder = Path(mkdtemp(prefix=PREFIX))
    try:
        remove_leftovers(folder.parent)
        yield folder
    except BaseException:  # Ctrl-C too
        shutil.rmtree(folder, ignore_errors=True)
        raise


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
