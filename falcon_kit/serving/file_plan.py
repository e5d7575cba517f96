"""The memory plan of llama.cpp: the bytes of the tensors in its file, and its KV cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from falcon_kit.catalogue.gguf_header import Stored
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.planning.devices import Device
from falcon_kit.planning.placement import Part
from falcon_kit.planning.plan import Plan, plan

_STORED = {"layers": ("blk.",), "embedding and head": ("token_embd.", "output."), "last LayerNorm": ("output_norm.",)}
"""The first letters of llama.cpp's tensors, by the part of a plan that they are."""


@dataclass(frozen=True, repr=False)
class FilePlan(Plan):
    """A memory plan by the bytes of a GGUF file."""

    tensors: Mapping[str, Stored] = field(kw_only=True)
    """The tensors of the file, by llama.cpp's names."""

    @property
    def weight_bytes(self) -> int:
        """The tensors of the file."""
        return sum(each.bytes for each in self.tensors.values())

    @property
    def advice(self) -> str:
        """Empty: `fk.load`'s dtypes are not llama.cpp's."""
        return ""


def plan_file(
    spec: FalconSpec, dtype: str, tensors: Mapping[str, Stored], context: int, texts: int, devices: Sequence[Device]
) -> FilePlan:
    """The plan of a llama.cpp server on a file. Raises ValueError for a context out of the model's range."""
    planned = plan(spec, "float16", context, texts, devices=devices)  # llama.cpp's keys and values for any file
    rows = tuple(_stored(row, tensors) for row in planned.rows if row.part != "workspace")  # torch's, to copy weights
    changed = {"dtype": dtype, "rows": rows, "device_map": {}, "suggestions": (), "tight": ""}
    return FilePlan(**vars(planned) | changed, tensors=tensors)


def _stored(row: Part, tensors: Mapping[str, Stored]) -> Part:
    """A row of a plan, with the bytes of the file where it counts weights."""
    prefix = next((each for part, each in _STORED.items() if row.part.startswith(part)), None)
    if prefix is None:
        return row
    part = [each for name, each in tensors.items() if name.startswith(prefix)]
    kinds = ", ".join(sorted({each.kind for each in part}))
    return replace(row, bytes=sum(each.bytes for each in part), reason=f"{kinds}, as in the file")
