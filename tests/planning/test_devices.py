"""Devices by name, and those of this machine."""

import json
import re
from pathlib import Path

import pytest

import falcon_kit as fk
from falcon_kit.planning.devices import MARGIN, Device, identical_gpus, local_devices, resolve_devices
from falcon_kit.planning.environment import Accelerator, environment
from falcon_kit.planning.machines import GPUS, MACHINES, published_report, rental

HOST = Device("host memory", "cpu", 2**36, offload_target=True)


@pytest.mark.parametrize(
    ("words", "count", "size"),
    [
        ("4x40GiB", 4, 40 * 2**30),
        (" 2 x 24 GB ", 2, 24 * 10**9),
        ("512MiB", 1, 512 * 2**20),
        ("1.5TiB", 1, 1.5 * 2**40),
        ("80GB", 1, 80 * 10**9),
        ("4 x 40 GiB", 4, 40 * 2**30),
        ("40 GiB x 4", 4, 40 * 2**30),
        ("40GiBx4", 4, 40 * 2**30),
    ],
)
def test_words_stand_for_devices(words, count, size):
    devices = resolve_devices(words)
    assert [(device.key, device.free_bytes) for device in devices] == [(key, size) for key in range(count)]


@pytest.mark.parametrize(
    ("words", "count", "gpu"),
    [
        ("T4", 1, "T4"),
        ("Tesla T4", 1, "T4"),
        ("H100", 1, "H100-80GB"),
        ("NVIDIA H100 80GB HBM3", 1, "H100-80GB"),
        ("8xH100", 8, "H100-80GB"),
        ("8 x h100", 8, "H100-80GB"),
        ("8 H100s", 8, "H100-80GB"),
        ("H100 x 8", 8, "H100-80GB"),
        ("8*H100", 8, "H100-80GB"),
        ("H100 SXM x 8", 8, "H100-80GB"),
        ("NVIDIA H100 PCIe x 2", 2, "H100-80GB"),
        ("NVIDIA H100 80GB HBM3e x2", 2, "H100-80GB"),
        ("A100 80GB x 2", 2, "A100-80GB"),
        ("MI300X x 8", 8, "MI300X"),
        ("MI300X*8", 8, "MI300X"),
        ("8 x A100 80GB", 8, "A100-80GB"),
        ("2xa100-80", 2, "A100-80GB"),
        ("a100 80g", 1, "A100-80GB"),
        ("NVIDIA A100-SXM4-80GB", 1, "A100-80GB"),
        ("A100-PCIE-40GB", 1, "A100-40GB"),
        ("A100-SXM-80GB", 1, "A100-80GB"),
        ("H100 SXM 80GB", 1, "H100-80GB"),
        ("8x H100 SXM 80GB", 8, "H100-80GB"),
        ("H100 SXM5", 1, "H100-80GB"),
        ("RTX4090", 1, "RTX-4090"),
        ("GeForceRTX4090", 1, "RTX-4090"),
        ("H200 GPU", 1, "H200"),
        ("A100", 1, "A100-40GB"),
        ("8xA100", 8, "A100-40GB"),
        ("V100", 1, "V100-16GB"),
        ("L4", 1, "L4"),
        ("4xL40S", 4, "L40S"),
        ("2 L40Ss", 2, "L40S"),
        ("L40", 1, "L40"),
        ("A10", 1, "A10"),
        ("4xA10G", 4, "A10G"),
        ("GeForce RTX 4090", 1, "RTX-4090"),
        ("4090", 1, "RTX-4090"),
        ("2x 4090", 2, "RTX-4090"),
        ("RTX 3090", 1, "RTX-3090"),
        ("RTX 4090", 1, "RTX-4090"),
        ("2x RTX 4090", 2, "RTX-4090"),
        ("A100 40GB", 1, "A100-40GB"),
        ("MI300X", 1, "MI300X"),
        ("8xmi300x", 8, "MI300X"),
        ("AMD Instinct MI300X", 1, "MI300X"),
        ("A6000", 1, "RTX-A6000"),
        ("4x NVIDIA RTX A6000", 4, "RTX-A6000"),
        ("RTX 6000 Ada", 1, "RTX-6000-Ada"),
        ("NVIDIA RTX 6000 Ada Generation", 1, "RTX-6000-Ada"),
        ("RTX PRO 6000", 1, "RTX-PRO-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 1, "RTX-PRO-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 1, "RTX-PRO-6000"),
        ("8xB200", 8, "B200"),
        ("ml.g5.12xlarge", 4, "A10G"),
        ("g5.12xlarge", 4, "A10G"),
        ("p4d.24xlarge", 8, "A100-40GB"),
        ("a2-highgpu-8g", 8, "A100-40GB"),
        ("a2-ultragpu-1g", 1, "A100-80GB"),
        ("Standard_NC24ads_A100_v4", 1, "A100-80GB"),
        ("nc96ads-a100-v4", 4, "A100-80GB"),
        ("Standard_NC40ads_H100_v5", 1, "H100-NVL-94GB"),
        ("nc80adis-h100-v5", 2, "H100-NVL-94GB"),
        ("Standard_ND96isr_H100_v5", 8, "H100-80GB"),
        ("NVIDIA H100 NVL", 1, "H100-NVL-94GB"),
        ("2 x H100 NVL 94GB", 2, "H100-NVL-94GB"),
        ("n1-standard-4+T4", 1, "T4"),
        ("n1-standard-8 + nvidia-tesla-t4", 1, "T4"),
        ("n1-standard-8 + 2 x nvidia-tesla-t4", 2, "T4"),
        ("Colab-T4", 1, "T4"),
        ("colab a100", 1, "A100-40GB"),
        ("kaggle-t4x2", 2, "T4"),
    ],
)
def test_a_gpu_is_found_by_the_words_that_people_type(words, count, gpu):
    assert {(each.name, each.free_bytes) for each in resolve_devices(words)} == {(gpu, GPUS[gpu])}
    assert len(resolve_devices(words)) == count


def test_offload_targets_alone_are_refused():
    with pytest.raises(ValueError, match="holds only offload targets: add a GPU or the CPU"):
        resolve_devices([Device("disk", "disk", 2**40, offload_target=True)])


@pytest.mark.parametrize(("words", "name"), [("8x24gib", "24GiB"), ("40GB", "40GB"), ("512 MiB", "512 MiB")])
def test_a_size_is_shown_in_its_units(words, name):
    assert resolve_devices(words)[0].name == name


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_is_found_by_its_name_and_by_a_count_of_it(name):
    assert [device.name for device in resolve_devices(name)] == [name]
    assert [device.name for device in resolve_devices(f"3 x {name.replace('-', ' ')}")] == [name] * 3


@pytest.mark.parametrize(
    ("gpu", "seen"), [("A100-80GB", 79.15), ("A100-40GB", 39.5), ("T4", 14.75)]
)  # torch's "total capacity" in published errors
def test_a_gpu_has_what_torch_can_allocate_and_not_what_nvidia_smi_prints(gpu, seen):
    (device,) = resolve_devices(gpu)
    assert seen * 0.98 < device.free_bytes / 2**30 <= seen


@pytest.mark.parametrize("name", MACHINES)
def test_no_two_machines_are_meant_by_one_name(name):
    assert {device.machine for device in resolve_devices(name.lower().replace("_", "-"))} == {name}


def test_a_plan_leaves_a_part_of_a_gpu_free_and_nothing_of_host_memory():
    gpu, cpu = Device("gpu", 0, 1000), Device("cpu", "cpu", 1000)
    assert (gpu.safe_bytes, cpu.safe_bytes) == (1000 * (1 - MARGIN), 1000)


def test_a_machine_tells_its_host_memory_where_a_figure_is_known():
    hosts = {name: machine.host_bytes for name, machine in MACHINES.items()}
    for name in ("colab-t4", "colab-l4", "ml.g5.12xlarge"):
        assert {device.host_bytes for device in resolve_devices(name)} == {hosts[name]}
    assert (hosts["colab-l4"], hosts["ml.g5.12xlarge"]) == (None, 192 * 2**30)
    assert {device.host_bytes for device in resolve_devices("4xA10G")} == {None}


PRICED = [machine for machine in MACHINES.values() if machine.price]


@pytest.mark.parametrize("machine", PRICED, ids=lambda machine: machine.name)
def test_a_price_has_its_date_and_its_source(machine):
    assert re.fullmatch(r"20\d\d(-\d\d-\d\d)?", machine.price.as_of)
    assert machine.price.source.startswith("https://")
    assert 0.1 < machine.price.usd_per_hour / machine.count < 20
    assert machine.price.as_of in str(machine.price)


def test_more_gpus_of_a_kind_cost_more_an_hour():
    for gpu in GPUS:
        prices = [price.usd_per_hour for count in range(1, 9) if (price := rental(count, gpu))]
        assert prices == sorted(set(prices))
    assert rental(2, "A100-80GB").usd_per_hour == 5
    assert (rental(3, "T4"), rental(1, "V100-16GB")) == (None, None)


def test_every_price_is_that_of_a_machine():
    stored = json.loads((Path(fk.__file__).parent / "planning" / "devices.json").read_text())["prices"]
    assert {machine.name for machine in PRICED} == set(stored)


def test_reports_are_found_by_the_size_of_a_model_and_its_dtype():
    assert published_report(fk.spec("falcon-40b-instruct"), "float16")[0] == 90 * 10**9
    assert published_report(fk.spec("falcon-40b"), "nf4")[0] == 27 * 10**9
    assert published_report(fk.spec("falcon-40b"), "float32") is None
    assert published_report(fk.spec("falconet"), "bfloat16") is None


@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_has_gpus_of_a_known_kind(name):
    machine = MACHINES[name]
    assert [device.name for device in resolve_devices(name)] == [machine.gpu] * machine.count
    assert machine.gpu in GPUS


def test_without_words_it_is_this_machine():
    here = environment()
    devices = resolve_devices(None)
    expected = [device.name for device in here.devices if device.kind == "cuda"] or ["cpu"]
    assert [device.name for device in devices] == expected


def test_this_machine_is_found_without_the_versions_of_packages(monkeypatch):
    monkeypatch.setattr("falcon_kit.planning.environment.version", None)
    assert resolve_devices(None)


def test_devices_of_ones_own_are_taken_as_they_are():
    own = [Device("mine", 0, 10), Device("yours", 1, 20)]
    assert resolve_devices(own) == tuple(own)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("A100-800GB", "Unknown devices 'A100-800GB'. Nearest: A100-80GB"),
        ("a lot", "or a size, such as '4x40GiB'."),
        ("a lot", "Or give a machine of AWS, Google Cloud, Azure, Colab, Kaggle, such as 'ml.g5.12xlarge'"),
        ("n1-standard-8", "Nearest: n1-standard-8+T4"),
        ("ml.g5.13xlarge", "Nearest: ml.g5.16xlarge, ml.g5.12xlarge"),
        ("0x40GiB", "0 x 40GiB: give from 1 to 4096 devices"),
        ("0GiB", "0GiB has no memory: give a larger size"),
        ("99999999TiB", "'99999999tib' is more than any device has: at most 2**63 - 1 bytes"),
        ("9" * 400 + "GB", "is more than any device has"),
        ("9" * 400 + " x T4", "x T4: give from 1 to 4096 devices"),
        (["x" * 900], "names no device"),
        ([HOST, Device("gpu", 0, 10)], "names an offload target before a device that computes: put it last"),
        ([Device("a", 0, 10), Device("b", 0, 10)], "has the key 0 twice: give each Device a key of its own"),
        (
            [Device("a", 0, 10, machine="mine")],
            "has a Device of the unknown machine 'mine': leave its machine out",
        ),
        ([], "devices=[] names no device: leave it out"),
        (4, "devices=4 names no device: leave it out"),
        (["A100-80GB"] * 2, "give one text, such as '2xA100-80GB'"),
        ("1.5.5GiB", "Unknown devices '1.5.5GiB'"),
    ],
)
def test_words_that_stand_for_nothing_are_refused(words, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        resolve_devices(words)
    assert len(str(refused.value)) < 400


def test_an_offload_target_is_no_rank_of_tensor_parallelism():
    devices = [Device("gpu", 0, 2**36), HOST]
    with pytest.raises(ValueError, match="tensor_parallel=2 needs a device per rank; there are 1"):
        fk.plan("falcon-40b", devices=devices, tensor_parallel=2)


# For loading


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that seems to have two GPUs of 40 GiB."""
    devices = (Device("A100", 0, 40 * 2**30), Device("A100", 1, 40 * 2**30))
    monkeypatch.setattr("falcon_kit.planning.devices.resolve_devices", lambda _: devices)
    return devices


def test_without_wishes_the_devices_here_are_used(two_gpus):
    assert local_devices() == two_gpus


@pytest.mark.usefixtures("two_gpus")
def test_max_memory_limits_and_leaves_alone_what_it_does_not_name():
    (device,) = local_devices({1: "20GiB"})
    assert (device.key, device.free_bytes) == (1, 20 * 2**30)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("1GB", "max_memory='1GB' is not a dict: give {0: '20GiB'}; this machine has 0, 1"),
        (
            {"disk": "1TiB"},
            "max_memory={'disk': '1TiB'} names only offload targets; this machine has 0, 1, 'cpu', 'disk'",
        ),
    ],
)
def test_max_memory_without_a_device_is_refused_with_those_there_are(given, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        local_devices(given, "disk" if "disk" in given else None, tmp_path)


def test_a_rank_asks_for_the_memory_of_its_own_gpu_alone(monkeypatch):
    asked = []
    found = lambda only: asked.append(only) or (Accelerator("T4", "cuda", only, 2000, 1000),)  # noqa: E731
    monkeypatch.setattr("falcon_kit.planning.devices.find_accelerators", found)
    assert (identical_gpus(1, 2), asked) == ((Device("T4", 0, 1000, here=True), Device("T4", 1, 1000, here=True)), [1])


@pytest.mark.usefixtures("two_gpus")
def test_max_memory_may_be_a_fraction_of_bytes():
    (device,) = local_devices({0: 2e9 + 0.5})
    assert device.free_bytes == 2_000_000_000
    assert isinstance(device.free_bytes, int)


@pytest.mark.usefixtures("two_gpus")
def test_max_memory_makes_no_device_larger_than_it_is():
    assert local_devices({0: "500GiB", 1: 10**9})[0].free_bytes == 40 * 2**30


def test_the_folder_to_offload_to_need_not_be_there_yet(tmp_path):
    *_, disk = local_devices(None, "disk", tmp_path / "not" / "yet")
    assert (disk.key, disk.free_bytes > 0) == ("disk", True)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("offload", "keys"), [("cpu", [0, 1, "cpu"]), ("disk", [0, 1, "cpu", "disk"])])
def test_offloading_adds_places_that_only_keep_behind_the_gpus(offload, keys, tmp_path):
    devices = local_devices(None, offload, tmp_path)
    assert [device.key for device in devices] == keys
    assert [device.offload_target for device in devices] == [key in ("cpu", "disk") for key in keys]
