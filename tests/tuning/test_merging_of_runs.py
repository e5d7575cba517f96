"""The adapter of a run is merged into its base, and into no other."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import falcon_kit as fk
from falcon_kit.loading.adding import LazyMergedWeight
from tests.tuning.small_runs import QUICK, ROWS, logits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    options = {**QUICK, "max_steps": 12, "learning_rate": 0.01}
    return fk.tune(fk.load("falconet", dtype="float32"), ROWS, output_dir=tmp_path_factory.mktemp("run"), **options)


def test_a_merged_model_loads_in_plain_transformers(run, tmp_path, capfd):
    merged = fk.merge(run.adapter, output_dir=tmp_path)
    assert "Writing model shards" not in capfd.readouterr().err
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(plain).__module__.startswith("transformers.")
    torch.testing.assert_close(
        plain(torch.tensor([[23, 900, 77, 1500, 42]])).logits, logits(merged), rtol=1e-3, atol=1e-3
    )


def test_merging_leaves_the_base_alone_and_changes_what_it_gives(run, falcon):
    before = logits(falcon)
    merged = fk.merge(run.adapter, falcon)
    assert torch.equal(logits(falcon), before)
    assert not torch.allclose(logits(merged), before, atol=0.1)
    assert merged.gap < 1e-4


def test_a_merge_that_changes_the_logits_is_refused(monkeypatch, run, falcon):
    merged = LazyMergedWeight.__getitem__
    monkeypatch.setattr(LazyMergedWeight, "__getitem__", lambda self, index: 1.05 * merged(self, index))
    with pytest.raises(RuntimeError, match="after merging, logits differ by"):
        fk.merge(run.adapter, falcon)


def test_an_adapter_of_another_base_is_refused(run, instruct):
    with pytest.raises(ValueError, match="made for falconet, not for falconet-instruct"):
        fk.merge(run.adapter, instruct)


def test_an_adapter_of_another_shape_is_refused(run, any_falcon):
    (run.adapter / "tuning.json").rename(run.adapter / "hidden")
    try:
        with pytest.raises(ValueError, match=r"its base_model\S+ is \(\d+, \d+\), but the model has"):
            fk.merge(run.adapter, any_falcon)
    finally:
        (run.adapter / "hidden").rename(run.adapter / "tuning.json")


def test_a_folder_without_an_adapter_is_refused(falcon, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        fk.merge(tmp_path, falcon)


def test_a_run_is_merged_like_its_folder_and_swapped_arguments_are_refused(run, falcon):
    assert torch.equal(logits(fk.merge(run, falcon)), logits(fk.merge(run.adapter, falcon)))
    with pytest.raises(TypeError, match="takes the adapter first, as its folder or the run that made it; got Falcon"):
        fk.merge(falcon, run.adapter)
