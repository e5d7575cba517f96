"""An inspection of a model with which another thread computes: neither changes the other's result."""

from threading import Thread

import numpy as np
import pytest

import falcon_kit as fk
from falcon_kit.explanation.route import route
from falcon_kit.inspection.ablation import head_means
from falcon_kit.inspection.hooks import inspect_model
from tests.inspection.models import logits

TEXT, OTHER = "The giraffe is tall. The giraffe", list(range(1, 6))
INSPECTIONS = {
    "attention": lambda falcon: fk.attention(falcon, TEXT).head_similarity,
    "lens": lambda falcon: fk.lens(falcon, TEXT).mlp_contribution,
    "ablate": lambda falcon: fk.ablate(falcon, TEXT, heads=[(0, 1), (3, 2)]).after,
    "head_means": lambda falcon: head_means(falcon, TEXT),
    "route": lambda falcon: [
        (each.position, each.head, each.key) for each in route(inspect_model(falcon), falcon.tokenizer(TEXT).input_ids)
    ],
}


@pytest.fixture
def computing_beside(instruct):
    """Whenever this test runs the model, another thread runs it on another text, after each layer of this one."""
    found: list[np.ndarray] = []

    def beside(*_) -> None:
        if not running:
            running.append(True)
            thread = Thread(target=lambda: found.append(logits(instruct.model, OTHER)))
            thread.start()
            thread.join()
            running.clear()

    running: list[bool] = []
    hooks = [layer.register_forward_hook(beside) for layer in instruct.model.transformer.h]
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", INSPECTIONS)
def test_an_inspection_beside_another_thread_is_that_of_one_alone(name, instruct, request):
    inspect, alone = INSPECTIONS[name], logits(instruct.model, OTHER)
    expected = np.asarray(inspect(instruct))
    found = request.getfixturevalue("computing_beside")
    np.testing.assert_array_equal(np.asarray(inspect(instruct)), expected)
    assert len(found) >= instruct.spec.layers
    assert all(np.array_equal(each, alone) for each in found)
