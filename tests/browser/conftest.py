"""One JupyterLab and one Chromium for all browser tests; each test adds its own cells to one open notebook.

The notebook's kernel keeps the imported kit and the loaded model, which saves about ten seconds per test.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from .chromium import MISSING, find
from .lab import Guarded, Notebook, chromium, jupyterlab

expect.set_options(timeout=20_000)


def pytest_terminal_summary(terminalreporter) -> None:
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if MISSING in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests: {MISSING}", yellow=True, bold=True)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = find()
    if path is None:
        pytest.skip(MISSING)
    with chromium(path) as browser:
        yield browser


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of JupyterLab's notebooks."""
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def lab(folder: Path) -> Iterator[str]:
    with jupyterlab(folder) as address:
        yield address


@pytest.fixture(scope="session")
def guarded(browser: Browser, lab: str) -> Iterator[Guarded]:
    guarded = Guarded(browser, lab)
    yield guarded
    guarded.context.close()


@pytest.fixture(scope="session")
def opened(guarded: Guarded, lab: str, folder: Path) -> Notebook:
    """A notebook with the kit imported and falconet-instruct loaded."""
    opened = Notebook.new(guarded.page, lab, folder)
    opened.python("import falcon_kit as fk; falcon = fk.load('falconet-instruct')")
    return opened


@pytest.fixture
def notebook(opened: Notebook, guarded: Guarded) -> Iterator[Notebook]:
    """The open notebook. Each test also checks that no request leaves the host and no script of the page fails."""
    if opened.name not in guarded.page.url:  # another test opened its own
        opened.open()
    guarded.left_the_host.clear()
    guarded.errors.clear()
    yield opened
    opened.clear()
    assert guarded.left_the_host == []
    assert guarded.errors == []
