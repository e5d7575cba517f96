"""What one sees of training while it runs: the plan before, then a progress bar and, in a notebook, the loss curve."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from importlib import import_module
from io import BytesIO
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from falcon_kit.planning.plan import Plan
from falcon_kit.tuning.runs import curve
from falcon_kit.tuning.trainer import AdapterTrainer

_SECONDS_A_PICTURE = 2.0


def show(planned: Plan) -> None:
    """The plan, before anything starts: a table in a notebook, a line elsewhere."""
    if in_notebook():
        _display(planned)
    else:
        tqdm.write(planned.verdict())


def say(line: str) -> None:
    """One line, without a tear in the bar."""
    tqdm.write(line)


def in_notebook() -> bool:
    """Whether there is a cell to show things below."""
    shell, kernel = sys.modules.get("IPython"), sys.modules.get("ipykernel.zmqshell")
    if shell is None or kernel is None:
        return False
    return isinstance(shell.get_ipython(), kernel.ZMQInteractiveShell)  # Colab's is one, under another name


def _display(shown: Any, **options: Any) -> Any:
    return import_module("IPython.display").display(shown, **options)  # which is there in every notebook


class Watch(TrainerCallback):
    """A progress bar with loss, tokens per second and time left; and whether adapters learn at all."""

    def __init__(self, trainer: AdapterTrainer, shown: bool, draw: Callable[..., None]) -> None:
        self._trainer, self._shown, self._draw = trainer, shown, draw
        self._bar: Any = None
        self._started = self._tokens = 0.0
        self._checked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar where an interrupted run left off."""
        self._started, self._tokens = time.monotonic(), self._trainer.tokens_read
        done, steps = state.global_step, state.max_steps
        self._bar = tqdm(disable=not self._shown, initial=done, total=steps, desc="Tuning", unit="step")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Once: every adapter has a gradient, and those of the B matrices, which start at zero, are not all zero."""
        if self._checked:
            return
        trained = {name: each for name, each in self._trainer.model.named_parameters() if each.requires_grad}
        without = [name for name, each in trained.items() if each.grad is None]
        norms = {name: float(_norm(each.grad)) for name, each in trained.items() if not without}
        if not all(map(math.isfinite, norms.values())):  # float16 overflowed: its scaler skips this step
            return
        self._checked = True
        if without or not any(norm > 0 for name, norm in norms.items() if "lora_B" in name):
            raise RuntimeError(
                f"{len(without)} of {len(trained)} adapter weights get no gradient"
                f"{f', such as {without[0]}' if without else ': all are zero'}, so nothing would be learned"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar."""
        self._bar.update()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Shows the loss beside it, and the speed of this process."""
        if self._bar is None or "loss" not in (logs or {}):
            return
        speed = (self._trainer.tokens_read - self._tokens) / (time.monotonic() - self._started)
        state.log_history[-1]["tokens_per_second"] = round(speed * args.world_size, 1)
        self._bar.set_postfix(loss=f"{logs['loss']:.3f}", tokens_per_second=f"{speed * args.world_size:,.0f}")
        if self._shown:
            self._draw(state.log_history)

    def close(self) -> None:
        """Leaves bar and curve as they stand."""
        if self._bar is not None:
            self._bar.close()
        if self._shown and self._trainer.state.log_history:
            self._draw(self._trainer.state.log_history, last=True)


def _norm(gradient: Any) -> Tensor:
    norm: Any = gradient.norm()
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


class Live:
    """The loss curve below the cell, drawn anew now and then while training runs."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._drawn = 0.0

    def __call__(self, logged: list[dict[str, Any]], last: bool = False) -> None:
        """Draws what was logged so far, unless it was drawn a moment ago."""
        if time.monotonic() - self._drawn < _SECONDS_A_PICTURE and not last:
            return
        page = BytesIO()
        curve(logged, "Tuning").savefig(page, format="png", dpi=72)
        picture = {"image/png": page.getvalue(), "text/plain": "the loss so far"}
        if self._handle is None:
            self._handle = _display(picture, raw=True, display_id=True)
        else:
            self._handle.update(picture, raw=True)
        self._drawn = time.monotonic()
