"""The widget: it sends changes of the session to the browser, and runs the commands that the browser sends.

The browser stores no state. It sends "hello" when the page opens or reloads, and receives the whole state; after that
it receives changes, at most ten times a second.
"""

import html
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import anywidget

from falcon_kit.display.errors import join_surrogates, require
from falcon_kit.display.page import DOM_SCRIPT, WIDGET_STYLE, static_text
from falcon_kit.display.tables import counted
from falcon_kit.playground.records import Answer, Turn
from falcon_kit.playground.state import EXAMPLES, Session

_SCRIPTS = ("answers.js", "settings.js", "playground.js")
_UPDATE_SECONDS = 0.1  # between two updates
_SHOWN_HISTORY = 100
_GENERATING = ("generate", "regenerate", "edit")  # these commands run in a thread


class Playground(anywidget.AnyWidget):
    """A playground as an ipywidget. It shows `session`, with the changes made to it from Python."""

    _esm = "\n".join([DOM_SCRIPT, *(static_text(__file__, name) for name in _SCRIPTS)])
    _css = WIDGET_STYLE + static_text(__file__, "playground.css")

    def __init__(self, session: Session) -> None:
        self.session = session
        self.notice = ""
        """A message about the last command, for example an error."""
        self.token_probabilities = False
        """Whether tokens are tinted by their probability."""
        self._is_error = False
        self._setting_refused = False  # keeps the notice through the start of the next generation
        self._sent_turns: set[str] = set()  # ids
        self._updater: _Updater | None = None
        super().__init__()
        self.on_msg(self._on_message)
        session.listeners.append(self._on_event)

    def __repr__(self) -> str:
        return f"Playground({self.session!r})"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The widget, and the conversation as plain HTML for a notebook without a kernel."""
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle:
            shown = "".join(turn._repr_html_() for turn in self.session.turns)
            bundle[0]["text/html"] = shown or f"<i>{html.escape(repr(self))}</i>"
        return bundle

    def close(self) -> None:
        """Stops the generation and removes the widget from the page."""
        self.session.stop()
        if self._on_event in self.session.listeners:
            self.session.listeners.remove(self._on_event)
        self._finish_updates()  # the listener that would do so at the end is removed
        super().close()

    # From the browser

    def _on_message(self, _: Any, message: dict[str, Any], buffers: Any) -> None:
        command, values = message.get("do"), {name: value for name, value in message.items() if name != "do"}
        if command in _GENERATING:
            run = threading.Thread(target=self._run, args=(command, values), name="falcon-playground", daemon=True)
            run.start()
        else:
            self._run(command, values)

    def _run(self, command: str | None, values: dict[str, Any]) -> None:
        """Runs a command; an error is shown as a notice."""
        quiet = command in ("hello", "draft", "stop", "code", *_GENERATING)
        try:
            commands = self._commands()
            require(command in commands, f"there is no command {command!r}")
            result = commands[command](**values)
            if not quiet:
                self.show_notice(result if isinstance(result, str) else "")
        except Exception as error:  # noqa: BLE001  # nobody would see an error in a callback
            expected = type(error) in (ValueError, RuntimeError, LookupError)
            self._setting_refused = command == "set"
            self.show_notice(str(error) if expected else f"{type(error).__name__}: {error}", error=True)

    def _commands(self) -> dict[str | None, Callable[..., Any]]:
        session = self.session
        return {
            "hello": self._hello,
            "generate": lambda text: session.generate(join_surrogates(text)),
            "regenerate": session.regenerate,
            "edit": lambda id, text: session.edit([turn.id for turn in session.turns].index(id), join_surrogates(text)),
            "stop": session.stop,
            "undo": session.undo,
            "clear": session.clear,
            "set": lambda changes: session.set(**changes),
            "preset": session.preset,
            "mode": session.switch,
            "example": session.example,
            "draft": self._draft,
            "system": lambda text: setattr(session, "system", join_surrogates(text)),
            "guard": lambda on: session.guard(bool(on)),
            "token_probabilities": lambda shown: setattr(self, "token_probabilities", bool(shown)),
            "open": session.open,
            "save": lambda path: f"Saved {counted(len(session.history), 'turn')} to {session.save(path)}",
            "load": lambda path: f"Loaded {counted(session.load(path), 'turn')} from {path}",
            "code": lambda id: self.send({"type": "code", "id": id, "code": session.code(id)}),
        }

    def _hello(self) -> None:
        columns = [column.name for column in self.session.columns]
        self.send({"type": "start", "columns": columns, "examples": EXAMPLES})
        self._sent_turns.clear()
        self._show()
        self._history()

    def _draft(self, text: str) -> None:
        self.session.draft = join_surrogates(text)
        self.send({"type": "meter", "meter": asdict(self.session.meter())})

    # To the browser

    def show_notice(self, text: str, *, error: bool = False) -> None:
        """Shows a message above the text field; an empty text removes it."""
        self.notice, self._is_error = text, error
        self._show()

    def _on_event(self, event: str) -> None:
        """Called by the session, in any thread."""
        if event == "piece" and self._updater:
            self._updater.changed.set()
        elif event == "start":
            refused, self._setting_refused = self._setting_refused, False
            self.show_notice(self.notice if refused else "", error=refused)
            self._updater = _Updater(self, self.session.turns[-1])
            self._updater.start()
        elif event in ("end", "change"):
            if event == "end":
                self._finish_updates()
            self._show()
            self._history()

    def _finish_updates(self) -> None:
        updater, self._updater = self._updater, None
        if updater:
            updater.finish()

    def _show(self) -> None:
        """Sends the state, and the turns that the browser does not have yet."""
        session = self.session
        for turn in session.turns:
            if turn.id not in self._sent_turns:
                self._sent_turns.add(turn.id)
                answers = [_summary(each) | {"spans": each.spans[:]} for each in turn.answers]
                self.send({"type": "turn", "turn": vars(turn) | {"answers": answers}})
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
                "token_probabilities": self.token_probabilities,
                "guarded": session.guarded,
                "can_undo": session.can_undo,
                "meter": asdict(session.meter()),
                "notice": {"text": self.notice, "kind": "error" if self._is_error else "news"},
            }
        )

    def _history(self) -> None:
        shown = [
            {"id": turn.id, "title": _title(turn.user), "note": counted(turn.answers[0].new_tokens, "token")}
            for turn in reversed(self.session.history[-_SHOWN_HISTORY:])
        ]
        self.send({"type": "history", "turns": shown})


class _Updater(threading.Thread):
    """Sends the new text of a turn to the browser, at once for the first token, then at most ten times a second."""

    def __init__(self, widget: Playground, turn: Turn) -> None:
        super().__init__(name="falcon-playground-updater", daemon=True)
        self.widget, self.turn = widget, turn
        self.changed = threading.Event()
        self._done = threading.Event()
        self._sent_spans = [0] * len(turn.answers)

    def run(self) -> None:
        while not self._done.is_set():
            self.changed.wait()
            self.changed.clear()
            self._send_new_spans()
            self._done.wait(_UPDATE_SECONDS)

    def finish(self) -> None:
        """Sends the rest and ends the thread."""
        self._done.set()
        self.changed.set()
        self.join()
        self._send_new_spans()

    def _send_new_spans(self) -> None:
        answers = []
        for number, answer in enumerate(self.turn.answers):
            at = self._sent_spans[number]
            spans = answer.spans[at:]
            self._sent_spans[number] = at + len(spans)
            answers.append(_summary(answer) | {"at": at, "spans": spans})
        meter = asdict(self.widget.session.meter())
        self.widget.send({"type": "delta", "id": self.turn.id, "answers": answers, "meter": meter})


def _summary(answer: Answer) -> dict[str, Any]:
    """The state of an answer without its text."""
    names = ("model", "ending", "reason", "new_tokens", "tokens_per_second", "first_token_seconds", "seed")
    return {name: getattr(answer, name) for name in names}


def _title(text: str) -> str:
    """A text in one line, with its beginning and end if it is long."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:28]} … {line[-29:]}"
