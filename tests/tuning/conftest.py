"""Models to tune, on one thread."""

import pytest
import torch

import falcon_kit as fk
from tests.conftest import small_model


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small compute no faster with two, and far slower beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def falcon():
    return fk.load("falconet", dtype="float32")


@pytest.fixture(params=["7b", "40b", "rw"])
def any_falcon(request, tokenizer, tmp_path):
    small_model(request.param).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return fk.load(tmp_path / "base", dtype="float32")
