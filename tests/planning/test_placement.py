"""Which device holds which layers: within its memory, evenly, and with as few layers offloaded as possible."""

import pytest
import torch
from accelerate import dispatch_model
from accelerate.utils import check_device_map
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import FalconConfig

import falcon_kit as fk
from falcon_kit.model.modeling import FalconForCausalLM
from falcon_kit.planning.devices import Device
from tests.conftest import small_config

GIB = 2**30


def used(plan):
    """Bytes of all parts by device."""
    return {device.key: sum(row.bytes for row in plan.rows if row.device == device.key) for device in plan.devices}


def layers_on(plan):
    return [
        sum(1 for name, key in plan.device_map.items() if ".h." in name and key == device.key)
        for device in plan.devices
    ]


@pytest.mark.parametrize("devices", ["4x40GiB", "8x24GB", "2x80GB", "3x141GB"])
def test_no_device_holds_more_than_it_has(devices):
    plan = fk.plan("falcon-40b", devices=devices)
    assert plan.fits
    assert all(used(plan)[device.key] <= device.free_bytes for device in plan.devices)


@given(
    sizes=st.lists(st.integers(1, 120), min_size=1, max_size=8),
    name=st.sampled_from(["falcon-40b", "falcon-7b", "falcon-rw-1b"]),
    batch=st.integers(1, 16),
)
def test_a_plan_that_fits_places_every_layer_within_the_memory(sizes, name, batch):
    devices = [Device("gpu", key, size * GIB) for key, size in enumerate(sizes)]
    plan = fk.plan(name, devices=devices, batch=batch)
    assert not (plan.fits and plan.tight)
    if plan.fits or plan.tight:
        assert sum(layers_on(plan)) == fk.spec(name).layers
        assert all(used(plan)[device.key] <= device.free_bytes for device in plan.devices)
    else:
        assert plan.device_map == {}
    assert plan.suggestions or plan.fits
    if plan.fits:
        assert all(used(plan)[device.key] <= device.safe_bytes for device in plan.devices)


@given(sizes=st.lists(st.integers(20, 120), min_size=1, max_size=6), more=st.integers(1, 40))
def test_more_memory_never_makes_a_plan_worse(sizes, more):
    less, larger = ([Device("gpu", key, (size + extra) * GIB) for key, size in enumerate(sizes)] for extra in (0, more))
    assert fk.plan("falcon-40b", devices=larger).fits >= fk.plan("falcon-40b", devices=less).fits


def test_layers_are_spread_so_that_equal_devices_keep_equal_room():
    assert layers_on(fk.plan("falcon-40b", devices="4x40GiB")) == [15, 15, 15, 15]
    uneven = layers_on(fk.plan("falcon-40b", devices=[Device("a", 0, 80 * GIB), Device("b", 1, 40 * GIB)]))
    assert uneven[0] > uneven[1]


def test_the_device_map_covers_the_model_and_splits_no_layer():
    with torch.device("meta"):
        model = FalconForCausalLM(FalconConfig(**fk.spec("falcon-40b").to_config()))
    device_map = fk.plan("falcon-40b", devices="4x40GiB").device_map
    check_device_map(model, dict(device_map))
    assert device_map["lm_head"] == device_map["transformer.word_embeddings"]


def test_accelerate_runs_a_model_by_the_plans_map():
    config = small_config("40b")
    model = FalconForCausalLM(config).eval()
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    plan = fk.plan(fk.FalconSpec.from_config(config.to_dict()), "float32", devices=[Device("cpu", "cpu", 4 * GIB)])
    assert torch.equal(dispatch_model(model, dict(plan.device_map), force_hooks=True)(ids).logits, expected)


# Offload targets


def gpu_and(*more, gib=40):
    return [Device("gpu", 0, gib * GIB), *more]


def test_layers_that_find_no_room_are_kept_in_host_memory():
    plan = fk.plan("falcon-40b", devices=gpu_and(Device("host memory", "cpu", 90 * GIB, offload_target=True)))
    on_gpu, kept = layers_on(plan)
    assert (plan.fits, on_gpu + kept) == (True, 60)
    assert used(plan)[0] <= plan.devices[0].safe_bytes < used(plan)[0] + 2 * plan.spec.layer_parameters


def test_a_disk_takes_what_host_memory_cannot():
    devices = gpu_and(
        Device("host memory", "cpu", 10 * GIB, offload_target=True),
        Device("disk", "disk", 900 * GIB, offload_target=True),
    )
    plan = fk.plan("falcon-40b", devices=devices)
    assert plan.fits
    assert used(plan)["cpu"] <= 10 * GIB < used(plan)["cpu"] + 2 * plan.spec.layer_parameters
    assert layers_on(plan)[2] > 0


def test_the_cache_of_a_layer_that_is_kept_elsewhere_lies_where_it_is_computed():
    plan = fk.plan("falcon-40b", devices=gpu_and(Device("host memory", "cpu", 90 * GIB, offload_target=True)))
    assert sum(row.bytes for row in plan.rows if row.part == "KV cache" and row.device == 0) == plan.kv_bytes


def test_the_smallest_gpu_that_can_compute_keeps_no_layer_of_its_own():
    host = Device("host memory", "cpu", 200 * GIB, offload_target=True)
    sizes = range(GIB, 16 * GIB, GIB // 4)
    plans = (fk.plan("falcon-40b", devices=[Device("gpu", 0, size), host]) for size in sizes)
    assert layers_on(next(plan for plan in plans if plan.fits)) == [0, 60]


def test_each_gpu_has_rows_for_computing_its_layers_and_host_memory_that_keeps_some_only_their_weights():
    gpus = [Device("gpu", key, 30 * GIB) for key in range(2)]
    plan = fk.plan("falcon-40b", devices=[*gpus, Device("host memory", "cpu", 200 * GIB, offload_target=True)])
    parts = [[row.part for row in plan.rows if row.device == device.key] for device in plan.devices]
    first, second, host = ([part for part in each if not part.startswith("layers")] for each in parts)
    assert {"KV cache", "activations", "overhead"} <= {*first}
    assert sorted(second) == ["KV cache", "activations", "overhead"]
    assert host == []
    assert all(layers_on(plan))


def test_nothing_is_kept_elsewhere_that_has_room():
    plan = fk.plan("falcon-7b", devices=gpu_and(Device("host memory", "cpu", 90 * GIB, offload_target=True)))
    assert layers_on(plan) == [32, 0]


def test_a_place_that_keeps_too_little_does_not_make_it_fit():
    plan = fk.plan("falcon-40b", devices=gpu_and(Device("host memory", "cpu", 9 * GIB, offload_target=True)))
    assert not plan.fits


@given(gpu=st.integers(4, 120), host=st.integers(1, 120), disk=st.integers(0, 120))
def test_places_that_keep_are_filled_within_their_size(gpu, host, disk):
    devices = gpu_and(
        Device("host memory", "cpu", host * GIB, offload_target=True),
        Device("disk", "disk", disk * GIB, offload_target=True),
        gib=gpu,
    )
    plan = fk.plan("falcon-40b", devices=devices)
    if plan.fits:
        assert sum(layers_on(plan)) == 60
        assert all(used(plan)[device.key] <= device.free_bytes for device in plan.devices)


@given(gpu=st.integers(0, 8), host=st.integers(0, 120), name=st.sampled_from(["falcon-40b", "falcon-7b"]))
@example(gpu=6, host=74, name="falcon-40b")  # tight
def test_there_is_a_device_map_exactly_where_it_fits_or_is_tight(gpu, host, name):
    devices = gpu_and(Device("host memory", "cpu", host * GIB, offload_target=True), gib=gpu)
    plan = fk.plan(name, devices=devices)
    assert bool(plan.device_map) == (plan.fits or bool(plan.tight))
    assert plan.fits == (not plan.suggestions)
