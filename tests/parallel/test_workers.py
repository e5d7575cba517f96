"""Worker processes: their messages arrive whatever else they print, and none outlives the process that started it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from falcon_kit.parallel.workers import WorkerDied, Workers
from tests.waiting import until


def start(code, count=1):
    """Workers that run `code` after they have made a `Link`."""
    head = "from falcon_kit.parallel.workers import Link; link = Link()\n"
    return Workers(head + code, [{"RANK": str(rank)} for rank in range(count)])


def test_what_a_worker_prints_is_no_message():
    workers = start("print('noise', flush=True); link.send(heard=link.receive()['word'])")
    workers.send({"word": "\u00e9\n"})
    assert workers.receive() == (0, {"heard": "\u00e9\n"})


def test_what_is_printed_before_a_workers_code_begins_is_no_message(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('noise', flush=True); print('half a line', end='', flush=True)")
    monkeypatch.syspath_prepend(tmp_path)
    assert start("link.send(ready=1); link.receive()").receive(60) == (0, {"ready": 1})


def test_what_an_import_prints_before_there_is_a_link_is_no_message():
    workers = Workers(
        "print('noise', flush=True)\nfrom falcon_kit.parallel.workers import Link; Link().send(ready=1)", [{}]
    )
    assert workers.receive(60) == (0, {"ready": 1})


def test_the_end_of_a_workers_stderr_is_quoted():
    with pytest.raises(
        WorkerDied, match=r"worker 0 ended with exit code 1\. The end of its stderr:\n(.|\n)*ValueError: no luck"
    ):
        start("raise ValueError('no luck')").receive()


def test_workers_end_when_nobody_holds_them():
    workers = start("link.send(ready=1); link.receive()", count=2)
    processes = workers.processes
    workers.receive()
    del workers
    assert [process.wait(5) for process in processes] == [-9, -9]


def test_the_pipes_of_workers_are_closed_with_them():
    workers = start("link.send(ready=1); link.receive()", count=2)
    pipes = [pipe for process in workers.processes for pipe in (process.stdin, process.stdout)]
    workers.receive()
    del workers
    until(lambda: all(pipe.closed for pipe in pipes))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no forks")
def test_a_fork_of_their_parent_does_not_end_workers():
    workers = start("link.send(ready=1); link.receive(); link.send(there=link.folder.exists())")
    workers.receive()
    if not (child := os.fork()):
        workers.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    workers.send({})
    assert workers.receive() == (0, {"there": True})


def test_workers_end_when_their_parent_is_killed():
    program = (
        "import os; from falcon_kit.parallel.workers import Workers\n"
        "code = 'from falcon_kit.parallel.workers import Link; link = Link(); link.send(ready=1); '\n"
        "code += 'import time; time.sleep(99)'\n"
        "workers = Workers(code, [{}]); workers.receive()\n"
        "print(workers.processes[0].pid, flush=True); os.kill(os.getpid(), 9)"
    )
    parent = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.returncode == -9
    assert ended(int(parent.stdout), seconds=10)


def ended(process, seconds):
    """Whether a process that is not ours is gone, or a zombie, before the time is over."""
    for _ in range(seconds * 10):
        state = Path(f"/proc/{process}/stat")
        if not state.exists() or state.read_text().rpartition(") ")[2].startswith("Z"):
            return True
        time.sleep(0.1)
    return False
