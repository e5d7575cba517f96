"""`load`: a Falcon by embedded name, hub id or directory.

A checkpoint's code is never run, and only tensors are read from pickled weights.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import CompileConfig, FalconConfig, GenerationConfig

from falcon_kit.catalogue.memory import FLOAT_DTYPES, QUANTISED
from falcon_kit.display.errors import check_flag
from falcon_kit.display.warning import warn
from falcon_kit.generation.chat import ChatFormat
from falcon_kit.generation.own_format import storable
from falcon_kit.loading import checks
from falcon_kit.loading.checkpoints import Checkpoint, check_weights, fetch, find
from falcon_kit.loading.checks import LoadSettings
from falcon_kit.loading.compiling import check_compilable, compile_options, compiled
from falcon_kit.loading.falcon import Falcon
from falcon_kit.loading.quantization import stored_quantisation
from falcon_kit.loading.quantizer import SPILLED
from falcon_kit.loading.reading import choose_device_map, is_large, read_model
from falcon_kit.loading.tokenizer import generation_config, set_special_tokens, tokenizer_and_format
from falcon_kit.model import modeling
from falcon_kit.model.checks import has_tied_head
from falcon_kit.model.products import faster_without_onednn
from falcon_kit.parallel import ranks
from falcon_kit.planning.devices import Device, devices_by_key, identical_gpus, local_devices
from falcon_kit.planning.downloads import disk_for
from falcon_kit.planning.environment import gpu_problem, host_memory, own_gpu
from falcon_kit.planning.plan import NotEnoughMemory, Plan, plan
from falcon_kit.planning.processor import cpu_dtype, gpu_dtype
from falcon_kit.planning.suggestions import Suggestion, in_words_of


def load(
    name: str | Path = "falconet",
    *,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    max_memory: Mapping[int | str, float | str] | None = None,
    offload: Literal["cpu", "disk"] | None = None,
    offload_folder: str | Path = "runs/offload",
    attention: Literal["grouped", "transformers"] = "grouped",
    compile: bool | CompileConfig = False,
    force: bool = False,
    chat: str | ChatFormat | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    tensor_parallel: int | None = None,
    **others: Any,
) -> Falcon:
    """Loads a Falcon by name, hub id, directory or .gguf file (dequantised); for an adapter, its base with it added.

    dtype: "auto" (the checkpoint's, fitted to the hardware: `dtype_reason`), "float32", "bfloat16", "float16", "int8"
    (torch's on a CPU, bitsandbytes' on a GPU), "int4" (torch's; can be compiled), "nf4", "nf4-double" (for QLoRA).
    device_map: unset or "auto", the plan's (`fk.plan`, one text of the whole context); or as in transformers.
    max_memory: limit of each device, {0: "20GiB", 1: "20GiB"}; a device that is not named is not used.
    offload: "cpu" keeps layers that do not fit on the GPUs in host memory, "disk" also on disk: each is read again for
    every token. safetensors without an adapter are read where they are, other weights from `offload_folder`.
    attention: "grouped" caches keys and values once per KV head; "transformers" is the library's own Falcon.
    compile: on a GPU, decode with a static cache of the whole context and torch.compile, warmed up for a batch of 1;
    another batch size compiles again. A CompileConfig sets other options. Beam search, assisted generation and a cache
    given by the caller run without it.
    force: load although the plan does not fit.
    chat: "falcon", "hub", "baize" or a ChatFormat; unset, the format that the adapter was trained in, or the chat
    template of the checkpoint's tokenizer; without one, "hub" for the published 7B, 40B and rw, else "falcon".
    revision, token, cache_dir, local_files_only: as in huggingface_hub.
    tensor_parallel: ranks that each hold a part of every layer. Under torchrun each process gets a Falcon of its part;
    in a notebook `load` starts them and returns a `ParallelFalcon`, on the CPU without GPUs or with device_map="cpu".
    Raises LookupError for an unknown name, TypeError, ConnectionError, FileNotFoundError, ValueError for settings or a
    checkpoint that cannot be used, and NotEnoughMemory before weights are fetched.
    """
    checks.check_arguments(name, others, [*signature(load).parameters][:-1])  # without **others
    settings = LoadSettings(
        dtype, device_map, max_memory, offload, offload_folder, attention, compile, force, chat, tensor_parallel
    )
    check_flag("local_files_only", local_files_only)
    devices = _devices(settings)
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    found = find(name, hub)
    planned, reason = _plan(found, settings, devices)
    return _read(found, fetch(found), settings, planned, reason)


def _devices(settings: LoadSettings) -> tuple[Device, ...]:
    """The devices to plan for. One of several processes reads and uses its own GPU only."""
    parallel = settings.tensor_parallel
    if torch.cuda.is_available() and (own := own_gpu(torch.cuda.device_count())) is not None:
        torch.cuda.set_device(own)  # pinned memory would create a context on the current device, which is the first
    if problem := gpu_problem():
        warn(problem)
    if parallel and not ranks.needs_launch(parallel) and torch.cuda.is_available():
        return identical_gpus(int(os.environ["LOCAL_RANK"]), parallel)
    if named := settings.named_devices:
        return devices_by_key(named, settings.folder)
    return local_devices(settings.max_memory, settings.offload, settings.folder)


def _plan(found: Checkpoint, settings: LoadSettings, devices: tuple[Device, ...]) -> tuple[Plan, str]:
    """The memory plan, and the reason for its dtype. Raises NotEnoughMemory, and ValueError for impossible settings."""
    checks.check_adapters(found)
    dtype, reason = choose_dtype(settings.dtype_name, found, on_cpu=devices[0].key == "cpu")
    checks.check_quantised_settings(dtype, settings.attention, settings.offload, settings.device_map)
    shape, parallel = found.spec, settings.tensor_parallel or 1
    planned = plan(shape, dtype, shape.context, devices=devices, cache=settings.attention, tensor_parallel=parallel)
    if cache_dir := found.hub["cache_dir"]:
        planned = replace(planned, disk=disk_for(shape, here=True, cache_dir=cache_dir))
    own_map = settings.device_map not in (None, "auto") and len(settings.named_devices) != 1  # not the plan's
    if not (planned.fits or settings.force or own_map):
        raise NotEnoughMemory(replace(planned, suggestions=_advice(planned, settings, found.config)))
    if not settings.force:
        _check_room_for_quantised(planned, settings, found)
    if options := compile_options(settings.compile):
        device_map = choose_device_map(settings.device_map, planned)
        check_compilable(dtype, device_map, on_cpu=bool(options._compile_all_devices))
    return planned, reason


def _check_room_for_quantised(planned: Plan, settings: LoadSettings, found: Checkpoint) -> None:
    """Raises NotEnoughMemory where a device map in words, which fills all GPUs, cannot hold the quantised weights."""
    in_words = isinstance(settings.device_map, str) and not settings.named_devices
    all_gpus = planned.devices[0].key != "cpu" and len(planned.devices) == torch.cuda.device_count()
    if planned.dtype in QUANTISED and in_words and all_gpus and planned.weight_bytes > planned.free_bytes:
        raise _spilling(planned, settings, found)


def _spilling(planned: Plan, settings: LoadSettings, found: Checkpoint) -> NotEnoughMemory:
    """The error about quantised layers that would be offloaded, with what to do instead."""
    given = "force=True" if settings.device_map in (None, "auto") else f"device_map={settings.device_map!r}"
    advice = [] if planned.fits else [*_advice(planned, settings, found.config)]
    if advice and stored_quantisation(found.config) is None:
        whole = plan(found.spec, "bfloat16", found.spec.context, devices=local_devices(None, "cpu"))
        advice += [Suggestion(dtype="bfloat16", offload="cpu")] if whole.fits else []
    text = (
        f"{planned.verdict()}. {given} puts layers in host memory or on disk, where quantised ones cannot be, since "
        f"they compute where their weights are: leave it out{', and try:' if advice else ''}"
    )
    return NotEnoughMemory(replace(planned, suggestions=tuple(advice)), text)


def _advice(planned: Plan, settings: LoadSettings, config: FalconConfig) -> tuple[Suggestion, ...]:
    """The suggestions of the plan as arguments of `load`, without those that these settings exclude."""
    names = {"name": "name", "cache": "attention"}
    if stored_quantisation(config) is None:
        names |= {"dtype": "dtype", "tensor_parallel": "tensor_parallel"}
    if settings.max_memory is None and not settings.compile:
        names |= {"offload": "offload", "max_memory": "max_memory"}
    return tuple(in_words_of(names, planned.suggestions))


def choose_dtype(wanted: str | None, found: Checkpoint, on_cpu: bool) -> tuple[str, str]:
    """The name of the dtype to load in, and the reason; on_cpu: whether the layers are computed on a CPU."""
    if quantised := stored_quantisation(found.config):
        if wanted not in (None, quantised):
            raise ValueError(
                f"{found.directory} is already quantised to {quantised}: dtype={wanted!r} needs the original"
            )
        return quantised, "as in the checkpoint"
    if wanted is not None:
        return wanted, "as asked"
    stored, reason = _stored_dtype(found)
    return cpu_dtype(stored, found.spec, host_memory()[1], reason) if on_cpu else gpu_dtype(stored, reason)


def _stored_dtype(found: Checkpoint) -> tuple[str, str]:
    """The dtype that holds the checkpoint's weights, and the reason."""
    stored = str(found.config.dtype).removeprefix("torch.")
    if found.gguf and (kinds := [each for each in found.gguf.kinds if each not in ("F32", "F16", "BF16")]):
        return stored, f"dequantised from {', '.join(kinds)}"
    if found.config.dtype is None:
        return "bfloat16", "the dtype of published Falcons, since the config.json names none"
    if stored not in FLOAT_DTYPES:
        return "bfloat16", f"the dtype of published Falcons, since the kit does not compute in {stored}"
    return stored, "as in the checkpoint"


def _read(found: Checkpoint, files: list[Path], settings: LoadSettings, planned: Plan, reason: str) -> Falcon:
    """The Falcon of the fetched files: in this process, or in processes that are started for its ranks."""
    check_weights(found, files)
    planned = replace(planned, disk=None)
    if settings.offload == "disk" and (found.adapters or files[0].suffix != ".safetensors"):
        checks.check_disk(settings.folder, planned.weight_bytes)
    tokenizer, format = tokenizer_and_format(found, settings.chat_format)
    generation = generation_config(found.directory, tokenizer)
    parts: dict[str, Any] = {"tokenizer": tokenizer, "spec": found.spec, "plan": planned, "dtype_reason": reason}
    if ranks.needs_launch(settings.tensor_parallel):
        return _launched(found, is_large(files), settings, chat_format=format, **parts)
    try:
        model = read_model(found, files, planned, settings)
    except ValueError as error:
        if SPILLED in str(error):
            raise _spilling(planned, settings, found) from error
        raise
    parts["spec"] = replace(found.spec, tied_head=has_tied_head(model, found.spec.tied_head))
    if generation is None:
        set_special_tokens(model.generation_config, tokenizer)
        generation = GenerationConfig.from_model_config(model.generation_config.to_dict())
    model.generation_config = generation
    if isinstance(model, modeling.FalconForCausalLM):
        linears = [ranks.local_tensor(module.weight) for module in model.modules() if type(module) is nn.Linear]
        model.single_rows_without_onednn = faster_without_onednn(linears)
    options = compile_options(settings.compile)
    decoding = compiled(model, planned.dtype, options) if options else {}
    return Falcon(model, **parts, loaded_format=format, decoding=decoding)


def _launched(found: Checkpoint, progress: bool, settings: LoadSettings, **parts: Any) -> Falcon:
    """The Falcon of processes that are started for its ranks. parts: the arguments of `ParallelFalcon`."""
    from falcon_kit.parallel import launching  # with pydantic, which others need not wait for

    hub = {name: str(value) if isinstance(value, Path) else value for name, value in found.hub.items()}
    request = hub | {
        "revision": None,  # a folder is loaded, but its base may be a repository
        "dtype": parts["plan"].dtype,
        "chat": storable(parts["chat_format"]),
        "tensor_parallel": settings.tensor_parallel,
    }
    return cast(Falcon, launching.launch(found.name, request, progress, settings.ranks_on_cpu, **parts))
