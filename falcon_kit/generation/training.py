"""While `fk.tune` trains a model, no other thread uses it.

Training adds matrices to the layers, drops some of their inputs and changes them at each step. A text that another
thread, such as a playground's, generated meanwhile would be wrong.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TRAINERS: dict[int, int] = {}  # by the id of a model, the thread that trains it
_BEGUN: Counter[int] = Counter()  # by the id of a model, how often training began
_STARTING = threading.Lock()


@contextmanager
def in_training(model: Any) -> Iterator[None]:
    """A context in which other threads cannot use the model. Raises RuntimeError where one of them trains it."""
    with _STARTING:
        check_not_in_training(model)
        _TRAINERS[id(model)] = threading.get_ident()
        _BEGUN[id(model)] += 1
    try:
        yield
    finally:
        del _TRAINERS[id(model)]


@contextmanager
def not_in_training(model: Any) -> Iterator[None]:
    """A context that ends with RuntimeError if another thread trains the model, or has begun to meanwhile."""
    check_not_in_training(model)
    begun = _BEGUN[id(model)]
    yield
    if _BEGUN[id(model)] > begun:
        raise _refusal("has begun to train this model in another thread meanwhile")


def check_not_in_training(model: Any) -> None:
    """Raises RuntimeError if another thread trains the model."""
    if _TRAINERS.get(id(model), threading.get_ident()) != threading.get_ident():
        raise _refusal("is training this model in another thread")


def _refusal(what: str) -> RuntimeError:
    return RuntimeError(
        f"fk.tune {what}, so that its answers would be wrong: wait until the training has ended, or load the model a "
        "second time"
    )
