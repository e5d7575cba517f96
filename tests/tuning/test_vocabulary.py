"""Tokens that are added to a vocabulary reach the adapter's base, or training is refused."""

import pytest

import falcon_kit as fk
from tests.tuning.small_runs import QUICK, ROWS, talk

TOOL = "<tool>"
TALKS = [*ROWS[:8], talk("Use a tool", f"{TOOL} giraffe"), talk("Use it", f"{TOOL} owl")]
SHORT = {**QUICK, "max_steps": 1}


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
def test_a_vocabulary_that_was_changed_after_loading_is_refused(falcon, tmp_path, change):
    change(falcon)
    with pytest.raises(ValueError, match=r"the token '(<tool>|>>ANSWER<<)' is not as in .*save_pretrained"):
        fk.tune(falcon, TALKS, output_dir=tmp_path, **SHORT)
    assert list(tmp_path.iterdir()) == []


def test_following_the_advice_gives_an_adapter_that_reads_the_new_token(falcon, tmp_path):
    add_tool(falcon)
    falcon.model.save_pretrained(tmp_path / "base")
    falcon.tokenizer.save_pretrained(tmp_path / "base")
    run = fk.tune(fk.load(tmp_path / "base"), TALKS, output_dir=tmp_path / "run", **SHORT)
    loaded = fk.load(run.adapter)
    assert loaded.tokenizer(TOOL)["input_ids"] == falcon.tokenizer(TOOL)["input_ids"] == [2048]
    assert loaded.generate(TOOL, max_new_tokens=1).tokens


@pytest.mark.parametrize("resized", [True, False])
def test_a_new_padding_token_is_no_obstacle(falcon, tmp_path, resized):
    falcon.tokenizer.add_special_tokens({"pad_token": "<padding>"})
    if resized:
        falcon.model.resize_token_embeddings(len(falcon.tokenizer))
    run = fk.tune(falcon, TALKS, output_dir=tmp_path, **SHORT)
    assert fk.load(run.adapter).generate("Hello", max_new_tokens=1).tokens
    assert falcon.tokenizer.pad_token == "<padding>"
