"""Retries, timeouts, settings and the exceptions of all protocols."""

import asyncio
import gc
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

import falcon_kit as fk
from falcon_kit.serving import failures, protocol
from falcon_kit.serving.connection import Connection
from falcon_kit.serving.failures import http_error
from falcon_kit.serving.protocol import Request
from tests.serving.servers import DONE, HTTPServer, Reply, answering, as_reply, chunk, event, free_port, scripted
from tests.waiting import until


def test_a_setting_that_no_protocol_knows_yet_is_refused_and_not_dropped():
    @dataclass(frozen=True, kw_only=True)
    class Later(fk.Sampling):
        new: int = 0

    protocol.map_settings(Request("Hello", (), Later(), {}, ()), "vLLM", {})
    with pytest.raises(ValueError, match="vLLM has no field for new=3: leave it out"):
        protocol.map_settings(Request("Hello", (), Later(new=3), {}, ()), "vLLM", {})


def test_an_endpoint_that_is_down_is_a_connection_error_that_says_where():
    port = free_port()
    with pytest.raises(
        ConnectionError, match=f"nothing answers at http://127.0.0.1:{port}/.*start the server, or check"
    ):
        fk.connect(f"http://127.0.0.1:{port}/v1", retries=2)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_endpoint_is_asked_again(status):
    busy = as_reply({"error": {"message": "overloaded"}}, status)
    with scripted(answering(busy, busy, Reply(DONE))) as server:
        assert fk.connect(f"{server.address}/v1").generate("Hi").text == "Hello there"
        assert len(server.asked("/v1/completions")) == 3


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_that_is_closed_before_any_response_is_tried_again(reset):
    """llama.cpp closes a connection after 100 requests or 5 idle seconds, maybe just when a request is sent."""
    with scripted(answering(Reply(dropped=True, reset=reset), Reply(DONE))) as server:
        assert fk.connect(f"{server.address}/v1").generate("Hi").text == "Hello there"
        assert len(server.asked("/v1/completions")) == 2


@pytest.mark.parametrize("rest", [[], [b": that was all\n\n"]])
def test_one_connection_serves_one_text_after_the_other(rest):
    opened = []

    class Counted(HTTPServer):
        def get_request(self):
            opened.append(super().get_request())
            return opened[-1]

    with scripted(answering(Reply([*DONE, *rest])), Counted) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        opened.clear()
        assert [endpoint.generate("Hi").text for _ in range(10)] == ["Hello there"] * 10
        assert len(opened) == 1


def test_the_connections_of_an_endpoint_that_is_garbage_are_closed():
    with scripted(answering(Reply(DONE))) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        endpoint.generate("Hi")
        client = endpoint._server.connection.client
        del endpoint
        gc.collect()
        until(lambda: client.is_closed)


def test_a_response_without_an_end_is_left_after_its_end_mark():
    def endless():
        yield b"data: [DONE]\n\n"
        while True:
            time.sleep(0.1)
            yield b": I am still here\n\n"

    with scripted(answering(Reply(itertools.chain([chunk("Half")], endless())))) as server:
        with pytest.raises(fk.IncompleteAnswer, match="gave no finish reason"):
            fk.connect(f"{server.address}/v1", deadline=5).generate("Hi")
        assert server.hung_up.wait(5)


def test_an_endpoint_that_closes_every_connection_is_given_up():
    with scripted(answering(Reply(dropped=True))) as server:
        endpoint = fk.connect(f"{server.address}/v1", retries=1)
        with pytest.raises(
            ConnectionError, match=r"the connection to http.* broke \(RemoteProtocolError\): read the server's log$"
        ):
            endpoint.generate("Hi")
        assert len(server.asked("/v1/completions")) == 2


def test_an_endpoint_that_stays_busy_is_given_up():
    with scripted(answering(as_reply({"error": {"message": "overloaded"}}, 429))) as server:
        endpoint = fk.connect(f"{server.address}/v1", retries=2)
        with pytest.raises(ConnectionError, match=r"busy \(HTTP 429\): try again later.* reports: overloaded"):
            endpoint.generate("Hi")
        assert len(server.asked("/v1/completions")) == 3


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT", "date": "Fri, 31 Dec 1999 23:59:49 GMT"}, 10),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT", "date": "Sat, 01 Jan 2000 00:00:09 GMT"}, 0),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT", "date": "today"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-5"}, None),
    ],
)
def test_a_date_to_wait_for_is_read_by_the_clock_of_the_server(headers, seconds):
    assert http_error(503, "wait", "http://host", headers).retry_after == seconds


def test_the_endpoint_says_how_long_to_wait():
    busy = as_reply({"error": "wait"}, 429, **{"retry-after": "0.3"})
    with scripted(answering(busy, Reply(DONE))) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        start = time.perf_counter()
        endpoint.generate("Hi")
        assert time.perf_counter() - start >= 0.3


@pytest.mark.parametrize(
    ("status", "error", "match"),
    [
        (400, ValueError, "refused the request .HTTP 400.*reports: no"),
        (401, PermissionError, "refused the key .HTTP 401.: pass token="),
        (404, LookupError, "has no such model or path"),
        (500, ConnectionError, "the endpoint failed .HTTP 500"),
    ],
)
@pytest.mark.parametrize("as_event", [False, True])
def test_any_other_refusal_is_final_and_named(status, error, match, as_event):
    content = {"error": {"message": "no", "code": status}}
    with scripted(answering(Reply([event(content)]) if as_event else as_reply(content, status))) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        with pytest.raises(error, match=match):
            endpoint.generate("Hi")
        assert len(server.asked("/v1/completions")) == 1


def test_nothing_is_begun_again_once_a_piece_has_come():
    attempts = []

    async def attempt():
        attempts.append("one")
        yield "piece"
        raise protocol.Unavailable("busy")

    async def collect():
        return [item async for item in protocol.retry_stream(attempt, Connection(None, 1, retries=3, deadline=1))]

    # In a thread of its own: tests in a browser leave a running loop in this one.
    with ThreadPoolExecutor(1) as thread, pytest.raises(ConnectionError, match="busy"):
        thread.submit(asyncio.run, collect()).result()
    assert attempts == ["one"]


def test_a_server_that_falls_silent_is_a_timeout():
    with scripted(answering(Reply(DONE, silence=3))) as server:
        endpoint = fk.connect(f"{server.address}/v1", timeout=0.5)
        with pytest.raises(TimeoutError, match=r"sent nothing for 0\.5 s: give a longer timeout="):
            endpoint.generate("Hi")


def test_a_missing_chat_template_is_answered_with_the_formats_of_the_kit():
    message = "you must provide a chat template if the tokenizer does not define one."
    error = failures.http_error(400, message, "http://h/v1", {})
    assert "(HTTP 400): connect with chat='hub' or 'falcon', and the kit renders the conversation." in str(error)


@pytest.mark.parametrize(
    ("message", "shorter"),
    [
        ("This model's maximum context length is 2048 tokens. However, you requested 3000", True),
        ("`inputs` tokens + `max_new_tokens` must be <= 2048. Given: 3000 and 20", True),
        ("the request exceeds the available context size", True),
        ("Unexpected token in JSON", False),
        ("top_logprobs: 20 tokens are the most", False),
        ("no such field: length_penalty", False),
    ],
)
def test_a_shorter_prompt_is_advised_only_where_it_is_too_long(message, shorter):
    assert ("shorten the prompt" in str(failures.http_error(400, message, "http://h/v1", {}))) == shorter
