"""Stereotypes in a model's likelihoods: pairs of sentences that differ in a word.

In each pair one sentence agrees with a common stereotype, and the other has another group in its place. Counted is how
often the model gives the first one the higher likelihood. CrowS-Pairs (Nangia et al. 2020, arXiv 2010.00133) counts the
same of masked models, by the words that both sentences share; a causal model gives the likelihood of all words.

What this measure cannot show:

- Likelihood also depends on how frequent a word is and on how many tokens it has. The axis "control" has pairs without
  any stereotype: a share that is as far from one half there shows nothing elsewhere.
- A share of one half does not show that a model is without bias: preferences in both directions cancel, and these few
  pairs in English, written by few people, cover a small part of what harms people.
- It does not show what a model writes, nor what an application does with it.
- Many pairs of CrowS-Pairs itself are unsound, as Blodgett et al. 2021 describe ("Stereotyping Norwegian Salmon").
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_kit.display.documented import documented
from falcon_kit.display.errors import check_whole, printable, require, unknown_name
from falcon_kit.display.tables import counted, html_table
from falcon_kit.evaluation import plots
from falcon_kit.evaluation.local import LocalModel
from falcon_kit.evaluation.statistics import Estimate, ratio, share
from falcon_kit.evaluation.tasks import parsed, text_of
from falcon_kit.tuning.files import rows as rows_of_files

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PAIRS = Path(__file__).with_name("pairs.jsonl")
"""The kit's own pairs, ten on each of six axes and ten controls."""
_CROWS = {"bias_type": "axis", "sent_more": "stereotype", "sent_less": "counterpart"}
"""The columns of CrowS-Pairs' csv, and the kit's names."""
_FORM = '{"axis": "...", "stereotype": "...", "counterpart": "..."}'
_LIMITS = (
    "A share of one half shows no preference in these pairs; it does not show that there is no bias. Likelihood also "
    "depends on the frequency and length of words{}. The measure shows nothing about written texts."
)


@dataclass(frozen=True)
class PairResult:
    """One pair."""

    axis: str
    """What the two groups differ in: "gender", "age", "origin", "religion", "disability", "class", or "control"."""
    stereotype: str
    """The sentence that agrees with a stereotype; for a control one of the two."""
    counterpart: str
    """The sentence with another group."""
    difference: float
    """The log-likelihood of the first sentence minus that of the second, in nats."""


@documented
@dataclass(frozen=True, repr=False)
class BiasReport:
    """How often a model finds the sentence with the stereotype more likely; see `falcon_kit.evaluation.bias`.

    A share of one half shows no preference in these pairs; it does not show that there is no bias.
    """

    model: str
    """The model's name."""
    pairs: tuple[PairResult, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(each.axis for each in self.pairs))

    def share(self, axis: str) -> Estimate:
        """The share of pairs in which the stereotype is more likely, with its 95% interval (Wilson)."""
        differences = self._differences(axis)
        return share(sum(each > 0 for each in differences), len(differences))

    def difference(self, axis: str) -> Estimate:
        """The mean difference of the log-likelihoods in nats, with its 95% interval."""
        differences = self._differences(axis)
        return ratio(differences, [1.0] * len(differences))

    def _differences(self, axis: str) -> list[float]:
        found = [each.difference for each in self.pairs if each.axis == axis]
        require(bool(found), unknown_name("axis", axis, self.axes))
        return found

    def to_dataframe(self) -> "pd.DataFrame":
        """A row for each axis: share, low, high, difference, pairs."""
        import pandas as pd

        rows = [
            (axis, *astuple(self.share(axis)), self.difference(axis).value, len(self._differences(axis)))
            for axis in self.axes
        ]
        return pd.DataFrame(rows, columns=["axis", "share", "low", "high", "difference", "pairs"])

    def figure(self) -> "Figure":
        """The share of each axis with its interval; the line at one half is no preference."""
        rows = [asdict(self.share(axis)) for axis in self.axes]
        return plots.shares_figure(rows, self.axes, f"{self.model}: the stereotype is more likely")

    def __repr__(self) -> str:
        shares = ", ".join(f"{axis} {self.share(axis).value:.0%}" for axis in self.axes)
        pairs = counted(len(self.pairs), "pair")
        return printable(f"BiasReport({self.model}, {pairs}; the stereotype is more likely: {shares})")

    def _repr_html_(self) -> str:
        def cells(axis: str) -> tuple[object, ...]:
            share, count = self.share(axis), len(self._differences(axis))
            interval, difference = f"{share.low:.0%} to {share.high:.0%}", self.difference(axis).value
            return axis, f"{share.value:.0%}", interval, f"{difference:+.2f}", count

        header = ("axis", "stereotype more likely", "95% interval", "mean difference, nats", "pairs")
        limits = _LIMITS.format(", as the controls show" if "control" in self.axes else "")
        return html_table(f"{self.model}. {limits}", header, map(cells, self.axes))


def bias(
    falcon: Any, pairs: "str | Path | Iterable[Mapping[str, Any]] | pd.DataFrame" = PAIRS, batch_size: int | None = None
) -> BiasReport:
    """Scores pairs of sentences by their likelihood.

    falcon: what `fk.load` returns, or a pair (model, tokenizer). pairs: the kit's own; or a file or rows (also a
    `datasets.Dataset` or a pandas DataFrame) with "axis", "stereotype" and "counterpart"; or those of CrowS-Pairs, a
    csv file with "bias_type", "sent_more" and "sent_less".
    Raises ValueError that names malformed rows by file and line, and TypeError for what holds no rows.
    """
    from falcon_kit.tuning.data import as_rows  # it imports pandas and datasets

    if batch_size is not None:
        check_whole("batch_size", batch_size, 1)
    source = Path(pairs).name if isinstance(pairs, (str, Path)) else "the list of pairs"
    rows = parsed(rows_of_files(as_rows(pairs, "fk.bias", f"A row is {_FORM}")), _pair, source, _FORM)
    model = LocalModel(falcon, batch_size)
    totals = model.rolling([sentence for _, *both in rows for sentence in both])
    differences = [one - two for one, two in zip(totals[::2], totals[1::2], strict=True)]
    results = (PairResult(*row, difference) for row, difference in zip(rows, differences, strict=True))
    return BiasReport(model.name, tuple(results))


def _pair(where: str, row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Axis, stereotype and counterpart of a row."""
    named = {_CROWS.get(name, name): value for name, value in row.items()}
    axis, stereotype, counterpart = (text_of(named, name) for name in _CROWS.values())
    require(stereotype != counterpart, "its two sentences are equal")
    return axis, stereotype, counterpart
