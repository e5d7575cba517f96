"""What the parts of a Falcon weigh, in closed form: weights by dtype, KV cache, activations, what training adds.

Bytes throughout. Each formula is held against bytes measured on small models in `tests/test_budget.py`, where not a
publication says so. Shapes: B batch, T tokens, d d_model, f feed-forward width, V vocabulary, H query heads.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from falcon_kit.catalogue import memory
from falcon_kit.catalogue.spec import FalconSpec

VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 2, "nf4": 2, "nf4-double": 2}
"""Bytes of a value that is not quantised, by dtype: embeddings, LayerNorms, activations, keys and values."""
QUANTISED = ("int8", "nf4", "nf4-double")
"""LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339) and 4-bit NormalFloat, also with double quantisation (Dettmers et
al. 2023, arXiv 2305.14314), as bitsandbytes stores them. Only the linear layers of the blocks are quantised."""
_NF4_BLOCK, _DOUBLE_BLOCK = 64, 256  # values to a scale, scales to a scale of scales (QLoRA, section 3)


def linear_shapes(spec: FalconSpec) -> tuple[tuple[int, int], ...]:
    """(out, in) of the four linear layers of a block: fused QKV, attention output, feed-forward up and down."""
    d, f = spec.d_model, spec.intermediate_size
    return ((spec.query_heads + 2 * spec.kv_heads) * spec.head_dim, d), (d, d), (f, d), (d, f)


def linear_bytes(out: int, into: int, dtype: str) -> int:
    """A weight matrix: int8 has a float32 scale for each row, nf4 half a byte a value and one scale for each 64."""
    values = out * into
    if dtype == "int8":
        return values + 4 * out
    if dtype not in QUANTISED:
        return values * VALUE_BYTES[dtype]
    scales = -(-values // _NF4_BLOCK)
    if dtype == "nf4":
        return values // 2 + 4 * scales
    return values // 2 + scales + 4 * -(-scales // _DOUBLE_BLOCK)


def layer_bytes(spec: FalconSpec, dtype: str) -> int:
    """One decoder layer; its biases and LayerNorms are never quantised."""
    linear = linear_shapes(spec)
    rest = spec.layer_parameters - sum(out * into for out, into in linear)
    return sum(linear_bytes(out, into, dtype) for out, into in linear) + rest * VALUE_BYTES[dtype]


def embedding_bytes(spec: FalconSpec, dtype: str) -> int:
    """The token embedding, and the output head where it is a matrix of its own: neither is quantised."""
    return spec.embedding_parameters * (1 if spec.tied_head else 2) * VALUE_BYTES[dtype]


def last_norm_bytes(spec: FalconSpec, dtype: str) -> int:
    """The LayerNorm before the head."""
    return 2 * spec.d_model * VALUE_BYTES[dtype]


def weight_bytes(spec: FalconSpec, dtype: str) -> int:
    """All parameters, tied ones once."""
    layers = spec.layers * layer_bytes(spec, dtype)
    return layers + embedding_bytes(spec, dtype) + last_norm_bytes(spec, dtype)


def check_ranks(spec: FalconSpec, ranks: int) -> None:
    """Raises ValueError unless whole groups of heads, a KV head and its queries, can be dealt out to so many ranks."""
    if ranks < 2:
        raise ValueError(f"tensor_parallel={ranks}: give at least 2 ranks, or leave it out for one process")
    if spec.kv_heads % ranks == 0:
        return
    degrees = [each for each in range(2, spec.kv_heads + 1) if spec.kv_heads % each == 0]
    heads = f"{spec.kv_heads} KV head{'s' if spec.kv_heads > 1 else ''} for {spec.query_heads} query heads"
    heads += f": possible are {', '.join(map(str, degrees))}" if degrees else ", which cannot be divided"
    raise ValueError(
        f"tensor_parallel={ranks} deals out whole KV heads, and {spec.name} has {heads}. Split it by "
        f"layers instead (device_map='auto'){'' if degrees else ', or take falcon-40b, which goes by 2, 4 or 8'}"
    )


def rank_bytes(spec: FalconSpec, dtype: str, ranks: int) -> int:
    """Weights on each rank of tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053).

    Divided: all four linear layers of each block, the embedding and head, and the biases of what is divided by rows.
    Whole on every rank: LayerNorms, and the biases that are added after the ranks' sum.
    """
    value = VALUE_BYTES[dtype]
    norms = (2 * spec.norms_per_block * spec.layers + 2) * spec.d_model
    added = 2 * spec.d_model * spec.layers if spec.bias else 0
    whole = (norms + added) * value
    return whole + (weight_bytes(spec, dtype) - whole) // ranks


def layer_kv_bytes(spec: FalconSpec, dtype: str, context: int, batch: int, cache: str = "grouped") -> int:
    """Keys and values of one layer. `cache="transformers"` is the library's own Falcon, which in the new decoder
    architecture keeps a copy for every query head."""
    copies = spec.queries_per_kv_head if cache == "transformers" and spec.new_decoder_architecture else 1
    return spec.kv_bytes_per_token(VALUE_BYTES[dtype]) // spec.layers * copies * context * batch


def prefill_bytes(spec: FalconSpec, dtype: str, context: int, batch: int, ranks: int = 1) -> int:
    """Activations while a prompt of `context` tokens is read: the most that one layer, or a rank's part, holds at once.

    That is in the feed-forward block: what came in and, per LayerNorm and attention, d channels, and f before and after
    the GELU. ALiBi adds its bias for every pair of tokens, (B, H, T, T).
    """
    channels = (2 + spec.norms_per_block + (0 if spec.parallel_block else 1)) * spec.d_model
    channels += 2 * spec.intermediate_size // ranks
    values = batch * context * channels
    if spec.positions == "alibi":
        values += batch * spec.query_heads // ranks * context**2
    return values * VALUE_BYTES[dtype]


def workspace_bytes(spec: FalconSpec, dtype: str, context: int, batch: int, on_cpu: bool) -> int:
    """What bitsandbytes needs besides to multiply a whole prompt with quantised weights: measured, not derived.

    int8: products of the widest layer, in int32 and float32; its CPU code keeps many copies. nf4: the largest matrix in
    16 bits; on a CPU it is packed anew at first use, through int32.
    """
    if dtype == "int8":
        return batch * context * spec.intermediate_size * (32 if on_cpu else 6)
    if dtype in QUANTISED:
        return max(out * into for out, into in linear_shapes(spec)) * (9 if on_cpu else 2)
    return 0


def logits_bytes(spec: FalconSpec, batch: int) -> int:
    """Choosing a token: float32 scores (B, V), their log-probabilities and a sorted copy."""
    return 3 * 4 * batch * spec.vocabulary


def lora_parameters(spec: FalconSpec, rank: int) -> int:
    """Adapter parameters with all four linear layers of each block adapted: rank x (in + out) each (Hu et al. 2021,
    arXiv 2106.09685). Falcon-40B at rank 64: 444.3 million."""
    return spec.layers * rank * sum(out + into for out, into in linear_shapes(spec))


LOSS_CHUNK = 256
"""Labelled tokens whose logits `falcon_kit.model.losses` has in memory at once: (256, 65024) in float32 are 64 MiB."""


def loss_bytes(spec: FalconSpec, dtype: str, context: int, batch: int) -> int:
    """The loss of the kit's own training, every token labelled: the last hidden states, those of labelled tokens and
    their gradient, and for a chunk of tokens at 12 bytes: in float32 the logits, their log-probabilities and the
    gradient; in 16 bits the logits, a float32 copy and so on, which comes to the same."""
    chunk = min(batch * context, LOSS_CHUNK)
    return 12 * chunk * spec.vocabulary + 3 * batch * context * spec.d_model * VALUE_BYTES[dtype]


def checkpoint_bytes(spec: FalconSpec, dtype: str, context: int, batch: int) -> int:
    """Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174) keeps what came into each layer."""
    return spec.layers * batch * context * spec.d_model * VALUE_BYTES[dtype]


def backward_bytes(spec: FalconSpec, dtype: str, context: int, batch: int, adapters: bool) -> int:
    """One layer computed anew and going backward, under gradient checkpointing: measured, not derived.

    Three times f and, by the number of LayerNorms, nine or eleven times d. Adapters are float32 (PEFT's default), and
    beside 16-bit weights so is a copy of what they read.
    """
    values = 3 * spec.intermediate_size + (7 + 2 * spec.norms_per_block) * spec.d_model
    if adapters and VALUE_BYTES[dtype] == 2:
        values += 2 * spec.intermediate_size + 5 * spec.d_model
    values *= batch * context
    if spec.positions == "alibi":
        values += batch * spec.query_heads * context**2
    return values * VALUE_BYTES[dtype]


def merge_bytes(spec: FalconSpec) -> int:
    """Adding an adapter to the largest matrix it adapts: their product in float32, and that scaled."""
    return 8 * max(out * into for out, into in linear_shapes(spec))


def dtype_name(dtype: Any) -> str:
    """How weights are kept, by name, from a name or a torch dtype. Raises ValueError, with the nearest name."""
    word = str(dtype).removeprefix("torch.")
    if word not in memory.VALUE_BYTES:
        near = get_close_matches({"4bit": "nf4", "8bit": "int8"}.get(word, word), memory.VALUE_BYTES, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"dtype {dtype!r} is not known: {hint}There are {', '.join(memory.VALUE_BYTES)}")
    return word
