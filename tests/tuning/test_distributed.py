"""Two processes: the losses of one, killed and resumed, sharded where asked for."""

import os
import subprocess
import sys

import pytest
import torch

import falcon_kit as fk
from falcon_kit.tuning import distributed
from tests.tuning.cluster import ENVIRONMENT, ROOT, arguments, losses
from tests.tuning.small_runs import same, weights
from tests.waiting import until

OPTIONS = {"packing": False, "r": 2, "max_steps": 8, "context": 64, "answers": 0, "save_steps": 1, "held_out": 0.2}


@pytest.fixture(scope="module")
def alone(chats, tmp_path_factory):
    """The run of one process, with both rows of a step in one batch."""
    output = tmp_path_factory.mktemp("alone")
    fk.tune(fk.load("falconet", dtype="float32"), chats, output_dir=output, **OPTIONS, per_device_train_batch_size=2)
    return output


@pytest.fixture(scope="module", params=["copies", "shards"])
def kind(request):
    return ["--shard"] if request.param == "shards" else []


@pytest.fixture(scope="module")
def together(kind, chats, cluster, tmp_path_factory):
    """The run of two processes."""
    output = tmp_path_factory.mktemp("together")
    cluster.start("together", arguments(chats, output, OPTIONS, *kind))
    cluster.succeed("together")
    return output


def test_two_processes_have_the_losses_of_one(alone, together):
    assert losses(together) == pytest.approx(losses(alone), rel=1e-3)
    assert losses(together, "grad_norm") == pytest.approx(losses(alone, "grad_norm"), rel=1e-2)
    assert losses(together, "eval_loss") == pytest.approx(losses(alone, "eval_loss"), rel=1e-3)


def test_two_processes_make_the_adapter_of_one(alone, together):
    expected, found = weights(alone / "adapter"), weights(together / "adapter")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        similarity = torch.cosine_similarity(weight.flatten(), expected[name].flatten(), 0)
        assert similarity > 0.98, name  # Adam amplifies the rounding of tiny gradients


def test_checkpoints_hold_shards_only_where_it_was_asked_for(kind, together):
    assert bool(list(together.glob("checkpoint-*/shards/*.distcp"))) == bool(kind)


def test_two_processes_that_are_killed_go_on_to_the_same_adapter(kind, chats, cluster, together, tmp_path):
    program = arguments(chats, tmp_path, OPTIONS, *kind)
    cluster.start("killed", program)
    until((tmp_path / "checkpoint-3").exists)
    cluster.kill("killed")
    assert not (tmp_path / "adapter").exists()
    cluster.start("going on", program)
    cluster.succeed("going on")
    assert same(tmp_path / "adapter", together / "adapter")


def test_accelerate_launch_with_the_configuration_file_does_the_same(alone, chats, tmp_path):
    configuration = ["--config_file", str(ROOT / "configs" / "accelerate_8gpu.yaml")]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *configuration, "--num_processes", "2"]
    command = [*launch, "--main_process_port", "0", *arguments(chats, tmp_path, OPTIONS)]
    environ = os.environ | ENVIRONMENT
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-3)


# What silently would not distribute


def test_processes_that_do_not_know_of_each_other_are_refused():
    with pytest.raises(RuntimeError, match="2 processes were started, but their group has 1"):
        distributed.check_processes(running=1, started=2)


def test_a_second_way_to_shard_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RuntimeError, match=r"set fk\.tune\(shard=True\) instead"):
        distributed.check_processes(running=2, started=2)


def test_sharding_in_one_process_is_refused(chats, tmp_path):
    with pytest.raises(RuntimeError, match="shard=True needs several processes"):
        fk.tune(fk.load("falconet", dtype="float32"), chats, output_dir=tmp_path, shard=True, **OPTIONS)


def test_quantised_weights_are_not_sharded(chats, tmp_path):
    with pytest.raises(ValueError, match="quantised weights cannot be sharded"):
        fk.tune(fk.load("falconet", dtype="nf4"), chats, output_dir=tmp_path, shard=True, **OPTIONS)
