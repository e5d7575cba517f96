"""A separate JupyterLab and Chromium for tests and benchmarks: the user's settings are neither read nor changed."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlparse

from playwright.sync_api import Browser, Locator, Page, sync_playwright

from tests.children import ends_with_parent

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium(path: str) -> Iterator[Browser]:
    """The Chromium at that path, until the block ends."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """The address of a JupyterLab for the folder, with its token; {} stands for a path."""
    home = folder.parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    settings = home / "settings" / "@jupyterlab"
    # Neither news from the internet nor the question whether to show it.
    _write(settings / "apputils-extension" / "notification.jupyterlab-settings", {"fetchNews": "false"})
    environment = {
        **os.environ,
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "IPYTHONDIR": str(home / "ipython"),
        **{f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")},
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--port-retries=0"]
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.root_dir": str(folder),
        "IdentityProvider.token": token,
        "LabApp.expose_app_in_browser": "True",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
        "LabApp.news_url": "None",
    }
    command += [f"--{name}={value}" for name, value in options.items()]
    log = (home / "lab.log").open("w")
    command = ends_with_parent(command, signal.SIGTERM)
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api?token={token}", process, home / "lab.log")
        yield f"http://127.0.0.1:{port}/{{}}?token={token}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()  # noqa: S310  # the address is on this machine
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


def violations(page: Page, view: str) -> list[tuple[str, list[str]]]:
    """What axe-core finds in a view, given by its CSS selector."""
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text())
    found = page.evaluate("async (view) => (await axe.run(view)).violations", view)
    return [(each["id"], [node["html"][:200] for node in each["nodes"]][:3]) for each in found]


# Functions of a script: paint what is behind an element, or a colour; measure it (luminance, contrast of WCAG 2.2).
PAINTING = """
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const paint = (colour) => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); };
    const behind = (node) => {
        const layers = [];
        for (let each = node; each; each = each.parentElement) layers.unshift(getComputedStyle(each).backgroundColor);
        ["#fff", ...layers].forEach(paint);
    };
    const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    const luminance = () => {
        const [red, green, blue] = [...canvas.getImageData(0, 0, 1, 1).data].map((value) => linear(value / 255));
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const contrast = (one, other) => (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
"""


def faint_fields(view: Locator) -> list[str]:
    """The fields in a view whose edge has a contrast under 3 to the field or to what is around it."""
    found: list[str] = view.evaluate(
        f"""(view) => {{ {PAINTING}
            const shown = (node) => node.checkVisibility() && !["range", "checkbox"].includes(node.type);
            const faint = (node) => [node, node.parentElement].some((ground) => {{
                behind(ground);
                const beside = luminance();
                paint(getComputedStyle(node).borderTopColor);
                return contrast(luminance(), beside) < 3;
            }});
            const fields = [...view.querySelectorAll("input, select, textarea")].filter(shown);
            return fields.filter(faint).map((node) => node.outerHTML.slice(0, 200));
        }}"""
    )
    return found


def small_targets(view: Locator) -> list[str]:
    """The controls in a view that are smaller than 24 by 24 pixels for the pointer. A label belongs to its control."""
    found: list[str] = view.evaluate(
        """(view) => {
            const shown = [...view.querySelectorAll("button, input, select, textarea, [role=button]")]
                .filter((node) => node.checkVisibility());
            const small = (node) => {
                const { width, height } = (node.type === "checkbox" ? node.labels[0] : node).getBoundingClientRect();
                return Math.min(width, height) < 23.99;
            };
            return shown.filter(small).map((node) => node.outerHTML.slice(0, 200));
        }"""
    )
    return found


class Notebook:
    """An open notebook in JupyterLab, used like a person would, with access to its kernel."""

    def __init__(self, page: Page, address: str, name: str) -> None:
        self.page, self.address, self.name = page, address, name

    @classmethod
    def new(cls, page: Page, address: str, folder: Path) -> "Notebook":
        """A new notebook with one markdown cell, opened."""
        cells = [{"cell_type": "markdown", "id": "start", "metadata": {}, "source": "A notebook to work in"}]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
        content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
        (folder / "work.ipynb").write_text(json.dumps(content))
        notebook = cls(page, address, "work.ipynb")
        notebook.open()
        return notebook

    def open(self) -> None:
        """Opens or reloads it, and waits until its kernel is connected and idle. (The toolbar shows idle too early.)"""
        self.page.goto(self.address.format(f"lab/tree/{self.name}").replace("?", "?reset&"))
        self.page.wait_for_function(
            """() => {
                const kernel = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;
                return kernel?.connectionStatus === "connected" && kernel.status === "idle";
            }""",
            timeout=60_000,
        )

    def change_theme(self, dark: bool) -> None:
        """JupyterLab's dark or light theme."""
        theme = f"JupyterLab {'Dark' if dark else 'Light'}"
        self.page.evaluate("(theme) => jupyterapp.commands.execute('apputils:change-theme', { theme })", theme)
        self.page.wait_for_function(f"document.body.dataset.jpThemeLight === '{str(not dark).lower()}'")

    def run_until(self, source: str) -> Locator:
        """Runs all cells up to the first that contains `source`, and returns the outputs of that cell."""
        number, succeeded = self.page.evaluate(
            """async (source) => {
                const notebook = jupyterapp.shell.currentWidget.content;
                const number = notebook.widgets.findIndex((cell) => cell.model.sharedModel.source.includes(source));
                notebook.activeCellIndex = number;
                const above = await jupyterapp.commands.execute("notebook:run-all-above");
                return [number, above && (await jupyterapp.commands.execute("notebook:run-cell"))];
            }""",
            source,
        )
        assert number >= 0, f"no cell contains {source!r}"
        assert succeeded, "a cell failed"
        return self.outputs(number)

    def outputs(self, number: int) -> Locator:
        """The outputs of a cell, counted from 0."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(number).locator(".jp-Cell-outputArea")

    def start(self, source: str) -> Locator:
        """Runs a new cell at the end without waiting for it, and returns its outputs."""
        number = self.page.evaluate(
            """async (source) => {
                const notebook = jupyterapp.shell.currentWidget.content;
                notebook.activeCellIndex = notebook.widgets.length - 1;
                await jupyterapp.commands.execute("notebook:insert-cell-below");
                notebook.activeCell.model.sharedModel.setSource(source);
                jupyterapp.commands.execute("notebook:run-cell");
                return notebook.activeCellIndex;
            }""",
            source,
        )
        return self.outputs(number)

    def python(self, code: str) -> str:
        """Runs code in the kernel, outside the notebook, and returns its stdout; an error fails the test."""
        printed, error = self.page.evaluate(
            """async (code) => {
                const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
                const execution = kernel.requestExecute({ code, store_history: false });
                let [printed, error] = ["", null];
                execution.onIOPub = ({ header, content }) => {
                    if (header.msg_type === "stream") printed += content.text;
                    if (header.msg_type === "error") error = content.traceback.join("\\n");
                };
                await execution.done;
                return [printed, error];
            }""",
            code,
        )
        assert error is None, error
        return printed.strip()

    def clear(self) -> None:
        """Deletes all cells but the first."""
        self.page.evaluate(
            """async () => {
                const model = jupyterapp.shell.currentWidget.content.model.sharedModel;
                model.deleteCellRange(1, model.cells.length);
            }"""
        )


class Guarded:
    """A page that records its requests to other hosts and the errors of its scripts."""

    def __init__(self, browser: Browser, lab: str, **options: object) -> None:
        self.host = urlparse(lab).netloc
        self.context = browser.new_context(viewport={"width": 1280, "height": 1000}, **options)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page = self.context.new_page()
        self.left_the_host: list[str] = []
        self.errors: list[str] = []
        self.context.on("request", self._record)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _record(self, request) -> None:
        address = urlparse(request.url)
        if address.scheme not in ("data", "blob", "attachment") and address.netloc != self.host:
            self.left_the_host.append(request.url)
