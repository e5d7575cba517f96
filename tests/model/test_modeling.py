"""The kit's Falcon against transformers' own, on the same weights, in every published layout."""

import copy
import json

import pytest
import torch
from transformers import DynamicCache, FalconConfig, QuantizedCache, StaticCache
from transformers import FalconForCausalLM as StockFalcon

import falcon_kit as fk
from falcon_kit.model.modeling import FalconForCausalLM
from tests.conftest import small_config, small_model
from tests.model.conftest import (
    IDS,
    assert_close,
    greedy,
    pair,
    run,
    same_weights,
)

# The same as transformers


def test_logits_equal(layout):
    stock, kit = pair(layout)
    assert_close(run(kit).logits, run(stock).logits)


@pytest.mark.parametrize(
    "changes", [{"layer_norm_epsilon": 0.5}, {"activation": "relu"}, {"rope_parameters": {"rope_theta": 30.0}}]
)
def test_logits_equal_with_other_values_of_the_config(layout, changes):
    stock = small_model(layout, **changes)
    assert_close(run(same_weights(stock)).logits, run(stock).logits)


def test_logits_in_bfloat16_are_as_near_to_float32_as_transformers_are(layout):
    exact = run(pair(layout)[0]).logits
    stock, kit = (run(model).logits.float() for model in pair(layout, torch.bfloat16))
    assert (kit - exact).abs().mean() < 1.1 * (stock - exact).abs().mean()


def test_hidden_states_equal(layout):
    stock, kit = (run(model, output_hidden_states=True).hidden_states for model in pair(layout))
    assert len(kit) == len(stock)
    assert_close(torch.stack(kit), torch.stack(stock))


def test_the_loss_and_all_gradients_equal(layout):
    stock = small_model(layout)
    kit = same_weights(stock)
    losses = [model.train()(IDS, labels=IDS).loss for model in (stock, kit)]
    [loss.backward() for loss in losses]
    assert_close(losses[1], losses[0])
    expected = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, parameter in kit.named_parameters():
        assert_close(parameter.grad, expected[name])


def test_greedy_tokens_equal_over_64_steps(layout):
    stock, kit = pair(layout)
    assert torch.equal(greedy(kit), greedy(stock))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampled_tokens_equal_with_the_same_seed(layout, dtype):
    drawn = []
    for model in pair(layout, dtype):
        torch.manual_seed(0)
        drawn.append(model.generate(IDS[:1], attention_mask=torch.ones(1, 24), do_sample=True, max_new_tokens=8))
    assert torch.equal(*drawn)


# The cache


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_cache_is_returned_where_transformers_returns_one(use_cache):
    stock, kit = (run(model, use_cache=use_cache).past_key_values for model in pair("40b"))
    assert (kit is None, stock is None) == (not use_cache, not use_cache)


def test_the_cache_holds_the_kv_heads_and_nothing_else(layout):
    kit = pair(layout)[1]
    spec = kit.transformer.spec
    for layer in run(kit).past_key_values.layers:
        assert layer.keys.shape == layer.values.shape == (3, spec.kv_heads, 24, spec.head_dim)


def test_the_cache_takes_the_bytes_of_the_closed_form(layout):
    kit = pair(layout, torch.bfloat16)[1]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in run(kit).past_key_values.layers)
    assert held == kit.transformer.spec.kv_bytes_per_token() * IDS.numel()


def test_a_40b_keeps_a_sixteenth_of_what_transformers_keeps():
    """One layer of the true shape: 128 query heads, 8 KV heads."""
    config = {**small_config("40b").to_dict(), "hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8}
    sizes = []
    for kind in (StockFalcon, FalconForCausalLM):
        with torch.device("meta"):
            model = kind(FalconConfig(**config | {"num_hidden_layers": 1, "ffn_hidden_size": 256}))
            sizes.append(model(IDS.to("meta")).past_key_values.layers[0].keys.nbytes)
    assert sizes[0] == 16 * sizes[1]


@pytest.mark.parametrize("chunks", [[1] * 24, [10, 14], [23, 1], [5, 1, 9, 1, 8]])
def test_cached_steps_equal_one_pass(layout, chunks):
    kit, past = pair(layout)[1], DynamicCache()
    pieces = [run(kit, piece, past_key_values=past).logits for piece in IDS.split(chunks, dim=1)]
    assert_close(torch.cat(pieces, dim=1), run(kit).logits)


def test_cached_steps_in_a_static_cache_equal_one_pass(layout):
    kit = pair(layout)[1]
    past = StaticCache(kit.config, max_cache_len=40)
    pieces = [run(kit, piece, past_key_values=past).logits for piece in IDS.split([10, 1, 12, 1], dim=1)]
    assert_close(torch.cat(pieces, dim=1), run(kit).logits)


def test_a_static_cache_gives_the_same_tokens(layout):
    kit = pair(layout)[1]
    assert torch.equal(greedy(kit, cache_implementation="static"), greedy(kit))


def test_a_quantised_cache_gives_logits_near_those_of_a_full_one(layout):
    if torch.tensor(1e4).to(torch.float8_e4m3fn).isnan():
        pytest.skip("this torch rounds what is too large for float8 to NaN, and transformers' cache with it")
    kit = pair(layout)[1]
    past = QuantizedCache("fp8", kit.config)
    pieces = [run(kit, piece, past_key_values=past).logits for piece in IDS.split([20, 1, 1, 1, 1], dim=1)]
    exact = run(kit).logits
    error = (torch.cat(pieces, dim=1) - exact).abs().mean() / exact.abs().mean()
    assert 0 < error < 0.2


def test_a_prompt_kept_in_a_cache_can_be_continued_twice(layout):
    kit = pair(layout)[1]
    prompt, first, second = IDS[:1, :12], IDS[:1, :18], torch.cat([IDS[:1, :12], IDS[1:2, :6]], dim=1)
    kept = run(kit, prompt).past_key_values
    for whole in (first, second):
        assert torch.equal(greedy(kit, whole, 8, past_key_values=copy.deepcopy(kept)), greedy(kit, whole, 8))


# Generation in all its modes


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "num_beams": 4},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 5},
        {"use_cache": False},
    ],
    ids=lambda mode: next(iter(mode)),
)
def test_a_mode_of_generate_gives_transformers_tokens(layout, mode):
    stock, kit = pair(layout)
    assert torch.equal(greedy(kit, IDS[:1], 16, **mode), greedy(stock, IDS[:1], 16, **mode))


def test_assisted_generation_gives_the_models_own_tokens(layout):
    kit = pair(layout)[1]
    assistant = same_weights(small_model(layout, num_hidden_layers=1))
    assert torch.equal(greedy(kit, IDS[:1], 16, assistant_model=assistant), greedy(kit, IDS[:1], 16))


def test_several_sequences_start_from_the_same_prompt(layout):
    kit = pair(layout)[1]
    torch.manual_seed(0)
    drawn = kit.generate(
        IDS[:2], attention_mask=torch.ones(2, 24), do_sample=True, num_return_sequences=3, max_new_tokens=4
    )
    assert torch.equal(drawn[:, :24], IDS[:2].repeat_interleave(3, dim=0))


def test_a_static_cache_is_sized_by_kv_heads_in_chunked_prefill():
    kit = pair("40b")[1]
    tokens = greedy(kit, IDS, 8, cache_implementation="static", prefill_chunk_size=5)
    assert torch.equal(tokens, greedy(kit, IDS, 8))


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_a_batch_with_left_padding_equals_single_texts(layout, cache_implementation):
    kit = pair(layout)[1]
    mask = torch.ones_like(IDS)
    mask[0, :9], mask[1, :1] = 0, 0
    together = greedy(kit, IDS, 8, attention_mask=mask, cache_implementation=cache_implementation)
    alone = [greedy(kit, IDS[row : row + 1, 24 - int(mask[row].sum()) :], 8) for row in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_inputs_embeds_equal_the_tokens_they_stand_for(layout):
    kit = pair(layout)[1]
    embeds = kit.get_input_embeddings()(IDS)
    assert_close(run(kit, None, inputs_embeds=embeds).logits, run(kit).logits)


# Compilation


@pytest.mark.parametrize("layout", ["7b", "40b", "rw"])
@pytest.mark.parametrize("positions", [None, [*range(10), *range(14)]], ids=["whole", "packed"])
def test_the_model_compiles_into_one_graph(layout, positions):
    kit = pair(layout)[1]
    given = {} if positions is None else {"position_ids": torch.tensor([positions])}
    torch._dynamo.reset()
    compiled = torch.compile(kit, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, **given).logits, run(kit, **given).logits)


# Checkpoints


def test_a_checkpoint_of_the_kit_is_a_plain_falcon_for_transformers(layout, tmp_path):
    stock, kit = pair(layout)
    kit.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["FalconForCausalLM"]
    assert torch.equal(run(StockFalcon.from_pretrained(tmp_path)).logits, run(stock).logits)


def test_a_checkpoint_of_transformers_is_one_for_the_kit(layout, tmp_path):
    stock, kit = pair(layout)
    stock.save_pretrained(tmp_path)
    assert torch.equal(run(FalconForCausalLM.from_pretrained(tmp_path)).logits, run(kit).logits)


def test_random_weights_are_drawn_as_transformers_draws_them():
    stock, kit = (kind(small_config("rw", initializer_range=0.1)) for kind in (StockFalcon, FalconForCausalLM))
    expected = {name: parameter.std().item() for name, parameter in stock.named_parameters()}
    for name, parameter in kit.named_parameters():
        assert parameter.std().item() == pytest.approx(expected[name], rel=0.05)


# Bad input


def test_tuples_come_back_where_the_config_says_so():
    kit = copy.deepcopy(pair("40b")[1])
    kit.config.return_dict = False
    assert_close(run(kit)[0], run(pair("40b")[1]).logits)


def test_head_counts_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="d_model 256 must be a multiple of 4 query heads, and those of 3 KV heads"):
        FalconForCausalLM(small_config("40b", num_kv_heads=3))


def test_a_text_that_is_no_row_is_refused():
    with pytest.raises(ValueError, match=r"input_ids has shape \(24,\), not \(rows, tokens\)"):
        run(pair("40b")[1], IDS[0])


@pytest.mark.parametrize("both", [True, False])
def test_tokens_and_embeddings_together_or_neither_are_refused(both):
    kit = pair("40b")[1]
    given = {"input_ids": IDS, "inputs_embeds": kit.get_input_embeddings()(IDS)} if both else {}
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        kit(**given)


# The embedded model


def test_falconet_behaves_as_with_transformers_attention():
    """The embedded model, trained: no random weights."""
    own, theirs = (fk.load("falconet-instruct", attention=name) for name in ("grouped", "transformers"))
    prompt = [{"role": "user", "content": "What does a giraffe eat?"}]
    assert (
        own.chat(prompt, max_new_tokens=60, do_sample=False).text
        == theirs.chat(prompt, max_new_tokens=60, do_sample=False).text
    )
