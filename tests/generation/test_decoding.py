"""Rows: tokens in, characters out, for any text and any stop strings; Python's own string methods are the oracle."""

from hypothesis import example, given
from hypothesis import strategies as st

from falcon_kit.generation.decoding import Row


@st.composite
def texts_with_stops(draw):
    text = draw(st.text(alphabet="ab\n é🦒字\u0301", max_size=30) | st.text(max_size=30))
    stops = draw(st.lists(st.text(alphabet="ab\n é🦒", min_size=1, max_size=3), max_size=3))
    return text, tuple(stops)


def pieces_of(tokenizer, text, stop=(), strip=False):
    """What a row shows token by token, as far as it goes."""
    ids = tokenizer(text)["input_ids"]
    row = Row(tokenizer, stop, limit=len(ids), strip=strip)
    shown = []
    for token in ids:
        shown.append(row.push(token, 0.0))
        if row.finish_reason:
            break
    return shown, row


@given(st.text(max_size=40))
def test_the_pieces_of_any_text_join_to_the_text(tokenizer, text):
    assert "".join(pieces_of(tokenizer, text)[0]) == tokenizer.decode(
        tokenizer(text)["input_ids"], skip_special_tokens=True
    )


@given(st.text(alphabet="é🦒字한 a", min_size=1, max_size=20))
def test_no_piece_holds_half_a_character(tokenizer, text):
    assert [piece for piece in pieces_of(tokenizer, text)[0] if "\ufffd" in piece] == []


def before_the_first(text, stop):
    """What stands before the first stop string to be complete, when characters are read one by one."""
    for length in range(1, len(text) + 1):
        if ended := [word for word in stop if text[:length].endswith(word)]:
            return text[: length - max(map(len, ended))]
    return text


@example(("a  ", (" ", "a  ")))
@example(("ab", ("b", "ab")))
@given(texts_with_stops())
def test_what_is_shown_is_the_text_before_the_first_complete_stop_string(tokenizer, case):
    text, stop = case
    assert "".join(pieces_of(tokenizer, text, stop)[0]) == before_the_first(text, stop)


@example(("\nUser: hi", ("\nUser:",)))
@given(texts_with_stops())
def test_white_space_that_an_answer_begins_with_may_begin_a_stop_string(tokenizer, case):
    text, stop = case
    assert "".join(pieces_of(tokenizer, text, stop, strip=True)[0]) == before_the_first(text, stop).lstrip()


@given(texts_with_stops())
def test_a_row_has_shown_its_whole_text_when_it_ends(tokenizer, case):
    shown, row = pieces_of(tokenizer, *case)
    assert "".join(shown) == row.text


def test_a_text_cut_off_inside_a_character_shows_a_replacement_mark_at_the_end(tokenizer):
    ids = tokenizer("🦒")["input_ids"]
    row = Row(tokenizer, (), limit=len(ids) - 1, strip=False)
    assert "".join(row.push(token, 0.0) for token in ids[:-1]) == tokenizer.decode(ids[:-1])


def test_an_end_token_inside_a_character_shows_a_replacement_mark_too(tokenizer):
    ids = [*tokenizer("🦒")["input_ids"][:-1], tokenizer.eos_token_id]
    row = Row(tokenizer, (), limit=100, strip=False)
    assert "".join(row.push(token, 0.0) for token in ids) == tokenizer.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, 2047).filter(lambda token: token != 11), min_size=1, max_size=30))
def test_any_tokens_at_all_give_the_text_that_the_tokenizer_decodes(tokenizer, ids):
    row = Row(tokenizer, (), limit=len(ids), strip=False)
    assert "".join(row.push(token, 0.0) for token in ids) == tokenizer.decode(ids, skip_special_tokens=True)
