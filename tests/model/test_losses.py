"""The chunked loss is transformers' own, in value and gradient, and holds no logits of all tokens."""

import pytest
import torch

from falcon_kit.model import losses
from falcon_kit.model.modeling import FalconForCausalLM
from tests.catalogue.test_memory import PeakBytes
from tests.conftest import small_config


@pytest.fixture
def model(layout):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FalconForCausalLM(small_config(layout, initializer_range=0.1))


def labelled(trained=0.5):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 2048, (2, 40), generator=generator)
    return ids, ids.masked_fill(torch.rand(ids.shape, generator=generator) > trained, -100)


def loss_and_gradients(model, ids, labels, **arguments):
    model.zero_grad()
    loss = model(input_ids=ids, labels=labels, use_cache=False, **arguments).loss
    loss.backward()
    return loss.detach(), {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("head_trained", [False, True])
def test_loss_and_gradients_are_those_of_whole_logits(model, monkeypatch, chunk, head_trained):
    monkeypatch.setattr(losses, "LOSS_CHUNK", chunk)
    model.lm_head.weight.requires_grad_(head_trained)
    expected, expected_gradients = loss_and_gradients(model, *labelled())
    loss, gradients = loss_and_gradients(model, *labelled(), skip_logits=True)
    torch.testing.assert_close(loss, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_loss_is_divided_by_the_count_that_is_given(model):
    ids, labels = labelled()
    expected = model(input_ids=ids, labels=labels, num_items_in_batch=123).loss
    torch.testing.assert_close(
        model(input_ids=ids, labels=labels, num_items_in_batch=123, skip_logits=True).loss, expected
    )


def test_without_a_label_the_loss_is_zero_and_so_are_the_gradients(model):
    ids, labels = labelled(trained=0.0)
    loss, gradients = loss_and_gradients(model, ids, labels, skip_logits=True)
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients.values())


def test_nothing_is_differentiated_where_no_gradient_is_wanted(model):
    ids, labels = labelled()
    expected = model(input_ids=ids, labels=labels).loss.detach()
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels, skip_logits=True).loss
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)


def test_half_precision_agrees_as_far_as_it_rounds(model):
    model.bfloat16()
    expected, expected_gradients = loss_and_gradients(model, *labelled())
    loss, gradients = loss_and_gradients(model, *labelled(), skip_logits=True)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    name = "transformer.h.0.mlp.dense_h_to_4h.weight"
    likeness = torch.cosine_similarity(gradients[name].flatten().float(), expected_gradients[name].flatten().float(), 0)
    assert likeness > 0.999


def test_the_logits_of_all_tokens_are_never_in_memory(monkeypatch):
    monkeypatch.setattr(losses, "LOSS_CHUNK", 32)
    model = FalconForCausalLM(small_config("40b", num_hidden_layers=1, vocab_size=16384))
    model.requires_grad_(False)
    model.transformer.h[0].mlp.dense_h_to_4h.weight.requires_grad_(True)
    ids = torch.zeros(2, 128, dtype=torch.long)
    peaks = {}
    for skip in (False, True):
        with PeakBytes([*model.parameters(), *model.buffers()]) as measured:
            model(input_ids=ids, labels=ids, use_cache=False, skip_logits=skip).loss.backward()
        peaks[skip] = measured.peak
        model.zero_grad()
    logits = 2 * 128 * 16384 * 4
    assert peaks[True] < logits < 3 * logits * 0.9 < peaks[False]
