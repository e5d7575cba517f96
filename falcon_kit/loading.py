"""`load`: a Falcon by embedded name, hub id or directory, handed back as plain transformers objects.

Remote code is never run, and pickled weights only load as bare tensors.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    CompileConfig,
    FalconConfig,
    FalconForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from falcon_kit import generation, modeling, parallel
from falcon_kit.catalogue import FalconSpec, format_bytes, html_table
from falcon_kit.chat import FALCON, HUB, ChatFormat, Message, chat_format, encode
from falcon_kit.checkpoints import check_weights, locate
from falcon_kit.environment import host_memory
from falcon_kit.generation import Generation, Prompt, Stream
from falcon_kit.kernels import faster_without_onednn
from falcon_kit.planning import CacheKind, NotEnoughMemory, Plan, plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = {"grouped": modeling.FalconForCausalLM, "transformers": FalconForCausalLM}
_SMALL = 2**30  # bytes of weights up to which a progress bar would only flash by


@dataclass(frozen=True, repr=False)
class Falcon:
    """A loaded Falcon. `model, tokenizer = falcon` gives the plain transformers objects."""

    model: FalconForCausalLM
    """The model, in evaluation mode."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer, with a chat template."""
    spec: FalconSpec
    """Its published or configured shape."""
    plan: Plan
    """What it takes and where it was to go, as planned before its weights were read."""
    chat_format: ChatFormat
    """How `chat` writes turns."""
    dtype_reason: str
    """Why the weights have the dtype they have."""
    decoding: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of transformers' `generate` that every call gets: a static cache, where the model was compiled."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    def generate(self, prompt: Prompt, **settings: Any) -> Any:  # one or a list: no overload can tell from `settings`
        """Continues a text: a `Generation`; for several texts or sequences, a list of them.

        `settings` are the fields of `falcon_kit.Sampling` (max_new_tokens, temperature, top_k, top_p, stop,
        seed, ...) and any other argument of transformers' `generate`. Raises ValueError for an empty prompt, one longer
        than the context, or settings out of range.
        """
        return generation.generate(self.model, self.tokenizer, prompt, **self._with_decoding(settings))

    def stream(self, prompt: Prompt | Sequence[Message], **settings: Any) -> Stream:
        """Continues a text, or answers a conversation, piece by piece; closing the iterator stops the model."""
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            settings = self._turns(cast(Sequence[Message], prompt), settings)
            return generation.stream(self.model, self.tokenizer, **self._with_decoding(settings))
        return generation.stream(self.model, self.tokenizer, cast(Prompt, prompt), **self._with_decoding(settings))

    def chat(self, messages: Sequence[Message], **settings: Any) -> Generation:
        """Answers a conversation: [{"role": "user", "content": "..."}]. Ends before the next speaker's turn.

        Special tokens that a message spells out stay text. Raises ValueError for unknown roles or turns out of order.
        """
        if settings.get("num_return_sequences", 1) != 1:
            raise ValueError("chat gives one answer: leave num_return_sequences at 1, or call chat again")
        settings = self._with_decoding(self._turns(messages, settings))
        return cast(Generation, generation.generate(self.model, self.tokenizer, **settings))

    def _turns(self, messages: Sequence[Message], settings: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `generate` for a conversation: its token ids, and the next speaker as a stop string."""
        given = settings.get("stop", ())
        stop = (*self.chat_format.stop, *((given,) if isinstance(given, str) else given))
        ids = encode(messages, self.tokenizer, self.chat_format)
        return {**settings, "prompt": ids, "stop": stop, "strip": True}

    def _with_decoding(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings and the model's own way of decoding, unless they ask for another."""
        other = ("past_key_values", "cache_implementation", "use_cache", "num_beams", *generation.ASSISTED)
        return settings if any(name in settings for name in other) else {**self.decoding, **settings}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers, tied ones once."""
        return sum(
            tensor.numel() * tensor.element_size() for tensor in (*self.model.parameters(), *self.model.buffers())
        )

    @property
    def _grouped(self) -> bool:
        return isinstance(self.model, modeling.FalconForCausalLM)

    def _facts(self) -> dict[str, str]:
        devices = sorted({str(parameter.device) for parameter in self.model.parameters()})
        return {
            "parameters": f"{self.model.num_parameters():,}",
            "weights": format_bytes(self.weight_bytes),
            "dtype": f"{str(self.model.dtype).removeprefix('torch.')} ({self.dtype_reason})",
            "devices": ", ".join(devices),
            "heads": f"{self.spec.query_heads} query, {self.spec.kv_heads} KV, head_dim {self.spec.head_dim}",
            "attention": "keys and values kept per KV head" if self._grouped else "transformers' own",
            "context": f"{self.spec.context} tokens",
            "chat format": self.chat_format.name,
        }

    def __repr__(self) -> str:
        facts = self._facts()
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"Falcon({self.spec.name}, {facts['parameters']} parameters, {dtype} on {facts['devices']})"

    def _repr_html_(self) -> str:
        return html_table(self.spec.name, (), self._facts().items())


def load(
    name: str | Path = "falconet",
    *,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    attention: Literal["grouped", "transformers"] = "grouped",
    compile: bool | CompileConfig = False,
    force: bool = False,
    chat: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    tensor_parallel: int | None = None,
) -> Falcon:
    """Loads a Falcon: "falconet", "falconet-instruct", a name of `fk.catalogue()`, a hub id, or a directory.

    dtype: "auto" (the checkpoint's, fitted to the hardware, with the reason kept), "float32", "bfloat16", "float16".
    device_map: as in transformers; unset, all GPUs there are, else the CPU.
    attention: "grouped" keeps keys and values once per KV head; "transformers" is the library's own Falcon, unmended.
    compile: decode on a GPU with a static cache of the whole context and a compiled step (transformers' own means),
    warmed up for one text at a time; another batch size compiles once more. A CompileConfig names other options. Beam
    search, assisted generation and a cache of your own decode without it.
    force: try although the plan (`fk.plan`, for one text of the whole context) does not fit.
    chat: "falcon", "hub" or "baize"; unset, the format the checkpoint was made for.
    revision, token, cache_dir, local_files_only: as in huggingface_hub.
    tensor_parallel: divide each layer among so many ranks: under torchrun among its processes, each of which gets a
    Falcon of its part; from a notebook among processes that are started for you: a `ParallelFalcon` speaks for them.

    Raises LookupError for a name that nothing answers to, ConnectionError where the hub cannot be reached,
    FileNotFoundError for a missing file, ValueError for another architecture, a cut-off shard or missing weights, and
    NotEnoughMemory before any weights are fetched or read.
    """
    wanted = _named_dtype(dtype)
    if attention not in ATTENTIONS:
        raise ValueError(
            f"attention {attention!r} is not one of {', '.join(ATTENTIONS)}; sdpa, eager or flash-attention are chosen "
            "by model.set_attn_implementation"
        )
    compiling = _compile_options(compile)
    parallel.check_request(tensor_parallel, device_map=device_map, compile=compile)
    chosen_format = None if chat is None else chat_format(chat)
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    plans: list[Plan] = []

    def decide(shape: FalconSpec, config: FalconConfig) -> None:
        kept = str(_choose_dtype(wanted, config, shape)[0]).removeprefix("torch.")
        cache: CacheKind = "grouped" if attention == "grouped" else "transformers"
        plans.append(plan(shape, kept, context=shape.context, cache=cache, tensor_parallel=tensor_parallel or 1))
        if not (plans[0].fits or force or device_map):
            raise NotEnoughMemory(plans[0])

    directory, shape, config = locate(str(name), hub, decide)
    weights = check_weights(directory)
    chosen, reason = _choose_dtype(wanted, config, shape)
    if device_map is None and tensor_parallel is None and torch.cuda.is_available():
        device_map = "auto"
    _check_device(device_map)
    tokenizer = _load_tokenizer(directory)
    chosen_format = chosen_format or _default_format(shape, tokenizer)
    if chat is not None or tokenizer.chat_template is None:
        tokenizer.chat_template = chosen_format.template
    if parallel.needs_launch(tensor_parallel):
        told = {"dtype": str(chosen), "chat": chosen_format.name, "tensor_parallel": tensor_parallel}
        facts = tokenizer, shape, plans[0], chosen_format, reason
        return cast(Falcon, parallel.launch(directory, told, _are_large(weights), *facts))
    model = _load_model(ATTENTIONS[attention], directory, config, chosen, device_map, weights, tensor_parallel)
    _mend_generation_config(model, tokenizer)
    if isinstance(model, modeling.FalconForCausalLM):
        linears = [parallel.own(module.weight) for module in model.modules() if isinstance(module, nn.Linear)]
        model.single_rows_without_onednn = faster_without_onednn(linears)
    decoding = {"cache_implementation": "static", "compile_config": compiling} if compiling else {}
    if compiling:
        _warm_up(model, decoding)
    return Falcon(model, tokenizer, shape, plans[0], chosen_format, reason, decoding)


def _check_device(device_map: Any) -> None:
    if str(device_map).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device_map={device_map!r}, but torch finds no GPU here: leave it out to use the CPU")


def _named_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The torch dtype, None for "auto"."""
    if dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if (found := DTYPES.get(str(dtype).removeprefix("torch."))) is None:
        raise ValueError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return found


def _choose_dtype(wanted: torch.dtype | None, config: FalconConfig, shape: FalconSpec) -> tuple[torch.dtype, str]:
    """The dtype to load in, and why."""
    if wanted is not None:
        return wanted, "as asked"
    stored = next((known for known in DTYPES.values() if known == config.dtype), torch.bfloat16)
    if torch.cuda.is_available():
        if stored == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.float16, "the checkpoint's bfloat16 is not native to this GPU"
        return stored, "as in the checkpoint"
    full, (_, available) = 4 * shape.parameters, host_memory()
    if stored != torch.float32 and full < available / 10:
        return torch.float32, f"on a CPU {format_bytes(full)} of weights are little, and float32 is exact"
    if stored == torch.float16:
        return torch.bfloat16, "CPUs compute bfloat16 faster than the checkpoint's float16"
    return stored, "as in the checkpoint"


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer, without the token type ids that Falcon has no use for and refuses."""
    if not (directory / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{directory} has no tokenizer.json: copy it from the model that this one was made from"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, model_input_names=["input_ids", "attention_mask"])
    if tokenizer.eos_token is None:
        tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def _load_model(
    kind: type[FalconForCausalLM],
    directory: Path,
    config: FalconConfig,
    dtype: torch.dtype,
    device_map: Any,
    weights: list[Path],
    tensor_parallel: int | None,
) -> FalconForCausalLM:
    with _progress(_are_large(weights)), parallel.placement(tensor_parallel) as placement:
        loaded: Any = kind.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=weights[0].suffix == ".safetensors",
            weights_only=True,
            output_loading_info=True,
            **placement,
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers fills them with random numbers and goes on
        raise ValueError(
            f"{directory} lacks {len(missing)} weights that its config.json asks for, such as {missing[0]}: "
            "the config and the weights are of different models, or the checkpoint is incomplete"
        )
    evaluating: FalconForCausalLM = model.eval()
    return evaluating


def _are_large(weights: list[Path]) -> bool:
    return sum(file.stat().st_size for file in weights) > _SMALL


@contextmanager
def _progress(shown: bool) -> Iterator[None]:
    """Shows transformers' progress bar or not, and leaves its switch as it was."""
    enabled = transformers_logging.is_progress_bar_enabled()
    if not shown:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _mend_generation_config(model: FalconForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Takes the end token from the tokenizer: generation configs of 2023 name id 2, while the model ends with 11."""
    config = model.generation_config
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class _Tick(StoppingCriteria):
    """Moves a progress bar with each token, and stops when it is full."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.bar.update()
        return torch.full((len(input_ids),), self.bar.n >= self.bar.total, device=input_ids.device)


def _compile_options(compile: bool | CompileConfig) -> CompileConfig | None:
    """The options of torch.compile, None for no compilation; refused where transformers would leave it out."""
    if not isinstance(compile, bool | CompileConfig):
        raise ValueError(f"compile={compile!r} is neither True, False nor a transformers.CompileConfig")
    if compile is False:
        return None
    options = CompileConfig(fullgraph=True) if compile is True else compile
    if not (torch.cuda.is_available() or options._compile_all_devices):
        raise ValueError(f"compile={compile!r} is for GPUs, and torch finds none here: leave it out")
    return options


def _warm_up(model: FalconForCausalLM, decoding: Mapping[str, Any]) -> None:
    """Lets decoding compile: prefill, compilation, recording of the CUDA graph, one replay.

    The static cache takes the whole context, so that no later text needs a longer one, which would compile again.
    """
    start = torch.full((1, 1), model.generation_config.eos_token_id, device=model.device)
    with tqdm(total=4, desc="Compiling", unit="step") as bar:
        model.generate(  # type: ignore[misc]  # its self is misdeclared
            start,
            attention_mask=torch.ones_like(start),
            max_length=model.config.max_position_embeddings,
            min_new_tokens=bar.total,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([_Tick(bar)]),
            **decoding,
        )


def _default_format(shape: FalconSpec, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """The format whose template the tokenizer brings; else that of the published models it belongs to."""
    if tokenizer.chat_template == FALCON.template or not shape.published or shape.name.startswith("falcon-180B"):
        return FALCON
    return HUB
