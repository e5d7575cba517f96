"""How a CPU multiplies: in slabs, and a single row without oneDNN, with the setting behind it."""

import copy
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from falcon_kit.catalogue.memory import SLAB
from falcon_kit.model import attention, products
from falcon_kit.planning.places import read_text
from tests.model.conftest import IDS, assert_close, pair, run

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
WEIGHTS = [torch.ones(8, 4, dtype=torch.bfloat16)]


def on():
    return torch.backends.mkldnn.enabled


@pytest.mark.parametrize(("own", "faster"), [(1.0, False), (0.95, False), (0.85, True), (2.0, False)])
def test_the_other_kernel_must_be_a_tenth_faster(monkeypatch, own, faster):
    monkeypatch.setattr(products, "_seconds", lambda rows, weights: 1.0 if on() else own)
    assert products.faster_without_onednn(WEIGHTS) is faster


def test_both_kernels_are_really_timed():
    assert products.faster_without_onednn([torch.ones(512, 512, dtype=torch.bfloat16)]) in (True, False)


@pytest.mark.parametrize("weights", [[], [torch.ones(8, 4)], [torch.ones(8, 4, dtype=torch.bfloat16, device="meta")]])
def test_only_16_bit_weights_on_a_cpu_are_looked_at(monkeypatch, weights):
    monkeypatch.setattr(products, "_seconds", lambda *_: pytest.fail("timed"))
    assert products.faster_without_onednn(weights) is False


def test_timing_ends_when_the_sample_is_large_enough():
    weights = [torch.empty(2**13, 2**12, dtype=torch.bfloat16)] * 5  # 64 MiB each
    assert len(products._sample(weights)) == 2


SWITCHES = pytest.mark.parametrize(
    ("off", "is_on"),
    [
        (products.without_onednn, on),
        (attention.without_cudnn_attention, torch.backends.cuda.cudnn_sdp_enabled),
    ],
    ids=["onednn", "cudnn"],
)


@SWITCHES
def test_a_setting_is_off_inside_and_back_on_afterwards(off, is_on):
    with off():
        inside = is_on()
    assert (inside, is_on()) == (False, True)


@SWITCHES
def test_an_error_inside_switches_it_back_on(off, is_on):
    with pytest.raises(KeyboardInterrupt), off():
        raise KeyboardInterrupt
    assert is_on()


@SWITCHES
def test_threads_may_overlap(off, is_on):
    """Whoever comes first does not switch it on while the other one is inside, and the last one does."""
    entered, leave = threading.Event(), threading.Event()

    def other():
        with off():
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=other, daemon=True)
    with off():
        thread.start()
        assert entered.wait(20)
    between = is_on()
    leave.set()
    thread.join(20)
    assert (between, is_on()) == (False, True)


@pytest.mark.parametrize(
    ("device", "cached", "static", "used"),
    [("cuda", 5, False, True), ("cuda", 0, False, False), ("cuda", 5, True, False), ("cpu", 5, False, False)],
)
def test_cudnn_is_left_out_where_keys_are_cached_on_cuda(device, cached, static, used):
    weight = SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16)
    past = SimpleNamespace(is_compileable=static, get_seq_length=lambda: cached)
    with attention.step_kernels(weight, IDS, past, False, 0):
        assert torch.backends.cuda.cudnn_sdp_enabled() is not used


def test_a_user_who_has_switched_it_off_finds_it_off(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with products.without_onednn():
        pass
    assert not on()


def test_a_user_who_switches_it_on_meanwhile_finds_it_on():
    torch.backends.mkldnn.enabled = False
    with products.without_onednn():
        torch.backends.mkldnn.enabled = True
    assert on()


def test_a_locked_switch_is_left_alone(monkeypatch):
    monkeypatch.setattr("torch.backends.flags_frozen", lambda: True)
    with products.without_onednn():
        assert on()


def test_a_step_of_one_row_computes_without_onednn_when_told_so():
    kit = copy.deepcopy(pair("40b", torch.bfloat16)[1])
    kit.single_rows_without_onednn = True
    seen = []
    kit.lm_head.register_forward_hook(lambda *_: seen.append(torch.backends.mkldnn.enabled))
    run(kit, IDS[:1, :1])
    run(kit, IDS[:2, :1])
    run(kit, None, inputs_embeds=kit.get_input_embeddings()(IDS[:1, :1]))
    assert (seen, torch.backends.mkldnn.enabled) == ([False, True, False], True)


def test_single_rows_give_the_same_logits_by_either_kernel(layout):
    kit = copy.deepcopy(pair(layout, torch.bfloat16)[1])
    expected = run(kit, IDS[:1, :1]).logits.float()
    kit.single_rows_without_onednn = True
    assert_close(run(kit, IDS[:1, :1]).logits.float(), expected, 0.02 * expected.abs().max())


# In slabs


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def no_instructions(monkeypatch):
    """A CPU without instructions for 16-bit products."""
    monkeypatch.setattr(products, "has_products", lambda dtype: dtype == torch.float32)


@each_dtype
@given(
    out=st.sampled_from([1, 64, 130, 600]),
    into=st.sampled_from([1, 64, 5000, SLAB // 256 + 1]),
    leading=st.sampled_from([(3,), (1, 2), (2, 3, 2), (0,)]),
    bias=st.booleans(),
)
def test_a_product_in_slabs_is_the_exact_one_rounded_once(dtype, out, into, leading, bias):
    x, weight = random(*leading, into).to(dtype), (random(out, into, seed=1) / into**0.5).to(dtype)
    added = random(out, seed=2).to(dtype) if bias else None
    product = products.linear_in_slabs(x, weight, added)
    exact = functional.linear(x.double(), weight.double(), None if added is None else added.double())
    assert (product.dtype, product.shape) == (dtype, exact.shape)
    sums = x.double().abs() @ weight.double().abs().T
    allowed = torch.finfo(dtype).eps * exact.abs() + torch.finfo(torch.float32).eps * into**0.5 * sums + 1e-7
    assert ((product.double() - exact).abs() <= allowed).all()


@each_dtype
@pytest.mark.parametrize(("out", "into"), [(1, 1), (65024, 2048), (130, 2**20), (4672, 18176), (600, 5000)])
def test_slabs_cover_every_output_once(out, into, dtype):
    parts = list(products.slabs(out, into, dtype))
    assert [each for part in parts for each in range(out)[part]] == list(range(out))
    assert all(
        (part.stop - part.start) * into * dtype.itemsize <= max(SLAB, 64 * into * dtype.itemsize) for part in parts
    )


@pytest.mark.parametrize(("dtype", "own"), [(torch.float32, True), (torch.bfloat16, False)])
def test_a_weight_in_another_dtype_is_copied_slab_by_slab_into_one_place(dtype, own):
    weight = random(2500, 1200).to(dtype)
    storages = [values.untyped_storage().data_ptr() for _, values in products.slabs_of(weight, torch.float32)]
    assert len(storages) > 1
    assert len(set(storages)) == 1
    assert (storages[0] == weight.untyped_storage().data_ptr()) is own


VNNI = {"avx_vnni", "avx512_vnni"} & set(read_text(Path("/proc/cpuinfo")).split())
"""Names that Linux has for the instructions."""
needs_vnni = pytest.mark.skipif(not VNNI, reason="this CPU has no instructions for products of integers")


@pytest.mark.skipif(sys.platform != "linux", reason="the flags of other systems are not read")
@pytest.mark.parametrize(("isa", "has"), [("AVX2", False), ("AVX2_VNNI", "avx_vnni" in VNNI), ("DEFAULT", bool(VNNI))])
def test_integers_are_multiplied_where_the_cpu_has_instructions_for_them(isa, has):
    code = "from falcon_kit.model.products import multiplies_in_integers; print(multiplies_in_integers(2048, 2048))"
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": isa}
    said = subprocess.check_output([sys.executable, "-c", code], env=os.environ | limits, text=True).strip()
    assert said == str(has)


def test_sums_that_exceed_32_bits_are_not_multiplied_in_integers(monkeypatch):
    monkeypatch.setattr(products, "_has_integer_products", lambda capability: True)
    assert products.multiplies_in_integers(14848, 59392)  # the 180B's MLP, the widest published
    assert not products.multiplies_in_integers(14848, 2**17)


def test_small_layers_are_not_multiplied_in_integers(monkeypatch):
    monkeypatch.setattr(products, "_has_integer_products", lambda capability: True)
    assert products.multiplies_in_integers(2048, 2048)
    assert not products.multiplies_in_integers(2048, 2047)


def test_a_torch_whose_operator_differs_multiplies_in_other_ways(monkeypatch):
    monkeypatch.setattr(products, "packed_for_integers", lambda weight: torch.ops.onednn.no_such_operator(weight))
    products._has_integer_products.cache_clear()
    assert not products._has_integer_products("AVX512")
    products._has_integer_products.cache_clear()


@each_dtype
@given(
    rows=st.sampled_from([1, 2, 130, 300]),
    into=st.sampled_from([1, 64, 5000]),
    outlier=st.sampled_from([0.0, 1.0, 100.0]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_two_bytes_are_as_near_as_their_bits_allow(dtype, rows, into, outlier, scale):
    x = (scale * random(rows, into)).to(dtype)
    x[:, 0] += outlier
    halves, unit = products.two_bytes(x)
    high, low = (halves.double() - 128).view(2, rows, into)
    error = ((256 * high + low) * unit - x.double()).abs()
    assert (error <= x.double().abs().amax(1, keepdim=True) / 65024 * 1.02).all()  # 2% for float32


@needs_vnni
@each_dtype
@given(
    shape=st.tuples(st.sampled_from([0, 1, 2, 130]), st.sampled_from([1, 64, 600]), st.sampled_from([1, 2, 64, 5000])),
    outlier=st.sampled_from([0.0, 1.0, 100.0]),
)
def test_a_product_in_integers_is_exact_but_for_its_rows(dtype, shape, outlier):
    rows, out, into = shape
    x = random(rows, into).to(dtype)
    x[:, 0] += outlier
    weight = torch.randint(-127, 128, (out, into), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    scales = random(out, seed=2).abs().bfloat16() / into
    product = products.integer_product(x, products.packed_for_integers(weight), scales)
    halves, unit = products.two_bytes(x)
    high, low = (halves.double() - 128).view(2, rows, into)
    exact = (256 * high + low) * unit @ weight.double().T * scales.double()
    allowed = torch.finfo(dtype).eps * exact.abs() + 1e-6 * (
        x.double().abs() @ weight.double().abs().T * scales.double()
    )
    assert (product.dtype, product.shape) == (dtype, exact.shape)
    assert ((product.double() - exact).abs() <= allowed + 1e-7).all()


@needs_vnni
def test_a_product_in_integers_is_on_the_device_of_its_rows_and_not_on_the_default_one():
    rows, scales = random(3, 64), torch.ones(64)
    weight = products.packed_for_integers(torch.ones(64, 64, dtype=torch.int8))
    expected = products.integer_product(rows, weight, scales)
    products._has_integer_products.cache_clear()
    with torch.device("meta"):
        found = products.integer_product(rows, weight, scales)
        known = products._has_integer_products(torch.backends.cpu.get_cpu_capability())
    assert torch.equal(found, expected)
    assert known


@needs_vnni
@each_dtype
@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf, math.nan])
def test_a_row_that_is_zero_or_not_finite_is_so_in_its_product_and_in_no_other(dtype, value):
    x, weight = random(3, 64).to(dtype), products.packed_for_integers(torch.ones(64, 64, dtype=torch.int8))
    x[1] = 0
    x[1, 5] = value
    product = products.integer_product(x, weight, torch.ones(64))
    assert product[[0, 2]].isfinite().all()
    assert (product[1] == 0).all() if value == 0 else not product[1].isfinite().any()


@needs_vnni
@pytest.mark.parametrize(("out", "into"), [(1, 1), (64, 64), (70, 130), (600, 5000)])
def test_the_layout_of_onednn_is_undone_exactly(out, into):
    weight = torch.randint(-127, 128, (out, into), dtype=torch.int8)
    assert torch.equal(products.unpacked(products.packed_for_integers(weight)), weight)


@pytest.mark.parametrize(("rows", "in_slabs"), [(3, False), (4, True), (64, True)])
def test_16_bits_take_slabs_from_four_rows_where_the_cpu_has_no_instructions(no_instructions, rows, in_slabs):
    x, weight = random(rows, 64).bfloat16(), random(128, 64).bfloat16()
    assert products.is_faster_in_slabs(x, weight) is in_slabs


def test_16_bits_with_instructions_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(products, "has_products", lambda dtype: True)
    assert not products.is_faster_in_slabs(random(64, 64).bfloat16(), random(128, 64).bfloat16())


@pytest.mark.parametrize(("into", "rows", "in_slabs"), [(8192, 2, True), (8192, 1, False), (64, 64, False)])
def test_float32_takes_slabs_for_large_weights_and_several_rows(into, rows, in_slabs):
    assert products.is_faster_in_slabs(torch.ones(rows, into), torch.ones(256, into)) is in_slabs


@pytest.mark.parametrize("which", ["input", "weight"])
def test_what_is_trained_is_left_to_torch(no_instructions, which):
    x, weight = random(8, 64).bfloat16(), random(128, 64).bfloat16()
    (x if which == "input" else weight).requires_grad_()
    assert not products.is_faster_in_slabs(x, weight)
    with torch.no_grad():
        assert products.is_faster_in_slabs(x, weight)


def test_the_context_reaches_the_layers_inside_and_ends(no_instructions):
    layer, x = nn.Linear(64, 128, dtype=torch.bfloat16), random(8, 64).bfloat16()
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(True))
    with torch.inference_mode(), products.ProductsInSlabs():
        inside = layer(x)
    assert torch.equal(inside, products.linear_in_slabs(x, layer.weight, layer.bias))
    assert seen == [True]


def test_a_model_computes_its_16_bit_layers_in_slabs(monkeypatch, no_instructions, layout):
    kit = copy.deepcopy(pair(layout, torch.bfloat16)[1])
    expected = run(kit).logits.float()
    shapes, plain = [], products.linear_in_slabs
    monkeypatch.setattr(products, "linear_in_slabs", lambda *args: shapes.append(args[1].shape) or plain(*args))
    assert_close(run(kit).logits.float(), expected, 0.02 * expected.abs().max())
    assert len(shapes) == sum(isinstance(each, nn.Linear) for each in kit.modules())


def test_a_trained_model_gets_the_gradients_of_torch(no_instructions):
    kit = copy.deepcopy(pair("40b", torch.bfloat16)[1])
    kit(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in kit.parameters())
