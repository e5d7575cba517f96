"""Each notebook service is identified by its variables, modules or files."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from falcon_kit.planning.places import detect_place

STUDIO_METADATA = (
    '{"AppType": "JupyterLab", "DomainId": "d-1a2b3c", "ResourceArn": "arn:aws:sagemaker:eu-west-1:1122:app/x"}'
)
INSTANCE_METADATA = '{"ResourceArn": "arn:aws:sagemaker:eu-west-1:1122:notebook-instance/mine", "ResourceName": "mine"}'


class ZMQInteractiveShell:
    """Stands for ipykernel's shell, which has a kernel."""

    kernel = object()


class TerminalInteractiveShell:
    """Stands for IPython's shell in a terminal."""


def ipython(shell: object | None) -> dict[str, Any]:
    return {"IPython": SimpleNamespace(get_ipython=lambda: shell)}


@pytest.mark.parametrize(
    ("environ", "modules", "expected"),
    [
        ({"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, {}, ("Kaggle", "KAGGLE_KERNEL_RUN_TYPE is set")),
        ({}, {"google.colab": ModuleType("google.colab")}, ("Colab", "google.colab is imported")),
        ({"COLAB_RELEASE_TAG": "release-colab"}, {}, ("Colab", "COLAB_RELEASE_TAG is set")),
        ({"SAGEMAKER_APP_TYPE": "JupyterLab"}, {}, ("SageMaker Studio", "SAGEMAKER_APP_TYPE is set")),
        ({"SAGEMAKER_INTERNAL_IMAGE_URI": "x"}, {}, ("SageMaker Studio", "SAGEMAKER_INTERNAL_IMAGE_URI is set")),
        ({"VSCODE_PID": "7"}, ipython(ZMQInteractiveShell()), ("VS Code", "VSCODE_PID is set")),
        (
            {},
            {"__main__": SimpleNamespace(__vsc_ipynb_file__="/a.ipynb")},
            ("VS Code", "__vsc_ipynb_file__ is defined"),
        ),
        ({}, ipython(ZMQInteractiveShell()), ("Jupyter", "the shell is ZMQInteractiveShell")),
        ({}, ipython(TerminalInteractiveShell()), ("IPython", "the shell is TerminalInteractiveShell")),
        ({}, ipython(None), ("plain Python", "no IPython shell is running")),
        ({}, {}, ("plain Python", "no IPython shell is running")),
    ],
)
def test_a_place_is_known_by_its_mark(
    tmp_path: Path, environ: dict[str, str], modules: dict[str, Any], expected: tuple[str, str]
) -> None:
    assert expected == detect_place(environ, modules, tmp_path)


def test_kaggle_is_not_taken_for_colab_whose_image_it_builds_on(tmp_path: Path) -> None:
    environ = {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "COLAB_RELEASE_TAG": "release-colab"}

    assert detect_place(environ, {"google.colab": ModuleType("google.colab")}, tmp_path)[0] == "Kaggle"


def test_studios_code_editor_is_not_taken_for_vs_code(tmp_path: Path) -> None:
    environ = {"SAGEMAKER_APP_TYPE": "CodeEditor", "VSCODE_PID": "7"}

    assert detect_place(environ, {}, tmp_path)[0] == "SageMaker Studio"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (STUDIO_METADATA, "SageMaker Studio"),
        (INSTANCE_METADATA, "SageMaker notebook instance"),
        ("not json", "SageMaker notebook instance"),
        ("5", "SageMaker notebook instance"),
        ("[" * 100_000, "SageMaker notebook instance"),
        (STUDIO_METADATA.replace("x", "\udcff"), "SageMaker Studio"),
    ],
)
def test_sagemaker_is_known_by_its_metadata_file(tmp_path: Path, metadata: str, expected: str) -> None:
    file = tmp_path / "opt/ml/metadata/resource-metadata.json"
    file.parent.mkdir(parents=True)
    file.write_text(metadata, errors="surrogateescape")

    assert (expected, "/opt/ml/metadata/resource-metadata.json exists") == detect_place({}, {}, tmp_path)


@pytest.fixture
def jupyter_lab(tmp_path: Path) -> Iterator[int]:
    """The id of a process that runs a program called jupyter-lab."""
    program = tmp_path / "jupyter-lab"
    program.write_text("input()")
    process = subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate(b"\n")


def test_jupyterlab_is_known_by_the_process_that_started_the_kernel(tmp_path: Path, jupyter_lab: int) -> None:
    expected = ("JupyterLab", "the shell is ZMQInteractiveShell, started by JupyterLab")

    assert expected == detect_place({"JPY_PARENT_PID": str(jupyter_lab)}, ipython(ZMQInteractiveShell()), tmp_path)


@pytest.mark.parametrize("parent", [str(os.getpid()), "999999999", "nonsense"], ids=["own", "none", "nonsense"])
def test_a_kernel_with_any_other_parent_is_just_jupyter(tmp_path: Path, parent: str) -> None:
    assert detect_place({"JPY_PARENT_PID": parent}, ipython(ZMQInteractiveShell()), tmp_path)[0] == "Jupyter"
