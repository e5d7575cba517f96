"""Which device holds which part of a Falcon: the parts of a request with their bytes, and the layers per device."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from falcon_kit.catalogue import memory
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.tables import counted
from falcon_kit.planning.devices import Device
from falcon_kit.planning.processor import has_instructions_for

Purpose = Literal["inference", "lora", "qlora", "full"]
CacheKind = Literal["grouped", "transformers"]
Sizes = dict[str, tuple[int, str]]
"""Bytes and the reason for them, by part."""

CPU_OVERHEAD, GPU_OVERHEAD = 440 * 2**20, 600 * 2**20
"""Memory before any weight is loaded. CPU: Python with torch and transformers, compared with a real process in
`tests/planning/test_plan.py`. GPU: a CUDA context with the workspaces of its libraries, assumed."""


@dataclass(frozen=True)
class Part:
    """One row of a plan."""

    part: str
    """The name: "layers 0-14", "KV cache"."""
    device: int | str
    """The key of the device."""
    bytes: int
    reason: str


@dataclass(frozen=True)
class Request:
    """The arguments of a plan, and the bytes of each part that follow from them."""

    spec: FalconSpec
    dtype: str
    context: int
    batch: int
    purpose: Purpose
    cache: CacheKind
    r: int
    tensor_parallel: int
    gradient_checkpointing: bool = True

    @property
    def _size(self) -> tuple[FalconSpec, str, int, int]:
        return self.spec, self.dtype, self.context, self.batch

    @property
    def _kept(self) -> int:
        """What one layer keeps without gradient checkpointing."""
        return memory.kept_bytes(*self._size, adapters=self.purpose != "full")

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return self.purpose != "inference"

    def layer_parts(self) -> Sizes:
        """What one decoder layer takes on the device that computes it."""
        weights = memory.layer_bytes(self.spec, self.dtype)
        parts = {"weights": (weights, f"{self.spec.layer_parameters:,} parameters a layer in {self.dtype}")}
        match self.purpose:
            case "inference":
                cache = memory.layer_kv_bytes(*self._size, self.cache)
                copies = (
                    "one per query head" if self.cache == "transformers" else counted(self.spec.kv_heads, "KV head")
                )
                parts["KV cache"] = (cache, f"{self.batch} x {self.context} tokens, {copies}")
            case "full":
                parts["gradients and Adam"] = (3 * weights, "a gradient and two averages per weight")
            case _:
                adapters = memory.lora_parameters(self.spec, self.r) // self.spec.layers
                parts["LoRA"] = (16 * adapters, f"r={self.r}, float32: weight, gradient and two averages of Adam")
        if self.trains and not self.gradient_checkpointing:
            parts["kept activations"] = (self._kept, "what each layer keeps for the backward pass")
        elif self.trains:
            inputs = memory.checkpoint_bytes(*self._size)
            parts["checkpoints"] = (inputs, "the input of each layer, for gradient checkpointing")
        return parts

    def offloaded_layer_parts(self) -> Sizes:
        """What one decoder layer takes on an offload target: its weights."""
        weights, reason = self.layer_parts()["weights"]
        return {"weights": (weights, f"{reason}, copied to the first device for each token")}

    def offload_overhead(self, count: int) -> Sizes:
        """What `count` offloaded layers take on the first device: one copy of weights, and each layer's KV cache."""
        parts = self.layer_parts()
        weights, _ = parts.pop("weights")
        copy = {"offloaded layer": (weights, "a copy of the one layer that is being computed")}
        return copy | {name: (count * size, reason) for name, (size, reason) in parts.items()}

    def device_parts(self, device: Device) -> Sizes:
        """What each device that computes layers takes in addition to them."""
        on_cpu = device.key == "cpu"
        if self.trains:
            peak = memory.backward_bytes(*self._size, adapters=self.purpose != "full")
            peak_reason = "recomputation and backward pass of one layer"
            if not self.gradient_checkpointing:
                peak, peak_reason = peak - self._kept, "backward pass of one layer"
        else:
            peak, peak_reason = memory.prefill_bytes(*self._size), f"the peak of the prefill of {self.context} tokens"
        workspace = memory.workspace_bytes(
            *self._size, on_cpu, not on_cpu or has_instructions_for(self.dtype), self.trains
        )
        workspace_reason = "for products with quantised weights"
        if self.dtype in memory.FLOAT_DTYPES:
            workspace_reason = f"for the prefill in float32, on a CPU without instructions for {self.dtype}"
        parts = {"workspace": (workspace, workspace_reason)} if workspace else {}
        overhead = (GPU_OVERHEAD, "CUDA context and library workspaces: assumed")
        if on_cpu:
            overhead = (CPU_OVERHEAD, "Python with torch and transformers")
        return {"activations": (peak, peak_reason), **parts, "overhead": overhead}

    def first_device_parts(self) -> Sizes:
        """What the first device takes in addition: the embedding, the output head, and the logits or the loss."""
        table = memory.embedding_bytes(self.spec, self.dtype)
        parts = {"embedding and head": (table, "tied: one matrix" if self.spec.tied_head else "two matrices")}
        if self.purpose == "full":
            parts["gradients and Adam"] = (3 * table, "a gradient and two averages per weight")
        if not self.trains:
            parts["logits"] = (memory.logits_bytes(self.spec, self.batch), "of the next token")
        else:
            reason = f"logits of {memory.LOSS_CHUNK} tokens at a time, {self.spec.vocabulary:,} per token"
            trains_head = self.purpose == "full"
            reason += ", and two gradients of the head" if trains_head else ""
            parts["loss"] = (memory.loss_bytes(*self._size, trains_head), reason)
        return parts


# Layers split over devices


def layers_per_device(request: Request, devices: Sequence[Device]) -> list[int]:
    """How many layers each device holds, with as few as possible offloaded; all zero if they do not fit."""
    computing = [device for device in devices if not device.offload_target]
    targets, layers = devices[len(computing) :], request.spec.layers
    parts = request.layer_parts()
    layer, (weights, _) = _total(parts), parts["weights"]
    capacities = [min(target.free_bytes // weights, layers) for target in targets]
    for offloaded in range(layers + 1) if targets else (0,):
        free = _memory_for_layers(request, computing, offloaded)
        counts = _balanced_layers(free, layer, layers - offloaded)
        # the first device holds the embedding, even if it holds no layers
        if free[0] >= 0 and sum(counts) == layers - offloaded and sum(capacities) >= offloaded:
            left = [max(0, offloaded - sum(capacities[:index])) for index in range(len(targets))]
            return counts + [min(pair) for pair in zip(capacities, left, strict=True)]
    return [0] * len(devices)


def _balanced_layers(free: Sequence[int], layer: int, wanted: int) -> list[int]:
    """Layers per device, each given to the last one with the most room left; fewer than `wanted` if they do not fit."""
    counts, room = [0] * len(free), list(free)
    for _ in range(wanted):
        index = max(range(len(room)), key=lambda each: (room[each], each))
        if room[index] < layer:
            break
        room[index] -= layer
        counts[index] += 1
    return counts


def _memory_for_layers(request: Request, devices: Sequence[Device], offloaded: int) -> list[int]:
    """Bytes for layers on each device: its free memory minus everything else that it holds; may be negative."""
    free = [device.free_bytes - _total(request.device_parts(device)) for device in devices]
    free[0] -= _total(request.first_device_parts()) + memory.last_norm_bytes(request.spec, request.dtype)
    if offloaded:
        free[0] -= _total(request.offload_overhead(offloaded))
    return free


def _total(parts: Sizes) -> int:
    return sum(size for size, _ in parts.values())


def split_by_memory(request: Request, devices: Sequence[Device]) -> list[int]:
    """How many layers each device holds in proportion to its memory: the table of a plan that does not fit."""
    total, layers = max(1, sum(device.free_bytes for device in devices)), request.spec.layers
    counts = [layers * device.free_bytes // total for device in devices]
    counts[-1] += layers - sum(counts)
    return counts


def layer_split_parts(request: Request, devices: Sequence[Device], counts: Sequence[int]) -> Iterator[Part]:
    """The rows of a plan in which each device holds `counts` layers."""
    first_layer = 0
    offloaded = sum(count for device, count in zip(devices, counts, strict=True) if device.offload_target)
    for index, (device, count) in enumerate(zip(devices, counts, strict=True)):
        if index == 0:
            yield from _parts_on(device, request.first_device_parts())
            yield from _parts_on(device, request.offload_overhead(offloaded) if offloaded else {})
        if count:
            name = f"layers {first_layer}-{first_layer + count - 1}"
            parts = request.offloaded_layer_parts() if device.offload_target else request.layer_parts()
            yield from _parts_on(device, {name: parts.pop("weights"), **parts}, times=count)
        if index == 0 or (count and not device.offload_target):
            yield from _parts_on(device, request.device_parts(device))
        first_layer += count
    norm = memory.last_norm_bytes(request.spec, request.dtype)
    yield Part("last LayerNorm", devices[0].key, norm, "before the head")


def _parts_on(device: Device, parts: Mapping[str, tuple[int, str]], times: int = 1) -> Iterator[Part]:
    return (Part(name, device.key, times * size, reason) for name, (size, reason) in parts.items())


def device_map(devices: Sequence[Device], counts: Sequence[int]) -> dict[str, int | str]:
    """The device of each module, for `from_pretrained`. The head is on the first device, as the tied embedding is."""
    keys = [device.key for device, count in zip(devices, counts, strict=True) for _ in range(count)]
    names = ("transformer.word_embeddings", "transformer.rotary_emb", "transformer.ln_f", "lm_head")
    modules = dict.fromkeys(names, devices[0].key)
    return {**modules, **{f"transformer.h.{index}": key for index, key in enumerate(keys)}}


def fits_in_memory(devices: Sequence[Device], parts: Sequence[Part]) -> bool:
    """Whether the parts on each device fit into its memory."""
    return all(sum(part.bytes for part in parts if part.device == each.key) <= each.free_bytes for each in devices)


# Tensor parallelism


def tensor_parallel_devices(request: Request, devices: tuple[Device, ...]) -> tuple[Device, ...]:
    """One GPU per rank, or the one host memory that all ranks share. Raises ValueError if it cannot be divided."""
    ranks = request.tensor_parallel
    memory.check_tensor_parallel(request.spec, ranks)
    if request.purpose != "inference" or request.dtype in memory.QUANTISED or request.cache != "grouped":
        raise ValueError(
            f"tensor_parallel={ranks} needs purpose='inference', a dtype of {', '.join(memory.FLOAT_DTYPES)} and "
            f"cache='grouped', not purpose={request.purpose!r}, dtype={request.dtype!r}, cache={request.cache!r}: "
            "leave it out"
        )
    computing = tuple(device for device in devices if not device.offload_target)
    if computing[0].key == "cpu":
        return computing[:1]
    if len(computing) < ranks:
        raise ValueError(f"tensor_parallel={ranks} needs a device per rank; there are {len(computing)}")
    return computing[:ranks]


def tensor_parallel_parts(request: Request, devices: Sequence[Device]) -> Iterator[Part]:
    """The rows of a plan in which each rank holds a part of every layer."""
    shape, dtype, ranks = request.spec, request.dtype, request.tensor_parallel
    size, share = (request.context, request.batch), f"1/{ranks}"
    table = memory.embedding_bytes(shape, dtype) // ranks
    layers = memory.rank_bytes(shape, dtype, ranks) - table
    cache = shape.layers * memory.layer_kv_bytes(shape, dtype, *size) // ranks
    peak = memory.prefill_bytes(shape, dtype, *size, ranks)
    for rank in range(ranks):
        device = devices[rank % len(devices)]
        overhead, reason = request.device_parts(device)["overhead"]
        yield Part("embedding and head", device.key, table, f"{share} of the vocabulary")
        yield Part("layers of a rank", device.key, layers, f"{share} of the heads and of the MLP of each layer")
        yield Part("KV cache", device.key, cache, f"{shape.kv_heads // ranks} of {shape.kv_heads} KV heads")
        yield Part("logits", device.key, memory.logits_bytes(shape, request.batch), "gathered on every rank")
        yield Part("activations", device.key, peak, f"the peak of the prefill of {request.context} tokens")
        yield Part("overhead", device.key, overhead, reason)
