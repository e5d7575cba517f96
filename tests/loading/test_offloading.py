"""Weights in host memory, from which a GPU takes them layer by layer."""

import pytest
import torch
from accelerate import cpu_offload

import falcon_kit as fk
from falcon_kit.catalogue.memory import linear_shapes
from falcon_kit.loading.reading import _pin_offloaded_weights, pinned_blocks
from tests.conftest import logits


@pytest.fixture
def offloaded(checkpoint):
    """A model whose weights are all in host memory between two steps; it computes on the CPU."""
    return cpu_offload(fk.load(checkpoint, dtype="float32").model)


@pytest.fixture
def pinned(monkeypatch):
    """The bytes of each block of pinned memory, on a machine with a GPU."""
    sizes, empty = [], torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def recorded(*shape, pin_memory=False, **options):
        if pin_memory:
            sizes.append(*shape)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", recorded)
    return sizes


def test_beside_a_gpu_offloaded_weights_are_pinned_and_compute_the_same(checkpoint, offloaded, pinned):
    expected, size = logits(offloaded), fk.load(checkpoint, dtype="float32", device_map="cpu").weight_bytes
    _pin_offloaded_weights(offloaded)
    assert sum(pinned) in (size, size + offloaded.lm_head.weight.nbytes)  # a tied head has a name of its own
    assert torch.equal(logits(offloaded), expected)


@pytest.mark.parametrize(
    ("name", "layers"), [("falcon-7b", 8), ("falcon-7b", 32), ("falcon-40b", 13), ("falcon-40b", 60)]
)
def test_pinned_memory_is_little_more_than_the_weights_in_it(name, layers):
    """torch rounds each block up to a power of two; alone, the weights of the 7B would take 1.6 times their bytes."""
    sizes = [2 * out * into for out, into in linear_shapes(fk.spec(name))] * layers
    blocks = pinned_blocks(sizes)
    assert sorted(index for block in blocks for index in block) == list(range(len(sizes)))
    taken = sum(1 << (sum(sizes[index] for index in block) - 1).bit_length() for block in blocks)
    assert taken < 1.1 * sum(sizes)


def test_without_a_gpu_nothing_is_pinned(offloaded, pinned, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _pin_offloaded_weights(offloaded)
    assert pinned == []


def test_where_the_system_limits_pinned_memory_the_weights_stay(offloaded, pinned, monkeypatch):
    expected = logits(offloaded)

    def refused(*shape, **options):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refused)
    _pin_offloaded_weights(offloaded)
    assert torch.equal(logits(offloaded), expected)


def test_a_model_that_is_loaded_has_its_offloaded_weights_pinned(checkpoint, monkeypatch):
    seen = []
    monkeypatch.setattr("falcon_kit.loading.reading._pin_offloaded_weights", seen.append)
    model = fk.load(checkpoint).model
    assert seen == [model]
