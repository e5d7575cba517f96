"""The memory plan of a server that reads a GGUF file as it is: the bytes of the file, and llama.cpp's KV cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

from falcon_kit.catalogue.gguf import GGUFFile
from falcon_kit.planning.devices import Device
from falcon_kit.planning.placement import Part
from falcon_kit.planning.plan import Plan, plan
from falcon_kit.serving.gguf_kinds import stored_bytes, stored_dtype

_STORED = {"layers": ("blk.",), "embedding and head": ("token_embd.", "output."), "last LayerNorm": ("output_norm.",)}
"""The first letters of llama.cpp's tensors, by the part of a plan that they are."""
_COMPUTED = "float16"
"""llama.cpp's dtype of keys and values, whatever the file has."""

_SHORTEST = 64  # tokens: a shorter context is no use
_SMALLER = "q4_k_m"


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
    """The plan of a server on a GGUF file, with texts or tokens that would fit if it does not.

    Raises ValueError for a context out of the model's range.
    """
    planned = _counted(file, context, texts, devices)
    if planned.fits:
        return planned
    return replace(planned, suggestions=tuple(_changes(file, context, texts, devices)))


def _counted(file: GGUFFile, context: int, texts: int, devices: Sequence[Device]) -> FilePlan:
    """The plan without suggestions."""
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


def _changes(file: GGUFFile, context: int, texts: int, devices: Sequence[Device]) -> Iterator[str]:
    """What to change so that the server fits: of each argument of `serve` the first halving, or a smaller file."""
    fewer = [(context, texts >> times) for times in range(1, texts.bit_length())]
    shorter = [(context >> times, texts) for times in range(1, context.bit_length()) if context >> times >= _SHORTEST]
    for given in (fewer, shorter):
        if fitting := next((each for each in given if _counted(file, *each, devices).fits), None):
            yield f"texts={fitting[1]}" if given is fewer else f"context={fitting[0]}"
    whole = _counted(file, context, texts, devices)
    saved = whole.weight_bytes - stored_bytes(file.spec, _SMALLER)
    if whole.total_bytes - saved <= whole.free_bytes:
        yield f"a file with fewer bits: fk.export_gguf(fk.load({str(file.path)!r}), path, {_SMALLER!r})"
    yield "an endpoint on another machine: fk.connect"
