"""Runs the code cells of a notebook with Falconet's layers on three simulated devices (tests/devices.py).

    python -m tests.project.notebook_devices NOTEBOOK

`fk.load` places the layers, unless a cell itself names a place, or a dtype that only bitsandbytes computes: it has no
kernels for these devices. A tensor on the wrong device is an error, as it is between GPUs. The last line printed is a
JSON object with the devices of every model that was placed.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import falcon_kit as fk
from falcon_kit.catalogue.memory import QUANTISED
from falcon_kit.planning.devices import Device
from falcon_kit.planning.placement import device_map
from tests import devices
from tests.project.notebook_memory import cells, shorten


def spread(layers: int) -> dict[str, int | str]:
    """A map as the plan writes it, with about as many layers on each device."""
    simulated = [Device(devices.NAME, f"{devices.NAME}:{index}", 2**31) for index in range(devices.COUNT)]
    return device_map(simulated, [len(range(index, layers, devices.COUNT)) for index in range(devices.COUNT)])


def place_models() -> list[list[str]]:
    """Makes `fk.load` place layers on the devices. Returns a list that gets the devices of each placed model."""
    load, found = fk.load, []

    def on_devices(name: str | Path, **options: Any) -> Any:
        if options.keys() & {"device_map", "tensor_parallel"} or options.get("dtype") in QUANTISED:
            return load(name, **options)
        falcon = load(name, **options, device_map=spread(fk.spec(str(name)).layers))
        found.append(sorted({str(each.device) for each in falcon.model.parameters()}))
        return falcon

    fk.load = on_devices
    return found


def main() -> None:
    """Command line."""
    notebook = Path(sys.argv[1]).resolve()
    torch.set_num_threads(1)
    devices.simulate()
    shorten()
    found = place_models()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        try:
            for _, run in cells(notebook):
                run()
        finally:
            os.chdir("/")
    sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
