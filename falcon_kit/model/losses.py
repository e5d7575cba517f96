"""Cross-entropy of a language-modelling head in chunks of tokens, so that the logits of all tokens are never in memory.

The vocabulary of a Falcon has 65,024 tokens: the logits, log-probabilities and gradients of 2048 tokens take 1.6 GB in
float32, more than the activations of a layer, and include prompt tokens without a label. Here the head runs over one
chunk of labelled tokens at a time. Each chunk's gradient is computed in the forward pass, so that no logits are stored
or computed twice (as in Liger's fused loss, Hsu et al. 2024, arXiv 2410.10989).

Shapes: B batch, T time, N labelled tokens, d d_model, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from falcon_kit.catalogue.memory import LOSS_CHUNK

IGNORED = -100
"""The label of a token without a loss."""


def language_model_loss(
    head: nn.Module, hidden_states: Tensor, labels: Tensor, count: Tensor | int | None = None
) -> Tensor:
    """Mean cross-entropy (a scalar) of the next tokens under `head(hidden_states)`, as transformers computes it.

    hidden_states (B, T, d), labels (B, T) with -100 for tokens without a loss. `count` replaces the number of labels as
    the divisor (gradient accumulation, several processes). Without labels the loss is 0.
    """
    next_tokens = labels[:, 1:].to(hidden_states.device)  # the labels may be on another device than the last layer
    labelled = next_tokens != IGNORED  # (B, T - 1)
    picked, targets = hidden_states[:, :-1][labelled], next_tokens[labelled]  # (N, d), (N)
    weights = [each for each in head.parameters() if each.requires_grad]
    total: Tensor = _ChunkedSum.apply(picked, targets, head, *weights)
    if isinstance(count, Tensor):
        count = count.to(total.device)  # the Trainer counts on its own device
    return total / (max(1, len(targets)) if count is None else count)


class _ChunkedSum(torch.autograd.Function):
    """Sum of the cross-entropies. The forward pass also computes the gradients, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module, *weights: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        targets = targets.to(next(head.parameters()).device)  # the device of the logits
        with_gradients = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[3:])
        gradients = [torch.zeros_like(each) for each in (hidden, *weights)] if with_gradients else []
        for start in range(0, len(targets), LOSS_CHUNK):
            chunk = slice(start, start + LOSS_CHUNK)
            with torch.set_grad_enabled(with_gradients):
                part = hidden[chunk].detach().requires_grad_(with_gradients)
                # logits without a variable are freed
                loss = cross_entropy(head(part).float(), targets[chunk], reduction="sum")
            if with_gradients:
                by_hidden, *by_weights = torch.autograd.grad(loss, (part, *weights))
                gradients[0][chunk] = by_hidden
                for total_gradient, gradient in zip(gradients[1:], by_weights, strict=True):
                    total_gradient += gradient
            total += loss.detach().to(total.device)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, *by_weights = (grad_outputs[0].to(each.dtype) * each for each in ctx.saved_tensors)
        return by_hidden, None, None, *by_weights
