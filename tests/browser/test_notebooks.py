"""The notebooks whose outputs are to be used with hand and eye, opened in JupyterLab and run there."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from .lab import ROOT, Guarded, Notebook


@pytest.fixture
def page(guarded: Guarded) -> Iterator[Guarded]:
    guarded.left_the_host.clear()
    guarded.errors.clear()
    yield guarded
    assert guarded.left_the_host == []
    assert guarded.errors == []


def opened(guarded: Guarded, lab: str, folder: Path, name: str) -> Notebook:
    """A copy of a committed notebook, opened."""
    shutil.copy(ROOT / "notebooks" / name, folder / name)
    notebook = Notebook(guarded.page, lab, name)
    notebook.open()
    return notebook


def test_the_playground_of_its_notebook_is_alive(page: Guarded, lab: str, folder: Path):
    notebook = opened(page, lab, folder, "02_playground.ipynb")
    pad = notebook.run_until("pad = fk.playground(falcon)").locator(".fk-playground")
    pad.get_by_label("Examples").select_option("A question")
    pad.locator(".fk-composer textarea").press("Control+Enter")
    expect(pad.locator(".fk-said")).to_contain_text("Giraffes")
    notebook.run_until("session.generate(fk.CARD.prompt)")
    expect(pad.locator(".fk-said")).to_contain_text("giraffes")
