"""Files and folders that are complete or absent: each is written beside its place, then renamed.

Whoever is killed in between keeps the version of before. What a killed process left behind is removed by the next one
that writes to the same place.
"""

from __future__ import annotations

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
    """A file to write to, which takes the name `path` at the end of the `with` block and is removed on an error.

    size: bytes it will have, checked against the free space first. A symbolic link at `path` is replaced, not followed.
    Raises FileNotFoundError for a missing folder, IsADirectoryError, and OSError where the disk has no room.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent} to write {path.name} in: make it first")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: give the name of a file in it")
    _check_room(path, size)
    _sweep(path)
    partial = _beside(path, "new")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], size: int = 0) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `path` at the end of the `with` block, as `atomic_file` does.

    A folder that was at `path` stays whole until then, and is removed with all it holds afterwards. Raises
    NotADirectoryError where `path` is a file, and OSError where the disk has no room.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: give a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_room(path, size)
    _sweep(path)
    partial, old = _beside(path, "new"), _beside(path, "old")
    partial.mkdir()
    try:
        yield partial
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            path.rename(old)  # a kill between this line and the next is undone by `_sweep`
        partial.rename(path)
    finally:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Writes a text file, in UTF-8, completely or not at all; returns its path."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


def _beside(path: Path, mark: str) -> Path:
    """A hidden name in the same folder that says which process uses it."""
    return path.with_name(f".{path.name}.{os.getpid()}.{mark}{_SUFFIX}")


def _sweep(path: Path) -> None:
    """Removes what processes that have ended left beside `path`, and restores a folder that one of them had moved."""
    for left in path.parent.glob(f".{escape(path.name)}.*{_SUFFIX}"):
        process, _, mark = left.name.removeprefix(f".{path.name}.").removesuffix(_SUFFIX).partition(".")
        if not process.isdigit() or psutil.pid_exists(int(process)):
            continue
        if mark == "old" and not path.exists():
            left.rename(path)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _check_room(path: Path, size: int) -> None:
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    if size and (free := shutil.disk_usage(folder).free) < size:
        raise OSError(f"{path.name} needs {format_bytes(size)}, and {folder} has {format_bytes(free)} free")
