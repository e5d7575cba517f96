"""Remarks of libraries that no cell should show."""

import subprocess
import sys

REMARKS = {
    "backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community: no kernels",
    "autograd._functions": "MatMul8bitLt: inputs will be cast from bfloat16 to float16",
    "cextension": "the library was built for another CUDA",
}


def test_importing_the_kit_silences_two_remarks_of_bitsandbytes_and_no_warning_else():
    said = "; ".join(f"logging.getLogger('bitsandbytes.{name}').warning({text!r})" for name, text in REMARKS.items())
    code = f"import logging, falcon_kit; {said}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr.splitlines() == [REMARKS["cextension"]]
