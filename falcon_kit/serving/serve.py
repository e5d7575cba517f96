"""`serve`: a Falcon on a server of this machine, in a process of its own, until it is closed."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from falcon_kit.display.documented import documented
from falcon_kit.display.errors import check_whole, require, shown, unknown_name
from falcon_kit.display.tables import format_bytes
from falcon_kit.generation.chat import ChatFormat, chat_format
from falcon_kit.loading.checkpoints import Checkpoint
from falcon_kit.loading.falcon import Falcon
from falcon_kit.planning.devices import MARGIN, Device, resolve_devices
from falcon_kit.planning.environment import empty_gpu_cache, find_accelerators, host_memory
from falcon_kit.planning.plan import NotEnoughMemory, Plan, plan
from falcon_kit.planning.suggestions import Suggestion
from falcon_kit.serving.background import wait_for
from falcon_kit.serving.connection import Connection, check_seconds
from falcon_kit.serving.deployment import MAX_TEXTS, MEMORY_SHARE
from falcon_kit.serving.endpoint import Endpoint
from falcon_kit.serving.engines import (
    ENGINES,
    LLAMA_CPP,
    TRANSFORMERS,
    VLLM,
    Engine,
    Job,
    check_arguments,
    choose_engine,
    splits,
)
from falcon_kit.serving.file_plan import plan_file
from falcon_kit.serving.gguf_kinds import ALIASES, planned_tensors
from falcon_kit.serving.local_process import LocalProcess, check_own, free_port
from falcon_kit.serving.openai_api import OpenAIServer, discover
from falcon_kit.serving.protocol import retry
from falcon_kit.serving.replicas import Replicas
from falcon_kit.serving.source import Files, Source, files_for, loading_plan, saving, source_of

_SHORTEST = 64  # tokens: a shorter context is no use
_SMALLER = "q4_k_m"
_ELSEWHERE = "an endpoint on another machine: fk.connect"
_RETRIES = 4  # of requests, as in `connect`


@documented
@dataclass(frozen=True, repr=False)
class Served(Endpoint, AbstractContextManager["Served"]):
    """An `Endpoint` of a server that `fk.serve` has started. `close()`, or the end of a `with` block, ends the server;
    it also ends with this process, however that ends.

    Other clients reach it by its address and key: `openai.OpenAI(base_url=served.address, api_key=served.key())`, with
    `model=served.model`; `transformers serve` calls the model by its folder, `model=str(served.files.path)`.
    """

    name: str
    """The name that `fk.serve` serves the model by."""
    engine: str
    """The engine, by its name for `fk.serve`."""
    plan: Plan
    """The memory plan of the server."""
    command: str
    """The shell command that starts the same server on a machine of its own."""
    files: Files = field(repr=False)
    """What the server reads."""
    _process: LocalProcess = field(repr=False)

    @property
    def log(self) -> str:
        """What the server has written, without its key; empty once it is closed."""
        return self._process.log

    def key(self) -> str:
        """The server's key, which no text about it shows; "none" for `transformers serve`, which has none."""
        return self._server.connection.token or "none"

    def close(self) -> None:
        """Ends the server and removes its files. A second call does nothing."""
        self._process.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check(self) -> None:
        self._process.check()

    def __repr__(self) -> str:
        ended = self._process.ended
        return super().__repr__() + (f", which {ended}" if ended else "")

    def _facts(self) -> dict[str, str]:
        facts = {
            "state": self._process.ended or "running",
            "memory": self.plan.verdict(),
            "files": self.files.note,
            "made by": self.files.again,
            "on a machine of its own": self.command.splitlines()[-1],
        }
        return super()._facts() | {name: value for name, value in facts.items() if value}


def serve(
    model: Falcon | str | Path | Any,
    engine: str | Path = "auto",
    *,
    dtype: str | torch.dtype = "auto",
    context: int | None = None,
    texts: int = 8,
    gpus: int | None = None,
    port: int | None = None,
    arguments: Sequence[str] = (),
    chat: str | ChatFormat | None = None,
    timeout: float = 1800.0,
    request_timeout: float = 600.0,
    deadline: float = 3600.0,
) -> Served:
    """Starts a server with a Falcon on this machine, waits until it is ready, and returns its endpoint.

    model: a Falcon, with the weights it has in memory; a run of `fk.tune`; or a name as for `fk.load`. A name needs no
    memory here, unless an adapter is merged or a GGUF file is exported. A .gguf is read as it is.
    engine: "vllm", "llama.cpp", "transformers", or the path of a program `vllm`, `llama-server` or `transformers` in
    another environment. "auto": the fastest one that is installed and supports the layout.
    dtype: unset, that of the Falcon or .gguf, or the one `fk.load` would choose; with llama.cpp also "q8_0", "q4_k_m".
    context: tokens per text; unset, the model's. texts: texts at a time. chat: as in `connect`.
    gpus: for vLLM; unset, as few as the plan needs. They divide each layer as far as its heads allow, then the layers.
    port: unset, any free one. The server listens on 127.0.0.1 only, with a random key. `transformers serve` has no key:
    each program of this machine may use it. It alone uses the checkpoint's settings where a call names none.
    arguments: more for the engine's program, such as "--enforce-eager" for vLLM. timeout: seconds for the start.
    request_timeout: seconds without a byte until a request fails. deadline: seconds for a whole text.

    Raises ModuleNotFoundError for an engine that is not installed, NotEnoughMemory if the server does not fit beside
    what is in memory, OSError for a port in use or too little disk, ServerDied, with its last words, if it ends while
    it loads, TimeoutError, and what `fk.load` raises for a name. Nothing is left running then.
    """
    check_whole("texts", texts, 1, MAX_TEXTS)
    check_seconds(timeout=timeout, request_timeout=request_timeout, deadline=deadline)
    given_format, more = None if chat is None else chat_format(chat), check_arguments(arguments)
    source = source_of(model)
    kind, program = _choose_engine(str(engine), source)
    planned = _plan(source, kind, dtype, source.spec.context if context is None else context, texts, gpus)
    free_port(port)  # raises if it is in use; any other is chosen when the files are written, which may take minutes
    process = LocalProcess(secrets.token_urlsafe(32))
    try:
        files = files_for(source, process.folder, planned.dtype, kind.reads_gguf)
        job = _job(source, kind, planned, files, free_port(port), more)
        process.start([*program, *job.arguments], job.environment(process.secret))
        server = _connect(process, timeout, job, request_timeout, deadline)
    except BaseException:
        process.close()
        raise
    return _served(server, job, source, files, given_format, process)


def _served(
    server: OpenAIServer, job: Job, source: Source, files: Files, given_format: ChatFormat | None, process: LocalProcess
) -> Served:
    return Served(
        model=job.name,
        server=server.facts.server,
        address=server.facts.address,
        context=job.plan.context,
        concurrency=job.plan.batch,
        spec=source.spec,
        chat_format=given_format or files.chat_format,
        own_format=bool(given_format) or not files.has_template,
        name=source.name,
        engine=next(name for name, engine in ENGINES.items() if engine is job.engine),
        plan=job.plan,
        command=_command(job, source, files),
        files=files,
        _server=Replicas([server]),
        _process=process,
    )


def _choose_engine(wanted: str, source: Source) -> tuple[Engine, list[str]]:
    """As `choose_engine`; for a GGUF file "auto" is llama.cpp, and an engine that does not read it a ValueError."""
    wanted = "llama.cpp" if source.file and wanted == "auto" else wanted
    engine, program = choose_engine(wanted, source.spec, resolve_devices(None)[0].key != "cpu")
    require(
        not source.file or engine.reads_gguf,
        f"{engine.name} does not serve the GGUF file {source.name}: leave engine out, and llama.cpp reads it as it is, "
        f"or serve its weights dequantised, fk.serve(fk.load({source.name!r}), {wanted!r})",
    )
    return engine, program


def _check_dtype(engine: Engine, source: Source, dtype: str | torch.dtype) -> str:
    """The dtype, if the engine computes with it and a GGUF file has it."""
    given = source.dtype if dtype == "auto" else str(dtype)
    name = given.removeprefix("torch.").lower()
    if source.file and ALIASES.get(name, name) == source.dtype:
        return source.dtype
    name = {short: long for long, short in ALIASES.items()}.get(name, name)
    if name not in engine.dtypes:
        raise ValueError(unknown_name(f"dtype for {engine.name}:", given, engine.dtypes))
    require(
        not source.file,
        f"dtype={given!r}: the weights of {source.name} are in {source.dtype}, and the file is served as it is: leave "
        f"dtype out, or serve another file of them, fk.serve(fk.load({source.name!r}), 'llama.cpp', dtype={given!r})",
    )
    return name


def _plan(
    source: Source, engine: Engine, wanted: str | torch.dtype, context: int, texts: int, gpus: int | None
) -> Plan:
    """The memory plan of the server beside what is in memory now, in the dtype of the weights that it reads.

    Raises ValueError for a dtype that it cannot have, and NotEnoughMemory if it does not fit, or if the weights cannot
    be loaded here, where the server's files are written from them.
    """
    dtype = _check_dtype(engine, source, wanted)
    empty_gpu_cache()
    devices = _devices(engine)
    for count in _device_counts(engine, devices, gpus):
        counted = partial(_counted, source, engine, dtype, devices[:count])
        if (planned := counted(context, texts)).fits:
            break
    loading = loading_plan(source.model) if isinstance(source.model, Checkpoint) else None
    unloadable = loading if loading and source.loads(engine.reads_gguf) and not loading.fits else None
    if not planned.fits:
        prepared = [_prepared_files(source, engine, _SMALLER, unloadable)] if unloadable else []
        advice = prepared or [*_advice(source, engine, counted, planned, loading)]
        raise _not_enough(planned, _shortage(source, planned), advice)
    if unloadable:
        written = f"{engine.name} reads files that this process writes, for which it loads the model"
        prepared = [_prepared_files(source, engine, dtype, unloadable)]
        raise _not_enough(unloadable, f"{written}: {unloadable.verdict()}", prepared)
    return planned


def _device_counts(engine: Engine, devices: Sequence[Device], gpus: int | None) -> Sequence[int]:
    """How many devices to plan for, the fewest first. Raises ValueError for GPUs that the engine does not use."""
    if gpus is None:
        return range(1, len(devices) + 1)
    reason = "uses no GPU here" if devices[0].key == "cpu" else "has no such argument: set CUDA_VISIBLE_DEVICES"
    require(engine is VLLM and devices[0].key != "cpu", f"gpus={shown(gpus)}: {engine.name} {reason}")
    check_whole("gpus", gpus, 1, len(devices))
    return [gpus]


def _not_enough(short: Plan, text: str, advice: list[str]) -> NotEnoughMemory:
    return NotEnoughMemory(replace(short, suggestions=tuple(map(Suggestion, [*advice, _ELSEWHERE]))), text)


def _counted(source: Source, engine: Engine, dtype: str, devices: tuple[Device, ...], context: int, texts: int) -> Plan:
    if not engine.reads_gguf:
        return plan(source.spec, dtype, context, texts, devices=devices)
    tensors = source.file.tensors if source.file else planned_tensors(source.spec, dtype)
    return plan_file(source.spec, dtype, tensors, context, texts, devices)


def _advice(
    source: Source, engine: Engine, counted: Callable[[int, int], Plan], planned: Plan, loading: Plan | None
) -> Iterator[str]:
    """What would make the server fit: the first halving of an argument of `serve` that does, or fewer bits.

    counted: the plan for a context and a number of texts. planned: that which does not fit. loading: the plan of
    loading the model in this process; None for a Falcon in memory.
    """
    context, texts = planned.context, planned.batch
    fewer = (texts >> times for times in range(1, texts.bit_length()))
    if fitting := next((each for each in fewer if counted(context, each).fits), None):
        yield f"texts={fitting}"
    shorter = (context >> times for times in range(1, context.bit_length()) if context >> times >= _SHORTEST)
    if fitting := next((each for each in shorter if counted(each, texts).fits), None):
        yield f"context={fitting}"
    smaller = planned_tensors(source.spec, _SMALLER)
    if engine.reads_gguf and plan_file(source.spec, _SMALLER, smaller, context, texts, planned.devices).fits:
        if source.file and loading:
            yield _prepared_files(source, engine, _SMALLER, loading)
        else:
            yield f"dtype={_SMALLER!r}"


def _prepared_files(source: Source, engine: Engine, dtype: str, loading: Plan) -> str:
    """The call that writes smaller or readable files, and where it can be made."""
    place = "" if loading.fits else f", on a machine with {format_bytes(loading.total_bytes)} free"
    if engine.reads_gguf:
        return f"a GGUF file{place}: fk.export_gguf(fk.load({source.name!r}), path, {dtype!r}), then fk.serve(path)"
    return f"a merged model{place}: {saving(source, 'path')}, then fk.serve(path)"


def _devices(engine: Engine) -> tuple[Device, ...]:
    """The devices of the server, with what is free now: llama.cpp always needs its file in host memory."""
    return (Device("cpu", "cpu", host_memory()[1], here=True),) if engine is LLAMA_CPP else resolve_devices(None)


def _shortage(source: Source, planned: Plan) -> str:
    if not isinstance(source.model, Falcon):
        return f"no memory for this server: {planned.verdict()}"
    return (
        f"no memory for the server's copy beside the Falcon of this process: {planned.verdict()}. Delete the Falcon, "
        f"and give its name: fk.serve({source.name!r})"
    )


def _job(source: Source, engine: Engine, planned: Plan, files: Files, port: int, more: tuple[str, ...]) -> Job:
    gpus = 0 if planned.devices[0].key == "cpu" else len(planned.devices)
    across, stages = splits(source.spec, gpus) if gpus and engine is VLLM else (1, 1)
    return Job(
        engine=engine,
        model=str(files.path),
        name=source.short_name,
        plan=planned,
        tensor_parallel=across,
        stages=stages,
        memory_share=_free_share(gpus) if gpus else 0.0,
        port=port,
        more=more,
    )


def _free_share(gpus: int) -> float:
    """The share of each GPU's memory that is free on all of the first ones, rounded down."""
    found = [each for each in find_accelerators() if each.kind == "cuda"][:gpus]
    least = min(each.free_bytes / each.total_bytes for each in found) * (1 - MARGIN)
    return min(MEMORY_SHARE, int(least * 100) / 100)


def _connect(process: LocalProcess, timeout: float, job: Job, request_timeout: float, deadline: float) -> OpenAIServer:
    """The protocol of a server, once it is ready. timeout: seconds for its start; the other two are of requests."""
    process.wait_until_ready(f"http://{job.host}:{job.port}/health", job.engine.name, timeout)
    check_own(job.port)
    token = process.secret if job.engine.key_variable else None
    connection = Connection(token, request_timeout, _RETRIES, deadline, direct=True, timeout_name="request_timeout")
    name = job.model if job.engine is TRANSFORMERS else job.name  # which has no names
    finding = partial(discover, f"http://{job.host}:{job.port}/v1", name, connection, job.plan.context)
    server = wait_for(retry(finding, connection))
    process.check()
    return server


def _command(job: Job, source: Source, files: Files) -> str:
    """The shell command for a machine of its own; its first line is the call that makes the files, if it needs any."""
    name = files.path.name if files.again else source.spec.hub_id or job.model
    command = replace(job, model=name, port=8000).shell_command()
    return f"# {files.again}\n{command}" if files.again else command
