"""Attention recomputed block by block, against transformers' own probabilities and the definitions written out."""

import re

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers import FalconForCausalLM as StockFalcon

import falcon_kit as fk
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.inspection import probabilities as module
from falcon_kit.inspection.probabilities import STATISTICS
from falcon_kit.model.modeling import FalconForCausalLM
from falcon_kit.parallel.launching import ParallelFalcon
from tests.conftest import small_config, small_model
from tests.inspection.models import model
from tests.inspection.test_views_attention import weights

TEXT = "The giraffe is the tallest animal. The giraffe eats leaves, and the giraffe sleeps."


@pytest.fixture(scope="module")
def ids(tokenizer):
    return [*tokenizer(TEXT)["input_ids"], 30, 30, 31]  # a copy that follows its original counts by itself


def oracle(layout: str, ids) -> np.ndarray:
    """The probabilities (L, H, T, T) that transformers' own attention writes out, layer by layer.

    Each layer is called again with what came into it and with a mask that is causal and nothing else: transformers adds
    ALiBi to the mask as well as to the scores, which in eager attention makes it count twice.
    """
    stock, calls = model(layout, StockFalcon), []
    hooks = [
        layer.self_attention.register_forward_hook(
            lambda module, args, kwargs, output: calls.append((module, args, kwargs)), with_kwargs=True
        )
        for layer in stock.transformer.h
    ]
    causal = torch.full((1, 1, len(ids), len(ids)), torch.finfo(torch.float32).min).triu(1)
    with torch.inference_mode():
        stock(torch.tensor([ids]), use_cache=False)
        [hook.remove() for hook in hooks]
        changed = {"attention_mask": causal, "output_attentions": True, "layer_past": None}
        maps = [module(*args, **kwargs | changed)[1] for module, args, kwargs in list(calls)]
    return torch.cat(maps).numpy()


def everything(layout_or_falcon, tokenizer, ids, **options):
    falcon = (model(layout_or_falcon), tokenizer) if isinstance(layout_or_falcon, str) else layout_or_falcon
    return fk.attention(falcon, ids, layers=range(2), **options)


def stacked(view) -> np.ndarray:
    layers, heads = view.head_similarity.shape[:2]
    return np.array([[view.map(layer, head) for head in range(heads)] for layer in range(layers)])


def by_definition(maps: np.ndarray, ids) -> dict[str, np.ndarray]:
    """The statistics (L, H) of maps (L, H, T, T), each written out as it is defined."""
    queries, found = range(len(ids)), {}
    found["previous"] = np.mean([maps[..., i, i - 1] for i in queries[1:]], axis=0)
    found["sink"] = np.mean([maps[..., i, 0] for i in queries], axis=0)
    copies = {i: [j for j in range(i) if ids[j] == ids[i]] for i in queries}
    found["duplicate"] = np.mean([maps[..., i, js].sum(-1) for i, js in copies.items() if js], axis=0)
    after = {i: [j + 1 for j in js if j + 1 < i] for i, js in copies.items()}
    found["induction"] = np.mean([maps[..., i, js].sum(-1) for i, js in after.items() if js], axis=0)
    found["distance"] = np.mean([sum(maps[..., i, j] * (i - j) for j in range(i + 1)) for i in queries], axis=0)
    entropy = -np.where(maps > 0, maps * np.log(np.where(maps > 0, maps, 1)), 0).sum(-1)
    found["entropy"], found["effective_context"] = entropy.mean(-1), np.exp(entropy).mean(-1)
    return found


# The probabilities


def test_probabilities_equal_those_of_transformers_eager_attention(layout, tokenizer, ids):
    np.testing.assert_allclose(stacked(everything(layout, tokenizer, ids)), oracle(layout, ids), atol=1e-5)


@pytest.mark.parametrize("layout", ["7b", "40b", "180b"])
def test_the_oracle_is_what_output_attentions_gives(layout, ids):
    """ALiBi left out, which transformers adds twice there."""
    eager = StockFalcon._from_config(small_config(layout), attn_implementation="eager").eval()
    eager.load_state_dict(small_model(layout).state_dict())
    with torch.inference_mode():
        found = eager(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    np.testing.assert_allclose(torch.cat(found).numpy(), oracle(layout, ids), atol=1e-6)


def test_rows_sum_to_one_and_never_look_ahead(layout, tokenizer, ids):
    maps = stacked(everything(layout, tokenizer, ids))
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    assert np.triu(maps, 1).max() == 0


def test_transformers_own_falcon_is_read_as_well(layout, tokenizer, ids):
    ours = everything(layout, tokenizer, ids, prefill_chunk_size=7)
    theirs = everything((model(layout, StockFalcon), tokenizer), tokenizer, ids, prefill_chunk_size=7)
    np.testing.assert_allclose(stacked(theirs), stacked(ours), atol=1e-5)


def test_maps_do_not_depend_on_the_attention_implementation(tokenizer, ids):
    eager = FalconForCausalLM._from_config(small_config("40b"), attn_implementation="eager").eval()
    eager.load_state_dict(model("40b").state_dict())
    expected = everything("40b", tokenizer, ids)
    np.testing.assert_allclose(stacked(everything((eager, tokenizer), tokenizer, ids)), stacked(expected), atol=1e-5)


def test_probabilities_of_a_bfloat16_model_are_float32(tokenizer, ids):
    low = FalconForCausalLM(small_config("40b")).bfloat16().eval()
    maps = stacked(everything((low, tokenizer), tokenizer, ids))
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-6)


def test_adapters_take_part(tokenizer, ids):
    from peft import LoraConfig, get_peft_model

    base = FalconForCausalLM(small_config("40b")).eval()
    plain = everything((base, tokenizer), tokenizer, ids)
    options = LoraConfig(target_modules=["query_key_value"], init_lora_weights=False)
    adapted = everything((get_peft_model(base, options), tokenizer), tokenizer, ids)
    assert np.abs(stacked(adapted) - stacked(plain)).max() > 1e-4


def own_probabilities(falcon, ids) -> np.ndarray:
    """What a model of the kit writes out itself, (L, H, T, T)."""
    with torch.inference_mode():
        found = falcon(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    return torch.cat(found).float().numpy()


def test_a_model_in_4_bits_is_inspected_as_it_is(tokenizer, ids, tmp_path):
    model("40b").save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    small = FalconForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    assert small.transformer.h[0].self_attention.query_key_value.weight.dtype == torch.uint8
    found = stacked(everything((small, tokenizer), tokenizer, ids))
    np.testing.assert_allclose(found, own_probabilities(small, ids), atol=1e-5)
    assert np.abs(found - oracle("40b", ids)).max() > 1e-3


def with_a_layer_on_disk(falcon, folder):
    places = {"transformer.word_embeddings": "cpu", "transformer.h.0": "cpu", "transformer.h.1": "disk"}
    places |= {"transformer.ln_f": "cpu", "transformer.rotary_emb": "cpu", "lm_head": "cpu"}
    return dispatch_model(falcon, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def test_layers_on_disk_are_inspected_too(tokenizer, ids, tmp_path):
    split = FalconForCausalLM(small_config("40b")).eval()
    split.load_state_dict(model("40b").state_dict())
    split = with_a_layer_on_disk(split, tmp_path)
    assert split.transformer.h[1].self_attention.query_key_value.weight.device.type == "meta"
    found = stacked(everything((split, tokenizer), tokenizer, ids))
    np.testing.assert_allclose(found, oracle("40b", ids), atol=1e-5)


@pytest.mark.parametrize(("offloaded", "expected"), [(True, 300), (False, 256)])
def test_offloaded_weights_are_fetched_once_and_not_for_every_block(tokenizer, tmp_path, offloaded, expected):
    falcon = FalconForCausalLM(small_config("40b")).eval()
    if offloaded:
        with_a_layer_on_disk(falcon, tmp_path)
    sizes = []
    falcon.transformer.word_embeddings.register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    fk.attention((falcon, tokenizer), [20 + at % 40 for at in range(300)])
    assert sizes[0] == expected


# The statistics


def test_statistics_are_what_their_definitions_say(layout, tokenizer, ids):
    view = everything(layout, tokenizer, ids)
    expected = by_definition(oracle(layout, ids), ids)
    assert list(view.statistics) == list(STATISTICS)
    for name, values in expected.items():
        np.testing.assert_allclose(view.statistics[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


@given(st.lists(st.integers(20, 25), min_size=2, max_size=40), st.integers(1, 50), st.integers(1, 400))
def test_blocks_of_any_size_give_the_same(tokenizer_free, tokens, chunk, values):
    whole = fk.attention(tokenizer_free, tokens, layers=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_SIZE", values)
        parts = fk.attention(tokenizer_free, tokens, layers=0, prefill_chunk_size=chunk)
    for name in STATISTICS:
        np.testing.assert_allclose(parts.statistics[name], whole.statistics[name], rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(parts.head_similarity, whole.head_similarity, atol=1e-5)
    np.testing.assert_allclose(parts.map(0, 1), whole.map(0, 1), atol=1e-5)


@pytest.fixture(scope="module")
def tokenizer_free(tokenizer):
    return model("40b"), tokenizer


def test_chance_is_what_even_attention_scores(tokenizer, ids):
    view = everything("40b", tokenizer, ids)
    even = np.tril(np.ones((len(ids), len(ids)))) / np.arange(1, len(ids) + 1)[:, None]
    for name, value in by_definition(even[None, None], ids).items():
        assert view.chance[name] == pytest.approx(value.item(), rel=1e-5), name


def test_on_repeated_tokens_the_induction_score_is_olssons(instruct):
    view = fk.induction(instruct, period=20, layers=1)
    second_copy = range(20, 40)
    for head in range(4):
        expected = np.mean([view.map(1, head)[i, i - 20 + 1] for i in second_copy])
        assert view.statistics["induction"][1, head] == pytest.approx(expected, abs=1e-5)


def test_falconet_has_induction_heads(instruct):
    view = fk.induction(instruct)
    (layer, head, best), *_ = view.top("induction")
    assert best == view.statistics["induction"][layer, head] > 0.5 > 10 * view.chance["induction"]


def test_the_repeated_tokens_are_those_that_were_asked_for(instruct):
    view = fk.induction(instruct, period=10, copies=3, seed=5)
    assert view.ids == tuple(fk.repeated_tokens(instruct, period=10, copies=3, seed=5))


def test_repeated_tokens_are_plain_and_all_different(instruct):
    tokens = fk.repeated_tokens(instruct, period=30, copies=3, seed=5)
    assert tokens[:30] == tokens[30:60] == tokens[60:]
    assert len(set(tokens)) == 30
    assert not set(tokens) & {*instruct.tokenizer.all_special_ids, *instruct.tokenizer.added_tokens_decoder}


def test_a_statistic_that_nothing_counts_for_is_not_a_number(tokenizer):
    view = fk.attention((model("40b"), tokenizer), [20, 21, 22])
    assert np.isnan(view.statistics["duplicate"]).all()
    assert np.isnan(view.chance["induction"])
    assert np.isfinite(view.statistics["previous"]).all()


def test_one_token_attends_to_itself(tokenizer):
    view = fk.attention((model("40b"), tokenizer), [20], layers=0, heads=0)
    assert view.map(0, 0).tolist() == [[1.0]]
    assert view.statistics["sink"].min() == view.statistics["effective_context"].max() == pytest.approx(1)


# Head similarity


def test_similarity_is_the_bhattacharyya_coefficient_of_rows(layout, tokenizer, ids):
    view, maps = everything(layout, tokenizer, ids), oracle(layout, ids)
    expected = np.einsum("lhij,lgij->lhg", np.sqrt(maps), np.sqrt(maps)) / len(ids)
    np.testing.assert_allclose(view.head_similarity, expected, atol=1e-4)


def test_the_similarity_of_a_head_with_itself_is_one(layout, tokenizer, ids):
    similarity = everything(layout, tokenizer, ids).head_similarity
    np.testing.assert_allclose(np.einsum("lhh->lh", similarity), 1, atol=1e-5)


def test_similarity_within_a_group_is_the_mean_over_its_pairs(tokenizer, ids):
    view = everything("180b", tokenizer, ids)  # two groups of three
    first = [view.head_similarity[:, a, b] for a, b in ((0, 1), (0, 2), (1, 2))]
    second = [view.head_similarity[:, a, b] for a, b in ((3, 4), (3, 5), (4, 5))]
    expected = np.stack([np.mean(first, axis=0), np.mean(second, axis=0)], axis=-1)
    np.testing.assert_allclose(view.similarity_within_groups, expected, rtol=1e-5)
    across = np.mean([view.head_similarity[:, a, b] for a in range(3) for b in range(3, 6)], axis=0)
    np.testing.assert_allclose(view.similarity_across_groups, across, rtol=1e-5)


def test_heads_that_share_nothing_and_heads_that_share_everything_have_nothing_to_compare(tokenizer, ids):
    assert np.isnan(everything("rw", tokenizer, ids).similarity_within_groups).all()
    assert np.isnan(everything("7b", tokenizer, ids).similarity_across_groups).all()


def test_the_map_of_a_group_is_the_mean_of_its_heads(tokenizer, ids):
    view = everything("180b", tokenizer, ids)
    expected = np.mean([view.map(1, head) for head in (3, 4, 5)], axis=0)
    np.testing.assert_allclose(view.group_map(1, 1), expected, atol=1e-6)


# What is kept


def test_without_names_no_maps_are_kept(instruct):
    assert fk.attention(instruct, TEXT).maps == {}


@pytest.mark.parametrize(
    ("layers", "heads", "expected"),
    [
        (1, None, [(1, 0), (1, 1), (1, 2), (1, 3)]),
        (None, 2, [(layer, 2) for layer in range(6)]),
        ([0, 5], [3, 3], [(0, 3), (5, 3)]),
    ],
)
def test_maps_of_the_named_heads_are_kept(instruct, layers, heads, expected):
    assert list(fk.attention(instruct, "Hello", layers=layers, heads=heads).maps) == expected


def test_a_map_that_was_not_kept_is_refused(instruct):
    view = fk.attention(instruct, "Hello", layers=1, heads=[0, 1])
    with pytest.raises(KeyError, match=re.escape("layer 2, head 0 was not kept (kept: 1.0, 1.1): request it")):
        view.map(2, 0)


def test_maps_over_the_budget_are_refused_with_the_bytes_and_a_cheaper_plan(instruct):
    ids = list(range(20, 120))
    message = (
        "maps of 24 heads over 100 tokens are 938 KiB (960,000 bytes), max_bytes is 97.7 KiB: request at most 2 heads "
        "with layers and heads, give a text of at most 32 tokens, or raise max_bytes; the statistics of all heads need "
        "no maps"
    )
    with pytest.raises(MemoryError, match=re.escape(message)):
        fk.attention(instruct, ids, layers=range(6), max_bytes=100_000)


def test_a_budget_that_is_just_enough_is_enough(instruct):
    ids = list(range(20, 120))
    assert len(fk.attention(instruct, ids, layers=0, heads=[0, 1], max_bytes=2 * 4 * 100**2).maps) == 2


def test_the_memory_at_work_grows_with_the_text_and_not_with_its_square(tokenizer, monkeypatch):
    """The largest block of probabilities stays what it is; only its shape changes."""
    sizes = []
    accumulate = module._AttentionReader._accumulate
    monkeypatch.setattr(
        module._AttentionReader,
        "_accumulate",
        lambda self, layer, scores, *rest: (sizes.append(scores.numel()), accumulate(self, layer, scores, *rest)),
    )
    monkeypatch.setattr(module, "BLOCK_SIZE", 2**14)
    for time in (256, 1024):
        fk.attention((model("40b"), tokenizer), [20 + at % 40 for at in range(time)])
    assert max(sizes) <= 2**14


# What is left behind


def hooks_on(falcon) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in falcon.model.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_come_off_when_something_goes_wrong(instruct, monkeypatch, error):
    def fail(*args):
        raise error

    before = hooks_on(instruct)
    monkeypatch.setattr(module._AttentionReader, "_accumulate", fail)
    with pytest.raises(error):
        fk.attention(instruct, TEXT)
    assert hooks_on(instruct) == before


def test_the_model_is_left_as_it_was(instruct):
    before, training = hooks_on(instruct), instruct.model.transformer.h[1].mlp
    training.train()
    try:
        fk.attention(instruct, TEXT)
        modes = [name for name, each in instruct.model.named_modules() if each.training]
    finally:
        training.eval()
    assert hooks_on(instruct) == before
    parts = ("", ".dense_h_to_4h", ".act", ".dense_4h_to_h")
    assert modes == [f"transformer.h.1.mlp{part}" for part in parts]


def test_dropout_is_off_during_an_inspection(tokenizer, ids):
    training = FalconForCausalLM(small_config("40b", attention_dropout=0.5, hidden_dropout=0.5)).train()
    first, second = (everything((training, tokenizer), tokenizer, ids) for _ in range(2))
    np.testing.assert_array_equal(stacked(first), stacked(second))


# How it shows itself


def test_the_repr_is_short(instruct):
    view = fk.attention(instruct, list(range(20, 120)), layers=1)
    assert repr(view) == "AttentionView(falconet-instruct, 100 tokens, 6 x 4 heads, 4 maps of 156 KiB)"


def test_the_table_has_a_row_for_every_head(instruct):
    view = fk.attention(instruct, TEXT)
    table = view.to_dataframe()
    assert list(table.columns) == ["layer", "head", "group", *STATISTICS]
    assert len(table) == 24
    for row in table.to_dict("records"):
        layer, head = row["layer"], row["head"]
        assert row["group"] == head // 2
        assert [row[name] for name in STATISTICS] == [view.statistics[name][layer, head] for name in STATISTICS]


def test_the_overview_shows_the_statistic_of_every_head(instruct):
    view = fk.attention(instruct, TEXT)
    shown = [axes.images[0].get_array() for axes in view.figure("previous").axes if axes.get_title()]
    np.testing.assert_array_equal(np.reshape(shown, (6, 4)), view.statistics["previous"])
    assert f"uniform attention: {view.chance['previous']:.3g}" in view.figure("previous").get_suptitle()


def test_the_figure_of_similarity_shows_it_within_groups_and_across_them(instruct):
    view = fk.attention(instruct, TEXT)
    groups, _, across = view.similarity_figure().axes[0].lines
    np.testing.assert_array_equal(groups.get_ydata(), view.similarity_within_groups.ravel())
    np.testing.assert_array_equal(across.get_ydata(), view.similarity_across_groups)


def test_a_map_is_drawn_for_a_head_or_for_a_group(instruct):
    view = fk.attention(instruct, TEXT, layers=1)
    for figure, expected in (
        (view.map_figure(1, 3), view.map(1, 3)),
        (view.map_figure(1, group=1), view.group_map(1, 1)),
    ):
        np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), expected)
    with pytest.raises(ValueError, match="give either a head or a group"):
        view.map_figure(1)


def test_the_page_has_a_row_for_each_kv_group_with_its_mean(instruct, tmp_path):
    path = fk.attention(instruct, TEXT, layers=1).to_html(tmp_path / "attention.html")
    names = re.findall(r'title="(layer [^"]*)"', path.read_text())
    groups = [
        [
            f"layer 1, head {2 * group}",
            f"layer 1, head {2 * group + 1}",
            f"layer 1, KV group {group}, mean of its heads",
        ]
        for group in range(2)
    ]
    assert names == [name for group in groups for name in group]


def test_each_map_of_the_page_is_that_of_its_name(instruct):
    view = fk.attention(instruct, TEXT, layers=1)
    data, time = view.page().data, len(view.ids)
    expected = {f"layer 1, head {head}": view.map(1, head) for head in range(4)}
    expected |= {f"layer 1, KV group {group}, mean of its heads": view.group_map(1, group) for group in range(2)}
    assert {each["name"] for each in data["maps"]} == {*expected}
    for each in data["maps"]:
        found = np.zeros((time, time))
        keys, shares = weights(each, time)  # of a short text all probabilities are kept
        np.put_along_axis(found, keys.astype(int), shares / 255, axis=1)
        np.testing.assert_allclose(found, expected[each["name"]], atol=1 / 255)


def test_a_group_of_which_a_head_is_missing_has_no_mean(instruct):
    assert "mean of its heads" not in fk.attention(instruct, TEXT, layers=1, heads=[0, 2]).page().body


def test_a_page_without_maps_is_refused(instruct, tmp_path):
    with pytest.raises(ValueError, match=re.escape("as in fk.attention(falcon, text, layers=0), which")):
        fk.attention(instruct, TEXT).to_html(tmp_path / "attention.html")


def test_the_table_in_jupyter_names_the_highest_head_of_each_statistic(instruct):
    view = fk.induction(instruct)
    (layer, head, best), *_ = view.top("induction")
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", view._repr_html_().split("induction</th>")[1])
    assert cells[:3] == [f"{layer}.{head}", f"{best:.3g}", f"{view.chance['induction']:.3g}"]


def test_an_unknown_statistic_is_refused_with_the_nearest(instruct):
    with pytest.raises(ValueError, match=r"Unknown statistic 'inductive'\. Nearest: induction"):
        fk.attention(instruct, TEXT).figure("inductive")


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text": ""}, ValueError, "the prompt is empty"),
        ({"text": []}, ValueError, "the prompt is empty"),
        ({"text": [20, 2048]}, ValueError, "2048 is no token id of this model, whose ids are 0 to 2047"),
        ({"text": ["a"]}, ValueError, "an inspection is of one text, got a list of 1: call it for each"),
        ({"text": b"Hello"}, ValueError, "a prompt is a text, a list of texts, or one list of token ids; got bytes"),
        ({"text": {20: 21}}, ValueError, "a prompt is a text, a list of texts, or one list of token ids; got dict"),
        ({"text": [20] * 2049}, ValueError, "the text has 2049 tokens, the model's context is 2048: shorten it"),
        ({"layers": "all"}, IndexError, "layer 'all' does not exist: layers are numbered 0 to 5"),
        ({"layers": 6}, IndexError, "layer 6 does not exist: layers are numbered 0 to 5"),
        ({"heads": [0, -1]}, IndexError, "head -1 does not exist: heads are numbered 0 to 3"),
        ({"prefill_chunk_size": 0}, ValueError, "prefill_chunk_size=0: must be at least 1"),
    ],
)
def test_attention_with_invalid_arguments_is_refused(instruct, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fk.attention(instruct, **{"text": "Hello", **arguments})


def test_a_model_that_is_no_falcon_is_refused(tokenizer):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    with pytest.raises(TypeError, match="LlamaForCausalLM is not a Falcon"):
        fk.attention((llama, tokenizer), "Hello")
    with pytest.raises(TypeError, match=re.escape("give what fk.load returns, or (model, tokenizer); got int")):
        fk.attention(7, "Hello")


def test_a_model_in_other_processes_is_refused(instruct):
    parallel = ParallelFalcon(
        None, "falconet", instruct.tokenizer, instruct.spec, instruct.plan, instruct.chat_format, "as asked"
    )
    with pytest.raises(
        TypeError, match="in other processes, where forward hooks cannot be registered: load the model without"
    ):
        fk.attention(parallel, "Hello")


def test_a_model_that_adds_alibi_twice_is_refused(tokenizer):
    twice = StockFalcon._from_config(small_config("rw"), attn_implementation="eager").eval()
    for inspect in (fk.attention, fk.explain):
        with pytest.raises(ValueError, match="adds ALiBi twice in eager attention"):
            inspect((twice, tokenizer), "Hello")


def test_a_share_of_the_heads_is_refused(instruct):
    spec = FalconSpec(**{**vars(instruct.spec), "query_heads": 8})
    with pytest.raises(ValueError, match="the model in this process has only some of the heads"):
        fk.attention(type("Sharded", (), {"spec": spec, "__iter__": lambda self: iter(instruct)})(), "Hello")


@pytest.mark.parametrize("arguments", [{"period": 1}, {"copies": 1}, {"period": 2048}, {"period": 1000, "copies": 3}])
def test_repetitions_that_cannot_be_are_refused(instruct, arguments):
    with pytest.raises(ValueError, match=r"within the 20.. plain tokens of the vocabulary and the context of 2048"):
        fk.repeated_tokens(instruct, **arguments)


def test_as_many_heads_as_the_error_of_the_page_names_fit_into_a_page(instruct, monkeypatch):
    monkeypatch.setattr("falcon_kit.inspection.views.attention._WEIGHT_BYTES", 4 * 3 * len("abc"))
    with pytest.raises(
        ValueError, match="a page of 4 maps over 3 tokens is not possible: give at least one, at most 3"
    ):
        fk.attention(instruct, [20, 21, 22], layers=0).page()
    view = fk.attention(instruct, [20, 21, 22], layers=0, heads=range(3))  # the first two are a KV group
    assert view.page().body.count("<button") == 3
