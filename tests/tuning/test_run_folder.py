"""The output_dir: one run, resumed only with the same settings and data; a record when it is finished."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import falcon_kit as fk
from falcon_kit.tuning.packing import FEATURES, Packed
from falcon_kit.tuning.run_folder import default_output_dir, digest
from falcon_kit.tuning.trainer import AdapterTrainer
from tests.tuning.small_runs import QUICK, ROWS, broken_off, interrupted, same, weights

# The hash of the data


def test_the_hash_of_rows_depends_on_their_tokens_and_labels_and_on_nothing_else(falcon):
    documents = fk.dialogues(ROWS)
    whole = fk.pack(documents, falcon, context=64)
    assert digest(whole) == digest(fk.pack(documents, falcon, context=64))
    assert digest(whole) != digest(whole[1:])
    for name, changed in (("ids", [5, 6, 7]), ("trained", [True, True, False])):
        rows = [{"ids": [5, 6, 8], "trained": [False, True, True], "where": "a"}, {**whole.examples[1], "where": "b"}]
        tables = [Dataset.from_list([first, rows[1]], FEATURES) for first in (rows[0], {**rows[0], name: changed})]
        one, other = (digest(Packed(each, [[0, 1]], 64, falcon.tokenizer, falcon.chat_format)) for each in tables)
        assert one != other


# One run


def test_a_file_in_place_of_the_folder_is_refused(falcon, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(NotADirectoryError, match="run' is a file: give a folder"):
        fk.tune(falcon, ROWS, output_dir=tmp_path / "run", **QUICK)


@pytest.mark.parametrize("name", ["adapter", "checkpoint-5", "unfinished"])
def test_a_folder_that_the_kit_did_not_write_is_left_alone(falcon, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=rf"{name} is not of a run of fk\.tune.*another output_dir"):
        fk.tune(falcon, ROWS, output_dir=tmp_path, resume=False, **QUICK)
    assert (tmp_path / name / "mine.txt").exists()


def test_other_settings_in_the_same_folder_are_refused_by_name(monkeypatch, falcon, tmp_path):
    broken_off(monkeypatch, falcon, tmp_path, KeyboardInterrupt())
    with pytest.raises(ValueError, match=r"r: 2 there, 4 here.*another output_dir, or resume=False"):
        fk.tune(falcon, ROWS, output_dir=tmp_path, **{**QUICK, "r": 4})


def test_other_data_in_the_same_folder_is_refused(monkeypatch, falcon, tmp_path):
    broken_off(monkeypatch, falcon, tmp_path, KeyboardInterrupt())
    with pytest.raises(ValueError, match="data: '"):
        fk.tune(falcon, ROWS[1:], output_dir=tmp_path, **QUICK)


def test_other_held_out_documents_or_evaluations_that_patience_counts_are_refused(falcon, tmp_path):
    parts = fk.dialogues(ROWS[:3]), fk.dialogues(ROWS[3:6])
    fk.tune(falcon, ROWS[6:], output_dir=tmp_path, held_out=parts[0], patience=9, **QUICK)
    with pytest.raises(ValueError, match="held-out data: '"):
        fk.tune(falcon, ROWS[6:], output_dir=tmp_path, held_out=parts[1], patience=9, **QUICK)
    with pytest.raises(ValueError, match="eval_steps: None there, 1 here"):
        fk.tune(falcon, ROWS[6:], output_dir=tmp_path, held_out=parts[0], patience=9, eval_steps=1, **QUICK)


def test_resume_false_starts_over(monkeypatch, falcon, tmp_path):
    broken_off(monkeypatch, falcon, tmp_path / "one", KeyboardInterrupt())
    run = fk.tune(falcon, ROWS, output_dir=tmp_path / "one", resume=False, **{**QUICK, "r": 4})
    expected = fk.tune(falcon, ROWS, output_dir=tmp_path / "two", **{**QUICK, "r": 4})
    assert same(run.adapter, expected.adapter)


def test_resume_false_leaves_what_is_no_checkpoint(falcon, tmp_path):
    options = {**QUICK, "max_steps": 1}
    fk.tune(falcon, ROWS, output_dir=tmp_path, **options)
    (tmp_path / "checkpoint-best-of-monday").mkdir()
    fk.tune(falcon, ROWS, output_dir=tmp_path, resume=False, **options)
    assert (tmp_path / "checkpoint-best-of-monday").exists()


def test_a_resumed_run_saves_and_evaluates_as_often_as_the_call_says(monkeypatch, falcon, tmp_path):
    options = {"max_steps": 8, "save_steps": 4, "eval_steps": 4}
    interrupted(monkeypatch, falcon, tmp_path, 1, **options)
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK | options | {"save_steps": 1, "eval_steps": 2})
    assert [each["step"] for each in run.history if "eval_loss" in each] == [2, 4, 6, 8]
    assert sorted(each.name for each in tmp_path.glob("checkpoint-*")) == ["checkpoint-7", "checkpoint-8"]


def test_another_number_of_answers_is_another_run(falcon, tmp_path):
    fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK | {"max_steps": 1})
    with pytest.raises(ValueError, match="answers: 0 there, 4 here"):
        fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK | {"max_steps": 1, "answers": 4})


def test_a_run_json_that_is_empty_is_refused_with_what_to_do(falcon, tmp_path):
    fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    (tmp_path / "run.json").write_text("")
    with pytest.raises(
        ValueError, match=r"run\.json is not valid JSON \(it is empty\).*another output_dir, or resume=False"
    ):
        fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    assert fk.tune(falcon, ROWS, output_dir=tmp_path, resume=False, **QUICK).figures


def test_a_damaged_run_json_is_refused_with_what_starting_over_would_delete(monkeypatch, falcon, tmp_path):
    broken_off(monkeypatch, falcon, tmp_path, KeyboardInterrupt(), step=6)
    for content in ("", "[1", "7", "[" * 100_000):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run\.json .* deletes its checkpoint-2, checkpoint-4: take"):
            fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)


def test_starting_over_replaces_links_and_leaves_what_they_lead_to(monkeypatch, falcon, tmp_path):
    broken_off(monkeypatch, falcon, tmp_path / "run", KeyboardInterrupt(), step=6)
    for name in ("checkpoint-4", "unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    for name in ("checkpoint-4", "unfinished"):
        (tmp_path / "run" / name).symlink_to(tmp_path / name)
    fk.tune(falcon, ROWS, output_dir=tmp_path / "run", resume=False, **{**QUICK, "r": 4})
    assert [[each.name for each in (tmp_path / name).iterdir()] for name in ("checkpoint-4", "unfinished")] == [
        ["precious"],
        ["precious"],
    ]
    assert [each for each in (tmp_path / "run").iterdir() if each.is_symlink()] == []


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended(monkeypatch, falcon, tmp_path):
    other = fk.load("falconet")

    def second(*_):
        with pytest.raises(BlockingIOError, match=r"another run of fk\.tune is writing in .*wait .* another output"):
            fk.tune(other, ROWS, output_dir=tmp_path, **QUICK)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(AdapterTrainer, "training_step", second)
        with pytest.raises(KeyboardInterrupt):
            fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    assert fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK).figures


@pytest.mark.parametrize("full", ["run.json", "tuning.json", "README.md"])
def test_a_full_disk_leaves_no_half_written_file_and_the_same_call_resumes(monkeypatch, falcon, tmp_path, full):
    write = Path.write_text

    def fails(self, text, **options):
        if f".{full}." in self.name:
            write(self, text[: len(text) // 2], **options)
            raise OSError(28, "No space left on device")
        return write(self, text, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", fails)
        with pytest.raises(OSError, match="No space left"):
            fk.tune(falcon, ROWS, output_dir=tmp_path / "run", **QUICK)
    names = [each.name for each in (tmp_path / "run").rglob("*")]
    assert [
        name for name in names if name.startswith(".") or (name in (full, "tuning.json") and full != "README.md")
    ] == []
    assert fk.tune(falcon, ROWS, output_dir=tmp_path / "run", **QUICK).figures


# The result


def test_a_finished_run_called_again_trains_nothing(monkeypatch, falcon, tmp_path):
    first = fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    kept = weights(first.adapter)
    monkeypatch.setattr(AdapterTrainer, "training_step", lambda *_, **__: pytest.fail("it trains again"))
    again = fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    assert all(torch.equal(weights(again.adapter)[name], kept[name]) for name in kept)
    assert (again.figures, len(again.history)) == (first.figures, len(first.history))


def test_a_run_that_was_killed_after_its_last_step_only_has_to_be_written_down(monkeypatch, falcon, tmp_path):
    first = fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    kept = weights(first.adapter)
    first.adapter.rename(tmp_path / "lost")
    monkeypatch.setattr(AdapterTrainer, "training_step", lambda *_, **__: pytest.fail("it trains again"))
    again = fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    assert all(torch.equal(weights(again.adapter)[name], kept[name]) for name in kept)
    assert again.figures == first.figures


def test_an_adapter_is_saved_before_it_is_measured(monkeypatch, falcon, tmp_path):
    expected = fk.tune(falcon, ROWS, output_dir=tmp_path / "whole", **QUICK)
    with monkeypatch.context() as patched:
        patched.setattr("falcon_kit.tuning.tune._Run._measure", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fk.tune(falcon, ROWS, output_dir=tmp_path / "broken", **QUICK)
    assert same(tmp_path / "broken" / "adapter", expected.adapter)
    assert fk.tune(falcon, ROWS, output_dir=tmp_path / "broken", **QUICK).figures == expected.figures


def test_a_record_without_figures_is_refused_with_what_to_do(falcon, tmp_path):
    options = {**QUICK, "max_steps": 1}
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, **options)
    for record in ('{"history": []}', '{"history": 7, "figures": {}}', '{"history": [], "figures": {"loss": "low"}}'):
        (run.adapter / "tuning.json").write_text(record)
        with pytest.raises(ValueError, match=r"tuning\.json has no history or figures: delete it, and the same call"):
            fk.tune(falcon, ROWS, output_dir=tmp_path, **options)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_finished_run_without_its_adapter_is_refused_with_what_to_do(monkeypatch, falcon, tmp_path, name):
    options = {**QUICK, "max_steps": 1}
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, **options)
    kept = weights(run.adapter)
    (run.adapter / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"delete the folder .*adapter, and the same call makes it"):
        fk.tune(falcon, ROWS, output_dir=tmp_path, **options)
    shutil.rmtree(run.adapter)
    monkeypatch.setattr(AdapterTrainer, "training_step", lambda *_, **__: pytest.fail("it trains again"))
    again = fk.tune(falcon, ROWS, output_dir=tmp_path, **options)
    assert all(torch.equal(weights(again.adapter)[name], kept[name]) for name in kept)


def test_a_finished_run_whose_adapter_was_cut_off_is_refused_with_what_to_do(falcon, tmp_path):
    options = {**QUICK, "max_steps": 1}
    file = fk.tune(falcon, ROWS, output_dir=tmp_path, **options).adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"is cut off or damaged .* delete the folder .*adapter, and the same call"):
        fk.tune(falcon, ROWS, output_dir=tmp_path, **options)


def test_an_empty_output_dir_is_refused(falcon):
    with pytest.raises(ValueError, match="output_dir is empty: give a folder, or leave it out"):
        fk.tune(falcon, ROWS, output_dir="", **QUICK)


def test_the_record_names_the_chat_format_of_the_rows(falcon, tmp_path):
    rows = fk.pack(fk.dialogues(ROWS), fk.load("falconet", chat="baize"), 64)
    run = fk.tune(falcon, rows, output_dir=tmp_path, **{**QUICK, "max_steps": 1})
    assert json.loads((run.adapter / "tuning.json").read_text())["chat_format"] == "baize"
    assert "[|Human|]" in (run.adapter / "README.md").read_text()


def test_the_adapter_has_a_card_and_a_record(falcon, tmp_path):
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    card = (run.adapter / "README.md").read_text()
    record = json.loads((run.adapter / "tuning.json").read_text())
    assert [word for word in ("base_model: falconet", "| r | 2 |", "held-out loss after") if word not in card] == []
    assert record["figures"] == dict(run.figures)
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "falconet"


def test_another_base_with_the_same_norms_is_another_run(falcon, tmp_path):
    """Such as one that another library has merged an adapter into, which no LayerNorm and no record shows."""
    fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    other = fk.load("falconet")
    with torch.no_grad():
        other.model.transformer.h[0].self_attention.query_key_value.weight[0, 0] += 0.01
    with pytest.raises(ValueError, match=r"the run in .* has other settings \(first layer"):
        fk.tune(other, ROWS, output_dir=tmp_path, **QUICK)


def test_a_quantised_model_has_the_same_run_after_it_was_used(tmp_path):
    """bitsandbytes rounds scales in memory when a CPU with instructions for bfloat16 first uses them."""
    falcon, short = fk.load("falconet", dtype="nf4-double"), {**QUICK, "max_steps": 1, "held_out": 0}
    run = fk.tune(falcon, ROWS, output_dir=tmp_path, **short)
    falcon.generate("Hello", max_new_tokens=2)
    assert fk.tune(falcon, ROWS, output_dir=tmp_path, **short).history == run.history


# Without an output_dir


def test_the_same_call_returns_the_finished_run_and_another_setting_starts_its_own(
    monkeypatch, falcon, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    first = fk.tune(falcon, ROWS, **QUICK)
    other = fk.tune(falcon, ROWS, **{**QUICK, "r": 4})
    capsys.readouterr()
    monkeypatch.setattr(AdapterTrainer, "training_step", lambda *_, **__: pytest.fail("it trains again"))
    again = fk.tune(falcon, ROWS, **QUICK)
    assert "This run is finished" in capsys.readouterr().out
    assert (again.adapter, again.figures) == (first.adapter, first.figures)
    assert [first.adapter.exists(), other.adapter.exists(), first.adapter != other.adapter] == [True, True, True]
    line = next(each for each in (first.adapter / "README.md").read_text().splitlines() if "fk.merge(" in each)
    assert eval(line.partition("= ")[2]).gap < 1e-3  # noqa: S307  # our own line
    assert [each.name for each in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("name", ["base", "data", "held-out data", "dtype", "r", "seed", "answers", "eval_steps"])
def test_whatever_changes_the_result_changes_the_folder(name):
    given = {"base": 1, "r": 8, "save_steps": 5}
    assert default_output_dir("falconet", given | {name: "other"}) != default_output_dir("falconet", given)
    assert default_output_dir("falconet", given | {"save_steps": 9}) == default_output_dir("falconet", given)
