"""A Falcon as a GGUF file, for llama.cpp and programs built on it: weights, tokenizer and chat template in one file.

llama.cpp supports the parallel block with rotary positions and without biases, with one LayerNorm (7B) or two (40B,
180B), but not ALiBi (ggml-org/llama.cpp#2868). It computes GELU by the tanh approximation; Falcon's is exact.
"""

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from tqdm.auto import tqdm
from transformers import FalconForCausalLM, PreTrainedTokenizerBase

from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import printable
from falcon_kit.display.saving import atomic_file
from falcon_kit.generation.chat import plain_template
from falcon_kit.loading.falcon import Falcon
from falcon_kit.model.checks import live_spec

FILE_TYPES = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""Dtypes of the matrices. q8_0: 8 bits per value and a scale per 32 values. LayerNorms stay in float32."""
_MODULES = {
    "input_layernorm": "attn_norm",
    "ln_mlp": "attn_norm",  # llama.cpp's MLP reads attn_norm, its attention reads attn_norm_2 if it exists
    "ln_attn": "attn_norm_2",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_PROGRESS_BAR_BYTES = 2**30  # smaller files are written too quickly for a progress bar


def export_gguf(falcon: Falcon, path: str | os.PathLike[str], dtype: str | torch.dtype = "auto") -> Path:
    """Writes a Falcon of the 7B, 40B or 180B layout as one GGUF file, and returns its path.

    The file contains the weights, the tokenizer (merges, special tokens, end-of-sequence token) and the chat template.
    It is complete or absent, see `falcon_kit.display.saving`. dtype: "auto" (the model's), "float32", "float16",
    "bfloat16" or "q8_0"; llama.cpp's own `llama-quantize` converts such a file to 4 bits.

    Raises ValueError for a layout that llama.cpp does not support, quantised or offloaded weights, or an unknown dtype,
    FileNotFoundError for a missing directory, and OSError if the disk has no room, all before anything is written.
    """
    if not isinstance(falcon, Falcon):
        raise TypeError(f"export_gguf takes a loaded Falcon, as fk.load returns it, not a {type(falcon).__name__}")
    return write_gguf(falcon.model, live_spec(falcon.spec, falcon.model), Path(path), dtype, falcon.tokenizer)


def write_gguf(
    model: FalconForCausalLM,
    spec: FalconSpec,
    path: Path,
    dtype: str | torch.dtype = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """As `export_gguf`, from a plain model; without a tokenizer, llama.cpp accepts token ids only."""
    kind, file_type = _file_type(model, dtype)
    _check(model, spec)
    with atomic_file(path, _size(spec, kind)) as partial:
        writer = GGUFWriter(partial, "falcon")
        _add_shape(writer, model, spec)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_tokenizer(writer, tokenizer, spec.vocabulary)
        _write_tensors(writer, model, spec, kind)
    return path.expanduser()


def _file_type(model: FalconForCausalLM, dtype: str | torch.dtype) -> tuple[GGMLQuantizationType, LlamaFileType]:
    name = str(model.dtype if dtype == "auto" else dtype).removeprefix("torch.").lower()
    if name not in FILE_TYPES:
        raise ValueError(
            f"dtype {dtype!r} is not one of auto, {', '.join(FILE_TYPES)}; for 4 bits, export bfloat16 and "
            "convert that to q4_k_m with llama.cpp's llama-quantize"
        )
    return FILE_TYPES[name]


def _check(model: FalconForCausalLM, spec: FalconSpec) -> None:
    """Raises ValueError for a model that llama.cpp would refuse or compute wrongly."""
    reasons = {
        "positions by ALiBi": spec.positions == "alibi",
        "a sequential block": not spec.parallel_block,
        "biases in its linear layers": spec.bias,
    }
    if unsupported := [reason for reason, holds in reasons.items() if holds]:
        raise ValueError(
            f"{printable(spec.name)} has {', '.join(unsupported)}, which llama.cpp does not support for Falcon "
            "(ggml-org/llama.cpp#2868): serve it with `transformers serve`, or export a 7B, 40B or 180B"
        )
    rope: Any = model.config.rope_parameters or {}
    if (scaling := rope.get("rope_type", "default")) != "default":
        raise ValueError(
            f"the rotary positions are scaled ({scaling}), which the file would not say: serve it with vLLM"
        )
    if getattr(model, "quantization_method", None) or any(not each.is_floating_point() for each in model.parameters()):
        raise ValueError("the weights are quantised for torch: load the model in bfloat16, and export that as 'q8_0'")
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the model has adapters: fk.merge(adapter, base) writes them into the weights")
    if any(each.is_meta for each in model.parameters()):
        raise ValueError("some weights are offloaded: load the model with device_map='cpu', and export that")


def _size(spec: FalconSpec, kind: GGMLQuantizationType) -> int:
    """Bytes of the weights in the file."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    stored = spec.parameters + (0 if spec.tied_head else spec.embedding_parameters)
    return stored * size // values


def _add_shape(writer: GGUFWriter, model: FalconForCausalLM, spec: FalconSpec) -> None:
    config: Any = model.config  # transformers types every value as optional
    writer.add_name(spec.name)
    if spec.licence != "not stated":
        writer.add_license(spec.licence)
    writer.add_tensor_data_layout("jploski")  # llama.cpp's name for a fused projection that is not grouped
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.d_model)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_block_count(spec.layers)
    writer.add_head_count(spec.query_heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(spec.vocabulary)


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> None:
    """The tokenizer under llama.cpp's names: byte-level BPE is "gpt2" there, Falcon's pre-tokenizer is "falcon"."""
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {vocabulary}: give the model's own tokenizer"
        )
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    names = {id: token for token, id in tokenizer.get_vocab().items()}
    special = {id for id, added in tokenizer.added_tokens_decoder.items() if added.special}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("falcon")
    writer.add_token_list([names.get(id, f"[PAD{id}]") for id in range(vocabulary)])
    writer.add_token_types([_token_type(id, names, special, tokenizer) for id in range(vocabulary)])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(plain_template(str(tokenizer.chat_template)))


def _token_type(id: int, names: dict[int, str], special: set[int], tokenizer: PreTrainedTokenizerBase) -> TokenType:
    if id not in names:
        return TokenType.UNUSED
    if id in special:
        return TokenType.CONTROL
    return TokenType.USER_DEFINED if id in tokenizer.added_tokens_decoder else TokenType.NORMAL


def _write_tensors(writer: GGUFWriter, model: FalconForCausalLM, spec: FalconSpec, kind: GGMLQuantizationType) -> None:
    """Writes the metadata of all tensors, then one tensor after the other, so that only one is in memory twice."""
    weights: dict[str, torch.Tensor] = model.state_dict()
    names = _tensor_names(weights, spec)
    for key, name in names.items():
        shape = weights[key].shape
        size = int(np.prod(gguf.quant_shape_to_byte_shape(shape, _stored_type(shape, kind))))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=_stored_type(shape, kind))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key in tqdm(names, desc="Writing", unit="tensor", disable=_size(spec, kind) < _PROGRESS_BAR_BYTES):
            weight = _ungroup(weights[key], spec) if "query_key_value" in key else weights[key]
            writer.write_tensor_data(_to_bytes(weight.detach().cpu(), _stored_type(weight.shape, kind)))
    finally:
        writer.close()


def _tensor_names(weights: dict[str, torch.Tensor], spec: FalconSpec) -> dict[str, str]:
    """llama.cpp's name for each weight in the file."""
    names = {"transformer.word_embeddings.weight": "token_embd.weight"}
    names |= {f"transformer.ln_f.{kind}": f"output_norm.{kind}" for kind in ("weight", "bias")}
    if not spec.tied_head:
        names["lm_head.weight"] = "output.weight"
    for key in weights:
        if key.startswith("transformer.h."):
            _, _, layer, module = key.split(".", 3)
            module, _, kind = module.rpartition(".")
            names[key] = f"blk.{layer}.{_MODULES[module]}.{kind}"
    return names


def _ungroup(fused: torch.Tensor, spec: FalconSpec) -> torch.Tensor:
    """The fused projection as all queries, all keys, all values; Falcon stores [queries, key, value] per group."""
    groups = fused.view(spec.kv_heads, -1, spec.head_dim, spec.d_model)  # (G, H / G + 2, D, d_model)
    return torch.cat([part.reshape(-1, spec.d_model) for part in (groups[:, :-2], groups[:, -2], groups[:, -1])])


def _stored_type(shape: torch.Size, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type of a tensor in the file. Vectors stay in float32, the only type llama.cpp supports for them."""
    return GGMLQuantizationType.F32 if len(shape) == 1 else kind


def _to_bytes(weight: torch.Tensor, kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """A weight as the file stores it. bfloat16 is passed as bytes, because numpy has no such dtype."""
    if kind == GGMLQuantizationType.BF16:
        return weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    return gguf.quants.quantize(weight.float().numpy(), kind)
