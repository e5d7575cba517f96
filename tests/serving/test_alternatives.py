"""The most probable tokens of each step, on servers as in this process."""

import math

import pytest

import falcon_kit as fk
from falcon_kit.generation.text import Alternative
from falcon_kit.playground.state import Session
from tests.serving.servers import DONE, QUESTION, Reply, answering, event, scripted

CALLS = {
    "a text": lambda model, **settings: model.generate(fk.CARD.prompt, **settings),
    "a stream": lambda model, **settings: read(model.stream(fk.CARD.prompt, **settings)),
    "a chat": lambda model, **settings: model.chat(QUESTION, **settings),
}


def read(stream):
    """The generation of a stream, whose pieces have the same alternatives."""
    pieces = list(stream)
    assert [piece.alternatives for piece in pieces if piece.token_id is not None] == list(
        stream.generation.alternatives
    )
    return stream.generation


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in CALLS.items()])
@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("server", ["llama", "vllm_endpoint", "tgi_endpoint", "sagemaker"])
def test_alternatives_are_those_of_the_same_model_here(server, call, number, instruct, request):
    settings = {"max_new_tokens": 12, "alternatives": number}
    local, remote = call(instruct, **settings), call(request.getfixturevalue(server), **settings)
    reported = local.tokens[: len(remote.tokens)]  # llama.cpp leaves out the end token
    assert (remote.text, remote.tokens, len(remote.alternatives)) == (local.text, reported, len(reported))
    assert len(local.tokens) - len(reported) <= (server == "llama" and local.finish_reason == "eos")
    for here, there, token in zip(local.alternatives, remote.alternatives, reported, strict=False):
        assert [each.text for each in there] == [each.text for each in here]
        assert [each.logprob for each in there] == pytest.approx([each.logprob for each in here], abs=0.02)
        ids = [each.token_id for each in here]
        assert [each.token_id for each in there] == (
            [each if each == token else None for each in ids] if server == "vllm_endpoint" else ids
        )


@pytest.mark.parametrize("call", [pytest.param(CALLS[name], id=name) for name in ("a text", "a chat")])
def test_an_unlikely_token_takes_no_place_of_a_likely_one(call, vllm_endpoint, instruct):
    settings = {"max_new_tokens": 12, "alternatives": 2, "temperature": 5.0, "seed": 3}
    local, remote = call(instruct, **settings), call(vllm_endpoint, **settings)
    assert remote.tokens == local.tokens
    drawn = zip(local.tokens, local.alternatives, strict=True)
    assert any(token not in [each.token_id for each in likeliest] for token, likeliest in drawn)
    assert [[each.text for each in step] for step in remote.alternatives] == [
        [each.text for each in step] for step in local.alternatives
    ]


def test_without_alternatives_there_are_none(llama):
    assert llama.generate("Once", max_new_tokens=2).alternatives is None
    assert all(piece.alternatives == () for piece in llama.stream("Once", max_new_tokens=2))


def test_a_token_of_an_incomplete_character_is_decoded_as_here(llama, instruct):
    prompt = "caf\u00e9 \u00e9 \u00e9 \u00e9"
    local, remote = (each.generate(prompt, max_new_tokens=1, alternatives=2000) for each in (instruct, llama))
    here, there = ({one.token_id: one.text for one in each.alternatives[0]} for each in (local, remote))
    shared = here.keys() & there.keys()
    assert any(here[each] == "\ufffd" for each in shared)
    assert {each: here[each] for each in shared} == {each: there[each] for each in shared}


def test_llama_cpp_sends_the_last_token_of_a_character_and_counts_them_all(llama, instruct):
    prompt = "\u4f60\u597d" * 3 + "\u4f60"
    local, remote = (each.generate(prompt, max_new_tokens=8, do_sample=False) for each in (instruct, llama))
    pieces = [*instruct.stream(prompt, max_new_tokens=8, do_sample=False)]
    whole = [piece for piece in pieces if piece.text and piece.text != "\ufffd"]
    assert 0 < len(whole) < len(local.tokens)
    assert remote.tokens == tuple(piece.token_id for piece in whole)
    assert remote.logprobs == pytest.approx([piece.logprob for piece in whole], abs=0.02)
    assert remote.stats.new_tokens == len(local.tokens)


# Servers that cannot


def test_more_than_the_server_allows_is_its_own_refusal(vllm_endpoint):
    with pytest.raises(ValueError, match=r"refused the request .*max allowed: 20"):
        vllm_endpoint.generate("Once", alternatives=50)


@pytest.mark.parametrize("owner", ["someone", "a model of transformers serve"])
def test_a_server_without_log_probabilities_is_refused_before_anything_is_sent(owner, request):
    with scripted(answering(Reply(DONE))) as server:
        endpoint = fk.connect(f"{server.address}/v1") if owner == "someone" else request.getfixturevalue("served")
        with pytest.raises(ValueError, match=r"has no field for alternatives=3: leave it out"):
            endpoint.generate("Hi", alternatives=3)
        assert server.asked("/v1/completions") == []


def test_a_server_that_sends_none_although_it_should_is_named():
    with scripted(answering(Reply(DONE), owner="vllm")) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        with pytest.raises(ValueError, match=r"sends no alternatives, although alternatives=3 .*: leave it out"):
            endpoint.generate("Hi", alternatives=3)


@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"top_k": 10}, {"top_p": 0.9}, {"repetition_penalty": 1.2}])
def test_tgi_reports_no_probabilities_that_the_settings_have_changed(tgi_endpoint, settings):
    with pytest.raises(ValueError, match=r"after temperature, top_k.*alternatives=3 means those before: leave it out"):
        tgi_endpoint.generate("Once", alternatives=3, **settings)
    assert tgi_endpoint.generate("Once", alternatives=3, max_new_tokens=2, do_sample=False).alternatives
    assert all(math.isnan(piece.logprob) for piece in tgi_endpoint.stream("Once", max_new_tokens=2, **settings))


def test_an_infinite_log_probability_comes_last():
    entry = {"token": " a", "logprob": -0.1, "id": 5}
    tops = [{"token": " b", "logprob": None, "id": 6}, entry]
    choice = {
        "index": 0,
        "text": " a",
        "finish_reason": "length",
        "logprobs": {"content": [entry | {"top_logprobs": tops}]},
    }
    with scripted(answering(Reply([event({"choices": [choice]})]), owner="llamacpp")) as server:
        answer = fk.connect(f"{server.address}/v1").generate("Hi", alternatives=2)
    assert answer.alternatives == ((Alternative(" a", 5, -0.1), Alternative(" b", 6, -math.inf)),)


# The playground


@pytest.mark.parametrize("mode", ["prompt", "chat"])
@pytest.mark.parametrize("server", ["llama", "vllm_endpoint"])
def test_a_playground_shows_the_probabilities_of_an_endpoint(server, mode, instruct, request):
    texts = []
    for model in (instruct, request.getfixturevalue(server)):
        session = Session(model)
        session.switch(mode)
        session.set(temperature=None, top_k=1, max_new_tokens=6)
        tokens = [token for span in session.generate("What do owls eat?").answers[0].spans for token in span.tokens]
        assert all(len(token.alternatives) == 5 for token in tokens)
        tokens = tokens[: -1 if tokens[-1].text == "<|endoftext|>" else None]  # llama.cpp leaves it out
        texts.append([(token.text, [text for text, _ in token.alternatives]) for token in tokens])
    assert texts[0] == texts[1]


def test_a_playground_asks_for_no_alternatives_where_there_are_none(tgi_endpoint):
    with scripted(answering(Reply(DONE))) as server:
        for endpoint in (fk.connect(f"{server.address}/v1"), tgi_endpoint):
            session = fk.playground(endpoint).session
            session.set(top_k=None, temperature=0.5, max_new_tokens=2)
            answer = session.generate("Hi").answers[0]
            assert (answer.ending in ("length", "eos"), "alternatives" in answer.settings) == (True, False)
