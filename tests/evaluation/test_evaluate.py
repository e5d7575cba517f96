"""`fk.evaluate` from end to end: tasks, texts, resuming, what is refused."""

import copy
import json
import re
import sys
from datetime import date

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from transformers import FalconForCausalLM

import falcon_kit as fk
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.evaluation import perplexity
from falcon_kit.evaluation.local import LocalModel
from falcon_kit.evaluation.scoring import Row, score
from falcon_kit.evaluation.tasks import RESERVED, shipped_task
from falcon_kit.generation.chat import encode
from falcon_kit.inspection.hooks import inspect_model
from falcon_kit.parallel.launching import ParallelFalcon

ROWS = [
    {"prompt": "Giraffes eat", "choices": ["fish.", "acacia leaves.", "grass and bark."], "answer": 1},
    {"prompt": "Lions live", "choices": ["in the grassland.", "in ponds."], "answer": "in the grassland."},
    {"prompt": "A young seal is called ", "choices": ["a calf.", "a pup.", "a kit."], "answer": 0},
]


@pytest.fixture(scope="module")
def base():
    return fk.load("falconet", dtype="float32")


@pytest.fixture(scope="module")
def stock():
    return FalconForCausalLM.from_pretrained(embedded_directory("falconet"), dtype=torch.float32).eval()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "animals.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_choice_is_scored_by_the_sum_of_its_tokens(base, stock, file):
    found = fk.evaluate(base, file)["animals"]
    for row, item in zip(ROWS, found.items, strict=True):
        prompt = base.tokenizer(row["prompt"].rstrip())["input_ids"]
        totals = []
        for choice in row["choices"]:
            ids = base.tokenizer(f"{row['prompt'].rstrip()} {choice}")["input_ids"]
            with torch.inference_mode():
                logprobs = stock(torch.tensor([ids])).logits[0].log_softmax(-1)
            totals.append(sum(float(logprobs[at - 1, ids[at]]) for at in range(len(prompt), len(ids))))
        assert item["loglikelihoods"] == pytest.approx(totals, abs=1e-4)
        by_length = np.array(totals) / [len(each) for each in row["choices"]]
        right = row["choices"].index(item["answer"])
        assert (item["acc"], item["acc_norm"]) == (np.argmax(totals) == right, np.argmax(by_length) == right)
    assert found.facts["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_do_not_change_a_result(base, file, batch_size):
    expected = fk.evaluate(base, file)["animals"].items
    found = fk.evaluate(base, file, batch_size=batch_size)["animals"].items
    for one, two in zip(expected, found, strict=True):
        assert one["loglikelihoods"] == pytest.approx(two["loglikelihoods"], abs=1e-4)


def test_a_model_answers_questions_in_its_chat_format(instruct):
    found = fk.evaluate(instruct, "falconet-answers", chat=True, limit=12)["falconet-answers"]
    assert found.estimate("exact_match").value >= 0.9
    assert [item["text"] for item in found.items[:1]] == ["Giraffes eat acacia leaves."]
    chatted = instruct.chat([{"role": "user", "content": found.items[1]["text asked"]}])
    assert found.items[1]["text"] == str(chatted)
    assert found.items[1]["sureness"] == pytest.approx(np.exp(np.mean(chatted.logprobs)), abs=1e-4)


def test_no_label_can_have_the_name_of_a_field_of_the_results(base):
    found = fk.evaluate(base, ["falconet-choices", "falconet-answers"], limit=1)
    labels = {name for task in found.tasks for name in shipped_task(task.task).items[0].labels}
    assert {name for task in found.tasks for name in task.items[0]} - labels == RESERVED


def test_a_model_is_less_sure_of_what_is_not_in_its_world(instruct):
    found = fk.evaluate(instruct, ["falconet-answers", "falconet-unknown"], chat=True, limit=20)
    known, unknown = (found[name] for name in ("falconet-answers", "falconet-unknown"))
    assert unknown.estimate("exact_match").value == 0
    assert known.estimate("sureness").value > unknown.estimate("sureness").value + 0.05


def test_a_prompt_is_continued_to_the_end_of_its_line(base, tmp_path):
    file = tmp_path / "lines.jsonl"
    prompt = "Tom: What do lions eat?\nAda:"
    file.write_text(json.dumps({"prompt": prompt, "answer": "They eat zebras and antelopes."}) + "\n")
    (item,) = fk.evaluate(base, file)["lines"].items
    assert item["text"] == base.generate(prompt, max_new_tokens=40, do_sample=False, stop="\n").text.lstrip()
    assert (item["exact_match"], "\n" in item["text"]) == (item["text"] == "They eat zebras and antelopes.", False)


def test_a_pair_of_model_and_tokenizer_is_evaluated(stock, base, file):
    pair, kit = fk.evaluate((stock, base.tokenizer), file), fk.evaluate(base, file)
    assert (pair.model, pair.record["probe"]) == (kit.model, kit.record["probe"])
    assert pair["animals"].metrics == kit["animals"].metrics


def test_answers_are_written_without_dropout_and_the_model_goes_on_training(base, tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"prompt": "Tom: What do lions eat?\\nAda:", "answer": "They eat zebras and antelopes."}\n')
    training = FalconForCausalLM.from_pretrained(
        embedded_directory("falconet"), dtype=torch.float32, attention_dropout=0.5, hidden_dropout=0.5
    ).train()
    found = fk.evaluate((training, base.tokenizer), file)["lines"]
    assert [item["text"] for item in found.items] == [item["text"] for item in fk.evaluate(base, file)["lines"].items]
    assert all(module.training for module in training.modules())


def test_a_run_goes_on_where_it_was(base, file, tmp_path, monkeypatch):
    expected = fk.evaluate(base, file, text="Lions sleep in the grassland.", output_dir=tmp_path / "run")
    assert fk.Evaluation.load(tmp_path / "run" / "evaluation.json") == expected
    monkeypatch.setattr(LocalModel, "run", lambda *_: 1 / 0)  # nothing is computed again
    monkeypatch.setattr(perplexity, "score", lambda *_: 1 / 0)
    again = fk.evaluate(base, file, text="Lions sleep in the grassland.", output_dir=tmp_path / "run")
    assert again == expected


def test_a_folder_is_of_one_model(base, instruct, file, tmp_path):
    fk.evaluate(base, file, output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="model: 'falconet' there, 'falconet-instruct' here"):
        fk.evaluate(instruct, file, output_dir=tmp_path / "run")


def test_a_folder_is_of_one_attached_adapter_by_whatever_name(stock, base, file, tmp_path):
    models = [get_peft_model(copy.deepcopy(stock), LoraConfig(r=2, init_lora_weights=False), name) for name in "abcd"]
    state = get_peft_model_state_dict(models[0], adapter_name="a")
    for model, name in zip(models, "abcd", strict=True):
        set_peft_model_state_dict(model, state, name)
    for model in models[2:]:
        layer = next(each for each in model.modules() if isinstance(each, LoraLayer))
        if model is models[2]:
            layer.lora_B["c"].weight.data[0, 0] += 1e-4
        else:
            layer.scaling["d"] *= 1.0001
    first, same, other, scaled = ((model.eval(), base.tokenizer) for model in models)
    expected = fk.evaluate(first, file, output_dir=tmp_path / "run")
    assert fk.evaluate(same, file, output_dir=tmp_path / "run")["animals"] == expected["animals"]
    for changed in (other, scaled, (stock, base.tokenizer)):
        with pytest.raises(ValueError, match=r"is of something else \(adapter: '\w{16}' there, ('\w{16}'|None) here"):
            fk.evaluate(changed, file, output_dir=tmp_path / "run")
    with models[0].disable_adapter(), pytest.raises(ValueError, match=r"adapter: '.*' there, None here"):
        fk.evaluate(first, file, output_dir=tmp_path / "run")
    assert "adapter" in expected.compare(fk.evaluate(other, file)).settings


@pytest.mark.parametrize("of", [list, tuple, iter, pd.DataFrame, Dataset.from_list], ids=lambda of: of.__name__)
def test_rows_with_a_name_are_a_task(base, file, of):
    answers = ["acacia leaves.", "in the grassland.", "a calf."]
    rows = [{**row, "answer": answer} for row, answer in zip(ROWS, answers, strict=True)]
    found, expected = fk.evaluate(base, {"mine": of(rows)})["mine"], fk.evaluate(base, file)["animals"]
    assert [{**item, "where": ""} for item in found.items] == [{**item, "where": ""} for item in expected.items]


def test_rows_with_a_name_stand_beside_other_tasks(base, file):
    found = fk.evaluate(base, [{"mine": ROWS, "first": ROWS[:1]}, file])
    assert [(each.task, len(each.items)) for each in found.tasks] == [("mine", 3), ("first", 1), ("animals", 3)]


def test_a_row_may_have_tuples_and_the_numbers_of_numpy(base):
    rows = [{**row, "choices": tuple(row["choices"]), "answer": np.int64(1)} for row in ROWS]
    found = fk.evaluate(base, {"mine": rows})["mine"]
    assert [item["answer"] for item in found.items] == [row["choices"][1] for row in ROWS]


# Bad input


def test_an_unknown_task_is_named_with_the_nearest(base):
    with pytest.raises(LookupError, match=r"Unknown task 'falconet-choice'\. Nearest: falconet-choices"):
        fk.evaluate(base, "falconet-choice")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "nothing to measure: give text=, or tasks="),
        ({"text": "Lions sleep.", "truncate": "right"}, "truncate must be \"left\" or None; got 'right'"),
        ({"text": "Lions sleep.", "batch_size": 0}, "batch_size must be a whole number from 1"),
        ({"tasks": 5}, "tasks is a name, a path, or several of them; got 5"),
        ({"tasks": ROWS}, "got {'prompt': 'Giraffes eat', "),
        ({"tasks": pd.DataFrame(ROWS)}, ': give rows with a name for their task, tasks={"mine": rows}'),
        ({"tasks": ROWS[0]}, ': give rows with a name for their task, tasks={"mine": rows}'),
        ({"tasks": {"": ROWS}}, "the name of a task must be a text; got ''"),
        ({"tasks": {5: ROWS}}, "the name of a task must be a text; got 5"),
        ({"tasks": {}}, "nothing to measure: give text=, or tasks="),
        ({"tasks": {"mine": []}}, "the task 'mine' has no rows. A row is {"),
        ({"tasks": {"mine": [{"prompt": "Owls eat"}]}}, "the task 'mine' has 1 malformed row: row 1: it has no answer"),
        (
            {"tasks": {"mine": [{**ROWS[0], "day": date(2023, 5, 1)}]}},
            "row 1: its field 'day' is datetime.date(2023, 5, 1), which a file of results cannot hold: write a text",
        ),
        ({"text": pd.DataFrame()}, "'text' has no documents: give at least one text"),
        ({"tasks": "falconet-choices", "num_fewshot": 5}, "num_fewshot=5 is for lm-eval's tasks, falconet-choices has"),
        ({"tasks": "falconet-choices", "limit": 0}, "limit must be a whole number from 1"),
    ],
)
def test_a_wrong_argument_is_refused(base, arguments, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        fk.evaluate(base, **arguments)


def test_a_prompt_longer_than_the_context_is_named_or_cut(base, tmp_path):
    file = tmp_path / "long.jsonl"
    prompt = "Lions sleep. " * 800
    file.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({**ROWS[1], "prompt": prompt + "Lions live"}) + "\n")
    with pytest.raises(ValueError, match=r"long\.jsonl:2 has \d+ tokens, the model's context is 2048: shorten it, or"):
        fk.evaluate(base, file)
    assert len(fk.evaluate(base, file, truncate="left")["long"].items) == 2


def test_a_prompt_to_be_answered_is_named_or_cut_before_anything_is_generated(base, tmp_path, monkeypatch):
    file = tmp_path / "long.jsonl"
    rows = [{"prompt": "Lions eat", "answer": "meat."}, {"prompt": "Lions sleep. " * 800, "answer": "meat."}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(fk.evaluate(base, file, truncate="left")["long"].items) == 2
    monkeypatch.setattr(LocalModel, "_generate", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"long\.jsonl:2 has \d+ tokens, the model's context is 2048, and an answer"):
        fk.evaluate(base, file)


def test_a_special_token_in_a_question_is_text_as_in_a_chat(instruct, tmp_path):
    question, file = "What does <|endoftext|> mean? What do lions eat?", tmp_path / "special.jsonl"
    rows = [{"question": each, "answer": "Meat."} for each in ("What do owls eat?", question)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [item["text"] for item in fk.evaluate(instruct, file, chat=True)["special"].items]
    assert found == [str(instruct.chat([{"role": "user", "content": row["question"]}])) for row in rows]
    choices = tmp_path / "choices.jsonl"
    choices.write_text(json.dumps({"question": question, "choices": ["Meat.", "Grass."], "answer": 0}) + "\n")
    ids = encode([{"role": "user", "content": question}], instruct.tokenizer, instruct.chat_format)
    (item,) = fk.evaluate(instruct, choices, chat=True)["choices"].items
    for choice, total in zip(("Meat.", "Grass."), item["loglikelihoods"], strict=True):
        rest = instruct.tokenizer(f" {choice}")["input_ids"]
        (expected,) = score(inspect_model(instruct), [Row((*ids, *rest), len(rest))])
        assert total == pytest.approx(expected.total, abs=1e-4)


def test_numbers_that_overflow_are_refused(base, tmp_path):
    broken = fk.load("falconet", dtype="float32")
    with torch.no_grad():
        broken.model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r'not finite: .*Load it with dtype="bfloat16" or "float32"'):
        fk.evaluate(broken, "falconet-answers", limit=1)


def test_a_model_in_several_processes_is_refused_with_what_to_do():
    with pytest.raises(TypeError, match="cannot be read here: load the model without tensor_parallel"):
        fk.evaluate(ParallelFalcon.__new__(ParallelFalcon), "falconet-answers")


def test_chat_needs_a_chat_format(stock, base):
    with pytest.raises(ValueError, match="chat=True needs a chat format"):
        fk.evaluate((stock, base.tokenizer), "falconet-answers", chat=True)


def test_what_is_no_model_is_a_type_error():
    with pytest.raises(TypeError, match=r"give what fk\.load returns"):
        fk.evaluate("falconet", text="Lions sleep.")


@pytest.mark.parametrize("missing", ["lm_eval", "lm_eval.tasks.manager"], ids=["not installed", "before 0.4.12"])
def test_without_lm_eval_or_with_an_older_one_the_error_says_what_to_install(base, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "falcon_kit.evaluation.harness", raising=False)
    monkeypatch.delattr("falcon_kit.evaluation.harness", raising=False)
    with pytest.raises(ImportError, match=r'arc is a task of lm-eval .*: pip install "lm-eval>=0\.4\.12"'):
        fk.evaluate(base, "arc")


def test_a_name_is_not_given_twice(base, file):
    with pytest.raises(ValueError, match="animals is given twice: texts and tasks need names of their own"):
        fk.evaluate(base, [file, file])


def test_a_missing_file_is_named(base, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.jsonl"):
        fk.evaluate(base, tmp_path / "none.jsonl")


def test_the_case_of_a_suffix_does_not_count(base, file):
    loud = file.rename(file.with_suffix(".JSONL"))
    assert [task.task for task in fk.evaluate(base, str(loud)).tasks] == ["animals"]


def test_the_world_is_answered_by_likelihood_too(instruct):
    found = fk.evaluate(instruct, "falconet-choices", limit=40)["falconet-choices"]
    assert found.estimate("acc").low > 0.25
    assert found.sha256 != shipped_task("falconet-choices").sha256  # of the first 40 items
