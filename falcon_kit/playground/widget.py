"""The widget: what happens in the session goes to the browser in small steps, what people do there comes back.

The browser keeps nothing of its own. It says hello when it opens, also after a reload, and is told everything; from
then on it is told what changes, ten times a second at most.
"""

import html
import threading
from collections.abc import Callable
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import anywidget

from falcon_kit.display.errors import require
from falcon_kit.playground.files import pack_span, pack_turn
from falcon_kit.playground.records import Answer, Turn
from falcon_kit.playground.state import EXAMPLES, Session

_STATIC = files("falcon_kit.playground") / "static"
_SCRIPTS = ("dom.js", "answers.js", "settings.js", "playground.js")
_PAUSE = 0.1  # seconds between two updates
_SHOWN_HISTORY = 100
_WRITING = ("generate", "regenerate", "edit")  # commands that take their time


class Playground(anywidget.AnyWidget):
    """A playground as an ipywidget. `session` is what it shows; whatever is done there appears here."""

    _esm = "\n".join((_STATIC / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    _css = (_STATIC / "playground.css").read_text(encoding="utf-8")

    def __init__(self, session: Session) -> None:
        self.session = session
        self.notice = ""
        """What the last step has to say, an error for example."""
        self.odds = False
        """Whether tokens are tinted by their probability."""
        self._alarm = False
        self._refused = False  # a setting, since the last text: what is said of it outlasts the start of the next
        self._known: set[str] = set()  # turns that the browser has been told of
        self._painter: _Painter | None = None
        super().__init__()
        self.on_msg(self._received)
        session.listeners.append(self._happened)

    def __repr__(self) -> str:
        return f"Playground({self.session!r})"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The widget, and the conversation as plain HTML for readers without a kernel."""
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle:
            shown = "".join(turn._repr_html_() for turn in self.session.turns)
            bundle[0]["text/html"] = shown or f"<i>{html.escape(repr(self))}</i>"
        return bundle

    def close(self) -> None:
        """Stops what is being written and takes the widget off the page."""
        self.session.stop()
        if self._happened in self.session.listeners:
            self.session.listeners.remove(self._happened)
        self._finish_painting()  # nobody tells it of the end any more
        super().close()

    # From the browser

    def _received(self, _: Any, message: dict[str, Any], buffers: Any) -> None:
        command, values = message.get("do"), {name: value for name, value in message.items() if name != "do"}
        if command in _WRITING:
            run = threading.Thread(target=self._try, args=(command, values), name="falcon-playground", daemon=True)
            run.start()
        else:
            self._try(command, values)

    def _try(self, command: str | None, values: dict[str, Any]) -> None:
        """Does what was asked; what goes wrong is shown, and the widget stays usable."""
        quiet = command in ("hello", "draft", "stop", "code", *_WRITING)
        try:
            commands = self._commands()
            require(command in commands, f"there is no command {command!r}")
            said = commands[command](**values)
            if not quiet:
                self.say(said if isinstance(said, str) else "")
        except Exception as error:  # noqa: BLE001  # an error in a callback would be seen by nobody
            ours = type(error) in (ValueError, RuntimeError, LookupError)
            self._refused = command == "set"
            self.say(str(error) if ours else f"{type(error).__name__}: {error}", alarm=True)

    def _commands(self) -> dict[str | None, Callable[..., Any]]:
        session = self.session
        return {
            "hello": self._hello,
            "generate": lambda text: session.generate(_whole(text)),
            "regenerate": session.regenerate,
            "edit": lambda id, text: session.edit([turn.id for turn in session.turns].index(id), _whole(text)),
            "stop": session.stop,
            "undo": session.undo,
            "clear": session.clear,
            "set": lambda changes: session.set(**changes),
            "preset": lambda name: session.preset(name),
            "mode": lambda mode: session.switch(mode),
            "example": lambda title: session.example(title),
            "draft": self._draft,
            "system": lambda text: setattr(session, "system", _whole(text)),
            "odds": lambda shown: setattr(self, "odds", bool(shown)),
            "open": lambda id: session.open(id),
            "seed": lambda id: session.set(seed=session.find(id).answers[0].seed),
            "save": lambda path: f"Saved {_turns(len(session.history))} to {session.save(path)}",
            "load": lambda path: f"Loaded {_turns(session.load(path))} from {path}",
            "code": lambda id: self.send({"type": "code", "id": id, "code": session.code(id)}),
        }

    def _hello(self) -> None:
        self.send({"type": "start", "lanes": [lane.name for lane in self.session.lanes], "examples": EXAMPLES})
        self._known.clear()
        self._show()
        self._history()

    def _draft(self, text: str) -> None:
        self.session.draft = _whole(text)
        self.send({"type": "meter", "meter": asdict(self.session.meter())})

    # To the browser

    def say(self, text: str, *, alarm: bool = False) -> None:
        """Shows a line of news above the text field, or takes it away."""
        self.notice, self._alarm = text, alarm
        self._show()

    def _happened(self, event: str) -> None:
        """What the session did, in whichever thread."""
        if event == "piece" and self._painter:
            self._painter.dirty.set()
        elif event == "start":
            refused, self._refused = self._refused, False
            self.say(self.notice if refused else "", alarm=refused)
            self._painter = _Painter(self, self.session.turns[-1])
            self._painter.start()
        elif event == "end":
            self._finish_painting()
            self._show()
            self._history()
        elif event == "change":
            self._show()
            self._history()

    def _finish_painting(self) -> None:
        painter, self._painter = self._painter, None
        if painter:
            painter.finish()

    def _show(self) -> None:
        """Everything but the texts; and the texts that the browser has not seen."""
        session = self.session
        for turn in session.turns:
            if turn.id not in self._known:
                self._known.add(turn.id)
                self.send({"type": "turn", "turn": _packed(turn)})
        self.send(
            {
                "type": "state",
                "mode": session.mode,
                "running": session.running.id if session.running else None,
                "turns": [turn.id for turn in session.turns],
                "draft": session.draft,
                "system": session.system,
                "settings": asdict(session.settings) | {"stop": list(session.settings.stop_strings)},
                "preset": session.chosen_preset,
                "odds": self.odds,
                "can_undo": session.can_undo,
                "meter": asdict(session.meter()),
                "notice": {"text": self.notice, "kind": "error" if self._alarm else "news"},
            }
        )

    def _history(self) -> None:
        shown = [
            {"id": turn.id, "title": _title(turn.user), "note": f"{turn.answers[0].new_tokens} tokens"}
            for turn in reversed(self.session.history[-_SHOWN_HISTORY:])
        ]
        self.send({"type": "history", "turns": shown})


class _Painter(threading.Thread):
    """Tells the browser how a turn grows, the first word at once and then ten times a second at most."""

    def __init__(self, widget: Playground, turn: Turn) -> None:
        super().__init__(name="falcon-playground-painter", daemon=True)
        self.widget, self.turn = widget, turn
        self.dirty = threading.Event()
        self._done = threading.Event()
        self._told = [0] * len(turn.answers)

    def run(self) -> None:
        while not self._done.is_set():
            self.dirty.wait()
            self.dirty.clear()
            self._paint()
            self._done.wait(_PAUSE)

    def finish(self) -> None:
        """Tells the rest."""
        self._done.set()
        self.dirty.set()
        self.join()
        self._paint()

    def _paint(self) -> None:
        answers = []
        for number, answer in enumerate(self.turn.answers):
            at, spans = self._told[number], answer.spans[self._told[number] :]
            self._told[number] = at + len(spans)
            answers.append(_facts(answer) | {"at": at, "spans": [pack_span(span) for span in spans]})
        meter = asdict(self.widget.session.meter())
        self.widget.send({"type": "delta", "id": self.turn.id, "answers": answers, "meter": meter})


def _facts(answer: Answer) -> dict[str, Any]:
    """How an answer stands, without its text."""
    names = ("model", "ending", "reason", "new_tokens", "tokens_per_second", "first_token_seconds", "seed")
    return {name: getattr(answer, name) for name in names}


def _turns(count: int) -> str:
    return f"{count} turn" if count == 1 else f"{count} turns"


def _title(text: str) -> str:
    """The beginning and the end of a text, which may be a long one, in a line."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:28]} … {line[-29:]}"


def _packed(turn: Turn) -> dict[str, Any]:
    packed = pack_turn(turn)
    packed["answers"] = [
        _facts(answer) | {"spans": [pack_span(span) for span in answer.spans]} for answer in turn.answers
    ]
    return packed


def _whole(text: str) -> str:
    """The text without halves of characters, which a browser can send and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
