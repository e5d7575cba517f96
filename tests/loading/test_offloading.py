"""Weights in host memory, from which a GPU takes them layer by layer."""

import pytest
import torch
from accelerate import cpu_offload

import falcon_kit as fk
from falcon_kit.loading.reading import _pin_offloaded_weights
from tests.conftest import logits


@pytest.fixture
def offloaded(checkpoint):
    """A model whose weights are all in host memory between two steps; it computes on the CPU."""
    return cpu_offload(fk.load(checkpoint, dtype="float32").model)


@pytest.fixture
def pinned(monkeypatch):
    """The bytes of each tensor that is pinned, on a machine with a GPU."""
    sizes = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: sizes.append(tensor.nbytes) or tensor.clone())
    return sizes


def test_beside_a_gpu_offloaded_weights_are_pinned_and_compute_the_same(checkpoint, offloaded, pinned):
    expected, size = logits(offloaded), fk.load(checkpoint, dtype="float32", device_map="cpu").weight_bytes
    _pin_offloaded_weights(offloaded)
    assert sum(pinned) in (size, size + offloaded.lm_head.weight.nbytes)  # a tied head has a name of its own
    assert torch.equal(logits(offloaded), expected)


def test_without_a_gpu_nothing_is_pinned(offloaded, pinned, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _pin_offloaded_weights(offloaded)
    assert pinned == []


def test_where_the_system_limits_pinned_memory_the_weights_stay(offloaded, pinned, monkeypatch):
    expected = logits(offloaded)

    def refused(tensor):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refused)
    _pin_offloaded_weights(offloaded)
    assert torch.equal(logits(offloaded), expected)


def test_a_model_that_is_loaded_has_its_offloaded_weights_pinned(checkpoint, monkeypatch):
    seen = []
    monkeypatch.setattr("falcon_kit.loading.reading._pin_offloaded_weights", seen.append)
    model = fk.load(checkpoint).model
    assert seen == [model]
