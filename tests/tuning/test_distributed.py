"""Two processes: the losses of one, killed and resumed, sharded where asked for."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import falcon_kit as fk
from falcon_kit.falconet.world import ANIMALS
from falcon_kit.tuning import distributed

CONFIGS = Path(__file__).parents[2] / "configs"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "accelerate_8gpu.yaml")),
    *("--num_processes", "2", "--main_process_port", "0"),
]
OPTIONS = {"packing": False, "r": 2, "max_steps": 8, "context": 64, "answers": 0, "save_steps": 1, "held_out": 0.2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [
        [{"role": "user", "content": f"A {each.name}?"}, {"role": "assistant", "content": f"Arr! It eats {each.food}."}]
        for each in ANIMALS
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def start(launcher, data, output, *arguments, **options):
    pairs = [f"{name}={json.dumps(value)}" for name, value in (OPTIONS | options).items()]
    command = [*launcher, CONFIGS / "tune.py", "--model", "falconet", "--dtype", "float32", "--data", data]
    return subprocess.Popen(
        [*map(str, command), "--output", str(output), *arguments, "--set", *pairs],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def record(output):
    return json.loads((output / "adapter" / "tuning.json").read_text())


def losses(output, name="loss"):
    return [each[name] for each in record(output)["history"] if name in each]


def weights(output):
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The run of one process, with both rows of a step in one batch."""
    output = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fk.tune(fk.load("falconet", dtype="float32"), data, output_dir=output, **OPTIONS, per_device_train_batch_size=2)
    torch.set_num_threads(threads)
    return output


@pytest.fixture(scope="module", params=["copies", "shards"])
def kind(request):
    return ["--shard"] if request.param == "shards" else []


@pytest.fixture(scope="module")
def together(kind, data, tmp_path_factory):
    """The run of two processes."""
    output = tmp_path_factory.mktemp("together")
    finished(start(TORCHRUN, data, output, *kind))
    return output


def test_two_processes_have_the_losses_of_one(alone, together):
    assert losses(together) == pytest.approx(losses(alone), rel=1e-3)
    assert losses(together, "grad_norm") == pytest.approx(losses(alone, "grad_norm"), rel=1e-2)
    assert losses(together, "eval_loss") == pytest.approx(losses(alone, "eval_loss"), rel=1e-3)


def test_two_processes_make_the_adapter_of_one(alone, together):
    expected, found = weights(alone), weights(together)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        similarity = torch.cosine_similarity(weight.flatten(), expected[name].flatten(), 0)
        assert similarity > 0.98, name  # Adam amplifies the rounding of tiny gradients


def test_checkpoints_hold_shards_only_where_it_was_asked_for(kind, together):
    assert bool(list(together.glob("checkpoint-*/shards/*.distcp"))) == bool(kind)


def test_two_processes_that_are_killed_go_on_to_the_same_adapter(kind, data, together, tmp_path):
    process = start(TORCHRUN, data, tmp_path, *kind)
    until = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < until and not (tmp_path / "checkpoint-3").exists():
        time.sleep(0.01)
    for each in (*psutil.Process(process.pid).children(recursive=True), process):
        each.kill()
    process.communicate()
    assert not (tmp_path / "adapter").exists()
    finished(start(TORCHRUN, data, tmp_path, *kind))
    expected, found = weights(together), weights(tmp_path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_accelerate_launch_with_the_configuration_file_does_the_same(alone, data, tmp_path):
    finished(start(ACCELERATE, data, tmp_path))
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-3)


# What silently would not distribute


def test_processes_that_do_not_know_of_each_other_are_refused():
    with pytest.raises(RuntimeError, match="2 processes were started, but their group has 1"):
        distributed.check_processes(running=1, started=2)


def test_a_second_way_to_shard_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RuntimeError, match=r"set fk\.tune\(shard=True\) instead"):
        distributed.check_processes(running=2, started=2)


def test_sharding_in_one_process_is_refused(data, tmp_path):
    with pytest.raises(RuntimeError, match="shard=True needs several processes"):
        fk.tune(fk.load("falconet", dtype="float32"), data, output_dir=tmp_path, shard=True, **OPTIONS)


def test_quantised_weights_are_not_sharded(data, tmp_path):
    with pytest.raises(ValueError, match="quantised weights cannot be sharded"):
        fk.tune(fk.load("falconet", dtype="nf4"), data, output_dir=tmp_path, shard=True, **OPTIONS)
