"""Evaluation over an endpoint: choices where the server returns the log-probabilities of a prompt, answers always."""

import json
import re
from dataclasses import replace

import pytest
import torch

import falcon_kit as fk
from falcon_kit.evaluation import remote
from falcon_kit.serving.connection import Connection
from tests.serving.engine import Engine
from tests.serving.servers import Reply, answering, as_reply, chunk, scripted, tgi

ROWS = [
    {"prompt": "Giraffes eat", "choices": ["fish.", "acacia leaves.", "grass and bark."], "answer": 1},
    {"prompt": "A young seal is called a ", "choices": ["calf.", "pup.", "kit."], "answer": 1},
]


@pytest.fixture(scope="module")
def base():
    return fk.load("falconet", dtype="float32")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "animals.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def echo(falcon, body):
    """A completion as vLLM returns it with `echo` and `logprobs`: the prompt's tokens, then one more."""
    encoded = falcon.tokenizer(body["prompt"], return_offsets_mapping=True)
    ids = encoded["input_ids"]
    with torch.inference_mode():
        logprobs = falcon.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    best = logprobs.max(-1).values.tolist()
    chosen = [None, *(float(logprobs[at - 1, ids[at]]) for at in range(1, len(ids)))]
    tops = [None, *({"best": best[at - 1], "own": chosen[at]} for at in range(1, len(ids)))]
    tokens = [body["prompt"][start:end] for start, end in encoded["offset_mapping"]]
    offsets = [start for start, _ in encoded["offset_mapping"]]
    found = {"tokens": [*tokens, "!"], "token_logprobs": [*chosen, best[-1]], "top_logprobs": [*tops, {"!": best[-1]}]}
    found["text_offset"] = [*offsets, len(body["prompt"])]
    choice = {"index": 0, "text": body["prompt"] + "!", "finish_reason": "length", "logprobs": found}
    return as_reply({"id": "1", "object": "text_completion", "created": 0, "model": "falcon", "choices": [choice]})


def echoing(falcon):
    """A script of a server that echoes prompts."""
    models = answering(b"", owner="vllm")
    return lambda path, body, headers: echo(falcon, body) if path == "/v1/completions" else models(path, body, headers)


def test_choices_have_the_scores_of_a_local_model(base, file):
    with scripted(echoing(base)) as server:
        found = fk.evaluate(fk.connect(f"{server.address}/v1"), file)
    local = fk.evaluate(base, file)
    assert (found.model, found["animals"].metrics) == ("falcon", local["animals"].metrics)
    for one, two in zip(found["animals"].items, local["animals"].items, strict=True):
        assert one["loglikelihoods"] == pytest.approx(two["loglikelihoods"], abs=1e-4)
    bodies = server.asked("/v1/completions")
    assert {(body["echo"], body["logprobs"], body["temperature"]) for body in bodies} == {(True, 1, 0)}


def test_the_greedy_continuation_is_recognised(base):
    prompt = "Lions eat zebras and antelopes."
    with scripted(echoing(base)) as server:
        (tokens,) = fk.connect(f"{server.address}/v1").prompt_logprobs([prompt])
    with torch.inference_mode():
        greedy = base.model(torch.tensor([base.tokenizer(prompt)["input_ids"]])).logits[0].argmax(-1).tolist()
    ids = base.tokenizer(prompt)["input_ids"]
    assert [each.greedy for each in tokens] == [False, *(greedy[at - 1] == ids[at] for at in range(1, len(ids)))]
    assert "".join(each.text for each in tokens) == prompt


def test_the_log_probabilities_of_prompts_need_no_further_http_client(base, monkeypatch):
    with scripted(echoing(base)) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        monkeypatch.delattr(Connection, "_new_client")
        assert len(endpoint.prompt_logprobs(["Lions eat", "Seals eat"])) == 2


@pytest.mark.parametrize("choice", [{"text": "!"}, {"text": "Giraffes eat fish.!", "logprobs": None}])
def test_a_server_without_log_probabilities_of_prompts_is_refused(file, choice):
    reply = as_reply({"id": "1", "object": "text_completion", "created": 0, "model": "falcon", "choices": [choice]})
    with scripted(answering(reply)) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        with pytest.raises(ValueError, match=r"does not return the log-probabilities of a prompt: use vLLM, or load"):
            fk.evaluate(endpoint, file)


def test_what_a_server_says_of_an_echo_that_it_refuses_is_quoted(file):
    refused = as_reply({"error": {"message": "echo is not allowed"}}, 400)
    with scripted(answering(refused)) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        with pytest.raises(ValueError, match=r"refused the request .HTTP 400.*echo is not allowed"):
            fk.evaluate(endpoint, file)


def test_a_server_of_another_protocol_returns_no_log_probabilities_of_prompts(base, file):
    with (
        scripted(tgi(base)) as server,
        pytest.raises(ValueError, match=r"TGI.* does not return the log-probabilities of a prompt"),
    ):
        fk.evaluate(fk.connect(server.address), file)


def test_answers_are_generated_by_the_endpoint(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"question": "What do giraffes eat?", "answer": "Acacia leaves."}\n' * 3)
    reply = [chunk("Acacia leaves.", "stop"), b"data: [DONE]\n\n"]
    with scripted(answering(Reply(reply))) as server:
        found = fk.evaluate(fk.connect(f"{server.address}/v1"), file)["answers"]
        prompts = [body["prompt"] for body in server.asked("/v1/completions")]
    assert (found.metrics["exact_match"], "sureness" in found.metrics) == ((1.0, 1.0, 1.0), False)
    assert prompts == ["Question: What do giraffes eat?\nAnswer:"] * 3


@pytest.mark.parametrize("answer", ["金合欢树的叶子", "أوراق السنط", "🦒🍃🌍🦁", "Acacia leaves."])
def test_an_endpoint_may_write_all_tokens_of_an_answer_in_any_script(base, tmp_path, answer):
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"question": "What do giraffes eat?", "answer": answer * 6}))
    with scripted(answering(Reply([chunk("Leaves.", "stop"), b"data: [DONE]\n\n"]))) as server:
        fk.evaluate(fk.connect(f"{server.address}/v1"), file)
        (body,) = server.asked("/v1/completions")
    assert body["max_tokens"] >= len(base.tokenizer(answer * 6)["input_ids"])


# Servers of fk.serve


@pytest.fixture
def answers(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"prompt": "Giraffes say", "answer": "Hello"}\n')
    return file


def test_the_same_call_goes_on_with_another_server_of_the_same_model(answers, tmp_path, monkeypatch):
    program, settings = Engine(tmp_path).program, {"output_dir": tmp_path / "run"}
    with fk.serve("falconet", program) as served, fk.serve("falconet", program) as again:  # each has a port of its own
        expected = fk.evaluate(served, answers, **settings)
        monkeypatch.setattr(fk.Endpoint, "generate_each", lambda *_: 1 / 0)  # nothing is asked again
        assert fk.evaluate(again, answers, **settings) == expected
    with pytest.raises(ValueError, match=r"Served\(falconet .* was closed: start it again"):
        fk.evaluate(replace(served, files=replace(served.files, path=tmp_path / "gone")), answers)


def test_a_server_of_other_weights_is_another_run(base, answers, tmp_path):
    program, settings = Engine(tmp_path).program, {"output_dir": tmp_path / "run"}
    with fk.serve(base, program) as served:
        fk.evaluate(served, answers, **settings)
    changed = fk.load("falconet", dtype="float32")
    changed.model.transformer.h[0].mlp.dense_h_to_4h.weight.data[0, 0] += 0.01
    with fk.serve(changed, program) as served, pytest.raises(ValueError, match=r"something else \(weights: '"):
        fk.evaluate(served, answers, **settings)


def test_another_address_is_another_run_if_the_kit_did_not_start_the_server(answers, tmp_path):
    reply = Reply([chunk("Hello", "stop"), b"data: [DONE]\n\n"])
    with scripted(answering(reply)) as one, scripted(answering(reply)) as two:
        fk.evaluate(fk.connect(f"{one.address}/v1"), answers, output_dir=tmp_path / "run")
        with pytest.raises(ValueError, match=r"something else \(address: 'http"):
            fk.evaluate(fk.connect(f"{two.address}/v1"), answers, output_dir=tmp_path / "run")


def test_the_digest_of_a_large_file_reads_blocks_of_all_of_it(tmp_path, monkeypatch):
    file, found = tmp_path / "large.gguf", set()
    monkeypatch.setattr(remote, "_BLOCK", 4)
    monkeypatch.setattr(remote, "_BLOCKS", 8)
    for change in [None, *range(0, 256, 32), 255 - 28]:
        content = bytearray(256)
        if change is not None:
            content[change] = 1
        file.write_bytes(content)
        found.add(remote._digest(file))
    assert len(found) == 10


CHOICES = """
task: animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def task(tmp_path, file):
    (tmp_path / "animals.yaml").write_text(CHOICES.format(file=file))
    return tmp_path / "animals.yaml"


def test_a_task_of_lm_eval_has_the_scores_of_a_local_model(base, task):
    with scripted(echoing(base)) as server:
        found = fk.evaluate(fk.connect(f"{server.address}/v1"), task)["animals"]
    local = fk.evaluate(base, task)["animals"]
    assert found.metrics == local.metrics
    for one, two in zip(found.items, local.items, strict=True):
        assert [float(each[0]) for each in one["responses"]] == pytest.approx(
            [float(each[0]) for each in two["responses"]], abs=1e-4
        )


ANSWERS = """
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 7}}
metric_list: [{{metric: exact_match}}]
"""


def test_a_task_of_lm_eval_that_generates_asks_the_endpoint(tmp_path):
    rows = [{"question": each, "answer": "leaves"} for each in ("Giraffes eat ", "Elephants eat ")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "answers.yaml").write_text(ANSWERS.format(file=tmp_path / "rows.jsonl"))
    with scripted(answering(Reply([chunk("leaves. They", "stop"), b"data: [DONE]\n\n"]))) as server:
        found = fk.evaluate(fk.connect(f"{server.address}/v1"), tmp_path / "answers.yaml")["answers"]
        bodies = server.asked("/v1/completions")
    assert found.metrics["exact_match"][0] == 1
    assert sorted(body["prompt"] for body in bodies) == sorted(row["question"] for row in rows)
    assert {body["max_tokens"] for body in bodies} == {7}


def test_a_chat_of_lm_eval_needs_a_chat_format_that_was_given(base, task):
    with scripted(echoing(base)) as server:
        with pytest.raises(ValueError, match=r"does not report: connect with fk\.connect\(\.\.\., chat="):
            fk.evaluate(fk.connect(f"{server.address}/v1"), task, chat=True)
        found = fk.evaluate(fk.connect(f"{server.address}/v1", chat="baize"), task, chat=True)
        prompts = [body["prompt"] for body in server.asked("/v1/completions")]  # in any order
    assert any(each.startswith("[|Human|] A young seal") for each in prompts)
    assert all(each.startswith("[|Human|] ") for each in prompts)
    assert found.record["chat format"] == "baize"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"text": "Lions sleep."}, "perplexity needs the tokens of a text, which an endpoint does not give"),
        ({"tasks": "questions.jsonl", "chat": True}, "an endpoint scores choices only without chat=True"),
    ],
)
def test_what_an_endpoint_cannot_do_is_refused(tmp_path, monkeypatch, arguments, problem):
    monkeypatch.chdir(tmp_path)
    row = {"question": "Who?", "choices": ["me", "you"], "answer": 0}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
    with scripted(answering(b"")) as server:
        endpoint = fk.connect(f"{server.address}/v1")
        with pytest.raises(ValueError, match=re.escape(problem)):
            fk.evaluate(endpoint, **arguments)
