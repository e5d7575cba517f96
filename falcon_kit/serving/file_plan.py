"""The memory plan of llama.cpp: the bytes of the tensors in its file, and its KV cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from falcon_kit.catalogue.gguf import GGUFFile
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.planning.devices import Device
from falcon_kit.planning.placement import Part
from falcon_kit.planning.plan import Plan, plan
from falcon_kit.serving.gguf_kinds import ALIASES, tensor_kinds, tensor_sizes

_STORED = {"layers": ("blk.",), "embedding and head": ("token_embd.", "output."), "last LayerNorm": ("output_norm.",)}
"""The first letters of llama.cpp's tensors, by the part of a plan that they are."""
_COMPUTED = "float16"
"""llama.cpp's dtype of keys and values, whatever the file has."""
Tensors = Mapping[str, tuple[str, int]]
"""The kind and the bytes of each tensor, by llama.cpp's names."""


@dataclass(frozen=True, repr=False)
class FilePlan(Plan):
    """A memory plan by the bytes of a GGUF file."""

    tensors: Tensors = field(kw_only=True)
    """The tensors of the file."""

    @property
    def weight_bytes(self) -> int:
        """The tensors of the file."""
        return sum(size for _, size in self.tensors.values())

    @property
    def advice(self) -> str:
        """Empty: `fk.load`'s dtypes are not llama.cpp's."""
        return ""


def stored_tensors(file: GGUFFile) -> Tensors:
    """The tensors of a file."""
    return {name: (each.kind, each.bytes) for name, each in file.tensors.items()}


def exported_tensors(spec: FalconSpec, dtype: str) -> Tensors:
    """The tensors of the file that `export_gguf` would write. dtype: a name of `FILE_TYPES`, or torch's."""
    name = ALIASES.get(dtype, dtype)
    sizes = tensor_sizes(spec, name)
    return {tensor: (kind.name, sizes[tensor]) for tensor, kind in tensor_kinds(spec, name).items()}


def plan_file(
    spec: FalconSpec, dtype: str, tensors: Tensors, context: int, texts: int, devices: Sequence[Device]
) -> FilePlan:
    """The plan of a llama.cpp server on a file. Raises ValueError for a context out of the model's range."""
    planned = plan(spec, _COMPUTED, context, texts, devices=devices)
    rows = tuple(_stored(row, tensors) for row in planned.rows if row.part != "workspace")  # torch's, to copy weights
    changed = {"dtype": dtype, "rows": rows, "device_map": {}, "suggestions": (), "tight": ""}
    return FilePlan(**vars(planned) | changed, tensors=tensors)


def _stored(row: Part, tensors: Tensors) -> Part:
    """A row of a plan, with the bytes of the file where it counts weights."""
    prefix = next((each for part, each in _STORED.items() if row.part.startswith(part)), None)
    if prefix is None:
        return row
    part = [each for name, each in tensors.items() if name.startswith(prefix)]
    kinds = ", ".join(sorted({kind for kind, _ in part}))
    return replace(row, bytes=sum(size for _, size in part), reason=f"{kinds}, as in the file")
