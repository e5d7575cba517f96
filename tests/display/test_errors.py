"""Errors about unknown names, checks, and how a process ended."""

import copy
import pickle

import numpy as np
import pytest
import torch

import falcon_kit as fk
from falcon_kit.display.errors import check_flag, exit_cause, require, unknown_name
from falcon_kit.display.reading import TwiceNamed
from falcon_kit.generation.text import TextOutOfMemory
from falcon_kit.serving.failures import Unavailable
from falcon_kit.serving.stream import TextBeyondContext

MODELS = ("falcon-40b", "falcon-7b")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("tiiuae/Falcon-40", "Unknown model 'tiiuae/Falcon-40'. Nearest: falcon-40b, falcon-7b."),
        ("gpt2", "Unknown model 'gpt2'. Known: falcon-40b, falcon-7b."),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_or_with_all(given, expected):
    assert expected == unknown_name("model", given, MODELS)


def test_a_check_raises_its_message_only_when_it_fails():
    require(True, "not raised")
    with pytest.raises(ValueError, match="batch=0: give at least 1"):
        require(False, "batch=0: give at least 1")


@pytest.mark.parametrize("flag", [True, np.True_, np.array(False), torch.tensor(True), None])
def test_a_flag_may_be_of_numpy_or_torch_as_a_number_may(flag):
    check_flag("chat", flag, None)


@pytest.mark.parametrize("other", [1, 0.0, "yes", np.int64(1), [True]])
def test_what_is_no_flag_is_refused(other):
    with pytest.raises(ValueError, match="chat must be True, False or None; got"):
        check_flag("chat", other, None)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (3, "ended with exit code 3"),
        (-9, "was killed by SIGKILL, perhaps out of memory"),
        (-11, "was killed by SIGSEGV"),
        (-35, "was killed by signal 35"),  # a real-time signal has no name
    ],
)
def test_the_end_of_a_process_is_named_by_its_exit_code_or_signal(code, expected):
    assert exit_cause(code) == expected


# Errors that carry results


def carried():
    """Each error of the kit that has more than a message."""
    stats = fk.Stats(1, 1, 1, 0.1, 0.2)
    generation = fk.Generation("prompt", "text", (1,), None, "broken", stats)
    errors = [
        fk.Blocked(fk.guardrails(blocked_words=["bad"]).check("bad"), "prompt 2 of 3"),
        fk.NotEnoughMemory(fk.plan("falcon-180b"), "no room"),
        fk.IncompleteAnswer("the server is gone", generation),
        TextBeyondContext("too long", generation),
        TextOutOfMemory("out of memory", [generation]),
        TwiceNamed("key"),
        Unavailable("busy", retry_after=3.0),
    ]
    return {type(each).__name__: each for each in errors}


def through_a_pipe(error):
    return pickle.loads(pickle.dumps(error))  # noqa: S301  # as a process pool does


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, through_a_pipe])
@pytest.mark.parametrize("name", carried())
def test_an_error_that_reaches_another_process_is_whole(name, again):
    error = carried()[name]
    error.add_note("a note")
    found = again(error)
    assert (type(found), str(found), found.args) == (type(error), str(error), error.args)
    assert repr(vars(found)) == repr(vars(error))
