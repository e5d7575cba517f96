"""Refuses masks, caches and positions that would compute something else than asked."""

from typing import Any

from torch import Tensor
from transformers import Cache, FalconConfig

from falcon_kit.catalogue.spec import FalconSpec


def check_backend(backend: str, probabilities: bool, alibi: bool, packed_batch: bool) -> None:
    """Refuses what flash-attention and the like cannot do, where transformers would compute something else."""
    wanted = {
        "attention probabilities": probabilities,
        "ALiBi": alibi,
        "packed documents in more than one row": packed_batch,
    }
    if missing := [what for what, asked in wanted.items() if asked]:
        raise ValueError(
            f"{backend} attention has no {' and no '.join(missing)}: call model.set_attn_implementation('sdpa') first"
        )


def context_limit(config: FalconConfig) -> int | None:
    """Positions the model knows; None for rotary embeddings that are scaled to reach further."""
    scaled = not config.alibi and (config.rope_parameters or {}).get("rope_type", "default") != "default"
    return None if scaled else config.max_position_embeddings


def check_cache(spec: FalconSpec, kept: int, batch: int, past: Cache | None) -> None:
    """A cache that another model filled, or transformers' own Falcon, does not fit."""
    keys = getattr(past.layers[0], "keys", None) if past is not None and past.layers else None
    if not isinstance(keys, Tensor) or keys.ndim != 4:
        return
    rows, heads, _, width = keys.shape
    if (heads, width) != (kept, spec.head_dim):
        raise ValueError(
            f"the cache holds {heads} heads of {width} per layer, this model keeps {kept} KV heads of "
            f"{spec.head_dim}: another model or transformers' own Falcon filled it, so start with an empty one; "
            f"PEFT's prefix tuning needs num_attention_heads={kept}, token_dim={kept * spec.head_dim}"
        )
    if rows != batch:
        raise ValueError(
            f"the cache holds {rows} rows, but {batch} are given: continue as many rows as it was filled with"
        )


def check_mask(spec: FalconSpec, hidden_states: Tensor, past: Cache | None, mask: Any) -> None:
    """A mask says something about every token there is, or about every pair of a query and a key."""
    batch, time = hidden_states.shape[:2]
    seen = _seen(past)
    if not isinstance(mask, Tensor) or seen is None:
        return
    keys = time if past is None else past.get_mask_sizes(time, 0)[0]
    fits = mask.shape == (batch, seen + time)
    if mask.ndim == 4:
        fits = mask.shape[0] in (1, batch) and mask.shape[1] in (1, spec.query_heads) and mask.shape[2:] == (time, keys)
    if not fits:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but {batch} rows of {time} tokens after {seen} in the "
            f"cache need {(batch, seen + time)}, or {(batch, 1, time, keys)}"
        )


def check_positions(config: FalconConfig, hidden_states: Tensor, past: Cache | None, positions: Tensor | None) -> None:
    """Positions beyond the context were never trained."""
    limit, seen = context_limit(config), _seen(past)
    if limit is None or seen is None or seen + hidden_states.shape[1] <= limit:
        return
    last = seen + hidden_states.shape[1] if positions is None else int(positions.max()) + 1
    if last > limit:
        raise ValueError(
            f"{last} positions are more than the context of {limit} that the model was trained with, beyond which text "
            "turns into gibberish (huggingface/transformers#25878): give less, pack documents with positions that "
            "start again, or set config.max_position_embeddings to go further all the same"
        )


def _seen(past: Cache | None) -> int | None:
    """Tokens in the cache; None for a static one, which keeps count on its device: to read it would hold up a GPU."""
    seen: Any = 0 if past is None else past.get_seq_length()
    return None if isinstance(seen, Tensor) else seen
