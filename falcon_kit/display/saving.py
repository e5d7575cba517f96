"""Atomic writes of files and folders: the content is written under a temporary name in the same folder, then renamed.

If the process is killed in between, the previous version stays. The next write to the same path removes the temporary
files of processes that have ended.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

import psutil

from falcon_kit.display.tables import format_bytes

_SUFFIX = ".partial"


@contextmanager
def atomic_file(path: str | os.PathLike[str], size: int = 0) -> Iterator[Path]:
    """Yields a temporary path to write to. It is renamed to `path` at the end of the block, or removed on an error.

    size: bytes to write, checked against the free disk space first. A symbolic link at `path` is replaced, not
    followed. Raises FileNotFoundError for a missing folder, IsADirectoryError if `path` is a folder, and OSError if the
    disk has too little space.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent} to write {path.name} in: make it first")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: give the name of a file in it")
    _check_disk_space(path, size)
    _remove_leftovers(path)
    partial = _temporary_name(path, "new")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], size: int = 0) -> Iterator[Path]:
    """Yields an empty temporary folder. It is renamed to `path` at the end of the block, or removed on an error.

    An existing folder at `path` stays unchanged until then; afterwards it is deleted with its content. Raises
    NotADirectoryError if `path` is a file, and OSError if the disk has too little space.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: give a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_disk_space(path, size)
    _remove_leftovers(path)
    partial, old = _temporary_name(path, "new"), _temporary_name(path, "old")
    partial.mkdir()
    try:
        yield partial
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            path.rename(old)  # if the process is killed before the next line, `_remove_leftovers` undoes this
        partial.rename(path)
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Writes a UTF-8 text file atomically and returns its path."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


def _temporary_name(path: Path, mark: str) -> Path:
    """A hidden name in the same folder that contains the id of this process."""
    return path.with_name(f".{path.name}.{os.getpid()}.{mark}{_SUFFIX}")


def _remove_leftovers(path: Path) -> None:
    """Removes the temporary files of ended processes, and restores a folder that one of them had renamed."""
    for leftover in path.parent.glob(f".{escape(path.name)}.*{_SUFFIX}"):
        process, _, mark = leftover.name.removeprefix(f".{path.name}.").removesuffix(_SUFFIX).partition(".")
        if not process.isdigit() or psutil.pid_exists(int(process)):
            continue
        if mark == "old" and not path.exists():
            leftover.rename(path)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _check_disk_space(path: Path, size: int) -> None:
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    if size and (free := shutil.disk_usage(folder).free) < size:
        raise OSError(f"{path.name} needs {format_bytes(size)}, and {folder} has {format_bytes(free)} free")
