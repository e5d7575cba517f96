"""The results of one task, item by item."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from falcon_kit.display.errors import printable, unknown_name
from falcon_kit.display.tables import counted
from falcon_kit.evaluation.statistics import Estimate, mean

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class TaskResult:
    """The results of a task, item by item."""

    task: str
    kind: str
    """"multiple choice", "generation" or "lm-eval"."""
    sha256: str
    """The hash of the items."""
    metrics: Mapping[str, tuple[float, ...]]
    """The value of each metric for each item: "acc" and "acc_norm", "exact_match" and "sureness", or lm-eval's."""
    items: tuple[Mapping[str, Any], ...]
    """What each item was and how it was answered."""
    facts: Mapping[str, Any]
    """What holds for the whole task: "chance", or lm-eval's version and number of examples."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Metrics that are no mean over items, by lm-eval's own computation: perplexities, BLEU, F1."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all metrics."""
        return (*self.metrics, *self.totals)

    def estimate(self, metric: str) -> Estimate:
        """The mean of a metric with its 95% interval; one of `totals` has none.

        Raises LookupError for a metric that the task has not.
        """
        if metric in self.totals:
            return Estimate(self.totals[metric], math.nan, math.nan)
        if metric not in self.metrics:
            raise LookupError(unknown_name("metric", metric, self.names))
        return mean(self.metrics[metric])

    def to_dataframe(self) -> "pd.DataFrame":
        """A row for each item."""
        import pandas as pd

        return pd.DataFrame([dict(item) for item in self.items])

    def __repr__(self) -> str:
        values = ", ".join(f"{name} {self.estimate(name)}" for name in self.names)
        return printable(f"TaskResult({self.task}, {counted(len(self.items), 'item')}: {values})")
