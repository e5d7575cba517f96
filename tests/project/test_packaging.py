"""The project's metadata is consistent, and the built archives contain what a user needs."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import falcon_kit

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [Requirement(line) for group in [PROJECT["dependencies"], *EXTRAS.values()] for line in group]
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
MAKEFILE = (ROOT / "Makefile").read_text()
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
# What a kernel of Colab (its image of August 2026) has imported when a notebook starts. If pip replaces one of these,
# the runtime has to be restarted, and with another IPython it does not start again.
COLAB = {"ipython": "7.34.0", "ipywidgets": "7.7.1", "numpy": "2.1.3", "pandas": "2.2.3", "psutil": "5.9.5"}
CHECKPOINT_FILES = [
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]
ADAPTER_FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tuning.json"]
SHIPPED = [f"falcon_kit/falconet/base/{file}" for file in CHECKPOINT_FILES]
SHIPPED += [f"falcon_kit/falconet/instruct/{file}" for file in ADAPTER_FILES]
SHIPPED += ["falcon_kit/__init__.py", "falcon_kit/py.typed"]
SHIPPED += ["falcon_kit/inspection/sentences.json", "falcon_kit/inspection/published.json"]
SHIPPED += ["falcon_kit/guardrails/lines.jsonl"]
SHIPPED += ["falcon_kit/evaluation/pairs.jsonl", "falcon_kit/evaluation/published.json"]
SHIPPED += [f"falcon_kit/evaluation/tasks/falconet-{task}.jsonl" for task in ("answers", "choices", "unknown")]

# Packages that the kit needs but does not import, each with the reason.
USED_BY_OTHERS = {
    "accelerate": "transformers calls it for device_map",
    "ipywidgets": "tqdm.auto draws its notebook bars with it",
}

# What comes with boto3, in the extra "serving".
WITH_BOTO3 = {"botocore": "its errors", "urllib3": "it reads the event streams"}


def distributions_imported_in(sources: Iterable[str]) -> set[str]:
    """The installed distributions that these Python sources import anywhere, inside functions too."""
    names = set()
    for node in chain.from_iterable(ast.walk(ast.parse(source)) for source in sources):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).partition(".")[0])
    owners = importlib.metadata.packages_distributions()
    return {canonicalize_name(owners[name][0]) for name in names & owners.keys()} - {"falcon-kit"}


def notebook_cells() -> Iterator[str]:
    """The code cells of the notebooks."""
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        yield from (cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")


PACKAGE_IMPORTS = distributions_imported_in(path.read_text() for path in (ROOT / "falcon_kit").rglob("*.py"))
NOTEBOOK_IMPORTS = distributions_imported_in(notebook_cells())


# Dependencies and pins


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_a_direct_dependency_is_pinned_once_and_within_its_range(requirement):
    versions = [pin.specifier for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(requirement.name)]
    assert len(versions) == 1
    (exact,) = versions[0]
    assert exact.operator == "=="
    assert requirement.specifier.contains(exact.version)


@pytest.mark.parametrize("name", COLAB)
def test_a_package_that_colab_has_imported_is_new_enough(name):
    (requirement,) = [each for each in map(Requirement, PROJECT["dependencies"]) if each.name == name]
    assert requirement.specifier.contains(COLAB[name])


def test_only_direct_dependencies_are_pinned():
    assert {pin.name for pin in PINS} == {requirement.name for requirement in DIRECT}


def test_no_dependency_is_declared_twice():
    assert [name for name, count in Counter(requirement.name for requirement in DIRECT).items() if count > 1] == []


@pytest.mark.parametrize("name", ["pyproject.toml", "environment.yml", "Makefile"])
def test_versions_are_pinned_nowhere_else(name):
    assert re.findall(r".*==\s*\d.*", (ROOT / name).read_text()) == []


@pytest.mark.parametrize("requirement", [Requirement(line) for line in PROJECT["dependencies"]], ids=str)
def test_a_runtime_dependency_is_used(requirement):
    assert requirement.name in PACKAGE_IMPORTS | NOTEBOOK_IMPORTS | set(USED_BY_OTHERS)


def test_what_the_package_and_the_notebooks_import_is_declared():
    declared = {Requirement(line).name for line in PROJECT["dependencies"]}
    for_notebooks = {Requirement(line).name for line in EXTRAS["serving"]} | WITH_BOTO3.keys()
    assert NOTEBOOK_IMPORTS - declared - for_notebooks == set()
    assert PACKAGE_IMPORTS - declared - for_notebooks - {"lm-eval"} == set()  # lm-eval is in the extra "evaluation"


def test_nobody_is_told_to_install_a_name_that_this_project_does_not_own():
    """falcon-kit is on no index: an extra's package is named itself."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split() if Path(name).suffix in (".py", ".md", ".ipynb", ".sh")]
    told = [file.name for file in files if re.search(r"pip install (\S+ )*['\"\\\\]*falcon-kit", file.read_text())]
    assert told == []


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="the machine has no make")


def environment_in(folder, program):
    """Puts the Makefile into a folder, with a shell script as the Python of its environment."""
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)


@needs_make
@pytest.mark.parametrize(
    ("present", "refused"), [("9.9", True), (f"{sys.version_info[0]}.{sys.version_info[1]}", False)]
)
def test_make_refuses_another_python_than_that_of_the_environment_that_is_there(tmp_path, present, refused):
    environment_in(tmp_path, f"echo {present}")
    ended = subprocess.run(["make", "help", f"PYTHON={sys.executable}"], cwd=tmp_path, capture_output=True, text=True)
    assert ("and .venv has Python 9.9: remove .venv first" in ended.stderr, ended.returncode != 0) == (refused, refused)


@needs_make
def test_make_installs_into_the_environment_that_is_there_without_another_python(tmp_path):
    environment_in(tmp_path, 'echo "$@" > asked')
    environ = os.environ | {"PYTHON": "/bin/false"}
    subprocess.run(["make", ".venv/.demo"], cwd=tmp_path, env=environ, capture_output=True, check=True)
    assert (tmp_path / "asked").read_text() == "-m pip install -c constraints.txt -e .[demo]\n"


@needs_make
def test_make_creates_an_environment_again_that_was_not_finished(tmp_path):
    environment_in(tmp_path, "exit 1")  # without pip
    environ = os.environ | {"PYTHON": "echo"}
    ended = subprocess.run(["make", ".venv/.demo"], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert "-m venv .venv" in ended.stdout.splitlines()


@needs_make
def test_make_clean_leaves_the_environments_alone(tmp_path):
    environment_in(tmp_path, "")
    folders = [tmp_path / name / "__pycache__" for name in (".venv", ".newest", ".oldest", ".engines", "falcon_kit")]
    for folder in folders:
        folder.mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, check=True)
    assert [folder.exists() for folder in folders] == [True, True, True, True, False]


def test_the_makefile_installs_extras_that_exist():
    installed = [line.split() for line in re.findall(r"^\.venv/\.\w+: EXTRAS := (.+)", MAKEFILE, re.MULTILINE)]
    assert [extra for extras in installed for extra in extras if extra not in EXTRAS] == []


def test_the_demo_needs_nothing_but_the_package_and_its_extra():
    declared = {Requirement(line).name for line in [*PROJECT["dependencies"], *EXTRAS["demo"]]}
    assert distributions_imported_in([(ROOT / "notebooks/demo.py").read_text()]) - declared == set()


# The conda environment


def test_conda_and_pip_users_get_the_same_python():
    (python,) = [entry for entry in CONDA if isinstance(entry, str) and entry.startswith("python ")]
    assert SpecifierSet(python.removeprefix("python ")) == SpecifierSet(PROJECT["requires-python"])


def test_conda_brings_nothing_but_python_and_pip():
    assert [entry.split()[0] for entry in CONDA if isinstance(entry, str)] == ["python", "pip"]


def test_conda_installs_this_package_with_its_lab_under_the_pins():
    (pip,) = [entry["pip"] for entry in CONDA if isinstance(entry, dict)]
    assert pip == ["-c constraints.txt", "-e .[lab,serving]"]
    assert "lab" in EXTRAS


# Version and citation


def test_the_package_knows_its_version():
    assert falcon_kit.__version__ == importlib.metadata.version("falcon-kit") == PROJECT["version"]


def test_the_citation_names_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]


def test_the_citation_lists_the_three_papers_of_the_model_card():
    references = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    assert [(paper["authors"][0]["family-names"], len(paper["authors"]), paper["year"]) for paper in references] == [
        ("Almazrouei", 13, 2023),
        ("Penedo", 9, 2023),
        ("Xu", 4, 2023),
    ]


# What is built


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The source archive, and the wheel built from it, without network."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return out


@pytest.fixture(scope="session")
def wheel_files(built):
    (path,) = built.glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


@pytest.fixture(scope="session")
def sdist_files(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.mark.parametrize("file", SHIPPED)
def test_the_wheel_contains(wheel_files, file):
    assert file in wheel_files


@pytest.mark.parametrize("file", [*SHIPPED, "LICENSE", "CITATION.cff", "constraints.txt", "pyproject.toml"])
def test_the_source_archive_contains(sdist_files, file):
    assert file in sdist_files


def test_the_wheel_contains_only_the_package_and_its_metadata(wheel_files):
    assert {name.partition("/")[0].partition("-")[0] for name in wheel_files} == {"falcon_kit"}


def test_work_files_stay_out_of_the_source_archive(sdist_files):
    tops = {name.partition("/")[0] for name in sdist_files}
    assert tops & {".venv", ".git", ".falconet", "runs", "build", "dist"} == set()
