"""The shape of a Falcon, read from a config.json of today or of 2023, and the parameters and bytes that follow from it.

All of it is arithmetic on a handful of numbers: neither torch nor transformers is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from falcon_kit.display.tables import format_bytes, html_table

_LEGACY_TYPES = ("RefinedWeb", "RefinedWebModel")
_LEGACY_KEYS = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
    "n_embed": "hidden_size",
    "torch_dtype": "dtype",
}


@dataclass(frozen=True, repr=False)
class FalconSpec:
    """The shape of one Falcon; hashable and comparable, and a table in Jupyter."""

    name: str
    """The catalogue name, such as "falcon-40b-instruct"; for a checkpoint of your own, its directory's name."""
    layers: int
    """Decoder layers."""
    d_model: int
    """Width of the residual stream; the embeddings have this many channels."""
    query_heads: int
    """Query heads per layer (H)."""
    kv_heads: int
    """KV heads per layer (G): what a KV cache has to hold."""
    vocabulary: int
    """Rows of the embedding (V)."""
    intermediate_size: int
    """Hidden width of the feed-forward block; 4 x d_model in all published Falcons of this family."""
    context: int = 2048
    """Tokens seen in training; text beyond it comes out as gibberish (huggingface/transformers#25878)."""
    positions: Literal["rotary", "alibi"] = "rotary"
    """Rotary embeddings (Su et al. 2021, arXiv 2104.09864) or ALiBi biases (Press et al. 2021, arXiv 2108.12409)."""
    parallel_block: bool = True
    """Attention and feed-forward read the same input and are added together, instead of one after the other."""
    norms_per_block: int = 2
    """LayerNorms in a decoder layer."""
    bias: bool = False
    """Whether the linear layers have biases."""
    new_decoder_architecture: bool = True
    """The 40B layout: query, key and value fused per group of heads, and two LayerNorms beside each other."""
    tied_head: bool = True
    """The output head shares the embedding's weights."""
    licence: str = "not stated"
    """Licence of the weights."""
    fine_tuned_from: str | None = None
    """The model that an instruct or chat model was made from; None for a base model."""
    published: bool = False
    """Published under tiiuae/ on the Hugging Face hub."""
    source: str = "a config.json"
    """Where the figures come from."""

    def __post_init__(self) -> None:
        d, h, g = self.d_model, self.query_heads, self.kv_heads
        if d % h or h % g:
            raise ValueError(
                f"{self.name}: d_model {d} must split evenly over {h} query heads, and those over {g} KV heads."
            )
        if self.norms_per_block > 2:
            raise ValueError(f"{self.name}: a Falcon's block has one or two LayerNorms, not {self.norms_per_block}.")

    @property
    def hub_id(self) -> str | None:
        """The id on the Hugging Face hub, None for what is not published there."""
        return f"tiiuae/{self.name}" if self.published else None

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
        """How keys and values are shared: by the query heads of a group, by all query heads, or not at all."""
        if self.queries_per_kv_head == 1:
            return "multi-head"
        return "multi-query" if self.kv_heads == 1 else "grouped"

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding, V x d_model; the output head has as many."""
        return self.vocabulary * self.d_model

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer: fused QKV, attention output, feed-forward and its LayerNorms."""
        d, qkv = self.d_model, (self.query_heads + 2 * self.kv_heads) * self.head_dim
        biases = qkv + d + self.intermediate_size + d if self.bias else 0
        return d * (qkv + d + 2 * self.intermediate_size) + biases + self.norms_per_block * 2 * d

    @property
    def parameters(self) -> int:
        """Unique parameters: a head that is tied to the embedding counts once."""
        embeddings = self.embedding_parameters * (1 if self.tied_head else 2)
        return embeddings + self.layers * self.layer_parameters + 2 * self.d_model

    @property
    def stored_bytes(self) -> int:
        """Bytes of the published bfloat16 files, which store `lm_head` even where it is tied."""
        return 2 * (self.parameters + (self.embedding_parameters if self.tied_head else 0))

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of KV cache per token of context when only the KV heads are kept: 122,880 for 40B in bfloat16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "falcon", **facts: Any) -> FalconSpec:
        """Read the shape from a config.json, today's or the old RefinedWeb kind.

        `facts` are further fields of the spec, such as `licence`. Raises ValueError for a model that is not a Falcon,
        a missing key, or a value that is not a positive whole number.
        """
        config = _todays_config(config, name)
        new = bool(config.get("new_decoder_architecture"))
        parallel = new or bool(config.get("parallel_attn", True))
        d_model = _whole(config, "hidden_size", name)
        return cls(
            name=name,
            layers=_whole(config, "num_hidden_layers", name),
            d_model=d_model,
            query_heads=_whole(config, "num_attention_heads", name),
            kv_heads=_kv_heads(config, name),
            vocabulary=_whole(config, "vocab_size", name),
            intermediate_size=_whole(config, "ffn_hidden_size", name, 4 * d_model),
            context=_whole(config, "max_position_embeddings", name, 2048),
            positions="alibi" if config.get("alibi") else "rotary",
            parallel_block=parallel,
            norms_per_block=_whole(config, "num_ln_in_parallel_attn", name, 2 if new else 1) if parallel else 2,
            bias=bool(config.get("bias")),
            new_decoder_architecture=new,
            tied_head=bool(config.get("tie_word_embeddings", True)),
            **facts,
        )

    def to_config(self) -> dict[str, Any]:
        """The keys of a config.json of this shape: `FalconConfig(**spec.to_config())` builds it with random weights."""
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
        """What the tables show, by heading."""
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
        return f"FalconSpec({self.name!r}, {self.parameters:,} parameters, {self.layers} layers, {heads})"

    def _repr_html_(self) -> str:
        return html_table(self.name, (), self.facts().items())


def config_from_legacy(config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn an old config (`model_type` RefinedWeb or RefinedWebModel) into the keys of today's `FalconConfig`.

    The mapping is that of transformers' own `models/falcon/convert_custom_code_checkpoint.py`. Switches that are absent
    take the defaults of the old `configuration_RW.py` (multi_query and parallel_attn off), not today's; absent token
    ids do not, because its end token 2 is not the tokenizer's, 11. `auto_map` goes, so that no remote code is named.
    Raises ValueError for a config of another type, or with the one old switch that transformers cannot compute.
    """
    kind = config.get("model_type")
    if kind not in _LEGACY_TYPES:
        raise ValueError(f"model_type is {kind!r}, but an old config has {' or '.join(_LEGACY_TYPES)}.")
    if config.get("apply_residual_connection_post_layernorm"):
        raise ValueError("apply_residual_connection_post_layernorm is true; transformers' Falcon cannot compute that.")
    dropped = {*_LEGACY_KEYS, "auto_map", "apply_residual_connection_post_layernorm"}
    return {
        "new_decoder_architecture": kind == "RefinedWeb" or config.get("n_head_kv") is not None,
        "multi_query": False,
        "parallel_attn": False,
        **{_LEGACY_KEYS[key]: value for key, value in config.items() if key in _LEGACY_KEYS},
        **{key: value for key, value in config.items() if key not in dropped},
        "model_type": "falcon",
        "architectures": [part.replace("RW", "Falcon") for part in config.get("architectures") or ["RWForCausalLM"]],
    }


def _todays_config(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The config under today's keys; refuses other model types and names the keys that are missing."""
    kind = config.get("model_type")
    if kind in _LEGACY_TYPES:
        config = config_from_legacy(config)
    elif kind != "falcon":
        raise ValueError(
            f"{name}: model_type is {kind!r}, not a Falcon's: falcon, or once {' or '.join(_LEGACY_TYPES)}."
        )
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if missing := [key for key in needed if config.get(key) is None]:
        raise ValueError(f"{name}: the config lacks {', '.join(missing)}; a Falcon's shape needs {', '.join(needed)}.")
    return config


def _whole(config: Mapping[str, Any], key: str, name: str, default: int = 0) -> int:
    """A positive whole number of the config; an absent one, or null, is the default."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: {key} is {value!r}, but it must be a whole number, at least 1.")
    return value


def _kv_heads(config: Mapping[str, Any], name: str) -> int:
    """KV heads as `FalconAttention` decides them: `num_kv_heads` counts only in the new decoder architecture."""
    query_heads = _whole(config, "num_attention_heads", name)
    if config.get("new_decoder_architecture"):
        return _whole(config, "num_kv_heads", name, query_heads)
    return 1 if config.get("multi_query", True) else query_heads
