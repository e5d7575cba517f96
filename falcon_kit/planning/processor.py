"""What the processors of this machine multiply in instructions of their own, and which dtype is fast for that reason.

torch is imported for a GPU only; its own answers for the CPU are `has_products` and `multiplies_in_integers` of
`falcon_kit.model.products`.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from falcon_kit.catalogue import memory
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.tables import format_bytes
from falcon_kit.planning.environment import native_bfloat16
from falcon_kit.planning.places import read_text

_FLAGS = {"float16": "avx512_fp16", "bfloat16": "avx512_bf16"}
"""The names that Linux has for the instructions that torch uses."""
_VNNI = {"avx_vnni", "avx512_vnni"}


def has_instructions_for(dtype: str, environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> bool:
    """Whether the CPU has instructions for products of these weights; int8 and int4 are multiplied as bfloat16.

    Only Linux on x86 is recognised: elsewhere the answer is False for 16 bits, the slower case. The variable
    ATEN_CPU_CAPABILITY limits torch, and so the answer.
    """
    if dtype == "float32":
        return True
    if environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("default", "avx2"):
        return False
    return _FLAGS.get(dtype, _FLAGS["bfloat16"]) in read_text(root / "proc/cpuinfo").split()


def has_vnni(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> bool:
    """Whether the CPU has instructions for products of 8-bit integers, by which int8 is multiplied.

    Linux on x86 and ATEN_CPU_CAPABILITY count as in `has_instructions_for`.
    """
    limited = environ.get("ATEN_CPU_CAPABILITY", "").lower() == "default"
    return not limited and not _VNNI.isdisjoint(read_text(root / "proc/cpuinfo").split())


def cpu_dtype(stored: str, spec: FalconSpec, available: int, reason: str = "as in the checkpoint") -> tuple[str, str]:
    """The dtype in which `fk.load` has a checkpoint on a CPU with so many bytes free, and the reason.

    reason: for the stored dtype, if it stays.
    """
    full = memory.weight_bytes(spec, "float32")
    if stored in ("bfloat16", "float16") and full < available / 10:
        return "float32", f"{format_bytes(full)} in float32 fit easily into host memory, and float32 rounds less"
    if stored == "float16":
        return "bfloat16", "CPUs compute bfloat16 faster than the checkpoint's float16"
    return stored, reason


def gpu_dtype(stored: str, reason: str = "as in the checkpoint") -> tuple[str, str]:
    """As `cpu_dtype`, on this machine's GPU."""
    if stored == "bfloat16" and not native_bfloat16():
        return "float16", "the checkpoint's bfloat16 is not native to this GPU"
    return stored, reason


def fast_dtypes(spec: FalconSpec, has_bfloat16: bool, has_integers: bool) -> str:
    """One sentence: which dtypes are fast for this model on a CPU with or without instructions for bfloat16 and for
    integers, why, and their weights."""
    float32, bfloat16, int8, int4 = (
        f"{dtype} ({format_bytes(memory.weight_bytes(spec, dtype))})"
        for dtype in ("float32", "bfloat16", "int8", "int4")
    )
    if has_bfloat16:
        return (
            f"this CPU has instructions for bfloat16 (AVX512-BF16): {bfloat16} reads a long prompt fastest, {int8} "
            f"writes several texts at once fastest, {int4} a single text, and {float32} takes more than twice as long"
        )
    if has_integers:
        return (
            f"this CPU has instructions for integers (VNNI) and none for bfloat16 (AVX512-BF16): {int8} reads a prompt "
            f"about twice as fast as {float32}, {bfloat16} and {int4}, and writes texts fastest"
        )
    return (
        f"this CPU has no instructions for bfloat16 (AVX512-BF16) and multiplies in float32: {float32}, {bfloat16} and "
        f"{int8} read a prompt about equally fast, and {int8.split()[0]} and {int4} write several texts at once fastest"
    )
