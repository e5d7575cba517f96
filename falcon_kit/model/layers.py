"""A decoder layer of Falcon: attention over grouped KV heads, and the MLP in parallel with it or after it.

Classes have the names that they have in transformers, so that device maps, PEFT and FSDP find them; parameters too, so
that checkpoints load. Linear layers are plain `nn.Linear`, which quantisation libraries replace. transformers uses
`FalconLinear` instead, which rounds once more between product and bias.

Shapes: B batch, T time (queries), K time (keys), G KV heads, R query heads per KV head, H = G x R query heads,
D head_dim.
"""

from typing import Any, cast

from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers import Cache, FalconConfig
from transformers.activations import get_activation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.falcon import modeling_falcon as stock
from transformers.models.falcon.modeling_falcon import rotate_half

from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.model import attention


class FalconAttention(nn.Module):
    """Attention of all layouts: grouped (40B, 180B), multi-query (7B: G = 1), multi-head (rw: R = 1)."""

    def __init__(self, config: FalconConfig, spec: FalconSpec, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = spec.head_dim
        # R, under the name that transformers' attention functions read
        self.num_key_value_groups = spec.queries_per_kv_head
        self.scaling = spec.head_dim**-0.5
        self.is_causal = True
        fused = (spec.query_heads + 2 * spec.kv_heads) * spec.head_dim
        self.query_key_value = nn.Linear(spec.d_model, fused, bias=spec.bias)
        self.dense = nn.Linear(spec.d_model, spec.d_model, bias=spec.bias)

    def forward(
        self,
        hidden_states: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        layer_past: Cache | None = None,
        output_attentions: bool = False,
        unseeing_queries: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Output (B, T, d_model), and the attention probabilities (B, H, T, K) or None.

        `unseeing_queries` (B, 1, T, 1) are set to 0, so that they attend to all keys equally.
        """
        query, key, value = self.project(hidden_states, rotation)
        if unseeing_queries is not None:
            query = query.masked_fill(unseeing_queries, 0)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        chosen = "eager" if output_attentions else self.config._attn_implementation
        attend = attention.ATTENTION.get(chosen) or ALL_ATTENTION_FUNCTIONS.get_interface(
            chosen, attention.eager_attention
        )
        output, probabilities = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=float(self.config.attention_dropout or 0) if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.dense(output.reshape(*hidden_states.shape[:2], -1)), probabilities

    def project(self, hidden_states: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, D), keys and values (B, G, T, D) of hidden states (B, T, d_model)."""
        return split_heads(self.query_key_value(hidden_states), self.num_key_value_groups, self.head_dim, rotation)


def split_heads(
    fused: Tensor, queries_per_kv_head: int, head_dim: int, rotation: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, T, D), keys and values (B, G, T, D) of the fused projection (B, T, (H + 2 G) x D).

    The projection is laid out by group, [R queries, key, value] x G, in every layout: 40B has G = 8 and R = 16, 7B has
    G = 1 and R = 71, rw has R = 1. The rotary embedding `rotation` applies to queries and keys.
    """
    fused = fused.view(*fused.shape[:2], -1, queries_per_kv_head + 2, head_dim)  # (B, T, G, R + 2, D)
    rotated, value = fused[..., :-1, :], fused[..., -1, :]  # queries and keys, before their rotation
    if rotation is not None:
        cos, sin = (each[:, :, None, None] for each in rotation)  # (B, T, 1, 1, D)
        rotated = rotated * cos + rotate_half(rotated) * sin
    query, key = rotated[..., :-1, :].flatten(2, 3), rotated[..., -1, :]
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class FalconRotaryEmbedding(stock.FalconRotaryEmbedding):
    """transformers' rotary embedding, whose frequencies stay in float32 after `model.to(dtype)` and `half()`."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, exact in before.items():
            rounded = self._buffers[name]
            if exact is not None and rounded is not None and rounded.dtype != exact.dtype:
                self._buffers[name] = exact.to(rounded.device)
        return self


class FalconMLP(nn.Module):
    """The MLP with GELU; `intermediate_size` is 4 x d_model."""

    def __init__(self, config: FalconConfig, spec: FalconSpec) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(spec.d_model, spec.intermediate_size, bias=spec.bias)
        self.act = get_activation(config.activation)
        self.dense_4h_to_h = nn.Linear(spec.intermediate_size, spec.d_model, bias=spec.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(hidden_states)))


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose output has the dtype of its input.

    CUDA's autocast returns float32, and quantised layers the dtype of their input: in QLoRA all hidden states after the
    first LayerNorm would have 32 bits, twice the memory, and torch's kernel for packed documents takes 16.
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(input.dtype)


class FalconDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, in parallel (40B: one LayerNorm each, 7B: one for both) or one after the other (rw)."""

    def __init__(self, config: FalconConfig, spec: FalconSpec, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.parallel = spec.parallel_block
        self.self_attention = FalconAttention(config, spec, layer_idx)
        self.mlp = FalconMLP(config, spec)
        self.block_output = nn.Identity()  # tensor parallelism hooks its all-reduce here, see PARALLEL_BLOCK_TP_PLAN
        pair = ("ln_attn", "ln_mlp") if spec.parallel_block else ("input_layernorm", "post_attention_layernorm")
        self.norms = pair if spec.norms_per_block == 2 else ("input_layernorm",)  # the names in the checkpoint
        for name in self.norms:
            self.add_module(name, LayerNorm(spec.d_model, eps=cast(float, config.layer_norm_epsilon)))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Hidden states (B, T, d_model) after the layer; `kwargs` are those of `FalconAttention.forward`."""
        before_attention, before_mlp = getattr(self, self.norms[0]), getattr(self, self.norms[-1])
        normed = before_attention(hidden_states)
        attention, _ = self.self_attention(normed, **kwargs)
        if self.parallel:
            mlp_input = normed if before_mlp is before_attention else before_mlp(hidden_states)
            output = self.block_output(self.mlp(mlp_input) + attention)
            return hidden_states + self._drop(output, self.config.hidden_dropout)
        hidden_states = hidden_states + self._drop(attention, self.config.attention_dropout)
        return hidden_states + self._drop(self.mlp(before_mlp(hidden_states)), self.config.hidden_dropout)

    def _drop(self, hidden_states: Tensor, p: float | None) -> Tensor:
        return dropout(hidden_states, p, self.training) if p else hidden_states
