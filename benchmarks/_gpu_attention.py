"""Forms of the attention of one new token over a static cache, each timed by itself: which kernel to use for decoding.

The forms compute the same, over the filled slots of a cache: keys (B, G, slots, D), of which the first `context` are
visible. Shapes: B batch, G KV heads, R query heads per KV head, D head_dim, K slots or keys.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import full_size
from benchmarks.gpu import Settings, attempted, relative_error
from falcon_kit import FalconSpec
from falcon_kit.model.attention import masked_products
from falcon_kit.model.static_cache import slots_read

Step = tuple[Tensor, Tensor, Tensor, Tensor]
"""Queries (B, G, R, D), keys and values (B, G, K, D), and which keys are visible (B, 1, 1, K)."""
Figures = dict[str, Any]
_PARTS = 16
_DISTINCT = 128e6
"""Bytes that are read in turn, so that none of them is still in a GPU's cache."""


def masked(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Fused attention with a mask."""
    return scaled_dot_product_attention(query, key, value, attn_mask=visible)


def unmasked(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, filled: int) -> Tensor:
    """Fused attention over the filled slots, whose number the host has to have: not for a CUDA graph."""
    return scaled_dot_product_attention(query, key[:, :, :filled], value[:, :, :filled])


def products(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Two products and a softmax, as the kit on a GPU."""
    return masked_products(query, key, value, visible, query.shape[-1] ** -0.5)


def repeated(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Keys and values repeated for every query head, as in transformers with a mask."""
    batch, _, heads, width = query.shape
    key, value = (each.repeat_interleave(heads, dim=1) for each in (key, value))
    query = query.reshape(batch, -1, 1, width)
    return scaled_dot_product_attention(query, key, value, attn_mask=visible).reshape(batch, -1, heads, width)


def in_parts(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Fused attention with a mask over parts of the keys, which more processors read, and the weighted mean of these.

    The weight of a part is the sum of its exponentials, of which the kernel returns the logarithm.
    """
    (batch, groups, heads, width), parts = query.shape, _PARTS
    key, value = (each.reshape(batch, groups * parts, -1, width) for each in (key, value))
    query = query[:, :, None].expand(-1, -1, parts, -1, -1).flatten(1, 2)
    bias = torch.where(visible, 0.0, torch.finfo(query.dtype).min / 2).to(query.dtype)
    bias = bias.view(batch, 1, parts, 1, -1).expand(-1, groups, -1, heads, -1).flatten(1, 2)
    if query.device.type == "cuda":
        results = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)
    else:
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias)
    part, logarithm = results[0].unflatten(1, (groups, parts)), results[1][..., :heads].float()
    weight = logarithm.unflatten(1, (groups, parts)).softmax(dim=2)[..., None]
    return (part * weight).sum(dim=2).to(query.dtype)


def forms(settings: Settings) -> dict[str, Callable[..., Tensor]]:
    """The forms by name; the first is what the others are compared with."""

    def compiled(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
        backend = settings.compiled["kit"].backend
        return torch.compile(form, fullgraph=True, dynamic=False, backend=backend)

    eager = {
        "two products": products,
        "fused, mask": masked,
        "fused, no mask": lambda *step: unmasked(*step, settings.context),
        f"fused, mask, {_PARTS} parts": in_parts,
        "fused, mask, keys repeated": repeated,
    }
    if not settings.compiled:
        return eager
    return eager | {
        f"{name}, compiled": compiled(eager[name]) for name in ("two products", f"fused, mask, {_PARTS} parts")
    }


def measure_forms(settings: Settings) -> dict[str, Any]:
    """Each form's time, as a share of the bandwidth and relative to the first, for both shapes at each batch."""
    bandwidth = full_size._bandwidth(settings.device)
    return {
        f"{name}, batch {batch}": _compared(shape, batch, settings, bandwidth)
        for name, shape in (("7B", settings.seven), ("40B", settings.forty))
        for batch in (settings.batches[0], settings.batches[-1])
    }


def _compared(shape: FalconSpec, batch: int, settings: Settings, bandwidth: float) -> dict[str, Any]:
    steps = _steps(shape, batch, settings)
    query, key, value, visible = (each.double() if each.is_floating_point() else each for each in steps[0])
    exact = masked(query, key, value, visible)
    least = 2 * batch * shape.kv_heads * settings.context * shape.head_dim * key.element_size() / 4 / bandwidth
    figures = {
        name: attempted(lambda form=form: _timed(form, steps, exact, least)) for name, form in forms(settings).items()
    }
    torch._dynamo.reset()
    first = next(iter(figures.values())).get("microseconds")
    return {
        name: row | {"time over the first's": round(row["microseconds"] / first, 2)}
        if first and "microseconds" in row
        else row
        for name, row in figures.items()
    }


def _steps(shape: FalconSpec, batch: int, settings: Settings) -> list[Step]:
    """Different steps, so many that their keys and values exceed a GPU's cache."""
    slots = slots_read(settings.context, shape.context)
    size = (batch, shape.kv_heads, slots, shape.head_dim)
    on = {"device": settings.device, "dtype": torch.bfloat16}
    visible = (torch.arange(slots, device=settings.device) < settings.context).expand(batch, 1, 1, slots).contiguous()
    count = distinct(2 * 2 * batch * shape.kv_heads * slots * shape.head_dim, settings.device)
    queries = (batch, shape.kv_heads, shape.queries_per_kv_head, shape.head_dim)
    return [
        (torch.randn(queries, **on), torch.randn(size, **on), torch.randn(size, **on), visible) for _ in range(count)
    ]


def _timed(form: Callable[..., Tensor], steps: list[Step], exact: Tensor, least: float) -> dict[str, Any]:
    """A step's time, and its error relative to float64."""
    with torch.inference_mode():
        error = relative_error(form(*steps[0]), exact)
    return timed(form, steps, least, exact.device) | {"error": error}


def distinct(bytes: int, device: torch.device) -> int:
    """How many tensors of so many bytes are more than a GPU's cache holds; 2 on a CPU."""
    return max(2, math.ceil(_DISTINCT / bytes)) if device.type == "cuda" else 2


def timed(work: Callable[..., Any], calls: Sequence[tuple[Any, ...]], least: float, device: torch.device) -> Figures:
    """The median time of a call, in a CUDA graph of all calls where there are any. least: seconds to read its bytes."""

    def all_calls() -> list[Any]:
        return [work(*each) for each in calls]

    with torch.inference_mode():
        replay = _graph(all_calls) if device.type == "cuda" else all_calls
        seconds = statistics.median(full_size._seconds(replay, device) for _ in range(7)) / len(calls)
    return {"microseconds": round(1e6 * seconds, 2), "share of the bandwidth": round(least / seconds, 3)}


def _graph(work: Callable[[], Any]) -> Callable[[], None]:
    """A function that replays the work from a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    return graph.replay
