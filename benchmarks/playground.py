"""The playground in JupyterLab and Chromium compared with a plain loop: how much of a model's speed it shows.

- streaming: the same tokens by `for piece in stream` and through the widget on an open page, alternately; from a model
  with a fixed speed, at two speeds, and from Falconet;
- updates: time of the page's main thread per update, with an empty conversation and with one of 10,000 tokens;
- first word: from the model's first token to the character in the page, and to the frame that paints it;
- stop: from the key to the end, on a model that generates nothing more.

Times in the page are from Chromium's counters and from the clock that kernel and browser share.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import CannotRun
from tests.browser.chromium import MISSING, find
from tests.browser.lab import Guarded, Notebook, chromium, jupyterlab

PACES = (50, 100)
TOKENS = 200
ROUNDS = 5
HISTORY = 10_000

# In the kernel. A paced model generates each token on schedule, so any overhead of its reader lowers the speed.
KERNEL = f"""
import json, statistics, time
from types import SimpleNamespace
import falcon_kit as fk
from falcon_kit.generation.text import Alternative, Piece

ALTERNATIVES = tuple(Alternative(f" word{{n}}", n, -1.0 - n) for n in range(5))

class Paced:
    def __init__(self, pace=None, tokens={TOKENS}, silent=False):
        self.pace, self.tokens, self.silent, self.model, self.first = pace, tokens, silent, "paced", None

    def stream(self, prompt, **settings):
        return Pieces(self)

class Pieces:
    def __init__(self, model):
        self.model, self.closed = model, False

    def __iter__(self):
        start = time.perf_counter()
        for number in range(self.model.tokens):
            if self.model.pace:
                time.sleep(max(0.0, start + (number + 1) / self.model.pace - time.perf_counter()))
            if self.closed:
                return
            if number == 0:
                self.model.first = time.time() * 1000
            yield Piece(f" word{{number}}", number, -1.0, ALTERNATIVES)
        while self.model.silent and not self.closed:
            time.sleep(0.01)

    def close(self):
        self.closed = True

    @property
    def generation(self):
        return SimpleNamespace(text="", finish_reason="eos", stats=SimpleNamespace())

falcon = fk.load("falconet")

def bare(stream):
    start, count = time.perf_counter(), 0
    for piece in stream:
        count += 1
    return count / (time.perf_counter() - start)

def through(session, prompt):
    start = time.perf_counter()
    turn = session.generate(prompt)
    return turn.answers[0].new_tokens / (time.perf_counter() - start)

def compare(model, session, settings, rounds={ROUNDS}):
    session.set(**settings)
    ways = {{
        "bare loop": lambda: bare(model.stream("Animals", **settings)),
        "playground": lambda: through(session, "Animals"),
    }}
    speeds = {{name: [] for name in ways}}
    for _ in range(rounds + 1):  # the first round warms up
        for name, way in ways.items():
            speeds[name].append(way())
    return {{name: statistics.median(each[1:]) for name, each in speeds.items()}}
"""


def run() -> dict[str, Any]:
    """Tokens per second and their ratio; milliseconds of the page per update, to the first word, and to stop."""
    path = find()
    if path is None:
        raise CannotRun(MISSING)
    with tempfile.TemporaryDirectory() as home, chromium(path) as browser:
        folder = Path(home) / "notebooks"
        folder.mkdir()
        with jupyterlab(folder) as address:
            notebook = Notebook.new(Guarded(browser, address).page, address, folder)
            notebook.python(KERNEL)
            return {
                "tokens": TOKENS,
                "rounds": ROUNDS,
                "tokens per second": _streaming(notebook),
                "ms of the page's main thread per update": _updates(notebook),
                "ms from the first token to the first word": _first_word(notebook),
                "ms from Esc to the end of a silent answer": _stop(notebook),
            }


def _open(notebook: Notebook, model: str) -> None:
    """Shows a playground for a model on an otherwise empty page."""
    notebook.clear()
    notebook.start(f"model = {model}\npad = fk.playground(model)\npad").locator(".fk-playground h2").wait_for()
    notebook.page.wait_for_function("document.querySelector('.fk-playground h2').textContent !== ''")


def _streaming(notebook: Notebook) -> dict[str, dict[str, float]]:
    results = {}
    for pace in PACES:
        _open(notebook, f"Paced({pace})")
        results[f"paced at {pace}"] = _compare(notebook, "{}")
    _open(notebook, "falcon")
    settings = f"dict(max_new_tokens={TOKENS}, temperature=1.0, top_k=50, seed=0)"
    results["falconet"] = _compare(notebook, settings)
    return results


def _compare(notebook: Notebook, settings: str) -> dict[str, float]:
    speeds = json.loads(notebook.python(f"print(json.dumps(compare(model, pad.session, {settings})))"))
    ratio = speeds["playground"] / speeds["bare loop"]
    return {name: round(speed, 1) for name, speed in speeds.items()} | {"ratio": round(ratio, 3)}


def _updates(notebook: Notebook) -> dict[str, dict[str, float]]:
    """Time of the main thread per update while 300 tokens are shown at 100 per second, below little or much text."""
    counters = notebook.page.context.new_cdp_session(notebook.page)
    counters.send("Performance.enable")
    results = {}
    for history in (0, HISTORY):
        _open(notebook, "Paced(None, 1000)")
        notebook.page.get_by_label("Token probabilities").check()
        notebook.python("pad.session.switch('chat')")
        notebook.python(f"for _ in range({history // 1000}): pad.session.generate('Go on')")
        notebook.page.wait_for_function(f"document.querySelectorAll('.fk-token').length === {history}")
        notebook.page.evaluate(_WATCH)
        before = _busy(counters)
        notebook.python("model.pace, model.tokens = 100, 300; turn = pad.session.generate('Go on')")
        notebook.page.wait_for_function(f"document.querySelectorAll('.fk-token').length === {history + 300}")
        after, seen = _busy(counters), notebook.page.evaluate("window.seen")
        mean = (after - before) / seen["updates"] * 1000
        results[f"{history} tokens of history"] = {
            "mean": round(mean, 1),
            "longest task": round(max(seen["long"], default=0)),
        }
    return results


_WATCH = """() => {
    window.seen = { updates: 0, long: [] };
    const count = () => (window.seen.updates += 1);
    new MutationObserver(count).observe(document.querySelector(".fk-log"), { childList: true, subtree: true });
    new PerformanceObserver((list) => window.seen.long.push(...list.getEntries().map((each) => each.duration)))
        .observe({ type: "longtask" });
}"""


def _busy(counters: Any) -> float:
    """Seconds of work of the page's main thread so far."""
    metrics = {each["name"]: each["value"] for each in counters.send("Performance.getMetrics")["metrics"]}
    return metrics["TaskDuration"]


def _first_word(notebook: Notebook) -> dict[str, float]:
    """Milliseconds from the model's first token, by the clock of the machine."""
    inserted, painted = [], []
    for _ in range(10):
        _open(notebook, "Paced(50, 20)")
        notebook.page.evaluate(
            """() => {
                window.word = {};
                const look = () => {
                    if (!document.querySelector(".fk-generated")?.textContent || window.word.inserted) return;
                    window.word.inserted = Date.now();
                    requestAnimationFrame(() => setTimeout(() => (window.word.painted = Date.now())));
                };
                const text = document.querySelector(".fk-log");
                new MutationObserver(look).observe(text, { childList: true, subtree: true });
            }"""
        )
        notebook.page.locator(".fk-composer textarea").fill("Go")
        notebook.page.locator(".fk-composer textarea").press("Control+Enter")
        notebook.page.wait_for_function("window.word.painted")
        first = float(notebook.python("print(model.first)"))
        word = notebook.page.evaluate("window.word")
        inserted.append(word["inserted"] - first)
        painted.append(word["painted"] - first)
    return {
        "in the page, median": round(statistics.median(inserted)),
        "painted, median": round(statistics.median(painted)),
        "painted, worst of 10": round(max(painted)),
    }


def _stop(notebook: Notebook) -> dict[str, float]:
    """Milliseconds from Esc to the end of an answer whose model has stopped generating without an end."""
    took = []
    for _ in range(10):
        _open(notebook, "Paced(None, 5, silent=True)")
        notebook.page.locator(".fk-composer textarea").fill("Go")
        notebook.page.locator(".fk-composer textarea").press("Control+Enter")
        notebook.page.wait_for_function("document.querySelectorAll('.fk-token').length === 5")
        took.append(
            notebook.page.evaluate(
                """async () => {
                    const start = performance.now();
                    const key = new KeyboardEvent("keydown", { key: "Escape", bubbles: true });
                    document.querySelector(".fk-composer textarea").dispatchEvent(key);
                    while (document.querySelector(".fk-writing")) await new Promise((done) => setTimeout(done, 5));
                    return performance.now() - start;
                }"""
            )
        )
    return {"median": round(statistics.median(took)), "worst of 10": round(max(took))}
