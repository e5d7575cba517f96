"""Errors for masks, caches and positions that would silently give a wrong result."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import Cache, FalconConfig

from falcon_kit.catalogue.spec import FalconSpec, context_limit
from falcon_kit.generation.prompts import vocabulary_size


def check_backend(backend: str, probabilities: bool, alibi: bool, packed_batch: bool) -> None:
    """Raises ValueError for features that an attention backend of transformers, such as flash-attention, lacks."""
    requested = {
        "attention probabilities": probabilities,
        "ALiBi": alibi,
        "packed documents in more than one row": packed_batch,
    }
    if missing := [feature for feature, used in requested.items() if used]:
        raise ValueError(
            f"{backend} attention has no {' and no '.join(missing)}: call model.set_attn_implementation('sdpa') first"
        )


def is_offloaded(model: nn.Module) -> bool:
    """Whether a part of a model is in host memory or on disk, from where each step fetches it."""
    return any(each.is_meta for each in model.parameters())


def live_spec(spec: FalconSpec, model: Any) -> FalconSpec:
    """The shape of a model as it is now: `spec` with its layers, the rows of its input embeddings, whether its head is
    the same weight, and the context of its config."""
    return replace(
        spec,
        layers=len(getattr(getattr(model, "transformer", model), "h", ())) or spec.layers,
        vocabulary=vocabulary_size(model),
        context=context_limit(model.config),
        tied_head=has_tied_head(model, spec.tied_head),
    )


def has_tied_head(model: Any, unknown: bool) -> bool:
    """Whether the head of a model is the weight of its embeddings; `unknown` without a head, or where it is offloaded.

    A checkpoint may hold a head of its own although its config ties it.
    """
    parts = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    embedding, head = (getattr(each, "weight", None) for each in parts)
    if not (isinstance(embedding, Tensor) and isinstance(head, Tensor)) or embedding.is_meta or head.is_meta:
        return unknown
    return head is embedding


def check_cache(spec: FalconSpec, kv_heads: int, batch: int, past: Cache | None) -> None:
    """Raises ValueError for a cache of another model, of transformers' own Falcon, or of another batch size.

    `kv_heads`: the KV heads on this rank.
    """
    keys = getattr(past.layers[0], "keys", None) if past is not None and past.layers else None
    if not isinstance(keys, Tensor) or keys.ndim != 4:
        return
    rows, heads, _, width = keys.shape
    if (heads, width) != (kv_heads, spec.head_dim):
        raise ValueError(
            f"the cache holds {heads} heads of {width} per layer, this model caches {kv_heads} KV heads of "
            f"{spec.head_dim}: the cache is from another model or transformers' own Falcon, so start with an empty "
            f"one; PEFT's prefix tuning needs num_attention_heads={kv_heads}, token_dim={kv_heads * spec.head_dim}"
        )
    if rows != batch:
        raise ValueError(f"the cache holds {rows} rows, but {batch} are given: give as many rows as the cache has")


def check_mask(spec: FalconSpec, hidden_states: Tensor, past: Cache | None, mask: Any) -> None:
    """Raises ValueError for a mask that has neither one value per token nor one per query and key."""
    batch, time = hidden_states.shape[:2]
    cached = _cached_tokens(past)
    if not isinstance(mask, Tensor) or cached is None:
        return
    keys = time if past is None else past.get_mask_sizes(time, 0)[0]
    fits = mask.shape == (batch, cached + time)
    if mask.ndim == 4:
        fits = mask.shape[0] in (1, batch) and mask.shape[1] in (1, spec.query_heads) and mask.shape[2] == time
        fits &= cached + time <= mask.shape[3] <= keys
    if not fits:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but {batch} rows of {time} tokens after {cached} in the "
            f"cache need {(batch, cached + time)}, or {(batch, 1, time, keys)}"
        )


def check_positions(config: FalconConfig, hidden_states: Tensor, past: Cache | None, positions: Tensor | None) -> None:
    """Raises ValueError for positions beyond the context that the model was trained with."""
    limit, cached = context_limit(config), _cached_tokens(past)
    if cached is None or cached + hidden_states.shape[1] <= limit:
        return
    last = cached + hidden_states.shape[1] if positions is None else int(positions.max()) + 1
    if last > limit:
        raise ValueError(
            f"{last} positions are more than the context of {limit} that the model was trained with; beyond it, the "
            "generated text is gibberish (huggingface/transformers#25878): give fewer tokens, restart the positions of "
            "each packed document, or set config.max_position_embeddings to use more positions anyway"
        )


def _cached_tokens(past: Cache | None) -> int | None:
    """Tokens in the cache; None for a static cache, whose count is on the GPU: reading it would synchronise."""
    cached: Any = 0 if past is None else past.get_seq_length()
    return None if isinstance(cached, Tensor) else cached
