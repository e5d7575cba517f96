"""`FalconSpec`: the shape of a Falcon, read from a current or an old (2023) config.json, its parameters and bytes."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from falcon_kit.display.documented import documented
from falcon_kit.display.errors import is_number, printable, require, shown
from falcon_kit.display.tables import counted, format_bytes, html_table

SPECIAL_TOKENS = tuple(
    ">>TITLE<< >>ABSTRACT<< >>INTRODUCTION<< >>SUMMARY<< >>COMMENT<< >>ANSWER<< >>QUESTION<< >>DOMAIN<< >>PREFIX<< "
    ">>SUFFIX<< >>MIDDLE<< <|endoftext|>".split()
)
"""The twelve special tokens of Falcon's vocabulary, ids 0 to 11."""
_LEGACY_TYPES = ("RefinedWeb", "RefinedWebModel")
_EXTENDING = ("linear", "dynamic", "yarn")  # of rotary embeddings, whose factor is that of the context
_LEGACY_KEYS = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
    "n_embed": "hidden_size",
    "torch_dtype": "dtype",
}


@documented
@dataclass(frozen=True, repr=False)
class FalconSpec:
    """The shape of one Falcon; hashable and comparable, and a table in Jupyter."""

    name: str
    """The name in the catalogue, such as "falcon-40b-instruct"; for other checkpoints, the name of the directory."""
    layers: int
    """Decoder layers."""
    d_model: int
    """Hidden size: channels of the embeddings and the hidden states (d)."""
    query_heads: int
    """Query heads per layer (H)."""
    kv_heads: int
    """KV heads per layer (G): the heads in the KV cache."""
    vocabulary: int
    """Tokens of the vocabulary (V)."""
    intermediate_size: int
    """Channels inside the MLP (f); 4 x d_model in all published Falcons of this family."""
    context: int = 2048
    """Tokens per training sequence, times the factor of scaled rotary embeddings; longer texts become gibberish
    (huggingface/transformers#25878)."""
    positions: Literal["rotary", "alibi"] = "rotary"
    """Rotary embeddings (Su et al. 2021, arXiv 2104.09864) or ALiBi biases (Press et al. 2021, arXiv 2108.12409)."""
    parallel_block: bool = True
    """Attention and MLP read the same input, and their outputs are added; otherwise the MLP follows the attention."""
    norms_per_block: int = 2
    """LayerNorms in a decoder layer."""
    bias: bool = False
    """Whether the linear layers have biases."""
    new_decoder_architecture: bool = True
    """The layout of the 40B: fused QKV weights per group of heads, and parallel LayerNorms for attention and MLP."""
    tied_head: bool = True
    """The output head shares the weights of the embedding."""
    licence: str = "not stated"
    """Licence of the weights."""
    fine_tuned_from: str | None = None
    """The base model of an instruct or chat model; None for a base model."""
    published: bool = False
    """Whether it is published under tiiuae/ on the Hugging Face hub."""
    source: str = "a config.json"
    """Source of the figures."""
    stored_dtype: str = field(default="bfloat16", compare=False)
    """The dtype of the weights in the files: float32, bfloat16, float16, int8, int4, nf4 or nf4-double."""

    def __post_init__(self) -> None:
        d, h, g = self.d_model, self.query_heads, self.kv_heads
        if d % h or h % g:
            raise ValueError(
                f"{printable(self.name)}: d_model {d} must be a multiple of {h} query heads, and those of {g} KV heads"
            )
        if self.norms_per_block > 2:
            raise ValueError(
                f"{printable(self.name)}: a Falcon's block has one or two LayerNorms, not {self.norms_per_block}"
            )

    @property
    def hub_id(self) -> str | None:
        """The id on the Hugging Face hub; None for a model that is not from there."""
        if self.published:
            return f"tiiuae/{self.name}"
        return self.name if self.source == f"https://huggingface.co/{self.name}" else None

    @property
    def head_dim(self) -> int:
        """Channels of one head (D): 64 in all published Falcons of this family."""
        return self.d_model // self.query_heads

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads that share one KV head (H / G)."""
        return self.query_heads // self.kv_heads

    @property
    def layout(self) -> Literal["grouped", "multi-query", "multi-head"]:
        """How query heads share keys and values: in groups, all together, or not at all."""
        if self.queries_per_kv_head == 1:
            return "multi-head"
        return "multi-query" if self.kv_heads == 1 else "grouped"

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding, V x d_model, and equally of the output head."""
        return self.vocabulary * self.d_model

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer: fused QKV, attention output, MLP and LayerNorms."""
        d, qkv = self.d_model, (self.query_heads + 2 * self.kv_heads) * self.head_dim
        biases = qkv + d + self.intermediate_size + d if self.bias else 0
        return d * (qkv + d + 2 * self.intermediate_size) + biases + self.norms_per_block * 2 * d

    @property
    def parameters(self) -> int:
        """Unique parameters: a tied output head is not counted again."""
        embeddings = self.embedding_parameters * (1 if self.tied_head else 2)
        return embeddings + self.layers * self.layer_parameters + 2 * self.d_model

    @property
    def stored_bytes(self) -> int:
        """Bytes of the published bfloat16 files. They contain `lm_head` even if it is tied."""
        return 2 * (self.parameters + (self.embedding_parameters if self.tied_head else 0))

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of the grouped KV cache, with KV heads only, per token: 122,880 for the 40B in bfloat16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "falcon", **facts: Any) -> Self:
        """The shape in a config.json, current or of the old RefinedWeb types.

        facts: further fields of the spec, such as `licence`. Raises ValueError for a model that is not a Falcon, for a
        missing key, and for a value of the wrong kind.
        """
        config = _current_config(config, name)
        new = _switch(config, "new_decoder_architecture", name)
        parallel = _switch(config, "parallel_attn", name, True) or new
        d_model = _positive_int(config, "hidden_size", name)
        trained = _positive_int(config, "max_position_embeddings", name, 2048)
        return cls(
            name=name,
            layers=_positive_int(config, "num_hidden_layers", name),
            d_model=d_model,
            query_heads=_positive_int(config, "num_attention_heads", name),
            kv_heads=_kv_heads(config, name),
            vocabulary=_positive_int(config, "vocab_size", name),
            intermediate_size=_positive_int(config, "ffn_hidden_size", name, 4 * d_model),
            context=context_limit({**config, "max_position_embeddings": trained}, name),
            positions="alibi" if _switch(config, "alibi", name) else "rotary",
            parallel_block=parallel,
            norms_per_block=_positive_int(config, "num_ln_in_parallel_attn", name, 2 if new else 1) if parallel else 2,
            bias=_switch(config, "bias", name),
            new_decoder_architecture=new,
            tied_head=_switch(config, "tie_word_embeddings", name, True),
            stored_dtype=_stored_dtype(config),
            **facts,
        )

    def to_config(self) -> dict[str, Any]:
        """A config.json of this shape, as a dictionary: `FalconConfig(**spec.to_config())` is its configuration."""
        return {
            "model_type": "falcon",
            "num_hidden_layers": self.layers,
            "hidden_size": self.d_model,
            "num_attention_heads": self.query_heads,
            "num_kv_heads": self.kv_heads,
            "multi_query": self.kv_heads == 1,
            "vocab_size": self.vocabulary,
            "ffn_hidden_size": self.intermediate_size,
            "max_position_embeddings": self.context,
            "alibi": self.positions == "alibi",
            "parallel_attn": self.parallel_block,
            "num_ln_in_parallel_attn": self.norms_per_block if self.parallel_block else None,
            "bias": self.bias,
            "new_decoder_architecture": self.new_decoder_architecture,
            "tie_word_embeddings": self.tied_head,
        }

    def facts(self) -> dict[str, str]:
        """The values in the tables, by heading."""
        block = "parallel" if self.parallel_block else "sequential"
        return {
            "parameters": f"{self.parameters:,}",
            "layers": f"{self.layers}",
            "d_model": f"{self.d_model:,}",
            "query / KV heads": f"{self.query_heads} / {self.kv_heads} ({self.layout})",
            "head_dim": f"{self.head_dim}",
            "vocabulary": f"{self.vocabulary:,}",
            "context": f"{self.context:,} tokens",
            "positions": self.positions,
            "block": f"{block}, LayerNorms: {self.norms_per_block}",
            "files, bfloat16": format_bytes(self.stored_bytes),
            "KV cache per token, bfloat16": format_bytes(self.kv_bytes_per_token()),
            "fine-tuned from": self.fine_tuned_from or "(a base model)",
            "licence": self.licence,
            "source": self.source,
        }

    def __repr__(self) -> str:
        heads = f"{self.query_heads} query / {self.kv_heads} KV heads"
        return f"FalconSpec({self.name!r}, {self.parameters:,} parameters, {counted(self.layers, 'layer')}, {heads})"

    def _repr_html_(self) -> str:
        return html_table(self.name, (), self.facts().items())


def config_from_legacy(config: Mapping[str, Any], name: str = "the config") -> dict[str, Any]:
    """An old config (`model_type` RefinedWeb or RefinedWebModel) with the keys of the current `FalconConfig`.

    The mapping is that of transformers' `models/falcon/convert_custom_code_checkpoint.py`. Missing switches get the
    defaults of the old `configuration_RW.py`: multi_query and parallel_attn are off. Missing token ids get the current
    defaults, because the old default of eos_token_id, 2, contradicts the tokenizer's, 11. `auto_map` is removed, so
    that the config refers to no remote code. Raises ValueError for another model type, and for
    apply_residual_connection_post_layernorm, which transformers' Falcon does not support. Errors begin
    with `name`.
    """
    kind = config.get("model_type")
    require(
        kind in _LEGACY_TYPES, f"{name}: model_type is {kind!r}, but an old config has {' or '.join(_LEGACY_TYPES)}"
    )
    unsupported = "apply_residual_connection_post_layernorm"
    require(
        not _switch(config, unsupported, name),
        f"{name}: {unsupported} is true; transformers' Falcon does not support that",
    )
    architectures = config.get("architectures") or ["RWForCausalLM"]
    require(
        isinstance(architectures, list) and all(isinstance(each, str) for each in architectures),
        f"{name}: architectures is {shown(architectures)}, but it must be a list of names",
    )
    dropped = {*_LEGACY_KEYS, "auto_map", unsupported}
    return {
        "new_decoder_architecture": kind == "RefinedWeb" or config.get("n_head_kv") is not None,
        "multi_query": False,
        "parallel_attn": False,
        **{_LEGACY_KEYS[key]: value for key, value in config.items() if key in _LEGACY_KEYS},
        **{key: value for key, value in config.items() if key not in dropped},
        "model_type": "falcon",
        "architectures": [each.replace("RW", "Falcon") for each in architectures],
    }


def context_limit(config: Any, name: str = "the config") -> int:
    """The longest context of a config: `max_position_embeddings`, or what its scaled rotary embeddings extend that to.

    The factor of linear, dynamic and YaRN scaling counts from `original_max_position_embeddings`, if that is given.
    config: a mapping or a FalconConfig. Raises ValueError, which begins with `name`, unless the rotary embeddings are a
    JSON object with numbers.
    """
    config = config if isinstance(config, Mapping) else vars(config)
    limit: int = config["max_position_embeddings"]
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    require(isinstance(rope, Mapping), f"{name}: {key} is {shown(rope)}, but it must be a JSON object")
    factor, kind = rope.get("factor"), rope.get("rope_type", rope.get("type"))
    if config.get("alibi") or kind not in _EXTENDING or not factor:
        return limit
    original = rope.get("original_max_position_embeddings") or limit
    for part, value in {"factor": factor, "original_max_position_embeddings": original}.items():
        numeric = is_number(value, 0, sys.float_info.max)
        require(numeric, f"{name}: {part} of {key} is {shown(value)}, but it must be a number, at least 0")
    return max(limit, int(original * factor))


def _current_config(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The config with current keys. Raises ValueError for another model type, and for missing keys."""
    kind = config.get("model_type")
    if kind in _LEGACY_TYPES:
        config = config_from_legacy(config, name)
    elif kind != "falcon":
        raise ValueError(
            f"{name}: model_type is {kind!r}, not a Falcon's: falcon, or the old {' or '.join(_LEGACY_TYPES)}"
        )
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if missing := [key for key in required if config.get(key) is None]:
        raise ValueError(f"{name}: the config lacks {', '.join(missing)}; required are {', '.join(required)}")
    return config


def _stored_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that a config names, also of bitsandbytes and of the kit; bfloat16 where it names no other."""
    quantised = config.get("quantization_config")
    quantised = quantised if isinstance(quantised, Mapping) else {}
    if quantised.get("load_in_8bit"):
        return "int8"
    if quantised.get("load_in_4bit"):
        return "nf4-double" if quantised.get("bnb_4bit_use_double_quant") else "nf4"
    named = quantised.get("dtype") or config.get("dtype") or config.get("torch_dtype")
    named = str(named).removeprefix("torch.")
    return named if named in ("float32", "float16", "int8", "int4") else "bfloat16"


def _positive_int(config: Mapping[str, Any], key: str, name: str, default: int = 0) -> int:
    """A positive whole number of the config; `default` if it is missing or null."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: {key} is {shown(value)}, but it must be a whole number, at least 1")
    return value


def _switch(config: Mapping[str, Any], key: str, name: str, default: bool = False) -> bool:
    """A boolean of the config; `default` if it is missing, False if it is null, as in transformers."""
    value = config.get(key, default)
    require(value is None or isinstance(value, bool), f"{name}: {key} is {shown(value)}, but it must be true or false")
    return bool(value)


def _kv_heads(config: Mapping[str, Any], name: str) -> int:
    """KV heads as in `FalconAttention`, which reads `num_kv_heads` only in the new decoder architecture."""
    query_heads = _positive_int(config, "num_attention_heads", name)
    if config.get("new_decoder_architecture"):
        return _positive_int(config, "num_kv_heads", name, query_heads)
    return 1 if _switch(config, "multi_query", name, True) else query_heads
