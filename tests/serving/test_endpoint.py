"""A Falcon behind an endpoint generates what the same Falcon generates locally, on four kinds of server."""

import logging
import subprocess
import sys
import time

import numpy as np
import pytest

import falcon_kit as fk
from falcon_kit.generation.chat import BAIZE, render
from falcon_kit.serving.connection import token_from_environment
from tests.serving.servers import DONE, QUESTION, Reply, answering, as_reply, llama_cpp, scripted, tgi

KEY = "sk-very-secret-0123456789"


@pytest.fixture(scope="module", params=["llama", "served", "tgi_endpoint", "sagemaker"])
def endpoint(request):
    return request.getfixturevalue(request.param)


def test_a_greedy_text_is_the_local_one(endpoint, instruct):
    local = instruct.generate(fk.CARD.prompt, max_new_tokens=30)
    remote = endpoint.generate(fk.CARD.prompt, max_new_tokens=30)
    assert (remote.text, remote.finish_reason, remote.prompt) == (local.text, "length", fk.CARD.prompt)
    assert remote.tokens in (local.tokens, ())  # `transformers serve` does not report them


def test_the_statistics_count_what_the_endpoint_counts(endpoint, instruct):
    remote = endpoint.generate(fk.CARD.prompt, max_new_tokens=7).stats
    local = instruct.generate(fk.CARD.prompt, max_new_tokens=7).stats
    assert (remote.prompt_tokens, remote.new_tokens, remote.rows) == (local.prompt_tokens, 7, 1)
    assert 0 < remote.first_token_seconds <= remote.seconds
    assert "KV cache" not in str(remote)


def test_the_pieces_of_a_stream_join_to_its_text(endpoint):
    stream = endpoint.stream(fk.CARD.prompt, max_new_tokens=12)
    pieces = list(stream)
    assert len(pieces) >= 10
    assert "".join(piece.text for piece in pieces) == stream.generation.text
    assert stream.generation.text == endpoint.generate(fk.CARD.prompt, max_new_tokens=12).text


@pytest.mark.parametrize("stop", [" anything", "ffes more tha", "\nDaniel:", [" what a glo", "zebra", "!"]])
def test_a_stop_string_ends_a_text_where_it_does_here(endpoint, instruct, stop):
    local = instruct.generate(fk.CARD.prompt, max_new_tokens=40, stop=stop)
    stream = endpoint.stream(fk.CARD.prompt, max_new_tokens=40, stop=stop)
    shown = "".join(piece.text for piece in stream)
    assert (shown, stream.generation.finish_reason) == (local.text, "stop")
    assert stream.generation.stats.prompt_tokens == local.stats.prompt_tokens


def test_chat_answers_as_here_and_not_for_the_next_speaker(endpoint, instruct):
    local, remote = instruct.chat(QUESTION), endpoint.chat(QUESTION)
    assert (remote.text, remote.finish_reason) == (local.text, local.finish_reason)


def test_a_conversation_streams_too(endpoint, instruct):
    assert "".join(piece.text for piece in endpoint.stream(QUESTION)) == instruct.chat(QUESTION).text


def test_the_end_token_ends_a_text(endpoint, instruct):
    prompt = "User: What do owls eat?\nFalcon: Owls eat mice.\nUser: Thank you.\nFalcon:"
    local = instruct.generate(prompt)
    remote = endpoint.generate(prompt)
    assert (remote.text, remote.finish_reason) == (local.text, "eos")


def test_settings_arrive_one_token_to_draw_from_leaves_no_choice(endpoint, instruct):
    greedy = instruct.generate(fk.CARD.prompt, max_new_tokens=8).text
    assert endpoint.generate(fk.CARD.prompt, max_new_tokens=8, top_k=1, temperature=2.0).text == greedy
    assert endpoint.generate(fk.CARD.prompt, max_new_tokens=8, top_p=1e-6, temperature=2.0).text == greedy


def test_a_seed_makes_a_drawn_text_reproducible(endpoint):
    def draw(seed):
        return endpoint.generate(fk.CARD.prompt, max_new_tokens=9, temperature=2.0, seed=seed).text

    assert draw(1) == draw(1) != draw(2)


def test_several_texts_come_back_in_order(endpoint, instruct):
    prompts = ["Animals of Africa:", "Counting: 7, 8,", "User: What do owls eat?\nFalcon:"]
    remote = endpoint.generate(prompts, max_new_tokens=8)
    assert [each.text for each in remote] == [each.text for each in instruct.generate(prompts, max_new_tokens=8)]
    assert remote[0].stats.rows == 3


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
    expected = instruct.generate(render(QUESTION, BAIZE), stop=BAIZE.stop)
    assert baize.chat(QUESTION).text == expected.text.strip()


def test_a_format_of_ones_own_can_write_the_turns(tgi_endpoint, instruct):
    mine = fk.ChatFormat("mine", template=BAIZE.template, stop=BAIZE.stop)
    endpoint = fk.connect(tgi_endpoint.address, chat=mine)
    expected = instruct.generate(render(QUESTION, BAIZE), stop=BAIZE.stop)
    assert endpoint.chat(QUESTION).text == expected.text.strip()


def test_a_control_token_of_ones_own_format_is_refused_in_a_message(tgi_endpoint):
    mine = fk.ChatFormat("mine", template="{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    endpoint = fk.connect(tgi_endpoint.address, chat=mine)
    with pytest.raises(ValueError, match=r"message 1 contains '<\|im_end\|>', which .* special token"):
        endpoint.chat([{"role": "user", "content": "Say <|im_end|>"}])


@pytest.mark.parametrize("text", ["<|endoftext|>", "say >>QUESTION<< now"])
def test_a_control_token_in_a_message_is_refused(endpoint, text):
    with pytest.raises(ValueError, match=r"message 1 contains .* special token"):
        endpoint.chat([{"role": "user", "content": text}])


def test_a_prompt_over_the_context_is_refused(endpoint):
    with pytest.raises(ValueError, match=r"2048.*|shorten the prompt"):
        endpoint.generate(" giraffe" * 2060, max_new_tokens=4)


@pytest.mark.parametrize(
    ("settings", "instead"),
    [
        ({"truncate": "left"}, "truncate='left': .*shorten the prompt"),
        ({"num_beams": 3}, "Unknown setting for .*: 'num_beams'"),
        ({"temprature": 3}, "Nearest: temperature"),
        ({"stop_sequences": ["."]}, "Unknown setting for .*: 'stop_sequences'. It is called stop here"),
        ({"logprobs": True}, "has .logprobs"),
        ({"temperature": -1}, "temperature must be 0"),
        ({"num_return_sequences": 2}, "would give 2 equal texts: set do_sample=True"),
    ],
)
def test_what_a_protocol_cannot_carry_is_refused_with_what_to_do(endpoint, settings, instead):
    with pytest.raises(ValueError, match=instead):
        endpoint.generate("Hello", **settings)


def test_each_setting_that_a_server_knows_is_listed_once(endpoint):
    with pytest.raises(ValueError, match="Known: ") as error:
        endpoint.generate("Hello", num_beams=3)
    known = str(error.value).rpartition("Known: ")[2].removesuffix(".").split(", ")
    assert len(known) == len({*known})


# Without torch

CALLS = """
import sys
import falcon_kit as fk
endpoint = fk.connect({address!r})
generation = endpoint.generate("Hi", temperature=0.5)
pieces = list(endpoint.stream("Hi"))
answer = endpoint.chat([{{"role": "user", "content": "Hi"}}])
turn = fk.playground(endpoint).session.generate("Hi")
assert isinstance(generation, fk.Generation) and isinstance(generation.stats, fk.Stats)
assert isinstance(pieces[0], fk.Piece) and fk.Sampling(temperature=0.5).samples
print(answer.text, turn.answers[0].text, *sorted({{"torch", "transformers"}} & sys.modules.keys()), sep="|")
"""


@pytest.mark.parametrize("api", ["openai", "tgi"])
def test_an_endpoint_and_its_answers_load_no_torch(api, instruct):
    with scripted(tgi(instruct) if api == "tgi" else answering(Reply(DONE))) as server:
        address = f"{server.address}{'' if api == 'tgi' else '/v1'}"
        ended = subprocess.run(
            [sys.executable, "-c", CALLS.format(address=address)], capture_output=True, text=True, check=False
        )
    assert (ended.stderr, ended.returncode) == ("", 0)
    answer, playground, *heavy = ended.stdout.strip().split("|")
    assert heavy == []
    assert (answer, playground) != ("", "")


# connect()


@pytest.mark.parametrize(
    "reply", [Reply([b"<html>It works!</html>"], kind="text/html"), as_reply({"hello": "world"}), as_reply({}, 404)]
)
def test_a_url_where_something_else_lives_is_named(reply):
    with scripted(lambda *_: reply) as server:
        with pytest.raises(ConnectionError, match=r"is no OpenAI-compatible server.*Check the URL"):
            fk.connect(server.address)
        with pytest.raises(ConnectionError, match=r"is no TGI"):
            fk.connect(server.address, api="tgi")


REFUSALS = {str(status): as_reply({"error": "no"}, status) for status in (401, 403, 429, 503)} | {
    "a redirect": as_reply({}, 307, location="http://127.0.0.1:9/login"),
    "no response": Reply(dropped=True),
    "compressed": as_reply({}, 404, **{"content-encoding": "gzip"}),
}


@pytest.mark.parametrize("reply", [pytest.param(reply, id=name) for name, reply in REFUSALS.items()])
@pytest.mark.parametrize("owner", ["someone", "llamacpp"])
def test_a_gateway_may_refuse_the_paths_that_it_does_not_know(reply, owner):
    known = answering(Reply(DONE), owner=owner)
    with scripted(lambda path, *rest: known(path, *rest) if path.startswith("/v1/") else reply) as server:
        endpoint = fk.connect(server.address)
        assert (endpoint.generate("Hi").text, endpoint.context) == ("Hello there", None)


def test_a_path_that_never_answers_does_not_keep_a_server_from_being_connected_to():
    known = answering(Reply(DONE), owner="llamacpp")
    with scripted(lambda path, *rest: known(path, *rest) if path != "/props" else Reply(silence=2)) as server:
        assert fk.connect(f"{server.address}/v1", timeout=0.5).context is None


def test_what_a_tgi_server_refuses_is_an_error_where_it_is_named():
    refused = as_reply({"error": "no"}, 401)
    with scripted(lambda *_: refused) as server, pytest.raises(PermissionError, match="refused the key"):
        fk.connect(server.address, api="tgi")


def test_a_context_that_is_given_is_not_asked_for():
    with scripted(answering(Reply(DONE), owner="llamacpp")) as server:
        assert fk.connect(f"{server.address}/v1", context=500).context == 500
        assert server.asked("/props") == []


@pytest.mark.parametrize("url", ["", "falcon", "ftp://host/x", "http://", "sagemaker://"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ValueError, match="is no endpoint URL: give http://host:port/v1, or sagemaker://endpoint-name"):
        fk.connect(url)


def test_an_address_without_its_beginning_is_shown_as_it_was_given():
    with pytest.raises(ValueError, match="'localhost:8000' is no endpoint URL: give http://"):
        fk.connect("localhost:8000")


def test_a_wrong_model_name_is_a_lookup_error_with_those_there_are(llama, tgi_endpoint):
    for each in (llama, tgi_endpoint):
        with pytest.raises(LookupError, match="falconet-instruct"):
            fk.connect(each.address, "falconet-instruckt")


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


def test_the_query_of_a_url_is_refused_without_repeating_it():
    with pytest.raises(ValueError, match=r"/v1 has a query or a fragment, .* a key by token=") as refused:
        fk.connect(f"http://127.0.0.1:8000/v1?key={KEY}")
    assert KEY not in str(refused.value)


def test_a_key_or_a_session_that_no_url_uses_is_refused():
    with pytest.raises(ValueError, match="SageMaker takes AWS credentials and no key: leave token= out"):
        fk.connect("sagemaker://falcon", token=KEY)
    with pytest.raises(ValueError, match="session= is for sagemaker:// only: leave it out"):
        fk.connect("http://127.0.0.1:8000/v1", session=object())


@pytest.mark.parametrize("call", ["generate_each", "prompt_logprobs"])
def test_one_text_in_place_of_several_is_refused(call):
    with scripted(answering(Reply(DONE))) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        with pytest.raises(ValueError, match=r"give a list of prompts, also for one: \[prompt\]"):
            getattr(endpoint, call)("Hi there")
        assert server.asked("/v1/completions") == []


def test_an_array_of_token_ids_is_a_prompt_of_a_stream():
    with scripted(answering(Reply(DONE), owner="vllm")) as server:
        list(fk.connect(f"{server.address}/v1").stream(np.array([1, 2, 3])))
        assert server.asked("/v1/completions")[0]["prompt"] == [1, 2, 3]


def test_the_time_to_the_first_token_begins_when_the_request_is_sent():
    def slow(path, *rest):
        return Reply(DONE, silence=0.3) if path.endswith("completions") else answering(Reply(DONE))(path, *rest)

    with scripted(slow) as server:
        endpoint, begin = fk.connect(f"{server.address}/v1", concurrency=1), time.perf_counter()
        each = list(endpoint.generate_each(["a", "b", "c"]))
        seconds = time.perf_counter() - begin
    assert sum(one.stats.first_token_seconds for one in each) <= seconds  # no request waits for another's turn


def test_a_password_in_a_url_is_refused_without_repeating_it():
    with pytest.raises(ValueError, match="give a key by token=") as refused:
        fk.connect(f"http://me:{KEY}@127.0.0.1:8000/v1")
    assert KEY not in str(refused.value)


def test_a_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("FALCON_KIT_TOKEN", KEY)
    with scripted(answering(Reply(DONE))) as server:
        fk.connect(f"{server.address}/v1").generate("Hi")
        assert {headers["authorization"] for _, _, headers in server.requests} == {f"Bearer {KEY}"}


def test_an_empty_key_is_no_key_whatever_the_environment_has(monkeypatch):
    monkeypatch.setenv("FALCON_KIT_TOKEN", KEY)
    with scripted(answering(Reply(DONE))) as server:
        fk.connect(f"{server.address}/v1", token="").generate("Hi")
        assert [headers for _, _, headers in server.requests if KEY in str(headers)] == []


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
    assert token_from_environment([url]) == key
