"""Settings to serve a Falcon on GPUs: vLLM's command line, and the environment of SageMaker's LMI container.

They follow from the memory plan; nothing is started. vLLM splits each layer evenly over the GPUs, by heads (tensor
parallelism), so the model fits if the memory of all GPUs together suffices.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from falcon_kit.catalogue.names import spec
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import printable
from falcon_kit.display.tables import format_bytes, html_table
from falcon_kit.planning.devices import resolve_devices
from falcon_kit.planning.machines import MACHINES, Price, find_machine, machines_of
from falcon_kit.planning.plan import NotEnoughMemory, Plan, plan
from falcon_kit.planning.suggestions import Suggestion

MEMORY_SHARE = 0.95
"""The share of each GPU's memory that vLLM may use. Its default is 0.9, and a 40B on four A10G needs more."""
MAX_TEXTS = 256
"""vLLM's own default of --max-num-seqs."""


@dataclass(frozen=True, repr=False)
class Deployment:
    """How to serve one Falcon on one machine; a table in Jupyter."""

    machine: str
    """The instance type or the devices, as given."""
    plan: Plan
    """The memory plan for one text of the whole context, in `MEMORY_SHARE` of the memory."""
    texts: int
    """Texts of the whole context that fit at the same time. vLLM splits the prefill into chunks, so each further text
    needs memory for its keys and values only."""

    @property
    def gpus(self) -> int:
        """The number of GPUs, over which each layer is split."""
        return len(self.plan.devices)

    @property
    def price(self) -> Price | None:
        """What one hour of the machine costs; None where no dated source was found, and for devices of no machine."""
        machine = find_machine(self.machine)
        return machine.price if machine else None

    @property
    def vllm(self) -> dict[str, Any]:
        """Options of `vllm serve`, by name."""
        return {
            "tensor-parallel-size": self.gpus,
            "dtype": self.plan.dtype,
            "max-model-len": self.plan.context,
            "max-num-seqs": self.texts,
            "gpu-memory-utilization": MEMORY_SHARE,
        }

    def command(self, *more: str) -> str:
        """The command line for vLLM, with `more` arguments. Pass an API key by VLLM_API_KEY, not here."""
        options = [word for name, value in self.vllm.items() for word in (f"--{name}", str(value))]
        return shlex.join(["vllm", "serve", self._model, *options, *more])

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of SageMaker's LMI container, which runs vLLM.

        Source: https://docs.djl.ai/docs/serving/serving/docs/lmi/user_guides/vllm_user_guide.html
        """
        return {
            "HF_MODEL_ID": self._model,
            "SERVING_FAIL_FAST": "true",
            "OPTION_ASYNC_MODE": "true",
            "OPTION_ROLLING_BATCH": "disable",
            "OPTION_ENTRYPOINT": "djl_python.lmi_vllm.vllm_async_service",
            "OPTION_DTYPE": {"bfloat16": "bf16", "float16": "fp16"}[self.plan.dtype],
            "OPTION_TENSOR_PARALLEL_DEGREE": str(self.gpus),
            "OPTION_MAX_MODEL_LEN": str(self.plan.context),
            "OPTION_MAX_ROLLING_BATCH_SIZE": str(self.texts),
            "OPTION_GPU_MEMORY_UTILIZATION": str(MEMORY_SHARE),
        }

    @property
    def _model(self) -> str:
        return self.plan.spec.hub_id or self.plan.spec.name

    def __repr__(self) -> str:
        kind = self.plan.devices[0].name
        return (
            f"Deployment({printable(self.plan.spec.name)} on {printable(self.machine)}, {self.gpus} x "
            f"{printable(kind)}, {self.texts} x {self.plan.context} tokens)"
        )

    def _repr_html_(self) -> str:
        rows = [
            ("machine", f"{self.machine}: {self.gpus} x {self.plan.devices[0].name}"),
            ("needs", f"{format_bytes(self.plan.total_bytes)} of {format_bytes(self.plan.free_bytes)}"),
            ("texts at a time", f"{self.texts} of {self.plan.context} tokens"),
            *([("price", str(self.price))] if self.price else []),
            ("vLLM", self.command()),
        ]
        return html_table(self.plan.spec.name, (), rows)


def deployment(name: str | FalconSpec, machine: str, dtype: Any = "bfloat16") -> Deployment:
    """Settings to serve a Falcon ("falcon-40b-instruct") on a machine ("ml.g5.12xlarge", "4xA100-80GB").

    dtype: bfloat16 or float16, also of torch.

    Raises LookupError for an unknown name, ValueError for a dtype other than bfloat16 and float16 or a number of GPUs
    that does not divide the KV heads, and NotEnoughMemory, with suggestions, if not even one text fits.
    """
    shape = name if isinstance(name, FalconSpec) else spec(name)
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in ("bfloat16", "float16"):
        raise ValueError(f"dtype {dtype!r} is not one of bfloat16, float16, the dtypes of a deployment")
    devices = [replace(each, free_bytes=int(each.free_bytes * MEMORY_SHARE)) for each in resolve_devices(machine)]
    if shape.kv_heads % len(devices):
        possible = [count for count in range(1, len(devices)) if shape.kv_heads % count == 0]
        raise ValueError(
            f"the {shape.query_heads} query heads and {shape.kv_heads} KV heads of {shape.name} cannot be split evenly "
            f"over the {len(devices)} GPUs of {machine}: take {' or '.join(map(str, possible))} of them"
        )
    one = plan(shape, dtype, context=shape.context, devices=devices)
    further = (one.free_bytes - one.total_bytes) // (shape.kv_bytes_per_token() * shape.context)
    if further < 0:
        raise NotEnoughMemory(replace(one, suggestions=tuple(_suggestions(one))))
    return Deployment(machine, one, min(1 + further, MAX_TEXTS))


def _suggestions(short: Plan) -> Iterator[Suggestion]:
    """What would fit: the same provider's smallest machine with enough memory (of AWS for GPUs alone), or a smaller
    model."""
    given = MACHINES.get(short.devices[0].machine)
    for each in machines_of(given.provider if given else "AWS"):
        if short.spec.kv_heads % each.count == 0 and each.gpu_bytes * MEMORY_SHARE >= short.total_bytes:
            yield Suggestion(f"a larger machine: {each.name}, {each.count} x {each.gpu}")
            break
    yield from (each for each in short.suggestions if "name" in each.changes)
