"""What a server reports of itself, and its errors, in other types than the protocol's: every failure has a name."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import falcon_kit as fk
from tests.serving.servers import Reply, answering, as_reply, scripted
from tests.serving.test_malformed import VALUES, places, with_value

NAMED = (ConnectionError, LookupError, PermissionError, TimeoutError, ValueError)
UNREADABLE = [b"{broken", b"[" * 100_000, b'{"error":' * 100_000, b"\xff\xfe", b"9" * 5000, b'"\\ud800"']
MODELS = {"data": [{"id": "falcon", "owned_by": "vllm", "max_model_len": 2048, "aliases": ["small"]}]}
LLAMA = {"data": [{"id": "falcon", "owned_by": "llamacpp", "aliases": ["small"]}]}
REPORTS = {
    "/v1/models": MODELS,
    "/openapi.json": {"paths": {"/load_model": {}}},
    "/props": {"default_generation_settings": {"n_ctx": 2048}},
    "/info": {"model_id": "falcon", "max_total_tokens": 2048},
}


class Reporting:
    """A server whose report at one path is replaced by `reply`; the others make `connect` ask there."""

    def __init__(self):
        self.path, self.reply = "", Reply()

    def __call__(self, path, *_):
        if path == self.path:
            return self.reply
        models = {"/props": LLAMA, "/openapi.json": {"data": []}}.get(self.path, MODELS)
        return as_reply(models) if path == "/v1/models" else as_reply({}, 404)


@pytest.fixture(scope="module")
def reporting():
    with scripted(Reporting()) as server:
        yield server


def connected(server, path, reply):
    """Connects to a server with that report; returns what is shown of the endpoint, or of a named error."""
    server.script.path, server.script.reply = path, reply
    try:
        endpoint = fk.connect(server.address + ("" if path == "/info" else "/v1"), model=None, retries=0)
    except NAMED as error:
        return f"{type(error).__name__}: {error}"
    return repr(endpoint) + endpoint._repr_html_()


@pytest.mark.parametrize("path", list(REPORTS))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_server_reports_of_itself_a_failure_is_named(reporting, path, data):
    place = data.draw(st.sampled_from(list(places(REPORTS[path]))))
    reply = as_reply(with_value(REPORTS[path], place, data.draw(VALUES)))
    shown = connected(reporting, path, reply)
    assert shown.encode()  # all of it can be written as UTF-8
    assert not shown.startswith("Unicode")


@pytest.mark.parametrize("path", list(REPORTS))
def test_a_report_that_cannot_be_read_is_named(reporting, path):
    for content in UNREADABLE:
        assert connected(reporting, path, Reply([content], kind="application/json")).encode()


@pytest.mark.parametrize("path", list(REPORTS))
def test_a_lone_surrogate_in_a_report_can_be_shown(reporting, path):
    for place in places(REPORTS[path]):
        assert connected(reporting, path, as_reply(with_value(REPORTS[path], place, "a\ud800b"))).encode()


@pytest.mark.parametrize("charset", ["hex", "idna", "rot13", "undefined"])
def test_a_charset_that_is_none_of_texts_does_not_matter(charset):
    models = b'{"data": [{"id": "falcon", "owned_by": "vllm"}]}'
    with scripted(lambda *_: Reply([models], kind=f"application/json; charset={charset}")) as server:
        assert fk.connect(f"{server.address}/v1").model == "falcon"


def test_a_redirect_to_what_is_no_url_is_named():
    moved = Reply([b""], 302, headers={"location": "http://[x"})
    named = pytest.raises(ConnectionError, match=r"redirects to http://\[x \(HTTP 302\), and nothing was sent there")
    with scripted(lambda *_: moved) as server, named:
        fk.connect(f"{server.address}/v1", retries=0)


@pytest.fixture(scope="module", params=["openai", "tgi"])
def failing(request):
    """A function from a reply to the endpoint that gives it to every request for text."""
    replies = [Reply()]

    def script(path, *rest):
        if path == "/info":
            return as_reply({"model_id": "falcon"})
        return replies[0] if request.param == "tgi" else answering(replies[0])(path, *rest)

    with scripted(script) as server:
        endpoint = fk.connect(server.address + ("/v1" if request.param == "openai" else ""), retries=0)
        yield lambda reply: (replies.__setitem__(0, reply), endpoint)[1]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=VALUES, place=st.sampled_from(["error", "detail", "message", None]), status=st.sampled_from([400, 500]))
def test_whatever_an_error_contains_it_is_named(failing, content, place, status):
    endpoint = failing(as_reply({place: content} if place else content, status))
    with pytest.raises((ValueError, ConnectionError, LookupError), match=f"HTTP {status}") as error:
        endpoint.generate("Hi")
    assert str(error.value).encode()


@pytest.mark.parametrize("kind", ["application/json", "text/html; charset=nonsense"])
def test_an_error_that_cannot_be_read_is_named(failing, kind):
    deep = b'{"error":' * 900 + b'"out of memory"' + b"}" * 900
    for content in [*UNREADABLE, deep, b'{"error": {"message": "\\ud800"}}']:
        with pytest.raises(ConnectionError, match="HTTP 500") as error:
            failing(Reply([content], 500, kind)).generate("Hi")
        assert str(error.value).encode()
        assert len(str(error.value)) < 1200


def test_a_lone_surrogate_in_a_text_is_replaced(failing):
    choice = b'{"text": "a\\ud800b", "finish_reason": "length"}'
    token = b'{"text": "a\\ud800b"}, "details": {"finish_reason": "length"}'
    reply = Reply([b'data: {"choices": [' + choice + b'], "token": ' + token + b"}\n\n"])
    answer = failing(reply).generate("Hi")
    assert (answer.text, answer.finish_reason) == ("a\ufffdb", "length")
