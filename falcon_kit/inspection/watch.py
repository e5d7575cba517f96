"""How a text goes through a Falcon while it is watched: the model behind what was given, its tokens, and hooks that
always come off.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import FalconForCausalLM, PreTrainedTokenizerBase
from transformers.models.falcon.modeling_falcon import FalconModel

from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.parallel.launching import ParallelFalcon

Text = str | Sequence[int]
"""A text, or one already turned into token ids."""
Hook = Callable[..., Any]
"""Called as torch calls a forward hook with keyword arguments: (module, args, kwargs, output)."""


@dataclass(frozen=True)
class Subject:
    """A Falcon under examination."""

    model: FalconForCausalLM
    """As it was given: with or without adapters, the kit's or transformers' own."""
    decoder: FalconModel
    """The Falcon inside it, without its head."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer."""
    spec: FalconSpec
    """Its shape."""

    @property
    def layers(self) -> list[Any]:
        """The decoder layers, first to last."""
        return list(self.decoder.h)

    def encode(self, text: Text) -> list[int]:
        """The token ids of a text. Raises ValueError where there are none, too many, or unknown ones."""
        ids = list(self.tokenizer(text, verbose=False)["input_ids"]) if isinstance(text, str) else list(text)
        if not ids:
            raise ValueError("the text is empty: give the model something to read")
        if wrong := [each for each in ids if not (isinstance(each, int) and 0 <= each < self.spec.vocabulary)]:
            raise ValueError(f"{wrong[0]!r} is no token id of this model: they go from 0 to {self.spec.vocabulary - 1}")
        limit = self.decoder.config.max_position_embeddings
        if len(ids) > limit:
            raise ValueError(f"the text has {len(ids)} tokens, the model's context is {limit}: shorten it")
        return ids

    def tensor(self, ids: Sequence[int]) -> Tensor:
        """Token ids as the model takes them, (1, T)."""
        return torch.tensor([list(ids)], device=self.decoder.get_input_embeddings().weight.device)

    def words(self, ids: Iterable[int]) -> tuple[str, ...]:
        """The text of each token by itself."""
        return tuple(str(self.tokenizer.decode([each])) for each in ids)

    def check_heads(self, heads: Iterable[tuple[int, int]], count: int, what: str) -> list[tuple[int, int]]:
        """Pairs of a layer and one of its `count` heads or groups. Raises IndexError for one that is not there, and
        TypeError for what is no pair."""
        pairs = list(heads)
        if wrong := [each for each in pairs if not (isinstance(each, tuple | list) and len(each) == 2)]:
            raise TypeError(f"{wrong[0]!r} is no pair of a layer and a {what}: give a list of pairs, such as [(0, 1)]")
        for layer, head in pairs:
            check_index(layer, self.spec.layers, "layer")
            check_index(head, count, what)
        return pairs


def subject(falcon: Any) -> Subject:
    """The Falcon in what `fk.load` gives, or in a pair of model and tokenizer. Raises TypeError for anything else."""
    if isinstance(falcon, ParallelFalcon):
        raise TypeError(
            "the weights of a ParallelFalcon live in other processes, where they cannot be watched: load the model "
            "without tensor_parallel"
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
    return Subject(model, decoder, tokenizer, spec)


def check_index(index: int, count: int, what: str) -> int:
    """An index from 0. Raises IndexError for one out of range."""
    if not isinstance(index, int) or not 0 <= index < count:
        raise IndexError(f"{what} {index!r} is not there: the model has {count}, from 0 to {count - 1}")
    return index


@contextmanager
def watching(subject: Subject, hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Hooks on the modules' outputs, in evaluation mode; both are undone however it ends, with Ctrl-C too."""
    with ExitStack() as undo:
        undo.enter_context(evaluating(subject.model))
        for module, hook in hooks:
            undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside; each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
