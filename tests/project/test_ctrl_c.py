"""Ctrl-C ends every wait for another thread or process, also one that the signal does not interrupt.

The system may give a signal to any thread of the process, and one that comes just before the main thread begins to wait
does not end the wait. Here another thread receives it, which is the same for the main thread.
"""

import signal
import threading

import pytest

import falcon_kit as fk
from falcon_kit.parallel.workers import Workers
from falcon_kit.playground.state import Session
from tests.playground.typist import Typist
from tests.serving.servers import Reply, answering, chunk, scripted
from tests.waiting import interrupted

SILENCE = 20  # seconds; far more than a wait takes to notice Ctrl-C


@pytest.fixture
def endpoint():
    with scripted(answering(Reply([chunk("late", "stop")], silence=SILENCE))) as server:
        yield fk.connect(f"{server.address}/v1")


@pytest.fixture
def generate(endpoint):
    return lambda: endpoint.generate("Hi")


@pytest.fixture
def stream(endpoint):
    return lambda: next(endpoint.stream("Hi"))


@pytest.fixture
def playground():
    over = threading.Event()
    session = Session(Typist(before=lambda _: over.wait(SILENCE)))
    yield lambda: session.generate("Hi")
    over.set()


@pytest.fixture
def processes():
    code = f"import time; from falcon_kit.parallel.workers import Link; time.sleep({SILENCE}); Link().send()"
    workers = Workers(code, [{}])
    yield workers.receive
    workers.close()


@pytest.fixture
def processes_with_a_limit(processes):
    return lambda: processes(SILENCE)


@pytest.mark.parametrize("name", ["generate", "stream", "playground", "processes", "processes_with_a_limit"])
def test_ctrl_c_ends_a_wait_that_it_does_not_interrupt(name, request):
    wait, too_late = request.getfixturevalue(name), threading.Event()
    late = threading.Timer(SILENCE / 2, too_late.set)
    late.start()
    with interrupted(0.3, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT)):
        wait()
    assert not too_late.is_set()
    late.cancel()
