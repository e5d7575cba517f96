"""A file or folder is the old or the new version after an error or a kill, never a mixture."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from falcon_kit.display import saving
from falcon_kit.display.saving import atomic_file, atomic_folder, check_folder, write_text

DEAD = 2**22 + 1  # above the largest process id of Linux


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_under_its_name_with_what_was_written(tmp_path):
    assert write_text(tmp_path / "a.json", "é").read_bytes() == "é".encode()
    assert names(tmp_path) == ["a.json"]


def test_a_file_is_the_one_before_where_writing_fails(tmp_path):
    (tmp_path / "a").write_text("before")

    def interrupted():
        with atomic_file(tmp_path / "a") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "a").read_text() == "before"
    assert names(tmp_path) == ["a"]


def test_a_folder_takes_the_place_of_the_one_before(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stale").touch()
    with atomic_folder(tmp_path / "run") as partial:
        (partial / "fresh").touch()
    assert (names(tmp_path), names(tmp_path / "run")) == (["run"], ["fresh"])


def test_a_folder_is_the_one_before_where_filling_fails(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "good").touch()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "run"):
        _ = 1 / 0
    assert (names(tmp_path), names(tmp_path / "run")) == (["run"], ["good"])


@pytest.mark.parametrize("context", [atomic_file, atomic_folder])
def test_a_symbolic_link_is_replaced_and_what_it_led_to_is_not_touched(context, tmp_path):
    (tmp_path / "real").mkdir()
    if context is atomic_file:
        (tmp_path / "link").symlink_to(tmp_path / "precious")
        (tmp_path / "precious").write_text("precious")
    else:
        (tmp_path / "link").symlink_to(tmp_path / "real")
        (tmp_path / "real" / "precious").write_text("precious")
    with context(tmp_path / "link") as partial:
        (partial / "a" if context is atomic_folder else partial).write_text("new")
    assert not (tmp_path / "link").is_symlink()
    assert [path.read_text() for path in tmp_path.rglob("precious")] == ["precious"]


def test_the_next_writer_removes_what_a_killed_process_left(tmp_path):
    (tmp_path / f".a.{DEAD}-0.x.new.partial").write_text("half")
    (tmp_path / f".a.{os.getpid()}-0.x.new.partial").write_text("by a process of the same id before this one")
    with atomic_file(tmp_path / "a") as first:
        first.write_text("first")
        write_text(tmp_path / "a", "second")
        assert names(tmp_path) == [first.name, "a"]
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "first"


def test_a_folder_that_a_killed_process_had_moved_aside_comes_back(tmp_path):
    (tmp_path / f".run.{DEAD}-0.x.old.partial").mkdir()
    (tmp_path / f".run.{DEAD}-0.x.old.partial" / "good").touch()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "run"):
        _ = 1 / 0
    assert (names(tmp_path), names(tmp_path / "run")) == (["run"], ["good"])


def test_what_a_longer_name_left_or_is_writing_is_not_touched(tmp_path):
    (tmp_path / f".run.bak.{DEAD}-0.x.old.partial").mkdir()
    with atomic_file(tmp_path / "run.json") as file, atomic_folder(tmp_path / "run.v2") as folder:
        file.write_text("{}")
        with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "run"):
            _ = 1 / 0
        assert (file.exists(), folder.exists(), (tmp_path / "run").exists()) == (True, True, False)
    assert names(tmp_path) == [f".run.bak.{DEAD}-0.x.old.partial", "run.json", "run.v2"]


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o664])
def test_a_file_has_the_permissions_of_the_one_before_from_its_first_byte(tmp_path, mode):
    (tmp_path / "a").touch()
    (tmp_path / "a").chmod(mode)
    with atomic_file(tmp_path / "a") as partial:
        assert partial.stat().st_mode & 0o777 & ~mode & ~0o200 == 0
        partial.write_text("new")
    assert ((tmp_path / "a").stat().st_mode & 0o777, (tmp_path / "a").read_text()) == (mode, "new")


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_has_the_permissions_of_the_one_before(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(saving, "_exchange", lambda *_: False)
    (tmp_path / "run").mkdir(0o700)
    with atomic_folder(tmp_path / "run") as partial:
        assert partial.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_that_cannot_be_renamed_stays_as_it_was(tmp_path, monkeypatch, exchange):
    monkeypatch.setattr(saving, "_exchange", lambda *_: exchange)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "good").touch()
    rename = Path.rename
    moved = []

    def interrupted(self, target):
        if ".new." in self.name:
            moved.append(self)
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    if exchange:
        with atomic_folder(tmp_path / "run"):
            pass
        assert moved == []
    else:
        with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "run"):
            pass
    assert (names(tmp_path), names(tmp_path / "run")) == (["run"], ["good"])


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_where_names_cannot_be_exchanged_too(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(saving, "_exchange", lambda *_: False)
    for version in ("one", "two"):
        with atomic_folder(tmp_path / "run") as partial:
            (partial / version).touch()
    assert (names(tmp_path), names(tmp_path / "run")) == (["run"], ["two"])


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synchronised = []
    fsync = os.fsync

    def noted(descriptor):
        synchronised.append(Path(f"/proc/self/fd/{descriptor}").readlink().name.split(".")[-1])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write_text(tmp_path / "a", "text")
    with atomic_folder(tmp_path / "run") as partial:
        (partial / "b").touch()
    assert synchronised == ["partial", tmp_path.name, "b", "partial", tmp_path.name]


def test_a_path_in_the_home_folder_is_written_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_text("~/a", "text")
    with atomic_folder("~/run"):
        pass
    assert names(tmp_path) == ["a", "run"]


def test_threads_that_write_one_file_leave_one_of_their_texts(tmp_path):
    texts = [str(number) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda text: write_text(tmp_path / "a", text), texts * 5))
    assert (tmp_path / "a").read_text() in texts
    assert names(tmp_path) == ["a"]


def test_a_process_killed_while_it_writes_leaves_the_file_before(tmp_path):
    (tmp_path / "a").write_text("before")
    code = (
        "import os, sys; from falcon_kit.display.saving import atomic_file\n"
        "with atomic_file(sys.argv[1]) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "a"]).returncode == -9
    assert (tmp_path / "a").read_text() == "before"
    write_text(tmp_path / "a", "after")
    assert names(tmp_path) == ["a"]


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 2**20))
    with (
        pytest.raises(OSError, match=r"a needs 2.00 MiB, and .* has 1.00 MiB free"),
        atomic_file(tmp_path / "a", 2**21),
    ):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
@pytest.mark.parametrize("below", ["a", "x/a"])
def test_a_file_above_the_path_is_named(tmp_path, writer, below):
    (tmp_path / "file").touch()
    with (
        pytest.raises(NotADirectoryError, match=r"file is a file; give a path in a folder"),
        writer(tmp_path / "file" / below),
    ):
        pass
    assert names(tmp_path) == ["file"]


def test_a_place_of_the_wrong_kind_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(FileNotFoundError, match=r"there is no directory .* make it first"),
        atomic_file(tmp_path / "x/a"),
    ):
        pass
    with pytest.raises(IsADirectoryError, match="give the name of a file in it"), atomic_file(tmp_path):
        pass
    with pytest.raises(NotADirectoryError, match="is a file: give a folder"), atomic_folder(tmp_path / "file"):
        pass


def test_the_argument_is_named_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").touch()
    for below, reason in (("", "is a file: give a folder"), ("/below", "cannot be made: .*file is a file")):
        with pytest.raises(NotADirectoryError, match=f"output_dir='.*file{below}' {reason}"):
            check_folder(Path(f"{tmp_path}/file{below}"), "output_dir")
