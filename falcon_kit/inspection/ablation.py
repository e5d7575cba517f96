"""Ablation of attention heads: the loss and the prediction on a text, with heads and without them.

`attention` and `lens` show correlations. Only an intervention, such as an ablation, shows what a prediction depends on.

A head is ablated by replacing its output with zero, or with its mean over a text (mean ablation; Wang et al. 2022,
arXiv 2211.00593). The mean is a constant, taken once from the model with all its heads: it is the same for a whole
text, for a block of it and for a single token of generation.

Shapes: B batch, T time, L layers, H query heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from falcon_kit.display.documented import documented
from falcon_kit.display.errors import check_known, require
from falcon_kit.display.page import percent
from falcon_kit.display.tables import counted, html_table
from falcon_kit.inspection.hooks import (
    Hook,
    InspectedModel,
    TextOrIds,
    TextResult,
    forward_hooks,
    inspect_model,
    of_this_thread,
)
from falcon_kit.inspection.plots import lens as plots
from falcon_kit.inspection.predictions import Candidate, Floats, check_top_k, mean_surprisal, predict
from falcon_kit.inspection.token import quoted

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Replacement = Literal["zero", "mean"]
"""What the output of an ablated head is replaced with."""
Pairs = Iterable[tuple[int, int]]


@documented
@dataclass(frozen=True, repr=False)
class Ablation(TextResult):
    """Surprisal and predictions on a text, with all heads and with some of them ablated."""

    heads: tuple[tuple[int, int], ...]
    """The ablated heads as (layer, query head), those of ablated KV heads included."""
    replace: Replacement
    """What their output was replaced with."""
    before: Floats
    """(T,): the surprisal of each token in bits, with all heads; nan for the first token."""
    after: Floats
    """(T,): the same with the heads ablated."""
    next_before: tuple[Candidate, ...]
    """The most likely next tokens with all heads, most likely first."""
    next_after: tuple[Candidate, ...]
    """The same with the heads ablated."""

    @property
    def loss_before(self) -> float:
        """Mean loss in nats per token with all heads; nan for a text of one token."""
        return mean_surprisal(self.before) * math.log(2)

    @property
    def loss_after(self) -> float:
        """Mean loss in nats per token with the heads ablated; nan for a text of one token."""
        return mean_surprisal(self.after) * math.log(2)

    def figure(self) -> Figure:
        """The surprisal of each token, with all heads and with the heads ablated."""
        return plots.surprisal(self.token_texts, {"all heads": self.before, f"{len(self.heads)} ablated": self.after})

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each token: text, id, surprisal before and after in bits."""
        import pandas as pd

        return pd.DataFrame({"token": self.token_texts, "id": self.ids, "before": self.before, "after": self.after})

    def __repr__(self) -> str:
        first, second = self.next_before[0], self.next_after[0]
        bits = (
            f"{mean_surprisal(self.before):.2f} to {mean_surprisal(self.after):.2f} bits per token, "
            if len(self.ids) > 1
            else ""
        )
        before, after = (f"{quoted(each.text)} {percent(each.probability)}" for each in (first, second))
        return f"Ablation({counted(len(self.heads), 'head')}: {bits}next {before} to {after})"

    def _repr_html_(self) -> str:
        rows = [
            ("surprisal, bits per token", f"{mean_surprisal(self.before):.2f}", f"{mean_surprisal(self.after):.2f}"),
            *(
                (f"next, rank {pair[0].rank}", *(f"{quoted(each.text)} {percent(each.probability)}" for each in pair))
                for pair in zip(self.next_before, self.next_after, strict=True)
            ),
        ]
        heads = ", ".join(f"{layer}.{head}" for layer, head in self.heads[:12])
        more = f" and {len(self.heads) - 12} more" if len(self.heads) > 12 else ""
        return html_table(f"Ablated heads (layer.head): {heads}{more}", ("", "all heads", "ablated"), rows)


@contextmanager
def ablated(
    falcon: Any, heads: Pairs = (), kv_heads: Pairs = (), replace: Replacement | Tensor = "zero"
) -> Iterator[None]:
    """A context in which heads are ablated, whatever the model computes in it: generate, `attention`, `lens`, ...

    heads: pairs (layer, query head). kv_heads: pairs (layer, KV head); all query heads that share it are ablated.
    replace: "zero" sets the output of the heads to zero; a tensor (L, H, D), such as `head_means` returns, sets it to
    these values. The heads are restored at the end, after an exception too.

    Raises IndexError for a layer or head that does not exist; ValueError for "mean", which needs a text, and for a
    tensor of another shape.
    """
    require(
        isinstance(replace, Tensor) or replace != "mean",
        'replace="mean" needs a text to take the mean over: give replace=head_means(falcon, text), with '
        "from falcon_kit.inspection.ablation import head_means",
    )
    inspected = inspect_model(falcon)
    pairs, values = _query_heads(inspected, heads, kv_heads), _values(inspected, replace)
    with _ablation_hooks(inspected, pairs, values, lambda hook: hook):
        yield


def head_means(falcon: Any, text: TextOrIds) -> Tensor:
    """The mean output (L, H, D) of every head over the tokens of a text, in float32 in host memory.

    It is taken before the output projection, from the model as it is. Raises what `attention` does.
    """
    inspected = inspect_model(falcon)
    return _head_means(inspected, inspected.encode(text))


def ablate(
    falcon: Any,
    text: TextOrIds,
    heads: Pairs = (),
    kv_heads: Pairs = (),
    *,
    replace: Replacement | Tensor = "zero",
    top_k: int = 5,
) -> Ablation:
    """Loss and predictions on a text, with all heads and with some of them ablated (see `ablated`).

    replace: "zero"; "mean", the mean of each head over this text, its later tokens included; or the means over another
    text, from `head_means`, which contain nothing of this one.

    Raises ValueError if no head is given, or for a text that is empty or longer than the context; IndexError for a head
    that does not exist.
    """
    inspected = inspect_model(falcon)
    ids = inspected.encode(text)
    pairs = _query_heads(inspected, heads, kv_heads)
    require(bool(pairs), "no head is given: give heads=[(layer, head), ...] or kv_heads=[(layer, KV head), ...]")
    check_top_k(inspected, top_k)
    values = _values(inspected, replace, ids)
    before = predict(inspected, ids, top_k)
    with _ablation_hooks(inspected, pairs, values, of_this_thread):
        after = predict(inspected, ids, top_k)
    return Ablation(
        spec=inspected.spec,
        ids=tuple(ids),
        token_texts=inspected.token_texts(ids),
        heads=tuple(pairs),
        replace="mean" if isinstance(replace, Tensor) else replace,
        before=before.surprisal,
        after=after.surprisal,
        next_before=before.candidates(inspected.token_texts),
        next_after=after.candidates(inspected.token_texts),
    )


def _values(inspected: InspectedModel, replace: Replacement | Tensor, ids: Sequence[int] = ()) -> Tensor:
    """What stands in for the output of every head: (L, H, D). ids: the text over which "mean" is taken."""
    shape = (inspected.spec.layers, inspected.spec.query_heads, inspected.spec.head_dim)
    if isinstance(replace, Tensor):
        require(
            replace.shape == shape,
            f"a replacement of the shape {tuple(replace.shape)} does not fit: (layers, heads, head_dim) is {shape}",
        )
        return replace
    check_known("replacement", replace, get_args(Replacement))
    return torch.zeros(shape, device="cpu") if replace == "zero" else _head_means(inspected, ids)


def _head_means(inspected: InspectedModel, ids: Sequence[int]) -> Tensor:
    spec = inspected.spec
    means = torch.zeros(spec.layers, spec.query_heads, spec.head_dim, device="cpu")

    def keep(layer: int, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        means[layer] = args[0][0].float().mean(0).unflatten(-1, (-1, spec.head_dim)).cpu()

    hooks = [(layer.self_attention.dense, partial(keep, index)) for index, layer in enumerate(inspected.layers)]
    with torch.inference_mode(), forward_hooks(inspected, hooks):
        inspected.decoder(input_ids=inspected.input_ids(ids), use_cache=False)
    return means


def _query_heads(inspected: InspectedModel, heads: Pairs, kv_heads: Pairs) -> list[tuple[int, int]]:
    """The given query heads and those that share one of the given KV heads, sorted."""
    shared = inspected.spec.queries_per_kv_head
    groups = inspected.check_heads(kv_heads, inspected.spec.kv_heads, "KV head")
    members = {(layer, group * shared + each) for layer, group in groups for each in range(shared)}
    return sorted(members | set(inspected.check_heads(heads, inspected.spec.query_heads, "head")))


@contextmanager
def _ablation_hooks(
    inspected: InspectedModel, pairs: list[tuple[int, int]], values: Tensor, scope: Callable[[Hook], Hook]
) -> Iterator[None]:
    """Sets the outputs of the heads in `pairs` to their `values` (L, H, D). scope: limits a hook to some threads."""
    with ExitStack() as undo:
        for index, layer in enumerate(inspected.layers):
            if heads := [head for at, head in pairs if at == index]:
                hook = scope(partial(_ablate_heads, heads, values[index, heads]))
                undo.callback(layer.self_attention.dense.register_forward_pre_hook(hook).remove)
        yield


def _ablate_heads(heads: list[int], values: Tensor, module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
    """The input of `dense`, the concatenated outputs of all heads (B, T, H x D), with `values` for those of `heads`."""
    outputs = args[0].unflatten(-1, (-1, values.shape[-1])).clone()  # (B, T, H, D)
    outputs[:, :, heads] = values.to(outputs)
    return (outputs.flatten(-2),)
