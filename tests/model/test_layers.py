"""Decoder layers in training: gradient checkpointing, LoRA, dropout."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.conftest import small_model
from tests.model.conftest import (
    IDS,
    pair,
    same_weights,
)


def test_gradient_checkpointing_changes_no_gradient(layout):
    plain = same_weights(small_model(layout)).train()
    saving = copy.deepcopy(plain)
    saving.activation_checkpointing_enable()
    for model in (plain, saving):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_lora_trains_every_linear_layer_of_a_block(layout):
    names = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    model = get_peft_model(same_weights(small_model(layout)), LoraConfig(target_modules=names, task_type="CAUSAL_LM"))
    model(input_ids=IDS, labels=IDS).loss.backward()
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert len(adapters) == 2 * 4
    assert all(parameter.grad.abs().max() > 0 for parameter in adapters)


@pytest.mark.parametrize("name", ["hidden_dropout", "attention_dropout"])
def test_dropout_acts_in_training_and_only_there(layout, name):
    kit = same_weights(small_model(layout, **{name: 0.5}))
    assert torch.equal(kit(IDS).logits, kit(IDS).logits)
    kit.train()
    assert not torch.equal(kit(IDS).logits, kit(IDS).logits)


def test_no_layer_is_of_a_class_that_quantisers_pass_over(layout):
    kit = pair(layout)[1]
    linears = [module for module in kit.modules() if isinstance(module, nn.Linear)]
    assert {type(module) for module in linears} == {nn.Linear}
    assert len(linears) == 4 * 2 + 1
