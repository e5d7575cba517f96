"""Cross-entropy of a language-modelling head, without the scores of every token over the vocabulary in memory at once.

A Falcon has 65,024 words: for 2048 tokens their logits, log-probabilities and gradients in float32 are 1.6 GB, more
than a layer's activations, and prompts, which are not trained on, take their share for nothing. Here the head runs over
a few labelled tokens at a time, and each chunk's gradient is taken at once, so that nothing of it has to be kept or
computed again (as in Liger's fused loss, Hsu et al. 2024, arXiv 2410.10989).

Shapes: B batch, T time, N labelled tokens, d d_model, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from falcon_kit.catalogue.memory import LOSS_CHUNK

CHUNK = LOSS_CHUNK
"""Labelled tokens whose logits are in memory at once."""
IGNORED = -100
"""The label of a token that is not trained on."""


def language_model_loss(
    head: nn.Module, hidden_states: Tensor, labels: Tensor, count: Tensor | int | None = None
) -> Tensor:
    """Mean cross-entropy (a number) of each next token under `head(hidden_states)`, as transformers computes it.

    hidden_states (B, T, d), labels (B, T) with -100 where there is nothing to learn. `count`: divide by this number of
    labels instead of those here (gradient accumulation, several processes). Without any label the loss is 0.
    """
    wanted = labels[:, 1:].to(hidden_states.device)  # a model may be spread over devices
    trained = wanted != IGNORED  # (B, T - 1)
    picked, targets = hidden_states[:, :-1][trained], wanted[trained]  # (N, d), (N)
    weights = [each for each in head.parameters() if each.requires_grad]
    total: Tensor = _ChunkedSum.apply(picked, targets, head, *weights)  # torch's
    return total / (max(1, len(targets)) if count is None else count)


class _ChunkedSum(torch.autograd.Function):
    """Sum of cross-entropies; gradients are computed on the way there, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module, *weights: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        targets = targets.to(next(head.parameters()).device)  # where the logits come out
        wanted = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[3:])
        gradients = [torch.zeros_like(each) for each in (hidden, *weights)] if wanted else []
        for start in range(0, len(targets), CHUNK):
            piece = slice(start, start + CHUNK)
            with torch.set_grad_enabled(wanted):
                part = hidden[piece].detach().requires_grad_(wanted)
                loss = cross_entropy(head(part).float(), targets[piece], reduction="sum")  # no name keeps the logits
            if wanted:
                by_hidden, *by_weights = torch.autograd.grad(loss, (part, *weights))
                gradients[0][piece] = by_hidden
                for held, new in zip(gradients[1:], by_weights, strict=True):
                    held += new
            total += loss.detach().to(total.device)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, *by_weights = (given[0].to(each.dtype) * each for each in ctx.saved_tensors)
        return by_hidden, None, None, *by_weights
