"""A Falcon as a GGUF file, for llama.cpp and programs built on it: weights, tokenizer and chat template in one file.

llama.cpp supports the parallel block with rotary positions and without biases, with one LayerNorm (7B) or two (40B,
180B), but not ALiBi (ggml-org/llama.cpp#2868). It computes GELU by the tanh approximation; Falcon's is exact.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from tqdm.auto import tqdm
from transformers import FalconForCausalLM, PreTrainedTokenizerBase

from falcon_kit.catalogue.gguf import MERGED_ADAPTERS, stored_names
from falcon_kit.catalogue.gguf_header import Stored
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import printable, require, to_save, unknown_name
from falcon_kit.display.saving import atomic_file
from falcon_kit.generation.chat import plain_template
from falcon_kit.loading.adapters import merged_adapters
from falcon_kit.loading.falcon import Falcon
from falcon_kit.loading.gguf import in_slabs, ungrouped
from falcon_kit.loading.quantization import is_quantised
from falcon_kit.loading.writing import has_adapters, remove_wrappers
from falcon_kit.model.checks import is_offloaded, live_spec
from falcon_kit.serving.ggml import Array, check_quantiser, quantise
from falcon_kit.serving.gguf_kinds import ALIASES, FILE_TYPES, planned_tensors, unsupported

_PROGRESS_BAR_BYTES = 2**30  # smaller files are written too quickly for a progress bar


def export_gguf(falcon: Falcon, path: str | os.PathLike[str], dtype: str | torch.dtype = "auto") -> Path:
    """Writes a Falcon of the 7B, 40B or 180B layout as one GGUF file, and returns its path.

    The file contains the weights, the tokenizer (merges, special tokens, end-of-sequence token) and the chat template;
    for the kit also which adapters are in the weights. It is complete or absent, see `falcon_kit.display.saving`.
    dtype: "auto" (the model's), or a name of llama.cpp: f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_0, q4_k_m (the usual
    choice for 4 bits), q4_k_s, q4_0, q3_k_m, q2_k. The quantised ones are llama.cpp's mixtures, to the byte what its
    `llama-quantize` writes; `fk.gguf_file(path)` counts the kinds.
    One tensor at a time is in memory twice, and no other file is written.

    Raises ValueError for a layout that llama.cpp does not support, quantised or offloaded weights, or an unknown dtype,
    ImportError where llama.cpp's quantiser is needed and missing, FileNotFoundError for a missing directory, and
    OSError if the disk has no room, all before anything is written.
    """
    if not isinstance(falcon, Falcon):
        raise TypeError(
            f"export_gguf takes a loaded Falcon, as fk.load returns it, not a {type(falcon).__name__}{to_save(falcon)}"
        )
    return write_gguf(falcon.model, live_spec(falcon.spec, falcon.model), Path(path), dtype, falcon.tokenizer)


def write_gguf(
    model: FalconForCausalLM,
    spec: FalconSpec,
    path: Path,
    dtype: str | torch.dtype = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """As `export_gguf`, from a plain model; without a tokenizer, llama.cpp accepts token ids only."""
    name = _file_type(model, dtype)
    _check(model, spec)
    tensors = planned_tensors(spec, name)
    check_quantiser({each.kind for each in tensors.values()}, name)
    with atomic_file(path, sum(each.bytes for each in tensors.values())) as partial:
        writer = GGUFWriter(partial, "falcon")
        _add_shape(writer, model, spec)
        writer.add_file_type(FILE_TYPES[name][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_tokenizer(writer, tokenizer, spec.vocabulary)
        _write_tensors(writer, model, spec, tensors)
    return path.expanduser()


def _file_type(model: FalconForCausalLM, dtype: str | torch.dtype) -> str:
    """The name in `FILE_TYPES`."""
    name = str(model.dtype if dtype == "auto" else dtype).strip().removeprefix("torch.").lower()
    name = ALIASES.get(name, name)
    if name not in FILE_TYPES:
        if dtype == "auto":
            raise ValueError(f"the model is in {model.dtype}, which is no type of a GGUF file: give dtype='f32'")
        raise ValueError(unknown_name("dtype", str(dtype), ["auto", *FILE_TYPES]))
    return name


def _check(model: FalconForCausalLM, spec: FalconSpec) -> None:
    """Raises ValueError for a model that llama.cpp would refuse or compute wrongly."""
    if missing := unsupported(spec):
        raise ValueError(
            f"{printable(spec.name)} has {', '.join(missing)}, which llama.cpp does not support for Falcon "
            "(ggml-org/llama.cpp#2868): serve it with `transformers serve`, or export a 7B, 40B or 180B"
        )
    rope: Any = model.config.rope_parameters or {}
    if (scaling := rope.get("rope_type", "default")) != "default":
        raise ValueError(
            f"the rotary positions are scaled ({scaling}), which the file would not say: serve it with vLLM"
        )
    check_writable(
        model,
        quantised="load the model in bfloat16, and export that as 'q4_k_m'",
        adapted="fk.merge(adapter, base) writes them into the weights",
        offloaded="load the model with device_map='cpu', and export that",
    )


def check_writable(model: FalconForCausalLM, *, quantised: str, adapted: str, offloaded: str) -> None:
    """Raises ValueError for a model whose weights cannot be written as they are, with what to do for each reason."""
    remove_wrappers(model)
    floating = all(each.is_floating_point() for each in model.parameters())
    require(floating and not is_quantised(model), f"the weights are quantised for torch: {quantised}")
    require(not has_adapters(model), f"the model has adapters: {adapted}")
    require(not is_offloaded(model), f"some weights are offloaded: {offloaded}")


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
    writer.add_array(MERGED_ADAPTERS, merged_adapters(config))


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
    types = dict.fromkeys(names, TokenType.NORMAL)
    for id, added in tokenizer.added_tokens_decoder.items():
        types[id] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("falcon")
    writer.add_token_list([names.get(id, f"[PAD{id}]") for id in range(vocabulary)])
    writer.add_token_types([types.get(id, TokenType.UNUSED) for id in range(vocabulary)])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(plain_template(str(tokenizer.chat_template)))


def _write_tensors(
    writer: GGUFWriter, model: FalconForCausalLM, spec: FalconSpec, tensors: Mapping[str, Stored]
) -> None:
    """Writes the metadata of all tensors, then one tensor after the other, so that only one is in memory twice."""
    names, weights = stored_names(spec), _weights(model, spec)
    kinds = {name: GGMLQuantizationType[each.kind] for name, each in tensors.items()}
    large = sum(each.bytes for each in tensors.values()) >= _PROGRESS_BAR_BYTES
    for key, name in names.items():
        size = tensors[name].bytes
        writer.add_tensor_info(name, weights[key].shape, np.dtype(np.float32), size, raw_dtype=kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key in tqdm(names, desc="Writing", unit="tensor", disable=not large):
            weight = ungrouped(weights[key], spec) if "query_key_value" in key else weights[key]
            writer.write_tensor_data(_to_bytes(weight.detach().cpu(), kinds[names[key]]))
    finally:
        writer.close()


def _weights(model: FalconForCausalLM, spec: FalconSpec) -> dict[str, torch.Tensor]:
    """The weights by name. Raises ValueError for others than the shape has, which the file would lack."""
    weights: dict[str, torch.Tensor] = model.state_dict()
    names = {*stored_names(spec), *(("lm_head.weight",) if spec.tied_head else ())}
    if wrong := sorted(names ^ weights.keys()):
        has = "has" if wrong[0] in weights else "lacks"
        raise ValueError(f"the model {has} {wrong[0]}, unlike a Falcon of its shape: export it as it was loaded")
    return weights


def _to_bytes(weight: torch.Tensor, kind: GGMLQuantizationType) -> Array:
    """A weight as the file stores it, converted some rows at a time.

    bfloat16 is passed as bytes, since numpy has no such dtype.
    """
    if kind == GGMLQuantizationType.BF16:
        return weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    if weight.ndim == 1 or kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return gguf.quants.quantize(weight.float().numpy(), kind)
    stored = np.empty(gguf.quant_shape_to_byte_shape(weight.shape, kind), np.uint8)

    def convert(part: slice) -> None:
        stored[part] = quantise(weight[part].float().numpy(), kind)

    in_slabs(convert, *weight.shape)
    return stored
