"""Events of other types than the protocol's: the text so far is kept, and the error has a name."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import falcon_kit as fk
from falcon_kit.evaluation.remote import RemoteModel
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


TWO = {"tokens": [" a", " b"], "token_logprobs": [-0.1, -0.2]}
IDS = {"token_ids": [5, 6]}
ONE_ID = {"content": [{"token": " a", "id": 5, "logprob": -0.1}, {"token": " b", "logprob": -0.2}]}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({**IDS, "logprobs": {"tokens": [" a"], "token_logprobs": [-0.1]}}, id="more ids"),
        pytest.param({"token_ids": [5], "logprobs": TWO}, id="fewer ids"),
        pytest.param({**IDS, "logprobs": {**TWO, "tokens": [" a"]}}, id="fewer tokens"),
        pytest.param({**IDS, "logprobs": {**TWO, "top_logprobs": [{" a": -0.1}]}}, id="fewer alternatives"),
        pytest.param({"logprobs": ONE_ID}, id="a token without an id"),
        pytest.param({"index": 1}, id="a second answer"),
    ],
)
def test_tokens_that_do_not_belong_to_the_text_are_refused_not_left_out(changes):
    choice = {"index": 0, "text": " a b", "finish_reason": "length", **changes}
    with scripted(answering(Reply([event({"choices": [choice]})]), owner="vllm")) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        with pytest.raises(ConnectionError, match="sent an event that is not of its protocol"):
            endpoint.generate("Hi")


@pytest.mark.parametrize("wrong", [{"id": "5"}, {"special": "false"}])
def test_a_token_of_tgi_with_an_odd_field_is_refused_not_left_out(wrong):
    last = event({"token": {**TOKEN, **wrong}, "details": {"finish_reason": "length", "generated_tokens": 1}})
    named = pytest.raises(ConnectionError, match="sent an event that is not of its protocol")
    with scripted(lambda path, *_: as_reply({"model_id": "falcon"}) if path == "/info" else Reply([last])) as server:
        endpoint = fk.connect(server.address)
        with named:
            endpoint.generate("Hi")


def test_a_byte_order_mark_before_the_first_event_hides_no_text():
    with scripted(answering(Reply([b"\xef\xbb\xbf" + chunk("Hello"), chunk(" there", "stop")]))) as server:
        assert fk.connect(f"{server.address}/v1").generate("Hi").text == "Hello there"


@pytest.mark.parametrize(("path", "number"), ODD)
def test_a_session_with_odd_numbers_of_a_server_loads_as_it_was(path, number, tmp_path):
    with scripted(answering(Reply([event(with_value(WHOLE, path, number))]), owner="llamacpp")) as server:
        session = fk.playground(fk.connect(f"{server.address}/v1")).session
        assert session.generate("Hi").answers[0].text == "a"
    file = session.save(tmp_path / "session.json")
    assert files.load(file)[0] == session.history


ECHO = {
    "choices": [
        {
            "text": "Hi you!",
            "logprobs": {
                "text_offset": [0, 2, 6],
                "tokens": ["Hi", " you", "!"],
                "token_logprobs": [None, -0.5, -0.1],
                "top_logprobs": [None, {" you": -0.5}, {"!": -0.1}],
            },
        }
    ]
}


@pytest.fixture(scope="module")
def echoing():
    """A function from the echo of "Hi you" to the endpoint that sends it."""
    sent = [ECHO]
    models = answering(b"", owner="vllm")
    with scripted(lambda path, *rest: as_reply(sent[0]) if "completions" in path else models(path, *rest)) as server:
        endpoint = fk.connect(f"{server.address}/v1", retries=0)
        yield lambda content: (sent.__setitem__(0, content), endpoint)[1]


def scores(endpoint):
    """The log-probability of " you" after "Hi", or what its error is."""
    try:
        return RemoteModel(endpoint).run([["Hi", " you"]])[0][0]
    except (ConnectionError, ValueError) as error:
        return str(error)


def test_an_echo_has_the_score_of_the_continuation(echoing):
    assert scores(echoing(ECHO)) == -0.5


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_lists_of_an_echo_contain_it_has_a_score_or_is_refused_by_name(echoing, data):
    path = data.draw(st.sampled_from([path for path in places(ECHO) if len(path) > 3]))
    score = scores(echoing(with_value(ECHO, path, data.draw(VALUES))))
    named = isinstance(score, str) and ("http://" in score or "no log-probabilities" in score)
    assert named or -math.inf < score <= 1e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens", 5), ("tokens", None), ("text_offset", 2.5), ("text_offset", True), ("token_logprobs", None)]
    + [("token_logprobs", number) for number in (math.nan, 0.5, 1e999, 10**400)],
)
def test_an_echo_with_another_value_than_a_token_has_is_refused(echoing, name, value):
    endpoint = echoing(with_value(ECHO, ("choices", 0, "logprobs", name, 1), value))
    with pytest.raises(ConnectionError, match="sent an event that is not of its protocol"):
        endpoint.prompt_logprobs(["Hi you"])


@pytest.mark.parametrize(("context", "tokens"), [("H", 3), ("Hi", 1)], ids=["the first token", "a token is missing"])
def test_a_continuation_without_a_log_probability_is_refused(echoing, context, tokens):
    found = ECHO["choices"][0]["logprobs"]
    endpoint = echoing(with_value(ECHO, ("choices", 0, "logprobs"), {name: found[name][:tokens] for name in found}))
    with pytest.raises(ValueError, match=f"no log-probabilities for .* after {context!r}: give a longer context, or"):
        RemoteModel(endpoint).run([[context, "Hi you"[len(context) :]]])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_text_that_a_server_does_not_escape_arrives_with_all_that_python_calls_line_ends(protocol, end):
    sending, valid = protocol
    text = " a\u2028b\u2029c\x85d"
    openai = {"choices": [{"index": 0, "text": text, "finish_reason": "stop"}]}
    content = openai if valid is CHUNK else with_value(TGI, ("token", "text"), text)
    line = f"data: {json.dumps(content, ensure_ascii=False)}{end * 2}"
    assert sending(line.encode()).generate("Hi").text == "Half" + text


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
