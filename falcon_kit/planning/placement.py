"""Where each part of a Falcon goes: what a request takes, layer by layer, and the devices that hold it.

Neither torch nor transformers is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from falcon_kit.catalogue import memory
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.planning.devices import Slot

Purpose = Literal["inference", "lora", "qlora", "full", "merge"]
CacheKind = Literal["grouped", "transformers"]

CPU_OVERHEAD, GPU_OVERHEAD = 440 * 2**20, 600 * 2**20
"""Before any weight is there: Python with torch and transformers, held against a process in `tests/test_planning.py`; a
CUDA context with its library workspaces, assumed."""


@dataclass(frozen=True)
class Part:
    """One row of a plan."""

    part: str
    """What it is: "layers 0-14", "KV cache"."""
    device: int | str
    """The key of its slot."""
    bytes: int
    """Its size."""
    reason: str
    """How the size came about."""


@dataclass(frozen=True)
class Request:
    """What is asked for, and the bytes that follow."""

    spec: FalconSpec
    dtype: str
    context: int
    batch: int
    purpose: Purpose
    cache: CacheKind
    rank: int
    ranks: int

    @property
    def _size(self) -> tuple[FalconSpec, str, int, int]:
        return self.spec, self.dtype, self.context, self.batch

    def layer(self) -> dict[str, tuple[int, str]]:
        """What each decoder layer brings along: bytes and reason by part."""
        weights = memory.layer_bytes(self.spec, self.dtype)
        parts = {"weights": (weights, f"{self.spec.layer_parameters:,} parameters a layer in {self.dtype}")}
        adapters = memory.lora_parameters(self.spec, self.rank) // self.spec.layers
        match self.purpose:
            case "inference":
                kept = memory.layer_kv_bytes(*self._size, self.cache)
                copies = "one per query head" if self.cache == "transformers" else f"{self.spec.kv_heads} KV heads"
                parts["KV cache"] = (kept, f"{self.batch} x {self.context} tokens, {copies}")
            case "merge":
                parts["LoRA"] = (4 * adapters, f"rank {self.rank}, float32")
            case "full":
                parts["gradients and Adam"] = (3 * weights, "a gradient and two averages for each weight")
            case _:
                reason = f"rank {self.rank}, float32: weight, gradient and two averages of Adam"
                parts["LoRA"] = (16 * adapters, reason)
        if self.trains:
            kept = memory.checkpoint_bytes(*self._size) // self.spec.layers
            parts["checkpoints"] = (kept, "what came into each layer, kept for the way back")
        return parts

    @property
    def trains(self) -> bool:
        """Whether there is a way back: gradients, and what they need."""
        return self.purpose in ("lora", "qlora", "full")

    def stored_layer(self) -> dict[str, tuple[int, str]]:
        """What a layer leaves where it is only kept: its weights."""
        weights, reason = self.layer()["weights"]
        return {"weights": (weights, f"{reason}, read anew for each token")}

    def offload_overhead(self, away: int) -> dict[str, tuple[int, str]]:
        """What `away` layers that are kept elsewhere take on the device that computes them, one at a time."""
        parts = self.layer()
        weights, _ = parts.pop("weights")
        visiting = {"visiting layer": (weights, "a copy of the one layer that is being computed")}
        return visiting | {name: (away * size, reason) for name, (size, reason) in parts.items()}

    def device(self, slot: Slot) -> dict[str, tuple[int, str]]:
        """What every device holds that computes a layer."""
        if self.purpose == "merge":
            busy, reason = memory.merge_bytes(self.spec), "the largest product of an adapter, and that scaled"
        elif self.trains:
            busy = memory.backward_bytes(*self._size, adapters=self.purpose != "full")
            reason = "one layer computed anew and going backward"
        else:
            busy, reason = memory.prefill_bytes(*self._size), f"the busiest moment of reading {self.context} tokens"
        overhead = (GPU_OVERHEAD, "CUDA context and library workspaces: assumed")
        if slot.key == "cpu":
            overhead = (CPU_OVERHEAD, "Python with torch and transformers")
        workspace = memory.workspace_bytes(*self._size, on_cpu=slot.key == "cpu")
        parts = {"workspace": (workspace, "of bitsandbytes, to multiply many rows")} if workspace else {}
        return {"activations": (busy, reason), **parts, "overhead": overhead}

    def first(self) -> dict[str, tuple[int, str]]:
        """What the first device holds besides: the embedding, which is the head too, and what the head makes."""
        table = memory.embedding_bytes(self.spec, self.dtype)
        parts = {"embedding and head": (table, "tied: one table" if self.spec.tied_head else "two tables")}
        if self.purpose == "full":
            parts["gradients and Adam"] = (3 * table, "a gradient and two averages for each weight")
        if not self.trains:
            parts["logits"] = (memory.logits_bytes(self.spec, self.batch), "scores of the next token")
        else:
            loss = memory.loss_bytes(*self._size)
            parts["loss"] = (
                loss,
                f"logits of {memory.LOSS_CHUNK} tokens at a time over {self.spec.vocabulary:,} words",
            )
        return parts


def _total(parts: Mapping[str, tuple[int, str]]) -> int:
    return sum(size for size, _ in parts.values())


def _room(request: Request, slots: Sequence[Slot], away: int) -> list[int]:
    """Bytes for layers on each device, after what it holds anyway; `away` layers are kept elsewhere."""
    room = [slot.free_bytes - _total(request.device(slot)) for slot in slots]
    room[0] -= _total(request.first()) + memory.last_norm_bytes(request.spec, request.dtype)
    if away:
        room[0] -= _total(request.offload_overhead(away))
    return room


def spread(request: Request, slots: Sequence[Slot]) -> list[int]:
    """Layers on each device, as few as can be where they are only kept; none anywhere if they do not fit."""
    computing = [slot for slot in slots if not slot.offload_target]
    stores, layers = slots[len(computing) :], request.spec.layers
    weights, _ = request.layer()["weights"]
    for away in range(layers + 1) if stores else (0,):
        counts = _balance(request, computing, away)
        places = [min(slot.free_bytes // weights, layers) for slot in stores]
        roomy = _room(request, computing, away)[0] >= 0  # the first device holds the embedding, layers or not
        if roomy and sum(counts) == layers - away and sum(places) >= away:
            return counts + [min(place, max(0, away - sum(places[:at]))) for at, place in enumerate(places)]
    return [0] * len(slots)


def _balance(request: Request, slots: Sequence[Slot], away: int = 0) -> list[int]:
    """Layers on each device, so that the fullest keeps as much room as can be; fewer than there are if they do not fit.

    Layers are all alike, so this is a search for the largest reserve that still leaves places enough.
    """
    layer, room, wanted = _total(request.layer()), _room(request, slots, away), request.spec.layers - away
    if room[0] < 0:
        return [0] * len(slots)

    def places(reserve: int) -> list[int]:
        return [max(0, (free - reserve) // layer) for free in room]

    low, high = 0, max(room)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(places(middle)) >= wanted else (low, middle - 1)
    counts = places(low)
    taken = [index for index, count in enumerate(counts) if count]
    fullest_first = sorted(taken, key=lambda index: room[index] - counts[index] * layer)
    for index in fullest_first[: max(0, sum(counts) - wanted)]:
        counts[index] -= 1  # devices that tie at this reserve: the fullest give one back
    return counts


def split_by_memory(request: Request, slots: Sequence[Slot]) -> list[int]:
    """Layers by memory, whether they fit or not: how a plan that does not fit is shown."""
    total, wanted = max(1, sum(slot.free_bytes for slot in slots)), request.spec.layers
    counts = [wanted * slot.free_bytes // total for slot in slots]
    counts[-1] += wanted - sum(counts)
    return counts


def rows(request: Request, slots: Sequence[Slot], counts: Sequence[int]) -> Iterator[Part]:
    """Every part with its device, size and reason."""
    done, away = 0, sum(count for slot, count in zip(slots, counts, strict=True) if slot.offload_target)
    for index, (slot, count) in enumerate(zip(slots, counts, strict=True)):
        if index == 0:
            yield from _parts(slot, request.first())
            yield from _parts(slot, request.offload_overhead(away) if away else {})
        if count:
            span = f"layers {done}-{done + count - 1}"
            held = request.stored_layer() if slot.offload_target else request.layer()
            yield from _parts(
                slot, {span if name == "weights" else name: each for name, each in held.items()}, times=count
            )
        if index == 0 or (count and not slot.offload_target):
            yield from _parts(slot, request.device(slot))
        done += count
    norm = memory.last_norm_bytes(request.spec, request.dtype)
    yield Part("last LayerNorm", slots[0].key, norm, "before the head")


def _parts(slot: Slot, parts: Mapping[str, tuple[int, str]], times: int = 1) -> Iterator[Part]:
    return (Part(name, slot.key, times * size, reason) for name, (size, reason) in parts.items())


def device_map(slots: Sequence[Slot], counts: Sequence[int]) -> dict[str, int | str]:
    """Where each module goes. The head goes where the embedding is, which it shares its weights with."""
    keys = [slot.key for slot, count in zip(slots, counts, strict=True) for _ in range(count)]
    first = slots[0].key
    names = ("transformer.word_embeddings", "transformer.rotary_emb", "transformer.ln_f", "lm_head")
    return {**dict.fromkeys(names, first), **{f"transformer.h.{index}": key for index, key in enumerate(keys)}}


def within(slots: Sequence[Slot], rows: Sequence[Part]) -> bool:
    """Whether no device holds more than it has."""
    return all(sum(row.bytes for row in rows if row.device == slot.key) <= slot.free_bytes for slot in slots)


def rank_slots(request: Request, slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
    """The devices of the ranks: as many, or the one memory that all of them share."""
    ranks = request.ranks
    memory.check_ranks(request.spec, ranks)
    if request.purpose != "inference" or request.dtype in memory.QUANTISED or request.cache != "grouped":
        raise ValueError(
            f"tensor_parallel={ranks} is for inference with whole 16 or 32-bit weights and the grouped cache, not for "
            f"purpose={request.purpose!r}, dtype={request.dtype!r}, cache={request.cache!r}: leave it out"
        )
    if slots[0].key != "cpu" and len(slots) < ranks:
        raise ValueError(f"tensor_parallel={ranks} needs a device for each rank; there are {len(slots)}")
    return slots[:1] if slots[0].key == "cpu" else slots[:ranks]


def rank_rows(request: Request, slots: Sequence[Slot]) -> Iterator[Part]:
    """What the ranks hold of everything."""
    shape, dtype, ranks, share = request.spec, request.dtype, request.ranks, f"1/{request.ranks}"
    table, size = memory.embedding_bytes(shape, dtype) // ranks, (request.context, request.batch)
    cache = shape.layers * memory.layer_kv_bytes(shape, dtype, *size) // ranks
    busy = memory.prefill_bytes(shape, dtype, *size, ranks)
    for rank in range(ranks):
        slot = slots[rank % len(slots)]
        layers = memory.rank_bytes(shape, dtype, ranks) - table
        yield Part("embedding and head", slot.key, table, f"{share} of the vocabulary")
        yield Part("layers of a rank", slot.key, layers, f"{share} of the heads and of the feed-forward of each layer")
        yield Part("KV cache", slot.key, cache, f"{shape.kv_heads // ranks} of {shape.kv_heads} KV heads")
        yield Part("logits", slot.key, memory.logits_bytes(shape, request.batch), "every rank gathers all of them")
        yield Part("activations", slot.key, busy, f"the busiest moment of reading {request.context} tokens")
        overhead, reason = request.device(slot)["overhead"]
        yield Part("overhead", slot.key, overhead, reason)
