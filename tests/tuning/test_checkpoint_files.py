"""Checkpoints are complete or absent, and training resumes from the last complete one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import falcon_kit as fk
from falcon_kit.tuning.checkpoint_files import is_complete
from tests.tuning.small_runs import QUICK, ROWS, broken_off, same

SCRIPT = """
import sys, json
import falcon_kit as fk
rows, options = json.load(open(sys.argv[1]))
fk.tune(fk.load("falconet", dtype="float32"), rows, output_dir=sys.argv[2], **options)
"""


def start(tmp_path, rows, options, directory):
    (tmp_path / "arguments.json").write_text(json.dumps([rows, options]))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path / "arguments.json", directory],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def killed(process, directory, step):
    """Ends the process with SIGKILL as soon as a step is saved; whether it was still running."""
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if any(int(each.name.rpartition("-")[2]) >= step for each in directory.glob("checkpoint-*")):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    return process.wait() == -signal.SIGKILL


LONG = {**QUICK, "max_steps": 14, "save_steps": 1, "gradient_accumulation_steps": 2, "num_train_epochs": 99}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    return fk.tune(fk.load("falconet", dtype="float32"), ROWS, output_dir=tmp_path_factory.mktemp("long"), **LONG)


@pytest.mark.parametrize("step", [3, 8])
def test_a_run_that_was_killed_ends_with_the_same_adapter(falcon, long_run, tmp_path, step):
    assert killed(start(tmp_path, ROWS, LONG, tmp_path / "broken"), tmp_path / "broken", step)
    resumed = fk.tune(falcon, ROWS, output_dir=tmp_path / "broken", **LONG)
    assert same(resumed.adapter, long_run.adapter)
    assert [each["loss"] for each in resumed.history if "loss" in each] == [
        each["loss"] for each in long_run.history if "loss" in each
    ]


@pytest.mark.parametrize("content", ["7", "[1]", "null", '"a"', "{"])
def test_a_list_of_files_that_is_something_else_makes_a_checkpoint_incomplete(tmp_path, content):
    (tmp_path / "files.json").write_text(content)
    assert not is_complete(tmp_path)


@pytest.fixture(scope="module")
def broken_run(tmp_path_factory):
    """The folder of a run that was broken off in its last step."""
    folder = tmp_path_factory.mktemp("broken")
    broken_off(pytest.MonkeyPatch(), fk.load("falconet", dtype="float32"), folder, KeyboardInterrupt(), step=6)
    return folder


@pytest.mark.parametrize("broken", ["optimizer.pt", "adapter_model.safetensors", "trainer_state.json"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(falcon, whole, broken_run, tmp_path, broken):
    shutil.copytree(broken_run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-4" / broken).unlink()
    (tmp_path / "checkpoint-old").mkdir()
    with pytest.warns(UserWarning, match=r"checkpoint-4 is incomplete.*Training resumes from .*checkpoint-2"):
        run = fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    assert same(run.adapter, whole.adapter)


DAMAGED = ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"]


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_checkpoint_is_named_and_the_advice_works(falcon, whole, broken_run, tmp_path, damaged):
    shutil.copytree(broken_run, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "checkpoint-4" / damaged
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ValueError, match=r"checkpoint-4 is damaged \(.*\): delete it, and the same call") as error:
        fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    assert "arbitrary code" not in str(error.value)
    shutil.rmtree(file.parent)
    assert same(fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK).adapter, whole.adapter)


def test_a_full_disk_leaves_the_last_checkpoint_whole(monkeypatch, falcon, whole, tmp_path):
    with monkeypatch.context() as patched:
        save = torch.save

        def full(held, file, *args, **kwargs):
            if "checkpoint-4" in str(file):
                raise OSError(28, "No space left on device")
            return save(held, file, *args, **kwargs)

        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"step 4 could not be saved.*No space left.*checkpoint-2 is complete"):
            fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)
    assert [each.name for each in tmp_path.iterdir()].count("unfinished") == 0
    assert same(fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK).adapter, whole.adapter)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(28, "No space left on device"), r"device\): free some space; no checkpoint"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"), r"file\): free some space; no check"),
        (PermissionError(13, "Permission denied"), r"denied\); no checkpoint was saved before"),
        (torch.OutOfMemoryError("CUDA out of memory"), r"out of memory\); no checkpoint was saved before"),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, Exception) else "",
)
def test_only_an_error_of_the_disk_advises_to_free_space(monkeypatch, falcon, tmp_path, error, advice):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match=advice):
        fk.tune(falcon, ROWS, output_dir=tmp_path, **QUICK)


def test_nothing_that_is_saved_is_a_pickle_of_objects(whole):
    folder = whole.adapter.parent
    for file in folder.rglob("*.pt*"):
        with torch.serialization.safe_globals([]):
            if (
                "rng_state" not in file.name
            ):  # numpy's state is a tuple with an array, which transformers allows by name
                torch.load(file, weights_only=True)
    assert list(folder.rglob("*.bin")) == []
