"""The values of one layer while a text goes through the model, taken by forward hooks.

One forward pass records one layer, and keeps what every layer was called with where that is small: another layer is
then recorded by calling it alone. Of the wide vectors only the first components, the mean, the standard deviation and
the norm of each token are kept, so the record of a layer of the 40B takes about 80 kB a token.

Shapes: T time, H query heads, G KV heads, D head_dim, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.inspection.hooks import InspectedModel, forward_hooks
from falcon_kit.inspection.probabilities import Rotation, alibi_bias, attention_hooks
from falcon_kit.model.layers import split_heads

SHOWN = 64
"""Components of each vector that are kept."""
_MAX_BYTES = 64 * 2**20  # of the hidden states that go into all layers
NEURONS = 12
"""Neurons of the MLP that are kept, the strongest of each token."""
NORMS = ("ln_attn", "input_layernorm", "ln_mlp", "post_attention_layernorm")
"""Names of LayerNorms in the checkpoints: those before attention, then those before the MLP."""


@dataclass(frozen=True)
class Vectors:
    """One vector for each token, in float32."""

    first: Tensor
    """(T, at most 64): the first components."""
    mean: Tensor
    """(T,)"""
    deviation: Tensor
    """(T,): the standard deviation."""
    norm: Tensor
    """(T,)"""

    @classmethod
    def of(cls, hidden: Tensor) -> "Vectors":
        """Those of hidden states (1, T, d)."""
        wide = hidden[0].float()
        deviation = wide.std(-1, correction=0)
        return cls(wide[:, :SHOWN].clone().cpu(), wide.mean(-1).cpu(), deviation.cpu(), wide.norm(dim=-1).cpu())


@dataclass(frozen=True)
class Heads:
    """Queries (H, T, D), and keys and values (G, T, D), in float32."""

    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def of(cls, fused: Tensor, spec: FalconSpec, rotation: Rotation) -> "Heads":
        """The heads in a fused projection (1, T, (H + 2 G) x D), with the rotary embedding if `rotation` is given."""
        parts = split_heads(fused, spec.queries_per_kv_head, spec.head_dim, rotation)
        return cls(*(each[0].float() for each in parts))

    def cpu(self) -> "Heads":
        return Heads(self.query.cpu(), self.key.cpu(), self.value.cpu())


@dataclass(frozen=True)
class LayerRecord:
    """What one layer computed for a text."""

    vectors: Mapping[str, Vectors]
    """"input", "attention", "mlp", "output", and each LayerNorm's output by its name in the checkpoint."""
    query_before: Tensor
    """(H, T, D): the queries as they were projected, without the rotary embedding."""
    key_before: Tensor
    """(G, T, D): the keys as they were projected."""
    heads: Heads
    """Queries, keys and values as attention reads them: with the rotary embedding, if the model has one."""
    bias: Tensor | None
    """ALiBi's bias (H, T) on the score of each key; None for rotary embeddings."""
    neurons: Tensor
    """(T, at most 12): the numbers of the neurons with the largest absolute values after the activation."""
    activations: Tensor
    """Their values."""
    active: Tensor
    """(T,): the share of neurons with a value above 0."""


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments that a layer was called with."""


@dataclass(frozen=True)
class Record:
    """What a forward pass recorded."""

    layer: LayerRecord
    logits: Tensor
    """(V,): of the token after the text, in float32."""
    calls: tuple[Call, ...]
    """The arguments of every layer; empty where they would take over 64 MiB."""


def record(inspected: InspectedModel, ids: list[int], layer: int, known: Record | None = None) -> Record:
    """Records one of the model's layers for a text. known: a record of another layer for the same text."""
    recorder = _Recorder(inspected, layer)
    if known is not None and known.calls:
        arguments, keywords = known.calls[layer]
        with torch.inference_mode(), forward_hooks(inspected, recorder.hooks()):
            inspected.layers[layer](*arguments, **keywords)
        return replace(known, layer=recorder.result())
    calls: list[Call] = []
    hooks, spec = recorder.hooks(), inspected.spec
    if spec.layers * len(ids) * spec.d_model * inspected.decoder.ln_f.weight.element_size() <= _MAX_BYTES:
        hooks += [
            (each, lambda module, args, kwargs, output: calls.append((args, kwargs))) for each in inspected.layers
        ]
    with torch.inference_mode(), forward_hooks(inspected, hooks):
        output = inspected.model(
            input_ids=inspected.input_ids(ids), use_cache=False, logits_to_keep=1, return_dict=True
        )
    return Record(recorder.result(), output.logits[0, -1].float().cpu(), tuple(calls))


class _Recorder:
    """Forward hooks on one layer that keep what the record needs."""

    def __init__(self, inspected: InspectedModel, layer: int) -> None:
        self.inspected, self.layer = inspected, layer
        self.vectors: dict[str, Vectors] = {}
        self.values: dict[str, Any] = {}

    def hooks(self) -> list[tuple[Any, Any]]:
        module = self.inspected.layers[self.layer]
        norms = [name for name in NORMS if hasattr(module, name)]
        return [
            *((getattr(module, name), self._keeper(name)) for name in norms),
            *attention_hooks(self.inspected, [self.layer], self._keep_attention),
            (module.mlp.act, self._keep_activations),
            (module.mlp, self._keeper("mlp")),
            (module, self._keep_layer),
        ]

    def _keeper(self, name: str) -> Any:
        def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self.vectors[name] = Vectors.of(output)

        return keep

    def _keep_attention(self, layer: int, fused: Tensor, rotation: Rotation, output: Any) -> None:
        spec = self.inspected.spec
        before = Heads.of(fused, spec, None).cpu()
        self.values |= {"query_before": before.query, "key_before": before.key}
        self.values["heads"] = Heads.of(fused, spec, rotation).cpu()
        bias = alibi_bias(spec, fused.shape[1], fused.dtype, fused.device)
        self.values["bias"] = None if bias is None else bias.cpu()
        self.vectors["attention"] = Vectors.of(output[0])

    def _keep_activations(self, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        values = output[0].float()  # (T, 4 d)
        found = values.abs().topk(min(NEURONS, values.shape[-1])).indices
        self.values["neurons"], self.values["activations"] = found.cpu(), values.gather(1, found).cpu()
        self.values["active"] = (values > 0).float().mean(-1).cpu()

    def _keep_layer(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.vectors["input"] = Vectors.of(args[0] if args else kwargs["hidden_states"])
        self.vectors["output"] = Vectors.of(output[0] if isinstance(output, tuple) else output)

    def result(self) -> LayerRecord:
        return LayerRecord(self.vectors, **self.values)
