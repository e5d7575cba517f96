"""Runs the code cells of notebooks with Falconet's layers on three simulated devices (tests/devices.py).

`fk.load` places the layers, unless a cell itself names a place, or a dtype that only bitsandbytes computes: it has no
kernels for these devices. A tensor on the wrong device is an error, as it is between GPUs.
"""

import os
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch

import falcon_kit as fk
from falcon_kit.catalogue.memory import QUANTISED
from falcon_kit.loading import load as load_module
from falcon_kit.planning.devices import Device
from falcon_kit.planning.placement import device_map
from tests import devices
from tests.project.notebook_memory import cells, shorten


def spread(layers: int) -> dict[str, int | str]:
    """A map as the plan writes it, with about as many layers on each device."""
    simulated = [Device(devices.NAME, f"{devices.NAME}:{index}", 2**31) for index in range(devices.COUNT)]
    return device_map(simulated, [len(range(index, layers, devices.COUNT)) for index in range(devices.COUNT)])


PLACED: list[list[str]] = []
"""The devices of every model that was placed."""
LAST = ("tensor_parallel=ranks", "used.model.save_pretrained(folder)")
"""In the cell of a notebook from which on its models are in processes, whose devices are not simulated, or are read in
the format of bitsandbytes."""


def start() -> None:
    """Makes `fk.load` place layers on the devices of this process."""
    os.environ["MPLBACKEND"] = "Agg"
    torch.set_num_threads(1)
    devices.simulate()
    shorten()
    load = fk.load

    def on_devices(name: str | Path, **options: Any) -> Any:
        if options.keys() & {"device_map", "tensor_parallel"} or options.get("dtype") in QUANTISED:
            return load(name, **options)
        falcon = load(name, **options, device_map=spread(fk.spec(str(name)).layers))
        PLACED.append(sorted({str(each.device) for each in falcon.model.parameters()}))
        return falcon

    fk.load = load_module.load = on_devices  # the second by the checks of exercises


def placed(notebook: Path) -> list[list[str]]:
    """Runs a notebook: the devices of every model that it loaded."""
    PLACED.clear()
    torch.set_grad_enabled(True)  # the notebook before may have turned gradients off
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, chdir(folder):
        for source, run in cells(notebook):
            if any(each in source for each in LAST):
                break
            run()
    return PLACED


def checked(notebook: Path) -> list[str]:
    """Runs the solutions of a notebook: what `fk.check` says of each."""
    check, outcomes = fk.check, []
    fk.check = lambda *answer: outcomes.append(repr(check(*answer)))
    try:
        placed(notebook)
    finally:
        fk.check = check
    return outcomes
