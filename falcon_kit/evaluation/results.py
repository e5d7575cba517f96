"""`Evaluation`: what was measured, with everything needed to repeat it; a table, a figure, a JSON file."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from falcon_kit.display.documented import documented
from falcon_kit.display.errors import printable, require, unknown_name
from falcon_kit.display.reading import UNEXPECTED, read_json
from falcon_kit.display.saving import write_text
from falcon_kit.display.tables import html_table
from falcon_kit.evaluation import plots
from falcon_kit.evaluation.comparison import Comparison, Evaluated, compare
from falcon_kit.evaluation.statistics import Estimate
from falcon_kit.evaluation.task_results import TaskResult

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PUBLISHED: Mapping[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
"""The published averages of the leaderboard of 2023, in percent, what was measured, and where they are from."""
_FORMAT = 1  # of the JSON file


@documented
@dataclass(frozen=True, repr=False)
class Evaluation(Evaluated):
    """The result of `fk.evaluate`. All intervals are of 95%.

    `a.compare(b)` tests whether two models differ on the same items.
    """

    @property
    def perplexity(self) -> Any:
        """The perplexity of the text; by name, where several were given. Raises ValueError if none was."""
        require(bool(self.perplexities), "no text was given: fk.evaluate(falcon, text=...) measures perplexity")
        by_name = {each.name: each for each in self.perplexities}
        return self.perplexities[0] if len(by_name) == 1 else by_name

    def __getitem__(self, task: str) -> TaskResult:
        """The result of a task by its name."""
        for each in self.tasks:
            if each.task == task:
                return each
        raise KeyError(unknown_name("task", task, [each.task for each in self.tasks]))

    def compare(self, other: "Evaluation", seed: int = 0) -> Comparison:
        """A paired test of two models on the same items, for each text and each metric; see `Comparison`.

        seed: of the random signs of the sign-flip test. Raises ValueError unless both have the same tasks and texts
        with the same items.
        """
        return compare(self, other, seed)

    @property
    def leaderboard(self) -> Estimate | None:
        """The mean of the four tasks of the leaderboard of 2023, in percent; None unless all four were measured with
        its settings: every item, its number of examples, no chat."""
        found = {each.facts.get("leaderboard"): each for each in self.tasks}
        pairs = [(found.get(each["name"]), each["metric"]) for each in PUBLISHED["tasks"]]
        estimates = [each.estimate(metric) for each, metric in pairs if each and metric in each.metrics]
        if len(estimates) < len(pairs):
            return None
        value = 100 * float(np.mean([each.value for each in estimates]))
        half = 100 * math.hypot(*((each.high - each.low) / 2 for each in estimates)) / len(estimates)
        return Estimate(value, max(0.0, value - half), min(100.0, value + half))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of `to_dataframe`."""
        for text in self.perplexities:
            for metric in plots.OF_TEXTS:
                yield _row(text.name, metric, getattr(text, metric), text.tokens)
            yield _row(text.name, "bytes_per_token", Estimate(text.bytes_per_token, math.nan, math.nan), text.tokens)
        for task in self.tasks:
            for metric in task.names:
                chance = task.facts.get("chance") if metric.startswith("acc") else None
                yield _row(task.task, metric, task.estimate(metric), len(task.items)) | {"chance": chance}
        if average := self.leaderboard:
            published = PUBLISHED["averages"].get(self.model.rpartition("/")[2].lower())
            yield _row("leaderboard average", "percent", average, 4) | {"published": published}

    def to_dataframe(self) -> "pd.DataFrame":
        """A row for each value: name, metric, value, low, high, count, and chance or the published value."""
        import pandas as pd

        return pd.DataFrame(list(self.rows()))

    def figure(self) -> "Figure":
        """The results with their intervals; beside those of the leaderboard's tasks, the published averages."""
        return plots.evaluation_figure(list(self.rows()), self.model, PUBLISHED)

    def save(self, path: str | Path) -> Path:
        """Writes everything to a JSON file, which `Evaluation.load` reads; returns its path."""
        content = {"falcon_kit_evaluation": _FORMAT, **asdict(self)}
        return write_text(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Evaluation":
        """The evaluation in a file that `save` wrote. Raises ValueError for any other file."""
        from pydantic import TypeAdapter, ValidationError

        try:
            content = read_json(Path(path).expanduser(), "it may be incomplete")
            require(content.pop("falcon_kit_evaluation") == _FORMAT, "another format")
            found = TypeAdapter(cls).validate_python(content)
            found._repr_html_()  # computes all values
            return found
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except (*UNEXPECTED, ArithmeticError) as error:
            problem = str(error)
        raise ValueError(printable(f"{path} is no evaluation that Evaluation.save wrote, or is damaged ({problem})"))

    def __repr__(self) -> str:
        values = [f"{each.name}: {each.per_token} per token" for each in self.perplexities[:3]]
        values += [f"{each.task} {name} {each.estimate(name)}" for each in self.tasks for name in each.names[:1]]
        return printable(f"Evaluation({self.model}; {'; '.join(values[:6])})")

    def _repr_html_(self) -> str:
        rows = [row for row in self.rows() if row["metric"] not in ("per_byte", "per_word")]
        cells = [(row["name"], row["metric"], *_estimate(row), f"{row['count']:,}", _beside(row)) for row in rows]
        columns = ("", "metric", "value", "95% interval", "tokens or items", "beside it")
        width = len(columns) if any(each[-1] for each in cells) else len(columns) - 1
        return html_table(self.model, columns[:width], [each[:width] for each in cells])


def _row(name: str, metric: str, estimate: Estimate, count: int) -> dict[str, Any]:
    return {"name": name, "metric": metric, **asdict(estimate), "count": count}


def _estimate(row: Mapping[str, Any]) -> tuple[str, str]:
    """The cells of a value and of its interval."""
    value, low, high = Estimate(row["value"], row["low"], row["high"]).texts()
    return value, f"{low} to {high}" if low else ""


def _beside(row: Mapping[str, Any]) -> str:
    """The cell of the published value or of chance; empty for a row without either."""
    if row.get("published"):
        return f"published {row['published']}"
    return f"chance {row['chance']:.2g}" if row.get("chance") else ""
