"""Events of other types than the protocol's: the text so far is kept, and the error has a name."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import falcon_kit as fk
from falcon_kit.playground import files
from tests.serving.servers import Reply, answering, as_reply, chunk, event, scripted

TOKEN = {"id": 5, "text": "Half", "logprob": -0.1, "special": False}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
CHUNK = {
    "choices": [
        {"index": 0, "text": "a", "finish_reason": None, "logprobs": {"token_logprobs": [-1]}, "token_ids": [5]}
    ],
    "usage": {"prompt_tokens": 4, "completion_tokens": 1},
    "timings": {"cache_n": 1, "prompt_n": 2, "predicted_n": 3},
}
TGI = {"token": TOKEN, "details": {"finish_reason": "length", "input_length": 3, "generated_tokens": 2}}


def places(content, path=()):
    """The paths to all values in a JSON value."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def with_value(content, path, value):
    """A copy of a JSON value with another value at a path."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = with_value(content[path[0]], path[1:], value)
    return copy


class SageMaker:
    """A boto3.Session with one endpoint, which sends these lines."""

    def __init__(self):
        self.body = b""

    def client(self, *_, **__):
        return self

    def describe_endpoint(self, **_):
        return {"EndpointStatus": "InService"}

    def invoke_endpoint_with_response_stream(self, **_):
        return {"Body": self}

    def __iter__(self):
        return iter([{"PayloadPart": {"Bytes": self.body}}])

    def close(self):
        pass


@pytest.fixture(scope="module", params=["openai", "tgi", "sagemaker"])
def protocol(request):
    """A function from an event's bytes to the endpoint that sends it after "Half"; and the valid event."""
    is_openai = request.param == "openai"
    first = chunk("Half") if is_openai else event({"token": TOKEN})
    if request.param == "sagemaker":
        pytest.importorskip("boto3")
        session = SageMaker()
        endpoint = fk.connect("sagemaker://falcon", "falcon", session=session)
        yield lambda line: (setattr(session, "body", first + line), endpoint)[1], TGI
        return
    line = [b""]

    def script(path, *rest):
        if path == "/info":
            return as_reply({"model_id": "falcon"})
        reply = Reply([first + line[0]])
        return answering(reply, owner="vllm")(path, *rest) if is_openai else reply

    with scripted(script) as server:
        endpoint = fk.connect(f"{server.address}/v1" if is_openai else server.address)
        yield lambda sent: (line.__setitem__(0, sent), endpoint)[1], CHUNK if is_openai else TGI


def keeps_the_text(endpoint):
    """The answer begins with the first event, whether it ends or breaks off."""
    try:
        text = endpoint.generate("Hi").text
    except fk.IncompleteAnswer as broken:
        text = broken.generation.text
    assert text.startswith("Half")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_an_event_contains_the_text_so_far_is_kept(protocol, data):
    sending, valid = protocol
    path = data.draw(st.sampled_from(list(places(valid))))
    keeps_the_text(sending(event(with_value(valid, path, data.draw(VALUES)))))


ENTRY = {"token": "a", "id": 5, "logprob": -0.5, "top_logprobs": [{"token": "a", "id": 5, "logprob": -0.5}]}
WHOLE = {
    "choices": [{"index": 0, "text": "a", "finish_reason": "stop", "logprobs": {"content": [ENTRY]}}],
    "usage": {"prompt_tokens": 4, "completion_tokens": 1},
}
LOGPROBS, COUNTS = (None, 0.5, 1e999, -1e999, math.nan, 10**400, -(10**400)), (None, -1, 10**400)
NUMBERS = {"logprob": LOGPROBS, "prompt_tokens": COUNTS, "completion_tokens": COUNTS}
ODD = [
    pytest.param(path, number, id=f"{'.'.join(map(str, path))}={number!s:.5}")
    for path in places(WHOLE)
    for number in NUMBERS.get(path[-1] if path else "", ())
]


@pytest.mark.parametrize(("path", "number"), ODD)
def test_a_session_with_odd_numbers_of_a_server_loads_as_it_was(path, number, tmp_path):
    with scripted(answering(Reply([event(with_value(WHOLE, path, number))]), owner="llamacpp")) as server:
        session = fk.playground(fk.connect(f"{server.address}/v1")).session
        assert session.generate("Hi").answers[0].text == "a"
    file = session.save(tmp_path / "session.json")
    assert files.load(file)[0] == session.history


BAD_LINES = {
    "invalid UTF-8": b'data: {"choices": [{"text": "\xff\xfe"}], "token": "\xff"}\n\n',
    "deep nesting": b"data: " + b"[" * 100_000 + b"\n\n",
    "deep nesting in an object": b"data: " + b'{"token":' * 100_000 + b"\n\n",
    "a number": b"data: 5\n\n",
    "a text": b'data: "text"\n\n',
    "huge digits": b'data: {"token": {"id": ' + b"9" * 10_000 + b"}}\n\n",
}


@pytest.mark.parametrize("line", [pytest.param(line, id=name) for name, line in BAD_LINES.items()])
def test_a_line_that_is_no_event_keeps_the_text_so_far(protocol, line):
    keeps_the_text(protocol[0](line))


AFTER = [json.dumps(each).encode() for each in (5, [], {"choices": 7}, {"usage": "x"}, {"choices": [7]})]


@pytest.mark.parametrize("line", [*AFTER, b"{broken", b"[" * 100_000, b"\xff"])
@pytest.mark.parametrize("cut", [False, True])
def test_an_answer_that_is_complete_is_returned_whatever_follows(line, cut):
    reply = Reply([chunk("Whole", "stop"), b"data: " + line + b"\n\n"], cut=cut)
    with scripted(answering(reply)) as server:
        answer = fk.connect(f"{server.address}/v1").generate("Hi")
    assert (answer.text, answer.finish_reason) == ("Whole", "eos")
