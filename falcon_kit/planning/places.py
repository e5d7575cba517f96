"""The notebook service in which this process runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from falcon_kit.display.reading import parse_json

SAGEMAKER_FILE = "opt/ml/metadata/resource-metadata.json"
"""https://docs.aws.amazon.com/sagemaker/latest/dg/notebooks-run-and-manage-metadata.html"""


def detect_place(environ: Mapping[str, str], modules: Mapping[str, Any], root: Path) -> tuple[str, str]:
    """The name of the notebook service, and what identifies it.

    Kaggle is checked before Colab, because its image is built on Colab's (Kaggle/docker-python) and may set the same
    variables.
    """
    if "KAGGLE_KERNEL_RUN_TYPE" in environ:
        return "Kaggle", "KAGGLE_KERNEL_RUN_TYPE is set"
    if "google.colab" in modules:
        return "Colab", "google.colab is imported"
    if "COLAB_RELEASE_TAG" in environ:
        return "Colab", "COLAB_RELEASE_TAG is set"
    return _sagemaker(environ, root) or _vs_code(environ, modules) or _shell(environ, modules)


def _sagemaker(environ: Mapping[str, str], root: Path) -> tuple[str, str] | None:
    """SageMaker, identified by its variables or by the metadata file that AWS documents."""
    for variable in ("SAGEMAKER_APP_TYPE", "SAGEMAKER_INTERNAL_IMAGE_URI"):
        if variable in environ:
            return "SageMaker Studio", f"{variable} is set"
    text = read_text(root / SAGEMAKER_FILE)
    if not text:
        return None
    try:
        stored = parse_json(text)
    except ValueError:
        stored = None
    studio = isinstance(stored, dict) and "AppType" in stored
    return "SageMaker Studio" if studio else "SageMaker notebook instance", f"/{SAGEMAKER_FILE} exists"


def _vs_code(environ: Mapping[str, str], modules: Mapping[str, Any]) -> tuple[str, str] | None:
    """VS Code, identified by what its Jupyter extension sets in a kernel."""
    if hasattr(modules.get("__main__"), "__vsc_ipynb_file__"):
        return "VS Code", "__vsc_ipynb_file__ is defined"
    return ("VS Code", "VSCODE_PID is set") if "VSCODE_PID" in environ else None


def _shell(environ: Mapping[str, str], modules: Mapping[str, Any]) -> tuple[str, str]:
    """JupyterLab, Jupyter, IPython in a terminal or plain Python, identified by the IPython shell."""
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
    """Whether the parent process of the kernel (JPY_PARENT_PID) is one of these programs."""
    try:
        command = psutil.Process(int(environ["JPY_PARENT_PID"])).cmdline()
    except (KeyError, ValueError, psutil.Error):
        return False
    return any(Path(part).name.removesuffix(".exe") in programs for part in command)


def read_text(file: Path) -> str:
    """The text of a file, with U+FFFD for what is not UTF-8; empty if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
