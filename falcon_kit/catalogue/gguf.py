"""A Falcon in a GGUF file, llama.cpp's format: its shape and its tensors, read from the header without the weights."""

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_kit.catalogue.gguf_header import Stored, read_header
from falcon_kit.catalogue.memory import linear_shapes
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.documented import documented
from falcon_kit.display.errors import is_number, is_whole, printable, require, shown
from falcon_kit.display.reading import named_errors
from falcon_kit.display.tables import format_bytes, html_table

MERGED_ADAPTERS = "falcon_kit.merged_adapters"
"""The kit's own key of the metadata: the digests of the adapters that were added to the weights, if there are any."""
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_LINEAR = {
    "self_attention.query_key_value.weight": "attn_qkv.weight",
    "self_attention.dense.weight": "attn_output.weight",
    "mlp.dense_h_to_4h.weight": "ffn_up.weight",
    "mlp.dense_4h_to_h.weight": "ffn_down.weight",
}
_NORMS = {
    1: {"input_layernorm": "attn_norm"},
    2: {"ln_mlp": "attn_norm", "ln_attn": "attn_norm_2"},  # llama.cpp's MLP reads attn_norm
}
_DTYPES = {"F32": "float32", "F16": "float16"}
"""The dtype that holds what a file has; bfloat16 for all other kinds."""


@documented
@dataclass(frozen=True, repr=False)
class GGUFFile:
    """A Falcon in a GGUF file; a table in Jupyter."""

    path: Path
    spec: FalconSpec
    config: Mapping[str, Any]
    """Its config.json, which the file does not have, from the metadata."""
    metadata: Mapping[str, Any]
    """The metadata under llama.cpp's names: the tokenizer, the chat template and more."""
    tensors: Mapping[str, Stored]
    """The tensors by llama.cpp's names."""

    @property
    def kinds(self) -> dict[str, int]:
        """The bytes of the weights in each kind, the most first: {"Q4_K": ..., "Q6_K": ..., "F32": ...}."""
        sizes: Counter[str] = Counter()
        for each in self.tensors.values():
            sizes[each.kind] += each.bytes
        return dict(sizes.most_common())

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file's tensors for each of their values, scales included."""
        return 8 * sum(self.kinds.values()) / sum(math.prod(each.shape) for each in self.tensors.values())

    def __repr__(self) -> str:
        return f"GGUFFile({printable(self.spec.name)}, {self._size()}: {', '.join(self.kinds)})"

    def _repr_html_(self) -> str:
        tensors = Counter(each.kind for each in self.tensors.values())
        rows = [(kind, tensors[kind], format_bytes(size)) for kind, size in self.kinds.items()]
        title = f"{self.spec.name}, {self._size()}, {self.bits_per_weight:.2f} bits per weight"
        return html_table(title, ("kind", "tensors", "bytes"), rows)

    def _size(self) -> str:
        return format_bytes(self.path.stat().st_size)


def gguf_file(path: str | os.PathLike[str]) -> GGUFFile:
    """What a GGUF file of a Falcon holds: its shape, and the kinds of its tensors with their bytes. No weight is read.

    Raises FileNotFoundError for a missing file, and ValueError for one that is damaged or cut off, a part of a file
    that was split, or another architecture.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give the path of a .gguf file")
    if _PART.search(path.name):
        raise ValueError(
            f"{path} is one part of a file that was split: join the parts with llama.cpp's "
            f"`llama-gguf-split --merge FIRST_PART WHOLE.gguf`, and give the whole file"
        )
    with named_errors(path, "download it again, or export it again with fk.export_gguf"):
        metadata, tensors = read_header(path)
    if (architecture := metadata.get("general.architecture")) != "falcon":
        raise ValueError(
            f"{path} is a GGUF file of the architecture {shown(architecture)}, not of a Falcon: give a Falcon's, or "
            "run it with llama.cpp"
        )
    with named_errors(path, "get it from another source, or export it again with fk.export_gguf"):
        config = _config(metadata, tensors)
        licence = {"licence": str(metadata["general.license"])} if "general.license" in metadata else {}
        shape = FalconSpec.from_config(config, path.stem, source=str(path), **licence)
        _check_tensors(shape, tensors)
    return GGUFFile(path, shape, config, metadata, tensors)


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path stands for: itself, or the only one in a folder without a config.json; else None."""
    if not path.is_dir():
        return path if _is_gguf(path) else None
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return None
    files = sorted(filter(_is_gguf, path.iterdir()))
    if len(files) > 1 and not _PART.search(files[0].name):
        raise ValueError(f"{path} has several GGUF files: give the path of one, such as {files[0]}")
    return files[0] if files else None


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and path.is_file()


def stored_names(spec: FalconSpec) -> dict[str, str]:
    """llama.cpp's name of each weight, by its name in transformers."""
    names = {"transformer.word_embeddings.weight": "token_embd.weight"}
    names |= {f"transformer.ln_f.{side}": f"output_norm.{side}" for side in ("weight", "bias")}
    if not spec.tied_head:
        names["lm_head.weight"] = "output.weight"
    norms = _NORMS[spec.norms_per_block].items()
    module = {f"{ours}.{side}": f"{theirs}.{side}" for ours, theirs in norms for side in ("weight", "bias")}
    for layer in range(spec.layers):
        names |= {
            f"transformer.h.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in (module | _LINEAR).items()
        }
    return names


def stored_shapes(spec: FalconSpec) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by llama.cpp's name, as in torch."""
    matrices = dict(zip(_LINEAR.values(), linear_shapes(spec), strict=True))
    matrices |= dict.fromkeys(("token_embd.weight", "output.weight"), (spec.vocabulary, spec.d_model))
    vector = (spec.d_model,)
    return {name: matrices.get(re.sub(r"^blk\.\d+\.", "", name), vector) for name in stored_names(spec).values()}


# From llama.cpp's metadata


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """The config.json of a Falcon: some of it in the metadata, the rest to be seen from the tensors."""
    shape = {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "num_attention_heads": "attention.head_count",
        "num_kv_heads": "attention.head_count_kv",
        "ffn_hidden_size": "feed_forward_length",
        "max_position_embeddings": "context_length",
    }
    for key in shape.values():
        require(f"falcon.{key}" in metadata, f"its metadata lack falcon.{key}")
    config = {ours: metadata[f"falcon.{theirs}"] for ours, theirs in shape.items()}
    norms = 2 if "blk.0.attn_norm_2.weight" in tensors else 1
    require("token_embd.weight" in tensors, "it lacks the tensor token_embd.weight")
    vocabulary = tensors["token_embd.weight"].shape[0]
    kinds = Counter(each.kind for each in tensors.values() if len(each.shape) > 1)
    return {
        **config,
        **_special_tokens(metadata, vocabulary),
        **_merged_adapters(metadata),
        "model_type": "falcon",
        "architectures": ["FalconForCausalLM"],
        "vocab_size": vocabulary,
        "new_decoder_architecture": norms == 2 or config["num_kv_heads"] != 1,
        "num_ln_in_parallel_attn": norms,
        "multi_query": config["num_kv_heads"] == 1,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
        "layer_norm_epsilon": _number(metadata, "attention.layer_norm_epsilon", 1e-5),
        "rope_parameters": {"rope_type": "default", "rope_theta": _rope_theta(metadata)},
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": _DTYPES.get(max(kinds, default="", key=kinds.__getitem__), "bfloat16"),
    }


def _special_tokens(metadata: Mapping[str, Any], vocabulary: int) -> dict[str, int]:
    """The ids of the special tokens that the file names."""
    ids = {}
    for ours, theirs in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        if (id := metadata.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            require(is_whole(id, 0, vocabulary - 1), f"its {theirs}_token_id is {shown(id)}, of {vocabulary} tokens")
            ids[f"{ours}_token_id"] = id
    return ids


def _merged_adapters(metadata: Mapping[str, Any]) -> dict[str, list[str]]:
    """The digests of the adapters in the weights, under the name that they have in a config.json of the kit."""
    if (merged := metadata.get(MERGED_ADAPTERS)) is None:
        return {}
    digests = isinstance(merged, list) and all(isinstance(each, str) for each in merged)
    require(digests, f"its {MERGED_ADAPTERS} is {shown(merged)}, not a list of digests")
    return {"merged_adapters": merged}


def _rope_theta(metadata: Mapping[str, Any]) -> float:
    """The base of the rotary positions; 10,000 where the file states none, as in llama.cpp."""
    scaling = metadata.get("falcon.rope.scaling.type", "none")
    require(scaling == "none", f"its rotary positions are scaled ({shown(scaling)}), which no published Falcon's are")
    return _number(metadata, "rope.freq_base", 10000.0)


def _number(metadata: Mapping[str, Any], key: str, default: float) -> float:
    value = metadata.get(f"falcon.{key}", default)
    require(is_number(value, 1e-30, 1e30), f"its falcon.{key} is {shown(value)}, but it must be a positive number")
    return float(value)


def _check_tensors(spec: FalconSpec, tensors: Mapping[str, Stored]) -> None:
    """Raises ValueError unless the file has exactly the tensors of a Falcon of this shape."""
    require(
        spec.layers <= len(tensors),
        f"its metadata state {spec.layers} layers, and it has {len(tensors)} tensors in all",
    )
    expected = stored_shapes(spec)
    for name, shape in expected.items():
        require(name in tensors, f"it lacks the tensor {name}")
        found = tensors[name].shape
        require(found == shape, f"its tensor {name} has the shape {found}, where its metadata ask for {shape}")
    foreign = sorted(tensors.keys() - expected.keys())
    require(not foreign, f"it has {len(foreign)} tensors that no Falcon of llama.cpp has, such as {foreign[:1]}")
