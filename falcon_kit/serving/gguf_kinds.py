"""The kinds of a quantised GGUF file: which tensor gets which, as llama.cpp's llama-quantize chooses for a Falcon.

A k-quant stores 256 values in a block, the older kinds 32. The rows of most matrices of the 7B have 4544 values, which
is no multiple of 256: there the older kind with the next more bits takes its place, as in llama.cpp.
"""

from collections.abc import Callable
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from falcon_kit.catalogue.gguf import GGUFFile, stored_shapes
from falcon_kit.catalogue.gguf_header import Stored, stored
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import is_whole

F32, F16, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16
Q4_0, Q5_0, Q5_1, Q8_0 = (GGMLQuantizationType[name] for name in ("Q4_0", "Q5_0", "Q5_1", "Q8_0"))
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K = (GGMLQuantizationType[f"Q{bits}_K"] for bits in range(2, 7))
FILE_TYPES = {
    "f32": (F32, LlamaFileType.ALL_F32),
    "f16": (F16, LlamaFileType.MOSTLY_F16),
    "bf16": (BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q6_k": (Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": (Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q5_0": (Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_k_m": (Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "q4_k_s": (Q4_K, LlamaFileType.MOSTLY_Q4_K_S),
    "q4_0": (Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q3_k_m": (Q3_K, LlamaFileType.MOSTLY_Q3_K_M),
    "q2_k": (Q2_K, LlamaFileType.MOSTLY_Q2_K),
}
"""llama.cpp's names: the kind of most matrices, and the number of the mixture in the file."""
ALIASES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""torch's names for some of them."""
_SMALL_BLOCKS = {Q2_K: Q4_0, Q3_K: Q4_0, Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}
"""What takes the place of a k-quant where the rows are no multiple of its 256 values."""

_Choice = Callable[[int, FalconSpec], GGMLQuantizationType]


def _more_bits(layer: int, spec: FalconSpec) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    eighth = spec.layers // 8
    return layer < eighth or layer >= 7 * spec.layers // 8 or (layer - eighth) % 3 == 2


_QKV: dict[str, _Choice] = {
    "q2_k": lambda _, spec: Q4_K if spec.queries_per_kv_head >= 4 else Q3_K,
    "q3_k_m": lambda layer, _: Q5_K if layer < 2 else Q4_K,
    "q4_k_s": lambda layer, _: Q5_K if layer < 4 else Q4_K,
    "q4_k_m": lambda layer, spec: Q6_K if _more_bits(layer, spec) else Q4_K,
    "q5_k_m": lambda layer, spec: Q6_K if _more_bits(layer, spec) else Q5_K,
}
"""The fused queries, keys and values, where a mixture has another kind for them."""
_DOWN: dict[str, _Choice] = {
    "q2_k": lambda _, __: Q3_K,
    "q3_k_m": lambda layer, spec: Q5_K if layer < spec.layers // 16 else Q4_K if _more_bits(layer, spec) else Q3_K,
    "q4_k_m": lambda layer, spec: Q6_K if layer < spec.layers // 16 else Q5_K if _more_bits(layer, spec) else Q4_K,
    "q5_k_m": lambda layer, spec: Q6_K if _more_bits(layer, spec) else Q5_K,
}
"""The second matrix of the MLP."""


def unsupported(spec: FalconSpec) -> list[str]:
    """What a layout has that llama.cpp does not support for Falcon (ggml-org/llama.cpp#2868)."""
    reasons = {
        "positions by ALiBi": spec.positions == "alibi",
        "a sequential block": not spec.parallel_block,
        "biases in its linear layers": spec.bias,
    }
    return [reason for reason, holds in reasons.items() if holds]


def planned_tensors(spec: FalconSpec, dtype: str) -> dict[str, Stored]:
    """The tensors of the file that `export_gguf` would write, by llama.cpp's names. Vectors stay in float32.

    dtype: a name of `FILE_TYPES`, or torch's.
    """
    name = ALIASES.get(dtype, dtype)
    return {
        tensor: stored(F32 if len(shape) == 1 else _fitting(_wanted(tensor, spec, name), shape[-1]), shape)
        for tensor, shape in stored_shapes(spec).items()
    }


def stored_dtype(file: GGUFFile) -> str:
    """llama.cpp's name for the mixture in a file: that of its metadata, or else the kind of most bytes."""
    number: Any = file.metadata.get("general.file_type")
    names = {each.value: each.name.lower().partition("_")[2] for each in LlamaFileType}
    return names.get(number if is_whole(number, 0) else -1) or next(iter(file.kinds)).lower()


def _wanted(tensor: str, spec: FalconSpec, name: str) -> GGMLQuantizationType:
    """The kind for a matrix, whatever the length of its rows."""
    kind, _ = FILE_TYPES[name]
    if kind in (F32, F16, BF16):
        return kind
    if tensor == ("token_embd.weight" if spec.tied_head else "output.weight"):
        return Q8_0  # a Falcon's head
    choices = {"attn_qkv.weight": _QKV, "ffn_down.weight": _DOWN}
    _, _, place = tensor.partition("blk.")
    layer, _, module = place.partition(".")
    choice = choices.get(module, {}).get(name)
    return choice(int(layer), spec) if choice else kind


def _fitting(kind: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """The kind itself, or what takes its place for rows of so many values."""
    for fitting in (kind, _SMALL_BLOCKS.get(kind, kind)):
        if columns % GGML_QUANT_SIZES[fitting][0] == 0:
            return fitting
    return F16
