"""The playground without a browser: its session as plain Python, its widget by the messages it sends and takes."""

import ast
import json
import os
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import falcon_kit as fk
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.generation.text import Piece
from falcon_kit.playground import files
from falcon_kit.playground.export import code
from falcon_kit.playground.lanes import load_source
from falcon_kit.playground.records import ENDINGS, Answer, Span, Token, Turn
from falcon_kit.playground.state import EXAMPLES, PRESETS, Session
from falcon_kit.playground.widget import Playground

QUESTION = "What do giraffes eat?"
QUICK = {"max_new_tokens": 12}


class Typist:
    """An endpoint that says fixed words, and remembers what it was asked."""

    def __init__(self, *words, name="typist", before=lambda number: None):
        self.words, self.model, self.before = words or ("One", " two", " three."), name, before
        self.asked, self.closed = [], threading.Event()

    def stream(self, prompt, **settings):
        self.asked.append((prompt, settings))
        return Typing(self)


class Typing:
    """A stream of a Typist: `before` is called before each word, and may wait or raise."""

    def __init__(self, typist):
        self.typist, self.said = typist, []

    def __iter__(self):
        for number, word in enumerate(self.typist.words):
            self.typist.before(number)
            self.said.append(word)
            yield Piece(word, None, float("nan"))
        self.typist.before(len(self.typist.words))

    def close(self):
        self.typist.closed.set()

    @property
    def generation(self):
        stats = SimpleNamespace(prompt_tokens=3, new_tokens=len(self.said), first_token_seconds=0.1, seconds=0.2)
        finished = len(self.said) == len(self.typist.words)
        return SimpleNamespace(text="".join(self.said), finish_reason="eos" if finished else "cancelled", stats=stats)


class Gate:
    """Lets a Typist say some words and holds it there until it is opened."""

    def __init__(self, words):
        self.words, self.reached, self.opened = words, threading.Event(), threading.Event()

    def __call__(self, number):
        if number == self.words:
            self.reached.set()
            assert self.opened.wait(10)


def failing(after):
    def before(number):
        if number == after:
            raise ConnectionError("the endpoint broke off")

    return before


def in_background(work, *arguments):
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread


def text_of(turn):
    return [answer.text for answer in turn.answers]


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


def chatting(typist, **options):
    session = Session(typist, **options)
    session.switch("chat")
    return session


def test_a_system_message_comes_first():
    typist = Typist()
    session = chatting(typist)
    session.system = "Be brief."
    session.generate("Hello")
    assert [message["role"] for message in typist.asked[0][0]] == ["system", "user"]


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


def test_a_setting_out_of_range_is_refused_and_nothing_changes():
    session = Session(Typist())
    before = session.settings
    with pytest.raises(ValueError, match="top_p must be above 0 and at most 1, got 7"):
        session.set(top_p=7)
    assert session.settings == before


def test_an_endpoint_is_asked_for_no_alternatives_and_gets_no_setting_that_says_nothing():
    typist = Typist()
    session = Session(typist)
    session.set(seed=5)
    session.generate("a")
    assert typist.asked[0][1] == {"max_new_tokens": 200, "temperature": 1.0, "top_k": 10, "seed": 5}


# Beside each other


def test_two_models_write_at_the_same_time():
    both = threading.Barrier(2, timeout=10)  # breaks unless both are in the middle of their text together
    first, second = (Typist(name=name, before=lambda number: number != 1 or both.wait()) for name in "ab")
    turn = Session(first, second).generate("go")
    assert [answer.ending for answer in turn.answers] == ["eos", "eos"]


def test_two_settings_are_two_answers_under_names_of_their_own(instruct):
    session = Session(instruct, {"temperature": 0})
    session.set(seed=2, **QUICK)
    turn = session.generate(fk.CARD.prompt)
    expected = [
        instruct.generate(fk.CARD.prompt, seed=2, top_k=10, **QUICK),
        instruct.generate(fk.CARD.prompt, **QUICK),
    ]
    assert text_of(turn) == [each.text for each in expected]
    assert [answer.model for answer in turn.answers] == ["falconet-instruct", "falconet-instruct, temperature=0"]


def test_each_model_reads_its_own_side_of_the_conversation():
    first, second = Typist("left"), Typist("right", name="other")
    session = chatting(first, compare=second)
    session.generate("a")
    session.generate("b")
    assert [typist.asked[1][0][1]["content"] for typist in (first, second)] == ["left", "right"]


def test_two_models_of_one_name_are_told_apart():
    assert [lane.name for lane in Session(Typist(), Typist()).lanes] == ["typist (A)", "typist (B)"]


def test_one_model_that_fails_leaves_the_other():
    turn = Session(Typist(before=failing(1)), Typist()).generate("go")
    assert [(answer.text, answer.ending) for answer in turn.answers] == [("One", "error"), ("One two three.", "eos")]


def test_a_compiled_model_writes_one_text_at_a_time():
    working, most = set(), []
    ids = count()

    class Compiled(Typist):
        decoding = {"cache_implementation": "static"}  # noqa: RUF012  # as on a Falcon

        def stream(self, prompt, **settings):
            working.add(next(ids))
            most.append(len(working))
            time.sleep(0.05)
            return super().stream(prompt, **settings)

    compiled = Compiled(before=lambda number: number != 3 or working.pop())
    Session(compiled, {"temperature": 0}).generate("go")
    assert most == [1, 1]


@pytest.mark.parametrize("compare", ["falconet", 7, {"temperature": -1}, {"no_such_setting": 1}])
def test_what_cannot_be_compared_is_refused(compare):
    with pytest.raises((ValueError, TypeError), match=r"compare takes another model|temperature|no_such_setting"):
        Session(Typist(), compare)


def test_a_setting_that_does_not_exist_is_named_with_the_nearest():
    message = re.escape("Unknown setting 'tempature'. Nearest: temperature.")
    with pytest.raises(TypeError, match=message):
        Session(Typist(), {"tempature": 1})
    with pytest.raises(TypeError, match=message):
        Session(Typist()).set(tempature=1)


def test_a_name_is_not_a_model():
    with pytest.raises(ValueError, match=r"needs what fk.load or fk.connect returns, got 'falconet'"):
        fk.playground("falconet")


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
        with pytest.raises(RuntimeError, match="an answer is being written: stop it first"):
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


# What goes wrong


def test_an_answer_that_breaks_off_is_kept_and_marked():
    answer = Session(Typist(before=failing(2))).generate("go").answers[0]
    assert (answer.text, answer.ending) == ("One two", "error")
    assert answer.reason == "ConnectionError: the endpoint broke off"


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
    assert typist.asked[0][0] == "a?"


# Guardrails


def forbids(word):
    return lambda text: f"it says {word}" if word in text else None


def test_a_refused_prompt_never_reaches_the_model():
    typist = Typist()
    session = Session(typist, guardrails=forbids("secret"))
    with pytest.raises(ValueError, match="the guardrails refuse this text: it says secret"):
        session.generate("the secret")
    assert (typist.asked, session.history, session.running) == ([], [], None)


def test_a_refused_sentence_is_not_shown_and_the_model_is_told_to_stop():
    typist = Typist("All", " good.", " The", " secret", " is.", " And", " on")
    answer = Session(typist, guardrails=forbids("secret")).generate("go").answers[0]
    assert (answer.text, answer.ending, answer.reason) == ("All good.", "refused", "it says secret")
    assert typist.closed.wait(5)


def test_guardrails_that_fail_show_nothing_they_have_not_seen():
    def broken(text):
        if text != "go":
            raise KeyError("broken")

    answer = Session(Typist(), guardrails=broken).generate("go").answers[0]
    assert (answer.text, answer.ending, answer.reason) == ("", "error", "KeyError: 'broken'")


@given(st.lists(st.text(alphabet="ax. \n", min_size=1, max_size=4), min_size=1, max_size=12))
def test_whatever_is_shown_at_any_time_has_passed_the_guardrails(words):
    guard = forbids("x")
    session = Session(Typist(*words), guardrails=guard)
    shown = []
    session.listeners.append(lambda event: shown.append(text_of(session.turns[0])[0]))
    final = session.generate("go").answers[0]
    assert [text for text in shown if guard(text)] == []
    assert (final.text == "".join(words)) == ("x" not in "".join(words))


# Files

texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)
odds = st.floats(-50, 0)
tokens = st.builds(Token, texts, st.none() | odds, st.lists(st.tuples(texts, odds), max_size=3).map(tuple))
spans = st.builds(Span, texts, st.lists(tokens, max_size=3).map(tuple))
messages = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}))
answers = st.builds(
    Answer,
    model=texts,
    source=st.builds(lambda name: f"fk.load({name!r}, dtype='nf4')", texts),
    prompt=texts | messages,
    settings=st.fixed_dictionaries(
        {"seed": st.integers(0, 2**63 - 1), "stop": st.lists(texts.filter(bool), max_size=2)}
    ),
    spans=st.lists(spans, max_size=4),
    ending=st.sampled_from(ENDINGS),
    reason=texts,
    prompt_tokens=st.none() | st.integers(0, 10**6),
    new_tokens=st.integers(0, 10**6),
    first_token_seconds=st.none() | st.floats(0, 1e6),
    seconds=st.floats(0, 1e6),
    cache_bytes=st.none() | st.integers(0, 2**50),
)
turns = st.builds(
    Turn, texts, st.sampled_from(["prompt", "chat"]), texts, st.lists(answers, min_size=1, max_size=2).map(tuple),
    st.lists(texts, max_size=2).map(tuple),
)  # fmt: skip


@given(st.lists(turns, max_size=3))
def test_a_saved_history_loads_as_it_was(tmp_path_factory, saved):
    file = files.save(saved, tmp_path_factory.mktemp("saved") / "playground.json")
    assert files.load(file) == saved


@pytest.fixture
def saved(tmp_path):
    """A session of three turns of chat, and the file it was saved to."""
    session = chatting(Typist())
    for text in ("a", "b", "c"):
        session.generate(text)
    return session, session.save(tmp_path / "playground.json")


def test_a_loaded_session_shows_the_last_conversation_and_goes_on_from_it(saved):
    session, file = saved
    typist = Typist()
    opened = Session(typist)
    assert opened.load(file) == 3
    assert (opened.mode, opened.turns) == ("chat", session.turns)
    opened.generate("d")
    assert [message["content"] for message in typist.asked[0][0]][::2] == ["a", "b", "c", "d"]


def test_a_file_that_is_loaded_twice_adds_nothing(saved):
    session, file = saved
    assert session.load(file) == 0
    assert len(session.history) == 3


def leaves(value, path=()):
    """Every place in nested lists and dictionaries."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from leaves(child, (*path, key))


@given(st.data())
def test_a_damaged_file_is_refused_in_words_or_is_none(tmp_path_factory, data):
    content = json.loads(json.dumps({"format": "falcon-kit playground", "version": 1, "turns": []}))
    content["turns"] = [json.loads(json.dumps(files.pack_turn(data.draw(turns))))]
    place = data.draw(st.sampled_from([path for path in leaves(content) if path]))
    target = content
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = data.draw(
        st.none() | st.booleans() | st.floats() | st.text() | st.lists(st.none()) | st.just({})
    )
    file = tmp_path_factory.mktemp("damaged") / "playground.json"
    file.write_text(json.dumps(content))
    try:
        loaded = files.load(file)
    except ValueError as error:
        assert str(file) in str(error)  # noqa: PT017  # either outcome is right
    else:
        files.save(loaded, file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is not JSON"),
        ("[1]", 'it does not say "format": "falcon-kit playground"'),
        ('{"format": "falcon-kit playground", "version": 2, "turns": []}', '"version": 1'),
        ('{"format": "falcon-kit playground", "version": 1}', "turns is not a list"),
        (
            '{"format": "falcon-kit playground", "version": 1, "turns": [{"id": "x"}]}',
            "turn 1: answers is None, not a list",
        ),
        ('{"format": "falcon-kit playground", "version": 1, "turns": ["\\ud800"]}', "half a character"),
        ("[" * 100_000, "it is not JSON"),
    ],
)
def test_a_file_of_something_else_is_refused_and_nothing_is_added(tmp_path, content, message):
    file = tmp_path / "other.json"
    file.write_text(content)
    session = Session(Typist())
    with pytest.raises(ValueError, match=message):
        session.load(file)
    assert session.history == []


@pytest.mark.parametrize(
    "source",
    [
        "__import__('os').system('id')",
        "fk.load(__import__('os').getcwd())",
        "fk.load('falconet').model",
        "fk.load('falconet', **{'dtype': print()})",
        "fk.connect(f'{print()}')",
        "fk.load('a')\nprint()",
        "fk.load(" * 10_000,
    ],
)
def test_code_in_a_file_that_does_more_than_make_a_model_is_refused(saved, source):
    _, file = saved
    content = json.loads(file.read_text())
    content["turns"][1]["answers"][0]["source"] = source
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"turn 2, answers 1: source is .*, not fk.load or fk.connect with plain"):
        files.load(file)


def test_a_save_that_is_cut_short_leaves_the_file_of_before(saved, monkeypatch):
    session, file = saved
    before = file.read_text()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        session.save(file)
    assert file.read_text() == before


# Copy as code


@pytest.mark.parametrize("mode", ["prompt", "chat"])
def test_the_copied_code_writes_the_same_text(instruct, capsys, monkeypatch, mode):
    monkeypatch.setattr(fk, "load", lambda name, **_: instruct if name == "falconet-instruct" else None)
    session = Session(instruct)
    session.switch(mode)
    session.set(stop=["."], **QUICK)
    turn = session.generate(QUESTION)
    exec(session.code(), {})  # noqa: S102  # what a person does with it
    assert capsys.readouterr().out == text_of(turn)[0] + "\n"


def test_the_code_of_a_model_with_an_adapter_loads_the_adapter(tmp_path):
    """Even one whose folder is called as a published model."""
    adapter = shutil.copytree(embedded_directory("falconet-instruct"), tmp_path / "falcon-7b")
    assert load_source(fk.load(adapter)).startswith(f"fk.load('{adapter}', ")
    assert load_source(fk.load("falconet-instruct")).startswith("fk.load('falconet-instruct', ")


def test_the_code_of_a_model_in_other_processes_loads_it_by_name(instruct):
    assert load_source(parallel(instruct)).startswith("fk.load('falconet-instruct', ")
    spec = replace(instruct.spec, name="mine", source="/models/mine/config.json")
    assert load_source(parallel(replace(instruct, spec=spec), "/models/mine")).startswith("fk.load('/models/mine', ")


INSTRUCT = str(embedded_directory("falconet-instruct"))


def parallel(falcon, directory=INSTRUCT):
    return fk.ParallelFalcon(
        None, directory, falcon.tokenizer, falcon.spec, falcon.plan, falcon.chat_format, "by default"
    )


@given(turns)
def test_copied_code_is_python_that_holds_the_prompt_word_for_word(turn):
    made = replace(turn, answers=tuple(replace(answer, source="fk.load('falconet')") for answer in turn.answers))
    calls = [node.value for node in ast.parse(code(made)).body if ast.unparse(node).startswith("answer = ")]
    assert [ast.literal_eval(call.args[0]) for call in calls] == [answer.prompt for answer in made.answers]


def test_the_code_of_an_endpoint_connects_to_it():
    typist = Typist()
    typist.address = "http://127.0.0.1:8000/v1"
    session = Session(typist)
    session.generate("go")
    assert "falcon = fk.connect('http://127.0.0.1:8000/v1', model='typist')\n" in session.code()


# The meter


def test_the_meter_counts_what_was_read_and_written(instruct):
    session = Session(instruct)
    session.set(**QUICK)
    turn = session.generate("Counting: 7, 8,")
    used, measured = session.meter(), turn.answers[0]
    assert used.used == measured.prompt_tokens + measured.new_tokens
    per_token = instruct.spec.kv_bytes_per_token(instruct.model.dtype.itemsize)
    assert used.cache_bytes == measured.cache_bytes + per_token  # the last token has been written, but not read


def test_the_meter_counts_what_the_next_answer_would_read(instruct):
    session = Session(instruct)
    session.draft = "Counting: 7, 8,"
    assert session.meter().used == len(instruct.tokenizer(session.draft)["input_ids"])
    assert session.meter().context == 2048


def test_the_meter_of_an_endpoint_says_what_it_was_told():
    session = Session(Typist())
    assert session.meter().used is None
    session.generate("go")
    assert (session.meter().used, session.meter().context) == (6, None)


# The widget


class Page:
    """A browser's page: does with messages what the view does with them, and nothing else."""

    def __init__(self, widget):
        self.widget, self.messages = widget, []
        self.texts, self.state, self.shown_code = {}, {}, None
        widget.send = self.take

    def take(self, message):
        json.dumps(message, allow_nan=False)  # as a kernel would
        self.messages.append(message)
        if message["type"] == "turn":
            turn = message["turn"]
            self.texts[turn["id"]] = [[span[0] for span in answer["spans"]] for answer in turn["answers"]]
        elif message["type"] == "delta":
            for known, answer in zip(self.texts[message["id"]], message["answers"], strict=True):
                assert answer["at"] <= len(known)
                known.extend(span[0] for span in answer["spans"][len(known) - answer["at"] :])
        elif message["type"] == "state":
            self.state = message
        elif message["type"] == "code":
            self.shown_code = message["code"]

    def start(self, command, **values):
        """Sends a command."""
        self.widget._received(self.widget, {"do": command, **values}, [])

    def do(self, command, **values):
        """Sends a command and waits until what it started has ended."""
        self.start(command, **values)
        self.wait()

    def wait(self):
        for thread in threading.enumerate():
            if thread.name == "falcon-playground":
                thread.join(10)

    @property
    def conversation(self):
        return ["".join(spans) for id in self.state["turns"] for spans in self.texts[id]]


def paged(*arguments, **options):
    page = Page(Playground(Session(*arguments, **options)))
    page.do("hello")
    return page


def test_what_the_page_shows_is_what_the_session_holds():
    page = paged(Typist(), Typist("Other"))
    page.do("mode", mode="chat")
    page.do("generate", text="a")
    page.do("generate", text="b")
    assert page.conversation == ["One two three.", "Other"] * 2
    assert page.state["running"] is None


def test_a_setting_that_is_refused_is_still_said_to_be_while_the_next_text_is_written():
    """Ctrl+Enter in its field sends both."""
    page = paged(Typist())
    page.do("set", changes={"top_p": 7})
    page.do("generate", text="go")
    assert page.state["notice"] == {"text": "top_p must be above 0 and at most 1, got 7", "kind": "error"}
    page.do("generate", text="go on")
    assert page.state["notice"]["text"] == ""


def test_what_is_done_in_python_appears_on_the_page():
    page = paged(Typist())
    page.widget.session.generate("go")
    page.widget.session.set(temperature=0.5)
    assert page.conversation == ["One two three."]
    assert page.state["settings"]["temperature"] == 0.5


def test_a_page_that_is_opened_in_the_middle_gets_what_there_is_and_then_the_rest():
    gate = Gate(words=2)
    first = paged(Typist(before=gate))
    first.start("generate", text="go")
    assert gate.reached.wait(10)
    deadline = time.monotonic() + 10  # the words are on their way from the thread that writes them
    while first.conversation != ["One two"] and time.monotonic() < deadline:
        time.sleep(0.05)
    second = Page(first.widget)
    second.start("hello")
    assert second.state["running"] is not None
    assert second.conversation == ["One two"]
    gate.opened.set()
    second.wait()
    assert second.conversation == ["One two three."]


def test_words_are_sent_ten_times_a_second_at_most():
    words = [f" {number}" for number in range(200)]
    page = paged(Typist(*words, before=lambda number: time.sleep(0.002)))
    start = time.monotonic()
    page.do("generate", text="go")
    took = time.monotonic() - start
    updates = [message for message in page.messages if message["type"] == "delta"]
    assert len(updates) <= took / 0.1 + 3  # the first at once, and the last two at the end
    assert page.conversation == ["".join(words)]


def test_an_update_holds_only_what_is_new():
    page = paged(Typist(*["word "] * 50, before=lambda number: time.sleep(0.01)))
    page.do("generate", text="go")
    sent = [span for message in page.messages if message["type"] == "delta" for span in message["answers"][0]["spans"]]
    assert len(sent) == 50


@pytest.mark.parametrize(
    ("command", "values", "notice"),
    [
        ("generate", {"text": ""}, "the text is empty"),
        ("set", {"changes": {"top_p": 7}}, "top_p must be above 0"),
        ("set", {"changes": {"nothing": 7}}, "TypeError"),
        ("load", {"path": "no such file.json"}, "No such file"),
        ("undo", {}, "nothing to undo"),
        ("open", {"id": "nobody"}, "the history has no turn"),
        ("no such command", {}, "there is no command"),
        ("generate", {}, "TypeError"),
    ],
)
def test_an_error_is_shown_on_the_page_and_the_next_step_works(command, values, notice):
    page = paged(Typist())
    page.do(command, **values)
    assert notice in page.state["notice"]["text"]
    assert page.state["notice"]["kind"] == "error"
    page.do("generate", text="go")
    assert page.conversation == ["One two three."]
    page.do("generate", text="go")
    assert page.state["notice"]["text"] == ""


def test_generate_pressed_twice_is_said_on_the_page():
    gate = Gate(words=1)
    page = paged(Typist(before=gate))
    page.start("generate", text="go")
    assert gate.reached.wait(10)
    again = threading.Thread(target=page.widget._try, args=("generate", {"text": "go"}))
    again.start()
    again.join(5)
    assert "an answer is being written" in page.state["notice"]["text"]
    gate.opened.set()
    page.wait()
    assert page.conversation == ["One two three."]


def test_every_command_of_the_page_does_what_it_says(tmp_path):
    page = paged(Typist())
    session = page.widget.session
    page.do("example", title="A question")
    assert page.state["draft"] == QUESTION
    page.do("system", text="Be brief.")
    page.do("preset", name="greedy")
    page.do("odds", shown=True)
    page.do("generate", text=session.draft)
    page.do("edit", id=session.turns[0].id, text="And lions?")
    page.do("regenerate")
    page.do("seed", id=session.turns[0].id)
    assert page.state["settings"]["seed"] == session.turns[0].answers[0].seed
    page.do("code", id=session.turns[0].id)
    assert ("And lions?" in page.shown_code, "Be brief." in page.shown_code) == (True, True)
    page.do("save", path=str(tmp_path / "playground.json"))
    assert page.state["notice"]["text"] == f"Saved 3 turns to {tmp_path / 'playground.json'}"
    page.do("clear")
    assert page.conversation == []
    page.do("load", path=str(tmp_path / "playground.json"))
    assert (page.conversation, page.state["preset"], page.state["odds"]) == (["One two three."], "greedy", True)


def test_half_a_character_from_a_browser_does_no_harm():
    page = paged(Typist())
    page.do("draft", text="a\ud83e")
    page.do("generate", text="a\ud83e")
    assert page.conversation == ["One two three."]


def test_a_reader_without_a_kernel_sees_the_text_and_no_markup_of_it():
    page = paged(Typist("<img src=x onerror=alert(1)>", "</pre><script>"))
    page.do("generate", text="<b>go</b>")
    shown = page.widget._repr_mimebundle_()[0]["text/html"]
    assert "&lt;img src=x" in shown
    assert "&lt;b&gt;go" in shown
    assert not any(mark in shown for mark in ("<img", "<script", "<b>go"))


def test_a_closed_widget_has_stopped_its_model():
    gate = Gate(words=1)
    page = paged(Typist(before=gate))
    page.start("generate", text="go")
    assert gate.reached.wait(10)
    page.widget.close()
    page.wait()
    assert page.widget.session.turns[0].answers[0].ending == "cancelled"
    gate.opened.set()


def test_a_widget_that_is_closed_while_it_writes_leaves_no_thread():
    gate = Gate(words=1)
    page = paged(Typist(before=gate))
    page.start("generate", text="go")
    assert gate.reached.wait(10)
    painter = page.widget._painter
    page.widget.close()
    page.wait()
    gate.opened.set()
    painter.join(5)
    assert not painter.is_alive()
