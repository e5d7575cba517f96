"""`tune`: from documents to an adapter, planned, watched, resumed where it was broken off, and measured.

The same call runs on a laptop, on a GPU and, under `torchrun`, in several processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import EarlyStoppingCallback

from falcon_kit.catalogue.card import CARD
from falcon_kit.loading.adapters import RECORD
from falcon_kit.loading.falcon import Falcon
from falcon_kit.loading.merging import detach, fingerprint, is_quantised, quiet
from falcon_kit.loading.quantization import stored_quantisation, unpacked
from falcon_kit.model import modeling
from falcon_kit.planning.devices import Device, resolve_devices
from falcon_kit.planning.plan import NotEnoughMemory, Plan, plan
from falcon_kit.tuning import distributed
from falcon_kit.tuning.data import Documents, dialogues
from falcon_kit.tuning.measure import answer_rates
from falcon_kit.tuning.packing import Packed, check_falcon, collate, pack
from falcon_kit.tuning.progress import Live, Watch, in_notebook, say, show
from falcon_kit.tuning.runs import TuningRun, card
from falcon_kit.tuning.settings import Tuning
from falcon_kit.tuning.trainer import AdapterTrainer, arguments

_MAY_CHANGE_ON_RESUME = ("save_every", "answers", "evaluate_every")
"""Settings that an interrupted run may go on with changed: the adapter comes out the same, unless there is patience,
which counts evaluations."""


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
    """Trains a LoRA adapter on documents; on a quantised model, that is QLoRA.

    data: what `fk.dialogues`, `fk.mix` or `fk.pack` gave, or what `fk.dialogues` reads. output_dir: gets checkpoints
    and the adapter; a run that was broken off there goes on, and ends with the adapter it would have had. held_out: a
    share of the documents, or documents of their own, to measure with. resume=False starts over. force: try although
    the plan does not fit. quiet: no plan, bar or curve.
    `settings` are the fields of `falcon_kit.Tuning`: rank, learning_rate, epochs, batch, context, seed, ...

    The Falcon is as before afterwards, unless it was sharded; `fk.merge(run.adapter, falcon)` makes a tuned one.
    Raises ValueError for data without anything to train on, settings out of range or other than those of the run in
    output_dir, NotEnoughMemory, FloatingPointError where the loss is not a number, and OSError where a checkpoint
    cannot be saved: those before stay whole. Ctrl-C ends the step first, and saves it; a second one does not wait.
    """
    check_falcon(falcon)
    if isinstance(held_out, float | int):
        settings["held_out"] = float(held_out)
    chosen = Tuning.named(settings).for_model(falcon.spec)
    _check(falcon, chosen)
    documents, apart = _documents(data, held_out if isinstance(held_out, Documents) else None, chosen)
    packs = partial(pack, falcon=falcon, context=chosen.context, together=chosen.packing)
    train = documents if isinstance(documents, Packed) else packs(documents)
    test = None if apart is None else packs(apart)
    planned = _plan(falcon, chosen, force)
    run = _Run(falcon, chosen, Path(output_dir).expanduser(), train, test, apart, planned, quiet)
    run.prepare_output_dir(resume)
    if distributed.is_first() and not quiet:
        show(planned)
    with _as_it_was(falcon), unpacked(falcon.model):
        return run()


def _check(falcon: Falcon, chosen: Tuning) -> None:
    """Refuses what would train wrongly, and says what the card says about instruct models."""
    if not isinstance(falcon.model, modeling.FalconForCausalLM):
        raise ValueError(
            "transformers' own Falcon lets packed documents see each other: load the model without "
            "attention='transformers'"
        )
    if any(each.device.type == "meta" for each in falcon.model.parameters()):
        raise ValueError(
            "a part of the model lies in host memory or on disk, where it cannot be trained: load it whole onto the "
            "device, with dtype='nf4-double' (QLoRA) if it is too large, or take a smaller model"
        )
    if chosen.shard and is_quantised(falcon.model):
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


def _documents(data: Any, held_out: Documents | None, chosen: Tuning) -> tuple[Documents | Packed, Documents | None]:
    """What is trained on, and what is measured with."""
    if isinstance(data, Packed):
        if chosen.patience and held_out is None:
            raise ValueError(
                "patience watches the held-out loss, and what is packed is not split: give held_out=Documents, such as "
                "one part of documents.split(0.05), or the documents themselves in place of fk.pack's rows"
            )
        return data, held_out
    documents = data if isinstance(data, Documents) else dialogues(data)
    if held_out is None and chosen.held_out:
        if len(documents) < 2:
            raise ValueError(
                "there is one document, so none can be held out to measure with: give more, or held_out=0 to train on "
                "this one and measure nothing"
            )
        return documents.split(chosen.held_out, chosen.seed)
    return documents, held_out


def _plan(falcon: Falcon, chosen: Tuning, force: bool) -> Plan:
    """What training takes, on devices with what is free there and what the model already holds."""
    held: dict[str, int] = {}
    for each in falcon.model.parameters():
        key = str(each.device.index) if each.device.type == "cuda" else "cpu"
        held[key] = held.get(key, 0) + each.nbytes
    slots = [
        Device(each.name, each.key, each.free_bytes + held.get(str(each.key), 0)) for each in resolve_devices(None)
    ]
    if distributed.world_size() > 1 and slots[0].key != "cpu":
        slots = [slots[int(os.environ.get("LOCAL_RANK", "0")) % len(slots)]]  # a process has one GPU
    quantised = stored_quantisation(falcon.model.config)
    planned = plan(
        falcon.spec,
        quantised or falcon.model.dtype,
        context=chosen.context or falcon.spec.context,
        batch=chosen.batch,
        purpose="qlora" if quantised else "lora",
        devices=slots,
        r=chosen.rank,
    )
    if not (planned.fits or force or chosen.shard or distributed.world_size() > 1):
        raise NotEnoughMemory(planned)
    return planned


def _digest(packed: Packed) -> str:
    """Tells rows apart by their tokens and labels."""
    digest = hashlib.sha256(json.dumps(packed.rows).encode())
    for row in (packed[index] for index in range(len(packed))):
        digest.update(row["input_ids"].tobytes() + row["labels"].tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _as_it_was(falcon: Falcon) -> Iterator[None]:
    """Puts back the random state, and the model's mode and use of its cache, however the block ends."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  # the Trainer seeds the old generator
    cached = falcon.model.config.use_cache  # which the Trainer turns off
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            falcon.model.config.use_cache = cached
            falcon.model.eval()


@dataclass(frozen=True)
class _Run:
    """One call of `tune`."""

    falcon: Falcon
    settings: Tuning
    directory: Path
    train: Packed
    test: Packed | None
    held_out: Documents | None
    plan: Plan
    quiet: bool

    # The folder belongs to one run

    def prepare_output_dir(self, resume: bool) -> None:
        """Writes down what this run is, or compares it with what is going on in the folder already."""
        if distributed.is_first():  # the others wait below; if this one refuses, the launcher ends them
            self._prepare_output_dir(self.directory / "run.json", resume)
        distributed.wait(self._on_cpu)

    def _prepare_output_dir(self, file: Path, resume: bool) -> None:
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(f"output_dir={str(self.directory)!r} is a file: give a folder")
        written = [each for each in (*self.directory.glob("checkpoint-*"), self.directory / "adapter") if each.exists()]
        if written and not file.is_file():
            raise FileExistsError(
                f"{written[0]} is not of a run of fk.tune, which has a {file.name} beside it, and would be lost: take "
                "another output_dir, or move it away"
            )
        if not resume:
            for each in written:
                shutil.rmtree(each, ignore_errors=True)
            file.unlink(missing_ok=True)
        identity = self._identity()
        if file.is_file():
            known = json.loads(file.read_text(encoding="utf-8"))
            free = ("save_every", "answers") if self.settings.patience else _MAY_CHANGE_ON_RESUME
            differs = [
                f"{name}: {known.get(name)!r} there, {identity.get(name)!r} here"
                for name in sorted(known.keys() | identity.keys())
                if name not in free and known.get(name) != identity.get(name)
            ]
            if differs:
                raise ValueError(
                    f"the run in {self.directory} has other settings ({'; '.join(differs)}): take the same, another "
                    "output_dir, or resume=False to start over there"
                )
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.falcon.model)  # before it is sharded

    def _identity(self) -> dict[str, Any]:
        """All that decides what the adapter becomes, and what it is measured with."""
        identity = {
            "base": self._fingerprint,
            "dtype": stored_quantisation(self.falcon.model.config) or str(self.falcon.model.dtype),
            "data": _digest(self.train),
            "held-out data": self.test and _digest(self.test),
            "processes": distributed.world_size(),
            **asdict(self.settings),
        }
        return dict(json.loads(json.dumps(identity)))

    # Training

    def __call__(self) -> TuningRun:
        if (record := self.directory / "adapter" / RECORD).is_file():
            known = json.loads(record.read_text(encoding="utf-8"))
            return self._result(known["history"], known["figures"])
        flags = {id(each): each.requires_grad for each in self.falcon.model.parameters()}
        model: PeftModel | None = None
        try:
            torch.manual_seed(self.settings.seed)
            model = self._adapted()
            trainer = self._trainer(model)
            self._train(trainer)
            self._save(trainer)
            figures = self._measure(trainer, model)
            self._write_down(trainer, figures)
        finally:
            if model is not None:
                self.falcon.model.disable_input_require_grads()
                self.falcon.model.activation_checkpointing_disable()
                detach(model, flags)
        return self._result(trainer.state.log_history, figures)

    def _result(self, logged: list[dict[str, float]], figures: Mapping[str, float]) -> TuningRun:
        adapter = self.directory / "adapter"
        return TuningRun(adapter, self.falcon, self.settings, self.plan, self.train, tuple(logged), figures)

    def _adapted(self) -> PeftModel:
        chosen = self.settings
        config = LoraConfig(
            r=chosen.rank,
            lora_alpha=chosen.alpha,  # type: ignore[arg-type]  # need not be whole
            lora_dropout=chosen.dropout or 0.0,
            target_modules=list(chosen.targets),
            task_type="CAUSAL_LM",
        )
        if chosen.checkpointing:
            self.falcon.model.enable_input_require_grads()  # or the first layer's adapters would get no gradient
        with quiet():
            model: PeftModel = get_peft_model(self.falcon.model, config)
        model.peft_config["default"].base_model_name_or_path = self.falcon.name
        return model

    def _trainer(self, model: PeftModel) -> AdapterTrainer:
        measured = self.test is not None
        options = arguments(self.settings, self.directory, self.falcon.model, len(self.train), measured, self._on_cpu)
        distributed.check_processes(options.world_size, distributed.world_size())
        if self._sharded:
            distributed.shard(model, self.falcon.model.transformer.h, options.device.type)
        pad = self.falcon.tokenizer.pad_token_id
        if pad is None or pad == self.falcon.tokenizer.eos_token_id:
            pad = 0  # any token but the end: what is filled up has no labels, and nothing sees it
        trainer = AdapterTrainer(
            model, options, self.train, eval_dataset=self.test, data_collator=partial(collate, pad=pad)
        )
        if self.settings.patience:
            trainer.add_callback(EarlyStoppingCallback(self.settings.patience))
        return trainer

    @property
    def _on_cpu(self) -> bool:
        """Whether it is computed there; what is sharded over GPUs may come from host memory."""
        return self.falcon.model.device.type == "cpu" and not (self._sharded and torch.cuda.is_available())

    @cached_property
    def _sharded(self) -> bool:
        """As asked for; otherwise if the first process's GPU holds no copy, for all alike."""
        if self.settings.shard is not None:
            return self.settings.shard
        if distributed.world_size() == 1 or is_quantised(self.falcon.model):
            return False
        in_host_memory = self.falcon.model.device.type == "cpu"
        if in_host_memory and torch.cuda.is_available():
            return True  # what else would it wait there for?
        return distributed.broadcast_from_rank0(not self.plan.fits, in_host_memory)

    def _train(self, trainer: AdapterTrainer) -> None:
        shown = distributed.is_first() and not self.quiet
        watch = Watch(trainer, shown, Live() if shown and in_notebook() else lambda *_, **__: None)
        trainer.add_callback(watch)
        try:
            trainer.train_or_resume()
        except KeyboardInterrupt:
            if distributed.is_first():
                last = trainer.last()
                step = last.name.rpartition("-")[2] if last else 0
                say(f"Interrupted: the same call goes on from step {step} of {trainer.state.max_steps}")
            raise
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
                raise self._out_of_memory(error) from error
            raise
        finally:
            watch.close()

    def _out_of_memory(self, error: Exception) -> NotEnoughMemory:
        """The plan, what happened, and what to try next, the least loss first."""
        chosen, tries = self.settings, []
        if chosen.batch > 1:
            tries.append(
                f"batch={chosen.batch // 2}, accumulate={chosen.accumulate * 2}: the same steps in smaller parts"
            )
        if not chosen.checkpointing:
            tries.append("checkpointing=True: keep less, compute it again")
        if not is_quantised(self.falcon.model):
            tries.append(f"fk.load({self.falcon.name!r}, dtype='nf4'): QLoRA")
        if (chosen.context or 0) >= 256:
            tries.append(f"context={(chosen.context or 0) // 2}: longer conversations are cut")
        happened = (
            f"out of memory while tuning ({str(error).splitlines()[0]}). Planned was: {self.plan.verdict()}. Try:"
        )
        return NotEnoughMemory(replace(self.plan, suggestions=tuple(tries)), happened)

    # What it changed

    def _measure(self, trainer: AdapterTrainer, model: PeftModel) -> dict[str, float]:
        """Loss, stop rate and exact answers on what was held out, before and after."""
        if self.test is None:
            return {}
        figures: dict[str, float] = {}
        chosen = self.settings
        for name in ("before", "after"):
            with model.disable_adapter() if name == "before" else nullcontext():
                figures[f"held-out loss {name}"] = trainer.evaluate(metric_key_prefix=name)[f"{name}_loss"]
                if distributed.is_first() and not distributed.is_sharded(model):
                    rates = answer_rates(self.falcon, self.held_out or (), chosen.answers, chosen.context or 0)
                    figures |= {f"{key} {name}": value for key, value in rates.items()}
        return figures

    def _save(self, trainer: AdapterTrainer) -> None:
        """The adapter, under its name once it is whole; measuring comes after, and may fail."""
        unfinished, final = self.directory / "adapter.unfinished", self.directory / "adapter"
        if distributed.is_first():
            shutil.rmtree(unfinished, ignore_errors=True)
        trainer._save(str(unfinished))
        if distributed.is_first():
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)

    def _write_down(self, trainer: AdapterTrainer, figures: Mapping[str, float]) -> None:
        """The card, then the record, with which the run is finished."""
        adapter = self.directory / "adapter"
        if distributed.is_first():
            record = {
                "base": self.falcon.name,
                "base_fingerprint": self._fingerprint,
                "chat_format": self.falcon.chat_format.name,
                "settings": asdict(self.settings),
                "figures": dict(figures),
                "history": trainer.state.log_history,
            }
            form, name = self.falcon.chat_format, self.directory.resolve().name
            text = card(self.falcon.name, name, form, self.train, self.settings, figures)
            (adapter / "README.md").write_text(text, encoding="utf-8")
            (adapter / "unfinished.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            (adapter / "unfinished.json").rename(adapter / RECORD)
        trainer.accelerator.wait_for_everyone()
