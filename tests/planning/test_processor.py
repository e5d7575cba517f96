"""What the CPU of this machine multiplies, and the advice that follows."""

import os
import subprocess
import sys

import pytest
import torch

import falcon_kit as fk
from falcon_kit.model.products import has_products, multiplies_in_integers
from falcon_kit.planning.devices import Device
from falcon_kit.planning.processor import fast_dtypes, has_instructions_for, has_vnni

LAPTOP = "flags\t\t: fpu sse2 avx2 fma\n"
SERVER = "flags\t\t: fpu sse2 avx2 avx512f avx512_bf16\n"
LAPTOP_OF_2021 = LAPTOP.strip() + " avx_vnni\n"
CASCADE_LAKE = "flags\t\t: fpu sse2 avx2 avx512f avx512_vnni\n"
SAPPHIRE_RAPIDS = SERVER.strip() + " avx512_fp16 amx_bf16\n"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (LAPTOP, {"float32"}),
        (SERVER, {"float32", "bfloat16", "int8", "int4"}),
        (SAPPHIRE_RAPIDS, {"float32", "bfloat16", "float16", "int8", "int4"}),
        (None, {"float32"}),
    ],
)
def test_the_flags_of_linux_are_read(tmp_path, cpuinfo, expected):
    if cpuinfo is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    dtypes = ("float32", "bfloat16", "float16", "int8", "int4")
    assert {dtype for dtype in dtypes if has_instructions_for(dtype, {}, tmp_path)} == expected


@pytest.mark.parametrize("limit", ["avx2", "AVX2", "default"])
def test_a_limit_of_torch_limits_the_answer(tmp_path, limit):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(SAPPHIRE_RAPIDS)
    assert not has_instructions_for("bfloat16", {"ATEN_CPU_CAPABILITY": limit}, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="the flags of other systems are not read")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_answer_is_that_of_torch(dtype):
    assert has_instructions_for(dtype) == has_products(getattr(torch, dtype))


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [(LAPTOP, False), (LAPTOP_OF_2021, True), (SERVER, False), (CASCADE_LAKE, True), (None, False)],
)
def test_the_flags_of_instructions_for_integers_are_read(tmp_path, cpuinfo, expected):
    if cpuinfo is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    assert has_vnni({"ATEN_CPU_CAPABILITY": "avx2"}, tmp_path) is expected
    assert not has_vnni({"ATEN_CPU_CAPABILITY": "default"}, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="the flags of other systems are not read")
def test_the_answer_for_integers_is_what_the_layers_do():
    assert has_vnni() == multiplies_in_integers(2048, 2048)


def test_the_sentence_names_what_is_fast_and_its_bytes():
    spec = fk.spec("falcon-7b")
    fast, laptop, slow = (fast_dtypes(spec, *has) for has in [(True, True), (False, True), (False, False)])
    for sentence in (fast, laptop, slow):
        assert all(each in sentence for each in ("float32 (25.8 GiB)", "bfloat16 (12.9 GiB)", "int8 (", "int4 ("))
    assert "has instructions for bfloat16" in fast
    assert "has instructions for integers (VNNI) and none for bfloat16" in laptop
    assert "no instructions for bfloat16" in slow


def test_a_plan_for_this_cpu_advises_and_others_do_not(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = fk.plan("falcon-7b")
    assert plan.advice in plan._repr_html_()
    assert plan.advice == fast_dtypes(plan.spec, has_instructions_for("bfloat16"), has_vnni())
    laptop = [Device("a laptop", "cpu", 2**33)]
    others = [fk.plan("falcon-7b", **each) for each in ({"devices": "A10G"}, {"purpose": "lora"}, {"devices": laptop})]
    assert [each.advice for each in others] == ["", "", ""]
    assert "What is fast" not in others[0]._repr_html_()


def test_a_plan_under_avx2_advises_for_avx2():
    code = "import falcon_kit as fk; print(fk.plan('falcon-7b').advice)"
    limits = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run([sys.executable, "-c", code], env=limits, capture_output=True, text=True, check=True)
    assert ("none for bfloat16" if has_vnni() else "no instructions for bfloat16") in ended.stdout
