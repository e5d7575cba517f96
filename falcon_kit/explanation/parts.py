"""What the view shows, as JSON: a part for the text, one for each layer and position, one for each head of it.

The widget sends a part when the browser asks for it; a page without a kernel holds the parts of the chosen layers.
Arrays are base64 of float32, little-endian.
"""

import inspect
import json
import math
from base64 import b64encode
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.falcon import modeling_falcon as stock

from falcon_kit.catalogue.memory import layer_kv_bytes
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.explanation.record import NORMS, SHOWN, Heads, LayerRecord
from falcon_kit.explanation.route import attention_rows
from falcon_kit.generation.sampling import Sampling
from falcon_kit.inspection.hooks import InspectedModel
from falcon_kit.inspection.plots.attention import pool
from falcon_kit.inspection.probabilities import attention_scores
from falcon_kit.model import layers, modeling
from falcon_kit.model.attention import fused_attention

NAMED = 50
"""Next tokens that are sent with their text."""
_SIDE = 64
"""Cells on a side of a head's map; the map of a longer text is max-pooled."""
_PACKAGE = Path(__file__).parents[1]

Part = dict[str, Any]


def text_part(inspected: InspectedModel, ids: list[int], logits: Tensor) -> Part:
    """The text, the model's shape, and the logits (V,) of the next token."""
    spec = inspected.spec
    # The angle in radians per token by which the rotary embedding turns each pair of components.
    frequencies = None if spec.positions == "alibi" else inspected.decoder.rotary_emb.inv_freq.float().tolist()
    best = logits.topk(min(NAMED, len(logits))).indices.tolist()
    return {
        "model": spec.name,
        "tokens": [{"id": id, "text": text} for id, text in zip(ids, inspected.token_texts(ids), strict=True)],
        "spec": {name: getattr(spec, name) for name in _SPEC},
        "frequencies": frequencies,
        "cache": _cache(inspected),
        "logits": packed(logits),
        "named": [{"id": id, "text": text} for id, text in zip(best, inspected.token_texts(best), strict=True)],
        "norms": [name for name in NORMS if hasattr(inspected.layers[0], name)],
        "code": _code(),
    }


_SPEC = (
    *("layers", "d_model", "query_heads", "kv_heads", "queries_per_kv_head", "head_dim", "intermediate_size"),
    *("vocabulary", "context", "parallel_block", "norms_per_block", "positions", "tied_head", "layout"),
)


def layer_part(found: LayerRecord, position: int) -> Part:
    """What a layer computed for the token at a position; of its heads the attention probabilities (H, position + 1)."""
    vectors = {
        name: {
            "first": packed(each.first[position]),
            **{fact: float(getattr(each, fact)[position]) for fact in ("mean", "deviation", "norm")},
        }
        for name, each in found.vectors.items()
    }
    return {
        "vectors": vectors,
        "probabilities": packed(_scores(found, position).softmax(-1)),
        "neurons": found.neurons[position].tolist(),
        "activations": found.activations[position].tolist(),
        "active": float(found.active[position]),
    }


def head_part(found: LayerRecord, position: int, head: int, key: int | None) -> Part:
    """One head at a position: its query, the key of one token, scores, output and map.

    key: the position of that token; None for the earlier token that the head attends to most.
    """
    heads, group = found.heads, head * len(found.heads.key) // len(found.heads.query)
    scores = _scores(found, position)[head]
    probabilities = scores.softmax(-1)
    if key is None:
        key = int(probabilities[:-1].argmax()) if position else 0
    values = heads.value[group, : position + 1]
    return {
        "group": group,
        "query": packed(heads.query[head, position]),
        "query_before": packed(found.query_before[head, position]),
        "key_position": key,
        "key": packed(heads.key[group, key]),
        "key_before": packed(found.key_before[group, key]),
        "scores": packed(scores),
        "output": packed(probabilities @ values),
        "values": packed(values.norm(dim=-1)),
        "map": packed(_map(found, head, group)),
    }


def _scores(found: LayerRecord, position: int) -> Tensor:
    """The scores (H, position + 1) of the query at a position and the keys that it may attend to."""
    query, key = found.heads.query[:, position, None], found.heads.key[:, : position + 1]
    return attention_scores(query, key, found.bias)[:, 0]


def _map(found: LayerRecord, head: int, group: int) -> Tensor:
    """The attention probabilities of a head for the whole text, max-pooled to at most 64 x 64.

    Only the lower triangle, row by row: all values above the diagonal are zero.
    """
    heads, bias = found.heads, found.bias
    one = Heads(heads.query[head, None], heads.key[group, None], heads.value[group, None])
    rows = attention_rows(one, None if bias is None else bias[head, None], 0, heads.query.shape[1])
    cells = pool(rows[0].numpy(), _SIDE)
    return torch.from_numpy(cells[np.tril_indices(len(cells))])


def text_part_bytes(inspected: InspectedModel, ids: list[int]) -> int:
    """About the bytes of a text's part in a page, known before the model runs: at least as many as it takes."""
    texts = len(json.dumps(inspected.token_texts(ids)))
    return _packed_bytes(inspected.spec.vocabulary) + 40 * (len(ids) + NAMED) + texts + 5000


def layer_part_bytes(spec: FalconSpec, time: int) -> int:
    """The same for a layer's part and those of its heads, at the last of `time` tokens."""
    side = math.ceil(time / math.ceil(time / _SIDE))
    head = 5 * _packed_bytes(spec.head_dim) + 2 * _packed_bytes(time) + _packed_bytes(side * (side + 1) // 2) + 250
    vectors = (4 + spec.norms_per_block) * (_packed_bytes(SHOWN) + 150)
    return spec.query_heads * head + _packed_bytes(spec.query_heads * time) + vectors + 1000


def _packed_bytes(numbers: int) -> int:
    """Bytes of an array of `packed` numbers as JSON."""
    return 4 * math.ceil(4 * numbers / 3) + 40


def packed(values: Tensor) -> Part:
    """An array as base64 of float32, with its shape."""
    array = values.detach().cpu().numpy().astype("<f4")
    return {"shape": list(array.shape), "f32": b64encode(np.ascontiguousarray(array).tobytes()).decode()}


def _cache(inspected: InspectedModel) -> Part:
    """Bytes of the KV cache for one token in all layers: grouped, and as transformers' own Falcon caches them."""
    dtype = str(inspected.decoder.ln_f.weight.dtype).removeprefix("torch.")
    sizes = {name: layer_kv_bytes(inspected.spec, dtype, 1, 1, name) for name in ("grouped", "transformers")}
    return {"dtype": dtype, **{name: size * inspected.spec.layers for name, size in sizes.items()}}


@cache
def _code() -> dict[str, str]:
    """The place in the code that computes each stage: file and first line."""
    places: dict[str, Callable[..., Any]] = {
        "embedding": modeling.FalconModel.forward,
        "norms": layers.FalconDecoderLayer.forward,
        "projection": layers.split_heads,
        "rotary": stock.rotate_half,
        "attention": fused_attention,
        "mlp": layers.FalconMLP.forward,
        "residual": layers.FalconDecoderLayer.forward,
        "prediction": modeling.FalconForCausalLM.forward,
        "sampling": Sampling.generate_arguments,
        "cache": layers.FalconAttention.forward,
    }
    return {stage: _place(function) for stage, function in places.items()}


def _place(function: Callable[..., Any]) -> str:
    """ "falcon_kit/model/layers.py, line 96", or the same in transformers."""
    source = inspect.unwrap(function)
    file, line = Path(inspect.getsourcefile(source) or ""), inspect.getsourcelines(source)[1]
    root = _PACKAGE if file.is_relative_to(_PACKAGE) else Path(stock.__file__).parents[2]
    return f"{root.name}/{file.relative_to(root).as_posix()}, line {line}"
