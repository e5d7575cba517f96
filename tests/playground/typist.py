"""Endpoints that generate fixed words, for what Falconet cannot be made to generate."""

import threading
from types import SimpleNamespace

from falcon_kit.generation.text import Piece
from falcon_kit.playground.state import Session


class Typist:
    """An endpoint that generates fixed words, and records its requests."""

    def __init__(self, *words, name="typist", before=lambda number: None):
        self.words, self.model, self.before = words or ("One", " two", " three."), name, before
        self.asked, self.closed = [], threading.Event()

    def stream(self, prompt, **settings):
        self.asked.append((prompt, settings))
        return Typing(self)


class Typing:
    """A stream of a Typist: calls `before` before each word, which may block or raise."""

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
    """Blocks a Typist after some words until it is opened."""

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


def chatting(typist, **options):
    session = Session(typist, **options)
    session.switch("chat")
    return session
