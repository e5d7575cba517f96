"""The route of a prediction: from its position, the token that mattered most in each layer, followed back to the start.

Of all heads and earlier tokens, the one with the largest attention probability times the norm of its value matters most
(Kobayashi et al. 2020, arXiv 2004.10102, without the output projection). A step to the token itself is left to the
residual stream. The route is a summary: it shows one of many ways.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.explanation.record import Heads
from falcon_kit.inspection.hooks import InspectedModel, forward_hooks
from falcon_kit.inspection.probabilities import BLOCK_SIZE, Rotation, alibi_bias, attention_hooks, attention_scores


@dataclass(frozen=True)
class RouteStep:
    """One layer of a route: from a position to the earlier position that mattered most to it."""

    layer: int
    position: int
    """The position whose output is followed."""
    head: int
    """The head whose attention to `key` mattered most."""
    key: int
    """The earlier position, which the layer below goes on with; for the first token, 0 itself."""
    probability: float
    """The attention probability of `key` in this head."""


def route(inspected: InspectedModel, ids: list[int]) -> list[RouteStep]:
    """The route of the prediction after the text, from the last layer to the first."""
    finder = _Finder(inspected.spec, len(ids))
    hooks = attention_hooks(inspected, range(inspected.spec.layers), finder.find)
    with torch.inference_mode(), forward_hooks(inspected, hooks):
        inspected.decoder(input_ids=inspected.input_ids(ids), use_cache=False)
    position, steps = len(ids) - 1, []
    for layer in reversed(range(inspected.spec.layers)):
        head, key, probability = (each[position] for each in finder.found[layer])
        steps.append(RouteStep(layer, position, int(head), int(key), float(probability)))
        position = int(key)
    return steps


class _Finder:
    """Finds, for each position in each layer, the head and the key that matter most."""

    def __init__(self, spec: FalconSpec, time: int) -> None:
        self.spec = spec
        empty = torch.zeros(time, dtype=torch.long, device="cpu")
        self.found = [(empty.clone(), empty.clone(), torch.ones(time, device="cpu")) for _ in range(spec.layers)]

    def find(self, layer: int, fused: Tensor, rotation: Rotation, output: Any) -> None:
        """Searches all positions of a layer; called by `attention_hooks`."""
        heads = Heads.of(fused, self.spec, rotation)
        bias = alibi_bias(self.spec, fused.shape[1], fused.dtype, fused.device)
        time = fused.shape[1]
        block = max(1, BLOCK_SIZE // (self.spec.query_heads * time))
        for start in range(1, time, block):  # position 0 has no earlier token
            self._find_in_block(self.found[layer], heads, bias, start, min(time, start + block))

    def _find_in_block(self, found: Any, heads: Heads, bias: Tensor | None, start: int, stop: int) -> None:
        probabilities = attention_rows(heads, bias, start, stop)  # (H, b, stop)
        lengths = heads.value[:, :stop].norm(dim=-1)  # (G, stop)
        copies = len(heads.query) // len(heads.value)
        matter = probabilities * lengths.repeat_interleave(copies, 0)[:, None]
        rows = torch.arange(stop - start, device=matter.device)
        matter[:, rows, rows + start] = -1  # a step to the token itself
        best = matter.transpose(0, 1).flatten(1).argmax(1)  # over heads and keys
        head, key = best // stop, best % stop
        for target, value in zip(found, (head, key, probabilities[head, rows, key]), strict=True):
            target[start:stop] = value


def attention_rows(heads: Heads, bias: Tensor | None, start: int, stop: int) -> Tensor:
    """The attention probabilities (H, stop - start, stop) of the queries `start` to `stop`."""
    scores = attention_scores(heads.query[:, start:stop], heads.key[:, :stop], bias)
    future = torch.ones(stop - start, stop, dtype=torch.bool, device=scores.device).triu(start + 1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)
