"""The notebook's side: a Falcon whose model lives in other processes."""

import json
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import count
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from falcon_kit.catalogue.names import loadable_name
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.tables import format_bytes, html_table
from falcon_kit.generation.chat import ChatFormat, Message
from falcon_kit.generation.prompts import Prompt, check_prompt
from falcon_kit.generation.sampling import split_settings
from falcon_kit.generation.stream import Stream
from falcon_kit.generation.text import Alternative, Generation, Piece, Stats
from falcon_kit.parallel.ranks import Rank
from falcon_kit.parallel.workers import Workers
from falcon_kit.planning.plan import Plan

_GRACE = 10.0  # seconds for the other ranks to fail too, once one has
_KNOWN_ERRORS = (ValueError, TypeError, LookupError, FileNotFoundError, MemoryError, NotImplementedError)


def launch(directory: str, settings: dict[str, Any], progress: bool, *facts: Any) -> "ParallelFalcon":
    """Starts a worker for each rank, has it load its part of the checkpoint, and returns what speaks for them.

    settings: for `load` there; `tensor_parallel` among them. facts: what a ParallelFalcon is made of besides.
    Raises what a worker raises in loading; none is left then.
    """
    code = "from falcon_kit.loading.load import load; from falcon_kit.parallel.serving import serve; serve(load)"
    ranks = settings["tensor_parallel"]
    workers = Workers(code, [_environment(rank, ranks) for rank in range(ranks)])
    falcon = ParallelFalcon(workers, directory, *facts)
    try:
        workers.send({"directory": directory, "settings": {**settings, "force": True}})
        falcon._collect(tqdm(total=ranks, desc="Loading", unit="rank", disable=not progress))
    except BaseException:
        falcon.close()
        raise
    return falcon


def _environment(rank: int, ranks: int) -> dict[str, str]:
    told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "TQDM_DISABLE": "1"}
    if torch.cuda.is_available():
        return told
    if sys.platform == "linux":
        told["GLOO_SOCKET_IFNAME"] = "lo"  # they are all on this machine, and nobody else is asked
    return told | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // ranks))}


class ParallelFalcon:
    """A Falcon that lives in several processes, each with a part of every layer; used like a `Falcon`.

    One request at a time. `close()` it, or use it in a `with` block, to have its memory back; it ends with this process
    in any case.
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
        """What `fk.load` finds this model by again."""
        self.ranks: tuple[Rank, ...] = ()
        """The processes, and what each held after the last request."""
        self._workers, self._turn, self._numbers = workers, threading.Lock(), count()

    @property
    def model(self) -> Any:
        """Not here. Raises AttributeError, which says where."""
        raise AttributeError(
            f"the model lives in {len(self.ranks)} processes: use generate, stream and chat, or run your own program "
            f"under torchrun --nproc-per-node {len(self.ranks)}, where fk.load gives each rank its part"
        )

    @property
    def weights(self) -> Any:
        """Not here either. Raises AttributeError, which says what is."""
        raise AttributeError(
            "a model in several processes has no table of weights: see weight_bytes, and ranks for each"
        )

    def __iter__(self) -> Iterator[Any]:
        """As `Falcon` unpacks: says that the model is not here."""
        return iter((self.model, self.tokenizer))

    @property
    def dtype(self) -> str:
        """How the weights are kept."""
        return self.plan.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in all processes together; what each holds whole counts in each."""
        return sum(rank.weight_bytes for rank in self.ranks)

    def generate(self, prompt: Prompt, **settings: Any) -> Any:
        """As `Falcon.generate`; `settings` are numbers, texts and lists, since they go to other processes."""
        _, single = check_prompt(prompt)
        generations = self._ask("generate", prompt, settings)
        return generations if not single or settings.get("num_return_sequences", 1) > 1 else generations[0]

    def stream(self, prompt: Prompt | Sequence[Message], **settings: Any) -> Stream:
        """As `Falcon.stream`: pieces as they come; closing it, or Ctrl-C, stops all ranks at the next token."""
        return Stream(_Writing(self, prompt, settings))

    def chat(self, messages: Sequence[Message], **settings: Any) -> Generation:
        """As `Falcon.chat`."""
        return self._ask("chat", messages, settings)[0]

    def close(self) -> None:
        """Ends the processes. Nothing happens the second time."""
        self._workers.close()

    def __enter__(self) -> "ParallelFalcon":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(
        self, call: str, prompt: Any, settings: dict[str, Any], writing: "_Writing | None" = None, emit: Any = None
    ) -> list[Generation]:
        """Has all ranks do the same, and returns what they wrote."""
        if self._workers.closed:
            raise RuntimeError("the processes of this model have ended: load it again")
        if not self._turn.acquire(blocking=False):
            raise RuntimeError("another text is being written: let its stream end, or close() it, first")
        try:
            number = next(self._numbers)
            self._workers.send(_plain({"call": call, "number": number, "prompt": prompt, "settings": settings}))
            try:
                answers = self._collect(writing=writing, emit=emit)
            except KeyboardInterrupt:
                self._stop(number)
                raise
        finally:
            self._turn.release()
        whole = sum(rank.cache_bytes for rank in self.ranks)
        return [_generation(each, whole) for each in answers[0]["generations"]]

    def _stop(self, number: int) -> None:
        """Has all ranks give up a request and waits until they have; who does not want to wait ends them."""
        try:
            self._workers.send({"cancel": number})
            self._collect()
        except BaseException:
            self.close()
            raise

    def _collect(self, bar: Any = None, writing: "_Writing | None" = None, emit: Any = None) -> dict[int, Any]:
        """An answer from each rank; pieces are handed on meanwhile. Raises what a rank raised."""
        answers: dict[int, Any] = {}
        errors: dict[int, tuple[str, str]] = {}
        while len(answers) + len(errors) < len(self._workers.processes):
            try:
                rank, message = self._workers.receive(_GRACE if errors else None)
            except queue.Empty:  # the others wait for the one that failed, and would for ever
                self.close()
                break
            if "piece" in message:
                self._hand_on(_piece(message["piece"]), writing, emit)
            elif "error" in message:
                errors[rank] = tuple(message["error"])
            else:
                answers[rank] = message["done"]
                if bar is not None:
                    bar.update()
        if errors:
            raise _error(errors)
        names = [each.name for each in fields(Rank)]
        self.ranks = tuple(Rank(**{name: answers[rank][name] for name in names}) for rank in sorted(answers))
        return answers

    def _hand_on(self, piece: Piece, writing: "_Writing | None", emit: Any) -> None:
        """Gives a piece to whoever reads, who may take his time, and then lets the first rank go on, or stops it."""
        if emit is not None:
            emit(piece)
        self._workers.send({"go": writing is not None and not writing.cancelled.is_set()}, rank=0)

    def _facts(self) -> dict[str, str]:
        return {
            "parameters": f"{self.spec.parameters:,}",
            "dtype": f"{self.dtype} ({self.dtype_reason})",
            "heads": f"{self.spec.query_heads} query, {self.spec.kv_heads} KV, dealt out to {len(self.ranks)} ranks",
            "context": f"{self.spec.context} tokens",
            "chat format": self.chat_format.name,
            **{f"rank {each.rank}": f"{each.device}, {format_bytes(each.weight_bytes)}" for each in self.ranks},
        }

    def __repr__(self) -> str:
        state = "closed" if self._workers.closed else f"{len(self.ranks)} processes on {self._devices()}"
        return f"ParallelFalcon({self.spec.name}, {self.spec.parameters:,} parameters, {self.dtype}, {state})"

    def _devices(self) -> str:
        return ", ".join(dict.fromkeys(rank.device for rank in self.ranks))

    def _repr_html_(self) -> str:
        return html_table(self.spec.name, (), self._facts().items())


class _Writing:
    """A text that the ranks write piece by piece."""

    def __init__(self, falcon: ParallelFalcon, prompt: Any, settings: dict[str, Any]) -> None:
        split_settings(settings)  # raises at once for what is out of range
        self.cancelled = threading.Event()
        self._falcon, self._prompt, self._settings = falcon, prompt, settings

    def __call__(self, emit: Callable[[Piece], None] | None = None) -> list[Generation]:
        return self._falcon._ask("stream", self._prompt, self._settings, self, emit)


def _plain(request: dict[str, Any]) -> dict[str, Any]:
    """The request, if it can be told to another process."""
    for name, value in {"the prompt": request["prompt"], **request["settings"]}.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise TypeError(
                f"{name} goes to other processes, so it has to be texts, numbers and lists, not a "
                f"{type(value).__name__}: objects of your own need a program under torchrun, where the model is at hand"
            ) from error
    return request


def _alternatives(told: Sequence[dict[str, Any]]) -> tuple[Alternative, ...]:
    return tuple(Alternative(**each) for each in told)


def _piece(told: dict[str, Any]) -> Piece:
    """A piece as a rank told it."""
    return Piece(**{**told, "alternatives": _alternatives(told["alternatives"])})


def _generation(told: dict[str, Any], cache_bytes: int) -> Generation:
    """A generation as a rank told it, with the cache of all ranks."""
    logprobs = None if told["logprobs"] is None else tuple(told["logprobs"])
    stats = Stats(**{**told["stats"], "cache_bytes": cache_bytes})
    steps = told["alternatives"]
    alternatives = None if steps is None else tuple(_alternatives(step) for step in steps)
    own = {"tokens": tuple(told["tokens"]), "logprobs": logprobs, "stats": stats, "alternatives": alternatives}
    return Generation(**{**told, **own})


def _error(errors: Mapping[int, tuple[str, str]]) -> Exception:
    """What the ranks raised, as one error: theirs, if all say the same."""
    if len(set(errors.values())) == 1:
        name, text = next(iter(errors.values()))
        known = next((kind for kind in _KNOWN_ERRORS if kind.__name__ == name), None)
        return known(text) if known else RuntimeError(f"{name}: {text}")
    return RuntimeError("; ".join(f"rank {rank}: {name}: {text}" for rank, (name, text) in sorted(errors.items())))
