"""lm-eval on models of the kit gives the scores of its own HFLM on transformers' Falcon."""

import json
import random
import re
import sys

import datasets
import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import FalconForCausalLM

import falcon_kit as fk
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.evaluation import harness
from falcon_kit.evaluation.local import LocalModel
from falcon_kit.evaluation.results import PUBLISHED

CHOICES = [
    {"text": "Giraffes eat", "choices": ["fish.", "acacia leaves.", "grass and bark."], "target": 1},
    {"text": "Lions live", "choices": ["in the grassland.", "in ponds.", "in the red outback."], "target": 0},
    {"text": "A young seal is called a", "choices": ["calf.", "pup.", "kit."], "target": 1},
    {"text": "A group of foxes is called a", "choices": ["skulk.", "herd.", "pack."], "target": 0},
]
FORM = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{"test": "{file}"}}
test_split: test
fewshot_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
metadata: {{"version": 1}}
"""
KINDS = {
    "multiple_choice": 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]',
    "generate_until": "generation_kwargs: {until: ['\\n'], max_gen_toks: 12, do_sample: false}\n"
    "metric_list: [{metric: exact_match}]",
    "loglikelihood_rolling": "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]",
}
CLOSE = {"abs": 1e-5, "rel": 1e-6}
"""Nats, or the share of a long sum: a few steps of float32."""
LONG = "Lions eat zebras and antelopes. They live in the grassland. " * 250
ROWS = {
    "multiple_choice": CHOICES,
    "generate_until": [
        {"text": "Tom: What do lions eat?\nAda:", "target": "They eat zebras and antelopes."},
        {"text": "Tom: Where do owls live?\nAda:", "target": "They live in old barns."},
    ],
    "loglikelihood_rolling": [
        {"text": "", "target": "Lions eat zebras and antelopes."},
        {"text": "", "target": LONG},
    ],
}


@pytest.fixture(scope="module")
def base():
    return fk.load("falconet", dtype="float32")


@pytest.fixture(scope="module")
def peer(base):
    """lm-eval's own model, on transformers' Falcon, a request at a time."""
    stock = FalconForCausalLM.from_pretrained(embedded_directory("falconet"), dtype=torch.float32).eval()
    return HFLM(pretrained=stock, tokenizer=base.tokenizer, batch_size=1)


@pytest.fixture
def yaml(tmp_path):
    def write(kind, settings=None, rows=None):
        file, task = tmp_path / f"{kind}.jsonl", tmp_path / f"my_{kind}.yaml"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS[kind]))
        settings = settings or KINDS[kind]
        task.write_text(FORM.format(name=f"my_{kind}", file=file) + f"output_type: {kind}\n{settings}\n")
        return task

    return write


def all_of_theirs(peer, task, **settings):
    """What lm-eval returns with its own model."""
    manager = TaskManager(include_defaults=False)
    return simple_evaluate(peer, tasks=[str(task)], task_manager=manager, bootstrap_iters=0, **settings)


def theirs(peer, task, **settings):
    """The samples of lm-eval with its own model."""
    return all_of_theirs(peer, task, **settings)["samples"][task.stem]


def answers(samples):
    return [float(each[0]) for sample in samples for each in sample["filtered_resps"]]


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_choices_have_the_scores_of_lm_eval_on_transformers(base, peer, yaml, num_fewshot):
    task = yaml("multiple_choice")
    expected = theirs(peer, task, num_fewshot=num_fewshot, fewshot_random_seed=1234)
    found = fk.evaluate(base, task, num_fewshot=num_fewshot)[task.stem]
    ours = [float(each[0]) for item in found.items for each in item["responses"]]
    assert ours == pytest.approx(answers(expected), **CLOSE)
    assert [item["prompt_hash"] for item in found.items] == [each["prompt_hash"] for each in expected]
    for metric in ("acc", "acc_norm"):
        assert list(found.metrics[metric]) == [each[metric] for each in expected]


def test_the_kits_own_choices_have_the_same_scores(base, peer, yaml, tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [{"prompt": row["text"], "choices": row["choices"], "answer": row["target"]} for row in CHOICES]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = fk.evaluate(base, file)["mine"]
    expected = theirs(peer, yaml("multiple_choice"))
    ours = [each for item in found.items for each in item["loglikelihoods"]]
    assert ours == pytest.approx(answers(expected), **CLOSE)
    assert list(found.metrics["acc_norm"]) == [each["acc_norm"] for each in expected]


def test_answers_are_those_of_lm_eval_on_transformers(base, peer, yaml):
    task = yaml("generate_until")
    expected = [each["filtered_resps"] for each in theirs(peer, task)]
    assert [item["responses"] for item in fk.evaluate(base, task)[task.stem].items] == expected


def test_texts_have_the_log_likelihood_of_lm_eval_and_of_the_kits_perplexity(base, peer, yaml):
    task = yaml("loglikelihood_rolling")
    expected = [float(each["filtered_resps"][0]) for each in theirs(peer, task)]
    found = [float(item["responses"][0]) for item in fk.evaluate(base, task)[task.stem].items]
    assert found == pytest.approx(expected, rel=1e-5)
    texts = [row["target"] for row in ROWS["loglikelihood_rolling"]]
    own = fk.evaluate(base, text=texts, stride=2048).perplexity
    assert [-part.nats for part in own.parts] == pytest.approx(expected, rel=1e-5)


LAMBADA = [{"text": "Lions eat zebras and", "target": " antelopes."}, {"text": "Seals eat", "target": " fish."}]


@pytest.mark.parametrize(
    ("kind", "rows", "settings", "by_item", "totals"),
    [
        (
            "loglikelihood",
            LAMBADA,
            "metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc}]",
            ["acc"],
            ["perplexity"],
        ),
        (
            "loglikelihood_rolling",
            None,
            "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]",
            [],
            ["word_perplexity", "byte_perplexity", "bits_per_byte"],
        ),
        (
            "multiple_choice",
            None,
            'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}, {metric: mcc}]',
            ["acc"],
            ["mcc"],
        ),
        (
            "generate_until",
            None,
            "generation_kwargs: {until: ['\\n'], max_gen_toks: 12, do_sample: false}\n"
            "metric_list: [{metric: exact_match}, {metric: bleu}, {metric: chrf}]",
            ["exact_match"],
            ["bleu", "chrf"],
        ),
    ],
)
def test_every_metric_has_the_value_that_lm_eval_reports(base, peer, yaml, kind, rows, settings, by_item, totals):
    task = yaml(kind, settings, rows)
    expected = all_of_theirs(peer, task)["results"][task.stem]
    found = fk.evaluate(base, task)
    assert (sorted(found[task.stem].metrics), sorted(found[task.stem].totals)) == (sorted(by_item), sorted(totals))
    for metric in (*by_item, *totals):
        assert found[task.stem].estimate(metric).value == pytest.approx(expected[f"{metric},none"], rel=1e-4)
    assert np.isnan([found[task.stem].estimate(metric).low for metric in totals]).all()
    assert {row["metric"] for row in found.rows()} == {*by_item, *totals}
    verdicts = {each.metric: each.verdict for each in found.compare(found).differences}
    assert [verdicts[metric] for metric in totals] == ["not comparable"] * len(totals)


def test_the_beginning_of_an_answer_is_continued_in_a_chat(instruct, yaml):
    task = yaml("multiple_choice", KINDS["multiple_choice"] + '\ngen_prefix: "The answer is"')
    model, tokenizer = instruct
    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    expected = theirs(peer, task, apply_chat_template=True, fewshot_as_multiturn=True)
    found = fk.evaluate(instruct, task, chat=True)[task.stem]
    assert [item["prompt_hash"] for item in found.items] == [each["prompt_hash"] for each in expected]


def test_generations_whose_prompt_is_cut_are_counted(base, yaml):
    task = yaml("generate_until", rows=[{"text": LONG + "\nTom: What do lions eat?\nAda:", "target": "They eat."}])
    with pytest.warns(UserWarning, match=r"1 requests of my_generate_until exceed the model's context"):
        assert fk.evaluate(base, task)[task.stem].facts["truncated"] == 1


def test_an_empty_text_has_the_log_likelihood_zero(base):
    assert LocalModel(base).rolling(["", ""]) == [0.0, 0.0]


def test_a_run_of_lm_eval_goes_on_where_it_was(base, yaml, tmp_path, monkeypatch):
    task = yaml("multiple_choice")
    expected = fk.evaluate(base, task, output_dir=tmp_path / "run")
    monkeypatch.setattr(LocalModel, "run", lambda *_: 1 / 0)
    assert fk.evaluate(base, task, output_dir=tmp_path / "run") == expected
    assert fk.Evaluation.load(tmp_path / "run" / "evaluation.json") == expected


def test_a_chat_is_rendered_in_the_models_format(instruct, yaml):
    task = yaml("generate_until")
    found = fk.evaluate(instruct, task, chat=True)[task.stem]
    plain = fk.evaluate(instruct, task)[task.stem]
    assert found.items[0]["prompt_hash"] != plain.items[0]["prompt_hash"]


def test_models_with_other_chat_formats_or_examples_are_paired_and_the_comparison_says_so(instruct, yaml):
    task, other = yaml("multiple_choice"), fk.load("falconet-instruct", chat="baize")
    one, two, three = (
        fk.evaluate(each, task, chat=True, num_fewshot=shots)
        for each, shots in ((instruct, 0), (other, 0), (instruct, 2))
    )
    assert one.compare(one).settings == {}
    for second, difference in ((two, {"chat format": ("falcon", "baize")}), (three, {"num_fewshot": (0, 2)})):
        found = one.compare(second)
        assert found.settings.keys() == {*difference, "prompts of my_multiple_choice"}
        assert difference.items() <= found.settings.items()
        assert [each.count for each in found.differences] == [len(CHOICES)] * 2


def test_other_items_of_lm_eval_are_not_paired(base, yaml):
    one = fk.evaluate(base, yaml("multiple_choice"))
    for changed in ({"text": "Giraffes like"}, {"target": 0}):
        two = fk.evaluate(base, yaml("multiple_choice", rows=[{**CHOICES[0], **changed}, *CHOICES[1:]]))
        with pytest.raises(ValueError, match="the items of 'my_multiple_choice' differ"):
            one.compare(two)


def test_the_users_random_generators_stay_as_they_are(base, yaml):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002  # what lm-eval would seed
    expected = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    fk.evaluate(base, yaml("multiple_choice"))
    found = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert found == expected


# Bad input


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("arc", "allenai/ai2_arc"),
        ("hellaswag", "Rowan/hellaswag"),
        ("mmlu", "cais/mmlu"),
        ("truthfulqa", "truthfulqa/truthful_qa"),
        ("leaderboard", "allenai/ai2_arc"),
    ],
)
def test_missing_data_is_named(base, name, data):
    with pytest.raises(
        ConnectionError, match=f"the data of .* is not here: .*{re.escape(data)}.*: the data then stays"
    ):
        fk.evaluate(base, name)


@pytest.mark.parametrize("cut_off", [True, False])
def test_data_come_from_the_cache_alone_while_the_hub_cannot_be_reached(monkeypatch, cut_off):
    seen = []
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(harness, "is_cut_off", lambda: cut_off)
    monkeypatch.setattr(TaskManager, "load", lambda *_: seen.append(datasets.config.HF_HUB_OFFLINE) or {"tasks": {}})
    harness.load("arc", "arc_challenge", "arc")
    assert (seen, datasets.config.HF_HUB_OFFLINE) == ([cut_off], False)


def test_the_tasks_of_the_leaderboard_have_its_numbers_of_examples():
    shots = {each["name"]: each["num_fewshot"] for each in PUBLISHED["tasks"]}
    assert shots == {"arc": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa": 0}


def test_examples_that_lm_eval_would_leave_out_are_refused(base, yaml):
    task = yaml("multiple_choice", KINDS["multiple_choice"] + "\nnum_fewshot: 0")
    with pytest.raises(ValueError, match=r"num_fewshot=2 has no effect on my_multiple_choice, which has 0 examples by"):
        fk.evaluate(base, task, num_fewshot=2)


@pytest.mark.parametrize(
    ("settings", "own"), [({}, True), ({"num_fewshot": 25}, True), ({"num_fewshot": 2}, False), ({"limit": 1}, False)]
)
def test_only_the_leaderboards_own_settings_count_for_its_average(monkeypatch, settings, own):
    monkeypatch.setattr(harness, "load", lambda *_: None)
    monkeypatch.setattr(harness, "check_examples", lambda *_: None)
    plain = {"chat": False, "limit": None, "num_fewshot": None, "seed": 0}
    found = sys.modules[fk.evaluate.__module__]._resolve("arc", plain | settings)
    assert found.run.keywords["leaderboard"] == own


def test_a_missing_local_file_of_data_is_named(base, yaml, tmp_path):
    task = yaml("multiple_choice")
    (tmp_path / "multiple_choice.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"is not there: .*multiple_choice\.jsonl.*Correct the path, or"):
        fk.evaluate(base, task)


def test_a_missing_yaml_file_is_named(base, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.yaml"):
        fk.evaluate(base, tmp_path / "none.yaml")
