"""Progress of a run: the plan first, then a progress bar and, in a notebook, the loss curve."""

import time
from io import BytesIO
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState

from falcon_kit.display.live import in_notebook, show
from falcon_kit.display.tables import format_bytes
from falcon_kit.planning.plan import Plan
from falcon_kit.tuning.plots import loss_curve
from falcon_kit.tuning.trainer import AdapterTrainer

_SECONDS_BETWEEN_DRAWINGS = 2.0


def show_plan(plan: Plan, shards: int = 1) -> None:
    """Shows the memory plan, which is of one process: as a table in a notebook, as one line elsewhere.

    shards: the number of processes that hold a part of the weights each; for several, there is a line about these.
    """
    if shards > 1:
        share = format_bytes(plan.weight_bytes // shards)
        tqdm.write(f"The weights are sharded: each of {shards} processes holds {share} of {plan.dtype}")
    elif in_notebook():
        show(plan)
    else:
        tqdm.write(plan.verdict())


class TuningProgress(TrainerCallback):
    """A progress bar with loss, tokens per second and remaining time; in a notebook, the loss curve below it."""

    def __init__(self, trainer: AdapterTrainer, shown: bool) -> None:
        self._trainer, self._shown = trainer, shown
        self._bar: Any = None
        self._curve: Any = None
        self._started = self._tokens = self._drawn = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Opens the bar, at the step from which training resumes."""
        self._started, self._tokens = time.monotonic(), self._trainer.tokens_read
        done, steps = state.global_step, state.max_steps
        self._bar = tqdm(disable=not self._shown, initial=done, total=steps, desc="Tuning", unit="step")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._bar.update()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows the loss and the tokens per second of all processes, and adds these to the history."""
        if self._bar is None or "loss" not in (logs or {}):
            return
        tokens = (self._trainer.tokens_read - self._tokens) * args.world_size
        speed = tokens / (time.monotonic() - self._started)
        state.log_history[-1]["tokens_per_second"] = round(speed, 1)
        self._bar.set_postfix(loss=f"{logs['loss']:.3f}", tokens_per_second=f"{speed:,.0f}")
        if time.monotonic() - self._drawn >= _SECONDS_BETWEEN_DRAWINGS:
            self._draw_curve()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._draw_curve()

    def _draw_curve(self) -> None:
        """Draws the losses so far below the cell, in place of the drawing before."""
        losses = self._trainer.state.log_history
        if not (losses and self._shown and in_notebook()):
            return
        png = BytesIO()
        loss_curve(losses, "Tuning").savefig(png, format="png", dpi=72)
        picture = {"image/png": png.getvalue(), "text/plain": "the loss so far"}
        if self._curve is None:
            self._curve = show(picture, raw=True, display_id=True)
        else:
            self._curve.update(picture, raw=True)
        self._drawn = time.monotonic()
