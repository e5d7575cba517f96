"""Decoder layers in training: gradient checkpointing, LoRA, dropout."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from falcon_kit.catalogue.memory import VALUE_BYTES
from falcon_kit.loading.packed import PackedLinear, frozen, quantised8
from falcon_kit.model import packed_documents
from falcon_kit.model.modeling import FalconForCausalLM
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


# Under autocast


@pytest.fixture
def autocast(monkeypatch):
    """CUDA's autocast, on a CPU: it also computes LayerNorm in float32 (aten/src/ATen/autocast_mode.h)."""
    layer_norm = functional.layer_norm

    def in_float32(values, shape, weight, bias, eps):
        return layer_norm(values.float(), shape, weight.float(), bias.float(), eps)

    monkeypatch.setattr(functional, "layer_norm", in_float32)
    with torch.autocast("cpu", torch.bfloat16):
        yield


def quantised(layout: str) -> FalconForCausalLM:
    """A model in bfloat16 with layers in 8 bits, which return the dtype of their input, and with an adapter."""
    kit = same_weights(small_model(layout)).bfloat16()
    for name, linear in [*kit.transformer.h.named_modules()]:
        if isinstance(linear, nn.Linear):
            layer = PackedLinear(linear.out_features, linear.in_features, "int8", linear.bias)
            values, scales = quantised8(linear.weight.detach())
            layer.weight, layer.scales = frozen(values), frozen(scales)
            kit.transformer.h.set_submodule(name, layer)
    return get_peft_model(kit, LoraConfig(target_modules=["query_key_value", "dense_4h_to_h"], task_type="CAUSAL_LM"))


def test_qlora_keeps_hidden_states_of_as_many_bytes_as_are_planned(layout, autocast):
    model, found = quantised(layout), set()
    for name, module in model.named_modules():
        if name.endswith(("h.0", "h.1", "mlp.act", "lm_head")):
            module.register_forward_pre_hook(lambda _, inputs: found.add(inputs[0].element_size()))
    model(input_ids=IDS, labels=IDS, skip_logits=True).loss.backward()
    assert found == {VALUE_BYTES["int8"]}


@pytest.mark.parametrize("layout", ["7b", "40b"])
def test_qlora_on_packed_documents_gives_the_kernel_16_bits(layout, autocast, monkeypatch):
    """torch's kernel takes no others, and autocast does not cast for it."""
    taken = []

    def kernel(query, key, value, *_, **options):
        taken.extend(each.dtype for each in (query, key, value))
        return query

    monkeypatch.setattr(packed_documents, "has_kernel", lambda _: True)
    monkeypatch.setattr(packed_documents, "_kernel", lambda: kernel)
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand_as(IDS)
    quantised(layout)(input_ids=IDS, position_ids=positions)
    assert taken == [torch.bfloat16] * 3 * 2
