"""transformers' Trainer for adapters: the loss in chunks, checkpoints that are whole or absent, a watch over it all.

What is added to the Trainer: the kit's loss, checkpoints under a temporary name until they are complete, evaluation
weighted by token, and an end with a reason where the loss is not a number or adapters get no gradient.
"""

import json
import math
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from falcon_kit.loading.merging import is_quantised
from falcon_kit.model.losses import IGNORED
from falcon_kit.tuning import distributed
from falcon_kit.tuning.packing import Packed
from falcon_kit.tuning.settings import Tuning

KEPT = 2
"""Checkpoints that stay, beside the best one: the last, and the one before it."""
_UNFINISHED = "unfinished"
_FILES = "files.json"
"""Last in a checkpoint: its files and their sizes, by which one that was copied in part is told from a whole one."""


class AdapterTrainer(Trainer):
    """Trains the adapters of a PEFT model on packed rows."""

    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, model: Any, args: TrainingArguments, train: Packed, **options: Any) -> None:
        super().__init__(model=model, args=args, train_dataset=train, **options)
        self.remove_callback(PrinterCallback)
        self.packed = train
        self.tokens_read = 0
        """Tokens of documents in the batches so far, in this process."""
        self._run_directory = Path(str(args.output_dir))
        self._writing_to = self._run_directory
        self._interrupted = False
        # Sharded weights take the way of models that were sharded while they were loaded: no copy, no second sharding.
        self.is_distributed_loading_by_transformers = distributed.is_sharded(model)

    def train_or_resume(self) -> None:
        """Trains from the last checkpoint on, or from the start; after the last step, only reads what it came to."""
        last = self.last()
        self._warn_of_newer(last)
        if last is not None:
            state = TrainerState.load_from_json(str(last / "trainer_state.json"))
            if _is_over(state):  # the Trainer would take one step more
                self.state = state
                self._read(self._best(state) or last)
                return
        with self._defer_interrupts():
            self.train(resume_from_checkpoint=str(last) if last else None)

    def _read(self, checkpoint: Path) -> None:
        """The adapter of a checkpoint, to train no further."""
        self.create_optimizer()
        self._load_from_checkpoint(str(checkpoint), self.model)
        if distributed.is_sharded(self.model):
            distributed.load_shards(self.model, self.optimizer, checkpoint / "shards")

    def _best(self, state: TrainerState) -> Path | None:
        """Where patience was set, the checkpoint with the lowest held-out loss."""
        if not (self.args.load_best_model_at_end and state.best_model_checkpoint):
            return None
        best = self._run_directory / Path(state.best_model_checkpoint).name  # the folder may have moved
        if not _is_whole(best):
            raise OSError(f"the best adapter, {best}, is not whole: copy it here again, or resume=False starts over")
        return best

    @contextmanager
    def _defer_interrupts(self) -> Iterator[None]:
        """Ctrl-C waits for the end of a step, where a checkpoint can be written; a second one does not wait.

        Only in a single process: several would each stop at another step, and wait for each other.
        """
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not usual or distributed.world_size() > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
            if self._interrupted:  # after the last step
                raise KeyboardInterrupt
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _interrupt(self, *_: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True

    def _maybe_log_save_evaluate(self, *given: Any, **options: Any) -> None:
        super()._maybe_log_save_evaluate(*given, **options)
        if self._interrupted:
            if not _is_whole(self._run_directory / f"checkpoint-{self.state.global_step}"):
                self._save_checkpoint(self.model, None)
            raise KeyboardInterrupt

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """The loss of one batch; FloatingPointError, which names the documents, where it is not a number."""
        rows = inputs.pop("rows").tolist()
        computed = super().compute_loss(model, {**inputs, "skip_logits": True}, *args, **options)
        loss = computed[0] if isinstance(computed, tuple) else computed
        if not math.isfinite(loss.item()):
            raise FloatingPointError(self._not_a_number(loss.item(), rows))
        self.tokens_read += sum(self.packed.lengths[each] for row in rows for each in self.packed.rows[row])
        return computed

    def _not_a_number(self, loss: float, rows: Sequence[int]) -> str:
        places = [place for row in rows for place in self.packed.places(row)]
        kept = f"the adapter of step {kept.name.rpartition('-')[2]} is in {kept}" if (kept := self.last()) else ""
        return (
            f"the loss is {loss} at step {self.state.global_step + 1}, in the batch of rows {rows}, made from "
            f"{', '.join(places[:6])}{' and more' if len(places) > 6 else ''}: look at these documents, or take "
            f"a lower learning_rate; float16 overflows where bfloat16 does not. {kept or 'Nothing was saved yet'}"
        )

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """The mean loss of a token over all rows held out, each row once however many processes there are."""
        self.model.eval()
        parts = []
        for inputs in self.get_eval_dataloader():
            given = self._prepare_inputs(inputs)
            count = (given["labels"][:, 1:] != IGNORED).sum()
            rows = given.pop("rows")
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.model_wrapped(**given, skip_logits=True, num_items_in_batch=1).loss
            parts.append(torch.stack([each.float() for each in (rows[0], loss, count)]))
        every = self.accelerator.gather(torch.stack(parts)).cpu()
        once = {int(row): (loss, count) for row, loss, count in every.tolist()}
        mean = sum(loss for loss, _ in once.values()) / sum(count for _, count in once.values())
        metrics = {f"{metric_key_prefix}_loss": mean}
        self.log(dict(metrics))
        if metric_key_prefix == "eval":  # patience has no use for what is measured before and after
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: transformers would go through all parameters at every step."""
        return 0

    def _clip_grad_norm(self, model: Any) -> Any:
        norm: Any = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _defer_fsdp_gradient_reduction(self) -> Any:
        return distributed.without_reduction(self.model)

    # Checkpoints

    def last(self) -> Path | None:
        """The newest whole checkpoint; None if there is none."""
        return next(filter(_is_whole, self._checkpoints()), None)

    def _checkpoints(self) -> list[Path]:
        """All of them, the newest first."""
        found = [each for each in self._run_directory.glob("checkpoint-*") if re.fullmatch(r"\w+-\d+", each.name)]
        return sorted(found, key=_step, reverse=True)

    def _warn_of_newer(self, last: Path | None) -> None:
        newer = [each for each in self._checkpoints() if last is None or _step(each) > _step(last)]
        if newer:
            warnings.warn(
                f"{newer[0]} is not whole: files are missing, or were copied in part. Going on from "
                f"{last or 'the start'}; to go on from there, interrupt and copy it here again",
                stacklevel=2,
            )

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing_to)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a checkpoint under another name, then gives it its own: it is whole, or not there."""
        unfinished, first = self._run_directory / _UNFINISHED, self.args.should_save
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._writing_to = unfinished
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:  # torch says RuntimeError where a file cannot be written
            raise self._not_saved(error) from error
        finally:
            self._writing_to = self._run_directory
        self.accelerator.wait_for_everyone()
        name = f"checkpoint-{self.state.global_step}"
        if best := self.state.best_model_checkpoint:
            self.state.best_model_checkpoint = str(self._run_directory / Path(best).name)
        if first:
            self.state.save_to_json(str(unfinished / name / "trainer_state.json"))
            _write_files(unfinished / name)
            shutil.rmtree(self._run_directory / name, ignore_errors=True)
            (unfinished / name).rename(self._run_directory / name)
            unfinished.rmdir()
            for each in list(filter(_is_whole, self._checkpoints()))[KEPT:]:
                if str(each) != self.state.best_model_checkpoint:
                    shutil.rmtree(each, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _not_saved(self, error: Exception) -> OSError:
        kept = self.last()
        shutil.rmtree(self._run_directory / _UNFINISHED, ignore_errors=True)
        left = f"{kept} is whole, and the same call goes on from there" if kept else "no earlier checkpoint was saved"
        return OSError(
            f"step {self.state.global_step} could not be saved in {self._run_directory} ({error}): make room; {left}"
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter alone; no pickled arguments, no tokenizer."""
        directory = str(output_dir or self.args.output_dir)
        if distributed.is_sharded(self.model):
            state_dict = distributed.whole_adapter(self.model)
        if self.args.should_save:
            self.model.save_pretrained(directory, state_dict=state_dict, save_embedding_layers=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if distributed.is_sharded(self.model):
            distributed.save_shards(self.model, self.optimizer.optimizer, Path(output_dir) / "shards")
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not distributed.is_sharded(self.model):  # shards are read with the optimizer's
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not distributed.is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        distributed.load_shards(self.model, self.optimizer.optimizer, Path(checkpoint) / "shards")
        state = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(state)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _write_files(checkpoint: Path) -> None:
    files = [each for each in checkpoint.rglob("*") if each.is_file()]
    sizes = {str(each.relative_to(checkpoint)): each.stat().st_size for each in files}
    (checkpoint / _FILES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def _is_whole(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are there, in the size they were written."""
    try:
        sizes = json.loads((checkpoint / _FILES).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _is_over(state: TrainerState) -> bool:
    """Whether the last step was taken, or patience ran out."""
    held: Any = state.stateful_callbacks or {}
    stopped = held.get("TrainerControl", {}).get("args", {}).get("should_training_stop", False)
    return stopped or state.global_step >= state.max_steps


def arguments(chosen: Tuning, directory: Path, model: Any, rows: int, evaluated: bool, cpu: bool) -> TrainingArguments:
    """The settings in the Trainer's words, for `rows` rows to train on."""
    dtype = model.dtype
    per_step = chosen.batch * chosen.accumulate * distributed.world_size()
    steps = chosen.max_steps or max(1, round(chosen.epochs * rows / per_step))
    every = chosen.evaluate_every or max(1, steps // 10)
    options = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=chosen.batch,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=chosen.accumulate,
        num_train_epochs=chosen.epochs,
        max_steps=chosen.max_steps or -1,
        learning_rate=chosen.learning_rate or 0.0,
        lr_scheduler_type=chosen.schedule,
        warmup_steps=chosen.warmup,
        max_grad_norm=chosen.max_grad_norm,
        optim="paged_adamw_32bit" if is_quantised(model) and not cpu else "adamw_torch",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        activation_checkpointing=chosen.checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        eval_strategy="steps" if evaluated else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every if chosen.patience else chosen.save_every or max(1, steps // 10),
        restore_callback_states_from_checkpoint=True,  # how long patience has waited already
        save_total_limit=None,  # AdapterTrainer sees to it, once a checkpoint is whole
        load_best_model_at_end=bool(chosen.patience),
        metric_for_best_model="eval_loss" if chosen.patience else None,
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not a number ends the run instead
        seed=chosen.seed,
        data_seed=chosen.seed,
        use_cpu=cpu,
        dataloader_pin_memory=not cpu,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to="none",
    )
    # The Trainer would copy the model to every GPU it sees (DataParallel); a process uses the ones its model is on.
    _ = options.device  # counts the GPUs, once
    options._n_gpu = min(1, options.n_gpu)
    return options
