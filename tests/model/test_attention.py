"""Which kernel a single row takes, and the switch behind it. How grouped keys are read is held in test_modeling.py."""

import threading

import pytest
import torch

from falcon_kit.model import attention

WEIGHTS = [torch.ones(8, 4, dtype=torch.bfloat16)]


def on():
    return torch.backends.mkldnn.enabled


@pytest.mark.parametrize(("own", "faster"), [(1.0, False), (0.95, False), (0.85, True), (2.0, False)])
def test_the_other_kernel_must_be_a_tenth_faster(monkeypatch, own, faster):
    monkeypatch.setattr(attention, "_seconds", lambda rows, weights: 1.0 if on() else own)
    assert attention.faster_without_onednn(WEIGHTS) is faster


def test_both_kernels_are_really_timed():
    assert attention.faster_without_onednn([torch.ones(512, 512, dtype=torch.bfloat16)]) in (True, False)


@pytest.mark.parametrize("weights", [[], [torch.ones(8, 4)], [torch.ones(8, 4, dtype=torch.bfloat16, device="meta")]])
def test_only_16_bit_weights_on_a_cpu_are_looked_at(monkeypatch, weights):
    monkeypatch.setattr(attention, "_seconds", lambda *_: pytest.fail("timed"))
    assert attention.faster_without_onednn(weights) is False


def test_timing_ends_when_the_sample_is_large_enough():
    weights = [torch.empty(2**13, 2**12, dtype=torch.bfloat16)] * 5  # 64 MiB each
    assert len(attention._sample(weights)) == 2


def test_onednn_is_off_inside_and_back_on_afterwards():
    with attention.without_onednn():
        inside = on()
    assert (inside, on()) == (False, True)


def test_an_error_inside_switches_it_back_on():
    with pytest.raises(KeyboardInterrupt), attention.without_onednn():
        raise KeyboardInterrupt
    assert on()


def test_threads_may_overlap():
    """Whoever comes first does not switch it on while the other one is inside, and the last one does."""
    entered, leave = threading.Event(), threading.Event()

    def other():
        with attention.without_onednn():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with attention.without_onednn():
        thread.start()
        entered.wait()
    between = on()
    leave.set()
    thread.join()
    assert (between, on()) == (False, True)


def test_a_user_who_has_switched_it_off_finds_it_off(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with attention.without_onednn():
        pass
    assert not on()


def test_a_user_who_switches_it_on_meanwhile_finds_it_on():
    torch.backends.mkldnn.enabled = False
    with attention.without_onednn():
        torch.backends.mkldnn.enabled = True
    assert on()


def test_a_locked_switch_is_left_alone(monkeypatch):
    monkeypatch.setattr("torch.backends.flags_frozen", lambda: True)
    with attention.without_onednn():
        assert on()
