"""The playground in JupyterLab, as a person uses it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from falcon_kit.playground.state import Session
from falcon_kit.playground.widget import Playground

from .lab import PAINTING, Notebook, faint_fields, small_targets, violations

HOSTILE = [
    '<img src="x" onerror="window.hacked = 1">',
    "</pre></div><script>window.hacked = 1</script>",
    "\u202egnp.egarots\u202c \u2066abc\u2069",
    '<iframe srcdoc="<script>parent.hacked = 1</script>"></iframe>',
    "&lt;b&gt; {{ 7 * 7 }} ${7 * 7}",
]

# An endpoint that generates fixed words, for what Falconet cannot be made to generate.
TYPIST = """
import time
from types import SimpleNamespace
from falcon_kit.generation.text import Piece

class Typist:
    def __init__(self, words, pause=0.0, error=None):
        self.words, self.pause, self.error, self.model = words, pause, error, "typist"

    def stream(self, prompt, **settings):
        return Typing(self)

class Typing:
    def __init__(self, typist):
        self.typist, self.closed, self.ended = typist, False, False

    def __iter__(self):
        for word in self.typist.words:
            time.sleep(self.typist.pause)
            if self.closed:
                return
            yield Piece(word, None, float("nan"))
        if self.typist.error:
            raise self.typist.error
        self.ended = True

    def close(self):
        self.closed = True

    @property
    def generation(self):
        stats = SimpleNamespace()
        return SimpleNamespace(text="", finish_reason="eos" if self.ended else "cancelled", stats=stats)
"""


class Pad:
    """A playground on the page."""

    def __init__(self, notebook: Notebook, node: Locator) -> None:
        self.notebook, self.page, self.node = notebook, notebook.page, node
        self.asked = 0

    @property
    def field(self) -> Locator:
        return self.node.locator(".fk-composer textarea")

    @property
    def generated(self) -> Locator:
        return self.node.locator(".fk-generated")

    @property
    def notice(self) -> Locator:
        return self.node.locator(".fk-notice")

    def button(self, name: str) -> Locator:
        return self.node.get_by_role("button", name=name)

    def write(self, text: str) -> None:
        """Types and presses Ctrl+Enter."""
        self.field.fill(text)
        self.send()

    def send(self) -> None:
        self.field.press("Control+Enter")
        self.asked += 1

    def wait(self) -> None:
        """Waits until every requested answer has ended, and so is in the history."""
        expect(self.node.locator(".fk-history li")).to_have_count(self.asked)

    def session(self, expression: str) -> str:
        """The value of an expression of the session, in the kernel."""
        return self.notebook.python(f"print(pad.session.{expression})")


@pytest.fixture
def pad(notebook: Notebook) -> Iterator[Pad]:
    """A new playground for falconet-instruct, with a seed so that every run generates the same text."""
    yield started(notebook, "falcon")
    notebook.python("pad.close()")


def started(notebook: Notebook, arguments: str) -> Pad:
    outputs = notebook.start(f"pad = fk.playground({arguments})\npad.session.set(seed=0, max_new_tokens=30)\npad")
    node = outputs.locator(".fk-playground")
    expect(node.locator("h2")).not_to_be_empty()
    return Pad(notebook, node)


def typist(notebook: Notebook, words: list[str], **options: object) -> Pad:
    given = "".join(f", {name}={value}" for name, value in options.items())
    notebook.python(f"{TYPIST}\ntypist = Typist({words!r}{given})")
    return started(notebook, "typist")


# Writing


def test_text_grows_while_it_is_written(notebook: Notebook):
    pad = typist(notebook, [f" {number}" for number in range(40)], pause=0.03)
    pad.node.evaluate(
        """(node) => {
            window.lengths = [];
            const note = () => window.lengths.push(node.querySelector(".fk-generated")?.textContent.length ?? 0);
            new MutationObserver(note).observe(node, { childList: true, subtree: true });
        }"""
    )
    pad.write("Count")
    expect(pad.node.locator(".fk-writing")).to_have_count(1)
    pad.wait()
    lengths = sorted(set(pad.page.evaluate("window.lengths")))
    assert len(lengths) > 5
    expect(pad.generated).to_have_text("".join(f" {number}" for number in range(40)))


def test_the_models_words_and_figures_are_shown(pad: Pad):
    pad.node.get_by_label("Examples").select_option("Girafatron (the model card's)")
    pad.send()
    pad.wait()
    expect(pad.generated).to_have_text(pad.session("turns[0].answers[0].text"), use_inner_text=True)
    expect(pad.node.locator(".fk-foot")).to_contain_text(
        re.compile(r"\d+ tokens · .* tokens/s · first after .* · (ended|length limit)")
    )
    expect(pad.node.locator(".fk-context")).to_contain_text(re.compile(r"context: \d+ of 2048 tokens · KV cache"))


def test_a_conversation_goes_on_and_can_be_edited(pad: Pad):
    pad.button("Chat").click()
    pad.write("What do giraffes eat?")
    pad.wait()
    pad.write("Where do they live?")
    pad.wait()
    expect(pad.generated).to_have_count(2)
    expect(pad.generated.first).to_contain_text("Giraffes eat")
    pad.node.locator(".fk-message").first.hover()
    pad.button("edit").first.click()
    pad.node.get_by_label("Edit the message").fill("What do lions eat?")
    pad.button("Answer this").click()
    pad.asked += 1
    expect(pad.node.locator(".fk-message-text")).to_have_text(["What do lions eat?"])
    pad.wait()
    pad.button("Undo").click()
    expect(pad.node.locator(".fk-message-text")).to_have_text(["What do giraffes eat?", "Where do they live?"])
    pad.button("Clear").click()
    expect(pad.node.locator(".fk-message-text")).to_have_count(0)


def test_two_settings_write_beside_each_other(notebook: Notebook):
    pad = started(notebook, "falcon, {'temperature': 0}")
    pad.write("Counting: 7, 8,")
    pad.wait()
    left, right = (pad.node.locator(".fk-answer").nth(number).bounding_box() for number in (0, 1))
    assert left["x"] + left["width"] <= right["x"] + 1
    assert left["y"] == right["y"]
    assert pad.generated.all_inner_texts() == json.loads(
        notebook.python("import json; print(json.dumps([each.text for each in pad.session.turns[0].answers]))")
    )


def test_two_answers_without_a_widget_stand_beside_each_other_where_there_is_room(notebook: Notebook):
    notebook.python(f"{TYPIST}\nsession = fk.playground(Typist(['word '] * 99), Typist(['other '] * 99)).session")
    turn = notebook.start("session.generate('Go')").locator("div[style*=flex-wrap]")
    turn.evaluate("(node) => { node.style.width = '700px'; }")
    left, right = (turn.locator("> div").nth(number).bounding_box() for number in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    turn.evaluate("(node) => { node.style.width = '390px'; }")
    left, right = (turn.locator("> div").nth(number).bounding_box() for number in (0, 1))
    assert left["y"] + left["height"] <= right["y"]


# Stop, errors


def test_escape_and_the_button_stop_a_text(notebook: Notebook):
    pad = typist(notebook, ["word "] * 1000, pause=0.02)
    for stop in (lambda: pad.field.press("Escape"), lambda: pad.button("Stop").click()):
        pad.write("Go")
        expect(pad.generated).to_contain_text("word word")
        stop()
        pad.wait()
        expect(pad.node.locator(".fk-foot")).to_contain_text("stopped")


def test_stop_is_heard_while_a_cell_runs(notebook: Notebook):
    pad = typist(notebook, ["word "] * 1000, pause=0.02)
    notebook.start("import time; time.sleep(3); print('cell ended')")
    pad.write("Go")
    expect(pad.generated).to_contain_text("word word")
    pad.button("Stop").click()
    expect(pad.node.locator(".fk-foot")).to_contain_text("stopped")
    expect(notebook.page.get_by_text("cell ended", exact=True)).to_have_count(0)
    notebook.python("pass")  # until the cell has ended


def test_an_error_is_shown_and_the_next_text_is_written(notebook: Notebook):
    pad = typist(notebook, ["One", " two"], error="ConnectionError('the endpoint broke off')")
    pad.write("Go")
    expect(pad.node.locator(".fk-problem")).to_have_text("ConnectionError: the endpoint broke off")
    expect(pad.generated).to_have_text("One two")
    notebook.python("typist.error = None")
    pad.write("Go on")
    pad.wait()
    expect(pad.node.locator(".fk-problem")).to_be_hidden()


def test_one_token_is_counted_as_one(notebook: Notebook):
    pad = typist(notebook, ["One"])
    pad.write("Go")
    pad.wait()
    expect(pad.node.locator(".fk-foot")).to_contain_text(re.compile("^1 token · "))


def test_a_setting_out_of_range_is_explained_and_put_back(pad: Pad):
    pad.node.get_by_label("Top-p", exact=True).fill("7")
    pad.node.get_by_label("Top-p", exact=True).press("Tab")
    expect(pad.notice).to_have_text("top_p must be above 0 and at most 1, got 7")
    expect(pad.node.get_by_label("Top-p", exact=True)).to_have_value("1")
    pad.button("Creative").click()
    expect(pad.notice).to_be_hidden()
    expect(pad.node.get_by_label("Temperature", exact=True)).to_have_value("1.2")
    assert pad.session("settings.temperature") == "1.2"


def test_a_text_that_is_refused_stays_as_it_was_typed(notebook: Notebook):
    pad = started(notebook, "falcon, guardrails=fk.guardrails(blocked_words=['zebra'])")
    pad.field.press_sequentially("A ze")
    expect(pad.node.locator(".fk-context")).to_contain_text(re.compile(r"context: [1-9]"))  # the kernel has this draft
    pad.field.press_sequentially("bra")
    pad.send()
    expect(pad.notice).to_contain_text("the guardrails refuse this text")
    expect(pad.field).to_have_value("A zebra")


def test_an_interrupted_kernel_leaves_the_playground_usable(pad: Pad):
    pad.notebook.start("import time\ntime.sleep(60)")
    pad.page.wait_for_timeout(300)
    pad.page.evaluate("jupyterapp.commands.execute('notebook:interrupt-kernel')")
    pad.write("Counting: 7, 8,")
    pad.wait()
    expect(pad.generated).not_to_be_empty()


def test_a_setting_that_was_typed_counts_for_what_is_written_next(pad: Pad):
    pad.field.fill("Counting: 7, 8,")
    seed = pad.node.get_by_label("Seed", exact=True)
    seed.press("Control+a")
    seed.press_sequentially("4321")
    seed.press("Control+Enter")
    pad.asked += 1
    pad.wait()
    assert pad.session("turns[0].answers[0].seed") == "4321"
    expect(seed).to_have_value("4321")


def test_a_text_may_be_changed_as_soon_as_it_is_sent(notebook: Notebook):
    pad = typist(notebook, ["word "] * 40, pause=0.05)
    pad.field.press_sequentially("Go")
    pad.send()
    pad.page.keyboard.type(" on")
    pad.wait()
    expect(pad.field).to_have_value("Go on")


def test_what_is_being_typed_outlasts_the_end_of_an_answer(notebook: Notebook):
    pad = typist(notebook, ["word "] * 40, pause=0.05)
    pad.button("Chat").click()
    pad.write("Go")
    system = pad.node.get_by_label("System message")
    expect(system).to_be_visible()  # a hidden field takes no keys
    system.press_sequentially("Be brief.")
    pad.wait()
    expect(system).to_have_value("Be brief.")
    pad.write("Go on")
    pad.wait()
    assert pad.session("system") == "Be brief."


# What is typed and what has the focus stay


def conversation(notebook: Notebook) -> Pad:
    """A playground in chat mode whose message "Go" was answered."""
    pad = typist(notebook, ["Yes."])
    pad.button("Chat").click()
    pad.write("Go")
    pad.wait()
    return pad


def edited(pad: Pad, text: str) -> Locator:
    """The field of the first message, with another text that was sent."""
    pad.button("edit").first.press("Enter")
    field = pad.node.get_by_label("Edit the message")
    field.fill(text)
    field.press("Control+Enter")
    return field


def test_an_edited_message_that_is_refused_stays_as_it_was_typed(notebook: Notebook):
    pad = typist(notebook, ["Yes."])
    notebook.python("pad.session.guardrails = fk.guardrails(blocked_words=['zebra']); pad.session.guard(True)")
    pad.button("Chat").click()
    pad.write("Go")
    pad.wait()
    field = edited(pad, "A zebra")
    expect(pad.notice).to_contain_text("the guardrails refuse this text")
    expect(field).to_have_value("A zebra")
    expect(field).to_be_focused()
    field.fill("A giraffe")
    field.press("Control+Enter")
    expect(pad.node.locator(".fk-message-text")).to_have_text(["A giraffe"])


def test_an_edited_message_that_is_sent_during_an_answer_stays_as_it_was_typed(notebook: Notebook):
    pad = typist(notebook, ["word "] * 1000)
    pad.button("Chat").click()
    pad.write("Go")
    pad.wait()
    notebook.python("typist.pause = 0.02")
    pad.write("Go on")
    expect(pad.node.locator(".fk-writing")).to_have_count(1)
    field = edited(pad, "Go back")
    expect(pad.notice).to_contain_text("an answer is being generated")
    expect(field).to_have_value("Go back")
    pad.button("Stop").click()
    pad.wait()
    field.press("Control+Enter")
    expect(pad.node.locator(".fk-message-text")).to_have_text(["Go back"])
    expect(pad.button("Stop")).to_be_focused()


def test_a_message_that_is_being_edited_outlasts_a_second_view_and_a_new_turn(notebook: Notebook):
    pad = conversation(notebook)
    pad.button("edit").press("Enter")
    notebook.page.keyboard.type("Let us ")
    notebook.python("pad._hello(); pad.session.generate('Next')")
    expect(pad.generated).to_have_count(2)
    field = pad.node.get_by_label("Edit the message")
    expect(field).to_have_value("Let us Go")
    expect(field).to_be_focused()


def test_a_message_that_is_being_edited_outlasts_a_clearing_and_its_undo(notebook: Notebook):
    pad = conversation(notebook)
    pad.button("edit").press("Enter")
    pad.node.get_by_label("Edit the message").fill("Let us go")
    pad.button("Clear").click()
    expect(pad.generated).to_have_count(0)
    pad.button("Undo").click()
    expect(pad.node.get_by_label("Edit the message")).to_have_value("Let us go")
    pad.button("Answer this").click()
    expect(pad.node.locator(".fk-message-text")).to_have_text(["Let us go"])
    pad.button("Undo").click()
    expect(pad.node.locator(".fk-message-text")).to_have_text(["Go"])


def test_what_is_being_typed_outlasts_another_answer_to_an_earlier_text(notebook: Notebook):
    pad = typist(notebook, ["Yes."])
    pad.write("Go")
    pad.wait()
    pad.field.fill("Go on")
    pad.page.wait_for_timeout(500)  # the kernel has this draft
    pad.button("Regenerate").click()
    pad.asked += 1
    pad.wait()
    expect(pad.field).to_have_value("Go on")


def test_what_is_being_typed_outlasts_a_text_from_python(notebook: Notebook):
    pad = typist(notebook, ["Yes."])
    pad.field.evaluate(
        """field => (field.typing = setInterval(() => {
             field.value += "a";
             field.dispatchEvent(new Event("input"));
           }, 50))"""
    )
    expect(pad.field).to_have_value(re.compile("^a+$"))
    notebook.python("pad.session.generate('Go')")
    expect(pad.generated).to_have_text("Yes.")
    pad.field.evaluate("field => clearInterval(field.typing)")
    expect(pad.field).to_have_value(re.compile("^a+$"))
    pad.page.wait_for_timeout(500)  # the kernel has this draft
    notebook.python("pad.session.generate('Go on')")
    expect(pad.node.locator(".fk-history li")).to_have_count(2)
    expect(pad.field).to_have_value(re.compile("^a+$"))


def test_what_the_kernel_says_of_the_text_field_does_not_replace_what_it_has_not_heard_yet(pad: Pad):
    pad.notebook.python("pad._draft = lambda text: None")  # the text is on its way for ever
    pad.field.press_sequentially("A long question")
    pad.page.wait_for_timeout(500)
    pad.notebook.python("pad._show(); pad.session.set(top_k=7)")
    expect(pad.node.get_by_label("Top-k", exact=True)).to_have_value("7")
    expect(pad.field).to_have_value("A long question")


def test_an_example_leaves_what_was_typed_just_before_to_undo(pad: Pad):
    pad.field.fill("A long question")
    pad.node.get_by_label("Examples").select_option("A question")
    expect(pad.field).to_have_value("What do giraffes eat?")
    pad.button("Undo").click()
    expect(pad.field).to_have_value("A long question")


@pytest.mark.parametrize("key", ["ArrowDown", "C"])
def test_a_key_opens_the_examples_and_takes_none(pad: Pad, key: str):
    pad.field.fill("A long question")
    pad.node.get_by_label("Examples").press(key)
    pad.page.wait_for_timeout(500)
    expect(pad.field).to_have_value("A long question")
    for each in ("ArrowDown", "ArrowDown", "Enter"):
        pad.page.keyboard.press(each)
    expect(pad.field).to_have_value("Animals of Africa: giraffe, lion,")


def test_what_is_no_number_is_refused_and_put_back(pad: Pad):
    for name, before in {"Top-k": "10", "Seed": "0"}.items():
        number = pad.node.get_by_label(name, exact=True)
        number.press("Control+a")
        number.press_sequentially("1e")
        number.press("Tab")
        expect(pad.notice).to_contain_text("got 'no number'")
        expect(number).to_have_value(before)
        pad.button("Card").click()
        expect(pad.notice).to_be_hidden()


def test_a_second_click_asks_for_no_second_answer(notebook: Notebook):
    pad = typist(notebook, ["word "] * 20, pause=0.02)
    pad.button("Chat").click()
    pad.field.fill("Go")
    pad.button("Send").dblclick()
    pad.asked = 1
    pad.wait()
    expect(pad.notice).to_be_hidden()
    pad.button("Regenerate").dblclick()
    pad.asked = 2
    pad.wait()
    expect(pad.notice).to_be_hidden()


COMPOSING = """(field, key) => {
    const event = { key, ctrlKey: key === "Enter", isComposing: true, bubbles: true, cancelable: true };
    field.dispatchEvent(new KeyboardEvent("keydown", event));
}"""


def test_the_keys_of_an_input_method_neither_send_nor_close(notebook: Notebook):
    pad = conversation(notebook)
    pad.button("edit").press("Enter")
    field = pad.node.get_by_label("Edit the message")
    field.fill("Go back")
    for key in ("Escape", "Enter"):
        field.evaluate(COMPOSING, key)
        pad.field.evaluate(COMPOSING, key)
    pad.page.wait_for_timeout(300)
    expect(field).to_have_value("Go back")
    expect(pad.notice).to_be_hidden()
    expect(pad.generated).to_have_count(1)


def test_a_button_that_is_disabled_hands_on_the_focus_so_that_escape_is_heard(notebook: Notebook):
    pad = typist(notebook, ["word "] * 1000, pause=0.02)
    pad.field.fill("Go")
    pad.button("Generate").first.press("Enter")
    expect(pad.button("Stop")).to_be_focused()
    notebook.page.keyboard.press("Escape")
    expect(pad.node.locator(".fk-foot")).to_contain_text("stopped")
    expect(pad.button("Generate").first).to_be_focused()
    expect(pad.node.get_by_role("status")).to_have_text("Ended")


def test_a_turn_of_the_history_that_is_opened_keeps_the_focus(notebook: Notebook):
    pad = typist(notebook, ["Yes."])
    for text in ("Go", "Go on"):
        pad.write(text)
        pad.wait()
    first = pad.node.locator(".fk-history button").last
    first.press("Enter")
    expect(pad.field).to_have_value("Go")
    expect(first).to_be_focused()


def test_a_control_that_goes_hands_on_the_focus(pad: Pad):
    pad.button("random").press("Enter")
    expect(pad.button("random")).to_be_hidden()
    expect(pad.node.get_by_label("Seed", exact=True)).to_be_focused()
    pad.write("Counting: 7, 8,")
    pad.wait()
    pad.button("copy as code").press("Enter")
    pad.button("close").press("Enter")
    expect(pad.node.locator(".fk-code")).to_be_hidden()
    expect(pad.button("copy as code")).to_be_focused()


# Token probabilities


def test_a_token_shows_what_else_was_likely_to_the_pointer_and_to_the_keyboard(pad: Pad):
    pad.write("Counting: 7, 8,")
    pad.wait()
    tokens, card = pad.node.locator(".fk-token"), pad.node.get_by_role("tooltip")
    tokens.nth(1).hover()
    expect(card).to_be_hidden()
    pad.node.get_by_label("Token probabilities").check()
    expect(pad.node).to_have_class(re.compile("fk-probabilities"))  # as the kernel has answered
    tokens.nth(1).hover()
    expect(card.locator("tr")).to_have_count(5)
    likeliest = pad.session("turns[0].answers[0].spans[1].tokens[0].alternatives[0][0]")
    expect(card.locator("bdi").first).to_have_text(likeliest)
    pad.node.get_by_label("Top-k", exact=True).hover()
    expect(card).to_be_hidden()
    pad.node.locator(".fk-text").focus()
    for key in ("ArrowRight", "ArrowRight"):
        pad.page.keyboard.press(key)
    expect(tokens.nth(1)).to_be_focused()
    expect(card).to_be_visible()
    assert tokens.nth(1).get_attribute("aria-describedby") == card.get_attribute("id")


def test_the_card_shows_what_is_invisible_and_what_is_almost_certain(notebook: Notebook):
    notebook.python("from falcon_kit.generation.text import Alternative")
    pad = typist(notebook, ["a\u00a0b"])
    notebook.python(
        """def said(self):
    yield Piece("a\u00a0b", 0, -0.0004, (Alternative("a\u00a0b", 0, -0.0004),))
Typing.__iter__ = said"""
    )
    pad.write("Go")
    pad.wait()
    pad.node.get_by_label("Token probabilities").check()
    expect(pad.node).to_have_class(re.compile("fk-probabilities"))  # as the kernel has answered
    pad.node.locator(".fk-token").hover()
    expect(pad.node.get_by_role("tooltip").locator("bdi")).to_have_text("a[U+00A0]b")
    expect(pad.node.get_by_role("tooltip").locator("td").last).to_have_text(">99.9%")


# A kernel that does not answer


@pytest.fixture
def alone(deaf: Page) -> Page:
    """A playground whose kernel is this test, in chat mode: `sent` are its requests."""
    widget = Playground(Session(SimpleNamespace(stream=None, model="typist")))
    sent: list[dict] = []
    widget.send = sent.append
    widget.session.switch("chat")
    sent.clear()
    widget._hello()
    deaf.evaluate("(hello) => hello.forEach(answer)", sent)
    return deaf


@pytest.fixture
def deaf(browser: Browser) -> Iterator[Page]:
    """A playground that no kernel has answered yet."""
    source = Playground._esm.replace("export default { render };", "")
    for name, soon in {
        "NO_ANSWER = 5000": "NO_ANSWER = 100",
        "setTimeout(sayHello, 2000": "setTimeout(sayHello, 100",
    }.items():
        assert name in source
        source = source.replace(name, soon)
    page = browser.new_page()
    page.set_content("<body></body>")
    page.evaluate(
        f"""() => {{ {source}
        window.sent = [];
        window.send = (message) => sent.push(message);
        const model = {{ on: (_, run) => (window.answer = run), off() {{}}, send: (message) => send(message) }};
        render({{ model, el: document.body }}); }}"""
    )
    yield page
    page.close()


def test_a_reloaded_page_that_only_hears_says_that_the_kernel_does_not(deaf: Page):
    meter = "{ used: null, context: null, cache_bytes: null }"
    deaf.evaluate(f"setInterval(() => answer({{ type: 'delta', id: 1, answers: [], meter: {meter} }}), 20)")
    expect(deaf.locator(".fk-notice")).to_contain_text("The kernel does not answer")
    deaf.wait_for_timeout(200)
    expect(deaf.locator(".fk-notice")).to_be_visible()


def test_a_message_that_the_kernel_does_not_hear_stays(alone: Page):
    field, notice = alone.locator(".fk-composer textarea"), alone.locator(".fk-notice")
    field.fill("A long question")
    field.press("Control+Enter")
    assert field.input_value() == ""
    expect(notice).to_contain_text("The kernel does not answer. If it was restarted, run the cell again.")
    expect(field).to_have_value("A long question")
    alone.evaluate("answer({ type: 'meter', meter: { used: null, context: null, cache_bytes: null } })")
    expect(notice).to_be_hidden()
    field.press("Control+Enter")
    assert alone.evaluate("sent.filter((each) => each.do === 'generate').length") == 2


def test_what_is_typed_after_a_message_that_is_not_heard_stays_too(alone: Page):
    field = alone.locator(".fk-composer textarea")
    field.fill("A long question")
    field.press("Control+Enter")
    field.press_sequentially("Another")
    expect(alone.locator(".fk-notice")).to_be_visible()
    expect(field).to_have_value("A long question\nAnother")


def test_a_kernel_that_was_restarted_is_noticed_at_once(alone: Page):
    errors: list[str] = []
    alone.on("pageerror", lambda error: errors.append(str(error)))
    alone.evaluate("() => { window.send = () => { throw new Error('Cannot send'); }; }")
    field = alone.locator(".fk-composer textarea")
    field.fill("A long question")
    alone.get_by_role("button", name="Send").click()
    assert "The kernel does not answer" in alone.locator(".fk-notice").inner_text()
    expect(field).to_have_value("A long question")
    assert errors == []


# Reload, files and code


def test_a_reload_in_the_middle_shows_the_rest(notebook: Notebook):
    words = [f" {number}" for number in range(2000)]
    pad = typist(notebook, words, pause=0.2)
    pad.write("Count")
    expect(pad.generated).to_contain_text(" 3 4")
    notebook.page.evaluate("jupyterapp.commands.execute('docmanager:save')")
    notebook.page.wait_for_timeout(500)
    pad = reloaded(notebook)
    expect(pad.node.locator(".fk-writing")).to_have_count(1)
    notebook.python("typist.pause = 0")  # the rest at once, however long the reload took
    expect(pad.generated).to_have_text("".join(words))
    pad.asked = 1
    pad.wait()
    assert notebook.python("print(pad.session.turns[0].answers[0].ending)") == "eos"


def reloaded(notebook: Notebook) -> Pad:
    """The playground after a reload of the page; reloads again if the page shows that the kernel does not answer.

    JupyterLab 4.6 may send the messages of a reloaded page to a subshell that ipykernel 7.4 has ended ("Unknown
    subshell_id" in its log), and then the kernel receives no message of any widget.
    """
    for _ in range(4):
        notebook.open()
        pad = Pad(notebook, notebook.page.locator(".fk-playground").last)
        expect(pad.node.locator("h2:not(:empty), .fk-notice:not([hidden])").first).to_be_visible()
        if pad.notice.is_hidden():
            break
        expect(pad.notice).to_contain_text("The kernel does not answer")
    return pad


def test_a_session_is_saved_and_loaded(pad: Pad, tmp_path: Path):
    file = tmp_path / "saved.json"
    pad.write("Counting: 7, 8,")
    pad.wait()
    text = pad.generated.inner_text()
    pad.node.get_by_label("File, on the machine of the kernel").fill(str(file))
    pad.button("Save").click()
    expect(pad.notice).to_have_text(f"Saved 1 turn to {file}")
    other = started(pad.notebook, "falcon")
    other.node.get_by_label("File, on the machine of the kernel").fill(str(file))
    other.button("Load").click()
    expect(other.generated).to_have_text(text, use_inner_text=True)


def test_the_copied_code_runs_in_a_cell_and_writes_the_same(pad: Pad):
    pad.write("Counting: 7, 8,")
    pad.wait()
    text = pad.generated.inner_text()
    pad.button("copy as code").click()
    expect(pad.node.locator(".fk-code")).to_contain_text("copied")
    copied = pad.page.evaluate("navigator.clipboard.readText()")
    expect(pad.notebook.start(copied)).to_have_text(text, use_inner_text=True)


def test_a_seed_is_used_again(pad: Pad):
    pad.session("set(seed=None)")
    pad.write("Counting: 7, 8,")
    pad.wait()
    seed = pad.session("turns[0].answers[0].seed")
    pad.button(f"seed {seed}").click()
    expect(pad.node.get_by_label("Seed", exact=True)).to_have_value(seed)


def test_the_seed_of_the_second_column_is_used_again(notebook: Notebook):
    pad = started(notebook, "falcon, {'seed': 5}")
    pad.write("Counting: 7, 8,")
    pad.wait()
    pad.button("seed 5").click()
    expect(pad.node.get_by_label("Seed", exact=True)).to_have_value("5")


# Appearance


# Where the first and the last character of a text are.
ENDS = """(node) => {
    const range = document.createRange();
    const left = (at) => (range.setStart(node, at), range.setEnd(node, at + 1), range.getBoundingClientRect().left);
    return [left(0), left(node.length - 1)];
}"""


def test_arabic_and_hebrew_run_from_right_to_left(notebook: Notebook):
    words = "\u05e9\u05dc\u05d5\u05dd (abc)?"
    pad = typist(notebook, [words])
    pad.button("Chat").click()
    pad.write(words)
    pad.wait()
    system = pad.node.get_by_label("System message")
    for field in (pad.field, system):
        field.fill(words)
        assert field.evaluate("(field) => getComputedStyle(field).direction") == "rtl"
    for text in (".fk-message-text", ".fk-token", ".fk-history span"):
        first, last = pad.node.locator(text).first.evaluate(f"(node) => ({ENDS})(node.firstChild)")
        assert last < first, text
    side = pad.node.locator(".fk-text").evaluate("(node) => node.getBoundingClientRect().right")
    token = pad.node.locator(".fk-token").evaluate("(node) => node.getBoundingClientRect().right")
    assert side - token < 5


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_in_the_theme(pad: Pad, dark: bool):
    pad.notebook.change_theme(dark)
    pad.node.get_by_label("Token probabilities").check()
    expect(pad.node).to_have_class(re.compile("fk-probabilities"))  # as the kernel has answered
    pad.write("Counting: 7, 8,")
    pad.wait()
    worst = pad.node.evaluate(CONTRAST)
    assert worst["ratio"] >= 4.5, worst
    assert (worst["page"] < 0.5) is dark


def test_probabilities_and_choices_are_shown_in_a_users_own_colours(pad: Pad):
    pad.node.get_by_label("Token probabilities").check()
    expect(pad.node).to_have_class(re.compile("fk-probabilities"))  # as the kernel has answered
    pad.write("Counting: 7, 8,")
    pad.wait()
    pad.page.emulate_media(forced_colors="active")
    try:
        line = """(token, level) => {
            token.className = `fk-token fk-p${level}`;
            const { textDecorationLine, textDecorationStyle } = getComputedStyle(token);
            return [textDecorationLine, textDecorationStyle];
        }"""
        lines = [tuple(pad.node.locator(".fk-token").first.evaluate(line, level)) for level in range(6)]
        assert lines[:2] == [("none", "solid")] * 2
        assert len({*lines}) == 5
        colour = "(node) => getComputedStyle(node).backgroundColor"
        assert pad.button("Prompt").evaluate(colour) != pad.button("Chat").evaluate(colour)
    finally:
        pad.page.emulate_media(forced_colors="none")


def test_an_answer_that_has_the_focus_is_framed_on_all_sides(pad: Pad):
    pad.write("Counting: 7, 8,")
    pad.wait()
    text = pad.node.locator(".fk-text")
    text.scroll_into_view_if_needed()
    x, y, width, _ = text.bounding_box().values()
    sides = {"left": (x - 3, y + 9, 2, 9), "right": (x + width + 1, y + 9, 2, 9), "top": (x + 9, y - 3, 9, 2)}
    clips = {side: dict(zip(("x", "y", "width", "height"), each, strict=True)) for side, each in sides.items()}
    before = {side: pad.page.screenshot(clip=clip) for side, clip in clips.items()}
    pad.page.keyboard.press("Shift")
    text.evaluate("node => node.focus({ preventScroll: true })")
    assert [side for side, clip in clips.items() if pad.page.screenshot(clip=clip) == before[side]] == []


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_no_violation(pad: Pad, dark: bool):
    pad.notebook.change_theme(dark)
    pad.node.get_by_label("Token probabilities").check()
    expect(pad.node).to_have_class(re.compile("fk-probabilities"))  # as the kernel has answered
    pad.button("Chat").click()
    pad.write("What do giraffes eat?")
    pad.wait()
    pad.node.get_by_label("File, on the machine of the kernel").fill("missing.json")
    pad.button("Load").click()
    expect(pad.notice).to_be_visible()
    assert violations(pad.page, ".fk-playground") == []


@pytest.mark.parametrize("dark", [False, True])
def test_the_edge_of_each_field_stands_out(pad: Pad, dark: bool):
    pad.notebook.change_theme(dark)
    pad.button("Chat").click()
    expect(pad.node.get_by_label("System message")).to_be_visible()
    assert faint_fields(pad.node) == []


def test_every_control_is_large_enough_for_the_pointer(pad: Pad):
    pad.button("Chat").click()
    pad.write("What do giraffes eat?")
    pad.wait()
    pad.button("copy as code").click()
    expect(pad.button("close")).to_be_visible()
    assert small_targets(pad.node) == []


# The lowest contrast (WCAG 2.2) of any visible text against what is painted behind it.
CONTRAST = (
    f"(root) => {{ {PAINTING}"
    + """
    behind(root);
    let worst = { ratio: 99, page: luminance() };
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const [text, node] = [walker.currentNode.data, walker.currentNode.parentElement];
        if (!text.trim() || !node.checkVisibility({ opacityProperty: true })) continue;
        if (node.closest(":disabled, option")) continue; // exempt, and drawn by the system
        behind(node);
        const ground = luminance();
        paint(getComputedStyle(node).color);
        const ratio = contrast(luminance(), ground);
        if (ratio < worst.ratio) worst = { ...worst, ratio, text, kind: node.className };
    }
    return worst;
}"""
)


def test_a_window_of_390_pixels_needs_no_sideways_scrolling(pad: Pad):
    page = pad.page
    wide = page.viewport_size
    for side in ("left", "right"):
        page.evaluate("(side) => jupyterapp.commands.execute('application:toggle-side-tabbar', { side })", side)
    page.evaluate("jupyterapp.shell.collapseLeft(); jupyterapp.shell.collapseRight()")
    page.set_viewport_size({"width": 390, "height": 844})
    try:
        pad.write("Animals of Africa: giraffe, lion,")
        pad.wait()
        expect(pad.node.get_by_label("Temperature", exact=True)).to_be_hidden()
        pad.button("Settings and history").click()
        expect(pad.node.get_by_label("Temperature", exact=True)).to_be_visible()
        assert pad.node.evaluate("(node) => node.scrollWidth <= node.clientWidth")
        box = pad.node.bounding_box()
        assert box["x"] + box["width"] <= 390
        assert pad.node.evaluate(OUTSIDE) == []
    finally:
        page.set_viewport_size(wide)
        for side in ("left", "right"):
            page.evaluate("(side) => jupyterapp.commands.execute('application:toggle-side-tabbar', { side })", side)


OUTSIDE = """(root) => {
    const edge = root.getBoundingClientRect().right + 1;
    const shown = [...root.querySelectorAll("*")].filter((each) => each.checkVisibility());
    return shown.filter((each) => each.getBoundingClientRect().right > edge).map((each) => each.outerHTML);
}"""


def test_every_control_has_a_name_and_the_tab_key_goes_from_top_to_bottom(pad: Pad):
    unnamed = pad.node.evaluate(
        """(root) => [...root.querySelectorAll("button, input, select, textarea, meter")]
            .filter((each) => !(each.getAttribute("aria-label") || each.labels?.length || each.textContent.trim()))
            .map((each) => each.outerHTML)"""
    )
    assert unnamed == []
    pad.button("Prompt").focus()
    stops = ["Prompt"]
    for _ in range(9):
        pad.page.keyboard.press("Tab")
        stops.append(pad.page.evaluate(FOCUSED))
    names = [stop.split("\n")[0].strip() for stop in stops]
    assert names[:7] == ["Prompt", "Chat", "Token probabilities", "Guardrails", "Text", "Examples", "Prompt"]
    assert names[7].startswith("Generate")


FOCUSED = """() => {
    const node = document.activeElement;
    return node.ariaLabel || node.labels?.[0]?.innerText || node.innerText;
}"""


# Typed and generated text is shown as text


@pytest.mark.parametrize("words", HOSTILE, ids=["img", "script", "bidi", "iframe", "braces"])
def test_hostile_text_stays_text(notebook: Notebook, words: str):
    pad = typist(notebook, [words, "."])
    pad.button("Chat").click()
    pad.write(words)
    pad.wait()
    pad.node.get_by_label("Token probabilities").check()
    expect(pad.node).to_have_class(re.compile("fk-probabilities"))  # as the kernel has answered
    pad.node.locator(".fk-token").first.hover()
    pad.button("copy as code").click()
    expect(pad.node.locator(".fk-code")).to_be_visible()
    assert pad.generated.text_content() == words + "."
    assert pad.node.locator(".fk-message-text").text_content() == words
    assert pad.node.locator("img, script, iframe").count() == 0
    assert notebook.page.evaluate("window.hacked") is None


def test_a_prompt_does_not_turn_its_answer_round(notebook: Notebook):
    pad = typist(notebook, ["abc"])
    pad.write("Go \u202e")
    pad.wait()
    first, last = pad.node.locator(".fk-token").evaluate(f"(node) => ({ENDS})(node.firstChild)")
    assert first < last


def test_letters_typed_into_the_playground_are_no_commands_of_the_notebook(pad: Pad):
    cells = pad.page.locator(".jp-Cell").count()
    pad.field.click()
    pad.page.keyboard.type("abdd")
    expect(pad.field).to_have_value("abdd")
    pad.send()
    pad.wait()
    assert pad.page.locator(".jp-Cell").count() == cells
    expect(pad.generated).not_to_be_empty()
