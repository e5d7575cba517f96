"""What a prediction hangs on: heads switched off, and prompt tokens taken away.

Looking (`attention`, `lens`) shows what happens together; only changing something shows what causes what.

Shapes: B batch, T time, H query heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from falcon_kit.catalogue.memory import backward_bytes
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import unknown_name
from falcon_kit.display.page import percent, visible
from falcon_kit.display.tables import html_table
from falcon_kit.inspection.lens import Candidate, Floats, candidates, one_token, predict
from falcon_kit.inspection.plots import lens as plots
from falcon_kit.inspection.watch import Subject, Text, evaluating, subject
from falcon_kit.loading.quantization import unpacked

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]  # it brings no types of its own
    from matplotlib.figure import Figure

Replacement = Literal["zero", "mean"]
Method = Literal["integrated-gradients", "leave-one-out"]
Pairs = Iterable[tuple[int, int]]

_FIRST_STEPS, _MOST_STEPS = 16, 1024
_ROWS = 16  # texts, or points of a path, that the model reads at once, if what gradients need of them
_KEPT = 2 * 2**30  # takes no more bytes than this
_GAP = 0.1  # of the change, from which on scores are no explanation of it


@dataclass(frozen=True, repr=False)
class Ablation:
    """A text read twice: as the model is, and with some of its heads switched off."""

    spec: FalconSpec
    """The model's shape."""
    ids: tuple[int, ...]
    """The text's token ids."""
    words: tuple[str, ...]
    """Each token's text."""
    heads: tuple[tuple[int, int], ...]
    """What was off: (layer, query head), those of whole KV groups included."""
    replace: Replacement
    """What stood in for their output."""
    before: Floats
    """(T,): each token's surprisal in bits, all heads on; nan for the first."""
    after: Floats
    """(T,): the same with the heads off."""
    next_before: tuple[Candidate, ...]
    """What comes next, all heads on, likeliest first."""
    next_after: tuple[Candidate, ...]
    """The same with the heads off."""

    @property
    def loss_before(self) -> float:
        """Mean loss in nats per token, all heads on; nan for one token."""
        return _mean(self.before) * math.log(2)

    @property
    def loss_after(self) -> float:
        """Mean loss in nats per token, the heads off; nan for one token."""
        return _mean(self.after) * math.log(2)

    def figure(self) -> Figure:
        """Each token's surprisal with the heads on and off."""
        lines = {"all heads on": self.before, f"{len(self.heads)} heads off": self.after}
        return plots.surprisal([visible(word, spaces=True) for word in self.words], lines)

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each token: id, text, surprisal before and after in bits."""
        import pandas as pd

        return pd.DataFrame({"token": self.words, "id": self.ids, "before": self.before, "after": self.after})

    def __repr__(self) -> str:
        first, second = self.next_before[0], self.next_after[0]
        bits = f"{_mean(self.before):.2f} to {_mean(self.after):.2f} bits per token, " if len(self.ids) > 1 else ""
        return (
            f"Ablation({len(self.heads)} heads off: {bits}next {first.text!r} {percent(first.probability)} to "
            f"{second.text!r} {percent(second.probability)})"
        )

    def _repr_html_(self) -> str:
        rows = [
            ("surprisal, bits per token", f"{_mean(self.before):.2f}", f"{_mean(self.after):.2f}"),
            *(
                (f"next, rank {each.rank}", *(f"{one.text!r} {percent(one.probability)}" for one in (each, other)))
                for each, other in zip(self.next_before, self.next_after, strict=True)
            ),
        ]
        off = ", ".join(f"{layer}.{head}" for layer, head in self.heads[:12])
        more = f" and {len(self.heads) - 12} more" if len(self.heads) > 12 else ""
        return html_table(f"Heads off (layer.head): {off}{more}", ("", "all heads on", "off"), rows)


@dataclass(frozen=True, repr=False)
class Attribution:
    """Which tokens of a prompt a prediction hangs on."""

    spec: FalconSpec
    """The model's shape."""
    ids: tuple[int, ...]
    """The prompt's token ids."""
    words: tuple[str, ...]
    """Each token's text."""
    target: Candidate
    """The next token that is explained."""
    method: Method
    """How."""
    scores: Floats
    """(T,): what each token adds to the log-probability of the target, in nats."""
    change: float
    """Log-probability of the target after the prompt, less that after end tokens only."""
    steps: int
    """Points of the path between the two; texts read, for leave-one-out."""

    @property
    def gap(self) -> float:
        """By how much the scores miss `change`, relative to it. Integrated gradients add up to it (completeness,
        Sundararajan et al. 2017); leave-one-out need not."""
        return abs(float(self.scores.sum()) - self.change) / max(abs(self.change), 1e-6)

    def figure(self) -> Figure:
        """A bar for each token."""
        title = f"What {visible(self.target.text, spaces=True)!r} hangs on ({self.method})"
        return plots.attribution([visible(word, spaces=True) for word in self.words], self.scores, title)

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each token: id, text, score."""
        import pandas as pd

        return pd.DataFrame({"token": self.words, "id": self.ids, "score": self.scores})

    def __repr__(self) -> str:
        best = int(np.argmax(self.scores))
        return (
            f"Attribution({self.target.text!r} {percent(self.target.probability)} by {self.method}: most from "
            f"{self.words[best]!r} at {best}, {self.scores[best]:+.2f} nats; sum misses the change by {self.gap:.1%})"
        )


@contextmanager
def ablated(falcon: Any, heads: Pairs = (), groups: Pairs = (), replace: Replacement = "zero") -> Iterator[None]:
    """Heads switched off for everything that the model does inside: generate, `attention`, `lens`, ...

    heads: pairs of a layer and a query head. groups: pairs of a layer and a KV head, all of whose query heads go off.
    replace: "zero" leaves out what they would add; "mean" puts its mean over the tokens of the same call in its place.
    They are on again afterwards, however it ends. Raises IndexError for a layer, head or group that is not there.
    """
    watched = subject(falcon)
    with _switched_off(watched, _heads_of(watched, heads, groups), _one_of(replace, "replacement", Replacement)):
        yield


def ablate(
    falcon: Any, text: Text, heads: Pairs = (), groups: Pairs = (), *, replace: Replacement = "zero", top: int = 5
) -> Ablation:
    """What heads are good for: the loss and the prediction on a text with them and without (see `ablated`).

    Raises ValueError where no head is named or the text is empty or over the context, IndexError for a head that is
    not there.
    """
    watched = subject(falcon)
    ids = watched.encode(text)
    off = _heads_of(watched, heads, groups)
    if not off:
        raise ValueError("no head is named: give heads=[(layer, head), ...] or groups=[(layer, KV head), ...]")
    before = predict(watched, ids, top)
    with _switched_off(watched, off, _one_of(replace, "replacement", Replacement)):
        after = predict(watched, ids, top)
    return Ablation(
        spec=watched.spec,
        ids=tuple(ids),
        words=watched.words(ids),
        heads=tuple(off),
        replace=replace,
        before=before["surprisal"],
        after=after["surprisal"],
        next_before=candidates(watched, before),
        next_after=candidates(watched, after),
    )


def attribute(
    falcon: Any,
    text: Text,
    target: str | int | None = None,
    *,
    method: Method = "integrated-gradients",
    steps: int | None = None,
    tolerance: float = 0.02,
) -> Attribution:
    """Which prompt tokens the next one hangs on: what each adds to the log-probability of `target`.

    target: the next token, as text or id; unset, the likeliest. method: "integrated-gradients" (Sundararajan et al.
    2017, arXiv 1703.01365) goes from end tokens to the prompt and sums gradient x change, with a forward and backward
    pass per step; "leave-one-out" puts the end token in each token's place in turn. steps: points of the path; unset,
    as many as it takes for the scores to add up to the change within `tolerance`, at most 1024: see `Attribution.gap`.

    Warns where integrated gradients miss the change by more than a tenth. Raises ValueError for a text that is empty or
    over the context, a target that is not one token, or another method.
    """
    watched = subject(falcon)
    ids = watched.encode(text)
    _one_of(method, "method", Method)
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: take at least one")
    wanted = predict(watched, ids, 1)["top_ids"][-1, 0].item() if target is None else one_token(watched, target)
    with evaluating(watched.model), unpacked(watched.model):
        logits = _next(watched, watched.tensor(ids))[0]
        likely, blank = (_log_likelihood(watched, each, wanted) for each in (ids, _blank(watched, ids)))
        if method == "leave-one-out":
            scores, taken = likely - _without_each(watched, ids, wanted), len(ids)
        else:
            scores, taken = _integrated(watched, ids, wanted, likely - blank, steps, tolerance)
    rank = int((logits > logits[wanted]).sum())
    found = Attribution(
        spec=watched.spec,
        ids=tuple(ids),
        words=watched.words(ids),
        target=Candidate(wanted, watched.words([wanted])[0], math.exp(likely), rank),
        method=method,
        scores=scores.astype(np.float32),
        change=likely - blank,
        steps=taken,
    )
    if method == "integrated-gradients" and not found.gap <= _GAP:
        warnings.warn(
            f"with steps={taken} the scores add up to {scores.sum():.2f} nats and the change is {found.change:.2f}: "
            "they do not explain it. Take more steps, load in float32, or take method='leave-one-out'",
            stacklevel=2,
        )
    return found


def _mean(surprisal: Floats) -> float:
    """Mean surprisal in bits per token; nan for one token, which nothing was expected before."""
    return float(np.mean(surprisal[1:])) if len(surprisal) > 1 else math.nan


def _one_of(given: Any, kind: str, known: Any) -> Any:
    if given not in get_args(known):
        raise ValueError(unknown_name(kind, str(given), get_args(known)))
    return given


# Heads


def _heads_of(watched: Subject, heads: Pairs, groups: Pairs) -> list[tuple[int, int]]:
    """All query heads that are named, those of whole groups included, in order."""
    shared = watched.spec.queries_per_kv_head
    whole = watched.check_heads(groups, watched.spec.kv_heads, "KV head")
    members = {(layer, group * shared + each) for layer, group in whole for each in range(shared)}
    return sorted(members | set(watched.check_heads(heads, watched.spec.query_heads, "head")))


@contextmanager
def _switched_off(watched: Subject, off: list[tuple[int, int]], replace: Replacement) -> Iterator[None]:
    with ExitStack() as undo:
        for index, layer in enumerate(watched.layers):
            if heads := [head for at, head in off if at == index]:
                hook = partial(_silence, heads, watched.spec.head_dim, replace)
                undo.callback(layer.self_attention.dense.register_forward_pre_hook(hook).remove)
        yield


def _silence(heads: list[int], width: int, replace: Replacement, module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
    """The input of `dense`, the outputs of all heads side by side (B, T, H x D), without those of `heads`."""
    parts = args[0].unflatten(-1, (-1, width)).clone()  # (B, T, H, D)
    parts[:, :, heads] = 0 if replace == "zero" else parts[:, :, heads].mean(1, keepdim=True)
    return (parts.flatten(-2),)


# Tokens


def _blank(watched: Subject, ids: list[int]) -> list[int]:
    """A text that says nothing: end tokens."""
    return [int(watched.tokenizer.eos_token_id)] * len(ids)


def _next(watched: Subject, tokens: Tensor) -> Tensor:
    """Log-probabilities (B, V) of what comes after rows of tokens (B, T)."""
    with torch.no_grad():
        return watched.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)


def _log_likelihood(watched: Subject, ids: list[int], wanted: int) -> float:
    return float(_next(watched, watched.tensor(ids))[0, wanted])


def _without_each(watched: Subject, ids: list[int], wanted: int) -> Floats:
    """(T,): the log-likelihood of a token after the text with each of its tokens blanked."""
    texts = watched.tensor(ids).repeat(len(ids), 1).fill_diagonal_(int(watched.tokenizer.eos_token_id))
    parts = [_next(watched, rows)[:, wanted].cpu() for rows in texts.split(_ROWS)]
    return torch.cat(parts).numpy()


def _integrated(
    watched: Subject, ids: list[int], wanted: int, change: float, steps: int | None, tolerance: float
) -> tuple[Floats, int]:
    """Integrated gradients (T,), and the number of steps they took."""
    taken = steps or _FIRST_STEPS
    while True:
        scores = _path_integral(watched, ids, wanted, taken)
        close = abs(float(scores.sum()) - change) <= tolerance * abs(change)
        if steps or close or taken >= _MOST_STEPS:
            return scores, taken
        taken *= 2


def _path_integral(watched: Subject, ids: list[int], wanted: int, steps: int) -> Floats:
    """Mean gradient on the way from end tokens to the text, times the way: (T,), by Gauss and Legendre's points."""
    points, weights = (torch.tensor(each) / 2 for each in np.polynomial.legendre.leggauss(steps))
    with torch.no_grad():
        table = watched.decoder.get_input_embeddings()
        blank, full = (table(watched.tensor(each)) for each in (_blank(watched, ids), ids))  # (1, T, d_model)
    total = torch.zeros_like(full[0], dtype=torch.float32)
    rows = _rows(watched.spec, full)
    with _frozen(watched.model):
        for some, weight in zip((points + 0.5).split(rows), weights.split(rows), strict=True):
            place = (blank + some.to(full)[:, None, None] * (full - blank)).requires_grad_()  # (B, T, d_model)
            logits = watched.model(inputs_embeds=place, use_cache=False, logits_to_keep=1).logits[:, -1]
            (gradient,) = torch.autograd.grad(logits.float().log_softmax(-1)[:, wanted].sum(), place)
            total += torch.tensordot(weight.to(total), gradient.float(), 1)
    return ((full - blank)[0].float() * total).sum(-1).cpu().numpy()


def _rows(spec: FalconSpec, embedded: Tensor) -> int:
    """Points of the path that are read at once: all layers keep what the way back needs of each."""
    dtype = str(embedded.dtype).removeprefix("torch.")
    kept = spec.layers * backward_bytes(spec, dtype, embedded.shape[1], 1, adapters=False)
    return max(1, min(_ROWS, _KEPT // kept))


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No gradients of weights, for which layers would keep what came into them."""
    learning = [each for each in model.parameters() if each.requires_grad]
    for each in learning:
        each.requires_grad_(False)
    try:
        yield
    finally:
        for each in learning:
            each.requires_grad_(True)
