"""Falcon with a grouped KV cache: a subclass of transformers' Falcon that loads and saves the same checkpoints.

It fixes these faults of Falcon in transformers 5.23:

- keys and values are copied to every query head before they are cached: 16 times the cache for Falcon-40B, 29 for 180B;
- documents packed into one row attend to each other;
- an attention mask is built even if attention is only causal;
- linear layers are a class of their own, which quantisation libraries do not replace;
- attention probabilities returned beside fused attention include future tokens;
- eager attention adds ALiBi twice, and ALiBi fails with a static cache.

`tests/model/test_faults.py` shows each fault in transformers. Another difference is not a fault: here
`attention_dropout` applies in every layout, in transformers only with ALiBi. The classes have the names that they have
in transformers, so that a saved checkpoint is a plain Falcon.

Shapes: B batch, T time (queries), K time (keys), H query heads, V vocabulary.
"""

from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import Cache, DynamicCache, FalconConfig
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.falcon import modeling_falcon as stock
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from falcon_kit.catalogue.memory import check_tensor_parallel
from falcon_kit.catalogue.spec import FalconSpec, context_limit
from falcon_kit.generation.arguments import CACHE, one_cache
from falcon_kit.model import attention, packed_documents
from falcon_kit.model.attention import alibi
from falcon_kit.model.cache import MakesRoom, with_room
from falcon_kit.model.checks import check_backend, check_cache, check_mask, check_positions
from falcon_kit.model.layers import FalconAttention, FalconDecoderLayer, FalconRotaryEmbedding, LayerNorm
from falcon_kit.model.losses import language_model_loss
from falcon_kit.model.static_cache import ReadsFilledSlots, capture_unless_compiled
from falcon_kit.model.tensor_parallel import PARALLEL_BLOCK_TP_PLAN, PARALLEL_STYLES


class _KVHeads(int):
    """`config.num_key_value_heads`, by which PEFT and others size caches. `FalconConfig` lacks it.

    `model.save_pretrained` does not save it; `config.save_pretrained` does.
    """


def is_elsewhere(weight: Tensor, values: Tensor) -> bool:
    """Whether values are on another device than a weight; False for an offloaded weight, which accelerate copies."""
    return weight.device != values.device and not weight.is_meta


def on_device_of(weight: Tensor, values: Tensor) -> Tensor:
    """The values on the device of a weight."""
    return values.to(weight.device) if is_elsewhere(weight, values) else values


class _Declared:
    """What both classes tell transformers, whatever it has found and cached for its own Falcon."""

    _supports_attention_backend = True
    _skip_keys_device_placement: Any = ["cache", "past_key_values", "layer_past"]  # noqa: RUF012  # as in transformers

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True


class FalconModel(_Declared, stock.FalconModel):
    """The decoder without the language-modelling head."""

    _can_record_outputs = {"hidden_states": FalconDecoderLayer, "attentions": FalconAttention}  # noqa: RUF012
    # The fused projection is split by rows, so that each rank has whole groups of heads.
    _tp_plan = {  # noqa: RUF012
        "word_embeddings": "embedding_rowwise",
        "h.*.self_attention.query_key_value": "colwise",
        "h.*.self_attention.dense": "rowwise",
        "h.*.mlp.dense_h_to_4h": "colwise",
        "h.*.mlp.dense_4h_to_h": "rowwise",
    }

    tp_mesh: DeviceMesh | None = None
    """The device mesh of tensor parallelism; None if the model is not split."""

    def __init__(self, config: FalconConfig) -> None:
        stock.FalconPreTrainedModel.__init__(self, config)  # not super(), which would build transformers' layers first
        self.spec = spec = FalconSpec.from_config(config.to_dict(), "FalconConfig")
        if not hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = _KVHeads(spec.kv_heads)
        self.word_embeddings = nn.Embedding(spec.vocabulary, spec.d_model)
        self.h = nn.ModuleList(FalconDecoderLayer(config, spec, index) for index in range(spec.layers))
        self.ln_f = LayerNorm(spec.d_model, eps=cast(float, config.layer_norm_epsilon))
        self.rotary_emb = FalconRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()
        if spec.parallel_block and not spec.bias:
            self._tp_plan |= PARALLEL_BLOCK_TP_PLAN

    @merge_with_config_defaults
    @capture_unless_compiled
    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, d_model) after the last LayerNorm, for `input_ids` (B, T) or `inputs_embeds`.

        `attention_mask`: (B, cached tokens + T), 0 for padding; or (B, 1, T, K), boolean (True: attend) or added to the
        scores (with ALiBi: 0 or a large negative number). Without a cache, `position_ids` (B, T) that start again
        within a row separate packed documents, which do not attend to each other.
        Raises ValueError for a mask or a cache of another shape, and for positions beyond the context. Compiled code
        and static caches are not checked, which would synchronise the GPU.
        """
        cache = one_cache(cache, past_key_values)
        hidden_states = self._embed(input_ids, inputs_embeds)
        attention_mask, position_ids = send_to_device((attention_mask, position_ids), hidden_states.device)
        if not torch.compiler.is_compiling():
            self._check_inputs(hidden_states, cache, attention_mask, position_ids)
        probabilities = bool(kwargs.get("output_attentions", self.config.output_attentions))
        kwargs["output_attentions"] = probabilities
        mask, unseeing = self._mask(hidden_states, cache, attention_mask, position_ids, probabilities)
        if use_cache and cache is None:
            cache = with_room(DynamicCache(config=self.config))
        if position_ids is None:
            cached = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + cached)[None]
        rotation = None if self.config.alibi else self.rotary_emb(hidden_states, position_ids)
        shared = {
            "rotation": rotation,
            "attention_mask": mask,
            "unseeing_queries": unseeing,
            "position_ids": position_ids,
        }
        layer: Any
        for layer in self.h:
            if is_elsewhere(weight := getattr(layer, layer.norms[0]).weight, hidden_states):
                hidden_states, shared = send_to_device((hidden_states, shared), weight.device)
            hidden_states = layer(hidden_states, layer_past=cache, **shared, **kwargs)
        normed = self.ln_f(on_device_of(self.ln_f.weight, hidden_states))
        past: Any = {CACHE: cache}
        return BaseModelOutputWithPast(last_hidden_state=normed, **past)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The embeddings (B, T, d_model) of the input. Raises ValueError unless exactly one input is given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if input_ids is not None and input_ids.ndim != 2:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}, not (rows, tokens): for one text give [ids]"
            )
        if input_ids is None:
            return cast(Tensor, inputs_embeds)
        return self.word_embeddings(on_device_of(self.word_embeddings.weight, input_ids))

    def _check_inputs(
        self, hidden_states: Tensor, past: Cache | None, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> None:
        kv_heads = self.spec.kv_heads // (1 if self.tp_mesh is None else self.tp_mesh.size())
        check_cache(self.spec, kv_heads, len(hidden_states), past)
        check_mask(self.spec, hidden_states, past, attention_mask)
        check_positions(self.config, hidden_states, past, position_ids)

    def _mask(
        self,
        hidden_states: Tensor,
        past: Cache | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        probabilities: bool,
    ) -> tuple[Tensor | packed_documents.Documents | None, Tensor | None]:
        """The attention mask (B, 1 or H, T, K), None if attention is only causal and returns no probabilities, the
        documents where a kernel takes them; and with ALiBi the queries that see no key (B, 1, T, 1)."""
        documents = None
        if past is None and position_ids is not None:
            documents = packed_documents.document_numbers(position_ids.expand(len(hidden_states), -1))
        if (backend := self.config._attn_implementation) not in attention.ATTENTION:
            check_backend(
                backend, probabilities, bool(self.config.alibi), documents is not None and len(hidden_states) > 1
            )
        plain = not (probabilities or self.config.alibi)
        unmasked = plain and attention_mask is None and not (self.training and self.config.attention_dropout)
        if documents is not None and unmasked and backend == "sdpa" and packed_documents.has_kernel(hidden_states):
            return packed_documents.find_documents(documents), None
        mask: Any = create_causal_mask(
            self.config,
            hidden_states,
            attention_mask,
            past,
            and_mask_function=None if documents is None else packed_sequence_mask_function(documents),
            allow_is_causal_skip=plain,
        )
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] > 1:  # a mask per query head
            mask = mask[:, self._heads]
        if not self.config.alibi:
            return mask, None
        # A mask that is added to the scores is 0 for visible keys and a large negative number for others.
        visible = mask if mask.dtype == torch.bool else mask > -1
        return self._alibi(visible, None if documents is None else position_ids, hidden_states.dtype)

    @property
    def _heads(self) -> slice:
        """The query heads of this rank."""
        if self.tp_mesh is None:
            return slice(None)
        count = self.spec.query_heads // self.tp_mesh.size()
        first = self.tp_mesh.get_local_rank() * count
        return slice(first, first + count)

    def _alibi(self, visible: Tensor, positions: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The ALiBi bias (B, H, T, K), masked where `visible` (B, 1, T, K) is False; and the queries that see no key.

        Those, of padding, attend to all keys equally, as in transformers. Their bias is 0 and their query is set to 0:
        fused attention over equal least numbers has gradients that are too large by the number of keys.
        `positions` (B, K) may have any offset, since only distances matter. By default, they count the keys that some
        query of their row attends to.
        """
        if positions is None:
            positions = (visible.any(dim=-2).cumsum(dim=-1) - 1).clamp(min=0)[:, 0]  # (B, K)
        bias = alibi(self.spec, positions, dtype)[:, self._heads, None]
        unseeing = ~visible.any(dim=-1, keepdim=True)  # (B, 1, T, 1)
        return torch.where(visible, bias, torch.finfo(dtype).min).masked_fill(unseeing, 0), unseeing


class FalconForCausalLM(_Declared, ReadsFilledSlots, MakesRoom, stock.FalconForCausalLM):
    """Falcon with its language-modelling head. All methods that are not here are those of transformers."""

    transformer: FalconModel
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    single_rows_without_onednn = False
    """Whether a CPU computes steps of one row without oneDNN, see `products.py`; `fk.load` measures and sets it."""

    def __init__(self, config: FalconConfig) -> None:
        stock.FalconPreTrainedModel.__init__(self, config)  # not super(), which would build transformers' layers first
        self.transformer = FalconModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) of all or the last `logits_to_keep` tokens, and the loss if `labels` (B, T) are given.

        `skip_logits`: returns only the loss and computes it in chunks, see `falcon_kit.model.losses`. Other arguments
        and errors are those of `FalconModel.forward`.
        """
        cache = one_cache(cache, past_key_values)
        tokens = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        largest = self.transformer.spec.d_model * self.transformer.spec.intermediate_size
        single = self.single_rows_without_onednn
        with attention.step_kernels(self.lm_head.weight, tokens, cache, single, largest):
            outputs = self.transformer(
                input_ids=input_ids,
                cache=cache,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                return_dict=True,
                **kwargs,
            )
            hidden_states = on_device_of(self.lm_head.weight, outputs.last_hidden_state)
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
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:
        """As in transformers; config.json has the fields of transformers' Falcon and no others."""
        fields = vars(self.config)
        added = {name: value for name, value in fields.items() if isinstance(value, _KVHeads)}
        for name in added:
            del fields[name]
        try:
            super().save_pretrained(*arguments, **options)
        finally:
            fields.update(added)

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, distributed_config: Any, mesh_manager: Any) -> nn.Module:
        """As in transformers, after a check that the heads divide among the ranks. Sets `tp_mesh`."""
        if mesh_manager is not None and distributed_config.tp_size > 1:
            decoder = cast(FalconModel, model.get_submodule("transformer"))
            check_tensor_parallel(decoder.spec, distributed_config.tp_size)
            decoder.tp_mesh = mesh_manager.get_mesh("tp")
            for name, style in PARALLEL_STYLES.items():
                ALL_PARALLEL_STYLES[name] = style
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def gather_sharded_state_dict_for_save(
        self, model_to_save: Any, state_dict: dict[str, Any], *arguments: Any, **more: Any
    ) -> dict[str, Any]:
        """As in transformers, but without a tied head, which would be stored beside the embedding."""
        if self.transformer.tp_mesh is not None and self.config.tie_word_embeddings:
            tied = set(self._tied_weights_keys or ())
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        return super().gather_sharded_state_dict_for_save(model_to_save, state_dict, *arguments, **more)

    def _get_static_cache_init_shape(self) -> None:
        """No shape: with one, chunked prefill would allocate a static cache for all query heads."""

    def _prepare_generated_length(self, **arguments: Any) -> Any:  # type: ignore[override]  # called by keyword
        """As in transformers, but raises ValueError beforehand if prompt and new tokens exceed the context."""
        config = super()._prepare_generated_length(**arguments)  # type: ignore[misc]  # its self is misdeclared
        prompt, limit = arguments["inputs_tensor"].shape[1], context_limit(self.config)
        new = config.max_length - arguments["input_ids_length"]
        if prompt + new > limit:
            raise ValueError(
                f"{prompt} tokens and up to {new} new ones are more than the context of {limit}: shorten the prompt, "
                f"or ask for at most {max(0, limit - prompt)} new tokens"
            )
        return config
