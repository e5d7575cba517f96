"""Records: what is computed from them, and how they look in a notebook."""

from falcon_kit.playground.records import Answer, Span, Token, Turn


def answer(*words, **changes):
    spans = [Span(word, (Token(word, -0.1),)) for word in words]
    return Answer("typist", "fk.load('falconet')", "go", {"seed": 5}, spans, **changes)


def test_the_text_is_that_of_the_spans():
    assert answer("One", " two").text == "One two"


def test_the_speed_counts_the_tokens_after_the_first():
    assert answer(new_tokens=11, first_token_seconds=1.0, seconds=3.0).tokens_per_second == 5.0


def test_one_token_has_no_speed():
    assert answer(new_tokens=1, first_token_seconds=1.0, seconds=1.0).tokens_per_second is None


def test_tokens_without_a_time_have_no_speed():
    assert answer(new_tokens=5, seconds=1.0).tokens_per_second is None


def test_a_turn_is_one_line_as_text_and_escaped_html_in_a_notebook():
    turn = Turn("1", "prompt", "<b>go</b>", (answer("<i>", new_tokens=1, ending="eos"),))
    assert repr(turn) == "Turn('<b>go</b>': '<i>')"
    assert "<bdi>&lt;b&gt;go&lt;/b&gt;</bdi> </span><b><bdi>&lt;i&gt;</bdi></b>" in turn._repr_html_()
    assert "1 token · seed 5 · eos" in turn._repr_html_()


def test_a_turn_runs_as_its_text_and_its_prompt_does_not_turn_the_answer_round():
    html = Turn("1", "prompt", "\u05e9\u202e", (answer(" yes"),))._repr_html_()
    assert 'dir="rtl"' in html
    assert "<bdi>\u05e9\u202e</bdi>" in html
    assert "<b><bdi> yes</bdi></b>" in html
