"""Falcon with a truly grouped KV cache: a subclass of transformers' Falcon, on the same checkpoints.

What transformers 5.23 does and this does not:

- it copies keys and values to every query head before it caches them: 16 times the cache for Falcon-40B, 29 for 180B;
- it lets documents that are packed into one row look at each other;
- it builds a mask even where none is needed;
- its linear layers are of a class of their own, which quantisers pass over;
- its attention probabilities, asked for beside fused attention, look into the future;
- it adds ALiBi twice in eager attention, and fails with ALiBi in a static cache.

Each is held against the unmended library in `tests/test_modeling.py`. One difference is none of its faults: here
`attention_dropout` acts in every layout, there only with ALiBi. The classes keep transformers' names, so that a saved
checkpoint is a plain Falcon.

Shapes: B batch, T time (queries), K time (keys), H query heads, V vocabulary.
"""

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import Cache, DynamicCache, FalconConfig
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.masking_utils import (
    create_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.falcon import modeling_falcon as stock
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from falcon_kit.catalogue.memory import check_tensor_parallel
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.model import attention
from falcon_kit.model.attention import alibi
from falcon_kit.model.checks import check_backend, check_cache, check_mask, check_positions, context_limit
from falcon_kit.model.layers import FalconAttention, FalconDecoderLayer
from falcon_kit.model.losses import language_model_loss
from falcon_kit.model.tensor_parallel import PARALLEL_BLOCK_TP_PLAN, STYLES


class FalconModel(stock.FalconModel):
    """The decoder without its head."""

    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012  # as transformers declares it
    _can_record_outputs = {"hidden_states": FalconDecoderLayer, "attentions": FalconAttention}  # noqa: RUF012
    # Tensor parallelism, in transformers' words. Rows of the fused projection hold whole groups of heads.
    _tp_plan = {  # noqa: RUF012
        "word_embeddings": "embedding_rowwise",
        "h.*.self_attention.query_key_value": "colwise",
        "h.*.self_attention.dense": "rowwise",
        "h.*.mlp.dense_h_to_4h": "colwise",
        "h.*.mlp.dense_4h_to_h": "rowwise",
    }

    ranks: DeviceMesh | None = None
    """The ranks of tensor parallelism that hold this model together; None where it is whole."""

    def __init__(self, config: FalconConfig) -> None:
        stock.FalconPreTrainedModel.__init__(self, config)  # not super(), which would build transformers' layers first
        self.spec = spec = FalconSpec.from_config(config.to_dict(), "FalconConfig")
        self.word_embeddings = nn.Embedding(spec.vocabulary, spec.d_model)
        self.h = nn.ModuleList(FalconDecoderLayer(config, spec, index) for index in range(spec.layers))
        self.ln_f = nn.LayerNorm(spec.d_model, eps=cast(float, config.layer_norm_epsilon))
        self.rotary_emb = stock.FalconRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()
        if spec.parallel_block and not spec.bias:
            self._tp_plan |= PARALLEL_BLOCK_TP_PLAN

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, d_model) after the last LayerNorm, of `input_ids` (B, T) or `inputs_embeds` instead.

        `attention_mask`: (B, time seen + T), 0 where there is padding; or (B, 1, T, K), True where a query may look, or
        numbers to add to the scores (with ALiBi: 0, or far below). `position_ids` (B, T) that start again within a row,
        given without a cache, mean packed documents: they do not see each other.
        Raises ValueError for a mask or a cache of another shape, and for rows longer than the context, unless
        `position_ids` stay within it. Nothing is checked while compiled or with a static cache: it would hold up a GPU.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if input_ids is not None and input_ids.ndim != 2:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}, not (rows, tokens): for one text give [ids]"
            )
        hidden_states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if not torch.compiler.is_compiling():
            kept = self.spec.kv_heads // (1 if self.ranks is None else self.ranks.size())
            check_cache(self.spec, kept, len(hidden_states), past_key_values)
            check_mask(self.spec, hidden_states, past_key_values, attention_mask)
            check_positions(self.config, hidden_states, past_key_values, position_ids)
        whole = kwargs["output_attentions"] = bool(kwargs.get("output_attentions", self.config.output_attentions))
        mask = self._mask(hidden_states, past_key_values, attention_mask, position_ids, whole)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen)[None]
        rotation = None if self.config.alibi else self.rotary_emb(hidden_states, position_ids)
        for layer in self.h:
            hidden_states = layer(
                hidden_states,
                rotation=rotation,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden_states), past_key_values=past_key_values)

    def _mask(
        self,
        hidden_states: Tensor,
        past: Cache | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        whole: bool,
    ) -> Tensor | None:
        """What attention needs to know beyond "causal", (B, 1 or H, T, K); None for nothing, unless `whole`."""
        documents = None
        if past is None and position_ids is not None:
            documents = find_packed_sequence_indices(position_ids.expand(len(hidden_states), -1))  # (B, T)
        if (backend := self.config._attn_implementation) not in attention.ATTENTION:
            check_backend(backend, whole, bool(self.config.alibi), documents is not None and len(hidden_states) > 1)
        mask: Any = create_causal_mask(
            self.config,
            hidden_states,
            attention_mask,
            past,
            and_mask_function=None if documents is None else packed_sequence_mask_function(documents),
            allow_is_causal_skip=not (whole or self.config.alibi),
        )
        if self.ranks is not None and isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] > 1:
            mask = mask[:, self._heads]  # a mask for each head
        if not self.config.alibi:
            return mask
        # Masks of eager attention are to be added: 0, or the least number there is.
        visible = mask if mask.dtype == torch.bool else mask > -1
        return self._alibi(visible, None if documents is None else position_ids, hidden_states.dtype)

    @property
    def _heads(self) -> slice:
        """The query heads that are computed here: all, or this rank's."""
        if self.ranks is None:
            return slice(None)
        share = self.spec.query_heads // self.ranks.size()
        first = self.ranks.get_local_rank() * share
        return slice(first, first + share)

    def _alibi(self, visible: Tensor, positions: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The bias (B, H, T, K) of ALiBi where `visible` (B, 1, T, K) lets a query look.

        Only distances matter, so a key's place among those that some query of its row sees will do.
        """
        if positions is None:
            positions = (visible.any(dim=-2).cumsum(dim=-1) - 1).clamp(min=0)[:, 0]  # (B, K)
        bias = alibi(self.spec, positions, dtype)[:, self._heads, None]
        return torch.where(visible, bias, torch.finfo(dtype).min)


class FalconForCausalLM(stock.FalconForCausalLM):
    """Falcon with its language-modelling head; everything else about it is transformers' own."""

    transformer: FalconModel
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    single_rows_without_onednn = False
    """On a CPU, compute steps of one row with torch's own kernels (see `attention.py`); `fk.load` decides."""

    def __init__(self, config: FalconConfig) -> None:
        stock.FalconPreTrainedModel.__init__(self, config)  # not super(), which would build transformers' layers first
        self.transformer = FalconModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), or of the last `logits_to_keep` tokens, and the loss where `labels` (B, T) are given.

        `skip_logits`: only the loss, for which logits are never whole in memory (see `falcon_kit.model.losses`).
        Other arguments as for `FalconModel`, which raises the errors.
        """
        with self._kernels(input_ids if inputs_embeds is None else inputs_embeds[..., 0]):
            outputs = self.transformer(
                input_ids=input_ids,
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                return_dict=True,
                **kwargs,
            )
            hidden_states = outputs.last_hidden_state
            if skip_logits and labels is not None:
                count = kwargs.get("num_items_in_batch")
                return CausalLMOutputWithPast(loss=language_model_loss(self.lm_head, hidden_states, labels, count))
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, distributed_config: Any, mesh_manager: Any) -> nn.Module:
        """transformers' own, once it is sure that the heads can be dealt out; the model then knows its rank."""
        if mesh_manager is not None and distributed_config.tp_size > 1:
            decoder = cast(FalconModel, model.get_submodule("transformer"))
            check_tensor_parallel(decoder.spec, distributed_config.tp_size)
            decoder.ranks = mesh_manager.get_mesh("tp")
            for name, style in STYLES.items():
                ALL_PARALLEL_STYLES[name] = style
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def gather_sharded_state_dict_for_save(
        self, model_to_save: Any, state_dict: dict[str, Any], *arguments: Any, **more: Any
    ) -> dict[str, Any]:
        """transformers' own, which would gather a tied head beside the embedding, and store both."""
        tied = set(self._tied_weights_keys or ()) if self.config.tie_word_embeddings else set()
        once = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        parallel = self.transformer.ranks is not None
        return super().gather_sharded_state_dict_for_save(
            model_to_save, once if parallel else state_dict, *arguments, **more
        )

    def _kernels(self, tokens: Tensor | None) -> Any:
        if not self.single_rows_without_onednn or torch.compiler.is_compiling():
            return nullcontext()
        weight = self.lm_head.weight  # it may have been moved since it was loaded
        fitting = weight.device.type == "cpu" and weight.dtype.itemsize == 2
        return attention.without_onednn() if fitting and tokens is not None and tokens.numel() == 1 else nullcontext()

    def _get_static_cache_init_shape(self) -> None:
        """Chunked prefill would size a static cache by query heads before anything is in it: it waits for the first."""

    def _prepare_generated_length(self, **arguments: Any) -> Any:  # type: ignore[override]  # called by keyword
        """Refuses beforehand what would run past the context: there the text so far would be lost."""
        config = super()._prepare_generated_length(**arguments)  # type: ignore[misc]  # its self is misdeclared
        prompt, limit = arguments["inputs_tensor"].shape[1], context_limit(self.config)
        new = config.max_length - arguments["input_ids_length"]
        if limit is not None and prompt + new > limit:
            raise ValueError(
                f"{prompt} tokens and up to {new} new ones are more than the context of {limit}: shorten the prompt, "
                f"or ask for at most {max(0, limit - prompt)} new tokens"
            )
        return config
