"""The dtypes, and the memory of each part of a Falcon in closed form: weights, KV cache, activations, training.

All sizes are in bytes. `tests/catalogue/test_memory.py` compares each formula with bytes measured on small models, or
with published figures. Shapes: B batch, T tokens, d d_model, f intermediate_size, V vocabulary, H query heads.
"""

import math
from difflib import get_close_matches
from typing import Any

from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.tables import counted

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes without quantisation; the names are those of torch."""
QUANTISED = ("int8", "nf4", "int4", "nf4-double")
"""int8: LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339) through bitsandbytes, on a CPU torch's kernel. nf4: 4-bit
NormalFloat, without and with double quantisation (Dettmers et al. 2023, arXiv 2305.14314), through bitsandbytes. int4:
whole numbers in groups, on torch's kernels. Only the linear layers of the decoder layers are quantised."""
DTYPES = (*FLOAT_DTYPES, *QUANTISED)
"""All dtypes, from the largest weights to the smallest."""
VALUE_BYTES = {"float64": 8, **{dtype: 4 if dtype == "float32" else 2 for dtype in DTYPES}}
"""Bytes per value that is not quantised, by dtype: embeddings, LayerNorms, activations, keys and values.

float64 is that of a model after `model.double()`; none is loaded in it.
"""
_NF4_BLOCK, _DOUBLE_BLOCK = 64, 256  # values per scale, and scales per second-level scale (QLoRA, section 3)
INT4_GROUP = 64
"""Values per scale and zero of int4: it divides the channels of every published Falcon."""

SLAB = 2**22
"""Bytes of weights that a CPU multiplies at once, see `model/products.py`: they stay in the cache of a core."""


def linear_shapes(spec: FalconSpec) -> tuple[tuple[int, int], ...]:
    """(out, in) of the four linear layers of a decoder layer: fused QKV, attention output, MLP up and MLP down."""
    d, f = spec.d_model, spec.intermediate_size
    return ((spec.query_heads + 2 * spec.kv_heads) * spec.head_dim, d), (d, d), (f, d), (d, f)


def linear_bytes(out: int, into: int, dtype: str) -> int:
    """One weight matrix. int8: a byte per value, a float32 scale per row. nf4: 4 bits per value, a scale per 64.
    int4: 4 bits per value, a scale and a zero of two bytes per 64, which is as much."""
    values = out * into
    if dtype not in QUANTISED:
        return values * VALUE_BYTES[dtype]
    if dtype == "int8":
        return values + 4 * out
    if dtype == "int4":
        return values // 2 + 4 * values // INT4_GROUP
    scales = math.ceil(values / _NF4_BLOCK)
    if dtype == "nf4":
        return values // 2 + 4 * scales
    return values // 2 + scales + 4 * math.ceil(scales / _DOUBLE_BLOCK)


def layer_bytes(spec: FalconSpec, dtype: str) -> int:
    """The weights of one decoder layer. Biases and LayerNorms are never quantised."""
    linear = linear_shapes(spec)
    rest = spec.layer_parameters - sum(out * into for out, into in linear)
    return sum(linear_bytes(out, into, dtype) for out, into in linear) + rest * VALUE_BYTES[dtype]


def embedding_bytes(spec: FalconSpec, dtype: str) -> int:
    """The token embedding, and the output head if it is not tied. Neither is quantised."""
    return spec.embedding_parameters * (1 if spec.tied_head else 2) * VALUE_BYTES[dtype]


def last_norm_bytes(spec: FalconSpec, dtype: str) -> int:
    """The final LayerNorm, before the output head."""
    return 2 * spec.d_model * VALUE_BYTES[dtype]


def weight_bytes(spec: FalconSpec, dtype: str) -> int:
    """All weights; tied ones count once."""
    layers = spec.layers * layer_bytes(spec, dtype)
    return layers + embedding_bytes(spec, dtype) + last_norm_bytes(spec, dtype)


def check_tensor_parallel(spec: FalconSpec, tensor_parallel: int) -> None:
    """Raises ValueError unless the KV heads, each with its query heads, divide evenly among so many ranks."""
    if tensor_parallel < 2:
        raise ValueError(f"tensor_parallel={tensor_parallel}: give at least 2 ranks, or leave it out for one process")
    if spec.kv_heads % tensor_parallel == 0:
        return
    degrees = [each for each in range(2, spec.kv_heads + 1) if spec.kv_heads % each == 0]
    heads = f"{counted(spec.kv_heads, 'KV head')} for {spec.query_heads} query heads"
    heads += f": give {' or '.join(map(str, degrees))}" if degrees else ", which cannot be divided"
    raise ValueError(
        f"tensor_parallel={tensor_parallel} must divide the number of KV heads; {spec.name} has {heads}. Split it by "
        f"layers instead (device_map='auto'){'' if degrees else ', or use falcon-40b, which allows 2, 4 or 8'}"
    )


def rank_bytes(spec: FalconSpec, dtype: str, tensor_parallel: int) -> int:
    """Weights on each rank under tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053).

    Divided among the ranks: the linear layers, the embedding and head, and the biases of column-parallel layers.
    Replicated on every rank: LayerNorms, and the biases of row-parallel layers, which are added after the all-reduce.
    """
    norms = (2 * spec.norms_per_block * spec.layers + 2) * spec.d_model
    biases = 2 * spec.d_model * spec.layers if spec.bias else 0
    replicated = (norms + biases) * VALUE_BYTES[dtype]
    return replicated + (weight_bytes(spec, dtype) - replicated) // tensor_parallel


def layer_kv_bytes(spec: FalconSpec, dtype: str, context: int, batch: int, cache: str = "grouped") -> int:
    """The KV cache of one layer, without the room for a few more tokens that it has while decoding.

    cache="transformers": transformers' own Falcon, which caches keys and values once per query head in the new decoder
    architecture.
    """
    copies = spec.queries_per_kv_head if cache == "transformers" and spec.new_decoder_architecture else 1
    return spec.kv_bytes_per_token(VALUE_BYTES[dtype]) // spec.layers * copies * context * batch


def prefill_bytes(spec: FalconSpec, dtype: str, context: int, batch: int, tensor_parallel: int = 1) -> int:
    """The peak of activations during the prefill of `context` tokens, in one layer, on each rank.

    The peak is in the MLP: d channels each for the layer's input, the LayerNorm outputs and the attention output, and f
    channels before and after the GELU. Attention stays below it, also where it repeats keys for its kernel: 8 d at
    most, for input, LayerNorm, queries before and after their rotation, keys, values and output. ALiBi adds its bias
    for every pair of tokens, (B, H, T, T).
    """
    channels = (2 + spec.norms_per_block + (0 if spec.parallel_block else 1)) * spec.d_model
    channels += 2 * spec.intermediate_size // tensor_parallel
    values = batch * context * channels
    if spec.positions == "alibi":
        values += batch * spec.query_heads // tensor_parallel * context**2
    return values * VALUE_BYTES[dtype]


def workspace_bytes(
    spec: FalconSpec, dtype: str, context: int, batch: int, on_cpu: bool, native: bool, trains: bool = False
) -> int:
    """Temporary memory when a whole prompt is multiplied with weights that are first unpacked or copied to float32;
    that of bitsandbytes measured, not derived.

    int8: on a GPU the output of the widest layer, in int32 and float32; on a CPU a slab. nf4: the largest matrix in 16
    bits; on a CPU it is repacked at first use, which takes an int32 copy. int4: on a GPU the largest matrix, in bytes
    and in 16 bits; on a CPU a slab, or an int32 copy of the largest matrix, made once for its kernel. 16 bits: nothing,
    or on a CPU that has no instructions for them (`native` is False) a slab. In training a CPU unpacks whole
    matrices of int8 and int4 for the gradients, and copies no others.
    """
    largest = max(out * into for out, into in linear_shapes(spec))
    if dtype == "int8" and not on_cpu:
        return batch * context * spec.intermediate_size * 6
    if dtype.startswith("nf4"):
        return largest * (9 if on_cpu else 2)
    whole = 0
    if dtype == "int4":
        whole = (5 if on_cpu else 3) * largest
    elif dtype == "int8" and trains:
        whole = 4 * largest
    slab = _slab_bytes(spec, dtype, context, batch, native) if on_cpu and not trains else 0
    return max(whole, slab)


def _slab_bytes(spec: FalconSpec, dtype: str, context: int, batch: int, native: bool) -> int:
    """A slab of weights, unpacked or in float32, and its products; where 16 bits are multiplied in float32, also the
    input of the MLP's down projection in float32, as far as `prefill_bytes` does not count it."""
    if native and dtype not in QUANTISED:
        return 0
    value_bytes = 2 if native and dtype == "int8" else 4
    slab = max(SLAB // value_bytes, 64 * spec.intermediate_size)
    products = 4 * batch * context * min(spec.intermediate_size, slab // spec.d_model)
    inputs = 0 if native else 2 * batch * context * spec.intermediate_size
    bytes_a_weight = {"int4": 5 if native else 9}.get(dtype, value_bytes)
    return slab * bytes_a_weight + products + inputs


def logits_bytes(spec: FalconSpec, batch: int) -> int:
    """Sampling a token: logits (B, V) in float32, their log-probabilities and a sorted copy."""
    return 3 * 4 * batch * spec.vocabulary


def lora_parameters(spec: FalconSpec, r: int) -> int:
    """The number of LoRA parameters if all four linear layers of each decoder layer are adapted: r x (in + out) for
    each (Hu et al. 2021, arXiv 2106.09685). Falcon-40B with r=64: 444.3 million."""
    return spec.layers * r * sum(out + into for out, into in linear_shapes(spec))


LOSS_CHUNK = 256
"""Labelled tokens whose logits `falcon_kit.model.losses` computes at once: (256, 65024) in float32 takes 64 MiB."""


def loss_bytes(spec: FalconSpec, dtype: str, context: int, batch: int, trains_head: bool) -> int:
    """The chunked loss if every token has a label.

    The hidden states, those of labelled tokens, and their gradient; and per logit of a chunk 12 bytes: the logits,
    log-probabilities and gradient in float32. 16-bit weights take as much: their logits get a float32 copy. If the head
    is trained, its gradient by a chunk, and the sum over the chunks.
    """
    chunk = min(batch * context, LOSS_CHUNK)
    values = 3 * batch * context * spec.d_model + (2 * spec.vocabulary * spec.d_model if trains_head else 0)
    return 12 * chunk * spec.vocabulary + values * VALUE_BYTES[dtype]


def checkpoint_bytes(spec: FalconSpec, dtype: str, context: int, batch: int) -> int:
    """The input of one layer, which gradient checkpointing keeps (Chen et al. 2016, arXiv 1604.06174)."""
    return batch * context * spec.d_model * VALUE_BYTES[dtype]


def kept_bytes(spec: FalconSpec, dtype: str, context: int, batch: int, adapters: bool) -> int:
    """What one layer keeps for the backward pass without gradient checkpointing; measured, not derived.

    The input, the LayerNorms' outputs and normalised inputs, queries, keys, values, attention output, and the MLP's
    values before and after the GELU, which adapters copy to float32 where the weights have 16 bits.
    """
    values = 2 * spec.intermediate_size + 2 * spec.kv_heads * spec.head_dim
    values += (3 + 2 * spec.norms_per_block + (0 if spec.parallel_block else 1)) * spec.d_model
    if adapters and VALUE_BYTES[dtype] == 2:
        values += 2 * spec.intermediate_size
    return batch * context * values * VALUE_BYTES[dtype]


def backward_bytes(spec: FalconSpec, dtype: str, context: int, batch: int, adapters: bool) -> int:
    """Recomputation and backward pass of one layer under gradient checkpointing; measured, not derived.

    Three times f, and nine or eleven times d with one or two LayerNorms. Adapters are float32 (PEFT's default): with
    16-bit weights, their inputs are copied to float32.
    """
    values = 3 * spec.intermediate_size + (7 + 2 * spec.norms_per_block) * spec.d_model
    if adapters and VALUE_BYTES[dtype] == 2:
        values += 2 * spec.intermediate_size + 5 * spec.d_model
    values *= batch * context
    if spec.positions == "alibi":
        values += batch * spec.query_heads * context**2
    return values * VALUE_BYTES[dtype]


_OTHER_NAMES = {"4bit": "nf4", "8bit": "int8", "4": "int4", "8": "int8", "half": "float16"}


def dtype_name(dtype: Any) -> str:
    """The entry of `DTYPES` for a name or a torch dtype. Raises ValueError with the nearest name for an unknown one."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        near = get_close_matches(_OTHER_NAMES.get(name.lower(), name.lower()), DTYPES, cutoff=0.5)
        hint = f": did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"dtype {dtype!r} is not known{hint} Known: {', '.join(DTYPES)}, auto.")
    return name
