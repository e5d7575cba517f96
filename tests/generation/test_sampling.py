"""Settings of generation: what each means, and the ranges outside of which they are refused."""

import numpy as np
import pytest

from falcon_kit import Sampling


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"top_k": 5}, True),
        ({"top_p": 0.5}, True),
        ({"top_k": 0}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 0}, False),
        ({"temperature": 0, "top_k": 5}, False),
        ({"do_sample": True}, True),
        ({"do_sample": True, "temperature": 0}, False),
        ({"do_sample": False}, False),
    ],
)
def test_tokens_are_drawn_when_a_setting_says_so(settings, expected):
    assert Sampling(**settings).samples == expected


def test_greedy_decoding_passes_no_setting_of_drawing_on():
    assert Sampling(temperature=0, top_k=5).generate_arguments() == {"do_sample": False}


@pytest.mark.parametrize("settings", [{}, {"top_k": 0}])
def test_an_unset_top_k_is_switched_off_rather_than_left_to_transformers(settings):
    assert Sampling(do_sample=True, **settings).generate_arguments() == {"do_sample": True, "top_k": 0}


@pytest.mark.parametrize(("stop", "expected"), [((), ()), ("a", ("a",)), (["a", "b"], ("a", "b"))])
def test_one_stop_string_is_as_good_as_a_list(stop, expected):
    assert Sampling(stop=stop).stop_strings == expected


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"temperature": -0.1}, "temperature must be 0 .* or more, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 .* or more, got nan"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1, got 1.01"),
        ({"top_k": -1}, r"top_k must be a whole number from 0 to 2\*\*63 - 1, got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1 to .*, got 0"),
        ({"max_length": 0}, "max_length must be a whole number from 1 to .*, got 0"),
        ({"num_return_sequences": 0}, "num_return_sequences must be a whole number from 1 to .*, got 0"),
        ({"num_return_sequences": None}, "num_return_sequences must be a whole number from 1 to .*, got None"),
        ({"max_new_tokens": 5, "max_length": 9}, "give max_new_tokens or max_length, not both"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number .*, got True"),
        ({"max_new_tokens": "10"}, "max_new_tokens must be a whole number .*, got '10'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number .*, got 2.5"),
        ({"temperature": "0.7"}, "temperature must be a number, got '0.7'"),
        ({"alternatives": -1}, "alternatives must be a whole number from 0 to .*, got -1"),
        ({"alternatives": True}, "alternatives must be a whole number"),
        ({"seed": -1}, r"seed must be a whole number from 0 to 2\*\*63 - 1, got -1"),
        ({"seed": 2**70}, r"seed must be a whole number from 0 to 2\*\*63 - 1"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"stop": 5}, "stop must be a text or a list of texts, got 5"),
        ({"stop": [None]}, r"stop must be a text or a list of texts, got \[None\]"),
        ({"stop": ""}, "stop must not contain an empty string"),
        ({"stop": ["a", ""]}, "stop must not contain an empty string"),
        ({"truncate": "right"}, 'truncate must be None or "left"'),
        ({"truncate": np.ones(2)}, 'truncate must be None or "left"'),
        ({"do_sample": False, "top_k": 5}, "have no effect with do_sample=False"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_range(settings, text):
    with pytest.raises(ValueError, match=text):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 8) for name in ("max_new_tokens", "max_length", "top_k", "num_return_sequences", "seed")),
        ("alternatives", 8),
        ("temperature", 0.5),
        ("top_p", 0.5),
        ("do_sample", True),
    ],
)
def test_a_number_of_numpy_is_a_setting_like_pythons(name, value):
    for given in (np.asarray(value)[()], np.asarray(value)):
        settings = Sampling(**{name: given})
        assert settings == Sampling(**{name: value})
        assert type(getattr(settings, name)) is type(value)
