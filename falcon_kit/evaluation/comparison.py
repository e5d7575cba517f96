"""Two models on the same items: paired tests, which need fewer items than two intervals that must not overlap."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan, log, nan
from typing import TYPE_CHECKING, Any

from falcon_kit.display.documented import documented
from falcon_kit.display.errors import check_whole, printable, require
from falcon_kit.display.tables import html_table
from falcon_kit.evaluation.perplexity import Perplexity
from falcon_kit.evaluation.statistics import Estimate, mcnemar, mean_difference, ratio, sign_flip
from falcon_kit.evaluation.task_results import TaskResult

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.05
"""A difference is shown where the p-value is below it."""


@dataclass(frozen=True, repr=False)
class Evaluated:
    """What was measured of a model, and is compared."""

    model: str
    """The model's name."""
    record: Mapping[str, Any]
    """What the results depend on: the model's revision, dtype and probe, the settings, the versions of the libraries.
    The probe is the log-probabilities of a few fixed tokens, by which the same weights are recognised."""
    perplexities: tuple[Perplexity, ...]
    """The perplexity of each text."""
    tasks: tuple[TaskResult, ...]
    """The result of each task."""


@dataclass(frozen=True)
class Difference:
    """One metric of one task or text, for two models."""

    name: str
    """The task or the text."""
    metric: str
    first: float
    """Its value for the first model."""
    second: float
    """Its value for the second model."""
    difference: Estimate
    """The second value minus the first, with its 95% interval over pairs."""
    p_value: float
    """The probability of a difference at least as large where there is none; nan where no test can be made."""
    test: str
    """The test: "McNemar, exact" for metrics that are 0 or 1, otherwise "sign flips"; "none" without values by item."""
    count: int
    """The number of pairs."""

    @property
    def verdict(self) -> str:
        """What the test shows."""
        if isnan(self.p_value):
            return "not comparable"
        if self.p_value >= LEVEL:
            return "no difference can be shown"
        return "the second is higher" if self.difference.value > 0 else "the first is higher"


@documented
@dataclass(frozen=True, repr=False)
class Comparison:
    """A paired test for each metric of two evaluations on the same items.

    That no difference can be shown does not show that there is none: more items may show one. Each test stands for
    itself; of twenty comparisons of equal models, about one has a p-value below 0.05.
    """

    first: str
    """The name of the first model."""
    second: str
    """The name of the second model."""
    differences: tuple[Difference, ...]
    """A test for each metric."""
    settings: Mapping[str, tuple[Any, Any]]
    """What is not the same in both evaluations: settings, dtype, chat format, the weights of one name, and the prompts
    of lm-eval's tasks (a hash of them)."""

    def to_dataframe(self) -> "pd.DataFrame":
        """A row for each metric."""
        import pandas as pd

        rows = [asdict(each) | asdict(each.difference) | {"verdict": each.verdict} for each in self.differences]
        return pd.DataFrame(rows).drop(columns="difference").rename(columns={"value": "difference"})

    def __repr__(self) -> str:
        verdicts = "; ".join(f"{each.name} {each.metric}: {each.verdict}" for each in self.differences)
        return printable(f"Comparison({self.first} and {self.second}{self._other()}: {verdicts})")

    def _other(self) -> str:
        """What is not the same, in words."""
        return "".join(f"; {name}: {first!r} and {second!r}" for name, (first, second) in self.settings.items())

    def _repr_html_(self) -> str:
        def cells(each: Difference) -> tuple[str, ...]:
            p_value = "" if isnan(each.p_value) else f"{each.p_value:.2g} ({each.test}, {each.count} pairs)"
            values = f"{each.first:.4g}", f"{each.second:.4g}", str(each.difference)
            return each.name, each.metric, *values, p_value, each.verdict

        title = f"{self.first} (first) and {self.second} (second){self._other()}"
        header = ("", "metric", "first", "second", "difference", "p-value", "verdict")
        return html_table(title, header, map(cells, self.differences))


def compare(first: Evaluated, second: Evaluated, seed: int) -> Comparison:
    """The paired tests of two evaluations; see `Evaluation.compare`."""
    check_whole("seed", seed, 0)
    _check_same("tasks", [each.task for each in first.tasks], [each.task for each in second.tasks])
    _check_same("texts", [each.name for each in first.perplexities], [each.name for each in second.perplexities])
    require(bool(first.tasks or first.perplexities), "there is nothing to compare: neither has a task or a text")
    texts = {each.name: each for each in second.perplexities}
    tasks = {each.task: each for each in second.tasks}
    differences = [_texts(each, texts[each.name], seed) for each in first.perplexities]
    for each in first.tasks:
        differences += _tasks(each, tasks[each.task], seed)
    return Comparison(first.model, second.model, tuple(differences), _other(first, second))


def _other(first: Evaluated, second: Evaluated) -> dict[str, tuple[Any, Any]]:
    """What is not the same. Two models have other weights, so only those of the same name are compared."""
    names = ("dtype", "chat format", *(("revision", "fingerprint", "adapter") if first.model == second.model else ()))
    ours, theirs = (
        {name: each.record.get(name) for name in names} | each.record.get("settings", {}) | _prompts(each)
        for each in (first, second)
    )
    pairs = {name: (ours.get(name), theirs.get(name)) for name in sorted(ours.keys() | theirs.keys())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _prompts(evaluated: Evaluated) -> dict[str, str]:
    """A hash of the prompts of each task of lm-eval; those of the kit's own follow from their items and settings."""
    hashes = {each.task: json.dumps([item.get("prompt_hash") for item in each.items]) for each in evaluated.tasks}
    return {f"prompts of {name}": hashlib.sha256(each.encode()).hexdigest()[:8] for name, each in hashes.items()}


def _check_same(kind: str, first: Sequence[str], second: Sequence[str]) -> None:
    only = {"the first": {*first} - {*second}, "the second": {*second} - {*first}}
    for where, names in only.items():
        require(not names, f"only {where} evaluation has the {kind} {', '.join(sorted(names))}: give both the same")


def _texts(first: Perplexity, second: Perplexity, seed: int) -> Difference:
    """Bits per byte of the same documents, or of the same blocks."""
    _check_hash(first.name, first.sha256, second.sha256)
    require(
        first.documents > 1 or first.tokens == second.tokens,
        f"the tokenizers cut the text {first.name!r} differently, so blocks cannot be paired: give several documents",
    )
    sizes = [part.bytes for part in first.parts]
    nats = [two.nats - one.nats for one, two in zip(first.parts, second.parts, strict=True)]
    difference = ratio([each / log(2) for each in nats], sizes)
    values = first.bits_per_byte.value, second.bits_per_byte.value
    return Difference(first.name, "bits_per_byte", *values, difference, sign_flip(nats, seed), "sign flips", len(nats))


def _tasks(first: TaskResult, second: TaskResult, seed: int) -> Iterator[Difference]:
    """Every metric that both have."""
    _check_hash(first.task, first.sha256, second.sha256)
    for metric in first.metrics:
        if metric in second.metrics:
            yield _metric(first.task, metric, first.metrics[metric], second.metrics[metric], seed)
    for metric in first.totals:
        if metric in second.totals:
            values = first.totals[metric], second.totals[metric]
            difference = Estimate(values[1] - values[0], nan, nan)
            yield Difference(first.task, metric, *values, difference, nan, "none", len(first.items))


def _metric(name: str, metric: str, first: Sequence[float], second: Sequence[float], seed: int) -> Difference:
    gains = [two - one for one, two in zip(first, second, strict=True)]
    count = len(gains)
    if {*first, *second} <= {0.0, 1.0}:
        test, p_value = "McNemar, exact", mcnemar(gains.count(-1), gains.count(1))
    else:
        test, p_value = "sign flips", sign_flip(gains, seed)
    values = sum(first) / count, sum(second) / count
    return Difference(name, metric, *values, mean_difference(first, second), p_value, test, count)


def _check_hash(name: str, first: str, second: str) -> None:
    require(
        first == second,
        f"the items of {name!r} differ between the two evaluations, so they cannot be paired: give both the same",
    )
