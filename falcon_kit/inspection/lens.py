"""The logit lens, surprisal, and what each layer adds to a logit.

The logit lens applies the last LayerNorm and the language-modelling head to the hidden state after every layer:
softmax(W_U ln_f(h)) (nostalgebraist 2020, "interpreting GPT: the logit lens").

Attention and MLP only add to the hidden state, and the last LayerNorm is applied with the deviation of the last hidden
state. So a logit is exactly the sum of contributions (direct logit attribution): one of the embedding, and one of each
layer's attention and MLP.
(`hidden_states[-1]` of transformers is already after `ln_f`.)

The text goes through the model twice: first for the predictions, then for the layers. Logits are computed for a few
tokens at a time, never for all tokens or layers at once.

Shapes: T time, L layers, V vocabulary, K tokens that are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from falcon_kit.display.documented import documented
from falcon_kit.display.errors import check_whole, is_whole, printable, require, shown
from falcon_kit.display.page import HasPage, Page, percent, visible
from falcon_kit.display.tables import counted, html_table
from falcon_kit.inspection import predictions
from falcon_kit.inspection.hooks import InspectedModel, TextOrIds, TextResult, forward_hooks, inspect_model
from falcon_kit.inspection.plots import lens as plots
from falcon_kit.inspection.predictions import Candidate, Floats, Ints, Predictions, TargetPredictions, mean_surprisal
from falcon_kit.inspection.token import quoted
from falcon_kit.inspection.views.lens import lens_page

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_PAGE_TOKENS = 16  # the last tokens, whose logit lens the page shows


@documented
@dataclass(frozen=True, repr=False)
class LensView(TextResult, Predictions, HasPage):
    """Predictions and surprisal of a model on a text, and the logit lens of every layer."""

    targets: tuple[int, ...]
    """(T,): the token id after each token whose probability is followed through the layers: the argument `target`, or
    the model's own prediction."""
    layer_ids: Ints
    """(L + 1, T): the most likely next token by the logit lens, after the embedding and after each layer."""
    layer_probabilities: Floats
    """(L + 1, T): the lens's probability of `layer_ids`."""
    target_probabilities: Floats
    """(L + 1, T): the lens's probability of `targets`; the last row is the model's own."""
    target_ranks: Ints
    """(L + 1, T): the lens's rank of `targets`, 0 for the most likely."""
    embedding_contribution: Floats
    """(T,): what the embedding adds to the logit of `targets`, the bias of the last LayerNorm included."""
    attention_contribution: Floats
    """(L, T): what the attention of each layer adds to it."""
    mlp_contribution: Floats
    """(L, T): what the MLP of each layer adds to it."""
    id_to_text: dict[int, str]
    """The text of every token id in this view."""

    @property
    def loss(self) -> float:
        """Mean loss in nats per token; nan for a text of one token."""
        return mean_surprisal(self.surprisal) * math.log(2)

    @property
    def _summary(self) -> str:
        """The number of tokens and the mean surprisal, as text."""
        tokens = counted(len(self.ids), "token")
        return tokens if len(self.ids) == 1 else f"{tokens}, {mean_surprisal(self.surprisal):.2f} bits per token"

    def next_tokens(self, position: int = -1) -> list[Candidate]:
        """The most likely tokens after the token at `position`, most likely first."""
        self._check_position(position)
        return [*self.candidates(lambda ids: map(self.id_to_text.__getitem__, ids), position)]

    def _check_position(self, position: int) -> None:
        if not is_whole(position, -len(self.ids), len(self.ids) - 1):
            raise IndexError(f"position {shown(position)} is not in a text of {len(self.ids)} tokens")

    def figure(self, last: int = 12) -> Figure:
        """The logit lens after the `last` tokens: each layer's most likely next token and its probability."""
        check_whole("last", last, 1)
        first = max(0, len(self.ids) - last)
        return plots.layers(
            self.token_texts[first:], self._layer_texts(first), self.layer_probabilities[:, first:], first
        )

    def contributions_figure(self, position: int = -1) -> Figure:
        """What the embedding, and each layer's attention and MLP, add to the target's logit at `position`.

        Raises IndexError for a position outside of the text.
        """
        self._check_position(position)
        target = visible(self.id_to_text[self.targets[position]], spaces=True)
        parts = (self.attention_contribution[:, position], self.mlp_contribution[:, position])
        title = f"Contributions to the logit of {quoted(target)}"
        return plots.contributions(float(self.embedding_contribution[position]), *parts, title)

    def surprisal_figure(self) -> Figure:
        """The surprisal of each token, in bits."""
        return plots.surprisal(self.token_texts, {"surprisal": self.surprisal})

    def page(self) -> Page:
        """The text coloured by surprisal, the next tokens, and the lens after the last tokens; at most a megabyte."""
        first = max(0, len(self.ids) - _PAGE_TOKENS)
        pairs = [[(each.text, each.probability) for each in self.next_tokens(at)] for at in range(len(self.ids))]
        return lens_page(
            f"Predictions of {self.spec.name}",
            self.token_texts,
            self.surprisal,
            [[], *(expected[:3] for expected in pairs[:-1])],
            pairs[-1],
            self._layer_texts(first),
            self.layer_probabilities[:, first:],
        )

    def _layer_texts(self, first: int) -> list[list[str]]:
        """The texts of `layer_ids` from position `first` on."""
        return [[self.id_to_text[each] for each in row] for row in self.layer_ids[:, first:].tolist()]

    def _repr_html_(self) -> str:
        rows = [(each.rank, visible(each.text, spaces=True), f"{each.probability:.2%}") for each in self.next_tokens()]
        # Short, because a caption is never wider than its table.
        return html_table(self._summary, ("rank", "next token", "probability"), rows)

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each token: text, id, surprisal, rank, and the most likely next token with its probability."""
        import pandas as pd

        columns = {"token": self.token_texts, "id": self.ids, "surprisal": self.surprisal, "rank": self.rank}
        expected = {"next": [self.id_to_text[each] for each in self.top_ids[:, 0].tolist()]}
        return pd.DataFrame(columns | expected | {"probability": self.top_probabilities[:, 0]})

    def __repr__(self) -> str:
        name, first = printable(self.spec.name), self.next_tokens()[0]
        return f"LensView({name}, {self._summary}, next {quoted(first.text)} with {percent(first.probability)})"


def lens(falcon: Any, text: TextOrIds, *, target: str | int | None = None, top_k: int = 10) -> LensView:
    """Predictions and surprisal of a Falcon on a text, with the logit lens and logit contributions of every layer.

    falcon: what `fk.load` returns, or (model, tokenizer). text: a text, or token ids. target: the next token, as text
    or id, that is followed through the layers; None follows the model's own prediction at each position. top_k: how
    many of the most likely next tokens are kept.

    Raises ValueError for a text that is empty or longer than the context, a target that is not one token, a `top_k`
    out of range, or an adapter on the language-modelling head; TypeError for anything but a Falcon.
    """
    inspected = inspect_model(falcon)
    _check_head(inspected)
    ids = inspected.encode(text)
    predictions.check_top_k(inspected, top_k)
    followed = None if target is None else predictions.target_id(inspected, target)
    found = predictions.predict(inspected, ids, top_k, followed)
    layers = _LayerReader(inspected, found)
    with torch.inference_mode(), forward_hooks(inspected, layers.hooks()):
        inspected.decoder(input_ids=inspected.input_ids(ids), use_cache=False)
    targets = tuple(found.target_ids.tolist())
    named = {*ids, *targets, *found.top_ids.ravel().tolist(), *layers.found["layer_ids"].ravel().tolist()}
    return LensView(
        spec=inspected.spec,
        ids=tuple(ids),
        token_texts=inspected.token_texts(ids),
        **{each.name: getattr(found, each.name) for each in fields(Predictions)},
        targets=targets,
        id_to_text=dict(zip(named, inspected.token_texts(named), strict=True)),
        **layers.found,
    )


def _check_head(inspected: InspectedModel) -> None:
    """Raises ValueError for a head with an adapter, whose weight alone does not give the contributions."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    head: Any = inspected.model.get_output_embeddings()  # `predict` raises where there is none
    require(
        not isinstance(head, BaseTunerLayer) or head.merged or head.disable_adapters,
        "the language-modelling head has an adapter beside its weight: merge it first, by model.merge_adapter()",
    )


class _LayerReader:
    """Forward hooks that apply the logit lens to every layer and compute the logit contributions."""

    def __init__(self, inspected: InspectedModel, predicted: TargetPredictions) -> None:
        self.inspected, self.norm, self.target_ids = inspected, inspected.decoder.ln_f, predicted.target_ids
        layers, time = inspected.spec.layers, len(self.target_ids)
        self.found: dict[str, Any] = {
            "layer_ids": np.zeros((layers + 1, time), np.int64),
            "layer_probabilities": np.zeros((layers + 1, time), np.float32),
            "target_probabilities": np.zeros((layers + 1, time), np.float32),
            "target_ranks": np.zeros((layers + 1, time), np.int64),
            "attention_contribution": np.zeros((layers, time), np.float32),
            "mlp_contribution": np.zeros((layers, time), np.float32),
        }
        self._prepare_logit_attribution(predicted.inverse_deviation)

    @torch.inference_mode()
    def _prepare_logit_attribution(self, inverse_deviation: Tensor) -> None:
        """Gradient of the target logit with respect to the hidden state: unembedding row times LayerNorm scale over its
        deviation, mean removed."""
        unembedding: Tensor = self.inspected.model.get_output_embeddings().weight
        rows = unembedding[self.target_ids.to(unembedding.device)].float()  # (T, d_model)
        scale, bias = (each.to(rows.device).float() for each in (self.norm.weight, self.norm.bias))
        self.gradient = rows * scale * inverse_deviation.to(rows.device)[:, None]
        self.gradient -= self.gradient.mean(-1, keepdim=True)  # LayerNorm subtracts the mean
        self.bias_logit = (rows * bias).sum(-1)

    def hooks(self) -> list[tuple[Any, Any]]:
        """Hooks on the embedding, on each layer, and on each layer's attention and MLP."""
        hooks: list[tuple[Any, Any]] = [(self.inspected.decoder.word_embeddings, self._record_embedding)]
        for index, layer in enumerate(self.inspected.layers):
            hooks.append((layer.self_attention, partial(self._record_contribution, "attention_contribution", index)))
            hooks.append((layer.mlp, partial(self._record_contribution, "mlp_contribution", index)))
            hooks.append((layer, partial(self._record_layer, index + 1)))
        return hooks

    def _record_embedding(self, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        contribution = self._logit_contribution(output[0]) + self.bias_logit
        self.found["embedding_contribution"] = contribution.cpu().numpy()
        self._apply_lens(0, output[0])

    def _record_contribution(self, name: str, layer: int, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        added = output[0] if isinstance(output, tuple) else output
        self.found[name][layer] = self._logit_contribution(added[0]).cpu().numpy()

    def _record_layer(self, row: int, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self._apply_lens(row, (output[0] if isinstance(output, tuple) else output)[0])

    def _logit_contribution(self, added: Tensor) -> Tensor:
        """What a summand (T, d_model) of the last hidden state adds to the logits of the targets, (T,)."""
        return torch.linalg.vecdot(added.to(self.gradient.device).float(), self.gradient)

    def _apply_lens(self, row: int, hidden: Tensor) -> None:
        """The logit lens on hidden states (T, d_model)."""
        for rows, logits in predictions.logits_in_chunks(self.inspected, self.norm(hidden.to(self.norm.weight.device))):
            log_probabilities = logits.log_softmax(-1)
            best = log_probabilities.max(-1)
            self.found["layer_ids"][row, rows] = best.indices.cpu().numpy()
            self.found["layer_probabilities"][row, rows] = best.values.exp().cpu().numpy()
            targets = self.target_ids[rows].to(logits.device)
            log_probability, rank = predictions.log_probability_and_rank(log_probabilities, targets)
            self.found["target_probabilities"][row, rows] = np.exp(log_probability)
            self.found["target_ranks"][row, rows] = rank
