"""`max_length` counts the prompt, which the endpoint itself does where it can."""

import threading

import pytest

import falcon_kit as fk
from tests.serving.servers import DONE, QUESTION, Reply, answering, as_reply, event, scripted

COUNTING = ["llama", "vllm_endpoint", "tgi_endpoint"]
CALLS = {
    "a text": lambda model, **settings: [model.generate(fk.CARD.prompt, **settings)],
    "several texts": lambda model, **settings: model.generate(["Once", fk.CARD.prompt, "Owls eat"], **settings),
    "a chat": lambda model, **settings: [model.chat(QUESTION, **settings)],
    "a stream": lambda model, **settings: ["".join(piece.text for piece in model.stream(fk.CARD.prompt, **settings))],
    "a chat's stream": lambda model, **settings: ["".join(piece.text for piece in model.stream(QUESTION, **settings))],
}


@pytest.fixture(params=COUNTING)
def counting(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in CALLS.items()])
@pytest.mark.parametrize("room", [1, 7, 5000])
def test_max_length_leaves_the_same_room_as_here(call, room, counting, instruct):
    longest = 5000 if room == 5000 else len(instruct.tokenizer(fk.CARD.prompt)["input_ids"]) + room
    local, remote = call(instruct, max_length=longest), call(counting, max_length=longest)
    assert [str(each) for each in remote] == [str(each) for each in local]
    assert [getattr(each, "finish_reason", None) for each in remote] == [
        getattr(each, "finish_reason", None) for each in local
    ]


def test_the_model_cards_example_runs(counting, instruct):
    stream = counting.stream(fk.CARD.prompt, seed=0, **fk.CARD.sampling)
    assert "".join(piece.text for piece in stream)
    stats = stream.generation.stats
    assert stats.prompt_tokens == len(instruct.tokenizer(fk.CARD.prompt)["input_ids"])
    assert stats.prompt_tokens + stats.new_tokens <= fk.CARD.sampling["max_length"]


@pytest.mark.parametrize("call", [CALLS["a text"], CALLS["several texts"]], ids=["one", "several"])
def test_a_prompt_that_fills_max_length_is_refused_as_here(call, counting, instruct):
    with pytest.raises(ValueError, match="max_length=5 leaves no room") as local:
        call(instruct, max_length=5)
    with pytest.raises(ValueError, match="max_length=5 leaves no room") as remote:
        call(counting, max_length=5)
    assert str(remote.value) == str(local.value)


def test_control_tokens_in_a_prompt_are_counted_as_here(counting, instruct):
    prompt = "Once <|endoftext|> caf\u00e9 >>TITLE<<"
    tokens = len(instruct.tokenizer(prompt)["input_ids"])
    with pytest.raises(ValueError, match=f"the prompt has {tokens} tokens"):
        counting.generate(prompt, max_length=2)


def test_token_ids_need_no_counting(llama, instruct):
    ids = instruct.tokenizer(fk.CARD.prompt)["input_ids"]
    assert llama.generate(ids, max_length=len(ids) + 3).text == instruct.generate(ids, max_length=len(ids) + 3).text


@pytest.mark.parametrize("server", ["served", "sagemaker", "of another kind"])
def test_a_server_that_cannot_count_is_refused_before_anything_is_sent(server, request):
    with scripted(answering(Reply(DONE))) as other:
        endpoint = fk.connect(f"{other.address}/v1") if server == "of another kind" else request.getfixturevalue(server)
        with pytest.raises(ValueError, match=r"max_length=50: it counts no tokens of a prompt; give max_new_tokens"):
            endpoint.stream("Hi", max_length=50)
        assert other.asked("/v1/completions") == []


def counting_vllm(tokens, before=lambda: None):
    """A script of a vLLM that counts so many tokens in each prompt, after a call."""
    others = answering(Reply(DONE), owner="vllm", max_model_len=2048)

    def script(path, *rest):
        if path != "/tokenize":
            return others(path, *rest)
        before()
        return as_reply({"count": tokens})

    return script


def test_several_prompts_are_counted_at_once():
    together = threading.Barrier(16)  # opens when all sixteen are asked for
    with scripted(counting_vllm(3, lambda: together.wait(10))) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        endpoint.generate([f"number {number}" for number in range(16)], max_length=50)
        assert len(server.asked("/v1/completions")) == 16


def test_a_prompt_over_the_context_is_refused_without_advice_that_no_endpoint_takes():
    with scripted(counting_vllm(3000)) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        with pytest.raises(ValueError, match=r"3000 tokens, the endpoint's context is 2048, .* shorten it$"):
            endpoint.generate("Hi", max_length=4000)


ANSWERS = [as_reply({"error": "not found"}, 404), *map(as_reply, (5, [], {}, None, {"count": "7"}, {"count": -1}, "x"))]
ANSWERS += [Reply([b"[" * 100_000]), Reply([b"\xff"]), Reply(), as_reply({"tokens": 7}), as_reply({"tokens": {}})]


@pytest.mark.parametrize("kind", ["vllm", "llamacpp", "tgi"])
@pytest.mark.parametrize("prompt", ["Hi", QUESTION], ids=["text", "chat"])
def test_an_answer_without_a_count_is_named_and_the_advice_works(kind, prompt):
    counted = [Reply()]
    token = event({"token": {"id": 5, "text": "Hello"}, "details": {"finish_reason": "length"}})
    choice = {"text": "Hello", "delta": {"content": "Hello"}, "finish_reason": "length"}
    as_openai = answering(Reply([event({"choices": [choice]})]), owner=kind)

    def script(path, *rest):
        if path in ("/tokenize", "/apply-template"):
            return counted[0]
        if kind == "tgi":
            return as_reply({"model_id": "falcon"}) if path == "/info" else Reply([token])
        return as_openai(path, *rest)

    with scripted(script) as server:
        endpoint = fk.connect(server.address if kind == "tgi" else f"{server.address}/v1", retries=0)
        for counted[0] in ANSWERS:
            with pytest.raises(ValueError, match=r"does not count the tokens of the prompt .*give max_new_tokens"):
                list(endpoint.stream(prompt, max_length=50))
        assert "".join(piece.text for piece in endpoint.stream(prompt, max_new_tokens=50)) == "Hello"
