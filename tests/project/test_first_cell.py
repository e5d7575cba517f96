"""The first cell of every notebook finds the kit, or installs it, or states in one sentence what to do.

It runs in a fresh interpreter without installed packages. `python -m pip` is replaced by a recorder, which then
provides a kit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))
from stamp import FIRST_CELL

PLACES = {
    "plain Jupyter": {},
    "Colab": {"COLAB_RELEASE_TAG": "release-colab"},
    "Kaggle": {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"},
    "SageMaker Studio": {"SAGEMAKER_APP_TYPE": "JupyterLab"},
    "VS Code": {"VSCODE_PID": "7"},
}
PIP = """
import json, pathlib, sys
here = pathlib.Path(__file__).parents[1]
(here / "pip.json").write_text(json.dumps(sys.argv[1:]))
(here / "falcon_kit.py").write_text("")
"""


class Place:
    """A home of packages with a recording pip, and a folder in which the notebook runs."""

    def __init__(self, folder, environ):
        self.packages, self.folder, self.environ = folder / "packages", folder / "files", environ
        self.vs_code = "VSCODE_PID" in environ
        (self.packages / "pip").mkdir(parents=True)
        (self.packages / "pip" / "__init__.py").touch()
        (self.packages / "pip" / "__main__.py").write_text(PIP)
        (self.folder / "kit" / "notebooks").mkdir(parents=True)

    def run(self, folder, **environ):
        """The model that the cell names, or the last line of its error, and what pip was asked to install."""
        # VS Code can start a kernel elsewhere, and defines the path of the notebook.
        defined = {"__vsc_ipynb_file__": str(folder / "00.ipynb")} if self.vs_code else {}
        program = f"exec({FIRST_CELL!r}, names := {defined!r}); print(names['MODEL'], names['fk'].__name__)"
        variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(self.packages), **self.environ, **environ}
        started_in = self.packages if self.vs_code else folder
        command = [sys.executable, "-S", "-P", "-c", program]  # -S: without site-packages, where the kit is
        ended = subprocess.run(command, cwd=started_in, env=variables, capture_output=True, text=True, check=False)
        record = self.packages / "pip.json"
        installed = json.loads(record.read_text()) if record.exists() else None
        return (ended.stdout or ended.stderr).strip().splitlines()[-1], installed


@pytest.fixture
def place(request, tmp_path):
    return Place(tmp_path, PLACES[request.param])


def in_each_place(test):
    return pytest.mark.parametrize("place", PLACES, indirect=True)(test)


@in_each_place
def test_an_installed_kit_is_used(place):
    (place.packages / "falcon_kit.py").write_text("")
    assert place.run(place.folder) == ("falconet-instruct falcon_kit", None)


@in_each_place
def test_the_checkout_around_the_notebook_is_installed(place):
    (place.folder / "kit" / "falcon_kit").mkdir()
    said, installed = place.run(place.folder / "kit" / "notebooks")
    assert said == "falconet-instruct falcon_kit"
    assert installed == ["install", "--quiet", str(place.folder / "kit")]


@in_each_place
@pytest.mark.parametrize(
    "source", ["git+https://example.org/kit.git", "https://example.org/falcon_kit-1-py3-none-any.whl"]
)
def test_an_address_is_installed(place, source):
    assert place.run(place.folder, FALCON_KIT_SOURCE=source)[1] == ["install", "--quiet", source]


@in_each_place
def test_a_wheel_or_folder_is_installed_by_its_full_path(place):
    wheel = place.folder / "falcon_kit-1-py3-none-any.whl"
    wheel.touch()
    assert place.run(place.folder, FALCON_KIT_SOURCE=str(wheel))[1] == ["install", "--quiet", str(wheel)]


def test_a_relative_path_is_no_name_for_pip(tmp_path):
    place = Place(tmp_path, {})
    assert place.run(place.folder, FALCON_KIT_SOURCE="kit")[1] == ["install", "--quiet", str(place.folder / "kit")]


@in_each_place
@pytest.mark.parametrize("source", ["", "falcon-kit", "/missing/kit.whl"])
def test_nothing_to_install_from_is_one_sentence_and_never_a_name_on_an_index(place, source):
    said, installed = place.run(place.folder, FALCON_KIT_SOURCE=source)
    assert said == "ImportError: set FALCON_KIT_SOURCE to Falcon Kit's wheel, folder or git address, run this again"
    assert installed is None


def test_the_cell_names_the_readers_model(tmp_path):
    place = Place(tmp_path, {"FALCON_KIT_MODEL": "tiiuae/falcon-7b"})
    (place.packages / "falcon_kit.py").write_text("")
    assert place.run(place.folder) == ("tiiuae/falcon-7b falcon_kit", None)


def test_the_cell_fits_a_screen():
    assert len(FIRST_CELL.splitlines()) <= 20
