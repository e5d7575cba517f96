"""llama.cpp's own quantiser, called for a few rows of a matrix at a time: `ggml_quantize_chunk`.

`llama-quantize` calls it too, but from a file with all weights in 16 bits or more to another file. Called directly, no
such file takes room on the disk, Ctrl-C works, and the mixture stays visible. xllamacpp and llama-cpp-python bring it.
"""

import ctypes
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

Array = np.ndarray[Any, Any]
_LIBRARIES = {"xllamacpp": ("xllamacpp*.so",), "llama_cpp": ("lib/*ggml-base.*", "lib/*ggml-base-*.*")}
"""Where packages that bring llama.cpp keep ggml."""
_IN_GGUF = ("F32", "F16", "Q4_0", "Q5_0", "Q5_1", "Q8_0")
"""Kinds that the package gguf quantises too, to the same bytes; others need llama.cpp."""


def check_quantiser(kinds: set[str], dtype: str) -> None:
    """Raises ImportError where a kind, by ggml's name, needs llama.cpp, and it is not installed."""
    needed = sorted(kinds - {*_IN_GGUF, "BF16"})
    if needed and _quantise_chunk() is None:
        raise ImportError(
            f"dtype={dtype!r} needs llama.cpp's quantiser for {', '.join(needed)}, which is not installed here: pip "
            "install xllamacpp, or llama-cpp-python; q8_0, f16 and bf16 need neither"
        )


def quantise(rows: Array, kind: GGMLQuantizationType) -> Array:
    """Rows of float32 values (R, C) as bytes (R, bytes of a row) in a kind. Other threads run meanwhile."""
    function = _quantise_chunk()
    if function is None:
        return gguf.quants.quantize(rows, kind)
    rows = np.ascontiguousarray(rows)
    stored = np.empty(gguf.quant_shape_to_byte_shape(rows.shape, kind), np.uint8)
    function(kind.value, rows.ctypes.data, stored.ctypes.data, 0, *rows.shape, None)
    return stored


@lru_cache(maxsize=1)
def _quantise_chunk() -> Callable[..., int] | None:
    """ggml's function; None where no installed package has it."""
    for file in _libraries():
        if function := getattr(ctypes.CDLL(str(file)), "ggml_quantize_chunk", None):
            number, pointer = ctypes.c_int64, ctypes.c_void_p
            function.restype = ctypes.c_size_t
            function.argtypes = (ctypes.c_int, pointer, pointer, number, number, number, pointer)
            return function
    return None


def _libraries() -> Iterator[Path]:
    """The libraries in which an installed package may have ggml."""
    for package, patterns in _LIBRARIES.items():
        if found := find_spec(package):
            for folder in found.submodule_search_locations or ():
                yield from (file for pattern in patterns for file in Path(folder).glob(pattern))
