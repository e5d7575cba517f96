"""Attention within packed documents by torch's variable-length kernel, with a stand-in of it that runs on a CPU."""

import copy
from collections import Counter

import pytest
import torch
from accelerate.utils import send_to_device
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from falcon_kit.model import attention, packed_documents
from tests.conftest import small_model
from tests.model.conftest import IDS, assert_close, assert_documents_stay_apart, pair, run, same_weights

calls = Counter()


def stand_in(query, key, value, bounds, key_bounds, longest, longest_key, *, scale, window_size, enable_gqa):
    """What `varlen_attn` computes, document by document: query (N, H, D), key and value (N, G, D)."""
    calls["kernel"] += 1
    lengths = bounds.diff().tolist()
    assert torch.equal(bounds, key_bounds)
    assert (bounds.dtype, bounds[0], bounds[-1], window_size) == (torch.int32, 0, len(query), (-1, 0))
    assert longest == longest_key == max(lengths)
    rows = zip(*(each.transpose(0, 1).split(lengths, 1) for each in (query, key, value)), strict=True)
    parts = [
        functional.scaled_dot_product_attention(*row, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        for row in rows
    ]
    return torch.cat(parts, 1).transpose(0, 1)


@pytest.fixture
def kernel(monkeypatch):
    """The CPU as a device that has the kernel."""
    calls.clear()
    monkeypatch.setattr(packed_documents, "has_kernel", lambda _: True)
    monkeypatch.setattr(packed_documents, "_kernel", lambda: stand_in)


@pytest.fixture(params=["7b", "40b"])
def rotary(request):
    return request.param


def test_packed_documents_have_the_logits_that_they_have_alone(kernel, rotary):
    assert_documents_stay_apart(pair(rotary)[1], IDS[:1], [10, 1, 13])
    assert calls["kernel"] == len(pair(rotary)[1].transformer.h)


@given(cuts=st.sets(st.integers(1, 23)), more=st.sets(st.integers(1, 23)))
def test_rows_with_documents_of_any_lengths_are_those_under_a_mask(cuts, more):
    kit = pair("40b")[1]
    edges = [[0, *sorted(each), 24] for each in (cuts, more)]
    positions = torch.stack([torch.cat([*map(torch.arange, torch.tensor(each).diff())]) for each in edges])
    expected = run(kit, IDS[:2], position_ids=positions).logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_documents, "has_kernel", lambda _: True)
        patch.setattr(packed_documents, "_kernel", lambda: stand_in)
        assert_close(run(kit, IDS[:2], position_ids=positions).logits, expected)


def loss_and_gradients(kit, positions):
    kit.zero_grad()
    kit(IDS[:2], position_ids=positions, labels=IDS[:2]).loss.backward()
    return [each.grad.clone() for each in kit.parameters()]


def test_gradients_are_those_under_a_mask(monkeypatch, rotary):
    kit = copy.deepcopy(pair(rotary)[1])
    positions = torch.stack([torch.arange(24), torch.cat([torch.arange(7), torch.arange(17)])])
    expected = loss_and_gradients(kit, positions)
    monkeypatch.setattr(packed_documents, "has_kernel", lambda _: True)
    monkeypatch.setattr(packed_documents, "_kernel", lambda: stand_in)
    for found, right in zip(loss_and_gradients(kit, positions), expected, strict=True):
        assert_close(found, right)


class Largest(TorchDispatchMode):
    """The most values of a tensor that the operations in the block have made."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = [each for each in (made if isinstance(made, tuple | list) else [made]) if torch.is_tensor(each)]
        Largest.values = max([Largest.values, *(each.numel() for each in tensors)])
        return made


def most_values(kit, positions):
    Largest.values = 0
    ids = torch.zeros_like(positions)
    with Largest():
        kit.transformer(ids, position_ids=positions).last_hidden_state.sum().backward()
    return Largest.values


def test_nothing_grows_with_the_square_of_the_tokens(monkeypatch):
    kit = same_weights(small_model("7b", max_position_embeddings=2048))
    positions = torch.arange(16).repeat(128)[None]
    monkeypatch.setattr(attention, "_takes_groups", lambda *_: False)  # as on a GPU under a mask
    assert most_values(kit, positions) >= 2048**2
    monkeypatch.setattr(packed_documents, "has_kernel", lambda _: True)
    monkeypatch.setattr(packed_documents, "_kernel", lambda: stand_in)
    assert (
        most_values(kit, positions) == 2048 * kit.transformer.spec.intermediate_size
    )  # the MLP's, as for one document


@pytest.mark.parametrize(
    "options",
    [{"attention_mask": torch.ones(1, 24)}, {"output_attentions": True}, {"position_ids": torch.arange(24)[None]}],
    ids=["a mask", "probabilities", "one document"],
)
def test_what_the_kernel_does_not_compute_goes_the_other_way(kernel, options):
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    run(pair("40b")[1], IDS[:1], **{"position_ids": positions, **options})
    assert calls["kernel"] == 0


def test_alibi_and_dropout_go_the_other_way(kernel):
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    run(pair("rw")[1], IDS[:1], position_ids=positions)
    kit = copy.deepcopy(pair("40b")[1]).train()
    kit.config.attention_dropout = 0.1
    kit(IDS[:1], position_ids=positions)
    assert calls["kernel"] == 0


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(71, 1), (128, 8), (4, 4)])
def test_torchs_function_takes_what_it_is_given(query_heads, kv_heads):
    if packed_documents._kernel() is None:
        pytest.skip("this torch has no varlen_attn with grouped keys, which the pinned one has")
    with FakeTensorMode():
        query, key = (torch.empty(2, heads, 24, 64, dtype=torch.bfloat16) for heads in (query_heads, kv_heads))
        documents = packed_documents.Documents(torch.zeros(4, dtype=torch.int32), 10)
        output = packed_documents.packed_attention(query, key, key, documents, 0.125)
    assert output.shape == (2, 24, query_heads, 64)


def test_documents_are_found_across_rows():
    numbers = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 0, 0]])
    bounds, longest = packed_documents.find_documents(numbers)
    assert (bounds.tolist(), longest) == ([0, 2, 3, 4, 6, 9], 3)


def test_documents_follow_the_layers_to_another_device():
    moved = send_to_device({"attention_mask": packed_documents.find_documents(torch.zeros(1, 4))}, "meta")[
        "attention_mask"
    ]
    assert (type(moved), moved.bounds.device.type, moved.longest) == (packed_documents.Documents, "meta", 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_has_no_such_kernel(dtype):
    assert not packed_documents.has_kernel(torch.zeros(1, dtype=dtype))
