"""Ablated heads, compared with zero columns in the weights of transformers' own model."""

import copy
import math
import re
from html import unescape

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from transformers import FalconForCausalLM as StockFalcon

import falcon_kit as fk
from falcon_kit.display.page import percent
from falcon_kit.inspection.ablation import head_means
from falcon_kit.model.modeling import FalconForCausalLM
from tests.inspection.models import logits, model

TEXT = "The giraffe is the tallest animal. The giraffe"


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer(TEXT)["input_ids"]


def without_columns(layout, heads) -> StockFalcon:
    """transformers' own model without the output of some heads: (layer, head) pairs."""
    changed = copy.deepcopy(model(layout, StockFalcon))
    for layer, head in heads:
        with torch.no_grad():
            changed.transformer.h[layer].self_attention.dense.weight[:, 64 * head : 64 * (head + 1)] = 0
    return changed


# Heads


@pytest.mark.parametrize("kind", [FalconForCausalLM, StockFalcon], ids=["kit", "transformers"])
def test_an_ablated_head_equals_zero_columns_of_the_output_projection(layout, kind, tokenizer, ids):
    heads = [(0, 1), (1, 3), (1, 0)]
    with fk.ablated((model(layout, kind), tokenizer), heads=heads):
        found = logits(model(layout, kind), ids)
    np.testing.assert_allclose(found, logits(without_columns(layout, heads), ids), atol=1e-4)


def test_an_ablated_kv_head_ablates_all_its_query_heads(tokenizer, ids):
    falcon = (model("180b"), tokenizer)  # two groups of three
    found = fk.ablate(falcon, ids, kv_heads=[(1, 1)])
    assert found.heads == ((1, 3), (1, 4), (1, 5))
    with fk.ablated(falcon, kv_heads=[(1, 1)]):
        grouped = logits(falcon[0], ids)
    np.testing.assert_allclose(grouped, logits(without_columns("180b", found.heads), ids), atol=1e-4)


def test_the_mean_replaces_the_output_of_an_ablated_head(tokenizer, ids):
    """What reaches `dense`: the mean over the tokens in that head's place, the rest as ever."""
    falcon, seen = model("40b"), []
    hook = falcon.transformer.h[0].self_attention.dense.register_forward_hook(
        lambda module, args, output: seen.append(args[0][0].unflatten(-1, (-1, 64)).clone())
    )
    logits(falcon, ids)
    with fk.ablated((falcon, tokenizer), heads=[(0, 2)], replace=head_means((falcon, tokenizer), ids)):
        logits(falcon, ids)
    hook.remove()
    plain, _, changed = seen
    np.testing.assert_allclose(changed[:, 2], plain[:, 2].mean(0).expand(len(ids), 64), atol=1e-6)
    np.testing.assert_array_equal(changed[:, [0, 1, 3]], plain[:, [0, 1, 3]])


ALL_HEADS = [(layer, head) for layer in range(6) for head in range(4)]


def test_the_mean_is_the_same_in_a_step_of_generation_as_in_a_whole_text(instruct, ids):
    model, rows = instruct.model, torch.tensor([ids])
    with fk.ablated(instruct, heads=ALL_HEADS, replace=head_means(instruct, ids)), torch.inference_mode():
        cache = DynamicCache(config=model.config)
        model(rows[:, :-1], past_key_values=cache)
        step = model(rows[:, -1:], past_key_values=cache).logits[0, -1]
        torch.testing.assert_close(step, model(rows).logits[0, -1], rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        assert not torch.allclose(step, model(rows).logits[0, -1], atol=1)


def test_the_mean_does_not_depend_on_the_blocks_in_which_attention_reads(instruct, ids):
    means = head_means(instruct, ids)
    with fk.ablated(instruct, heads=ALL_HEADS[:4], replace=means):
        whole, parts = (fk.attention(instruct, ids, prefill_chunk_size=size) for size in (None, 3))
    np.testing.assert_allclose(parts.statistics["entropy"], whole.statistics["entropy"], rtol=1e-4, atol=1e-4)


def test_a_mean_over_another_text_contains_nothing_of_later_tokens(instruct, ids):
    means = head_means(instruct, "Owls hunt at night.")
    short, long = (fk.ablate(instruct, each, heads=ALL_HEADS[:4], replace=means) for each in (ids, [*ids, 900, 77, 5]))
    np.testing.assert_allclose(short.after[1:], long.after[1 : len(ids)], rtol=1e-3, atol=1e-4)
    assert short.replace == "mean"


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ("mean", 'replace="mean" needs a text to take the mean over: give replace=head_means(falcon, text)'),
        (
            torch.zeros(6, 64),
            "a replacement of the shape (6, 64) does not fit: (layers, heads, head_dim) is (6, 4, 64)",
        ),
        ("noise", "Unknown replacement 'noise'. Known: zero, mean."),
    ],
)
def test_a_replacement_that_does_not_fit_is_refused(instruct, replace, message):
    with pytest.raises(ValueError, match=re.escape(message)), fk.ablated(instruct, [(0, 0)], replace=replace):
        pass


def test_an_ablation_holds_both_losses_and_predictions(layout, tokenizer, ids):
    found = fk.ablate((model(layout), tokenizer), ids, heads=[(0, 0)])
    rows = torch.tensor([ids])
    for changed, loss, following in (
        ([], found.loss_before, found.next_before),
        ([(0, 0)], found.loss_after, found.next_after),
    ):
        with torch.inference_mode():
            expected = without_columns(layout, changed)(rows, labels=rows)
        assert loss == pytest.approx(expected.loss.item(), rel=1e-4)
        likeliest = expected.logits[0, -1].softmax(-1).topk(5)
        assert [each.id for each in following] == likeliest.indices.tolist()
        np.testing.assert_allclose([each.probability for each in following], likeliest.values, rtol=1e-3)


def test_repetition_depends_on_the_induction_heads(instruct):
    tokens = fk.repeated_tokens(instruct)
    view = fk.attention(instruct, tokens)
    heads = [(layer, head) for layer, head, score in view.top("induction", 4) if score > 0.5]
    idle = [(3, head) for head in range(len(heads))]
    second_copy = slice(50, None)
    cost = {
        name: fk.ablate(instruct, tokens, heads=off).after[second_copy].mean()
        for name, off in (("induction", heads), ("idle", idle))
    }
    assert cost["induction"] > cost["idle"] + 3


def test_generation_goes_without_the_ablated_heads(instruct):
    with fk.ablated(instruct, kv_heads=[(layer, 0) for layer in range(6)]):
        off = instruct.generate(TEXT, max_new_tokens=8, do_sample=False)
    assert off.tokens != instruct.generate(TEXT, max_new_tokens=8, do_sample=False).tokens


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_hook_remains_after_an_error_in_the_context(instruct, error):
    with pytest.raises(error), fk.ablated(instruct, heads=[(0, 0), (5, 3)]):
        raise error
    assert [name for name, each in instruct.model.named_modules() if each._forward_pre_hooks] == []


# How it shows itself


def test_the_repr_of_an_ablation_says_what_changed(instruct):
    found = fk.ablate(instruct, TEXT, kv_heads=[(1, 0), (1, 1)])
    assert re.fullmatch(
        r"Ablation\(4 heads: [\d.]+ to [\d.]+ bits per token, next '.*' [\d.]+% to '.*' [\d.]+%\)", repr(found)
    )


def test_an_ablation_of_one_token_has_no_loss(instruct):
    found = fk.ablate(instruct, [20], heads=[(1, 0)])
    assert math.isnan(found.loss_before)
    assert repr(found).startswith("Ablation(1 head: next ")


def test_the_table_of_an_ablation_has_a_row_for_every_token(instruct, ids):
    found = fk.ablate(instruct, ids, heads=[(1, 0)])
    table = found.to_dataframe()
    assert list(table.columns) == ["token", "id", "before", "after"]
    assert table["id"].tolist() == ids
    np.testing.assert_array_equal(table[["before", "after"]].T, [found.before, found.after])


def test_a_notebook_shows_the_surprisal_and_the_next_tokens_before_and_after(instruct):
    found = fk.ablate(instruct, TEXT, kv_heads=[(1, 0), (1, 1)])
    cells = [re.findall("<t[hd][^>]*>([^<]*)<", row) for row in found._repr_html_().split("<tr>")[2:]]
    bits = [f"{loss / math.log(2):.2f}" for loss in (found.loss_before, found.loss_after)]
    assert bits[0] != bits[1]
    pairs = [
        [f"{each.text!r} {percent(each.probability)}" for each in pair]
        for pair in zip(found.next_before, found.next_after, strict=True)
    ]
    expected = [["surprisal, bits per token", *bits], *([f"next, rank {at}", *pair] for at, pair in enumerate(pairs))]
    assert [[unescape(cell) for cell in row] for row in cells] == expected


def test_a_notebook_names_the_first_12_ablated_heads(instruct):
    html = fk.ablate(instruct, TEXT, heads=ALL_HEADS)._repr_html_()
    assert "(layer.head): 0.0, 0.1, 0.2, 0.3, 1.0, 1.1, 1.2, 1.3, 2.0, 2.1, 2.2, 2.3 and 12 more" in html


def test_an_ablation_in_html_is_escaped(instruct):
    found = fk.ablate(instruct, TEXT, heads=[(1, 0)])
    candidate = type(found.next_before[0])(1, "<img src=x>", 0.5, 0)
    changed = type(found)(**{**vars(found), "next_before": (candidate,), "next_after": (candidate,)})
    assert "<img" not in changed._repr_html_()
    assert "&lt;img src=x&gt;" in changed._repr_html_()


def test_the_figure_of_an_ablation_shows_both_lines(instruct):
    found = fk.ablate(instruct, TEXT, heads=[(1, 0)])
    for line, expected in zip(found.figure().axes[0].lines, (found.before, found.after), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), expected)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "no head is given: give heads=[(layer, head), ...] or kv_heads="),
        ({"heads": (1, 0)}, TypeError, "1 is not a pair of a layer and a head: give a list of pairs, such as [(0, 1)]"),
        ({"heads": "all"}, TypeError, "'all' is not a pair of a layer and a head: give a list of pairs"),
        ({"heads": [(6, 0)]}, IndexError, "layer 6 does not exist: layers are numbered 0 to 5"),
        ({"heads": [(0, 4)]}, IndexError, "head 4 does not exist: heads are numbered 0 to 3"),
        ({"kv_heads": [(0, 2)]}, IndexError, "KV head 2 does not exist: KV heads are numbered 0 to 1"),
        ({"heads": [(0, 0)], "replace": "noise"}, ValueError, "Unknown replacement 'noise'. Known: zero, mean."),
        ({"heads": [(0, 0)], "text": ""}, ValueError, "the prompt is empty"),
    ],
)
def test_an_ablation_that_cannot_be_is_refused(instruct, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fk.ablate(instruct, **{"text": TEXT, **arguments})
