"""A turn while its answers are generated: stop, errors and guardrails."""

import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import falcon_kit as fk
from falcon_kit.generation.text import Generation, Piece, Stats, TextOutOfMemory
from falcon_kit.playground.columns import Column
from falcon_kit.playground.records import Answer
from falcon_kit.playground.state import Session
from falcon_kit.playground.writing import AnswerWriter, TurnWriter
from tests.playground.typist import Gate, Typist, failing, in_background, text_of
from tests.waiting import interrupted_at_its_end, until


def test_the_speed_is_known_before_the_end():
    answer = Answer("typist", "", "go", {})
    writer = AnswerWriter(Column("typist", Typist()), answer, None)
    for word in ("One", " two"):
        writer.push(Piece(word, None, -0.5))
    assert answer.ending is None
    assert answer.tokens_per_second


# Stop


def test_stop_keeps_the_text_and_does_not_wait_for_a_silent_model():
    gate = Gate(words=2)
    session = Session(Typist(before=gate))
    writing = in_background(session.generate, "go")
    assert gate.reached.wait(10)
    session.stop()
    writing.join(5)
    assert not writing.is_alive()
    gate.opened.set()
    assert [(answer.text, answer.ending) for answer in session.turns[0].answers] == [("One two", "cancelled")]


def test_stop_closes_the_connection_to_an_endpoint():
    gate = Gate(words=1)
    typist = Typist(before=gate)
    session = Session(typist)
    writing = in_background(session.generate, "go")
    assert gate.reached.wait(10)
    session.stop()
    assert typist.closed.wait(5)
    gate.opened.set()
    writing.join(5)


def test_stop_reaches_an_endpoint_whose_stream_is_only_just_beginning():
    class Slow(Typist):
        def stream(self, prompt, **settings):
            session.stop()
            until(lambda: session.running is None)
            return super().stream(prompt, **settings)

    gate = Gate(words=0)
    typist = Slow(before=gate)
    session = Session(typist)
    session.generate("go")
    assert typist.closed.wait(5)
    gate.opened.set()


def test_a_stopped_model_keeps_its_statistics(instruct):
    session = Session(instruct)
    session.listeners.append(lambda event: event == "piece" and session.stop())
    session.set(seed=0)
    answer = session.generate(fk.CARD.prompt).answers[0]
    assert answer.ending == "cancelled"
    assert 1 <= answer.new_tokens < 20
    assert answer.cache_bytes > 0


def test_after_a_stop_the_next_text_is_written():
    gate = Gate(words=1)
    typist = Typist(before=gate)
    session = Session(typist)
    writing = in_background(session.generate, "go")
    assert gate.reached.wait(10)
    session.stop()
    writing.join(5)
    gate.opened.set()
    assert text_of(session.generate("again")) == ["One two three."]


def test_generate_pressed_twice_says_that_one_is_being_written():
    gate = Gate(words=1)
    session = Session(Typist(before=gate))
    writing = in_background(session.generate, "go")
    assert gate.reached.wait(10)
    for again in (lambda: session.generate("b"), session.undo, session.clear, session.regenerate):
        with pytest.raises(RuntimeError, match="an answer is being generated: stop it first"):
            again()
    gate.opened.set()
    writing.join(5)
    assert text_of(session.turns[0]) == ["One two three."]


def test_ctrl_c_ends_the_answer_and_leaves_everything_usable():
    gate = Gate(words=1)
    typist = Typist(before=gate)
    session = Session(typist)
    in_background(lambda: gate.reached.wait(10) and os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        session.generate("go")
    gate.opened.set()
    assert (session.running, session.turns[0].answers[0].ending) == (None, "cancelled")
    assert text_of(session.regenerate()) == ["One two three."]


def test_a_second_ctrl_c_leaves_a_history_that_can_be_saved_and_loaded(tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(TurnWriter, "_drain", interrupted)
    session = Session(Typist(before=failing(1)), Typist())
    session.listeners.append(lambda event: event == "piece" and session.stop())
    with pytest.raises(KeyboardInterrupt):
        session.generate("go")
    assert session.running is None
    assert None not in [answer.ending for answer in session.history[0].answers]
    assert session.load(session.save(tmp_path / "playground.json")) == 0


def test_ctrl_c_before_the_first_token_leaves_the_session_usable():
    session = Session(Typist())
    session.listeners.append(lambda event: event == "start" and signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        session.generate("go")
    assert (session.running, session.history[0].answers[0].ending) == (None, "cancelled")


def test_ctrl_c_just_before_generating_leaves_the_session_usable():
    session = Session(Typist())
    lock, session._lock = session._lock, interrupted_at_its_end()
    with pytest.raises(KeyboardInterrupt):
        session.generate("go")
    session._lock = lock
    assert (session.running, session.history[0].answers[0].ending) == (None, "cancelled")
    assert text_of(session.generate("go")) == ["One two three."]


# What goes wrong


def test_an_answer_that_breaks_off_is_kept_and_marked():
    answer = Session(Typist(before=failing(2))).generate("go").answers[0]
    assert (answer.text, answer.ending) == ("One two", "error")
    assert answer.reason == "ConnectionError: the endpoint broke off"


@pytest.mark.parametrize(
    "error",
    [
        lambda so_far: fk.IncompleteAnswer("it broke off", so_far),
        lambda so_far: TextOutOfMemory("out of memory", [so_far]),
    ],
    ids=["IncompleteAnswer", "TextOutOfMemory"],
)
def test_an_error_that_has_the_text_so_far_brings_what_was_kept_back_and_the_statistics(error):
    stats = Stats(rows=1, prompt_tokens=7, new_tokens=4, first_token_seconds=0.1, seconds=0.2)
    so_far = Generation("go", "One two and", (), None, "broken", stats)

    def breaks(number):
        if number == 2:
            raise error(so_far)

    answer = Session(Typist(before=breaks)).generate("go").answers[0]
    assert (answer.text, answer.ending) == ("One two and", "error")
    assert (answer.prompt_tokens, answer.new_tokens) == (7, 4)


def test_an_error_while_a_piece_is_shown_ends_the_answer_with_it(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such token")

    session = Session(Typist())
    monkeypatch.setattr(AnswerWriter, "push", broken)
    session.generate("go")
    (answer,) = session.turns[0].answers
    assert (answer.ending, answer.reason, session.running) == ("error", "RuntimeError: no such token", None)


def test_a_prompt_over_the_context_is_an_error_that_names_the_limit(instruct):
    answer = Session(instruct).generate("giraffe " * 2100).answers[0]
    assert (answer.text, answer.ending) == ("", "error")
    assert "the model's context is 2048" in answer.reason


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_blank_text_is_refused_and_nothing_is_remembered(text):
    session = Session(Typist())
    with pytest.raises(ValueError, match="the text is empty"):
        session.generate(text)
    assert (session.turns, session.history, session.can_undo) == ([], [], False)


def test_half_a_character_reaches_no_tokenizer():
    typist = Typist()
    Session(typist).generate("a\ud83e")
    assert typist.asked[0][0] == "a\ufffd"


def test_a_character_in_two_halves_is_joined():
    typist = Typist()
    Session(typist).generate("a\ud83e\udd92")
    assert typist.asked[0][0] == "a\U0001f992"


# Guardrails


def forbids(word):
    return fk.guardrails(custom={"words": lambda text: f"it says {word}" if word in text else None}, repetition=False)


def test_a_function_is_refused_with_what_takes_one():
    with pytest.raises(TypeError, match=r"got a function: fk.guardrails\(custom=...\) takes a function"):
        fk.playground(Typist(), guardrails=lambda text: None)


def test_a_refused_prompt_never_reaches_the_model():
    typist = Typist()
    session = Session(typist, guardrails=forbids("secret"))
    with pytest.raises(ValueError, match="the guardrails refuse this text: words: it says secret"):
        session.generate("the secret")
    assert (typist.asked, session.history, session.running) == ([], [], None)


def test_a_refused_sentence_is_not_shown_and_the_model_is_told_to_stop():
    typist = Typist("All", " good.", " The", " secret", " is.", " And", " on")
    answer = Session(typist, guardrails=forbids("secret")).generate("go").answers[0]
    assert (answer.text, answer.ending) == ("All good.", "refused")
    assert answer.reason == "words: it says secret (characters 9 to 24)"
    assert typist.closed.wait(5)


@given(st.lists(st.text(alphabet="ax. \n", min_size=1, max_size=4), min_size=1, max_size=12))
def test_whatever_is_shown_at_any_time_has_passed_the_guardrails(words):
    session = Session(Typist(*words), guardrails=forbids("x"))
    shown = []
    session.listeners.append(lambda event: shown.append(text_of(session.turns[0])[0]))
    final = session.generate("go").answers[0]
    assert [text for text in shown if "x" in text] == []
    assert (final.text == "".join(words)) == ("x" not in "".join(words))
