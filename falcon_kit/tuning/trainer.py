"""transformers' Trainer for adapters, and its arguments from the settings of a run.

It differs from the Trainer in four points: the kit's loss in chunks, with an error where it is not finite; evaluation
weighted by token; checkpoints that are complete or absent; shards of the weights and of the optimizer's state.
"""

import errno
import math
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from falcon_kit.display.errors import is_out_of_memory, printable
from falcon_kit.display.reading import UNEXPECTED
from falcon_kit.display.saving import check_disk_space, remove, remove_quietly
from falcon_kit.loading.adapters import write_errors
from falcon_kit.loading.quantization import is_quantised
from falcon_kit.model.losses import IGNORED
from falcon_kit.tuning import checkpoint_files, distributed
from falcon_kit.tuning.callbacks import DeferredInterrupt, GradientCheck, Resumed
from falcon_kit.tuning.packing import Packed
from falcon_kit.tuning.settings import Tuning
from falcon_kit.tuning.shards import load_shards, save_shards


class AdapterTrainer(Trainer):
    """Trains the adapter of a PEFT model on packed rows."""

    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, model: Any, args: TrainingArguments, train: Packed, **options: Any) -> None:
        super().__init__(model=model, args=args, train_dataset=train, **options)
        if distributed.world_size() == 1:
            self.accelerator.device_placement = False  # accelerate would move the model too
        self.packed = train
        self.tokens_read = 0
        """Tokens of documents in the batches so far, in this process."""
        self._run = Path(str(args.output_dir))
        self._interrupt = DeferredInterrupt()
        self.remove_callback(PrinterCallback)
        self.add_callback(self._interrupt)
        self.add_callback(Resumed())
        self.add_callback(GradientCheck())
        # So the Trainer neither copies a sharded model (DDP) nor shards it again.
        self.is_distributed_loading_by_transformers = distributed.is_sharded(model)

    def train_or_resume(self) -> None:
        """Trains from the last complete checkpoint or from the start; a run that is over only loads its adapter."""
        name = distributed.on_rank0(self._last_complete)  # other machines may see it later
        last = self._run / name if name else None
        if last is not None:
            with _damage_named(last):
                state = TrainerState.load_from_json(str(last / "trainer_state.json"))
            best = self._best(state)
            if _is_over(state):  # the Trainer would train one more step
                self.state = state
                self._load_adapter(best or last)
                return
        with self._interrupt.active():
            self.train(resume_from_checkpoint=str(last) if last else None)

    def _last_complete(self) -> str | None:
        checkpoint_files.warn_of_incomplete(self._run)
        last = checkpoint_files.last_complete(self._run)
        return last.name if last else None

    def _load_adapter(self, checkpoint: Path) -> None:
        if distributed.is_sharded(self.model):
            self.create_optimizer()
            with _damage_named(checkpoint):
                load_shards(self.model, self.optimizer, checkpoint / "shards")
        else:
            self._load_from_checkpoint(str(checkpoint))

    def _best(self, state: TrainerState) -> Path | None:
        """With patience, the checkpoint of the lowest held-out loss."""
        if not (self.args.load_best_model_at_end and state.best_global_step):
            return None
        best = self._run / f"checkpoint-{state.best_global_step}"
        if not checkpoint_files.is_complete(best):
            raise OSError(
                f"the best checkpoint, {best}, is incomplete: copy it here again, or start over: resume=False"
            )
        return best

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """The loss of one batch; FloatingPointError with the places of its documents if it is not finite.

        The Trainer adds up losses on its own device, which need not be the one of the model's head.
        """
        rows = inputs.pop("rows").tolist()
        loss: Any = super().compute_loss(model, {**inputs, "skip_logits": True}, *args, **options)
        if not math.isfinite(value := loss.item()):
            raise FloatingPointError(self._not_finite(value, rows))
        self.tokens_read += sum(self.packed.lengths[each] for row in rows for each in self.packed.rows[row])
        return loss.to(self.args.device)

    def _not_finite(self, loss: float, rows: Sequence[int]) -> str:
        places = [place for row in rows for place in self.packed.places(row)]
        last = checkpoint_files.last_complete(self._run)
        saved = f"The adapter of step {checkpoint_files.step_of(last)} is in {last}" if last else "Nothing was saved"
        return (
            f"the loss is {loss} at step {self.state.global_step + 1}, in the batch of rows {rows}, made from "
            f"{', '.join(places[:6])}{' and more' if len(places) > 6 else ''}: check these documents, or take "
            f"a lower learning_rate; float16 overflows where bfloat16 does not. {saved}"
        )

    def evaluate(
        self, eval_dataset: Any = None, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> dict[str, float]:
        """The mean loss per token of all held-out rows; each row counts once, with any number of processes."""
        self.model.eval()
        parts = []
        for inputs in self.get_eval_dataloader(eval_dataset):
            batch = dict(inputs)
            count = (batch["labels"][:, 1:] != IGNORED).sum()
            rows = batch.pop("rows")
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.model_wrapped(**batch, skip_logits=True, num_items_in_batch=1, return_dict=True).loss
            parts.append(torch.stack([each.to(self.args.device, torch.float32) for each in (rows[0], loss, count)]))
        gathered = self.accelerator.gather(torch.stack(parts)).cpu()
        by_row = {int(row): (loss, count) for row, loss, count in gathered.tolist()}
        mean = sum(loss for loss, _ in by_row.values()) / sum(count for _, count in by_row.values())
        metrics = {f"{metric_key_prefix}_loss": mean}
        self.log(dict(metrics))
        if metric_key_prefix == "eval":  # patience must not count the losses before and after the run
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: transformers would iterate over all parameters at every step."""
        return 0

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Within the block, shards accumulate gradients; the Trainer's own needs config.distributed_config."""
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    # Checkpoints

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the trained weights; of a sharded model, those of all processes."""
        return sum(each.nbytes for each in self.model.parameters() if each.requires_grad)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the adapter alone, without pickled arguments and tokenizer. Every process has to call it.

        PEFT would read all weights first, which unpacks those in 4 bits: a second copy of the model.
        """
        state = distributed.gathered_adapter(self.model)
        if self.args.should_save:
            with write_errors():
                self.model.save_pretrained(output_dir, state_dict=state, save_embedding_layers=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves a checkpoint in the folder `unfinished`, then moves it: it is complete or absent."""
        unfinished, is_writer = self._run / checkpoint_files.UNFINISHED, self.args.should_save
        with self._failures_named():
            if is_writer:
                remove(unfinished)
            check_disk_space(unfinished, 3 * self.adapter_bytes)  # with the two moments of the optimizer
        self.args.output_dir = str(unfinished)
        try:
            with self._failures_named():
                super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(self._run)
        if best := self.state.best_model_checkpoint:
            self.state.best_model_checkpoint = str(self._run / Path(best).name)
        with self._failures_named():
            if is_writer:
                checkpoint = unfinished / f"checkpoint-{self.state.global_step}"
                self.state.save_to_json(str(checkpoint / "trainer_state.json"))
                checkpoint_files.publish(checkpoint, self._run, self.state.best_model_checkpoint)

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        """Raises an error of one process in all; it names the step that was not saved and the last whole checkpoint."""
        with distributed.together():
            try:
                yield
            except (OSError, RuntimeError) as error:  # torch raises RuntimeError if a file cannot be written
                last = checkpoint_files.last_complete(self._run)
                remove_quietly(self._run / checkpoint_files.UNFINISHED)
                saved = f"{last} is complete, and fk.tune resumes from it" if last else "no checkpoint was saved before"
                full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
                space = ": free some space" if full or "PytorchStreamWriter" in str(error) else ""
                raise OSError(
                    f"step {self.state.global_step} could not be saved in {self._run} ({error}){space}; {saved}"
                ) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not distributed.is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_shards(self.model, self.optimizer.optimizer, Path(output_dir) / "shards")
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not distributed.is_sharded(self.model):  # shards of weights are loaded with those of the optimizer
            with _damage_named(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _damage_named(checkpoint):
            if checkpoint is None or not distributed.is_sharded(self.model):
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            load_shards(self.model, self.optimizer.optimizer, Path(checkpoint) / "shards")
            state = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
            self.lr_scheduler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _damage_named(checkpoint):
            super()._load_rng_state(checkpoint)


@contextmanager
def _damage_named(checkpoint: str | Path | None) -> Iterator[None]:
    """Names the checkpoint in an error about its content; torch's own advises to read any pickle."""
    try:
        yield
    except (*UNEXPECTED, AssertionError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        if is_out_of_memory(error):
            raise
        reason = printable(f"{type(error).__name__}: {error}".partition(". ")[0])
        raise ValueError(
            f"{checkpoint} is damaged ({reason}): delete it, and the same call resumes from the checkpoint before it, "
            "or from the start"
        ) from error


def _is_over(state: TrainerState) -> bool:
    """Whether the last step was done, or patience stopped the run."""
    callbacks: Any = state.stateful_callbacks or {}
    stopped = callbacks.get("TrainerControl", {}).get("args", {}).get("should_training_stop", False)
    return stopped or state.global_step >= state.max_steps


class _Arguments(TrainingArguments):
    """The Trainer's arguments, with which it leaves a model where it is (on any GPU, or on several) and changes it."""

    @property
    def place_model_on_device(self) -> bool:
        return False

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """At least one step is after the warmup, whose first step has a rate of 0: a run of one step has none."""
        return int(min(super().get_warmup_steps(num_training_steps), num_training_steps - 1))


def arguments(
    settings: Tuning, directory: Path, model: Any, rows: int, evaluated: bool, cpu: bool
) -> TrainingArguments:
    """The Trainer's arguments for a run on `rows` rows. evaluated: whether held-out losses are computed."""
    dtype = model.dtype
    per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * distributed.world_size()
    steps = settings.max_steps or max(1, round(settings.num_train_epochs * rows / per_step))
    every = settings.eval_steps or max(1, steps // 10)
    options = _Arguments(
        output_dir=str(directory),
        per_device_train_batch_size=settings.per_device_train_batch_size,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate or 0.0,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_ratio,  # below 1, it is a share
        max_grad_norm=settings.max_grad_norm,
        optim="paged_adamw_32bit" if is_quantised(model) and not cpu else "adamw_torch",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        eval_strategy="steps" if evaluated else "no",
        eval_steps=every,
        save_steps=every if settings.patience else settings.save_steps or max(1, steps // 10),
        restore_callback_states_from_checkpoint=True,  # patience counts on after a resume
        load_best_model_at_end=bool(settings.patience),
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not finite is an error instead
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=cpu,
        dataloader_pin_memory=not cpu,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to="none",
    )
    # With several GPUs in one process the Trainer would copy the model to each (DataParallel).
    _ = options.device  # sets n_gpu to their number, once
    options._n_gpu = min(1, options.n_gpu)
    return options
