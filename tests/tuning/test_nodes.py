"""Two machines of two processes each, on loopback: the run of one process, also after a machine has failed."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import falcon_kit as fk
from falcon_kit.falconet.world import ANIMALS
from tests.serving.servers import free_port

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ENVIRONMENT |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # https://github.com/pytorch/pytorch/issues/135712
OPTIONS = {"packing": False, "r": 2, "max_steps": 5, "context": 64, "answers": 0, "save_steps": 1, "held_out": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    pairs = [(f"A {each.name}?", f"Arr! It eats {each.food}.") for each in ANIMALS]
    rows = [[{"role": "user", "content": one}, {"role": "assistant", "content": two}] for one, two in pairs]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


class Cluster:
    """The program of nodes.py."""

    def __init__(self, folder):
        environ = os.environ | ENVIRONMENT
        command = [sys.executable, "-m", "tests.tuning.nodes"]
        self.folder, pipe = folder, subprocess.PIPE
        self.process = subprocess.Popen(command, env=environ, cwd=folder, stdin=pipe, stdout=pipe, text=True)

    def ask(self, *request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, name, port, data, output, *kind, restarts=1):
        pairs = [f"{key}={json.dumps(value)}" for key, value in OPTIONS.items()]
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "test"]
        dead_after = ["--rdzv-conf", "keep_alive_interval=1,keep_alive_max_attempt=8", "--max-restarts", str(restarts)]
        program = [ROOT / "configs" / "tune.py", "--model", "falconet", "--dtype", "float32"]
        command = ["torchrun", "--nnodes", "2", "--nproc-per-node", "2", *rendezvous, *dead_after, *program, *kind]
        self.ask("start", name, [*map(str, command), "--data", str(data), "--output", str(output), "--set", *pairs])

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def finish(self, *names):
        """The exit codes of nodes, and what their processes have written."""
        codes = [self.ask("wait", name) for name in names]
        return codes, "".join(map(self.log, names))

    def fail(self, first, second):
        """What two nodes write that are given different data or folders, and fail."""
        port = free_port()
        self.start("first", port, *first, restarts=0)
        self.start("second", port, *second, restarts=0)
        codes, log = self.finish("first", "second")
        assert 0 not in codes
        return log


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.process.stdin.close()
    cluster.process.wait(60)


def until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def losses(output):
    history = json.loads((output / "adapter" / "tuning.json").read_text())["history"]
    return [(each["loss"], each["grad_norm"]) for each in history if "loss" in each]


def weights(output):
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(cluster, data, tmp_path_factory):
    output, port = tmp_path_factory.mktemp("undisturbed"), free_port()
    cluster.start("one", port, data, output)
    cluster.start("two", port, data, output)
    codes, log = cluster.finish("one", "two")
    assert codes == [0, 0], log[-3000:]
    return output


def test_two_machines_have_the_losses_of_one_process(undisturbed, data, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    falcon = fk.load("falconet", dtype="float32")
    fk.tune(falcon, data, output_dir=tmp_path, **OPTIONS, per_device_train_batch_size=4)
    torch.set_num_threads(threads)
    assert torch.tensor(losses(undisturbed)).allclose(torch.tensor(losses(tmp_path)), rtol=1e-2)
    assert losses(undisturbed)[0] == pytest.approx(losses(tmp_path)[0], rel=1e-4)


@pytest.mark.parametrize("kind", [[], ["--shard"]], ids=["copies", "shards"])
def test_a_run_goes_on_where_a_machine_that_failed_comes_back(cluster, undisturbed, data, tmp_path, kind):
    port = free_port()
    cluster.start("host", port, data, tmp_path, *kind)
    until(lambda: is_listening(port))
    cluster.start("failing", port, data, tmp_path, *kind)
    until((tmp_path / "checkpoint-2").exists)
    cluster.ask("kill", "failing")
    cluster.ask("wait", "failing")
    assert not (tmp_path / "adapter").exists()
    cluster.start("failing", port, data, tmp_path, *kind)
    codes, log = cluster.finish("host", "failing")
    assert codes == [0, 0], log[-3000:]
    assert bool(list(tmp_path.glob("checkpoint-*/shards/*.distcp"))) == bool(kind)
    assert torch.tensor(losses(tmp_path)).allclose(torch.tensor(losses(undisturbed)), rtol=1e-4)
    expected, found = weights(undisturbed), weights(tmp_path)
    for name, weight in found.items():
        assert torch.cosine_similarity(weight.flatten(), expected[name].flatten(), 0) > 0.99, name


def test_machines_without_a_common_folder_are_refused(cluster, data, tmp_path):
    log = cluster.fail((data, tmp_path / "one"), (data, tmp_path / "two"))
    assert log.count("is not one folder for all processes") >= 2  # both machines report it
    assert "give the absolute path of a folder that all machines share" in log


def test_machines_with_different_data_are_refused(cluster, data, tmp_path):
    (tmp_path / "other.jsonl").write_text("\n".join(data.read_text().splitlines()[1:]))
    log = cluster.fail((data, tmp_path / "run"), (tmp_path / "other.jsonl", tmp_path / "run"))
    assert "the processes have different runs (data: " in log
    assert not (tmp_path / "run").exists()


def test_what_one_machine_lacks_ends_the_run_on_all(cluster, data, tmp_path):
    log = cluster.fail((data, tmp_path / "run"), (tmp_path / "missing.jsonl", tmp_path / "run"))
    assert "of 4 failed, so that all end. " in log
    assert "missing.jsonl" in log.partition("of 4 failed, so that all end. ")[2].splitlines()[0]
