"""The checks of notebook 06 from both sides: right answers pass, typical mistakes get their hint."""

import pytest

import falcon_kit as fk
from falcon_kit.catalogue.memory import lora_parameters

SHARES = {
    name: lora_parameters(fk.spec(name), r=8) / fk.spec(name).parameters
    for name in ("falconet", "falcon-7b", "falcon-40b")
}


@pytest.mark.parametrize("given", [("06.1", SHARES), ("06.2", 20, 0.4, 0.5), ("06.2", 20, 0.5, 0.4), ("06.3", 0.0)])
def test_right_answers_pass(given):
    assert fk.check(*given)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (("06.1", {name: 100 * share for name, share in SHARES.items()}), "in percent"),
        (("06.1", {name: share / 2 for name, share in SHARES.items()}), "both an A and a B"),
        (("06.1", {name: share / 4 for name, share in SHARES.items()}), "all four layers"),
        (("06.1", dict.fromkeys(SHARES, 0.5)), "divide lora_parameters"),
        (("06.2", 16, 0.4, 0.5), "different shapes"),
        (("06.2", 4, 0.4, 0.5), "is smaller"),
        (("06.2", 7, 0.4, 0.5), "and round"),
        (("06.2", 20, 0.4, 0.4), "target_modules"),
        (("06.2", 20, 0.4), "Expected"),
        (("06.3", True), "as a number"),
        (("06.3", -0.1), "absolute"),
        (("06.3", 1e-4), "the same bits"),
    ],
)
def test_a_typical_mistake_gets_its_hint(given, hint):
    outcome = fk.check(*given)
    assert not outcome
    assert hint in outcome.text
