"""The widget, by the messages it sends and takes."""

import json
import threading
import time
from dataclasses import replace

import pytest

import falcon_kit as fk
from falcon_kit.playground.state import Session
from falcon_kit.playground.widget import Playground
from tests.playground.typist import Gate, Typist

QUESTION = "What do giraffes eat?"


class Page:
    """A browser's page: handles messages like the view."""

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
        self.widget._on_message(self.widget, {"do": command, **values}, [])

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


def paged(*arguments):
    page = Page(Playground(Session(*arguments)))
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
        ("load", {"path": "no such file.json"}, "there is no file no such file.json"),
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


def test_a_draft_that_the_chat_template_refuses_is_said_on_the_page(instruct):
    strict = fk.ChatFormat("strict", template="{{ raise_exception('no system role') }}")
    page = paged(replace(instruct, loaded_format=strict))
    page.do("mode", mode="chat")
    page.do("draft", text="Hello")
    page.do("generate", text="Hello")
    deltas = [message for message in page.messages if message["type"] == "delta"]
    assert "no system role" in deltas[-1]["answers"][0]["reason"]
    assert page.state["running"] is None


def test_generate_pressed_twice_is_said_on_the_page():
    gate = Gate(words=1)
    page = paged(Typist(before=gate))
    page.start("generate", text="go")
    assert gate.reached.wait(10)
    again = threading.Thread(target=page.widget._run, args=("generate", {"text": "go"}))
    again.start()
    again.join(5)
    assert "an answer is being generated" in page.state["notice"]["text"]
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
    page.do("token_probabilities", shown=True)
    page.do("generate", text=session.draft)
    page.do("edit", id=session.turns[0].id, text="And lions?")
    page.do("regenerate")
    page.do("code", id=session.turns[0].id)
    assert ("And lions?" in page.shown_code, "Be brief." in page.shown_code) == (True, True)
    page.do("save", path=str(tmp_path / "playground.json"))
    assert page.state["notice"]["text"] == f"Saved 3 turns to {tmp_path / 'playground.json'}"
    page.do("clear")
    assert page.conversation == []
    page.do("load", path=str(tmp_path / "playground.json"))
    assert (page.conversation, page.state["preset"], page.state["token_probabilities"]) == (
        ["One two three."],
        "greedy",
        True,
    )


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
    updater = page.widget._updater
    page.widget.close()
    page.wait()
    gate.opened.set()
    updater.join(5)
    assert not updater.is_alive()
