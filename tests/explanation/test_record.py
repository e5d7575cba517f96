"""What is recorded of a layer: equal to what transformers' own Falcon computes, in every layout."""

from dataclasses import replace

import pytest
import torch
from transformers import FalconForCausalLM as StockFalcon

from falcon_kit.explanation.record import NEURONS, NORMS, SHOWN, record
from falcon_kit.explanation.route import attention_rows, route
from falcon_kit.inspection.hooks import inspect_model
from falcon_kit.model.modeling import FalconForCausalLM
from tests.conftest import LAYOUTS
from tests.inspection.models import model
from tests.inspection.test_attention import oracle

IDS = [23, 900, 77, 1500, 42, 900, 77, 5]


@pytest.fixture(params=LAYOUTS, scope="module")
def layout(request):
    return request.param


@pytest.fixture(params=[FalconForCausalLM, StockFalcon], ids=["kit", "transformers"], scope="module")
def inspected(request, layout, tokenizer):
    return inspect_model((model(layout, request.param), tokenizer))


@pytest.fixture(scope="module")
def stock(layout):
    """What transformers' own Falcon returns for the text, with all hidden states."""
    with torch.inference_mode():
        return model(layout, StockFalcon)(torch.tensor([IDS]), output_hidden_states=True, use_cache=False)


@pytest.fixture(scope="module")
def maps(layout):
    """The attention probabilities (L, H, T, T) that transformers' own stock attention writes out."""
    return torch.from_numpy(oracle(layout, IDS))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_reads_and_writes_the_hidden_states_of_transformers(inspected, stock):
    vectors = record(inspected, IDS, 1).layer.vectors
    close(vectors["input"].first, stock.hidden_states[1][0, :, :SHOWN])
    with torch.inference_mode():
        normed = inspected.decoder.ln_f(small_output(inspected, 1))
    close(normed, stock.hidden_states[2][0])  # transformers' last hidden states are those after the last LayerNorm
    close(vectors["output"].first, small_output(inspected, 1)[:, :SHOWN])


def small_output(inspected, layer):
    """The output (T, d) of a layer, taken by a hook of this test."""
    found = []
    hook = inspected.layers[layer].register_forward_hook(lambda module, args, output: found.append(output))
    with torch.inference_mode():
        inspected.model(torch.tensor([IDS]))
    hook.remove()
    return (found[0][0] if isinstance(found[0], tuple) else found[0])[0]


def test_the_statistics_are_those_of_the_whole_vector(inspected, stock):
    vectors, hidden = record(inspected, IDS, 1).layer.vectors["input"], stock.hidden_states[1][0]
    close(vectors.mean, hidden.mean(-1))
    close(vectors.deviation, hidden.std(-1, correction=0))
    close(vectors.norm, hidden.norm(dim=-1))


def test_the_sums_add_up(inspected):
    vectors = record(inspected, IDS, 0).layer.vectors
    total = sum(vectors[name].first for name in ("input", "attention", "mlp"))
    close(vectors["output"].first, total)


def test_every_layer_norm_of_the_layer_is_recorded(inspected):
    vectors = record(inspected, IDS, 0).layer.vectors
    names = [name for name, _ in inspected.layers[0].named_children() if "norm" in name or name.startswith("ln_")]
    assert sorted(names) == sorted(name for name in NORMS if name in vectors)
    assert len(names) == inspected.spec.norms_per_block


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_probabilities_are_those_of_transformers(inspected, maps, layer):
    found = record(inspected, IDS, layer).layer
    rows = attention_rows(found.heads, found.bias, 0, len(IDS))
    close(rows, maps[layer])


def test_the_values_weighted_by_attention_are_the_input_of_the_output_projection(inspected):
    found, module = record(inspected, IDS, 0).layer, inspected.layers[0].self_attention
    values = found.heads.value.repeat_interleave(inspected.spec.queries_per_kv_head, 0)
    weighted = attention_rows(found.heads, found.bias, 0, len(IDS)) @ values  # (H, T, D)
    with torch.inference_mode():
        close(module.dense(weighted.transpose(0, 1).flatten(1))[:, :SHOWN], found.vectors["attention"].first)


def test_the_rotary_embedding_turns_queries_and_keys(inspected):
    found = record(inspected, IDS, 0).layer
    close(found.query_before.norm(dim=-1), found.heads.query.norm(dim=-1))
    close(found.query_before[:, 0], found.heads.query[:, 0])
    turned = not torch.allclose(found.key_before[:, 3], found.heads.key[:, 3], atol=1e-3)
    assert turned == (inspected.spec.positions != "alibi")


def test_the_strongest_neurons_are_those_after_the_activation(inspected):
    seen = []
    hook = inspected.layers[0].mlp.dense_4h_to_h.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    found = record(inspected, IDS, 0).layer
    hook.remove()
    expected = seen[0].abs().topk(NEURONS)
    close(found.activations.abs(), expected.values)
    close(found.activations, seen[0].gather(1, found.neurons))
    close(found.active, (seen[0] > 0).float().mean(-1))


def test_the_logits_are_those_of_the_last_token(inspected, stock):
    close(record(inspected, IDS, 0).logits, stock.logits[0, -1])


def test_a_layer_that_is_called_alone_gives_what_the_whole_model_gives(inspected):
    alone, whole = record(inspected, IDS, 1, record(inspected, IDS, 0)), record(inspected, IDS, 1)
    for name, vectors in whole.layer.vectors.items():
        close(alone.layer.vectors[name].norm, vectors.norm)
    close(alone.layer.heads.query, whole.layer.heads.query)
    close(alone.layer.activations, whole.layer.activations)
    assert torch.equal(alone.logits, whole.logits)


def test_what_the_layers_of_a_large_model_were_called_with_is_not_kept(inspected, monkeypatch):
    monkeypatch.setattr("falcon_kit.explanation.record._MAX_BYTES", 100)
    found = record(inspected, IDS, 0)
    assert found.calls == ()
    close(record(inspected, IDS, 1, found).layer.heads.query, record(inspected, IDS, 1).layer.heads.query)


@pytest.mark.parametrize("function", [lambda *what: record(*what, 0), route], ids=["record", "route"])
def test_a_rank_with_some_of_the_heads_is_refused_as_by_the_other_inspections(inspected, function):
    divided = replace(inspected, spec=replace(inspected.spec, query_heads=2, kv_heads=1, d_model=128))
    with pytest.raises(ValueError, match="has only some of the heads: load it without tensor_parallel"):
        function(divided, IDS)
    assert [module for module in inspected.model.modules() if module._forward_hooks] == []


def test_the_model_has_no_hooks_afterwards_and_keeps_its_mode(inspected):
    inspected.model.train()
    try:
        record(inspected, IDS, 0)
        route(inspected, IDS)
        assert all(module.training for module in inspected.model.modules())
        assert [module for module in inspected.model.modules() if module._forward_hooks] == []
    finally:
        inspected.model.eval()


def test_the_route_follows_the_largest_probability_times_the_norm_of_the_value(inspected, maps):
    position = len(IDS) - 1
    for step in route(inspected, IDS):
        found = record(inspected, IDS, step.layer).layer
        lengths = found.heads.value.norm(dim=-1).repeat_interleave(inspected.spec.queries_per_kv_head, 0)  # (H, T)
        row = maps[step.layer][:, position, :position]  # without the token itself
        assert step.position == position
        if position:
            matter = row * lengths[:, :position]
            assert float(matter[step.head, step.key]) == pytest.approx(float(matter.max()), rel=1e-4)
            assert step.probability == pytest.approx(float(row[step.head, step.key]), abs=1e-4)
        position = step.key
    assert step.layer == 0


def test_a_route_that_reached_the_first_token_stays_there(inspected):
    steps = route(inspected, IDS[:1])
    assert [(step.layer, step.position, step.key) for step in steps] == [(1, 0, 0), (0, 0, 0)]


def test_the_route_does_not_depend_on_how_many_queries_are_computed_at_once(inspected, monkeypatch):
    whole = route(inspected, IDS)
    monkeypatch.setattr("falcon_kit.explanation.route.BLOCK_SIZE", 1)
    assert [(step.head, step.key) for step in route(inspected, IDS)] == [(step.head, step.key) for step in whole]
