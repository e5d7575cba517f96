"""Temporary folders: none outlasts its process, and a fork or another process removes none that is in use."""

import copy
import os
import pickle
import subprocess
import sys
import tempfile

import psutil
import pytest

from falcon_kit.display.temporary import PREFIX, TemporaryFolder, remove_leftovers

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no forks")

PROGRAM = """
import multiprocessing, os, sys
from falcon_kit.display.temporary import TemporaryFolder

def make():
    global folder
    folder = TemporaryFolder()

"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def run(program, place):
    """What a program prints that makes temporary folders."""
    environment = os.environ | {"TMPDIR": str(place)}
    command = [sys.executable, "-c", PROGRAM + program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()


def test_a_folder_is_removed_with_its_object(place):
    opened = psutil.Process().num_fds()
    folder = TemporaryFolder()
    (folder.path / "file").write_text("text")
    del folder
    assert [*place.iterdir()] == []
    assert psutil.Process().num_fds() <= opened


@pytest.mark.parametrize(
    "program",
    [
        "make()",
        "make(); sys.exit(3)",
        "make(); raise RuntimeError",
        "one = multiprocessing.get_context('fork').Process(target=make); one.start(); one.join(); print(one.exitcode)",
    ],
)
def test_a_folder_is_removed_when_its_process_ends(place, program):
    assert run(program, place) in ("", "0")
    assert [*place.iterdir()] == []


@pytest.mark.parametrize("end", ["del folder; os._exit(0)", "folder.remove(); os._exit(0)", "sys.exit(0)"])
def test_a_fork_removes_no_folder(place, end):
    forked = f"make()\nif not os.fork():\n    {end}\nos.wait(); print(folder.path.exists())"
    assert run(forked, place) == "True"


def test_the_folder_of_a_killed_process_is_removed_by_the_next_and_those_in_use_are_not(place):
    mine = TemporaryFolder()
    run("make(); os.kill(os.getpid(), 9)", place)
    assert len([*place.iterdir()]) == 2
    later = TemporaryFolder()
    assert {*place.iterdir()} == {mine.path, later.path}


def test_a_folder_that_a_fork_of_a_killed_process_uses_is_not_removed(place):
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM + "make()\nif os.fork(): os.kill(os.getpid(), 9)\nsys.stdin.read()"],
        env=os.environ | {"TMPDIR": str(place)},
        stdin=subprocess.PIPE,
    ) as killed:
        assert killed.wait(60) == -9
        remove_leftovers(place)
        assert len([*place.iterdir()]) == 1


def test_the_folder_of_another_user_is_not_removed(place, monkeypatch):
    run("make(); os.kill(os.getpid(), 9)", place)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    remove_leftovers(place)
    assert len([*place.iterdir()]) == 1


def test_what_another_folder_is_named_as_is_not_removed(place):
    (place / "own").mkdir()
    (place / "own" / "lock").touch()
    (place / f"{PREFIX}link").symlink_to(place / "own")
    remove_leftovers(place)
    assert (place / "own" / "lock").exists()


def test_a_copy_names_the_folder_and_does_not_remove_it(place):
    folder = TemporaryFolder()
    assert copy.deepcopy([folder]) == [folder]
    assert pickle.loads(pickle.dumps(folder)) == folder.path  # noqa: S301  # our own bytes
    assert folder.path.exists()
