"""Notebooks run with the layers of Falconet on three devices: no cell leaves a tensor on the wrong one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import devices

ROOT = Path(__file__).parents[2]
NOT_RUN = {
    "06_lora": "trains for minutes; `tune` and `merge` on several devices are in test_several_devices.py",
    "07_quantization": "compares layers with those of bitsandbytes, which has no kernels for simulated devices",
    "10_serving": "its servers are other processes and load the model themselves",
}
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("name", [each for each in NOTEBOOKS if each not in NOT_RUN])
def test_a_notebook_runs_with_the_layers_on_several_devices(name):
    command = [sys.executable, "-m", "tests.project.notebook_devices", f"notebooks/{name}.ipynb"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    placed = json.loads(ended.stdout.splitlines()[-1])
    assert placed
    assert {tuple(each) for each in placed} == {tuple(f"{devices.NAME}:{index}" for index in range(devices.COUNT))}


def test_the_notebooks_that_are_not_run_are_there():
    assert set(NOT_RUN) < set(NOTEBOOKS)
