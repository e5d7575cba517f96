"""Settings: names of LoraConfig and TrainingArguments, ranges, defaults."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import TrainingArguments

import falcon_kit as fk
from falcon_kit.tuning import settings
from tests.tuning.small_runs import ROWS


def test_an_unknown_setting_is_refused_with_the_nearest(falcon, tmp_path):
    with pytest.raises(TypeError, match="learning_rate"):
        fk.tune(falcon, ROWS, output_dir=tmp_path, learning_rat=1e-3)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rank", "fk.tune has no 'rank': it is called r, as in LoraConfig"),
        ("alpha", "lora_alpha, as in LoraConfig"),
        ("dropout", "lora_dropout"),
        ("targets", "target_modules"),
        ("schedule", "lr_scheduler_type"),
        ("warmup", "warmup_ratio"),
        ("epochs", "num_train_epochs, as in TrainingArguments"),
        ("batch", "per_device_train_batch_size"),
        ("accumulate", "gradient_accumulation_steps"),
        ("checkpointing", "gradient_checkpointing"),
        ("evaluate_every", "eval_steps"),
        ("save_every", "save_steps"),
        ("lora_r", "r, as in LoraConfig"),
        ("warmup_steps", "warmup_ratio, a share of the steps"),
        ("activation_checkpointing", "gradient_checkpointing"),
        ("max_seq_length", "context"),
        ("eval_dataset", "held_out"),
    ],
)
def test_an_old_or_foreign_name_is_refused_with_the_one_to_use(falcon, tmp_path, name, text):
    with pytest.raises(TypeError, match=f"has no '{name}': it is called {text}" if "fk.tune" not in text else text):
        fk.tune(falcon, ROWS, output_dir=tmp_path, **{name: 1})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bf16", "it trains in the dtype of the model: fk.load"),
        ("logging_steps", "every step is logged: run.history has the losses"),
        ("report_to", r"give the tracker's callback, such as callbacks=\["),
        ("load_best_model_at_end", "patience=3 stops when the held-out loss stops falling"),
        ("use_dora", r"it trains plain LoRA; transformers' Trainer trains .* on the rows of fk.pack"),
        ("use_rslora", r"rsLoRA with lora_alpha=a is LoRA with lora_alpha=a \* r \*\* 0.5"),
        ("weight_decay", "it is AdamW without weight decay"),
        ("resume_from_checkpoint", "the same call resumes"),
    ],
)
def test_a_setting_of_other_trainers_is_refused_with_what_to_do(name, text):
    with pytest.raises(TypeError, match=f"fk.tune has no '{name}': {text}"):
        fk.Tuning(**{name: 1})


def test_every_name_that_is_offered_is_a_setting():
    names = {text.split(",")[0] for text in settings._OTHER_NAMES.values()}
    assert names - {each.name for each in dataclasses.fields(fk.Tuning)} == set()
    assert settings._OTHER_NAMES.keys() & {each.name for each in dataclasses.fields(fk.Tuning)} == set()


def test_settings_have_the_names_of_lora_config_and_training_arguments():
    known = {each.name for kind in (LoraConfig, TrainingArguments) for each in dataclasses.fields(kind)}
    of_the_kit = {"warmup_ratio", "context", "packing", "shard", "held_out", "patience", "answers"}
    assert {each.name for each in dataclasses.fields(fk.Tuning)} - known == of_the_kit


def test_all_linear_and_a_single_name_are_target_modules_as_in_peft():
    assert fk.Tuning(target_modules="all-linear") == fk.Tuning()
    assert fk.Tuning(target_modules="dense").target_modules == ("dense",)


def test_the_same_target_modules_in_any_form_are_the_same_settings():
    for form in (set, list, tuple, iter, lambda names: [*names, "dense"]):
        for names in itertools.permutations(["query_key_value", "dense", "dense_4h_to_h"]):
            chosen = fk.Tuning(target_modules=form(names)).target_modules
            assert chosen == ("query_key_value", "dense", "dense_4h_to_h")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"r": 0}, r"r must be a whole number from 1 to 2\*\*63 - 1, got 0"),
        ({"r": 8.0}, r"r must be a whole number from 1 to 2\*\*63 - 1, got 8\.0"),
        ({"max_steps": 0}, "max_steps must be a whole number from 1"),
        ({"answers": -1}, "answers must be a whole number from 0"),
        ({"learning_rate": 2}, "learning_rate must be above 0 and below 1"),
        ({"seed": 2**32}, "seed must be a whole number from 0 to 4294967295"),
        ({"num_train_epochs": 0}, "num_train_epochs must be more than 0"),
        ({"target_modules": ("q_proj",)}, "target_modules must be among query_key_value"),
        ({"target_modules": iter(())}, "target_modules must be among query_key_value"),
        ({"target_modules": None}, "target_modules must be among query_key_value.*, got None"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1"),
        ({"patience": 1, "held_out": 0.0}, "patience needs the held-out loss"),
        ({"lr_scheduler_type": "stairs"}, "lr_scheduler_type must be one of"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_range(given, text):
    with pytest.raises(ValueError, match=text):
        fk.Tuning(**given)


@pytest.mark.parametrize(
    ("name", "rate", "dropout"), [("falconet", 5e-3, 0.0), ("falcon-7b", 2e-4, 0.1), ("falcon-40b", 1e-4, 0.05)]
)
def test_defaults_follow_qlora_by_the_size_of_the_model(name, rate, dropout):
    chosen = fk.Tuning().for_model(fk.spec(name))
    assert (chosen.learning_rate, chosen.lora_dropout, chosen.lora_alpha, chosen.context) == (rate, dropout, 32, 2048)


NUMBERS = {each.name: each.default for each in dataclasses.fields(fk.Tuning)} | {
    "lora_alpha": 16.0,
    "lora_dropout": 0.1,
    "learning_rate": 1e-4,
    **dict.fromkeys(("max_steps", "context", "eval_steps", "patience", "save_steps"), 8),
    **dict.fromkeys(("shard", "gradient_checkpointing"), True),
}


@pytest.mark.parametrize("name", [name for name, value in NUMBERS.items() if isinstance(value, int | float)])
def test_a_number_of_numpy_is_a_setting_like_pythons(name):
    value = NUMBERS[name]
    for given in (np.asarray(value)[()], np.asarray(value), torch.from_numpy(np.asarray(value))):
        stored = getattr(fk.Tuning(**{name: given}), name)
        assert (stored, type(stored)) == (value, type(value))
