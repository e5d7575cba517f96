"""Weights and tokenizer read from a GGUF file.

transformers reads such files too (`gguf_file=`), but of Falcons only the 7B: it leaves the fused projection of the 40B
as llama.cpp keeps it, takes the embedding for the head where the file has a head of its own, and cuts numbers into
other tokens than Falcon's tokenizer does.

The package gguf is imported when such a file is loaded: `fk.load` of other models starts without it.
"""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from falcon_kit.catalogue.gguf import GGUFFile, stored_names
from falcon_kit.catalogue.gguf_header import Stored
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import is_whole, require, shown
from falcon_kit.display.reading import named_errors

_SLAB = 2**20  # values that a thread converts at once
_SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Punctuation", "behavior": "Contiguous"},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        {"type": "Digits", "individual_digits": False},
        {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": False},
    ],
}
"""How Falcon's tokenizer cuts a text before it merges bytes, which llama.cpp calls "falcon"; as in tokenizer.json."""
_NAMED = ("bos", "eos", "pad")
_BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def in_slabs(work: Callable[[slice], None], rows: int, columns: int) -> None:
    """Calls `work` for all rows of a matrix, some at a time, in torch's number of threads. Ctrl-C ends it soon."""
    step = max(1, _SLAB // columns)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(work, (slice(start, start + step) for start in range(0, rows, step))):
            pass


def ungrouped(fused: Tensor, spec: FalconSpec) -> Tensor:
    """The fused projection as llama.cpp keeps it: all queries, all keys, all values. Falcon's is by groups of heads."""
    groups = fused.view(spec.kv_heads, -1, spec.head_dim, spec.d_model)  # (G, H / G + 2, D, d_model)
    return torch.cat([part.reshape(-1, spec.d_model) for part in (groups[:, :-2], groups[:, -2], groups[:, -1])])


def grouped(fused: Tensor, spec: FalconSpec) -> Tensor:
    """The inverse of `ungrouped`: queries, key and value of each group after each other."""
    sizes = [heads * spec.head_dim for heads in (spec.query_heads, spec.kv_heads, spec.kv_heads)]
    parts = (each.view(spec.kv_heads, -1, spec.head_dim, spec.d_model) for each in fused.split(sizes))
    return torch.cat([*parts], 1).view(-1, spec.d_model)


# Weights


@dataclass(frozen=True)
class LazyWeight:
    """A weight that is read and dequantised when it is sliced; its methods are those of a safetensors slice."""

    stored: Stored
    data: Any
    """Its bytes, in a file that is mapped into memory."""
    dtype: torch.dtype
    fused: FalconSpec | None
    """The shape of the model, for a fused projection."""

    def __getitem__(self, index: Any) -> Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        values = torch.empty(self.stored.shape, dtype=self.dtype)
        rows, kind = values.view(-1, self.stored.shape[-1]), GGMLQuantizationType[self.stored.kind]
        data = self.data.reshape(len(rows), -1)

        def dequantise(part: slice) -> None:
            rows[part] = torch.from_numpy(np.array(dequantize(data[part], kind)))

        in_slabs(dequantise, *rows.shape)
        return (values if self.fused is None else grouped(values, self.fused))[index]

    def get_shape(self) -> list[int]:
        return list(self.stored.shape)

    def get_dtype(self) -> str:
        return _SAFETENSORS[self.dtype]


def lazy_weights(file: GGUFFile, dtype: torch.dtype) -> dict[str, LazyWeight]:
    """The state dict of a Falcon in a GGUF file; each weight is dequantised to `dtype` when it is sliced."""
    mapped = np.memmap(file.path, mode="r")
    weights = {}
    for ours, theirs in stored_names(file.spec).items():
        stored = file.tensors[theirs]
        data = mapped[stored.offset : stored.offset + stored.bytes]
        weights[ours] = LazyWeight(stored, data, dtype, file.spec if "query_key_value" in ours else None)
    return weights


def check_kinds(file: GGUFFile) -> None:
    """Raises ValueError for a kind that gguf cannot dequantise, such as whole numbers, before a weight is read."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    for name in file.kinds:
        kind = GGMLQuantizationType[name]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise ValueError(
                f"{file.path} has tensors of the kind {name}, which gguf {version('gguf')} cannot dequantise: "
                "get the file in another kind, such as Q4_K_M, or use llama.cpp"
            ) from None


# Tokenizer


def gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The tokenizer in a GGUF file, with the file's chat template, if it has one.

    Raises ValueError where the file has none, or one that is not Falcon's byte-level BPE.
    """
    stored = {key.removeprefix("tokenizer."): each for key, each in file.metadata.items()}
    kind, pre = stored.get("ggml.model", "none"), stored.get("ggml.pre", "falcon")
    if (kind, pre) != ("gpt2", "falcon"):
        raise ValueError(
            f"{file.path} has no tokenizer of a Falcon (tokenizer.ggml.model is {shown(kind)}, tokenizer.ggml.pre "
            f"{shown(pre)}): export it again with its tokenizer, as fk.export_gguf does"
        )
    with named_errors(file.path, "get it from another source, or export it again with fk.export_gguf"):
        require(not stored.get("ggml.add_bos_token"), "it asks for a token before each text, which no Falcon has")
        tokens, ids = stored["ggml.tokens"], file.config
        require(
            isinstance(tokens, list) and len(tokens) == file.spec.vocabulary,
            f"its tokenizer does not have the {file.spec.vocabulary} tokens of the model",
        )
        special = {"eos_token": "<|endoftext|>"}
        special |= {f"{name}_token": tokens[ids[f"{name}_token_id"]] for name in _NAMED if f"{name}_token_id" in ids}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_backend(tokens, stored),
            name_or_path=str(file.path),
            model_input_names=["input_ids", "attention_mask"],
            model_max_length=file.spec.context,
            clean_up_tokenization_spaces=False,
            **special,
        )
        template = stored.get("chat_template")
        require(template is None or isinstance(template, str), f"its chat template is {shown(template)}")
        tokenizer.chat_template = template
    return tokenizer


def _backend(tokens: list[str], stored: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in the metadata of a GGUF file."""
    from gguf import TokenType

    types, merges = stored["ggml.token_type"], stored["ggml.merges"]
    require(len(types) == len(tokens), f"it has {len(tokens)} tokens, and types for {len(types)}")
    require(all(is_whole(each, 0) for each in types), "the types of its tokens are not whole numbers")
    added = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added_tokens = [
        {"id": id, "content": token, **options, "special": added[types[id]]}
        for id, token in enumerate(tokens)
        if types[id] in added
    ]
    vocabulary = {token: id for id, token in enumerate(tokens) if types[id] != TokenType.UNUSED}
    return byte_level_bpe(vocabulary, [pair.split(" ") for pair in merges], added_tokens)


def byte_level_bpe(vocabulary: dict[str, int], merges: list[list[str]], added: list[dict[str, Any]]) -> Tokenizer:
    """A tokenizer as that of the published Falcons, from the parts of a tokenizer.json that are not the same in all."""
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZER,
        "post_processor": _BYTES | {"add_prefix_space": False},
        "decoder": _BYTES | {"trim_offsets": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    return Tokenizer.from_str(json.dumps(content))
