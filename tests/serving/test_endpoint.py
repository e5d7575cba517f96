"""A Falcon behind an endpoint writes what the same Falcon writes here; and when it does not, one is told why."""

import asyncio
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

import falcon_kit as fk
from falcon_kit.generation.text import cut
from falcon_kit.serving import protocol
from falcon_kit.serving.endpoint import _token
from falcon_kit.serving.protocol import Delta, Request
from falcon_kit.serving.stream import Answer
from tests.serving.servers import (
    Reply,
    as_reply,
    event,
    frame,
    free_port,
    llama_cpp,
    part,
    scripted,
    tgi,
    tgi_events,
    tgi_refusal,
    transformers_serve,
)

QUESTION = [{"role": "user", "content": "What do giraffes eat?"}]
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses between attempts are short, and nobody's key is around."""
    monkeypatch.setattr(protocol, "FIRST_PAUSE", 0.01)
    for name in ("FALCON_KIT_TOKEN", "HF_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


# Real servers, each with Falconet


@pytest.fixture(scope="module")
def gguf(instruct, tmp_path_factory):
    return fk.export_gguf(instruct, tmp_path_factory.mktemp("gguf") / "falconet-instruct.gguf")


@pytest.fixture(scope="module")
def llama(gguf):
    server, address = llama_cpp(gguf, n_parallel=2, n_ctx=4096)
    yield fk.connect(address)
    del server


@pytest.fixture(scope="module")
def served(instruct, tmp_path_factory):
    directory = tmp_path_factory.mktemp("served") / "falconet-instruct"
    instruct.model.save_pretrained(directory)
    instruct.tokenizer.save_pretrained(directory)
    with transformers_serve(directory) as address:
        yield fk.connect(address, str(directory))


@pytest.fixture(scope="module")
def tgi_endpoint(instruct):
    with scripted(tgi(instruct)) as server:
        yield fk.connect(server.address)


@pytest.fixture(scope="module")
def sagemaker_service(instruct):
    """moto's control plane with an endpoint in service, and a runtime that streams TGI's events over it."""
    pytest.importorskip("moto.server")
    from moto.server import ThreadedMotoServer

    def runtime(path, body, _):
        assert path == "/endpoints/falcon/invocations-response-stream"
        if wrong := tgi_refusal(instruct, body):
            return refusal(422, f"Input validation error: {wrong}")
        lines = b"".join(b"data:" + json.dumps(each).encode() + b"\n\n" for each in tgi_events(instruct, body))
        return Reply(
            [part(lines[at : at + 50]) for at in range(0, len(lines), 50)], kind="application/vnd.amazon.eventstream"
        )

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    with scripted(runtime) as server, pytest.MonkeyPatch.context() as patch:
        host, port = moto.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", f"http://{host}:{port}")
        patch.setenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", server.address)
        for name, value in {"REGION": "eu-west-1", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            patch.setenv(f"AWS_{name}", value)
        patch.delenv("AWS_DEFAULT_REGION", raising=False)
        deploy("falcon")
        yield server
    moto.stop()


def refusal(status, text):
    """SageMaker's answer when the container has refused."""
    content = {
        "OriginalStatusCode": status,
        "OriginalMessage": json.dumps({"error": text}),
        "Message": "Received an error",
    }
    return as_reply(content, 424, **{"x-amzn-errortype": "ModelError"})


def deploy(name):
    import boto3

    client = boto3.client("sagemaker", region_name="eu-west-1")
    role = "arn:aws:iam::123456789012:role/sagemaker"
    client.create_model(ModelName=name, ExecutionRoleArn=role, PrimaryContainer={"Image": "djl-inference"})
    variant = {"VariantName": "all", "ModelName": name, "InstanceType": "ml.p3.8xlarge", "InitialInstanceCount": 1}
    client.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant])
    client.create_endpoint(EndpointName=name, EndpointConfigName=name)


@pytest.fixture(scope="module")
def sagemaker(sagemaker_service):
    return fk.connect("sagemaker://falcon", "falconet-instruct")


@pytest.fixture(scope="module", params=["llama", "served", "tgi_endpoint", "sagemaker"])
def endpoint(request):
    return request.getfixturevalue(request.param)


def test_a_greedy_text_is_the_local_one(endpoint, instruct):
    here = instruct.generate(fk.CARD.prompt, max_new_tokens=30)
    there = endpoint.generate(fk.CARD.prompt, max_new_tokens=30)
    assert (there.text, there.finish_reason, there.prompt) == (here.text, "length", fk.CARD.prompt)
    assert there.tokens in (here.tokens, ())  # `transformers serve` does not tell


def test_the_statistics_count_what_the_endpoint_counts(endpoint, instruct):
    there = endpoint.generate(fk.CARD.prompt, max_new_tokens=7).stats
    here = instruct.generate(fk.CARD.prompt, max_new_tokens=7).stats
    assert (there.prompt_tokens, there.new_tokens, there.rows) == (here.prompt_tokens, 7, 1)
    assert 0 < there.first_token_seconds <= there.seconds
    assert "KV cache" not in str(there)


def test_the_pieces_of_a_stream_join_to_its_text(endpoint):
    stream = endpoint.stream(fk.CARD.prompt, max_new_tokens=12)
    pieces = list(stream)
    assert len(pieces) >= 10
    assert "".join(piece.text for piece in pieces) == stream.generation.text
    assert stream.generation.text == endpoint.generate(fk.CARD.prompt, max_new_tokens=12).text


@pytest.mark.parametrize("stop", [" anything", "ffes more tha", "\nDaniel:", [" what a glo", "zebra", "!"]])
def test_a_stop_string_ends_a_text_where_it_does_here(endpoint, instruct, stop):
    here = instruct.generate(fk.CARD.prompt, max_new_tokens=40, stop=stop)
    stream = endpoint.stream(fk.CARD.prompt, max_new_tokens=40, stop=stop)
    shown = "".join(piece.text for piece in stream)
    assert (shown, stream.generation.finish_reason) == (here.text, "stop")
    assert stream.generation.stats.prompt_tokens == here.stats.prompt_tokens


def test_chat_answers_as_here_and_not_for_the_next_speaker(endpoint, instruct):
    here, there = instruct.chat(QUESTION), endpoint.chat(QUESTION)
    assert (there.text, there.finish_reason) == (here.text, here.finish_reason)


def test_a_conversation_streams_too(endpoint, instruct):
    assert "".join(piece.text for piece in endpoint.stream(QUESTION)) == instruct.chat(QUESTION).text


def test_the_end_token_ends_a_text(endpoint, instruct):
    prompt = "User: What do owls eat?\nFalcon: Owls eat mice.\nUser: Thank you.\nFalcon:"
    here = instruct.generate(prompt)
    there = endpoint.generate(prompt)
    assert (there.text, there.finish_reason) == (here.text, "eos")


def test_settings_arrive_one_token_to_draw_from_leaves_no_choice(endpoint, instruct):
    greedy = instruct.generate(fk.CARD.prompt, max_new_tokens=8).text
    assert endpoint.generate(fk.CARD.prompt, max_new_tokens=8, top_k=1, temperature=3.0).text == greedy
    assert endpoint.generate(fk.CARD.prompt, max_new_tokens=8, top_p=1e-6, temperature=3.0).text == greedy


def test_a_seed_makes_a_drawn_text_reproducible(endpoint):
    def draw(seed):
        return endpoint.generate(fk.CARD.prompt, max_new_tokens=9, temperature=2.0, seed=seed).text

    assert draw(1) == draw(1) != draw(2)


def test_several_texts_come_back_in_order(endpoint, instruct):
    prompts = ["Animals of Africa:", "Counting: 7, 8,", "User: What do owls eat?\nFalcon:"]
    there = endpoint.generate(prompts, max_new_tokens=8)
    assert [each.text for each in there] == [each.text for each in instruct.generate(prompts, max_new_tokens=8)]
    assert there[0].stats.rows == 3


def test_several_sequences_have_seeds_of_their_own(llama):
    texts = [
        each.text for each in llama.generate("Once", temperature=2.0, seed=5, num_return_sequences=3, max_new_tokens=12)
    ]
    assert len(set(texts)) == 3
    assert texts[1] == llama.generate("Once", temperature=2.0, seed=6, max_new_tokens=12).text


def test_log_probabilities_are_the_models(llama, instruct):
    here = instruct.generate(fk.CARD.prompt, max_new_tokens=20)
    for there in (llama.generate(fk.CARD.prompt, max_new_tokens=20), llama.stream(fk.CARD.prompt, max_new_tokens=20)):
        logprobs = there.logprobs if isinstance(there, fk.Generation) else [piece.logprob for piece in there]
        assert logprobs == pytest.approx(here.logprobs, abs=0.01)


def test_without_a_limit_a_draw_is_from_the_whole_vocabulary(llama):
    # llama.cpp on its own would draw among 40 tokens, and among those above 5% of the likeliest
    answers = llama.generate("Once upon", temperature=50.0, max_new_tokens=1, num_return_sequences=80, seed=0)
    assert len({each.tokens for each in answers}) > 41


def test_token_ids_are_a_prompt_where_the_server_takes_them(llama, served, instruct):
    ids = instruct.tokenizer(fk.CARD.prompt)["input_ids"]
    assert llama.generate(ids, max_new_tokens=9).text == instruct.generate(ids, max_new_tokens=9).text
    with pytest.raises(ValueError, match="transformers serve takes no token ids for a prompt: give the text"):
        served.generate(ids)


def test_an_endpoint_says_what_it_knows(llama, served, tgi_endpoint, sagemaker):
    facts = [
        (each.server, each.context, each.model.rpartition("/")[2]) for each in (llama, served, tgi_endpoint, sagemaker)
    ]
    names = ["llama.cpp", "transformers serve", "TGI", "SageMaker (tgi)"]
    assert facts == [(name, 2048, "falconet-instruct") for name in names]
    assert all(each.spec.layers == 6 for each in (llama, served, tgi_endpoint, sagemaker))
    assert repr(llama) == f"Endpoint(falconet-instruct at {llama.address}, llama.cpp, context 2048)"
    assert "llama.cpp" in llama._repr_html_()


def test_the_kits_format_can_write_the_turns(llama, instruct):
    baize = fk.connect(llama.address, chat="baize")
    from falcon_kit.generation.chat import BAIZE, render

    expected = instruct.generate(render(QUESTION, BAIZE), stop=BAIZE.stop)
    assert baize.chat(QUESTION).text == expected.text.strip()


@pytest.mark.parametrize("text", ["<|endoftext|>", "say >>QUESTION<< now"])
def test_a_control_token_in_a_message_is_refused(endpoint, text):
    with pytest.raises(ValueError, match=r"message 1 spells out .* control token"):
        endpoint.chat([{"role": "user", "content": text}])


def test_a_prompt_over_the_context_is_refused(endpoint):
    with pytest.raises(ValueError, match=r"2048.*|shorten the prompt"):
        endpoint.generate(" giraffe" * 2060, max_new_tokens=4)


@pytest.mark.parametrize(
    ("settings", "instead"),
    [
        ({"max_length": 50}, "max_length=50: .* counted where the model is; give max_new_tokens"),
        ({"truncate": "left"}, "truncate='left': .*shorten the prompt"),
        ({"num_beams": 3}, "Unknown setting for .*: 'num_beams'"),
        ({"temprature": 3}, "Nearest: temperature"),
        ({"temperature": -1}, "temperature must be 0"),
        ({"num_return_sequences": 2}, "would give 2 equal texts: set do_sample=True"),
    ],
)
def test_what_a_protocol_cannot_carry_is_refused_with_what_to_do(endpoint, settings, instead):
    with pytest.raises(ValueError, match=instead):
        endpoint.generate("Hello", **settings)


def test_a_setting_that_no_protocol_knows_yet_is_refused_and_not_dropped():
    @dataclass(frozen=True, kw_only=True)
    class Later(fk.Sampling):
        new: int = 0

    protocol.map_settings(Request("Hello", (), Later(), {}, ()), "vLLM", {})
    with pytest.raises(ValueError, match="vLLM has no field for new=3: leave it out"):
        protocol.map_settings(Request("Hello", (), Later(new=3), {}, ()), "vLLM", {})


# Ending it


@pytest.fixture
def endless():
    """A server that never comes to an end."""
    with scripted(answering(iter(lambda: (time.sleep(0.01), chunk(" word"))[1], None))) as server:
        yield server


def test_closing_a_stream_closes_the_connection(endless):
    stream = fk.connect(f"{endless.address}/v1").stream("Hello")
    next(stream)
    stream.close()
    assert endless.hung_up.wait(5)
    assert stream.generation.finish_reason == "cancelled"
    assert list(stream) == []


def test_a_stream_that_is_dropped_closes_the_connection(endless):
    stream = fk.connect(f"{endless.address}/v1").stream("Hello")
    next(stream)
    del stream
    gc.collect()
    assert endless.hung_up.wait(5)


@pytest.mark.parametrize("how", ["generate", "stream"])
def test_ctrl_c_closes_the_connection(endless, how):
    endpoint = fk.connect(f"{endless.address}/v1")
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        list(getattr(endpoint, how)("Hi"))
    assert endless.hung_up.wait(5)


def test_an_interpreter_that_ends_does_not_wait_for_a_stream(endless):
    code = (
        f"import falcon_kit as fk; stream = fk.connect({endless.address + '/v1'!r}).stream('Hi'); print(next(stream))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ("Piece" in ended.stdout, ended.stderr) == (True, "")


def test_closing_a_stream_frees_llama_cpp(llama):
    stream = llama.stream("Once upon a time", max_new_tokens=1900, temperature=1.0)
    next(stream)
    stream.close()
    assert is_idle(llama)


def is_idle(llama):
    """Whether llama.cpp ends all work within a second."""
    for _ in range(20):
        slots = httpx2.get(f"{llama.address.removesuffix('/v1')}/slots").json()
        if not any(slot["is_processing"] for slot in slots):
            return True
        time.sleep(0.05)
    return False


def test_a_stream_can_be_closed_by_another_thread_before_its_first_piece():
    with scripted(answering(Reply([chunk("late")] * 2, silence=20))) as server:
        stream = fk.connect(f"{server.address}/v1").stream("Hello")
        threading.Timer(0.2, stream.close).start()
        start = time.perf_counter()
        assert list(stream) == []
        assert time.perf_counter() - start < 5
        assert stream.generation.text == ""


def test_a_stop_string_hangs_up_on_a_server_that_would_go_on(endless):
    answer = fk.connect(f"{endless.address}/v1").generate("Hello", stop="word word")
    assert (answer.text, answer.finish_reason) == (" ", "stop")
    assert endless.hung_up.wait(5)


def test_a_stream_has_no_generation_before_it_ends(llama):
    stream = llama.stream("Once", max_new_tokens=1900, temperature=1.0)
    with pytest.raises(RuntimeError, match="not ended yet"):
        _ = stream.generation
    stream.close()


# Servers that misbehave


def chunk(text, finish=None, **more):
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish}], **more})


def answering(*replies, owner="someone", models=("falcon",), **entry):
    """A script of an OpenAI-compatible server that gives these replies to completions, one after the other."""
    left = list(replies)

    def script(path, body, headers):
        if path == "/v1/models":
            return as_reply({"data": [{"id": each, "owned_by": owner, **entry} for each in models]})
        if path in ("/v1/completions", "/v1/chat/completions"):
            return left.pop(0) if len(left) > 1 else left[0]
        return as_reply({"error": "not found"}, 404)

    return script


DONE = [chunk("Hello"), chunk(" there", "stop"), b"data: [DONE]\n\n"]


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


def test_an_endpoint_that_stays_busy_is_given_up():
    with scripted(answering(as_reply({"error": {"message": "overloaded"}}, 429))) as server:
        endpoint = fk.connect(f"{server.address}/v1", retries=2)
        with pytest.raises(ConnectionError, match=r"busy \(HTTP 429\): try again later.* says: overloaded"):
            endpoint.generate("Hi")
        assert len(server.asked("/v1/completions")) == 3


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
        (400, ValueError, "refused the request .HTTP 400.*says: no"),
        (401, PermissionError, "refused the key .HTTP 401.: pass token="),
        (404, LookupError, "knows no such model or path"),
        (500, ConnectionError, "the endpoint failed .HTTP 500"),
    ],
)
def test_any_other_refusal_is_final_and_named(status, error, match):
    with scripted(answering(as_reply({"error": {"message": "no"}}, status))) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        with pytest.raises(error, match=match):
            endpoint.generate("Hi")
        assert len(server.asked("/v1/completions")) == 1


BREAKS = {
    "connection cut": Reply([chunk("Half a"), chunk(" sentence")], cut=True),
    "error in the stream": Reply([chunk("Half a"), chunk(" sentence"), event({"error": {"message": "out of memory"}})]),
    "end without a reason": Reply([chunk("Half a"), chunk(" sentence")]),
    "not JSON": Reply([chunk("Half a"), chunk(" sentence"), b"data: {broken\n\n"]),
}


@pytest.mark.parametrize("reply", [pytest.param(reply, id=name) for name, reply in BREAKS.items()])
def test_an_answer_that_breaks_off_keeps_its_text_and_is_not_begun_again(reply):
    with scripted(answering(reply)) as server:
        stream = fk.connect(f"{server.address}/v1").stream("Hi")
        shown: list[str] = []
        with pytest.raises(fk.IncompleteAnswer, match=r"broke off after 15|without saying why, after 15") as broken:
            shown.extend(piece.text for piece in stream)
        assert "".join(shown) == "Half a sentence"
        assert (broken.value.generation.text, broken.value.generation.finish_reason) == ("Half a sentence", "broken")
        assert stream.generation.finish_reason == "broken"
        assert len(server.asked("/v1/completions")) == 1


def test_nothing_is_begun_again_once_a_piece_has_come():
    attempts = []

    async def attempt():
        attempts.append("one")
        yield "piece"
        raise protocol.Unavailable("busy")

    async def collect():
        return [item async for item in protocol.retry_stream(attempt, retries=3)]

    # In a thread of its own: tests in a browser leave a running loop in this one.
    with ThreadPoolExecutor(1) as thread, pytest.raises(ConnectionError, match="busy"):
        thread.submit(asyncio.run, collect()).result()
    assert attempts == ["one"]


def test_a_text_that_breaks_off_is_kept_without_a_stream_too():
    with scripted(answering(BREAKS["connection cut"])) as server:
        with pytest.raises(fk.IncompleteAnswer) as broken:
            fk.connect(f"{server.address}/v1").generate("Hi")
        assert broken.value.generation.text == "Half a sentence"


def test_a_server_that_falls_silent_is_a_timeout():
    with scripted(answering(Reply(DONE, silence=3))) as server:
        endpoint = fk.connect(f"{server.address}/v1", timeout=0.5)
        with pytest.raises(TimeoutError, match=r"has not said a word for 0\.5 s: give a longer timeout="):
            endpoint.generate("Hi")


def test_a_server_that_falls_silent_in_the_middle_breaks_off():
    def halting():
        yield chunk("Half")
        time.sleep(3)

    with scripted(answering(halting())) as server:
        with pytest.raises(fk.IncompleteAnswer, match="has not said a word") as broken:
            fk.connect(f"{server.address}/v1", timeout=0.3).generate("Hi")
        assert broken.value.generation.text == "Half"


@pytest.mark.parametrize(
    "reply", [Reply([b"<html>It works!</html>"], kind="text/html"), as_reply({"hello": "world"}), as_reply({}, 404)]
)
def test_a_url_where_something_else_lives_is_named(reply):
    with scripted(lambda *_: reply) as server:
        with pytest.raises(ConnectionError, match=r"does not speak the OpenAI protocol.*Check the URL"):
            fk.connect(server.address)
        with pytest.raises(ConnectionError, match=r"is no TGI"):
            fk.connect(server.address, api="tgi")


def test_an_answer_that_is_not_the_protocol_is_named():
    with scripted(answering(Reply([b"<html>Sign in</html>"], kind="text/html"))) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        with pytest.raises(ConnectionError, match="answered, but not in the protocol"):
            endpoint.generate("Hi")


@pytest.mark.parametrize("url", ["", "falcon", "ftp://host/x", "http://", "sagemaker://"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ValueError, match="is no endpoint: give http://host:port/v1, or sagemaker://endpoint-name"):
        fk.connect(url)


def test_an_address_without_its_beginning_is_shown_as_it_was_given():
    with pytest.raises(ValueError, match="'localhost:8000' is no endpoint: give http://"):
        fk.connect("localhost:8000")


def test_a_wrong_model_name_is_a_lookup_error_with_those_there_are(llama, tgi_endpoint):
    for each in (llama, tgi_endpoint):
        with pytest.raises(LookupError, match="falconet-instruct"):
            fk.connect(each.address, "falconet-instruckt")


def test_one_of_several_models_has_to_be_named():
    with scripted(answering(Reply(DONE), models=("a", "b"))) as server:
        with pytest.raises(ValueError, match="several models, pass model=, one of: a, b"):
            fk.connect(f"{server.address}/v1")
        assert fk.connect(f"{server.address}/v1", "b").model == "b"


# What is sent


def sent(path="/v1/completions", script=None, **settings):
    """The body of the request for a text with these settings."""
    with scripted(script or answering(Reply(DONE))) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        endpoint.chat(QUESTION, **settings) if "chat" in path else endpoint.generate("Hi", **settings)
        return server.asked(path)[0]


def test_a_server_of_an_unknown_kind_is_sent_the_standard_fields_only():
    body = sent(temperature=0.5, top_p=0.9, seed=3, max_new_tokens=7, stop="x")
    expected = {
        "model": "falcon",
        "prompt": "Hi",
        "max_tokens": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert body == {**expected, "temperature": 0.5, "top_p": 0.9, "seed": 3}


def test_a_server_of_an_unknown_kind_has_no_top_k():
    with pytest.raises(ValueError, match="has no field for top_k=3: give top_p instead"):
        sent(top_k=3)


def test_vllm_is_sent_its_own_fields_and_no_defaults_of_the_model():
    body = sent(script=answering(Reply(DONE), owner="vllm"), top_p=0.9, repetition_penalty=1.1, stop=["x", "y"])
    own = {
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.1,
        "include_stop_str_in_output": True,
        "return_token_ids": True,
    }
    assert own.items() <= body.items()
    assert (body["stop"], body["logprobs"], body["temperature"]) == (["x", "y"], 1, 1.0)


def test_greedy_is_temperature_zero():
    assert sent()["temperature"] == 0


def test_a_conversation_goes_to_the_endpoints_own_template():
    body = sent("/v1/chat/completions", temperature=0.5)
    assert (body["messages"], "prompt" in body) == (QUESTION, False)


def test_vllms_tokens_log_probabilities_and_late_count_are_read():
    logprobs = {"tokens": [" a", " b"], "token_logprobs": [-0.1, -0.2]}
    choice = {"index": 0, "text": " a b", "logprobs": logprobs, "token_ids": [5, 6], "finish_reason": "length"}
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    reply = Reply([event({"choices": [choice]}), event({"choices": [], "usage": usage}), b"data: [DONE]\n\n"])
    with scripted(answering(reply, owner="vllm", max_model_len=2048)) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        answer = endpoint.generate("Hi")
    assert (endpoint.server, endpoint.context) == ("vLLM", 2048)
    assert (answer.text, answer.tokens, answer.logprobs, answer.finish_reason) == (
        " a b",
        (5, 6),
        (-0.1, -0.2),
        "length",
    )
    assert (answer.stats.prompt_tokens, answer.stats.new_tokens) == (9, 2)


# The key


def test_a_refused_key_is_a_permission_error_and_the_right_one_works(gguf, instruct):
    server, address = llama_cpp(gguf, api_keys=[KEY])
    with pytest.raises(PermissionError, match="refused the key") as refused:
        fk.connect(address, token="sk-wrong-key").generate("Hi")
    assert "sk-wrong-key" not in str(refused.value)
    assert (
        fk.connect(address, token=KEY).generate("Once", max_new_tokens=5).text
        == instruct.generate("Once", max_new_tokens=5).text
    )
    del server


def test_a_key_is_never_shown(caplog):
    caplog.set_level(logging.DEBUG)
    with scripted(answering(as_reply({"error": {"message": f"Incorrect API key provided: {KEY}"}}, 401))) as server:
        endpoint = fk.connect(f"{server.address}/v1", token=KEY)
        with pytest.raises(PermissionError) as refused:
            endpoint.generate("Hi")
    shown = [
        repr(endpoint),
        endpoint._repr_html_(),
        str(refused.value),
        repr(refused.value),
        repr(vars(endpoint)),
        caplog.text,
    ]
    assert refused.value.__cause__ is None
    assert [text for text in shown if KEY in text] == []
    assert server.requests[-1][2]["authorization"] == f"Bearer {KEY}"


def test_a_key_in_the_query_of_a_url_is_never_shown(caplog):
    caplog.set_level(logging.DEBUG)
    with scripted(answering(Reply(DONE))) as server:
        endpoint = fk.connect(f"{server.address}/v1?key={KEY}")
        endpoint.generate("Hi")
        assert KEY not in repr(endpoint) + endpoint._repr_html_() + caplog.text


def test_a_password_in_a_url_is_refused_without_repeating_it():
    with pytest.raises(ValueError, match="give a key by token=") as refused:
        fk.connect(f"http://me:{KEY}@127.0.0.1:8000/v1")
    assert KEY not in str(refused.value)


def test_a_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("FALCON_KIT_TOKEN", KEY)
    with scripted(answering(Reply(DONE))) as server:
        fk.connect(f"{server.address}/v1").generate("Hi")
        assert {headers["authorization"] for _, _, headers in server.requests} == {f"Bearer {KEY}"}


def test_keys_of_others_stay_with_their_hosts(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with scripted(answering(Reply(DONE))) as server:
        fk.connect(f"{server.address}/v1").generate("Hi")
        assert "secret" not in str([headers for _, _, headers in server.requests])


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("https://huggingface.co/x", "hf_secret"),
        ("https://router.huggingface.co/v1", "hf_secret"),
        ("http://router.huggingface.co/v1", None),
        ("https://anybody.endpoints.huggingface.cloud", None),
        ("https://nothuggingface.co", None),
    ],
)
def test_the_key_of_the_hub_goes_to_the_hub_alone_and_never_in_the_clear(url, key, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert _token(url) == key


# SageMaker


def test_a_sagemaker_endpoint_that_is_not_there_is_a_lookup_error(sagemaker_service):
    with pytest.raises(LookupError, match="there is no sagemaker://nobody in this region: check name and region"):
        fk.connect("sagemaker://nobody")


def test_sagemaker_without_a_region_says_how_to_set_one(monkeypatch, tmp_path):
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"no AWS region is set: set AWS_REGION, or pass session=boto3.Session"):
        fk.connect("sagemaker://falcon")


def test_a_container_that_refuses_is_quoted(sagemaker_service, monkeypatch):
    monkeypatch.setattr(sagemaker_service, "script", lambda *_: refusal(422, "too many tokens"))
    with pytest.raises(ValueError, match=r"refused the request .HTTP 422.*says: too many tokens"):
        fk.connect("sagemaker://falcon").generate("Hi")


def test_a_busy_sagemaker_endpoint_is_asked_again(sagemaker_service, monkeypatch):
    busy = as_reply({"Message": "slow down"}, 429, **{"x-amzn-errortype": "ThrottlingException"})
    replies, script = [busy, busy], sagemaker_service.script
    monkeypatch.setattr(sagemaker_service, "script", lambda *all: replies.pop() if replies else script(*all))
    assert fk.connect("sagemaker://falcon").generate("Once", max_new_tokens=3).stats.new_tokens == 3


def test_a_sagemaker_answer_that_breaks_off_keeps_its_text(sagemaker_service, monkeypatch):
    half = part(b'data:{"token":{"id":5,"text":"Half","logprob":-0.1,"special":false}}\n\n')
    failed = frame(b'{"Message": "worker died"}', message_type="exception", exception_type="ModelStreamError")
    reply = Reply([half, failed], kind="application/vnd.amazon.eventstream")
    monkeypatch.setattr(sagemaker_service, "script", lambda *_: reply)
    with pytest.raises(fk.IncompleteAnswer, match="worker died") as broken:
        fk.connect("sagemaker://falcon").generate("Hi")
    assert broken.value.generation.text == "Half"


def test_a_vllm_container_on_sagemaker_speaks_openai(sagemaker_service, monkeypatch):
    reply = Reply([part(b"".join(DONE)[:30]), part(b"".join(DONE)[30:])], kind="application/vnd.amazon.eventstream")
    monkeypatch.setattr(sagemaker_service, "script", lambda *_: reply)
    assert fk.connect("sagemaker://falcon", api="openai").chat(QUESTION).text == "Hello there"
    assert sagemaker_service.requests[-1][1]["messages"] == QUESTION


def test_boto3_is_asked_for_by_the_name_of_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ModuleNotFoundError, match=r'need boto3: pip install "falcon-kit\[sagemaker\]"'):
        fk.connect("sagemaker://falcon")


# Chunks


@given(
    text=st.text("ab", min_size=1, max_size=12),  # few letters, so that most texts contain most stop strings
    size=st.integers(1, 3),
    stop=st.lists(st.text("ab", min_size=2, max_size=4), max_size=2),
)
def test_wherever_chunks_end_the_text_is_cut_at_the_same_place(text, size, stop):
    answer, shown = Answer("", tuple(stop), strip=False), ""
    for start in range(0, len(text), size):
        piece = answer.push(Delta(text[start : start + size], finish="eos" if start + size >= len(text) else None))
        shown += piece.text if piece else ""
        if answer.finish:
            break
    expected, stopped = cut(text, tuple(stop))
    assert (answer.text, shown, answer.finish) == (expected, expected, "stop" if stopped else "eos")
