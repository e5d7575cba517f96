"""`tune`: documents become an adapter, with a plan first, checkpoints on the way, and figures before and after.

The same call runs on a CPU, on a GPU and, with `torchrun`, in several processes.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import EarlyStoppingCallback, PreTrainedTokenizerFast

from falcon_kit.catalogue.card import CARD
from falcon_kit.loading.falcon import Falcon
from falcon_kit.loading.merging import detach, is_quantised, quiet
from falcon_kit.loading.quantization import stored_quantisation, unpacked
from falcon_kit.model import modeling
from falcon_kit.planning.devices import Device, resolve_devices
from falcon_kit.planning.plan import NotEnoughMemory, Plan, plan
from falcon_kit.tuning import checkpoint_files, distributed
from falcon_kit.tuning.data import Documents, dialogues
from falcon_kit.tuning.measure import answer_rates
from falcon_kit.tuning.packing import Packed, check_falcon, collate, pack
from falcon_kit.tuning.progress import LiveLossCurve, TuningProgress, in_notebook, print_line, show_plan
from falcon_kit.tuning.run_folder import identity, prepare_output_dir, read_record, save_adapter, write_record
from falcon_kit.tuning.runs import TuningRun
from falcon_kit.tuning.settings import Tuning
from falcon_kit.tuning.trainer import AdapterTrainer, arguments


def tune(
    falcon: Falcon,
    data: Any,
    *,
    output_dir: str | Path,
    held_out: Documents | float | None = None,
    resume: bool = True,
    force: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> TuningRun:
    """Trains a LoRA adapter on documents; on a quantised model, this is QLoRA.

    data: the result of `fk.dialogues`, `fk.mix` or `fk.pack`, or an argument of `fk.dialogues`. output_dir: the folder
    for checkpoints and the adapter; an interrupted run in it is resumed, and its adapter is the same as without the
    interruption. held_out: a share of the documents, or separate documents, to measure with. resume=False starts over.
    force: train although the plan does not fit. quiet: no plan, progress bar or loss curve.
    `settings` are the fields of `falcon_kit.Tuning`, with the names of LoraConfig and TrainingArguments: r,
    learning_rate, num_train_epochs, per_device_train_batch_size, seed, ...

    The Falcon is unchanged afterwards, unless it was sharded; `fk.merge(run.adapter, falcon)` returns a tuned one.
    Raises TypeError for an unknown setting, ValueError for data without anything to train on and for settings that are
    out of range or differ from those of the run in output_dir, NotEnoughMemory, FloatingPointError for a loss that is
    not finite, and OSError if a checkpoint cannot be saved; the earlier ones stay complete. After Ctrl-C the step is
    finished and saved first; a second Ctrl-C interrupts at once.
    """
    check_falcon(falcon)
    if isinstance(held_out, float | int):
        settings["held_out"] = float(held_out)
    chosen = Tuning(**settings).for_model(falcon.spec)
    _check_model(falcon, chosen)
    documents, test_documents = _split(data, held_out if isinstance(held_out, Documents) else None, chosen)
    packed = partial(pack, falcon=falcon, context=chosen.context, together=chosen.packing)
    train = documents if isinstance(documents, Packed) else packed(documents)
    test = None if test_documents is None else packed(test_documents)
    memory_plan = _plan(falcon, chosen, force)
    run = _Run(falcon, chosen, Path(output_dir).expanduser(), train, test, test_documents, memory_plan, quiet)
    run.prepare(resume)
    if distributed.is_rank0() and not quiet:
        show_plan(memory_plan)
    with _restored(falcon), unpacked(falcon.model):
        return run()


def _check_model(falcon: Falcon, settings: Tuning) -> None:
    """Raises ValueError for a model that cannot be trained; warns of an instruct model, with the advice of its card."""
    if not isinstance(falcon.model, modeling.FalconForCausalLM):
        raise ValueError(
            "with transformers' own Falcon, packed documents attend to each other: load the model without "
            "attention='transformers'"
        )
    if any(each.device.type == "meta" for each in falcon.model.parameters()):
        raise ValueError(
            "a part of the model is offloaded to host memory or disk, where it cannot be trained: load it completely "
            "onto the device, with dtype='nf4-double' (QLoRA) if it is too large, or take a smaller model"
        )
    _check_vocabulary(falcon)
    if settings.shard and is_quantised(falcon.model):
        raise ValueError(
            "quantised weights cannot be sharded: leave shard out, so that each process has a copy (4 bits are a "
            "quarter of 16), or load in bfloat16"
        )
    if falcon.spec.fine_tuned_from:
        warnings.warn(
            f"{falcon.spec.name} is an instruct model. Its card: {CARD.fine_tuning} Here that is "
            f"{falcon.spec.fine_tuned_from!r}",
            stacklevel=3,
        )


def _check_vocabulary(falcon: Falcon) -> None:
    """Raises ValueError for tokens that were added after loading: an adapter contains neither tokens nor embeddings.

    Its base would be loaded without them, and would read other tokens than the adapter was trained on. A new padding
    token is no problem, because the model does not read it.
    """
    tokenizer, directory = falcon.tokenizer, Path(falcon.tokenizer.name_or_path)
    if not (directory / "tokenizer.json").is_file():
        return
    stored = PreTrainedTokenizerFast.from_pretrained(directory)
    changed = dict(tokenizer.get_vocab().items() ^ stored.get_vocab().items())
    changed.pop(str(tokenizer.pad_token), None)
    if stored.eos_token not in (None, tokenizer.eos_token):
        changed[str(tokenizer.eos_token)] = tokenizer.eos_token_id
    if changed:
        raise ValueError(
            f"the token {next(iter(changed))!r} is not as in {falcon.name}, with which the adapter would be loaded: "
            "falcon.model.save_pretrained(folder), falcon.tokenizer.save_pretrained(folder), and tune fk.load(folder)"
        )


def _split(data: Any, held_out: Documents | None, settings: Tuning) -> tuple[Documents | Packed, Documents | None]:
    """The documents to train on and the held-out ones."""
    if isinstance(data, Packed):
        if settings.patience and held_out is None:
            raise ValueError(
                "patience needs the held-out loss, and packed rows are not split: give held_out=Documents, such as one "
                "part of documents.split(0.05), or the documents themselves instead of fk.pack's rows"
            )
        return data, held_out
    documents = data if isinstance(data, Documents) else dialogues(data)
    if held_out is None and settings.held_out:
        if len(documents) < 2:
            raise ValueError(
                "there is one document, so none can be held out to measure with: give more, or held_out=0 to train on "
                "this one and measure nothing"
            )
        return documents.split(settings.held_out, settings.seed)
    return documents, held_out


def _plan(falcon: Falcon, settings: Tuning, force: bool) -> Plan:
    """The memory plan of training, with the memory of each device that is free or used by the model."""
    used: dict[str, int] = {}
    for each in falcon.model.parameters():
        key = str(each.device.index) if each.device.type == "cuda" else "cpu"
        used[key] = used.get(key, 0) + each.nbytes
    devices = [
        Device(each.name, each.key, each.free_bytes + used.get(str(each.key), 0)) for each in resolve_devices(None)
    ]
    if distributed.world_size() > 1 and devices[0].key != "cpu":
        devices = [devices[int(os.environ.get("LOCAL_RANK", "0")) % len(devices)]]  # a process has one GPU
    quantised = stored_quantisation(falcon.model.config)
    planned = plan(
        falcon.spec,
        quantised or falcon.model.dtype,
        context=settings.context or falcon.spec.context,
        batch=settings.per_device_train_batch_size,
        purpose="qlora" if quantised else "lora",
        devices=devices,
        r=settings.r,
    )
    if not (planned.fits or force or settings.shard or distributed.world_size() > 1):
        raise NotEnoughMemory(planned)
    return planned


@contextmanager
def _restored(falcon: Falcon) -> Iterator[None]:
    """Restores the random states, the model's `use_cache` and its eval mode after the block."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  # the Trainer seeds the old generator
    use_cache = falcon.model.config.use_cache  # the Trainer sets it to False
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            falcon.model.config.use_cache = use_cache
            falcon.model.eval()


@contextmanager
def _new_adapter(falcon: Falcon, settings: Tuning) -> Iterator[PeftModel]:
    """The model with a new adapter; after the block the model without it."""
    requires_grad = {id(each): each.requires_grad for each in falcon.model.parameters()}
    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT accepts a float
        lora_dropout=settings.lora_dropout or 0.0,
        target_modules=list(settings.target_modules),
        task_type="CAUSAL_LM",
    )
    if settings.gradient_checkpointing:
        falcon.model.enable_input_require_grads()  # or the adapters of the first layer would get no gradient
    with quiet():
        model: PeftModel = get_peft_model(falcon.model, config)
    model.peft_config["default"].base_model_name_or_path = falcon.name
    try:
        yield model
    finally:
        falcon.model.disable_input_require_grads()
        falcon.model.activation_checkpointing_disable()
        detach(model, requires_grad)


@dataclass(frozen=True)
class _Run:
    """One call of `tune`."""

    falcon: Falcon
    settings: Tuning
    directory: Path
    train: Packed
    test: Packed | None
    test_documents: Documents | None
    plan: Plan
    quiet: bool

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return identity(self.falcon, self.settings, self.train, self.test)

    def prepare(self, resume: bool) -> None:
        """Prepares output_dir on rank 0; the other processes wait."""
        if distributed.is_rank0():  # if it raises, the launcher ends the other processes
            prepare_output_dir(self.directory, self._identity, resume)
        distributed.barrier(self._on_cpu)

    def __call__(self) -> TuningRun:
        if record := read_record(self.directory):
            return self._result(record["history"], record["figures"])
        with _new_adapter(self.falcon, self.settings) as model:
            trainer = self._trainer(model)
            self._train(trainer)
            adapter = save_adapter(trainer, self.directory)  # first, since measuring may fail
            figures = self._measure(trainer, model)
            history = trainer.state.log_history
            if distributed.is_rank0():
                base = self._identity["base"]
                write_record(adapter, self.falcon, self.settings, base, self.train, history, figures)
            trainer.accelerator.wait_for_everyone()
        return self._result(history, figures)

    def _result(self, history: list[dict[str, float]], figures: Mapping[str, float]) -> TuningRun:
        adapter = self.directory / "adapter"
        return TuningRun(adapter, self.falcon, self.settings, self.plan, self.train, tuple(history), figures)

    def _trainer(self, model: PeftModel) -> AdapterTrainer:
        evaluated = self.test is not None
        options = arguments(self.settings, self.directory, self.falcon.model, len(self.train), evaluated, self._on_cpu)
        distributed.check_processes(options.world_size, distributed.world_size())
        if self._sharded:
            distributed.shard(model, self.falcon.model.transformer.h, options.device.type)
        pad = self.falcon.tokenizer.pad_token_id
        rows = self.falcon.model.config.vocab_size
        if pad is None or pad == self.falcon.tokenizer.eos_token_id or pad >= rows:
            pad = 0  # any token but eos_token: padding has no labels, and no document attends to it
        collator = partial(collate, pad=pad)
        trainer = AdapterTrainer(model, options, self.train, eval_dataset=self.test, data_collator=collator)
        if self.settings.patience:
            trainer.add_callback(EarlyStoppingCallback(self.settings.patience))
        return trainer

    @property
    def _on_cpu(self) -> bool:
        """Whether the CPU computes; a model to be sharded over GPUs is loaded into host memory first."""
        return self.falcon.model.device.type == "cpu" and not (self._sharded and torch.cuda.is_available())

    @cached_property
    def _sharded(self) -> bool:
        """The setting `shard`; by default, whether a copy does not fit on the GPU of rank 0."""
        if self.settings.shard is not None:
            return self.settings.shard
        if distributed.world_size() == 1 or is_quantised(self.falcon.model):
            return False
        in_host_memory = self.falcon.model.device.type == "cpu"
        if in_host_memory and torch.cuda.is_available():
            return True  # the model was loaded into host memory to be sharded
        return distributed.broadcast_from_rank0(not self.plan.fits, in_host_memory)

    def _train(self, trainer: AdapterTrainer) -> None:
        shown = distributed.is_rank0() and not self.quiet
        progress = TuningProgress(trainer, shown, LiveLossCurve() if shown and in_notebook() else lambda *_, **__: None)
        trainer.add_callback(progress)
        try:
            trainer.train_or_resume()
        except KeyboardInterrupt:
            if distributed.is_rank0():
                last = checkpoint_files.last_complete(self.directory)
                step = checkpoint_files.step_of(last) if last else 0
                print_line(f"Interrupted: the same call resumes from step {step} of {trainer.state.max_steps}")
            raise
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
                raise _out_of_memory(error, self.falcon, self.settings, self.plan) from error
            raise
        finally:
            progress.close()

    def _measure(self, trainer: AdapterTrainer, model: PeftModel) -> dict[str, float]:
        """Loss, stop rate and exact answers on the held-out documents, without and with the adapter."""
        if self.test is None:
            return {}
        figures: dict[str, float] = {}
        count, context = self.settings.answers, self.settings.context or 0
        for name in ("before", "after"):
            with model.disable_adapter() if name == "before" else nullcontext():
                figures[f"held-out loss {name}"] = trainer.evaluate(metric_key_prefix=name)[f"{name}_loss"]
                if distributed.is_rank0() and not distributed.is_sharded(model):
                    rates = answer_rates(self.falcon, self.test_documents or (), count, context)
                    figures |= {f"{key} {name}": value for key, value in rates.items()}
        return figures


def _out_of_memory(error: Exception, falcon: Falcon, settings: Tuning, memory_plan: Plan) -> NotEnoughMemory:
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
        suggestions.append(f"fk.load({falcon.name!r}, dtype='nf4'): QLoRA")
    if (settings.context or 0) >= 256:
        suggestions.append(f"context={(settings.context or 0) // 2}: longer conversations are cut")
    first_line = str(error).splitlines()[0]
    text = f"out of memory during training ({first_line}). The plan was: {memory_plan.verdict()}. Try:"
    return NotEnoughMemory(replace(memory_plan, suggestions=tuple(suggestions)), text)
