"""What reads a model gives the same numbers whatever its user has set: tuples as outputs, float64, another device."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

import falcon_kit as fk

TEXT = "The giraffe is tall. The giraffe"
PAIRS = [{"axis": "sex", "stereotype": "He is a doctor.", "counterpart": "She is a doctor."}]
READINGS = {
    "ablate": lambda falcon: fk.ablate(falcon, TEXT, heads=[(0, 1)]).after,
    "ablate by means": lambda falcon: fk.ablate(falcon, TEXT, heads=[(0, 1)], replace="mean").after,
    "attention": lambda falcon: fk.attention(falcon, TEXT).head_similarity,
    "gradients": lambda falcon: fk.attribute(falcon, TEXT).scores,
    "leave one out": lambda falcon: fk.attribute(falcon, TEXT, method="leave-one-out").scores,
    "lens": lambda falcon: fk.lens(falcon, TEXT).mlp_contribution,
    "explain": lambda falcon: fk.explain(falcon, TEXT)._record(2).logits,
    "route": lambda falcon: [each["probability"] for each in fk.explain(falcon, TEXT)._route()],
    "page": lambda falcon: [len(fk.explain(falcon, TEXT).page(layers=1).document())],
    "perplexity": lambda falcon: [fk.evaluate(falcon, text=TEXT * 3).perplexity.per_token.value],
    "bias": lambda falcon: [fk.bias(falcon, PAIRS).pairs[0].difference],
    "generation": lambda falcon: falcon.generate(TEXT, max_new_tokens=3).logprobs,
}


def tuples(model, monkeypatch):
    monkeypatch.setattr(model.config, "return_dict", False)


def double(model, _):
    model.double()


def other_device(*_):
    torch.set_default_device("meta")


@pytest.fixture
def own_device():
    """The default device as it was before."""
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("name", READINGS)
def test_a_model_without_its_last_layers_is_read_as_it_is(instruct, name):
    model = copy.deepcopy(instruct.model)
    model.transformer.h = model.transformer.h[:3]
    falcon = dataclasses.replace(instruct, model=model)
    assert len(READINGS[name](falcon)) > 0
    if name == "attention":
        assert fk.attention(falcon, TEXT).spec.layers == 3


@pytest.mark.parametrize("state", [tuples, double, other_device])
@pytest.mark.parametrize("name", READINGS)
def test_a_reading_does_not_depend_on_what_the_user_set(instruct, name, state, monkeypatch, own_device):
    expected = np.asarray(READINGS[name](instruct))
    falcon = dataclasses.replace(instruct, model=copy.deepcopy(instruct.model))
    state(falcon.model, monkeypatch)
    found = READINGS[name](falcon)
    torch.set_default_device(None)
    assert np.asarray(found) == pytest.approx(expected, rel=2e-3 if name != "page" else 0.2, abs=1e-3, nan_ok=True)
