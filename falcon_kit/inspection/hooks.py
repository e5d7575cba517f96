"""The Falcon model that is inspected, its token ids, and forward hooks that are always removed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import FalconForCausalLM, PreTrainedTokenizerBase
from transformers.models.falcon.modeling_falcon import FalconModel

from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import is_whole, plain_scalar, shown
from falcon_kit.generation.control_tokens import encode_prompt
from falcon_kit.generation.prompts import check_length
from falcon_kit.model.checks import live_spec
from falcon_kit.parallel.launching import ParallelFalcon

TextOrIds = str | Sequence[int]
"""A text, or its token ids."""
Hook = Callable[..., Any]
"""A torch forward hook with keyword arguments: called with (module, args, kwargs, output)."""


@dataclass(frozen=True, repr=False)
class TextResult:
    """Base of results about one text."""

    spec: FalconSpec
    """The model's shape."""
    ids: tuple[int, ...]
    """The token ids of the text, T of them."""
    token_texts: tuple[str, ...]
    """The text of each token."""


@dataclass(frozen=True)
class InspectedModel:
    """A Falcon model with its tokenizer and its shape."""

    model: FalconForCausalLM
    """The whole model: the kit's or transformers' own, with or without adapters."""
    decoder: FalconModel
    """The Falcon decoder inside it, without the language-modelling head."""
    tokenizer: PreTrainedTokenizerBase
    """The model's tokenizer."""
    spec: FalconSpec
    """The model's shape as it is now."""

    @property
    def layers(self) -> list[Any]:
        """The decoder layers, first to last."""
        return list(self.decoder.h)

    def encode(self, text: TextOrIds) -> list[int]:
        """The token ids of a text. Raises ValueError if there are none, too many, or unknown ones."""
        if isinstance(text, str):
            check_length(text, self.tokenizer, self.spec.context, "the text")
        ids = encode_prompt(text, self.tokenizer) if isinstance(text, str) else [plain_scalar(each) for each in text]
        if not ids:
            raise ValueError("the text is empty: give at least one token")
        if unknown := [each for each in ids if not is_whole(each, 0, self.spec.vocabulary - 1)]:
            raise ValueError(
                f"{shown(unknown[0])} is not a token id of this model: ids range from 0 to {self.spec.vocabulary - 1}"
            )
        if len(ids) > self.spec.context:
            raise ValueError(f"the text has {len(ids)} tokens, the model's context is {self.spec.context}: shorten it")
        return ids

    def input_ids(self, ids: Sequence[int]) -> Tensor:
        """Token ids as a tensor (1, T) on the device of the input embeddings."""
        return torch.tensor([list(ids)], device=self.decoder.get_input_embeddings().weight.device)

    def token_texts(self, ids: Iterable[int]) -> tuple[str, ...]:
        """The text of each token, decoded on its own."""
        return tuple(str(self.tokenizer.decode([each])) for each in ids)

    def check_heads(self, heads: Iterable[tuple[int, int]], count: int, kind: str) -> list[tuple[int, int]]:
        """Pairs of a layer and one of its `count` heads. Raises IndexError for one out of range, TypeError for anything
        that is not a pair. `kind` names the heads in errors."""
        pairs = list(heads)
        if wrong := [each for each in pairs if not (isinstance(each, tuple | list) and len(each) == 2)]:
            raise TypeError(
                f"{wrong[0]!r} is not a pair of a layer and a {kind}: give a list of pairs, such as [(0, 1)]"
            )
        for layer, head in pairs:
            check_index(layer, self.spec.layers, "layer")
            check_index(head, count, kind)
        return pairs


def inspect_model(falcon: Any) -> InspectedModel:
    """The Falcon in what `fk.load` returns, or in a pair (model, tokenizer). Raises TypeError for anything else."""
    if isinstance(falcon, ParallelFalcon):
        raise TypeError(
            "the weights of a ParallelFalcon are in other processes, where forward hooks cannot be registered: load "
            "the model without tensor_parallel"
        )
    try:
        model, tokenizer = falcon
    except (TypeError, ValueError):
        raise TypeError(f"give what fk.load returns, or (model, tokenizer); got {type(falcon).__name__}") from None
    modules = model.modules() if isinstance(model, nn.Module) else ()
    decoder = next((module for module in modules if isinstance(module, FalconModel)), None)
    if decoder is None:
        raise TypeError(f"{type(model).__name__} is not a Falcon: load one with fk.load")
    config = decoder.config.to_dict()
    spec = getattr(falcon, "spec", None) or FalconSpec.from_config(config, "FalconConfig")
    return InspectedModel(model, decoder, tokenizer, live_spec(spec, decoder))


def check_index(index: int, count: int, kind: str) -> int:
    """An index from 0 to `count` - 1. Raises IndexError for any other."""
    index = plain_scalar(index)
    if not is_whole(index, 0, count - 1):
        raise IndexError(f"{kind} {shown(index)} does not exist: the model has {count}, numbered 0 to {count - 1}")
    return index


@contextmanager
def forward_hooks(inspected: InspectedModel, hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Registers forward hooks and sets evaluation mode. Undoes both at the end, after an exception or Ctrl-C too."""
    with ExitStack() as undo:
        undo.enter_context(evaluation_mode(inspected.model))
        for module, hook in hooks:
            undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Turns dropout off, and restores each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
