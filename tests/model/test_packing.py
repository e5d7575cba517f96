"""Packed documents: each has the logits that it has by itself."""

import copy
import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import small_model
from tests.model.conftest import (
    IDS,
    assert_close,
    assert_documents_stay_apart,
    pair,
    run,
    same_weights,
)


def test_packed_documents_do_not_see_each_other(layout):
    assert_documents_stay_apart(pair(layout)[1], IDS[:1], [10, 1, 13])


def test_packed_documents_stay_apart_when_a_mask_of_ones_is_given_too(layout):
    assert_documents_stay_apart(pair(layout)[1], IDS[:1], [10, 14], attention_mask=torch.ones(1, 24))


def test_packed_documents_stay_apart_in_eager_attention(layout):
    kit = copy.deepcopy(pair(layout)[1])
    kit.set_attn_implementation("eager")
    assert_documents_stay_apart(kit, IDS[:1], [10, 14])


def test_alibi_starts_again_with_each_document_so_that_its_rounding_does_too():
    """In bfloat16, as falcon-rw was trained, places beyond 256 are rounded; a document's own are not."""
    ids = torch.randint(3, 2048, (1, 324), generator=torch.Generator().manual_seed(2))
    assert_documents_stay_apart(pair("rw")[1], ids, [300, 24])


@given(cuts=st.sets(st.integers(1, 23)))
def test_documents_of_any_lengths_can_be_packed(cuts):
    edges = [0, *sorted(cuts), 24]
    lengths = [end - start for start, end in itertools.pairwise(edges)]
    assert_documents_stay_apart(pair("40b")[1], IDS[:1], lengths)


def test_rows_of_a_batch_may_be_packed_differently(layout):
    kit = pair(layout)[1]
    positions = torch.stack([torch.arange(24), torch.cat([torch.arange(7), torch.arange(17)])])
    expected = torch.cat(
        [run(kit, IDS[:1]).logits, torch.cat([run(kit, each).logits for each in IDS[1:2].split([7, 17], 1)], 1)]
    )
    assert_close(run(kit, IDS[:2], position_ids=positions).logits, expected)


def test_a_gap_in_the_positions_divides_no_document(layout):
    stock, kit = pair(layout)
    positions = torch.cat([torch.arange(10), torch.arange(20, 34)])[None]
    assert_close(run(kit, IDS[:1], position_ids=positions).logits, run(stock, IDS[:1], position_ids=positions).logits)


def test_packed_documents_together_may_be_longer_than_the_context():
    kit = same_weights(small_model("40b", max_position_embeddings=16))
    assert_documents_stay_apart(kit, IDS[:1], [12, 12])


def test_no_gradient_flows_from_a_packed_document_into_another(layout):
    kit = pair(layout)[1]
    embeds = kit.get_input_embeddings()(IDS[:1]).detach().requires_grad_()
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    kit(inputs_embeds=embeds, position_ids=positions).logits[:, 10:].sum().backward()
    assert (embeds.grad[:, :10].abs().max(), embeds.grad[:, 10:].abs().min() > 0) == (0, True)
