"""Attribution of a prediction to the tokens of its prompt: integrated gradients, or leave-one-out.

Both compare the prompt with a baseline of the same length that consists of end-of-sequence tokens.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from falcon_kit.catalogue.memory import backward_bytes
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.documented import documented
from falcon_kit.display.errors import check_known, is_number, is_whole, plain_scalar, require, shown
from falcon_kit.display.page import percent, visible
from falcon_kit.display.tables import html_table
from falcon_kit.display.warning import warn
from falcon_kit.inspection.hooks import (
    InspectedModel,
    TextOrIds,
    TextResult,
    evaluation_mode,
    inspect_model,
    language_head,
    switched_off,
)
from falcon_kit.inspection.plots import lens as plots
from falcon_kit.inspection.predictions import Candidate, Floats, target_id
from falcon_kit.inspection.token import quoted
from falcon_kit.loading.quantization import unpacked

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Method = Literal["integrated-gradients", "leave-one-out"]

_MAX_GIVEN_STEPS = 10_000
_FIRST_STEPS, _MAX_STEPS = 16, 1024
_TOLERANCE = 0.02
_MAX_BATCH = 16  # texts, or points of the path, in one forward pass
_MAX_ACTIVATION_BYTES = 2 * 2**30  # that the backward pass of one batch keeps
_MAX_ROWS = 120  # of the table in a notebook
_MAX_GAP = 0.1  # a larger `Attribution.gap` gives a warning


@documented
@dataclass(frozen=True, repr=False)
class Attribution(TextResult):
    """How much each token of a prompt adds to the log-probability of a next token."""

    target: Candidate
    """The next token that is explained."""
    method: Method
    """How the scores were computed."""
    scores: Floats
    """(T,): what each token adds to the log-probability of the target, in nats."""
    change: float
    """Log-probability of the target after the prompt, minus that after the baseline."""
    steps: int
    """Points on the path from the baseline to the prompt; for leave-one-out, the number of texts."""

    @property
    def gap(self) -> float:
        """The difference between the sum of the scores and `change`, relative to `change`.

        Integrated gradients sum to it (completeness, Sundararajan et al. 2017); leave-one-out scores need not.
        """
        return abs(float(self.scores.sum()) - self.change) / max(abs(self.change), 1e-6)

    def figure(self) -> Figure:
        """A bar for the score of each token."""
        title = f"Attribution of {quoted(visible(self.target.text, spaces=True))} ({self.method})"
        return plots.attribution(self.token_texts, self.scores, title)

    def _repr_html_(self) -> str:
        rows = [
            (at, visible(text, spaces=True), f"{score:+.3f}")
            for at, (text, score) in enumerate(zip(self.token_texts, self.scores, strict=True))
        ]
        cut = f"; the first {_MAX_ROWS} of {len(rows):,} tokens" if len(rows) > _MAX_ROWS else ""
        return html_table(f"{self!r}{cut}", ("position", "token", "score in nats"), rows[:_MAX_ROWS])

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each token: text, id, score."""
        import pandas as pd

        return pd.DataFrame({"token": self.token_texts, "id": self.ids, "score": self.scores})

    def __repr__(self) -> str:
        best = int(np.argmax(self.scores))
        return (
            f"Attribution({quoted(self.target.text)} {percent(self.target.probability)} by {self.method}: most from "
            f"{quoted(self.token_texts[best])} at {best}, {self.scores[best]:+.2f} nats; gap {self.gap:.1%})"
        )


def attribute(
    falcon: Any,
    text: TextOrIds,
    target: str | int | None = None,
    *,
    method: Method = "integrated-gradients",
    steps: int | None = None,
    tolerance: float | None = None,
) -> Attribution:
    """What each token of a prompt adds to the log-probability of the next token `target`.

    target: the next token, as text or id; None takes the most likely one. method: "integrated-gradients" (Sundararajan
    et al. 2017, arXiv 1703.01365) integrates the gradient on the straight path from the embeddings of the baseline to
    those of the prompt, with a forward and a backward pass for each step; "leave-one-out" replaces each token in turn
    with the end-of-sequence token. steps: points on the path; None doubles them until the scores sum to the change
    within `tolerance`, 0.02 unless given, at most 1024 (see `Attribution.gap`).

    Warns if the gap of integrated gradients is more than a tenth. Raises ValueError for a text that is empty or longer
    than the context, a target that is not one token, an unknown method, a setting without effect, or no end token.
    """
    inspected = inspect_model(falcon)
    language_head(inspected)  # raises for a model without one
    ids, steps, tolerance = inspected.encode(text), plain_scalar(steps), plain_scalar(tolerance)
    _check_arguments(method, steps, tolerance)
    blank, following = _baseline(inspected, ids), None if target is None else target_id(inspected, target)
    with evaluation_mode(inspected.model), unpacked(inspected.model):
        log_probabilities = _next_log_probabilities(inspected, inspected.input_ids(ids))[0]
        following = int(log_probabilities.argmax()) if following is None else following
        log_probability = float(log_probabilities[following])
        change = log_probability - float(_next_log_probabilities(inspected, inspected.input_ids(blank))[0, following])
        if method == "leave-one-out":
            scores, used_steps = log_probability - _leave_one_out(inspected, ids, following), len(ids)
        else:
            scores, used_steps = _integrated_gradients(
                inspected, ids, following, change, steps, _TOLERANCE if tolerance is None else tolerance
            )
    rank = int((log_probabilities > log_probabilities[following]).sum())
    found = Attribution(
        spec=inspected.spec,
        ids=tuple(ids),
        token_texts=inspected.token_texts(ids),
        target=Candidate(following, inspected.token_texts([following])[0], math.exp(log_probability), rank),
        method=method,
        scores=scores.astype(np.float32),
        change=change,
        steps=used_steps,
    )
    if method == "integrated-gradients" and not found.gap <= _MAX_GAP:
        _warn_of_gap(found)
    return found


def _check_arguments(method: str, steps: int | None, tolerance: float | None) -> None:
    check_known("method", method, get_args(Method))
    require(
        steps is None or is_whole(steps, 1, _MAX_GIVEN_STEPS),
        f"steps={shown(steps)}: must be at least 1, and at most {_MAX_GIVEN_STEPS}",
    )
    require(tolerance is None or is_number(tolerance, 0, 1), f"tolerance={shown(tolerance)}: must be from 0 to 1")
    given = [name for name, value in (("steps", steps), ("tolerance", tolerance)) if value is not None]
    require(
        method == "integrated-gradients" or not given,
        f"{' and '.join(given)} have no effect with leave-one-out, which replaces each token once: leave them out",
    )
    require(len(given) < 2, "tolerance has no effect with steps, which fix the points of the path: give one of them")


def _warn_of_gap(found: Attribution) -> None:
    warn(
        f"with steps={found.steps} the scores sum to {found.scores.sum():.2f} nats, but the change is "
        f"{found.change:.2f}: they do not explain it. Use more steps, load the model in float32, or use "
        "method='leave-one-out'"
    )


def _baseline(inspected: InspectedModel, ids: list[int]) -> list[int]:
    """As many end-of-sequence tokens as the text has tokens. Raises ValueError if the tokenizer has none."""
    token: Any = inspected.tokenizer.eos_token_id
    require(
        token is not None, "the tokenizer has no end-of-sequence token to replace tokens with: set tokenizer.eos_token"
    )
    return [token] * len(ids)


def _next_logits(inspected: InspectedModel, **inputs: Tensor) -> Tensor:
    """The logits (B, V) of the next token after each row, also where the config turns output objects off."""
    logits: Tensor = inspected.model(**inputs, use_cache=False, logits_to_keep=1, return_dict=True).logits
    return logits[:, -1]


def _next_log_probabilities(inspected: InspectedModel, input_ids: Tensor) -> Tensor:
    """Log-probabilities (B, V) of the next token after each row of (B, T)."""
    with torch.no_grad():
        logits = _next_logits(inspected, input_ids=input_ids)
        return logits.float().log_softmax(-1)


def _leave_one_out(inspected: InspectedModel, ids: list[int], target: int) -> Floats:
    """(T,): the log-probability of the target with each token of the text replaced in turn."""
    texts = inspected.input_ids(ids).repeat(len(ids), 1).fill_diagonal_(_baseline(inspected, ids)[0])
    parts = [_next_log_probabilities(inspected, rows)[:, target].cpu() for rows in texts.split(_MAX_BATCH)]
    return torch.cat(parts).numpy()


def _integrated_gradients(
    inspected: InspectedModel, ids: list[int], target: int, change: float, steps: int | None, tolerance: float
) -> tuple[Floats, int]:
    """The scores (T,), and the number of steps that they took."""
    used_steps = steps or _FIRST_STEPS
    while True:
        scores = _path_integral(inspected, ids, target, used_steps)
        converged = abs(float(scores.sum()) - change) <= tolerance * abs(change)
        if steps or converged or used_steps >= _MAX_STEPS:
            return scores, used_steps
        used_steps *= 2


def _path_integral(inspected: InspectedModel, ids: list[int], target: int, steps: int) -> Floats:
    """Mean gradient on the path from the baseline to the text, times their difference: (T,). The points and weights are
    those of Gauss-Legendre quadrature."""
    points, weights = (torch.from_numpy(each) / 2 for each in np.polynomial.legendre.leggauss(steps))
    with torch.no_grad():
        embed = inspected.decoder.get_input_embeddings()
        start, end = (
            embed(inspected.input_ids(each)).detach() for each in (_baseline(inspected, ids), ids)
        )  # (1, T, d_model)
    total = torch.zeros_like(end[0], dtype=torch.float32)
    batch = _batch_size(inspected.spec, end)
    frozen = switched_off(inspected.model.parameters(), "requires_grad")  # layers would keep their inputs for them
    with frozen, torch.inference_mode(False), torch.enable_grad():
        for some, weight in zip((points + 0.5).split(batch), weights.split(batch), strict=True):
            embeddings = (start + some.to(end)[:, None, None] * (end - start)).requires_grad_()  # (B, T, d_model)
            logits = _next_logits(inspected, inputs_embeds=embeddings)
            (gradient,) = torch.autograd.grad(logits.float().log_softmax(-1)[:, target].sum(), embeddings)
            total += torch.tensordot(weight.to(total), gradient.float(), 1)
    return ((end - start)[0].float() * total).sum(-1).cpu().numpy()


def _batch_size(spec: FalconSpec, embeddings: Tensor) -> int:
    """How many points of the path fit in one batch: every layer keeps activations for the backward pass."""
    dtype = str(embeddings.dtype).removeprefix("torch.")
    kept = spec.layers * backward_bytes(spec, dtype, embeddings.shape[1], 1, adapters=False)
    return max(1, min(_MAX_BATCH, _MAX_ACTIVATION_BYTES // kept))
