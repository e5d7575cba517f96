"""A playground without its widget, used from Python:

session = Session(falcon)
session.generate("Counting: 7, 8,")
session.set(temperature=0.5)
session.regenerate()
"""

import secrets
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from falcon_kit.catalogue.card import CARD
from falcon_kit.display.errors import check_flag, is_whole, join_surrogates, printable, require, shown
from falcon_kit.display.tables import counted
from falcon_kit.generation.chat import Message
from falcon_kit.generation.guarding import check_guard
from falcon_kit.generation.sampling import Sampling
from falcon_kit.guardrails.guard import Guardrails
from falcon_kit.playground import files
from falcon_kit.playground.columns import Prompt, check_names, columns_of
from falcon_kit.playground.records import MODES, Answer, Meter, Mode, Turn
from falcon_kit.playground.writing import TurnWriter

PRESETS: dict[str, dict[str, Any]] = {
    "card": {"temperature": 1.0, "top_k": 10, "top_p": None},
    "greedy": {"temperature": 0.0, "top_k": None, "top_p": None},
    "precise": {"temperature": 0.3, "top_k": None, "top_p": 0.9},
    "creative": {"temperature": 1.2, "top_k": None, "top_p": 0.95},
}
"""How the next token is chosen: as in the model card, always the likeliest, with little or with much randomness."""
EXAMPLES: dict[str, tuple[Mode, str]] = {
    "Girafatron (the model card's)": ("prompt", CARD.prompt),
    "A list to continue": ("prompt", "Animals of Africa: giraffe, lion,"),
    "Counting": ("prompt", "Counting: 7, 8,"),
    "A question": ("chat", "What do giraffes eat?"),
    "A question in other words": ("chat", "Please tell me how old owls get."),
}
"""Title, mode and text."""


class Session:
    """The state of a playground. `generate` blocks until the end; `stop` may be called from another thread."""

    def __init__(self, falcon: Any, compare: Any = None, guardrails: Guardrails | None = None) -> None:
        check_guard(guardrails)
        self.columns = columns_of(falcon, compare)
        self.guardrails = guardrails
        """The checks of prompts and answers, while `guarded`."""
        self.guarded = guardrails is not None
        """Whether prompts and answers are checked; change it with `guard`."""
        self.mode: Mode = "prompt"
        self.draft = ""
        """The content of the text field."""
        self.system = ""
        """The system message of every conversation; none if empty."""
        initial = {"max_new_tokens": 200, **PRESETS["card"]} | self.columns[0].checkpoint_settings
        self.settings = self._checked(Sampling(alternatives=5, **initial))
        """The settings of generation, at first those of the checkpoint or the card; change them with `set`."""
        self.turns: list[Turn] = []
        """The conversation, or the last prompt and its continuation."""
        self.history: list[Turn] = []
        """Every turn of this session, in the order in which they ended."""
        self.listeners: list[Callable[[str], None]] = []
        """Called with "start", "piece", "end" or "change", in any thread."""
        # Mode, turns, draft and system message; None for what the step did not change, and undo leaves as it is.
        self._undo_steps: list[tuple[Mode, list[Turn], str | None, str | None]] = []
        self._put = ""  # the draft as a step left it; another one was typed since
        self._lock = threading.Lock()
        self._writer: TurnWriter | None = None

    def __repr__(self) -> str:
        models = " and ".join(printable(column.name) for column in self.columns)
        return f"Session({models}, {self.mode} mode, {counted(len(self.history), 'turn')})"

    @property
    def running(self) -> Turn | None:
        """The turn whose answers are being generated."""
        writer = self._writer
        return writer.turn if writer else None

    @property
    def can_undo(self) -> bool:
        """Whether there is a step to undo."""
        return bool(self._undo_steps)

    # Settings

    def set(self, **changes: Any) -> None:
        """Changes fields of the settings: temperature, top_k, top_p, max_new_tokens, stop, seed, alternatives.

        Raises ValueError for a value out of range, and TypeError for a field that does not exist.
        """
        check_names(changes)
        self.settings = self._checked(replace(self.settings, **changes))
        self._notify("change")

    def _checked(self, settings: Sampling) -> Sampling:
        """The settings. Raises ValueError for those with which a column could not generate."""
        for column in self.columns:
            sequences = column.in_force(settings).num_return_sequences
            require(
                sequences == 1,
                f"a playground shows one text of each model, so num_return_sequences is 1, not {sequences}",
            )
        return settings

    def guard(self, on: bool) -> None:
        """Turns the guardrails on or off, from the next turn on; `fk.guardrails()` if none were given."""
        check_flag("on", on)
        if on and self.guardrails is None:
            self.guardrails = Guardrails()
        self.guarded = on
        self._notify("change")

    def preset(self, name: str) -> None:
        """Sets the values of one of `PRESETS`."""
        require(name in PRESETS, f"there is no preset {name!r}: choose {', '.join(PRESETS)}")
        self.set(**PRESETS[name])

    @property
    def chosen_preset(self) -> str | None:
        """The preset whose values the settings have; None if there is none."""
        settings = asdict(self.settings)
        return next((name for name, values in PRESETS.items() if values.items() <= settings.items()), None)

    def switch(self, mode: Mode) -> None:
        """Switches between prompts and chat. Clears the conversation; `undo` restores it, and the history keeps it."""
        require(mode in MODES, f"mode {mode!r} is not one of {', '.join(MODES)}")
        if mode != self.mode:
            self._replace([], mode)
            self._notify("change")

    def example(self, title: str) -> None:
        """Puts one of `EXAMPLES` into the text field; `undo` gives back what was typed there."""
        require(title in EXAMPLES, f"there is no example {title!r}: choose {', '.join(EXAMPLES)}")
        mode, text = EXAMPLES[title]
        if mode != self.mode:
            self._replace([], mode, draft=text)
        else:
            self._remember(self.turns, draft=text)
        self._notify("change")

    # Generating

    def generate(self, text: str | None = None) -> Turn:
        """Continues a prompt or answers a message, by default the draft, with every model; returns when all have ended.

        Another text than the draft leaves in the field what is typed there.
        An error of a model is stored in its answer: `ending` is "error", and `reason` describes it. Raises ValueError
        for a blank text or one that the guardrails refuse, and RuntimeError during another generation.
        """
        text = self.draft if text is None else text
        draft = None if self._typed and text != self.draft else text
        return self._run(text, self.turns if self.mode == "chat" else [], draft)

    def regenerate(self) -> Turn:
        """Answers the last turn again, with the current settings. The draft stays."""
        require(bool(self.turns), "there is no turn to generate again: generate something first")
        return self._run(self.turns[-1].user, self.turns[:-1])

    def edit(self, number: int, text: str) -> Turn:
        """Replaces the text of a turn (counted from 0), drops the turns after it, and answers it. The draft stays."""
        exists = is_whole(number, 0, len(self.turns) - 1)
        require(exists, f"there is no turn {shown(number)}: the conversation has {len(self.turns)}, counted from 0")
        return self._run(text, self.turns[:number])

    def stop(self) -> None:
        """Stops the generation; the texts so far stay."""
        if writer := self._writer:
            writer.stop()

    def undo(self) -> None:
        """Undoes the last step: an answer, an edit, a change of mode, a clearing, an example in place of a draft.

        What was typed since that step stays in the text field.
        """
        self._require_idle()
        require(bool(self._undo_steps), "there is nothing to undo")
        self.mode, self.turns, draft, system = self._undo_steps.pop()
        if draft is not None and not self._typed:
            self.draft = self._put = draft
        self.system = self.system if system is None else system
        self._notify("change")

    def clear(self) -> None:
        """Clears the conversation; the history stays, and `undo` restores the conversation."""
        self._replace([], self.mode)
        self._notify("change")

    def _require_idle(self) -> None:
        if self.running is not None:
            raise RuntimeError("an answer is being generated: stop it first, or wait for its end")

    def _replace(self, turns: list[Turn], mode: Mode, system: str | None = None, draft: str | None = None) -> None:
        """Replaces the conversation and, if they are given, the system message and the draft."""
        self._require_idle()
        self._remember(turns, system, draft)
        self.turns, self.mode = turns, mode

    def _remember(self, turns: list[Turn], system: str | None = None, draft: str | None = None) -> None:
        """Keeps for `undo` what a step takes away, if it does, and replaces the system message and the draft."""
        if (turns is not self.turns and (self.turns or turns)) or (draft is not None and self._typed):
            kept = None if draft is None else self.draft, None if system is None else self.system
            self._undo_steps.append((self.mode, self.turns, *kept))
        if draft is not None:
            self.draft = self._put = draft
        self.system = self.system if system is None else system

    @property
    def _typed(self) -> bool:
        """Whether the draft is not what a step left."""
        return bool(self.draft.strip()) and self.draft != self._put

    def _run(self, text: str, before: list[Turn], draft: str | None = None) -> Turn:
        """Answers a text after the turns `before`. draft: the text, if the field and `undo` have it; None: it stays."""
        text = join_surrogates(text)
        require(bool(text.strip()), "the text is empty: write something first")
        guard = self.guardrails if self.guarded else None
        for each in self._texts(text, before):
            reasons = guard.check(each, "prompt").reasons if guard else ""
            require(not reasons, f"the guardrails refuse this text: {reasons}")
        turn = self._turn(text, before)
        writer = TurnWriter(turn, self.columns, guard, lambda: self._notify("piece"))
        try:
            with self._lock:
                self._require_idle()
                self._writer = writer
            self._undo_steps.append((self.mode, self.turns, draft, None))
            self.turns = [*before, turn]
            if draft is not None:
                self.draft = self._put = "" if self.mode == "chat" else text
            self._notify("start")
            writer()
        finally:
            if self._writer is writer:  # and not another one, which it would have to wait for
                writer.cancel()
                self.history.append(turn)
                self._writer = None
                self._notify("end")
        return turn

    def _turn(self, text: str, before: list[Turn]) -> Turn:
        seed = self.settings.seed
        seed = secrets.randbelow(2**31) if seed is None else seed
        prompts = (self._prompt(number, text, before) for number in range(len(self.columns)))
        answers = tuple(
            Answer(
                model=column.name,
                source=column.source(),
                prompt=prompt,
                settings=column.changed(replace(self.settings, seed=seed)),
                prompt_tokens=column.count(prompt),
            )
            for column, prompt in zip(self.columns, prompts, strict=True)
        )
        return Turn(uuid.uuid4().hex[:12], self.mode, text, answers, tuple(turn.id for turn in before))

    def _prompt(self, number: int, text: str, before: list[Turn]) -> Prompt:
        """The prompt of one model: the text, or the conversation with this model's own answers."""
        if self.mode == "prompt":
            return text
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system.strip() else []
        for turn in before:
            answer = turn.answers[min(number, len(turn.answers) - 1)]
            if answer.text.strip():  # a failed turn is left out
                messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": answer.text}]
        return [*messages, {"role": "user", "content": text}]

    def _texts(self, text: str, before: list[Turn]) -> list[str]:
        """What the models will read, each text once: the text, the system message, the earlier turns."""
        prompts = [] if self.mode == "prompt" else [self._prompt(at, text, before) for at in range(len(self.columns))]
        return [*dict.fromkeys([text, *(cast(Message, each)["content"] for prompt in prompts for each in prompt)])]

    # The history

    def find(self, id: str) -> Turn:
        """The turn with that id in the history."""
        for turn in reversed(self.history):
            if turn.id == id:
                return turn
        raise LookupError(f"the history has no turn {id!r}")

    def open(self, id: str) -> None:
        """Replaces the conversation by a turn of the history with its earlier turns and its system message."""
        turn, by_id = self.find(id), {each.id: each for each in self.history}
        turns = [*(by_id[each] for each in turn.before if each in by_id), turn]
        draft = turn.user if turn.mode == "prompt" else ""
        self._replace(turns, turn.mode, _system(turn.answers[0].prompt), draft)
        self._notify("change")

    def code(self, id: str | None = None) -> str:
        """Python that generates a turn of the history again, by default the last one."""
        require(bool(self.history), "there is no turn to generate again: generate something first")
        return files.as_code(self.history[-1] if id is None else self.find(id))

    def save(self, path: str | Path) -> Path:
        """Writes the history, and whether the guardrails are on, into a JSON file.

        Raises ValueError for a file with other turns, or with something else, which would be lost.
        """
        files.check_nothing_is_lost(self.history, path)
        return files.save(self.history, path, self.guarded)

    def load(self, path: str | Path) -> int:
        """Adds the turns of a saved history, opens the last one, and returns how many were new.

        Guardrails that were on when it was saved are turned on; a file never turns them off.
        Raises ValueError for a file that `save` cannot have written, with place and reason, and then adds nothing.
        """
        self._require_idle()
        turns, guarded = files.load(path)
        known = {turn.id for turn in self.history}
        new = [turn for turn in turns if turn.id not in known]
        self.history = [*self.history, *new]
        if turns:
            self.open(turns[-1].id)
        self.guard(self.guarded or guarded)
        return len(new)

    def meter(self) -> Meter:
        """How much of the first model's context is used."""
        column, last = self.columns[0], self.turns[-1].answers[0] if self.turns else None
        if self.draft.strip() and not (last and self.draft == self.turns[-1].user):
            used = column.count(self._prompt(0, self.draft, self.turns))
        elif last is None:
            used = 0 if column.local else None
        else:
            used = None if last.prompt_tokens is None else last.prompt_tokens + last.new_tokens
        return Meter(used, column.context, None if used is None else column.cache_bytes(used))

    def _notify(self, event: str) -> None:
        for listener in tuple(self.listeners):
            listener(event)


def _system(prompt: Prompt) -> str | None:
    """The system message of a conversation, "" if it has none; None for a prompt."""
    if isinstance(prompt, str):
        return None
    return next((message["content"] for message in prompt if message["role"] == "system"), "")
