"""What OpenAI-compatible servers are sent, and what is read from their responses."""

import pytest

import falcon_kit as fk
from tests.serving.servers import DONE, QUESTION, Reply, answering, event, scripted


def test_several_sequences_have_seeds_of_their_own(llama):
    texts = [
        each.text for each in llama.generate("Once", temperature=2.0, seed=5, num_return_sequences=3, max_new_tokens=12)
    ]
    assert len(set(texts)) == 3
    assert texts[1] == llama.generate("Once", temperature=2.0, seed=6, max_new_tokens=12).text


def test_log_probabilities_are_the_models(llama, instruct):
    local = instruct.generate(fk.CARD.prompt, max_new_tokens=20)
    for remote in (llama.generate(fk.CARD.prompt, max_new_tokens=20), llama.stream(fk.CARD.prompt, max_new_tokens=20)):
        logprobs = remote.logprobs if isinstance(remote, fk.Generation) else [piece.logprob for piece in remote]
        assert logprobs == pytest.approx(local.logprobs, abs=0.01)


def test_without_a_limit_a_draw_is_from_the_whole_vocabulary(llama):
    # llama.cpp on its own would draw among 40 tokens, and among those above 5% of the likeliest
    answers = llama.generate("Once upon", temperature=50.0, max_new_tokens=1, num_return_sequences=80, seed=0)
    assert len({each.tokens for each in answers}) > 41


def test_token_ids_are_a_prompt_where_the_server_takes_them(llama, served, instruct):
    ids = instruct.tokenizer(fk.CARD.prompt)["input_ids"]
    assert llama.generate(ids, max_new_tokens=9).text == instruct.generate(ids, max_new_tokens=9).text
    with pytest.raises(ValueError, match="transformers serve takes no token ids for a prompt: give the text"):
        served.generate(ids)


def test_an_answer_that_is_not_the_protocol_is_named():
    with scripted(answering(Reply([b"<html>Sign in</html>"], kind="text/html"))) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        with pytest.raises(ConnectionError, match="does not use the protocol"):
            endpoint.generate("Hi")


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


def test_defaults_of_the_model_do_not_apply_to_a_greedy_text_on_vllm():
    body = sent(script=answering(Reply(DONE), owner="vllm"))
    assert (body["temperature"], body["repetition_penalty"], body["min_p"], body["top_k"]) == (0, 1.0, 0.0, -1)


def test_a_conversation_goes_to_the_endpoints_own_template():
    body = sent("/v1/chat/completions", temperature=0.5)
    assert (body["messages"], "prompt" in body) == (QUESTION, False)


# What is read


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
