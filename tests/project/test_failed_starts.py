"""What cannot be started leaves no folder and no process, although somebody keeps the error, as Jupyter does."""

import subprocess
import tempfile

import pytest

from falcon_kit.display import temporary
from falcon_kit.display.temporary import TemporaryFolder
from falcon_kit.parallel.workers import Workers
from falcon_kit.serving.local_process import LocalProcess

REASONS = [OSError(12, "Cannot allocate memory"), KeyboardInterrupt()]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture(params=REASONS, ids=["no memory", "Ctrl-C"])
def fails(request, monkeypatch):
    """Lets a function work some times, and then raise."""

    def prepare(owner, name, works=0):
        function, calls = getattr(owner, name), []

        def failing(*arguments, **options):
            calls.append(arguments)
            if len(calls) > works:
                raise request.param
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, failing)
        return type(request.param)

    return prepare


def test_a_temporary_folder(place, fails):
    with pytest.raises(fails(temporary, "_lock")):
        TemporaryFolder()
    assert [*place.iterdir()] == []


def test_a_server(place, fails):
    with pytest.raises(fails(subprocess, "Popen")):
        LocalProcess("key-0123456789")
    assert [*place.iterdir()] == []


def test_the_second_of_two_workers(place, fails, monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **how: started.append(popen(*given, **how)) or started[-1])
    with pytest.raises(fails(subprocess, "Popen", works=1)) as kept:
        Workers("import time; time.sleep(60)", [{}, {}])
    assert [each.returncode for each in started] == [-9]
    assert [*place.iterdir()] == []
    assert kept.value.__traceback__ is not None
