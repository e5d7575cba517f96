"""Atomic writes of files and folders: the content is written under a temporary name in the same folder, then renamed.

If the process is killed or the disk is full in between, the previous version stays. The next write to the same path
removes the temporary files of processes that have ended. The new version has the permissions of the one before. A
symbolic link at the path is replaced, not followed.
"""

import ctypes
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from glob import escape
from pathlib import Path
from tempfile import TemporaryFile

import psutil

from falcon_kit.display.tables import format_bytes

_SUFFIX = ".partial"
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2
_CURRENT_FOLDER = -100  # AT_FDCWD


@contextmanager
def atomic_file(path: str | os.PathLike[str], size: int = 0) -> Iterator[Path]:
    """Yields a temporary path to write to. It is renamed to `path` at the end of the block, or removed on an error.

    size: bytes to write, checked against the free disk space first. Raises FileNotFoundError for a missing folder,
    NotADirectoryError if a folder above is a file, IsADirectoryError if `path` is a folder, PermissionError if nothing
    can be written there, and OSError if the disk has too little space.
    """
    path = Path(path).expanduser()
    _check_parents(path, path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent} to write {path.name} in: make it first")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: give the name of a file in it")
    check_disk_space(path, size)
    _remove_leftovers(path)
    partial, mode = _temporary_name(path, "new"), _mode(path)
    try:
        if mode is not None:
            partial.touch(mode | stat.S_IWUSR)
        yield partial
        _set_mode(partial, mode)
        _synchronise(partial)
        partial.replace(path)
        _synchronise(path.parent)
    finally:
        remove_quietly(partial)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], size: int = 0) -> Iterator[Path]:
    """Yields an empty temporary folder. It is renamed to `path` at the end of the block, or removed on an error.

    An existing folder at `path` stays unchanged until then; afterwards it is deleted with its content. Raises
    NotADirectoryError if `path` or a folder above it is a file, PermissionError if nothing can be written there, and
    OSError if the disk has too little space.
    """
    path = Path(path).expanduser()
    _refuse_file(path, path)
    _check_parents(path, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_disk_space(path, size)
    _remove_leftovers(path)
    partial, mode = _temporary_name(path, "new"), _mode(path)
    partial.mkdir(0o777 if mode is None else mode | stat.S_IRWXU)
    try:
        yield partial
        move_folder(partial, path)
    finally:
        remove_quietly(partial)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Writes a UTF-8 text file atomically and returns its path."""
    path = Path(path).expanduser()
    with atomic_file(path, len(text.encode())) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
    return path


def move_folder(new: Path, path: Path) -> None:
    """Renames a complete folder to `path`, once it is on the disk; a folder that was there is deleted."""
    check_folder(path)
    _set_mode(new, _mode(path))
    for each in [*new.rglob("*"), new]:
        _synchronise(each)
    if path.is_symlink():
        path.unlink()
    old = _temporary_name(path, "old")
    try:
        if path.exists() and not _exchange(new, path):
            path.rename(old)  # if the process is killed before the next line, `_remove_leftovers` undoes this
        if not path.exists():
            new.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
    _synchronise(path.parent)
    remove_quietly(old)
    remove_quietly(new)  # after an exchange, this is the version before


def remove(path: Path) -> None:
    """Deletes a file, a folder with its content, or a symbolic link, but not what the link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_quietly(path: Path) -> None:
    """As `remove`, for what may stay: another process may be removing it, or own it."""
    with suppress(OSError):
        remove(path)


def check_disk_space(path: Path, size: int) -> None:
    """Raises OSError if the disk of `path` has less space than `size` bytes."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    if size and (free := shutil.disk_usage(folder).free) < size:
        raise OSError(
            f"{path.name} needs {format_bytes(size)}, and {folder} has {format_bytes(free)} free: free some space "
            "there, or give a path on another disk"
        )


def check_folder(path: Path, label: str = "") -> None:
    """Raises NotADirectoryError where a folder cannot be, because it or a folder above it is a file, and
    PermissionError for a new folder where nothing can be written.

    label: the argument that the error names before the path.
    """
    shown = f"{label}={str(path)!r}" if label else path
    _refuse_file(path, shown)
    if not path.exists():
        _check_parents(path, shown)


def _refuse_file(path: Path, shown: object) -> None:
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{shown} is a file: give a folder")


def _check_parents(path: Path, shown: object) -> None:
    above = next(each for each in path.absolute().parents if each.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{shown} cannot be made: {above} is a file; give a path in a folder")
    check_writable(above, shown)


def check_writable(folder: Path, shown: object) -> None:
    """Raises PermissionError that names `shown` where no file can be made in an existing folder.

    A file is made there and removed: permissions alone do not tell for root, or for a disk mounted read-only.
    """
    try:
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise PermissionError(
            f"{shown} cannot be written: no file can be made in {folder} ({error.strerror}); give a path in a folder "
            "of your own, such as one in your home folder"
        ) from None


def _mode(path: Path) -> int | None:
    """The permissions of a file or folder; None if there is none, or only a link."""
    return stat.S_IMODE(path.stat().st_mode) if path.exists() and not path.is_symlink() else None


def _set_mode(path: Path, mode: int | None) -> None:
    if mode is not None and mode != _mode(path):  # a file system without permissions refuses to set them
        path.chmod(mode)


def _synchronise(path: Path) -> None:
    """Waits until a file or the names in a folder are on the disk, so that they outlive a power cut."""
    if path.is_symlink() or (path.is_dir() and os.name == "nt"):  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    names = os.fsencode(one), os.fsencode(other)
    return rename is not None and rename(_CURRENT_FOLDER, names[0], _CURRENT_FOLDER, names[1], _EXCHANGE) == 0


def _temporary_name(path: Path, mark: str) -> Path:
    """A hidden name in the same folder that no other write has; it contains the process."""
    process = os.getpid()
    return path.with_name(f".{path.name}.{process}-{_started(process)}.{secrets.token_hex(4)}.{mark}{_SUFFIX}")


@lru_cache(maxsize=1)  # of a process and not of its forks, whose id is another
def _started(process: int) -> int:
    """When a process started, in seconds. Another process may get its id later, in a container even at once."""
    return int(psutil.Process(process).create_time())


def _is_running(process: str) -> bool:
    """Whether a process, by id and time, is running. The system's clock may have been set by a second since."""
    try:
        number, started = map(int, process.split("-"))
        return abs(int(psutil.Process(number).create_time()) - started) <= 1
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _remove_leftovers(path: Path) -> None:
    """Removes the temporary files of ended processes, and restores a folder that one of them had renamed."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d+-\d+)\.[^.]+\.(new|old){re.escape(_SUFFIX)}")
    for leftover in path.parent.glob(f".{escape(path.name)}.*{_SUFFIX}"):
        found = name.fullmatch(leftover.name)  # None for one of a longer name, such as run.json beside run
        if found is None or _is_running(found[1]):
            continue
        if found[2] == "old" and not path.exists():
            leftover.rename(path)
        else:
            remove_quietly(leftover)
