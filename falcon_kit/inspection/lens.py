"""How a prediction comes about: the next token, the surprise of each token, and what the layers would have said.

The logit lens reads every layer's hidden state as if it were the last: softmax(W_U ln_f(h)) (nostalgebraist 2020,
"interpreting GPT: the logit lens"). In Falcon's parallel block attention and feed-forward both add to the same hidden
state, so a prediction's logit is a sum of shares: the embedding's, and each layer's attention's and MLP's. The last
LayerNorm is applied once, with the spread of the last hidden state, which makes the shares add up exactly
(`hidden_states[-1]` of transformers is after it already).

The text goes through the model twice: to know the predictions, then to read each layer as it comes. Logits exist for a
few tokens at a time, never for all tokens or layers at once.

Shapes: B batch, T time, L layers, V vocabulary, K tokens of the table.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.page import Page, percent, visible
from falcon_kit.display.tables import html_table
from falcon_kit.inspection.plots import lens as plots
from falcon_kit.inspection.views.lens import lens_page
from falcon_kit.inspection.watch import Subject, Text, subject, watching

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]  # it brings no types of its own
    from matplotlib.figure import Figure

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_PAGE_TOKENS = 16  # of the lens in a page, the last ones
_LOGITS = 2**24  # logits that exist at once: 64 MiB in float32


@dataclass(frozen=True)
class Candidate:
    """A token that may come next."""

    id: int
    """Its id."""
    text: str
    """Its text."""
    probability: float
    """How likely the model finds it."""
    rank: int
    """0 for the likeliest."""


@dataclass(frozen=True, repr=False)
class LensView:
    """A text as the model reads it: what it expects next, what surprises it, and from which layer on."""

    spec: FalconSpec
    """The model's shape."""
    ids: tuple[int, ...]
    """The text's token ids, T of them."""
    words: tuple[str, ...]
    """Each token's text."""
    top_ids: Ints
    """(T, K): the likeliest next tokens after each token, likeliest first."""
    top_probabilities: Floats
    """(T, K): their probabilities."""
    surprisal: Floats
    """(T,): -log2 of the probability that the text so far gave to each token, in bits; nan for the first."""
    rank: Ints
    """(T,): the rank of each token among all that might have come, 0 the likeliest; -1 for the first."""
    targets: tuple[int, ...]
    """After each token, the token id whose way through the layers is followed: the model's own prediction, unless
    `target` named another."""
    layer_ids: Ints
    """(L + 1, T): what the lens reads after the embedding and after each layer."""
    layer_probabilities: Floats
    """(L + 1, T): the lens's probability of `layer_ids`."""
    target_probabilities: Floats
    """(L + 1, T): the lens's probability of `targets`; the last row is the model's own."""
    target_ranks: Ints
    """(L + 1, T): the lens's rank of `targets`, 0 the likeliest."""
    embedding_share: Floats
    """(T,): what the embedding adds to the logit of `targets`, the last LayerNorm's shift included."""
    attention_share: Floats
    """(L, T): what each layer's attention adds to it."""
    mlp_share: Floats
    """(L, T): what each layer's feed-forward block adds to it."""
    target_logits: Floats
    """(T,): the model's logits of `targets`, which the shares add up to."""
    names: dict[int, str]
    """The text of every token id that occurs here."""

    @property
    def loss(self) -> float:
        """Mean surprisal in nats per token; nan for one token."""
        return float(np.mean(self.surprisal[1:]) * math.log(2)) if len(self.ids) > 1 else math.nan

    @property
    def _facts(self) -> str:
        """How long the text is, and how much a token of it surprised."""
        if len(self.ids) == 1:
            return "1 token"
        return f"{len(self.ids)} tokens, {np.mean(self.surprisal[1:]):.2f} bits per token"

    def next_tokens(self, position: int = -1) -> list[Candidate]:
        """What may come after a token of the text, likeliest first; the last token's unless told."""
        if not -len(self.ids) <= position < len(self.ids):
            raise IndexError(f"position {position} is not in a text of {len(self.ids)} tokens")
        pairs = zip(self.top_ids[position].tolist(), self.top_probabilities[position].tolist(), strict=True)
        return [Candidate(each, self.names[each], found, rank) for rank, (each, found) in enumerate(pairs)]

    def figure(self, last: int = 12) -> Figure:
        """The logit lens over the last tokens: what each layer would say after them, and how sure it is."""
        first = max(0, len(self.ids) - last)
        read = [[_shown(self.names[each]) for each in row] for row in self.layer_ids[:, first:].tolist()]
        return plots.layers(
            [_shown(word) for word in self.words[first:]], read, self.layer_probabilities[:, first:], first
        )

    def shares_figure(self, position: int = -1) -> Figure:
        """Who speaks for the target after a token of the text: the embedding, and each layer's two parts."""
        target = _shown(self.names[self.targets[position]])
        shares = (self.attention_share[:, position], self.mlp_share[:, position])
        return plots.shares(float(self.embedding_share[position]), *shares, f"Who adds to the logit of {target!r}")

    def surprisal_figure(self) -> Figure:
        """How much each token surprised, in bits."""
        return plots.surprisal([_shown(word) for word in self.words], {"surprisal": self.surprisal})

    def page(self) -> Page:
        """The text tinted by surprisal, what may come next, and what each layer would say after the last tokens."""
        first, some = max(0, len(self.ids) - _PAGE_TOKENS), min(3, self.top_ids.shape[1])
        expected = [
            [(self.names[each], found) for each, found in zip(ids, probabilities, strict=True)]
            for ids, probabilities in zip(
                self.top_ids[:-1, :some].tolist(), self.top_probabilities[:-1, :some].tolist(), strict=True
            )
        ]
        return lens_page(
            f"What {self.spec.name} expects",
            self.words,
            self.surprisal,
            [[], *expected],
            [(each.text, each.probability) for each in self.next_tokens()],
            [[self.names[each] for each in row] for row in self.layer_ids[:, first:].tolist()],
            self.layer_probabilities[:, first:],
        )

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the view as a page of its own, at most a megabyte, and returns its path."""
        return self.page().write(path)

    def _repr_html_(self) -> str:
        rows = [(each.rank, visible(each.text, spaces=True), f"{each.probability:.2%}") for each in self.next_tokens()]
        # short, since no caption is wider than its table
        return html_table(self._facts, ("rank", "next token", "probability"), rows)

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each token: id, text, surprisal, rank, and what the model expects after it."""
        import pandas as pd

        columns = {"token": self.words, "id": self.ids, "surprisal": self.surprisal, "rank": self.rank}
        expected = {"next": [self.names[each] for each in self.top_ids[:, 0].tolist()]}
        return pd.DataFrame(columns | expected | {"probability": self.top_probabilities[:, 0]})

    def __repr__(self) -> str:
        first = self.next_tokens()[0]
        return f"LensView({self.spec.name}, {self._facts}, next {first.text!r} with {percent(first.probability)})"


def lens(falcon: Any, text: Text, *, target: str | int | None = None, top: int = 10) -> LensView:
    """What a Falcon expects after each token of a text, how surprised it is, and how the layers come to it.

    falcon: what `fk.load` gives, or (model, tokenizer); text: a text, or token ids. target: the token, as text or id,
    whose way through the layers is followed; unset, what the model predicts. top: how many likely tokens to keep.

    Raises ValueError for a text that is empty or over the context, a target that is not one token, or a `top` out of
    range; TypeError for what is not a Falcon.
    """
    watched = subject(falcon)
    ids = watched.encode(text)
    if not 1 <= top <= watched.spec.vocabulary:
        raise ValueError(f"top={top} is not within 1 and {watched.spec.vocabulary}, the size of the vocabulary")
    chosen = None if target is None else one_token(watched, target)
    reading = _Reading(watched, ids, chosen, top)
    reading.first()
    reading.second()
    return reading.view()


def predict(watched: Subject, ids: list[int], top: int) -> dict[str, Any]:
    """What the model says, without its layers: the fields of `LensView` that `lens` has after its first run."""
    reading = _Reading(watched, ids, None, top)
    reading.first()
    return reading.found


def candidates(watched: Subject, found: dict[str, Any]) -> tuple[Candidate, ...]:
    """What comes after the last token, likeliest first, from what `predict` found."""
    ids, probabilities = (found[name][-1].tolist() for name in ("top_ids", "top_probabilities"))
    rows = zip(ids, watched.words(ids), probabilities, range(len(ids)), strict=True)
    return tuple(Candidate(*row) for row in rows)


def one_token(watched: Subject, target: str | int) -> int:
    """The id of a token named by its text or id. Raises ValueError for a text that is not exactly one token."""
    found = watched.encode([target] if isinstance(target, int) else target)
    if len(found) != 1:
        pieces = ", ".join(map(repr, watched.words(found)))
        raise ValueError(f"target {target!r} is {len(found)} tokens ({pieces}): name one, mind the space before a word")
    return found[0]


def head_of(watched: Subject) -> Callable[[Tensor], Tensor]:
    """The language-modelling head, from normalised hidden states (.., d_model) to float32 logits (.., V)."""
    head: Any = watched.model.get_output_embeddings()
    if getattr(head, "weight", None) is None or len(head.weight) != watched.spec.vocabulary:
        raise ValueError(f"{type(head).__name__} is not a whole language-modelling head: load without tensor_parallel")
    return lambda normed: head(normed.to(head.weight.device)).float()


class _Reading:
    """Collects what two runs over a text show."""

    def __init__(self, watched: Subject, ids: list[int], target: int | None, top: int) -> None:
        self.watched, self.spec, self.ids, self.target, self.top = watched, watched.spec, ids, target, top
        self.head, self.norm = head_of(watched), watched.decoder.ln_f
        layers, time = self.spec.layers, len(ids)
        self.targets = torch.zeros(time, dtype=torch.long)
        self.found: dict[str, Any] = {
            "top_ids": np.zeros((time, top), np.int64),
            "top_probabilities": np.zeros((time, top), np.float32),
            "surprisal": np.full(time, np.nan, np.float32),
            "rank": np.full(time, -1),
            "layer_ids": np.zeros((layers + 1, time), np.int64),
            "layer_probabilities": np.zeros((layers + 1, time), np.float32),
            "target_logits": np.zeros(time, np.float32),
            "target_probabilities": np.zeros((layers + 1, time), np.float32),
            "target_ranks": np.zeros((layers + 1, time), np.int64),
            "attention_share": np.zeros((layers, time), np.float32),
            "mlp_share": np.zeros((layers, time), np.float32),
        }

    def first(self) -> None:
        """What the model says."""
        self._run([(self.norm, self._finish)])

    def second(self) -> None:
        """What its layers would have said, and what they add."""
        self._prepare_logit_attribution()
        self._run(self._hooks())

    def _run(self, hooks: list[tuple[Any, Any]]) -> None:
        with torch.inference_mode(), watching(self.watched, hooks):
            self.watched.decoder(input_ids=self.watched.tensor(self.ids), use_cache=False)

    def _chunks(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Logits (t, V) of normalised hidden states (T, d_model), a few tokens at a time."""
        size = max(1, _LOGITS // self.spec.vocabulary)
        for start in range(0, len(hidden), size):
            rows = slice(start, min(start + size, len(hidden)))
            yield rows, self.head(hidden[rows])

    def _finish(self, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        """First run, at the last LayerNorm."""
        last = args[0][0]  # (T, d_model)
        self.spread = (last.float().var(-1, correction=0) + self.norm.eps).rsqrt()
        actual = torch.tensor([*self.ids[1:], 0])  # the token that came; after the last one none did
        for rows, logits in self._chunks(output[0]):
            found, best = logits.log_softmax(-1), logits.topk(self.top)
            self.targets[rows] = best.indices[:, 0].cpu() if self.target is None else self.target
            followed = self.targets[rows, None].to(logits.device)
            self.found["target_logits"][rows] = logits.gather(-1, followed)[:, 0].cpu().numpy()
            self.found["top_ids"][rows] = best.indices.cpu().numpy()
            self.found["top_probabilities"][rows] = found.gather(-1, best.indices).exp().cpu().numpy()
            likelihood, rank = _place(found, actual[rows].to(found.device))
            after = slice(rows.start + 1, min(rows.stop + 1, len(self.ids)))
            count = after.stop - after.start
            self.found["surprisal"][after] = -likelihood[:count] / math.log(2)
            self.found["rank"][after] = rank[:count]

    @torch.inference_mode()
    def _prepare_logit_attribution(self) -> None:
        """Between the runs: the direction in which a part of the last hidden state speaks for the targets."""
        weight: Tensor = self.watched.model.get_output_embeddings().weight
        rows = weight[self.targets.to(weight.device)].float()  # (T, d_model)
        scale, shift = (each.to(rows.device).float() for each in (self.norm.weight, self.norm.bias))
        self.direction = rows * scale * self.spread.to(rows.device)[:, None]
        self.direction -= self.direction.mean(-1, keepdim=True)  # LayerNorm takes the mean away
        self.shift = (rows * shift).sum(-1)

    def _hooks(self) -> list[tuple[Any, Any]]:
        """Second run: on the embedding, on each layer and its two parts."""
        found: list[tuple[Any, Any]] = [(self.watched.decoder.word_embeddings, self._embedded)]
        for index, layer in enumerate(self.watched.layers):
            found.append((layer.self_attention, partial(self._share, "attention_share", index)))
            found.append((layer.mlp, partial(self._share, "mlp_share", index)))
            found.append((layer, partial(self._layer, index + 1)))
        return found

    def _embedded(self, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        self.found["embedding_share"] = (self._spoken(output[0]) + self.shift).cpu().numpy()
        self._read(0, output[0])

    def _share(self, name: str, layer: int, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        added = output[0] if isinstance(output, tuple) else output
        self.found[name][layer] = self._spoken(added[0]).cpu().numpy()

    def _layer(self, row: int, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self._read(row, (output[0] if isinstance(output, tuple) else output)[0])

    def _spoken(self, hidden: Tensor) -> Tensor:
        """What a part (T, d_model) of the last hidden state adds to the targets' logits, (T,)."""
        return torch.linalg.vecdot(hidden.to(self.direction.device).float(), self.direction)

    def _read(self, row: int, hidden: Tensor) -> None:
        """The logit lens on hidden states (T, d_model)."""
        for rows, logits in self._chunks(self.norm(hidden.to(self.norm.weight.device))):
            found = logits.log_softmax(-1)
            best = found.max(-1)
            self.found["layer_ids"][row, rows] = best.indices.cpu().numpy()
            self.found["layer_probabilities"][row, rows] = best.values.exp().cpu().numpy()
            likelihood, rank = _place(found, self.targets[rows].to(found.device))
            self.found["target_probabilities"][row, rows] = np.exp(likelihood)
            self.found["target_ranks"][row, rows] = rank

    def view(self) -> LensView:
        """All of it."""
        known = {*self.ids, *self.targets.tolist()}
        known.update(*(self.found[name].ravel().tolist() for name in ("top_ids", "layer_ids")))
        return LensView(
            spec=self.spec,
            ids=tuple(self.ids),
            words=self.watched.words(self.ids),
            targets=tuple(self.targets.tolist()),
            names=dict(zip(known, self.watched.words(known), strict=True)),
            **self.found,
        )


def _place(found: Tensor, ids: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Log-probability and rank of one token id per row (t,) among log-probabilities (t, V)."""
    chosen = found.gather(-1, ids[:, None])  # (t, 1)
    return chosen[:, 0].cpu().numpy(), (found > chosen).sum(-1).cpu().numpy()


def _shown(text: str) -> str:
    return visible(text, spaces=True)
