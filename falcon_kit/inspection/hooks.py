"""The Falcon model that is inspected, its token ids, and forward hooks that are always removed."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import FalconForCausalLM, PreTrainedTokenizerBase
from transformers.models.falcon.modeling_falcon import FalconModel

from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import is_whole, plain_scalar, require, shown
from falcon_kit.generation.prompts import check_length, check_prompt, check_tokens, has_soft_prompt, token_ids
from falcon_kit.generation.training import not_in_training
from falcon_kit.inspection.token import token_text
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
    """The text of each token; a part of a character is written as its bytes, "\\xe4\\xbd"."""


@dataclass(frozen=True)
class InspectedModel:
    """A Falcon model with its tokenizer and its shape."""

    model: FalconForCausalLM
    """The whole model: the kit's or transformers' own, with or without adapters."""
    decoder: FalconModel
    """The Falcon decoder inside it, without the language-modelling head."""
    tokenizer: PreTrainedTokenizerBase
    spec: FalconSpec
    """The model's shape as it is now."""

    @property
    def layers(self) -> list[Any]:
        """The decoder layers, first to last."""
        return list(self.decoder.h)

    def encode(self, text: TextOrIds) -> list[int]:
        """The token ids of a text. Raises ValueError for what `generate` refuses, and for several texts."""
        (prompt, *more), is_single = check_prompt(text)
        require(is_single, f"an inspection is of one text, got a list of {1 + len(more)}: call it for each")
        context = self.spec.context
        if isinstance(prompt, str):
            check_length(prompt, self.tokenizer, context, "the text")
        (ids,) = token_ids(self.tokenizer, [prompt])
        check_tokens([ids], self.spec.vocabulary)
        require(len(ids) <= context, f"the text has {len(ids)} tokens, the model's context is {context}: shorten it")
        return ids

    def input_ids(self, ids: Sequence[int]) -> Tensor:
        """Token ids as a tensor (1, T) on the device of the input embeddings."""
        return torch.tensor([list(ids)], device=self.decoder.get_input_embeddings().weight.device)

    def token_texts(self, ids: Iterable[int]) -> tuple[str, ...]:
        """The text of each token by itself; a part of a character is written as its bytes."""
        return tuple(token_text(self.tokenizer, each) for each in ids)

    def check_heads(self, heads: Iterable[tuple[int, int]], count: int, kind: str) -> list[tuple[int, int]]:
        """Pairs of a layer and one of its `count` heads. Raises IndexError for one out of range, TypeError for anything
        that is not a pair. `kind` names the heads in errors."""
        pairs = []
        each: Any
        for each in _several(heads):
            pair = each.tolist() if hasattr(each, "tolist") else each  # a row of an array
            if not (isinstance(pair, tuple | list) and len(pair) == 2):
                raise TypeError(
                    f"{shown(pair)} is not a pair of a layer and a {kind}: give a list of pairs, such as [(0, 1)]"
                )
            pairs.append((check_index(pair[0], self.spec.layers, "layer"), check_index(pair[1], count, kind)))
        return pairs


def inspect_model(falcon: Any) -> InspectedModel:
    """The Falcon in what `fk.load` returns, or in a pair (model, tokenizer). Raises TypeError for anything else, and
    ValueError for an adapter of virtual tokens."""
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
    require(
        not has_soft_prompt(model),
        "the model has an adapter of virtual tokens, which inspection and scoring leave out: take it off, or give a "
        "model with LoRA",
    )
    config = decoder.config.to_dict()
    spec = getattr(falcon, "spec", None) or FalconSpec.from_config(config, "FalconConfig")
    return InspectedModel(model, decoder, tokenizer, live_spec(spec, decoder))


def language_head(inspected: InspectedModel) -> Any:
    """The language-modelling head of the model. Raises ValueError if it has none."""
    head = inspected.model.get_output_embeddings()
    require(head is not None, f"{type(inspected.model).__name__} has no language-modelling head: give the whole model")
    return head


def check_index(index: int, count: int, kind: str) -> int:
    """An index from 0 to `count` - 1. Raises IndexError for any other."""
    index = plain_scalar(index)
    if not is_whole(index, 0, count - 1):
        raise IndexError(f"{kind} {shown(index)} does not exist: {kind}s are numbered 0 to {count - 1}")
    return int(index)


def check_indices(given: int | Iterable[int] | None, count: int, kind: str) -> list[int]:
    """One index or several, each once, checked by `check_index`; None stands for all of them."""
    given = range(count) if given is None else plain_scalar(given)
    return list(dict.fromkeys(check_index(each, count, kind) for each in _several(given)))


def _several(given: Any) -> Iterable[Any]:
    """One or several: a text is one."""
    return given if isinstance(given, Iterable) and not isinstance(given, str) else [given]


@contextmanager
def forward_hooks(inspected: InspectedModel, hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Registers forward hooks of this thread and sets evaluation mode. Undoes both, also after an error or Ctrl-C."""
    with ExitStack() as undo:
        undo.enter_context(evaluation_mode(inspected.model))
        for module, hook in hooks:
            undo.callback(module.register_forward_hook(of_this_thread(hook), with_kwargs=True).remove)
        yield


def of_this_thread(hook: Hook) -> Hook:
    """The hook, without effect in other threads: a playground may generate with the model that is inspected."""
    owner = threading.get_ident()
    return lambda *arguments: hook(*arguments) if threading.get_ident() == owner else None


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Turns dropout off, and restores each module's own mode.

    Raises RuntimeError if another thread trains the model, at the end also if it has begun to meanwhile.
    """
    with not_in_training(model), switched_off(model.modules(), "training"):
        yield


@contextmanager
def switched_off(objects: Iterable[Any], name: str) -> Iterator[None]:
    """A context in which an attribute of all objects is False; those that had True have it again afterwards."""
    on = [each for each in objects if getattr(each, name)]
    for each in on:
        setattr(each, name, False)
    try:
        yield
    finally:
        for each in on:
            setattr(each, name, True)
