"""What the tests of generation share."""

import pytest


@pytest.fixture
def forwards(instruct):
    """A list that grows by one at every forward pass of the model."""
    calls = []
    handle = instruct.model.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()
