"""How a server of `fk.serve` loads, fails and ends: nothing is left running, and no file."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

import falcon_kit as fk
from falcon_kit.display import temporary
from falcon_kit.serving import local_process
from falcon_kit.serving.local_process import ServerDied
from tests.serving.engine import Engine, make_folder
from tests.waiting import interrupt, interrupted, until

# While it loads


def test_the_time_and_the_last_line_of_the_log_are_shown_and_removed(engine, monkeypatch, capsys):
    monkeypatch.setattr(local_process, "_SHOWN_AFTER", 0.0)
    with fk.serve("falconet", engine(says="loading shard 3 of 9", loads=1).program):
        shown = capsys.readouterr().err
    lines = shown.split("\r")
    assert re.fullmatch(r"vLLM starts: \d s, loading shard 3 of 9", lines[-4].rstrip())
    assert [line.strip() for line in lines[-3:]] == ["", "", ""]


def test_a_server_that_is_soon_ready_shows_nothing(engine, capsys):
    with fk.serve("falconet", engine().program):
        assert capsys.readouterr() == ("", "")


# It fails, and nothing is left


def test_the_last_words_of_a_server_that_dies_while_it_loads_are_quoted(engine):
    stand_in = engine(says="RuntimeError: no kernel for float99\x1b[31m", exit=3, child=True)
    with pytest.raises(ServerDied, match=r"(?s)ended with exit code 3.*key \*\*\*\n.*no kernel for float99\\x1b\[31m"):
        fk.serve("falconet", stand_in.program)
    assert stand_in.is_gone()


def test_a_server_that_the_system_kills_is_named_with_the_likely_reason(engine):
    with pytest.raises(ServerDied, match="was killed by SIGKILL, perhaps out of memory"):
        fk.serve("falconet", engine(kill=9).program)


def test_the_users_of_a_port_are_those_who_listen_there():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        assert [*local_process._users(server.getsockname()[1])] == ([os.getuid()] if sys.platform == "linux" else [])


def test_a_port_that_another_user_takes_first_gets_neither_key_nor_prompt(engine, monkeypatch):
    """Any user who watched `ps` could take it while the server started, and was sent both."""
    monkeypatch.setattr(local_process, "_users", lambda port: [os.getuid() + 1])
    stand_in = engine()
    with pytest.raises(OSError, match=r"another user's program took port \d+ while .* nothing was sent there: call"):
        fk.serve("falconet", stand_in.program)
    assert stand_in.is_gone()
    assert set(stand_in.requests) == {"GET /health"}


def test_a_program_that_cannot_run_is_named(engine):
    stand_in = engine()
    stand_in.program.chmod(0o644)
    with pytest.raises(ServerDied, match=r"could not be started .*vllm: Permission denied"):
        fk.serve("falconet", stand_in.program)


def test_a_server_that_is_not_ready_in_time_is_ended(engine):
    stand_in = engine(says="loading shard 3 of 9", loads=60)
    with pytest.raises(TimeoutError, match=r"not ready after 1.5 s, .*longer timeout=.*'loading shard 3 of 9'"):
        fk.serve("falconet", stand_in.program, timeout=1.5)
    assert stand_in.is_gone()


def test_ctrl_c_ends_a_server_that_loads(engine):
    stand_in = engine(loads=60)

    def once_it_loads():
        until(stand_in.program.with_suffix(".seen").exists)
        interrupt()

    with interrupted(0.0, once_it_loads):
        fk.serve("falconet", stand_in.program)
    assert stand_in.is_gone()


def test_a_server_that_dies_later_is_named_at_the_next_call(engine):
    stand_in = engine(says="serving")
    served = fk.serve("falconet", stand_in.program)
    os.kill(stand_in.seen["pid"], signal.SIGSEGV)
    while not served._process.ended:
        time.sleep(0.05)
    with pytest.raises(ServerDied, match=r"(?s)was killed by SIGSEGV.*serving"):
        served.generate("Hi")


def test_the_end_of_a_server_is_written_once(engine):
    process = local_process.LocalProcess("key-0123456789")
    process.start([sys.executable, "-c", ""], {})
    while not process.ended:
        time.sleep(0.05)
    written = (process.folder / "ended").stat().st_mtime_ns
    time.sleep(0.5)
    assert (process.folder / "ended").stat().st_mtime_ns == written
    process.close()


def test_a_server_that_ignores_the_request_to_end_is_killed(engine, monkeypatch):
    stand_in = engine(deaf=True)
    fk.serve("falconet", stand_in.program).close()
    assert stand_in.is_gone()


def test_a_server_whose_supervisor_was_killed_is_ended(engine):
    stand_in = engine(child=True)
    served = fk.serve("falconet", stand_in.program)
    served._process._supervisor.kill()
    served.close()
    assert stand_in.is_gone()


def fork(work):
    """The id of a fork of this process, which does the work and ends."""
    if not (child := os.fork()):
        signal.alarm(60)  # ends a child that waits for ever
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)  # no error may return into pytest's code
    return child


def test_a_fork_of_this_process_does_not_end_the_server(engine):
    with fk.serve("falconet", engine().program) as served:
        assert os.waitpid(fork(served.close), 0)[1] == 0
        assert served.generate("Hi", max_new_tokens=1).text == "Hello"


def test_a_fork_of_this_process_does_not_keep_the_server(engine):
    stand_in = engine()
    served = fk.serve("falconet", stand_in.program)
    child = fork(lambda: time.sleep(60))
    served.close()
    assert stand_in.is_gone()
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


KERNEL = """
import sys, time
from falcon_kit.serving.local_process import LocalProcess, free_port
process, port = LocalProcess("key"), str(free_port(None))
process.start([sys.argv[1], "--served-model-name", "x", "--port", port], {"VLLM_API_KEY": "key"})
process.wait_until_ready(f"http://127.0.0.1:{port}/health", "vLLM", 60)
print("up", flush=True)
"""


@pytest.mark.parametrize("end", ["killed", "killed while it loads", "left open"])
def test_nothing_survives_the_notebook(tmp_path, end):
    stand_in = Engine(tmp_path, child=True, loads=60 if "loads" in end else 0)
    code = KERNEL if end == "left open" else f"{KERNEL}time.sleep(600)"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code, stand_in.program], stdout=subprocess.PIPE, env=environment
    ) as kernel:
        if "loads" in end:
            until(stand_in.program.with_suffix(".seen").exists)
        else:
            assert kernel.stdout.readline() == b"up\n"
        if end != "left open":
            kernel.kill()
        kernel.wait(60)
    assert stand_in.is_gone()
    until(lambda: not [*tmp_path.glob("falcon-kit-*")])


def test_the_folder_of_a_server_that_was_killed_with_its_supervisor_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(temporary, "mkdtemp", lambda prefix: make_folder(tmp_path, prefix))
    alive, killed = (local_process.LocalProcess("key-0123456789") for _ in range(2))
    until(lambda: all((each.folder / "lock").exists() for each in (alive, killed)))
    killed._supervisor.kill()
    killed._supervisor.wait()
    later = local_process.LocalProcess("key-0123456789")
    assert [each.folder.exists() for each in (alive, killed, later)] == [True, False, True]
    for each in (alive, killed, later):
        each.close()
