"""An adapter that the user added stays: `tune`, `before_after` and `merge` refuse before they change anything."""

import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import FalconForCausalLM

import falcon_kit as fk
from tests.conftest import small_model
from tests.tuning.small_runs import QUICK as SHORT
from tests.tuning.small_runs import ROWS, logits

QUICK = {**SHORT, "max_steps": 1, "held_out": 0}
CONFIG = {"r": 2, "target_modules": ["query_key_value"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}


@pytest.fixture
def falcon(tokenizer, tmp_path):
    small_model("40b").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return fk.load(tmp_path / "base", dtype="float32")


def add(falcon, name, through):
    """The user's adapter, and how the advice in the error removes it."""
    if through == "transformers":
        falcon.model.add_adapter(LoraConfig(**CONFIG), adapter_name=name)
        return lambda: falcon.model.delete_adapter([name])
    return get_peft_model(falcon.model, LoraConfig(**CONFIG), adapter_name=name).unload


@pytest.mark.parametrize("through", ["transformers", "peft"])
@pytest.mark.parametrize("name", ["default", "mine"])
def test_an_adapter_of_the_user_is_kept_and_the_advice_works(falcon, name, through, tmp_path):
    run = fk.tune(falcon, ROWS, output_dir=tmp_path / "run", **QUICK)
    base = logits(falcon)
    remove = add(falcon, name, through)
    before = logits(falcon)
    assert not torch.equal(before, base)
    modes = [(key, each.requires_grad) for key, each in falcon.model.named_parameters()]
    calls = {
        "the new one": lambda: fk.tune(falcon, ROWS, output_dir=tmp_path / "again", **QUICK),
        "the adapter in": lambda: run.before_after("What is a giraffe?", max_new_tokens=4),
        "the merged one": lambda: fk.merge(run.adapter, falcon),
    }
    for another, call in calls.items():
        with pytest.raises(
            ValueError, match=re.escape(f"has the adapter {name!r}, which would be removed with {another}")
        ):
            call()
    assert torch.equal(logits(falcon), before)
    assert [(key, each.requires_grad) for key, each in falcon.model.named_parameters()] == modes
    assert not (tmp_path / "again").exists()

    fresh = fk.load(falcon.name, dtype="float32")
    expected = logits(fk.merge(run.adapter, fresh))
    remove()
    torch.testing.assert_close(logits(fk.merge(run.adapter, falcon)), expected)
    calls["the adapter in"]()
    calls["the new one"]()
    assert torch.equal(logits(falcon), base)


DELETED = {
    "on a layer": {},
    "on the head": {"target_modules": ["lm_head"]},
    "with a module of its own": {"modules_to_save": ["ln_f"]},
    "of tokens": {"trainable_token_indices": [3]},
}


@pytest.mark.parametrize("kind", DELETED)
@pytest.mark.parametrize("through", ["transformers", "peft"])
def test_a_model_whose_adapter_was_deleted_is_the_base_again(falcon, kind, through, tmp_path):
    base, file = logits(falcon), tmp_path / "mine"
    stock = FalconForCausalLM.from_pretrained(falcon.name)
    get_peft_model(stock, LoraConfig(**CONFIG | DELETED[kind])).save_pretrained(file)
    if through == "peft":
        adapted = PeftModel.from_pretrained(falcon.model, file, adapter_name="mine")
    else:
        (adapted := falcon.model).load_adapter(file, adapter_name="mine")
    tuned = logits(falcon)
    assert not torch.allclose(tuned, base, atol=1e-3)
    adapted.delete_adapter("mine")
    falcon.save(tmp_path / "saved")
    fk.merge(file, falcon, output_dir=tmp_path / "merged")
    fk.export_gguf(falcon, tmp_path / "saved.gguf")
    for saved, expected in {"saved": base, "saved.gguf": base, "merged": tuned}.items():
        torch.testing.assert_close(logits(fk.load(tmp_path / saved, dtype="float32")), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(falcon), base)


def test_gradient_checkpointing_and_training_mode_of_the_user_stay(falcon, tmp_path):
    falcon.model.activation_checkpointing_enable()
    falcon.model.enable_input_require_grads()
    falcon.model.train()
    fk.tune(falcon, ROWS, output_dir=tmp_path / "run", gradient_checkpointing=True, **QUICK)
    assert falcon.model.is_activation_checkpointing
    assert falcon.model.get_input_embeddings()(torch.tensor([[1]])).requires_grad
    assert falcon.model.training
