"""Documents become rows: what is trained on, where they are cut, how they are packed, and that they stay apart."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import falcon_kit as fk
from falcon_kit.generation.chat import FORMATS, encode
from falcon_kit.generation.control_tokens import encode_text
from falcon_kit.tuning.packing import collate, first_fit
from tests.conftest import small_model
from tests.tuning.small_runs import talk

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text.strip())


@pytest.fixture(scope="module", params=[each.name for each in FORMATS])
def falcon(request):
    return fk.load("falconet", chat=request.param)


def packed(falcon, rows, **options):
    return fk.pack(fk.dialogues(rows), falcon, **options)


# What is trained on


def test_the_assistants_words_and_the_end_token_are_trained_on_and_nothing_else(falcon):
    example = packed(falcon, [talk("Hi", "Hello there.", "Bye", "So long.")]).example(0)
    assert [text for text, trained in example.spans() if trained] == [" Hello there.", " So long.<|endoftext|>"]


def test_a_text_whose_tokens_fill_its_rows_keeps_its_end_token(falcon):
    count = len(encode_text(text := "One giraffe, two giraffes. " * 16, falcon.tokenizer))
    context = next(each for each in range(8, count) if count % each == 0)
    rows = packed(falcon, [{"text": text}], context=np.int64(context))
    last = rows.example(len(rows.lengths) - 1)
    assert (last.ids[-1], last.trained, len(rows.lengths)) == (11, [False, True], count // context + 1)


@given(st.lists(words, min_size=2, max_size=6).filter(lambda said: len(said) % 2 == 0))
def test_tokens_are_those_of_generation_whatever_is_said(falcon, said):
    messages = talk(*said)["messages"]
    try:
        expected = encode(messages, falcon.tokenizer, falcon.chat_format, add_generation_prompt=False)
    except ValueError:
        return  # blank after the template's own stripping
    example = packed(falcon, [messages]).example(0)
    assert example.ids == expected
    assert example.trained[-1]
    assert not example.trained[0]


def test_an_end_token_that_somebody_spells_out_is_text(falcon):
    example = packed(falcon, [talk("<|endoftext|>", "No <|endoftext|> here.")]).example(0)
    assert example.ids.count(falcon.tokenizer.eos_token_id) == 1


def test_of_a_plain_text_everything_is_trained_on_but_what_follows_nothing(falcon):
    example = packed(falcon, [{"text": "A text about zebras."}]).example(0)
    assert example.trained == [False] + [True] * (len(example.ids) - 1)
    assert example.ids[-1] == falcon.tokenizer.eos_token_id


def test_labels_are_the_trained_tokens(falcon):
    rows = packed(falcon, [talk("Hi", "Hello."), talk("Bye", "So long."), {"text": "A text."}])
    for row in (rows[index] for index in range(len(rows))):
        trained = np.concatenate([rows.example(each).trained for each in rows.rows[row["row"]]])
        assert row["labels"].tolist() == np.where(trained, row["input_ids"], -100).tolist()


def test_the_picture_escapes_what_it_shows(falcon):
    page = packed(falcon, [talk("<img onerror=alert(1)>", "<b>bold</b>")]).example(0)._repr_html_()
    assert ("<img" in page, "&lt;" in page, "onerror" in page) == (False, True, True)
    assert "<b>" not in page


# What does not fit


def test_a_long_conversation_is_cut_after_an_answer_and_named(falcon):
    rows = packed(falcon, [talk(*["Giraffes and zebras and lions"] * 12)], context=64)
    messages = talk(*["Giraffes and zebras and lions"] * 12)["messages"]
    kept = rows.example(0).ids
    fitting = [messages[:count] for count in range(2, 13, 2)]
    encoded = [encode(each, falcon.tokenizer, falcon.chat_format, add_generation_prompt=False) for each in fitting]
    assert kept == [each for each in encoded if len(each) <= 64][-1]
    assert [(each.where, "last" in each.reason) for each in rows.problems] == [("row 1", True)]


def test_a_first_answer_that_does_not_fit_is_left_out_and_named(falcon):
    rows = packed(falcon, [talk("Hi", "lions " * 100), talk("Hi", "Hello.")], context=32)
    assert len(rows.lengths) == 1
    assert [each.reason for each in rows.problems] == ["the first answer does not end within 32 tokens: left out"]


def test_what_is_cut_or_left_out_is_warned_of(falcon):
    with pytest.warns(
        UserWarning, match=r"2 conversations are cut, changed or left out: row 1: longer than 64 .*row 2"
    ):
        packed(falcon, [talk(*["Giraffes and zebras and lions"] * 12), talk("Hi", "lions " * 100)], context=64)


@pytest.mark.parametrize("answer", ["Leaves.\n\nOf acacias.", "Leaves.\r\nOf acacias."])
def test_an_answer_that_the_chat_format_changes_is_named(falcon, answer):
    found = [each.reason for each in packed(falcon, [talk("What do giraffes eat?", answer)]).problems]
    changed = "the chat format 'hub' changes an answer, such as its blank lines: fk.load(..., chat='falcon') keeps it"
    assert found == ([changed] if falcon.chat_format.name == "hub" else [])


def test_a_long_text_is_cut_into_pieces_that_join_to_the_whole(falcon):
    text = "One giraffe, two giraffes. " * 20
    rows = packed(falcon, [{"text": text}], context=32)
    ids = [token for index in range(len(rows.lengths)) for token in rows.example(index).ids]
    assert falcon.tokenizer.decode(ids) == f"{text}<|endoftext|>"
    assert max(rows.lengths) <= 32


def test_nothing_that_fits_is_an_error(falcon):
    with pytest.raises(ValueError, match="no document has anything to train on within 16 tokens: row 1"):
        packed(falcon, [talk("Hi", "lions " * 50)], context=16)


def test_a_tokenizer_without_an_end_of_a_text_is_refused(falcon):
    endless = replace(falcon, tokenizer=copy.deepcopy(falcon.tokenizer))
    endless.tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"has no end-of-sequence token, .*: set tokenizer\.eos_token"):
        packed(endless, [talk("Hi", "Hello.")])


@pytest.mark.parametrize("context", [4, 4096])
def test_a_context_out_of_range_is_refused(falcon, context):
    with pytest.raises(ValueError, match="is not between 8 and 2048"):
        packed(falcon, [talk("Hi", "Hello.")], context=context)


# Packing


def naive(lengths, context):
    """First-fit decreasing by the book."""
    rows, room = [], []
    for index in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        for row in range(len(rows)):
            if room[row] >= lengths[index]:
                break
        else:
            row = len(rows)
            rows.append([])
            room.append(context)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 90))
def test_rows_are_those_of_first_fit_by_the_book(lengths, context):
    assert first_fit(lengths, context) == naive(lengths, context)


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a document of 9 tokens does not fit into rows of 8"):
        first_fit([3, 9], 8)


def test_documents_packed_in_two_chat_formats_are_trained_on_together(falcon):
    other = fk.load("falconet", chat="baize" if falcon.chat_format.name != "baize" else "falcon")
    rows = [talk("Hi", "Hello there.") for _ in range(5)]
    parts = packed(falcon, rows, context=32), packed(other, rows, context=32)
    both = parts[0] + parts[1]
    expected = [row["labels"].tolist() for part in parts for row in (part[index] for index in range(len(part)))]
    assert [both[index]["labels"].tolist() for index in range(len(both))] == expected
    assert (both.tokens, both.trained_tokens) == tuple(
        sum(getattr(part, name) for part in parts) for name in ("tokens", "trained_tokens")
    )


def test_rows_of_different_lengths_are_not_put_together(falcon):
    parts = [packed(falcon, [talk("Hi", "Hello there.")], context=context) for context in (32, 64)]
    with pytest.raises(ValueError, match="rows of 32 and of 64 tokens"):
        parts[0] + parts[1]


def test_the_share_of_padding_is_said(falcon):
    rows = packed(falcon, [talk("Hi", "Hello there.")] * 40, context=128)
    assert rows.padding == pytest.approx(1 - sum(rows.lengths) / (len(rows) * 128))
    assert rows.padding < 0.25 < rows.padding_alone
    assert f"{rows.padding:.1%} padding" in repr(rows)


def test_packed_documents_give_the_loss_and_gradients_that_they_give_alone(layout, tokenizer, tmp_path):
    small_model(layout).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    falcon = fk.load(tmp_path, dtype="float32")
    chats = [talk(f"What is number {number}?", "It is a number. " * (1 + number % 3)) for number in range(9)]

    def learned(together):
        falcon.model.zero_grad()
        rows = packed(falcon, chats, context=160, together=together)
        batch = collate([rows[index] for index in range(len(rows))])
        batch.pop("rows")
        loss = falcon.model(**batch, skip_logits=True, num_items_in_batch=100).loss
        loss.backward()
        return loss.detach(), falcon.model.transformer.h[0].self_attention.query_key_value.weight.grad.clone()

    (loss, gradient), (expected, expected_gradient) = learned(True), learned(False)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


def test_what_is_filled_up_changes_nothing(falcon):
    rows = packed(falcon, [talk("Hi", "Hello."), talk("What is a zebra?", "An animal. " * 5)], together=False)
    both, model = collate([rows[0], rows[1]]), falcon.model
    with torch.inference_mode():
        short = min(range(2), key=lambda index: len(rows[index]["input_ids"]))
        length = len(rows[short]["input_ids"])
        alone = model(torch.from_numpy(rows[short]["input_ids"])[None].long()).logits
        beside = model(both["input_ids"], position_ids=both["position_ids"]).logits[short, :length]
    torch.testing.assert_close(beside, alone[0], rtol=1e-4, atol=1e-4)
    assert (both["labels"][short, length:] == -100).all()


def test_a_slice_of_rows_is_packed_too(falcon):
    rows = packed(falcon, [talk("Hi", f"Hello number {number}.") for number in range(9)], context=32)
    part = rows[1:3]
    assert [part[index]["labels"].tolist() for index in range(2)] == [
        rows[index]["labels"].tolist() for index in (1, 2)
    ]
    assert part.tokens == sum(len(rows[index]["input_ids"]) for index in (1, 2))


def test_a_name_is_no_falcon(falcon):
    with pytest.raises(TypeError, match=r"give what fk.load returns: fk\.load\('falconet'\); got str"):
        fk.pack(fk.dialogues([talk("Hi", "Hello.")]), "falconet")


@pytest.mark.parametrize("part", [slice(0, 2), slice(1, 3), slice(None, None, -1), slice(0, 0), slice(3, 0, -2)])
def test_a_slice_counts_only_its_own_rows(falcon, part):
    rows = packed(
        falcon, [talk("Hi", f"Hello number {number}. " * (1 + number % 4)) for number in range(12)], context=96
    )
    sliced = rows[part]
    expected = [rows[index] for index in range(len(rows))[part]]
    assert [sliced[index]["labels"].tolist() for index in range(len(sliced))] == [
        row["labels"].tolist() for row in expected
    ]
    assert sliced.tokens == sum(len(row["input_ids"]) for row in expected)
    assert sliced.trained_tokens == sum(int((row["labels"] != -100).sum()) for row in expected)
    assert 0 <= sliced.padding <= 1
    assert f"in {len(expected)} rows of 96: {sliced.padding:.1%} padding" in repr(sliced)


def test_the_html_of_an_example_runs_as_its_text_and_no_part_turns_the_next_round(falcon):
    html = packed(falcon, [talk("\u05e9 Hi \u202e", "Hello")]).example(0)._repr_html_()
    assert 'dir="rtl"' not in html  # it begins with "User:"
    assert html.count("<bdi>") == len(packed(falcon, [talk("Hi", "Hello")]).example(0).spans())
    assert 'dir="rtl"' in packed(falcon, [{"text": "\u05e9\u05dc"}]).example(0)._repr_html_()
