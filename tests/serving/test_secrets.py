"""A key stands in no text that the kit shows, wherever a server repeats it; a redirect gets neither key nor prompt."""

import json
import logging
from contextlib import suppress

import pytest

import falcon_kit as fk
from tests.serving.servers import QUESTION, Reply, answering, as_reply, chunk, event, scripted

KEY = 'sk-very/secret"0123456789'


def tgi_repeating(*lines, model="falcon", status=200):
    def script(path, *_):
        if path == "/info":
            return as_reply({"model_id": model, "max_total_tokens": 2048})
        return Reply([b"data:" + json.dumps(each).encode() + b"\n\n" for each in lines], status)

    return script


TOKEN = {"token": {"id": 5, "text": " a", "logprob": -0.1, "special": False}}
TEXT = f"The key is {KEY}."
CUT = {size: [TEXT[at : at + size] for at in range(0, len(TEXT), size)] for size in (1, 5)}
LEAKS = {
    "TGI, an error event": tgi_repeating(TOKEN, {"error": f"wrong key {KEY}"}),
    "TGI, an event of another kind": tgi_repeating({"given": KEY}),
    "TGI, a refusal": tgi_repeating({"error": KEY}, status=422),
    "TGI, the model's name": tgi_repeating(TOKEN, model=f"falcon-{KEY}"),
    "TGI, the text": tgi_repeating({"token": TOKEN["token"] | {"text": f"key {KEY}"}}),
    "OpenAI, an error event": answering(Reply([chunk("Hi"), event({"error": {"message": KEY}})])),
    "OpenAI, a refusal": answering(as_reply({"error": {"message": f"Incorrect API key: {KEY}"}}, 401)),
    "OpenAI, a refusal without JSON": answering(Reply([f"<p>{KEY}".encode()], 500)),
    "OpenAI, the model's name": answering(Reply([chunk("Hi", "stop")]), models=(KEY,)),
    "OpenAI, the names of other models": answering(Reply([chunk("Hi", "stop")]), models=(KEY, "b")),
    "OpenAI, the text": answering(Reply([chunk(f"The key is {KEY}.", "stop")])),
    **{
        f"TGI, the text in pieces of {size}": tgi_repeating(*({"token": TOKEN["token"] | {"text": x}} for x in parts))
        for size, parts in CUT.items()
    },
    **{
        f"OpenAI, the text in pieces of {size}": answering(Reply([*map(chunk, parts), chunk("", "stop")]))
        for size, parts in CUT.items()
    },
    "OpenAI, the context": answering(Reply([chunk("Hi", "stop")]), owner="vllm", max_model_len=KEY),
    "OpenAI, a broken connection": answering(Reply([chunk("Hi")], cut=True)),
    "OpenAI, no response": answering(Reply(dropped=True)),
}


def chain(error):
    """All that is shown of an error and of those before it."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    return [text for each in seen for text in (str(each), repr(each), repr(each.args), repr(vars(each)))]


def shown_of(call):
    """The result of a call, and the texts of its error."""
    try:
        return call(), []
    except Exception as error:  # noqa: BLE001  # whatever it is, a user reads it
        return None, chain(error)


@pytest.mark.parametrize("script", [pytest.param(script, id=name) for name, script in LEAKS.items()])
def test_a_key_that_a_server_repeats_stands_nowhere(script, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with scripted(script) as server:
        url = server.address if script.__qualname__.startswith("tgi") else f"{server.address}/v1"
        endpoint, shown = shown_of(lambda: fk.connect(url, token=KEY, retries=0))
        if endpoint:
            shown += [repr(endpoint), endpoint._repr_html_(), endpoint.model, endpoint.address]
            for call in (lambda: endpoint.generate("Hi"), lambda: endpoint.chat(QUESTION)):
                answer, texts = shown_of(call)
                shown += [repr(answer), getattr(answer, "text", ""), *texts]
            pieces, texts = shown_of(lambda: list(endpoint.stream("Hi")))
            shown += [repr(pieces), *texts]
            session = fk.playground(endpoint).session
            turn, texts = shown_of(lambda: session.generate("Hi"))
            saved = session.save(tmp_path / "session.json").read_text()
            shown += [*texts, repr(session), repr(turn), turn._repr_html_() if turn else "", saved]
        assert server.requests[-1][2]["authorization"] == f"Bearer {KEY}"
    forms = (KEY, json.dumps(KEY)[1:-1], repr(KEY)[1:-1], "very/secret")
    assert [text for text in [*shown, caplog.text] if any(form in text for form in forms)] == []


@pytest.mark.parametrize("finish", ["stop", None])
def test_a_text_that_begins_like_the_key_is_whole(finish):
    chunks = [*map(chunk, f"sk-vast skies, {KEY}, sk-sk-very"), *([chunk("", finish)] if finish else [])]
    pieces = []
    with scripted(answering(Reply(chunks))) as server:
        stream = fk.connect(f"{server.address}/v1", token=KEY).stream("Hi")
        with suppress(fk.IncompleteAnswer):
            pieces += (piece.text for piece in stream)
    text = "sk-vast skies, ***, sk-sk-very"
    assert stream.generation.text == text
    assert "".join(pieces) == (text if finish else text.removesuffix("sk-very"))


@pytest.mark.parametrize(
    "url",
    [
        "ftp://user:hunter2@host/x",
        "user:hunter2@host:8000/v1",
        "http://user:hunter2@host/v1",
        "http://user:hunter2@[host/v1",
        "http://user:hunter2@ho\u2100st/v1",
        "http://user:hunt/er2@host/v1",
        "http://host:hunter2/v1",
        "https://host:8000:1/v1?key=hunter2",
    ],
)
def test_a_password_in_a_url_stands_in_no_error(url):
    _, shown = shown_of(lambda: fk.connect(url))
    assert shown
    assert [text for text in shown if "hunt" in text and "host:hunter2" not in text] == []


def test_a_short_key_changes_no_answer_and_no_error():
    refusal = as_reply({"error": {"message": "none of the fields"}}, 400)
    with scripted(answering(Reply([chunk("none of them", "stop")]), refusal)) as server:
        endpoint = fk.connect(f"{server.address}/v1", token="none")
        assert endpoint.generate("Hi").text == "none of them"
        with pytest.raises(ValueError, match="reports: none of the fields"):
            endpoint.generate("Hi")


@pytest.mark.parametrize("what", ["models", "completions", "generate_stream"])
def test_a_redirect_is_refused_with_a_target_that_works(what):
    with scripted(answering(Reply([chunk("Hello", "stop")]))) as other:

        def script(path, *_):
            if path.endswith(what):
                return as_reply({}, 307, location=other.address + path + "?token=" + KEY)
            if path == "/info" and what == "generate_stream":
                return as_reply({"model_id": "falcon"})
            return answering(Reply([]))(path, {}, {})

        with scripted(script) as server:
            url = server.address if what == "generate_stream" else f"{server.address}/v1"
            with pytest.raises(
                ConnectionError, match=r"redirects to http.*\(HTTP 307\).* connect to that URL"
            ) as error:
                fk.connect(url, token=KEY).generate("Hi")
        assert other.requests == []
        assert KEY not in str(error.value)
        target = str(error.value).partition("redirects to ")[2].partition(" ")[0]
        assert fk.connect(target).generate("Hi").text == "Hello"


def test_a_key_among_the_alternatives_or_in_a_count_is_not_shown(caplog):
    caplog.set_level(logging.INFO)
    tops = {"Hi": -0.1, f" {KEY}": -3.0}
    logprobs = {"tokens": ["Hi"], "token_logprobs": [-0.1], "top_logprobs": [tops]}
    choice = {"index": 0, "text": "Hi", "finish_reason": "stop", "token_ids": [5], "logprobs": logprobs}
    completions = answering(Reply([event({"choices": [choice]})]), owner="vllm")

    def script(path, *rest):
        return as_reply({"error": {"message": KEY}}, 400) if path == "/tokenize" else completions(path, *rest)

    with scripted(script) as server:
        endpoint = fk.connect(f"{server.address}/v1", token=KEY)
        answer = endpoint.generate("Hi", alternatives=2)
        _, shown = shown_of(lambda: endpoint.generate("Hi", max_length=50))
    assert [each.text for each in answer.alternatives[0]] == ["Hi", " ***"]
    assert shown
    assert [text for text in [*shown, repr(answer.alternatives), caplog.text] if KEY in text] == []
