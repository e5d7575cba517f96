"""Servers that stall, drip, drop, lie and flood: reading ends, what came is kept, and the key stands nowhere."""

import gzip
import itertools
import logging
import threading
import time

import pytest

import falcon_kit as fk
from falcon_kit.serving import connection, sagemaker
from tests.serving.servers import Reply, answering, as_reply, chunk, event, part, scripted
from tests.serving.test_secrets import KEY, chain

BYTES = 2**18
"""The limit of bytes for these tests, which is larger outside."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module in (connection, sagemaker):
        monkeypatch.setattr(module, "MOST_BYTES", BYTES)


@pytest.fixture(params=["openai", "tgi", "sagemaker"])
def protocol(request):
    return request.param


def token(protocol, text, number=None):
    """The event of one token in a protocol."""
    if protocol == "openai":
        return chunk(text)
    return event({"token": {"id": number, "text": text, "logprob": -1.0, "special": False}})


def paced(parts, seconds):
    """The parts with a pause before each."""
    for each in parts:
        time.sleep(seconds)
        yield each


def body(make):
    """A reply whose body begins with the event of "Half"; `make` gets a function from a text to its event."""

    def reply(protocol):
        parts = make(lambda text, number=None: token(protocol, text, number))
        parts = itertools.chain([token(protocol, "Half")], parts)
        if protocol != "sagemaker":
            return Reply(parts)
        return Reply(map(part, parts), kind="application/vnd.amazon.eventstream")

    return reply


def raw(*parts):
    """A reply that begins with these bytes and repeats the last of them for ever."""
    return lambda _: Reply(raw=itertools.chain(parts, itertools.repeat(parts[-1])))


OK = b"HTTP/1.1 200 OK\r\n"
NAMED = KEY.encode()
STREAMS = {  # the fault, and what an error says of it
    "endless text": (body(lambda of: itertools.repeat(of(f" {KEY}"))), "more new tokens than were asked for"),
    "endless events without text": (body(lambda of: itertools.repeat(of(""))), "more new tokens than were asked for"),
    "more tokens than asked for": (
        body(lambda of: (of(" a", number) for number in range(50))),
        "more new tokens than were asked for|no finish reason",
    ),
    "an endless line": (
        body(lambda _: itertools.chain([b"data: " + NAMED], itertools.repeat(b"x" * 50_000))),
        "bytes without an end",
    ),
    "endless comments": (body(lambda _: itertools.repeat(b": " + NAMED + b"\n\n" * 9000)), "bytes without an end"),
    "an endless event": (
        body(lambda _: itertools.repeat(b"event: " + NAMED + b"\n" * 9000)),
        "bytes without an end|not of its protocol",
    ),
    "a stall": (body(lambda of: paced(itertools.repeat(of("x" * 50_000)), 3)), "sent nothing for 1.5 s"),
    "a drip": (
        body(lambda of: paced((b": "[at % 2 : at % 2 + 1] for at in itertools.count()), 0.1)),
        "has not ended after 1 s: give a longer deadline=",
    ),
}
REFUSALS = {
    "headers without an end": raw(OK, b"x: " + NAMED + b"\r\n"),
    "a header without an end": raw(OK + b"x: ", NAMED * 100),
    "a status line without an end": raw(NAMED * 100),
    "interim responses without an end": lambda _: Reply(
        raw=paced(itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"), 0.01)
    ),
    "a wrong chunk": raw(OK + b"transfer-encoding: chunked\r\n\r\n", b"zz" + NAMED),
    "no response": lambda _: Reply(dropped=True),
}
BODIES = {
    "a body without an end": lambda _: Reply(itertools.repeat(b"[" * 50_000)),
    "an error without an end": lambda _: Reply(itertools.repeat(NAMED * 1000), status=500),
    "a gzip bomb": lambda _: Reply([gzip.compress(bytes(10**7))], headers={"content-encoding": "gzip"}),
}
BROKEN = (ConnectionError, TimeoutError)


def script(protocol, reply, found):
    """A script that replies to requests for text, or to those of `connect` if `found` is False."""

    def answer(path, *rest):
        asked = path.endswith(("/completions", "/generate_stream", "-stream"))
        if asked == found:
            return reply(protocol)
        if protocol == "sagemaker":
            return as_reply({"__type": "AccessDeniedException", "message": "no"}, 400)
        return as_reply({"model_id": "falcon"}) if protocol == "tgi" else answering(Reply())(path, *rest)

    return answer


@pytest.fixture
def connected(protocol, monkeypatch):
    """A function from a server to the endpoint at it."""

    def connect(server, **settings):
        monkeypatch.setenv("FALCON_KIT_TOKEN", KEY)
        settings = {"retries": 0, "timeout": 1.5} | settings
        if protocol != "sagemaker":
            return fk.connect(server.address + ("/v1" if protocol == "openai" else ""), **settings)
        variables = {"REGION": "eu-west-1", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}
        variables |= {"ENDPOINT_URL_SAGEMAKER": server.address, "ENDPOINT_URL_SAGEMAKER_RUNTIME": server.address}
        for name, value in variables.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        return fk.connect("sagemaker://falcon", "falcon", **settings)

    return connect


def assert_hidden(shown):
    assert [text for text in shown if KEY in text or "very/secret" in text] == []


@pytest.mark.parametrize(("reply", "match"), [pytest.param(*fault, id=name) for name, fault in STREAMS.items()])
def test_a_stream_that_does_not_end_is_ended_and_its_text_kept(protocol, connected, reply, match, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with scripted(script(protocol, reply, True)) as server:
        endpoint = connected(server, deadline=1 if "deadline" in match else 60)
        with pytest.raises(fk.IncompleteAnswer, match=match) as broken:
            endpoint.generate("Hi", max_new_tokens=5)
        if "finish reason" not in match:
            assert server.hung_up.wait(5)
        text = broken.value.generation.text
        assert text.startswith("Half")
        assert len(text) < 2000
        session = fk.playground(endpoint).session
        session.set(max_new_tokens=5, top_k=None, temperature=0.5)
        turn = session.generate("Hi")
        assert turn.answers[0].text.startswith("Half")
        saved = [session.save(tmp_path / name).read_text() for name in ("session.json", "session.html")]
    assert_hidden(
        [*chain(broken.value), repr(broken.value.generation), repr(turn), turn._repr_html_(), caplog.text, *saved]
    )


def waited_for():
    """The threads for which Python waits when a program ends."""
    return {thread for thread in threading.enumerate() if not thread.daemon}


def given_up(protocol, connected, reply, found, caplog):
    """Asserts that a call fails with a named error without the key in it, and leaves no thread to wait for."""
    caplog.set_level(logging.INFO)
    before = waited_for()
    with scripted(script(protocol, reply, found)) as server:
        with pytest.raises(BROKEN) as error:
            connected(server, deadline=1).generate("Hi", max_new_tokens=5)
        assert not isinstance(error.value, fk.IncompleteAnswer)
        assert waited_for() == before
    assert_hidden([*chain(error.value), caplog.text])


FOUND = pytest.mark.parametrize("found", [True, False], ids=["asked for text", "asked what it is"])


@FOUND
@pytest.mark.parametrize("reply", [pytest.param(reply, id=name) for name, reply in REFUSALS.items()])
def test_a_response_that_is_none_is_given_up(protocol, connected, reply, found, caplog):
    given_up(protocol, connected, reply, found, caplog)


@FOUND
@pytest.mark.parametrize("protocol", ["openai", "tgi"])  # on SageMaker AWS, not the container, sends such bodies
@pytest.mark.parametrize("reply", [pytest.param(reply, id=name) for name, reply in BODIES.items()])
def test_a_body_without_an_end_is_given_up(protocol, connected, reply, found, caplog):
    given_up(protocol, connected, reply, found, caplog)


def test_bytes_that_are_counted_anew_after_each_event_do_not_end_a_long_answer(protocol, connected):
    long = body(lambda of: [*(of("x" * 600) for _ in range(1000)), LAST[protocol]])
    with scripted(script(protocol, long, True)) as server:
        answer = connected(server).generate("Hi", max_new_tokens=3000)
    assert (answer.text, answer.finish_reason) == ("Half" + "x" * 600_000, "length")


LAST = {
    "openai": chunk("", "length"),
    "tgi": event({"token": {"text": ""}, "details": {"finish_reason": "length"}}),
}
LAST["sagemaker"] = LAST["tgi"]


def test_a_deadline_is_above_zero():
    with pytest.raises(ValueError, match="deadline=0 must be above 0"):
        fk.connect("http://127.0.0.1:9/v1", deadline=0)
