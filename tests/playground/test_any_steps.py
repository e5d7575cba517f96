"""Any sequence of steps in a playground: beside the session runs a plain model of it, and both stay equal."""

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from falcon_kit.playground.state import EXAMPLES, Session
from tests.playground.typist import Typist, failing

TEXTS = st.text(min_size=1, max_size=12)
SEEDS = st.one_of(st.none(), st.integers(0, 2**31))


class Playing(RuleBasedStateMachine):
    """Steps of a person. `shown` is the conversation as texts, `past` what `undo` goes back to.

    A draft of None in `past` is one that the step left as it was. `put` is the draft as a step left it: another one
    was typed, and stays when a step is undone.
    """

    def __init__(self):
        super().__init__()
        self.typist = Typist("One", " two")
        self.session = Session(self.typist)
        self.mode, self.shown, self.draft, self.put = "prompt", [], "", ""
        self.past, self.generated = [], []
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self):
        self.folder.cleanup()

    def remember(self, draft=None):
        self.past.append((self.mode, self.shown, draft))

    def answered(self, text, before, draft=None):
        text = text.encode("utf-8", "replace").decode()
        self.remember(draft)
        self.shown = [*before, text]
        if draft is not None:
            self.draft = self.put = "" if self.mode == "chat" else text
        self.generated.append(text)

    @rule(text=TEXTS)
    def type(self, text):
        self.session.draft = self.draft = text

    @rule(text=TEXTS)
    def generate(self, text):
        if not text.strip():
            self.refused(lambda: self.session.generate(text))
            return
        self.session.generate(text)
        self.answered(text, self.shown if self.mode == "chat" else [], self.taken(text))

    def taken(self, text):
        """The text, if it was the draft or takes its place."""
        return None if self.typed and text != self.draft else text

    @rule()
    def generate_what_is_typed(self):
        if not self.draft.strip():
            self.refused(self.session.generate)
            return
        self.session.generate()
        self.answered(self.draft, self.shown if self.mode == "chat" else [], self.draft)

    @rule(text=TEXTS, after=st.integers(0, 2))
    def generate_until_the_endpoint_breaks(self, text, after):
        if not text.strip():
            return
        self.typist.before = failing(after)
        turn = self.session.generate(text)
        self.typist.before = lambda number: None
        assert turn.answers[0].ending == "error"
        assert turn.answers[0].text == "".join(self.typist.words[:after])
        self.answered(text, self.shown if self.mode == "chat" else [], self.taken(text))

    @rule()
    def regenerate(self):
        if not self.shown:
            self.refused(self.session.regenerate)
            return
        self.session.regenerate()
        self.answered(self.shown[-1], self.shown[:-1])

    @rule(number=st.integers(-1, 4), text=st.sampled_from(["again", "other words"]))
    def edit(self, number, text):
        if not 0 <= number < len(self.shown):
            self.refused(lambda: self.session.edit(number, text))
            return
        self.session.edit(number, text)
        self.answered(text, self.shown[:number])

    @rule()
    def undo(self):
        if not self.past:
            self.refused(self.session.undo)
            return
        self.session.undo()
        self.mode, self.shown, draft = self.past.pop()
        if draft is not None and not self.typed:
            self.draft = self.put = draft

    @property
    def typed(self):
        return self.draft.strip() and self.draft != self.put

    @rule()
    def clear(self):
        self.session.clear()
        if self.shown:
            self.remember()
        self.shown = []

    @rule(mode=st.sampled_from(["prompt", "chat"]))
    def switch(self, mode):
        self.session.switch(mode)
        self.switched(mode)

    def switched(self, mode):
        if mode != self.mode:
            if self.shown:
                self.remember()
            self.mode, self.shown = mode, []

    @rule(title=st.sampled_from([*EXAMPLES]))
    def example(self, title):
        self.session.example(title)
        mode, text = EXAMPLES[title]
        if self.typed or (mode != self.mode and self.shown):
            self.remember(self.draft)
        self.mode, self.shown = mode, self.shown if mode == self.mode else []
        self.draft = self.put = text

    @rule(seed=SEEDS, temperature=st.floats(0.1, 2))
    def change_settings(self, seed, temperature):
        self.session.set(seed=seed, temperature=temperature)
        assert (self.session.settings.seed, self.session.settings.temperature) == (seed, temperature)

    @rule(value=st.sampled_from([-1, float("nan"), "hot", True]))
    def a_setting_out_of_range(self, value):
        before = self.session.settings
        self.refused(lambda: self.session.set(temperature=value))
        assert self.session.settings == before

    @precondition(lambda self: self.generated)
    @rule()
    def save_and_load_elsewhere(self):
        file = self.session.save(Path(self.folder.name) / "session.json")
        other = Session(Typist())
        assert other.load(file) == len(self.generated)
        assert [turn.user for turn in other.history] == self.generated
        assert [turn.answers[0].text for turn in other.history] == [
            turn.answers[0].text for turn in self.session.history
        ]

    def refused(self, step):
        try:
            step()
        except ValueError:
            return
        raise AssertionError("this step should be refused")

    @invariant()
    def the_session_is_what_was_done(self):
        session = self.session
        assert session.running is None
        assert (session.mode, session.draft) == (self.mode, self.draft)
        assert [turn.user for turn in session.turns] == self.shown
        assert [turn.user for turn in session.history] == self.generated
        assert session.can_undo == bool(self.past)
        assert len({turn.id for turn in session.history}) == len(session.history)

    @invariant()
    def a_chat_sends_the_conversation_as_it_is_shown(self):
        if self.mode != "chat" or not self.shown or not self.typist.asked:
            return
        turn = self.session.turns[-1]
        sent = turn.answers[0].prompt
        earlier = [each for each in self.session.turns[:-1] if each.answers[0].text.strip()]
        assert [each["content"] for each in sent if each["role"] == "user"] == [
            *(each.user for each in earlier),
            turn.user,
        ]


Playing.TestCase.settings = settings(max_examples=60, stateful_step_count=20)
test_any_steps_leave_what_was_done = Playing.TestCase
