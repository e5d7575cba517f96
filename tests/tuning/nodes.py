"""A program that starts the machines of cluster.py by torchrun's command lines, and kills them as a crash does.

Nodes and their processes are forked from this one, which has imported everything: twelve imports would take a minute.
It reads a request from each line, ["start", name, command], ["kill", name] or ["wait", name], and answers each by the
exit code of the node, null while it runs.
"""

import json
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

import falcon_kit as fk

_MOST_SECONDS = 240
FORK = multiprocessing.get_context("fork")


def script(path, *arguments):
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def node(name, command):
    """What torchrun does with this command line, except that processes are forked."""
    os.setsid()
    with Path(f"{name}.log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    arguments = parse_args(command[1:])
    config, _, _ = config_from_args(arguments)
    config.start_method = "fork"
    elastic_launch(config, script)(arguments.training_script, *arguments.training_script_args)


def main():
    assert fk.tune  # imported before the first fork
    nodes = {}
    for line in sys.stdin:
        action, name, *rest = json.loads(line)
        if action == "start":
            nodes[name] = FORK.Process(target=node, args=(name, *rest))
            nodes[name].start()
        elif action == "kill":
            os.killpg(nodes[name].pid, signal.SIGKILL)
        else:
            nodes[name].join(_MOST_SECONDS)
            if nodes[name].exitcode is None:  # the test fails, and the next ones can go on
                os.killpg(nodes[name].pid, signal.SIGKILL)
                nodes[name].join()
        sys.stdout.write(json.dumps(nodes[name].exitcode) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
