"""A real vLLM, in the environment that `make engines` makes: it answers as the same model does here.

Only `make engines` runs these tests; elsewhere pytest's settings leave them out.
"""

import math
import time
from pathlib import Path

import httpx2
import psutil
import pytest
import torch

import falcon_kit as fk
from tests.serving.servers import QUESTION
from tests.serving.test_endpoint import (  # noqa: F401  # collected here too, with the endpoint of this file
    test_a_control_token_in_a_message_is_refused,
    test_a_conversation_streams_too,
    test_a_greedy_text_is_the_local_one,
    test_a_prompt_over_the_context_is_refused,
    test_a_seed_makes_a_drawn_text_reproducible,
    test_a_stop_string_ends_a_text_where_it_does_here,
    test_chat_answers_as_here_and_not_for_the_next_speaker,
    test_settings_arrive_one_token_to_draw_from_leaves_no_choice,
    test_several_texts_come_back_in_order,
    test_the_end_token_ends_a_text,
    test_the_pieces_of_a_stream_join_to_its_text,
    test_the_statistics_count_what_the_endpoint_counts,
    test_what_a_protocol_cannot_carry_is_refused_with_what_to_do,
)

PROGRAM = Path(__file__).parents[2] / ".engines/bin/vllm"
pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def endpoint(instruct):
    with fk.serve(instruct, PROGRAM, texts=4, arguments=["--enforce-eager"]) as served:
        yield served


def test_it_says_what_it_is(endpoint):
    assert (endpoint.server, endpoint.model, endpoint.context) == ("vLLM", "falconet-instruct", 2048)


def test_log_probabilities_are_those_of_the_model(endpoint, instruct):
    local = instruct.generate(fk.CARD.prompt, max_new_tokens=20)
    remote = endpoint.generate(fk.CARD.prompt, max_new_tokens=20)
    pieces = list(endpoint.stream(fk.CARD.prompt, max_new_tokens=20))
    assert (remote.text, remote.tokens) == (local.text, local.tokens)
    assert remote.logprobs == pytest.approx(local.logprobs, abs=0.001)
    assert [each.logprob for each in pieces if each.token_id is not None] == pytest.approx(local.logprobs, abs=0.001)


def test_a_temperature_does_not_change_the_log_probabilities(endpoint, instruct):
    local = instruct.generate(fk.CARD.prompt, max_new_tokens=1)
    remote = endpoint.generate(fk.CARD.prompt, max_new_tokens=1, temperature=0.001, seed=1)
    assert remote.tokens == local.tokens
    assert remote.logprobs == pytest.approx(local.logprobs, abs=0.001)


@pytest.mark.parametrize("call", ["generate", "stream", "chat"])
@pytest.mark.parametrize("number", [1, 5])
def test_alternatives_are_those_of_the_same_model_here(endpoint, instruct, call, number):
    local, remote = (alternatives(model, call, number) for model in (instruct, endpoint))
    assert (remote.text, remote.tokens) == (local.text, local.tokens)
    assert [[each.text for each in step] for step in remote.alternatives] == [
        [each.text for each in step] for step in local.alternatives
    ]
    for here, there in zip(local.alternatives, remote.alternatives, strict=True):
        assert [each.logprob for each in there] == pytest.approx([each.logprob for each in here], abs=0.02)


def alternatives(model, call, number):
    """The generation of one call with alternatives."""
    settings = {"max_new_tokens": 12, "alternatives": number}
    if call == "chat":
        return model.chat(QUESTION, **settings)
    if call == "generate":
        return model.generate(fk.CARD.prompt, **settings)
    stream = model.stream(fk.CARD.prompt, **settings)
    assert [each.alternatives for each in stream if each.token_id is not None] == [*stream.generation.alternatives]
    return stream.generation


def test_a_drawn_token_that_is_unlikely_takes_no_place_of_a_likely_one(endpoint, instruct):
    settings = {"max_new_tokens": 16, "temperature": 2.0, "seed": 3}
    drawn = endpoint.generate(fk.CARD.prompt, alternatives=2, **settings)
    likeliest = [[each.text for each in step] for step in drawn.alternatives]
    names = [instruct.tokenizer.decode([token]) for token in drawn.tokens]
    assert any(name not in step for name, step in zip(names, likeliest, strict=True))
    assert {len(step) for step in likeliest} == {2}
    first = instruct.generate(fk.CARD.prompt, max_new_tokens=1, alternatives=2).alternatives[0]
    assert likeliest[0] == [each.text for each in first]


def test_characters_of_several_tokens_arrive_whole(endpoint, instruct):
    prompt = "日本語のキリン 🦒 и жираф: 🦒🦒"
    local, stream = instruct.generate(prompt, max_new_tokens=24), endpoint.stream(prompt, max_new_tokens=24)
    assert "".join(piece.text for piece in stream) == local.text
    assert stream.generation.tokens == local.tokens


def test_token_ids_are_a_prompt(endpoint, instruct):
    ids = instruct.tokenizer(fk.CARD.prompt)["input_ids"]
    assert endpoint.generate(ids, max_new_tokens=9).text == instruct.generate(ids, max_new_tokens=9).text


@pytest.mark.parametrize("prompt", ["Animals of Africa:", QUESTION])
def test_max_length_counts_the_prompt(endpoint, instruct, prompt):
    call = "chat" if prompt is QUESTION else "generate"
    local, remote = (getattr(model, call)(prompt, max_length=16) for model in (instruct, endpoint))
    assert (remote.text, remote.finish_reason) == (local.text, local.finish_reason)


def test_the_prompt_has_log_probabilities(endpoint, instruct):
    (tokens,) = endpoint.prompt_logprobs(["The giraffe eats leaves."])
    assert "".join(each.text for each in tokens) == "The giraffe eats leaves."
    assert math.isnan(tokens[0].logprob)
    assert [each.logprob for each in tokens[1:]] == pytest.approx(prompt_logprobs(instruct), abs=0.001)


def prompt_logprobs(falcon):
    """The log-probabilities of the tokens of that prompt after the first, from the logits."""
    ids = torch.tensor([falcon.tokenizer("The giraffe eats leaves.")["input_ids"]])
    with torch.inference_mode():
        logits = falcon.model(ids).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()


def test_twenty_prompts_at_once_come_back_in_order(endpoint, instruct):
    prompts = [f"Animals of Africa, list {number}:" for number in range(20)]
    remote = endpoint.generate(prompts, max_new_tokens=8)
    assert [each.text for each in remote] == [instruct.generate(each, max_new_tokens=8).text for each in prompts]


def test_several_sequences_have_seeds_of_their_own(endpoint):
    settings = {"temperature": 2.0, "max_new_tokens": 12}
    texts = [each.text for each in endpoint.generate("Once", seed=5, num_return_sequences=3, **settings)]
    assert len(set(texts)) == 3
    assert texts[1] == endpoint.generate("Once", seed=6, **settings).text


def test_settings_of_vllm_take_effect(endpoint, instruct):
    long = endpoint.generate(
        "User: What do owls eat?\nFalcon: Owls eat mice.\nUser: Thank you.\nFalcon:", min_new_tokens=30
    )
    assert long.stats.new_tokens >= 30
    assert (
        endpoint.generate("Once", min_p=1.0, temperature=2.0, max_new_tokens=8).text
        == endpoint.generate("Once", max_new_tokens=8).text
    )
    local, remote = (
        model.generate(fk.CARD.prompt, repetition_penalty=1.5, max_new_tokens=12) for model in (instruct, endpoint)
    )
    assert remote.text == local.text != endpoint.generate(fk.CARD.prompt, max_new_tokens=12).text


def test_a_closed_stream_ends_the_text_on_the_server(endpoint):
    for _ in range(3):  # a text may end before this process, if the machine stands still, comes to close it
        stream = endpoint.stream("Once upon a time", max_new_tokens=1900, min_new_tokens=1900)
        next(stream)
        stream.close()
        if stream.generation.finish_reason != "length":
            break
    assert stream.generation.finish_reason == "cancelled"
    begin = time.monotonic()
    while running(endpoint):
        assert time.monotonic() - begin < 20, "vLLM still generates"
        time.sleep(0.2)


def running(endpoint):
    """The number of texts that vLLM works on, by its own metrics."""
    metrics = httpx2.get(f"{endpoint.address.removesuffix('/v1')}/metrics", trust_env=False).text
    lines = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_too_many_alternatives_are_refused_with_vllms_limit(endpoint):
    with pytest.raises(ValueError, match=r"refused the request.*20"):
        endpoint.generate("Once", alternatives=50, max_new_tokens=2)


def test_a_wrong_key_is_refused(endpoint):
    with pytest.raises(PermissionError, match="refused the key"):
        fk.connect(endpoint.address, token="sk-wrong-key-0123", retries=0)


def test_the_key_is_in_no_command_line_and_no_log(endpoint):
    key = endpoint._server.connection.token
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert any("vllm" in line for line in lines)
    assert [line for line in lines if key in line] == []
    assert key not in endpoint._process.log + repr(endpoint) + endpoint._repr_html_() + endpoint.command
