"""`explain`: what it sends, what it refuses, and the page without a kernel."""

import json
import re
import threading
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import falcon_kit as fk
from falcon_kit.display.page import percent, text_html
from falcon_kit.explanation.parts import layer_part_bytes, text_part_bytes
from falcon_kit.model.modeling import FalconForCausalLM
from tests.conftest import small_config, small_model
from tests.inspection.models import model

TEXT = "The giraffe eats the leaves"


@pytest.fixture
def sent(monkeypatch):
    """What the widget sends to the browser."""
    messages = []
    monkeypatch.setattr(fk.Explanation, "send", lambda self, content, buffers=None: messages.append(content))
    return messages


def ask(view, do, **values):
    view._on_message(view, {"do": do, **values}, [])


# Messages


def test_hello_gives_the_text_and_what_is_shown_first(instruct, sent):
    ask(fk.explain(instruct, TEXT, layer=3, head=2), "hello")
    (message,) = sent
    assert (message["type"], message["layer"], message["head"]) == ("start", 3, 2)
    assert "".join(token["text"] for token in message["text"]["tokens"]) == TEXT


def test_an_answer_carries_the_key_of_its_request(instruct, sent):
    view = fk.explain(instruct, TEXT)
    ask(view, "layer", key="a", layer=5, position=2)
    ask(view, "head", key="b", layer=5, position=2, head=3)
    ask(view, "route", key="c")
    ask(view, "hello", key="d")
    answers = [*(("part", key) for key in "abc"), ("start", "d")]
    assert [(message["type"], message["key"]) for message in sent] == answers
    assert sent[0]["part"]["probabilities"]["shape"] == [4, 3]


def test_a_part_says_how_many_tokens_its_text_has(instruct, sent):
    view = fk.explain(instruct, TEXT)
    for _ in range(2):
        ask(view, "route", key="route")
        view.take(5)
    assert [message["tokens"] for message in sent if message["type"] == "part"] == [5, 6]


def test_a_taken_token_joins_the_text_as_generation_would_continue_it(instruct, sent):
    view = fk.explain(instruct, TEXT)
    expected = instruct.generate(TEXT, max_new_tokens=3).tokens
    for _ in expected:
        ask(view, "hello")
        ask(view, "take", id=sent[-1]["text"]["named"][0]["id"])
    assert tuple(view.ids[-3:]) == expected
    assert sent[-1]["type"] == "start"
    assert view.text.startswith(TEXT)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"do": "layer", "layer": 6, "position": 0}, "layer 6 does not exist"),
        ({"do": "layer", "layer": 0, "position": 99}, "position 99 does not exist: positions are numbered 0 to 4"),
        ({"do": "head", "layer": 0, "position": 5, "head": 0}, "position 5 does not exist"),
        ({"do": "head", "layer": 0, "position": 1, "head": 4}, "head 4 does not exist"),
        ({"do": "head", "layer": 0, "position": 1, "head": 0, "attended": 2}, "key 2 does not exist"),
        ({"do": "take", "id": 99999}, "is no token id"),
        ({"do": "nonsense"}, "KeyError"),
        ({}, "KeyError"),
    ],
)
def test_a_request_that_cannot_be_answered_is_an_error_in_the_view(instruct, sent, request_, words):
    view = fk.explain(instruct, TEXT)
    view._on_message(view, {"key": "x", **request_}, [])
    (message,) = sent
    assert (message["type"], message["key"]) == ("error", "x")
    assert words in message["text"]
    assert view.text == TEXT


def test_a_full_context_is_an_error_and_the_text_stays(tokenizer, sent):
    model = small_model("40b", max_position_embeddings=8)
    view = fk.explain((model, tokenizer), list(range(8)))
    ask(view, "take", id=5)
    assert "8" in sent[0]["text"]
    assert len(view.ids) == 8


def test_one_forward_pass_answers_all_requests_for_a_layer(instruct, sent):
    view, passes = fk.explain(instruct, TEXT), []
    hook = instruct.model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    ask(view, "hello")
    for head in range(4):
        ask(view, "head", key="k", layer=0, position=1, head=head)
    ask(view, "layer", key="k", layer=0, position=2)
    hook.remove()
    assert len(passes) == 1


def test_records_of_at_most_two_layers_are_kept(instruct, sent):
    view = fk.explain(instruct, TEXT)
    for layer in range(6):
        ask(view, "layer", key="k", layer=layer, position=0)
    assert [*view._records] == [4, 5]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4", "nf4"])
def test_a_quantised_model_is_shown_with_its_own_numbers(dtype):
    falcon = fk.load("falconet", dtype=dtype)
    view = fk.explain(falcon, TEXT, layer=1)
    with torch.inference_mode():
        expected = falcon.model(torch.tensor([view.ids])).logits[0, -1].float()
    torch.testing.assert_close(view._record(1).logits, expected, rtol=0.02, atol=0.02)
    assert json.dumps([view._start(), view._layer(4, 3), view._head(4, 3, 2)], allow_nan=False)


def test_layers_on_disk_are_shown_as_those_in_memory(tmp_path, tokenizer):
    small_model("40b").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    parts = ("word_embeddings", "rotary_emb", "ln_f", "h.0")
    places = {**{f"transformer.{name}": "cpu" for name in parts}, "transformer.h.1": "disk", "lm_head": "cpu"}
    whole, offloaded = (
        fk.explain(fk.load(tmp_path, device_map=each, offload_folder=tmp_path / "off"), TEXT) for each in (None, places)
    )
    for layer in (0, 1):
        one, other = whole._record(layer).layer, offloaded._record(layer).layer
        torch.testing.assert_close(other.heads.query, one.heads.query)
        torch.testing.assert_close(other.vectors["output"].norm, one.vectors["output"].norm)


# Refused


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"text": ""}, ValueError, "the prompt is empty"),
        ({"text": "a " * 3000}, ValueError, "the model's context is 2048"),
        ({"text": [5000]}, ValueError, "is no token id"),
        ({"text": TEXT, "layer": 6}, IndexError, "layer 6 does not exist: layers are numbered 0 to 5"),
        ({"text": TEXT, "head": -1}, IndexError, "head -1 does not exist"),
    ],
)
def test_what_cannot_be_shown_is_refused(instruct, arguments, error, words):
    with pytest.raises(error, match=words):
        fk.explain(instruct, **arguments)


def test_what_is_no_falcon_is_refused():
    with pytest.raises(TypeError, match=r"give what fk\.load returns"):
        fk.explain("falconet", TEXT)


# The page


def test_a_page_of_forty_tokens_is_under_a_megabyte_and_a_half(instruct, tmp_path):
    file = fk.explain(instruct, list(range(100, 140))).to_html(tmp_path / "page.html")
    assert file.stat().st_size < 1_500_000


def test_a_layer_of_the_40b_fits_into_a_page_of_forty_tokens(tokenizer):
    config = small_config("40b", vocab_size=65024, hidden_size=8192, num_attention_heads=128, num_kv_heads=8)
    with torch.device("meta"):
        large = FalconForCausalLM(config)
    assert fk.explain((large, tokenizer), list(range(100, 140)))._fitting(1) == 1


def test_a_page_holds_the_chosen_layers_with_all_their_heads(instruct):
    page = fk.explain(instruct, TEXT).page(layers=[4, 1])
    assert page.data["start"]["layer"] == 4
    last = len(page.data["start"]["text"]["tokens"]) - 1
    names = {f"layer {layer} {last}" for layer in (1, 4)}
    assert {*page.data["parts"]} == names | {f"head {layer} {last} {head} " for layer in (1, 4) for head in range(4)}


def test_a_page_without_javascript_has_the_likeliest_next_tokens(instruct):
    likeliest = fk.lens(instruct, TEXT, top_k=5).next_tokens()
    expected = [f"{text_html(each.text, spaces=True)}: {percent(each.probability)}" for each in likeliest]
    assert re.findall("<li>(.*?)</li>", fk.explain(instruct, TEXT).page([1]).body) == expected


def test_a_file_holds_the_chosen_layers(instruct, tmp_path):
    file = fk.explain(instruct, TEXT).to_html(tmp_path / "page.html", layers=[2])
    assert {*re.findall(r'"layer (\d) ', file.read_text(encoding="utf-8"))} == {"2"}


def test_a_page_holds_the_nearest_layers_that_fit(instruct, monkeypatch):
    view = fk.explain(instruct, TEXT, layer=3)
    one = layer_part_bytes(instruct.spec, 5)
    monkeypatch.setattr("falcon_kit.explanation.view._PAGE_BYTES", len(view.page([3, 2]).document()) + one // 2)
    layers = {int(key.split()[1]) for key in view.page().data["parts"]}
    assert layers == {2, 3}


@pytest.mark.parametrize("tokens", [1, 40, 100])
def test_the_size_of_a_page_is_known_before_the_model_runs(layout, tokenizer, tokens):
    view = fk.explain((model(layout), tokenizer), list(range(100, 100 + tokens)))
    text, layer = len(json.dumps(view._start())), len(json.dumps(view._layer_parts(0)))
    assert text <= text_part_bytes(view._inspected, view.ids) <= text + 7000
    assert layer <= layer_part_bytes(view._inspected.spec, tokens) < 1.2 * layer


def test_a_page_that_would_be_too_large_is_refused_before_the_model_runs(instruct, monkeypatch):
    view = fk.explain(instruct, TEXT)
    monkeypatch.setattr("falcon_kit.explanation.view._PAGE_BYTES", 100_000)
    with passes(instruct) as found, pytest.raises(ValueError, match="a page of 6 layers takes"):
        view.page(range(6))
    assert found == []


def test_to_show_the_view_takes_one_forward_pass(instruct):
    with passes(instruct) as found:
        bundle = fk.explain(instruct, TEXT)._repr_mimebundle_()[0]
    assert len(found) == 1
    assert "holds no route" in bundle["text/html"]


@contextmanager
def passes(falcon):
    """The forward passes of a model."""
    found = []
    hook = falcon.model.transformer.register_forward_hook(lambda *_: found.append(1))
    yield found
    hook.remove()


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_token_whose_pass_fails_is_not_taken(instruct, monkeypatch, error):
    view = fk.explain(instruct, TEXT)
    before = view.ids

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("falcon_kit.explanation.view.record", fail)
        with pytest.raises(error):
            view.take(5)
    assert view.ids == before
    assert view._start()["text"]["tokens"][-1]["id"] == before[-1]


def together(falcon, first, second):
    """Runs `first` up to its first forward pass, then `second` in another thread until it waits or ends."""
    reached, opened = threading.Event(), threading.Event()

    def hold(*_):
        hook.remove()
        reached.set()
        assert opened.wait(10)

    hook = falcon.model.transformer.register_forward_hook(hold)
    threads = [threading.Thread(target=each) for each in (first, second)]
    threads[0].start()
    assert reached.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    opened.set()
    for each in threads:
        each.join(10)


def test_a_request_that_comes_while_a_token_is_taken_is_answered_after_the_new_text(instruct, sent):
    """JupyterLab sends the messages of a widget to a thread of their own."""
    view = fk.explain(instruct, TEXT)
    together(instruct, lambda: view.take(5), lambda: ask(view, "route", key="route"))
    assert [(message["type"], message.get("tokens")) for message in sent] == [("start", None), ("part", 6)]


def test_a_page_is_of_one_text_although_a_token_is_taken_meanwhile(instruct, sent):
    view, pages = fk.explain(instruct, TEXT), []
    together(instruct, lambda: pages.append(view.page([0])), lambda: view.take(5))
    assert len(view.ids) == 6
    assert (len(pages[0].data["start"]["text"]["tokens"]), pages[0].data["route"][0]["position"]) == (5, 4)


def test_a_page_without_a_layer_is_refused(instruct):
    with pytest.raises(ValueError, match="give one, or leave layers out"):
        fk.explain(instruct, TEXT).page(layers=[])


def test_a_page_that_would_be_too_large_is_refused_and_a_notebook_shows_the_next_tokens(instruct, monkeypatch):
    view = fk.explain(instruct, TEXT)
    monkeypatch.setattr("falcon_kit.explanation.view._PAGE_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"the limit is 0\.0: give a shorter text"):
        view.page([0])
    monkeypatch.setattr("falcon_kit.explanation.view._PAGE_BYTES", 100_000)
    with pytest.raises(ValueError, match=r"takes 0\..* MB, the limit is 0\.1: give fewer layers, or a shorter text"):
        view.page([0, 1, 2, 3, 4, 5])
    assert "continues" in view._repr_html_()


HOSTILE = ["</script><img src=x onerror=alert(1)>", '"><b>', "<!--", "\u202egnp.exe", "]]>", "$\\frac{$"]


@given(st.one_of(st.sampled_from(HOSTILE), st.text(min_size=1, max_size=20)))
@settings(max_examples=15)
def test_a_text_stays_text_in_the_page(instruct, text):
    view = fk.explain(instruct, text + "<x-planted>")
    document = view.page([0]).document()
    assert ("<x-planted" in document, "x-planted" in document) == (False, True)
    assert ("<x-planted" in view._summary(), "x-planted" in view._summary()) == (False, True)


def test_the_repr_is_short(instruct):
    assert repr(fk.explain(instruct, TEXT)) == "Explanation(falconet-instruct, 5 tokens)"


def test_a_notebook_without_a_kernel_gets_the_page(instruct):
    bundle = fk.explain(instruct, TEXT)._repr_mimebundle_()[0]
    assert "fk-explanation" in bundle["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in bundle
