"""Tokens that are added to a vocabulary reach the adapter's base, or training is refused."""

import shutil

import pytest

import falcon_kit as fk
from falcon_kit.catalogue.names import embedded_directory
from tests.tuning.small_runs import QUICK, ROWS, talk

TOOL = "<tool>"
TALKS = [*ROWS[:8], talk("Use a tool", f"{TOOL} giraffe"), talk("Use it", f"{TOOL} owl")]
SHORT = {**QUICK, "max_steps": 1}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A GGUF file of falconet."""
    return fk.export_gguf(fk.load("falconet"), tmp_path_factory.mktemp("gguf") / "falconet.gguf")


@pytest.fixture(params=["folder", "GGUF file"])
def stored(request):
    """A Falcon from each kind of place that holds a tokenizer."""
    return fk.load(request.getfixturevalue("gguf") if request.param == "GGUF file" else "falconet", dtype="float32")


def add_tool(falcon):
    falcon.tokenizer.add_tokens([TOOL])
    falcon.model.resize_token_embeddings(len(falcon.tokenizer))


def end_with_tool(falcon):
    add_tool(falcon)
    falcon.tokenizer.eos_token = TOOL


def add_special(falcon):
    falcon.tokenizer.add_special_tokens({"extra_special_tokens": [TOOL]})


def end_otherwise(falcon):
    falcon.tokenizer.eos_token = ">>ANSWER<<"


@pytest.mark.parametrize("change", [add_tool, end_with_tool, add_special, end_otherwise])
def test_a_vocabulary_that_was_changed_after_loading_is_refused(stored, tmp_path, change):
    change(stored)
    with pytest.raises(ValueError, match=r"the token '(<tool>|>>ANSWER<<)' is not as in .*falcon\.save"):
        fk.tune(stored, TALKS, output_dir=tmp_path, **SHORT)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_in_the_current_folder_is_not_taken_for_that_of_a_gguf_file(gguf, tmp_path, monkeypatch):
    other = fk.load("falconet")
    add_tool(other)
    other.tokenizer.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert fk.tune(fk.load(gguf, dtype="float32"), TALKS, output_dir=tmp_path / "run", **SHORT).history


@pytest.mark.parametrize("change", [add_tool, add_special])
def test_a_new_token_is_refused_where_the_base_was_deleted(tmp_path, change):
    shutil.copytree(embedded_directory("falconet"), tmp_path / "base")
    falcon = fk.load(tmp_path / "base", dtype="float32")
    shutil.rmtree(tmp_path / "base")
    change(falcon)
    with pytest.raises(ValueError, match=r"the token '<tool>' is not as in .*falcon\.save"):
        fk.tune(falcon, TALKS, output_dir=tmp_path / "run", **SHORT)


def test_following_the_advice_gives_an_adapter_that_reads_the_new_token(falcon, tmp_path):
    add_tool(falcon)
    run = fk.tune(fk.load(falcon.save(tmp_path / "base")), TALKS, output_dir=tmp_path / "run", **SHORT)
    loaded = fk.load(run.adapter)
    assert loaded.tokenizer(TOOL)["input_ids"] == falcon.tokenizer(TOOL)["input_ids"] == [2048]
    assert loaded.generate(TOOL, max_new_tokens=1).tokens


def test_a_token_that_a_checkpoint_has_no_embedding_of_is_named_and_the_advice_works(tmp_path):
    falcon = fk.load("falconet", dtype="float32")
    falcon.tokenizer.add_tokens([TOOL])
    falcon.model.save_pretrained(tmp_path / "base")
    falcon.tokenizer.save_pretrained(tmp_path / "base")
    falcon = fk.load(tmp_path / "base")
    for rows in (TALKS, fk.pack(fk.dialogues(TALKS), falcon, SHORT["context"])):
        with pytest.raises(
            ValueError, match=r"the token '<tool>', whose id is 2048, .* of 0 to 2047: falcon.model.resize"
        ):
            fk.tune(falcon, rows, output_dir=tmp_path / "run", **SHORT)
    assert fk.tune(falcon, ROWS[:8], output_dir=tmp_path / "others", **SHORT).history
    falcon.model.resize_token_embeddings(2049)
    falcon.save(tmp_path / "larger")
    assert fk.tune(fk.load(tmp_path / "larger"), TALKS, output_dir=tmp_path / "run", **SHORT).history


@pytest.mark.parametrize("resized", [True, False])
def test_a_new_padding_token_is_no_obstacle(stored, tmp_path, resized):
    stored.tokenizer.add_special_tokens({"pad_token": "<padding>"})
    if resized:
        stored.model.resize_token_embeddings(len(stored.tokenizer))
    run = fk.tune(stored, TALKS, output_dir=tmp_path, **SHORT)
    assert fk.load(run.adapter).generate("Hello", max_new_tokens=1).tokens
    assert stored.tokenizer.pad_token == "<padding>"
