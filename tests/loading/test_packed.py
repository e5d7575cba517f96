"""Packed layers: what they compute, against float32 with bounds from the quantisation error; where they are refused."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo import lookup_backend

import falcon_kit as fk
from falcon_kit.loading import packed
from falcon_kit.loading.compiling import check_compilable
from falcon_kit.loading.packed import GROUP, PackedLinear, frozen, quantised4, quantised8
from falcon_kit.loading.quantizer import PackedConfig, PackedQuantizer
from falcon_kit.model import products
from tests.conftest import logits, small_model


@pytest.fixture(autouse=True, scope="module")
def layers_of_any_size_are_multiplied_in_integers():
    """The way of large layers is tested on small ones; test_instructions.py has both sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_LEAST_IN_INTEGERS", 0)
        yield


each_kind = pytest.mark.parametrize("kind", ["int8", "int4"])
shapes = st.tuples(st.sampled_from([64, 128, 192, 320]), st.sampled_from([64, 128, 576]))
ROUNDING = 2**-8  # of bfloat16


def layer(weight, kind):
    """A packed layer of a weight, as `fk.load` leaves it."""
    made = PackedLinear(*weight.shape, kind, None)
    values, scales = (quantised4 if kind == "int4" else quantised8)(weight)
    made.weight, made.scales = frozen(values), frozen(scales)
    made.pack()
    return made


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def largest_errors(weight, kind):
    """The largest error of each weight: half a step, and the rounding of the scale and the zero to bfloat16."""
    if kind == "int8":
        return (weight.abs().amax(1, keepdim=True) * (0.5 / 127 + ROUNDING)).expand_as(weight)
    groups = weight.unflatten(1, (-1, GROUP))
    span = (groups.amax(-1) - groups.amin(-1))[..., None]
    return (
        (span * (0.5 / 15 + ROUNDING) + groups.abs().amax(-1, keepdim=True) * 2 * ROUNDING).expand_as(groups).flatten(1)
    )


@each_kind
@given(shape=shapes, scale=st.sampled_from([1e-4, 0.02, 30.0]), seed=st.integers(0, 99))
def test_each_weight_is_as_near_as_its_bits_allow(kind, shape, scale, seed):
    weight = scale * random(*shape, seed=seed)
    error = (layer(weight, kind).dequantised(torch.float32) - weight).abs()
    assert (error <= largest_errors(weight, kind)).all()


@each_kind
@given(
    shape=shapes,
    rows=st.sampled_from([1, 11, 12, 13, 14, 23, 24, 63, 64, 95, 96, 200]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_a_product_is_within_the_quantisation_error_of_float32(kind, shape, rows, dtype):
    weight, x = random(*shape), random(rows, shape[1], seed=1).to(dtype)
    with torch.inference_mode():
        product = layer(weight, kind)(x)
    assert product.dtype == dtype
    expected = x.float() @ weight.T
    allowed = x.float().abs() @ (largest_errors(weight, kind) + 4 * ROUNDING * weight.abs()).T
    assert ((product.float() - expected).abs() <= allowed).all()


@given(shape=shapes, seed=st.integers(0, 99))
def test_the_layout_of_a_kernel_is_undone_exactly(shape, seed):
    weight = random(*shape, seed=seed)
    made, (expected, _) = layer(weight, "int4"), quantised4(weight)
    assert torch.equal(made.canonical(), expected)
    assert torch.equal(made.state_dict()["weight"], expected)


@each_kind
def test_a_layer_computes_the_same_beside_another_default_device(kind):
    made, x = layer(random(128, 64), kind), random(200, 64, seed=1)
    expected = made(x)
    for known in (packed._block, packed._layout):
        known.cache_clear()
    with torch.device("meta"):
        assert torch.equal(made(x), expected)


@each_kind
def test_a_layer_that_is_moved_or_cast_computes_the_same(kind):
    made, x = layer(random(128, 64), kind), random(2, 64, seed=1)
    with torch.inference_mode():
        before = made(x)
        assert torch.equal(made.to("cpu").float()(x), before)
        assert torch.equal(made.half()(x), before)
    assert made.scales.dtype == torch.bfloat16


@each_kind
@pytest.mark.parametrize("change", ["moved", "loaded"])
def test_a_layer_that_was_changed_is_packed_before_a_thread_computes_with_it(monkeypatch, kind, change):
    made, x = layer(random(128, 64), kind), random(2, 64, seed=1)
    expected = made(x)
    made.to("cpu") if change == "moved" else made.load_state_dict(made.state_dict())
    monkeypatch.setattr(PackedLinear, "pack", lambda _: pytest.fail("two threads may be here"))
    assert torch.equal(made(x), expected)


@pytest.mark.parametrize("change", ["moved", "loaded"])
def test_a_layer_whose_move_was_interrupted_refuses_to_compute_until_it_is_moved_again(monkeypatch, change):
    made, x = layer(random(128, 64), "int4"), random(2, 64, seed=1)
    expected, state = made(x), made.state_dict()

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PackedLinear, "pack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made.to("cpu") if change == "moved" else made.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"int4 layer on cpu is in the layout of no kernel.*: move the model aga"):
        made(x)
    assert torch.equal(made.to("cpu")(x), expected)


@each_kind
def test_a_layer_without_weights_computes_once_it_is_given_some(kind):
    made, x = layer(random(128, 64), kind), random(2, 64, seed=1)
    expected, state = made(x), made.state_dict()
    made.to("meta").load_state_dict(state, assign=True)
    assert torch.equal(made(x), expected)


@each_kind
def test_a_layer_computes_what_its_state_dict_loads_into_it(kind):
    made, other, x = layer(random(128, 64), kind), layer(random(128, 64, seed=1), kind), random(2, 64, seed=2)
    with torch.inference_mode():
        expected = other(x)
        assert not torch.equal(made(x), expected)
    made.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert torch.equal(made(x), expected)


@each_kind
def test_an_adapter_is_loaded_without_unpacking_the_weights(kind, monkeypatch):
    model = fk.load("falconet", dtype=kind).model
    expected = logits(model)
    monkeypatch.setattr(PackedLinear, "canonical", lambda self: pytest.fail("a weight was unpacked"))
    model.load_state_dict({"transformer.ln_f.weight": model.transformer.ln_f.weight}, strict=False)
    assert torch.equal(logits(model), expected)


@each_kind
def test_a_weight_that_starts_anywhere_in_memory_is_computed_with(kind):
    """As one in a file that is mapped into memory; torch's kernel for int8 crashes on it."""
    made = layer(random(128, 64), kind)
    values = made.canonical()
    space = torch.empty(values.numel() + 1, dtype=values.dtype)
    odd = space[1:].view(values.shape).copy_(values)
    x = torch.empty(6 * 64 + 1, dtype=torch.bfloat16)[1:].view(6, 64).copy_(random(6, 64))
    with torch.inference_mode():
        expected = layer(random(128, 64), kind)(x.clone())
        made.weight, made.packed_for = frozen(odd), None
        made.pack()
        assert torch.equal(made(x), expected)


@each_kind
def test_gradients_go_to_the_input_through_the_weight_that_computes(kind):
    made, x = layer(random(128, 64), kind), random(5, 64, seed=1).requires_grad_()
    made(x).backward(random(5, 128, seed=2))
    expected = random(5, 128, seed=2) @ made.dequantised(torch.float32)
    torch.testing.assert_close(x.grad, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    assert not any(parameter.requires_grad for parameter in made.parameters())


@pytest.mark.parametrize("rows", [2, 40, 200])
def test_int4_is_compiled_in_one_graph(rows):
    made, x = layer(random(128, 64), "int4"), random(rows, 64, seed=1)
    with torch.inference_mode():
        assert torch.equal(torch.compile(made, backend="aot_eager", fullgraph=True)(x), made(x))
    check_compilable("int4", None)


def test_int4_in_whole_is_compiled_without_a_search_for_its_layout(monkeypatch):
    """As on a GPU for many rows; the layout is found once, by packing and sorting positions, which takes long."""
    monkeypatch.setattr(PackedLinear, "product", PackedLinear.in_whole)
    made, x, operations = layer(random(256, 128), "int4"), random(70, 128, seed=1), []

    def backend(graph, inputs):
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return lookup_backend("aot_eager")(graph, inputs)

    with torch.inference_mode():
        assert torch.equal(torch.compile(made, backend=backend, fullgraph=True)(x), made(x))
    assert not [each for each in operations if "sort" in each or "pack_for_cpu" in each]


@pytest.mark.parametrize("rows", [2, 40, 200])
def test_int8_is_computed_between_what_is_compiled(rows):
    made, x = layer(random(128, 64), "int8"), random(rows, 64, seed=1)
    model = torch.nn.Sequential(torch.nn.GELU(), made, torch.nn.GELU())
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))


@each_kind
@pytest.mark.parametrize(
    "how",
    [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))],  # noqa: S301 (made here)
    ids=["copied", "pickled"],
)
def test_a_copy_computes_the_same_and_is_its_own(kind, how):
    made, x = layer(random(128, 64), kind), random(2, 64, seed=1)
    other = how(made)
    assert torch.equal(other(x), made(x))
    other.load_state_dict(layer(random(128, 64, seed=2), kind).state_dict())
    assert not torch.equal(other(x), made(x))
    assert torch.equal(made(x), layer(random(128, 64), kind)(x))


@each_kind
def test_a_bias_is_added(kind, tokenizer, tmp_path):
    small_model("rw").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    falcon = fk.load(tmp_path, dtype=kind)
    layers = [each for each in falcon.model.modules() if isinstance(each, PackedLinear)]
    assert all(each.bias is not None and each.bias.dtype == torch.bfloat16 for each in layers)
    exact = logits(small_model("rw"))
    assert float((logits(falcon.model).float() - exact).norm() / exact.norm()) < {"int8": 0.05, "int4": 0.3}[kind]


@pytest.mark.parametrize("isa", ["AVX2", "AVX2_VNNI"])
def test_both_kinds_compute_the_same_without_avx512(isa):
    """The same tests under the instruction sets of ordinary laptops."""
    isa = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": isa}
    wanted = "product or layout or gradients or anywhere"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", wanted, __file__]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, env=os.environ | isa, cwd=root, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


# Refused


def test_int4_of_a_matrix_that_is_no_multiple_of_64_is_refused(tokenizer, tmp_path):
    small_model("40b", hidden_size=160).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"multiples of 64; transformer\.h\.0.* is .*160.*: use dtype='nf4' or 'int8'"):
        fk.load(tmp_path, dtype="int4")
    assert fk.load(tmp_path, dtype="int8").weights.quantised == 8


def test_int8_on_a_gpu_needs_no_kernel(monkeypatch):
    """torch has one for GPUs since 2.9 only. The meta device stands for a GPU."""
    monkeypatch.setattr(torch, "_weight_int8pack_mm", None)
    on_gpu = layer(random(64, 128), "int8").to("meta")
    assert on_gpu(torch.empty(1, 128, device="meta", dtype=torch.bfloat16)).shape == (1, 64)


def test_int4_on_a_gpu_before_ampere_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    reader = PackedQuantizer(PackedConfig("int4"))
    with pytest.raises(ValueError, match=r"capability 8\.0, such as an A100; Tesla T4 has 7\.5: use dtype='nf4'"):
        reader.validate_environment(device_map={"": 0})
    reader.validate_environment(device_map={"": "cpu"})


def test_int4_without_a_device_map_is_computed_on_the_cpu_beside_any_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    PackedQuantizer(PackedConfig("int4")).validate_environment(device_map=None)


def test_groups_of_another_size_are_refused():
    with pytest.raises(ValueError, match="dtype='int4' and group=32; this version of the kit reads"):
        PackedConfig("int4", group=32)
