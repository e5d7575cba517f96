"""The memory plan of training, and what to change where the memory does not suffice, in the arguments of `tune`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial

from falcon_kit.catalogue.memory import QUANTISED
from falcon_kit.loading.falcon import Falcon
from falcon_kit.loading.quantization import is_quantised, stored_quantisation
from falcon_kit.model.checks import live_spec
from falcon_kit.planning.devices import Device, resolve_devices
from falcon_kit.planning.environment import host_memory
from falcon_kit.planning.plan import NotEnoughMemory, Plan, plan
from falcon_kit.planning.suggestions import Suggestion, in_words_of
from falcon_kit.tuning import distributed
from falcon_kit.tuning.settings import Tuning


def plan_training(falcon: Falcon, settings: Tuning, force: bool) -> Plan:
    """The memory plan of training, with the memory of each device that is free or used by the model.

    Raises NotEnoughMemory if it does not fit and the weights will not be sharded, and ValueError for a model on the GPU
    of another process.
    """
    quantised = stored_quantisation(falcon.model.config)
    shards = not quantised and distributed.world_size() > 1 if settings.shard is None else settings.shard
    devices = _devices(falcon, shards)
    make = partial(
        plan,
        live_spec(falcon.spec, falcon.model),
        quantised or falcon.model.dtype,
        context=settings.context or falcon.spec.context,
        batch=settings.per_device_train_batch_size,
        purpose="qlora" if quantised else "lora",
        devices=devices,
        r=settings.r,
    )
    checkpointing = settings.gradient_checkpointing is not False
    planned = make(gradient_checkpointing=checkpointing)
    if not (planned.fits or force or shards):
        recomputing = [] if checkpointing or not make().fits else [Suggestion(gradient_checkpointing=True)]
        raise NotEnoughMemory(replace(planned, suggestions=(*recomputing, *_advice(planned, falcon))))
    return planned


def _devices(falcon: Falcon, shards: bool) -> list[Device]:
    """The devices to train on: those that the model is on or, for shards, all of this process."""
    used: Counter[str] = Counter()
    for each in falcon.model.parameters():
        used[str(each.device.index) if each.device.type == "cuda" else "cpu"] += each.nbytes
    here = resolve_devices(None)
    _check_own_gpu(used, here)
    if not shards:
        found = {str(each.key): each for each in (Device("cpu", "cpu", host_memory()[1], here=True), *here)}
        here = tuple(found[key] for key in used)
    return [replace(each, free_bytes=each.free_bytes + used[str(each.key)]) for each in here]


def _check_own_gpu(used: Collection[str], here: Sequence[Device]) -> None:
    """Raises ValueError where one of several processes has its model on a GPU that is not its own."""
    keys = {str(each.key) for each in here}
    if others := sorted(set(used) - keys - {"cpu"}):
        own = here[0].key
        raise ValueError(
            f"the model is on GPU {', '.join(others)}, and of {distributed.world_size()} processes this one trains on "
            f"GPU {own}: load it in each process without device_map, which puts it on the GPU of the process"
        )


def _advice(planned: Plan, falcon: Falcon) -> Iterator[Suggestion]:
    """The suggestions of the plan as arguments of `tune`, or as the call of `fk.load` for another dtype."""
    names = {"name": "name", "context": "context", "batch": "per_device_train_batch_size"}
    for each in planned.suggestions:
        if each.changes.keys() != {"dtype"}:
            yield from in_words_of(names, [each])
        elif not is_quantised(falcon.model):
            yield Suggestion(_in_fewer_bits(falcon, each.changes["dtype"]))


def _in_fewer_bits(falcon: Falcon, dtype: str) -> str:
    return f"fk.load({falcon.name!r}, dtype={dtype!r}){': QLoRA' if dtype in QUANTISED else ''}"


def out_of_memory(error: Exception, falcon: Falcon, settings: Tuning, memory_plan: Plan) -> NotEnoughMemory:
    """The plan, the error, and what to try next, ordered by how little it changes the training."""
    batch, steps, suggestions = settings.per_device_train_batch_size, settings.gradient_accumulation_steps, []
    if batch > 1:
        suggestions.append(
            f"per_device_train_batch_size={batch // 2}, gradient_accumulation_steps={steps * 2}: the same steps in "
            "smaller batches"
        )
    if not settings.gradient_checkpointing:
        suggestions.append("gradient_checkpointing=True: activations are recomputed instead of stored")
    if not is_quantised(falcon.model):
        suggestions.append(_in_fewer_bits(falcon, "nf4"))
    if (settings.context or 0) >= 256:
        suggestions.append(f"context={(settings.context or 0) // 2}: longer conversations are cut")
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    text = f"out of memory during training ({reason}). The plan was: {memory_plan.verdict()}. Try:"
    return NotEnoughMemory(replace(memory_plan, suggestions=tuple(map(Suggestion, suggestions))), text)
