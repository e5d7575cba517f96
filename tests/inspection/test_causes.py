"""Heads switched off, held against weights set to zero; attributions, held against what they must add up to."""

import copy
import math
import re
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from transformers import FalconForCausalLM as StockFalcon

import falcon_kit as fk
from falcon_kit.model.modeling import FalconForCausalLM
from tests.conftest import small_config, small_model

TEXT = "The giraffe is the tallest animal. The giraffe"


@cache
def model(layout: str, kind: type = FalconForCausalLM) -> StockFalcon:
    found = kind(small_config(layout)).eval()
    found.load_state_dict(small_model(layout).state_dict())
    return found


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer(TEXT)["input_ids"]


def logits(model, ids) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def without_columns(layout, heads) -> StockFalcon:
    """transformers' model that was never taught what to do with the output of some heads: (layer, head) pairs."""
    changed = copy.deepcopy(model(layout, StockFalcon))
    for layer, head in heads:
        with torch.no_grad():
            changed.transformer.h[layer].self_attention.dense.weight[:, 64 * head : 64 * (head + 1)] = 0
    return changed


# Heads


@pytest.mark.parametrize("kind", [FalconForCausalLM, StockFalcon], ids=["kit", "transformers"])
def test_a_head_is_off_as_if_nobody_listened_to_it(layout, kind, tokenizer, ids):
    heads = [(0, 1), (1, 3), (1, 0)]
    with fk.ablated((model(layout, kind), tokenizer), heads=heads):
        found = logits(model(layout, kind), ids)
    np.testing.assert_allclose(found, logits(without_columns(layout, heads), ids), atol=1e-4)


def test_a_kv_head_is_off_with_all_its_query_heads(tokenizer, ids):
    falcon = (model("180b"), tokenizer)  # two groups of three
    found = fk.ablate(falcon, ids, groups=[(1, 1)])
    assert found.heads == ((1, 3), (1, 4), (1, 5))
    with fk.ablated(falcon, groups=[(1, 1)]):
        grouped = logits(falcon[0], ids)
    np.testing.assert_allclose(grouped, logits(without_columns("180b", found.heads), ids), atol=1e-4)


def test_the_mean_stands_in_for_a_head(tokenizer, ids):
    """What reaches `dense`: the mean over the tokens in that head's place, the rest as ever."""
    falcon, seen = model("40b"), []
    hook = falcon.transformer.h[0].self_attention.dense.register_forward_hook(
        lambda module, args, output: seen.append(args[0][0].unflatten(-1, (-1, 64)).clone())
    )
    logits(falcon, ids)
    with fk.ablated((falcon, tokenizer), heads=[(0, 2)], replace="mean"):
        logits(falcon, ids)
    hook.remove()
    plain, changed = seen
    np.testing.assert_allclose(changed[:, 2], plain[:, 2].mean(0).expand(len(ids), 64), atol=1e-6)
    np.testing.assert_array_equal(changed[:, [0, 1, 3]], plain[:, [0, 1, 3]])


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


def test_repetition_hangs_on_the_induction_heads(instruct):
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


def test_writing_happens_without_the_heads_too(instruct):
    with fk.ablated(instruct, groups=[(layer, 0) for layer in range(6)]):
        off = instruct.generate(TEXT, max_new_tokens=8, do_sample=False)
    assert off.tokens != instruct.generate(TEXT, max_new_tokens=8, do_sample=False).tokens


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_heads_are_on_again_whatever_happens(instruct, error):
    with pytest.raises(error), fk.ablated(instruct, heads=[(0, 0), (5, 3)]):
        raise error
    assert [name for name, each in instruct.model.named_modules() if each._forward_pre_hooks] == []


# Tokens


def test_integrated_gradients_add_up_to_the_change(layout, tokenizer, ids):
    """The axiom of completeness; the change itself is transformers' own."""
    found = fk.attribute((model(layout), tokenizer), ids, target=77)
    after = [logits(model(layout, StockFalcon), each) for each in (ids, [11] * len(ids))]
    likely, blank = (torch.tensor(each[-1]).log_softmax(-1)[77].item() for each in after)
    assert found.change == pytest.approx(likely - blank, abs=1e-3)
    assert found.scores.sum() == pytest.approx(likely - blank, rel=0.025)
    assert found.gap < 0.02


def test_more_steps_come_nearer(tokenizer, ids):
    few, many = (fk.attribute((model("40b"), tokenizer), ids, target=77, steps=steps) for steps in (2, 64))
    assert (few.steps, many.steps) == (2, 64)
    assert many.gap < few.gap


def test_one_step_is_gradient_times_input(tokenizer, ids):
    """Half way, where the only point of the path lies."""
    falcon = model("40b")
    found = fk.attribute((falcon, tokenizer), ids, target=77, steps=1)
    blank, full = (falcon.get_input_embeddings()(torch.tensor([each])).detach() for each in ([11] * len(ids), ids))
    middle = ((blank + full) / 2).requires_grad_()
    falcon(inputs_embeds=middle).logits[0, -1].log_softmax(-1)[77].backward()
    np.testing.assert_allclose(found.scores, ((full - blank) * middle.grad).sum(-1)[0], rtol=1e-3, atol=1e-4)


def test_a_token_that_says_nothing_gets_no_credit(tokenizer):
    found = fk.attribute((model("40b"), tokenizer), [30, 11, 40], target=77, steps=4)
    assert found.scores[1] == 0
    assert abs(found.scores[[0, 2]]).min() > 0


def test_leave_one_out_blanks_each_token_in_turn(layout, tokenizer, ids):
    found = fk.attribute((model(layout), tokenizer), ids, target=77, method="leave-one-out")
    stock = model(layout, StockFalcon)

    def likelihood(tokens):
        return torch.tensor(logits(stock, tokens)[-1]).log_softmax(-1)[77].item()

    expected = [likelihood(ids) - likelihood([*ids[:at], 11, *ids[at + 1 :]]) for at in range(len(ids))]
    np.testing.assert_allclose(found.scores, expected, atol=2e-3)


def test_the_likeliest_token_is_explained_unless_told(instruct):
    found = fk.attribute(instruct, TEXT, method="leave-one-out")
    first = fk.lens(instruct, TEXT).next_tokens()[0]
    assert (found.target.id, found.target.rank) == (first.id, 0)
    assert found.target.probability == pytest.approx(first.probability, rel=1e-3)


def test_the_animal_in_the_question_decides_the_answer(instruct):
    question = "User: Where does the giraffe live?\nFalcon:"
    found = fk.attribute(instruct, question, method="leave-one-out")
    table = found.to_dataframe().set_index("token")["score"]
    assert table[" giraffe"] > 10 * abs(table[" the"])


def test_no_gradient_stays_behind(instruct):
    fk.attribute(instruct, TEXT, steps=2)
    assert [name for name, each in instruct.model.named_parameters() if each.grad is not None] == []


def test_four_bit_weights_are_explained_as_well_as_others():
    """bitsandbytes packs them for some CPUs (AVX-512 with bfloat16), and packed they hand no gradient back."""
    falcon = fk.load("falconet", dtype="nf4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fk.attribute(falcon, "The giraffe is").gap < 0.1


def test_scores_that_do_not_add_up_are_said_to(tokenizer, ids):
    with pytest.warns(UserWarning, match=r"with steps=1 the scores add up to .* take method='leave-one-out'"):
        assert fk.attribute((model("40b"), tokenizer), ids, target=77, steps=1).gap > 0.1


def test_weights_are_frozen_while_a_prediction_is_explained_and_only_then(tokenizer):
    falcon, seen = model("40b"), []
    falcon.lm_head.weight.requires_grad_(False)
    before = [each.requires_grad for each in falcon.parameters()]
    hook = falcon.register_forward_hook(lambda *args: seen.append(any(p.requires_grad for p in falcon.parameters())))
    fk.attribute((falcon, tokenizer), [30, 11, 40], target=77, steps=4)
    hook.remove()
    assert seen[-1] is False
    assert [each.requires_grad for each in falcon.parameters()] == before


def test_the_memory_for_gradients_has_a_limit(tokenizer, ids, monkeypatch):
    falcon, rows = (model("40b"), tokenizer), []
    whole = fk.attribute(falcon, ids, target=77, steps=4)
    monkeypatch.setattr("falcon_kit.inspection.causes._KEPT", 1)
    hook = falcon[0].transformer.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    found = fk.attribute(falcon, ids, target=77, steps=4)
    hook.remove()
    assert set(rows) == {1}
    np.testing.assert_allclose(found.scores, whole.scores, rtol=1e-3, atol=1e-4)


# How they show themselves


def test_the_repr_of_an_ablation_says_what_changed(instruct):
    found = fk.ablate(instruct, TEXT, groups=[(1, 0), (1, 1)])
    assert re.fullmatch(
        r"Ablation\(4 heads off: [\d.]+ to [\d.]+ bits per token, next '.*' [\d.]+% to '.*' [\d.]+%\)", repr(found)
    )


def test_an_ablation_of_one_token_has_no_loss(instruct):
    found = fk.ablate(instruct, [20], heads=[(1, 0)])
    assert math.isnan(found.loss_before)
    assert repr(found).startswith("Ablation(1 heads off: next ")


def test_the_table_of_an_ablation_has_a_row_for_every_token(instruct, ids):
    found = fk.ablate(instruct, ids, heads=[(1, 0)])
    assert list(found.to_dataframe().columns) == ["token", "id", "before", "after"]
    assert len(found.to_dataframe()) == len(ids)


def test_an_ablation_in_html_is_escaped(instruct):
    found = fk.ablate(instruct, TEXT, heads=[(1, 0)])
    candidate = type(found.next_before[0])(1, "<img src=x>", 0.5, 0)
    changed = type(found)(**{**vars(found), "next_before": (candidate,), "next_after": (candidate,)})
    assert "<img" not in changed._repr_html_()
    assert "&lt;img src=x&gt;" in changed._repr_html_()


def test_the_repr_of_an_attribution_names_the_token_that_counts_most(instruct):
    found = fk.attribute(instruct, TEXT, steps=4)
    best = int(found.scores.argmax())
    assert f"most from {found.words[best]!r} at {best}" in repr(found)


def test_the_figure_of_an_ablation_shows_both_lines(instruct):
    found = fk.ablate(instruct, TEXT, heads=[(1, 0)])
    for line, expected in zip(found.figure().axes[0].lines, (found.before, found.after), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), expected)


def test_the_figure_of_an_attribution_has_a_bar_for_every_token(instruct):
    found = fk.attribute(instruct, TEXT, method="leave-one-out")
    np.testing.assert_allclose([bar.get_height() for bar in found.figure().axes[0].patches], found.scores)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "no head is named: give heads=[(layer, head), ...] or groups="),
        ({"heads": (1, 0)}, TypeError, "1 is no pair of a layer and a head: give a list of pairs, such as [(0, 1)]"),
        ({"heads": [(6, 0)]}, IndexError, "layer 6 is not there: the model has 6, from 0 to 5"),
        ({"heads": [(0, 4)]}, IndexError, "head 4 is not there: the model has 4, from 0 to 3"),
        ({"groups": [(0, 2)]}, IndexError, "KV head 2 is not there: the model has 2, from 0 to 1"),
        ({"heads": [(0, 0)], "replace": "noise"}, ValueError, "Unknown replacement 'noise'. Known: zero, mean."),
        ({"heads": [(0, 0)], "text": ""}, ValueError, "the text is empty"),
    ],
)
def test_an_ablation_that_cannot_be_is_refused(instruct, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fk.ablate(instruct, **{"text": TEXT, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ""}, "the text is empty"),
        ({"method": "guess"}, "Unknown method 'guess'. Known: integrated-gradients, leave-one-out."),
        ({"steps": 0}, "steps=0: take at least one"),
        ({"target": ""}, "the text is empty"),
        ({"target": "a giraffe"}, "name one, mind the space before a word"),
    ],
)
def test_an_attribution_that_cannot_be_is_refused(instruct, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fk.attribute(instruct, **{"text": TEXT, **arguments})


def test_a_probability_is_that_of_the_target(instruct):
    found = fk.attribute(instruct, TEXT, target=" giraffe", method="leave-one-out")
    expected = logits(instruct.model, instruct.tokenizer(TEXT)["input_ids"])[-1]
    likely = torch.tensor(expected).log_softmax(-1)[found.target.id].item()
    assert found.target.probability == pytest.approx(math.exp(likely), rel=1e-3)
