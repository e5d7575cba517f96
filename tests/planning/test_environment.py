"""The description of this process and its machine: what limits it counts, and what it does not show."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import falcon_kit as fk
from falcon_kit.planning.environment import (
    PACKAGES,
    Accelerator,
    Environment,
    environment,
    find_accelerators,
    gpu_problem,
    host_memory,
    usable_cores,
)
from tests.conftest import simulated_gpus

ROOT = Path(__file__).parents[2]
GIB = 2**30
HOSTILE = "</td><img src=x onerror=alert(1)>"


def machine(root: Path, files: dict[str, str]) -> Path:
    """A root of a file system with these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def fake_cuda(*devices: tuple[str, int, int], cached: int = 0) -> SimpleNamespace:
    """A stand-in for torch.cuda: GPUs by name, total and free bytes, and `cached` bytes in the allocator's cache."""
    return SimpleNamespace(
        is_available=lambda: bool(devices),
        device_count=lambda: len(devices),
        get_device_name=lambda index: devices[index][0],
        mem_get_info=lambda index: (devices[index][2], devices[index][1]),
        memory_reserved=lambda index: cached,
        memory_allocated=lambda index: 0,
    )


NO_MPS = SimpleNamespace(mps=SimpleNamespace(is_available=lambda: False))


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return environment(environ={}, modules={}, root=tmp_path)


def test_versions_are_those_that_are_installed_and_none_where_nothing_is(found: Environment) -> None:
    installed = {each.name.lower().replace("_", "-"): each.version for each in distributions()}

    assert {name: installed.get(name) for name in PACKAGES} == found.versions


def run(code: str, **environ: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_looking_for_devices_without_torch_finds_none() -> None:
    code = "from falcon_kit.planning.environment import find_accelerators; print(find_accelerators())"

    assert run(f"import sys; sys.modules['torch'] = None; {code}") == "()\n"


def test_importing_the_module_loads_no_large_library() -> None:
    names = {"torch", "transformers", "huggingface_hub"}
    code = f"import sys, falcon_kit.planning.environment; print({names} & {{*sys.modules}})"

    assert run(code) == "set()\n"


def test_every_cuda_device_is_listed_with_its_memory() -> None:
    torch = SimpleNamespace(cuda=fake_cuda(("A100", 40 * GIB, 39 * GIB), ("T4", 16 * GIB, 2 * GIB)), backends=NO_MPS)

    expected = (Accelerator("A100", "cuda", 0, 40 * GIB, 39 * GIB), Accelerator("T4", "cuda", 1, 16 * GIB, 2 * GIB))
    assert expected == find_accelerators(torch)


def test_an_apple_gpu_is_listed_with_what_it_recommends_to_use() -> None:
    torch = SimpleNamespace(
        cuda=fake_cuda(),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: True)),
        mps=SimpleNamespace(recommended_max_memory=lambda: 10 * GIB, driver_allocated_memory=lambda: GIB),
    )

    assert find_accelerators(torch) == (Accelerator("Apple GPU", "mps", 0, 10 * GIB, 9 * GIB),)


def test_a_machine_without_accelerators_has_no_devices() -> None:
    assert find_accelerators(SimpleNamespace(cuda=fake_cuda(), backends=NO_MPS)) == ()


def test_without_control_groups_the_machine_itself_is_the_limit(tmp_path: Path) -> None:
    assert psutil.virtual_memory().total == host_memory(tmp_path)[0]


@pytest.mark.parametrize(
    "files",
    [
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/memory.current": f"{GIB // 2}\n",
        },
        {
            "proc/self/cgroup": "0::/not/mounted/here\n",
            "sys/fs/cgroup/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/memory.current": f"{GIB // 2}\n",
        },
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/outer/memory.current": f"{GIB // 2}\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
        },
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": f"{GIB // 2}\n",
        },
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/memory.current": f"{GIB // 4 * 3}\n",
            "sys/fs/cgroup/memory.stat": f"anon 12\ninactive_file {GIB // 4}\n",
        },
    ],
    ids=["version 2", "container", "limit of an outer group", "version 1", "file cache can be dropped"],
)
def test_a_containers_memory_limit_counts(tmp_path: Path, files: dict[str, str]) -> None:
    assert (GIB, GIB // 2) == host_memory(machine(tmp_path, files))


def test_a_container_that_is_full_has_nothing_left(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": f"{GIB}\n", "sys/fs/cgroup/memory.current": f"{2 * GIB}\n"}

    assert (GIB, 0) == host_memory(machine(tmp_path, files))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
    ids=["version 2", "version 2, no limit", "version 1", "version 1, no limit"],
)
def test_a_containers_cpu_quota_counts(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    assert (expected or usable_cores(tmp_path / "none")) == usable_cores(machine(tmp_path, files))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux lets a process choose its cores")
def test_cores_outside_the_affinity_do_not_count() -> None:
    code = (
        "import os, pathlib; from falcon_kit.planning.environment import usable_cores; "
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(usable_cores(pathlib.Path('/nowhere')))"
    )

    assert run(code) == "1\n"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"HF_HUB_CACHE": "/data/hub"}, "/data/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/data/old"}, "/data/old"),
        ({"HF_HOME": "~/elsewhere"}, "~/elsewhere/hub"),
        ({"XDG_CACHE_HOME": "/data/cache"}, "/data/cache/huggingface/hub"),
    ],
)
def test_the_cache_directory_is_the_one_that_huggingface_hub_uses(environ: dict[str, str], expected: str) -> None:
    """In a fresh interpreter, because huggingface_hub reads the variables when it is imported."""
    names = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
    code = f"import os; [os.environ.pop(name, None) for name in {names}]; os.environ.update({environ}); "
    code += "from falcon_kit.planning.environment import cache_directory; print(cache_directory())"

    assert str(Path(expected).expanduser()) == run(code).strip()


def test_free_disk_is_known_before_the_cache_directory_exists(found: Environment) -> None:
    assert not found.cache_directory.exists()
    assert found.cache_free_bytes > 0


def test_looking_around_creates_nothing(tmp_path: Path, found: Environment) -> None:
    assert list(tmp_path.iterdir()) == []
    assert found.where == "plain Python"


def test_values_of_variables_are_never_shown(tmp_path: Path) -> None:
    environ = {"HF_TOKEN": "hf_secret", "KAGGLE_KERNEL_RUN_TYPE": "hf_secret", "JPY_PARENT_PID": "hf_secret"}

    shown = environment(environ=environ, modules={}, root=tmp_path)

    assert "hf_secret" not in repr(shown) + shown._repr_html_() + str(vars(shown))


def test_an_environment_is_one_line_as_text(found: Environment) -> None:
    gpu = Accelerator("A100", "cuda", 0, 40 * GIB, 39 * GIB)
    whole = replace(found, python="3.12.1", devices=(gpu,), cores=8, memory_bytes=64 * GIB, available_bytes=60 * GIB)

    expected = "Environment(plain Python, Python 3.12.1, A100 40.0 GiB, 8 cores, 60.0 GiB of 64.0 GiB free)"
    assert expected == repr(whole)


def test_a_machine_without_gpu_says_so(found: Environment) -> None:
    bare = replace(found, devices=())

    assert ("no GPU" in repr(bare), "none usable by torch" in bare._repr_html_()) == (True, True)


def test_everything_in_the_table_is_escaped(found: Environment) -> None:
    gpu = Accelerator(HOSTILE, "cuda", 0, GIB, GIB)
    hostile = replace(found, where=HOSTILE, reason=HOSTILE, versions={HOSTILE: HOSTILE}, devices=(gpu,))

    page = hostile._repr_html_()
    assert ("<img" in page, page.count("&lt;img")) == (False, 5)


def test_the_table_brings_no_colours_and_fetches_nothing(found: Environment) -> None:
    assert not [word for word in ("color", "background", "<script", "src=", "href=") if word in found._repr_html_()]


def test_the_table_shows_no_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "models/hub"))
    shown = environment({}, {})._repr_html_()
    assert ("~/models/hub" in shown, str(tmp_path) in shown) == (True, False)


def test_memory_that_torch_keeps_in_store_is_free() -> None:
    torch = SimpleNamespace(cuda=fake_cuda(("T4", 16, 5), cached=3), backends=NO_MPS)
    assert [device.free_bytes for device in find_accelerators(torch)] == [8]


# A GPU that torch cannot use


@pytest.mark.parametrize(
    ("cuda", "error", "problem"),
    [
        ("13.0", RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."), "13.0"),
        ("13.0", RuntimeError("Found no NVIDIA driver on your system."), ""),
    ],
)
def test_a_driver_that_is_too_old_is_named_with_what_to_do(cuda, error, problem, monkeypatch):
    def init():
        raise error

    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.init", init)
    assert (f"built for CUDA {problem}" in gpu_problem()) if problem else (gpu_problem() == "")
    assert ("update the driver" in environment()._repr_html_()) == bool(problem)
    if problem:
        with pytest.raises(ValueError, match=r"device_map='cuda:0', but the NVIDIA driver is too old"):
            fk.load("falconet", device_map="cuda:0")
        with pytest.warns(UserWarning, match="the NVIDIA driver is too old"):
            fk.load("falconet")


@pytest.mark.parametrize(
    ("driver", "hip", "found"), [("nvidia-smi", None, True), (None, None, False), ("nvidia-smi", "6.2", False)]
)
def test_a_torch_without_cuda_beside_a_driver_is_named_with_what_to_do(driver, hip, found, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("torch.version.hip", hip)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("falcon_kit.planning.environment.shutil.which", lambda name: driver)
    assert ("built without CUDA, so the NVIDIA GPU is not used: install torch" in gpu_problem()) == found


def test_one_of_several_processes_finds_its_own_gpu(monkeypatch):
    asked = simulated_gpus(monkeypatch, [10, 20, 30])
    assert [each.index for each in environment().devices] == [0, 1, 2]
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    asked.clear()
    assert ([each.index for each in environment().devices], asked) == ([2], [2])
