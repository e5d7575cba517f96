"""The logit lens against transformers' own hidden states, and contributions that add up to the logit."""

import copy
import dataclasses
import math
import re
from functools import cache
from html import escape

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import FalconForCausalLM as StockFalcon

import falcon_kit as fk
from falcon_kit.display.page import percent, text_html, visible
from falcon_kit.inspection import lens as module
from falcon_kit.inspection import predictions
from falcon_kit.model.modeling import FalconForCausalLM
from tests.conftest import small_config, small_model

TEXT = "The giraffe is the tallest animal. The giraffe eats leaves."


@cache
def model(layout: str, kind: type = FalconForCausalLM) -> StockFalcon:
    """A small model whose last LayerNorm does something; tests leave it as it is."""
    found = kind(small_config(layout)).eval()
    found.load_state_dict(small_model(layout).state_dict())
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        found.transformer.ln_f.weight.uniform_(0.5, 1.5, generator=generator)
        found.transformer.ln_f.bias.uniform_(-0.5, 0.5, generator=generator)
    return found


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer(TEXT)["input_ids"]


@pytest.fixture
def view(layout, tokenizer, ids):
    return fk.lens((model(layout), tokenizer), ids)


def probabilities_by_layer(layout, ids) -> np.ndarray:
    """(L + 1, T, V), from the hidden states that transformers hands out, whose last is normalised already."""
    stock = model(layout, StockFalcon)
    with torch.inference_mode():
        *inner, last = stock(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
        normed = [*(stock.transformer.ln_f(each) for each in inner), last]
        return torch.cat([stock.lm_head(each).softmax(-1) for each in normed]).numpy()


# What comes next


def test_the_next_tokens_are_those_of_transformers(layout, view, ids):
    expected = torch.tensor(probabilities_by_layer(layout, ids)[-1, -1]).topk(10)
    found = view.next_tokens()
    assert [each.id for each in found] == expected.indices.tolist()
    np.testing.assert_allclose([each.probability for each in found], expected.values, rtol=1e-4)
    assert [each.rank for each in found] == list(range(10))


def test_the_text_of_a_next_token_is_its_own(instruct):
    found = fk.lens(instruct, TEXT).next_tokens()
    assert [each.text for each in found] == [instruct.tokenizer.decode([each.id]) for each in found]


def test_next_tokens_of_any_position_can_be_asked_for(instruct):
    view = fk.lens(instruct, TEXT)
    assert [each.id for each in view.next_tokens(2)] == view.top_ids[2].tolist()
    with pytest.raises(IndexError, match="position 99 is not in a text of"):
        view.next_tokens(99)
    with pytest.raises(IndexError, match="position 99 is not in a text of"):
        view.contributions_figure(99)


# Surprisal


def test_surprisal_is_the_information_in_each_token(layout, view, ids):
    final = probabilities_by_layer(layout, ids)[-1]
    expected = [-math.log2(final[at, token]) for at, token in enumerate(ids[1:])]
    assert np.isnan(view.surprisal[0])
    np.testing.assert_allclose(view.surprisal[1:], expected, rtol=1e-4)


def test_the_loss_is_what_transformers_computes_from_labels(layout, view, ids):
    rows = torch.tensor([ids])
    with torch.inference_mode():
        expected = model(layout, StockFalcon)(rows, labels=rows).loss.item()
    assert view.loss == pytest.approx(expected, rel=1e-5)


def test_ranks_count_the_tokens_that_were_likelier(layout, view, ids):
    final = probabilities_by_layer(layout, ids)[-1]
    expected = [int((final[at] > final[at, token]).sum()) for at, token in enumerate(ids[1:])]
    assert view.rank.tolist() == [-1, *expected]


# Layer by layer


def test_the_lens_normalises_each_layer_once(layout, view, ids):
    expected = probabilities_by_layer(layout, ids)
    np.testing.assert_array_equal(view.layer_ids, expected.argmax(-1))
    np.testing.assert_allclose(view.layer_probabilities, expected.max(-1), rtol=1e-3)


def test_the_target_is_followed_through_the_layers(layout, view, ids):
    expected = probabilities_by_layer(layout, ids)
    assert view.targets == tuple(expected[-1].argmax(-1))
    followed = np.stack([expected[:, at, target] for at, target in enumerate(view.targets)], axis=-1)
    np.testing.assert_allclose(view.target_probabilities, followed, rtol=1e-3, atol=1e-9)
    np.testing.assert_array_equal(view.target_ranks, (expected > followed[..., None]).sum(-1))


@pytest.mark.parametrize("kind", [FalconForCausalLM, StockFalcon], ids=["kit", "transformers"])
def test_contributions_add_up_to_the_models_own_logit(layout, kind, tokenizer, ids):
    view = fk.lens((model(layout, kind), tokenizer), ids, target=77)
    with torch.inference_mode():
        expected = model(layout, StockFalcon)(torch.tensor([ids])).logits[0, :, 77].numpy()
    np.testing.assert_allclose(view.target_logits, expected, atol=1e-4)
    total = view.embedding_contribution + view.attention_contribution.sum(0) + view.mlp_contribution.sum(0)
    np.testing.assert_allclose(total, expected, atol=1e-4)


def test_a_contribution_is_what_the_logit_loses_without_that_part(layout, tokenizer, ids):
    """The last hidden state less one part, read with the spread of the whole."""
    view = fk.lens((model(layout), tokenizer), ids, target=77)
    stock, parts = model(layout, StockFalcon), {}
    norm, layer = stock.transformer.ln_f, stock.transformer.h[1]
    hooks = [
        layer.self_attention.register_forward_hook(
            lambda *call: parts.update(attention_contribution=call[-1][0][0].clone())
        ),
        layer.mlp.register_forward_hook(lambda *call: parts.update(mlp_contribution=call[-1][0].clone())),
        norm.register_forward_hook(lambda module, args, output: parts.update(last=args[0][0])),
    ]
    with torch.inference_mode():
        stock(torch.tensor([ids]))
        [hook.remove() for hook in hooks]
        spread = (parts["last"].var(-1, correction=0, keepdim=True) + norm.eps).sqrt()

        def read(hidden):
            normed = (hidden - hidden.mean(-1, keepdim=True)) / spread * norm.weight + norm.bias
            return normed @ stock.lm_head.weight[77]

        for name in ("attention_contribution", "mlp_contribution"):
            lost = read(parts["last"]) - read(parts["last"] - parts[name])
            np.testing.assert_allclose(getattr(view, name)[1], lost, atol=1e-4)


def test_a_target_can_be_named_by_its_text(instruct):
    view = fk.lens(instruct, TEXT, target=" giraffe")
    assert {instruct.tokenizer.decode([each]) for each in view.targets} == {" giraffe"}


def test_a_target_may_be_the_token_with_id_0(instruct):
    assert {*fk.lens(instruct, TEXT, target=0).targets} == {0}


def test_the_lens_reads_layers_on_disk(tokenizer, ids, tmp_path):
    split = FalconForCausalLM(small_config("40b")).eval()
    split.load_state_dict(model("40b").state_dict())
    places = {"transformer.word_embeddings": "cpu", "transformer.h.0": "cpu", "transformer.h.1": "disk"}
    places |= {"transformer.ln_f": "cpu", "transformer.rotary_emb": "cpu", "lm_head": "cpu"}
    split = dispatch_model(split, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    found, expected = fk.lens((split, tokenizer), ids), fk.lens((model("40b"), tokenizer), ids)
    for name in ("surprisal", "layer_probabilities", "attention_contribution", "mlp_contribution"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4, err_msg=name)


# Memory


def test_logits_of_a_few_tokens_at_a_time_say_the_same(layout, view, tokenizer, ids, monkeypatch):
    sizes = []
    monkeypatch.setattr(predictions, "_MAX_LOGITS", 3 * 2048)
    falcon = model(layout)
    hook = falcon.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    parts = fk.lens((falcon, tokenizer), ids)
    hook.remove()
    assert max(sizes) == 3 * 2048
    for name in ("surprisal", "target_probabilities", "target_logits", "attention_contribution", "top_probabilities"):
        np.testing.assert_allclose(getattr(parts, name), getattr(view, name), rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(parts.rank, view.rank)


# What is left behind


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_come_off_when_something_goes_wrong(instruct, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(module._LayerReader, "_apply_lens", fail)
    with pytest.raises(error):
        fk.lens(instruct, TEXT)
    assert [name for name, each in instruct.model.named_modules() if each._forward_hooks] == []


# How it shows itself


def test_the_repr_says_what_comes_next(instruct):
    view = fk.lens(instruct, "The giraffe lives in")
    assert re.fullmatch(
        r"LensView\(falconet-instruct, 4 tokens, [\d.]+ bits per token, next ' the' with [\d.]+%\)", repr(view)
    )


def test_the_table_has_a_row_for_every_token(instruct, ids):
    view = fk.lens(instruct, ids)
    table, likeliest = view.to_dataframe(), [view.next_tokens(at)[0] for at in range(len(ids))]
    assert list(table.columns) == ["token", "id", "surprisal", "rank", "next", "probability"]
    assert table["id"].tolist() == ids
    for name, expected in (("surprisal", view.surprisal), ("rank", view.rank)):
        np.testing.assert_array_equal(table[name], expected)
    assert table["next"].tolist() == [each.text for each in likeliest]
    assert table["probability"].tolist() == [each.probability for each in likeliest]


def test_the_figure_shows_the_last_tokens(instruct):
    view = fk.lens(instruct, TEXT)
    axes = view.figure(last=3).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), view.layer_probabilities[:, -3:])
    assert axes.texts[-1].get_text().strip("·") == view.next_tokens()[0].text.strip()
    positions = [int(label.get_text().split("\n")[1]) for label in axes.get_xticklabels()]
    assert positions == [*range(len(view.ids))][-3:]


def test_the_figure_of_contributions_ends_at_the_logit(instruct):
    view = fk.lens(instruct, TEXT)
    assert view.contributions_figure().axes[0].lines[0].get_ydata()[-1] == pytest.approx(
        view.target_logits[-1], abs=1e-4
    )


def test_the_figure_of_contributions_shows_those_at_its_position(instruct):
    view = fk.lens(instruct, TEXT)
    axes = view.contributions_figure(2).axes[0]
    heights = [view.embedding_contribution[2], *view.attention_contribution[:, 2], *view.mlp_contribution[:, 2]]
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], heights)
    target = visible(view.next_tokens(2)[0].text, spaces=True)
    assert axes.get_title() == f"Contributions to the logit of '{target}'"


def test_the_figure_of_surprisal_shows_it(instruct):
    view = fk.lens(instruct, TEXT)
    np.testing.assert_array_equal(view.surprisal_figure().axes[0].lines[0].get_ydata(), view.surprisal)


def test_the_page_says_what_was_expected_of_each_token(instruct, tmp_path):
    view = fk.lens(instruct, TEXT)
    page = view.to_html(tmp_path / "lens.html").read_text()
    for at in range(1, len(view.ids)):
        likeliest = view.next_tokens(at - 1)[:3]
        expected = ", ".join(f"{visible(each.text, spaces=True)} {percent(each.probability)}" for each in likeliest)
        token = f"token {at}, {visible(view.token_texts[at], spaces=True)}"
        assert escape(f"{token}: {view.surprisal[at]:.1f} bits; expected {expected}") in page
    for each in view.next_tokens():
        assert f"<td>{each.rank}</td>" in page
        assert f"<td>{each.probability:.2%}</td>" in page


def test_the_page_has_the_lens_of_the_last_16_tokens(instruct):
    view = fk.lens(instruct, TEXT * 2)
    assert len(view.ids) > 16
    last = slice(len(view.ids) - 16, None)
    body = view.page().body
    tokens = re.findall(r'<th scope="col">(.*?)</th>', body)[-16:]
    assert tokens == [text_html(each, spaces=True) for each in view.token_texts[last]]
    rows = re.findall(r'<tr><th scope="row">(.*?)</tr>', body)[::-1]  # the last layer is at the top
    for row, ids, probabilities in zip(rows, view.layer_ids, view.layer_probabilities, strict=True):
        texts = [text_html(view.id_to_text[each], spaces=True) for each in ids[last].tolist()]
        expected = [*zip(map(percent, probabilities[last].tolist()), texts, strict=True)]
        assert re.findall(r'title="([^"]*)">(.*?)</td>', row) == expected


def test_the_table_in_jupyter_is_escaped(instruct):
    view = fk.lens(instruct, TEXT)
    changed = dataclasses.replace(view, id_to_text={**view.id_to_text, view.next_tokens()[0].id: "<img src=x>"})
    assert "&lt;img" in changed._repr_html_()
    assert "<img" not in changed._repr_html_()


def test_a_single_token_has_a_next_one_but_no_loss(instruct):
    view = fk.lens(instruct, [20])
    assert math.isnan(view.loss)
    assert len(view.next_tokens()) == 10
    assert repr(view).startswith("LensView(falconet-instruct, 1 token, next ")


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ""}, "the prompt is empty"),
        ({"text": [20] * 2049}, "the text has 2049 tokens, the model's context is 2048"),
        ({"target": "two words"}, "target 'two words' is 2 tokens ('two', ' words')"),
        ({"target": 5000}, "5000 is no token id of this model"),
        ({"top_k": 0}, "top_k=0 is not between 1 and 2048, the size of the vocabulary"),
    ],
)
def test_a_lens_with_invalid_arguments_is_refused(instruct, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fk.lens(instruct, **{"text": "Hello", **arguments})


INSPECTIONS = {
    "lens": lambda falcon: fk.lens(falcon, "Hello"),
    "attention": lambda falcon: fk.attention(falcon, "Hello"),
    "attribute": lambda falcon: fk.attribute(falcon, "Hello"),
    "ablate": lambda falcon: fk.ablate(falcon, "Hello", heads=[(0, 0)]),
    "explain": lambda falcon: fk.explain(falcon, "Hello"),
}


@pytest.mark.parametrize("inspect", INSPECTIONS.values(), ids=INSPECTIONS)
def test_a_model_with_virtual_tokens_is_refused(tokenizer, inspect):
    tuned = get_peft_model(small_model("40b"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="an adapter of virtual tokens, which inspection and scoring leave out"):
        inspect((tuned, tokenizer))


@pytest.mark.parametrize("name", ["lens", "attribute", "ablate", "explain"])
def test_a_decoder_without_a_head_is_refused(instruct, tokenizer, name):
    with pytest.raises(ValueError, match="FalconModel has no language-modelling head: give the whole model"):
        INSPECTIONS[name]((instruct.model.transformer, tokenizer))


def test_a_head_on_disk_is_refused(tokenizer, tmp_path):
    places = {"transformer": "cpu", "lm_head": "disk"}
    model = small_model("40b", tie_word_embeddings=False)
    model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    with pytest.raises(ValueError, match="the language-modelling head is on disk: load it in memory"):
        fk.lens((model, tokenizer), "Hello")


def test_a_target_is_one_token_though_the_tokenizer_puts_another_before_a_text(instruct, tokenizer):
    before = copy.deepcopy(tokenizer)
    before.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 11)]
    )
    found = fk.lens((instruct.model, before), "The tall", target=" giraffe")
    assert found.ids[0] == 11
    assert {found.id_to_text[each] for each in found.targets} == {" giraffe"}


def test_an_adapter_on_the_head_is_refused_until_it_is_merged(tokenizer):
    lora = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    tuned = get_peft_model(small_model("40b", tie_word_embeddings=False), lora).eval()
    with pytest.raises(
        ValueError, match="the language-modelling head has an adapter beside its weight: merge it first"
    ):
        fk.lens((tuned, tokenizer), "Hello")
    tuned.merge_adapter()
    view = fk.lens((tuned, tokenizer), "Hello")
    parts = view.embedding_contribution + view.attention_contribution.sum(0) + view.mlp_contribution.sum(0)
    np.testing.assert_allclose(parts, view.target_logits, rtol=1e-3)
