"""Every committed notebook is short and clean, and its outputs belong to its source."""

import base64
import io
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import nbformat
import pytest
import torch
from PIL import Image

import falcon_kit as fk
from falcon_kit.exercises.check import all_checks
from tests.project.notebook_memory import cells

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
from stamp import FIRST_CELL, source_hash  # noqa: E402  (a script in the folder of the notebooks, not part of the package)

TUTORIAL = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
ALL = [*TUTORIAL, *sorted(NOTEBOOKS.glob("solutions/*.ipynb"))]

# A path on the author's machine: not within a URL, a relative path, or base64.
PRIVATE_PATH = re.compile(r"(?<![\w/.~+-])/(?:home|root|tmp|work|Users)\b[^\s'\"]*")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")

each_notebook = pytest.mark.parametrize(
    "notebook", [pytest.param(path, id=path.relative_to(NOTEBOOKS).as_posix()) for path in ALL], indirect=True
)


@pytest.fixture
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def strings(value):
    """Every string inside nested lists and dictionaries."""
    if isinstance(value, str):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for child in children for text in strings(child)]


def texts(notebook):
    return [cell.source for cell in notebook.cells] + strings(outputs(notebook))


def last_heading(path):
    cells = nbformat.read(path, as_version=4).cells
    headings = [line for cell in cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    return [line for line in headings if line.startswith("## ")][-1:]


def test_there_are_notebooks():
    assert TUTORIAL != []


def test_the_folder_holds_notebooks_and_three_scripts_and_nothing_that_a_run_left_there():
    command = ["git", "ls-files", "--", "."]
    tracked = subprocess.run(command, cwd=NOTEBOOKS, capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in tracked if not name.endswith(".ipynb")} <= {
        ".ruff.toml",
        "demo.py",
        "gallery.py",
        "stamp.py",
    }


# Outputs


@each_notebook
def test_a_notebook_is_committed_with_outputs(notebook):
    assert outputs(notebook) != []


@each_notebook
def test_a_notebook_ran_from_top_to_bottom(notebook):
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))


@each_notebook
def test_a_notebook_shows_no_error(notebook):
    assert [output.evalue for output in outputs(notebook) if output.output_type == "error"] == []


@each_notebook
def test_a_notebook_shows_no_warnings(notebook):
    assert [output.text for output in outputs(notebook) if output.get("name") == "stderr"] == []


@each_notebook
def test_the_outputs_belong_to_the_source(notebook):
    stamped = notebook.metadata.get("falcon_kit", {}).get("source_sha256")
    assert stamped == source_hash(notebook), "the source changed after the outputs were made: run `make notebooks`"


@pytest.mark.parametrize(
    "start",
    [
        "import tests.conftest",
        "import stamp, sys; stamp.stamp = print; sys.argv[1:] = ['a']; stamp.main()",
    ],
    ids=["tests", "stamp"],
)
def test_the_variables_of_a_reader_change_neither_the_tests_nor_the_committed_outputs(start):
    sources = [cell.source for path in ALL for cell in code_cells(nbformat.read(path, as_version=4))]
    names = {name for source in sources for name in re.findall(r'environ.*"(FALCON_KIT_\w+)"', source)}
    assert {"FALCON_KIT_MODEL", "FALCON_KIT_DATA", "FALCON_KIT_AWS"} <= names
    program = f"{start}\nimport os\nprint({{*os.environ}} & {names})"
    environ = os.environ | dict.fromkeys(names, "yes") | {"PYTHONPATH": str(NOTEBOOKS)}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=NOTEBOOKS.parent, env=environ, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "set()"


def test_the_picture_in_the_readme_is_the_notebooks():
    cells = nbformat.read(NOTEBOOKS / "01_inference.ipynb", as_version=4).cells
    (tagged,) = [cell for cell in cells if "readme" in cell.metadata.get("tags", [])]
    pictures = [base64.b64decode(output.data["image/png"]) for output in tagged.outputs if "image/png" in output.data]
    assert [(NOTEBOOKS.parent / "docs" / "01_inference.png").read_bytes()] == pictures


def test_the_playground_in_the_readme_is_that_of_its_notebook():
    cells = nbformat.read(NOTEBOOKS / "02_playground.ipynb", as_version=4).cells
    attached = [
        base64.b64decode(cell.attachments["playground.png"]["image/png"]) for cell in cells if "attachments" in cell
    ]
    assert [(NOTEBOOKS.parent / "docs" / "02_playground.png").read_bytes()] == attached


def pictures(notebook):
    found = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [(base64.b64decode(output.data["image/png"]), output.metadata) for output in found]


@each_notebook
def test_pictures_have_no_background_of_their_own(notebook):
    corners = [Image.open(io.BytesIO(picture)).convert("RGBA").getpixel((0, 0))[3] for picture, _ in pictures(notebook)]
    assert set(corners) <= {0}
    assert [metadata for _, metadata in pictures(notebook) if "needs_background" in metadata] == []


# Style


@pytest.mark.parametrize("path", [pytest.param(path, id=path.relative_to(NOTEBOOKS).as_posix()) for path in ALL])
def test_a_notebook_is_small(path):
    assert path.stat().st_size < 400_000


@each_notebook
def test_no_code_cell_is_longer_than_a_screen(notebook):
    assert [cell.source for cell in code_cells(notebook) if len(cell.source.splitlines()) > 20] == []


@each_notebook
def test_most_code_cells_are_a_few_lines(notebook):
    assert statistics.median(len(cell.source.splitlines()) for cell in code_cells(notebook)) <= 5


@each_notebook
def test_a_sentence_comes_before_each_code_cell(notebook):
    kinds = ["nothing", *(cell.cell_type for cell in notebook.cells)]
    alone = [
        cell.source
        for before, cell in zip(kinds, notebook.cells, strict=False)
        if cell.cell_type == "code" and before != "markdown"
    ]
    assert alone == []


@each_notebook
def test_the_first_code_cell_is_the_same_in_all_notebooks(notebook):
    assert code_cells(notebook)[0].source == FIRST_CELL


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in TUTORIAL])
def test_what_a_notebook_takes_is_printed_first(path):
    assert "fk.requirements(" in "".join(cell.source for cell in code_cells(nbformat.read(path, 4))[1:4])


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in TUTORIAL])
def test_every_section_with_code_names_the_machines_that_it_runs_on(path):
    cells = nbformat.read(path, as_version=4).cells
    starts = [at for at, cell in enumerate(cells) if cell.source.startswith("## ")]
    sections = [cells[start:end] for start, end in pairwise([*starts, len(cells)])]
    with_code = [section for section in sections if any(cell.cell_type == "code" for cell in section)]
    silent = [
        section[0].source.splitlines()[0]
        for section in with_code
        if not any(line.startswith("*Runs on: ") for line in section[0].source.splitlines()[1:3])
    ]
    assert [heading for heading in silent if heading != "## Exercises"] == []


@pytest.mark.parametrize("path", [pytest.param(path, id=path.relative_to(NOTEBOOKS).as_posix()) for path in ALL])
def test_relative_links_of_a_notebook_lead_to_files(path):
    cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
    links = re.findall(r"\]\((?!https?:|attachment:|#)([^)\s]+)\)", "\n".join(cells))
    assert [link for link in links if not (path.parent / link.partition("#")[0]).is_file()] == []


def test_the_first_notebook_links_to_all_others():
    text = "\n".join(cell.source for cell in nbformat.read(TUTORIAL[0], 4).cells)
    assert [path.name for path in TUTORIAL[1:] if f"| [{path.stem}]({path.name}) |" not in text] == []


@each_notebook
def test_a_notebook_names_no_path_of_its_author(notebook):
    assert [match for text in texts(notebook) for match in PRIVATE_PATH.findall(text)] == []


@each_notebook
def test_a_notebook_contains_no_access_token(notebook):
    assert [match for text in texts(notebook) for match in TOKEN.findall(text)] == []


# Exercises


NUMBERS = list(all_checks())


def results(path):
    """What `fk.check` returned in a notebook, such as {"00.1": "not yet"}."""
    found = re.findall(r"^(\d\d\.\d+): (right|not yet)\.", "\n".join(texts(nbformat.read(path, 4))), re.MULTILINE)
    return dict(found)


def exercises_of(path):
    return [number for number in NUMBERS if number.startswith(path.name[:2])]


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in TUTORIAL])
def test_a_notebook_has_two_to_four_exercises_that_check_themselves(path):
    assert 2 <= len(exercises_of(path)) <= 4
    assert results(path) == dict.fromkeys(exercises_of(path), "not yet")


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in TUTORIAL])
def test_the_shipped_solutions_are_right(path):
    assert results(NOTEBOOKS / "solutions" / path.name) == dict.fromkeys(exercises_of(path), "right")


def outcomes(path, folder):
    """What `fk.check` returns in the cells of a notebook, as `results`, when they run in a folder."""
    found, check = {}, fk.check

    def checked(*answers):
        outcome = check(*answers)
        found[outcome.exercise] = "right" if outcome.right else outcome.text
        return outcome

    with patch.object(fk, "check", checked), chdir(folder):
        for _, run in cells(path):
            run()
    return found


@pytest.fixture(scope="module")
def process():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in TUTORIAL])
def test_a_solution_is_right_when_it_runs(path, process, tmp_path):
    found = process.submit(outcomes, NOTEBOOKS / "solutions" / path.name, tmp_path).result()
    assert found == dict.fromkeys(exercises_of(path), "right")


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in TUTORIAL])
def test_a_notebook_ends_with_exercises(path):
    assert [heading.lower() for heading in last_heading(path)] == ["## exercises"]


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in TUTORIAL])
def test_the_exercises_have_solutions(path):
    assert (NOTEBOOKS / "solutions" / path.name).is_file()


def test_the_pipeline_of_the_cards_example_generates_what_the_kit_does_at_any_seed():
    notebook = nbformat.read(NOTEBOOKS / "01_inference.ipynb", as_version=4)
    (source,) = (cell.source for cell in code_cells(notebook) if "transformers.pipeline(" in cell.source)
    falcon = fk.load("falconet")
    for seed in range(3):
        found = {"fk": fk, "falcon": falcon}
        exec(source.replace("set_seed(0)", f"set_seed({seed})"), found)  # noqa: S102  # a cell of the notebook
        text = falcon.generate(fk.CARD.prompt, seed=seed, **fk.CARD.sampling).text
        assert found["sequences"][0]["generated_text"] == fk.CARD.prompt + text


def test_falcon_from_scratch_is_compared_up_to_the_end_of_an_answer():
    notebook = nbformat.read(NOTEBOOKS / "04_architecture.ipynb", as_version=4)
    (source,) = (cell.source for cell in code_cells(notebook) if "from scratch {seconds" in cell.source)
    falcon = fk.load("falconet-instruct")
    ids = falcon.tokenizer("User: What do giraffes eat?\nFalcon:", return_tensors="pt")["input_ids"]
    generated = ids
    for _ in range(40):
        generated = torch.cat([generated, falcon.model(generated).logits[:, -1:].argmax(-1)], dim=1)
    found = {"falcon": falcon, "model": falcon.model, "ids": ids, "generated": generated, "torch": torch, "seconds": 1}
    exec(source, found)  # noqa: S102  # a cell of the notebook
    assert found["answer"].finish_reason == "eos"
