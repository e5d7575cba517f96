"""The memory plan of a server that reads a GGUF file as it is: the bytes of the file, and llama.cpp's KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from falcon_kit.catalogue.gguf import GGUFFile
from falcon_kit.planning.devices import Device
from falcon_kit.planning.placement import Part
from falcon_kit.planning.plan import Plan, plan
from falcon_kit.serving.gguf_kinds import stored_dtype

_STORED = {"layers": ("blk.",), "embedding and head": ("token_embd.", "output."), "last LayerNorm": ("output_norm.",)}
"""The first letters of llama.cpp's tensors, by the part of a plan that they are."""
_COMPUTED = "float16"
"""llama.cpp's dtype of keys and values, whatever the file has."""


@dataclass(frozen=True, repr=False)
class FilePlan(Plan):
    """A memory plan by the bytes of a GGUF file. Its dtype is llama.cpp's name for the file's mixture of kinds."""

    file: GGUFFile = field(kw_only=True)
    """The file."""

    @property
    def weight_bytes(self) -> int:
        """The tensors of the file."""
        return sum(self.file.kinds.values())

    @property
    def advice(self) -> str:
        """Empty: the file decides the dtype."""
        return ""


def plan_file(file: GGUFFile, context: int, texts: int, devices: Sequence[Device]) -> FilePlan:
    """The plan of a server on a GGUF file. Raises ValueError for a context out of the model's range."""
    planned = plan(file.spec, _COMPUTED, context, texts, devices=devices)
    rows = tuple(_stored(row, file) for row in planned.rows if row.part != "workspace")  # torch's, to copy weights
    changed = {"dtype": stored_dtype(file), "rows": rows, "device_map": {}, "suggestions": (), "tight": ""}
    return FilePlan(**{each.name: getattr(planned, each.name) for each in fields(planned)} | changed, file=file)


def _stored(row: Part, file: GGUFFile) -> Part:
    """A row of a plan, with the bytes of the file where it counts weights."""
    prefix = next((each for part, each in _STORED.items() if row.part.startswith(part)), None)
    if prefix is None:
        return row
    tensors = [each for name, each in file.tensors.items() if name.startswith(prefix)]
    kinds = ", ".join(sorted({each.kind for each in tensors}))
    return replace(row, bytes=sum(each.bytes for each in tensors), reason=f"{kinds}, as in the file")
