"""Attributions, compared with their definitions and with the change that they must sum to."""

import copy
import math
import re
import warnings

import numpy as np
import pytest
import torch
from transformers import FalconForCausalLM as StockFalcon

import falcon_kit as fk
from falcon_kit.display.page import visible
from tests.inspection.models import logits, model

TEXT = "The giraffe is the tallest animal. The giraffe"


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer(TEXT)["input_ids"]


def test_integrated_gradients_add_up_to_the_change(layout, tokenizer, ids):
    """The axiom of completeness; the change itself is transformers' own."""
    found = fk.attribute((model(layout), tokenizer), ids, target=77)
    after = [logits(model(layout, StockFalcon), each) for each in (ids, [11] * len(ids))]
    likely, blank = (torch.tensor(each[-1]).log_softmax(-1)[77].item() for each in after)
    assert found.change == pytest.approx(likely - blank, abs=1e-3)
    assert found.scores.sum() == pytest.approx(likely - blank, rel=0.025)
    assert found.gap < 0.02


def test_more_steps_give_a_smaller_gap(tokenizer, ids):
    few, many = (fk.attribute((model("40b"), tokenizer), ids, target=77, steps=steps) for steps in (2, 64))
    assert (few.steps, many.steps) == (2, 64)
    assert many.gap < few.gap


@pytest.mark.filterwarnings("ignore:with steps=")
@pytest.mark.parametrize("tolerance", [0, 1e-5, 0.02, 0.9])
def test_steps_double_until_the_gap_is_within_the_tolerance(tokenizer, ids, monkeypatch, tolerance):
    falcon, most = (model("40b"), tokenizer), 64
    gaps = {steps: fk.attribute(falcon, ids, target=77, steps=steps).gap for steps in (1, 2, 4, 8, 16, 32)}
    monkeypatch.setattr("falcon_kit.inspection.attribution._FIRST_STEPS", 1)
    monkeypatch.setattr("falcon_kit.inspection.attribution._MAX_STEPS", most)
    found = fk.attribute(falcon, ids, target=77, tolerance=tolerance)
    assert found.steps == next((steps for steps, gap in gaps.items() if gap <= tolerance), most)


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


@pytest.mark.filterwarnings("error")
def test_scores_of_leaving_one_out_need_not_sum_to_the_change(tokenizer, ids):
    assert fk.attribute((model("40b"), tokenizer), ids, target=77, method="leave-one-out").gap > 0.1


def test_the_likeliest_token_is_explained_unless_told(instruct):
    found = fk.attribute(instruct, TEXT, method="leave-one-out")
    first = fk.lens(instruct, TEXT).next_tokens()[0]
    assert (found.target.id, found.target.rank) == (first.id, 0)
    assert found.target.probability == pytest.approx(first.probability, rel=1e-3)


def test_finding_the_likeliest_token_takes_no_pass_of_its_own(tokenizer, ids):
    falcon, passes = model("40b"), []
    hook = falcon.transformer.register_forward_hook(lambda *args: passes.append(1))
    counts = []
    for target in (77, None):
        fk.attribute((falcon, tokenizer), ids, target, method="leave-one-out")
        counts.append(len(passes))
        passes.clear()
    hook.remove()
    assert counts[0] == counts[1]


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


def test_scores_that_do_not_sum_to_the_change_give_a_warning(tokenizer, ids):
    with pytest.warns(UserWarning, match=r"with steps=1 the scores sum to .* use method='leave-one-out'"):
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
    monkeypatch.setattr("falcon_kit.inspection.attribution._MAX_ACTIVATION_BYTES", 1)
    hook = falcon[0].transformer.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    found = fk.attribute(falcon, ids, target=77, steps=4)
    hook.remove()
    assert set(rows) == {1}
    np.testing.assert_allclose(found.scores, whole.scores, rtol=1e-3, atol=1e-4)


# How it shows itself


def test_the_repr_of_an_attribution_names_the_token_that_counts_most(instruct):
    found = fk.attribute(instruct, TEXT, steps=4)
    best = int(found.scores.argmax())
    assert f"most from {found.token_texts[best]!r} at {best}" in repr(found)


def test_the_figure_of_an_attribution_has_a_bar_for_every_token(instruct):
    found = fk.attribute(instruct, TEXT, method="leave-one-out")
    np.testing.assert_allclose([bar.get_height() for bar in found.figure().axes[0].patches], found.scores)


def test_a_notebook_shows_the_score_of_each_token(instruct):
    found = fk.attribute(instruct, TEXT, method="leave-one-out")
    rows = [re.findall("<t[hd][^>]*>([^<]*)<", row) for row in found._repr_html_().split("<tr>")[2:]]
    texts = [visible(text, spaces=True) for text in found.token_texts]
    assert rows == [
        [str(at), text, f"{score:+.3f}"] for at, (text, score) in enumerate(zip(texts, found.scores, strict=True))
    ]


def test_a_notebook_says_of_how_many_tokens_it_shows_the_first(instruct):
    found = fk.attribute(instruct, "word " * 130, target=30, method="leave-one-out")
    assert f"; the first 120 of {len(found.ids)} tokens" in found._repr_html_()
    assert found._repr_html_().count("<tr>") == 1 + 120


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ""}, "the prompt is empty"),
        ({"method": "guess"}, "Unknown method 'guess'. Known: integrated-gradients, leave-one-out."),
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"tolerance": 1.5}, "tolerance=1.5: must be from 0 to 1"),
        ({"target": ""}, "target '' is 0 tokens ()"),
        (
            {"method": "leave-one-out", "steps": 8, "tolerance": 0.1},
            "steps and tolerance have no effect with leave-one",
        ),
        ({"steps": 8, "tolerance": 0.1}, "tolerance has no effect with steps, which fix the points of the path"),
        ({"target": "a giraffe"}, "give one token; a space before a word is part of it"),
    ],
)
def test_an_attribution_that_cannot_be_is_refused(instruct, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fk.attribute(instruct, **{"text": TEXT, **arguments})


@pytest.mark.parametrize("target", [77, None])
def test_an_attribution_without_a_head_is_refused(tokenizer, ids, target):
    with pytest.raises(ValueError, match="FalconModel has no language-modelling head: give the whole model"):
        fk.attribute((model("40b").transformer, tokenizer), ids, target)


@pytest.mark.parametrize("method", ["integrated-gradients", "leave-one-out"])
def test_an_attribution_without_an_end_token_says_what_to_set(tokenizer, ids, method):
    plain = copy.deepcopy(tokenizer)
    plain.eos_token = None
    error = "the tokenizer has no end-of-sequence token to replace tokens with: set tokenizer.eos_token"
    with pytest.raises(ValueError, match=error):
        fk.attribute((model("40b"), plain), ids, target=77, method=method)


def test_a_probability_is_that_of_the_target(instruct):
    found = fk.attribute(instruct, TEXT, target=" giraffe", method="leave-one-out")
    expected = logits(instruct.model, instruct.tokenizer(TEXT)["input_ids"])[-1]
    likely = torch.tensor(expected).log_softmax(-1)[found.target.id].item()
    assert found.target.probability == pytest.approx(math.exp(likely), rel=1e-3)
