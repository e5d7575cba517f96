"""A playground without its widget: plain Python that can be set, asked and tested.

session = Session(falcon)
session.generate("Counting: 7, 8,")
session.set(temperature=0.5)
session.regenerate()
"""

import secrets
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from falcon_kit.catalogue.card import CARD
from falcon_kit.display.errors import require, unknown_name
from falcon_kit.display.tables import format_bytes
from falcon_kit.generation.chat import Message
from falcon_kit.generation.sampling import SAMPLING_FIELDS, Sampling
from falcon_kit.playground import files
from falcon_kit.playground.export import code
from falcon_kit.playground.lanes import Lane, Prompt, model_name
from falcon_kit.playground.records import MODES, Answer, Mode, Turn
from falcon_kit.playground.writing import Guard, Writing

PRESETS: dict[str, dict[str, Any]] = {
    "card": {"temperature": 1.0, "top_k": 10, "top_p": None},
    "greedy": {"temperature": 0.0, "top_k": None, "top_p": None},
    "precise": {"temperature": 0.3, "top_k": None, "top_p": 0.9},
    "creative": {"temperature": 1.2, "top_k": None, "top_p": 0.95},
}
"""How tokens are drawn: as in the model card, always the likeliest, near to it, or far from it."""
EXAMPLES: dict[str, tuple[Mode, str]] = {
    "Girafatron (the model card's)": ("prompt", CARD.prompt),
    "A list to go on with": ("prompt", "Animals of Africa: giraffe, lion,"),
    "Counting": ("prompt", "Counting: 7, 8,"),
    "A question": ("chat", "What do giraffes eat?"),
    "A question in other words": ("chat", "Please tell me how old owls get."),
}
"""Title, mode and text."""


@dataclass(frozen=True)
class Meter:
    """How full the context is."""

    used: int | None
    """Tokens of the text so far: what the next answer would read, or what the last one read and wrote."""
    context: int | None
    """Tokens there is room for."""
    cache_bytes: int | None
    """Bytes of keys and values of so many tokens."""

    def __str__(self) -> str:
        if self.used is None:
            return "the endpoint counts the tokens"
        room = f" of {self.context}" if self.context else ""
        kept = f", {format_bytes(self.cache_bytes)} of keys and values" if self.cache_bytes is not None else ""
        return f"{self.used}{room} tokens{kept}"


class Session:
    """What a playground knows and does. `generate` waits for the answer; `stop` may come from another thread."""

    def __init__(
        self, falcon: Any, compare: Any = None, guardrails: Guard | None = None, *, mode: Mode | None = None
    ) -> None:
        require(guardrails is None or callable(guardrails), f"guardrails must be callable, got {guardrails!r:.60}")
        self.lanes = _lanes(falcon, compare)
        self.guardrails = guardrails
        self.mode: Mode = "prompt"
        self.draft = ""
        """What stands in the text field."""
        self.system = ""
        """A system message that every conversation begins with; none if empty."""
        self.settings = Sampling(max_new_tokens=200, alternatives=5, **PRESETS["card"])
        """How tokens are drawn; change it with `set`."""
        self.turns: list[Turn] = []
        """The conversation, or the last prompt and its continuation."""
        self.history: list[Turn] = []
        """Every turn of this session, in the order they were finished."""
        self.listeners: list[Callable[[str], None]] = []
        """Called with "start", "piece", "end" or "change", in whichever thread it happens."""
        self._past: list[tuple[Mode, list[Turn], str]] = []
        self._lock = threading.Lock()
        self._writing: Writing | None = None
        if mode is not None:
            self.switch(mode)

    def __repr__(self) -> str:
        models = " beside ".join(lane.name for lane in self.lanes)
        return f"Session({models}, {self.mode} mode, {len(self.history)} turns)"

    @property
    def running(self) -> Turn | None:
        """The turn that is being answered."""
        writing = self._writing
        return writing.turn if writing else None

    @property
    def can_undo(self) -> bool:
        """Whether there is a step to take back."""
        return bool(self._past)

    # Settings

    def set(self, **changes: Any) -> None:
        """Changes fields of the settings: temperature, top_k, top_p, max_new_tokens, stop, seed, alternatives.

        Raises ValueError for a value out of range, and TypeError for a field that does not exist.
        """
        _check_names(changes)
        stop = changes.get("stop")
        if isinstance(stop, list):
            changes["stop"] = tuple(stop)
        self.settings = replace(self.settings, **changes)
        self._tell("change")

    def preset(self, name: str) -> None:
        """Draws tokens as one of `PRESETS` says."""
        require(name in PRESETS, f"there is no preset {name!r}: choose {', '.join(PRESETS)}")
        self.set(**PRESETS[name])

    @property
    def chosen_preset(self) -> str | None:
        """The preset that the settings agree with."""
        held = asdict(self.settings)
        return next((name for name, values in PRESETS.items() if values.items() <= held.items()), None)

    def switch(self, mode: Mode) -> None:
        """Goes from prompts to chat or back. The conversation is cleared; `undo` and the history have it."""
        require(mode in MODES, f"mode {mode!r} is not one of {', '.join(MODES)}")
        if mode != self.mode:
            self._change(self.turns if mode == self.mode else [], mode)

    def example(self, title: str) -> None:
        """Puts one of `EXAMPLES` into the text field."""
        require(title in EXAMPLES, f"there is no example {title!r}: choose {', '.join(EXAMPLES)}")
        mode, text = EXAMPLES[title]
        self.switch(mode)
        self.draft = text
        self._tell("change")

    # Generating

    def generate(self, text: str | None = None) -> Turn:
        """Continues a text or answers a message, by default the draft, with every model; returns when all have ended.

        What goes wrong inside a model is in the answer: its `ending` is "error", with the `reason`. Raises ValueError
        for a blank text, or one that the guardrails refuse, and RuntimeError while another answer is being written.
        """
        text = self.draft if text is None else text
        return self._run(text, self.turns if self.mode == "chat" else [], text)

    def regenerate(self) -> Turn:
        """Answers the last turn again, with the settings of now."""
        require(bool(self.turns), "there is nothing to write again: generate something first")
        return self._run(self.turns[-1].user, self.turns[:-1], self.draft)

    def edit(self, number: int, text: str) -> Turn:
        """Replaces what was written in a turn (counted from 0), drops the turns after it, and answers."""
        require(0 <= number < len(self.turns), f"there is no turn {number}: the conversation has {len(self.turns)}")
        return self._run(text, self.turns[:number], self.draft)

    def stop(self) -> None:
        """Ends the answers that are being written; what there is of them stays."""
        if writing := self._writing:
            writing.stop()

    def undo(self) -> None:
        """Takes the last step back: an answer, an edit, a change of mode, a clearing."""
        self._idle()
        require(bool(self._past), "there is nothing to undo")
        self.mode, self.turns, self.draft = self._past.pop()
        self._tell("change")

    def clear(self) -> None:
        """Empties the conversation; the history stays, and `undo` brings it back."""
        self._change([], self.mode)

    def _idle(self) -> None:
        if self.running is not None:
            raise RuntimeError("an answer is being written: stop it first, or wait for its end")

    def _change(self, turns: list[Turn], mode: Mode) -> None:
        self._idle()
        if self.turns or turns:
            self._past.append((self.mode, self.turns, self.draft))
        self.turns, self.mode = turns, mode
        self._tell("change")

    def _run(self, text: str, before: list[Turn], draft: str) -> Turn:
        """Answers a text that follows on some turns; `undo` brings back the draft."""
        text = text.encode("utf-8", "replace").decode()  # half a character is nothing that a tokenizer takes
        require(bool(text.strip()), "the text is empty: write something first")
        if self.guardrails and (reason := self.guardrails(text)):
            raise ValueError(f"the guardrails refuse this text: {reason}")
        with self._lock:
            self._idle()
            turn = self._turn(text, before)
            self._writing = writing = Writing(turn, self.lanes, self.guardrails, lambda: self._tell("piece"))
        self._past.append((self.mode, self.turns, draft))
        self.turns = [*before, turn]
        self.draft = "" if self.mode == "chat" else text
        try:
            self._tell("start")
            writing()
        finally:
            self.history.append(turn)
            self._writing = None
            self._tell("end")
        return turn

    def _turn(self, text: str, before: list[Turn]) -> Turn:
        seed = self.settings.seed
        seed = secrets.randbelow(2**31) if seed is None else seed
        answers = tuple(
            Answer(
                model=lane.name,
                source=lane.source(),
                prompt=(prompt := self._prompt(number, text, before)),
                settings=_given(replace(self.settings, seed=seed), lane),
                prompt_tokens=lane.count(prompt),
            )
            for number, lane in enumerate(self.lanes)
        )
        return Turn(uuid.uuid4().hex[:12], self.mode, text, answers, tuple(turn.id for turn in before))

    def _prompt(self, number: int, text: str, before: list[Turn]) -> Prompt:
        """What one model is given: the text, or the conversation as it went with this model."""
        if self.mode == "prompt":
            return text
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system.strip() else []
        for turn in before:
            answer = turn.answers[min(number, len(turn.answers) - 1)]
            if answer.text.strip():  # a turn that failed is no part of what follows
                messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": answer.text}]
        return [*messages, {"role": "user", "content": text}]

    # Looking back

    def find(self, id: str) -> Turn:
        """The turn of that id in the history."""
        found = next((turn for turn in reversed(self.history) if turn.id == id), None)
        if found is None:
            raise LookupError(f"the history has no turn {id!r}")
        return found

    def open(self, id: str) -> None:
        """Shows a turn of the history again, with the conversation before it, in place of the present one."""
        turn = self.find(id)
        known = {each.id: each for each in self.history}
        self._change([*(known[each] for each in turn.before if each in known), turn], turn.mode)
        self.draft = turn.user if turn.mode == "prompt" else ""
        self._tell("change")

    def code(self, id: str | None = None) -> str:
        """The Python that writes a turn of the history again, by default the last one."""
        require(bool(self.history), "there is nothing to write again: generate something first")
        return code(self.history[-1] if id is None else self.find(id))

    def save(self, path: str | Path) -> Path:
        """Writes the history into a JSON file."""
        return files.save(self.history, path)

    def load(self, path: str | Path) -> int:
        """Adds the turns of a saved history, opens the last of them, and says how many were new.

        Raises ValueError that says where and what for a file that `save` would not have written; nothing is added then.
        """
        self._idle()
        turns = files.load(path)
        known = {turn.id for turn in self.history}
        new = [turn for turn in turns if turn.id not in known]
        self.history = [*self.history, *new]
        if turns:
            self.open(turns[-1].id)
        self._tell("change")
        return len(new)

    def meter(self) -> Meter:
        """How full the context of the first model is."""
        lane, last = self.lanes[0], self.turns[-1].answers[0] if self.turns else None
        if self.draft.strip() and not (last and self.draft == self.turns[-1].user):
            used = lane.count(self._prompt(0, self.draft, self.turns))
        elif last is None:
            used = 0 if lane.local else None
        else:
            used = None if last.prompt_tokens is None else last.prompt_tokens + last.new_tokens
        return Meter(used, lane.context, None if used is None else lane.cache_bytes(used))

    def _tell(self, event: str) -> None:
        for listener in tuple(self.listeners):
            listener(event)


def _lanes(falcon: Any, compare: Any) -> tuple[Lane, ...]:
    """The models to talk to: one, or two that differ in the model or in settings."""
    require(hasattr(falcon, "stream"), f"a playground needs what fk.load or fk.connect returns, got {falcon!r:.60}")
    if compare is None:
        return (Lane(model_name(falcon), falcon),)
    if isinstance(compare, Mapping):
        _check_names(compare)
        Sampling(**compare)
        changes = ", ".join(f"{name}={value}" for name, value in compare.items())
        first, second = (
            Lane(model_name(falcon), falcon),
            Lane(f"{model_name(falcon)}, {changes}", falcon, dict(compare)),
        )
        if getattr(falcon, "decoding", None):
            second.semaphore = first.semaphore
        return first, second
    require(hasattr(compare, "stream"), f"compare takes another model, or a dict of settings, got {compare!r:.60}")
    names = [model_name(falcon), model_name(compare)]
    names = [f"{name} ({letter})" for name, letter in zip(names, "AB", strict=True)] if len({*names}) == 1 else names
    return Lane(names[0], falcon), Lane(names[1], compare)


def _check_names(settings: Mapping[str, Any]) -> None:
    """Raises TypeError for a setting that does not exist, with the nearest."""
    names = list(SAMPLING_FIELDS)
    for name in settings:
        if name not in names:
            raise TypeError(unknown_name("setting", name, names))


def _given(settings: Sampling, lane: Lane) -> dict[str, Any]:
    """The settings that say something, with those that a model is always given on top."""
    settings = replace(settings, **lane.overrides)
    settings = settings if lane.local else replace(settings, alternatives=0)  # an endpoint hands over none
    chosen = asdict(settings) | {"stop": list(settings.stop_strings)}
    return {name: value for name, value in chosen.items() if value not in (getattr(Sampling(), name), [])}
