"""The history as a JSON file, and an answer as code."""

import ast
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import falcon_kit as fk
from falcon_kit.generation.chat import FORMATS
from falcon_kit.playground import files
from falcon_kit.playground.columns import connect_source, load_source
from falcon_kit.playground.records import Answer, Ending, Span, Token, Turn
from falcon_kit.playground.state import Session
from falcon_kit.serving.endpoint import Api
from falcon_kit.serving.engines import ENGINES
from tests.playground.typist import Typist, chatting, text_of

QUESTION = "What do giraffes eat?"
QUICK = {"max_new_tokens": 12}


# Files


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)


logprobs = st.floats(-50, 0)


tokens = st.builds(Token, texts, st.none() | logprobs, st.lists(st.tuples(texts, logprobs), max_size=3).map(tuple))


spans = st.builds(Span, texts, st.lists(tokens, max_size=3).map(tuple))


messages = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}))


formats = st.sampled_from(FORMATS) | st.builds(
    fk.ChatFormat, texts, texts, texts, st.lists(texts, max_size=2), template=texts, system=st.none() | texts
)


models = st.builds(
    SimpleNamespace,
    name=texts,
    dtype_reason=st.sampled_from(["as asked", "by default"]),
    plan=st.builds(SimpleNamespace, dtype=texts),
    chat_format=formats,
)


endpoints = st.builds(
    SimpleNamespace,
    model=texts,
    addresses=st.lists(texts, min_size=1, max_size=3),
    api=st.sampled_from(get_args(Api)),
    own_format=st.booleans(),
    chat_format=formats,
)


served = st.builds(
    SimpleNamespace,
    model=texts,
    name=texts,
    engine=st.sampled_from([*ENGINES]),
    plan=st.builds(SimpleNamespace, dtype=texts),
    context=st.integers(1, 2048),
    own_format=st.booleans(),
    chat_format=formats,
)


answers = st.builds(
    Answer,
    model=texts,
    source=models.map(load_source) | (endpoints | served).map(connect_source),
    prompt=texts | messages,
    settings=st.fixed_dictionaries(
        {"seed": st.integers(0, 2**63 - 1), "stop": st.lists(texts.filter(bool), max_size=2)}
    ),
    spans=st.lists(spans, max_size=4),
    ending=st.sampled_from(get_args(Ending)),
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


@given(st.lists(turns, max_size=3), st.booleans())
def test_a_saved_history_loads_as_it_was(tmp_path_factory, saved, guarded):
    file = files.save(saved, tmp_path_factory.mktemp("saved") / "playground.json", guarded)
    assert files.load(file) == (saved, guarded)


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


def test_a_file_that_is_not_there_is_named_with_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^there is no file .*none\.json: give the path that session\.save"):
        chatting(Typist()).load(tmp_path / "none.json")


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
        loaded, guarded = files.load(file)
    except ValueError as error:
        assert str(file) in str(error)  # noqa: PT017  # either outcome is right
    else:
        files.save(loaded, file, guarded)


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "first_token_seconds", "seconds", "cache_bytes"])
def test_a_file_with_less_than_nothing_is_refused(tmp_path, name):
    session = Session(Typist())
    setattr(session.generate("go").answers[0], name, -1)
    file = session.save(tmp_path / "playground.json")
    with pytest.raises(ValueError, match=f"turns 1, answers 1, {name}: Input should be greater than or equal to 0"):
        files.load(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Invalid JSON"),
        ("[1]", "not a saved playground: Input should be an object"),
        ('{"format": "falcon-kit playground", "version": 2, "turns": []}', "version: Input should be 1, got 2"),
        ('{"format": "falcon-kit playground", "version": 1}', "turns: Field required"),
        (
            '{"format": "falcon-kit playground", "version": 1, "turns": [{"id": "x"}]}',
            "turns 1, mode: Field required",
        ),
        (
            '{"format": "falcon-kit playground", "version": 1, "turns": ["\\ud800"]}',
            "Invalid JSON: .* hex escape at line 1",
        ),
        ("[" * 100_000, "Invalid JSON"),
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
        "fk.load('falconet', chat=fk.ChatFormat(**{'name': print()}))",
        "fk.load('falconet', chat=fk.serve('falconet'))",
        "fk.load({[]: 1})",
        "fk.connect(f'{print()}')",
        "fk.serve('falconet', '/tmp/vllm')",
        "fk.serve('falconet', engine='/tmp/vllm')",
        "fk.serve('falconet', 'vllm', arguments=['--trust-remote-code'])",
        "fk.serve('falconet', 'vllm', **{'arguments': ['--trust-remote-code']})",
        "fk.serve(*['falconet', '/tmp/vllm'])",
        "fk.serve('falconet', 'vllm', 'float32')",
        "fk.serve(print(), 'vllm')",
        "fk.load('a')\nprint()",
        "fk.load(" * 10_000,
    ],
)
def test_code_in_a_file_that_does_more_than_make_a_model_is_refused(saved, source):
    _, file = saved
    content = json.loads(file.read_text())
    content["turns"][1]["answers"][0]["source"] = source
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"turns 2, answers 1, source: not fk.load, fk.connect or fk.serve with"):
        files.load(file)


def test_turns_of_another_session_are_not_replaced_but_loaded_first(saved):
    session, file = saved
    before, other = file.read_text(), Session(Typist())
    for history in ("empty", "of one turn"):
        with pytest.raises(ValueError, match=r"json has 3 turns that this history does not have: load it first, or"):
            other.save(file)
        assert file.read_text() == before, history
        other.generate("go")
    other.load(file)
    other.save(file)
    assert Session(Typist()).load(file) == 5
    with pytest.raises(ValueError, match="has 2 turns that"):
        session.save(file)


def test_a_file_of_something_else_is_not_replaced(saved, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("my notes")
    with pytest.raises(ValueError, match=r"notes.txt exists and is not a saved playground: give another name, or rem"):
        saved[0].save(file)
    assert file.read_text() == "my notes"


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


@given(turns)
def test_copied_code_is_python_that_holds_the_prompt_word_for_word(turn):
    made = replace(turn, answers=tuple(replace(answer, source="fk.load('falconet')") for answer in turn.answers))
    calls = [node.value for node in ast.parse(files.as_code(made)).body if ast.unparse(node).startswith("answer = ")]
    assert [ast.literal_eval(call.args[0]) for call in calls] == [answer.prompt for answer in made.answers]


@given(st.text())
def test_copied_code_of_a_refused_answer_names_the_guardrails_and_runs_nothing_of_the_reason(reason):
    answer = Answer("falconet", "fk.load('falconet')", "Hello", {}, ending="refused", reason=reason)
    turn = Turn("1", "prompt", "Hello", (answer,))
    code = files.as_code(turn)
    assert f"\n# Guardrails refused this answer: {reason!r}.\n# Give them as guardrails=fk.guardrails(...).\n" in code
    unguarded = files.as_code(replace(turn, answers=(replace(answer, ending="eos"),)))
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(unguarded))
