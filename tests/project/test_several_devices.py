"""What a Falcon gives with its layers on three devices is what it gives on one.

The devices are simulated (tests/devices.py), in a process of their own. There, a tensor on the wrong device is an error
as it is between GPUs.
"""

import copy
import inspect
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch

import falcon_kit as fk
from benchmarks.gpu import quantised_layer
from falcon_kit.loading.packed import frozen
from falcon_kit.planning.devices import Device
from falcon_kit.planning.placement import device_map
from tests import devices
from tests.project.cases import CASES, TABLE, TEXT, WITHOUT_A_FALCON, Places, export_gguf, notebook_04, value

_HEAD = ("transformer.ln_f", "lm_head")
REFUSED = {("rw", export_gguf), ("rw", notebook_04), ("apart", notebook_04)}
"""What a layout does not have on one device either: llama.cpp has no ALiBi, the notebook needs a tied head."""

# Where the layers are


def spread(spec):
    """A map as the plan writes it, with two layers on the first two devices and one on the third."""
    return device_map([Device("sim", f"sim:{index}", 2**31) for index in range(devices.COUNT)], [2, 2, 1])


def apart(spec):
    """As transformers' "auto" places an untied head: on the last device."""
    return {**spread(spec), **dict.fromkeys(_HEAD, "sim:2")}


def second(spec):
    """All on one device that is not the first."""
    return "sim:1"


PLACES = {"7b": spread, "40b": spread, "rw": spread, "apart": apart, "second": second}


# In the process with the simulated devices


def start():
    os.environ["MPLBACKEND"] = "Agg"
    torch.set_num_threads(1)
    devices.simulate()


@cache
def places_of(name):
    layout = {"apart": "40b", "second": "40b"}.get(name, name)
    return Places(layout, PLACES[name], tied=name != "apart")


def both(name, case):
    """The values of a case on one device and on several, or why it was refused."""
    places = places_of(name)
    return [value(CASES[case], falcon, places) for falcon in (places.one, places.elsewhere)]


def devices_of(name):
    return sorted({str(each.device) for each in places_of(name).elsewhere.model.parameters()})


def hooks_of(name):
    return sum(hasattr(each, "_hf_hook") for each in places_of(name).elsewhere.model.modules())


def misplaced():
    """The error of a model with one matrix on another device than its layer."""
    matrix = places_of("40b").elsewhere.model.transformer.h[1].mlp.dense_h_to_4h
    device = matrix.weight.device
    matrix.to("sim:2")
    try:
        places_of("40b").elsewhere.generate(TEXT, max_new_tokens=1)
    except RuntimeError as error:
        return str(error)
    finally:
        matrix.to(device)


def state_of_packed():
    """The state dict of an int4 layer in the layout of a kernel: on the CPU, and on a device that does the same."""
    layer = quantised_layer(torch.randn(128, 64, generator=torch.Generator().manual_seed(0)), "int4")
    layer.pack()
    elsewhere = copy.deepcopy(layer)
    elsewhere.weight, elsewhere.scales = (frozen(each.data.to("sim:1")) for each in (layer.weight, layer.scales))
    weight, scales = elsewhere.state_dict()["weight"], elsewhere.scales
    return str(weight.device), str(scales.device), torch.equal(weight.to("cpu"), layer.state_dict()["weight"])


def values_read(tokens):
    """How often a greedy text of so many tokens is waited for: what reads a value of a device."""
    falcon = places_of("40b").elsewhere
    devices.READ.clear()
    falcon.generate(TEXT, max_new_tokens=tokens, suppress_tokens=[11])
    return len(devices.READ)


@pytest.fixture(scope="module")
def process():
    """Runs a function of this file in the process with the simulated devices."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


# The table


@pytest.mark.parametrize("case", CASES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", PLACES)
def test_several_devices_give_what_one_gives(name, case, process):
    one, several = process(both, name, CASES.index(case))
    assert isinstance(one, str) == ((name, case) in REFUSED), one
    if isinstance(one, str) or one.dtype.kind not in "fc":
        assert np.array_equal(one, several)
    else:
        np.testing.assert_allclose(several, one, rtol=1e-6, atol=2e-6 * np.abs(one).max())


@pytest.mark.parametrize(("name", "found"), [("40b", ["sim:0", "sim:1", "sim:2"]), ("second", ["sim:1"])])
def test_the_weights_are_on_the_devices_of_the_map(name, found, process):
    assert process(devices_of, name) == found


def test_no_hook_is_left_on_layers_that_are_all_on_devices(process):
    assert process(hooks_of, "40b") == 0


def test_unpacked_weights_of_a_state_dict_are_in_host_memory(process):
    """A device that is filled by a model in 4 bits has no room for them once more, as when it is saved."""
    assert process(state_of_packed) == ("cpu", "sim:1", True)


def test_a_token_is_waited_for_once(process):
    """For the token with its log-probability; transformers' own loop waits once more, for its stop check."""
    assert (process(values_read, 12) - process(values_read, 4)) / 8 == 1


def test_a_tensor_on_the_wrong_device_is_an_error(process):
    assert "Expected all tensors to be on the same device" in process(misplaced)


def test_every_public_function_that_takes_a_falcon_is_in_the_table():
    functions = {name for name in fk.__all__ if inspect.isfunction(getattr(fk, name))}
    methods = {name for name in ("generate", "stream", "chat", "weights", "model") if name in dir(fk.Falcon)}
    assert functions | methods | {"model"} == set(TABLE) | WITHOUT_A_FALCON
