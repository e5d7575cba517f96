"""Falcons with random weights, made on the device itself, in each dtype that the kit has."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM

from benchmarks.gpu import quantised_layer
from falcon_kit import FalconSpec
from falcon_kit.catalogue import memory
from falcon_kit.loading.packed import frozen
from falcon_kit.loading.quantization import quantisation_config, weights
from falcon_kit.model import modeling

RESERVED = 30e9
"""Bytes of a GPU that a slice leaves for the prefill of the largest batch and the libraries."""


def sliced(shape: FalconSpec, free: float, batch: int, context: int) -> FalconSpec:
    """As many layers of a shape as fit with transformers' KV cache, which is the larger of the two."""
    layer = memory.layer_bytes(shape, "bfloat16")
    cache = memory.layer_kv_bytes(shape, "bfloat16", context, batch, "transformers")
    left = free - RESERVED - memory.embedding_bytes(shape, "bfloat16")
    layers = max(1, min(shape.layers, int(left // (layer + cache))))
    return replace(shape, name=f"{layers} layers of {shape.name}", layers=layers)


def built(shape: FalconSpec, device: torch.device, kind: type[FalconForCausalLM], dtype: str) -> FalconForCausalLM:
    """A model with random weights. Raises ImportError where a dtype's library is missing."""
    config = FalconConfig(**shape.to_config(), bos_token_id=11, eos_token_id=11)
    with torch.device("meta"):
        model = kind(config)
    for name, module in list(model.named_modules()):
        if dtype in memory.QUANTISED and ".h." in name and isinstance(module, nn.Linear):
            model.set_submodule(name, _quantised(_random(module.weight.shape, device), dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            module, _, own = name.rpartition(".")
            setattr(model.get_submodule(module), own, frozen(_random(parameter.shape, device, own)))
    model.tie_weights()
    if dtype in memory.QUANTISED:
        model.config.quantization_config = quantisation_config(dtype, device.type == "cpu")
    model.transformer.rotary_emb = type(model.transformer.rotary_emb)(config).to(device)  # its buffers are on meta
    return model.eval()


def _random(shape: torch.Size, device: torch.device, name: str = "weight") -> Tensor:
    values = torch.empty(shape, dtype=torch.bfloat16, device=device)
    if len(shape) > 1:
        return values.normal_(std=0.02)
    return values.fill_(float(name == "weight"))  # a LayerNorm


def _quantised(weight: Tensor, dtype: str) -> nn.Module:
    if dtype == "int4" or (dtype == "int8" and weight.device.type == "cpu"):
        layer = quantised_layer(weight, dtype)
        layer.pack()
        return layer
    import bitsandbytes

    out, into = weight.shape
    if dtype == "int8":
        made = bitsandbytes.nn.Linear8bitLt(into, out, bias=False, has_fp16_weights=False, device="meta")
        made.weight = bitsandbytes.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        return made.to(weight.device)
    options = {"quant_type": "nf4", "compress_statistics": dtype == "nf4-double"}
    made = bitsandbytes.nn.Linear4bit(into, out, bias=False, device="meta", compute_dtype=torch.bfloat16, **options)
    made.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **options)
    return made.to(weight.device)


def pair(shape: FalconSpec, device: torch.device) -> dict[str, FalconForCausalLM]:
    """The kit's model and transformers' own with the same bfloat16 weights."""
    kit = built(shape, device, modeling.FalconForCausalLM, "bfloat16")
    with torch.device("meta"):
        own = FalconForCausalLM(kit.config)
    own.load_state_dict(dict(kit.named_parameters()), strict=False, assign=True)
    own.tie_weights()
    own.transformer.rotary_emb = kit.transformer.rotary_emb
    return {"kit": kit, "transformers": own.eval()}


@contextmanager
def freed() -> Iterator[None]:
    """Frees what the block leaves behind, on the GPU too."""
    try:
        yield
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights and scales in memory; tied ones once."""
    return weights(model).total_bytes


def cache_bytes(past: Any) -> int:
    """Bytes of keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)
