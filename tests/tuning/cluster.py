"""Runs of `configs/tune.py` in several processes, on one machine or on several, which are programs on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ENVIRONMENT |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # https://github.com/pytorch/pytorch/issues/135712


def arguments(data, output, options, *kind):
    """The command line of tune.py."""
    pairs = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    model = [ROOT / "configs" / "tune.py", "--model", "falconet", "--dtype", "float32"]
    return [*map(str, [*model, "--data", data, "--output", output]), *kind, "--set", *pairs]


class Cluster:
    """The program of nodes.py: machines of two processes each."""

    def __init__(self, folder):
        environ = os.environ | ENVIRONMENT
        command = [sys.executable, "-m", "tests.tuning.nodes"]
        self.folder, pipe = folder, subprocess.PIPE
        self.process = subprocess.Popen(command, env=environ, cwd=folder, stdin=pipe, stdout=pipe, text=True)

    def ask(self, *request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, name, program, port=0, nodes=1, restarts=0):
        """Starts a machine with these arguments of tune.py; port: where all machines meet, 0 for one that is free."""
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "test"]
        dead_after = ["--rdzv-conf", "keep_alive_interval=1,keep_alive_max_attempt=8", "--max-restarts", str(restarts)]
        size = ["--nnodes", str(nodes), "--nproc-per-node", "2"]
        self.ask("start", name, ["torchrun", *size, *rendezvous, *dead_after, *program])

    def finish(self, *names):
        """The exit codes of nodes, and what their processes have written."""
        codes = [self.ask("wait", name) for name in names]
        return codes, "".join((self.folder / f"{name}.log").read_text() for name in names)

    def succeed(self, *names):
        codes, log = self.finish(*names)
        assert codes == [0] * len(names), log[-3000:]

    def kill(self, name):
        """Ends all processes of a machine as a crash does."""
        self.ask("kill", name)
        self.ask("wait", name)


def losses(output, name="loss"):
    history = json.loads((output / "adapter" / "tuning.json").read_text())["history"]
    return [each[name] for each in history if name in each]
