"""Control and direction characters, and HTML, in names and texts from outside: in every repr, error and HTML view."""

import ast
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import falcon_kit as fk
from falcon_kit.catalogue.gguf import GGUFFile
from falcon_kit.display.errors import printable, require, unknown_name
from falcon_kit.display.page import HasPage, Page, text_html
from falcon_kit.display.tables import html_table
from falcon_kit.evaluation.bias import BiasReport, PairResult
from falcon_kit.evaluation.comparison import Comparison, Difference
from falcon_kit.evaluation.perplexity import Part, Perplexity
from falcon_kit.evaluation.results import Evaluation
from falcon_kit.evaluation.statistics import Estimate
from falcon_kit.evaluation.task_results import TaskResult
from falcon_kit.evaluation.tasks import Item, Task
from falcon_kit.generation.chat import render
from falcon_kit.generation.text import Alternative, Generation, Piece, Stats
from falcon_kit.guardrails import Finding, Verdict
from falcon_kit.loading.adapters import damaged
from falcon_kit.planning.devices import Device
from falcon_kit.playground.records import Answer, Span, Token, Turn
from falcon_kit.playground.state import Session
from falcon_kit.playground.widget import Playground
from falcon_kit.serving.deployment import Deployment
from falcon_kit.serving.endpoint import Endpoint
from falcon_kit.serving.failures import error_message, http_error
from falcon_kit.serving.openai_api import _find_model
from falcon_kit.tuning.data import Problem, first_problems
from falcon_kit.tuning.packing import Example
from falcon_kit.tuning.runs import BeforeAfter, TuningRun
from falcon_kit.tuning.settings import Tuning
from falcon_kit.tuning.trainer import _damage_named
from tests.playground.typist import Typist

HIDDEN = "a\x00\x1b[31m\u202eb\u2066\u200b\x85"
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>\"' onmouseover=alert(1) x='</style></textarea>&lt;b&gt;"
NASTY = HIDDEN + SCRIPT
STATS = Stats(1, 1, 1, 0.1, 0.2, 0)


def documents(text=NASTY):
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}] * 2
    return fk.dialogues([*rows, {"messages": [{"role": text, "content": "x"}]}])


def turn(text):
    token = Token(text, -1.0, ((text, -1.0),))
    answer = Answer(text, "fk.load('a')", text, {"seed": 1}, [Span(text, (token,))], "error", text)
    return Turn("id", "prompt", text, (answer,))


def rendered(template):
    return render([{"role": "user", "content": NASTY}], fk.ChatFormat("mine", template=template))


def damaged_checkpoint():
    with _damage_named("checkpoint-1"):
        raise ValueError(NASTY)


def session(text=NASTY):
    opened = Session(Typist(text, name=text))
    opened.generate(text)
    return opened


class Folder(type(Path())):
    """An empty folder under any name."""

    def iterdir(self):
        return iter(())


def task_result(text):
    return TaskResult(text, text, text, {text: (1.0, 0.0)}, ({text: text},) * 2, {}, {text: 1.0})


def perplexity(text):
    return Perplexity(text, (Part(text, 1, 1, 1, 1.0),) * 2, text, 2)


def comparison(text):
    estimate = Estimate(1.0, 0.5, 1.5)
    return Comparison(text, text, (Difference(text, text, 1, 2, estimate, 0.5, text, 2),), {text: (text, text)})


def tuning_run(falcon, text):
    plan, packed = fk.plan(falcon.spec), fk.pack(documents(text), falcon)
    return TuningRun(Folder(text), falcon, Tuning(), plan, packed, (), {text: 1.0})


def gguf_file(falcon, text):
    return GGUFFile(Path(__file__), falcon.spec, {}, {}, {text: SimpleNamespace(kind="F32", bytes=4, shape=(1,))})


RESULTS = {
    "Generation": lambda _, text: Generation(text, text, (1,), (-1.0,), "eos", STATS),
    "Piece": lambda _, text: Piece(text, 1, -1.0, (Alternative(text, 1, -1.0),)),
    "Falcon": lambda falcon, text: falcon,
    "FalconSpec": lambda falcon, text: falcon.spec,
    "Plan": lambda falcon, text: fk.plan(falcon.spec, devices=[Device(text, text, 2**34)]),
    "ChatFormat": lambda _, text: fk.ChatFormat(text, text, text, (text,), template=text),
    "AttentionView": lambda falcon, text: fk.attention(falcon, text, layers=0),
    "LensView": lambda falcon, text: fk.lens(falcon, text),
    "Ablation": lambda falcon, text: fk.ablate(falcon, text, heads=[(0, 0)]),
    "Attribution": lambda falcon, text: fk.attribute(falcon, text, steps=1),
    "TokenView": lambda falcon, text: fk.tokens(text, falcon.tokenizer),
    "TokenReport": lambda falcon, text: fk.compare_tokens({text: text, "b": "b"}, falcon.tokenizer),
    "Documents": lambda _, text: documents(text),
    "Packed": lambda falcon, text: fk.pack(documents(text), falcon),
    "BeforeAfter": lambda _, text: BeforeAfter(((text, text, text),)),
    "Finding": lambda _, text: Finding((0, 1), text, text),
    "Verdict": lambda _, text: Verdict((Finding((0, 1), text, text),), "prompt"),
    "Blocked": lambda _, text: fk.Blocked(Verdict((Finding((0, 1), text, text),), "prompt")),
    "Guardrails": lambda _, text: fk.guardrails(custom={text: lambda _: None}, blocked_words=["a" + text[-20:]]),
    "Answer": lambda _, text: turn(text).answers[0],
    "Turn": lambda _, text: turn(text),
    "Session": lambda _, text: session(text),
    "Playground": lambda _, text: Playground(session(text)),
    "Evaluation": lambda _, text: Evaluation(text, {text: text}, (perplexity(text),), (task_result(text),)),
    "TaskResult": lambda _, text: task_result(text),
    "Perplexity": lambda _, text: perplexity(text),
    "Comparison": lambda _, text: comparison(text),
    "BiasReport": lambda _, text: BiasReport(text, (PairResult(text, text, text, 1.0),)),
    "Task": lambda _, text: Task(text, (Item(text, text, False, (text,), text, {text: text}),)),
    "TuningRun": lambda falcon, text: tuning_run(falcon, text),
    "Example": lambda falcon, text: Example((1,), (True,), text, falcon.tokenizer),
    "Explanation": lambda falcon, text: fk.explain(falcon, text),
    "GGUFFile": lambda falcon, text: gguf_file(falcon, text),
    "Deployment": lambda falcon, text: Deployment(text, fk.plan(falcon.spec, devices=[Device(text, text, 2**34)]), 1),
    "Endpoint": lambda falcon, text: Endpoint(text, "vLLM", text, 9, falcon.spec, falcon.chat_format, False, 1, None),
    "Page": lambda _, text: Page(text, text_html(text), data=[text]),
    "table": lambda _, text: type("Table", (), {"_repr_html_": lambda _: html_table(text, (text,), [(text, text)])})(),
}
WITHOUT_FOREIGN_TEXT = {
    *("Catalogue", "Environment", "ModelCard", "Outcome", "Requirements", "SageMakerPlace", "Weights"),
    *("GuardedStream", "RemoteStream", "Stream"),
    *("ParallelFalcon", "Served"),  # which need processes; they show what Falcon and Endpoint do
}
ERRORS = {
    "a name": lambda: unknown_name("model", NASTY, [NASTY]),
    "require": lambda: require(False, NASTY),
    "spec": lambda: fk.spec(HIDDEN),
    "load": lambda: fk.load("a\x1b\u202e"),
    "chat_format": lambda: fk.chat_format(NASTY),
    "a role": lambda: fk.chat_format("hub") and documents() and fk.load("falconet").chat([{"role": NASTY}]),
    "stop": lambda: fk.Sampling(stop=[NASTY, 5]),
    "a setting": lambda: fk.Sampling(seed=NASTY),
    "the server": lambda: http_error(500, error_message({"error": NASTY}), "http://host", {}),
    "a statistic": lambda: fk.attention(fk.load("falconet"), "Hi").figure(NASTY),
    "devices": lambda: fk.plan("falconet", devices=NASTY),
    "a template": lambda: rendered("{{ raise_exception(messages[0].content) }}"),
    "a checkpoint": damaged_checkpoint,
    "weights": lambda: damaged(Path(__file__), NASTY),
    "rows": lambda: first_problems([Problem(HIDDEN, NASTY)]),
    "a preset": lambda: Session(Typist()).preset(NASTY),
    "guardrails": lambda: fk.guardrails(custom={NASTY: 5}),
    "labels": lambda: fk.guardrails(labels=[NASTY]),
    "models of a server": lambda: _find_model([{"id": NASTY}, {"id": "b"}], None),
    "dialogues": lambda: fk.dialogues(HIDDEN + ".jsonl"),
}


class Elements(HTMLParser):
    """The elements that a browser makes of an HTML text, each with the names of its attributes."""

    def __init__(self, source):
        super().__init__()
        self.found = set()
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.add((tag, *(name for name, _ in attributes)))


def classes_with_a_repr():
    """The names of the package's classes that define `__repr__` themselves."""
    for file in Path(fk.__file__).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for each in ast.walk(ast.parse(text)) if "def __repr__" in text else ():
            if isinstance(each, ast.ClassDef) and "__repr__" in (getattr(one, "name", "") for one in each.body):
                yield each.name


def named(falcon, text):
    return replace(falcon, spec=replace(falcon.spec, name=text))


def views(result):
    """Each HTML that a result has."""
    if isinstance(result, Playground):
        yield result._repr_mimebundle_()[0]["text/html"]
    elif hasattr(result, "_repr_html_"):
        yield result._repr_html_()
    if isinstance(result, HasPage):
        yield result.page().document()


def test_every_class_with_a_repr_is_in_this_test():
    assert WITHOUT_FOREIGN_TEXT.isdisjoint(RESULTS)
    assert {*classes_with_a_repr()} - {*RESULTS} == WITHOUT_FOREIGN_TEXT


@pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS)
def test_a_repr_shows_control_and_direction_characters(instruct, make):
    shown = repr(make(named(instruct, NASTY), NASTY))
    assert printable(shown, keep="\n") == shown


@pytest.mark.parametrize("make", ERRORS.values(), ids=ERRORS)
def test_an_error_shows_control_and_direction_characters(make):
    try:
        returned = make()
    except Exception as error:  # noqa: BLE001  # of any kind: only its text is looked at
        returned = error
    assert printable(str(returned), keep="\n") == str(returned)


@pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS)
def test_no_element_or_attribute_of_a_view_comes_from_a_text(instruct, make):
    texts = (HIDDEN + "word ❤" * 20, NASTY)
    harmless, nasty = ([Elements(view).found for view in views(make(named(instruct, text), text))] for text in texts)
    for expected, found in zip(harmless, nasty, strict=True):
        assert found <= expected


def test_the_last_test_sees_an_element_that_comes_from_a_text():
    assert ("img", "src", "onerror") in Elements(SCRIPT).found


def test_what_the_playground_sends_is_text_in_json():
    widget, sent = Playground(session()), []
    widget.send = sent.append
    widget._run("hello", {})
    assert {each["type"] for each in sent} >= {"start", "turn", "state", "history"}
    assert "innerHTML" not in widget._esm
    assert "insertAdjacentHTML" not in widget._esm
    assert "document.write" not in widget._esm


@given(st.text())
def test_a_printable_text_is_what_repr_shows(text):
    assert printable(text) == "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
