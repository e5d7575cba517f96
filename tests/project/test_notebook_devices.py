"""Notebooks run with the layers of Falconet on three devices: no cell leaves a tensor on the wrong one."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests import devices
from tests.project.notebook_devices import checked, placed, start

FOLDER = Path(__file__).parents[2] / "notebooks"
NOT_RUN = {
    "10_serving": "its servers are other processes and load the model themselves",
}
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("[0-9]*.ipynb"))


@pytest.fixture(scope="module")
def process():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start) as pool:
        yield pool


@pytest.mark.parametrize("name", [each for each in NOTEBOOKS if each not in NOT_RUN])
def test_a_notebook_runs_with_the_layers_on_several_devices(name, process):
    found = process.submit(placed, FOLDER / f"{name}.ipynb").result()
    assert found
    assert {tuple(each) for each in found} == {tuple(f"{devices.NAME}:{index}" for index in range(devices.COUNT))}


def test_the_solutions_of_quantization_are_right_on_several_devices(process):
    outcomes = process.submit(checked, FOLDER / "solutions" / "07_quantization.ipynb").result()
    assert [": right." in each for each in outcomes] == [True] * 3, outcomes


def test_the_notebooks_that_are_not_run_are_there():
    assert set(NOT_RUN) < set(NOTEBOOKS)
