"""A cache with room for the next tokens gives what transformers' DynamicCache gives, and writes less."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from falcon_kit.model.cache import ROOM, GrowingLayer, with_room
from tests.model.conftest import IDS, greedy, pair, run


def tokens(count, rows=2):
    """Keys and values (rows, 2, count, 4)."""
    return torch.randn(rows, 2, count, 4), torch.randn(rows, 2, count, 4)


class Written(TorchDispatchMode):
    """Numbers written by concatenations and copies, under the rules of inference."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.cat.default, torch.ops.aten.copy_.default):
            self.count += result.numel()
        return result


def test_generation_makes_a_cache_with_room(layout):
    cache = pair(layout)[1].generate(IDS, max_new_tokens=3, return_dict_in_generate=True).past_key_values
    assert all(type(each) is GrowingLayer for each in cache.layers)


def test_a_forward_pass_makes_a_cache_with_room(layout):
    cache = pair(layout)[1](IDS, use_cache=True).past_key_values
    assert all(type(each) is GrowingLayer for each in cache.layers)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"num_return_sequences": 3, "do_sample": True, "temperature": 2.0},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_each_way_of_generating_gives_the_tokens_of_transformers_cache(layout, options):
    kit = pair(layout)[1]
    ids = IDS[:1] if "prompt_lookup_num_tokens" in options else IDS
    options = {"max_new_tokens": ROOM + 9, "min_new_tokens": ROOM + 9} | options
    texts = []
    for cache in (None, DynamicCache(config=kit.config)):
        torch.manual_seed(0)
        texts.append(kit.generate(ids, past_key_values=cache, **options))
    assert torch.equal(*texts)


@pytest.mark.parametrize("part", ["model", "decoder"])
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_forward_pass_takes_a_cache_by_the_name_of_any_transformers(part, name):
    kit = pair("40b")[1] if part == "model" else pair("40b")[1].transformer
    given = DynamicCache(config=kit.config)
    run(kit, **{name: given})
    assert given.get_seq_length() == IDS.shape[1]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_of_the_plain_model_takes_a_cache_by_the_name_of_any_transformers(name):
    given = DynamicCache(config=pair("40b")[1].config)
    tokens = greedy(pair("40b")[1], IDS, 3, **{name: given})
    assert torch.equal(tokens, greedy(pair("40b")[1], IDS, 3))
    assert given.get_seq_length() == IDS.shape[1] + 2


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(["step", "crop", "reorder", "copy", "deepcopy", "reset"]), st.integers(1, 70)))
)
def test_any_sequence_of_changes_gives_the_keys_and_values_of_transformers_layer(changes):
    """Each copy goes on by itself beside the layer that it was made of."""
    torch.manual_seed(0)
    pairs = [(GrowingLayer(), DynamicLayer())]
    with torch.inference_mode():
        for change, number in [("step", 5), *changes]:
            for mine, stock in list(pairs):
                match change:
                    case "step":
                        new = tokens(number)
                        mine.update(*new)
                        stock.update(*new)
                    case "crop" if mine.get_seq_length() > number:
                        mine.crop(-number)
                        stock.crop(-number)
                    case "reorder":
                        mine.reorder_cache(torch.tensor([1, 0]))
                        stock.reorder_cache(torch.tensor([1, 0]))
                    case "reset":
                        mine.reset()
                        stock.reset()
                    case "copy" | "deepcopy" if len(pairs) < 4:
                        made = copy.copy if change == "copy" else copy.deepcopy
                        pairs.append((made(mine), made(stock)))
            for mine, stock in pairs:
                assert mine.get_seq_length() == stock.get_seq_length()
                if mine.get_seq_length():
                    assert torch.equal(mine.keys, stock.keys)
                    assert torch.equal(mine.values, stock.values)


def test_keys_that_a_caller_keeps_do_not_change():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(*tokens(5))
        layer.update(*tokens(1))
        kept, before = layer.keys, layer.keys.clone()
        layer.crop(-3)
        layer.update(*tokens(2))
        layer.update(*tokens(30))
    assert torch.equal(kept, before)


def test_replaced_values_stay_replaced():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(*tokens(5))
        layer.update(*tokens(1))
        layer.values = torch.zeros_like(layer.values)
        values = layer.update(*tokens(1))[1]
    assert values[..., :6, :].eq(0).all()
    assert values[..., 6:, :].ne(0).any()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_step_writes_its_own_token_and_no_others(mode):
    layer = GrowingLayer()
    with mode():
        layer.update(*tokens(1000))
        with Written() as written:
            for _ in range(ROOM):
                layer.update(*tokens(1))
    assert written.count == 2 * 2 * 2 * 4 * (1000 + ROOM)  # once all that was there, and each new token


def test_a_full_layer_makes_room_for_no_more_than_it_says():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(*tokens(100))
        layer.update(*tokens(1))
    assert layer.keys.untyped_storage().nbytes() == 4 * 2 * 2 * 4 * (100 + ROOM)


@pytest.mark.parametrize("made_in", ["inference", "no_grad"])
def test_a_cache_goes_on_in_another_mode_than_it_began_in(layout, made_in):
    kit = pair(layout)[1]
    modes = [torch.inference_mode(), torch.no_grad(), torch.enable_grad()]
    if made_in == "no_grad":
        modes.reverse()
    cache = None
    for start, mode in zip((0, 4, 5, 6), [modes[0], *modes], strict=True):
        with mode:
            ids = IDS[:, : 4 + start] if start == 0 else IDS[:, start : start + 1]
            output = kit(ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
    with torch.inference_mode():
        assert torch.allclose(output.logits[:, -1], kit(IDS[:, :7]).logits[:, -1], atol=1e-4)


def test_gradients_flow_through_a_cache_as_in_transformers(layout):
    gradients = []
    for cache in (with_room(DynamicCache(config=(kit := pair(layout)[1]).config)), DynamicCache(config=kit.config)):
        embedded = kit.get_input_embeddings()(IDS).detach().requires_grad_()
        kit(inputs_embeds=embedded[:, :5], past_key_values=cache, use_cache=True)
        steps = [
            kit(inputs_embeds=embedded[:, at : at + 1], past_key_values=cache, use_cache=True).logits.sum()
            for at in (5, 6)
        ]
        sum(steps).backward()
        gradients.append(embedded.grad)
    assert torch.equal(*gradients)
    assert gradients[0][:, :5].ne(0).any()


def test_other_shapes_are_refused_as_in_transformers():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(*tokens(5))
        layer.update(*tokens(1))
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            layer.update(*tokens(1, rows=1))


def test_a_cache_of_the_caller_keeps_its_layers():
    kit = pair("40b")[1]
    cache = DynamicCache(config=kit.config)
    greedy(kit, IDS, 3, past_key_values=cache)
    assert {type(each).__name__ for each in cache.layers} == {"DynamicLayer"}
