"""Two machines of two processes each, on loopback: the run of one process, also after a machine has failed."""

import socket

import pytest
import torch

import falcon_kit as fk
from tests.serving.servers import free_port
from tests.tuning.cluster import arguments, losses
from tests.tuning.small_runs import weights
from tests.waiting import until

OPTIONS = {"packing": False, "r": 2, "max_steps": 5, "context": 64, "answers": 0, "save_steps": 1, "held_out": 0}


def start(cluster, name, port, data, output, *kind, restarts=1):
    """Starts one of two machines."""
    cluster.start(name, arguments(data, output, OPTIONS, *kind), port, 2, restarts)


def log_of_failure(cluster, first, second):
    """What two machines write that are given different data or folders, and fail."""
    port = free_port()
    start(cluster, "first", port, *first, restarts=0)
    start(cluster, "second", port, *second, restarts=0)
    codes, log = cluster.finish("first", "second")
    assert 0 not in codes
    return log


def is_listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


@pytest.fixture(scope="module")
def undisturbed(cluster, chats, tmp_path_factory):
    output, port = tmp_path_factory.mktemp("undisturbed"), free_port()
    start(cluster, "one", port, chats, output)
    start(cluster, "two", port, chats, output)
    cluster.succeed("one", "two")
    return output


def test_two_machines_have_the_losses_of_one_process(undisturbed, chats, tmp_path):
    falcon = fk.load("falconet", dtype="float32")
    fk.tune(falcon, chats, output_dir=tmp_path, **OPTIONS, per_device_train_batch_size=4)
    for name in ("loss", "grad_norm"):
        found, expected = losses(undisturbed, name), losses(tmp_path, name)
        assert found == pytest.approx(expected, rel=1e-2)
        assert found[0] == pytest.approx(expected[0], rel=1e-4)


@pytest.mark.parametrize("kind", [[], ["--shard"]], ids=["copies", "shards"])
def test_a_run_goes_on_where_a_machine_that_failed_comes_back(cluster, undisturbed, chats, tmp_path, kind):
    port = free_port()
    start(cluster, "host", port, chats, tmp_path, *kind)
    until(lambda: is_listening(port))
    start(cluster, "failing", port, chats, tmp_path, *kind)
    until((tmp_path / "checkpoint-2").exists)
    cluster.kill("failing")
    assert not (tmp_path / "adapter").exists()
    start(cluster, "failing", port, chats, tmp_path, *kind)
    cluster.succeed("host", "failing")
    assert bool(list(tmp_path.glob("checkpoint-*/shards/*.distcp"))) == bool(kind)
    for name in ("loss", "grad_norm"):
        assert losses(tmp_path, name) == pytest.approx(losses(undisturbed, name), rel=1e-4)
    expected, found = weights(undisturbed / "adapter"), weights(tmp_path / "adapter")
    for name, weight in found.items():
        assert torch.cosine_similarity(weight.flatten(), expected[name].flatten(), 0) > 0.99, name


def test_machines_without_a_common_folder_are_refused(cluster, chats, tmp_path):
    log = log_of_failure(cluster, (chats, tmp_path / "one"), (chats, tmp_path / "two"))
    assert log.count("is not one folder for all processes") >= 2  # both machines report it
    assert "give the absolute path of a folder that all machines share" in log


def test_what_rank_0_cannot_write_ends_the_run_on_all(cluster, chats, tmp_path):
    port, run = free_port(), tmp_path / "run"
    for name in ("writing", "waiting"):
        start(cluster, name, port, chats, run, restarts=0)
    until((run / "checkpoint-1").exists)
    (run / "adapter").touch()  # a file where a folder belongs
    codes, log = cluster.finish("writing", "waiting")
    assert 0 not in codes
    assert "process 0 of 4 failed, so that all end. " in log


def test_machines_with_different_data_are_refused(cluster, chats, tmp_path):
    (tmp_path / "other.jsonl").write_text("\n".join(chats.read_text().splitlines()[1:]))
    log = log_of_failure(cluster, (chats, tmp_path / "run"), (tmp_path / "other.jsonl", tmp_path / "run"))
    assert "the processes have different runs (data: " in log
    assert not (tmp_path / "run").exists()


def test_what_one_machine_lacks_ends_the_run_on_all(cluster, chats, tmp_path):
    log = log_of_failure(cluster, (chats, tmp_path / "run"), (tmp_path / "missing.jsonl", tmp_path / "run"))
    assert "of 4 failed, so that all end. " in log
    assert "missing.jsonl" in log.partition("of 4 failed, so that all end. ")[2].splitlines()[0]
