"""Every dtype with every instruction set: a process for each, since torch reads its limits when it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from falcon_kit.catalogue import memory
from tests.conftest import small_model

LIMITS = {
    "all": {},
    "AVX2 and VNNI": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "none": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
LARGEST = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.003, "int8": 0.05, "int4": 0.4, "nf4": 0.4}
"""The norm of the error of the logits over that of the logits."""
ROWS = (1, 3, 40, 250)
"""Tokens of a prompt, on both sides of every number of rows from which a product is computed in another way."""
CODE = """
import json, sys, torch
import falcon_kit as fk
from falcon_kit.model import modeling, products
folder, *dtypes = sys.argv[1:]
exact = modeling.FalconForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
errors = {}
with torch.inference_mode():
    prompts = [(torch.arange(rows) * 7 %% 250)[None] for rows in %r]
    logits = [exact(ids).logits for ids in prompts]
    for dtype in dtypes:
        model = fk.load(folder, dtype=dtype).model
        for ids, expected in zip(prompts, logits):
            errors[f"{dtype}, {ids.numel()} rows"] = float((model(ids).logits - expected).norm() / expected.norm())
print(json.dumps({"capability": torch.backends.cpu.get_cpu_capability(), "errors": errors}))
"""


@pytest.fixture
def wide(tokenizer, tmp_path):
    """A checkpoint whose layers have more weights than a slab."""
    model = small_model("40b", hidden_size=1024, num_attention_heads=16)
    assert memory.SLAB <= model.transformer.h[0].mlp.dense_h_to_4h.weight.numel()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("limit", LIMITS)
def test_the_logits_of_every_dtype_are_near_float64(limit, wide):
    code, root = CODE % (ROWS,), Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(wide), *LARGEST]
    ended = subprocess.run(
        command, env=os.environ | LIMITS[limit], cwd=root, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    if limit != "all":
        assert found["capability"] == ("DEFAULT" if limit == "none" else "AVX2")
    assert {name: error for name, error in found["errors"].items() if not error < LARGEST[name.partition(",")[0]]} == {}


def test_every_dtype_is_among_them():
    assert {*memory.DTYPES} - {*LARGEST} == {"nf4-double"}  # computes as nf4 does
