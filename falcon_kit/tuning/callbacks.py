"""Callbacks of the Trainer: Ctrl-C saves the step first; a run resumes in any folder; no gradient is an error."""

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from falcon_kit.display.errors import shown
from falcon_kit.tuning import distributed


def check_callbacks(callbacks: Any) -> None:
    """Raises TypeError for anything but a list of callbacks."""
    several = isinstance(callbacks, list | tuple)
    wrong = [each for each in callbacks if not isinstance(each, TrainerCallback)] if several else [callbacks]
    if wrong:
        raise TypeError(f"callbacks must be a list of transformers' TrainerCallback objects, got {shown(wrong[0])}")


class DeferredInterrupt(TrainerCallback):
    """Ctrl-C raises KeyboardInterrupt at the end of the step, after a checkpoint was saved; a second one at once."""

    def __init__(self) -> None:
        self._interrupted = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """Handles SIGINT within the block, in a single process: several processes would stop at different steps."""
        default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        in_main_thread = threading.current_thread() is threading.main_thread()
        if not default or not in_main_thread or distributed.world_size() > 1:
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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Requests a checkpoint after an interrupt."""
        control.should_save = control.should_save or self._interrupted

    on_evaluate = on_step_end

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt


class Resumed(TrainerCallback):
    """What a resumed run takes from this call instead of the checkpoint: the folder, and the steps between events."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Names the best checkpoint by the folder's present path: transformers forgets one whose path has changed."""
        state.compute_steps(args, state.max_steps)
        if state.best_global_step:
            state.best_model_checkpoint = str(Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}")


class GradientCheck(TrainerCallback):
    """Raises RuntimeError before the first step if adapters get no gradient, so that nothing would be learned."""

    def __init__(self) -> None:
        self._checked = False

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        """Checks once that every adapter has a gradient, and that those of the B matrices are not all zero."""
        if self._checked:
            return
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        if without := [name for name, each in trained.items() if each.grad is None]:
            raise RuntimeError(
                f"{len(without)} of {len(trained)} adapter weights get no gradient, such as {without[0]}, so nothing "
                "would be learned"
            )
        norms = {name: float(_norm(each.grad)) for name, each in trained.items()}
        if not all(map(math.isfinite, norms.values())):  # float16 overflowed: its scaler skips this step
            return
        self._checked = True
        if not any(norm > 0 for name, norm in norms.items() if "lora_B" in name):
            raise RuntimeError(
                f"the gradients of all {len(trained)} adapter weights are zero, so nothing would be learned"
            )


def _norm(gradient: Any) -> Tensor:
    """The norm of a gradient, which may be sharded."""
    norm: Any = gradient.norm()
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
