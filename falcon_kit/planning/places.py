"""Which notebook service this Python runs in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

_SAGEMAKER_FILE = "opt/ml/metadata/resource-metadata.json"


def detect_place(environ: Mapping[str, str], modules: Mapping[str, Any], root: Path = Path("/")) -> tuple[str, str]:
    """Name the place and the mark that gives it away, the most specific first.

    Kaggle comes before Colab, because its image is built on Colab's (Kaggle/docker-python) and may keep those marks.
    """
    if "KAGGLE_KERNEL_RUN_TYPE" in environ:
        return "Kaggle", "KAGGLE_KERNEL_RUN_TYPE is set"
    if "google.colab" in modules:
        return "Colab", "google.colab is imported"
    if "COLAB_RELEASE_TAG" in environ:
        return "Colab", "COLAB_RELEASE_TAG is set"
    return _sagemaker(environ, root) or _vs_code(environ, modules) or _shell(environ, modules)


def _sagemaker(environ: Mapping[str, str], root: Path) -> tuple[str, str] | None:
    """SageMaker by its variables, or by the metadata file that AWS documents as its public contract.

    Source: https://docs.aws.amazon.com/sagemaker/latest/dg/notebooks-run-and-manage-metadata.html
    """
    for mark in ("SAGEMAKER_APP_TYPE", "SAGEMAKER_INTERNAL_IMAGE_URI"):
        if mark in environ:
            return "SageMaker Studio", f"{mark} is set"
    text = read_text(root / _SAGEMAKER_FILE)
    if not text:
        return None
    try:
        studio = "AppType" in json.loads(text)
    except ValueError:
        studio = False
    return "SageMaker Studio" if studio else "SageMaker notebook instance", f"/{_SAGEMAKER_FILE} exists"


def _vs_code(environ: Mapping[str, str], modules: Mapping[str, Any]) -> tuple[str, str] | None:
    """VS Code, by what its Jupyter extension gives a kernel."""
    if hasattr(modules.get("__main__"), "__vsc_ipynb_file__"):
        return "VS Code", "__vsc_ipynb_file__ is defined"
    return ("VS Code", "VSCODE_PID is set") if "VSCODE_PID" in environ else None


def _shell(environ: Mapping[str, str], modules: Mapping[str, Any]) -> tuple[str, str]:
    """A notebook kernel, IPython in a terminal, or plain Python, by the running IPython shell."""
    get_ipython = getattr(modules.get("IPython"), "get_ipython", None)
    shell = get_ipython() if get_ipython else None
    if shell is None:
        return "plain Python", "no IPython shell is running"
    reason = f"the shell is {type(shell).__name__}"
    if not hasattr(shell, "kernel"):
        return "IPython", reason
    if _started_by(environ, "jupyter-lab", "jupyter-labhub", "jupyterlab"):
        return "JupyterLab", f"{reason}, started by JupyterLab"
    return "Jupyter", reason


def _started_by(environ: Mapping[str, str], *programs: str) -> bool:
    """Whether the process that Jupyter names as the kernel's parent (JPY_PARENT_PID) is one of these programs."""
    try:
        command = psutil.Process(int(environ["JPY_PARENT_PID"])).cmdline()
    except (KeyError, ValueError, psutil.Error):
        return False
    return any(Path(part).name.removesuffix(".exe") in programs for part in command)


def read_text(file: Path) -> str:
    """The text of a file, empty if it cannot be had."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
