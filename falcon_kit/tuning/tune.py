"""`tune`: documents become an adapter, with a plan first, checkpoints on the way, and figures before and after.

The same call runs on a CPU, on a GPU and, with `torchrun`, in several processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback

from falcon_kit.display.errors import check_flags, is_out_of_memory, plain_scalar, require
from falcon_kit.display.warning import warn
from falcon_kit.generation.training import in_training
from falcon_kit.loading.falcon import Falcon
from falcon_kit.loading.merging import random_state_kept, unchanged, without_peft_warning
from falcon_kit.loading.quantization import is_quantised, unpacked
from falcon_kit.model.checks import live_spec
from falcon_kit.planning.plan import Plan
from falcon_kit.tuning import checkpoint_files, distributed, run_folder
from falcon_kit.tuning.callbacks import check_callbacks
from falcon_kit.tuning.checks import check_model, check_same_vocabulary, settings_of_rows
from falcon_kit.tuning.data import Documents, dialogues
from falcon_kit.tuning.measure import GENERATED, answer_rates, short_rows
from falcon_kit.tuning.memory_plan import out_of_memory, plan_training
from falcon_kit.tuning.packing import Packed, check_falcon, collate, pack
from falcon_kit.tuning.progress import TuningProgress, show_plan
from falcon_kit.tuning.runs import TuningRun
from falcon_kit.tuning.settings import Tuning
from falcon_kit.tuning.trainer import AdapterTrainer, arguments


def tune(
    falcon: Falcon,
    data: Any,
    *,
    output_dir: str | Path | None = None,
    held_out: Any = None,
    resume: bool = True,
    web_text: Any = None,
    force: bool = False,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> TuningRun:
    """Trains a LoRA adapter on documents; on a quantised model, this is QLoRA.

    data: the result of `fk.dialogues`, `fk.mix` or `fk.pack`, or an argument of `fk.dialogues`.
    output_dir: the folder for checkpoints and the adapter, which all machines share. An interrupted run is resumed to
        the same adapter (up to rounding with more than two copies, whose gradients DDP adds in another order). Unset, a
        folder in ./runs, named by model, data and settings: the same call resumes or returns the finished run.
    held_out: what to measure with: a share of the documents (packed rows are not split), or separate data as in `data`.
        Stop rate and exact answers are measured unless it is packed or the weights are sharded.
    resume: False starts over.
    web_text: what shows that the model forgets, as in `data`, or texts; unset, 8 generated ones about animals.
    force: train although the plan does not fit. quiet: no plan, progress bar, loss curve or verdict.
    callbacks: your own of transformers' Trainer, such as `WandbCallback()`; a run that is finished already calls none.
    settings: the fields of `falcon_kit.Tuning`, named as in LoraConfig and TrainingArguments: r, learning_rate, ...

    The Falcon is unchanged afterwards, unless it was sharded; `fk.merge(run.adapter, falcon)` returns a tuned one.
    After Ctrl-C the step is finished and saved first; a second Ctrl-C interrupts at once.
    Raises, in all of several processes if it is before the training:
    TypeError: for an unknown setting.
    ValueError: for nothing to train on, a model with adapters, settings out of range or unlike the rows' or the run's.
    NotEnoughMemory: where the plan does not fit.
    FloatingPointError: for a loss that is not finite.
    BlockingIOError: while another run writes in output_dir.
    RuntimeError: while another thread trains the model; until this call ends, it answers no other thread.
    OSError: where a checkpoint cannot be saved (earlier ones stay complete) or processes do not share output_dir.
    """
    check_falcon(falcon)
    _check_options(output_dir, callbacks, resume=resume, force=force, quiet=quiet)
    held_out = plain_scalar(held_out)
    if isinstance(held_out, float | int):
        settings["held_out"] = held_out = float(held_out)
    settings = settings_of_rows(data, settings) if isinstance(data, Packed) else settings
    chosen = Tuning(**settings).for_model(live_spec(falcon.spec, falcon.model))
    check_model(falcon, chosen)
    prepared = _prepared(falcon, chosen, force, data, held_out, web_text)
    run = _Run(falcon, chosen, output_dir=output_dir, quiet=quiet, callbacks=callbacks, **prepared)
    with in_training(falcon.model), run.held(resume), _restored(falcon), unpacked(falcon.model):
        return run()


def _check_options(output_dir: str | Path | None, callbacks: Any, **flags: Any) -> None:
    check_flags(**flags)
    check_callbacks(callbacks)
    require(output_dir is None or bool(str(output_dir).strip()), "output_dir is empty: give a folder, or leave it out")


def _prepared(falcon: Falcon, settings: Tuning, force: bool, data: Any, held_out: Any, web_text: Any) -> dict[str, Any]:
    """The fields of `_Run` with the memory plan, and with the rows to train on and to measure with.

    An error of one process is raised in all.
    """
    on_cpu = distributed.computes_on_cpu(falcon.model, settings.shard)
    distributed.join_group(on_cpu)
    with distributed.together():
        planned = plan_training(falcon, settings, force)
        documents, held_out = _split(data, held_out, settings)
        packed = partial(pack, falcon=falcon, context=settings.context, together=settings.packing)
        train = documents if isinstance(documents, Packed) else packed(documents)
        instead = "a larger context, or other documents; where held_out is a share, another seed draws others"
        with _named("the held-out documents", instead):
            test = packed(held_out) if isinstance(held_out, Documents) else held_out
        with _named("web_text", "plain texts, or shorter conversations"):
            web = None if web_text is None else short_rows(web_text, falcon)
        check_same_vocabulary(falcon, train, test, web)
    rows = {"train": train, "test": test, "test_documents": held_out, "web_text": web}
    return {"on_cpu": on_cpu, "plan": planned, **rows}


@contextmanager
def _named(what: str, instead: str) -> Iterator[None]:
    """Says of which documents an error is, since it is the same for those that are trained on."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what} cannot be measured with: {error}. Give {instead}") from error


def _split(data: Any, held_out: Any, settings: Tuning) -> tuple[Documents | Packed, Documents | Packed | None]:
    """The documents to train on and the held-out ones."""
    data = data if isinstance(data, Packed) else dialogues(data)
    require(len(data) > 0, "there is nothing to train on: the data have no rows")
    if isinstance(held_out, Packed):
        if settings.answers:
            warn("held_out is packed, so only its loss is measured: for stop rate and exact answers give the Documents")
        return data, held_out
    if held_out is not None and not isinstance(held_out, float):
        return data, dialogues(held_out)
    if isinstance(data, Packed):
        wanted = "patience needs the held-out loss" if settings.patience else f"held_out={held_out}"
        require(
            not (settings.patience or held_out),
            f"{wanted}, and packed rows are not split: give held_out=Documents, such as one part of "
            "documents.split(0.05), or the documents themselves instead of fk.pack's rows",
        )
        return data, None
    if not settings.held_out:
        return data, None
    require(
        len(data) > 1,
        "there is one document, so none can be held out to measure with: give more, or held_out=0 to train on this one",
    )
    return data.split(settings.held_out, settings.seed)


@contextmanager
def _restored(falcon: Falcon) -> Iterator[None]:
    """Turns gradients on; after the block, the random states, the model and its `use_cache` are as they were."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  # the Trainer seeds the old generator
    use_cache, checkpointed = falcon.model.config.use_cache, falcon.model.is_activation_checkpointing
    with random_state_kept(falcon.model), torch.enable_grad(), unchanged(falcon.model):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            falcon.model.config.use_cache = use_cache  # the Trainer sets it to False
            if not checkpointed:
                falcon.model.activation_checkpointing_disable()


def _new_adapter(falcon: Falcon, settings: Tuning) -> PeftModel:
    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT accepts a float
        lora_dropout=settings.lora_dropout or 0.0,
        target_modules=list(settings.target_modules),
        task_type="CAUSAL_LM",
    )
    with without_peft_warning():
        model: PeftModel = get_peft_model(falcon.model, config)
    model.peft_config["default"].base_model_name_or_path = falcon.name
    return model


@dataclass(frozen=True)
class _Run:
    """One call of `tune`."""

    falcon: Falcon
    settings: Tuning
    plan: Plan
    output_dir: str | Path | None
    train: Packed
    test: Packed | None
    test_documents: Documents | Packed | None
    web_text: Packed | None
    quiet: bool
    callbacks: Sequence[TrainerCallback]
    on_cpu: bool

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return run_folder.identity(self.falcon, self.settings, self.train, self.test, self.web_text)

    @cached_property
    def directory(self) -> Path:
        """The folder of the run: output_dir, or one that is named after what determines the run."""
        if self.output_dir is None:
            return run_folder.default_output_dir(self.falcon.spec.name, self._identity)
        return Path(self.output_dir).expanduser()

    @contextmanager
    def held(self, resume: bool) -> Iterator[None]:
        """Prepares output_dir, which all processes share; rank 0 keeps other runs out of it."""
        with distributed.together():
            identity = self._identity
        run_folder.check_same_everywhere(distributed.gathered(identity))
        with ExitStack() as stack:
            with distributed.together():
                if distributed.is_rank0():
                    stack.enter_context(run_folder.locked(self.directory))
            distributed.check_shared(self.directory)
            distributed.on_rank0(partial(run_folder.prepare_output_dir, self.directory, identity, resume))
            yield

    def __call__(self) -> TuningRun:
        self._show_plan()
        run = self._finished() or self._trained()
        self._tell(run.verdict)
        return run

    def _finished(self) -> TuningRun | None:
        """The result of a run that was finished before; None if there is none."""
        record = distributed.on_rank0(partial(run_folder.read_record, self.directory))
        if record is None:
            return None
        self._tell(f"This run is finished: its result is read from {self.directory}. resume=False trains it again")
        return self._result(record["history"], record["figures"])

    def _trained(self) -> TuningRun:
        model = _new_adapter(self.falcon, self.settings)
        trainer = self._trainer(model)
        self._train(trainer)
        run_folder.save_adapter(trainer, self.directory)  # first, since measuring may fail
        figures = self._measure(trainer, model)
        run = self._result(trainer.state.log_history, figures)
        distributed.on_rank0(partial(run_folder.write_record, run, self._identity["base"]))
        return run

    def _show_plan(self) -> None:
        sharded = self._sharded  # every process has to ask
        if not distributed.is_rank0():
            return
        if not self.quiet:
            show_plan(self.plan, distributed.world_size() if sharded else 1)
        if sharded and self.settings.answers and isinstance(self.test_documents, Documents):
            warn(
                "the weights are sharded, so no held-out answer is generated: stop rate and exact answers are not "
                "measured"
            )

    def _tell(self, line: str) -> None:
        if distributed.is_rank0() and not self.quiet:
            tqdm.write(line)

    def _result(self, history: list[dict[str, float]], figures: Mapping[str, float]) -> TuningRun:
        adapter = self.directory / "adapter"
        return TuningRun(adapter, self.falcon, self.settings, self.plan, self.train, tuple(history), figures)

    def _trainer(self, model: PeftModel) -> AdapterTrainer:
        evaluated = self.test is not None
        options = arguments(self.settings, self.directory, self.falcon.model, len(self.train), evaluated, self.on_cpu)
        distributed.check_processes(options.world_size, distributed.world_size())
        if self._sharded:
            distributed.shard(model, self.falcon.model.transformer.h, options.device.type)
        given = {"eval_dataset": self.test, "data_collator": collate, "callbacks": [*self.callbacks]}
        trainer = AdapterTrainer(model, options, self.train, **given)
        if self.settings.patience:
            trainer.add_callback(EarlyStoppingCallback(self.settings.patience))
        return trainer

    @cached_property
    def _sharded(self) -> bool:
        """The setting `shard`; by default, whether a copy does not fit on the GPU of rank 0."""
        if self.settings.shard is not None:
            return self.settings.shard
        if distributed.world_size() == 1 or is_quantised(self.falcon.model):
            return False
        if self.falcon.model.device.type == "cpu" and torch.cuda.is_available():
            return True  # the model was loaded into host memory to be sharded
        return distributed.broadcast_from_rank0(not self.plan.fits)

    def _train(self, trainer: AdapterTrainer) -> None:
        progress = TuningProgress(trainer, shown=distributed.is_rank0() and not self.quiet)
        trainer.add_callback(progress)
        try:
            trainer.train_or_resume()
        except KeyboardInterrupt:
            if distributed.is_rank0():
                last = checkpoint_files.last_complete(self.directory)
                step = checkpoint_files.step_of(last) if last else 0
                tqdm.write(
                    f"Interrupted: fk.tune with resume=True, the default, resumes from step {step} of "
                    f"{trainer.state.max_steps}"
                )
            raise
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise out_of_memory(error, self.falcon, self.settings, self.plan) from error
            raise
        finally:
            progress.close()

    def _measure(self, trainer: AdapterTrainer, model: PeftModel) -> dict[str, float]:
        name_of_text = "generated-text loss" if self.web_text is None else "web-text loss"
        text = self.web_text or short_rows(GENERATED, self.falcon)
        figures: dict[str, float] = {}
        for name in ("before", "after"):
            with model.disable_adapter() if name == "before" else nullcontext():
                measured = self._held_out_figures(trainer, model, name)
                measured[name_of_text] = trainer.evaluate(text, metric_key_prefix=f"text_{name}")[f"text_{name}_loss"]
            figures |= {f"{key} {name}": value for key, value in measured.items()}
        return figures

    def _held_out_figures(self, trainer: AdapterTrainer, model: PeftModel, name: str) -> dict[str, float]:
        """Loss, stop rate and exact answers on the held-out documents; empty without any."""
        if self.test is None:
            return {}
        figures = {"held-out loss": trainer.evaluate(metric_key_prefix=name)[f"{name}_loss"]}
        documents = self.test_documents
        if isinstance(documents, Documents) and not distributed.is_sharded(model):
            answers, context = self.settings.answers, self.settings.context or 0
            rates = partial(answer_rates, self.falcon, documents, answers, context)
            figures |= distributed.on_rank0(rates)
        return figures
