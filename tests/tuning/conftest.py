"""Models to tune, on one thread."""

import json

import pytest
import torch

import falcon_kit as fk
from falcon_kit.tuning import tune
from tests.conftest import small_model
from tests.tuning.cluster import Cluster
from tests.tuning.small_runs import QUICK, ROWS


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models this small compute no faster with two, and far slower beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def short_text(tmp_path_factory):
    """What a run forgets is measured twice, on one sentence in place of eight texts."""
    file = tmp_path_factory.mktemp("text") / "generated_texts.jsonl"
    file.write_text(json.dumps({"text": "The penguin eats fish."}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "GENERATED", file)
        yield


@pytest.fixture(scope="package")
def whole(one_thread, tmp_path_factory):
    """A finished run with `QUICK`."""
    return fk.tune(fk.load("falconet", dtype="float32"), ROWS, output_dir=tmp_path_factory.mktemp("whole"), **QUICK)


@pytest.fixture(scope="package")
def chats(tmp_path_factory):
    """A file of conversations."""
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return file


@pytest.fixture(scope="package")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.process.stdin.close()
    try:
        cluster.process.wait(60)
    finally:
        cluster.process.kill()


@pytest.fixture
def falcon():
    return fk.load("falconet", dtype="float32")


@pytest.fixture(params=["7b", "40b", "rw"])
def any_falcon(request, tokenizer, tmp_path):
    small_model(request.param).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return fk.load(tmp_path / "base", dtype="float32")
