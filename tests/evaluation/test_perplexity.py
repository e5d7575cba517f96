"""Perplexity is that of a plain loop over transformers' Falcon, and of lm-eval; unusable texts are refused."""

import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.utils import get_rolling_token_windows
from peft import LoraConfig, get_peft_model
from transformers import FalconForCausalLM

import falcon_kit as fk
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.evaluation.perplexity import measure, windows
from falcon_kit.evaluation.progress import Progress
from falcon_kit.evaluation.texts import read_corpora
from falcon_kit.inspection.hooks import inspect_model

CONTEXT = 32
TEXT = "Giraffes eat acacia leaves. They live in the savanna, where lions rest. " * 12


@pytest.fixture(scope="module")
def inspected():
    return inspect_model(fk.load("falconet", dtype="float32"))


@pytest.fixture(scope="module")
def short(inspected):
    """Falconet with a context of 32 tokens."""
    return replace(inspected, spec=replace(inspected.spec, context=CONTEXT))


@pytest.fixture(scope="module")
def stock():
    return FalconForCausalLM.from_pretrained(embedded_directory("falconet"), dtype=torch.float32).eval()


def perplexity(inspected, text, stride=None):
    (corpus,) = read_corpora(text)
    return measure(inspected, corpus, Progress(None, {}), stride)


def plain_loop(model, tokenizer, text, context, stride):
    """The nats of a text, a window after the other."""
    ids = [11, *tokenizer(text)["input_ids"]]
    nats, done = 0.0, 1
    while done < len(ids):
        end = min(len(ids), done + (context if done == 1 else stride))
        window = ids[max(0, end - context - 1) : end]
        with torch.inference_mode():
            logits = model(torch.tensor([window[:-1]])).logits[0].float().log_softmax(-1)
        nats -= sum(float(logits[place, window[place + 1]]) for place in range(len(window) - 1)[done - end :])
        done = end
    return nats


@pytest.mark.parametrize("stride", [5, 16, CONTEXT])
def test_a_long_text_has_the_perplexity_of_a_plain_loop_over_transformers(short, stock, stride):
    found = perplexity(short, TEXT[:400], stride)
    expected = plain_loop(stock, short.tokenizer, TEXT[:400], CONTEXT, stride)
    tokens = len(short.tokenizer(TEXT[:400])["input_ids"])
    assert found.tokens == tokens > 2 * CONTEXT
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert found.per_token.value == pytest.approx(math.exp(expected / tokens), rel=1e-5)


def test_it_is_counted_per_token_byte_and_word(inspected):
    text = "Die Löwen schlafen. " * 3
    found = perplexity(inspected, text)
    size, words = len(text.encode()), len(re.split(r"\s+", text))
    assert (found.bytes, found.words) == (size, words)
    assert found.per_byte.value == pytest.approx(math.exp(found.nats / size))
    assert found.per_word.value == pytest.approx(math.exp(found.nats / words))
    assert found.bits_per_byte.value == pytest.approx(found.nats / size / math.log(2))


def test_documents_are_read_on_their_own(inspected, stock):
    texts = ["Lions sleep.", "Zebras eat dry grass.", "A young seal is called a pup."]
    found = perplexity(inspected, texts)
    expected = [plain_loop(stock, inspected.tokenizer, text, 2048, 2048) for text in texts]
    assert [part.nats for part in found.parts] == pytest.approx(expected, rel=1e-5)
    assert [part.where for part in found.parts] == ["document 1", "document 2", "document 3"]


@pytest.mark.parametrize(("dtype", "adapter"), [("int8", False), ("int4", False), ("nf4", False), ("nf4", True)])
def test_a_quantised_or_tuned_model_is_measured_as_it_computes(inspected, dtype, adapter):
    falcon = fk.load("falconet", dtype=dtype)
    model, text = falcon.model, TEXT[:72]
    if adapter:
        options = LoraConfig(target_modules=["query_key_value"], init_lora_weights=False)
        model = get_peft_model(model, options).eval()
    found = fk.evaluate((model, falcon.tokenizer), text=text).perplexity
    assert found.nats == pytest.approx(plain_loop(model, falcon.tokenizer, text, 2048, 2048), rel=1e-5)
    assert found.nats != pytest.approx(perplexity(inspected, text).nats, rel=1e-4)


def test_the_interval_is_that_of_the_documents(inspected):
    found = perplexity(inspected, ["Lions sleep in the grassland.", "Zebras eat dry grass.", "Bears eat salmon."])
    low, high = math.log(found.per_token.low), math.log(found.per_token.high)
    residuals = [part.nats - found.nats / found.tokens * part.tokens for part in found.parts]
    error = math.sqrt(3 / 2 * sum(each**2 for each in residuals)) / found.tokens
    assert high - low == pytest.approx(2 * 1.959964 * error, rel=1e-5)


def test_a_single_text_has_blocks_of_about_64_tokens(inspected):
    found = perplexity(inspected, TEXT)
    assert found.tokens // 64 == len(found.parts)
    assert {round(part.tokens) // 8 for part in found.parts} == {8}
    assert found.bytes == len(TEXT)


@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 50))
def test_the_windows_are_those_of_lm_eval(tokens, context, stride):
    stride = min(stride, context)
    ids = list(range(tokens + 1))
    rows = get_rolling_token_windows(ids[1:], 0, context, context - stride + 1)
    expected = [([*inputs, predicted[-1]], len(predicted)) for inputs, predicted in rows]
    assert [(ids[start:end], scored) for start, end, scored in windows(tokens, context, stride)] == expected


# Files


def test_a_file_is_one_text(inspected, tmp_path):
    file = tmp_path / "lions.txt"
    file.write_text("Lions sleep.\n\nZebras eat dry grass.\n")
    found = perplexity(inspected, file)
    assert (found.name, found.nats) == ("lions.txt", perplexity(inspected, file.read_text()).nats)


def test_a_file_of_rows_is_read_as_documents(inspected, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "Lions sleep."}\n{"text": "Zebras eat dry grass."}\n')
    assert [part.where for part in perplexity(inspected, file).parts] == ["texts.jsonl:1", "texts.jsonl:2"]
    assert perplexity(inspected, fk.dialogues(file)).nats == perplexity(inspected, file).nats


ROWS = [{"text": "Lions sleep.", "label": 1}, {"text": "Zebras eat dry grass.", "label": None}]


@pytest.mark.parametrize(
    "table",
    [ROWS, pd.DataFrame(ROWS), pd.DataFrame(ROWS)["text"], Dataset.from_list(ROWS), Dataset.from_list(ROWS)["text"]],
    ids=["rows", "frame", "column of a frame", "dataset", "column of a dataset"],
)
def test_the_rows_of_a_table_are_documents_and_not_its_columns(table):
    texts = ("Lions sleep.", "Zebras eat dry grass.")
    assert [corpus.documents for corpus in (*read_corpora(table), *read_corpora({"one": table}))] == [texts, texts]


# Bad input


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the text 'text' is empty"),
        (["Lions sleep.", ""], "document 2 is empty"),
        ("a", "fewer than two tokens: give a longer one"),
        ([], "'text' has no documents"),
        ({}, "there are no texts"),
        ({"English": ""}, "the text 'English' is empty"),
        ("half \ud83d", "lone surrogate"),
        ([{"title": "Lions"}], "nothing can be used of the rows given: row 1: it has none of "),
    ],
)
def test_an_unusable_text_is_refused(inspected, text, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        perplexity(inspected, text)


@pytest.mark.parametrize(
    "text", [7, ["Lions sleep.", 7], None, ["Lions sleep.", {"text": "Zebras."}], {"a": {"text": "Zebras."}}]
)
def test_what_is_no_text_is_a_type_error(inspected, text):
    with pytest.raises(TypeError, match=r"int|NoneType|dict"):
        perplexity(inspected, text)


def test_the_name_of_a_file_is_not_taken_for_a_text(inspected):
    with pytest.raises(ValueError, match=r"is a file: give Path\("):
        perplexity(inspected, str(Path(__file__)))


def test_a_text_longer_than_the_name_of_a_file_can_be_is_read(inspected):
    assert perplexity(inspected, "长颈鹿吃金合欢树的叶子" * 10).bytes == 330


def test_a_path_below_the_home_folder_is_read(inspected, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "lions.txt").write_text("Lions sleep in the sun.")
    assert perplexity(inspected, Path("~/lions.txt")).bytes == 23


@pytest.mark.parametrize(
    ("encoding", "problem"),
    [("latin-1", r"latin\.txt is not UTF-8 .*position 1.* after -f"), ("utf-16", r"latin\.txt is UTF-16")],
)
def test_bytes_that_are_not_utf_8_are_named_with_a_command_that_converts_them(tmp_path, encoding, problem):
    file = tmp_path / "latin.txt"
    file.write_bytes("Löwen schlafen.".encode(encoding))
    with pytest.raises(ValueError, match=problem) as caught:
        read_corpora(file)
    (command,) = re.findall("`(.*)`", str(caught.value))
    converted = tmp_path / "converted.txt"
    converted.write_bytes(subprocess.run([*command.split(), str(file)], capture_output=True, check=True).stdout)
    assert read_corpora(converted)[0].documents == ("Löwen schlafen.",)


def test_a_missing_file_is_named(inspected, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.txt"):
        perplexity(inspected, tmp_path / "none.txt")


def test_a_conversation_is_refused(inspected):
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    with pytest.raises(ValueError, match="row 1 is a conversation"):
        perplexity(inspected, fk.dialogues([row]))


@pytest.mark.parametrize("stride", [-1, CONTEXT + 1])
def test_a_stride_out_of_range_is_refused(short, stride):
    with pytest.raises(ValueError, match=f"stride={stride} is not between 1 and 32"):
        perplexity(short, TEXT, stride)
