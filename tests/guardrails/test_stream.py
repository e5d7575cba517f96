"""What may be shown of a text while it is generated."""

import logging
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_kit.generation.text import Piece
from falcon_kit.guardrails import Blocked
from falcon_kit.guardrails.guard import Guardrails
from falcon_kit.guardrails.measure import BLOCKED_WORDS, lines, measured_guardrails, sample_tokens

GUARD = measured_guardrails()
SHORT = Guardrails(blocked_words=BLOCKED_WORDS, phone_regions=("US", "DE", "ES", "NO"), max_characters=60)
KEY = "AKIAIOSFODNN7EXAMPLE"
FRAGMENTS = [
    *"aA1 .\n-@:/+(\"'_,é炸สא",
    "\u0301",
    "\u200b",
    "ﬁ",
    KEY,
    KEY[:9],
    "4111 1111 1111 1111",
    "4111 1111 ",
    "1111",
    "jane@example.com",
    "jane@",
    "example.co.uk",
    "+1 202-555-0143",
    "+49 30 23125 014",
    "(202) 555-",
    "0143",
    "1-202 555 ",
    "612 345 678",
    "0151/",
    "41234567",
    "DE89 3704 0044 0532 0130 00",
    "DE89 3704 ",
    "536-90-4399",
    "password",
    " is ",
    "Tr0ub4dor&3",
    "damn",
    "kill  your",
    "self",
    "炸弹",
    "ѕех",
    "na na na ",
    "the same words again. ",
    "eyJhbGciOiJub25lIn0.",
    "eyJpc3MiOiJleGFtcGxlIn0",
    "-----BEGIN ",
    "PRIVATE KEY-----",
    "postgres://admin:hunter2@",
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join),
    st.tuples(st.sampled_from(FRAGMENTS), st.integers(5, 60)).map(lambda pair: pair[0] * pair[1]),
    st.sampled_from([line.text for line in lines()]),
    st.text(max_size=80),
    st.text("0123456789 ()./-,:$+a", max_size=50),
)


@st.composite
def split_texts(draw):
    """A text, and pieces of any lengths that make it up."""
    text = draw(TEXTS)
    cuts = draw(st.lists(st.integers(0, len(text)), max_size=len(text))) if draw(st.booleans()) else range(len(text))
    return text, [text[first:last] for first, last in pairwise([0, *sorted(cuts), len(text)])]


def streamed(guard, pieces):
    """The text that a stream shows, and the verdict that ended it or None."""
    shown = []
    try:
        for piece in guard.stream(iter(pieces)):
            shown.append(piece)
    except Blocked as error:
        return "".join(shown), error.verdict
    return "".join(shown), None


def marks(verdict):
    """The findings without their ends: a stream may be stopped before the last character of one."""
    return {(each.check, each.reason, each.span[0]) for each in verdict.findings}


@pytest.mark.parametrize("guard", [GUARD, SHORT], ids=["long", "short"])
@settings(max_examples=400, deadline=None)
@given(split_texts())
def test_any_split_gives_the_verdict_on_the_whole_and_shows_no_character_of_a_finding(guard, split):
    text, pieces = split
    whole = guard.check(text, "output")
    shown, verdict = streamed(guard, pieces)
    assert text.startswith(shown)
    if not whole:
        assert (shown, verdict) == (text, None)
        return
    assert verdict is not None
    assert marks(verdict) <= marks(whole)
    assert len(shown) <= min(finding.span[0] for finding in whole.findings)


@pytest.mark.parametrize("line", [line for line in lines() if line.where == "output"], ids=lambda line: line.text[:20])
def test_a_shipped_line_gets_one_verdict_whole_and_by_the_character(line):
    whole, (_, verdict) = GUARD.check(line.text, "output"), streamed(GUARD, line.text)
    assert bool(verdict) == bool(whole)
    assert marks(verdict or whole) <= marks(whole)


def test_ordinary_text_waits_for_less_than_a_sentence():
    check, waiting, most = GUARD.begin(), 0, 0
    for piece in sample_tokens(500):
        waiting += len(piece) - sum(map(len, check.push(piece)))
        most = max(most, waiting)
    assert most <= 60


def test_what_waits_and_what_is_kept_stay_small_however_long_the_text():
    check = Guardrails(max_characters=None).begin()
    for piece in sample_tokens(6000):
        check.push(piece)
    assert max(len(check._text.plain.text), len(check._text.folded.text)) < 5000
    assert len(check._held) < 100


def test_pieces_of_a_model_come_back_as_they_are():
    pieces = [Piece(text, number, -0.5) for number, text in enumerate(["A ", "", "bird", " ", "flies", "."])]
    assert list(GUARD.stream(pieces)) == pieces


def test_a_blocked_stream_closes_its_source():
    closed = []

    def source():
        try:
            yield from ["a ", "damn ", "shame", "!"]
        finally:
            closed.append(True)

    assert streamed(GUARD, [])[1] is None
    with pytest.raises(Blocked):
        list(GUARD.stream(source()))
    assert closed == [True]


def test_a_blocked_stream_stays_blocked():
    check = GUARD.begin()
    for call in (lambda: check.push("damn "), lambda: check.push("fine"), check.end):
        with pytest.raises(Blocked, match="output blocked by blocked_words: a blocked word"):
            call()


def test_an_error_of_the_source_is_raised_and_shows_nothing_that_waits():
    def source():
        yield "call (202) 555-"
        raise ConnectionError("lost")

    shown = []
    with pytest.raises(ConnectionError, match="lost"):
        shown.extend(GUARD.stream(source()))
    assert "555" not in "".join(shown)


def test_neither_the_error_nor_the_log_contains_the_text(caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(Blocked) as caught:
        list(GUARD.stream(["The key ", "is AKIAIOS", "FODNN7EXAMPLE", " ."]))
    verdict = caught.value.verdict
    shown = f"{caught.value!r} {caught.value} {verdict!r} {verdict} {verdict._repr_html_()} {caplog.text}"
    assert "secrets" in caplog.text
    assert not any(part in shown for part in ("AKIA", "FODNN7", "EXAMPLE"))


def test_a_token_without_text_waits_for_the_text_that_it_begins():
    check = Guardrails().begin()
    assert [piece.token_id for piece in check.push(Piece("So: ", 1, -1.0))] == [1]
    assert check.push(Piece("", 2, -1.0)) == []
    with pytest.raises(Blocked):
        check.push(Piece(KEY + " ", 3, -1.0))


@pytest.mark.parametrize("texts", [("", "a "), ("a", "", "", "b "), ("", "")])
def test_tokens_without_text_come_in_their_order_at_the_latest_at_the_end(texts):
    pieces = [Piece(text, number, -1.0) for number, text in enumerate(texts)]
    assert list(Guardrails().stream(iter(pieces))) == pieces
