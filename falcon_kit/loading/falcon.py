"""A loaded Falcon: a transformers model and tokenizer, with methods to generate, stream and chat."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import FalconForCausalLM, PreTrainedTokenizerBase

from falcon_kit.catalogue.names import loadable_name
from falcon_kit.catalogue.spec import FalconSpec, context_limit
from falcon_kit.display.documented import documented
from falcon_kit.display.errors import check_whole, plain_scalar, printable, require
from falcon_kit.display.saving import atomic_folder
from falcon_kit.display.tables import format_bytes, html_table
from falcon_kit.generation import arguments, generate
from falcon_kit.generation.batches import texts_in_order
from falcon_kit.generation.calls import Generated, typed
from falcon_kit.generation.chat import ChatFormat, Message, check_messages, encode, latest_turns
from falcon_kit.generation.generate import GenerateTask
from falcon_kit.generation.guarding import Guard, GuardedStream, check_given, checked, guarded
from falcon_kit.generation.own_format import own_format
from falcon_kit.generation.prompts import Prompt, check_length, check_several, is_conversation, is_cut
from falcon_kit.generation.sampling import split_settings, stop_strings
from falcon_kit.generation.stream import Stream
from falcon_kit.generation.text import Generation
from falcon_kit.loading.quantization import Weights, stored_quantisation, weights
from falcon_kit.loading.writing import check_complete, check_replaceable, write_model
from falcon_kit.model import modeling
from falcon_kit.parallel.ranks import local_tensor
from falcon_kit.planning.plan import Plan

_ONE_TEXT: dict[str, Any] = {"num_return_sequences": 1}  # of a chat or a stream, whatever the checkpoint's default is
_COMPILABLE = {"use_cache": (None, True), "num_beams": (None, 1), **dict.fromkeys(arguments.ASSISTED, (None,))}
"""The values with which decoding can be compiled: token by token, with a cache."""


def first_rows(model: FalconForCausalLM) -> dict[str, Tensor]:
    """The first row of each weight of the layers, on the CPU; without those that are quantised or offloaded."""
    weights = {name: local_tensor(each.detach()) for name, each in model.transformer.h.named_parameters()}
    plain = {name: each for name, each in weights.items() if each.is_floating_point() and each.dim() == 2}
    return {name: each[:1].to("cpu", copy=True) for name, each in plain.items() if not (each.is_meta or each.is_mkldnn)}


@documented
@dataclass(frozen=True, repr=False, eq=False)
class Falcon:
    """A loaded Falcon. `model, tokenizer = falcon` gives the plain transformers objects; `save` writes both."""

    model: FalconForCausalLM
    """The model, in evaluation mode."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer, with a chat template."""
    spec: FalconSpec
    """Its published or configured shape."""
    plan: Plan
    """The memory plan made before the weights were read."""
    loaded_format: ChatFormat
    """The chat format that `load` chose."""
    dtype_reason: str
    decoding: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for every call of transformers' `generate`: a static cache, where decoding is compiled."""
    loaded_template: Any = None
    """The tokenizer's chat template as it was then."""
    loaded_rows: Mapping[str, Tensor] = field(init=False)
    """The first row of each weight of the layers as it was then."""

    def __post_init__(self) -> None:
        if self.loaded_template is None:
            object.__setattr__(self, "loaded_template", self.tokenizer.chat_template)
        object.__setattr__(self, "loaded_rows", first_rows(self.model))

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    @typed
    def generate(self, prompt: Prompt, *, guardrails: Guard | None = None, **settings: Any) -> Generated:
        """The continuation of a prompt as a `Generation`; for several prompts or sequences a list of them.

        `settings` are the fields of `falcon_kit.Sampling` (max_new_tokens, temperature, top_k, top_p, stop,
        seed, ...) and any other argument of transformers' `generate`; assistant_model, the draft model of assisted
        generation, may be a Falcon. guardrails: what `fk.guardrails(...)` returned; it checks each prompt before the
        model reads it, and each text before it is returned. Raises ValueError for an empty prompt, one longer than the
        context, or settings out of range; `Blocked` if the guardrails block a text.
        """
        check_given(guardrails, prompt, self.tokenizer)
        settings = self._with_decoding(settings)
        return checked(guardrails, lambda: generate.generate(self.model, self.tokenizer, prompt, **settings))

    def generate_each(
        self,
        prompts: Iterable[str | Sequence[int] | Sequence[Message]],
        *,
        batch_size: int = 16,
        guardrails: Guard | None = None,
        **settings: Any,
    ) -> Iterator[Generation]:
        """Continues any number of prompts, or answers conversations, and yields the results in the same order.

        batch_size: how many prompts run at a time. They have similar lengths, chosen from those of the next 8 batches,
        and none shortens another's text. Each batch begins with the `seed`. Only batches of 1 run a compiled step.
        `settings` are those of `generate`, whose errors name the prompt by its number from 1. An error, Ctrl-C and
        `Blocked` lose what was not yielded yet.
        """
        check_several(prompts)
        check_whole("batch_size", batch_size, 1)
        settings = {**_ONE_TEXT, **self._with_decoding(settings, batch_size == 1)}
        sampling, options = split_settings(settings)
        require(sampling.num_return_sequences == 1, "each prompt gives one text: leave num_return_sequences at 1")
        require(options.get(arguments.CACHE) is None, f"{arguments.CACHE} belongs to one prompt: leave it out")
        texts = texts_in_order(self._tasks(prompts, guardrails, settings), batch_size)
        return (checked(guardrails, each) for each in texts)

    def _tasks(
        self, prompts: Iterable[Any], guardrails: Guard | None, settings: dict[str, Any]
    ) -> Iterator[GenerateTask]:
        """The task of each prompt, and of each conversation."""
        for number, prompt in enumerate(prompts, 1):
            check_given(guardrails, prompt, self.tokenizer)
            try:
                given = self._turns(prompt, settings) if is_conversation(prompt) else {**settings, "prompt": prompt}
                strip = given.pop("strip", False)
                task = GenerateTask(self.model, self.tokenizer, given.pop("prompt"), given, strip)
                require(not task.returns_list, "it is a list of prompts: give each by itself")
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None
            yield task

    def stream(
        self, prompt: Prompt | Sequence[Message], *, guardrails: Guard | None = None, **settings: Any
    ) -> Stream | GuardedStream:
        """The continuation of a prompt, or the answer to a conversation, piece by piece; closing it stops the model.

        With guardrails, a piece comes once none of it can become part of a finding. `Blocked` stops the model.
        """
        check_given(guardrails, prompt, self.tokenizer)
        settings = self._with_decoding(settings)
        if is_conversation(prompt):
            settings = self._turns(prompt, settings)
        else:
            settings = {**_ONE_TEXT, **settings, "prompt": prompt}
        return guarded(generate.stream(self.model, self.tokenizer, **settings), guardrails)

    def chat(self, messages: Sequence[Message], *, guardrails: Guard | None = None, **settings: Any) -> Generation:
        """The answer to a conversation: [{"role": "user", "content": "..."}]. It ends before the next user message.

        Special tokens written out in a message are encoded as plain text. With guardrails, the content of each message
        is checked as a prompt, the system's too. Raises ValueError for unknown roles or messages out of order.
        """
        settings = self._with_decoding(settings)
        if split_settings(settings)[0].num_return_sequences != 1:
            raise ValueError("chat gives one answer: leave num_return_sequences at 1, or call chat again")
        check_given(guardrails, messages, self.tokenizer)
        settings = self._turns(messages, settings)
        return cast(Generation, checked(guardrails, lambda: generate.generate(self.model, self.tokenizer, **settings)))

    def save(self, directory: str | Path) -> Path:
        """Writes the model as it is in memory, its settings of generation and its tokenizer with the chat template.

        directory: a new folder, or one with a checkpoint, which the model replaces once it is saved; it is returned,
        and `fk.load` and transformers load it. Raises ValueError for a model with adapters attached or offloaded parts,
        and NotADirectoryError, FileExistsError or OSError where the directory cannot be written.
        """
        folder = Path(directory).expanduser()
        check_complete(self.model)
        check_replaceable(folder, "directory")
        with atomic_folder(folder, self.weight_bytes) as partial:
            write_model(self.model, self.tokenizer, partial)
        return folder

    def _turns(self, messages: Sequence[Message], settings: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `generate` for a conversation: its token ids, and the user prefix as a stop string."""
        format = self.chat_format
        stop = (*format.stop, *stop_strings(settings.get("stop")))
        context = context_limit(self.model.config)
        if settings.get("truncate") is None:
            for number, each in enumerate(check_messages(messages), 1):
                check_length(each["content"], self.tokenizer, context, f"message {number}")
        else:
            sampling, _ = split_settings(arguments.add_checkpoint_settings(settings, self.model.generation_config))
            messages = latest_turns(
                check_messages(messages),
                lambda turns: not is_cut(encode(turns, self.tokenizer, format), context, sampling),
            )
        ids = encode(messages, self.tokenizer, format)
        ends = arguments.end_token_ids(settings, self.model.generation_config, self.tokenizer)
        if settings.get("eos_token_id") is None and self.tokenizer.eos_token_id is not None:
            ends = [*dict.fromkeys([*ends, self.tokenizer.eos_token_id])]  # templates end an answer with it
        return {**_ONE_TEXT, **settings, "prompt": ids, "stop": stop, "strip": True, "eos_token_id": ends}

    def _with_decoding(self, settings: dict[str, Any], compiled: bool = True) -> dict[str, Any]:
        """The settings, those of a `generation_config` by name, and `decoding` unless they choose another way."""
        settings = arguments.expand_generation_config(arguments.without_tokenizer(settings, self.tokenizer))
        if isinstance(draft := settings.get("assistant_model"), Falcon):
            settings["assistant_model"] = draft.model
            if draft.model.config.vocab_size != self.model.config.vocab_size:
                settings.setdefault("assistant_tokenizer", draft.tokenizer)
        if compiled and self.decoding and self._can_be_compiled(settings):
            return {**self.decoding, **settings}
        return settings

    def _can_be_compiled(self, settings: Mapping[str, Any]) -> bool:
        """Whether the settings decode token by token, in a cache of the kit's, and no hook was added to the model.

        A compiled step does not run a hook that was added later, such as an ablation.
        """
        if arguments.CACHE in settings or "cache_implementation" in settings:
            return False
        for name, values in _COMPILABLE.items():
            value = plain_scalar(settings.get(name, getattr(self.model.generation_config, name, None)))
            if not isinstance(value, int | None) or value not in values:  # other types: a model, or refused later
                return False
        return not any(each._forward_hooks or each._forward_pre_hooks for each in self.model.modules())

    @property
    def chat_format(self) -> ChatFormat:
        """The format in which `chat` writes messages; that of the tokenizer's chat template, if it was set since."""
        if self.tokenizer.chat_template in (None, self.loaded_template):
            return self.loaded_format
        return own_format(self.tokenizer, "tokenizer.chat_template")

    @property
    def generation_settings(self) -> dict[str, Any]:
        """The checkpoint's settings of generation: they count in each call that does not give others."""
        return arguments.checkpoint_settings(self.model.generation_config)

    @property
    def name(self) -> str:
        """The name that `fk.load` loads this model by: a hub id, the name of an embedded model, or a directory."""
        return loadable_name(self.spec, self.model.name_or_path or "")

    @property
    def weights(self) -> Weights:
        """The dtype and bytes of each part's weights, counted in the model as it is now; a table in Jupyter."""
        return weights(self.model)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in memory, with the scales of quantised ones; tied weights count once."""
        return self.weights.total_bytes

    @property
    def dtype(self) -> str:
        """The dtype of the weights: float32, bfloat16, float16, int8, int4, nf4, nf4-double; LayerNorms and embeddings
        are never quantised."""
        return stored_quantisation(self.model.config) or str(self.model.dtype).removeprefix("torch.")

    def _facts(self) -> dict[str, str]:
        places = {str(parameter.device) for parameter in self.model.parameters()}
        grouped = isinstance(self.model, modeling.FalconForCausalLM)
        settings = [f"{name}={value!r}" for name, value in self.generation_settings.items()]
        devices = sorted("disk or host memory" if place == "meta" else place for place in places)
        return {
            "parameters": f"{self.spec.parameters:,}",
            "weights": format_bytes(self.weight_bytes),
            "dtype": f"{self.dtype} ({self.dtype_reason})",
            "devices": ", ".join(devices),
            "heads": f"{self.spec.query_heads} query, {self.spec.kv_heads} KV, head_dim {self.spec.head_dim}",
            "attention": "keys and values kept per KV head" if grouped else "transformers' own",
            "context": f"{context_limit(self.model.config)} tokens",
            "chat format": self.chat_format.name,
        } | ({"generation settings": ", ".join(settings)} if settings else {})

    def __repr__(self) -> str:
        facts = self._facts()
        return (
            f"Falcon({printable(self.spec.name)}, {facts['parameters']} parameters, {self.dtype} on {facts['devices']})"
        )

    def _repr_html_(self) -> str:
        return html_table(self.spec.name, (), self._facts().items())
