"""What changes while a cell runs: shown in a notebook or in a terminal."""

import sys
from types import SimpleNamespace

import pytest

from falcon_kit.display import live
from falcon_kit.display.live import Waiting, in_notebook


def test_outside_of_a_notebook_there_is_no_cell():
    assert not in_notebook()


def test_a_cell_of_colab_whose_shell_has_another_name_is_one_too(monkeypatch):
    kernel = type("ZMQInteractiveShell", (), {})
    shell = type("Shell", (kernel,), {})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", SimpleNamespace(ZMQInteractiveShell=kernel))
    assert in_notebook()


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets."""
    seconds = SimpleNamespace(now=0.0)
    monkeypatch.setattr(live.time, "monotonic", lambda: seconds.now)
    return seconds


def test_a_line_in_the_terminal_covers_the_one_before_and_is_removed(clock, capsys):
    with Waiting("It starts", after=2.0) as line:
        for seconds, message in ((1, "early"), (2, "reading 10 files"), (3, ""), (3, "")):
            clock.now = seconds
            line.update(message)
    assert capsys.readouterr().err.split("\r") == [
        *("", "It starts: 2 s, reading 10 files", ""),
        *("It starts: 3 s" + " " * 18, "", " " * 14, ""),
    ]


def test_a_line_below_a_cell_is_updated_and_emptied(clock, monkeypatch, capsys):
    shown = []
    handle = SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))
    monkeypatch.setattr(live, "in_notebook", lambda: True)
    monkeypatch.setattr(live, "show", lambda data, raw, display_id: shown.append(data["text/plain"]) or handle)
    with Waiting("It starts", after=0.0) as line:
        for message in ("a", "a", "b"):
            line.update(message)
    assert shown == ["It starts: 0 s, a", "It starts: 0 s, b", ""]
    assert capsys.readouterr() == ("", "")


def test_what_is_soon_done_shows_nothing(clock, capsys):
    with Waiting("It starts", after=2.0) as line:
        line.update("done")
    assert capsys.readouterr() == ("", "")
