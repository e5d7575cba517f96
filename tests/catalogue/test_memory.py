"""The closed forms of memory, compared with bytes measured on small models of every layout."""

import math
import weakref

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BitsAndBytesConfig

import falcon_kit as fk
from falcon_kit.catalogue import memory
from falcon_kit.loading.packed import PackedLinear, quantised4, quantised8
from falcon_kit.loading.quantization import quantisation_config
from falcon_kit.model.modeling import FalconForCausalLM
from tests.conftest import small_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PeakBytes(TorchDispatchMode):
    """The peak of bytes of the tensors created in the block, without the `known` ones, such as weights."""

    def __init__(self, known):
        super().__init__()
        self.live = self.peak = 0
        # Kept alive, so that no new tensor gets the address of a known one that was freed in between.
        self._known = [tensor.untyped_storage() for tensor in known if not tensor.is_mkldnn]
        self._storages = {storage._cdata: 0 for storage in self._known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_mkldnn:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.live -= size
        self._storages.pop(key)


def sized(layout, **changes):
    """A model and its spec, wide enough that rounding does not matter."""
    config = small_config(layout, **{"hidden_size": 768, "num_attention_heads": 12, "vocab_size": 256} | changes)
    return FalconForCausalLM(config), fk.FalconSpec.from_config(config.to_dict())


def total_bytes(model):
    """Bytes of all weights with the scales of bitsandbytes, tied weights once, without rotary buffers."""
    tensors = {}
    for module in model.modules():
        for tensor in module.parameters(recurse=False):
            state = getattr(tensor, "quant_state", None)
            extra = [getattr(tensor, "SCB", None)]
            if state is not None:
                nested = state.state2.absmax if state.nested else None
                extra += [state.absmax, nested]
            for each in (tensor, *extra):
                if each is not None:
                    tensors[id(each) if each.is_mkldnn else each.data_ptr()] = each.nbytes
    return sum(tensors.values())


# Weights


def test_dtypes_are_ordered_from_large_to_small():
    sizes = [memory.weight_bytes(fk.spec("falcon-40b"), dtype) for dtype in memory.DTYPES]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("dtype", memory.FLOAT_DTYPES)
def test_dtypes_without_quantisation_have_the_names_and_sizes_of_torch(dtype):
    assert memory.VALUE_BYTES[dtype] == getattr(torch, dtype).itemsize
    assert memory.dtype_name(getattr(torch, dtype)) == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_weigh_what_the_model_holds(layout, dtype):
    model, spec = sized(layout)
    assert memory.weight_bytes(spec, dtype) == total_bytes(model.to(DTYPES[dtype]))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("int8", {"load_in_8bit": True}),
        ("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("nf4-double", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    ],
)
def test_quantised_weights_weigh_what_bitsandbytes_holds(layout, dtype, options, tmp_path):
    model, spec = sized(layout)
    model.save_pretrained(tmp_path)
    quantised = FalconForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**options)
    )
    assert memory.weight_bytes(spec, dtype) == pytest.approx(total_bytes(quantised), rel=0.001)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_packed_weights_weigh_what_their_layers_hold(layout, dtype, tmp_path):
    model, spec = sized(layout)
    model.save_pretrained(tmp_path)
    quantised = FalconForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=quantisation_config(dtype, on_cpu=True)
    )
    assert memory.weight_bytes(spec, dtype) == pytest.approx(total_bytes(quantised), rel=0.01)


@pytest.mark.parametrize(
    ("name", "dtype", "gigabytes"),
    [
        ("falcon-40b", "bfloat16", 90),
        ("falcon-40b", "int8", 45),
        ("falcon-40b", "nf4", 27),
        ("falcon-7b", "bfloat16", 15),
    ],
)
def test_weights_stay_below_the_published_memory(name, dtype, gigabytes):
    """The figures of huggingface.co/blog/falcon are rounded, and include more than the weights."""
    assert 0.8 * gigabytes < memory.weight_bytes(fk.spec(name), dtype) / 1e9 < gigabytes


# Keys, values and activations


@pytest.mark.parametrize("cache", ["grouped", "transformers"])
def test_the_cache_weighs_what_either_implementation_keeps(layout, cache):
    kinds = {"grouped": FalconForCausalLM, "transformers": transformers.FalconForCausalLM}
    config = small_config(layout)
    with torch.device("meta"):
        layers = kinds[cache](config)(torch.zeros(3, 50, dtype=torch.long)).past_key_values.layers
    spec = fk.FalconSpec.from_config(config.to_dict())
    expected = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert spec.layers * memory.layer_kv_bytes(spec, "float32", 50, 3, cache) == expected


@pytest.mark.parametrize(("name", "mebibytes"), [("falcon-40b", 240), ("falcon-7b", 16)])
def test_the_published_caches_come_out(name, mebibytes):
    spec = fk.spec(name)
    assert spec.layers * memory.layer_kv_bytes(spec, "bfloat16", 2048, 1) == mebibytes * 2**20


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "context"), [(1, 200), (3, 64)])
@pytest.mark.usefixtures("threads")
def test_the_prefill_takes_its_activations_and_the_cache(layout, dtype, batch, context):
    model, spec = sized(layout)
    model.to(DTYPES[dtype]).eval()
    with torch.inference_mode(), PeakBytes([*model.parameters(), *model.buffers()]) as measured:
        model(torch.zeros(batch, context, dtype=torch.long), logits_to_keep=1)
    expected = memory.prefill_bytes(spec, dtype, context, batch)
    expected += spec.layers * memory.layer_kv_bytes(spec, dtype, context, batch)
    assert expected == pytest.approx(measured.peak, rel=0.05)


@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize(
    ("dtype", "integers"), [("bfloat16", False), ("float16", False), ("int8", False), ("int8", True), ("int4", False)]
)
@pytest.mark.parametrize(("batch", "context"), [(1, 200), (3, 64)])
def test_a_prefill_in_parts_takes_no_more_than_its_workspace(
    monkeypatch, tmp_path, dtype, integers, multiplies, batch, context
):
    monkeypatch.setattr("falcon_kit.model.products._LEAST_IN_INTEGERS", 0 if integers else math.inf)
    monkeypatch.setattr("falcon_kit.model.products.has_products", lambda dtype: multiplies)
    monkeypatch.setattr("falcon_kit.loading.packed.has_products", lambda dtype: multiplies)
    model, spec = sized("40b")
    if dtype in memory.QUANTISED:
        model.save_pretrained(tmp_path)
        options = {"quantization_config": quantisation_config(dtype, on_cpu=True)}
        model = FalconForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **options)
    else:
        model.to(getattr(torch, dtype)).eval()
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.long))  # finds the layout of the kernel, which is kept
        with PeakBytes([*model.parameters(), *model.buffers()]) as measured:
            model.transformer.h[0].mlp.dense_h_to_4h._apply(lambda each: each)  # int4 is packed, as by a load
            model(torch.zeros(batch, context, dtype=torch.long), logits_to_keep=1)
    expected = memory.prefill_bytes(spec, dtype, context, batch)
    expected += spec.layers * memory.layer_kv_bytes(spec, dtype, context, batch)
    expected += memory.workspace_bytes(spec, dtype, context, batch, True, multiplies)
    assert 0.5 * expected < measured.peak <= 1.05 * expected


@pytest.mark.parametrize(("batch", "context"), [(1, 200), (3, 64)])
def test_a_prefill_of_int4_on_a_gpu_takes_its_workspace(monkeypatch, tmp_path, batch, context):
    """A GPU unpacks a whole matrix; here a CPU does it in the same steps."""
    model, spec = sized("40b")
    model.save_pretrained(tmp_path)
    options = {"quantization_config": quantisation_config("int4", on_cpu=True)}
    model = FalconForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **options)
    monkeypatch.setattr(PackedLinear, "product", PackedLinear.in_whole)
    monkeypatch.setattr("falcon_kit.loading.packed.has_products", lambda dtype: True)
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.long))  # finds the layout of the kernel, which is kept
        with PeakBytes([*model.parameters(), *model.buffers()]) as measured:
            model(torch.zeros(batch, context, dtype=torch.long), logits_to_keep=1)
    expected = memory.prefill_bytes(spec, "int4", context, batch)
    expected += spec.layers * memory.layer_kv_bytes(spec, "int4", context, batch)
    expected += memory.workspace_bytes(spec, "int4", context, batch, on_cpu=False, native=True)
    assert 0.85 * expected < measured.peak <= expected


@pytest.mark.parametrize("quantise", [quantised8, quantised4])
def test_quantising_a_matrix_takes_little_more_than_the_result(quantise):
    """The last matrix of a model is quantised beside all others, where a plan has room for three bytes a weight."""
    weight = torch.randn(4096, 2048, dtype=torch.bfloat16)
    with PeakBytes([weight]) as measured:
        results = quantise(weight)
    assert measured.peak < 2 * sum(each.nbytes for each in results) + 8 * memory.SLAB


# Training


def test_lora_has_the_parameters_that_peft_makes(layout):
    model, spec = sized(layout)
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert memory.lora_parameters(spec, 4) == sum(each.numel() for each in adapted.parameters() if each.requires_grad)


@pytest.mark.parametrize(("r", "millions"), [(64, 444.3), (8, 55.5)])
def test_lora_on_the_40b_has_the_published_number_of_parameters(r, millions):
    assert memory.lora_parameters(fk.spec("falcon-40b"), r) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("vocabulary", [256, 16384])
def test_a_training_step_of_lora_takes_what_layers_keep_and_the_larger_of_loss_and_layer(
    layout, dtype, vocabulary, checkpointing
):
    model, spec = sized(layout, vocab_size=vocabulary, num_hidden_layers=4)
    model.to(DTYPES[dtype])
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    adapted.enable_input_require_grads()
    if checkpointing:
        model.activation_checkpointing_enable()
    adapted.train()
    ids = torch.zeros(4, 128, dtype=torch.long)
    with PeakBytes([*adapted.parameters(), *adapted.buffers()]) as measured:
        adapted(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss.backward()
    size = spec, dtype, 128, 4
    layer, kept = memory.backward_bytes(*size, adapters=True), memory.kept_bytes(*size, adapters=True)
    layers = spec.layers * (memory.checkpoint_bytes(*size) if checkpointing else kept)
    busiest = max(memory.loss_bytes(*size, trains_head=False), layer if checkpointing else layer - kept)
    expected = busiest + layers + 4 * memory.lora_parameters(spec, 2)
    assert expected == pytest.approx(measured.peak, rel=0.1)


@pytest.mark.parametrize(("checkpointing", "vocabulary"), [(False, 256), (False, 16384), (True, 16384)])
def test_a_training_step_of_all_weights_takes_what_layers_keep_and_the_larger_of_loss_and_layer(
    layout, checkpointing, vocabulary
):
    """Beside the weights and the gradients of a step before."""
    model, spec = sized(layout, vocab_size=vocabulary, num_hidden_layers=4)
    model.to(torch.bfloat16).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    ids = torch.zeros(4, 128, dtype=torch.long)

    def step():
        model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss.backward()

    step()
    with PeakBytes([*model.parameters(), *model.buffers(), *(each.grad for each in model.parameters())]) as measured:
        step()
    size = spec, "bfloat16", 128, 4
    layer, kept = memory.backward_bytes(*size, adapters=False), memory.kept_bytes(*size, adapters=False)
    layers = spec.layers * (memory.checkpoint_bytes(*size) if checkpointing else kept)
    busiest = max(memory.loss_bytes(*size, trains_head=True), layer if checkpointing else layer - kept)
    assert busiest + layers == pytest.approx(measured.peak, rel=0.1)
