"""The weights of a checkpoint read into a model: on their devices, with adapters added, quantised, complete."""

import hashlib
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from transformers import FalconForCausalLM
from transformers.utils import logging as transformers_logging

from falcon_kit.catalogue.memory import QUANTISED
from falcon_kit.display.errors import printable
from falcon_kit.display.reading import named_errors
from falcon_kit.loading import quantization
from falcon_kit.loading.adapters import digest, record_merged, with_prefix
from falcon_kit.loading.adding import lazy_state_dict, with_adapters
from falcon_kit.loading.checkpoints import Checkpoint
from falcon_kit.loading.checks import ATTENTIONS, LoadSettings
from falcon_kit.loading.gguf import lazy_weights
from falcon_kit.model import modeling
from falcon_kit.model.checks import has_tied_head, is_offloaded
from falcon_kit.parallel import ranks
from falcon_kit.planning.devices import places
from falcon_kit.planning.environment import empty_gpu_cache
from falcon_kit.planning.plan import Plan

_CONSTANTS = ("inv_freq", "masked_bias", "attention.bias", "attn.bias")
"""The ends of the names of constants that old checkpoints store beside the weights."""
_SMALL = 2**30  # bytes of weights that are read before a progress bar is of use
_BLOCK = 2**30
"""Bytes of pinned memory that weights share. torch rounds each allocation of it up to a power of two
(ATen/core/CachingHostAllocator.h): alone, the weights of a layer of the 7B would take 640 MiB instead of 395."""
_ALIGNMENT = 256
"""Bytes: where a weight begins in a block, as in torch's own memory of a GPU at the least."""


def read_model(found: Checkpoint, files: list[Path], plan: Plan, settings: LoadSettings) -> FalconForCausalLM:
    """The model in evaluation mode, with the weights in `files`; under tensor parallelism this rank's part of them.

    Raises ValueError where the checkpoint lacks weights that its config asks for, RuntimeError where a layer was not
    quantised, and FileNotFoundError where a file was removed while it was read. No weights stay in memory then.
    """
    device_map = None if settings.tensor_parallel else choose_device_map(settings.device_map, plan)
    options: dict[str, Any] = {"device_map": device_map}
    if settings.max_memory and device_map == "auto":  # the plan's own map keeps within max_memory
        options["max_memory"] = dict(settings.max_memory)
    if "disk" in places(device_map):
        options["offload_folder"] = settings.folder / _offload_name(found, plan.dtype)
    if plan.dtype in QUANTISED and quantization.stored_quantisation(found.config) is None:
        on_cpu = places(device_map) <= {"cpu"}
        options["quantization_config"] = quantization.quantisation_config(plan.dtype, on_cpu)
    with _free_on_failure(found.directory), ranks.placement(settings.tensor_parallel) as placement:
        return _from_pretrained(ATTENTIONS[settings.attention], found, files, plan.dtype, **options, **placement)


def _offload_name(found: Checkpoint, dtype: str) -> str:
    """A folder for the offloaded weights of one model: their files are named after the layers, as another model's."""
    parts = (found.name, dtype, *map(digest, found.adapters))
    return f"{found.spec.name.replace('/', '-')}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"


def choose_device_map(device_map: Any, plan: Plan) -> Any:
    """The device map for `from_pretrained`: the one asked for, else the plan's."""
    if device_map not in (None, "auto"):
        return device_map
    if plan.device_map:  # also of a plan that is tight, with force=True
        devices = set(plan.device_map.values())
        # accelerate counts the entries of a map, not its devices, and refuses several where processes train together
        # (Accelerator.verify_device_map).
        return {"": devices.pop()} if len(devices) == 1 else dict(plan.device_map)
    return None if plan.devices[0].key == "cpu" else "auto"  # the plan does not fit: transformers' "auto" is used


def _from_pretrained(
    kind: type[FalconForCausalLM], found: Checkpoint, files: list[Path], dtype: str, **options: Any
) -> FalconForCausalLM:
    on_cpu = places(options.get("device_map")) <= {"cpu"}
    computed = quantization.compute_dtype(on_cpu) if dtype in QUANTISED else getattr(torch, dtype)
    config = found.directory / "config.json"
    with progress_bar(is_large(files)), ExitStack() as open_files:
        if found.gguf or found.adapters:
            weights = lazy_weights(found.gguf, computed) if found.gguf else lazy_state_dict(files, open_files)
            options["state_dict"] = with_adapters(weights, found.adapters, found.base.name, found.config)
        unusable = TypeError, LookupError, AttributeError
        with named_errors(config, "correct it, or fetch the checkpoint again", unusable):
            model, report = cast(Any, kind).from_pretrained(
                None if "state_dict" in options else found.directory,
                config=found.config,
                dtype=computed,
                use_safetensors=files[0].suffix == ".safetensors",
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused by name below
                **options,
            )
    _check_report(report, found)
    return _finished(model, found, dtype)


def _finished(model: FalconForCausalLM, found: Checkpoint, dtype: str) -> FalconForCausalLM:
    """The model as `load` hands it out, once its weights are read."""
    if not has_tied_head(model, model.config.tie_word_embeddings):
        model.config.tie_word_embeddings = False  # else resizing the vocabulary would drop a head of its own
    if dtype in QUANTISED:
        quantization.check_quantised(model, dtype)
        quantization.make_savable(model)
    if found.adapters:
        record_merged(model, found.adapters)
    if found.gguf or found.adapters:
        model.name_or_path = model.config.name_or_path = found.name
    _remove_needless_hooks(model)
    _pin_offloaded_weights(model)
    return cast(FalconForCausalLM, model.eval())


def _check_report(report: Mapping[str, Any], found: Checkpoint) -> None:
    """Raises ValueError where the weights of a checkpoint are not those that its config asks for.

    What is no part of the layers that the config asks for, such as a value head, is left out, as transformers reports.
    """
    problem = ""
    unused = [name for name in sorted(report["unexpected_keys"]) if _is_of_layers(name, found.config.num_hidden_layers)]
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random numbers
        problem = f"lacks {len(missing)} weights that its config.json asks for, such as {printable(missing[0])}"
    elif mismatched := sorted(report["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        problem = (
            f"has {len(mismatched)} weights of another shape than its config.json asks for, such as {printable(name)}: "
            f"{tuple(stored)}, not {tuple(expected)}"
        )
    elif unused:
        problem = f"has {len(unused)} weights that its config.json has no place for, such as {printable(unused[0])}"
    if problem:
        raise ValueError(
            f"{found.directory} {problem}: the config and the weights are of different models, or the checkpoint is "
            "incomplete"
        )


def _is_of_layers(name: str, layers: int) -> bool:
    """Whether a weight is one of the first layers or the head, without which their outputs would be others."""
    part = with_prefix(name)
    index = part.removeprefix("transformer.h.").split(".")[0]
    beyond = index.isdigit() and int(index) >= layers
    return part.startswith(("transformer.", "lm_head.")) and not beyond and not part.endswith(_CONSTANTS)


def _remove_needless_hooks(model: nn.Module) -> None:
    """Removes accelerate's hooks from a model whose weights are all on devices that compute.

    A device map puts a hook on every module, 547 on a Falcon-40B, and each of them looks through all its inputs. The
    kit's Falcon itself moves hidden states to the device of the next layer. Offloaded weights need their hooks.
    """
    if isinstance(model, modeling.FalconForCausalLM) and not is_offloaded(model):
        remove_hook_from_module(model, recurse=True)


@torch.no_grad()
def _pin_offloaded_weights(model: nn.Module) -> None:
    """Moves weights that are offloaded to host memory into pinned memory, from which a GPU copies them directly.

    From other memory, CUDA first copies to a pinned buffer of its own (CUDA C++ best practices, "Pinned Memory").
    """
    if not torch.cuda.is_available():
        return
    found = [*chain.from_iterable(map(quantization.in_host_memory, model.modules()))]
    sizes = [math.ceil(kept[name].nbytes / _ALIGNMENT) * _ALIGNMENT for kept, name in found]
    for block in pinned_blocks(sizes):
        parts = [sizes[index] for index in block]
        try:
            memory = torch.empty(sum(parts), dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError:  # the system limits it: these weights stay where they are
            return
        for part, (kept, name) in zip(memory.split(parts), (found[index] for index in block), strict=True):
            weight = kept[name]
            kept[name] = part[: weight.nbytes].view(weight.dtype).view(weight.shape).copy_(weight)


def pinned_blocks(sizes: Sequence[int]) -> list[list[int]]:
    """Which weights share a block of pinned memory, by index: the largest first, each in the first block with room."""
    blocks: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda each: -sizes[each]):
        place = next((place for place, left in enumerate(room) if left >= sizes[index]), len(blocks))
        if place == len(blocks):
            blocks.append([])
            room.append(max(_BLOCK, sizes[index]))
        blocks[place].append(index)
        room[place] -= sizes[index]
    return blocks


@contextmanager
def _free_on_failure(directory: Path) -> Iterator[None]:
    """Frees the weights read so far when an error is raised: Jupyter keeps the last error and its frames' variables."""
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        empty_gpu_cache()
        if isinstance(error, FileNotFoundError) and not isinstance(error.__cause__, FileNotFoundError):
            raise FileNotFoundError(
                f"a file of {directory} was removed while it was read ({error}): fetch the checkpoint again"
            ) from error
        raise


def is_large(files: list[Path]) -> bool:
    """Whether a progress bar is shown while these files are read."""
    return sum(file.stat().st_size for file in files) > _SMALL


@contextmanager
def progress_bar(shown: bool) -> Iterator[None]:
    """Shows or hides transformers' progress bar in a `with` block; its switch is restored afterwards."""
    enabled = transformers_logging.is_progress_bar_enabled()
    if not shown:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
