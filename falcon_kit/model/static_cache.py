"""Decoding in a static cache reads the slots that are filled, and not all of them.

The length of the mask is the number of slots that attention reads. It is a power of two, so that a compiled step needs
few CUDA graphs; torch.compile takes all lengths in one graph.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, GenerationMixin
from transformers.utils.output_capturing import capture_outputs

from falcon_kit.generation.arguments import CACHE, one_cache
from falcon_kit.model.attention import ATTENTION

FEWEST_SLOTS = 256
"""The fewest slots that a step reads."""


def slots_read(length: int, slots: int) -> int:
    """How many slots of a static cache a step of `length` tokens reads: the next power of two from `FEWEST_SLOTS` on.

    A text of any length needs a handful of CUDA graphs, and reads at most twice the keys that it has.
    """
    return min(slots, max(FEWEST_SLOTS, 1 << (length - 1).bit_length()))


def capture_unless_compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `capture_outputs`, but not in a compiled step that returns neither hidden states nor attention.

    It reads a dictionary of all classes of models. Each new class changes that, and torch.compile would compile the
    step again.
    """
    capturing, captured = capture_outputs(forward), ("output_hidden_states", "output_attentions")

    @wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        as_tuple = not kwargs.get("return_dict", self.config.return_dict)
        wanted = any(kwargs.get(each, getattr(self.config, each)) for each in captured)
        hooked = getattr(self, "_output_capturing_hooks_installed", False)  # which read what it sets
        if as_tuple or wanted or hooked or not torch.compiler.is_compiling():
            return capturing(self, *args, **kwargs)
        kwargs.pop("return_dict", None)
        return forward(self, *args, **kwargs)

    return wrapper


class ReadsFilledSlots(GenerationMixin):
    """A model whose masks, in `generate` with a static cache, are as long as the slots to read."""

    config: Any

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; the mask of a static cache is as long as the slots that are read, see `slots_read`."""
        cache = one_cache(cache, past_key_values)
        read = self._slots_of_step(cache, attention_mask)
        if read and attention_mask is not None and next_sequence_length == 1:
            # A new token sees all tokens before it; transformers' mask for any causal attention takes many kernels.
            attention_mask = pad(attention_mask.bool()[:, None, None], (0, read - attention_mask.shape[1]))
        stock: Any = super()  # transformers misdeclares its self
        inputs: dict[str, Any] = stock.prepare_inputs_for_generation(
            input_ids, next_sequence_length, cache, attention_mask, inputs_embeds, **kwargs
        )
        if read and (mask := inputs.get("attention_mask")) is not None:
            if mask.shape[-1] > read:
                inputs["attention_mask"] = mask = mask[..., :read].contiguous()
            torch._dynamo.maybe_mark_dynamic(mask, 3)  # one graph for all lengths
        return inputs

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *first: Any, **more: Any
    ) -> Any:
        """As in transformers, which drops a mask of ones before: the steps after the prompt have it again.

        Its length says how many slots are filled; the cache knows that on the GPU only.
        """
        stock: Any = super()
        outputs = stock._prefill(input_ids, generation_config, model_kwargs, *first, **more)
        length, past = getattr(generation_config, "_mask_length", None), model_kwargs.get(CACHE)
        if length and model_kwargs.get("attention_mask") is None and past is not None and past.is_compileable:
            model_kwargs["attention_mask"] = input_ids.new_ones(len(input_ids), length)
        return outputs

    def _slots_of_step(self, past: Cache | None, mask: Tensor | None) -> int:
        """The slots that a step reads; 0 without a static cache, and for masks of the caller or another backend."""
        if past is None or not past.is_compileable or self.config._attn_implementation not in ATTENTION:
            return 0
        return 0 if mask is None or mask.ndim != 2 else slots_read(mask.shape[1], past.get_max_length())
