"""The playground without its widget: its session as plain Python."""

import re
from dataclasses import asdict, replace

import pytest
from transformers import GenerationConfig

import falcon_kit as fk
from falcon_kit.playground.state import EXAMPLES, PRESETS, Session
from tests.playground.typist import Typist, chatting, failing, text_of

QUESTION = "What do giraffes eat?"
QUICK = {"max_new_tokens": 12}


# Prompts


def test_a_prompt_is_continued_as_the_model_itself_continues_it(instruct):
    session = Session(instruct)
    session.set(seed=3, **QUICK)
    answer = session.generate(fk.CARD.prompt).answers[0]
    expected = instruct.generate(fk.CARD.prompt, top_k=10, seed=3, **QUICK)
    assert (answer.text, answer.ending) == (expected.text, expected.finish_reason)
    assert [token.logprob for span in answer.spans for token in span.tokens] == pytest.approx(
        expected.logprobs, abs=1e-4
    )


def test_each_token_comes_with_the_likeliest_at_its_place(instruct):
    session = Session(instruct)
    session.preset("greedy")
    session.set(**QUICK)
    tokens = [token for span in session.generate("Counting: 7, 8,").answers[0].spans for token in span.tokens]
    assert {len(token.alternatives) for token in tokens} == {5}
    assert [token.alternatives[0] for token in tokens] == [(token.text, token.logprob) for token in tokens]


def test_the_draft_is_what_is_generated_when_nothing_is_given():
    typist = Typist()
    session = Session(typist)
    session.draft = "Once"
    session.generate()
    assert (typist.asked[0][0], session.draft) == ("Once", "Once")


def test_a_second_prompt_takes_the_place_of_the_first_and_the_history_has_both():
    session = Session(Typist())
    first, second = session.generate("a"), session.generate("b")
    assert (session.turns, session.history) == ([second], [first, second])


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_chooses_its_mode_and_fills_the_text_field(title):
    session = Session(Typist())
    session.example(title)
    assert (session.mode, session.draft) == EXAMPLES[title]


# Chat


def test_a_message_is_answered_as_chat_answers_it(instruct):
    session = Session(instruct)
    session.switch("chat")
    session.set(seed=1)
    session.generate(QUESTION)
    second = session.generate("Where do they live?").answers[0]
    assert second.text == instruct.chat(second.prompt, top_k=10, seed=1).text
    assert [message["content"] for message in second.prompt] == [
        QUESTION,
        text_of(session.turns[0])[0],
        session.turns[1].user,
    ]


def test_a_system_message_comes_first():
    typist = Typist()
    session = chatting(typist)
    session.system = "Be brief."
    session.generate("Hello")
    assert [message["role"] for message in typist.asked[0][0]] == ["system", "user"]


def test_an_opened_conversation_goes_on_under_its_own_system_message_until_undo(tmp_path):
    typist = Typist()
    session = chatting(typist)
    session.system = "Be brief."
    session.generate("Hello")
    opened = chatting(typist)
    opened.generate("Hi")
    opened.system = "Be long."
    opened.load(session.save(tmp_path / "playground.json"))
    opened.generate("And?")
    assert [message["role"] for message in typist.asked[-1][0]] == ["system", "user", "assistant", "user"]
    opened.open(opened.history[0].id)
    assert opened.system == ""
    for expected in ("Be brief.", "Be brief.", "Be long."):
        opened.undo()
        assert opened.system == expected


def test_undo_of_an_answer_keeps_the_system_message_that_was_typed_after_it():
    session = chatting(Typist())
    session.generate("Hello")
    session.system = "Be brief."
    session.undo()
    assert session.system == "Be brief."


def test_a_turn_that_failed_is_no_part_of_what_follows():
    typist = Typist(before=failing(0))
    session = chatting(typist)
    session.generate("lost")
    typist.before = lambda number: None
    session.generate("found")
    assert [message["content"] for message in typist.asked[1][0]] == ["found"]


def test_an_edited_turn_drops_those_after_it():
    session = chatting(Typist())
    for text in ("a", "b", "c"):
        session.generate(text)
    session.edit(1, "B")
    assert [turn.user for turn in session.turns] == ["a", "B"]


def test_a_turn_that_is_not_there_is_refused_with_how_they_are_counted():
    session = chatting(Typist())
    session.generate("a")
    with pytest.raises(ValueError, match="there is no turn 5: the conversation has 1, counted from 0"):
        session.edit(5, "x")


def test_regenerate_answers_the_last_turn_in_its_place():
    typist = Typist()
    session = chatting(typist)
    session.generate("a")
    session.generate("b")
    session.regenerate()
    assert [turn.user for turn in session.turns] == ["a", "b"]
    assert typist.asked[1][0] == typist.asked[2][0]


@pytest.mark.parametrize(
    "step",
    [
        lambda session: session.generate("new"),
        lambda session: session.regenerate(),
        lambda session: session.edit(0, "other"),
        lambda session: session.clear(),
        lambda session: session.switch("prompt"),
        lambda session: session.open(session.history[0].id),
    ],
    ids=["generate", "regenerate", "edit", "clear", "switch", "open"],
)
def test_undo_takes_a_step_back(step):
    session = chatting(Typist())
    session.generate("a")
    session.generate("b")
    before = (session.mode, list(session.turns))
    step(session)
    assert (session.mode, session.turns) != before
    session.undo()
    assert (session.mode, session.turns) == before


def test_undo_gives_back_what_was_typed():
    session = chatting(Typist())
    session.generate("a long question")
    session.undo()
    assert (session.turns, session.draft) == ([], "a long question")


@pytest.mark.parametrize("mode", ["prompt", "chat"])
@pytest.mark.parametrize(
    "step",
    [
        lambda session: session.regenerate(),
        lambda session: session.edit(0, "other"),
        lambda session: session.generate("other"),
        lambda session: session.clear(),
        lambda session: session.switch("chat" if session.mode == "prompt" else "prompt"),
    ],
    ids=["regenerate", "edit", "generate", "clear", "switch"],
)
def test_what_is_typed_outlasts_a_step_that_does_not_send_it_and_its_undo(mode, step):
    session = Session(Typist())
    session.switch(mode)
    session.generate("a")
    session.draft = "a long"
    step(session)
    assert session.draft == "a long"
    session.draft = "a long question"
    session.undo()
    assert ([turn.user for turn in session.turns], session.draft) == (["a"], "a long question")


@pytest.mark.parametrize("title", ["Counting", "A question"], ids=["this mode", "the other mode"])
def test_undo_gives_back_what_an_example_took_the_place_of(title):
    session = Session(Typist())
    session.draft = "a long prompt"
    session.example(title)
    session.undo()
    assert (session.mode, session.draft) == ("prompt", "a long prompt")


def test_going_through_the_examples_leaves_nothing_to_undo():
    session = Session(Typist())
    for title in EXAMPLES:
        session.example(title)
    assert not session.can_undo


@pytest.mark.parametrize("mode", ["prompt", "chat"])
def test_what_was_typed_since_a_step_outlasts_its_undo(mode):
    session = Session(Typist())
    session.switch(mode)
    session.generate("a")
    session.draft = "a long question"
    session.undo()
    assert (session.turns, session.draft) == ([], "a long question")


def test_nothing_done_is_nothing_to_undo():
    with pytest.raises(ValueError, match="nothing to undo"):
        Session(Typist()).undo()


# Settings


def test_the_seed_that_was_drawn_gives_the_same_text_again(instruct):
    session = Session(instruct)
    session.set(**QUICK)
    first = session.generate("Counting: 7, 8,")
    session.set(seed=first.answers[0].seed)
    assert text_of(session.regenerate()) == text_of(first)


def test_without_a_seed_another_is_drawn_each_time():
    session = Session(Typist())
    assert session.generate("a").answers[0].seed != session.regenerate().answers[0].seed


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_known_by_its_settings(name):
    session = Session(Typist())
    session.set(temperature=0.77)
    assert session.chosen_preset is None
    session.preset(name)
    assert session.chosen_preset == name


@pytest.mark.parametrize("on", ["off", 2, None])
def test_guardrails_are_turned_on_or_off_by_a_switch_only(on):
    session = Session(Typist("a"))
    with pytest.raises(ValueError, match=f"on must be True or False; got {on!r}"):
        session.guard(on)
    assert not session.guarded


def test_guardrails_that_are_turned_off_and_on_are_those_that_were_given():
    given = fk.guardrails(blocked_words=["zebra"])
    session = Session(Typist("a"), guardrails=given)
    session.guard(False)
    session.guard(True)
    assert session.guardrails is given


def test_a_setting_out_of_range_is_refused_and_nothing_changes():
    session = Session(Typist())
    before = session.settings
    with pytest.raises(ValueError, match="top_p must be above 0 and at most 1, got 7"):
        session.set(top_p=7)
    assert session.settings == before


@pytest.mark.parametrize(
    ("compare", "expected"),
    [
        ({"do_sample": False}, {"max_new_tokens": 12, "do_sample": False}),
        ({"max_length": 20}, {"max_length": 20, "temperature": 1.0, "top_k": 10}),
        ({"temperature": 0, "stop": "."}, {"max_new_tokens": 12, "temperature": 0, "top_k": 10, "stop": ["."]}),
    ],
)
def test_what_is_compared_takes_the_place_of_what_it_excludes(instruct, compare, expected):
    session = Session(instruct, compare)
    session.set(seed=2, **QUICK)
    answer = session.generate("Counting: 7, 8,").answers[1]
    assert answer.settings == {**expected, "seed": 2, "alternatives": 5}
    assert answer.text == instruct.generate("Counting: 7, 8,", seed=2, **expected).text


def test_a_setting_that_excludes_what_is_compared_is_refused_and_nothing_changes():
    session = Session(Typist(), {"temperature": 0.5})
    before = session.settings
    with pytest.raises(ValueError, match="have no effect with do_sample=False"):
        session.set(do_sample=False, temperature=None, top_k=None)
    with pytest.raises(ValueError, match="so num_return_sequences is 1, not 2"):
        session.set(num_return_sequences=2)
    assert session.settings == before


def test_an_endpoint_is_asked_for_no_alternatives_and_gets_no_setting_that_says_nothing():
    typist = Typist()
    session = Session(typist)
    session.set(seed=5)
    session.generate("a")
    assert typist.asked[0][1] == {"max_new_tokens": 200, "temperature": 1.0, "top_k": 10, "seed": 5}


@pytest.mark.parametrize("accepts", [True, False])
def test_an_endpoint_is_asked_for_alternatives_where_it_accepts_them(accepts):
    class Endpoint(Typist):
        def accepts(self, **settings):
            return accepts

    endpoint = Endpoint()
    Session(endpoint).generate("a")
    assert ("alternatives" in endpoint.asked[0][1]) == accepts


# Refusals


@pytest.mark.parametrize(
    "compare", ["falconet", 7, {"temperature": -1}, {"no_such_setting": 1}, {"num_return_sequences": 2}]
)
def test_what_cannot_be_compared_is_refused(compare):
    with pytest.raises(
        (ValueError, TypeError), match=r"compare takes another model|temperature|no_such_setting|num_return"
    ):
        Session(Typist(), compare)


def test_a_setting_that_does_not_exist_is_named_with_the_nearest():
    message = re.escape("Unknown setting 'tempature'. Nearest: temperature.")
    with pytest.raises(TypeError, match=message):
        Session(Typist(), {"tempature": 1})
    with pytest.raises(TypeError, match=message):
        Session(Typist()).set(tempature=1)


def test_a_name_of_another_library_is_answered_with_the_one_here():
    with pytest.raises(TypeError, match=r"Unknown setting 'stop_words'\. It is called stop here\."):
        Session(Typist()).set(stop_words=".")


def test_a_name_is_not_a_model():
    with pytest.raises(ValueError, match=r"needs what fk.load or fk.connect returns, got 'falconet'"):
        fk.playground("falconet")


# The meter


def test_the_meter_counts_what_was_read_and_written(instruct):
    session = Session(instruct)
    session.set(**QUICK)
    turn = session.generate("Counting: 7, 8,")
    used, measured = session.meter(), turn.answers[0]
    assert used.used == measured.prompt_tokens + measured.new_tokens
    assert str(used).startswith(f"{used.used} of 2048 tokens, KV cache ")
    per_token = instruct.spec.kv_bytes_per_token(instruct.model.dtype.itemsize)
    assert used.cache_bytes == measured.cache_bytes + per_token  # the last token has been written, but not read


def test_the_meter_counts_what_the_next_answer_would_read(instruct):
    session = Session(instruct)
    session.draft = "Counting: 7, 8,"
    assert session.meter().used == len(instruct.tokenizer(session.draft)["input_ids"])
    assert session.meter().context == 2048


def test_the_meter_has_the_context_of_the_live_config(instruct, monkeypatch):
    monkeypatch.setattr(instruct.model.config, "max_position_embeddings", 4096)
    assert Session(instruct).meter().context == 4096


@pytest.mark.parametrize("template", ["{{ raise_exception('no system role') }}", "{{ messages[0].content + 1 }}"])
def test_a_conversation_that_the_template_refuses_is_not_counted_and_its_answer_says_why(instruct, template):
    session = chatting(replace(instruct, loaded_format=fk.ChatFormat("strict", template=template)))
    session.draft = "Hello"
    assert (session.meter().used, str(session.meter())) == (None, "tokens not counted here")
    answer = session.generate().answers[0]
    assert (answer.ending, session.meter().used) == ("error", None)
    assert "no system role" in answer.reason or "TypeError" in answer.reason


def test_the_meter_of_an_endpoint_says_what_it_was_told():
    session = Session(Typist())
    assert session.meter().used is None
    session.generate("go")
    assert (session.meter().used, session.meter().context) == (6, None)


# The checkpoint's own settings


@pytest.fixture
def cautious(instruct, monkeypatch):
    """A model whose generation_config.json names settings."""
    config = GenerationConfig(top_p=0.01, temperature=0.5, max_new_tokens=7, eos_token_id=11)
    monkeypatch.setattr(instruct.model, "generation_config", config)
    return instruct


def test_the_settings_of_a_checkpoint_are_shown_and_in_force(cautious):
    session = Session(cautious)
    assert (session.settings.top_p, session.settings.temperature, session.settings.max_new_tokens) == (0.01, 0.5, 7)
    answer = session.generate(QUESTION).answers[0]
    assert {"top_p": 0.01, "temperature": 0.5, "max_new_tokens": 7}.items() <= answer.settings.items()
    assert answer.text == cautious.generate(QUESTION, top_k=10, do_sample=True, seed=answer.seed).text


@pytest.mark.parametrize("settings", [{"temperature": 0.0, "top_k": 50}, {"top_k": 0}])
def test_a_setting_of_a_checkpoint_that_is_0_is_no_setting_that_is_missing(instruct, monkeypatch, settings):
    monkeypatch.setattr(instruct.model, "generation_config", GenerationConfig(do_sample=True, **settings))
    session = Session(instruct)
    session.set(**QUICK)
    answer = session.generate(fk.CARD.prompt).answers[0]
    assert answer.text == instruct.generate(fk.CARD.prompt, seed=answer.seed, **QUICK).text
    assert {**asdict(session.settings), **settings} == asdict(session.settings)


def test_what_is_switched_off_in_the_panel_is_off_whatever_the_checkpoint_has(cautious):
    session = Session(cautious)
    session.set(top_p=None, top_k=None, temperature=1.5)
    answer = session.generate(QUESTION).answers[0]
    assert answer.settings["top_p"] == 1.0
    expected = cautious.generate(QUESTION, top_p=1.0, temperature=1.5, max_new_tokens=7, seed=answer.seed)
    assert answer.text == expected.text
