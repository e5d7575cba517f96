"""The notebook's process: a Falcon whose weights are in worker processes, one for each rank."""

import json
import math
import queue
import sys
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, cast

import torch
from pydantic import TypeAdapter
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from falcon_kit.catalogue.names import loadable_name
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import printable
from falcon_kit.display.tables import counted, format_bytes, html_table
from falcon_kit.generation.arguments import without_tokenizer
from falcon_kit.generation.calls import Generated, typed
from falcon_kit.generation.chat import ChatFormat, Message
from falcon_kit.generation.guarding import Guard, GuardedStream, check_given, checked, guarded
from falcon_kit.generation.prompts import Prompt, check_prompt, is_conversation
from falcon_kit.generation.sampling import split_settings
from falcon_kit.generation.stream import GenerationTask, Stream
from falcon_kit.generation.text import Generation, Piece, Stats
from falcon_kit.parallel.ranks import Rank
from falcon_kit.parallel.workers import WorkerDied, Workers
from falcon_kit.planning.environment import empty_gpu_cache
from falcon_kit.planning.plan import Plan

_ERROR_TIMEOUT = 10.0  # seconds to wait for the other ranks after the error of one
_KNOWN_ERRORS = (ValueError, TypeError, LookupError, FileNotFoundError, MemoryError, NotImplementedError)
_RANK, _PIECE, _GENERATIONS = TypeAdapter(Rank), TypeAdapter(Piece), TypeAdapter(list[Generation])


def launch(directory: str, settings: dict[str, Any], progress: bool, on_cpu: bool, **parts: Any) -> "ParallelFalcon":
    """Starts a worker for each rank, which loads its part of the checkpoint, and returns the Falcon of all ranks.

    settings: arguments of `load` in the workers, with `tensor_parallel`. on_cpu: whether the workers see no GPU.
    parts: further arguments of ParallelFalcon.
    Raises what a worker raises while it loads; all workers are ended then.
    """
    code = "from falcon_kit.loading.load import load; from falcon_kit.parallel.worker import serve; serve(load)"
    ranks = settings["tensor_parallel"]
    empty_gpu_cache()  # the plan counts it as free
    workers = Workers(code, [_environment(rank, ranks, on_cpu) for rank in range(ranks)])
    falcon = ParallelFalcon(workers, directory, **parts)
    try:
        workers.send({"directory": directory, "settings": {**settings, "force": True}})
        with tqdm(total=ranks, desc="Loading", unit="rank", disable=not progress) as bar:
            answers = _end(falcon._receive(_Arrived(), bar))
    except BaseException:
        falcon.close()
        raise
    falcon.generation_settings = answers[0]["generation_settings"]
    return falcon


def _environment(rank: int, ranks: int, on_cpu: bool) -> dict[str, str]:
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "TQDM_DISABLE": "1"}
    if on_cpu:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    elif torch.cuda.is_available():
        return variables
    if sys.platform == "linux":
        variables["GLOO_SOCKET_IFNAME"] = "lo"  # all ranks are on this machine
    return variables | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // ranks))}


@dataclass
class _Arrived:
    """What the ranks have answered to one request so far."""

    number: int | None = None
    """The request's number; None while the model is loaded."""
    answers: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, tuple[str, str]] = field(default_factory=dict)


def _missing(reason: str) -> property:
    """A property of `Falcon` that a model in several processes lacks. Reading it raises AttributeError."""

    def refuse(_: Any) -> Any:
        raise AttributeError(f"a model in several processes {reason}")

    return property(refuse, doc=f"Raises AttributeError: a model in several processes {reason}.")


class ParallelFalcon(AbstractContextManager["ParallelFalcon"]):
    """A Falcon in several processes, each with a part of every layer; used like a `Falcon`.

    It runs one request at a time. `close()`, or the end of a `with` block, ends the processes and frees their memory;
    they also end with this process.
    """

    def __init__(
        self,
        workers: Workers,
        directory: str,
        tokenizer: PreTrainedTokenizerBase,
        spec: FalconSpec,
        plan: Plan,
        chat_format: ChatFormat,
        dtype_reason: str,
    ) -> None:
        self.tokenizer, self.spec, self.plan = tokenizer, spec, plan
        self.chat_format, self.dtype_reason = chat_format, dtype_reason
        self.name = loadable_name(spec, directory)
        """The name that `fk.load` loads this model by."""
        self.ranks: tuple[Rank, ...] = ()
        """The processes, with the bytes that each held after the last request."""
        self.generation_settings: Mapping[str, Any] = {}
        """As `Falcon.generation_settings`."""
        self._template = tokenizer.chat_template
        self._workers, self._lock, self._numbers = workers, threading.Lock(), count()
        self._running: _Arrived | None = None

    @property
    def model(self) -> Any:
        """Raises AttributeError: this process has no model."""
        raise AttributeError(
            f"the model is in {len(self.ranks)} other processes: use generate, stream and chat, or run your program "
            f"under torchrun --nproc-per-node {len(self.ranks)}, where fk.load gives each rank its part"
        )

    weights = _missing("has no table of weights: see weight_bytes, and ranks for each")
    save = _missing("is not saved: load it without tensor_parallel to save it")
    generate_each = _missing("has no generate_each: falcon.generate(prompts[:16]) runs a batch")

    def __iter__(self) -> Iterator[Any]:
        """Raises AttributeError, as `model` does: `model, tokenizer = falcon` needs a Falcon in this process."""
        return iter((self.model, self.tokenizer))

    @property
    def dtype(self) -> str:
        """The dtype of the weights."""
        return self.plan.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in all processes together; what is not divided counts in each process."""
        return sum(rank.weight_bytes for rank in self.ranks)

    @typed
    def generate(self, prompt: Prompt, *, guardrails: Guard | None = None, **settings: Any) -> Generated:
        """As `Falcon.generate`; `settings` are sent to other processes: numbers, strings, lists and arrays."""
        check_given(guardrails, prompt, self.tokenizer)
        _, single = check_prompt(prompt)
        generations = checked(guardrails, _RemoteTask(self, "generate", prompt, settings).run)
        return generations if not single or len(generations) > 1 else generations[0]

    def stream(
        self, prompt: Prompt | Sequence[Message], *, guardrails: Guard | None = None, **settings: Any
    ) -> Stream | GuardedStream:
        """As `Falcon.stream`; closing the stream, or Ctrl-C, stops all ranks at the next token."""
        check_given(guardrails, prompt, self.tokenizer)
        return guarded(Stream(_RemoteTask(self, "stream", prompt, settings)), guardrails)

    def chat(self, messages: Sequence[Message], *, guardrails: Guard | None = None, **settings: Any) -> Generation:
        """As `Falcon.chat`."""
        check_given(guardrails, messages, self.tokenizer)
        return checked(guardrails, _RemoteTask(self, "chat", messages, settings).run)[0]

    def close(self) -> None:
        """Ends the processes. A second call does nothing."""
        self._workers.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _request(
        self, call: str, prompt: Any, settings: dict[str, Any], cancelled: threading.Event
    ) -> Generator[Piece, None, list[Generation]]:
        """Sends a request to all ranks, yields the pieces of a stream, and returns the generated texts."""
        if self._workers.closed:
            raise RuntimeError("the processes of this model have ended: load it again")
        if is_conversation(prompt) and self.tokenizer.chat_template != self._template:
            raise ValueError(
                "the tokenizer's chat template was changed after loading, and the processes have another: load the "
                "model again with chat=fk.ChatFormat('mine', template=falcon.tokenizer.chat_template)"
            )
        arrived = _Arrived(next(self._numbers))
        request = {"call": call, "number": arrived.number, "prompt": _plain("the prompt", prompt)}
        request["settings"] = {name: _plain(name, value) for name, value in settings.items()}
        try:
            with self._lock:
                if self._running is not None:
                    raise RuntimeError("another text is being generated: let its stream end, or close() it, first")
                self._running = arrived
            try:
                self._workers.send(request)
                answers = yield from self._receive(arrived, cancelled=cancelled)
            except KeyboardInterrupt:
                self._cancel(request, arrived)
                raise
        finally:
            if self._running is arrived:  # and not another request, which it would have to wait for
                self._running = None
        cache_bytes = sum(rank.cache_bytes for rank in self.ranks)
        generations = _GENERATIONS.validate_python(answers[0]["generations"])
        return [replace(each, stats=replace(each.stats, cache_bytes=cache_bytes)) for each in generations]

    def _cancel(self, request: dict[str, Any], arrived: _Arrived) -> None:
        """Cancels a request and waits until all ranks have stopped; a second Ctrl-C ends the processes.

        Ctrl-C may have come before the request had reached all ranks, or before an answer was kept: a rank runs a
        request once, and answers each message about it.
        """
        try:
            self._workers.send(request)
            self._workers.send({"cancel": arrived.number})
            _end(self._receive(arrived))
        except KeyboardInterrupt:
            self.close()
            raise

    def _receive(
        self, arrived: _Arrived, bar: Any = None, cancelled: threading.Event | None = None
    ) -> Generator[Piece, None, dict[int, Any]]:
        """Yields the pieces that arrive, and returns the answer of each rank. Raises what a rank raised.

        After each piece, rank 0 waits for a reply: to go on, or to stop once the request is cancelled.
        """
        answers, errors = arrived.answers, arrived.errors
        while len(answers) + len(errors) < len(self._workers.processes):
            try:
                rank, message = self._workers.receive(_ERROR_TIMEOUT if errors else math.inf)
            except queue.Empty:  # the other ranks wait for a collective operation of the one that failed
                self.close()
                break
            except WorkerDied as died:  # perhaps because of the error of another rank
                before = f". Before that, {_by_rank(errors)}" if errors else ""
                raise WorkerDied(f"{died}{before}") from None
            if message.get("number") != arrived.number:
                continue  # a second answer to a request that was cancelled
            if "piece" in message:
                yield _PIECE.validate_python(message["piece"])
                self._workers.send({"go": cancelled is not None and not cancelled.is_set()}, rank=0)
            elif "error" in message:
                errors[rank] = tuple(message["error"])
            else:
                answers[rank] = message["done"]
                if bar is not None:
                    bar.update()
        if errors:
            raise _error(errors, len(self._workers.processes))
        self.ranks = tuple(_RANK.validate_python(answers[rank]) for rank in sorted(answers))
        return answers

    def _repr_html_(self) -> str:
        facts = {
            "parameters": f"{self.spec.parameters:,}",
            "dtype": f"{self.dtype} ({self.dtype_reason})",
            "heads": f"{self.spec.query_heads} query, {self.spec.kv_heads} KV, divided among {len(self.ranks)} ranks",
            "context": f"{self.spec.context} tokens",
            "chat format": self.chat_format.name,
            **{f"rank {each.rank}": f"{each.device}, {format_bytes(each.weight_bytes)}" for each in self.ranks},
        }
        return html_table(self.spec.name, (), facts.items())

    def __repr__(self) -> str:
        devices = ", ".join(dict.fromkeys(rank.device for rank in self.ranks))
        state = "closed" if self._workers.closed else f"{counted(len(self.ranks), 'process', 'processes')} on {devices}"
        return (
            f"ParallelFalcon({printable(self.spec.name)}, {self.spec.parameters:,} parameters, {self.dtype}, {state})"
        )


class _RemoteTask(GenerationTask):
    """A request to the ranks, which is sent when its first piece is read."""

    def __init__(self, falcon: ParallelFalcon, call: str, prompt: Any, settings: dict[str, Any]) -> None:
        super().__init__()
        settings = without_tokenizer(settings, falcon.tokenizer)
        if call == "stream":
            split_settings(settings)  # raises before the stream starts where a setting is out of range
        self._falcon, self._call, self._prompt, self._settings = falcon, call, prompt, settings

    def pieces(self) -> Generator[Piece]:
        self.generations = yield from self._falcon._request(self._call, self._prompt, self._settings, self.cancelled)

    def nothing(self) -> Generation:
        """The generation of a text that was cancelled before its first token; its prompt is not encoded."""
        prompt = self._prompt if isinstance(self._prompt, str) else str(self._prompt)
        return Generation(prompt, "", (), (), "cancelled", Stats(1, 0, 0, 0.0, 0.0, 0))


def _end(receiving: Generator[Piece, None, dict[int, Any]]) -> dict[int, Any]:
    """The answers at the end of `ParallelFalcon._receive`; pieces on the way are dropped."""
    while True:
        try:
            next(receiving)
        except StopIteration as end:
            return cast(dict[int, Any], end.value)


def _plain(name: str, value: Any) -> Any:
    """A value as JSON has it, with lists for arrays and tensors. Raises TypeError for another object."""
    try:
        return json.loads(json.dumps(value, default=lambda each: each.tolist()))
    except (TypeError, AttributeError) as error:
        raise TypeError(
            f"{name} is sent to other processes, so it has to be strings, numbers, lists and arrays, not a "
            f"{type(value).__name__}: use such objects in a program under torchrun, where each process has a model"
        ) from error


def _by_rank(errors: Mapping[int, tuple[str, str]]) -> str:
    return "; ".join(f"rank {rank}: {name}: {text}" for rank, (name, text) in sorted(errors.items()))


def _error(errors: Mapping[int, tuple[str, str]], ranks: int) -> Exception:
    """The ranks' errors as one: of the same type, if it is a known one and all that failed raised that type."""
    names, texts = (set(each) for each in zip(*errors.values(), strict=True))
    text = texts.pop() if len(texts) == 1 else _by_rank(errors)  # torch's text of memory that ran out names the GPU
    if len(names) > 1:
        return RuntimeError(_by_rank(errors))
    if len(errors) < ranks:
        where = " and ".join(f"rank {rank}" for rank in sorted(errors))
        text += f". Raised on {where}, it ended all {ranks} processes: load the model again"
    known = next((kind for kind in _KNOWN_ERRORS if kind.__name__ in names), None)
    return known(text) if known else RuntimeError(f"{names.pop()}: {text}")
