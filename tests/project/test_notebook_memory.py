"""A notebook holds the reader's model and at most one copy of it, in memory and in files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project.notebook_memory import MALLOC, checkpoint, stored

ROOT = Path(__file__).parents[2]
HEAVY = ("06_lora", "07_quantization", "08_multi_gpu", "10_serving")
"""Notebooks that hold or write more than one model. (10_serving serves Falconet, whatever the reader's model is.)"""
OWN = {"10_serving": 1.4e9}
"""Bytes beside the reader's model: in 10, a layer of the 7B's width, which is read and packed."""
OVERHEAD = 0.5  # of the weights of a small checkpoint: activations, Falconet, figures


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("large") / "falcon-large")


@pytest.mark.parametrize("name", HEAVY)
def test_a_notebook_holds_one_extra_copy_of_the_model_at_most(name, large, record_property):
    command = [sys.executable, "-m", "tests.project.notebook_memory", f"notebooks/{name}.ipynb", str(large)]
    environ = os.environ | MALLOC | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    measured = json.loads(ended.stdout.splitlines()[-1])
    for figure in ("memory", "files"):
        record_property(figure, f"{measured[figure]:.2f} x the weights")  # in the report of --junit-xml
    assert measured["memory"] < 2 + OVERHEAD + OWN.get(name, 0) / stored(large), measured["cell"]
    assert measured["files"] < 1 + OVERHEAD
