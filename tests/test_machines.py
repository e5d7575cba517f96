"""Devices named by a few words, or found here."""

import re

import pytest

from falcon_kit.environment import environment
from falcon_kit.machines import GPUS, MACHINES, Slot, find_slots


@pytest.mark.parametrize(
    ("words", "count", "size"),
    [
        ("4x40GiB", 4, 40 * 2**30),
        (" 2 x 24 GB ", 2, 24 * 10**9),
        ("512MiB", 1, 512 * 2**20),
        ("1.5TiB", 1, 1.5 * 2**40),
        ("T4", 1, 15360 * 2**20),
        ("2xa100-80", 2, 81920 * 2**20),
        ("8 x H100-80GB", 8, 81559 * 2**20),
        ("ml.g5.12xlarge", 4, 23028 * 2**20),
        ("p4d.24xlarge", 8, 40960 * 2**20),
        ("Colab-T4", 1, 15360 * 2**20),
    ],
)
def test_words_stand_for_devices(words, count, size):
    slots = find_slots(words)
    assert [(slot.key, slot.free_bytes) for slot in slots] == [(key, size) for key in range(count)]


@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_has_gpus_of_a_known_kind(name):
    count, kind = MACHINES[name]
    assert [slot.name for slot in find_slots(name)] == [kind] * count
    assert kind in GPUS


def test_without_words_it_is_this_machine():
    here = environment()
    slots = find_slots(None)
    expected = [device.name for device in here.devices if device.kind == "cuda"] or ["cpu"]
    assert [slot.name for slot in slots] == expected


def test_devices_of_ones_own_are_taken_as_they_are():
    own = [Slot("mine", 0, 10), Slot("yours", 1, 20)]
    assert find_slots(own) == tuple(own)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("A100-800GB", "Unknown devices 'A100-800GB'. Nearest: A100-80GB"),
        ("a lot", "Or give a size, such as '4x40GiB'"),
        ("0x40GiB", "0 x 40giB is no memory to plan with"),
        ([], "devices is empty"),
    ],
)
def test_words_that_stand_for_nothing_are_refused(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_slots(words)
