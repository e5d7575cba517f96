"""Progress of a run: the plan first, then a progress bar and, in a notebook, the loss curve."""

import time
from collections.abc import Callable
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
    """A progress bar with loss, tokens per second and remaining time; `draw` draws the losses that were logged."""

    def __init__(self, trainer: AdapterTrainer, shown: bool, draw: Callable[..., None] | None) -> None:
        self._trainer, self._shown, self._draw = trainer, shown, draw
        self._bar: Any = None
        self._started = self._tokens = 0.0

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
        if self._draw:
            self._draw(state.log_history)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._draw and self._trainer.state.log_history:
            self._draw(self._trainer.state.log_history, last=True)


class LiveLossCurve:
    """The loss curve below the notebook cell, redrawn at most every two seconds."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._drawn = 0.0

    def __call__(self, logged: list[dict[str, Any]], last: bool = False) -> None:
        """Draws the losses so far, unless the last drawing is recent; `last` draws in any case."""
        if time.monotonic() - self._drawn < _SECONDS_BETWEEN_DRAWINGS and not last:
            return
        png = BytesIO()
        loss_curve(logged, "Tuning").savefig(png, format="png", dpi=72)
        picture = {"image/png": png.getvalue(), "text/plain": "the loss so far"}
        if self._handle is None:
            self._handle = show(picture, raw=True, display_id=True)
        else:
            self._handle.update(picture, raw=True)
        self._drawn = time.monotonic()
