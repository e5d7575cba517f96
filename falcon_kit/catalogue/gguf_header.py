"""The header of a GGUF file: metadata, and where each tensor lies. No weight is read.

gguf's own reader takes seconds for a vocabulary of 65,024 tokens, and does not end where a damaged file states a long
array. Neither torch nor transformers is imported. Format: github.com/ggml-org/ggml, docs/gguf.md.
"""

import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from falcon_kit.display.errors import require

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_VERSIONS = (2, 3)
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The codes of `struct` for the types of numbers; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9
_LONGEST = 2**24
"""Characters of a string and values of an array: more is a sign of damage."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    kind: str
    """ggml's name for its type: F32, Q4_K and so on."""
    shape: tuple[int, ...]
    """As in torch: (out, in) for a matrix."""
    offset: int
    """The position of its first byte."""
    bytes: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The metadata, and the tensors by name. Raises ValueError for a file that is not GGUF, damaged or cut off."""
    with path.open("rb") as file:
        header = _Header(file, path.stat().st_size)
        require(header.take(4) == b"GGUF", "it is not a GGUF file")
        version, tensors, values = header.numbers("IQQ")
        require(version in _VERSIONS, f"its version of GGUF is {version}, and 2 and 3 are read")
        metadata: dict[str, Any] = {}
        for _ in range(values):
            key = header.text()
            require(key not in metadata, f"it has two values of {key}")
            metadata[key] = header.value(*header.numbers("I"))
        return metadata, _tensors(header, tensors, metadata)


class _Header:
    """Reads a file from its start, and never more than is left of it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.position = file, size, 0

    def take(self, count: int) -> bytes:
        self.position += count
        require(self.position <= self.size, "it ends inside its header")
        return self.file.read(count)

    def numbers(self, codes: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{codes}", self.take(struct.calcsize(f"<{codes}")))

    def text(self) -> str:
        return self.take(self._length()).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(*self.numbers("I"))
        require(kind in _CODES, f"it has a value of the unknown type {kind}")
        return self.numbers(_CODES[kind])[0]

    def _array(self, kind: int) -> Any:
        length = self._length()
        if kind == _STRING:
            return [self.text() for _ in range(length)]
        require(kind in _CODES, f"it has an array of the unknown type {kind}")
        code = _CODES[kind].replace("?", "B")
        return array(code, self.take(length * struct.calcsize(f"<{code}")))

    def _length(self) -> int:
        length: int = self.numbers("Q")[0]
        require(length <= _LONGEST, f"it has a text or an array of {length} values")
        return length


def _tensors(header: _Header, count: int, metadata: Mapping[str, Any]) -> dict[str, Stored]:
    """The tensors whose descriptions come next. Their data begin after them, at a multiple of the alignment."""
    described: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name, (dimensions,) = header.text(), header.numbers("I")
        require(1 <= dimensions <= 4, f"its tensor {name} has {dimensions} dimensions")
        require(name not in described, f"it has two tensors called {name}")
        shape = header.numbers("Q" * dimensions)[::-1]
        described[name] = shape, *header.numbers("IQ")
    alignment = metadata.get("general.alignment", 32)
    require(isinstance(alignment, int) and alignment > 0, f"its alignment is {alignment!r}")
    start = -(-header.position // alignment) * alignment
    tensors = {name: _stored(name, start, *each) for name, each in described.items()}
    for name, each in tensors.items():
        require(each.offset + each.bytes <= header.size, f"it ends before its tensor {name} does")
    return tensors


def _stored(name: str, start: int, shape: tuple[int, ...], number: int, offset: int) -> Stored:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    require(number in GGML_QUANT_SIZES, f"its tensor {name} has the unknown type {number}")
    kind = GGMLQuantizationType(number)
    values, _ = GGML_QUANT_SIZES[kind]
    require(shape[-1] % values == 0, f"its tensor {name} has rows of {shape[-1]} values, in blocks of {values}")
    return stored(kind, shape, start + offset)


def stored(kind: "GGMLQuantizationType", shape: tuple[int, ...], offset: int = 0) -> Stored:
    """A tensor of a kind, with its bytes. offset: 0 where the file is not written yet."""
    from gguf import GGML_QUANT_SIZES

    values, size = GGML_QUANT_SIZES[kind]
    return Stored(kind.name, shape, offset, prod(shape) // values * size)
